"""`python -m bench compare OLD NEW`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.compare import BROKEN, FASTER, FEW, MENDED, NO_CODE, SAME, SLOWER, UNTIMED, compare


def row(variant: str, ms: float | None, spread: float = 0.02, **changes: Any) -> dict[str, Any]:
    found = {"checkpoint": "demo", "dtype": "fp32", "batch": 1, "steps": 20, "variant": variant, "ms_per_step": ms}
    found |= {"status": "ok" if ms is not None else "numerics differ", "rounds": 9}
    edges = {"p20": None, "p80": None} if ms is None else {"p20": ms * (1 - spread), "p80": ms * (1 + spread)}
    return found | edges | changes


def verdicts(old: list[dict[str, Any]], new: list[dict[str, Any]], *, correct: bool = True) -> list[str]:
    return [change.verdict for change in compare(old, new, 0.05, correct=correct)]


def write(path: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    environment = {"gpu": None, "cpu": "a CPU", "torch": "2.13.0"}
    path.write_text(json.dumps({"schema": 2, "rows": rows, "environment": environment} | changes))
    return str(path)


def test_verdicts() -> None:
    def verdict(old: float | None, new: float | None, spread: float = 0.02, **changes: Any) -> list[str]:
        return verdicts([row("ours-eager", old, spread)], [row("ours-eager", new, spread, **changes)])

    assert verdict(10.0, 10.5) == [SAME]
    assert verdict(10.0, 12.0) == [SLOWER]
    assert verdict(10.0, 8.0) == [FASTER]
    assert verdict(10.0, 12.0, spread=0.15) == [SAME]  # within the noise
    assert verdict(10.0, None) == [BROKEN]
    assert verdict(None, 10.0) == [MENDED]
    assert verdict(None, None) == [SAME]
    assert verdict(10.0, None, status="skipped: out of time") == [UNTIMED]
    assert verdict(10.0, 30.0, rounds=1) == [FEW]
    assert verdict(10.0, 20.0, batch=2) == []  # nothing in common


def test_rivals_are_no_code_of_ours() -> None:
    assert verdicts([row("openvino", 10.0)], [row("openvino", 20.0)]) == [NO_CODE]
    assert verdicts([row("openvino", 10.0)], [row("openvino", None)]) == [UNTIMED]


def test_a_slower_machine_is_no_slower_code() -> None:
    """All variants of a run share the machine's state: ours is judged beside the rivals."""
    old = [row("ours-eager", 10.0), row("diffusers", 20.0), row("openvino", 8.0)]
    slower = [row("ours-eager", 13.0), row("diffusers", 26.0), row("openvino", 10.4)]
    assert verdicts(old, slower)[0] == SAME
    assert verdicts(old, slower, correct=False)[0] == SLOWER
    assert verdicts(old, [row("ours-eager", 13.0), *old[1:]])[0] == SLOWER


def test_a_drift_alone_is_no_change() -> None:
    """Ours stood still while the rivals moved, by a faster host, say: that is no finding about ours."""
    old = [row("ours-planned", 10.0), row("diffusers", 20.0)]
    for ratio in (0.7, 1.4):
        assert verdicts(old, [row("ours-planned", 10.0), row("diffusers", 20.0 * ratio)])[0] == SAME


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.json", [row("ours-eager", 10.0), row("diffusers", 20.0)])
    assert main(["compare", old, old]) == 0
    assert "1 no difference, 1 a rival" in capsys.readouterr().out
    slower = write(tmp_path / "new.json", [row("ours-eager", 12.0), row("diffusers", 20.0)])
    assert main(["compare", old, slower]) == 1
    printed = capsys.readouterr().out
    assert "1 slower, 1 a rival" in printed
    assert "+20.0%" in printed
    assert main(["compare", old, slower, "--tolerance", "0.3"]) == 0
    assert main(["compare", slower, old]) == 0
    broken = write(tmp_path / "broken.json", [row("ours-eager", None)])
    assert main(["compare", old, broken]) == 1
    printed = capsys.readouterr().out
    assert "broken: numerics differ" in printed
    assert "only in " + old + ": demo, fp32, 1, 20, diffusers" in printed


def test_the_drift_is_taken_out_on_one_cpu_only(tmp_path: Path) -> None:
    old = [row("ours-eager", 10.0), row("diffusers", 20.0)]
    new = [row("ours-eager", 13.0), row("diffusers", 26.0)]
    for environment, code in (({"gpu": None, "cpu": "a CPU"}, 0), ({"gpu": "H100"}, 1)):
        paths = [write(tmp_path / f"{i}.json", rows, environment=environment) for i, rows in enumerate((old, new))]
        assert main(["compare", *paths]) == code
    other = write(tmp_path / "other.json", new, environment={"gpu": None, "cpu": "a CPU", "diffusers": "1.0"})
    assert main(["compare", write(tmp_path / "old.json", old, environment={"gpu": None, "cpu": "a CPU"}), other]) == 1


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
