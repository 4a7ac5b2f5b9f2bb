"""Laws of what sessions of one process share: nobody waits for ever or pays for another's error, nothing stays."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
import warnings
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Fault, RangeServer
from test_engine import indexed, noise
from test_reader import own_grid, read, write
from test_real_data import table_of
from waiting import PATIENCE_S, held_for, until

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.errors import RasteretDaskError, ReadError
from rasteret_dask.net import remote
from rasteret_dask.net.limits import BUDGET
from rasteret_dask.reader import sharing
from rasteret_dask.reader.engine import Session
from rasteret_dask.reader.pixelgrid import Rect, Window
from rasteret_dask.reader.placing import Block, Out
from rasteret_dask.reader.readplan import Request
from rasteret_dask.reader.sharing import SHARED, Flight, Keep, Key, Pixels, Sharing, Wish
from rasteret_dask.table.records import Asset

# What the numbers are does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning")

HEIGHT, WIDTH = 64, 96  # 4 x 3 tiles of 16 x 32
PIXELS = noise(HEIGHT, WIDTH)
WHOLE = (Window(0, 0, HEIGHT, WIDTH),)
FIRST = (Window(0, 0, 8, 8),)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)


def request(asset: Asset, windows: tuple[Window, ...] = WHOLE) -> Request:
    return Request(asset, own_grid(asset), windows)


def file(folder: Path, name: str = "a.tif", bands: int = 1, **profile: Any) -> Path:
    return write(folder / name, noise(HEIGHT, WIDTH, bands), **{"compress": "deflate", **profile})


# A tile, and who wishes for it

KEY: Key = ("a.tif", None, None, 0, 0, 0)
TILE = Rect(0, 8, 0, 8)
RAMP = Pixels(np.arange(64, dtype=np.uint8).reshape(1, 8, 8), None, TILE)


def fly(shared: Sharing, asset: Asset, *wishes: Wish) -> Flight:
    """Let several readers wish for one tile; return its flight."""
    flights = [shared.join(KEY, asset, wish)[1] for wish in wishes]
    assert flights[0] is not None
    assert all(flight is flights[0] for flight in flights)
    return flights[0]


@pytest.fixture
def asset(tmp_path: Path) -> Asset:
    return indexed(file(tmp_path))[0]


def test_a_tile_goes_once_to_all_who_wish_for_it_and_to_nobody_who_gave_up(asset: Asset) -> None:
    shared, got = Sharing(1000), list[int]()
    wishes = [
        Wish(TILE, lambda _, n=n: got.append(n), None, lambda n=n: n != 1)  # type: ignore[misc]
        for n in range(3)
    ]
    flight = fly(shared, asset, *wishes)
    shared.land(flight, RAMP)
    assert flight.over
    assert [wish.done.has_ended for wish in wishes] == [True] * 3
    assert got == [0, 2]


def test_nothing_is_kept_for_a_reader_that_gave_up(asset: Asset) -> None:
    """It has closed before the tile that another reader still waits for comes; nobody would ever take it away."""
    shared, alive = Sharing(1000), [True]
    gone = Wish(TILE, lambda _: None, Keep(TILE, frozenset([-1])), lambda: alive[0])
    flight = fly(shared, asset, gone, Wish(TILE, lambda _: None, None, lambda: True))
    alive[0] = False
    shared.finish(-1)
    shared.land(flight, RAMP)
    _, again, _ = shared.join(KEY, asset, Wish(TILE, lambda _: None, None, lambda: True))
    assert again is not None


def test_a_reader_that_cannot_take_a_tile_does_not_take_it_from_the_others(asset: Asset) -> None:
    shared, got = Sharing(1000), list[Pixels]()

    def refuse(_: Pixels) -> None:
        raise IndexError("no such sample")

    wishes = [Wish(TILE, paste, None, lambda: True) for paste in (refuse, got.append)]
    shared.land(fly(shared, asset, *wishes), RAMP)
    assert len(got) == 1


@settings(max_examples=100, deadline=None)
@given(
    tiles=st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(0, 7), st.integers(0, 7), st.sets(st.integers(1, 4), min_size=1)
        ),
        max_size=20,
    ),
    nbytes=st.integers(0, 200),
)
def test_what_is_kept_is_right_and_within_its_bound_and_goes_with_those_who_need_it(
    tiles: list[tuple[int, int, int, set[int]]], nbytes: int
) -> None:
    shared, asset = Sharing(nbytes), Any
    for tile, row, col, needs in tiles:
        key = (*KEY[:-1], tile)
        rect = Rect(row, 8, col, 8)
        wish = Wish(rect, lambda _: None, Keep(rect, frozenset(needs)), lambda: True)
        pixels, flight, fresh = shared.join(key, asset, wish)  # type: ignore[arg-type]
        if flight is not None:
            assert fresh
            shared.land(flight, RAMP)
        elif pixels is not None:
            part = pixels.copy(rect)
            np.testing.assert_array_equal(part.values, RAMP.values[:, row:, col:])
        assert shared._held == sum(kept.pixels.nbytes for kept in shared._kept.values()) <= nbytes
    shared.finish(1, 2, 3, 4)
    assert (shared._held, shared._kept, shared._flying) == (0, {}, {})


# Nobody waits for ever (in a process of its own: who waits cannot be stopped)


def said(script: str, *arguments: object) -> str:
    """Run a script in a new process, and return what it printed; it has to end, interpreter and all."""
    opening = """
        import os, sys, threading, time
        from dataclasses import replace
        from pathlib import Path
        from servers import RangeServer, serving
        from test_engine import indexed
        from test_reader import own_grid
        from rasteret_dask.errors import RasteretDaskError
        from rasteret_dask.reader.pixelgrid import Window
        from rasteret_dask.reader.engine import Session
        from rasteret_dask.reader.readplan import Request
        asset = indexed(sys.argv[1])[0]
        def request(asset):
            return Request(asset, own_grid(asset), (Window(0, 0, 8, 8),))
        def read(*assets, on_error="raise"):
            with Session(on_error) as session:
                return session.read_block([request(a) for a in assets])
    """
    text = textwrap.dedent(opening) + textwrap.dedent(script)
    tests = str(Path(__file__).parent)
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", tests)])}
    command = [sys.executable, "-c", text, *map(str, arguments)]
    ran = subprocess.run(command, env=where, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_an_href_without_a_host_fails_every_time(tmp_path: Path) -> None:
    found = said(
        """
        for _ in range(2):
            try:
                read(replace(asset, href="http://[::1/a.tif"))
            except Exception as error:
                print(isinstance(error, RasteretDaskError))
        """,
        file(tmp_path),
    )
    assert found.split() == ["True", "True"]


def test_a_call_that_is_interrupted_while_it_sends_for_tiles_leaves_nobody_waiting(tmp_path: Path) -> None:
    """As by a notebook's stop button: the cell is run again in the same process."""
    found = said(
        """
        import rasteret_dask.reader.engine as reader
        def interrupted(*_):
            raise KeyboardInterrupt
        bring, reader.bring = reader.bring, interrupted
        try:
            read(asset)
        except KeyboardInterrupt:
            print("interrupted")
        reader.bring = bring
        print(read(asset)[0].valid.all())
        """,
        file(tmp_path),
    )
    assert found.split() == ["interrupted", "True"]


