"""What every loader returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from ddpm.fused.module import ModuleNetwork
from ddpm.lucidrains import LucidrainsUNet
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule
from ddpm.unet import UNet

Network: TypeAlias = UNet | LucidrainsUNet | ModuleNetwork


@dataclass(frozen=True)
class Report:
    """Where the settings came from, for `ddpm info`. Each entry is one sentence or "name = value".

    Attributes:
        found: read from the checkpoint's files.
        inferred: deduced from names or shapes.
        assumed: not said by the checkpoint; the family's default was taken.
        given: options of the caller.
        ignored: present in the files but without effect on sampling.
    """

    found: list[str] = field(default_factory=list)
    inferred: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, whatever its family.

    Attributes:
        family: "diffusers", "guided-diffusion", "ho", "lucidrains", or "module": somebody's own network.
        source: the path or hub id it came from, or the class of a module.
        network: the reference network, float32 on the CPU, in evaluation mode; a module as it was given.
        schedule: in the family's precision.
        rules: the family's own sampling defaults.
        sample_size: (H, W) of its images.
        uint8_rounding: how the family turns [-1, 1] into bytes; see `ddpm.images.to_uint8`.
        report: what was found, inferred, assumed.

    Raises:
        ValueError: the network's output has not as many channels as the images, or twice that with a learned variance.
    """

    family: str
    source: str
    network: Network
    schedule: NoiseSchedule
    rules: SamplingRules
    sample_size: tuple[int, int]
    uint8_rounding: str
    report: Report

    def __post_init__(self) -> None:
        wanted = self.image_channels * (2 if self.rules.learned_variance else 1)
        found = self.network.config.out_channels
        if found != wanted:
            raise ValueError(
                f"{self.source} has {found} output channels, but images of {self.image_channels} channels with "
                f"variance {self.rules.variance_type} need {wanted}; this network cannot be sampled so"
            )

    @property
    def image_channels(self) -> int:
        """Channels of the images: of the network's input, less those of a conditioning image."""
        return self.network.config.in_channels - self.network.condition_channels
