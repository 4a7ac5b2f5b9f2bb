"""A STAC API's pages: all of them, once, with patience, and never for ever."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from ports import free_port
from stac_api import ApiFault, Dict, StacServer, changed, generated, serving_stac
from waiting import PATIENCE_S

from rasteret_dask.errors import SourceError, TrustError
from rasteret_dask.footprint import area_of
from rasteret_dask.ingest.search import Search, boxes_of, fits
from rasteret_dask.ingest.stacapi import pages
from rasteret_dask.net import remote, web

Serve = Callable[[Path], tuple[str, list[tuple[str, str | None]]]]
S2 = "sentinel-2-l2a"
ITEMS = generated(1200)
CLOUDY = {"eo:cloud_cover": {"gte": 90, "lt": 95}}


@pytest.fixture(scope="module")
def api() -> Iterator[StacServer]:
    with serving_stac(ITEMS) as running:
        yield running


@pytest.fixture(autouse=True)
def soon(api: StacServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing go wrong, and waits be short."""
    api.fault(ApiFault())
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)


def ids(search: Search, most: int | None = None) -> list[str]:
    return [item["id"] for page in pages(search, most) for item in page.items]


def found(items: list[Dict], **tests: Any) -> list[str]:
    return [i["id"] for i in items if fits(i, json.dumps(tests), "test")]


def test_all_pages_come_once_each(api: StacServer) -> None:
    got = list(pages(Search(api.url, S2)))
    assert [len(p.items) for p in got] == [250, 250, 250, 250, 200]
    assert {p.matched for p in got} == {1200}
    assert [i["id"] for p in got for i in p.items] == [i["id"] for i in ITEMS]
    assert [s["method"] for s in api.log] == ["POST"] * 5


def test_pages_are_asked_for_one_by_one(api: StacServer) -> None:
    walk = pages(Search(api.url, S2))
    next(walk)
    assert len(api.log) == 1
    assert (
        len(ids(Search(api.url, S2), most=70)) == 1200
    )  # in pages of seventy: who wants no more stops there
    assert {s["limit"] for s in api.log[1:]} == {70}


@pytest.mark.parametrize("extensions", [("query", "filter"), ("filter",), ()])
def test_a_query_means_the_same_wherever_it_is_applied(extensions: tuple[str, ...]) -> None:
    with serving_stac(ITEMS, extensions) as other:
        got = ids(Search(other.url, S2, query=json.dumps(CLOUDY)))
        assert got == found(ITEMS, **CLOUDY)
        assert got
        assert ("query" in other.log[0]) == ("query" in extensions)


def test_every_operator_of_a_query() -> None:
    item: Dict = {"properties": {"n": 5, "t": "abc", "l": [1, 2]}}
    true: list[tuple[str, str, Any]] = [
        ("n", "eq", 5),
        ("n", "neq", 4),
        ("n", "lt", 6),
        ("n", "lte", 5),
        ("n", "gt", 4),
        ("n", "gte", 5),
    ]
    true += [("n", "in", [4, 5])]
    texts: list[tuple[str, str, Any]] = [
        ("t", "startsWith", "ab"),
        ("t", "endsWith", "bc"),
        ("t", "contains", "b"),
    ]
    for name, op, wanted in [*true, *texts, ("l", "contains", 2)]:
        assert fits(item, json.dumps({name: {op: wanted}}), "test"), op
    false = [("n", "eq", 4), ("n", "lt", 5), ("t", "startsWith", "b"), ("missing", "neq", 1)]
    for name, op, wanted in false:
        assert not fits(item, json.dumps({name: {op: wanted}}), "test"), op
    with pytest.raises(SourceError, match="query"):
        fits(item, json.dumps({"t": {"lt": 5}}), "test")


def test_cql2_as_text_and_as_json_find_the_same(api: StacServer) -> None:
    text = ids(Search(api.url, S2, filter="eo:cloud_cover >= 90 AND eo:cloud_cover < 95"))
    told = {"op": "and", "args": [
        {"op": ">=", "args": [{"property": "eo:cloud_cover"}, 90]},
        {"op": "<", "args": [{"property": "eo:cloud_cover"}, 95]},
    ]}  # fmt: skip
    assert text == ids(Search(api.url, S2, filter=json.dumps(told))) == found(ITEMS, **CLOUDY)


def test_an_api_that_cannot_filter_is_not_asked_to() -> None:
    with serving_stac(ITEMS, ("query",)) as other:
        with pytest.raises(SourceError, match="does not say it can filter") as told:
            ids(Search(other.url, S2, filter="eo:cloud_cover < 20"))
        assert not other.log
    assert "query=" in told.value.remedy


@pytest.mark.parametrize("told", ["eo:cloud_cover <", '{"op": 5}'])
def test_a_filter_that_is_no_cql2_ends_with_the_api_s_words(api: StacServer, told: str) -> None:
    with pytest.raises(SourceError, match=r"HTTP 400.*query and filter"):
        ids(Search(api.url, S2, filter=told))
    assert len(api.log) == 1


