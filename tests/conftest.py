"""What tests share: real data, one made-up world, processes that start fast, and a web server that answers ranges."""

from __future__ import annotations

import atexit
import copy
import functools
import gc
import hashlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dask.config
import locket
import pytest
from hypothesis import settings
from ports import no_port_twice
from processes import fork_from_one
from servers import RangeServer, serving

import rasteret_dask as rd
from rasteret_dask.demo.world import World, WorldSize, make_world
from rasteret_dask.net import gate, limits, web
from rasteret_dask.reader.sharing import SHARED
from rasteret_dask.statistics import measuring

DATA = Path(os.environ.get("RASTERET_DASK_DATA", Path(__file__).parents[2] / "shared" / "data"))


# However busy the machine; where CI is set, the same examples each time.
settings.register_profile(
    "any load", settings.get_profile("ci" if "CI" in os.environ else "default"), deadline=None
)
settings.load_profile("any load")


def pytest_configure() -> None:
    """Let processes that tests start hear Ctrl-C: what a shell runs in the background ignores it, children too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    no_port_twice()
    gc.disable()  # until all modules are imported: none of that is garbage


def pytest_collection_finish() -> None:
    """Start the workers of Dask clusters in the short way; a test that needs the long one asks for it.

    Not before all modules are imported: there is one list of what is preloaded, and torch's tests set it. That million
    of objects stays, and no collection of garbage looks at it again.
    """
    fork_from_one()
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries look at what is left when the interpreter ends
    gc.enable()


@pytest.fixture(autouse=True)
def _settings_pass() -> Iterator[None]:
    """Bring Dask's configuration back to what it was: a page that trusts one host only leaves others to later tests."""
    before = copy.deepcopy(dask.config.config)
    yield
    now = dask.config.config  # never empty: threads of clusters read it all the time
    now.update(before)
    for name in now.keys() - before.keys():
        del now[name]


@pytest.fixture(autouse=True, scope="module")
def _nothing_kept() -> None:
    """Forget tiles that this process keeps for a minute after a job that failed: they would not be fetched again."""
    SHARED.clear()


@pytest.fixture(autouse=True)
def _nothing_kept_by_the_last_test() -> None:
    """Forget what this process has read or measured, which it would not do again."""
    SHARED.clear()
    measuring._measured.clear()


@pytest.fixture(autouse=True, scope="module")
def _no_host_outlives_its_tests() -> Iterator[None]:
    """Let go of the threads and connections that a process keeps for each host: of a thousand servers, too many."""
    yield
    limits.pool.cache_clear()
    web._close_idle()
    gate._GATES.clear()


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of real scenes, or skip."""
    if not DATA.is_dir():
        pytest.skip(f"no real data: {DATA} is not there (set RASTERET_DASK_DATA)")
    return DATA


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all processes of this run share: what one of them has made, the others use."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="session")
def small_world(common: Path) -> Iterator[World]:
    """Return a made-up world of 5 x 3.6 km: two overlapping granules, four passes, three Landsat scenes.

    It is made once a run, and no test changes it (one that would takes a copy): that is checked at the end.
    """
    folder = common / "small-world"
    with locket.lock_file(f"{folder}.lock"):
        world = make_world(folder, size=WorldSize(300, 360, 198, tile_px=128))
    before = digests(folder)
    yield world
    assert digests(folder) == before, "a test has changed the world that all tests share"


@pytest.fixture(scope="session")
def s2(small_world: World) -> rd.Collection:
    """Return its Sentinel-2 scenes."""
    return rd.build_from_stac(small_world.sentinel2, name="s2", date_range=("2024-04-01", "2024-06-30"))


@pytest.fixture(scope="session")
def l8(small_world: World) -> rd.Collection:
    """Return its Landsat scenes."""
    return rd.build_from_stac(small_world.landsat, name="l8", date_range=("2024-04-01", "2024-06-30"))


@pytest.fixture(scope="session")
def aef(small_world: World) -> rd.Collection:
    """Return its embeddings."""
    return rd.build_from_stac(small_world.embeddings, name="aef", date_range=("2024-04-01", "2024-06-30"))


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves files and single byte ranges; notes (path, range) of every request."""

    seen: list[tuple[str, str | None]]

    def __init__(self, *args: Any, seen: list[tuple[str, str | None]], **kwargs: Any) -> None:
        self.seen = seen
        super().__init__(*args, **kwargs)

    def log_message(self, *_: object) -> None:
        return

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client went away: no traceback among what a test prints
            super().handle()

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.seen.append((self.path, asked))
        if self.path.startswith("/forbidden"):
            self.send_error(403)
            return
        path = Path(self.translate_path(self.path))
        parts = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        if parts is None or not path.is_file():
            super().do_GET()
            return
        whole = path.read_bytes()
        start, end = int(parts[1]), min(int(parts[2] or len(whole)), len(whole) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(whole)}")
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()
        self.wfile.write(whole[start : end + 1])


@pytest.fixture
def serve() -> Iterator[Callable[[Path], tuple[str, list[tuple[str, str | None]]]]]:
    """Return a function: folder -> (base URL on loopback, the requests it will have seen)."""
    servers: list[ThreadingHTTPServer] = []

    def start(folder: Path) -> tuple[str, list[tuple[str, str | None]]]:
        seen: list[tuple[str, str | None]] = []
        handler = functools.partial(RangeHandler, directory=str(folder), seen=seen)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    """Return a range server of the test's own folder, which notes requests and deals faults."""
    with serving(tmp_path) as running:
        yield running
