"""The reference U-Net rebuilt for sampling: NHWC, GroupNorm + SiLU in one kernel, the time path taken off the step.

What changes against `unet.py`, none of which changes the mathematics:
- activations are channels_last and weights repacked once;
- GroupNorm, time embedding (added, or scale and shift) and SiLU are one operation;
- the time MLP and all per-resnet projections depend on t alone, so they are one table, a row per step; conv1's bias,
  which is added at the same place, is in that row too;
- q, k and v are one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.kernels import backend
from ddpm.kernels.group_norm_silu import group_norm_silu
from ddpm.unet import ACTIVATIONS, Attention, Block, Downsample, ResnetBlock, UNet, Upsample, resample


@dataclass(frozen=True)
class LayerPath:
    """Which code a layer takes, for `Sampler.explain()`."""

    layer: str
    path: str


class TimeRow:
    """The layout of the time table's rows, filled in while the network is built: one slice per resnet.

    A row holds, for each resnet in execution order, time_emb_proj(act(emb(t))); conv1's bias is added where the
    embedding is. A network that divides its output by t (Fourier embedding) has t itself in the last column.
    """

    def __init__(self, reference: UNet):
        self.reference = reference
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.width = 0

    def reserve(self, weight: Tensor, bias: Tensor) -> slice:
        """A slice of the row for a projection: weight [rows, embedding_dim], bias [rows]."""
        self.weights.append(weight)
        self.biases.append(bias)
        self.width += len(bias)
        return slice(self.width - len(bias), self.width)

    @property
    def columns(self) -> int:
        """Floats in a row."""
        return self.width + (self.reference.config.time_embedding == "fourier")

    def table(self, timesteps: Tensor) -> Tensor:
        """float32 [S, columns] for timesteps [S], computed once per schedule on the CPU in float32."""
        activation = ACTIVATIONS[self.reference.config.activation]
        embedding = activation(self.reference.embed(timesteps))  # [S, embedding_dim]
        rows = F.linear(embedding, torch.cat(self.weights), torch.cat(self.biases))
        if self.reference.config.time_embedding == "fourier":
            rows = torch.cat([rows, timesteps[:, None].float()], dim=1)
        return rows


def _parameter(tensor: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A frozen copy: the reference network stays as it was loaded."""
    return nn.Parameter(tensor.detach().to(dtype or tensor.dtype, copy=True), requires_grad=False)


def _conv(conv: nn.Conv2d, dtype: torch.dtype, *, bias: bool = True) -> nn.Conv2d:
    """A copy with NHWC weights."""
    copy = nn.utils.skip_init(
        nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        bias=bias,
    )
    copy.weight = nn.Parameter(
        _parameter(conv.weight, dtype).contiguous(memory_format=torch.channels_last), requires_grad=False
    )
    if bias:
        copy.bias = _parameter(conv.bias, dtype)
    return copy


class GroupNormSiLU(nn.Module):
    """Weights of one `group_norm_silu`; they stay float32, as the statistics do."""

    def __init__(self, norm: nn.GroupNorm, activation: str | None):
        super().__init__()
        self.groups, self.eps, self.activation = norm.num_groups, norm.eps, activation
        self.weight, self.bias = _parameter(norm.weight), _parameter(norm.bias)

    def forward(self, x: Tensor, add: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None):
        silu = self.activation in ("silu", "swish")
        y = group_norm_silu(
            x, self.groups, self.weight, self.bias, self.eps, add=add, scale=scale, shift=shift, silu=silu
        )
        return y if silu or self.activation is None else ACTIVATIONS[self.activation](y)


