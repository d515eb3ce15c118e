"""The fused network and its loop through the Triton kernels, interpreted, against the reference network."""

from __future__ import annotations

import re

import pytest
import torch

from ddpm.fused import FusedUNet, fuse
from ddpm.kernels import backend
from ddpm.kernels.philox import PURPOSE_STEP, philox_normal_ref
from ddpm.loop import ChainShape, Loop
from ddpm.lucidrains import LucidrainsConfig, LucidrainsUNet
from ddpm.reference import sample_reference
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule, beta_schedule
from ddpm.steps import step_table
from ddpm.unet import UNet, UNetConfig
from tests.chains import walk
from tests.weights import redraw

pytestmark = pytest.mark.interpret
TINY = {
    "block_out_channels": (16, 32),
    "down_attention": (False, True),
    "up_attention": (True, False),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_norm_num_groups": 8,
}


def network(**options) -> UNet:
    torch.manual_seed(0)  # of the inputs that the tests draw
    return redraw(UNet(UNetConfig(**TINY, **options))).eval().requires_grad_(False)


@pytest.mark.parametrize("options", [{}, {"scale_shift": True}, {"downsample_padding": 0}], ids=str)
@torch.no_grad()
def test_the_fused_network_equals_the_reference(options):
    assert backend.uses_triton(torch.device("cpu"))
    reference = network(**options)
    fused = FusedUNet(reference)
    paths = [layer.path for layer in fused.explain(torch.device("cpu"), 2, 8, 8)]
    for form in ("in the same launch", "in a pass of its own", r"K in 1;", r"K in ([2-9]|1\d)"):
        assert any(re.search(form, path) for path in paths), form
    x = torch.randn(2, 3, 8, 8)
    expected = reference(x, 999)
    out = fused(x, fused.time.table(torch.tensor([999])))
    assert (out - expected).abs().max() <= 5e-5 * expected.square().mean().sqrt()


@pytest.mark.parametrize(("variance_type", "clip"), [("fixed_small", "clamp"), ("learned_range", "dynamic")])
@torch.no_grad()
def test_a_chain_equals_the_oracle(variance_type, clip):
    rules = SamplingRules(variance_type=variance_type, clip=clip, threshold_max=2.0)
    reference = network(out_channels=6 if rules.learned_variance else 3)
    schedule = NoiseSchedule.from_betas(beta_schedule("linear", 100))
    table = step_table(schedule, rules, 2)
    shape = ChainShape(
        batch=2, channels=3, height=4, width=4, capacity=100, clip=clip, variance=table.variance,
        threshold_ratio=rules.threshold_ratio, threshold_max=rules.threshold_max, generator_noise=False, preview=False,
    )  # fmt: skip
    x_T, seeds = torch.randn(2, 3, 4, 4), torch.tensor([3, 2**40])
    loop = Loop(FusedUNet(reference), shape, torch.device("cpu"), compiled=False)
    images = walk(loop, table, x_T, seeds=seeds)

    def draw(i: int) -> torch.Tensor:
        return philox_normal_ref(seeds, 3 * 4 * 4, i, PURPOSE_STEP).view(2, 3, 4, 4)

    expected = sample_reference(reference, schedule, rules, table.timesteps.tolist(), x_T, draw)
    assert (images - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_the_planned_network_compiles_as_one_graph():
    """Its kernels stay operations of the graph; nothing of it falls back to Python."""
    fused = FusedUNet(network())
    x, row = torch.randn(1, 3, 4, 4), fused.time.table(torch.tensor([7]))
    compiled = torch.compile(lambda x, row: fused(x, row), fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(compiled(x, row), fused(x, row))


FAMILIES = {
    "guided-diffusion": {
        "scale_shift": True, "attention_heads": 4, "class_embedding": "table", "num_class_embeds": 5,
        "down_resample": ("resnet", "resnet"), "up_resample": ("resnet", "resnet"), "time_sinusoid_dim": 24,
    },
    "super-resolution": {"in_channels": 6, "condition_channels": 3, "scale_shift": True, "attention_head_dim": 8},
    "ho": {"norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0},
    "lucidrains": LucidrainsConfig(dim=16, dim_mults=(1, 2), full_attention=(False, True), self_condition=True),
    "lucidrains 1.8": LucidrainsConfig(
        dim=16, dim_mults=(1, 2), full_attention=(False, True), norm="group", memory_key_values=0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family(name):
    config = FAMILIES[name]
    if isinstance(config, LucidrainsConfig):
        torch.manual_seed(0)
        reference = redraw(LucidrainsUNet(config)).eval().requires_grad_(False)
    else:
        reference = network(**config)
    fused = fuse(reference)
    x = torch.randn(2, 3, 8, 8)
    labels = torch.tensor([1, 4]) if reference.conditional else None
    classes = None if labels is None else reference.embed_classes(labels)
    condition = torch.randn(2, 3, 8, 8) if reference.condition_channels else None
    expected = reference(x, 999, labels, condition)
    out = fused(x, fused.time.table(torch.tensor([999])), classes, condition)
    assert (out - expected).abs().max() <= 5e-5 * expected.square().mean().sqrt()
