"""One reverse step x_t -> x_{t-1} of any DDPM or DDIM chain, with its noise, in one launch.

    x_0 = f((kx x_t + ke out) / kd)
    x_{t-1} = c0 x_0 + cx x_t + ce out + std z

(Ho et al. 2020, "Denoising diffusion probabilistic models", algorithm 2 and eq. 7, with the clip f of the original
code.) `out` is the network's output, z standard normal. The coefficients are the row of a table that the device's step
counter picks: a captured launch serves every step of every schedule. What conditions a chain is part of the launch:

- classifier-free guidance (Ho and Salimans 2022): out = null + guidance (conditional - null), two halves of one batch;
- inpainting (RePaint, Lugmayr et al. 2022, algorithm 1): where an image is known, x_{t-1} becomes a sample of
  q(x_{t-1} | x_0), and the whole may then jump back to a noisier state: x = jump_mean x + jump_std z.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import backend
from .backend import tl, triton
from .philox import PURPOSE_JUMP, PURPOSE_KNOWN_REGION, PURPOSE_STEP, philox_normal4, philox_normal_ref

# A row of the table. s scales the noise; with a learned variance it is 1, or 0 where the step adds no noise.
# log_min and log_max bound a learned_range variance. clip is the bound of "clamp". known_mean and known_std are of
# q(x_{t-1} | x_0); known_std is 0 where x_{t-1} is x_0. jump_std is 0 where the step does not jump back.
COLUMNS = (
    *("kx", "ke", "kd", "c0", "cx", "ce", "s", "log_min", "log_max", "clip"),
    *("guidance", "known_mean", "known_std", "jump_mean", "jump_std"),
)
CLIPS = ("none", "clamp", "dynamic")
VARIANCES = ("fixed", "learned", "learned_range")
# What the result of each operation of the reverse step is rounded to: float32 is none at all; a half precision repeats
# a pipeline whose state has it. Guidance and inpainting, which no such pipeline has, are not rounded.
ROUNDINGS = ("float32", "float16", "bfloat16")
# The draws of an inpainting step, in the order of the noise buffer's planes.
PLANES = ("step", "known", "jump")

# What the flag `nonfinite` holds while every output was finite; larger than any step 2^32 + image.
NONFINITE_NONE = 2**63 - 1

_QUADS = 128  # quads of elements per program: one per thread
_PURPOSES = (PURPOSE_STEP, PURPOSE_KNOWN_REGION, PURPOSE_JUMP)  # of PLANES


def decode_nonfinite(value: int) -> tuple[int, int] | None:
    """(step, image) of the first non-finite network output, or None if there was none.

    Args:
        value: what the flag of `reverse_step` holds after the chain.
    """
    return None if value == NONFINITE_NONE else (value >> 32, value & 0xFFFFFFFF)


@backend.jit
def _is_nonfinite(v):
    return (v != v) | (tl.abs(v) == float("inf"))


@backend.jit
def _round(v, ROUNDING: tl.constexpr):
    if ROUNDING == "float16":
        v = v.to(tl.float16).to(tl.float32)
    elif ROUNDING == "bfloat16":
        v = v.to(tl.bfloat16).to(tl.float32)
    return v


@backend.jit
def _draw(noise_ptr, seeds_ptr, plane, image, first, element, block, step, inside, PURPOSE: tl.constexpr, QUADS):
    """4 QUADS standard normals: read from the noise buffer (plane: offset in elements), or else Philox's."""
    if noise_ptr is None:
        quad = block * QUADS + tl.arange(0, QUADS)
        z0, z1, z2, z3 = philox_normal4(tl.load(seeds_ptr + image), quad, step, PURPOSE)
        z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        z = tl.load(noise_ptr + plane + first + element, mask=inside, other=0.0)
    return z


