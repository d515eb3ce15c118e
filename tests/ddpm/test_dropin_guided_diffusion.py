"""guided-diffusion's interface over our sampler, against an independent implementation of the original.

`tests/originals/guided_diffusion.py` is the judge: same images, and the global generator left in the same state.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm
from ddpm.dropins.guided_diffusion import GaussianDiffusion
from ddpm.kernels.reverse_step import COLUMNS
from tests.ddpm.test_guided_diffusion_checkpoint import CHAIN_FLAGS, MODELS, TINY, flags, inputs, saved
from tests.ddpm.test_lucidrains_checkpoint import diffusion_state
from tests.ddpm.test_lucidrains_checkpoint import network as lucidrains_network
from tests.helpers import relative_difference, save_tiny, tiny_pipeline
from tests.originals import guided_diffusion as original
from tests.tolerances import CHAIN, FORWARD

SHAPE = (2, 3, 8, 8)
SLOWER = "sampling step by step in plain PyTorch, slower than the captured loop, for "


def judge(model: dict[str, Any], diffusion: dict[str, Any], respacing: str) -> original.Diffusion:
    settings = CHAIN_FLAGS | diffusion
    return original.Diffusion(
        settings["diffusion_steps"],
        settings["noise_schedule"],
        respacing,
        learn_sigma=(TINY | model).get("learn_sigma", False),
        rescale_timesteps=settings["rescale_timesteps"],
        **{k: settings[k] for k in ("sigma_small", "predict_xstart") if k in settings},
    )


def pair(
    tmp_path: Path, model: dict[str, Any] | None = None, respacing: str = "6", **diffusion: Any
) -> tuple[nn.Module, original.Diffusion, GaussianDiffusion]:
    """(the original network, the original's chain, ours)."""
    model = model or {}
    network, path = saved(tmp_path, model)
    sampler = ddpm.load(path, device="cpu", compile=False, **flags(model, **diffusion))
    return network, judge(model, diffusion, respacing), GaussianDiffusion(sampler, respacing)


def seeded(draw: Callable[[], Any]) -> tuple[Any, Tensor]:
    """(what it gives, what the global generator gives after it)."""
    torch.manual_seed(11)
    return draw(), torch.randn(3)


def assert_same(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> Tensor:
    images, after = seeded(ours)
    expected, expected_after = seeded(theirs)
    assert expected.isfinite().all()
    assert images.dtype == torch.float32
    assert float((images - expected).abs().max()) <= CHAIN
    assert torch.equal(after, expected_after)
    return images


class Classifier(nn.Module):
    """Of 5 classes, by x and t; gradients are made as classifier_sample.py makes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.conv(x) * (1 + t.float()[:, None, None, None] / 100))
        return self.out(h.mean(dim=(2, 3)))

    def gradient(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert not torch.is_grad_enabled()
        y = torch.tensor([1, 2]) if y is None else y
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            chosen = self(x_in, t).log_softmax(dim=-1)[range(len(x)), y]
            return torch.autograd.grad(chosen.sum(), x_in)[0] * 10.0


CHAINS: dict[str, tuple[dict[str, Any], dict[str, Any], str, dict[str, Any]]] = {
    # model, flags of the diffusion, respacing, arguments of the method (eta: DDIM)
    "fixed_large": ({}, {}, "6", {}),
    "fixed_small": ({}, {"sigma_small": True}, "6", {}),
    "learned range": (MODELS["guided"], {}, "6", {}),
    "predict_xstart": ({}, {"predict_xstart": True}, "6", {}),
    "all steps": ({}, {"diffusion_steps": 25}, "", {}),
    "sections": ({}, {}, "3,2,2", {}),
    "cosine, rescaled": ({}, {"diffusion_steps": 4000, "rescale_timesteps": True, "noise_schedule": "cosine"}, "6", {}),
    "no clip": ({}, {"predict_xstart": True}, "6", {"clip_denoised": False}),
    "no clip, small": ({}, {"predict_xstart": True, "sigma_small": True}, "6", {"clip_denoised": False}),
    "classes": (MODELS["classes"], {}, "6", {}),
    "super-resolution": (MODELS["super-resolution"], {}, "6", {}),
    "ddim": ({}, {}, "ddim10", {"eta": 0.0}),
    "ddim, eta": ({}, {}, "6", {"eta": 0.7}),
    "ddim, eta 1, learned range, classes": (MODELS["classes"], {}, "ddim5", {"eta": 1.0}),
    "ddim, predict_xstart, no clip": ({}, {"predict_xstart": True}, "6", {"eta": 0.5, "clip_denoised": False}),
    "ddim, super-resolution": (MODELS["super-resolution"], {}, "6", {"eta": 0.0}),
}  # fmt: skip


def loops(chain: original.Diffusion, ours: GaussianDiffusion, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The methods that `arguments` belong to: (ours, the original's)."""
    name = "ddim_sample_loop" if "eta" in arguments else "p_sample_loop"
    return getattr(ours, name), getattr(chain, name)


@pytest.mark.parametrize(("model", "diffusion", "respacing", "arguments"), CHAINS.values(), ids=CHAINS.keys())
def test_captured(tmp_path, model, diffusion, respacing, arguments):
    network, chain, ours = pair(tmp_path, model, respacing, **diffusion)
    assert ours.timestep_map == chain.timesteps
    assert ours.num_timesteps == len(chain.timesteps)
    kwargs = inputs(model, 2, 8)
    draw, draw_original = loops(chain, ours, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(
            lambda: draw(ours.model, SHAPE, model_kwargs=kwargs, **arguments),
            lambda: draw_original(network, SHAPE, model_kwargs=kwargs, **arguments),
        )


HOOKED = ("denoised_fn", "cond_fn", "both", "model", "model and cond_fn", "a cond_fn that draws")


@pytest.mark.parametrize("hooks", HOOKED)
@pytest.mark.parametrize("arguments", [{}, {"eta": 0.6}], ids=["p_sample", "ddim"])
@pytest.mark.parametrize("model", ["improved", "classes", "super-resolution"])
def test_step_by_step(tmp_path, model, arguments, hooks):
    network, chain, ours = pair(tmp_path, MODELS[model])
    kwargs, classifier = inputs(MODELS[model], 2, 8), Classifier()
    given: dict[str, Any] = {}
    if hooks in ("denoised_fn", "both"):
        given["denoised_fn"] = lambda x_0: 1.5 * x_0.tanh() + 0.1
    if hooks not in ("denoised_fn", "model"):

        def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
            scale = torch.rand(()) if hooks == "a cond_fn that draws" else 1.0
            return scale * classifier.gradient(x, t, None if y is None else y % 5)

        given["cond_fn"] = cond_fn
    other = hooks.startswith("model")

    def around(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return (lambda x, t, **kwargs: 0.9 * network(x, t, **kwargs)) if other else network

    draw, draw_original = loops(chain, ours, arguments)
    names = [name for name in ("denoised_fn", "cond_fn") if name in given] + other * ["a model that"]
    with pytest.warns(UserWarning, match=SLOWER + ", ".join(names)) as caught:
        assert_same(
            lambda: draw(around(ours.model), SHAPE, model_kwargs=kwargs, **given, **arguments),
            lambda: draw_original(around(network), SHAPE, model_kwargs=kwargs, **given, **arguments),
        )
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize(
    ("model", "diffusion", "moves"),
    [({}, {}, True), ({}, {"sigma_small": True}, False), (MODELS["guided"], {}, True)],
    ids=["fixed_large", "fixed_small", "learned range"],
)
def test_the_last_step_of_classifier_guidance(tmp_path, model, diffusion, moves):
    """It has no noise, but the variance of the step before, except where the variance is the small one: that is 0."""
    network, chain, ours = pair(tmp_path, model, "5", **diffusion)
    classifier = Classifier()

    def only_last(x: Tensor, t: Tensor) -> Tensor:
        return 100 * classifier.gradient(x, t) * (t == 0)[:, None, None, None]

    with pytest.warns(UserWarning, match=SLOWER):
        guided = assert_same(
            lambda: ours.p_sample_loop(ours.model, SHAPE, cond_fn=only_last),
            lambda: chain.p_sample_loop(network, SHAPE, cond_fn=only_last),
        )
    plain, _ = seeded(lambda: ours.p_sample_loop(ours.model, SHAPE))
    assert (float((guided - plain).abs().max()) > 1e-3) == moves


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"eta": 0.6}], ids=["p_sample", "ddim"])
def test_hooks_without_clip_and_by_x_0(tmp_path, arguments, clip):
    network, chain, ours = pair(tmp_path, {"learn_sigma": True}, predict_xstart=True)
    draw, draw_original = loops(chain, ours, arguments)
    given = {"cond_fn": Classifier().gradient, "clip_denoised": clip, **arguments}
    with pytest.warns(UserWarning, match=SLOWER):
        assert_same(lambda: draw(ours.model, SHAPE, **given), lambda: draw_original(network, SHAPE, **given))


def test_hooks_that_change_nothing_give_the_captured_images(tmp_path):
    _, _, ours = pair(tmp_path, MODELS["classes"])
    kwargs = inputs(MODELS["classes"], 2, 8)
    captured, _ = seeded(lambda: ours.p_sample_loop(None, SHAPE, model_kwargs=kwargs))
    with pytest.warns(UserWarning, match=SLOWER):
        by_hand, _ = seeded(lambda: ours.p_sample_loop(None, SHAPE, model_kwargs=kwargs, denoised_fn=lambda x_0: x_0))
    assert float((by_hand - captured).abs().max()) <= CHAIN


def test_classifier_sample(tmp_path):
    """As scripts/classifier_sample.py calls it: closures, the device, labels that an unconditional network ignores."""
    network, chain, ours = pair(tmp_path)
    classifier, model = Classifier(), ours.model
    model.to(torch.device("cpu"))
    model.eval()

    def closure(of: Any) -> Callable[..., Tensor]:
        def model_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            assert y is not None
            return of(x, t, None)

        return model_fn

    kwargs = {"y": torch.tensor([0, 3])}
    with pytest.warns(UserWarning, match=SLOWER + "cond_fn, a model that is not diffusion.model"):
        assert_same(
            lambda: ours.p_sample_loop(
                closure(model),
                SHAPE,
                clip_denoised=True,
                model_kwargs=kwargs,
                cond_fn=classifier.gradient,
                device="cpu",
            ),
            lambda: chain.p_sample_loop(closure(network), SHAPE, model_kwargs=kwargs, cond_fn=classifier.gradient),
        )


def test_noise_is_x_T(tmp_path):
    network, chain, ours = pair(tmp_path)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    kept = noise.clone()
    assert_same(
        lambda: ours.p_sample_loop(ours.model, SHAPE, noise), lambda: chain.p_sample_loop(network, SHAPE, noise)
    )
    with pytest.warns(UserWarning, match=SLOWER):
        assert_same(
            lambda: ours.ddim_sample_loop(ours.model, SHAPE, noise, denoised_fn=torch.tanh),
            lambda: chain.ddim_sample_loop(network, SHAPE, noise, denoised_fn=torch.tanh),
        )
    assert torch.equal(noise, kept)


@pytest.mark.filterwarnings("ignore:sampling step by step")
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"eta": 0.6}], ids=["p_sample", "ddim"])
def test_progressive(tmp_path, arguments, hooked):
    network, chain, ours = pair(tmp_path, MODELS["guided"])
    given = {"cond_fn": Classifier().gradient} if hooked else {}
    walk, steps = (
        (ours.ddim_sample_loop_progressive, chain.ddim_sample_steps)
        if arguments
        else (ours.p_sample_loop_progressive, chain.p_sample_steps)
    )
    expected, _ = seeded(lambda: list(steps(network, SHAPE, **given, **arguments)))
    found, _ = seeded(lambda: list(walk(ours.model, SHAPE, **given, **arguments)))
    assert len(found) == len(expected) == 6
    for step, (x, x_0), magnified in zip(found, expected, chain.x0_of_x[::-1], strict=True):
        assert step.keys() == {"sample", "pred_xstart"}
        assert float((step["sample"] - x).abs().max()) <= CHAIN
        # The first x_0s are the network's output, and its rounding, times 150.
        assert float((step["pred_xstart"] - x_0).abs().max()) <= max(CHAIN, FORWARD * magnified)
    draw, _ = loops(chain, ours, arguments)
    images, _ = seeded(lambda: draw(ours.model, SHAPE, **given, **arguments))
    assert torch.equal(images, found[-1]["sample"])


