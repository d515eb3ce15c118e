"""GroupNorm, then optional scale and shift, then optional SiLU, in one operation, for NCHW and NHWC.

    y = GN(x + add) weight + bias;   y = y (1 + scale) + shift;   y = y sigmoid(y)

(Wu and He 2018, "Group normalization"; scale and shift: Dhariwal and Nichol 2021, section 3, AdaGN; SiLU: Elfwing et
al. 2017.) `add` is what lies between a convolution without bias and its norm: bias and time embedding.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .backend import tl, triton

_TILE = 8192  # the most elements a program holds in registers
_LATENCY_TILE = 4096  # up to here one launch beats two, however few programs it has
_MAX_SPLITS = 32  # each program of the second launch reads this many partials per channel


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        one_pass: each program holds whole groups of one image: statistics and result in one launch. Otherwise partial
            statistics in a first launch, the result in a second.
        groups_per_block: consecutive groups of one program.
        block_c, block_p: its tile, channels and pixels, powers of two.
        splits, chunk: parts of an image's pixels in the first of two launches, and pixels of one part.
        num_warps: of all launches.
    """

    one_pass: bool
    groups_per_block: int
    block_c: int
    block_p: int
    splits: int
    chunk: int
    num_warps: int

    def programs(self, n: int, groups: int) -> int:
        """Programs of the launch that takes the statistics."""
        return n * self.splits * -(-groups // self.groups_per_block)


@functools.lru_cache(maxsize=4096)
def plan(n: int, channels: int, pixels: int, groups: int, sms: int, one_pass: bool | None = None) -> Plan:
    """The cut for N images of `channels` x `pixels` on a GPU of `sms` multiprocessors.

    Wide blocks of channels where that still gives every multiprocessor work, narrow ones at small batch. Reasoned from
    bytes and launches; not tuned on a GPU.

    Args:
        one_pass: forces the form; None chooses. True is refused where no group fits in a program.

    Raises:
        ValueError: one_pass=True for groups too large for it.
    """
    width = channels // groups
    whole = backend.next_power_of_2(pixels)
    fits = whole * backend.next_power_of_2(width) <= _TILE
    if one_pass and not fits:
        raise ValueError(
            f"a group of {width} channels x {pixels} pixels does not fit in one program; use one_pass=None"
        )
    if fits and one_pass is not False:
        for limit in (64, 32, 16, 8, 1):
            per_block, block_c = _channel_block(groups, width, limit)
            programs = n * -(-groups // per_block)
            if whole * block_c <= _TILE and (programs >= 2 * sms or limit <= 8):
                break
        if one_pass or programs >= sms or whole * block_c <= _LATENCY_TILE:
            return Plan(True, per_block, block_c, whole, 1, pixels, _warps(whole * block_c))
    for limit in (64, 32, 16):
        per_block, block_c = _channel_block(groups, width, limit)
        block_p = max(1, min(64, whole, _TILE // block_c))
        tiles = -(-pixels // block_p)
        programs = n * -(-groups // per_block)
        if programs * min(tiles, _MAX_SPLITS) >= 2 * sms:
            break
    splits = max(1, min(tiles, _MAX_SPLITS, -(-4 * sms // max(programs, 1))))
    chunk = -(-tiles // splits) * block_p
    return Plan(False, per_block, block_c, block_p, -(-pixels // chunk), chunk, _warps(block_p * block_c))


def _channel_block(groups: int, width: int, limit: int) -> tuple[int, int]:
    """(groups of a block, its channels padded to a power of two, at most `limit` unless one group has more).

    Least padding wins; a block whose start is not a multiple of 8 channels pays for its narrower loads.
    """
    load_cost = {8: 1.0, 4: 1.25, 2: 2.0, 1: 4.0}

    def cost(per_block: int) -> tuple[float, int]:
        blocks = -(-groups // per_block)
        aligned = 8 if blocks == 1 else math.gcd(per_block * width, 8)
        return blocks * backend.next_power_of_2(per_block * width) * load_cost[aligned], blocks

    best = min(range(1, max(1, min(groups, limit // width)) + 1), key=cost)
    return best, backend.next_power_of_2(best * width)


def _warps(tile: int) -> int:
    return max(1, min(8, tile // 512))


@backend.jit
def _pivot(x_ptr, add_ptr, lane, inside_c, stride_c, WIDTH: tl.constexpr):
    """For each channel the first element of its group, of x + add: what all elements of the group are shifted by.

    Where |mean| >> std, the sums and the mean itself then have the digits of the deviations, not of the mean. Pointers
    are at the image's first pixel and the block's first channel.
    """
    first = lane // WIDTH * WIDTH
    pivot = tl.load(x_ptr + first * stride_c, mask=inside_c, other=0.0).to(tl.float32)
    if add_ptr is not None:
        pivot += tl.load(add_ptr + first, mask=inside_c, other=0.0).to(tl.float32)
    return pivot


@backend.jit
def _load_tile(x_ptr, add_ptr, pivot, pixel, lane, inside, inside_c, stride_p, stride_c):
    """x + add - pivot over a tile [pixels, channels] (0 outside); x_ptr is at the tile, add_ptr at its channels."""
    v = tl.load(x_ptr + pixel[:, None] * stride_p + lane[None, :] * stride_c, mask=inside, other=0.0).to(tl.float32)
    if add_ptr is not None:
        v += tl.load(add_ptr + lane, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside, v - pivot[None, :], 0.0)


@backend.jit
def _channel_moments(v, inside, count):
    """Mean and sum of squared deviations (M2) of each channel over the tile's `count` pixels, in two passes."""
    mean = tl.sum(v, axis=0) / count
    d = tl.where(inside, v - mean[None, :], 0.0)
    return mean, tl.sum(d * d, axis=0)


@backend.jit
def _group_moments(mean, m2, count, lane, WIDTH: tl.constexpr, PADDED_GROUPS: tl.constexpr):
    """Mean and M2 of each group from those of its channels (`count` pixels each), and who belongs to whom."""
    member = (lane // WIDTH)[:, None] == tl.arange(0, PADDED_GROUPS)[None, :]  # [channels, groups]
    group_mean = tl.sum(tl.where(member, mean[:, None], 0.0), axis=0) / WIDTH
    d = mean[:, None] - group_mean[None, :]
    return group_mean, tl.sum(tl.where(member, m2[:, None] + count * d * d, 0.0), axis=0), member


@backend.jit
def _finish(
    y_ptr, v, mean, rstd, weight_ptr, bias_ptr, scale_ptr, shift_ptr, pixel, lane, inside, inside_c, stride_p,
    stride_c, SILU: tl.constexpr,
):  # fmt: skip
    """Normalise, scale, shift, activate, round once, store. All pointers are at the tile's first channel."""
    a = rstd * tl.load(weight_ptr + lane, mask=inside_c, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + lane, mask=inside_c, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = 1.0 + tl.load(scale_ptr + lane, mask=inside_c, other=0.0).to(tl.float32)
        a = a * scale
        b = b * scale + tl.load(shift_ptr + lane, mask=inside_c, other=0.0).to(tl.float32)
    y = (v - mean[None, :]) * a[None, :] + b[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + pixel[:, None] * stride_p + lane[None, :] * stride_c, y.to(y_ptr.dtype.element_ty), mask=inside)


@backend.jit
def _one_pass_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, add_ptr,
    channels, pixels, eps,
    x_n, x_c, x_p, y_n, y_c, y_p, scale_n, shift_n, add_n,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS whole groups of WIDTH channels of one image, held in registers; grid (N, group blocks).

    x, y: [N, channels, pixels] with any strides x_n, x_c, x_p and y_n, y_c, y_p, in elements; y in x's dtype. weight,
    bias: [channels]; scale and shift, add: [N, channels] with batch strides scale_n, shift_n, add_n (0 for one row), or
    None. Statistics of x + add less its group's `_pivot`: channels first, over pixels, then groups, over channels; each
    mean first, then M2 around it.
    """
    image = tl.program_id(0).to(tl.int64)
    c0 = tl.program_id(1) * (GROUPS * WIDTH)
    lane, pixel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    inside_c = (lane < GROUPS * WIDTH) & (c0 + lane < channels)
    inside = (pixel < pixels)[:, None] & inside_c[None, :]
    if add_ptr is not None:
        add_ptr += image * add_n + c0
    if scale_ptr is not None:
        scale_ptr += image * scale_n + c0
        shift_ptr += image * shift_n + c0
    first = tl.cast(c0, tl.int64)
    x_ptr += image * x_n + first * x_c
    pivot = _pivot(x_ptr, add_ptr, lane, inside_c, x_c, WIDTH)
    v = _load_tile(x_ptr, add_ptr, pivot, pixel, lane, inside, inside_c, x_p, x_c)

    count = tl.cast(pixels, tl.float32)
    mean, m2 = _channel_moments(v, inside, count)
    group_mean, group_m2, member = _group_moments(mean, m2, count, lane, WIDTH, PADDED_GROUPS)
    group_rstd = tl.rsqrt(group_m2 / (count * WIDTH) + eps)
    mean = tl.sum(tl.where(member, group_mean[None, :], 0.0), axis=1)
    rstd = tl.sum(tl.where(member, group_rstd[None, :], 0.0), axis=1)
    _finish(
        y_ptr + image * y_n + first * y_c, v, mean, rstd, weight_ptr + c0, bias_ptr + c0, scale_ptr, shift_ptr,
        pixel, lane, inside, inside_c, y_p, y_c, SILU,
    )  # fmt: skip


@backend.jit
def _statistics_kernel(
    x_ptr, add_ptr, partials_ptr,
    channels, pixels, chunk, groups,
    x_n, x_c, x_p, add_n,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Partial statistics. One program: `chunk` = TILES BLOCK_P pixels of GROUPS groups; grid (N, splits, group blocks).

    Arguments as in `_one_pass_kernel`. partials: float32 [N, groups, 2, splits], mean and M2 over the chunk, one writer
    per slot. Each tile has its moments taken in two passes; tiles join in order of pixels by Chan's formula (Chan,
    Golub and LeVeque 1979); channels join into groups at the end.
    """
    image, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c0 = tl.program_id(2) * (GROUPS * WIDTH)
    lane, pixel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    inside_c = (lane < GROUPS * WIDTH) & (c0 + lane < channels)
    x_ptr += image * x_n + tl.cast(c0, tl.int64) * x_c
    if add_ptr is not None:
        add_ptr += image * add_n + c0
    pivot = _pivot(x_ptr, add_ptr, lane, inside_c, x_c, WIDTH)
    start = split * chunk
    stop = tl.minimum(start + chunk, pixels)

    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(TILES):  # all programs have as many, and the last split's may be empty
        p0 = start + tile * BLOCK_P
        inside = (p0 + pixel < stop)[:, None] & inside_c[None, :]
        tile_ptr = x_ptr + tl.cast(p0, tl.int64) * x_p
        v = _load_tile(tile_ptr, add_ptr, pivot, pixel, lane, inside, inside_c, x_p, x_c)
        count = tl.cast(tl.maximum(tl.minimum(stop - p0, BLOCK_P), 0), tl.float32)
        tile_mean, tile_m2 = _channel_moments(v, inside, tl.maximum(count, 1.0))
        before = tl.cast(tile * BLOCK_P, tl.float32)
        fraction = count / (before + count)
        delta = tile_mean - mean
        mean += delta * fraction
        m2 += tile_m2 + delta * delta * (before * fraction)

    count = tl.cast(stop - start, tl.float32)
    group_mean, group_m2, _ = _group_moments(mean, m2, count, lane, WIDTH, PADDED_GROUPS)
    member = tl.arange(0, PADDED_GROUPS)
    group = tl.program_id(2) * GROUPS + member
    splits = tl.num_programs(1)
    slot = partials_ptr + (image * groups + group) * (2 * splits) + split
    inside_g = (member < GROUPS) & (group < groups)
    tl.store(slot, group_mean, mask=inside_g)
    tl.store(slot + splits, group_m2, mask=inside_g)


@backend.jit
def _apply_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, add_ptr, partials_ptr,
    channels, pixels, chunk, groups, pixel_blocks, splits, eps,
    x_n, x_c, x_p, y_n, y_c, y_p, scale_n, shift_n, add_n,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The result. One program: BLOCK_P pixels of GROUPS groups of one image; grid (N pixel_blocks, group blocks).

    Arguments as in the other kernels. The prologue joins the partials of all splits: the mean weighted by pixels, then
    M2 around it. Every program of an image does so in the same order, hence with the same bits.
    """
    image = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    p0 = (tl.program_id(0) % pixel_blocks) * BLOCK_P
    c0 = tl.program_id(1) * (GROUPS * WIDTH)
    lane, pixel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    inside_c = (lane < GROUPS * WIDTH) & (c0 + lane < channels)
    inside = (p0 + pixel < pixels)[:, None] & inside_c[None, :]
    if add_ptr is not None:
        add_ptr += image * add_n + c0
    if scale_ptr is not None:
        scale_ptr += image * scale_n + c0
        shift_ptr += image * shift_n + c0
    first = tl.cast(c0, tl.int64)
    x_ptr += image * x_n + first * x_c
    y_ptr += image * y_n + first * y_c + tl.cast(p0, tl.int64) * y_p
    pivot = _pivot(x_ptr, add_ptr, lane, inside_c, x_c, WIDTH)
    tile_ptr = x_ptr + tl.cast(p0, tl.int64) * x_p
    v = _load_tile(tile_ptr, add_ptr, pivot, pixel, lane, inside, inside_c, x_p, x_c)

    # Splits lie along the second axis: reduced over the first, the compiler would carry this small tile's layout on
    # to the large one, and move all of x through shared memory twice.
    split = tl.arange(0, PADDED_SPLITS)
    group = (c0 + lane) // WIDTH
    slot = partials_ptr + ((image * groups + group) * (2 * splits))[:, None] + split[None, :]
    valid = inside_c[:, None] & (split < splits)[None, :]
    part_mean = tl.load(slot, mask=valid, other=0.0)
    part_m2 = tl.load(slot + splits, mask=valid, other=0.0)
    count = tl.cast(tl.minimum(tl.maximum(pixels - split * chunk, 0), chunk), tl.float32)[None, :]
    total = tl.cast(pixels, tl.float32)
    mean = tl.sum(part_mean * count, axis=1) / total
    d = tl.where(valid, part_mean - mean[:, None], 0.0)
    m2 = tl.sum(part_m2 + (count * WIDTH) * d * d, axis=1)
    rstd = tl.rsqrt(m2 / (total * WIDTH) + eps)
    _finish(
        y_ptr, v, mean, rstd, weight_ptr + c0, bias_ptr + c0, scale_ptr, shift_ptr, pixel, lane, inside, inside_c,
        y_p, y_c, SILU,
    )  # fmt: skip


def _launch(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    one_pass: bool | None = None,
) -> Tensor:
    n, channels, height, width = x.shape
    pixels = height * width
    memory_format = backend.memory_format(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    if y.numel() == 0:
        return y
    if backend.pixel_stride(x) is None:
        x = x.contiguous(memory_format=memory_format)
    p = plan(n, channels, pixels, num_groups, backend.sm_count(x.device), one_pass)
    blocks = -(-num_groups // p.groups_per_block)
    (scale, scale_n), (shift, shift_n), (add, add_n) = (backend.row(r) for r in (scale, shift, add))
    weight, bias = weight.contiguous(), bias.contiguous()
    x_strides = (x.stride(0), x.stride(1), backend.pixel_stride(x))
    y_strides = (y.stride(0), y.stride(1), backend.pixel_stride(y))
    cut = {
        "WIDTH": channels // num_groups,
        "GROUPS": p.groups_per_block,
        "BLOCK_C": p.block_c,
        "BLOCK_P": p.block_p,
        "num_warps": p.num_warps,
        "enable_fp_fusion": True,
    }
    padded_groups = backend.next_power_of_2(p.groups_per_block)
    with backend.on_device(x):
        if p.one_pass:
            _one_pass_kernel[(n, blocks)](
                x, y, weight, bias, scale, shift, add, channels, pixels, eps, *x_strides, *y_strides, scale_n,
                shift_n, add_n, PADDED_GROUPS=padded_groups, SILU=silu, **cut,
            )  # fmt: skip
            return y
        partials = torch.empty((n, num_groups, 2, p.splits), dtype=torch.float32, device=x.device)
        _statistics_kernel[(n, p.splits, blocks)](
            x, add, partials, channels, pixels, p.chunk, num_groups, *x_strides, add_n,
            PADDED_GROUPS=padded_groups, TILES=p.chunk // p.block_p, **cut,
        )  # fmt: skip
        pixel_blocks = triton.cdiv(pixels, p.block_p)
        _apply_kernel[(n * pixel_blocks, blocks)](
            x, y, weight, bias, scale, shift, add, partials, channels, pixels, p.chunk, num_groups, pixel_blocks,
            p.splits, eps, *x_strides, *y_strides, scale_n, shift_n, add_n,
            PADDED_SPLITS=backend.next_power_of_2(p.splits), SILU=silu, **cut,
        )  # fmt: skip
    return y


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """GroupNorm of x + add, scaled and shifted, then SiLU; float32 inside, rounded once at the end.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16; NCHW, channels_last, or any strides whose H and W collapse into
            one (a slice of channels, say); others are copied first.
        num_groups: divides C.
        weight, bias: [C], any float dtype.
        eps: added to the variance.
        scale, shift: both or neither; [N or 1, C], any float dtype and batch stride.
        add: [N or 1, C], likewise; part of the statistics.
        silu: apply y sigmoid(y).

    Returns:
        x's shape and dtype; channels_last where x's channels are neighbours in memory, else NCHW.

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    _check(x, num_groups, weight, bias, scale, shift, add)
    if not backend.takes_kernel(x):
        return group_norm_silu_ref(x, num_groups, weight, bias, eps, scale, shift, add, silu)
    call = torch.ops.ddpm.group_norm_silu if backend.is_dispatched(x) else _launch
    return call(x, num_groups, weight, bias, eps, scale, shift, add, silu)


def group_norm_silu_ref(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """`group_norm_silu` in plain PyTorch, in float32, or in float64 for a float64 x (to judge by)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if add is not None:
        y = y + add.to(dtype)[:, :, None, None]
    # NCHW first: for channels_last tensors torch's CPU norm takes E[x^2] - mean^2, which loses the digits of a small
    # variance under a large mean (measured: 100 times the error at |mean| / std = 30).
    y = torch.group_norm(y.contiguous(), num_groups, weight.to(dtype), bias.to(dtype), eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale.to(dtype)[:, :, None, None]) + shift.to(dtype)[:, :, None, None]
    if silu:
        y = F.silu(y)
    return y.to(x.dtype).contiguous(memory_format=backend.memory_format(x))


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
) -> None:
    backend.check_image(x)
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x; found {num_groups}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (channels,):
            raise ValueError(f"{name} must have shape [{channels}], as x has channels; found {list(tensor.shape)}")
    backend.check_rows(x, scale, shift, add)


def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=backend.memory_format(x))


def _work(x: Tensor, num_groups: int, *_: Any) -> backend.Work:
    n, channels, height, width = x.shape
    if x.numel() == 0:
        return backend.Work(0, 0, 0)
    p = plan(n, channels, height * width, num_groups, backend.sm_count(x.device))
    programs = p.programs(n, num_groups)
    if p.one_pass:
        return backend.Work(1, programs, 0, form="one pass")
    partials = n * num_groups * 2 * p.splits * 4  # written, then read
    return backend.Work(2, programs, 0, x.nbytes + 2 * partials, "two passes")


backend.register(
    "group_norm_silu(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, Tensor? scale, Tensor? shift, "
    "Tensor? add, bool silu) -> Tensor",
    _launch,
    group_norm_silu_ref,
    _fake,
    work=_work,
)
