"""merge_statistics against its plain PyTorch reference: `pytest bench/bench_channel_statistics.py`."""

from __future__ import annotations

import pytest
import torch

from ddpm.kernels.channel_statistics import merge_statistics, merge_statistics_ref, merged_slots

# (N, C, H, slots): what a convolution's tiles of 32 to 128 pixels leave behind, at batch 1 and 16.
LAYERS = [(1, 128, 32, 32), (1, 64, 128, 128), (1, 128, 256, 512), (16, 64, 128, 128), (16, 128, 256, 512)]


@pytest.mark.parametrize(("n", "channels", "size", "slots"), LAYERS)
def test_merge_statistics(n, channels, size, slots, device, timed):
    pixels = size * size
    statistics = torch.rand(n, slots, 2, channels, device=device)
    timed(
        lambda: merge_statistics(statistics, pixels),
        lambda: merge_statistics_ref(statistics, pixels),
        4 * n * (slots + merged_slots(slots, pixels)) * 2 * channels,
    )
