"""The kernels' package: importable without Triton, under one name only, and independent of the rest of the product."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddpm.kernels import (
    backend,
    group_norm_silu,  # noqa: F401 -- each registers its op
    philox,  # noqa: F401
    reverse_step,  # noqa: F401
    rms_norm_silu,  # noqa: F401
)

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # any import of it fails
import warnings
import torch
from types import SimpleNamespace
from ddpm.kernels import backend
from ddpm.kernels.group_norm_silu import group_norm_silu
from ddpm.kernels.philox import philox_normal
from ddpm.kernels.reverse_step import COLUMNS, NONFINITE_NONE, reverse_step
from ddpm.kernels.rms_norm_silu import rms_norm_silu

assert not backend.HAVE_TRITON
z = philox_normal(torch.tensor([1, 2]), (3, 4, 4), 0, 0)
weight = torch.ones(3)
y = group_norm_silu(z, 3, weight, weight, 1e-5)
y = rms_norm_silu(y, weight, residual=z)
flag = torch.tensor([NONFINITE_NONE])
reverse_step(z, y, torch.ones(1, len(COLUMNS)), torch.tensor([0]), flag, seeds=torch.tensor([1, 2]))
assert z.isfinite().all() and int(flag) == NONFINITE_NONE
torch.ops.ddpm.philox_normal(torch.tensor([1, 2]), 3, 4, 4, torch.tensor([0]), 0)

on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert not backend.takes_kernel(on_gpu) and not backend.takes_kernel(on_gpu)
assert ["Triton is not installed" in str(w.message) for w in caught] == [True], caught
print("served by the references")
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(backend.INTERPRET, reason="once is enough")
def test_without_triton_the_references_serve():
    done = run_python(WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "served by the references\n"


@pytest.mark.skipif(backend.INTERPRET, reason="once is enough")
def test_it_has_one_name():
    done = run_python("import kernels")
    assert done.returncode != 0
    assert "ImportError: import this package as ddpm.kernels" in done.stderr


def test_it_imports_nothing_of_the_product():
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
                assert node.level <= 1, file
            assert not [m for m in modules if m.split(".")[0] in ("ddpm", "kernels")], file


def test_who_serves_a_call():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert backend.uses_triton(gpu) == backend.HAVE_TRITON
    assert backend.uses_triton(cpu) == backend.INTERPRET
    assert backend.takes_kernel(SimpleNamespace(device=cpu)) == backend.INTERPRET


def test_pixel_strides():
    x = torch.empty(2, 8, 6, 4)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert backend.pixel_stride(x) == 1
    assert backend.pixel_stride(nhwc) == 8
    assert backend.pixel_stride(nhwc[:, 2:5]) == 8
    assert backend.pixel_stride(x[:, :, 1:3]) == 1
    assert backend.pixel_stride(x[:, :, :, 1:3]) is None
    assert backend.pixel_stride(x[:, :, :, 1:2]) == 4
    assert backend.pixel_stride(x[:, :, 1:2, ::2]) == 2


def test_results_lie_as_their_arguments_do():
    x = torch.empty(2, 8, 6, 4)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert backend.memory_format(x) == torch.contiguous_format
    assert backend.memory_format(nhwc) == backend.memory_format(nhwc[:, 2:5]) == torch.channels_last
    assert backend.memory_format(x[:, :, ::2, ::2]) == torch.contiguous_format
    # One channel lies both ways.
    assert backend.memory_format(nhwc[:, :1]) == torch.contiguous_format


def test_a_gpu_is_asked_for_its_size_once(monkeypatch):
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(
            name="RTX", multi_processor_count=84, shared_memory_per_block_optin=101376, warp_size=32, major=8, minor=6
        )

    backend.gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    try:
        assert [backend.sm_count(torch.device("cuda", 3)) for _ in range(3)] == [84] * 3
        assert backend.target(torch.device("cuda", 3)) == backend.Target("RTX", 84, 101376, (8, 6))
        assert len(asked) == 1
        assert backend.sm_count(torch.device("cpu")) == backend.DEFAULT_SM_COUNT
    finally:
        backend.gpu.cache_clear()


def test_the_meta_device_stands_for_an_assumed_gpu():
    meta, a10 = torch.device("meta"), backend.Target("A10", 72, 101376, (8, 6))
    assert not backend.uses_triton(meta)
    with backend.assume(a10):
        assert backend.uses_triton(meta)
        assert backend.target(meta) == a10
        assert backend.is_dispatched(torch.empty(1, device=meta))
    assert not backend.uses_triton(meta)


def test_an_op_says_what_it_costs():
    """Counted on the meta device: launches, programs, and the bytes beyond its arguments and results."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with backend.assume(backend.H100):
        seeds = tensor(2, dtype=torch.int64)
        assert backend.works["philox_normal"](seeds, 3, 32, 32, tensor(1), 0) == backend.Work(1, 2 * 3, 0)

        x = tensor(2, 3, 32, 32)
        flags = [tensor(1), tensor(1, dtype=torch.int64)]
        arguments = [x, x, tensor(1000, 15), *flags, "clamp", "fixed", "float32", seeds]
        one = backend.works["reverse_step"](*arguments, None, None, None, None, None)
        assert one == backend.Work(1, 2 * 6, 0, -(999 * 15 * 4 + 2 * 8))
        # a preview is written and not read, though it is a mutated argument
        preview = backend.works["reverse_step"](*arguments, None, x, None, None, None)
        assert preview.extra_bytes == one.extra_bytes - x.nbytes

        weight = tensor(64)
        small, large = tensor(1, 64, 8, 8, dtype=torch.float16), tensor(1, 64, 128, 128, dtype=torch.float16)
        work = backend.works["group_norm_silu"]
        assert work(small, 32, weight, weight, 1e-5, None, None, None, True).launches == 1
        twice = work(large, 32, weight, weight, 1e-5, None, None, None, True)
        partials = 2 * 2 * 32 * (splits := 32) * 4
        assert (twice.launches, twice.extra_bytes) == (2, large.nbytes + partials)
        assert (twice.programs, twice.form) == (splits * 4, "two passes")
        assert backend.works["rms_norm_silu"](large, weight, None, None, None, None, True).launches == 1
        assert backend.works["rms_norm_silu"](large, weight, None, None, None, None, True).extra_bytes == 0


def test_an_op_costs_one_launch_unless_it_says_more(monkeypatch):
    def keep(name: str, work=None) -> backend.Work:
        nothing = SimpleNamespace(define=lambda *_: None, impl=lambda *_: None)
        monkeypatch.setattr(backend, "_library", nothing)
        monkeypatch.setattr(torch.library, "register_fake", lambda *_, **__: None)
        monkeypatch.setattr(backend, "works", {})
        backend.register(f"{name}(Tensor x) -> Tensor", *(lambda x: x,) * 3, work=work)
        return backend.works[name](torch.empty(1))

    assert keep("plain") == backend.Work(1, 0, 0)
    assert keep("counted", lambda x: backend.Work(2, len(x), 5)) == backend.Work(2, 1, 5)


def test_a_profiler_sees_operators():
    """What an operator launches, it finds; without one, a call is spared the dispatcher."""
    x = torch.zeros(1)
    assert not backend.is_dispatched(x)
    with torch.profiler.profile():
        assert backend.is_dispatched(x)
    assert not backend.is_dispatched(x)
    assert backend.is_dispatched(torch.zeros(1, device="meta"))
