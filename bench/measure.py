"""One comparison: every variant prepared and judged, then timed by turns."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.contestant import Contestant, Failed, Remote
from bench.gpu_state import GpuState, summarize
from bench.limits import Demand, limit_ms
from bench.ours import Reference
from bench.rows import STEPS_OF_AN_IMAGE, Row, add_rates, add_speedups, empty_row
from bench.setting import Setting
from bench.variants import Make, baseline, variants
from ddpm.run import progress_bar

# NVML's energy counter moves in steps of up to 0.1 s.
ENERGY_WINDOW_S = 1.0


class Deadline:
    """A moment after which nothing new is begun; never, for None seconds."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self.end is not None and time.monotonic() > self.end


@dataclass(frozen=True)
class Plan:
    """How a comparison is made.

    Attributes:
        log: file for what the variants print.
        limit_s: a variant that takes longer to get ready is left out.
        deadline: after which nothing new is begun.
        only: names of the variants wanted; empty for all.
    """

    log: Path
    limit_s: float | None = None
    deadline: Deadline = field(default_factory=lambda: Deadline(None))
    only: tuple[str, ...] = ()


class Comparison:
    """The variants of one setting. Attributes: rows, by variant.

    Args:
        demand: of a step of the setting; ceilings: of this machine, by dtype.
    """

    def __init__(self, setting: Setting, plan: Plan, gpu: GpuState, demand: Demand, ceilings: Iterable[dict[str, Any]]):
        self.setting, self.plan, self.gpu, self.demand = setting, plan, gpu, demand
        self.ceiling = next((c for c in ceilings if c["dtype"] == setting.dtype), None)
        self.makes = variants(setting, plan.only)
        self.rows = {name: empty_row(setting, name) for name in self.makes}
        self.ready: dict[str, Contestant | Remote] = {}

    def run(self, expected: np.ndarray | Failed, keep: Callable[[Row], None]) -> None:
        """Hand a row for each variant to `keep`, also when Ctrl-C ends it: then for those with a whole round.

        Args:
            expected: the images that every variant should draw, or why there are none.
        """
        try:
            for name, make in self.makes.items():
                self._prepare(name, make, expected)
            self._time()
            self._account()
        finally:
            for contestant in self.ready.values():
                contestant.close()
            for row in self.rows.values():
                self._derive(row)
            add_speedups(self.rows, baseline(self.rows))
            for row in self.rows.values():
                if row["status"] is not None:
                    keep(row)

    def _prepare(self, name: str, make: Make, expected: np.ndarray | Failed) -> None:
        """Into `ready`, if it gets ready and draws the right images."""
        row = self.rows[name]
        if self.plan.deadline.passed:
            row["status"] = "skipped: out of time"
            return
        begun = time.monotonic()
        contestant = enter(make, self.setting, self.plan)
        self.ready[name] = contestant
        try:
            row["load_s"] = contestant.load()
            row |= contestant.warm()
            row["max_abs_diff"] = difference(contestant.images(), expected)
            row["launches_per_step"] = contestant.launches_per_step()
        except Failed as error:
            self._drop(name, f"skipped: {error}")
        if row["max_abs_diff"] is not None and row["max_abs_diff"] > row["bound"]:
            self._drop(name, "numerics differ")
        setting, status = self.setting, row["status"] or f"ready after {time.monotonic() - begun:.0f} s"
        print(f"{setting.source.name}, {setting.dtype}, batch {setting.batch}: {name} {status}", file=sys.stderr)

    def _drop(self, name: str, status: str) -> None:
        self.rows[name]["status"] = status
        self.ready.pop(name).close()

    def _time(self) -> None:
        """Rounds of one chain each, a different variant first every time; rows hold the whole rounds."""
        rounds = self.setting.rounds
        finished = 0
        try:
            with progress_bar(rounds, bool(self.ready) and sys.stderr.isatty()) as advance:
                while self.ready and finished < rounds and not (finished and self.plan.deadline.passed):
                    taken = self._round(finished)
                    for name, ms in taken.items():
                        self.rows[name]["samples_ms"].append(ms)
                    finished += 1
                    advance()
        finally:
            for name in self.ready if finished else ():
                row = self.rows[name]
                p20, median, p80 = (float(p) for p in np.percentile(row["samples_ms"], (20, 50, 80)))
                status = "ok" if finished == rounds else f"stopped after {finished} of {rounds} rounds"
                row |= {"ms_per_step": median, "p20": p20, "p80": p80, "rounds": finished, "status": status}

    def _round(self, number: int) -> dict[str, float]:
        """ms/step of a chain of each variant; one that fails is dropped."""
        names = list(self.ready)
        first = number % len(names)
        taken = {}
        for name in names[first:] + names[:first]:
            try:
                taken[name] = 1000 * self.ready[name].chain() / self.setting.steps
            except Failed as error:  # out of memory, say
                self._drop(name, f"skipped: {error}")
        return taken

    def _account(self) -> None:
        """Peak memory, and on a GPU the energy and the clocks of chains without a pause for ENERGY_WINDOW_S."""
        for name, contestant in self.ready.items():
            with suppress(Failed):  # its time is measured already
                self.rows[name]["peak_memory_mb"] = contestant.peak_memory_mb()
                if self.gpu.available and not self.plan.deadline.passed:
                    self.rows[name] |= self._energy(contestant)

    def _energy(self, contestant: Contestant | Remote) -> dict[str, Any]:
        readings: list[dict[str, Any]] = []
        if isinstance(contestant, Remote):
            contestant.waiting = lambda: readings.append(self.gpu.read())
        before, chains, seconds = self.gpu.energy_j(), 0, 0.0
        while seconds < ENERGY_WINDOW_S:
            seconds += contestant.chain()
            chains += 1
        after = self.gpu.energy_j()
        found = summarize(readings or [self.gpu.read()])
        if before is not None and after is not None:
            images = chains * self.setting.batch * self.setting.steps / STEPS_OF_AN_IMAGE
            found |= {"energy_j_per_image": (after - before) / images, "energy_window_s": seconds}
        return found

    def _derive(self, row: Row) -> None:
        add_rates(row)
        if row["ms_per_step"] is None:
            return
        row["tflops"] = self.demand.flops / row["ms_per_step"] / 1e9
        row["limit_ms"] = limit_ms(self.demand, self.ceiling)
        if row["limit_ms"] is not None:
            row["share_of_limit"] = row["limit_ms"] / row["ms_per_step"]


def enter(make: Make, setting: Setting, plan: Plan) -> Contestant | Remote:
    """In a process of its own."""
    return Remote(make, setting, plan.log, plan.limit_s)


def expected_images(setting: Setting, plan: Plan) -> np.ndarray | Failed:
    """What every variant of this batch size should draw; where there is nothing to judge by, why."""
    judge = enter(Reference, setting, plan)
    try:
        judge.load()
        return judge.images()
    except Failed as error:
        return error
    finally:
        judge.close()


def difference(found: np.ndarray, expected: np.ndarray | Failed) -> float:
    """max |difference|.

    Raises:
        Failed: the images are NaN, or there is nothing to compare with: then there is no speed either.
    """
    if isinstance(expected, Failed):
        raise Failed(f"not judged, for the reference failed ({expected})")
    largest = float(np.abs(found - expected).max())
    if largest != largest:
        raise Failed("its images are NaN")
    return largest
