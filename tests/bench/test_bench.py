"""The benchmark on tiny networks: real runs on the CPU, and a GPU that is pretended."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import bench.cli
import bench.compare
import bench.environment
import bench.gpu
import bench.gpu_tests
import bench.report
import bench.variants
from bench.cli import main
from bench.gpu_state import FIELDS, GpuState
from bench.networks import save_random
from ddpm.checkpoints import load_checkpoint
from tests.helpers import save_tiny

CPU = torch.device("cpu")
REQUIRED = {
    "variant": str,
    "batch": int,
    "ms_per_step": (float, type(None)),
    "p20": (float, type(None)),
    "p80": (float, type(None)),
    "max_abs_diff": (float, type(None)),
    "status": str,
    "bound": float,
    "dtype": str,
    "prepare_s": (float, type(None)),
}
ENVIRONMENT = ("torch", "triton", "diffusers", "python", "platform", "cpu", "gpu", "driver", "commit", "date")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """main() on the tiny checkpoint: its exit code and its JSON."""

    def call(*options: str) -> tuple[int, dict[str, Any]]:
        common = ("--steps", "3", "--rounds", "2", "--device", "cpu", "--no-compile", "--out", str(tmp_path / "out"))
        code = main([str(tiny), *common, *options])
        return code, json.loads((tmp_path / "out" / "bench.json").read_text())

    return call


def check_schema(report: dict[str, Any]) -> None:
    assert report["schema"] == 1
    assert set(ENVIRONMENT) <= report["environment"].keys()
    for row in report["rows"]:
        for name, kind in REQUIRED.items():
            assert isinstance(row[name], kind), name
        if row["ms_per_step"] is not None:
            assert 0 < row["p20"] <= row["ms_per_step"] <= row["p80"]
            assert row["steps_per_s"] == pytest.approx(1000 / row["ms_per_step"])


def by_variant(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in rows}


def test_run_on_the_cpu(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for kind in (bench.variants.Ours, bench.variants.Diffusers):
        chain = kind.chain
        monkeypatch.setattr(
            kind, "chain", lambda self, kind=kind, chain=chain: (order.append(kind.__name__), chain(self))
        )
    code, report = run("--batch", "1,2")
    assert code == 0
    check_schema(report)
    found = [(row["batch"], row["variant"]) for row in report["rows"]]
    assert found == [(1, "ours-eager"), (1, "diffusers"), (2, "ours-eager"), (2, "diffusers")]
    for row in report["rows"]:
        assert row["status"] == "ok"
        assert row["max_abs_diff"] <= row["bound"] == 1e-4
        assert row["rounds"] == 2
        assert row["compared_with"] == "diffusers in fp32"
        if row["variant"] == "diffusers":
            assert row["max_abs_diff"] == 0
            assert row["speedup"] == 1
    # a warm-up each, then by turns, each first once
    assert order == ["Ours", "Diffusers", "Ours", "Diffusers", "Diffusers", "Ours"] * 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bench.json"]
    printed = capsys.readouterr().out
    assert printed.count("ours-eager") == 2
    assert f"{report['rows'][0]['ms_per_step']:.3f}" in printed


def test_without_diffusers(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, report = run("--batch", "2")
    assert code == 0
    check_schema(report)
    rows = by_variant(report["rows"])
    assert rows["diffusers"]["status"] == "skipped: diffusers is not installed"
    assert rows["diffusers"]["ms_per_step"] is None
    ours = rows["ours-eager"]
    assert (ours["status"], ours["compared_with"], ours["speedup"]) == ("ok", "reference network in fp32", None)
    assert 0 <= ours["max_abs_diff"] <= 1e-4


def test_compiled_variant_that_cannot_compile(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm.loop.can_compile", lambda device: False)
    code, report = run("--batch", "1", "--compile")
    assert code == 0
    rows = by_variant(report["rows"])
    assert rows["ours-compiled"]["status"].startswith("skipped: compile=True needs a C++ compiler")
    assert rows["ours-eager"]["status"] == "ok"


def test_a_variant_that_fails_while_timed(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chain, calls = bench.variants.Diffusers.chain, []

    def failing(self: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory\nand more")
        chain(self)

    monkeypatch.setattr(bench.variants.Diffusers, "chain", failing)
    _, report = run("--batch", "1")
    check_schema(report)
    rows = by_variant(report["rows"])
    assert rows["diffusers"]["status"] == "skipped: RuntimeError: out of memory"
    assert rows["ours-eager"]["rounds"] == 2


@pytest.mark.parametrize("offset", [0.01, math.nan])
def test_other_images_have_no_speed(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offset: float
) -> None:
    monkeypatch.setattr(bench.variants, "to_unit", lambda x_0: (x_0 / 2 + 0.5).clamp(0, 1) + offset)
    _, report = run("--batch", "1")
    check_schema(report)
    row = by_variant(report["rows"])["ours-eager"]
    assert row["status"] == "skipped: FloatingPointError: its images are NaN" if offset != offset else "numerics differ"
    assert (row["ms_per_step"], row["p20"], row["p80"], row["steps_per_s"], row["speedup"]) == (None,) * 5
    line = next(line for line in capsys.readouterr().out.splitlines() if "ours-eager" in line)
    assert line.split()[4:8] == ["-"] * 4


def test_half_precision_has_its_own_bound(run: Callable[..., Any]) -> None:
    _, report = run("--batch", "1", "--dtype", "bf16")
    check_schema(report)
    rows = by_variant(report["rows"])
    assert rows["ours-eager"]["bound"] == 0.25
    assert 0 < rows["ours-eager"]["max_abs_diff"] <= 0.25
    assert rows["diffusers"]["max_abs_diff"] is None  # it draws other noise
    assert rows["diffusers"]["status"] == "ok"


@pytest.mark.parametrize(
    ("at", "statuses"),
    [
        (4, {"ok"}),  # the second batch size's warm-up
        (3, {"stopped after 1 of 2 rounds"}),
        (1, set()),
    ],
)
def test_interruption_keeps_finished_rows(
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
    statuses: set[str],
) -> None:
    chain, calls = bench.variants.Ours.chain, []

    def interrupted(self: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        chain(self)

    monkeypatch.setattr(bench.variants.Ours, "chain", interrupted)
    code, report = run("--batch", "1,2")
    assert code == 130
    check_schema(report)
    assert {row["status"] for row in report["rows"]} == statuses
    assert {row["variant"] for row in report["rows"]} == ({"ours-eager", "diffusers"} if statuses else set())
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
        (["--dtype", "fp8"], "fp8"),
        (["--device", "tpu"], "tpu"),
        (["--dtype", "tf32", "--device", "cpu"], "tf32"),
        (["--out", __file__], "is a file"),
        (["--unknown"], "--unknown"),
        (["gpu", "--unknown"], "--unknown"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_names_of_variants(tiny: Path) -> None:
    on_gpu = setting(tiny, device=torch.device("cuda", 0))
    assert [*bench.variants.variants(on_gpu, True)] == ["ours-graph", "ours-graph-compiled", "diffusers"]
    assert [*bench.variants.variants(setting(tiny), True)] == ["ours-eager", "ours-compiled", "diffusers"]


def test_default_checkpoint_is_the_demo() -> None:
    from ddpm.cli import DEMO

    assert bench.cli.DEMO == DEMO


def test_table_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    row = bench.compare.empty_row(setting(tiny), "diffusers") | {"status": "skipped: diffusers is not installed"}
    bench.report.print_table([row])
    head, line = capsys.readouterr().out.splitlines()
    assert head.index("status") == line.index("skipped")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = bench.report.write_json(tmp_path / "a" / "b.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        bench.report.write_json(path, {"x": math.nan})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(path.parent.iterdir()) == [path]


def test_random_checkpoint_loads_in_both(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    config = bench.networks.UNetConfig(
        block_out_channels=(8, 16),
        down_attention=(False, True),
        up_attention=(True, False),
        sample_size=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_norm_num_groups=4,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
        norm_eps=1e-6,
    )
    checkpoint = load_checkpoint(save_random(tmp_path, config))
    assert checkpoint.network.config == config
    stock = DDPMPipeline.from_pretrained(tmp_path).unet.state_dict()
    ours = checkpoint.network.state_dict()
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


# NVML


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A pynvml whose GPU draws 250 W and whose energy counter advances by 3 J per reading."""
    module: Any = ModuleType("pynvml")
    energy = iter(range(1_000_000, 2_000_000, 3000))
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    module.nvmlInit = module.nvmlShutdown = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-1-2": "handle"}[uuid]
    module.nvmlDeviceGetClockInfo = lambda handle, clock: {1: 1755, 2: 2619}[clock]
    module.nvmlDeviceGetPowerUsage = lambda handle: 250_000
    module.nvmlDeviceGetTemperature = lambda handle, sensor: 41
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(energy)
    module.nvmlSystemGetDriverVersion = lambda: b"580.1"
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    return module


