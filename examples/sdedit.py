"""SDEdit: a crude drawing becomes a picture, the more so the more of the chain is walked.

    python examples/sdedit.py [OUT.png [PICTURE.png]]

The command line does the same: ddpm sample --image PICTURE.png --strength 0.5
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import ddpm
from ddpm.cli import DEMO
from ddpm.images import load_picture, make_grid, save_png, to_uint8

STRENGTHS = (0.3, 0.45, 0.6, 0.75)


def drawing() -> Tensor:
    """A face in six strokes, float32 [1, 3, 32, 32] in [-1, 1]."""
    picture = Image.new("RGB", (32, 32), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((3, 3, 28, 28), fill=(250, 205, 60))
    pen.ellipse((10, 11, 13, 15), fill=(90, 50, 20))
    pen.ellipse((18, 11, 21, 15), fill=(90, 50, 20))
    pen.arc((9, 11, 22, 23), 20, 160, fill=(90, 50, 20), width=2)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def main(out: Path, picture: Path | None = None, steps: int = 100) -> None:
    """Write a row for each strength: the drawing and three pictures made of it."""
    sampler = ddpm.load(DEMO)
    image = drawing() if picture is None else load_picture(picture)
    rows = []
    for strength in STRENGTHS:
        images = sampler.sample(3, seeds=range(3), image=image, strength=strength, steps=steps)
        rows += [image, images]
    save_png(make_grid(to_uint8(torch.cat(rows), "half_to_even"), scale=4, columns=4), out)
    print(f"{out}: the drawing and three pictures of it, for the strengths {', '.join(map(str, STRENGTHS))}")


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    main(arguments[0] if arguments else Path("sdedit.png"), *arguments[1:2])
