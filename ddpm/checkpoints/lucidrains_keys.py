"""What versions 0.32 to 1.7.7 of denoising-diffusion-pytorch did otherwise, and their state dicts in today's names.

Names and shapes of these versions are alike while their numerics differ, so only the version tells them apart. From 1.8
on names tell everything (`ddpm.lucidrains.LucidrainsConfig`), and nothing here is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Attention was wrapped in Residual(PreNorm(attention)), each of which called what it holds `fn`.
WRAPPED = re.compile(r"^(downs\.\d+\.2|ups\.\d+\.2|mid_attn)\.fn\.(fn\.)?")
STANDARDIZED = re.compile(r"\.block[12]\.proj\.weight$")  # the resnets' 3x3 convolutions, and no other


@dataclass(frozen=True)
class Numerics:
    """What a version before 1.8 computes.

    Attributes:
        standardization: of the resnets' 3x3 convolutions: "eps" divides by sqrt(var + 1e-5), "clamp" by
            sqrt(max(var, 1e-5)), None leaves them as stored.
        attention_norm, value_scale_by_pixels: as in LucidrainsConfig.
    """

    standardization: Literal["eps", "clamp"] | None
    attention_norm: Literal["layer", "rms"]
    value_scale_by_pixels: bool


def has_old_keys(state: dict[str, Tensor]) -> bool:
    """Whether the names are those of 0.32 to 1.7.7."""
    return any(WRAPPED.match(key) for key in state)


def version_number(version: str) -> tuple[int, ...]:
    """The version as numbers that compare by date.

    They went back once: 1.16.6, then 0.1.0a to 0.2.2a, of the end of 2022, lie between 0.32 and 1.0.

    Raises:
        ValueError: not a version number.
    """
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"version {version!r} of denoising-diffusion-pytorch is not a number such as 1.6.4")
    number = tuple(int(part) for part in match.groups())
    if number == (1, 16, 6):
        return (0, 33, 0)
    return (0, 33, *number[1:]) if number[:2] in ((0, 1), (0, 2)) else number


def numerics(version: str) -> Numerics:
    """What a version whose state dict `has_old_keys` computes.

    Raises:
        ValueError: not a version number, or one of 1.8 and later, where only other classes have such names.
    """
    number = version_number(version)
    if number >= (1, 8, 0):
        raise ValueError(
            "the names are those of denoising-diffusion-pytorch 0.32 to 1.7.7, but the version is "
            f"{version}, where only its guided_diffusion module has them, which is not supported"
        )
    if number < (1, 7, 0):
        return Numerics("eps", "layer", True)
    if number < (1, 7, 2):
        return Numerics("clamp" if number == (1, 7, 1) else "eps", "rms", True)
    return Numerics(None, "rms", number < (1, 7, 4))


def modern_keys(state: dict[str, Tensor], version: str | None) -> dict[str, Tensor]:
    """A U-Net's state dict with the names of 1.8 and weight standardization done once, for plain convolutions.

    Args:
        state: names without a prefix; those of 1.8 and later are returned as they are.
        version: that wrote them, or None if the checkpoint does not say.

    Raises:
        ValueError: the names are those of 0.32 to 1.7.7, and the version is missing or not a number.
    """
    if not has_old_keys(state):
        return state
    if version is None:
        raise ValueError(
            "the names are those of denoising-diffusion-pytorch 0.32 to 1.7.7, which computed differently from one to "
            "the next, and the checkpoint does not say which wrote it; give its version"
        )
    kind = numerics(version).standardization
    result = {}
    for key, value in state.items():
        if kind is not None and STANDARDIZED.search(key):
            value = standardized(value, kind)
        result[WRAPPED.sub(r"\1.", key)] = value
    return result


def standardized(weight: Tensor, kind: Literal["eps", "clamp"]) -> Tensor:
    """Weight standardization (Qiao et al. 2019): each filter of [out, in, k, k] with mean 0 and about variance 1."""
    weight = weight.float()  # the eps below is that of float32
    var, mean = torch.var_mean(weight, dim=(1, 2, 3), unbiased=False, keepdim=True)
    var = var + 1e-5 if kind == "eps" else var.clamp(min=1e-5)
    return (weight - mean) * var.rsqrt()