def paint(step: dict[str, Tensor]) -> None:
    step["sample"][:, :, :4] = 0.5


def exchange(step: dict[str, Tensor]) -> None:
    step["sample"] = step["sample"] * 0.9


@pytest.mark.filterwarnings("ignore:sampling step by step")
@pytest.mark.parametrize("edit", [paint, exchange])
@pytest.mark.parametrize("hooks", [{}, {"denoised_fn": torch.tanh}], ids=["captured", "by hand"])
def test_what_stands_under_sample_is_what_the_next_step_starts_from(tmp_path, edit, hooks):
    """Inpainting by hand: the original's loop goes on with out["sample"]."""
    network, chain, ours = pair(tmp_path)

    def edited() -> Tensor:
        for step in ours.p_sample_loop_progressive(ours.model, SHAPE, **hooks):
            edit(step)
        return step["sample"]

    def original_loop() -> Tensor:
        x = torch.randn(SHAPE)
        for i in reversed(range(len(chain.timesteps))):
            x_0, log_variance, _ = chain._network(network, x, i, {}, True, hooks.get("denoised_fn"))
            z = torch.randn(SHAPE)
            mean = chain._at(chain.mean_of_x0, i) * x_0 + chain._at(chain.mean_of_x, i) * x
            out = {"sample": mean + torch.exp(0.5 * log_variance) * z if i > 0 else mean}
            edit(out)
            x = out["sample"]
        return x

    with torch.no_grad():
        assert_same(edited, original_loop)


