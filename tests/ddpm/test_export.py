"""Checkpoints of every family written for diffusers: stock pipelines load them and draw the same images."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

import ddpm
from ddpm.checkpoints import export, load_checkpoint
from ddpm.checkpoints.checkpoint import Checkpoint, Report
from ddpm.checkpoints.export import save_diffusers
from ddpm.cli import main
from ddpm.lucidrains import LucidrainsConfig, LucidrainsUNet
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule, beta_schedule
from ddpm.unet import UNet, UNetConfig
from tests.helpers import relative_difference, save_tiny, stock_images, tiny_pipeline
from tests.originals import guided_diffusion, ho
from tests.tolerances import CHAIN, FORWARD
from tests.weights import redraw

ROOT = Path(__file__).resolve().parents[2]
T = 50
FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(21)


def guided(directory: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """(a file of guided-diffusion with visible weights, what it does not say).

    Args:
        changes: to the model's arguments, and flags of the diffusion.
    """
    flags: dict[str, Any] = {"noise_schedule": "linear", "diffusion_steps": T, "rescale_timesteps": False}
    flags |= {name: changes.pop(name) for name in (*flags, "predict_xstart", "clip_denoised") if name in changes}
    tiny = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "attention_ds": (2,), "num_heads": 4}
    model = {"image_size": 8} | tiny | changes
    path = directory / "ema_0.9999_000100.pt"
    torch.save(redraw(guided_diffusion.UNetModel(**model)).state_dict(), path)
    told = {name: model[name] for name in ("image_size", "num_heads", "num_head_channels") if name in model}
    return path, told | flags | {"use_new_attention_order": model.get("use_new_attention_order", False)}


def of_ho(directory: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    """(a file of Ho et al.'s port with visible weights, what it does not say)."""
    model = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8, 4), "resolution": 8}
    path = directory / "ema_model-1.ckpt"
    torch.save(redraw(ho.Model(**model)).state_dict(), path)
    return path, {"image_size": 8, "variance_type": "fixed_large", "num_train_timesteps": T} | options


def converted(path: Path, options: dict[str, Any], directory: Path) -> tuple[Checkpoint, list[str]]:
    checkpoint = load_checkpoint(path, **options)
    notes = save_diffusers(checkpoint, directory)
    assert sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()) == FILES
    with safe_open(directory / FILES[-1], framework="pt") as weights:
        assert weights.metadata() == {"format": "pt"}  # as save_pretrained writes it
    return checkpoint, notes


def stock(directory: Path) -> Any:
    """The pipeline of the class that model_index.json names."""
    pipe = DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(path: Path, options: dict[str, Any], **arguments: Any) -> Tensor:
    """Of the checkpoint as it was."""
    sampler = ddpm.load(path, device="cpu", compile=False, **options)
    return sampler.sample(2, generator=generator(), progress=False, **arguments)


def settings(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text())


# --- families whose files are no directories --------------------------------------------------------------------------

GUIDED: dict[str, dict[str, Any]] = {
    "improved": {},
    "guided": {"resblock_updown": True, "learn_sigma": True},
    "new attention order": {"use_new_attention_order": True},
    "head channels": {"num_heads": -1, "num_head_channels": 16, "attention_ds": (1, 2)},
    "one head": {"num_heads": 1, "attention_ds": (1, 2)},
    "no scale and shift": {"use_scale_shift_norm": False, "resblock_updown": True},
    "attention in the middle": {"attention_ds": (), "resblock_updown": True},
    "three levels": {"channel_mult": (1, 2, 2), "num_res_blocks": 2, "attention_ds": (2, 4), "learn_sigma": True},
    "cosine": {"noise_schedule": "cosine"},
    "T 1000, rescaled": {"diffusion_steps": 1000, "rescale_timesteps": True},
    "predict_xstart, no clip": {"predict_xstart": True, "clip_denoised": False},
}


@pytest.mark.parametrize("changes", GUIDED.values(), ids=GUIDED.keys())
def test_guided_diffusion(tmp_path, changes):
    path, options = guided(tmp_path, **changes)
    converted(path, options, tmp_path / "out")
    pipe = stock(tmp_path / "out")
    assert type(pipe) is DDPMPipeline
    total = options["diffusion_steps"]
    for steps in (total, 7) if total == T else (7,):
        expected = ours(path, options, timesteps=pipe_timesteps(pipe, steps))
        images = stock_images(pipe, 2, generator(), num_inference_steps=steps)
        assert float((images - expected).abs().max()) <= CHAIN, steps


