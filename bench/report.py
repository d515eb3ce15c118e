"""The table on the terminal and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm.files import write_whole

COLUMNS = (
    "checkpoint",
    "dtype",
    "batch",
    "variant",
    "ms/step",
    "p20 .. p80",
    "steps/s",
    "speedup",
    "max diff",
    "status",
)
LEFT = ("checkpoint", "dtype", "variant", "status")


def cells(row: dict[str, Any]) -> list[str]:
    """A row's cells; a dash for what was not measured."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    span = "-" if row["p20"] is None else f"{row['p20']:.3f} .. {row['p80']:.3f}"
    return [
        str(row["checkpoint"]),
        str(row["dtype"]),
        str(row["batch"]),
        row["variant"],
        text(row["ms_per_step"], ".3f"),
        span,
        text(row["steps_per_s"], ".1f"),
        text(row["speedup"], ".2f") + ("x" if row["speedup"] is not None else ""),
        text(row["max_abs_diff"], ".1e"),
        row["status"],
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("no row is finished")
        return
    print_cells(COLUMNS, LEFT, [cells(row) for row in rows])


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
