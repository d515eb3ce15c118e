"""The lucidrains reference network against the published versions of denoising-diffusion-pytorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm.checkpoints.lucidrains_keys import Numerics, modern_keys, numerics, standardized
from ddpm.lucidrains import LucidrainsConfig, LucidrainsUNet
from tests.helpers import relative_difference
from tests.originals.lucidrains import original
from tests.tolerances import FORWARD
from tests.weights import redraw

TIMESTEPS = torch.tensor([0, 37, 999])

CURRENT = "2.3.4"
WITH_OPTIONS = (CURRENT, "1.11.1", "1.9.6", "1.8.15")  # of attention
OLD = ("1.7.7", "1.7.1", "1.6.4", "0.32.0")
# What the version itself says about its networks. (norm, attention_norm, memory_key_values, value_scale_by_pixels)
SETTINGS = {
    CURRENT: ("rms", "rms", 4, False),
    "1.11.1": ("group", "rms", 4, False),
    "1.9.6": ("group", "rms", 4, False),
    "1.8.15": ("group", "rms", 0, False),
    "1.7.7": ("group", "rms", 0, False),
    "1.7.1": ("group", "rms", 0, True),
    "1.6.4": ("group", "layer", 0, True),
    "0.32.0": ("group", "layer", 0, True),
}
# Arguments of the original's Unet.
EVERYWHERE: dict[str, dict[str, Any]] = {
    "tiny": {},
    "self-condition": {"self_condition": True},
    "learned variance": {"learned_variance": True},
    "one channel": {"channels": 1},
    "one channel, self-condition": {"channels": 1, "self_condition": True},
    "three levels": {"dim_mults": (2, 1, 3)},
    "one level": {"dim_mults": (1,)},
}
OF_ATTENTION: dict[str, dict[str, Any]] = {
    "full attention above": {"full_attn": (True, False)},
    "full attention everywhere": {"full_attn": (True, True)},
    "no full attention": {"full_attn": (False, False)},
    "heads": {"attn_heads": 2, "attn_dim_head": 8},
    "heads of each level": {"attn_heads": (2, 3), "attn_dim_head": (8, 12)},
    "theta": {"sinusoidal_pos_emb_theta": 100},
    "flash": {"flash_attn": True},
}
OF_CURRENT: dict[str, dict[str, Any]] = {"init_dim": {"init_dim": 20}}
OF_GROUPS: dict[str, dict[str, Any]] = {"groups": {"resnet_block_groups": 4}}

CASES = [
    pytest.param(version, options, id=f"{version}, {name}")
    for version in SETTINGS
    for name, options in (
        EVERYWHERE
        | (OF_ATTENTION if version in WITH_OPTIONS else {})
        | (OF_CURRENT if version == CURRENT else OF_GROUPS)
    ).items()
]


def config_of(version: str, options: dict[str, Any]) -> LucidrainsConfig:
    """Our configuration for the original's arguments, dim 16 and dim_mults (1, 2) unless they say otherwise."""
    mults = options.get("dim_mults", (1, 2))
    full_attention = (*(False,) * (len(mults) - 1), version in WITH_OPTIONS)
    heads, dim_head = options.get("attn_heads", 4), options.get("attn_dim_head", 32)
    norm, attention_norm, memory_key_values, value_scale_by_pixels = SETTINGS[version]
    channels = options.get("channels", 3)
    return LucidrainsConfig(
        dim=options.get("dim", 16),
        dim_mults=mults,
        full_attention=options.get("full_attn", full_attention),
        init_dim=options.get("init_dim"),
        channels=channels,
        out_channels=channels * (2 if options.get("learned_variance") else 1),
        self_condition=options.get("self_condition", False),
        norm=norm,
        norm_groups=options.get("resnet_block_groups", 8),
        attention_norm=attention_norm,
        attention_heads=heads if isinstance(heads, tuple) else (heads,) * len(mults),
        attention_dim_head=dim_head if isinstance(dim_head, tuple) else (dim_head,) * len(mults),
        memory_key_values=memory_key_values,
        value_scale_by_pixels=value_scale_by_pixels,
        sinusoid_theta=options.get("sinusoidal_pos_emb_theta", 10000),
    )


