"""The lucidrains U-Net in plain PyTorch: the reference for checkpoints of denoising-diffusion-pytorch, 0.32 and later.

The graph differs from `ddpm.unet` throughout: norm after convolution, two skips a level, attention on every level and
linear (Shen et al. 2021) on most, and the channels change where the resolution does. Parameters carry the names of
versions 1.8 and later, so a state dict of those loads as it is; `ddpm.checkpoints.lucidrains_keys` renames older ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("rms", "group")
ATTENTION_NORMS = ("rms", "layer")


@dataclass(frozen=True)
class LucidrainsConfig:
    """Everything that the graph and its numerics depend on.

    Names and shapes in a state dict tell all of it but norm_groups, sinusoid_theta, and, before 1.9, how the product of
    attention_heads and attention_dim_head divides; before 1.8 the package's version tells attention_norm and
    value_scale_by_pixels.

    Levels are numbered by resolution, 0 the highest, for both ways: level l goes from widths[l] channels to
    widths[l + 1] on the way down and back again on the way up.

    Attributes:
        dim: width of the timestep features, even; the time MLP is four times as wide.
        dim_mults: level l ends in dim * dim_mults[l] channels.
        full_attention: whether a level's attention is softmax attention and not linear, down and up; the middle's is.
        init_dim: channels of level 0 at full resolution, after the first convolution; None means dim.
        channels: of the image.
        out_channels: of the output (twice the image's with a learned variance).
        self_condition: the network also reads an estimate of x_0 (Chen et al. 2022), `channels` more input channels.
        norm: of the resnets: "rms" (2.0 and later) or "group".
        norm_groups: of each GroupNorm, eps 1e-5.
        attention_norm: before attention and after linear attention: "rms" (1.7 and later) or "layer".
        attention_heads, attention_dim_head: number of heads and width of one, for each level; the middle has the last
            level's. () means 4 heads of 32 everywhere.
        memory_key_values: learned positions that every attention also attends to, 0 before 1.9.
        value_scale_by_pixels: linear attention divides its values by H * W (before 1.7.4).
        sinusoid_theta: the longest period of the timestep features is 2 pi theta.
    """

    dim: int
    dim_mults: tuple[int, ...]
    full_attention: tuple[bool, ...]
    init_dim: int | None = None
    channels: int = 3
    out_channels: int = 3
    self_condition: bool = False
    norm: str = "rms"
    norm_groups: int = 8
    attention_norm: str = "rms"
    attention_heads: tuple[int, ...] = ()
    attention_dim_head: tuple[int, ...] = ()
    memory_key_values: int = 4
    value_scale_by_pixels: bool = False
    sinusoid_theta: float = 10000

    def __post_init__(self) -> None:
        levels = len(self.dim_mults)
        for name, default in (("attention_heads", 4), ("attention_dim_head", 32)):
            if not getattr(self, name):
                object.__setattr__(self, name, (default,) * levels)
        for name in ("full_attention", "attention_heads", "attention_dim_head"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {levels} levels")
        if self.dim < 4 or self.dim % 2:
            raise ValueError(f"dim={self.dim} is not an even number of 4 or more, as the timestep features need")
        for name, known in (("norm", NORMS), ("attention_norm", ATTENTION_NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        for channels in self.widths if self.norm == "group" else ():
            if channels % self.norm_groups:
                raise ValueError(f"norm_groups={self.norm_groups} does not divide a level of {channels} channels")

    @property
    def summary(self) -> list[str]:
        """The architecture in a few lines, for people."""
        full = [str(level) for level, used in enumerate(self.full_attention) if used]
        norm = "RMSNorm" if self.norm == "rms" else f"GroupNorm of {self.norm_groups} groups"
        heads = ", ".join(f"{h} x {d}" for h, d in zip(self.attention_heads, self.attention_dim_head, strict=True))
        return [
            f"lucidrains: dim {self.dim}, mults {', '.join(map(str, self.dim_mults))}; {norm} after each convolution",
            f"full attention: levels {', '.join(full) or 'none'} and mid, linear elsewhere; heads by level {heads}; "
            f"{self.memory_key_values} memory key/values",
            *(["self-conditioning: reads the x_0 of the step before"] if self.self_condition else []),
        ]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at the border of levels: of the first convolution's output, then of each level's end."""
        return (self.init_dim or self.dim, *(self.dim * mult for mult in self.dim_mults))

    @property
    def in_channels(self) -> int:
        """Of the first convolution: those of the self-conditioning, then the image's."""
        return self.channels * (2 if self.self_condition else 1)

    @property
    def embedding_dim(self) -> int:
        return 4 * self.dim

    @property
    def resolution_divisor(self) -> int:
        """H and W of an input must be multiples of this."""
        return 2 ** (len(self.dim_mults) - 1)


class Sinusoid(nn.Module):
    """[sin, cos] of t times frequencies that fall geometrically from 1 to 1 / theta: [N] -> float32 [N, dim]."""

    def __init__(self, dim: int, theta: float):
        super().__init__()
        self.half, self.theta = dim // 2, theta

    def forward(self, timesteps: Tensor) -> Tensor:
        index = torch.arange(self.half, dtype=torch.float32, device=timesteps.device)
        frequency = torch.exp(index * (-math.log(self.theta) / (self.half - 1)))
        angle = timesteps[:, None].float() * frequency[None, :]  # [N, half]
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) g over the channels of each position; the eps of 1e-12 bounds the length of x, not its square."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = channels**0.5
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * self.scale


