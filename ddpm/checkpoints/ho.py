"""Ho et al.'s networks in the PyTorch port: pytorch_diffusion's state dicts and ermongroup/ddim's list files."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm.checkpoints.checkpoint import Checkpoint, Report
from ddpm.checkpoints.files import check_resolution, empty_network, is_state_dict, load_weights
from ddpm.checks import one_of, positive_integer
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule, beta_table
from ddpm.unet import UNet, UNetConfig

SIGNATURE = "temb.dense.0.weight"
# Number of parameters -> name, image size, variance that the original samples with.
PUBLISHED: dict[int, tuple[str, int, str]] = {
    35_746_307: ("cifar10", 32, "fixed_large"),
    78_700_803: ("celeba (64 x 64)", 64, "fixed_large"),
    113_673_219: ("lsun_bedroom, lsun_cat, lsun_church", 256, "fixed_small"),
}
_MODULES = (
    (r"temb\.dense\.0", "time_embedding.linear_1"),
    (r"temb\.dense\.1", "time_embedding.linear_2"),
    (r"norm_out", "conv_norm_out"),
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
    (r"down\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"down\.(\d+)\.attn\.", r"down_blocks.\1.attentions."),
    (r"down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"up\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
    (r"up\.(\d+)\.attn\.", r"up_blocks.\1.attentions."),
    (r"up\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
)
_INSIDE = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def weights_of_list(content: list[Any], path: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], str]:
    """(state dict, which it is) of a training checkpoint [model, optimizer, epoch, step(, ema)].

    Raises:
        ValueError: it is not such a list, or has no averaged weights and they were asked for.
    """
    chosen: Any = content[-1] if ema and len(content) == 5 else content[0] if content else None
    if len(content) not in (4, 5) or not is_state_dict(chosen):
        raise ValueError(
            f"{path} holds a list of {len(content)}; expected ermongroup/ddim's [model, optimizer, epoch, step(, ema)] "
            "with state dicts of tensors"
        )
    if ema and len(content) == 5:
        return chosen, "averaged (EMA) weights, the list's last entry; ema=False takes the raw ones"
    if ema:
        return chosen, "raw weights: the list holds no averaged (EMA) ones"
    return chosen, "raw weights, the list's first entry, as ema=False asks"


def load_ho(
    state: dict[str, Tensor],
    source: str,
    path: Path,
    *,
    which: str | None = None,
    sampling_code: str = "pytorch_diffusion",
    image_size: int | None = None,
    variance_type: str | None = None,
    num_train_timesteps: int = 1000,
) -> Checkpoint:
    """A checkpoint from a state dict.

    Args:
        state: with the original's names, no "module." in front.
        source: what the user called it.
        path: of the file, for messages.
        which: whether these weights are averaged; None tells by the file's name.
        sampling_code: whose sampling is repeated: "pytorch_diffusion" or "ermongroup" (ermongroup/ddim).
        image_size, variance_type: those of the published network of this shape, unless given.
        num_train_timesteps: T of the linear schedule.

    Raises:
        ValueError: a missing or wrong option, or a state dict of another network.
    """
    report = Report()
    report.found.append(f"weights: {path}")
    given = {"image_size": image_size, "variance_type": variance_type}
    if "logvar" in state:  # learned by the "bayesian" configurations
        report.ignored.append("logvar: not read in sampling")
        state = {k: v for k, v in state.items() if k != "logvar"}
    widths = _widths(state, path)
    parameters = sum(v.numel() for v in state.values())
    if parameters in PUBLISHED:
        name, size, variance = PUBLISHED[parameters]
        image_size, variance_type = image_size or size, variance_type or variance
        report.inferred.append(
            f"recognised by its {parameters:,} parameters as {name}: image_size = {size}, variance_type = {variance}"
        )
    if image_size is None or variance_type is None:
        raise ValueError(
            f"{path} ({parameters:,} parameters) is no published network; pass image_size= and variance_type="
        )
    report.given.extend(f"{option} = {value}" for option, value in given.items() if value is not None)
    positive_integer("image_size", image_size)
    positive_integer("num_train_timesteps", num_train_timesteps)
    one_of("variance_type", variance_type, ("fixed_small", "fixed_large"))
    one_of("sampling_code", sampling_code, ("pytorch_diffusion", "ermongroup"))
    report.inferred.append(which or _which(path))
    report.assumed.append(f"linear betas 1e-4 .. 0.02, T {num_train_timesteps} (published networks: 1000)")
    report.assumed.append(f"sampled as {sampling_code} does")
    levels = len(widths)
    attention = tuple(f"down.{level}.attn.0.q.weight" in state for level in range(levels))
    in_channels, out_channels = state["conv_in.weight"].shape[1], state["conv_out.weight"].shape[0]
    config = UNetConfig(
        sample_size=(image_size, image_size),
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=widths,
        layers_per_block=len({k.split(".")[3] for k in state if k.startswith("down.0.block.")}),
        down_attention=attention,
        up_attention=attention[::-1],
        mid_attention="mid.attn_1.q.weight" in state,
        norm_eps=1e-6,
        time_embedding_dim=state["temb.dense.0.weight"].shape[0],
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )
    check_resolution(image_size, config.resolution_divisor, path)
    network = empty_network(UNet, config, f"{path} is no network of Ho et al.")
    load_weights(network, canonical_state(state, levels), path, "it is not a complete network of Ho et al.'s port")
    ermongroup = sampling_code == "ermongroup"
    rules = SamplingRules(
        convention=sampling_code,
        sampler="ddim" if ermongroup else "ddpm",
        variance_type="fixed_large" if ermongroup else variance_type,  # that code knows no other
        timestep_spacing="uniform" if ermongroup else "sections",
        ddim_spacing="uniform",
        ddim_clip="none",
    )
    betas = beta_table("linear", num_train_timesteps, scaled=False)
    schedule = NoiseSchedule.from_betas(betas.float() if ermongroup else betas)
    rounding = "half_up" if ermongroup else "truncate"
    return Checkpoint("ho", source, network, schedule, rules, (image_size, image_size), rounding, report)


def _widths(state: dict[str, Tensor], path: Path) -> tuple[int, ...]:
    widths: list[int] = []
    while (weight := state.get(f"down.{len(widths)}.block.0.conv1.weight")) is not None:
        widths.append(weight.shape[0])
    needed = ("conv_in.weight", "conv_out.weight", SIGNATURE)
    if not widths or any(key not in state for key in needed):
        raise ValueError(f"{path} lacks parts of a network of Ho et al.'s port ({', '.join(needed)}, down.0.block.0)")
    return tuple(widths)


def _which(path: Path) -> str:
    """Published averaged weights have "ema" in the name of the file or of its directory."""
    if "ema" in path.name.lower() or "ema" in path.parent.name.lower():
        return "averaged (EMA) weights, by the name of the file or its directory"
    for twin in (path.with_name(f"ema_{path.name}"), path.parent.with_name(f"ema_{path.parent.name}") / path.name):
        if twin.exists():
            warnings.warn(f"{path} holds raw weights; the averaged ones in {twin} draw better images", stacklevel=5)
    return "raw weights, by the file's name: that of averaged (EMA) ones holds 'ema'"


def canonical_state(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Rename to the canonical names; `up` is stored by resolution, and 1x1 attention convolutions become linear."""
    result = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        for pattern, name in _MODULES:
            module = re.sub(rf"^{pattern}", name, module)
        module = re.sub(r"^up_blocks\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", module)
        prefix, _, last = module.rpartition(".")
        if ".attentions." in module:
            module = f"{prefix}.{_ATTENTION.get(last, last)}"
            value = value.flatten(1) if kind == "weight" and value.ndim == 4 else value
        else:
            module = f"{prefix}.{_INSIDE.get(last, last)}" if prefix else module
        result[f"{module}.{kind}"] = value
    return result
