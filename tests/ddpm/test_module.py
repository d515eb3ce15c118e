"""Somebody's own network: used as it is, sampled by the same rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ddpm
from ddpm.reference import sample_reference
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule
from tests.tolerances import CHAIN

SHAPE = (3, 6, 5)
BETAS = torch.linspace(1e-3, 0.05, 60)


class Own(nn.Module):
    """Output in [-1, 1], so that chains without a clip stay small; remembers what it was given."""

    def __init__(self, channels: int = 3, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, channels, 3, padding=1, dtype=dtype)
        self.seen: list[tuple[Tensor, torch.dtype]] = []
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((t.clone(), x.dtype))
        return torch.tanh(self.conv(x) + t.view(-1, 1, 1, 1).to(x.dtype) / 60)


class Wrapped(nn.Module):
    """Returns its output as diffusers' networks do, or as something that is no output at all."""

    def __init__(self, wrap: Any):
        super().__init__()
        self.network, self.wrap = Own(), wrap
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.wrap(self.network(x, t))


class Output:
    def __init__(self, sample: Tensor):
        self.sample = sample


def images(sampler: ddpm.Sampler, **options: Any) -> Tensor:
    return sampler.sample(2, **({"steps": 10, "progress": False, "seeds": [1, 2]} | options))


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"variance_type": "fixed_large", "clip": "none"},
        {"variance_type": "learned_range"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample", "timestep_spacing": "trailing"},
    ],
    ids=str,
)
def test_its_chain_is_the_oracles(rules):
    network, source = Own(6 if rules.get("variance_type") == "learned_range" else 3), torch.Generator().manual_seed(5)
    sampler = ddpm.Sampler.from_module(network, BETAS, SHAPE, **rules)
    table = sampler.plan(1, steps=10).table
    expected = sample_reference(
        lambda x, t: network(x, t.expand(2)),
        NoiseSchedule.from_betas(BETAS),
        SamplingRules(**rules),
        table.timesteps.tolist(),
        torch.randn(2, *SHAPE, generator=source),
        lambda i: torch.randn(2, *SHAPE, generator=source),
    )
    drawn = images(sampler, seeds=None, generator=torch.Generator().manual_seed(5))
    assert float((drawn - expected).abs().max()) <= CHAIN


def test_it_is_told_the_timesteps_of_the_chain_as_integers():
    network = Own()
    sampler = ddpm.Sampler.from_module(network, BETAS, SHAPE)
    images(sampler, timesteps=[41, 20, 0], steps=None)
    assert [t.tolist() for t, _ in network.seen] == [[41, 41], [20, 20], [0, 0]]
    assert all(t.dtype == torch.int64 and dtype == torch.float32 for t, dtype in network.seen)


