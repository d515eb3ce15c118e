"""The public face on the CPU: equal images whatever the batch, one loop per chain shape, and refusals by name."""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import ddpm
from ddpm import loop as loops
from ddpm import sampler as samplers
from ddpm.checkpoints import load_checkpoint
from ddpm.fused import GroupNormSiLU
from ddpm.loop import decide_compile
from tests.helpers import save_tiny

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def sampler(checkpoint):
    return ddpm.load(checkpoint, device="cpu", compile=False)


def sample(model: ddpm.Sampler, /, n: int, **options) -> torch.Tensor:
    return model.sample(n, **({"steps": 4, "progress": False} | options))


# --- images ----------------------------------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_batch(sampler):
    seeds = [7, 0, 2**64 - 1, *range(100, 113)]
    together = sample(sampler, 16, seeds=seeds)
    assert together.shape == (16, 3, 8, 8)
    assert together.dtype == torch.float32
    assert together.device == CPU
    assert float(together.abs().max()) <= 1
    for batch_size in (1, 3):
        images = sample(sampler, 16, seeds=seeds, batch_size=batch_size)
        assert float((images - together).abs().max()) <= 1e-4, batch_size
    backwards = sample(sampler, 16, seeds=seeds[::-1])
    assert float((backwards.flip(0) - together).abs().max()) <= 1e-4
    assert float((together[0] - together[1]).abs().max()) > 0.1


def test_the_same_call_gives_the_same_bits(sampler, checkpoint):
    first = sample(sampler, 3, seeds=[1, 2, 3])
    assert torch.equal(sample(sampler, 3, seeds=[1, 2, 3]), first)
    assert torch.equal(sample(ddpm.load(checkpoint, device="cpu", compile=False), 3, seeds=[1, 2, 3]), first)


def test_fresh_seeds_are_reported_and_reproduce(sampler):
    images = sample(sampler, 3)
    seeds = sampler.last_seeds
    assert len(seeds) == len(set(seeds)) == 3
    other = sample(sampler, 3)
    assert sampler.last_seeds != seeds
    assert not torch.equal(images, other)
    assert torch.equal(sample(sampler, 3, seeds=seeds), images)
    assert sampler.last_seeds == seeds
    sample(sampler, 2, generator=torch.Generator().manual_seed(0))
    assert sampler.last_seeds is None


def test_seeds_of_any_iterable_and_integer_type(sampler):
    import numpy as np

    expected = sample(sampler, 3, seeds=[0, 1, 2])
    for seeds in (range(3), iter([0, 1, 2]), np.arange(3), torch.arange(3)):
        assert torch.equal(sample(sampler, 3, seeds=seeds), expected)


def test_a_longer_chain_after_a_shorter_one_and_back(sampler):
    short = sample(sampler, 2, seeds=[0, 1], steps=3)
    long = sample(sampler, 2, seeds=[0, 1], steps=9)
    assert not torch.equal(short, long)
    assert torch.equal(sample(sampler, 2, seeds=[0, 1], steps=3), short)
    assert len(sampler.loops) == 1


def test_all_steps_is_the_default(sampler):
    seen = []
    sampler.sample(1, seeds=[0], progress=False, callback=lambda step, timestep, preview: seen.append(timestep))
    assert seen == list(range(99, -1, -1))


def test_two_samplers_at_once_do_not_disturb_each_other(checkpoint, tmp_path):
    one = ddpm.load(checkpoint, device="cpu", compile=False)
    two = ddpm.load(save_tiny(tmp_path, seed=1, variance_type="fixed_large"), device="cpu", compile=False)
    alone = [sample(s, 4, seeds=range(4), batch_size=2) for s in (one, two)]
    assert not torch.equal(*alone)
    batches = ([], [])
    options = {"seeds": range(4), "steps": 4, "batch_size": 2, "progress": False}
    for a, b in zip(one.stream(4, **options), two.stream(4, **options), strict=True):
        batches[0].append(a.images)
        batches[1].append(b.images)
    for parts, expected in zip(batches, alone, strict=True):
        assert torch.equal(torch.cat(parts), expected)


