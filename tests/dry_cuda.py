"""Dry run of a CUDA path on a machine without a GPU.

Inside `dry_cuda(arch)`:

- tensors on "cuda:0" are fake: shape, strides, dtype and device are tracked, there is no data. Device mix-ups raise,
  and so do reads of device values by the host (`.item()`, `if tensor:`, `.cpu()`), which on a GPU would wait for it;
- a Triton launch is not run: it is compiled for the architecture from its real arguments and options, and recorded with
  registers, spills, shared memory and grid. What a GPU would refuse (too much shared memory, too large a grid, tensors
  of another device than the current one) raises;
- `torch.cuda`'s graphs, streams, events, device guards and properties are fakes that keep the order of things. Inside a
  capture, whatever breaks a real one raises: synchronisation, copies between host and device, the first launch of a
  kernel that nothing warmed up.

    network = FusedUNet(checkpoint.network)  # on real CPU tensors, outside
    with dry_cuda(90) as dry:
        network = dry.to_fake_cuda(network)
        loop = Loop(network, shape, torch.device("cuda:0"), compiled=False)
        dry.allow_read(loop.buffers.nonfinite, NONFINITE_NONE)  # the one read that a run ends with
        walk(loop, table, x_T, seeds=seeds)
    dry.captures[0].launches, dry.captures[0].ops, dry.captures[0].replays

Not shown: numerics (Triton's interpreter does that), timing, races, torch.compile (dynamo needs a real device), CUDA
generators. Write "cuda:0", not "cuda". Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from ddpm.fused.attention import attention_backend
from ddpm.kernels import backend

aten = torch.ops.aten
KIB, GIB = 2**10, 2**30

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Chip:
    """What a launcher may ask about a device, and what a launch must respect.

    Attributes:
        shared_limit: bytes of shared memory that one program may have.
        registers: 32-bit registers that one program may have, or None where the compiler keeps the limit by itself.
    """

    name: str
    capability: tuple[int, int]
    multi_processor_count: int
    total_memory: int
    shared_limit: int
    warp_size: int = 32
    registers: int | None = 65536


CHIPS: dict[int | str, Chip] = {
    80: Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 80 * GIB, 163 * KIB),
    90: Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 80 * GIB, 227 * KIB),
    100: Chip("NVIDIA B200", (10, 0), 148, 180 * GIB, 227 * KIB),
    "gfx942": Chip("AMD Instinct MI300X", (9, 4), 304, 192 * GIB, 64 * KIB, warp_size=64, registers=None),
}


class HostRead(RuntimeError):
    """The host asked for a value that is on the device: a wait for the GPU, and an error inside a capture."""


class CaptureBroken(RuntimeError):
    """Something that a CUDA graph's capture does not allow."""


@dataclass
class Launch:
    """One Triton launch.

    Attributes:
        op: the kernel's file, the last part of its module's name.
        regs: per thread (VGPRs on AMD).
        spills: bytes of spilled registers per thread (on AMD: of vector registers their number, and bytes of scratch).
        shared: bytes per program.
        captured: whether it went into a graph.
        cubin: the binary, for NVIDIA's chips.
    """

    name: str
    op: str
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    regs: int
    spills: int
    shared: int
    captured: bool
    cubin: bytes | None = field(repr=False)

    def sass(self) -> str:
        """The machine's instructions."""
        assert self.cubin is not None, "AMD's binaries are not disassembled"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return _nvidia_tool("nvdisasm", "--print-code", file.name)


@dataclass
class Capture:
    """A captured graph.

    Attributes:
        launches: its Triton launches in order.
        ops: everything in it that launches device work, in order: names of Triton kernels and of aten operations. An
            aten operation is counted as one launch, which is a lower bound.
        replays: how often the graph was replayed.
        device: index of the GPU whose stream captures; work for another one would not be in the graph.
    """

    device: int = 0
    launches: list[Launch] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    replays: int = 0


