"""Your own network and your own sampling loop, before and after: the loop becomes one call.

python examples/own_module.py [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

import ddpm
from ddpm.cli import DEMO
from ddpm.images import make_grid, save_png, to_uint8

BETAS = torch.linspace(1e-4, 0.02, 1000)
SHAPE = (3, 32, 32)


class MyNetwork(nn.Module):
    """Any module that predicts epsilon from x [N, C, H, W] and t [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DModel.from_pretrained(DEMO / "unet")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t).sample


@torch.no_grad()
def my_loop(network: nn.Module, n: int, timesteps: list[int], generator: torch.Generator) -> Tensor:
    """Ho et al. 2020, algorithm 2, on a part of the timesteps, as it is in a thousand scripts."""
    alphas_cumprod = torch.cumprod(1 - BETAS, 0)
    x = torch.randn(n, *SHAPE, generator=generator)
    for t, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
        a, a_next = alphas_cumprod[t], alphas_cumprod[following] if following >= 0 else torch.tensor(1.0)
        beta = 1 - a / a_next
        epsilon = network(x, torch.full((n,), t))
        x_0 = ((x - (1 - a).sqrt() * epsilon) / a.sqrt()).clamp(-1, 1)
        x = (a_next.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - a_next) * x) / (1 - a)
        if t > 0:
            x = x + ((1 - a_next) / (1 - a) * beta).sqrt() * torch.randn(n, *SHAPE, generator=generator)
    return x


def main(out: Path, steps: int = 100) -> float:
    """Write both rows of images; return the largest difference."""
    network = MyNetwork().eval()
    timesteps = list(range(0, 1000, 1000 // steps))[::-1]

    before = my_loop(network, 4, timesteps, torch.Generator().manual_seed(0))

    sampler = ddpm.Sampler.from_module(network, BETAS, SHAPE)
    after = sampler.sample(4, timesteps=timesteps, generator=torch.Generator().manual_seed(0))

    difference = float((before - after).abs().max())
    save_png(make_grid(to_uint8(torch.cat([before, after]), "half_to_even"), scale=4, columns=4), out)
    print(f"{out}: above the loop, below from_module; they differ by {difference:.1e} at most")
    return difference


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own_module.png"))