def test_failures_among_slow_tiles_leave_nobody_waiting(tmp_path: Path) -> None:
    """While tiles wait to be decoded, requests are held back; those that then fail wake the others too."""
    found = said(
        """
        import rasteret_dask.reader.tilecodec as codec
        decode = codec.decode
        def slowly(*arguments):
            time.sleep(0.02)
            return decode(*arguments)
        codec.decode = slowly
        folder = Path(sys.argv[1]).parent
        with serving(folder) as server:
            for n in range(32):
                os.link(sys.argv[1], folder / f"{n}.tif")
            served = [replace(asset, href=server.url(f"{n}.tif"), etag=None) for n in range(132)]
            print(sum(bool(block.valid.all()) for block in read(*served, on_error="mask")))
        """,
        file(tmp_path),
    )
    assert found.split() == ["32"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_reads_local_files(tmp_path: Path) -> None:
    """Data loaders fork on Linux unless told otherwise; the parent's threads are not in the child."""
    found = said(
        """
        read(asset)
        import warnings
        warnings.simplefilter("ignore")
        child = os.fork()
        if not child:
            threading.Timer(300, os._exit, (9,)).start()
            os._exit(0 if read(asset)[0].valid.all() else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        file(tmp_path),
    )
    assert found.split() == ["0"]


# Nobody pays for another's error


def at_once(*requests: Request) -> list[Block | BaseException]:
    """Read each in a session of its own, at the same time."""
    start = Barrier(len(requests))

    def one(wanted: Request) -> Block | BaseException:
        start.wait(PATIENCE_S)
        try:
            return read(wanted)[0]
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(one, requests))


def test_a_band_that_a_tile_does_not_have_is_the_error_of_who_asks_for_it(server: RangeServer) -> None:
    file(server.folder, bands=3, interleave="pixel")
    (good, *_) = indexed(server.url("a.tif"))
    wrong = replace(good, band_index=7, band="B8", record_id="wrong")
    with held_for(12, server):
        failed, block = at_once(request(wrong), request(good))
    assert isinstance(block, Block), block
    assert isinstance(failed, ReadError), failed
    assert "'B8' of record 'wrong'" in str(failed)


def test_an_error_names_the_record_that_was_asked_for(server: RangeServer) -> None:
    """Two jobs may know one file by two names, and wait for one answer."""
    file(server.folder)
    (one,) = indexed(server.url("a.tif"))
    names = ("mine", "yours")
    with held_for(2, server, fault=Fault(status=404)):
        errors = at_once(*(request(replace(one, record_id=n), FIRST) for n in names))
    for name, error in zip(names, errors, strict=True):
        assert repr(name) in str(error)


def test_every_record_that_loses_pixels_is_named(tmp_path: Path, asset: Asset) -> None:
    gone = replace(asset, href=str(tmp_path / "gone.tif"))
    with Session("mask") as session:
        session.read_block([request(replace(gone, record_id=n), FIRST) for n in ("one", "two")])
    assert all(any(repr(n) in line for line in session.unreadable) for n in ("one", "two"))


def test_a_tile_table_that_is_too_short_loses_only_what_it_lacks(asset: Asset) -> None:
    image = asset.image
    short = replace(image, tile_offsets=image.tile_offsets[:6], tile_byte_counts=image.tile_byte_counts[:6])
    with Session("mask") as session:
        (block,) = session.read_block([request(replace(asset, levels=(short,)))])
    np.testing.assert_array_equal(block.values[0, :32], PIXELS[0, :32])
    assert block.valid[0, :32].all()
    assert not block.valid[0, 32:].any()
    assert len(set(session.unreadable)) == 6


def test_a_stale_record_is_refused_beside_a_fresh_one_of_the_same_file(server: RangeServer) -> None:
    """Two catalogs of one file, one of which was indexed before it changed; their tiles lie side by side."""
    stale, fresh = (indexed(str(file(server.folder, compress="none")))[0] for _ in range(2))
    server.forget()
    stale, fresh = (
        replace(a, href=server.url("a.tif"), etag=etag)
        for a, etag in ((stale, '"old"'), (fresh, indexed(server.url("a.tif"))[0].etag))
    )
    wanted = [request(fresh, FIRST), request(replace(stale, record_id="stale"), (Window(0, 32, 8, 8),))]
    for batch in (wanted, wanted[::-1]):
        with pytest.raises(ReadError, match="'stale'"):
            read(*batch)


HREFS = ("az://container/a.tif", "http://user:secret@127.0.0.1:99999/a.tif?sig=secret", "http://127.0.0.1:1/a//b.tif",
         "http://127.0.0.1:1/a\0b.tif", "/tmp/a\0.tif", "ftp://user:secret@host/a.tif?sig=secret")  # fmt: skip


@pytest.mark.parametrize("href", HREFS)
def test_whatever_the_href_the_error_is_typed_and_names_the_record(
    asset: Asset, href: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    wrong = replace(asset, href=href, size=None, etag=None)
    with pytest.raises(RasteretDaskError, match="'B1' of record 'rec'") as caught:
        read(request(wrong))
    error = caught.value
    assert "secret" not in f"{error!r} {error.__cause__!r} {error.__context__!r}"
    with Session("mask") as session:
        (block,) = session.read_block([request(wrong)])
    assert not block.valid.any()


# Masked, where asked for


def test_what_hides_under_clouds_is_invalid_where_the_cloud_band_cannot_be_read(
    small_world: World, tmp_path: Path
) -> None:
    """A pixel that may be cloud is not clear because nobody could look."""
    folder = Path(shutil.copytree(small_world.sentinel2.parent, tmp_path / "s2"))
    s2 = rd.build_from_stac(folder / "collection.json", name="s2", date_range=("2024-04-01", "2024-06-30"))
    even = s2.harmonize(bands=["red"], resolution=10, time="1MS", mask="clouds")
    chips = even.chips(size=64, cell_km=2.56)
    clean = chips.load()
    assert isinstance(clean, xr.Dataset)
    for path in tmp_path.rglob("SCL.tif"):
        path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rd.errors.UnreadableTilesWarning)
        found = chips.load(on_error="mask")
    assert isinstance(found, xr.Dataset)
    assert (found["valid_fraction"] <= clean["valid_fraction"]).all()
    assert np.isnan(found["pixels"].values[np.isnan(clean["pixels"].values)]).all()


# Nothing stays


@pytest.fixture
def without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("on_error", ["raise", "mask"])
@pytest.mark.parametrize("broken", [False, True])
def test_memory_goes_with_its_last_user(
    asset: Asset, tmp_path: Path, without_gc: None, on_error: str, broken: bool
) -> None:
    """Arrays are not what Python's cycle collector counts: of shards of 100 MB it would leave many."""
    wanted = request(replace(asset, href=str(tmp_path / "gone.tif")) if broken else asset)

    def one() -> weakref.ref[Any]:
        block = Block.empty(wanted)
        with Session(on_error) as session:
            try:
                session.read_into([wanted], [Out(list(block.values), list(block.valid), None)])
            except ReadError:
                assert broken
        return weakref.ref(block.values)

    left = one()
    until(lambda: left() is None)  # the thread that brought the last tile may not have let go of it yet


def jobs(folder: Path, months: int, side: int, tile: int, size: int, resolution: float = 10) -> rd.Chips:
    path = write(
        folder / "a.tif", (noise(side, side) % 9 + 1).astype("uint8"), blockxsize=tile, blockysize=tile,
        compress="deflate",
    )  # fmt: skip
    rows = {}
    for month in range(months):
        href = folder / f"{month}.tif"
        os.link(path, href)
        band = {
            "href": str(href),
            "band_index": 0,
            "scale": 1.0,
            "offset": 0.0,
            "nodata": 0.0,
            "role": "class",
        }
        rows[f"s{month:02}"] = (f"{2000 + month // 12}-{month % 12 + 1:02}-10T10:00:00", {"kind": band})
    source = rd.build_from_table(table_of(rows), name="kinds")
    even = source.harmonize(bands=["kind"], units="raw", resolution=resolution, time="1MS")
    return even.chips(size=size, cell_km=2.56)


def test_pixels_of_a_coarser_grid_are_read_within_bounds(tmp_path: Path) -> None:
    """Of 8 x 8 pixels one is taken: 64 times the output pass through memory, but not at the same time."""
    chips = jobs(tmp_path, months=32, side=2048, tile=512, size=32, resolution=80)
    assert len(list(chips.job.shards())) == 1
    tracemalloc.start()
    try:
        found = chips.load()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(found, xr.Dataset)
    assert found["pixels"].nbytes < 2 * 2**20
    assert most < 64 * 2**20  # all source pixels together: 128 MiB


def test_nothing_is_kept_when_nobody_reads_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone looks at the first chip and goes: what was kept for the shards nearby goes too."""
    SHARED.clear()  # and with it the look that an earlier reader asked for
    chips = jobs(tmp_path, months=1, side=1024, tile=512, size=16)
    assert len(list(chips.job.shards())) > 1
    lazy = chips.to_xarray()
    assert isinstance(lazy, xr.Dataset)
    waits = list[float]()
    with monkeypatch.context() as patch:
        patch.setattr(SHARED, "_look_in", waits.append)
        lazy["pixels"][:1].compute(scheduler="threads")
    assert SHARED._held
    assert set(waits) == {sharing.IDLE_S}  # the last reader has asked for a look, so long afterwards
    monkeypatch.setattr(sharing, "IDLE_S", 0.2)
    with SHARED._lock:
        SHARED._look_in(0.0)  # which comes too early, and asks for another one
    until(lambda: not SHARED._held)


class Some:
    """Tasks one after another, each of which needs some ground of the five after it."""

    def __init__(self, number: int, finished: set[int], west: float, north: float) -> None:
        self.number, self.finished, self._corner = number, finished, (west, north)

    kept_bytes = 0

    def meeting(self, record: str, epsg: int, box: tuple[float, float, float, float]) -> tuple[Any, Any]:
        dice, (west, north) = random.Random(self.number), self._corner
        left = [n for n in range(self.number + 1, self.number + 6) if n not in self.finished]
        boxes = [
            [west + 10 * dice.randrange(60), north - 640, west + 960, north - 10 * dice.randrange(30)]
            for _ in left
        ]
        return np.array(left, np.int64), np.array(boxes).reshape(-1, 4)

    def finish(self) -> list[int]:
        self.finished.add(self.number)
        return [self.number]


def test_whatever_many_sessions_do_at_once_pixels_are_right_and_nothing_stays(server: RangeServer) -> None:
    """Several files, bands, codecs and layouts; some answers fail; some sessions raise, others mask."""
    layouts = [(codec, order) for codec in ("none", "deflate", "zstd") for order in ("pixel", "band")]
    for n, (codec, order) in enumerate(layouts):
        file(server.folder, f"{n}.tif", bands=3, compress=codec, interleave=order)
    assets = [band for n in range(len(layouts)) for band in indexed(server.url(f"{n}.tif"))]
    pixels = noise(HEIGHT, WIDTH, 3)
    server.fault("*", Fault(share=0.03, status=404, seed=3))
    server.fault("[02].tif", Fault(delay_s=0.01, share=0.5))
    finished = set[int]()

    def batch(dice: random.Random) -> list[Request]:
        chosen = dice.choices(assets, k=dice.randrange(1, 8))
        return [
            request(
                a,
                (
                    Window(
                        dice.randrange(50), dice.randrange(60), dice.randrange(1, 14), dice.randrange(1, 36)
                    ),
                ),
            )
            for a in chosen
        ]

    def assert_right(wanted: Sequence[Request], blocks: Sequence[Block], whole: bool) -> None:
        for one, block in zip(wanted, blocks, strict=True):
            w = one.windows[0]
            expected = pixels[one.asset.band_index, w.row : w.row + w.height, w.col : w.col + w.width]
            np.testing.assert_array_equal(block.values[0][block.valid[0]], expected[block.valid[0]])
            assert not whole or block.valid.all()

    def task(number: int) -> int:
        dice, right = random.Random(number), 0
        later = Some(number, finished, assets[0].image.transform[2], assets[0].image.transform[5])
        with Session(dice.choice(["raise", "mask"]), later) as session:
            for _ in range(dice.randrange(1, 4)):
                wanted = batch(dice)
                try:
                    blocks = session.read_block(wanted, wanted[:1] if dice.random() < 0.5 else ())
                except ReadError:
                    continue  # a session that has raised reads on
                assert_right(wanted, blocks, whole=session.counts.tiles_masked == 0)
                right += 1
        return right

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(task, range(10_000, 10_200))) > 200
    SHARED.finish(*range(10_200, 10_206))  # the tasks after the last
    # those who gave up do not wait for what is on its way
    until(lambda: not SHARED._flying and BUDGET._free == BUDGET.nbytes)
    assert (SHARED._held, SHARED._kept) == (0, {})
