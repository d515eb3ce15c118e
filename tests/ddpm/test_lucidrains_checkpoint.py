"""Files of denoising-diffusion-pytorch: loaded, and sampled image for image as the package itself does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ddpm
from ddpm.checkpoints import load_checkpoint
from ddpm.lucidrains import LucidrainsConfig, LucidrainsUNet
from tests.helpers import assert_same_output
from tests.originals.lucidrains import original
from tests.tolerances import CHAIN
from tests.weights import redraw

VERSIONS = ("2.3.4", "1.11.1", "1.9.6", "1.8.15", "1.7.7", "1.7.1", "1.6.4", "0.32.0")
T = 50


def diffusion(version: str, unet: dict[str, Any], options: dict[str, Any], kind: str = "GaussianDiffusion") -> Any:
    """The package's own object, with visible weights."""
    package = original(version)
    if version == "1.8.15":  # its default is made for four levels
        unet = {"full_attn": (False, True)} | unet
    network = package.Unet(**({"dim": 16, "dim_mults": (1, 2)} | unet))
    redraw(network)
    with torch.no_grad():
        # Random weights of full size make a chain chaotic, the more so where x_0 is fed back: a rounding would grow to
        # a visible difference in either code.
        network.final_conv.weight *= 0.1
    # Linear: where alphas_cumprod nearly vanishes, 1 / sqrt(a) makes a rounding of the network a visible difference.
    options = {"image_size": 8, "timesteps": T, "objective": "pred_noise", "beta_schedule": "linear"} | options
    return getattr(package, kind)(network, **options).eval().requires_grad_(False)


def trainer_file(path: Path, averaged: Any, raw: Any, version: str | None) -> Path:
    """What the package's Trainer saves, its EMA wrapper included."""
    state = {f"ema_model.{k}": v for k, v in averaged.state_dict().items()}
    state |= {f"online_model.{k}": v for k, v in raw.state_dict().items()}
    state |= {"initted": torch.tensor(True), "step": torch.tensor(9)}
    content = {"step": 9, "model": raw.state_dict(), "opt": {}, "ema": state, "scaler": None}
    torch.save(content | ({"version": version} if version else {}), path)
    return path


CHAINS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all steps": ({}, {}),
    "ddim": ({}, {"sampling_timesteps": 6}),
    "ddim, eta": ({}, {"sampling_timesteps": 6, "ddim_sampling_eta": 0.7}),
    "pred_x0": ({}, {"objective": "pred_x0"}),
    "pred_x0, ddim": ({}, {"objective": "pred_x0", "sampling_timesteps": 6}),
    "self-condition": ({"self_condition": True}, {}),
    "self-condition, ddim": ({"self_condition": True}, {"sampling_timesteps": 6, "ddim_sampling_eta": 0.5}),
}
CASES = [
    pytest.param(version, unet, options, id=f"{version}, {name}")
    for version in VERSIONS
    for name, (unet, options) in CHAINS.items()
    if version in ("2.3.4", "1.6.4", "0.32.0") or name in ("all steps", "ddim")
]


@pytest.mark.originals
@pytest.mark.parametrize(("version", "unet", "options"), CASES)
def test_a_chain(tmp_path, version, unet, options):
    eta = {"ddim_sampling_eta": 0.0} if "sampling_timesteps" in options else {}
    theirs = diffusion(version, unet, eta | options)
    path = trainer_file(tmp_path / "model-1.pt", theirs, diffusion(version, unet, options), None)
    torch.manual_seed(3)
    expected = theirs.sample(batch_size=2) * 2 - 1  # the package gives [0, 1]
    after = torch.randn(3)
    old = version.startswith(("0.", "1.7.", "1.6."))
    given = {"objective": options.get("objective", "pred_noise")} if version == "0.32.0" else {}
    sampler = ddpm.load(
        path, device="cpu", compile=False, image_size=8, **given, **({"version": version} if old else {})
    )
    assert sampler.checkpoint.rules.prediction_type == ("sample" if options.get("objective") else "epsilon")
    generator = torch.Generator().manual_seed(3)
    images = sampler.sample(
        2,
        steps=options.get("sampling_timesteps"),
        eta=options.get("ddim_sampling_eta", 0.0) if eta else None,
        generator=generator,
        progress=False,
    )
    assert float((images - expected).abs().max()) <= CHAIN
    assert torch.equal(torch.randn(3, generator=generator), after)


