"""Published versions of denoising-diffusion-pytorch, imported side by side as `make originals` installs them.

Each lies in a directory of its own without its dependencies. What only its trainer needs (torchvision, accelerate,
pytorch_fid, scipy) is replaced by empty stand-ins while it is imported: the real ones would bring another torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

PACKAGE = "denoising_diffusion_pytorch"
DIRECTORY = Path(os.environ.get("LUCIDRAINS") or Path(__file__).resolve().parents[2] / ".venv" / "lucidrains")
REQUIRED = os.environ.get("REQUIRE_ORIGINALS") == "1"
TRAINERS_ONLY = {
    "torchvision": ("torchvision",),
    "accelerate": ("accelerate",),
    "pytorch_fid": ("pytorch_fid", "pytorch_fid.inception", "pytorch_fid.fid_score"),
    "scipy": ("scipy", "scipy.optimize"),
}
_loaded: dict[str, dict[str, ModuleType]] = {}  # version -> its modules


def original(version: str, module: str = "") -> Any:
    """The package as that version published it, or one of its modules, such as "classifier_free_guidance".

    Skips the test if `make originals` did not install it; fails if the environment variable REQUIRE_ORIGINALS is 1.
    """
    if not (DIRECTORY / version / PACKAGE).is_dir():
        _absent(f"{DIRECTORY / version} does not hold {PACKAGE}; run `make originals`")
    with _only(version), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spellings of torch that have gone out of use
        try:
            return importlib.import_module(f"{PACKAGE}.{module}" if module else PACKAGE)
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith(PACKAGE):
                raise
            _absent(f"{PACKAGE} {version} needs {error.name}; run `make originals`")


def _absent(reason: str) -> NoReturn:
    if REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def _only(version: str) -> Iterator[None]:
    """sys.path and sys.modules as that version needs them, and as they were afterwards."""
    path, others = list(sys.path), _take_out(PACKAGE)
    sys.modules.update(_loaded.get(version, {}))
    sys.path[:0] = [str(DIRECTORY / version), str(DIRECTORY / "dependencies")]
    importlib.invalidate_caches()
    stand_ins = [
        name
        for package, names in TRAINERS_ONLY.items()
        if package not in sys.modules and importlib.util.find_spec(package) is None
        for name in names
    ]
    sys.modules.update({name: _StandIn(name) for name in stand_ins})
    try:
        yield
    finally:
        for name in stand_ins:  # libraries look for these packages to see what they may use
            del sys.modules[name]
        _loaded[version] = _take_out(PACKAGE)
        sys.modules.update(others)
        sys.path[:] = path


def _take_out(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}


class _StandIn(ModuleType):
    """A module from which anything can be imported, and nothing used."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
