"""What people use otherwise: diffusers' pipeline as it comes, compiled, or with its network in OpenVINO.

All take the network and the settings from a pipeline directory, walk the same timesteps, and are judged with the same
noise. See `bench.ours` for what a variant is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.setting import Setting, conditions, numerics_generator, timesteps
from ddpm.devices import DTYPES
from ddpm.loop import float32_precision


class Diffusers:
    """DDPMPipeline as it comes, in the setting's precision.

    Raises:
        ValueError: diffusers has no such network.
    """

    def __init__(self, setting: Setting):
        if setting.source.stock is None:
            raise ValueError(setting.source.no_stock)
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of loading; `set_progress_bar_config` is for sampling
        self.setting, stock = setting, setting.source.stock
        # low_cpu_mem_usage needs accelerate, and warns without it
        unet = UNet2DModel.from_pretrained(stock, subfolder="unet", low_cpu_mem_usage=False)
        self.pipe = DDPMPipeline(unet, DDPMScheduler.from_pretrained(stock, subfolder="scheduler"))
        self.pipe.to(setting.device)
        if unet.dtype != DTYPES[setting.dtype]:
            self.pipe.to(DTYPES[setting.dtype])
        self.pipe.set_progress_bar_config(disable=True)
        checkpoint = setting.source.load()
        # Another family spaces a short chain in its own way, which the scheduler's settings cannot say.
        own, chain = self.pipe.scheduler.set_timesteps, timesteps(setting, checkpoint)
        self.pipe.scheduler.set_timesteps = lambda *_, device=None, **__: own(timesteps=chain, device=device)
        labels = conditions(checkpoint, setting.batch).get("labels")
        if labels is not None:  # the pipeline passes none
            unet.forward = partial(unet.forward, class_labels=labels.to(setting.device))

    def chain(self) -> None:
        self._draw(None)  # no generator: it then draws on the network's own device, which is its fastest way

    def images(self) -> Tensor:
        with float32_noise():
            return self._draw(numerics_generator()).float().cpu()

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        s = self.setting
        with float32_precision(s.dtype == "tf32"):
            return self.pipe(
                batch_size=s.batch, num_inference_steps=s.steps, generator=generator, output_type="pt"
            ).images


@contextlib.contextmanager
def float32_noise() -> Iterator[None]:
    """The pipeline draws its noise in float32, whatever its dtype, and rounds it: a half draw is other noise."""
    from diffusers.utils.torch_utils import randn_tensor

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    with contextlib.ExitStack() as stack:
        for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
            stack.enter_context(patch(f"diffusers.{module}.randn_tensor", draw))
        yield


class DiffusersCompiled(Diffusers):
    """The pipeline with its network channels_last and compiled, its weights constants on the CPU.

    Args:
        mode: of torch.compile.
    """

    def __init__(self, setting: Setting, mode: str = "default"):
        super().__init__(setting)
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.pipe.unet.compile(fullgraph=True, dynamic=False, mode=mode)

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        # As an option of torch.compile, freezing comes after the weights have become inputs of the graph.
        with torch._inductor.config.patch(freezing=self.setting.device.type == "cpu"):
            return super()._draw(generator)


class OpenVINO(Diffusers):
    """The pipeline with its network run by OpenVINO on the CPU, in float32, on as many threads as torch has."""

    def __init__(self, setting: Setting):
        import openvino
        from diffusers.models.unets.unet_2d import UNet2DOutput

        super().__init__(setting)
        unet = self.pipe.unet
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        x = torch.zeros(setting.batch, unet.config.in_channels, height, width)
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

        def forward(sample: Tensor, timestep: Tensor, **_: Any) -> UNet2DOutput:
            found = network([sample.contiguous().numpy(), timestep.numpy()], share_inputs=True)
            return UNet2DOutput(sample=torch.from_numpy(found[0]))

        unet.forward = forward
