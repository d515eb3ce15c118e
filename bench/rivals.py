"""What people use otherwise: diffusers' pipeline as it comes, compiled, or with its network in OpenVINO.

All take the network and the settings from a pipeline directory, walk the same timesteps, and are judged with the same
noise.
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

from bench.setting import Setting, numerics_generator
from bench.variant import Variant
from ddpm.devices import DTYPES
from ddpm.loop import float32_precision


class Diffusers(Variant):
    """DDPMPipeline as it comes, in the setting's precision.

    Raises:
        ValueError: diffusers has no such network.
    """

    packages = ("diffusers.pipelines.ddpm.pipeline_ddpm", "diffusers.models.unets.unet_2d")

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
        if unet.dtype != DTYPES[setting.dtype]:
            self.pipe.to(DTYPES[setting.dtype])  # on the CPU, or the GPU would hold the weights twice
        self.pipe.to(setting.device)
        self.pipe.set_progress_bar_config(disable=True)
        # Another family spaces a short chain in its own way, which the scheduler's settings cannot say.
        own, chain = self.pipe.scheduler.set_timesteps, list(setting.timesteps)
        self.pipe.scheduler.set_timesteps = lambda *_, device=None, **__: own(timesteps=chain, device=device)
        if unet.class_embedding is not None:  # the pipeline passes no labels: all are of class 0
            identity = unet.config.class_embed_type == "identity"
            width = (unet.time_embedding.linear_2.out_features,) if identity else ()
            dtype = unet.dtype if identity else torch.int64
            labels = torch.zeros(setting.batch, *width, dtype=dtype, device=setting.device)
            unet.forward = partial(unet.forward, class_labels=labels)

    def chain(self) -> None:
        # No generator: it then draws on the network's own device, its fastest way. Ours gives CPU images, too.
        self._draw(None).cpu()

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
    """The pipeline with its network run by OpenVINO on the CPU, in float32, on as many threads as torch has.

    The network is converted and compiled at its first call.
    """

    packages = (*Diffusers.packages, "openvino")

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.plain, self.network = self.pipe.unet.forward, None
        self.pipe.unet.forward = self._forward

    def _forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> Any:
        from diffusers.models.unets.unet_2d import UNet2DOutput

        if self.network is None:
            self.pipe.unet.forward = self.plain
            self.network = compile_openvino(self.pipe.unet, sample, timestep)
            self.pipe.unet.forward = self._forward
        found = self.network([sample.contiguous().numpy(), timestep.numpy()], share_inputs=True)
        return UNet2DOutput(sample=torch.from_numpy(found[0]))


def compile_openvino(unet: torch.nn.Module, sample: Tensor, timestep: Tensor) -> Any:
    """For this shape."""
    import openvino

    with warnings.catch_warnings():
        # Its branches are those of this shape, which is the only one.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        model = openvino.convert_model(unet, example_input=(sample, timestep), input=[list(sample.shape), []])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return openvino.Core().compile_model(model, "CPU", options)
