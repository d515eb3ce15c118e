"""`python -m bench scale`: how the cost of our sampler grows with the batch, the resolution and the steps.

Each axis is fitted by a power law, cost = factor size^exponent. The points of an axis take turns, as variants do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cli import (
    Parser,
    add_device,
    add_out,
    add_source,
    check_positive,
    check_steps,
    open_source,
    parse_numbers,
    timed_device,
)
from bench.contestant import reason
from bench.environment import describe_environment
from bench.gpu_state import GpuState
from bench.measure import turn
from bench.report import device_line, finish, print_cells, write_json
from bench.rows import spread
from bench.setting import conditions, draw_seeded
from bench.timing import seconds_of
from bench.walk import META, meta_network
from ddpm.checkpoints import Checkpoint
from ddpm.devices import resolve_dtype
from ddpm.run import progress_bar
from ddpm.sampler import Sampler

SCHEMA = 1  # of scale.json; see schemas/scale.json
STEPS = 20  # of a chain of the other axes
COLUMNS = ("axis", "size", "ms", "p20", "p80", "per", "status")
LEFT = ("axis", "per", "status")


@dataclass(frozen=True)
class Place:
    """Where a chain is timed.

    Attributes:
        axis: "batch", "size" (H = W) or "steps".
        x: where on the axis.
        batch, size, steps: of the chain.
    """

    axis: str
    x: int
    batch: int
    size: tuple[int, int]
    steps: int

    @property
    def per(self) -> str:
        """What is counted: a chain has all its steps where these vary."""
        return "chain" if self.axis == "steps" else "step"


@dataclass(frozen=True)
class Law:
    """cost = factor x^exponent in milliseconds. Attributes: error, the exponent's standard error, None for two points;
    r_squared, of the logarithms, None where they do not vary."""

    factor: float
    exponent: float
    error: float | None
    r_squared: float | None


def main(argv: list[str]) -> int:
    """Exit code: 0; 130 after Ctrl-C.

    Raises:
        ValueError: a bad argument.
    """
    options = make_parser().parse_args(argv)
    check_positive(options, "rounds")
    device = timed_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(options, Path(folder), rivals=False)
        checkpoint = source.load()
    axes = places(options, checkpoint)
    content: dict[str, Any] = {"schema": SCHEMA, "kind": "scale", "checkpoint": source.name, "dtype": dtype}
    content |= {"points": [], "laws": {}}
    path = options.out / "scale.json"
    interrupted = False
    with GpuState(device) as gpu:
        content["environment"] = describe_environment(device, gpu)
    make = partial(Sampler, device=device, dtype=dtype, compile=options.compile)
    try:
        for name, axis in axes.items():
            measure(checkpoint, make, axis, options.rounds, content["points"].append)
            content["laws"] |= fits(name, content["points"])
            write_json(path, content)
    except KeyboardInterrupt:
        interrupted = True
    print_scale(content)
    return finish(path, content, "bench.scale_page", parts="points", interrupted=interrupted)


def make_parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = Parser(prog="python -m bench scale", description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--batch", metavar="SIZES", default="1,2,4,8,16", help="batch sizes (1,2,4,8,16)")
    parser.add_argument("--sizes", metavar="PIXELS", help="H = W (1/2, 1, 3/2 and 2 of the checkpoint's)")
    parser.add_argument("--steps", metavar="NUMBERS", default="10,20,40,80", help="lengths of a chain (10,20,40,80)")
    parser.add_argument("--rounds", type=int, default=5, help="timed chains of each point (5)")
    add_device(parser, dtype=True)
    parser.add_argument("--compile", action="store_true", help="compile the step, anew for every point but of steps")
    add_out(parser, "scale.json and scale.html")
    return parser


def places(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, list[Place]]:
    """Of every axis.

    Raises:
        ValueError: a bad argument.
    """
    own = checkpoint.sample_size
    batches, steps = parse_numbers("batch", options.batch), parse_numbers("steps", options.steps)
    check_steps(max(steps), checkpoint)
    if options.sizes is None:
        sizes = [side * own[0] // 2 for side in (1, 2, 3, 4) if takes(checkpoint, side * own[0] // 2)]
    else:
        sizes = parse_numbers("sizes", options.sizes)
        for size in sizes:
            if not takes(checkpoint, size):
                raise ValueError(f"--sizes {size}: the network of {checkpoint.source} takes no {size} x {size} images")
    return {
        "batch": [Place("batch", n, n, own, STEPS) for n in batches],
        "size": [Place("size", n, 1, (n, n), STEPS) for n in sizes],
        "steps": [Place("steps", n, 1, own, n) for n in steps],
    }


def takes(checkpoint: Checkpoint, size: int) -> bool:
    """Whether the network takes images of this size, tried without data."""
    plain = meta_network(checkpoint.network)
    arguments = [None if t is None else t.to(META) for t in plain.example(1, size, size)]
    try:
        with torch.no_grad():
            plain(*arguments)
    except RuntimeError:  # halves that do not fit together again
        return False
    return True


def measure(
    checkpoint: Checkpoint, make: Any, axis: list[Place], rounds: int, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Hand a row for each place of an axis to `keep`: one that failed says so; after Ctrl-C, those that were timed."""
    chains: dict[Place, Chain] = {}
    status = dict.fromkeys(axis, "ok")
    times: dict[Place, list[float]] = {place: [] for place in axis}
    try:
        for place in axis:
            try:
                chains[place] = Chain(checkpoint, make, place)
                chains[place]()
            except Exception as error:  # out of memory, say
                status[place] = f"skipped: {reason(error)}"
                chains.pop(place, None)
        with progress_bar(rounds, bool(chains) and sys.stderr.isatty()) as advance:
            for number in range(rounds):
                for place in turn(list(chains), number):
                    try:
                        times[place].append(1000 * chains[place]() / (1 if place.per == "chain" else place.steps))
                    except Exception as error:
                        status[place] = f"{'stopped' if times[place] else 'skipped'}: {reason(error)}"
                        del chains[place]
                advance()
    except KeyboardInterrupt:
        for place in chains:
            status[place] = f"stopped after round {len(times[place])}"
        raise
    finally:
        for place in axis:
            if times[place] or status[place].startswith("skipped"):
                keep(row(place, times[place], status[place]))


