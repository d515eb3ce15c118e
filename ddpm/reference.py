"""The oracle: Ho et al. 2020, algorithm 2, in plain PyTorch, one line per line of the paper.

Slow and readable on purpose. It shares the schedule and the network with the fast path, and nothing else: neither the
step table nor the kernels. Tests hold the fast path against it, and it against the original libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule


@torch.no_grad()
def sample_reference(
    network: Callable[..., Tensor],
    schedule: NoiseSchedule,
    rules: SamplingRules,
    timesteps: Sequence[int],
    x_T: Tensor,
    draw: Callable[[int], Tensor],
    *,
    self_condition: bool = False,
) -> Tensor:
    """x_0 from x_T.

    Args:
        network: called as network(x_t, t) with t a 0-dim int64 tensor; returns [N, C or 2C, H, W].
        schedule: alphas_cumprod are read in its own precision.
        rules: prediction, variance and clip.
        timesteps: strictly descending.
        x_T: standard normal, float32 [N, C, H, W].
        draw: draw(i) returns step i's standard normal noise, like x_T; called only where t > 0.
        self_condition: the network is called as network(x_t, t, x_0), x_0 being the estimate of the step before, zeros
            in the first (Chen et al. 2022, "Analog Bits").

    Returns:
        float32 [N, C, H, W], not clamped.
    """
    x, x_0 = x_T, torch.zeros_like(x_T)
    for i, t in enumerate(timesteps):
        alpha_bar = schedule.alphas_cumprod[t]
        alpha_bar_prev = schedule.alphas_cumprod[timesteps[i + 1]] if i + 1 < len(timesteps) else torch.tensor(1.0)
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha

        t_now = torch.tensor(t, device=x.device)
        out = network(x, t_now, x_0) if self_condition else network(x, t_now)
        prediction, v = out.chunk(2, dim=1) if rules.learned_variance else (out, None)
        x_0 = clip(predict_x_0(prediction, x, alpha_bar, rules.prediction_type), rules)

        # eq. 7: the mean of q(x_{t-1} | x_t, x_0)
        mean = (alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)) * x_0
        mean = mean + (alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)) * x
        x = mean
        if t > 0:
            posterior_variance = ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).clamp(min=1e-20)
            x = mean + standard_deviation(posterior_variance, beta, v, rules.variance_type) * draw(i)
    return x


def predict_x_0(prediction: Tensor, x: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """x_0 from what the network predicts (Ho et al. 2020, eq. 15; Salimans & Ho 2022, appendix D for v)."""
    if prediction_type == "epsilon":
        return (x - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * prediction
    return prediction


def clip(x_0: Tensor, rules: SamplingRules) -> Tensor:
    """Clamp, or the dynamic threshold of Saharia et al. 2022 (section 2.3): a quantile of |x_0| of each image."""
    if rules.clip == "clamp":
        return x_0.clamp(-rules.clip_range, rules.clip_range)
    if rules.clip == "dynamic":
        s = torch.quantile(x_0.abs().flatten(1), rules.threshold_ratio, dim=1)
        s = s.clamp(1, rules.threshold_max).view(-1, 1, 1, 1)
        return x_0.clamp(-s, s) / s
    return x_0


def standard_deviation(posterior_variance: Tensor, beta: Tensor, v: Tensor | None, variance_type: str) -> Tensor:
    """Of the reverse step: fixed (Ho et al. 2020, section 3.2) or learned (Nichol & Dhariwal 2021, eq. 15)."""
    if variance_type == "fixed_large":
        return beta.sqrt()
    if variance_type == "learned":
        assert v is not None
        return v.sqrt()
    if variance_type == "learned_range":
        assert v is not None
        f = (v + 1) / 2
        return torch.exp(0.5 * (f * beta.log() + (1 - f) * posterior_variance.log()))
    return posterior_variance.sqrt()
