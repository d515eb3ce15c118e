"""RMSNorm over channels, then optional scale and shift, SiLU and residual, in one operation, for NHWC and NCHW.

    u = x + add;   y = sqrt(C) weight u / max(||u||, 1e-12);   y = y (1 + scale) + shift;   y = y sigmoid(y) + residual

||u|| is the 2-norm of one pixel's C channels (Zhang and Sennrich 2019, "Root mean square layer normalization", in
the form of lucidrains' denoising-diffusion-pytorch from 2.0 on; scale and shift: Dhariwal and Nichol 2021, section 3;
SiLU: Elfwing et al. 2017). `add` is the bias of the convolution before the norm.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .backend import tl, triton

_EPS = 1e-12  # the least norm that is divided by
_TILE = 4096  # the most elements a program holds in registers: with 8192, odd strides spill
_WARP_TILE = 512  # elements of a warp, 16 a thread; a smaller program would not be faster
_WIDE_BLOCK = 1024  # channels at a time where a pixel has more than _TILE
_WIDE_WARPS = 4  # 8 elements a thread: a loop keeps pointers in registers as well


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        blocks: of channels. A program has all channels of its pixels: one block is read once and held in registers,
            more are read twice, for the norm and for the result.
        block_c, block_p: a program's tile, channels and pixels, powers of two.
        num_warps: of the launch.
    """

    blocks: int
    block_c: int
    block_p: int
    num_warps: int


