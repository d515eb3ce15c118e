"""`python -m bench gpu`: the GPU tests, then a fixed set of comparisons; everything in one JSON file.

Made for a machine with a GPU and no network, with the machine's own torch: it needs torch, triton, numpy, pytest and
safetensors, and leaves out what else is missing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.cli import DEMO, OUT, Parser, check_options
from bench.compare import Deadline, compare
from bench.environment import describe_environment
from bench.gpu_state import GpuState
from bench.gpu_tests import run_gpu_tests
from bench.networks import save_random
from bench.report import print_table, write_json
from bench.variants import Setting
from ddpm.checkpoints import load_checkpoint

BATCHES = (1, 16)
DTYPES = ("fp32", "tf32", "fp16")
STEPS = 100
ROUNDS = 5
# The tests may take this share of the time; the comparisons get the rest.
TESTS_SHARE = 0.5


def find_device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def main(argv: list[str]) -> int:
    """Exit code: 0; 1 without a GPU, without a GPU test that ran, or with one that failed; 130 after Ctrl-C."""
    parser = Parser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="directory of gpu.json (bench/out)")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin nothing new after this time (540)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="also time the compiled variant"
    )
    options = parser.parse_args(argv)
    check_options(options)
    device = find_device()
    if device is None:
        print("error: torch finds no CUDA GPU here, and `bench gpu` needs one", file=sys.stderr)
        return 1
    return run(options, device)


def run(options: argparse.Namespace, device: torch.device) -> int:
    deadline = Deadline(options.seconds)
    rows: list[dict[str, Any]] = []
    tests: dict[str, Any] | None = None
    interrupted = False
    path = options.out / "gpu.json"
    with GpuState(device) as gpu, tempfile.TemporaryDirectory() as folder:

        def save() -> None:  # after every part, so that a run cut short leaves its results
            environment = describe_environment(device, gpu)
            write_json(path, {"schema": 1, "tests": tests, "rows": rows, "environment": environment})

        try:
            tests = run_gpu_tests(TESTS_SHARE * options.seconds)
            print(summary(tests))
            save()
            for setting in settings(device, Path(folder)):
                compare(setting, compiled=options.compile, gpu=gpu, deadline=deadline, keep=rows.append)
                save()
        except KeyboardInterrupt:
            interrupted = True
            save()
    print_table(rows)
    print(f"{'interrupted; the finished parts are in ' if interrupted else ''}{path}")
    return 130 if interrupted else exit_code(tests)


def settings(device: torch.device, folder: Path) -> Iterator[Setting]:
    """The demo at every precision, then the CIFAR-10 architecture with random weights."""
    for name, source in networks(folder):
        checkpoint = load_checkpoint(source)
        for dtype in DTYPES:
            for batch in BATCHES:
                yield Setting(checkpoint, name, device, dtype, batch, STEPS, ROUNDS)


def networks(folder: Path) -> Iterator[tuple[str, Path]]:
    yield DEMO.name, DEMO
    yield "cifar10-32 (random weights)", save_random(folder / "cifar10-32")


def summary(tests: dict[str, Any]) -> str:
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped"))
    lines = [f"GPU tests: {counts}" + (f" ({tests['problem']})" if tests["problem"] else "")]
    lines += [f"  {name}" for name in tests["failures"]]
    lines += [f"  not collected: {name}" for name in tests["not_collected"]]
    return "\n".join(lines)


def exit_code(tests: dict[str, Any] | None) -> int:
    """0 only where a GPU test ran and none failed."""
    return 0 if tests and tests["passed"] and not tests["failed"] and not tests["problem"] else 1
