"""Reference networks rebuilt for sampling, and what the captured step may ask of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ddpm.fused.convolution import Convolution
from ddpm.fused.explain import LayerPath
from ddpm.fused.layers import GroupNormSiLU, RMSNormSiLU, TimePath
from ddpm.fused.lucidrains import FusedLucidrains
from ddpm.fused.module import ModuleNetwork
from ddpm.fused.unet import FusedUNet
from ddpm.lucidrains import LucidrainsUNet
from ddpm.unet import UNet

__all__ = [
    "Convolution",
    "FusedLucidrains",
    "FusedNetwork",
    "FusedUNet",
    "GroupNormSiLU",
    "LayerPath",
    "ModuleNetwork",
    "RMSNormSiLU",
    "TimePath",
    "fuse",
]


class TimeTable(Protocol):
    """What a network knows of the timesteps alone, a row per step; see `TimePath`."""

    conditional: bool

    @property
    def embedding_dim(self) -> int: ...

    @property
    def columns(self) -> int: ...

    def table(self, timesteps: Tensor) -> Tensor: ...


class FusedNetwork(Protocol):
    """What the sampling loop needs of a network.

    Attributes:
        is_frozen: its weights never change.
        time: makes the table of rows.
        condition_channels: channels of the conditioning image that the network sees beside x_t; 0 for none.
        self_condition: that image is the previous step's x_0.
    """

    @property
    def is_frozen(self) -> bool: ...

    @property
    def time(self) -> TimeTable: ...

    @property
    def condition_channels(self) -> int: ...

    @property
    def self_condition(self) -> bool: ...

    def __call__(self, x: Tensor, row: Tensor, classes: Tensor | None, condition: Tensor | None) -> Tensor: ...

    def to(self, device: torch.device) -> FusedNetwork: ...

    def allows_winograd(self, device: torch.device, batch: int, height: int, width: int) -> bool: ...

    def explain(
        self, device: torch.device, batch: int, height: int, width: int, *, compiled: bool = False
    ) -> list[LayerPath]: ...


def fuse(reference: UNet | LucidrainsUNet | ModuleNetwork, dtype: torch.dtype = torch.float32) -> FusedNetwork:
    """The fused form of a reference network; a module of somebody's own stays as it is."""
    if isinstance(reference, ModuleNetwork):
        return reference
    return FusedLucidrains(reference, dtype) if isinstance(reference, LucidrainsUNet) else FusedUNet(reference, dtype)
