"""A convolution of the U-Net in one operation: what is read, what is summed, what is added, what the next norm needs.

    y = out_scale (conv(act(norm([x, skip]))) + conv_1x1([shortcut, shortcut_skip]) + bias + row + residual)

for NHWC, as an implicit matrix product [N H W, k k C] x [k k C, C_out] (Chetlur et al. 2014, "cuDNN", section 3). The
GroupNorm (Wu and He 2018) is finalized from per-channel partial statistics, which this operation also leaves behind of
its result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, tuning
from .channel_statistics import (
    MAX_PIXELS,
    MAX_SLOTS,
    Norm,
    channel_statistics_ref,
    check_norm,
    merged_slots,
    normalize_ref,
)
from .conv_kernel import Cut, cut, launch, output_size

__all__ = ["conv", "conv_ref", "output_size"]

_MAX_KERNEL = 7  # a bit for each tap


def conv(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
    upsample: bool = False,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Sequence[Tensor] = (),
    shortcut_weight: Tensor | None = None,
    out_scale: float = 1.0,
    statistics: bool = False,
    dtype: torch.dtype | None = None,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve, and add what is to be added, in float32; rounded once at the end.

    Args:
        parts: one or two tensors [N, C_i, H, W], read as one of C = sum C_i channels; float32, float16 or bfloat16,
            channels_last or any strides whose H and W collapse into one (NCHW too, at a cost).
        weight: [C_out, C, k, k], channels_last; its dtype is that of the products (float32: IEEE, or TF32 where
            torch.backends.cuda.matmul.fp32_precision says so), to which the normalised input is rounded.
        bias: [C_out], any float dtype.
        norm: GroupNorm of the parts, with scale and shift and SiLU, before the convolution and its padding.
        stride: 1 or 2.
        padding: rows (and columns) of zeros before and after; the output has (H + before + after - k) // stride + 1.
        upsample: the convolution sees its input enlarged by 2, nearest neighbour; H and W count after it.
        row: [N or 1, C_out], any float dtype and batch stride, such as a time embedding.
        residual: like y, or half its height and width (then read as enlarged by 2).
        shortcut, shortcut_weight: one or two tensors of y's height and width, and [C_out, sum of their channels]: a 1x1
            convolution of them, without norm, in the same sum.
        out_scale: what the sum is multiplied with.
        statistics: also give the result's per-channel statistics.
        dtype: of the result; parts[0]'s unless given.
        counters: int32 [tuning.COUNTERS], all zero, which the operation leaves all zero, so it is no state; of
            this layer alone. None lets the kernel not split K.

    Returns:
        y [N, C_out, H_out, W_out], channels_last, and its statistics (see `channel_statistics`) or None.

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    for name, tensors in (("parts", parts), ("statistics", parts if norm is None else norm.statistics)):
        if not 1 <= len(tensors) <= 2:
            raise ValueError(f"{name} must be one or two tensors; found {len(tensors)}")
    arguments = (
        *_pair(parts),
        weight,
        bias,
        row,
        residual,
        *_pair(shortcut),
        shortcut_weight,
        *((None,) * 4 if norm is None else (norm.weight, norm.bias, *_pair(norm.statistics))),
        *((None, None, 0, 0.0, False) if norm is None else (norm.scale, norm.shift, norm.groups, norm.eps, norm.silu)),
        stride,
        *padding,
        upsample,
        out_scale,
        statistics,
        dtype or parts[0].dtype,
        counters,
    )
    _check(*arguments)
    x = parts[0]
    if not backend.takes_kernel(x):
        y, found = conv_ref(*arguments)
    else:
        y, found = (torch.ops.ddpm.conv if backend.is_dispatched(x) else launch)(*arguments)
    return y, found if statistics else None


def _pair(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    first, second = (*tensors, None, None)[:2]
    return first, second


def _check(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
    shortcut: Tensor | None,
    shortcut_skip: Tensor | None,
    shortcut_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: Tensor | None,
    skip_statistics: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    stride: int,
    before: int,
    after: int,
    upsample: bool,
    out_scale: float,
    want_statistics: bool,
    dtype: torch.dtype,
    counters: Tensor | None,
) -> None:
    """Raise ValueError for arguments that `conv` does not take."""
    backend.check_image(x)
    n, _, height, width = x.shape
    channels = _check_pair("parts", x, skip, (n, height, width))
    if weight.ndim != 4 or weight.shape[1] != channels or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be [C_out, {channels}, k, k], as the parts have channels; found {_size(weight)}")
    out_channels, _, kernel, _ = weight.shape
    if kernel > _MAX_KERNEL or stride not in (1, 2) or before < 0 or after < 0:
        found = f"{kernel}, {stride} and {(before, after)}"
        raise ValueError(f"k must be at most {_MAX_KERNEL}, stride 1 or 2, and padding not negative; found {found}")
    height, width = output_size(height, width, kernel, stride, (before, after), upsample)
    if height < 1 or width < 1:
        raise ValueError(f"an image of {_size(x)} is too small for a kernel of {kernel}")
    if (shortcut is None) != (shortcut_weight is None):
        raise ValueError("shortcut and shortcut_weight go together; give both or neither")
    if shortcut is not None and shortcut_weight is not None:
        expected = (out_channels, _check_pair("shortcut", shortcut, shortcut_skip, (n, height, width)))
        _check_size("shortcut_weight", shortcut_weight, expected)
        if shortcut_weight.dtype != weight.dtype:
            raise ValueError(f"shortcut_weight must be of weight's {weight.dtype}; found {shortcut_weight.dtype}")
    _check_size("bias", bias, (out_channels,))
    _check_size("row", row, (n, out_channels), (1, out_channels))
    whole, half = (n, out_channels, height, width), (n, out_channels, height // 2, width // 2)
    _check_size("residual", residual, whole, *([half] if height % 2 == width % 2 == 0 else []))
    _check_size("counters", counters, (tuning.COUNTERS,))
    if counters is not None and counters.dtype != torch.int32:
        raise ValueError(f"counters must be int32; found {counters.dtype}")
    if norm_weight is not None:
        found = tuple(t for t in (statistics, skip_statistics) if t is not None)
        norm = Norm(norm_weight, norm_bias, groups, eps, silu, found, scale, shift)
        check_norm([x] if skip is None else [x, skip], norm)
    if backend.uses_triton(x.device):
        for name, d in (("weight", weight.dtype), ("dtype", dtype)):
            if d not in backend.IMAGE_DTYPES:
                raise ValueError(f"{name} must be float32, float16 or bfloat16; found {d}")
        read = [_extent(t) for t in (x, skip, residual, shortcut, shortcut_skip) if t is not None]
        if max(out_channels * height * width, *read) >= 2**31 or height * width > MAX_PIXELS:
            raise ValueError(
                f"an image must lie within 2^31 values and have at most {MAX_PIXELS} pixels; found {_size(x)} with "
                f"strides {list(x.stride())} and a result of {height} x {width}"
            )


def _extent(x: Tensor) -> int:
    """Elements from the first to the last of one image, in memory."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def _check_pair(name: str, x: Tensor, skip: Tensor | None, expected: tuple[int, int, int]) -> int:
    """Channels of one or two tensors, which must be of N, H, W as expected."""
    for tensor in (x, skip):
        if tensor is not None and (tensor.ndim != 4 or (len(tensor), *tensor.shape[2:]) != expected):
            n, height, width = expected
            raise ValueError(f"{name} must be [{n}, C, {height}, {width}]; found {_size(tensor)}")
    return x.shape[1] + (0 if skip is None else skip.shape[1])