def pipe_timesteps(pipe: Any, steps: int) -> list[int]:
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.timesteps.tolist()


def test_guided_diffusions_ddim(tmp_path):
    path, options = guided(tmp_path)
    _, notes = converted(path, options, tmp_path / "out")
    assert "DDIM as openai does it needs use_clipped_model_output=True in the call of DDIMPipeline" in notes
    pipe = DDIMPipeline.from_pretrained(tmp_path / "out")
    expected = ours(path, options, sampler="ddim", timesteps=pipe_timesteps(pipe, T))
    for clipped, same in ((True, True), (False, False)):
        arguments = {"num_inference_steps": T, "use_clipped_model_output": clipped}
        images = stock_images(pipe, 2, generator(), **arguments)
        assert (float((images - expected).abs().max()) <= CHAIN) == same


def test_a_class_table_is_written_and_the_note_says_how_to_use_it(tmp_path):
    path, options = guided(tmp_path, num_classes=7, learn_sigma=True, resblock_updown=True)
    _, notes = converted(path, options, tmp_path / "out")
    assert (
        "DDPMPipeline passes no class labels; call pipe.unet(x, t, class_labels=labels) in a loop of your own" in notes
    )
    pipe, source, labels = stock(tmp_path / "out"), generator(), torch.tensor([3, 6])
    x = torch.randn(2, 3, 8, 8, generator=source)
    for t in pipe_timesteps(pipe, 7):
        with torch.no_grad():
            out = pipe.unet(x, t, class_labels=labels).sample
        x = pipe.scheduler.step(out, t, x, generator=source).prev_sample
    expected = ours(path, options, labels=labels, timesteps=pipe_timesteps(pipe, 7))
    assert float((x - expected).abs().max()) <= CHAIN


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_pytorch_diffusion(tmp_path, variance):
    path, options = of_ho(tmp_path, variance_type=variance)
    converted(path, options, tmp_path / "out")
    pipe = stock(tmp_path / "out")
    assert type(pipe) is DDPMPipeline
    images = stock_images(pipe, 2, generator(), num_inference_steps=T)
    assert float((images - ours(path, options)).abs().max()) <= CHAIN


def test_ermongroup(tmp_path):
    """Its default is DDIM without a clip: random weights make x_0 large, so the bound is relative."""
    path, options = of_ho(tmp_path, sampling_code="ermongroup")
    converted(path, options, tmp_path / "out")
    pipe = stock(tmp_path / "out")
    assert type(pipe) is DDIMPipeline
    for steps in (T, 5):
        expected = ours(path, options, steps=steps)
        images = stock_images(pipe, 2, generator(), num_inference_steps=steps)
        assert float((images - expected).abs().max()) <= CHAIN * float(expected.abs().max().clamp(min=1)), steps


# --- directories of diffusers -----------------------------------------------------------------------------------------

RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
SCALE_SHIFT = {"resnet_time_scale_shift": "scale_shift"}
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale_shift": SCALE_SHIFT,
    "scale_shift, mid norm": SCALE_SHIFT | {"attn_norm_num_groups": 8},
    "mid norm of other groups": {"attn_norm_num_groups": 2},
    "resnet blocks": RESNET,
    "resnet blocks, scale_shift": RESNET | SCALE_SHIFT,
    "resnet by setting": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "one level": {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "sample_size": 5,
    },
    "no mid block": {"mid_block_type": None},
    "no mid attention": {"add_attention": False},
    "google's numerics": {"norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
    "one head": {"attention_head_dim": None},
    "heads that do not divide": {"attention_head_dim": 5},
    "time_embedding_dim": {"time_embedding_dim": 20},
    "learned time": {"time_embedding_type": "learned", "num_train_timesteps": 100},
    "fourier time": {"time_embedding_type": "fourier"},
    "rest": {"act_fn": "gelu", "mid_block_scale_factor": 1.4, "center_input_sample": True, "layers_per_block": 3},
    "not square": {"sample_size": (6, 10)},
    "grey": {"in_channels": 1, "out_channels": 1},
    "class table": {"num_class_embeds": 7},
    "class timestep": {"class_embed_type": "timestep"},
    "class identity": {"class_embed_type": "identity"},
}
LABELS = {"class table": torch.tensor([3, 0]), "class timestep": torch.tensor([3.0, 61.0])}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_diffusers_come_back_to_the_bit(tmp_path, name):
    path = save_tiny(tmp_path / "in", NETWORKS[name])
    checkpoint, _ = converted(path, {}, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    assert again.network.config == checkpoint.network.config
    assert again.rules == checkpoint.rules
    assert again.sample_size == checkpoint.sample_size
    before, after = (UNet2DModel.from_pretrained(tmp_path / d / "unet") for d in ("in", "out"))
    defaults = {"_name_or_path", "_diffusers_version", "_use_default_values"}
    differing = {k for k in before.config if k not in defaults and before.config[k] != after.config[k]}
    assert not differing
    assert before.state_dict().keys() == after.state_dict().keys()
    height, width = checkpoint.sample_size
    x = torch.randn(2, before.config.in_channels, height, width, generator=generator())
    labels = LABELS.get(name, torch.linspace(-1, 1, 64).view(2, 32) if name == "class identity" else None)
    with torch.no_grad():
        for t in (1, 37, 99):
            expected = before(x, t, class_labels=labels).sample
            assert expected.isfinite().all()
            assert torch.equal(after(x, t, class_labels=labels).sample, expected)


# Settings of a DDPMScheduler; whether the betas keep their name.
SCHEDULES: dict[str, tuple[dict[str, Any], bool]] = {
    "defaults": ({}, True),
    "T 1000": ({"num_train_timesteps": 1000}, True),
    "other ends": ({"beta_start": 0.00085, "beta_end": 0.012}, True),
    "ends of many digits": ({"beta_start": 0.00012345678, "beta_end": 0.02345678912}, True),
    "scaled_linear": ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, True),
    "squaredcos_cap_v2": ({"beta_schedule": "squaredcos_cap_v2"}, True),
    "laplace": ({"beta_schedule": "laplace"}, True),
    "sigmoid": ({"beta_schedule": "sigmoid"}, True),
    "sigmoid, other ends": ({"beta_schedule": "sigmoid", "beta_end": 0.3}, False),
    "trained_betas, linear": ({"trained_betas": [0.001 * (i + 1) for i in range(100)]}, False),  # but for some bits
    "trained_betas": ({"trained_betas": [0.0001 * (i % 7 + 1) for i in range(100)]}, False),
    "zero-SNR": (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        False,
    ),
    "fixed_small_log": ({"variance_type": "fixed_small_log"}, True),
    "fixed_large": ({"variance_type": "fixed_large"}, True),
    "learned": ({"variance_type": "learned", "positive_variance": True}, True),
    "learned_range, linspace": ({"variance_type": "learned_range", "timestep_spacing": "linspace"}, True),
    "sample": ({"prediction_type": "sample"}, True),
    "no clip, v": ({"clip_sample": False, "prediction_type": "v_prediction"}, True),
    "clip range": ({"clip_sample_range": 0.6}, True),
    "thresholding": ({"thresholding": True, "sample_max_value": 2.5, "dynamic_thresholding_ratio": 0.9}, True),
    "steps_offset": ({"steps_offset": 1, "variance_type": "fixed_large"}, True),
}


