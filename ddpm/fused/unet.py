"""The reference U-Net rebuilt for sampling: NHWC, a launch per convolution, the time path taken off the step.

What changes against `ddpm/unet.py`, none of which changes the mathematics:
- activations are channels_last and weights repacked once;
- a convolution is one operation with the norm and SiLU before it and all that is added behind (see `Convolution`): a
  resnet is two of them, its 1x1 shortcut in the second one's sum, an attention's projections are two more;
- skip connections are read where they lie, not concatenated;
- the time path is a table, or one matrix product a step for a class-conditional network (see `TimePath`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpm.fused.attention import attend, describe_attention
from ddpm.fused.convolution import Convolution
from ddpm.fused.explain import Planned
from ddpm.fused.features import Features
from ddpm.fused.layers import TimePath
from ddpm.unet import Attention, Block, Downsample, ResnetBlock, UNet, Upsample, resample


class FusedResnet(nn.Module):
    def __init__(self, block: ResnetBlock, activation: str, time_path: TimePath, dtype: torch.dtype):
        super().__init__()
        self.resample = block.resample
        self.conv1 = Convolution.of(
            block.conv1, dtype, bias=block.scale_shift, norm=block.norm1, activation=activation, resample=block.resample
        )
        self.conv2 = Convolution.of(
            block.conv2,
            dtype,
            norm=block.norm2,
            activation=activation,
            shortcut=block.conv_shortcut,
            scale=block.scale,
        )
        projection = block.time_emb_proj
        if block.scale_shift:
            rows = time_path.reserve(projection.weight, projection.bias)
            middle = (rows.start + rows.stop) // 2
            self.scale_columns: slice | None = slice(rows.start, middle)
            self.time_columns = slice(middle, rows.stop)
        else:
            self.scale_columns = None
            # conv1's bias is in the time path's, added where it would be
            self.time_columns = time_path.reserve(projection.weight, projection.bias + block.conv1.bias)

    def forward(self, x: Features, time: Tensor) -> Features:
        """x: [N, C, H, W]; time: the time path's result, float32 [1 or N, width]."""
        row = time[:, self.time_columns]
        scale = None if self.scale_columns is None else time[:, self.scale_columns]
        h = self.conv1(x, row=row if scale is None else None)
        if self.resample == "down":
            x = Features.of(resample(x.tensor(), "down"))
        return self.conv2(h, scale=scale, shift=None if scale is None else row, residual=x)


class FusedAttention(nn.Module):
    def __init__(self, attention: Attention, dtype: torch.dtype):
        super().__init__()
        self.heads, self.dim_head = attention.heads, attention.dim_head
        projections, out = (attention.to_q, attention.to_k, attention.to_v), attention.to_out[0]
        self.qkv = Convolution(
            torch.cat([p.weight for p in projections])[:, :, None, None],  # [3 * inner, C, 1, 1]
            torch.cat([p.bias for p in projections]),
            dtype,
            padding=(0, 0),
            norm=attention.group_norm,
            statistics=False,
        )
        self.out = Convolution(out.weight[:, :, None, None], out.bias, dtype, padding=(0, 0), scale=attention.scale)

    def forward(self, x: Features) -> Features:
        qkv = self.qkv(x).parts[0]  # [N, 3 * inner, H, W], channels_last
        n, _, height, width = qkv.shape
        qkv = qkv.permute(0, 2, 3, 1).reshape(n, height * width, 3, self.heads, self.dim_head)  # a view
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, HW, dim_head]
        h = attend(q, k, v).transpose(1, 2).reshape(n, height, width, -1).permute(0, 3, 1, 2)
        return self.out(Features.of(h), residual=x)

    def describe(self, x: Features) -> str:
        """Which attention it takes, for `Sampler.explain()`."""
        return describe_attention(self.heads, self.dim_head, self.qkv.dtype, x.parts[0].device)


class FusedDownsample(Convolution):
    """A convolution of stride 2, padded all round or, with padding 0, only below and to the right."""

    def __init__(self, block: Downsample, dtype: torch.dtype):
        padding = (block.padding, block.padding) if block.padding else (0, 1)
        super().__init__(block.conv.weight, block.conv.bias, dtype, stride=2, padding=padding)


class FusedBlock(nn.Module):
    """A level of one path, resnets and attentions interleaved, with the change of resolution at its end."""

    def __init__(self, resnets: list[FusedResnet], attentions: list[FusedAttention], sampler: nn.Module | None):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.sampler = sampler

    def layer(self, index: int, h: Features, time: Tensor) -> Features:
        h = self.resnets[index](h, time)
        return self.attentions[index](h) if len(self.attentions) else h

    def change_resolution(self, h: Features, time: Tensor) -> Features:
        return self.sampler(h, time) if isinstance(self.sampler, FusedResnet) else self.sampler(h)


class FusedUNet(Planned):
    """The network as the sampling step runs it.

    Args:
        reference: in float32 on the CPU; not changed.
        dtype: of the convolutions, matrix products and activations between them. The input, the output, the last
            convolution, norm statistics and the time table are float32 whatever it is.
    """

    reference = UNet

    def __init__(self, reference: UNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = reference.config, dtype
        self.time = TimePath(reference)
        self.conv_in = Convolution.of(reference.conv_in, dtype)
        self.down_blocks = nn.ModuleList([self._block(block) for block in reference.down_blocks])
        self.mid_resnets = nn.ModuleList()
        self.mid_attentions = nn.ModuleList()
        if reference.mid_block is not None:
            self.mid_resnets.extend(self._resnet(block) for block in reference.mid_block.resnets)
            self.mid_attentions.extend(FusedAttention(a, dtype) for a in reference.mid_block.attentions)
        self.up_blocks = nn.ModuleList([self._block(block) for block in reference.up_blocks])
        self.conv_out = Convolution.of(
            reference.conv_out, torch.float32, norm=reference.conv_norm_out, activation="silu", statistics=False
        )
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
            sampler = Convolution.of(block.sampler.conv, self.dtype, resample="up")
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
        if self.config.center_input_sample:
            x = 2 * x - 1.0
            condition = None if condition is None else 2 * condition - 1.0
        inputs = (x,) if condition is None else (x, condition)
        h = self.conv_in(Features(inputs, (None,) * len(inputs)))
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
                h = block.layer(j, h.with_skip(skips.pop()), time)
            if block.sampler is not None:
                h = block.change_resolution(h, time)
        out = self.conv_out(h).tensor()
        if self.time.divides_by_time:
            out = out / row[:, -1:, None, None]
        return out
