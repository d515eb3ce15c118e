"""A convolution and what surrounds it: the norm before, what is added behind; in the form that the plan gives it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.fused import winograd
from ddpm.fused.features import Features
from ddpm.fused.layers import GroupNormSiLU, frozen
from ddpm.kernels import backend, tuning
from ddpm.kernels.conv import conv, output_size
from ddpm.kernels.group_norm_apply import group_norm_apply
from ddpm.unet import resample


class Convolution(nn.Module):
    """y = (conv(resample(act(norm(x)))) + bias + row + residual, or + 1x1 convolution of the residual) / scale.

    On a GPU it is one launch of our kernel, or two where the plan has the norm in a pass of its own; where the plan
    prefers the library's convolution, and on the CPU, it is plain PyTorch around that, or around Winograd's form of it
    (see ddpm/fused/winograd.py).

    Args:
        weight: [C_out, C, k, k], float32.
        bias: [C_out], or None.
        dtype: of the products.
        stride: 1 or 2.
        padding: zeros (before, after) in each direction.
        norm: of the input.
        activation: behind the norm; a key of ddpm.unet.ACTIVATIONS, or None.
        resample: "up", "down" or None: how the input is resampled between activation and convolution.
        shortcut: a 1x1 convolution of the residual.
        scale: what the sum is divided by.
        statistics: the result's are taken for a norm that follows.
        out_dtype: of the result; `dtype` unless given.
    """

    counters: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        stride: int = 1,
        padding: tuple[int, int] = (1, 1),
        norm: nn.GroupNorm | None = None,
        activation: str | None = None,
        resample: str | None = None,
        shortcut: nn.Conv2d | None = None,
        scale: float = 1.0,
        statistics: bool = True,
        out_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dtype, self.out_dtype = dtype, out_dtype or dtype
        self.stride, self.padding, self.resample, self.scale = stride, padding, resample, scale
        self.statistics = statistics
        self.weight = nn.Parameter(
            frozen(weight, dtype).contiguous(memory_format=torch.channels_last), requires_grad=False
        )
        self.norm = None if norm is None else GroupNormSiLU(norm, activation)
        self.shortcut_weight = None if shortcut is None else frozen(shortcut.weight.flatten(1), dtype)  # [C_out, C_x]
        if shortcut is not None and shortcut.bias is not None:
            bias = shortcut.bias if bias is None else bias + shortcut.bias
        self.bias = None if bias is None else frozen(bias, dtype)
        self.register_buffer("counters", torch.zeros(tuning.COUNTERS, dtype=torch.int32), persistent=False)

    @classmethod
    def of(cls, module: nn.Conv2d, dtype: torch.dtype, *, bias: bool = True, **options: Any) -> Convolution:
        """The fused form of a module; options as above."""
        padding = int(module.padding[0])
        options.setdefault("padding", (padding, padding))
        return cls(module.weight, module.bias if bias else None, dtype, stride=module.stride[0], **options)

    @property
    def kernel(self) -> int:
        return self.weight.shape[2]

    def shape(self, x: Features) -> tuning.ConvShape:
        """What the plan is asked about."""
        return tuning.ConvShape(*self._shape(x))

    def _shape(self, x: Features) -> tuple[Any, ...]:
        """The fields of a ConvShape: numbers that torch.compile takes as constants."""
        height, width = x.parts[0].shape[2:]
        if self.resample == "down":
            height, width = height // 2, width // 2
        height, width = output_size(height, width, self.kernel, self.stride, self.padding, self.resample == "up")
        shortcut = 0 if self.shortcut_weight is None else self.shortcut_weight.shape[1]
        return (
            *(len(x.parts[0]), height, width, x.channels, len(self.weight), self.kernel, shortcut),
            *(self.norm is not None, self.dtype, self.resample == "up", self.stride),
        )

    def form(self, x: Features) -> str:
        """The plan's, see `tuning.ConvPlan`; "winograd" or "library" where no kernel of ours runs."""
        device = x.parts[0].device
        if backend.uses_triton(device):
            return _planned_form(device, *self._shape(x))
        return "winograd" if winograd.is_allowed() and self._takes_winograd(x) else "library"

    def _takes_winograd(self, x: Features) -> bool:
        if self.kernel != 3 or self.stride != 1 or self.padding != (1, 1) or self.dtype != torch.float32:
            return False
        n, height, width, c_in, c_out = self._shape(x)[:5]
        return winograd.chooses_winograd(n, height, width, c_in, c_out)

    def winograd_bytes(self, x: Features) -> int:
        """Of the weights in Winograd's form, 0 in another form."""
        if self.form(x) != "winograd":
            return 0
        return winograd.winograd_bytes(self.weight.shape[1], len(self.weight))

    def norm_is_fused(self, x: Features, form: str) -> bool:
        """Whether the norm is in the convolution's own launch."""
        assert self.norm is not None
        return form == "fused" and x.has_statistics and self.norm.is_fusable and self.resample != "down"

    def forward(
        self,
        x: Features,
        *,
        row: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Features | None = None,
    ) -> Features:
        """Convolve.

        Args:
            x: C channels in all; parts of other dtypes and layouts than the network's are taken too.
            row: [N or 1, C_out], added.
            scale, shift: [N or 1, C] of the norm, or None.
            residual: of the result's height and width, or half of it where the input is upsampled.

        Returns:
            [N, C_out, H_out, W_out], perhaps with the row that is still to be added.
        """
        form = self.form(x)
        if form in ("library", "winograd"):
            return self.library(
                x, row=row, scale=scale, shift=shift, residual=residual, uses_winograd=form == "winograd"
            )
        norm, parts = None, x.parts
        if self.norm is not None and self.norm_is_fused(x, form):
            norm = self.norm.arguments(x.statistics, scale, shift)
        elif self.norm is not None:
            parts = (self._normalized(x, scale, shift, self.resample if self.resample == "down" else None),)
        has_shortcut = self.shortcut_weight is not None
        y, statistics = conv(
            parts,
            self.weight,
            self.bias,
            norm=norm,
            stride=self.stride,
            padding=self.padding,
            upsample=self.resample == "up",
            row=row,
            residual=None if residual is None or has_shortcut else residual.tensor(),
            shortcut=residual.parts if residual is not None and has_shortcut else (),
            shortcut_weight=self.shortcut_weight,
            out_scale=1 / self.scale,
            statistics=self.statistics,
            dtype=self.out_dtype,
            counters=self.counters,
        )
        return Features((y,), (statistics,))

    def _normalized(self, x: Features, scale: Tensor | None, shift: Tensor | None, kind: str | None) -> Tensor:
        """The norm in a pass of its own, with activation and resampling."""
        assert self.norm is not None
        if not x.has_statistics or not self.norm.is_fusable:
            return resample(self.norm(x.tensor(), add=x.row, scale=scale, shift=shift), kind)
        return group_norm_apply(x.parts, self.norm.arguments(x.statistics, scale, shift), resample=kind)

    def library(
        self,
        x: Features,
        *,
        row: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Features | None = None,
        uses_winograd: bool = False,
    ) -> Features:
        """Plain PyTorch around the library's convolution, which leaves the row to the norm that follows, if one does.

        With uses_winograd around that form of it, which adds the row.
        """
        if self.norm is None:
            h = resample(x.tensor(), self.resample)
        else:
            h = self._normalized(x, scale, shift, self.resample)
        h = h.to(self.dtype).contiguous(memory_format=torch.channels_last)
        skip = None if residual is None else self._skip(residual, h.shape[2])
        if uses_winograd:
            bias = self.bias if row is None else row if self.bias is None else self.bias + row
            row = None
            # A constant of the compiled step, as the weight is.
            points = winograd.transform_weight(self.weight)
            h = winograd.winograd_conv3x3(h, points, bias=bias, residual=skip)
        else:
            h = self._library_convolution(h)
            if skip is not None:
                h = h + skip
        if self.scale != 1:
            h = h / self.scale
        return Features((h.to(self.out_dtype),), (None,), row)

    def _library_convolution(self, h: Tensor) -> Tensor:
        if self.kernel == 1:
            return _linear(h, self.weight.flatten(1), self.bias)
        before, after = self.padding
        if before != after:
            h = F.pad(h, (before, after, before, after))
        return F.conv2d(h, self.weight, self.bias, stride=self.stride, padding=before if before == after else 0)

    def _skip(self, residual: Features, height: int) -> Tensor:
        """What is added to the result of this height."""
        skip = residual.tensor()
        if self.shortcut_weight is not None:
            skip = _linear(skip, self.shortcut_weight, None)
        return skip if skip.shape[2] == height else resample(skip, "up")

    def describe(self, x: Features) -> str:
        """The form that these features give it, for `Sampler.explain()`."""
        size = f"{self.kernel}x{self.kernel}"
        shape = self.shape(x)
        text = f"{size}, {shape.c_in}->{shape.c_out} at {shape.height}x{shape.width}"
        text += f", stride {self.stride}" if self.stride != 1 else ""
        text += f", {str(self.dtype).removeprefix('torch.')}"
        text += " + 1x1 shortcut" if self.shortcut_weight is not None else ""
        form, device = self.form(x), x.parts[0].device
        if form == "winograd":
            return f"Winograd F(4x4, 3x3) {text}, transformed weights of {self.winograd_bytes(x) / 1e6:.1f} MB"
        if form == "library":
            library = "oneDNN" if not backend.is_gpu(device) else "cuDNN"
            return f"{library} convolution {text}"
        norm, plan = "", tuning.plan(shape, backend.target(device))
        if self.norm is not None:
            norm = "; norm in the same launch" if self.norm_is_fused(x, form) else "; norm in a pass of its own"
        blocks = f"{plan.block_m}x{plan.block_n}x{plan.block_k}"
        return f"Triton kernel conv {text}{norm}; tiles {blocks}, K in {plan.splits}; {plan.source}"


@torch.compiler.assume_constant_result
def _planned_form(device: torch.device, *shape: Any) -> str:
    """Opaque to torch.compile, which cannot trace the reading of files of plans."""
    return tuning.plan(tuning.ConvShape(*shape), backend.target(device)).form


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of NHWC x as the matrix product that it is."""
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
