"""Checkpoints of lucidrains' denoising-diffusion-pytorch, 0.32 and later: its Trainer's files and bare state dicts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.checkpoints.checkpoint import Checkpoint, Report
from ddpm.checkpoints.files import check_resolution, empty_network, load_weights
from ddpm.checkpoints.lucidrains_keys import Numerics, has_old_keys, modern_keys, numerics, version_number
from ddpm.checks import one_of, positive_integer
from ddpm.lucidrains import LucidrainsConfig, LucidrainsUNet
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule, beta_table

SIGNATURE = "init_conv.weight"
OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
# Names that only other classes of the package, or older versions of this one, have: pattern -> what it is.
SIBLINGS = {
    r"classes_emb|null_classes_emb": "the classifier-free-guidance U-Net",
    r"time_mlp\.0\.weights": "a U-Net with random or learned Fourier features, of the continuous-time classes",
    r"\.ds_conv\.": "a version before 0.12 (ConvNeXt blocks)",
    r"\.block\.block\.0\.|block1\.block\.0\.": "a version before 0.12",
    r"^net\.": "ElucidatedDiffusion, another sampler",
    r"flow_model\.": "XMWrapper, another sampler",
    r"input_block\.weight|output_block\.": "KarrasUnet",
}


def is_trainer_file(content: Any) -> bool:
    """Whether it is a dict of the package's Trainer: its entry "model" or "ema" holds such a U-Net."""
    entries = [content.get(name) for name in ("model", "ema")] if isinstance(content, dict) else []
    return any(isinstance(e, dict) and any(str(key).endswith(SIGNATURE) for key in e) for e in entries)


def of_ema_wrapper(state: dict[str, Tensor]) -> dict[str, Any]:
    """The state dict of ema-pytorch's EMA, which holds both sets of weights, as a Trainer's file would have it."""
    raw = {k.removeprefix("online_model."): v for k, v in state.items() if k.startswith("online_model.")}
    return {"model": raw, "ema": state}


def trainer_weights(content: dict[str, Any], path: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], str]:
    """(state dict, which it is) of a file that the package's Trainer saved.

    Raises:
        ValueError: it has no such weights.
    """
    name = "ema" if ema else "model"
    state = content.get(name)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if ema:
        averaged = {k.removeprefix("ema_model."): v for k, v in tensors.items() if k.startswith("ema_model.")}
        tensors = averaged or tensors
    if not any(key.endswith(SIGNATURE) for key in tensors):
        raise ValueError(
            f"{path} has no {name!r} entry with the weights of a U-Net; found {', '.join(map(str, content))}; "
            f"pass ema={not ema} if the other ones will do"
        )
    if not ema:
        return tensors, "raw weights, as ema=False asks"
    return tensors, "averaged (EMA) weights, which the package itself samples from; ema=False takes the raw"


def load_lucidrains(
    state: dict[str, Tensor],
    source: str,
    path: Path,
    *,
    which: str = "weights are used as stored",
    version: str | None = None,
    image_size: int | None = None,
    objective: str | None = None,
    beta_schedule: str | None = None,
    num_train_timesteps: int | None = None,
    attention_heads: int | None = None,
    norm_groups: int | None = None,
) -> Checkpoint:
    """A checkpoint from a state dict of GaussianDiffusion (with its schedule) or of the U-Net alone.

    Args:
        state: names with or without the prefixes of GaussianDiffusion.
        source: what the user called it.
        path: of the file, for messages.
        which: whether these weights are averaged.
        version: of the package that wrote it; needed before 1.8, whose names do not tell how it computes.
        image_size: H = W of the images; never stored, always needed.
        objective: "pred_noise", "pred_x0" or "pred_v"; needed where loss_weight is not stored (before 1.5, or a U-Net
            alone).
        beta_schedule, num_train_timesteps: "linear", "cosine" or "sigmoid", and T; needed for a U-Net alone.
        attention_heads: needed before 1.9 where the product of heads and their width is not 4 x 32.
        norm_groups: of GroupNorm, before 2.0; 8 unless given.

    Raises:
        ValueError: an option is missing or contradicts the file, or the file is of another class or version.
    """
    report = Report()
    report.found.append(f"weights: {path}")
    report.inferred.append(which)
    for name, value in (("attention_heads", attention_heads), ("norm_groups", norm_groups)):
        if value is not None:
            report.given.append(f"{name} = {positive_integer(name, value)}")
    if version is not None and not isinstance(version, str):
        raise ValueError(f"version must be text, such as '1.6.4'; got {version!r}")
    for pattern, what in SIBLINGS.items():
        if any(re.search(pattern, key) for key in state):
            raise ValueError(f"{path} is {what} of denoising-diffusion-pytorch, which is not supported")
    prefix = next((key.removesuffix(SIGNATURE) for key in state if key.endswith(SIGNATURE)), "")
    # Parameters of the U-Net have a dot in their names, buffers of GaussianDiffusion have none.
    diffusion = prefix.removesuffix("model.")
    unet = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and "." in k}
    buffers = {k.removeprefix(diffusion): v for k, v in state.items() if k.startswith(diffusion)}
    buffers = {k: v for k, v in buffers.items() if "." not in k}
    if unet[SIGNATURE].ndim != 4:
        raise ValueError(f"{path} is a U-Net for {unet[SIGNATURE].ndim - 2}-dimensional data; expected images")
    if version is not None:
        report.found.append(f"version {version} of denoising-diffusion-pytorch")
    if has_old_keys(unet) and version is None:
        raise ValueError(
            f"{path} has the names of denoising-diffusion-pytorch 0.32 to 1.7.7, which computed differently from one "
            "to the next, and does not say which wrote it; pass version="
        )
    old = numerics(version) if version is not None and has_old_keys(unet) else None
    unet = modern_keys(unet, version)
    config = infer_config(unet, path, old, attention_heads, norm_groups, report)
    network = empty_network(LucidrainsUNet, config, f"{path} is no U-Net of denoising-diffusion-pytorch")
    load_weights(network, unet, path, "it is not a complete U-Net of denoising-diffusion-pytorch")
    if image_size is None:
        raise ValueError(f"{path} does not say how large its images are; pass image_size=")
    check_resolution(positive_integer("image_size", image_size), config.resolution_divisor, path)
    report.given.append(f"image_size = {image_size}")
    schedule = _schedule(buffers, path, beta_schedule, num_train_timesteps, report)
    rules = _rules(config, buffers, schedule, path, objective, version, report)
    size = (image_size, image_size)
    return Checkpoint("lucidrains", source, network, schedule, rules, size, "half_up", report)


