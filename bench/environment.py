"""What a measurement was made with and on."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.gpu_state import GpuState

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "diffusers", "openvino", "numpy", "safetensors", "nvidia-ml-py")


def describe_environment(device: torch.device, gpu: GpuState, threads: int | None = None) -> dict[str, Any]:
    """Versions, hardware, commit, date; None for what is not installed or cannot be told."""
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    driver = gpu.driver() or (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None
    )
    state = gpu.read()
    return {
        **{name.replace("-", "_"): installed_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": threads or torch.get_num_threads(),
        "device": str(device),
        "gpu": properties.name if properties else None,
        "compute_capability": f"{properties.major}.{properties.minor}" if properties else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "driver": driver.splitlines()[0] if driver else None,
        "gpu_state": state,
        "gpu_state_missing": "; ".join(gpu.reasons) or None,
        "commit": _output("git", "rev-parse", "--verify", "HEAD"),
        "uncommitted_changes": _has_changes(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """From /proc/cpuinfo where it exists; platform's answer is often just the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _has_changes() -> bool | None:
    status = _output("git", "status", "--porcelain")
    return None if status is None else bool(status)


def _output(*command: str) -> str | None:
    """What a command prints, stripped; None if it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
