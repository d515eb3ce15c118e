"""The pass that normalises by given statistics, concatenates, activates and resamples, against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.kernels import backend
from ddpm.kernels import group_norm_apply as module
from ddpm.kernels.channel_statistics import Norm
from ddpm.kernels.group_norm_apply import group_norm_apply, group_norm_apply_ref, plan
from tests.slots import statistics_of
from tests.tolerances import assert_as_exact_as_torch

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RESAMPLES = [None, "up", "down"]
SMALL = backend.Target("small", 4, 101376, (8, 6))


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for 4 multiprocessors: few programs, each with several tiles; the interpreter runs them one by one."""
    monkeypatch.setattr(backend, "target", lambda device: SMALL)


def make(device: str, *shape: int, dtype: torch.dtype = torch.float32, mean: float = 1.0) -> Tensor:
    """Normal numbers with a standard deviation of 1 around `mean`; images lie channels_last."""
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    x = (torch.randn(shape, generator=generator) + mean).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def norm_of(
    parts: Sequence[Tensor], groups: int, slots: Sequence[int] = (1, 1), rows: int | None = None, **changes: Any
) -> Norm:
    """A norm of these parts; `rows` (N by default) is the first dimension of scale and shift."""
    n, device = len(parts[0]), str(parts[0].device)
    rows = n if rows is None else rows
    channels = sum(part.shape[1] for part in parts)
    norm = Norm(
        weight=make(device, channels),
        bias=make(device, 1, channels)[0],
        groups=groups,
        eps=EPS,
        silu=True,
        statistics=tuple(statistics_of(part, count) for part, count in zip(parts, slots, strict=False)),
        scale=make(device, 2, rows, channels, mean=0.0)[0],
        shift=make(device, 3, rows, channels, mean=0.0)[1],
    )
    return norm._replace(**changes)


