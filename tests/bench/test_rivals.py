"""Networks by name and from files, and what the rivals draw."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.architectures import ARCHITECTURES, Architecture
from bench.ours import Ours, PlainPyTorch, Reference
from bench.rivals import Diffusers, DiffusersCompiled, OpenVINO, float32_noise
from bench.setting import Setting, chain_timesteps, numerics_generator
from bench.source import Source, checkpoint_source, random_source
from bench.variants import RIVALS
from ddpm.lucidrains import LucidrainsConfig
from ddpm.unet import UNetConfig
from tests.helpers import ddim_pipeline, save_tiny

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")

SMALL = UNetConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_attention=(False, False),
    up_attention=(False, False),
    norm_num_groups=4,
    mid_norm_num_groups=4,
    attention_head_dim=8,
    sample_size=(8, 8),
)
GUIDED = replace(
    SMALL,
    out_channels=6,
    down_resample=("resnet", "resnet"),
    up_resample=("resnet", "resnet"),
    scale_shift=True,
    class_embedding="table",
    num_class_embeds=10,
)


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, by name."""
    lucid = LucidrainsConfig(dim=8, dim_mults=(1, 2), full_attention=(False, True))
    entries = (
        Architecture("small", "nowhere", SMALL, 8, "fixed_large", 0),
        Architecture("guided", "nowhere", GUIDED, 8, "learned_range", 0),
        Architecture("lucid", "nowhere", lucid, 8, "fixed_small", 0),
    )
    for entry in entries:
        monkeypatch.setitem(ARCHITECTURES, entry.name, entry)


def setting(source: Source, steps: int = 5, dtype: str = "fp32") -> Setting:
    return Setting(source, CPU, dtype, batch=2, timesteps=chain_timesteps(source.load(), steps), rounds=1)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", ["small", "guided", "lucid"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_everyone_draws_the_references_images(name: str, dtype: str, architectures: None, tmp_path: Path) -> None:
    source = random_source(name, tmp_path)
    assert source.name == f"{name} (random weights)"
    s = setting(source, dtype=dtype)
    judge = Reference(s)
    expected = {"generator": judge.images(), "seeds": judge.seeded_images()}
    assert largest(*expected.values()) > 0.1  # other noise, other images
    others = [Ours(s, compiled=False), Ours(s, compiled=False, plain=True), PlainPyTorch(s)]
    if name == "lucid":
        assert source.stock is None
        with pytest.raises(ValueError, match="network of another graph"):
            Diffusers(s)
    else:
        others.append(Diffusers(s))
    for variant in others:
        found = largest(variant.images(), expected[variant.noise])
        assert found <= (1e-4 if dtype == "fp32" else 0.1), type(variant)
        variant.chain()


def test_a_self_conditioned_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees the x_0 of the step before, in the judge's loop too."""
    config = LucidrainsConfig(dim=8, dim_mults=(1, 2), full_attention=(False, True), self_condition=True)
    monkeypatch.setitem(ARCHITECTURES, "self", Architecture("self", "nowhere", config, 8, "fixed_small", 0))
    s = setting(random_source("self", tmp_path))
    judge = Reference(s)
    assert largest(Ours(s, compiled=False).images(), judge.seeded_images()) <= 1e-4
    assert largest(PlainPyTorch(s).images(), judge.images()) <= 1e-4
    with pytest.raises(ValueError, match="a self-conditioned network cannot run as a module"):
        Ours(s, compiled=False, plain=True)


def test_an_upsampler_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, in_channels=6, condition_channels=3)
    monkeypatch.setitem(ARCHITECTURES, "up", Architecture("up", "nowhere", config, 8, "fixed_large", 0))
    s = setting(random_source("up", tmp_path), dtype="bf16")
    assert "enlarges images" in s.source.no_stock
    judge = Reference(s)
    for variant in (Ours(s, compiled=False), Ours(s, compiled=False, plain=True)):
        assert largest(variant.images(), judge.seeded_images()) <= 0.1
    assert largest(PlainPyTorch(s).images(), judge.images()) <= 0.1


