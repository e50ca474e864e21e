"""The results on one page: a table, loss curves, surfaces, slices; as HTML that needs nothing else, and as PNG."""

import base64
import html
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sdfserver.compare.choices import PLAIN
from sdfserver.compare.run import SLICE_PX, Comparison, Result, files_in
from sdfserver.files import replacing
from sdfserver.preview import picture
from sdfserver.reconstruct import report_json

SURFACE_PX = 240
SHEET_COLUMNS = 5
CHART = (960, 380)
MARGIN = (60, 14, 14, 40)
"""Of a chart: left, top, right, bottom."""
DASH = (12.0, 7.0)
"""Lengths of a dash and of a gap, in the picture before it is made smaller."""
STEEPEST = 2.0
"""|grad phi| that has the last colour of a slice; 1 is white."""
_BLUE, _RED = np.array([33.0, 102.0, 172.0]), np.array([178.0, 24.0, 43.0])
_STRONG = {"siren": "#0b5cad", "snake": "#1b8a4b", "sine": "#b8480a"}
"""Colours of the networks of sines; the others are told apart by hue, and by dashes where they have an encoding."""


def write_page(comparison: Comparison, folder: Path) -> None:
    """Write index.html, compare.png and results.json into `folder`. Raises OutputError."""
    page, sheet, figures = files_in(folder)
    views = [_views(result, comparison.up) for result in comparison.results]
    with replacing(figures) as stream:
        stream.write(report_json(comparison.figures()))
    with replacing(sheet) as stream:
        sheet_of(comparison, views).save(stream, "PNG", optimize=True)
    with replacing(page) as stream:
        stream.write(page_of(comparison, views).encode())


Views = tuple[Image.Image, Image.Image]
"""A surface and a slice."""


