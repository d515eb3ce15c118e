"""The fused convolution against float64: every form, any shape, split K, statistics, and what it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.kernels import backend, conv_kernel, tuning
from ddpm.kernels.channel_statistics import MAX_SLOTS, Norm, channel_statistics_ref, chunk_size
from ddpm.kernels.conv import conv, conv_ref, output_size
from ddpm.kernels.tuning import ConvPlan
from ddpm.loop import float32_precision
from tests.tolerances import assert_as_exact_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


@pytest.fixture(autouse=True)
def _no_files_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_PLANS", "")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    with float32_precision(False):
        yield


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """cut(block_m, block_n, block_k, splits): the plan of every convolution from now on."""

    def force(block_m: int = 64, block_n: int = 32, block_k: int = 16, splits: int = 1) -> None:
        def plan(shape: Any, target: Any, splittable: bool = True, form: str | None = None) -> ConvPlan:
            return ConvPlan("fused", block_m, block_n, block_k, splits if splittable else 1, 4, 2)

        monkeypatch.setattr(tuning, "plan", plan)

    force()
    return force


def make(device: str, *shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """Normal numbers; images are channels_last."""
    generator = torch.Generator().manual_seed(math.prod(shape) + 7 * len(shape) + shape[-1])
    x = (torch.randn(shape, generator=generator) * scale + mean).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def arguments(
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    n: int = 2,
    size: tuple[int, int] = (7, 5),
    parts: Sequence[int] = (20,),
    out: int = 20,
    kernel: int = 3,
    mean: float = 0.0,
    norm: int = 0,
    modulated: bool = False,
    silu: bool = True,
    rows: int = 0,
    residual: str = "",
    shortcut: Sequence[int] = (),
    counters: bool = False,
    weight_dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Any]:
    """All arguments of a call. norm: its groups; rows: of `row`; residual: "full" or "half"."""
    padding = options.setdefault("padding", (kernel // 2, kernel // 2))
    result = output_size(*size, kernel, options.get("stride", 1), padding, options.get("upsample", False))
    channels, weight_dtype = sum(parts), weight_dtype or dtype
    images = [make(device, n, c, *size, dtype=dtype, mean=mean) for c in parts]
    args = {
        "parts": images,
        "weight": make(device, out, channels, kernel, kernel, dtype=weight_dtype, scale=(channels * kernel) ** -0.5),
        "bias": make(device, out),
        "statistics": True,
        **options,
    }
    if norm:
        scale, shift = make(device, 2, n, channels, scale=0.3) if modulated else (None, None)
        statistics = tuple(channel_statistics_ref(x) for x in images)
        args["norm"] = Norm(
            make(device, channels, mean=1.0), make(device, 1, channels)[0], norm, EPS, silu, statistics, scale, shift
        )
    if rows:
        args["row"] = make(device, rows, out)
    if residual:
        shape = result if residual == "full" else (result[0] // 2, result[1] // 2)
        args["residual"] = make(device, n, out, *shape, dtype=dtype)
    if shortcut:
        args["shortcut"] = [make(device, n, c, *result, dtype=dtype) for c in shortcut]
        args["shortcut_weight"] = make(device, out, sum(shortcut), dtype=weight_dtype, scale=0.3)
    if counters:
        args["counters"] = torch.zeros(tuning.COUNTERS, dtype=torch.int32, device=device)
    return args


def flat(args: dict[str, Any]) -> tuple:
    """The arguments in the operator's order."""

    def pair(tensors: Sequence[Tensor]) -> tuple:
        return (*tensors, None, None)[:2]

    norm = args.get("norm")
    rules = (None,) * 6 + (0, 0.0, False)
    if norm is not None:
        rules = (
            norm.weight,
            norm.bias,
            *pair(norm.statistics),
            norm.scale,
            norm.shift,
            norm.groups,
            norm.eps,
            norm.silu,
        )
    return (
        *pair(args["parts"]),
        args["weight"],
        *(args.get(name) for name in ("bias", "row", "residual")),
        *pair(args.get("shortcut", ())),
        args.get("shortcut_weight"),
        *rules,
        args.get("stride", 1),
        *args["padding"],
        args.get("upsample", False),
        args.get("out_scale", 1.0),
        args["statistics"],
        args.get("dtype") or args["parts"][0].dtype,
        args.get("counters"),
    )


