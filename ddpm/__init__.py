"""fused-ddpm: a drop-in fast sampler for existing DDPM checkpoints.

import ddpm
sampler = ddpm.load("path/to/checkpoint")
images = sampler.sample(16, seeds=range(16))   # float32 [16, C, H, W] in [-1, 1]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm.dropins.diffusers import accelerate
    from ddpm.sampler import NonFiniteError, Sampler, SamplingInterrupted, load

__version__ = "0.1.0"
__all__ = ["NonFiniteError", "Sampler", "SamplingInterrupted", "__version__", "accelerate", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: `ddpm --help` and `import ddpm.kernels` need not wait for the whole product."""
    if name == "accelerate":
        from ddpm.dropins.diffusers import accelerate

        return accelerate
    if name in __all__:
        from ddpm import sampler

        return getattr(sampler, name)
    raise AttributeError(f"module 'ddpm' has no attribute {name!r}")
