"""How far a kernel may be from float64, and a network or a chain from the original.

A kernel: twice as far as PyTorch's own operations, and a floor for each dtype.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"

# Relative to the exact value. Half precision: half a unit in the last place, as rounding to nearest gives; the
# interpreter truncates bfloat16, a whole one. float32: a few roundings on the way.
FLOORS = {
    torch.float32: 2.0**-22,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if INTERPRETER else 2.0**-8,
}


FORWARD = 5e-5  # max |difference| of one network evaluation, over the rms of the original's output
CHAIN = 1e-4  # max |difference| of x_0 after a whole chain with the same noise


def assert_as_exact_as_torch(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Assert |actual - exact| <= 2 max|plain - exact| + floor |exact|, for every element.

    Args:
        actual: the kernel's result.
        plain: the same from PyTorch's operations, in the same dtype.
        exact: the same in float64.
    """
    assert actual.dtype == plain.dtype
    assert actual.shape == plain.shape == exact.shape
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs()
    allowed = 2 * (plain.double() - exact).abs().max() + FLOORS[actual.dtype] * exact.abs()
    excess = error - allowed
    # Written so that NaN fails.
    assert bool((excess <= 0).all()), (
        f"error {error.max():.3g} where {allowed.flatten()[excess.argmax()]:.3g} is allowed"
    )
