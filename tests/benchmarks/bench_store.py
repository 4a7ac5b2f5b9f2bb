"""Chips of a store, read by this package and by others: ``bench_store.py``.

One store of the made-up world's chips is written; formats of others are made from it. Each round takes every way once,
in turn, in this process, with servers in processes of their own; first all arrays are compared. Printed are the median
CPU seconds (all threads) and wall seconds for a thousand chips, and CPU over that of tensorstore.

- ``stream``: shuffled batches of 32, the very same for all who can be told the order; the others shuffle as they do.
- ``take``: 32 random chips. ``one``: a random chip.
- *local*: files in the page cache. *30 ms*: nginx on loopback. *S3*: moto, which takes some 10 ms of its own a request.

Who is not installed, or cannot read at a place, stands in the table with the reason: tensorstore, zarrs, xbatcher,
webdataset, litdata, mosaicml-streaming. ``--chips 160 --rounds 1`` takes a minute or two.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import report
from nginx import Nginx
from numpy.typing import NDArray
from store_formats import Loader, make_formats
from store_made import made_store

from rasteret_dask.net import remote
from rasteret_dask.storeset import StoredChips, open_chips

BATCH = 32
EPOCHS = 2
LATENCY_MS = 30.0
BUCKET = "chips"
NEEDS = {"tensorstore": "tensorstore", "zarr-python": "zarr", "zarrs": "zarrs", "xbatcher": "xbatcher"}
"""Way -> the module that it needs."""

Pixels: TypeAlias = "tuple[NDArray[Any], NDArray[Any]]"
"""Pixels (chip, time, band, y, x) and where they are valid (chip, time, y, x)."""

Take: TypeAlias = Callable[[Sequence[int]], Pixels]
"""Chips by their rows."""

Streamed: TypeAlias = Callable[[Sequence[NDArray[np.int64]], int], Iterator[Pixels]]
"""Batches, in the order told, or in one of the way's own by a seed."""


@dataclass
class Way:
    """How somebody reads chips at one place."""

    name: str
    place: str
    take: Take | None = None
    """Chips by their rows."""
    stream: Streamed | None = None
    """Batches, in the order told, or in one of the way's own by a seed."""
    ordered: bool = True
    """Whether batches come in the order told."""
    spent: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Job -> CPU and wall seconds a chip, a round each."""


def by_us(opened: StoredChips, place: str) -> Way:
    """Return this package's way."""
    source, ids = opened.stored.map.sources[0], list(opened)

    def pixels(arrays: dict[str, NDArray[Any]]) -> Pixels:
        return arrays[source], arrays[f"{source}/valid"]

    def stream(order: Sequence[NDArray[np.int64]], seed: int) -> Iterator[Pixels]:
        return map(pixels, opened.stream(BATCH, shuffle=seed, epochs=EPOCHS))

    def take(rows: Sequence[int]) -> Pixels:
        if len(rows) == 1:
            one = pixels(opened[ids[rows[0]]])
            return one[0][None], one[1][None]
        return pixels(opened.take([ids[row] for row in rows]))

    return Way("rasteret_dask", place, take, stream)


def by_tensorstore(url: str, place: str) -> Way:
    """Return tensorstore's: rows of a batch at once, two batches ahead."""
    import tensorstore as ts

    arrays = [
        ts.open(
            {"driver": "zarr3", "kvstore": _kvstore(f"{url}/{name}/")}, open=True, recheck_cached_data=False
        ).result()
        for name in _names(url)
    ]

    def begun(rows: Sequence[int] | NDArray[np.int64]) -> list[Any]:
        index = np.asarray(rows)
        return [array[int(index[0]) if len(index) == 1 else index].read() for array in arrays]

    def ended(under_way: list[Any]) -> Pixels:
        found = [one.result() for one in under_way]
        return _with_valid(
            [v if v.ndim >= 5 or (n and v.ndim == 4) else v[None] for n, v in enumerate(found)]
        )

    def stream(order: Sequence[NDArray[np.int64]], seed: int) -> Iterator[Pixels]:
        under_way = [begun(rows) for rows in order[:2]]
        for number in range(len(order)):
            batch = ended(under_way.pop(0))
            if number + 2 < len(order):
                under_way.append(begun(order[number + 2]))
            yield batch

    return Way("tensorstore", place, lambda rows: ended(begun(rows)), stream)


