"""Our sampler as the benchmark runs it, in several modes; and the plain PyTorch loop that judges everyone.

Ours are judged by the very graph that is timed, so with the noise of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.setting import (
    Setting,
    conditions,
    draw_seeded,
    numerics_generator,
    reference_network,
    state_shape,
    to_unit,
)
from bench.variant import Variant
from ddpm.checkpoints import Checkpoint
from ddpm.devices import DTYPES
from ddpm.fused import ModuleNetwork
from ddpm.kernels.philox import PURPOSE_INITIAL, PURPOSE_STEP, philox_normal_ref
from ddpm.loop import float32_precision
from ddpm.reference import sample_reference
from ddpm.sampler import Sampler


class Ours(Variant):
    """ddpm.Sampler.

    Args:
        compiled: through torch.compile.
        captured: on a GPU, in a CUDA graph.
        plain: with the reference network, none of whose layers is fused or planned: what the captured loop gives alone.
    """

    noise = "seeds"

    def __init__(self, setting: Setting, *, compiled: bool, captured: bool = True, plain: bool = False):
        self.setting = setting
        checkpoint = setting.source.load()
        self.conditions = conditions(checkpoint, setting.batch)
        if plain:
            checkpoint, self.conditions = plain_checkpoint(setting, checkpoint), {}
        self.sampler = Sampler(
            checkpoint, device=setting.device, dtype=setting.dtype, compile=compiled, capture=captured
        )

    @property
    def capture_s(self) -> float | None:
        return next((loop.capture_s for loop in self.sampler.loops if loop.capture_s is not None), None)

    def chain(self) -> None:
        self.images()

    def images(self) -> Tensor:
        s = self.setting
        return to_unit(draw_seeded(self.sampler, s.batch, timesteps=s.timesteps, **self.conditions))


class _Plain(nn.Module):
    """The reference network as anyone's module, forward(x, t), its conditions inside."""

    def __init__(self, setting: Setting, checkpoint: Checkpoint):
        super().__init__()
        self.network = checkpoint.network.to(DTYPES[setting.dtype], memory_format=torch.channels_last)
        self.call = reference_network(setting, checkpoint)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.call(x.contiguous(memory_format=torch.channels_last), t)


def plain_checkpoint(setting: Setting, checkpoint: Checkpoint) -> Checkpoint:
    """The same with the reference network as a module of one's own, in the setting's dtype.

    Raises:
        ValueError: it is self-conditioned, which no module of one's own can be.
    """
    if checkpoint.network.self_condition:
        raise ValueError("a self-conditioned network cannot run as a module forward(x, t); see the planned variants")
    module = ModuleNetwork(
        _Plain(setting, checkpoint).eval(),
        checkpoint.image_channels,
        checkpoint.network.config.out_channels,
        rescaled=checkpoint.rules.rescale_timesteps,
    )
    return replace(checkpoint, network=module)


class PlainPyTorch(Variant):
    """Ho et al. 2020, algorithm 2, with the reference network: what a family's own code does, one operation at a time.

    Args:
        dtype: of the network; None takes the setting's. The state is float32.
    """

    def __init__(self, setting: Setting, dtype: str | None = None):
        self.setting, self.dtype = setting, dtype or setting.dtype
        self.checkpoint = setting.source.load()
        self.checkpoint.network.to(DTYPES[self.dtype])
        self.network = reference_network(setting, self.checkpoint)
        self.shape = state_shape(setting, self.checkpoint)

    def chain(self) -> None:
        self._draw(torch.Generator(self.setting.device).manual_seed(0))

    def images(self) -> Tensor:
        return self._draw(numerics_generator())

    def _draw(self, generator: torch.Generator) -> Tensor:
        def draw(_: int) -> Tensor:
            return torch.randn(self.shape, generator=generator, device=generator.device).to(self.setting.device)

        return self._sample(draw(0), draw)

    def _sample(self, x_T: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        def network(x: Tensor, *rest: Tensor) -> Tensor:
            return self.network(x.to(DTYPES[self.dtype]), *rest).float()

        checkpoint, timesteps = self.checkpoint, self.setting.timesteps
        with float32_precision(self.dtype == "tf32"):
            x_0 = sample_reference(
                network,
                checkpoint.schedule,
                checkpoint.rules,
                timesteps,
                x_T,
                draw,
                self_condition=checkpoint.network.self_condition,
            )
        return to_unit(x_0.cpu())


class Reference(PlainPyTorch):
    """The judge: always in IEEE float32."""

    def __init__(self, setting: Setting):
        super().__init__(setting, "fp32")

    def seeded_images(self) -> Tensor:
        """With the noise of seeds 0 .. N - 1, as the plain form of Philox draws it on the CPU."""
        n, (_, *image) = self.setting.batch, self.shape
        seeds, size = torch.arange(n), math.prod(image)

        def normal(draw: int, purpose: int) -> Tensor:
            z = philox_normal_ref(seeds, size, torch.tensor([draw]), purpose)
            return z.view(self.shape).to(self.setting.device)

        return self._sample(normal(0, PURPOSE_INITIAL), lambda i: normal(i, PURPOSE_STEP))
