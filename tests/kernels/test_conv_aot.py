"""The fused convolution compiled ahead of time for GPUs that are not here, by the plans that real layers get there.

No spilled registers, no more shared memory than there is; on an H100 also what the instructions are: whole warp groups
on the tensor cores, and asynchronous copies of 16 bytes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ddpm.kernels import backend, tuning
from ddpm.kernels.channel_statistics import Norm
from ddpm.kernels.conv import conv, output_size
from ddpm.kernels.tuning import ConvPlan
from ddpm.loop import float32_precision
from tests.dry_cuda import CHIPS, Dry, Launch, dry_cuda

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, does not interpret")

DEVICE = torch.device("cuda:0")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _no_files_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_PLANS", "")
    tuning.forget()


def image(n: int, channels: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((n, channels, size, size), dtype=dtype, device=DEVICE, memory_format=torch.channels_last)


def rows(*shape: int, dtype: torch.dtype = SINGLE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def run(
    n: int,
    size: int,
    parts: Sequence[int],
    out: int,
    dtype: torch.dtype,
    *,
    kernel: int = 3,
    norm: bool = False,
    modulated: bool = False,
    slots: int = 4,
    shortcut: Sequence[int] = (),
    residual: bool = False,
    weight_dtype: torch.dtype | None = None,
    nchw: bool = False,
    splittable: bool = True,
    **options: Any,
) -> Launch:
    """Call `conv` on fake tensors; the launch of its kernel."""
    channels, weight_dtype = sum(parts), weight_dtype or dtype
    padding = options.setdefault("padding", (kernel // 2, kernel // 2))
    result = output_size(size, size, kernel, options.get("stride", 1), padding, options.get("upsample", False))[0]
    images = [image(n, c, size, dtype) for c in parts]
    scale, shift = rows(1, 2 * channels).chunk(2, dim=1) if modulated else (None, None)
    statistics = tuple(rows(n, slots, 2, c) for c in parts)
    y, found = conv(
        [x.contiguous() for x in images] if nchw else images,
        image(out, channels, kernel, weight_dtype),
        rows(out),
        norm=Norm(rows(channels), rows(channels), 32, 1e-5, True, statistics, scale, shift) if norm else None,
        row=None if shortcut else rows(n, out),
        residual=image(n, out, result, dtype) if residual else None,
        shortcut=[image(n, c, result, dtype) for c in shortcut],
        shortcut_weight=rows(out, sum(shortcut), dtype=weight_dtype) if shortcut else None,
        statistics=True,
        counters=torch.empty(tuning.COUNTERS, dtype=torch.int32, device=DEVICE) if splittable else None,
        dtype=weight_dtype,
        **options,
    )
    assert (y.shape, y.dtype) == ((n, out, result, result), weight_dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (found.shape[0], *found.shape[2:]) == (n, 2, out)


def check(dry: Dry) -> Launch:
    """Every launch fits; the kernel's own."""
    for launch in dry.launches:
        assert launch.spills == 0, launch
        assert 0 < launch.regs <= 255, launch
        assert launch.shared <= dry.chip.shared_limit, launch
        # Given, since its default depends on Triton's version.
        assert "enable_fp_fusion" in launch.options, launch
    (launch,) = (launch for launch in dry.launches if launch.name == "_conv_kernel")
    return launch


EVERYWHERE = [
    (1, 16, (256,), 256, {"norm": True, "residual": True}),
    (1, 32, (256, 128), 128, {"norm": True}),
    (1, 4, (256,), 256, {"norm": True, "shortcut": (256, 256)}),
    (64, 32, (128,), 128, {"residual": True}),
    (64, 4, (256,), 256, {"shortcut": (512,)}),
]
MORE = [
    (1, 32, (3,), 128, {"nchw": True, "dtype": SINGLE, "weight_dtype": HALF}),
    (1, 32, (128,), 3, {"norm": True, "weight_dtype": SINGLE}),
    (1, 33, (128,), 128, {"stride": 2, "padding": (0, 0)}),
    (1, 8, (256,), 256, {"upsample": True}),
    (1, 16, (256,), 768, {"kernel": 1, "norm": True, "modulated": True}),
    (4, 28, (96, 96), 96, {"norm": True}),
    (4, 64, (64,), 64, {"kernel": 2, "stride": 2, "padding": (0, 0), "dtype": BRAIN}),
    (16, 32, (3,), 64, {"kernel": 7}),
    (16, 4, (512,), 256, {"norm": True, "dtype": BRAIN}),
    (1, 256, (128, 128), 128, {"shortcut": (256,), "dtype": BRAIN}),
    (5, 7, (20,), 20, {"dtype": SINGLE}),
    (1, 1, (48,), 48, {"norm": False}),
]
CASES = [
    *((arch, HALF, *case) for arch in CHIPS for case in (EVERYWHERE if arch == 90 else EVERYWHERE[1:])),
    *((arch, SINGLE, *EVERYWHERE[1]) for arch in CHIPS),
    *((90, case[4].get("dtype", HALF), *case) for case in MORE),
]


