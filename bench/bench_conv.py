"""conv against its plain PyTorch reference: `pytest bench/bench_conv.py`."""

from __future__ import annotations

import pytest
import torch

from ddpm.kernels import tuning
from ddpm.kernels.channel_statistics import Norm, channel_statistics_ref
from ddpm.kernels.conv import conv, conv_ref

# (N, H, channels of the parts, C_out): layers of a 32 x 32 network at batch 1, 16 and 256, and of a larger one.
LAYERS = [
    (1, 32, (128,), 128),
    (1, 32, (256, 128), 128),
    (1, 16, (256,), 256),
    (1, 8, (256,), 256),
    (1, 4, (256, 256), 256),
    (16, 16, (256,), 256),
    (256, 32, (128,), 128),
    (256, 16, (256,), 256),
    (256, 4, (256,), 256),
    (1, 256, (128,), 128),
]


@pytest.mark.parametrize(("n", "size", "parts", "out"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_conv(n, size, parts, out, dtype, norm, device, timed):
    """The reference is the library's convolution with everything around it as separate operations."""
    if device == "cpu" and (dtype != torch.float32 or n * size > 64):
        pytest.skip("float32 and small batches are what a CPU is used for")
    channels = sum(parts)
    nhwc = {"memory_format": torch.channels_last}
    images = [torch.randn(n, c, size, size, device=device, dtype=dtype).contiguous(**nhwc) for c in parts]
    weight = torch.randn(out, channels, 3, 3, device=device, dtype=dtype).contiguous(**nhwc)
    bias, row = torch.randn(out, device=device), torch.randn(1, out, device=device)
    counters = torch.zeros(tuning.COUNTERS, dtype=torch.int32, device=device)
    rules = (None,) * 6 + (0, 0.0, False)
    group_norm = None
    if norm:
        ones, zeros = torch.ones(channels, device=device), torch.zeros(channels, device=device)
        statistics = tuple(channel_statistics_ref(x) for x in images)
        group_norm = Norm(ones, zeros, 32, 1e-5, True, statistics)
        rules = (ones, zeros, *(*statistics, None)[:2], None, None, 32, 1e-5, True)
    x, skip = (*images, None)[:2]
    result = n * size * size * out * dtype.itemsize
    timed(
        lambda: conv(images, weight, bias, norm=group_norm, row=row, statistics=True, counters=counters),
        lambda: conv_ref(
            x, skip, weight, bias, row, None, None, None, None, *rules, 1, 1, 1, False, 1.0, True, dtype, None
        ),
        sum(t.numel() * t.element_size() for t in (*images, weight)) + result,
    )