def _views(result: Result, up: int) -> Views:
    surface = Image.new("RGB", (SURFACE_PX, SURFACE_PX), "white")
    if result.mesh is not None:
        drawn = Image.fromarray(picture(result.mesh, SURFACE_PX, up=up))
        surface.paste(drawn, (0, 0), drawn)
    else:
        ImageDraw.Draw(surface).text((SURFACE_PX // 2, SURFACE_PX // 2), "no surface", "#888", _font(14), "mm")
    return surface, Image.fromarray(slice_picture(result.steepness, result.phi))


def slice_picture(steepness: NDArray[np.float32], phi: NDArray[np.float32]) -> NDArray[np.uint8]:
    """|grad phi| (h, w) in colours (h, w, 3): blue below 1, white at it, red above; the zero set of phi is black."""
    off = np.nan_to_num(steepness.astype(np.float64) - 1, nan=1.0, posinf=1.0).clip(-1, STEEPEST - 1)[..., None]
    color = np.where(off < 0, 255 + off * (_BLUE - 255) * -1, 255 + off / (STEEPEST - 1) * (_RED - 255))
    inside = phi < 0
    border = np.zeros_like(inside)
    border[:, 1:] |= inside[:, 1:] != inside[:, :-1]
    border[1:] |= inside[1:] != inside[:-1]
    color[border] = 0
    pixels: NDArray[np.uint8] = color.round().astype(np.uint8)
    return pixels


def curves(
    comparison: Comparison, size: tuple[int, int]
) -> tuple[list[list[tuple[float, float]]], list[tuple[Any, ...]]]:
    """Loss curves in a box of this size: points (x, y) of each result's, and marks (x, y, text, is_on_x) of the axes.

    Across is the share of the steps or seconds, up the logarithm of the weighted loss on held-out samples.
    """
    left, top, right, bottom = MARGIN
    width, height = size[0] - left - right, size[1] - top - bottom
    losses = [[look.loss for look in result.trained.looks] for result in comparison.results]
    seen = [loss for row in losses for loss in row if math.isfinite(loss) and loss > 0]
    low, high = (math.log10(f(seen)) for f in (min, max)) if seen else (0.0, 1.0)
    high = max(high, low + 0.1)
    budget = comparison.settings.budget
    total = float(budget.steps or budget.seconds or 1)

    def place(share: float, loss: float) -> tuple[float, float]:
        return left + width * min(share, 1.0), top + height * (high - math.log10(loss)) / (high - low)

    lines = [
        [
            place((look.step if budget.steps else look.seconds) / total, look.loss)
            for look in result.trained.looks
            if math.isfinite(look.loss) and look.loss > 0
        ]
        for result in comparison.results
    ]
    ticks = [k * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for k in (1, 2, 5)]
    marks: list[tuple[Any, ...]] = [
        (left, place(0, tick)[1], f"{tick:g}", False) for tick in ticks if low <= math.log10(tick) <= high
    ]
    marks += [(left + width * i / 5, top + height, f"{total * i / 5:g}", True) for i in range(6)]
    return lines, marks


def color_of(result: Result) -> tuple[str, bool]:
    """The colour of a curve, and whether it is dashed."""
    choice = result.choice
    if choice.name in _STRONG:
        return _STRONG[choice.name], False
    hue = 45 * PLAIN.index(choice.name) + 20
    return f"hsl({hue}, 45%, 55%)", choice.encoding != "none"


def chart_svg(comparison: Comparison) -> str:
    """The loss curves as SVG; each says its name when it is pointed at."""
    (width, height), (left, top, right, bottom) = CHART, MARGIN
    lines, marks = curves(comparison, CHART)
    unit = "steps" if comparison.settings.budget.steps else "seconds"
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Loss curves">']
    for x, y, text, on_x in marks:
        end = f"M{x:.1f},{top}V{height - bottom}" if on_x else f"M{left},{y:.1f}H{width - right}"
        parts.append(f'<path class="grid" d="{end}"/>')
        where = (
            f'x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle"'
            if on_x
            else f'x="{x - 6}" y="{y + 4:.1f}" text-anchor="end"'
        )
        parts.append(f"<text {where}>{text}</text>")
    for result, line in reversed(list(zip(comparison.results, lines, strict=True))):
        if not line:
            continue
        color, dashed = color_of(result)
        heavy = 3 if result.choice.name in _STRONG else 1.6
        style = f'stroke="{color}" stroke-width="{heavy}"' + (' stroke-dasharray="5 3"' if dashed else "")
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f'<path class="curve" {style} d="{path}"><title>{html.escape(result.choice.title)}</title></path>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">{unit}</text></svg>')
    return "".join(parts)


def _legend(comparison: Comparison) -> str:
    parts = []
    for result in comparison.results:
        color, dashed = color_of(result)
        kind = "dashed" if dashed else "solid"
        parts.append(f'<span><i style="border-top: 3px {kind} {color}"></i>{html.escape(result.choice.title)}</span>')
    return f'<p class="legend">{"".join(parts)}</p>'


_STYLE = """
:root { color-scheme: light; font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #fff }
body { max-width: 1180px; margin: 0 auto; padding: 20px 16px 60px }
h1 { font-size: 1.5rem; margin: 0 0 .2em } h2 { font-size: 1.15rem; margin: 1.8em 0 .5em }
p { max-width: 75ch; margin: .4em 0 } .about { color: #56606e }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 4px 7px; text-align: right; border-bottom: 1px solid #e3e7ec; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; color: #56606e }
tr.sines td { font-weight: 600 } svg { width: 100%; height: auto } svg text { font-size: 12px; fill: #56606e }
.grid { stroke: #e8ebef; fill: none } .curve { fill: none; stroke-linejoin: round }
.legend span { display: inline-block; margin: 0 14px 2px 0; font-size: 13px; white-space: nowrap }
.legend i { display: inline-block; width: 22px; vertical-align: middle; margin-right: 5px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px }
.cards figure { margin: 0; padding: 8px; border: 1px solid #e3e7ec; border-radius: 6px }
.cards div { display: flex; gap: 8px; align-items: center } .cards img { width: 50%; min-width: 0; height: auto }
figcaption { font-size: 13px; color: #56606e; margin-top: 4px } figcaption b { color: #1c2430 }
.bar { display: inline-block; width: 130px; height: 11px; vertical-align: -1px; border: 1px solid #ccd2da;
  background: linear-gradient(90deg, #2166ac, #fff, #b2182b) }
"""


def page_of(comparison: Comparison, views: Sequence[Views]) -> str:
    """The page as HTML, pictures within it."""
    settings, name = comparison.settings, html.escape(comparison.cloud)
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    chosen = f"the best of the rates {rates} for each" if len(settings.rates) > 1 else f"rate {rates}"
    about = (
        f"{comparison.points:,} points; {settings.budget} each on {html.escape(comparison.device)}; "
        f"{settings.layers} layers of {settings.hidden} units; Adam, {chosen}; "
        f"meshes at {settings.resolution}&sup3;; seed {settings.seed}. "
        "All have the same samples, batches, terms and weights, by automatic differentiation."
    )
    cards = "".join(_card(result, of) for result, of in zip(comparison.results, views, strict=True))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}: networks side by side</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body>"
        f'<h1>{name}: networks side by side</h1><p class="about">{about}</p>{_table(comparison)}'
        '<p class="about">Lengths in percent of the diagonal of the cloud&rsquo;s box. Error: mean distance from the '
        "points to the mesh. Farthest: largest distance from the mesh back to a point; false sheets raise it. Normals: "
        "mean angle between a point&rsquo;s normal and the mesh&rsquo;s. Eikonal: mean | |grad phi| - 1 | on held-out "
        "samples. Best first.</p>"
        f"<h2>Weighted loss on held-out samples</h2>{chart_svg(comparison)}{_legend(comparison)}"
        "<h2>Surfaces, and |grad phi| on a slice</h2>"
        f'<p class="about">Left the mesh. Right |grad phi| on the plane through the middle across '
        f'{"xyz"[comparison.axis]}, from 0 <span class="bar"></span> to {STEEPEST:g}: of a distance it is 1, white; '
        f'black is the zero set.</p><div class="cards">{cards}</div></body></html>\n'
    )