def test_an_operator_that_nobody_knows(api: StacServer) -> None:
    with pytest.raises(SourceError, match=r"around.*expected one of eq"):
        ids(Search(api.url, S2, query='{"eo:cloud_cover": {"around": 5}}'))
    with pytest.raises(SourceError, match="no operator"):
        ids(Search(api.url, S2, query='{"eo:cloud_cover": 5}'))
    assert not api.log


@pytest.mark.parametrize(
    ("span", "first", "last"),
    [
        (("2024-01-06T00:00:00+00:00", "2024-01-11T00:00:00+00:00"), "2024-01-06", "2024-01-06"),
        ((None, "2024-01-06T00:00:00+00:00"), "2024-01-01", "2024-01-01"),
        (("2024-01-07T00:00:00+00:00", None), "2024-01-11", "2024-01-11"),
        ((None, None), "2024-01-01", "2024-01-11"),
    ],
)
def test_ranges_open_at_either_end(
    api: StacServer, span: tuple[str | None, str | None], first: str, last: str
) -> None:
    days = [i["properties"]["datetime"][:10] for p in pages(Search(api.url, S2, span=span)) for i in p.items]
    assert (min(days), max(days)) == (first, last)


# --- what goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_refusals_that_pass_are_waited_for(api: StacServer, status: int) -> None:
    api.fault(ApiFault(status=status, times=3, retry_after="0"))
    assert len(ids(Search(api.url, S2))) == 1200
    assert len(api.log) == 3 + 5


def test_retry_after_is_heeded(api: StacServer) -> None:
    api.fault(ApiFault(status=429, times=1, retry_after="1"))
    start = time.monotonic()
    ids(Search(api.url, S2))
    assert time.monotonic() - start >= 1.0  # what was asked for, not what we would have waited


def test_refusals_that_stay_end_after_some_attempts(api: StacServer) -> None:
    api.fault(ApiFault(status=503))
    with pytest.raises(SourceError, match=r"HTTP 503.*try again later"):
        ids(Search(api.url, S2))
    assert len(api.log) == remote.ATTEMPTS


def test_other_refusals_are_not_repeated(api: StacServer) -> None:
    api.fault(ApiFault(status=403))
    with pytest.raises(SourceError, match=r"HTTP 403.*credentials"):
        ids(Search(api.url, S2))
    assert len(api.log) == 1


def test_an_api_that_hangs_is_asked_again(api: StacServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    ask, hanging = web.ask, [True]

    def asked(url: str, method: str, headers: Any, body: Any, read_s: float) -> Any:
        short = url.endswith("/search") and bool(hanging) and hanging.pop()
        return ask(url, method, headers, body, 0.5 if short else PATIENCE_S)

    monkeypatch.setattr(web, "ask", asked)
    api.fault(ApiFault(hang_s=PATIENCE_S, times=1))
    assert len(ids(Search(api.url, S2))) == 1200
    assert not hanging
    hanging += [True, True]
    api.fault(ApiFault(hang_s=PATIENCE_S))
    with pytest.raises(SourceError, match=r"no answer: .*timed out"):
        ids(Search(api.url, S2))


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ("limit must be less than or equal to {most}", [250, 100]),
        ("the limit is too large", [250, 125, 62]),
        ("Page size 250 is not served", [250, 125, 62]),
    ],
)
@pytest.mark.parametrize("filter_", [None, "eo:cloud_cover >= 0"])
def test_an_api_that_refuses_large_pages_is_asked_for_fewer(
    api: StacServer, words: str, sizes: list[int], filter_: str | None
) -> None:
    api.fault(ApiFault(most=100, words=words))
    got = list(pages(Search(api.url, S2, filter=filter_)))
    assert [i["id"] for p in got for i in p.items] == [i["id"] for i in ITEMS]
    asked = [int(s["limit"]) for s in api.log]
    assert asked[: len(sizes)] == sizes  # each once, and then what it gives
    assert set(asked[len(sizes) :]) == {sizes[-1]}


def test_an_api_that_refuses_every_page_size_is_told_of(api: StacServer) -> None:
    api.fault(ApiFault(most=0, words="no such limit"))
    with pytest.raises(SourceError, match=r"HTTP 400.*no such limit"):
        ids(Search(api.url, S2))
    assert [s["limit"] for s in api.log] == [250, 125, 62, 31, 15, 7, 3, 1]


@pytest.mark.parametrize("body", ["not json", [1, 2], {"features": 5}, None])
def test_an_answer_that_is_no_page(api: StacServer, body: Any) -> None:
    api.fault(ApiFault(change=lambda _n, _page: body))
    with pytest.raises(SourceError, match="page"):
        ids(Search(api.url, S2))


def test_a_page_that_links_to_itself(api: StacServer) -> None:
    def circle(n: int, page: Dict) -> Dict:
        body = {"collections": [S2], "limit": 250, "token": "500"}
        link = {"rel": "next", "href": f"{api.url}/search", "method": "POST", "body": body}
        return page if n < 2 else {**page, "links": [link]}

    api.fault(ApiFault(change=circle))
    with pytest.raises(SourceError, match="link in a circle"):
        ids(Search(api.url, S2))
    assert len(api.log) <= 5


