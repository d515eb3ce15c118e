"""denoising-diffusion-pytorch's `GaussianDiffusion` over a `ddpm.Sampler`, for code that samples with it.

    from ddpm.dropins.lucidrains import GaussianDiffusion

    diffusion = GaussianDiffusion(ddpm.load("model-100.pt", image_size=128), sampling_timesteps=250)
    images = diffusion.sample(batch_size=4)  # as it was

The images are the package's for the same torch.manual_seed: all noise comes from the device's global generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm.checkpoints.lucidrains import OBJECTIVES
from ddpm.checks import boolean, is_number, positive_integer
from ddpm.dropins.checks import absent, check_device, check_sampler, check_shape
from ddpm.lucidrains import LucidrainsUNet
from ddpm.noise import default_generator
from ddpm.sampler import Sampler

ORIGINAL = "denoising-diffusion-pytorch"


class GaussianDiffusion:
    """The sampling methods and attributes of the package's class of this name (and of LearnedGaussianDiffusion).

    Args:
        sampler: what `ddpm.load` gives for a checkpoint of denoising-diffusion-pytorch.
        sampling_timesteps: length of a DDIM chain; None, or T, is ancestral sampling over all T.
        ddim_sampling_eta: 0 (deterministic) to 1.
        auto_normalize: give images in [0, 1]; else in [-1, 1], as they are in the chain.

    Attributes:
        image_size: (H, W).
        channels: of the images.
        num_timesteps: T.
        sampling_timesteps, ddim_sampling_eta: as given.
        is_ddim_sampling: whether `sample` is `ddim_sample`.
        objective: "pred_noise", "pred_x0" or "pred_v".
        self_condition: whether the network sees the previous step's x_0.
        device: the sampler's.

    Raises:
        ValueError: another family's sampler, or a setting out of range.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        sampling_timesteps: int | None = None,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
    ):
        checkpoint = check_sampler(sampler, LucidrainsUNet, ORIGINAL)
        if not is_number(ddim_sampling_eta) or not 0 <= ddim_sampling_eta <= 1:
            raise ValueError(f"ddim_sampling_eta must be a number from 0 to 1; got {ddim_sampling_eta!r}")
        total = checkpoint.schedule.num_train_timesteps
        length = total if sampling_timesteps is None else positive_integer("sampling_timesteps", sampling_timesteps)
        if length > total:
            raise ValueError(f"sampling_timesteps={length} is more than the checkpoint's {total} training timesteps")
        self.image_size = checkpoint.sample_size
        self.channels = checkpoint.image_channels
        self.num_timesteps = total
        self.sampling_timesteps = length
        self.is_ddim_sampling = length < total
        self.ddim_sampling_eta = ddim_sampling_eta
        self.objective = {ours: name for name, ours in OBJECTIVES.items()}[checkpoint.rules.prediction_type]
        self.self_condition = checkpoint.network.self_condition
        self.device = sampler.device
        self._sampler, self._auto_normalize = sampler, boolean("auto_normalize", auto_normalize)

    def __getattr__(self, name: str) -> Any:
        raise absent(self, name, ORIGINAL)

    def eval(self) -> GaussianDiffusion:
        """Nothing: there is no other mode than sampling."""
        return self

    def to(self, device: str | torch.device) -> GaussianDiffusion:
        """Nothing, if it is the device where the sampler is.

        Raises:
            ValueError: another: the captured loops stay where they are.
        """
        check_device(device, self._sampler)
        return self

    def cuda(self, device: int | None = None) -> GaussianDiffusion:
        """`to` a GPU."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False) -> Tensor:
        """Draw images, by `ddim_sample` where sampling_timesteps is below T, else by `p_sample_loop`.

        Args:
            batch_size: number of images, b.
            return_all_timesteps: give every state of the chain, the first noise included.

        Returns:
            float32 [b, C, H, W] in [0, 1] on the device; [b, steps + 1, C, H, W] with every state.

        Raises:
            ValueError: a bad argument.
            NonFiniteError: the network's output was NaN or infinite.
        """
        shape = (batch_size, self.channels, *self.image_size)
        return (self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop)(shape, return_all_timesteps)

    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Draw shape[0] images by ancestral sampling over all T timesteps; shape is (b, C, H, W), the rest as above."""
        return self._draw(shape, return_all_timesteps, sampler="ddpm")

    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Draw shape[0] images by DDIM over sampling_timesteps timesteps; see `p_sample_loop`."""
        chain = {"sampler": "ddim", "steps": self.sampling_timesteps, "eta": self.ddim_sampling_eta}
        return self._draw(shape, return_all_timesteps, **chain)

    def _draw(self, shape: Sequence[int], return_all_timesteps: bool, **chain: Any) -> Tensor:
        boolean("return_all_timesteps", return_all_timesteps)
        shape = check_shape(shape, self._sampler)
        run = self._sampler.plan(shape[0], generator=default_generator(self.device), **chain)
        x_T = torch.randn(shape, device=self.device)
        run = replace(run, noise=x_T)
        if return_all_timesteps:
            with self._sampler.lock:
                images = torch.stack([x_T, *(buffers.x.clone() for buffers in run.states())], dim=1)
        else:
            images = run.final()
        return (images + 1) * 0.5 if self._auto_normalize else images
