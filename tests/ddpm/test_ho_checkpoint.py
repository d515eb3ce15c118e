"""Ho et al.'s checkpoints (pytorch_diffusion, ermongroup/ddim) against an independent form of the originals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ddpm
from ddpm.checkpoints import load_checkpoint
from tests.helpers import assert_same_output
from tests.originals import ho as original
from tests.tolerances import CHAIN
from tests.weights import redraw

TINY: dict[str, Any] = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "resolution": 8}
GIVEN = {"image_size": 8, "variance_type": "fixed_small", "num_train_timesteps": 100}
T = 100


def network(**changes: Any) -> torch.nn.Module:
    return redraw(original.Model(**(TINY | changes))).eval().requires_grad_(False)


def saved(directory: Path, name: str = "ema_model-1.ckpt", **changes: Any) -> tuple[torch.nn.Module, Path]:
    theirs = network(**changes)
    torch.save(theirs.state_dict(), directory / name)
    return theirs, directory / name


def assert_forward(theirs: torch.nn.Module, path: Path, size: int, **options: Any) -> None:
    ours = load_checkpoint(path, **options).network
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for t in (0, 37, 999):
            expected = theirs(x, torch.full((2,), float(t)))
            assert_same_output(ours, x, t, expected)


@pytest.mark.parametrize(
    "changes", [{}, {"num_res_blocks": 2, "attn_resolutions": (8, 4)}, {"ch_mult": (1, 1, 2)}], ids=str
)
def test_forward(tmp_path, changes):
    theirs, path = saved(tmp_path, **changes)
    assert_forward(theirs, path, 8, **GIVEN)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("cifar10", 32), ("celeba-64", 64), ("lsun", 64)])
def test_real_size(tmp_path, name, size):
    published = original.PUBLISHED[name]
    theirs, path = saved(tmp_path, **published.model)
    assert sum(p.numel() for p in theirs.parameters()) == published.parameters
    checkpoint = load_checkpoint(path)
    assert checkpoint.sample_size == (published.model["resolution"],) * 2
    assert checkpoint.rules.variance_type.replace("_", "") == published.variance
    assert_forward(theirs, path, size)


@pytest.mark.slow
def test_a_short_chain_at_real_size(tmp_path):
    theirs, path = saved(tmp_path, **original.PUBLISHED["cifar10"].model)
    torch.manual_seed(4)
    expected = original.generalized_steps(
        theirs, torch.randn(2, 3, 32, 32), original.seq_uniform(1000, 5), torch.linspace(1e-4, 0.02, 1000)
    )
    images = ddpm.load(path, device="cpu", compile=False).sample(
        2, sampler="ddim", steps=5, generator=torch.Generator().manual_seed(4), progress=False
    )
    assert float((images - expected).abs().max()) <= CHAIN * float(expected.abs().max().clamp(min=1))


def betas() -> Tensor:
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64).float()


def sample(path: Path, options: dict[str, Any], **arguments: Any) -> tuple[Tensor, torch.Generator]:
    sampler = ddpm.load(path, device="cpu", compile=False, **options)
    generator = torch.Generator().manual_seed(9)
    return sampler.sample(2, generator=generator, progress=False, **arguments), generator


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_all_steps_as_pytorch_diffusion(tmp_path, variance):
    theirs, path = saved(tmp_path)
    torch.manual_seed(9)
    expected = original.pytorch_diffusion_sample(theirs, (2, 3, 8, 8), T, variance)
    after = torch.randn(3)
    images, generator = sample(path, GIVEN | {"variance_type": variance.replace("fixed", "fixed_")})
    assert float((images - expected).abs().max()) <= CHAIN
    assert torch.equal(torch.randn(3, generator=generator), after)


@pytest.mark.parametrize(("steps", "spacing"), [(10, None), (30, None), (100, None), (10, "quad"), (40, "quad")])
def test_ancestral_chains_as_ermongroup(tmp_path, steps, spacing):
    theirs, path = saved(tmp_path)
    sequence = original.seq_quad(T, steps) if spacing else original.seq_uniform(T, steps)
    torch.manual_seed(9)
    expected = original.ddpm_steps(theirs, torch.randn(2, 3, 8, 8), sequence, betas())
    after = torch.randn(3)
    options = GIVEN | {"sampling_code": "ermongroup"}
    images, generator = sample(path, options, sampler="ddpm", steps=steps, spacing=spacing)
    assert float((images - expected).abs().max()) <= CHAIN
    assert torch.equal(torch.randn(3, generator=generator), after)


@pytest.mark.parametrize("code", ["pytorch_diffusion", "ermongroup"])
@pytest.mark.parametrize(("steps", "spacing", "eta"), [(10, None, 0.0), (10, "quad", 0.5), (100, None, 1.0)])
def test_ddim_as_ermongroup(tmp_path, code, steps, spacing, eta):
    """x_0 is not clamped there: random weights make it large, so the bound is relative."""
    theirs, path = saved(tmp_path)
    sequence = original.seq_quad(T, steps) if spacing else original.seq_uniform(T, steps)
    torch.manual_seed(9)
    expected = original.generalized_steps(theirs, torch.randn(2, 3, 8, 8), sequence, betas(), eta)
    after = torch.randn(3)
    options = GIVEN | {"sampling_code": code}
    images, generator = sample(path, options, sampler="ddim", steps=steps, spacing=spacing, eta=eta)
    assert float((images - expected).abs().max()) <= CHAIN * float(expected.abs().max().clamp(min=1))
    assert torch.equal(torch.randn(3, generator=generator), after)


def list_file(directory: Path, *, ema: bool = True) -> tuple[torch.nn.Module, torch.nn.Module, Path]:
    """(raw network, averaged network, a training checkpoint of ermongroup/ddim with both)."""
    raw, averaged = network(), network()
    redraw(averaged, seed=1)
    states: list[Any] = [
        {f"module.{k}": v for k, v in raw.state_dict().items()},
        {"param_groups": [], "state": {}},
        3,
        9,
    ]
    if ema:
        states.append(dict(averaged.named_parameters()))
    torch.save(states, directory / "ckpt.pth")
    return raw, averaged, directory / "ckpt.pth"


def test_a_list_file_gives_averaged_weights_and_its_own_sampling(tmp_path):
    raw, averaged, path = list_file(tmp_path)
    assert_forward(averaged, path, 8, **GIVEN)
    assert_forward(raw, path, 8, **GIVEN, ema=False)
    with pytest.raises(ValueError, match="ema must be True or False; got 'no'"):
        load_checkpoint(path, **GIVEN, ema="no")
    checkpoint = load_checkpoint(path, **GIVEN)
    assert checkpoint.rules.convention == "ermongroup"
    assert checkpoint.rules.sampler == "ddim"  # that code's default
    assert checkpoint.uint8_rounding == "half_up"
    assert any("averaged (EMA) weights, the list's last entry" in line for line in checkpoint.report.inferred)


def test_a_list_file_without_averaged_weights_says_so(tmp_path):
    raw, _, path = list_file(tmp_path, ema=False)
    assert_forward(raw, path, 8, **GIVEN)
    report = load_checkpoint(path, **GIVEN).report
    assert "raw weights: the list holds no averaged (EMA) ones" in report.inferred


def test_raw_weights_beside_averaged_ones_are_noticed(tmp_path):
    saved(tmp_path)
    _, path = saved(tmp_path, "model-1.ckpt")
    with pytest.warns(UserWarning, match="holds raw weights; the averaged ones in"):
        load_checkpoint(path, **GIVEN)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, r"\([\d,]+ parameters\) is no published network; pass image_size= and variance_type="),
        (GIVEN | {"image_size": "8"}, "image_size must be a positive integer; got '8'"),
        (GIVEN | {"num_train_timesteps": 0}, "num_train_timesteps must be a positive integer; got 0"),
        (GIVEN | {"image_size": 7}, "image_size=7 must be a multiple of 2"),
        (GIVEN | {"variance_type": "learned"}, "variance_type 'learned' is not one of fixed_small, fixed_large"),
        (GIVEN | {"sampling_code": "ddim"}, "sampling_code 'ddim' is not one of pytorch_diffusion, ermongroup"),
        (
            GIVEN | {"noise_schedule": "linear"},
            "unknown option noise_schedule; a Ho et al. checkpoint takes image_size",
        ),
    ],
)
def test_wrong_options(tmp_path, options, sentence):
    _, path = saved(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(path, **options)


def test_missing_and_extra_keys_and_other_lists(tmp_path):
    theirs, path = saved(tmp_path)
    state = theirs.state_dict()
    torch.save({k: v for k, v in state.items() if k != "mid.block_1.norm1.weight"}, path)
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ keys, first mid_block\.resnets\.0\.norm1\.weight"):
        load_checkpoint(path, **GIVEN)
    torch.save(state | {"up.0.extra.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has unknown 1"):
        load_checkpoint(path, **GIVEN)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"holds a list of 2; expected ermongroup/ddim's \[model, optimizer"):
        load_checkpoint(path, **GIVEN)
    torch.save(state | {"logvar": torch.zeros(100)}, path)
    assert "logvar: not read in sampling" in load_checkpoint(path, **GIVEN).report.ignored
    torch.save([state, {}, 1, 2, None], path)
    with pytest.raises(ValueError, match="with state dicts of tensors"):
        load_checkpoint(path, **GIVEN)


def test_a_network_of_published_proportions_and_another_width_is_no_published_one(tmp_path):
    _, path = saved(tmp_path, ch_mult=(1, 2, 2, 2))
    with pytest.raises(ValueError, match="is no published network; pass image_size= and variance_type="):
        load_checkpoint(path)


def test_as_many_outputs_as_channels(tmp_path):
    _, path = saved(tmp_path, out_ch=6)
    with pytest.raises(ValueError, match="has 6 output channels, but images of 3 channels with variance fixed_small"):
        load_checkpoint(path, **GIVEN)
