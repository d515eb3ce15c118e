"""Clocks, power, temperature and energy of the GPU, read through NVML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

FIELDS = ("sm_clock_mhz", "memory_clock_mhz", "power_w", "power_limit_w", "temperature_c", "throttling")
# NVML's reasons for low clocks, by the names of its bits; idleness, and clocks that someone set, are left out.
THROTTLES = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "thermal (software)",
    "HwThermalSlowdown": "thermal (hardware)",
    "HwPowerBrakeSlowdown": "power brake",
    "SyncBoost": "sync boost",
}
NO_THROTTLING = "none"


class GpuState:
    """Readings of one device; every reading is None where NVML cannot give it. A context manager.

    Args:
        device: a CPU has no readings.

    Attributes:
        reasons: why readings are missing, one sentence each; empty if none is.
    """

    def __init__(self, device: torch.device):
        self.reasons: list[str] = []
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            self.reasons.append("no GPU in use")
            return
        try:
            import pynvml
        except ImportError:
            self.reasons.append("nvidia-ml-py (pynvml) is not installed")
            return
        try:
            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = _handle(pynvml, device)
        except Exception as error:  # a wrong or absent driver shows in several types
            self.reasons.append(f"NVML: {error}")

    def __enter__(self) -> GpuState:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._nvml is not None:
            self._read("shutdown", lambda nvml, handle: nvml.nvmlShutdown())
            self._nvml = self._handle = None

    @property
    def available(self) -> bool:
        return self._handle is not None

    def read(self) -> dict[str, Any]:
        """The readings at this moment, by FIELDS; throttling is "none" or the reasons, joined by commas."""
        return {
            "sm_clock_mhz": self._read("SM clock", lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
            "memory_clock_mhz": self._read("memory clock", lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM)),
            "power_w": self._read("power", lambda n, h: n.nvmlDeviceGetPowerUsage(h) / 1000),
            "power_limit_w": self._read("power limit", lambda n, h: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1000),
            "temperature_c": self._read(
                "temperature", lambda n, h: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)
            ),
            "throttling": self._read("throttling", _throttling),
        }

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded."""
        return self._read("energy", lambda n, h: n.nvmlDeviceGetTotalEnergyConsumption(h) / 1000)

    def driver(self) -> str | None:
        version = self._read("driver version", lambda n, h: n.nvmlSystemGetDriverVersion())
        return version.decode() if isinstance(version, bytes) else version

    def _read(self, what: str, reading: Callable[[Any, Any], Any]) -> Any:
        if not self.available:
            return None
        try:
            return reading(self._nvml, self._handle)
        except Exception as error:  # a virtual GPU, for one, supports only some readings
            reason = f"{what}: {error}"
            if reason not in self.reasons:
                self.reasons.append(reason)
            return None


def summarize(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """Of readings while something ran: medians; the highest temperature; every reason for throttling that was seen."""
    found: dict[str, Any] = {}
    for name in FIELDS:
        values = [reading[name] for reading in readings if reading[name] is not None]
        if not values:
            found[name] = None
        elif name == "throttling":
            reasons = {reason for value in values for reason in value.split(", ")} - {NO_THROTTLING}
            found[name] = ", ".join(sorted(reasons)) or NO_THROTTLING
        else:
            found[name] = float(max(values) if name == "temperature_c" else np.median(values))
    return found


def _throttling(nvml: Any, handle: Any) -> str:
    bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    found = [text for name, text in THROTTLES.items() if bits & getattr(nvml, f"nvmlClocksThrottleReason{name}")]
    return ", ".join(found) or NO_THROTTLING


def _handle(nvml: Any, device: torch.device) -> Any:
    """By UUID: NVML counts every GPU of the machine, torch those of CUDA_VISIBLE_DEVICES."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return nvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
