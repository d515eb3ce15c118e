"""The step table against diffusers' DDPMScheduler: timesteps exactly, one step within 1e-6."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddpm.checkpoints.diffusers import SCHEDULER_DEFAULTS, _rules, _schedule
from ddpm.kernels.reverse_step import COLUMNS, NONFINITE_NONE, reverse_step
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule, beta_schedule
from ddpm.steps import StepTable, step_table


def linear(total: int = 1000) -> NoiseSchedule:
    return NoiseSchedule.from_betas(beta_schedule("linear", total))


STEPS: dict[str, dict[str, Any]] = {
    "fixed_small": {},
    "fixed_small_log": {"variance_type": "fixed_small_log"},
    "fixed_large": {"variance_type": "fixed_large"},
    "learned": {"variance_type": "learned"},
    "learned_range": {"variance_type": "learned_range"},
    "sample": {"prediction_type": "sample"},
    "v_prediction": {"prediction_type": "v_prediction"},
    "no clip, sample": {"clip_sample": False, "prediction_type": "sample"},
    "no clip, v": {"clip_sample": False, "prediction_type": "v_prediction"},
    "clip range": {"clip_sample_range": 0.5},
    "thresholding": {"thresholding": True},
    "thresholding, max": {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.8},
    "thresholding, no clip, learned_range": {
        "thresholding": True,
        "clip_sample": False,
        "sample_max_value": 2.0,
        "variance_type": "learned_range",
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "laplace": {"beta_schedule": "laplace", "variance_type": "fixed_large"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "zero-SNR, v": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "zero-SNR, epsilon": {"rescale_betas_zero_snr": True},
    "zero-SNR, sample": {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
}
# Exact equality is not asked of these: a power or exponential of a tensor may be rounded in another way.
NOT_BITWISE = {"learned", "learned_range", "thresholding, no clip, learned_range"}


def both_chains(settings: dict[str, Any], steps: int, spacing: str) -> tuple[StepTable, DDPMScheduler]:
    settings = settings | {"timestep_spacing": spacing}
    scheduler = DDPMScheduler(**settings)
    scheduler.set_timesteps(steps)
    merged, path = SCHEDULER_DEFAULTS | settings, Path("scheduler_config.json")
    return step_table(_schedule(merged, path), _rules(merged, path), steps), scheduler


def both_steps(table: StepTable, scheduler: DDPMScheduler, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, diffusers') x_{t-1} of step i of a chain, from the same x_t, output and noise."""
    rules = table.rules
    t = int(scheduler.timesteps[i])
    assert int(table.timesteps[i]) == t

    g = torch.Generator().manual_seed(i)
    x = torch.randn(3, 3, 5, 7, generator=g)
    out = torch.randn(3, 6 if rules.learned_variance else 3, 5, 7, generator=g)
    if rules.variance_type == "learned":
        out[:, 3:] = out[:, 3:].abs()  # a variance
    source = torch.Generator().manual_seed(99)
    theirs = scheduler.step(out, t, x, generator=source).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(99))
    ours = x.clone()
    flag = torch.full((1,), NONFINITE_NONE, dtype=torch.int64)
    reverse_step(
        ours,
        out,
        table.coefficients,
        torch.tensor([i]),
        flag,
        clip=rules.clip,
        variance=table.variance,
        seeds=None,
        noise=noise,
        x0=None,
        threshold_ratio=rules.threshold_ratio,
        threshold_max=rules.threshold_max,
    )
    assert int(flag) == NONFINITE_NONE
    return ours, theirs


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("steps", "spacing"), [(1000, "leading"), (50, "trailing"), (7, "linspace")])
def test_one_step_equals_diffusers(name, steps, spacing):
    table, scheduler = both_chains(STEPS[name], steps, spacing)
    for i in sorted({0, 1, steps // 3, steps // 2, steps - 2, steps - 1}):
        ours, theirs = both_steps(table, scheduler, i)
        assert theirs.isfinite().all()
        if name in NOT_BITWISE:
            assert float((ours - theirs).abs().max()) <= 1e-6, (i, float((ours - theirs).abs().max()))
        else:
            assert torch.equal(ours, theirs), (i, float((ours - theirs).abs().max()))


def test_one_step_without_clip_of_an_epsilon_prediction():
    """x_0 is unbounded there (1/sqrt(a) is 159 at t = 999), so the bound is relative."""
    table, scheduler = both_chains({"clip_sample": False}, 1000, "leading")
    for i in (0, 1, 333, 998, 999):
        ours, theirs = both_steps(table, scheduler, i)
        assert float((ours - theirs).abs().max()) <= 1e-6 * max(1.0, float(theirs.abs().max()))


def test_the_last_step_of_a_chain_that_ends_above_zero_draws():
    rules = SamplingRules(variance_type="fixed_large", timestep_spacing="trailing")
    table = step_table(linear(), rules, 50)
    assert int(table.timesteps[-1]) == 19
    assert table.draws == ((0,),) * 50
    assert float(table.coefficients[-1, COLUMNS.index("s")]) == pytest.approx(0.076, abs=1e-3)
    leading = step_table(linear(), SamplingRules(), 50)
    assert leading.draws == ((0,),) * 49 + ((),)
    assert float(leading.coefficients[-1, COLUMNS.index("s")]) == 0.0


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_does_not_draw_at_zero(variance):
    table = step_table(linear(), SamplingRules(variance_type=variance), 10)
    assert table.draws[-1] == ()
    assert float(table.coefficients[-1, COLUMNS.index("s")]) == 0.0
    assert table.variance == variance


def test_the_last_step_at_zero_returns_x_0():
    row = step_table(linear(), SamplingRules(), 1000).coefficients[-1]
    assert float(row[COLUMNS.index("c0")]) == 1.0
    assert float(row[COLUMNS.index("cx")]) == 0.0


@pytest.mark.parametrize("variance", ["learned_range", "fixed_large"])
def test_a_chain_of_one_step_has_no_step_before_it(variance):
    """OpenAI's code takes V of that one for the last step's, of which it is 0."""
    table = step_table(linear(), SamplingRules(convention="openai", variance_type=variance), timesteps=[500])
    log_beta = math.log(1 - float(linear().alphas_cumprod[500]))
    low = math.log(1e-20) if variance == "learned_range" else log_beta
    columns = [COLUMNS.index(name) for name in ("log_min", "log_max")]
    assert table.coefficients[0, columns].tolist() == pytest.approx([low, log_beta], rel=1e-6)


def test_fixed_large_log_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"fixed_large_log.*NaN.*set variance_type to 'fixed_large'"):
        SamplingRules(variance_type="fixed_large_log")


@pytest.mark.parametrize(
    ("name", "value"),
    [("prediction_type", "eps"), ("variance_type", "big"), ("clip", "soft"), ("timestep_spacing", "karras")],
)
def test_unknown_rules_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} '{value}' is not one of"):
        SamplingRules(**{name: value})


