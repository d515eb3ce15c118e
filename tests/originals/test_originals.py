"""The reference implementations against the published facts: sizes, names, tables, the steps that networks see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.originals import guided_diffusion, ho
from tests.originals.guided_diffusion import Diffusion, space_timesteps
from tests.weights import redraw

TINY = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_ds": (2,),
    "num_head_channels": 16,
}


def on_meta(build: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return build(**arguments)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


class Recorder:
    """A network that predicts zero, of `channels` channels, and keeps the steps it was shown."""

    def __init__(self, channels: int = 3) -> None:
        self.channels = channels
        self.steps: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        self.steps.append(float(t[0]))
        return x.new_zeros(len(x), self.channels, *x.shape[2:])


@pytest.mark.parametrize("name", guided_diffusion.PUBLISHED)
def test_published_guided_diffusion_files_have_their_size(name):
    published = guided_diffusion.PUBLISHED[name]
    network = on_meta(guided_diffusion.UNetModel, published.model)
    assert parameters(network) == published.parameters
    blocks = len(published.model["channel_mult"]) * (published.model["num_res_blocks"] + 1)
    assert len(network.input_blocks) == len(network.output_blocks) == blocks
    assert network.out[2].weight.shape[0] == 6


@pytest.mark.parametrize(("name", "keys"), [("cifar10", 328), ("lsun", 450), ("celeba-64", 390)])
def test_published_ho_files_have_their_size(name, keys):
    published = ho.PUBLISHED[name]
    network = on_meta(ho.Model, published.model)
    assert parameters(network) == published.parameters
    assert len(network.state_dict()) == keys


def test_names_of_guided_diffusion():
    state = on_meta(guided_diffusion.UNetModel, guided_diffusion.PUBLISHED["512x512_diffusion"].model).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["time_embed.0.weight"] == (1024, 256)  # 256 model channels, although the first layer has 128
    assert shapes["input_blocks.0.0.weight"] == (128, 3, 3, 3)
    assert shapes["label_emb.weight"] == (1000, 1024)
    assert shapes["input_blocks.1.0.in_layers.2.weight"] == (128, 128, 3, 3)
    assert shapes["input_blocks.1.0.emb_layers.1.weight"] == (256, 1024)
    assert shapes["input_blocks.3.0.out_layers.3.weight"] == (128, 128, 3, 3)  # the block that halves
    assert shapes["input_blocks.4.0.skip_connection.weight"] == (256, 128, 1, 1)
    assert "input_blocks.12.1.qkv.weight" not in shapes
    assert shapes["input_blocks.13.1.qkv.weight"] == (1536, 512, 1)  # level 4, at a sixteenth
    assert shapes["middle_block.1.proj_out.weight"] == (1024, 1024, 1)
    assert shapes["output_blocks.2.2.in_layers.2.weight"] == (1024, 1024, 3, 3)  # after an attention
    assert shapes["output_blocks.11.1.in_layers.0.weight"] == (512,)  # after none
    assert shapes["out.0.weight"] == (128,)
    assert shapes["out.2.weight"] == (6, 128, 3, 3)


def test_names_of_improved_diffusion():
    published = guided_diffusion.PUBLISHED["cifar10_uncond_50M_500K"]
    shapes = {k: tuple(v.shape) for k, v in on_meta(guided_diffusion.UNetModel, published.model).state_dict().items()}
    assert shapes["input_blocks.4.0.op.weight"] == (128, 128, 3, 3)
    assert shapes["input_blocks.5.1.norm.weight"] == (256,)
    assert shapes["output_blocks.3.1.conv.weight"] == (256, 256, 3, 3)  # no attention on the lowest level
    assert shapes["output_blocks.7.2.conv.weight"] == (256, 256, 3, 3)
    assert "label_emb.weight" not in shapes


def test_names_of_ho():
    shapes = {k: tuple(v.shape) for k, v in on_meta(ho.Model, ho.PUBLISHED["cifar10"].model).state_dict().items()}
    assert shapes["temb.dense.0.weight"] == (512, 128)
    assert shapes["temb.dense.1.weight"] == (512, 512)
    assert shapes["down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["down.1.attn.1.q.weight"] == (256, 256, 1, 1)
    assert shapes["down.0.downsample.conv.weight"] == (128, 128, 3, 3)
    assert "down.3.downsample.conv.weight" not in shapes
    assert shapes["mid.block_1.temb_proj.weight"] == (256, 512)
    assert shapes["mid.attn_1.proj_out.weight"] == (256, 256, 1, 1)
    assert shapes["up.0.block.0.norm1.weight"] == (384,)  # 0 is the highest resolution
    assert shapes["up.3.upsample.conv.weight"] == (256, 256, 3, 3)
    assert "up.0.upsample.conv.weight" not in shapes
    assert shapes["norm_out.weight"] == (128,)


def test_respacing():
    kept = space_timesteps(1000, "250")
    assert len(kept) == 250
    assert kept[:4] == [0, 4, 8, 12]
    assert kept[-3:] == [991, 995, 999]
    assert space_timesteps(1000, "ddim25") == list(range(0, 1000, 40))
    assert space_timesteps(4000, "") == list(range(4000))
    # The first T % k sections are longer; a section of one step keeps its first, one of none nothing.
    assert space_timesteps(11, "2,1,0") == [0, 3, 4]
    with pytest.raises(ValueError, match="no integer stride leaves 300 of 1000 steps"):
        space_timesteps(1000, "ddim300")
    with pytest.raises(ValueError, match="a section of 500 steps has no 501"):
        space_timesteps(1000, "501,1")


def test_respacing_sums_its_stride():
    """999 / 20 = 49.95: ten times that is 499.5 and rounds to 500, summed ten times it is a bit less."""
    assert space_timesteps(1000, "21")[9:12] == [450, 499, 549]


@pytest.mark.parametrize(
    ("schedule", "steps", "first", "last"),
    [
        ("linear", 1000, 1e-4, 0.02),
        ("linear", 4000, 2.5e-5, 5e-3),
        ("cosine", 1000, 4.128e-5, 0.999),
        ("cosine", 4000, 9.866e-6, 0.999),
    ],
)
def test_betas(schedule, steps, first, last):
    betas = guided_diffusion.betas(schedule, steps)
    assert betas.dtype == np.float64
    assert betas.shape == (steps,)
    assert betas[0] == pytest.approx(first, rel=2e-4)
    assert betas[-1] == pytest.approx(last)


def test_a_respaced_chain_keeps_alpha_bar():
    full, few = Diffusion(1000, "cosine"), Diffusion(1000, "cosine", "10,5")
    assert few.a == pytest.approx(full.a[few.timesteps], rel=1e-12)
    assert few.betas[0] == pytest.approx(1 - full.a[0], rel=1e-9)
    assert (few.mean_of_x0[0], few.mean_of_x[0]) == (pytest.approx(1), 0)


def test_steps_that_the_network_sees():
    network = Recorder()
    Diffusion(4000, "cosine", "4", rescale_timesteps=True).p_sample_loop(network, (1, 3, 2, 2))
    assert network.steps == [999.75, 666.5, 333.25, 0.0]
    network = Recorder(6)
    Diffusion(1000, "linear", "ddim4", learn_sigma=True).ddim_sample_loop(network, (2, 3, 2, 2))
    assert network.steps == [750, 500, 250, 0]
    network = Recorder()
    ho.pytorch_diffusion_sample(network, (1, 3, 2, 2), T=5)
    assert network.steps == [4, 3, 2, 1, 0]


def test_draws_come_at_every_step_whatever_eta():
    """The initial noise and one draw a step, the last included."""
    shape, betas = (2, 3, 4, 4), torch.linspace(1e-4, 0.02, 1000)
    chains = {
        "p_sample": lambda: Diffusion(1000, "linear", "10").p_sample_loop(Recorder(), shape),
        "ddim": lambda: Diffusion(1000, "linear", "10").ddim_sample_loop(Recorder(), shape, eta=0.0),
        "pytorch_diffusion": lambda: ho.pytorch_diffusion_sample(Recorder(), shape, T=10),
        "generalized": lambda: ho.generalized_steps(Recorder(), torch.randn(shape), range(0, 1000, 100), betas),
        "ddpm_noisy": lambda: ho.ddpm_steps(Recorder(), torch.randn(shape), range(0, 1000, 100), betas),
    }
    for name, chain in chains.items():
        torch.manual_seed(3)
        chain()
        after = torch.randn(5)
        torch.manual_seed(3)
        for _ in range(11):
            torch.randn(shape)
        assert torch.equal(after, torch.randn(5)), name


def test_sequences_of_the_ddim_repository():
    assert ho.seq_uniform(1000, 10) == list(range(0, 1000, 100))
    assert ho.seq_uniform(1000, 7) == list(range(0, 1000, 142))  # eight of them
    assert ho.seq_quad(1000, 10) == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
    assert ho.seq_quad(1000, 50)[:3] == [0, 0, 1]  # a step may come twice


def test_eta_one_is_ancestral_sampling():
    """DDIM with eta 1 and the clipped noise has the mean and the small variance of the ancestral step."""
    network = redraw(guided_diffusion.UNetModel(**TINY)).eval()
    chain = Diffusion(1000, "linear", "5", sigma_small=True)
    torch.manual_seed(0)
    ancestral = chain.p_sample_loop(network, (1, 3, 8, 8))
    torch.manual_seed(0)
    torch.testing.assert_close(chain.ddim_sample_loop(network, (1, 3, 8, 8), eta=1.0), ancestral, rtol=0, atol=1e-4)


def test_the_order_of_qkv_and_every_input_matter():
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([900, 3])
    legacy = redraw(guided_diffusion.UNetModel(**TINY)).eval()
    new = redraw(guided_diffusion.UNetModel(**TINY, use_new_attention_order=True)).eval()
    assert (legacy(x, t) - new(x, t)).abs().max() > 0.01
    assert (legacy(x, t) - legacy(x, t + 0.25)).abs().max() > 1e-5

    conditional = redraw(guided_diffusion.UNetModel(**TINY, num_classes=4, in_channels=6, learn_sigma=True)).eval()
    low = torch.randn(2, 3, 2, 2)
    out = conditional(x, t, y=torch.tensor([1, 2]), low_res=low)
    assert out.shape == (2, 6, 8, 8)
    assert (out - conditional(x, t, y=torch.tensor([1, 3]), low_res=low)).abs()[1].max() > 0.01
    assert (out - conditional(x, t, y=torch.tensor([1, 2]), low_res=-low)).abs().max() > 0.01
