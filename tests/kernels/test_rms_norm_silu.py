"""RMSNorm over channels + scale, shift + SiLU + residual against float64, in both layouts, and any shape."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.kernels import backend
from ddpm.kernels import rms_norm_silu as module
from ddpm.kernels.rms_norm_silu import plan, rms_norm_silu, rms_norm_silu_ref
from tests.tolerances import assert_as_exact_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
OPTIONS = ("scale", "shift", "add", "residual")


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for 4 multiprocessors: few programs, of several pixels each; the interpreter runs them one by one."""
    monkeypatch.setattr(backend, "sm_count", lambda device: 4)


def make(device: str, *shape: int, dtype: torch.dtype = torch.float32, layout: str = "nchw", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape) + len(shape))
    x = torch.randn(shape, generator=generator)
    return x.to(device, dtype).contiguous(memory_format=LAYOUTS[layout] if len(shape) == 4 else torch.contiguous_format)


def arguments(x: Tensor, *, rows: int | None = None, **options: Any) -> dict[str, Any]:
    """All arguments; `rows` (N by default) is the first dimension of scale, shift and add."""
    n, c = x.shape[:2]
    rows = n if rows is None else rows
    device = str(x.device)
    return {
        "x": x,
        "weight": 1 + make(device, c) / 2,
        "scale": make(device, rows, c, seed=1),
        "shift": make(device, rows, c, seed=2),
        "add": make(device, rows, c, seed=3),
        "residual": make(device, *x.shape, seed=4).to(x.dtype).contiguous(memory_format=backend.memory_format(x)),
    } | options


def plain(x: Tensor, **options: Any) -> dict[str, Any]:
    """The norm alone: no options, weights of 1."""
    weight = torch.ones(x.shape[1], device=x.device)
    return {"x": x, "weight": weight, **dict.fromkeys(OPTIONS), "silu": False} | options


