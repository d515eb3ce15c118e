"""`python -m bench`: our sampler and what people use otherwise, side by side, against the limit of this machine.

The variants take turns; each runs in a process of its own, draws its images with the same noise, and has a speed only
if they are the plain float32 reference's. Rows are saved as they are finished.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.cli import (
    COMMANDS,
    Parser,
    add_device,
    add_out,
    add_source,
    check_positive,
    check_steps,
    listed,
    open_source,
    parse_names,
    parse_numbers,
    timed_device,
)
from bench.contestant import Failed
from bench.environment import describe_environment
from bench.gpu_state import GpuState
from bench.limits import demand
from bench.measure import Comparison, Plan, expected_images, measured_ceiling
from bench.report import finish, print_report, write_json
from bench.rows import VERSION
from bench.setting import Setting, chain_timesteps
from bench.variants import MEANINGS, NAMES, variants
from bench.walk import meta_network
from ddpm.checkpoints import Checkpoint
from ddpm.devices import DTYPES, resolve_dtype

# By device: batch sizes, precisions, steps of a timed chain. On two CPU cores all of it takes minutes.
DEFAULTS = {"cpu": ("1,4", "fp32", 20), "cuda": ("1,16,256", "fp32,tf32,fp16", 100)}


def make_parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    cpu, cuda = (dict(zip(("batch", "dtype", "steps"), values, strict=True)) for values in DEFAULTS.values())
    parser = Parser(
        prog="python -m bench",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{listed('variants', MEANINGS)}\n\n{listed('other commands, each with --help', COMMANDS)}",
    )
    add_source(parser)

    def default(name: str) -> str:
        return f"{cpu[name]}" if cpu[name] == cuda[name] else f"{cpu[name]}; on a GPU {cuda[name]}"

    parser.add_argument("--batch", metavar="SIZES", help=f"batch sizes ({default('batch')})")
    parser.add_argument("--dtype", metavar="NAMES", help=f"precisions, of {', '.join(DTYPES)} ({default('dtype')})")
    parser.add_argument("--steps", type=int, help=f"steps of a timed chain ({default('steps')})")
    parser.add_argument("--rounds", type=int, default=9, help="timed chains of each variant, at least (9)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="timing of each batch size and precision, at least: a machine's speed drifts, and the spread should "
        "hold that (20)",
    )
    add_device(parser)
    parser.add_argument("--threads", type=int, help="of torch and OpenVINO on the CPU (torch's own number)")
    parser.add_argument("--variants", metavar="NAMES", help="only these, of those below")
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds after which a variant that is not ready is left out (600)"
    )
    add_out(parser, "bench.json, bench.html and bench.log")
    return parser


def main(argv: list[str]) -> int:
    """Exit code: 0; 130 after Ctrl-C.

    Raises:
        ValueError: a bad argument.
    """
    options = make_parser().parse_args(argv)
    check_positive(options, "steps", "rounds", "seconds", "threads", "limit")
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(options, Path(folder))
        plan = Plan(options.out / "bench.log", options.limit)
        return compare_all(settings, plan, options.out / "bench.json", {"kind": "run"})


def make_settings(options: argparse.Namespace, folder: Path) -> list[Setting]:
    """One for each precision and batch size; what has to be written for them goes to `folder`.

    Raises:
        ValueError: a bad argument.
    """
    device = timed_device(options.device)
    batch, dtype, steps = DEFAULTS[device.type]
    batches = parse_numbers("batch", options.batch or batch)
    dtypes = [resolve_dtype(name, device) for name in parse_names("dtype", options.dtype or dtype, tuple(DTYPES))]
    only = tuple(parse_names("variants", options.variants, NAMES)) if options.variants else ()
    steps = options.steps or steps
    source = open_source(options, folder)
    checkpoint = source.load()
    check_steps(steps, checkpoint)
    chain = chain_timesteps(checkpoint, steps)
    more = (options.rounds, options.seconds, options.threads, only)
    settings = [Setting(source, device, name, n, chain, *more) for n in batches for name in dtypes]
    if not any(map(variants, settings)):
        raise ValueError(f"--variants {options.variants}: none of them belongs to {device} and {source.name}")
    return settings


def compare_all(settings: list[Setting], plan: Plan, path: Path, more: dict[str, Any]) -> int:
    """Measure, print, and write to `path` after each setting, so that a run cut short leaves what it finished.

    Args:
        more: fields of the file beside the measured ones.

    Returns:
        The exit code: 0; 130 after Ctrl-C.
    """
    device, threads = settings[0].device, settings[0].threads
    plan.log.unlink(missing_ok=True)
    content: dict[str, Any] = {"schema": VERSION, **more, "rows": [], "ceilings": [], "not_measured": []}
    interrupted = False
    with GpuState(device) as gpu:
        content["environment"] = describe_environment(device, gpu, threads)
        try:
            measure(settings, plan, gpu, content, path)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            content["not_measured"] += not_measured(device, gpu)
            save(path, content)
    print_report(content)
    return finish(path, content, "bench.run_page", interrupted=interrupted)


def measure(settings: list[Setting], plan: Plan, gpu: GpuState, content: dict[str, Any], path: Path) -> None:
    """Into `content`, which is saved after each setting."""
    for dtype, setting in {setting.dtype: setting for setting in settings}.items():
        try:
            content["ceilings"].append(measured_ceiling(setting, plan))
        except Failed as error:
            content["not_measured"].append(f"The limit of this machine in {dtype}: {error}.")
    save(path, content)
    checkpoints: dict[str, Checkpoint] = {}  # without their weights
    judged, expected = None, None
    for setting in settings:
        location = setting.source.location
        if location not in checkpoints:
            checkpoint = setting.source.load()
            checkpoints[location] = replace(checkpoint, network=meta_network(checkpoint.network))
        if (location, setting.batch) != judged and not plan.deadline.passed:  # the last one only: it may be large
            judged, expected = (location, setting.batch), expected_images(setting, plan)
        needs = demand(checkpoints[location], setting.batch, setting.dtype)
        Comparison(setting, plan, gpu, needs, content["ceilings"]).run(expected, content["rows"].append)
        save(path, content)


def save(path: Path, content: dict[str, Any]) -> None:
    try:
        write_json(path, content)
    except ValueError as error:  # a full disk, say: it is tried again, and the tables are printed before
        print(f"warning: {error}", file=sys.stderr)


def not_measured(device: torch.device, gpu: GpuState) -> list[str]:
    """What is not measurable here, a sentence each."""
    if device.type == "cuda":
        return [f"Not read from the GPU: {reason}." for reason in gpu.reasons]
    return [
        "Launches per step, CUDA graphs and their capture: there is no GPU in use.",
        "Energy, clocks, power limit, temperature, throttling: NVML reads them from an NVIDIA GPU.",
    ]
