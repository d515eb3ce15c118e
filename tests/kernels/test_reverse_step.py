"""The reverse step: the reference's bits where both round the same operations, float64's values everywhere."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm.kernels import backend
from ddpm.kernels.philox import PURPOSE_JUMP, PURPOSE_KNOWN_REGION, PURPOSE_STEP, philox_normal
from ddpm.kernels.reverse_step import (
    CLIPS,
    COLUMNS,
    NONFINITE_NONE,
    PLANES,
    VARIANCES,
    decode_nonfinite,
    dynamic_threshold,
    reverse_step,
    reverse_step_ref,
)
from tests.tolerances import assert_as_exact_as_torch

SHAPES = [(3, 3, 5, 5), (1, 1, 7, 7), (2, 3, 16, 16), (1, 2, 1, 3)]  # 75, 49, 768 and 6 elements an image
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Rows of an epsilon-prediction chain: the usual step, one without noise, DDIM with its own ce, zero-SNR (kd = 0), and a
# step that jumps back. All but "last" add noise to a known region.
ROWS = {
    "ddpm": {"kx": 1.0, "ke": -0.8, "kd": 0.6, "c0": 0.3, "cx": 0.72, "s": 0.25},
    "last": {"kx": 1.0, "ke": -0.01, "kd": 0.999, "c0": 1.0, "known_mean": 1.0, "known_std": 0.0},
    "ddim": {"kx": 1.0, "ke": -0.8, "kd": 0.6, "c0": 0.7, "ce": 0.71},
    "zero_snr": {"kx": 1.0, "ke": -1.0, "kd": 0.0, "c0": 0.5, "cx": 0.1, "s": 1.0},
    "jump": {"kx": 1.0, "ke": -0.8, "kd": 0.6, "c0": 0.3, "cx": 0.72, "s": 0.25, "jump_mean": 0.9, "jump_std": 0.4},
}
STEP = {name: i for i, name in enumerate(ROWS)}


def make_table(**columns: float) -> Tensor:
    """One row for each of ROWS, float32 [rows, len(COLUMNS)]; `columns` overrides."""
    defaults = dict.fromkeys(COLUMNS, 0.0) | {"log_min": -4.0, "log_max": -2.0, "clip": 1.0, "guidance": 2.5}
    defaults |= {"known_mean": 0.8, "known_std": 0.6, "jump_mean": 1.0}
    return torch.tensor([[(defaults | row | columns)[c] for c in COLUMNS] for row in ROWS.values()])


class Case:
    """Arguments of one step. `run` works on copies of what the step writes, and keeps them as attributes."""

    def __init__(self, device: str, shape: tuple[int, ...] = (3, 3, 5, 5), step: str = "ddpm", **options: Any):
        generator = torch.Generator().manual_seed(sum(shape))

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.layout = LAYOUTS[options.pop("layout", "nchw")]
        self.dtype = options.pop("dtype", torch.float32)
        n, c, h, w = shape
        channels = c if options.get("variance", "fixed") == "fixed" else 2 * c
        self.x_t = normal(*shape).to(device)
        out = normal(2 * n if options.pop("guided", False) else n, channels, h, w)
        out[:, c:] = torch.rand(out[:, c:].shape, generator=generator) * 0.9 + 0.05
        self.out = out.to(device, self.dtype).contiguous(memory_format=self.layout)
        self.noise = normal(*shape).to(device)
        if options.pop("inpaint", False):
            self.noise = normal(len(PLANES), *shape).to(device)
            known, mask = normal(*shape).to(device), torch.rand(shape, generator=generator) < 0.4
            options |= {"known": known, "mask": mask.to(device, torch.uint8)}
        self.seeds = torch.tensor([17 * i - 5 for i in range(n)], dtype=torch.int64, device=device)
        self.table = make_table(**options.pop("columns", {})).to(device)
        self.counter = torch.tensor([STEP[step]], device=device)
        self.flag = NONFINITE_NONE
        self.options = {"threshold_max": 1.5} | options

    def run(self, function: Any = reverse_step, noise: str = "noise", **options: Any) -> Tensor:
        """x_{t-1}."""
        self.x, self.x0 = self.x_t.clone(), torch.full_like(self.x_t, float("nan"))
        self.nonfinite = torch.tensor([self.flag], device=self.x.device)
        source = {noise: getattr(self, noise)}
        table, counter = self.table.clone(), self.counter.clone()
        all_options = self.options | source | {"x0": self.x0} | options
        function(self.x, self.out, table, counter, self.nonfinite, **all_options)
        assert torch.equal(table, self.table)
        assert torch.equal(counter, self.counter)
        return self.x

    def exact(self) -> Tensor:
        """x_{t-1} in float64 from the same numbers."""
        state = self.x_t.double()
        flag = torch.tensor([NONFINITE_NONE], device=state.device)
        args = (self.out.double(), self.table.double(), self.counter, flag)
        known = {name: self.options[name].double() for name in ("known",) if name in self.options}
        reverse_step_ref(state, *args, noise=self.noise.double(), **(self.options | known))
        return state

    @property
    def found(self) -> tuple[int, int] | None:
        return decode_nonfinite(int(self.nonfinite))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_has_the_references_bits(shape, clip, layout, device):
    case = Case(device, shape, clip=clip, layout=layout)
    expected, expected_x0 = case.run(reverse_step_ref), case.x0
    assert torch.equal(case.run(), expected)
    assert torch.equal(case.x0, expected_x0)
    assert case.found is None


CONDITIONED = {
    "guided": {"guided": True},
    "guided, learned": {"guided": True, "variance": "learned_range", "layout": "nhwc", "columns": {"s": 1.0}},
    "guided, dynamic": {"guided": True, "clip": "dynamic", "dtype": torch.float16},
    "inpainting": {"inpaint": True},
    "both": {"inpaint": True, "guided": True, "layout": "nhwc", "clip": "none"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", CONDITIONED.values(), ids=CONDITIONED.keys())
@pytest.mark.parametrize("step", ["ddpm", "last", "jump"])
def test_a_conditioned_step_has_the_references_bits_and_float64s_values(shape, options, step, device):
    if step != "ddpm":
        options = {name: value for name, value in options.items() if name != "columns"}
    case = Case(device, shape, step=step, **options)
    plain = case.run(reverse_step_ref).clone()
    if options.get("variance") is None:  # exp is not rounded alike everywhere
        assert torch.equal(case.run(), plain)
    assert_as_exact_as_torch(case.run(), plain, case.exact())
    assert case.found is None


def test_guidance_against_the_formula():
    case = Case("cpu", guided=True, variance="learned", columns={"s": 0.5})
    conditional, null = case.out.double().chunk(2)
    alone = Case("cpu", variance="learned", columns={"s": 0.5})
    alone.out, alone.noise = null[:, :3] + 2.5 * (conditional - null)[:, :3], case.noise
    alone.out = torch.cat([alone.out, conditional[:, 3:]], dim=1)  # the variance is the conditional one's
    torch.testing.assert_close(case.exact(), alone.exact(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", ["ddpm", "last", "jump"])
def test_inpainting_against_the_formula(step):
    """RePaint, algorithm 1: q(x_{t-1} | x_0) where known; then q of the noisier state, over all."""
    case = Case("cpu", step=step, inpaint=True)
    k = dict(zip(COLUMNS, case.table[STEP[step]].double().tolist(), strict=True))
    known, mask = case.options["known"].double(), case.options["mask"].bool()
    plain = Case("cpu", step=step)
    plain.noise = case.noise[0]
    noised = k["known_mean"] * known + k["known_std"] * case.noise[1].double()
    expected = torch.where(mask, noised, plain.exact())
    if step == "jump":
        expected = k["jump_mean"] * expected + k["jump_std"] * case.noise[2].double()
    torch.testing.assert_close(case.exact(), expected, rtol=1e-12, atol=1e-12)
    if step == "last":
        assert torch.equal(case.run(reverse_step_ref)[mask], case.options["known"][mask])


@pytest.mark.parametrize("function", [reverse_step, reverse_step_ref])
def test_the_null_half_is_looked_at_for_nan_too(function, device):
    case = Case(device, guided=True)
    case.out[3 + 1, 0, 0, 0] = float("nan")
    case.run(function)
    assert case.found == (STEP["ddpm"], 1)


def test_each_draw_of_an_inpainting_step_is_a_stream_of_its_own(device):
    case = Case(device, step="jump", inpaint=True)
    drawn = case.run(noise="seeds").clone()
    purposes = (PURPOSE_STEP, PURPOSE_KNOWN_REGION, PURPOSE_JUMP)
    case.noise = torch.stack([philox_normal(case.seeds, (3, 5, 5), case.counter, purpose) for purpose in purposes])
    assert torch.equal(case.run(), drawn)


@pytest.mark.parametrize("function", [reverse_step, reverse_step_ref])
def test_an_inpainting_step_does_not_look_at_noise_that_it_does_not_add(function, device):
    case = Case(device, step="last", inpaint=True)
    expected = case.run(function)
    case.noise = torch.full_like(case.noise, float("nan"))
    assert torch.equal(case.run(function), expected)
    assert torch.equal(expected[case.options["mask"] != 0], case.options["known"][case.options["mask"] != 0])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("variance", ["fixed", "learned"])
@pytest.mark.parametrize("step", ["ddpm", "last", "ddim"])
def test_a_half_precision_state_has_the_references_bits(clip, variance, step, device):
    """float16 only: the interpreter truncates bfloat16 where a GPU rounds to nearest."""
    case = Case(device, clip=clip, variance=variance, step=step, dtype=torch.float16, rounding="float16")
    case.x_t, case.noise = case.x_t.half().float(), case.noise.half().float()
    expected = case.run(reverse_step_ref)
    assert torch.equal(expected, expected.half().float())
    assert torch.equal(case.run(), expected)
    assert not torch.equal(case.run(rounding="float32"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", ["ddpm", "last", "ddim"])
def test_half_precision_outputs_are_read_exactly(dtype, layout, step, device):
    case = Case(device, dtype=dtype, layout=layout, step=step, clip="clamp")
    expected = case.run(reverse_step_ref)
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("step", ["ddpm", "last", "ddim"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "nchw"), (torch.float16, "nhwc")])
def test_against_float64(step, clip, variance, dtype, layout, device):
    columns = {} if variance == "fixed" or step != "ddpm" else {"s": 1.0}
    case = Case(device, step=step, clip=clip, variance=variance, dtype=dtype, layout=layout, columns=columns)
    plain = case.run(reverse_step_ref)
    assert_as_exact_as_torch(case.run(), plain, case.exact())


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_reference_against_the_formula(variance):
    case = Case("cpu", clip="clamp", variance=variance, columns={"s": 0.5})
    k = dict(zip(COLUMNS, case.table[0].double().tolist(), strict=True))
    x, z, out = case.x_t.double(), case.noise.double(), case.out.double()
    prediction, v = out[:, :3], out[:, 3:]
    x_0 = ((k["kx"] * x + k["ke"] * prediction) / k["kd"]).clamp(-1, 1)
    f = (v + 1) / 2
    std = {
        "fixed": 0.5,
        "learned": 0.5 * v.sqrt(),
        "learned_range": 0.5 * (f * k["log_max"] + (1 - f) * k["log_min"]).exp().sqrt(),
    }[variance]
    expected = k["c0"] * x_0 + k["cx"] * x + k["ce"] * prediction + std * z
    torch.testing.assert_close(case.exact(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", ["ddpm", "zero_snr"])
def test_seeds_draw_the_noise_of_the_step(shape, step, device):
    """The same bits as with that noise in a buffer: Philox of the seed, with the step as the draw."""
    case = Case(device, shape, step=step)
    drawn = case.run(noise="seeds")
    case.noise = philox_normal(case.seeds, shape[1:], case.counter, PURPOSE_STEP)
    assert torch.equal(case.run(), drawn)


def test_kernel_and_reference_draw_the_same_noise(device):
    case = Case(device)
    expected = case.run(reverse_step_ref, noise="seeds")
    assert (case.run(noise="seeds") - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("clip", CLIPS)
def test_an_image_has_the_same_bits_in_any_batch(clip, device):
    case = Case(device, clip=clip)
    together, seeds, x_t, out = case.run(noise="seeds").clone(), case.seeds, case.x_t, case.out
    for i in range(3):
        case.seeds, case.x_t, case.out = seeds[i : i + 1], x_t[i : i + 1].contiguous(), out[i : i + 1]
        assert torch.equal(case.run(noise="seeds"), together[i : i + 1])


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("function", [reverse_step, reverse_step_ref])
def test_a_step_without_noise_does_not_look_at_it(variance, function, device):
    case = Case(device, step="last", variance=variance)
    expected = case.run(function)
    case.noise = torch.full_like(case.noise, float("nan"))
    if variance != "fixed":
        case.out[:, 3:] = -1.0  # the square root of a negative variance is NaN
    assert torch.equal(case.run(function), expected)
    assert case.x.isfinite().all()


@pytest.mark.parametrize("function", [reverse_step, reverse_step_ref])
def test_zero_signal_to_noise_ends_in_the_clamp(function, device):
    case = Case(device, step="zero_snr", clip="clamp")
    case.run(function)
    assert torch.equal(case.x0, torch.sign(case.x_t - case.out))
    assert case.x.isfinite().all()
    assert case.found is None


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("function", [reverse_step, reverse_step_ref])
def test_a_nan_is_not_clamped_away(clip, function, device):
    case = Case(device, clip=clip)
    case.out[1, 2, 3, 4] = float("nan")
    case.run(function)
    assert case.x[1, 2, 3, 4].isnan()
    assert case.x0[1, 2, 3, 4].isnan()
    # The dynamic threshold belongs to the whole image.
    assert case.x[1].isnan().all() == (clip == "dynamic")
    assert case.x[[0, 2]].isfinite().all()
    assert case.found == (STEP["ddpm"], 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [reverse_step, reverse_step_ref])
def test_the_first_nonfinite_output_is_reported(value, layout, function, device):
    case = Case(device, step="ddim", layout=layout, dtype=torch.float16, variance="learned")
    for image in (2, 1):
        case.out[image, 5, 4, 4] = value  # the last element, in the variance's half
        case.run(function, clip="clamp")
        assert case.found == (STEP["ddim"], image)
    case.flag = 1 << 32 | 2  # an earlier step stands, whatever the image
    case.run(function)
    assert case.found == (1, 2)
    case.flag = 5 << 32 | 0  # a later one does not
    case.run(function)
    assert case.found == (STEP["ddim"], 1)


def test_a_nonfinite_state_alone_is_not_the_networks_fault(device):
    case = Case(device)
    case.x_t[0, 0, 0, 0] = float("inf")
    case.run()
    assert case.found is None


def test_decode_nonfinite():
    assert decode_nonfinite(NONFINITE_NONE) is None
    assert decode_nonfinite(999 * 2**32 + 255) == (999, 255)
    assert decode_nonfinite(0) == (0, 0)


def test_a_fixed_variance_ignores_a_second_half_but_not_its_nan(device):
    learned = Case(device, variance="learned", layout="nhwc")
    learned.options["variance"] = "fixed"
    both = learned.run()
    learned.out = learned.out[:, :3]  # a view that is neither NCHW nor NHWC
    assert torch.equal(learned.run(), both)


def test_strides_that_do_not_collapse(device):
    case = Case(device, (2, 3, 6, 6))
    expected = case.run()
    wide = torch.full((2, 3, 12, 12), float("nan"), device=device)
    wide[:, :, ::2, ::2] = case.out
    case.out = wide[:, :, ::2, ::2]
    assert torch.equal(case.run(), expected)
    assert case.found is None


def test_nothing_is_written_outside(device):
    case = Case(device)
    guarded = torch.full((5, 3, 5, 5), 7.0, device=device)
    guarded[1:4] = case.x_t
    flags = torch.tensor([-1, NONFINITE_NONE, -1], device=device)
    previews = torch.full((5, 3, 5, 5), 7.0, device=device)
    case.out[0] = float("nan")
    args = (case.out, case.table, case.counter, flags[1:2])
    reverse_step(guarded[1:4], *args, noise=case.noise, x0=previews[1:4])
    for buffer in (guarded, previews):
        assert torch.equal(buffer[[0, 4]], torch.full((2, 3, 5, 5), 7.0, device=device))
    assert flags.tolist() == [-1, 0, -1]


def test_no_preview_is_asked_for(device):
    case = Case(device, clip="clamp")
    expected = case.run()
    assert torch.equal(case.run(x0=None), expected)


@pytest.mark.parametrize("function", [reverse_step, reverse_step_ref])
@pytest.mark.parametrize("clip", CLIPS)
def test_no_images(function, clip, device):
    case = Case(device, (0, 3, 5, 5), clip=clip)
    assert case.run(function).shape == (0, 3, 5, 5)
    assert case.found is None


@pytest.mark.parametrize("ratio", [0.995, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("elements", [(3, 5, 5), (1, 1, 1), (3, 16, 16)])
def test_the_dynamic_threshold_is_torch_quantile(ratio, elements):
    x_0 = torch.randn(4, *elements) * 3
    expected = torch.quantile(x_0.abs().flatten(1), ratio, dim=1).clamp(1, 2.5)
    assert torch.equal(dynamic_threshold(x_0, ratio, 2.5), expected)


def test_the_dynamic_threshold_of_nan_is_nan():
    x_0 = torch.ones(2, 3, 5, 5)
    x_0[1, 0, 0, 0] = float("nan")
    assert dynamic_threshold(x_0, 0.5, 2.0).isnan().tolist() == [False, True]


KNOWN = {"known": torch.zeros(3, 3, 5, 5), "mask": torch.zeros(3, 3, 5, 5, dtype=torch.uint8)}
PLANED = torch.zeros(3, 3, 3, 5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": "hard"}, "clip 'hard' is not one of none, clamp, dynamic"),
        ({"variance": "large"}, "variance 'large' is not one of"),
        ({"noise": None}, "exactly one of seeds and noise"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "exactly one of seeds and noise"),
        ({"x": torch.zeros(3, 5, 5, 3).permute(0, 3, 1, 2)}, "x must be .* NCHW contiguous"),
        ({"noise": torch.zeros(3, 3, 5, 4)}, "noise must be .* like x"),
        ({"x0": torch.zeros(1, 3, 5, 5)}, "x0 must be .* like x"),
        ({"out": torch.zeros(3, 4, 5, 5)}, r"out must have shape \[3, 3, 5, 5\] or \[3, 6, 5, 5\]"),
        ({"variance": "learned"}, r"out must have shape \[3, 6, 5, 5\] for variance 'learned'"),
        ({"table": torch.zeros(4, 9)}, r"table must be contiguous \[rows, 15\]"),
        ({"rounding": "int8"}, "rounding 'int8' is not one of float32, float16, bfloat16"),
        ({"known": torch.zeros(3, 3, 5, 5)}, "give known and mask together, or neither"),
        (
            KNOWN | {"noise": torch.zeros(3, 3, 3, 5, 5), "mask": torch.zeros(3, 3, 5, 5)},
            "mask must be uint8; found torch.float32",
        ),
        (KNOWN, r"noise must be \[3, 3, 3, 5, 5\] with known; found \[3, 3, 5, 5\]"),
        (KNOWN | {"noise": PLANED, "mask": torch.zeros(3, 1, 5, 5).byte()}, "mask must be .* like x"),
        ({"out": torch.zeros(5, 3, 5, 5)}, "or twice as many images; found \\[5, 3, 5, 5\\]"),
        ({"counter": torch.zeros(1)}, r"counter must be int64 \[1\]"),
        ({"nonfinite": torch.zeros(2, dtype=torch.int64)}, r"nonfinite must be int64 \[1\]"),
        ({"noise": None, "seeds": torch.zeros(2, dtype=torch.int64)}, r"seeds must be int64 \[3\]"),
    ],
)
def test_what_it_refuses(change, message):
    case = Case("cpu")
    arguments = {
        "x": case.x_t,
        "out": case.out,
        "table": case.table,
        "counter": case.counter,
        "nonfinite": torch.tensor([NONFINITE_NONE]),
        "noise": case.noise,
    }
    with pytest.raises(ValueError, match=message):
        reverse_step(**(arguments | change))


def compiled_step(backend_name: str) -> Any:
    def step(x, out, table, counter, nonfinite, **options):
        reverse_step(x, out * 1, table, counter, nonfinite, **options)

    torch.compiler.reset()
    return torch.compile(step, fullgraph=True, dynamic=False, backend=backend_name)


@pytest.mark.parametrize(("clip", "variance"), [("clamp", "fixed"), ("dynamic", "learned_range")])
@pytest.mark.parametrize("conditioned", [False, True])
def test_it_compiles_as_one_graph_of_the_operator(clip, variance, conditioned, device):
    case = Case(device, clip=clip, variance=variance, layout="nhwc", guided=conditioned, inpaint=conditioned)
    expected = case.run(noise="seeds").clone()
    step = compiled_step("aot_eager")
    assert torch.equal(case.run(step, noise="seeds"), expected)


@pytest.mark.skipif(backend.INTERPRET, reason="the reference's process")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize(("clip", "variance"), [("clamp", "fixed"), ("dynamic", "learned_range")])
def test_the_reference_compiles_and_serves_every_step(clip, variance):
    step = compiled_step("inductor")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("ddpm", "last", "ddim"):
            case = Case("cpu", clip=clip, variance=variance, layout="nhwc", step=name)
            expected = case.run(reverse_step_ref, noise="seeds")
            assert (case.run(step, noise="seeds") - expected).abs().max() <= 1e-6
            assert case.found is None


@pytest.mark.parametrize("noise", ["seeds", "noise"])
@pytest.mark.parametrize("inpaint", [False, True])
def test_the_operator_is_well_registered(noise, inpaint, device):
    case = Case(device, inpaint=inpaint)
    known = case.options.get("known"), case.options.get("mask")
    sources = [case.seeds, None] if noise == "seeds" else [None, case.noise]
    args = (case.x_t, case.out, case.table, case.counter, torch.tensor([NONFINITE_NONE], device=device))
    args = (*args, "clamp", "fixed", "float32", *sources, case.x_t.clone(), None, *known)
    torch.library.opcheck(torch.ops.ddpm.reverse_step, args)


@pytest.mark.gpu
def test_a_replayed_graph_does_what_a_launch_does():
    case = Case("cuda")
    expected = [case.run(noise="seeds", x0=None).clone()]
    case.x_t, case.counter = expected[0], case.counter + 1
    expected.append(case.run(noise="seeds", x0=None).clone())

    case = Case("cuda")
    x, nonfinite = case.x_t.clone(), torch.tensor([NONFINITE_NONE], device="cuda")
    args = (x, case.out, case.table, case.counter, nonfinite)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reverse_step(*args, seeds=case.seeds)
        case.counter.add_(1)
    for state in expected:
        graph.replay()
        assert torch.equal(x, state)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    n, c, h, w = 3, 3, 16384, 16384
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * n * c * h * w * 2.5:
        pytest.skip("needs 25 GB of GPU memory")
    x = torch.ones(n, c, h, w, device="cuda")
    out = torch.full_like(x, 0.25)
    x[-1, -1, -1, -1], out[-1, -1, -1, -1] = 2.0, float("inf")
    row = {"kx": 1.0, "ke": -1.0, "kd": 1.0, "c0": 1.0, "clip": 1.0}
    table = torch.tensor([[row.get(column, 0.0) for column in COLUMNS]], device="cuda")
    counter, nonfinite = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.tensor([NONFINITE_NONE], device="cuda")
    reverse_step(x, out, table, counter, nonfinite, seeds=torch.zeros(n, dtype=torch.int64, device="cuda"))
    assert decode_nonfinite(int(nonfinite)) == (0, n - 1)
    assert x[-1, -1, -1, -1] == -1.0
    x[-1, -1, -1, -1] = 0.75
    assert (x.amin(), x.amax()) == (0.75, 0.75)


@pytest.mark.gpu
def test_a_launch_runs_on_its_tensors_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    first, second = Case("cuda:0"), Case("cuda:1")
    torch.cuda.set_device(0)
    assert torch.equal(first.run(noise="seeds").cpu(), second.run(noise="seeds").cpu())
