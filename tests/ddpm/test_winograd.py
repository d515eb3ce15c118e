"""Winograd's 3x3 convolution against float64, eager and compiled, and the rule that chooses it."""

from __future__ import annotations

import gc
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm
from ddpm import devices
from ddpm.fused import Convolution, FusedNetwork, fuse, winograd
from ddpm.fused.features import Features
from ddpm.fused.winograd import chooses_winograd, transform_weight, winograd_bytes, winograd_conv3x3
from ddpm.unet import UNet, UNetConfig
from tests.helpers import save_tiny

# Of the direct convolution's error in float32, the largest against the largest. Lavin and Gray's points take 30.
TIMES_THE_DIRECT_ERROR = 12.0

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")


def make(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(n: int, c: int, height: int, width: int) -> Tensor:
    """As a norm and SiLU leave it."""
    return F.silu(make(n, c, height, width)).contiguous(memory_format=torch.channels_last)


def kernel(c_out: int, c_in: int) -> Tensor:
    return make(c_out, c_in, 3, 3, seed=1) / (9 * c_in) ** 0.5


def check(found: Tensor, x: Tensor, weight: Tensor, added: Tensor | float = 0.0) -> None:
    """Assert that the result is as exact as the form can be, and NHWC."""
    exact = F.conv2d(x.double(), weight.double(), padding=1) + added
    direct = F.conv2d(x, weight, padding=1) + added
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    assert found.permute(0, 2, 3, 1).is_contiguous()
    # The floor: a sum of few products may be exact in the direct form.
    allowed = TIMES_THE_DIRECT_ERROR * (direct.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize(
    ("n", "c_in", "c_out", "height", "width"),
    [(1, 128, 128, 32, 32), (2, 33, 7, 8, 8), (3, 1, 1, 4, 4), (1, 5, 3, 4, 12), (1, 256, 64, 16, 8)],
)
def test_against_float64(n: int, c_in: int, c_out: int, height: int, width: int) -> None:
    x, weight = image(n, c_in, height, width), kernel(c_out, c_in)
    check(winograd_conv3x3(x, transform_weight(weight)), x, weight)


def test_in_float64_it_is_the_convolution() -> None:
    x, weight = image(2, 9, 8, 12).double(), kernel(5, 9)
    points = transform_weight(weight.double()).double()  # rounded to float32, as ever: that is all of the error
    exact = F.conv2d(x, weight.double(), padding=1)
    torch.testing.assert_close(winograd_conv3x3(x, points), exact, rtol=0, atol=1e-6)


def test_other_layouts() -> None:
    x, weight = image(2, 24, 8, 8), kernel(16, 24)
    points = transform_weight(weight)
    check(winograd_conv3x3(x.contiguous(), points), x, weight)
    check(winograd_conv3x3(image(2, 30, 8, 8)[:, 3:27], points), image(2, 30, 8, 8)[:, 3:27], weight)


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_bias_and_residual(rows: int | None) -> None:
    x, weight = image(2, 16, 8, 8), kernel(12, 16)
    bias = make(12, seed=2) if rows is None else make(rows, 12, seed=2)
    residual = make(2, 12, 8, 8, seed=3).contiguous(memory_format=torch.channels_last)
    found = winograd_conv3x3(x, transform_weight(weight), bias=bias, residual=residual)
    check(found, x, weight, bias.view(-1, 12, 1, 1) + residual)


def test_zero_stays_zero() -> None:
    found = winograd_conv3x3(torch.zeros(1, 8, 8, 8), transform_weight(kernel(8, 8)))
    assert torch.equal(found, torch.zeros(1, 8, 8, 8))


def test_an_empty_batch() -> None:
    assert winograd_conv3x3(image(0, 8, 8, 8), transform_weight(kernel(6, 8))).shape == (0, 6, 8, 8)


@needs_compiler
@pytest.mark.parametrize("with_sums", [False, True])
def test_compiled_with_frozen_weights(with_sums: bool) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(transform_weight(weight), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            added = {"bias": bias, "residual": residual} if with_sums else {}
            return winograd_conv3x3(F.silu(x), self.weight, **added)

    before, weight, bias = make(2, 20, 8, 8), kernel(24, 20), make(24, seed=2)
    residual = make(2, 24, 8, 8, seed=3).contiguous(memory_format=torch.channels_last)
    before = before.contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        found = torch.compile(Layer(), fullgraph=True, dynamic=False)(before)
    check(found, F.silu(before), weight, bias.view(1, -1, 1, 1) + residual if with_sums else 0.0)


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 6), (9, 9), (2, 4)])
def test_sizes_that_4_does_not_divide_are_refused(height: int, width: int) -> None:
    assert not chooses_winograd(64, height, width, 128, 128)
    with pytest.raises(ValueError, match=rf"multiples of 4; found {height}x{width}; use the direct"):
        winograd_conv3x3(image(1, 8, height, width), transform_weight(kernel(8, 8)))


