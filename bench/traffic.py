"""The least traffic of a planned step, from the architecture alone: what its layers must read and write, and no more.

A layer is a convolution, or one of the three parts of an attention. It reads its input, its weights and the residual
once, and writes its result once. What a planned graph may not need is not counted, so that a graph which has it is
found to move more: copies, casts, concatenations, upsampled and pooled tensors, sums in passes of their own,
statistics, partial sums of a split K, a second reading.

Norms are part of a layer beside them. A plan may give them a pass of their own instead, as it should at large batch:
each then writes one more tensor of its layer's size, and the layer reads that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.walk import META
from ddpm import lucidrains, unet
from ddpm.devices import DTYPES

_FLOAT32 = 4  # bytes: the state, the last convolution, the network's output, norms, the time path


@dataclass(frozen=True)
class Least:
    """In bytes. Attributes: layers, with every norm inside one; normalised, all norms' results, each once."""

    layers: int
    normalised: int

    def total(self, separate: int) -> int:
        """Of a plan whose norms in passes of their own write `separate` bytes; those beyond the layers' are waste."""
        return self.layers + 2 * min(separate, self.normalised)


def least_traffic(
    network: unet.UNet | lucidrains.LucidrainsUNet, size: tuple[int, int], batch: int, dtype: str
) -> Least:
    """Of one step of `batch` images.

    Args:
        network: on the meta device; it is left with hooks.
        size: (height, width) of an image.
    """
    sizes = _Sizes(network)
    x, _, labels, condition = network.example(1, *size)
    arguments = [None if t is None else t.to(META).expand(batch, *t.shape[1:]) for t in (x, labels, condition)]
    with torch.no_grad():
        network(arguments[0], torch.zeros(batch, dtype=torch.int64, device=META), *arguments[1:])
    count = _Count(DTYPES[dtype].itemsize)
    if isinstance(network, unet.UNet):
        _unet(network, sizes, count)
    else:
        _lucidrains(network, sizes, count)
    _time_path(network, batch, count)
    count.layers += _FLOAT32 * 3 * batch * x.numel()  # x read by the network, read and written by the reverse step
    out = batch * network.config.out_channels * x.shape[2] * x.shape[3]
    count.layers += _FLOAT32 * 2 * out  # written by the last convolution, read by the reverse step
    return Least(count.layers, count.normalised)


class _Sizes:
    """Elements of what each module of a network read and wrote in its forward."""

    def __init__(self, network: nn.Module):
        self.read: dict[nn.Module, int] = {}
        self.written: dict[nn.Module, int] = {}
        for module in network.modules():
            module.register_forward_hook(self._record)

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self.read[module], self.written[module] = inputs[0].numel(), output.numel()


@dataclass
class _Count:
    """Sums of bytes; `width` of an element of the network's dtype."""

    width: int
    layers: int = 0
    normalised: int = 0

    def activations(self, *elements: int) -> None:
        self.layers += self.width * sum(elements)

    def weights(self, *modules: nn.Module | None, width: int | None = None) -> None:
        count = sum(p.numel() for m in modules if m is not None for p in m.parameters())
        self.layers += (width or self.width) * count

    def norm(self, module: nn.Module | None, elements: int) -> None:
        """A norm and the elements of its result, as its layer reads them."""
        if module is not None:
            self.weights(module, width=_FLOAT32)
            self.normalised += self.width * elements


def _unet(network: unet.UNet, sizes: _Sizes, count: _Count) -> None:
    read, written = sizes.read, sizes.written
    count.activations(written[network.conv_in])
    count.weights(network.conv_in)
    for module in network.modules():
        if isinstance(module, unet.ResnetBlock):
            x, inner, out = read[module], written[module.conv1], written[module.conv2]
            count.activations(x, inner, inner, x, out)  # the second x is the residual, or what the shortcut convolves
            count.weights(module.conv1, module.conv2, module.conv_shortcut)
            # Upsampling repeats pixels, which nobody has to write.
            count.norm(module.norm1, x if module.resample == "up" else read[module.conv1])
            count.norm(module.norm2, inner)
        elif isinstance(module, unet.Attention):
            inner = written[module.to_q]
            _attention(count, x=read[module], inner=inner, out=written[module])
            count.weights(module.to_q, module.to_k, module.to_v, module.to_out)
            count.norm(module.group_norm, read[module])
        elif isinstance(module, (unet.Downsample, unet.Upsample)):
            count.activations(read[module], written[module])
            count.weights(module)
    count.activations(read[network.conv_out])
    count.norm(network.conv_norm_out, read[network.conv_out])
    count.weights(network.conv_out, width=_FLOAT32)


def _lucidrains(network: lucidrains.LucidrainsUNet, sizes: _Sizes, count: _Count) -> None:
    """Norms follow their convolutions here, and a residual is added behind one: a shortcut is a layer of its own."""
    read, written = sizes.read, sizes.written
    count.activations(written[network.init_conv])
    count.weights(network.init_conv)
    for module in network.modules():
        if isinstance(module, lucidrains.ResnetBlock):
            x, inner, out = read[module], written[module.block1], written[module.block2]
            count.activations(x, inner, inner, out, out)  # the last is the residual
            count.weights(module.block1.proj, module.block2.proj)
            count.norm(module.block1.norm, inner)
            count.norm(module.block2.norm, out)
            if isinstance(module.res_conv, nn.Conv2d):
                count.activations(x, out)
                count.weights(module.res_conv)
        elif isinstance(module, (lucidrains.LinearAttention, lucidrains.FullAttention)):
            x = read[module]
            _attention(count, x=x, inner=written[module.to_qkv] // 3, out=x)
            count.norm(module.norm, x)
            last = module.to_out[1] if isinstance(module, lucidrains.LinearAttention) else None
            count.norm(last, x)
            count.weights(module.to_qkv, module.to_out if last is None else module.to_out[0])
            count.activations(0 if module.mem_kv is None else module.mem_kv.numel())
    for *_, end in _levels(network):
        count.activations(read[end], written[end])
        count.weights(end)
    count.activations(read[network.final_conv])
    count.weights(network.final_conv, width=_FLOAT32)


def _levels(network: lucidrains.LucidrainsUNet) -> Iterable[nn.ModuleList]:
    return [*network.downs, *network.ups]


def _attention(count: _Count, *, x: int, inner: int, out: int) -> None:
    """x to q, k, v; these to the attended values; those and the residual to the result."""
    count.activations(x, 3 * inner)
    count.activations(3 * inner, inner)
    count.activations(inner, x, out)


def _time_path(network: unet.UNet | lucidrains.LucidrainsUNet, batch: int, count: _Count) -> None:
    """A row of the table, or one matrix product for all resnets where there are classes; and who reads the result."""
    projections = [m.time_emb_proj for m in network.modules() if isinstance(m, unet.ResnetBlock)]
    projections += [m.mlp[1] for m in network.modules() if isinstance(m, lucidrains.ResnetBlock)]
    width = sum(projection.out_features for projection in projections)
    if network.conditional:
        embedding = projections[0].in_features
        count.weights(*projections, width=_FLOAT32)
        count.layers += _FLOAT32 * (embedding + batch * embedding + 2 * batch * width)
    else:
        count.layers += _FLOAT32 * 3 * width  # read from the table, written, read
