"""A pipeline of diffusers as it is in memory at this moment: network and scheduler, read and checked.

Whatever the fused network or the step table would not repeat is refused here, by name: nothing that somebody changed in
a pipeline may be ignored in silence.
"""

from __future__ import annotations

import inspect
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.checkpoints.checkpoint import Checkpoint
from ddpm.checkpoints.diffusers import (
    SCHEDULER_DEFAULTS,
    SCHEDULERS,
    UNET_DEFAULTS,
    configured_scheduler,
    diffusers_checkpoint,
)
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule

PIPELINE = "the pipeline"  # what messages call it
# Attributes of modules that change nothing of what they compute: the resolution is read from the configuration.
NO_SETTINGS = {"training", "gradient_checkpointing", "sample_size"}
INSTEAD = "or call the pipeline as it was before ddpm.accelerate"


def network_of(pipe: Any) -> Any:
    """The pipeline's network, without the wrapper that torch.compile puts around.

    Raises:
        ValueError: no UNet2DModel.
    """
    from diffusers import UNet2DModel

    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"{PIPELINE}'s unet is a {type(unet).__name__}; expected a UNet2DModel of diffusers")
    return unet


def structure(unet: nn.Module) -> dict[str, list[str]]:
    """Module name -> what computes there: its class and what was changed about it, then its settings."""
    return {name: _describe(module) for name, module in unet.named_modules()}


def _describe(module: nn.Module) -> list[str]:
    kind = type(module)
    parts = [kind.__name__ if kind.__module__.startswith(("diffusers.", "torch.nn.")) else f"another {kind.__name__}"]
    if module._forward_hooks or module._forward_pre_hooks:
        parts.append("with hooks")
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's hooks move weights, no more
        parts.append("with a forward of its own (of Accelerate's mixed precision: unwrap_model removes it)")
    if isinstance(module, nn.Dropout) and module.training and module.p:
        parts.append("in training mode, which draws at random")
    processor = getattr(module, "processor", None)
    if processor is not None and not type(processor).__module__.startswith("diffusers."):
        parts.append(f"with the processor {type(processor).__name__}")
    settings = [
        f"{name}={value!r}"
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in NO_SETTINGS and _is_plain(value)
    ]
    return [" ".join(parts), *settings]


def _is_plain(value: Any) -> bool:
    """Whether a setting is a number, a text, or some of them; nothing that lies elsewhere in memory in a twin."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def read_checkpoint(unet: Any, scheduler: Any) -> Checkpoint:
    """A snapshot: later changes of the pipeline do not reach it.

    Raises:
        ValueError: the network is not what its configuration describes, is not supported, is class-conditional (the
            pipelines pass no labels) or not in memory; or the scheduler is refused, see `read_scheduler`.
    """
    where = f"{PIPELINE}'s unet"
    settings = _settings(unet, UNET_DEFAULTS, where)
    _check_structure(unet, settings, where)
    state = unet.state_dict()
    for name, value in state.items():
        if value.is_meta or type(value) is not Tensor:
            kind = "is on the meta device" if value.is_meta else f"is a {type(value).__name__}"
            raise ValueError(
                f"{where}: {name} {kind}; expected plain tensors in memory; undo sequential offload or quantization, "
                f"{INSTEAD}"
            )
    copies = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in state.items()}
    checkpoint = diffusers_checkpoint(PIPELINE, settings, copies, *read_scheduler(scheduler))
    if checkpoint.network.conditional:
        raise ValueError(
            f"{where} is class-conditional, and the pipelines of diffusers pass it no labels; save it and use "
            "ddpm.load(directory).sample(labels=...)"
        )
    return checkpoint


def _check_structure(unet: nn.Module, settings: dict[str, Any], where: str) -> None:
    """Raise ValueError where the network is another than the one that its configuration makes."""
    from diffusers import UNet2DModel

    with torch.device("meta"):
        fresh: Any = UNet2DModel(**settings)
    described, found = structure(fresh.eval()), structure(unet)
    for name in described | found:
        for expected, there in zip_longest(described.get(name, []), found.get(name, []), fillvalue="nothing"):
            if expected == there:
                continue
            raise ValueError(
                f"{where} has {there} at {name or 'its top'}, where its configuration describes {expected}; undo that "
                f"change, {INSTEAD}"
            )


def read_scheduler(scheduler: Any) -> tuple[NoiseSchedule, SamplingRules]:
    """Schedule and rules: settings from the configuration, alphas_cumprod from the tensor that its steps read.

    Raises:
        ValueError: neither DDPMScheduler nor DDIMScheduler, a method replaced, or numbers that contradict each other.
    """
    import diffusers

    kind, where = type(scheduler), f"{PIPELINE}'s scheduler"
    if kind not in (getattr(diffusers, name) for name in SCHEDULERS):
        name = (
            f"a {kind.__name__}" if kind.__module__.startswith("diffusers.") else f"{kind.__module__}.{kind.__name__}"
        )
        raise ValueError(
            f"{where} is {name}; expected {' or '.join(SCHEDULERS)} itself, such as "
            "DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    if replaced := [name for name in vars(scheduler) if callable(getattr(kind, name, None))]:
        raise ValueError(f"{where} has a {replaced[0]} of its own, which would not be called; delete it, {INSTEAD}")
    settings = _settings(scheduler, SCHEDULER_DEFAULTS, where)
    if SCHEDULERS[kind.__name__] == "ddim":
        settings.pop("variance_type", None)  # left there by the scheduler from which it was made; it is not read
    _, rules = configured_scheduler(PIPELINE, kind.__name__, settings)
    alphas_cumprod = scheduler.alphas_cumprod.detach().cpu().clone()
    if len(alphas_cumprod) != settings["num_train_timesteps"]:
        raise ValueError(
            f"{where} has {len(alphas_cumprod)} alphas_cumprod; expected {settings['num_train_timesteps']}, its "
            "num_train_timesteps; make a new scheduler with both"
        )
    ends = {"one": 1.0, "final_alpha_cumprod": 1.0 if rules.set_alpha_to_one else float(alphas_cumprod[0])}
    own: dict[str, Any] = {name: expected for name, expected in ends.items() if name in vars(scheduler)}
    if rules.sampler == "ddpm":
        own["variance_type"] = rules.variance_type
    for name, expected in own.items():
        if (found := vars(scheduler).get(name, expected)) != expected:
            raise ValueError(
                f"{where} has {name}={found}; expected {expected}, as its configuration and its "
                "alphas_cumprod say; make a new scheduler instead of changing this one"
            )
    return NoiseSchedule(scheduler.betas.detach().cpu().clone(), alphas_cumprod), rules


def _settings(component: Any, known: dict[str, Any], where: str) -> dict[str, Any]:
    """The configuration as it is now, without diffusers' notes on which of its values were defaults once.

    Raises:
        ValueError: a setting that a newer diffusers may have, and that is not at its default.
    """
    config = component.config
    for name, parameter in inspect.signature(type(component).__init__).parameters.items():
        if name in config and name not in known and config[name] != parameter.default:
            raise ValueError(
                f"{where} has {name}={config[name]!r}, which ddpm does not know; expected {parameter.default!r}, its "
                f"default; set it so, {INSTEAD}"
            )
    return {name: value for name, value in config.items() if name in known}
