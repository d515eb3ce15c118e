"""The command line. argparse and nothing else: the benchmark must start where the product's click is not installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from bench.compare import Deadline, Setting, compare
from bench.environment import describe_environment
from bench.gpu_state import GpuState
from bench.report import print_table, write_json
from ddpm.checkpoints import load_checkpoint
from ddpm.sampler import DTYPES, resolve_device, resolve_dtype

DEMO = Path(str(files("ddpm") / "assets" / "emoji32-smileys"))
OUT = Path(__file__).parent / "out"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the usage text; `main` prints it."""
        raise ValueError(message)


def parse_batches(text: str) -> list[int]:
    """ "1,16" -> [1, 16].

    Raises:
        ValueError: anything but positive integers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--batch {text!r}: expected positive integers, such as 1,16")
    return list(dict.fromkeys(int(part) for part in parts))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench",
        description="Time our sampler and diffusers' pipeline on one checkpoint, taking turns, and check that their "
        "images agree. `python -m bench gpu` instead runs the GPU tests and a fixed set of comparisons; `python -m "
        "bench roofline` counts a step's launches, products and bytes without a GPU; `python -m bench cpu` compares "
        "with compiled diffusers and OpenVINO on the CPU.",
    )
    parser.add_argument("checkpoint", nargs="?", help="a directory that diffusers saved, or a hub id; the demo")
    parser.add_argument("--batch", default="1,16", help="batch sizes (1,16)")
    parser.add_argument("--steps", type=int, default=50, help="steps of a timed chain (50)")
    parser.add_argument("--rounds", type=int, default=5, help="chains of each variant (5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    parser.add_argument("--dtype", default="fp32", choices=[*DTYPES, "auto"], help="precision of the network (fp32)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="also time the compiled variants"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="directory of bench.json (bench/out)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a bad argument, 130 after Ctrl-C; `gpu` has its own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["gpu"]:
            from bench import gpu

            return gpu.main(arguments[1:])
        if arguments[:1] == ["roofline"]:
            from bench import roofline

            return roofline.main(arguments[1:])
        if arguments[:1] == ["cpu"]:
            from bench import cpu

            return cpu.main(arguments[1:])
        return run(make_parser().parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def settings(options: argparse.Namespace) -> list[Setting]:
    """One per batch size.

    Raises:
        ValueError: a bad argument.
    """
    batches = parse_batches(options.batch)
    check_options(options, "steps", "rounds")
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    source = options.checkpoint or DEMO
    checkpoint = load_checkpoint(source)
    total = checkpoint.schedule.num_train_timesteps
    if options.steps > total:
        raise ValueError(f"--steps {options.steps} is more than the {total} steps of {source}")
    name = Path(source).name
    return [Setting(checkpoint, name, device, dtype, batch, options.steps, options.rounds) for batch in batches]


def check_options(options: argparse.Namespace, *numbers: str) -> None:
    """Raise ValueError where one of these, if given, is not positive, or --out is a file."""
    for name in numbers:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected a positive integer")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file; expected a directory")


def measure(plan: list[Setting], compiled: bool) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """The rows of these comparisons, the environment, and whether Ctrl-C ended them."""
    device = plan[0].device
    rows: list[dict[str, Any]] = []
    interrupted = False
    with GpuState(device) as gpu:
        try:
            for setting in plan:
                compare(setting, compiled=compiled, gpu=gpu, deadline=Deadline(None), keep=rows.append)
        except KeyboardInterrupt:
            interrupted = True
        return rows, describe_environment(device, gpu), interrupted


def run(options: argparse.Namespace) -> int:
    rows, environment, interrupted = measure(settings(options), options.compile)
    path = write_json(options.out / "bench.json", {"schema": 1, "rows": rows, "environment": environment})
    print_table(rows)
    return finish(path, interrupted)


def finish(path: Path, interrupted: bool) -> int:
    """Say where the rows are; the exit code."""
    print(f"{'interrupted; the finished rows are in ' if interrupted else ''}{path}")
    return 130 if interrupted else 0
