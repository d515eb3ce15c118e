"""Checks that the drop-ins share, and what they say of the methods that they do not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddpm.checkpoints import Checkpoint
from ddpm.checks import positive_integer
from ddpm.devices import resolve_device
from ddpm.lucidrains import LucidrainsUNet
from ddpm.sampler import Sampler
from ddpm.unet import UNet


def check_sampler(sampler: Any, network: type[UNet] | type[LucidrainsUNet], original: str) -> Checkpoint:
    """The sampler's checkpoint, whose network is of this class.

    Args:
        sampler: what the caller gave.
        network: the graph that the original's sampling fits.
        original: its package.

    Raises:
        ValueError: no sampler, or of another graph.
    """
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler must be what ddpm.load gives; got {type(sampler).__name__}")
    checkpoint = sampler.checkpoint
    if not isinstance(checkpoint.network, network):
        raise ValueError(
            f"{checkpoint.source} is a network of family {checkpoint.family}, which {original} does not sample; use "
            "sampler.sample(), or the drop-in of its own package"
        )
    return checkpoint


def check_shape(shape: Any, sampler: Sampler) -> tuple[int, int, int, int]:
    """The shape of a batch, (N, C, H, W), as a tuple.

    Raises:
        ValueError: not that of the checkpoint's images, or N is no positive integer.
    """
    channels, height, width = sampler.image_shape
    if not isinstance(shape, Sequence) or tuple(shape)[1:] != sampler.image_shape:
        raise ValueError(
            f"shape is {shape!r}; expected (N, {channels}, {height}, {width}), N of the checkpoint's images"
        )
    return positive_integer("the batch size", shape[0]), channels, height, width


def check_device(device: Any, sampler: Sampler) -> None:
    """Raise ValueError where the device is not the sampler's: networks and captured loops stay where they are."""
    if resolve_device(device) != sampler.device:
        raise ValueError(
            f"device is {device}, but the network is on {sampler.device}; pass device= to ddpm.load instead"
        )


def absent(drop_in: object, name: str, original: str) -> AttributeError:
    """The error for an attribute of the original that the drop-in does not have."""
    public = ", ".join(n for n in dir(drop_in) if not n.startswith("_"))
    return AttributeError(f"{name} is not part of this drop-in, which has {public}; for it use {original} itself")
