"""The figures of a page, each a pure function of what was measured.

Ours are drawn in the accent colour or with solid lines, everyone else in grey or with broken ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bench.page import Figure, Style
from bench.report import shortened
from bench.rows import Row, is_ours, is_timed, time_to
from bench.tables import number

DrawPanel = Callable[[Axes, Style], None]

BAR_IN = 0.235  # inches of height per bar
IMAGES = 100_000
DURATIONS = {
    1e-3: "1 ms",
    1e-2: "10 ms",
    1e-1: "100 ms",
    1: "1 s",
    10: "10 s",
    60: "1 min",
    600: "10 min",
    3600: "1 h",
    36_000: "10 h",
    345_600: "4 d",
    3_456_000: "40 d",
    34_560_000: "400 d",
}


@dataclass(frozen=True)
class Reading:
    """One measurement of a series: median and quintiles of ms per step at x."""

    series: str
    x: float
    ms: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Fit:
    """ms = factor * x ** exponent."""

    series: str
    factor: float
    exponent: float


def _draw_nothing(canvas: Canvas, style: Style) -> None:
    canvas.set_size_inches(style.width, 0.6)
    canvas.text(0.5, 0.5, "no row is finished", ha="center", va="center", color=style.theme.muted)


NOTHING = Figure(alt="No row is finished.", caption="", draw=_draw_nothing)


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """By the values of these fields, in file order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def step_time(rows: Sequence[Row]) -> Figure:
    """Bars of ms per step with whiskers from p20 to p80, a panel for each checkpoint, precision and batch size."""
    if not rows:
        return NOTHING
    groups = grouped(rows, "checkpoint", "dtype", "batch")
    return Figure(
        alt="Bars of the milliseconds per step of every variant, which the table of speed lists.",
        caption="Wall-clock time of one step of the whole batch: median, and whiskers from the 20th to the 80th "
        "percentile of the rounds. Ours are coloured. The thin line is the limit that this machine's measured rates "
        "leave, where it is known.",
        draw=partial(_draw_step_time, groups=groups),
    )


def throughput(rows: Sequence[Row]) -> Figure | None:
    """Image-steps per second against the batch size; None with fewer than two batch sizes."""
    timed = [row for row in rows if is_timed(row)]
    batches = sorted({row["batch"] for row in timed})
    if len(batches) < 2:
        return None
    marks = Marks(row["variant"] for row in rows)

    def draw(axes: Axes, style: Style, group: Sequence[Row]) -> None:
        for (variant,), line in grouped(sorted(group, key=lambda row: row["batch"]), "variant").items():
            rates = [row["image_steps_per_s"] for row in line]
            axes.plot([row["batch"] for row in line], rates, **marks.of(variant, style))
        log_axis(axes.xaxis, batches)
        log_axis(axes.yaxis)
        axes.set_ylabel("image-steps per second")
        axes.set_xlabel("batch [images]")

    panels = _line_panels(timed, draw)
    return Figure(
        alt="Lines of image-steps per second against the batch size, one per variant.",
        caption="Throughput: steps per second times the images of the batch. Higher is better.",
        draw=partial(_draw_lines, panels=panels),
    )


