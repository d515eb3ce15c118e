"""What one sampling step does, counted on torch's meta device: without a GPU, without data, in seconds.

Every operation that would launch work is recorded: ours by what it says of itself (`ddpm.kernels.backend.Work`), one of
PyTorch's as one launch that reads its arguments and writes its results once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.architectures import Architecture
from ddpm.checkpoints.export import unet_settings
from ddpm.devices import DTYPES
from ddpm.fused import FusedNetwork, fuse
from ddpm.fused.attention import attention_backend
from ddpm.kernels import backend
from ddpm.loop import ChainShape, Loop, StepBuffers, deterministic_convolutions, float32_precision, step
from ddpm.lucidrains import LucidrainsConfig, LucidrainsUNet
from ddpm.reference import sample_reference
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule
from ddpm.unet import UNet

aten = torch.ops.aten
META = torch.device("meta")
CAPACITY = 1000  # steps of a chain: rows of its tables

# These allocate or look, and launch nothing.
_QUIET = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh", "device")
_WRITE_ONLY = ("copy_", "fill_", "zero_")  # their first argument
_LOOKUPS = ("index_select", "gather", "embedding", "index")  # of their first argument only what the result holds
# Passes of their own whose result is a normalised activation.
_NORMS = ("group_norm_apply", "group_norm_silu", "rms_norm_silu", "native_group_norm", "native_layer_norm")


@dataclass(frozen=True)
class Operation:
    """One recorded operation.

    Attributes:
        name: the innermost module that was running; "step" outside the network.
        op: of torch, without its namespace.
        form: which of several forms, for people; "" where there is but one.
        launches, programs, flops: see `ddpm.kernels.backend.Work`; programs is 0 for PyTorch's own.
        bytes: read and written.
        shape: of the result; of what is changed, where there is none.
        gemm: (M, N, K) of a convolution or a matrix product, for M rows of N values that are sums of K products.
        norm_bytes: of the result, where it is an activation that was normalised in a pass of its own.
    """

    name: str
    op: str
    form: str
    launches: int
    programs: int
    flops: int
    bytes: int
    shape: tuple[int, ...]
    gemm: tuple[int, int, int] | None
    norm_bytes: int


def meta_network(network: UNet | LucidrainsUNet) -> UNet | LucidrainsUNet:
    """Another of the same shape, on the meta device."""
    with META:
        return type(network)(network.config).eval()


class Recorder(TorchDispatchMode):
    """Records what is dispatched on the meta device. Attributes: operations, in order; running, names of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.running: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is aten.convolution.default:
            result = _as_cudnn_lays_it(result, *args[:2])
        op = func._schema.name.split("::")[1]
        outputs = _tensors(result)
        touched = outputs or _tensors(args[:1])
        if touched and touched[0].is_meta and op not in _QUIET and not _is_view(func):
            named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            recorded = _operation(func, op, named | kwargs, outputs, touched[0])
            if recorded.launches:
                self.operations.append(replace(recorded, name=self.running[-1] if self.running else "step"))
        return result

    @contextlib.contextmanager
    def naming(self, network: nn.Module) -> Iterator[None]:
        """Operations inside carry the name of the module that is running."""

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self.running.append(name)

        def leave(*_: Any) -> None:
            self.running.pop()

        handles = []
        for name, module in network.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name or "network")))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _operation(func: Any, op: str, arguments: dict[str, Any], outputs: list[Tensor], first: Tensor) -> Operation:
    if func.namespace == "ddpm":
        work = backend.works[op](*arguments.values())
        extra = work.extra_bytes
    else:
        work, extra = backend.Work(1, 0, _flops(func, op, arguments, outputs)), 0
    form = "library" if func is aten.convolution.default else work.form
    normalised = _nbytes(outputs[:1]) if op in _NORMS else 0
    traffic = _traffic(func, op, arguments, outputs) + extra
    gemm = _gemm(op, arguments, outputs)
    return Operation(
        "", op, form, work.launches, work.programs, work.flops, traffic, tuple(first.shape), gemm, normalised
    )


