"""`python -m bench profile` on a tiny network; a GPU's events are given."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from torch.autograd import DeviceType

import bench.profile
from bench.cli import main
from bench.environment import ROOT
from bench.events import HOST, IDLE, LAYER, NO_LAYER, by_kernel, by_layer
from bench.profile import ranges_around_layers
from ddpm.checkpoints import load_checkpoint
from ddpm.fused.layers import GroupNormSiLU
from ddpm.sampler import Sampler

QUICK = ("--device", "cpu", "--steps", "2")
SCHEMA = json.loads((ROOT / "bench" / "schemas" / "profile.json").read_text())


def run(tiny: Path, out: Path, *options: str) -> dict[str, Any]:
    assert main(["profile", str(tiny), *QUICK, "--out", str(out), *options]) == 0
    content = json.loads((out / "profile.json").read_text())
    jsonschema.validate(content, SCHEMA)
    return content


def layers_of(path: Path) -> set[str]:
    sampler = Sampler(load_checkpoint(path), device="cpu", compile=False)
    return {name for name, module in sampler.network.named_modules() if hasattr(module, "describe")} - {"time"}


def test_a_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    content = run(tiny, tmp_path)
    assert (content["schema"], content["kind"], content["batch"], content["steps"]) == (1, "profile", 1, 2)
    for title in ("layers", "kernels"):
        rows = content[title]
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert all(row["ms_per_step"] >= 0 for row in rows)
        assert [row["ms_per_step"] for row in rows] == sorted((row["ms_per_step"] for row in rows), reverse=True)
    layers = {row["name"]: row for row in content["layers"]}
    assert layers_of(tiny) <= layers.keys()
    assert all(layers[name]["calls_per_step"] == 1 for name in layers_of(tiny))
    assert layers["conv_out"]["what"].startswith("oneDNN convolution 3x3")
    assert layers[HOST]["ms_per_step"] > 0
    kernels = {row["name"]: row for row in content["kernels"]}
    assert kernels["aten::native_group_norm"]["calls_per_step"] >= 5
    assert not any(name.startswith((LAYER, "ddpm ")) for name in kernels)
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"ddpm prepare", "ddpm step 0", "ddpm step 1", "aten::native_group_norm"} <= names
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json", "profile.html", "trace.json.gz"}
    assert (tmp_path / "profile.html").read_text().count("<picture") == 2
    printed = capsys.readouterr().out
    assert "by layer" in printed
    assert "█" in printed


def test_a_slow_layer_is_found(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pages: None) -> None:
    """Also one inside another, whose own time it is not."""
    forward = GroupNormSiLU.forward

    def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        if self is slowed[-1]:
            time.sleep(0.5)
        return forward(self, *arguments, **options)

    slowed: list[Any] = [None]
    enter = bench.profile.ranges_around_layers

    def choosing(network: Any) -> Any:
        slowed.append(network.get_submodule("mid_resnets.1.conv1.norm"))
        return enter(network)

    monkeypatch.setattr(GroupNormSiLU, "forward", slow)
    monkeypatch.setattr(bench.profile, "ranges_around_layers", choosing)
    content = run(tiny, tmp_path)
    first, second = content["layers"][:2]
    assert first["name"] == "mid_resnets.1.conv1.norm"
    assert first["ms_per_step"] > 500 > second["ms_per_step"]


def test_hooks_are_removed(tiny: Path) -> None:
    network = Sampler(load_checkpoint(tiny), device="cpu", compile=False).network

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())

    def failing() -> None:
        with ranges_around_layers(network):
            assert hooks() > before
            raise RuntimeError("on the way")

    before = hooks()
    with pytest.raises(RuntimeError, match="on the way"):
        failing()
    assert hooks() == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_a_compiled_step_has_no_layers(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But its generated kernels, by name, and none of the compiler's own ranges."""
    content = run(tiny, tmp_path, "--compile")
    assert content["layers"] == []
    names = [row["name"] for row in content["kernels"]]
    assert any("cpp_fused" in name for name in names)
    assert not any("CompiledFxGraph" in name or "Torch-Compiled" in name for name in names)
    assert "a compiled step has no layers" in capsys.readouterr().out