class Chain:
    """A chain of one place. It has a sampler of its own, which keeps what it captured or compiled."""

    def __init__(self, checkpoint: Checkpoint, make: Any, place: Place):
        resized = replace(checkpoint, sample_size=place.size)
        self.place, self.sampler, self.conditions = place, make(resized), conditions(resized, place.batch)

    def __call__(self) -> float:
        """Seconds."""
        return seconds_of(self._draw, self.sampler.device)

    def _draw(self) -> None:
        draw_seeded(self.sampler, self.place.batch, steps=self.place.steps, **self.conditions)


def row(place: Place, times: list[float], status: str) -> dict[str, Any]:
    """As schemas/scale.json says."""
    p20, median, p80 = spread(times) if times else (None, None, None)
    found = {"axis": place.axis, "x": place.x, "per": place.per, "ms": median, "p20": p20, "p80": p80}
    return found | {"samples_ms": times, "status": status}


def fits(axis: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The law of an axis by its name; none for fewer than two points."""
    timed = [(row["x"], row["ms"]) for row in rows if row["axis"] == axis and row["ms"] is not None]
    return {axis: vars(fit(*zip(*timed, strict=True)))} if len(timed) > 1 else {}


def fit(sizes: Any, ms: Any) -> Law:
    """By least squares on the logarithms, at two points or more."""
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(ms, float))
    error = None
    if len(x) > 2:
        (exponent, factor), covariance = np.polyfit(x, y, 1, cov=True)
        error = float(np.sqrt(covariance[0, 0]))
    else:
        exponent, factor = np.polyfit(x, y, 1)
    rest, spread = ((y - factor - exponent * x) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return Law(float(np.exp(factor)), float(exponent), error, float(1 - rest / spread) if spread > 0 else None)


def print_scale(content: dict[str, Any]) -> None:
    print(f"{content['checkpoint']}, {content['dtype']}; {device_line(content['environment'])}\n")
    print_cells(COLUMNS, LEFT, [cells(found) for found in content["points"]])
    for axis, law in content["laws"].items():
        print(sentence(axis, law))


def sentence(axis: str, law: dict[str, float | None]) -> str:
    """The law for people."""
    per = "chain" if axis == "steps" else "step"
    error = "" if law["error"] is None else f" ± {law['error']:.2f}"
    quality = "" if law["r_squared"] is None else f" (R² {law['r_squared']:.3f})"
    return f"ms per {per} grow as {axis}^{law['exponent']:.2f}{error}{quality}"


def cells(found: dict[str, Any]) -> list[str]:
    times = ["-" if found[name] is None else f"{found[name]:.3f}" for name in ("ms", "p20", "p80")]
    return [found["axis"], str(found["x"]), *times, found["per"], found["status"]]
