"""`python -m bench compare OLD NEW`: what changed between two JSON files, beyond what runs of one code differ by.

Two runs differ by what the machine did meanwhile, most of which is common to all variants of a run. So a variant of
ours is compared relative to the rivals that both runs timed beside it, taking turns with it; and it has changed only
where its range of rounds and the old one's, widened by the tolerance, do not meet.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cli import Parser
from bench.report import print_cells
from bench.rows import VERSION, Row

KEY = ("checkpoint", "dtype", "batch", "steps", "variant")
# What must be the same for two runs to be of one machine.
MACHINE = ("gpu", "driver", "cpu", "threads", "torch", "triton", "diffusers", "openvino")
COLUMNS = ("checkpoint", "dtype", "batch", "variant", "old ms", "new ms", "change", "verdict")
LEFT = ("checkpoint", "dtype", "variant", "verdict")
SLOWER, FASTER, SAME = "slower", "faster", "no difference"
BROKEN, MENDED = "broken", "mended"
DRIFTED = "no code of ours: the machine differs"


@dataclass(frozen=True)
class Change:
    """Of one row. Attributes: old, new; ratio, new over old ms/step, the machine's drift taken out; verdict."""

    old: Row
    new: Row
    ratio: float | None
    verdict: str


def main(argv: list[str]) -> int:
    """Exit code: 0; 1 where something is slower beyond the noise, or has no speed any more.

    Raises:
        ValueError: a bad argument, a file that is no such report, or nothing in common.
    """
    assert __doc__ is not None
    parser = Parser(prog="python -m bench compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD", help="JSON file of an earlier run")
    parser.add_argument("new", type=Path, metavar="NEW", help="of a later one")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="a relative change of ms/step that is never called one (0.05)"
    )
    options = parser.parse_args(argv)
    if not 0 <= options.tolerance < 1:
        raise ValueError(f"--tolerance {options.tolerance}: expected a fraction from 0 up to 1, such as 0.05")
    old, new = read(options.old), read(options.new)
    changes = compare(old["rows"], new["rows"], options.tolerance)
    if not changes:
        raise ValueError(f"{options.old} and {options.new} have no row in common; run both with the same arguments")
    for name in MACHINE:
        before, after = old["environment"].get(name), new["environment"].get(name)
        if before != after:
            print(f"warning: {name} was {before} and is {after}; the runs are not of one machine and one software")
    print_cells(COLUMNS, LEFT, [cells(change) for change in changes])
    verdicts = [change.verdict for change in changes]
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)))
    return 1 if {SLOWER, BROKEN} & set(verdicts) else 0


def read(path: Path) -> dict[str, Any]:
    """A report of this version.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); expected what python -m bench writes") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != VERSION or "rows" not in content:
        raise ValueError(f"{path} has schema {found}, expected {VERSION}; run python -m bench again to make one")
    return content


def compare(old: list[Row], new: list[Row], tolerance: float) -> list[Change]:
    """Of the rows that both have, in the new one's order.

    Args:
        tolerance: relative.
    """
    before = {key(row): row for row in old}
    pairs = [(before[key(row)], row) for row in new if key(row) in before]
    return [change(first, second, drift(second, pairs), tolerance) for first, second in pairs]


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def is_ours(row: Row) -> bool:
    return row["variant"].startswith("ours")


def drift(row: Row, pairs: list[tuple[Row, Row]]) -> float:
    """How much slower the machine was the second time: the median ratio of the rivals timed beside this row.

    1 for a rival itself, which is code of others, and where no rival was timed.
    """
    if not is_ours(row):
        return 1.0
    beside = [(a, b) for a, b in pairs if not is_ours(b) and key(b)[:-1] == key(row)[:-1]]
    ratios = [b["ms_per_step"] / a["ms_per_step"] for a, b in beside if a["ms_per_step"] and b["ms_per_step"]]
    return statistics.median(ratios) if ratios else 1.0


def change(old: Row, new: Row, machine: float, tolerance: float) -> Change:
    """The verdict on one row; `machine` is the drift."""
    if old["ms_per_step"] is None or new["ms_per_step"] is None:
        missing = (old["ms_per_step"] is None, new["ms_per_step"] is None)
        verdict = {(True, True): SAME, (False, True): BROKEN, (True, False): MENDED}[missing]
        return Change(old, new, None, verdict)
    ratio = new["ms_per_step"] / old["ms_per_step"] / machine
    verdict = SAME
    if new["p20"] / machine > old["p80"] * (1 + tolerance):
        verdict = SLOWER
    elif new["p80"] / machine < old["p20"] / (1 + tolerance):
        verdict = FASTER
    if not is_ours(new) and verdict != SAME:
        verdict = DRIFTED
    return Change(old, new, ratio, verdict)


def cells(change: Change) -> list[str]:
    def ms(row: Row) -> str:
        return "-" if row["ms_per_step"] is None else f"{row['ms_per_step']:.3f}"

    shift = "-" if change.ratio is None else f"{change.ratio - 1:+.1%}"
    new = change.new
    verdict = change.verdict if change.ratio is not None else f"{change.verdict}: {new['status']}"
    return [new["checkpoint"], new["dtype"], str(new["batch"]), new["variant"], ms(change.old), ms(new), shift, verdict]
