"""philox_normal against its plain PyTorch reference: `pytest bench/bench_philox.py`."""

from __future__ import annotations

import pytest
import torch

from ddpm.kernels.philox import PURPOSE_STEP, philox_normal, philox_normal_ref


@pytest.mark.parametrize("n", [1, 64])
@pytest.mark.parametrize("size", [32, 256])
def test_philox_normal(n, size, device, timed):
    if device == "cpu" and n * size > 2048:
        pytest.skip("minutes on a CPU")
    shape = (3, size, size)
    seeds = torch.arange(n, device=device)
    draw = torch.zeros(1, dtype=torch.int64, device=device)
    timed(
        lambda: philox_normal(seeds, shape, draw, PURPOSE_STEP),
        lambda: philox_normal_ref(seeds, 3 * size * size, draw, PURPOSE_STEP),
        4 * n * 3 * size * size,
    )
