"""One comparison: every variant prepared and judged, then timed by turns."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from bench.contestant import Contestant, Failed, Remote
from bench.gpu_state import GpuState, summarize
from bench.limits import Demand, limit_ms
from bench.ours import Reference
from bench.rows import (
    OUT_OF_TIME,
    STEPS_OF_AN_IMAGE,
    Row,
    add_rates,
    add_speedup,
    baseline,
    empty_row,
    is_timed,
    spread,
)
from bench.setting import Setting
from bench.variant import Make
from bench.variants import variants
from ddpm.run import progress_bar


class Deadline:
    """A moment after which nothing new is begun; never, for None seconds."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self.end is not None and time.monotonic() > self.end

    @property
    def left_s(self) -> float | None:
        """Seconds until then; None for never."""
        return None if self.end is None else max(self.end - time.monotonic(), 0.0)


@dataclass(frozen=True)
class Plan:
    """How comparisons are made.

    Attributes:
        log: file for what the variants print.
        limit_s: a variant that takes longer to get ready is left out.
        deadline: after which nothing new is begun.
        caches: directory of compilers' caches that the variants share; None gives each an empty one.
    """

    log: Path
    limit_s: float | None = None
    deadline: Deadline = field(default_factory=lambda: Deadline(None))
    caches: Path | None = None


T = TypeVar("T")

# NVML's energy counter moves in steps of up to 0.1 s, at both ends of the window.
ENERGY_WINDOW_S = 3.0

# What a variant's images should be, by the noise that it is judged with; or why there is nothing to judge by.
Expected: TypeAlias = dict[str, np.ndarray] | Failed


class Comparison:
    """The variants of one setting. Attributes: rows, by variant.

    Args:
        demand: of a step of the setting; ceilings: of this machine, by dtype.
    """

    def __init__(self, setting: Setting, plan: Plan, gpu: GpuState, demand: Demand, ceilings: Iterable[dict[str, Any]]):
        self.setting, self.plan, self.gpu, self.demand = setting, plan, gpu, demand
        self.ceiling = next((c for c in ceilings if c["dtype"] == setting.dtype), None)
        self.makes = variants(setting)
        self.rows = {name: empty_row(setting, name) for name in self.makes}
        self.ready: dict[str, Contestant | Remote] = {}

    def run(self, expected: Expected, keep: Callable[[Row], None]) -> None:
        """Hand a row for each variant to `keep`, also when Ctrl-C ends it: then those that are out, and those with a
        whole round."""
        try:
            for name, make in self.makes.items():
                self._prepare(name, make, expected)
            self._time()
            self._account()
        finally:
            for row in self.rows.values():
                self._derive(row)
            for row in self.rows.values():
                add_speedup(row, baseline(self.rows.values()))
                if row["status"] is not None:
                    keep(row)
            for contestant in self.ready.values():
                contestant.close()

    def _prepare(self, name: str, make: Make, expected: Expected) -> None:
        """Into `ready`, if it gets ready and draws the right images."""
        row = self.rows[name]
        if self.plan.deadline.passed:
            row["status"] = OUT_OF_TIME
            return
        if isinstance(expected, Failed):  # it would get ready for nothing
            row["status"] = f"skipped: not judged, for the reference failed ({expected})"
            return
        begun = time.monotonic()
        contestant = self.ready[name] = enter(make, self.setting, self.plan)
        try:
            row["load_s"] = contestant.load()
            row |= contestant.warm()
            row["peak_memory_mb"] = contestant.peak_memory_mb()
            row["max_abs_diff"] = difference(contestant, expected)
            contestant.is_ready()
            if row["max_abs_diff"] > row["bound"]:
                self._drop(name, "numerics differ")
        except Failed as error:
            self._drop(name, f"skipped: {error}")
        setting, status = self.setting, row["status"] or f"ready after {time.monotonic() - begun:.0f} s"
        print(f"{setting.source.name}, {setting.dtype}, batch {setting.batch}: {name} {status}", file=sys.stderr)

    def _drop(self, name: str, status: str) -> None:
        self.ready.pop(name).close()
        if "OutOfMemory" in status and self.ready:  # one at a time it might fit
            status += f" (with {', '.join(self.ready)} in memory; --variants {name} runs it alone)"
        self.rows[name]["status"] = status

    def _time(self) -> None:
        """Rounds of one chain each, for the setting's rounds and seconds at least; rows hold the whole rounds."""
        rounds, finished, begun = self.setting.rounds, 0, time.monotonic()
        is_done = False
        try:
            with progress_bar(rounds, bool(self.ready) and sys.stderr.isatty()) as advance:
                while self.ready and not is_done and not (finished and self.plan.deadline.passed):
                    taken = self._round(finished)
                    for name, ms in taken.items():
                        self.rows[name]["samples_ms"].append(ms)
                        self.rows[name]["rounds"] += 1
                    finished += 1
                    advance()
                    is_done = finished >= rounds and time.monotonic() - begun >= self.setting.seconds
        finally:
            for name in self.ready if finished else ():
                row = self.rows[name]
                row["p20"], row["ms_per_step"], row["p80"] = spread(row["samples_ms"])
                row["status"] = "ok" if is_done else f"stopped after round {finished}"

    def _round(self, number: int) -> dict[str, float]:
        """ms/step of a chain of each variant; one that fails is dropped."""
        taken = {}
        for name in turn(list(self.ready), number):
            try:
                taken[name] = 1000 * self.ready[name].chain() / self.setting.steps
            except Failed as error:  # out of memory, say
                self._drop(name, f"skipped: {error}")
        return taken

    def _account(self) -> None:
        """On a GPU the launches, and energy and clocks of chains without a pause; what fails is missing."""
        for name, contestant in list(self.ready.items()):
            if self.plan.deadline.passed:
                return
            try:
                if self.gpu.available:
                    self.rows[name] |= self._energy(contestant)
                self.rows[name]["launches_per_step"] = contestant.launches_per_step()
            except Failed:  # its time is measured already; but it may still be busy, and the next is alone on the GPU
                self.ready.pop(name).close()

    def _energy(self, contestant: Contestant | Remote) -> dict[str, Any]:
        readings: list[dict[str, Any]] = []
        contestant.waiting = lambda: readings.append(self.gpu.read())
        before = self.gpu.energy_j()
        chains, seconds = contestant.chains(ENERGY_WINDOW_S)
        after = self.gpu.energy_j()
        contestant.waiting = lambda: None
        found = summarize(readings or [self.gpu.read()])
        if before is not None and after is not None:
            images = chains * self.setting.batch * self.setting.steps / STEPS_OF_AN_IMAGE
            found |= {"energy_j_per_image": (after - before) / images, "energy_window_s": seconds}
        return found

    def _derive(self, row: Row) -> None:
        add_rates(row)
        if not is_timed(row):
            return
        row["tflops"] = self.demand.flops / row["ms_per_step"] / 1e9
        row["limit_ms"] = limit_ms(self.demand, self.ceiling)
        if row["limit_ms"] is not None:
            row["share_of_limit"] = row["limit_ms"] / row["ms_per_step"]


