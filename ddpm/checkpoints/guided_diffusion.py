"""Bare state dicts of OpenAI's guided-diffusion and improved-diffusion.

The file holds no settings. What shapes and names reveal is inferred; a published file is recognised by its number of
parameters; everything else has to be given, under the names of the original's command-line flags.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.checkpoints.checkpoint import Checkpoint, Report
from ddpm.checkpoints.files import check_resolution, empty_network, load_weights
from ddpm.checks import boolean, is_integer, one_of, positive_integer
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule, beta_table
from ddpm.unet import UNet, UNetConfig

SIGNATURE = "input_blocks.0.0.weight"
_GUIDED = {"diffusion_steps": 1000, "rescale_timesteps": False, "num_head_channels": 64}
_IMPROVED = {"diffusion_steps": 4000, "noise_schedule": "cosine", "rescale_timesteps": True, "num_heads": 4}
_LEGACY = {"use_new_attention_order": False}
_LARGE = _GUIDED | _LEGACY | {"image_size": 256, "noise_schedule": "linear"}
# Number of parameters -> published files, and the flags that they were trained with and that shapes do not show.
PUBLISHED: dict[int, tuple[str, dict[str, Any]]] = {
    295_904_454: (
        "64x64_diffusion",
        _GUIDED | {"image_size": 64, "noise_schedule": "cosine", "use_new_attention_order": True},
    ),
    421_529_606: ("128x128_diffusion", _LARGE | {"image_size": 128, "num_head_channels": -1, "num_heads": 4}),
    553_838_086: ("256x256_diffusion", _LARGE),
    552_814_086: ("256x256_diffusion_uncond, lsun_bedroom, lsun_cat, lsun_horse", _LARGE),
    558_997_638: ("512x512_diffusion", _LARGE | {"image_size": 512}),
    311_795_910: ("64_256_upsampler", _LARGE | {"num_head_channels": -1, "num_heads": 4}),
    308_835_270: ("128_512_upsampler", _LARGE | {"image_size": 512}),
    93_563_910: ("ffhq_10m", _LARGE),
    52_546_438: ("cifar10_uncond_50M_500K", _IMPROVED | _LEGACY | {"image_size": 32}),
    121_063_942: ("imagenet64_uncond_100M_1500K", _IMPROVED | _LEGACY | {"image_size": 64}),
    273_049_350: (
        "imagenet64_cond_270M_250K",
        _IMPROVED | _LEGACY | {"image_size": 64, "rescale_timesteps": False},
    ),
    113_676_678: (
        "lsun_uncond_100M_1200K_bs128, lsun_uncond_100M_2400K_bs64",
        _LARGE | {"num_head_channels": -1, "num_heads": 1},
    ),
    279_792_390: (
        "upsample_cond_500K",
        _IMPROVED | _LEGACY | {"image_size": 256, "noise_schedule": "linear", "rescale_timesteps": False},
    ),
}
# How both code bases sample, whatever the network: rules of `SamplingRules`.
CONVENTION: dict[str, Any] = {
    "convention": "openai",
    "timestep_spacing": "sections",
    "ddim_spacing": "strided",
    "ddim_epsilon": "rederived",
}
# Flags on which nothing in the file has a say and for which the two code bases have no common, harmless default.
REQUIRED = ("image_size", "noise_schedule", "diffusion_steps", "rescale_timesteps")
# Flags with the same default in both code bases, which hardly anybody changed.
DEFAULTS = {"predict_xstart": False, "sigma_small": False, "clip_denoised": True}


@dataclass(frozen=True)
class Shapes:
    """What names and shapes reveal; the names are those of the original's flags.

    Attributes:
        num_channels: width of the timestep features, a quarter of the time MLP's.
        widths: channels per level.
        num_res_blocks: resnets per level on the way down.
        attention: per level.
        num_classes: rows of the class table, or None.
    """

    num_channels: int
    embedding_dim: int
    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    mid_attention: bool
    resblock_updown: bool
    use_scale_shift_norm: bool
    num_classes: int | None

    @property
    def image_channels(self) -> int:
        """Of three output channels or six; a network with as many inputs as two images enlarges one of them."""
        return 3 if self.in_channels == 6 else self.in_channels

    @property
    def learn_sigma(self) -> bool:
        return self.out_channels == 2 * self.image_channels

    def flags(self) -> dict[str, Any]:
        """The same as flags, to be compared with those that a caller gives."""
        return {
            "num_channels": self.num_channels,
            "num_res_blocks": self.num_res_blocks,
            "channel_mult": [w / self.num_channels for w in self.widths],
            "resblock_updown": self.resblock_updown,
            "use_scale_shift_norm": self.use_scale_shift_norm,
            "learn_sigma": self.learn_sigma,
            "class_cond": self.num_classes is not None,
        }


def load_guided_diffusion(state: dict[str, Tensor], source: str, path: Path, **options: Any) -> Checkpoint:
    """A checkpoint from a state dict.

    Args:
        state: with the original's names.
        source: what the user called it.
        path: of the file, for messages.
        options: flags of the original: image_size, noise_schedule ("linear", "cosine"), diffusion_steps,
            rescale_timesteps, use_new_attention_order, num_heads or num_head_channels; predict_xstart, sigma_small,
            clip_denoised. Flags that the file reveals (num_channels, learn_sigma ...) may be given, and are compared.

    Raises:
        ValueError: a flag is missing, unknown or contradicts the file, or the file is another network's.
    """
    report = Report()
    report.found.append(f"weights: {path}")
    shapes = infer_shapes(state, path)
    flags = _resolve(shapes, state, path, options, report)
    size = flags["image_size"]
    config = UNetConfig(
        sample_size=(size, size),
        in_channels=shapes.in_channels,
        condition_channels=shapes.in_channels - shapes.image_channels,
        out_channels=shapes.out_channels,
        block_out_channels=shapes.widths,
        layers_per_block=shapes.num_res_blocks,
        down_attention=shapes.attention,
        up_attention=shapes.attention[::-1],
        down_resample=("resnet" if shapes.resblock_updown else "conv",) * len(shapes.widths),
        up_resample=("resnet" if shapes.resblock_updown else "conv",) * len(shapes.widths),
        mid_attention=shapes.mid_attention,
        attention_heads=flags["num_heads"],
        attention_head_dim=flags["num_head_channels"],
        time_sinusoid_dim=shapes.num_channels,
        time_embedding_dim=shapes.embedding_dim,
        scale_shift=shapes.use_scale_shift_norm,
        class_embedding=None if shapes.num_classes is None else "table",
        num_class_embeds=shapes.num_classes,
    )
    network = empty_network(UNet, config, f"{path} is no network of guided-diffusion")
    check_resolution(size, config.resolution_divisor, path)
    load_weights(
        network,
        canonical_state(state, shapes, config, legacy=not flags.get("use_new_attention_order", False)),
        path,
        "it is not a complete network of guided-diffusion or improved-diffusion",
    )
    if re.fullmatch(r"model\d+\.pt", path.name) and (twins := sorted(path.parent.glob("ema_*.pt"))):
        warnings.warn(
            f"{path.name} holds raw weights; the averaged ones beside it, {twins[-1].name}, draw better images",
            stacklevel=4,
        )
    report.inferred.append(
        "averaged (EMA) weights, by the file's name" if path.name.startswith("ema") else "weights are used as stored"
    )
    rules = SamplingRules(
        **CONVENTION,
        prediction_type="sample" if flags["predict_xstart"] else "epsilon",
        variance_type=_variance(shapes, flags),
        clip="clamp" if flags["clip_denoised"] else "none",
        rescale_timesteps=flags["rescale_timesteps"],
    )
    schedule = NoiseSchedule.from_betas(beta_table(flags["noise_schedule"], flags["diffusion_steps"]))
    return Checkpoint("guided-diffusion", source, network, schedule, rules, (size, size), "truncate", report)


def _variance(shapes: Shapes, flags: dict[str, Any]) -> str:
    if shapes.learn_sigma:
        return "learned_range"
    return "fixed_small" if flags["sigma_small"] else "fixed_large"


def _resolve(
    shapes: Shapes, state: dict[str, Tensor], path: Path, given: dict[str, Any], report: Report
) -> dict[str, Any]:
    """All flags: given ones first, then a published file's, then the defaults; nothing is guessed."""
    has_attention = shapes.mid_attention or any(shapes.attention)
    known = {*REQUIRED, *DEFAULTS, *shapes.flags(), "num_heads", "num_head_channels", "use_new_attention_order"}
    if unknown := sorted(given.keys() - known):
        raise ValueError(
            f"unknown option {', '.join(unknown)}; a guided-diffusion checkpoint takes {', '.join(sorted(known))}"
        )
    for name, found in shapes.flags().items():
        if name in given and (_multipliers(given[name]) if name == "channel_mult" else given[name]) != found:
            raise ValueError(f"{path} has {name}={found}, but {name}={given[name]!r} was given; leave it out")
    report.inferred.extend(f"{name} = {value}" for name, value in shapes.flags().items())
    flags: dict[str, Any] = {}
    parameters = sum(v.numel() for v in state.values())
    if parameters in PUBLISHED:
        name, flags = PUBLISHED[parameters][0], dict(PUBLISHED[parameters][1])
        settings = ", ".join(f"{k} = {v}" for k, v in flags.items() if k not in given)
        report.inferred.append(f"recognised by its {parameters:,} parameters as {name}: {settings}")
    if {"num_heads", "num_head_channels"} & given.keys():  # either replaces both
        flags.pop("num_heads", None)
        flags.pop("num_head_channels", None)
    flags |= {k: v for k, v in given.items() if k not in shapes.flags()}
    report.given.extend(f"{k} = {v}" for k, v in given.items())
    missing = [name for name in REQUIRED if name not in flags]
    if has_attention:
        missing += [] if "use_new_attention_order" in flags else ["use_new_attention_order"]
        if not {"num_heads", "num_head_channels"} & flags.keys():
            missing.append("num_heads or num_head_channels")
    if missing:
        raise ValueError(
            f"{path} ({parameters:,} parameters) is no published file, and it does not say {', '.join(missing)}; pass "
            "them with the values of the training command"
        )
    assumed = {name: value for name, value in DEFAULTS.items() if name not in flags}
    report.assumed.extend(f"{name} = {value}" for name, value in assumed.items())
    flags = assumed | flags
    one_of("noise_schedule", flags["noise_schedule"], ("linear", "cosine"))
    for name in ("image_size", "diffusion_steps"):
        positive_integer(name, flags[name])
    for name in ("rescale_timesteps", "use_new_attention_order", *DEFAULTS):
        if name in flags:
            boolean(name, flags[name])
    heads, width_of_head = flags.get("num_heads"), flags.get("num_head_channels")
    by_number = width_of_head in (-1, None)  # the original's "not set"
    flags |= {"num_heads": heads if by_number else None, "num_head_channels": None if by_number else width_of_head}
    attended = {w for w, used in zip(shapes.widths, shapes.attention, strict=True) if used}
    for width in attended | ({shapes.widths[-1]} if shapes.mid_attention else set()):
        name = "num_heads" if by_number else "num_head_channels"
        divisor = flags[name]
        if not is_integer(divisor) or divisor < 1 or width % divisor:
            raise ValueError(f"{name}={divisor!r} does not divide an attention of {width} channels in {path}")
    return flags


