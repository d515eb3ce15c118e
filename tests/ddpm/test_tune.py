"""`ddpm tune` in Triton's interpreter, with a fake clock: what is measured, what is kept, who follows it."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import ddpm.cli
import ddpm.tune
from ddpm.cli import main, report_line
from ddpm.fused import FusedUNet
from ddpm.kernels import backend, tuning
from ddpm.unet import UNet, UNetConfig
from tests.weights import redraw

CPU = torch.device("cpu")
TINY = {
    "block_out_channels": (16,),
    "down_attention": (True,),
    "up_attention": (False,),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_norm_num_groups": 8,
}


@pytest.fixture
def network() -> FusedUNet:
    torch.manual_seed(0)
    return FusedUNet(redraw(UNet(UNetConfig(**TINY))).eval().requires_grad_(False))


@pytest.fixture
def plans_file(tmp_path, monkeypatch):
    """The file that plans are read from, not there yet."""
    path = tmp_path / "plans" / "gpu.json"
    monkeypatch.setattr(tuning, "default_path", lambda gpu: path)
    monkeypatch.delenv("DDPM_PLANS", raising=False)
    tuning.forget()
    yield path
    tuning.forget()


@pytest.fixture
def measured(monkeypatch):
    """Two candidates a shape, the second one the faster by a fake clock; names of what was timed."""

    def two(shape, target, splittable=True):
        slow = tuning.plan(shape, target, form="fused")
        return [slow, tuning.ConvPlan("apply" if shape.norm else "fused", 16, 32, 16, 1, 2, 2)]

    def seconds(calls, device):
        timed.append(calls[0][0])
        (plan,) = tuning._overrides.values()
        return len(calls) * (1e-6 if plan.block_m == 16 and plan.num_stages == 2 else 2e-6)

    timed = []
    monkeypatch.setattr(tuning, "candidates", two)
    monkeypatch.setattr(ddpm.tune, "_seconds", seconds)
    monkeypatch.setattr(ddpm.tune, "MOST_COPIES", 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**20))
    return timed


@pytest.mark.interpret
def test_the_fastest_plan_is_kept_and_followed(network, plans_file, measured):
    x, row = torch.randn(1, 3, 4, 4), network.time.table(torch.tensor([7]))
    before = network(x, row)
    target = backend.target(CPU)
    results = dict(ddpm.tune.tune(network, 1, 4, 4, CPU))
    assert set(results) == set(ddpm.tune.layers(network, 1, 4, 4, CPU))
    assert len(measured) == 2 * len(results)
    for timings in results.values():
        assert [t.failure for t in timings] == [None, None]
        assert [t.microseconds for t in timings] == pytest.approx([1.0, 2.0])
    assert not tuning._overrides

    ddpm.tune.save(plans_file, target.name, {shape: timings[0].plan for shape, timings in results.items()})
    for shape in results:
        plan = tuning.plan(shape, target)
        assert plan.source == str(plans_file)
        assert (plan.block_m, plan.num_stages) == (16, 2)
    lines = network.explain(CPU, 1, 4, 4)
    convolutions = [line.path for line in lines if "Triton kernel conv " in line.path]
    assert len(convolutions) == 16
    assert [path for path in convolutions if str(plans_file) not in path] == []
    after = network(x, row)
    assert (after - before).abs().max() <= 5e-5 * before.square().mean().sqrt()


@pytest.mark.interpret
def test_a_candidate_that_fails_or_is_wrong_is_reported_and_not_taken(network, measured, monkeypatch):
    original = ddpm.tune.Convolution.forward

    def forward(self, x, **options):
        plan = next(iter(tuning._overrides.values()), None)
        if plan is not None and plan.num_stages == 2:  # what would be the fastest
            if self.kernel == 1:
                raise RuntimeError("no such instruction")
            y = original(self, x, **options)
            return y._replace(parts=tuple(part + 1 for part in y.parts))
        return original(self, x, **options)

    monkeypatch.setattr(ddpm.tune.Convolution, "forward", forward)
    for shape, timings in ddpm.tune.tune(network, 1, 4, 4, CPU):
        assert timings[0].failure is None
        expected = "RuntimeError: no such instruction" if shape.kernel == 1 else "its result is off by"
        assert expected in timings[1].failure
        assert "1 of 2 candidates failed" in report_line(shape.key, timings)


SHAPES = [tuning.ConvShape(n, 8, 8, 16, 16, 3, 0, True, torch.float32) for n in (1, 2)]
PLAN = tuning.ConvPlan("fused", 64, 32, 16, 1, 4, 3)
RESULTS = [(SHAPES[0], [ddpm.tune.Timing(PLAN, 1.0)])]
GPU = backend.H100.name


def test_files_keep_the_plans_of_other_shapes_and_of_one_gpu(plans_file, monkeypatch):
    for shape, commit in zip(SHAPES, ("first", "second"), strict=True):
        monkeypatch.setattr(ddpm.tune, "provenance", lambda commit=commit: {"versions": {}, "commit": commit})
        ddpm.tune.save(plans_file, "GPU A", {shape: PLAN})
    content = json.loads(plans_file.read_text())
    commits = {key: entry["measured"]["commit"] for key, entry in content["plans"].items()}
    assert commits == {SHAPES[0].key: "first", SHAPES[1].key: "second"}
    assert content["gpu"] == "GPU A"
    assert tuning.load_plans(plans_file)[1][SHAPES[0].key].block_m == PLAN.block_m
    with pytest.raises(ValueError, match="plans for GPU A, and this is GPU B; pass another --out"):
        ddpm.tune.save(plans_file, "GPU B", {SHAPES[0]: PLAN})


def test_provenance_names_versions_and_commit():
    found = ddpm.tune.provenance()
    assert found["versions"]["torch"] is not None
    assert "commit" in found


@pytest.mark.parametrize("content", ["{", '{"schema": 1, "gpu": "GPU A", "plans": {}}', b"\xff"])
def test_what_cannot_be_used_is_kept_aside(content, plans_file):
    plans_file.parent.mkdir()
    content = content.encode() if isinstance(content, str) else content
    for aside in ("gpu.json.old", "gpu.json.old1"):
        plans_file.write_bytes(content)
        with pytest.warns(UserWarning, match=rf"gpu\.json is damaged or of another schema: .*{aside}, "):
            ddpm.tune.save(plans_file, GPU, {SHAPES[0]: PLAN})
        assert plans_file.with_name(aside).read_bytes() == content
        assert list(tuning.load_plans(plans_file)[1]) == [SHAPES[0].key]


def test_what_cannot_be_read_or_written_stays(tmp_path, plans_file):
    with pytest.raises(ValueError, match=r"is no file of plans: .*directory"):
        ddpm.tune.save(tmp_path, GPU, {SHAPES[0]: PLAN})
    plans_file.parent.touch()
    with pytest.raises(ValueError, match=r"cannot write .*gpu\.json \(.*; pass another --out"):
        ddpm.tune.save(plans_file, GPU, {SHAPES[0]: PLAN})
    assert [path.name for path in tmp_path.iterdir()] == ["plans"]


@pytest.mark.interpret
@pytest.mark.parametrize("content", [None, "{", '{"schema": 1}'])
def test_a_file_that_cannot_be_used_does_not_keep_from_measuring(content, network, plans_file, measured, monkeypatch):
    monkeypatch.setenv("DDPM_PLANS", str(plans_file))
    if content is not None:
        plans_file.parent.mkdir()
        plans_file.write_text(content)
    results = ddpm.tune.tune(network, 1, 4, 4, CPU)
    shape, timings = next(results)
    assert [t.failure for t in timings] == [None, None]
    with pytest.raises(ValueError, match=r"gpu\.json"):  # between shapes, files are read as ever
        tuning.plan(shape, backend.target(CPU))


@pytest.mark.interpret
def test_a_layer_too_large_for_the_memory_does_not_end_the_run(network, measured, monkeypatch):
    def materialize(value, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ddpm.tune, "materialize", materialize)
    for _, timings in ddpm.tune.tune(network, 1, 4, 4, CPU):
        assert [t.failure for t in timings] == ["OutOfMemoryError: CUDA out of memory"] * 2


@pytest.fixture
def run(plans_file, monkeypatch):
    """run(*arguments, results=...): the command on a pretended H100, where tune yields the results."""

    def run(*arguments, results=RESULTS):
        monkeypatch.setattr(ddpm.tune, "tune", lambda *_, **__: iter(results))
        return CliRunner().invoke(main, ["tune", *arguments])

    sampler = SimpleNamespace(
        device=torch.device("cuda:0"),
        dtype="tf32",
        network=FusedUNet(UNet(UNetConfig(**TINY))),
        checkpoint=SimpleNamespace(sample_size=(8, 8)),
    )
    monkeypatch.setattr(ddpm.cli, "_load", lambda *_, **__: sampler)
    monkeypatch.setattr(backend, "target", lambda device: backend.H100)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return run


def test_the_command_keeps_tf32_plans_under_their_own_key(run, plans_file):
    result = run()
    assert result.exit_code == 0, result.output
    assert list(json.loads(plans_file.read_text())["plans"]) == ["1x8x8 16->16 3x3 tf32 norm"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("no more"), 2, "error: no more"),
        (RuntimeError("an illegal memory access"), 1, ""),
    ],
)
def test_a_run_that_is_cut_short_keeps_what_it_finished(error, code, message, run, plans_file):
    def results():
        yield from RESULTS
        raise error

    result = run(results=results())
    assert result.exit_code == code
    assert message in result.output
    assert str(plans_file) in result.output
    assert len(json.loads(plans_file.read_text())["plans"]) == 1


def test_the_command_replaces_a_file_that_cannot_be_used(run, plans_file, monkeypatch):
    monkeypatch.setenv("DDPM_PLANS", str(plans_file))
    assert run().exit_code == 0  # not there yet
    plans_file.write_text("{")
    with pytest.warns(UserWarning, match=r"gpu\.json\.old"):
        result = run()
    assert result.exit_code == 0, result.output
    assert len(tuning.load_plans(plans_file)[1]) == 1


def test_the_command_refuses_a_file_of_another_gpu_before_it_measures(run, plans_file):
    def results():
        pytest.fail("measured")
        yield

    ddpm.tune.save(plans_file, "GPU B", {})
    result = run(results=results())
    assert result.exit_code == 2
    assert f"plans for GPU B, and this is {GPU}; pass another --out" in result.output


def test_the_command_says_how_a_file_elsewhere_is_followed(run, plans_file, tmp_path, monkeypatch):
    other = tmp_path / "other.json"
    hint = f"{other}; runs with DDPM_PLANS={other} follow it"
    assert run("--out", str(other)).output.splitlines()[-1] == hint
    assert run("--out", str(plans_file)).output.splitlines()[-1] == str(plans_file)
    assert run().output.splitlines()[-1] == str(plans_file)
    monkeypatch.setenv("DDPM_PLANS", str(other))
    assert run("--out", str(other)).output.splitlines()[-1] == str(other)
    assert run().output.splitlines()[-1] == str(other)


def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(main, ["tune", "--device", "cpu"])
    assert result.exit_code == 2
    assert "tune measures on a GPU, and this sampler is on cpu" in result.output
    result = CliRunner().invoke(main, ["tune", "--device", "cpu", "--batch", "0"])
    assert result.exit_code == 2
    assert "expected positive integers" in result.output
