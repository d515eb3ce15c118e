"""Coefficients of the steps of every family, each in that family's own precision and order.

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

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ddpm.kernels.reverse_step import COLUMNS
from ddpm.rules import SamplingRules

Columns: TypeAlias = dict[str, Tensor | float]


def ancestral_rows(a: Tensor, p: Tensor, rules: SamplingRules, *, noisy: Tensor) -> Tensor:
    """The ancestral steps of a chain, in order of their states: its last step first.

    Args:
        a, p: [S], in the schedule's precision.
        noisy: bool [S], whether noise is added.

    Returns:
        float32 [S, len(COLUMNS)].
    """
    if rules.convention == "diffusers":
        columns = _scheduler_ancestral(a, p, rules, noisy)
    else:
        columns = _table_ancestral(a, p, rules, noisy)
    return _with_columns(torch.zeros(len(a), len(COLUMNS), dtype=torch.float32), columns | {"clip": rules.clip_range})


def _with_columns(rows: Tensor, columns: Columns) -> Tensor:
    """The rows, into which columns are written: [S], or one number for all steps; rounded to float32."""
    for name, values in columns.items():
        rows[:, COLUMNS.index(name)] = values
    return rows


def _scheduler_ancestral(a: Tensor, p: Tensor, rules: SamplingRules, noisy: Tensor) -> Columns:
    """diffusers' DDPMScheduler: float32, each operation rounded, in its order; V is at least 1e-20."""
    b, q = 1 - a, 1 - p
    alpha = a / p
    beta = 1 - alpha
    variance = torch.clamp(q / b * beta, min=1e-20)
    columns = _prediction(a, rules.prediction_type, divides=True)
    columns |= {"c0": (p**0.5 * beta) / b, "cx": alpha**0.5 * q / b}
    if rules.learned_variance:
        return columns | {"s": noisy, "log_min": variance.log(), "log_max": beta.log()}
    std = {
        "fixed_small": lambda: variance**0.5,
        "fixed_small_log": lambda: torch.exp(0.5 * variance.log()),
        "fixed_large": lambda: beta**0.5,
    }[rules.variance_type]()
    return columns | {"s": torch.where(noisy, std, 0.0)}


def _table_ancestral(a: Tensor, p: Tensor, rules: SamplingRules, noisy: Tensor) -> Columns:
    """The others' tables, in the schedule's precision (float32 for ermongroup/ddim), rounded to float32, then exp.

    log_min and log_max bound a learned variance; of a fixed one both are the logarithm. V of the last step is 0, which
    has no logarithm: OpenAI's code takes V of the step before where it needs one, and so for fixed_large. No noise
    shows it, but classifier guidance does.
    """
    b, q = 1 - a, 1 - p
    beta = 1 - a / p
    log_beta = beta.log().float()
    log_variance = (q / b * beta).clamp(min=1e-20).log().float()  # V is at least 1e-20
    log_min, log_large = log_variance, log_beta
    if rules.convention == "openai" and len(a) > 1:
        log_min, log_large = (torch.cat([log_variance[1:2], other[1:]]) for other in (log_variance, log_beta))
    columns = _prediction(a, rules.prediction_type, divides=False)
    columns |= {"c0": beta * p.sqrt() / b, "cx": q * (1 - beta).sqrt() / b}
    if rules.learned_variance:
        return columns | {"s": noisy, "log_min": log_min, "log_max": log_beta}
    log_fixed = log_large if rules.variance_type == "fixed_large" else log_variance
    std = torch.exp(0.5 * log_fixed)
    return columns | {"s": torch.where(noisy, std, 0.0), "log_min": log_fixed, "log_max": log_fixed}


def _prediction(a: Tensor, prediction_type: str, *, divides: bool) -> Columns:
    """kx, ke, kd such that x_0 = (kx x_t + ke out) / kd.

    Args:
        divides: of epsilon, as diffusers does it: right at a = 0 too (+-inf, clipped). Else with reciprocals.
    """
    if prediction_type == "sample":
        return {"kx": 0.0, "ke": 1.0, "kd": 1.0}
    if prediction_type == "v_prediction":
        return {"kx": a.sqrt(), "ke": -(1 - a).sqrt(), "kd": 1.0}
    if divides:
        return {"kx": 1.0, "ke": -(1 - a).sqrt(), "kd": a.sqrt()}
    return {"kx": (1 / a).sqrt(), "ke": -(1 / a - 1).sqrt(), "kd": 1.0}


def ddim_rows(a: Tensor, p: Tensor, rules: SamplingRules) -> Tensor:
    """The DDIM steps of a chain, with rules.eta and rules.ddim_epsilon.

    Every family takes alphas_cumprod in float32 here; what is a product of several factors in our form, and of none in
    theirs, is computed in double precision from float32 values and rounded once.

    Args:
        a, p: [S], in the schedule's precision.

    Returns:
        float32 [S, len(COLUMNS)].
    """
    if rules.convention in ("diffusers", "pytorch_diffusion", "ermongroup"):  # the second samples with the third's code
        columns = _prediction(a.float(), rules.prediction_type, divides=True)
    else:
        columns = _prediction(a, rules.prediction_type, divides=False)
    # In float32 as every family has it: where eta is 1 and t small, sigma^2 nearly cancels 1 - p.
    a, p = a.float(), p.float()
    sigma = rules.eta * ((1 - p) / (1 - a) * (1 - a / p)).clamp(min=0).sqrt()
    d = (1 - p - sigma**2).clamp(min=0).sqrt().double()
    root_a, root_b, root_p = (_double_root(values) for values in (a, 1 - a, p))
    c0: Tensor | float
    cx: Tensor | float
    ce: Tensor | float
    if rules.ddim_epsilon == "rederived":  # epsilon = (x_t - sqrt(a) x_0) / sqrt(b)
        c0, cx, ce = root_p - d * root_a / root_b, d / root_b, 0.0
    elif rules.prediction_type == "epsilon":
        c0, cx, ce = root_p, 0.0, d
    elif rules.prediction_type == "sample":  # epsilon = (x_t - sqrt(a) out) / sqrt(b), whatever the clip did to x_0
        c0, cx, ce = root_p, d / root_b, -d * root_a / root_b
    else:  # epsilon = sqrt(b) x_t + sqrt(a) out
        c0, cx, ce = root_p, d * root_b, d * root_a
    columns |= {"c0": c0, "cx": cx, "ce": ce, "s": sigma, "clip": rules.clip_range}
    return _with_columns(torch.zeros(len(a), len(COLUMNS), dtype=torch.float32), columns)


def _double_root(values: Tensor) -> Tensor:
    """Square roots in double precision, correctly rounded; torch's own miss the last bit of some, with MKL."""
    return torch.from_numpy(np.sqrt(values.double().numpy()))


def conditioned_rows(rows: Tensor, reached: Tensor, target: Tensor, guidance: float) -> Tensor:
    """Copies of the rows with their columns of guidance and inpainting.

    Args:
        rows: of `ancestral_rows` or `ddim_rows`, in any order, [S, len(COLUMNS)].
        reached: alphas_cumprod of the state that each step leads to, 1 at the end of the chain; [S].
        target: of the state that it then jumps back to; the same where it does not.
        guidance: scale of classifier-free guidance.
    """
    a = reached.double()
    ratio = target.double() / a
    columns: Columns = {
        "guidance": guidance,
        "known_mean": _double_root(a),
        "known_std": _double_root(1 - a),
        "jump_mean": _double_root(ratio),
        "jump_std": _double_root(1 - ratio),
    }
    return _with_columns(rows.clone(), columns)
