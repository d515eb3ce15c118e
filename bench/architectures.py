"""Published networks by name: their shapes, and how many parameters the published files have."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ddpm.checkpoints.checkpoint import Checkpoint, Report
from ddpm.checkpoints.diffusers import UNET_DEFAULTS, unet_config
from ddpm.checkpoints.files import read_json
from ddpm.lucidrains import LucidrainsConfig, LucidrainsUNet
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule, beta_schedule
from ddpm.unet import UNet, UNetConfig

DEMO = Path(str(files("ddpm") / "assets" / "emoji32-smileys"))


@dataclass(frozen=True)
class Architecture:
    """A network's shape, without weights.

    Attributes:
        name: as the command line takes it.
        origin: the published file or class that has it.
        config: of the network.
        image_size: H = W of its images.
        variance_type: that it is sampled with, see `SamplingRules`.
        parameters: of the published file.
    """

    name: str
    origin: str
    config: UNetConfig | LucidrainsConfig
    image_size: int
    variance_type: str
    parameters: int

    @property
    def image_channels(self) -> int:
        if isinstance(self.config, LucidrainsConfig):
            return self.config.channels
        return self.config.in_channels - self.config.condition_channels

    def network(self) -> UNet | LucidrainsUNet:
        """The reference network on torch's default device, with random weights; on "meta" it has none."""
        config = self.config
        return (LucidrainsUNet(config) if isinstance(config, LucidrainsConfig) else UNet(config)).eval()

    def checkpoint(self, network: UNet | LucidrainsUNet) -> Checkpoint:
        """Of a network of this shape, with Ho et al.'s schedule, sampled as diffusers does it."""
        return Checkpoint(
            family="diffusers",
            source=self.name,
            network=network,
            schedule=NoiseSchedule.from_betas(beta_schedule("linear", 1000, 1e-4, 0.02)),
            rules=SamplingRules(variance_type=self.variance_type),
            sample_size=(self.image_size, self.image_size),
            uint8_rounding="half_to_even",
            report=Report(),
        )


def _ho(channels: tuple[int, ...], attention: int, size: int) -> UNetConfig:
    """Ho et al.'s networks as google's checkpoints have them, with attention at one level."""
    used = tuple(level == attention for level in range(len(channels)))
    return UNetConfig(
        block_out_channels=channels,
        down_attention=used,
        up_attention=used[::-1],
        sample_size=(size, size),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def _guided(size: int, channels: int, mults: tuple[int, ...], attention: tuple[bool, ...], blocks: int) -> UNetConfig:
    """guided-diffusion's class-conditional ImageNet networks."""
    return UNetConfig(
        block_out_channels=tuple(channels * mult for mult in mults),
        down_attention=attention,
        up_attention=attention[::-1],
        sample_size=(size, size),
        out_channels=6,
        layers_per_block=blocks,
        down_resample=("resnet",) * len(mults),
        up_resample=("resnet",) * len(mults),
        attention_head_dim=64,
        scale_shift=True,
        class_embedding="table",
        num_class_embeds=1000,
    )


_ALL = (
    Architecture(
        "cifar10-32", "google/ddpm-cifar10-32", _ho((128, 256, 256, 256), 1, 32), 32, "fixed_large", 35_746_307
    ),
    Architecture(
        "ddpm-256",
        "google/ddpm-celebahq-256",
        _ho((128, 128, 256, 256, 512, 512), 4, 256),
        256,
        "fixed_small",
        113_673_219,
    ),
    Architecture(
        "guided-64",
        "64x64_diffusion of guided-diffusion",
        _guided(64, 192, (1, 2, 3, 4), (False, True, True, True), 3),
        64,
        "learned_range",
        295_904_454,
    ),
    Architecture(
        "guided-256",
        "256x256_diffusion of guided-diffusion",
        _guided(256, 256, (1, 1, 2, 2, 4, 4), (False, False, False, True, True, True), 2),
        256,
        "learned_range",
        553_838_086,
    ),
    Architecture(
        "lucidrains-128",
        "Unet(dim=64, dim_mults=(1, 2, 4, 8)) of denoising-diffusion-pytorch 2",
        LucidrainsConfig(dim=64, dim_mults=(1, 2, 4, 8), full_attention=(False, False, False, True)),
        128,
        "fixed_small",
        35_711_491,
    ),
    Architecture(
        "demo",
        "the packaged checkpoint",
        unet_config(UNET_DEFAULTS | read_json(DEMO / "unet" / "config.json"), DEMO, Report()),
        32,
        "fixed_small",
        1_113_955,
    ),
)
ARCHITECTURES = {entry.name: entry for entry in _ALL}


def architecture(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"no architecture is called {name!r}; expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
