"""The page of a run, and the figures of every page, from contents as `python -m bench` writes them."""

from __future__ import annotations

import base64
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Canvas

from bench.figures import Fit, Reading, bars, power_law, step_time, throughput, time_to_images
from bench.page import DARK, LIGHT, STYLES, Column, Figure, Page, Section, Style, Table, render, svg, write_page
from bench.rows import BOUNDS, FIELDS, SCHEMA, VERSION, Row, add_rates, time_to
from bench.run_page import overtakes, repayments
from bench.run_page import page as run_page
from bench.variants import MEANINGS

ENVIRONMENT = {
    "torch": "2.13.0+cpu",
    "triton": "3.9.0",
    "diffusers": "0.42.1",
    "openvino": "2026.4.1",
    "python": "3.11.7",
    "platform": "Linux-6.18-x86_64-with-glibc2.36",
    "cpu": "AMD EPYC",
    "threads": 2,
    "device": "cpu",
    "gpu": None,
    "gpu_state": {"sm_clock_mhz": None, "power_w": None},
    "commit": "df06fabfaed5c5f65fecb0658d9d049dff377133",
    "uncommitted_changes": False,
    "date": "2026-11-24T22:43:20+00:00",
}
# ms/step at batches 1 and 4, and seconds to load and to compile.
ON_CPU = {
    "ours-eager": (109.2, 352.1, 0.4, 0.2),
    "ours-compiled": (52.08, 190.6, 0.4, 113.0),
    "diffusers": (117.6, 334.5, 1.1, 0.1),
    "diffusers-compiled": (83.91, 285.0, 1.1, 48.3),
    "openvino": (68.82, 275.2, 5.9, 2.0),
}
# ms/step at batches 1, 16 and 256, seconds to load, to compile and to capture, and launches per step.
ON_GPU = {
    "ours-graph": (1.21, 3.92, 48.7, 0.6, 0.4, 0.31, 212),
    "ours-planned": (0.84, 3.11, 41.2, 0.6, 1.9, 0.22, 118),
    "ours-planned-compiled": (0.79, 2.87, 37.9, 0.6, 38.0, 0.21, 97),
    "ours-graph-compiled": (0.92, 3.18, 40.3, 0.6, 41.0, 0.24, 131),
    "diffusers": (14.9, 15.2, 61.8, 4.1, 0.5, None, 391),
    "diffusers-compiled": (5.12, 6.03, 45.1, 4.1, 52.0, None, 174),
    "diffusers-max-autotune": (1.63, 3.71, 42.6, 4.1, 212.0, None, 160),
    "pytorch": (11.3, 11.8, 55.2, 0.6, 0.4, None, 371),
}


def make_row(variant: str, dtype: str, batch: int, ms: float | None, **other: Any) -> Row:
    """A finished row, with what follows from ms per step."""
    row = dict.fromkeys(FIELDS) | {
        "checkpoint": "cifar10-32 (random weights)",
        "variant": variant,
        "dtype": dtype,
        "batch": batch,
        "steps": 10,
        "rounds": 3 if ms else 0,
        "status": "ok",
        "samples_ms": [0.97 * ms, ms, 1.06 * ms] if ms else [],
        "bound": BOUNDS[dtype],
    }
    if ms:
        row |= {"ms_per_step": ms, "p20": 0.98 * ms, "p80": 1.03 * ms, "load_s": 0.0, "compile_s": 0.0}
        row |= {"max_abs_diff": 2.15e-6 if dtype == "fp32" else 0.0123}
    row |= other
    add_rates(row)
    return row


