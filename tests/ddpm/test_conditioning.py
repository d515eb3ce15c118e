"""Guidance, inpainting and SDEdit against the papers' own loops, slow and independent (tests/originals)."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import ddpm
from ddpm.checkpoints import Checkpoint, Report
from ddpm.kernels.philox import (
    PURPOSE_IMG2IMG,
    PURPOSE_INITIAL,
    PURPOSE_JUMP,
    PURPOSE_KNOWN_REGION,
    PURPOSE_STEP,
    philox_normal,
)
from ddpm.reference import sample_reference
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule
from ddpm.timesteps import repaint_walk
from ddpm.unet import UNet, UNetConfig
from tests.helpers import save_tiny
from tests.originals.conditioning import GaussianToy, guided, jump_states, repaint, sdedit, sdedit_closed_form
from tests.tolerances import CHAIN
from tests.weights import redraw

SHAPE = (3, 8, 8)
CLASSES = {"num_class_embeds": 5}


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tiny"))


def load(directory, unet: dict[str, Any] | None = None, **options: Any) -> ddpm.Sampler:
    return ddpm.load(save_tiny(directory, unet, **options), device="cpu", compile=False)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(n: int = 2, seed: int = 3) -> Tensor:
    return torch.rand(n, *SHAPE, generator=generator(seed)) * 2 - 1


def region(n: int = 2) -> Tensor:
    """Two thirds known; another region for each image and channel."""
    return torch.rand(n, *SHAPE, generator=generator(4)) < 0.66


def alphas_cumprod(sampler: ddpm.Sampler) -> Tensor:
    return sampler.checkpoint.schedule.alphas_cumprod.double()


def sample(model: ddpm.Sampler, /, n: int = 2, **options: Any) -> Tensor:
    return model.sample(n, **({"steps": 12, "progress": False} | options))


# --- RePaint ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "passes", "jump"), [(1, 1, 1), (12, 1, 10), (12, 2, 3), (12, 3, 11), (250, 10, 10), (30, 2, 1)]
)
def test_the_walk_is_that_of_the_references(length, passes, jump):
    walk = repaint_walk(length, passes, jump)
    states = [length - 1]
    for before, after in walk:
        assert before == states[-1]
        states += [before - 1] + ([after] if after != before - 1 else [])
    assert states == jump_states(length, passes, jump)


def test_a_walk_written_out():
    """States 3, 2, 3, 2, 1, 2, 1, 0, 1, 0 and -1, clean: each part of one step is walked twice."""
    assert repaint_walk(4, 2, 1) == [(3, 3), (3, 2), (2, 2), (2, 1), (1, 1), (1, 0), (0, -1)]
    assert repaint_walk(3, 1, 10) == [(2, 1), (1, 0), (0, -1)]


RESAMPLES = {"once": None, "twice": (2, 3), "thrice": (3, 4), "a number": 2}


@pytest.mark.parametrize("resample", RESAMPLES.values(), ids=RESAMPLES.keys())
@pytest.mark.parametrize("clip", [True, False])
def test_repaint_with_a_generator(tmp_path, resample, clip):
    sampler = load(tmp_path, clip_sample=clip, prediction_type="epsilon")
    ours, theirs = generator(), generator()
    passes, jump = resample if isinstance(resample, tuple) else (resample or 1, 10)
    x_T = torch.randn(2, *SHAPE, generator=theirs)
    expected = repaint(
        lambda x, t: sampler.checkpoint.network(x, t),
        alphas_cumprod(sampler),
        sampler.plan(1, steps=12).table.timesteps.tolist(),
        x_T,
        picture(),
        region(),
        passes,
        jump,
        lambda kind: torch.randn(2, *SHAPE, generator=theirs),
        clip,
    )
    images = sample(sampler, image=picture(), mask=region(), resample=resample, generator=ours)
    scale = 1 if clip else max(1.0, float(expected.abs().max()))  # an unclipped chain of a random network grows
    assert float((images - expected).abs().max()) <= CHAIN * scale
    assert torch.equal(images[region()], picture()[region()])
    assert torch.equal(ours.get_state(), theirs.get_state())


OTHERS = {
    "openai": {"convention": "openai"},
    "ermongroup": {"convention": "ermongroup"},
    "lucidrains": {"convention": "lucidrains"},
    "ddim, eta 1, is ancestral sampling": {"sampler": "ddim", "eta": 1.0, "clip": "none"},
}


@pytest.mark.parametrize("rules", OTHERS.values(), ids=OTHERS.keys())
def test_repaint_as_every_family_draws(sampler, rules):
    """Some draw at the last step too, behind all that is used."""
    checkpoint, source = sampler.checkpoint, generator()
    own = ddpm.Sampler.from_module(Plain(checkpoint.network), checkpoint.schedule.betas.double(), SHAPE, **rules)
    chain = [90, 70, 55, 40, 20, 10, 4, 0]
    expected = repaint(
        checkpoint.network,
        alphas_cumprod(own),
        chain,
        torch.randn(2, *SHAPE, generator=source),
        picture(),
        region(),
        2,
        3,
        lambda kind: torch.randn(2, *SHAPE, generator=source),
        rules.get("clip") != "none",
    )
    options = {"timesteps": chain, "steps": None, "image": picture(), "mask": region(), "resample": (2, 3)}
    images = sample(own, generator=generator(), **options)
    assert float((images - expected).abs().max()) <= CHAIN * max(1.0, float(expected.abs().max()))
    assert torch.equal(images[region()], picture()[region()])


def test_repaint_with_seeds(sampler):
    """Each draw is the Philox stream of its purpose, numbered by the step walked."""
    seeds, purposes = torch.tensor([5, 6]), {"step": PURPOSE_STEP, "known": PURPOSE_KNOWN_REGION, "jump": PURPOSE_JUMP}
    steps = iter(i for i in range(100))
    drawn: dict[str, int] = {}

    def draw(kind: str) -> Tensor:
        drawn["i"] = next(steps) if kind == "step" else drawn["i"]
        return philox_normal(seeds, SHAPE, drawn["i"], purposes[kind])

    expected = repaint(
        lambda x, t: sampler.checkpoint.network(x, t),
        alphas_cumprod(sampler),
        sampler.plan(1, steps=12).table.timesteps.tolist(),
        philox_normal(seeds, SHAPE, 0, PURPOSE_INITIAL),
        picture(),
        region(),
        2,
        3,
        draw,
    )
    images = sample(sampler, image=picture(), mask=region(), resample=(2, 3), seeds=[5, 6])
    assert float((images - expected).abs().max()) <= CHAIN


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 1.0, "resample": (2, 4)},
        {"steps": 5, "spacing": "trailing"},
        {"strength": 0.5},
    ],
    ids=["ddpm", "ddim", "ddim, jumps", "ends above 0", "with SDEdit"],
)
def test_the_known_region_comes_back_exactly(sampler, options):
    images = sample(sampler, image=picture(), mask=region(), seeds=[1, 2], **options)
    assert torch.equal(images[region()], picture()[region()])
    assert float((images - picture())[~region()].abs().max()) > 0.1


def test_the_known_region_comes_back_exactly_where_the_chain_ends_in_noise(toy):
    """DDIM that does not set alpha to one leaves a little noise in what is painted, as there; not in what is known."""
    _, network = toy
    rules = {"clip": "none", "sampler": "ddim", "set_alpha_to_one": False}
    sampler = ddpm.Sampler.from_module(network, torch.linspace(1e-2, 0.02, 1000), SHAPE, **rules)
    images = sample(sampler, image=picture(), mask=region(), seeds=[1, 2])
    assert torch.equal(images[region()], picture()[region()])


def test_the_known_region_is_seen_by_the_network(sampler):
    """Another known image changes what is painted beside it."""
    one, other = (sample(sampler, image=picture(2, s), mask=region(), seeds=[1, 2]) for s in (3, 9))
    assert float((one - other)[~region()].abs().max()) > 0.01


def test_one_picture_and_one_mask_serve_all_images(sampler):
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    images = sample(sampler, 3, image=picture(1), mask=mask, seeds=[1, 2, 3])
    assert torch.equal(images[..., :4], picture(1)[..., :4].expand(3, -1, -1, -1))
    whole = mask.bool().expand(3, *SHAPE)
    assert torch.equal(images, sample(sampler, 3, image=picture(1).expand(3, -1, -1, -1), mask=whole, seeds=[1, 2, 3]))


# --- SDEdit ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    network = GaussianToy(torch.cumprod(1 - betas, 0), 0.3, 0.25).eval()
    return ddpm.Sampler.from_module(network, betas, SHAPE, clip="none"), network


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("steps", [20, 50])
def test_sdedit_of_a_gaussian_has_a_closed_form(toy, strength, steps):
    sampler, network = toy
    z = torch.randn(2, *SHAPE, generator=generator())
    chain = sampler.plan(1, steps=steps, sampler="ddim").table.timesteps.tolist()
    expected = sdedit_closed_form(network, network.alphas_cumprod, chain, picture(), strength, z)
    images = sample(sampler, image=picture(), strength=strength, noise=z, sampler="ddim", steps=steps)
    assert float((images - expected).abs().max()) <= CHAIN


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_sdedit_with_a_generator(sampler, eta):
    """A random network, without the checkpoint's clip, which SDEdit has not."""
    checkpoint, chain = sampler.checkpoint, list(range(90, 0, -10))
    own = ddpm.Sampler.from_module(Plain(checkpoint.network), checkpoint.schedule, SHAPE, clip="none")
    ours, theirs = generator(), generator()
    expected = sdedit(
        checkpoint.network,
        alphas_cumprod(sampler),
        chain,
        picture(),
        0.5,
        lambda kind: torch.randn(2, *SHAPE, generator=theirs),
        eta,
    )
    options = {"timesteps": chain, "steps": None, "sampler": "ddim", "eta": eta, "generator": ours}
    images = sample(own, image=picture(), strength=0.5, **options)
    assert float((images - expected).abs().max()) <= CHAIN * max(1.0, float(expected.abs().max()))