def infer_config(
    unet: dict[str, Tensor], path: Path, old: Numerics | None, heads: int | None, groups: int | None, report: Report
) -> LucidrainsConfig:
    """The architecture from names and shapes, and from the version where those are alike.

    Args:
        unet: with the names of 1.8 and later.
        old: what the version computes that wrote it, if before 1.8.
        heads: of every attention, where no memory tells them; None means 4 where 4 of 32 fit.
        groups: of GroupNorm; None means 8.
    """
    levels = len({key.split(".")[1] for key in unet if key.startswith("downs.")})
    needed = ["time_mlp.1.weight", "final_conv.weight", "downs.0.0.block1.proj.weight"]
    needed += [f"downs.{level}.2.to_qkv.weight" for level in range(levels)]
    if lacking := [key for key in needed if key not in unet]:
        raise ValueError(f"{path} lacks {lacking[0]}; expected a U-Net of denoising-diffusion-pytorch 0.32 or later")
    if levels > 1 and "downs.0.3.1.weight" not in unet:
        raise ValueError(f"{path} is of denoising-diffusion-pytorch before 0.32, which is not supported")
    dim = unet["time_mlp.1.weight"].shape[1]
    init_dim, in_channels = unet[SIGNATURE].shape[:2]
    out_channels = unet["final_conv.weight"].shape[0]
    self_condition = in_channels == 2 * out_channels
    channels = in_channels // 2 if self_condition else in_channels
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{path} has {out_channels} output channels for images of {channels}; expected {channels} or, with a "
            "learned variance, twice that: it may be of another class, such as WeightedObjectiveGaussianDiffusion"
        )
    ends = [unet.get(f"downs.{i}.3.1.weight", unet.get(f"downs.{i}.3.weight")) for i in range(levels)]
    if lacking := [str(i) for i, end in enumerate(ends) if end is None]:
        raise ValueError(f"{path} lacks downs.{lacking[0]}.3, the end of a level; expected a complete U-Net")
    full, counts, widths, memory = [], [], [], 0
    for level in range(levels):
        full.append(f"downs.{level}.2.to_out.weight" in unet)
        mem_kv = unet.get(f"downs.{level}.2.mem_kv")
        inner = unet[f"downs.{level}.2.to_qkv.weight"].shape[0] // 3
        if mem_kv is not None:  # [2, heads, M, dim_head] (full) or [2, heads, dim_head, M] (linear)
            memory = mem_kv.shape[2 if full[-1] else 3]
            count = mem_kv.shape[1]
            if heads not in (None, count):
                raise ValueError(f"{path} has attentions of {count} heads, but attention_heads={heads} was given")
        elif heads is not None or inner == 128:
            count = heads or 4
        else:
            raise ValueError(
                f"{path} has attentions of width {inner}, and no way to tell their heads; pass attention_heads="
            )
        if inner % count:
            raise ValueError(f"attention_heads={count} does not divide an attention of width {inner} in {path}")
        counts.append(count)
        widths.append(inner // count)
    group = "downs.0.0.block1.norm.weight" in unet
    if group and groups is None:
        report.assumed.append("GroupNorm of 8 groups (resnet_block_groups)")
    report.assumed.append("timestep features with theta 10000")
    report.inferred.append(
        f"{'GroupNorm' if group else 'RMSNorm'} blocks, {memory or 'no'} memory key/values"
        f"{', self-conditioning' if self_condition else ''}"
    )
    return LucidrainsConfig(
        dim=dim,
        dim_mults=tuple(end.shape[0] // dim for end in ends if end is not None),
        full_attention=tuple(full),
        init_dim=init_dim,
        channels=channels,
        out_channels=out_channels,
        self_condition=self_condition,
        norm="group" if group else "rms",
        norm_groups=groups or 8,
        attention_norm=old.attention_norm if old else "rms",
        attention_heads=tuple(counts),
        attention_dim_head=tuple(widths),
        memory_key_values=memory,
        value_scale_by_pixels=old.value_scale_by_pixels if old else False,
    )


def _schedule(
    buffers: dict[str, Tensor], path: Path, name: str | None, total: int | None, report: Report
) -> NoiseSchedule:
    """From the stored betas; computed in float64, as the package does before it rounds its tables."""
    betas = buffers.get("betas")
    if betas is None:
        if name is None or total is None:
            raise ValueError(
                f"{path} holds a U-Net without its noise schedule; pass beta_schedule= (linear, cosine or sigmoid) and "
                "num_train_timesteps="
            )
        positive_integer("num_train_timesteps", total)
        report.given.append(f"beta_schedule = {name}, num_train_timesteps = {total}")
        return NoiseSchedule.from_betas(beta_table(name, total))
    if name is not None or total not in (None, len(betas)):
        raise ValueError(
            f"{path} holds its own schedule of {len(betas)} betas; leave beta_schedule and num_train_timesteps out"
        )
    report.found.append(f"noise schedule: {len(betas)} betas")
    schedule = NoiseSchedule.from_betas(betas.double())
    stored = buffers.get("alphas_cumprod")
    if stored is not None and not torch.allclose(stored.double(), schedule.alphas_cumprod, rtol=1e-4, atol=1e-6):
        raise ValueError(f"{path} holds betas and alphas_cumprod that contradict each other; the file is damaged")
    return schedule


def _rules(
    config: LucidrainsConfig,
    buffers: dict[str, Tensor],
    schedule: NoiseSchedule,
    path: Path,
    objective: str | None,
    version: str | None,
    report: Report,
) -> SamplingRules:
    if objective is not None:
        one_of("objective", objective, tuple(OBJECTIVES))
    learned = config.out_channels == 2 * config.channels
    stored = None if learned else _objective(buffers, schedule)
    if learned:  # LearnedGaussianDiffusion predicts the noise, whatever its objective is called
        if objective not in (None, "pred_noise"):
            raise ValueError(f"{path} has a learned variance, which goes with pred_noise; got objective={objective!r}")
        objective = "pred_noise"
        report.inferred.append("twice the channels: a learned variance, which goes with pred_noise")
    elif objective is None and stored is not None:
        objective = stored
        report.inferred.append(f"objective = {stored}, from loss_weight")
    elif objective is None:
        raise ValueError(
            f"{path} does not say what its network predicts; pass objective= (pred_noise, pred_x0 or pred_v; the "
            "package's default was pred_noise before 1.6.3, pred_v since)"
        )
    elif stored is not None and stored != objective:
        raise ValueError(f"objective={objective!r} was given, but the loss_weight in {path} is that of {stored}")
    else:
        report.given.append(f"objective = {objective}")
    number = None if version is None else version_number(version)
    # Before 1.4.2 the network's own noise was kept beside the clipped x_0; with a learned variance it still is.
    raw = learned or (objective == "pred_noise" and number is not None and number < (1, 4, 2))
    eta = 1.0 if number is not None and number < (0, 33, 1, 5) else 0.0  # the default became 0 at 0.1.5
    report.assumed.append(f"DDIM with eta {eta:g} for chains shorter than T, the package's default")
    return SamplingRules(
        convention="lucidrains",
        short_sampler="ddim",
        prediction_type=OBJECTIVES[objective],
        variance_type="learned_range" if learned else "fixed_small",
        timestep_spacing="sections",
        ddim_spacing="trailing_floor",
        ddim_epsilon="raw" if raw else "rederived",
        eta=eta,
    )


def _objective(buffers: dict[str, Tensor], schedule: NoiseSchedule) -> str | None:
    """loss_weight is 1, snr or snr / (snr + 1) by objective, where snr is below the clip of min-snr weighting."""
    weight = buffers.get("loss_weight")
    if weight is None:
        return None
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    i = int((snr.log() - 0.7).abs().argmin())  # about 2: the three differ, and it is below 5
    candidates = {"pred_noise": torch.ones(()), "pred_x0": snr[i], "pred_v": snr[i] / (snr[i] + 1)}
    found = [name for name, value in candidates.items() if abs(float(weight[i] - value)) <= 1e-3 * float(value)]
    return found[0] if len(found) == 1 else None