class Dry:
    """The record of a dry run. Attributes: chip, launches, ops, captures (see `Capture`), ranges, reads, mode."""

    def __init__(self, chip: Chip, mode: FakeTensorMode, devices: int):
        self.chip, self.mode, self.devices = chip, mode, devices
        self.launches: list[Launch] = []
        self.ops: list[str] = []
        self.captures: list[Capture] = []
        self.reads = 0
        self.capturing: Capture | None = None
        self.ranges: list[str] = []
        self.open_ranges: list[str] = []
        self.device = 0
        self._allowed: list[tuple[Tensor, float]] = []
        self._warm: set[Any] = set()

    @property
    def replays(self) -> int:
        """Of all graphs."""
        return sum(capture.replays for capture in self.captures)

    def to_fake_cuda(self, value: Any, device: str = "cuda:0") -> Any:
        """A fake copy of a tensor; or a module or a dataclass (such as StepBuffers), its tensors replaced in place."""
        if isinstance(value, Tensor):
            return self.mode.from_tensor(value.detach()).to(device)
        if isinstance(value, torch.nn.Module):
            # Not module.to(): it swaps the contents of parameters, which fake tensors refuse.
            for part in value.modules():
                for table in (part._parameters, part._buffers):
                    for name, tensor in table.items():
                        if tensor is not None:
                            table[name] = self.to_fake_cuda(tensor, device)
            return value
        for entry in dataclasses.fields(value):
            if isinstance(tensor := getattr(value, entry.name), Tensor):
                setattr(value, entry.name, self.to_fake_cuda(tensor, device))
        return value

    def allow_read(self, tensor: Tensor, value: float) -> None:
        """Let the host read this very tensor, outside captures: it finds `value`. Each read counts in `reads`."""
        self._allowed.append((tensor, value))

    def read(self, tensor: Tensor) -> float:
        """The value that `allow_read` promised.

        Raises:
            HostRead: none was, or a capture is under way.
        """
        for allowed, value in self._allowed:
            if allowed is tensor and self.capturing is None:
                self.reads += 1
                return value
        where = " inside a capture" if self.capturing else ""
        raise HostRead(f"the host reads a value of a {list(tensor.shape)} tensor on {tensor.device}{where}")

    def forbid_in_capture(self, what: str) -> None:
        if self.capturing is not None:
            raise CaptureBroken(f"{what} inside a capture")

    def record(self, name: str) -> None:
        self.ops.append(name)
        if self.capturing is not None:
            self.capturing.ops.append(name)

    def launch(self, launch: Launch, key: Any) -> None:
        if self.capturing is not None:
            # On a GPU the first launch loads the binary, which a capture does not allow.
            if key not in self._warm:
                raise CaptureBroken(f"{launch.name} is launched for the first time inside a capture: warm it up before")
            if self.device != self.capturing.device:
                where = f"cuda:{self.device}, but a stream of cuda:{self.capturing.device} captures"
                raise CaptureBroken(f"{launch.name} is launched on {where}")
            self.capturing.launches.append(launch)
        self._warm.add(key)
        self.launches.append(launch)
        self.record(launch.name)


class _Watch(TorchDispatchMode):
    """Sees every aten operation ahead of the fake tensors: records the device's, refuses the host's reads."""

    # These allocate or look, and launch nothing.
    QUIET = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh", "device")

    def __init__(self, dry: Dry):
        super().__init__()
        self.dry = dry

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is aten._local_scalar_dense.default and _on_gpu(first):
            return self.dry.read(first)
        if func is aten._to_copy.default:
            destination = torch.device(kwargs.get("device") or first.device)
            self._check_copy(first.device, destination)
            if destination.type == "cuda" and getattr(first, "constant", None) is not None:
                args = (torch.empty(first.shape, dtype=first.dtype),)  # one known value would be sent to a real GPU
        elif func is aten.copy_.default:
            self._check_copy(args[1].device, first.device)
        result = func(*args, **kwargs)
        if func is aten.convolution.default:
            result = _convolution_layout(result, *args[:2])
        name = func._schema.name.split("::")[1]
        if _on_gpu(first if result is None else result) and name not in self.QUIET and not _is_view(func):
            self.dry.record(name)
        return result

    def _check_copy(self, source: torch.device, destination: torch.device) -> None:
        if source.type == "cuda" and destination.type != "cuda":
            raise HostRead(f"a copy from {source} to {destination}")
        if source.type != "cuda" and destination.type == "cuda":
            self.dry.forbid_in_capture(f"a copy from {source} to {destination}")


