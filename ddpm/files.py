"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write to a temporary file beside `path` and rename it.

    Raises:
        ValueError: the disk is full or the directory is not writable; what was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror or error}); finished files are kept") from error
    finally:
        temporary.unlink(missing_ok=True)
