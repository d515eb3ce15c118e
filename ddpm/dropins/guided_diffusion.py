"""guided-diffusion's `GaussianDiffusion` over a `ddpm.Sampler`, for code that samples with it or improved-diffusion.

    from ddpm.dropins.guided_diffusion import GaussianDiffusion

    diffusion = GaussianDiffusion(ddpm.load("64x64_diffusion.pt"), timestep_respacing="250")
    model = diffusion.model
    sample = diffusion.p_sample_loop(model, (4, 3, 64, 64), model_kwargs={"y": classes})  # as it was

The images are the original's for the same torch.manual_seed: x_T, and then one draw per step, the last one included,
come from the device's global generator.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddpm.checkpoints.guided_diffusion import CONVENTION
from ddpm.checks import boolean
from ddpm.dropins.checks import absent, check_device, check_sampler, check_shape
from ddpm.dropins.guided_network import GuidedNetwork
from ddpm.dropins.guided_steps import guided_steps
from ddpm.noise import default_generator
from ddpm.rules import SamplingRules
from ddpm.sampler import Sampler
from ddpm.schedule import NoiseSchedule
from ddpm.steps import step_table
from ddpm.timesteps import respaced_timesteps
from ddpm.unet import UNet

ORIGINAL = "guided-diffusion"
Model: TypeAlias = Callable[..., Tensor] | None
Hook: TypeAlias = Callable[..., Tensor] | None


class GaussianDiffusion:
    """The sampling methods of guided-diffusion's class of this name (of its SpacedDiffusion).

    A checkpoint of any family with a U-Net may be given (all but lucidrains'). It is sampled as guided-diffusion would
    sample that network: of its family's ways only what the network predicts, the kind of variance, the betas and the
    rescaling of timesteps stay.

    `model` itself runs in the captured loop. What reaches into a step (cond_fn, denoised_fn, a model of the caller's)
    is walked step by step, and a warning says so.

    Args:
        sampler: what `ddpm.load` gives. It stays as it is; network and captured loops are shared with it.
        timestep_respacing: the original's: "" for all timesteps, "250", "10,10,10" or "ddim50".

    Attributes:
        model: the network as the original's code calls it.
        num_timesteps: length of the respaced chain.
        timestep_map: its timesteps, of the training schedule, ascending.

    Raises:
        ValueError: no such sampler or respacing.
    """

    def __init__(self, sampler: Sampler, timestep_respacing: str = ""):
        checkpoint = check_sampler(sampler, UNet, ORIGINAL)
        if not isinstance(timestep_respacing, str):
            raise ValueError(f"timestep_respacing must be text, such as '250' or 'ddim50'; got {timestep_respacing!r}")
        rules = SamplingRules(
            **CONVENTION,
            prediction_type=checkpoint.rules.prediction_type,
            variance_type=checkpoint.rules.variance_type,
            rescale_timesteps=checkpoint.rules.rescale_timesteps,
        )
        schedule = NoiseSchedule.from_betas(checkpoint.schedule.betas.double())
        self.timestep_map = respaced_timesteps(schedule.num_train_timesteps, timestep_respacing)[::-1]
        if schedule.alphas_cumprod[self.timestep_map[-1]] == 0:
            raise ValueError(
                f"alphas_cumprod of {checkpoint.source} ends at 0, by which guided-diffusion divides; pass a "
                "timestep_respacing without the last timestep, such as 'ddim50'"
            )
        self.num_timesteps = len(self.timestep_map)
        self._respacing = timestep_respacing
        self._sampler = copy.copy(sampler)
        self._sampler.checkpoint = replace(checkpoint, schedule=schedule, rules=rules)
        self.model = GuidedNetwork(self._sampler)

    def __getattr__(self, name: str) -> Any:
        raise absent(self, name, ORIGINAL)

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: dict[str, Any] | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw images by ancestral sampling.

        Args:
            model: `self.model` (None is it too); or any other callable, called as model(x, t, **model_kwargs) with x_t
                and what the network is told, [N], at every step. It returns [N, C, H, W], or [N, 2C, H, W] where the
                checkpoint learns its variance.
            shape: (N, C, H, W), images of the checkpoint's size.
            noise: x_T, float32 of that shape; then no initial draw is made.
            clip_denoised: clamp x_0 to [-1, 1] at every step.
            denoised_fn: called as denoised_fn(x_0) at every step, before the clamp; returns another x_0.
            cond_fn: classifier guidance (Dhariwal and Nichol 2021, algorithm 1, and 2 with DDIM): called as
                cond_fn(x, t, **model_kwargs), returns the gradient of log p(y | x_t) with respect to x_t, like x_t.
            model_kwargs: of `self.model` "y", class numbers [N], and "low_res", images to enlarge, float [N, C, h, w]
                in [-1, 1]; of a model of the caller's anything.
            device: None, or the sampler's.
            progress: show a bar with steps per second.

        Returns:
            float32 [N, C, H, W] on the sampler's device.

        Raises:
            ValueError: a bad argument.
            NonFiniteError: the network's output was NaN or infinite.
        """
        call = Call(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return self._last(self._walk(call, "ddpm", None, preview=False))

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: dict[str, Any] | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """`p_sample_loop` step by step: yields {"sample": x_{t-1}, "pred_xstart": x_0} after each.

        The next step starts from what then stands under "sample": it may be changed, or replaced. Arguments are checked
        at once, and nothing is drawn before the first step is asked for. The generator may be left early; where two are
        walked at once on the same buffers, the first one raises RuntimeError.
        """
        call = Call(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return _copies(self._walk(call, "ddpm", None, preview=True))

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: dict[str, Any] | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Draw images by DDIM: as `p_sample_loop`, with eta from 0 (deterministic) to 1."""
        call = Call(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return self._last(self._walk(call, "ddim", eta, preview=False))

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: dict[str, Any] | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """`ddim_sample_loop` step by step, see `p_sample_loop_progressive`."""
        call = Call(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return _copies(self._walk(call, "ddim", eta, preview=True))

    def _walk(
        self, call: Call, sampler: str, eta: float | None, *, preview: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Check the call and make its chain: (x_{t-1}, x_0 where it is wanted) after each step, not to be kept."""
        call.check(self._sampler)
        # what is wrapped around our own model adds nothing that a captured loop lacks
        inner = getattr(call.model, "module", getattr(call.model, "_orig_mod", call.model))
        if inner is self.model:
            call.model = inner
        own = call.model is None or call.model is self.model
        if own:
            self.model.check(call.shape[0], **call.kwargs)
        reasons = [name for name in ("denoised_fn", "cond_fn") if getattr(call, name) is not None]
        if not own:
            reasons.append("a model that is not diffusion.model")
        if reasons:
            warnings.warn(
                f"sampling step by step in plain PyTorch, slower than the captured loop, for {', '.join(reasons)}",
                stacklevel=3,
            )
            return self._eager(call, sampler, eta)
        return self._captured(call, sampler, eta, preview)

    def _last(self, steps: Iterator[tuple[Tensor, Tensor | None]]) -> Tensor:
        """The last state of a chain, a copy. Other threads wait."""
        with self._sampler.lock:
            for x, _ in steps:  # noqa: B007
                pass
            return x.clone()

    def _captured(
        self, call: Call, sampler: str, eta: float | None, preview: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        s = self._sampler
        run = s.plan(
            call.shape[0],
            steps=self._respacing,
            sampler=sampler,
            eta=eta,
            generator=default_generator(s.device),
            noise=call.noise,
            labels=call.kwargs.get("y"),
            low_res=call.kwargs.get("low_res"),
            progress=call.progress,
        )
        rules = replace(run.table.rules, clip="clamp" if call.clip_denoised else "none")
        run = replace(run, preview=preview, table=replace(run.table, rules=rules))
        return ((buffers.x, buffers.x_0) for buffers in run.states())

    def _eager(self, call: Call, sampler: str, eta: float | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        s = self._sampler
        schedule = s.checkpoint.schedule
        return guided_steps(
            self.model if call.model is None else call.model,
            call.shape,
            step_table(schedule, s.checkpoint.rules, self._respacing, sampler=sampler, eta=eta),
            schedule,
            s.device,
            noise=call.noise,
            clip_denoised=call.clip_denoised,
            denoised_fn=call.denoised_fn,
            cond_fn=call.cond_fn,
            model_kwargs=call.kwargs,
            progress=call.progress,
        )


@dataclass
class Call:
    """The arguments that the four methods share."""

    model: Model
    shape: Any
    noise: Tensor | None
    clip_denoised: bool
    denoised_fn: Hook
    cond_fn: Hook
    model_kwargs: dict[str, Any] | None
    device: str | torch.device | None
    progress: bool

    @property
    def kwargs(self) -> dict[str, Any]:
        return {} if self.model_kwargs is None else self.model_kwargs

    def check(self, sampler: Sampler) -> None:
        """Check them, and make `shape` a tuple.

        Raises:
            ValueError: one that this sampler cannot take.
        """
        self.shape = check_shape(self.shape, sampler)
        noise = self.noise
        if noise is not None:
            found = f"{noise.dtype} {list(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
            if not isinstance(noise, Tensor) or not noise.is_floating_point() or tuple(noise.shape) != self.shape:
                raise ValueError(f"noise is {found}; expected x_T, a floating-point tensor {list(self.shape)}")
        if self.device is not None:
            check_device(self.device, sampler)
        if self.model_kwargs is not None and not isinstance(self.model_kwargs, dict):
            raise ValueError(f"model_kwargs must be a dict; got {type(self.model_kwargs).__name__}")
        for name in ("model", "denoised_fn", "cond_fn"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ValueError(f"{name} must be callable; got {type(getattr(self, name)).__name__}")
        for name in ("clip_denoised", "progress"):
            boolean(name, getattr(self, name))


def _copies(steps: Iterator[tuple[Tensor, Tensor | None]]) -> Iterator[dict[str, Tensor]]:
    """After each step copies of x_{t-1} and x_0; what then stands under "sample" is what the next step starts from."""
    for x, x_0 in steps:
        assert x_0 is not None  # a walk with previews
        step = {"sample": x.clone(), "pred_xstart": x_0.clone()}
        yield step
        if step["sample"].shape != x.shape:
            raise ValueError(f"sample was replaced by {list(step['sample'].shape)}; expected {list(x.shape)}")
        with torch.no_grad():
            x.copy_(step["sample"])
