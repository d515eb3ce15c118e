"""The Triton kernel of `conv` and its launch.

A program computes BLOCK_M pixels x BLOCK_N channels of the result. Its pixels are a run of one image, in row-major
order, or whole images, each padded to a power of two; so statistics of a tile never mix images. Sizes and strides are
arguments, not constants: few binaries serve all layers of a network, and Triton's own specialisation on multiples of 16
gives loads of 16 bytes wherever channels allow.

Where K is split, each part of it leaves float32 sums in memory and counts itself in; the last to arrive adds all parts
in their order, so that the result's bits depend on nobody's speed. What Triton's interpreter, which runs programs one
after another, cannot show of this:

- that a part's sums are in memory before its count: all threads store, then meet at a barrier, then one of them adds to
  the counter with release at the scope of the GPU, which covers what was seen before the barrier;
- that the last one sees the sums of all others: the same addition acquires, its result reaches the other threads
  through a barrier, and the loads go past the first-level cache, which others' stores do not reach;
- that the counter is zero again when the next launch begins: that one starts after this one has ended.

A test marked `gpu` does ten thousand launches of one, and compares bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend, channel_statistics, tuning
from .backend import tl
from .channel_statistics import norm_rows

_NOWHERE = -(1 << 20)  # a row of pixels that no tap reaches


@backend.jit
def _taps_inside(row, column, height, width, KERNEL: tl.constexpr):
    """Which taps of each pixel fall inside the image: one bit each, instead of comparisons in every turn of a loop."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    bits = tl.zeros_like(row).to(tl.int32 if TAPS < 32 else tl.int64)
    for tap in tl.static_range(TAPS):
        h = row + tap // KERNEL
        w = column + tap % KERNEL
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        bits |= inside.to(bits.dtype) << tap
    return bits


