"""Coefficients of one step of every family, each in that family's own precision and order.

Notation: a = alphas_cumprod[t]; p = alphas_cumprod of the next step of the chain (1 after the last); b = 1 - a,
q = 1 - p, A = a / p, B = 1 - A: the betas of the chain that is really walked, not of the schedule.

The ancestral step (Ho et al. 2020, algorithm 2 and eq. 7): the mean is (sqrt(p) B / b) x_0 + (sqrt(A) q / b) x_t; with
V = q / b B the standard deviation is

    fixed_small, fixed_small_log   sqrt(V)
    fixed_large                    sqrt(B)
    learned                        sqrt(v), v the network's second half, elementwise (diffusers)
    learned_range                  exp((f log B + (1 - f) log V) / 2), f = (v + 1) / 2, elementwise

The DDIM step (Song et al. 2021, eq. 12): with sigma = eta sqrt(q / b B) and d = sqrt(q - sigma^2), the result is
sqrt(p) x_0 + d epsilon + sigma z, where epsilon is the network's ("raw") or the one that the clipped x_0 implies.

What conditions a chain: the known region of an inpainted image is a sample of q(x_t | x_0), of mean sqrt(a) x_0 and
standard deviation sqrt(1 - a); a jump back from alphas_cumprod a to the smaller a' is one of q(x_t' | x_t), of mean
sqrt(a' / a) x_t and variance 1 - a' / a: one draw, distributed as the single steps of Lugmayr et al. 2022 are.

Why families differ: diffusers and ermongroup/ddim keep alphas_cumprod in float32, where b loses digits at small t (up
to 3e-4 of a step); OpenAI's code, pytorch_diffusion and lucidrains make tables in float64 and round them at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm.kernels.reverse_step import COLUMNS
from ddpm.rules import SamplingRules


def ancestral_row(a: Tensor, p: Tensor, rules: SamplingRules, *, noisy: bool, before: Tensor | None = None) -> Tensor:
    """One ancestral step.

    Args:
        a, p: 0-dim, in the schedule's precision.
        noisy: whether noise is added.
        before: alphas_cumprod of the step before, for the last step of OpenAI's code: its own V is 0, which has no
            logarithm, and V of the step before is taken instead. No noise shows it, but classifier guidance does.

    Returns:
        float32 [len(COLUMNS)].
    """
    if rules.convention == "diffusers":
        row = _scheduler_ancestral(a, p, rules, noisy)
    else:
        row = _table_ancestral(a, p, rules, noisy, before)
    return _as_row(row | {"clip": torch.tensor(rules.clip_range)})


def _as_row(values: dict[str, Tensor]) -> Tensor:
    zero = torch.tensor(0.0)
    return torch.stack([values.get(name, zero).float() for name in COLUMNS])


def _scheduler_ancestral(a: Tensor, p: Tensor, rules: SamplingRules, noisy: bool) -> dict[str, Tensor]:
    """diffusers' DDPMScheduler: float32, each operation rounded, in its order; V is at least 1e-20."""
    b, q = 1 - a, 1 - p
    alpha = a / p
    beta = 1 - alpha
    variance = torch.clamp(q / b * beta, min=1e-20)
    row = _prediction(a, rules.prediction_type, divides=True)
    row |= {"c0": (p**0.5 * beta) / b, "cx": alpha**0.5 * q / b}
    if rules.learned_variance:
        return row | {"s": torch.tensor(float(noisy)), "log_min": variance.log(), "log_max": beta.log()}
    if noisy:
        row["s"] = {
            "fixed_small": lambda: variance**0.5,
            "fixed_small_log": lambda: torch.exp(0.5 * variance.log()),
            "fixed_large": lambda: beta**0.5,
        }[rules.variance_type]()
    return row


def _table_ancestral(
    a: Tensor, p: Tensor, rules: SamplingRules, noisy: bool, before: Tensor | None
) -> dict[str, Tensor]:
    """The others' tables, in the schedule's precision (float32 for ermongroup/ddim), rounded to float32, then exp.

    log_min and log_max bound a learned variance; of a fixed one both are the logarithm.
    """
    b, q = 1 - a, 1 - p
    beta = 1 - a / p
    log_beta, log_variance = beta.log().float(), _log_small_variance(a, p)
    log_min = log_variance if before is None else _log_small_variance(before, a)
    row = _prediction(a, rules.prediction_type, divides=False)
    row |= {"c0": beta * p.sqrt() / b, "cx": q * (1 - beta).sqrt() / b}
    if rules.learned_variance:
        return row | {"s": torch.tensor(float(noisy)), "log_min": log_min, "log_max": log_beta}
    if rules.variance_type == "fixed_large":
        log_variance = log_beta if before is None else log_min
    if noisy:
        row["s"] = torch.exp(0.5 * log_variance)
    return row | {"log_min": log_variance, "log_max": log_variance}