def test_two_streams_of_one_sampler_do_not_disturb_each_other(sampler):
    options = {"steps": 4, "batch_size": 2, "progress": False}
    first, second = (
        sample(sampler, 4, seeds=range(4), batch_size=2),
        sample(sampler, 4, seeds=range(4, 8), batch_size=2),
    )
    streams = sampler.stream(4, seeds=range(4), **options), sampler.stream(4, seeds=range(4, 8), **options)
    pairs = list(zip(*streams, strict=True))
    assert torch.equal(torch.cat([a.images for a, _ in pairs]), first)
    assert torch.equal(torch.cat([b.images for _, b in pairs]), second)


def test_threads_take_turns(sampler):
    expected = [sample(sampler, 2, seeds=[s, s + 1], steps=20) for s in range(6)]
    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda s: sample(sampler, 2, seeds=[s, s + 1], steps=20), range(6)))
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_a_chain_within_a_chain_is_refused(sampler):
    def callback(step, timestep, preview):
        sample(sampler, 1, seeds=[9], callback=lambda *_: None)

    with pytest.raises(RuntimeError, match="another chain was begun on this sampler"):
        sample(sampler, 1, seeds=[0], callback=callback)
    assert torch.equal(sample(sampler, 1, seeds=[0]), sample(sampler, 1, seeds=[0]))


def test_a_stream_gives_batches_with_their_seeds(sampler):
    batches = list(sampler.stream(5, seeds=range(10, 15), steps=2, batch_size=2, progress=False))
    assert [(b.start, len(b.images), b.seeds) for b in batches] == [(0, 2, [10, 11]), (2, 2, [12, 13]), (4, 1, [14])]


def test_half_precision(checkpoint):
    expected = sample(ddpm.load(checkpoint, device="cpu", compile=False), 2, seeds=[0, 1])
    images = sample(ddpm.load(checkpoint, device="cpu", compile=False, dtype="bf16"), 2, seeds=[0, 1])
    assert images.dtype == torch.float32
    difference = (images - expected).abs()
    assert float(difference.max()) > 0
    assert float(difference.mean()) < 0.1