def by_zarr(url: str, place: str, rust: bool) -> Way:
    """Return zarr-python's, with its own codecs or those of zarrs: the chips of a batch at the same time."""
    import zarr

    pipeline = "zarrs.ZarrsCodecPipeline" if rust else "zarr.core.codec_pipeline.BatchedCodecPipeline"
    if rust:
        importlib.import_module("zarrs")
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        group = zarr.open_group(_zarr_store(url, rust), mode="r")
        arrays: list[Any] = [group[name] for name in _names(url)]
    threads = ThreadPoolExecutor(BATCH)

    def take(rows: Sequence[int] | NDArray[np.int64]) -> Pixels:
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            # one by one, at the same time: its selection of rows makes an index of each pixel in a shard
            found = [[threads.submit(array.__getitem__, int(row)) for row in rows] for array in arrays]
            return _with_valid([np.stack([one.result() for one in chips]) for chips in found])

    def stream(order: Sequence[NDArray[np.int64]], seed: int) -> Iterator[Pixels]:
        return map(take, order)

    return Way("zarr-python with zarrs" if rust else "zarr-python", place, take, stream)


def by_xbatcher(url: str, place: str) -> Way:
    """Return xbatcher's: batches of neighbours, in order, of arrays that xarray opens without Dask."""
    import xarray as xr
    import xbatcher

    names, store = _names(url), _zarr_store(url, rust=False)
    whole = xr.open_zarr(store, chunks=None, mask_and_scale=False)[names].drop_vars("time", errors="ignore")

    def stream(order: Sequence[NDArray[np.int64]], seed: int) -> Iterator[Pixels]:
        for batch in xbatcher.BatchGenerator(whole, {**whole.sizes, "chip": BATCH}):
            loaded = batch.load()
            yield _with_valid([loaded[name].values for name in names])

    return Way("xbatcher, in order", place, None, stream, ordered=False)


def by_format(loader: Loader, place: str) -> Way:
    """Return that of a format of its own."""
    return Way(
        loader.name, place, loader.take, lambda order, seed: loader.stream(BATCH, EPOCHS, seed), ordered=False
    )


def _with_valid(arrays: list[NDArray[Any]]) -> Pixels:
    pixels, *rest = arrays
    return pixels, rest[0].astype(bool, copy=False) if rest else np.isfinite(pixels).all(axis=2)


def _names(url: str) -> list[str]:
    group = open_chips(url).stored.map.first[0]
    return [name for name in ("pixels", "valid") if name in group.arrays]


def _kvstore(url: str) -> dict[str, Any]:
    if url.startswith("http"):
        return {"driver": "http", "base_url": url}
    if url.startswith("s3://"):
        bucket, _, path = url.removeprefix("s3://").partition("/")
        place = {"bucket": bucket, "path": path, "endpoint": os.environ["AWS_ENDPOINT_URL"]}
        return {"driver": "s3", "aws_region": os.environ["AWS_REGION"], **place}
    return {"driver": "file", "path": url}


def _zarr_store(url: str, rust: bool) -> Any:
    from obstore.store import HTTPStore, S3Store
    from zarr.storage import ObjectStore

    if url.startswith("http"):
        return ObjectStore(HTTPStore.from_url(url, client_options={"allow_http": True}), read_only=True)
    if url.startswith("s3://"):
        bucket, _, path = url.removeprefix("s3://").partition("/")
        return ObjectStore(S3Store(bucket, prefix=path, client_options={"allow_http": True}), read_only=True)
    return url


# Jobs


