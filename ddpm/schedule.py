"""Noise schedules and the forward process.

Notation of Ho et al. 2020 ("Denoising Diffusion Probabilistic Models"): betas, alphas = 1 - betas, alphas_cumprod =
alpha-bar, the cumulative product of alphas. T is the number of training timesteps; timesteps run 0 .. T-1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def beta_schedule(name: str, num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Betas of a named schedule as diffusers builds them: float32 on the CPU, in torch's own arithmetic.

    torch.linspace in float32 differs from NumPy's in the last bit of a third of the entries, so the operations below
    are part of the contract, not only the formulas.

    Args:
        name: "linear" (Ho et al.), "scaled_linear" (linear in sqrt(beta)), "squaredcos_cap_v2" (Nichol & Dhariwal
            2021, eq. 17), "laplace" (Hang et al. 2024) or "sigmoid" (linear in the logit, from -6 to 6).
        num_train_timesteps: T, at least 1.
        beta_start, beta_end: first and last beta; not read by "squaredcos_cap_v2" and "laplace".

    Returns:
        float32 [T], each in (0, 1).

    Raises:
        ValueError: an unknown name.
    """
    steps = num_train_timesteps
    if name == "linear":
        return torch.linspace(beta_start, beta_end, steps, dtype=torch.float32)
    if name == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
    if name == "squaredcos_cap_v2":
        return _betas_from_alpha_bar(_cosine_alpha_bar, steps)
    if name == "laplace":
        return _betas_from_alpha_bar(_laplace_alpha_bar, steps)
    if name == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps)) * (beta_end - beta_start) + beta_start
    raise ValueError(f"beta_schedule {name!r} is not one of {', '.join(BETA_SCHEDULES)}")


def beta_table(name: str, num_train_timesteps: int, *, scaled: bool = True) -> Tensor:
    """Betas as OpenAI's, Ho et al.'s and lucidrains' code builds them: float64, by NumPy.

    Args:
        name: "linear" (1e-4 .. 0.02 at T = 1000), "cosine" (Nichol & Dhariwal 2021, eq. 17) or "sigmoid" (Jabri et al.
            2022, from -3 to 3, temperature 1).
        num_train_timesteps: T.
        scaled: "linear" is multiplied by 1000 / T, as all of them do but Ho et al.'s.

    Returns:
        float64 [T].

    Raises:
        ValueError: an unknown name, or betas that leave (0, 1).
    """
    steps = num_train_timesteps
    if name == "linear":
        scale = 1000 / steps if scaled else 1.0
        betas = torch.from_numpy(np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64))
    elif name == "cosine":
        betas = _betas_from_alpha_bar(_cosine_alpha_bar, steps, dtype=torch.float64)
    elif name == "sigmoid":
        betas = _betas_from_alpha_bar(_sigmoid_alpha_bar, steps, dtype=torch.float64)
    else:
        raise ValueError(f"beta schedule {name!r} is not one of linear, cosine, sigmoid")
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"the {name} schedule has betas outside (0, 1) for T = {steps}; take more timesteps")
    return betas


def _sigmoid_alpha_bar(t: float) -> float:
    """Jabri et al. 2022, algorithm 1: start -3, end 3, temperature 1."""
    start, end = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
    return (end - 1 / (1 + math.exp(3 - 6 * t))) / (end - start)


def _cosine_alpha_bar(t: float) -> float:
    """Nichol & Dhariwal 2021, eq. 17 (s = 0.008), before normalisation."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(t: float) -> float:
    """sqrt of the signal share snr / (1 + snr) with a Laplace-distributed log-SNR."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _betas_from_alpha_bar(
    alpha_bar: Callable[[float], float], steps: int, max_beta: float = 0.999, dtype: torch.dtype = torch.float32
) -> Tensor:
    """beta_i = min(1 - alpha_bar((i+1)/T) / alpha_bar(i/T), max_beta), in Python doubles, rounded once to dtype."""
    betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta) for i in range(steps)]
    return torch.tensor(betas, dtype=dtype)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that the last one is exactly 0 (Lin et al. 2023, Algorithm 1).

    Args:
        betas: float32 [T].

    Returns:
        float32 [T]; the last beta is 1.
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()  # sqrt(alphas_cumprod)
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    alphas_cumprod = root**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


@dataclass(frozen=True)
class NoiseSchedule:
    """The variances of the forward process, in the precision of the family that trained the network.

    Attributes:
        betas: [T], float32 (diffusers) or float64.
        alphas_cumprod: [T], same dtype; in [0, 1], decreasing.
    """

    betas: Tensor
    alphas_cumprod: Tensor

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """alphas_cumprod by torch.cumprod on the CPU, which accumulates float32 in double and rounds each entry."""
        return cls(betas, torch.cumprod(1.0 - betas, dim=0))

    @property
    def num_train_timesteps(self) -> int:
        return len(self.betas)

    def q_sample(self, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """q(x_t | x_0) in closed form (Ho et al. 2020, eq. 4): sqrt(a) x_0 + sqrt(1 - a) noise.

        Args:
            x_0: [N, C, H, W] in [-1, 1].
            timesteps: int64 [N].
            noise: standard normal, like x_0.

        Returns:
            x_t, like x_0.
        """
        a = self._gather(self.alphas_cumprod, timesteps, x_0)
        return a.sqrt() * x_0 + (1 - a).sqrt() * noise

    def q_step(self, x_prev: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """One forward step q(x_t | x_{t-1}) (Ho et al. 2020, eq. 2): sqrt(1 - beta) x_{t-1} + sqrt(beta) noise.

        Shapes as in `q_sample`.
        """
        beta = self._gather(self.betas, timesteps, x_prev)
        return (1 - beta).sqrt() * x_prev + beta.sqrt() * noise

    def training_target(self, x_0: Tensor, timesteps: Tensor, noise: Tensor, prediction_type: str) -> Tensor:
        """What the network is trained to output at x_t: the noise, x_0, or v = sqrt(a) noise - sqrt(1 - a) x_0.

        v is that of Salimans & Ho 2022, appendix D. Shapes as in `q_sample`.

        Raises:
            ValueError: an unknown prediction type.
        """
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x_0
        if prediction_type == "v_prediction":
            a = self._gather(self.alphas_cumprod, timesteps, x_0)
            return a.sqrt() * noise - (1 - a).sqrt() * x_0
        raise ValueError(f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")

    def loss(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        x_0: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        prediction_type: str = "epsilon",
    ) -> Tensor:
        """The simple training loss (Ho et al. 2020, eq. 14): mean squared error of the network at q(x_t | x_0).

        Args:
            network: called as network(x_t, timesteps), returns [N, C, H, W].
            x_0, timesteps, noise: as in `q_sample`.

        Returns:
            A scalar.
        """
        target = self.training_target(x_0, timesteps, noise, prediction_type)
        return torch.nn.functional.mse_loss(network(self.q_sample(x_0, timesteps, noise), timesteps), target)

    @staticmethod
    def _gather(table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
        """table[timesteps] as [N, 1, 1, 1], on the device and in the dtype of `like`."""
        rows = table.to(like.device)[timesteps].to(like.dtype)
        return rows.view(-1, *([1] * (like.dim() - 1)))
