"""From [-1, 1] to bytes and files. A file is written under a temporary name and renamed: none is ever half there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.files import write_whole

UINT8_ROUNDINGS = ("half_to_even", "truncate", "half_up")


def to_uint8(images: Tensor, rounding: str) -> np.ndarray:
    """Bytes as the family's own scripts make them.

    "half_to_even" is diffusers: round(255 (x/2 + 0.5)). "truncate" is OpenAI's: floor(127.5 (x + 1)). "half_up" is
    torchvision's save_image: floor(255 (x + 1)/2 + 0.5).

    Args:
        images: float [N, C, H, W], nominally in [-1, 1]; what lies outside is clamped.
        rounding: one of UINT8_ROUNDINGS.

    Returns:
        uint8 [N, H, W, C].
    """
    if rounding == "half_to_even":
        scaled = ((images / 2 + 0.5).clamp(0, 1) * 255).round()
    elif rounding == "truncate":
        scaled = ((images + 1) * 127.5).clamp(0, 255)
    elif rounding == "half_up":
        scaled = (((images + 1) * 0.5).clamp(0, 1) * 255 + 0.5).clamp(0, 255)
    else:
        raise ValueError(f"rounding {rounding!r} is not one of {', '.join(UINT8_ROUNDINGS)}")
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _picture(image: np.ndarray):
    """uint8 [H, W, C] as a Pillow image: RGB, or grey for one channel."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            "pillow is not installed, which writes pictures; install pillow or use the npz format"
        ) from error
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"an image of {image.shape[-1]} channels is no picture; use the npz format")
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def load_picture(path: Path, channels: int = 3) -> Tensor:
    """A picture file as float32 [1, channels, H, W] in [-1, 1], in grey (1), colour (3) or with transparency (4).

    `to_uint8` gives its bytes back with every rounding.

    Raises:
        ValueError: it is no picture of 8 bits a channel, it is transparent where the images are not, pillow is not
            installed, or another number of channels.
    """
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise ValueError(f"{path}: a picture has 1, 3 or 4 channels, and this checkpoint's images have {channels}")
    pixels = _read_picture(path, modes[channels])
    x = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).view(1, *pixels.shape[:2], channels)
    # A last bit above: some quotients are rounded down, and would be truncated to the byte below.
    return torch.nextafter(x, torch.tensor(2.0)).clamp(max=1).permute(0, 3, 1, 2)


def load_mask(path: Path) -> Tensor:
    """A black and white picture file as bool [H, W], True where it is white.

    Raises:
        ValueError: as `load_picture`; or nothing in it is white.
    """
    white = torch.from_numpy(_read_picture(path, "L") >= 128)
    if not bool(white.any()):
        raise ValueError(f"{path} has nothing white, so nothing would be known; a mask is 255 where it is, not 1")
    return white


def _read_picture(path: Path, mode: str) -> np.ndarray:
    """uint8 [H, W] or [H, W, C]."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError(f"pillow is not installed, which reads {path}; install pillow") from error
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
                raise ValueError(f"{path} is a picture of mode {picture.mode}; save it with 8 bits a channel, as RGB")
            transparent = picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255
            if transparent and mode != "RGBA":
                raise ValueError(f"{path} is transparent in part, and nothing stands behind it; save it without alpha")
            return np.asarray(picture.convert(mode))
    # a damaged file, or one of more pixels than pillow takes for a picture
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} could not be read as a picture ({error})") from error


def save_png(image: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, C]."""
    picture = _picture(image)
    write_whole(path, lambda file: picture.save(file, format="PNG"))


def save_npz(images: np.ndarray, seeds: Sequence[int] | None, path: Path) -> None:
    """Write uint8 [N, H, W, C] as arr_0, the name that FID tools read, and the seeds beside it."""
    if seeds is None:
        write_whole(path, lambda file: np.savez(file, arr_0=images))
    else:
        write_whole(path, lambda file: np.savez(file, arr_0=images, seeds=np.array(seeds, dtype=np.uint64)))


def save_gif(frames: Sequence[np.ndarray], path: Path, milliseconds: int = 60, hold: int = 1500) -> None:
    """Write frames, each uint8 [H, W, C], as an animation that repeats and holds its last frame (ms)."""
    first, *rest = [_picture(frame) for frame in frames]
    durations = [milliseconds] * len(rest) + [hold]
    write_whole(
        path,
        lambda file: first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0),
    )


def make_grid(images: np.ndarray, padding: int = 2, scale: int = 1, columns: int | None = None) -> np.ndarray:
    """Tile uint8 [N, H, W, C] row by row into one [H', W', C], on white.

    Args:
        columns: tiles in a row; None is as square as N allows.
        padding: pixels between tiles, before scaling.
        scale: every pixel becomes scale x scale.
    """
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, channels)
    grid = np.full(shape, 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (padding + (i // columns) * (height + padding), padding + (i % columns) * (width + padding))
        grid[top : top + height, left : left + width] = image
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


def check_writable(directory: Path) -> None:
    """Create the directory and a file in it, and remove the file again.

    Raises:
        ValueError: either cannot be done; found before the sampling and not after it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {directory} ({error.strerror}); choose another --out") from error
