"""What the ops share: whether Triton is there, who runs a call, sizes, layouts, checks, and torch.library."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Target:
    """What a plan may know of a GPU.

    Attributes:
        name: as the driver gives it.
        sms: streaming multiprocessors.
        shared_memory: bytes that one program may have.
        capability: (major, minor) of compute capability; (0, 0) for AMD's.
    """

    name: str
    sms: int
    shared_memory: int
    capability: tuple[int, int]


# Programs are planned for it where there is no GPU to ask (interpreter).
H100 = Target("NVIDIA H100 80GB HBM3", DEFAULT_SM_COUNT, 227 * 1024, (9, 0))

_assumed: list[Target] = []


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Tensors on the meta device count as tensors of this GPU: shapes and plans without data, on any machine."""
    _assumed.append(target)
    try:
        yield
    finally:
        _assumed.pop()


@functools.cache
def gpu(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    is_amd = properties.warp_size == 64
    shared = 64 * 1024 if is_amd else properties.shared_memory_per_block_optin
    capability = (0, 0) if is_amd else (properties.major, properties.minor)
    return Target(properties.name, properties.multi_processor_count, shared, capability)


def target(device: torch.device) -> Target:
    """The GPU that tensors on `device` are planned for; asked once, not in the middle of a capture."""
    if device.type == "meta" and _assumed:
        return _assumed[-1]
    return gpu(device) if device.type == "cuda" else H100


def is_gpu(device: torch.device) -> bool:
    """Whether tensors on `device` are a GPU's, or count as such."""
    return device.type == "cuda" or (device.type == "meta" and bool(_assumed))


def uses_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go to the Triton kernels (else to the `_ref`s)."""
    if device.type == "meta":
        return HAVE_TRITON and is_gpu(device)
    return HAVE_TRITON and (INTERPRET or device.type == "cuda")


def is_dispatched(tensor: Tensor) -> bool:
    """Whether a kernel's call goes through torch's dispatcher, which takes microseconds: only where it is traced, where
    only shapes are computed, and under a profiler, which finds what an operator has launched."""
    return torch.compiler.is_compiling() or tensor.is_meta or torch.autograd._profiler_enabled()


def takes_kernel(tensor: Tensor) -> bool:
    """`uses_triton` for a call that holds `tensor`; a GPU without Triton is served by the reference, with a warning."""
    if tensor.device.type == "cuda" and not HAVE_TRITON and not torch.compiler.is_compiling():
        warn_once("Triton is not installed: fused kernels are replaced by plain PyTorch, which is slower")
    return uses_triton(tensor.device)


@functools.cache
def warn_once(message: str) -> None:
    """Warn, but not again with the same words."""
    warnings.warn(message, stacklevel=4)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one: Triton launches there, whatever device its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return target(device).sms


def most_registers(device: torch.device, n: int) -> dict[str, int]:
    """The launch option that lets a thread have n registers on an NVIDIA GPU.

    Left alone, the assembler now and then spills a few to fit one more program on a multiprocessor.
    """
    return {"maxnreg": n} if HAVE_TRITON and target(device).capability > (0, 0) and not INTERPRET else {}


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


@dataclass(frozen=True)
class Work:
    """What one call of an op costs on a GPU, for counting without one.

    Attributes:
        launches: kernels.
        programs: of the main launch; 0 where nobody counts them.
        flops: of matrix products, a multiplication with its addition being two.
        extra_bytes: traffic beyond every tensor argument read once, every mutated one and every result written once,
            such as split-K partials; negative where less of an argument is read, such as one row of a table.
        form: which of several forms the plan took, for people.
    """

    launches: int
    programs: int
    flops: int
    extra_bytes: int = 0
    form: str = ""


# By op name: takes the op's arguments, which may be on the meta device under `assume`.
works: dict[str, Callable[..., Work]] = {}


def register(
    schema: str,
    launch: Callable[..., Any],
    ref: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    work: Callable[..., Work] | None = None,
) -> None:
    """Register `ddpm::<op>`, for torch.compile: eager calls go around the dispatcher, which costs microseconds.

    Args:
        schema: name, arguments with the mutated ones marked, and result.
        launch, ref, fake: take the schema's arguments; fake returns an empty tensor of the result's strides.
        work: takes them too, and says what `launch` would do; one launch, nothing else counted, unless given.
    """
    name = schema.partition("(")[0]
    works[name] = work or (lambda *_: Work(1, 0, 0))
    _library.define(schema)
    _library.impl(name, launch if HAVE_TRITON else ref, "CUDA")
    _library.impl(name, launch if INTERPRET else ref, "CPU")
    torch.library.register_fake(f"ddpm::{name}", fake, lib=_library)
