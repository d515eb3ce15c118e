"""The fused network as guided-diffusion's code calls its own: model(x, timesteps, y=..., low_res=...)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ddpm.conditioning import check_low_res, embed_labels
from ddpm.loop import network_settings
from ddpm.sampler import Sampler


class GuidedNetwork(nn.Module):
    """One evaluation of a sampler's network, which stays where `ddpm.load` has put it and in that precision.

    `to`, `half` and the like may ask for nothing else, since the captured loops use the very same weights.

    Args:
        sampler: of a checkpoint with a U-Net.
    """

    def __init__(self, sampler: Sampler):
        super().__init__()
        self.sampler = sampler
        self.network = sampler.network
        self.eval()

    def check(
        self, n: int, /, y: Any = None, low_res: Any = None, **others: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """What n images are made from.

        Args:
            n: number of images.
            y: class numbers [n] of a class-conditional network.
            low_res: float [n or 1, C, h, w] in [-1, 1] of a super-resolution network.

        Returns:
            Class embeddings, float32 [n, embedding_dim], and low_res enlarged, float32 [n, C, H, W], or None for each.

        Raises:
            ValueError: missing, superfluous, unknown, or of another shape or range.
        """
        for name in others:
            raise ValueError(f"diffusion.model takes y and low_res, but {name!r} was given; leave it out")
        checkpoint = self.sampler.checkpoint
        classes = embed_labels(checkpoint.network, y, n, "y")
        return classes, check_low_res(checkpoint.network, low_res, n, checkpoint.sample_size)

    def forward(self, x: Tensor, timesteps: Tensor, y: Any = None, low_res: Any = None, **others: Any) -> Tensor:
        """The network's output.

        Args:
            x: x_t, float [N, C, H, W] on the network's device.
            timesteps: [N], whole or fractional; usually the same for all images.
            y, low_res: see `check`.

        Returns:
            float32 [N, C, H, W], or [N, 2C, H, W] of a network that learns its variance; NCHW contiguous.

        Raises:
            ValueError: an argument of another shape, or an x that wants a gradient: there is no backward pass.
        """
        wanted = self.sampler.image_shape
        for name, value in (("x", x), ("timesteps", timesteps)):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor; got {type(value).__name__}")
        if x.ndim != 4 or tuple(x.shape[1:]) != wanted:
            raise ValueError(f"x has shape {list(x.shape)}; expected [N, {', '.join(map(str, wanted))}]")
        n, device = len(x), self.sampler.device
        if timesteps.shape != (n,):
            raise ValueError(f"timesteps has shape {list(timesteps.shape)}; expected [{n}], one per image")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                "x wants a gradient, which the fused network does not compute; pass x.detach(), or differentiate "
                "ddpm.load(...).checkpoint.network, the same network in plain PyTorch"
            )
        classes, condition = self.check(n, y, low_res, **others)
        distinct, rows = timesteps.cpu().unique(return_inverse=True)
        with network_settings(device, self.sampler.dtype == "tf32"):
            row = self.sampler.network.time.table(distinct)
            row = row if len(row) == 1 else row[rows]
            out = self.network(
                x.float().contiguous(),
                row.to(device),
                None if classes is None else classes.to(device),
                None if condition is None else condition.to(device),
            )
        return out.contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GuidedNetwork:
        """What to(), cuda(), half() and the like do to the weights: nothing, or it is refused."""
        there = fn(torch.empty(0, device=self.sampler.device))
        if (there.device, there.dtype) != (self.sampler.device, torch.float32):
            raise ValueError(
                f"diffusion.model stays on {self.sampler.device} in {self.sampler.dtype}; pass device= and dtype= to "
                "ddpm.load instead of moving it"
            )
        return self

    def convert_to_fp16(self) -> None:
        """Nothing, if `ddpm.load` was asked for fp16; it is refused otherwise."""
        if self.sampler.dtype != "fp16":
            raise ValueError(
                f"diffusion.model runs in {self.sampler.dtype}; pass dtype='fp16' to ddpm.load instead of calling "
                "convert_to_fp16()"
            )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: `ddpm.load` has loaded the weights."""
        raise ValueError(
            "diffusion.model has its weights already; pass the file to ddpm.load instead of loading it here"
        )
