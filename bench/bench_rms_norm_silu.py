"""rms_norm_silu against its plain PyTorch reference: `pytest bench/bench_rms_norm_silu.py`."""

from __future__ import annotations

import pytest
import torch

from ddpm.kernels.rms_norm_silu import rms_norm_silu, rms_norm_silu_ref

# (N, C, H): layers of lucidrains' network of dim 64, multipliers 1, 2, 4, 8, for 128 x 128 images, at batch 1 and 16.
LAYERS = [
    (1, 64, 128),
    (1, 128, 64),
    (1, 256, 32),
    (1, 512, 16),
    (16, 64, 128),
    (16, 128, 64),
    (16, 256, 32),
    (16, 512, 16),
]


@pytest.mark.parametrize(("n", "channels", "size"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_rms_norm_silu(n, channels, size, dtype, layout, device, timed):
    if device == "cpu" and (dtype != torch.float32 or n * size > 128):
        pytest.skip("float32 and small batches are what a CPU is used for")
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.randn(n, channels, size, size, device=device, dtype=dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(channels, device=device)
    add, scale, shift = torch.randn(3, 1, channels, device=device)
    timed(
        lambda: rms_norm_silu(x, weight, add=add, scale=scale, shift=shift),
        lambda: rms_norm_silu_ref(x, weight, add=add, scale=scale, shift=shift),
        2 * x.numel() * x.element_size(),
    )
