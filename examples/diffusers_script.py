"""A diffusers script before and after: one line changes, the images do not.

python examples/diffusers_script.py [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline
from PIL import Image

import ddpm
from ddpm.cli import DEMO
from ddpm.images import make_grid, save_png


def draw(pipe: DDPMPipeline, steps: int) -> list[Image.Image]:
    """The user's script: the same before and after."""
    pipe.set_progress_bar_config(desc=type(pipe).__name__)
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=4, generator=generator, num_inference_steps=steps).images


def main(out: Path, steps: int = 100) -> int:
    """Write both rows of images; return the largest difference in bytes."""
    pipe = DDPMPipeline.from_pretrained(DEMO)
    before = np.stack([np.asarray(image) for image in draw(pipe, steps)])

    pipe = ddpm.accelerate(pipe)  # the one line

    after = np.stack([np.asarray(image) for image in draw(pipe, steps)])
    difference = int(np.abs(before.astype(int) - after).max())
    save_png(make_grid(np.concatenate([before, after]), scale=4, columns=len(before)), out)
    print(f"{out}: above diffusers, below fused-ddpm; they differ by {difference} of 255 at most")
    return difference


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "diffusers_script.png"))
