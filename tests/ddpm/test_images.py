"""Bytes by each family's rounding rule, and files that are whole or absent."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image

from ddpm import images as files_of
from ddpm.files import write_whole
from ddpm.images import UINT8_ROUNDINGS, load_mask, load_picture, make_grid, save_gif, save_npz, save_png, to_uint8

# Every byte's own value, the halves between bytes, the ends and what lies outside.
LEVELS = torch.cat([torch.arange(0, 255.5, 0.5) / 255, torch.tensor([-0.3, -1e-9, 1 + 1e-6, 1.7])]) * 2 - 1


def as_images(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(1, 1, 1, -1)


def test_half_to_even_is_diffusers_rule():
    g = torch.Generator().manual_seed(0)
    values = torch.cat([LEVELS, torch.randn(2000, generator=g)])
    images = as_images(values).expand(1, 3, 2, -1)
    unit = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    expected = np.asarray(DDPMPipeline.numpy_to_pil(unit)[0])
    assert np.array_equal(to_uint8(images, "half_to_even")[0], expected)


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("half_to_even", {-255.0: 0, 127.5: 128, 128.0: 128, 128.5: 128, 254.5: 254, 510.0: 255}),
        ("truncate", {-255.0: 0, 127.5: 127, 128.0: 128, 128.5: 128, 254.5: 254, 510.0: 255}),
        ("half_up", {-255.0: 0, 127.5: 128, 128.0: 128, 128.5: 129, 254.5: 255, 510.0: 255}),
    ],
)
def test_rounding_rules_at_the_halves(rounding, expected):
    """In float64, at levels that the arithmetic hits exactly: only there do the rules differ on a half."""
    levels = torch.tensor(list(expected), dtype=torch.float64)
    x = levels / 127.5 - 1
    for scaled in ((x / 2 + 0.5) * 255, (x + 1) * 127.5, (x + 1) * 0.5 * 255):
        assert torch.equal(scaled, levels)
    assert to_uint8(as_images(x), rounding).ravel().tolist() == list(expected.values())


@pytest.mark.parametrize("rounding", ["half_to_even", "truncate", "half_up"])
def test_rounding_rules_follow_their_formula(rounding):
    values = torch.linspace(-1.2, 1.2, 4097)
    x = values.numpy()
    expected = {
        "half_to_even": lambda: np.rint(np.clip(x / 2 + np.float32(0.5), 0, 1) * np.float32(255)),
        "truncate": lambda: np.floor(np.clip((x + 1) * np.float32(127.5), 0, 255)),
        "half_up": lambda: np.floor(
            np.clip(np.clip((x + 1) * np.float32(0.5), 0, 1) * np.float32(255) + np.float32(0.5), 0, 255)
        ),
    }[rounding]()
    assert np.array_equal(to_uint8(as_images(values), rounding).ravel(), expected.astype(np.uint8))


def test_bytes_are_channels_last():
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 60 - 1
    result = to_uint8(images, "half_to_even")
    assert result.shape == (2, 4, 5, 3)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert result[1, 2, 3, 0] == round(255 * (float(images[1, 0, 2, 3]) / 2 + 0.5))


def test_an_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="rounding 'banker' is not one of half_to_even, truncate, half_up"):
        to_uint8(torch.zeros(1, 3, 2, 2), "banker")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_holds_the_bytes(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    save_png(image, tmp_path / "a.png")
    read = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(read.reshape(5, 7, channels), image)
    assert os.listdir(tmp_path) == ["a.png"]


def test_an_image_of_two_channels_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="an image of 2 channels is no picture; use the npz format"):
        save_png(np.zeros((4, 4, 2), np.uint8), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_npz_holds_images_and_all_64_bits_of_the_seeds(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    save_npz(images, [3, 2**64 - 1], tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as read:
        assert np.array_equal(read["arr_0"], images)
        assert read["seeds"].tolist() == [3, 2**64 - 1]
    save_npz(images, None, tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as read:
        assert read.files == ["arr_0"]


def test_a_gif_has_the_frames(tmp_path):
    frames = [np.full((6, 6, 3), value, np.uint8) for value in (0, 120, 255)]
    save_gif(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as read:
        assert read.n_frames == 3
        assert read.info["loop"] == 0
        for i, frame in enumerate(frames):
            read.seek(i)
            assert np.array_equal(np.asarray(read.convert("RGB")), frame)
            assert read.info["duration"] == (1500 if i == 2 else 60)


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (16, 4, 4)])
def test_a_grid_shows_every_image_in_reading_order(n, rows, columns):
    images = np.stack([np.full((3, 4, 3), i, np.uint8) for i in range(n)])
    grid = make_grid(images, padding=2, scale=1)
    assert grid.shape == (rows * 5 + 2, columns * 6 + 2, 3)
    seen = np.zeros_like(grid, dtype=bool)
    for i in range(n):
        top, left = 2 + (i // columns) * 5, 2 + (i % columns) * 6
        assert (grid[top : top + 3, left : left + 4] == i).all()
        seen[top : top + 3, left : left + 4] = True
    assert (grid[~seen] == 255).all()
    assert np.array_equal(make_grid(images, scale=3), grid.repeat(3, 0).repeat(3, 1))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def half(file):
        file.write(b"half of the new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ValueError, match=r"cannot write .*a\.png \(No space left on device\); finished files are kept"):
        write_whole(path, half)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def interrupted(file):
        file.write(b"half of the new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_check_writable_makes_the_directory_and_leaves_nothing_in_it(tmp_path):
    files_of.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot write to .*file/below \(.*\); choose another --out"):
        files_of.check_writable(tmp_path / "file" / "below")


@pytest.mark.parametrize("rounding", UINT8_ROUNDINGS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_comes_back_to_the_byte(rounding, channels, tmp_path):
    """Every byte, with every rounding: what inpainting leaves alone is the picture's own."""
    pixels = np.stack([np.roll(np.arange(256, dtype=np.uint8), 7 * c).reshape(8, 32) for c in range(channels)], axis=-1)
    save_png(pixels, tmp_path / "picture.png")
    image = load_picture(tmp_path / "picture.png", channels)
    assert image.shape == (1, channels, 8, 32)
    assert image.dtype == torch.float32
    assert float(image.abs().max()) <= 1
    assert np.array_equal(to_uint8(image, rounding)[0], pixels)