def _check_size(name: str, tensor: Tensor | None, *expected: tuple) -> None:
    if tensor is not None and tuple(tensor.shape) not in expected:
        sizes = " or ".join(f"[{', '.join(map(str, size))}]" for size in expected)
        raise ValueError(f"{name} must be {sizes}; found {_size(tensor)}")


def _size(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def conv_ref(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
    shortcut: Tensor | None,
    shortcut_skip: Tensor | None,
    shortcut_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: Tensor | None,
    skip_statistics: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    stride: int,
    before: int,
    after: int,
    upsample: bool,
    out_scale: float,
    want_statistics: bool,
    dtype: torch.dtype,
    counters: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`conv` in plain PyTorch: sums in float32 or, for float64 parts, in float64 (to judge by).

    It normalises by the statistics of the parts themselves, not by those that were given.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide) if skip is None else torch.cat([x, skip], dim=1).to(wide)
    if norm_weight is not None:
        h = normalize_ref(h, norm_weight, norm_bias, groups, eps, silu, scale, shift)
    if x.dtype != torch.float64:
        h = h.to(weight.dtype).to(wide)
    if upsample:
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
    y = F.conv2d(F.pad(h, (before, after, before, after)), weight.to(wide), stride=stride)
    if shortcut is not None:
        h = shortcut if shortcut_skip is None else torch.cat([shortcut, shortcut_skip], dim=1)
        if x.dtype != torch.float64:
            h = h.to(weight.dtype)
        y = y + F.conv2d(h.to(wide), shortcut_weight.to(wide)[:, :, None, None])
    if bias is not None:
        y = y + bias.to(wide)[:, None, None]
    if row is not None:
        y = y + row.to(wide)[:, :, None, None]
    if residual is not None:
        residual = residual.to(wide)
        y = y + (residual if residual.shape == y.shape else F.interpolate(residual, scale_factor=2.0, mode="nearest"))
    y = (y * out_scale).to(dtype).contiguous(memory_format=torch.channels_last)
    return y, channel_statistics_ref(y) if want_statistics else y.new_empty(0, dtype=torch.float32)


def _cut(x: Tensor, weight: Tensor, others: tuple) -> Cut:
    """The cut of a call, by the operator's arguments after `weight`."""
    shortcut_weight, norm_weight, stride, before, after, upsample = (others[i] for i in (5, 6, 15, 16, 17, 18))
    return cut(
        x, weight, shortcut_weight, norm_weight is not None, stride, (before, after), upsample, others[-1] is not None
    )


def _fake(x: Tensor, skip: Tensor | None, weight: Tensor, *others) -> tuple[Tensor, Tensor]:
    stride, before, after, upsample, _, want_statistics, dtype, _ = others[15:]
    n, (height, width) = len(x), output_size(*x.shape[2:], weight.shape[2], stride, (before, after), upsample)
    y = torch.empty((n, len(weight), height, width), dtype=dtype, device=x.device, memory_format=torch.channels_last)
    if not want_statistics:
        return y, x.new_empty(0, dtype=torch.float32)
    slots = 1
    if backend.uses_triton(x.device):
        slots = merged_slots(_cut(x, weight, others).slots, int(height * width))
    return y, x.new_empty((n, slots, 2, len(weight)), dtype=torch.float32)


def _work(x: Tensor, skip: Tensor | None, weight: Tensor, *others) -> backend.Work:
    c = _cut(x, weight, others)
    shortcut_weight, want_statistics, counters = others[5], others[-3], others[-1]
    out_channels, channels, kernel, _ = weight.shape
    k = kernel * kernel * channels + (0 if shortcut_weight is None else shortcut_weight.shape[1])
    pixels = c.height * c.width
    extra = 0
    if c.plan.splits > 1:
        extra += 2 * 4 * c.tiles * c.plan.splits * c.plan.block_m * c.plan.block_n  # written and read
    if counters is not None:  # counted as read once, all of them
        extra += 4 * ((2 * c.tiles if c.plan.splits > 1 else 0) - counters.numel())
    merges = want_statistics and c.slots > MAX_SLOTS
    if merges:
        extra += 2 * 4 * len(x) * c.slots * 2 * out_channels
    p = c.plan
    form = f"{p.block_m}x{p.block_n}x{p.block_k}" + (f" / {p.splits}" if p.splits > 1 else "")
    flops = 2 * len(x) * pixels * out_channels * k
    return backend.Work(2 if merges else 1, c.tiles * p.splits, flops, extra, form)


backend.register(
    "conv(Tensor x, Tensor? skip, Tensor weight, Tensor? bias, Tensor? row, Tensor? residual, Tensor? shortcut, "
    "Tensor? shortcut_skip, Tensor? shortcut_weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? statistics, "
    "Tensor? skip_statistics, Tensor? scale, Tensor? shift, int groups, float eps, bool silu, int stride, int before, "
    "int after, bool upsample, float out_scale, bool want_statistics, ScalarType dtype, Tensor? counters) "
    "-> (Tensor, Tensor)",
    launch,
    conv_ref,
    _fake,
    work=_work,
)
