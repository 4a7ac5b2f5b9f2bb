# SPDX-License-Identifier: Apache-2.0
"""Cards, tables, bars and maps as HTML: light and dark, without scripts, and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import cos, radians
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rasteret_dask.display.colours import colours_of
from rasteret_dask.errors import PlanError

__all__ = [
    "STYLE",
    "Markup",
    "Outline",
    "bare_table",
    "card",
    "fold",
    "markup",
    "shares",
    "svg_bars",
    "svg_map",
    "table",
    "verdict",
]

MOST_OUTLINES = 800
"""Outlines that are drawn one by one, some 50 bytes each; of more the map shows squares, so that it stays small."""

SQUARES = 48
"""Squares along a map's longer side, where there are too many outlines."""

MOST_CORNERS = 64
"""Corners of an outline that are drawn: a thumbnail has no room for more."""

MAP_PX = 240
"""The longer side of a map."""

SHORT = 30
"""Characters of a table's cell that stay in one line: dates, names of data sets."""

LEAST_DEG = 0.01
"""A map shows at least a kilometre, however small what lies on it."""


class Markup(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()

    def __html__(self) -> str:
        """Return itself: what templates ask for."""
        return str(self)


@dataclass(frozen=True, slots=True)
class Outline:
    """A shape on a map."""

    shape: Any
    """A shapely geometry in degrees of longitude and latitude, within the world."""
    label: str = ""
    """What it is coloured by: a split, a source, a platform."""


STYLE = Markup(
    """<style>
.rd-card,.rd-table{
--rd-ink0:#1f2328;--rd-dim0:#59636e;--rd-page0:#fff;--rd-line0:#d1d9e0;--rd-stripe0:#f6f8fa;--rd-good0:#1a7f37;
--rd-bad0:#c62828}
@media (prefers-color-scheme:dark){.rd-card,.rd-table{
--rd-ink0:#e6e6e6;--rd-dim0:#a3abb3;--rd-page0:#15181c;--rd-line0:#3a424a;--rd-stripe0:#1e2328;--rd-good0:#57ab5a;
--rd-bad0:#f47067}}
html[data-theme=light] :is(.rd-card,.rd-table),body[data-jp-theme-light=true] :is(.rd-card,.rd-table),
body.vscode-light :is(.rd-card,.rd-table){--rd-ink0:#1f2328;--rd-dim0:#59636e;--rd-page0:#fff;--rd-line0:#d1d9e0;
--rd-stripe0:#f6f8fa;--rd-good0:#1a7f37;--rd-bad0:#c62828}
html[data-theme=dark] :is(.rd-card,.rd-table),html[theme=dark] :is(.rd-card,.rd-table),
body[data-jp-theme-light=false] :is(.rd-card,.rd-table),body.vscode-dark :is(.rd-card,.rd-table){
--rd-ink0:#e6e6e6;--rd-dim0:#a3abb3;--rd-page0:#15181c;--rd-line0:#3a424a;--rd-stripe0:#1e2328;--rd-good0:#57ab5a;
--rd-bad0:#f47067}
.rd-card,.rd-table{
--rd-ink:var(--jp-content-font-color1,var(--vscode-editor-foreground,var(--pst-color-text-base,var(--rd-ink0))));
--rd-dim:var(--jp-content-font-color2,var(--vscode-descriptionForeground,
var(--pst-color-text-muted,var(--rd-dim0))));
--rd-page:var(--jp-layout-color1,var(--vscode-editor-background,var(--pst-color-background,var(--rd-page0))));
--rd-line:var(--jp-border-color2,var(--vscode-widget-border,var(--pst-color-border,var(--rd-line0))));
--rd-stripe:var(--jp-layout-color2,var(--vscode-textBlockQuote-background,
var(--pst-color-surface,var(--rd-stripe0))));
--rd-good:var(--rd-good0);--rd-bad:var(--rd-bad0);
color:var(--rd-ink);background:var(--rd-page);font-family:system-ui,sans-serif;font-size:13px;line-height:1.45}
.rd-card{border:1px solid var(--rd-line);border-radius:6px;padding:8px 12px;max-width:1000px;
box-sizing:border-box;overflow-x:auto}
.rd-title{font-weight:600;font-size:14px;margin:0 0 6px}
.rd-body{display:flex;flex-wrap:wrap;gap:8px 24px;align-items:flex-start}
.rd-rows{flex:1 1 440px;min-width:0}
.rd-pictures{display:flex;flex-wrap:wrap;gap:12px}
.rd-card table,table.rd-table{border-collapse:collapse;border:0!important;margin:0;font-size:13px!important;
width:auto;display:table;table-layout:auto}
.rd-card table{color:inherit;background:transparent}
.rd-card tr,table.rd-table tr{background:transparent!important;border:0!important}
.rd-card th,.rd-card td,table.rd-table th,table.rd-table td{text-align:left!important;vertical-align:top!important;
padding:2px 14px 2px 0!important;border:0!important;color:inherit;background:transparent!important;line-height:1.45;
overflow-wrap:anywhere;white-space:normal;max-width:none}
.rd-card .rd-rows>table>tbody>tr>th{font-weight:400;color:var(--rd-dim);white-space:nowrap}
.rd-card td.rd-text{white-space:pre-wrap}
.rd-card table.rd-table th,.rd-card table.rd-table td,table.rd-table th,table.rd-table td{
padding:2px 14px 2px 4px!important;overflow-wrap:break-word}
table.rd-table td.rd-short{white-space:nowrap!important}
.rd-card table.rd-table th,table.rd-table th{font-weight:600;border-bottom:1px solid var(--rd-line)!important;
white-space:nowrap}
.rd-card table.rd-table tbody tr:nth-child(odd),table.rd-table tbody tr:nth-child(odd){
background:var(--rd-stripe)!important}
.rd-card table.rd-table .rd-number,table.rd-table .rd-number{text-align:right!important;
font-variant-numeric:tabular-nums}
.rd-card code{color:inherit;background:transparent!important;padding:0!important;font-size:12px;white-space:pre-wrap}
.rd-card details{margin:0}.rd-card summary{cursor:pointer}
.rd-card svg{display:block;color:var(--rd-ink)}
.rd-dim{color:var(--rd-dim)}.rd-good{color:var(--rd-good);font-weight:600}.rd-bad{color:var(--rd-bad);font-weight:600}
.rd-key{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.35em}
.rd-legend span{margin-right:1em;white-space:nowrap}
</style>"""
)
"""What cards and tables look like. Each card and table brings it along; it names nothing outside of them.

Jupyter, VS Code and Sphinx themes style every table, hence ``!important``. They tell their colours as variables;
elsewhere the page's or the system's choice of light or dark decides, and a card has a background of its own, so that it
can be read on any page.
"""


def markup(value: object) -> Markup:
    """Return a value as HTML: markup as it is, anything else escaped."""
    if isinstance(value, Markup):
        return value
    text = (
        str(value).encode("utf-8", "backslashreplace").decode()
    )  # a lone surrogate cannot be sent to a browser
    return Markup(escape(text))


def card(
    title: str | Markup, rows: Sequence[tuple[str, str | Markup]], pictures: Sequence[Markup] = ()
) -> Markup:
    """Return a card: a title, rows of names and values, and pictures beside them.

    Parameters
    ----------
    title
        One line.
    rows
        Names and values. Values are escaped where they are no markup; their line breaks stay. A row without a name
        goes on with the one above it.
    pictures
        Such as :func:`svg_map` returns.
    """
    lines = ""
    for name, value in rows:
        kind = "" if isinstance(value, Markup) else " class=rd-text"
        lines += f"<tr><th>{markup(name)}</th><td{kind}>{markup(value)}</td></tr>"
    body = f"<div class=rd-rows><table><tbody>{lines}</tbody></table></div>" if rows else ""
    if pictures:
        body += f"<div class=rd-pictures>{''.join(pictures)}</div>"
    body = body.replace(STYLE, "")  # once for all tables in it
    return Markup(
        f"<div class=rd-card>{STYLE}<div class=rd-title>{markup(title)}</div><div class=rd-body>{body}</div></div>"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table with a header; columns of numbers are set to the right, None is an empty cell.

    Parameters
    ----------
    columns
        Names of the columns.
    rows
        A value a column each: numbers, text, markup or None. Numbers that are formatted already count as numbers
        where all of a column begin with a digit or a sign.
    """
    return Markup(f"{STYLE}{bare_table(columns, rows)}")


def bare_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table as :func:`table` does, for a page that has :data:`STYLE` once."""
    cells = [["" if value is None else value for value in row] for row in rows]
    numeric = [bool(cells) and all(_is_number(row[at]) for row in cells) for at in range(len(columns))]
    tag = [" class=rd-number" if yes else "" for yes in numeric]
    head = "".join(f"<th{tag[at]}>{markup(name)}</th>" for at, name in enumerate(columns))
    body = ""
    for row in cells:
        tags = zip(row, tag, strict=True)
        body += f"<tr>{''.join(f'<td{right or _short(v)}>{markup(_cell(v))}</td>' for v, right in tags)}</tr>"
    return Markup(f"<table class=rd-table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def fold(summary: str | Markup, body: str | Markup) -> Markup:
    """Return a part that is closed until somebody clicks on its summary."""
    return Markup(f"<details><summary>{markup(summary)}</summary>{markup(body)}</details>")


def verdict(ok: bool, text: str) -> Markup:
    """Return a sentence with a tick or a cross, green or red."""
    sign, tone = ("&#10003;", "rd-good") if ok else ("&#10007;", "rd-bad")
    return Markup(f"<span class={tone}>{sign} {markup(text)}</span>")


def shares(counts: Mapping[str, int]) -> Markup:
    """Return counts as one bar with a legend, coloured as on maps: chips by split, pixels by class."""
    total = sum(counts.values())
    colours = colours_of(counts)
    parts, at = [], 0.0
    for label in colours:
        width = 100 * counts[label] / total if total else 0.0
        parts.append(f"<rect x='{at:.2f}%' y='0' width='{width:.2f}%' height='8' fill='{colours[label]}'/>")
        at += width
    bar = f"<svg width='100%' height='8' style='max-width:{MAP_PX}px;border-radius:3px' role=img>{''.join(parts)}</svg>"
    return Markup(bar + _legend(colours, {label: f"{counts[label]:,}" for label in colours}))


def svg_bars(heights: Sequence[float], title: str = "", width: int = 120, height: int = 24) -> Markup:
    """Return a small histogram: one bar a number, the highest as high as the picture.

    Parameters
    ----------
    heights
        At least 0 each.
    title
        What a pointer that rests on it is told.
    width, height
        Pixels.
    """
    top = max(heights, default=0.0) or 1.0
    step = width / max(len(heights), 1)
    bars = "".join(
        f"M{at * step:.1f} {height}v{-max(height * value / top, 0.6):.1f}h{step * 0.86:.1f}V{height}z"
        for at, value in enumerate(heights)
        if value > 0
    )
    told = f"<title>{markup(title)}</title>" if title else ""
    return Markup(
        f"<svg width='{width}' height='{height}' viewBox='0 0 {width} {height}' role=img>{told}"
        f"<path d='{bars}' fill='#2f7fc1'/></svg>"
    )


def svg_map(outlines: Sequence[Outline]) -> Markup:
    """Return a map of outlines, coloured by their labels, with the corners' degrees and a legend.

    Longitudes are drawn as long as latitudes in the middle of the map. Outlines on both sides of the antimeridian stay
    together. Of more than ``MOST_OUTLINES`` the map shows squares, each in the colour of most outlines in it.

    Raises
    ------
    PlanError
        When an outline is no geometry of degrees.
    """
    shapes = np.array([one.shape for one in outlines], dtype=object)
    there = ~(shapely.is_missing(shapes) | shapely.is_empty(shapes))
    shapes = shapes[there]
    labels = np.array([one.label for one in outlines], dtype=object)[there]
    if not len(shapes):
        return Markup("<span class=rd-dim>nothing to draw</span>")
    shapes = _together(shapes)
    west, south, east, north = shapely.total_bounds(shapes)
    if not (np.isfinite([west, south, east, north]).all() and south >= -90.001 and north <= 90.001):
        raise PlanError("svg_map", f"outlines from {west, south} to {east, north}", "degrees of lon/lat")
    frame = _Frame.around(west, south, east, north)
    colours = colours_of(labels.tolist())
    if len(shapes) > MOST_OUTLINES:
        paths = _squares(frame, shapes, labels, colours)
    else:
        paths = {label: "".join(frame.path(shape) for shape in shapes[labels == label]) for label in colours}
    drawn = "".join(
        f"<path d='{paths[label]}' fill='{colour}' fill-opacity='.55' stroke='{colour}' stroke-width='.7'/>"
        for label, colour in colours.items()
        if paths.get(label)
    )
    counts = {label: int((labels == label).sum()) for label in colours}
    legend = "" if [*colours] == [""] else _legend(colours, {k: f"{n:,}" for k, n in counts.items()})
    return Markup(f"<div>{frame.svg(drawn)}{legend}</div>")


@dataclass(frozen=True, slots=True)
class _Frame:
    """The part of the world on a map, and where it lies in the picture."""

    west: float
    north: float
    x_scale: float
    """Pixels per degree of longitude."""
    y_scale: float
    """Pixels per degree of latitude."""
    width: float
    height: float
    """Pixels."""

    @classmethod
    def around(cls, west: float, south: float, east: float, north: float) -> _Frame:
        """Return the frame of bounds in degrees, a little larger."""
        flat = max(cos(radians((south + north) / 2)), 0.05)
        x, y = (east - west) * flat, north - south
        scale = MAP_PX / max(x, y, LEAST_DEG)
        width, height = max(x * scale, MAP_PX / 6), max(y * scale, MAP_PX / 6)
        return cls(
            west - (width / scale - x) / 2 / flat,
            north + (height / scale - y) / 2,
            scale * flat,
            scale,
            width,
            height,
        )

    def place(self, lonlat: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return pixels (x, y), shape (point, 2)."""
        return np.stack(
            [(lonlat[:, 0] - self.west) * self.x_scale, (self.north - lonlat[:, 1]) * self.y_scale], -1
        )

    def path(self, shape: Any) -> str:
        """Return a shape's rings as an SVG path, with as many corners as a thumbnail has room for."""
        if shapely.get_type_id(shape) not in (3, 6, 7):
            shape = shapely.buffer(shape, 1.5 / self.y_scale)
        if shapely.get_num_coordinates(shape) > MOST_CORNERS:
            shape = shapely.simplify(shape, 0.5 / self.y_scale)
        rings = shapely.get_rings(shapely.get_parts(shape))
        return "".join(_path(self.place(shapely.get_coordinates(ring)[:-1])) for ring in rings)

    def svg(self, drawn: str) -> str:
        """Return the picture with its frame and the degrees of its sides below."""
        west, east = self.west, self.west + self.width / self.x_scale
        south, north = self.north - self.height / self.y_scale, self.north
        digits = int(np.clip(np.ceil(-np.log10(max(min(east - west, north - south), 1e-9))) + 1, 0, 5))
        across = f"{_degrees(west, 'EW', digits)} to {_degrees(east, 'EW', digits)}"
        texts = f"{across}, {_degrees(south, 'NS', digits)} to {_degrees(north, 'NS', digits)}"
        wide, high = self.width + 12, self.height + 12
        return (
            f"<svg width='{wide:.0f}' height='{high:.0f}' viewBox='-6 -6 {wide:.1f} {high:.1f}' role=img>"
            f"<title>{texts}</title><rect x='-5.5' y='-5.5' width='{wide - 1:.1f}' height='{high - 1:.1f}' fill='none' "
            f"stroke='currentColor' stroke-opacity='.35'/>{drawn}</svg><div class=rd-dim>{texts}</div>"
        )


def _together(shapes: NDArray[Any]) -> NDArray[Any]:
    """Return shapes with western longitudes counted beyond 180 where that makes the map narrower."""
    boxes = shapely.bounds(shapely.get_parts(shapes))
    if boxes[:, 2].max() - boxes[:, 0].min() <= 180.0:
        return shapes
    western = boxes[:, 2] <= 0
    turned = boxes[:, [0, 2]] + 360.0 * western[:, None]
    if turned.max() - turned.min() >= boxes[:, 2].max() - boxes[:, 0].min():
        return shapes
    result = shapes.copy()
    for number, shape in enumerate(shapes):
        parts = [_eastward(part) for part in shapely.get_parts(shape)]
        result[number] = parts[0] if len(parts) == 1 else shapely.geometrycollections(parts)
    return result


def _eastward(part: Any) -> Any:
    if shapely.bounds(part)[2] > 0:
        return part
    return shapely.transform(part, lambda points: points + np.array([360.0, 0.0]))


def _squares(
    frame: _Frame, shapes: NDArray[Any], labels: NDArray[Any], colours: Mapping[str, str]
) -> dict[str, str]:
    """Return a path a label of the squares in which most outlines have it."""
    boxes = shapely.bounds(shapes)
    size = np.array([frame.width, frame.height])
    squares = np.maximum(np.round(SQUARES * size / size.max()), 1)
    wide, high = size / squares
    places = frame.place((boxes[:, :2] + boxes[:, 2:]) / 2)
    at = np.clip(places // (wide, high), 0, squares - 1).astype(np.int64)
    number = {label: n for n, label in enumerate(colours)}
    key = (at[:, 0] * SQUARES + at[:, 1]) * len(number) + [number[label] for label in labels]
    keys, counts = np.unique(key, return_counts=True)
    most: dict[int, tuple[int, int]] = {}
    for one, count in zip(keys.tolist(), counts.tolist(), strict=True):
        square, label = divmod(one, len(number))
        most[square] = max(most.get(square, (0, 0)), (count, -label))
    names = list(colours)
    paths = dict.fromkeys(names, "")
    for square, (_, label) in most.items():
        column, row = divmod(square, SQUARES)
        paths[names[-label]] += f"M{column * wide:.1f} {row * high:.1f}h{wide:.1f}v{high:.1f}h{-wide:.1f}z"
    return paths


def _path(points: NDArray[np.float64]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points.tolist()) + "z"


def _degrees(value: float, sides: str, digits: int) -> str:
    """Return ``13.2° E``; beyond 180 degrees it is west again."""
    if sides == "EW":
        value = (value + 180.0) % 360.0 - 180.0
    side = sides[0] if value >= 0 else sides[1]
    return f"{abs(value):.{digits}f}° {side}"


def _legend(colours: Mapping[str, str], values: Mapping[str, str]) -> str:
    keys = ""
    for label, colour in colours.items():
        key = f"<i class=rd-key style='background:{colour}'></i>"
        keys += f"<span>{key}{markup(label or 'none')} {markup(values[label])}</span>"
    return f"<div class=rd-legend>{keys}</div>"


def _is_number(value: object) -> bool:
    if isinstance(value, int | float | np.number):
        return not isinstance(value, bool)
    return value == "" or (isinstance(value, str) and not isinstance(value, Markup) and _begins(value))


def _begins(text: str) -> bool:
    figure = text.lstrip("-+").rstrip("%").replace(",", "").replace(" ", "")
    return figure.replace(".", "", 1).isdecimal()


def _short(value: object) -> str:
    """Return the class of text that is too short to be broken."""
    return "" if isinstance(value, Markup) or len(str(value)) > SHORT else " class=rd-short"


def _cell(value: object) -> object:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float | np.floating) else value
