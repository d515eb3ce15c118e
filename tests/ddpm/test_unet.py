"""The reference U-Net and the fused network against diffusers' UNet2DModel, every option of its configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddpm.checkpoints import load_checkpoint
from ddpm.fused import FusedUNet
from ddpm.unet import UNet, UNetConfig
from tests.helpers import CIFAR, TINY, relative_difference, tiny_unet
from tests.tolerances import FORWARD

SMALL_CIFAR = CIFAR | {"block_out_channels": (32, 64, 64, 64), "sample_size": 16, "layers_per_block": 1}
RESNET_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
THREE_LEVELS = {
    "block_out_channels": (8, 12, 16),
    "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "like google/ddpm-cifar10-32": SMALL_CIFAR,
    "downsample_padding 0": {"downsample_padding": 0},
    "flip_sin_to_cos false": {"flip_sin_to_cos": False},
    "freq_shift 1": {"freq_shift": 1},
    "odd sinusoid": {"block_out_channels": (9, 18), "norm_num_groups": 3, "attention_head_dim": 9},
    "head_dim null": {"attention_head_dim": None},
    "head_dim 8": {"attention_head_dim": 8},
    "head_dim 4": {"attention_head_dim": 4},
    "head_dim that does not divide": {"attention_head_dim": 5},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift, mid norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "mid norm of other groups": {"attn_norm_num_groups": 2},
    "resnet blocks": RESNET_BLOCKS,
    "resnet blocks, scale_shift": RESNET_BLOCKS | {"resnet_time_scale_shift": "scale_shift"},
    "resnet by setting": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "setting without effect": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "three levels": THREE_LEVELS,
    "one level": {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "sample_size": 5,
    },
    "no mid block": {"mid_block_type": None},
    "no mid attention": {"add_attention": False},
    "mid_block_scale_factor": {"mid_block_scale_factor": 1.4},
    "center_input_sample": {"center_input_sample": True},
    "learned time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "fourier time": {"time_embedding_type": "fourier"},
    "swish": {"act_fn": "swish"},
    "mish": {"act_fn": "mish"},
    "gelu": {"act_fn": "gelu"},
    "relu": {"act_fn": "relu"},
    "gelu, scale_shift": {"act_fn": "gelu", "resnet_time_scale_shift": "scale_shift"},
    "time_embedding_dim": {"time_embedding_dim": 20},
    "not square": {"sample_size": (6, 10)},
    "norm_eps": {"norm_eps": 1e-2},
    "six outputs": {"out_channels": 6},
    "one channel": {"in_channels": 1, "out_channels": 1},
    "three layers": {"layers_per_block": 3},
}
CLASSES: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "table": ({"num_class_embeds": 7}, torch.tensor([3, 0, 6])),
    "timestep": ({"class_embed_type": "timestep"}, torch.tensor([3.0, 0.0, 61.0])),
    "identity": ({"class_embed_type": "identity"}, torch.linspace(-1, 1, 96).view(3, 32)),
}


def both(tmp_path, options: dict[str, Any]):
    """(diffusers' network, ours, loaded from what it saved; an input)."""
    theirs = tiny_unet(**options)
    theirs.save_pretrained(tmp_path)
    if options.get("out_channels") == 6:
        (tmp_path / "scheduler_config.json").write_text('{"variance_type": "learned_range"}')
    ours = load_checkpoint(tmp_path).network
    size = theirs.config.sample_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    x = torch.randn(3, theirs.config.in_channels, height, width, generator=torch.Generator().manual_seed(5))
    return theirs, ours, x


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_output_equals_diffusers(tmp_path, options):
    theirs, ours, x = both(tmp_path, options)
    fused = FusedUNet(ours)
    timesteps = [1, 37, 999]
    rows = fused.time.table(torch.tensor(timesteps))
    assert rows.shape == (3, fused.time.columns)
    for i, t in enumerate(timesteps):
        expected = theirs(x, torch.tensor(t)).sample
        kept = x.clone()
        assert relative_difference(ours(x, torch.tensor(t)), expected) <= FORWARD, f"reference at t = {t}"
        assert relative_difference(fused(x, rows[i : i + 1]), expected) <= FORWARD, f"fused at t = {t}"
        assert torch.equal(x, kept)


@torch.no_grad()
def test_at_timestep_zero(tmp_path):
    theirs, ours, x = both(tmp_path, {})
    fused = FusedUNet(ours)
    expected = theirs(x, 0).sample
    assert relative_difference(ours(x, 0), expected) <= FORWARD
    assert relative_difference(fused(x, fused.time.table(torch.tensor([0]))), expected) <= FORWARD


@torch.no_grad()
def test_a_timestep_per_image(tmp_path):
    theirs, ours, x = both(tmp_path, {})
    timesteps = torch.tensor([3, 500, 999])
    assert relative_difference(ours(x, timesteps), theirs(x, timesteps).sample) <= FORWARD


@torch.no_grad()
@pytest.mark.parametrize(("options", "labels"), CLASSES.values(), ids=CLASSES.keys())
def test_class_conditional_networks(tmp_path, options, labels):
    theirs, ours, x = both(tmp_path, options)
    expected = theirs(x, 37, class_labels=labels).sample
    assert relative_difference(ours(x, 37, labels), expected) <= FORWARD
    with pytest.raises(ValueError, match="labels are needed"):
        ours(x, 37)
    fused = FusedUNet(ours)
    out = fused(x, fused.time.table(torch.tensor([37])), ours.embed_classes(labels))
    assert relative_difference(out, expected) <= FORWARD


@torch.no_grad()
def test_labels_for_an_unconditional_network_are_refused(tmp_path):
    _, ours, x = both(tmp_path, {})
    with pytest.raises(ValueError, match="labels are needed by a class-conditional network, and only there"):
        ours(x, 37, torch.tensor([0, 1, 2]))


def test_the_tests_can_see_every_option(tmp_path):
    """Options that do not change shapes must change the output by far more than the bound, or testing them is vain."""
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    base = tiny_unet()
    changes = [
        {"downsample_padding": 0},
        {"flip_sin_to_cos": False},
        {"freq_shift": 1},
        {"attention_head_dim": None},
        {"attn_norm_num_groups": 2},
        {"mid_block_scale_factor": 1.4},
        {"center_input_sample": True},
        {"act_fn": "gelu"},
        {"norm_eps": 1e-2},
    ]
    with torch.no_grad():
        expected = base(x, 37).sample
        for change in changes:
            other = tiny_unet(**change)
            other.load_state_dict(base.state_dict())
            assert relative_difference(other(x, 37).sample, expected) > 20 * FORWARD, change


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.02), (torch.bfloat16, 0.16)])
def test_the_fused_network_in_half_precision(tmp_path, dtype, bound):
    _, ours, x = both(tmp_path, {})
    fused = FusedUNet(ours, dtype)
    out = fused(x, fused.time.table(torch.tensor([37])))
    assert out.dtype == torch.float32
    difference = relative_difference(out, ours(x, 37))
    assert 1e-6 < difference <= bound


def test_fusing_leaves_the_reference_as_it_was(tmp_path):
    _, ours, _ = both(tmp_path, {})
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    fused = FusedUNet(ours, torch.float16)
    for p in fused.parameters():
        p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"norm_num_groups": 3}, "norm_num_groups=3 does not divide a level of 8 channels"),
        ({"activation": "tanh"}, "activation 'tanh' is not one of silu"),
        ({"up_attention": (True,)}, "up_attention has 1 entries for 2 levels"),
        ({"time_embedding": "rotary"}, "time_embedding 'rotary' is not one of positional, fourier, learned"),
        ({"time_embedding": "learned"}, "a learned time embedding needs num_train_timesteps"),
        ({"class_embedding": "table"}, "a class table needs num_class_embeds"),
        ({"down_resample": ("fir", "conv")}, "down_resample 'fir' is not one of conv, resnet"),
    ],
)
def test_configurations_that_describe_no_network(changes, sentence):
    base = {
        "block_out_channels": TINY["block_out_channels"],
        "down_attention": (False, True),
        "up_attention": (True, False),
        "norm_num_groups": 4,
    }
    with pytest.raises(ValueError, match=sentence):
        UNet(UNetConfig(**(base | changes)))
