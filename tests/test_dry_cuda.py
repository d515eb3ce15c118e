"""The dry run notices the mistakes that it is there for: a check that cannot fail shows nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.dry_cuda import CHIPS, CaptureBroken, Dry, HostRead, dry_cuda

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, does not interpret")


@triton.jit
def silu_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y + i, v * tl.sigmoid(v), mask=i < n)


@triton.jit
def transpose_kernel(x, y, BLOCK: tl.constexpr):
    """Goes through shared memory: BLOCK^2 elements of it."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    v = tl.load(x + i * BLOCK + j)
    tl.store(y + i * BLOCK + j, tl.trans(v))


def silu(x: torch.Tensor, **options: Any) -> torch.Tensor:
    y = torch.empty_like(x)
    silu_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel(), BLOCK=1024, **options)
    return y


def values(*shape: int, device: str = "cuda:0", **options: Any) -> torch.Tensor:
    return torch.empty(*shape, device=device, **options)


@pytest.mark.parametrize("arch", CHIPS)
def test_a_launch_is_recorded_with_its_resources(arch):
    with dry_cuda(arch) as dry:
        silu(values(5000), num_warps=8, enable_fp_fusion=False)
        transpose_kernel[(1,)](values(64, 64), values(64, 64), BLOCK=64)
    first, second = dry.launches
    assert (first.name, first.grid, first.spills, first.shared) == ("silu_kernel", (5,), 0, 0)
    assert first.op == __name__.rpartition(".")[2]
    assert first.signature == {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    assert first.constants == {"BLOCK": 1024}
    assert first.options == {"num_warps": 8, "enable_fp_fusion": False}
    assert 8 <= first.regs <= 128
    assert 0 < second.shared <= dry.chip.shared_limit
    assert dry.ops == ["silu_kernel", "transpose_kernel"]


def test_what_a_chip_has_not_is_refused(monkeypatch):
    def transpose() -> None:
        transpose_kernel[(1,)](values(64, 64), values(64, 64), BLOCK=64)

    with dry_cuda(90) as dry:
        transpose()
    needed = dry.launches[0]
    for limit, message in (
        ({"shared_limit": needed.shared - 1}, "shared memory"),
        ({"registers": 4 * 32 * needed.regs - 1}, "registers"),
    ):
        monkeypatch.setitem(CHIPS, 90, replace(dry.chip, **limit))
        with dry_cuda(90), pytest.raises(ValueError, match=message):
            transpose()
    monkeypatch.setitem(CHIPS, 90, replace(dry.chip, shared_limit=needed.shared, registers=4 * 32 * needed.regs))
    with dry_cuda(90):
        transpose()


def test_spilled_registers_are_counted():
    with dry_cuda(90) as dry:
        # 16384 fp32 in 32 threads are 512 registers a thread, more than there are.
        silu_kernel[(1,)](values(16384), values(16384), 16384, BLOCK=16384, num_warps=1, maxnreg=24)
    assert dry.launches[0].spills > 0


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (lambda x: x.sum().item(), HostRead),
        (lambda x: bool(x.sum() > 0), HostRead),
        (lambda x: int(x[0]), HostRead),
        (lambda x: x.tolist(), HostRead),
        (lambda x: x.cpu(), HostRead),
        (lambda x: torch.empty(64).copy_(x), HostRead),
        (lambda x: x[x > 0], Exception),  # its length is on the device
        (lambda x: x + torch.empty(64), RuntimeError),
        (lambda x: F.linear(x, torch.empty(8, 64)), RuntimeError),
        (lambda x: silu(torch.empty(64)), ValueError),
        (lambda x: silu(x, num_wraps=4), TypeError),
        (lambda x: silu_kernel[(1, 70000)](x, x, 64, BLOCK=64), ValueError),
    ],
)
def test_mistakes_raise(mistake, error):
    with dry_cuda(90), pytest.raises(error):
        mistake(values(64))


def test_real_tensors_do_not_mix_with_the_device():
    real = torch.ones(64)
    with dry_cuda(90), pytest.raises(RuntimeError):
        values(64) + real


def test_a_launch_goes_to_the_current_device():
    with dry_cuda(90, devices=2) as dry:
        x = values(64, device="cuda:1")
        with pytest.raises(ValueError, match="the launch goes to cuda:0"):
            silu(x)
        with torch.cuda.device(x.device):
            assert torch.cuda.current_device() == 1
            silu(x)
    assert len(dry.launches) == 1


