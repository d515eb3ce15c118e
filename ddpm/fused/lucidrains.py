"""The lucidrains U-Net rebuilt for sampling: NHWC, norm + SiLU (+ residual) in one kernel, the time path a table.

What changes against `ddpm/lucidrains.py`, none of which changes the mathematics:
- activations are channels_last and weights repacked once;
- skip connections are read where they lie, not concatenated;
- a block's bias, norm, scale, shift and SiLU are one operation, with RMSNorm the residual sum too;
- pixel-unshuffle and the 1x1 convolution behind it are one 2x2 convolution of stride 2;
- the time path is a table, a row per step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.fused.attention import attend, describe_attention
from ddpm.fused.convolution import Convolution
from ddpm.fused.explain import Planned
from ddpm.fused.features import Features
from ddpm.fused.layers import GroupNormSiLU, RMSNormSiLU, TimePath, frozen
from ddpm.lucidrains import Block, ChannelLayerNorm, FullAttention, LinearAttention, LucidrainsUNet, ResnetBlock


class FusedBlock(nn.Module):
    """Convolution, then its bias, norm, scale and shift, SiLU and perhaps a residual as one operation."""

    def __init__(self, block: Block, dtype: torch.dtype):
        super().__init__()
        self.proj = Convolution.of(block.proj, dtype, bias=False, statistics=False)
        self.proj_bias = frozen(block.proj.bias[None])  # [1, C]
        self.norm = (
            GroupNormSiLU(block.norm, "silu") if isinstance(block.norm, nn.GroupNorm) else RMSNormSiLU(block.norm)
        )

    def forward(
        self, x: Features, scale: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None
    ) -> Features:
        h = self.proj(x).tensor()
        return Features.of(self.norm(h, add=self.proj_bias, scale=scale, shift=shift, residual=residual))


class FusedResnet(nn.Module):
    def __init__(self, block: ResnetBlock, time_path: TimePath, dtype: torch.dtype):
        super().__init__()
        self.block1, self.block2 = FusedBlock(block.block1, dtype), FusedBlock(block.block2, dtype)
        self.res_conv = None
        if isinstance(block.res_conv, nn.Conv2d):
            self.res_conv = Convolution.of(block.res_conv, dtype, statistics=False)
        rows = time_path.reserve(block.mlp[1].weight, block.mlp[1].bias)
        middle = (rows.start + rows.stop) // 2
        self.scale_columns, self.shift_columns = slice(rows.start, middle), slice(middle, rows.stop)

    def forward(self, x: Features, time: Tensor) -> Features:
        """x: [N, C, H, W]; time: the time path's result, float32 [1, width]."""
        h = self.block1(x, time[:, self.scale_columns], time[:, self.shift_columns])
        return self.block2(h, residual=(x if self.res_conv is None else self.res_conv(x)).tensor())


class FusedAttention(nn.Module):
    """Either attention, with its residual sum."""

    def __init__(self, attention: LinearAttention | FullAttention, dtype: torch.dtype):
        super().__init__()
        self.heads, self.dim_head = attention.heads, attention.dim_head
        self.linear = isinstance(attention, LinearAttention)
        self.value_scale_by_pixels = self.linear and attention.value_scale_by_pixels
        self.norm = _attention_norm(attention.norm)
        self.qkv = Convolution.of(attention.to_qkv, dtype, statistics=False)
        out = attention.to_out[0] if self.linear else attention.to_out
        self.out = Convolution.of(out, dtype, statistics=False)
        self.norm_out = _attention_norm(attention.to_out[1]) if self.linear else None
        memory = attention.mem_kv
        if memory is not None:  # [2, heads, dim_head, M] (linear) or [2, heads, M, dim_head], to [.., M, dim_head]
            memory = frozen(memory.transpose(-1, -2) if self.linear else memory, dtype)
        self.memory = memory

    def forward(self, x: Features) -> Features:
        residual = x.tensor()
        qkv = self.qkv(Features.of(self.norm(residual))).tensor()  # [N, 3 heads dim_head, H, W], channels_last
        n, _, height, width = qkv.shape
        qkv = qkv.permute(0, 2, 3, 1).reshape(n, height * width, 3, self.heads, self.dim_head)  # a view
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, HW, dim_head]
        if self.memory is not None:
            memory_k, memory_v = self.memory.expand(n, *self.memory.shape).unbind(1)  # [N, heads, M, dim_head]
            k, v = torch.cat([memory_k, k], dim=2), torch.cat([memory_v, v], dim=2)
        h = self._linear(q, k, v, height * width) if self.linear else attend(q, k, v)
        h = Features.of(h.transpose(1, 2).reshape(n, height, width, -1).permute(0, 3, 1, 2))
        if self.norm_out is None:
            return self.out(h, residual=x)
        return Features.of(self.norm_out(self.out(h).tensor(), residual=residual))

    def describe(self, x: Features) -> str:
        """Which attention it takes, for `Sampler.explain()`."""
        if self.linear:
            dtype = str(self.qkv.dtype).removeprefix("torch.")
            return f"linear attention, float32 sums, {self.heads} heads of {self.dim_head}, {dtype}"
        return describe_attention(self.heads, self.dim_head, self.qkv.dtype, x.parts[0].device)

    def _linear(self, q: Tensor, k: Tensor, v: Tensor, pixels: int) -> Tensor:
        """softmax(q) (softmax(k)^T v) in float32: sums over all positions, which half precision would lose."""
        q = q.float().softmax(dim=-1) * self.dim_head**-0.5
        v = v.float() / pixels if self.value_scale_by_pixels else v.float()
        context = k.float().softmax(dim=2).transpose(-1, -2) @ v  # [N, heads, dim_head of k, dim_head of v]
        return (q @ context).to(k.dtype)