def test_interruption_keeps_the_finished_table(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.profile, "profile_layers", interrupted)
    assert main(["profile", str(tiny), *QUICK, "--out", str(tmp_path)]) == 130
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["kernels"]
    assert content["layers"] == []
    printed = capsys.readouterr().out
    assert "by kernel" in printed
    assert "interrupted; the finished tables are in" in printed


def test_long_names_are_cut_on_the_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "n" * 60 + "_forward", "ms_per_step": 1.0, "share": 1.0, "calls_per_step": 1.0, "what": ""}
    content = {"checkpoint": "demo", "dtype": "fp32", "batch": 1, "compiled": True, "kernels": [row], "layers": []}
    content["environment"] = {"gpu": "H100", "torch": "2.13.0"}
    bench.profile.print_profile(content, 20)
    assert "n" * 47 + "…" in capsys.readouterr().out
    assert bench.profile.table("kernel", [row])[1][0][0] == row["name"]


# A GPU's events


def event(name: str, us: float, *children: Any, on_gpu: bool = False, start: float = 0.0) -> SimpleNamespace:
    """Of the host, having launched `us` microseconds of work; or of the GPU, having run for so long."""
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU,
        time_range=SimpleNamespace(start=start, end=start + us, elapsed_us=lambda: us),
        device_time_total=us,
        cpu_time_total=1.0,
        self_cpu_time_total=1.0,
        cpu_children=list(children),
    )


def test_kernels_of_a_gpu() -> None:
    events = [event("reverse_step", 20, on_gpu=True, start=195), event("aten::conv2d", 100)]
    events += [event("conv_kernel", us, on_gpu=True, start=start) for us, start in ((30, 100), (50, 150))]
    events += [event("ddpm step 0", 900, on_gpu=True, start=50)]
    found = by_kernel(events, steps=2, on_gpu=True)
    assert [(cost.name, cost.ms, cost.calls) for cost in found] == [
        ("conv_kernel", 0.04, 1),
        ("reverse_step", 0.01, 0.5),
        (IDLE, 0.01, 0),  # from 130 to 150; the reverse step begins before the convolution ends
    ]
    assert by_kernel([], steps=2, on_gpu=True) == []


def test_layers_of_a_gpu() -> None:
    """Nested layers count once; what a step launches beside its layers is named by its operator."""
    norm = event("layer mid.conv.norm", 10, event("ddpm::group_norm_silu", 10))
    inner = event("layer mid.conv", 40, norm, event("ddpm::conv", 30))
    other = event("autograd", 6, event("layer inside", 6))
    parts = event("layer mid", 68, inner, event("aten::add", 28)), event("reverse_step", 20), other
    step = event("ddpm step 0", 94, *parts)
    on_gpu = [event("kernel", 99, on_gpu=True), event("ddpm step 0", 900, on_gpu=True)]
    found = by_layer([step, inner, norm, *on_gpu], 1, {"mid.conv": "Triton"}, on_gpu=True)
    assert [(cost.name, cost.ms, cost.what) for cost in found] == [
        ("mid.conv", pytest.approx(0.030), "Triton"),
        ("mid", pytest.approx(0.028), ""),
        ("reverse_step", pytest.approx(0.020), ""),
        ("mid.conv.norm", pytest.approx(0.010), ""),
        ("inside", pytest.approx(0.006), ""),
        (NO_LAYER, pytest.approx(0.005), ""),
        ("autograd", 0, ""),
    ]


@pytest.mark.gpu
def test_on_a_gpu(tiny: Path, tmp_path: Path) -> None:
    assert main(["profile", str(tiny), "--steps", "10", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "profile.json").read_text())
    kernels = {row["name"] for row in content["kernels"]}
    assert any("reverse_step" in name for name in kernels)
    assert layers_of(tiny) <= {row["name"] for row in content["layers"]}
    by_kernels, by_layers = (sum(row["ms_per_step"] for row in content[name]) for name in ("kernels", "layers"))
    assert by_layers == pytest.approx(by_kernels, rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "101"], "--steps 101 is more than the 100 steps"),
        (["--batch", "0"], "--batch 0"),
        (["--top", "-1"], "--top -1"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(tiny), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
