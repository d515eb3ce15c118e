"""Reading weight and configuration files, with one-sentence errors. No file is executed: pickles load weights only."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} could not be read as JSON ({error}); expected a configuration of diffusers"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected an object of settings")
    return value


def read_checkpoint(path: Path) -> Any:
    """What a .safetensors file or a pickle holds, on the CPU: a state dict, or what a training script put around it.

    Raises:
        ValueError: truncated, not such a file, a pickle that carries code, or an optimizer's state.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(content, dict) and {"state", "param_groups"} <= content.keys():
        raise ValueError(
            f"{path} holds an optimizer's state, not weights; pass the model's file from the same directory"
        )
    return content


def is_state_dict(content: Any) -> bool:
    """Whether it maps names to tensors, and nothing else."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or a pickle, on the CPU.

    Raises:
        ValueError: as `read_checkpoint`, or it holds something else than a state dict.
    """
    content = read_checkpoint(path)
    if not is_state_dict(content):
        raise ValueError(f"{path} holds {describe(content)}; expected a state dict that maps names to tensors")
    return content


def describe(content: Any) -> str:
    """What was found instead of a state dict, in a few words."""
    if isinstance(content, dict) and content:
        return f"{type(content).__name__} with keys {', '.join(map(str, list(content)[:5]))}"
    return (
        f"{type(content).__name__} of {len(content)}" if isinstance(content, (list, tuple)) and content else "nothing"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise ValueError(
            f"{path} ({size:,} bytes) is not a complete safetensors file ({error}); download or copy it again"
        ) from error


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(64)
    if not start.startswith((b"PK", b"\x80")):  # zip, or a pickle of protocol 2 and later
        text = start.decode("ascii", errors="replace").split("\n")[0]
        raise ValueError(
            f"{path} is not a complete file of torch.save (it begins with {text!r}); copy or download it again"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise ValueError(
                f"{path} is a pickle that holds more than tensors, and running its code would not be safe; "
                "save the bare state dict, best as .safetensors"
            ) from error
        raise ValueError(
            f"{path} is not a complete file of torch.save ({_first_line(error)}); copy it again"
        ) from error
    # what is left are bytes that are no such file at all: torch's unpickler stumbles over them in many ways
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(
            f"{path} is not a complete file of torch.save ({_first_line(error)}); copy it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def empty_network(kind: Callable[[Any], N], config: Any, complaint: str) -> N:
    """kind(config) on the meta device, to be filled by `load_weights`.

    Raises:
        ValueError: the configuration describes no network: the complaint, and why.
    """
    try:
        with torch.device("meta"):
            return kind(config)
    except ValueError as error:
        raise ValueError(f"{complaint}: {error}") from error


def check_resolution(image_size: int, divisor: int, path: Path) -> None:
    """Raise ValueError where a network whose levels need multiples of `divisor` cannot have such images."""
    if image_size % divisor:
        raise ValueError(f"image_size={image_size} must be a multiple of {divisor} for {path}")


def load_weights(
    network: nn.Module,
    state: dict[str, Tensor],
    source: Path | str,
    advice: str = "the configuration beside it describes another network",
) -> None:
    """Put a state dict into a network built on the meta device, as float32, with nothing missing and nothing left over.

    Args:
        advice: what a user may conclude when it does not fit.

    Raises:
        ValueError: a key is missing or unknown, or a shape differs; names the first few.
    """
    expected = network.state_dict()
    missing = [k for k in expected if k not in state]
    unknown = [k for k in state if k not in expected]
    wrong = [
        f"{k} is {list(state[k].shape)}, expected {list(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    for what, keys in (("lacks", missing), ("has unknown", unknown)):
        if keys:
            raise ValueError(
                f"{source} {what} {len(keys)} of {len(expected)} keys, first {', '.join(keys[:3])}; {advice}"
            )
    if wrong:
        raise ValueError(f"{source} has {len(wrong)} tensors of another shape, first {wrong[0]}; {advice}")
    bad = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise ValueError(f"{source} holds NaN or infinity in {len(bad)} tensors, first {bad[0]}; it is damaged")
    network.load_state_dict({k: v.float().contiguous() for k, v in state.items()}, strict=True, assign=True)
    network.requires_grad_(False).eval()
