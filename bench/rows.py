"""A row of the report; `schemas/run.json` says what each field is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bench.setting import Setting

Row: TypeAlias = dict[str, Any]

SCHEMA = json.loads((Path(__file__).parent / "schemas" / "run.json").read_text())
VERSION: int = SCHEMA["properties"]["schema"]["const"]
FIELDS: dict[str, dict[str, Any]] = SCHEMA["$defs"]["row"]["properties"]

# Largest |difference| of x_0 from the float32 reference's. Beyond fp32 it catches wrong images, not rounding: the plain
# network's own is up to 0.05 in fp16 and 0.16 in bf16.
BOUNDS = {"fp32": 1e-4, "tf32": 4e-2, "fp16": 0.2, "bf16": 0.5}
# "images per second" and the like are by Ho et al.'s chain.
STEPS_OF_AN_IMAGE = 1000
# Variants over whom speedups are: the stock pipeline, or plain PyTorch where that has no speed.
STOCK, PLAIN = "diffusers", "pytorch"
# The status of what was not begun any more.
OUT_OF_TIME = "skipped: out of time"


def empty_row(setting: Setting, variant: str) -> Row:
    """Nothing is measured yet; the status is missing until the row is finished."""
    return dict.fromkeys(FIELDS) | {
        "checkpoint": setting.source.name,
        "variant": variant,
        "dtype": setting.dtype,
        "batch": setting.batch,
        "steps": setting.steps,
        "rounds": 0,
        "samples_ms": [],
        "bound": BOUNDS[setting.dtype],
    }


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, median and p80 of one sample or more."""
    p20, median, p80 = (float(value) for value in np.percentile(samples, (20, 50, 80)))
    return p20, median, p80


def add_rates(row: Row) -> None:
    """What follows from ms/step, where there is one."""
    if not is_timed(row):
        return
    row["steps_per_s"] = 1000 / row["ms_per_step"]
    row["image_steps_per_s"] = row["steps_per_s"] * row["batch"]
    row["images_per_s"] = row["image_steps_per_s"] / STEPS_OF_AN_IMAGE
    row["first_image_s"] = float(time_to(row, 1))


def start_s(row: Row) -> float:
    """Seconds from nothing to a variant that is ready."""
    return row["load_s"] + row["compile_s"] + (row["capture_s"] or 0.0)


def time_to(row: Row, n: Any) -> Any:
    """Seconds from nothing to n images by chains of 1000 steps; n is a number or an array."""
    chains = np.ceil(np.divide(n, row["batch"]))
    return start_s(row) + chains * STEPS_OF_AN_IMAGE * row["ms_per_step"] / 1000


def is_ours(variant: str) -> bool:
    return variant.split("-")[0] == "ours"


def is_timed(row: Row) -> bool:
    return row["ms_per_step"] is not None


def baseline(rows: Iterable[Row]) -> Row | None:
    """Of one comparison; None where none was timed."""
    timed = {row["variant"]: row for row in rows if is_timed(row)}
    return timed.get(STOCK, timed.get(PLAIN))


def add_speedup(row: Row, baseline: Row | None) -> None:
    """Over another row of the same comparison, where both have a speed."""
    if baseline is not None and is_timed(row):
        row["speedup"] = baseline["ms_per_step"] / row["ms_per_step"]
