"""A variant that takes part, in a process of its own.

Its memory, its compiler's state and its crash are then its own, its loading can be timed, and one that does not get
ready in time can be stopped. The processes live side by side, so that the variants can take turns.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.events import ran_on_gpu
from bench.limits import measure_ceiling
from bench.setting import Setting
from bench.timing import seconds_of
from bench.variant import Make, Variant, packages_of

POLL_S = 0.05


class Failed(Exception):
    """A contestant is out; the text says why, in one line."""


class Contestant:
    """A variant in this process.

    Args:
        make: makes the variant.
        setting: for which.
    """

    def __init__(self, make: Make, setting: Setting):
        self.make, self.setting = make, setting
        self.variant: Variant | None = None
        self.waiting: Callable[[], Any] = lambda: None  # nobody waits

    def load(self) -> float:
        """Seconds to make the variant; its packages are imported before."""
        for name in packages_of(self.make):
            importlib.import_module(name)

        def make() -> None:
            self.variant = self.make(self.setting)

        return seconds_of(make, self.setting.device)

    def warm(self) -> dict[str, float | None]:
        """Run its first chains: compile_s and capture_s, see schemas/run.json."""
        first = self.chain()
        capture_s = self.variant.capture_s
        compile_s = max(first - self.chain() - (capture_s or 0.0), 0.0)
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()  # the others need memory too
        return {"compile_s": compile_s, "capture_s": capture_s}

    def chain(self) -> float:
        """Seconds of one chain, with the device idle before and after."""
        return seconds_of(self.variant.chain, self.setting.device)

    def chains(self, window_s: float) -> tuple[int, float]:
        """Chains without a pause for so many seconds: how many, and their seconds."""
        begun, count, seconds = time.perf_counter(), 0, 0.0
        while seconds < window_s:
            self.chain()
            count, seconds = count + 1, time.perf_counter() - begun
        return count, seconds

    def ceiling(self) -> dict[str, Any]:
        """What this machine's rates are, see schemas/run.json; of no variant."""
        return measure_ceiling(self.setting.device, self.setting.dtype)

    def noise(self) -> str:
        """That the images are drawn with; see `Variant`."""
        return self.variant.noise

    def images(self) -> np.ndarray:
        """float32 [N, C, H, W] in [0, 1]."""
        return self.variant.images().numpy()

    def seeded_images(self) -> np.ndarray:
        """The same with the noise of seeds; of the reference."""
        return self.variant.seeded_images().numpy()

    def launches_per_step(self) -> float | None:
        """Kernels, copies and fills of a chain on the GPU, per step; None on the CPU, and where profiling is not
        permitted."""
        if self.setting.device.type != "cuda":
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.chain()
        launches = sum(map(ran_on_gpu, profiler.events()))
        return launches / self.setting.steps or None

    def peak_memory_mb(self) -> float:
        """The most memory that this process held so far, in 10^6 bytes: torch's on a GPU, else resident."""
        if self.setting.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.setting.device) / 1e6
        return peak_resident_bytes() / 1e6

    def is_ready(self) -> None:
        """Nothing more has to be done before it is timed."""

    def close(self) -> None:
        """Let it go."""
        self.variant = None


class Remote:
    """The same in a process of its own; each method of Contestant raises Failed where that raises.

    Args:
        make, setting: see Contestant; both can be pickled.
        log: what the process prints is appended to this file.
        limit_s: to get ready, and again for each later call; a process that takes longer is stopped. None: no limit.
        caches: directory of compilers' caches, kept; None gives it one of its own: compilers then begin from nothing.

    Attributes:
        waiting: called again and again while a call runs.
    """

    def __init__(
        self, make: Make, setting: Setting, log: Path, limit_s: float | None = None, caches: Path | None = None
    ):
        self.limit_s = limit_s
        self.waiting: Callable[[], Any] = lambda: None
        self._end: float | None = self._from_now()
        self._busy = False
        self._caches = None if caches else tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA, nor OpenMP's threads
        self._connection, theirs = context.Pipe()
        arguments = (theirs, make, setting, log, str(caches or self._caches.name))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with no_interruption():  # Ctrl-C is the parent's alone, also while the process starts
            self._process.start()
        theirs.close()

    def load(self) -> float:
        return self._call("load")

    def warm(self) -> dict[str, float | None]:
        return self._call("warm")

    def chain(self) -> float:
        return self._call("chain")

    def chains(self, window_s: float) -> tuple[int, float]:
        return self._call("chains", window_s)

    def ceiling(self) -> dict[str, Any]:
        return self._call("ceiling")

    def noise(self) -> str:
        return self._call("noise")

    def images(self) -> np.ndarray:
        return self._call("images")

    def seeded_images(self) -> np.ndarray:
        return self._call("seeded_images")

    def launches_per_step(self) -> float | None:
        return self._call("launches_per_step")

    def peak_memory_mb(self) -> float:
        return self._call("peak_memory_mb")

    def is_ready(self) -> None:
        """From now on each call has the limit for itself."""
        self._end = None

    def close(self) -> None:
        self._connection.close()  # it then ends by itself, unless it is busy
        self._process.join(0 if self._busy else 5)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # compilers that it started, too
        self._process.kill()
        self._process.join()
        if self._caches is not None:
            self._caches.cleanup()

    def _from_now(self) -> float:
        return math.inf if self.limit_s is None else time.monotonic() + self.limit_s

    def _call(self, name: str, *arguments: Any) -> Any:
        end = self._from_now() if self._end is None else self._end
        try:
            self._connection.send((name, arguments))
            self._busy = True
            while not self._connection.poll(POLL_S):
                self.waiting()
                if time.monotonic() > end:
                    raise Failed(f"{'not ready' if self._end is not None else 'no answer'} after {self.limit_s:.0f} s")
            succeeded, result = self._connection.recv()
            self._busy = False
        except (EOFError, ConnectionError):
            self._process.join(10)
            raise Failed(f"its process ended with code {self._process.exitcode}") from None
        if not succeeded:
            raise Failed(result)
        return result


@contextmanager
def no_interruption() -> Iterator[None]:
    """Processes that are started meanwhile never see Ctrl-C."""
    resource_tracker.ensure_running()  # or it would be started with the first process, and let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, make: Make, setting: Setting, log: Path, caches: str) -> None:
    """The process: obey until the connection is closed."""
    os.setsid()  # what this process starts can be ended with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    contestant = Contestant(make, setting)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(contestant, name)(*arguments))
        except Exception as error:  # whatever a variant fails with, the others go on
            traceback.print_exc()
            answer = (False, reason(error))
        connection.send(answer)


def _end_with_parent() -> None:
    """A parent that is killed closes no connection that anyone reads while busy."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def reason(error: Exception) -> str:
    """One line. Packages that are missing are named; other errors come with their type."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.partition('.')[0]} is not installed"
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:200]


def peak_resident_bytes() -> int:
    """Of this process. On Linux getrusage would answer for the process that it was started from, too."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
