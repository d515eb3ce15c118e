"""`python -m bench compare OLD NEW`: what changed between two JSON files, beyond what runs of one code differ by.

A variant of ours has changed where the 95 % intervals of its median and of the old one's, widened by the tolerance, do
not meet. On a CPU runs differ most by what the machine did meanwhile, which is common to all variants of a round: there
a round counts as a multiple of the rivals' in it, and the milliseconds have to have changed the same way by more than
the tolerance, for a rival may drift alone. On a GPU there is no such correction: a captured step waits for the GPU, a
rival's for the host.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cli import Parser
from bench.report import print_cells
from bench.rows import OUT_OF_TIME, VERSION, Row, is_ours, is_timed

KEY = ("checkpoint", "dtype", "batch", "steps", "variant")
# What must be the same for two runs to be of one machine and one software.
MACHINE = ("gpu", "driver", "cpu", "threads", "cuda", "cudnn", "torch", "triton", "diffusers", "openvino")
# Packages of rivals: where one run has none, no rival of it is in both.
OF_RIVALS = ("diffusers", "openvino")
COLUMNS = ("checkpoint", "dtype", "batch", "variant", "old ms", "new ms", "change", "beside rivals", "verdict")
LEFT = ("checkpoint", "dtype", "variant", "verdict")
SLOWER, FASTER, SAME = "slower", "faster", "no difference"
BROKEN, MENDED = "broken", "mended"
FEW, UNTIMED, NO_CODE = "too few rounds", "not timed", "a rival"
LEAST_ROUNDS = 6  # of fewer the interval of the median does not hold it 95 times of 100


@dataclass(frozen=True)
class Change:
    """Of one row.

    Attributes:
        old, new: rows.
        beside: new over old multiple of the rivals, medians; None where no rival is beside both.
        verdict: one of those above.
    """

    old: Row
    new: Row
    beside: float | None
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
        "--tolerance", type=float, default=0.05, help="a relative change that is never called one (0.05)"
    )
    options = parser.parse_args(argv)
    if not 0 <= options.tolerance < 1:
        raise ValueError(f"--tolerance {options.tolerance}: expected a fraction from 0 up to 1, such as 0.05")
    old, new = read(options.old), read(options.new)
    differing = [name for name in MACHINE if differs(name, old["environment"], new["environment"])]
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


def differs(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether an entry of MACHINE has changed, in a way that tells on rows of both."""
    before, after = old.get(name), new.get(name)
    return before != after and not (name in OF_RIVALS and None in (before, after))


def compare(old: list[Row], new: list[Row], tolerance: float, *, correct: bool) -> list[Change]:
    """Of the rows that both have, in the new one's order.

    Args:
        tolerance: relative.
        correct: for what the machine did meanwhile.
    """
    before = {key(row): row for row in old}
    pairs = [(before[key(row)], row) for row in new if key(row) in before]
    return [judge(*pair, multiples(*pair, pairs) if correct else None, tolerance) for pair in pairs]


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def multiples(old: Row, new: Row, pairs: list[tuple[Row, Row]]) -> tuple[list[float], list[float]] | None:
    """Of each round of a variant of ours, the multiple of the rivals' median in it; None where both have no rival."""
    beside = [pair for pair in pairs if key(pair[1])[:-1] == key(new)[:-1] and not is_ours(pair[1]["variant"])]
    rivals = [pair for pair in beside if all(map(is_timed, pair))]
    if not rivals or not is_ours(new["variant"]) or not (is_timed(old) and is_timed(new)):
        return None
    before, after = zip(*rivals, strict=True)
    return relative(old, before), relative(new, after)


def relative(row: Row, rivals: Sequence[Row]) -> list[float]:
    """A row's rounds over the rivals' median in each."""
    rounds = zip(row["samples_ms"], *(rival["samples_ms"] for rival in rivals), strict=True)
    return [ms / statistics.median(others) for ms, *others in rounds]


def judge(old: Row, new: Row, multiples: tuple[list[float], list[float]] | None, tolerance: float) -> Change:
    """The verdict on one row; rivals are no code of ours, and get none.

    Args:
        multiples: of the rivals, by round, old and new; None where milliseconds are to be compared.
    """
    beside = None if multiples is None else statistics.median(multiples[1]) / statistics.median(multiples[0])
    timed = is_timed(old), is_timed(new)
    if not is_ours(new["variant"]):
        verdict = NO_CODE if all(timed) else UNTIMED
    elif timed != (True, True):
        excused = OUT_OF_TIME in (old["status"], new["status"])
        verdict = UNTIMED if excused else {(False, False): SAME, (True, False): BROKEN, (False, True): MENDED}[timed]
    elif min(old["rounds"], new["rounds"]) < LEAST_ROUNDS:
        verdict = FEW
    else:
        rounds = multiples or (old["samples_ms"], new["samples_ms"])
        (old_low, old_high), (new_low, new_high) = map(interval, rounds)
        ratio, most = new["ms_per_step"] / old["ms_per_step"], 1 + tolerance
        if new_low > old_high * most and ratio > most:
            verdict = SLOWER
        elif new_high * most < old_low and ratio * most < 1:
            verdict = FASTER
        else:
            verdict = SAME
    return Change(old, new, beside, verdict)


def interval(rounds: Sequence[float]) -> tuple[float, float]:
    """Two of the rounds between which the median of all possible ones lies, 95 times of 100.

    Their ranks are the normal approximation's (Conover 1999, section 3.2), rounded outwards.
    """
    ordered, n = sorted(rounds), len(rounds)
    half = 1.96 * math.sqrt(n) / 2
    low, high = math.floor(n / 2 - half), math.ceil(n / 2 + 1 + half)  # from 1
    return ordered[max(low, 1) - 1], ordered[min(high, n) - 1]


def cells(change: Change) -> list[str]:
    def ms(row: Row) -> str:
        return f"{row['ms_per_step']:.3f}" if is_timed(row) else "-"

    def percent(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio - 1:+.1%}"

    new, ratio = change.new, change.ratio
    verdict = change.verdict if change.verdict != BROKEN else f"{BROKEN}: {new['status']}"
    row = [new["checkpoint"], new["dtype"], str(new["batch"]), new["variant"], ms(change.old), ms(new)]
    return [*row, percent(ratio), percent(change.beside), verdict]