def _table(comparison: Comparison) -> str:
    reference = any(r.errors is not None and r.errors.chamfer is not None for r in comparison.results)
    titles = ["network", "error", "farthest", "normals", "parts"]
    titles += ["Chamfer", "Hausdorff", "cosine"] if reference else []
    titles += ["eikonal", "loss", "rate", "parameters", "steps", "seconds", "CPU s"]
    rows = []
    for result in comparison.results:
        errors, trained = result.errors, result.trained
        cells = (
            ["no surface", "", "", ""]
            if errors is None
            else [
                f"{errors.error:.4f}",
                f"{errors.farthest:.3f}",
                f"{errors.normal_error:.2f}&deg;",
                f"{errors.parts}",
            ]
        )
        if reference:
            found = None if errors is None else (errors.chamfer, errors.hausdorff, errors.normal_consistency)
            cells += ["", "", ""] if found is None else [f"{value:.4f}" for value in found if value is not None]
        cells += [f"{trained.health.eikonal:.3f}", f"{trained.looks[-1].loss:.1f}", f"{trained.rate:g}"]
        cells += [f"{result.parameters:,}", f"{trained.steps}", f"{trained.seconds:.1f}"]
        cells += [f"{trained.processor_seconds:.1f}"]
        kind = ' class="sines"' if result.choice.name in _STRONG else ""
        rows.append(f"<tr{kind}><td>{html.escape(result.choice.title)}</td>" + "".join(f"<td>{c}</td>" for c in cells))
    head = "".join(f"<th>{title}</th>" for title in titles)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"</tr>".join(rows)}</tr></tbody></table></div>'
    )


def _card(result: Result, views: Views) -> str:
    name = html.escape(result.choice.title)
    images = "".join(
        f'<img src="data:image/png;base64,{_encoded(image)}" alt="{name}: {what}" width="{image.width}" '
        f'height="{image.height}">'
        for image, what in zip(views, ("surface", "length of the gradient on a slice"), strict=True)
    )
    return (
        f"<figure><div>{images}</div><figcaption><b>{name}</b><br>{html.escape(caption(result))}</figcaption></figure>"
    )


