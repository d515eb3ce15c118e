"""The interface of denoising-diffusion-pytorch over our sampler, against the package where `make originals` has it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpm
from ddpm.dropins.lucidrains import GaussianDiffusion
from tests.ddpm.test_lucidrains_checkpoint import T, diffusion, diffusion_state, network, trainer_file
from tests.helpers import save_tiny
from tests.tolerances import CHAIN

SHAPE = (2, 3, 8, 8)
ATTRIBUTES = ("image_size", "channels", "num_timesteps", "sampling_timesteps", "is_ddim_sampling", "ddim_sampling_eta",
              "objective", "self_condition", "device")  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all steps": ("2.3.4", {}, {}),
    "pred_v, cosine": ("2.3.4", {}, {"objective": "pred_v", "beta_schedule": "cosine"}),
    "ddim": ("2.3.4", {}, {"sampling_timesteps": 6}),
    "ddim, eta": ("2.3.4", {}, {"sampling_timesteps": 6, "ddim_sampling_eta": 0.7}),
    "as many steps as T": ("2.3.4", {}, {"sampling_timesteps": T}),
    "not normalised": ("2.3.4", {}, {"sampling_timesteps": 6, "auto_normalize": False}),
    "self-condition": ("2.3.4", {"self_condition": True}, {}),
    "self-condition, pred_x0, ddim": (
        "2.3.4", {"self_condition": True},
        {"objective": "pred_x0", "sampling_timesteps": 6, "ddim_sampling_eta": 0.5},
    ),
    "1.6.4": ("1.6.4", {}, {"sampling_timesteps": 6}),
}  # fmt: skip


def both(tmp_path: Path, version: str, unet: dict[str, Any], options: dict[str, Any]) -> tuple[GaussianDiffusion, Any]:
    """(ours, the package's own object), with the same weights."""
    ours_only = ("sampling_timesteps", "ddim_sampling_eta", "auto_normalize")
    theirs = diffusion(version, unet, {"ddim_sampling_eta": 0.0} | options)
    path = trainer_file(tmp_path / "model-1.pt", theirs, theirs, None)
    old = {"version": version} if version == "1.6.4" else {}
    sampler = ddpm.load(path, device="cpu", compile=False, image_size=8, **old)
    return GaussianDiffusion(sampler, **{k: v for k, v in options.items() if k in ours_only}), theirs


@pytest.mark.originals
@pytest.mark.parametrize(("version", "unet", "options"), CASES.values(), ids=CASES.keys())
def test_the_package_itself(tmp_path, version, unet, options):
    ours, theirs = both(tmp_path, version, unet, options)
    for draw in (
        lambda diffusion: diffusion.sample(batch_size=2),
        lambda diffusion: diffusion.sample(2, return_all_timesteps=True),
        lambda diffusion: diffusion.p_sample_loop(SHAPE),
        lambda diffusion: diffusion.ddim_sample(SHAPE, return_all_timesteps=True),
    ):
        results = []
        for of in (ours, theirs):
            torch.manual_seed(3)
            results.append((draw(of), torch.randn(3)))
        (images, after), (expected, expected_after) = results
        assert images.shape == expected.shape
        assert images.dtype == torch.float32
        assert float((images - expected).abs().max()) <= CHAIN
        assert torch.equal(after, expected_after)


@pytest.mark.originals
def test_attributes_and_signatures_of_the_package(tmp_path):
    ours, theirs = both(tmp_path, "2.3.4", {"self_condition": True}, {"sampling_timesteps": 6})
    assert {name: getattr(ours, name) for name in ATTRIBUTES} == {name: getattr(theirs, name) for name in ATTRIBUTES}
    for name in ("sample", "p_sample_loop", "ddim_sample"):
        mine, original = (inspect.signature(getattr(of, name)).parameters for of in (ours, theirs))
        assert list(mine) == list(original)
        assert [p.default for p in mine.values()] == [p.default for p in original.values()]


@pytest.mark.originals
def test_a_learned_variance(tmp_path):
    theirs = diffusion("2.3.4", {"learned_variance": True}, {}, "LearnedGaussianDiffusion")
    torch.save(theirs.state_dict(), tmp_path / "diffusion.pt")
    ours = GaussianDiffusion(ddpm.load(tmp_path / "diffusion.pt", device="cpu", compile=False, image_size=8))
    torch.manual_seed(3)
    expected = theirs.sample(batch_size=2)
    torch.manual_seed(3)
    assert float((ours.sample(batch_size=2) - expected).abs().max()) <= CHAIN


# --- without the package ---------------------------------------------------------------------------------------------


@pytest.fixture
def sampler(tmp_path: Path) -> ddpm.Sampler:
    torch.save(diffusion_state(network()), tmp_path / "model.pt")
    return ddpm.load(tmp_path / "model.pt", image_size=8, device="cpu", compile=False)


@pytest.mark.parametrize("options", [{}, {"sampling_timesteps": 6, "ddim_sampling_eta": 0.5}], ids=["ddpm", "ddim"])
def test_images_and_every_state(sampler, options):
    ours = GaussianDiffusion(sampler, **options)
    steps = options.get("sampling_timesteps", T)
    torch.manual_seed(3)
    images = ours.sample(batch_size=2)
    after = torch.randn(3)
    generator = torch.Generator().manual_seed(3)
    expected = sampler.sample(2, generator=generator, steps=steps, eta=options.get("ddim_sampling_eta"), progress=False)
    assert torch.equal(images, (expected + 1) * 0.5)
    assert torch.equal(torch.randn(3, generator=generator), after)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    torch.manual_seed(3)
    states = ours.sample(batch_size=2, return_all_timesteps=True)
    torch.manual_seed(3)
    assert torch.equal(states[:, 0], (torch.randn(SHAPE) + 1) * 0.5)
    assert states.shape == (2, steps + 1, 3, 8, 8)
    assert torch.equal(states[:, -1], images)
    torch.manual_seed(3)
    assert torch.equal(GaussianDiffusion(sampler, **options, auto_normalize=False).sample(2), expected)
    assert ours.sample().shape == (16, 3, 8, 8)


def test_attributes(sampler):
    found = {name: getattr(GaussianDiffusion(sampler, sampling_timesteps=6), name) for name in ATTRIBUTES}
    assert found == {
        "image_size": (8, 8), "channels": 3, "num_timesteps": T, "sampling_timesteps": 6, "is_ddim_sampling": True,
        "ddim_sampling_eta": 0.0, "objective": "pred_noise", "self_condition": False, "device": torch.device("cpu"),
    }  # fmt: skip
    for steps in (None, T):
        ours = GaussianDiffusion(sampler, sampling_timesteps=steps)
        assert (ours.sampling_timesteps, ours.is_ddim_sampling) == (T, False)


def test_refusals(sampler, tmp_path):
    ours = GaussianDiffusion(sampler, sampling_timesteps=6)
    state = torch.get_rng_state()
    for call, sentence in [
        (lambda: GaussianDiffusion("model.pt"), r"sampler must be what ddpm\.load gives; got str"),
        (
            lambda: GaussianDiffusion(sampler, sampling_timesteps=51),
            "sampling_timesteps=51 is more than the .* 50 train",
        ),
        (
            lambda: GaussianDiffusion(sampler, sampling_timesteps=0),
            "sampling_timesteps must be a positive integer; got 0",
        ),
        (lambda: GaussianDiffusion(sampler, auto_normalize=1), "auto_normalize must be True or False; got 1"),
        (
            lambda: GaussianDiffusion(sampler, sampling_timesteps=6, ddim_sampling_eta=2).sample(),
            "eta must be a number",
        ),
        (lambda: ours.sample(0), "the batch size must be a positive integer; got 0"),
        (lambda: ours.sample(2, return_all_timesteps=1), "return_all_timesteps must be True or False; got 1"),
        (lambda: ours.p_sample_loop((2, 3, 16, 16)), r"shape is \(2, 3, 16, 16\); expected \(N, 3, 8, 8\)"),
        (lambda: ours.ddim_sample(2), "shape is 2; expected"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
    assert torch.equal(torch.get_rng_state(), state)
    stranger = ddpm.load(save_tiny(tmp_path / "pipeline"), device="cpu", compile=False)
    with pytest.raises(ValueError, match="of family diffusers, which denoising-diffusion-pytorch does not sample; use"):
        GaussianDiffusion(stranger)


@pytest.mark.parametrize("name", ["p_sample", "q_sample", "interpolate", "p_losses", "betas", "forward"])
def test_what_there_is_not_says_what_there_is(sampler, name):
    with pytest.raises(
        AttributeError,
        match=f"{name} is not part of this drop-in, which has channels, cuda, ddim_sample, .*, to"
        "; for it use denoising-diffusion-pytorch itself",
    ):
        getattr(GaussianDiffusion(sampler), name)


def test_it_is_moved_and_set_as_a_module_is(sampler):
    """What usually stands between the constructor and `sample`."""
    diffusion = GaussianDiffusion(sampler, sampling_timesteps=3)
    assert diffusion.eval().to("cpu") is diffusion
    with pytest.raises(ValueError, match=r"cuda|no GPU"):
        diffusion.cuda(99)


@pytest.mark.parametrize("eta", [7, "x", -0.1, True])
def test_eta_is_checked_at_once(sampler, eta):
    with pytest.raises(ValueError, match="ddim_sampling_eta must be a number from 0 to 1"):
        GaussianDiffusion(sampler, ddim_sampling_eta=eta)