def orders(opened: StoredChips) -> Callable[[int], list[NDArray[np.int64]]]:
    """Return what says, for a seed, which rows each of our batches has."""
    stream = opened.stream(BATCH, epochs=EPOCHS)
    sizes, starts = stream.order.sizes, np.cumsum([0, *stream.order.sizes])

    def of(seed: int) -> list[NDArray[np.int64]]:
        order = opened.stream(BATCH, shuffle=seed, epochs=EPOCHS).order
        rows = []
        for epoch in (order.epoch(number) for number in range(EPOCHS)):
            for batch in epoch.batches:
                whole = np.empty(batch.size, np.int64)
                for at, part, places in batch.parts:
                    visit = epoch.visits[at]
                    whole[places] = starts[visit.shard] + visit.rows[part]
                rows.append(whole)
        return rows

    assert len(sizes) == len(starts) - 1
    return of


def compare(ways: Sequence[Way], opened: StoredChips, order: list[NDArray[np.int64]]) -> None:
    """Compare all that the ways give, chip by chip, with each other."""
    wanted, valid = by_us(opened, "").take(range(len(opened)))  # type: ignore[misc]
    whole = sum(map(len, order))
    expected_digests = [hash(p.tobytes() + m.tobytes()) for p, m in zip(wanted, valid, strict=True)] * EPOCHS
    for way in ways:
        for rows in ([5], list(range(3, len(opened), 41))):
            if way.take is not None:
                for found, expected in zip(way.take(rows), (wanted[rows], valid[rows]), strict=True):
                    np.testing.assert_array_equal(found, expected, err_msg=way.name)
        if way.stream is None:
            continue
        count, digests = 0, []
        for number, (pixels, mask) in enumerate(way.stream(order, 0)):
            if way.ordered:
                np.testing.assert_array_equal(pixels, wanted[order[number]], err_msg=way.name)
                np.testing.assert_array_equal(mask, valid[order[number]], err_msg=way.name)
            digests += [hash(p.tobytes() + m.tobytes()) for p, m in zip(pixels, mask, strict=True)]
            count += len(pixels)
        assert count == whole if way.ordered else count > whole // EPOCHS - BATCH, (way.name, count)
        strange = Counter(digests) - Counter(expected_digests)
        assert not strange, way.name


def measure(ways: Sequence[Way], chips: int, order: list[NDArray[np.int64]], seed: int, few: bool) -> None:
    """Take each way once."""
    rng = np.random.default_rng(seed)
    takes = [rng.choice(chips, BATCH, replace=False).tolist() for _ in range(4 if few else 20)]
    ones = [[int(row)] for row in rng.choice(chips, 20 if few else 200)]
    for way in ways:
        if way.take is not None:
            for job, wanted in (("take", takes), ("one", ones)):
                _timed(way, job, partial(_taken, way.take, wanted))
        if way.stream is not None:
            _timed(way, "stream", partial(_streamed, way.stream, order, seed))


def _taken(take: Take, lists: Sequence[Sequence[int]]) -> int:
    """Return how many chips some takes give."""
    return sum(len(take(rows)[0]) for rows in lists)


def _streamed(stream: Streamed, order: Sequence[NDArray[np.int64]], seed: int) -> int:
    """Return how many chips a stream gives."""
    return sum(len(pixels) for pixels, _ in stream(order, seed))


def _timed(way: Way, job: str, call: Callable[[], int]) -> None:
    cpu, wall = time.process_time(), time.perf_counter()
    chips = call()
    spent = ((time.process_time() - cpu) / chips, (time.perf_counter() - wall) / chips)
    way.spent.setdefault(job, []).append(spent)


# Places


