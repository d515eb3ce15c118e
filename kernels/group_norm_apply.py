"""GroupNorm, scale and shift, SiLU and resampling of a concatenation whose statistics are known, in one launch.

    y = resample(silu(GN([x, skip]) (1 + scale) + shift))

The pass before a convolution that is bound by its products: it takes the concatenation and the resampling along, which
would be passes of their own. (Wu and He 2018, "Group normalization"; resampling between norm and convolution: Dhariwal
and Nichol 2021, section 3.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .backend import tl
from .channel_statistics import Norm, check_norm, norm_lanes, norm_rows, normalize_ref

_TILE = 4096  # elements that a program holds in registers
_LEAST_TILE = 1024  # in small tiles, so that every multiprocessor has some
_MAX_TILES = 8  # of a program, to repay the norm that it finalizes first
_PROGRAMS = 12  # of a multiprocessor, about twice as many as it holds at once, before one gets more than one tile


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        block_c, block_p: channels and pixels of a tile, powers of two. A tile has channels of one part.
        blocks: of channels, all parts together.
        tiles: of a program, one after another along the pixels.
        pixel_blocks: programs along the pixels of an image.
        lanes, padded_groups: of `norm_rows`.
        num_warps: of a program.
    """

    block_c: int
    block_p: int
    blocks: int
    tiles: int
    pixel_blocks: int
    lanes: int
    padded_groups: int
    num_warps: int

    def programs(self, n: int) -> int:
        """Programs of N images."""
        return n * self.pixel_blocks * self.blocks


