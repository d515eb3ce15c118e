"""Conditional sampling as the papers define it: RePaint, SDEdit, classifier-free guidance; slow and plain.

This is what the tests compare with. It shares no code with the package and is written from the papers: Lugmayr et al.
2022 (RePaint, arXiv 2201.09865), Meng et al. 2022 (SDEdit), Song et al. 2021 (DDIM), Ho & Salimans 2022 (guidance).

A chain is a descending sequence of S timesteps, a part of 0 ... T-1. Its state s, 0 <= s < S, is an image as noisy as
at timestep timesteps[S-1-s]; state -1 is the clean image. abar is alpha-bar, the product of the alphas; that of state
-1 is 1. Coefficients are float64, from `alphas_cumprod` [T]; the state x is float32. All noise comes from
draw(kind) -> standard normal noise of x's shape, which is called only where the noise is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor], Tensor]  # x [N, C, H, W], t int64 [N] -> epsilon [N, C, H, W]
Draw = Callable[[str], Tensor]


def _chain(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> tuple[list[int], list[float]]:
    """(timestep of each state, abar of each state), ascending; index -1 of abar, the last, is the clean image's, 1."""
    ascending = [int(t) for t in reversed(list(timesteps))]
    if not ascending or any(a >= b for a, b in pairwise(ascending)):
        raise ValueError(f"the chain must be descending and not empty: {list(timesteps)}")
    table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).tolist()
    return ascending, [*(table[t] for t in ascending), 1.0]


def _epsilon(network: Network, x: Tensor, t: int) -> Tensor:
    return network(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))


def _diffused(image: Tensor, abar: float, z: Tensor) -> Tensor:
    """A sample of q(x_t | x_0 = image); with abar a ratio of two abars, of q(x_{t+j} | x_t = image)."""
    return math.sqrt(abar) * image + math.sqrt(1 - abar) * z


def jump_states(length: int, passes: int, jump: int) -> list[int]:
    """RePaint's walk over the states, length-1 ... -1 (section 4.2, appendix B).

    A reverse step goes to the state below. When one reaches a jump point, which are 0, jump, 2 jump, ... below
    length - jump, and that point has jumps left of its passes - 1, the walk rises by `jump`. The rise is listed as one
    entry (the paper's figure goes through the states between), so that each entry is the one before minus 1, a reverse
    step, or plus `jump`. There are length + (passes - 1) jump (number of jump points) reverse steps.
    """
    if min(length, passes, jump) < 1:
        raise ValueError(f"length, passes and jump must be at least 1: {length}, {passes}, {jump}")
    left = dict.fromkeys(range(0, length - jump, jump), passes - 1)  # jumps left
    states = [length - 1]
    while states[-1] > -1:
        reached = states[-1] - 1
        states.append(reached)
        if left.get(reached, 0) > 0:
            left[reached] -= 1
            states.append(reached + jump)
    return states


@torch.no_grad()
def repaint(
    network: Network,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    x_T: Tensor,
    image: Tensor,
    mask: Tensor,
    passes: int,
    jump: int,
    draw: Draw,
    clip: bool = True,
) -> Tensor:
    """Inpainting from noise x_T [N, C, H, W]: RePaint's algorithm 1 with resampling; mask 1 = known, 0 = to be filled.

    A step from state s to s-1 is, in this order:
      - the ancestral step with the small variance: beta (1 - abar_{s-1}) / (1 - abar_s), beta = 1 - abar_s/abar_{s-1};
        it adds draw("step") unless it reaches -1, where that variance is 0;
      - the known region of the new state becomes a sample of q(x_{s-1} | x_0 = image), with draw("known") unless it
        reaches -1, where that is the image itself. The factor of the noise is sqrt(1 - abar): algorithm 1 writes
        1 - abar, but that is the variance in equation 8a;
      - if the walk goes up from here, by j, the whole image becomes a sample of q(x_{s-1+j} | x_{s-1}) with one
        draw("jump"). With r = abar_{s-1+j} / abar_{s-1} it is N(sqrt(r) x, 1 - r), the distribution of j forward steps:
        one of ratio a and one of ratio b multiply x by sqrt(a b) and leave a variance of b (1 - a) + (1 - b) = 1 - a b.
    """
    steps, abar = _chain(alphas_cumprod, timesteps)
    walk = jump_states(len(steps), passes, jump)
    known = mask.to(x_T.dtype)
    x = x_T
    for state, new in pairwise(walk):
        if new > state:
            x = _diffused(x, abar[new] / abar[state], draw("jump"))
            continue
        a, a_new = abar[state], abar[new]
        beta = 1 - a / a_new
        eps = _epsilon(network, x, steps[state])
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        if clip:
            x0 = x0.clamp(-1, 1)
        x = math.sqrt(a_new) * beta / (1 - a) * x0 + math.sqrt(a / a_new) * (1 - a_new) / (1 - a) * x
        if new > -1:
            x = x + math.sqrt(beta * (1 - a_new) / (1 - a)) * draw("step")
        x_known = _diffused(image, a_new, draw("known")) if new > -1 else image
        x = known * x_known + (1 - known) * x
    return x


