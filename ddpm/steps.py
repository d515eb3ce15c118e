"""The reverse chain as a table: one row of coefficients per step, in the family's own precision and order.

Every sampler of the project is an instance of one step form (`kernels/reverse_step.py` runs it):

    x_0 = f((kx x_t + ke out) / kd)
    x_{t-1} = c0 x_0 + cx x_t + ce out + s z

with `out` the network's output, f a clip and z standard normal. This file decides which steps there are, which of them
draw noise, and what the network is told; `coefficients.py` computes the rows; nothing after them knows a schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpm.checks import is_integer, one_of
from ddpm.coefficients import ancestral_row, ddim_row
from ddpm.rules import SAMPLERS, SamplingRules
from ddpm.schedule import NoiseSchedule
from ddpm.timesteps import DIFFUSERS_SPACINGS, check_timesteps, respaced_timesteps, spaced_timesteps


@dataclass(frozen=True)
class StepTable:
    """A chain of S steps, first step first.

    Attributes:
        timesteps: int64 [S], of the training schedule.
        network_timesteps: what the network is told: int64 [S], or float32 [S] where the family rescales them.
        coefficients: float32 [S, len(COLUMNS)], on the CPU; see `kernels/reverse_step.py` for the columns.
        draws: whether step i draws noise from a generator; one that does not leaves the generator's stream alone. A
            step may draw without adding: its s is 0.
        rules: those of this chain: sampler and clip are what really happens.
    """

    timesteps: Tensor
    network_timesteps: Tensor
    coefficients: Tensor
    draws: tuple[bool, ...]
    rules: SamplingRules

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def variance(self) -> str:
        """The kernel's variance kind: "fixed", "learned" or "learned_range". DDIM ignores a learned variance."""
        learned = self.rules.learned_variance and self.rules.sampler == "ddpm"
        return self.rules.variance_type if learned else "fixed"


def step_table(
    schedule: NoiseSchedule,
    rules: SamplingRules,
    steps: int | str | None = None,
    timesteps: Sequence[int] | None = None,
    spacing: str | None = None,
    sampler: str | None = None,
    eta: float | None = None,
    ddim_epsilon: str | None = None,
) -> StepTable:
    """The chain that a checkpoint's family would walk.

    Args:
        schedule: in the family's precision.
        rules: the family's defaults.
        steps: number of steps, spaced as the family does; or guided-diffusion's respacing string; None is the family's
            default (T; 50 for diffusers' DDIM).
        timesteps: the chain itself, strictly descending, instead of steps.
        spacing: of `steps` steps, one of `ddpm.timesteps.SPACINGS`, instead of the family's.
        sampler: "ddpm", "ddim", or None for the family's choice.
        eta, ddim_epsilon: of DDIM; None is the family's.

    Raises:
        ValueError: an argument out of range, or two that exclude each other.
    """
    total = schedule.num_train_timesteps
    if timesteps is not None and (steps is not None or spacing is not None):
        raise ValueError("give either timesteps or steps and spacing, not both")
    if isinstance(steps, str) and spacing is not None:
        raise ValueError(f"steps={steps!r} is a respacing string, which spaces by itself; leave spacing out")
    if sampler is not None:
        one_of("sampler", sampler, SAMPLERS)
    chain: list[int] | None = None
    if timesteps is not None:
        chain = check_timesteps(timesteps, total)
    elif isinstance(steps, str):
        chain = respaced_timesteps(total, steps)
    length: Any = steps if chain is None else len(chain)
    if sampler is None:
        short = is_integer(length) and length < total
        sampler = (rules.short_sampler if short else None) or rules.sampler
    rules = _of_this_chain(rules, sampler, eta, ddim_epsilon)
    lag = None  # diffusers' DDIM steps back by T // steps, whatever the next timestep of its chain is
    if chain is None:
        default = rules.ddim_steps if sampler == "ddim" and rules.ddim_steps else total
        count = min(default, total) if length is None else length
        own = rules.ddim_spacing if sampler == "ddim" else None
        spacing = spacing or own or rules.timestep_spacing
        chain = spaced_timesteps(total, count, spacing, rules.steps_offset)
        if sampler == "ddim" and rules.convention == "diffusers" and spacing in DIFFUSERS_SPACINGS:
            lag = total // count

    rows, draws = [], []
    for i, (t, following) in enumerate(zip(chain, [*chain[1:], -1], strict=True)):
        last = i + 1 == len(chain)
        a = schedule.alphas_cumprod[t]
        p = _alpha_bar_after(schedule, rules, t - lag if lag else following)
        if sampler == "ddim":
            rows.append(ddim_row(a, p, rules))
        else:
            rows.append(ancestral_row(a, p, rules, noisy=_adds_noise(rules, t, last=last)))
        draws.append(_draws(rules, t, last=last))
    told = torch.tensor(chain)
    if rules.rescale_timesteps:
        told = told.float() * (1000.0 / total)
    return StepTable(torch.tensor(chain), told, torch.stack(rows), tuple(draws), rules)


def _of_this_chain(rules: SamplingRules, sampler: str, eta: float | None, ddim_epsilon: str | None) -> SamplingRules:
    if sampler == "ddpm":
        for name, value in (("eta", eta), ("ddim_epsilon", ddim_epsilon)):
            if value is not None:
                raise ValueError(f"{name}={value!r} belongs to DDIM, and this chain is DDPM; pass sampler='ddim'")
        return replace(rules, sampler=sampler)
    return replace(
        rules,
        sampler=sampler,
        clip=rules.ddim_clip or rules.clip,
        eta=rules.eta if eta is None else eta,
        ddim_epsilon=ddim_epsilon or rules.ddim_epsilon,
    )


def _alpha_bar_after(schedule: NoiseSchedule, rules: SamplingRules, timestep: int) -> Tensor:
    """alphas_cumprod of the next timestep; a negative one is the end of the chain, 1."""
    if timestep >= 0:
        return schedule.alphas_cumprod[timestep]
    if rules.sampler == "ddim" and not rules.set_alpha_to_one:
        return schedule.alphas_cumprod[0]
    return torch.ones((), dtype=schedule.alphas_cumprod.dtype)


def _adds_noise(rules: SamplingRules, timestep: int, *, last: bool) -> bool:
    """Of an ancestral step. diffusers and ermongroup ask the timestep: their chains that end above 0 end with noise."""
    return timestep > 0 if rules.convention in ("diffusers", "ermongroup") else not last


def _draws(rules: SamplingRules, timestep: int, *, last: bool) -> bool:
    """Whether the family's code draws at this step; some draw and multiply by 0."""
    if rules.convention == "diffusers":
        return rules.eta > 0 if rules.sampler == "ddim" else timestep > 0
    return not last if rules.convention == "lucidrains" else True
