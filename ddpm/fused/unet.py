"""The reference U-Net rebuilt for sampling: NHWC, GroupNorm + SiLU in one kernel, the time path taken off the step.

What changes against `ddpm/unet.py`, none of which changes the mathematics:
- activations are channels_last and weights repacked once;
- GroupNorm, time embedding (added, or scale and shift) and SiLU are one operation;
- the time path is a table, or one matrix product a step for a class-conditional network (see `TimePath`);
- q, k and v are one matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.fused.layers import FusedUpsample, GroupNormSiLU, LayerPath, TimePath, conv_nhwc, explain_layer, frozen
from ddpm.unet import Attention, Block, Downsample, ResnetBlock, UNet, Upsample, resample


class FusedResnet(nn.Module):
    def __init__(self, block: ResnetBlock, activation: str, time_path: TimePath, dtype: torch.dtype):
        super().__init__()
        self.resample, self.scale = block.resample, block.scale
        self.norm1 = GroupNormSiLU(block.norm1, activation)
        self.conv1 = conv_nhwc(block.conv1, dtype, bias=False)  # its bias is added in norm2
        self.norm2 = GroupNormSiLU(block.norm2, activation)
        self.conv2 = conv_nhwc(block.conv2, dtype)
        self.conv_shortcut = None if block.conv_shortcut is None else conv_nhwc(block.conv_shortcut, dtype)
        projection = block.time_emb_proj
        if block.scale_shift:
            self.conv1_bias = frozen(block.conv1.bias[None])  # [1, C]
            rows = time_path.reserve(projection.weight, projection.bias)
            middle = (rows.start + rows.stop) // 2
            self.scale_columns: slice | None = slice(rows.start, middle)
            self.time_columns = slice(middle, rows.stop)
        else:
            self.conv1_bias = None
            self.scale_columns = None
            self.time_columns = time_path.reserve(projection.weight, projection.bias + block.conv1.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [N, C, H, W] channels_last; time: the time path's result, float32 [1 or N, width]."""
        h = resample(self.norm1(x), self.resample)
        x = resample(x, self.resample)
        h = self.conv1(h)
        row = time[:, self.time_columns]
        if self.scale_columns is None:
            h = self.norm2(h, add=row)
        else:
            h = self.norm2(h, add=self.conv1_bias, scale=time[:, self.scale_columns], shift=row)
        h = self.conv2(h)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = x + h
        return h if self.scale == 1 else h / self.scale


class FusedAttention(nn.Module):
    def __init__(self, attention: Attention, dtype: torch.dtype):
        super().__init__()
        self.heads, self.dim_head, self.scale = attention.heads, attention.dim_head, attention.scale
        self.norm = None if attention.group_norm is None else GroupNormSiLU(attention.group_norm, None)
        projections = (attention.to_q, attention.to_k, attention.to_v)
        self.qkv_weight = frozen(torch.cat([p.weight for p in projections]), dtype)  # [3 * inner, C]
        self.qkv_bias = frozen(torch.cat([p.bias for p in projections]), dtype)
        self.out_weight = frozen(attention.to_out[0].weight, dtype)
        self.out_bias = frozen(attention.to_out[0].bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = x if self.norm is None else self.norm(x)
        h = h.permute(0, 2, 3, 1).reshape(n, height * width, c)  # a view: x is NHWC
        qkv = F.linear(h, self.qkv_weight, self.qkv_bias).view(n, height * width, 3, self.heads, self.dim_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, HW, dim_head]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height * width, -1)
        h = F.linear(h, self.out_weight, self.out_bias).view(n, height, width, c).permute(0, 3, 1, 2)
        h = h + x
        return h if self.scale == 1 else h / self.scale


class FusedDownsample(nn.Module):
    def __init__(self, block: Downsample, dtype: torch.dtype):
        super().__init__()
        self.pad = not block.padding
        self.conv = conv_nhwc(block.conv, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad else x)


class FusedBlock(nn.Module):
    """A level of one path, resnets and attentions interleaved, with the change of resolution at its end."""

    def __init__(self, resnets: list[FusedResnet], attentions: list[FusedAttention], sampler: nn.Module | None):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.sampler = sampler

    def layer(self, index: int, h: Tensor, time: Tensor) -> Tensor:
        h = self.resnets[index](h, time)
        return self.attentions[index](h) if len(self.attentions) else h

    def change_resolution(self, h: Tensor, time: Tensor) -> Tensor:
        return self.sampler(h, time) if isinstance(self.sampler, FusedResnet) else self.sampler(h)