def test_a_sample_of_another_shape_is_refused(tmp_path):
    _, _, ours = pair(tmp_path)
    steps = ours.p_sample_loop_progressive(ours.model, SHAPE)
    next(steps)["sample"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"sample was replaced by \[1\]; expected \[2, 3, 8, 8\]"):
        next(steps)


@pytest.mark.filterwarnings("ignore:sampling step by step")
@pytest.mark.parametrize("name", ["denoised_fn", "cond_fn"])
@pytest.mark.parametrize(("returned", "found"), [(lambda x: x[:, :1], r"\[2, 1, 8, 8\]"), (lambda x: None, "NoneType")])
def test_what_a_hook_returns(tmp_path, name, returned, found):
    _, _, ours = pair(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} returned {found}; expected \[2, 3, 8, 8\]"):
        ours.p_sample_loop(ours.model, SHAPE, **{name: lambda x, *_: returned(x)})


def test_our_model_in_a_wrapper_is_our_model(tmp_path):
    """DataParallel's attribute: no warning, which the captured loop would not give either."""
    _, _, ours = pair(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, _ = seeded(lambda: ours.p_sample_loop(torch.nn.DataParallel(ours.model), SHAPE))
    assert torch.equal(images, seeded(lambda: ours.p_sample_loop(ours.model, SHAPE))[0])


@pytest.mark.filterwarnings("ignore:sampling step by step")
@pytest.mark.parametrize("hooks", [{}, {"denoised_fn": torch.tanh}], ids=["captured", "by hand"])
def test_a_generator_that_is_left_early(tmp_path, hooks):
    _, _, ours = pair(tmp_path)
    expected, _ = seeded(lambda: ours.p_sample_loop(ours.model, SHAPE))
    for closes in (True, False):
        steps = ours.p_sample_loop_progressive(ours.model, SHAPE, **hooks)
        for step, _ in zip(steps, range(2), strict=False):
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()  # the original leaves gradients off for its caller
            assert step["sample"].shape == SHAPE
        if closes:
            steps.close()
        again, _ = seeded(lambda: ours.p_sample_loop(ours.model, SHAPE))
        assert torch.equal(again, expected)


def test_two_chains_at_once_are_refused(tmp_path):
    _, _, ours = pair(tmp_path)
    first, second = (ours.p_sample_loop_progressive(ours.model, SHAPE) for _ in range(2))
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="another chain was begun on this sampler"):
        next(first)