class ChannelLayerNorm(nn.Module):
    """(x - mean) / sqrt(var + 1e-5) g over the channels of each position, without a bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)  # [N, 1, H, W]
        return (x - mean) * (var + 1e-5).rsqrt() * self.g


def attention_norm(config: LucidrainsConfig, channels: int) -> nn.Module:
    return RMSNorm(channels) if config.attention_norm == "rms" else ChannelLayerNorm(channels)


class Block(nn.Module):
    """Convolution, norm, scale and shift by time if given, SiLU."""

    def __init__(self, config: LucidrainsConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        group = config.norm == "group"
        self.norm = nn.GroupNorm(config.norm_groups, out_channels, eps=1e-5) if group else RMSNorm(out_channels)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if scale is not None:
            x = x * (scale + 1) + shift
        return F.silu(x)


class ResnetBlock(nn.Module):
    """Two blocks, the first of them scaled and shifted by the time embedding, beside a shortcut."""

    def __init__(self, config: LucidrainsConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(config.embedding_dim, 2 * out_channels))
        self.block1 = Block(config, in_channels, out_channels)
        self.block2 = Block(config, out_channels, out_channels)
        self.res_conv = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.mlp(embedding)[:, :, None, None].chunk(2, dim=1)  # [N, C, 1, 1] each
        return self.block2(self.block1(x, scale, shift)) + self.res_conv(x)


class LinearAttention(nn.Module):
    """softmax(q) (softmax(k)^T v), q over dim_head, k over positions: its cost is linear in H * W.

    Channel c belongs to head c // dim_head. The residual sum is the caller's, as with `FullAttention`.
    """

    def __init__(self, config: LucidrainsConfig, channels: int, heads: int, dim_head: int):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.value_scale_by_pixels = config.value_scale_by_pixels
        memory = config.memory_key_values
        self.norm = attention_norm(config, channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, memory)) if memory else None
        self.to_qkv = nn.Conv2d(channels, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, channels, 1), attention_norm(config, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        qkv = self.to_qkv(self.norm(x)).view(n, 3, self.heads, self.dim_head, height * width)
        q, k, v = qkv.unbind(1)  # [N, heads, dim_head, HW]
        if self.mem_kv is not None:
            memory_k, memory_v = self.mem_kv.expand(n, *self.mem_kv.shape).unbind(1)  # [N, heads, dim_head, M]
            k, v = torch.cat([memory_k, k], dim=-1), torch.cat([memory_v, v], dim=-1)
        if self.value_scale_by_pixels:
            v = v / (height * width)
        q = q.softmax(dim=-2) * self.dim_head**-0.5
        context = v @ k.softmax(dim=-1).transpose(-1, -2)  # [N, heads, dim_head of v, dim_head of k]
        return self.to_out((context @ q).reshape(n, -1, height, width))


class FullAttention(nn.Module):
    """Softmax attention over the H*W positions and the memory; no norm after it, unlike `LinearAttention`."""

    def __init__(self, config: LucidrainsConfig, channels: int, heads: int, dim_head: int):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        memory = config.memory_key_values
        self.norm = attention_norm(config, channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, memory, dim_head)) if memory else None
        self.to_qkv = nn.Conv2d(channels, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        qkv = self.to_qkv(self.norm(x)).view(n, 3, self.heads, self.dim_head, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # [N, heads, HW, dim_head]
        if self.mem_kv is not None:
            memory_k, memory_v = self.mem_kv.expand(n, *self.mem_kv.shape).unbind(1)  # [N, heads, M, dim_head]
            k, v = torch.cat([memory_k, k], dim=-2), torch.cat([memory_v, v], dim=-2)
        h = F.scaled_dot_product_attention(q, k, v)  # [N, heads, HW, dim_head]
        return self.to_out(h.transpose(-1, -2).reshape(n, -1, height, width))


def attention(config: LucidrainsConfig, channels: int, level: int) -> nn.Module:
    kind = FullAttention if config.full_attention[level] else LinearAttention
    return kind(config, channels, config.attention_heads[level], config.attention_dim_head[level])


def downsample(in_channels: int, out_channels: int, last: bool) -> nn.Module:
    """Pixel (i, j) of each 2x2 of channel c becomes channel 4c + 2i + j, then all are mixed; `last` keeps H and W."""
    if last:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * in_channels, out_channels, 1))


def upsample(in_channels: int, out_channels: int, last: bool) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return conv if last else nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv)


class LucidrainsUNet(nn.Module):
    """The network epsilon_theta(x_t, t) (or x_0, or v): [N, channels, H, W] -> [N, out_channels, H, W].

    Raises:
        ValueError: a configuration that describes no network (see LucidrainsConfig).
    """

    def __init__(self, config: LucidrainsConfig):
        super().__init__()
        self.config = config
        self.conditional = False
        self.divides_by_time = False
        self.time_activation = F.silu
        self.self_condition = config.self_condition
        widths, lowest = config.widths, len(config.dim_mults) - 1
        self.init_conv = nn.Conv2d(config.in_channels, widths[0], 7, padding=3)
        self.time_mlp = nn.Sequential(
            Sinusoid(config.dim, config.sinusoid_theta),
            nn.Linear(config.dim, config.embedding_dim),
            nn.GELU(),
            nn.Linear(config.embedding_dim, config.embedding_dim),
        )
        down, up = [], []
        for level, (upper, lower) in enumerate(pairwise(widths)):
            resnets = [ResnetBlock(config, upper, upper) for _ in range(2)]
            end = downsample(upper, lower, level == lowest)
            down.append(nn.ModuleList([*resnets, attention(config, upper, level), end]))
            resnets = [ResnetBlock(config, lower + upper, lower) for _ in range(2)]
            end = upsample(lower, upper, level == 0)
            up.append(nn.ModuleList([*resnets, attention(config, lower, level), end]))
        self.downs = nn.ModuleList(down)
        self.mid_block1 = ResnetBlock(config, widths[-1], widths[-1])
        self.mid_attn = FullAttention(config, widths[-1], config.attention_heads[-1], config.attention_dim_head[-1])
        self.mid_block2 = ResnetBlock(config, widths[-1], widths[-1])
        self.ups = nn.ModuleList(reversed(up))
        self.final_res_block = ResnetBlock(config, 2 * widths[0], widths[0])
        self.final_conv = nn.Conv2d(widths[0], config.out_channels, 1)

    @property
    def condition_channels(self) -> int:
        return self.config.channels if self.self_condition else 0

    def activation_elements(self, height: int, width: int) -> int:
        """An upper estimate of what a forward holds per image: the skips, and eight tensors of the widest layer."""
        config = self.config
        skips, widest = height * width * config.widths[0], 0
        for level, (upper, lower) in enumerate(pairwise(config.widths)):
            pixels = height * width // 4**level
            qkv = 3 * config.attention_heads[level] * config.attention_dim_head[level]
            skips += 2 * pixels * upper
            widest = max(widest, pixels * max(lower + upper, qkv))
        return skips + 8 * widest

    def example(self, n: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Arguments of `forward`, all zero, for counting."""
        x = torch.zeros(n, self.config.channels, height, width, dtype=torch.float32)
        return x, torch.zeros(n, dtype=torch.int64), None, x if self.self_condition else None

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """The time MLP's output, [N, embedding_dim], for timesteps [N]; each resnet adds SiLU and Linear."""
        features = self.time_mlp[0](timesteps)
        return self.time_mlp[1:](features.to(self.time_mlp[1].weight.dtype))

    def forward(
        self, x: Tensor, timesteps: Tensor | int | float, labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """The network's output, [N, out_channels, H, W].

        Args:
            x: [N, channels, H, W].
            timesteps: [N], a scalar tensor or a number.
            labels: None; the argument is there because `ddpm.unet.UNet` has it.
            condition: [N, channels, H, W], the x_0 predicted a step earlier; None, as at the first step, is zeros.

        Raises:
            ValueError: labels were given, or a condition to a network without self-conditioning.
        """
        timesteps = torch.as_tensor(timesteps, device=x.device).expand(len(x))
        if labels is not None:
            raise ValueError("labels are needed by a class-conditional network, and only there")
        embedding = self.embed_time(timesteps)
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if condition is None else condition, x], dim=1)
        elif condition is not None:
            raise ValueError("a condition is of use to a network with self-conditioning, and only there")
        h = first = self.init_conv(x)
        skips = []
        for level in self.downs:
            resnet1, resnet2, attend, resample = level.children()
            h = resnet1(h, embedding)
            skips.append(h)
            h = resnet2(h, embedding)
            h = attend(h) + h
            skips.append(h)
            h = resample(h)
        h = self.mid_block1(h, embedding)
        h = self.mid_attn(h) + h
        h = self.mid_block2(h, embedding)
        for level in self.ups:
            resnet1, resnet2, attend, resample = level.children()
            h = resnet1(torch.cat([h, skips.pop()], dim=1), embedding)
            h = resnet2(torch.cat([h, skips.pop()], dim=1), embedding)
            h = attend(h) + h
            h = resample(h)
        return self.final_conv(self.final_res_block(torch.cat([h, first], dim=1), embedding))
