"""`python -m bench`: our sampler and what people use otherwise, side by side, against the limit of this machine.

The variants take turns; each runs in a process of its own, draws its images with the same noise, and has a speed only
if they are the plain float32 reference's. Rows are saved as they are finished.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.cli import OUT, Parser, add_source, check_options, open_source, parse_names, parse_numbers
from bench.environment import describe_environment
from bench.gpu_state import GpuState
from bench.limits import demand, measure_ceiling
from bench.measure import Comparison, Plan, expected_images
from bench.report import print_report, write_json, write_page_of
from bench.rows import VERSION, Row
from bench.setting import Setting, chain_timesteps
from bench.source import Source
from bench.variants import NAMES, variants
from ddpm.devices import DTYPES, resolve_device, resolve_dtype

# By device: batch sizes, precisions, steps of a timed chain, rounds. On two CPU cores all of it takes minutes.
DEFAULTS = {"cpu": ("1,4", "fp32", 20, 9), "cuda": ("1,16,256", "fp32,fp16", 100, 9)}


def make_parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    commands = "Other commands: python -m bench compare | profile | scale | roofline | gpu, each with --help."
    parser = Parser(prog="python -m bench", description=__doc__.splitlines()[0], epilog=commands)
    add_source(parser)
    add_measuring(parser)
    parser.add_argument("--variants", metavar="NAMES", help=f"only these of {', '.join(NAMES)}")
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds after which a variant that is not ready is left out (600)"
    )
    return parser


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is measured, and where the results go."""
    parser.add_argument("--batch", metavar="SIZES", help="batch sizes (1,4; on a GPU 1,16,256)")
    parser.add_argument("--dtype", metavar="NAMES", help=f"precisions, of {', '.join(DTYPES)} (fp32; GPU: fp32,fp16)")
    parser.add_argument("--steps", type=int, help="steps of a timed chain (20; on a GPU 100)")
    parser.add_argument("--rounds", type=int, help="timed chains of each variant (9)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    parser.add_argument("--threads", type=int, help="of torch and OpenVINO on the CPU (torch's own number)")
    parser.add_argument("--out", type=Path, default=OUT, help="directory of the results (bench/out)")


def main(argv: list[str]) -> int:
    """Exit code: 0; 130 after Ctrl-C.

    Raises:
        ValueError: a bad argument.
    """
    options = make_parser().parse_args(argv)
    check_options(options, "steps", "rounds", "threads", "limit")
    log, path = options.out / "bench.log", options.out / "bench.json"
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(options, open_source(options, Path(folder)))
        return compare_all(settings, Plan(log, options.limit), path, {"kind": "run"})


def make_settings(options: argparse.Namespace, source: Source) -> list[Setting]:
    """One for each precision and batch size.

    Raises:
        ValueError: a bad argument.
    """
    device = resolve_device(options.device)
    batch, dtype, steps, rounds = DEFAULTS[device.type]
    batches = parse_numbers("batch", options.batch or batch)
    dtypes = [resolve_dtype(name, device) for name in parse_names("dtype", options.dtype or dtype, tuple(DTYPES))]
    only = tuple(parse_names("variants", options.variants, NAMES)) if options.variants else ()
    steps, rounds = options.steps or steps, options.rounds or rounds
    checkpoint = source.load()
    total = checkpoint.schedule.num_train_timesteps
    if steps > total:
        raise ValueError(f"--steps {steps} is more than the {total} steps of {source.name}")
    chain = chain_timesteps(checkpoint, steps)
    settings = [
        Setting(source, device, name, n, chain, rounds, options.threads, only) for n in batches for name in dtypes
    ]
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
    rows: list[Row] = []
    ceilings: list[dict[str, Any]] = []
    content: dict[str, Any] = {"schema": VERSION, **more, "rows": rows, "ceilings": ceilings}
    interrupted = False
    with GpuState(device) as gpu:
        content["environment"] = describe_environment(device, gpu, threads)

        def save() -> None:
            content["not_measured"] = not_measured(device, gpu)
            try:
                write_json(path, content)
            except ValueError as error:  # a full disk, say: it is tried again, and the tables are printed before
                print(f"warning: {error}", file=sys.stderr)

        try:
            for dtype in dict.fromkeys(setting.dtype for setting in settings):
                ceilings.append(measure_ceiling(device, dtype, threads))
            save()
            judged, expected = None, None
            for setting in settings:
                key = (setting.source, setting.batch)
                if key != judged and not plan.deadline.passed:  # the last one only: it may be large
                    judged, expected = key, expected_images(setting, plan)
                needs = demand(setting.source.load(), setting.batch, setting.dtype)
                Comparison(setting, plan, gpu, needs, ceilings).run(expected, rows.append)
                save()
        except KeyboardInterrupt:
            interrupted = True
            save()
    print_report(content)
    write_json(path, content)
    pages = write_page_of(path, "bench.run_page", content)
    print(f"{'interrupted; the finished rows are in ' if interrupted else ''}{', '.join(map(str, (path, *pages)))}")
    return 130 if interrupted else 0


def not_measured(device: torch.device, gpu: GpuState) -> list[str]:
    """What is not measurable here, a sentence each."""
    if device.type == "cuda":
        return [f"Not read from the GPU: {reason}." for reason in gpu.reasons]
    return [
        "Launches per step, CUDA graphs and their capture: there is no GPU in use.",
        "Energy, clocks, power limit, temperature, throttling: NVML reads them from an NVIDIA GPU.",
    ]
