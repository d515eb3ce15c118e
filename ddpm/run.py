"""A checked request and its execution, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpm import noise as noise_sources
from ddpm.kernels.philox import PURPOSE_INITIAL, philox_normal
from ddpm.loop import ChainShape, Loop, decide_compile
from ddpm.noise import GeneratorNoise
from ddpm.steps import StepTable

if TYPE_CHECKING:
    from ddpm.sampler import Sampler

logger = logging.getLogger("ddpm")

Callback = Callable[[int, int, Tensor], None]


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
        noise: x_T, float32 [n, C, H, W], or None.
        classes: class embeddings, float32 [n, embedding_dim], or None.
        condition: conditioning images, float32 [n, k, H, W], or None.
        progress, callback: see `Sampler.sample`.
    """

    sampler: Sampler
    n: int
    table: StepTable
    batch_size: int
    seeds: list[int] | None
    source: GeneratorNoise | None
    noise: Tensor | None
    classes: Tensor | None
    condition: Tensor | None
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

        classes, condition = (None if v is None else v[start:stop] for v in (self.classes, self.condition))
        try:
            return loop.run(
                self.table,
                x_T,
                seeds=seeds,
                generator=source,
                classes=classes,
                condition=condition,
                on_step=on_step,
            ).cpu()
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
