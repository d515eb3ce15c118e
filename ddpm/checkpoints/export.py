"""Write a checkpoint as a pipeline directory of diffusers: the inverse of `ddpm.checkpoints.diffusers`.

What that format cannot say is refused: a directory that loads and draws other images would be worse than none.
diffusers itself is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ddpm.checkpoints.checkpoint import Checkpoint, Report
from ddpm.checkpoints.diffusers import BLOCKS, DDIM_STEPS, SCHEDULER_DEFAULTS, UNET_DEFAULTS, WEIGHTS, unet_config
from ddpm.schedule import BETA_SCHEDULES, beta_schedule
from ddpm.unet import UNet, UNetConfig

DDPM_STEPS = 1000  # DDPMPipeline's num_inference_steps, whatever T is
DDIM_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # those that DDIMScheduler has
# Spacing of another family -> the one of diffusers that comes nearest.
NEAREST_SPACING = {"sections": "linspace", "strided": "leading", "uniform": "leading"}
ROUNDING = 2.0**-22  # relative; how far diffusers' float32 betas are from the same made in float64


def save_diffusers(checkpoint: Checkpoint, directory: str | os.PathLike[str]) -> list[str]:
    """Write model_index.json, unet/ and scheduler/, as diffusers' save_pretrained would.

    The directory appears when it is complete: it is written under a temporary name beside its own, and renamed.

    Args:
        checkpoint: its weights are written as they were loaded, in float32.
        directory: to be created; an empty one is replaced.

    Returns:
        Sentences on what stands there, and on what diffusers does otherwise than the checkpoint's own code.

    Raises:
        ValueError: the format cannot express the network or its sampling; or something is in the directory already, or
            it cannot be written.
    """
    rules = checkpoint.rules
    unet, scheduler = unet_settings(checkpoint), _scheduler_settings(checkpoint)
    pipeline, scheduler_class = (f"{rules.sampler.upper()}{part}" for part in ("Pipeline", "Scheduler"))
    target = _free_destination(Path(directory))
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", scheduler_class]}
    configurations = {
        "model_index.json": {"_class_name": pipeline} | index,
        "unet/config.json": {"_class_name": "UNet2DModel"} | unet,
        "scheduler/scheduler_config.json": {"_class_name": scheduler_class} | scheduler,
    }
    _write(target, configurations, checkpoint.network.state_dict())
    return [f"{pipeline} with {scheduler_class}, weights in float32", *_notes(checkpoint, pipeline, scheduler)]


def _refusal(checkpoint: Checkpoint, found: str, expected: str) -> ValueError:
    return ValueError(f"{checkpoint.source} {found}, but {expected}; it stays with ddpm sample")


def unet_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """unet/config.json, the arguments of UNet2DModel; the loader reads the same configuration from it.

    Raises:
        ValueError: diffusers has no such network.
    """
    network = checkpoint.network
    if not isinstance(network, UNet):
        found = f"has a network of another graph ({checkpoint.family})"
        raise _refusal(checkpoint, found, "diffusers' UNet2DModel computes that of DDPM and ADM")
    c = network.config
    if c.condition_channels:
        found = f"enlarges images: {c.condition_channels} of its {c.in_channels} input channels hold the small one"
        raise _refusal(checkpoint, found, "diffusers' pipelines for a UNet2DModel pass nothing but x_t")
    if c.sinusoid_dim != c.block_out_channels[0]:
        expected = f"UNet2DModel has as many as its first level has channels, here {c.block_out_channels[0]}"
        raise _refusal(checkpoint, f"has {c.sinusoid_dim} timestep features", expected)
    height, width = checkpoint.sample_size
    down = list(zip(c.down_attention, c.down_resample, strict=True))
    up = list(zip(c.up_attention, c.up_resample, strict=True))
    default_mid_groups = None if c.scale_shift else c.norm_num_groups
    settings = UNET_DEFAULTS | {name: value for name, value in vars(c).items() if name in UNET_DEFAULTS}
    settings |= {
        "sample_size": height if height == width else (height, width),
        "time_embedding_type": c.time_embedding,
        "time_embedding_dim": None if c.embedding_dim == 4 * c.block_out_channels[0] else c.embedding_dim,
        "down_block_types": [_block_type("Down", *level) for level in down],
        "mid_block_type": "UNetMidBlock2D" if c.mid_block else None,
        "up_block_types": [_block_type("Up", *level) for level in up],
        # One setting for all levels with attention; the others' types say it.
        "downsample_type": next((kind for attention, kind in down if attention), "conv"),
        "upsample_type": next((kind for attention, kind in up if attention), "conv"),
        "act_fn": c.activation,
        "attention_head_dim": _head_dim(checkpoint, c),
        "attn_norm_num_groups": None if c.mid_norm_num_groups == default_mid_groups else c.mid_norm_num_groups,
        "resnet_time_scale_shift": "scale_shift" if c.scale_shift else "default",
        "add_attention": c.mid_attention,
        "class_embed_type": None if c.class_embedding == "table" else c.class_embedding,
    }
    read = vars(unet_config(settings, checkpoint.source, Report()))
    said = {name: settings[name] for name in ("attention_head_dim", "time_embedding_dim")}
    wanted = vars(replace(c, sample_size=(height, width), attention_heads=None, time_sinusoid_dim=None, **said))
    if changed := [f"{name}={value}" for name, value in wanted.items() if read[name] != value]:
        raise _refusal(checkpoint, f"has {', '.join(changed)}", "no configuration of UNet2DModel says that")
    return settings


def _block_type(direction: str, attention: bool, kind: str) -> str:
    """The type that has attention or not, and resamples by `kind` or by the setting for all levels (None)."""
    types = [name for name, block in BLOCKS.items() if block in ((attention, kind), (attention, None))]
    return next(name for name in types if direction in name)


def _head_dim(checkpoint: Checkpoint, c: UNetConfig) -> int | None:
    """attention_head_dim, from which diffusers takes the number of heads; None is one head of full width."""
    if c.attention_heads is None:
        return c.attention_head_dim
    attended = [
        *zip(c.down_attention, c.block_out_channels, strict=True),
        *zip(c.up_attention, reversed(c.block_out_channels), strict=True),
        (c.mid_block and c.mid_attention, c.block_out_channels[-1]),
    ]
    widths = sorted({channels for attention, channels in attended if attention})
    if c.attention_heads == 1 or not widths:
        return None
    if len(widths) > 1:
        found = f"has {c.attention_heads} heads in each attention, of {', '.join(map(str, widths))} channels"
        raise _refusal(checkpoint, found, "UNet2DModel has heads of one width (attention_head_dim)")
    return widths[0] // c.attention_heads


def _scheduler_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """scheduler/scheduler_config.json; each class leaves the settings of the other alone."""
    rules, schedule = checkpoint.rules, checkpoint.schedule
    total, ddim = schedule.num_train_timesteps, rules.sampler == "ddim"
    if rules.rescale_timesteps and total != 1000:
        found = f"tells its network t * 1000 / {total} (rescale_timesteps)"
        raise _refusal(checkpoint, found, "diffusers' pipelines tell it t")
    if ddim and rules.learned_variance:
        found = f"predicts its variance ({rules.variance_type}) and is read as DDIM, which diffusers does not join"
        raise ValueError(f"{checkpoint.source} {found}; pass scheduler_class='DDPMScheduler'")
    clip, spacing = rules.clip_of(rules.sampler), rules.spacing_of(rules.sampler)
    names = DDIM_BETA_SCHEDULES if ddim else BETA_SCHEDULES
    # What diffusers made is said so that it makes it again, to the bit.
    tolerance = 0.0 if rules.convention == "diffusers" else ROUNDING
    settings = SCHEDULER_DEFAULTS | {name: value for name, value in vars(rules).items() if name in SCHEDULER_DEFAULTS}
    return (settings | _beta_settings(schedule.betas, names, tolerance)) | {
        "num_train_timesteps": total,
        "clip_sample": clip == "clamp",
        "clip_sample_range": rules.clip_range,
        "thresholding": clip == "dynamic",
        "dynamic_thresholding_ratio": rules.threshold_ratio,
        "sample_max_value": rules.threshold_max,
        "timestep_spacing": NEAREST_SPACING.get(spacing, spacing),
    }


def _beta_settings(betas: Tensor, names: tuple[str, ...], tolerance: float) -> dict[str, Any]:
    """The named schedule that gives these betas [T] within the relative tolerance; else the betas themselves.

    Its ends are diffusers' defaults, or the first and last beta: to six digits, as people write them, or in full.
    """
    ends = [max(float(beta), 0.0) for beta in betas[[0, -1]]]  # of a negative one scaled_linear has no root
    defaults = [SCHEDULER_DEFAULTS["beta_start"], SCHEDULER_DEFAULTS["beta_end"]]
    for start, end in (defaults, [float(f"{beta:.6g}") for beta in ends], ends):
        for name in names:
            table = beta_schedule(name, len(betas), start, end).double()
            if torch.allclose(table, betas.double(), rtol=tolerance, atol=0.0):
                return {"beta_schedule": name, "beta_start": start, "beta_end": end}
    return {"trained_betas": betas.float().tolist()}


def _notes(checkpoint: Checkpoint, pipeline: str, scheduler: dict[str, Any]) -> list[str]:
    """What whoever samples the directory with diffusers has to know."""
    rules, total = checkpoint.rules, checkpoint.schedule.num_train_timesteps
    ddim, whose, notes = rules.sampler == "ddim", rules.convention, []
    if scheduler["trained_betas"]:
        notes.append(f"the {total} betas are written out (trained_betas): no schedule of the scheduler's gives them")
    if checkpoint.network.conditional:
        notes.append(
            f"{pipeline} passes no class labels; call pipe.unet(x, t, class_labels=labels) in a loop of your own"
        )
    steps, default = (min(rules.ddim_steps or total, total), DDIM_STEPS) if ddim else (total, DDPM_STEPS)
    if steps != default:
        notes.append(
            f"{pipeline} takes {default} steps by default; num_inference_steps={steps} is what ddpm sample takes"
        )
    if rules.short_sampler not in (None, rules.sampler):
        notes.append(f"a chain of fewer than {total} steps is {rules.sampler.upper()} too, not {rules.short_sampler}")
    if whose != "diffusers":
        spacing = scheduler["timestep_spacing"]
        notes.append(f"shorter chains are spaced by diffusers' {spacing}, which is not quite as {whose} does it")
    if checkpoint.schedule.betas.dtype == torch.float64:
        notes.append("x_0 of a chain of 1000 steps and more differs by a few 1e-4: diffusers' tables are float32")
    if not ddim and rules.learned_variance:
        notes.append("DDIMPipeline does not take it: DDIMScheduler knows no learned variance")
    elif rules.ddim_epsilon == "rederived":
        notes.append(f"DDIM as {whose} does it needs use_clipped_model_output=True in the call of DDIMPipeline")
    if rules.clip_of("ddim") != rules.clip:
        notes.append(f"x_0 is clipped as in {whose}'s {rules.sampler.upper()}; its other sampler clips otherwise")
    if checkpoint.uint8_rounding != "half_to_even":
        notes.append(f"bytes differ by up to 1: {whose} does not round to the nearest")
    return notes


def _free_destination(directory: Path) -> Path:
    """The directory's absolute path.

    Raises:
        ValueError: something is there.
    """
    try:
        target = directory.expanduser().resolve()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{directory} exists and is no empty directory; name a new one, nothing is overwritten")
        if target == Path.cwd():
            raise ValueError(f"{directory} is the current directory, which cannot be replaced; name a new one")
    except (OSError, RuntimeError) as error:  # the second where there is no such home directory
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write {directory} ({reason}); name another directory") from error
    return target


def _write(target: Path, configurations: dict[str, dict[str, Any]], weights: dict[str, Tensor]) -> None:
    """All files under a temporary name, then the rename.

    Raises:
        ValueError: the disk is full or the place is not writable; nothing is left there.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for name, settings in configurations.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(weights, temporary / "unet" / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write {target} ({reason}); nothing is left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
