"""The captured loop on a GPU: equal to the eager loop, without growth, one sampler beside another.

No optional package is needed here: the network is built from a configuration, with random weights.
"""

from __future__ import annotations

import pytest
import torch

from ddpm.checkpoints import Checkpoint, Report
from ddpm.loop import step
from ddpm.rules import SamplingRules
from ddpm.sampler import Sampler
from ddpm.schedule import NoiseSchedule, beta_schedule
from ddpm.unet import UNet, UNetConfig
from tests.weights import redraw

pytestmark = pytest.mark.gpu
BOUND = 1e-4


def checkpoint(seed: int = 0, **network: object) -> Checkpoint:
    config = UNetConfig(
        block_out_channels=(32, 64),
        down_attention=(False, True),
        up_attention=(True, False),
        sample_size=(16, 16),
        **network,
    )
    network = redraw(UNet(config), seed).eval().requires_grad_(False)
    schedule = NoiseSchedule.from_betas(beta_schedule("linear", 1000))
    return Checkpoint("diffusers", "random", network, schedule, SamplingRules(), (16, 16), "half_to_even", Report())


def sampler(device: str = "cuda", seed: int = 0, **options) -> Sampler:
    return Sampler(checkpoint(seed), device=device, **({"dtype": "fp32", "compile": False} | options))


def sample(model: Sampler, n: int = 3, **options) -> torch.Tensor:
    noise = {} if "generator" in options else {"seeds": range(n)}
    return model.sample(n, **(noise | {"steps": 10, "progress": False} | options))


@pytest.mark.parametrize("compile", [False, True])
def test_the_captured_loop_draws_the_images_of_the_cpu(compile):
    model = sampler(compile=compile)
    assert (sample(model) - sample(sampler("cpu"))).abs().max() <= BOUND
    assert [loop.captures for loop in model.loops] == [1]


def test_the_captured_loop_equals_the_eager_loop():
    model = sampler()
    captured = sample(model)
    (loop,) = model.loops
    # the same step, launched one by one in place of the replays
    loop._run_step = lambda: (step(loop.network, loop.shape, loop.buffers), loop._advance())
    assert torch.equal(captured, sample(model))


def test_the_same_call_gives_the_same_bits():
    model = sampler(dtype="fp16")
    assert torch.equal(sample(model), sample(model))


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("batch_size", [3, 2])
def test_generator_noise_is_that_of_eager_draws(where, batch_size):
    """x_0 and the generator's state afterwards are those of a loop that draws call by call."""
    mine, plain = (torch.Generator(where).manual_seed(5) for _ in range(2))
    sample(sampler(), generator=mine, batch_size=batch_size)
    for n in [3] if batch_size == 3 else [2, 1]:
        for _ in range(10):  # x_T and nine steps; the last step, at timestep 0, draws nothing
            torch.randn(n, 3, 16, 16, generator=plain, device=where)
    assert torch.equal(mine.get_state(), plain.get_state())


def test_a_cpu_generator_draws_the_images_of_the_cpu():
    images = [sample(sampler(d), generator=torch.Generator().manual_seed(5)) for d in ("cuda", "cpu")]
    assert (images[0] - images[1]).abs().max() <= BOUND


def test_a_thousand_replays_need_no_more_memory():
    model = sampler()
    sample(model)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    sample(model, steps=1000)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_two_samplers_live_side_by_side():
    one, other = sampler(seed=0), sampler(seed=1)
    first, second = sample(one), sample(other)
    assert (first - second).abs().max() > 0.1
    assert torch.equal(first, sample(one))
    assert torch.equal(second, sample(other))


def test_float32_is_ieee_whatever_torch_is_set_to():
    expected = sample(sampler("cpu"))
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert (sample(sampler()) - expected).abs().max() <= BOUND
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_draws_the_same_images():
    first, second = sampler("cuda:0"), sampler("cuda:1")
    assert torch.equal(sample(first), sample(second))


def test_a_conditioned_chain_draws_the_images_of_the_cpu():
    """Guidance and inpainting with jumps, captured once; the known region to the bit."""
    image, known = torch.rand(3, 3, 16, 16) * 2 - 1, torch.rand(3, 3, 16, 16) < 0.5
    options = {
        "labels": [0, 1, 2], "guidance_scale": 2.0, "null_label": 4, "image": image, "mask": known, "resample": (2, 3),
    }  # fmt: skip
    models = [
        Sampler(checkpoint(class_embedding="table", num_class_embeds=5), device=device, dtype="fp32", compile=False)
        for device in ("cuda", "cpu")
    ]
    on_gpu, on_cpu = (sample(model, **options) for model in models)
    assert torch.equal(on_gpu[known], image[known])
    assert (on_gpu - on_cpu).abs().max() <= BOUND
    assert [loop.captures for loop in models[0].loops] == [1]


def test_a_module_of_ones_own_is_captured_where_it_is():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, t):
            return torch.tanh(self.conv(x) + t.view(-1, 1, 1, 1) / 1000)

    network = redraw(Own()).eval()
    betas = beta_schedule("linear", 1000)
    expected = sample(Sampler.from_module(network, betas, (3, 16, 16)))
    model = Sampler.from_module(network.cuda(), betas, (3, 16, 16))
    assert (sample(model) - expected).abs().max() <= BOUND
    network.conv.weight.data.mul_(-1)  # the graph reads the weights where they are
    assert (sample(model) - expected).abs().max() > 0.1
