"""`ddpm.accelerate` on a GPU, with generators that draw there and on the CPU."""

from __future__ import annotations

import pytest
import torch

import ddpm
from ddpm.loop import float32_precision
from tests.helpers import constant, tiny_pipeline
from tests.tolerances import CHAIN

pytestmark = pytest.mark.gpu
STEPS = 8


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.Generator().manual_seed(1),
        lambda: torch.Generator("cuda").manual_seed(1),
        lambda: [torch.Generator("cuda").manual_seed(seed) for seed in (5, 6)],
    ],
    ids=["cpu", "cuda", "cuda list"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_on_a_gpu(make, dtype):
    """float32 is IEEE, so the pipeline's convolutions are told so; in half precision the network is a constant."""
    pipe = tiny_pipeline().to("cuda", dtype)
    pipe = pipe if dtype == torch.float32 else constant(pipe)
    fast = ddpm.accelerate(pipe, rounding="float32" if dtype == torch.float32 else "own")
    theirs, ours = make(), make()
    with float32_precision(tf32=False):
        expected = pipe(2, theirs, STEPS, "pt").images
    images = fast(2, ours, STEPS, "pt").images
    assert images.device == expected.device
    tolerance = CHAIN if dtype == torch.float32 else 2.0**-7  # a GPU multiplies by 1 / kd where the step divides
    torch.testing.assert_close(images, expected, rtol=0, atol=tolerance)
    for a, b in zip(*(g if isinstance(g, list) else [g] for g in (theirs, ours)), strict=True):
        assert torch.equal(a.get_state(), b.get_state())


def test_on_a_gpu_without_a_generator():
    pipe = tiny_pipeline().to("cuda")
    drawn = []
    for each in (pipe, ddpm.accelerate(pipe)):
        torch.manual_seed(3)
        with float32_precision(tf32=False):
            drawn.append(each(2, None, STEPS, "pt").images)
    torch.testing.assert_close(*drawn, rtol=0, atol=CHAIN)
