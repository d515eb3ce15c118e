"""A checkpoint with random weights, for speed where no trained one is at hand: speed does not depend on the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.architectures import architecture
from ddpm.unet import UNet, UNetConfig

CIFAR = architecture("cifar10-32").config


def unet_settings(config: UNetConfig) -> dict[str, Any]:
    """The arguments of diffusers' UNet2DModel. Only for configurations whose other fields are the defaults."""
    return {
        "sample_size": config.sample_size[0] if config.sample_size else None,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "layers_per_block": config.layers_per_block,
        "block_out_channels": config.block_out_channels,
        "down_block_types": ["AttnDownBlock2D" if used else "DownBlock2D" for used in config.down_attention],
        "up_block_types": ["AttnUpBlock2D" if used else "UpBlock2D" for used in config.up_attention],
        "attention_head_dim": config.attention_head_dim,
        "downsample_padding": config.downsample_padding,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": config.freq_shift,
        "norm_num_groups": config.norm_num_groups,
        "norm_eps": config.norm_eps,
    }


def save_random(directory: Path, config: UNetConfig = CIFAR) -> Path:
    """A directory in diffusers' layout, with weights drawn as torch's layers draw them, from a fixed seed.

    Only for configurations that `unet_settings` can say.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(config)
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_sample": True,
        "prediction_type": "epsilon",
        "variance_type": "fixed_large",
    }
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    for name, content in (
        ("model_index.json", index),
        ("unet/config.json", {"_class_name": "UNet2DModel"} | unet_settings(config)),
        ("scheduler/scheduler_config.json", scheduler),
    ):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, directory / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return directory
