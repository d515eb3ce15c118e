"""Scaled dot-product attention with its backend pinned: torch's own choice may change with a version or a shape."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpm.kernels import backend


def attention_backend(dim_head: int, dtype: torch.dtype, device: torch.device) -> SDPBackend | None:
    """Which of torch's kernels runs on a GPU: the fastest that takes this width; None on other devices.

    Flash attention (Dao 2023) takes half precision and heads of up to 256, on NVIDIA's GPUs since Ampere, the
    memory-efficient kernel any width of whole 16-byte loads; both have the same bits every run.
    """
    if not backend.is_gpu(device):
        return None
    half = dtype in (torch.float16, torch.bfloat16)
    has_flash = not (0, 0) < backend.target(device).capability < (8, 0)  # AMD's have it too
    if half and has_flash and dim_head <= 256 and dim_head % 8 == 0:
        return SDPBackend.FLASH_ATTENTION
    return SDPBackend.EFFICIENT_ATTENTION if dim_head % (8 if half else 4) == 0 else SDPBackend.MATH


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(dim_head)) v for q [N, heads, L, dim_head], k, v [N, heads, S, dim_head]; like q."""
    kernel = attention_backend(q.shape[-1], q.dtype, q.device)
    with contextlib.nullcontext() if kernel is None or q.is_meta else sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v)


def describe_attention(heads: int, dim_head: int, dtype: torch.dtype, device: torch.device) -> str:
    """For `Sampler.explain()`; `device` is where it will run."""
    kernel = attention_backend(dim_head, dtype, device)
    name = "torch's choice" if kernel is None else kernel.name.lower().replace("_", " ")
    of = f"{heads} head{'s' if heads > 1 else ''} of {dim_head}"
    return f"scaled_dot_product_attention ({name}), {of}, {str(dtype).removeprefix('torch.')}"
