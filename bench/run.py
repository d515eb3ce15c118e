"""`python -m bench`: our sampler and what people use otherwise, side by side, against the limit of this machine.

The variants take turns; each runs in a process of its own, draws its images with the same noise, and has a speed only
if they are the plain float32 reference's. Rows are saved as they are finished.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
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
from bench.setting import Setting
from bench.source import Source
from bench.variants import NAMES
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
    only = tuple(parse_names("variants", options.variants, NAMES)) if options.variants else ()
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(options, open_source(options, Path(folder)))
        options.out.mkdir(parents=True, exist_ok=True)
        log = options.out / "bench.log"
        log.unlink(missing_ok=True)
        path = options.out / "bench.json"
        content, interrupted = compare_all(
            settings, Plan(log, options.limit, only=only), lambda content: write_json(path, content)
        )
    print_report(content)
    pages = write_page_of(path, "bench.run_page", content)
    print(f"{'interrupted; the finished rows are in ' if interrupted else ''}{', '.join(map(str, (path, *pages)))}")
    return 130 if interrupted else 0


def make_settings(options: argparse.Namespace, source: Source) -> list[Setting]:
    """One for each precision and batch size.

    Raises:
        ValueError: a bad argument.
    """
    device = resolve_device(options.device)
    batch, dtype, steps, rounds = DEFAULTS[device.type]
    batches = parse_numbers("batch", options.batch or batch)
    dtypes = [resolve_dtype(name, device) for name in parse_names("dtype", options.dtype or dtype, tuple(DTYPES))]
    steps, rounds = options.steps or steps, options.rounds or rounds
    total = source.load().schedule.num_train_timesteps
    if steps > total:
        raise ValueError(f"--steps {steps} is more than the {total} steps of {source.name}")
    return [Setting(source, device, name, n, steps, rounds, options.threads) for n in batches for name in dtypes]


def compare_all(
    settings: list[Setting], plan: Plan, save: Callable[[dict[str, Any]], Any]
) -> tuple[dict[str, Any], bool]:
    """The content of the JSON file, and whether Ctrl-C ended it.

    Args:
        save: called with the content so far, at first and after each setting, so that a run cut short leaves those.
    """
    device, threads = settings[0].device, settings[0].threads
    content: dict[str, Any] = {"schema": VERSION, "kind": "run", "rows": [], "ceilings": [], "not_measured": []}
    rows: list[Row] = content["rows"]
    with GpuState(device) as gpu:
        content["not_measured"] = not_measured(device, gpu)
        content["environment"] = describe_environment(device, gpu, threads)
        try:
            for dtype in dict.fromkeys(setting.dtype for setting in settings):
                content["ceilings"].append(measure_ceiling(device, dtype, threads))
            save(content)
            expected: dict[Any, Any] = {}
            for setting in settings:
                key = (setting.source.name, setting.batch)
                if key not in expected and not plan.deadline.passed:
                    expected = {key: expected_images(setting, plan)}  # of the last batch only: it may be large
                checkpoint = setting.source.load()
                needs = demand(checkpoint, setting.batch, setting.dtype)
                comparison = Comparison(setting, plan, gpu, needs, content["ceilings"])
                comparison.run(expected.get(key), rows.append)
                save(content)
        except KeyboardInterrupt:
            save(content)
            return content, True
    return content, False


def not_measured(device: torch.device, gpu: GpuState) -> list[str]:
    """What is not measurable here, a sentence each."""
    if device.type == "cuda":
        return [f"Not read from the GPU: {reason}." for reason in gpu.reasons]
    return [
        "Launches per step, CUDA graphs and their capture: there is no GPU in use.",
        "Energy, clocks, power limit, temperature, throttling: NVML reads them from an NVIDIA GPU.",
        "fp16 and tf32 speeds: they are a GPU's.",
    ]