def _log_small_variance(a: Tensor, p: Tensor) -> Tensor:
    """log V in float32; V is at least 1e-20."""
    return ((1 - p) / (1 - a) * (1 - a / p)).clamp(min=1e-20).log().float()


def _prediction(a: Tensor, prediction_type: str, *, divides: bool) -> dict[str, Tensor]:
    """kx, ke, kd such that x_0 = (kx x_t + ke out) / kd.

    Args:
        divides: of epsilon, as diffusers does it: right at a = 0 too (+-inf, clipped). Else with reciprocals.
    """
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    if prediction_type == "sample":
        return {"kx": zero, "ke": one, "kd": one}
    if prediction_type == "v_prediction":
        return {"kx": a.sqrt(), "ke": -(1 - a).sqrt(), "kd": one}
    if divides:
        return {"kx": one, "ke": -(1 - a).sqrt(), "kd": a.sqrt()}
    return {"kx": (1 / a).sqrt(), "ke": -(1 / a - 1).sqrt(), "kd": one}


def ddim_row(a: Tensor, p: Tensor, rules: SamplingRules) -> Tensor:
    """One DDIM step, with rules.eta and rules.ddim_epsilon.

    Every family takes alphas_cumprod in float32 here; what is a product of several factors in our form, and of none in
    theirs, is computed in double precision from float32 values and rounded once.

    Args:
        a, p: 0-dim, in the schedule's precision.

    Returns:
        float32 [len(COLUMNS)].
    """
    if rules.convention in ("diffusers", "pytorch_diffusion", "ermongroup"):  # the second samples with the third's code
        row = _prediction(a.float(), rules.prediction_type, divides=True)
    else:
        row = _prediction(a, rules.prediction_type, divides=False)
    # In float32 as every family has it: where eta is 1 and t small, sigma^2 nearly cancels 1 - p.
    a, p = a.float(), p.float()
    sigma = rules.eta * ((1 - p) / (1 - a) * (1 - a / p)).clamp(min=0).sqrt()
    d = float((1 - p - sigma**2).clamp(min=0).sqrt())
    alpha, beta, prev = float(a), float(1 - a), float(p)
    root_a, root_b, root_p = math.sqrt(alpha), math.sqrt(beta), math.sqrt(prev)
    if rules.ddim_epsilon == "rederived":  # epsilon = (x_t - sqrt(a) x_0) / sqrt(b)
        c0, cx, ce = root_p - d * root_a / root_b, d / root_b, 0.0
    elif rules.prediction_type == "epsilon":
        c0, cx, ce = root_p, 0.0, d
    elif rules.prediction_type == "sample":  # epsilon = (x_t - sqrt(a) out) / sqrt(b), whatever the clip did to x_0
        c0, cx, ce = root_p, d / root_b, -d * root_a / root_b
    else:  # epsilon = sqrt(b) x_t + sqrt(a) out
        c0, cx, ce = root_p, d * root_b, d * root_a
    values = {"c0": c0, "cx": cx, "ce": ce, "s": float(sigma), "clip": rules.clip_range}
    return _as_row(row | {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})


def conditioned_row(row: Tensor, reached: Tensor, target: Tensor, guidance: float) -> Tensor:
    """The row with its columns of guidance and inpainting.

    Args:
        row: of `ancestral_row` or `ddim_row`.
        reached: alphas_cumprod of the state that the step leads to, 1 at the end of the chain; 0-dim.
        target: of the state that it then jumps back to; the same where it does not.
        guidance: scale of classifier-free guidance.
    """
    a, ratio = float(reached), float(target.double() / reached.double())
    columns = {
        "guidance": guidance,
        "known_mean": math.sqrt(a),
        "known_std": math.sqrt(1 - a),
        "jump_mean": math.sqrt(ratio),
        "jump_std": math.sqrt(1 - ratio),
    }
    row = row.clone()
    row[[COLUMNS.index(name) for name in columns]] = torch.tensor([*columns.values()], dtype=torch.float64).float()
    return row
