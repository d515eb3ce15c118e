"""How convolutions are cut: the rule, what it must respect on every GPU, and files that override it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.kernels import tuning
from ddpm.kernels.backend import H100, Target
from ddpm.kernels.tuning import COUNTERS, ConvPlan, ConvShape, candidates, plan, steps, tiles

A100 = Target("NVIDIA A100-SXM4-80GB", 108, 163 * 1024, (8, 0))
MI300X = Target("AMD Instinct MI300X", 304, 64 * 1024, (0, 0))
SMALL = Target("a laptop's", 4, 99 * 1024, (8, 6))
TARGETS = (H100, A100, MI300X, SMALL)
HALF = torch.float16


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DDPM_PLANS", "")
    tuning.forget()
    yield
    tuning.forget()


def layer(n: int, size: int, c_in: int, c_out: int, **options: Any) -> ConvShape:
    """A 3x3 convolution behind a norm."""
    return replace(ConvShape(n, size, size, c_in, c_out, 3, 0, True, HALF), **options)


# google/ddpm-cifar10-32, without its first and its last convolution.
CIFAR = [
    (32, 128, 128, {}),
    (16, 128, 128, {"norm": False, "stride": 2}),
    (16, 128, 256, {}),
    (16, 256, 256, {}),
    (16, 256, 256, {"shortcut": 128}),
    (16, 256, 256, {"shortcut": 512}),
    (16, 512, 256, {}),
    (16, 384, 256, {}),
    (16, 256, 768, {"kernel": 1}),
    (16, 256, 256, {"kernel": 1, "norm": False}),
    (8, 256, 256, {}),
    (8, 512, 256, {}),
    (8, 256, 256, {"norm": False, "upsample": True}),
    (4, 256, 256, {}),
    (4, 512, 256, {}),
    (4, 256, 256, {"shortcut": 512}),
    (32, 256, 256, {"norm": False, "upsample": True}),
    (32, 384, 128, {}),
    (32, 256, 128, {}),
    (32, 128, 128, {"shortcut": 384}),
]


def shapes() -> list[ConvShape]:
    """From tiny to huge, with channels that are no powers of two."""
    regular = [layer(n, size, c, c_out, **options) for n in (1, 3, 16, 256) for size, c, c_out, options in CIFAR]
    others = [
        layer(n, size, c, c_out, kernel=kernel, norm=norm, dtype=dtype)
        for n in (0, 1, 5)
        for size in (1, 2, 28, 64, 256)
        for c, c_out in ((3, 64), (20, 3), (96, 96), (320, 640), (1536, 1024))
        for kernel, norm, dtype in ((1, False, HALF), (3, True, HALF), (3, True, torch.float32), (7, False, HALF))
    ]
    return regular + others


def launched(shape: ConvShape, p: ConvPlan) -> ConvShape:
    """What the kernel itself is called with."""
    return replace(shape, norm=False) if p.form == "apply" else shape


def programs(shape: ConvShape, p: ConvPlan) -> int:
    return tiles(launched(shape, p), p.block_m, p.block_n)[2] * p.splits


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("splittable", [True, False])
def test_every_plan_fits(target, splittable):
    for shape in shapes():
        p = plan(shape, target, splittable)
        assert p.form == "fused" or (shape.norm and p.form == "apply"), shape
        assert all(b in (16, 32, 64, 128) for b in (p.block_m, p.block_k)), shape
        assert p.block_n in ((4, 8, 16, 32, 64, 128) if shape.dtype == torch.float32 else (16, 32, 64, 128)), shape
        assert tuning.shared_memory(p, shape.dtype) <= target.shared_memory, shape
        assert 1 <= p.splits <= steps(shape, p.block_k), shape
        count = tiles(launched(shape, p), p.block_m, p.block_n)[2]
        assert p.splits == 1 or (splittable and count <= COUNTERS), shape
        assert plan(shape, target, splittable, form="fused").form == "fused"


def test_tiles_cover_every_pixel_once():
    for shape in shapes():
        for block_m in (16, 32, 64, 128):
            images, slots, count = tiles(shape, block_m, 64)
            pixels = shape.height * shape.width
            assert min(images, slots) == 1, shape
            assert images == 1 or not shape.norm, shape
            assert images * -(-pixels // slots) <= block_m, shape
            assert count == -(-shape.n // images) * slots * -(-shape.c_out // 64), shape


@pytest.mark.parametrize("case", CIFAR, ids=str)
def test_at_batch_1_a_layer_is_one_launch_that_fills_the_gpu(case):
    size, c_in, c_out, options = case
    shape = layer(1, size, c_in, c_out, **options)
    p = plan(shape, H100)
    assert p.form == "fused"
    assert programs(shape, p) >= min(100, shape.macs // 64**3)
    assert programs(shape, p) <= 4 * H100.sms
    assert tiles(shape, p.block_m, p.block_n)[1] <= 16  # statistics that need no merging


@pytest.mark.parametrize("case", [case for case in CIFAR if case[3].get("norm", True)], ids=str)
def test_at_batch_256_the_norm_has_its_own_pass(case):
    size, c_in, c_out, options = case
    shape = layer(256, size, c_in, c_out, **options)
    p = plan(shape, H100)
    assert (p.form, p.block_m, p.block_n) == ("apply", 128, 128)
    assert p.splits == 1 or programs(shape, p) < H100.sms
    images, _, _ = tiles(launched(shape, p), p.block_m, p.block_n)
    assert images == max(1, 128 // size**2)


def test_large_images_are_like_large_batches():
    for size, channels in ((256, 128), (128, 128), (64, 256)):
        p = plan(layer(1, size, channels, channels), H100)
        assert (p.form, p.block_m, p.block_n) == ("apply", 128, 128)


def test_k_is_whole_where_it_may_not_be_split():
    shape = layer(1, 8, 512, 512)
    assert plan(shape, H100).splits > 1
    assert plan(shape, H100, splittable=False).splits == 1


def test_candidates_hold_the_rules_plan_and_the_librarys():
    for shape in (layer(1, 16, 256, 256), layer(16, 32, 128, 128), layer(4, 8, 96, 64, norm=False)):
        found = candidates(shape, H100)
        assert [p.form for p in found].count("library") == 1
        assert len(found) == len(set(found)) <= 25
        blocks = [(p.form, p.block_m, p.block_n, p.block_k) for p in found]
        rule = plan(shape, H100)
        assert (rule.form, rule.block_m, rule.block_n, rule.block_k) in blocks
        assert {p.form for p in found} == {"library", "fused"} | ({"apply"} if shape.norm else set())
        for p in found:
            assert tuning.shared_memory(p, shape.dtype) <= H100.shared_memory


def test_keys_are_readable_and_tell_all_shapes_apart():
    shape = layer(1, 16, 384, 256)
    assert shape.key == "1x16x16 384->256 3x3 float16 norm"
    other = replace(shape, stride=2, shortcut=128, upsample=True, norm=False, dtype=torch.bfloat16, width=8)
    assert other.key == "1x16x8 384->256 3x3 bfloat16 stride 2 shortcut 128 upsample"
    everything = set(shapes())
    assert len({s.key for s in everything}) == len(everything)


MEASURED = {
    "form": "fused", "block_m": 32, "block_n": 32, "block_k": 64, "splits": 5, "num_warps": 2, "num_stages": 4,
}  # fmt: skip
SHAPE = layer(1, 16, 256, 256)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """write(plans, ...): a file of plans, which $DDPM_PLANS names."""

    def write(plans: Any, **changes: Any) -> Path:
        path = tmp_path / "plans.json"
        content = {"schema": tuning.SCHEMA, "gpu": H100.name, "plans": plans} | changes
        path.write_text(json.dumps(content))
        monkeypatch.setenv("DDPM_PLANS", str(path))
        tuning.forget()
        return path

    return write


def test_a_file_overrides_the_rule_for_its_shapes_and_its_gpu(write):
    path = write({SHAPE.key: MEASURED})
    assert plan(SHAPE, H100) == ConvPlan(**MEASURED, source=str(path))
    assert plan(SHAPE, H100, splittable=False) == ConvPlan(**MEASURED | {"splits": 1}, source=str(path))
    assert tuning.to_json(plan(SHAPE, H100)) == MEASURED
    assert plan(replace(SHAPE, n=2), H100).source == "rule"
    assert plan(SHAPE, H100, form="apply").source == "rule"


def test_what_a_plan_was_measured_with_is_for_readers(write):
    path = write({SHAPE.key: MEASURED | {"measured": {"versions": {"torch": "2"}, "commit": None}}})
    assert plan(SHAPE, H100) == ConvPlan(**MEASURED, source=str(path))


def test_a_file_of_another_gpu_is_not_followed_and_says_so_once(write):
    path = write({SHAPE.key: MEASURED})
    with pytest.warns(UserWarning, match="plans for NVIDIA H100 .*, and this is NVIDIA A100.*: the rule") as caught:
        sources = [plan(shape, A100).source for shape in (SHAPE, replace(SHAPE, n=2))]
    assert sources == ["rule", "rule"]
    assert len(caught) == 1
    assert str(caught[0].message).startswith(str(path))


@pytest.mark.parametrize("content", [None, "{", '{"schema": 1}'])
def test_files_are_not_read_while_they_are_measured_anew(content, write):
    path = write({SHAPE.key: MEASURED})
    assert plan(SHAPE, H100).source == str(path)
    if content is not None:
        path.write_text(content)
        tuning.forget()
    with tuning.without_files():
        assert plan(SHAPE, H100).source == "rule"
        assert {p.source for p in candidates(SHAPE, H100)} == {"rule"}
    if content is None:
        assert plan(SHAPE, H100).source == str(path)


def test_the_second_half_of_a_measured_pass(write):
    """A convolution without norm takes the blocks that were measured behind a pass, unless it has its own."""
    plain = replace(SHAPE, norm=False)
    applied, own = MEASURED | {"form": "apply"}, MEASURED | {"block_m": 64}
    write({SHAPE.key: applied})
    assert plan(SHAPE, H100).form == "apply"
    assert tuning.to_json(plan(plain, H100)) == MEASURED
    assert plan(SHAPE, H100, form="fused").source == "rule"
    write({SHAPE.key: applied, plain.key: own})
    assert tuning.to_json(plan(plain, H100, form="fused")) == own
    write({SHAPE.key: applied, plain.key: own | {"form": "library"}})
    assert plan(plain, H100).form == "library"
    assert tuning.to_json(plan(plain, H100, form="fused")) == MEASURED


def test_plans_in_hand_come_before_files(write):
    write({SHAPE.key: MEASURED})
    mine = ConvPlan("fused", 16, 16, 16, 2, 1, 2)
    with tuning.override({SHAPE: mine}):
        assert plan(SHAPE, H100) == mine
        assert plan(SHAPE, H100, splittable=False).splits == 1
        with tuning.override({SHAPE: replace(mine, form="library")}):
            assert plan(SHAPE, H100).form == "library"
            assert plan(SHAPE, H100, form="fused").block_m == 32
        assert plan(SHAPE, H100) == mine
    assert plan(SHAPE, H100).block_m == 32


def test_the_default_place(tmp_path, monkeypatch, write):
    written = write({SHAPE.key: MEASURED})
    monkeypatch.delenv("DDPM_PLANS")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    tuning.forget()
    assert tuning.plans_path(H100.name) is None
    assert plan(SHAPE, H100).source == "rule"
    path = tuning.default_path(H100.name)
    assert path == tmp_path / ".cache" / "fused-ddpm" / "plans" / "NVIDIA-H100-80GB-HBM3.json"
    path.parent.mkdir(parents=True)
    written.rename(path)
    tuning.forget()
    assert plan(SHAPE, H100).source == str(path)


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_PLANS", str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match=r"nothing\.json is no file of plans: .*No such file"):
        plan(SHAPE, H100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no file of plans: .*; run `ddpm tune`"),
        ("[]", "must be a file of plans with schema 2; found None; run `ddpm tune` again"),
        ('{"schema": 1}', "must be a file of plans with schema 2; found 1; run `ddpm tune` again"),
        ('{"schema": 2, "plans": {}}', "must name its gpu and its plans"),
        ('{"schema": 2, "gpu": "a", "plans": []}', "must name its gpu and its plans"),
    ],
)
def test_files_it_refuses(content, message, write):
    path = write({})
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        plan(SHAPE, H100)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "best"}, "form must be one of fused, apply, library; found 'best'"),
        ({"block_m": 48}, "block_m must be a power of two, at least 16; found 48"),
        ({"block_n": 2}, "block_n must be a power of two, at least 4; found 2"),
        ({"num_warps": 3}, "num_warps must be a power of two, at least 1; found 3"),
        ({"splits": 0}, "splits must be a number, at least 1; found 0"),
        ({"num_stages": 2.0}, r"num_stages must be a number, at least 1; found 2\.0"),
        ({"num_stages": True}, "num_stages must be a number, at least 1; found True"),
        ({"more": 1}, "must have form, block_m, .*; found"),
        ({"block_m": 512, "block_n": 256, "splits": 1}, r"needs \d+ bytes of shared memory, and NVIDIA H100 .* has"),
        ({"splits": 40}, "splits K in 40, and K has 36 blocks"),
    ],
)
def test_plans_it_refuses(change, message, write):
    path = write({SHAPE.key: MEASURED | change})
    with pytest.raises(ValueError, match=message) as error:
        plan(SHAPE, H100)
    assert str(error.value).startswith(f"{path}: the plan of {SHAPE.key!r}")


def test_k_of_too_many_tiles_is_not_split(write):
    shape = layer(1, 256, 128, 128)
    write({shape.key: MEASURED})
    with pytest.raises(ValueError, match="splits K of more than 1024 tiles; set splits to 1"):
        plan(shape, H100)
