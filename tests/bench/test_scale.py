"""`python -m bench scale` on a tiny network, and its fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import bench.scale
from bench.cli import main
from bench.environment import ROOT
from bench.scale import Law, fit, sentence

QUICK = ("--device", "cpu", "--batch", "1,2", "--sizes", "8,16", "--steps", "2,4", "--rounds", "2")
SCHEMA = json.loads((ROOT / "bench" / "schemas" / "scale.json").read_text())


def report(out: Path) -> dict[str, Any]:
    content = json.loads((out / "scale.json").read_text())
    jsonschema.validate(content, SCHEMA)
    return content


def test_a_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["scale", str(tiny), *QUICK, "--out", str(tmp_path)]) == 0
    content = report(tmp_path)
    assert (content["schema"], content["kind"], content["dtype"]) == (1, "scale", "fp32")
    found = [(point["axis"], point["x"], point["per"]) for point in content["points"]]
    per_step = [(axis, x, "step") for axis, x in (("batch", 1), ("batch", 2), ("size", 8), ("size", 16))]
    assert found == [*per_step, ("steps", 2, "chain"), ("steps", 4, "chain")]
    for point in content["points"]:
        assert point["status"] == "ok"
        assert len(point["samples_ms"]) == 2
        assert 0 < point["p20"] <= point["ms"] <= point["p80"]
        assert point["ms"] == pytest.approx(np.median(point["samples_ms"]))
    assert {*content["laws"]} == {"batch", "size", "steps"}
    printed = capsys.readouterr().out
    assert "ms per chain grow as steps^" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"scale.json", "scale.html"}
    page = (tmp_path / "scale.html").read_text()
    assert page.count("<picture") == 3
    assert "ms per step grow as batch^" in page


def test_sizes_by_default_are_those_the_network_takes(tiny: Path, tmp_path: Path, no_pages: None) -> None:
    arguments = ("--device", "cpu", "--batch", "1", "--steps", "1", "--rounds", "1")
    assert main(["scale", str(tiny), *arguments, "--out", str(tmp_path)]) == 0
    content = report(tmp_path)
    assert [point["x"] for point in content["points"] if point["axis"] == "size"] == [4, 8, 12, 16]
    assert {*content["laws"]} == {"size"}  # one point is no law


@pytest.mark.parametrize("exponent", [0.0, 0.83, 2.0])
def test_a_law_is_found_again(exponent: float) -> None:
    sizes = [1, 2, 4, 8, 16]
    found = fit(sizes, [3 * n**exponent for n in sizes])
    assert found.factor == pytest.approx(3)
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_errors_of_an_exponent() -> None:
    chance = np.random.default_rng(0)
    sizes = np.array([1, 2, 4, 8, 16, 32])
    found = [fit(sizes, sizes * chance.lognormal(0, 0.1, len(sizes))) for _ in range(300)]
    exponents, errors = np.array([law.exponent for law in found]), np.array([law.error for law in found])
    assert np.mean(errors) == pytest.approx(np.std(exponents), rel=0.15)
    assert fit([1, 2], [1, 3]).error is None
    assert fit([1, 2, 4], [5, 5, 5]).r_squared is None


def test_sentences() -> None:
    assert sentence("steps", vars(Law(1, 1.004, 0.012, 0.9996))) == "ms per chain grow as steps^1.00 ± 0.01 (R² 1.000)"
    assert sentence("batch", vars(Law(1, 0.9, None, None))) == "ms per step grow as batch^0.90"


def test_a_point_that_fails_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pages: None
) -> None:
    call = bench.scale.Chain.__call__

    def failing(self: Any) -> float:
        if self.place.batch == 2:
            raise RuntimeError("out of memory\nand more")
        return call(self)

    monkeypatch.setattr(bench.scale.Chain, "__call__", failing)
    assert main(["scale", str(tiny), *QUICK, "--out", str(tmp_path)]) == 0
    points = report(tmp_path)["points"]
    assert [(p["x"], p["ms"], p["status"]) for p in points if p["axis"] == "batch" and p["ms"] is None] == [
        (2, None, "skipped: RuntimeError: out of memory")
    ]
    assert {p["status"] for p in points if p["x"] != 2} == {"ok"}


def test_interruption_keeps_finished_points(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_pages: None
) -> None:
    call, calls = bench.scale.Chain.__call__, []

    def interrupted(self: Any) -> float:
        if self.place.axis == "size":
            calls.append(1)
            if len(calls) == 4:  # two to get warm, one of a round, and this one
                raise KeyboardInterrupt
        return call(self)

    monkeypatch.setattr(bench.scale.Chain, "__call__", interrupted)
    assert main(["scale", str(tiny), *QUICK, "--out", str(tmp_path)]) == 130
    found = [(point["axis"], point["x"], point["status"]) for point in report(tmp_path)["points"]]
    assert found == [("batch", 1, "ok"), ("batch", 2, "ok"), ("size", 8, "stopped after round 1")]
    assert "interrupted; the finished points are in" in capsys.readouterr().out


@pytest.mark.parametrize(("at", "what"), [(2, "skipped"), (3, "stopped")])  # the first call is to get warm
def test_a_point_that_fails_later_keeps_its_rounds(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pages: None, at: int, what: str
) -> None:
    call, calls = bench.scale.Chain.__call__, []

    def failing(self: Any) -> float:
        if self.place.batch == 2:
            calls.append(1)
            if len(calls) == at:
                raise RuntimeError("out of memory")
        return call(self)

    monkeypatch.setattr(bench.scale.Chain, "__call__", failing)
    assert main(["scale", str(tiny), *QUICK, "--out", str(tmp_path)]) == 0
    (point,) = [p for p in report(tmp_path)["points"] if p["x"] == 2 and p["axis"] == "batch"]
    assert (len(point["samples_ms"]), point["status"]) == (at - 2, f"{what}: RuntimeError: out of memory")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "9"], "--sizes 9: the network of"),
        (["--steps", "101"], "--steps 101 is more than the 100 steps"),
        (["--batch", "x"], "--batch 'x'"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", str(tiny), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