def ref(parts: Sequence[Tensor], norm: Norm, resample: str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    x, skip = parts if len(parts) == 2 else (*parts, None)
    return group_norm_apply_ref(x, skip, *arguments_of(norm), resample, dtype or x.dtype)


def arguments_of(norm: Norm) -> tuple[Any, ...]:
    """In the order of the operator's schema."""
    statistics = (*norm.statistics, None)[:2]
    return norm.weight, norm.bias, *statistics, norm.scale, norm.shift, norm.groups, norm.eps, norm.silu


def exact(parts: Sequence[Tensor], norm: Norm, resample: str | None = None) -> Tensor:
    """The result in float64, by the statistics of the parts."""
    wide = norm._replace(**{k: v.double() for k, v in norm._asdict().items() if isinstance(v, Tensor)})
    return ref([part.double() for part in parts], wide, resample)


def check(parts: Sequence[Tensor], norm: Norm, resample: str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    y = group_norm_apply(parts, norm, resample=resample, dtype=dtype)
    assert_as_exact_as_torch(y, ref(parts, norm, resample, dtype), exact(parts, norm, resample))
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize(
    ("channels", "groups", "slots", "size"),
    [
        ((32,), 32, (1,), (4, 4)),
        ((20,), 4, (3,), (7, 5)),
        ((48, 24), 6, (16, 3), (7, 5)),  # the third and the fifth of six groups of 12 lie across blocks' edges
        ((32, 16), 4, (3, 16), (6, 9)),  # a group of 12 across the seam
        ((9, 3), 2, (2, 1), (5, 3)),
    ],
)
def test_against_float64(channels, groups, slots, size, resample, dtype, small_gpu, device):
    parts = [make(device, 2, c, *size, dtype=dtype, mean=1.0 + i) for i, c in enumerate(channels)]
    check(parts, norm_of(parts, groups, slots), resample)


@pytest.mark.parametrize("resample", RESAMPLES)
def test_a_mean_far_from_zero(resample, small_gpu, device):
    parts = [make(device, 1, c, 16, 16, mean=30.0) for c in (16, 8)]
    check(parts, norm_of(parts, 3, (16, 4), scale=None, shift=None), resample)


def test_a_mean_very_far_from_zero(small_gpu, device):
    """1000 standard deviations off: only roundings of the mean itself remain, a few units of 6e-5."""
    parts = [make(device, 1, c, 16, 16, mean=-1000.0) for c in (16, 8)]
    norm = norm_of(parts, 3, (16, 4), scale=None, shift=None)
    assert (group_norm_apply(parts, norm) - exact(parts, norm)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("channels", "groups", "size"),
    [
        ((1,), 1, (1, 1)),  # a variance of nothing
        ((1, 1), 1, (3, 3)),
        ((6,), 6, (4, 4)),
        ((2, 3), 1, (5, 1)),
        ((20,), 2, (1, 9)),
        ((130,), 2, (3, 3)),  # a group wider than a block
        ((8, 100), 27, (2, 2)),  # more blocks in the second part
    ],
)
def test_unusual_shapes(channels, groups, size, small_gpu, device):
    parts = [make(device, 1, c, *size) for c in channels]
    check(parts, norm_of(parts, groups))
    check(parts, norm_of(parts, groups), "up")


@pytest.mark.parametrize("resample", RESAMPLES)
def test_programs_of_many_tiles(resample, small_gpu, device):
    height, width = (140, 122) if resample == "down" else (70, 61)  # of which as many pixels are left
    parts = [make(device, 1, c, height, width, dtype=torch.float16) for c in (24, 40)]
    p = plan(1, (24, 40), 8, 70 * 61, 4)
    assert p.tiles > 1
    assert p.pixel_blocks > 1
    assert p.pixel_blocks * p.tiles * p.block_p > 70 * 61
    check(parts, norm_of(parts, 8, (16, 7)), resample)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_combination_of_options(silu, modulated, rows, small_gpu, device):
    parts = [make(device, 2, 12, 5, 3, dtype=torch.float16)]
    absent = {} if modulated else {"scale": None, "shift": None}
    check(parts, norm_of(parts, 3, (2,), rows, silu=silu, **absent))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resample", RESAMPLES)
def test_the_result_may_have_another_dtype(dtype, resample, small_gpu, device):
    """float32 for the last convolution: the activated values are then not rounded at all."""
    parts = [make(device, 2, 16, 4, 6, dtype=torch.bfloat16)]
    y = check(parts, norm_of(parts, 4), resample, dtype)
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_weights_of_any_dtype_and_stride(dtype, small_gpu, device):
    parts = [make(device, 3, 8, 5, 3)]
    row = make(device, 3, 50, dtype=dtype)
    weight = make(device, 16, dtype=dtype)[::2]
    check(parts, norm_of(parts, 2, scale=row[:, 3:11], shift=row[:, ::3][:, :8], weight=weight, bias=weight))


def test_views_are_read_where_they_lie(small_gpu, device, monkeypatch):
    wide = make(device, 2, 40, 6, 4, dtype=torch.float16)
    slices = [wide[:, 8:24], wide[:, 27:36]]  # the second begins at an odd place
    one_pixel = make(device, 1, 12, 1, 1).expand(2, 12, 5, 3)
    with monkeypatch.context() as patch:
        patch.setattr(
            Tensor, "contiguous", lambda x, **_: pytest.fail("a copy") if x.ndim == 4 and x.shape[1] > 8 else x
        )
        views = [group_norm_apply(parts, norm_of(parts, 1)) for parts in (slices, [one_pixel])]
    for parts, y in zip((slices, [one_pixel]), views, strict=True):
        assert_as_exact_as_torch(y, ref(parts, norm_of(parts, 1)), exact(parts, norm_of(parts, 1)))


def test_other_layouts_are_copied(small_gpu, device):
    nchw = [make(device, 2, 12, 6, 4).contiguous(), make(device, 2, 6, 6, 4)]
    pixels = [make(device, 2, 12, 6, 8)[:, :, :, ::2], make(device, 2, 6, 12, 4)[:, :, ::2]]
    for parts in (nchw, pixels):
        for resample in RESAMPLES:
            check(parts, norm_of(parts, 3), resample)


def test_statistics_past_the_last_pixel_may_hold_anything(small_gpu, device):
    parts = [make(device, 1, 8, 3, 3)]
    norm = norm_of(parts, 2, (16,))  # nine slots of a pixel
    assert norm.statistics[0][:, 9:].isnan().all()
    check(parts, norm)


@pytest.mark.parametrize("resample", RESAMPLES)
def test_no_images(resample, small_gpu, device):
    parts = [make(device, 0, 8, 6, 4), make(device, 0, 4, 6, 4)]
    y = group_norm_apply(parts, norm_of(parts, 3, rows=1), resample=resample)
    assert y.shape == ref(parts, norm_of(parts, 3, rows=1), resample).shape


@pytest.mark.parametrize("resample", RESAMPLES)
def test_nothing_is_written_outside(resample, small_gpu, device, monkeypatch):
    guards: list[Tensor] = []

    def guarded_empty(shape: Sequence[int], *, memory_format: torch.memory_format, **options: Any) -> Tensor:
        n, c, h, w = shape
        buffer = torch.full((math.prod(shape) + 128,), 7.0, **options)
        guards.append(buffer)
        return buffer[64:-64].view(n, h, w, c).permute(0, 3, 1, 2)

    parts = [make(device, 2, 12, 5, 3), make(device, 2, 3, 5, 3)]
    norm = norm_of(parts, 5)
    plain = ref(parts, norm, resample)
    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "empty", guarded_empty)
        y = group_norm_apply(parts, norm, resample=resample)
    assert_as_exact_as_torch(y, plain, exact(parts, norm, resample))
    assert len(guards) == 1
    assert (guards[0][:64] == 7).all()
    assert (guards[0][-64:] == 7).all()


def test_a_nan_stays_in_its_group(small_gpu, device):
    parts = [make(device, 2, 8, 5, 3), make(device, 2, 4, 5, 3)]
    parts[0][1, 7, 2, 2] = float("nan")
    y = group_norm_apply(parts, norm_of(parts, 2))  # groups of 6: across the seam
    assert y[1, 6:].isnan().all()
    assert y[0].isfinite().all()
    assert y[1, :6].isfinite().all()


@pytest.mark.parametrize("resample", RESAMPLES)
def test_the_same_bits_every_time(resample, small_gpu, device):
    parts = [make(device, 2, 12, 16, 16), make(device, 2, 6, 16, 16)]
    norm = norm_of(parts, 3, (16, 5))
    first = group_norm_apply(parts, norm, resample=resample)
    assert all(torch.equal(group_norm_apply(parts, norm, resample=resample), first) for _ in range(2))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("resample", RESAMPLES)
def test_the_reference_is_torchs_operations(resample, dtype):
    parts = [make("cpu", 2, 8, 5, 6).to(dtype), make("cpu", 2, 4, 5, 6).to(dtype)]
    norm = norm_of(parts, 3)
    h = F.group_norm(torch.cat(parts, dim=1).double(), 3, norm.weight.double(), norm.bias.double(), EPS)
    h = F.silu(h * (1 + norm.scale.double()[:, :, None, None]) + norm.shift.double()[:, :, None, None])
    if resample == "up":
        h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    elif resample == "down":
        h = h[:, :, :4].unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean(dim=(3, 5))
    y = ref(parts, norm, resample)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(y.double(), h, rtol=tolerance, atol=tolerance)


X = torch.zeros(2, 8, 4, 4)


@pytest.mark.parametrize(
    ("parts", "resample", "message"),
    [
        ([], None, "parts must be one or two tensors; found 0"),
        ([X, X, X], None, "parts must be one or two tensors; found 3"),
        ([X[0]], None, r"x must be \[N, C, H, W\]"),
        ([X, X[:, :, :2]], None, "parts must be alike but for their channels; found .* and torch.float32"),
        ([X, X[:1]], None, "parts must be alike"),
        ([X, X.half()], None, "parts must be alike"),
        ([X], "both", 'resample must be None, "up" or "down"; found \'both\''),
        ([X[:, :, :1]], "down", "parts must have at least 2 x 2 pixels to be halved; found 1 x 4"),
    ],
)
def test_what_it_refuses(parts, resample, message):
    good = [part for part in parts if part.ndim == 4][:2] or [X]
    with pytest.raises(ValueError, match=message):
        group_norm_apply(parts, norm_of(good, 4, rows=1), resample=resample)


def test_it_refuses_a_norm_of_other_parts():
    with pytest.raises(ValueError, match="groups must divide the 8 channels"):
        group_norm_apply([X], norm_of([X], 3))
    with pytest.raises(ValueError, match="each of the 2 parts must have statistics"):
        group_norm_apply([X, X], norm_of([X, X], 4)._replace(statistics=(statistics_of(X, 1),)))


def rule_cases() -> list[tuple[int, tuple[int, ...], int, int, int]]:
    """(N, channels, width, pixels, multiprocessors), from tiny to huge."""
    layers = [((32,), 1), ((96,), 3), ((128,), 4), ((256, 128), 12), ((192, 96), 9), ((5,), 5), ((20, 1), 3)]
    return [
        (n, channels, width, pixels, sms)
        for n in (1, 3, 64, 256)
        for channels, width in layers
        for pixels in (1, 15, 64, 1024, 4096, 65536)
        for sms in (4, 108, 132)
    ]


def test_the_rule_covers_everything_once():
    for case in rule_cases():
        n, channels, width, pixels, sms = case
        p = plan(*case)
        assert p.blocks == sum(-(-c // p.block_c) for c in channels), case
        assert p.block_c & (p.block_c - 1) == p.block_p & (p.block_p - 1) == 0, case
        assert p.block_c * p.block_p <= 4096, case
        assert (p.pixel_blocks - 1) * p.tiles * p.block_p < pixels <= p.pixel_blocks * p.tiles * p.block_p, case
        assert p.lanes >= width, case
        assert 1 <= p.num_warps <= 8, case
        # Several tiles only where programs are plenty.
        assert p.tiles == 1 or p.programs(n) >= 8 * sms, case


def test_the_rule_repays_the_norm_at_large_batch():
    for channels, size in (((128,), 32), ((256, 128), 32), ((256,), 16), ((256, 256), 16)):
        p = plan(256, channels, sum(channels) // 32, size * size, 132)
        assert p.tiles * p.block_p * p.block_c >= 2 * 4096, (channels, size)


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("channels", [(12,), (8, 4)])
def test_the_operator_is_well_registered(channels, resample, small_gpu, device):
    parts = [make(device, 2, c, 6, 4) for c in channels]
    norm = norm_of(parts, 3)
    inputs = ((*parts, None)[:2]) + arguments_of(norm) + (resample, torch.float32)
    torch.library.opcheck(torch.ops.ddpm.group_norm_apply, inputs)


def test_it_compiles_as_one_graph_of_the_operator(small_gpu, device):
    parts = [make(device, 2, 8, 6, 4), make(device, 2, 4, 6, 4)]
    norm = norm_of(parts, 3)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, skip: group_norm_apply([x * 1, skip], norm, resample="up") + 1, backend="aot_eager"
    )
    assert torch.equal(compiled(*parts), group_norm_apply(parts, norm, resample="up") + 1)


def test_work_is_counted_without_data():
    gpu = backend.Target("some", 132, 232448, (9, 0))
    with backend.assume(gpu):
        parts = [torch.empty(256, c, 32, 32, device="meta", dtype=torch.float16) for c in (256, 128)]
        statistics = [torch.empty(256, 8, 2, c, device="meta") for c in (256, 128)]
        row = torch.empty(384, device="meta")
        arguments = (row, row, *statistics, None, None, 32, EPS, True, "up", torch.float16)
        work = backend.works["group_norm_apply"](*parts, *arguments)
        y = torch.ops.ddpm.group_norm_apply(*parts, *arguments)
    assert (work.launches, work.flops, work.extra_bytes) == (1, 0, 0)
    assert work.programs == plan(256, (256, 128), 12, 1024, 132).programs(256)
    assert y.shape == (256, 384, 64, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize(
    ("n", "channels", "size"),
    [(256, (128,), 32), (64, (256, 128), 32), (64, (256, 256), 16), (8, (192, 96), 64), (1, (128, 128), 256)],
)
def test_layers_of_real_networks(n, channels, size, resample, dtype):
    parts = [make("cuda", n, c, size, size, dtype=dtype) for c in channels]
    norm = norm_of(parts, 32, (16, 4))
    first = check(parts, norm, resample)
    for _ in range(20):
        assert torch.equal(group_norm_apply(parts, norm, resample=resample), first)


@pytest.mark.gpu
def test_a_replayed_graph_does_what_a_launch_does():
    parts = [make("cuda", 4, 128, 32, 32), make("cuda", 4, 64, 32, 32)]
    norm = norm_of(parts, 32, (16, 4))
    expected = group_norm_apply(parts, norm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group_norm_apply(parts, norm)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    shape = (3, 32, 5000, 5000)
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * math.prod(shape) * 2:
        pytest.skip("needs 15 GB of GPU memory")
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=torch.channels_last).normal_()
    statistics = torch.zeros(3, 1, 2, 32, device="cuda")
    statistics[:, :, 1] = 5000 * 5000  # the variance of these numbers, within rounding
    norm = Norm(torch.ones(32).cuda(), torch.zeros(32).cuda(), 32, EPS, True, (statistics,))
    last = norm._replace(statistics=(statistics[2:],))
    y = group_norm_apply([x], norm)[2:]
    assert torch.equal(y, group_norm_apply([x[2:]], last))
    assert (y - F.silu(x[2:])).abs().max() < 1e-2
