"""Measure how the convolutions of a network run best on this GPU, and keep the answers in a file (`ddpm tune`).

Every layer's candidates are timed as the sampling step runs them: captured in a CUDA graph, and with the layer's
weights and inputs not in the L2 cache, since a step reads each of them once.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.files import write_whole
from ddpm.fused import Convolution, FusedLucidrains, FusedUNet
from ddpm.fused.features import Features
from ddpm.kernels import backend, tuning
from ddpm.loop import network_settings

ROUNDS = 20  # replays that a median is taken of
MOST_COPIES = 64  # of a layer, to have none of them in the L2 cache
# Larger differences between a candidate and the library's convolution are errors, relative to the latter's rms.
TOLERANCES = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Layer:
    """A convolution and what it is called with: tensors on the meta device."""

    name: str
    inputs: Features
    options: dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """Of one plan of one shape: microseconds, or infinity and why."""

    plan: tuning.ConvPlan
    microseconds: float
    failure: str | None = None


def layers(
    network: FusedUNet | FusedLucidrains, batch: int, height: int, width: int, device: torch.device
) -> dict[tuning.ConvShape, Layer]:
    """One layer for each shape of convolution in a step of `batch` images, as planned for `device`."""
    found: dict[tuning.ConvShape, Layer] = {}

    def visit(name: str, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        if isinstance(module, Convolution):
            found.setdefault(module.shape(inputs[0]), Layer(name, inputs[0], options))

    network.skeleton(batch, height, width).walk(device, visit)
    return found


def tune(
    network: FusedUNet | FusedLucidrains,
    batch: int,
    height: int,
    width: int,
    device: torch.device,
    *,
    tf32: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[tuning.ConvShape, list[Timing]]:
    """Time every candidate of every shape.

    Args:
        network: fused, on the GPU `device`.
        batch, height, width: of the images.
        tf32: of float32 networks.
        progress: wraps the iteration over shapes, as tqdm does.

    Returns:
        For each shape its timings, the fastest first, failures last.
    """
    target = backend.target(device)
    results = {}
    with network_settings(device, tf32), torch.no_grad():
        for shape, layer in progress(layers(network, batch, height, width, device).items()):
            module = network.get_submodule(layer.name)
            assert isinstance(module, Convolution)  # as `layers` found it
            timings = [_time(module, layer, shape, plan, device) for plan in tuning.candidates(shape, target)]
            results[shape] = sorted(timings, key=lambda timing: timing.microseconds)
    return results


def _time(
    module: Convolution, layer: Layer, shape: tuning.ConvShape, plan: tuning.ConvPlan, device: torch.device
) -> Timing:
    one = materialize((layer.inputs, layer.options), device)
    with tuning.override({shape: plan}):
        try:
            (inputs, options) = one
            result = module(inputs, **options)
            if failure := _wrong(module, result, inputs, options):
                return Timing(plan, math.inf, failure)
            moved = tensor_bytes((one, result, module.weight))
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            copies = min(MOST_COPIES, 1 + 2 * cache // max(moved, 1))
            calls = [(deepcopy(module), materialize((layer.inputs, layer.options), device)) for _ in range(copies)]
            return Timing(plan, 1e6 * _seconds(calls, device) / copies)
        except Exception as error:  # whatever a candidate fails with, the others go on; the report names it
            return Timing(plan, math.inf, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _wrong(module: Convolution, result: Features, inputs: Features, options: dict[str, Any]) -> str | None:
    """What a candidate that computes something else is refused with."""
    expected = module.library(inputs, **options)
    wanted = expected.tensor().float() + (0 if expected.row is None else expected.row[:, :, None, None])
    got = result.tensor().float() + (0 if result.row is None else result.row[:, :, None, None])
    off = float((got - wanted).abs().max() / wanted.square().mean().sqrt())
    return None if off <= TOLERANCES[module.dtype] else f"its result is off by {off:.2g} of the rms"


def _seconds(calls: list[tuple[Convolution, Any]], device: torch.device) -> float:
    """Median of replays of a graph that holds all calls."""

    def run() -> None:
        for module, (inputs, options) in calls:
            module(inputs, **options)

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)


def materialize(value: Any, device: torch.device) -> Any:
    """Random tensors on `device` in place of those on the meta device, in any nest of tuples and dicts.

    Statistics are a mean of 0 and an M2 of 1, which any norm takes.
    """
    if isinstance(value, Features):
        parts, row = materialize((value.parts, value.row), device)
        statistics = tuple(None if s is None else torch.zeros(s.shape, device=device) for s in value.statistics)
        for s in statistics:
            if s is not None:
                s[:, :, 1] = 1
        return Features(parts, statistics, row)
    if isinstance(value, Tensor):
        real = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return real.normal_()
    if isinstance(value, tuple):
        return tuple(materialize(v, device) for v in value)
    if isinstance(value, dict):
        return {name: materialize(v, device) for name, v in value.items()}
    return value


def tensor_bytes(value: Any) -> int:
    """Of all tensors in a nest of tuples and dicts."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return sum(tensor_bytes(v) for v in values)


def save(path: Path, gpu: str, best: dict[tuning.ConvShape, tuning.ConvPlan]) -> Path:
    """Write plans for `gpu`, beside those that the file has of other shapes; whole or not at all.

    A shape's key says what float32 means: called under the `network_settings` that they were measured with.

    Raises:
        ValueError: the file there is none of plans, or of another GPU's.
    """
    plans = {}
    if path.exists():
        owner, known = tuning.load_plans(path)
        if owner != gpu:
            raise ValueError(f"{path} has plans for {owner}, and this is {gpu}; pass another --out")
        plans = {key: tuning.to_json(plan) for key, plan in known.items()}
    plans |= {shape.key: tuning.to_json(plan) for shape, plan in best.items()}
    content = {"schema": tuning.SCHEMA, "gpu": gpu, **provenance(), "plans": dict(sorted(plans.items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))
    tuning.forget()
    return path


def provenance() -> dict[str, Any]:
    """What measurements are made with: versions of the packages and, in a checkout, its commit."""
    versions: dict[str, str | None] = {}
    for name in ("fused-ddpm", "torch", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    command = ["git", "rev-parse", "--verify", "HEAD"]
    root = Path(__file__).resolve().parent.parent
    commit = None
    if (root / ".git").exists():
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    return {"versions": versions, "commit": commit}
