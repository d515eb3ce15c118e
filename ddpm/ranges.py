"""Named ranges, by which a profiler tells what the host was doing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def named_range(name: str, device: torch.device) -> Iterator[None]:
    """A range of this name in the traces of torch.profiler, where one is running, and of NVIDIA's tools (NVTX).

    What is inside a CUDA graph has no range of its own: a range around its replay holds the queueing of it.
    """
    # Without a profiler a range of torch's costs microseconds for nothing.
    recorded = torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else nullcontext()
    with recorded:
        if device.type != "cuda":
            yield
            return
        try:
            torch.cuda.nvtx.range_push(name)
        except RuntimeError:  # a build of torch without NVTX
            yield
            return
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()
