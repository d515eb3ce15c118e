"""The page of a run: what was found in sentences, its figures, its tables, and the machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any

import numpy as np

from bench.figures import grouped, step_time, throughput, time_to_images
from bench.page import Column, Figure, Page, Section, Table
from bench.report import device_line, results_of_tests
from bench.rows import FIELDS, SCHEMA, STEPS_OF_AN_IMAGE, STOCK, Row, baseline, is_ours, is_timed, start_s, time_to
from bench.tables import IDENTITY, cell, fields_of, is_number, number
from bench.variants import MEANINGS


def page(content: dict[str, Any], name: str = "bench.json") -> Page:
    """The page of what `schemas/run.json` describes; `name` is that of its file."""
    rows = content["rows"]
    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    sections = [
        Section("Time of a step", setup(content), figures=(step_time(rows),), tables=tables(rows, "Time of a step")),
        Section("The variants", tables=variants(rows)),
        Section("Throughput", figures=present(throughput(rows))),
        Section("From nothing to images", figures=present(time_to_images(rows)), tables=repayments(rows)),
        Section("The images", tables=tables(rows, "The images")),
        Section("What it costs", tables=tables(rows, "What it costs")),
        Section("How near the limit", tables=(*tables(rows, "How near the limit"), *ceilings(content["ceilings"]))),
        Section("State of the GPU", tables=tables(rows, "State of the GPU")),
        Section("Tests on the GPU", points=results_of_tests(content["tests"]) if "tests" in content else ()),
        Section("Not measured", points=tuple(content["not_measured"])),
        Section("Machine", tables=(machine(content["environment"]),)),
    ]
    return Page(
        title=f"Benchmark of {', '.join(names)}" if names else "Benchmark",
        lead=headlines(rows),
        sections=tuple(s for s in sections if s.figures or s.tables or s.points),
        download=(name, json.dumps(content, indent=2) + "\n"),
    )


def headlines(rows: Sequence[Row]) -> tuple[str, ...]:
    """A sentence for each checkpoint, precision and batch size: the fastest of ours against the rivals."""
    groups = grouped(rows, "checkpoint", "dtype", "batch")
    found = [headline(group, many_names(rows)) for group in groups.values()]
    return tuple(sentence for sentence in found if sentence) or ("No row is finished.",)


def headline(group: Sequence[Row], named: bool) -> str | None:
    """Of one comparison; None where none of ours was timed."""
    ours = [row for row in group if is_ours(row["variant"]) and is_timed(row)]
    if not ours:
        return None
    best, base = fastest(ours), baseline(group)
    where = f" on {best['checkpoint']}" if named else ""
    sentence = f"{best['variant']} takes {number(best['ms_per_step'])} ms a step{where} in {best['dtype']} at batch "
    sentence += f"{best['batch']:,}"
    against = []
    if base:
        against.append(f"{base['ms_per_step'] / best['ms_per_step']:.2f} times as fast as {called(base)}")
    rivals = [row for row in group if not is_ours(row["variant"]) and is_timed(row)]
    if rivals and (rival := fastest(rivals)) is not base:
        ratio = rival["ms_per_step"] / best["ms_per_step"]
        against.append(f"{ratio:.2f} times as fast as {rival['variant']}, the fastest of the others")
    if against:
        sentence += f", {' and '.join(against)}"
    different = np.format_float_scientific(best["max_abs_diff"], precision=1, trim="-", exp_digits=1)
    return f"{sentence}; x_0 is within {different} of the reference's."


def called(base: Row) -> str:
    return "the stock diffusers pipeline" if base["variant"] == STOCK else "plain PyTorch"


def fastest(rows: Iterable[Row]) -> Row:
    return min(rows, key=lambda row: row["ms_per_step"])


def many_names(rows: Iterable[Row]) -> bool:
    return len({row["checkpoint"] for row in rows}) > 1


def repayments(rows: Sequence[Row]) -> tuple[Table, ...]:
    """By variant, the image from which on it is ahead of the baseline of each comparison."""
    timed = [row for row in rows if is_timed(row)]
    groups = {key: group for key, group in grouped(timed, "checkpoint", "dtype", "batch").items() if baseline(group)}
    variants = dict.fromkeys(row["variant"] for group in groups.values() for row in group)
    cells = {name: [repaid(group, name) for group in groups.values()] for name in variants}
    columns = [
        Column(f"{f'{name}, ' if many_names(rows) else ''}{dtype}, batch {batch:,}", True)
        for name, dtype, batch in groups
    ]
    caption = (
        "The image from which on a variant is ahead of the baseline of the speedups, when both start from nothing."
    )
    table = Table((Column("variant"), *columns), tuple((name, *found) for name, found in cells.items()), caption)
    return (table,) if groups else ()


def repaid(group: Sequence[Row], variant: str) -> str:
    """A cell of `repayments`."""
    base, row = baseline(group), next((row for row in group if row["variant"] == variant), None)
    if row is None:
        return "-"
    if row is base:
        return "baseline"
    first = overtakes(row, base)
    return "never" if first is None else f"{first:,}"


def overtakes(row: Row, other: Row) -> int | None:
    """The least n from which on `row` has n images before `other`, of the same batch size; None if there is none."""
    gain = (other["ms_per_step"] - row["ms_per_step"]) * STEPS_OF_AN_IMAGE / 1000  # seconds per chain
    if gain <= 0:
        return None
    chains = max(1, ceil((start_s(row) - start_s(other)) / gain))
    if time_to(row, chains * row["batch"]) >= time_to(other, chains * row["batch"]):  # a draw
        chains += 1
    return (chains - 1) * row["batch"] + 1


def setup(content: dict[str, Any]) -> tuple[str, ...]:
    """Where it was measured."""
    at = content["environment"]
    return (f"Measured on {device_line(at)}, {str(at['date'])[:10]}. The variants take turns.",)


def variants(rows: Iterable[Row]) -> tuple[Table, ...]:
    """What each is."""
    found = tuple((name, MEANINGS[name]) for name in dict.fromkeys(row["variant"] for row in rows))
    return (Table((Column("variant"), Column("what it is")), found),) if found else ()


def present(figure: Figure | None) -> tuple[Figure, ...]:
    return () if figure is None else (figure,)


def tables(rows: Sequence[Row], name: str) -> tuple[Table, ...]:
    """The table of this name of `bench.tables`, of the rows that have a value there; none if no row does."""
    shown = fields_of(rows, name)
    if not shown:
        return ()
    keys = (*(("checkpoint",) if many_names(rows) else ()), *IDENTITY, *shown)
    columns = tuple(Column(FIELDS[key]["title"], is_number(key), FIELDS[key]["description"]) for key in keys)
    kept = [row for row in rows if any(row[field] is not None for field in shown)]
    return (Table(columns, tuple(tuple(cell(key, row[key]) for key in keys) for row in kept)),)


def ceilings(found: Sequence[dict[str, Any]]) -> tuple[Table, ...]:
    if not found:
        return ()
    about = SCHEMA["$defs"]["ceiling"]
    titles = {
        "matmul_tflops": "matrix product TFLOP/s",
        "conv_tflops": "convolution TFLOP/s",
        "copy_gb_per_s": "copy GB/s",
    }
    columns = [Column(t, True, about["properties"][key]["description"]) for key, t in titles.items()]
    cells = tuple((rates["dtype"], *(number(rates[key]) for key in titles)) for rates in found)
    dtype = Column(FIELDS["dtype"]["title"], False, FIELDS["dtype"]["description"])
    return (Table((dtype, *columns), cells, about["description"]),)


def machine(environment: dict[str, Any]) -> Table:
    known = tuple((key.replace("_", " "), text) for key, value in environment.items() if (text := plain(value)))
    return Table((Column("what"), Column("found")), known)


def plain(value: Any) -> str:
    """Empty where nothing is known."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {text}" for key, v in value.items() if (text := plain(v)))
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return str(value)