def test_rescaled_timesteps_are_no_integers():
    network = Own()
    sampler = ddpm.Sampler.from_module(network, BETAS, SHAPE, rescale_timesteps=True)
    images(sampler, timesteps=[41, 0], steps=None)
    assert [t.tolist() for t, _ in network.seen] == [[pytest.approx(41 * 1000 / 60, abs=1e-4)] * 2, [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_keeps_its_dtype(dtype):
    network = Own(dtype=dtype)
    sampler = ddpm.Sampler.from_module(network, BETAS, SHAPE)
    assert sampler.dtype == {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    drawn, exact = images(sampler), images(ddpm.Sampler.from_module(Own(), BETAS, SHAPE))
    assert {d for _, d in network.seen} == {dtype}
    assert drawn.dtype == torch.float32
    assert 0 < float((drawn - exact).abs().max()) < 0.2


def test_changed_weights_are_seen():
    network = Own()
    sampler = ddpm.Sampler.from_module(network, BETAS, SHAPE)
    before = images(sampler)
    network.conv.weight.data.mul_(-1)
    after = images(sampler)
    assert float((after - before).abs().max()) > 0.1
    assert torch.equal(after, images(ddpm.Sampler.from_module(network, BETAS, SHAPE)))


def test_an_output_may_be_an_attribute():
    drawn = images(ddpm.Sampler.from_module(Wrapped(Output), BETAS, SHAPE))
    assert torch.equal(drawn, images(ddpm.Sampler.from_module(Own(), BETAS, SHAPE)))


def test_an_image_does_not_depend_on_its_batch():
    sampler = ddpm.Sampler.from_module(Own(), BETAS, SHAPE)
    assert float((images(sampler, batch_size=1) - images(sampler)).abs().max()) <= 1e-5


@pytest.mark.parametrize("betas", [BETAS.tolist(), BETAS.numpy(), BETAS.double(), NoiseSchedule.from_betas(BETAS)])
def test_betas_of_any_kind(betas):
    expected = images(ddpm.Sampler.from_module(Own(), BETAS, SHAPE))
    assert float((images(ddpm.Sampler.from_module(Own(), betas, SHAPE)) - expected).abs().max()) <= CHAIN


def test_a_network_in_training_mode_is_pointed_out():
    """Whenever it is sampled so: between two epochs, say."""
    network = Own()
    sampler = ddpm.Sampler.from_module(network, BETAS, SHAPE)
    network.train()
    with pytest.warns(UserWarning, match="Own is in training mode"):
        images(sampler)


def test_weights_put_elsewhere_are_seen():
    """A captured graph would read them where they lay."""
    network = Own()
    sampler = ddpm.Sampler.from_module(network, BETAS, SHAPE)
    images(sampler)
    loops = sampler.loops
    images(sampler)
    assert sampler.loops == loops
    network.load_state_dict({name: -value for name, value in network.state_dict().items()}, assign=True)
    assert torch.equal(images(sampler), images(ddpm.Sampler.from_module(network, BETAS, SHAPE)))
    assert sampler.loops != loops


def test_explain_names_it():
    text = ddpm.Sampler.from_module(Own(), BETAS, SHAPE).explain()
    assert "Own  as it is, 84 parameters, float32" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": lambda x, t: x}, "network must be an nn.Module; got function"),
        ({"network": Own().double()}, "network is in torch.float64; convert it"),
        ({"schedule": torch.linspace(0, 0.02, 10)}, "schedule must be betas, all above 0"),
        ({"schedule": "linear"}, "schedule must be betas, numbers"),
        ({"schedule": torch.ones(2, 2)}, "schedule must be float betas"),
        ({"schedule": np.array([])}, "schedule must be float betas"),
        ({"image_shape": (3, 6)}, "image_shape must be .channels, height, width."),
        ({"image_shape": (3, 0, 6)}, "each of image_shape must be a positive integer; got 0"),
        ({"image_shape": (3.9, 6, 6)}, "each of image_shape must be a positive integer; got 3.9"),
        ({"image_shape": "388"}, "image_shape must be .channels, height, width."),
        ({"clip_range": -1}, "clip_range must be a number from 0"),
        ({"threshold_ratio": 5}, "threshold_ratio must be a number from 0 to 1"),
        ({"set_alpha_to_one": "no"}, "set_alpha_to_one must be True or False"),
        ({"steps_offset": -3}, "steps_offset must be an integer of at least 0"),
        ({"ddim_steps": "x"}, "ddim_steps must be a positive integer"),
        ({"tf32": 1}, "tf32 must be True or False"),
        ({"variance": "big"}, "unknown rule variance"),
        ({"variance_type": "big"}, "variance_type 'big' is not one of"),
        ({"compile": "auto"}, "compile must be True or False"),
    ],
)
def test_what_is_refused(change, message):
    arguments = {"network": Own(), "schedule": BETAS, "image_shape": SHAPE} | change
    with pytest.raises(ValueError, match=message):
        ddpm.Sampler.from_module(**arguments)


def test_an_output_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"Wrapped returned tuple; expected a tensor \[2, 3, 6, 5\]"):
        images(ddpm.Sampler.from_module(Wrapped(lambda out: (out,)), BETAS, SHAPE))


@pytest.mark.parametrize("wrap", [lambda out: out[:, :2], lambda out: torch.cat([out, out]), lambda out: out[..., :3]])
def test_an_output_of_another_shape_is_refused(wrap):
    with pytest.raises(ValueError, match=r"Wrapped returned .*; expected \[2, 3, 6, 5\]"):
        images(ddpm.Sampler.from_module(Wrapped(wrap), BETAS, SHAPE))


def test_a_learned_variance_is_not_dropped_in_silence():
    with pytest.raises(ValueError, match=r"Own returned .2, 6, 6, 5.; .* pass variance_type='learned_range'"):
        images(ddpm.Sampler.from_module(Own(6), BETAS, SHAPE))
    with pytest.raises(ValueError, match=r"Own returned .2, 3, 6, 5.; .* pass variance_type='fixed_small'"):
        images(ddpm.Sampler.from_module(Own(), BETAS, SHAPE, variance_type="learned_range"))


@pytest.mark.parametrize("rules", [{}, {"sampler": "ddim", "ddim_epsilon": "rederived"}], ids=["ddpm", "ddim"])
def test_betas_that_give_no_step_are_refused(rules):
    """Of 1e-9 nothing is left in float32: alphas_cumprod is 1, and the last step 0 / 0."""
    with pytest.raises(ValueError, match="no finite step at timestep 0, where alphas_cumprod is 1"):
        images(ddpm.Sampler.from_module(Own(), torch.linspace(1e-9, 0.02, 60), SHAPE, **rules))
