"""Who takes part in a comparison, by name."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

from bench.ours import Ours, PlainPyTorch
from bench.rivals import Diffusers, DiffusersCompiled, OpenVINO
from bench.rows import PLAIN, STOCK
from bench.setting import Setting
from bench.variant import Make

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
    "diffusers-reduce-overhead": partial(DiffusersCompiled, mode="reduce-overhead"),
    "diffusers-max-autotune": partial(DiffusersCompiled, mode="max-autotune"),
    "openvino": OpenVINO,
    PLAIN: PlainPyTorch,
}
# What each is, for people.
MEANINGS = {
    "ours-eager": "this package's fused network, operation by operation",
    "ours-compiled": "this package's fused network through torch.compile, its weights constants",
    "ours-graph": "the plain network, channels_last, in this package's step, captured in a CUDA graph",
    "ours-graph-compiled": "the plain network through torch.compile in this package's step, captured in a CUDA graph",
    "ours-planned": "the fused and planned network, captured in a CUDA graph: what ddpm.load gives on a GPU",
    "ours-planned-compiled": "the fused and planned network through torch.compile, captured in a CUDA graph: "
    "what ddpm.load gives on a GPU for runs that repay the compilation",
    STOCK: "DDPMPipeline as it comes, but that fp32 is IEEE float32; tf32 is what torch does to its convolutions",
    "diffusers-compiled": "DDPMPipeline, its network channels_last and through torch.compile, on the CPU with frozen "
    "weights",
    "diffusers-reduce-overhead": "DDPMPipeline, its network channels_last and through torch.compile with "
    "mode='reduce-overhead', which captures it in a CUDA graph",
    "diffusers-max-autotune": "DDPMPipeline, its network channels_last and through torch.compile with "
    "mode='max-autotune', on a GPU in a CUDA graph, on the CPU with frozen weights",
    "openvino": "DDPMPipeline with its network run by OpenVINO in float32",
    PLAIN: "the reference network in Ho et al.'s loop, operation by operation; where diffusers does not run it",
}
NAMES = tuple(MEANINGS)


def variants(setting: Setting) -> dict[str, Make]:
    """Those of a setting's `only` that belong to its device, precision and network, ours first."""
    on_gpu = setting.device.type == "cuda"
    found = dict((ON_GPU if on_gpu else ON_CPU) | RIVALS)
    if not on_gpu:
        del found["diffusers-reduce-overhead"]  # what it adds are CUDA graphs
    if on_gpu or setting.is_half:
        del found["openvino"]
    if setting.source.stock is not None and find_spec("diffusers") is not None:
        del found[PLAIN]
    return {name: make for name, make in found.items() if not setting.only or name in setting.only}
