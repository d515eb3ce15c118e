"""3x3 convolutions with a quarter of the multiplications, in plain PyTorch, for the CPU.

Winograd's F(4x4, 3x3): 4x4 outputs of a 3x3 convolution from a 6x6 tile of the input take 36 multiplications instead of
144 (Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2016, "Fast algorithms for convolutional
neural networks", section 4.3):

    y = A^T [(G w G^T) * (B^T d B)] A        per tile and pair of channels, summed over the input's channels

Between the transforms stand 36 matrix products [tiles, C] x [C, K], one for each place of the tile. A grouped 1x1
convolution does them in one call of oneDNN, with weights that freezing has packed; `torch.bmm` would go to MKL, which
took 1.3 to 2 times as long (AMD EPYC, AVX-512, one thread).

The polynomials are evaluated at 0, +-5/8, +-3/2 and infinity instead of Lavin and Gray's 0, +-1, +-2 and infinity. All
constants of the transforms are still exact in float32, and the error is half as large: in the mean 4.3 times that of
the direct convolution, against 9.4 times (C = 256, SiLU of a normal input).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.devices import total_memory

TILE = 4  # outputs of a tile, in each direction
PATCH = TILE + 2  # inputs that they see
POINTS = PATCH * PATCH
_A, _B = 5 / 8, 3 / 2  # the points are 0, +-_A, +-_B, infinity
_A2, _B2 = _A * _A, _B * _B

# Below this many pixels of all images the transformed weights, four times the bytes, cost more than the products save.
LEAST_PIXELS = 256
# Narrower layers spend their time in the transforms, and each shape of them takes seconds to compile.
LEAST_CHANNELS = 128
# Of the machine's memory, for the transformed weights of one compiled step: a sampler keeps several.
MEMORY_SHARE = 1 / 16

_allowed: ContextVar[bool] = ContextVar("allowed", default=False)


@contextlib.contextmanager
def allowed(choice: bool = True) -> Iterator[None]:
    """Whether layers may take this form: for whoever has torch.compile make constants of the weights."""
    token = _allowed.set(choice)
    try:
        yield
    finally:
        _allowed.reset(token)


@torch.compiler.assume_constant_result
def is_allowed() -> bool:
    """Whether layers may take this form; decided once, when they are traced."""
    return _allowed.get()


def fits(size: int) -> bool:
    """Whether the transformed weights of a network, `size` bytes, are no more than MEMORY_SHARE of the memory."""
    return size <= MEMORY_SHARE * total_memory()


def chooses_winograd(n: int, height: int, width: int, c_in: int, c_out: int) -> bool:
    """Whether a 3x3 convolution of stride 1 and padding 1 is to take this form on the CPU.

    Measured on two cores of an AMD EPYC with AVX-512; the form needs torch.compile, which makes loops of the transforms
    (see `winograd_conv3x3`).

    Args:
        n, height, width: images, and pixels of the output.
        c_in, c_out: channels.
    """
    whole_tiles = height % TILE == 0 and width % TILE == 0
    return whole_tiles and n * height * width >= LEAST_PIXELS and min(c_in, c_out) >= LEAST_CHANNELS


def winograd_bytes(c_in: int, c_out: int) -> int:
    """Bytes of a layer's transformed weights in float32: four times those of the weights themselves."""
    return 4 * POINTS * c_in * c_out


def transform_weight(weight: Tensor) -> Tensor:
    """G w G^T, once, at load.

    Args:
        weight: [K, C, 3, 3].

    Returns:
        float32 [36 K, C, 1, 1], the weights of a convolution of 36 groups; computed in float64.
    """
    c_out, c_in = weight.shape[:2]
    a, b = 2 * _A2 * (_A2 - _B2), 2 * _B2 * (_B2 - _A2)
    rows = [
        [1 / (_A2 * _B2), 0, 0],
        [1 / a, _A / a, _A2 / a],
        [1 / a, -_A / a, _A2 / a],
        [1 / b, _B / b, _B2 / b],
        [1 / b, -_B / b, _B2 / b],
        [0, 0, 1],
    ]
    g = torch.tensor(rows, dtype=torch.float64, device=weight.device)
    points = torch.einsum("ia,kcab,jb->ijkc", g, weight.double(), g)  # [6, 6, K, C]
    return points.reshape(POINTS * c_out, c_in, 1, 1).float()


