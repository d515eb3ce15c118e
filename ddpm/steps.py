"""The reverse chain as a table: one row of coefficients per step, in the family's own precision and order.

Every sampler of the project is an instance of one step form (`kernels/reverse_step.py` runs it):

    x_0 = f((kx x_t + ke out) / kd)
    x_{t-1} = c0 x_0 + cx x_t + ce out + s z

with `out` the network's output, f a clip and z standard normal. This file decides the rows; nothing after it knows a
schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ddpm.kernels.reverse_step import COLUMNS
from ddpm.schedule import PREDICTION_TYPES, NoiseSchedule

SPACINGS = ("leading", "linspace", "trailing")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")


@dataclass(frozen=True)
class SamplingRules:
    """How a family samples, as its scheduler's configuration says it.

    Attributes:
        prediction_type: what the network outputs: "epsilon", "sample" (x_0) or "v_prediction".
        variance_type: of the reverse step; see `ddpm_steps`. The learned kinds read it from the network's second half.
        clip: f of the step form: "none", "clamp" (to +-clip_range) or "dynamic" (Saharia et al. 2022, section 2.3).
        clip_range: bound of the clamp.
        threshold_ratio: quantile of |x_0| of the dynamic threshold, in (0, 1].
        threshold_max: upper bound of the dynamic threshold, at least 1.
        timestep_spacing: "leading", "linspace" or "trailing".
        steps_offset: added to the timesteps of "leading".

    Raises:
        ValueError: a value that is not one of these.
    """

    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    clip: str = "clamp"
    clip_range: float = 1.0
    threshold_ratio: float = 0.995
    threshold_max: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        if self.variance_type == "fixed_large_log":
            raise ValueError(
                "variance_type 'fixed_large_log' takes the square root of a negative logarithm, so the original gives "
                "NaN at every step; set variance_type to 'fixed_large', which is what was meant"
            )
        for name, allowed in (
            ("prediction_type", PREDICTION_TYPES),
            ("variance_type", VARIANCE_TYPES),
            ("clip", ("none", "clamp", "dynamic")),
            ("timestep_spacing", SPACINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @property
    def learned_variance(self) -> bool:
        """Whether the network's output holds a second half of channels, the variance."""
        return self.variance_type in ("learned", "learned_range")


@dataclass(frozen=True)
class StepTable:
    """A chain of S steps, first step first.

    Attributes:
        timesteps: int64 [S], what the network is told.
        coefficients: float32 [S, len(COLUMNS)], on the CPU; see `kernels/reverse_step.py` for the columns.
        draws: whether step i draws noise; a step that does not draw leaves a generator's stream alone.
        rules: clip and variance kinds, the same for all steps.
    """

    timesteps: Tensor
    coefficients: Tensor
    draws: tuple[bool, ...]
    rules: SamplingRules

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def variance(self) -> str:
        """The kernel's variance kind: "fixed", "learned" or "learned_range"."""
        return self.rules.variance_type if self.rules.learned_variance else "fixed"


def is_integer(value: object) -> bool:
    """Whether a count may be this: Python's and NumPy's integers, but no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def spaced_timesteps(num_train_timesteps: int, steps: int, rules: SamplingRules) -> list[int]:
    """The descending timesteps of a chain of `steps` steps (Lin et al. 2023, table 2; diffusers' rounding).

    Where T / steps is not exact in floating point, diffusers' "trailing" can come out one step too long, with a last
    timestep of -1 (T = 1000, 61 steps): that step reads the schedule from its noisy end and ruins the image. It is
    left out here; it draws no noise, so a generator's stream is the same.

    Raises:
        ValueError: steps not in 1 .. T, or an offset that leads past T - 1.
    """
    total = num_train_timesteps
    if not is_integer(steps) or not 1 <= steps <= total:
        raise ValueError(
            f"steps must be an integer from 1 to {total}, the checkpoint's training timesteps; got {steps!r}"
        )
    if rules.timestep_spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps).round()[::-1]
    elif rules.timestep_spacing == "leading":
        timesteps = (np.arange(steps) * (total // steps))[::-1] + rules.steps_offset
    else:
        timesteps = (np.round(np.arange(total, 0, -total / steps)) - 1)[:steps]
    result = [int(t) for t in timesteps]
    if result[0] >= total:
        raise ValueError(
            f"steps={steps} with steps_offset={rules.steps_offset} starts at timestep {result[0]}, past the last "
            f"trained one, {total - 1}; take fewer steps or another spacing"
        )
    return result


def check_timesteps(timesteps: Sequence[int], num_train_timesteps: int) -> list[int]:
    """Custom timesteps as a list.

    Raises:
        ValueError: not integers, not strictly descending, or not all in 0 .. T - 1.
    """
    if not isinstance(timesteps, (Sequence, np.ndarray, Tensor)) or isinstance(timesteps, str):
        raise ValueError(f"timesteps must be a sequence of integers; got {timesteps!r}")
    result = [int(t) for t in timesteps]
    if not result or any(a != b for a, b in zip(result, timesteps, strict=True)):
        raise ValueError(f"timesteps must be a non-empty sequence of integers; got {list(timesteps)!r}")
    if any(later >= earlier for earlier, later in pairwise(result)):
        raise ValueError("timesteps must be strictly descending, the noisiest first")
    if not 0 <= result[-1] <= result[0] < num_train_timesteps:
        raise ValueError(f"timesteps must lie in 0 .. {num_train_timesteps - 1}; got {result[0]} .. {result[-1]}")
    return result


def ddpm_steps(
    schedule: NoiseSchedule,
    rules: SamplingRules,
    steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    spacing: str | None = None,
) -> StepTable:
    """The ancestral chain (Ho et al. 2020, algorithm 2 and eq. 7), with diffusers' arithmetic.

    With a = alphas_cumprod[t], p = alphas_cumprod of the next step of the chain (1 after the last), b = 1 - a,
    q = 1 - p, A = a / p, B = 1 - A: the mean is (sqrt(p) B / b) x_0 + (sqrt(A) q / b) x_t, and with
    V = max(q / b B, 1e-20) the standard deviation is

        fixed_small, fixed_small_log   sqrt(V)
        fixed_large                    sqrt(B)
        learned                        sqrt(v), v the network's second half, elementwise
        learned_range                  exp((f log B + (1 - f) log V) / 2), f = (v + 1) / 2, elementwise

    Noise is drawn and added where the timestep is above 0, even on the last step of a chain that ends above 0. All of
    it is float32 in the order that diffusers' DDPMScheduler.step has: float64 would differ by up to 3e-4 a step.

    Args:
        schedule: float32 betas and alphas_cumprod.
        steps: number of steps; None means T.
        timesteps: the chain itself, strictly descending, instead of steps.
        spacing: overrides rules.timestep_spacing.

    Raises:
        ValueError: steps together with timesteps, or either out of range.
    """
    total = schedule.num_train_timesteps
    if timesteps is not None:
        if steps is not None or spacing is not None:
            raise ValueError("give either timesteps or steps and spacing, not both")
        chain = check_timesteps(timesteps, total)
    else:
        if spacing is not None:
            rules = replace(rules, timestep_spacing=spacing)
        chain = spaced_timesteps(total, total if steps is None else steps, rules)

    rows = torch.zeros(len(chain), len(COLUMNS))
    one = torch.tensor(1.0)
    for i, t in enumerate(chain):
        a = schedule.alphas_cumprod[t]
        p = schedule.alphas_cumprod[chain[i + 1]] if i + 1 < len(chain) else one
        rows[i] = _ddpm_row(a, p, rules, draws=t > 0)
    return StepTable(torch.tensor(chain), rows, tuple(t > 0 for t in chain), rules)


def _ddpm_row(a: Tensor, p: Tensor, rules: SamplingRules, *, draws: bool) -> Tensor:
    """One row from 0-dim float32 tensors: each operation rounds to float32, in the order of the original."""
    b, q = 1 - a, 1 - p
    alpha = a / p
    beta = 1 - alpha
    posterior_variance = torch.clamp(q / b * beta, min=1e-20)
    row = dict.fromkeys(COLUMNS, torch.tensor(0.0))
    row |= _prediction_coefficients(a, b, rules.prediction_type)
    row["c0"] = (p**0.5 * beta) / b
    row["cx"] = alpha**0.5 * q / b
    row["clip"] = torch.tensor(rules.clip_range)
    if rules.learned_variance:
        row["s"] = torch.tensor(float(draws))
        row["log_min"], row["log_max"] = posterior_variance.log(), beta.log()
    elif draws:
        row["s"] = {
            "fixed_small": lambda: posterior_variance**0.5,
            "fixed_small_log": lambda: torch.exp(0.5 * posterior_variance.log()),
            "fixed_large": lambda: beta**0.5,
        }[rules.variance_type]()
    return torch.stack([row[name] for name in COLUMNS])


def _prediction_coefficients(a: Tensor, b: Tensor, prediction_type: str) -> dict[str, Tensor]:
    """kx, ke, kd such that x_0 = (kx x_t + ke out) / kd: the inverse of q(x_t | x_0) for what the network predicts."""
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    if prediction_type == "epsilon":
        return {"kx": one, "ke": -(b**0.5), "kd": a**0.5}
    if prediction_type == "sample":
        return {"kx": zero, "ke": one, "kd": one}
    return {"kx": a**0.5, "ke": -(b**0.5), "kd": one}
