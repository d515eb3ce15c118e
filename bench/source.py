"""Whose network is measured: a checkpoint, or a named architecture with random weights, which need no download.

Every variant runs in a process of its own and loads the network itself, so that its loading can be timed; what it
loads is on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bench.architectures import Architecture, architecture
from ddpm.checkpoints import Checkpoint, load_checkpoint
from ddpm.checkpoints.export import save_diffusers

RANDOM = " (random weights)"


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        name: as reports call it.
        location: what `load_checkpoint` takes; of a named architecture, a file of weights.
        options: of `load_checkpoint`, what the file does not say.
        architecture: its name, or None.
        stock: a directory that diffusers loads; None where it has no such network, and then
        no_stock: says why.
    """

    name: str
    location: str
    options: dict[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    stock: str | None = None
    no_stock: str | None = None

    def load(self) -> Checkpoint:
        """Read it anew."""
        if self.architecture is None:
            return load_checkpoint(self.location, **self.options)
        return random_checkpoint(architecture(self.architecture), Path(self.location))


def checkpoint_source(location: str, options: dict[str, Any], folder: Path | None) -> Source:
    """A checkpoint's, written to `folder` as a pipeline directory for the rivals: with the weights and settings that
    were read, whichever of several there are, and wherever they lie. Without a folder there are no rivals.

    Raises:
        ValueError: it cannot be loaded, or written.
    """
    source = Source(Path(location).name, location, options)
    return with_stock(source, source.load(), folder)


def random_source(name: str, folder: Path, *, rivals: bool = True) -> Source:
    """A named architecture's, its weights written to `folder`.

    Raises:
        ValueError: no architecture has this name, or the weights cannot be written.
    """
    entry = architecture(name)
    path = folder / f"{name}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = {key: tensor.contiguous() for key, tensor in entry.network().state_dict().items()}
    try:
        save_file(weights, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write the weights of {name} to {folder} ({error}); is the disk full?") from error
    source = Source(name + RANDOM, str(path), architecture=name)
    return with_stock(source, source.load(), folder if rivals else None)


def with_stock(source: Source, checkpoint: Checkpoint, folder: Path | None) -> Source:
    """The same with a directory that diffusers loads, or the reason why there is none."""
    if folder is None:
        return replace(source, no_stock="no rivals were asked for")
    directory = folder / "diffusers"
    try:
        save_diffusers(checkpoint, directory)
    except ValueError as error:
        return replace(source, no_stock=str(error))
    return replace(source, stock=str(directory))


def random_checkpoint(entry: Architecture, weights: Path) -> Checkpoint:
    """A checkpoint of this architecture with weights from a file."""
    with torch.device("meta"):
        network = entry.network()
    network.load_state_dict(load_file(weights), assign=True)
    return entry.checkpoint(network.requires_grad_(False))
