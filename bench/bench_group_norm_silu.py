"""group_norm_silu against its plain PyTorch reference: `pytest bench/bench_group_norm_silu.py`."""

from __future__ import annotations

import pytest
import torch

from ddpm.kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref

# (N, C, H): layers of a 32 x 32 network at batch 1 and 256, and of larger ones.
LAYERS = [(1, 128, 32), (1, 256, 16), (1, 512, 8), (256, 128, 32), (256, 256, 16), (8, 192, 64), (4, 384, 128)]


@pytest.mark.parametrize(("n", "channels", "size"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_group_norm_silu(n, channels, size, dtype, layout, device, timed):
    if device == "cpu" and (dtype != torch.float32 or n * size > 128):
        pytest.skip("float32 and small batches are what a CPU is used for")
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.randn(n, channels, size, size, device=device, dtype=dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(channels, device=device), torch.randn(channels, device=device)
    add = torch.randn(1, channels, device=device)
    timed(
        lambda: group_norm_silu(x, 32, weight, bias, 1e-5, add=add),
        lambda: group_norm_silu_ref(x, 32, weight, bias, 1e-5, add=add),
        2 * x.numel() * x.element_size(),
    )
