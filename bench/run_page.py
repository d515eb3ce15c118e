"""The page of a run: what was found in sentences, its figures, its tables, and the machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any

from bench.figures import grouped, number, start_s, step_time, throughput, time_to, time_to_images
from bench.page import Column, Figure, Page, Section, Table
from bench.rows import FIELDS, SCHEMA, STEPS_OF_AN_IMAGE, STOCK, Row, baseline, is_ours, is_timed

# Fields of the tables; those that no row has a value for are left out.
IDENTITY = ("variant", "checkpoint", "dtype", "batch")
SPEED = (
    "ms_per_step",
    "p20",
    "p80",
    "images_per_s",
    "speedup",
    "rounds",
    "status",
)
IMAGES = ("max_abs_diff", "bound", "steps")
COST = (
    "load_s",
    "compile_s",
    "capture_s",
    "first_image_s",
    "peak_memory_mb",
    "launches_per_step",
    "energy_j_per_image",
    "energy_window_s",
)
LIMITS = ("ms_per_step", "tflops", "limit_ms", "share_of_limit")
GPU_STATE = ("sm_clock_mhz", "memory_clock_mhz", "power_w", "power_limit_w", "temperature_c", "throttling")
TEXT = ("variant", "checkpoint", "dtype", "status", "throttling")
FORMATS = {"max_abs_diff": ".1e", "bound": ".0e", "speedup": ".2f", "share_of_limit": ".0%", "peak_memory_mb": ",.0f"}


def page(content: dict[str, Any]) -> Page:
    """The page of what `schema.json` describes."""
    rows = content["rows"]
    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    sections = [
        Section("Time of a step", text=setup(content), figures=(step_time(rows),), tables=tables(rows, SPEED)),
        Section("Throughput", figures=present(throughput(rows))),
        Section("From nothing to images", figures=present(time_to_images(rows)), tables=repayments(rows)),
        Section("The images", tables=tables(rows, IMAGES)),
        Section("What it costs", tables=tables(rows, COST)),
        Section(
            "How near the limit",
            tables=(*(tables(rows, LIMITS) if has_any(rows, LIMITS[1:]) else ()), *ceilings(content["ceilings"])),
        ),
        Section("State of the GPU", tables=tables(rows, GPU_STATE)),
        Section("Tests on the GPU", points=test_results(content.get("tests"))),
        Section("Not measured", points=tuple(content["not_measured"])),
        Section("Machine", tables=(machine(content["environment"]),)),
    ]
    return Page(
        title=f"Benchmark of {', '.join(names)}" if names else "Benchmark",
        lead=headlines(rows),
        sections=tuple(s for s in sections if s.figures or s.tables or s.points),
        download=("bench.json", json.dumps(content, indent=2) + "\n"),
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
    if best["max_abs_diff"] is not None:
        sentence += f"; images differ by at most {scientific(best['max_abs_diff'])}"
    return f"{sentence}."


def called(base: Row) -> str:
    return "the stock diffusers pipeline" if base["variant"] == STOCK else "plain PyTorch"


def fastest(rows: Iterable[Row]) -> Row:
    return min(rows, key=lambda row: row["ms_per_step"])


def many_names(rows: Iterable[Row]) -> bool:
    return len({row["checkpoint"] for row in rows}) > 1


def repayments(rows: Sequence[Row]) -> tuple[Table, ...]:
    """By variant, the image from which on it is ahead of the baseline of each comparison."""
    known = [row for row in rows if start_s(row) is not None]
    groups = {key: group for key, group in grouped(known, "checkpoint", "dtype", "batch").items() if baseline(group)}
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
    where = at["gpu"] or f"{at.get('threads')} threads of {at['cpu']}"
    return (f"Measured on {where} with torch {at['torch']}, {str(at['date'])[:10]}. The variants take turns.",)


def present(figure: Figure | None) -> tuple[Figure, ...]:
    return () if figure is None else (figure,)


def has_any(rows: Iterable[Row], fields: Sequence[str]) -> bool:
    return any(row.get(field) is not None for row in rows for field in fields)


def tables(rows: Sequence[Row], fields: Sequence[str]) -> tuple[Table, ...]:
    """A table of the rows that have one of these fields; none if no row does."""
    rows = [row for row in rows if has_any([row], fields)]
    shown = [field for field in fields if has_any(rows, [field])]
    if not shown:
        return ()
    keys = [key for key in IDENTITY if key != "checkpoint" or many_names(rows)]
    columns = tuple(
        Column(FIELDS[key]["title"], key not in TEXT, FIELDS[key]["description"]) for key in (*keys, *shown)
    )
    return (Table(columns, tuple(tuple(cell(key, row.get(key)) for key in (*keys, *shown)) for row in rows)),)


def ceilings(found: Sequence[dict[str, Any]]) -> tuple[Table, ...]:
    if not found:
        return ()
    about = SCHEMA["$defs"]["ceiling"]
    titles = {"matmul_tflops": "matrix product TFLOP/s", "copy_gb_per_s": "copy GB/s"}
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


def test_results(tests: dict[str, Any] | None) -> tuple[str, ...]:
    if tests is None:
        return ()
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped"))
    problem = [tests["problem"]] if tests["problem"] else []
    failed = (f"failed: {name}" for name in tests["failures"])
    return (counts, *problem, *failed, *(f"not collected: {name}" for name in tests["not_collected"]))


def cell(field: str, value: Any) -> str:
    """A dash for what was not measured."""
    if value is None:
        return "-"
    if field in FORMATS:
        return format(value, FORMATS[field])
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else number(value)


def scientific(value: float) -> str:
    """1.5e-6, without the zero that Python pads the exponent with."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if value else "0"
