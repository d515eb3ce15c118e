"""GroupNorm + scale, shift + SiLU against float64, in both forms, both layouts, and any shape."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.kernels import backend
from ddpm.kernels import group_norm_silu as module
from ddpm.kernels.group_norm_silu import Plan, group_norm_silu, group_norm_silu_ref, plan
from tests.tolerances import assert_as_exact_as_torch

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for 4 multiprocessors: few programs, each with several tiles; the interpreter runs them one by one."""
    monkeypatch.setattr(backend, "sm_count", lambda device: 4)


@pytest.fixture(params=["one_pass", "two_pass"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_gpu: None) -> str:
    """Forces a form, whatever the rule would choose."""
    forced = functools.partial(plan, one_pass=request.param == "one_pass")
    monkeypatch.setattr(
        module, "plan", lambda n, channels, pixels, groups, sms, _: forced(n, channels, pixels, groups, sms)
    )
    return request.param


def make(
    device: str, *shape: int, dtype: torch.dtype = torch.float32, layout: str = "nchw", mean: float = 1.0
) -> Tensor:
    """Normal numbers with a standard deviation of 1 around `mean`."""
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    x = torch.randn(shape, generator=generator) + mean
    return x.to(device, dtype).contiguous(memory_format=LAYOUTS[layout] if len(shape) == 4 else torch.contiguous_format)


def arguments(x: Tensor, groups: int, *, rows: int | None = None, **options: Any) -> dict[str, Any]:
    """All arguments; `rows` (N by default) is the first dimension of scale, shift and add."""
    n, c = x.shape[:2]
    rows = n if rows is None else rows
    device = str(x.device)
    return {
        "x": x,
        "num_groups": groups,
        "weight": make(device, c),
        "bias": make(device, 1, c)[0],
        "eps": EPS,
        "scale": make(device, 2, rows, c, mean=0.0)[0],
        "shift": make(device, 3, rows, c, mean=0.0)[1],
        "add": make(device, 4, rows, c)[2],
    } | options


def exact(args: dict[str, Any]) -> Tensor:
    """The result in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in args.items()}
    return group_norm_silu_ref(**wide)


def check(args: dict[str, Any]) -> Tensor:
    y = group_norm_silu(**args)
    assert_as_exact_as_torch(y, group_norm_silu_ref(**args), exact(args))
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((3, 32, 7, 7), 32),
        ((1, 96, 5, 3), 32),
        ((3, 192, 3, 5), 32),
        ((1, 320, 4, 4), 32),
        ((1, 384, 7, 7), 32),
        ((2, 24, 9, 8), 8),
    ],
)
def test_against_float64(shape, groups, dtype, layout, form, device):
    x = make(device, *shape, dtype=dtype, layout=layout)
    y = check(arguments(x, groups))
    assert y.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 1, 1), 1),  # a variance of nothing
        ((2, 8, 1, 1), 4),
        ((1, 6, 4, 4), 6),  # a group per channel
        ((1, 6, 4, 4), 1),
        ((2, 3, 5, 1), 3),
        ((1, 20, 1, 9), 2),
        ((1, 130, 3, 3), 2),  # a group wider than a block would be
    ],
)
def test_unusual_shapes(shape, groups, layout, form, device):
    check(arguments(make(device, *shape, layout=layout), groups))


def test_an_image_of_many_tiles(small_gpu, device):
    x = make(device, 1, 16, 50, 41, layout="nhwc")
    p = plan(1, 16, 50 * 41, 4, 4)
    assert p.chunk > p.block_p
    assert p.splits * p.chunk > 50 * 41
    check(arguments(x, 4))
    check(arguments(x.contiguous(), 4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [30.0, 1000.0, -1000.0])
def test_a_mean_far_from_zero(mean, layout, form, device):
    """1000 standard deviations off: E[x^2] - mean^2 in float32 would have no correct digit."""
    x = make(device, 1, 16, 16, 16, layout=layout, mean=mean)
    args = arguments(x, 4, add=None, scale=None, shift=None)
    y = check(args)
    assert (y - exact(args)).abs().max() < 1e-3


def test_a_mean_far_from_zero_that_differs_between_the_parts(form, device):
    x = make(device, 1, 8, 16, 16, mean=0.0)
    x += torch.linspace(-500, 500, 256, device=device).view(1, 1, 16, 16)
    x[:, 4:] += 1000
    check(arguments(x, 2, add=None))


def test_constant_images(form, device):
    """No variance at all: the result is the bias, not noise blown up by 1 / sqrt(eps)."""
    x = torch.full((1, 8, 8, 8), 3.0, device=device)
    args = arguments(x, 2, add=None, scale=None, shift=None, silu=False)
    assert torch.allclose(group_norm_silu(**args), args["bias"].view(1, 8, 1, 1).expand_as(x), atol=1e-5)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("present", [(), ("add",), ("scale", "shift"), ("add", "scale", "shift")], ids="-".join)
@pytest.mark.parametrize("rows", [1, 2])
def test_every_combination_of_options(silu, present, rows, form, device):
    x = make(device, 2, 12, 5, 3, dtype=torch.float16, layout="nhwc")
    absent = dict.fromkeys({"add", "scale", "shift"} - set(present))
    check(arguments(x, 3, rows=rows, silu=silu, **absent))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_may_be_slices_of_a_longer_one(dtype, rows, form, device):
    x = make(device, 3, 8, 5, 3, layout="nhwc")
    row = make(device, rows, 50, dtype=dtype)
    assert rows == 1 or row[:, 3:11].stride() == (50, 1)
    check(arguments(x, 2, add=row[:, 3:11], scale=row[:, 11:19], shift=row[:, 40:48]))
    every_third = row[:, ::3][:, :8]
    check(arguments(x, 2, add=every_third, scale=every_third, shift=row[:, 40:48]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_another_dtype(dtype, form, device):
    x = make(device, 1, 8, 5, 3, dtype=torch.float16)
    check(arguments(x, 2, weight=make(device, 8, dtype=dtype), bias=make(device, 16, dtype=dtype)[::2]))


def test_views_are_read_where_they_lie(form, device):
    wide = make(device, 2, 24, 5, 3, dtype=torch.float16, layout="nhwc")
    channels = wide[:, 8:20]
    y = check(arguments(channels, 3))
    assert y.is_contiguous(memory_format=torch.channels_last)
    rows = make(device, 2, 12, 10, 3)[:, :, 2:7]  # H and W still collapse
    assert check(arguments(rows, 3)).is_contiguous()
    pixels = wide[:, :, ::2, ::2]  # they do not
    assert check(arguments(pixels, 3)).is_contiguous(memory_format=torch.channels_last)
    assert check(arguments(make(device, 2, 12, 6, 6)[:, :, ::2, ::2], 3)).is_contiguous()
    one_pixel = make(device, 1, 12, 1, 1).expand(2, 12, 5, 3)
    check(arguments(one_pixel, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_images(layout, dtype, form, device):
    x = make(device, 0, 32, 7, 7, dtype=dtype, layout=layout)
    y = group_norm_silu(**arguments(x, 8, rows=1))
    assert (y.shape, y.dtype) == (x.shape, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_written_outside(layout, form, device, monkeypatch):
    guards: list[Tensor] = []

    def guarded_empty(
        shape: Any, *, memory_format: torch.memory_format = torch.contiguous_format, **options: Any
    ) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 128,), 7.0, **options)
        guards.append(buffer)
        inner = buffer[64 : 64 + size]
        if memory_format == torch.channels_last:
            n, c, h, w = shape
            return inner.view(n, h, w, c).permute(0, 3, 1, 2)
        return inner.view(shape)

    args = arguments(make(device, 2, 12, 5, 3, layout=layout), 3)
    plain = group_norm_silu_ref(**args)
    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "empty", guarded_empty)
        y = group_norm_silu(**args)
    assert_as_exact_as_torch(y, plain, exact(args))
    assert len(guards) == (1 if form == "one_pass" else 2)
    for buffer in guards:
        assert (buffer[:64] == 7).all()
        assert (buffer[-64:] == 7).all()


def test_a_nan_stays_in_its_group(form, device):
    x = make(device, 2, 12, 5, 3)
    x[1, 5, 2, 2] = float("nan")
    y = group_norm_silu(**arguments(x, 3))
    assert y[1, 4:8].isnan().all()
    assert y[0].isfinite().all()
    assert y[1, :4].isfinite().all()
    assert y[1, 8:].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_every_time(layout, form, device):
    args = arguments(make(device, 3, 12, 16, 16, layout=layout), 3)
    first = group_norm_silu(**args)
    assert all(torch.equal(group_norm_silu(**args), first) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_torch_group_norm(dtype, layout):
    x = make("cpu", 2, 12, 5, 3, layout=layout).to(dtype)
    args = arguments(x, 3)
    add, scale, shift = (args[name].double()[:, :, None, None] for name in ("add", "scale", "shift"))
    h = F.group_norm(x.double() + add, 3, args["weight"].double(), args["bias"].double(), EPS)
    h = F.silu(h * (1 + scale) + shift)
    y = group_norm_silu_ref(**args)
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(y.double(), h, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12, 15)}, r"x must be \[N, C, H, W\]"),
        ({"num_groups": 5}, "num_groups must divide the 12 channels"),
        ({"num_groups": 0}, "num_groups must divide the 12 channels"),
        ({"weight": torch.zeros(11)}, r"weight must have shape \[12\]"),
        ({"bias": torch.zeros(1, 12)}, r"bias must have shape \[12\]"),
        ({"scale": None}, "scale and shift go together"),
        ({"add": torch.zeros(3, 12)}, r"add must have shape \[2 or 1, 12\]"),
        ({"shift": torch.zeros(12)}, r"shift must have shape \[2 or 1, 12\]"),
    ],
)
def test_what_it_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**(arguments(make("cpu", 2, 12, 5, 3), 3) | change))


def test_the_kernel_refuses_float64(device):
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16"):
        group_norm_silu(**arguments(make(device, 2, 12, 5, 3).double(), 3))


def rule_cases() -> list[tuple[int, int, int, int, int]]:
    """(N, channels, pixels, groups, multiprocessors), from tiny to huge, with widths that are no powers of two."""
    layers = [
        (32, 32),
        (96, 32),
        (128, 32),
        (192, 32),
        (320, 32),
        (384, 32),
        (512, 32),
        (1536, 32),
        (64, 8),
        (9, 3),
        (4096, 1),
    ]
    return [
        (n, channels, pixels, groups, sms)
        for n in (0, 1, 3, 64, 256)
        for channels, groups in layers
        for pixels in (1, 15, 49, 64, 256, 1024, 4096, 65536)
        for sms in (4, 108, 132)
    ]


def test_the_rule_covers_everything_once():
    for case in rule_cases():
        n, channels, pixels, groups, sms = case
        p = plan(n, channels, pixels, groups, sms)
        width = channels // groups
        assert p.groups_per_block * width <= p.block_c, case
        assert p.block_c & (p.block_c - 1) == p.block_p & (p.block_p - 1) == 0, case
        assert p.block_c * p.block_p <= 8192, case
        if p.one_pass:
            assert (p.splits, p.chunk) == (1, pixels), case
            assert p.block_p >= pixels, case
        else:
            assert p.chunk % p.block_p == 0, case
            assert (p.splits - 1) * p.chunk < pixels <= p.splits * p.chunk, case
        # Lanes that hold no channel: less than half.
        blocks = -(-groups // p.groups_per_block)
        assert channels / (blocks * p.block_c) > 0.5, case


def test_the_rule_fills_a_gpu_at_batch_1():
    split = plan(1, 128, 32 * 32, 32, 132)
    assert not split.one_pass
    assert split.programs(1, 32) >= 100
    for channels, size in ((128, 64), (256, 32), (256, 64), (512, 32)):
        p = plan(1, channels, size * size, 32, 132)
        assert p.programs(1, 32) >= 100, (channels, size)


def test_the_rule_reads_once_where_the_batch_fills_the_gpu():
    assert plan(256, 128, 32 * 32, 32, 132).one_pass
    assert plan(256, 256, 16 * 16, 32, 132).one_pass
    assert not plan(256, 128, 64 * 64, 32, 132).one_pass  # 16384 elements a group


def test_the_rule_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="does not fit in one program"):
        plan(1, 128, 64 * 64, 32, 132, one_pass=True)
    assert isinstance(plan(1, 128, 8 * 8, 32, 132, one_pass=False), Plan)


def compiled(backend_name: str) -> Callable[..., Tensor]:
    def norm(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return group_norm_silu(x * 1, *args, **options) + 1

    torch.compiler.reset()
    return torch.compile(norm, fullgraph=True, dynamic=False, backend=backend_name)


def test_it_compiles_as_one_graph_of_the_operator(small_gpu, device):
    args = arguments(make(device, 2, 12, 5, 3, layout="nhwc"), 3)
    y = compiled("aot_eager")(**args)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, group_norm_silu(**args) + 1)


@pytest.mark.skipif(backend.INTERPRET, reason="the reference's process")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_reference_compiles():
    args = arguments(make("cpu", 2, 12, 5, 3, layout="nhwc"), 3)
    y = compiled("inductor")(**args)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_exact_as_torch(y - 1, group_norm_silu_ref(**args), exact(args))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operator_is_well_registered(layout, small_gpu, device):
    args = arguments(make(device, 2, 12, 5, 3, layout=layout), 3, silu=True)
    order = ("x", "num_groups", "weight", "bias", "eps", "scale", "shift", "add", "silu")
    torch.library.opcheck(torch.ops.ddpm.group_norm_silu, tuple(args[name] for name in order))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 128, 32, 32), (64, 256, 16, 16), (8, 192, 64, 64), (16, 384, 32, 32), (1, 320, 256, 256)]
)
def test_layers_of_real_networks(shape, layout, dtype):
    args = arguments(make("cuda", *shape, dtype=dtype, layout=layout), 32)
    first = check(args)
    for _ in range(20):
        assert torch.equal(group_norm_silu(**args), first)


@pytest.mark.gpu
def test_a_replayed_graph_does_what_a_launch_does():
    args = arguments(make("cuda", 1, 128, 32, 32, layout="nhwc"), 32)
    expected = group_norm_silu(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group_norm_silu(**args)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_elements(layout):
    shape = (3, 32, 5000, 5000)
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * math.prod(shape) * 2:
        pytest.skip("needs 15 GB of GPU memory")
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=LAYOUTS[layout]).normal_()
    args = arguments(x, 32)
    last = args | {"x": x[2:]} | {name: args[name][2:] for name in ("scale", "shift", "add")}
    y = group_norm_silu(**args)[2:]
    assert (y - group_norm_silu(**last)).abs().max() < 1e-2


@pytest.mark.gpu
def test_a_launch_runs_on_its_tensors_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    torch.cuda.set_device(0)
    first, second = (group_norm_silu(**arguments(make(d, 2, 96, 7, 7), 32)) for d in ("cuda:0", "cuda:1"))
    assert torch.equal(first.cpu(), second.cpu())
