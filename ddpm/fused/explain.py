"""Which path every layer takes, found by walking the network without data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.fused import winograd
from ddpm.fused.convolution import Convolution
from ddpm.kernels import backend

# Called with a layer's name, the layer, and the positional and keyword arguments of its forward.
Visit = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True)
class LayerPath:
    """Which code a layer takes, for `Sampler.explain()`."""

    layer: str
    path: str


@dataclass(frozen=True)
class Skeleton:
    """A fused network without weights, and what one step of it reads; all on the meta device.

    Attributes:
        network: the fused network.
        example: x, timesteps, labels and condition, as a reference network's `example` gives them.
    """

    network: Any
    example: tuple[Tensor, Any, Tensor | None, Tensor | None]

    def walk(self, device: torch.device, visit: Visit) -> None:
        """Call `visit` for every layer that can describe itself, in order of execution, as planned for `device`."""
        x, _, labels, condition = self.example
        time = self.network.time
        row = torch.empty(1, time.columns, device="meta")
        classes = None if labels is None else torch.empty(len(x), time.embedding_dim, device="meta")
        is_planned = backend.uses_triton(device) or backend.is_gpu(device)
        planned = backend.assume(backend.target(device)) if is_planned else contextlib.nullcontext()
        with planned, torch.no_grad(), contextlib.ExitStack() as hooks:
            for name, module in self.network.named_modules():
                if hasattr(module, "describe") and module is not time:
                    hook = module.register_forward_pre_hook(_visitor(name, visit), with_kwargs=True)
                    hooks.callback(hook.remove)
            self.network(x, row, classes, condition)

    def explain(self, device: torch.device, *, compiled: bool = False) -> list[LayerPath]:
        """What every layer says of the input that reaches it.

        Args:
            compiled: the step is compiled.
        """
        paths = [LayerPath("time path", self.network.time.describe())]
        with winograd.allowed(compiled and self.allows_winograd(device)):
            self.walk(device, lambda name, layer, inputs, _: paths.append(LayerPath(name, layer.describe(*inputs))))
        return paths

    def allows_winograd(self, device: torch.device) -> bool:
        """Whether its layers may take Winograd's form in a step compiled for `device`: on the CPU, if memory allows."""
        if device.type != "cpu":
            return False
        sizes: list[int] = []

        def visit(name: str, layer: nn.Module, inputs: tuple[Any, ...], _: dict[str, Any]) -> None:
            if isinstance(layer, Convolution):
                sizes.append(layer.winograd_bytes(*inputs))

        with winograd.allowed():
            self.walk(device, visit)
        return winograd.fits(sum(sizes))


class Planned(nn.Module):
    """A rebuilt network, whose layers take forms by the batch, the size and the device.

    Made from a reference network and a dtype, which it has as `config` and `dtype`.

    Attributes:
        reference: the class of its reference network.
        is_frozen: its weights never change.
    """

    reference: Callable[[Any], Any]
    is_frozen = True
    config: Any
    dtype: torch.dtype

    def skeleton(self, batch: int, height: int, width: int) -> Skeleton:
        """The same network without weights, and inputs for it."""
        with torch.device("meta"):
            reference = type(self).reference(self.config)
            return Skeleton(type(self)(reference, self.dtype), reference.example(batch, height, width))

    def explain(
        self, device: torch.device, batch: int, height: int, width: int, *, compiled: bool = False
    ) -> list[LayerPath]:
        """Which path every layer takes on `device`, in order of execution."""
        return self.skeleton(batch, height, width).explain(device, compiled=compiled)

    def allows_winograd(self, device: torch.device, batch: int, height: int, width: int) -> bool:
        """Whether a step compiled for `device` may have its weights in Winograd's form."""
        return self.skeleton(batch, height, width).allows_winograd(device)


def _visitor(name: str, visit: Visit) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        visit(name, module, inputs, options)

    return hook
