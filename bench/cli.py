"""The command line. argparse and nothing else: the benchmark must start where the product's click is not installed."""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from bench.architectures import ARCHITECTURES, DEMO
from bench.source import Source, checkpoint_source, random_source
from ddpm.checkpoints import Checkpoint
from ddpm.checkpoints.options import parse_options
from ddpm.devices import DTYPES, resolve_device
from ddpm.kernels import backend

OUT = Path(__file__).parent / "out"

# Each is a module of this name with main(arguments) -> exit code.
COMMANDS = {
    "profile": "where a step's time goes, by layer and by kernel",
    "scale": "cost against batch, resolution and steps",
    "compare": "what changed between two JSON files",
    "roofline": "a step's launches, products and bytes, counted without a GPU",
    "gpu": "the GPU tests, then a fixed set of comparisons",
    "readme": "the README's numbers from the committed results",
}


class Parser(argparse.ArgumentParser):
    """Argparse's, with errors of one sentence."""

    def error(self, message: str) -> NoReturn:
        """One sentence instead of the usage text; `main` prints it."""
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a bad argument, 130 after Ctrl-C; some commands have others of their own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
    try:
        return importlib.import_module(f"bench.{name}").main(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a network."""
    parser.add_argument("checkpoint", nargs="?", help="what `ddpm.load` takes; the demo by default")
    parser.add_argument(
        "--arch", metavar="NAME", help=f"instead, random weights of: {', '.join(ARCHITECTURES)}; nothing is downloaded"
    )
    parser.add_argument(
        "-o",
        "--option",
        dest="options",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="what the checkpoint's file does not say, such as image_size=64; repeatable",
    )


def open_source(options: argparse.Namespace, folder: Path, *, rivals: bool = True) -> Source:
    """The network that the arguments name; what has to be written for it, and for the rivals, goes to `folder`.

    Raises:
        ValueError: two, or none of this name.
    """
    if options.arch is None:
        given = parse_options(options.options)
        return checkpoint_source(options.checkpoint or str(DEMO), given, folder if rivals else None)
    if options.checkpoint is not None or options.options:
        raise ValueError(
            f"--arch {options.arch} takes the place of a checkpoint and its options; give one or the other"
        )
    return random_source(options.arch, folder, rivals=rivals)


def listed(title: str, entries: Mapping[str, str]) -> str:
    """Names and what they mean, for the end of a help text."""
    width = max(map(len, entries)) + 2
    lines = [
        textwrap.fill(meaning, 100, initial_indent=f"  {name:{width}}", subsequent_indent=" " * (width + 2))
        for name, meaning in entries.items()
    ]
    return "\n".join([f"{title}:", *lines])


def parse_numbers(name: str, text: str) -> list[int]:
    """ "1,16" -> [1, 16].

    Raises:
        ValueError: anything but positive integers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--{name} {text!r}: expected positive integers, such as 1,16")
    return list(dict.fromkeys(int(part) for part in parts))


def parse_names(name: str, text: str, known: Sequence[str]) -> list[str]:
    """ "a,b" -> ["a", "b"].

    Raises:
        ValueError: one that is not known.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in known:
            raise ValueError(f"--{name} {part!r} is not one of {', '.join(known)}")
    return list(dict.fromkeys(parts))


def add_device(parser: argparse.ArgumentParser, *, dtype: bool = False) -> None:
    """Where it runs; and, if asked for, the one precision that it runs in."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    if dtype:
        parser.add_argument("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)} (auto: fp32)")


def add_out(parser: argparse.ArgumentParser, files: str) -> None:
    """The directory of these files, made when the arguments are read."""
    parser.add_argument("--out", type=directory, default=str(OUT), help=f"directory of {files} (bench/out)")


def directory(text: str) -> Path:
    """There from now on.

    Raises:
        argparse.ArgumentTypeError: there can be no such directory.
    """
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise argparse.ArgumentTypeError(f"{path} is a file; expected a directory") from error
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be made ({error.strerror}); name another directory") from error
    return path


def timed_device(name: str) -> torch.device:
    """The device that is measured.

    Raises:
        ValueError: it is not there, or Triton's interpreter would be timed.
    """
    if backend.INTERPRET:
        raise ValueError("TRITON_INTERPRET is set, and the interpreter is never timed; unset it")
    return resolve_device(name)


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """
    Raises:
        ValueError: one of these numbers, if given, is not positive.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:  # nor NaN
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a positive number")


def check_steps(steps: int, checkpoint: Checkpoint) -> None:
    """
    Raises:
        ValueError: a chain cannot have so many.
    """
    total = checkpoint.schedule.num_train_timesteps
    if steps > total:
        raise ValueError(f"--steps {steps} is more than the {total} steps of {checkpoint.source}")
