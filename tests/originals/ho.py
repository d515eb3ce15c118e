"""The PyTorch ports of Ho et al.'s network and samplers, pytorch_diffusion and ermongroup/ddim: slow, plain, float32.

Neither is on PyPI; this is what the tests compare with. It shares no code with the package and is written from the
published facts: the names in the state dict, the graph, the tables and the order of the random draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """[N] steps -> [N, width]: sines, then cosines, the last frequency being 1 / 10000; an odd width ends in a zero."""
    half = width // 2
    # The division is in double: in float32 it would move the angles of late steps by 1e-4.
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
    angles = t.float()[:, None] * frequencies.to(t.device)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def silu(x: Tensor) -> Tensor:
    """As the originals write it; `F.silu` rounds otherwise, in the last bit."""
    return x * torch.sigmoid(x)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the time embedding is added between."""

    def __init__(self, c_in: int, c_out: int, temb_width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.temb_proj = nn.Linear(temb_width, c_out)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """[N, c_in, H, W], [N, temb_width] -> [N, c_out, H, W]."""
        h = self.conv1(silu(self.norm1(x)))
        h = h + self.temb_proj(silu(temb))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention of one head over all positions, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (torch.einsum("ncq,nck->nqk", q, k) * x.shape[1] ** -0.5).softmax(dim=-1)
        return x + self.proj_out(torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and below only


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution; `attn` is empty at most. One of `downsample`, `upsample`, or neither, follows."""

    def __init__(self, blocks: list[ResnetBlock], attns: list[AttnBlock]) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(blocks), nn.ModuleList(attns)

    def run(self, j: int, h: Tensor, temb: Tensor) -> Tensor:
        h = self.block[j](h, temb)
        return self.attn[j](h) if self.attn else h


class Model(nn.Module):
    """The network, under the parameter names of the published files.

    Args:
        attn_resolutions: heights (= widths) of the feature maps with attention.
        resolution: H = W of the images.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attn_resolutions: tuple[int, ...],
        resolution: int,
        in_channels: int = 3,
        out_ch: int = 3,
    ) -> None:
        super().__init__()
        self.ch, self.num_res_blocks = ch, num_res_blocks
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)

        def level_of(level: int, c: int, extra: list[int]) -> Level:
            """As many blocks as `extra` has numbers: the channels that join the input of each."""
            width = ch * ch_mult[level]
            inputs = [c, *[width] * (len(extra) - 1)]
            attends = resolution // 2**level in attn_resolutions
            blocks = [ResnetBlock(i + e, width, 4 * ch) for i, e in zip(inputs, extra, strict=True)]
            return Level(blocks, [AttnBlock(width) for _ in blocks] if attends else [])

        levels = len(ch_mult)
        c, skips = ch, [ch]
        self.down = nn.ModuleList()
        for i in range(levels):
            level = level_of(i, c, [0] * num_res_blocks)
            c = ch * ch_mult[i]
            skips += [c] * num_res_blocks
            if i < levels - 1:
                level.downsample = Downsample(c)
                skips.append(c)
            self.down.append(level)

        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = (
            ResnetBlock(c, c, 4 * ch),
            AttnBlock(c),
            ResnetBlock(c, c, 4 * ch),
        )

        up = []  # built from the lowest resolution, named from the highest
        for i in reversed(range(levels)):
            level = level_of(i, c, [skips.pop() for _ in range(num_res_blocks + 1)])
            c = ch * ch_mult[i]
            if i > 0:
                level.upsample = Upsample(c)
            up.append(level)
        self.up = nn.ModuleList(reversed(up))

        self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, out_ch, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[N, in_channels, H, W], [N] -> [N, out_ch, H, W]."""
        first, second = self.temb.dense
        temb = second(silu(first(timestep_embedding(t, self.ch))))
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for j in range(self.num_res_blocks):
                h = level.run(j, h, temb)
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)
        for level in reversed(self.up):
            for j in range(self.num_res_blocks + 1):
                h = level.run(j, torch.cat([h, skips.pop()], dim=1), temb)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(silu(self.norm_out(h)))


@torch.no_grad()
def pytorch_diffusion_sample(
    model: Any, shape: tuple[int, ...], T: int = 1000, variance: str = "fixedlarge", noise: Tensor | None = None
) -> Tensor:
    """Ancestral sampling through all T steps: [N, 3, H, W], not clamped at the end.

    Tables are float64 and used as float32; x_0 is clamped; noise is drawn on the CPU at every step.
    """
    b = np.linspace(1e-4, 0.02, T, dtype=np.float64)
    a = np.cumprod(1 - b)
    p = np.append(1.0, a[:-1])
    small = b * (1 - p) / (1 - a)
    log_variance = {
        "fixedlarge": np.log(np.append(small[1], b[1:])),
        "fixedsmall": np.log(np.maximum(small, 1e-20)),
    }[variance]

    def at(table: np.ndarray, t: int) -> Tensor:
        return torch.tensor(table[t]).float()

    x = torch.randn(*shape) if noise is None else noise
    for t in reversed(range(T)):
        eps = model(x, torch.full((len(x),), float(t)))
        x0 = (at(np.sqrt(1 / a), t) * x - at(np.sqrt(1 / a - 1), t) * eps).clamp(-1, 1)
        z = torch.randn_like(x)  # drawn at the last step too, where it is not used
        x = at(b * np.sqrt(p) / (1 - a), t) * x0 + at((1 - p) * np.sqrt(1 - b) / (1 - a), t) * x
        if t > 0:
            x = x + torch.exp(0.5 * at(log_variance, t)) * z
    return x


def seq_uniform(T: int, S: int) -> list[int]:
    """0, T // S, ...: S steps, or more where S does not divide T."""
    return list(range(0, T, T // S))


def seq_quad(T: int, S: int) -> list[int]:
    """S squares between 0 and 0.8 T."""
    return [int(root**2) for root in np.linspace(0, np.sqrt(0.8 * T), S)]


def _pairs(seq: Sequence[int], betas: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(t, alpha-bar at t, alpha-bar at the next step to the left or 1), from the last; float32 as in the original."""
    a = torch.cumprod(1 - betas.float(), dim=0)
    before = [torch.tensor(1.0), *[a[t] for t in seq[:-1]]]
    return [(t, a[t], an) for t, an in zip(reversed(seq), reversed(before), strict=True)]


@torch.no_grad()
def generalized_steps(model: Any, x: Tensor, seq: Sequence[int], betas: Tensor, eta: float = 0.0) -> Tensor:
    """DDIM without clamping, from noise x [N, 3, H, W] to x_0; draws at every step, whatever eta."""
    for t, at, an in _pairs(seq, betas):
        eps = model(x, torch.full((len(x),), float(t)))
        x0 = (x - eps * (1 - at).sqrt()) / at.sqrt()
        c1 = eta * ((1 - at / an) * (1 - an) / (1 - at)).sqrt()
        c2 = (1 - an - c1**2).sqrt()
        x = an.sqrt() * x0 + c1 * torch.randn_like(x) + c2 * eps
    return x


@torch.no_grad()
def ddpm_steps(model: Any, x: Tensor, seq: Sequence[int], betas: Tensor) -> Tensor:
    """Ancestral sampling, x_0 clamped, the large variance, from noise x [N, 3, H, W] to x_0; draws at every step."""
    for t, at, an in _pairs(seq, betas):
        eps = model(x, torch.full((len(x),), float(t)))
        x0 = ((1 / at).sqrt() * x - (1 / at - 1).sqrt() * eps).clamp(-1, 1)
        b = 1 - at / an
        z = torch.randn_like(x)
        x = (an.sqrt() * b * x0 + (1 - b).sqrt() * (1 - an) * x) / (1 - at)
        if t > 0:
            x = x + torch.exp(0.5 * torch.log(b)) * z
    return x


@dataclass(frozen=True)
class Published:
    """A published file: arguments of `Model`, its variance, its number of parameters."""

    model: dict[str, Any]
    variance: str
    parameters: int


def _model(resolution: int, ch_mult: tuple[int, ...]) -> dict[str, Any]:
    return {"ch": 128, "ch_mult": ch_mult, "num_res_blocks": 2, "attn_resolutions": (16,), "resolution": resolution}


PUBLISHED = {
    "cifar10": Published(_model(32, (1, 2, 2, 2)), "fixedlarge", 35_746_307),
    "lsun": Published(_model(256, (1, 1, 2, 2, 4, 4)), "fixedsmall", 113_673_219),  # bedroom, cat and church alike
    "celeba-64": Published(_model(64, (1, 2, 2, 2, 4)), "fixedlarge", 78_700_803),
}