def _traffic(func: Any, op: str, arguments: dict[str, Any], outputs: list[Tensor]) -> int:
    """Every tensor read once and every result written once."""
    read, written = dict(arguments), list(outputs)
    if op in _WRITE_ONLY:
        read.pop("self")
    if op in _LOOKUPS:
        read.pop("weight" if op == "embedding" else "self")
        read["found"] = outputs[0]
    if func.namespace == "ddpm":  # PyTorch's own return what they change
        changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        written += _tensors([arguments[name] for name in changed])
    return _nbytes(_tensors(list(read.values()))) + _nbytes(written)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for entry in value for tensor in _tensors(entry)] if isinstance(value, (list, tuple)) else []


def _nbytes(tensors: list[Tensor]) -> int:
    """Of these tensors on the device, each once, and what is expanded as often as it is stored."""
    distinct = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in tensors if t.is_meta}
    return sum(_stored(tensor) * tensor.element_size() for tensor in distinct.values())


def _stored(tensor: Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count


def _flops(func: Any, op: str, arguments: dict[str, Any], outputs: list[Tensor]) -> int:
    if op == "linear":
        return 2 * outputs[0].numel() * arguments["weight"].shape[1]
    count = flop_registry.get(func.overloadpacket)
    if count is None:
        return 0
    return int(count(*arguments.values(), out_val=outputs[0] if len(outputs) == 1 else tuple(outputs)))


def _gemm(op: str, arguments: dict[str, Any], outputs: list[Tensor]) -> tuple[int, int, int] | None:
    if op in ("conv", "convolution", "linear"):
        weight, shortcut = arguments["weight"], arguments.get("shortcut_weight")
        products = weight[0].numel() + (0 if shortcut is None else shortcut.shape[1])
        return outputs[0].numel() // len(weight), len(weight), products
    if op in ("mm", "addmm"):
        left, right = (arguments[name] for name in (("self", "mat2") if op == "mm" else ("mat1", "mat2")))
        return left.shape[0], right.shape[1], left.shape[1]
    return None


def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return func is aten._unsafe_view.default or any(not alias.is_write for alias in aliases)


def _as_cudnn_lays_it(result: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """cuDNN answers channels_last with channels_last, which a build of torch without it does not know."""
    nhwc = {"memory_format": torch.channels_last}
    wanted = x.dim() == 4 and any(t.is_contiguous(**nhwc) and not t.is_contiguous() for t in (x, weight))
    if not wanted or not result.is_meta or result.is_contiguous(**nhwc):
        return result
    return torch.empty_like(result, **nhwc)


class _FusedAttention(TorchFunctionMode):
    """On a GPU the kernel that attention is pinned to; on the meta device torch would take plain matrix products."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        plain = not any(kwargs.get(name) for name in ("dropout_p", "is_causal", "scale", "enable_gqa"))
        names = ("query", "key", "value")
        if func is F.scaled_dot_product_attention and plain and len(args) <= 3 and kwargs.get("attn_mask") is None:
            q, k, v = (*args, *(kwargs[name] for name in names[len(args) :]))
            kernel = attention_backend(q.shape[-1], q.dtype, q.device)
            if kernel == SDPBackend.EFFICIENT_ATTENTION:
                return aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
            if kernel == SDPBackend.FLASH_ATTENTION:
                return aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def recording(target: backend.Target, dtype: str) -> Iterator[Recorder]:
    """Everything inside is recorded, as the target would run it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(backend.assume(target))
        stack.enter_context(float32_precision(dtype == "tf32"))
        stack.enter_context(deterministic_convolutions())
        recorder = stack.enter_context(Recorder())
        stack.enter_context(_FusedAttention())
        yield recorder


def fused_network(architecture: Architecture, dtype: str) -> FusedNetwork:
    """On the meta device."""
    with META:
        return fuse(architecture.network(), DTYPES[dtype])


def chain_shape(architecture: Architecture, batch: int) -> ChainShape:
    """Of an ordinary chain: seeds, a clamp, no conditions, no previews."""
    return ChainShape(
        batch=batch,
        channels=architecture.image_channels,
        height=architecture.image_size,
        width=architecture.image_size,
        capacity=CAPACITY,
        clip="clamp",
        variance=architecture.variance_type if architecture.variance_type.startswith("learned") else "fixed",
        threshold_ratio=0.995,
        threshold_max=1.0,
        generator_noise=False,
        preview=False,
    )


def planned_step(architecture: Architecture, batch: int, dtype: str, target: backend.Target) -> list[Operation]:
    """What the captured step does, in order: the fused network, the reverse step, the counter's advance."""
    network = fused_network(architecture, dtype)
    assert isinstance(network, nn.Module)
    shape = chain_shape(architecture, batch)
    buffers = _on_meta(Loop(network, shape, torch.device("cpu"), compiled=False).buffers)
    with recording(target, dtype) as recorder, recorder.naming(network):
        step(network, shape, buffers)
        buffers.counter.add_(1)  # as Loop does behind every step
    return recorder.operations


def _on_meta(buffers: StepBuffers) -> StepBuffers:
    """The same without data; one tensor under two names stays one."""
    moved = {id(t): t.to(META) for t in vars(buffers).values() if isinstance(t, Tensor)}
    return StepBuffers(**{name: moved.get(id(value)) for name, value in vars(buffers).items()})


def stock_step(
    architecture: Architecture, batch: int, dtype: str, target: backend.Target
) -> tuple[list[Operation], str]:
    """What diffusers does in one step, and the name of it; of an architecture that it lacks, the reference network.

    As a pipeline does it: state and network in one dtype, NCHW, everything that depends on the timestep computed anew.
    """
    size = architecture.image_size
    x = torch.empty(batch, architecture.image_channels, size, size, dtype=DTYPES[dtype], device=META)
    stock = None if _has_other_graph(architecture) else _diffusers(architecture)
    if stock is None:
        return _reference_step(architecture, x, dtype, target), f"{architecture.origin}, in plain PyTorch"
    network, scheduler, version = stock
    nn.Module.to(network, DTYPES[dtype])  # its own warns
    with recording(target, dtype) as recorder, recorder.naming(network):
        t = scheduler.timesteps[len(scheduler.timesteps) // 2]
        scheduler.step(network(x, t).sample, t, x)
    return recorder.operations, f"UNet2DModel and DDPMScheduler.step of diffusers {version}"


def _has_other_graph(architecture: Architecture) -> bool:
    """Whether DDPMPipeline cannot run it: another graph, or classes, which it does not pass."""
    return isinstance(architecture.config, LucidrainsConfig) or architecture.config.class_embedding is not None


def _diffusers(architecture: Architecture) -> tuple[Any, Any, str] | None:
    """UNet2DModel, DDPMScheduler and the version; None where diffusers is not installed."""
    try:
        import diffusers
    except ImportError:
        return None
    with META:
        settings = unet_settings(architecture.checkpoint(architecture.network()))
        network = diffusers.UNet2DModel(**settings).eval()
    scheduler = diffusers.DDPMScheduler(variance_type=architecture.variance_type)
    scheduler.set_timesteps(CAPACITY)
    return network, scheduler, diffusers.__version__


def _reference_step(architecture: Architecture, x: Tensor, dtype: str, target: backend.Target) -> list[Operation]:
    """The textbook loop's middle step, with the network in the state's dtype."""
    with META:
        network = architecture.network().to(x.dtype)
    labels = torch.empty(len(x), dtype=torch.int64, device=META) if network.conditional else None
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, CAPACITY, dtype=torch.float64))
    rules = SamplingRules(variance_type=architecture.variance_type)
    with recording(target, dtype) as recorder, recorder.naming(network):
        sample_reference(
            lambda x, t: network(x, t, labels), schedule, rules, [CAPACITY // 2], x, lambda _: torch.randn_like(x)
        )
    return recorder.operations