class FusedUNet(nn.Module):
    """The network as the sampling step runs it.

    Args:
        reference: in float32 on the CPU; not changed.
        dtype: of the convolutions, matrix products and activations between them. The input, the output, the last
            convolution, norm statistics and the time table are float32 whatever it is.
    """

    def __init__(self, reference: UNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = reference.config, dtype
        self.time = TimePath(reference)
        self.conv_in = conv_nhwc(reference.conv_in, dtype)
        self.down_blocks = nn.ModuleList([self._block(block) for block in reference.down_blocks])
        self.mid_resnets = nn.ModuleList()
        self.mid_attentions = nn.ModuleList()
        if reference.mid_block is not None:
            self.mid_resnets.extend(self._resnet(block) for block in reference.mid_block.resnets)
            self.mid_attentions.extend(FusedAttention(a, dtype) for a in reference.mid_block.attentions)
        self.up_blocks = nn.ModuleList([self._block(block) for block in reference.up_blocks])
        self.norm_out = GroupNormSiLU(reference.conv_norm_out, "silu")
        self.conv_out = conv_nhwc(reference.conv_out, torch.float32)
        self.time.finish()
        self.eval()

    @property
    def condition_channels(self) -> int:
        """Channels of the conditioning image that is concatenated to x_t; 0 for none."""
        return self.config.condition_channels

    @property
    def self_condition(self) -> bool:
        """Whether that image is the previous step's x_0."""
        return False

    def _resnet(self, block: ResnetBlock) -> FusedResnet:
        return FusedResnet(block, self.config.activation, self.time, self.dtype)

    def _block(self, block: Block) -> FusedBlock:
        sampler: nn.Module | None
        resnets = [self._resnet(r) for r in block.resnets]
        attentions = [FusedAttention(a, self.dtype) for a in block.attentions]
        if isinstance(block.sampler, ResnetBlock):
            sampler = self._resnet(block.sampler)
        elif isinstance(block.sampler, Downsample):
            sampler = FusedDownsample(block.sampler, self.dtype)
        elif isinstance(block.sampler, Upsample):
            sampler = FusedUpsample(block.sampler.conv, self.dtype)
        else:
            sampler = None
        return FusedBlock(resnets, attentions, sampler)

    def forward(self, x: Tensor, row: Tensor, classes: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """The network's output at one step.

        Args:
            x: x_t, float32 [N, C, H, W], NCHW contiguous.
            row: the step's row of `time.table`, float32 [1, time.columns].
            classes: class embeddings, float32 [N, embedding_dim], of a class-conditional network.
            condition: conditioning image, float32 [N, condition_channels, H, W].

        Returns:
            float32 [N, out, H, W], channels_last.
        """
        time = self.time(row, classes)
        if condition is not None:
            x = torch.cat([x, condition], dim=1)
        if self.config.center_input_sample:
            x = 2 * x - 1.0
        h = self.conv_in(x.to(self.dtype).contiguous(memory_format=torch.channels_last))
        skips = [h]
        for block in self.down_blocks:
            for j in range(len(block.resnets)):
                h = block.layer(j, h, time)
                skips.append(h)
            if block.sampler is not None:
                h = block.change_resolution(h, time)
                skips.append(h)
        for j, resnet in enumerate(self.mid_resnets):
            h = resnet(h, time)
            if j == 0:
                for attention in self.mid_attentions:
                    h = attention(h)
        for block in self.up_blocks:
            for j in range(len(block.resnets)):
                h = block.layer(j, torch.cat([h, skips.pop()], dim=1), time)
            if block.sampler is not None:
                h = block.change_resolution(h, time)
        h = self.conv_out(self.norm_out(h).float())
        if self.time.divides_by_time:
            h = h / row[:, -1:, None, None]
        return h

    def explain(self, device: torch.device) -> list[LayerPath]:
        """Which path every layer takes on `device`, in the order of the modules."""
        dtype = str(self.dtype).removeprefix("torch.")
        paths = [self.time.explain()]
        for name, module in self.named_modules():
            if isinstance(module, FusedAttention):
                paths.append(
                    LayerPath(name, f"scaled_dot_product_attention, {module.heads} heads of {module.dim_head}, {dtype}")
                )
            elif path := explain_layer(name, module, device):
                paths.append(path)
        return paths
