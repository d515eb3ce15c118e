"""`ddpm.accelerate` on pipelines of stock diffusers: the same call gives the same images."""

from __future__ import annotations

import copy
import filecmp
import inspect
import logging
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

import ddpm
from tests.helpers import constant, ddim_pipeline, stock_images, tiny_pipeline, tiny_unet
from tests.tolerances import CHAIN

STEPS = 8


def generator(seed: int = 1234) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_images(pipe: Any, fast: Any, make: Callable[[], Any] = generator, n: int = 2, **options: Any) -> None:
    """x_0 before the clamp, the images after it, and where the generators stand afterwards."""
    options = {"num_inference_steps": STEPS} | options
    theirs, ours = make(), make()
    expected = stock_images(pipe, n, theirs, **options)
    images = fast(batch_size=n, generator=ours, output_type="pt", **options).images
    assert float((fast.sampler.loops[-1].buffers.x - expected).abs().max()) <= CHAIN
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=CHAIN)
    for a, b in zip(*(g if isinstance(g, list) else [g] for g in (theirs, ours)), strict=True):
        assert torch.equal(a.get_state(), b.get_state())


GENERATORS: dict[str, Callable[[], Any]] = {
    "one": generator,
    "list": lambda: [generator(5), generator(6)],
    "list of one": lambda: [generator(5)],
    "longer list": lambda: [generator(5), generator(6), generator(7)],
}


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS.keys())
def test_ddpm(make):
    pipe = tiny_pipeline()
    assert_same_images(pipe, ddpm.accelerate(pipe), make)


@pytest.mark.parametrize("make", [generator, GENERATORS["list"]], ids=["one", "list"])
@pytest.mark.parametrize("options", [{}, {"eta": 0.6}, {"eta": 1.0, "use_clipped_model_output": True}], ids=str)
def test_ddim(make, options):
    pipe = ddim_pipeline()
    assert_same_images(pipe, ddpm.accelerate(pipe), make, **options)


SETTINGS: dict[str, dict[str, Any]] = {
    "v, learned_range": {"prediction_type": "v_prediction", "variance_type": "learned_range"},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5, "prediction_type": "sample"},
    "trailing": {"timestep_spacing": "trailing", "variance_type": "fixed_large"},
    "no clip": {"clip_sample": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(settings):
    pipe = tiny_pipeline(**settings)
    assert_same_images(pipe, ddpm.accelerate(pipe))


@pytest.mark.parametrize("pipe", [tiny_pipeline(), ddim_pipeline()], ids=["ddpm", "ddim"])
def test_without_a_generator_the_global_one_draws(pipe):
    options = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "pt"}
    drawn, states = [], []
    for each in (pipe, ddpm.accelerate(pipe)):
        torch.manual_seed(7)
        drawn.append(each(**options).images)
        states.append(torch.get_rng_state())
    torch.testing.assert_close(*drawn, rtol=0, atol=CHAIN)
    assert torch.equal(*states)


def test_an_accelerated_pipeline_loaded_from_files(tmp_path):
    tiny_pipeline(seed=3).save_pretrained(tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    fast = ddpm.accelerate(pipe)
    assert_same_images(pipe, fast)
    again = fast.from_pretrained(tmp_path)  # a class method, of the accelerated class
    again.set_progress_bar_config(disable=True)
    assert_same_images(pipe, again)


# A value of every parameter of the calls that is not its default.
VALUES: dict[str, Callable[[], Any]] = {
    "batch_size": lambda: 3,
    "generator": lambda: generator(9),
    "eta": lambda: 0.5,
    "num_inference_steps": lambda: 9,
    "use_clipped_model_output": lambda: True,
    "output_type": lambda: "np",
    "return_dict": lambda: False,
}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make, name)
        for make, kind in ((tiny_pipeline, DDPMPipeline), (ddim_pipeline, DDIMPipeline))
        for name in [*inspect.signature(kind.__call__).parameters][1:]
    ],
)
def test_every_parameter_of_the_call(make, name):
    pipe = constant(make())
    fast = ddpm.accelerate(pipe)
    assert inspect.signature(fast) == inspect.signature(pipe)
    results = []
    for each in (pipe, fast):
        torch.manual_seed(0)
        results.append(each(**({"num_inference_steps": STEPS} | {name: VALUES[name]()})))
    theirs, ours = (r if isinstance(r, tuple) else (r.images,) for r in results)
    assert type(results[0]) is type(results[1])
    difference = np.stack(ours[0]).astype(float) - np.stack(theirs[0])
    assert np.abs(difference).max() <= (1e-6 if name == "output_type" else 1)  # the others are bytes, of PIL


