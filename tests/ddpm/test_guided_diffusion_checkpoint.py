"""Checkpoints of guided-diffusion and improved-diffusion against an independent implementation of the originals.

`tests/originals/guided_diffusion.py` was written from the documented facts, not from this project's code. Where
diffusers can express a network, `test_unet.py` covers the same graph against it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ddpm
from ddpm.checkpoints import load_checkpoint
from ddpm.checkpoints.guided_diffusion import PUBLISHED
from tests.helpers import assert_same_output
from tests.originals import guided_diffusion as original
from tests.tolerances import CHAIN
from tests.weights import redraw

TINY: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_ds": (2,),
    "num_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "improved": {},
    "guided": {"resblock_updown": True, "learn_sigma": True},
    "new attention order": {"use_new_attention_order": True},
    "head channels": {"num_heads": -1, "num_head_channels": 16, "use_new_attention_order": True},
    "no scale and shift": {"use_scale_shift_norm": False},
    "classes": {"num_classes": 7, "resblock_updown": True, "learn_sigma": True},
    "super-resolution": {"in_channels": 6, "num_classes": 5},
    "attention everywhere": {"attention_ds": (1, 2), "num_res_blocks": 2},
    "no attention on a level": {"attention_ds": ()},
    "half width first": {"channel_mult": (0.5, 1, 2), "num_channels": 64, "resblock_updown": True},
}
CHAIN_FLAGS = {"noise_schedule": "linear", "diffusion_steps": 100, "rescale_timesteps": False}


def saved(directory: Path, changes: dict[str, Any], name: str = "ema_0.9999_000100.pt") -> tuple[torch.nn.Module, Path]:
    """(the original network with visible weights, the file that its training would have saved)."""
    network = redraw(original.UNetModel(**(TINY | changes))).eval().requires_grad_(False)
    torch.save(network.state_dict(), directory / name)
    return network, directory / name


def flags(changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What the file does not say."""
    model = TINY | changes
    heads = {"num_head_channels": model["num_head_channels"]} if "num_head_channels" in changes else {}
    return {
        "image_size": model["image_size"],
        "use_new_attention_order": model.get("use_new_attention_order", False),
        **(heads or {"num_heads": model["num_heads"]}),
        **CHAIN_FLAGS,
        **more,
    }


def inputs(changes: dict[str, Any], n: int, size: int) -> dict[str, Tensor]:
    """The original's model_kwargs."""
    g = torch.Generator().manual_seed(3)
    model = TINY | changes
    kwargs: dict[str, Tensor] = {}
    if model.get("num_classes"):
        kwargs["y"] = torch.randint(0, model["num_classes"], (n,), generator=g)
    if model.get("in_channels") == 6:
        kwargs["low_res"] = torch.rand(n, 3, size // 2, size // 2, generator=g) * 2 - 1
    return kwargs


def assert_forward(network: torch.nn.Module, path: Path, changes: dict[str, Any], size: int, **options: Any) -> None:
    ours = load_checkpoint(path, **options).network
    kwargs = inputs(changes, 2, size)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    condition = None
    if "low_res" in kwargs:
        condition = torch.nn.functional.interpolate(kwargs["low_res"], (size, size), mode="bilinear")
    with torch.no_grad():
        for t in (0.0, 37.0, 999.75):
            expected = network(x, torch.full((2,), t), **kwargs)
            assert_same_output(ours, x, t, expected, kwargs.get("y"), condition)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_forward(tmp_path, changes):
    network, path = saved(tmp_path, changes)
    assert_forward(network, path, changes, 8, **flags(changes))


CHAINS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # model, flags of the diffusion, arguments of sample
    "all steps": ({}, {}, {}),
    "ten": ({}, {}, {"steps": "10"}),
    "an integer": ({}, {}, {"steps": 10}),
    "sections": ({}, {}, {"steps": "6,3,2"}),
    "one step more than none": ({}, {}, {"steps": "2"}),
    "cosine": ({}, {"noise_schedule": "cosine"}, {"steps": "12"}),
    "T 4000, rescaled": ({}, {"diffusion_steps": 4000, "rescale_timesteps": True, "noise_schedule": "cosine"},
                         {"steps": "8"}),
    "sigma_small": ({}, {"sigma_small": True}, {"steps": "10"}),
    "predict_xstart": ({}, {"predict_xstart": True}, {"steps": "10"}),
    "no clip": ({}, {"clip_denoised": False, "predict_xstart": True}, {"steps": "10"}),
    "learned range": (MODELS["guided"], {}, {"steps": "10"}),
    "classes": (MODELS["classes"], {}, {"steps": "10"}),
    "super-resolution": (MODELS["super-resolution"], {}, {"steps": "5"}),
    "ddim": ({}, {}, {"steps": "ddim20", "sampler": "ddim"}),
    "ddim, an integer": ({}, {}, {"steps": 20, "sampler": "ddim"}),
    "ddim, all steps": ({}, {}, {"steps": "", "sampler": "ddim"}),
    "ddim, eta": ({}, {}, {"steps": "ddim10", "sampler": "ddim", "eta": 0.7}),
    "ddim, all steps, eta": ({}, {}, {"sampler": "ddim", "eta": 1.0}),
    "ddim, learned range, classes": (MODELS["classes"], {}, {"steps": "ddim10", "sampler": "ddim", "eta": 0.3}),
    "ddim, predict_xstart": ({}, {"predict_xstart": True}, {"steps": "ddim10", "sampler": "ddim"}),
}  # fmt: skip