class FusedResnet(nn.Module):
    def __init__(self, block: ResnetBlock, activation: str, time_row: TimeRow, dtype: torch.dtype):
        super().__init__()
        self.resample, self.scale = block.resample, block.scale
        self.norm1 = GroupNormSiLU(block.norm1, activation)
        self.conv1 = _conv(block.conv1, dtype, bias=False)  # its bias is added in norm2
        self.norm2 = GroupNormSiLU(block.norm2, activation)
        self.conv2 = _conv(block.conv2, dtype)
        self.conv_shortcut = None if block.conv_shortcut is None else _conv(block.conv_shortcut, dtype)
        projection = block.time_emb_proj
        if block.scale_shift:
            self.conv1_bias = _parameter(block.conv1.bias[None])  # [1, C]
            rows = time_row.reserve(projection.weight, projection.bias)
            middle = (rows.start + rows.stop) // 2
            self.scale_columns: slice | None = slice(rows.start, middle)
            self.time_columns = slice(middle, rows.stop)
        else:
            self.conv1_bias = None
            self.scale_columns = None
            self.time_columns = time_row.reserve(projection.weight, projection.bias + block.conv1.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [N, C, H, W] channels_last; time: the step's row, float32 [1, columns]."""
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
        self.qkv_weight = _parameter(torch.cat([p.weight for p in projections]), dtype)  # [3 * inner, C]
        self.qkv_bias = _parameter(torch.cat([p.bias for p in projections]), dtype)
        self.out_weight = _parameter(attention.to_out[0].weight, dtype)
        self.out_bias = _parameter(attention.to_out[0].bias, dtype)

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
        self.conv = _conv(block.conv, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad else x)


class FusedUpsample(nn.Module):
    def __init__(self, block: Upsample, dtype: torch.dtype):
        super().__init__()
        self.conv = _conv(block.conv, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(resample(x, "up"))


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

    Raises:
        ValueError: the network needs class labels.
    """

    def __init__(self, reference: UNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        config = reference.config
        if config.class_embedding is not None:
            raise ValueError(
                "this network is conditioned on class labels, and sampling with labels is not supported yet"
            )
        self.config, self.dtype = config, dtype
        self.time_row = TimeRow(reference)
        self.conv_in = _conv(reference.conv_in, dtype)
        self.down_blocks = nn.ModuleList([self._block(block) for block in reference.down_blocks])
        self.mid_resnets = nn.ModuleList()
        self.mid_attentions = nn.ModuleList()
        if reference.mid_block is not None:
            self.mid_resnets.extend(self._resnet(block) for block in reference.mid_block.resnets)
            self.mid_attentions.extend(FusedAttention(a, dtype) for a in reference.mid_block.attentions)
        self.up_blocks = nn.ModuleList([self._block(block) for block in reference.up_blocks])
        self.norm_out = GroupNormSiLU(reference.conv_norm_out, "silu")
        self.conv_out = _conv(reference.conv_out, torch.float32)
        self.eval()

    def _resnet(self, block: ResnetBlock) -> FusedResnet:
        return FusedResnet(block, self.config.activation, self.time_row, self.dtype)

    def _block(self, block: Block) -> FusedBlock:
        sampler: nn.Module | None
        resnets = [self._resnet(r) for r in block.resnets]
        attentions = [FusedAttention(a, self.dtype) for a in block.attentions]
        if isinstance(block.sampler, ResnetBlock):
            sampler = self._resnet(block.sampler)
        elif isinstance(block.sampler, Downsample):
            sampler = FusedDownsample(block.sampler, self.dtype)
        elif isinstance(block.sampler, Upsample):
            sampler = FusedUpsample(block.sampler, self.dtype)
        else:
            sampler = None
        return FusedBlock(resnets, attentions, sampler)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The network's output at one step.

        Args:
            x: x_t, float32 [N, in, H, W], NCHW contiguous.
            time: the step's row of `time_row.table`, float32 [1, time_row.columns].

        Returns:
            float32 [N, out, H, W], channels_last.
        """
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
        if self.config.time_embedding == "fourier":
            h = h / time[:, -1:, None, None]
        return h

    def explain(self, device: torch.device) -> list[LayerPath]:
        """Which path every layer takes on `device`, in the order of the modules."""
        norm = "Triton kernel group_norm_silu" if backend.uses_triton(device) else "group_norm_silu_ref (plain PyTorch)"
        library = "oneDNN" if device.type == "cpu" else "cuDNN"
        dtype = str(self.dtype).removeprefix("torch.")
        paths = [LayerPath("time path", f"table of {self.time_row.columns} float32 a step, no work in the loop")]
        for name, module in self.named_modules():
            if isinstance(module, GroupNormSiLU):
                extra = "" if module.activation in (None, "silu", "swish") else f", then {module.activation} on its own"
                paths.append(LayerPath(name, f"{norm}, float32 statistics{extra}"))
            elif isinstance(module, nn.Conv2d):
                kernel = f"{module.kernel_size[0]}x{module.kernel_size[1]}"
                shape = f"{module.in_channels}->{module.out_channels}, stride {module.stride[0]}"
                kind = "float32" if module is self.conv_out else dtype
                paths.append(LayerPath(name, f"{library} convolution {kernel}, {shape}, NHWC {kind}"))
            elif isinstance(module, FusedAttention):
                paths.append(
                    LayerPath(name, f"scaled_dot_product_attention, {module.heads} heads of {module.dim_head}, {dtype}")
                )
        return paths