def winograd_conv3x3(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1.

    Meant for torch.compile with frozen weights, where it is a handful of loops around one call of oneDNN; eager, every
    sum is a pass of its own. Each direction is transformed in a pass of its own, so that a loop is short to compile and
    its values fit in registers. What is added comes here rather than behind the call: Inductor does not fuse into what
    it has stacked.

    Args:
        x: float32 or float64 [N, C, H, W], best channels_last; 4 divides H and W.
        weight: of `transform_weight`, in x's dtype, [36 K, C, 1, 1].
        bias: [K], or [N or 1, K] for one per image; added.
        residual: [N, K, H, W], added.

    Returns:
        [N, K, H, W], channels_last.

    Raises:
        ValueError: 4 does not divide H and W, or the weight is for other channels.
    """
    n, c_in, height, width = x.shape
    if height % TILE or width % TILE:
        raise ValueError(f"H and W must be multiples of {TILE}; found {height}x{width}; use the direct convolution")
    if weight.shape[1:] != (c_in, 1, 1) or len(weight) % POINTS:
        raise ValueError(
            f"weight must be [{POINTS} K, {c_in}, 1, 1], as transform_weight makes it; found {list(weight.shape)}"
        )
    c_out, rows, columns = len(weight) // POINTS, height // TILE, width // TILE
    # Five dimensions, since Inductor takes four for [N, C, H, W] and would lay this out with H innermost.
    padded = F.pad(x.permute(0, 2, 3, 1)[:, None], (0, 0, 1, 1, 1, 1))  # [N, 1, H + 2, W + 2, C]
    lines = [padded[:, :, i : i + height - TILE + 1 : TILE] for i in range(PATCH)]  # each [N, 1, rows, W + 2, C]
    half = torch.stack(_transform_input(lines), dim=4)  # [N, 1, rows, W + 2, 6, C]
    lines = [half[:, :, :, j : j + width - TILE + 1 : TILE] for j in range(PATCH)]
    tiles = torch.stack(_transform_input(lines), dim=5)  # [N, 1, rows, columns, 6, 6, C]

    tiles = tiles.view(n, rows, columns, POINTS * c_in).permute(0, 3, 1, 2)
    products = F.conv2d(tiles, weight, groups=POINTS).permute(0, 2, 3, 1)
    products = products.reshape(n, rows, columns, PATCH, PATCH, c_out)

    half = torch.stack(_transform_output(products.unbind(3)), dim=2)  # [N, rows, 4, columns, 6, K]
    parts = _transform_output(half.unbind(4))  # each [N, rows, 4, columns, K]
    if bias is not None:
        offset = bias.view(-1, 1, 1, 1, c_out)
        parts = [part + offset for part in parts]
    if residual is not None:
        skip = residual.permute(0, 2, 3, 1).reshape(n, rows, TILE, columns, TILE, c_out)
        parts = [part + skip[:, :, :, :, j] for j, part in enumerate(parts)]
    return torch.stack(parts, dim=4).view(n, height, width, c_out).permute(0, 3, 1, 2)


def _transform_input(d: Sequence[Tensor]) -> list[Tensor]:
    """B^T d along one direction: six tensors to six; the rows of +p and -p share their even and odd parts."""
    even_a, odd_a = d[4] - _B2 * d[2], _A * (d[3] - _B2 * d[1])
    even_b, odd_b = d[4] - _A2 * d[2], _B * (d[3] - _A2 * d[1])
    return [
        _A2 * _B2 * d[0] - (_A2 + _B2) * d[2] + d[4],
        even_a + odd_a,
        even_a - odd_a,
        even_b + odd_b,
        even_b - odd_b,
        _A2 * _B2 * d[1] - (_A2 + _B2) * d[3] + d[5],
    ]


def _transform_output(m: Sequence[Tensor]) -> list[Tensor]:
    """A^T m along one direction: six tensors to four."""
    even_a, odd_a = m[1] + m[2], m[1] - m[2]
    even_b, odd_b = m[3] + m[4], m[3] - m[4]
    return [
        m[0] + even_a + even_b,
        _A * odd_a + _B * odd_b,
        _A2 * even_a + _B2 * even_b,
        _A2 * _A * odd_a + _B2 * _B * odd_b + m[5],
    ]