def original_images(
    network: torch.nn.Module, model: dict[str, Any], diffusion: dict[str, Any], arguments: dict[str, Any], size: int,
    noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    settings = CHAIN_FLAGS | diffusion
    steps = arguments.get("steps", "")
    if isinstance(steps, int):
        steps = f"ddim{steps}" if arguments.get("sampler") == "ddim" else str(steps)
    chain = original.Diffusion(
        settings["diffusion_steps"],
        settings["noise_schedule"],
        steps,
        learn_sigma=(TINY | model).get("learn_sigma", False),
        rescale_timesteps=settings["rescale_timesteps"],
        **{k: settings[k] for k in ("sigma_small", "predict_xstart") if k in settings},
    )
    options = {"clip_denoised": settings.get("clip_denoised", True), "noise": noise}
    loop = chain.p_sample_loop
    if arguments.get("sampler") == "ddim":
        loop, options["eta"] = chain.ddim_sample_loop, arguments.get("eta", 0.0)
    return loop(network, (2, 3, size, size), model_kwargs=inputs(model, 2, size), **options)


@pytest.mark.parametrize(("model", "diffusion", "arguments"), CHAINS.values(), ids=CHAINS.keys())
def test_a_chain(tmp_path, model, diffusion, arguments):
    network, path = saved(tmp_path, model)
    torch.manual_seed(11)
    expected = original_images(network, model, diffusion, arguments, 8)
    assert expected.isfinite().all()
    after = torch.randn(3)  # where the original leaves its stream
    sampler = ddpm.load(path, device="cpu", compile=False, **flags(model, **diffusion))
    generator = torch.Generator().manual_seed(11)
    kwargs = inputs(model, 2, 8)
    images = sampler.sample(
        2, generator=generator, labels=kwargs.get("y"), low_res=kwargs.get("low_res"), progress=False, **arguments
    )
    assert float((images - expected).abs().max()) <= CHAIN
    assert torch.equal(torch.randn(3, generator=generator), after)


def test_given_noise_means_no_initial_draw(tmp_path):
    network, path = saved(tmp_path, {})
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(11)
    expected = original_images(network, {}, {}, {"steps": "5"}, 8, noise)
    sampler = ddpm.load(path, device="cpu", compile=False, **flags({}))
    images = sampler.sample(2, steps="5", noise=noise, generator=torch.Generator().manual_seed(11), progress=False)
    assert float((images - expected).abs().max()) <= CHAIN


def test_every_published_file_is_recognised_by_its_parameters(tmp_path):
    """All settings that are not in the file, for every row of the table."""
    for name, published in original.PUBLISHED.items():
        with torch.device("meta"):
            network = original.UNetModel(**published.model)
        assert sum(p.numel() for p in network.parameters()) == published.parameters
        names, settings = PUBLISHED[published.parameters]
        assert any(name.replace("_vlb", "").startswith(n) for n in names.split(", ")), name
        assert settings["image_size"] == published.model["image_size"]
        assert settings["diffusion_steps"] == published.diffusion["steps"]
        assert settings["noise_schedule"] == published.diffusion["noise_schedule"]
        assert settings["rescale_timesteps"] == published.diffusion["rescale_timesteps"]
        assert settings["use_new_attention_order"] == published.model.get("use_new_attention_order", False)
        if published.model.get("num_head_channels", -1) != -1:
            assert settings["num_head_channels"] == published.model["num_head_channels"]
        else:
            assert settings["num_heads"] == published.model.get("num_heads", 4)
            assert settings.get("num_head_channels", -1) == -1
    assert len({p.parameters for p in original.PUBLISHED.values()}) == len(PUBLISHED)


REAL = {
    "cifar10_uncond_50M_500K": 32,
    "ffhq_10m": 64,
    "64x64_diffusion": 64,
    "128x128_diffusion": 32,
    "512x512_diffusion": 64,
    "64_256_upsampler": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_size(tmp_path, name):
    """Published widths and depth, random weights; images are smaller where the original's would take minutes."""
    published = original.PUBLISHED[name]
    network = redraw(original.UNetModel(**published.model)).eval().requires_grad_(False)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    assert_forward(network, tmp_path / "model.pt", published.model, REAL[name])


@pytest.mark.slow
def test_a_short_chain_at_real_size(tmp_path):
    published = original.PUBLISHED["cifar10_uncond_50M_500K"]
    network = redraw(original.UNetModel(**published.model)).eval().requires_grad_(False)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    chain = original.Diffusion(respacing_string="6", **published.diffusion)
    torch.manual_seed(2)
    expected = chain.p_sample_loop(network, (2, 3, 32, 32))
    sampler = ddpm.load(tmp_path / "model.pt", device="cpu", compile=False)
    images = sampler.sample(2, steps="6", generator=torch.Generator().manual_seed(2), progress=False)
    assert float((images - expected).abs().max()) <= CHAIN


def test_what_the_file_does_not_say_is_asked_for(tmp_path):
    _, path = saved(tmp_path, {})
    with pytest.raises(
        ValueError,
        match="does not say image_size, noise_schedule, diffusion_steps, rescale_timesteps, use_new_attention_order, "
        "num_heads or num_head_channels; pass them with the values of the training command",
    ):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"num_res_blocks": 2}, "has num_res_blocks=1, but num_res_blocks=2 was given"),
        ({"learn_sigma": True}, "has learn_sigma=False, but learn_sigma=True was given"),
        ({"channel_mult": (1, 1)}, "has channel_mult="),
        ({"num_heads": 5}, "num_heads=5 does not divide an attention of 64 channels"),
        ({"noise_schedule": "sqrt"}, "noise_schedule 'sqrt' is not one of linear, cosine"),
        ({"num_heads": "4"}, "num_heads='4' does not divide"),
        ({"rescale_timesteps": "no"}, "rescale_timesteps must be True or False; got 'no'"),
        ({"use_new_attention_order": "legacy"}, "use_new_attention_order must be True or False"),
        ({"predict_xstart": 1}, "predict_xstart must be True or False; got 1"),
        ({"channel_mult": 1}, "has channel_mult="),
        ({"path": "x"}, "unknown option path"),
        ({"image_size": 9}, "image_size=9 must be a multiple of 2"),
        ({"image_size": "8"}, "image_size must be a positive integer"),
        ({"heads": 4}, "unknown option heads; a guided-diffusion checkpoint takes channel_mult, class_cond"),
        ({"variant": "fp16"}, "unknown option variant"),
        ({"ema": True}, "holds one set of weights, so ema= has nothing to choose"),
    ],
)
def test_wrong_flags_are_refused_by_name(tmp_path, option, sentence):
    _, path = saved(tmp_path, {})
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(path, **(flags({}) | option))


