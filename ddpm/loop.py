"""One sampling step, compiled, captured once in a CUDA graph, and replayed once per step.

Everything that changes from step to step lives in device memory (state, step counter, tables, seeds), so that the
captured step reads no host value. On the CPU the same step runs compiled or eager.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor

from ddpm.conditioning import Conditions
from ddpm.devices import ordinary_modes
from ddpm.fused import FusedNetwork, winograd
from ddpm.kernels.reverse_step import COLUMNS, NONFINITE_NONE, PLANES, decode_nonfinite, reverse_step
from ddpm.noise import GeneratorNoise
from ddpm.ranges import named_range
from ddpm.steps import StepTable

# Replays queued ahead of the GPU: enough to hide the host, few enough that progress and Ctrl-C follow the GPU.
IN_FLIGHT = 4


@dataclass(frozen=True)
class ChainShape:
    """What a capture or compilation is made for; chains that share it share the captured step.

    Attributes:
        batch, channels, height, width: of the state.
        capacity: rows of the tables; a chain may be shorter.
        clip, variance, rounding, threshold_ratio, threshold_max: see `kernels/reverse_step.py`.
        generator_noise: noise is read from a buffer instead of drawn in the kernel.
        preview: every step also writes x_0.
        guided: the network sees every image twice, with its class and with none.
        inpaint: a region of the image is known.
    """

    batch: int
    channels: int
    height: int
    width: int
    capacity: int
    clip: str
    variance: str
    threshold_ratio: float
    threshold_max: float
    generator_noise: bool
    preview: bool
    rounding: str = "float32"
    guided: bool = False
    inpaint: bool = False


@dataclass
class StepBuffers:
    """The step's world, all on the device.

    Attributes:
        x: the state x_t, float32 [N, C, H, W], NCHW contiguous.
        counter: int64 [1], the index of the step that comes next.
        coefficients: float32 [capacity, columns]; time: float32 [capacity, columns of the time table].
        classes: class embeddings, float32 [N, embedding_dim], or None; 2N of them where guided, the null ones last.
        condition: what the network sees beside x_t, float32 [N, k, H, W], or None; x_0 itself with self-conditioning.
        seeds: int64 [N], or None with generator noise; noise: like x, or None with seeds; [3, *x.shape] to inpaint.
        known: the image to inpaint, like x, and mask, uint8 like x; or None.
        x_0: like x, written where previews or self-conditioning want it, else None.
        nonfinite: int64 [1], see `reverse_step`.
    """

    x: Tensor
    counter: Tensor
    coefficients: Tensor
    time: Tensor
    classes: Tensor | None
    condition: Tensor | None
    seeds: Tensor | None
    noise: Tensor | None
    known: Tensor | None
    mask: Tensor | None
    x_0: Tensor | None
    nonfinite: Tensor


def step(network: FusedNetwork, shape: ChainShape, buffers: StepBuffers) -> None:
    """x_t -> x_{t-1} in place. Reads the counter, never advances it: a grid has no order (see Loop._advance)."""
    row = buffers.time.index_select(0, buffers.counter)
    x, condition = buffers.x, buffers.condition
    if shape.guided:  # two halves of one batch
        x = torch.cat([x, x])
        condition = None if condition is None else torch.cat([condition, condition])
    out = network(x, row, buffers.classes, condition)
    reverse_step(
        buffers.x,
        out,
        buffers.coefficients,
        buffers.counter,
        buffers.nonfinite,
        clip=shape.clip,
        variance=shape.variance,
        rounding=shape.rounding,
        seeds=buffers.seeds,
        noise=buffers.noise,
        x0=buffers.x_0,
        known=buffers.known,
        mask=buffers.mask,
        threshold_ratio=shape.threshold_ratio,
        threshold_max=shape.threshold_max,
    )


class Loop:
    """The step for one ChainShape, ready to run any number of chains.

    Args:
        network: on `device`.
        shape: of the chains.
        device: "cpu" or "cuda:i".
        compiled: run the step through torch.compile.
        tf32: let float32 convolutions and matrix products use TF32.
        captured: on a GPU, replay a CUDA graph of the step; False launches what it does, as a debugger wants it.
        lock: held while a step is walked; one for all loops of a network.

    Attributes:
        compilations, captures: how often each happened, 0 or 1.
        capture_s: seconds that the capture took, without the warm-up before it; None where there was none.
    """

    def __init__(
        self,
        network: FusedNetwork,
        shape: ChainShape,
        device: torch.device,
        *,
        compiled: bool,
        tf32: bool = False,
        captured: bool = True,
        lock: AbstractContextManager[Any] | None = None,
    ):
        self.network, self.shape, self.device, self.tf32 = network, shape, device, tf32
        self.captured = captured and device.type == "cuda"
        with ordinary_modes(device):
            self.buffers = self._allocate()
        self.compiled = compiled
        self.compilations = 0
        self.captures = 0
        self.capture_s: float | None = None
        self._step = self._compile() if compiled else step
        self._freezes = compiled and device.type == "cpu" and network.is_frozen
        self._allows_winograd = self._freezes and network.allows_winograd(
            device, len(self.buffers.x) * (2 if shape.guided else 1), shape.height, shape.width
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._table: StepTable | None = None  # the one that the buffers hold
        self._chain: object | None = None  # the one whose state the buffers hold
        self._lock = lock or threading.RLock()

    def _allocate(self) -> StepBuffers:
        shape, network = self.shape, self.network
        n, image = shape.batch, (shape.height, shape.width)

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        state = (n, shape.channels, *image)
        x_0 = zeros(*state) if shape.preview or network.self_condition else None
        condition = x_0 if network.self_condition else None
        if network.condition_channels and not network.self_condition:
            condition = zeros(n, network.condition_channels, *image)
        classes = n * (2 if shape.guided else 1)
        draws = (len(PLANES), *state) if shape.inpaint else state
        return StepBuffers(
            x=zeros(*state),
            counter=zeros(1, dtype=torch.int64),
            coefficients=zeros(shape.capacity, len(COLUMNS)),
            time=zeros(shape.capacity, network.time.columns),
            classes=zeros(classes, network.time.embedding_dim) if network.time.conditional else None,
            condition=condition,
            seeds=None if shape.generator_noise else zeros(n, dtype=torch.int64),
            noise=zeros(*draws) if shape.generator_noise else None,
            known=zeros(*state) if shape.inpaint else None,
            mask=zeros(*state, dtype=torch.uint8) if shape.inpaint else None,
            x_0=x_0,
            nonfinite=torch.full((1,), NONFINITE_NONE, dtype=torch.int64, device=self.device),
        )

    def _compile(self) -> Callable[..., None]:
        self.compilations += 1
        # A code object of its own: torch.compile counts compilations per code object and refuses after a handful, which
        # would make the number of shapes in a process a limit.
        own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
        self._code = own.__code__
        # Default mode: its own CUDA graphs would not mix with ours.
        return torch.compile(own, fullgraph=True, dynamic=False)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """What a compiled step of the CPU is traced in, at a first call: weights are constants, packed for oneDNN.

        As an option of torch.compile, freezing comes after the weights have become inputs of the graph.
        """
        if not self._freezes:
            yield
            return
        from torch._inductor.codecache import PyCodeCache  # not above: it takes a while to import

        before = len(PyCodeCache.modules)
        with torch._inductor.config.patch(freezing=True), winograd.allowed(self._allows_winograd):
            yield
        if modules := PyCodeCache.modules[before:]:
            weakref.finalize(self, _release, self._code, modules)

    def _settings(self) -> AbstractContextManager[None]:
        return network_settings(self.device, self.tf32)

    def _advance(self) -> None:
        """A launch of its own behind every reader of the counter."""
        self.buffers.counter.add_(1)

    def _reset(self) -> None:
        self.buffers.counter.zero_()
        self.buffers.nonfinite.fill_(NONFINITE_NONE)
        if self.network.self_condition:
            assert self.buffers.x_0 is not None
            self.buffers.x_0.zero_()  # there is no previous x_0 at the first step

    def _set_table(self, table: StepTable) -> None:
        if table is self._table:  # batches of one run share theirs
            return
        last, self._table = self._table, None  # neither, should this be interrupted
        self.buffers.coefficients[: len(table)].copy_(table.coefficients)
        # A row depends on the timestep and on weights that do not change: those of the last chain serve this one, too.
        if last is None or not torch.equal(last.network_timesteps, table.network_timesteps):
            self.buffers.time[: len(table)].copy_(self.network.time.table(table.distinct)[table.time_rows])
        self._table = table

    def _run_step(self) -> None:
        if self.captured:
            if self._graph is None:
                raise RuntimeError("the step is not captured")
            self._graph.replay()
        else:
            with self._frozen():
                self._step(self.network, self.shape, self.buffers)
            self._advance()

    def prepare(self) -> None:
        """Compile and capture, on a GPU; the first chain does it, and later chains find it done."""
        if not self.captured or self._graph is not None:
            return
        # Kernels, library handles and workspaces are made on a side stream first: a capture may not make them.
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._reset()
                self._step(self.network, self.shape, self.buffers)
                self._advance()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        self._reset()
        # Without a stream, torch captures on one that it made for whichever GPU was current the first time.
        with torch.cuda.graph(graph, stream=side):
            self._step(self.network, self.shape, self.buffers)
            self._advance()
        self._graph = graph
        self.captures += 1
        self.capture_s = time.perf_counter() - start

    def steps(
        self,
        table: StepTable,
        x_T: Tensor,
        *,
        seeds: Tensor | None = None,
        generator: GeneratorNoise | None = None,
        conditions: Conditions | None = None,
    ) -> Iterator[int]:
        """Walk one chain; `buffers` holds its state.

        Args:
            table: the steps, no more than the shape's capacity.
            x_T: float32 [n, C, H, W] with 1 <= n <= the shape's batch; the rest is padded with copies of the first.
            seeds: int64 [n], or
            generator: the source of every step's noise for the n images.
            conditions: of the n images; what the network or the shape asks for.

        Yields:
            The index of each step (on a GPU: once it is queued, a few steps before its end).

        Raises:
            FloatingPointError: the network's output was NaN or infinite; its args are (step, image). At the end.
            RuntimeError: another chain was begun in between, which has overwritten the buffers.
        """
        chain = object()
        with self._lock, self._settings():
            self._chain = chain
            self._set_table(table)
            with named_range("ddpm prepare", self.device):
                self.prepare()  # warm-up overwrites the state, so it comes before the state is set
            self._reset()
            _fill(self.buffers.x, x_T)
            feed = self._set_noise(seeds, generator, len(x_T))
            self._set_conditions(conditions or Conditions())
        pace = Pace(self.device)
        for i in range(len(table)):
            with self._lock, self._settings():  # not while the caller has control
                self._check_owner(chain)
                if feed is not None:
                    with named_range("ddpm noise", self.device):
                        for plane in table.draws[i]:
                            feed.next(plane)
                with named_range(f"ddpm step {i}", self.device):
                    self._run_step()
                pace.step()
            yield i
        with self._lock, self._settings():
            self._check_owner(chain)
            found = decode_nonfinite(int(self.buffers.nonfinite.item()))
        if found is not None:
            raise FloatingPointError(*found)

    def _check_owner(self, chain: object) -> None:
        if self._chain is not chain:
            raise RuntimeError(
                "another chain was begun on this sampler while one was being walked; finish one before the next"
            )

    def _set_noise(self, seeds: Tensor | None, generator: GeneratorNoise | None, n: int) -> NoiseFeed | None:
        if self.buffers.noise is not None:
            assert generator is not None  # a loop for generator noise is run with a generator, another with seeds
            return NoiseFeed(generator, self.buffers.noise, n)
        assert self.buffers.seeds is not None
        assert seeds is not None
        _fill(self.buffers.seeds, seeds)
        return None

    def _set_conditions(self, conditions: Conditions) -> None:
        """Every buffer that the network or the shape has is filled; the caller gives what they ask for."""
        buffers, n = self.buffers, self.shape.batch
        pairs = [(buffers.known, conditions.image), (buffers.mask, conditions.mask)]
        if not self.network.self_condition:
            pairs.append((buffers.condition, conditions.low_res))
        if buffers.classes is not None:
            pairs.append((buffers.classes[:n], conditions.classes))
        if buffers.classes is not None and self.shape.guided:
            pairs.append((buffers.classes[n:], conditions.null_classes))
        for buffer, values in pairs:
            if buffer is not None:
                assert values is not None
                _fill(buffer, values)


def _release(code: CodeType, modules: list[ModuleType]) -> None:
    """Let go of the weights of a compiled step that is gone: torch.compile would keep them for good.

    Args:
        code: that was compiled.
        modules: that Inductor generated meanwhile; another thread's code among them holds what it needs itself.
    """
    from torch._dynamo.eval_frame import reset_code
    from torch._inductor.codecache import PyCodeCache

    reset_code(code)
    for module in modules:
        if module in PyCodeCache.modules:
            PyCodeCache.modules.remove(module)
        if sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]


@contextmanager
def network_settings(device: torch.device, tf32: bool) -> Iterator[None]:
    """Ordinary modes; on a GPU the device itself, the chosen float32 and deterministic algorithms."""
    with ordinary_modes(device):
        if device.type == "cpu":
            yield
            return
        with torch.cuda.device(device), float32_precision(tf32), deterministic_convolutions():
            yield


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """What float32 means on a GPU, for convolutions and matrix products alike; torch's own default is TF32 in cuDNN.

    The settings are restored as they were: torch refuses to mix those used here with its old allow_tf32.
    """
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision = conv.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """The same bits every run: benchmark mode would pick algorithms by timing them."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _fill(buffer: Tensor, values: Tensor) -> None:
    """Copy values into the front of a static buffer and repeat the first of them in the rest.

    Padding that is a copy of a real image can report nothing (a NaN, say) that the real one does not report too.
    """
    buffer[: len(values)].copy_(values)
    _pad(buffer, len(values))