def caption(result: Result) -> str:
    """A result in a few words."""
    if result.errors is None:
        return f"no surface, {result.trained.processor_seconds:.0f} CPU s"
    errors = result.errors
    figures = f"{errors.error:.3g} %, {errors.normal_error:.1f}°, farthest {errors.farthest:.1f} %"
    return f"{figures}, {result.trained.processor_seconds:.0f} CPU s"


def _encoded(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def sheet_of(comparison: Comparison, views: Sequence[Views]) -> Image.Image:
    """The picture: the loss curves, then each network's surface and slice."""
    cell = (SURFACE_PX + SLICE_PX + 20, SURFACE_PX + 46)
    columns = min(SHEET_COLUMNS, len(views))
    rows = math.ceil(len(views) / columns)
    chart = (max(CHART[0], columns * cell[0] - 340), CHART[1])
    sheet = Image.new("RGB", (max(columns * cell[0], chart[0] + 340), 40 + chart[1] + rows * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    settings = comparison.settings
    title = f"{comparison.cloud}: {settings.budget} each, {settings.layers} layers of {settings.hidden}"
    pen.text((14, 8), title, "black", _font(20))
    _draw_chart(comparison, sheet, (0, 40), chart)
    for i, result in enumerate(comparison.results):
        color, dashed = color_of(result)
        y = 60 + 18 * i
        pen.line([(chart[0] + 10, y), (chart[0] + (20 if dashed else 34), y)], color, 3)
        if dashed:
            pen.line([(chart[0] + 25, y), (chart[0] + 34, y)], color, 3)
        pen.text((chart[0] + 42, y), result.choice.title, "black", _font(14), "lm")
    for i, (result, (surface, cut)) in enumerate(zip(comparison.results, views, strict=True)):
        x, y = (i % columns) * cell[0], 40 + chart[1] + (i // columns) * cell[1]
        pen.text((x + 10, y + 4), result.choice.title, "black", _font(16))
        pen.text((x + 10, y + 24), caption(result), "#56606e", _font(13))
        sheet.paste(surface, (x, y + 44))
        sheet.paste(cut, (x + SURFACE_PX, y + 44 + (SURFACE_PX - SLICE_PX) // 2))
    return sheet


def _draw_chart(comparison: Comparison, sheet: Image.Image, at: tuple[int, int], size: tuple[int, int]) -> None:
    # Drawn twice as large first, for smooth lines.
    drawn = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")
    pen = ImageDraw.Draw(drawn)
    lines, marks = curves(comparison, size)
    left, top, right, bottom = (2 * side for side in MARGIN)
    for x, y, text, on_x in marks:
        if on_x:
            pen.line([(2 * x, top), (2 * x, drawn.height - bottom)], "#e8ebef", 2)
            pen.text((2 * x, 2 * y + 8), text, "#56606e", _font(26), "mt")
        else:
            pen.line([(left, 2 * y), (drawn.width - right, 2 * y)], "#e8ebef", 2)
            pen.text((2 * x - 10, 2 * y), text, "#56606e", _font(26), "rm")
    for result, line in reversed(list(zip(comparison.results, lines, strict=True))):
        color, dashed = color_of(result)
        points = [(2 * x, 2 * y) for x, y in line]
        width = 6 if result.choice.name in _STRONG else 3
        for part in _dashes(points) if dashed else [points]:
            pen.line(part, color, width)
    sheet.paste(drawn.resize(size, Image.Resampling.LANCZOS), at)


def _dashes(points: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """Short pieces of a line, with gaps between."""
    at = np.array(points)
    along = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(at, axis=0), axis=1))]
    for start in np.arange(0.0, along[-1], DASH[0] + DASH[1]):
        ends = np.array([start, min(start + DASH[0], along[-1])])
        yield list(zip(np.interp(ends, along, at[:, 0]), np.interp(ends, along, at[:, 1]), strict=True))
