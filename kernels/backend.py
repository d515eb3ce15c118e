"""What the ops share: whether Triton is there, who runs a call, sizes, layouts, checks, and torch.library."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

HAVE_TRITON = triton is not None
# Triton reads TRITON_INTERPRET when a kernel is decorated, so this holds for the life of the process.
INTERPRET = HAVE_TRITON and bool(triton.knobs.runtime.interpret)
# Programs are planned for this many where there is no GPU to ask (interpreter, dry run): an H100's.
DEFAULT_SM_COUNT = 132
IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("ddpm", "FRAGMENT")


def jit(function: Callable) -> Callable:
    """`triton.jit`, or the function as it is where Triton is missing: it is never called there."""
    return triton.jit(function) if HAVE_TRITON else function


def uses_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go to the Triton kernels (else to the `_ref`s)."""
    return HAVE_TRITON and (INTERPRET or device.type == "cuda")


def takes_kernel(tensor: Tensor) -> bool:
    """`uses_triton` for a call that holds `tensor`; a GPU without Triton is served by the reference, with a warning."""
    if tensor.device.type == "cuda" and not HAVE_TRITON and not torch.compiler.is_compiling():
        _warn_once("Triton is not installed: fused kernels are replaced by plain PyTorch, which is slower")
    return uses_triton(tensor.device)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one: Triton launches there, whatever device its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; asked once, not in the middle of a capture."""
    if device.type != "cuda":
        return DEFAULT_SM_COUNT
    return torch.cuda.get_device_properties(device).multi_processor_count


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def pixel_stride(x: Tensor) -> int | None:
    """Elements from pixel to pixel of [N, C, H, W], rows after rows, or None where rows do not follow one another."""
    height, width = x.shape[2:]
    if width == 1:
        return x.stride(2)
    return x.stride(3) if height == 1 or x.stride(2) == width * x.stride(3) else None


def memory_format(x: Tensor) -> torch.memory_format:
    """Of a result made from x: NHWC where x's channels are neighbours, else NCHW."""
    nhwc = x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def row(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """A [N or 1, C] argument and its batch stride, 0 where one row serves every image."""
    if tensor is None:
        return None, 0
    if tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    return tensor, 0 if len(tensor) == 1 else tensor.stride(0)


def check_image(x: Tensor) -> None:
    """Raise ValueError where x is not [N, C, H, W], or has a dtype that no kernel reads."""
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W]; found shape {list(x.shape)}")
    if x.dtype not in IMAGE_DTYPES and uses_triton(x.device):
        raise ValueError(f"x must be float32, float16 or bfloat16; found {x.dtype}")


def check_rows(x: Tensor, scale: Tensor | None, shift: Tensor | None, add: Tensor | None) -> None:
    """Raise ValueError where these are no rows [N or 1, C] for x, or scale comes without shift."""
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift go together; give both or neither")
    n, channels = x.shape[:2]
    for name, tensor in (("scale", scale), ("shift", shift), ("add", add)):
        if tensor is not None and tensor.shape not in ((n, channels), (1, channels)):
            raise ValueError(f"{name} must have shape [{n} or 1, {channels}]; found {list(tensor.shape)}")


def register(schema: str, launch: Callable[..., Any], ref: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register `ddpm::<op>`, for torch.compile: eager calls go around the dispatcher, which costs microseconds.

    Args:
        schema: name, arguments with the mutated ones marked, and result.
        launch, ref, fake: take the schema's arguments; fake returns an empty tensor of the result's strides.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, launch if HAVE_TRITON else ref, "CUDA")
    _library.impl(name, launch if INTERPRET else ref, "CPU")
    torch.library.register_fake(f"ddpm::{name}", fake, lib=_library)