def cpu_content() -> dict[str, Any]:
    rows = []
    for i, batch in enumerate((1, 4)):
        for variant, (*ms, load, compiled) in ON_CPU.items():
            times = {"load_s": load, "compile_s": compiled}
            limits = {"tflops": 12.1 * batch / ms[i], "limit_ms": 40.2 * batch, "share_of_limit": 40.2 * batch / ms[i]}
            speedup = ON_CPU["diffusers"][i] / ms[i]
            rows.append(
                make_row(variant, "fp32", batch, ms[i], speedup=speedup, peak_memory_mb=811.0, **times, **limits)
            )
        wrong = {"status": "numerics differ", "max_abs_diff": 0.31}
        rows.append(make_row("pytorch", "fp32", batch, None, **wrong))
        rows.append(make_row("diffusers-max-autotune", "fp32", batch, None, status="skipped: out of time"))
    return {
        "schema": VERSION,
        "kind": "run",
        "rows": rows,
        "ceilings": [{"dtype": "fp32", "matmul_tflops": 0.302, "conv_tflops": 0.31, "copy_gb_per_s": 17.2}],
        "not_measured": ["Energy, clocks and launches: no GPU is in use."],
        "environment": ENVIRONMENT,
    }


def gpu_content() -> dict[str, Any]:
    rows = []
    for dtype, faster in (("fp32", 1.0), ("fp16", 0.52)):
        for i, batch in enumerate((1, 16, 256)):
            for variant, (*times, load, compiled, capture, launches) in ON_GPU.items():
                ms = times[i] * faster
                if variant == "pytorch" and batch == 256:
                    status = "skipped: OutOfMemoryError: CUDA out of memory. Tried to allocate 9.12 GiB"
                    rows.append(make_row(variant, dtype, batch, None, status=status))
                    continue
                rows.append(
                    make_row(
                        variant,
                        dtype,
                        batch,
                        ms,
                        speedup=ON_GPU["diffusers"][i] * faster / ms,
                        load_s=load,
                        compile_s=compiled,
                        capture_s=capture,
                        peak_memory_mb=1210.0 + 31 * batch,
                        launches_per_step=launches,
                        tflops=12.1 * batch / ms / 1000,
                        limit_ms=0.11 * faster * batch,
                        share_of_limit=0.11 * faster * batch / ms,
                        energy_j_per_image=0.45 * ms / batch * 1000,
                        energy_window_s=1.3,
                        sm_clock_mhz=1980,
                        memory_clock_mhz=2619,
                        power_w=454.2,
                        power_limit_w=700.0,
                        temperature_c=52,
                        throttling="none",
                    )
                )
    gpu = {"gpu": "NVIDIA H100 80GB HBM3", "device": "cuda:0", "torch": "2.13.0+cu130", "driver": "580.82"}
    tests = {"passed": 412, "failed": 1, "skipped": 3, "failures": ["test_kernel[fp16]"], "not_collected": []}
    return {
        "schema": VERSION,
        "kind": "gpu",
        "rows": rows,
        "ceilings": [
            {"dtype": "fp32", "matmul_tflops": 51.8, "conv_tflops": 48.0, "copy_gb_per_s": 2710.0},
            {"dtype": "fp16", "matmul_tflops": 712.0, "conv_tflops": 540.0, "copy_gb_per_s": 2710.0},
        ],
        "not_measured": [],
        "environment": ENVIRONMENT | gpu,
        "tests": tests | {"problem": None},
    }


def laws() -> Figure:
    points, fits = [], []
    for series, factor, exponent in (("ours-compiled", 7.1, 0.93), ("diffusers", 30.0, 0.74)):
        for batch in (1, 2, 4, 8, 16, 32):
            ms = factor * batch**exponent * (1 + 0.03 * (batch % 3))
            points.append(Reading(series, batch, ms, 0.9 * ms, 1.2 * ms))
        fits.append(Fit(series, factor, exponent))
    return power_law(points, fits, "batch [images]")


def kernels(count: int = 40) -> Figure:
    return bars(
        [f"triton_convolution_{i}x3_fused_group_norm" for i in range(count)], [9 / (i + 1) for i in range(count)], "ms"
    )


