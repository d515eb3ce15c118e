"""What a run leaves: tables on the terminal, a JSON file, a page."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.rows import FIELDS, Row
from ddpm.files import write_whole

# Columns of the tables, by field of a row; those that no row has a value for are left out.
IDENTITY = ("variant", "dtype", "batch")
SPEED = {
    "ms_per_step": ".3f",
    "p20": ".3f",
    "p80": ".3f",
    "steps_per_s": ".1f",
    "image_steps_per_s": ".1f",
    "images_per_s": ".3g",
    "speedup": ".2f",
    "max_abs_diff": ".1e",
    "status": "",
}
COST = {
    "load_s": ".1f",
    "compile_s": ".1f",
    "capture_s": ".2f",
    "first_image_s": ".1f",
    "peak_memory_mb": ".0f",
    "launches_per_step": ".0f",
    "tflops": ".3g",
    "limit_ms": ".3f",
    "share_of_limit": ".1%",
    "energy_j_per_image": ".3g",
    "sm_clock_mhz": ".0f",
    "power_w": ".0f",
    "power_limit_w": ".0f",
    "temperature_c": ".0f",
    "throttling": "",
}
LEFT = ("variant", "dtype", "status", "throttling")


def cell(row: Row, name: str, form: str) -> str:
    """A dash for what was not measured."""
    value = row[name]
    return "-" if value is None else value if isinstance(value, str) else format(value, form)


def print_report(content: dict[str, Any]) -> None:
    """What a run measured, for people."""
    rows = content["rows"]
    if not rows:
        print("no row is finished")
        return
    for name in dict.fromkeys(row["checkpoint"] for row in rows):
        print(f"{name}, chains of {rows[0]['steps']} steps; {device_line(content['environment'])}\n")
        for columns in (SPEED, COST):
            print_fields([row for row in rows if row["checkpoint"] == name], columns)
            print()
    for ceiling in content["ceilings"]:
        rates = (
            f"{ceiling['matmul_tflops']:.3g} TFLOP/s in matrix products, {ceiling['copy_gb_per_s']:.3g} GB/s in copies"
        )
        print(f"limit of this machine in {ceiling['dtype']}: {rates}")
    for sentence in content["not_measured"]:
        print(f"not measured: {sentence}")


def device_line(environment: dict[str, Any]) -> str:
    """The hardware that sampled, and torch."""
    where = environment["gpu"] or f"{environment['threads']} threads of {environment['cpu']}"
    return f"{where}, torch {environment['torch']}"


def print_fields(rows: list[Row], columns: dict[str, str]) -> None:
    """A table of these fields of the rows, by their titles."""
    shown = [name for name in columns if any(row[name] is not None for row in rows)]
    if not shown:
        return
    names = [*IDENTITY, *shown]
    titles = {name: FIELDS[name]["title"] for name in names}
    cells = [[cell(row, name, columns.get(name, "")) for name in names] for row in rows]
    print_cells(list(titles.values()), [titles[name] for name in names if name in LEFT], cells)


def print_cells(columns: Sequence[str], left: Sequence[str], rows: list[list[str]]) -> None:
    """With rich where it is installed and someone is looking, else aligned text; `left` names what is not a number."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(columns, left, rows))
        return
    console = Console()
    if not console.is_terminal:  # rich would wrap cells to 80 columns
        print(plain_table(columns, left, rows))
        return
    table = Table()
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def plain_table(columns: Sequence[str], left: Sequence[str], rows: list[list[str]]) -> str:
    lines = [list(columns), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    aligned = [
        [
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Written whole or not at all: to a temporary name beside it, then renamed."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def write_page_of(path: Path, module: str, content: dict[str, Any]) -> list[Path]:
    """The page beside a JSON file, as `page(content)` of the module makes it; none, and a sentence, where what draws it
    is not installed."""
    try:
        from bench.page import write_page

        return [write_page(path.with_suffix(".html"), importlib.import_module(module).page(content))]
    except ModuleNotFoundError as error:
        print(f"no page is written: {error.name} is not installed", file=sys.stderr)
        return []
