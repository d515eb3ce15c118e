"""Per-channel statistics: the lines that a norm is finalized to, and the merging of slots, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm.kernels import backend
from ddpm.kernels.backend import tl
from ddpm.kernels.channel_statistics import (
    MAX_SLOTS,
    Norm,
    channel_statistics_ref,
    check_norm,
    chunk_size,
    merge_statistics,
    merge_statistics_ref,
    merged_slots,
    norm_lanes,
    norm_rows,
)
from tests.slots import statistics_of
from tests.tolerances import assert_as_exact_as_torch

EPS = 1e-5


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for 4 multiprocessors, hence few programs: the interpreter runs them one by one."""
    monkeypatch.setattr(backend, "target", lambda device: backend.Target("small", 4, 101376, (8, 6)))


def make(device: str, *shape: int, mean: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    return (torch.randn(shape, generator=generator) + mean).to(device, dtype)


@backend.jit
def _rows_kernel(
    rows_ptr, stats_ptr, skip_stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, c0, channels, skip_channels,
    pixels, slots, skip_slots, width, eps, scale_n, shift_n,
    HAS_SKIP: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, PADDED_GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """rows: [N, 3, BLOCK_C], what `norm_rows` gives; grid (N,)."""
    image = tl.program_id(0)
    mean, a, b = norm_rows(
        stats_ptr, skip_stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, image, c0, channels, skip_channels,
        pixels, slots, skip_slots, width, eps, scale_n, shift_n, HAS_SKIP, BLOCK_C, LANES, PADDED_GROUPS, SLOTS,
    )  # fmt: skip
    at = rows_ptr + image * 3 * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(at, mean)
    tl.store(at + BLOCK_C, a)
    tl.store(at + 2 * BLOCK_C, b)


def rows(statistics: list[Tensor], pixels: int, norm: dict[str, Any], width: int, block_c: int) -> Tensor:
    """What `norm_rows` gives for all channels, block by block: [N, 3, C] and the lanes beyond."""
    parts = len(statistics)
    channels, slots = [s.shape[3] for s in statistics], [s.shape[1] for s in statistics]
    (scale, scale_n), (shift, shift_n) = backend.row(norm["scale"]), backend.row(norm["shift"])
    blocks = []
    for c0 in range(0, sum(channels), block_c):
        lanes, padded_groups = norm_lanes([c0], width, block_c, sum(channels))
        block = torch.empty((len(statistics[0]), 3, block_c), device=statistics[0].device)
        _rows_kernel[(len(block),)](
            block, statistics[0], statistics[1] if parts > 1 else None, norm["weight"], norm["bias"], scale, shift, c0,
            channels[0], channels[1] if parts > 1 else 0, pixels, slots[0], slots[1] if parts > 1 else 0, width, EPS,
            scale_n, shift_n, HAS_SKIP=parts > 1, BLOCK_C=block_c, LANES=lanes, PADDED_GROUPS=padded_groups,
            SLOTS=backend.next_power_of_2(max(slots)), enable_fp_fusion=True,
        )  # fmt: skip
        blocks.append(block)
    return torch.cat(blocks, dim=2)


def rows_ref(x: Tensor, norm: dict[str, Any], width: int) -> Tensor:
    """The same from x itself, in x's dtype: [N, 3, C]."""
    groups = x.unflatten(1, (-1, width)).flatten(2)
    mean = groups.mean(dim=2).repeat_interleave(width, dim=1)
    rstd = (groups.var(dim=2, unbiased=False) + EPS).rsqrt().repeat_interleave(width, dim=1)
    one = torch.ones_like(mean)
    scale, shift = (
        (one, 0 * one) if norm["scale"] is None else (1 + norm["scale"].to(x.dtype), norm["shift"].to(x.dtype))
    )
    a = rstd * norm["weight"].to(x.dtype) * scale
    return torch.stack([mean, a, norm["bias"].to(x.dtype) * scale + shift], dim=1)


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    ("channels", "width", "slots", "size", "block_c"),
    [
        ((32,), 4, (1,), (4, 4), 32),
        ((20,), 5, (3,), (7, 5), 16),  # groups across the blocks' edges, a ragged last slot
        ((5,), 1, (16,), (3, 3), 8),  # a group per channel; fewer pixels than slots
        ((6,), 6, (1,), (1, 1), 4),  # one group, wider than a block
        ((48, 24), 12, (16, 3), (7, 5), 32),
        ((32, 16), 12, (3, 16), (7, 5), 32),  # a group across the seam
        ((9, 3), 6, (2, 1), (5, 3), 4),
        ((1, 7), 2, (4, 4), (4, 4), 16),
        ((128, 256), 12, (16, 16), (16, 16), 64),
        ((300, 20), 320, (16, 5), (5, 5), 64),  # too wide for its slots to be taken at once
    ],
)
def test_rows_against_float64(channels, width, slots, size, block_c, modulated, mean, device):
    """Whatever straddles what: groups the seam, the block's edges, slots of different sizes."""
    parts = [make(device, 2, c, *size, mean=mean + i) for i, c in enumerate(channels)]
    total = sum(channels)
    norm = {
        "weight": make(device, total),
        "bias": make(device, 1, total)[0],
        "scale": make(device, 2, total, mean=0.0, dtype=torch.float16) if modulated else None,
        "shift": make(device, 1, total, mean=0.0) if modulated else None,
    }
    statistics = [statistics_of(part, s) for part, s in zip(parts, slots, strict=True)]
    found = rows(statistics, math.prod(size), norm, width, block_c)
    x = torch.cat(parts, dim=1)
    assert_as_exact_as_torch(found[..., :total], rows_ref(x, norm, width), rows_ref(x.double(), norm, width))
    assert (found[..., total:] == 0).all()


def test_a_nan_stays_in_its_group(device):
    x = make(device, 1, 24, 4, 4)
    norm = {"weight": make(device, 24), "bias": make(device, 24), "scale": None, "shift": None}
    x[0, 7, 2, 2] = float("nan")
    mean, a, b = rows([statistics_of(x, 3)], 16, norm, 6, 16)[0, :, :24]
    for line in (mean, a):
        assert line.isnan().nonzero().flatten().tolist() == [6, 7, 8, 9, 10, 11]
    assert b.isfinite().all()


def test_lanes_hold_the_whole_groups_of_every_block():
    assert norm_lanes([0, 64], 4, 64, 128) == (64, 16)
    assert norm_lanes([0], 12, 64, 384) == (128, 8)  # 6 groups of 12
    assert norm_lanes([64], 12, 64, 384) == (128, 8)  # channels 60 .. 131
    assert norm_lanes([0], 12, 64, 24) == (32, 2)  # no group beyond the last
    assert norm_lanes([32], 512, 32, 512) == (512, 1)
    assert norm_lanes([], 4, 64, 128) == (4, 1)
    for width, total, block_c in ((1, 20, 16), (3, 48, 32), (20, 640, 64), (5, 35, 8)):
        starts = range(0, total, block_c)
        lanes, padded_groups = norm_lanes(starts, width, block_c, total)
        for start in starts:
            first, stop = start // width, -(-min(start + block_c, total) // width)
            assert stop - first <= padded_groups
            assert (stop - first) * width <= lanes


MERGES = [
    # (slots, pixels, slots that are left)
    (1, 16, 1),
    (16, 100, 16),
    (17, 17 * 8, 9),
    (17, 35, 9),  # eight of the slots have no pixel
    (33, 1000, 16),
    (64, 64 * 64, 16),
    (512, 512 * 64, 16),
    (512, 512 * 64 - 63, 16),
    (600, 1201, 10),  # more rows than a program holds at once
    (1024, 1024 * 16 - 1, 16),
]


@pytest.mark.parametrize(("slots", "pixels", "left"), MERGES)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_merging_against_float64(slots, pixels, left, mean, small_gpu, device):
    statistics = statistics_of(make(device, 2, 20, 1, pixels, mean=mean), slots)
    merged = merge_statistics(statistics, pixels)
    assert merged.shape == (2, left, 2, 20)
    assert merged_slots(slots, pixels) == left
    if slots <= MAX_SLOTS:
        assert merged is statistics
        return
    plain, exact = merge_statistics_ref(statistics, pixels), merge_statistics_ref(statistics.double(), pixels)
    for moment in range(2):
        assert_as_exact_as_torch(merged[:, :, moment], plain[:, :, moment], exact[:, :, moment])


@pytest.mark.parametrize(("slots", "pixels", "left"), MERGES)
def test_the_reference_merges_alike(slots, pixels, left):
    x = make("cpu", 2, 5, 1, pixels)
    merged = merge_statistics_ref(statistics_of(x, slots).double(), pixels)
    torch.testing.assert_close(merged, statistics_of(x, left).double(), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_merged_slots_keep_the_rule_of_chunks():
    """A merged slot is a power of two of old ones, and what it covers is what its number says."""
    for slots in range(MAX_SLOTS + 1, 1100, 7):
        for pixels in range(1, 5000, 13):
            chunk, left = chunk_size(pixels, slots), merged_slots(slots, pixels)
            factor, rest = divmod(chunk_size(pixels, left), chunk)
            assert left <= MAX_SLOTS
            assert rest == 0, (slots, pixels)
            assert factor & (factor - 1) == 0, (slots, pixels)
            assert left * factor * chunk >= pixels, (slots, pixels)


def test_merging_gives_the_same_bits_every_time(device):
    statistics = statistics_of(make(device, 1, 20, 1, 2000), 500)
    first = merge_statistics(statistics, 2000)
    assert all(torch.equal(merge_statistics(statistics, 2000), first) for _ in range(2))


def test_no_images_are_merged(device):
    assert merge_statistics(torch.empty(0, 64, 2, 8, device=device), 64).shape == (0, 16, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_the_reference_takes_them_of_the_pixels(dtype):
    x = make("cpu", 2, 5, 7, 3, mean=30.0, dtype=dtype)
    found = channel_statistics_ref(x)
    assert (found.shape, found.dtype) == ((2, 1, 2, 5), torch.float32)
    torch.testing.assert_close(found, statistics_of(x, 1), rtol=2e-6, atol=0)


def norm_of(*parts: Tensor) -> Norm:
    channels = sum(part.shape[1] for part in parts)
    return Norm(torch.ones(channels), torch.zeros(channels), 2, EPS, True, tuple(statistics_of(p, 2) for p in parts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 5}, "groups must divide the 12 channels of the parts; found 5"),
        ({"groups": 0}, "groups must divide the 12 channels"),
        ({"weight": torch.zeros(11)}, r"weight must have shape \[12\]"),
        ({"bias": torch.zeros(1, 12)}, r"bias must have shape \[12\]"),
        ({"scale": torch.zeros(2, 12)}, "scale and shift go together"),
        ({"scale": torch.zeros(3, 12), "shift": torch.zeros(2, 12)}, r"scale must have shape \[2 or 1, 12\]"),
        ({"scale": torch.zeros(2, 12), "shift": torch.zeros(12)}, r"shift must have shape \[2 or 1, 12\]"),
        ({"statistics": ()}, "each of the 2 parts must have statistics; found 0"),
        ({"statistics": (torch.zeros(2, 1, 2, 8), torch.zeros(2, 1, 2, 5))}, r"float32 \[2, 1 .. 16, 2, 4\]; found"),
        ({"statistics": (torch.zeros(2, 17, 2, 8), torch.zeros(2, 1, 2, 4))}, r"found torch.float32 \[2, 17, 2, 8\]"),
        ({"statistics": (torch.zeros(2, 2, 8), torch.zeros(2, 1, 2, 4))}, r"found torch.float32 \[2, 2, 8\]"),
        ({"statistics": (torch.zeros(2, 1, 2, 8).half(), torch.zeros(2, 1, 2, 4))}, "found torch.float16"),
    ],
)
def test_what_a_norm_refuses(change, message):
    parts = torch.zeros(2, 8, 3, 3), torch.zeros(2, 4, 3, 3)
    norm = norm_of(*parts)
    check_norm(parts, norm)
    with pytest.raises(ValueError, match=message):
        check_norm(parts, norm._replace(**change))


def test_a_norm_refuses_images_whose_slots_it_cannot_count():
    huge = torch.zeros(1, 1, 1, 1).expand(1, 2, 2**14, 2**14)
    norm = norm_of(torch.zeros(1, 2, 1, 1))
    with pytest.raises(ValueError, match="an image must have at most 134217728 pixels; found 16384 x 16384"):
        check_norm([huge], norm)


@pytest.mark.gpu
@pytest.mark.parametrize(("slots", "pixels"), [(512, 65536), (256, 16384), (4096, 65536)])
def test_merging_of_real_layers(slots, pixels):
    x = make("cuda", 2, 128, 1, pixels, mean=3.0)
    statistics = statistics_of(x, slots)
    first = merge_statistics(statistics, pixels)
    torch.testing.assert_close(first, statistics_of(x, first.shape[1]), rtol=2e-6, atol=1e-6)
    assert all(torch.equal(merge_statistics(statistics, pixels), first) for _ in range(20))
