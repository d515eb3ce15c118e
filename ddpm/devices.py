"""Where a network runs, in which precision, and how much memory is left there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of Linux's control groups, version 2
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to sample on.

    Raises:
        ValueError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not one of auto, cpu, cuda, cuda:0 ...") from error
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise ValueError(f"device {device!r} is not supported; expected auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch finds no GPU here; use device='cpu' or 'auto'")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """A key of DTYPES.

    Raises:
        ValueError: unknown, or bf16 on a GPU without it.
    """
    if dtype == "auto":
        return "fp32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if dtype == "tf32" and device.type == "cpu":
        raise ValueError("dtype 'tf32' exists on a GPU only; use 'fp32' on the CPU")
    if dtype == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError("dtype 'bf16' needs a GPU of compute capability 8.0 or newer; use 'fp16'")
    return dtype


def available_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        # What torch has reserved and does not use is free too: without it, a second call would find less memory.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every platform can say
        return 4 * 2**30


def total_memory() -> int:
    """Bytes that this process may have on the CPU: the machine's, or what a container leaves of them."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every platform can say
        found = 8 * 2**30
    try:
        limit = CONTAINER_LIMIT.read_text().strip()
    except OSError:
        return found
    return min(found, int(limit)) if limit.isdecimal() else found


@contextmanager
def ordinary_modes(device: torch.device) -> Iterator[None]:
    """No gradients; and neither the caller's inference mode, whose tensors are of no use after it, nor autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
