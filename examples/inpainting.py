"""Inpainting with RePaint: a picture, a hole in it, and four ways to fill the hole.

    python examples/inpainting.py [OUT.png [PICTURE.png]]

The command line does the same: ddpm sample --image PICTURE.png --mask MASK.png --resample 5 --steps 100
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import ddpm
from ddpm.cli import DEMO
from ddpm.images import load_picture, make_grid, save_png, to_uint8


def main(out: Path, picture: Path | None = None, steps: int = 100, resample: int = 5) -> None:
    """Write the picture, the picture with its hole, and four fillings, from left to right."""
    sampler = ddpm.load(DEMO)
    if picture is None:
        image = sampler.sample(1, seeds=[7], steps=steps)  # one that the checkpoint drew itself
    else:
        image = load_picture(picture)  # float32 [1, 3, H, W] in [-1, 1], of the checkpoint's size

    known = torch.ones(32, 32, dtype=torch.bool)
    known[16:, :] = False  # the lower half is to be painted

    painted = sampler.sample(4, seeds=range(4), image=image, mask=known, resample=resample, steps=steps)

    hole = torch.where(known, image, 1.0)
    save_png(make_grid(to_uint8(torch.cat([image, hole, painted]), "half_to_even"), scale=4, columns=6), out)
    print(f"{out}: the picture, its hole, four fillings; the upper half is as it was, to the byte")


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    main(arguments[0] if arguments else Path("inpainting.png"), *arguments[1:2])
