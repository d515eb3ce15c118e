"""Every kernel compiled ahead of time for GPUs that are not here: nothing spilled, no more shared memory than there is.

Launchers are called on fake tensors (`tests/dry_cuda.py`), so each binary is the one that a real call would compile.
The helper itself refuses what a chip has not (shared memory, registers, grids). Of the product of all options every
n-th case is taken, fewer where the chip is not an H100; n is coprime to the lengths of the axes, so that every value
meets almost every other.
"""

from __future__ import annotations

import os
import re
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ddpm.kernels.channel_statistics import Norm, merge_statistics
from ddpm.kernels.group_norm_apply import group_norm_apply
from ddpm.kernels.group_norm_silu import group_norm_silu
from ddpm.kernels.philox import PURPOSE_IMG2IMG, PURPOSE_INITIAL, philox_normal
from ddpm.kernels.reverse_step import COLUMNS, reverse_step
from ddpm.kernels.rms_norm_silu import rms_norm_silu
from tests import dry_cuda as dry_cuda_module
from tests.dry_cuda import CHIPS, Dry, dry_cuda

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, does not interpret")

DEVICE = torch.device("cuda:0")
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def thinned(main_step: int, other_step: int, *axes: Any) -> list[Any]:
    """Test cases (arch, *values): every main_step-th of the axes' product on H100, every other_step-th elsewhere."""
    whole = list(product(*axes))
    return [
        pytest.param(arch, *case, id="-".join(str(v).removeprefix("torch.") for v in (arch, *case)))
        for arch in CHIPS
        for case in whole[:: main_step if arch == 90 else other_step]
    ]


def tensor(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "NCHW") -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE, memory_format=LAYOUTS[layout])


def check(dry: Dry) -> None:
    assert dry.launches
    for launch in dry.launches:
        assert launch.spills == 0, launch
        assert 0 < launch.regs <= 255, launch
        assert launch.shared <= dry.chip.shared_limit, launch
        # Given, since its default depends on Triton's version.
        assert "enable_fp_fusion" in launch.options, launch


@pytest.mark.parametrize("purpose", [PURPOSE_INITIAL, PURPOSE_IMG2IMG])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 7, 5)])
@pytest.mark.parametrize("arch", CHIPS)
def test_philox_normal(arch, shape, purpose):
    with dry_cuda(arch) as dry:
        z = philox_normal(torch.empty(4, dtype=torch.int64, device=DEVICE), shape, 2, purpose)
    assert (z.shape, z.dtype, z.device, z.is_contiguous()) == ((4, *shape), torch.float32, DEVICE, True)
    assert len(dry.launches) == 1
    check(dry)


@pytest.mark.parametrize(
    ("arch", "channels", "clip", "variance", "noise", "preview", "dtype", "layout", "conditions", "rounding"),
    thinned(
        67,
        211,
        (3, 1),
        ("none", "clamp", "dynamic"),
        ("fixed", "learned", "learned_range"),
        ("seeds", "noise"),
        (False, True),
        (torch.float32, torch.float16),
        LAYOUTS,
        ("none", "guided", "inpaint", "both"),
        ("float32", "float16", "bfloat16"),
    ),
)
def test_reverse_step(arch, channels, clip, variance, noise, preview, dtype, layout, conditions, rounding):
    n, size = 4, 32
    images = 2 * n if conditions in ("guided", "both") else n
    inpaint = conditions in ("inpaint", "both")
    with dry_cuda(arch) as dry:
        state = tensor(n, channels, size, size)
        reverse_step(
            state,
            tensor(images, channels if variance == "fixed" else 2 * channels, size, size, dtype=dtype, layout=layout),
            torch.empty(1000, len(COLUMNS), device=DEVICE),
            torch.empty(1, dtype=torch.int64, device=DEVICE),
            torch.empty(1, dtype=torch.int64, device=DEVICE),
            clip=clip,
            variance=variance,
            rounding=rounding,
            seeds=torch.empty(n, dtype=torch.int64, device=DEVICE) if noise == "seeds" else None,
            noise=torch.empty(*([3] if inpaint else []), *state.shape, device=DEVICE) if noise == "noise" else None,
            x0=tensor(n, channels, size, size) if preview else None,
            known=torch.empty_like(state) if inpaint else None,
            mask=torch.empty(state.shape, dtype=torch.uint8, device=DEVICE) if inpaint else None,
        )
    assert [launch.op for launch in dry.launches] == ["reverse_step"]
    check(dry)


GROUPS = {32: 32, 96: 32, 192: 8, 320: 32, 384: 32}
# (batch, size): groups of the small images fit in one program, those of the large one do not.
FORMS = {"one-pass": (64, 8), "split": (1, 96)}