class Plain(torch.nn.Module):
    """Another class, so that the sampler takes the network as somebody's own."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, x, t):
        return self.network(x, t)


def test_sdedit_starts_from_the_noised_image(sampler):
    """x_0 previews and timesteps: the last steps of the same chain; the start is Philox's own stream."""
    seen = []
    sample(sampler, image=picture(), strength=0.5, seeds=[5, 6], callback=lambda i, t, x_0: seen.append(t))
    whole = sampler.plan(1, steps=12).table.timesteps.tolist()
    assert seen == whole[6:]
    a = alphas_cumprod(sampler)[seen[0]]
    x = (a.sqrt() * picture() + (1 - a).sqrt() * philox_normal(torch.tensor([5, 6]), SHAPE, 0, PURPOSE_IMG2IMG)).float()
    expected = sample(sampler, noise=x, timesteps=seen, steps=None, seeds=[5, 6])
    images = sample(sampler, image=picture(), strength=0.5, seeds=[5, 6])
    assert float((images - expected).abs().max()) <= 1e-5


def test_a_weaker_edit_stays_closer_to_the_image(toy):
    sampler, _ = toy
    distances = [
        float((sample(sampler, image=picture(), strength=s, seeds=[1, 2], steps=50) - picture()).abs().mean())
        for s in (0.05, 0.3, 0.9)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.2 * distances[2]


# --- classifier-free guidance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("scale", [0.0, 2.5, -1.0])
def test_guidance_equals_two_separate_forwards(tmp_path, variance, scale):
    sampler = load(tmp_path, CLASSES, variance_type=variance)
    checkpoint, labels, source = sampler.checkpoint, torch.tensor([0, 3]), generator()
    expected = sample_reference(
        lambda x, t: guided(checkpoint.network, x, t, labels, 4, scale),
        checkpoint.schedule,
        checkpoint.rules,
        sampler.plan(1, steps=12, labels=0).table.timesteps.tolist(),
        torch.randn(2, *SHAPE, generator=source),
        lambda i: torch.randn(2, *SHAPE, generator=source),
    )
    images = sample(sampler, labels=[0, 3], guidance_scale=scale, null_label=4, generator=generator())
    assert float((images - expected).abs().max()) <= CHAIN


def test_guidance_of_a_network_that_enlarges_images():
    """Both halves of the batch see the small image."""
    config = UNetConfig(
        block_out_channels=(8, 16), down_attention=(False, True), up_attention=(True, False), layers_per_block=1,
        norm_num_groups=4, mid_norm_num_groups=4, sample_size=(8, 8), in_channels=6, condition_channels=3,
        class_embedding="table", num_class_embeds=5,
    )  # fmt: skip
    network, rules = redraw(UNet(config)).eval().requires_grad_(False), SamplingRules()
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-3, 0.05, 100))
    checkpoint = Checkpoint("guided-diffusion", "x", network, schedule, rules, (8, 8), "truncate", Report())
    sampler, source = ddpm.Sampler(checkpoint, device="cpu", compile=False), generator()
    labels, low_res = torch.tensor([0, 3]), picture()[..., ::2, ::2]
    enlarged = torch.nn.functional.interpolate(low_res, (8, 8), mode="bilinear")
    expected = sample_reference(
        lambda x, t: guided(lambda x, t, y: network(x, t, y, enlarged), x, t, labels, 4, 2.5),
        schedule,
        rules,
        sampler.plan(1, steps=12, labels=0, low_res=low_res[:1]).table.timesteps.tolist(),
        torch.randn(2, *SHAPE, generator=source),
        lambda i: torch.randn(2, *SHAPE, generator=source),
    )
    options = {"labels": labels, "low_res": low_res, "guidance_scale": 2.5, "null_label": 4}
    assert float((sample(sampler, generator=generator(), **options) - expected).abs().max()) <= CHAIN


