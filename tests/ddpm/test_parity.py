"""Image for image the same as stock DDPMPipeline: same checkpoint, same CPU generator, |difference| <= 1e-4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

import ddpm
from ddpm.cli import DEMO
from tests.helpers import CIFAR, TRAINING_SCRIPT, redraw, reference_images, save_tiny, stock_images, tiny_pipeline
from tests.tolerances import CHAIN

SEED = 1234


def generator(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_parity(directory: Path, n: int, steps: int, *, reference: bool = True) -> None:
    """Stock pipeline, as loaded from the files, against the sampler and the oracle."""
    pipe = DDPMPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    expected = stock_images(pipe, n, generator(), num_inference_steps=steps)
    assert expected.isfinite().all()
    sampler = ddpm.load(directory, device="cpu", dtype="fp32", compile=False)
    images = sampler.sample(n, steps=steps, generator=generator(), progress=False)
    assert images.shape == expected.shape
    assert images.dtype == torch.float32
    assert float((images - expected).abs().max()) <= CHAIN
    if reference:
        assert float((reference_images(sampler, n, steps, generator()) - expected).abs().max()) <= CHAIN


RULES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "T 1000": {"num_train_timesteps": 1000},
    "fixed_small_log": {"variance_type": "fixed_small_log"},
    "fixed_large": {"variance_type": "fixed_large"},
    "learned": {"variance_type": "learned", "positive_variance": True},
    "learned_range": {"variance_type": "learned_range"},
    "sample": {"prediction_type": "sample"},
    "v_prediction": {"prediction_type": "v_prediction"},
    "learned_range, v": {"variance_type": "learned_range", "prediction_type": "v_prediction"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "trailing, fixed_large": {"timestep_spacing": "trailing", "variance_type": "fixed_large"},
    "steps_offset": {"steps_offset": 1, "variance_type": "fixed_large"},
    "no clip": {"clip_sample": False},
    "no clip, sample": {"clip_sample": False, "prediction_type": "sample"},
    "no clip, v": {"clip_sample": False, "prediction_type": "v_prediction"},
    "no clip, learned": {"clip_sample": False, "variance_type": "learned", "positive_variance": True},
    "clip range": {"clip_sample_range": 0.6},
    "thresholding": {"thresholding": True},
    "thresholding, max": {"thresholding": True, "sample_max_value": 2.5, "dynamic_thresholding_ratio": 0.9},
    "thresholding, no clip": {"thresholding": True, "clip_sample": False, "sample_max_value": 1.5},
    "thresholding, learned_range": {"thresholding": True, "sample_max_value": 2.0, "variance_type": "learned_range"},
    "thresholding, v": {"thresholding": True, "sample_max_value": 2.0, "prediction_type": "v_prediction"},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "laplace": {"beta_schedule": "laplace"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "trained_betas": {"trained_betas": [0.001 * (i + 1) for i in range(100)]},
    "zero-SNR, v": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
    "zero-SNR, epsilon": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "zero-SNR, sample": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "linspace",
        "prediction_type": "sample",
        "variance_type": "fixed_large",
    },
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_scheduler_settings(tmp_path, rules):
    assert_parity(save_tiny(tmp_path, **rules), n=2, steps=6)


@pytest.mark.parametrize(
    "unet",
    [
        CIFAR | {"block_out_channels": (32, 32, 32, 32), "sample_size": 16},
        {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet"},
        {"in_channels": 1, "out_channels": 1},
        {"sample_size": (8, 12)},
        {"time_embedding_type": "learned", "num_train_timesteps": 100},
    ],
    ids=["like cifar", "scale_shift", "grey", "not square", "learned time"],
)
def test_networks(tmp_path, unet):
    assert_parity(save_tiny(tmp_path, unet), n=2, steps=5)


@pytest.mark.parametrize("steps", [1, 2, 99, 100])
def test_numbers_of_steps(tmp_path, steps):
    assert_parity(save_tiny(tmp_path), n=1, steps=steps)


def test_a_list_of_generators(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    expected = stock_images(pipe, 3, [generator(s) for s in (5, 6, 7)], num_inference_steps=5)
    sampler = ddpm.load(tmp_path, compile=False, device="cpu")
    for batch_size in (3, 2, 1):
        images = sampler.sample(
            3, steps=5, generator=[generator(s) for s in (5, 6, 7)], batch_size=batch_size, progress=False
        )
        assert float((images - expected).abs().max()) <= CHAIN, batch_size


def test_one_generator_leaves_its_stream_where_the_pipeline_does(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    ours, theirs = generator(), generator()
    stock_images(pipe, 2, theirs, num_inference_steps=4)
    ddpm.load(tmp_path, compile=False, device="cpu").sample(2, steps=4, generator=ours, progress=False)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_noise_is_x_T(tmp_path):
    """The initial draw taken by hand, the generator then serving the steps: the pipeline's images again."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    expected = stock_images(pipe, 2, generator(), num_inference_steps=4)
    source = generator()
    x_T = torch.randn(2, 3, 8, 8, generator=source)
    kept = x_T.clone()
    images = ddpm.load(tmp_path, compile=False, device="cpu").sample(
        2, steps=4, noise=x_T, generator=source, progress=False
    )
    assert float((images - expected).abs().max()) <= CHAIN
    assert torch.equal(x_T, kept)


