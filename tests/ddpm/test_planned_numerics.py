"""The network as it is planned for a GPU, its kernels' references in their place, over whole chains of the demo.

What the interpreter is too slow for: the planned network's own order of roundings, with weights that were trained.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import ddpm
from ddpm.checkpoints.checkpoint import Network
from ddpm.cli import DEMO
from ddpm.fused import Convolution, convolution
from ddpm.fused.features import Features
from ddpm.kernels import backend
from tests.helpers import reference_images
from tests.tolerances import CHAIN

IMAGES = 2


def plan_on_the_cpu(monkeypatch: pytest.MonkeyPatch, sms: int) -> set[str]:
    """Layers take the forms planned for a GPU of so many multiprocessors; the set of those that they took."""
    taken: set[str] = set()

    def planned(layer: Convolution, x: Features) -> str:
        form = convolution._planned_form(x.parts[0].device, *layer._shape(x))
        taken.add(form)
        return form

    monkeypatch.setattr(backend, "H100", replace(backend.H100, name=f"{sms} multiprocessors", sms=sms))
    monkeypatch.setattr(Convolution, "form", planned)
    return taken


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def planned_images(dtype: str, steps: int) -> Tensor:
    sampler = ddpm.load(DEMO, device="cpu", dtype=dtype, compile=False)
    return sampler.sample(IMAGES, steps=steps, generator=generator(), progress=False)


def rounded(network: Network) -> Network:
    """A copy of the plain network in emulated float16: weights and what layers return are rounded, sums are float32."""

    def round_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.half().float()

    network = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(round_output)
    return network


@pytest.mark.parametrize(("sms", "steps"), [(132, 10), (2, 10), pytest.param(2, 1000, marks=pytest.mark.slow)], ids=str)
def test_a_chain_of_the_demo(monkeypatch: pytest.MonkeyPatch, sms: int, steps: int) -> None:
    """In float32 the oracle's images; in float16 at most 1.5 times the plain network's error."""
    sampler = ddpm.load(DEMO, device="cpu")
    exact = reference_images(sampler, IMAGES, steps, generator())
    plain = reference_images(sampler, IMAGES, steps, generator(), rounded(sampler.checkpoint.network))
    forms = plan_on_the_cpu(monkeypatch, sms)
    assert 0 < (planned_images("fp32", steps) - exact).abs().max() <= CHAIN
    error, allowed = (planned_images("fp16", steps) - exact).abs(), (plain - exact).abs()
    assert 0 < error.mean() <= 1.5 * allowed.mean()
    assert error.max() <= 1.5 * allowed.max()
    assert forms == ({"fused"} if sms == 132 else {"fused", "apply"})
