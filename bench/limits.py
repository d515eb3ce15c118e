"""The limit of this machine: what a step must do, and how fast the machine was measured to do such things."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.timing import seconds_of
from bench.traffic import least_traffic
from bench.walk import META, meta_network
from ddpm.checkpoints import Checkpoint
from ddpm.devices import DTYPES
from ddpm.loop import float32_precision

# Large enough that nothing else counts: side of the matrices; images of the convolution; bytes of the tensor copied.
SIZES = {"cpu": (2048, 4, 2**28), "cuda": (8192, 256, 2**30)}
CONV = (256, 32)  # channels in and out, height and width
WINDOWS = 10
WINDOW_S = 0.1


@dataclass(frozen=True)
class Demand:
    """Of one step of a batch: floating-point operations that the plain network needs, and bytes that must move at
    least (see `bench.traffic`)."""

    flops: int
    bytes: int


def demand(checkpoint: Checkpoint, batch: int, dtype: str) -> Demand:
    """Counted on the meta device, whatever device the network is on."""
    network, size = meta_network(checkpoint.network), checkpoint.sample_size
    arguments = (None if t is None else t.to(META) for t in network.example(1, *size))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*arguments)
    least = least_traffic(meta_network(checkpoint.network), size, batch, dtype)
    return Demand(batch * counter.get_total_flops(), least.total(0))


def limit_ms(demand: Demand, ceiling: dict[str, Any] | None) -> float | None:
    """The larger of all products at the rate of the fastest large ones and the least traffic at that of a large copy.

    Args:
        ceiling: of the step's dtype; None where it was not measured.
    """
    if ceiling is None:
        return None
    tflops = max(ceiling["matmul_tflops"], ceiling["conv_tflops"])
    return max(demand.flops / tflops / 1e9, demand.bytes / ceiling["copy_gb_per_s"] / 1e6)


def measure_ceiling(device: torch.device, dtype: str) -> dict[str, Any]:
    """Rates of a large matrix product, a large convolution and a large copy; on torch's number of threads."""
    side, images, size = SIZES[device.type]
    channels, width = CONV

    def normal(*shape: int) -> Tensor:  # not constants, with which a GPU draws less power and clocks higher
        return torch.randn(shape, device=device).to(DTYPES[dtype])

    with torch.no_grad(), float32_precision(dtype == "tf32"):
        matmul = rate(device, torch.matmul, *normal(2, side, side))
        nhwc = {"memory_format": torch.channels_last}
        x = normal(images, channels, width, width).contiguous(**nhwc)
        weight = normal(channels, channels, 3, 3).contiguous(**nhwc)
        conv = rate(device, partial(F.conv2d, padding=1), x, weight)
        source = torch.ones(size, dtype=torch.uint8, device=device)
        copy = rate(device, torch.Tensor.copy_, torch.empty_like(source), source)
    return {
        "dtype": dtype,
        "matmul_tflops": 2 * side**3 * matmul / 1e12,
        "conv_tflops": 2 * images * width**2 * 9 * channels**2 * conv / 1e12,
        "copy_gb_per_s": 2 * size * copy / 1e9,
    }


def rate(device: torch.device, call: Callable[..., Any], *arguments: Tensor) -> float:
    """Calls per second in the best of WINDOWS windows: whatever else the machine does can only lower it."""
    bound = partial(call, *arguments)
    seconds_of(bound, device)
    calls = max(1, round(WINDOW_S / seconds_of(bound, device)))

    def window() -> None:
        for _ in range(calls):  # queued on a GPU, or the host would be timed
            bound()

    return max(calls / seconds_of(window, device) for _ in range(WINDOWS))