def test_timesteps_exclude_steps_and_spacing():
    for other in ({"steps": 3}, {"spacing": "trailing"}):
        with pytest.raises(ValueError, match="either timesteps or steps and spacing, not both"):
            step_table(linear(), SamplingRules(), timesteps=[5, 1], **other)


def test_no_steps_means_all_of_them_and_spacing_overrides():
    assert step_table(linear(10), SamplingRules()).timesteps.tolist() == list(range(9, -1, -1))
    assert step_table(linear(), SamplingRules(), 4, spacing="trailing").timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("total", "steps"), [(100, 100), (1000, 50), (1000, 1000)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("epsilon", ["raw", "rederived"])
def test_one_ddim_step_equals_diffusers(eta, total, steps, prediction_type, epsilon):
    """At every step of a chain; whole chains of random networks, which magnify roundings, are in test_parity."""
    settings = {"num_train_timesteps": total, "prediction_type": prediction_type}
    merged, path = SCHEDULER_DEFAULTS | settings, Path("scheduler_config.json")
    table = step_table(
        _schedule(merged, path), _rules(merged, path), steps, sampler="ddim", eta=eta, ddim_epsilon=epsilon
    )
    scheduler = DDIMScheduler(**settings)
    scheduler.set_timesteps(steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    assert table.draws == ((0,) if eta > 0 else (),) * steps
    for i, t in enumerate(scheduler.timesteps):
        g = torch.Generator().manual_seed(i)
        x, out, noise = (torch.randn(2, 3, 4, 4, generator=g) for _ in range(3))
        theirs = scheduler.step(
            out, int(t), x, eta=eta, use_clipped_model_output=epsilon == "rederived", variance_noise=noise
        ).prev_sample
        ours, flag = x.clone(), torch.full((1,), NONFINITE_NONE)
        reverse_step(ours, out, table.coefficients, torch.tensor([i]), flag, clip="clamp", noise=noise)
        # The re-derived epsilon is (x - sqrt(a) x_0) / sqrt(b): at t = 0 two numbers cancel, and 1 / sqrt(b) is 100.
        assert float((ours - theirs).abs().max()) <= (1e-6 if epsilon == "raw" else 5e-6), int(t)
