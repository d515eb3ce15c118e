"""The planned networks of published architectures on fake GPUs: every launch compiled, read from its binary."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from bench.architectures import ARCHITECTURES
from bench.walk import fused_network
from ddpm.kernels.conv_kernel import _conv_kernel
from tests.dry_cuda import Dry, Launch, dry_cuda

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, does not interpret")

DEVICE = torch.device("cuda:0")
# On an H100 these two take a minute; all architectures on all chips take an hour, which DRY_RUN_ALL=1 asks for.
QUICK = {(name, 90, batch) for name in ("cifar10-32", "demo") for batch in (1, 16, 256)}
ALL = os.environ.get("DRY_RUN_ALL") == "1"
CASES = [
    (name, chip, batch)
    for name in ARCHITECTURES
    for chip in (80, 90, 100)
    for batch in (1, 16, 256)
    if ALL or (name, chip, batch) in QUICK
]


def walk(dry: Dry, name: str, batch: int, dtype: str) -> None:
    """One evaluation of the network."""
    entry = ARCHITECTURES[name]
    network = dry.to_fake_cuda(fused_network(entry, dtype))
    size = entry.image_size
    row = torch.empty(1, network.time.columns, device=DEVICE)
    classes = torch.empty(batch, network.time.embedding_dim, device=DEVICE) if network.time.conditional else None
    out = network(torch.empty(batch, entry.image_channels, size, size, device=DEVICE), row, classes, None)
    assert out.shape[0] == batch
    assert out.shape[2:] == (size, size)
    assert out.dtype == torch.float32


@pytest.mark.parametrize(("name", "chip", "batch"), CASES)
def test_every_launch_compiles_and_fits(name, chip, batch):
    with dry_cuda(chip) as dry:
        walk(dry, name, batch, "fp16")
    assert any(launch.name == _conv_kernel.fn.__name__ for launch in dry.launches)
    for launch in dry.launches:
        assert launch.spills == 0, launch
        assert 0 < launch.regs <= 255, launch
        assert launch.shared <= dry.chip.shared_limit, launch


@pytest.mark.parametrize(("batch", "dtype"), [(1, "fp16"), (256, "fp16")])
def test_a_hopper_gpu_uses_its_matrix_units_and_wide_loads(batch, dtype):
    with dry_cuda(90) as dry:
        walk(dry, "cifar10-32", batch, dtype)
    seen = {"wide": 0, "narrow": 0}
    for launch in distinct(dry.launches):
        if launch.name != _conv_kernel.fn.__name__:
            continue
        sass = launch.sass()
        if launch.signature["weight_ptr"] != "*fp32":  # IEEE products, of the last layer, have no matrix units
            assert ("HGMMA" if launch.constants["BLOCK_M"] >= 64 else "MMA") in sass, launch
        aligned = launch.signature["x_ptr"] != "*fp32"  # conv_in reads the state: three channels, NCHW
        seen["wide" if aligned else "narrow"] += 1
        if aligned:
            assert "LDGSTS.E.BYPASS.128" in sass or "LDG.E.128" in sass, launch
    assert seen["wide"] > seen["narrow"] > 0, seen


def distinct(launches: list[Launch]) -> list[Launch]:
    """One launch of each binary."""
    found = {}
    for launch in launches:
        key = (launch.name, tuple(launch.signature.items()), str(launch.constants), str(launch.options))
        found.setdefault(key, launch)
    return list(found.values())
