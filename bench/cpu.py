"""`python -m bench cpu`: our sampler on the CPU against diffusers, compiled diffusers and OpenVINO, taking turns.

The network is google/ddpm-cifar10-32's with random weights, unless a checkpoint is named. OpenVINO is an extra:
`pip install -e .[openvino]`; what is not installed is a row that says so. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.cli import OUT, Parser, check_options, finish, measure, parse_batches
from bench.networks import save_random
from bench.report import print_table, write_json
from bench.variants import Setting
from ddpm.checkpoints import load_checkpoint

CPU = torch.device("cpu")


def main(argv: list[str]) -> int:
    """Exit code: 0; 130 after Ctrl-C."""
    assert __doc__ is not None
    parser = Parser(prog="python -m bench cpu", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="a directory that diffusers saved (cifar10-32, random weights)")
    parser.add_argument("--batch", default="1,4", help="batch sizes (1,4)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a timed chain (10)")
    parser.add_argument("--rounds", type=int, default=11, help="chains of each variant (11)")
    parser.add_argument("--threads", type=int, default=None, help="of every variant (torch's own number)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="also time the compiled variants"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="directory of cpu.json (bench/out)")
    options = parser.parse_args(argv)
    check_options(options, "steps", "rounds", "threads")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return run(options, parse_batches(options.batch))


def run(options: argparse.Namespace, batches: list[int]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = options.checkpoint or save_random(Path(folder) / "cifar10-32")
        name = Path(source).name + ("" if options.checkpoint else " (random weights)")
        checkpoint = load_checkpoint(source)
        plan = [
            Setting(checkpoint, name, CPU, "fp32", batch, options.steps, options.rounds, peers=True)
            for batch in batches
        ]
        rows, environment, interrupted = measure(plan, options.compile)
    ratios = against_peers(rows)
    content = {"schema": 1, "ratios": ratios, "rows": rows, "environment": environment}
    path = write_json(options.out / "cpu.json", content)
    print_table(rows)
    for batch, found in ratios.items():
        print(f"batch {batch}: {summary(found)}")
    return finish(path, interrupted)


def against_peers(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By batch, how many times our fastest variant's speed is that of each peer, for what was measured.

    Args:
        rows: of `compare`.
    """
    ratios: dict[str, dict[str, float]] = {}
    for batch in dict.fromkeys(row["batch"] for row in rows):
        times = {r["variant"]: r["ms_per_step"] for r in rows if r["batch"] == batch and r["ms_per_step"] is not None}
        ours = [ms for name, ms in times.items() if name.startswith("ours")]
        if ours:
            peers = {name: ms / min(ours) for name, ms in times.items() if not name.startswith("ours")}
            ratios[str(batch)] = peers
    return ratios


def summary(ratios: dict[str, float]) -> str:
    return ", ".join(f"{ratio:.2f} times {name}'s speed" for name, ratio in ratios.items()) or "no peer was measured"
