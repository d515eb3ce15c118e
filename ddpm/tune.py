"""Measure how the convolutions of a network run best on this GPU, and keep the answers in a file (`ddpm tune`).

Every layer's candidates are timed as the sampling step runs them: captured in a CUDA graph, and with the layer's
weights and inputs not in the L2 cache, since a step reads each of them once.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
) -> Iterator[tuple[tuning.ConvShape, list[Timing]]]:
    """Time every candidate of every shape; files of plans are not read.

    Args:
        network: fused, on the GPU `device`.
        batch, height, width: of the images.
        tf32: of float32 networks.
        progress: wraps the iteration over shapes, as tqdm does.

    Yields:
        Each shape as it is finished, and its timings: the fastest first, failures last.
    """
    target = backend.target(device)
    with _measuring(device, tf32):
        found = layers(network, batch, height, width, device)
    for shape, layer in progress(found.items()):
        module = network.get_submodule(layer.name)
        assert isinstance(module, Convolution)  # as `layers` found it
        with _measuring(device, tf32):  # not around the yield: the caller's settings are the caller's
            timings = [_time(module, layer, shape, plan, device) for plan in tuning.candidates(shape, target)]
        yield shape, sorted(timings, key=lambda timing: timing.microseconds)


@contextmanager
def _measuring(device: torch.device, tf32: bool) -> Iterator[None]:
    with network_settings(device, tf32), torch.no_grad(), tuning.without_files():
        yield


def _time(
    module: Convolution, layer: Layer, shape: tuning.ConvShape, plan: tuning.ConvPlan, device: torch.device
) -> Timing:
    with tuning.override({shape: plan}):
        try:
            one = inputs, options = materialize((layer.inputs, layer.options), device)
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


def save(path: Path, gpu: str, best: dict[tuning.ConvShape, tuning.ConvPlan]) -> None:
    """Write plans for `gpu`, beside those that the file has of other shapes; whole or not at all.

    What is there and cannot be used, being damaged or of another schema, is renamed, with a warning. A shape's key says
    what float32 means: called under the `network_settings` that they were measured with.

    Raises:
        ValueError: the file there is of another GPU's plans, or cannot be read or written.
    """
    measured = provenance()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plans = _kept(path, gpu)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror or error}); pass another --out") from error
    plans |= {shape.key: tuning.to_json(plan) | {"measured": measured} for shape, plan in best.items()}
    content = {"schema": tuning.SCHEMA, "gpu": gpu, "plans": dict(sorted(plans.items()))}
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))
    tuning.forget()


def _kept(path: Path, gpu: str) -> dict[str, Any]:
    """The plans at `path` as the file holds them, each with what it was measured with."""
    if not path.exists():
        return {}
    tuning.forget()  # what was read of it before: it may have changed since
    try:
        owner, _ = tuning.load_plans(path)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            raise  # a directory, or not ours to read: nobody knows what would be moved
        names = (path.with_name(f"{path.name}.old{number or ''}") for number in itertools.count())
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        warnings.warn(f"{path} is damaged or of another schema: it is kept as {aside}, a new one starts", stacklevel=3)
        return {}
    if owner != gpu:
        raise ValueError(f"{path} has plans for {owner}, and this is {gpu}; pass another --out")
    plans: dict[str, Any] = json.loads(path.read_text())["plans"]
    return plans


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
