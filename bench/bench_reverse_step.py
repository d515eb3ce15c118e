"""reverse_step against its plain PyTorch reference: `pytest bench/bench_reverse_step.py`."""

from __future__ import annotations

import pytest
import torch

from ddpm.kernels.reverse_step import COLUMNS, NONFINITE_NONE, reverse_step, reverse_step_ref


@pytest.mark.parametrize("n", [1, 64])
@pytest.mark.parametrize("size", [32, 256])
@pytest.mark.parametrize("clip", ["clamp", "dynamic"])
@pytest.mark.parametrize("noise", ["seeds", "buffer"])
def test_reverse_step(n, size, clip, noise, device, timed):
    if device == "cpu" and n * size > 2048:
        pytest.skip("minutes on a CPU")
    shape = (n, 3, size, size)
    x = torch.randn(shape, device=device)
    out = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    row = {"kx": 1.0, "ke": -0.8, "kd": 0.6, "c0": 0.3, "cx": 0.6, "s": 0.2, "clip": 1.0}
    table = torch.tensor([[row.get(column, 0.0) for column in COLUMNS]], device=device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    nonfinite = torch.tensor([NONFINITE_NONE], device=device)
    seeds = torch.arange(n, device=device) if noise == "seeds" else None
    buffer = torch.randn(shape, device=device) if noise == "buffer" else None
    arguments = (x, out, table, counter, nonfinite)
    timed(
        lambda: reverse_step(*arguments, clip=clip, seeds=seeds, noise=buffer),
        lambda: reverse_step_ref(*arguments, clip=clip, seeds=seeds, noise=buffer),
        4 * x.numel() * (3 if noise == "seeds" else 4),
    )
