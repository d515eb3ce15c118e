"""`python -m bench readme`: the README's numbers, from the results in bench/results; the launches are counted first.

A block of the README between `<!-- numbers: NAME -->` and `<!-- end -->` is made by the function of that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.architectures import ARCHITECTURES, architecture
from bench.cli import Parser
from bench.environment import ROOT, installed_version
from bench.report import device_line, write_json
from bench.roofline import roofline
from bench.rows import Row, is_timed
from bench.variants import MEANINGS

README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- numbers: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

COUNTED_BATCHES = (1, 16, 256)
# What the table of the CPU calls a variant.
ON_CPU = {
    "ours-compiled": "ours, compiled",
    "ours-eager": "ours, eager",
    "diffusers": "diffusers",
    "diffusers-compiled": "diffusers, compiled and frozen",
    "diffusers-max-autotune": "the same, max-autotune",
    "openvino": "OpenVINO",
}


def main(argv: list[str]) -> int:
    """Exit code 0; with --check 1 where the README has other numbers than the results."""
    assert __doc__ is not None
    parser = Parser(prog="python -m bench readme", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing, count nothing; exit 1 where numbers differ"
    )
    options = parser.parse_args(argv)
    if not options.check:
        write_json(RESULTS / "launches.json", count_launches())
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if options.check:
        if before != after:
            print("README.md does not have the numbers of bench/results; run python -m bench readme")
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


def filled(text: str) -> str:
    """The text with its blocks made anew.

    Raises:
        ValueError: a block whose name is not known.
    """

    def fill(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"README.md has a block of numbers {name!r}; expected one of {', '.join(BLOCKS)}")
        return f"{start}{BLOCKS[name]()}{end}"

    return BLOCK.sub(fill, text)


def count_launches() -> dict[str, Any]:
    """Launches of one step on an H100 in fp16 by architecture and batch, diffusers' operations at batch 1, and the
    versions that they depend on."""
    planned: dict[str, dict[str, int]] = {}
    stock: dict[str, int] = {}
    for name in ARCHITECTURES:
        counts = {batch: roofline(architecture(name), batch) for batch in COUNTED_BATCHES}
        planned[name] = {str(batch): found["planned"]["launches"] for batch, found in counts.items()}
        stock[name] = counts[1]["diffusers"]["ops"]
    return {"planned": planned, "diffusers": stock, "versions": versions()}


def versions() -> dict[str, str | None]:
    """That operations are counted with."""
    return {package: installed_version(package) for package in ("torch", "diffusers")}


def launches() -> str:
    found = read("launches")
    batches = list(map(str, COUNTED_BATCHES))
    head = ["network", *(f"batch {batch}" for batch in batches), "diffusers, batch 1"]
    lines = [
        [name, *(str(counts[batch]) for batch in batches), str(found["diffusers"][name])]
        for name, counts in found["planned"].items()
    ]
    return table(head, lines)


def cpu() -> str:
    """Where it was measured, ms per step of every variant, and what compiling took."""
    content = read("cpu_cifar10-32")
    rows, at = content["rows"], content["environment"]
    names = [name for name in ON_CPU if any(row["variant"] == name for row in rows)]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    found = {(row["batch"], row["variant"]): row for row in rows}
    lines = [[f"batch {n}", *(milliseconds(found[n, name]) for name in names)] for n in batches]
    compiled = [(n, found[n, "ours-compiled"]) for n in batches]
    seconds = ", ".join(f"{row['compile_s']:.0f} s at batch {n}" for n, row in compiled if is_timed(row))
    where = f"Random weights, {rows[0]['dtype']}, {rows[0]['steps']} steps, {device_line(at)}, {str(at['date'])[:10]}:"
    text = table(["ms per step", *(ON_CPU[name] for name in names)], lines)
    after = f"Compiling took {seconds}; it serves every later chain of its batch size in the process."
    return f"{where}\n\n{text}\n{after}\n"


def architectures() -> str:
    names = [[f"`{entry.name}`", entry.origin, f"{entry.parameters:,}"] for entry in ARCHITECTURES.values()]
    return table(["name", "the network of", "parameters"], names)


def variants() -> str:
    return table(["variant", "what it is"], [[f"`{name}`", meaning] for name, meaning in MEANINGS.items()])


def milliseconds(row: Row) -> str:
    return f"{row['ms_per_step']:.0f}" if is_timed(row) else "-"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], lines: list[list[str]]) -> str:
    """In Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


BLOCKS: dict[str, Callable[[], str]] = {
    "architectures": architectures,
    "variants": variants,
    "launches": launches,
    "cpu": cpu,
}
