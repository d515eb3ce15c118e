"""Anyone's own network, any nn.Module called as network(x, t), behind the interface that the sampler asks of one.

It is used as it is, not rebuilt: it keeps its layers, its dtype and its device, and changes of its weights are seen.
What it gains is the step around it: reverse step and noise in one kernel, captured with the network on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from ddpm.fused.explain import LayerPath


@dataclass(frozen=True)
class ModuleConfig:
    """Channels of the image and of the output (twice as many with a learned variance); a line for people."""

    in_channels: int
    out_channels: int
    summary: tuple[str, ...]


class Timesteps:
    """The time table of a network that does with t what it likes: t itself."""

    conditional = False
    embedding_dim = 0
    columns = 1

    def table(self, timesteps: Tensor) -> Tensor:
        """float32 [S, 1] for timesteps [S]."""
        return timesteps[:, None].float()  # exact below 2^24


class ModuleNetwork(nn.Module):
    """A network as the sampler sees it, reference and fused form in one.

    Args:
        network: called as network(x, t) with x [N, C, H, W] in its own dtype, which it may not change in place, and
            t [N], int64, or float32 where `rescaled`. It returns the output as a tensor, or as the attribute `sample`
            of what it returns.
        channels, out_channels: of the image and of the output.
        rescaled: whether the timesteps are rescaled (see `SamplingRules`), and so no integers.
    """

    is_frozen = False
    condition_channels = 0
    conditional = False
    self_condition = False

    def __init__(self, network: nn.Module, channels: int, out_channels: int, *, rescaled: bool = False):
        super().__init__()
        self.network, self.rescaled = network, rescaled
        self.config = ModuleConfig(channels, out_channels, (type(network).__name__,))
        self.time = Timesteps()

    def point_out_training(self) -> None:
        """Warn where the network is in training mode, as it is between two epochs."""
        if self.network.training:
            warnings.warn(
                f"{type(self.network).__name__} is in training mode, so that dropout is active; call its eval() first",
                stacklevel=2,
            )

    @property
    def storage(self) -> tuple[tuple[int, torch.dtype, torch.Size], ...]:
        """Where its weights lie: a captured graph reads them there, and not where they are put afterwards."""
        return tuple((t.data_ptr(), t.dtype, t.shape) for t in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        return chain(self.network.parameters(), self.network.buffers())

    @property
    def dtype(self) -> torch.dtype:
        """Of its first floating-point parameter; float32 without any."""
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Of its first parameter or buffer; the CPU without any."""
        return next((t.device for t in self._tensors()), torch.device("cpu"))

    def activation_elements(self, height: int, width: int) -> int:
        """Not known: only the largest automatic batch bounds the batch."""
        return 1

    def example(self, n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Arguments of `forward`, all zero, for counting."""
        x = torch.zeros(n, self.config.in_channels, height, width, dtype=torch.float32)
        return x, torch.zeros(1, 1, dtype=torch.float32)

    def forward(self, x: Tensor, row: Tensor, classes: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """The network's output [N, out_channels, H, W] for x_t, float32 [N, C, H, W], and t, float32 [1, 1].

        Raises:
            ValueError: the network returned something else than such a tensor.
        """
        t = row[0].expand(len(x))
        out = self.network(x.to(self.dtype), t if self.rescaled else t.long())
        out = getattr(out, "sample", out)
        name, expected = type(self.network).__name__, [len(x), self.config.out_channels, *x.shape[2:]]
        if not isinstance(out, Tensor):
            raise ValueError(f"{name} returned {type(out).__name__}; expected a tensor {expected}; wrap it in a module")
        if list(out.shape) != expected:
            other = "learned_range" if self.config.out_channels == self.config.in_channels else "fixed_small"
            raise ValueError(
                f"{name} returned {list(out.shape)}; expected {expected}, by the variance that it is sampled with; "
                f"pass variance_type={other!r} if it is that one"
            )
        return out

    def allows_winograd(self, *_: object) -> bool:
        """It keeps its layers."""
        return False

    def explain(
        self, device: torch.device, batch: int, height: int, width: int, *, compiled: bool = False
    ) -> list[LayerPath]:
        """One line: nothing is known of its layers."""
        parameters = sum(p.numel() for p in self.network.parameters())
        dtype = str(self.dtype).removeprefix("torch.")
        return [LayerPath(type(self.network).__name__, f"as it is, {parameters:,} parameters, {dtype}")]