@pytest.mark.parametrize(
    ("arch", "channels", "form", "mode", "silu", "dtype", "layout"),
    thinned(
        7,
        23,
        GROUPS,
        FORMS,
        ("plain", "add", "scale-shift"),
        (True, False),
        (torch.float32, torch.float16, torch.bfloat16),
        LAYOUTS,
    ),
)
def test_group_norm_silu(arch, channels, form, mode, silu, dtype, layout):
    batch, size = FORMS[form]
    with dry_cuda(arch) as dry:
        x = tensor(batch, channels, size, size, dtype=dtype, layout=layout)
        # Slices of the time table's row, as the fused network has them.
        row = torch.empty(1, 3 * channels, device=DEVICE)
        add, scale, shift = row.chunk(3, dim=1)
        y = group_norm_silu(
            x,
            GROUPS[channels],
            torch.empty(channels, device=DEVICE),
            torch.empty(channels, device=DEVICE),
            1e-5,
            add=None if mode == "plain" else add,
            scale=scale if mode == "scale-shift" else None,
            shift=shift if mode == "scale-shift" else None,
            silu=silu,
        )
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
    assert len(dry.launches) == (1 if form == "one-pass" else 2)
    check(dry)


@pytest.mark.parametrize(
    ("shape", "groups", "layout"),
    [
        # Arguments that are 1 become constants, with other types than numbers have.
        ((1, 32, 1, 1), 32, "NCHW"),
        ((2, 32, 1, 1), 32, "NHWC"),
        ((1, 8, 16, 16), 1, "NHWC"),
        ((1, 1, 96, 96), 1, "NCHW"),
        ((3, 9, 5, 7), 3, "NHWC"),
        ((1, 1536, 8, 8), 32, "NHWC"),
        ((1, 256, 256, 256), 32, "NHWC"),
    ],
)
@pytest.mark.parametrize("add", [False, True])
def test_group_norm_silu_of_unusual_shapes(shape, groups, layout, add):
    with dry_cuda(90) as dry:
        weight = torch.empty(shape[1], device=DEVICE)
        x = tensor(*shape, dtype=torch.float16, layout=layout)
        y = group_norm_silu(x, groups, weight, weight, 1e-5, add=weight[None] if add else None)
    assert y.shape == x.shape
    check(dry)


@pytest.mark.parametrize(
    ("arch", "channels", "shape", "mode", "residual", "silu", "dtype", "layout"),
    thinned(
        37,
        101,
        (3, 48, 64, 130, 512, 1024, 4096, 8200),
        # (batch, size): one image that leaves a GPU idle, many, and one of odd size.
        ((1, 16), (16, 64), (1, 33)),
        ("plain", "add", "scale-shift", "all"),
        ("none", "like x", "NCHW"),
        (True, False),
        (torch.float32, torch.float16, torch.bfloat16),
        LAYOUTS,
    ),
)
def test_rms_norm_silu(arch, channels, shape, mode, residual, silu, dtype, layout):
    batch, size = shape
    with dry_cuda(arch) as dry:
        x = tensor(batch, channels, size, size, dtype=dtype, layout=layout)
        row = torch.empty(1, 3 * channels, device=DEVICE)
        add, scale, shift = row.chunk(3, dim=1)
        residual_layout = layout if residual == "like x" else residual
        y = rms_norm_silu(
            x,
            torch.empty(channels, device=DEVICE),
            add=add if mode in ("add", "all") else None,
            scale=scale if mode in ("scale-shift", "all") else None,
            shift=shift if mode in ("scale-shift", "all") else None,
            residual=None if residual == "none" else torch.empty_like(x, memory_format=LAYOUTS[residual_layout]),
            silu=silu,
        )
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
    assert [launch.op for launch in dry.launches] == ["rms_norm_silu"]
    check(dry)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        # Arguments that are 1 become constants, with other types than numbers have.
        ((1, 1, 1, 1), "NCHW"),
        ((2, 32, 1, 1), "NHWC"),
        ((1, 1, 96, 96), "NCHW"),
        ((3, 9, 5, 7), "NHWC"),
        ((1, 8200, 1, 1), "NHWC"),
        ((1, 64, 256, 256), "NHWC"),
        # Strides and offsets of more than 32 bits.
        ((1, 8, 65536, 65536), "NCHW"),
    ],
)
@pytest.mark.parametrize("options", [False, True])
def test_rms_norm_silu_of_unusual_shapes(shape, layout, options):
    with dry_cuda(90) as dry:
        weight = torch.empty(shape[1], device=DEVICE)
        row = weight[None] if options else None
        x = tensor(*shape, dtype=torch.float16, layout=layout)
        y = rms_norm_silu(x, weight, add=row, scale=row, shift=row, residual=x if options else None)
    assert y.shape == x.shape
    check(dry)


