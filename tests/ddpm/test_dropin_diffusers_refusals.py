"""What `ddpm.accelerate` would not repeat is refused by name; nothing is ignored in silence."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, PNDMScheduler
from torch import nn

import ddpm
from ddpm.checkpoints.diffusers import SCHEDULER_DEFAULTS, UNET_DEFAULTS
from tests.helpers import ddim_pipeline, tiny_pipeline


class OwnCall(DDPMPipeline):
    def __call__(self, batch_size: int = 1) -> None: ...


class OwnScheduler(DDPMScheduler): ...


class OwnProcessor:
    def __call__(self, attention: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        return hidden_states


def patched(pipe: DDPMPipeline, path: str, value: Any) -> DDPMPipeline:
    """The pipeline with another attribute at the dotted path."""
    *owners, name = path.split(".")
    setattr(functools.reduce(getattr, owners, pipe), name, value)
    return pipe


def hooked(pipe: DDPMPipeline) -> DDPMPipeline:
    pipe.unet.mid_block.register_forward_hook(lambda module, inputs, output: 2 * output)
    return pipe


def training(pipe: DDPMPipeline) -> DDPMPipeline:
    pipe.unet.train()
    return pipe


def configured(part: str, **settings: Any) -> DDPMPipeline:
    pipe = tiny_pipeline()
    getattr(pipe, part).register_to_config(**settings)
    return pipe


SKIP_BLOCKS = {"down_block_types": ["SkipDownBlock2D"] * 2, "up_block_types": ["SkipUpBlock2D"] * 2}
PIPELINES: dict[str, tuple[Callable[[], Any], str]] = {
    "another object": (lambda: 5, "pipe is a int; expected a DDPMPipeline or a DDIMPipeline"),
    "call": (lambda: OwnCall(tiny_pipeline().unet, DDPMScheduler()), "OwnCall, whose __call__ is its own"),
    "scheduler": (
        lambda: patched(tiny_pipeline(), "scheduler", PNDMScheduler()),
        "scheduler is a PNDMScheduler; expected DDPMScheduler or DDIMScheduler",
    ),
    "scheduler class": (lambda: patched(tiny_pipeline(), "scheduler", OwnScheduler()), r"scheduler is \S*OwnScheduler"),
    "scheduler method": (lambda: patched(tiny_pipeline(), "scheduler.step", print), "has a step of its own"),
    "variance_type": (
        lambda: patched(tiny_pipeline(), "scheduler.variance_type", "fixed_large"),
        "variance_type=fixed_large; expected fixed_small",
    ),
    "end": (
        lambda: patched(ddim_pipeline(), "scheduler.final_alpha_cumprod", torch.tensor(0.5)),
        "final_alpha_cumprod",
    ),
    "alphas_cumprod": (
        lambda: patched(tiny_pipeline(), "scheduler.alphas_cumprod", torch.ones(7)),
        "has 7 alphas_cumprod; expected 100",
    ),
    "fixed_large_log": (
        lambda: tiny_pipeline(variance_type="fixed_large_log"),
        "scheduler: variance_type 'fixed_large",
    ),
    "variance": (lambda: tiny_pipeline({"out_channels": 6}), "out_channels=6, but variance_type 'fixed_small'"),
    "skip blocks": (lambda: tiny_pipeline(SKIP_BLOCKS), "unet: block type 'SkipDownBlock2D' is not supported"),
    "classes": (lambda: tiny_pipeline({"num_class_embeds": 4}), "unet is class-conditional"),
    "sample_size": (lambda: configured("unet", sample_size=None), "unet has no sample_size"),
    "network": (
        lambda: patched(tiny_pipeline(), "unet", nn.Conv2d(3, 3, 1)),
        "unet is a Conv2d; expected a UNet2DModel",
    ),
    "layer": (
        lambda: patched(tiny_pipeline(), "unet.conv_act", nn.ReLU()),
        "unet has ReLU at conv_act, where its configuration describes SiLU",
    ),
    "removed layer": (
        lambda: patched(tiny_pipeline(), "unet.mid_block", None),
        "unet has nothing at mid_block, where its configuration describes UNetMidBlock2D",
    ),
    "hook": (lambda: hooked(tiny_pipeline()), "UNetMidBlock2D with hooks at mid_block"),
    "forward": (
        lambda: patched(tiny_pipeline(), "unet.forward", print),
        r"unet has UNet2DModel with a forward of its own .*unwrap_model.* at its top",
    ),
    "processor": (
        lambda: patched(tiny_pipeline(), "unet.mid_block.attentions.0.processor", OwnProcessor()),
        "with the processor OwnProcessor",
    ),
    "dropout": (lambda: training(tiny_pipeline({"dropout": 0.1})), "Dropout in training mode, which draws at random"),
    "weights elsewhere": (
        lambda: patched(tiny_pipeline(), "unet.conv_out.weight", nn.Parameter(torch.empty(3, 8, 3, 3, device="meta"))),
        "unet: conv_out.weight is on the meta device",
    ),
    "device": (lambda: tiny_pipeline().to("meta"), "runs on meta; expected the CPU or a CUDA GPU"),
    "dtype": (lambda: tiny_pipeline().to(torch.float64), "unet is torch.float64"),
    "NaN": (
        lambda: patched(tiny_pipeline(), "unet.conv_out.bias", nn.Parameter(torch.full((3,), torch.nan))),
        "unet holds NaN or infinity in 1 tensors, first conv_out.bias",
    ),
}


@pytest.mark.parametrize(("make", "message"), PIPELINES.values(), ids=PIPELINES.keys())
def test_pipelines(make, message):
    with pytest.raises(ValueError, match=message):
        ddpm.accelerate(make())


# Module of the network, an attribute of it, another value, and how a message names what is found.
SETTINGS = [
    ("conv_in", "padding_mode", "circular", "padding_mode='circular' at conv_in"),
    ("conv_in", "dilation", (2, 2), r"dilation=\(2, 2\) at conv_in"),
    ("conv_norm_out", "eps", 0.1, "eps=0.1 at conv_norm_out"),
    ("conv_norm_out", "num_groups", 2, "num_groups=2 at conv_norm_out"),
    ("mid_block.resnets.0", "output_scale_factor", 2.0, "output_scale_factor=2.0 at mid_block.resnets.0"),
    ("mid_block.attentions.0", "heads", 1, "heads=1 at mid_block.attentions.0"),
    ("time_proj", "flip_sin_to_cos", False, "flip_sin_to_cos=False at time_proj"),
]


@pytest.mark.parametrize(("module", "name", "value", "message"), SETTINGS, ids=[f"{m}.{n}" for m, n, *_ in SETTINGS])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_setting_changed_inside_a_module(module, name, value, message, first):
    """Seamless tiles are made so (padding_mode): the network computes something else than its configuration says."""
    pipe = tiny_pipeline()
    fast = None if first else ddpm.accelerate(pipe)
    assert getattr(pipe.unet.get_submodule(module), name) != value
    setattr(pipe.unet.get_submodule(module), name, value)
    with pytest.raises(ValueError, match=message):
        (fast or ddpm.accelerate(pipe))(num_inference_steps=2)


def test_names_of_the_pipelines_own(tmp_path):
    class OwnNames(DDPMPipeline):
        options, plain = {"a": 1}, "plain"

    class OwnSampler(DDPMPipeline):
        sampler = "mine"

    pipe = tiny_pipeline()
    fast = ddpm.accelerate(OwnNames(pipe.unet, pipe.scheduler))
    assert (fast.options, fast.plain) == ({"a": 1}, "plain")
    assert fast(num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="pipe has an attribute sampler of its own"):
        ddpm.accelerate(OwnSampler(pipe.unet, pipe.scheduler))


def test_a_pipeline_is_checked_again_when_it_has_changed():
    pipe = tiny_pipeline()
    fast = ddpm.accelerate(pipe)
    hooked(pipe)
    with pytest.raises(ValueError, match="with hooks at mid_block"):
        fast(num_inference_steps=2)
    patched(ddim := ddim_pipeline(), "scheduler", DDPMScheduler(100))
    with pytest.raises(ValueError, match="DDPMScheduler, which takes no eta, but DDIMPipeline passes one"):
        ddpm.accelerate(ddim)(num_inference_steps=2)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "int8"}, "dtype 'int8' is not one of auto, fp32"),
    "compile": ({"compile": "always"}, "compile must be True, False or 'auto'"),
    "rounding": ({"rounding": "float16"}, "rounding 'float16' is not one of float32, own"),
    "own": ({"rounding": "own"}, "rounding='own' repeats the rounding of a half-precision pipeline"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ddpm.accelerate(tiny_pipeline(), **options)


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator() for _ in range(n)]


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "batch_size": (tiny_pipeline, {"batch_size": 0}, "batch_size must be a positive integer; got 0"),
    "no integer": (tiny_pipeline, {"num_inference_steps": 2.5}, "num_inference_steps must be a positive integer"),
    "too many steps": (tiny_pipeline, {"num_inference_steps": 101}, "cannot be larger than"),
    "tuple": (tiny_pipeline, {"generator": (*generators(1),)}, "generator must be .* a tuple"),
    "short list": (tiny_pipeline, {"generator": generators(2), "batch_size": 3}, "2 entries for batch_size=3"),
    "empty list": (tiny_pipeline, {"generator": []}, "0 entries for batch_size=1"),
    "long list": (ddim_pipeline, {"generator": generators(3), "batch_size": 2}, "3 entries for batch_size=2"),
    "list of one": (ddim_pipeline, {"generator": generators(1), "batch_size": 2}, "1 entries for batch_size=2"),
    "eta": (ddim_pipeline, {"eta": 1.5}, "eta must be a number from 0"),
    "clipped": (ddim_pipeline, {"use_clipped_model_output": "no"}, "use_clipped_model_output must be True or False"),
    "return_dict": (tiny_pipeline, {"return_dict": "no"}, "return_dict must be True or False"),
}


@pytest.mark.parametrize(("make", "arguments", "message"), CALLS.values(), ids=CALLS.keys())
def test_calls(make, arguments, message):
    fast = ddpm.accelerate(make())
    with pytest.raises(ValueError, match=message):
        fast(**({"num_inference_steps": 2} | arguments))
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        fast(labels=3)


def test_bfloat16_has_no_numpy_images():
    fast = ddpm.accelerate(tiny_pipeline().to(torch.bfloat16))
    for output_type in ("pil", "np"):
        with pytest.raises(ValueError, match=f"output_type='{output_type}' needs NumPy, which has no bfloat16"):
            fast(num_inference_steps=2, output_type=output_type)
    assert fast(num_inference_steps=2, output_type="pt").images.dtype == torch.bfloat16


def test_what_a_newer_diffusers_may_add(monkeypatch):
    """A parameter of the call, a setting of the scheduler and one of the network, each away from its default."""

    class Newer(DDPMPipeline): ...

    def call(self, batch_size=1, generator=None, num_inference_steps=2, output_type="pil", return_dict=True, shift=0):
        raise NotImplementedError

    monkeypatch.setattr(DDPMPipeline, "__call__", call)
    fast = ddpm.accelerate(Newer(tiny_pipeline().unet, DDPMScheduler(100)))
    assert len(fast(shift=0).images) == 1  # in two steps: defaults are the installed version's
    assert len(fast.scheduler.timesteps) == 2
    with pytest.raises(ValueError, match="shift=1 is an argument that ddpm does not know"):
        fast(shift=1)
    monkeypatch.delitem(SCHEDULER_DEFAULTS, "thresholding")
    with pytest.raises(ValueError, match="scheduler has thresholding=True, which ddpm does not know; expected False"):
        ddpm.accelerate(tiny_pipeline(thresholding=True))
    monkeypatch.delitem(UNET_DEFAULTS, "act_fn")
    with pytest.raises(ValueError, match="unet has act_fn='gelu', which ddpm does not know; expected 'silu'"):
        ddpm.accelerate(tiny_pipeline({"act_fn": "gelu"}))


def test_diffusers_is_imported_by_nobody_else():
    code = """import sys
sys.modules["diffusers"] = None  # not installed
import ddpm
try:
    ddpm.accelerate(object())
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pipe is a object, and diffusers is not installed" in result.stdout
