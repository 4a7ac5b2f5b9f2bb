"""The page about a store: complete, self-contained, small, and safe whatever names hold."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import geopandas
import imagecodecs
import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.reportpage import LARGEST_PX, PER_SPLIT, PICTURES_NBYTES, report_page, sizes
from rasteret_dask.store.ledger import PROVENANCE

SCRIPT = "<script>alert('x')</script>"
VOID = {"meta", "img", "br", "link", "input", "hr"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Its elements, its text, and whether each element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data.strip())

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.words))


@pytest.fixture(scope="module")
def chips(small_world: World) -> rd.Chips:
    """Return chips of two sources, classes and labels, whose names are dangerous; some have too few valid pixels."""
    s2 = rd.build_from_stac(small_world.sentinel2, name="s2", date_range=("2024-04-01", "2024-06-30"))
    optical = s2.harmonize(["red", "green", "blue"], time="1MS", mask="clouds")
    scene = s2.harmonize(["SCL"], units="raw", time="1MS")
    west, south, east, north = s2.describe().bounds or (0, 0, 0, 0)
    rng = np.random.default_rng(1)
    places = rng.uniform((west, south), (east, north), (40, 2))
    fields = geopandas.GeoDataFrame(
        {"crop": rng.choice(["wheat", SCRIPT], 40)},
        geometry=[shapely.Point(p).buffer(0.004) for p in places],
        crs=4326,
    )
    joined = rd.join(optical=optical, scene=scene)
    made = joined.chips(32, cell_km=0.64, labels=fields, rasterize="crop", min_coverage=0.5)
    return (
        made.sample(60, seed=2).split(0.5, 0.25, 0.25, seed=3).filter_pixels(min_valid=0.55, source="optical")
    )


@pytest.fixture(scope="module")
def store(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("page") / "a&b.zarr")
    chips.to_zarr(path, progress=False)
    (Path(path) / "_job" / "recipe.toml").write_text(f"[chips]\nsize = 32 # {SCRIPT}\n")
    return path


@pytest.fixture(scope="module")
def text(store: str) -> str:
    return report_page(store)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_every_element_is_closed_and_nothing_runs_or_is_fetched(page: Page, text: str) -> None:
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in page.elements
    }
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in page.of("img"))
    assert all(attrs["href"].startswith("#") for attrs in page.of("a"))
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not re.search(r"url\(|@import|http-equiv", text)


def test_names_are_escaped_wherever_they_stand(page: Page, text: str) -> None:
    assert "<script" not in text
    assert page.text.count(SCRIPT) >= 3  # the legend, the table of classes, the recipe
    assert "a&b.zarr" in page.text


def test_chips_of_every_split_are_counted_and_shown(page: Page, store: str) -> None:
    kept = rd.open_chips(store)
    counts = Counter(kept.table["split"].to_pylist())
    assert set(counts) == {"train", "val", "test"}
    for split, count in counts.items():
        assert f"{split} {count} {count / len(kept):.1%}" in page.text
        assert f"{split} ({min(PER_SPLIT, count)} of {count})" in page.text
    pictures = page.of("img")
    shown = sum(min(PER_SPLIT, count) for count in counts.values())
    assert len(pictures) == shown * 7  # three slots of each source, and the mask
    ids = {match[1] for one in pictures if (match := re.match(r"chip (\S+): ", one["alt"]))}
    assert ids <= set(kept)
    assert len(ids) == shown


def test_pictures_are_the_chips_pixels(page: Page, store: str) -> None:
    """The SCL of a chip has as many colours as it has classes; masked pixels let the page through."""
    kept = rd.open_chips(store)
    one = next(attrs for attrs in page.of("img") if "scene SCL, Apr 2024" in attrs["alt"])
    arrays = kept.take([one["alt"].split()[1].rstrip(":")])
    image = imagecodecs.png_decode(base64.b64decode(one["src"].partition(",")[2]))
    valid = arrays["scene/valid"][0, 0]
    np.testing.assert_array_equal(image[..., 3] > 0, valid)
    colours = {tuple(pixel) for pixel in image[valid].tolist()}
    assert len(colours) == len(np.unique(arrays["scene"][0, 0, 0][valid]))


def test_statistics_are_those_of_stats(page: Page, store: str) -> None:
    kept = rd.open_chips(store)
    stats = kept.select("train").stats()
    assert f"{stats['optical'].mean[0]:.4g}" in page.text
    for row in stats.class_table.to_pylist():
        assert f"{row['count']:,} {row['share']:.1%}" in page.text
    assert len([svg for svg in page.of("svg") if svg["viewbox"].startswith("-1 -2")]) == 3  # red, green, blue


def test_losses_and_times_are_told(page: Page, store: str, chips: rd.Chips) -> None:
    dropped = Counter(rd.open_chips(store).dropped["split"].to_pylist())
    assert dropped, "the world has chips with too few valid pixels"
    for split, count in dropped.items():
        assert f"{count} chips dropped by filter_pixels {split}:" in page.text
    for reason, count in chips.planned.dropped.items():
        assert f"{count:,} windows left out by the plan {reason}" in page.text
    job = rd.job_report(store)
    assert set(job.stages) <= set(page.words)
    assert all(shard in page.words for shard, *_ in job.slowest)


def test_where_chips_come_from_is_told(page: Page, store: str, chips: rd.Chips) -> None:
    assert "split(" in page.text
    assert "2024-06-30" in page.text, "a step's arguments are whole"
    assert f"[chips]\nsize = 32 # {SCRIPT}" in page.text
    assert page.text.count("not stated") == 4, (
        "licence and attribution of both sources, which no catalog names"
    )
    assert rd.__version__ in page.text
    assert chips.job.digest in page.text


def test_catalogs_name_licence_and_attribution(
    small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(tmp_path / "catalog.toml"))
    rd.register(
        "me/s2", like="sentinel-2-l2a", catalog=small_world.sentinel2, licence="CC-BY-4.0",
        licence_url="https://example.org/by?a=1&b=2", attribution=f"Made by {SCRIPT}",
    )  # fmt: skip
    assert "Made by" in str(rd.datasets()["attribution"].to_pylist()[-1])
    s2 = rd.build("me/s2", date_range=("2024-04-01", "2024-06-30")).harmonize(["red"], time="1MS")
    path = str(tmp_path / "me.zarr")
    s2.chips(64, cell_km=0.64).sample(3).to_zarr(path, progress=False)
    page = Page(report_page(path))
    assert f"Made by {SCRIPT}" in page.words
    (link,) = [attrs for attrs in page.of("a") if not attrs["href"].startswith("#")]
    assert link["href"] == "https://example.org/by?a=1&b=2"
    assert "CC-BY-4.0" in page.words


def test_a_store_of_an_earlier_version_has_a_page(store: str, tmp_path: Path) -> None:
    older = tmp_path / "older.zarr"
    shutil.copytree(store, older)
    (older / PROVENANCE).unlink()
    assert "Not kept: an earlier version wrote this store." in Page(report_page(older)).text


def test_report_writes_the_page(store: str, tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "report.html"
    path.parent.mkdir()
    assert rd.report(store, path) == str(path)
    assert path.stat().st_size < 3_000_000
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@given(st.integers(1, 6), st.integers(1, 700))
def test_a_page_stays_small_however_many_sources_and_slots(splits: int, columns: int) -> None:
    most, side = sizes(splits, columns)
    assert 1 <= most <= PER_SPLIT
    assert 8 <= side <= LARGEST_PX
    assert most * splits * columns * side * side * 4 <= PICTURES_NBYTES


class Proxy(BaseHTTPRequestHandler):
    """Notes what it is asked for, and gives nothing."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(403)

    do_POST = do_HEAD = do_CONNECT = do_GET  # noqa: N815


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[[Path, int, int], tuple[NDArray[Any], list[str]]]]:
    """Return a function: page, width, colour scheme -> its picture, and what it asked others for."""
    if CHROMIUM is None:
        pytest.skip("no chromium")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def look(page: Path, width: int, scheme: int) -> tuple[NDArray[Any], list[str]]:
        Proxy.asked.clear()
        picture = tmp_path / f"{page.stem}.png"
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--proxy-server=http://127.0.0.1:{server.server_port}", "--proxy-bypass-list=<-loopback>",
            f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={width},900", f"--screenshot={picture}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=240)
        others = [url for url in Proxy.asked if not re.search(r"google|gstatic|gvt1", url)]  # its own updates
        return imagecodecs.png_decode(picture.read_bytes()), others

    yield look
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("scheme", "width"), [(0, 400), (1, 1400)], ids=["dark and narrow", "light and wide"]
)
def test_a_browser_shows_it_and_asks_nobody(
    text: str, tmp_path: Path, browse: Callable[..., tuple[NDArray[Any], list[str]]], scheme: int, width: int
) -> None:
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    image, others = browse(tmp_path / "report.html", width, scheme)
    assert image.shape[:2] == (900, width)
    corner = int(image[2, 2, :3].max())
    assert corner < 60 if scheme == 0 else corner > 240
    assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 50
    assert not others


def test_a_page_that_asked_would_be_seen(
    tmp_path: Path, browse: Callable[..., tuple[NDArray[Any], list[str]]]
) -> None:
    (tmp_path / "asks.html").write_text('<img src="http://elsewhere.example/x.png">')
    assert browse(tmp_path / "asks.html", 400, 1)[1] == ["http://elsewhere.example/x.png"]
