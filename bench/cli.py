"""The command line. argparse and nothing else: the benchmark must start where the product's click is not installed."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bench.architectures import ARCHITECTURES, DEMO
from bench.source import Source, checkpoint_source, random_source
from ddpm.checkpoints.options import parse_options

OUT = Path(__file__).parent / "out"

# Each is a module of this name with main(arguments) -> exit code; its docstring's first line says what it does.
COMMANDS = {
    "compare": "compare two JSON files",
    "profile": "where a step's time goes",
    "scale": "cost against batch, resolution and steps",
    "roofline": "a step's launches, products and bytes, counted without a GPU",
    "gpu": "the GPU tests, then a fixed set of comparisons",
    "readme": "the README's numbers from the committed results",
}


class Parser(argparse.ArgumentParser):
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


def check_options(options: argparse.Namespace, *numbers: str) -> None:
    """Make the directory --out.

    Raises:
        ValueError: one of these numbers, if given, is not positive; or there can be no such directory.
    """
    for name in numbers:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a positive number")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"--out {options.out} is a file; expected a directory") from error
    except OSError as error:
        raise ValueError(f"--out {options.out} cannot be made ({error.strerror}); name another directory") from error