def exact(args: dict[str, Any]) -> Tensor:
    """The result in float64."""
    wide = [value.double() if isinstance(value, Tensor) else value for value in flat(args)]
    return conv_ref(*wide[:-2], torch.float64, None)[0]


def assert_statistics(found: Tensor, y: Tensor) -> None:
    """`found` are the statistics of y as it is, by the rule of chunks."""
    n, channels, height, width = y.shape
    slots = found.shape[1]
    assert (found.shape, found.dtype) == ((n, slots, 2, channels), torch.float32)
    assert 1 <= slots <= MAX_SLOTS
    chunk = chunk_size(height * width, slots)
    pixels = y.double().flatten(2)
    for slot in range(slots):
        part = pixels[:, :, slot * chunk : (slot + 1) * chunk]
        assert part.shape[2] > 0
        mean = part.mean(dim=2)
        m2 = (part - mean[:, :, None]).square().sum(dim=2)
        std = part.std(dim=2, correction=0)
        assert bool(((found[:, slot, 0] - mean).abs() <= 1e-6 * std + 4e-7 * mean.abs()).all())
        torch.testing.assert_close(found[:, slot, 1].double(), m2, rtol=1e-5, atol=1e-9)


def check(args: dict[str, Any]) -> Tensor:
    before = [t.clone() for t in flat(args) if isinstance(t, Tensor)]
    y, statistics = conv(**args)
    plain, _ = conv_ref(*flat(args))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_exact_as_torch(y, plain, exact(args))
    if args["statistics"]:
        assert_statistics(statistics, y)
    else:
        assert statistics is None
    # Inputs are as they were; counters among them.
    assert all(map(torch.equal, before, (t for t in flat(args) if isinstance(t, Tensor))))
    return y


