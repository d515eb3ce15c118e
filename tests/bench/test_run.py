"""`python -m bench` on tiny networks."""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

import bench.cli
import bench.contestant
import bench.gpu_tests
import bench.limits
import bench.measure
import bench.ours
import bench.report
import bench.rivals
import bench.run
import bench.variants
from bench.architectures import ARCHITECTURES, DEMO
from bench.cli import COMMANDS, main
from bench.contestant import Contestant
from bench.environment import ROOT
from bench.limits import Demand, demand, limit_ms, measure_ceiling
from bench.measure import Deadline, Plan, turn
from bench.rows import BOUNDS, FIELDS, SCHEMA, add_rates
from bench.setting import Setting
from bench.tables import TABLES, number
from bench.variants import MEANINGS, ON_CPU, ON_GPU, RIVALS, variants
from tests.bench.conftest import compared

QUICK = ("--steps", "3", "--rounds", "2", "--seconds", "1e-9", "--device", "cpu", "--variants", "ours-eager,diffusers")
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(tiny: Path, tmp_path: Path, here: None, no_pages: None) -> Run:
    """main() on the tiny checkpoint: its exit code and its JSON, which the schema allows."""

    def call(*options: str) -> tuple[int, dict[str, Any]]:
        code = main([str(tiny), *QUICK, "--out", str(tmp_path / "out"), *options])
        content = json.loads((tmp_path / "out" / "bench.json").read_text())
        check(content)
        return code, content

    return call


def check(content: dict[str, Any]) -> None:
    jsonschema.validate(content, SCHEMA)
    assert content["kind"] == "run"
    for row in content["rows"]:
        assert row.keys() == FIELDS.keys()
        speeds = [row[name] for name in ("ms_per_step", "p20", "p80", "steps_per_s", "images_per_s", "first_image_s")]
        assert {value is None for value in speeds} in ({True}, {False})
        if row["ms_per_step"] is not None:
            assert row["rounds"] == len(row["samples_ms"]) > 0
            spread = [row[name] for name in ("p20", "ms_per_step", "p80")]
            assert spread == pytest.approx(np.percentile(row["samples_ms"], [20, 50, 80]))
            assert row["images_per_s"] == pytest.approx(row["batch"] / row["ms_per_step"])
            before = row["load_s"] + row["compile_s"]
            assert row["first_image_s"] == pytest.approx(before + row["ms_per_step"])  # 1000 steps


def by_variant(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in rows}


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert all(entry.get("title") and entry.get("description") for entry in FIELDS.values())


