"""Reference networks rebuilt for sampling, and what the captured step may ask of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ddpm.fused.layers import GroupNormSiLU, LayerPath, RMSNormSiLU, TimePath
from ddpm.fused.lucidrains import FusedLucidrains
from ddpm.fused.unet import FusedUNet
from ddpm.lucidrains import LucidrainsUNet
from ddpm.unet import UNet

__all__ = [
    "FusedLucidrains",
    "FusedNetwork",
    "FusedUNet",
    "GroupNormSiLU",
    "LayerPath",
    "RMSNormSiLU",
    "TimePath",
    "fuse",
]


class FusedNetwork(Protocol):
    """What the sampling loop needs of a network.

    Attributes:
        time: the time path, which makes the table of rows.
        condition_channels: channels of the conditioning image that the network sees beside x_t; 0 for none.
        self_condition: that image is the previous step's x_0.
    """

    time: TimePath

    @property
    def condition_channels(self) -> int: ...

    @property
    def self_condition(self) -> bool: ...

    def __call__(self, x: Tensor, row: Tensor, classes: Tensor | None, condition: Tensor | None) -> Tensor: ...

    def to(self, device: torch.device) -> FusedNetwork: ...

    def explain(self, device: torch.device) -> list[LayerPath]: ...


def fuse(reference: UNet | LucidrainsUNet, dtype: torch.dtype = torch.float32) -> FusedNetwork:
    """The fused form of a reference network."""
    return FusedLucidrains(reference, dtype) if isinstance(reference, LucidrainsUNet) else FusedUNet(reference, dtype)