def setting(tiny: Path, **changes: Any) -> bench.variants.Setting:
    values = {"device": CPU, "dtype": "fp32", "batch": 2, "steps": 2, "rounds": 1, **changes}
    return bench.variants.Setting(load_checkpoint(tiny), "tiny", **values)


def test_gpu_state(nvml: ModuleType) -> None:
    with GpuState(torch.device("cuda", 0)) as gpu:
        assert gpu.available
        assert gpu.read() == dict(zip(FIELDS, (1755, 2619, 250.0, 41), strict=True))
        assert (gpu.energy_j(), gpu.energy_j()) == (1000.0, 1003.0)
        assert gpu.driver() == "580.1"
        assert gpu.reasons == []


def test_gpu_state_in_rows(nvml: ModuleType, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.compare, "ENERGY_WINDOW_S", 1e-6)  # one chain
    rows: list[dict[str, Any]] = []
    with GpuState(torch.device("cuda", 0)) as gpu:
        bench.compare.compare(
            setting(tiny), compiled=False, gpu=gpu, deadline=bench.compare.Deadline(None), keep=rows.append
        )
    for row in rows:
        assert row["status"] == "ok"
        assert (row["sm_clock_mhz"], row["power_w"]) == (1755, 250.0)
        assert row["energy_j_per_image"] == 1.5  # 3 J, two images
        assert row["energy_window_s"] > 0


