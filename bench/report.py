"""What a run leaves: tables on the terminal, a JSON file, a page."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.rows import FIELDS, Row
from bench.tables import IDENTITY, TABLES, cell, fields_of, is_number
from ddpm.files import write_whole

PRODUCTS = {"matmul": "matrix products", "conv": "convolutions"}


def print_report(content: dict[str, Any]) -> None:
    """What a run measured, for people."""
    rows = content["rows"]
    if not rows:
        print("no row is finished")
    for name in dict.fromkeys(row["checkpoint"] for row in rows):
        print(f"{name}, chains of {rows[0]['steps']} steps; {device_line(content['environment'])}")
        for table in TABLES:
            print_fields(table, [row for row in rows if row["checkpoint"] == name])
    print()
    for ceiling in content["ceilings"]:
        tflops = [f"{ceiling[f'{name}_tflops']:.3g} TFLOP/s in {what}" for name, what in PRODUCTS.items()]
        rates = [*tflops, f"{ceiling['copy_gb_per_s']:.3g} GB/s in copies"]
        print(f"limit of this machine in {ceiling['dtype']}: {', '.join(rates)}")
    for sentence in content["not_measured"]:
        print(f"not measured: {sentence}")


def device_line(environment: dict[str, Any]) -> str:
    """The hardware that sampled, and torch."""
    where = environment["gpu"] or f"{environment['threads']} threads of {environment['cpu']}"
    return f"{where}, torch {environment['torch']}"


def results_of_tests(tests: dict[str, Any]) -> tuple[str, ...]:
    """What the GPU tests gave, for people."""
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped"))
    problem = [tests["problem"]] if tests["problem"] else []
    failed = (f"failed: {name}" for name in tests["failures"])
    return (counts, *problem, *failed, *(f"not collected: {name}" for name in tests["not_collected"]))


def print_fields(table: str, rows: list[Row]) -> None:
    """A table of `bench.tables`."""
    shown = fields_of(rows, table)
    if not shown:
        return
    names = (*IDENTITY, *shown)
    titles = [FIELDS[name]["title"] for name in names]
    left = [FIELDS[name]["title"] for name in names if not is_number(name)]
    print(f"\n{table}")
    print_cells(titles, left, [[cell(name, row[name]) for name in names] for row in rows])


def print_cells(columns: Sequence[str], left: Sequence[str], rows: list[list[str]]) -> None:
    """With rich where it is installed, someone is looking and the terminal is wide enough, else as aligned text; `left`
    names what is not a number."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        print(plain_table(columns, left, rows))
        return
    table = Table()
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    wide = console.options.update(width=10_000)
    if console.is_terminal and console.measure(table, options=wide).maximum <= console.width:  # or rich would cut cells
        console.print(table)
    else:
        print(plain_table(columns, left, rows))


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


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def finish(
    path: Path, content: dict[str, Any], module: str, *others: Path, parts: str = "rows", interrupted: bool = False
) -> int:
    """Write the JSON file and its page (see `write_page_of`), say where they are, and give the exit code.

    Args:
        others: files that are written already.
        parts: what a run that was interrupted has finished some of.
    """
    written = (write_json(path, content), *others, *write_page_of(path, module, content))
    start = f"interrupted; the finished {parts} are in " if interrupted else ""
    print(f"{start}{', '.join(str(file) for file in written if file.exists())}")
    return 130 if interrupted else 0


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Written whole or not at all: to a temporary name beside it, then renamed."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def write_page_of(path: Path, module: str, content: dict[str, Any]) -> list[Path]:
    """The page beside a JSON file, as `page(content, its name)` of the module makes it; none, and a sentence, where
    what draws it is not installed."""
    try:
        from bench.page import write_page

        return [write_page(path.with_suffix(".html"), importlib.import_module(module).page(content, path.name))]
    except ModuleNotFoundError as error:
        print(f"no page is written: {error.name} is not installed", file=sys.stderr)
        return []
