"""A row of the report; `schema.json` says what each field is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from bench.setting import Setting

Row: TypeAlias = dict[str, Any]

SCHEMA = json.loads((Path(__file__).parent / "schema.json").read_text())
VERSION: int = SCHEMA["properties"]["schema"]["const"]
FIELDS: dict[str, dict[str, Any]] = SCHEMA["$defs"]["row"]["properties"]

# Largest |difference| from the images in IEEE float32. Beyond fp32 it catches wrong images, not rounding.
BOUNDS = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 0.25, "bf16": 0.25}
# "images per second" and the like are by Ho et al.'s chain.
STEPS_OF_AN_IMAGE = 1000
# Variants over whom speedups are: the stock pipeline, or plain PyTorch where that has no speed.
STOCK, PLAIN = "diffusers", "pytorch"


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


def add_rates(row: Row) -> None:
    """What follows from ms/step, where there is one."""
    if not is_timed(row):
        return
    row["steps_per_s"] = 1000 / row["ms_per_step"]
    row["image_steps_per_s"] = row["steps_per_s"] * row["batch"]
    row["images_per_s"] = row["image_steps_per_s"] / STEPS_OF_AN_IMAGE
    before = [row[name] for name in ("load_s", "compile_s", "capture_s")]
    chain_s = row["ms_per_step"] / 1000 * STEPS_OF_AN_IMAGE
    row["first_image_s"] = sum(seconds for seconds in before if seconds is not None) + chain_s


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