def test_nothing_is_drawn_before_the_first_step(tmp_path):
    _, _, ours = pair(tmp_path)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    steps = ours.p_sample_loop_progressive(ours.model, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    next(steps)
    assert not torch.equal(torch.get_rng_state(), state)


def test_the_sampler_stays_as_it_was_and_shares_its_loops(tmp_path):
    _, path = saved(tmp_path, {})
    sampler = ddpm.load(path, device="cpu", compile=False, **flags({}))
    rules, expected = sampler.checkpoint.rules, sampler.sample(2, steps="6", seeds=[0, 1], progress=False)
    ours = GaussianDiffusion(sampler, "6")
    first, _ = seeded(lambda: ours.p_sample_loop(ours.model, SHAPE))
    count = len(sampler.loops)
    second, _ = seeded(lambda: GaussianDiffusion(sampler, "6").p_sample_loop(None, SHAPE))
    assert torch.equal(first, second)
    assert len(sampler.loops) == count
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(sampler.sample(2, steps="6", generator=generator, progress=False), first)
    assert len(sampler.loops) == count  # one more shape than before the drop-in: noise from a generator
    assert sampler.checkpoint.rules is rules
    assert torch.equal(sampler.sample(2, steps="6", seeds=[0, 1], progress=False), expected)


@pytest.mark.parametrize(
    ("variance", "flag"),
    [("fixed_small", {"sigma_small": True}), ("fixed_large", {}), ("learned_range", {"learn_sigma": True})],
)
@pytest.mark.parametrize("arguments", [{}, {"eta": 0.5}], ids=["p_sample", "ddim"])
def test_a_network_of_diffusers(tmp_path, variance, flag, arguments):
    """Whatever its scheduler says of clip, spacing and steps; the betas are what T = 1000 makes them in both."""
    settings = {"num_train_timesteps": 1000, "variance_type": variance, "timestep_spacing": "trailing"}
    pipe = tiny_pipeline(**settings, clip_sample=False)
    sampler = ddpm.load(save_tiny(tmp_path, **settings, clip_sample=False), device="cpu", compile=False)
    chain = original.Diffusion(1000, "linear", "6", **flag)
    ours = GaussianDiffusion(sampler, "6")
    draw, draw_original = loops(chain, ours, arguments)
    assert_same(
        lambda: draw(ours.model, SHAPE, **arguments),
        lambda: draw_original(lambda x, t: pipe.unet(x, t).sample, SHAPE, **arguments),
    )


def test_a_schedule_that_ends_in_pure_noise(tmp_path):
    path = save_tiny(tmp_path, rescale_betas_zero_snr=True)
    sampler = ddpm.load(path, device="cpu", compile=False)
    with pytest.raises(ValueError, match="ends at 0, by which guided-diffusion divides; pass a timestep_respacing"):
        GaussianDiffusion(sampler)
    ours = GaussianDiffusion(sampler, "ddim50")
    assert ours.timestep_map == list(range(0, 100, 2))
    assert ours.p_sample_loop(ours.model, SHAPE).isfinite().all()


@pytest.mark.parametrize("name", ["improved", "guided", "classes", "super-resolution"])
def test_the_model(tmp_path, name):
    network, _, ours = pair(tmp_path, MODELS[name])
    model, kwargs = ours.model, inputs(MODELS[name], 2, 8)
    assert isinstance(model, nn.Module)
    assert not model.training
    assert next(model.parameters()).device == torch.device("cpu")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    for t in ([50, 50], [99, 3], [12.5, 0.0]):
        out = model(x, torch.tensor(t), **kwargs)
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        with torch.no_grad():
            assert relative_difference(out, network(x, torch.tensor(t), **kwargs)) <= FORWARD


def test_the_model_stays_where_and_as_it_is(tmp_path):
    _, path = saved(tmp_path, {})
    model = GaussianDiffusion(ddpm.load(path, device="cpu", compile=False, **flags({}))).model
    x, t = torch.zeros(SHAPE), torch.zeros(2, dtype=torch.int64)
    before = model(x, t)
    for call in (lambda: model.to("cpu"), lambda: model.to(torch.float32), lambda: model.float(), lambda: model.cpu()):
        assert call() is model
    assert torch.equal(model(x, t), before)
    moved = r"diffusion\.model stays on cpu in fp32; pass device= and dtype= to ddpm\.load instead of moving it"
    for call, sentence in [
        (lambda: model.half(), moved),
        (lambda: model.to("meta"), moved),
        (lambda: model.to(torch.bfloat16), moved),
        (lambda: model.convert_to_fp16(), r"runs in fp32; pass dtype='fp16' to ddpm\.load instead of calling conv"),
        (lambda: model.load_state_dict({}), r"has its weights already; pass the file to ddpm\.load"),
        (lambda: model(x.clone().requires_grad_(), t), r"x wants a gradient, .*pass x\.detach\(\), or differentiate"),
        (lambda: model(x[0], t), r"x has shape \[3, 8, 8\]; expected \[N, 3, 8, 8\]"),
        (lambda: model(x, t[:1]), r"timesteps has shape \[1\]; expected \[2\], one per image"),
        (lambda: model(x, t, y=t), "y were given, but this checkpoint is not class-conditional"),
        (lambda: model(x, t, z=1), "takes y and low_res, but 'z' was given; leave it out"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
    half = GaussianDiffusion(ddpm.load(path, device="cpu", compile=False, dtype="fp16", **flags({}))).model
    half.convert_to_fp16()
    assert half(x, t).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"shape": (2, 3, 16, 16)}, r"shape is \(2, 3, 16, 16\); expected \(N, 3, 8, 8\), N of the checkpoint"),
        ({"shape": (3, 8, 8)}, r"shape is \(3, 8, 8\); expected"),
        ({"shape": 4}, "shape is 4; expected"),
        ({"shape": (0, 3, 8, 8)}, "the batch size must be a positive integer; got 0"),
        ({"noise": torch.zeros(1, 3, 8, 8)}, r"noise is torch.float32 \[1, 3, 8, 8\]; expected x_T"),
        ({"noise": 3}, "noise is int; expected x_T"),
        ({"noise": torch.zeros(2, 3, 8, 8, dtype=torch.complex64)}, r"noise is torch.complex64 \[2, 3, 8, 8\]"),
        ({"progress": "no"}, "progress must be True or False"),
        ({"model_kwargs": {"n": 1}}, "'n' was given; leave it out"),
        ({"model_kwargs": {"self": 1}}, "'self' was given; leave it out"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"device": "nowhere"}, "device 'nowhere' is not one of"),
        ({"model_kwargs": [1]}, "model_kwargs must be a dict; got list"),
        ({"model_kwargs": {"z": 1}}, "takes y and low_res, but 'z' was given; leave it out"),
        ({"model_kwargs": {"y": torch.zeros(2)}}, "y were given, but this checkpoint is not class-conditional"),
        ({"model_kwargs": {"low_res": torch.zeros(SHAPE)}}, "low_res was given, but this checkpoint is no super-res"),
        ({"model": 5}, "model must be callable; got int"),
        ({"cond_fn": 5}, "cond_fn must be callable; got int"),
        ({"denoised_fn": "x"}, "denoised_fn must be callable; got str"),
        ({"clip_denoised": "no"}, "clip_denoised must be True or False; got 'no'"),
        ({"eta": 2.0}, "eta must be a number from 0"),
        ({"eta": 2.0, "denoised_fn": torch.tanh}, "eta must be a number from 0"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:sampling step by step")
def test_refusals(tmp_path, arguments, sentence):
    _, _, ours = pair(tmp_path)
    given = {"model": ours.model, "shape": SHAPE} | arguments
    methods = [ours.ddim_sample_loop, ours.ddim_sample_loop_progressive]
    if "eta" not in arguments:
        methods += [ours.p_sample_loop, ours.p_sample_loop_progressive]
    state = torch.get_rng_state()
    for method in methods:
        with pytest.raises(ValueError, match=sentence):
            method(**given)
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_and_images_that_are_missing(tmp_path):
    _, _, ours = pair(tmp_path, MODELS["super-resolution"])
    kwargs = inputs(MODELS["super-resolution"], 2, 8)
    for given, sentence in [
        ({}, "this checkpoint is class-conditional; pass y=, one class from 0 to 4 per image"),
        (kwargs | {"y": torch.tensor([1, 7])}, "y must be integers from 0 to 4, the checkpoint's classes"),
        ({"y": kwargs["y"]}, "this checkpoint enlarges images; pass low_res="),
    ]:
        with pytest.raises(ValueError, match=sentence):
            ours.p_sample_loop(ours.model, SHAPE, model_kwargs=given)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        (lambda x: x[:, :1], r"model returned \[2, 1, 8, 8\]; expected \[2, 6, 8, 8\], whose second half is the varia"),
        (lambda x: None, r"model returned NoneType; expected \[2, 6, 8, 8\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:sampling step by step")
def test_what_a_model_returns(tmp_path, out, sentence):
    _, _, ours = pair(tmp_path, MODELS["guided"])
    with pytest.raises(ValueError, match=sentence):
        ours.p_sample_loop(lambda x, t: out(x), SHAPE)


@pytest.mark.filterwarnings("ignore:sampling step by step")
def test_a_model_that_returns_nan(tmp_path):
    _, _, ours = pair(tmp_path)
    calls = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        out = x.clone()
        out[1, 0, 0, 0] = float("nan") if len(calls) == 3 else 0.0
        return out

    with pytest.raises(ddpm.NonFiniteError, match=r"at step 2 \(timestep 59\) in image 1; the model") as caught:
        ours.ddim_sample_loop(model, SHAPE)
    assert (caught.value.step, caught.value.timestep, caught.value.image) == (2, 59, 1)


@pytest.mark.parametrize("respacing", [250, None, [10, 10]])
def test_a_respacing_is_text(tmp_path, respacing):
    _, path = saved(tmp_path, {})
    sampler = ddpm.load(path, device="cpu", compile=False, **flags({}))
    with pytest.raises(ValueError, match="timestep_respacing must be text, such as '250' or 'ddim50'"):
        GaussianDiffusion(sampler, respacing)
    with pytest.raises(ValueError, match="no integer stride takes 33 of 100 timesteps"):
        GaussianDiffusion(sampler, "ddim33")


def test_other_samplers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sampler must be what ddpm\.load gives; got str"):
        GaussianDiffusion("64x64_diffusion.pt")
    torch.save(diffusion_state(lucidrains_network()), tmp_path / "model.pt")
    sampler = ddpm.load(tmp_path / "model.pt", image_size=8, device="cpu", compile=False)
    with pytest.raises(
        ValueError,
        match=r"of family lucidrains, which guided-diffusion does not sample; use sampler\.sample\(\), or the",
    ):
        GaussianDiffusion(sampler)


@pytest.mark.parametrize("name", ["training_losses", "p_sample", "q_sample", "calc_bpd_loop", "betas"])
def test_what_there_is_not_says_what_there_is(tmp_path, name):
    _, _, ours = pair(tmp_path)
    with pytest.raises(
        AttributeError,
        match=f"{name} is not part of this drop-in, which has ddim_sample_loop, ddim_sample_loop_progressive, model, "
        "num_timesteps, p_sample_loop, p_sample_loop_progressive, timestep_map; for it use guided-diffusion itself",
    ):
        getattr(ours, name)
    assert not hasattr(ours, name)


def test_signatures_are_the_originals():
    shared = ["self", "model", "shape", "noise", "clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "device"]
    for name in ("p_sample_loop", "p_sample_loop_progressive"):
        signature = inspect.signature(getattr(GaussianDiffusion, name))
        assert list(signature.parameters) == [*shared, "progress"]
    for name in ("ddim_sample_loop", "ddim_sample_loop_progressive"):
        signature = inspect.signature(getattr(GaussianDiffusion, name))
        assert list(signature.parameters) == [*shared, "progress", "eta"]
        defaults = [p.default for p in signature.parameters.values()][3:]
        assert defaults == [None, True, None, None, None, None, False, 0.0]


def test_progress(tmp_path, capsys):
    _, _, ours = pair(tmp_path)
    ours.p_sample_loop(ours.model, SHAPE)
    assert capsys.readouterr().err == ""
    ours.p_sample_loop(ours.model, SHAPE, progress=True)
    assert "6/6" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=SLOWER):
        ours.ddim_sample_loop(ours.model, SHAPE, denoised_fn=torch.tanh, progress=True)
    assert "6/6" in capsys.readouterr().err


def test_the_variance_columns_of_the_last_step(tmp_path):
    """Of OpenAI's convention: log V of the step before; no step of a captured chain reads them there."""
    _, chain, ours = pair(tmp_path, MODELS["guided"], "5")
    run = ours._sampler.plan(1, steps="5", seeds=[0])
    low, high = (run.table.coefficients[:, COLUMNS.index(name)].double() for name in ("log_min", "log_max"))
    assert low.flip(0).tolist() == pytest.approx(chain.log_small.tolist(), rel=1e-6)
    assert high.flip(0).tolist() == pytest.approx(chain.log_beta.tolist(), rel=1e-6)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    _, path = saved(tmp_path, MODELS["super-resolution"])
    sampler = ddpm.load(path, device="cuda", compile=False, **flags(MODELS["super-resolution"]))
    ours = GaussianDiffusion(sampler, "6")
    assert ours.model.to(torch.device("cuda")) is ours.model
    with pytest.raises(ValueError, match="stays on cuda"):
        ours.model.cpu()
    kwargs = {name: value.cuda() for name, value in inputs(MODELS["super-resolution"], 2, 8).items()}
    for arguments in ({}, {"eta": 0.6}):
        draw = ours.ddim_sample_loop if arguments else ours.p_sample_loop
        results = []
        for model in (ours.model, lambda x, t, y, low_res: ours.model(x, t, y, low_res)):
            torch.manual_seed(11)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                images = draw(model, SHAPE, model_kwargs=kwargs, device="cuda", **arguments)
            assert images.device == sampler.device
            results.append((images, torch.randn(3, device="cuda")))
        (captured, after), (by_hand, after_by_hand) = results
        assert float((captured - by_hand).abs().max()) <= CHAIN
        assert torch.equal(after, after_by_hand)
