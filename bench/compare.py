"""One comparison: every variant prepared and checked, then timed by turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu_state import FIELDS, GpuState
from bench.variants import Setting, expected_images, variants

Row = dict[str, Any]

# Largest |difference| from the images in IEEE float32. Beyond fp32 it catches wrong images, not rounding.
BOUNDS = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 0.25, "bf16": 0.25}
# NVML's energy counter moves in steps of up to 0.1 s.
ENERGY_WINDOW_S = 1.0


class Deadline:
    """A moment after which nothing new is begun; never, for None seconds."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self.end is not None and time.monotonic() > self.end


def compare(
    setting: Setting, *, compiled: bool, gpu: GpuState, deadline: Deadline, keep: Callable[[Row], None]
) -> None:
    """Hand a row for each variant to `keep`, also when Ctrl-C ends it: then for the variants with a whole round."""
    rows = {name: empty_row(setting, name) for name in variants(setting, compiled)}
    ready: dict[str, Any] = {}
    try:
        prepare(setting, compiled, deadline, rows, ready)
        measure(setting, deadline, rows, ready)
        measure_energy(setting, gpu, deadline, rows, ready)
    finally:
        add_speedups(rows)
        for row in rows.values():
            if row["status"] is not None:
                keep(row)
        # Compiled code of this setting, ours and diffusers', serves no later one: let its memory go.
        torch._dynamo.reset()
        ready.clear()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def empty_row(setting: Setting, variant: str) -> Row:
    measured = ("ms_per_step", "p20", "p80", "max_abs_diff", "status", "steps_per_s", "speedup", "prepare_s")
    return {
        "variant": variant,
        "batch": setting.batch,
        **dict.fromkeys(measured),
        "checkpoint": setting.name,
        "dtype": setting.dtype,
        "steps": setting.steps,
        "rounds": 0,
        "bound": BOUNDS[setting.dtype],
        "compared_with": None,
        **dict.fromkeys((*FIELDS, "energy_j_per_image", "energy_window_s")),
    }


def prepare(setting: Setting, compiled: bool, deadline: Deadline, rows: dict[str, Row], ready: dict[str, Any]) -> None:
    """Fill `ready` with the variants that run and draw the right images."""
    if deadline.passed:
        for row in rows.values():
            row["status"] = "skipped: out of time"
        return
    expected, who = expected_images(setting)
    for name, make in variants(setting, compiled).items():
        row = rows[name]
        if deadline.passed:
            row["status"] = "skipped: out of time"
            continue
        try:
            row["prepare_s"], variant = timed(setting.device, partial(started, make))
            row["max_abs_diff"] = difference(setting, name, variant, expected, who)
        except Exception as error:  # whatever a variant fails with, the others go on
            row["status"] = f"skipped: {reason(error)}"
            continue
        row["compared_with"] = who if row["max_abs_diff"] is not None else None
        if row["max_abs_diff"] is not None and not row["max_abs_diff"] <= row["bound"]:
            row["status"] = "numerics differ"
        else:
            ready[name] = variant


def started(make: Callable[[], Any]) -> Any:
    """A variant that has run one chain: loaded, compiled, captured, warm."""
    variant = make()
    variant.chain()
    return variant


def difference(setting: Setting, name: str, variant: Any, expected: Tensor, who: str) -> float | None:
    """max |difference| of the images, None where there is nothing to compare with."""
    if name == "diffusers":
        if setting.is_half:
            return None  # it also draws its noise in half precision, which gives other images
        if setting.dtype == "fp32" and who.startswith("diffusers"):
            return 0.0  # these are its images
    found = float((variant.images() - expected).abs().max())
    if found != found:
        raise FloatingPointError("its images are NaN")
    return found


def measure(setting: Setting, deadline: Deadline, rows: dict[str, Row], ready: dict[str, Any]) -> None:
    """Rounds of one chain each, a different variant first every time; rows hold the whole rounds.

    A variant that fails on the way leaves `ready`.
    """
    times: dict[str, list[float]] = {name: [] for name in ready}
    finished = 0
    try:
        while ready and finished < setting.rounds and not (finished and deadline.passed):
            taken = one_round(setting, finished, rows, ready)
            for name, seconds in taken.items():
                times[name].append(1000 * seconds / setting.steps)
            finished += 1
    finally:
        for name in ready if finished else ():
            p20, median, p80 = (float(p) for p in np.percentile(times[name], (20, 50, 80)))
            status = "ok" if finished == setting.rounds else f"stopped after {finished} of {setting.rounds} rounds"
            rows[name] |= {"ms_per_step": median, "p20": p20, "p80": p80, "rounds": finished, "status": status}
            rows[name]["steps_per_s"] = 1000 / median


def one_round(setting: Setting, number: int, rows: dict[str, Row], ready: dict[str, Any]) -> dict[str, float]:
    """Seconds of a chain of each variant."""
    names = list(ready)
    first = number % len(names)
    taken = {}
    for name in names[first:] + names[:first]:
        try:
            taken[name] = timed(setting.device, ready[name].chain)[0]
        except Exception as error:  # out of memory, say
            rows[name]["status"] = f"skipped: {reason(error)}"
            del ready[name]
    return taken


def measure_energy(
    setting: Setting, gpu: GpuState, deadline: Deadline, rows: dict[str, Row], ready: dict[str, Any]
) -> None:
    """Chains without a pause for ENERGY_WINDOW_S per variant; the clocks are read at the end of it."""
    for name, variant in ready.items():
        if not gpu.available or deadline.passed:
            return
        before, chains, seconds = gpu.energy_j(), 0, 0.0
        while seconds < ENERGY_WINDOW_S:
            seconds += timed(setting.device, variant.chain)[0]
            chains += 1
        rows[name] |= gpu.read()
        after = gpu.energy_j()
        if before is not None and after is not None:
            rows[name]["energy_j_per_image"] = (after - before) / (chains * setting.batch)
            rows[name]["energy_window_s"] = seconds


def timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of a call, with the device idle before and after, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def add_speedups(rows: dict[str, Row]) -> None:
    """Over diffusers in the same comparison."""
    stock = rows.get("diffusers", {}).get("ms_per_step")
    for row in rows.values():
        if stock is not None and row["ms_per_step"] is not None:
            row["speedup"] = stock / row["ms_per_step"]


def reason(error: Exception) -> str:
    """One line. Packages that are missing are named; other errors come with their type."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed"
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:200]