def _pad(buffer: Tensor, n: int) -> None:
    if n < len(buffer):
        buffer[n:].copy_(buffer[:1].expand_as(buffer[n:]))


class Pace:
    """Keeps at most IN_FLIGHT steps queued on a GPU; does nothing on the CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.events: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.events.append(event)
        if len(self.events) > IN_FLIGHT:
            self.events.popleft().synchronize()


class NoiseFeed:
    """Puts a generator's next draw into the step's noise buffer, ahead of the replay that reads it.

    A CPU generator on a GPU draws into one of two pinned buffers, so that the copy of a draw overlaps the next one.

    Args:
        source: of the n images.
        noise: the step's buffer, float32 [N, C, H, W], or a plane for each of an inpainting step's draws.
    """

    def __init__(self, source: GeneratorNoise, noise: Tensor, n: int):
        self.source = source
        self.planes = noise.unbind() if noise.ndim == 5 else (noise,)
        self.shape = (n, *noise.shape[-3:])
        self.pinned: list[Tensor] = []
        self.copied: list[torch.cuda.Event] = []
        self.turn = 0
        if noise.device.type == "cuda" and source.device.type == "cpu":
            self.pinned = [torch.empty(self.shape, pin_memory=True) for _ in range(2)]
            self.copied = [torch.cuda.Event() for _ in range(2)]

    def next(self, plane: int) -> None:
        noise, draw = self.planes[plane], self.source.draw(self.shape)
        if not self.pinned:
            _fill(noise, draw)
            return
        pinned, copied = self.pinned[self.turn], self.copied[self.turn]
        copied.synchronize()  # the copy out of this buffer two draws ago
        pinned.copy_(draw)
        noise[: len(pinned)].copy_(pinned, non_blocking=True)
        _pad(noise, len(pinned))
        copied.record(torch.cuda.current_stream(noise.device))
        self.turn = 1 - self.turn


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler for the CPU, Triton for a GPU."""
    if device.type == "cpu":
        import torch._inductor.config as inductor

        compilers = inductor.cpp.cxx if isinstance(inductor.cpp.cxx, (tuple, list)) else (inductor.cpp.cxx,)
        return any(shutil.which(c) for c in (*compilers, "g++", "clang++") if c)
    from ddpm.kernels import backend

    return backend.HAVE_TRITON


