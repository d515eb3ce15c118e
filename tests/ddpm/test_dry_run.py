"""The captured step on fake GPUs: what is launched, in which order, from which binaries, without a read by the host."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import ddpm
from ddpm.checkpoints import load_checkpoint
from ddpm.conditioning import Conditions
from ddpm.fused import Convolution, FusedUNet, GroupNormSiLU, RMSNormSiLU, fuse
from ddpm.fused.unet import FusedAttention
from ddpm.kernels.philox import PURPOSE_INITIAL, philox_normal
from ddpm.kernels.reverse_step import NONFINITE_NONE
from ddpm.loop import ChainShape, Loop
from ddpm.lucidrains import LucidrainsConfig, LucidrainsUNet
from ddpm.noise import GeneratorNoise, seeds_to_tensor
from ddpm.rules import SamplingRules
from ddpm.schedule import NoiseSchedule
from ddpm.steps import StepTable, step_table
from ddpm.unet import UNet, UNetConfig
from tests.chains import walk
from tests.dry_cuda import Capture, Dry, HostRead, dry_cuda

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, does not interpret")

DEVICE = torch.device("cuda:0")
SECOND = torch.device("cuda:1")
STEPS = 7  # more than Loop keeps in flight
DEMO = Path(ddpm.__file__).parent / "assets" / "emoji32-smileys"
TINY = {"block_out_channels": (32, 64), "down_attention": (False, True), "up_attention": (True, False)}
CONFIGS = {
    "tiny": UNetConfig(**TINY, norm_num_groups=8, mid_norm_num_groups=8),
    "tiny scale-shift": UNetConfig(**TINY, scale_shift=True, out_channels=6, attention_head_dim=16),
    # guided-diffusion: classes, learned variance, resnets that resample, fixed heads
    "guided": UNetConfig(
        **TINY,
        scale_shift=True,
        out_channels=6,
        attention_heads=4,
        class_embedding="table",
        num_class_embeds=10,
        down_resample=("resnet",) * 2,
        up_resample=("resnet",) * 2,
        time_sinusoid_dim=64,
        time_embedding_dim=128,
    ),
    "super-resolution": UNetConfig(
        **TINY, scale_shift=True, in_channels=6, condition_channels=3, class_embedding="table", num_class_embeds=10
    ),
    "ho": UNetConfig(**TINY, norm_eps=1e-6, freq_shift=1, flip_sin_to_cos=False, downsample_padding=0),
    "lucidrains": LucidrainsConfig(dim=32, dim_mults=(1, 2), full_attention=(False, True), self_condition=True),
    "lucidrains, GroupNorm": LucidrainsConfig(
        dim=32, dim_mults=(1, 2), full_attention=(False, False), norm="group", memory_key_values=0, out_channels=6
    ),
    "cifar10-32": UNetConfig(
        block_out_channels=(128, 256, 256, 256),
        down_attention=(False, True, False, False),
        up_attention=(False, False, True, False),
        downsample_padding=0,
        norm_eps=1e-6,
        freq_shift=1,
        flip_sin_to_cos=False,
    ),
}


@cache
def reference(name: str) -> UNet | LucidrainsUNet:
    """Random weights: their values do not matter here."""
    if name == "demo":
        return load_checkpoint(DEMO).network
    config = CONFIGS[name]
    return LucidrainsUNet(config) if isinstance(config, LucidrainsConfig) else UNet(config)


@cache
def table(variance_type: str, clip: str = "clamp", resample: tuple[int, int] | None = None) -> StepTable:
    betas = torch.linspace(1e-4, 0.02, 1000)
    rules = SamplingRules(variance_type=variance_type, clip=clip, threshold_max=2.0)
    return step_table(NoiseSchedule.from_betas(betas), rules, STEPS, resample=resample)


@dataclass
class DryRun:
    """A chain that was run dry. Attributes: dry; loop; layers: per layer, in order of execution, its launches."""

    dry: Dry
    loop: Loop
    layers: list[list[str]]

    @property
    def capture(self) -> Capture:
        (capture,) = self.dry.captures
        return capture


def dry_run(
    arch: int,
    name: str,
    batch: int,
    size: int,
    dtype: torch.dtype,
    noise: str,
    preview: bool = False,
    *,
    guided: bool = False,
    inpaint: bool = False,
) -> DryRun:
    """Run a chain of STEPS steps as `Sampler` does, with noise from "seeds" or from a CPU "generator".

    An inpainting chain jumps back once, by one step.
    """
    variance_type = "learned_range" if reference(name).config.out_channels == 6 else "fixed_small"
    steps = table(variance_type, resample=(2, STEPS - 1) if inpaint else None)
    fused = fuse(reference(name), dtype)
    shape = ChainShape(
        batch=batch,
        channels=3,
        height=size,
        width=size,
        capacity=1000,
        clip=steps.rules.clip,
        variance=steps.variance,
        threshold_ratio=steps.rules.threshold_ratio,
        threshold_max=steps.rules.threshold_max,
        generator_noise=noise == "generator",
        preview=preview,
        guided=guided,
        inpaint=inpaint,
    )
    layers: list[list[str]] = []
    with dry_cuda(arch) as dry:
        dry.to_fake_cuda(fused)
        for module in layers_of(fused):
            _record_launches(module, dry, layers)
        loop = Loop(fused, shape, DEVICE, compiled=False)
        dry.allow_read(loop.buffers.nonfinite, NONFINITE_NONE)
        buffers = loop.buffers
        conditions = Conditions(
            classes=None if buffers.classes is None else torch.zeros_like(buffers.classes[:batch]),
            null_classes=torch.zeros_like(buffers.classes[batch:]) if guided else None,
            low_res=None if buffers.condition is None else torch.zeros_like(buffers.condition),
            image=torch.zeros_like(buffers.x) if inpaint else None,
            mask=torch.zeros_like(buffers.mask) if inpaint else None,
        )
        if noise == "seeds":
            seeds = seeds_to_tensor(range(batch)).to(DEVICE)
            x = philox_normal(seeds, (3, size, size), 0, PURPOSE_INITIAL)
            first = len(dry.launches)
            images = walk(loop, steps, x, seeds=seeds, conditions=conditions)
        else:
            generator = GeneratorNoise(torch.Generator().manual_seed(0), batch, DEVICE)
            first = len(dry.launches)
            x = generator.draw((batch, 3, size, size)).to(DEVICE)
            images = walk(loop, steps, x, generator=generator, conditions=conditions)
        assert (images.shape, images.dtype, images.device) == ((batch, 3, size, size), torch.float32, DEVICE)
    captured = [launch.name for launch in dry.captures[0].launches]
    # twice to warm up, once to capture, and then nothing but replays
    assert [launch.name for launch in dry.launches[first:]] == 3 * captured
    assert len(layers) % 3 == 0
    return DryRun(dry, loop, layers[: len(layers) // 3])


def layers_of(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Convolutions, each with its norm, and the norms that belong to none."""
    convolutions = [module for module in network.modules() if isinstance(module, Convolution)]
    theirs = {id(convolution.norm) for convolution in convolutions}
    norms = [m for m in network.modules() if isinstance(m, (GroupNormSiLU, RMSNormSiLU)) and id(m) not in theirs]
    return convolutions + norms