@functools.lru_cache(maxsize=4096)
def plan(n: int, channels: int, pixels: int, sms: int) -> Plan:
    """The cut for N images of `channels` x `pixels` on a GPU of `sms` multiprocessors.

    Many pixels to a program share its loads of weight and rows; fewer at small batch, so that every multiprocessor has
    work. Made for NHWC, where a pixel's channels are neighbours and any number of pixels is read in whole cache lines;
    of NCHW a tile of few pixels reads short pieces of many lines. Reasoned from bytes and programs; not tuned on a GPU.
    """
    block_c = backend.next_power_of_2(channels)
    if block_c > _TILE:
        return Plan(-(-channels // _WIDE_BLOCK), _WIDE_BLOCK, 1, _WIDE_WARPS)
    block_p = min(_TILE // block_c, backend.next_power_of_2(pixels))
    while block_p > 1 and block_p * block_c > _WARP_TILE and n * -(-pixels // block_p) < 2 * sms:
        block_p //= 2
    return Plan(1, block_c, block_p, max(1, block_p * block_c // _WARP_TILE))


@backend.jit
def _load_tile(x_ptr, add_ptr, pixel, channel, pixels, channels, x_p, x_c):
    """x + add over a tile [pixels, channels], 0 where there are no channels. Pointers are at the image."""
    inside_c = channel < channels
    inside = (pixel < pixels)[:, None] & inside_c[None, :]
    v = tl.load(x_ptr + pixel[:, None] * x_p + channel[None, :] * x_c, mask=inside, other=0.0).to(tl.float32)
    if add_ptr is not None:
        v += tl.load(add_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    return v


@backend.jit
def _finish(
    y_ptr, u, squares, root, weight_ptr, scale_ptr, shift_ptr, residual_ptr, pixel, channel, pixels, channels,
    y_p, y_c, residual_p, residual_c, SILU: tl.constexpr,
):  # fmt: skip
    """Normalise, scale, shift, activate, add the residual, round once, store. Pointers are at the image.

    squares: [pixels, any number], whose sum over the second axis is ||u||^2.
    """
    inside_c = channel < channels
    inside = (pixel < pixels)[:, None] & inside_c[None, :]
    # All loads before the sum, which they would otherwise wait for.
    a = tl.load(weight_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        a *= 1.0 + tl.load(scale_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
        b = tl.load(shift_ptr + channel, mask=inside_c, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptr += pixel[:, None] * residual_p + channel[None, :] * residual_c
        residual = tl.load(residual_ptr, mask=inside, other=0.0).to(tl.float32)
    # max(||u||, 1e-12)^2; a NaN stays one.
    square = tl.maximum(tl.sum(squares, axis=1), 1e-24, propagate_nan=tl.PropagateNan.ALL)
    y = u * (root * tl.rsqrt(square))[:, None] * a[None, :]
    if scale_ptr is not None:
        y += b[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    if residual_ptr is not None:
        y += residual
    tl.store(y_ptr + pixel[:, None] * y_p + channel[None, :] * y_c, y.to(y_ptr.dtype.element_ty), mask=inside)


@backend.jit
def _rms_norm_silu_kernel(
    x_ptr, y_ptr, weight_ptr, scale_ptr, shift_ptr, add_ptr, residual_ptr,
    channels, pixels, pixel_blocks, root,
    x_n, x_c, x_p, y_n, y_c, y_p, residual_n, residual_c, residual_p, scale_n, shift_n, add_n,
    BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program: all channels of BLOCK_P pixels of one image; grid (N pixel_blocks).

    x, y, residual (or None): [N, channels, pixels] of one dtype with any strides x_n, x_c, x_p and so on, in elements.
    weight: [channels]; scale and shift, add: [N, channels] with batch strides scale_n, shift_n, add_n (0 for one row),
    or None. root: sqrt(channels). One block of channels is held in registers. Of more, BLOCKS of BLOCK_C, squares are
    summed block after block, and then over the block's lanes; x is read again for the result.
    """
    image = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    # int64 in full: a channel's step in NCHW and a pixel's in NHWC are of any size.
    pixel = (tl.program_id(0) % pixel_blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C).to(tl.int64)
    x_ptr += image * x_n
    y_ptr += image * y_n
    if add_ptr is not None:
        add_ptr += image * add_n
    if scale_ptr is not None:
        scale_ptr += image * scale_n
        shift_ptr += image * shift_n
    if residual_ptr is not None:
        residual_ptr += image * residual_n
    if BLOCKS == 1:
        u = _load_tile(x_ptr, add_ptr, pixel, channel, pixels, channels, x_p, x_c)
        _finish(
            y_ptr, u, u * u, root, weight_ptr, scale_ptr, shift_ptr, residual_ptr, pixel, channel, pixels, channels,
            y_p, y_c, residual_p, residual_c, SILU,
        )  # fmt: skip
    else:
        squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for block in range(BLOCKS):
            u = _load_tile(x_ptr, add_ptr, pixel, block * BLOCK_C + channel, pixels, channels, x_p, x_c)
            squares += u * u
        square = tl.sum(squares, axis=1)[:, None]
        for block in range(BLOCKS):
            part = block * BLOCK_C + channel
            u = _load_tile(x_ptr, add_ptr, pixel, part, pixels, channels, x_p, x_c)
            _finish(
                y_ptr, u, square, root, weight_ptr, scale_ptr, shift_ptr, residual_ptr, pixel, part, pixels,
                channels, y_p, y_c, residual_p, residual_c, SILU,
            )  # fmt: skip


def _launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    silu: bool,
) -> Tensor:
    n, channels, height, width = x.shape
    pixels = height * width
    memory_format = backend.memory_format(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    if y.numel() == 0:
        return y
    if backend.pixel_stride(x) is None:
        x = x.contiguous(memory_format=memory_format)
    if residual is not None and backend.pixel_stride(residual) is None:
        residual = residual.contiguous(memory_format=memory_format)
    p = plan(n, channels, pixels, backend.sm_count(x.device))
    pixel_blocks = triton.cdiv(pixels, p.block_p)
    (scale, scale_n), (shift, shift_n), (add, add_n) = (backend.row(r) for r in (scale, shift, add))
    x_strides, y_strides, residual_strides = (
        (0, 0, 0) if t is None else (t.stride(0), t.stride(1), backend.pixel_stride(t)) for t in (x, y, residual)
    )
    with backend.on_device(x):
        _rms_norm_silu_kernel[(n * pixel_blocks,)](
            x, y, weight.contiguous(), scale, shift, add, residual, channels, pixels, pixel_blocks,
            math.sqrt(channels), *x_strides, *y_strides, *residual_strides, scale_n, shift_n, add_n,
            BLOCKS=p.blocks, BLOCK_C=p.block_c, BLOCK_P=p.block_p, SILU=silu,
            num_warps=p.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def rms_norm_silu(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """RMSNorm of x + add over channels, scaled and shifted, then SiLU, then the residual; rounded once at the end.

    Inside it is float32. Where the squares of a pixel overflow that, from a norm of 1.8e19, the pixel is divided by
    infinity, as torch does.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16; channels_last, NCHW, or any strides whose H and W collapse into
            one (a slice of channels, say); others are copied first.
        weight: [C], any float dtype.
        scale, shift: both or neither; [N or 1, C], any float dtype and batch stride.
        add: [N or 1, C], likewise; part of the norm.
        residual: x's shape and dtype, strides as for x; added last.
        silu: apply y sigmoid(y).

    Returns:
        x's shape and dtype; channels_last where x's channels are neighbours in memory, else NCHW.

    Raises:
        ValueError: shapes or dtypes other than these.
    """
    _check(x, weight, scale, shift, add, residual)
    if not backend.takes_kernel(x):
        return rms_norm_silu_ref(x, weight, scale, shift, add, residual, silu)
    call = torch.ops.ddpm.rms_norm_silu if backend.is_dispatched(x) else _launch
    return call(x, weight, scale, shift, add, residual, silu)


def rms_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """`rms_norm_silu` in plain PyTorch, in float32, or in float64 for a float64 x (to judge by)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if add is not None:
        y = y + add.to(dtype)[:, :, None, None]
    y = F.normalize(y, dim=1, eps=_EPS) * (weight.to(dtype) * math.sqrt(x.shape[1]))[:, None, None]
    if scale is not None and shift is not None:
        y = y * (1 + scale.to(dtype)[:, :, None, None]) + shift.to(dtype)[:, :, None, None]
    if silu:
        y = F.silu(y)
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype).contiguous(memory_format=backend.memory_format(x))


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
) -> None:
    backend.check_image(x)
    channels = x.shape[1]
    if weight.shape != (channels,):
        raise ValueError(f"weight must have shape [{channels}], as x has channels; found {list(weight.shape)}")
    backend.check_rows(x, scale, shift, add)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} {list(x.shape)}, as x is; found {residual.dtype} {list(residual.shape)}"
        )


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    silu: bool,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=backend.memory_format(x))


def _work(x: Tensor, *_: Any) -> backend.Work:
    n, channels, height, width = x.shape
    if x.numel() == 0:
        return backend.Work(0, 0, 0)
    p = plan(n, channels, height * width, backend.sm_count(x.device))
    programs = n * -(-height * width // p.block_p)
    return backend.Work(1, programs, 0, x.nbytes if p.blocks > 1 else 0, "reads twice" if p.blocks > 1 else "one pass")


backend.register(
    "rms_norm_silu(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? add, Tensor? residual, bool silu) "
    "-> Tensor",
    _launch,
    rms_norm_silu_ref,
    _fake,
    work=_work,
)
