"""Loaders, one file per checkpoint family; each returns a `Checkpoint`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ddpm.checkpoints.checkpoint import Checkpoint, Report
from ddpm.checkpoints.diffusers import HUB_FILES, WEIGHTS, is_directory_of_diffusers, load_diffusers
from ddpm.checkpoints.files import PICKLES, read_tensors

__all__ = ["Checkpoint", "Report", "load_checkpoint"]


def load_checkpoint(source: str | os.PathLike[str], **family_options: Any) -> Checkpoint:
    """Load a checkpoint, recognising its family.

    Args:
        source: a directory of diffusers, a weight file inside one, or a hub id ("owner/name").
        family_options: for diffusers: variant, scheduler_class, and revision for a hub id.

    Raises:
        ValueError: one sentence that names the file or option, what was expected and what was found.
    """
    path = Path(source).expanduser()
    revision = family_options.pop("revision", None)
    unknown = family_options.keys() - {"variant", "scheduler_class"}
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(sorted(unknown))}; "
            "a diffusers checkpoint takes variant, scheduler_class and revision"
        )
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise ValueError(
                f"{source} does not exist; expected a directory of diffusers or a hub id such as owner/name"
            )
        return load_diffusers(_from_hub(str(source), revision), str(source), **family_options)
    if path.is_file():
        return load_diffusers(_directory_of(path), str(source), **family_options)
    if not any(path.iterdir()):
        raise ValueError(
            f"{source} is an empty directory; expected model_index.json or config.json with weights beside it"
        )
    if not is_directory_of_diffusers(path):
        raise ValueError(
            f"{source} holds no model_index.json or config.json; expected a directory that diffusers saved"
        )
    return load_diffusers(path, str(source), **family_options)


def _directory_of(path: Path) -> Path:
    """The diffusers directory that a weight file belongs to."""
    if path.suffix != ".safetensors" and path.suffix not in PICKLES:
        raise ValueError(f"{path} is not a checkpoint: expected a directory, .safetensors, {', '.join(PICKLES)}")
    read_tensors(path)  # a damaged file, an optimizer's state or a pickle with code is named as such
    if not path.name.startswith(WEIGHTS) or not (path.parent / "config.json").is_file():
        raise ValueError(
            f"{path} has no config.json beside it, and shapes alone do not tell how a network computes; "
            "pass the directory that diffusers saved"
        )
    parent = path.parent.parent
    return parent if path.parent.name == "unet" and is_directory_of_diffusers(parent) else path.parent


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