def test_another_layers_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[36 K, 8, 1, 1\].*found \[288, 4, 1, 1\]"):
        winograd_conv3x3(image(1, 8, 8, 8), transform_weight(kernel(8, 4)))
    with pytest.raises(ValueError, match=r"found \[8, 8, 3, 3\]"):
        winograd_conv3x3(image(1, 8, 8, 8), kernel(8, 8))


def test_the_rule() -> None:
    assert not chooses_winograd(1, 32, 32, 64, 128)  # the transforms cost what the products save
    assert chooses_winograd(1, 32, 32, 128, 128)
    assert chooses_winograd(1, 16, 16, 512, 256)
    assert not chooses_winograd(1, 8, 8, 256, 256)  # four times the bytes of weights, for four tiles
    assert chooses_winograd(16, 8, 8, 256, 256)
    assert not chooses_winograd(1, 32, 32, 3, 128)
    assert not chooses_winograd(1, 32, 32, 128, 3)


def test_bytes() -> None:
    points = transform_weight(kernel(24, 10))
    assert points.dtype == torch.float32
    assert winograd_bytes(10, 24) == points.numel() * points.element_size() == 4 * kernel(24, 10).numel() * 4


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks take the form too."""
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 32)


# In a network: 32 channels at 16 x 16 take the form, and the level below is too small for one image.
WIDE = {"sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 8}


def wide_network() -> FusedNetwork:
    plain = {"down_attention": (False, False), "up_attention": (False, False), "mid_norm_num_groups": 8}
    return fuse(UNet(UNetConfig(**WIDE | plain | {"sample_size": (16, 16)})))


def features(*channels: int, row: int | None = None) -> Features:
    parts = tuple(image(2, c, 16, 16) for c in channels)
    return Features(parts, (None,) * len(parts), None if row is None else make(row, sum(channels), seed=5))


@pytest.mark.parametrize(
    ("channels", "options", "arguments"),
    [
        ((32,), {}, {}),
        ((32, 32), {"norm": True, "activation": "silu"}, {}),
        ((64,), {"norm": True, "activation": "silu"}, {"scale": (2, 64), "shift": (2, 64)}),
        ((32,), {"resample": "up"}, {}),
        ((32,), {"norm": True, "activation": "gelu"}, {"row": (1, 48)}),
        ((32,), {"bias": False}, {"row": (2, 48)}),
        ((32,), {"scale": 2**0.5}, {"residual": 48}),
        ((32,), {"shortcut": 40}, {"residual": 40}),
        ((32,), {"resample": "up", "shortcut": 40}, {"residual": 40}),
    ],
)
@pytest.mark.usefixtures("narrow")
def test_a_layer_gives_the_same_in_this_form(
    channels: tuple[int, ...], options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    c_in = sum(channels)
    norm = nn.GroupNorm(8, c_in) if options.pop("norm", False) else None
    shortcut = nn.Conv2d(options["shortcut"], 48, 1) if "shortcut" in options else None
    bias = make(48, seed=3) if options.pop("bias", True) else None
    layer = Convolution(kernel(48, c_in), bias, torch.float32, norm=norm, **options | {"shortcut": shortcut})
    given = {name: make(*shape, seed=4) for name, shape in arguments.items() if name != "residual"}
    residual = features(arguments["residual"]) if "residual" in arguments else None
    x = features(*channels)
    plain = layer(x, **given, residual=residual)
    with winograd.allowed():
        assert layer.form(x) == "winograd"
        found = layer(x, **given, residual=residual)
    assert layer.form(x) == "library"
    expected = plain.tensor() if plain.row is None else plain.tensor() + plain.row[:, :, None, None]
    assert found.row is None
    assert found.tensor().permute(0, 2, 3, 1).is_contiguous()
    torch.testing.assert_close(found.tensor(), expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": (0, 1)}, {"dtype": torch.float16}, {"kernel": 1}])
@pytest.mark.usefixtures("narrow")
def test_a_layer_of_another_kind_does_not_take_it(options: dict[str, Any]) -> None:
    weight = make(48, 32, 1, 1) if options.pop("kernel", 3) == 1 else kernel(48, 32)
    layer = Convolution(weight, None, options.pop("dtype", torch.float32), **options)
    with winograd.allowed():
        assert layer.form(features(32)) == "library"
        assert layer.winograd_bytes(features(32)) == 0


@needs_compiler
@pytest.mark.usefixtures("narrow")
def test_a_compiled_sampler_takes_it_and_draws_the_same_images(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, WIDE)
    plain, fast = (ddpm.load(path, device="cpu", compile=choice) for choice in (False, True))
    forms = [line.split()[1] for line in fast.explain().splitlines()[3:] if "3x3" in line]
    assert 0 < forms.count("Winograd") < len(forms)
    assert "Winograd" not in plain.explain()

    def draw(sampler: ddpm.Sampler) -> Tensor:
        return sampler.sample(1, seeds=[3], steps=4, progress=False)

    images = draw(fast)
    assert 0 < (images - draw(plain)).abs().max() <= 1e-5  # equal would mean that it was not taken
    # The transformed weights are constants of the compiled step, not made anew in every step.
    for parameter in fast._network.parameters():
        if parameter.shape[2:] == (3, 3) and min(parameter.shape[:2]) >= 32:
            parameter.data.zero_()
    assert torch.equal(draw(fast), images)


@needs_compiler
@pytest.mark.usefixtures("narrow")
def test_weights_of_a_module_of_ones_own_stay_live() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.conv(x)

    network = Own().eval()
    betas = torch.linspace(1e-4, 0.02, 10)

    def draw() -> Tensor:
        return sampler.sample(1, seeds=[3], steps=4, progress=False)

    sampler = ddpm.Sampler.from_module(network, betas, (3, 8, 8), compile=True)
    draw()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(-parameter)
    expected = ddpm.Sampler.from_module(network, betas, (3, 8, 8)).sample(1, seeds=[3], steps=4, progress=False)
    torch.testing.assert_close(draw(), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("narrow")
def test_it_is_left_where_its_weights_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wide_network()
    cpu = torch.device("cpu")
    lines = [path.path for path in network.explain(cpu, 1, 16, 16, compiled=True)]
    used = [float(line.split()[-2]) for line in lines if line.startswith("Winograd")]
    assert used
    assert network.allows_winograd(cpu, 1, 16, 16)
    memory = sum(used) * 1e6 / winograd.MEMORY_SHARE

    monkeypatch.setattr(winograd, "total_memory", lambda: int(2 * memory))
    assert network.allows_winograd(cpu, 1, 16, 16)
    monkeypatch.setattr(winograd, "total_memory", lambda: int(0.5 * memory))
    assert not network.allows_winograd(cpu, 1, 16, 16)
    assert not any(path.path.startswith("Winograd") for path in network.explain(cpu, 1, 16, 16, compiled=True))


@pytest.mark.usefixtures("narrow")
def test_it_is_for_the_cpu() -> None:
    network = wide_network()
    assert not network.allows_winograd(torch.device("cuda"), 1, 16, 16)


@pytest.mark.usefixtures("narrow")
def test_a_containers_limit_is_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices, "CONTAINER_LIMIT", limit)
    machine = devices.total_memory()
    for text, expected in (("max\n", machine), ("1048576\n", 2**20), (f"{2 * machine}\n", machine)):
        limit.write_text(text)
        assert devices.total_memory() == expected


@needs_compiler
@pytest.mark.usefixtures("narrow")
def test_a_sampler_that_is_gone_leaves_no_weights_behind(tmp_path: Path) -> None:
    from torch._inductor.codecache import PyCodeCache

    def constants() -> list[Tensor]:
        return [value for module in PyCodeCache.modules for value in vars(module).values() if isinstance(value, Tensor)]

    before, modules = len(constants()), set(sys.modules)
    sampler = ddpm.load(save_tiny(tmp_path), device="cpu", compile=True)
    sampler.sample(1, seeds=[3], steps=2, progress=False)
    # The packed ones; PyTorch holds a few biases elsewhere.
    held = [weakref.ref(tensor) for tensor in constants()[before:] if tensor.is_mkldnn]
    assert held
    held += [weakref.ref(parameter) for parameter in sampler._network.parameters()]
    assert set(sys.modules) - modules
    del sampler
    gc.collect()
    assert not any(tensor() is not None for tensor in held)
    assert len(constants()) == before
