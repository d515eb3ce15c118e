"""The page of `python -m bench scale`: a log-log plot and a table for every axis."""

from __future__ import annotations

import json
from typing import Any

from bench.figures import Fit, Reading, power_law
from bench.page import Column, Page, Section, Table
from bench.report import device_line
from bench.scale import COLUMNS, LEFT, cells, sentence

AXES = {"batch": "batch [images]", "size": "height and width [pixels]", "steps": "steps of a chain"}


def page(content: dict[str, Any], name: str) -> Page:
    """Of what scale.json holds; `name` is that of the file."""
    return Page(
        title=f"Cost of sampling {content['checkpoint']}",
        lead=tuple(f"{sentence(axis, law)}." for axis, law in content["laws"].items()),
        sections=tuple(section(axis, content) for axis in AXES if any(p["axis"] == axis for p in content["points"])),
        download=(name, json.dumps(content, indent=2) + "\n"),
    )


def section(axis: str, content: dict[str, Any]) -> Section:
    rows = [row for row in content["points"] if row["axis"] == axis]
    timed = [row for row in rows if row["ms"] is not None]
    name = "ours"
    points = [Reading(name, row["x"], row["ms"], row["p20"], row["p80"]) for row in timed]
    laws = [Fit(name, law["factor"], law["exponent"]) for law in [content["laws"].get(axis)] if law]
    what = "Batch 1" if axis != "batch" else "All images of a batch"
    return Section(
        heading=f"By {axis}",
        text=(f"{what}, {content['dtype']}, {device_line(content['environment'])}.",),
        figures=(power_law(points, laws, AXES[axis], y=f"ms per {rows[0]['per']}"),),
        tables=(
            Table(tuple(Column(title, title not in LEFT) for title in COLUMNS), tuple(map(tuple, map(cells, rows)))),
        ),
    )
