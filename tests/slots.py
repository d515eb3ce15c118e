"""Statistics of an activation, slot by slot as a kernel would leave them, for tests of their readers."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm.kernels.channel_statistics import chunk_size


def statistics_of(x: Tensor, slots: int) -> Tensor:
    """Statistics of x [N, C, H, W], taken in float64, as float32 [N, slots, 2, C]; NaN in slots without pixels."""
    pixels = x.double().flatten(2)
    found = torch.full((x.shape[0], slots, 2, x.shape[1]), float("nan"), dtype=torch.float64, device=x.device)
    for slot, part in enumerate(pixels.split(chunk_size(pixels.shape[2], slots), dim=2)):
        mean = part.mean(dim=2)
        found[:, slot, 0] = mean
        found[:, slot, 1] = (part - mean[:, :, None]).square().sum(dim=2)
    return found.float()
