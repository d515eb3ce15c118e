"""`python -m bench profile`: where a step's time goes, by layer and by kernel, with a trace for chrome://tracing.

By kernel: what users run, a captured graph on a GPU; the device's own time of each kernel there, on the CPU the time of
each operator without the operators inside it. By layer: operation by operation, a range around each layer of the fused
network; a layer has the time of what runs inside it, and what runs beside the layers is named by its operator.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from bench.cli import Parser, add_device, add_out, add_source, check_positive, check_steps, open_source, timed_device
from bench.environment import describe_environment
from bench.events import LAYER, Cost, by_kernel, by_layer
from bench.gpu_state import GpuState
from bench.report import device_line, finish, print_cells, shortened, write_json
from bench.setting import conditions, draw_seeded
from bench.timing import synchronize
from ddpm.devices import resolve_dtype
from ddpm.loop import network_settings
from ddpm.sampler import Sampler

SCHEMA = 1  # of profile.json; see schemas/profile.json
BAR = 24  # characters of the longest bar
NAME = 48  # and of a name on the terminal


def main(argv: list[str]) -> int:
    """Exit code: 0; 130 after Ctrl-C.

    Raises:
        ValueError: a bad argument.
    """
    options = make_parser().parse_args(argv)
    check_positive(options, "batch", "steps", "top")
    device = timed_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(options, Path(folder), rivals=False)
        checkpoint = source.load()
    check_steps(options.steps, checkpoint)
    make = partial(Sampler, checkpoint, device=device, dtype=dtype)
    given = conditions(checkpoint, options.batch)
    chain = partial(draw_seeded, n=options.batch, steps=options.steps, **given)
    path, trace = options.out / "profile.json", options.out / "trace.json.gz"
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
        "kernels": [],
        "layers": [],
        "environment": environment,
    }
    trace.unlink(missing_ok=True)  # of an earlier run
    interrupted = False
    try:
        content["kernels"] = as_rows(profile_kernels(make(compile=options.compile), chain, options.steps, trace))
        write_json(path, content)
        if not options.compile:
            content["layers"] = as_rows(profile_layers(make(compile=False, capture=False), chain, options))
    except KeyboardInterrupt:
        interrupted = True
    print_profile(content, options.top)
    return finish(path, content, "bench.profile_page", trace, parts="tables", interrupted=interrupted)


def make_parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = Parser(prog="python -m bench profile", description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--batch", type=int, default=1, help="images of a chain (1)")
    parser.add_argument("--steps", type=int, default=5, help="steps of the profiled chain (5)")
    add_device(parser, dtype=True)
    parser.add_argument("--compile", action="store_true", help="compile the step; then there is no table by layer")
    parser.add_argument("--top", type=int, default=20, help="rows of a table on the terminal (20)")
    add_out(parser, "profile.json, profile.html and trace.json.gz")
    return parser


@contextlib.contextmanager
def profiling(device: torch.device) -> Iterator[profile]:
    """Everything on the host, and on the GPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        yield profiler
        synchronize(device)


def profile_kernels(sampler: Sampler, chain: Callable[[Sampler], Any], steps: int, trace: Path) -> list[Cost]:
    """Of a warm chain, largest first; the trace is written to a file."""
    # Generated code is one call for the profiler unless each kernel is told to say its name.
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        chain(sampler)
    with profiling(sampler.device) as profiler:
        chain(sampler)
    profiler.export_chrome_trace(str(trace))
    return by_kernel(profiler.events(), steps, on_gpu=sampler.device.type == "cuda")


def profile_layers(sampler: Sampler, chain: Callable[[Sampler], Any], options: argparse.Namespace) -> list[Cost]:
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
    where = device_line(content["environment"])
    print(f"{content['checkpoint']}, {content['dtype']}, batch {content['batch']}; {where}")
    if content["compiled"]:
        print("\na compiled step has no layers to be told apart; leave --compile out")
    for title in ("layers", "kernels"):
        rows = content[title]
        if not rows:
            continue
        print(f"\nby {title[:-1]}, {sum(row['ms_per_step'] for row in rows):.3f} ms a step, profiler running")
        most = rows[0]["ms_per_step"] or 1.0
        columns, lines = table(title[:-1], rows[:top])
        bars = ["█" * round(BAR * row["ms_per_step"] / most) for row in rows[:top]]
        lines = [[shortened(name, NAME), bar, *rest] for (name, *rest), bar in zip(lines, bars, strict=True)]
        print_cells((columns[0], "", *columns[1:]), (columns[0], "", "what"), lines)
        if len(rows) > top:
            print(f"and {len(rows) - top} more")


def table(title: str, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines; of kernels nothing is known but the name."""
    columns = [title, "ms/step", "share", "calls/step"]
    lines = [
        [row["name"], f"{row['ms_per_step']:.3f}", f"{row['share']:.1%}", f"{row['calls_per_step']:.1f}"]
        for row in rows
    ]
    if any(row["what"] for row in rows):
        columns.append("what")
        lines = [[*line, row["what"]] for line, row in zip(lines, rows, strict=True)]
    return columns, lines
