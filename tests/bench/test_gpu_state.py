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

import bench.environment
import bench.measure
from bench.contestant import Failed
from bench.gpu_state import FIELDS, THROTTLES, GpuState, summarize
from bench.measure import Plan
from bench.run import not_measured
from bench.setting import Setting
from tests.bench.conftest import Here, compared

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
    of_a_device = ("HandleByUUID", "HandleByIndex", "ClockInfo", "PowerUsage", "EnforcedPowerLimit", "Temperature")
    for name in (*of_a_device, "TotalEnergyConsumption", "CurrentClocksEventReasons"):
        assert callable(getattr(pynvml, f"nvmlDeviceGet{name}"))
    for name in ("Init", "Shutdown", "SystemGetDriverVersion"):
        assert callable(getattr(pynvml, f"nvml{name}"))
    constants = (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_TEMPERATURE_GPU)
    assert constants == (1, 2, 0)  # as the fake has them


def test_summary_of_readings() -> None:
    rows = [
        {"sm_clock_mhz": mhz, "memory_clock_mhz": None, "power_w": 1.0, "power_limit_w": 700.0} for mhz in (1, 5, 6)
    ]
    for row, temperature, throttling in zip(rows, (40, 44, 41), ("none", "power cap", "sync boost"), strict=True):
        row |= {"temperature_c": temperature, "throttling": throttling}
    assert summarize(rows) == dict(zip(FIELDS, (5, None, 1, 700, 44, "power cap, sync boost"), strict=True))


def test_energy_in_rows(
    nvml: Any, tiny_setting: Setting, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = iter((1500, 1700) * 2)
    monkeypatch.setattr(nvml, "nvmlDeviceGetClockInfo", lambda handle, clock: next(clocks) if clock == 1 else 2619)

    class Metered(Here):
        """Three chains in a window of a second, while its clocks are read twice."""

        waiting: Any = None

        def chains(self, window_s: float) -> tuple[int, float]:
            assert window_s >= 1
            self.waiting()
            self.waiting()
            return 3, 1.0

    monkeypatch.setattr(bench.measure, "enter", Metered)
    setting = replace(tiny_setting, only=("ours-eager", "diffusers"))
    rows = compared(setting, Plan(tmp_path / "log"), gpu=torch.device("cuda", 0))
    assert [row["status"] for row in rows] == ["ok", "ok"]
    for row in rows:
        assert [row[name] for name in FIELDS] == [1600, *READING[1:]]
        assert row["energy_j_per_image"] == 250  # 3 J for three chains of two images and two steps
        assert row["energy_window_s"] == 1
        assert row["limit_ms"] is None  # no ceiling was measured


def test_who_fails_in_the_window_leaves_the_gpu_to_the_next(
    nvml: Any, tiny_setting: Setting, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    class Slow(Here):
        def chains(self, window_s: float) -> tuple[int, float]:
            windows.append([*closed])
            raise Failed("no answer after 600 s")

        def close(self) -> None:
            closed.append(type(self.contestant.variant).__name__)

    windows: list[list[str]] = []
    monkeypatch.setattr(bench.measure, "enter", Slow)
    setting = replace(tiny_setting, only=("ours-eager", "diffusers"))
    rows = compared(setting, Plan(tmp_path / "log"), gpu=torch.device("cuda", 0))
    assert windows == [["Reference"], ["Reference", "Ours"]]
    assert [(row["status"], row["energy_j_per_image"]) for row in rows] == [("ok", None)] * 2


def test_a_missing_reading_is_none(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: str) -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", unsupported)
    with GpuState(torch.device("cuda", 0)) as gpu:
        assert (gpu.energy_j(), gpu.energy_j()) == (None, None)
        assert gpu.read()["power_w"] == 250.0
        assert gpu.reasons == ["energy: Not Supported"]
        assert not_measured(torch.device("cuda", 0), gpu) == ["Not read from the GPU: energy: Not Supported."]


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


def test_environment_of_a_gpu(nvml: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda", 0)
    with GpuState(device) as gpu:
        found = bench.environment.describe_environment(device, gpu)
    names = ("device", "gpu", "compute_capability", "driver", "gpu_state_missing")
    assert [found[name] for name in names] == ["cuda:0", "NVIDIA H100 80GB HBM3", "9.0", "580.1", None]
    assert found["gpu_state"] == dict(zip(FIELDS, READING, strict=True))


def test_a_torch_without_uuids(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", {1: "handle"}.__getitem__, raising=False)
    with GpuState(torch.device("cuda", 1)) as gpu:
        assert gpu.available