def _on_gpu(value: Any) -> bool:
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return func is aten._unsafe_view.default or any(not a.is_write for a in aliases)


def _convolution_layout(result: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """cuDNN answers channels_last with channels_last; a build of torch without cuDNN does not know that."""
    nhwc = {"memory_format": torch.channels_last}
    wanted = x.dim() == 4 and any(t.is_contiguous(**nhwc) and not t.is_contiguous() for t in (x, weight))
    if not _on_gpu(result) or not wanted or x.dtype == torch.float64 or result.is_contiguous(**nhwc):
        return result
    return torch.empty_like(result, **nhwc)


class _FusedAttention(TorchFunctionMode):
    """On a GPU the kernel that attention is pinned to; without one, torch would take plain matrix products."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _on_gpu(args[0]) and len(args) == 3 and not kwargs:
            kernel = attention_backend(args[0].shape[-1], args[0].dtype, args[0].device)
            if kernel == SDPBackend.EFFICIENT_ATTENTION:
                return aten._scaled_dot_product_efficient_attention(*args, None, False)[0]
            if kernel == SDPBackend.FLASH_ATTENTION:
                return aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **kwargs)


def _fake_torch_cuda(dry: Dry) -> dict[str, Any]:
    """Replacements for attributes of `torch.cuda`."""

    def index_of(device: Any = None) -> int:
        if device is None or isinstance(device, int):
            return dry.device if device is None else device
        index = torch.device(device).index
        return dry.device if index is None else index

    class Stream:
        def __init__(self, device: Any = None, priority: int = 0, **_: Any):
            self.device = torch.device("cuda", index_of(device))

        def wait_stream(self, stream: Stream) -> None: ...
        def wait_event(self, event: Event) -> None: ...

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self) -> None:
            dry.forbid_in_capture("a stream's synchronize()")

        def query(self) -> bool:
            dry.forbid_in_capture("a stream's query()")
            return True

    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any):
            self.recorded = False

        def record(self, stream: Stream | None = None) -> None:
            self.recorded = True

        def wait(self, stream: Stream | None = None) -> None: ...

        def synchronize(self) -> None:
            dry.forbid_in_capture("an event's synchronize()")

        def query(self) -> bool:
            dry.forbid_in_capture("an event's query()")
            return True

    class CUDAGraph:
        def __init__(self, keep_graph: bool = False):
            self.capture: Capture | None = None

        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            dry.forbid_in_capture("another capture")
            self.capture = dry.capturing = Capture(device=current[-1].device.index)

        def capture_end(self) -> None:
            dry.captures.append(dry.capturing)
            dry.capturing = None

        def replay(self) -> None:
            dry.forbid_in_capture("a replay")
            if self.capture is None:
                raise RuntimeError("replay() of a graph that was never captured")
            self.capture.replays += 1

        def reset(self) -> None:
            self.capture = None

        def pool(self) -> tuple[int, int]:
            return (0, 0)

    current = [Stream()]
    default_capture_stream: list[Stream] = []  # as in torch: made once, on the device that is current then

    def current_stream(device: Any = None) -> Stream:
        index = index_of(device)
        return next((s for s in reversed(current) if s.device.index == index), None) or Stream(index)

    @contextlib.contextmanager
    def stream(other: Stream | None) -> Iterator[None]:
        if other is None:
            yield
            return
        device, dry.device = dry.device, other.device.index  # as torch does
        current.append(other)
        try:
            yield
        finally:
            current.pop()
            dry.device = device

    @contextlib.contextmanager
    def graph(cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, **options: Any) -> Iterator[None]:
        if stream is None and not default_capture_stream:
            default_capture_stream.append(Stream())
        side = stream or default_capture_stream[0]
        with fakes["stream"](side):
            cuda_graph.capture_begin()
            try:
                yield
            except BaseException:
                # The graph of a failed capture is worth nothing.
                dry.capturing = cuda_graph.capture = None
                raise
            cuda_graph.capture_end()

    class device:
        def __init__(self, device: Any):
            self.index, self.before = index_of(device), 0

        def __enter__(self) -> None:
            self.before, dry.device = dry.device, self.index

        def __exit__(self, *_: Any) -> None:
            dry.device = self.before

    def get_device_properties(device: Any = None) -> SimpleNamespace:
        chip = dry.chip
        return SimpleNamespace(
            name=chip.name,
            major=chip.capability[0],
            minor=chip.capability[1],
            multi_processor_count=chip.multi_processor_count,
            total_memory=chip.total_memory,
            warp_size=chip.warp_size,
            shared_memory_per_block_optin=chip.shared_limit,
        )

    def set_device(device: Any) -> None:
        dry.device = index_of(device)

    def range_push(name: str) -> None:
        dry.ranges.append(name)
        dry.open_ranges.append(name)

    fakes = {
        "nvtx": SimpleNamespace(range_push=range_push, range_pop=lambda: dry.open_ranges.pop()),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "stream": stream,
        "device": device,
        "current_stream": current_stream,
        "default_stream": lambda device=None: current[0],
        "synchronize": lambda device=None: dry.forbid_in_capture("torch.cuda.synchronize()"),
        "is_current_stream_capturing": lambda: dry.capturing is not None,
        "is_available": lambda: True,
        "device_count": lambda: dry.devices,
        "current_device": lambda: dry.device,
        "set_device": set_device,
        "get_device_capability": lambda device=None: dry.chip.capability,
        "get_device_name": lambda device=None: dry.chip.name,
        "get_device_properties": get_device_properties,
        "mem_get_info": lambda device=None: (dry.chip.total_memory * 9 // 10, dry.chip.total_memory),
    }
    return fakes


def _lend_device_guard() -> None:
    """A CPU build of torch lacks the device guard that fake CUDA tensors need: lend it Meta's, which does nothing."""
    if torch.version.cuda is None and torch.version.hip is None:
        lib = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        registry = (ctypes.c_void_p * 32).in_dll(lib, "_ZN3c104impl26device_guard_impl_registryE")
        cuda, meta = 1, 14  # c10::DeviceType
        registry[cuda] = registry[cuda] or registry[meta]


def _resources(asm: dict[str, Any]) -> tuple[int, int]:
    """(registers, spills) from the binary."""
    if "cubin" not in asm:
        text = asm["amdgcn"]

        def take(key: str) -> int:
            return max((int(v) for v in re.findall(rf"\.{key}:\s+(\d+)", text)), default=0)

        # Scalar registers spill into lanes of vector registers, not into memory (else scratch would show it).
        return take("vgpr_count"), take("vgpr_spill_count") + take("private_segment_fixed_size")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        out = _nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
    usage = out[out.index("Function") :]
    regs, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    # An array of local memory is no spill (libdevice's sine has one, for huge angles). ptxas keeps it in the frame, or
    # resolves it; the frame is a multiple of 8 bytes.
    arrays = sum(-(-int(size) // 8) * 8 for size in re.findall(r"__local_depot\d+\[(\d+)\]", asm["ptx"]))
    return regs, (stack - arrays if stack >= arrays else stack) + local


def _nvidia_tool(name: str, *arguments: str) -> str:
    """What one of the tools prints that Triton brings."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


_binaries: dict[Any, tuple[int, int, int, int, bytes | None]] = {}


def _compile(
    fn: JITFunction, signature: dict, constants: dict, attributes: dict, options: dict, target: GPUTarget
) -> tuple[Any, tuple[int, int, int, int, bytes | None]]:
    """A key of the binary, and its (registers, spills, shared bytes, warps, cubin)."""
    # The types too: 1, 1.0 and True are equal, and compile to different code.
    typed = tuple((name, type(value).__name__, value) for name, value in constants.items())
    key = (fn, tuple(signature.items()), typed, str(attributes), tuple(sorted(options.items())), target)
    if key not in _binaries:
        positions = {(fn.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=fn, signature=signature, constexprs=positions, attrs=attributes)
        kernel = triton.compile(source, target=target, options=options)
        shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
        _binaries[key] = (*_resources(kernel.asm), shared, warps, kernel.asm.get("cubin"))
    return key, _binaries[key]


def _specialize(
    fn: JITFunction, arguments: dict[str, Any], target: GPUTarget, device: int
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """The signature, constants and attributes that a real launch would be compiled with."""
    signature, constants, attributes = {}, {}, {}
    for i, (param, value) in enumerate(zip(fn.params, arguments.values(), strict=True)):
        where = f"{fn.fn.__name__}: argument {param.name}"
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, Tensor):
            if value.device.type != "cuda":
                raise ValueError(f"{where} is on {value.device}, not on the GPU")
            if value.device.index != device:
                raise ValueError(f"{where} is on {value.device}, but the launch goes to cuda:{device}")
            signature[param.name] = "*" + _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:  # real storages start aligned
                attributes[(i,)] = [["tt.divisibility", 16]]
            if target.backend == "hip" and value.untyped_storage().nbytes() < 2**31:
                attributes.setdefault((i,), []).append(["tt.pointer_range", 32])
        elif isinstance(value, bool):
            signature[param.name] = "i1"
        elif isinstance(value, int):
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            raise TypeError(f"{where} is a {type(value).__name__}: host descriptors and tuples are not supported here")
    return signature, constants, attributes


def _check_fits(name: str, chip: Chip, grid: tuple[int, ...], regs: int, shared: int, warps: int) -> None:
    if not 1 <= len(grid) <= 3 or min(grid) < 0 or grid[0] >= 2**31 or max(grid[1:], default=1) > 65535:
        raise ValueError(f"{name}: grid {grid} is no grid of a GPU")
    if shared > chip.shared_limit:
        raise ValueError(f"{name}: {shared} bytes of shared memory, and {chip.name} has {chip.shared_limit}")
    if chip.registers is not None and regs * warps * chip.warp_size > chip.registers:
        raise ValueError(f"{name}: {regs} registers in {warps} warps are more than {chip.name} has")


@contextlib.contextmanager
def dry_cuda(arch: int | str = 90, *, devices: int = 1) -> Iterator[Dry]:
    """Pretend that this machine has GPUs.

    Args:
        arch: a key of CHIPS, an sm number or an AMD name.
        devices: how many.
    """
    chip = CHIPS[arch]
    target = GPUTarget("cuda" if isinstance(arch, int) else "hip", arch, chip.warp_size)
    # enable_fp_fusion is given because Triton 3.9 warns where its default is taken.
    known = set(make_backend(target).parse_options({"enable_fp_fusion": True}).__dict__)
    _lend_device_guard()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = self.fn.__name__
        options = {k: kwargs.pop(k) for k in list(kwargs) if k not in self.arg_names}
        if unknown := set(options) - known:
            raise TypeError(f"{name}: unknown launch options {sorted(unknown)}")
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        signature, constants, attributes = _specialize(self, dict(bound.arguments), target, dry.device)
        if callable(grid):
            grid = grid(dict(bound.arguments))
        grid = (grid,) if isinstance(grid, int) else tuple(int(g) for g in grid)
        key, (regs, spills, shared, warps, cubin) = _compile(self, signature, constants, attributes, options, target)
        _check_fits(name, chip, grid, regs, shared, warps)
        captured = dry.capturing is not None
        op = self.fn.__module__.rpartition(".")[2]
        dry.launch(Launch(name, op, grid, signature, constants, options, regs, spills, shared, captured, cubin), key)

    with contextlib.ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        dry = Dry(chip, mode, devices)
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        # It makes a real tensor wherever torch.cuda.is_available(), which is a fake here.
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", return_value=None))
        for name, fake in _fake_torch_cuda(dry).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        # Remembered answers about devices are about those of another dry run.
        backend.gpu.cache_clear()
        stack.callback(backend.gpu.cache_clear)
        stack.enter_context(_Watch(dry))
        stack.enter_context(_FusedAttention())
        yield dry