@pytest.mark.parametrize("channels", [3, 1])
def test_output_types_to_the_last_bit(channels):
    pipe = constant(tiny_pipeline({"in_channels": channels, "out_channels": channels}))
    fast = ddpm.accelerate(pipe)
    for output_type in ("pt", "np", "pil", "array", None):
        theirs, ours = (each(2, generator(), STEPS, output_type).images for each in (pipe, fast))
        assert type(ours) is type(theirs)
        if output_type == "pil":
            assert [image.mode for image in ours] == [image.mode for image in theirs]
        else:
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.array_equal(np.stack(ours), np.stack(theirs))


@pytest.mark.parametrize("make", [tiny_pipeline, ddim_pipeline])
def test_every_attribute_is_the_pipelines(make):
    pipe = make()
    assert not {"sampler", "explain", "refresh", "plain", "options"} & set(dir(pipe))
    fast = ddpm.accelerate(pipe)
    assert isinstance(fast, type(pipe))
    assert repr(type(fast)) == repr(type(pipe))
    for name in dir(pipe):
        if name.startswith("_"):
            continue
        theirs, ours = getattr(pipe, name), getattr(fast, name)
        if inspect.ismethod(theirs):
            assert ours.__func__ is theirs.__func__, name
        else:
            assert ours == theirs, name
    assert fast.to("cpu") is fast
    assert "reverse_step" in fast.explain()


@pytest.mark.parametrize("make", [tiny_pipeline, ddim_pipeline])
def test_it_saves_what_the_pipeline_saves(make, tmp_path):
    pipe = make()
    fast = ddpm.accelerate(pipe)
    fast(num_inference_steps=2)
    for each, name in ((pipe, "theirs"), (fast, "ours")):
        each.save_pretrained(tmp_path / name)
    theirs, ours = (
        sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.*")) for name in ("theirs", "ours")
    )
    assert ours == theirs
    assert len(ours) == 4
    same, *others = filecmp.cmpfiles(tmp_path / "theirs", tmp_path / "ours", theirs, shallow=False)
    assert (len(same), others) == (4, [[], []])


def test_copies_are_accelerated_and_independent():
    pipe = tiny_pipeline()
    fast = ddpm.accelerate(pipe, compile=False)
    for other in (copy.copy(fast), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), ddpm.accelerate(fast)):
        assert_same_images(pipe, other)
        assert type(other).__mro__[2] is DDPMPipeline
    other = copy.copy(fast)
    other.scheduler = DDIMScheduler(num_train_timesteps=100)
    assert type(fast.scheduler) is DDPMScheduler


def train(unet: UNet2DModel) -> None:
    unet(torch.ones(1, 3, 8, 8), 3).sample.square().sum().backward()
    torch.optim.SGD(unet.parameters(), lr=1e-3).step()


