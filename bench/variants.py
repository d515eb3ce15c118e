"""Who takes part in a comparison, by name; see `bench.ours` for what a variant is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from bench.ours import Ours, PlainPyTorch
from bench.rivals import Diffusers, DiffusersCompiled, OpenVINO
from bench.setting import Setting

# Makes a variant, in whichever process; raises where it cannot run.
Make: TypeAlias = Callable[[Setting], Any]

STOCK, PLAIN = "diffusers", "pytorch"
ON_CPU: dict[str, Make] = {
    "ours-eager": partial(Ours, compiled=False),
    "ours-compiled": partial(Ours, compiled=True),
}
ON_GPU: dict[str, Make] = {
    "ours-eager": partial(Ours, compiled=False, captured=False),
    "ours-graph": partial(Ours, compiled=False, plain=True),
    "ours-graph-compiled": partial(Ours, compiled=True, plain=True),
    "ours-planned": partial(Ours, compiled=False),
    "ours-planned-compiled": partial(Ours, compiled=True),
}
RIVALS: dict[str, Make] = {
    STOCK: Diffusers,
    "diffusers-compiled": DiffusersCompiled,
    "diffusers-max-autotune": partial(DiffusersCompiled, mode="max-autotune"),
    "openvino": OpenVINO,
    PLAIN: PlainPyTorch,
}
# What each is, for people.
MEANINGS = {
    "ours-eager": "this package's fused network, operation by operation",
    "ours-compiled": "the same through torch.compile, its weights constants",
    "ours-graph": "the plain network, channels_last, in this package's step, captured in a CUDA graph",
    "ours-graph-compiled": "the same through torch.compile",
    "ours-planned": "the fused and planned network, captured in a CUDA graph: what `ddpm.load` gives on a GPU",
    "ours-planned-compiled": "the same through torch.compile",
    STOCK: "DDPMPipeline as it comes",
    "diffusers-compiled": "its network channels_last and through torch.compile, on the CPU with frozen weights",
    "diffusers-max-autotune": "the same with mode='max-autotune'",
    "openvino": "DDPMPipeline with its network run by OpenVINO in float32",
    PLAIN: "the reference network in Ho et al.'s loop, one operation at a time; where diffusers has no such network",
}
NAMES = tuple(MEANINGS)


def variants(setting: Setting, only: tuple[str, ...] = ()) -> dict[str, Make]:
    """Those that belong to a setting, ours first; `only` names the ones wanted, by default all."""
    on_gpu = setting.device.type == "cuda"
    found = dict((ON_GPU if on_gpu else ON_CPU) | RIVALS)
    if on_gpu or setting.is_half:
        del found["openvino"]
    if setting.source.stock is not None:
        del found[PLAIN]
    return {name: make for name, make in found.items() if not only or name in only}


def baseline(names: dict[str, Any]) -> str:
    """Over whom speedups are: the stock pipeline, or plain PyTorch where diffusers has no such network."""
    return PLAIN if PLAIN in names else STOCK