def assert_same_sampling(tmp_path: Path, path: Path, options: dict[str, Any], named: bool) -> None:
    """The same schedule and rules, and the stock pipeline's images to the bit."""
    checkpoint, notes = converted(path, options, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    assert torch.equal(again.schedule.betas, checkpoint.schedule.betas)
    assert torch.equal(again.schedule.alphas_cumprod, checkpoint.schedule.alphas_cumprod)
    assert again.rules == checkpoint.rules
    trained = settings(tmp_path / "out", "scheduler/scheduler_config.json")["trained_betas"]
    assert (trained is None) == named
    assert any("the 100 betas are written out (trained_betas)" in note for note in notes) != named
    before = (DDIMPipeline if checkpoint.rules.sampler == "ddim" else DDPMPipeline).from_pretrained(path)
    after = stock(tmp_path / "out")
    assert type(after) is type(before)
    before.set_progress_bar_config(disable=True)
    expected = stock_images(before, 2, generator(), num_inference_steps=6)
    assert torch.equal(stock_images(after, 2, generator(), num_inference_steps=6), expected)


@pytest.mark.parametrize(("scheduler", "named"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedulers_of_diffusers_come_back_to_the_bit(tmp_path, scheduler, named):
    path = save_tiny(tmp_path / "in", **scheduler)
    assert_same_sampling(tmp_path, path, {}, named)
    if named:
        stored = settings(tmp_path / "out", "scheduler/scheduler_config.json")
        assert stored["beta_schedule"] == scheduler.get("beta_schedule", "linear")
        for end, default in (("beta_start", 0.0001), ("beta_end", 0.02)):
            wanted = scheduler.get(end, default)
            short = wanted == float(f"{wanted:.6g}")  # which comes back as it was; others to float32's precision
            assert stored[end] == (wanted if short else pytest.approx(wanted, rel=1e-7, abs=0))


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=str,
)
def test_ddim_of_diffusers_comes_back_to_the_bit(tmp_path, scheduler):
    own = DDIMScheduler(**({"num_train_timesteps": 100} | scheduler))
    DDIMPipeline(tiny_pipeline().unet, own).save_pretrained(tmp_path / "in")
    assert_same_sampling(tmp_path, tmp_path / "in", {}, True)


def test_betas_that_ddim_scheduler_has_no_name_for(tmp_path):
    """DDPMScheduler has one; the directory is read as DDIM, and DDIMScheduler would refuse that name."""
    path = save_tiny(tmp_path / "in", beta_schedule="sigmoid")
    _, notes = converted(path, {"scheduler_class": "DDIMScheduler"}, tmp_path / "out")
    assert any("written out" in note for note in notes)
    images = stock_images(stock(tmp_path / "out"), 2, generator(), num_inference_steps=10)
    expected = ours(path, {"scheduler_class": "DDIMScheduler"}, steps=10)
    assert float((images - expected).abs().max()) <= CHAIN


def test_betas_that_make_no_sense_are_written_as_they_are(tmp_path):
    """scaled_linear would take the root of the first."""
    betas = [-0.5, *[0.25] * 99]
    converted(save_tiny(tmp_path / "in", trained_betas=betas), {}, tmp_path / "out")
    assert settings(tmp_path / "out", "scheduler/scheduler_config.json")["trained_betas"] == betas


@pytest.mark.parametrize("scheduler_class", ["DDPMScheduler", "DDIMScheduler"])
def test_stock_diffusers_knows_every_setting(tmp_path, caplog, scheduler_class):
    path = save_tiny(tmp_path / "in")
    converted(path, {"scheduler_class": scheduler_class}, tmp_path / "out")
    stock(tmp_path / "out")
    assert "are not expected and will be ignored" not in caplog.text
    changed = settings(tmp_path / "out", "scheduler/scheduler_config.json") | {"colour": "red"}
    (tmp_path / "out" / "scheduler" / "scheduler_config.json").write_text(json.dumps(changed))
    stock(tmp_path / "out")
    assert "{'colour': 'red'} were passed to" in caplog.text  # so it would have said so


def test_half_precision_files_become_float32(tmp_path):
    pipe = tiny_pipeline()
    pipe.unet.half()
    pipe.save_pretrained(tmp_path / "in", variant="fp16")
    converted(tmp_path / "in", {"variant": "fp16"}, tmp_path / "out")
    assert torch.equal(stock(tmp_path / "out").unet.conv_in.weight, pipe.unet.conv_in.weight.float())


# --- betas of other families ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise_schedule", "steps", "expected"),
    [
        ("linear", 1000, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("linear", 4000, {"beta_schedule": "linear", "beta_start": 2.5e-5, "beta_end": 0.005}),
        ("linear", 3000, {"beta_schedule": "linear", "beta_start": 1000 / 3000 * 1e-4, "beta_end": 1000 / 3000 * 0.02}),
        ("cosine", 1000, {"beta_schedule": "squaredcos_cap_v2", "beta_start": 1e-4, "beta_end": 0.02}),
        ("cosine", 50, {"beta_schedule": "squaredcos_cap_v2", "beta_start": 1e-4, "beta_end": 0.02}),
    ],
)
def test_betas_made_in_float64_are_named(tmp_path, noise_schedule, steps, expected):
    path, options = guided(tmp_path, noise_schedule=noise_schedule, diffusion_steps=steps)
    checkpoint, _ = converted(path, options, tmp_path / "out")
    stored = settings(tmp_path / "out", "scheduler/scheduler_config.json")
    assert {name: stored[name] for name in expected} == expected
    assert stored["trained_betas"] is None
    theirs = stock(tmp_path / "out").scheduler.betas.double()
    assert float(((theirs - checkpoint.schedule.betas) / checkpoint.schedule.betas).abs().max()) <= 2.0**-22


# --- what is refused --------------------------------------------------------------------------------------------------


def lucidrains_checkpoint() -> Checkpoint:
    config = LucidrainsConfig(dim=16, dim_mults=(1, 2), full_attention=(False, True))
    return by_hand(LucidrainsUNet(config), family="lucidrains")


def by_hand(network: Any, rules: SamplingRules | None = None, family: str = "diffusers") -> Checkpoint:
    schedule = NoiseSchedule.from_betas(beta_schedule("linear", 1000))
    return Checkpoint(family, "x.pt", network, schedule, rules or SamplingRules(), (8, 8), "half_to_even", Report())


def two_kinds_of_resampling() -> Checkpoint:
    config = UNetConfig(
        block_out_channels=(8, 8, 8),
        down_attention=(True, True, False),
        up_attention=(False, False, False),
        down_resample=("resnet", "conv", "conv"),
        norm_num_groups=4,
        mid_norm_num_groups=4,
    )
    return by_hand(UNet(config))


def mid_attention_without_norm() -> Checkpoint:
    levels = {"block_out_channels": (8,), "down_attention": (False,), "up_attention": (False,)}
    return by_hand(UNet(UNetConfig(**levels, norm_num_groups=4, mid_norm_num_groups=None)))


def heads_of_an_attention_on_the_way_up() -> Checkpoint:
    levels = {"block_out_channels": (8, 16), "down_attention": (False, False), "up_attention": (False, True)}
    return by_hand(UNet(UNetConfig(**levels, attention_heads=2, norm_num_groups=4, mid_norm_num_groups=4)))


BY_HAND = {
    lucidrains_checkpoint: "x.pt has a network of another graph (lucidrains), but diffusers' UNet2DModel "
    "computes that of DDPM and ADM; it stays with ddpm sample",
    two_kinds_of_resampling: "x.pt has down_resample=('resnet', 'conv', 'conv'), but no configuration of UNet2DModel "
    "says that; it stays with ddpm sample",
    heads_of_an_attention_on_the_way_up: "x.pt has 2 heads in each attention, of 8, 16 channels, but UNet2DModel has "
    "heads of one width (attention_head_dim); it stays with ddpm sample",
    mid_attention_without_norm: "x.pt has mid_norm_num_groups=None, but no configuration of UNet2DModel says that; "
    "it stays with ddpm sample",
}


@pytest.mark.parametrize(("build", "sentence"), BY_HAND.items(), ids=[build.__name__ for build in BY_HAND])
def test_what_a_file_can_hardly_hold_is_refused(tmp_path, build, sentence):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        save_diffusers(build(), tmp_path / "out")
    assert str(refusal.value) == sentence
    assert os.listdir(tmp_path) == []


def test_a_number_of_heads_without_an_attention_is_no_obstacle(tmp_path):
    levels = {"block_out_channels": (8,), "down_attention": (False,), "up_attention": (False,)}
    config = UNetConfig(**levels, attention_heads=2, norm_num_groups=4, mid_norm_num_groups=4, mid_attention=False)
    network = redraw(UNet(config)).eval()
    save_diffusers(by_hand(network), tmp_path / "out")
    x = torch.randn(2, 3, 8, 8, generator=generator())
    with torch.no_grad():
        assert relative_difference(network(x, 37), stock(tmp_path / "out").unet(x, 37).sample) <= FORWARD


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "super-resolution": (
        {"in_channels": 6},
        "enlarges images: 3 of its 6 input channels hold the small one, but diffusers' pipelines for a UNet2DModel "
        "pass nothing but x_t; it stays with ddpm sample",
    ),
    "heads by number": (
        {"attention_ds": (1, 2)},
        "has 4 heads in each attention, of 32, 64 channels, but UNet2DModel has heads of one width "
        "(attention_head_dim); it stays with ddpm sample",
    ),
    "heads by number, the middle wider": (
        {"channel_mult": (1, 2, 4)},
        "has 4 heads in each attention, of 64, 128 channels, but UNet2DModel has heads of one width "
        "(attention_head_dim); it stays with ddpm sample",
    ),
    "half width first": (
        {"channel_mult": (0.5, 1, 2), "num_channels": 64, "num_heads": 1},
        "has 64 timestep features, but UNet2DModel has as many as its first level has channels, here 32; it stays with "
        "ddpm sample",
    ),
    "rescale_timesteps": (
        {"diffusion_steps": 4000, "rescale_timesteps": True},
        "tells its network t * 1000 / 4000 (rescale_timesteps), but diffusers' pipelines tell it t; it stays with "
        "ddpm sample",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_diffusers_cannot_express_is_refused(tmp_path, changes, sentence):
    path, options = guided(tmp_path, **changes)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        save_diffusers(load_checkpoint(path, **options), tmp_path / "out")
    assert str(refusal.value) == f"{path} {sentence}"
    assert os.listdir(tmp_path) == [path.name]


def test_a_learned_variance_read_as_ddim_is_refused(tmp_path):
    path = save_tiny(tmp_path / "in", variance_type="learned_range")
    with pytest.raises(
        ValueError,
        match=r"in predicts its variance \(learned_range\) and is read as DDIM, which diffusers does not join; "
        "pass scheduler_class='DDPMScheduler'",
    ):
        save_diffusers(load_checkpoint(path, scheduler_class="DDIMScheduler"), tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]
    converted(path, {"scheduler_class": "DDPMScheduler"}, tmp_path / "out")


# --- notes ------------------------------------------------------------------------------------------------------------


def test_notes_of_each_family(tmp_path):
    path, options = guided(tmp_path, learn_sigma=True)
    assert converted(path, options, tmp_path / "guided")[1] == [
        "DDPMPipeline with DDPMScheduler, weights in float32",
        f"DDPMPipeline takes 1000 steps by default; num_inference_steps={T} is what ddpm sample takes",
        "shorter chains are spaced by diffusers' linspace, which is not quite as openai does it",
        "x_0 of a chain of 1000 steps and more differs by a few 1e-4: diffusers' tables are float32",
        "DDIMPipeline does not take it: DDIMScheduler knows no learned variance",
        "bytes differ by up to 1: openai does not round to the nearest",
    ]
    path, options = of_ho(tmp_path, num_train_timesteps=1000)
    assert converted(path, options, tmp_path / "ho")[1] == [
        "DDPMPipeline with DDPMScheduler, weights in float32",
        "shorter chains are spaced by diffusers' linspace, which is not quite as pytorch_diffusion does it",
        "x_0 of a chain of 1000 steps and more differs by a few 1e-4: diffusers' tables are float32",
        "x_0 is clipped as in pytorch_diffusion's DDPM; its other sampler clips otherwise",
        "bytes differ by up to 1: pytorch_diffusion does not round to the nearest",
    ]
    assert converted(path, options | {"sampling_code": "ermongroup"}, tmp_path / "ermongroup")[1] == [
        "DDIMPipeline with DDIMScheduler, weights in float32",
        "DDIMPipeline takes 50 steps by default; num_inference_steps=1000 is what ddpm sample takes",
        "shorter chains are spaced by diffusers' leading, which is not quite as ermongroup does it",
        "x_0 is clipped as in ermongroup's DDIM; its other sampler clips otherwise",
        "bytes differ by up to 1: ermongroup does not round to the nearest",
    ]
    path = save_tiny(tmp_path / "in", num_train_timesteps=1000)
    assert converted(path, {}, tmp_path / "ddpm")[1] == ["DDPMPipeline with DDPMScheduler, weights in float32"]
    as_ddim = {"scheduler_class": "DDIMScheduler"}
    assert converted(path, as_ddim, tmp_path / "ddim")[1] == ["DDIMPipeline with DDIMScheduler, weights in float32"]


def test_another_sampler_for_short_chains_is_a_note(tmp_path):
    checkpoint = load_checkpoint(save_tiny(tmp_path / "in", num_train_timesteps=1000))
    rules = replace(checkpoint.rules, short_sampler="ddim")
    notes = save_diffusers(replace(checkpoint, rules=rules), tmp_path / "out")
    assert "a chain of fewer than 1000 steps is DDPM too, not ddim" in notes


# --- the directory ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return load_checkpoint(save_tiny(tmp_path_factory.mktemp("tiny")))


def test_nothing_is_overwritten(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(
            ValueError, match=f"{name} exists and is no empty directory; name a new one, nothing is overwritten"
        ):
            save_diffusers(checkpoint, tmp_path / name)
    with pytest.raises(ValueError, match=r"cannot write .*file/out \(Not a directory\); nothing is left there"):
        save_diffusers(checkpoint, tmp_path / "file" / "out")
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]
    assert os.listdir(tmp_path / "full") == ["file"]
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=r"\. is the current directory, which cannot be replaced; name a new one"):
        save_diffusers(checkpoint, ".")


def test_new_and_empty_directories(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (tmp_path / "link", "new/and/deep", "~/home"):
        save_diffusers(checkpoint, name)
    for name in ("empty", "link", "new/and/deep", "home"):
        assert load_checkpoint(tmp_path / name).network.config == checkpoint.network.config
    assert sorted(os.listdir(tmp_path)) == ["empty", "home", "link", "new"]
    assert os.listdir(tmp_path / "new" / "and") == ["deep"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), r"cannot write .*out \(No space left on device\); nothing"),
        (SafetensorError("IoError: no space"), r"cannot write .*out \(IoError: no space\); nothing is left there"),
        (KeyboardInterrupt(), None),
    ],
    ids=["full disk", "safetensors", "Ctrl-C"],
)
def test_no_half_written_directory_is_left(tmp_path, checkpoint, monkeypatch, error, expected):
    seen = []

    def interrupted(weights, path, metadata):
        path.write_bytes(b"half")
        seen.extend(os.listdir(tmp_path))
        raise error

    monkeypatch.setattr(export, "save_file", interrupted)
    with pytest.raises(ValueError if expected else KeyboardInterrupt, match=expected):
        save_diffusers(checkpoint, tmp_path / "out")
    assert seen == [f".out.{os.getpid()}.tmp"]
    assert os.listdir(tmp_path) == []


