"""A checked request and its execution, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ddpm import noise as noise_sources
from ddpm.conditioning import Conditions
from ddpm.kernels.philox import PURPOSE_IMG2IMG, PURPOSE_INITIAL, philox_normal
from ddpm.loop import ChainShape, Loop, StepBuffers, decide_compile
from ddpm.noise import GeneratorNoise
from ddpm.steps import StepTable

if TYPE_CHECKING:
    from ddpm.sampler import Sampler

logger = logging.getLogger("ddpm")

Callback = Callable[[int, int, Tensor], None]
Progress: TypeAlias = bool | Callable[..., Any]


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


@dataclass
class Run:
    """A checked request: everything that `sample` decided before the first step.

    Attributes:
        sampler: whose network and loops it uses.
        n, batch_size: images, and images per pass.
        table: the chain.
        seeds: one per image, or None with
        source: a generator's noise.
        noise: x_T, or what noises the image that the chain starts from, float32 [n, C, H, W]; or None.
        conditions: of the n images.
        progress, callback: see `Sampler.sample`.
        preview: the loop keeps every step's x_0, for a callback or for who walks the steps.
        rounding: of the reverse step, see `kernels/reverse_step.py`.
    """

    sampler: Sampler
    n: int
    table: StepTable
    batch_size: int
    seeds: list[int] | None
    source: GeneratorNoise | None
    noise: Tensor | None
    conditions: Conditions
    progress: Progress
    callback: Callback | None
    preview: bool = False
    rounding: str = "float32"

    def batches(self) -> Iterator[Batch]:
        """Walk all chains, batch by batch."""
        loop = self.loop()
        starts = range(0, self.n, self.batch_size)
        with progress_bar(len(starts) * len(self.table), self.progress) as advance:
            for start in starts:
                stop = min(start + self.batch_size, self.n)
                with self.sampler.lock:  # chains of other threads wait for this one's end
                    for i in self.steps(loop, start, stop):
                        advance()
                        if self.callback is not None:
                            assert loop.buffers.x_0 is not None  # the loop's shape says preview
                            preview = loop.buffers.x_0[: stop - start].cpu().clone()
                            self.callback(i, int(self.table.timesteps[i]), preview)
                    images = loop.buffers.x[: stop - start].to("cpu", copy=True)
                yield Batch(start, images, None if self.seeds is None else self.seeds[start:stop])

    def states(self) -> Iterator[StepBuffers]:
        """Walk one chain of all n images, a batch; the loop's buffers after each step, the same object every time.

        Another chain that begins before this one's end makes it fail; who cannot have that holds the sampler's lock.
        """
        loop = self.loop()
        with progress_bar(len(self.table), self.progress) as advance:
            for _ in self.steps(loop, 0, self.n):
                advance()
                yield loop.buffers

    def final(self) -> Tensor:
        """Walk one chain of all n images: x_0, float32 [n, C, H, W], a copy on the device. Other threads wait."""
        with self.sampler.lock:
            for buffers in self.states():
                x = buffers.x
            return x.clone()

    def loop(self) -> Loop:
        """The sampler's loop for chains of this shape."""
        s = self.sampler
        channels, height, width = s.image_shape
        rules = self.table.rules
        gflop = s.gflop_per_image() * self.n * len(self.table) if s.compile == "auto" else 0.0
        shape = ChainShape(
            batch=self.batch_size,
            channels=channels,
            height=height,
            width=width,
            capacity=self._capacity(),
            clip=rules.clip,
            variance=self.table.variance,
            threshold_ratio=rules.threshold_ratio,
            threshold_max=rules.threshold_max,
            generator_noise=self.source is not None,
            preview=self.preview or self.callback is not None,
            rounding=self.rounding,
            guided=self.conditions.null_classes is not None,
            inpaint=self.conditions.mask is not None,
        )
        return s.loop(shape, decide_compile(s.compile, s.device, gflop * (2 if shape.guided else 1)))

    def _capacity(self) -> int:
        """Rows of the loop's tables: T, or T times a power of two where an inpainting chain is longer than that."""
        capacity = self.sampler.checkpoint.schedule.num_train_timesteps
        while capacity < len(self.table):
            capacity *= 2
        return capacity

    def steps(self, loop: Loop, start: int, stop: int) -> Iterator[int]:
        """Walk the chain of images start .. stop - 1, step by step; the loop's buffers hold its state."""
        s = self.sampler
        seeds = None if self.seeds is None else noise_sources.seeds_to_tensor(self.seeds[start:stop]).to(s.device)
        source = None if self.source is None else self.source.images(start, stop)
        conditions = self.conditions.images(start, stop)
        x_T = self._initial(seeds, source, start, stop)
        if self.table.start is not None:
            assert conditions.image is not None  # a chain that starts from an image has one
            mean, std = self.table.start
            x_T = mean * conditions.image.to(s.device) + std * x_T
        try:
            yield from loop.steps(self.table, x_T, seeds=seeds, generator=source, conditions=conditions)
        except FloatingPointError as error:
            step, image = error.args
            seed = None if self.seeds is None else self.seeds[start + image]
            advice = "the network's weights or the input x_T are damaged"
            if s.dtype in ("fp16", "bf16"):
                advice = "half precision may not hold its values; try float32"
            raise NonFiniteError(step, int(self.table.timesteps[step]), start + image, seed, advice) from None

    def _initial(self, seeds: Tensor | None, source: GeneratorNoise | None, start: int, stop: int) -> Tensor:
        """Standard normal noise of images start .. stop - 1, float32 [m, C, H, W] on the device."""
        s = self.sampler
        if self.noise is not None:
            return self.noise[start:stop].to(s.device, torch.float32)
        if source is not None:
            return source.draw((stop - start, *s.image_shape)).to(s.device)
        assert seeds is not None  # a run has seeds or a generator
        purpose = PURPOSE_INITIAL if self.table.start is None else PURPOSE_IMG2IMG
        return philox_normal(seeds, s.image_shape, 0, purpose)


@contextmanager
def progress_bar(total: int, wanted: Progress) -> Iterator[Callable[[], Any]]:
    """Gives advance(), to be called after every step; shows steps per second on standard error.

    Args:
        total: number of steps.
        wanted: whether to show a bar; or what makes one, called with total=, as tqdm is.
    """
    if callable(wanted):
        with wanted(total=total) as bar:
            yield bar.update
        return
    try:
        from tqdm import tqdm
    except ImportError:
        if wanted:
            logger.warning("tqdm is not installed: no progress bar")
        yield lambda: None
        return
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=not wanted) as progress:
        yield progress.update
