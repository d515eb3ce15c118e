"""The network as it is planned for a GPU, its kernels' references in their place, over whole chains of the demo.

What the interpreter is too slow for: the planned network's own order of roundings, with weights that were trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import ddpm
from ddpm.cli import DEMO
from ddpm.fused import Convolution, convolution
from ddpm.fused.features import Features
from ddpm.kernels import backend
from ddpm.reference import sample_reference
from ddpm.steps import step_table
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


def oracle_images(steps: int, change: Callable[[nn.Module], nn.Module] = lambda network: network) -> Tensor:
    """Of the reference network, changed or not, with the state in float32."""
    checkpoint, source = ddpm.load(DEMO, device="cpu").checkpoint, generator()
    shape = (IMAGES, checkpoint.image_channels, *checkpoint.sample_size)
    timesteps = step_table(checkpoint.schedule, checkpoint.rules, steps).timesteps.tolist()
    return sample_reference(
        change(copy.deepcopy(checkpoint.network)),
        checkpoint.schedule,
        checkpoint.rules,
        timesteps,
        torch.randn(shape, generator=source),
        lambda i: torch.randn(shape, generator=source),
    )


def rounded(network: nn.Module) -> nn.Module:
    """The plain network in emulated float16: weights, and what every layer returns, are rounded; sums are float32."""

    def round_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.half().float()

    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(round_output)
    return network


@pytest.mark.parametrize(("sms", "steps"), [(132, 10), (2, 10), pytest.param(2, 1000, marks=pytest.mark.slow)], ids=str)
def test_a_chain_of_the_demo(monkeypatch: pytest.MonkeyPatch, sms: int, steps: int) -> None:
    """In float32 the oracle's images; in float16 at most 1.5 times the plain network's error."""
    exact, plain = oracle_images(steps), oracle_images(steps, rounded)
    forms = plan_on_the_cpu(monkeypatch, sms)
    assert 0 < (planned_images("fp32", steps) - exact).abs().max() <= CHAIN
    error, allowed = (planned_images("fp16", steps) - exact).abs(), (plain - exact).abs()
    assert 0 < error.mean() <= 1.5 * allowed.mean()
    assert error.max() <= 1.5 * allowed.max()
    assert forms == ({"fused"} if sms == 132 else {"fused", "apply"})
