"""A checkpoint with random weights, for speed where no trained one is at hand: speed does not depend on the weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ddpm.unet import UNet, UNetConfig

# google/ddpm-cifar10-32
CIFAR = UNetConfig(
    block_out_channels=(128, 256, 256, 256),
    down_attention=(False, True, False, False),
    up_attention=(False, False, True, False),
    sample_size=(32, 32),
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)


def save_random(directory: Path, config: UNetConfig = CIFAR) -> Path:
    """A directory in diffusers' layout, with weights drawn as torch's layers draw them, from a fixed seed.

    Only for configurations whose other fields are the defaults.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(config)
    down = ["AttnDownBlock2D" if used else "DownBlock2D" for used in config.down_attention]
    up = ["AttnUpBlock2D" if used else "UpBlock2D" for used in config.up_attention]
    unet = {
        "_class_name": "UNet2DModel",
        "sample_size": config.sample_size[0] if config.sample_size else None,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "layers_per_block": config.layers_per_block,
        "block_out_channels": config.block_out_channels,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": config.attention_head_dim,
        "downsample_padding": config.downsample_padding,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": config.freq_shift,
        "norm_num_groups": config.norm_num_groups,
        "norm_eps": config.norm_eps,
    }
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
        ("unet/config.json", unet),
        ("scheduler/scheduler_config.json", scheduler),
    ):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, directory / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return directory