@pytest.mark.originals
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_objective_and_schedule_are_read_from_the_buffers(tmp_path, objective, schedule):
    options = {"objective": objective, "beta_schedule": schedule, "timesteps": 1000}
    theirs = diffusion("2.3.4", {}, options)
    torch.save(theirs.state_dict(), tmp_path / "diffusion.pt")
    loaded = load_checkpoint(tmp_path / "diffusion.pt", image_size=8)
    assert loaded.rules.prediction_type == {"pred_noise": "epsilon", "pred_x0": "sample"}.get(objective, "v_prediction")
    bare = tmp_path / "unet.pt"
    torch.save(theirs.model.state_dict(), bare)
    given = {"objective": objective, "beta_schedule": schedule, "num_train_timesteps": 1000, "image_size": 8}
    other = load_checkpoint(bare, **given)
    for schedule_of in (loaded, other):
        torch.testing.assert_close(schedule_of.schedule.betas.float(), theirs.betas, rtol=5e-5, atol=1e-8)


@pytest.mark.originals
def test_a_learned_variance(tmp_path):
    theirs = diffusion("2.3.4", {"learned_variance": True}, {}, "LearnedGaussianDiffusion")
    torch.save(theirs.state_dict(), tmp_path / "diffusion.pt")
    torch.manual_seed(3)
    expected = theirs.sample(batch_size=2) * 2 - 1
    sampler = ddpm.load(tmp_path / "diffusion.pt", device="cpu", compile=False, image_size=8)
    images = sampler.sample(2, generator=torch.Generator().manual_seed(3), progress=False)
    assert float((images - expected).abs().max()) <= CHAIN


@pytest.mark.originals
def test_real_size(tmp_path):
    theirs = diffusion("2.3.4", {"dim": 64, "dim_mults": (1, 2, 4, 8)}, {"image_size": 64, "timesteps": 1000})
    assert sum(p.numel() for p in theirs.model.parameters()) == 35_711_491
    torch.save(theirs.state_dict(), tmp_path / "diffusion.pt")
    ours = load_checkpoint(tmp_path / "diffusion.pt", image_size=64).network
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for t in (0, 999):
            expected = theirs.model(x, torch.tensor([t]))
            assert_same_output(ours, x, t, expected)


# --- without the package ---------------------------------------------------------------------------------------------


def network(**changes: Any) -> LucidrainsUNet:
    base = {"dim": 16, "init_dim": 16, "dim_mults": (1, 2), "full_attention": (False, True)}
    config = LucidrainsConfig(**(base | changes))
    return redraw(LucidrainsUNet(config)).eval().requires_grad_(False)


def diffusion_state(unet: LucidrainsUNet, prefix: str = "model.") -> dict[str, Tensor]:
    betas = torch.linspace(1e-3, 0.2, 50)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    buffers = {"betas": betas, "alphas_cumprod": alphas_cumprod, "loss_weight": torch.ones(50)}
    return buffers | {f"{prefix}{k}": v for k, v in unet.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm": "group", "memory_key_values": 0}, {"norm": "group"}, {"self_condition": True}, {"init_dim": 24},
     {"full_attention": (True, True)}, {"dim_mults": (2, 1, 3), "full_attention": (False, False, True)},
     {"attention_heads": (2, 3), "attention_dim_head": (8, 12)}, {"channels": 1, "out_channels": 2}],
    ids=str,
)  # fmt: skip
def test_architecture_is_inferred_and_fusing_keeps_it(tmp_path, changes):
    theirs = network(**changes)
    torch.save(diffusion_state(theirs), tmp_path / "model.pt")
    checkpoint = load_checkpoint(tmp_path / "model.pt", image_size=8)
    assert checkpoint.network.config == theirs.config
    channels = theirs.config.channels
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    condition = x.flip(0) if theirs.self_condition else None
    with torch.no_grad():
        expected = theirs(x, 37, None, condition)
        assert_same_output(checkpoint.network, x, 37, expected, condition=condition)
    text = ddpm.load(tmp_path / "model.pt", image_size=8, device="cpu").explain()
    norm = "group_norm_silu" if theirs.config.norm == "group" else "rms_norm_silu"
    assert sum(line.startswith("downs.0.0.block1.norm") and norm in line for line in text.splitlines()) == 1
    assert sum("rms_norm_silu" in line for line in text.splitlines() if "attn.norm" in line) == 1


