"""A whole chain of a loop, as `Run` walks it. Needs nothing but torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ddpm.loop import Loop
from ddpm.steps import StepTable


def walk(loop: Loop, table: StepTable, x_T: Tensor, **options: Any) -> Tensor:
    """x_0, a copy; arguments as in `Loop.steps`."""
    for _ in loop.steps(table, x_T, **options):
        pass
    return loop.buffers.x[: len(x_T)].clone()
