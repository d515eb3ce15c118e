"""The canonical U-Net in plain PyTorch: the reference for every checkpoint family that shares the DDPM / ADM graph.

Ho et al. 2020 (appendix B) with the options that later networks added (Nichol & Dhariwal 2021, Dhariwal & Nichol 2021).
Parameters carry the names that diffusers' UNet2DModel gives them, so a state dict in that schema loads as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}
CLASS_EMBEDDINGS = ("table", "timestep", "identity")


@dataclass(frozen=True)
class UNetConfig:
    """Everything that the graph and its numerics depend on; shapes alone identify none of it.

    Levels are numbered by resolution, 0 the highest; up blocks by execution order, 0 the lowest.

    Attributes:
        sample_size: (H, W) the network was trained at, or None if the checkpoint does not say.
        in_channels, out_channels: of the image and of the output (twice the image's with a learned variance).
        block_out_channels: channels of each level.
        layers_per_block: resnets per level on the way down; one more on the way up.
        down_attention, up_attention: whether the resnets of a level (up block) are each followed by attention.
        down_resample, up_resample: "conv" or "resnet", how a level (up block) changes resolution; the last does not.
        mid_block, mid_attention: whether they exist.
        attention_head_dim, attention_heads: width of a head, or number of heads; both None means one full-width head.
        norm_num_groups, norm_eps: of every GroupNorm.
        mid_norm_num_groups: of the mid attention's GroupNorm; None means that it has none.
        activation: name of the resnets' nonlinearity, also of the time embedding before each resnet's projection of it;
            the time MLP and the output always use SiLU.
        time_embedding: "positional", "fourier" (fixed random frequencies of log t; output divided by t) or "learned".
        time_sinusoid_dim, time_embedding_dim: width of the timestep features and of the time MLP; None means
            block_out_channels[0] and 4 * block_out_channels[0].
        flip_sin_to_cos: True puts cosines before sines.
        freq_shift: the frequencies' exponent is i / (half - freq_shift).
        num_train_timesteps: rows of a learned time embedding.
        scale_shift: the time embedding scales and shifts norm2's output instead of being added before it.
        downsample_padding: 1 is symmetric; 0 pads right and bottom by one.
        mid_block_scale_factor: the mid block's residual sums are divided by it.
        center_input_sample: the input becomes 2x - 1.
        class_embedding: None, "table", "timestep" or "identity".
        num_class_embeds: rows of the class table.
        condition_channels: trailing input channels that hold a conditioning image (super-resolution), not x_t.
    """

    block_out_channels: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    sample_size: tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    layers_per_block: int = 2
    down_resample: tuple[str, ...] = ()
    up_resample: tuple[str, ...] = ()
    mid_block: bool = True
    mid_attention: bool = True
    attention_head_dim: int | None = None
    attention_heads: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    mid_norm_num_groups: int | None = 32
    activation: str = "silu"
    time_embedding: str = "positional"
    time_sinusoid_dim: int | None = None
    time_embedding_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    num_train_timesteps: int | None = None
    scale_shift: bool = False
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    center_input_sample: bool = False
    class_embedding: str | None = None
    num_class_embeds: int | None = None
    condition_channels: int = 0

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name in ("down_resample", "up_resample"):
            if not getattr(self, name):
                object.__setattr__(self, name, ("conv",) * levels)
        for name in ("down_attention", "up_attention", "down_resample", "up_resample"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {levels} levels")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups={self.norm_num_groups} does not divide a level of {channels} channels"
                )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")

    @property
    def summary(self) -> list[str]:
        """The architecture in a few lines, for people."""
        attention = [
            *(f"down {level}" for level, used in enumerate(self.down_attention) if used),
            *(["mid"] if self.mid_block and self.mid_attention else []),
            *(f"up {u}" for u, used in enumerate(self.up_attention) if used),
        ]
        heads = "one head" if not self.attention_heads and not self.attention_head_dim else ""
        if self.attention_heads or self.attention_head_dim:
            heads = f"{self.attention_heads} heads" if self.attention_heads else f"heads of {self.attention_head_dim}"
        lines = [
            f"channels {', '.join(map(str, self.block_out_channels))}; {self.layers_per_block} resnets a level"
            + (", time scales and shifts" if self.scale_shift else ""),
            f"attention: {', '.join(attention)}; {heads}" if attention else "attention: none",
            f"GroupNorm of {self.norm_num_groups} groups, eps {self.norm_eps:g}",
        ]
        if self.class_embedding == "table":
            lines.append(f"class-conditional: labels 0 to {(self.num_class_embeds or 1) - 1}")
        elif self.class_embedding:
            lines.append(f"class-conditional: {self.class_embedding} embedding")
        if self.condition_channels:
            lines.append(f"super-resolution: enlarges an image of {self.condition_channels} channels (low_res)")
        return lines

    @property
    def sinusoid_dim(self) -> int:
        return self.time_sinusoid_dim or self.block_out_channels[0]

    @property
    def embedding_dim(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def resolution_divisor(self) -> int:
        """H and W of an input must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)

    def heads(self, channels: int) -> tuple[int, int]:
        """(number of heads, width of one) of an attention over `channels`; their product may differ from channels."""
        if self.attention_heads is not None:
            return self.attention_heads, channels // self.attention_heads
        head_dim = self.attention_head_dim or channels
        return channels // head_dim, head_dim