@torch.no_grad()
def sdedit(
    network: Network,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    image: Tensor,
    strength: float,
    draw: Draw,
    eta: float = 0.0,
) -> Tensor:
    """SDEdit: noise the image with draw("start"), then denoise it by the last int(S strength) steps of the chain.

    Those are DDIM steps (Song et al. 2021, equation 12) without a clip; each adds draw("step") if eta > 0, but not the
    last, whose sigma is 0.
    """
    steps, abar = _chain(alphas_cumprod, timesteps)
    count = _count(len(steps), strength)
    x = _diffused(image, abar[count - 1], draw("start"))
    for state in reversed(range(count)):
        a, a_new = abar[state], abar[state - 1]  # of state -1, the last entry: 1
        sigma = eta * math.sqrt((1 - a_new) / (1 - a)) * math.sqrt(1 - a / a_new)
        eps = _epsilon(network, x, steps[state])
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(a_new) * x0 + math.sqrt(1 - a_new - sigma**2) * eps
        if eta > 0 and state > 0:
            x = x + sigma * draw("step")
    return x


def _count(length: int, strength: float) -> int:
    """How many steps SDEdit takes of a chain of that length."""
    count = int(length * strength)
    if not 1 <= count <= length:
        raise ValueError(f"strength {strength} takes {count} of {length} steps")
    return count


class GaussianToy(nn.Module):
    """The exact optimal epsilon network of data whose every element is N(mean, variance), independently.

    x = sqrt(abar) x_0 + sqrt(1 - abar) e has mean sqrt(abar) mean, variance abar variance + 1 - abar, and Cov(e, x) is
    sqrt(1 - abar). So, as they are jointly normal,

        E[e | x] = sqrt(1 - abar) (x - sqrt(abar) mean) / (abar variance + 1 - abar).
    """

    alphas_cumprod: Tensor

    def __init__(self, alphas_cumprod: Tensor, mean: float, variance: float) -> None:
        super().__init__()
        self.register_buffer("alphas_cumprod", torch.as_tensor(alphas_cumprod, dtype=torch.float64))
        self.mean, self.variance = mean, variance

    def epsilon(self, x: Tensor, t: Tensor) -> Tensor:
        """x [N, C, H, W], t int64 [N] or a scalar -> [N, C, H, W] in x's dtype, from float64 coefficients."""
        abar = self.alphas_cumprod[t].reshape(-1, *[1] * (x.ndim - 1))
        scale = (1 - abar).sqrt() / (abar * self.variance + 1 - abar)
        return scale.to(x.dtype) * (x - (abar.sqrt() * self.mean).to(x.dtype))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.epsilon(x, t)


def sdedit_closed_form(
    toy: GaussianToy,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    image: Tensor,
    strength: float,
    z: Tensor,
) -> Tensor:
    """What `sdedit` with eta = 0 and draw("start") = z gives for the toy: A x_start + B, in float64.

    Let y = x - sqrt(abar) mean and u = (sqrt(variance abar), sqrt(1 - abar)), so that |u|^2 is the variance of x. Then
    epsilon = sqrt(1 - abar) y / |u|^2 and x_0 = mean + sqrt(abar) variance y / |u|^2, hence a step from abar to abar'
    is y' = y (sqrt(abar abar') variance + sqrt(1 - abar) sqrt(1 - abar')) / |u|^2 = y (u . u') / |u|^2
          = y (|u'| / |u|) cos(angle between u and u').
    Over the steps the lengths cancel but for the first and the last, and that of the clean image is sqrt(variance):

        A = sqrt(variance) / |u_start| prod cos(angle_s - angle_{s-1}),   B = mean (1 - A sqrt(abar_start)).
    """
    steps, abar = _chain(alphas_cumprod, timesteps)
    count = _count(len(steps), strength)
    a = torch.tensor([1.0, *abar[:count]], dtype=torch.float64)  # clean image ... start
    angles = torch.atan2((1 - a).sqrt(), (toy.variance * a).sqrt())
    start = abar[count - 1]
    length = math.sqrt(toy.variance * start + 1 - start)
    A = math.sqrt(toy.variance) / length * float(angles.diff().cos().prod())
    B = toy.mean * (1 - A * math.sqrt(start))
    return A * _diffused(image.double(), start, z.double()) + B


def guided(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    labels: Tensor,
    null_label: int,
    scale: float,
) -> Tensor:
    """Classifier-free guidance by two forwards of network(x, t, labels): null + scale (conditional - null).

    scale 1 is the conditional network and 0 the unconditional one; Ho & Salimans' w is scale - 1. Only the first C
    channels, epsilon, are guided; any more, a learned variance, are the conditional ones (as in GLIDE and DiT).
    """
    c = x.shape[1]
    conditional = network(x, t, labels)
    null = network(x, t, torch.full_like(labels, null_label))
    return torch.cat([null[:, :c] + scale * (conditional[:, :c] - null[:, :c]), conditional[:, c:]], dim=1)
