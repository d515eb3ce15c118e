"""`python -m bench compare OLD NEW`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.cli import main
from bench.compare import BROKEN, FASTER, FEW, MENDED, NO_CODE, SAME, SLOWER, UNTIMED, cells, compare, interval
from bench.rows import OUT_OF_TIME, VERSION


def row(variant: str, ms: float | None, spread: float = 0.02, **changes: Any) -> dict[str, Any]:
    """Of rounds about ms, the fastest 2.5 spreads below it."""
    samples = [] if ms is None else [ms * (1 + spread * i / 2) for i in (-5, -1, 0, 1, 5, -2, 2, -2, 2)]
    return timed(variant, samples, **({"status": "ok" if samples else "numerics differ"} | changes))


def timed(variant: str, samples: list[float], **changes: Any) -> dict[str, Any]:
    found = {"checkpoint": "demo", "dtype": "fp32", "batch": 1, "steps": 20, "variant": variant, "status": "ok"}
    ms = statistics.median(samples) if samples else None
    return found | {"samples_ms": samples, "ms_per_step": ms, "rounds": len(samples)} | changes


def verdicts(old: list[dict[str, Any]], new: list[dict[str, Any]], *, correct: bool = True) -> list[str]:
    return [change.verdict for change in compare(old, new, 0.05, correct=correct)]


def write(path: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    environment = {"gpu": None, "cpu": "a CPU", "torch": "2.13.0"}
    path.write_text(json.dumps({"schema": VERSION, "rows": rows, "environment": environment} | changes))
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
    assert verdict(10.0, None, status=OUT_OF_TIME) == [UNTIMED]
    assert verdict(10.0, 30.0, rounds=1) == [FEW]
    assert verdict(10.0, 20.0, batch=2) == []  # nothing in common


def test_rivals_are_no_code_of_ours() -> None:
    assert verdicts([row("openvino", 10.0)], [row("openvino", 20.0)]) == [NO_CODE]
    assert verdicts([row("openvino", 10.0)], [row("openvino", None)]) == [UNTIMED]


def test_a_slower_machine_is_no_slower_code() -> None:
    """All variants of a round share the machine's state: ours is judged beside the rivals of its own batch."""
    old = [row("ours-eager", 10.0), row("diffusers", 20.0), row("openvino", 8.0), row("diffusers", 5.0, batch=2)]
    slower = [row("ours-eager", 13.0), row("diffusers", 26.0), row("openvino", 10.4), row("diffusers", 50.0, batch=2)]
    assert verdicts(old, slower)[0] == SAME
    assert verdicts(old, slower, correct=False)[0] == SLOWER
    assert verdicts(old, [row("ours-eager", 13.0), *old[1:]])[0] == SLOWER
    (change, *_) = compare(old, slower, 0.05, correct=True)
    assert change.beside == pytest.approx(1.0)
    (change, *_) = compare(old, [row("ours-eager", 15.0), *slower[1:]], 0.05, correct=True)
    assert change.beside == pytest.approx(15 / 13)
    assert cells(change)[-3:] == ["+50.0%", "+15.4%", SLOWER]


def test_rivals_are_those_of_both() -> None:
    old = [row("ours-eager", 10.0), row("diffusers", 20.0), row("openvino", None)]
    new = [row("ours-eager", 10.2), row("diffusers", 20.2), row("openvino", 8.0)]
    assert verdicts(old, new)[0] == verdicts(old, new[:2])[0] == SAME
    (change, *_) = compare(old[:1], new, 0.05, correct=True)
    assert (change.verdict, change.beside) == (SAME, None)


def test_a_drift_within_a_run_is_taken_out() -> None:
    """A round in which the machine was slow was so for all."""
    machine = [1.0, 1.1, 1.5, 1.4, 2.0, 1.9, 1.2, 1.0, 1.1]
    old = [timed(name, [ms * m for m in machine]) for name, ms in (("ours-eager", 10.0), ("diffusers", 20.0))]
    new = [timed(name, [ms * m for m in machine[::-1]]) for name, ms in (("ours-eager", 11.0), ("diffusers", 20.0))]
    assert verdicts(old, new)[0] == SLOWER
    assert verdicts(old, new, correct=False)[0] == SAME


def test_a_drift_alone_is_no_change() -> None:
    """Ours stood still while the rivals moved, by a faster host, say: that is no finding about ours."""
    old = [row("ours-planned", 10.0), row("diffusers", 20.0)]
    for ours, ratio in ((10.0, 0.7), (10.0, 1.4), (10.3, 0.7), (9.7, 1.4)):
        assert verdicts(old, [row("ours-planned", ours), row("diffusers", 20.0 * ratio)])[0] == SAME


def test_interval_holds_the_median() -> None:
    chance = np.random.default_rng(0)
    for n in (9, 30, 101):
        found = [interval(chance.lognormal(0, 0.1, n).tolist()) for _ in range(1000)]
        assert 0.95 <= np.mean([low <= 1 <= high for low, high in found]) <= 0.999
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


@pytest.mark.parametrize(("slower", "least", "most"), [(1.0, 0.0, 0.02), (1.3, 0.85, 1.0), (1 / 1.3, 0.0, 0.0)])
def test_runs_on_a_noisy_machine(slower: float, least: float, most: float) -> None:
    """Two runs of one code differ 1 time of 10 at most; code that is 30 % slower is found."""
    chance = np.random.default_rng(0)

    def run(factor: float) -> list[dict[str, Any]]:
        """A machine that drifts by a tenth from run to run and within one; each chain by 6 % for itself."""
        machine = chance.lognormal(0, 0.1) * np.exp(np.cumsum(chance.normal(0, 0.02, 30)))
        return [
            timed(name, [float(ms * m * chance.lognormal(0, 0.06)) for m in machine])
            for name, ms in (("ours-eager", 10.0 * factor), ("diffusers", 20.0), ("openvino", 8.0))
        ]

    found = [verdicts(run(1.0), run(slower))[0] for _ in range(200)]
    assert least <= np.mean([verdict == SLOWER for verdict in found]) <= most
    if slower == 1.0:
        assert np.mean([verdict == SAME for verdict in found]) >= 0.9


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
    here = {"gpu": None, "cpu": "a CPU", "diffusers": "1.0"}
    before = write(tmp_path / "old.json", old, environment=here)
    for change, code in (({"diffusers": "1.1"}, 1), ({"openvino": "2026.4"}, 0), ({"cpu": "another"}, 1)):
        assert main(["compare", before, write(tmp_path / "other.json", new, environment=here | change)]) == code


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
        ("[1]", f"has schema None, expected {VERSION}"),
        ('{"schema": 1, "rows": []}', f"has schema 1, expected {VERSION}"),
        (f'{{"schema": {VERSION}, "rows": [], "environment": {{}}}}', "have no row in common"),
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
