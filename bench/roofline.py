"""`python -m bench roofline`: launches, products and bytes of one sampling step, counted on any machine, and its floor.

planned    the captured step as this package plans it for the GPU
diffusers  the same step of the stock pipeline
floor      what the GPU's measured rates leave at least; the step cannot be faster than the largest of them
"""

from __future__ import annotations

import json
from typing import Any

from bench.architectures import ARCHITECTURES, Architecture, architecture
from bench.cli import Parser
from bench.report import print_cells
from bench.traffic import least_traffic
from bench.walk import META, Operation, fused_network, planned_step, stock_step
from ddpm.devices import DTYPES
from ddpm.kernels import backend

KIB = 1024
GPUS = {
    "h100": backend.H100,
    "a100": backend.Target("NVIDIA A100-SXM4-80GB", 108, 163 * KIB, (8, 0)),
    "b200": backend.Target("NVIDIA B200", 148, 227 * KIB, (10, 0)),
    "rtx4090": backend.Target("NVIDIA GeForce RTX 4090", 128, 99 * KIB, (8, 9)),
}
# Measured on one NVIDIA H100 80GB HBM3 (SXM, 700 W), torch 2.11.0+cu130, CUDA events, median of three windows.
MEASURED_ON = "NVIDIA H100 80GB HBM3 (SXM, 700 W), torch 2.11.0+cu130"
HALF_FLOPS = 727e12  # per second, bf16 matrix product 8192^3; fp16 has the same rate
COPY_BYTES = 3.01e12  # per second, device-to-device copy, read and write
LAUNCH_S = 1.0e-6  # of one dependent tiny kernel inside a CUDA graph

COLUMNS = ("layer", "op", "form", "launches", "programs", "GFLOP", "MB", "shape")
LEFT = ("layer", "op", "form", "shape")


def main(argv: list[str]) -> int:
    """Exit code 0.

    Raises:
        ValueError: a bad argument.
    """
    parser = Parser(prog="python -m bench roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="cifar10-32", help=f"{', '.join(ARCHITECTURES)} (cifar10-32)")
    parser.add_argument("--batch", type=int, default=1, help="images of a step (1)")
    parser.add_argument("--dtype", default="fp16", help=f"of the network: {', '.join(DTYPES)} (fp16)")
    parser.add_argument("--gpu", default="h100", help=f"that is planned for: {', '.join(GPUS)} (h100)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    options = parser.parse_args(argv)
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: expected a positive integer")
    for name, known in (("dtype", DTYPES), ("gpu", GPUS)):
        if getattr(options, name) not in known:
            raise ValueError(f"--{name} {getattr(options, name)!r} is not one of {', '.join(known)}")
    found = roofline(architecture(options.arch), options.batch, options.dtype, options.gpu)
    if options.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print_report(found)
    return 0


def roofline(entry: Architecture, batch: int, dtype: str = "fp16", gpu: str = "h100") -> dict[str, Any]:
    """Everything that the command prints, as JSON takes it.

    `planned.minimum_bytes` is the least traffic of such a plan, see `bench.traffic`.
    """
    target = GPUS[gpu]
    operations = planned_step(entry, batch, dtype, target)
    stock, network = stock_step(entry, batch, dtype, target)
    with META:
        plain = entry.network()
    least = least_traffic(plain, (entry.image_size, entry.image_size), batch, dtype)
    minimum = least.total(sum(operation.norm_bytes for operation in operations))
    planned = {
        "launches": sum(operation.launches for operation in operations),
        "flops": sum(operation.flops for operation in operations),
        "bytes": sum(operation.bytes for operation in operations),
        "minimum_bytes": minimum,
        "layers": [as_layer(operation) for operation in operations],
    }
    return {
        "schema": 1,
        "arch": entry.name,
        "batch": batch,
        "dtype": dtype,
        "gpu": gpu,
        "planned": planned,
        "diffusers": {
            "network": network,
            "ops": sum(operation.launches for operation in stock),
            "flops": sum(operation.flops for operation in stock),
            "bytes": sum(operation.bytes for operation in stock),
        },
        "floor": floor(gpu, dtype, planned, weight_bytes(entry, dtype)),
    }


def as_layer(operation: Operation) -> dict[str, Any]:
    layer = {name: value for name, value in vars(operation).items() if name != "norm_bytes"}
    return layer | {"shape": list(operation.shape), "gemm": list(operation.gemm) if operation.gemm else None}


def weight_bytes(entry: Architecture, dtype: str) -> int:
    """Of all parameters that a step reads."""
    return sum(parameter.nbytes for parameter in fused_network(entry, dtype).parameters())


def floor(gpu: str, dtype: str, planned: dict[str, Any], weights: int) -> dict[str, Any]:
    """Milliseconds that the measured rates leave; None with a reason where nothing was measured.

    matrix_ms: all products at the rate of a large matrix product. weight_traffic_ms: reading the weights; traffic_ms:
    the least traffic. launch_ms: the planned launches, if each waits for the one before and does nothing.
    """
    times = dict.fromkeys(("matrix_ms", "weight_traffic_ms", "traffic_ms", "launch_ms", "step_ms"))
    if gpu != "h100":
        return times | {"reason": f"no rates were measured on {GPUS[gpu].name}", "source": None}
    times |= {
        "weight_traffic_ms": 1e3 * weights / COPY_BYTES,
        "traffic_ms": 1e3 * planned["minimum_bytes"] / COPY_BYTES,
        "launch_ms": 1e3 * planned["launches"] * LAUNCH_S,
    }
    reason = None
    if DTYPES[dtype].itemsize == 2:
        times["matrix_ms"] = 1e3 * planned["flops"] / HALF_FLOPS
    else:
        reason = f"no rate of a matrix product was measured in {dtype}"
    times["step_ms"] = max(value for value in times.values() if value is not None)
    return times | {"reason": reason, "source": MEASURED_ON}


def print_report(found: dict[str, Any]) -> None:
    planned, stock, least = found["planned"], found["diffusers"], found["floor"]
    print_cells(COLUMNS, LEFT, [cells(layer) for layer in planned["layers"]])
    print(f"\n{found['arch']}, batch {found['batch']}, {found['dtype']}, {GPUS[found['gpu']].name}")
    minimum = planned["minimum_bytes"]
    times = f"{planned['bytes'] / minimum:.2f} times the least ({minimum / 1e6:.1f} MB)"
    print(f"planned:   {planned['launches']} launches, {amounts(planned)}, {times}")
    print(f"diffusers: {stock['ops']} operations, {amounts(stock)} ({stock['network']})")
    names = {"matrix_ms": "products", "weight_traffic_ms": "weights", "traffic_ms": "traffic", "launch_ms": "launches"}
    parts = [f"{text} {least[name]:.3f}" for name, text in names.items() if least[name] is not None]
    if parts:
        print(f"floor:     {least['step_ms']:.3f} ms, the largest of {', '.join(parts)}; rates of {least['source']}")
    if least["reason"]:
        print(f"floor:     {least['reason']}")


def amounts(part: dict[str, Any]) -> str:
    return f"{part['flops'] / 1e9:.2f} GFLOP, {part['bytes'] / 1e6:.1f} MB"


def cells(layer: dict[str, Any]) -> list[str]:
    """A row's cells; a dash for what is not counted."""
    return [
        layer["name"],
        layer["op"],
        layer["form"] or "-",
        str(layer["launches"]),
        str(layer["programs"] or "-"),
        f"{layer['flops'] / 1e9:.3f}" if layer["flops"] else "-",
        f"{layer['bytes'] / 1e6:.3f}",
        " x ".join(map(str, layer["shape"])),
    ]
