"""Where the kernels run, and memory that shows what a kernel forgot to write."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpret, id="interpreter"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """The device of a Triton kernel's tensors: the CPU in the interpreter's process, else the GPU."""
    return request.param


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN: what a kernel should have written, and did not, fails every comparison."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def allocate_poisoned(*args, **kwargs) -> Tensor:
        tensor = allocate(*args, **kwargs)
        # Fake tensors (dry runs, tracing) hold nothing.
        if type(tensor) is Tensor and tensor.is_floating_point() and not torch.compiler.is_compiling():
            tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned
