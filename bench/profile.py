"""`python -m bench profile`: where a step's time goes, by layer and by kernel, with a trace for chrome://tracing.

By kernel: what users run, a captured graph on a GPU; the device's own time of each kernel there, on the CPU the time of
each operator without the operators inside it. By layer: operation by operation, a range around each layer of the fused
network; a layer has the time of what runs inside it, and what runs beside the layers is named by its operator. What is
left of a step is the host's own time.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.cli import OUT, Parser, add_source, check_options, open_source
from bench.environment import describe_environment
from bench.gpu_state import GpuState
from bench.report import device_line, print_cells, write_json, write_page_of
from bench.setting import conditions
from ddpm.checkpoints import Checkpoint
from ddpm.devices import DTYPES, resolve_device, resolve_dtype
from ddpm.loop import network_settings
from ddpm.sampler import Sampler

SCHEMA = 1  # of profile.json
LAYER = "layer "  # prefix of a layer's range
STEP = "ddpm step "  # of a step's, see ddpm/loop.py
RANGES = (LAYER, "ddpm ", "## Call CompiledFxGraph", "Torch-Compiled Region", "CompiledFunction")
HOST = "(host)"
BAR = 24  # characters of the longest bar


@dataclass(frozen=True)
class Cost:
    """Of a layer or a kernel, per step. Attributes: name; ms; calls; what, which code the layer runs, or ""."""

    name: str
    ms: float
    calls: float
    what: str = ""


def main(argv: list[str]) -> int:
    """Exit code 0.

    Raises:
        ValueError: a bad argument.
    """
    options = make_parser().parse_args(argv)
    check_options(options, "batch", "steps", "top")
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(options, Path(folder), rivals=False)
        checkpoint = source.load()
    total = checkpoint.schedule.num_train_timesteps
    if options.steps > total:
        raise ValueError(f"--steps {options.steps} is more than the {total} steps of {source.name}")
    make = partial(Sampler, checkpoint, device=device, dtype=dtype)
    chain = partial(run_chain, checkpoint, options.batch, options.steps)
    trace = options.out / "trace.json.gz"
    kernels = profile_kernels(make(compile=options.compile), chain, options.steps, trace)
    layers = [] if options.compile else profile_layers(make(compile=False, capture=False), chain, options)
    with GpuState(device) as gpu:
        environment = describe_environment(device, gpu)
    content = {
        "schema": SCHEMA,
        "kind": "profile",
        "checkpoint": source.name,
        "dtype": dtype,
        "batch": options.batch,
        "steps": options.steps,
        "compiled": options.compile,
        "kernels": as_rows(kernels),
        "layers": as_rows(layers),
        "environment": environment,
    }
    path = write_json(options.out / "profile.json", content)
    print_profile(content, options.top)
    pages = write_page_of(path, "bench.profile_page", content)
    print(", ".join(map(str, (path, trace, *pages))))
    return 0


def make_parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = Parser(prog="python -m bench profile", description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--batch", type=int, default=1, help="images of a chain (1)")
    parser.add_argument("--steps", type=int, default=5, help="steps of the profiled chain (5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    parser.add_argument("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)} (auto: fp32)")
    parser.add_argument("--compile", action="store_true", help="compile the step; then there is no table by layer")
    parser.add_argument("--top", type=int, default=20, help="rows of a table on the terminal (20)")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="directory of profile.json, .html, trace.json.gz (bench/out)"
    )
    return parser


def run_chain(checkpoint: Checkpoint, n: int, steps: int, sampler: Sampler) -> None:
    given = conditions(checkpoint, n)
    sampler.sample(n, seeds=range(n), steps=steps, sampler="ddpm", batch_size=n, progress=False, **given)


@contextlib.contextmanager
def profiling(device: torch.device) -> Iterator[profile]:
    """Everything on the host, and on the GPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        yield profiler
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def profile_kernels(sampler: Sampler, chain: Any, steps: int, trace: Path) -> list[Cost]:
    """Of a warm chain, largest first; the trace is written to a file."""
    # Generated code is one call for the profiler unless each kernel is told to say its name.
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        chain(sampler)
    with profiling(sampler.device) as profiler:
        chain(sampler)
    profiler.export_chrome_trace(str(trace))
    return by_kernel(profiler.events(), steps, on_gpu=sampler.device.type == "cuda")


def by_kernel(events: Any, steps: int, *, on_gpu: bool) -> list[Cost]:
    """Own time of each kernel on the GPU, or of each operator on the CPU; the rest of the steps there is the host's."""
    found: dict[str, list[float]] = {}
    for event in events:
        is_range = event.name.startswith(RANGES)
        if on_gpu:
            if event.device_type == DeviceType.CUDA and not is_range:
                found.setdefault(event.name, []).append(event.time_range.elapsed_us())
        elif event.device_type == DeviceType.CPU:
            name = HOST if is_range else event.name
            found.setdefault(name, []).append(event.self_cpu_time_total)
    return largest_first(Cost(name, sum(us) / steps / 1000, len(us) / steps) for name, us in found.items())


def profile_layers(sampler: Sampler, chain: Any, options: argparse.Namespace) -> list[Cost]:
    """Of a warm chain, operation by operation; largest first."""
    network = sampler.network
    chain(sampler)
    with ranges_around_layers(network), profiling(sampler.device) as profiler:
        chain(sampler)
    with network_settings(sampler.device, sampler.dtype == "tf32"):  # plans depend on what float32 means
        paths = network.explain(sampler.device, options.batch, *sampler.checkpoint.sample_size)
    return by_layer(
        profiler.events(),
        options.steps,
        {path.layer: path.path for path in paths},
        on_gpu=sampler.device.type == "cuda",
    )


@contextlib.contextmanager
def ranges_around_layers(network: Any) -> Iterator[None]:
    """A range of the profiler's around every layer that can describe itself, as `explain` lists them."""
    open_ranges: list[record_function] = []

    def enter(name: str, *_: Any) -> None:
        open_ranges.append(record_function(LAYER + name))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    with contextlib.ExitStack() as hooks:
        for name, module in network.named_modules() if isinstance(network, nn.Module) else ():
            if hasattr(module, "describe"):
                hooks.callback(module.register_forward_pre_hook(partial(enter, name)).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def by_layer(events: Any, steps: int, paths: dict[str, str], *, on_gpu: bool) -> list[Cost]:
    """Time inside each layer; beside them, of each operator that a step calls itself; of the rest, the host.

    On a GPU it is the device's, of what each range has launched.

    Args:
        paths: by layer, which code it runs.
    """

    def us(event: Any) -> float:
        return event.device_time_total if on_gpu else event.cpu_time_total

    found: dict[str, list[float]] = {}
    left = 0.0
    for step in (event for event in events if event.name.startswith(STEP) and event.device_type == DeviceType.CPU):
        left += us(step)
        for name, event in parts(step):
            found.setdefault(name, []).append(us(event) - sum(us(inner) for inner in nearest_layers(event)))
            left -= found[name][-1]
    costs = [Cost(name, sum(of) / steps / 1000, len(of) / steps, paths.get(name, "")) for name, of in found.items()]
    return largest_first([*costs, *([] if on_gpu else [Cost(HOST, left / steps / 1000, 1.0)])])


def parts(step: Any) -> Iterator[tuple[str, Any]]:
    """What a step is made of, with names: its layers, nested ones too, and the operators that it calls itself."""
    for child in step.cpu_children:
        if child.name.startswith(LAYER):
            yield child.name.removeprefix(LAYER), child
            for layer in layers_in(child):
                yield layer.name.removeprefix(LAYER), layer
        else:
            yield child.name, child


def layers_in(event: Any) -> Iterator[Any]:
    """All layers inside an event."""
    for layer in nearest_layers(event):
        yield layer
        yield from layers_in(layer)


def nearest_layers(event: Any) -> Iterator[Any]:
    """The layers inside an event that are in no other one there."""
    for child in event.cpu_children:
        if child.name.startswith(LAYER):
            yield child
        else:
            yield from nearest_layers(child)


def largest_first(costs: Any) -> list[Cost]:
    return sorted(costs, key=lambda cost: -cost.ms)


def as_rows(costs: list[Cost]) -> list[dict[str, Any]]:
    """name, ms_per_step, share, calls_per_step, what."""
    total = sum(cost.ms for cost in costs)
    return [
        {
            "name": cost.name,
            "ms_per_step": cost.ms,
            "share": cost.ms / total if total else 0.0,
            "calls_per_step": cost.calls,
            "what": cost.what,
        }
        for cost in costs
    ]


def print_profile(content: dict[str, Any], top: int) -> None:
    print(
        f"{content['checkpoint']}, {content['dtype']}, batch {content['batch']}; {device_line(content['environment'])}"
    )
    for title in ("layers", "kernels"):
        rows = content[title]
        if not rows:
            print("\nby layer: a compiled step has no layers; leave --compile out")
            continue
        print(f"\nby {title[:-1]}, {sum(row['ms_per_step'] for row in rows):.3f} ms a step, profiler running")
        most = rows[0]["ms_per_step"] or 1.0
        bars = ["█" * round(BAR * row["ms_per_step"] / most) for row in rows]
        columns, lines = table(title[:-1], rows)
        lines = [[name, bar, *rest] for (name, *rest), bar in zip(lines[:top], bars, strict=False)]
        print_cells((columns[0], "", *columns[1:]), (columns[0], "", "what"), lines)
        if len(rows) > top:
            print(f"and {len(rows) - top} more")


def table(title: str, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines; of kernels nothing is known but the name."""
    columns, lines = [title, "ms/step", "share", "calls/step"], []
    for row in rows:
        name = row["name"] if len(row["name"]) <= 48 else row["name"][:47] + "…"
        lines.append([name, f"{row['ms_per_step']:.3f}", f"{row['share']:.1%}", f"{row['calls_per_step']:.1f}"])
    if any(row["what"] for row in rows):
        columns.append("what")
        lines = [[*line, row["what"]] for line, row in zip(lines, rows, strict=True)]
    return columns, lines