def test_a_missing_reading_is_none(nvml: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: str) -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", unsupported)
    with GpuState(torch.device("cuda", 0)) as gpu:
        assert (gpu.energy_j(), gpu.energy_j()) == (None, None)
        assert gpu.read()["power_w"] == 250.0
        assert gpu.reasons == ["energy: Not Supported"]


def test_without_nvml(nvml: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setattr(nvml, "nvmlInit", no_driver)
    with GpuState(torch.device("cuda", 0)) as gpu:
        assert gpu.read() == dict.fromkeys(FIELDS)
        assert gpu.reasons == ["NVML: Driver Not Loaded"]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuState(torch.device("cuda", 0)) as gpu:
        assert (gpu.energy_j(), gpu.driver()) == (None, None)
        assert gpu.reasons == ["nvidia-ml-py (pynvml) is not installed"]
    environment = bench.environment.describe_environment(CPU, GpuState(CPU))
    assert environment["gpu_state"] == dict.fromkeys(FIELDS)
    assert environment["gpu_state_missing"] == "no GPU in use"


# bench gpu


@pytest.fixture
def run_gpu(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any]]]:
    """`bench gpu` with the CPU in the place of a GPU, on the tiny checkpoint, and with pytest's report given."""
    monkeypatch.setattr(bench.gpu, "find_device", lambda: CPU)
    monkeypatch.setattr(bench.gpu, "networks", lambda folder: iter([("tiny", tiny)]))
    monkeypatch.setattr(bench.gpu, "STEPS", 2)
    monkeypatch.setattr(bench.gpu, "ROUNDS", 1)
    monkeypatch.setattr(bench.gpu, "BATCHES", (1,))
    monkeypatch.setattr(bench.gpu, "DTYPES", ("fp32", "tf32"))

    def call(cases: str, *options: str, problem: str | None = None) -> tuple[int, dict[str, Any]]:
        def run_pytest(junit: Path, seconds: float) -> str | None:
            junit.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
            return problem

        monkeypatch.setattr(bench.gpu_tests, "run_pytest", run_pytest)
        code = main(["gpu", "--no-compile", "--out", str(tmp_path), *options])
        return code, json.loads((tmp_path / "gpu.json").read_text())

    return call


PASSED = '<testcase classname="a" name="passes"/>'
SKIPPED = '<testcase classname="a" name="skips"><skipped/></testcase>'
FAILED = '<testcase classname="a" name="fails"><failure/></testcase>'


def test_gpu_run(run_gpu: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_gpu(PASSED + SKIPPED)
    assert code == 0
    check_schema(report)
    assert {name: report["tests"][name] for name in ("passed", "failed", "skipped")} == {
        "passed": 1,
        "failed": 0,
        "skipped": 1,
    }
    rows = {(row["dtype"], row["variant"]): row for row in report["rows"]}
    assert rows["fp32", "ours-eager"]["status"] == "ok"
    assert rows["tf32", "ours-eager"]["status"].startswith("skipped: dtype 'tf32' exists on a GPU only")
    assert "GPU tests: 1 passed, 0 failed, 1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cases", "problem"), [("", None), (SKIPPED, None), (PASSED + FAILED, None), (PASSED, "stopped after 1 s")]
)
def test_gpu_run_without_passing_tests(run_gpu: Callable[..., Any], cases: str, problem: str | None) -> None:
    code, report = run_gpu(cases, "--seconds", "0", problem=problem)
    assert code == 1
    assert report["tests"]["problem"] == problem
    assert {row["status"] for row in report["rows"]} == {"skipped: out of time"}


def test_gpu_run_interrupted(run_gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(setting: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.gpu, "compare", interrupted)
    code, report = run_gpu(PASSED)
    assert code == 130
    assert report["tests"]["passed"] == 1


def test_gpu_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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
