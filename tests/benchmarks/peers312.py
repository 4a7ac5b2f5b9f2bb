"""rasteret and lazycogs on a job; they need Python 3.12 and hence run in an environment of their own.

``peers312.py ITEMS.json FOLDER`` writes what they read from there: rasteret's collection and STAC GeoParquet.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from contender import Prepared
from jobs import Box, Job
from numpy.typing import NDArray
from obstore.store import HTTPStore

MARGIN_M = 1.0
"""rasteret widens an area to whole pixels: this much smaller, a box is exactly its own pixels."""


def rasteret_blocks(job: Job, concurrent: int = 50) -> Prepared:
    """Prepare one read of all boxes as areas."""
    size = round((job.boxes[0][2] - job.boxes[0][0]) / job.resolution)
    run = _rasteret(job, list(job.boxes), concurrent)
    return Prepared(run, lambda found: _cut(job, _by_area(job, found, len(job.boxes)), size))


def rasteret_chips(job: Job, concurrent: int = 50) -> Prepared:
    """Prepare one read of all chips as areas."""
    run = _rasteret(job, list(job.chips()), concurrent)
    return Prepared(run, lambda found: iter(_by_area(job, found, job.count)))


def _rasteret(job: Job, areas: list[Box], concurrent: int) -> Any:
    import rasteret
    import shapely
    from rasteret.cloud import ObstoreBackend

    collection = rasteret.load(f"{job.peers}/rasteret_records")
    root = _root(job.load_items())
    backend = ObstoreBackend(_store(root), url_prefix=f"{root}/")
    shapes = [shapely.box(w + MARGIN_M, s + MARGIN_M, e - MARGIN_M, n - MARGIN_M) for w, s, e, n in areas]

    def run() -> NDArray[Any]:
        return collection.get_numpy(  # type: ignore[no-any-return]
            geometries=shapes, bands=list(job.bands), geometry_crs=job.epsg, all_touched=True,
            backend=backend, max_concurrent=concurrent,
        )  # fmt: skip

    return run


def _by_area(job: Job, found: NDArray[Any], areas: int) -> NDArray[Any]:
    """Turn (record and area, band, y, x) to (area, time, band, y, x), north-up."""
    times = len(job.load_items())
    whole = found.reshape(times, areas, len(job.bands), *found.shape[-2:]).swapaxes(0, 1)
    return whole[..., ::-1, :] if job.planar else whole


def lazycogs_boxes(job: Job, threads: int) -> Prepared:
    """Prepare one lazy array a box, several loaded at the same time."""
    import duckdb_extension_icu  # wheels that bring what DuckDB would download
    import duckdb_extension_json
    import duckdb_extension_parquet
    import duckdb_extension_spatial
    import lazycogs
    import rustac

    folder = Path(job.peers) / "duckdb"
    modules = (
        duckdb_extension_icu,
        duckdb_extension_json,
        duckdb_extension_parquet,
        duckdb_extension_spatial,
    )
    for module in modules:
        for file in Path(str(module.__file__)).parent.glob("extensions/*/*.duckdb_extension"):
            place = folder / file.parent.name / "linux_amd64" / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.symlink_to(file)
    client = rustac.DuckdbClient(extension_directory=str(folder), install_extensions=False)
    store = _store(_root(job.load_items()))

    def box(bounds: Box) -> NDArray[Any]:
        array = lazycogs.open(
            f"{job.peers}/items.parquet", bbox=bounds, crs=f"EPSG:{job.epsg}", resolution=job.resolution,
            bands=list(job.bands), dtype=job.dtype, nodata=job.nodata, store=store, duckdb_client=client,
            time_period=None,
        )  # fmt: skip
        return np.asarray(array.transpose("time", "band", "y", "x").values)

    def run() -> list[NDArray[Any]]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(box, job.boxes))

    return Prepared(run, lambda boxes: _cut(job, boxes, boxes[0].shape[-1]))


def _cut(job: Job, boxes: Any, side: int) -> Iterator[NDArray[Any]]:
    size = job.chip_px
    for box in boxes:
        if box.shape[-2:] != (side, side):
            raise SystemExit(f"a box of {box.shape[-2:]} pixels where {side} were asked for")
        for row in range(0, side, size):
            for col in range(0, side, size):
                yield box[..., row : row + size, col : col + size]


def _root(items: list[dict[str, Any]]) -> str:
    url = urlsplit(next(iter(items[0]["assets"].values()))["href"])
    return f"{url.scheme}://{url.netloc}"


def _store(root: str) -> HTTPStore:
    return HTTPStore.from_url(root, client_options={"allow_http": True})


def index(items: list[dict[str, Any]], folder: Path) -> None:
    """Write both peers' indexes of the items; rasteret reads every header for its own."""
    import pyarrow as pa
    import rasteret
    import rustac
    import shapely
    from rasteret.cloud import ObstoreBackend

    root = _root(items)
    rustac.write_sync(str(folder / "items.parquet"), items)
    rows = [
        {
            "id": item["id"],
            "datetime": dt.datetime.fromisoformat(item["properties"]["datetime"]).replace(tzinfo=None),
            "geometry": shapely.to_wkb(shapely.geometry.shape(item["geometry"])),
            "assets": {
                band["name"]: {"href": asset["href"], "band_index": number}
                for asset in item["assets"].values()
                for number, band in enumerate(asset["eo:bands"])
            },
            "proj:epsg": np.int32(item["properties"]["proj:epsg"]),
            "bbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), item["bbox"], strict=True)),
        }
        for item in items
    ]
    table = pa.Table.from_pylist(rows)
    at = table.column_names.index("datetime")
    table = table.set_column(at, "datetime", table.column("datetime").cast(pa.timestamp("us")))
    rasteret.build_from_table(
        table, name="rasteret", workspace_dir=str(folder), enrich_cog=True, band_codes=list(rows[0]["assets"]),
        backend=ObstoreBackend(_store(root), url_prefix=f"{root}/"), force=True,
    )  # fmt: skip


if __name__ == "__main__":
    index(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
