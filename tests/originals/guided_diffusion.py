"""guided-diffusion and improved-diffusion as their papers and files define them: slow, plain, float32.

The originals are not on PyPI; this is what the tests compare with. It shares no code with the package and is written
from the published facts: the names in the state dict, the graph, the float64 tables and the order of the random draws.
improved-diffusion is the case without `resblock_updown`, in the legacy attention order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """[N] steps, whole or fractional -> [N, width]: cosines, then sines; an odd width ends in a zero."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps.float()[:, None] * frequencies.to(timesteps.device)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the embedding enters at the second norm. resample: "", "down", "up"."""

    def __init__(self, c_in: int, c_out: int, emb_width: int, *, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, 2 * c_out if scale_shift else c_out))
        # Position 2 is the dropout's, which does nothing at inference but counts in the names.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, c_out), nn.SiLU(), nn.Identity(), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[N, c_in, H, W], [N, emb_width] -> [N, c_out, H', W']."""
        norm, silu, conv = self.in_layers
        h = conv(self.resampled(silu(norm(x))))
        shift = self.emb_layers(emb)[:, :, None, None]
        norm, silu, _, conv = self.out_layers
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + shift)
        return self.skip_connection(self.resampled(x)) + conv(silu(h))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with a residual."""

    def __init__(self, channels: int, heads: int, *, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        n, c, height, width = x.shape
        d = c // self.heads
        qkv = self.qkv(self.norm(x.reshape(n, c, height * width)))
        if self.new_order:  # all of q, all of k, all of v
            q, k, v = qkv.reshape(n, 3, self.heads, d, height * width).unbind(1)
        else:  # q, k, v of one head after those of another
            q, k, v = qkv.reshape(n, self.heads, 3, d, height * width).unbind(2)
        weights = torch.einsum("nhdq,nhdk->nhqk", q * d**-0.25, k * d**-0.25).softmax(dim=-1)
        h = torch.einsum("nhqk,nhdk->nhdq", weights, v).reshape(n, c, height * width)
        return x + self.proj_out(h).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNetModel(nn.Module):
    """The network, under the parameter names of the published files.

    Args:
        image_size: H = W of the images; the network itself does not use it.
        num_channels: the "model channels", by which channel_mult is multiplied.
        attention_ds: downsample factors (1, 2, 4, ...) of the levels with attention.
        num_heads: heads of every attention, unless
        num_head_channels: the width of a head, is given; -1 means it is not.
        in_channels: 6 for super-resolution.
    """

    def __init__(
        self,
        *,
        image_size: int,
        num_channels: int,
        num_res_blocks: int,
        channel_mult: tuple[float, ...],
        attention_ds: tuple[int, ...],
        num_heads: int = 4,
        num_head_channels: int = -1,
        use_new_attention_order: bool = False,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        learn_sigma: bool = False,
        num_classes: int | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.image_size, self.num_channels = image_size, num_channels
        emb_width = 4 * num_channels
        widths = [int(m * num_channels) for m in channel_mult]

        def res(c_in: int, c_out: int, resample: str = "") -> ResBlock:
            return ResBlock(c_in, c_out, emb_width, scale_shift=use_scale_shift_norm, resample=resample)

        def attention(c: int) -> AttentionBlock:
            heads = num_heads if num_head_channels == -1 else c // num_head_channels
            return AttentionBlock(c, heads, new_order=use_new_attention_order)

        self.time_embed = nn.Sequential(nn.Linear(num_channels, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, emb_width)

        c = widths[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, c, 3, padding=1)])])
        skips = [c]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                block = nn.ModuleList([res(c, width)])
                c = width
                if 2**level in attention_ds:
                    block.append(attention(c))
                self.input_blocks.append(block)
                skips.append(c)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([res(c, c, "down") if resblock_updown else Downsample(c)]))
                skips.append(c)

        self.middle_block = nn.ModuleList([res(c, c), attention(c), res(c, c)])

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for j in range(num_res_blocks + 1):
                block = nn.ModuleList([res(c + skips.pop(), width)])
                c = width
                if 2**level in attention_ds:
                    block.append(attention(c))
                if level > 0 and j == num_res_blocks:
                    block.append(res(c, c, "up") if resblock_updown else Upsample(c))
                self.output_blocks.append(block)

        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, 6 if learn_sigma else 3, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        """[N, 3, H, W], [N] (, [N] labels) (, [N, 3, h, w] to enlarge) -> [N, 3 or 6, H, W]."""
        assert (y is None) == (self.label_emb is None)
        if low_res is not None:
            x = torch.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear")], dim=1)
        emb = self.time_embed(timestep_embedding(timesteps, self.num_channels))
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)

        def apply(block: nn.ModuleList, h: Tensor) -> Tensor:
            for layer in block:
                h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            return h

        h, skips = x, []
        for block in self.input_blocks:
            h = apply(block, h)
            skips.append(h)
        h = apply(self.middle_block, h)
        for block in self.output_blocks:
            h = apply(block, torch.cat([h, skips.pop()], dim=1))
        return self.out(h)


def betas(noise_schedule: str, steps: int) -> np.ndarray:
    """[steps] float64. "linear" has 1000 / steps of the slope, "cosine" is cut at 0.999."""
    if noise_schedule == "linear":
        return np.linspace(1000 / steps * 1e-4, 1000 / steps * 0.02, steps, dtype=np.float64)
    if noise_schedule == "cosine":
        g = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return np.array([min(1 - g[i + 1] / g[i], 0.999) for i in range(steps)])
    raise ValueError(f"unknown noise schedule {noise_schedule!r}")


def space_timesteps(steps: int, respacing_string: str) -> list[int]:
    """The steps of T that a chain keeps, ascending: "" all, "N" or "n1,n2,...": so many of each section, "ddimN"."""
    if respacing_string.startswith("ddim"):
        wanted = int(respacing_string.removeprefix("ddim"))
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == wanted:
                return list(range(0, steps, stride))
        raise ValueError(f"no integer stride leaves {wanted} of {steps} steps")
    counts = [int(n) for n in respacing_string.split(",")] if respacing_string else [steps]
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (1 if i < steps % len(counts) else 0)
        if size < count:
            raise ValueError(f"a section of {size} steps has no {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # summed, not multiplied: where it nears a half, the rounding of the sum decides
        start += size
    return kept


class Diffusion:
    """The sampling chains, on the CPU, with the global generator. Tables are float64 and used as float32."""

    def __init__(
        self,
        steps: int = 1000,
        noise_schedule: str = "linear",
        respacing_string: str = "",
        *,
        learn_sigma: bool = False,
        sigma_small: bool = False,
        predict_xstart: bool = False,
        rescale_timesteps: bool = False,
    ) -> None:
        self.learn_sigma, self.predict_xstart = learn_sigma, predict_xstart
        self.timesteps = space_timesteps(steps, respacing_string)
        # What the network is told: a step of the original chain, as if that had 1000 of them when rescaling.
        kept = torch.tensor(self.timesteps)
        self.model_timesteps = kept.float() * (1000.0 / steps) if rescale_timesteps else kept

        a = np.cumprod(1 - betas(noise_schedule, steps))[self.timesteps]
        # The kept steps form a chain with betas of its own, from which every table follows.
        self.betas = b = 1 - a / np.append(1.0, a[:-1])
        self.a = a = np.cumprod(1 - b)
        self.a_prev = p = np.append(1.0, a[:-1])
        self.x0_of_x, self.x0_of_eps = np.sqrt(1 / a), np.sqrt(1 / a - 1)
        self.mean_of_x0 = b * np.sqrt(p) / (1 - a)
        self.mean_of_x = (1 - p) * np.sqrt(1 - b) / (1 - a)
        variance = b * (1 - p) / (1 - a)
        clipped = np.append(variance[1], variance[1:])  # the first is zero, whose logarithm is not wanted
        self.log_small = np.log(clipped)
        self.log_beta = np.log(b)
        self.log_fixed = self.log_small if sigma_small else np.append(self.log_small[0], self.log_beta[1:])
        # What a gradient is multiplied by; the small one's zero is a zero here.
        self.fixed = variance if sigma_small else np.append(variance[1], b[1:])

    def _at(self, table: np.ndarray, i: int) -> Tensor:
        return torch.tensor(table[i]).float()

    def _network(
        self, model: Any, x: Tensor, i: int, model_kwargs: dict, clip_denoised: bool, denoised_fn: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[N, 3, H, W] -> x_0, the logarithm of the variance, and the variance, per element or one for all."""
        out = model(x, self._t(x, i), **model_kwargs)
        if self.learn_sigma:
            out, v = out.chunk(2, dim=1)
            fraction = (v + 1) / 2
            log_variance = fraction * self._at(self.log_beta, i) + (1 - fraction) * self._at(self.log_small, i)
            variance = torch.exp(log_variance)
        else:
            log_variance, variance = self._at(self.log_fixed, i), self._at(self.fixed, i)
        if not self.predict_xstart:
            out = self._at(self.x0_of_x, i) * x - self._at(self.x0_of_eps, i) * out
        out = out if denoised_fn is None else denoised_fn(out)
        return (out.clamp(-1, 1) if clip_denoised else out), log_variance, variance

    def _t(self, x: Tensor, i: int) -> Tensor:
        return self.model_timesteps[i].repeat(len(x))

    def p_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """Ancestral sampling: [N, 3, H, W], not clamped at the end; arguments as in `p_sample_steps`."""
        return list(self.p_sample_steps(*args, **kwargs))[-1][0]

    @torch.no_grad()
    def p_sample_steps(
        self,
        model: Any,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, x_0) after each step. denoised_fn changes x_0 before the clip; cond_fn(x, t, **model_kwargs) is the
        gradient of a classifier's log probability, by which the mean is shifted (Dhariwal and Nichol, algorithm 1)."""
        x = torch.randn(*shape) if noise is None else noise
        for i in reversed(range(len(self.timesteps))):
            x0, log_variance, variance = self._network(model, x, i, model_kwargs or {}, clip_denoised, denoised_fn)
            z = torch.randn_like(x)  # drawn at the last step too, where it is not used
            mean = self._at(self.mean_of_x0, i) * x0 + self._at(self.mean_of_x, i) * x
            if cond_fn is not None:
                mean = mean + variance * cond_fn(x, self._t(x, i), **(model_kwargs or {}))
            x = mean + torch.exp(0.5 * log_variance) * z if i > 0 else mean
            yield x, x0

    def ddim_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """DDIM, with the noise that belongs to the clipped x_0: [N, 3, H, W], not clamped at the end."""
        return list(self.ddim_sample_steps(*args, **kwargs))[-1][0]

    @torch.no_grad()
    def ddim_sample_steps(
        self,
        model: Any,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        clip_denoised: bool = True,
        eta: float = 0.0,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, x_0) after each step. The gradient changes the noise (algorithm 2), and with it x_0, after the clip."""
        x = torch.randn(*shape) if noise is None else noise
        for i in reversed(range(len(self.timesteps))):
            x0, _, _ = self._network(model, x, i, model_kwargs or {}, clip_denoised, denoised_fn)
            eps = (self._at(self.x0_of_x, i) * x - x0) / self._at(self.x0_of_eps, i)
            if cond_fn is not None:
                gradient = cond_fn(x, self._t(x, i), **(model_kwargs or {}))
                eps = eps - torch.sqrt(1 - self._at(self.a, i)) * gradient
                x0 = self._at(self.x0_of_x, i) * x - self._at(self.x0_of_eps, i) * eps
            # The ratio a / p is taken in float32, as the originals do: it decides the noise of the smallest steps.
            a, p = self._at(self.a, i), self._at(self.a_prev, i)
            sigma = eta * torch.sqrt((1 - p) / (1 - a)) * torch.sqrt(1 - a / p)
            z = torch.randn_like(x)  # drawn always, used only before the last step
            x = x0 * torch.sqrt(p) + torch.sqrt(1 - p - sigma**2) * eps
            if i > 0:
                x = x + sigma * z
            yield x, x0


@dataclass(frozen=True)
class Published:
    """A published file: arguments of `UNetModel`, arguments of `Diffusion`, number of parameters."""

    model: dict[str, Any]
    diffusion: dict[str, Any]
    parameters: int


def _model(size: int, channels: int, blocks: int, mult: tuple, attention_ds: tuple, **flags: Any) -> dict[str, Any]:
    sizes = {"image_size": size, "num_channels": channels, "num_res_blocks": blocks, "channel_mult": mult}
    return sizes | {"attention_ds": attention_ds, "learn_sigma": True} | flags


def _guided(*sizes: Any, **flags: Any) -> dict[str, Any]:
    heads = {} if "num_heads" in flags else {"num_head_channels": 64}
    return _model(*sizes, resblock_updown=True, **heads, **flags)


def _chain(noise_schedule: str, steps: int = 1000, rescale_timesteps: bool = False) -> dict[str, Any]:
    chain = {"noise_schedule": noise_schedule, "steps": steps, "rescale_timesteps": rescale_timesteps}
    return chain | {"learn_sigma": True}


_M256, _M64 = (1, 1, 2, 2, 4, 4), (1, 2, 3, 4)
_UNCOND_256 = Published(_guided(256, 256, 2, _M256, (8, 16, 32)), _chain("linear"), 552_814_086)
_CIFAR = Published(_model(32, 128, 3, (1, 2, 2, 2), (2, 4)), _chain("cosine", 4000, True), 52_546_438)
_IMAGENET_64 = Published(_model(64, 128, 3, _M64, (4, 8)), _chain("cosine", 4000, True), 121_063_942)
_LSUN = Published(
    _model(256, 128, 2, _M256, (16,), num_heads=1, use_scale_shift_norm=False), _chain("linear"), 113_676_678
)

PUBLISHED: dict[str, Published] = {
    # guided-diffusion
    "64x64_diffusion": Published(
        _guided(64, 192, 3, _M64, (2, 4, 8), use_new_attention_order=True, num_classes=1000),
        _chain("cosine"),
        295_904_454,
    ),
    "128x128_diffusion": Published(
        _guided(128, 256, 2, (1, 1, 2, 3, 4), (4, 8, 16), num_heads=4, num_classes=1000), _chain("linear"), 421_529_606
    ),
    "256x256_diffusion": Published(
        _guided(256, 256, 2, _M256, (8, 16, 32), num_classes=1000), _chain("linear"), 553_838_086
    ),
    "256x256_diffusion_uncond": _UNCOND_256,
    "512x512_diffusion": Published(
        _guided(512, 256, 2, (0.5, *_M256), (16, 32, 64), num_classes=1000), _chain("linear"), 558_997_638
    ),
    "lsun_bedroom": _UNCOND_256,
    "lsun_cat": _UNCOND_256,
    "lsun_horse": _UNCOND_256,
    "lsun_horse_nodropout": _UNCOND_256,
    "64_256_upsampler": Published(
        _guided(256, 192, 2, _M256, (8, 16, 32), num_heads=4, num_classes=1000, in_channels=6),
        _chain("linear"),
        311_795_910,
    ),
    "128_512_upsampler": Published(
        _guided(512, 192, 2, _M256, (16, 32), num_classes=1000, in_channels=6), _chain("linear"), 308_835_270
    ),
    # improved-diffusion
    "cifar10_uncond_50M_500K": _CIFAR,
    "cifar10_uncond_vlb_50M_500K": _CIFAR,
    "imagenet64_uncond_100M_1500K": _IMAGENET_64,
    "imagenet64_uncond_vlb_100M_1500K": _IMAGENET_64,
    "imagenet64_cond_270M_250K": Published(
        _model(64, 192, 3, _M64, (4, 8), num_classes=1000), _chain("cosine", 4000), 273_049_350
    ),
    "lsun_uncond_100M_1200K_bs128": _LSUN,
    "lsun_uncond_100M_2400K_bs64": _LSUN,
    "upsample_cond_500K": Published(
        _model(256, 192, 2, _M256, (16, 32), num_classes=1000, in_channels=6), _chain("linear", 4000), 279_792_390
    ),
    # DPS
    "ffhq_10m": Published(_guided(256, 128, 1, _M256, (16,)), _chain("linear"), 93_563_910),
}
