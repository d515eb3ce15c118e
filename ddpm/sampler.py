"""The public face: load a checkpoint, sample it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ddpm import noise as noise_sources
from ddpm.checkpoints import Checkpoint, load_checkpoint
from ddpm.fused import FusedUNet
from ddpm.kernels.philox import PURPOSE_INITIAL, philox_normal
from ddpm.loop import ChainShape, Loop, decide_compile
from ddpm.noise import GeneratorNoise
from ddpm.steps import StepTable, ddpm_steps, is_integer

logger = logging.getLogger("ddpm")

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Arguments of the public signature that are not built yet, each refused by name.
NOT_YET = ("sampler", "eta", "labels", "guidance_scale", "image", "mask", "strength", "low_res")
# Larger batches than this are no faster, and finish (and report) later.
LARGEST_AUTO_BATCH = {"cpu": 16, "cuda": 256}

# Chain shapes whose loops a sampler keeps: each holds its buffers and, on a GPU, the memory of its captured graph.
KEPT_LOOPS = 4

Callback = Callable[[int, int, Tensor], None]


class SamplingInterrupted(KeyboardInterrupt):
    """Ctrl-C during `Sampler.sample`. Attributes: images, float32 [m, C, H, W], and seeds of the finished batches."""

    def __init__(self, images: Tensor, seeds: list[int] | None):
        super().__init__(f"interrupted with {len(images)} images finished (in .images, with .seeds)")
        self.images, self.seeds = images, seeds


class NonFiniteError(FloatingPointError):
    """The network's output was NaN or infinite.

    Attributes: step and timestep of the first such output, image (its index), seed (None with a generator); images,
    float32 [m, C, H, W], the batches that `Sampler.sample` had finished before.
    """

    images: Tensor | None = None

    def __init__(self, step: int, timestep: int, image: int, seed: int | None, advice: str):
        who = f"image {image}" + (f" (seed {seed})" if seed is not None else "")
        super().__init__(
            f"the network's output became NaN or infinite at step {step} (timestep {timestep}) in {who}; {advice}"
        )
        self.step, self.timestep, self.image, self.seed = step, timestep, image, seed


@dataclass(frozen=True)
class Batch:
    """Finished images start .. start + len(images) - 1 of a run: images float32 [m, C, H, W]; seeds, or None."""

    start: int
    images: Tensor
    seeds: list[int] | None


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    compile: bool | str = "auto",
    **family_options: Any,
) -> Sampler:
    """Load a checkpoint and make a sampler for it.

    Args:
        source: a directory that diffusers saved, a weight file inside one, or a hub id ("owner/name").
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:i".
        dtype: of the network: "fp32" (IEEE), "tf32" (float32 whose products may use TF32, what torch does to
            convolutions by default), "fp16", "bf16"; "auto" is "fp32". The state, the noise and the step are float32
            always.
        compile: True, False, or "auto": where the run is long enough to repay it.
        family_options: for diffusers: variant="fp16", scheduler_class=..., revision=... of a hub id.

    Raises:
        ValueError: one sentence that names the file or the argument, what was expected and what was found.
    """
    return Sampler(load_checkpoint(source, **family_options), device=device, dtype=dtype, compile=compile)


class Sampler:
    """Draws images from a checkpoint. Several samplers may live side by side.

    Attributes:
        checkpoint: what was loaded.
        device, dtype: of the network.
        last_seeds: of the last `sample` call; None if it used a generator.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        compile: bool | str = "auto",
    ):
        self.checkpoint = checkpoint
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.compile = compile
        self.last_seeds: list[int] | None = None
        self._network = FusedUNet(checkpoint.network, DTYPES[self.dtype]).to(self.device)
        self._loops: dict[tuple[ChainShape, bool], Loop] = {}
        self._gflop_per_image: float | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.checkpoint.image_channels, *self.checkpoint.sample_size)

    def sample(
        self,
        n: int = 1,
        *,
        seeds: Iterable[int] | None = None,
        steps: int | str | None = None,
        timesteps: Sequence[int] | None = None,
        spacing: str | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        noise: Tensor | None = None,
        labels: Any = None,
        guidance_scale: float | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        low_res: Tensor | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw n images.

        Args:
            n: number of images.
            seeds: n integers in 0 .. 2^64 - 1, one noise stream each: an image depends on its seed, not on its batch.
                None draws fresh ones, kept in `last_seeds`.
            steps: length of the chain, 1 .. T; None means T.
            timesteps: the chain itself, strictly descending, instead of steps.
            spacing: "leading", "linspace" or "trailing"; None means the checkpoint's own.
            sampler: None or "ddpm".
            generator: a torch.Generator, or n of them: the noise stream of diffusers' pipelines, call by call. One
                generator draws batch by batch, so `batch_size` is part of the result, as it is there.
            noise: x_T, float32 [n, C, H, W]; then no initial draw is made.
            batch_size: images per pass; None chooses by available memory (with one generator: n, as diffusers would).
            progress: show a bar with steps per second.
            callback: called as callback(step, timestep, x0_preview) after every step, with the network's current
                guess of x_0, float32 [m, C, H, W] on the CPU.

        Not built yet, and refused: eta, labels, guidance_scale, image, mask, strength, low_res, sampler="ddim",
        steps as a string.

        Returns:
            float32 [n, C, H, W] in [-1, 1] where the checkpoint clips x_0, on the CPU.

        Raises:
            ValueError: a bad argument.
            SamplingInterrupted: Ctrl-C; carries the finished images.
            NonFiniteError: the network's output was NaN or infinite.
        """
        options = {k: v for k, v in locals().items() if k not in ("self", "n")}
        batches: list[Tensor] = []
        self.last_seeds = None
        finished: list[int] = []
        try:
            for batch in self.stream(n, **options):
                batches.append(batch.images)
                finished += batch.seeds or []
        except KeyboardInterrupt as error:
            raise SamplingInterrupted(_concatenate(batches, self.image_shape), finished or None) from error
        except NonFiniteError as error:
            error.images = _concatenate(batches, self.image_shape)
            raise
        return _concatenate(batches, self.image_shape)

    def stream(self, n: int = 1, **options: Any) -> Iterator[Batch]:
        """Like `sample`, but gives each batch as soon as it is finished. Arguments are checked before the first."""
        run = self._plan(n, **options)
        return run.batches()

    def _plan(
        self,
        n: int,
        *,
        seeds: Iterable[int] | None = None,
        steps: int | str | None = None,
        timesteps: Sequence[int] | None = None,
        spacing: str | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        noise: Tensor | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        callback: Callback | None = None,
        **others: Any,
    ) -> Run:
        if others.get("sampler") == "ddpm":
            others = others | {"sampler": None}
        for name, value in others.items():
            if name not in NOT_YET:
                raise ValueError(f"sample() has no argument {name!r}")
            if value is not None:
                raise ValueError(f"{name}={value!r} is not supported yet: this version samples DDPM chains without it")
        if isinstance(steps, str):
            raise ValueError(f"steps={steps!r}: respacing strings are not supported yet; give an integer")
        _check_count("n", n)
        if batch_size is not None:
            _check_count("batch_size", batch_size)
        if seeds is not None and generator is not None:
            raise ValueError("give either seeds or a generator, not both: each defines all of the noise")
        if noise is not None and not isinstance(noise, Tensor):
            raise ValueError(f"noise must be a torch.Tensor; got {type(noise).__name__}")
        if noise is not None and tuple(noise.shape) != (n, *self.image_shape):
            raise ValueError(f"noise has shape {list(noise.shape)}; expected x_T of shape {[n, *self.image_shape]}")
        table = ddpm_steps(self.checkpoint.schedule, self.checkpoint.rules, steps, timesteps, spacing)
        source = None if generator is None else GeneratorNoise(generator, n, self.device)
        checked = None
        if source is None:
            checked = noise_sources.fresh_seeds(n) if seeds is None else noise_sources.check_seeds(seeds, n)
            if seeds is None:
                logger.info("seeds: %s", checked)
        self.last_seeds = checked
        if batch_size is None:
            whole = source is not None and len(source.generators) == 1
            batch_size = n if whole else self._auto_batch(n)
        return Run(self, n, table, min(batch_size, n), checked, source, noise, progress, callback)

    def _auto_batch(self, n: int) -> int:
        """The largest batch that memory allows, evened out over the batches that n needs."""
        fits = int(0.7 * available_memory(self.device)) // self._bytes_per_image()
        largest = max(1, min(LARGEST_AUTO_BATCH[self.device.type], fits))
        batches = -(-n // largest)
        return -(-n // batches)

    def _bytes_per_image(self) -> int:
        """An upper estimate of a step's activations: the skips, and eight tensors of the widest level at work."""
        config = self.checkpoint.network.config
        area = self.checkpoint.sample_size[0] * self.checkpoint.sample_size[1]
        widths = [area // 4**level * channels for level, channels in enumerate(config.block_out_channels)]
        elements = (config.layers_per_block + 1) * sum(widths) + 8 * 2 * max(widths)
        return elements * torch.finfo(DTYPES[self.dtype]).bits // 8

    def gflop_per_image(self) -> float:
        """GFLOP of one network evaluation for one image, counted on the reference network without running it."""
        if self._gflop_per_image is None:
            from torch._subclasses.fake_tensor import FakeTensorMode
            from torch.utils.flop_counter import FlopCounterMode

            with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
                self.checkpoint.network(torch.empty(1, *self.image_shape), torch.zeros(1, dtype=torch.int64))
            self._gflop_per_image = counter.get_total_flops() / 1e9
        return self._gflop_per_image

    def loop(self, shape: ChainShape, compiled: bool) -> Loop:
        """The loop for a chain shape, kept with its compilation and capture while it is among the last few used."""
        key = (shape, compiled)
        if key in self._loops:
            self._loops[key] = self._loops.pop(key)  # the most recent one is last
        else:
            while len(self._loops) >= KEPT_LOOPS:
                del self._loops[next(iter(self._loops))]
            tf32 = self.dtype == "tf32"
            self._loops[key] = Loop(self._network, shape, self.device, compiled=compiled, tf32=tf32)
        return self._loops[key]

    @property
    def loops(self) -> list[Loop]:
        """Every loop made so far, for inspection of compilations and captures."""
        return list(self._loops.values())

    def explain(self) -> str:
        """What runs where, layer by layer: one line each, the step around the network first."""
        from ddpm.kernels import backend

        triton = backend.uses_triton(self.device)
        step = "Triton kernel reverse_step" if triton else "reverse_step_ref (plain PyTorch)"
        graph = "captured in a CUDA graph, replayed once per step" if self.device.type == "cuda" else "run step by step"
        lines = [
            f"device: {self.device}, dtype: {self.dtype} (state, noise and step in float32)",
            f"step: {graph}; compile={self.compile}",
            f"reverse step: {step}; noise: Philox 4x32-10 per seed, or a torch.Generator through a buffer",
        ]
        layers = self._network.explain(self.device)
        width = max(len(layer.layer) for layer in layers)
        return "\n".join(lines + [f"{layer.layer:<{width}}  {layer.path}" for layer in layers])


@dataclass
class Run:
    """A checked request: everything that `sample` decided before the first step."""

    sampler: Sampler
    n: int
    table: StepTable
    batch_size: int
    seeds: list[int] | None
    source: GeneratorNoise | None
    noise: Tensor | None
    progress: bool
    callback: Callback | None

    def batches(self) -> Iterator[Batch]:
        s = self.sampler
        channels, height, width = s.image_shape
        gflop = s.gflop_per_image() * self.n * len(self.table) if s.compile == "auto" else 0.0
        compiled = decide_compile(s.compile, s.device, gflop)
        shape = ChainShape(
            batch=self.batch_size,
            channels=channels,
            height=height,
            width=width,
            capacity=max(len(self.table), s.checkpoint.schedule.num_train_timesteps),
            clip=self.table.rules.clip,
            variance=self.table.variance,
            threshold_ratio=self.table.rules.threshold_ratio,
            threshold_max=self.table.rules.threshold_max,
            generator_noise=self.source is not None,
            preview=self.callback is not None,
        )
        loop = s.loop(shape, compiled)
        starts = range(0, self.n, self.batch_size)
        with progress_bar(len(starts) * len(self.table), self.progress) as advance:
            for start in starts:
                stop = min(start + self.batch_size, self.n)
                images = self._chain(loop, start, stop, advance)
                yield Batch(start, images, None if self.seeds is None else self.seeds[start:stop])

    def _chain(self, loop: Loop, start: int, stop: int, advance: Callable[[], None]) -> Tensor:
        s = self.sampler
        seeds = None if self.seeds is None else noise_sources.seeds_to_tensor(self.seeds[start:stop]).to(s.device)
        source = None if self.source is None else self.source.images(start, stop)
        if self.noise is not None:
            x_T = self.noise[start:stop].to(s.device, torch.float32)
        elif source is not None:
            x_T = source.draw((stop - start, *s.image_shape)).to(s.device)
        else:
            assert seeds is not None  # a run has seeds or a generator
            x_T = philox_normal(seeds, s.image_shape, 0, PURPOSE_INITIAL)

        def on_step(i: int) -> None:
            advance()
            if self.callback is not None:
                assert loop.buffers.x_0 is not None  # the loop's shape says preview
                preview = loop.buffers.x_0[: stop - start].cpu().clone()
                self.callback(i, int(self.table.timesteps[i]), preview)

        try:
            return loop.run(self.table, x_T, seeds=seeds, generator=source, on_step=on_step).cpu()
        except FloatingPointError as error:
            step, image = error.args
            seed = None if self.seeds is None else self.seeds[start + image]
            advice = "try dtype='fp32'" if s.dtype in ("fp16", "bf16") else "the checkpoint or the input x_T is damaged"
            raise NonFiniteError(step, int(self.table.timesteps[step]), start + image, seed, advice) from None


@contextmanager
def progress_bar(total: int, wanted: bool) -> Iterator[Callable[[], Any]]:
    """Gives advance(), to be called after every step; shows steps per second on standard error."""
    try:
        from tqdm import tqdm
    except ImportError:
        if wanted:
            logger.warning("tqdm is not installed: no progress bar")
        yield lambda: None
        return
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=not wanted) as progress:
        yield progress.update


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to sample on.

    Raises:
        ValueError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not one of auto, cpu, cuda, cuda:0 ...") from error
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise ValueError(f"device {device!r} is not supported; expected auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch finds no GPU here; use device='cpu' or 'auto'")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """A key of DTYPES.

    Raises:
        ValueError: unknown, or bf16 on a GPU without it.
    """
    if dtype == "auto":
        return "fp32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if dtype == "tf32" and device.type == "cpu":
        raise ValueError("dtype 'tf32' exists on a GPU only; use 'fp32' on the CPU")
    if dtype == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError("dtype 'bf16' needs a GPU of compute capability 8.0 or newer; use 'fp16'")
    return dtype


def available_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        # What torch has reserved and does not use is free too: without it, a second call would find less memory.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every platform can say
        return 4 * 2**30


def _check_count(name: str, value: int) -> None:
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")


def _concatenate(batches: list[Tensor], image_shape: tuple[int, int, int]) -> Tensor:
    return torch.cat(batches) if batches else torch.empty(0, *image_shape)
