"""The lucidrains U-Net rebuilt for sampling: NHWC, norm + SiLU (+ residual) in one kernel, the time path a table.

What changes against `ddpm/lucidrains.py`, none of which changes the mathematics:
- activations are channels_last and weights repacked once;
- a block's bias, norm, scale, shift and SiLU are one operation, with RMSNorm the residual sum too;
- pixel-unshuffle and the 1x1 convolution behind it are one 2x2 convolution of stride 2;
- the time path is a table, a row per step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.fused.layers import (
    FusedUpsample,
    GroupNormSiLU,
    LayerPath,
    RMSNormSiLU,
    TimePath,
    conv_nhwc,
    explain_layer,
    frozen,
)
from ddpm.lucidrains import Block, ChannelLayerNorm, FullAttention, LinearAttention, LucidrainsUNet, ResnetBlock


class FusedBlock(nn.Module):
    """Convolution, then its bias, norm, scale and shift, SiLU and perhaps a residual as one operation."""

    def __init__(self, block: Block, dtype: torch.dtype):
        super().__init__()
        self.proj = conv_nhwc(block.proj, dtype, bias=False)
        self.proj_bias = frozen(block.proj.bias[None])  # [1, C]
        self.norm = (
            GroupNormSiLU(block.norm, "silu") if isinstance(block.norm, nn.GroupNorm) else RMSNormSiLU(block.norm)
        )

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return self.norm(self.proj(x), add=self.proj_bias, scale=scale, shift=shift, residual=residual)


class FusedResnet(nn.Module):
    def __init__(self, block: ResnetBlock, time_path: TimePath, dtype: torch.dtype):
        super().__init__()
        self.block1, self.block2 = FusedBlock(block.block1, dtype), FusedBlock(block.block2, dtype)
        self.res_conv = conv_nhwc(block.res_conv, dtype) if isinstance(block.res_conv, nn.Conv2d) else None
        rows = time_path.reserve(block.mlp[1].weight, block.mlp[1].bias)
        middle = (rows.start + rows.stop) // 2
        self.scale_columns, self.shift_columns = slice(rows.start, middle), slice(middle, rows.stop)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [N, C, H, W] channels_last; time: the time path's result, float32 [1, width]."""
        h = self.block1(x, time[:, self.scale_columns], time[:, self.shift_columns])
        return self.block2(h, residual=x if self.res_conv is None else self.res_conv(x))


class FusedAttention(nn.Module):
    """Either attention, with its residual sum."""

    def __init__(self, attention: LinearAttention | FullAttention, dtype: torch.dtype):
        super().__init__()
        self.heads, self.dim_head = attention.heads, attention.dim_head
        self.linear = isinstance(attention, LinearAttention)
        self.value_scale_by_pixels = self.linear and attention.value_scale_by_pixels
        self.norm = _attention_norm(attention.norm)
        self.qkv_weight = frozen(attention.to_qkv.weight.flatten(1), dtype)  # [3 heads dim_head, C]
        out = attention.to_out[0] if self.linear else attention.to_out
        self.out_weight, self.out_bias = frozen(out.weight.flatten(1), dtype), frozen(out.bias, dtype)
        self.norm_out = _attention_norm(attention.to_out[1]) if self.linear else None
        memory = attention.mem_kv
        if memory is not None:  # [2, heads, dim_head, M] (linear) or [2, heads, M, dim_head], to [.., M, dim_head]
            memory = frozen(memory.transpose(-1, -2) if self.linear else memory, dtype)
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(n, height * width, c)  # a view: x is NHWC
        qkv = F.linear(h, self.qkv_weight).view(n, height * width, 3, self.heads, self.dim_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, HW, dim_head]
        if self.memory is not None:
            memory_k, memory_v = self.memory.expand(n, *self.memory.shape).unbind(1)  # [N, heads, M, dim_head]
            k, v = torch.cat([memory_k, k], dim=2), torch.cat([memory_v, v], dim=2)
        if self.linear:
            h = self._linear(q, k, v, height * width)
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        h = F.linear(h.transpose(1, 2).reshape(n, height * width, -1), self.out_weight, self.out_bias)
        h = h.view(n, height, width, c).permute(0, 3, 1, 2)
        return h + x if self.norm_out is None else self.norm_out(h, residual=x)

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