def apply_norm(parts: list[torch.Tensor], groups: int, slots: tuple[int, int], silu: bool, modulated: bool) -> Norm:
    channels = sum(part.shape[1] for part in parts)
    scale, shift = tensor(1, 3 * channels).chunk(3, dim=1)[:2] if modulated else (None, None)
    statistics = tuple(tensor(len(part), count, 2, part.shape[1]) for part, count in zip(parts, slots, strict=False))
    return Norm(tensor(channels), tensor(channels), groups, 1e-5, silu, statistics, scale, shift)


@pytest.mark.parametrize(
    ("arch", "channels", "shape", "slots", "resample", "modulated", "silu", "dtype", "out"),
    thinned(
        61,
        211,
        ((128,), (96,), (320,), (256, 256), (256, 128), (192, 96), (20, 12)),
        # (batch, size): one image that leaves a GPU idle, and many.
        ((1, 16), (64, 32)),
        ((1, 1), (16, 4)),
        (None, "up", "down"),
        (False, True),
        (True, False),
        (torch.float32, torch.float16, torch.bfloat16),
        ("same", "float32"),
    ),
)
def test_group_norm_apply(arch, channels, shape, slots, resample, modulated, silu, dtype, out):
    batch, size = shape
    with dry_cuda(arch) as dry:
        parts = [tensor(batch, c, size, size, dtype=dtype, layout="NHWC") for c in channels]
        norm = apply_norm(parts, sum(channels) // 8 if sum(channels) < 96 else 32, slots, silu, modulated)
        y = group_norm_apply(parts, norm, resample=resample, dtype=torch.float32 if out == "float32" else None)
    size = {None: size, "up": 2 * size, "down": size // 2}[resample]
    assert y.shape == (batch, sum(channels), size, size)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert [launch.op for launch in dry.launches] == ["group_norm_apply"]
    check(dry)


@pytest.mark.parametrize(
    ("channels", "groups", "shape"),
    [
        # Arguments that are 1 become constants, with other types than numbers have.
        ((1,), 1, (1, 1, 1)),
        ((1, 1), 1, (1, 2, 1)),
        ((32,), 32, (2, 1, 1)),
        ((9, 3), 3, (3, 5, 7)),
        ((4096,), 1, (1, 8, 8)),
        ((5,), 5, (1, 96, 1)),
        # Offsets of more than 32 bits.
        ((64, 64), 32, (1, 8192, 8192)),
    ],
)
@pytest.mark.parametrize(("resample", "modulated"), [(None, False), ("up", True), ("down", True)])
def test_group_norm_apply_of_unusual_shapes(channels, groups, shape, resample, modulated):
    batch, height, width = shape
    if resample == "down" and min(height, width) < 2:
        pytest.skip("nothing to halve")
    with dry_cuda(90) as dry:
        parts = [tensor(batch, c, height, width, dtype=torch.float16, layout="NHWC") for c in channels]
        y = group_norm_apply(parts, apply_norm(parts, groups, (3, 1), True, modulated), resample=resample)
    assert y.shape[1] == sum(channels)
    check(dry)


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        ((128,), torch.float16),
        ((256, 128), torch.bfloat16),
        # Triton by itself asks only whether 16 divides a size.
        ((40, 24), torch.float16),
        ((20, 12), torch.float32),
    ],
)
def test_group_norm_apply_moves_16_bytes_at_a_time(channels, dtype, resample, monkeypatch):
    kernels: list[Any] = []
    compiler = dry_cuda_module.triton.compile

    def compile_and_keep(*args: Any, **options: Any) -> Any:
        kernels.append(compiler(*args, **options))
        return kernels[-1]

    with dry_cuda(90) as dry:
        parts = [tensor(64, c, 16, 16, dtype=dtype, layout="NHWC") for c in channels]
        norm = apply_norm(parts, 4, (2, 2), True, False)
        with monkeypatch.context() as patch:
            patch.setattr(dry_cuda_module, "_binaries", {})  # so that it is compiled here
            patch.setattr(dry_cuda_module.triton, "compile", compile_and_keep)
            group_norm_apply(parts, norm, resample=resample)
    check(dry)
    stores = re.findall(r"st\.global\S*", kernels[0].asm["ptx"])
    assert {store.endswith(".v4.b32") for store in stores} == {True}, stores
    loads = len(re.findall(r"ld\.global\S*\.v4\.b32", kernels[0].asm["ptx"]))
    # "up" stores four pixels for one; "down" loads four for one, in a loop.
    assert loads * {None: 1, "up": 4, "down": 1}[resample] >= len(stores)


@pytest.mark.parametrize(("slots", "channels", "pixels"), [(512, 128, 65536), (17, 1, 35), (4096, 20, 65535)])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("arch", CHIPS)
def test_merge_statistics(arch, slots, channels, pixels, batch):
    with dry_cuda(arch) as dry:
        merged = merge_statistics(tensor(batch, slots, 2, channels), pixels)
    assert merged.shape == (batch, 9 if slots == 17 else 16, 2, channels)
    assert [launch.name for launch in dry.launches] == ["_merge_kernel"]
    check(dry)