def check_compile(choice: Any) -> bool | str:
    """The choice: True, False or "auto".

    Raises:
        ValueError: another.
    """
    if not isinstance(choice, bool) and choice != "auto":
        raise ValueError(f"compile must be True, False or 'auto'; got {choice!r}")
    return choice


def may_compile(choice: bool | str, device: torch.device) -> bool:
    """Whether a run that is long enough is compiled."""
    return choice is not False and can_compile(device)


def decide_compile(choice: bool | str, device: torch.device, gflop: float) -> bool:
    """Resolve compile="auto": worth it where the run repays the compilation.

    Args:
        choice: True, False or "auto".
        device: of the network.
        gflop: of the whole run, all images and steps.

    Raises:
        ValueError: True where nothing can compile, or another value.
    """
    if check_compile(choice) is False:
        return False
    if not can_compile(device):
        if choice is True:
            need = "a C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton"
            raise ValueError(f"compile=True needs {need}, and none was found; install one or pass compile=False")
        if gflop > REPAYS_GFLOP[device.type]:
            warnings.warn("no compiler found: the step runs eagerly, which is slower", stacklevel=3)
        return False
    return choice is True or gflop > REPAYS_GFLOP[device.type]


# A run of this much work (GFLOP) wins back the time of a compilation. CPU: on two cores the compiled step of cifar10-32
# took 0.48 (batch 1) and 0.54 (batch 4) of the eager one's time, and compiling took 114 and 205 s, which is won back
# after 24,000 and 61,000. GPU: an estimate.
REPAYS_GFLOP = {"cpu": 40_000.0, "cuda": 3_000_000.0}
