"""Cards, tables and maps: well-formed, escaped, small, and nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import shapely
from html_tags import checked

from rasteret_dask.display import html
from rasteret_dask.display.colours import colours_of
from rasteret_dask.display.html import (
    Markup,
    Outline,
    card,
    fold,
    markup,
    shares,
    svg_bars,
    svg_map,
    table,
    verdict,
)
from rasteret_dask.errors import PlanError

AWKWARD = (
    "<b>bold</b>",
    "'\"><script>alert(1)</script>",
    "a & b",
    "\ud800",
    "zwei\nlines",
    "",
    "ä 图 \N{SNOWMAN}",
)


@pytest.mark.parametrize("text", AWKWARD)
def test_text_never_becomes_markup(text: str) -> None:
    one = Outline(shapely.box(0, 0, 1, 1), text)
    inner = table([text], [[text], [None], [1]])
    rows = [(text, text), ("table", inner), ("fold", fold(text, text)), ("verdict", verdict(True, text))]
    rows.append(("shares", shares({text: 3})))
    checked(
        card(text, rows, [svg_map([one, Outline(shapely.box(0, 0, 1, 1), "other")]), svg_bars([1, 2], text)])
    )
    assert markup(markup(text)) == markup(text)


def test_a_card_brings_its_style_once() -> None:
    page = card("a", [("b", table(["c"], [[1]])), ("d", table(["e"], [[2]]))])
    assert page.count("<style>") == 1
    assert isinstance(page, Markup)


def test_numbers_stand_to_the_right() -> None:
    page = table(["name", "count", "share"], [["a", 1234, "3.5%"], ["1 a", 5, None]])
    assert "<td class=rd-number>1,234</td>" in page
    assert "<td class=rd-number>3.5%</td>" in page
    assert "<td class=rd-short>1 a</td>" in page


def picture(page: str) -> ElementTree.Element:
    """Return the map as XML, its attributes quoted."""
    found = re.search(r"<svg.*?</svg>", page)
    assert found is not None
    return ElementTree.fromstring(re.sub(r"=(\w+)(?=[ >/])", r"='\1'", found[0]))


def places(page: str) -> np.ndarray:
    """Shape (point, 2). Every corner that is drawn."""
    corners = [
        [float(n) for n in pair.split()]
        for path in picture(page).iter("path")
        for pair in re.findall(r"[ML](-?[\d.]+ -?[\d.]+)", path.attrib["d"])
    ]
    return np.array(corners)


def test_everything_drawn_lies_within_its_frame() -> None:
    """Drawn outlines: points, slivers, the antimeridian, the poles, one and thousands of them."""
    rng = np.random.default_rng(4)
    for count in (1, 2, 7, 300, html.MOST_OUTLINES + 1, 5000):
        west, south = rng.uniform(-180, 170), rng.uniform(-90, 80)
        corner = rng.uniform(
            (west, south), (west + rng.uniform(0, 10), south + rng.uniform(0, 10)), (count, 2)
        )
        side = rng.choice([0.0, 1e-7, 0.01, 3.0], (count, 2))
        shapes = [
            shapely.box(x, y, min(x + w, 180), min(y + h, 90))
            for (x, y), (w, h) in zip(corner, side, strict=True)
        ]
        shapes[0] = shapely.Point(*corner[0])
        page = svg_map([Outline(s, f"g{i % 4}") for i, s in enumerate(shapes)])
        checked(page)
        frame = [float(n) for n in picture(page).attrib["viewBox"].split()]
        corners = places(page)
        assert (corners >= -6).all()
        assert (corners <= np.array(frame[2:]) - 5).all()
        assert len(page) < 140 * html.MOST_OUTLINES


def test_north_is_up_and_a_degree_of_longitude_is_as_long_as_on_the_ground() -> None:
    """At 60 N a box of 2 x 1 degrees is a square."""
    page = svg_map(
        [Outline(shapely.box(10, 59.5, 12, 60.5), "a"), Outline(shapely.box(10, 60.4, 10.1, 60.5), "b")]
    )
    corners = places(page)
    assert np.ptp(corners[:4, 0]) == pytest.approx(np.ptp(corners[:4, 1]), rel=0.01)
    assert corners[4:].max(axis=0).tolist() < corners[:4].mean(axis=0).tolist()  # the north-west corner


def test_both_sides_of_the_antimeridian_stay_together() -> None:
    sides = [Outline(shapely.box(179, -17, 180, -16)), Outline(shapely.box(-180, -17, -179, -16))]
    page = svg_map(sides)
    assert "179.0° E to 179.0° W, 17.0° S to 16.0° S" in page
    both = svg_map([Outline(shapely.union_all([side.shape for side in sides]))])
    assert "179.0° E to 179.0° W" in both


def test_nothing_and_nonsense() -> None:
    assert "nothing to draw" in svg_map([])
    assert "nothing to draw" in svg_map([Outline(None), Outline(shapely.Polygon())])
    with pytest.raises(PlanError, match="degrees"):
        svg_map([Outline(shapely.box(500_000, 5_000_000, 500_010, 5_000_010))])


def test_many_outlines_are_squares_of_the_colour_of_most() -> None:
    most = [Outline(shapely.box(0, 0, 0.001, 0.001), "train")] * (html.MOST_OUTLINES + 1)
    page = svg_map([*most, Outline(shapely.box(0, 0, 0.001, 0.001), "val")])
    (path,) = picture(page).iter("path")
    assert path.attrib["fill"] == colours_of(["train"])["train"]
    assert "801" in page


def test_no_name_of_a_colour_is_said_twice() -> None:
    """Light and dark are said as variables, each once a scheme."""
    assert len(re.findall(r"--rd-ink:", html.STYLE)) == 1
    assert len(html.STYLE) < 6000
    assert Path(html.__file__).read_text().count("var(--jp-") >= 5
