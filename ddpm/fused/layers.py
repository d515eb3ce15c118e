"""Building blocks of every fused network: norm + SiLU in one kernel, the time path off the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.kernels import backend
from ddpm.kernels.channel_statistics import Norm
from ddpm.kernels.group_norm_silu import group_norm_silu
from ddpm.kernels.rms_norm_silu import rms_norm_silu
from ddpm.lucidrains import RMSNorm
from ddpm.unet import ACTIVATIONS


class EmbedsTime(Protocol):
    """What the time path needs of a reference network."""

    time_activation: Callable[[Tensor], Tensor]
    conditional: bool
    divides_by_time: bool

    def embed_time(self, timesteps: Tensor) -> Tensor: ...


class TimePath(nn.Module):
    """All that depends on the timestep (and the class) alone: time_emb_proj(act(emb(t) + class)) of every resnet.

    The network reserves a slice of the result per resnet, in order of execution, while it is built; conv1's bias, which
    is added where the embedding is, belongs to the slice. Without classes the whole result is a table, a row per step,
    and nothing is left to do in the loop. With classes the table holds emb(t), and one matrix product per step makes
    the slices of all resnets. A network that divides its output by t (Fourier embedding) has t itself in the table's
    last column.

    Args:
        reference: in float32 on the CPU.
    """

    def __init__(self, reference: EmbedsTime):
        super().__init__()
        self.activation, self.embed_time = reference.time_activation, reference.embed_time
        self.conditional, self.divides_by_time = reference.conditional, reference.divides_by_time
        self._weights: list[Tensor] = []
        self._biases: list[Tensor] = []
        self.width = 0
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None

    def reserve(self, weight: Tensor, bias: Tensor) -> slice:
        """A slice of the result for a projection: weight [rows, embedding_dim], bias [rows]."""
        self._weights.append(weight)
        self._biases.append(bias)
        self.width += len(bias)
        return slice(self.width - len(bias), self.width)

    def finish(self) -> None:
        """Called when everything is reserved: the projections of a class-conditional network belong to the step."""
        if self.conditional:
            self.weight = frozen(torch.cat(self._weights))  # [width, embedding_dim]
            self.bias = frozen(torch.cat(self._biases))

    @property
    def embedding_dim(self) -> int:
        return self._weights[0].shape[1]

    @property
    def columns(self) -> int:
        """Floats in a row of the table."""
        return (self.embedding_dim if self.conditional else self.width) + self.divides_by_time

    def table(self, timesteps: Tensor) -> Tensor:
        """float32 [S, columns] for timesteps [S], computed on the CPU in float32, ahead of the chain."""
        rows = self.embed_time(timesteps)  # [S, embedding_dim]
        if not self.conditional:
            rows = F.linear(self.activation(rows), torch.cat(self._weights), torch.cat(self._biases))
        if self.divides_by_time:
            rows = torch.cat([rows, timesteps[:, None].float()], dim=1)
        return rows

    def forward(self, row: Tensor, classes: Tensor | None) -> Tensor:
        """The slices of one step.

        Args:
            row: of the table, float32 [1, columns].
            classes: class embeddings, float32 [N, embedding_dim], or None.

        Returns:
            float32 [N, width] (1 row without classes); its columns are those that were reserved.
        """
        if not self.conditional:
            return row
        return F.linear(self.activation(row[:, : self.embedding_dim] + classes), self.weight, self.bias)

    def describe(self) -> str:
        """What is left of it in the step, for `Sampler.explain()`."""
        if self.conditional:
            product = f"[N, {self.embedding_dim}] x [{self.embedding_dim}, {self.width}]"
            return f"table of emb(t), plus class; one float32 matrix product {product} a step"
        return f"table of {self.columns} float32 a step, no work in the loop"


def frozen(tensor: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A frozen copy: the reference network stays as it was loaded."""
    return nn.Parameter(tensor.detach().to(dtype or tensor.dtype, copy=True), requires_grad=False)


class GroupNormSiLU(nn.Module):
    """Weights of one `group_norm_silu`; they stay float32, as the statistics do."""

    def __init__(self, norm: nn.GroupNorm, activation: str | None):
        super().__init__()
        self.groups, self.eps, self.activation = norm.num_groups, norm.eps, activation
        self.silu = activation in ("silu", "swish")
        self.is_fusable = self.silu or activation is None  # the kernels know no other activation
        self.weight, self.bias = frozen(norm.weight), frozen(norm.bias)

    def arguments(self, statistics: tuple[Tensor, ...], scale: Tensor | None, shift: Tensor | None) -> Norm:
        """What a kernel reads that finalizes this norm from the statistics of its input's parts."""
        return Norm(self.weight, self.bias, self.groups, self.eps, self.silu, statistics, scale, shift)

    def forward(
        self,
        x: Tensor,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        y = group_norm_silu(
            x, self.groups, self.weight, self.bias, self.eps, add=add, scale=scale, shift=shift, silu=self.silu
        )
        y = y if self.is_fusable else ACTIVATIONS[self.activation](y)
        return y if residual is None else y + residual

    def describe(self, x: Tensor, *_: object) -> str:
        """Which code it takes, for `Sampler.explain()`."""
        extra = "" if self.is_fusable else f", then {self.activation} on its own"
        return _describe_norm("group_norm_silu", x) + extra


class RMSNormSiLU(nn.Module):
    """Weights of one `rms_norm_silu`; they stay float32."""

    def __init__(self, norm: RMSNorm, *, silu: bool = True):
        super().__init__()
        self.silu = silu
        self.weight = frozen(norm.g.flatten())

    def forward(
        self,
        x: Tensor,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return rms_norm_silu(x, self.weight, add=add, scale=scale, shift=shift, residual=residual, silu=self.silu)

    def describe(self, x: Tensor, *_: object) -> str:
        """Which code it takes, for `Sampler.explain()`."""
        return _describe_norm("rms_norm_silu", x)


def _describe_norm(op: str, x: Tensor) -> str:
    code = f"Triton kernel {op}" if backend.uses_triton(x.device) else f"{op}_ref (plain PyTorch)"
    return f"{code}, float32 statistics"
