"""Betas bitwise as diffusers builds them; the forward process and its targets against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.checkpoints.diffusers import SCHEDULER_DEFAULTS, _schedule
from ddpm.schedule import BETA_SCHEDULES, PREDICTION_TYPES, NoiseSchedule, beta_schedule, rescale_zero_terminal_snr

SETTINGS: dict[str, dict[str, Any]] = {name: {"beta_schedule": name} for name in BETA_SCHEDULES}
SETTINGS |= {
    "other ends": {"beta_start": 0.00085, "beta_end": 0.012},
    "scaled, other ends": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "sigmoid, other ends": {"beta_schedule": "sigmoid", "beta_start": 1e-7, "beta_end": 2e-3},
    "trained_betas": {"trained_betas": [0.0003 * (i + 1) ** 0.7 for i in range(50)], "num_train_timesteps": 50},
    "zero-SNR": {"rescale_betas_zero_snr": True},
    "zero-SNR, scaled": {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"},
    "zero-SNR, cosine": {"rescale_betas_zero_snr": True, "beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("total", [1000, 4000, 37, 1])
def test_schedules_are_bitwise_those_of_diffusers(settings, total):
    if total == 1 and settings.get("rescale_betas_zero_snr"):
        pytest.skip("one step cannot end at zero SNR: diffusers gives NaN too")
    settings = {"num_train_timesteps": total} | settings
    theirs = DDPMScheduler(**settings)
    ours = _schedule(SCHEDULER_DEFAULTS | settings, Path("scheduler_config.json"))
    assert ours.betas.dtype == torch.float32
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.num_train_timesteps == settings["num_train_timesteps"]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"beta_schedule 'exp' is not one of linear, scaled_linear"):
        beta_schedule("exp", 10)


def test_zero_terminal_snr_is_exactly_zero():
    schedule = NoiseSchedule.from_betas(rescale_zero_terminal_snr(beta_schedule("linear", 1000)))
    assert float(schedule.alphas_cumprod[-1]) == 0.0
    assert float(schedule.betas[-1]) == 1.0
    assert float(schedule.alphas_cumprod[-2]) > 0.0
    first = 1 - beta_schedule("linear", 1000)[0]
    assert float(schedule.alphas_cumprod[0]) == pytest.approx(float(first), abs=1e-6)


def double(total: int = 60) -> NoiseSchedule:
    return NoiseSchedule.from_betas(torch.linspace(1e-3, 0.2, total, dtype=torch.float64))


def test_q_sample_is_q_step_iterated():
    """Both are affine in x_0 and in independent noises, so the moments follow from unit inputs, exactly."""
    schedule = double()
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    mean, variance = one, zero  # of x_t given x_0 = 1
    for t in range(60):
        step = torch.tensor([t])
        gain, deviation = schedule.q_step(one, step, zero), schedule.q_step(zero, step, one)
        mean, variance = gain * mean, gain**2 * variance + deviation**2
        torch.testing.assert_close(schedule.q_sample(one, step, zero), mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(schedule.q_sample(zero, step, one), variance.sqrt(), rtol=1e-12, atol=0)


def test_q_sample_equals_diffusers_add_noise():
    scheduler = DDPMScheduler()
    schedule = NoiseSchedule.from_betas(beta_schedule("linear", 1000))
    g = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(4, 3, 5, 5, generator=g), torch.randn(4, 3, 5, 5, generator=g)
    timesteps = torch.tensor([0, 17, 500, 999])
    assert torch.equal(schedule.q_sample(x_0, timesteps, noise), scheduler.add_noise(x_0, noise, timesteps))
    assert torch.equal(
        schedule.training_target(x_0, timesteps, noise, "v_prediction"), scheduler.get_velocity(x_0, noise, timesteps)
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x_0_follows_from_the_target(prediction_type):
    """A network that outputs exactly its training target must lead the sampler's inversion back to x_0."""
    from ddpm.reference import predict_x_0

    schedule = double()
    g = torch.Generator().manual_seed(0)
    x_0 = torch.randn(1, 3, 4, 4, generator=g, dtype=torch.float64)
    noise = torch.randn(1, 3, 4, 4, generator=g, dtype=torch.float64)
    for t in (0, 10, 59):
        timesteps = torch.tensor([t])
        target = schedule.training_target(x_0, timesteps, noise, prediction_type)
        x_t = schedule.q_sample(x_0, timesteps, noise)
        recovered = predict_x_0(target, x_t, schedule.alphas_cumprod[t], prediction_type)
        torch.testing.assert_close(recovered, x_0, rtol=1e-9, atol=1e-9)


def test_an_unknown_target_is_refused():
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="prediction_type 'score' is not one of epsilon, sample, v_prediction"):
        double().training_target(x, torch.tensor([0]), x, "score")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_loss_is_the_mean_squared_error_at_x_t(prediction_type):
    schedule = double()
    g = torch.Generator().manual_seed(1)
    x_0 = torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64)
    noise = torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64)
    timesteps = torch.tensor([0, 3, 30, 58, 59])
    seen = []

    def network(x_t, t):
        seen.append((x_t, t))
        return 0.5 * x_t

    loss = schedule.loss(network, x_0, timesteps, noise, prediction_type)
    x_t = torch.stack([schedule.q_sample(x_0[i : i + 1], timesteps[i : i + 1], noise[i : i + 1])[0] for i in range(5)])
    target = schedule.training_target(x_0, timesteps, noise, prediction_type)
    assert float(loss) == pytest.approx(float(((0.5 * x_t - target) ** 2).mean()), rel=1e-12)
    assert torch.equal(seen[0][0], x_t)
    assert torch.equal(seen[0][1], timesteps)
