"""What an image is made from beside noise: a class, and the small image that a super-resolution network enlarges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.checkpoints.checkpoint import Network
from ddpm.unet import UNet


@torch.no_grad()
def embed_labels(network: Network, labels: Any, n: int) -> Tensor | None:
    """Class embeddings of n images, float32 [n, embedding_dim] on the CPU; None for an unconditional network.

    Args:
        network: the reference network.
        labels: one number for all images, or n of them; [n, embedding_dim] where the embedding is the identity.

    Raises:
        ValueError: labels missing, superfluous, of another number than n, or not among the network's classes.
    """
    if not network.conditional:
        if labels is not None:
            raise ValueError("labels were given, but this checkpoint is not class-conditional; leave them out")
        return None
    assert isinstance(network, UNet)  # the only class-conditional graph
    config = network.config
    if labels is None:
        expected = "one number per image"
        if config.class_embedding == "table":
            expected = f"one class from 0 to {_last_class(network)} per image, or one for all"
        elif config.class_embedding == "identity":
            expected = f"an embedding per image, [n, {config.embedding_dim}]"
        raise ValueError(f"this checkpoint is class-conditional; pass labels=, {expected}")
    if config.class_embedding == "identity":
        try:
            values = torch.as_tensor(labels, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"labels must be embeddings, [{n}, {config.embedding_dim}]; got {labels!r}") from error
        if values.shape != (n, config.embedding_dim):
            raise ValueError(f"labels has shape {list(values.shape)}; expected {[n, config.embedding_dim]}")
        return network.embed_classes(values)
    values = _numbers(labels, n)
    if config.class_embedding == "timestep":
        return network.embed_classes(values)
    last = _last_class(network)
    if bool((values != values.round()).any()) or not 0 <= float(values.min()) <= float(values.max()) <= last:
        raise ValueError(f"labels must be integers from 0 to {last}, the checkpoint's classes; got {labels!r}")
    return network.embed_classes(values.long())


def _last_class(network: UNet) -> int:
    assert network.config.num_class_embeds is not None  # a class table has a size
    return network.config.num_class_embeds - 1


def _numbers(labels: Any, n: int) -> Tensor:
    """float64 [n]."""
    sequence = isinstance(labels, (Sequence, np.ndarray, Tensor, range)) and not isinstance(labels, str)
    try:
        values = torch.as_tensor(list(labels) if sequence and np.ndim(labels) else labels, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels must be a number or a sequence of {n} numbers; got {labels!r}") from error
    if values.ndim == 0:
        values = values.expand(n)
    if values.shape != (n,):
        raise ValueError(f"labels has shape {list(values.shape)} for n={n} images; give one label, or one per image")
    return values


def check_low_res(network: Network, low_res: Any, n: int, size: tuple[int, int]) -> Tensor | None:
    """The conditioning images of a super-resolution network: low_res, enlarged to `size` as guided-diffusion does.

    Args:
        network: the reference network.
        low_res: float [n or 1, C, h, w] in [-1, 1].
        n: number of images.
        size: (H, W) of the result.

    Returns:
        float32 [n, C, H, W] by bilinear interpolation, or None for a network without such an input.

    Raises:
        ValueError: low_res missing, superfluous, or of another shape, type or range.
    """
    channels = 0 if network.self_condition else network.condition_channels
    if not channels:
        if low_res is not None:
            raise ValueError("low_res was given, but this checkpoint is no super-resolution model; leave it out")
        return None
    if low_res is None:
        raise ValueError(
            f"this checkpoint enlarges images; pass low_res=, float [{n}, {channels}, h, w] in [-1, 1], to be enlarged "
            f"to {size[0]} x {size[1]}"
        )
    if not isinstance(low_res, Tensor) or not low_res.is_floating_point():
        kind = low_res.dtype if isinstance(low_res, Tensor) else type(low_res).__name__
        raise ValueError(f"low_res must be a floating-point tensor in [-1, 1]; got {kind}")
    if low_res.ndim != 4 or low_res.shape[0] not in (1, n) or low_res.shape[1] != channels:
        raise ValueError(f"low_res has shape {list(low_res.shape)}; expected [{n} or 1, {channels}, h, w]")
    if not bool((low_res.abs() <= 1.01).all()):  # bytes or [0, 255] by mistake; NaN too
        raise ValueError("low_res holds values outside [-1, 1]; scale bytes with x / 127.5 - 1")
    enlarged = F.interpolate(low_res.float().cpu(), size, mode="bilinear")
    return enlarged.expand(n, -1, -1, -1)