def time_to_images(rows: Sequence[Row]) -> Figure | None:
    """Time from nothing to n images by chains of 1000 steps, at the largest batch of each checkpoint and precision.

    None where no row has a speed.
    """
    timed = [row for row in rows if is_timed(row)]
    largest = {key: max(r["batch"] for r in group) for key, group in grouped(timed, "checkpoint", "dtype").items()}
    shown = [row for row in timed if row["batch"] == largest[row["checkpoint"], row["dtype"]]]
    if not shown:
        return None
    marks = Marks(row["variant"] for row in rows)

    def draw(axes: Axes, style: Style, group: Sequence[Row]) -> None:
        for row in group:
            n = image_counts(row["batch"])
            axes.plot(n, time_to(row, n), **marks.of(row["variant"], style), markevery=0.25)
        log_axis(axes.xaxis, [10**i for i in range(6)])
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(FixedLocator([s for s in DURATIONS if low <= s <= high]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda s, _: DURATIONS[s]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("time from nothing")
        axes.set_xlabel("images")

    return Figure(
        alt="Lines of the time to draw n images, for n from 1 to 100,000, one per variant.",
        caption="Time to load, compile and capture, and then to draw n images by chains of 1000 steps, at the largest "
        "batch size that was measured. Packages are imported before.",
        draw=partial(_draw_lines, panels=_line_panels(shown, draw, "checkpoint", "dtype", "batch")),
    )


def image_counts(batch: int) -> np.ndarray:
    """From 1 to IMAGES: the first and last image of every early chain, then the last ones of some; later steps are
    too small to be seen."""
    early = np.arange(1, 17) * batch
    later = np.geomspace(early[-1], max(early[-1], IMAGES), 30) // batch * batch
    n = np.unique(np.concatenate([early - batch + 1, early, later, [IMAGES]]))
    return n[n <= IMAGES]


def power_law(
    points: Sequence[Reading], fits: Sequence[Fit], x: str, *, y: str = "ms per step", caption: str = ""
) -> Figure:
    """A cost against x on logarithmic axes, with bars from p20 to p80 and the fitted laws.

    Args:
        x, y: the axes, with their units: "batch [images]".
    """
    if not points:
        return NOTHING
    marks = Marks(point.series for point in points)
    exponents = {fit.series: fit for fit in fits}

    def draw(axes: Axes, style: Style) -> None:
        for series in marks.names:
            own = sorted((p for p in points if p.series == series), key=lambda p: p.x)
            xs, ms = np.array([p.x for p in own]), np.array([p.ms for p in own])
            mark = marks.of(series, style)
            spread = [[p.ms - p.p20 for p in own], [p.p80 - p.ms for p in own]]
            fit = exponents.get(series)
            label = series if fit is None else f"{series}, exponent {fit.exponent:.2f}"
            axes.errorbar(xs, ms, spread, **mark | {"linestyle": "none", "label": label}, elinewidth=1, capsize=2)
            if fit is not None:
                axes.plot(xs, fit.factor * xs**fit.exponent, **mark | {"marker": "", "label": "_"})
        every = sorted({p.x for p in points})
        log_axis(axes.xaxis, every if len(every) < 9 else None)
        log_axis(axes.yaxis)
        axes.set_ylabel(y)
        axes.set_xlabel(x)

    return Figure(
        alt=f"Points of {y} against {x}, with fitted power laws.",
        caption=caption or "Median, with bars from the 20th to the 80th percentile, and the fitted power law.",
        draw=partial(_draw_lines, panels=[("", draw)]),
    )


def bars(names: Sequence[str], values: Sequence[float], unit: str, *, top: int = 20, caption: str = "") -> Figure:
    """The `top` largest values, and the sum of the rest in one bar."""
    if not names:
        return NOTHING
    order = sorted(zip(names, values, strict=True), key=lambda pair: -pair[1])
    shown, rest = order[:top], order[top:]
    if rest:
        shown.append((f"{len(rest)} more", sum(value for _, value in rest)))
    total = sum(values)

    def draw(canvas: Canvas, style: Style) -> None:
        above = style.narrow and max(len(name) for name, _ in shown) > 22  # on a phone long names need its width
        pitch = 2 if above else 1
        axes = _grid(canvas, style, 1, 0.8 * pitch * BAR_IN * len(shown) + 0.6)[0]
        for i, (name, value) in enumerate(shown):
            y = pitch * i
            axes.barh(y, value, height=0.7, color=style.theme.rival if i == top else style.theme.accent)
            _label(axes, f"{number(value)}  {value / total:.0%}" if total else number(value), value, y)
            if above:
                _label(axes, shortened(name, 52), 0, y - 0.85)
        names_left = [] if above else [shortened(name, 48) for name, _ in shown]
        _name_bars(axes, style, names_left, pitch * (len(shown) - 1) + 1)
        if above:
            axes.set_ylim(top=-1.5)
        _room_for_labels(axes, style, max(value for _, value in shown))
        axes.set_xlabel(unit)

    return Figure(
        alt=f"Bars of the largest values in {unit}.",
        caption=caption or f"The largest, in {unit}, and their share of the whole.",
        draw=draw,
    )


class Marks:
    """How each name's line looks: no two of one kind share a colour and a marker, so either tells them apart."""

    MARKERS = ("o", "s", "D", "^", "v")
    DASHES = ((5, 2), (2, 1.5), (6, 2, 1, 2), (1, 1.5), (8, 2))

    def __init__(self, names: Iterable[str]):
        self.names = list(dict.fromkeys(names))

    def of(self, name: str, style: Style) -> dict[str, Any]:
        """Keywords of Axes.plot."""
        ours = is_ours(name)
        i = [other for other in self.names if is_ours(other) == ours].index(name) % len(self.MARKERS)
        theme = style.theme
        colours = theme.hues if ours else (theme.ink, theme.rival, *theme.hues[2:])
        look = {"label": name, "color": colours[i], "marker": self.MARKERS[i], "markersize": 4.5}
        if ours:
            return look | {"linewidth": 1.6, "linestyle": "-"}
        return look | {"linewidth": 1.1, "linestyle": (0, self.DASHES[i]), "markerfacecolor": theme.paper}


def log_axis(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """Logarithmic, labelled 1, 10, 100, 1k; with steps between where that leaves few. Called after the drawing."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    if ticks is None:
        low, high = axis.get_view_interval()
        if high < 8 * low:
            ticks = [tick for tick in MaxNLocator(6, steps=(1, 2, 5, 10)).tick_values(low, high) if tick > 0]
        else:
            ticks = LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)).tick_values(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.set_minor_locator(NullLocator())


def short_number(value: float) -> str:
    """10k for 10,000."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _draw_step_time(canvas: Canvas, style: Style, groups: Mapping[tuple[Any, ...], Sequence[Row]]) -> None:
    theme, most = style.theme, max(map(len, groups.values()))
    every = [row for group in groups.values() for row in group]
    grid = _grid(canvas, style, len(groups), BAR_IN * most + 0.6)
    for axes, group in zip(grid, groups.values(), strict=True):
        axes.set_title(_panel_name(group[0], every, ("checkpoint", "dtype", "batch")), color=theme.ink)
        longest = max((max(r["ms_per_step"], r["p80"]) for r in group if is_timed(r)), default=1.0)
        for i, row in enumerate(group):
            if not is_timed(row):
                status = shortened(row["status"], 26 if style.narrow else 34)
                # On paper of its own, for the line of the limit to stay behind it.
                box = {"facecolor": theme.paper, "edgecolor": "none", "pad": 1}
                _label(axes, status, 0, i, color=theme.muted, style="italic", bbox=box)
                continue
            ms, p20, p80 = row["ms_per_step"], row["p20"], row["p80"]
            axes.barh(i, ms, height=0.7, color=theme.accent if is_ours(row["variant"]) else theme.rival)
            axes.errorbar(ms, i, xerr=[[ms - p20], [p80 - ms]], color=theme.ink, linewidth=1, capsize=2)
            _label(axes, number(ms), max(ms, p80), i)
        _name_bars(axes, style, [row["variant"] for row in group], most)
        _room_for_labels(axes, style, longest)
        limit = next((row["limit_ms"] for row in group if row["limit_ms"] is not None), None)
        if limit is not None:
            axes.axvline(limit, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 2)))
            axes.set_title(f"limit {number(limit)}", loc="right", color=theme.muted, fontweight="normal")
    for axes in grid[-1:] if style.narrow else grid[-2:]:  # the lowest of each column
        axes.set_xlabel("ms per step")


def _line_panels(
    rows: Sequence[Row], draw: Callable[[Axes, Style, Sequence[Row]], None], *keys: str
) -> list[tuple[str, DrawPanel]]:
    """Title and drawing of each checkpoint's and precision's panel."""
    return [
        (_panel_name(group[0], rows, keys or ("checkpoint", "dtype")), partial(draw, group=group))
        for group in grouped(rows, "checkpoint", "dtype").values()
    ]


def _draw_lines(canvas: Canvas, style: Style, panels: Sequence[tuple[str, DrawPanel]]) -> None:
    """Panels with one legend, beside them or, on a phone, below."""
    height = 2.7 if style.narrow else 3.4 if len(panels) == 1 else 2.7
    handles: dict[str, Any] = {}
    for axes, (title, draw) in zip(_grid(canvas, style, len(panels), height), panels, strict=True):
        draw(axes, style)
        axes.set_title(title)
        axes.grid(True)
        axes.tick_params(length=0)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if style.narrow:
        columns = 2 if max(map(len, handles)) < 20 else 1
        place = {"loc": "outside lower left", "ncols": columns, "columnspacing": 1.0}
        canvas.set_figheight(canvas.get_figheight() + 0.2 * ceil(len(handles) / columns))
    else:
        place = {"loc": "outside right upper"}
    canvas.legend(list(handles.values()), list(handles), handlelength=3, **place)


def _grid(canvas: Canvas, style: Style, count: int, height: float) -> list[Axes]:
    """So many panels, each so many inches high: two abreast, or one on a phone."""
    columns = 1 if style.narrow else min(2, count)
    lines = ceil(count / columns)
    canvas.set_size_inches(style.width, lines * height + 0.25)
    canvas.get_layout_engine().set(h_pad=0.08, w_pad=0.06)
    every = canvas.subplots(lines, columns, squeeze=False).flatten()
    for spare in every[count:]:
        spare.remove()
    return list(every[:count])


def _panel_name(row: Row, rows: Sequence[Row], keys: Sequence[str]) -> str:
    """What tells the panel from others; the checkpoint only where there are several."""
    several = len({other["checkpoint"] for other in rows}) > 1
    parts = {"checkpoint": row["checkpoint"], "dtype": row["dtype"], "batch": f"batch {row['batch']:,}"}
    return ", ".join(str(parts[key]) for key in keys if key != "checkpoint" or several)


def _name_bars(axes: Axes, style: Style, names: Sequence[str], most: int) -> None:
    """Names at the left, first on top, with room for `most` bars."""
    axes.set_yticks(range(len(names)), names, color=style.theme.ink)
    axes.set_ylim(most - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")


def _label(axes: Axes, text: str, x: float, y: float, **look: Any) -> None:
    """Right of a bar's end."""
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", **look)


def _room_for_labels(axes: Axes, style: Style, longest: float) -> None:
    axes.set_xlim(0, (longest or 1.0) * (1.35 if style.narrow else 1.25))
    axes.locator_params(axis="x", nbins=4)
