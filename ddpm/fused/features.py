"""What flows through a fused network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Features(NamedTuple):
    """An activation as the next layer reads it.

    Attributes:
        parts: one or two tensors [N, C_i, H, W], channels_last, that stand for one of C = sum C_i channels: what a
            concatenation would give, which is not made unless somebody needs it.
        statistics: of each part (see `kernels/channel_statistics.py`), or None where nobody took them.
        row: [N or 1, C], what is still to be added to the activation, or None.
    """

    parts: tuple[Tensor, ...]
    statistics: tuple[Tensor | None, ...]
    row: Tensor | None = None

    @staticmethod
    def of(x: Tensor) -> Features:
        """Features of a plain tensor, without statistics."""
        return Features((x,), (None,))

    @property
    def channels(self) -> int:
        return sum(part.shape[1] for part in self.parts)

    @property
    def has_statistics(self) -> bool:
        """Whether a norm of these can be finalized from statistics."""
        return self.row is None and all(s is not None for s in self.statistics)

    def with_skip(self, skip: Features) -> Features:
        """These, and the skip connection's channels behind them."""
        return Features(self.parts + skip.parts, self.statistics + skip.statistics)

    def tensor(self) -> Tensor:
        """One tensor [N, C, H, W], without the row."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=1)