def test_every_image_may_have_a_null_class_of_its_own(tmp_path):
    sampler = load(tmp_path, CLASSES)
    options = {"labels": 1, "guidance_scale": 2.5}
    together = sample(sampler, null_label=[4, 0], seeds=[1, 2], **options)
    alone = [sample(sampler, 1, null_label=null, seeds=[seed], **options) for null, seed in ((4, 1), (0, 2))]
    assert float((together - torch.cat(alone)).abs().max()) <= CHAIN
    assert float((together - sample(sampler, null_label=4, seeds=[1, 2], **options))[1].abs().max()) > 0.01


def test_guided_runs_count_twice_in_the_automatic_batch(tmp_path, monkeypatch):
    sampler = load(tmp_path, CLASSES)
    monkeypatch.setattr("ddpm.sampler.available_memory", lambda device: int(8.4 * sampler._bytes_per_image() / 0.7))
    assert sampler.plan(8, labels=1).batch_size == 8
    assert sampler.plan(8, labels=1, guidance_scale=2, null_label=4).batch_size == 4


def test_the_tables_of_longer_walks_are_shared(sampler):
    """Capacities grow by doubling, so that a captured step serves chains of about the same length."""
    for passes in (20, 21, 22):
        sample(sampler, image=picture(), mask=region(), resample=(passes, 1), seeds=[1, 2])
    assert {loop.shape.capacity for loop in sampler.loops if loop.shape.inpaint and loop.shape.capacity > 200} == {400}


