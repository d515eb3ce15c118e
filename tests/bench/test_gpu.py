"""`python -m bench gpu`, with the CPU in the place of a GPU, on the tiny checkpoint, and with pytest's report given."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import bench.gpu
import bench.gpu_tests
import bench.run
from bench.architectures import ARCHITECTURES, DEMO
from bench.cli import main
from bench.rows import SCHEMA
from bench.source import Source
from bench.variants import variants
from tests.helpers import has_ended

CPU = torch.device("cpu")
PASSED = '<testcase classname="a" name="passes"/>'
SKIPPED = '<testcase classname="a" name="skips"><skipped/></testcase>'
FAILED = '<testcase classname="a" name="fails"><failure/></testcase>'


@pytest.fixture
def run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None, no_pages: None
) -> Callable[..., tuple[int, dict[str, Any]]]:
    monkeypatch.setattr(bench.gpu, "find_device", lambda: CPU)
    monkeypatch.setattr(bench.gpu, "source", lambda name, folder: Source("tiny", str(tiny), stock=str(tiny)))
    names = ("ours-eager", "diffusers")
    comparisons = ((None, "fp32", 1, names), ("cifar10-32", "tf32", 1, names))
    monkeypatch.setattr(bench.gpu, "COMPARISONS", comparisons)
    monkeypatch.setattr(bench.gpu, "STEPS", 2)
    monkeypatch.setattr(bench.gpu, "ROUNDS", 1)

    def call(cases: str, *options: str, problem: str | None = None) -> tuple[int, dict[str, Any]]:
        def run_pytest(junit: Path, seconds: float) -> str | None:
            junit.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
            return problem

        monkeypatch.setattr(bench.gpu_tests, "run_pytest", run_pytest)
        code = main(["gpu", "--out", str(tmp_path), *options])
        content = json.loads((tmp_path / "gpu.json").read_text())
        jsonschema.validate(content, SCHEMA)
        return code, content

    return call


def test_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant belongs to its setting, and no row is there twice, for `compare` would take them for one."""
    monkeypatch.setattr(bench.gpu, "source", lambda name, folder: Source(name or "demo", str(DEMO), stock=str(DEMO)))
    settings = bench.gpu.settings(torch.device("cuda", 0), tmp_path)
    rows = []
    for setting, (name, dtype, batch, only) in zip(settings, bench.gpu.COMPARISONS, strict=True):
        assert name in {None, *ARCHITECTURES}
        assert (setting.dtype, setting.batch, setting.steps) == (dtype, batch, bench.gpu.STEPS)
        plain = variants(replace(setting, source=replace(setting.source, stock=None)))
        assert {*only} == {*variants(setting), *plain}
        rows += [(name, dtype, batch, variant) for variant in only]
    assert len(set(rows)) == len(rows)


def test_sources(tmp_path: Path) -> None:
    demo, random = (bench.gpu.source(name, tmp_path / str(name)) for name in (None, "demo"))
    assert (demo.location, demo.architecture) == (str(DEMO), None)
    assert (random.name, random.architecture) == ("demo (random weights)", "demo")
    for found in (demo, random):
        assert found.load().sample_size == (32, 32)
        assert (Path(found.stock) / "unet" / "config.json").exists()


def test_a_run(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, content = run(PASSED + SKIPPED)
    assert code == 0
    assert content["kind"] == "gpu"
    counts = {name: content["tests"][name] for name in ("passed", "failed", "skipped")}
    assert counts == {"passed": 1, "failed": 0, "skipped": 1}
    rows = {(row["dtype"], row["variant"]): row for row in content["rows"]}
    assert rows["fp32", "ours-eager"]["status"] == "ok"
    assert rows["tf32", "ours-eager"]["status"].startswith("skipped: dtype 'tf32' exists on a GPU only")
    assert "GPU tests:\n  1 passed, 0 failed, 1 skipped\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cases", "problem"), [("", None), (SKIPPED, None), (PASSED + FAILED, None), (PASSED, "stopped after 1 s")]
)
def test_without_passing_tests(run: Callable[..., Any], cases: str, problem: str | None) -> None:
    code, content = run(cases, "--seconds", "1e-9", problem=problem)
    assert code == 1
    assert content["tests"]["problem"] == problem
    assert {row["status"] for row in content["rows"]} == {"skipped: out of time"}


def test_interrupted(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.run, "expected_images", interrupted)
    code, content = run(PASSED)
    assert code == 130
    assert content["tests"]["passed"] == 1
    assert content["rows"] == []


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: torch finds no CUDA GPU here, and `bench gpu` needs one\n"


def test_counts_of_a_real_pytest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.gpu_tests, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 0\n"
        "def test_skips(): pytest.skip('why')\n"
    )
    (tmp_path / "test_b.py").write_text("def test_of_the_cpu(): pass\n")
    (tmp_path / "test_c.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'diffusers'\", name='diffusers')\n"
    )
    (tmp_path / "test_d.py").write_text("import no_such_module_of_ours\n")
    found = bench.gpu_tests.run_gpu_tests(60)
    assert found == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["test_d (not importable)", "test_a::test_fails"],
        "not_collected": ["test_c (diffusers is not installed)"],
        "problem": None,
    }
    assert bench.gpu_tests.run_gpu_tests(0.01)["problem"] == "stopped after 0 s"


@pytest.mark.parametrize("text", [None, "", "<testsuites><testsuite>"])
def test_a_report_that_is_not_whole_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "junit.xml").write_text(text)
    assert bench.gpu_tests.read_junit(tmp_path / "junit.xml") is None


def test_a_test_that_hangs_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would go on using the GPU that is measured next."""
    monkeypatch.setattr(bench.gpu_tests, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_a.py").write_text(
        "import pathlib, subprocess, time, pytest\n"
        "@pytest.mark.gpu\n"
        "def test_hangs():\n"
        "    pathlib.Path('pid').write_text(str(subprocess.Popen(['sleep', '60']).pid))\n"
        "    time.sleep(60)\n"
    )
    assert bench.gpu_tests.run_gpu_tests(15)["problem"] == "stopped after 15 s"
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_what_tests_import_is_promised_or_optional() -> None:
    """Or a missing package would be taken for a test that fails."""
    promised = {"torch", "triton", "numpy", "pytest", "safetensors", "ddpm", "bench", "tests"}
    for path in (bench.gpu_tests.ROOT / "tests").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - promised:
                assert name in bench.gpu_tests.OPTIONAL, f"{path.name} imports {name}"
