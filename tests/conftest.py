"""Marks decide where a test runs: `interpret` in Triton's interpreter, in a process of its own; `gpu` on a CUDA GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads the variable when a kernel is decorated: a process interprets all kernels or none.
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


# torch keeps the functions that heed a default device from its first use on: it must not find one that a test replaced.
with torch.device("meta"):
    torch.empty(0)

# Plans that somebody measured on this machine are not what tests judge; some tests set it themselves.
os.environ["DDPM_PLANS"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_interpreter = pytest.mark.skip(reason="needs a process with TRITON_INTERPRET=1")
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU and a process without TRITON_INTERPRET")
    for item in items:
        if item.get_closest_marker("interpret") and not INTERPRETER:
            item.add_marker(no_interpreter)
        if item.get_closest_marker("gpu") and (INTERPRETER or not torch.cuda.is_available()):
            item.add_marker(no_gpu)