def test_random_weights_are_the_same_every_time(architectures: None, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = (random_source("small", tmp_path / folder).load().network.state_dict() for folder in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_rivals_load_what_ours_loads(tiny: Path, tmp_path: Path) -> None:
    """The flat directories of old repositories, averaged weights beside raw ones, another spacing, DDIM's settings."""
    flat, averaged = tmp_path / "flat", tmp_path / "averaged"
    shutil.copytree(tiny / "unet", flat)
    shutil.copy(tiny / "scheduler" / "scheduler_config.json", flat)
    shutil.copytree(tiny, averaged)
    shutil.copytree(save_tiny(tmp_path / "other", seed=1) / "unet", averaged / "unet_ema")
    trailing = save_tiny(tmp_path / "trailing", timestep_spacing="trailing")
    ddim_pipeline().save_pretrained(tmp_path / "ddim")
    for path in (flat, averaged, trailing, tmp_path / "ddim"):
        (folder := tmp_path / f"{path.name}-stock").mkdir()
        s = setting(checkpoint_source(str(path), {}, folder), steps=7)
        stock = Diffusers(s)
        assert largest(stock.images(), Reference(s).images()) <= 1e-4, path.name
        assert stock.pipe.scheduler.timesteps.tolist() == list(s.timesteps)


def test_no_rivals_are_asked_for(tiny: Path) -> None:
    source = checkpoint_source(str(tiny), {}, None)
    assert (source.stock, source.no_stock) == (None, "no rivals were asked for")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("diffusers-compiled", "default"),
        ("diffusers-reduce-overhead", "reduce-overhead"),
        ("diffusers-max-autotune", "max-autotune"),
    ],
)
def test_how_diffusers_is_compiled(
    name: str, mode: str, tiny_setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    variant = RIVALS[name](tiny_setting)
    assert compiled == [{"fullgraph": True, "dynamic": False, "mode": mode}]
    assert variant.pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@needs_compiler
def test_compiled_diffusers_has_frozen_weights(architectures: None, tmp_path: Path) -> None:
    """It draws the pipeline's images, and its weights are constants."""
    s = setting(random_source("small", tmp_path), steps=2)
    variant = DiffusersCompiled(s)
    images = variant.images()
    assert (images - Diffusers(s).images()).abs().max() <= 1e-4
    for weight in variant.pipe.unet.parameters():
        if weight.ndim == 4:  # packed for oneDNN; small ones are read where they lie
            weight.data.zero_()
    assert torch.equal(variant.images(), images)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_draws_the_pipelines_images(tiny_setting: Setting) -> None:
    difference = OpenVINO(tiny_setting).images() - Diffusers(tiny_setting).images()
    assert 0 < difference.abs().max() <= 1e-4  # equal would mean that it did not run


def test_half_of_the_pipeline_is_judged_with_float32_noise(tiny_setting: Setting) -> None:
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    for module in (pipeline_ddpm, scheduling_ddpm):
        with float32_noise():
            drawn = module.randn_tensor((2, 3), generator=numerics_generator(), dtype=torch.float16)
        assert drawn.dtype == torch.float16
        assert torch.equal(drawn, torch.randn(2, 3, generator=numerics_generator()).half())
    half = Diffusers(replace(tiny_setting, dtype="bf16"))
    assert 0 < (half.images() - Diffusers(tiny_setting).images()).abs().max() <= 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_gpu_variants_draw_the_references_images(dtype: str, architectures: None, tmp_path: Path) -> None:
    from bench.rows import BOUNDS
    from bench.variants import variants

    s = replace(setting(random_source("small", tmp_path)), device=torch.device("cuda", 0), dtype=dtype)
    judge = Reference(s)
    expected = {"generator": judge.images(), "seeds": judge.seeded_images()}
    for name, make in variants(s).items():
        variant = make(s)
        assert largest(variant.images(), expected[variant.noise]) <= BOUNDS[dtype], name


def test_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no architecture is called 'x'"):
        random_source("x", tmp_path)