@contextmanager
def bucket(store: Path) -> Iterator[str]:
    """Serve a copy of the store as S3 does, from a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    keys = {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}
    os.environ.update({f"AWS_{name}": value for name, value in keys.items()})
    try:
        for _ in range(300):
            with suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
                break
            time.sleep(0.1)
        url = f"s3://{BUCKET}/{store.name}"
        for path in sorted(p for p in store.rglob("*") if p.is_file()):
            remote.put(remote.join(url, path.relative_to(store).as_posix()), path.read_bytes())
        yield url
    finally:
        server.terminate()
        server.wait(10)


def ways_at(url: str, place: str, missing: dict[str, str]) -> list[Way]:
    """Return who can read a store at a place."""
    makers: dict[str, Callable[[], Way]] = {
        "tensorstore": lambda: by_tensorstore(url, place),
        "zarr-python": lambda: by_zarr(url, place, rust=False),
        "zarrs": lambda: by_zarr(url, place, rust=True),
        "xbatcher": lambda: by_xbatcher(url, place),
    }
    ways = [by_us(open_chips(url), place)]
    for name, make in makers.items():
        if importlib.util.find_spec(NEEDS[name]) is None:
            missing[name] = "not installed"
            continue
        try:
            way = make()
            if way.take is not None:
                way.take([0])
        except (ImportError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError) as error:
            missing[f"{name}, {place}"] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        else:
            ways.append(way)
    return ways


def table(ways: Sequence[Way], missing: dict[str, str]) -> str:
    """Return a Markdown table: a row a place and way."""
    lines = [
        "| place | way | stream: CPU ms, wall ms | take 32 | one | CPU of tensorstore's: stream, take, one |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for way in ways:
        base = next((w for w in ways if w.place == way.place and w.name == "tensorstore"), None)
        cells, ratios = [], []
        for job in ("stream", "take", "one"):
            if job not in way.spent:
                cells.append("")
                ratios.append("-")
                continue
            cells.append(
                " / ".join(f"{statistics.median(v) * 1e3:.2f}" for v in zip(*way.spent[job], strict=True))
            )
            pairs = [] if base is None else zip(way.spent[job], base.spent[job], strict=True)
            ratios.append(f"{statistics.median(a[0] / b[0] for a, b in pairs):.2f}" if base else "")
        lines.append(f"| {way.place} | {way.name} | {' | '.join(cells)} | {', '.join(ratios)} |")
    lines += [f"| | {name} | not run: {why} | | | |" for name, why in missing.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--places", nargs="*", default=["local", "30 ms", "S3"])
    parser.add_argument("--ways", nargs="*", help="who reads, by the names above; all, where it is not given")
    parser.add_argument(
        "--chips", type=int, help="chips of the store that is made; all, where it is not given"
    )
    parser.add_argument("--store", type=Path, help="a store that is there, of one split and source")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-train")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = parser.parse_args()
    store = given.store or made_store(given.folder, 128, chips=given.chips)
    opened = open_chips(store)
    order_of = orders(opened)
    missing: dict[str, str] = {}
    ways: list[Way] = []
    with ExitStack() as stack:
        for place in given.places:
            here: list[Way]
            if place == "local":
                here = ways_at(str(store), place, missing)
                loaders = make_formats(opened, given.folder / f"formats-{store.stem}", missing)
                here += [by_format(loader, place) for loader in loaders]
            elif place == "S3":
                here = ways_at(stack.enter_context(bucket(store)), place, missing)
            else:
                server = stack.enter_context(Nginx(store.parent))
                here = ways_at(f"{server.url}/{store.name}", place, missing)
                server.latency(LATENCY_MS, LATENCY_MS)
            here = [w for w in here if given.ways is None or any(name in w.name for name in given.ways)]
            compare(here, opened, order_of(0))
            for seed in range(given.rounds):
                measure(here, len(opened), order_of(seed), seed, few=place != "local")
            ways += here
            print(table(ways, missing), flush=True)
    if given.write:
        title = f"{len(opened)} chips of {opened.stored.map.first[0].arrays['pixels'].shape[1:]}"
        report.put("store", f"## Reading stores\n\n{title}; milliseconds a chip.\n\n{table(ways, missing)}")


if __name__ == "__main__":
    main()