def exact(args: dict[str, Any]) -> Tensor:
    """The result in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in args.items()}
    return rms_norm_silu_ref(**wide)


def check(args: dict[str, Any]) -> Tensor:
    y = rms_norm_silu(**args)
    assert_as_exact_as_torch(y, rms_norm_silu_ref(**args), exact(args))
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 9, 7), (1, 32, 16, 16), (3, 48, 7, 7), (1, 64, 9, 5), (2, 130, 5, 3), (1, 512, 4, 4), (2, 1024, 3, 3)],
)
def test_against_float64(shape, dtype, layout, small_gpu, device):
    x = make(device, *shape, dtype=dtype, layout=layout)
    y = check(arguments(x))
    assert y.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 1, 8, 5), (2, 8, 1, 1), (2, 3, 5, 1), (1, 20, 1, 9), (1, 4096, 1, 1)]
)
def test_unusual_shapes(shape, layout, small_gpu, device):
    check(arguments(make(device, *shape, layout=layout)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [4097, 8200])
def test_more_channels_than_a_program_holds(channels, layout, dtype, small_gpu, device):
    x = make(device, 1, channels, 1, 3, dtype=dtype, layout=layout)
    assert plan(1, channels, 3, 4).blocks > 1
    check(arguments(x))
    check(plain(x))


def test_many_programs_of_many_pixels(small_gpu, device):
    x = make(device, 2, 16, 50, 41, layout="nhwc")
    assert 1 < plan(2, 16, 50 * 41, 4).block_p < 50 * 41
    check(arguments(x))
    check(arguments(x.contiguous()))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    "present",
    [(), ("add",), ("residual",), ("scale", "shift"), ("add", "residual"), ("scale", "shift", "residual"), OPTIONS],
    ids="-".join,
)
@pytest.mark.parametrize("rows", [1, 2])
def test_every_combination_of_options(silu, present, rows, small_gpu, device):
    x = make(device, 2, 12, 5, 3, dtype=torch.float16, layout="nhwc")
    check(arguments(x, rows=rows, silu=silu, **dict.fromkeys(set(OPTIONS) - set(present))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_may_be_slices_of_a_longer_one(dtype, rows, small_gpu, device):
    x = make(device, 3, 8, 5, 3, layout="nhwc")
    row = make(device, rows, 50, dtype=dtype)
    assert rows == 1 or row[:, 3:11].stride() == (50, 1)
    check(arguments(x, add=row[:, 3:11], scale=row[:, 11:19], shift=row[:, 40:48]))
    every_third = row[:, ::3][:, :8]
    check(arguments(x, add=every_third, scale=every_third, shift=row[:, 40:48]))


def test_rows_of_one_and_of_many_mix(small_gpu, device):
    x = make(device, 3, 8, 5, 3, layout="nhwc")
    check(arguments(x, add=make(device, 1, 8)))
    check(arguments(x, rows=1, shift=make(device, 3, 8)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_another_dtype(dtype, small_gpu, device):
    x = make(device, 1, 8, 5, 3, dtype=torch.float16)
    check(arguments(x, weight=make(device, 8, dtype=dtype)))
    check(arguments(x, weight=make(device, 16, dtype=dtype)[::2]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_in_any_strides(dtype, layout, small_gpu, device):
    x = make(device, 2, 12, 5, 3, dtype=dtype, layout=layout)
    wide = make(device, 2, 24, 10, 6, dtype=dtype, layout="nhwc")
    residuals = [
        make(device, 2, 12, 5, 3, dtype=dtype),
        make(device, 2, 12, 5, 3, dtype=dtype, layout="nhwc"),
        make(device, 2, 24, 5, 3, dtype=dtype, layout="nhwc")[:, 3:15],
        wide[:, :12, ::2, ::2],  # H and W do not collapse
        make(device, 1, 12, 1, 1, dtype=dtype).expand(2, 12, 5, 3),
        x,
    ]
    for residual in residuals:
        assert check(arguments(x, residual=residual)).stride() == x.stride()


def test_views_are_read_where_they_lie(small_gpu, device):
    wide = make(device, 2, 24, 5, 3, dtype=torch.float16, layout="nhwc")
    y = check(arguments(wide[:, 8:20]))
    assert y.is_contiguous(memory_format=torch.channels_last)
    rows = make(device, 2, 12, 10, 3)[:, :, 2:7]  # H and W still collapse
    assert check(arguments(rows)).is_contiguous()
    pixels = wide[:, :, ::2, ::2]  # they do not
    assert check(arguments(pixels)).is_contiguous(memory_format=torch.channels_last)
    assert check(arguments(make(device, 2, 12, 6, 6)[:, :, ::2, ::2])).is_contiguous()
    one_pixel = make(device, 1, 12, 1, 1).expand(2, 12, 5, 3)
    check(arguments(one_pixel))


@pytest.mark.interpret
def test_channels_and_pixels_more_than_two_to_the_31_elements_apart():
    """Every stride fits in 32 bits; what it is multiplied by does not."""
    stride = 2**29
    # NumPy's zeros take no memory before they are written: pages of a few elements exist.
    storage = torch.from_numpy(np.zeros(4 * stride + 3, dtype=np.float16))
    channels = storage.as_strided((1, 5, 1, 3), (1, stride, 3, 1))
    pixels = storage.as_strided((1, 3, 1, 5), (1, 1, 5 * stride, stride))
    for x in (channels, pixels):
        x.copy_(make("cpu", *x.shape))
        check(arguments(x, residual=x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_images(layout, dtype, small_gpu, device):
    x = make(device, 0, 32, 7, 7, dtype=dtype, layout=layout)
    y = rms_norm_silu(**arguments(x, rows=1))
    assert (y.shape, y.dtype) == (x.shape, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 12, 5, 3), (1, 4100, 1, 3)])
def test_nothing_is_written_outside(shape, layout, small_gpu, device, monkeypatch):
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

    args = arguments(make(device, *shape, layout=layout))
    expected = rms_norm_silu_ref(**args)
    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "empty", guarded_empty)
        y = rms_norm_silu(**args)
    assert_as_exact_as_torch(y, expected, exact(args))
    assert len(guards) == 1
    assert (guards[0][:64] == 7).all()
    assert (guards[0][-64:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [12, 4100])
def test_a_pixel_of_zeros(channels, dtype, small_gpu, device):
    x = make(device, 1, channels, 2, 3, dtype=dtype, layout="nhwc")
    x[:, :, 1, 1] = 0
    y = check(plain(x))
    assert (y[:, :, 1, 1] == 0).all()
    shift = make(device, 1, channels, dtype=dtype)
    y = rms_norm_silu(**arguments(x, add=None, shift=shift, silu=False, residual=None))
    assert torch.equal(y[0, :, 1, 1], shift[0])


@pytest.mark.parametrize("norm", [1e-14, 9e-13, 1.1e-12, 1e-9])
def test_norms_about_the_least(norm, small_gpu, device):
    """Below 1e-12 the result shrinks with x, above it does not."""
    x = F.normalize(make(device, 1, 12, 2, 3, layout="nhwc"), dim=1) * norm
    y = check(plain(x))
    expected = math.sqrt(12) * min(1, norm / 1e-12)
    torch.testing.assert_close(y.norm(dim=1), torch.full((1, 2, 3), expected, device=device))


@pytest.mark.parametrize(
    ("dtype", "magnitude"), [(torch.float16, 60000.0), (torch.bfloat16, 1e17), (torch.float32, 1e17)], ids=str
)
@pytest.mark.parametrize("channels", [12, 1024])
def test_large_magnitudes(channels, dtype, magnitude, small_gpu, device):
    x = make(device, 1, channels, 2, 3, layout="nhwc").clamp(-1, 1).mul(magnitude).to(dtype)
    y = check(plain(x))
    assert y.double().square().mean(dim=1).sub(1).abs().max() < 1e-2


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("channels", [12, 4100])
def test_infinities_do_as_torchs(channels, small_gpu, device):
    """An infinity is divided by itself, what is beside it by an infinity; so is all whose squares overflow."""
    x = make(device, 1, channels, 2, 3, layout="nhwc")
    x[:, 3, 0, 1] = float("inf")
    x[:, 4, 1, 2] = float("-inf")
    x[:, :, 1, 0] *= 1e25
    for args in (plain(x), arguments(x)):
        y, expected = rms_norm_silu(**args), rms_norm_silu_ref(**args)
        assert y.isnan().sum() == 2
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert (rms_norm_silu(**plain(x))[:, :, 1, 0] == 0).all()
    residual = make(device, 1, channels, 2, 3)
    residual[0, 5, 0, 0] = float("-inf")
    y = rms_norm_silu(**arguments(make(device, 1, channels, 2, 3), residual=residual))
    assert y[0, 5, 0, 0] == float("-inf")
    assert y.isinf().sum() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [12, 4100])
def test_a_nan_stays_in_its_pixel(channels, layout, small_gpu, device):
    x = make(device, 2, channels, 1, 5, layout=layout)
    x[1, 5, 0, 2] = float("nan")
    y = rms_norm_silu(**arguments(x))
    assert y[1, :, 0, 2].isnan().all()
    assert y.isnan().sum() == channels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 12, 16, 16), (1, 4100, 1, 3)])
def test_the_same_bits_every_time(shape, layout, small_gpu, device):
    args = arguments(make(device, *shape, layout=layout))
    first = rms_norm_silu(**args)
    assert all(torch.equal(rms_norm_silu(**args), first) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_the_formula(dtype, layout):
    x = make("cpu", 2, 12, 5, 3, layout=layout).to(dtype)
    args = arguments(x)
    add, scale, shift = (args[name].double()[:, :, None, None] for name in ("add", "scale", "shift"))
    u = x.double() + add
    h = u / u.square().sum(dim=1, keepdim=True).sqrt() * args["weight"].double()[:, None, None] * 12**0.5
    h = h * (1 + scale) + shift
    h = h * torch.sigmoid(h) + args["residual"].double()
    y = rms_norm_silu_ref(**args)
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(y.double(), h, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12, 15)}, r"x must be \[N, C, H, W\]"),
        ({"weight": torch.zeros(11)}, r"weight must have shape \[12\]"),
        ({"weight": torch.zeros(1, 12, 1, 1)}, r"weight must have shape \[12\]"),
        ({"scale": None}, "scale and shift go together"),
        ({"add": torch.zeros(3, 12)}, r"add must have shape \[2 or 1, 12\]"),
        ({"shift": torch.zeros(12)}, r"shift must have shape \[2 or 1, 12\]"),
        ({"residual": torch.zeros(2, 12, 3, 5)}, r"residual must be torch.float32 \[2, 12, 5, 3\], as x is"),
        ({"residual": torch.zeros(2, 12, 5, 3).half()}, "residual must be torch.float32 .* found torch.float16"),
    ],
)
def test_what_it_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        rms_norm_silu(**(arguments(make("cpu", 2, 12, 5, 3)) | change))


def test_the_kernel_refuses_float64(device):
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16"):
        rms_norm_silu(**arguments(make(device, 2, 12, 5, 3).double()))


def rule_cases() -> list[tuple[int, int, int, int]]:
    """(N, channels, pixels, multiprocessors), from tiny to huge, with channels that are no powers of two."""
    return [
        (n, channels, pixels, sms)
        for n in (0, 1, 3, 64, 256)
        for channels in (1, 3, 32, 48, 64, 130, 512, 1024, 4096, 4097, 8200, 100000)
        for pixels in (1, 15, 49, 64, 256, 1024, 4096, 65536)
        for sms in (4, 108, 132)
    ]


def test_the_rule_covers_everything_once():
    for case in rule_cases():
        n, channels, pixels, sms = case
        p = plan(n, channels, pixels, sms)
        assert (p.blocks - 1) * p.block_c < channels <= p.blocks * p.block_c, case
        assert p.block_c & (p.block_c - 1) == p.block_p & (p.block_p - 1) == p.num_warps & (p.num_warps - 1) == 0, case
        assert p.block_c * p.block_p <= 4096, case
        assert p.block_p < 2 * pixels, case
        assert 1 <= p.num_warps <= 16, case
        # Lanes that hold no channel: at most half.
        assert channels / (p.blocks * p.block_c) > 0.5, case


def test_the_rule_fills_a_gpu_at_batch_1():
    for channels, size in ((64, 128), (128, 64), (256, 32), (512, 16)):
        p = plan(1, channels, size * size, 132)
        assert size * size // p.block_p >= 256, (channels, size)


def test_the_rule_shares_rows_among_pixels_where_there_are_many():
    assert plan(16, 64, 128 * 128, 132).block_p == 64
    assert plan(64, 512, 16 * 16, 132).block_p == 8


def compiled(backend_name: str) -> Callable[..., Tensor]:
    def norm(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return rms_norm_silu(x * 1, *args, **options) + 1

    torch.compiler.reset()
    return torch.compile(norm, fullgraph=True, dynamic=False, backend=backend_name)


def test_it_compiles_as_one_graph_of_the_operator(small_gpu, device):
    args = arguments(make(device, 2, 12, 5, 3, layout="nhwc"))
    y = compiled("aot_eager")(**args)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, rms_norm_silu(**args) + 1)


@pytest.mark.skipif(backend.INTERPRET, reason="the reference's process")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_reference_compiles():
    args = arguments(make("cpu", 2, 12, 5, 3, layout="nhwc"))
    y = compiled("inductor")(**args)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_exact_as_torch(y - 1, rms_norm_silu_ref(**args), exact(args))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operator_is_well_registered(layout, small_gpu, device):
    args = arguments(make(device, 2, 12, 5, 3, layout=layout), silu=True)
    order = ("x", "weight", *OPTIONS, "silu")
    torch.library.opcheck(torch.ops.ddpm.rms_norm_silu, tuple(args[name] for name in order))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 64, 128, 128), (1, 512, 16, 16), (16, 128, 64, 64), (64, 256, 32, 32), (8, 192, 33, 33)]
)
def test_layers_of_real_networks(shape, layout, dtype):
    args = arguments(make("cuda", *shape, dtype=dtype, layout=layout))
    first = check(args)
    for _ in range(20):
        assert torch.equal(rms_norm_silu(**args), first)


@pytest.mark.gpu
def test_a_replayed_graph_does_what_a_launch_does():
    args = arguments(make("cuda", 1, 64, 32, 32, layout="nhwc"))
    expected = rms_norm_silu(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rms_norm_silu(**args)
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
    rows = dict(zip(("scale", "shift", "add"), make("cuda", 3, 3, 32), strict=True))
    weight = make("cuda", 32)
    y = rms_norm_silu(x, weight, residual=x, **rows)[2:]
    last = {name: row[2:] for name, row in rows.items()}
    assert torch.equal(y, rms_norm_silu(x[2:], weight, residual=x[2:], **last))


@pytest.mark.gpu
def test_a_launch_runs_on_its_tensors_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    torch.cuda.set_device(0)
    first, second = (rms_norm_silu(**arguments(make(d, 2, 96, 7, 7))) for d in ("cuda:0", "cuda:1"))
    assert torch.equal(first.cpu(), second.cpu())
