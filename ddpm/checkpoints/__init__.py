"""Loaders, one file per checkpoint family; each returns a `Checkpoint`."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm.checkpoints import guided_diffusion, ho, lucidrains
from ddpm.checkpoints.checkpoint import Checkpoint, Report
from ddpm.checkpoints.diffusers import HUB_FILES, WEIGHTS, is_directory_of_diffusers, load_diffusers
from ddpm.checkpoints.files import PICKLES, describe, is_state_dict, read_checkpoint
from ddpm.checks import boolean

# Parameters of the loaders that are not for callers of `load_checkpoint`.
NOT_SETTINGS = {"state", "source", "path", "which", "weights"}

__all__ = ["Checkpoint", "Report", "load_checkpoint"]


def load_checkpoint(source: str | os.PathLike[str], **family_options: Any) -> Checkpoint:
    """Load a checkpoint, recognising its family.

    Args:
        source: a directory of diffusers, a weight file (.safetensors, .pt, .pth, .ckpt, .bin), or a hub id
            ("owner/name").
        family_options: settings that the file does not hold; see `load_diffusers`, `load_guided_diffusion`, `load_ho`
            and `load_lucidrains`. `revision` goes with a hub id; `ema=False` takes raw weights where a file or a
            directory holds both.

    Raises:
        ValueError: one sentence that names the file or option, what was expected and what was found.
    """
    path = Path(source).expanduser()
    if reserved := NOT_SETTINGS & family_options.keys():
        raise ValueError(f"unknown option {', '.join(sorted(reserved))}; it is not a setting of any checkpoint")
    if "ema" in family_options:
        boolean("ema", family_options["ema"])
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise ValueError(
                f"{source} does not exist; expected a directory of diffusers, a weight file, or a hub id such as "
                "owner/name"
            )
        revision = family_options.pop("revision", None)
        _check_options("diffusers", load_diffusers, family_options, "revision")
        return load_diffusers(_from_hub(str(source), revision), str(source), **family_options)
    if "revision" in family_options:
        raise ValueError(f"revision goes with a hub id, and {source} is here; leave it out")
    if path.is_file():
        return _load_file(path, str(source), family_options)
    if not any(path.iterdir()):
        raise ValueError(
            f"{source} is an empty directory; expected model_index.json or config.json with weights beside it"
        )
    if not is_directory_of_diffusers(path):
        raise ValueError(
            f"{source} holds no model_index.json or config.json; expected a directory that diffusers saved, or pass a "
            "weight file of another family by its own path"
        )
    _check_options("diffusers", load_diffusers, family_options)
    return load_diffusers(path, str(source), **family_options)


def _load_file(path: Path, source: str, options: dict[str, Any]) -> Checkpoint:
    if path.suffix != ".safetensors" and path.suffix not in PICKLES:
        raise ValueError(f"{path} is not a checkpoint: expected a directory, .safetensors, {', '.join(PICKLES)}")
    if path.name.startswith(WEIGHTS) and (path.parent / "config.json").is_file():
        _check_options("diffusers", load_diffusers, options)
        _refuse_choice(path, options, "ema", "variant")
        return load_diffusers(path.parent, source, weights=path, **options)
    content = read_checkpoint(path)
    if isinstance(content, list):
        _check_options("Ho et al.", ho.load_ho, options, "ema")
        state, which = ho.weights_of_list(content, path, ema=options.pop("ema", True))
        options = {"sampling_code": "ermongroup"} | options
        return ho.load_ho(_without_module(state), source, path, which=which, **options)
    if is_state_dict(content) and any(key.startswith("ema_model.") for key in content):
        content = lucidrains.of_ema_wrapper(content)
    if lucidrains.is_trainer_file(content):
        _check_options("lucidrains", lucidrains.load_lucidrains, options, "ema")
        state, which = lucidrains.trainer_weights(content, path, ema=options.pop("ema", True))
        version = content.get("version")
        options = ({"version": version} if isinstance(version, str) else {}) | options
        return lucidrains.load_lucidrains(_without_module(state), source, path, which=which, **options)
    if not is_state_dict(content):
        raise ValueError(
            f"{path} holds {describe(content)}; expected a state dict that maps names to tensors; if one of its "
            "entries is that, save the entry by itself"
        )
    return _load_state(_without_module(content), path, source, options)


def _load_state(state: dict[str, Tensor], path: Path, source: str, options: dict[str, Any]) -> Checkpoint:
    """A bare state dict, whose names tell the family."""
    _refuse_choice(path, options, "ema")
    if guided_diffusion.SIGNATURE in state:
        return guided_diffusion.load_guided_diffusion(state, source, path, **options)
    if ho.SIGNATURE in state:
        _check_options("Ho et al.", ho.load_ho, options)
        return ho.load_ho(state, source, path, **options)
    if any(key.endswith(lucidrains.SIGNATURE) for key in state):
        _check_options("lucidrains", lucidrains.load_lucidrains, options)
        return lucidrains.load_lucidrains(state, source, path, **options)
    if any(key.startswith("down_blocks.") for key in state):
        raise ValueError(
            f"{path} has no config.json beside it, and shapes alone do not tell how a network computes; "
            "pass the directory that diffusers saved"
        )
    raise ValueError(
        f"{path} has none of the names that a known family has (diffusers, guided-diffusion, Ho et al., lucidrains); "
        f"found {', '.join(list(state)[:3])}"
    )


def _refuse_choice(path: Path, options: dict[str, Any], *names: str) -> None:
    for name in names:
        if name in options:
            raise ValueError(f"{path} holds one set of weights, so {name}= has nothing to choose; leave it out")


def _without_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DataParallel puts in front."""
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _check_options(family: str, loader: Callable[..., Checkpoint], options: dict[str, Any], *more: str) -> None:
    parameters = inspect.signature(loader).parameters.values()
    allowed = [*more, *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in NOT_SETTINGS)]
    if unknown := sorted(options.keys() - set(allowed)):
        raise ValueError(
            f"unknown option {', '.join(unknown)}; a {family} checkpoint takes {', '.join(sorted(allowed))}"
        )


def _from_hub(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{repository} does not exist here, and huggingface_hub is not installed to download it; "
            "pass a directory or install huggingface_hub"
        ) from error
    patterns = [f"{folder}{name}" for folder in ("", "unet/", "scheduler/") for name in HUB_FILES]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen unrelated types; all mean that there is no such copy
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{repository} is no directory here and could not be downloaded as a hub id ({reason}); check the name"
        ) from error
