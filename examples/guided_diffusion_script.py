"""A script written for guided-diffusion, before and after: two objects come from elsewhere, the sampling calls stay.

    python examples/guided_diffusion_script.py [OUT.png]

The demo checkpoint stands in for one of guided-diffusion's own, such as 64x64_diffusion.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddpm
from ddpm.cli import DEMO
from ddpm.dropins.guided_diffusion import GaussianDiffusion
from ddpm.images import make_grid, save_png, to_uint8


def draw(model: Any, diffusion: Any) -> tuple[Tensor, Tensor]:
    """The user's script: the same before and after. DDPM and DDIM samples, float32 [4, 3, 32, 32] in [-1, 1]."""
    torch.manual_seed(0)
    with torch.no_grad():
        ancestral = diffusion.p_sample_loop(model, (4, 3, 32, 32), clip_denoised=True, progress=True)
        implicit = diffusion.ddim_sample_loop(model, (4, 3, 32, 32), clip_denoised=True, progress=True)
    return ancestral, implicit


def main(out: Path, timestep_respacing: str = "100") -> None:
    # before:
    #     model, diffusion = create_model_and_diffusion(**flags, timestep_respacing=timestep_respacing)
    #     model.load_state_dict(torch.load("64x64_diffusion.pt"))
    #     model.eval()
    # after:
    diffusion = GaussianDiffusion(ddpm.load(DEMO), timestep_respacing)
    model = diffusion.model

    images = torch.cat(draw(model, diffusion))
    save_png(make_grid(to_uint8(images, "truncate"), scale=4, columns=4), out)
    print(f"{out}: above DDPM, below DDIM, {diffusion.num_timesteps} steps each")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "guided_diffusion_script.png"))
