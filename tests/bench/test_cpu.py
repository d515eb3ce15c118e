"""`python -m bench cpu` on a tiny network."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.cli
import bench.cpu
import bench.variants
from bench.cli import main
from bench.networks import save_random
from bench.variants import Setting
from ddpm.checkpoints import load_checkpoint
from ddpm.unet import UNetConfig
from tests.helpers import save_tiny

CPU = torch.device("cpu")
OPENVINO = importlib.util.find_spec("openvino") is not None
QUICK = ("--steps", "2", "--rounds", "2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def report(folder: Path) -> dict[str, Any]:
    assert [path.name for path in folder.iterdir()] == ["cpu.json"]
    return json.loads((folder / "cpu.json").read_text())


def test_on_a_checkpoint(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["cpu", str(tiny), *QUICK, "--no-compile", "--batch", "1,2", "--out", str(out)]) == 0
    found = report(out)
    rows = {(row["batch"], row["variant"]): row for row in found["rows"]}
    assert list(rows) == [(b, name) for b in (1, 2) for name in ("ours-eager", "diffusers", "openvino")]
    for (batch, name), row in rows.items():
        if name == "openvino" and not OPENVINO:
            assert row["status"] == "skipped: openvino is not installed"
            continue
        assert row["status"] == "ok"
        assert row["max_abs_diff"] <= row["bound"] == 1e-4
        assert row["checkpoint"] == tiny.name
        if name != "ours-eager":
            ratio = row["ms_per_step"] / rows[batch, "ours-eager"]["ms_per_step"]
            assert found["ratios"][str(batch)][name] == pytest.approx(ratio)
    assert found["environment"]["threads"] == torch.get_num_threads()
    assert "batch 1: " in capsys.readouterr().out


def test_without_openvino(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert main(["cpu", str(tiny), *QUICK, "--no-compile", "--batch", "1", "--out", str(tmp_path / "out")]) == 0
    found = report(tmp_path / "out")
    assert {row["variant"]: row["status"] for row in found["rows"]} == {
        "ours-eager": "ok",
        "diffusers": "ok",
        "openvino": "skipped: openvino is not installed",
    }
    assert list(found["ratios"]["1"]) == ["diffusers"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_compiled_diffusers_has_frozen_weights(tmp_path: Path) -> None:
    """It draws the pipeline's images, and its weights are constants."""
    config = UNetConfig(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_attention=(False, False),
        up_attention=(False, False),
        norm_num_groups=4,
        mid_norm_num_groups=4,
        attention_head_dim=8,
        sample_size=(8, 8),
    )
    checkpoint = load_checkpoint(save_random(tmp_path / "tiny", config))
    setting = Setting(checkpoint, "tiny", CPU, "fp32", 1, 2, 1, peers=True)
    made = bench.variants.variants(setting, True)
    assert list(made) == ["ours-eager", "ours-compiled", "diffusers", "diffusers-compiled", "openvino"]
    variant = made["diffusers-compiled"]()
    images = variant.images()
    assert (images - bench.variants.Diffusers(setting).images()).abs().max() <= 1e-4
    for weight in variant.pipe.unet.parameters():
        if weight.ndim == 4:  # packed for oneDNN; small ones are read where they lie
            weight.data.zero_()
    assert torch.equal(variant.images(), images)


@pytest.mark.skipif(not OPENVINO, reason="openvino is not installed")
def test_openvino_draws_the_pipelines_images(tiny: Path) -> None:
    setting = Setting(load_checkpoint(tiny), "tiny", CPU, "fp32", 2, 5, 1, peers=True)
    variant = bench.variants.DiffusersOpenVINO(setting)
    difference = variant.images() - bench.variants.Diffusers(setting).images()
    assert 0 < difference.abs().max() <= 1e-4  # equal would mean that it did not run


def test_random_weights_without_a_checkpoint(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.cpu, "save_random", lambda path: shutil.copytree(tiny, path))
    threads = torch.get_num_threads()
    try:
        arguments = ("--threads", "1", "--no-compile", "--batch", "1", "--out", str(tmp_path / "out"))
        assert main(["cpu", *QUICK, *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    found = report(tmp_path / "out")
    assert {row["checkpoint"] for row in found["rows"]} == {"cifar10-32 (random weights)"}
    assert found["environment"]["threads"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "--batch '0': expected positive integers"),
        (("--rounds", "0"), "--rounds 0: expected a positive integer"),
        (("--threads", "-1"), "--threads -1: expected a positive integer"),
        (("--fast",), "unrecognized arguments: --fast"),
        (("--out", __file__), "is a file; expected a directory"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_keeps_finished_rows(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = bench.cli.compare

    def interrupted(setting: Setting, **options: Any) -> None:
        if setting.batch == 2:
            raise KeyboardInterrupt
        compare(setting, **options)

    monkeypatch.setattr(bench.cli, "compare", interrupted)
    assert main(["cpu", str(tiny), *QUICK, "--no-compile", "--batch", "1,2", "--out", str(tmp_path / "out")]) == 130
    assert {row["batch"] for row in report(tmp_path / "out")["rows"]} == {1}