@functools.lru_cache(maxsize=4096)
def plan(n: int, channels: tuple[int, ...], width: int, pixels: int, sms: int) -> Plan:
    """The cut for N images on a GPU of `sms` multiprocessors.

    Full tiles, several a program, where that still gives every multiprocessor several programs, whose waits overlap.
    Reasoned from bytes and instructions; not tuned on a GPU.

    Args:
        channels: of each part.
        width: channels of a group.
        pixels: of an image, of the input or, where it is smaller, of the result.
    """
    # Lanes that hold no channel cost time, and so does each block, which finalizes the norm once more.
    block_c = min((64, 32, 16, 8), key=lambda b: ((b + 8) * len(_block_starts(channels, b)), -b))
    starts = _block_starts(channels, block_c)
    blocks = len(starts)
    block_p = min(_TILE // block_c, backend.next_power_of_2(pixels))
    while block_p > 1 and block_p * block_c > _LEAST_TILE and n * blocks * -(-pixels // block_p) < 2 * sms:
        block_p //= 2
    tiles_per_image = -(-pixels // block_p)
    tiles = 1
    while 2 * tiles <= min(_MAX_TILES, tiles_per_image):
        if n * blocks * -(-tiles_per_image // (2 * tiles)) < _PROGRAMS * sms:
            break
        tiles *= 2
    lanes, padded_groups = norm_lanes(starts, width, block_c, sum(channels))
    num_warps = max(1, min(8, block_p * block_c // 256))
    return Plan(block_c, block_p, blocks, tiles, -(-tiles_per_image // tiles), lanes, padded_groups, num_warps)


def _block_starts(channels: tuple[int, ...], block_c: int) -> list[int]:
    """First channel of each block; blocks begin anew with each part."""
    starts: list[int] = []
    first = 0
    for count in channels:
        starts += range(first, first + count, block_c)
        first += count
    return starts


@backend.jit
def _multiple(n, OF: tl.constexpr):
    """n, a multiple of OF: now the compiler knows too, and loads OF elements at once."""
    return n // OF * OF


@backend.jit
def _activated(part_ptr, offset, inside, mean, a, b, SILU: tl.constexpr):
    """The normalised tile at these offsets, float32; not 0 outside."""
    v = tl.load(part_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    y = (v - mean[None, :]) * a[None, :] + b[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@backend.jit
def _kernel(
    x_ptr, skip_ptr, y_ptr, stats_ptr, skip_stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    channels, skip_channels, pixels, slots, skip_slots, width, eps, columns, out_columns, work, chunk, pixel_blocks,
    x_n, x_p, skip_n, skip_p, y_n, y_p, scale_n, shift_n,
    HAS_SKIP: tl.constexpr, RESAMPLE: tl.constexpr, SILU: tl.constexpr, VEC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, PADDED_GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of one part, `chunk` pixels of one image, in tiles of BLOCK_P.

    x, skip: [N, pixels, channels] and [N, pixels, skip_channels], channels adjacent, with strides x_n, x_p and so on,
    in elements; rows of `columns` pixels. y: likewise, of all channels, rows of `out_columns`. VEC divides all these
    channels and strides. `work` pixels an image are shared out: the result's for RESAMPLE "down", else the input's.
    Statistics, weight, bias, scale, shift: see `norm_rows`. Programs lie with the blocks of channels next to each
    other, then the chunks of pixels, then the images.
    """
    channels = _multiple(channels, VEC)
    x_blocks = tl.cdiv(channels, BLOCK_C)
    blocks = x_blocks
    if HAS_SKIP:
        skip_channels = _multiple(skip_channels, VEC)
        blocks += tl.cdiv(skip_channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    start = tl.program_id(0) // blocks % pixel_blocks * chunk
    image = (tl.program_id(0) // blocks // pixel_blocks).to(tl.int64)

    c0 = block * BLOCK_C
    left = channels - c0  # of the part, from c0 on
    stride = _multiple(x_p, VEC)
    part_ptr = x_ptr + image * _multiple(x_n, VEC) + c0
    if HAS_SKIP:
        in_skip = block >= x_blocks
        s0 = c0 - x_blocks * BLOCK_C
        left = tl.where(in_skip, skip_channels - s0, left)
        stride = tl.where(in_skip, _multiple(skip_p, VEC), stride)
        part_ptr = tl.where(in_skip, skip_ptr + image * _multiple(skip_n, VEC) + s0, part_ptr)
        c0 = tl.where(in_skip, channels + s0, c0)
    y_p = _multiple(y_p, VEC)
    y_ptr += image * _multiple(y_n, VEC) + c0

    mean, a, b = norm_rows(
        stats_ptr, skip_stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, c0, channels, skip_channels,
        pixels, slots, skip_slots, width, eps, scale_n, shift_n, HAS_SKIP, BLOCK_C, LANES, PADDED_GROUPS, SLOTS,
    )  # fmt: skip

    lane = tl.arange(0, BLOCK_C)
    inside_c = (lane < left)[None, :]
    for p0 in range(start, tl.minimum(start + chunk, work), BLOCK_P):
        pixel = p0 + tl.arange(0, BLOCK_P)
        inside = (pixel < work)[:, None] & inside_c
        if RESAMPLE == "down":
            source = 2 * (pixel // out_columns * columns + pixel % out_columns)
            at = (source.to(tl.int64) * stride)[:, None] + lane[None, :]
            # A loop, lest the assembler keeps the loads of all four pixels in flight, and spills.
            y = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for corner in range(4):
                near = at + (corner % 2 + corner // 2 * columns) * stride
                y += _activated(part_ptr, near, inside, mean, a, b, SILU)
            y = 0.25 * y
        else:
            y = _activated(part_ptr, (pixel.to(tl.int64) * stride)[:, None] + lane[None, :], inside, mean, a, b, SILU)
        y = y.to(y_ptr.dtype.element_ty)
        if RESAMPLE == "up":
            target = 2 * (pixel // columns * out_columns + pixel % columns)
            at = (target.to(tl.int64) * y_p)[:, None] + lane[None, :]
            down = y_p * out_columns
            tl.store(y_ptr + at, y, mask=inside)
            tl.store(y_ptr + at + y_p, y, mask=inside)
            tl.store(y_ptr + at + down, y, mask=inside)
            tl.store(y_ptr + at + down + y_p, y, mask=inside)
        else:
            tl.store(y_ptr + (pixel.to(tl.int64) * y_p)[:, None] + lane[None, :], y, mask=inside)


def _launch(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    skip_statistics: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    resample: str | None,
    dtype: torch.dtype,
) -> Tensor:
    y = _empty(x, skip, resample, dtype)
    if y.numel() == 0:
        return y
    n, channels, height, columns = x.shape
    skip_channels = 0 if skip is None else skip.shape[1]
    width = (channels + skip_channels) // groups
    p = _plan(x, skip, width, y)
    x = _rows(x)
    strides = [x.stride(0), backend.pixel_stride(x)]
    if skip is None:
        strides += [0, 0]
    else:
        skip = _rows(skip)
        strides += [skip.stride(0), backend.pixel_stride(skip)]
    strides += [y.stride(0), channels + skip_channels]
    slots = [0 if s is None else s.shape[1] for s in (statistics, skip_statistics)]
    (scale, scale_n), (shift, shift_n) = backend.row(scale), backend.row(shift)
    with backend.on_device(x):
        _kernel[(p.programs(n),)](
            x, skip, y, statistics.contiguous(), None if skip_statistics is None else skip_statistics.contiguous(),
            weight.contiguous(), bias.contiguous(), scale, shift, channels, skip_channels, height * columns, *slots,
            width, eps, columns, y.shape[3], _work_pixels(x, y), p.tiles * p.block_p, p.pixel_blocks, *strides, scale_n,
            shift_n, HAS_SKIP=skip is not None, RESAMPLE=resample, SILU=silu,
            VEC=math.gcd(16 // x.element_size(), channels, skip_channels, *strides),
            BLOCK_P=p.block_p, BLOCK_C=p.block_c, LANES=p.lanes, PADDED_GROUPS=p.padded_groups,
            SLOTS=backend.next_power_of_2(max(slots)), num_warps=p.num_warps, enable_fp_fusion=True,
            **backend.most_registers(x.device, 255),
        )  # fmt: skip
    return y


def _rows(x: Tensor) -> Tensor:
    """x with adjacent channels and one stride from pixel to pixel: itself, or a copy."""
    if (x.stride(1) == 1 or x.shape[1] == 1) and backend.pixel_stride(x) is not None:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _work_pixels(x: Tensor, y: Tensor) -> int:
    """Pixels of an image that programs share out: the result's where pooling makes it the smaller."""
    return min(x.shape[2] * x.shape[3], y.shape[2] * y.shape[3])


def _plan(x: Tensor, skip: Tensor | None, width: int, y: Tensor) -> Plan:
    channels = (x.shape[1],) if skip is None else (x.shape[1], skip.shape[1])
    return plan(len(x), channels, width, _work_pixels(x, y), backend.sm_count(x.device))


def group_norm_apply(
    parts: Sequence[Tensor],
    norm: Norm,
    *,
    resample: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """GroupNorm of a concatenation, scaled and shifted, then SiLU, then resampled; float32 inside, rounded once.

    Args:
        parts: one or two tensors [N, C_i, H, W], read as one of C = sum C_i channels; float32, float16 or bfloat16, all
            alike; channels_last or any strides whose channels are adjacent and whose H and W collapse into one (a
            slice of channels, say); others are copied first.
        norm: its statistics are those of the parts, at most MAX_SLOTS slots each.
        resample: None, "up" (nearest neighbour, by 2) or "down" (average of 2 x 2 pixels; what is left over of an odd
            height or width is dropped, as in F.avg_pool2d).
        dtype: of the result; that of the parts unless given.

    Returns:
        [N, C, H', W'], channels_last.

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    _check(parts, norm, resample)
    x, skip = parts if len(parts) == 2 else (*parts, None)
    arguments = (
        x,
        skip,
        norm.weight,
        norm.bias,
        norm.statistics[0],
        norm.statistics[1] if len(parts) == 2 else None,
        norm.scale,
        norm.shift,
        norm.groups,
        norm.eps,
        norm.silu,
        resample,
        dtype or x.dtype,
    )
    if not backend.takes_kernel(x):
        return group_norm_apply_ref(*arguments)
    return (torch.ops.ddpm.group_norm_apply if backend.is_dispatched(x) else _launch)(*arguments)


def group_norm_apply_ref(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    skip_statistics: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    resample: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """`group_norm_apply` in plain PyTorch, in float32, or in float64 for float64 parts (to judge by).

    It normalises by the statistics of the parts themselves, not by those that were given.
    """
    h = x if skip is None else torch.cat([x, skip], dim=1)
    h = h.to(torch.promote_types(x.dtype, torch.float32))
    h = normalize_ref(h, weight, bias, groups, eps, silu, scale, shift)
    if resample == "up":
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
    elif resample == "down":
        h = F.avg_pool2d(h, 2)
    return h.to(dtype).contiguous(memory_format=torch.channels_last)


def _check(parts: Sequence[Tensor], norm: Norm, resample: str | None) -> None:
    if len(parts) not in (1, 2):
        raise ValueError(f"parts must be one or two tensors; found {len(parts)}")
    x = parts[0]
    for part in parts:
        backend.check_image(part)
        if part.dtype != x.dtype or (len(part), *part.shape[2:]) != (len(x), *x.shape[2:]):
            raise ValueError(
                f"parts must be alike but for their channels; found {x.dtype} {list(x.shape)} and {part.dtype} "
                f"{list(part.shape)}"
            )
    check_norm(parts, norm)
    if resample not in (None, "up", "down"):
        raise ValueError(f'resample must be None, "up" or "down"; found {resample!r}')
    if resample == "down" and min(x.shape[2:]) < 2:
        raise ValueError(f"parts must have at least 2 x 2 pixels to be halved; found {x.shape[2]} x {x.shape[3]}")


def _empty(x: Tensor, skip: Tensor | None, resample: str | None, dtype: torch.dtype) -> Tensor:
    n, channels, height, width = x.shape
    if skip is not None:
        channels += skip.shape[1]
    if resample == "up":
        height, width = 2 * height, 2 * width
    elif resample == "down":
        height, width = height // 2, width // 2
    shape = (n, channels, height, width)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _fake(x: Tensor, skip: Tensor | None, *others: Any) -> Tensor:
    return _empty(x, skip, *others[-2:])


def _work(x: Tensor, skip: Tensor | None, *others: Any) -> backend.Work:
    groups, *_, resample, dtype = others[6:]
    y = _empty(x, skip, resample, dtype)
    if y.numel() == 0:
        return backend.Work(0, 0, 0)
    return backend.Work(1, _plan(x, skip, y.shape[1] // groups, y).programs(len(x)), 0)


backend.register(
    "group_norm_apply(Tensor x, Tensor? skip, Tensor weight, Tensor bias, Tensor statistics, Tensor? skip_statistics, "
    "Tensor? scale, Tensor? shift, int groups, float eps, bool silu, str? resample, ScalarType dtype) -> Tensor",
    _launch,
    group_norm_apply_ref,
    _fake,
    work=_work,
)
