"""Per-channel statistics of an activation, from which any GroupNorm over it can be finalized.

Statistics are float32 [N, slots, 2, C]: mean and sum of squared deviations (M2) of each channel over the pixels of a
slot. Slot s of an image of P = H W pixels covers pixels s chunk .. min((s + 1) chunk, P) - 1 in row-major order, with
chunk = next_power_of_2(ceil(P / slots)); the last slots may cover none, and then hold anything. Per channel, since a
group may straddle the seam of a concatenation.

Whoever normalises finalizes its channels by `norm_rows`. Parts are joined by Chan, Golub and LeVeque 1979, "Updating
formulae and a pairwise algorithm for computing sample variances", in the form for many parts at once, parts i of n_i
values each:

    mean = sum(n_i mean_i) / sum(n_i);   M2 = sum(M2_i + n_i (mean_i - mean)^2)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .backend import tl

MAX_SLOTS = 16  # what the reader of statistics takes at once; more are merged before
MAX_PIXELS = 2**27  # of an image: a slot's first pixel is a number of 32 bits
_MERGE_ROWS = 32  # slots that a merging program holds at once


class Norm(NamedTuple):
    """A GroupNorm (then scale and shift, then SiLU) of parts that are read as one concatenation of C channels.

    Attributes:
        weight, bias: [C], any float dtype.
        groups: divides C.
        eps: added to the variance.
        silu: apply y sigmoid(y).
        statistics: of each part, at most MAX_SLOTS slots.
        scale, shift: both or neither; [N or 1, C], any float dtype and batch stride: y (1 + scale) + shift.
    """

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    silu: bool
    statistics: tuple[Tensor, ...]
    scale: Tensor | None = None
    shift: Tensor | None = None


def check_norm(parts: Sequence[Tensor], norm: Norm) -> None:
    """Raise ValueError where `norm` is no norm of these parts [N, C_i, H, W]."""
    n, _, height, width = parts[0].shape
    channels = sum(part.shape[1] for part in parts)
    if height * width > MAX_PIXELS:
        raise ValueError(f"an image must have at most {MAX_PIXELS} pixels; found {height} x {width}")
    if norm.groups < 1 or channels % norm.groups:
        raise ValueError(f"groups must divide the {channels} channels of the parts; found {norm.groups}")
    for name, tensor in (("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        if tensor.shape != (channels,):
            raise ValueError(
                f"{name} must have shape [{channels}], as the parts have channels; found {list(tensor.shape)}"
            )
    if (norm.scale is None) != (norm.shift is None):
        raise ValueError("scale and shift go together; give both or neither")
    for name, tensor in (("scale", norm.scale), ("shift", norm.shift)):
        if tensor is not None and tensor.shape not in ((n, channels), (1, channels)):
            raise ValueError(f"{name} must have shape [{n} or 1, {channels}]; found {list(tensor.shape)}")
    if len(norm.statistics) != len(parts):
        raise ValueError(f"each of the {len(parts)} parts must have statistics; found {len(norm.statistics)} of them")
    for part, found in zip(parts, norm.statistics, strict=True):
        slots = found.shape[1] if found.ndim == 4 else 0
        if found.dtype != torch.float32 or found.shape != (n, slots, 2, part.shape[1]) or not 0 < slots <= MAX_SLOTS:
            raise ValueError(
                f"statistics of a part must be float32 [{n}, 1 .. {MAX_SLOTS}, 2, {part.shape[1]}]; "
                f"found {found.dtype} {list(found.shape)}"
            )


def chunk_size(pixels: int, slots: int) -> int:
    """Pixels of each slot but the last ones."""
    return backend.next_power_of_2(-(-pixels // slots))


def norm_lanes(starts: Iterable[int], width: int, block_c: int, total_channels: int) -> tuple[int, int]:
    """(LANES, PADDED_GROUPS) of `norm_rows`: the smallest powers of two that serve blocks of channels.

    Args:
        starts: first channel of each block.
        width: channels of a group.
        block_c: channels of a block.
        total_channels: of the concatenation; a block may reach beyond.
    """
    most = 1
    for start in starts:
        stop = min(start + block_c, total_channels)
        most = max(most, -(-stop // width) - start // width)
    return backend.next_power_of_2(most * width), backend.next_power_of_2(most)


@backend.jit
def _chunk(pixels, slots):
    """`chunk_size`: below its highest bit a number gets all bits, and is then one less than a power of two."""
    n = tl.cdiv(pixels, slots) - 1
    for i in tl.static_range(5):
        n |= n >> (1 << i)
    return n + 1


@backend.jit
def _part_statistics(
    stats_ptr, skip_stats_ptr, image, channel, inside, channels, skip_channels, pixels, slot, slots, skip_slots,
    HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """Mean, M2 and number of pixels of each slot and channel, float32 [slots, lanes]; 0 where there are no pixels."""
    slot = slot[:, None]
    row = channels  # of one slot's means, or M2s
    start = stats_ptr + image * slots * 2 * row + channel
    chunk = tl.zeros_like(channel) + _chunk(pixels, slots)
    if HAS_SKIP:
        in_skip = channel >= channels
        skip_start = skip_stats_ptr + image * skip_slots * 2 * skip_channels + (channel - channels)
        start = tl.where(in_skip, skip_start, start)
        row = tl.where(in_skip, skip_channels, row)[None, :]
        chunk = tl.where(in_skip, _chunk(pixels, skip_slots), chunk)
    chunk = chunk[None, :]
    # A slot past a part's last one begins behind the last pixel, by the rule of chunks.
    count = tl.maximum(tl.minimum(pixels - slot * chunk, chunk), 0)
    valid = inside[None, :] & (count > 0)
    at = start[None, :] + slot * 2 * row
    mean = tl.load(at, mask=valid, other=0.0)
    m2 = tl.load(at + row, mask=valid, other=0.0)
    return mean, m2, count.to(tl.float32)


@backend.jit
def norm_rows(
    stats_ptr, skip_stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    image, c0, channels, skip_channels, pixels, slots, skip_slots, width, eps, scale_n, shift_n,
    HAS_SKIP: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, PADDED_GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """GroupNorm, scale and shift of one image, as a line for each of its channels c0 .. c0 + BLOCK_C - 1.

        y = (x - mean) a + b;   a = rstd weight (1 + scale);   b = bias (1 + scale) + shift

    The channels are those of the concatenation: x's `channels`, then `skip_channels`. Their groups are taken whole,
    whatever lies on either side of the block's edges or of the seam: slots join per channel, channels join into groups,
    means first, then M2 around them, always in the same order.

    Args:
        stats_ptr, skip_stats_ptr: statistics of the parts (see the module), of `slots` and `skip_slots`; the latter
            may be None without HAS_SKIP.
        weight_ptr, bias_ptr: [channels + skip_channels], any float dtype.
        scale_ptr, shift_ptr: [N, channels + skip_channels] with batch strides scale_n and shift_n (0 for one row), any
            float dtype; or both None.
        image, c0: which image, and the first channel.
        pixels: of an image, at most MAX_PIXELS.
        width: channels of a group.
        eps: added to the variance.
        LANES, PADDED_GROUPS: from `norm_lanes`.
        SLOTS: a power of two, at least slots and skip_slots.

    Returns:
        mean, a and b, each float32 [BLOCK_C]; past the last channel all are 0.
    """
    image = tl.cast(image, tl.int64)
    total = channels
    if HAS_SKIP:
        total += skip_channels
    first = c0 // width * width  # of c0's group
    lane = tl.arange(0, LANES)
    # Wide groups have their slots taken in steps, so that a step fits in registers; others have a single step.
    STEP: tl.constexpr = SLOTS if SLOTS * LANES <= 2048 else (2048 // LANES if LANES <= 2048 else 1)
    step = tl.arange(0, STEP)
    lane_sum = tl.zeros((LANES,), tl.float32)
    for s in range(0, SLOTS, STEP):
        mean, m2, count = _part_statistics(
            stats_ptr, skip_stats_ptr, image, first + lane, first + lane < total, channels, skip_channels, pixels,
            s + step, slots, skip_slots, HAS_SKIP,
        )  # fmt: skip
        lane_sum += tl.sum(mean * count, axis=0)
    # Divided exactly: under a mean far from 0, an approximate quotient would show in every pixel.
    values = tl.cast(pixels, tl.float32)
    lane_mean = tl.div_rn(lane_sum, values)
    lane_m2 = tl.zeros((LANES,), tl.float32)
    for s in range(0, SLOTS, STEP):
        mean, m2, count = _part_statistics(
            stats_ptr, skip_stats_ptr, image, first + lane, first + lane < total, channels, skip_channels, pixels,
            s + step, slots, skip_slots, HAS_SKIP,
        )  # fmt: skip
        d = mean - lane_mean[None, :]
        lane_m2 += tl.sum(m2 + count * d * d, axis=0)

    group = tl.arange(0, PADDED_GROUPS)[None, :]
    member = (lane // width)[:, None] == group
    wide = tl.cast(width, tl.float32)
    group_mean = tl.div_rn(tl.sum(tl.where(member, lane_mean[:, None], 0.0), axis=0), wide)
    d = lane_mean[:, None] - group_mean[None, :]
    group_m2 = tl.sum(tl.where(member, lane_m2[:, None] + values * d * d, 0.0), axis=0)
    group_rstd = tl.rsqrt(group_m2 / (values * wide) + eps)

    channel = c0 + tl.arange(0, BLOCK_C)
    inside = channel < total
    member = inside[:, None] & (((channel - first) // width)[:, None] == group)
    mean = tl.sum(tl.where(member, group_mean[None, :], 0.0), axis=1)
    rstd = tl.sum(tl.where(member, group_rstd[None, :], 0.0), axis=1)
    a = rstd * tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = 1.0 + tl.load(scale_ptr + image * scale_n + channel, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + image * shift_n + channel, mask=inside, other=0.0).to(tl.float32)
        a = a * scale
        b = b * scale + shift
    return mean, a, b


@backend.jit
def _merge_kernel(
    statistics_ptr, merged_ptr, channels, pixels, slots, merged_slots, factor, chunk,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: `factor` neighbouring slots of BLOCK_C channels become one; grid (N merged_slots, channel blocks).

    statistics, merged: float32 [N, slots, 2, channels] and [N, merged_slots, 2, channels]; `chunk` pixels a slot. ROWS,
    a power of two that divides factor, are joined at a time: all means, then all M2 around the mean of all.
    """
    image = (tl.program_id(0) // merged_slots).to(tl.int64)
    slot = tl.program_id(0) % merged_slots
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = slot * factor + tl.arange(0, ROWS)
    inside = (channel < channels)[None, :]
    start = statistics_ptr + image * slots * 2 * channels
    total = tl.minimum(pixels - slot * factor * chunk, factor * chunk).to(tl.float32)

    mean = tl.zeros((BLOCK_C,), tl.float32)
    for r in range(0, factor, ROWS):
        count = tl.maximum(tl.minimum(pixels - (row + r) * chunk, chunk), 0).to(tl.float32)[:, None]
        at = start + ((row + r).to(tl.int64) * 2 * channels)[:, None] + channel[None, :]
        mean += tl.sum(tl.load(at, mask=inside & (count > 0), other=0.0) * count, axis=0)
    mean = tl.div_rn(mean, total)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for r in range(0, factor, ROWS):
        count = tl.maximum(tl.minimum(pixels - (row + r) * chunk, chunk), 0).to(tl.float32)[:, None]
        at = start + ((row + r).to(tl.int64) * 2 * channels)[:, None] + channel[None, :]
        valid = inside & (count > 0)
        d = tl.load(at, mask=valid, other=0.0) - mean[None, :]
        m2 += tl.sum(tl.load(at + channels, mask=valid, other=0.0) + count * d * d, axis=0)

    at = merged_ptr + (image * merged_slots + slot) * 2 * channels + channel
    tl.store(at, mean, mask=channel < channels)
    tl.store(at + channels, m2, mask=channel < channels)


def merged_slots(slots: int, pixels: int) -> int:
    """Slots that `merge_statistics` leaves of `slots`."""
    return -(-pixels // _merged_chunk(slots, pixels)) if slots > MAX_SLOTS else slots


def _merged_chunk(slots: int, pixels: int) -> int:
    """Pixels of a merged slot: a power of two of old slots, since only these are neighbours by the rule of chunks.

    Counted are the slots that have pixels, u = ceil(P / chunk). With f = next_power_of_2(ceil(u / 16)) > 1 there are
    more than 8 f of them, hence P > f chunk, and ceil(P / (f chunk)) slots have a chunk of f chunk by the rule.
    """
    chunk = chunk_size(pixels, slots)
    used = -(-pixels // chunk)
    return chunk * backend.next_power_of_2(-(-used // MAX_SLOTS))


def merge_statistics(statistics: Tensor, pixels: int) -> Tensor:
    """Statistics of the same images in at most MAX_SLOTS slots; themselves where they have no more.

    Args:
        statistics: float32 [N, slots, 2, C], contiguous.
        pixels: of an image.

    Returns:
        float32 [N, `merged_slots(slots, pixels)`, 2, C].
    """
    n, slots, _, channels = statistics.shape
    if slots <= MAX_SLOTS:
        return statistics
    if not backend.takes_kernel(statistics):
        return merge_statistics_ref(statistics, pixels)
    chunk = chunk_size(pixels, slots)
    factor = _merged_chunk(slots, pixels) // chunk
    left = merged_slots(slots, pixels)
    merged = torch.empty((n, left, 2, channels), dtype=torch.float32, device=statistics.device)
    if merged.numel() == 0:
        return merged
    # Eight channels, 32 bytes, are the least that a GPU reads at once.
    block_c = min(32, backend.next_power_of_2(channels))
    while block_c > 8 and n * left * -(-channels // block_c) < backend.target(statistics.device).sms:
        block_c //= 2
    with backend.on_device(statistics):
        _merge_kernel[(n * left, -(-channels // block_c))](
            statistics, merged, channels, pixels, slots, left, factor, chunk,
            ROWS=min(_MERGE_ROWS, factor), BLOCK_C=block_c, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return merged


def merge_statistics_ref(statistics: Tensor, pixels: int) -> Tensor:
    """`merge_statistics` in plain PyTorch, in the dtype of the statistics."""
    slots = statistics.shape[1]
    left = merged_slots(slots, pixels)
    chunk = chunk_size(pixels, slots)
    factor = _merged_chunk(slots, pixels) // chunk
    used = -(-pixels // chunk)
    empty = left * factor - used
    groups = F.pad(statistics[:, :used], (0, 0, 0, 0, 0, empty)).unflatten(1, (left, factor))  # [N, left, factor, 2, C]
    starts = torch.arange(left * factor, device=statistics.device) * chunk
    count = (pixels - starts).clamp(0, chunk).to(statistics.dtype).view(left, factor, 1)
    mean, m2 = groups.unbind(3)
    merged_mean = (mean * count).sum(dim=2) / count.sum(dim=1)
    merged_m2 = (m2 + count * (mean - merged_mean[:, :, None]).square()).sum(dim=2)
    return torch.stack([merged_mean, merged_m2], dim=2)


def channel_statistics_ref(x: Tensor) -> Tensor:
    """Statistics of x [N, C, H, W] in one slot, float32 [N, 1, 2, C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pixels = x.flatten(2).to(wide)
    mean = pixels.mean(dim=2)
    m2 = (pixels - mean[:, :, None]).square().sum(dim=2)
    return torch.stack([mean, m2], dim=1)[:, None].float()


def normalize_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """GroupNorm, scale and shift, SiLU of x itself, in x's dtype."""
    y = torch.group_norm(x.contiguous(), groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale.to(x.dtype)[:, :, None, None]) + shift.to(x.dtype)[:, :, None, None]
    return F.silu(y) if silu else y
