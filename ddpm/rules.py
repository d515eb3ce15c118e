"""How a checkpoint's family samples: everything about a chain that is neither the network nor the betas."""

from __future__ import annotations

from dataclasses import dataclass

from ddpm.checks import boolean, is_integer, is_number, one_of, positive_integer
from ddpm.schedule import PREDICTION_TYPES
from ddpm.timesteps import SPACINGS

# Whose code a chain repeats: its arithmetic, and when it draws noise. See `ddpm.coefficients`.
CONVENTIONS = ("diffusers", "openai", "pytorch_diffusion", "ermongroup", "lucidrains")
SAMPLERS = ("ddpm", "ddim")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
CLIPS = ("none", "clamp", "dynamic")
DDIM_EPSILONS = ("raw", "rederived")


@dataclass(frozen=True)
class SamplingRules:
    """A family's sampling defaults, as its code or its scheduler's configuration says them.

    Attributes:
        convention: whose code it is, one of CONVENTIONS.
        sampler: what runs where the caller does not say: "ddpm" (ancestral) or "ddim".
        short_sampler: the same for a chain of fewer than T steps; None means `sampler`.
        prediction_type: what the network outputs: "epsilon", "sample" (x_0) or "v_prediction".
        variance_type: of the ancestral step; see `ddpm.coefficients`. The learned kinds read it from the network's
            second half.
        clip: f of the step form: "none", "clamp" (to +-clip_range) or "dynamic" (Saharia et al. 2022, section 2.3).
        clip_range: bound of the clamp.
        threshold_ratio: quantile of |x_0| of the dynamic threshold, in (0, 1].
        threshold_max: upper bound of the dynamic threshold, at least 1.
        timestep_spacing: of an ancestral chain, one of `ddpm.timesteps.SPACINGS`.
        steps_offset: added to the timesteps of "leading".
        ddim_spacing: of a DDIM chain; None means timestep_spacing.
        ddim_steps: length of a DDIM chain where the caller does not say; None means T.
        ddim_clip: f of a DDIM step; None means `clip`.
        ddim_epsilon: a DDIM step goes on with the network's own noise ("raw") or with that which the clipped x_0
            implies ("rederived").
        eta: of DDIM, in 0 .. 1; 0 is deterministic.
        set_alpha_to_one: alpha-bar after the last DDIM step is 1, not alphas_cumprod[0].
        rescale_timesteps: the network is told t 1000 / T.

    Raises:
        ValueError: a value that is not one of these.
    """

    convention: str = "diffusers"
    sampler: str = "ddpm"
    short_sampler: str | None = None
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    clip: str = "clamp"
    clip_range: float = 1.0
    threshold_ratio: float = 0.995
    threshold_max: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    ddim_spacing: str | None = None
    ddim_steps: int | None = None
    ddim_clip: str | None = None
    ddim_epsilon: str = "raw"
    eta: float = 0.0
    set_alpha_to_one: bool = True
    rescale_timesteps: bool = False

    def __post_init__(self) -> None:
        if self.variance_type == "fixed_large_log":
            raise ValueError(
                "variance_type 'fixed_large_log' takes the square root of a negative logarithm, so the original gives "
                "NaN at every step; set variance_type to 'fixed_large', which is what was meant"
            )
        for name, allowed in (
            ("convention", CONVENTIONS),
            ("sampler", SAMPLERS),
            ("short_sampler", SAMPLERS),
            ("prediction_type", PREDICTION_TYPES),
            ("variance_type", VARIANCE_TYPES),
            ("clip", CLIPS),
            ("timestep_spacing", SPACINGS),
            ("ddim_spacing", SPACINGS),
            ("ddim_clip", CLIPS),
            ("ddim_epsilon", DDIM_EPSILONS),
        ):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), allowed)
        for name, low, high in (("clip_range", 0.0, 1e6), ("threshold_ratio", 0.0, 1.0), ("threshold_max", 1.0, 1e6)):
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low:g} to {high:g}; got {value!r}")
        if not is_integer(self.steps_offset) or self.steps_offset < 0:
            raise ValueError(f"steps_offset must be an integer of at least 0; got {self.steps_offset!r}")
        if self.ddim_steps is not None:
            positive_integer("ddim_steps", self.ddim_steps)
        for name in ("set_alpha_to_one", "rescale_timesteps"):
            boolean(name, getattr(self, name))
        if not is_number(self.eta) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be a number from 0 (deterministic) to 1 (as noisy as DDPM); got {self.eta!r}")

    def clip_of(self, sampler: str) -> str:
        """f of that sampler's step."""
        return (self.ddim_clip if sampler == "ddim" else None) or self.clip

    def spacing_of(self, sampler: str) -> str:
        """Timestep spacing of that sampler's chain."""
        return (self.ddim_spacing if sampler == "ddim" else None) or self.timestep_spacing

    @property
    def learned_variance(self) -> bool:
        """Whether the network's output holds a second half of channels, the variance."""
        return self.variance_type in ("learned", "learned_range")
