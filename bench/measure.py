"""One comparison: every variant prepared and judged, then timed by turns."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from bench.contestant import Contestant, Failed, Remote
from bench.gpu_state import GpuState, summarize
from bench.limits import Demand, limit_ms
from bench.ours import Reference
from bench.rows import STEPS_OF_AN_IMAGE, Row, add_rates, add_speedup, baseline, empty_row, is_timed
from bench.setting import Setting
from bench.variants import Make, variants
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
        """Hand a row for each variant to `keep`, also when Ctrl-C ends it: then for those with a whole round."""
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
            row["status"] = "skipped: out of time"
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
            status += f" (beside {len(self.ready)} others; --variants {name} runs it alone)"
        self.rows[name]["status"] = status

    def _time(self) -> None:
        """Rounds of one chain each; rows hold the whole rounds."""
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
        taken = {}
        for name in turn(list(self.ready), number):
            try:
                taken[name] = 1000 * self.ready[name].chain() / self.setting.steps
            except Failed as error:  # out of memory, say
                self._drop(name, f"skipped: {error}")
        return taken

    def _account(self) -> None:
        """On a GPU the launches, and energy and clocks of chains without a pause; what fails is missing."""
        for name, contestant in self.ready.items():
            if self.plan.deadline.passed:
                return
            with suppress(Failed):  # its time is measured already
                if self.gpu.available:
                    self.rows[name] |= self._energy(contestant)
                self.rows[name]["launches_per_step"] = contestant.launches_per_step()

    def _energy(self, contestant: Contestant | Remote) -> dict[str, Any]:
        readings: list[dict[str, Any]] = []
        contestant.waiting = lambda: readings.append(self.gpu.read())
        before = self.gpu.energy_j()
        chains, seconds = contestant.chains()
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


def difference(contestant: Contestant | Remote, expected: Expected) -> float:
    """max |difference| of its images.

    Raises:
        Failed: they are NaN, or there is nothing to compare with: then there is no speed either.
    """
    if isinstance(expected, Failed):
        raise Failed(f"not judged, for the reference failed ({expected})")
    largest = float(np.abs(contestant.images() - expected[contestant.noise()]).max())
    if largest != largest:
        raise Failed("its images are NaN")
    return largest
