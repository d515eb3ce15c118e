"""The command: what it writes is what the sampler draws; every error is one sentence, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import ddpm
from ddpm import images as files_of
from ddpm.cli import GIF_FRAMES, Animation, main, parse_seeds
from ddpm.images import make_grid, to_uint8
from tests.helpers import save_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def ddpm_command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def sample(checkpoint: Path, out: Path, *arguments: object) -> Result:
    return ddpm_command(
        "sample", checkpoint, "--out", out, "--steps", 4, "--device", "cpu", "--compile", "off", *arguments
    )


def drawn(checkpoint: Path, seeds: list[int], steps: int = 4, batch_size: int | None = None) -> np.ndarray:
    sampler = ddpm.load(checkpoint, device="cpu", compile=False)
    images = sampler.sample(len(seeds), seeds=seeds, steps=steps, batch_size=batch_size, progress=False)
    return to_uint8(images, "half_to_even")


def assert_refused(result: Result, sentence: str, out: Path | None = None) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)  # click's own exit, no stray exception
    assert sentence in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    if out is not None:
        assert not out.exists()


# --- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0", [0]),
        ("0-3", [0, 1, 2, 3]),
        ("5-5", [5]),
        ("3-4,100, 7", [3, 4, 100, 7]),
        (str(2**64 - 1), [2**64 - 1]),
    ],
)
def test_seeds_are_parsed(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("5-2", "the range 5-2 runs backwards; write 2-5"),
        ("", "'' is neither a number nor a range"),
        ("1,,2", "'' is neither a number nor a range"),
        ("a", "'a' is neither a number nor a range"),
        ("1-", "'1-' is neither a number nor a range"),
        ("-1", "'-1' is neither a number nor a range"),
        ("1-2-3", "'1-2-3' is neither a number nor a range"),
        ("1.5", "'1.5' is neither a number nor a range"),
        ("²", "'²' is neither a number nor a range"),
        ("0-3,2", "names 1 seeds twice"),
    ],
)
def test_seeds_that_are_none_are_refused(text, sentence, checkpoint, out):
    with pytest.raises(ValueError, match="seeds") as caught:
        parse_seeds(text)
    assert sentence in str(caught.value)
    assert_refused(sample(checkpoint, out, "--seeds", text), sentence, out)


# --- what is written -------------------------------------------------------------------------------------------------


def test_one_png_per_seed_a_grid_and_an_animation(checkpoint, out):
    result = sample(checkpoint, out, "--seeds", "3-5,100", "--grid", "--gif")
    assert result.exit_code == 0, result.output
    names = ["000003.png", "000004.png", "000005.png", "000100.png", "denoising.gif", "grid.png"]
    assert sorted(os.listdir(out)) == names
    expected = drawn(checkpoint, [3, 4, 5, 100])
    for name, image in zip(names, expected, strict=False):
        assert np.array_equal(np.asarray(Image.open(out / name)), image)
    assert np.array_equal(np.asarray(Image.open(out / "grid.png")), make_grid(expected, scale=8))
    with Image.open(out / "denoising.gif") as animation:
        assert animation.n_frames == 4
        animation.seek(3)
        assert animation.size == (make_grid(expected, scale=8).shape[1], make_grid(expected, scale=8).shape[0])
    assert f"4 images in {result.stdout.split(' in ')[1].split(' s')[0]} s" in result.stdout
    assert "step/s" in result.stderr


def test_npz(checkpoint, out):
    result = sample(checkpoint, out, "--seeds", "0-4", "--format", "npz", "--batch-size", 2, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.output == ""
    assert os.listdir(out) == ["samples.npz"]
    with np.load(out / "samples.npz") as read:
        assert read["seeds"].tolist() == [0, 1, 2, 3, 4]
        assert np.array_equal(read["arr_0"], drawn(checkpoint, list(range(5)), batch_size=2))


def test_spacing_and_steps_reach_the_sampler(checkpoint, out):
    assert sample(checkpoint, out, "--seeds", "1", "--spacing", "trailing").exit_code == 0
    sampler = ddpm.load(checkpoint, device="cpu", compile=False)
    images = sampler.sample(1, seeds=[1], steps=4, spacing="trailing", progress=False)
    assert np.array_equal(np.asarray(Image.open(out / "000001.png")), to_uint8(images, "half_to_even")[0])


def test_grey_images(tmp_path, out):
    grey = save_tiny(tmp_path / "grey", {"in_channels": 1, "out_channels": 1})
    assert sample(grey, out, "--seeds", "0", "--grid", "--gif").exit_code == 0
    picture = Image.open(out / "000000.png")
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), drawn(grey, [0])[0, ..., 0])


def test_existing_files_are_replaced(checkpoint, out):
    out.mkdir()
    (out / "000000.png").write_bytes(b"old")
    (out / "notes.txt").write_text("mine")
    assert sample(checkpoint, out, "--seeds", "0").exit_code == 0
    assert np.array_equal(np.asarray(Image.open(out / "000000.png")), drawn(checkpoint, [0])[0])
    assert (out / "notes.txt").read_text() == "mine"


def test_the_animation_keeps_about_sixty_frames_and_the_last():
    import torch

    animation = Animation("half_to_even")
    for step in range(1000):
        animation(step, 999 - step, torch.full((2, 3, 8, 8), step / 500 - 1))
    for step in range(3):
        animation(step, 999 - step, torch.zeros(2, 3, 8, 8))  # the second batch is not shown
    frames = animation.frames
    assert GIF_FRAMES <= len(frames) <= GIF_FRAMES * 1.5
    assert frames[-1][16, 16, 0] == round(255 * 999 / 1000)


def test_info(checkpoint):
    result = ddpm_command("info", checkpoint, "--device", "cpu")
    assert result.exit_code == 0, result.output
    parameters = sum(p.numel() for p in ddpm.load(checkpoint, device="cpu").checkpoint.network.parameters())
    for text in (
        str(checkpoint),
        "3 x 8 x 8",
        f"{parameters:,} parameters",
        "channels 8, 16; 1 resnets a level",
        "attention: down 1, mid, up 0",
        "GroupNorm of 4 groups, eps 1e-05",
        "T 100, betas 0.0001 .. 0.02",
        "DDPM by default, as diffusers does; predicts epsilon",
        "DDPM: variance fixed_small",
        "clip: clamp to +-1, spacing leading",
        "DDIM: eta 0, raw epsilon, clip: clamp to +-1, spacing leading, 50 steps",
        "cpu, fp32",
        "found ",
        "inferred ",
    ):
        assert text in result.stdout, text
    explained = ddpm_command("info", checkpoint, "--device", "cpu", "--explain")
    assert "mid_resnets.0.conv1" in explained.stdout
    assert "group_norm_silu" in explained.stdout


def test_the_demo_is_the_default(checkpoint):
    result = ddpm_command("info", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "emoji32-smileys" in result.stdout


def test_help_and_version():
    assert "Draw one image per seed" in ddpm_command("sample", "-h").stdout
    assert ddpm_command("--help").exit_code == 0


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_steps_out_of_range(checkpoint, out, steps):
    result = ddpm_command("sample", checkpoint, "--out", out, "--steps", steps, "--device", "cpu")
    assert_refused(
        result, f"error: steps must be an integer from 1 to 100, the checkpoint's training timesteps; got {steps}"
    )
    assert not out.exists()


def test_a_missing_checkpoint(tmp_path, out):
    assert_refused(sample(tmp_path / "none", out), f"error: {tmp_path / 'none'} does not exist", out)


def test_an_empty_checkpoint(tmp_path, out):
    (tmp_path / "empty").mkdir()
    assert_refused(sample(tmp_path / "empty", out), "is an empty directory", out)
    assert_refused(ddpm_command("info", tmp_path / "empty"), "is an empty directory")


def test_another_scheduler(tmp_path, out):
    save_tiny(tmp_path / "c")
    index = tmp_path / "c" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    assert_refused(sample(tmp_path / "c", out), "scheduler class PNDMScheduler is not supported", out)
    assert sample(tmp_path / "c", out, "--scheduler-class", "DDPMScheduler", "--seeds", "0").exit_code == 0


def test_no_gpu(checkpoint, out, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(sample(checkpoint, out, "--device", "cuda"), "torch finds no GPU here", out)


@pytest.mark.parametrize("batch_size", [0, -2])
def test_batch_sizes(checkpoint, out, batch_size):
    assert_refused(sample(checkpoint, out, "--batch-size", batch_size), "batch_size must be a positive integer", out)


def test_an_out_below_a_file_is_refused_before_sampling(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("ddpm.loop.Loop.steps", lambda *a, **k: pytest.fail("sampled before --out was checked"))
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert_refused(sample(checkpoint, out), f"error: cannot write to {out}")
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_keeps_the_finished_files(checkpoint, out, monkeypatch):
    replace = Path.replace

    def full(self, target):
        if Path(target).name == "000002.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    result = sample(checkpoint, out, "--seeds", "0-3", "--quiet")
    assert_refused(
        result, f"error: cannot write {out / '000002.png'} (No space left on device); finished files are kept"
    )
    assert sorted(os.listdir(out)) == ["000000.png", "000001.png"]
    assert np.array_equal(np.asarray(Image.open(out / "000001.png")), drawn(checkpoint, [0, 1, 2, 3])[1])


def test_a_disk_that_is_full_while_a_file_is_written(checkpoint, out, monkeypatch):
    def full(image, path):
        def write(file):
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        files_of.write_whole(path, write)

    monkeypatch.setattr(files_of, "save_png", full)
    assert_refused(sample(checkpoint, out, "--seeds", "0", "--quiet"), "(No space left on device)")
    assert os.listdir(out) == []


def test_ctrl_c_keeps_the_finished_pictures(checkpoint, out, monkeypatch):
    from ddpm.loop import Loop

    run, calls = Loop.steps, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "steps", interrupted)
    result = sample(checkpoint, out, "--seeds", "0-5", "--batch-size", 2, "--grid")
    assert result.exit_code == 130
    assert f"interrupted: 4 of 6 images are finished in {out}/" in result.stderr
    assert "Traceback" not in result.output
    assert sorted(os.listdir(out)) == ["000000.png", "000001.png", "000002.png", "000003.png", "grid.png"]
    monkeypatch.setattr(Loop, "steps", run)
    expected = drawn(checkpoint, [0, 1, 2, 3], batch_size=2)
    assert np.array_equal(np.asarray(Image.open(out / "000003.png")), expected[3])
    assert np.array_equal(np.asarray(Image.open(out / "grid.png")), make_grid(expected, scale=8))


def test_ctrl_c_while_loading_exits_130(checkpoint, out, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm.sampler.load_checkpoint", interrupted)
    result = sample(checkpoint, out)
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert not out.exists()


def test_a_network_that_outputs_nan_exits_1_with_a_sentence(checkpoint, out, monkeypatch):
    from ddpm.fused import TimePath

    table = TimePath.table
    monkeypatch.setattr(TimePath, "table", lambda self, timesteps: table(self, timesteps) * float("nan"))
    result = sample(checkpoint, out, "--seeds", "7", "--quiet")
    assert result.exit_code == 1
    assert (
        "error: the network's output became NaN or infinite at step 0 (timestep 75) in image 0 (seed 7)"
        in result.stderr
    )
    assert "Traceback" not in result.output
    assert os.listdir(out) == []


@pytest.mark.parametrize("file_format", ["png", "npz"])
def test_nan_in_a_later_batch_keeps_the_finished_images(checkpoint, out, monkeypatch, file_format):
    from ddpm.loop import Loop

    run, chains = Loop.steps, []

    def run_until_the_second(self, *args, **kwargs):
        chains.append(1)
        if len(chains) == 2:
            raise FloatingPointError(1, 0)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "steps", run_until_the_second)
    options = ("--seeds", "0-3", "--batch-size", "2", "--format", file_format, "--grid", "--quiet")
    result = sample(checkpoint, out, *options)
    assert result.exit_code == 1
    assert "in image 2 (seed 2)" in result.stderr
    assert "2 of 4 images are finished" in result.stderr
    expected = ["grid.png", "samples.npz"] if file_format == "npz" else ["000000.png", "000001.png", "grid.png"]
    assert sorted(os.listdir(out)) == sorted(expected)


def test_as_a_module(checkpoint, out):
    command = [sys.executable, "-m", "ddpm", "sample", checkpoint, "--out", out, "--seeds", "5-2"]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr == "error: seeds '5-2': the range 5-2 runs backwards; write 2-5\n"
    assert not out.exists()


def test_options_of_a_checkpoint():
    from ddpm.checkpoints.options import parse_options
    from ddpm.cli import parse_labels

    assert parse_options(("image_size=64", "learn_sigma=true", "rescale_timesteps=False", "channel_mult=1,2")) == {
        "image_size": 64,
        "learn_sigma": True,
        "rescale_timesteps": False,
        "channel_mult": "1,2",
    }
    for text, sentence in (
        ("image_size", "is not of the form NAME=VALUE"),
        ("device=cpu", "device is not an option of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse_options((text,))
    assert parse_labels("3") == 3
    assert parse_labels("0-2,2") == [0, 1, 2, 2]
    with pytest.raises(ValueError, match="the range 9-0 runs backwards"):
        parse_labels("9-0")


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path) -> Path:
    """8 x 8, of the checkpoint's size."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    files_of.save_png(pixels, tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def mask(tmp_path) -> Path:
    """White, and known, in the upper half."""
    Image.fromarray(np.repeat(np.array([[255], [0]], dtype=np.uint8), 4, axis=0).repeat(8, axis=1)).save(
        tmp_path / "mask.png"
    )
    return tmp_path / "mask.png"