@backend.jit
def _accumulate(
    acc, x_ptr, weight_ptr, stats_ptr, skip_stats_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, shift_ptr,
    k_begin, k_end, row, column, inside_n, height, width, channels, c_first, weight_tap, stride_c, stride_p,
    image, norm_channels, norm_skip_channels, slots, skip_slots, group_width, eps, scale_n, shift_n,
    BLOCK_K: tl.constexpr, KERNEL: tl.constexpr, UPSAMPLE: tl.constexpr, HAS_SKIP: tl.constexpr, SILU: tl.constexpr,
    LANES: tl.constexpr, PADDED_GROUPS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] plus the products of one tensor, of its K blocks k_begin .. k_end - 1.

    A K block is BLOCK_K channels of one tap; the taps of the same channels follow one another, since the norm's rows
    are then the same. Norm and activation are in float32, rounded once, to the weight's dtype.

    Args:
        x_ptr: at the image of each pixel, or of all; its size is height x width x channels.
        weight_ptr: [BLOCK_N] pointers to the first tap of the tensor's first channel; weight_tap elements between taps.
        row, column: [BLOCK_M], of each pixel's first tap.
        c_first: where the tensor's channels begin among those that are normalised together. The arguments from `image`
            to `shift_n` are those of `norm_rows`; without stats_ptr there is no norm.
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    ENLARGED: tl.constexpr = 2 if UPSAMPLE else 1
    taps_inside = _taps_inside(row, column, height * ENLARGED, width * ENLARGED, KERNEL)
    pixel = x_ptr + (row * width + column) * stride_p
    mean = tl.zeros((BLOCK_K,), tl.float32)
    a = tl.zeros((BLOCK_K,), tl.float32)
    b = tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.range(k_begin, k_end):
        tap = k % TAPS
        c0 = k // TAPS * BLOCK_K
        c = c0 + tl.arange(0, BLOCK_K)
        inside = ((taps_inside >> tap) & 1) != 0
        inside_c = c < channels
        if UPSAMPLE:
            source = ((row + tap // KERNEL) >> 1) * width + ((column + tap % KERNEL) >> 1)
            at = (x_ptr + source * stride_p)[:, None] + (c * stride_c)[None, :]
        else:
            at = pixel[:, None] + ((tap // KERNEL * width + tap % KERNEL) * stride_p + c * stride_c)[None, :]
        x = tl.load(at, mask=inside[:, None] & inside_c[None, :], other=0.0)
        at = weight_ptr[None, :] + (tap * weight_tap + c)[:, None]
        weight = tl.load(at, mask=inside_c[:, None] & inside_n[None, :], other=0.0)
        if stats_ptr is not None:
            if (tap == 0) | (k == k_begin):
                mean, a, b = norm_rows(
                    stats_ptr, skip_stats_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, shift_ptr, image,
                    c_first + c0, norm_channels, norm_skip_channels, height * width, slots, skip_slots, group_width,
                    eps, scale_n, shift_n, HAS_SKIP, BLOCK_K, LANES, PADDED_GROUPS, SLOTS,
                )  # fmt: skip
            x = (x.to(tl.float32) - mean[None, :]) * a[None, :] + b[None, :]
            if SILU:
                x = x * tl.sigmoid(x)
            x = tl.where(inside[:, None], x, 0.0)  # the padding is of the normalised image
        x = x.to(weight.dtype)
        if UPCAST:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    return acc


@backend.jit
def _finish_channels(
    acc, y_ptr, bias_ptr, row_ptr, residual_ptr, y_stats_ptr,
    n0, first, image, inside_m, pixel, row, column, slot, slots, images, pixels, width, out_channels,
    y_n, row_n, residual_n, residual_c, residual_p, out_scale,
    NB: tl.constexpr, PIX: tl.constexpr, CHANNELS: tl.constexpr, ROW_PER_IMAGE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """`_finish` of the CHANNELS channels from n0 on: acc [NB PIX, CHANNELS]."""
    n = n0 + tl.arange(0, CHANNELS)
    inside_n = n < out_channels
    inside = inside_m[:, None] & inside_n[None, :]
    same = tl.zeros((CHANNELS,), tl.float32)  # for all pixels
    if bias_ptr is not None:
        same += tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)
    if row_ptr is not None:
        if ROW_PER_IMAGE:
            at = (row_ptr + image * row_n)[:, None] + n[None, :]
            acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        else:
            same += tl.load(row_ptr + first * row_n + n, mask=inside_n, other=0.0).to(tl.float32)
    acc += same[None, :]
    if residual_ptr is not None:
        if HALF:
            source = (row // 2) * (width // 2) + column // 2
        else:
            source = pixel
        at = (residual_ptr + image * residual_n + source * residual_p)[:, None] + (n * residual_c)[None, :]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = (acc * out_scale).to(y_ptr.dtype.element_ty)
    tl.store((y_ptr + image * y_n + pixel * out_channels)[:, None] + n[None, :], y, mask=inside)

    if y_stats_ptr is not None:
        share = tl.div_rn(1.0, tl.cast(tl.minimum(pixels - slot * PIX, PIX), tl.float32))
        v = tl.reshape(tl.where(inside, y.to(tl.float32), 0.0), (NB, PIX, CHANNELS))
        mean = tl.sum(v, axis=1) * share
        valid = slot * PIX + tl.arange(0, PIX) < pixels
        d = tl.where(valid[None, :, None], v - mean[:, None, :], 0.0)
        m2 = tl.sum(d * d, axis=1)
        whose = first + tl.arange(0, NB)
        at = (y_stats_ptr + (whose * slots + slot) * (2 * out_channels))[:, None] + n[None, :]
        inside = (whose < images)[:, None] & inside_n[None, :]
        tl.store(at, mean, mask=inside)
        tl.store(at + out_channels, m2, mask=inside)


@backend.jit
def _finish(
    acc, y_ptr, bias_ptr, row_ptr, residual_ptr, y_stats_ptr,
    n0, first, image, inside_m, pixel, row, column, slot, slots, images, pixels, width, out_channels,
    y_n, row_n, residual_n, residual_c, residual_p, out_scale,
    NB: tl.constexpr, PIX: tl.constexpr, BLOCK_N: tl.constexpr, ROW_PER_IMAGE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Add what is to be added to acc [NB PIX, BLOCK_N], scale, round once, store; statistics of what was stored.

    first, n0: the tile's image and channel. image: of each pixel, or `first`; inside_m: which are pixels; pixel,
    row, column: of each, in its image. slot: which run of PIX pixels.
    """
    if BLOCK_N <= 64:
        _finish_channels(
            acc, y_ptr, bias_ptr, row_ptr, residual_ptr, y_stats_ptr, n0, first, image, inside_m, pixel, row, column,
            slot, slots, images, pixels, width, out_channels, y_n, row_n, residual_n, residual_c, residual_p, out_scale,
            NB, PIX, BLOCK_N, ROW_PER_IMAGE, HALF,
        )  # fmt: skip
    else:
        # Half the channels at a time: what is added then takes half the registers, and two programs fit where one did.
        SIDE: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (NB * PIX, 2, SIDE)), (0, 2, 1)))
        _finish_channels(
            left, y_ptr, bias_ptr, row_ptr, residual_ptr, y_stats_ptr, n0, first, image, inside_m, pixel, row, column,
            slot, slots, images, pixels, width, out_channels, y_n, row_n, residual_n, residual_c, residual_p, out_scale,
            NB, PIX, SIDE, ROW_PER_IMAGE, HALF,
        )  # fmt: skip
        _finish_channels(
            right, y_ptr, bias_ptr, row_ptr, residual_ptr, y_stats_ptr, n0 + SIDE, first, image, inside_m, pixel, row,
            column, slot, slots, images, pixels, width, out_channels, y_n, row_n, residual_n, residual_c, residual_p,
            out_scale, NB, PIX, SIDE, ROW_PER_IMAGE, HALF,
        )  # fmt: skip


@backend.jit
def _conv_kernel(
    x_ptr, skip_ptr, weight_ptr, bias_ptr, row_ptr, residual_ptr, shortcut_ptr, shortcut_skip_ptr, shortcut_weight_ptr,
    norm_weight_ptr, norm_bias_ptr, stats_ptr, skip_stats_ptr, scale_ptr, shift_ptr, y_ptr, y_stats_ptr, partials_ptr,
    counters_ptr,
    images, in_height, in_width, height, width, channels, skip_channels, out_channels, shortcut_channels,
    shortcut_skip_channels, before, group_width, in_slots, skip_slots, slots, eps, out_scale,
    x_n, x_c, x_p, skip_n, skip_c, skip_p, residual_n, residual_c, residual_p, shortcut_n, shortcut_c, shortcut_p,
    shortcut_skip_n, shortcut_skip_c, shortcut_skip_p, y_n, row_n, scale_n, shift_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NB: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, UPSAMPLE: tl.constexpr, SILU: tl.constexpr, ROW_PER_IMAGE: tl.constexpr, HALF: tl.constexpr,
    LANES: tl.constexpr, PADDED_GROUPS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, NOWHERE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M pixels x BLOCK_N channels of y, summed over one part of K; grid (tiles, parts of K).

    A tile holds NB images; NB = 1 and `slots` tiles an image, or slots = 1. Channels are the inner tiles, so that
    neighbours read the same pixels.

    Args:
        x, skip: [images, channels or skip_channels, in_height, in_width], each with strides from image, channel and
            pixel to the next; weight: [out_channels, KERNEL, KERNEL, channels + skip_channels].
        shortcut, shortcut_skip: likewise, of height x width; shortcut_weight: [out_channels, their channels].
        bias: [out_channels]; row: [images, out_channels], with a batch stride (0 for one row); residual: like y, or of
            half its height and width (HALF).
        norm_weight .. shift: as `norm_rows` takes them. None of these, and no stats: no norm.
        y: [images, height, width, out_channels]; y_stats: float32 [images, slots, 2, out_channels].
        partials: float32 [tiles, parts, BLOCK_M, BLOCK_N]; counters: int32 [tiles]. None of both: one part.
    """
    PIX: tl.constexpr = BLOCK_M // NB
    HAS_SKIP: tl.constexpr = skip_ptr is not None
    TAPS: tl.constexpr = KERNEL * KERNEL
    tile = tl.program_id(0)
    blocks_n = tl.cdiv(out_channels, BLOCK_N)
    n0 = tile % blocks_n * BLOCK_N
    slot = tile // blocks_n % slots
    first = (tile // blocks_n // slots).to(tl.int64) * NB
    lane = tl.arange(0, BLOCK_M)
    pixels = height * width
    pixel = slot * PIX + lane % PIX
    row = pixel // width
    column = pixel % width
    inside_m = pixel < pixels
    if NB == 1:
        image = first
    else:
        image = first + lane // PIX
        inside_m = inside_m & (image < images)
    n = n0 + tl.arange(0, BLOCK_N)
    inside_n = n < out_channels

    all_channels = channels + skip_channels
    steps = tl.cdiv(channels, BLOCK_K) * TAPS
    skip_steps = tl.cdiv(skip_channels, BLOCK_K) * TAPS
    shortcut_steps = tl.cdiv(shortcut_channels, BLOCK_K)
    begin = 0
    end = steps + skip_steps + shortcut_steps + tl.cdiv(shortcut_skip_channels, BLOCK_K)
    if partials_ptr is not None:
        begin = tl.program_id(1) * end // tl.num_programs(1)
        end = (tl.program_id(1) + 1) * end // tl.num_programs(1)

    tap_row = tl.where(inside_m, row * STRIDE - before, NOWHERE)
    tap_column = column * STRIDE - before
    weights = weight_ptr + n * (TAPS * all_channels)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _accumulate(
        acc, x_ptr + image * x_n, weights, stats_ptr, skip_stats_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr,
        shift_ptr, begin, tl.minimum(end, steps), tap_row, tap_column, inside_n, in_height, in_width, channels, 0,
        all_channels, x_c, x_p, first, channels, skip_channels, in_slots, skip_slots, group_width, eps, scale_n,
        shift_n, BLOCK_K, KERNEL, UPSAMPLE, HAS_SKIP, SILU, LANES, PADDED_GROUPS, SLOTS, PRECISION, UPCAST,
    )  # fmt: skip
    if HAS_SKIP:
        begin -= steps
        end -= steps
        acc = _accumulate(
            acc, skip_ptr + image * skip_n, weights + channels, stats_ptr, skip_stats_ptr, norm_weight_ptr,
            norm_bias_ptr, scale_ptr, shift_ptr, tl.maximum(begin, 0), tl.minimum(end, skip_steps), tap_row, tap_column,
            inside_n, in_height, in_width, skip_channels, channels, all_channels, skip_c, skip_p, first, channels,
            skip_channels, in_slots, skip_slots, group_width, eps, scale_n, shift_n, BLOCK_K, KERNEL, UPSAMPLE,
            HAS_SKIP, SILU, LANES, PADDED_GROUPS, SLOTS, PRECISION, UPCAST,
        )  # fmt: skip
        begin -= skip_steps
        end -= skip_steps
    else:
        begin -= steps
        end -= steps
    if shortcut_ptr is not None:
        own_row = tl.where(inside_m, row, NOWHERE)
        weights = shortcut_weight_ptr + n * (shortcut_channels + shortcut_skip_channels)
        acc = _accumulate(
            acc, shortcut_ptr + image * shortcut_n, weights, None, None, None, None, None, None, tl.maximum(begin, 0),
            tl.minimum(end, shortcut_steps), own_row, column, inside_n, height, width, shortcut_channels, 0, 0,
            shortcut_c, shortcut_p, first, 0, 0, 0, 0, 0, eps, 0, 0, BLOCK_K, 1, False, False, False, 1, 1, 1,
            PRECISION, UPCAST,
        )  # fmt: skip
        if shortcut_skip_ptr is not None:
            acc = _accumulate(
                acc, shortcut_skip_ptr + image * shortcut_skip_n, weights + shortcut_channels, None, None, None, None,
                None, None, tl.maximum(begin - shortcut_steps, 0), end - shortcut_steps, own_row, column, inside_n,
                height, width, shortcut_skip_channels, 0, 0, shortcut_skip_c, shortcut_skip_p, first, 0, 0, 0, 0, 0,
                eps, 0, 0, BLOCK_K, 1, False, False, False, 1, 1, 1, PRECISION, UPCAST,
            )  # fmt: skip

    if partials_ptr is None:
        _finish(
            acc, y_ptr, bias_ptr, row_ptr, residual_ptr, y_stats_ptr, n0, first, image, inside_m, pixel, row, column,
            slot, slots, images, pixels, width, out_channels, y_n, row_n, residual_n, residual_c, residual_p, out_scale,
            NB, PIX, BLOCK_N, ROW_PER_IMAGE, HALF,
        )  # fmt: skip
    else:
        part, parts = tl.program_id(1), tl.num_programs(1)
        at = lane[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        at = partials_ptr + tile.to(tl.int64) * parts * (BLOCK_M * BLOCK_N) + at
        tl.store(at + part * (BLOCK_M * BLOCK_N), acc)
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu") == parts - 1:
            tl.store(counters_ptr + tile, 0)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            # Several loads under way at a time, which large tiles have in one part already.
            UNROLL: tl.constexpr = 4 if BLOCK_M * BLOCK_N <= 64 * 64 else 1
            for i in tl.range(0, parts, loop_unroll_factor=UNROLL):
                acc += tl.load(at + i * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
            _finish(
                acc, y_ptr, bias_ptr, row_ptr, residual_ptr, y_stats_ptr, n0, first, image, inside_m, pixel, row,
                column, slot, slots, images, pixels, width, out_channels, y_n, row_n, residual_n, residual_c,
                residual_p, out_scale, NB, PIX, BLOCK_N, ROW_PER_IMAGE, HALF,
            )  # fmt: skip


def output_size(
    height: int, width: int, kernel: int, stride: int, padding: tuple[int, int], upsample: bool
) -> tuple[int, int]:
    """(H_out, W_out) of an input of H x W."""
    factor, margin = 2 if upsample else 1, sum(padding) - kernel
    return (factor * height + margin) // stride + 1, (factor * width + margin) // stride + 1


@dataclass(frozen=True)
class Cut:
    """How one call is cut.

    Attributes:
        plan: the blocks.
        height, width: of the result.
        images: of one tile; slots: tiles of one image. One of both is 1.
        tiles: of the result; each has `plan.splits` programs.
    """

    plan: tuning.ConvPlan
    height: int
    width: int
    images: int
    slots: int
    tiles: int


def cut(
    x: Tensor,
    weight: Tensor,
    shortcut_weight: Tensor | None,
    norm: bool,
    stride: int,
    padding: tuple[int, int],
    upsample: bool,
    splittable: bool,
) -> Cut:
    """The cut of a call with these arguments, on the GPU of x."""
    # int(): where shapes are symbols, the cut holds for these values only.
    n, _, in_height, in_width = map(int, x.shape)
    out_channels, channels, kernel, _ = map(int, weight.shape)
    shortcut = 0 if shortcut_weight is None else int(shortcut_weight.shape[1])
    height, width = output_size(in_height, in_width, kernel, stride, padding, upsample)
    shape = tuning.ConvShape(
        n, height, width, channels, out_channels, kernel, shortcut, norm, weight.dtype, upsample, stride
    )
    plan = tuning.plan(shape, backend.target(x.device), splittable, form="fused")
    images, slots, tiles = tuning.tiles(shape, plan.block_m, plan.block_n)
    return Cut(plan, height, width, images, slots, tiles)


def launch(
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
    """`conv` by the kernel; its second result is empty where no statistics are wanted."""
    norm = norm_weight is not None
    c = cut(x, weight, shortcut_weight, norm, stride, (before, after), upsample, counters is not None)
    n, channels, in_height, in_width = x.shape
    out_channels, all_channels, kernel, _ = weight.shape
    splits, tile = c.plan.splits, (c.plan.block_m, c.plan.block_n)
    y = torch.empty(
        (n, out_channels, c.height, c.width), dtype=dtype, device=x.device, memory_format=torch.channels_last
    )
    y_stats = partials = None
    if want_statistics:
        y_stats = torch.empty((n, c.slots, 2, out_channels), dtype=torch.float32, device=x.device)
    if splits > 1:
        partials = torch.empty((c.tiles, splits, *tile), dtype=torch.float32, device=x.device)

    (x, x_strides), (skip, skip_strides), (residual, residual_strides) = (_strided(t) for t in (x, skip, residual))
    (shortcut, shortcut_strides), (shortcut_skip, shortcut_skip_strides) = map(_strided, (shortcut, shortcut_skip))
    (row, row_n), (scale, scale_n), (shift, shift_n) = map(backend.row, (row, scale, shift))
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias, shortcut_weight, norm_weight, norm_bias, statistics, skip_statistics = (
        None if t is None else t.contiguous()
        for t in (bias, shortcut_weight, norm_weight, norm_bias, statistics, skip_statistics)
    )
    group_width, (lanes, padded_groups), in_slots, skip_slots = 0, (1, 1), 0, 0
    if statistics is not None:
        group_width, in_slots = all_channels // groups, statistics.shape[1]
        skip_slots = 0 if skip_statistics is None else skip_statistics.shape[1]
        lanes, padded_groups = _norm_lanes(channels, all_channels, group_width, c.plan.block_k)
    # The compiler would spill a few registers to fit one more program, which small layers do not have; on other
    # GPUs than Hopper it would in the large tiles too.
    is_generous = norm or splits > 1 or tuning.is_scalar(weight.dtype) or backend.target(x.device).capability[0] != 9
    limit = backend.most_registers(x.device, 255) if is_generous else {}
    if y.numel() > 0:
        with backend.on_device(x):
            _conv_kernel[(c.tiles, splits)](
                x, skip, weight, bias, row, residual, shortcut, shortcut_skip, shortcut_weight, norm_weight, norm_bias,
                statistics, skip_statistics, scale, shift, y, y_stats, partials, None if splits == 1 else counters,
                n, in_height, in_width, c.height, c.width, channels, all_channels - channels, out_channels,
                _channels(shortcut), _channels(shortcut_skip), before, group_width, in_slots, skip_slots, c.slots, eps,
                out_scale, *x_strides, *skip_strides, *residual_strides, *shortcut_strides, *shortcut_skip_strides,
                y.stride(0), row_n, scale_n, shift_n,
                BLOCK_M=c.plan.block_m, BLOCK_N=c.plan.block_n, BLOCK_K=c.plan.block_k, NB=c.images, KERNEL=kernel,
                STRIDE=stride, UPSAMPLE=upsample, SILU=silu, ROW_PER_IMAGE=c.images > 1 and row_n > 0,
                HALF=residual is not None and residual.shape[2:] != y.shape[2:],
                LANES=lanes, PADDED_GROUPS=padded_groups, SLOTS=backend.next_power_of_2(max(in_slots, skip_slots)),
                PRECISION="tf32" if tuning.is_tf32(weight.dtype) else "ieee",
                # The interpreter multiplies the bits of bfloat16 numbers.
                UPCAST=backend.INTERPRET and weight.dtype == torch.bfloat16, NOWHERE=_NOWHERE,
                num_warps=c.plan.num_warps, num_stages=c.plan.num_stages, enable_fp_fusion=True, **limit,
            )  # fmt: skip
    if y_stats is None:
        return y, torch.empty(0, dtype=torch.float32, device=x.device)
    return y, channel_statistics.merge_statistics(y_stats, c.height * c.width)


def _strided(x: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """x, copied where its rows do not follow one another; its strides from image, channel and pixel to the next."""
    if x is None:
        return None, (0, 0, 0)
    if backend.pixel_stride(x) is None:
        x = x.contiguous(memory_format=torch.channels_last)
    # A single channel's stride says nothing, and 1 lets pixels be read side by side.
    return x, (x.stride(0), x.stride(1) if x.shape[1] > 1 else 1, backend.pixel_stride(x))


def _channels(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[1]


@functools.lru_cache(maxsize=4096)
def _norm_lanes(channels: int, all_channels: int, group_width: int, block_k: int) -> tuple[int, int]:
    """`norm_lanes` of the K blocks of one or two tensors, the first of `channels`."""
    starts = (*range(0, channels, block_k), *range(channels, all_channels, block_k))
    return channel_statistics.norm_lanes(starts, group_width, block_k, all_channels)
