"""Which of torch's attention kernels a network is pinned to."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from ddpm.fused.attention import attend, attention_backend, describe_attention
from ddpm.kernels import backend
from ddpm.kernels.backend import Target

META = torch.device("meta")
FLASH, EFFICIENT, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


def gpu(*capability: int) -> Target:
    return Target("a GPU", 40, 64 * 1024, capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim_head", "expected"),
    [
        ((9, 0), torch.float16, 64, FLASH),
        ((8, 0), torch.bfloat16, 256, FLASH),
        ((0, 0), torch.float16, 32, FLASH),  # AMD's
        ((7, 5), torch.float16, 64, EFFICIENT),
        ((9, 0), torch.float16, 512, EFFICIENT),
        ((9, 0), torch.float32, 64, EFFICIENT),
        ((9, 0), torch.float32, 12, EFFICIENT),
        ((9, 0), torch.float16, 12, MATH),
        ((9, 0), torch.float32, 6, MATH),
    ],
)
def test_the_backend(capability: tuple[int, int], dtype: torch.dtype, dim_head: int, expected: SDPBackend) -> None:
    with backend.assume(gpu(*capability)):
        assert attention_backend(dim_head, dtype, META) == expected
        name = expected.name.lower().replace("_", " ")
        assert f"scaled_dot_product_attention ({name})" in describe_attention(1, dim_head, dtype, META)


def test_on_the_cpu_it_is_torchs_choice() -> None:
    assert attention_backend(64, torch.float16, torch.device("cpu")) is None


def test_attention_runs_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        seen.append(torch.backends.cuda.math_sdp_enabled())
        return q

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    monkeypatch.setattr("ddpm.fused.attention.attention_backend", lambda *_: MATH)
    q = torch.zeros(1, 1, 4, 8)
    attend(q, q, q)
    assert seen == [False, True]
