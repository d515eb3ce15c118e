"""A call as the benchmark of a kernel times it: nothing of its data is in the cache, and the device keeps the time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Timed calls of one benchmark.
ROUNDS = {"cuda": 100, "cpu": 10}
# Of what is written to empty the cache, at least: on a GPU it takes longer than the host takes to queue what is timed.
FLUSH_BYTES = {"cuda": 2**30, "cpu": 2**28}


class Moment:
    """A timer's reading on a GPU: when the current stream got there. Two differ by seconds of the GPU's time."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


class ColdCall:
    """Calls `function`; `flush`, before each call, leaves the cache of `device` ("cpu" or "cuda") without its data."""

    def __init__(self, function: Callable[[], Any], device: str):
        self.function = function
        size = max(FLUSH_BYTES[device], 2 * cache_bytes(device))
        self.buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def flush(self) -> None:
        # Read as well as written, since stores alone may go around a cache. It leaves a cache that is to be written
        # back, as a call does, so that a call is not timed without the writing of what it wrote.
        self.buffer.add_(1)

    def __call__(self) -> None:
        self.function()


class ColdReplay(ColdCall):
    """A ColdCall on a GPU: one replay of a CUDA graph of one call, queued while the GPU is still busy with the flush.

    The host waits for nothing in between, so that the time from before the call to after it has none of the host's.

    Raises (when called):
        RuntimeError: in most rounds the GPU had to wait for the host, whose time would be in the median.
    """

    def __init__(self, function: Callable[[], Any]):
        super().__init__(captured(function).replay, "cuda")
        self.flushed = torch.cuda.Event()
        self.late = 0

    def flush(self) -> None:
        super().flush()
        self.flushed.record()

    def __call__(self) -> None:
        super().__call__()
        self.late += self.flushed.query()
        if 2 * self.late > ROUNDS["cuda"]:
            raise RuntimeError(
                f"a call must be queued before the flush of {self.buffer.nbytes >> 20} MiB is over, and the host was "
                f"too slow {self.late} times; leave it idle, or raise FLUSH_BYTES in bench/cold.py"
            )


def cold(function: Callable[[], Any], device: str) -> ColdCall:
    return ColdReplay(function) if device == "cuda" else ColdCall(function, device)


def cache_bytes(device: str) -> int:
    """Size of the last-level cache: all of them, where each group of cores has its own; 0 where nobody says."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3/size")
    sizes = {file.with_name("shared_cpu_list").read_text(): file.read_text() for file in files}
    return sum(1024 * int(size.strip().removesuffix("K")) for size in sizes.values())


def captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of one call, made after a few on a stream aside."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph
