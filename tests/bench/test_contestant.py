"""Contestants in processes of their own: answers, failures, crashes, limits, no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.contestant import Contestant, Failed, Remote
from bench.environment import ROOT
from bench.setting import Setting
from bench.variant import Variant
from tests.helpers import has_ended


class Sleeper(Variant):
    """One whose chain takes a known time, and whose first takes longer."""

    capture_s = 0.02

    def __init__(self, setting: Setting):
        print("made", flush=True)
        self.first = True

    def chain(self) -> None:
        time.sleep(0.32 if self.first else 0.02)
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


class Hanging(Sleeper):
    def images(self) -> torch.Tensor:
        time.sleep(60)
        return torch.zeros(1)


class Absent(Sleeper):
    packages = ("no_such_package",)


class Parent(Sleeper):
    """Starts a process of its own, as compilers do, and says where its cache is."""

    def images(self) -> torch.Tensor:
        print(os.environ["TORCHINDUCTOR_CACHE_DIR"], flush=True)
        return torch.tensor([subprocess.Popen(["sleep", "60"]).pid])


def get_ready(remote: Remote) -> None:
    remote.load()
    remote.warm()


def test_times_of_a_contestant(tiny_setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    contestant = Contestant(Sleeper, tiny_setting)
    assert contestant.load() >= 0
    assert contestant.chain() > 0.3  # the first
    assert contestant.chain() >= 0.02
    assert contestant.launches_per_step() is None
    chains = iter((40.0, 3.0))
    monkeypatch.setattr(contestant, "chain", lambda: next(chains))
    assert contestant.warm() == {"capture_s": 0.02, "compile_s": pytest.approx(40 - 3 - 0.02)}


def test_packages_are_imported_before_loading(
    tiny_setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_package.py").write_text("import time\ntime.sleep(2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Sleeper, "packages", ("slow_package",))
    begun = time.perf_counter()
    assert Contestant(Sleeper, tiny_setting).load() < 1
    assert time.perf_counter() - begun > 2


def test_a_process_answers(tiny_setting: Setting, tmp_path: Path) -> None:
    remote = Remote(Sleeper, replace(tiny_setting, threads=3), tmp_path / "log")
    waits: list[int] = []
    try:
        remote.load()
        assert remote.warm()["capture_s"] == 0.02
        remote.waiting = lambda: waits.append(1)
        count, seconds = remote.chains(0.3)
        assert 0.3 <= seconds < 3
        assert 1 <= count <= seconds / 0.02
        assert waits  # the GPU's clocks are read meanwhile
        assert remote.chain() >= 0.02
        np.testing.assert_array_equal(remote.images(), np.full((1, 3, 2, 2), 3, np.float32))  # its threads
        assert remote.peak_memory_mb() > 100
    finally:
        remote.close()
    assert (tmp_path / "log").read_text() == "made\n"


@pytest.mark.parametrize(
    ("variant", "limit_s", "status"),
    [
        (Broken, None, "RuntimeError: out of memory"),
        (Crashing, None, "its process ended with code -9"),
        (Slow, 15.0, "not ready after 15 s"),
        (Absent, None, "no_such_package is not installed"),
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


def test_each_call_has_a_limit_once_it_is_ready(tiny_setting: Setting, tmp_path: Path) -> None:
    remote = Remote(Hanging, tiny_setting, tmp_path / "log", 60.0)
    try:
        get_ready(remote)
        remote.limit_s = 0.3
        remote.is_ready()
        with pytest.raises(Failed, match=r"^no answer after 0 s$"):
            remote.images()
    finally:
        remote.close()


def test_what_it_has_goes_with_it(tiny_setting: Setting, tmp_path: Path) -> None:
    """Processes that it started; its caches."""
    remote = Remote(Parent, tiny_setting, tmp_path / "log")
    remote.load()
    child = int(remote.images()[0])
    caches = Path((tmp_path / "log").read_text().split()[1])
    os.kill(child, 0)  # it is there
    assert caches.name == "inductor"
    assert caches.parent.exists()
    # Ctrl-C goes to a process group: to the parent's alone.
    assert os.getpgid(remote._process.pid) != os.getpgid(0)
    remote.close()
    assert has_ended(child)
    assert not caches.parent.exists()


def test_a_parent_that_is_killed_leaves_nobody_behind(tiny: Path, tmp_path: Path) -> None:
    """Though its process is busy; and Ctrl-C while that starts is the parent's alone."""
    code = (
        "import os, signal, time\nfrom pathlib import Path\nimport torch\n"
        "from bench.contestant import Remote\nfrom bench.setting import Setting\nfrom bench.source import Source\n"
        "from tests.bench.test_contestant import Hanging\n"
        f"setting = Setting(Source('tiny', {str(tiny)!r}), torch.device('cpu'), 'fp32', 1, (0,), 1)\n"
        f"remote = Remote(Hanging, setting, Path({str(tmp_path / 'log')!r}))\n"
        "os.kill(remote._process.pid, signal.SIGINT)\n"
        "remote.load()\n"
        "print(remote._process.pid, flush=True)\n"
        "remote.images()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    assert has_ended(child)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_launches_are_counted_on_the_gpu(tiny_setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [SimpleNamespace(device_type=kind, name="conv") for kind in (cuda, cpu, cuda, cpu, cuda, cuda)]
    events.append(SimpleNamespace(device_type=cuda, name="ddpm step 0"))  # a range of the host, as the GPU has it

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
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    contestant = Contestant(Sleeper, replace(tiny_setting, device=torch.device("cuda", 0)))
    contestant.load()
    assert contestant.launches_per_step() == 2  # four in a chain of two steps
    assert contestant.peak_memory_mb() == 5
    events.clear()  # a profiler that is not permitted
    assert contestant.launches_per_step() is None


@pytest.mark.gpu
def test_launches_of_a_captured_step(tiny_setting: Setting, tmp_path: Path) -> None:
    from bench.variants import ON_GPU

    counts = {}
    for name in ("ours-eager", "ours-planned"):
        on_gpu = replace(tiny_setting, device=torch.device("cuda", 0), timesteps=tuple(range(49, -1, -1)))
        remote = Remote(ON_GPU[name], on_gpu, tmp_path / "log")
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