class ChannelLayerNormNHWC(nn.Module):
    """LayerNorm over the channels of each position, of versions before 1.7; float32 inside."""

    def __init__(self, norm: ChannelLayerNorm):
        super().__init__()
        self.weight = frozen(norm.g.flatten())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        h = F.layer_norm(x.permute(0, 2, 3, 1).float(), self.weight.shape, self.weight, eps=1e-5)
        h = h.to(x.dtype).permute(0, 3, 1, 2)
        return h if residual is None else h + residual

    def describe(self, x: Tensor) -> str:
        """Which code it takes, for `Sampler.explain()`."""
        return "layer_norm over channels (plain PyTorch), float32"


def _attention_norm(norm: nn.Module) -> nn.Module:
    return ChannelLayerNormNHWC(norm) if isinstance(norm, ChannelLayerNorm) else RMSNormSiLU(norm, silu=False)


def unshuffled(conv: nn.Conv2d, dtype: torch.dtype) -> Convolution:
    """PixelUnshuffle(2) and a 1x1 convolution behind it as one 2x2 convolution of stride 2."""
    weight = conv.weight.view(len(conv.weight), -1, 2, 2)
    return Convolution(weight, conv.bias, dtype, stride=2, padding=(0, 0), statistics=False)


class FusedLucidrains(Planned):
    """The network as the sampling step runs it.

    Args:
        reference: in float32 on the CPU; not changed.
        dtype: of the convolutions, matrix products and activations between them. The input, the output, the last
            convolution, norm statistics, linear attention's sums and the time table are float32 whatever it is.
    """

    reference = LucidrainsUNet

    def __init__(self, reference: LucidrainsUNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = reference.config, dtype
        self.self_condition, self.condition_channels = reference.self_condition, reference.condition_channels
        self.time = TimePath(reference)
        self.init_conv = Convolution.of(reference.init_conv, dtype, statistics=False)
        self.downs = nn.ModuleList(self._level(level, "down") for level in reference.downs)
        self.mid_block1 = self._resnet(reference.mid_block1)
        self.mid_attn = FusedAttention(reference.mid_attn, dtype)
        self.mid_block2 = self._resnet(reference.mid_block2)
        self.ups = nn.ModuleList(self._level(level, "up") for level in reference.ups)
        self.final_res_block = self._resnet(reference.final_res_block)
        self.final_conv = Convolution.of(reference.final_conv, torch.float32, statistics=False)
        self.time.finish()
        self.eval()

    def _resnet(self, block: ResnetBlock) -> FusedResnet:
        return FusedResnet(block, self.time, self.dtype)

    def _level(self, level: nn.ModuleList, direction: str) -> nn.ModuleList:
        resnet1, resnet2, attend, end = level
        if isinstance(end, nn.Conv2d):
            end = Convolution.of(end, self.dtype, statistics=False)
        elif direction == "down":
            end = unshuffled(end[1], self.dtype)
        else:
            end = Convolution.of(end[1], self.dtype, resample="up", statistics=False)
        return nn.ModuleList([self._resnet(resnet1), self._resnet(resnet2), FusedAttention(attend, self.dtype), end])

    def forward(self, x: Tensor, row: Tensor, classes: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """The network's output at one step.

        Args:
            x: x_t, float32 [N, C, H, W], NCHW contiguous.
            row: the step's row of `time.table`, float32 [1, time.columns].
            classes: None.
            condition: the previous step's x_0, like x, of a network with self-conditioning.

        Returns:
            float32 [N, out, H, W], channels_last.
        """
        time = self.time(row, classes)
        inputs = (x,) if condition is None else (condition, x)
        h = first = self.init_conv(Features(inputs, (None,) * len(inputs)))
        skips = []
        for level in self.downs:
            resnet1, resnet2, attend, end = level.children()
            h = resnet1(h, time)
            skips.append(h)
            h = attend(resnet2(h, time))
            skips.append(h)
            h = end(h)
        h = self.mid_block2(self.mid_attn(self.mid_block1(h, time)), time)
        for level in self.ups:
            resnet1, resnet2, attend, end = level.children()
            h = resnet1(h.with_skip(skips.pop()), time)
            h = resnet2(h.with_skip(skips.pop()), time)
            h = end(attend(h))
        return self.final_conv(self.final_res_block(h.with_skip(first), time)).tensor()