def test_custom_timesteps(tmp_path):
    pipe = tiny_pipeline(variance_type="fixed_large")
    pipe.save_pretrained(tmp_path)
    chain = [90, 41, 17, 3]
    pipe.scheduler.set_timesteps(timesteps=chain)
    source = generator()
    x = torch.randn(2, 3, 8, 8, generator=source)
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x, generator=source).prev_sample
    images = ddpm.load(tmp_path, compile=False, device="cpu").sample(
        2, timesteps=chain, generator=generator(), progress=False
    )
    assert float((images - x).abs().max()) <= CHAIN


def test_the_cifar_configuration(tmp_path):
    scheduler = DDPMScheduler(variance_type="fixed_large")
    DDPMPipeline(redraw(UNet2DModel(**CIFAR)), scheduler).save_pretrained(tmp_path)
    assert_parity(tmp_path, n=1, steps=10)


def test_the_training_scripts_default_configuration(tmp_path):
    DDPMPipeline(redraw(UNet2DModel(**TRAINING_SCRIPT)), DDPMScheduler()).save_pretrained(tmp_path)
    assert_parity(tmp_path, n=1, steps=5)


@pytest.mark.slow
def test_the_demo_over_all_its_steps():
    assert_parity(DEMO, n=4, steps=1000)


DDIM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # scheduler, arguments of both samplers
    "defaults": ({}, {}),
    "eta": ({}, {"eta": 0.6}),
    "eta 1": ({}, {"eta": 1.0, "steps": 10}),
    "rederived": ({}, {"ddim_epsilon": "rederived"}),
    "no clip, sample": ({"clip_sample": False, "prediction_type": "sample"}, {}),
    "sample": ({"prediction_type": "sample"}, {"eta": 0.3}),
    "v_prediction": ({"prediction_type": "v_prediction"}, {}),
    "v_prediction, rederived": ({"prediction_type": "v_prediction"}, {"ddim_epsilon": "rederived"}),
    "trailing": ({"timestep_spacing": "trailing"}, {"steps": 7}),
    "linspace": ({"timestep_spacing": "linspace"}, {"steps": 7, "eta": 0.5}),
    "final alpha": ({"set_alpha_to_one": False, "steps_offset": 1}, {"eta": 0.5, "steps": 7}),
    "thresholding": ({"thresholding": True, "sample_max_value": 2.0}, {"steps": 7}),
    "zero-SNR": (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {},
    ),
}


@pytest.mark.parametrize(("scheduler", "arguments"), DDIM.values(), ids=DDIM.keys())
@pytest.mark.parametrize("saved_as", ["DDIMScheduler", "DDPMScheduler"])
def test_ddim_equals_the_stock_pipeline(tmp_path, scheduler, arguments, saved_as):
    """Whether the directory names a DDIMScheduler or sampler="ddim" is asked of one that names a DDPMScheduler."""
    network = tiny_pipeline().unet
    own = DDIMScheduler(**({"num_train_timesteps": 100} | scheduler))
    pipe = DDIMPipeline(network, own)
    pipe.set_progress_bar_config(disable=True)
    steps = arguments.get("steps", 50)
    expected = stock_images(
        pipe,
        2,
        generator(),
        num_inference_steps=steps,
        eta=arguments.get("eta", 0.0),
        use_clipped_model_output=arguments.get("ddim_epsilon") == "rederived",
    )
    pipe.save_pretrained(tmp_path)
    if saved_as == "DDPMScheduler":
        index = json.loads((tmp_path / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", saved_as]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        arguments = arguments | {"sampler": "ddim"}
    source = generator()
    images = ddpm.load(tmp_path, device="cpu", compile=False).sample(2, generator=source, progress=False, **arguments)
    assert float((images - expected).abs().max()) <= CHAIN