def spread(network: nn.Module) -> None:
    """Move the filters that some versions standardize off their mean, with variances on both sides of its eps, 1e-5."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith("proj.weight"):
                p.add_(0.5 * p.std()).mul_(torch.logspace(-2.5, 0, len(p)).view(-1, 1, 1, 1))


def both(version: str, options: dict[str, Any]) -> tuple[nn.Module, LucidrainsUNet]:
    """(the original, ours with its weights)."""
    config = config_of(version, options)
    arguments = {"dim": config.dim, "dim_mults": config.dim_mults} | options
    if version == "1.8.15":  # whose default is for four levels
        arguments["full_attn"] = config.full_attention
    theirs = redraw(original(version).Unet(**arguments)).eval()
    if version in OLD:
        spread(theirs)
    ours = LucidrainsUNet(config).eval()
    ours.load_state_dict(modern_keys(theirs.state_dict(), version))
    return theirs, ours


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.originals
@pytest.mark.parametrize(("version", "options"), CASES)
def test_output_equals_the_original(version, options):
    theirs, ours = both(version, options)
    x = noise(3, ours.config.channels, 12, 8)
    kept = x.clone()
    expected = theirs(x, TIMESTEPS)
    assert expected.shape[1] == ours.config.out_channels
    assert relative_difference(ours(x, TIMESTEPS), expected) <= FORWARD
    assert relative_difference(ours(x[:1], 0), expected[:1]) <= FORWARD
    assert relative_difference(ours(x[2:], torch.tensor(999)), expected[2:]) <= FORWARD
    if ours.config.self_condition:
        condition = noise(*x.shape, seed=6).clamp(-1, 1)
        expected = theirs(x, TIMESTEPS, condition)
        assert relative_difference(ours(x, TIMESTEPS, condition=condition), expected) <= FORWARD
    assert torch.equal(x, kept)


@torch.no_grad()
@pytest.mark.originals
def test_the_real_size():
    theirs, ours = both(CURRENT, {"dim": 64, "dim_mults": (1, 2, 4, 8)})
    assert sum(p.numel() for p in ours.parameters()) == 35_711_491
    x = noise(1, 3, 64, 64)
    for t in (0, 999):
        assert relative_difference(ours(x, t), theirs(x, torch.tensor([t]))) <= FORWARD


@torch.no_grad()
@pytest.mark.originals
@pytest.mark.parametrize("version", SETTINGS)
def test_the_time_embedding_equals_the_original(version):
    theirs, ours = both(version, {})
    timesteps = torch.arange(1000)
    assert relative_difference(ours.embed_time(timesteps), theirs.time_mlp(timesteps)) <= FORWARD


TINY = LucidrainsConfig(dim=16, dim_mults=(1, 2), full_attention=(False, True))


def test_the_tests_can_see_what_shapes_do_not_tell():
    """These must change the output by far more than the bound, or testing them is vain."""
    x = noise(3, 3, 12, 8)
    base = LucidrainsConfig(dim=16, dim_mults=(1, 2), full_attention=(False, True), norm="group", memory_key_values=0)
    changes: list[dict[str, Any]] = [
        {"norm_groups": 4},
        {"attention_norm": "layer"},
        {"value_scale_by_pixels": True},
        {"sinusoid_theta": 100},
        {"attention_heads": (8, 8), "attention_dim_head": (16, 16)},
    ]
    network = redraw(LucidrainsUNet(base))
    with torch.no_grad():
        expected = network(x, TIMESTEPS)
        for change in changes:
            other = LucidrainsUNet(LucidrainsConfig(**(vars(base) | change)))
            other.load_state_dict(network.state_dict())
            assert relative_difference(other(x, TIMESTEPS), expected) > 20 * FORWARD, change


def test_the_tests_can_see_how_weights_are_standardized():
    x = noise(3, 3, 12, 8)
    base = LucidrainsConfig(dim=16, dim_mults=(1, 2), full_attention=(False, False), norm="group", memory_key_values=0)
    network = redraw(LucidrainsUNet(base))
    spread(network)
    old = {key: value.clone() for key, value in old_keys(network.state_dict()).items()}
    outputs = []
    with torch.no_grad():
        for version in ("1.7.0", "1.7.1", "1.7.7"):
            network.load_state_dict(modern_keys(old, version))
            outputs.append(network(x, TIMESTEPS))
    for i in range(3):
        assert relative_difference(outputs[i], outputs[i - 1]) > 20 * FORWARD


def old_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as before 1.8, where an attention was wrapped twice."""
    result = {}
    for key, value in state.items():
        parts = key.split(".")
        depth = 1 if parts[0] == "mid_attn" else 3 if parts[0] in ("downs", "ups") and parts[2] == "2" else 0
        if depth:
            parts[depth:depth] = ["fn"] if parts[depth] == "norm" else ["fn", "fn"]
        result[".".join(parts)] = value
    return result


