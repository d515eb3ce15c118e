"""The count of a step: against the dry run of the captured one, against published sizes, against sums by hand."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from bench.architectures import ARCHITECTURES, DEMO, Architecture, architecture
from bench.cli import main
from bench.roofline import GPUS, roofline
from bench.traffic import Least, least_traffic
from bench.walk import META, Operation, chain_shape, fused_network, planned_step, recording, stock_step
from ddpm.checkpoints import load_checkpoint
from ddpm.kernels import backend
from ddpm.loop import Loop, network_settings
from ddpm.unet import UNetConfig
from tests.dry_cuda import Capture, dry_cuda

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, does not interpret")

ATTENTION = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
# As published: attention at one level, classes, resnets that resample, two norms, two kinds of attention.
CAPTURED = ["demo", "cifar10-32", "lucidrains-128", pytest.param("guided-64", marks=pytest.mark.slow)]


def planned(name: str, batch: int, dtype: str = "fp16") -> list[Operation]:
    return planned_step(architecture(name), batch, dtype, backend.H100)


def least(entry: Architecture, batch: int) -> Least:
    with META:
        return least_traffic(entry.network(), (entry.image_size, entry.image_size), batch, "fp16")


def captured(name: str, batch: int) -> Capture:
    """The step as a GPU would capture it, by the dry run."""
    network, device = fused_network(architecture(name), "fp16"), torch.device("cuda:0")
    with dry_cuda(90) as dry:
        loop = Loop(dry.to_fake_cuda(network), chain_shape(architecture(name), batch), device, compiled=False)
        with network_settings(device, False):
            loop.prepare()
    (capture,) = dry.captures
    return capture


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", CAPTURED)
def test_it_counts_what_the_dry_run_captures(name: str, batch: int) -> None:
    operations, capture = planned(name, batch), captured(name, batch)
    assert sum(operation.launches for operation in operations) == len(capture.ops)
    kernels = Counter(launch.name for launch in capture.launches)
    assert Counter(o.op for o in operations if o.op not in backend.works) == Counter(capture.ops) - kernels
    # What an op says of its programs is what its main launch has.
    launches = iter(capture.launches)
    for operation in (o for o in operations if o.op in backend.works):
        grids = [math.prod(next(launches).grid) for _ in range(operation.launches)]
        assert operation.programs in grids, operation
    assert next(launches, None) is None


def is_planned(operations: list[Operation]) -> bool:
    return any(operation.op == "conv" for operation in operations)


def test_a_step_of_one_image_has_few_launches() -> None:
    operations = planned("cifar10-32", 1)
    assert is_planned(operations)
    assert sum(operation.launches for operation in operations) <= 80


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_of_one_image_fills_the_gpu(name: str) -> None:
    """100 programs, or one for each 64^3 of its products where a convolution is smaller than that."""
    convolutions = [operation for operation in planned(name, 1) if operation.op == "conv"]
    assert convolutions
    for operation in convolutions:
        assert operation.programs >= min(100, math.prod(operation.gemm) / 64**3), operation


@pytest.mark.parametrize("name", ["cifar10-32", "ddpm-256", "guided-64"])
def test_a_large_batch_moves_little_more_than_it_must(name: str) -> None:
    operations = planned(name, 256)
    assert is_planned(operations)
    minimum = least(architecture(name), 256).total(sum(o.norm_bytes for o in operations))
    assert sum(operation.bytes for operation in operations) <= 1.3 * minimum


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_networks_have_the_published_number_of_parameters(name: str) -> None:
    with META:
        network = architecture(name).network()
    assert sum(parameter.numel() for parameter in network.parameters()) == architecture(name).parameters


def test_the_demo_is_the_packaged_one() -> None:
    checkpoint, entry = load_checkpoint(DEMO), architecture("demo")
    assert checkpoint.network.config == entry.config
    assert checkpoint.sample_size == (entry.image_size,) * 2
    assert checkpoint.rules.variance_type == entry.variance_type


@pytest.mark.parametrize(("name", "gflop"), [("cifar10-32", 12.11), ("ddpm-256", 496.3)])
def test_products_are_those_of_the_baseline(name: str, gflop: float) -> None:
    """h100_baseline.md counts them without attention's own."""
    for operations in (planned(name, 2), stock_step(architecture(name), 2, "fp16", backend.H100)[0]):
        found = sum(operation.flops for operation in operations if operation.op not in ATTENTION)
        assert found / 2e9 == pytest.approx(gflop, rel=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plan_makes_the_products_of_the_original(name: str) -> None:
    stock, network = stock_step(architecture(name), 4, "fp16", backend.H100)
    assert ("diffusers" in network.split()) == (name in ("cifar10-32", "ddpm-256", "demo"))
    ours, theirs = (sum(operation.flops for operation in operations) for operations in (planned(name, 4), stock))
    # The original also makes the time path's, image by image.
    assert 0.998 * theirs < ours <= theirs


def test_bytes_of_an_operation() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    row, x, index = empty(1, 8), empty(4, 8), empty(2, dtype=torch.int64)
    with recording(backend.H100, "fp16") as recorder:
        x + row.expand(4, 8)  # the row is read once
        x * x  # and so is x
        x.add_(x)
        row.copy_(x[:1])
        x.zero_()
        x.index_select(0, index)
        x.view(8, 4).t()
        x.to(torch.float16)
        F.scaled_dot_product_attention(*(empty(1, 1, 4, 8) for _ in range(3)), attn_mask=None)
    found = [(operation.op, operation.bytes) for operation in recorder.operations]
    assert found[:-1] == [
        ("add", 64 + 16 + 64),
        ("mul", 64 + 64),
        ("add_", 64 + 64),
        ("copy_", 16 + 16),
        ("zero_", 64),
        ("index_select", 16 + 32 + 32),
    ]
    assert found[-1][0] in ATTENTION
    assert recorder.operations[-1].flops == 2 * (2 * 4 * 4 * 8)


def test_operations_are_named_by_their_modules() -> None:
    names = {name for name, _ in fused_network(architecture("demo"), "fp16").named_modules()}
    operations = planned("demo", 1)
    assert {operation.name for operation in operations} <= names | {"network", "step"}
    assert [operation.op for operation in operations if operation.name == "step"] == [
        "index_select",
        "reverse_step",
        "add_",
    ]
    for operation in operations:
        if operation.op in ("conv", "convolution"):
            assert operation.name.split(".")[-1] not in ("network", "step"), operation
            assert 2 * math.prod(operation.gemm) == operation.flops


SMALL = UNetConfig(
    block_out_channels=(32,),
    down_attention=(False,),
    up_attention=(False,),
    layers_per_block=1,
    mid_block=False,
    norm_num_groups=8,
)


def test_the_least_traffic_is_the_sum_of_the_layers() -> None:
    """By hand: conv_in, a resnet of 32 channels, two of 64 to 32 with a shortcut, conv_out; P pixels in all images."""
    pixels = 2 * 8 * 8
    found = least(Architecture("small", "", SMALL, 8, "fixed_small", 0), 2)
    activations = 32 + (32 + 32 + 32 + 32 + 32) + 2 * (64 + 32 + 32 + 64 + 32) + 32
    nine = 9 * 32
    weights = (nine * 3 + 32) + 2 * (nine * 32 + 32) + 2 * (nine * 64 + 32 + nine * 32 + 32 + 64 * 32 + 32)
    norms = 2 * (32 + 32 + 2 * (64 + 32) + 32)
    in_float32 = norms + (nine * 3 + 3) + 3 * pixels * (1 + 2 + 2) + 3 * (3 * 32)  # the last: the row of the time table
    assert found.layers == 2 * activations * pixels + 2 * weights + 4 * in_float32
    assert found.normalised == 2 * pixels * (32 + 32 + 2 * (64 + 32) + 32)


def test_norms_beyond_the_layers_count_as_waste() -> None:
    found = Least(layers=100, normalised=10)
    assert [found.total(separate) for separate in (0, 5, 10, 50)] == [100, 110, 120, 120]


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_plan_moves_less_than_the_least(name: str, batch: int) -> None:
    operations = planned(name, batch)
    minimum = least(architecture(name), batch).total(sum(o.norm_bytes for o in operations))
    assert sum(operation.bytes for operation in operations) >= minimum


def test_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--arch", "demo", "--batch", "2", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in ("schema", "arch", "batch", "dtype", "gpu")} == {
        "schema": 1,
        "arch": "demo",
        "batch": 2,
        "dtype": "fp16",
        "gpu": "h100",
    }
    plan, least = found["planned"], found["floor"]
    for name in ("launches", "flops", "bytes"):
        assert plan[name] == sum(layer[name] for layer in plan["layers"])
    for layer in plan["layers"]:
        assert layer.keys() == {
            "name", "op", "form", "launches", "programs", "flops", "bytes", "shape", "gemm",
        }  # fmt: skip
    assert found["diffusers"]["ops"] > plan["launches"]
    assert least["launch_ms"] == pytest.approx(plan["launches"] * 1e-3)
    assert least["traffic_ms"] == pytest.approx(plan["minimum_bytes"] / 3.01e9)
    assert least["step_ms"] == max(least[name] for name in ("matrix_ms", "traffic_ms", "launch_ms"))
    assert least["reason"] is None

    assert main(["roofline", "--arch", "demo", "--batch", "2"]) == 0
    printed = capsys.readouterr().out
    assert "conv_in" in printed
    assert f"planned:   {plan['launches']} launches" in printed
    assert f"diffusers: {found['diffusers']['ops']} operations" in printed


def test_a_floor_is_claimed_where_it_was_measured() -> None:
    for gpu in GPUS.keys() - {"h100"}:
        least = roofline(architecture("demo"), 1, gpu=gpu)["floor"]
        assert GPUS[gpu].name in least.pop("reason")
        assert set(least.values()) == {None}
    least = roofline(architecture("demo"), 1, "fp32")["floor"]
    assert least["matrix_ms"] is None
    assert "fp32" in least["reason"]
    assert least["step_ms"] >= least["launch_ms"] > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--arch", "vgg"], "no architecture is called 'vgg'; expected one of cifar10-32, ddpm-256,"),
        (["--dtype", "int8"], "--dtype 'int8' is not one of fp32, tf32, fp16, bf16"),
        (["--gpu", "tpu"], "--gpu 'tpu' is not one of h100,"),
        (["--batch", "0"], "--batch 0: expected a positive integer"),
        (["--size", "3"], "unrecognized arguments: --size 3"),
    ],
)
def test_a_bad_argument_is_one_sentence(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}")
    assert error.count("\n") == 1


def test_without_diffusers_the_reference_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    _, network = stock_step(architecture("demo"), 1, "fp16", backend.H100)
    assert network == "the packaged checkpoint, in plain PyTorch"
