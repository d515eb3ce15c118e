"""What an image is made from beside noise: a class, an image to enlarge, to start from, or known in part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.checkpoints.checkpoint import Network
from ddpm.checks import is_integer, is_number
from ddpm.unet import UNet

LARGEST_GUIDANCE = 1e6  # far beyond any use, and far from overflow
REPAINT_JUMP = 10  # length of a jump back in Lugmayr et al. 2022, appendix B


@dataclass(frozen=True)
class Conditions:
    """Of n images; each is None where the run has no such thing.

    Attributes:
        classes: class embeddings, float32 [n, embedding_dim].
        null_classes: like classes, of "no class", for classifier-free guidance.
        low_res: what the network sees beside x_t, float32 [n, condition_channels, H, W].
        image: to inpaint or to start from, float32 [n, C, H, W].
        mask: uint8 [n, C, H, W], 1 where the image is known and kept.
    """

    classes: Tensor | None = None
    null_classes: Tensor | None = None
    low_res: Tensor | None = None
    image: Tensor | None = None
    mask: Tensor | None = None

    def images(self, start: int, stop: int) -> Conditions:
        """Those of images start .. stop - 1."""
        values = (getattr(self, field.name) for field in fields(self))
        return Conditions(*(None if value is None else value[start:stop] for value in values))


@torch.no_grad()
def embed_labels(network: Network, labels: Any, n: int, name: str = "labels") -> Tensor | None:
    """Class embeddings of n images, float32 [n, embedding_dim] on the CPU; None for an unconditional network.

    Args:
        network: the reference network.
        labels: one number for all images, or n of them; [n, embedding_dim] where the embedding is the identity.
        name: of the argument, for messages.

    Raises:
        ValueError: labels missing, superfluous, of another number than n, or not among the network's classes.
    """
    if not network.conditional:
        if labels is not None:
            raise ValueError(f"{name} were given, but this checkpoint is not class-conditional; leave them out")
        return None
    assert isinstance(network, UNet)  # the only class-conditional graph
    config = network.config
    labels = labels.cpu() if isinstance(labels, Tensor) else labels
    if labels is None:
        expected = "one number per image"
        if config.class_embedding == "table":
            expected = f"one class from 0 to {_last_class(network)} per image, or one for all"
        elif config.class_embedding == "identity":
            expected = f"an embedding per image, [n, {config.embedding_dim}]"
        raise ValueError(f"this checkpoint is class-conditional; pass {name}=, {expected}")
    if config.class_embedding == "identity":
        try:
            values = torch.as_tensor(labels, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} must be embeddings, [{n}, {config.embedding_dim}]; got {labels!r}") from error
        if values.shape != (n, config.embedding_dim):
            raise ValueError(f"{name} has shape {list(values.shape)}; expected {[n, config.embedding_dim]}")
        return network.embed_classes(values)
    values = _numbers(labels, n, name)
    if config.class_embedding == "timestep":
        return network.embed_classes(values)
    last = _last_class(network)
    if bool((values != values.round()).any()) or not 0 <= float(values.min()) <= float(values.max()) <= last:
        raise ValueError(f"{name} must be integers from 0 to {last}, the checkpoint's classes; got {labels!r}")
    return network.embed_classes(values.long())


def _last_class(network: UNet) -> int:
    assert network.config.num_class_embeds is not None  # a class table has a size
    return network.config.num_class_embeds - 1


def _numbers(labels: Any, n: int, name: str) -> Tensor:
    """float64 [n]."""
    sequence = isinstance(labels, (Sequence, np.ndarray, Tensor, range)) and not isinstance(labels, str)
    try:
        values = torch.as_tensor(list(labels) if sequence and np.ndim(labels) else labels, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number or a sequence of {n} numbers; got {labels!r}") from error
    if values.ndim == 0:
        values = values.expand(n)
    if values.shape != (n,):
        raise ValueError(f"{name} has shape {list(values.shape)} for n={n} images; give one label, or one per image")
    return values


def check_guidance(network: Network, guidance_scale: Any, null_label: Any, n: int) -> tuple[float, Tensor | None]:
    """The scale of classifier-free guidance, and the embeddings of "no class", float32 [n, embedding_dim].

    A scale of None or 1 is plain conditional sampling: no second half of the batch, and no embeddings.

    Raises:
        ValueError: no finite number, a network without classes, or no null_label to go with it: which class a training
            used for "no class", no checkpoint says.
    """
    for name, value in (("guidance_scale", guidance_scale), ("null_label", null_label)):
        if value is not None and not network.conditional:
            raise ValueError(f"{name} was given, but this checkpoint is not class-conditional; leave it out")
    if guidance_scale is None:
        if null_label is not None:
            raise ValueError("null_label belongs to classifier-free guidance; pass guidance_scale= with it")
        return 1.0, None
    if not is_number(guidance_scale) or not abs(guidance_scale) <= LARGEST_GUIDANCE:
        raise ValueError(f"guidance_scale must be a finite number; got {guidance_scale!r}")
    if null_label is None:
        raise ValueError(
            "guidance_scale needs null_label=, the class that the training used for 'no class' (often the last one), "
            "which the checkpoint does not say"
        )
    null_classes = embed_labels(network, null_label, n, "null_label")
    return float(guidance_scale), None if guidance_scale == 1 else null_classes


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
    _check_image("low_res", low_res, n, channels, None)
    enlarged = F.interpolate(low_res.float().cpu(), size, mode="bilinear")
    return enlarged.expand(n, -1, -1, -1)


def check_image(image: Any, n: int, shape: tuple[int, int, int]) -> Tensor:
    """An image to inpaint or to start from, float32 [n, C, H, W] on the CPU.

    Args:
        image: float [n or 1, C, H, W] in [-1, 1].
        n: number of images.
        shape: (C, H, W) of the checkpoint's images.

    Raises:
        ValueError: another shape, type or range.
    """
    _check_image("image", image, n, shape[0], shape[1:])
    return image.float().cpu().expand(n, -1, -1, -1)


def check_mask(mask: Any, n: int, shape: tuple[int, int, int]) -> Tensor:
    """Where an image is known, uint8 [n, C, H, W] on the CPU, 1 in the known region.

    Args:
        mask: bool, or numbers that are 0 or 1, [H, W] or [n or 1, C or 1, H, W].
        n, shape: as in `check_image`.

    Raises:
        ValueError: another shape or other values.
    """
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise ValueError(f"mask must be a tensor, 1 (or True) where the image is known; got {type(mask).__name__}")
    whole = mask[None, None] if mask.ndim == 2 else mask
    channels, height, width = shape
    fits = whole.ndim == 4 and len(whole) in (1, n) and whole.shape[1] in (1, channels)
    if not fits or whole.shape[2:] != (height, width):
        raise ValueError(
            f"mask has shape {list(mask.shape)}; expected {[height, width]} or [{_either(n)}, {_either(channels)}, "
            f"{height}, {width}]"
        )
    if not bool(((whole == 0) | (whole == 1)).all()):
        raise ValueError("mask must hold nothing but 0 (to be painted) and 1 (known); threshold it, as in mask > 0.5")
    return whole.to("cpu", torch.uint8).expand(n, *shape)


def check_resample(resample: Any) -> tuple[int, int]:
    """RePaint's (passes, jump): a number of passes has the paper's jump of 10; None is one pass, without jumps.

    Raises:
        ValueError: neither a positive integer nor a pair of them.
    """
    pair = resample if isinstance(resample, (tuple, list)) else (1 if resample is None else resample, REPAINT_JUMP)
    if len(pair) != 2 or not all(is_integer(value) and value >= 1 for value in pair):
        raise ValueError(f"resample must be a number of passes, such as 10, or (passes, jump length); got {resample!r}")
    return int(pair[0]), int(pair[1])


def _check_image(name: str, image: Any, n: int, channels: int, size: tuple[int, ...] | None) -> None:
    """Float [n or 1, channels, *size] in [-1, 1]; any size where it is None."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{name} must be a floating-point tensor in [-1, 1]; got {kind}")
    height, width = size or ("h", "w")
    fits = image.ndim == 4 and image.shape[0] in (1, n) and image.shape[1] == channels
    if not fits or (size is not None and image.shape[2:] != size):
        expected = f"[{_either(n)}, {channels}, {height}, {width}]"
        raise ValueError(f"{name} has shape {list(image.shape)}; expected {expected}")
    if not bool((image.abs() <= 1.01).all()):  # bytes or [0, 255] by mistake; NaN too
        raise ValueError(f"{name} holds values outside [-1, 1]; scale bytes with x / 127.5 - 1")


def _either(n: int) -> str:
    """What a size may be that is 1 or n."""
    return "1" if n == 1 else f"{n} or 1"
