"""UNet2DModel with a DDPMScheduler or a DDIMScheduler: directories that diffusers' save_pretrained wrote, or in memory.

Two layouts: a pipeline (model_index.json, unet/, scheduler/) and the flat one of old repositories, where every file
lies at the top. diffusers itself is not needed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.checkpoints.checkpoint import Checkpoint, Report
from ddpm.checkpoints.files import empty_network, load_weights, read_json, read_tensors
from ddpm.checks import positive_integer
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule, beta_schedule, rescale_zero_terminal_snr
from ddpm.unet import UNet, UNetConfig

# The defaults of diffusers' constructors, which a short configuration relies on.
UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
SCHEDULER_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
}
SCHEDULERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
DDIM_STEPS = 50  # DDIMPipeline's num_inference_steps
WEIGHTS = "diffusion_pytorch_model"
# Attention parameters as diffusers named them before 0.15.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Block type -> (attention, how it changes resolution; None: by downsample_type / upsample_type)
BLOCKS = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}
HUB_FILES = ["*.json", "*.safetensors", "*.bin"]


def is_directory_of_diffusers(path: Path) -> bool:
    names = ("model_index.json", "config.json", "unet/config.json", "unet_ema/config.json")
    return any((path / name).is_file() for name in names)


def load_diffusers(
    directory: Path,
    source: str,
    *,
    variant: str | None = None,
    scheduler_class: str | None = None,
    ema: bool | None = None,
    weights: Path | None = None,
) -> Checkpoint:
    """Load a directory.

    Args:
        directory: pipeline or flat layout.
        source: what the user called it.
        variant: of the weight files, such as "fp16"; by default only the unsuffixed files are looked at.
        scheduler_class: read the scheduler's configuration as this class, whatever class wrote it.
        ema: take unet_ema/ (the default where a training script's checkpoint has it) or unet/.
        weights: this file of the directory, and no other.

    Raises:
        ValueError: a file is missing, damaged or describes something that is not supported.
    """
    report = Report()
    if variant:
        report.given.append(f"variant = {variant}")
    unet_directory = directory if weights else _unet_directory(directory, ema, report)
    path = unet_directory / "config.json"
    config = unet_config(_settings(path, UNET_DEFAULTS, report, "unet"), path, report)
    network = empty_network(UNet, config, f"{path} describes no network")
    if weights and "-of-" not in weights.name:  # one shard stands for all of them
        report.found.append(f"weights: {weights}")
        state, weights_path = read_tensors(weights), weights
    else:
        state, weights_path = _read_weights(unet_directory, variant, report)
    load_weights(network, _modern_keys(state, report), weights_path)
    if unet_directory.name != "unet_ema" and ema is None:
        report.inferred.append("weights are used as stored: a training script that keeps an EMA saves that one here")

    schedule, rules = _scheduler(directory, scheduler_class, report)
    return Checkpoint(
        "diffusers", source, network, schedule, rules, _sample_size(config, rules, path), "half_to_even", report
    )


def diffusers_checkpoint(
    source: str, unet: Mapping[str, Any], state: dict[str, Tensor], schedule: NoiseSchedule, rules: SamplingRules
) -> Checkpoint:
    """A checkpoint of what is in memory.

    Args:
        source: what messages call it, such as "the pipeline"; a part of it is "the pipeline's unet".
        unet: its configuration; what it leaves out has diffusers' default.
        state: the network's weights, in any dtype. The checkpoint's network shares those that are float32.
        schedule, rules: of its scheduler.

    Raises:
        ValueError: as `load_diffusers`.
    """
    report, where = Report(), f"{source}'s unet"
    config = unet_config(_with_defaults(unet, UNET_DEFAULTS, report, "unet", where), where, report)
    network = empty_network(UNet, config, f"{where} describes no network")
    load_weights(network, state, where, "its configuration describes another network")
    return Checkpoint(
        "diffusers", source, network, schedule, rules, _sample_size(config, rules, where), "half_to_even", report
    )


def configured_scheduler(
    source: str, scheduler_class: str, scheduler: Mapping[str, Any]
) -> tuple[NoiseSchedule, SamplingRules]:
    """Schedule and rules that the configuration of a scheduler describes.

    Args:
        source: what messages call the pipeline.
        scheduler_class: a key of SCHEDULERS.
        scheduler: its configuration; what it leaves out has diffusers' default.

    Raises:
        ValueError: as `load_diffusers`.
    """
    where = f"{source}'s scheduler"
    settings = _with_defaults(scheduler, SCHEDULER_DEFAULTS, Report(), "scheduler", where)
    return _schedule(settings, where), _rules(settings, where, SCHEDULERS[scheduler_class])


def _sample_size(config: UNetConfig, rules: SamplingRules, where: Path | str) -> tuple[int, int]:
    """(H, W) of the images.

    Raises:
        ValueError: none is given, or the network cannot have it; or the network lacks the channels of a variance.
    """
    wanted = config.in_channels * (2 if rules.learned_variance else 1)
    if config.out_channels != wanted:
        kind = f"variance_type {rules.variance_type!r}"
        if rules.sampler == "ddim" and not rules.learned_variance:
            kind = "DDIMScheduler, which knows no learned variance,"
        raise ValueError(
            f"{where} has out_channels={config.out_channels}, but {kind} with {config.in_channels} image channels "
            f"needs {wanted}; one of the two is wrong"
        )
    if config.sample_size is None:
        raise ValueError(f"{where} has no sample_size, the resolution to sample at; add it")
    if any(side % config.resolution_divisor for side in config.sample_size):
        raise ValueError(
            f"{where} has sample_size {config.sample_size}, but its {len(config.block_out_channels)} levels need a "
            f"multiple of {config.resolution_divisor}"
        )
    return config.sample_size


def _unet_directory(directory: Path, ema: bool | None, report: Report) -> Path:
    """unet_ema/ before unet/, unless the caller says otherwise; else the directory itself."""
    averaged = directory / "unet_ema"
    if averaged.is_dir() and ema is not False:
        report.inferred.append("averaged (EMA) weights, from unet_ema/; ema=False takes unet/")
        return averaged
    if ema:
        raise ValueError(f"{directory} has no unet_ema/, so ema=True has nothing to take; leave it out")
    if averaged.is_dir():
        report.given.append("ema = False: raw weights, from unet/")
    if (directory.parent / "unet_ema").is_dir() and directory.name == "unet":
        warnings.warn(f"{directory} holds raw weights; those in unet_ema/ beside it draw better images", stacklevel=4)
    return _component(directory, "unet")


def _component(directory: Path, name: str) -> Path:
    return directory / name if (directory / name).is_dir() else directory


def _settings(path: Path, defaults: dict[str, Any], report: Report, component: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the {component}'s configuration as diffusers saves it")
    return _with_defaults(read_json(path), defaults, report, component, path)


def _with_defaults(
    raw: Mapping[str, Any], defaults: dict[str, Any], report: Report, component: str, where: Path | str
) -> dict[str, Any]:
    """Settings with defaults filled in; unknown keys are reported and dropped, as diffusers does."""
    use_default = set(raw.get("_use_default_values", ()))
    given = {k: v for k, v in raw.items() if not k.startswith("_") and k not in use_default}
    if given.keys() & defaults.keys():
        report.found.append(f"{component} configuration: {where}")
    missing = [k for k in defaults if k not in given]
    if missing:
        report.assumed.append(f"{component}: diffusers' defaults for {', '.join(missing)}")
    unknown = [k for k in given if k not in defaults and k != "predict_epsilon"]
    if unknown:
        report.ignored.append(f"{component}: settings without effect here: {', '.join(unknown)}")
    result = defaults | {k: v for k, v in given.items() if k in defaults}
    if given.get("predict_epsilon") is False and "prediction_type" not in given:
        result["prediction_type"] = "sample"  # the name of that setting before diffusers 0.13
        report.inferred.append("predict_epsilon = false means prediction_type = sample")
    return result


def unet_config(s: dict[str, Any], path: Path | str, report: Report) -> UNetConfig:
    """The network that a complete configuration describes.

    Args:
        s: every setting of UNET_DEFAULTS.
        path: what messages call it.
        report: of what had to be inferred.

    Raises:
        ValueError: it is not supported, or no network.
    """
    down = [_block_type(name, "Down", s["downsample_type"], path) for name in s["down_block_types"]]
    up = [_block_type(name, "Up", s["upsample_type"], path) for name in s["up_block_types"]]
    if s["mid_block_type"] not in (None, "UNetMidBlock2D"):
        raise ValueError(
            f"{path}: mid_block_type {s['mid_block_type']!r} is not supported; expected UNetMidBlock2D or null"
        )
    if s["norm_num_groups"] is None:
        raise ValueError(
            f"{path}: norm_num_groups is null, which only the Skip blocks can use, and those are not supported"
        )
    if s["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise ValueError(
            f"{path}: resnet_time_scale_shift {s['resnet_time_scale_shift']!r} is not supported; "
            "expected default or scale_shift"
        )
    scale_shift = s["resnet_time_scale_shift"] == "scale_shift"
    class_embedding = s["class_embed_type"] or ("table" if s["num_class_embeds"] is not None else None)
    if class_embedding not in (None, "table", "timestep", "identity"):
        raise ValueError(f"{path}: class_embed_type {class_embedding!r} is not one of timestep, identity, null")
    # Under scale_shift diffusers builds the mid attention without a norm unless its groups are given.
    mid_groups = s["attn_norm_num_groups"] or (None if scale_shift else s["norm_num_groups"])
    if mid_groups is None and s["mid_block_type"] and s["add_attention"]:
        report.inferred.append("the mid attention has no norm: scale_shift without attn_norm_num_groups")
    size = s["sample_size"]
    try:
        return UNetConfig(
            sample_size=(size, size) if isinstance(size, int) else tuple(size) if size else None,
            in_channels=s["in_channels"],
            out_channels=s["out_channels"],
            block_out_channels=tuple(s["block_out_channels"]),
            layers_per_block=s["layers_per_block"],
            down_attention=tuple(attention for attention, _ in down),
            up_attention=tuple(attention for attention, _ in up),
            down_resample=tuple(kind for _, kind in down),
            up_resample=tuple(kind for _, kind in up),
            mid_block=s["mid_block_type"] is not None,
            mid_attention=bool(s["add_attention"]),
            attention_head_dim=s["attention_head_dim"],
            norm_num_groups=s["norm_num_groups"],
            norm_eps=s["norm_eps"],
            mid_norm_num_groups=mid_groups,
            activation=s["act_fn"],
            time_embedding=s["time_embedding_type"],
            time_embedding_dim=s["time_embedding_dim"],
            flip_sin_to_cos=s["flip_sin_to_cos"],
            freq_shift=s["freq_shift"],
            num_train_timesteps=s["num_train_timesteps"],
            scale_shift=scale_shift,
            downsample_padding=s["downsample_padding"],
            mid_block_scale_factor=s["mid_block_scale_factor"],
            center_input_sample=s["center_input_sample"],
            class_embedding=class_embedding,
            num_class_embeds=s["num_class_embeds"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no network: {error}") from error


def _block_type(name: str, direction: str, by_setting: str, path: Path | str) -> tuple[bool, str]:
    plain = name.removeprefix("UNetRes")
    if plain not in BLOCKS or direction not in plain:
        allowed = ", ".join(block for block in BLOCKS if direction in block)
        raise ValueError(f"{path}: block type {name!r} is not supported; expected one of {allowed}")
    attention, kind = BLOCKS[plain]
    return attention, kind or by_setting


def _read_weights(directory: Path, variant: str | None, report: Report) -> tuple[dict[str, Tensor], Path]:
    """Sharded index, else safetensors, else a pickle; with the variant in the name if one is asked for."""
    tag = f".{variant}" if variant else ""
    candidates = [
        *(f"{WEIGHTS}.safetensors.index{tag}.json", f"{WEIGHTS}.safetensors{tag}.index.json"),
        f"{WEIGHTS}{tag}.safetensors",
        *(f"{WEIGHTS}.bin.index{tag}.json", f"{WEIGHTS}{tag}.bin"),
    ]
    for name in candidates:
        path = directory / name
        if path.is_file():
            report.found.append(f"weights: {path}")
            return (_read_shards(path) if name.endswith(".json") else read_tensors(path)), path
    others = sorted(p.name for p in directory.glob("*") if p.suffix in (".safetensors", ".bin"))
    hint = f"found {', '.join(others)}; a variant is chosen with variant=" if others else "found no weight file"
    raise ValueError(f"{directory} has no {WEIGHTS}{tag}.safetensors or .bin; {hint}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map; expected the index of a sharded checkpoint")
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if shard.parent != index.parent or not shard.is_file():
            raise ValueError(f"{index} names the shard {name}, which is not beside it; copy the missing file")
        state |= read_tensors(shard)
    return state


def _modern_keys(state: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Rename the attention keys of old diffusers versions."""
    pattern = re.compile(r"(.*attentions\.\d+\.)(" + "|".join(OLD_ATTENTION) + r")(\.(?:weight|bias))")
    renamed = {}
    for key, value in state.items():
        match = pattern.fullmatch(key)
        renamed[f"{match[1]}{OLD_ATTENTION[match[2]]}{match[3]}" if match else key] = value
    if renamed.keys() != state.keys():
        report.inferred.append("attention keys are those of an old diffusers version and were renamed")
    return renamed


def _scheduler(directory: Path, chosen: str | None, report: Report) -> tuple[NoiseSchedule, SamplingRules]:
    path = _scheduler_file(directory)
    if path.is_file():
        settings = _settings(path, SCHEDULER_DEFAULTS, report, "scheduler")
        name = chosen or _scheduler_class(directory, path, report)
    else:
        settings, name = dict(SCHEDULER_DEFAULTS), chosen or "DDPMScheduler"
        report.assumed.append(
            "no scheduler configuration: DDPMScheduler with diffusers' defaults (T 1000, linear, fixed_small)"
        )
    if chosen:
        report.given.append(f"scheduler_class = {chosen}")
    if name not in SCHEDULERS:
        raise ValueError(
            f"{path}: scheduler class {name} is not supported, only {' and '.join(SCHEDULERS)}; "
            "scheduler_class='DDPMScheduler' reads its settings as that one's and samples ancestrally"
        )
    return _schedule(settings, path), _rules(settings, path, SCHEDULERS[name])


def _scheduler_file(directory: Path) -> Path:
    """In the pipeline; or, for a component or a training script's checkpoint-N/, in the pipeline around it."""
    inside = _component(directory, "scheduler") / "scheduler_config.json"
    root = directory
    while not inside.is_file() and (root.name in ("unet", "unet_ema") or root.name.startswith("checkpoint-")):
        root = root.parent
        inside = root / "scheduler" / "scheduler_config.json"
    return inside


def _scheduler_class(directory: Path, path: Path, report: Report) -> str:
    """model_index.json decides in a pipeline; else the class that wrote the configuration."""
    index = directory / "model_index.json"
    if path.parent.name == "scheduler":
        index = path.parent.parent / "model_index.json"
    entries: Iterable[Any] = read_json(index).get("scheduler", ()) if index.is_file() else ()
    name = [*entries][1] if len([*entries]) == 2 else read_json(path).get("_class_name")
    if name is None:
        report.assumed.append("the scheduler's class is not named: DDPMScheduler")
        return "DDPMScheduler"
    return str(name)


def _schedule(s: dict[str, Any], path: Path | str) -> NoiseSchedule:
    total = positive_integer(f"{path}: num_train_timesteps", s["num_train_timesteps"])
    try:
        if s["trained_betas"] is not None:
            betas = torch.tensor(s["trained_betas"], dtype=torch.float32)
            if len(betas) != total:  # the original would index past its tables, or space its steps by the wrong T
                raise ValueError(f"trained_betas has {len(betas)} entries for num_train_timesteps={total}")
        else:
            betas = beta_schedule(s["beta_schedule"], total, s["beta_start"], s["beta_end"])
    except (TypeError, ValueError, RuntimeError) as error:  # torch explains a wrong type on several lines
        raise ValueError(f"{path} describes no noise schedule: {str(error).splitlines()[0]}") from error
    if s["rescale_betas_zero_snr"]:
        betas = rescale_zero_terminal_snr(betas)
    return NoiseSchedule.from_betas(betas)


def _rules(s: dict[str, Any], path: Path | str, sampler: str = "ddpm") -> SamplingRules:
    if sampler == "ddim" and s["variance_type"] == "fixed_large_log":
        s = s | {"variance_type": "fixed_large"}  # not a setting of DDIMScheduler; see SamplingRules for the other one
    try:
        return SamplingRules(
            sampler=sampler,
            ddim_steps=DDIM_STEPS,
            set_alpha_to_one=s["set_alpha_to_one"],
            prediction_type=s["prediction_type"],
            variance_type=s["variance_type"],
            clip="dynamic" if s["thresholding"] else "clamp" if s["clip_sample"] else "none",
            clip_range=s["clip_sample_range"],
            threshold_ratio=s["dynamic_thresholding_ratio"],
            threshold_max=s["sample_max_value"],
            timestep_spacing=s["timestep_spacing"],
            steps_offset=s["steps_offset"],
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