def test_missing_and_extra_keys(tmp_path):
    network, path = saved(tmp_path, {})
    state = network.state_dict()
    torch.save({k: v for k, v in state.items() if k != "middle_block.1.proj_out.bias"}, path)
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ keys, first mid_block\.attentions\.0\.to_out\.0\.bias"):
        load_checkpoint(path, **flags({}))
    torch.save(state | {"extra.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"has unknown 1 of \d+ keys, first extra\.weight"):
        load_checkpoint(path, **flags({}))


def test_a_classifier_and_an_optimizer_are_named(tmp_path):
    network, path = saved(tmp_path, {})
    torch.save({"input_blocks.0.0.weight": torch.zeros(32, 3, 3, 3), "out.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is a classifier or a part of a network"):
        load_checkpoint(path)
    torch.save(torch.optim.SGD(network.parameters(), 0.1, momentum=0.9).state_dict(), tmp_path / "opt000100.pt")
    with pytest.raises(ValueError, match="holds an optimizer's state, not weights"):
        load_checkpoint(tmp_path / "opt000100.pt")


def test_raw_weights_beside_averaged_ones_are_noticed(tmp_path):
    saved(tmp_path, {})
    _, raw = saved(tmp_path, {}, "model000100.pt")
    with pytest.warns(UserWarning, match=r"model000100\.pt holds raw weights; .* ema_0\.9999_000100\.pt, draw better"):
        load_checkpoint(raw, **flags({}))


def test_labels(tmp_path):
    _, path = saved(tmp_path, MODELS["classes"])
    sampler = ddpm.load(path, device="cpu", compile=False, **flags(MODELS["classes"]))

    def draw(labels: Any, n: int = 2, **options: Any) -> Tensor:
        return sampler.sample(n, seeds=range(n), steps="3", labels=labels, progress=False, **options)

    assert torch.equal(draw(3), draw([3, 3]))
    assert not torch.equal(draw(3), draw([3, 4]))
    assert torch.equal(draw([3, 4, 5], 3, batch_size=3)[:2], draw(torch.tensor([3, 4])))
    assert float((draw([3, 4, 5], 3, batch_size=2) - draw([3, 4, 5], 3)).abs().max()) <= 1e-5
    for labels, sentence in [
        (None, "is class-conditional; pass labels=, one class from 0 to 6 per image"),
        (7, "labels must be integers from 0 to 6, the checkpoint's classes; got 7"),
        ([-1, 0], "labels must be integers from 0 to 6"),
        ([0.5, 1], "labels must be integers from 0 to 6"),
        ([1, 2, 3], r"labels has shape \[3\] for n=2 images"),
        ("cat", "labels must be a number or a sequence of 2 numbers; got 'cat'"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            draw(labels)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_label_path_and_the_conditioning_image_compile_as_one_graph(tmp_path):
    model = MODELS["super-resolution"]
    _, path = saved(tmp_path, model)
    kwargs = inputs(model, 2, 8)
    images = [
        ddpm.load(path, device="cpu", compile=compiled, **flags(model)).sample(
            2, seeds=[0, 1], steps="3", labels=kwargs["y"], low_res=kwargs["low_res"], progress=False
        )
        for compiled in (True, False)
    ]
    assert float((images[0] - images[1]).abs().max()) <= CHAIN


def test_low_res(tmp_path):
    _, path = saved(tmp_path, {"in_channels": 6})
    sampler = ddpm.load(path, device="cpu", compile=False, **flags({"in_channels": 6}))
    assert sampler.image_shape == (3, 8, 8)
    for low_res, sentence in [
        (None, r"this checkpoint enlarges images; pass low_res=, float \[2, 3, h, w\]"),
        (torch.zeros(2, 1, 4, 4), r"low_res has shape \[2, 1, 4, 4\]; expected \[2 or 1, 3, h, w\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "low_res must be a floating-point tensor"),
        (torch.full((1, 3, 4, 4), 255.0), r"low_res holds values outside \[-1, 1\]"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            sampler.sample(2, steps="3", low_res=low_res, progress=False)


def test_channel_mult_may_be_given_as_the_original_writes_it(tmp_path):
    _, path = saved(tmp_path, {})
    for given in ("1,2", (1, 2), [1.0, 2.0]):
        assert load_checkpoint(path, **flags({}), channel_mult=given).network.config.block_out_channels == (32, 64)


@pytest.mark.parametrize(
    "key",
    ["input_blocks.1.0.out_layers.3.weight", "input_blocks.1.0.emb_layers.1.weight", "time_embed.0.weight",
     "time_embed.2.weight"],
)  # fmt: skip
def test_keys_that_the_architecture_is_read_from(tmp_path, key):
    network, path = saved(tmp_path, {})
    torch.save({k: v for k, v in network.state_dict().items() if k != key}, path)
    with pytest.raises(ValueError, match=f"lacks {key}; it is not a complete network"):
        load_checkpoint(path, **flags({}))


def test_attention_only_in_the_middle_is_checked_too(tmp_path):
    _, path = saved(tmp_path, {"attention_ds": ()})
    with pytest.raises(ValueError, match="num_heads=5 does not divide an attention of 64 channels"):
        load_checkpoint(path, **flags({}, num_heads=5))


def test_a_state_dict_inside_something_else(tmp_path):
    network, path = saved(tmp_path, {})
    for content in ({"model": network.state_dict(), "optimizer": {}}, {"model": network.state_dict(), "ema": {}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"holds dict with keys model, .*save the entry by itself"):
            load_checkpoint(path, **flags({}))


@pytest.mark.parametrize(
    "content", [b"hello world", b"<!DOCTYPE html>", b"version https://git-lfs", b".", b"\x80\x02.", b""]
)
def test_bytes_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt is not a complete file of torch\.save"):
        load_checkpoint(tmp_path / "model.pt")