@pytest.mark.parametrize("resample", [[], ["--resample", "2x3"]])
def test_inpainting_keeps_the_bytes_of_the_known_region(checkpoint, out, picture, mask, resample):
    result = sample(checkpoint, out, "--seeds", "3,4", "--image", picture, "--mask", mask, *resample, "--quiet")
    assert result.exit_code == 0, result.output
    given = np.asarray(Image.open(picture))
    for seed in (3, 4):
        painted = np.asarray(Image.open(out / f"{seed:06d}.png"))
        assert np.array_equal(painted[:4], given[:4])
        assert not np.array_equal(painted[4:], given[4:])


def test_sdedit_is_the_samplers(checkpoint, out, picture):
    assert sample(checkpoint, out, "--seeds", "3", "--image", picture, "--strength", "0.5").exit_code == 0
    sampler = ddpm.load(checkpoint, device="cpu", compile=False)
    image = files_of.load_picture(picture)
    expected = sampler.sample(1, seeds=[3], image=image, strength=0.5, steps=4, progress=False)
    assert np.array_equal(np.asarray(Image.open(out / "000003.png")), to_uint8(expected, "half_to_even")[0])


def test_guidance_is_the_samplers(tmp_path, out):
    directory = save_tiny(tmp_path / "classes", {"num_class_embeds": 5})
    options = ("--labels", 1, "--guidance-scale", 2.5, "--null-label", 4)
    assert sample(directory, out, "--seeds", "3", *options).exit_code == 0
    sampler = ddpm.load(directory, device="cpu", compile=False)
    expected = sampler.sample(1, seeds=[3], labels=1, guidance_scale=2.5, null_label=4, steps=4, progress=False)
    assert np.array_equal(np.asarray(Image.open(out / "000003.png")), to_uint8(expected, "half_to_even")[0])


def test_pictures_that_do_not_fit_are_refused(checkpoint, out, picture, mask, tmp_path):
    files_of.save_png(np.full((9, 8, 3), 255, dtype=np.uint8), tmp_path / "large.png")
    for arguments, sentence in (
        (["--image", picture], "image needs mask= (to paint the rest of it) or strength="),
        (["--mask", mask], "mask was given without image="),
        (
            ["--image", tmp_path / "large.png", "--strength", 0.5],
            "large.png has 8 x 9 pixels; expected 8 x 8",
        ),
        (["--image", picture, "--mask", tmp_path / "large.png"], "large.png has 8 x 9 pixels; expected 8 x 8"),
        (["--image", picture, "--mask", mask, "--resample", "often"], "resample 'often' is no number of passes"),
        (["--image", tmp_path / "none.png"], "does not exist"),
    ):
        assert_refused(sample(checkpoint, out, *arguments), sentence, out)
