"""What takes part in a comparison: our sampler in several modes, and diffusers' pipeline, as it comes and faster."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm.checkpoints import Checkpoint
from ddpm.loop import float32_precision
from ddpm.reference import sample_reference
from ddpm.sampler import DTYPES, Sampler
from ddpm.steps import step_table

NUMERICS_SEED = 1234


@dataclass(frozen=True)
class Setting:
    """Everything that the variants of one comparison share.

    Attributes:
        checkpoint: loaded; name: as reports call it.
        device, dtype: of the network; dtype is a key of ddpm.sampler.DTYPES.
        batch, steps: of a chain.
        rounds: chains that each variant runs while timed.
        peers: whether compiled diffusers and OpenVINO take part.
    """

    checkpoint: Checkpoint
    name: str
    device: torch.device
    dtype: str
    batch: int
    steps: int
    rounds: int
    peers: bool = False

    @property
    def is_half(self) -> bool:
        return DTYPES[self.dtype] != torch.float32


class Ours:
    """ddpm.Sampler; on a GPU every mode of it is captured in a CUDA graph.

    Variants share two methods: `chain` runs one chain, to be timed; `images` draws with the noise of
    numerics_generator(), float32 [batch, C, H, W] in [0, 1] on the CPU.
    """

    def __init__(self, setting: Setting, compiled: bool):
        self.setting = setting
        self.sampler = Sampler(setting.checkpoint, device=setting.device, dtype=setting.dtype, compile=compiled)

    def chain(self) -> None:
        n = self.setting.batch
        self.sampler.sample(n, seeds=range(n), steps=self.setting.steps, batch_size=n, progress=False)

    def images(self) -> Tensor:
        n = self.setting.batch
        x_0 = self.sampler.sample(n, generator=numerics_generator(), steps=self.setting.steps, progress=False)
        return to_unit(x_0)


class Diffusers:
    """DDPMPipeline as it comes, with the precision that the setting names."""

    def __init__(self, setting: Setting, dtype: str | None = None):
        from diffusers import DDPMPipeline
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of loading; `set_progress_bar_config` is for sampling
        self.setting, self.dtype = setting, dtype or setting.dtype
        # low_cpu_mem_usage needs accelerate, and warns without it
        self.pipe = DDPMPipeline.from_pretrained(setting.checkpoint.source, low_cpu_mem_usage=False)
        self.pipe.to(setting.device)
        if self.pipe.unet.dtype != DTYPES[self.dtype]:
            self.pipe.to(DTYPES[self.dtype])
        self.pipe.set_progress_bar_config(disable=True)

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        s = self.setting
        with float32_precision(self.dtype == "tf32"):
            return self.pipe(
                batch_size=s.batch, num_inference_steps=s.steps, generator=generator, output_type="pt"
            ).images

    def chain(self) -> None:
        self._draw(None)  # no generator: it then draws on the network's own device, which is its fastest way

    def images(self) -> Tensor:
        return self._draw(numerics_generator()).float().cpu()


class DiffusersCompiled(Diffusers):
    """The pipeline with its network channels_last and compiled, its weights constants on the CPU."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.pipe.unet.compile(fullgraph=True, dynamic=False)

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        # As an option of torch.compile, freezing comes after the weights have become inputs of the graph.
        with torch._inductor.config.patch(freezing=self.setting.device.type == "cpu"):
            return super()._draw(generator)


class DiffusersOpenVINO(Diffusers):
    """The pipeline with its network run by OpenVINO on the CPU, in float32, on as many threads as torch has."""

    def __init__(self, setting: Setting):
        import openvino
        from diffusers.models.unets.unet_2d import UNet2DOutput

        super().__init__(setting)
        unet, checkpoint = self.pipe.unet, setting.checkpoint
        x = torch.zeros(setting.batch, checkpoint.image_channels, *checkpoint.sample_size)
        with warnings.catch_warnings():
            # Its branches are those of this shape, which is the only one.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            model = openvino.convert_model(unet, example_input=(x, torch.tensor(0)), input=[list(x.shape), []])
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        network = openvino.Core().compile_model(model, "CPU", options)

        def forward(sample: Tensor, timestep: Tensor) -> UNet2DOutput:
            found = network([sample.contiguous().numpy(), timestep.numpy()], share_inputs=True)
            return UNet2DOutput(sample=torch.from_numpy(found[0]))

        unet.forward = forward


def variants(setting: Setting, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Makers by name; a maker raises where its variant cannot run here."""
    ours = "ours-graph" if setting.device.type == "cuda" else "ours-eager"
    ours_compiled = "ours-graph-compiled" if setting.device.type == "cuda" else "ours-compiled"
    makers: dict[str, Callable[[], Any]] = {ours: lambda: Ours(setting, False)}
    if compiled:
        makers[ours_compiled] = lambda: Ours(setting, True)
    makers["diffusers"] = lambda: Diffusers(setting)
    if setting.peers and compiled:
        makers["diffusers-compiled"] = lambda: DiffusersCompiled(setting)
    if setting.peers and setting.device.type == "cpu":
        makers["openvino"] = lambda: DiffusersOpenVINO(setting)
    return makers


def expected_images(setting: Setting) -> tuple[Tensor, str]:
    """The images that every variant should draw, always in IEEE float32, and who drew them."""
    try:
        return Diffusers(setting, "fp32").images(), "diffusers in fp32"
    except Exception:  # its own row says why
        return reference_images(setting), "reference network in fp32"


def reference_images(setting: Setting) -> Tensor:
    """The oracle, with the draws in the pipeline's order: x_T, then one for every step above t = 0."""
    checkpoint, source = setting.checkpoint, numerics_generator()
    shape = (setting.batch, checkpoint.image_channels, *checkpoint.sample_size)

    def draw(_: int) -> Tensor:
        return torch.randn(shape, generator=source).to(setting.device)

    network = deepcopy(checkpoint.network).to(setting.device)
    timesteps = step_table(checkpoint.schedule, checkpoint.rules, setting.steps).timesteps.tolist()
    with float32_precision(False):
        x_0 = sample_reference(network, checkpoint.schedule, checkpoint.rules, timesteps, draw(-1), draw)
    return to_unit(x_0.cpu())


def numerics_generator() -> torch.Generator:
    return torch.Generator().manual_seed(NUMERICS_SEED)


def to_unit(x_0: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], with the pipeline's own arithmetic."""
    return (x_0 / 2 + 0.5).clamp(0, 1)
