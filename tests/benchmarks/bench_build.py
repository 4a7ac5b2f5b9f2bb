"""Memory and time of building a table from a STAC API: ``python bench_build.py --items 50000``.

The API runs in a process of its own. Headers are those of a 10980-pixel Sentinel-2 band with its overviews: made up in
memory (``--headers made``), or served over HTTP, one request a file (``--headers http``), or not read (``none``).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from concurrent.futures import Future
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.transform import Affine
from stac_api import generated, serving_stac

from rasteret_dask.building import build
from rasteret_dask.headers.reader import Header, read_headers

ASSETS = ("blue", "green", "red", "nir", "scl")
BOX = (0.0, 40.0, 40.0, 60.0)


def scene(path: Path) -> None:
    """Write a band of 10980 x 10980 pixels with four overviews, almost all of it sparse."""
    profile = {"driver": "GTiff", "dtype": "uint16", "count": 1, "width": 10980, "height": 10980, "nodata": 0}
    with rasterio.open(
        path, "w", **profile, crs="EPSG:32632", transform=Affine(10, 0, 399960, 0, -10, 4900020), tiled=True,
        blockxsize=1024, blockysize=1024, compress="deflate", predictor=2, SPARSE_OK=True,
    ) as to:  # fmt: skip
        to.write(np.ones((1, 1024, 1024), "uint16"), window=((0, 1024), (0, 1024)))
    with rasterio.open(path, "r+") as to:
        to.build_overviews([2, 4, 8, 16], Resampling.nearest)


class MadeReader:
    """Gives each file the same header with tiles in places of its own, without asking anybody."""

    header: Header

    def __init__(self) -> None:
        self._random = random.Random(1)

    def __enter__(self) -> MadeReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def submit(self, href: str) -> Future[Header | str]:
        """Return a header."""
        pages = []
        at = 10_000
        for page in self.header.pages:
            counts = tuple(self._random.randrange(500_000, 1_500_000) for _ in page.tile_offsets)
            offsets = []
            for count in counts:
                offsets.append(at)
                at += count + 8
            pages.append(replace(page, tile_offsets=tuple(offsets), tile_byte_counts=counts))
        done: Future[Header | str] = Future()
        done.set_result(replace(self.header, pages=tuple(pages), size=at))
        return done


def files(path: Path) -> ThreadingHTTPServer:
    """Serve one file under every name, ranges and all."""
    data = path.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def log_message(self, *_: object) -> None:
            return

        def do_GET(self) -> None:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            low, high = int(first), min(int(last), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {low}-{high}/{len(data)}")
            self.send_header("Content-Length", str(high - low + 1))
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.end_headers()
            self.wfile.write(data[low : high + 1])

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def serve(count: int, scene_path: str, told: Any, stop: Any) -> None:
    """Run both servers until told to stop."""
    scene(Path(scene_path))  # here, as its memory is not what is measured
    server = files(Path(scene_path))
    Thread(target=server.serve_forever, daemon=True).start()
    href = f"http://127.0.0.1:{server.server_port}/{{id}}/{{asset}}.tif"
    with serving_stac(generated(count, href=href, assets=ASSETS)) as api:
        told.put(api.url)
        stop.wait()


def peak_mb() -> float:
    """Return the most memory that this process has held, MB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM"))) / 1000


def main() -> None:
    """Build, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--headers", choices=["made", "http", "none"], default="made")
    parser.add_argument("--keep", help="a folder for the table")
    chosen = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.tif"
        told, stop = context.Queue(), context.Event()
        server = context.Process(target=serve, args=(chosen.items, str(path), told, stop))
        server.start()
        url = told.get()
        if chosen.headers == "made":
            header = read_headers([str(path)])[str(path)]
            assert isinstance(header, Header), header
            MadeReader.header = header
            vars(sys.modules["rasteret_dask.ingest.pages"])["HeaderReader"] = MadeReader
        before, start, cpu = peak_mb(), time.monotonic(), time.process_time()
        made = build(
            "earthsearch/sentinel-2-l2a", name="s2", bbox=BOX, stac_api=url, headers=chosen.headers != "none",
            cache_dir=chosen.keep or folder, progress=False,
        )  # fmt: skip
        took = time.monotonic() - start
        size = os.path.getsize(made.dataset.files[0])
        print(
            f"{chosen.items} items, headers {chosen.headers}: {took:.1f} s ({time.process_time() - cpu:.1f} s CPU), "
            f"{peak_mb():.0f} MB at most ({before:.0f} MB before), table of {size / 1e6:.0f} MB, {len(made)} rows"
        )
        stop.set()
        server.join()


if __name__ == "__main__":
    main()
