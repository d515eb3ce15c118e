"""Which timesteps a chain visits: the spacings of every family, respacing strings, custom lists. All descending."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ddpm.checks import is_integer, one_of


def spaced_timesteps(num_train_timesteps: int, steps: int, spacing: str, offset: int = 0) -> list[int]:
    """The descending timesteps of a chain of `steps` steps.

    leading         i (T // steps) + offset (diffusers; Lin et al. 2023, table 2)
    linspace        round(linspace(0, T - 1, steps)) (diffusers)
    trailing        round(arange(T, 0, -T / steps)) - 1 (diffusers)
    sections        guided-diffusion's "N": like linspace, with its own rounding
    strided         guided-diffusion's "ddimN": range(0, T, i) with the least i that gives N timesteps
    uniform         range(0, T, T // steps) (Song et al. 2021, their code); can have more than `steps` members
    quad            int(linspace(0, sqrt(0.8 T), steps)^2) (Song et al. 2021, appendix D.2); small ones can repeat
    trailing_floor  int(linspace(-1, T - 1, steps + 1)) without the -1 (lucidrains)

    Where T / steps is not exact in floating point, diffusers' "trailing" can come out one step too long, with a last
    timestep of -1 (T = 1000, 61 steps): that step reads the schedule from its noisy end and ruins the image. It is
    left out here; it draws no noise, so a generator's stream is the same.

    Args:
        num_train_timesteps: T.
        steps: 1 .. T.
        spacing: one of SPACINGS.
        offset: of "leading".

    Raises:
        ValueError: steps not in 1 .. T, an unknown spacing, an offset that leads past T - 1, or no such stride.
    """
    total = num_train_timesteps
    if not is_integer(steps) or not 1 <= steps <= total:
        raise ValueError(
            f"steps must be an integer from 1 to {total}, the checkpoint's training timesteps; got {steps!r}"
        )
    one_of("spacing", spacing, SPACINGS)
    ascending = [int(t) + (offset if spacing == "leading" else 0) for t in _ASCENDING[spacing](total, steps)]
    if ascending[-1] >= total:
        raise ValueError(
            f"steps={steps} with steps_offset={offset} starts at timestep {ascending[-1]}, past the last "
            f"trained one, {total - 1}; take fewer steps or another spacing"
        )
    return ascending[::-1]


def _trailing_floor(total: int, steps: int) -> list[float]:
    return torch.linspace(-1, total - 1, steps + 1).tolist()[1:]  # in float32, as the original


def _strided(total: int, steps: int) -> Sequence[int]:
    stride = next((i for i in range(1, total + 1) if len(range(0, total, i)) == steps), None)
    if stride is None:
        raise ValueError(
            f"no integer stride takes {steps} of {total} timesteps; take another number of steps, or a respacing "
            f"string such as '{steps}', which rounds"
        )
    return range(0, total, stride)


def _sections(total: int, counts: Sequence[int]) -> list[int]:
    """The T timesteps cut into len(counts) equal sections, the first ones longer by one if need be; counts[i] each."""
    chosen: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if count > size:
            raise ValueError(f"a section of {size} of the {total} timesteps cannot give {count} steps")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            chosen.append(start + round(position))
            position += stride  # summed up, as the original does: k * stride would round otherwise for many counts
        start += size
    if not chosen:
        raise ValueError("a respacing string must give at least one step; all of its sections are 0")
    return chosen


_ASCENDING: dict[str, Callable[[int, int], Sequence[float]]] = {
    "leading": lambda total, steps: range(0, steps * (total // steps), total // steps),
    "linspace": lambda total, steps: np.linspace(0, total - 1, steps).round().tolist(),
    "trailing": lambda total, steps: (np.round(np.arange(total, 0, -total / steps)) - 1)[:steps][::-1].tolist(),
    "sections": lambda total, steps: _sections(total, [steps]),
    "strided": _strided,
    "uniform": lambda total, steps: range(0, total, total // steps),
    "quad": lambda total, steps: (np.linspace(0, np.sqrt(total * 0.8), steps) ** 2).tolist(),
    "trailing_floor": _trailing_floor,
}
SPACINGS = tuple(_ASCENDING)
DIFFUSERS_SPACINGS = ("leading", "linspace", "trailing")


def respaced_timesteps(num_train_timesteps: int, respacing: str) -> list[int]:
    """guided-diffusion's `timestep_respacing`: "N", "n1,n2,..." (steps of equal sections), "ddimN", or "" for all.

    Sections count from the low timesteps: "10,90" takes 10 steps of the less noisy half.

    Raises:
        ValueError: not of that form, or more steps than timesteps.
    """
    total = num_train_timesteps
    text = respacing.strip()
    if not text:
        return list(range(total))[::-1]
    if text.removeprefix("ddim").isdecimal():
        return spaced_timesteps(
            total, int(text.removeprefix("ddim")), "strided" if text.startswith("ddim") else "sections"
        )
    counts = [part.strip() for part in text.split(",")]
    if not all(count.isdecimal() for count in counts):
        raise ValueError(f"steps {respacing!r} is no respacing string; write for example '250', '10,10,10' or 'ddim50'")
    if len(counts) > total:
        raise ValueError(f"steps {respacing!r} has {len(counts)} sections for {total} timesteps; write fewer")
    return _sections(total, [int(count) for count in counts])[::-1]


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


def repaint_walk(length: int, passes: int, jump: int) -> list[tuple[int, int]]:
    """RePaint's walk over a chain (Lugmayr et al. 2022, section 4.2 and appendix B): which steps, and where they end.

    States are numbered by noise, -1 clean, length - 1 the noisiest; a step lowers the state by one. From the states 0,
    jump, 2 jump ... below length - jump the chain then goes back up by `jump`, passes - 1 times each.

    Args:
        length: of the chain, S.
        passes: how often each part of the chain is walked; 1 is a plain chain.
        jump: length of such a part.

    Returns:
        (state before, state after the step and its jump), S + (passes - 1) jump (number of such states) of them.

    Raises:
        ValueError: jumps are asked for and the chain is too short for any.
    """
    jumps = dict.fromkeys(range(0, length - jump, jump), passes - 1)
    if passes > 1 and not jumps:
        raise ValueError(
            f"a chain of {length} steps is too short to jump back by {jump} (resample); take more steps or a shorter "
            f"jump, such as resample=({passes}, {max(1, length // 2)})"
        )
    walk = []
    state = length - 1
    while state >= 0:
        after = state - 1
        if jumps.get(after, 0):
            jumps[after] -= 1
            after += jump
        walk.append((state, after))
        state = after
    return walk
