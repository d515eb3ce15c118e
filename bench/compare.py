"""`python -m bench compare OLD NEW`: what changed between two JSON files, beyond what runs of one code differ by.

A variant of ours has changed where its range of rounds (p20 to p80) and the old one's, widened by the tolerance, do
not meet. On a CPU two runs differ most by what the machine did meanwhile, which is common to all variants of a run:
there the ranges must not meet either once the drift of the rivals, timed by turns with it, is taken out. On a GPU there
is no such correction: a captured step waits for the GPU, a rival's for the host.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cli import Parser
from bench.report import print_cells
from bench.rows import VERSION, Row, is_ours, is_timed

KEY = ("checkpoint", "dtype", "batch", "steps", "variant")
# What must be the same for two runs to be of one machine.
MACHINE = ("gpu", "driver", "cpu", "threads", "torch", "triton", "diffusers", "openvino")
COLUMNS = ("checkpoint", "dtype", "batch", "variant", "old ms", "new ms", "change", "beside rivals", "verdict")
LEFT = ("checkpoint", "dtype", "variant", "verdict")
SLOWER, FASTER, SAME = "slower", "faster", "no difference"
BROKEN, MENDED = "broken", "mended"
FEW, UNTIMED, NO_CODE = "too few rounds", "not timed", "a rival"
LEAST_ROUNDS = 3
# A reason without a speed that says nothing of the code.
OUT_OF_TIME = "skipped: out of time"


@dataclass(frozen=True)
class Change:
    """Of one row. Attributes: old, new; drift, how much slower the machine was the second time; verdict."""

    old: Row
    new: Row
    drift: float
    verdict: str

    @property
    def ratio(self) -> float | None:
        """New over old ms/step, where both have one."""
        if not (is_timed(self.old) and is_timed(self.new)):
            return None
        return self.new["ms_per_step"] / self.old["ms_per_step"]


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
    differing = [name for name in MACHINE if old["environment"].get(name) != new["environment"].get(name)]
    correct = not differing and new["environment"].get("gpu") is None
    changes = compare(old["rows"], new["rows"], options.tolerance, correct=correct)
    if not changes:
        raise ValueError(f"{options.old} and {options.new} have no row in common; run both with the same arguments")
    for name in differing:
        before, after = old["environment"].get(name), new["environment"].get(name)
        print(f"warning: {name} was {before} and is {after}; the runs are not of one machine and one software")
    print_cells(COLUMNS, LEFT, [cells(change) for change in changes])
    for path, rows, others in ((options.old, old, new), (options.new, new, old)):
        known = {key(row) for row in others["rows"]}
        for row in rows["rows"]:
            if key(row) not in known:
                print(f"only in {path}: {', '.join(map(str, key(row)))}")
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
    if found != VERSION or not {"rows", "environment"} <= content.keys():
        raise ValueError(f"{path} has schema {found}, expected {VERSION}; run python -m bench again to make one")
    return content


def compare(old: list[Row], new: list[Row], tolerance: float, *, correct: bool) -> list[Change]:
    """Of the rows that both have, in the new one's order.

    Args:
        tolerance: relative.
        correct: for the machine's drift.
    """
    before = {key(row): row for row in old}
    pairs = [(before[key(row)], row) for row in new if key(row) in before]
    return [judge(first, second, drift(second, pairs) if correct else 1.0, tolerance) for first, second in pairs]


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def drift(row: Row, pairs: list[tuple[Row, Row]]) -> float:
    """How much slower the machine was the second time: the median ratio of the rivals timed beside this row.

    1 for a rival itself, and where no rival was timed.
    """
    if not is_ours(row["variant"]):
        return 1.0
    beside = [(a, b) for a, b in pairs if not is_ours(b["variant"]) and key(b)[:-1] == key(row)[:-1]]
    ratios = [b["ms_per_step"] / a["ms_per_step"] for a, b in beside if is_timed(a) and is_timed(b)]
    return statistics.median(ratios) if ratios else 1.0


def judge(old: Row, new: Row, machine: float, tolerance: float) -> Change:
    """The verdict on one row; `machine` is its drift. Rivals are no code of ours, and get none."""
    timed = is_timed(old), is_timed(new)
    if not is_ours(new["variant"]):
        return Change(old, new, machine, NO_CODE if all(timed) else UNTIMED)
    if timed != (True, True):
        excused = OUT_OF_TIME in (old["status"], new["status"])
        verdict = UNTIMED if excused else {(False, False): SAME, (True, False): BROKEN, (False, True): MENDED}[timed]
    elif min(old["rounds"], new["rounds"]) < LEAST_ROUNDS:
        verdict = FEW
    elif all(new["p20"] / slower > old["p80"] * (1 + tolerance) for slower in (1.0, machine)):
        verdict = SLOWER
    elif all(new["p80"] / slower < old["p20"] / (1 + tolerance) for slower in (1.0, machine)):
        verdict = FASTER
    else:
        verdict = SAME
    return Change(old, new, machine, verdict)


def cells(change: Change) -> list[str]:
    def ms(row: Row) -> str:
        return f"{row['ms_per_step']:.3f}" if is_timed(row) else "-"

    def percent(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio - 1:+.1%}"

    new, ratio = change.new, change.ratio
    beside = None if ratio is None or change.drift == 1.0 else ratio / change.drift
    verdict = change.verdict if change.verdict != BROKEN else f"{BROKEN}: {new['status']}"
    row = [new["checkpoint"], new["dtype"], str(new["batch"]), new["variant"], ms(change.old), ms(new)]
    return [*row, percent(ratio), percent(beside), verdict]
