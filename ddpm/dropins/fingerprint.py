"""Whether a network's weights have changed since they were last looked at.

Version counters do not tell: an EMA's `param.data.copy_` leaves them as they are. So the bits themselves are read, once
before each chain of network evaluations, of which one costs more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Fingerprint: TypeAlias = dict[str, tuple[torch.Size, torch.dtype, int]]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor]) -> Fingerprint:
    """Name -> shape, dtype, and a sum of all bits in which every position has a factor of its own.

    The factors are odd, so a single changed element always shows, and not multiples of each other, so that exchanged
    elements or channels do. One read from the device for all tensors.

    Args:
        tensors: of any shapes, strides, dtypes and devices.
    """
    factors: dict[torch.device, Tensor] = {}
    largest = max((t.numel() for t in tensors.values()), default=0)
    sums = []
    for tensor in tensors.values():
        if tensor.device not in factors:
            factors[tensor.device] = _odd_factors(largest, tensor.device)
        bits = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
        # Products wrap around: by an odd factor that is one to one.
        sums.append((bits * factors[tensor.device][: len(bits)]).sum())
    values = torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []
    pairs = zip(tensors.items(), values, strict=True)
    return {name: (tensor.shape, tensor.dtype, value) for (name, tensor), value in pairs}


def _odd_factors(n: int, device: torch.device) -> Tensor:
    """int32 [n], scattered over all 32 bits."""
    factors = torch.arange(n, dtype=torch.int32, device=device) * 0x2C1B3C6D
    return (factors ^ (factors >> 15)) | 1