def test_global_state_is_left_alone(sampler):
    before = torch.get_rng_state(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    sample(sampler, 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before[1:]
    assert torch.is_grad_enabled()


def test_inference_mode_and_autocast_of_the_caller_leave_no_trace(checkpoint):
    """A sampler made and used under them is as good as any afterwards, and computes the same."""
    expected = sample(ddpm.load(checkpoint, device="cpu", compile=False), 2, seeds=[0, 1])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        sampler = ddpm.load(checkpoint, device="cpu", compile=False)
        within = sample(sampler, 2, seeds=[0, 1])
    assert torch.equal(within, expected)
    assert torch.equal(sample(sampler, 2, seeds=[0, 1]), expected)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("mine", ["none", "ieee", "tf32"])
def test_the_users_precision_settings_are_used_and_restored(mine, tf32, monkeypatch):
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision = conv.fp32_precision = mine
        kept = matmul.fp32_precision, conv.fp32_precision
        with loops.float32_precision(tf32):
            assert matmul.fp32_precision == conv.fp32_precision == ("tf32" if tf32 else "ieee")
        assert (matmul.fp32_precision, conv.fp32_precision) == kept
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def test_a_few_loops_are_kept(sampler):
    for n in range(1, 8):
        sample(sampler, n)
    assert [loop.shape.batch for loop in sampler.loops] == [4, 5, 6, 7]
    sample(sampler, 4)
    assert [loop.shape.batch for loop in sampler.loops] == [5, 6, 7, 4]


# --- loops and compilation -------------------------------------------------------------------------------------------


def test_ten_images_at_batch_size_four_make_one_loop(sampler):
    images = sample(sampler, 10, seeds=range(10), batch_size=4)
    assert images.shape[0] == 10
    assert [(loop.shape.batch, loop.compilations, loop.captures) for loop in sampler.loops] == [(4, 0, 0)]
    sample(sampler, 6, seeds=range(6), batch_size=4, steps=7)
    assert len(sampler.loops) == 1


def test_the_time_table_is_made_anew_where_the_timesteps_change_and_only_there(checkpoint, sampler, monkeypatch):
    """What is done at them is another thing: the coefficients are those of the call."""
    made, make = [], sampler.network.time.table
    monkeypatch.setattr(sampler.network.time, "table", lambda told: made.append(len(told)) or make(told))
    ddim = {"sampler": "ddim", "eta": 0.5}
    first = sample(sampler, 2, seeds=[0, 1])
    assert torch.equal(sample(sampler, 2, seeds=[0, 1]), first)
    other = sample(sampler, 2, seeds=[0, 1], steps=None, timesteps=[75, 50, 25, 0], **ddim)
    assert torch.equal(other, sample(ddpm.load(checkpoint, device="cpu", compile=False), 2, seeds=[0, 1], **ddim))
    assert made == [4]
    for chain in ({"spacing": "trailing"}, {"steps": 3}):  # as long, with other timesteps; and shorter
        assert not torch.equal(sample(sampler, 2, seeds=[0, 1], **chain), first)
    assert made == [4, 4, 3]
    assert torch.equal(sample(sampler, 2, seeds=[0, 1]), first)
    assert made == [4, 4, 3, 4]
    assert len(sampler.loops) == 1


def test_a_chain_that_is_interrupted_before_its_first_step_leaves_nothing_behind(sampler, monkeypatch):
    run = sampler.plan(2, seeds=[0, 1], steps=4, progress=False)
    first = run.final()

    def interrupted(timesteps):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sampler.network.time, "table", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(sampler, 2, steps=5)
    assert torch.equal(run.final(), first)


@pytest.mark.parametrize("capture", [True, False])
def test_capturing_is_the_loops_business(checkpoint, monkeypatch, capture):
    asked, make = [], samplers.Loop
    monkeypatch.setattr(samplers, "Loop", lambda *given, **options: asked.append(options) or make(*given, **options))
    sample(ddpm.Sampler(load_checkpoint(checkpoint), device="cpu", compile=False, capture=capture), 1, seeds=[0])
    assert [options["captured"] for options in asked] == [capture]
    with pytest.raises(ValueError, match="capture"):
        ddpm.Sampler(load_checkpoint(checkpoint), device="cpu", capture="no")


@needs_compiler
def test_ten_images_at_batch_size_four_make_one_compilation_that_equals_eager(checkpoint, sampler):
    """The step compiles as one graph (fullgraph: a graph break would raise), once, and computes the same."""
    expected = sample(sampler, 10, seeds=range(10), batch_size=4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = ddpm.load(checkpoint, device="cpu", compile=True)
    images = sample(compiled, 10, seeds=range(10), batch_size=4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert [loop.compilations for loop in compiled.loops] == [1]
    assert float((images - expected).abs().max()) <= 1e-5
    again = sample(compiled, 5, seeds=range(5), batch_size=4, steps=9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert float((again - sample(sampler, 5, seeds=range(5), batch_size=4, steps=9)).abs().max()) <= 1e-5


@needs_compiler
def test_a_process_may_compile_any_number_of_shapes(checkpoint):
    """torch.compile limits compilations per code object; each loop has its own."""
    torch._dynamo.reset()
    compiled = ddpm.load(checkpoint, device="cpu", compile=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in (1, 2, 3):
            assert sample(compiled, n, seeds=range(n)).shape[0] == n
    assert [loop.compilations for loop in compiled.loops] == [1, 1, 1]


@needs_compiler
@pytest.mark.parametrize(
    "rules",
    [
        {"variance_type": "learned_range"},
        {"thresholding": True, "sample_max_value": 2.0},
    ],
    ids=["learned_range", "thresholding"],
)
def test_other_steps_compile_as_one_graph_too(tmp_path, rules):
    save_tiny(tmp_path, **rules)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = sample(ddpm.load(tmp_path, device="cpu", compile=False), 2, generator=torch.Generator().manual_seed(0))
    images = sample(ddpm.load(tmp_path, device="cpu", compile=True), 2, generator=torch.Generator().manual_seed(0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert float((images - expected).abs().max()) <= 1e-5


def without_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_without_a_compiler_a_long_run_is_eager_with_a_warning(monkeypatch):
    without_compiler(monkeypatch)
    with pytest.warns(UserWarning, match="no compiler found: the step runs eagerly"):
        assert decide_compile("auto", CPU, 1e9) is False


def test_without_a_compiler_a_short_run_does_not_warn(monkeypatch):
    without_compiler(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decide_compile("auto", CPU, 1.0) is False
        assert decide_compile(False, CPU, 1e9) is False


def test_compilation_without_a_compiler_is_refused(monkeypatch, checkpoint):
    without_compiler(monkeypatch)
    with pytest.raises(ValueError, match=r"compile=True needs a C\+\+ compiler"):
        sample(ddpm.load(checkpoint, device="cpu", compile=True), 1)


def test_compile_auto_goes_by_the_work_of_the_run(monkeypatch):
    monkeypatch.setattr(loops, "can_compile", lambda device: True)
    limit = loops.REPAYS_GFLOP["cpu"]
    assert decide_compile("auto", CPU, limit * 1.01) is True
    assert decide_compile("auto", CPU, limit * 0.99) is False
    assert decide_compile(True, CPU, 0.0) is True
    assert decide_compile(False, CPU, limit * 2) is False


@pytest.mark.parametrize("choice", ["on", None, 2])
def test_another_value_of_compile_is_refused(checkpoint, choice):
    with pytest.raises(ValueError, match="compile must be True, False or 'auto'"):
        sample(ddpm.load(checkpoint, device="cpu", compile=choice), 1)


def test_gflop_per_image_is_that_of_the_network(sampler):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sampler.checkpoint.network(torch.zeros(1, 3, 8, 8), 5)
    assert sampler.gflop_per_image() == counter.get_total_flops() / 1e9 > 0


# --- callback, interruption, NaN -------------------------------------------------------------------------------------


def test_the_callback_follows_every_step(sampler):
    seen = []
    images = sample(
        sampler, 5, seeds=range(5), batch_size=3, callback=lambda *arguments: seen.append(arguments), steps=4
    )
    assert [(step, timestep, tuple(preview.shape)) for step, timestep, preview in seen] == [
        (i, t, (n, 3, 8, 8)) for n in (3, 2) for i, t in enumerate([75, 50, 25, 0])
    ]
    assert all(preview.device == CPU and preview.dtype == torch.float32 for *_, preview in seen)
    # At t = 0 the step returns x_0 itself.
    torch.testing.assert_close(torch.cat([seen[3][2], seen[7][2]]), images, rtol=0, atol=1e-6)
    assert float((seen[0][2] - seen[3][2]).abs().max()) > 0.05  # previews are copies, not one buffer
    assert float((images - sample(sampler, 5, seeds=range(5))).abs().max()) <= 1e-4


def test_ctrl_c_keeps_the_finished_batches(sampler):
    calls = []

    def callback(step, timestep, preview):
        calls.append(step)
        if len(calls) == 2 * 4 + 2:  # in the middle of the third batch
            raise KeyboardInterrupt

    with pytest.raises(ddpm.SamplingInterrupted) as caught:
        sample(sampler, 7, seeds=range(20, 27), batch_size=2, callback=callback)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.seeds == [20, 21, 22, 23]
    expected = sample(sampler, 4, seeds=range(20, 24), batch_size=2)
    assert float((caught.value.images - expected).abs().max()) <= 1e-5
    # The sampler is still good.
    assert torch.equal(sample(sampler, 4, seeds=range(20, 24), batch_size=2), expected)


def test_ctrl_c_in_the_first_batch(sampler):
    def callback(step, timestep, preview):
        raise KeyboardInterrupt

    with pytest.raises(ddpm.SamplingInterrupted, match="interrupted with 0 images finished") as caught:
        sample(sampler, 2, generator=torch.Generator().manual_seed(0), callback=callback)
    assert caught.value.images.shape == (0, 3, 8, 8)
    assert caught.value.seeds is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_outputs_nan_is_reported_not_clamped(checkpoint, value):
    sampler = ddpm.load(checkpoint, device="cpu", compile=False)
    sampler._network.conv_out.bias[1] = value
    with pytest.raises(ddpm.NonFiniteError) as caught:
        sample(sampler, 3, seeds=[5, 6, 7], batch_size=2)
    error = caught.value
    assert (error.step, error.timestep, error.image, error.seed) == (0, 75, 0, 5)
    assert "NaN or infinite at step 0 (timestep 75) in image 0 (seed 5)" in str(error)
    assert error.images.shape == (0, 3, 8, 8)


def test_nan_is_reported_with_the_step_and_the_image_where_it_began(sampler):
    """x_T of image 3 is NaN: the second batch of two holds it."""
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noise[3, 1, 2, 2] = float("nan")
    with pytest.raises(ddpm.NonFiniteError) as caught:
        sample(sampler, 4, seeds=[5, 6, 7, 8], noise=noise, batch_size=2)
    assert (caught.value.step, caught.value.image, caught.value.seed) == (0, 3, 8)
    expected = sample(sampler, 2, seeds=[5, 6], noise=noise[:2], batch_size=2)
    assert torch.equal(caught.value.images, expected)


def test_nan_that_begins_later_is_reported_with_that_step(checkpoint):
    sampler = ddpm.load(checkpoint, device="cpu", compile=False)
    table = sampler._network.time.table
    sampler._network.time.table = lambda timesteps: torch.where((timesteps == 25)[:, None], torch.nan, table(timesteps))
    with pytest.raises(ddpm.NonFiniteError) as caught:
        sample(sampler, 2, generator=torch.Generator().manual_seed(0))
    assert (caught.value.step, caught.value.timestep, caught.value.seed) == (2, 25, None)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_the_ddpm_sampler_may_be_named(sampler):
    assert torch.equal(sample(sampler, 1, seeds=[0], sampler="ddpm"), sample(sampler, 1, seeds=[0]))


@pytest.mark.parametrize("steps", [0, -3, 101, True, 2.5])
def test_steps_out_of_range(sampler, steps):
    with pytest.raises(ValueError, match="steps must be an integer from 1 to 100"):
        sample(sampler, 1, steps=steps)


def test_bad_arguments(sampler):
    generator = torch.Generator()
    for options, sentence in [
        ({"steps": "10;10"}, "steps '10;10' is no respacing string"),
        ({"steps": "10", "spacing": "leading"}, "is a respacing string, which spaces by itself"),
        ({"sampler": "ddpmpp"}, "sampler 'ddpmpp' is not one of ddpm, ddim"),
        ({"eta": 0.5}, r"eta=0\.5 belongs to DDIM, and this chain is DDPM; pass sampler='ddim'"),
        ({"ddim_epsilon": "raw"}, "belongs to DDIM"),
        ({"sampler": "ddim", "eta": 1.5}, r"eta must be a number from 0 .* got 1\.5"),
        ({"sampler": "ddim", "ddim_epsilon": "clipped"}, "ddim_epsilon 'clipped' is not one of raw, rederived"),
        ({"labels": 3}, "this checkpoint is not class-conditional; leave them out"),
        ({"low_res": torch.zeros(1, 3, 4, 4)}, "this checkpoint is no super-resolution model; leave it out"),
        ({"n": 0}, "n must be a positive integer; got 0"),
        ({"n": True}, "n must be a positive integer; got True"),
        ({"batch_size": 0}, "batch_size must be a positive integer; got 0"),
        ({"batch_size": -1}, "batch_size must be a positive integer; got -1"),
        ({"seeds": [1, 2], "generator": generator}, "give either seeds or a generator, not both"),
        ({"seeds": [1]}, "seeds has 1 entries for n=2 images"),
        ({"seeds": [1, 2, 3]}, "seeds has 3 entries for n=2 images"),
        ({"seeds": [1, -1]}, "seed -1 is not an integer from 0 to"),
        ({"seeds": [1, 2**64]}, f"seed {2**64} is not an integer from 0 to"),
        ({"seeds": [1, 0.5]}, r"seed 0\.5 is not an integer"),
        ({"seeds": [1, True]}, "seed True is not an integer"),
        ({"generator": [generator]}, "generator has 1 entries for n=2 images"),
        ({"generator": "seed"}, "generator must be a torch.Generator or a sequence of them"),
        ({"noise": torch.zeros(1, 3, 8, 8)}, r"noise has shape \[1, 3, 8, 8\]; expected x_T of shape \[2, 3, 8, 8\]"),
        ({"timesteps": [5, 1], "steps": 2}, "either timesteps or steps"),
        ({"timesteps": [1, 5], "steps": None}, "strictly descending"),
        ({"spacing": "karras"}, "spacing 'karras' is not one of"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            sample(sampler, **({"n": 2} | options))
    with pytest.raises(TypeError, match="guidance"):
        sample(sampler, 2, guidance=3)
    assert sampler.loops == []  # nothing was built for a refused request


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_a_gpu_that_is_not_there(checkpoint, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="was asked for, but torch finds no GPU here"):
        ddpm.load(checkpoint, device=device)


def test_other_devices_and_dtypes_are_refused(checkpoint):
    for options, sentence in [
        ({"device": "gpu"}, "device 'gpu' is not one of auto, cpu, cuda"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"dtype": "float32"}, "dtype 'float32' is not one of auto, fp32, tf32, fp16, bf16"),
        ({"dtype": "tf32"}, "dtype 'tf32' exists on a GPU only"),
        ({"dtype": torch.float16}, "is not one of auto, fp32"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            ddpm.load(checkpoint, **({"device": "cpu"} | options))


# --- batches and explain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "images_that_fit", "batch"), [(1, 100, 1), (16, 100, 16), (17, 100, 9), (10, 4, 4), (5, 0, 1)]
)
def test_large_n_is_split_by_available_memory(sampler, monkeypatch, n, images_that_fit, batch):
    monkeypatch.setattr(
        samplers, "available_memory", lambda device: int((images_that_fit + 0.5) * sampler._bytes_per_image() / 0.7)
    )
    sample(sampler, n, steps=1)
    assert [loop.shape.batch for loop in sampler.loops] == [batch]


def test_one_generator_means_one_batch(sampler):
    sample(sampler, 20, steps=1, generator=torch.Generator().manual_seed(0))
    assert [loop.shape.batch for loop in sampler.loops] == [20]


def test_explain_names_every_convolution_and_norm(sampler):
    text = sampler.explain()
    lines = text.splitlines()
    layers = {
        name: module
        for name, module in sampler._network.named_modules()
        if isinstance(module, (nn.Conv2d, GroupNormSiLU))
    }
    assert len(layers) > 20
    for name, module in layers.items():
        line = [entry for entry in lines if entry.split("  ")[0] == name]
        assert len(line) == 1, name
        assert ("convolution" if isinstance(module, nn.Conv2d) else "group_norm_silu") in line[0]
    assert lines[0].startswith("device: cpu, dtype: fp32")
    assert "plain PyTorch" in text
    assert "heads of 8" in text
    assert "table of" in text


def test_progress_goes_to_standard_error(sampler, capsys):
    sampler.sample(4, seeds=range(4), steps=3, batch_size=2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "6/6" in captured.err
    assert "step/s" in captured.err
    sampler.sample(1, seeds=[0], steps=3, progress=False)
    assert capsys.readouterr().err == ""
