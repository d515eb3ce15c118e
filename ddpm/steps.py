"""The reverse chain as a table: one row of coefficients per step, in the family's own precision and order.

Every sampler of the project is an instance of one step form (`kernels/reverse_step.py` runs it):

    x_0 = f((kx x_t + ke out) / kd)
    x_{t-1} = c0 x_0 + cx x_t + ce out + s z

with `out` the network's output, f a clip and z standard normal. This file decides which steps there are and in which
order, which of them draw noise, and what the network is told; `coefficients.py` computes the rows; nothing after them
knows a schedule. An inpainting chain (RePaint) walks some of its steps several times, and has a row for each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpm.checks import is_integer, is_number, one_of
from ddpm.coefficients import ancestral_rows, conditioned_rows, ddim_rows
from ddpm.kernels.reverse_step import COLUMNS, PLANES
from ddpm.rules import SAMPLERS, SamplingRules
from ddpm.schedule import NoiseSchedule
from ddpm.timesteps import (
    DIFFUSERS_SPACINGS,
    check_timesteps,
    repaint_walk,
    respaced_timesteps,
    spaced_timesteps,
)


@dataclass(frozen=True)
class StepTable:
    """A chain of S steps, first step first.

    Attributes:
        timesteps: int64 [S], of the training schedule.
        distinct: what the network is told, each once: int64 [U], or float32 [U] where the family rescales timesteps.
        time_rows: int64 [S], which of them it is told at step i.
        coefficients: float32 [S, len(COLUMNS)], on the CPU; see `kernels/reverse_step.py` for the columns.
        draws: what step i draws from a generator, in order: indices into PLANES of `kernels/reverse_step.py`. A step
            that draws nothing leaves the generator's stream alone. One may draw without adding: its s is 0.
        rules: those of this chain: sampler and clip are what really happens.
        start: (mean, std) that noise the image from which the chain starts; None where it starts from noise alone.
    """

    timesteps: Tensor
    distinct: Tensor
    time_rows: Tensor
    coefficients: Tensor
    draws: tuple[tuple[int, ...], ...]
    rules: SamplingRules
    start: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def network_timesteps(self) -> Tensor:
        """What the network is told at each step, [S]."""
        return self.distinct[self.time_rows]

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
    *,
    guidance: float = 1.0,
    strength: float | None = None,
    resample: tuple[int, int] | None = None,
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
        guidance: scale of classifier-free guidance.
        strength: walk the last int(strength S) steps only, from a noised image (SDEdit, Meng et al. 2022).
        resample: of inpainting, (passes, jump), see `repaint_walk`; None means no inpainting.

    Raises:
        ValueError: an argument out of range, or two that exclude each other.
    """
    chain = _chain(schedule, rules, steps, timesteps, spacing, sampler, eta, ddim_epsilon)
    start = None
    if strength is not None:
        walked = _started(len(chain.rising), strength)
        chain = replace(chain, rising=chain.rising[:walked])
        alpha_bar = float(chain.levels()[walked - 1])
        start = (alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
    walk = repaint_walk(len(chain.rising), *(resample or (1, 1)))
    states, after = torch.tensor(walk).unbind(1)
    coefficients = chain.rows(states, after, guidance)
    visited = torch.tensor(chain.rising)[states]
    _check_finite(coefficients, visited, schedule)
    distinct, time_rows = visited.unique(return_inverse=True)
    if chain.rules.rescale_timesteps:
        distinct = distinct.float() * (1000.0 / schedule.num_train_timesteps)
    draws = tuple(chain.draws(*step, inpaint=resample is not None) for step in walk)
    return StepTable(visited, distinct, time_rows, coefficients, draws, chain.rules, start)


@dataclass(frozen=True)
class _Chain:
    """Which timesteps are walked, by which rules. State i is x at timestep rising[i], state -1 is clean.

    Attributes:
        rising: timesteps in ascending order.
        lag: diffusers' DDIM steps back by T // steps, whatever the next timestep of its chain is; else None.
    """

    schedule: NoiseSchedule
    rules: SamplingRules
    rising: list[int]
    lag: int | None

    def levels(self) -> Tensor:
        """alphas_cumprod of the states, [S + 1]: that of state -1 is the last."""
        table = self.schedule.alphas_cumprod
        return torch.cat([table[self.rising], table.new_ones(1)])

    def rows(self, states: Tensor, after: Tensor, guidance: float) -> Tensor:
        """Coefficients of steps, float32 [L, len(COLUMNS)].

        Args:
            states: int64 [L], from which each steps to the one below; it ends in `after`, [L], where it jumps back.
        """
        rules, levels = self.rules, self.levels()
        a, p = levels[:-1], self._levels_after()
        if rules.sampler == "ddim":
            rows = ddim_rows(a, p, rules)
        else:
            noisy = [_adds_noise(rules, t, last=not state) for state, t in enumerate(self.rising)]
            rows = ancestral_rows(a, p, rules, noisy=torch.tensor(noisy))
        return conditioned_rows(rows[states], levels[states - 1], levels[after], guidance)

    def _levels_after(self) -> Tensor:
        """alphas_cumprod at which the family has the step from each state end, [S]."""
        table, rules = self.schedule.alphas_cumprod, self.rules
        reached = torch.tensor([t - self.lag for t in self.rising] if self.lag else [-1, *self.rising[:-1]])
        end = table[0] if rules.sampler == "ddim" and not rules.set_alpha_to_one else table.new_ones(())
        return torch.where(reached < 0, end, table[reached])

    def draws(self, state: int, after: int, *, inpaint: bool) -> tuple[int, ...]:
        """What that step draws from a generator, see `StepTable`."""
        drawn = {
            "step": _draws(self.rules, self.rising[state], last=not state),
            "known": inpaint and state > 0,
            "jump": after != state - 1,
        }
        return tuple(plane for plane, name in enumerate(PLANES) if drawn[name])


def _chain(
    schedule: NoiseSchedule,
    rules: SamplingRules,
    steps: int | str | None,
    timesteps: Sequence[int] | None,
    spacing: str | None,
    sampler: str | None,
    eta: float | None,
    ddim_epsilon: str | None,
) -> _Chain:
    """Arguments as in `step_table`."""
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
    if chain is not None:
        return _Chain(schedule, rules, chain[::-1], None)
    default = rules.ddim_steps if sampler == "ddim" and rules.ddim_steps else total
    count = min(default, total) if length is None else length
    spacing = spacing or rules.spacing_of(sampler)
    chain = spaced_timesteps(total, count, spacing, rules.steps_offset)
    lags = sampler == "ddim" and rules.convention == "diffusers" and spacing in DIFFUSERS_SPACINGS
    return _Chain(schedule, rules, chain[::-1], total // count if lags else None)


def _check_finite(coefficients: Tensor, visited: Tensor, schedule: NoiseSchedule) -> None:
    """Raise ValueError where a step has no numbers. The logarithms may be infinite: of a variance that is 0."""
    columns = [i for i, name in enumerate(COLUMNS) if not name.startswith("log_")]
    finite = coefficients[:, columns].isfinite().all(dim=1)
    if not bool(finite.all()):
        t = int(visited[~finite][0])
        raise ValueError(
            f"the noise schedule gives no finite step at timestep {t}, where alphas_cumprod is "
            f"{float(schedule.alphas_cumprod[t]):g}; leave that timestep out of the chain"
        )


def _started(length: int, strength: float) -> int:
    """How many steps of the chain an SDEdit run walks."""
    if not is_number(strength) or not 0 < strength <= 1:
        raise ValueError(f"strength must be a number above 0 (the image as it is) and at most 1; got {strength!r}")
    steps = int(length * strength)
    if not steps:
        raise ValueError(f"strength={strength} leaves none of the chain's {length} steps; take more of them")
    return steps


def _of_this_chain(rules: SamplingRules, sampler: str, eta: float | None, ddim_epsilon: str | None) -> SamplingRules:
    if sampler == "ddpm":
        for name, value in (("eta", eta), ("ddim_epsilon", ddim_epsilon)):
            if value is not None:
                raise ValueError(f"{name}={value!r} belongs to DDIM, and this chain is DDPM; pass sampler='ddim'")
        return replace(rules, sampler=sampler)
    return replace(
        rules,
        sampler=sampler,
        clip=rules.clip_of(sampler),
        eta=rules.eta if eta is None else eta,
        ddim_epsilon=ddim_epsilon or rules.ddim_epsilon,
    )


def _adds_noise(rules: SamplingRules, timestep: int, *, last: bool) -> bool:
    """Of an ancestral step. diffusers and ermongroup ask the timestep: their chains that end above 0 end with noise."""
    return timestep > 0 if rules.convention in ("diffusers", "ermongroup") else not last


def _draws(rules: SamplingRules, timestep: int, *, last: bool) -> bool:
    """Whether the family's code draws at this step; some draw and multiply by 0."""
    if rules.convention == "diffusers":
        return rules.eta > 0 if rules.sampler == "ddim" else timestep > 0
    return not last if rules.convention == "lucidrains" else True
