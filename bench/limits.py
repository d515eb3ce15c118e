"""The limit of this machine: what a step must do, and how fast the machine was measured to do such things."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.architectures import Architecture
from bench.contestant import synchronize
from bench.traffic import least_traffic
from ddpm.checkpoints import Checkpoint
from ddpm.devices import DTYPES
from ddpm.loop import float32_precision

# Side of the matrices, and bytes of the tensor that is copied: large enough that nothing else counts.
SIZES = {"cpu": (2048, 2**28), "cuda": (8192, 2**30)}
WINDOWS = 5
WINDOW_S = 0.1


@dataclass(frozen=True)
class Demand:
    """Of one step of a batch: floating-point operations that the plain network needs, and bytes that must move at
    least (see `bench.traffic`); None where that is not counted."""

    flops: int
    bytes: int | None


def demand(checkpoint: Checkpoint, batch: int, dtype: str) -> Demand:
    """Counted on the meta device."""
    network, (height, width) = checkpoint.network, checkpoint.sample_size
    entry = Architecture(
        checkpoint.source, checkpoint.source, network.config, height, checkpoint.rules.variance_type, 0
    )
    with torch.device("meta"):
        plain = entry.network()
    arguments = (None if t is None else t.to("meta") for t in plain.example(1, height, width))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(*arguments)
    flops = batch * counter.get_total_flops()
    return Demand(flops, least_traffic(entry, batch, dtype).total(0) if height == width else None)


def limit_ms(demand: Demand, ceiling: dict[str, Any] | None) -> float | None:
    """The larger of all products at the rate of a large one and the least traffic at that of a large copy.

    Args:
        ceiling: of the step's dtype; None where it was not measured.
    """
    if ceiling is None or demand.bytes is None:
        return None
    return max(demand.flops / ceiling["matmul_tflops"] / 1e9, demand.bytes / ceiling["copy_gb_per_s"] / 1e6)


def measure_ceiling(device: torch.device, dtype: str, threads: int | None = None) -> dict[str, Any]:
    """A large matrix product and a large copy, medians of WINDOWS windows of WINDOW_S."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    side, size = SIZES[device.type]
    try:
        with torch.no_grad(), float32_precision(dtype == "tf32"):
            a, b = torch.randn(2, side, side, device=device).to(DTYPES[dtype])
            product = rate(device, lambda: torch.matmul(a, b))
            source = torch.ones(size, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            copy = rate(device, lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    if device.type == "cuda":
        del a, b, source, target
        torch.cuda.empty_cache()
    return {
        "dtype": dtype,
        "matmul_tflops": 2 * side**3 * product / 1e12,
        "copy_gb_per_s": 2 * size * copy / 1e9,
    }


def rate(device: torch.device, call: Any) -> float:
    """Calls per second."""
    call()
    synchronize(device)
    rates = []
    for _ in range(WINDOWS):
        begun, calls, seconds = time.perf_counter(), 0, 0.0
        while seconds < WINDOW_S:
            for _ in range(10 if device.type == "cuda" else 1):  # queued, or the host would be timed
                call()
                calls += 1
            synchronize(device)
            seconds = time.perf_counter() - begun
        rates.append(calls / seconds)
    return float(np.median(rates))
