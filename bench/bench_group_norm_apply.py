"""group_norm_apply against its plain PyTorch reference: `pytest bench/bench_group_norm_apply.py`."""

from __future__ import annotations

import pytest
import torch

from ddpm.kernels.channel_statistics import Norm, channel_statistics_ref
from ddpm.kernels.group_norm_apply import group_norm_apply, group_norm_apply_ref

# (N, channels of the parts, H, resample): what a 32 x 32 network normalises at batch 256, and larger ones.
LAYERS = [
    (256, (128,), 32, None),
    (256, (256, 128), 32, None),
    (256, (128, 128), 32, None),
    (256, (256, 256), 16, None),
    (256, (256,), 8, "up"),
    (8, (192, 192), 64, "up"),
    (8, (192,), 64, "down"),
    (8, (128, 128), 256, None),
]


@pytest.mark.parametrize(("n", "channels", "size", "resample"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_group_norm_apply(n, channels, size, resample, dtype, device, timed):
    if device == "cpu" and (dtype != torch.float32 or n * size > 128):
        pytest.skip("float32 and small batches are what a CPU is used for")
    parts = [
        torch.randn(n, c, size, size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for c in channels
    ]
    total = sum(channels)
    weight, bias = torch.randn(total, device=device), torch.randn(total, device=device)
    norm = Norm(weight, bias, 32, 1e-5, True, tuple(channel_statistics_ref(part) for part in parts))
    x, skip = (*parts, None)[:2]
    statistics, skip_statistics = (*norm.statistics, None)[:2]
    written = {None: 1, "up": 4, "down": 0.25}[resample]
    timed(
        lambda: group_norm_apply(parts, norm, resample=resample),
        lambda: group_norm_apply_ref(
            x, skip, weight, bias, statistics, skip_statistics, None, None, 32, 1e-5, True, resample, dtype
        ),
        int((1 + written) * sum(part.nbytes for part in parts)),
    )
