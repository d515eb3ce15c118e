"""`python -m bench gpu`: the GPU tests, then a fixed set of comparisons; everything in one JSON file.

Made for a machine with a GPU and no network, with the machine's own torch: it needs torch, triton, numpy, pytest and
safetensors, and leaves out what else is missing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.architectures import DEMO
from bench.cli import Parser, add_out, check_positive, timed_device
from bench.gpu_tests import run_gpu_tests
from bench.measure import Deadline, Plan
from bench.report import results_of_tests
from bench.run import compare_all
from bench.setting import Setting, chain_timesteps
from bench.source import Source, checkpoint_source, random_source

CAPTURED = ("ours-graph", "ours-planned", "diffusers", "pytorch")
# The rival with a CUDA graph.
GRAPHED = ("ours-graph-compiled", "diffusers-reduce-overhead")
COMPILED = ("ours-planned-compiled", "diffusers-compiled")
# (architecture, or None for the demo; dtype; batch; variants), what matters most first: time may run out. Compiled ones
# take a minute each to get ready, and the slowest, max-autotune, would take the time of all others.
COMPARISONS = (
    ("cifar10-32", "fp16", 1, (*CAPTURED, *GRAPHED)),
    ("cifar10-32", "fp16", 256, (*CAPTURED, *GRAPHED)),
    ("cifar10-32", "fp32", 1, CAPTURED),
    ("cifar10-32", "fp16", 16, CAPTURED),
    ("ddpm-256", "fp16", 1, CAPTURED),
    ("ddpm-256", "fp16", 8, CAPTURED),
    (None, "fp32", 1, CAPTURED),
    (None, "tf32", 16, CAPTURED),
    ("cifar10-32", "fp16", 1, COMPILED),
)
STEPS = 100
ROUNDS = 9
LIMIT_S = 120.0
# The tests may take this share of the time; the comparisons get the rest.
TESTS_SHARE = 0.5


def find_device() -> torch.device | None:
    return timed_device(f"cuda:{torch.cuda.current_device()}") if torch.cuda.is_available() else None


def main(argv: list[str]) -> int:
    """Exit code: 0; 1 without a GPU, without a GPU test that ran, or with one that failed; 130 after Ctrl-C."""
    assert __doc__ is not None
    parser = Parser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    add_out(parser, "gpu.json, gpu.html and gpu.log")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin nothing new after this time (540)")
    options = parser.parse_args(argv)
    check_positive(options, "seconds")
    device = find_device()
    if device is None:
        print("error: torch finds no CUDA GPU here, and `bench gpu` needs one", file=sys.stderr)
        return 1
    return run(options.out, options.seconds, device)


def run(out: Path, seconds: float, device: torch.device) -> int:
    deadline = Deadline(seconds)
    tests = run_gpu_tests(TESTS_SHARE * seconds)
    print("GPU tests:", *results_of_tests(tests), sep="\n  ")
    with tempfile.TemporaryDirectory() as folder:
        # The variants' compilers share what they have: many are the same kernels, and time is short.
        plan = Plan(out / "gpu.log", LIMIT_S, deadline, Path(folder) / "caches")
        code = compare_all(settings(device, Path(folder)), plan, out / "gpu.json", {"kind": "gpu", "tests": tests})
    return code or exit_code(tests)


def settings(device: torch.device, folder: Path) -> list[Setting]:
    """Of COMPARISONS; what has to be written for them goes to `folder`."""
    sources = {name: source(name, folder / (name or "demo")) for name in dict.fromkeys(c[0] for c in COMPARISONS)}
    chains = {name: chain_timesteps(found.load(), STEPS) for name, found in sources.items()}
    return [
        Setting(sources[name], device, dtype, batch, chains[name], ROUNDS, only=only)
        for name, dtype, batch, only in COMPARISONS
    ]


def source(name: str | None, folder: Path) -> Source:
    folder.mkdir(exist_ok=True)
    return checkpoint_source(str(DEMO), {}, folder) if name is None else random_source(name, folder)


def exit_code(tests: dict[str, Any]) -> int:
    """0 only where a GPU test ran and none failed."""
    return 0 if tests["passed"] and not tests["failed"] and not tests["problem"] else 1
