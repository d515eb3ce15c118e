"""The public face: load a checkpoint, sample it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ddpm import noise as noise_sources
from ddpm.checkpoints import Checkpoint, load_checkpoint
from ddpm.checkpoints.module import Schedule, load_module
from ddpm.checks import boolean, positive_integer
from ddpm.conditioning import (
    Conditions,
    check_guidance,
    check_image,
    check_low_res,
    check_mask,
    check_resample,
    embed_labels,
)
from ddpm.devices import DTYPES, available_memory, ordinary_modes, resolve_device, resolve_dtype
from ddpm.fused import FusedNetwork, ModuleNetwork, fuse
from ddpm.loop import ChainShape, Loop, check_compile, may_compile, network_settings
from ddpm.noise import GeneratorNoise
from ddpm.run import Batch, Callback, NonFiniteError, Progress, Run
from ddpm.steps import step_table

logger = logging.getLogger("ddpm")

# Larger batches than this are no faster, and finish (and report) later.
LARGEST_AUTO_BATCH = {"cpu": 16, "cuda": 256}

# Chain shapes whose loops a sampler keeps: each holds its buffers and, on a GPU, the memory of its captured graph.
KEPT_LOOPS = 4


class SamplingInterrupted(KeyboardInterrupt):
    """Ctrl-C during `Sampler.sample`. Attributes: images, float32 [m, C, H, W], and seeds of the finished batches."""

    def __init__(self, images: Tensor, seeds: list[int] | None):
        super().__init__(f"interrupted with {len(images)} images finished (in .images, with .seeds)")
        self.images, self.seeds = images, seeds


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    compile: bool | str = "auto",
    **family_options: Any,
) -> Sampler:
    """Load a checkpoint and make a sampler for it.

    Args:
        source: a directory that diffusers saved, a weight file of any family (.safetensors, .pt, .pth, .ckpt, .bin), or
            a hub id ("owner/name").
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:i".
        dtype: of the network: "fp32" (IEEE), "tf32" (float32 whose products may use TF32, what torch does to
            convolutions by default), "fp16", "bf16"; "auto" is "fp32". The state, the noise and the step are float32
            always.
        compile: True, False, or "auto": where the run is long enough to repay it.
        family_options: what the file does not say, such as image_size=64; see `ddpm.checkpoints.load_checkpoint`.

    Raises:
        ValueError: one sentence that names the file or the argument, what was expected and what was found.
    """
    return Sampler(load_checkpoint(source, **family_options), device=device, dtype=dtype, compile=compile)


class Sampler:
    """Draws images from a checkpoint. Several samplers may live side by side.

    Attributes:
        checkpoint: what was loaded.
        device, dtype: of the network.
        last_seeds: of the last `sample` call; None if it used a generator.
        lock: held from the beginning to the end of a chain, so that threads take turns.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        compile: bool | str = "auto",
        capture: bool = True,
    ):
        """A sampler of a loaded checkpoint; device, dtype and compile as in `load`.

        Args:
            capture: on a GPU, capture the step in a CUDA graph. False launches it operation by operation, which is
                slower, and what a debugger or a profiler of layers needs.
        """
        self.checkpoint = checkpoint
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.compile = check_compile(compile)
        self.capture = boolean("capture", capture)
        self.last_seeds: list[int] | None = None
        with ordinary_modes(self.device):
            self._network = fuse(checkpoint.network, DTYPES[self.dtype]).to(self.device)
        self.lock = threading.RLock()
        self._loops: dict[tuple[ChainShape, bool], Loop] = {}
        self._storage: Any = None  # where the weights lay that the loops use
        self._gflop_per_image: float | None = None

    @classmethod
    def from_module(
        cls,
        network: nn.Module,
        schedule: Schedule,
        image_shape: Sequence[int],
        *,
        tf32: bool = False,
        compile: bool = False,
        **rules: Any,
    ) -> Sampler:
        """A sampler for a network of one's own, which is used as it is, where it is and in its own dtype.

        Args:
            network: called as network(x, t) with x [N, C, H, W], not to be changed in place, and t int64 [N]; returns
                [N, C, H, W] (2C channels with a learned variance), as a tensor or as the attribute `sample` of what it
                returns. On a GPU it is captured in a CUDA graph: what it computes may not depend on values read back
                from the device. How much memory it takes is not known: give `sample` a batch_size for large networks.
            schedule: betas [T], from which t runs 0 .. T-1; or a `ddpm.schedule.NoiseSchedule`.
            image_shape: (C, H, W).
            tf32: let float32 convolutions and matrix products on a GPU use TF32, torch's own default for convolutions.
            compile: run network and step through torch.compile, which then has to take the network as one graph.
            rules: how it is sampled, such as prediction_type="v_prediction", variance_type="fixed_large", clip="none",
                sampler="ddim"; see `ddpm.rules.SamplingRules`. By default it predicts epsilon, x_0 is clamped to
                [-1, 1] and the variance is "fixed_small".

        Raises:
            ValueError: an argument is no such thing.
        """
        checkpoint = load_module(network, schedule, image_shape, **rules)
        wrapped = checkpoint.network
        assert isinstance(wrapped, ModuleNetwork)
        names = {
            torch.float32: "tf32" if boolean("tf32", tf32) else "fp32",
            torch.float16: "fp16",
            torch.bfloat16: "bf16",
        }
        if wrapped.dtype not in names:
            raise ValueError(f"network is in {wrapped.dtype}; convert it to float32, float16 or bfloat16")
        return cls(checkpoint, device=wrapped.device, dtype=names[wrapped.dtype], compile=boolean("compile", compile))

    @property
    def network(self) -> FusedNetwork:
        """The fused network, on the device."""
        return self._network

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.checkpoint.image_channels, *self.checkpoint.sample_size)

    def sample(
        self,
        n: int = 1,
        *,
        seeds: Iterable[int] | None = None,
        steps: int | str | None = None,
        timesteps: Sequence[int] | None = None,
        spacing: str | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        ddim_epsilon: str | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        noise: Tensor | None = None,
        labels: Any = None,
        guidance_scale: float | None = None,
        null_label: Any = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        resample: int | tuple[int, int] | None = None,
        strength: float | None = None,
        low_res: Tensor | None = None,
        batch_size: int | None = None,
        progress: Progress = True,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw n images.

        Args:
            n: number of images.
            seeds: n integers in 0 .. 2^64 - 1, one noise stream each: an image depends on its seed, not on its batch.
                None draws fresh ones, kept in `last_seeds`.
            steps: length of the chain, 1 .. T, spaced as the checkpoint's family does; or guided-diffusion's respacing
                string ("250", "10,10,10", "ddim50"). None means the family's own length: T, but 50 for diffusers' DDIM.
            timesteps: the chain itself, strictly descending, instead of steps.
            spacing: how `steps` are spaced, one of `ddpm.timesteps.SPACINGS`; None means the checkpoint's own.
            sampler: "ddpm" (ancestral) or "ddim", as the checkpoint's family does it; None means the family's choice.
            eta: of DDIM, 0 (deterministic) to 1; None means the family's own, 0 as a rule.
            ddim_epsilon: DDIM goes on with the network's noise ("raw") or with that which the clipped x_0 implies
                ("rederived", diffusers' use_clipped_model_output); None means the family's way.
            generator: a torch.Generator, or n of them: the noise stream of diffusers' pipelines, call by call. One
                generator draws batch by batch, so `batch_size` is part of the result, as it is there.
            noise: x_T, float32 [n, C, H, W]; then no initial draw is made. With `strength`, what noises the image.
            labels: of a class-conditional network: one class number, or n of them (a network with "identity" class
                embeddings takes them, [n, embedding_dim]).
            guidance_scale: of classifier-free guidance (Ho and Salimans 2022): the network's output is
                null + guidance_scale (conditional - null). 1 and None are none at all.
            null_label: with it, the class that the training used for "no class"; given as `labels` is.
            image: float [n or 1, C, H, W] in [-1, 1], with
            mask: 1 (or True) where the image is known, 0 where it is to be painted, [H, W] or [n or 1, C or 1, H, W]:
                inpainting by RePaint (Lugmayr et al. 2022, algorithm 1). The known region comes back as it was given.
                Or with
            strength: above 0 and up to 1: SDEdit (Meng et al. 2022), the last int(strength steps) steps of the chain,
                from the noised image. With a mask both.
            resample: of inpainting: how often each part of the chain is walked, or (passes, length of such a part); a
                part has 10 steps by default. None is once, without jumps back; the paper has 250 steps and resample=10.
            low_res: of a super-resolution network: the images to enlarge, float [n, C, h, w] in [-1, 1].
            batch_size: images per pass; None chooses by available memory (with one generator: n, as diffusers would).
            progress: show a bar with steps per second; or what makes a bar, called with total=, as tqdm is.
            callback: called as callback(step, timestep, x0_preview) after every step, with the network's current
                guess of x_0, float32 [m, C, H, W] on the CPU.

        Returns:
            float32 [n, C, H, W] in [-1, 1] where the checkpoint clips x_0, on the CPU.

        Raises:
            ValueError: a bad argument.
            SamplingInterrupted: Ctrl-C; carries the finished images.
            NonFiniteError: the network's output was NaN or infinite.
        """
        options = {k: v for k, v in locals().items() if k not in ("self", "n")}
        batches: list[Tensor] = []
        self.last_seeds = None
        finished: list[int] = []
        try:
            for batch in self.stream(n, **options):
                batches.append(batch.images)
                finished += batch.seeds or []
        except KeyboardInterrupt as error:
            raise SamplingInterrupted(_concatenate(batches, self.image_shape), finished or None) from error
        except NonFiniteError as error:
            error.images = _concatenate(batches, self.image_shape)
            raise
        return _concatenate(batches, self.image_shape)

    def stream(self, n: int = 1, **options: Any) -> Iterator[Batch]:
        """Like `sample`, but gives each batch as soon as it is finished. Arguments are checked before the first."""
        return self.plan(n, **options).batches()

    def plan(
        self,
        n: int,
        *,
        seeds: Iterable[int] | None = None,
        steps: int | str | None = None,
        timesteps: Sequence[int] | None = None,
        spacing: str | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        ddim_epsilon: str | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        noise: Tensor | None = None,
        labels: Any = None,
        guidance_scale: float | None = None,
        null_label: Any = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        resample: int | tuple[int, int] | None = None,
        strength: float | None = None,
        low_res: Tensor | None = None,
        batch_size: int | None = None,
        progress: Progress = True,
        callback: Callback | None = None,
        **others: Any,
    ) -> Run:
        """Check a request; the arguments are those of `sample`. Its batches are drawn by `Run.batches`."""
        for name in others:
            raise ValueError(f"sample() has no argument {name!r}")
        positive_integer("n", n)
        if batch_size is not None:
            positive_integer("batch_size", batch_size)
        if seeds is not None and generator is not None:
            raise ValueError("give either seeds or a generator, not both: each defines all of the noise")
        if noise is not None and not isinstance(noise, Tensor):
            raise ValueError(f"noise must be a torch.Tensor; got {type(noise).__name__}")
        if noise is not None and tuple(noise.shape) != (n, *self.image_shape):
            raise ValueError(f"noise has shape {list(noise.shape)}; expected x_T of shape {[n, *self.image_shape]}")
        if image is None:
            for name, value in (("mask", mask), ("strength", strength), ("resample", resample)):
                if value is not None:
                    raise ValueError(f"{name} was given without image=, the image that it is about")
        elif mask is None and strength is None:
            raise ValueError("image needs mask= (to paint the rest of it) or strength= (to start from it)")
        if mask is None and resample is not None:
            raise ValueError("resample belongs to inpainting; pass mask= with it, or leave it out")
        network, checkpoint = self.checkpoint.network, self.checkpoint
        if isinstance(network, ModuleNetwork):
            network.point_out_training()
        guidance, null_classes = check_guidance(network, guidance_scale, null_label, n)
        conditions = Conditions(
            classes=embed_labels(network, labels, n),
            null_classes=null_classes,
            low_res=check_low_res(network, low_res, n, checkpoint.sample_size),
            image=None if image is None else check_image(image, n, self.image_shape),
            mask=None if mask is None else check_mask(mask, n, self.image_shape),
        )
        table = step_table(
            checkpoint.schedule,
            checkpoint.rules,
            steps,
            timesteps,
            spacing,
            sampler,
            eta,
            ddim_epsilon,
            guidance=guidance,
            strength=strength,
            resample=None if mask is None else check_resample(resample),
        )
        source = None if generator is None else GeneratorNoise(generator, n, self.device)
        checked = None
        if source is None:
            checked = noise_sources.fresh_seeds(n) if seeds is None else noise_sources.check_seeds(seeds, n)
            if seeds is None:
                logger.info("seeds: %s", checked)
        self.last_seeds = checked
        if batch_size is None:
            whole = source is not None and len(source.generators) == 1
            batch_size = n if whole else self._auto_batch(n, passes=1 if null_classes is None else 2)
        batch_size = min(batch_size, n)
        return Run(self, n, table, batch_size, checked, source, noise, conditions, progress, callback)

    def _auto_batch(self, n: int, passes: int) -> int:
        """The largest batch that memory allows, evened out over the batches that n needs.

        Args:
            passes: how often the network sees each image at once, 2 with guidance.
        """
        fits = int(0.7 * available_memory(self.device)) // (passes * self._bytes_per_image())
        largest = max(1, min(LARGEST_AUTO_BATCH[self.device.type], fits))
        batches = -(-n // largest)
        return -(-n // batches)

    def _bytes_per_image(self) -> int:
        """An upper estimate of a step's activations."""
        elements = self.checkpoint.network.activation_elements(*self.checkpoint.sample_size)
        return elements * torch.finfo(DTYPES[self.dtype]).bits // 8

    def gflop_per_image(self) -> float:
        """GFLOP of one network evaluation for one image, counted on the reference network without running it."""
        if self._gflop_per_image is None:
            from torch._subclasses.fake_tensor import FakeTensorMode
            from torch.utils.flop_counter import FlopCounterMode

            with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
                self.checkpoint.network(*self.checkpoint.network.example(1, *self.checkpoint.sample_size))
            self._gflop_per_image = counter.get_total_flops() / 1e9
        return self._gflop_per_image

    def loop(self, shape: ChainShape, compiled: bool) -> Loop:
        """The loop for a chain shape, kept with its compilation and capture while it is among the last few used."""
        with self.lock:
            if isinstance(self._network, ModuleNetwork) and self._network.storage != self._storage:
                self._storage = self._network.storage
                self._loops.clear()
            key = (shape, compiled)
            if key in self._loops:
                self._loops[key] = self._loops.pop(key)  # the most recent one is last
            else:
                while len(self._loops) >= KEPT_LOOPS:
                    del self._loops[next(iter(self._loops))]
                tf32 = self.dtype == "tf32"
                self._loops[key] = Loop(
                    self._network,
                    shape,
                    self.device,
                    compiled=compiled,
                    tf32=tf32,
                    captured=self.capture,
                    lock=self.lock,
                )
            return self._loops[key]

    @property
    def loops(self) -> list[Loop]:
        """Every loop made so far, for inspection of compilations and captures."""
        return list(self._loops.values())

    def explain(self, batch_size: int = 1) -> str:
        """What runs where, layer by layer: one line each, the step around the network first.

        Args:
            batch_size: images per pass, by which layers are planned.

        Raises:
            ValueError: batch_size is no positive integer.
        """
        from ddpm.kernels import backend

        batch_size = positive_integer("batch_size", batch_size)
        triton = backend.uses_triton(self.device)
        step = "Triton kernel reverse_step" if triton else "reverse_step_ref (plain PyTorch)"
        captured = self.device.type == "cuda" and self.capture
        graph = "captured in a CUDA graph, replayed once per step" if captured else "run step by step"
        auto = ": only runs that repay it; layers are given as compiled" if self.compile == "auto" else ""
        lines = [
            f"device: {self.device}, dtype: {self.dtype} (state and noise in float32)",
            f"step: {graph}; compile={self.compile}{auto}",
            f"reverse step: {step}; noise: Philox 4x32-10 per seed, or a torch.Generator through a buffer",
        ]
        with network_settings(self.device, self.dtype == "tf32"):  # plans depend on what float32 means
            layers = self._network.explain(
                self.device, batch_size, *self.checkpoint.sample_size, compiled=may_compile(self.compile, self.device)
            )
        width = max(len(layer.layer) for layer in layers)
        return "\n".join(lines + [f"{layer.layer:<{width}}  {layer.path}" for layer in layers])


def _concatenate(batches: list[Tensor], image_shape: tuple[int, int, int]) -> Tensor:
    return torch.cat(batches) if batches else torch.empty(0, *image_shape)