def name(case: tuple) -> str:
    arch, dtype, n, size, parts, out, options = case
    words = [arch, str(dtype).removeprefix("torch."), f"{n}x{size}x{size}", f"{'+'.join(map(str, parts))}->{out}"]
    return " ".join(map(str, (*words, *(key for key in options if key != "dtype"))))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_layers_by_their_own_plans(case):
    arch, dtype, n, size, parts, out, options = case
    with dry_cuda(arch) as dry:
        run(n, size, parts, out, dtype, **{k: v for k, v in options.items() if k != "dtype"})
    check(dry)


def instructions(launch: Launch) -> Counter[str]:
    """How often each instruction is in the binary, by its name with all modifiers."""
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Za-z0-9_.]*)", launch.sass()))


def count(found: Counter[str], start: str, part: str = "") -> int:
    return sum(n for name, n in found.items() if name.split(".")[0] == start and part in name)


TILES = [
    # (block_m, block_n, splits, warps), norm, batch, size, parts
    ((128, 128, 1, 8), False, 64, 32, (128,), HALF),
    ((128, 128, 1, 8), False, 64, 32, (128,), BRAIN),
    ((128, 128, 2, 8), False, 256, 4, (128,), HALF),
    ((64, 64, 9, 8), True, 1, 16, (128, 128), BRAIN),
    ((64, 128, 8, 8), True, 1, 32, (128,), HALF),
]


@pytest.mark.parametrize(("blocks", "norm", "n", "size", "parts", "dtype"), TILES)
def test_instructions_on_an_h100(blocks, norm, n, size, parts, dtype, monkeypatch):
    block_m, block_n, splits, warps = blocks
    plan = ConvPlan("fused", block_m, block_n, 64, splits, warps, 3)
    monkeypatch.setattr(tuning, "plan", lambda *_, **__: plan)
    with dry_cuda(90) as dry:
        run(n, size, parts, 128, dtype, norm=norm, residual=dtype == HALF)
    launch = check(dry)
    found = instructions(launch)
    assert count(found, "HGMMA") >= 4 * len(parts)  # a step is 4 times 16 channels
    assert count(found, "HMMA") == 0
    copies = count(found, "LDGSTS")
    assert copies > 0
    assert count(found, "LDGSTS", ".128") == copies
    assert count(found, "STG", ".128") > 0
    assert count(found, "LDL") == count(found, "STL") == 0
    if splits == 1:
        assert launch.regs <= 128, "two programs no longer fit on a multiprocessor"


def test_small_tiles_use_the_older_tensor_instructions(monkeypatch):
    plan = ConvPlan("fused", 16, 64, 64, 9, 4, 3)
    monkeypatch.setattr(tuning, "plan", lambda *_, **__: plan)
    with dry_cuda(90) as dry:
        run(1, 4, (256,), 256, HALF, norm=True)
    found = instructions(check(dry))
    assert count(found, "HMMA") > 0
    assert count(found, "LDGSTS", ".128") == count(found, "LDGSTS") > 0


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_products(tf32, monkeypatch):
    """TF32 only where torch is told so."""
    plan = ConvPlan("fused", 64, 64, 32, 1, 4, 3)
    monkeypatch.setattr(tuning, "plan", lambda *_, **__: plan)
    with float32_precision(tf32), dry_cuda(90) as dry:
        run(1, 16, (128,), 128, SINGLE)
    found = instructions(check(dry))
    assert (count(found, "HGMMA", "TF32") > 0) == tf32
    assert (count(found, "FFMA") > 1000) == (not tf32)


def test_few_binaries_serve_many_layers():
    """Sizes are arguments: layers of the same form, of other channels, sizes and batches, share one."""
    with dry_cuda(90) as dry:
        for n, size, channels in ((64, 32, 128), (64, 16, 256), (256, 24, 192)):
            run(n, size, (channels,), 2 * channels, HALF, residual=True, splittable=False)
    assert [launch.name for launch in dry.launches] == ["_conv_kernel"] * 3
    assert len({(str(launch.signature), str(launch.constants)) for launch in dry.launches}) == 1


def test_the_plan_is_of_the_tensors_gpu():
    with dry_cuda(80):
        a100 = backend.target(DEVICE)
    with dry_cuda("gfx942"):
        mi300x = backend.target(DEVICE)
    assert (a100.sms, a100.shared_memory, a100.capability) == (108, 163 * 1024, (8, 0))
    assert (mi300x.sms, mi300x.shared_memory, mi300x.capability) == (304, 64 * 1024, (0, 0))