def sinusoid(timesteps: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal timestep features (Vaswani et al. 2017) in float32.

    Args:
        timesteps: [N], integer or float.
        dim: width of the result; an odd width ends in a zero.

    Returns:
        float32 [N, dim]: [sin, cos], or [cos, sin] if flip_sin_to_cos.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - freq_shift)
    angle = timesteps[:, None].float() * exponent.exp()[None, :]  # [N, half]
    parts = [angle.cos(), angle.sin()] if flip_sin_to_cos else [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class FourierTime(nn.Module):
    """[sin, cos] of 2 pi log(t) w, w fixed random frequencies (Song et al. 2021)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim) * 16, requires_grad=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        angle = timesteps[:, None].log() * self.weight[None, :] * 2 * math.pi
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TimeMLP(nn.Module):
    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class ResnetBlock(nn.Module):
    """Two convolutions with a time embedding between them; `resample` halves ("down") or doubles ("up") H and W.

    Dhariwal & Nichol 2021, section 3: the resampling acts on both branches, between the activation and conv1.
    """

    def __init__(
        self,
        config: UNetConfig,
        in_channels: int,
        out_channels: int,
        *,
        resample: str | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        if in_channels % groups:
            raise ValueError(f"norm_num_groups={groups} does not divide a resnet's {in_channels} input channels")
        self.activation = ACTIVATIONS[config.activation]
        self.scale_shift, self.resample, self.scale = config.scale_shift, resample, scale
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.embedding_dim, out_channels * (2 if config.scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.activation(self.norm1(x))
        h, x = resample(h, self.resample), resample(x, self.resample)
        h = self.conv1(h)
        time = self.time_emb_proj(self.activation(embedding))[:, :, None, None]  # [N, C or 2C, 1, 1]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.activation(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return (x + h) / self.scale


def resample(x: Tensor, kind: str | None) -> Tensor:
    """Average pooling by 2 ("down"), nearest-neighbour upsampling by 2 ("up"), or x itself (None)."""
    if kind == "down":
        return F.avg_pool2d(x, 2)
    if kind == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return x


class Attention(nn.Module):
    """Self-attention over the H*W positions; channel c belongs to head c // dim_head."""

    def __init__(self, config: UNetConfig, channels: int, *, groups: int | None, scale: float = 1.0):
        super().__init__()
        self.heads, self.dim_head = config.heads(channels)
        self.scale = scale
        inner = self.heads * self.dim_head
        self.group_norm = nn.GroupNorm(groups, channels, eps=config.norm_eps) if groups else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        h = h.flatten(2).transpose(1, 2)  # [N, HW, C]
        q, k, v = (
            project(h).view(n, -1, self.heads, self.dim_head).transpose(1, 2)  # [N, heads, HW, dim_head]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [N, HW, inner]
        h = self.to_out[0](h).transpose(1, 2).reshape(n, c, height, width)
        return (h + x) / self.scale


class Downsample(nn.Module):
    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(resample(x, "up"))


class Block(nn.Module):
    """One level of one path: resnets, their attentions, and the change of resolution at its end, if any."""

    def __init__(
        self, resnets: list[ResnetBlock], attentions: list[Attention], sampler_name: str, sampler: nn.Module | None
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.sampler_name = sampler_name
        self.add_module(sampler_name, nn.ModuleList([sampler] if sampler is not None else []))

    @property
    def sampler(self) -> nn.Module | None:
        samplers = getattr(self, self.sampler_name)
        return samplers[0] if len(samplers) else None

    def layer(self, index: int, h: Tensor, embedding: Tensor) -> Tensor:
        h = self.resnets[index](h, embedding)
        return self.attentions[index](h) if len(self.attentions) else h

    def change_resolution(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.sampler(h, embedding) if isinstance(self.sampler, ResnetBlock) else self.sampler(h)


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        scale = config.mid_block_scale_factor
        self.resnets = nn.ModuleList([ResnetBlock(config, channels, channels, scale=scale) for _ in range(2)])
        attentions = (
            [Attention(config, channels, groups=config.mid_norm_num_groups, scale=scale)]
            if config.mid_attention
            else []
        )
        self.attentions = nn.ModuleList(attentions)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        h = self.resnets[0](h, embedding)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h, embedding)


class UNet(nn.Module):
    """The network epsilon_theta(x_t, t) (or x_0, or v): [N, in, H, W] -> [N, out, H, W].

    Raises:
        ValueError: a configuration that describes no network (see UNetConfig).
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.time_activation = ACTIVATIONS[config.activation]
        self.conditional = config.class_embedding is not None
        self.divides_by_time = config.time_embedding == "fourier"
        self.self_condition = False
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        features = config.sinusoid_dim
        if config.time_embedding == "fourier":
            self.time_proj = FourierTime(config.sinusoid_dim)
            features = 2 * config.sinusoid_dim
        elif config.time_embedding == "learned":
            if config.num_train_timesteps is None:
                raise ValueError("a learned time embedding needs num_train_timesteps, the number of its rows")
            self.time_proj = nn.Embedding(config.num_train_timesteps, config.sinusoid_dim)
        elif config.time_embedding != "positional":
            raise ValueError(f"time_embedding {config.time_embedding!r} is not one of positional, fourier, learned")
        self.time_embedding = TimeMLP(features, config.embedding_dim)
        if config.class_embedding == "table":
            if config.num_class_embeds is None:
                raise ValueError("a class table needs num_class_embeds, the number of its rows")
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.embedding_dim)
        elif config.class_embedding == "timestep":
            self.class_embedding = TimeMLP(features, config.embedding_dim)

        down, width = [], channels[0]
        for level, out in enumerate(channels):
            resnets = [ResnetBlock(config, width if j == 0 else out, out) for j in range(config.layers_per_block)]
            last = level == levels - 1
            down.append(
                self._block(
                    config, resnets, out, config.down_attention[level], "down", config.down_resample[level], last
                )
            )
            width = out
        self.down_blocks = nn.ModuleList(down)
        self.mid_block = MidBlock(config, channels[-1]) if config.mid_block else None
        up = []
        for u in range(levels):
            out, skip_last = channels[levels - 1 - u], channels[max(levels - 2 - u, 0)]
            resnets = []
            for j in range(config.layers_per_block + 1):
                skip = skip_last if j == config.layers_per_block else out
                resnets.append(ResnetBlock(config, (width if j == 0 else out) + skip, out))
            last = u == levels - 1
            up.append(self._block(config, resnets, out, config.up_attention[u], "up", config.up_resample[u], last))
            width = out
        self.up_blocks = nn.ModuleList(up)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @staticmethod
    def _block(
        config: UNetConfig,
        resnets: list[ResnetBlock],
        channels: int,
        attention: bool,
        direction: str,
        kind: str,
        last: bool,
    ) -> Block:
        attentions = [Attention(config, channels, groups=config.norm_num_groups) for _ in resnets] if attention else []
        sampler: nn.Module | None = None
        if not last:
            if kind == "resnet":
                sampler = ResnetBlock(config, channels, channels, resample=direction)
            elif kind == "conv":
                sampler = Downsample(channels, config.downsample_padding) if direction == "down" else Upsample(channels)
            else:
                raise ValueError(f"{direction}_resample {kind!r} is not one of conv, resnet")
        return Block(resnets, attentions, f"{direction}samplers", sampler)

    @property
    def condition_channels(self) -> int:
        return self.config.condition_channels

    def activation_elements(self, height: int, width: int) -> int:
        """An upper estimate of what a forward holds per image: the skips, and eight tensors of the widest level."""
        levels = enumerate(self.config.block_out_channels)
        widths = [height * width // 4**level * channels for level, channels in levels]
        return (self.config.layers_per_block + 1) * sum(widths) + 8 * 2 * max(widths)

    def example(self, n: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Arguments of `forward`, all zero, for counting."""
        labels = torch.zeros(n, dtype=torch.int64) if self.conditional else None
        if self.config.class_embedding == "identity":
            labels = torch.zeros(n, self.config.embedding_dim, dtype=torch.float32)
        channels, extra = self.config.in_channels - self.condition_channels, self.condition_channels
        condition = torch.zeros(n, extra, height, width, dtype=torch.float32) if extra else None
        x = torch.zeros(n, channels, height, width, dtype=torch.float32)
        return x, torch.zeros(n, dtype=torch.int64), labels, condition

    def timestep_features(self, timesteps: Tensor) -> Tensor:
        """What the time MLP reads, float32 [N, features], for timesteps [N]."""
        config = self.config
        if config.time_embedding == "positional":
            return sinusoid(timesteps, config.sinusoid_dim, config.flip_sin_to_cos, config.freq_shift)
        return self.time_proj(timesteps)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """The time MLP's output, [N, embedding_dim], for timesteps [N]."""
        dtype = self.time_embedding.linear_1.weight.dtype
        return self.time_embedding(self.timestep_features(timesteps).to(dtype))

    def embed_classes(self, labels: Tensor) -> Tensor:
        """What class labels add to it, [N, embedding_dim].

        Args:
            labels: int64 [N] for a class table; a number per image for "timestep"; for "identity" the result itself.
        """
        dtype = self.time_embedding.linear_1.weight.dtype
        if self.config.class_embedding == "timestep":
            labels = self.timestep_features(labels).to(dtype)
        return labels.to(dtype) if self.config.class_embedding == "identity" else self.class_embedding(labels)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | int | float,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The output [N, out, H, W].

        Args:
            x: [N, in - condition_channels, H, W].
            timesteps: [N], a scalar tensor or a number.
            labels: see `embed_classes`.
            condition: [N, condition_channels, H, W].

        Raises:
            ValueError: labels or condition missing where the network needs them, or given where it has no use for them.
        """
        if self.conditional != (labels is not None):
            raise ValueError("labels are needed by a class-conditional network, and only there")
        if (self.config.condition_channels > 0) != (condition is not None):
            raise ValueError("a conditioning image is needed by a network with condition_channels, and only there")
        embedding = self.embed_time(torch.as_tensor(timesteps, device=x.device).expand(len(x)))
        if labels is not None:
            embedding = embedding + self.embed_classes(labels)
        if condition is not None:
            x = torch.cat([x, condition], dim=1)
        if self.config.center_input_sample:
            x = 2 * x - 1.0
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            for j in range(len(block.resnets)):
                h = block.layer(j, h, embedding)
                skips.append(h)
            if block.sampler is not None:
                h = block.change_resolution(h, embedding)
                skips.append(h)
        if self.mid_block is not None:
            h = self.mid_block(h, embedding)
        for block in self.up_blocks:
            for j in range(len(block.resnets)):
                h = block.layer(j, torch.cat([h, skips.pop()], dim=1), embedding)
            if block.sampler is not None:
                h = block.change_resolution(h, embedding)
        h = self.conv_out(F.silu(self.conv_norm_out(h)))
        if self.divides_by_time:
            h = h / torch.as_tensor(timesteps, dtype=h.dtype, device=h.device).expand(len(x)).view(-1, 1, 1, 1)
        return h