@backend.jit
def _reverse_step_kernel(
    x_ptr,
    out_ptr,
    table_ptr,
    counter_ptr,
    nonfinite_ptr,
    seeds_ptr,
    noise_ptr,
    x0_ptr,
    threshold_ptr,
    known_ptr,
    mask_ptr,
    images,
    channels,
    pixels,
    blocks,
    stride_n,
    stride_c,
    stride_p,
    CLIP: tl.constexpr,
    VARIANCE: tl.constexpr,
    ROUNDING: tl.constexpr,
    GUIDED: tl.constexpr,
    SECOND_HALF: tl.constexpr,
    NCHW: tl.constexpr,
    PURPOSES: tl.constexpr,
    COLUMN_COUNT: tl.constexpr,
    QUADS: tl.constexpr,
):
    """One program: 4 QUADS consecutive elements, in NCHW order, of one image; grid (N blocks).

    x (in place), x0, known: float32 [N, channels, pixels], contiguous; x0 may be None, and so may known, with mask,
    uint8 of that shape. Either noise, float32 of that shape ([3, N, channels, pixels] with known), or seeds, int64 [N],
    is None. out: float32, float16 or bfloat16 [N or (GUIDED) 2N, channels or (SECOND_HALF) 2 channels, pixels] with
    strides stride_n, stride_c, stride_p in elements; NCHW says that stride_p is 1 and stride_c pixels. table: float32
    [rows, COLUMN_COUNT]. threshold: float32 [N], the S of CLIP "dynamic", else None. counter, nonfinite: int64 [1].

    Every operation is float32, rounded on its own and in the order written (the launcher switches contraction off), so
    the reference gives the same bits. There is no reduction but "any element is not finite".
    """
    image, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    elements = channels * pixels
    element = block * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    inside = element < elements
    step = tl.load(counter_ptr)
    row_ptr = table_ptr + step * COLUMN_COUNT
    kx, ke, kd = tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2)
    c0, cx, ce, s = tl.load(row_ptr + 3), tl.load(row_ptr + 4), tl.load(row_ptr + 5), tl.load(row_ptr + 6)

    out_ptr += image * stride_n
    if NCHW:
        offset = element
        second_ptr = out_ptr + elements
    else:
        channel = element // pixels
        offset = channel.to(tl.int64) * stride_c + (element - channel * pixels) * stride_p
        second_ptr = out_ptr + tl.cast(channels, tl.int64) * stride_c
    out = tl.load(out_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    bad = _is_nonfinite(out)
    if GUIDED:
        null_ptr = out_ptr + tl.cast(images, tl.int64) * stride_n
        null = tl.load(null_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        bad = bad | _is_nonfinite(null)
        out = null + tl.load(row_ptr + 10) * (out - null)
    if SECOND_HALF:
        v = tl.load(second_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        bad = bad | _is_nonfinite(v)

    first = image * elements
    plane = tl.cast(images, tl.int64) * elements
    x = tl.load(x_ptr + first + element, mask=inside, other=0.0)
    if tl.max(bad.to(tl.int32), axis=0) > 0:
        # An integer minimum: the order in which programs arrive does not matter.
        tl.atomic_min(nonfinite_ptr, step * 4294967296 + image)
    x0 = _round(_round(kx * x, ROUNDING) + _round(ke * out, ROUNDING), ROUNDING)
    x0 = _round(tl.div_rn(x0, tl.zeros_like(x) + kd), ROUNDING)
    if CLIP == "clamp":
        bound = _round(tl.load(row_ptr + 9), ROUNDING)
        x0 = tl.clamp(x0, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
    elif CLIP == "dynamic":
        bound = tl.load(threshold_ptr + image)
        x0 = tl.clamp(x0, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
        x0 = _round(tl.div_rn(x0, tl.zeros_like(x) + bound), ROUNDING)
    if x0_ptr is not None:
        tl.store(x0_ptr + first + element, x0, mask=inside)

    x = _round(_round(c0 * x0, ROUNDING) + _round(cx * x, ROUNDING), ROUNDING)
    x = _round(x + _round(ce * out, ROUNDING), ROUNDING)
    if s != 0:  # absent, not multiplied by 0: v may be negative there, and the noise buffer may hold anything
        std = s
        if VARIANCE == "learned":
            std = _round(s * _round(tl.sqrt_rn(v), ROUNDING), ROUNDING)
        elif VARIANCE == "learned_range":
            f = _round(_round(v + 1, ROUNDING) * 0.5, ROUNDING)
            high = _round(f * tl.load(row_ptr + 8), ROUNDING)
            low = _round(_round(1 - f, ROUNDING) * tl.load(row_ptr + 7), ROUNDING)
            std = s * _round(tl.exp(_round(0.5 * _round(high + low, ROUNDING), ROUNDING)), ROUNDING)
        z = _draw(noise_ptr, seeds_ptr, 0, image, first, element, block, step, inside, PURPOSES[0], QUADS)
        x = _round(x + _round(std * z, ROUNDING), ROUNDING)

    if known_ptr is not None:
        keep = tl.load(mask_ptr + first + element, mask=inside, other=0) != 0
        known = tl.load(row_ptr + 11) * tl.load(known_ptr + first + element, mask=inside, other=0.0)
        std = tl.load(row_ptr + 12)
        if std != 0:
            z = _draw(noise_ptr, seeds_ptr, plane, image, first, element, block, step, inside, PURPOSES[1], QUADS)
            known = known + std * z
        x = tl.where(keep, known, x)
        std = tl.load(row_ptr + 14)
        if std != 0:
            z = _draw(noise_ptr, seeds_ptr, 2 * plane, image, first, element, block, step, inside, PURPOSES[2], QUADS)
            x = tl.load(row_ptr + 13) * x + std * z
    tl.store(x_ptr + first + element, x, mask=inside)


def _launch(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    counter: Tensor,
    nonfinite: Tensor,
    clip: str,
    variance: str,
    rounding: str,
    seeds: Tensor | None,
    noise: Tensor | None,
    x0: Tensor | None,
    threshold: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
) -> None:
    n, channels, height, width = x.shape
    pixels = height * width
    if x.numel() == 0:
        return
    if backend.pixel_stride(out) is None:
        out = out.contiguous()
    stride_p = backend.pixel_stride(out)
    blocks = triton.cdiv(channels * pixels, 4 * _QUADS)
    with backend.on_device(x):
        _reverse_step_kernel[(n * blocks,)](
            x,
            out,
            table,
            counter,
            nonfinite,
            seeds,
            noise,
            x0,
            threshold,
            known,
            mask,
            n,
            channels,
            pixels,
            blocks,
            out.stride(0),
            out.stride(1),
            stride_p,
            CLIP=clip,
            VARIANCE=variance,
            ROUNDING=rounding,
            GUIDED=len(out) != n,
            SECOND_HALF=out.shape[1] != channels,
            NCHW=stride_p == 1 and out.stride(1) == pixels,
            PURPOSES=_PURPOSES,
            COLUMN_COUNT=len(COLUMNS),
            QUADS=_QUADS,
            num_warps=4,
            enable_fp_fusion=False,
        )


def reverse_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    counter: Tensor,
    nonfinite: Tensor,
    *,
    clip: str = "clamp",
    variance: str = "fixed",
    rounding: str = "float32",
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    x0: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    threshold_ratio: float = 0.995,
    threshold_max: float = 1.0,
) -> None:
    """Replace x_t by x_{t-1}, in place.

    Args:
        x: the state, float32 [N, C, H, W], NCHW contiguous.
        out: the network's output, float32, float16 or bfloat16 [N, C, H, W] or [N, 2C, H, W], in any strides (NCHW and
            channels_last are read as they lie). Of 2C channels the second half is the variance v. Of 2N images the
            first N are conditional, the others null: they are combined by the row's guidance, and v is the first ones'.
        table: float32 [rows, len(COLUMNS)], contiguous.
        counter: int64 [1], the row to use, and the noise's draw number. Never written.
        nonfinite: int64 [1], first set to NONFINITE_NONE by the caller; becomes the least of itself and
            step 2^32 + image over all NaN and infinities in `out`. See `decode_nonfinite`.
        clip: f is the identity ("none"), a clamp to +-clip ("clamp"), or the dynamic threshold ("dynamic"): a clamp to
            +-S and a division by S, see `dynamic_threshold`. All pass NaN on.
        variance: std is s ("fixed"); s sqrt(v) ("learned"); s exp((f log_max + (1 - f) log_min) / 2) with
            f = (v + 1) / 2 ("learned_range"; Nichol and Dhariwal 2021, eq. 15). Where s is 0 no noise is added.
        rounding: what every operation of the reverse step proper is rounded to, one of ROUNDINGS; the state's own dtype
            is float32 all the same.
        seeds: int64 [N]: z is Philox's, PURPOSE_STEP. Or
        noise: float32 [N, C, H, W], NCHW contiguous: z itself; [3, N, C, H, W] with `known`, see PLANES.
        x0: receives this step's x_0; float32 [N, C, H, W], NCHW contiguous.
        known: image for inpainting, float32 like x, with
        mask: uint8 like x, not 0 where it is known.
        threshold_ratio, threshold_max: of the dynamic threshold.

    Raises:
        ValueError: shapes, dtypes or strides other than these.
    """
    _check(x, out, table, counter, nonfinite, clip, variance, rounding, seeds, noise, x0, known, mask)
    if not backend.takes_kernel(x):
        reverse_step_ref(
            x,
            out,
            table,
            counter,
            nonfinite,
            clip=clip,
            variance=variance,
            rounding=rounding,
            seeds=seeds,
            noise=noise,
            x0=x0,
            known=known,
            mask=mask,
            threshold_ratio=threshold_ratio,
            threshold_max=threshold_max,
        )
        return
    threshold = None
    if clip == "dynamic":  # a quantile needs the whole image: its own pass
        threshold = dynamic_threshold(_unclipped_x0(x, out, table, counter, rounding), threshold_ratio, threshold_max)
    call = torch.ops.ddpm.reverse_step if backend.is_dispatched(x) else _launch
    call(x, out, table, counter, nonfinite, clip, variance, rounding, seeds, noise, x0, threshold, known, mask)


def reverse_step_ref(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    counter: Tensor,
    nonfinite: Tensor,
    *,
    clip: str = "clamp",
    variance: str = "fixed",
    rounding: str = "float32",
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    x0: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    threshold_ratio: float = 0.995,
    threshold_max: float = 1.0,
) -> None:
    """`reverse_step` in plain PyTorch: the same operations in the same order, in x's dtype (float64 to judge by)."""
    threshold = None
    if clip == "dynamic":
        threshold = dynamic_threshold(_unclipped_x0(x, out, table, counter, rounding), threshold_ratio, threshold_max)
    _step_ref(x, out, table, counter, nonfinite, clip, variance, rounding, seeds, noise, x0, threshold, known, mask)


def _step_ref(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    counter: Tensor,
    nonfinite: Tensor,
    clip: str,
    variance: str,
    rounding: str,
    seeds: Tensor | None,
    noise: Tensor | None,
    x0: Tensor | None,
    threshold: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
) -> None:
    """The kernel's arguments and arithmetic."""
    n, channels = x.shape[:2]
    if x.numel() == 0:
        return
    _flag_nonfinite(out, n, counter, nonfinite)
    row, r = _row(table, counter, x.dtype), _rounder(rounding)
    clipped = _unclipped_x0(x, out, table, counter, rounding)
    if clip == "clamp":
        bound = r(row["clip"])
        clipped = torch.clamp(clipped, -bound, bound)
    elif clip == "dynamic":
        threshold = threshold.view(n, 1, 1, 1)
        clipped = r(torch.clamp(clipped, -threshold, threshold) / threshold)
    if x0 is not None:
        x0.copy_(clipped)
    mean = r(r(row["c0"] * clipped) + r(row["cx"] * x))
    mean = r(mean + r(row["ce"] * _prediction(out, row["guidance"], x)))

    def draw(plane: int) -> Tensor:
        if noise is None:
            return philox_normal_ref(seeds, x[0].numel(), counter, _PURPOSES[plane]).view(x.shape).to(x.dtype)
        return (noise if known is None else noise[plane]).to(x.dtype)

    s = std = row["s"]
    if variance != "fixed":
        v = out[:n, channels:].to(x.dtype)
        if variance == "learned":
            std = r(s * r(v.sqrt()))
        else:
            f = r(r(v + 1) * 0.5)
            log_variance = r(r(f * row["log_max"]) + r(r(1 - f) * row["log_min"]))
            std = s * r(torch.exp(r(0.5 * log_variance)))
    after = torch.where(s == 0, mean, r(mean + r(std * draw(0))))

    if known is not None:
        noised = row["known_mean"] * known.to(x.dtype)
        noised = torch.where(row["known_std"] == 0, noised, noised + row["known_std"] * draw(1))
        after = torch.where(mask != 0, noised, after)
        jumped = row["jump_mean"] * after + row["jump_std"] * draw(2)
        after = torch.where(row["jump_std"] == 0, after, jumped)
    x.copy_(after)


def _row(table: Tensor, counter: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return dict(zip(COLUMNS, table.index_select(0, counter)[0].to(dtype).unbind(), strict=True))


def _rounder(rounding: str) -> Callable[[Tensor], Tensor]:
    if rounding == "float32":
        return lambda v: v
    dtype = getattr(torch, rounding)
    return lambda v: v.to(dtype).to(v.dtype)


def _prediction(out: Tensor, guidance: Tensor, x: Tensor) -> Tensor:
    """The first C channels of the output, like x, the two halves of a guided batch combined."""
    n, channels = x.shape[:2]
    conditional = out[:n, :channels].to(x.dtype)
    if len(out) == n:
        return conditional
    null = out[n:, :channels].to(x.dtype)
    return null + guidance * (conditional - null)


def _unclipped_x0(x: Tensor, out: Tensor, table: Tensor, counter: Tensor, rounding: str) -> Tensor:
    row, r = _row(table, counter, x.dtype), _rounder(rounding)
    return r(r(r(row["kx"] * x) + r(row["ke"] * _prediction(out, row["guidance"], x))) / row["kd"])


def _flag_nonfinite(out: Tensor, n: int, counter: Tensor, nonfinite: Tensor) -> None:
    finite = out.isfinite().flatten(1).all(dim=1).view(-1, n).all(dim=0)  # [N], of both halves of a guided batch
    flags = counter * 2**32 + torch.arange(n, device=out.device)
    nonfinite.copy_(torch.minimum(nonfinite, torch.where(finite, NONFINITE_NONE, flags).amin()))


def dynamic_threshold(x0: Tensor, ratio: float, maximum: float) -> Tensor:
    """The dynamic threshold S of each image, in 1 .. maximum (Saharia et al. 2022, section 2.3).

    The `ratio` quantile of |x_0| with linear interpolation: the arithmetic of `torch.quantile`, which itself refuses
    more than 16 million elements. An image with a NaN has S = NaN.

    Args:
        x0: [N, C, H, W] before the clip.

    Returns:
        [N], in x0's dtype.
    """
    values = x0.abs().flatten(1).sort(dim=1).values  # [N, elements]; NaN sorts last
    last = values.shape[1] - 1
    rank = torch.full((1, 1), ratio, dtype=x0.dtype, device=x0.device) * last
    below, above = (values.gather(1, r.long().expand(len(values), 1))[:, 0] for r in (rank.floor(), rank.ceil()))
    quantile = torch.lerp(below, above, (rank - rank.floor())[0])
    return torch.where(values[:, last].isnan(), values[:, last], quantile).clamp(1, maximum)


def _check(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    counter: Tensor,
    nonfinite: Tensor,
    clip: str,
    variance: str,
    rounding: str,
    seeds: Tensor | None,
    noise: Tensor | None,
    x0: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
) -> None:
    for name, value, allowed in (
        ("clip", clip, CLIPS),
        ("variance", variance, VARIANCES),
        ("rounding", rounding, ROUNDINGS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    if (seeds is None) == (noise is None):
        raise ValueError("give the noise as exactly one of seeds and noise")
    if (known is None) != (mask is None):
        raise ValueError("give known and mask together, or neither")
    if noise is not None and known is not None:
        if noise.shape != (len(PLANES), *x.shape):
            raise ValueError(f"noise must be {[len(PLANES), *x.shape]} with known; found {list(noise.shape)}")
        noise = noise[0]
    for name, tensor in (("x", x), ("noise", noise), ("x0", x0), ("known", known), ("mask", mask)):
        if tensor is not None and not (tensor.is_contiguous() and tensor.shape == x.shape and tensor.ndim == 4):
            raise ValueError(
                f"{name} must be [N, C, H, W] like x, NCHW contiguous; found shape {list(tensor.shape)}, strides "
                f"{list(tensor.stride())}, and x of shape {list(x.shape)}"
            )
        if name == "mask":
            if tensor is not None and tensor.dtype != torch.uint8:
                raise ValueError(f"mask must be uint8; found {tensor.dtype}")
        elif tensor is not None and tensor.dtype not in (torch.float32, x.dtype):
            raise ValueError(f"{name} must be float32; found {tensor.dtype}")
    if x.dtype != torch.float32 and backend.uses_triton(x.device):
        raise ValueError(f"x must be float32; found {x.dtype}")
    n, channels, height, width = x.shape
    counts = (channels, 2 * channels) if variance == "fixed" else (2 * channels,)
    images = len(out) if len(out) in (n, 2 * n) else n
    if out.ndim != 4 or out.shape[1] not in counts or out.shape != (images, out.shape[1], height, width):
        expected = " or ".join(str([n, c, height, width]) for c in counts)
        raise ValueError(
            f"out must have shape {expected} for variance {variance!r}, or twice as many images; found "
            f"{list(out.shape)}"
        )
    if table.ndim != 2 or table.shape[1] != len(COLUMNS) or not table.is_contiguous():
        raise ValueError(f"table must be contiguous [rows, {len(COLUMNS)}]; found {list(table.shape)}")
    if seeds is not None and (seeds.dtype != torch.int64 or seeds.shape != (n,)):
        raise ValueError(f"seeds must be int64 [{n}]; found {seeds.dtype} {list(seeds.shape)}")
    for name, tensor in (("counter", counter), ("nonfinite", nonfinite)):
        if tensor.dtype != torch.int64 or tensor.shape != (1,):
            raise ValueError(f"{name} must be int64 [1]; found {tensor.dtype} {list(tensor.shape)}")


def _fake(*args) -> None:
    return None


def _work(
    x: Tensor, out: Tensor, table: Tensor, counter: Tensor, nonfinite: Tensor, *others: str | Tensor | None
) -> backend.Work:
    n, elements = len(x), x[0:1].numel()
    if x.numel() == 0:
        return backend.Work(0, 0, 0)
    x0 = others[5]
    # One row of the table is read; x_0 is only written; the flag is touched where something is wrong.
    unread = (len(table) - 1) * table.shape[1] * 4 + 2 * nonfinite.nbytes + (0 if x0 is None else x0.nbytes)
    return backend.Work(1, n * -(-elements // (4 * _QUADS)), 0, -unread)


backend.register(
    "reverse_step(Tensor(a!) x, Tensor out, Tensor table, Tensor counter, Tensor(b!) nonfinite, str clip, "
    "str variance, str rounding, Tensor? seeds, Tensor? noise, Tensor(c!)? x0, Tensor? threshold, Tensor? known, "
    "Tensor? mask) -> ()",
    _launch,
    _step_ref,
    _fake,
    work=_work,
)