def _multipliers(value: Any) -> list[float] | Any:
    """channel_mult as the original takes it: "1,2,4" or a sequence."""
    try:
        parts = value.split(",") if isinstance(value, str) else value
        return [float(part) for part in parts]
    except (TypeError, ValueError):
        return value


def infer_shapes(state: dict[str, Tensor], path: Path) -> Shapes:
    """Read the architecture off names and shapes.

    Raises:
        ValueError: it is not such a network.
    """

    def blocks(side: str) -> list[set[str]]:
        """Per block, the names inside it."""
        found: dict[int, set[str]] = {}
        for key in state:
            if match := re.match(rf"{side}\.(\d+)\.(.+)", key):
                found.setdefault(int(match[1]), set()).add(match[2])
        return [found[i] for i in sorted(found)]

    down, up = blocks("input_blocks"), blocks("output_blocks")
    if "encoder_pool.0.weight" in state or "out.2.weight" not in state or not up:
        raise ValueError(f"{path} is a classifier or a part of a network of guided-diffusion, not a sampler's U-Net")

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise ValueError(f"{path} lacks {key}; it is not a complete network of guided-diffusion")
        return state[key].shape

    upsampler = re.compile(r"[1-9]\.(conv|in_layers\.0)\.weight")
    levels = 1 + sum(any(upsampler.fullmatch(name) for name in names) for names in up)
    if len(down) != len(up) or len(up) % levels:
        raise ValueError(f"{path} has {len(down)} input and {len(up)} output blocks, which form no U-Net")
    per_level = len(up) // levels  # num_res_blocks + 1
    first = [1 + level * per_level for level in range(levels)]
    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in first]
    label = state.get("label_emb.weight")
    return Shapes(
        num_channels=shape("time_embed.0.weight")[1],
        embedding_dim=shape("time_embed.2.weight")[0],
        in_channels=state[SIGNATURE].shape[1],
        out_channels=shape("out.2.weight")[0],
        widths=tuple(widths),
        num_res_blocks=per_level - 1,
        attention=tuple("1.qkv.weight" in down[i] for i in first),
        mid_attention="middle_block.1.qkv.weight" in state,
        resblock_updown=levels > 1 and "0.in_layers.0.weight" in down[per_level],
        use_scale_shift_norm=shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
        num_classes=None if label is None else label.shape[0],
    )


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def canonical_state(state: dict[str, Tensor], shapes: Shapes, config: UNetConfig, *, legacy: bool) -> dict[str, Tensor]:
    """Rename to the canonical names; attention's qkv convolution becomes three linear maps.

    Args:
        legacy: qkv's output channels are ordered head, (q, k, v), channel; else (q, k, v), head, channel.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        name = canonical_module(module, shapes)
        if name.endswith(".qkv"):
            prefix = name.removesuffix("qkv")
            heads, _ = config.heads(value.shape[1] if kind == "weight" else value.shape[0] // 3)
            flat = value.flatten(1) if kind == "weight" else value  # [3C, C], or the bias [3C]
            channels = len(flat) // 3
            if legacy:
                parts = flat.reshape(heads, 3, channels // heads, *flat.shape[1:]).transpose(0, 1)
            else:
                parts = flat.reshape(3, heads, channels // heads, *flat.shape[1:])
            for letter, part in zip("qkv", parts, strict=True):
                result[f"{prefix}to_{letter}.{kind}"] = part.reshape(channels, *flat.shape[1:])
        elif name.endswith(".to_out.0") and kind == "weight":
            result[f"{name}.{kind}"] = value.flatten(1)
        else:
            result[f"{name}.{kind}"] = value
    return result


def canonical_module(module: str, shapes: Shapes) -> str:
    """The canonical name of a module; one that has none keeps its own, and is then reported as unknown."""
    fixed = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    if module in fixed:
        return fixed[module]
    match = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)", module)
    middle = re.fullmatch(r"middle_block\.(\d)\.(.+)", module)
    if middle:
        place = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}[middle[1]]
        return f"{place}.{_inside(middle[2])}"
    if not match:
        return module
    per_level, index, part, inside = shapes.num_res_blocks + 1, int(match[2]), int(match[3]), match[4]
    if match[1] == "input_blocks":
        level, j = divmod(index - 1, per_level)
        if j == shapes.num_res_blocks:  # the change of resolution
            place = f"down_blocks.{level}.downsamplers.0"
        else:
            place = f"down_blocks.{level}.{'resnets' if part == 0 else 'attentions'}.{j}"
    else:
        u, j = divmod(index, per_level)
        attends = shapes.attention[len(shapes.attention) - 1 - u]
        if part == (2 if attends else 1):
            place = f"up_blocks.{u}.upsamplers.0"
        else:
            place = f"up_blocks.{u}.{'resnets' if part == 0 else 'attentions'}.{j}"
    return f"{place}.{_inside(inside)}"


def _inside(name: str) -> str:
    """Within a resnet, an attention or a resampler."""
    attention = {"norm": "group_norm", "proj_out": "to_out.0", "op": "conv"}
    return _RESNET.get(name) or attention.get(name, name)
