"""Checks of what a caller gives; each error names the argument."""

from __future__ import annotations

from typing import Any

import numpy as np


def is_integer(value: object) -> bool:
    """Whether a count may be this: Python's and NumPy's integers, but no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a scale may be this: Python's and NumPy's integers and floats, but no bool."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def positive_integer(name: str, value: Any) -> int:
    """The value as int.

    Raises:
        ValueError: no positive integer.
    """
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """The value, which must be True or False: any text would count as true.

    Raises:
        ValueError: neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")
    return value


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """The value, one of `allowed`.

    Raises:
        ValueError: another.
    """
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    return value
