"""How a convolution is cut into programs: a rule, and files of measurements that override it.

The rule takes, of all cuts that fit, the one that a small model of a GPU finds fastest. The model counts clocks of one
multiprocessor: what its tensor cores, its share of the second-level cache and, where the norm rides along, its
arithmetic need for a step of K, or the latency of that step where nothing else hides it; then the sum of the parts of
K, and a normalising pass where there is one. Its constants are read from binaries and from published rates of an H100;
none was fitted to a measurement, and files of measurements, which `ddpm tune` writes, come first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from . import backend
from .channel_statistics import MAX_SLOTS

COUNTERS = 1024  # tiles that a convolution which splits K may have
SCHEMA = 2  # of files of plans
FORMS = ("fused", "apply", "library")

_SPLITS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 28, 32)  # their sum is the work of one program
_KIB = 1024

# Clocks, and units a clock, of one multiprocessor.
_HALF_MACS, _TF32_MACS, _SCALAR_MACS = 2048, 1024, 128
_CACHE_BYTES = 48  # a clock, from the second-level cache, all multiprocessors reading
_OWN_CACHE_BYTES = 64  # one reading
_STEP = 300  # of K, when waiting for nothing but its own instructions
_NORM_ELEMENT = 0.17  # norm, SiLU and rounding: 22 instructions for 32 elements, 4 schedulers
_NORM_ROWS = 1000  # statistics to rows, all loads and sums in a chain
_START = 1500  # to the first product
_JOIN = 2500  # of the parts of K: store, count, load
_PASS = 1800 + _NORM_ROWS + 2000  # one launch more, that normalises: rows, load, store
_CLEARLY = 1.1  # how much faster the pass must look: launches cost the host too
_MEMORY_BYTES = 1700  # a clock, of the whole GPU


def is_tf32(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are TF32, by torch's own setting."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def is_scalar(dtype: torch.dtype) -> bool:
    """Whether products are made without tensor cores."""
    return dtype == torch.float32 and not is_tf32(dtype)


@dataclass(frozen=True)
class ConvShape:
    """What a plan depends on.

    Attributes:
        n, height, width: of the result.
        c_in, c_out: channels; c_in of all parts.
        kernel: its height, and width.
        shortcut: channels of the 1x1 convolution in the same sum, or 0.
        norm: whether the input is normalised first.
        dtype: of the weights.
        upsample, stride: as `conv` takes them.
    """

    n: int
    height: int
    width: int
    c_in: int
    c_out: int
    kernel: int
    shortcut: int
    norm: bool
    dtype: torch.dtype
    upsample: bool = False
    stride: int = 1

    @property
    def key(self) -> str:
        """Its name in files, such as "1x32x32 128->128 3x3 float16 norm"."""
        size = f"{self.n}x{self.height}x{self.width}"
        dtype = "tf32" if is_tf32(self.dtype) else str(self.dtype).removeprefix("torch.")
        words = [size, f"{self.c_in}->{self.c_out}", f"{self.kernel}x{self.kernel}", dtype]
        words += [f"stride {self.stride}"] if self.stride > 1 else []
        words += [f"shortcut {self.shortcut}"] if self.shortcut else []
        words += ["upsample"] if self.upsample else []
        words += ["norm"] if self.norm else []
        return " ".join(words)

    @property
    def macs(self) -> int:
        k = self.kernel * self.kernel * self.c_in + self.shortcut
        return self.n * self.height * self.width * self.c_out * k


@dataclass(frozen=True)
class ConvPlan:
    """How a convolution is run.

    Attributes:
        form: "fused": norm and convolution in one launch (or there is no norm); "apply": a normalising pass, then the
            convolution without norm, cut like this; "library": that pass, then the library's convolution.
        block_m, block_n, block_k: pixels and channels of a program's tile, channels of a step.
        splits: parts of K.
        num_warps, num_stages: of the launch.
        source: "rule", or the file.
    """

    form: str
    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int
    source: str = "rule"


def tiles(shape: ConvShape, block_m: int, block_n: int) -> tuple[int, int, int]:
    """(images of a tile, tiles of an image, tiles of the result): of the first two, one is 1.

    With a norm a tile lies in one image, whose statistics it reads.
    """
    pixels = shape.height * shape.width
    images = 1 if shape.norm else max(1, block_m // backend.next_power_of_2(pixels))
    slots = -(-pixels // block_m)
    return images, slots, -(-shape.n // images) * slots * -(-shape.c_out // block_n)


def steps(shape: ConvShape, block_k: int) -> int:
    """Blocks of K; one more than that where a part's channels end within a block."""
    return -(-shape.c_in // block_k) * shape.kernel**2 + -(-shape.shortcut // block_k)


def shared_memory(plan: ConvPlan, dtype: torch.dtype) -> int:
    """Bytes that a program needs, and some more: operands of all stages, or its result on the way to memory."""
    operands = plan.num_stages * (plan.block_m + plan.block_n) * plan.block_k * dtype.itemsize
    return max(operands, plan.block_m * plan.block_n * 4) + 4 * _KIB


def candidates(shape: ConvShape, target: backend.Target, most: int = 12) -> list[ConvPlan]:
    """Plans worth measuring: the library's convolution and, of each form, the best by the model.

    Args:
        most: of each form; as many blocks, each with the splits of K that suit it best.
    """
    found = [replace(plan(shape, target, form="fused"), form="library", splits=1, source="rule")]
    for form in FORMS[: 2 if shape.norm else 1]:
        best: dict[tuple[int, int, int], ConvPlan] = {}
        for p in sorted(_plans(shape, target, True, form), key=lambda p: estimate(shape, p, target)):
            best.setdefault((p.block_m, p.block_n, p.block_k), p)
        found += list(best.values())[:most]
    return found


def _plans(shape: ConvShape, target: backend.Target, splittable: bool, form: str) -> Iterator[ConvPlan]:
    """All plans of a form that fit."""
    cuts = _cuts(shape if form == "fused" else replace(shape, norm=False), target, splittable)
    return (replace(p, form=form) for p in cuts)


def _cuts(shape: ConvShape, target: backend.Target, splittable: bool) -> Iterator[ConvPlan]:
    """Plans of one launch."""
    pixels = shape.n * shape.height * shape.width
    largest_m = min(128, max(16, backend.next_power_of_2(shape.height * shape.width if shape.norm else pixels)))
    scalar = is_scalar(shape.dtype)
    least_n = 4 if scalar else 16
    largest_n = min(128, max(least_n, backend.next_power_of_2(shape.c_out)))
    # Without tensor cores a thread holds its rows and columns of a whole step in registers.
    longest = 64 if shape.dtype.itemsize == 2 else 16 if scalar else 32
    largest_tile = 128 * 128 if not scalar else 64 * 64 if shape.norm else 128 * 64
    widest_k = min(longest, max(16, backend.next_power_of_2(shape.c_in)))
    narrow = widest_k > 16 and shape.c_in % widest_k != 0  # may waste less
    for block_m in (m for m in (16, 32, 64, 128) if m <= largest_m):
        if block_m < largest_m and tiles(shape, block_m, 16)[1] > MAX_SLOTS:
            continue  # statistics would have to be merged, which larger tiles may save
        for block_n in (n for n in (4, 8, 16, 32, 64, 128) if least_n <= n <= largest_n):
            for block_k in (widest_k, widest_k // 2) if narrow else (widest_k,):
                if block_m * block_n > largest_tile:
                    continue
                whole = ConvPlan("fused", block_m, block_n, block_k, 1, _warps(block_m, block_n, shape.norm, scalar), 3)
                if shared_memory(whole, shape.dtype) > target.shared_memory:
                    whole = replace(whole, num_stages=2)
                if shared_memory(whole, shape.dtype) > target.shared_memory:
                    continue
                yield whole
                count = tiles(shape, block_m, block_n)[2]
                if splittable and count <= COUNTERS:
                    most = min(steps(shape, block_k), 4 * target.sms // max(count, 1))
                    yield from (replace(whole, splits=splits) for splits in _SPLITS if splits <= most)


def _warps(block_m: int, block_n: int, norm: bool, scalar: bool) -> int:
    tile = block_m * block_n
    if tile >= 128 * 128 or (norm and block_m >= 64) or (scalar and tile >= 64 * 64):
        return 8
    return 4 if tile >= 16 * 64 or norm else 2  # statistics of many channels do not fit in the registers of two


def _macs(dtype: torch.dtype, plan: ConvPlan) -> float:
    """Products a clock."""
    if is_scalar(dtype):
        # A thread holds side x side sums, and takes 2 side numbers from shared memory, at 32 a clock, to add to each.
        side = math.sqrt(plan.block_m * plan.block_n / (32 * plan.num_warps))
        return 1 / (1 / _SCALAR_MACS + 2 / side / 32)
    # Below 64 rows the tensor cores are driven by the older instructions, at half the rate.
    return (_HALF_MACS if dtype.itemsize == 2 else _TF32_MACS) / (2 if plan.block_m < 64 else 1)


def estimate(shape: ConvShape, plan: ConvPlan, target: backend.Target) -> float:
    """Clocks by the model."""
    if plan.form != "fused":
        pixels = shape.n * shape.height * shape.width * shape.stride**2 / (4 if shape.upsample else 1)
        own = _PASS + 2 * pixels * shape.c_in * shape.dtype.itemsize / _MEMORY_BYTES
        return own + estimate(replace(shape, norm=False), replace(plan, form="fused"), target)
    block_m, block_n, block_k = plan.block_m, plan.block_n, plan.block_k
    programs = tiles(shape, block_m, block_n)[2] * plan.splits
    own_steps = -(-steps(shape, block_k) // plan.splits)

    norm = block_m * block_k * _NORM_ELEMENT if shape.norm else 0.0
    busy = max(
        block_m * block_n * block_k / _macs(shape.dtype, plan),
        (block_m + block_n) * block_k * shape.dtype.itemsize / _CACHE_BYTES,
        norm,
    )
    held = min(target.shared_memory // shared_memory(plan, shape.dtype), (8 if shape.norm else 16) // plan.num_warps)
    held = max(1, min(held, -(-programs // target.sms)))  # programs of a multiprocessor at the same time
    turns = -(-programs // (target.sms * held))
    clocks = turns * own_steps * max(_STEP + norm, held * busy)

    clocks += _START + turns * held * block_m * block_n * 4 / _CACHE_BYTES
    if shape.norm:
        clocks += turns * _NORM_ROWS * (1 + own_steps // shape.kernel**2)
    if plan.splits > 1:
        clocks += _JOIN + plan.splits * block_m * block_n * 4 / _OWN_CACHE_BYTES
    return clocks


def plan(shape: ConvShape, target: backend.Target, splittable: bool = True, form: str | None = None) -> ConvPlan:
    """The plan of a convolution: from a file of measurements of this very GPU, else by the rule.

    Where K may be split, programs are at least min(100, multiprocessors, macs / 64^3), if any cut has as many.

    Args:
        splittable: whether K may be split (there are counters).
        form: the form that it must have; None chooses.

    Raises:
        ValueError: there is a file of plans that cannot be used.
    """
    found = _find(_overrides, shape, form) if _overrides else None
    if found is None:
        return _plan(shape, target, splittable, form, is_tf32(shape.dtype), _reads_files)
    return found if splittable else replace(found, splits=1)


_overrides: dict[ConvShape, ConvPlan] = {}
_reads_files = True


@contextlib.contextmanager
def override(plans: dict[ConvShape, ConvPlan]) -> Iterator[None]:
    """These plans, whatever files and the rule say."""
    before = dict(_overrides)
    _overrides.update(plans)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@contextlib.contextmanager
def without_files() -> Iterator[None]:
    """No file of plans is read: measurements replace it, whatever it is."""
    global _reads_files
    before, _reads_files = _reads_files, False
    try:
        yield
    finally:
        _reads_files = before


def _find(plans: dict[ConvShape, ConvPlan] | _Measured, shape: ConvShape, form: str | None) -> ConvPlan | None:
    """What is known of a shape, and of this form; without a norm it may be the second half of one that has a norm."""
    found = plans.get(shape)
    if found is not None and form in (None, found.form):
        return found
    whole = None if shape.norm else plans.get(replace(shape, norm=True))
    if whole is not None and whole.form == "apply" and form in (None, "fused"):
        return replace(whole, form="fused")
    return None


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: ConvShape, target: backend.Target, splittable: bool, form: str | None, tf32: bool, reads_files: bool
) -> ConvPlan:
    """`plan` without overrides; tf32 is torch's setting, which the shape's key and estimate ask for themselves."""
    found = _find(_Measured(target), shape, form) if reads_files else None
    if found is not None:
        return found if splittable else replace(found, splits=1)
    least = min(100, target.sms, shape.macs // 64**3) if splittable else 0

    def cost(p: ConvPlan) -> tuple[int, float]:
        cut = replace(shape, norm=False) if p.form == "apply" else shape
        programs = tiles(cut, p.block_m, p.block_n)[2] * p.splits
        return max(0, least - programs), estimate(shape, p, target) * (_CLEARLY if p.form == "apply" else 1.0)

    forms = [f for f in FORMS[: 2 if shape.norm else 1] if form in (None, f)]
    return min((p for f in forms for p in _plans(shape, target, splittable, f)), key=cost)


def plans_path(gpu: str) -> Path | None:
    """The file of plans for a GPU of this name: what $DDPM_PLANS names (nothing, if it is empty), else the default.

    The default only where it is there.
    """
    given = os.environ.get("DDPM_PLANS")
    if given is not None:
        return Path(given) if given else None
    path = default_path(gpu)
    return path if path.is_file() else None


def default_path(gpu: str) -> Path:
    """Where `ddpm tune` writes the plans for a GPU of this name."""
    return Path.home() / ".cache" / "fused-ddpm" / "plans" / f"{re.sub('[^A-Za-z0-9]+', '-', gpu)}.json"


def forget() -> None:
    """Read files of plans again."""
    _plan.cache_clear()
    load_plans.cache_clear()
    backend.warn_once.cache_clear()


class _Measured:
    """The plans of a GPU's file, by shape; refuses those that do not fit."""

    def __init__(self, target: backend.Target):
        self.target, self.path = target, plans_path(target.name)

    def get(self, shape: ConvShape) -> ConvPlan | None:
        gpu, plans = load_plans(self.path) if self.path is not None else ("", {})
        if self.path is not None and gpu != self.target.name:
            here = self.target.name
            backend.warn_once(
                f"{self.path} has plans for {gpu}, and this is {here}: the rule plans instead; run `ddpm tune`"
            )
            return None
        found = plans.get(shape.key)
        if found is None:
            return None
        cut = shape if found.form == "fused" else replace(shape, norm=False)
        where = f"{self.path}: the plan of {shape.key!r}"
        needed, there = shared_memory(found, shape.dtype), self.target.shared_memory
        if needed > there:
            raise ValueError(f"{where} needs {needed} bytes of shared memory, and {self.target.name} has {there}")
        if found.splits > steps(cut, found.block_k):
            raise ValueError(f"{where} splits K in {found.splits}, and K has {steps(cut, found.block_k)} blocks")
        if found.splits > 1 and tiles(cut, found.block_m, found.block_n)[2] > COUNTERS:
            raise ValueError(f"{where} splits K of more than {COUNTERS} tiles; set splits to 1")
        return found


@functools.lru_cache(maxsize=16)
def load_plans(path: Path) -> tuple[str, dict[str, ConvPlan]]:
    """(GPU, plans by `ConvShape.key`) of a file: {"schema": 2, "gpu": name, "plans": {key: {"form": ..., ...}}}.

    A plan's "measured", which may be missing, says what it was measured with, for readers.

    Raises:
        ValueError: it is no such file.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of plans: {error}; run `ddpm tune`, which writes one") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        what = f"must be a file of plans with schema {SCHEMA}; found {schema!r}"
        raise ValueError(f"{path} {what}; run `ddpm tune` again, which replaces it")
    gpu, plans = content.get("gpu"), content.get("plans")
    if not isinstance(gpu, str) or not isinstance(plans, dict):
        raise ValueError(f"{path} must name its gpu and its plans; run `ddpm tune` again, which replaces it")
    return gpu, {key: _parse(path, key, entry) for key, entry in plans.items()}


def _parse(path: Path, key: str, entry: Any) -> ConvPlan:
    where = f"{path}: the plan of {key!r}"
    names = [field.name for field in fields(ConvPlan) if field.name != "source"]
    if not isinstance(entry, dict) or set(entry) - {"measured"} != set(names):
        raise ValueError(f"{where} must have {', '.join(names)}; found {entry!r}")
    if entry["form"] not in FORMS:
        raise ValueError(f"{where}: form must be one of {', '.join(FORMS)}; found {entry['form']!r}")
    for name in names[1:]:
        value = entry[name]
        power = name in ("block_m", "block_n", "block_k", "num_warps")
        least = {"block_m": 16, "block_n": 4, "block_k": 16}.get(name, 1)
        if type(value) is not int or value < least or (power and value & (value - 1)):
            what = "a power of two" if power else "a number"
            raise ValueError(f"{where}: {name} must be {what}, at least {least}; found {value!r}")
    return ConvPlan(**{name: entry[name] for name in names}, source=str(path))


def to_json(plan: ConvPlan) -> dict[str, Any]:
    """A plan as files hold it."""
    return {name: value for name, value in asdict(plan).items() if name != "source"}
