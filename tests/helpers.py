"""Builders that the tests share: tiny networks of stock diffusers with visible weights, saved as checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from ddpm import Sampler
from ddpm.checkpoints.checkpoint import Network
from ddpm.fused import fuse
from ddpm.reference import sample_reference
from ddpm.steps import step_table
from tests.tolerances import FORWARD
from tests.weights import redraw

# Small enough that a forward takes milliseconds; attention on the lower level and in the middle.
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
CIFAR: dict[str, Any] = {  # google/ddpm-cifar10-32
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
TRAINING_SCRIPT: dict[str, Any] = {  # examples/unconditional_image_generation, its defaults
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_unet(seed: int = 0, **changes: Any) -> UNet2DModel:
    return redraw(UNet2DModel(**(TINY | changes)), seed).eval()


def tiny_pipeline(
    unet: dict[str, Any] | None = None, *, seed: int = 0, positive_variance: bool = False, **scheduler: Any
) -> DDPMPipeline:
    """A stock pipeline; learned variances get their six channels.

    Args:
        unet: changes to TINY.
        positive_variance: keep the second half of the output near 0.5, which variance_type "learned" takes a root of.
        scheduler: settings of DDPMScheduler; T is 100 unless given, so that unclipped chains stay of order 1.
    """
    changes = dict(unet or {})
    if str(scheduler.get("variance_type")).startswith("learned"):
        changes.setdefault("out_channels", 6)
    network = tiny_unet(seed, **changes)
    if positive_variance:
        half = network.config.out_channels // 2
        with torch.no_grad():
            network.conv_out.weight[half:] *= 0.02
            network.conv_out.bias[half:] = 0.5
    pipe = DDPMPipeline(network, DDPMScheduler(**({"num_train_timesteps": 100} | scheduler)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim_pipeline(unet: dict[str, Any] | None = None, **scheduler: Any) -> DDIMPipeline:
    """The same with a DDIMScheduler; arguments as in `tiny_pipeline`."""
    pipe = DDIMPipeline(tiny_unet(**(unet or {})), DDIMScheduler(**({"num_train_timesteps": 100} | scheduler)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def constant(pipe: Any) -> Any:
    """The pipeline, whose network's output is now its last bias: two implementations agree on it to the last bit."""
    with torch.no_grad():
        pipe.unet.conv_out.weight.zero_()
        pipe.unet.conv_out.bias.copy_(torch.linspace(-0.7, 0.9, len(pipe.unet.conv_out.bias)))
    return pipe


def save_tiny(directory: Path, unet: dict[str, Any] | None = None, **options: Any) -> Path:
    """A pipeline directory that diffusers saved; options as in `tiny_pipeline`."""
    tiny_pipeline(unet, **options).save_pretrained(directory)
    return directory


def stock_images(pipe: DDPMPipeline, n: int, generator: Any, **options: Any) -> Tensor:
    """x_0 of the stock pipeline in [-1, 1], taken before its clamp, which would hide differences.

    That the pipeline's own "pt" output is this, clamped, is checked on the way.
    """
    last: list[Tensor] = []
    step = pipe.scheduler.step

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        last[:] = [result.prev_sample]
        return result

    pipe.scheduler.step = recording
    try:
        images = pipe(batch_size=n, generator=generator, output_type="pt", **options).images
    finally:
        del pipe.scheduler.step
    torch.testing.assert_close(images, (last[0] / 2 + 0.5).clamp(0, 1), rtol=0, atol=0)
    return last[0]


def reference_images(
    sampler: Sampler, n: int, steps: int, generator: torch.Generator, network: Network | None = None
) -> Tensor:
    """The oracle, with the draws in the pipeline's order: x_T, then one for every step above t = 0.

    With the sampler's own reference network, or with another.
    """
    checkpoint, shape = sampler.checkpoint, (n, *sampler.image_shape)
    return sample_reference(
        network or checkpoint.network,
        checkpoint.schedule,
        checkpoint.rules,
        step_table(checkpoint.schedule, checkpoint.rules, steps).timesteps.tolist(),
        torch.randn(shape, generator=generator),
        lambda i: torch.randn(shape, generator=generator),
    )


def assert_same_output(
    network: Network,
    x: Tensor,
    t: float,
    expected: Tensor,
    labels: Tensor | None = None,
    condition: Tensor | None = None,
) -> None:
    """Assert that the reference network and its fused form give `expected` at timestep t."""
    fused = fuse(network)
    classes = None if labels is None else network.embed_classes(labels)
    assert relative_difference(network(x, t, labels, condition), expected) <= FORWARD
    assert relative_difference(fused(x, fused.time.table(torch.tensor([t])), classes, condition), expected) <= FORWARD


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """max |difference| over the rms of what is expected; NaN counts as infinite."""
    assert actual.shape == expected.shape
    difference = float((actual.double() - expected.double()).abs().max() / expected.double().square().mean().sqrt())
    return difference if difference == difference else float("inf")


def has_ended(pid: int) -> bool:
    """Whether a process has, within ten seconds."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