def test_averaged_weights_by_default(tmp_path):
    averaged, raw = network(), redraw(network(), seed=1)
    state = {f"ema_model.{k}": v for k, v in diffusion_state(averaged).items()} | {"step": torch.tensor(1)}
    path = tmp_path / "model-1.pt"
    torch.save({"step": 1, "model": diffusion_state(raw), "ema": state, "scaler": None, "version": "2.3.4"}, path)
    for ema, expected in ((None, averaged), (True, averaged), (False, raw)):
        options = {} if ema is None else {"ema": ema}
        loaded = load_checkpoint(path, image_size=8, **options)
        assert torch.equal(loaded.network.init_conv.weight, expected.init_conv.weight)
    for damaged in ({}, {"ema": {}}, {"ema": {"step": torch.tensor(1)}}):
        torch.save({"step": 1, "model": diffusion_state(raw)} | damaged, path)
        with pytest.raises(ValueError, match=r"has no 'ema' entry with the weights of a U-Net; .*pass ema=False"):
            load_checkpoint(path, image_size=8)
    wrapper = state | {f"online_model.{k}": v for k, v in diffusion_state(raw).items()}
    torch.save(dict(sorted(wrapper.items(), reverse=True)), path)
    for ema, expected in ((True, averaged), (False, raw)):
        loaded = load_checkpoint(path, image_size=8, ema=ema)
        assert torch.equal(loaded.network.init_conv.weight, expected.init_conv.weight)
    with pytest.raises(ValueError, match="ema must be True or False; got 'no'"):
        load_checkpoint(path, image_size=8, ema="no")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "does not say how large its images are; pass image_size="),
        ({"image_size": 7}, "image_size=7 must be a multiple of 2"),
        (
            {"image_size": 8, "objective": "pred_v"},
            "objective='pred_v' was given, but the loss_weight in .* pred_noise",
        ),
        ({"image_size": 8, "beta_schedule": "linear"}, "holds its own schedule of 50 betas; leave beta_schedule"),
        ({"image_size": "8x8"}, "image_size must be a positive integer; got '8x8'"),
        ({"image_size": 8, "version": 1.6}, r"version must be text, such as '1\.6\.4'; got 1\.6"),
        ({"image_size": 8, "version": "new"}, "version 'new' of denoising-diffusion-pytorch is not a number"),
        ({"image_size": 8, "attention_heads": "4"}, "attention_heads must be a positive integer"),
        ({"image_size": 8, "attention_heads": 2}, "has attentions of 4 heads, but attention_heads=2 was given"),
        ({"image_size": 8, "norm_groups": 0}, "norm_groups must be a positive integer"),
        ({"image_size": 8, "objective": "noise"}, "objective 'noise' is not one of pred_noise"),
        ({"image_size": 8, "dim": 16}, "unknown option dim; a lucidrains checkpoint takes attention_heads"),
    ],
)
def test_wrong_options(tmp_path, options, sentence):
    torch.save(diffusion_state(network()), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(tmp_path / "model.pt", **options)


def test_what_is_missing_is_asked_for(tmp_path):
    path = tmp_path / "model.pt"
    state = diffusion_state(network())
    torch.save({k: v for k, v in state.items() if k != "loss_weight"}, path)
    with pytest.raises(ValueError, match="does not say what its network predicts; pass objective="):
        load_checkpoint(path, image_size=8)
    torch.save(network().state_dict(), path)
    with pytest.raises(ValueError, match="holds a U-Net without its noise schedule; pass beta_schedule="):
        load_checkpoint(path, image_size=8)
    old = {k.replace("downs.0.2.", "downs.0.2.fn.fn."): v for k, v in state.items()}
    torch.save(old, path)
    with pytest.raises(ValueError, match=r"names of denoising-diffusion-pytorch 0\.32 to 1\.7\.7.* pass version="):
        load_checkpoint(path, image_size=8)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("model.classes_emb.weight", "is the classifier-free-guidance U-Net"),
        ("model.time_mlp.0.weights", "random or learned Fourier features"),
        ("model.downs.0.0.ds_conv.weight", "a version before 0.12"),
        ("model.extra.weight", "has unknown 1 of"),
    ],
)
def test_other_classes_are_refused_by_name(tmp_path, key, sentence):
    torch.save(diffusion_state(network()) | {key: torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(tmp_path / "model.pt", image_size=8)


@pytest.mark.parametrize("key", ["model.downs.1.2.to_qkv.weight", "model.downs.1.3.weight", "model.time_mlp.1.weight"])
def test_missing_keys_are_named(tmp_path, key):
    torch.save({k: v for k, v in diffusion_state(network()).items() if k != key}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"lacks {key.removeprefix('model.').removesuffix('.weight')}"):
        load_checkpoint(tmp_path / "model.pt", image_size=8)


def test_other_numbers_of_output_channels(tmp_path):
    torch.save(diffusion_state(network(out_channels=8)), tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"has 8 output channels for images of 3; .*WeightedObjectiveGaussianDiffusion"
    ):
        load_checkpoint(tmp_path / "model.pt", image_size=8)


def test_a_learned_variance_goes_with_the_noise(tmp_path):
    torch.save(diffusion_state(network(out_channels=6)), tmp_path / "model.pt")
    assert load_checkpoint(tmp_path / "model.pt", image_size=8).rules.prediction_type == "epsilon"
    with pytest.raises(ValueError, match="has a learned variance, which goes with pred_noise; got objective='pred_v'"):
        load_checkpoint(tmp_path / "model.pt", image_size=8, objective="pred_v")
