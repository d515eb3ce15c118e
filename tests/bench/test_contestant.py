"""Contestants in processes of their own: answers, failures, crashes, limits, no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.contestant import Contestant, Failed, Remote
from bench.setting import Setting


class Sleeper:
    """A variant whose chain takes a known time, and whose first takes longer."""

    capture_s = 0.02

    def __init__(self, setting: Setting):
        print("made", flush=True)
        self.first = True

    def chain(self) -> None:
        time.sleep(0.12 if self.first else 0.02)
        self.first = False

    def images(self) -> torch.Tensor:
        return torch.full((1, 3, 2, 2), float(torch.get_num_threads()))


class Broken(Sleeper):
    def chain(self) -> None:
        raise RuntimeError("out of memory\nand more")


class Crashing(Sleeper):
    def chain(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Slow(Sleeper):
    def __init__(self, setting: Setting):
        time.sleep(60)


class CacheReader(Sleeper):
    def images(self) -> torch.Tensor:
        print(os.environ["TORCHINDUCTOR_CACHE_DIR"], flush=True)
        return torch.zeros(1)


def get_ready(remote: Remote) -> None:
    remote.load()
    remote.warm()


def test_times_of_a_contestant(tiny_setting: Setting) -> None:
    contestant = Contestant(Sleeper, tiny_setting)
    assert 0 <= contestant.load() < 0.1
    found = contestant.warm()
    assert found["capture_s"] == 0.02
    assert found["compile_s"] == pytest.approx(0.08, abs=0.05)  # first chain, less a later one, less the capture
    assert 0.02 <= contestant.chain() < 0.1
    assert contestant.launches_per_step() is None


def test_a_process_answers(tiny_setting: Setting, tmp_path: Path) -> None:
    remote = Remote(Sleeper, replace(tiny_setting, threads=1), tmp_path / "log")
    waits: list[int] = []
    try:
        remote.load()
        assert remote.warm()["capture_s"] == 0.02
        remote.waiting = lambda: waits.append(1)
        assert 0.02 <= remote.chain() < 1
        np.testing.assert_array_equal(remote.images(), np.ones((1, 3, 2, 2), np.float32))  # its threads
        assert remote.peak_memory_mb() > 100
    finally:
        remote.close()
    assert (tmp_path / "log").read_text() == "made\n"
    assert remote._process.exitcode == 0


@pytest.mark.parametrize(
    ("variant", "limit_s", "status"),
    [
        (Broken, None, "RuntimeError: out of memory"),
        (Crashing, None, "its process ended with code -9"),
        (Slow, 1.0, "not ready after 1 s"),
    ],
)
def test_failures(variant: Any, limit_s: float | None, status: str, tiny_setting: Setting, tmp_path: Path) -> None:
    remote = Remote(variant, tiny_setting, tmp_path / "log", limit_s)
    try:
        with pytest.raises(Failed, match=f"^{status}$"):
            get_ready(remote)
    finally:
        remote.close()
    assert not multiprocessing.active_children()


def test_caches_are_its_own_and_go_with_it(tiny_setting: Setting, tmp_path: Path) -> None:
    remote = Remote(CacheReader, tiny_setting, tmp_path / "log")
    remote.load()
    remote.images()
    remote.close()
    caches = Path((tmp_path / "log").read_text().split()[1])
    assert caches.name == "inductor"
    assert not caches.parent.exists()


def test_ctrl_c_is_the_parents(tiny_setting: Setting, tmp_path: Path) -> None:
    """It reaches the whole process group; a contestant goes on until it is closed."""
    remote = Remote(Sleeper, tiny_setting, tmp_path / "log")
    try:
        remote.load()
        os.kill(remote._process.pid, signal.SIGINT)
        assert remote.chain() >= 0.02
    finally:
        remote.close()


def test_launches_are_counted_on_the_gpu(tiny_setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [SimpleNamespace(device_type=kind) for kind in (cuda, cpu, cuda, cpu, cuda, cuda)]

    class FakeProfile:
        def __init__(self, activities: list[Any]):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self) -> FakeProfile:
            return self

        def __exit__(self, *_: object) -> None: ...

        def events(self) -> list[SimpleNamespace]:
            return events

    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5_000_000)
    contestant = Contestant(Sleeper, replace(tiny_setting, device=torch.device("cuda", 0)))
    contestant.load()
    assert contestant.launches_per_step() == 2  # four in a chain of two steps
    assert contestant.peak_memory_mb() == 5


@pytest.mark.gpu
def test_launches_of_a_captured_step(tiny_setting: Setting, tmp_path: Path) -> None:
    from bench.variants import ON_GPU

    counts = {}
    for name in ("ours-eager", "ours-planned"):
        remote = Remote(ON_GPU[name], replace(tiny_setting, device=torch.device("cuda", 0), steps=50), tmp_path / "log")
        try:
            remote.load()
            captured = remote.warm()["capture_s"]
            assert (captured is None) == (name == "ours-eager")
            counts[name] = remote.launches_per_step()
            assert remote.peak_memory_mb() > 0
        finally:
            remote.close()
    assert counts["ours-eager"] == pytest.approx(counts["ours-planned"], rel=0.05)
    assert counts["ours-planned"] > 10