def _attention_norm(norm: nn.Module) -> nn.Module:
    return ChannelLayerNormNHWC(norm) if isinstance(norm, ChannelLayerNorm) else RMSNormSiLU(norm, silu=False)


def unshuffled(conv: nn.Conv2d, dtype: torch.dtype) -> nn.Conv2d:
    """PixelUnshuffle(2) and a 1x1 convolution behind it as one 2x2 convolution of stride 2."""
    channels = conv.in_channels // 4
    merged = nn.utils.skip_init(nn.Conv2d, channels, conv.out_channels, 2, stride=2)
    merged.weight, merged.bias = frozen(conv.weight.view(-1, channels, 2, 2)), frozen(conv.bias)
    return conv_nhwc(merged, dtype)


class FusedLucidrains(nn.Module):
    """The network as the sampling step runs it.

    Args:
        reference: in float32 on the CPU; not changed.
        dtype: of the convolutions, matrix products and activations between them. The input, the output, the last
            convolution, norm statistics, linear attention's sums and the time table are float32 whatever it is.
    """

    def __init__(self, reference: LucidrainsUNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        self.self_condition, self.condition_channels = reference.self_condition, reference.condition_channels
        self.time = TimePath(reference)
        self.init_conv = conv_nhwc(reference.init_conv, dtype)
        self.downs = nn.ModuleList(self._level(level, "down") for level in reference.downs)
        self.mid_block1 = self._resnet(reference.mid_block1)
        self.mid_attn = FusedAttention(reference.mid_attn, dtype)
        self.mid_block2 = self._resnet(reference.mid_block2)
        self.ups = nn.ModuleList(self._level(level, "up") for level in reference.ups)
        self.final_res_block = self._resnet(reference.final_res_block)
        self.final_conv = conv_nhwc(reference.final_conv, torch.float32)
        self.time.finish()
        self.eval()

    def _resnet(self, block: ResnetBlock) -> FusedResnet:
        return FusedResnet(block, self.time, self.dtype)

    def _level(self, level: nn.ModuleList, direction: str) -> nn.ModuleList:
        resnet1, resnet2, attend, end = level
        if isinstance(end, nn.Conv2d):
            end = conv_nhwc(end, self.dtype)
        else:
            end = (unshuffled if direction == "down" else FusedUpsample)(end[1], self.dtype)
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
        if condition is not None:
            x = torch.cat([condition, x], dim=1)
        h = first = self.init_conv(x.to(self.dtype).contiguous(memory_format=torch.channels_last))
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
            h = resnet1(torch.cat([h, skips.pop()], dim=1), time)
            h = resnet2(torch.cat([h, skips.pop()], dim=1), time)
            h = end(attend(h))
        return self.final_conv(self.final_res_block(torch.cat([h, first], dim=1), time).float())

    def explain(self, device: torch.device) -> list[LayerPath]:
        """Which path every layer takes on `device`, in the order of the modules."""
        dtype = str(self.dtype).removeprefix("torch.")
        paths = [self.time.explain()]
        for name, module in self.named_modules():
            if isinstance(module, FusedAttention):
                kind = "linear attention, float32 sums" if module.linear else "scaled_dot_product_attention"
                paths.append(LayerPath(name, f"{kind}, {module.heads} heads of {module.dim_head}, {dtype}"))
            elif isinstance(module, ChannelLayerNormNHWC):
                paths.append(LayerPath(name, "layer_norm over channels (plain PyTorch), float32"))
            elif path := explain_layer(name, module, device):
                paths.append(path)
        return paths
