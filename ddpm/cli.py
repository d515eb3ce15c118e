"""The command `ddpm`: sample a checkpoint, say what it is, write it for diffusers, or tune its layers to a GPU."""

from __future__ import annotations

import re
import sys
import time
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ddpm.rules import SamplingRules
    from ddpm.sampler import Sampler

DEMO = Path(str(files("ddpm") / "assets" / "emoji32-smileys"))
PICTURE = click.Path(exists=True, dir_okay=False, path_type=Path)
GIF_FRAMES = 60
GIF_IMAGES = 16


def parse_ranges(what: str, text: str) -> list[int]:
    """ "0-63,100" -> [0, 1, ..., 63, 100].

    Raises:
        ValueError: not of that form, or a range that runs backwards.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not re.fullmatch(r"[0-9]+(-[0-9]+)?", part.strip()):
            raise ValueError(
                f"{what} {text!r}: {part.strip()!r} is neither a number nor a range; write for example 0-63,100"
            )
        start, stop = int(first), int(last) if dash else int(first)
        if stop - start > 10**8:
            raise ValueError(f"{what} {text!r}: {part.strip()} are {stop - start + 1:,} images; write smaller ranges")
        if stop < start:
            raise ValueError(f"{what} {text!r}: the range {part.strip()} runs backwards; write {stop}-{start}")
        numbers.extend(range(start, stop + 1))
    return numbers


def parse_seeds(text: str) -> list[int]:
    """Ranges without repetition.

    Raises:
        ValueError: see `parse_ranges`; or a seed is named twice.
    """
    seeds = parse_ranges("seeds", text)
    duplicates = len(seeds) - len(set(seeds))
    if duplicates:
        raise ValueError(
            f"seeds {text!r} names {duplicates} seeds twice, which would be the same images; name each once"
        )
    return seeds


def parse_labels(text: str) -> int | list[int]:
    """One class for all images ("3"), or one per image ("0-9,207").

    Raises:
        ValueError: not of that form.
    """
    return int(text) if text.strip().isdecimal() else parse_ranges("labels", text)


def parse_resample(text: str) -> int | tuple[int, int]:
    """ "10" -> 10 passes; "10x5" -> 10 passes over parts of 5 steps.

    Raises:
        ValueError: not of that form.
    """
    if not re.fullmatch(r"[0-9]+(x[0-9]+)?", text):
        raise ValueError(f"resample {text!r} is no number of passes; write for example 10, or 10x5")
    passes, _, jump = text.partition("x")
    return (int(passes), int(jump)) if jump else int(passes)


class OneSentence(click.Group):
    """Turns the errors that users cause into one sentence and exit code 2, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:  # before the first batch; click itself would exit with 1
            click.echo("interrupted", err=True)
            ctx.exit(130)


@click.group(cls=OneSentence, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fused-ddpm", prog_name="ddpm")
def main() -> None:
    """Sample DDPM checkpoints fast, with the images that the original code draws."""


def loader_options(command: Any) -> Any:
    for option in (
        click.option("--variant", metavar="NAME", help="Variant of the weight files, such as fp16."),
        click.option("--scheduler-class", metavar="CLASS", help="Read the scheduler's settings as this class."),
        click.option("--revision", metavar="REV", help="Revision of a hub id."),
        click.option(
            "-o",
            "--option",
            "options",
            metavar="NAME=VALUE",
            multiple=True,
            help="What the file does not say, such as image_size=64; an error names what is needed. Repeatable.",
        ),
    ):
        command = option(command)
    return command


def checkpoint_options(command: Any) -> Any:
    command = loader_options(click.argument("checkpoint", required=False, default=None)(command))
    for option in (
        click.option(
            "--device", metavar="DEVICE", default="auto", show_default=True, help="auto, cpu, cuda or cuda:i."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "fp32", "tf32", "fp16", "bf16"]),
            default="auto",
            show_default=True,
            help="Precision of the network.",
        ),
    ):
        command = option(command)
    return command


