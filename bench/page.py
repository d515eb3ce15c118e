"""A page of results: one HTML file that needs no network and no script, with figures for every screen and for print."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

from ddpm.files import write_whole

TEMPLATES = Path(__file__).with_name("templates")
NARROW_PX = 640


@dataclass(frozen=True)
class Theme:
    """Colours, #rrggbb: text keeps WCAG AA's 4.5:1 on `paper` and `raised`, bars keep 3:1.

    Attributes:
        paper, raised: the page, and what lies on it.
        ink, muted, line: text, lesser text, and rules.
        accent, rival: ours, and everyone else's.
        hues: of lines, from Okabe and Ito's palette, which the colour-blind can tell apart.
    """

    paper: str
    raised: str
    ink: str
    muted: str
    line: str
    accent: str
    rival: str
    hues: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    raised="#f5f6f8",
    ink="#1a1d21",
    muted="#565e68",
    line="#d7dbe0",
    accent="#0072b2",
    rival="#868f99",
    hues=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"),
)
DARK = Theme(
    paper="#14171a",
    raised="#1e2226",
    ink="#e8eaed",
    muted="#a7afb8",
    line="#383e45",
    accent="#56b4e9",
    rival="#7d8690",
    hues=("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442"),
)


@dataclass(frozen=True)
class Style:
    """What a figure is drawn for: a theme, on a desktop (or paper) or on a phone."""

    theme: Theme
    narrow: bool

    @property
    def width(self) -> float:
        """Inches; a phone shows the narrow ones at about their own size, where 9 points are 12 pixels."""
        return 3.75 if self.narrow else 8.4

    @property
    def media(self) -> str:
        """The CSS media query that picks it; paper is always light."""
        dark = ["screen and (prefers-color-scheme: dark)"] if self.theme is DARK else []
        narrow = [f"(max-width: {NARROW_PX}px)"] if self.narrow else []
        return " and ".join(dark + narrow)


# The browser takes the first whose query holds, so the last has none.
STYLES = tuple(Style(theme, narrow) for theme, narrow in product((DARK, LIGHT), (True, False)))


@dataclass(frozen=True)
class Figure:
    """Drawn once for each of STYLES.

    Attributes:
        alt: what it shows, for those who do not see it.
        caption: below it.
        draw: draws onto an empty matplotlib figure of the style's width, and sets its height.
    """

    alt: str
    caption: str
    draw: Callable[[Canvas, Style], None]


@dataclass(frozen=True)
class Column:
    """Numbers are aligned to the right; a description goes to the page's glossary."""

    title: str
    number: bool = False
    description: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names its row and stays in sight."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, then paragraphs, a list of points, figures and tables, in this order."""

    heading: str
    text: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Page:
    """
    Attributes:
        lead: sentences that say what was found.
        download: name and text of a JSON file that the page carries.
    """

    title: str
    lead: tuple[str, ...]
    sections: tuple[Section, ...]
    download: tuple[str, str] | None = None


def write_page(path: Path, page: Page) -> Path:
    """Written whole or not at all; the same page always gives the same bytes."""
    html = render(page).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(html))
    return path


def render(page: Page) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"data_uri": data_uri, "anchor": anchor}
    glossary = {c.title: c.description for s in page.sections for t in s.tables for c in t.columns if c.description}
    template = environment.get_template("page.html")
    return template.render(
        page=page, glossary=glossary, light=LIGHT, dark=DARK, styles=STYLES, svg=svg, narrow_px=NARROW_PX
    )


def anchor(title: str) -> str:
    """The id of a column in the glossary."""
    return "column-" + "-".join(title.split())


def data_uri(content: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.encode()).decode()}"


def svg(figure: Figure, style: Style) -> str:
    """The figure's SVG text: glyphs are paths and ids are hashes of a fixed salt, so it is the same everywhere."""
    theme = style.theme
    settings: dict[Any, Any] = {
        "svg.fonttype": "path",
        "svg.hashsalt": "bench",
        "text.parse_math": False,  # names come from files
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what a user's matplotlibrc says
        matplotlib.rcParams.update(settings)
        canvas = Canvas(figsize=(style.width, style.width / 2), layout="constrained", facecolor="none")
        figure.draw(canvas, style)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(canvas).print_svg(file, metadata=metadata)
    return file.getvalue()
