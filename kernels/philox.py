"""Standard normal noise as a function of (image seed, element, draw): Philox-4x32-10 and Box-Muller.

An image's noise depends on nothing but its own seed, so it is the same in any batch, on any rank, after any resume.

    key     = the image's 64-bit seed, low word first
    counter = (element // 4, draw number within the chain, purpose, 0), elements in NCHW order
    u_j     = (float32(word_j) + 0.5) 2^-32
    z_0, z_1 = r(u_0) cos(2 pi u_1), r(u_0) sin(2 pi u_1)      r(u) = sqrt(-2 ln u)
    z_2, z_3 = r(u_2) cos(2 pi u_3), r(u_2) sin(2 pi u_3)

Element 4q + j of the image gets z_j of counter q. Words are the same bits on every backend, normals agree to 1e-6.

Sources: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 (Philox);
Box and Muller 1958 (normals).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .backend import tl, triton

# What a draw is for: the third word of the counter, so that streams of one seed never meet.
PURPOSE_INITIAL = 0  # x_T
PURPOSE_STEP = 1  # z of a reverse step
PURPOSE_KNOWN_REGION = 2  # noising of the known part of an image, for inpainting
PURPOSE_IMG2IMG = 3  # noising of the image that a chain starts from
PURPOSE_JUMP = 4  # forward jump of an inpainting chain

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TWO_PI = 6.283185307179586
_QUADS = 256  # quads per program of the fill kernel


@backend.jit
def philox_normal4(seed, quad, draw, PURPOSE: tl.constexpr):
    """Four independent blocks of standard normals, fp32, for elements 4 quad + (0, 1, 2, 3) of one image.

    Args:
        seed: int64 scalar, the image's; its bits are taken as unsigned.
        quad: int32 block; draw: int64 scalar, its low 32 bits count; PURPOSE: one of the PURPOSE constants.
    """
    w0, w1, w2, w3 = philox_words4(seed, quad, draw, PURPOSE, 0)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


@backend.jit
def philox_words4(seed, c0, c1, c2, c3):
    """The four uint32 words of counter (c0, c1, c2, c3); c0 is a block, the others anything that broadcasts."""
    zero = c0.to(tl.uint32) * 0
    return tl.philox(seed, c0.to(tl.uint32), zero + c1.to(tl.uint32), zero + c2, zero + c3)


@backend.jit
def _box_muller(w0, w1):
    u0 = (w0.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    u1 = (w1.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    radius = tl.sqrt_rn(-2.0 * tl.log(u0))
    sine, cosine = _sincos(6.2831854820251465 * u1)  # float32(2 pi)
    return radius * cosine, radius * sine


@backend.jit
def _sincos(theta):
    """Sine and cosine for 0 <= theta <= 2 pi, to 1.4e-7 relative: one reduction for both.

    tl.sin and tl.cos reduce any angle, each on its own, with a table in local memory for huge ones.
    """
    # theta = k pi/2 + r, |r| <= pi/4. pi/2 in three parts: k times the first two is exact.
    k = tl.floor(theta * 0.6366197723675814 + 0.5)
    r = ((theta - k * 1.570556640625) - k * 0.00023968517780303955) - k * 9.92093629470503e-10
    # Minimax polynomials in r^2 of (sin r - r) / r^3 and (cos r - 1 + r^2 / 2) / r^4.
    z = r * r
    sine = r + r * z * ((-0.00019517233886290342 * z + 0.008332177996635437) * z - 0.16666655242443085)
    cosine = 1.0 - 0.5 * z + z * z * ((2.4438379114144482e-05 * z - 0.0013887366512790322) * z + 0.04166664555668831)
    quadrant = k.to(tl.int32)
    odd = (quadrant & 1) == 1
    sine, cosine = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@backend.jit
def _philox_normal_kernel(z_ptr, seeds_ptr, draw_ptr, elements, blocks, PURPOSE: tl.constexpr, QUADS: tl.constexpr):
    """One program: QUADS quads of one image; grid (N blocks), blocks of an image together.

    z: float32 [N, elements], contiguous; seeds: int64 [N]; draw: int64 [1].
    """
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    quad = block * QUADS + tl.arange(0, QUADS)
    z0, z1, z2, z3 = philox_normal4(tl.load(seeds_ptr + image), quad, tl.load(draw_ptr), PURPOSE)
    # Interleaved, a quad is four neighbours: one 16-byte store per thread.
    z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    element = block * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    tl.store(z_ptr + image.to(tl.int64) * elements + element, z, mask=element < elements)


def _draw_tensor(draw: int | Tensor, device: torch.device) -> Tensor:
    return draw if isinstance(draw, Tensor) else torch.full((1,), draw, dtype=torch.int64, device=device)


def _launch(seeds: Tensor, channels: int, height: int, width: int, draw: Tensor, purpose: int) -> Tensor:
    z = seeds.new_empty((len(seeds), channels, height, width), dtype=torch.float32)
    elements = channels * height * width
    if z.numel():
        blocks = triton.cdiv(elements, 4 * _QUADS)
        with backend.on_device(z):
            _philox_normal_kernel[(len(seeds) * blocks,)](
                z,
                seeds,
                draw,
                elements,
                blocks,
                PURPOSE=purpose,
                QUADS=_QUADS,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return z


def philox_normal(seeds: Tensor, shape: tuple[int, int, int], draw: int | Tensor, purpose: int) -> Tensor:
    """Standard normals, one stream per image.

    Args:
        seeds: int64 [N], each the 64 bits of a seed (two's complement above 2^63).
        shape: (C, H, W).
        draw: number of the draw within the chain, an int or int64 [1] on the seeds' device.
        purpose: one of the PURPOSE constants.

    Returns:
        float32 [N, C, H, W], NCHW contiguous.

    Raises:
        ValueError: seeds or draw of another type.
    """
    _check(seeds, draw)
    channels, height, width = shape
    if not backend.takes_kernel(seeds):
        z = philox_normal_ref(seeds, channels * height * width, draw, purpose)
        return z.view(len(seeds), channels, height, width)
    draw = _draw_tensor(draw, seeds.device)
    if backend.is_dispatched(seeds):
        return torch.ops.ddpm.philox_normal(seeds, channels, height, width, draw, purpose)
    return _launch(seeds, channels, height, width, draw, purpose)


def philox_normal_ref(seeds: Tensor, elements: int, draw: int | Tensor, purpose: int) -> Tensor:
    """`philox_normal` in plain PyTorch, on elements 0 .. elements - 1 of each image.

    Logarithm, root, sine and cosine are taken in float64: rounded to float32 once, they hide that a CPU's vector loop
    and its remainder loop differ in the last bit, which would tie an image's noise to its place in the batch.

    Returns:
        float32 [N, elements].
    """
    _check(seeds, draw)
    quads = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seeds.device)
    w0, w1, w2, w3 = philox_words_ref(seeds, quads, draw, purpose)
    z = torch.stack([*_box_muller_ref(w0, w1), *_box_muller_ref(w2, w3)], dim=-1)  # [N, quads, 4]
    return z.flatten(1)[:, :elements].contiguous()


def _box_muller_ref(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    u0, u1 = ((w.float() + 0.5) * 2.0**-32 for w in (w0, w1))
    radius = (-2.0 * u0.double().log()).sqrt()
    theta = (_TWO_PI * u1).double()  # the product in float32, as in the kernel
    return (radius * theta.cos()).float(), (radius * theta.sin()).float()


def philox_words_ref(
    seeds: Tensor, c0: Tensor, c1: int | Tensor, c2: int | Tensor, c3: int | Tensor = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of each (seed, counter).

    Args:
        seeds: int64 [N].
        c0: int64 [Q]; c1, c2, c3: ints, or int64 tensors that broadcast to [N, Q]. Only their low 32 bits count.

    Returns:
        four int64 tensors [N, Q] with values in 0 .. 2^32 - 1.
    """
    c0 = (c0 & _WORD).expand(len(seeds), -1)
    c1, c2, c3 = (c & _WORD for c in (c1, c2, c3))
    k0, k1 = seeds[:, None] & _WORD, (seeds[:, None] >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(a: int | Tensor, b: int) -> tuple[int | Tensor, int | Tensor]:
    """High and low word of a b for 32-bit words, by halves of b: no product passes 2^63, so nothing overflows."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _check(seeds: Tensor, draw: int | Tensor) -> None:
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise ValueError(f"seeds must be int64 [N], one per image; found {seeds.dtype} {list(seeds.shape)}")
    if isinstance(draw, Tensor) and (draw.dtype != torch.int64 or draw.numel() != 1):
        raise ValueError(f"draw must be an int or an int64 tensor [1]; found {draw.dtype} {list(draw.shape)}")


def _ref(seeds: Tensor, channels: int, height: int, width: int, draw: Tensor, purpose: int) -> Tensor:
    z = philox_normal_ref(seeds, channels * height * width, draw, purpose)
    return z.view(len(seeds), channels, height, width)


def _fake(seeds: Tensor, channels: int, height: int, width: int, draw: Tensor, purpose: int) -> Tensor:
    return seeds.new_empty((len(seeds), channels, height, width), dtype=torch.float32)


def _work(seeds: Tensor, channels: int, height: int, width: int, draw: Tensor, purpose: int) -> backend.Work:
    elements = channels * height * width
    if len(seeds) * elements == 0:
        return backend.Work(0, 0, 0)
    return backend.Work(1, len(seeds) * -(-elements // (4 * _QUADS)), 0)


backend.register(
    "philox_normal(Tensor seeds, int channels, int height, int width, Tensor draw, int purpose) -> Tensor",
    _launch,
    _ref,
    _fake,
    work=_work,
)
