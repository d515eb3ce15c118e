"""How a kernel is timed: `pytest bench/ --benchmark-json out.json`, on the GPU, and its reference on the CPU too.

The interpreter is never timed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cold import ROUNDS, Moment, cold
from ddpm.kernels import backend

WARMUP_ROUNDS = 3


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.benchmark(timer=time.perf_counter)),
        pytest.param("cuda", marks=pytest.mark.benchmark(timer=Moment)),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is not timed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return request.param


@pytest.fixture(params=["kernel", "eager", "compiled"])
def provider(request: pytest.FixtureRequest, device: str) -> str:
    """ "kernel": Triton; "eager": the plain PyTorch reference; "compiled": that under torch.compile."""
    if request.param == "kernel" and not backend.uses_triton(torch.device(device)):
        pytest.skip("the reference runs here in the kernel's place")
    if request.param == "compiled" and device == "cpu" and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    return request.param


@pytest.fixture
def timed(benchmark: Any, device: str, provider: str) -> Callable[..., None]:
    """timed(kernel, reference, bytes): times the provider's function, each call with a cold cache (see bench/cold.py).

    The medians in us per call and GB/s go to the extra columns, bytes being the fewest that a call has to move.
    """

    def run(kernel: Callable[[], Any], reference: Callable[[], Any], moved: int) -> None:
        function = kernel if provider == "kernel" else reference
        if provider == "compiled":
            torch.compiler.reset()
            function = torch.compile(reference, dynamic=False)
        with torch.no_grad():
            call = cold(function, device)
            benchmark.pedantic(call, setup=call.flush, rounds=ROUNDS[device], warmup_rounds=WARMUP_ROUNDS)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update({"us_per_call": seconds * 1e6, "GB/s": moved / seconds / 1e9, "cold": True})

    return run
