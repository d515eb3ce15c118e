"""What the events of torch's profiler say: which ran on the GPU, and the time of each kernel and each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType

LAYER = "layer "  # prefix of a layer's range
STEP = "ddpm step "  # of a step's, see ddpm/loop.py
RANGES = (LAYER, "ddpm ", "## Call CompiledFxGraph", "Torch-Compiled Region", "CompiledFunction")
HOST = "(host)"
IDLE = "(idle)"
NO_LAYER = "(no layer)"


@dataclass(frozen=True)
class Cost:
    """Of a layer or a kernel, per step. Attributes: name; ms; calls; what, which code the layer runs, or ""."""

    name: str
    ms: float
    calls: float
    what: str = ""


def ran_on_gpu(event: Any) -> bool:
    """Whether it is a kernel, a copy or a fill there; ranges of the host have events of their own there, too."""
    is_range = getattr(event, "is_user_annotation", False) or event.name.startswith(RANGES)
    return event.device_type == DeviceType.CUDA and not is_range


def by_kernel(events: Iterable[Any], steps: int, *, on_gpu: bool) -> list[Cost]:
    """Own time of each kernel on the GPU, or of each operator on the CPU, largest first.

    The rest of the steps is the host's on the CPU; on the GPU, what it idles from the first kernel to the last.
    """
    return _gpu_kernels(events, steps) if on_gpu else _operators(events, steps)


def _gpu_kernels(events: Iterable[Any], steps: int) -> list[Cost]:
    ran = sorted((event for event in events if ran_on_gpu(event)), key=lambda event: event.time_range.start)
    found: dict[str, list[float]] = {}
    idle, end = 0.0, ran[0].time_range.start if ran else 0.0
    for event in ran:
        found.setdefault(event.name, []).append(event.time_range.elapsed_us())
        idle += max(event.time_range.start - end, 0.0)
        end = max(event.time_range.end, end)
    costs = [Cost(name, sum(us) / steps / 1000, len(us) / steps) for name, us in found.items()]
    return largest_first([*costs, *([Cost(IDLE, idle / steps / 1000, 0)] if idle else [])])


def _operators(events: Iterable[Any], steps: int) -> list[Cost]:
    found: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == DeviceType.CPU:
            name = HOST if event.name.startswith(RANGES) else event.name
            found.setdefault(name, []).append(event.self_cpu_time_total)
    return largest_first(Cost(name, sum(us) / steps / 1000, len(us) / steps) for name, us in found.items())


def by_layer(events: Iterable[Any], steps: int, paths: dict[str, str], *, on_gpu: bool) -> list[Cost]:
    """Time inside each layer; beside them, of each operator that a step calls itself; largest first.

    On a GPU it is the device's, of what each range has launched, and what no range has launched is a row of its own;
    on the CPU the rest of a step is the host's.

    Args:
        paths: by layer, which code it runs.
    """

    def us(event: Any) -> float:
        return event.device_time_total if on_gpu else event.cpu_time_total

    events = list(events)
    steps_of_loop = [e for e in events if e.name.startswith(STEP) and e.device_type == DeviceType.CPU]
    found: dict[str, list[float]] = {}
    for step in steps_of_loop:
        for name, event in _parts(step):
            found.setdefault(name, []).append(us(event) - sum(us(inner) for inner in _nearest_layers(event)))
    costs = [Cost(name, sum(of) / steps / 1000, len(of) / steps, paths.get(name, "")) for name, of in found.items()]
    whole = [e.time_range.elapsed_us() for e in events if ran_on_gpu(e)] if on_gpu else map(us, steps_of_loop)
    rest = max(sum(whole) - sum(map(sum, found.values())), 0.0)
    return largest_first([*costs, Cost(NO_LAYER if on_gpu else HOST, rest / steps / 1000, 0 if on_gpu else 1)])


def _parts(step: Any) -> Iterator[tuple[str, Any]]:
    """What a step is made of, with names: its layers, nested ones too, and the operators that it calls itself."""
    for child in step.cpu_children:
        yield child.name.removeprefix(LAYER), child
        for layer in _layers_in(child):
            yield layer.name.removeprefix(LAYER), layer


def _layers_in(event: Any) -> Iterator[Any]:
    """All layers inside an event."""
    for layer in _nearest_layers(event):
        yield layer
        yield from _layers_in(layer)


def _nearest_layers(event: Any) -> Iterator[Any]:
    """The layers inside an event that are in no other one there."""
    for child in event.cpu_children:
        if child.name.startswith(LAYER):
            yield child
        else:
            yield from _nearest_layers(child)


def largest_first(costs: Iterable[Cost]) -> list[Cost]:
    return sorted(costs, key=lambda cost: -cost.ms)