def test_a_mask_is_true_where_it_is_white(tmp_path):
    Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8)).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png").tolist() == [[False, False, True, True]]


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for load in (load_picture, load_mask):
        with pytest.raises(ValueError, match="could not be read as a picture"):
            load(tmp_path / "text.png")
    with pytest.raises(ValueError, match="a picture has 1, 3 or 4 channels, and this checkpoint's images have 2"):
        load_picture(tmp_path / "text.png", 2)


def test_pictures_that_would_be_misread_are_refused(tmp_path):
    deep, clear, ones = (tmp_path / name for name in ("deep.png", "clear.png", "ones.png"))
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(deep)
    Image.fromarray(np.full((8, 8, 4), 127, dtype=np.uint8)).save(clear)
    Image.fromarray(np.ones((8, 8), dtype=np.uint8)).save(ones)
    for load in (load_picture, load_mask):
        with pytest.raises(ValueError, match="mode I;16; save it with 8 bits a channel"):
            load(deep)
        with pytest.raises(ValueError, match="is transparent in part"):
            load(clear)
    assert load_picture(clear, 4).shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="has nothing white, so nothing would be known; a mask is 255 where it is"):
        load_mask(ones)


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    save_png(np.zeros((40, 40, 3), dtype=np.uint8), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="could not be read as a picture"):
        load_picture(tmp_path / "large.png")


def test_a_grid_of_so_many_columns():
    images = np.zeros((6, 4, 4, 3), dtype=np.uint8)
    assert make_grid(images, padding=1, columns=6).shape == (6, 31, 3)
    assert make_grid(images, padding=1).shape == (11, 16, 3)
