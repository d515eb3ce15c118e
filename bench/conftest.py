"""How a kernel is timed: `pytest bench/bench_*.py`. References are timed on the CPU too, the interpreter never."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Calls in one CUDA graph: a kernel of microseconds would otherwise be timed as the launch of one.
CALLS = 50

PROVIDERS = ("kernel", "eager", "compiled")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is not timed")
    return request.param


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, device: str) -> str:
    """ "kernel": Triton; "eager": the plain PyTorch reference; "compiled": that under torch.compile."""
    if request.param == "kernel" and device == "cpu":
        pytest.skip("the CPU runs the reference")
    if request.param == "compiled" and device == "cpu" and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    return request.param


@pytest.fixture
def timed(benchmark: Any, device: str, provider: str) -> Callable[..., None]:
    """timed(kernel, reference, bytes): times the provider's function; us per call and GB/s go to the extra columns.

    On a GPU CALLS calls are captured in a CUDA graph, and its replay is timed up to a synchronisation: no host time,
    inputs warm in L2.
    """

    def run(kernel: Callable[[], Any], reference: Callable[[], Any], moved: int) -> None:
        torch.compiler.reset()
        function = kernel if provider == "kernel" else reference
        if provider == "compiled":
            function = torch.compile(reference, dynamic=False)
        with torch.no_grad():
            calls, once = (CALLS, captured(function)) if device == "cuda" else (1, function)
            for _ in range(3):
                once()
            benchmark(once)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.median / calls
        benchmark.extra_info.update({"us_per_call": seconds * 1e6, "GB/s": moved / seconds / 1e9})

    return run


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """Replays CALLS calls and waits for them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay
