"""Random weights that make every layer matter. Needs nothing but torch: GPU machines may lack the rest."""

from __future__ import annotations

import torch
from torch import nn


def redraw(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight anew: at the usual initialisation (norms at 1) some mistakes would be invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(network.named_parameters()):
            values = torch.randn(p.shape, generator=generator)
            if name == "time_proj.weight" or name.endswith("mem_kv"):
                p.copy_(
                    values
                )  # a table of embeddings or of keys and values, or the frequencies of a Fourier embedding
            elif name.endswith(".g"):
                p.copy_(1 + 0.1 * values)  # a norm's weight of shape [1, C, 1, 1]
            elif p.dim() > 1:
                p.copy_(values / p[0].numel() ** 0.5)
            elif name.endswith("weight"):
                p.copy_(1 + 0.1 * values)
            else:
                p.copy_(0.1 * values)
    return network
