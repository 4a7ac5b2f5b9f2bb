# SPDX-License-Identifier: Apache-2.0
"""A small made-up world: real COGs with STAC items in static catalogs, for the demo and for tests.

The ground is a procedural landscape in UTM zone 33N with farmland, forest, water and towns. Over it fly a
Sentinel-2-like and a Landsat-like sensor from April to June 2024, and annual embeddings describe it. Clear
pixels of all sensors show the same reflectance on the same day, but for noise, and nothing needs a network.

Unlike the real thing: Sentinel-2 granules are about 23 x 34 km instead of 110 x 110 km; both sensors share one
spectral response; granules of one pass have clouds and noise of their own, also where they overlap; the embeddings
have no overviews; every touched pixel is flagged in SCL or QA_PIXEL.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rasteret_dask.demo.world import embeddings, landsat, sentinel2
from rasteret_dask.demo.world.files import write_collection, write_json
from rasteret_dask.demo.world.ground import make_ground
from rasteret_dask.demo.world.layout import EPSG, Layout, WorldSize, lonlat_bbox, make_layout
from rasteret_dask.errors import StoreError

__all__ = ["Progress", "World", "WorldSize", "make_world"]

Progress = Callable[[float, str], None]
"""Called with the share done (0..1) and what was done last."""

_VERSION = 2  # raise it whenever the same seed and size make other files
_MARKER = "world.json"
_MAKER = "rasteret_dask.world"
_CREDIT = "Made up by rasteret_dask; no real place was measured."
_COLLECTIONS = (sentinel2.COLLECTION, landsat.COLLECTION, embeddings.COLLECTION)


@dataclass(frozen=True, slots=True)
class World:
    """Where the made-up world's catalogs are, and what they cover."""

    sentinel2: Path
    """``collection.json`` of ``sentinel-2-l2a``."""
    landsat: Path
    """``collection.json`` of ``landsat-c2-l2``."""
    embeddings: Path
    """``collection.json`` of ``aef-v1-annual``."""
    epsg: int
    """CRS of all rasters."""
    bounds: tuple[int, int, int, int]
    """West, south, east, north of the area all three cover, metres in ``epsg``."""
    bbox: tuple[float, float, float, float]
    """West, south, east, north of the same area, degrees."""
    date_range: tuple[str, str]
    """First day, and the day after the last: three monthly slots."""


def make_world(
    folder: Path, *, seed: int = 7, size: WorldSize | None = None, progress: Progress | None = None
) -> World:
    """Make the world once; a finished one of the same seed and size is reused as it is.

    Parameters
    ----------
    folder
        Where it lives: one folder a collection, and a marker file written last. What is left of an
        unfinished world, or of one with another seed, size or version, is removed and made anew.
    seed
        The same seed and size make the same pixels.
    size
        How large it is; by default 36 x 34 km, about a minute's work on two cores.
    progress
        Told what has been done.

    Raises
    ------
    StoreError
        When ``folder`` holds folders of these names that are not a made-up world's.
    """
    size = size or WorldSize()
    folder = Path(folder)
    layout = make_layout(size)
    wanted = {"maker": _MAKER, "version": _VERSION, "seed": seed, "size": asdict(size)}
    if _state(folder) != {**wanted, "finished": True}:
        _clear(folder)
        _mark(folder, {**wanted, "finished": False})
        _make(folder, seed, size, layout, progress or (lambda share, what: None))
        _mark(folder, {**wanted, "finished": True})
    s2, l8, aef = (folder / name / "collection.json" for name in _COLLECTIONS)
    area = layout.optical
    return World(s2, l8, aef, EPSG, area.bounds, lonlat_bbox(area), ("2024-04-01", "2024-07-01"))


def _make(folder: Path, seed: int, size: WorldSize, layout: Layout, progress: Progress) -> None:
    """Write all files; the shares are those of the time each step takes."""
    ground = make_ground(seed, layout.canvas)
    progress(0.2, "ground")
    items = []
    takes = sentinel2.write_scenes(folder / sentinel2.COLLECTION, seed, layout, ground, size.tile_px)
    for number, pair in enumerate(takes, start=1):
        items += pair
        progress(0.2 + 0.45 * number / len(sentinel2.DATATAKES), f"{pair[0]['id']} with its neighbour")
    write_collection(folder / sentinel2.COLLECTION, sentinel2.COLLECTION, _CREDIT, items)
    items = []
    tile_px = max(128, size.tile_px // 4)
    scenes = landsat.write_scenes(folder / landsat.COLLECTION, seed, layout, ground, tile_px)
    for number, scene in enumerate(scenes, start=1):
        items.append(scene)
        progress(0.65 + 0.1 * number / len(landsat.SCENES), scene["id"])
    write_collection(folder / landsat.COLLECTION, landsat.COLLECTION, _CREDIT, items)
    name = "aef_2024_33N"
    path = folder / embeddings.COLLECTION / name / f"{name}.tiff"
    for share in embeddings.write_file(path, seed, ground.window(layout.embeddings), size.tile_px):
        progress(0.75 + 0.25 * share, name)
    item = embeddings.make_item(name, layout.embeddings)
    write_collection(folder / embeddings.COLLECTION, embeddings.COLLECTION, _CREDIT, [item])


def _state(folder: Path) -> object:
    """Return what the marker says, or None where there is none that can be read."""
    try:
        return json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _mark(folder: Path, state: dict[str, object]) -> None:
    """Replace the marker in one step, so that it is never half-written."""
    write_json(folder / f"{_MARKER}.new", state)
    os.replace(folder / f"{_MARKER}.new", folder / _MARKER)


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    found = [folder / name for name in (*_COLLECTIONS, _MARKER) if (folder / name).exists()]
    state = _state(folder)
    if found and not (isinstance(state, dict) and state.get("maker") == _MAKER):
        raise StoreError(
            f"making the made-up world in {folder}",
            f"{', '.join(path.name for path in found)} of another origin",
            "an empty folder, or one that a made-up world was made in before",
            "Choose another folder.",
        )
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
