"""Our sampler as the benchmark runs it, in several modes; and the plain PyTorch loop that judges everyone.

Every variant has two methods: `chain` runs one chain, to be timed; `images` draws with the noise of
numerics_generator(), float32 [N, C, H, W] in [0, 1] on the CPU. Making one is loading it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.setting import (
    Setting,
    conditions,
    numerics_generator,
    reference_network,
    state_shape,
    timesteps,
    to_unit,
)
from ddpm.checkpoints import Checkpoint
from ddpm.devices import DTYPES
from ddpm.fused import ModuleNetwork
from ddpm.loop import float32_precision
from ddpm.reference import sample_reference
from ddpm.sampler import Sampler


class Ours:
    """ddpm.Sampler.

    Args:
        compiled: through torch.compile.
        captured: on a GPU, in a CUDA graph.
        plain: with the reference network, none of whose layers is fused or planned: what the captured loop gives alone.
    """

    def __init__(self, setting: Setting, *, compiled: bool, captured: bool = True, plain: bool = False):
        self.setting = setting
        checkpoint = setting.source.load()
        self.conditions = conditions(checkpoint, setting.batch)
        if plain:
            checkpoint, self.conditions = plain_checkpoint(setting, checkpoint), {}
        self.sampler = Sampler(
            checkpoint, device=setting.device, dtype=setting.dtype, compile=compiled, capture=captured
        )
        self.timesteps = timesteps(setting, checkpoint)

    @property
    def capture_s(self) -> float | None:
        """Seconds that the capture took."""
        return next((loop.capture_s for loop in self.sampler.loops if loop.capture_s is not None), None)

    def chain(self) -> None:
        n = self.setting.batch
        self._sample(seeds=range(n), batch_size=n)

    def images(self) -> Tensor:
        return to_unit(self._sample(generator=numerics_generator()))

    def _sample(self, **noise: object) -> Tensor:
        options = {"timesteps": self.timesteps, "sampler": "ddpm", "progress": False, **self.conditions, **noise}
        return self.sampler.sample(self.setting.batch, **options)


class _Plain(nn.Module):
    """The reference network as anyone's module, forward(x, t), its conditions inside."""

    def __init__(self, setting: Setting, checkpoint: Checkpoint):
        super().__init__()
        self.network = checkpoint.network.to(DTYPES[setting.dtype], memory_format=torch.channels_last)
        self.call = reference_network(setting, checkpoint)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.call(x.contiguous(memory_format=torch.channels_last), t)


def plain_checkpoint(setting: Setting, checkpoint: Checkpoint) -> Checkpoint:
    """The same with the reference network as a module of one's own, in the setting's dtype."""
    module = ModuleNetwork(
        _Plain(setting, checkpoint).eval(),
        checkpoint.image_channels,
        checkpoint.network.config.out_channels,
        rescaled=checkpoint.rules.rescale_timesteps,
    )
    return replace(checkpoint, network=module)


class PlainPyTorch:
    """Ho et al. 2020, algorithm 2, with the reference network: what a family's own code does, one operation at a time.

    Args:
        dtype: of the network; None takes the setting's. The state is float32.
    """

    def __init__(self, setting: Setting, dtype: str | None = None):
        self.setting, self.dtype = setting, dtype or setting.dtype
        self.checkpoint = setting.source.load()
        self.checkpoint.network.to(DTYPES[self.dtype])
        self.network = reference_network(setting, self.checkpoint)
        self.timesteps = timesteps(setting, self.checkpoint)

    def chain(self) -> None:
        self._sample(torch.Generator(self.setting.device).manual_seed(0))

    def images(self) -> Tensor:
        return to_unit(self._sample(numerics_generator()))

    def _sample(self, generator: torch.Generator) -> Tensor:
        shape, device, dtype = state_shape(self.setting, self.checkpoint), self.setting.device, DTYPES[self.dtype]

        def draw(_: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=generator.device).to(device)

        def network(x: Tensor, t: Tensor) -> Tensor:
            return self.network(x.to(dtype), t).float()

        with float32_precision(self.dtype == "tf32"):
            rules, schedule = self.checkpoint.rules, self.checkpoint.schedule
            return sample_reference(network, schedule, rules, self.timesteps, draw(-1), draw).cpu()


class Reference(PlainPyTorch):
    """The judge: always in IEEE float32."""

    def __init__(self, setting: Setting):
        super().__init__(setting, "fp32")