def test_old_names_become_todays():
    state = LucidrainsUNet(LucidrainsConfig(**(vars(TINY) | {"memory_key_values": 0}))).state_dict()
    old = old_keys(state)
    assert "downs.0.2.fn.fn.to_out.1.g" in old
    assert "mid_attn.fn.norm.g" in old
    renamed = modern_keys(old, "1.7.7")
    assert list(renamed) == list(state)
    assert all(renamed[k] is state[k] for k in state)
    folded = modern_keys(old, "1.6.4")
    changed = {k for k in state if folded[k] is not state[k]}
    assert changed == {k for k in state if k.endswith(("block1.proj.weight", "block2.proj.weight"))}
    assert modern_keys(state, None) is state
    with pytest.raises(ValueError, match="does not say which wrote it; give its version"):
        modern_keys(old, None)
    with pytest.raises(ValueError, match="version 'latest' of denoising-diffusion-pytorch is not a number"):
        modern_keys(old, "latest")
    with pytest.raises(
        ValueError, match=r"but the version is 2\.3\.4, where only its guided_diffusion module has them"
    ):
        modern_keys(old, "2.3.4")


EARLY = Numerics("eps", "layer", True)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.32.0", EARLY),
        ("1.16.6", EARLY),  # November 2022
        ("0.1.0a", EARLY),  # December 2022
        ("0.2.2a", EARLY),
        ("1.0.0", EARLY),
        ("1.6.4", EARLY),
        ("1.7.0", Numerics("eps", "rms", True)),
        ("1.7.1", Numerics("clamp", "rms", True)),
        ("1.7.2", Numerics(None, "rms", True)),
        ("1.7.3", Numerics(None, "rms", True)),
        ("1.7.4", Numerics(None, "rms", False)),
        ("1.7.7", Numerics(None, "rms", False)),
    ],
)
def test_what_a_version_computes(version, expected):
    assert numerics(version) == expected


def test_standardized_filters():
    weight = (3 + 0.5 * noise(4, 8, 3, 3)).half()
    for kind in ("eps", "clamp"):
        result = standardized(weight, kind)
        assert result.dtype == torch.float32
        var, mean = torch.var_mean(result, dim=(1, 2, 3), unbiased=False)
        torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(var, torch.ones(4), rtol=1e-3, atol=0)
    constant = torch.full((1, 2, 3, 3), 0.7)
    assert standardized(constant, "clamp").abs().max() < 1e-3


@torch.no_grad()
def test_none_for_a_condition_is_zeros():
    network = redraw(LucidrainsUNet(LucidrainsConfig(**(vars(TINY) | {"self_condition": True}))))
    x = noise(2, 3, 8, 8)
    assert torch.equal(network(x, 5), network(x, 5, condition=torch.zeros_like(x)))
    assert relative_difference(network(x, 5, condition=noise(2, 3, 8, 8, seed=6)), network(x, 5)) > 20 * FORWARD
    assert network.condition_channels == 3


def test_what_the_network_has_no_use_for_is_refused():
    network = LucidrainsUNet(TINY)
    x = noise(2, 3, 8, 8)
    with pytest.raises(ValueError, match="labels are needed by a class-conditional network, and only there"):
        network(x, 5, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="a condition is of use to a network with self-conditioning, and only there"):
        network(x, 5, condition=x)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"full_attention": (True,)}, "full_attention has 1 entries for 2 levels"),
        ({"attention_heads": (4,)}, "attention_heads has 1 entries for 2 levels"),
        ({"dim": 15}, "dim=15 is not an even number of 4 or more"),
        ({"norm": "layer"}, "norm 'layer' is not one of rms, group"),
        ({"attention_norm": "group"}, "attention_norm 'group' is not one of rms, layer"),
        ({"norm": "group", "init_dim": 20}, "norm_groups=8 does not divide a level of 20 channels"),
    ],
)
def test_configurations_that_describe_no_network(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        LucidrainsConfig(**(vars(TINY) | changes))


def test_the_resolution_divisor():
    assert LucidrainsConfig(dim=16, dim_mults=(1, 2, 4, 8), full_attention=(False,) * 4).resolution_divisor == 8