FORMS: dict[str, dict[str, Any]] = {
    "3x3": {"rows": 1, "residual": "full", "out_scale": 0.7},
    "3x3 of two": {"parts": (20, 12), "rows": 2},
    "stride 2": {"stride": 2, "padding": (1, 1), "size": (8, 6)},
    "stride 2 padded after": {"stride": 2, "padding": (0, 1), "size": (8, 6), "rows": 1},
    "stride 2 padded after, odd": {"stride": 2, "padding": (0, 1)},
    "upsample": {"upsample": True, "size": (4, 3), "rows": 2},
    "upsample of two": {"upsample": True, "size": (3, 3), "parts": (20, 12), "norm": 4},
    "1x1": {"kernel": 1, "residual": "full"},
    "1x1 of a norm": {"kernel": 1, "norm": 5, "silu": False},
    "2x2": {"kernel": 2, "stride": 2, "padding": (0, 0), "size": (8, 6)},
    "7x7": {"kernel": 7, "parts": (3,)},
    "norm": {"norm": 4, "rows": 2},
    "norm, scale and shift": {"norm": 2, "modulated": True, "residual": "full"},
    "norm of two": {"parts": (24, 12), "norm": 4, "modulated": True, "rows": 1},
    "norm, stride 2": {"norm": 4, "stride": 2, "size": (6, 8)},
    "shortcut": {"norm": 4, "shortcut": (12,)},
    "shortcut of two": {"shortcut": (20, 12), "out_scale": 0.5},
    "all": {
        "parts": (24, 12), "norm": 4, "rows": 2, "shortcut": (24, 12), "residual": "half", "size": (8, 4),
        "modulated": True, "out_scale": 0.7,
    },
    "half residual, upsample": {"residual": "half", "upsample": True, "size": (3, 4)},
    "few results": {"norm": 4, "out": 3},
    "many images": {"n": 5, "size": (3, 3), "rows": 5, "residual": "full"},
    "many images, one row": {"n": 3, "size": (2, 4), "rows": 1, "shortcut": (12,), "stride": 2},
    "one pixel": {"size": (1, 1), "n": 3, "rows": 3},
    "one pixel of a norm": {"size": (1, 1), "parts": (12,), "norm": 3},
    "one channel": {"parts": (1,), "out": 1, "size": (4, 4)},
    "nothing to add": {"statistics": False, "bias": None},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("form", FORMS)
def test_against_float64(form, dtype, cut, device):
    check(arguments(device, dtype, **FORMS[form]))


@pytest.mark.parametrize("block_m", [16, 32, 128])
@pytest.mark.parametrize("block_n", [16, 128])
def test_blocks(block_m, block_n, cut, device):
    cut(block_m, block_n, 32)
    check(arguments(device, torch.float16, norm=2, n=1, rows=1, residual="full", out=20 if block_n == 16 else 70))


def test_four_channels_of_a_float32_result(cut, device):
    cut(32, 4, 16, 2)
    check(arguments(device, n=1, norm=4, out=3, rows=1, counters=True))


@pytest.mark.parametrize("splits", [2, 3, 4, 5, 6, 7, 8, 9])
def test_split_k(splits, cut, device):
    """26 blocks of K: parts that end within a tensor, between two, and of different lengths."""
    cut(64, 32, 16, splits)
    args = arguments(
        device, torch.float16, n=1, size=(4, 4), parts=(20,), shortcut=(20, 90), rows=1, counters=True, norm=2
    )
    assert check(args).shape == (1, 20, 4, 4)


def test_every_block_of_k_by_itself(cut, device):
    cut(64, 32, 16, 9)
    check(arguments(device, n=1, size=(4, 4), parts=(16,), counters=True))
    cut(16, 16, 16, 27)
    check(arguments(device, torch.float16, n=1, size=(2, 3), parts=(10, 20), out=16, counters=True))


def test_k_is_whole_without_counters(cut, device):
    cut(64, 32, 16, 3)
    args = arguments(device, n=1, counters=False)
    assert conv_kernel.cut(args["parts"][0], args["weight"], None, False, 1, (1, 1), False, False).plan.splits == 1
    check(args)


def test_the_same_bits_every_time(cut, device):
    cut(16, 32, 16, 3)
    args = arguments(device, torch.float16, n=1, norm=4, counters=True, rows=1)
    first = conv(**args)
    for _ in range(2):
        assert all(map(torch.equal, conv(**args), first))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("size", [(7, 5), (3, 3)])
def test_statistics_where_the_mean_is_large(block_m, size, dtype, cut, device):
    cut(block_m)
    args = arguments(device, dtype, n=3, size=size, kernel=1, parts=(12,))
    args["bias"] = torch.full((20,), 30.0, device=device)
    check(args)


def test_a_norm_of_a_large_mean(cut, device):
    check(arguments(device, norm=4, mean=30.0))


def test_many_slots_are_merged(cut, device):
    cut(16)
    args = arguments(device, kernel=1, n=2, size=(17, 17), parts=(4,), out=5)
    _, statistics = conv(**args)
    assert statistics.shape[1] == 10  # of 19
    check(args)


def test_statistics_of_several_slots_are_read(cut, device):
    """What one convolution leaves, the next one's norm reads; their slots differ in number."""
    cut(16)
    inner = [
        conv([make(device, 2, c, 7, 5)], make(device, c, c, 1, 1), padding=(0, 0), statistics=True) for c in (24, 12)
    ]
    args = arguments(device, parts=(24, 12), norm=4)
    args["parts"] = [y for y, _ in inner]
    second = channel_statistics_ref(inner[1][0])
    assert inner[0][1].shape[1] == 3
    args["norm"] = args["norm"]._replace(statistics=(inner[0][1], second))
    check(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_the_first_convolution(dtype, cut, device):
    """An NCHW float32 state, weights of the network's dtype."""
    args = arguments(device, parts=(3,), weight_dtype=dtype, dtype=dtype)
    args["parts"] = [args["parts"][0].contiguous()]
    assert check(args).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_last_convolution(dtype, cut, device):
    """float32 weights and result, of half precision activations."""
    args = arguments(device, dtype, norm=4, out=3, weight_dtype=torch.float32, statistics=False)
    args["dtype"] = torch.float32
    y = check(args)
    # No rounding to half precision anywhere.
    assert (y - exact(args)).abs().max() < 1e-5


def test_views_are_read_where_they_lie(cut, device):
    wide = make(device, 2, 40, 7, 10)
    args = arguments(device, torch.float32, n=2, parts=(20,), shortcut=(8,), residual="full", rows=2)
    args["parts"] = [wide[:, 8:28, :, :5]]  # rows do not follow one another: copied
    check(args)
    args = arguments(device, size=(5, 10), parts=(20,), norm=4, residual="full", rows=2)
    args["parts"] = [wide[:, 3:23, 1:6]]
    args["residual"] = wide[:, 20:40, 2:7]
    args["row"] = make(device, 2, 50)[:, 7:27]
    statistics = (channel_statistics_ref(args["parts"][0]),)
    rows = make(device, 2, 60, scale=0.3)
    args["norm"] = args["norm"]._replace(statistics=statistics, scale=rows[:1, 3:23], shift=rows[:, ::3])
    check(args)


def test_weights_of_another_layout_and_dtype(cut, device):
    args = arguments(device, torch.float16, norm=4, rows=2)
    args["weight"] = args["weight"].contiguous()
    args["bias"] = args["bias"].half()
    args["row"] = args["row"].bfloat16()
    args["norm"] = args["norm"]._replace(weight=args["norm"].weight.half(), bias=args["norm"].bias.bfloat16())
    check(args)


def test_padding_is_of_the_normalised_image(cut, device):
    """Where the norm's bias is 5, a border that was normalised too would add to every edge pixel."""
    args = arguments(device, norm=4, silu=False)
    args["norm"] = args["norm"]._replace(bias=torch.full((20,), 5.0, device=device))
    check(args)


def test_a_nan_stays_in_its_image(cut, device):
    args = arguments(device, n=3, size=(3, 3))
    args["parts"][0][1, 5, 1, 1] = float("nan")
    y, statistics = conv(**args)
    assert y[1].isnan().all()
    assert statistics[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert statistics[[0, 2]].isfinite().all()


def test_no_images(cut, device):
    args = arguments(device, torch.float16, n=0, norm=4, residual="full", rows=1)
    y, statistics = conv(**args)
    assert (y.shape, y.dtype) == ((0, 20, 7, 5), torch.float16)
    assert statistics.shape == (0, 1, 2, 20)


@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_is_written_outside(splits, cut, device, monkeypatch):
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

    cut(16, 16, 16, splits)
    args = arguments(device, n=3, size=(5, 3), rows=3, residual="full", counters=True)
    args["counters"] = torch.zeros(tuning.COUNTERS + 2, dtype=torch.int32, device=device)[1:-1]
    with monkeypatch.context() as patch:
        patch.setattr(conv_kernel.torch, "empty", guarded_empty)
        y, statistics = conv(**args)
    assert_as_exact_as_torch(y, conv_ref(*flat(args))[0], exact(args))
    assert_statistics(statistics, y)
    assert len(guards) == (2 if splits == 1 else 3)
    for buffer in guards:
        assert (buffer[:64] == 7).all()
        assert (buffer[-64:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_the_reference_is_torch(dtype):
    args = arguments("cpu", torch.float32, parts=(24, 12), norm=4, rows=1, shortcut=(24, 12), residual="full")
    positional = [t.to(dtype) if isinstance(t, Tensor) else t for t in flat(args)]
    positional[-2] = dtype
    y, _ = conv_ref(*positional)
    x, norm = torch.cat(args["parts"], dim=1).double(), args["norm"]
    h = F.silu(F.group_norm(x, 4, norm.weight.double(), norm.bias.double(), EPS))
    expected = F.conv2d(h, args["weight"].double(), args["bias"].double(), padding=1)
    shortcut = torch.cat(args["shortcut"], dim=1).double()
    expected = expected + F.conv2d(shortcut, args["shortcut_weight"].double()[:, :, None, None])
    expected = expected + args["row"].double()[:, :, None, None] + args["residual"].double()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": []}, "parts must be one or two tensors; found 0"),
        ({"parts": [torch.zeros(2, 20, 35)]}, r"x must be \[N, C, H, W\]"),
        ({"parts": [torch.zeros(2, 10, 7, 5), torch.zeros(2, 10, 7, 6)]}, r"parts must be \[2, C, 7, 5\]"),
        ({"weight": torch.zeros(20, 19, 3, 3)}, r"weight must be \[C_out, 20, k, k\]"),
        ({"weight": torch.zeros(20, 20, 3, 1)}, r"weight must be \[C_out, 20, k, k\]"),
        ({"weight": torch.zeros(20, 20, 9, 9)}, "k must be at most 7"),
        ({"stride": 3}, "stride 1 or 2"),
        ({"padding": (-1, 1)}, "padding not negative"),
        ({"weight": torch.zeros(20, 20, 7, 7), "padding": (0, 0)}, "too small for a kernel of 7"),
        ({"bias": torch.zeros(19)}, r"bias must be \[20\]; found \[19\]"),
        ({"row": torch.zeros(3, 20)}, r"row must be \[2, 20\] or \[1, 20\]"),
        ({"residual": torch.zeros(2, 20, 3, 2)}, r"residual must be \[2, 20, 7, 5\]; found"),
        ({"shortcut": [torch.zeros(2, 4, 7, 5)]}, "shortcut and shortcut_weight go together"),
        (
            {"shortcut": [torch.zeros(2, 4, 7, 5)], "shortcut_weight": torch.zeros(20, 5)},
            r"shortcut_weight must be \[20, 4\]",
        ),
        (
            {"shortcut": [torch.zeros(2, 4, 7, 5)], "shortcut_weight": torch.zeros(20, 4).half()},
            "shortcut_weight must be of weight's torch.float32",
        ),
        ({"shortcut": [torch.zeros(2, 4, 5, 7)], "shortcut_weight": torch.zeros(20, 4)}, r"must be \[2, C, 7, 5\]"),
        ({"counters": torch.zeros(10, dtype=torch.int32)}, r"counters must be \[1024\]"),
        ({"counters": torch.zeros(1024)}, "counters must be int32"),
    ],
)
def test_what_it_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        conv(**(arguments("cpu") | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(19)}, r"norm.weight must have shape \[20\]"),
        ({"bias": torch.zeros(1, 20)}, r"norm.bias must have shape \[20\]"),
        ({"groups": 3}, "groups must divide the 20 channels"),
        ({"scale": torch.zeros(2, 20)}, "scale and shift go together"),
        ({"scale": torch.zeros(2, 20), "shift": torch.zeros(20)}, r"shift must have shape \[2 or 1, 20\]"),
        ({"statistics": (torch.zeros(2, 1, 2, 20),) * 2}, "each of the 1 parts must have statistics; found 2"),
        ({"statistics": ()}, "statistics must be one or two tensors"),
        ({"statistics": (torch.zeros(2, 1, 2, 20).half(),)}, "must be float32 .*; found torch.float16"),
        (
            {"statistics": (torch.zeros(2, 17, 2, 20),)},
            r"float32 \[2, 1 .. 16, 2, 20\]; found torch.float32 \[2, 17",
        ),
        (
            {"statistics": (torch.zeros(2, 1, 2, 19),)},
            r"float32 \[2, 1 .. 16, 2, 20\]; found .* \[2, 1, 2, 19",
        ),
    ],
)
def test_what_it_refuses_of_a_norm(change, message):
    args = arguments("cpu", norm=4)
    args["norm"] = args["norm"]._replace(**change)
    with pytest.raises(ValueError, match=message):
        conv(**args)


def test_the_kernel_refuses_float64(device):
    args = arguments(device)
    for change in (
        {"parts": [args["parts"][0].double()]},
        {"weight": args["weight"].double()},
        {"dtype": torch.float64},
    ):
        with pytest.raises(ValueError, match="must be float32, float16 or bfloat16"):
            conv(**(args | change))


def test_images_of_more_than_31_bits_are_refused():
    whole = torch.empty(1, 64, 8192, 8192, device="meta")
    view = torch.empty(1, 8192, 8192, 64, device="meta").permute(0, 3, 1, 2)[:, :3]  # few values, far apart
    with backend.assume(backend.H100):
        for x in (whole, view):
            weight = torch.empty(3, x.shape[1], 1, 1, device="meta")
            with pytest.raises(ValueError, match=r"must lie within 2\^31 values"):
                conv([x], weight, padding=(0, 0))


CASES_FOR_THE_DISPATCHER = {
    "plain": {"rows": 1},
    "all": FORMS["all"] | {"counters": True},
    "no statistics": {"statistics": False},
}


@pytest.mark.parametrize("case", CASES_FOR_THE_DISPATCHER)
def test_the_operator_is_well_registered(case, cut, device):
    cut(64, 32, 16, 2)
    args = arguments(device, torch.float16, **CASES_FOR_THE_DISPATCHER[case])
    torch.library.opcheck(torch.ops.ddpm.conv, flat(args))


@pytest.mark.skipif(backend.INTERPRET, reason="the reference's process")
@pytest.mark.parametrize("case", CASES_FOR_THE_DISPATCHER)
def test_the_reference_is_well_registered(case):
    args = arguments("cpu", torch.float32, **CASES_FOR_THE_DISPATCHER[case])
    torch.library.opcheck(torch.ops.ddpm.conv, flat(args))


def test_it_compiles_as_one_graph_of_the_operator(cut, device):
    args = arguments(device, n=1, norm=4)

    def network(x: Tensor) -> tuple[Tensor, Tensor]:
        y, statistics = conv(**(args | {"parts": [x * 1]}))
        return y + 1, statistics

    torch.compiler.reset()
    y, statistics = torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager")(args["parts"][0])
    expected = conv(**args)
    assert torch.equal(y, expected[0] + 1)
    assert torch.equal(statistics, expected[1])


def test_shapes_and_costs_without_data(cut):
    """On the meta device: the statistics' slots of an assumed GPU, and what a call would cost there."""
    cut(64, 64, 64, 3)
    args = arguments("cpu", torch.float16, n=1, size=(40, 40), parts=(64, 32), out=96, shortcut=(8,), counters=True)
    x, *others = (t.to("meta") if isinstance(t, Tensor) else t for t in flat(args))
    with backend.assume(backend.H100):
        y, statistics = torch.ops.ddpm.conv(x, *others)
        work = backend.works["conv"](x, *others)
    assert y.shape == (1, 96, 40, 40)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert statistics.shape == (1, 13, 2, 96)  # 25 runs of 64 pixels, two by two
    assert (work.launches, work.programs) == (2, 25 * 2 * 3)
    assert work.flops == 2 * 1600 * 96 * (9 * 96 + 8)
    partials, merged = 8 * 50 * 3 * 64 * 64, 8 * 25 * 2 * 96
    assert work.extra_bytes == partials + merged + 4 * (2 * 50 - tuning.COUNTERS)


LAYERS = {
    "32x32 of a concatenation": {
        "n": 1, "size": (32, 32), "parts": (256, 128), "out": 128, "norm": 32, "rows": 1,
    },
    "16x16": {"n": 1, "size": (16, 16), "parts": (256,), "out": 256, "norm": 32, "residual": "full"},
    "4x4, shortcut": {
        "n": 1, "size": (4, 4), "parts": (256,), "out": 256, "norm": 32, "shortcut": (256, 256),
    },
    "4x4, batch 64": {"n": 64, "size": (4, 4), "parts": (256,), "out": 256, "rows": 64},
    "32x32, batch 64": {"n": 64, "size": (32, 32), "parts": (128,), "out": 128, "rows": 1, "residual": "full"},
    "down": {"n": 4, "size": (64, 64), "parts": (192,), "out": 192, "stride": 2, "padding": (0, 1)},
    "up": {"n": 2, "size": (64, 64), "parts": (192,), "out": 192, "upsample": True},
    "96 channels": {"n": 2, "size": (28, 28), "parts": (96,), "out": 96, "norm": 32},
    "256x256": {"n": 1, "size": (256, 256), "parts": (128,), "out": 128},
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_real_networks(layer, dtype):
    """By the rule's own plans."""
    args = arguments("cuda", dtype, counters=True, **LAYERS[layer])
    first = check(args)
    for _ in range(20):
        assert torch.equal(conv(**args)[0], first)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [2, 9, 18])
def test_ten_thousand_split_sums(splits, cut):
    """The last to arrive sees what all others stored: the same bits in every launch."""
    cut(16, 64, 64, splits)
    args = arguments("cuda", torch.float16, n=4, size=(8, 8), parts=(256,), out=256, norm=32, counters=True)
    first, statistics = conv(**args)
    differ = torch.zeros(1, dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        y, found = conv(**args)
        differ += (y != first).any() | (found != statistics).any()
    assert int(differ) == 0
    assert not args["counters"].any()


@pytest.mark.gpu
def test_a_replayed_graph_does_what_a_launch_does(cut):
    cut(16, 64, 64, 9)
    args = arguments("cuda", torch.float16, n=1, size=(16, 16), parts=(256,), out=256, norm=32, counters=True)
    expected, _ = conv(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = conv(**args)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_tf32_is_used_only_where_asked(cut):
    cut(64, 64, 32)
    args = arguments("cuda", n=1, size=(16, 16), parts=(256,), out=64)
    errors = []
    for tf32 in (False, True):
        with float32_precision(tf32):
            errors.append((conv(**args)[0] - exact(args)).abs().max())
    assert errors[0] < 1e-5 < errors[1] < 1e-2
