"""A network of somebody's own as a checkpoint: nothing is loaded, the module is used as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.checkpoints.checkpoint import Checkpoint, Report
from ddpm.checks import positive_integer
from ddpm.fused.module import ModuleNetwork
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule

Schedule = NoiseSchedule | Tensor | np.ndarray | Sequence[float]


def load_module(network: nn.Module, schedule: Schedule, image_shape: Sequence[int], **rules: Any) -> Checkpoint:
    """See `ddpm.Sampler.from_module`."""
    if not isinstance(network, nn.Module):
        raise ValueError(f"network must be an nn.Module; got {type(network).__name__}")
    if unknown := sorted(rules.keys() - SamplingRules.__dataclass_fields__.keys()):
        raise ValueError(f"unknown rule {', '.join(unknown)}; the rules are the fields of ddpm.rules.SamplingRules")
    chosen, (channels, height, width) = SamplingRules(**rules), _image_shape(image_shape)
    out_channels = channels * (2 if chosen.learned_variance else 1)
    wrapped = ModuleNetwork(network, channels, out_channels, rescaled=chosen.rescale_timesteps)
    return Checkpoint(
        "module",
        type(network).__name__,
        wrapped,
        _schedule(schedule),
        chosen,
        (height, width),
        "half_to_even",
        Report(given=[f"{name} = {value}" for name, value in rules.items()]),
    )


def _schedule(schedule: Schedule) -> NoiseSchedule:
    """A noise schedule from betas; one that is a schedule already is returned.

    Args:
        schedule: betas [T] in (0, 1]: a float32 or float64 tensor keeps its precision, other numbers are float64.

    Raises:
        ValueError: no such numbers.
    """
    given = schedule.betas if isinstance(schedule, NoiseSchedule) else schedule
    try:
        betas = torch.as_tensor(given if isinstance(given, Tensor) else np.asarray(given, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"schedule must be betas, numbers [T] in (0, 1]; got {type(schedule).__name__}") from error
    if betas.dtype not in (torch.float32, torch.float64) or betas.ndim != 1 or not len(betas):
        raise ValueError(f"schedule must be float betas [T]; got {betas.dtype} {list(betas.shape)}")
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError("schedule must be betas, all above 0 and at most 1; they are not alphas or alphas_cumprod")
    if isinstance(schedule, NoiseSchedule):
        return NoiseSchedule(betas.cpu(), schedule.alphas_cumprod.to("cpu", betas.dtype))
    return NoiseSchedule.from_betas(betas.detach().cpu())


def _image_shape(shape: Any) -> tuple[int, int, int]:
    """(C, H, W) as integers.

    Raises:
        ValueError: not three positive integers.
    """
    sides = tuple(shape) if isinstance(shape, (Sequence, torch.Size)) and not isinstance(shape, str) else ()
    if len(sides) != 3:
        raise ValueError(f"image_shape must be (channels, height, width); got {shape!r}")
    channels, height, width = (positive_integer("each of image_shape", side) for side in sides)
    return channels, height, width