def test_a_scale_of_one_is_plain_conditional_sampling(tmp_path):
    sampler = load(tmp_path, CLASSES)
    plain = sample(sampler, labels=1, seeds=[1, 2])
    assert torch.equal(sample(sampler, labels=1, guidance_scale=1, null_label=4, seeds=[1, 2]), plain)
    assert not torch.equal(sample(sampler, labels=1, guidance_scale=1.5, null_label=4, seeds=[1, 2]), plain)


def test_guidance_and_inpainting_together_do_not_depend_on_the_batch(tmp_path):
    sampler = load(tmp_path, CLASSES)
    options = {
        "labels": [0, 1, 2], "guidance_scale": 3.0, "null_label": 4, "image": picture(3), "mask": region(3),
        "resample": (2, 3), "seeds": [1, 2, 3],
    }  # fmt: skip
    together = sample(sampler, 3, **options)
    assert torch.equal(together[region(3)], picture(3)[region(3)])
    for batch_size in (1, 2):
        assert float((sample(sampler, 3, batch_size=batch_size, **options) - together).abs().max()) <= CHAIN


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_a_conditioned_step_compiles_as_one_graph(tmp_path):
    eager = load(tmp_path, CLASSES)
    compiled = ddpm.load(tmp_path, device="cpu", compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {
        "labels": [0, 1], "guidance_scale": 3.0, "null_label": 4, "image": picture(), "mask": region(), "seeds": [1, 2],
        "steps": 4,
    }  # fmt: skip
    assert float((sample(compiled, **options) - sample(eager, **options)).abs().max()) <= CHAIN
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- refusals --------------------------------------------------------------------------------------------------------

IMAGE, MASK = picture(), region()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": IMAGE}, "image needs mask= .* or strength="),
        ({"mask": MASK}, "mask was given without image="),
        ({"strength": 0.5}, "strength was given without image="),
        ({"image": IMAGE, "strength": 0.5, "resample": 3}, "resample belongs to inpainting"),
        ({"image": IMAGE, "strength": 0}, "strength must be a number above 0"),
        ({"image": IMAGE, "strength": 1.5}, "strength must be a number above 0 .* at most 1; got 1.5"),
        ({"image": IMAGE, "strength": "half"}, "strength must be a number"),
        ({"image": IMAGE, "strength": 0.01}, "strength=0.01 leaves none of the chain's 12 steps"),
        ({"image": IMAGE * 255, "strength": 0.5}, r"image holds values outside \[-1, 1\]"),
        ({"image": IMAGE.byte(), "strength": 0.5}, "image must be a floating-point tensor"),
        ({"image": IMAGE[:, :1], "strength": 0.5}, r"image has shape \[2, 1, 8, 8\]; expected \[2 or 1, 3, 8, 8\]"),
        ({"image": IMAGE[..., :4], "mask": MASK}, r"image has shape \[2, 3, 8, 4\]"),
        (
            {"image": IMAGE, "mask": MASK[..., :4]},
            r"mask has shape \[2, 3, 8, 4\]; expected \[8, 8\] or \[2 or 1, 3 or 1",
        ),
        ({"image": IMAGE, "mask": MASK * 0.5}, "mask must hold nothing but 0 .* and 1"),
        ({"image": IMAGE, "mask": [[1]]}, "mask must be a tensor"),
        ({"image": IMAGE, "mask": MASK, "resample": 0}, "resample must be a number of passes"),
        ({"image": IMAGE, "mask": MASK, "resample": (2, 3, 4)}, "resample must be a number of passes"),
        ({"image": IMAGE, "mask": MASK, "resample": True}, "resample must be a number of passes"),
        ({"image": IMAGE, "mask": MASK, "resample": (2, 12)}, "a chain of 12 steps is too short to jump back by 12"),
        ({"guidance_scale": 2.0, "null_label": 0}, "guidance_scale was given, but this checkpoint is not class-cond"),
        ({"null_label": 0}, "null_label was given, but this checkpoint is not class-conditional"),
        ({"image": IMAGE, "mask": MASK.to(torch.complex64)}, "mask must be a tensor"),
    ],
)
def test_what_is_refused(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sample(sampler, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale needs null_label="),
        ({"null_label": 4}, "null_label belongs to classifier-free guidance"),
        ({"guidance_scale": "two", "null_label": 4}, "guidance_scale must be a finite number"),
        ({"guidance_scale": 10**400, "null_label": 4}, "guidance_scale must be a finite number"),
        ({"guidance_scale": 1e39, "null_label": 4}, "guidance_scale must be a finite number"),
        ({"guidance_scale": 2.0, "null_label": 5}, "null_label must be integers from 0 to 4"),
        ({"guidance_scale": float("nan"), "null_label": 4}, "guidance_scale must be a finite number"),
        ({"labels": 7, "guidance_scale": 2.0, "null_label": 4}, "labels must be integers from 0 to 4"),
    ],
)
def test_what_guidance_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sample(load(tmp_path, CLASSES), **({"labels": 1} | options))
