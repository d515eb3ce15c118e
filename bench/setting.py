"""What the variants of one comparison share: network, noise, timesteps, conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.source import Source
from ddpm.checkpoints import Checkpoint
from ddpm.devices import DTYPES
from ddpm.sampler import Sampler
from ddpm.steps import step_table

NUMERICS_SEED = 1234
LOW_RES = 4  # a super-resolution network is given images smaller by this factor


@dataclass(frozen=True)
class Setting:
    """One comparison. It is sent to other processes, and each reads the network from the disk.

    Attributes:
        source: of the network.
        device, dtype: of the network; dtype is a key of ddpm.devices.DTYPES.
        batch: images of a chain.
        timesteps: of a chain, which is ancestral ("ddpm") whatever the checkpoint's default is; see `chain_timesteps`.
        rounds: chains that each variant runs while timed, at least.
        seconds: for which all variants together are timed, at least.
        threads: of torch on the CPU; None leaves torch its own number.
        only: names of the variants wanted; empty for all.
    """

    source: Source
    device: torch.device
    dtype: str
    batch: int
    timesteps: tuple[int, ...]
    rounds: int
    seconds: float = 0.0
    threads: int | None = None
    only: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def is_half(self) -> bool:
        return DTYPES[self.dtype].itemsize == 2


def state_shape(setting: Setting, checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    """Of x_t: (N, C, H, W)."""
    return (setting.batch, checkpoint.image_channels, *checkpoint.sample_size)


def chain_timesteps(checkpoint: Checkpoint, steps: int) -> tuple[int, ...]:
    """Of an ancestral chain, as the checkpoint's family spaces them.

    Raises:
        ValueError: more steps than there are.
    """
    return tuple(step_table(checkpoint.schedule, checkpoint.rules, steps, sampler="ddpm").timesteps.tolist())


def conditions(checkpoint: Checkpoint, n: int) -> dict[str, Any]:
    """Of `Sampler.sample` for n images: class 0 for all, or zeros to enlarge, where it asks for that."""
    network, (height, width) = checkpoint.network, checkpoint.sample_size
    found: dict[str, Any] = {}
    if network.conditional:
        _, _, found["labels"], _ = network.example(n, height, width)
    if network.condition_channels and not network.self_condition:
        small = (height // LOW_RES, width // LOW_RES)
        found["low_res"] = torch.zeros(n, network.condition_channels, *small)
    return found


def draw_seeded(sampler: Sampler, n: int, **options: Any) -> Tensor:
    """An ancestral chain of n images by the seeds 0 .. n - 1, with these options of `Sampler.sample`."""
    return sampler.sample(n, seeds=range(n), sampler="ddpm", batch_size=n, progress=False, **options)


def reference_network(setting: Setting, checkpoint: Checkpoint) -> Callable[..., Tensor]:
    """network(x_t, t) of the reference network, on the setting's device, under the same conditions; of one that is
    self-conditioned, network(x_t, t, x_0)."""
    network, n = checkpoint.network.to(setting.device), setting.batch
    _, _, labels, condition = network.example(n, *checkpoint.sample_size)
    dtype = next(network.parameters()).dtype
    labels = None if labels is None else labels.to(setting.device)
    condition = None if condition is None else condition.to(setting.device, dtype)

    def call(x: Tensor, t: Tensor, x_0: Tensor | None = None) -> Tensor:
        return network(x, t, labels, condition if x_0 is None else x_0.to(dtype))

    return call


def numerics_generator() -> torch.Generator:
    """The noise by which rivals are judged, drawn on the CPU in float32: x_T, then one draw for every t > 0."""
    return torch.Generator().manual_seed(NUMERICS_SEED)


def to_unit(x_0: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], with the pipeline's own arithmetic."""
    return (x_0 / 2 + 0.5).clamp(0, 1)
