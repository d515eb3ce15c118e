"""Where the chain's noise comes from: seeds (Philox, one stream per image) or torch generators (the original's stream).

Philox noise is a function of (seed, element, step) alone, so an image does not depend on its batch. Generator noise
reproduces the stream that diffusers' pipelines draw, call by call: its images depend on the batch that they came in.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor

SEED_LIMIT = 2**64


def fresh_seeds(n: int) -> list[int]:
    """n seeds from the operating system, small enough (53 bits) to survive JSON and file names."""
    return [secrets.randbits(53) for _ in range(n)]


def check_seeds(seeds: Iterable[int], n: int) -> list[int]:
    """Seeds as a list.

    Raises:
        ValueError: not n of them, or not integers in 0 .. 2^64 - 1.
    """
    try:
        result = list(seeds)
    except TypeError as error:
        raise ValueError(f"seeds must be a sequence of {n} integers; got {seeds!r}") from error
    if len(result) != n:
        raise ValueError(f"seeds has {len(result)} entries for n={n} images; give one seed per image")
    for seed in result:
        # int(seed) first: an element of an int64 tensor cannot be compared with 2^64
        if seed is None or isinstance(seed, (bool, str)) or int(seed) != seed or not 0 <= int(seed) < SEED_LIMIT:
            raise ValueError(f"seed {seed!r} is not an integer from 0 to 2^64 - 1")
    return [int(seed) for seed in result]


def seeds_to_tensor(seeds: Sequence[int]) -> Tensor:
    """int64 [n] that holds the seeds' 64 bits (two's complement above 2^63)."""
    return torch.tensor([s - SEED_LIMIT if s >= SEED_LIMIT // 2 else s for s in seeds], dtype=torch.int64)


class GeneratorNoise:
    """Standard normal draws in the order of diffusers' `randn_tensor`.

    One generator draws the whole batch in one call; a list draws one image per generator. A CPU generator draws on the
    CPU even for a network on a GPU. Always NCHW.

    Args:
        generator: one generator, or one per image.
        n: number of images.
        device: the network's.
        dtype: in which the numbers are drawn; a pipeline draws in its network's. They are given as float32.

    Raises:
        ValueError: a list of another length than n, or a CUDA generator for a network on the CPU.
    """

    def __init__(
        self,
        generator: Generator | Sequence[Generator],
        n: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        given = [generator] if isinstance(generator, Generator) else generator
        generators = list(given) if isinstance(given, Iterable) else [given]
        if not all(isinstance(g, Generator) for g in generators):
            raise ValueError("generator must be a torch.Generator or a sequence of them")
        if not isinstance(generator, Generator) and len(generators) != n:
            raise ValueError(f"generator has {len(generators)} entries for n={n} images; give one, or one per image")
        for g in generators:
            if g.device.type == "cuda" and device.type != "cuda":
                raise ValueError(f"generator is on {g.device}, but the network is on {device}; use a CPU generator")
        self.generators, self.dtype = generators, dtype

    @property
    def device(self) -> torch.device:
        """Where the numbers are drawn."""
        return self.generators[0].device

    def images(self, start: int, stop: int) -> GeneratorNoise:
        """The source of images start .. stop - 1: a slice of a list of generators; a single one is shared."""
        if len(self.generators) == 1:
            return self
        part = copy.copy(self)
        part.generators = self.generators[start:stop]
        return part

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """float32 of `shape` [n, C, H, W], on the generators' device."""
        if len(self.generators) == 1:
            return torch.randn(shape, generator=self.generators[0], device=self.device, dtype=self.dtype).float()
        one = (1, *shape[1:])
        draws = [torch.randn(one, generator=g, device=g.device, dtype=self.dtype) for g in self.generators]
        return torch.cat(draws).float()


def default_generator(device: torch.device) -> Generator:
    """The one that torch.manual_seed seeds and torch.randn(device=device) draws from."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