def test_only_an_allowed_read_is_answered():
    with dry_cuda(90) as dry:
        flag, other = values(1), values(1)
        dry.allow_read(flag, 7)
        assert int(flag.item()) == 7
        with pytest.raises(HostRead):
            other.item()
        with pytest.raises(HostRead, match="inside a capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            flag.item()
    assert dry.reads == 1


def captured(dry: Dry, step: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_a_capture_records_what_is_in_it_and_counts_replays():
    with dry_cuda(90) as dry:
        x = values(64)
        silu(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert torch.cuda.current_stream() is side
            silu(x)
        graph = captured(dry, lambda: silu(x.view(8, 8).t().reshape(64)).add_(1))
        for _ in range(3):
            graph.replay()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream())
        event.synchronize()
        torch.cuda.synchronize()
    (capture,) = dry.captures
    # the view and the transpose launch nothing; the reshape copies
    assert capture.ops == ["clone", "silu_kernel", "add_"]
    assert [launch.name for launch in capture.launches] == ["silu_kernel"]
    assert [launch.captured for launch in dry.launches] == [False, False, True]
    assert capture.replays == dry.replays == 3


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (lambda x: x.sum().item(), HostRead),
        (lambda x: bool(x.sum() > 0), HostRead),
        (lambda x: x.cpu(), HostRead),
        (lambda x: x.copy_(torch.zeros(64)), CaptureBroken),
        (lambda x: x * torch.tensor([2.0], device="cuda:0"), CaptureBroken),
        (lambda x: torch.cuda.synchronize(), CaptureBroken),
        (lambda x: torch.cuda.Event().synchronize(), CaptureBroken),
        (lambda x: torch.cuda.current_stream().synchronize(), CaptureBroken),
        (lambda x: torch.cuda.CUDAGraph().capture_begin(), CaptureBroken),
        (lambda x: silu(x), CaptureBroken),  # not warmed up
    ],
)
def test_mistakes_inside_a_capture_raise(mistake, error):
    with dry_cuda(90) as dry:
        x = values(64)
        with pytest.raises(error):
            captured(dry, lambda: mistake(x))
        assert dry.captures == []
        assert not torch.cuda.is_current_stream_capturing()


def test_an_empty_graph_is_not_replayed():
    with dry_cuda(90), pytest.raises(RuntimeError, match="never captured"):
        torch.cuda.CUDAGraph().replay()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layouts_follow_cudnn(dtype):
    convolution = nn.Conv2d(8, 16, 3, padding=1).to(dtype)
    with dry_cuda(90) as dry, torch.no_grad():
        dry.to_fake_cuda(convolution)
        x = values(2, 8, 8, 8, dtype=dtype)
        nhwc = x.contiguous(memory_format=torch.channels_last)
        assert convolution(x).is_contiguous()
        assert convolution(nhwc).is_contiguous(memory_format=torch.channels_last)
        q = values(2, 4, 16, 8, dtype=dtype)
        dry.ops.clear()
        out = F.scaled_dot_product_attention(q, q, q)
        assert (out.shape, out.device, out.dtype) == (q.shape, q.device, dtype)
        assert len(dry.ops) == 1


@pytest.mark.parametrize("arch", CHIPS)
def test_the_device_describes_itself(arch):
    with dry_cuda(arch):
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1
        assert torch.cuda.current_device() == 0
        properties = torch.cuda.get_device_properties(torch.device("cuda:0"))
        assert torch.cuda.get_device_capability(0) == CHIPS[arch].capability == (properties.major, properties.minor)
        assert properties.multi_processor_count > 100
        free, total = torch.cuda.mem_get_info(torch.device("cuda:0"))
        assert free < total == properties.total_memory


def test_a_dataclass_moves_with_its_tensors():
    @dataclass
    class Buffers:
        x: torch.Tensor
        noise: torch.Tensor | None

    buffers = Buffers(torch.zeros(3), None)
    with dry_cuda(90) as dry:
        assert dry.to_fake_cuda(buffers) is buffers
    assert buffers.x.device == torch.device("cuda:0")
    assert buffers.noise is None


def test_nothing_stays_replaced_afterwards():
    before = SimpleNamespace(**{k: getattr(torch.cuda, k) for k in ("Stream", "CUDAGraph", "graph", "is_available")})
    with dry_cuda(90):
        assert torch.cuda.Stream is not before.Stream
    assert all(getattr(torch.cuda, k) is v for k, v in vars(before).items())