@torch.no_grad()
def exchange_channels(unet: UNet2DModel) -> None:
    """The sum of all bits stays the same."""
    unet.conv_out.weight.copy_(unet.conv_out.weight.flip(0).clone())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimizer": lambda pipe: train(pipe.unet),
    "data.copy_": lambda pipe: [p.data.copy_(0.9 * p.data) for p in pipe.unet.parameters()],
    "load_state_dict": lambda pipe: pipe.unet.load_state_dict(tiny_unet(5).state_dict()),
    "new unet": lambda pipe: setattr(pipe, "unet", tiny_unet(6)),
    "exchanged channels": lambda pipe: exchange_channels(pipe.unet),
    "channels_last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last).conv_out.bias.data.add_(0.1),
    "one bit": lambda pipe: pipe.unet.conv_out.bias.data.view(torch.int32)[0].bitwise_xor_(1 << 24),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_weights_are_noticed(change, caplog):
    caplog.set_level(logging.INFO, "ddpm")
    pipe = tiny_pipeline()
    fast = ddpm.accelerate(pipe)
    before = stock_images(pipe, 2, generator(), num_inference_steps=STEPS)
    sampler = fast.sampler
    assert_same_images(pipe, fast)
    assert fast.sampler.network is sampler.network
    change(pipe)
    assert_same_images(pipe, fast)
    assert float((fast.sampler.loops[-1].buffers.x - before).abs().max()) > 100 * CHAIN
    assert caplog.text.count("has changed") == 1


def test_a_sampler_is_a_snapshot():
    pipe = tiny_pipeline()
    sampler = ddpm.accelerate(pipe).sampler
    options = {"seeds": [1], "steps": STEPS, "progress": False}
    before, kept = sampler.sample(1, **options), copy.deepcopy(sampler.checkpoint.network.state_dict())
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(0.5)
    pipe.scheduler.alphas_cumprod.mul_(0.5)
    assert torch.equal(sampler.sample(1, **options), before)
    assert all(torch.equal(value, kept[name]) for name, value in sampler.checkpoint.network.state_dict().items())


def test_a_sampler_that_was_handed_out_stays_as_it_is():
    fast = ddpm.accelerate(tiny_pipeline())
    sampler = fast.sampler
    fast.scheduler = DDIMScheduler.from_config(fast.scheduler.config)
    fast(num_inference_steps=2)
    assert (sampler.checkpoint.rules.sampler, fast.sampler.checkpoint.rules.sampler) == ("ddpm", "ddim")


def test_another_resolution_set_afterwards():
    pipe = tiny_pipeline()
    fast = ddpm.accelerate(pipe)
    fast(num_inference_steps=2)
    pipe.unet.register_to_config(sample_size=16)
    assert_same_images(pipe, fast)


def test_threads_take_turns():
    """As the handlers of a web service do: every image is the one that the call draws alone."""
    fast = ddpm.accelerate(tiny_pipeline())
    fast.set_progress_bar_config(disable=True)

    def draw(seed: int) -> torch.Tensor:
        return fast(generator=generator(seed), num_inference_steps=20, output_type="pt").images

    expected = [draw(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for images, alone in zip(pool.map(draw, range(8)), expected, strict=True):
            assert torch.equal(images, alone)


def test_torchs_default_dtype_does_not_matter():
    pipe = tiny_pipeline()
    fast = ddpm.accelerate(pipe)
    expected = fast(generator=generator(), num_inference_steps=2, output_type="pt").images
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fast(generator=generator(), num_inference_steps=2, output_type="pt").images, expected)
        assert fast.sampler.gflop_per_image() > 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_refresh_and_a_change_of_dtype():
    pipe = tiny_pipeline()
    fast = ddpm.accelerate(pipe)
    sampler = fast.sampler
    fast.refresh()
    assert fast.sampler.network is not sampler.network
    assert fast.to(torch.float16) is fast
    assert fast(num_inference_steps=2, output_type="pt").images.dtype == torch.float16
    assert fast.sampler.dtype == "fp16"
    assert ddpm.accelerate(pipe, dtype="fp32").sampler.dtype == "fp32"


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "DDIMScheduler": lambda pipe: setattr(pipe, "scheduler", DDIMScheduler(num_train_timesteps=100)),
    "from_config": lambda pipe: setattr(
        pipe,
        "scheduler",
        DDIMScheduler.from_config(DDPMScheduler(num_train_timesteps=100, variance_type="learned_range").config),
    ),
    "another DDPMScheduler": lambda pipe: setattr(pipe, "scheduler", DDPMScheduler(200, beta_schedule="laplace")),
    "register_to_config": lambda pipe: pipe.scheduler.register_to_config(clip_sample_range=0.7),
    "alphas_cumprod": lambda pipe: pipe.scheduler.alphas_cumprod.pow_(1.2),
}


