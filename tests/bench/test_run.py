"""`python -m bench` on tiny networks."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

import bench.measure
import bench.ours
import bench.report
import bench.rivals
import bench.variants
from bench.architectures import ARCHITECTURES, DEMO
from bench.cli import COMMANDS, main
from bench.limits import Demand, demand, limit_ms, measure_ceiling
from bench.measure import turn
from bench.rows import FIELDS, SCHEMA
from bench.setting import Setting
from bench.variants import MEANINGS, ON_CPU, ON_GPU, RIVALS, variants

QUICK = ("--steps", "3", "--rounds", "2", "--device", "cpu", "--variants", "ours-eager,diffusers")
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(tiny: Path, tmp_path: Path, here: None) -> Run:
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
            assert 0 < row["p20"] <= row["ms_per_step"] <= row["p80"]
            assert row["ms_per_step"] == pytest.approx(np.median(row["samples_ms"]))
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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "bench.html"}
    printed = capsys.readouterr()
    assert printed.out.count("ours-eager") == 4  # two tables
    assert f"{content['rows'][0]['ms_per_step']:.3f}" in printed.out
    assert "not measured: Energy" in printed.out
    assert printed.err.count("ready after") == 4


def test_processes_of_their_own(tiny: Path, tmp_path: Path) -> None:
    """As a user runs it, with one setting."""
    arguments = [str(tiny), "--steps", "2", "--rounds", "2", "--device", "cpu", "--batch", "1", "--threads", "1"]
    assert main([*arguments, "--variants", "ours-eager,diffusers", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    check(content)
    assert {row["variant"]: row["status"] for row in content["rows"]} == {"ours-eager": "ok", "diffusers": "ok"}
    assert content["environment"]["threads"] == 1
    assert (tmp_path / "bench.log").exists()
    assert {row["max_abs_diff"] <= 1e-4 for row in content["rows"]} == {True}


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
    assert rows["ours-eager"]["rounds"] == 2


@pytest.mark.parametrize("offset", [0.01, math.nan])
def test_other_images_have_no_speed(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offset: float
) -> None:
    images = bench.ours.Ours.images
    monkeypatch.setattr(bench.ours.Ours, "images", lambda self: images(self) + offset)
    _, content = run("--batch", "1")
    row = by_variant(content["rows"])["ours-eager"]
    assert row["status"] == ("skipped: its images are NaN" if offset != offset else "numerics differ")
    assert row["ms_per_step"] is row["steps_per_s"] is row["speedup"] is row["tflops"] is None
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ours-eager"))
    assert line.split()[3:10] == ["-"] * 7


def test_nothing_is_timed_without_a_judge(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Any, setting: Setting) -> None:
        raise ValueError("no such loop")

    monkeypatch.setattr(bench.ours.Reference, "__init__", failing)
    _, content = run("--batch", "1")
    status = "skipped: not judged, for the reference failed (no such loop)"
    assert {row["status"] for row in content["rows"]} == {status}


def test_half_precision_is_judged_with_the_same_noise(run: Run) -> None:
    _, content = run("--batch", "1", "--dtype", "fp32,bf16")
    rows = {(row["dtype"], row["variant"]): row for row in content["rows"]}
    assert [*rows] == [(d, v) for d in ("fp32", "bf16") for v in ("ours-eager", "diffusers")]
    for name in ("ours-eager", "diffusers"):
        assert rows["bf16", name]["bound"] == 0.25
        assert rows["fp32", name]["max_abs_diff"] < rows["bf16", name]["max_abs_diff"] <= 0.05


@pytest.mark.parametrize(
    ("at", "statuses"),
    [
        (5, {"ok"}),  # the second batch size's warm-up
        (4, {"stopped after 1 of 2 rounds"}),
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
    on_cpu = [*variants(tiny_setting)]
    assert on_cpu == [*ON_CPU, "diffusers", "diffusers-compiled", "diffusers-max-autotune", "openvino"]
    on_gpu = replace(tiny_setting, device=torch.device("cuda", 0), dtype="fp16")
    assert [*variants(on_gpu)] == [*ON_GPU, "diffusers", "diffusers-compiled", "diffusers-max-autotune"]
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


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = bench.report.write_json(tmp_path / "a" / "b.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        bench.report.write_json(path, {"x": math.nan})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(path.parent.iterdir()) == [path]


def test_no_page_without_matplotlib(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("bench.page", "bench.run_page", "bench.figures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _ = run("--batch", "1")
    assert code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json"}
    assert "no page is written: matplotlib is not installed" in capsys.readouterr().err


# Limits


def test_limit() -> None:
    ceiling = {"dtype": "fp32", "matmul_tflops": 2.0, "copy_gb_per_s": 100.0}
    assert limit_ms(Demand(flops=10**9, bytes=10**6), ceiling) == 0.5
    assert limit_ms(Demand(flops=10**9, bytes=10**9), ceiling) == 10
    assert limit_ms(Demand(flops=1, bytes=None), ceiling) is None
    assert limit_ms(Demand(flops=1, bytes=1), None) is None


def test_demand_of_a_step() -> None:
    checkpoint = ARCHITECTURES["cifar10-32"].checkpoint(ARCHITECTURES["cifar10-32"].network())
    one, many = demand(checkpoint, 1, "fp16"), demand(checkpoint, 16, "fp16")
    assert one.flops == pytest.approx(12.11e9 + 0.33e9, rel=0.005)  # convolutions and linear layers; attention
    assert many.flops == 16 * one.flops
    assert one.bytes > 71e6  # its weights
    assert one.bytes < many.bytes < 16 * one.bytes


def test_ceiling_is_measured(monkeypatch: pytest.MonkeyPatch, here: None) -> None:
    threads = torch.get_num_threads()
    found = measure_ceiling(torch.device("cpu"), "fp32", threads=1)
    assert found["dtype"] == "fp32"
    assert 0 < found["matmul_tflops"] < 10
    assert 0 < found["copy_gb_per_s"] < 1e4
    assert torch.get_num_threads() == threads