def turn(names: list[T], number: int) -> list[T]:
    """The order of a round: a different one first every time, forth and back, so that none always follows the same."""
    first = number % max(len(names), 1)
    order = names[first:] + names[:first]
    return order if number % 2 == 0 else order[:1] + order[:0:-1]


def enter(make: Make, setting: Setting, plan: Plan) -> Contestant | Remote:
    """In a process of its own."""
    limits = [limit for limit in (plan.limit_s, plan.deadline.left_s) if limit is not None]
    return Remote(make, setting, plan.log, min(limits, default=None), plan.caches)


def measured_ceiling(setting: Setting, plan: Plan) -> dict[str, Any]:
    """Of the setting's device and dtype, by a process that leaves nothing on the GPU.

    Raises:
        Failed: there is no memory for it, say.
    """
    meter = enter(Reference, setting, plan)
    try:
        return meter.ceiling()
    finally:
        meter.close()


def expected_images(setting: Setting, plan: Plan) -> Expected:
    """What every variant of this batch size should draw."""
    judge = enter(Reference, setting, plan)
    try:
        judge.load()
        return {"generator": judge.images(), "seeds": judge.seeded_images()}
    except Failed as error:
        return error
    finally:
        judge.close()


def difference(contestant: Contestant | Remote, expected: dict[str, np.ndarray]) -> float:
    """max |difference| of x_0, which is of images in [-1, 1].

    Raises:
        Failed: they are NaN, or of another shape: then there is no speed either.
    """
    images, wanted = contestant.images(), expected[contestant.noise()]
    if images.shape != wanted.shape:
        raise Failed(f"its images are {list(images.shape)}, and the reference's {list(wanted.shape)}")
    largest = float(2 * np.abs(images - wanted).max())
    if largest != largest:
        raise Failed("its images are NaN")
    return largest