def test_run(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for kind in (bench.ours.Ours, bench.rivals.Diffusers):
        chain = kind.chain
        monkeypatch.setattr(
            kind, "chain", lambda self, kind=kind, chain=chain: (order.append(kind.__name__), chain(self))
        )
    code, content = run("--batch", "1,2")
    assert code == 0
    found = [(row["batch"], row["variant"]) for row in content["rows"]]
    assert found == [(1, "ours-eager"), (1, "diffusers"), (2, "ours-eager"), (2, "diffusers")]
    for row in content["rows"]:
        assert (row["status"], row["rounds"], len(row["samples_ms"])) == ("ok", 2, 2)
        assert 0 <= row["max_abs_diff"] <= row["bound"] == 1e-4
        assert row["speedup"] > 0
        assert (row["speedup"] == 1) == (row["variant"] == "diffusers")
        assert row["peak_memory_mb"] > 100  # torch alone
        assert 0 < row["share_of_limit"] == pytest.approx(row["limit_ms"] / row["ms_per_step"])
        assert row["launches_per_step"] is row["energy_j_per_image"] is row["capture_s"] is None
    # two chains each to get warm, then by turns, each first once
    warm = ["Ours", "Ours", "Diffusers", "Diffusers"]
    assert order == [*warm, "Ours", "Diffusers", "Diffusers", "Ours"] * 2
    assert any("NVML" in sentence for sentence in content["not_measured"])
    printed = capsys.readouterr()
    assert printed.out.count("ours-eager") == 8  # four tables
    assert [line for line in printed.out.splitlines() if line in TABLES] == list(TABLES)[:4]  # no state of a GPU
    assert number(content["rows"][0]["ms_per_step"], 4) in printed.out
    assert "not measured: Energy" in printed.out
    assert printed.err.count("ready after") == 4


def test_processes_of_their_own(tiny: Path, tmp_path: Path) -> None:
    """As a user runs it, with one setting."""
    arguments = [str(tiny), "--steps", "2", "--rounds", "2", "--seconds", "1e-9", "--device", "cpu"]
    arguments += ["--batch", "1", "--threads", "2", "--variants", "ours-eager,diffusers"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    check(content)
    assert {row["variant"]: row["status"] for row in content["rows"]} == {"ours-eager": "ok", "diffusers": "ok"}
    assert content["environment"]["threads"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.html", "bench.log"}
    assert {row["max_abs_diff"] <= 1e-4 for row in content["rows"]} == {True}
    assert {row["share_of_limit"] > 0 for row in content["rows"]} == {True}
    assert not multiprocessing.active_children()


def test_without_diffusers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then plain PyTorch is what ours is compared with."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "diffusers.pipelines.ddpm.pipeline_ddpm", None)
    monkeypatch.setattr(bench.variants, "find_spec", lambda name: None)
    code, content = run("--batch", "2", "--variants", "ours-eager,diffusers,pytorch")
    assert code == 0
    rows = by_variant(content["rows"])
    assert rows["diffusers"]["status"] == "skipped: diffusers is not installed"
    assert rows["diffusers"]["ms_per_step"] is None
    assert rows["pytorch"]["speedup"] == 1
    assert rows["ours-eager"]["speedup"] == pytest.approx(
        rows["pytorch"]["ms_per_step"] / rows["ours-eager"]["ms_per_step"]
    )


def test_a_variant_that_cannot_compile(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm.loop.can_compile", lambda device: False)
    _, content = run("--batch", "1", "--variants", "ours-eager,ours-compiled")
    rows = by_variant(content["rows"])
    assert rows["ours-compiled"]["status"].startswith("skipped: compile=True needs a C++ compiler")
    assert rows["ours-eager"]["status"] == "ok"


def test_a_variant_that_fails_while_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, calls = bench.rivals.Diffusers.chain, []

    def failing(self: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory\nand more")
        chain(self)

    monkeypatch.setattr(bench.rivals.Diffusers, "chain", failing)
    _, content = run("--batch", "1")
    rows = by_variant(content["rows"])
    assert rows["diffusers"]["status"] == "skipped: RuntimeError: out of memory"
    assert rows["diffusers"]["rounds"] == len(rows["diffusers"]["samples_ms"]) == 0
    assert rows["ours-eager"]["rounds"] == 2


@pytest.mark.parametrize("offset", [0.01, -0.01, math.nan])
def test_other_images_have_no_speed(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offset: float
) -> None:
    images = bench.ours.Ours.images
    monkeypatch.setattr(bench.ours.Ours, "images", lambda self: images(self) + offset)
    _, content = run("--batch", "1")
    row = by_variant(content["rows"])["ours-eager"]
    assert row["status"] == ("skipped: its images are NaN" if offset != offset else "numerics differ")
    assert row["ms_per_step"] is row["steps_per_s"] is row["speedup"] is row["tflops"] is None
    assert math.isnan(offset) or row["max_abs_diff"] == pytest.approx(0.02, rel=0.01)  # of x_0 in [-1, 1]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ours-eager"))
    assert line.split()[3:10] == ["-"] * 7


def test_images_of_another_shape_have_no_speed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    images = bench.ours.Ours.images
    monkeypatch.setattr(bench.ours.Ours, "images", lambda self: images(self)[:, :1])
    code, content = run("--batch", "1")
    assert code == 0
    rows = by_variant(content["rows"])
    assert rows["ours-eager"]["status"] == "skipped: its images are [1, 1, 8, 8], and the reference's [1, 3, 8, 8]"
    assert rows["diffusers"]["status"] == "ok"


def test_nothing_is_timed_without_a_judge(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor made ready, which may take minutes."""

    def failing(self: Any, setting: Setting) -> None:
        raise ValueError("no such loop")

    monkeypatch.setattr(bench.ours.Reference, "__init__", failing)
    monkeypatch.setattr(bench.ours.Ours, "__init__", lambda *_, **__: pytest.fail("made for nothing"))
    _, content = run("--batch", "1")
    status = "skipped: not judged, for the reference failed (no such loop)"
    assert {row["status"] for row in content["rows"]} == {status}


def test_half_precision_is_judged_with_the_same_noise(run: Run) -> None:
    _, content = run("--batch", "1", "--dtype", "fp32,bf16")
    rows = {(row["dtype"], row["variant"]): row for row in content["rows"]}
    assert [*rows] == [(d, v) for d in ("fp32", "bf16") for v in ("ours-eager", "diffusers")]
    for name in ("ours-eager", "diffusers"):
        assert rows["bf16", name]["bound"] == BOUNDS["bf16"]
        assert rows["fp32", name]["max_abs_diff"] < rows["bf16", name]["max_abs_diff"] <= 0.1


def test_each_setting_is_saved(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the next one begins, which may never end."""
    found, judge = [], bench.run.expected_images

    def reading(*arguments: Any) -> Any:
        found.append(len(json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]))
        return judge(*arguments)

    monkeypatch.setattr(bench.run, "expected_images", reading)
    run("--batch", "1,2,3")
    assert found == [0, 2, 4]


def test_an_error_of_ours_loses_no_round(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(names: list[str], number: int) -> list[str]:
        if number == 1:
            raise MemoryError
        return names

    monkeypatch.setattr(bench.measure, "turn", failing)
    with pytest.raises(MemoryError):
        run("--batch", "1")
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["stopped after round 1"] * 2


@pytest.mark.parametrize(
    ("at", "statuses"),
    [
        (5, {"ok"}),  # the second batch size's warm-up
        (4, {"stopped after round 1"}),
        (1, set()),
    ],
)
def test_interruption_keeps_finished_rows(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: int, statuses: set[str]
) -> None:
    chain, calls = bench.ours.Ours.chain, []

    def interrupted(self: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        chain(self)

    monkeypatch.setattr(bench.ours.Ours, "chain", interrupted)
    code, content = run("--batch", "1,2")
    assert code == 130
    assert {row["status"] for row in content["rows"]} == statuses
    assert {row["variant"] for row in content["rows"]} == ({"ours-eager", "diffusers"} if statuses else set())
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/checkpoint/here"], "does not exist"),
        (["--batch", "0"], "--batch '0'"),
        (["--batch", "1,two"], "--batch '1,two'"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "1001"], "1000 steps"),
        (["--rounds", "-1"], "--rounds -1"),
        (["--seconds", "0"], "--seconds 0.0"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--threads", "-1"], "--threads -1"),
        (["--limit", "0"], "--limit 0.0"),
        (["--dtype", "fp8"], "fp8"),
        (["--device", "tpu"], "tpu"),
        (["--dtype", "tf32", "--device", "cpu"], "tf32"),
        (["--arch", "resnet"], "no architecture is called 'resnet'"),
        (["--arch", "demo", str(DEMO)], "give one or the other"),
        (["--variants", "fastest"], "--variants 'fastest' is not one of"),
        (["--variants", "ours-planned", "--device", "cpu"], "none of them belongs to cpu"),
        (["-o", "image_size"], "NAME=VALUE"),
        (["--out", __file__], "is a file"),
        (["--out", f"{__file__}/out"], "cannot be made (Not a directory)"),
        (["--unknown"], "--unknown"),
        *(([name, "--unknown"], "--unknown") for name in COMMANDS if name != "compare"),
        (["compare", "a.json"], "NEW"),
        (["gpu", "--seconds", "0"], "--seconds 0.0"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_names_of_variants(tiny_setting: Setting) -> None:
    assert {*MEANINGS} == {*ON_GPU, *ON_CPU, *RIVALS}
    compiled = ["diffusers-compiled", "diffusers-max-autotune"]
    assert [*variants(tiny_setting)] == [*ON_CPU, "diffusers", *compiled, "openvino"]
    on_gpu = replace(tiny_setting, device=torch.device("cuda", 0), dtype="fp16")
    assert [*variants(on_gpu)] == [*ON_GPU, "diffusers", compiled[0], "diffusers-reduce-overhead", compiled[1]]
    wanted = replace(tiny_setting, only=("diffusers", "ours-eager"))
    assert [*variants(wanted)] == ["ours-eager", "diffusers"]
    assert "pytorch" in variants(replace(tiny_setting, source=replace(tiny_setting.source, stock=None)))


def test_nobody_always_follows_the_same() -> None:
    rounds = [turn(list("abcd"), number) for number in range(8)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert [order[0] for order in rounds] == list("abcdabcd")
    before = {(order[i - 1], order[i]) for order in rounds for i in range(1, 4)}
    assert {("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")} <= before
    assert turn([], 3) == []


def test_table_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    bench.report.print_cells(("variant", "ms"), ("variant",), [["diffusers", "1"], ["x", "1000"]])
    assert capsys.readouterr().out == "variant      ms\ndiffusers     1\nx          1000\n"


@pytest.mark.parametrize(("width", "is_drawn"), [(120, True), (30, False)])
def test_table_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, is_drawn: bool
) -> None:
    """Drawn where it fits; no cell is cut, nor read as markup."""
    console = pytest.importorskip("rich.console").Console
    monkeypatch.setattr(console, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    bench.report.print_cells(("variant", "status"), ("variant",), [["diffusers", "skipped: [no such] network"]])
    printed = capsys.readouterr().out
    assert ("│" in printed) == is_drawn
    assert "skipped: [no such] network" in printed


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = bench.report.write_json(tmp_path / "a" / "b.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        bench.report.write_json(path, {"x": math.nan})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(path.parent.iterdir()) == [path]


def test_no_page_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("bench.page", "bench.run_page", "bench.figures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.report.write_page_of(tmp_path / "bench.json", "bench.run_page", {}) == []
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "no page is written: matplotlib is not installed\n"


# Limits


def test_limit() -> None:
    ceiling = {"dtype": "fp32", "matmul_tflops": 2.0, "conv_tflops": 1.0, "copy_gb_per_s": 100.0}
    assert limit_ms(Demand(flops=10**9, bytes=10**6), ceiling) == 0.5
    assert limit_ms(Demand(flops=10**9, bytes=10**6), ceiling | {"conv_tflops": 4.0}) == 0.25
    assert limit_ms(Demand(flops=10**9, bytes=10**9), ceiling) == 10
    assert limit_ms(Demand(flops=1, bytes=1), None) is None


def test_a_row_is_held_against_its_own_limit(tiny_setting: Setting, here: None, tmp_path: Path) -> None:
    rates = {"matmul_tflops": 1.0, "conv_tflops": 1.0, "copy_gb_per_s": 1e9}
    ceilings = [{"dtype": "fp16", **rates}, {"dtype": "fp32", **rates, "matmul_tflops": 2.0}]
    plan, setting = Plan(tmp_path / "log"), replace(tiny_setting, only=("ours-eager",))
    (row,) = compared(setting, plan, Demand(flops=4 * 10**9, bytes=1), ceilings)
    assert row["limit_ms"] == 2
    assert row["share_of_limit"] == pytest.approx(2 / row["ms_per_step"])
    assert row["tflops"] == pytest.approx(0.004 / (row["ms_per_step"] / 1000))


def test_rates() -> None:
    times = {"ms_per_step": 20.0, "load_s": 1.0, "compile_s": 2.0, "capture_s": 0.5}
    row = {**dict.fromkeys(FIELDS), "batch": 4, **times}
    add_rates(row)
    names = ("steps_per_s", "image_steps_per_s", "images_per_s", "first_image_s")
    assert [row[name] for name in names] == [50, 200, 0.2, 23.5]
    row["capture_s"] = None
    add_rates(row)
    assert row["first_image_s"] == 23


def test_demand_of_a_step() -> None:
    checkpoint = ARCHITECTURES["cifar10-32"].checkpoint(ARCHITECTURES["cifar10-32"].network())
    one, many = demand(checkpoint, 1, "fp16"), demand(checkpoint, 16, "fp16")
    assert one.flops == pytest.approx(12.11e9 + 0.33e9, rel=0.005)  # convolutions and linear layers; attention
    assert many.flops == 16 * one.flops
    assert one.bytes > 71e6  # its weights
    assert one.bytes < many.bytes < 16 * one.bytes
    wide = demand(replace(checkpoint, sample_size=(32, 64)), 1, "fp16")
    assert one.bytes < wide.bytes < 2 * one.bytes
    assert 2 * one.flops < wide.flops < 2.1 * one.flops  # attention grows faster


def test_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 calls a second of each."""
    monkeypatch.setattr(bench.limits, "SIZES", {"cpu": (100, 3, 500)})
    monkeypatch.setattr(bench.limits, "CONV", (4, 8))
    calls = []
    monkeypatch.setattr(bench.limits, "rate", lambda device, call, *tensors: calls.append(call(*tensors)) or 10.0)
    found = measure_ceiling(torch.device("cpu"), "fp32")
    assert [tuple(call.shape) for call in calls] == [(100, 100), (3, 4, 8, 8), (500,)]
    products = {"matmul_tflops": 2 * 100**3 * 10e-12, "conv_tflops": 2 * (3 * 8 * 8) * 4 * (4 * 9) * 10e-12}
    assert found == pytest.approx({"dtype": "fp32", **products, "copy_gb_per_s": 2 * 500 * 10e-9})


def test_rate_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 0.02, *[0.5] * 4, 0.25, *[0.5] * 5])  # warm-up, one call, windows of five calls
    calls = []

    def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
        calls.clear()
        call()
        return next(seconds)

    monkeypatch.setattr(bench.limits, "seconds_of", seconds_of)
    assert bench.limits.rate(torch.device("cpu"), calls.append, torch.zeros(1)) == 5 / 0.25
    assert len(calls) == 5
    assert next(seconds, None) is None


def test_a_limit_that_cannot_be_measured_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench.contestant, "measure_ceiling", failing)
    code, content = run("--batch", "1", "--variants", "ours-eager")
    assert code == 0
    assert content["ceilings"] == []
    assert content["not_measured"][0] == "The limit of this machine in fp32: OutOfMemoryError: no memory."
    (row,) = content["rows"]
    assert row["status"] == "ok"
    assert row["limit_ms"] is row["share_of_limit"] is None


# One comparison


def test_time_runs_out_between_rounds(
    tiny_setting: Setting, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(tmp_path / "log", deadline=Deadline(1000.0))
    chain, calls = Contestant.chain, []

    def counting(self: Contestant) -> float:
        calls.append(1)
        if len(calls) == 4:  # two to get warm, a round, and this one
            plan.deadline.end = 0.0
        return chain(self)

    monkeypatch.setattr(Contestant, "chain", counting)
    setting = replace(tiny_setting, rounds=5, only=("ours-eager",))
    (row,) = compared(setting, plan)
    assert row["status"] == "stopped after round 2"


def test_rounds_go_on_for_the_time_wanted(tiny_setting: Setting, here: None, tmp_path: Path) -> None:
    """A machine's speed drifts by the second, and the spread should hold that."""
    setting = replace(tiny_setting, rounds=2, seconds=0.5, only=("ours-eager",))
    (row,) = compared(setting, Plan(tmp_path / "log"))
    assert row["status"] == "ok"
    assert row["rounds"] > 2
    assert sum(row["samples_ms"]) * setting.steps >= 400


def test_each_is_ready_before_it_is_timed(
    tiny_setting: Setting, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`is_ready` gives each later call the limit for itself; until then all share one."""
    done: list[str] = []
    for name in ("images", "is_ready", "chain"):
        call = getattr(Contestant, name)
        monkeypatch.setattr(Contestant, name, lambda self, name=name, call=call: (done.append(name), call(self))[1])
    compared(replace(tiny_setting, only=("ours-eager",)), Plan(tmp_path / "log"))
    assert done == ["images", "chain", "chain", "images", "is_ready", "chain"]  # the first is the judge's


def test_out_of_memory_names_who_else_was_there(
    tiny_setting: Setting, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench.rivals.Diffusers, "chain", failing)
    setting = replace(tiny_setting, only=("ours-eager", "diffusers"))
    rows = by_variant(compared(setting, Plan(tmp_path / "log")))
    hint = "(with ours-eager in memory; --variants diffusers runs it alone)"
    assert rows["diffusers"]["status"] == f"skipped: OutOfMemoryError: no memory {hint}"
    alone = compared(replace(setting, only=("diffusers",)), Plan(tmp_path / "log"))
    assert alone[0]["status"] == "skipped: OutOfMemoryError: no memory"


# A GPU's settings


def test_defaults_of_a_gpu(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.run, "timed_device", lambda name: torch.device("cuda", 0))
    options = bench.run.make_parser().parse_args([str(tiny), "--out", str(tmp_path)])
    settings = bench.run.make_settings(options, tmp_path)
    shapes = [(setting.batch, setting.dtype) for setting in settings]
    assert shapes == [(batch, dtype) for batch in (1, 16, 256) for dtype in ("fp32", "tf32", "fp16")]
    assert {(setting.steps, setting.rounds, setting.seconds) for setting in settings} == {(100, 9, 20.0)}


def test_the_interpreter_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench.cli.backend, "INTERPRET", True)
    for command in ([], ["profile"], ["scale"]):
        assert main(command) == 2
        assert capsys.readouterr().err.startswith("error: TRITON_INTERPRET is set, and the interpreter is never timed")


def test_help_says_what_everyone_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for entries in (MEANINGS, COMMANDS):
        assert all(f"{name} {meaning}" in words for name, meaning in entries.items())


def test_it_starts_with_little_installed(tmp_path: Path) -> None:
    """Without a network, on a machine's own torch: torch, triton, numpy, safetensors and pytest."""
    absent = sorted({*bench.gpu_tests.OPTIONAL, "openvino"})
    code = (
        f"import sys\nsys.modules |= dict.fromkeys({absent})\n"
        "import bench.gpu, bench.profile, bench.scale, bench.compare\n"
        "from bench.cli import main\n"
        f"sys.exit(main([{str(DEMO)!r}, '--variants', 'ours-eager,pytorch', '--batch', '1', '--steps', '1', "
        f"'--rounds', '1', '--seconds', '1e-9', '--device', 'cpu', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no page is written" in done.stderr
    check(json.loads((tmp_path / "bench.json").read_text()))
