"""Winograd's 3x3 convolution against float64, eager and compiled, and the rule that chooses it."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.fused.winograd import chooses_winograd, transform_weight, winograd_bytes, winograd_conv3x3

# Of the direct convolution's error in float32, the largest against the largest. Lavin and Gray's points take 30.
TIMES_THE_DIRECT_ERROR = 12.0

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")


def make(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(n: int, c: int, height: int, width: int) -> Tensor:
    """As a norm and SiLU leave it."""
    return F.silu(make(n, c, height, width)).contiguous(memory_format=torch.channels_last)


def kernel(c_out: int, c_in: int) -> Tensor:
    return make(c_out, c_in, 3, 3, seed=1) / (9 * c_in) ** 0.5


def check(found: Tensor, x: Tensor, weight: Tensor, added: Tensor | float = 0.0) -> None:
    """Assert that the result is as exact as the form can be, and NHWC."""
    exact = F.conv2d(x.double(), weight.double(), padding=1) + added
    direct = F.conv2d(x, weight, padding=1) + added
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    assert found.permute(0, 2, 3, 1).is_contiguous()
    # The floor: a sum of few products may be exact in the direct form.
    allowed = TIMES_THE_DIRECT_ERROR * (direct.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize(
    ("n", "c_in", "c_out", "height", "width"),
    [(1, 128, 128, 32, 32), (2, 33, 7, 8, 8), (3, 1, 1, 4, 4), (1, 5, 3, 4, 12), (1, 256, 64, 16, 8)],
)
def test_against_float64(n: int, c_in: int, c_out: int, height: int, width: int) -> None:
    x, weight = image(n, c_in, height, width), kernel(c_out, c_in)
    check(winograd_conv3x3(x, transform_weight(weight)), x, weight)


def test_in_float64_it_is_the_convolution() -> None:
    x, weight = image(2, 9, 8, 12).double(), kernel(5, 9)
    points = transform_weight(weight.double()).double()  # rounded to float32, as ever: that is all of the error
    exact = F.conv2d(x, weight.double(), padding=1)
    torch.testing.assert_close(winograd_conv3x3(x, points), exact, rtol=0, atol=1e-6)


def test_other_layouts() -> None:
    x, weight = image(2, 24, 8, 8), kernel(16, 24)
    points = transform_weight(weight)
    check(winograd_conv3x3(x.contiguous(), points), x, weight)
    check(winograd_conv3x3(image(2, 30, 8, 8)[:, 3:27], points), image(2, 30, 8, 8)[:, 3:27], weight)


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_bias_and_residual(rows: int | None) -> None:
    x, weight = image(2, 16, 8, 8), kernel(12, 16)
    bias = make(12, seed=2) if rows is None else make(rows, 12, seed=2)
    residual = make(2, 12, 8, 8, seed=3).contiguous(memory_format=torch.channels_last)
    found = winograd_conv3x3(x, transform_weight(weight), bias=bias, residual=residual)
    check(found, x, weight, bias.view(-1, 12, 1, 1) + residual)


def test_zero_stays_zero() -> None:
    found = winograd_conv3x3(torch.zeros(1, 8, 8, 8), transform_weight(kernel(8, 8)))
    assert torch.equal(found, torch.zeros(1, 8, 8, 8))


def test_an_empty_batch() -> None:
    assert winograd_conv3x3(image(0, 8, 8, 8), transform_weight(kernel(6, 8))).shape == (0, 6, 8, 8)


@needs_compiler
@pytest.mark.parametrize("with_sums", [False, True])
def test_compiled_with_frozen_weights(with_sums: bool) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(transform_weight(weight), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            added = {"bias": bias, "residual": residual} if with_sums else {}
            return winograd_conv3x3(F.silu(x), self.weight, **added)

    before, weight, bias = make(2, 20, 8, 8), kernel(24, 20), make(24, seed=2)
    residual = make(2, 24, 8, 8, seed=3).contiguous(memory_format=torch.channels_last)
    before = before.contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        found = torch.compile(Layer(), fullgraph=True, dynamic=False)(before)
    check(found, F.silu(before), weight, bias.view(1, -1, 1, 1) + residual if with_sums else 0.0)


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 6), (9, 9), (2, 4)])
def test_sizes_that_4_does_not_divide_are_refused(height: int, width: int) -> None:
    assert not chooses_winograd(64, height, width, 128, 128)
    with pytest.raises(ValueError, match=rf"multiples of 4; found {height}x{width}; use the direct"):
        winograd_conv3x3(image(1, 8, height, width), transform_weight(kernel(8, 8)))


def test_another_layers_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[36 K, 8, 1, 1\].*found \[288, 4, 1, 1\]"):
        winograd_conv3x3(image(1, 8, 8, 8), transform_weight(kernel(8, 4)))
    with pytest.raises(ValueError, match=r"found \[8, 8, 3, 3\]"):
        winograd_conv3x3(image(1, 8, 8, 8), kernel(8, 8))


def test_the_rule() -> None:
    assert chooses_winograd(1, 32, 32, 128, 128)
    assert chooses_winograd(1, 16, 16, 512, 256)
    assert not chooses_winograd(1, 8, 8, 256, 256)  # four times the bytes of weights, for four tiles
    assert chooses_winograd(16, 8, 8, 256, 256)
    assert not chooses_winograd(1, 32, 32, 3, 128)
    assert not chooses_winograd(1, 32, 32, 128, 3)


def test_bytes() -> None:
    points = transform_weight(kernel(24, 10))
    assert points.dtype == torch.float32
    assert winograd_bytes(10, 24) == points.numel() * points.element_size() == 4 * kernel(24, 10).numel() * 4
