"""`ddpm.accelerate` in half precision: as exact as the plain network, or with the pipeline's own rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

import ddpm
from ddpm.dropins.diffusers import _with_rounded_factors
from ddpm.dropins.live import read_scheduler
from ddpm.kernels.reverse_step import NONFINITE_NONE, reverse_step_ref
from ddpm.reference import sample_reference
from ddpm.steps import step_table
from tests.helpers import constant, ddim_pipeline, tiny_pipeline


def generator(seed: int = 1234) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_half_precision_is_as_exact_as_the_plain_network():
    """Blueprint, contract 5: the network in fp16, the state in float32."""
    pipe = tiny_pipeline().to(torch.float16)
    fast = ddpm.accelerate(pipe)
    fast(4, generator(), 25, "pt")
    x, checkpoint = fast.sampler.loops[-1].buffers.x.clone(), fast.sampler.checkpoint

    def chain(unet: UNet2DModel) -> torch.Tensor:
        source = generator()
        x_T, *noise = (torch.randn(4, 3, 8, 8, generator=source, dtype=torch.float16).float() for _ in range(26))

        def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return unet(x.to(unet.dtype), t).sample.float()

        timesteps = pipe.scheduler.timesteps.tolist()
        return sample_reference(network, checkpoint.schedule, checkpoint.rules, timesteps, x_T, noise.__getitem__)

    exact, plain = chain(copy.deepcopy(pipe.unet).float()), chain(pipe.unet)
    error, allowed = (x - exact).abs(), (plain - exact).abs()
    assert 0 < error.mean() <= 1.5 * allowed.mean()
    assert error.max() <= 1.5 * allowed.max()


OWN: dict[str, tuple[type, dict[str, Any]]] = {
    **{
        f"{prediction}, {variance}": (DDPMScheduler, {"prediction_type": prediction, "variance_type": variance})
        for prediction in ("epsilon", "sample", "v_prediction")
        for variance in ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
    },
    "thresholding": (DDPMScheduler, {"thresholding": True, "sample_max_value": 1.5}),
    "clip range": (DDPMScheduler, {"clip_sample_range": 0.6}),
    "no clip": (DDPMScheduler, {"clip_sample": False}),
    "ddim": (DDIMScheduler, {}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "settings"), OWN.values(), ids=OWN.keys())
def test_a_step_with_own_rounding_is_diffusers_step(kind, settings, dtype):
    """Bit for bit, for the same network output."""
    scheduler = kind(**settings)
    scheduler.set_timesteps(20)
    schedule, rules = read_scheduler(scheduler)
    eta = {"eta": 0.5} if rules.sampler == "ddim" else {}
    table = _with_rounded_factors(step_table(schedule, rules, 20, **eta), dtype)
    source = generator()
    for i, t in enumerate(scheduler.timesteps):
        x = torch.randn(2, 3, 8, 8, generator=source, dtype=dtype)
        out = torch.rand(2, 6 if rules.learned_variance else 3, 8, 8, generator=source).to(dtype)
        z = torch.randn(x.shape, generator=generator(i), dtype=dtype)
        expected = scheduler.step(out, t, x, generator=generator(i), **eta).prev_sample.float()
        state = x.float()
        reverse_step_ref(
            state,
            out,
            table.coefficients,
            torch.tensor([i]),
            torch.tensor([NONFINITE_NONE]),
            clip=table.rules.clip,
            variance=table.variance,
            rounding=str(dtype).removeprefix("torch."),
            noise=z.float(),
            threshold_ratio=rules.threshold_ratio,
            threshold_max=rules.threshold_max,
        )
        if dtype == torch.float16 and rules.variance_type == "learned":  # torch's v ** 0.5 is not always rounded right
            torch.testing.assert_close(state, expected, rtol=2.0**-10, atol=2.0**-10)
            assert float((state != expected).float().mean()) < 0.01
        else:
            assert torch.equal(state, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [tiny_pipeline, ddim_pipeline])
def test_a_chain_with_own_rounding(make, dtype):
    """Bit for bit, where the network is; and otherwise than with a float32 state."""
    pipe = constant(make()).to(dtype)
    arguments = {"batch_size": 2, "num_inference_steps": 8, "output_type": "pt"}
    expected = pipe(generator=generator(), **arguments).images
    assert torch.equal(ddpm.accelerate(pipe, rounding="own")(generator=generator(), **arguments).images, expected)
    assert not torch.equal(ddpm.accelerate(pipe)(generator=generator(), **arguments).images, expected)