@pytest.mark.parametrize("change", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_the_scheduler_is_read_at_every_call(change):
    pipe = tiny_pipeline()
    fast = ddpm.accelerate(pipe)
    sampler = fast.sampler
    before = stock_images(pipe, 2, generator(), num_inference_steps=STEPS)
    assert_same_images(pipe, fast)
    change(fast)
    assert_same_images(pipe, fast)
    assert float((fast.sampler.loops[-1].buffers.x - before).abs().max()) > 100 * CHAIN
    assert fast.sampler.network is sampler.network
    assert fast.sampler.checkpoint.schedule.num_train_timesteps == fast.scheduler.config.num_train_timesteps
    assert len(fast.scheduler.timesteps) == STEPS


def test_the_step_at_timestep_minus_one_is_left_out(caplog):
    pipe = tiny_pipeline(num_train_timesteps=1000, timestep_spacing="trailing")
    fast = ddpm.accelerate(pipe)
    ours = fast(1, generator(), 61, "pt").images
    assert "timestep -1" in caplog.text
    walked = [t for t in pipe.scheduler.timesteps.tolist() if t >= 0]
    assert len(walked) == len(pipe.scheduler.timesteps) - 1
    pipe.scheduler.set_timesteps = lambda steps: DDPMScheduler.set_timesteps(pipe.scheduler, timesteps=walked)
    torch.testing.assert_close(ours, pipe(1, generator(), 61, "pt").images, rtol=0, atol=CHAIN)


def test_the_progress_bar_is_the_pipelines(capsys):
    fast = ddpm.accelerate(tiny_pipeline())
    fast(num_inference_steps=STEPS)
    assert not capsys.readouterr().err
    fast.set_progress_bar_config(desc="drawing")
    fast(num_inference_steps=STEPS)
    assert "drawing: 100%" in (shown := capsys.readouterr().err)
    assert f"{STEPS}/{STEPS}" in shown


def test_offloaded_models_are_freed_at_the_end():
    pipe, freed = tiny_pipeline(), []
    pipe.maybe_free_model_hooks = lambda: freed.append(len(pipe.scheduler.timesteps))
    ddpm.accelerate(pipe)(num_inference_steps=STEPS)
    assert freed == [STEPS]


def test_it_can_be_interrupted():
    class Bar:
        def __init__(self, total: int) -> None: ...
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None: ...
        def update(self) -> None:
            raise KeyboardInterrupt

    pipe = tiny_pipeline()
    fast = ddpm.accelerate(pipe)
    pipe.progress_bar = Bar
    with pytest.raises(KeyboardInterrupt):
        fast(num_inference_steps=STEPS)
    del pipe.progress_bar
    assert_same_images(pipe, fast)


def test_under_inference_mode_and_autocast():
    pipe = tiny_pipeline()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fast = ddpm.accelerate(pipe)
        within = fast(2, generator(), STEPS, "pt").images
    assert_same_images(pipe, fast)
    assert torch.equal(within, fast(2, generator(), STEPS, "pt").images)


def test_a_network_behind_torch_compile():
    pipe = tiny_pipeline()
    expected = stock_images(pipe, 2, generator(), num_inference_steps=STEPS)
    pipe.unet = torch.compile(pipe.unet)
    fast = ddpm.accelerate(pipe)
    fast(2, generator(), STEPS)
    assert float((fast.sampler.loops[-1].buffers.x - expected).abs().max()) <= CHAIN


def test_a_network_that_overflows():
    pipe = tiny_pipeline()
    pipe.unet.conv_out.weight.data.fill_(3e38)
    with pytest.raises(ddpm.NonFiniteError, match="step 0"):
        ddpm.accelerate(pipe)(num_inference_steps=2)
