"""What takes part in a comparison."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar, TypeAlias

from torch import Tensor

from bench.setting import Setting


class Variant(ABC):
    """A way to draw images. Making one, from a `Setting`, is loading it.

    Attributes:
        packages: modules that are imported before it is made, and not timed.
        noise: that its images are drawn with: "generator", numerics_generator()'s, or "seeds", those of 0 .. N - 1.
        capture_s: seconds that it took to capture a CUDA graph; None without one.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    noise: ClassVar[str] = "generator"
    capture_s: float | None = None

    @abstractmethod
    def chain(self) -> None:
        """Draw a batch, to be timed."""

    @abstractmethod
    def images(self) -> Tensor:
        """Draw a batch with noise that the judge knows: float32 [N, C, H, W] in [0, 1] on the CPU."""


# Makes a variant, in whichever process; raises where it cannot run. A class, or a partial call of one.
Make: TypeAlias = Callable[[Setting], Variant]


def packages_of(make: Make) -> tuple[str, ...]:
    return (make.func if isinstance(make, partial) else make).packages