def _load(
    checkpoint: str | None,
    device: str,
    dtype: str,
    compile: str = "auto",
    options: tuple[str, ...] = (),
    **family_options: Any,
) -> Sampler:
    import ddpm
    from ddpm.checkpoints.options import parse_options

    choice: bool | str = {"on": True, "off": False}.get(compile, compile)
    given = {name: value for name, value in family_options.items() if value is not None}
    return ddpm.load(checkpoint or DEMO, device=device, dtype=dtype, compile=choice, **(given | parse_options(options)))


@main.command()
@checkpoint_options
@click.option("--seeds", metavar="SEEDS", default="0-15", show_default=True, help="Seeds, such as 0-63,100.")
@click.option(
    "--steps",
    metavar="STEPS",
    help="Steps of the chain, or a respacing string (10,10,10 or ddim50); the checkpoint's own by default.",
)
@click.option("--spacing", metavar="NAME", help="Timestep spacing, such as trailing; the checkpoint's own by default.")
@click.option("--sampler", "kind", type=click.Choice(["ddpm", "ddim"]), help="The checkpoint's own by default.")
@click.option("--eta", type=float, help="Noise of DDIM, 0 to 1.")
@click.option("--labels", metavar="LABELS", help="Classes, such as 3 for all images, or 0-9,207: one per seed.")
@click.option(
    "--low-res",
    type=PICTURE,
    help="Picture to enlarge, for a super-resolution checkpoint.",
)
@click.option("--guidance-scale", type=float, help="Classifier-free guidance, with --null-label; 1 is none.")
@click.option("--null-label", type=int, help="The class that the training used for 'no class'.")
@click.option("--image", type=PICTURE, help="Picture to paint in (with --mask) or to start from (with --strength).")
@click.option("--mask", type=PICTURE, help="White where the picture is known and kept, black where it is painted.")
@click.option(
    "--resample",
    metavar="PASSES[xJUMP]",
    help="RePaint: walk each part of the chain so many times, such as 10, or 10x5: parts of 5 steps instead of 10.",
)
@click.option("--strength", type=float, help="SDEdit: how much of the chain is walked from the picture, 0 to 1.")
@click.option("--batch-size", type=int, help="Images per pass; by available memory by default.")
@click.option(
    "--compile",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="torch.compile the step; auto: where the run is long enough to repay it.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("samples"), show_default=True, help="Directory to write to."
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["png", "npz"]),
    default="png",
    show_default=True,
    help="Of the images.",
)
@click.option("--grid", is_flag=True, help="Also write grid.png, all images in one.")
@click.option(
    "--gif", is_flag=True, help="Also write denoising.gif: the guess of x_0 as the chain proceeds, first images."
)
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
def sample(
    checkpoint: str | None,
    seeds: str,
    steps: str | None,
    spacing: str | None,
    kind: str | None,
    eta: float | None,
    labels: str | None,
    low_res: Path | None,
    guidance_scale: float | None,
    null_label: int | None,
    image: Path | None,
    mask: Path | None,
    resample: str | None,
    strength: float | None,
    batch_size: int | None,
    compile: str,
    out: Path,
    file_format: str,
    grid: bool,
    gif: bool,
    quiet: bool,
    **load_options: Any,
) -> None:
    """Draw one image per seed from CHECKPOINT: a directory of diffusers, a weight file, or a hub id; else the demo.

    Images are named by seed (000042.png), or gathered in samples.npz (arr_0, seeds). An interrupted run keeps the
    batches that it finished.
    """
    import numpy as np
    import torch

    from ddpm import images as files_of

    seed_list = parse_seeds(seeds)
    started = time.perf_counter()
    sampler = _load(checkpoint, compile=compile, **load_options)
    rounding = sampler.checkpoint.uint8_rounding
    animation = Animation(rounding) if gif else None
    stream = sampler.stream(
        len(seed_list),
        seeds=seed_list,
        steps=int(steps) if steps is not None and re.fullmatch(r"-?[0-9]+", steps) else steps,
        spacing=spacing,
        sampler=kind,
        eta=eta,
        labels=None if labels is None else parse_labels(labels),
        low_res=None if low_res is None else files_of.load_picture(low_res, sampler.image_shape[0]),
        guidance_scale=guidance_scale,
        null_label=null_label,
        image=None if image is None else fitting(image, files_of.load_picture(image, sampler.image_shape[0]), sampler),
        mask=None if mask is None else fitting(mask, files_of.load_mask(mask), sampler),
        resample=None if resample is None else parse_resample(resample),
        strength=strength,
        batch_size=batch_size,
        progress=not quiet,
        callback=animation,
    )
    files_of.check_writable(out)

    finished: list[np.ndarray] = []
    done: list[int] = []
    stopped: BaseException | None = None  # what was finished is written before it is reported
    try:
        for batch in stream:
            batch_seeds = seed_list[batch.start : batch.start + len(batch.images)]
            pictures = files_of.to_uint8(batch.images, rounding)
            if file_format == "png":
                for seed, picture in zip(batch_seeds, pictures, strict=True):
                    files_of.save_png(picture, out / f"{seed:06d}.png")
            if grid or file_format == "npz":
                finished.append(pictures)
            done += batch_seeds
    except (KeyboardInterrupt, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        stopped = error
    if finished:
        together = np.concatenate(finished)
        if file_format == "npz":
            files_of.save_npz(together, done, out / "samples.npz")
        if grid:
            files_of.save_png(files_of.make_grid(together, scale=grid_scale(together)), out / "grid.png")
    if animation is not None and done:
        files_of.save_gif(animation.frames, out / "denoising.gif")
    if stopped is not None:
        kept = f"{len(done)} of {len(seed_list)} images are finished in {out}/"
        if isinstance(stopped, KeyboardInterrupt):
            click.echo(f"interrupted: {kept}", err=True)
            sys.exit(130)
        memory = isinstance(stopped, (MemoryError, torch.OutOfMemoryError))
        reason = "out of memory; pass a smaller --batch-size" if memory else stopped
        click.echo(f"error: {reason}; {kept}", err=True)
        sys.exit(1)
    if not quiet:
        seconds = time.perf_counter() - started
        click.echo(f"{len(done)} images in {seconds:.1f} s, loading included: {out}/")


def fitting(path: Path, pixels: Tensor, sampler: Sampler) -> Tensor:
    """The picture [..., H, W], which has the size of the checkpoint's images.

    Raises:
        ValueError: another size.
    """
    height, width = sampler.checkpoint.sample_size
    if pixels.shape[-2:] != (height, width):
        found = f"{pixels.shape[-1]} x {pixels.shape[-2]} pixels"
        raise ValueError(f"{path} has {found}; expected {width} x {height}, the checkpoint's; resize it first")
    return pixels


def grid_scale(images: np.ndarray) -> int:
    """Small images are enlarged until a tile has about 64 pixels."""
    return max(1, 64 // images.shape[2])


class Animation:
    """Collects frames of the first batch's x_0 previews as grids, GIF_FRAMES or a few more of them.

    Called as the sampler's callback(step, timestep, x0_preview).
    """

    def __init__(self, rounding: str):
        self.rounding = rounding
        self.kept: list[np.ndarray] = []
        self.last: np.ndarray | None = None
        self.stride = 1
        self.complete = False

    def __call__(self, step: int, timestep: int, x0_preview: Any) -> None:
        from ddpm.images import make_grid, to_uint8

        if step == 0 and self.last is not None:
            self.complete = True  # the second batch begins
        if self.complete:
            return
        pictures = to_uint8(x0_preview[:GIF_IMAGES], self.rounding)
        self.last = make_grid(pictures, scale=grid_scale(pictures))
        if step % self.stride == 0:
            self.kept.append(self.last)
        if len(self.kept) >= 2 * GIF_FRAMES:  # a long chain never holds more than this many frames
            self.kept = self.kept[::2]
            self.stride *= 2

    @property
    def frames(self) -> list[np.ndarray]:
        """Evenly spaced, with the last step's at the end: at least GIF_FRAMES of a longer chain, at most twice that."""
        if self.last is None or self.kept[-1] is self.last:
            return self.kept
        return [*self.kept, self.last]


@main.command()
@checkpoint_options
@click.option("--explain", is_flag=True, help="Also print, layer by layer, which code runs.")
@click.option("--batch", type=click.IntRange(min=1), default=1, help="Images per pass, for --explain.")
def info(checkpoint: str | None, explain: bool, batch: int, **load_options: Any) -> None:
    """Say what CHECKPOINT is: architecture, schedule, sampling rules, and where each of them was found."""
    sampler = _load(checkpoint, **load_options)
    click.echo(describe(sampler))
    if explain:
        click.echo("\n" + sampler.explain(batch))


def describe(sampler: Sampler) -> str:
    """The text of `ddpm info`."""
    checkpoint = sampler.checkpoint
    config, schedule, rules = checkpoint.network.config, checkpoint.schedule, checkpoint.rules
    parameters = sum(p.numel() for p in checkpoint.network.parameters())
    channels, height, width = sampler.image_shape
    clip = {"none": "none", "clamp": f"clamp to +-{rules.clip_range:g}"}.get(
        rules.clip, f"dynamic threshold, quantile {rules.threshold_ratio:g}, at most {rules.threshold_max:g}"
    )
    betas = schedule.betas
    lines = [
        ("checkpoint", f"{checkpoint.source} ({checkpoint.family})"),
        ("images", f"{channels} x {height} x {width}, bytes by {checkpoint.uint8_rounding.replace('_', ' ')}"),
        ("network", f"U-Net, {parameters:,} parameters in {len(checkpoint.network.state_dict())} tensors"),
        *(("", line) for line in config.summary),
        ("", f"{sampler.gflop_per_image():.2f} GFLOP per image and step"),
        ("schedule", f"T {schedule.num_train_timesteps}, betas {betas[0]:.4g} .. {betas[-1]:.4g} ({betas.dtype})"),
        ("sampling", f"{_sampler(rules)} by default, as {rules.convention} does; predicts {rules.prediction_type}"),
        ("", f"DDPM: variance {rules.variance_type}, clip: {clip}, spacing {rules.timestep_spacing}{_offset(rules)}"),
        (
            "",
            f"DDIM: eta {rules.eta:g}, {rules.ddim_epsilon} epsilon, clip: {_ddim_clip(rules, clip)}, "
            f"spacing {rules.spacing_of('ddim')}{_ddim_steps(rules)}",
        ),
        ("runs on", f"{sampler.device}, {sampler.dtype}"),
    ]
    for name in ("found", "inferred", "assumed", "given", "ignored"):
        lines += [(name if i == 0 else "", entry) for i, entry in enumerate(getattr(checkpoint.report, name))]
    return "\n".join(f"{name:<11}{value}" for name, value in lines)


def _sampler(rules: SamplingRules) -> str:
    if rules.short_sampler in (None, rules.sampler):
        return rules.sampler.upper()
    return f"{rules.sampler.upper()} over all T steps, {rules.short_sampler.upper()} over fewer,"


def _offset(rules: SamplingRules) -> str:
    return f", offset {rules.steps_offset}" if rules.steps_offset else ""


def _ddim_clip(rules: SamplingRules, clip: str) -> str:
    return clip if rules.clip_of("ddim") == rules.clip else rules.clip_of("ddim")


def _ddim_steps(rules: SamplingRules) -> str:
    return f", {rules.ddim_steps} steps" if rules.ddim_steps else ""


@main.command()
@click.argument("source", metavar="SRC")
@click.argument("directory", metavar="DST", type=click.Path(path_type=Path))
@loader_options
def convert(source: str, directory: Path, options: tuple[str, ...], **family_options: Any) -> None:
    """Write the checkpoint SRC as a pipeline directory of diffusers, DST; of any family but lucidrains'.

    DST is new, or an empty directory. What diffusers cannot express is refused; what it does otherwise is printed.
    """
    from ddpm.checkpoints import load_checkpoint
    from ddpm.checkpoints.export import save_diffusers
    from ddpm.checkpoints.options import parse_options

    given = {name: value for name, value in family_options.items() if value is not None}
    checkpoint = load_checkpoint(source, **(given | parse_options(options)))
    lines = [("written", f"{directory}/"), *(("note", note) for note in save_diffusers(checkpoint, directory))]
    click.echo("\n".join(f"{name:<11}{value}" for name, value in lines))


@main.command()
@checkpoint_options
@click.option("--batch", metavar="SIZES", default="1", show_default=True, help="Batch sizes, such as 1,16.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File to write; by default the one that is read for this GPU, beside whose other plans these are put.",
)
def tune(checkpoint: str | None, batch: str, out: Path | None, **load_options: Any) -> None:
    """Measure on this GPU how each convolution of CHECKPOINT runs fastest, and keep the plans for later runs.

    An interrupted run keeps the plans that it finished. `ddpm info --explain` shows which layers follow a file.
    """
    from tqdm import tqdm

    from ddpm.fused import FusedLucidrains, FusedUNet
    from ddpm.kernels import backend, tuning
    from ddpm.loop import network_settings
    from ddpm.tune import save
    from ddpm.tune import tune as measure

    batches = list(dict.fromkeys(parse_ranges("batch", batch)))
    if min(batches) < 1:
        raise ValueError(f"batch {batch!r}: expected positive integers, such as 1,16")
    sampler = _load(checkpoint, **load_options)
    if sampler.device.type != "cuda":
        raise ValueError(f"tune measures on a GPU, and this sampler is on {sampler.device}; pass --device cuda")
    gpu = backend.target(sampler.device).name
    path = out or tuning.plans_path(gpu) or tuning.default_path(gpu)
    network = sampler.network
    assert isinstance(network, (FusedUNet, FusedLucidrains))  # what a checkpoint is loaded as
    tf32 = sampler.dtype == "tf32"
    save(path, gpu, {})  # a path that cannot be written is better known before measuring
    try:
        for size in batches:
            results = measure(
                network,
                size,
                *sampler.checkpoint.sample_size,
                sampler.device,
                tf32=tf32,
                progress=partial(tqdm, desc=f"batch {size}", unit="layer"),
            )
            for shape, timings in results:
                with network_settings(sampler.device, tf32):  # keys say which float32 was measured
                    if timings[0].failure is None:
                        save(path, gpu, {shape: timings[0].plan})
                    tqdm.write(report_line(shape.key, timings))
    finally:  # each shape is saved as it is finished, so an interrupted run has a file too
        read = tuning.plans_path(gpu)
        is_read = read is not None and read.resolve() == path.resolve()
        click.echo(f"{path}" if is_read else f"{path}; runs with DDPM_PLANS={path.resolve()} follow it")


def report_line(key: str, timings: list[Any]) -> str:
    """A shape's fastest plan, and how many of its candidates failed."""
    failed = [t.failure for t in timings if t.failure is not None]
    note = f"; {len(failed)} of {len(timings)} candidates failed, the first: {failed[0]}" if failed else ""
    first = timings[0]
    if first.failure is not None:
        return f"{key}: no candidate ran{note}"
    p = first.plan
    return f"{key}: {first.microseconds:.1f} us, {p.form} {p.block_m}x{p.block_n}x{p.block_k} / {p.splits}{note}"