def _record_launches(module: torch.nn.Module, dry: Dry, layers: list[list[str]]) -> None:
    start = 0

    def before(*_: object) -> None:
        nonlocal start
        start = len(dry.launches)

    def after(*_: object) -> None:
        layers.append([launch.op for launch in dry.launches[start:]])

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


# A convolution is one launch; its norm may be a pass before it, and many partial statistics are merged behind it. A
# norm of its own is one launch, or two where its statistics are split.
LAYER = re.compile(
    r"(group_norm_apply |(group_norm_silu ){1,2})?conv_kernel( channel_statistics)?"
    r"|group_norm_silu( group_norm_silu)?|rms_norm_silu"
)


def check(run: DryRun) -> None:
    """What holds for every network: one capture, the fused kernels in order, nothing spilled, the counter last."""
    dry, capture = run.dry, run.capture
    assert run.loop.captures == 1
    jumps = 1 if run.loop.shape.inpaint else 0  # back to the start, but for one step
    assert capture.replays == STEPS + jumps * (STEPS - 1)
    assert dry.reads == 1  # the flag of non-finite outputs, at the end
    assert len(run.layers) == len(layers_of(run.loop.network))
    assert all(LAYER.fullmatch(" ".join(ops)) for ops in run.layers), run.layers
    launched = [launch.op for launch in capture.launches]
    assert launched == [op for ops in run.layers for op in ops] + ["reverse_step"]
    assert capture.ops[0] == "index_select"  # the step's row of the time table
    assert capture.ops[-2:] == [capture.launches[-1].name, "add_"]  # the counter moves on behind all its readers
    for launch in dry.launches:
        assert launch.spills == 0, launch
        assert launch.options.get("enable_fp_fusion") is not None, launch  # its default depends on Triton's version


