"""Benchmarks of single operations: what is in the time they report, and that every operation has one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.cold import ROUNDS, ColdCall, ColdReplay, Moment, cache_bytes, cold
from bench.environment import ROOT

pytest_plugins = ["pytester"]

# In a process that pytest-xdist started, pytest-benchmark would time nothing.
XDIST = "PYTEST_XDIST_WORKER"
BENCHMARKS = {path.stem for path in (ROOT / "bench").glob("bench_*.py")}


def run_benchmarks(*options: str, **variables: str) -> None:
    """`pytest *options` in the repository's root; it has to end well."""
    pytest.importorskip("pytest_benchmark")
    left_out = ("TRITON_INTERPRET", XDIST)
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | variables
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_operation_has_a_benchmark():
    operations = [p.stem for p in (ROOT / "kernels").glob("*.py") if re.search(r"^def \w*_ref\(", p.read_text(), re.M)]
    assert {f"bench_{operation}" for operation in operations} == BENCHMARKS


def test_the_interpreter_is_never_timed(tmp_path):
    """`pytest bench/` collects the benchmarks, nothing else, and skips each."""
    run_benchmarks("bench/", "-q", f"--junitxml={tmp_path / 'junit.xml'}", TRITON_INTERPRET="1")
    cases = list(ElementTree.parse(tmp_path / "junit.xml").iter("testcase"))
    assert {case.get("classname") for case in cases} == {f"bench.{name}" for name in BENCHMARKS}
    reasons = [skipped.get("message") for case in cases for skipped in case.iter("skipped")]
    assert reasons == ["the interpreter is not timed"] * len(cases)


def test_the_reference_is_timed_on_the_cpu(tmp_path):
    path, name = tmp_path / "out.json", "bench/bench_philox.py::test_philox_normal[cpu-eager-32-1]"
    run_benchmarks(name, "--benchmark-json", str(path))
    (found,) = json.loads(path.read_text())["benchmarks"]
    assert found["fullname"] == name
    assert found["params"] == {"device": "cpu", "provider": "eager", "size": 32, "n": 1}
    assert (found["options"]["timer"], found["stats"]["rounds"]) == ("perf_counter", ROUNDS["cpu"])
    seconds = found["stats"]["median"]
    rates = {"us_per_call": seconds * 1e6, "GB/s": 4 * 3 * 32 * 32 / seconds / 1e9}
    assert found["extra_info"] == pytest.approx(rates | {"cold": True})


class FakeGpu:
    """A GPU that does what is queued in order, and a host, whose every launch takes `launch_s`, on one clock.

    Attributes:
        host, free: seconds; where the host is, and when the GPU has done all that was queued.
        launched: names of what was queued, in order.
        graph: what is being captured, or None.
        flushed_bytes: size of the buffer that the flush goes through.
    """

    def __init__(self, launch_s: float):
        self.launch_s = launch_s
        self.host = self.free = 0.0
        self.launched: list[str] = []
        self.graph: list[tuple[str, float]] | None = None
        self.flushed_bytes = 0

    def launch(self, *work: tuple[str, float]) -> None:
        """Names and seconds of what one call of the host's queues."""
        if self.graph is not None:
            self.graph.extend(work)
            return
        self.host += self.launch_s
        self.free = max(self.free, self.host) + sum(seconds for _, seconds in work)
        self.launched += [name for name, _ in work]

    def replaces(self, monkeypatch: pytest.MonkeyPatch, l2_bytes: int) -> None:
        """In torch, as a GPU of 3 TB/s with a cache of this size."""
        gpu, zeros = self, torch.zeros

        class Event:
            def __init__(self, enable_timing: bool = False):
                self.name = "reading" if enable_timing else "event"

            def record(self) -> None:
                gpu.launch((self.name, 0.0))
                self.at = gpu.free

            def query(self) -> bool:
                return self.at <= gpu.host

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end: Event) -> float:
                assert end.query(), "torch raises for an event that has not happened yet"
                return 1000 * (end.at - self.at)

        class CUDAGraph:
            def __init__(self) -> None:
                self.work: list[tuple[str, float]] = []

            def replay(self) -> None:
                gpu.launch(*self.work)

        @contextmanager
        def graph(captured: CUDAGraph):
            gpu.graph = captured.work
            yield
            gpu.graph = None

        @contextmanager
        def stream(_: Any):
            yield

        def fake_zeros(size: Any, *, dtype: torch.dtype, device: Any) -> Any:
            if device != "cuda":
                return zeros(size, dtype=dtype, device=device)
            gpu.flushed_bytes = size * dtype.itemsize
            flush = ("flush", 2 * gpu.flushed_bytes / 3e12)
            return SimpleNamespace(nbytes=gpu.flushed_bytes, add_=lambda _: gpu.launch(flush))

        def new_stream() -> Any:
            return SimpleNamespace(wait_stream=lambda _: None)

        fakes = {
            "is_available": lambda: True,
            "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=l2_bytes),
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "Stream": new_stream,
            "current_stream": new_stream,
            "stream": stream,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch, "zeros", fake_zeros)