@pytest.fixture(scope="module", params=[cpu_content, gpu_content])
def content(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param()


@pytest.fixture(scope="module")
def html(content: dict[str, Any]) -> str:
    return render(run_page(content))


def lines(html: str) -> list[list[str]]:
    """Cells of every row of every table's body."""
    body = re.findall(r"<tr>\s*<th scope=row.*?</tr>", html, re.S)
    return [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in body]


def test_contents_are_as_the_schema_says(content: dict[str, Any]) -> None:
    pytest.importorskip("jsonschema").validate(content, SCHEMA)


def test_every_row_is_there(content: dict[str, Any], html: str) -> None:
    speeds = lines(html)[: len(content["rows"])]
    for row, cells in zip(content["rows"], speeds, strict=True):
        assert cells[:3] == [row["variant"], row["dtype"], str(row["batch"])]
        assert cells[-1] == row["status"]
        assert (cells[3] == "-") == (row["ms_per_step"] is None)


def test_headlines() -> None:
    assert run_page(cpu_content()).lead == (
        "ours-compiled takes 52.1 ms a step in fp32 at batch 1, 2.26 times as fast as the stock diffusers pipeline and "
        "1.32 times as fast as openvino, the fastest of the others; x_0 is within 2.2e-6 of the reference's.",
        "ours-compiled takes 191 ms a step in fp32 at batch 4, 1.75 times as fast as the stock diffusers pipeline and "
        "1.44 times as fast as openvino, the fastest of the others; x_0 is within 2.2e-6 of the reference's.",
    )


def test_a_headline_needs_no_rival_in_the_same_comparison() -> None:
    """`bench gpu` times one key twice, with other variants each time: then no speedup is in the row."""
    rows = [make_row("diffusers", "fp16", 1, 10.0, speedup=1.0), make_row("ours-planned-compiled", "fp16", 1, 2.0)]
    (sentence,) = run_page(gpu_content() | {"rows": rows}).lead
    assert "5.00 times as fast as the stock diffusers pipeline" in sentence


def test_nothing_is_loaded(html: str) -> None:
    assert re.findall(r"(?:src|srcset|href)=\"(?!data:|#)[^\"]*", html) == []
    assert not re.search(r"<script|https?://|url\(|@import", html)


def test_a_picture_has_four_forms(content: dict[str, Any], html: str) -> None:
    pictures = re.findall(r"<picture>.*?</picture>", html, re.S)
    assert len(pictures) == sum(len(section.figures) for section in run_page(content).sections) == 3
    for picture in pictures:
        found = [base64.b64decode(text).decode() for text in re.findall(r"svg\+xml;base64,([^\"]*)", picture)]
        assert len(set(found)) == len(found) == 4
        assert len(set(re.findall('media="(.*?)"', picture))) == 3
        assert re.search('alt="[^"]+"', picture)


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    path = write_page(tmp_path / "new" / "run.html", Page("Nothing", (), ()))
    assert path.read_text() == render(Page("Nothing", (), ()))
    assert [file.name for file in path.parent.iterdir()] == ["run.html"]


def test_the_same_figure_gives_the_same_bytes() -> None:
    first, second = (svg(step_time(cpu_content()["rows"]), STYLES[0]) for _ in range(2))
    assert first == second


def test_columns_without_a_value_are_left_out(content: dict[str, Any]) -> None:
    page = run_page(content)
    shown = {column.title for section in page.sections for table in section.tables for column in table.columns}
    for key in {*FIELDS} - {"checkpoint", "samples_ms"}:
        assert (FIELDS[key]["title"] in shown) == any(row[key] is not None for row in content["rows"]), key
    headings = [section.heading for section in page.sections]
    assert ("State of the GPU" in headings) == (content["kind"] == "gpu")
    for sentence in content["not_measured"]:
        assert sentence in next(section for section in page.sections if section.heading == "Not measured").points


def test_glossary_is_the_schema(content: dict[str, Any], html: str) -> None:
    glossary = {unescape(k): unescape(v) for k, v in re.findall(r"<dt[^>]*>(.*?)</dt>\n<dd>(.*?)</dd>", html)}
    ceiling = SCHEMA["$defs"]["ceiling"]["properties"]
    assert glossary.pop("matrix product TFLOP/s") == ceiling["matmul_tflops"]["description"]
    assert glossary.pop("convolution TFLOP/s") == ceiling["conv_tflops"]["description"]
    assert glossary.pop("copy GB/s") == ceiling["copy_gb_per_s"]["description"]
    described = {field["title"]: field["description"] for field in FIELDS.values()}
    assert len(described) == len(FIELDS)
    assert glossary.items() <= described.items()
    # Every link of a column leads to its entry.
    assert set(re.findall('href="#(.*?)"', html)) == set(re.findall('<dt id="(.*?)"', html))


def test_the_content_comes_along(content: dict[str, Any], html: str) -> None:
    (carried,) = re.findall(r'download="bench.json" href="data:application/json;base64,([^"]*)"', html)
    assert json.loads(base64.b64decode(carried)) == content
    assert run_page(content, "gpu.json").download[0] == "gpu.json"


def test_variants_are_explained(content: dict[str, Any]) -> None:
    (section,) = [section for section in run_page(content).sections if section.heading == "The variants"]
    assert {*section.tables[0].rows} == {(row["variant"], MEANINGS[row["variant"]]) for row in content["rows"]}


def test_names_are_escaped() -> None:
    content = cpu_content()
    for row in content["rows"]:
        row["checkpoint"] = "<script>$x_1$ & \"'"
        row["status"] += "<b>"
    html = render(run_page(content))
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;$x_1$ &amp; &#34;&#39;" in html


def test_no_row_is_finished() -> None:
    page = run_page(cpu_content() | {"rows": []})
    assert page.lead == ("No row is finished.",)
    assert page.sections[0].figures[0].alt == "No row is finished."
    render(page)


def test_no_row_is_timed() -> None:
    content = cpu_content()
    content["rows"] = [row for row in content["rows"] if row["ms_per_step"] is None]
    page = run_page(content)
    assert page.lead == ("No row is finished.",)
    assert sum(len(section.figures) for section in page.sections) == 1
    render(page)


def drawn(figure: Figure, style: Style = STYLES[-1]) -> list[Axes]:
    """Its panels."""
    canvas = Canvas(figsize=(style.width, style.width / 2), layout="constrained")
    figure.draw(canvas, style)
    return canvas.axes


def test_bars_are_the_times() -> None:
    """With whiskers from p20 to p80, and a line at the limit."""
    content = cpu_content()
    for panel, batch in zip(drawn(step_time(content["rows"])), (1, 4), strict=True):
        rows = [row for row in content["rows"] if row["batch"] == batch]
        timed = [row for row in rows if row["ms_per_step"]]
        assert [label.get_text() for label in panel.get_yticklabels()] == [row["variant"] for row in rows]
        assert [bar.get_width() for bar in panel.patches] == [row["ms_per_step"] for row in timed]
        ours = [bar.get_facecolor() == to_rgba(LIGHT.accent) for bar in panel.patches]
        assert ours == [row["variant"].startswith("ours") for row in timed]
        whiskers = [segment[:, 0] for lines in panel.collections for segment in lines.get_segments()]
        np.testing.assert_allclose(whiskers, [(row["p20"], row["p80"]) for row in timed])
        assert [*panel.lines[-1].get_xdata()] == [rows[0]["limit_ms"]] * 2
        for row in rows[len(timed) :]:
            assert row["status"] in {text.get_text() for text in panel.texts}


def test_lines_are_the_rates_and_the_times() -> None:
    rows = gpu_content()["rows"]
    for panel, dtype in zip(drawn(throughput(rows)), ("fp32", "fp16"), strict=True):
        for line in panel.lines:
            own = [row for row in rows if (row["variant"], row["dtype"]) == (line.get_label(), dtype)]
            expected = [(row["batch"], row["image_steps_per_s"]) for row in own if row["ms_per_step"]]
            np.testing.assert_allclose(line.get_xydata(), expected)
    for panel, dtype in zip(drawn(time_to_images(rows)), ("fp32", "fp16"), strict=True):
        for line in panel.lines:
            (row,) = [r for r in rows if (r["variant"], r["dtype"], r["batch"]) == (line.get_label(), dtype, 256)]
            assert line.get_xydata()[0] == pytest.approx([1, row["first_image_s"]])
            assert line.get_xydata()[-1] == pytest.approx([100_000, time_to(row, 100_000)])


def test_laws_go_through_their_points() -> None:
    (panel,) = drawn(laws())
    fits = [line.get_xydata() for line in panel.lines if line.get_label() == "_"]
    for fit, (factor, exponent) in zip(fits, ((7.1, 0.93), (30.0, 0.74)), strict=True):
        np.testing.assert_allclose(fit[:, 1], factor * fit[:, 0] ** exponent)
    labels = [text.get_text() for text in panel.figure.legends[0].get_texts()]
    assert labels == ["ours-compiled, exponent 0.93", "diffusers, exponent 0.74"]


def test_the_rest_is_one_bar() -> None:
    (panel,) = drawn(kernels(40))
    widths = [bar.get_width() for bar in panel.patches]
    assert widths[:20] == [9 / (i + 1) for i in range(20)]
    assert widths[20:] == [pytest.approx(sum(9 / (i + 1) for i in range(20, 40)))]
    assert panel.get_yticklabels()[-1].get_text() == "20 more"


def test_figures_of_nothing() -> None:
    assert throughput([]) is None
    assert time_to_images([]) is None
    assert throughput([row for row in cpu_content()["rows"] if row["batch"] == 1]) is None
    for figure in (step_time([]), power_law([], [], "batch [images]"), bars([], [], "ms"), bars(["a"], [0.0], "ms")):
        assert svg(figure, STYLES[0]).startswith("<?xml")


def test_pages_of_other_kinds() -> None:
    table = Table((Column("kernel"), Column("ms", True, "time of a step")), (("<conv>", "1.2"),))
    page = Page(
        "Profile", ("Half of it is convolutions.",), (Section("Kernels", figures=(kernels(), laws()), tables=(table,)),)
    )
    html = render(page)
    assert "&lt;conv&gt;" in html
    assert "time of a step" in html
    assert html.count("<picture>") == 2


def test_repayments() -> None:
    rows = gpu_content()["rows"]
    (table,) = repayments(rows)
    assert [column.title for column in table.columns][:3] == ["variant", "fp32, batch 1", "fp32, batch 16"]
    cells = {name: found for name, *found in table.rows}
    assert set(cells["diffusers"]) == {"baseline"}
    assert cells["ours-planned-compiled"][:3] == ["3", "33", "257"]
    assert cells["pytorch"][2] == "-"
    (on_cpu,) = repayments(cpu_content()["rows"])
    assert {name: found for name, *found in on_cpu.rows}["ours-eager"] == ["1", "never"]
    assert repayments([row for row in rows if row["variant"].startswith("ours")]) == ()


def test_overtaking() -> None:
    slow = make_row("diffusers", "fp32", 4, 20.0, load_s=1.0, compile_s=0.0)
    fast = make_row("ours-compiled", "fp32", 4, 10.0, load_s=1.0, compile_s=35.0)
    first = overtakes(fast, slow)  # 3.5 chains repay the compilation
    assert first == 13
    assert time_to(fast, first) < time_to(slow, first)
    assert time_to(fast, first - 1) > time_to(slow, first - 1)
    assert overtakes(slow, fast) is None
    assert overtakes(fast | {"compile_s": 30.0}, slow) == 13  # after 3 chains it is a draw
    assert overtakes(fast | {"compile_s": 0.0}, slow) == 1


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_contrast(theme: Any) -> None:
    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for ground in (theme.paper, theme.raised):
        assert min(contrast(ground, colour) for colour in (theme.ink, theme.muted, theme.accent)) >= 4.5
    assert contrast(theme.paper, theme.rival) >= 3
