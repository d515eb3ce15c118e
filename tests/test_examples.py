"""The examples run as they stand, with few steps; what they claim to be equal is equal."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
from ddpm.cli import DEMO
from tests.originals.guided_diffusion import Diffusion
from tests.tolerances import CHAIN

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS = 4


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiles(path: Path, rows: int, columns: int) -> np.ndarray:
    """The images of a grid, uint8 [rows, columns, 32, 32, 3]: padding 2, every pixel four times."""
    small = np.asarray(Image.open(path))[::4, ::4]
    return np.stack(
        [
            np.stack([small[2 + 34 * r : 34 * r + 34, 2 + 34 * c : 34 * c + 34] for c in range(columns)])
            for r in range(rows)
        ]
    )


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "diffusers_script",
        "guided_diffusion_script",
        "inpainting",
        "own_module",
        "sdedit",
    }


def test_the_diffusers_script_draws_the_same_images(tmp_path):
    assert example("diffusers_script").main(tmp_path / "out.png", STEPS) <= 1
    before, after = tiles(tmp_path / "out.png", 2, 4)
    assert np.abs(before.astype(int) - after).max() <= 1
    assert before.std() > 10


def test_the_guided_diffusion_script_draws_the_same_images(tmp_path):
    """Its `draw` with the drop-in, and with an independent implementation of the original."""
    script = example("guided_diffusion_script")
    script.main(tmp_path / "out.png", str(STEPS))
    after = tiles(tmp_path / "out.png", 2, 4).reshape(8, 32, 32, 3)
    network = ddpm.load(DEMO).checkpoint.network
    expected = script.draw(network, Original())
    bytes_of = ((torch.cat(expected) + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(bytes_of.astype(int) - after).max() <= 1
    sampler = script.GaussianDiffusion(ddpm.load(DEMO), str(STEPS))
    for ours, theirs in zip(script.draw(sampler.model, sampler), expected, strict=True):
        assert float((ours - theirs).abs().max()) <= CHAIN


class Original(Diffusion):
    """With the original's progress argument; the demo was trained with a fixed, small variance."""

    def __init__(self) -> None:
        super().__init__(1000, "linear", str(STEPS), sigma_small=True)

    def p_sample_loop(self, *args, progress, **options):
        return super().p_sample_loop(*args, **options)

    def ddim_sample_loop(self, *args, progress, **options):
        return super().ddim_sample_loop(*args, **options)


def test_the_own_module_draws_the_same_images(tmp_path):
    assert example("own_module").main(tmp_path / "out.png", STEPS) <= CHAIN
    assert Image.open(tmp_path / "out.png").size == (138 * 4, 70 * 4)


@pytest.mark.parametrize("given", [False, True])
def test_inpainting_keeps_what_is_known(tmp_path, given):
    picture = None
    if given:
        picture = tmp_path / "picture.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture)
    example("inpainting").main(tmp_path / "out.png", picture, steps=12, resample=2)
    ((image, hole, *painted),) = tiles(tmp_path / "out.png", 1, 6)
    assert np.array_equal(hole[:16], image[:16])
    assert (hole[16:] == 255).all()
    for one in painted:
        assert np.array_equal(one[:16], image[:16])
        assert not np.array_equal(one[16:], image[16:])
    if given:
        assert np.array_equal(image, np.asarray(Image.open(picture)))


def test_sdedit_follows_the_drawing(tmp_path):
    """A part of the chain that is short leaves the drawing nearly as it is."""
    script = example("sdedit")
    script.main(tmp_path / "out.png", steps=10)
    rows = tiles(tmp_path / "out.png", len(script.STRENGTHS), 4).astype(int)
    assert (rows[:, 0] == rows[0, 0]).all()
    distances = np.abs(rows[:, 1:] - rows[:, :1]).mean(axis=(1, 2, 3, 4))
    assert distances[0] < distances[-1]
    assert len({tile.tobytes() for tile in rows[:, 1:].reshape(-1, 32, 32, 3)}) == 3 * len(script.STRENGTHS)