@pytest.mark.parametrize(
    ("arch", "name", "noise"),
    [
        (80, "tiny scale-shift", "seeds"),
        (90, "tiny", "seeds"),
        (90, "tiny scale-shift", "generator"),
        (100, "tiny scale-shift", "seeds"),
    ],
)
def test_a_chain(arch, name, noise):
    dtype = torch.float32 if name == "tiny" else torch.float16
    run = dry_run(arch, name, 3, 16, dtype, noise, preview=noise == "generator")
    check(run)
    assert (run.loop.buffers.seeds is None) == (noise == "generator")


@pytest.mark.parametrize("noise", ["seeds", "generator"])
@pytest.mark.parametrize(("guided", "inpaint"), [(True, False), (False, True), (True, True)])
def test_a_conditioned_chain_is_one_captured_step(guided, inpaint, noise):
    """Guidance and RePaint's jumps add no launch but the doubling of the batch, and no host read."""
    plain, run = (
        dry_run(90, "guided", 2, 16, torch.float16, noise, guided=guided and on, inpaint=inpaint and on)
        for on in (False, True)
    )
    check(run)
    added = len(run.capture.ops) - len(plain.capture.ops)
    assert added == (1 if guided else 0), (run.capture.ops, plain.capture.ops)
    assert len(run.capture.launches) == len(plain.capture.launches)


@pytest.mark.parametrize("name", ["guided", "super-resolution", "ho", "lucidrains", "lucidrains, GroupNorm"])
def test_every_family(name):
    run = dry_run(90, name, 2, 16, torch.float16, "seeds")
    check(run)
    if name in ("guided", "super-resolution"):
        # the label path: one matrix product for all layers, in float32
        assert run.capture.ops.count("linear") + run.capture.ops.count("addmm") == 1, run.capture.ops
    if name == "lucidrains":
        assert run.loop.buffers.condition is run.loop.buffers.x_0


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", ["demo", "cifar10-32"])
def test_the_step_of_real_networks(name, batch):
    run = dry_run(90, name, batch, 32, torch.float16, "seeds")
    check(run)
    # Beside our kernels: the time row, the attentions and the counter. No copy, no cast, no concatenation.
    attentions = sum(isinstance(module, FusedAttention) for module in run.loop.network.modules())
    kernels = {launch.name for launch in run.capture.launches}
    others = [op for op in run.capture.ops if op not in kernels]
    assert len(others) == 2 + attentions, others
    assert others[0] == "index_select"
    assert others[-1] == "add_"
    if batch == 1:  # every norm is in the launch of its convolution
        convolutions = sum(isinstance(module, Convolution) for module in run.loop.network.modules())
        assert len(run.capture.launches) == convolutions + 1


