"""The page of `python -m bench profile`: bars and a table, by layer and by kernel."""

from __future__ import annotations

import json
from typing import Any

from bench.figures import bars
from bench.page import Column, Page, Section, Table
from bench.profile import table
from bench.report import device_line


def page(content: dict[str, Any], name: str) -> Page:
    """Of what profile.json holds; `name` is that of the file."""
    where = device_line(content["environment"])
    mode = "compiled" if content["compiled"] else "not compiled"
    lead = f"{content['dtype']}, batch {content['batch']}, {mode}, {where}; the profiler's own cost is in the times."
    found = [section(name[:-1], content[name]) for name in ("layers", "kernels") if content[name]]
    return Page(
        title=f"Where a step of {content['checkpoint']} goes",
        lead=(lead,),
        sections=tuple(found),
        download=(name, json.dumps(content, indent=2) + "\n"),
    )


def section(title: str, rows: list[dict[str, Any]]) -> Section:
    columns, lines = table(title, rows)
    return Section(
        heading=f"By {title}",
        text=(f"{sum(row['ms_per_step'] for row in rows):.3f} ms a step.",),
        figures=(bars([row["name"] for row in rows], [row["ms_per_step"] for row in rows], "ms per step"),),
        tables=(Table(tuple(Column(name, name not in (title, "what")) for name in columns), tuple(map(tuple, lines))),),
    )