def test_pages_without_end(api: StacServer) -> None:
    def endless(_n: int, page: Dict) -> Dict:
        count = len(api.log)
        body = {"collections": [S2], "limit": 250, "token": "0", "fields": {"n": count}}
        link = {"rel": "next", "href": f"{api.url}/search?n={count}", "method": "POST", "body": body}
        return {**page, "links": [link]}

    api.fault(ApiFault(change=endless))
    with pytest.raises(SourceError, match="only items that came before"):
        ids(Search(api.url, S2))
    assert len(api.log) <= 6


@pytest.mark.parametrize(
    "href", ["file:///etc/passwd", "/etc/passwd", "http://169.254.169.254/latest", "ftp://x/y"]
)
def test_a_next_page_somewhere_else(api: StacServer, href: str) -> None:
    api.fault(ApiFault(change=lambda _n, page: {**page, "links": [{"rel": "next", "href": href}]}))
    with pytest.raises(TrustError, match="a link of its pages"):
        ids(Search(api.url, S2))


def test_a_collection_that_is_not_there(api: StacServer) -> None:
    with pytest.raises(SourceError, match=f"no such collection.*Did you mean {S2}"):
        ids(Search(api.url, "sentinel-2-l2"))
    assert ids(Search(api.url, S2, boxes=((100.0, 0.0, 101.0, 1.0),))) == []


def test_places_that_are_no_api(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "catalog.json").write_text(
        json.dumps({"type": "Catalog", "id": "c", "stac_version": "1.0.0", "description": "d", "links": []})
    )
    (tmp_path / "page.html").write_text("<html></html>")
    (tmp_path / "other.json").write_text('{"hello": 1}')
    url, _ = serve(tmp_path)
    with pytest.raises(SourceError, match=r"nothing of item search.*build_from_stac"):
        ids(Search(f"{url}/catalog.json", S2))
    for name in ("page.html", "other.json", "missing"):
        with pytest.raises(SourceError, match="STAC API"):
            ids(Search(f"{url}/{name}", S2))
    for place in ("/tmp/catalog.json", "s3://bucket/catalog.json", "nonsense"):
        with pytest.raises(SourceError, match="root of a STAC API"):
            ids(Search(place, S2))


def test_nobody_there_and_no_secret_told() -> None:
    port = free_port()
    with pytest.raises(SourceError, match=r"no answer.*network") as told:
        ids(Search(f"http://ann:secret@127.0.0.1:{port}/v1?token=secret", S2))
    assert "secret" not in str(told.value)
    assert told.value.__cause__ is None


# --- boxes ---------------------------------------------------------------------------------------------------

DEGREES = st.floats(-180, 180, allow_nan=False).map(lambda v: round(v, 3))


def test_a_box_is_itself_to_the_last_digit() -> None:
    box = (6.1000000000000005, 44.0, 8.123456789012345, 45.0)
    assert boxes_of(box) == (box,)


@pytest.mark.parametrize(
    ("box", "halves"),
    [
        ((170, -20, -170, -10), ((170, -20, 180, -10), (-180, -20, -170, -10))),
        ((170, -20, 190, -10), ((170, -20, 180, -10), (-180, -20, -170, -10))),
        ((-190, -20, -170, -10), ((170, -20, 180, -10), (-180, -20, -170, -10))),
        ((170, -20, 180, -10), ((170, -20, 180, -10),)),
        ((-180, -90, 180, 90), ((-180, -90, 180, 90),)),
        ((0, -90, 360, 90), ((-180, -90, 180, 90),)),
    ],
)
def test_boxes_across_the_antimeridian(box: Any, halves: Any) -> None:
    assert boxes_of(box) == halves


@given(DEGREES, DEGREES, DEGREES)
def test_a_place_is_in_the_box_or_not_whichever_way_it_is_written(
    west: float, east: float, at: float
) -> None:
    if west == east or min(abs(at - west), abs(at - east)) < 1e-6:
        return
    inside = west < at < east if west < east else at > west or at < east
    area = area_of(boxes_of((west, -1.0, east, 1.0)))
    assert bool(shapely.intersects(area, shapely.Point(at, 0))) == inside
    assert all(-180 <= a < b <= 180 for a, _, b, _ in boxes_of((west, -1.0, east, 1.0)))


def test_a_box_across_the_antimeridian_finds_both_sides() -> None:
    def at(name: str, lon: float) -> Dict:
        box = shapely.box(lon, 10, lon + 0.5, 11)
        return changed(ITEMS[0], id=name, geometry=shapely.geometry.mapping(box), bbox=list(box.bounds))

    with serving_stac([at("west", 178), at("east", -179), at("far", 0)]) as other:
        assert sorted(ids(Search(other.url, S2, boxes_of((170, 0, -170, 20))))) == ["east", "west"]
