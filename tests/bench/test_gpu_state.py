"""NVML, faked: what is read, what is missing, and what reaches the rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import bench.contestant
import bench.environment
from bench.gpu_state import FIELDS, THROTTLES, GpuState, summarize
from bench.limits import Demand
from bench.measure import Comparison, Plan, expected_images
from bench.setting import Setting

CPU = torch.device("cpu")
READING = (1755, 2619, 250.0, 700.0, 41, "none")


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
    module.nvmlDeviceGetEnforcedPowerLimit = lambda handle: 700_000
    module.nvmlDeviceGetTemperature = lambda handle, sensor: 41
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(energy)
    module.nvmlSystemGetDriverVersion = lambda: b"580.1"
    for bit, name in enumerate(THROTTLES):
        setattr(module, f"nvmlClocksThrottleReason{name}", 1 << bit)
    module.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 1 << 40  # idle, say: none of THROTTLES
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    return module


def test_readings(nvml: Any) -> None:
    with GpuState(torch.device("cuda", 0)) as gpu:
        assert gpu.available
        assert gpu.read() == dict(zip(FIELDS, READING, strict=True))
        assert (gpu.energy_j(), gpu.energy_j()) == (1000.0, 1003.0)
        assert gpu.driver() == "580.1"
        assert gpu.reasons == []
        nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0b1001
        assert gpu.read()["throttling"] == "power cap, thermal (hardware)"


def test_names_are_nvmls() -> None:
    """The fake has what the real package has."""
    pynvml = pytest.importorskip("pynvml")
    for name in THROTTLES:
        assert getattr(pynvml, f"nvmlClocksThrottleReason{name}") > 0
    for name in ("CurrentClocksEventReasons", "EnforcedPowerLimit", "TotalEnergyConsumption", "PowerUsage"):
        assert callable(getattr(pynvml, f"nvmlDeviceGet{name}"))


def test_summary_of_readings() -> None:
    rows = [
        {"sm_clock_mhz": mhz, "memory_clock_mhz": None, "power_w": 1.0, "power_limit_w": 700.0} for mhz in (1, 5, 6)
    ]
    for row, temperature, throttling in zip(rows, (40, 44, 41), ("none", "power cap", "sync boost"), strict=True):
        row |= {"temperature_c": temperature, "throttling": throttling}
    assert summarize(rows) == dict(zip(FIELDS, (5, None, 1, 700, 44, "power cap, sync boost"), strict=True))


def test_energy_in_rows(
    nvml: ModuleType, tiny_setting: Setting, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.contestant, "ENERGY_WINDOW_S", 1e-6)  # one chain
    rows: list[dict[str, Any]] = []
    plan, setting = Plan(tmp_path / "log"), replace(tiny_setting, only=("ours-eager", "diffusers"))
    with GpuState(torch.device("cuda", 0)) as gpu:
        comparison = Comparison(setting, plan, gpu, Demand(1, 1), [])
        comparison.run(expected_images(setting, plan), rows.append)
    for row in rows:
        assert row["status"] == "ok"
        assert [row[name] for name in FIELDS] == [*READING]
        assert row["energy_j_per_image"] == 750  # 3 J for two images of two steps
        assert row["energy_window_s"] > 0
        assert row["limit_ms"] is None  # no ceiling was measured


def test_a_missing_reading_is_none(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
