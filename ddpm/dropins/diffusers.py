"""diffusers' DDPMPipeline and DDIMPipeline, answered by our sampler: the same call, the same images, faster."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Generator, Tensor

from ddpm.checks import boolean, one_of, positive_integer
from ddpm.devices import DTYPES, ordinary_modes, resolve_device
from ddpm.dropins.fingerprint import fingerprint
from ddpm.dropins.live import INSTEAD, PIPELINE, network_of, read_checkpoint, read_scheduler, structure
from ddpm.kernels.reverse_step import COLUMNS
from ddpm.loop import check_compile
from ddpm.noise import GeneratorNoise, default_generator
from ddpm.run import Run
from ddpm.sampler import Sampler
from ddpm.steps import StepTable

logger = logging.getLogger("ddpm")

P = TypeVar("P")

ROUNDINGS = ("float32", "own")
# Parameters of the pipelines' calls that are honoured.
ARGUMENTS = {
    *("batch_size", "generator", "eta", "num_inference_steps", "use_clipped_model_output", "output_type", "return_dict")
}


@dataclass(frozen=True)
class Options:
    """Of `accelerate`."""

    dtype: str
    compile: bool | str
    rounding: str


def accelerate(pipe: P, *, dtype: str = "auto", compile: bool | str = "auto", rounding: str = "float32") -> P:
    """A pipeline that draws the images of `pipe`, faster.

    It is of `pipe`'s class and shares its modules and settings: what is changed in one, a scheduler say, is changed in
    both. `pipe` itself works as before. Beside the pipeline's own attributes it has `sampler` (the `ddpm.Sampler` that
    draws), `explain()` and `refresh()`. The network's weights are looked at before every call; where they have changed,
    it is fused anew. A float32 copy of them stays on the CPU.

    Args:
        pipe: DDPMPipeline or DDIMPipeline, with a UNet2DModel and a DDPMScheduler or DDIMScheduler, on the CPU or a
            CUDA GPU. It may have been loaded, trained or modified.
        dtype: of the network, as in `ddpm.load`; "auto" is the pipeline's own ("fp32" for float32: torch itself lets
            convolutions on a GPU use TF32 there, which "tf32" is).
        compile: as in `ddpm.load`.
        rounding: of the step. "float32" keeps what a half-precision pipeline rounds away; "own" rounds every operation
            to the pipeline's dtype, as the pipeline does: the same bits for the same network output, but for DDIM steps
            with clipped or converted epsilon, which are computed in another order here.

    Raises:
        ValueError: another object, or something about it that would not be repeated; one sentence that names it.
    """
    plain = pipe._plain if isinstance(pipe, Accelerated) else type(pipe)
    _check_pipeline(plain)
    one_of("dtype", dtype, ("auto", *DTYPES))
    one_of("rounding", rounding, ROUNDINGS)
    check_compile(compile)
    for name in ("sampler", "explain", "refresh"):
        if not isinstance(pipe, Accelerated) and hasattr(pipe, name):
            raise ValueError(f"pipe has an attribute {name} of its own, which an accelerated pipeline uses; rename it")
    accelerated = _blank(plain, Options(dtype, compile, rounding))
    accelerated.__dict__ = pipe.__dict__
    accelerated.refresh()
    return accelerated


def _check_pipeline(kind: Any) -> None:
    """Raise ValueError where this is no class whose call is known."""
    try:
        from diffusers import DDIMPipeline, DDPMPipeline
    except ImportError as error:
        raise ValueError(
            f"pipe is a {kind.__name__}, and diffusers is not installed; expected its pipelines"
        ) from error
    expected = "expected a DDPMPipeline or a DDIMPipeline of diffusers"
    if not issubclass(kind, (DDPMPipeline, DDIMPipeline)):
        raise ValueError(f"pipe is a {kind.__name__}; {expected}")
    if kind.__call__ not in (DDPMPipeline.__call__, DDIMPipeline.__call__):
        raise ValueError(f"pipe is a {kind.__name__}, whose __call__ is its own and would not be repeated; {expected}")


class Accelerated:
    """What an accelerated pipeline does otherwise than its own class.

    Its state lies in slots, since its __dict__ is the pipeline's. It is made at the first use: a copy, or what
    from_pretrained returns, has none yet.

    Its class has the pipeline's own one as `_plain`, and the arguments of `accelerate` as `_options`.
    """

    __slots__ = ("_lock", "_sampler", "_seen")
    _plain: ClassVar[Any]
    _options: ClassVar[Options]
    _lock: Any
    _sampler: Sampler
    _seen: tuple[Any, ...]
    # The pipeline's:
    unet: Any
    scheduler: Any
    _execution_device: torch.device
    progress_bar: Any
    numpy_to_pil: Any
    maybe_free_model_hooks: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self._lock = threading.RLock()  # a call reads the scheduler and sets its timesteps: threads take turns
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self._plain, self._options), self.__dict__

    @property
    def sampler(self) -> Sampler:
        """A sampler for the network and the scheduler as they are now; it stays as it is."""
        with self._lock:
            return copy.copy(self._current())

    def _current(self) -> Sampler:
        """The sampler of this call."""
        seen = self._look()
        if getattr(self, "_seen", None) != seen:
            if hasattr(self, "_seen"):
                logger.info("%s's unet has changed: it is fused again", PIPELINE)
            self._fuse(seen)
        schedule, rules = read_scheduler(self.scheduler)
        self._sampler.checkpoint = replace(self._sampler.checkpoint, schedule=schedule, rules=rules)
        return self._sampler

    def refresh(self) -> None:
        """Fuse the network again, whether it has changed or not."""
        self._fuse(self._look())

    def explain(self) -> str:
        """What runs where, layer by layer."""
        return f"rounding of the step: {self._rounding()}\n{self.sampler.explain()}"

    def _look(self) -> tuple[Any, ...]:
        """Everything that a sampler is made from, to be compared."""
        unet = network_of(self)
        device = self._execution_device
        if device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"{PIPELINE} runs on {device}; expected the CPU or a CUDA GPU; move it with pipe.to('cuda')"
            )
        if unet.dtype not in DTYPES.values():
            raise ValueError(f"{PIPELINE}'s unet is {unet.dtype}; convert it with pipe.to(torch.float32)")
        contents = fingerprint({name: t for name, t in unet.state_dict().items() if not t.is_meta})
        return resolve_device(device), unet.dtype, dict(unet.config), structure(unet), contents

    def _fuse(self, seen: tuple[Any, ...]) -> None:
        device, own, *_ = seen
        self._rounding()
        dtype = self._options.dtype
        if dtype == "auto":
            dtype = next(name for name, kind in DTYPES.items() if kind == own)
        with ordinary_modes(device):
            checkpoint = read_checkpoint(network_of(self), self.scheduler)
            self._sampler = Sampler(checkpoint, device=device, dtype=dtype, compile=self._options.compile)
        self._seen = seen

    def _rounding(self) -> str:
        """The step's, as `Run` has it."""
        if self._options.rounding == "float32":
            return "float32"
        dtype = self.unet.dtype
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"rounding='own' repeats the rounding of a half-precision pipeline, and {PIPELINE}'s unet is {dtype}; "
                "leave it out"
            )
        return str(dtype).removeprefix("torch.")

    def _draw(self, arguments: dict[str, Any]) -> Any:
        """The pipeline's call, its arguments bound and complete."""
        from diffusers import ImagePipelineOutput

        output_type, return_dict = arguments["output_type"], boolean("return_dict", arguments["return_dict"])
        if output_type != "pt" and self.unet.dtype == torch.bfloat16:
            raise ValueError(
                f"output_type={output_type!r} needs NumPy, which has no bfloat16; take output_type='pt', or convert "
                "the pipeline with pipe.to(torch.float32)"
            )
        with self._lock:
            images: Any = self._images(self._run(arguments))
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _images(self, run: Run) -> Tensor:
        """[n, C, H, W] in [0, 1], in the pipeline's dtype, where it runs."""
        x = run.final()
        with torch.no_grad():
            return (x.to(self.unet.dtype) / 2 + 0.5).clamp(0, 1)

    def _run(self, arguments: dict[str, Any]) -> Run:
        """The checked request."""
        n = positive_integer("batch_size", arguments["batch_size"])
        steps = positive_integer("num_inference_steps", arguments["num_inference_steps"])
        clipped = arguments.get("use_clipped_model_output")
        if clipped is not None:
            boolean("use_clipped_model_output", clipped)
        of_ddim = "eta" in arguments  # the call is DDIMPipeline's
        sampler, scheduler = self._current(), self.scheduler
        if of_ddim and sampler.checkpoint.rules.sampler != "ddim":
            raise ValueError(
                f"{PIPELINE}'s scheduler is a {type(scheduler).__name__}, which takes no eta, but "
                f"{self._plain.__name__} passes one; use a DDIMScheduler, or a DDPMPipeline"
            )
        generator = _generator(arguments["generator"], n, sampler.device, any_length=not of_ddim)
        scheduler.set_timesteps(steps)
        options = {"eta": arguments["eta"], "ddim_epsilon": "rederived" if clipped else "raw"} if of_ddim else {}
        run = sampler.plan(n, steps=steps, generator=generator, batch_size=n, progress=self.progress_bar, **options)
        _check_timesteps(scheduler.timesteps.tolist(), run.table.timesteps.tolist())
        own, rounding = self.unet.dtype, self._rounding()
        table = run.table
        if rounding != "float32" and sampler.device.type == "cpu":
            table = _with_rounded_factors(table, own)
        return replace(run, table=table, source=GeneratorNoise(generator, n, sampler.device, own), rounding=rounding)