def test_a_directory_that_fills_up_meanwhile_keeps_what_it_holds(tmp_path, checkpoint, monkeypatch):
    write = export.save_file

    def beside_another(weights, path, metadata):
        write(weights, path, metadata)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs")

    monkeypatch.setattr(export, "save_file", beside_another)
    with pytest.raises(ValueError, match=r"cannot write .*out \(Directory not empty\); nothing is left there"):
        save_diffusers(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["file"]


# --- the command ------------------------------------------------------------------------------------------------------


def convert(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def test_the_command(tmp_path):
    path, options = guided(tmp_path)
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    result = convert(path, tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    notes = save_diffusers(load_checkpoint(path, **options), tmp_path / "again")
    assert result.stdout.splitlines() == [f"written    {tmp_path}/out/", *(f"note       {note}" for note in notes)]
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_options_reach_the_loader(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "in", variant="fp16")
    result = convert(tmp_path / "in", tmp_path / "out", "--variant", "fp16", "--scheduler-class", "DDIMScheduler")
    assert result.exit_code == 0, result.output
    assert type(stock(tmp_path / "out")) is DDIMPipeline


def test_the_commands_errors_are_one_sentence(tmp_path):
    path, options = guided(tmp_path, in_channels=6)
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    tiny = save_tiny(tmp_path / "in")
    for arguments, sentence in (
        ((path, tmp_path / "out", *flags), "enlarges images"),
        ((path, tmp_path / "out"), "does not say image_size"),
        ((tiny, tiny), "exists and is no empty directory"),
        ((tmp_path / "none", tmp_path / "out"), "does not exist"),
        ((tiny, tmp_path / "out", "--revision", "main"), "revision goes with a hub id"),
        ((tiny, tmp_path / "out", "-o", "device=cpu"), "device is not an option of a checkpoint"),
    ):
        result = convert(*arguments)
        assert result.exit_code == 2
        assert isinstance(result.exception, SystemExit)
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert sentence in result.stderr
        assert result.stdout == ""
    assert sorted(os.listdir(tmp_path)) == [path.name, "in"]


FULL_DISK = """
import resource, sys
sys.modules["diffusers"] = None  # not needed
from ddpm.cli import main
if sys.argv.pop() == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
main()
"""


def test_in_a_process_without_diffusers_and_on_a_disk_that_is_full(tmp_path):
    path = save_tiny(tmp_path / "in")
    assert (path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size > 100_000

    def run(disk: str) -> subprocess.CompletedProcess[str]:
        arguments = ["convert", str(path), str(tmp_path / "out"), disk]
        command = [sys.executable, "-c", FULL_DISK, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    result = run("full")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: cannot write {tmp_path}/out (")
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["in"]
    result = run("empty")
    assert result.returncode == 0, result.stderr
    assert type(stock(tmp_path / "out")) is DDPMPipeline