@pytest.fixture
def benchmark_on(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """benchmark_on(gpu, seconds, l2_bytes): what pytest says of a benchmark in bench/ of a kernel that takes a
    FakeGpu `seconds`; it reports to out.json."""
    pytest.importorskip("pytest_benchmark")

    def run(gpu: FakeGpu, seconds: float, l2_bytes: int) -> pytest.RunResult:
        class Arguments:
            @pytest.fixture
            def kernel(self) -> Callable[[], None]:
                return lambda: gpu.launch(("kernel", seconds))

        gpu.replaces(monkeypatch, l2_bytes)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delenv(XDIST, raising=False)
        pytester.makeconftest("pytest_plugins = ['bench.conftest']")
        pytester.makepyfile(test_op="def test_op(timed, kernel): timed(kernel, None, 3000)")
        options = ("test_op.py::test_op[cuda-kernel]", "--benchmark-json=out.json")
        return pytester.runpytest_inprocess(*options, plugins=[Arguments()])

    return run


@pytest.mark.parametrize("seconds", [2e-6, 20e-3])
@pytest.mark.parametrize("l2_bytes", [50 * 2**20, 2**30])
def test_a_gpu_benchmark_times_one_cold_call_by_the_gpus_clock(benchmark_on, seconds, l2_bytes):
    """Of a kernel that takes the GPU less than its launch takes the host, and of one that takes far more."""
    gpu = FakeGpu(launch_s=10e-6)
    benchmark_on(gpu, seconds, l2_bytes).assert_outcomes(passed=1)
    (found,) = json.loads(Path("out.json").read_text())["benchmarks"]
    assert gpu.flushed_bytes >= 2 * l2_bytes
    rounds = gpu.launched.count("flush")
    assert rounds > ROUNDS["cuda"] == found["stats"]["rounds"]
    assert gpu.launched == ["kernel"] * 3 + ["flush", "event", "reading", "kernel", "reading"] * rounds
    assert [found["stats"][name] for name in ("min", "max")] == pytest.approx([seconds] * 2)
    assert found["options"]["timer"] == "Moment"
    rates = {"us_per_call": seconds * 1e6, "GB/s": 3000 / seconds / 1e9}
    assert found["extra_info"] == pytest.approx(rates | {"cold": True})


def test_a_host_too_slow_to_stay_out_of_the_time_is_an_error(benchmark_on):
    result = benchmark_on(FakeGpu(launch_s=5e-3), 2e-6, 50 * 2**20)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*RuntimeError: a call must be queued before the flush*too slow 51 times*"])
    assert json.loads(Path("out.json").read_text())["benchmarks"] == []


def medians(call: ColdCall, before: list[Callable[[], None]], timer: Callable[[], Any]) -> list[float]:
    """Seconds that `call` takes after each of `before`, by turns."""

    def seconds(prepare: Callable[[], None]) -> float:
        prepare()
        start = timer()
        call()
        return timer() - start

    return [median(turns) for turns in zip(*([seconds(p) for p in before] for _ in range(30)), strict=True)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_cold_copy_is_slower_than_a_warm_one(device):
    size = cache_bytes(device) // 4 if device == "cuda" else 2**20
    source = torch.ones(size, dtype=torch.int8, device=device)
    copy = torch.empty_like(source)
    call = cold(lambda: copy.copy_(source), device)

    def warm() -> None:
        call.function()
        if device == "cuda":
            torch.cuda._sleep(1_000_000)  # as the flush, it keeps the GPU busy until the call is queued

    slow, fast = medians(call, [call.flush, warm], Moment if device == "cuda" else time.perf_counter)
    assert slow > 1.2 * fast


@pytest.mark.gpu
def test_a_time_is_that_of_the_kernel_and_not_of_its_launch():
    call = cold(lambda: torch.cuda._sleep(40_000_000), "cuda")  # in cycles; there is no GPU of 4 GHz
    (seconds,) = medians(call, [call.flush], Moment)
    assert 0.01 < seconds < 1.0


@pytest.mark.gpu
def test_an_empty_call_takes_microseconds_by_the_gpus_clock():
    """As little as a GPU needs for one kernel of one value: nothing of the flush and of the host is in the time."""
    value = torch.zeros(1, device="cuda")
    call = ColdReplay(lambda: value.add_(1))
    (seconds,) = medians(call, [call.flush], Moment)
    assert seconds < 50e-6
    assert call.late < 15  # of 30
