"""A chain of guided-diffusion in plain PyTorch, for what reaches into its steps: any network, another x_0, a gradient.

The coefficients are the step table's, so that each step is the captured one where nothing interferes:

    x_0 = f((kx x_t + ke out) / kd)
    x_{t-1} = c0 x_0 + cx x_t + std z
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ddpm.kernels.reverse_step import COLUMNS
from ddpm.run import NonFiniteError, Progress, progress_bar
from ddpm.schedule import NoiseSchedule
from ddpm.steps import StepTable


def guided_steps(
    model: Callable[..., Tensor],
    shape: tuple[int, int, int, int],
    table: StepTable,
    schedule: NoiseSchedule,
    device: torch.device,
    *,
    noise: Tensor | None,
    clip_denoised: bool,
    denoised_fn: Callable[[Tensor], Tensor] | None,
    cond_fn: Callable[..., Tensor] | None,
    model_kwargs: dict[str, Any],
    progress: Progress,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk one chain; the arguments not said here are those of `GaussianDiffusion.p_sample_loop`.

    Classifier guidance (Dhariwal and Nichol 2021) shifts the mean of an ancestral step by variance gradient (algorithm
    1), and the noise that DDIM goes on with by -sqrt(1 - a) gradient (algorithm 2): x_0 by (1 - a) / sqrt(a) gradient.

    Args:
        shape: (N, C, H, W).
        table: the chain, by OpenAI's convention.
        schedule: that it was made from.
        device: where the state is, and whose global generator is drawn from.

    Yields:
        (x_{t-1}, x_0), float32 [N, C, H, W], after each step; the next one starts from x_{t-1} as it then is.

    Raises:
        ValueError: the output of model, denoised_fn or cond_fn has another shape.
        NonFiniteError: it is NaN or infinite.
    """
    x = torch.randn(shape, device=device) if noise is None else noise.to(device, torch.float32)
    ddim = table.rules.sampler == "ddim"
    with progress_bar(len(table), progress) as advance:
        for i, timestep in enumerate(table.timesteps.tolist()):
            row = dict(zip(COLUMNS, table.coefficients[i].tolist(), strict=True))
            t = table.network_timesteps[i].to(device).repeat(len(x))
            with torch.no_grad():  # not while the caller has control
                out = model(x, t, **model_kwargs)
                _check(out, shape, i, timestep, learned=table.rules.learned_variance)
                out, v = out.float().tensor_split([shape[1]], dim=1)
                x_0 = (row["kx"] * x + row["ke"] * out) / row["kd"]
                if denoised_fn is not None:
                    x_0 = _like(denoised_fn(x_0), shape, "denoised_fn")
                if clip_denoised:
                    x_0 = x_0.clamp(-row["clip"], row["clip"])
                if ddim and cond_fn is not None:
                    a = float(schedule.alphas_cumprod[timestep])
                    x_0 = x_0 + (1 - a) / a**0.5 * _like(cond_fn(x, t, **model_kwargs), shape, "cond_fn")
                z = torch.randn(shape, device=device)  # NCHW, whatever the layout of x
                mean = row["c0"] * x_0 + row["cx"] * x
                if not ddim and cond_fn is not None:
                    gradient = _like(cond_fn(x, t, **model_kwargs), shape, "cond_fn")
                    mean = mean + _variance(row, v, table.variance) * gradient
                x = mean
                if row["s"]:
                    std = row["s"] if table.variance == "fixed" else _variance(row, v, table.variance).sqrt()
                    x = mean + std * z
            advance()
            yield x, x_0


def _variance(row: dict[str, float], v: Tensor, kind: str) -> Tensor:
    """Of an ancestral step: of each element [N, C, H, W], or [] where it is fixed.

    Args:
        row: of the step table.
        v: the network's second half.
        kind: "fixed", "learned" or "learned_range", see `ddpm.coefficients`.
    """
    if kind == "learned":
        return v
    f = (v + 1) / 2 if kind == "learned_range" else torch.zeros(())  # log_min is log_max where it is fixed
    return torch.exp(f * row["log_max"] + (1 - f) * row["log_min"])


def _like(value: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """What a function of the caller's returned, in float32; it has the state's shape."""
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if found != list(shape):
        raise ValueError(f"{name} returned {found}; expected {list(shape)}, as it was given")
    return value.float()


def _check(out: Any, shape: tuple[int, ...], step: int, timestep: int, *, learned: bool) -> None:
    n, channels, *size = shape
    expected = [n, channels * (2 if learned else 1), *size]
    found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if found != expected:
        why = ", whose second half is the variance that this checkpoint learns" if learned else ""
        raise ValueError(f"model returned {found}; expected {expected}{why}")
    finite = out.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        advice = "the model, what it was given, or the input x_T is damaged"
        raise NonFiniteError(step, timestep, int(finite.int().argmin()), None, advice)
