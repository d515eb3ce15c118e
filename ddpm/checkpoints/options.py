"""What the caller adds to a checkpoint file, as a command line takes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """("image_size=64", "learn_sigma=true") -> {"image_size": 64, "learn_sigma": True}; other values are text.

    Raises:
        ValueError: no "=", a name given twice, or one that is of the sampler.
    """
    result: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"option {text!r} is not of the form NAME=VALUE, such as image_size=64")
        if name in result:
            raise ValueError(f"option {name} is given twice")
        if name in ("device", "dtype", "compile", "source"):
            raise ValueError(f"{name} is not an option of a checkpoint; see --help for its own place")
        try:
            result[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            result[name] = value
    return result