def _with_rounded_factors(table: StepTable, dtype: torch.dtype) -> StepTable:
    """On the CPU, torch rounds a float32 number to the dtype of the tensor that it multiplies, if it is written first.

    diffusers writes all but divisors and logarithms so. On a GPU such a number stays float32.
    """
    columns = [COLUMNS.index(name) for name in ("kx", "ke", "c0", "cx", "ce", "s")]
    coefficients = table.coefficients.clone()
    coefficients[:, columns] = coefficients[:, columns].to(dtype).float()
    return replace(table, coefficients=coefficients)


def _check_timesteps(theirs: list[int], ours: list[int]) -> None:
    """Raise ValueError where this diffusers has a spacing of its own; say which step is left out on purpose."""
    if theirs == [*ours, -1]:
        logger.warning(
            "%s's scheduler ends with a step at timestep -1, which is left out: it reads the schedule from its noisy "
            "end and ruins the image",
            PIPELINE,
        )
    elif theirs != ours:
        raise ValueError(
            f"{PIPELINE}'s scheduler walks {len(theirs)} timesteps, {theirs[:3]} ...; expected {len(ours)}, {ours[:3]} "
            "...; this version of diffusers spaces them in a way that ddpm does not know"
        )


def _generator(generator: Any, n: int, device: torch.device, *, any_length: bool) -> Generator | list[Generator]:
    """What the n images are drawn from, as the pipelines read their argument.

    Args:
        any_length: DDPMPipeline takes the first n of a longer list, and a list of one for all images; DDIMPipeline
            wants n.

    Raises:
        ValueError: no such thing, or a list too short.
    """
    if generator is None:
        return default_generator(device)
    if isinstance(generator, Generator):
        return generator
    if not isinstance(generator, list) or not all(isinstance(g, Generator) for g in generator):
        found = type(generator).__name__
        raise ValueError(f"generator must be a torch.Generator, a list of them, or None; got {generator!r}, a {found}")
    if any_length and len(generator) == 1:
        return generator[0]
    chosen = generator[:n] if any_length else generator
    if len(chosen) != n:
        raise ValueError(f"generator has {len(generator)} entries for batch_size={n}; give one, or one per image")
    return chosen


@functools.cache
def _accelerated_class(plain: type, options: Options) -> type:
    """A subclass of both, under the pipeline's own name, by which diffusers saves it."""
    signature = inspect.signature(plain.__call__)

    @functools.wraps(plain.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        for name, parameter in [*signature.parameters.items()][1:]:
            value, default = bound.arguments[name], parameter.default
            unchanged = value is default or (type(value) is type(default) and value == default)
            if name not in ARGUMENTS and not unchanged:
                raise ValueError(f"{name}={value!r} is an argument that ddpm does not know; leave it out, {INSTEAD}")
        return self._draw(bound.arguments)

    namespace = {
        "__call__": __call__,
        "__doc__": plain.__doc__,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "_plain": plain,
        "_options": options,
    }
    return type(plain.__name__, (Accelerated, plain), namespace)


def _blank(plain: type, options: Options) -> Any:
    """An accelerated pipeline without modules, which whoever calls this gives it."""
    kind: Any = _accelerated_class(plain, options)
    return kind.__new__(kind)
