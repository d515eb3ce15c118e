"""The kernels on Triton's interpreter against float64: run in a process of its own, with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

from ddpm.kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref
from ddpm.kernels.philox import PURPOSE_STEP, philox_normal, philox_normal_ref
from ddpm.kernels.reverse_step import COLUMNS, NONFINITE_NONE, decode_nonfinite, reverse_step, reverse_step_ref

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]
FLOORS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}  # relative to the largest output


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("n", "channels", "size"), [(3, 32, (7, 7)), (1, 96, (5, 3)), (1, 320, (7, 7)), (2, 384, (3, 3))]
)
def test_group_norm_silu_against_float64(n, channels, size, layout, dtype):
    torch.manual_seed(0)
    x = (torch.randn(n, channels, *size) * 2 + 5).to(dtype).contiguous(memory_format=layout)
    weight, bias, add = torch.randn(channels), torch.randn(channels), torch.randn(1, channels)
    scale, shift = torch.randn(n, channels), torch.randn(n, channels)
    rows = {"scale": scale, "shift": shift, "add": add}
    y = group_norm_silu(x, 32, weight, bias, 1e-5, **rows)
    exact = group_norm_silu_ref(
        x.double(), 32, weight.double(), bias.double(), 1e-5, **{k: v.double() for k, v in rows.items()}
    )
    plain = group_norm_silu_ref(x, 32, weight, bias, 1e-5, **rows)
    error, allowed = (y - exact).abs().max(), 2 * (plain - exact).abs().max()
    assert error <= allowed + FLOORS[dtype] * exact.abs().max()
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)


def test_group_norm_silu_of_a_large_mean_and_of_nothing():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 16, 16) + 1000
    weight, bias = torch.ones(64), torch.zeros(64)
    exact = group_norm_silu_ref(x.double(), 8, weight.double(), bias.double(), 1e-5, silu=False)
    assert (group_norm_silu(x, 8, weight, bias, 1e-5, silu=False) - exact).abs().max() < 1e-3
    assert group_norm_silu(x[:0], 8, weight, bias, 1e-5).shape == (0, 64, 16, 16)


def test_philox_normal_agrees_with_the_reference():
    seeds = torch.tensor([0, 7, -1, 2**62])
    z = philox_normal(seeds, (3, 5, 5), torch.tensor([9]), PURPOSE_STEP)
    assert (z.flatten(1) - philox_normal_ref(seeds, 75, 9, PURPOSE_STEP)).abs().max() <= 1e-6


@pytest.mark.parametrize("clip", ["none", "clamp", "dynamic"])
@pytest.mark.parametrize("variance", ["fixed", "learned", "learned_range"])
@pytest.mark.parametrize("source", ["seeds", "noise"])
def test_reverse_step_agrees_with_the_reference(clip, variance, source):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 5, 5)
    out = torch.randn(3, 3 if variance == "fixed" else 6, 5, 5).abs().contiguous(memory_format=torch.channels_last)
    table, counter = torch.rand(4, len(COLUMNS)) + 0.1, torch.tensor([2])
    given = {"seeds": torch.tensor([3, -7, 2**40])} if source == "seeds" else {"noise": torch.randn(3, 3, 5, 5)}
    results = []
    for function in (reverse_step, reverse_step_ref):
        state, flag = x.clone(), torch.tensor([NONFINITE_NONE])
        function(state, out, table, counter, flag, clip=clip, variance=variance, threshold_max=2.0, **given)
        results.append(state)
        assert decode_nonfinite(int(flag)) is None
    assert (results[0] - results[1]).abs().max() <= 4e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_nonfinite_output_is_reported_with_step_and_image(value):
    x, out = torch.randn(3, 3, 5, 5), torch.randn(3, 3, 5, 5)
    out[1, 2, 4, 4] = value
    table, flag = torch.rand(4, len(COLUMNS)) + 0.1, torch.tensor([NONFINITE_NONE])
    reverse_step(x, out, table, torch.tensor([3]), flag, clip="clamp", variance="fixed", seeds=torch.arange(3))
    assert decode_nonfinite(int(flag)) == (3, 1)
    assert x[1].isnan().any() == (value != value)
