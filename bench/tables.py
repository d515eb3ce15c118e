"""How rows are shown, on a terminal and on a page alike: which fields make which table, and how a value is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.gpu_state import FIELDS as GPU_STATE
from bench.rows import FIELDS, Row

IDENTITY = ("variant", "dtype", "batch")
# Fields by table; those that no row has a value for are left out, and so is a table without any.
TABLES = {
    "Time of a step": (
        "ms_per_step",
        "p20",
        "p80",
        "steps_per_s",
        "image_steps_per_s",
        "images_per_s",
        "speedup",
        "rounds",
        "status",
    ),
    "The images": ("max_abs_diff", "bound", "steps"),
    "What it costs": (
        "load_s",
        "compile_s",
        "capture_s",
        "first_image_s",
        "peak_memory_mb",
        "launches_per_step",
        "energy_j_per_image",
        "energy_window_s",
    ),
    "How near the limit": ("ms_per_step", "tflops", "limit_ms", "share_of_limit"),
    "State of the GPU": GPU_STATE,
}
FORMATS = {"max_abs_diff": ".1e", "bound": ".0e", "speedup": ".2f", "share_of_limit": ".0%", "peak_memory_mb": ",.0f"}


def fields_of(rows: Sequence[Row], table: str) -> tuple[str, ...]:
    """The fields of this table that some row has a value for; none where only ms/step has one, which others show."""
    shown = tuple(field for field in TABLES[table] if any(row[field] is not None for row in rows))
    return shown if {*shown} - {"ms_per_step"} else ()


def is_number(field: str) -> bool:
    """By its type in the schema."""
    kind = FIELDS[field].get("type")
    return "$ref" in FIELDS[field] or kind in ("integer", "number")


def cell(field: str, value: Any) -> str:
    """A dash for what was not measured."""
    if value is None:
        return "-"
    if field in FORMATS:
        return format(value, FORMATS[field])
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else number(value, 4)


def number(value: float, digits: int = 3) -> str:
    """With at least so many significant digits, and never an exponent: 0.0123, 1.23, 12,346."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{decimals}f}"
