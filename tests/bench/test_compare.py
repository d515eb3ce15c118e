"""`python -m bench compare OLD NEW`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.cli import main
from bench.compare import BROKEN, DRIFTED, FASTER, MENDED, SAME, SLOWER, compare


def row(variant: str, ms: float | None, spread: float = 0.02, **changes: Any) -> dict[str, Any]:
    found = {"checkpoint": "demo", "dtype": "fp32", "batch": 1, "steps": 20, "variant": variant, "ms_per_step": ms}
    status = "ok" if ms is not None else "numerics differ"
    edges = {"p20": None, "p80": None} if ms is None else {"p20": ms * (1 - spread), "p80": ms * (1 + spread)}
    return found | edges | {"status": status} | changes


def verdicts(old: list[dict[str, Any]], new: list[dict[str, Any]], tolerance: float = 0.05) -> list[str]:
    return [change.verdict for change in compare(old, new, tolerance)]


def write(path: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    environment = {"gpu": None, "cpu": "a CPU", "torch": "2.13.0"}
    path.write_text(json.dumps({"schema": 2, "rows": rows, "environment": environment} | changes))
    return str(path)


def test_verdicts() -> None:
    assert verdicts([row("ours-eager", 10.0)], [row("ours-eager", 10.5)]) == [SAME]
    assert verdicts([row("ours-eager", 10.0)], [row("ours-eager", 12.0)]) == [SLOWER]
    assert verdicts([row("ours-eager", 10.0)], [row("ours-eager", 8.0)]) == [FASTER]
    assert verdicts([row("ours-eager", 10.0, 0.15)], [row("ours-eager", 12.0, 0.1)]) == [SAME]  # within the noise
    assert verdicts([row("ours-eager", 10.0)], [row("ours-eager", None)]) == [BROKEN]
    assert verdicts([row("ours-eager", None)], [row("ours-eager", 10.0)]) == [MENDED]
    assert verdicts([row("ours-eager", None)], [row("ours-eager", None)]) == [SAME]
    assert verdicts([row("ours-eager", 10.0)], [row("ours-eager", 20.0, batch=2)]) == []


def test_a_slower_machine_is_no_slower_code() -> None:
    """All variants of a run share the machine's state: ours is judged beside the rivals."""
    old = [row("ours-eager", 10.0), row("diffusers", 20.0), row("openvino", 8.0)]
    slower = [row("ours-eager", 13.0), row("diffusers", 26.0), row("openvino", 10.4)]
    assert verdicts(old, slower) == [SAME, DRIFTED, DRIFTED]
    assert verdicts(old, [row("ours-eager", 13.0), *old[1:]]) == [SLOWER, SAME, SAME]
    hidden = [row("ours-eager", 10.0), *slower[1:]]  # the machine was slower, ours was not
    assert verdicts(old, hidden)[0] == FASTER


def test_ten_pairs_of_runs_of_one_code() -> None:
    """Rounds with the noise of a busy machine, common to a run and each one's own: 9 of 10 pairs show no change."""
    chance = random.Random(0)

    def run() -> list[dict[str, Any]]:
        machine, rows = chance.gauss(1, 0.1), []
        for variant, ms in (("ours-eager", 10.0), ("ours-compiled", 6.0), ("diffusers", 11.0), ("openvino", 7.0)):
            own = chance.gauss(1, 0.01)
            p20, median, p80 = np.percentile(
                [ms * machine * own * chance.lognormvariate(0, 0.03) for _ in range(9)], (20, 50, 80)
            )
            rows.append(row(variant, median, p20=p20, p80=p80))
        return rows  # fmt: skip

    clean = [not {SLOWER, FASTER} & set(verdicts(run(), run())) for _ in range(100)]
    assert sum(clean) >= 90


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.json", [row("ours-eager", 10.0), row("diffusers", 20.0)])
    assert main(["compare", old, old]) == 0
    assert "2 no difference" in capsys.readouterr().out
    slower = write(tmp_path / "new.json", [row("ours-eager", 12.0), row("diffusers", 20.0)])
    assert main(["compare", old, slower]) == 1
    printed = capsys.readouterr().out
    assert "1 slower, 1 no difference" in printed
    assert "+20.0%" in printed
    assert main(["compare", old, slower, "--tolerance", "0.3"]) == 0
    assert main(["compare", slower, old]) == 0
    broken = write(tmp_path / "broken.json", [row("ours-eager", None)])
    assert main(["compare", old, broken]) == 1
    assert "broken: numerics differ" in capsys.readouterr().out


def test_another_machine_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.json", [row("ours-eager", 10.0)])
    new = write(tmp_path / "new.json", [row("ours-eager", 10.0)], environment={"gpu": "H100", "torch": "2.14.0"})
    assert main(["compare", old, new]) == 0
    printed = capsys.readouterr().out
    assert "warning: gpu was None and is H100" in printed
    assert "warning: torch was 2.13.0 and is 2.14.0" in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not readable as JSON"),
        ("[1]", "has schema None, expected 2"),
        ('{"schema": 1, "rows": []}', "has schema 1, expected 2"),
        ('{"schema": 2, "rows": [], "environment": {}}', "have no row in common"),
    ],
)
def test_files_that_are_none(content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    assert main(["compare", str(path), str(path)]) == 2
    assert main(["compare", str(path), str(tmp_path / "missing.json")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert words in errors[0]
    assert len(errors) == 2


def test_a_tolerance_is_a_fraction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a", "b", "--tolerance", "5"]) == 2
    assert "expected a fraction from 0 up to 1" in capsys.readouterr().err