def test_a_second_chain_is_captured_no_more():
    run = dry_run(90, "tiny", 2, 16, torch.float32, "seeds")
    # a later, shorter batch is padded to the captured one
    fused, steps = run.loop.network, table("fixed_small")
    with dry_cuda(90) as dry:
        loop = Loop(fused, run.loop.shape, DEVICE, compiled=False)
        dry.allow_read(loop.buffers.nonfinite, NONFINITE_NONE)
        for n in (2, 1):
            x = torch.zeros(n, 3, 16, 16, device=DEVICE)
            assert len(walk(loop, steps, x, seeds=torch.zeros(n, dtype=torch.int64, device=DEVICE))) == n
    assert len(dry.captures) == loop.captures == 1
    assert loop.capture_s > 0
    assert dry.replays == 2 * STEPS
    assert dry.ranges == ["ddpm prepare", *(f"ddpm step {i}" for i in range(STEPS))] * 2
    assert not dry.open_ranges


def test_a_step_that_is_not_captured():
    """What a profiler of layers runs: the same launches, from Python, at every step."""
    run = dry_run(90, "tiny", 2, 16, torch.float32, "seeds")
    fused, steps = run.loop.network, table("fixed_small")
    with dry_cuda(90) as dry:
        loop = Loop(fused, run.loop.shape, DEVICE, compiled=False, captured=False)
        dry.allow_read(loop.buffers.nonfinite, NONFINITE_NONE)
        walk(
            loop,
            steps,
            torch.zeros(2, 3, 16, 16, device=DEVICE),
            seeds=torch.zeros(2, dtype=torch.int64, device=DEVICE),
        )
    assert dry.captures == []
    assert (loop.captures, loop.capture_s) == (0, None)
    assert [launch.op for launch in dry.launches] == [launch.op for launch in run.capture.launches] * STEPS


def chain_shape(steps: StepTable) -> ChainShape:
    return ChainShape(
        batch=2, channels=3, height=16, width=16, capacity=1000, clip=steps.rules.clip, variance=steps.variance,
        threshold_ratio=0.995, threshold_max=2.0, generator_noise=False, preview=False,
    )  # fmt: skip


def test_a_dynamic_threshold_is_captured_without_a_host_read():
    steps, network = table("fixed_small", "dynamic"), FusedUNet(reference("tiny"))
    with dry_cuda(90) as dry:
        loop = Loop(dry.to_fake_cuda(network), chain_shape(steps), DEVICE, compiled=False)
        dry.allow_read(loop.buffers.nonfinite, NONFINITE_NONE)
        seeds = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        walk(loop, steps, torch.zeros(2, 3, 16, 16, device=DEVICE), seeds=seeds)
    (capture,) = dry.captures
    assert capture.replays == STEPS
    assert dry.reads == 1
    assert "sort" in capture.ops


def test_each_gpu_captures_on_a_stream_of_its_own():
    """Without a stream torch.cuda.graph captures on the GPU that was current first; the other's graph is empty."""
    steps = table("fixed_small")
    networks = {device: FusedUNet(reference("tiny")) for device in (DEVICE, SECOND)}
    with dry_cuda(90, devices=2) as dry:
        for device, network in networks.items():
            dry.to_fake_cuda(network, str(device))
            loop = Loop(network, chain_shape(steps), device, compiled=False)
            dry.allow_read(loop.buffers.nonfinite, NONFINITE_NONE)
            seeds = torch.zeros(2, dtype=torch.int64, device=device)
            walk(loop, steps, torch.zeros(2, 3, 16, 16, device=device), seeds=seeds)
    assert [capture.device for capture in dry.captures] == [0, 1]
    assert [launch.op for launch in dry.captures[1].launches] == [launch.op for launch in dry.captures[0].launches]


def test_a_host_read_in_the_step_is_found(monkeypatch):
    original = FusedUNet.forward

    def forward(self: FusedUNet, *inputs: torch.Tensor) -> torch.Tensor:
        out = original(self, *inputs)
        return out if out.isfinite().all() else out * 0

    monkeypatch.setattr(FusedUNet, "forward", forward)
    with pytest.raises(HostRead):
        dry_run(90, "tiny", 2, 16, torch.float32, "seeds")
