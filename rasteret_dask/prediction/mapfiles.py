# SPDX-License-Identifier: Apache-2.0
"""A map as Cloud Optimized GeoTIFFs: a folder of them, each a unit of work; or one a zone."""

from __future__ import annotations

import json
import posixpath
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.errors import RasteretDaskError, StoreError
from rasteret_dask.formats import MAP_FILE, MEANING
from rasteret_dask.net import remote
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.prediction.cogs import (
    Block,
    array_blocks,
    cog_bytes,
    cog_note,
    is_empty,
    pad,
    write_cog,
)
from rasteret_dask.prediction.cogtiles import (
    CogTiles,
    MapHeader,
    MapTile,
    tile_header,
    tile_name,
    vrt_bytes,
    vrt_name,
)
from rasteret_dask.prediction.mapgrid import MapBlock, MapGrid
from rasteret_dask.prediction.maps import MapPlan
from rasteret_dask.prediction.mapstore import COUNT, INPUTS
from rasteret_dask.prediction.openmap import TILES, open_map
from rasteret_dask.prediction.outputs import ModelOutput
from rasteret_dask.prediction.vectors import remove_work
from rasteret_dask.store.encode import Piece
from rasteret_dask.store.jobreport import JobReport
from rasteret_dask.store.limits import Bounds
from rasteret_dask.store.unitruns import Visible, write_units

__all__ = ["TileLayout", "header_of", "write_cogs", "write_tiles"]

EXTRAS = (COUNT, INPUTS)
"""Maps that lie beside the map, in folders of their own."""

ROOT = "zarr.json"
"""What makes a store visible."""


def header_of(grid: MapGrid, output: ModelOutput, array: str) -> MapHeader:
    """Return what the GeoTIFF of an array of a map says beside its pixels."""
    shape = (grid.height, grid.width)
    if array in EXTRAS:
        return MapHeader(shape, "uint16", grid.code, grid.transform, "values", (array,))
    if output.kind == "classes":
        return MapHeader(
            shape, output.dtype, grid.code, grid.transform, "classes", ("class",), output.nodata, output.classes,
            output.colors,
        )  # fmt: skip
    classes = tuple(zip(output.codes, output.names, strict=True)) if output.named else ()
    return MapHeader(
        shape, output.dtype, grid.code, grid.transform, "values", output.names, output.nodata, classes
    )


@dataclass(frozen=True)
class TileLayout:
    """Where the files of a folder go."""

    grids: tuple[MapGrid, ...]
    output: ModelOutput
    tiles: CogTiles

    @property
    def form(self) -> str:
        """What it makes of the same pixels."""
        return "cogs"

    @property
    def arrays(self) -> tuple[str, ...]:
        """The maps: the output, and those beside it."""
        return (self.output.variable, *EXTRAS)

    def folder(self, array: str) -> str:
        """Return where the files of an array lie: those of the output in the folder itself."""
        return f"{array}/" if array in EXTRAS else ""

    def path(self, block: MapBlock, array: str) -> str:
        """Return the path of a block's file."""
        return self.folder(array) + tile_name(self.grids[block.grid].name, block.row, block.col)

    def objects(
        self, block: MapBlock, arrays: Mapping[str, NDArray[Any]]
    ) -> Iterator[tuple[str, Sequence[Piece]]]:
        """Yield path and bytes of a block's files; none where no pixel is valid."""
        grid, side = self.grids[block.grid], self.tiles.tile_px
        whole = header_of(grid, self.output, self.output.variable)
        tile = self.tile(block)
        pixels = pad(arrays[self.output.variable], tile_header(self.tiles, whole, tile))
        if is_empty(pixels, tile_header(self.tiles, whole, tile)):
            return
        for array in self.arrays:
            header = tile_header(self.tiles, header_of(grid, self.output, array), tile)
            assert header.shape == (side, side)
            yield self.path(block, array), [cog_bytes(pad(arrays[array], header), header)]

    def tile(self, block: MapBlock) -> MapTile:
        """Return a block as a file of the grid."""
        side = self.tiles.tile_px
        y, x = block.row * side, block.col * side
        return MapTile(block.row, block.col, slice(y, y + block.height), slice(x, x + block.width))


def write_tiles(
    plan: MapPlan, target: CogTiles, client: ClientLike, progress: bool, bounds: Bounds | None
) -> JobReport:
    """Write a map as a folder of COGs, one a block; the VRTs come when all files are there, ``map.json`` last."""
    url = Place.of(target.folder).folder("a folder, or nothing yet", "Choose another place.")
    layout = TileLayout(plan.maps.grids, plan.output, CogTiles("", target.tile_px))
    blocks = dict(zip(plan.maps.names(), plan.maps.blocks, strict=True))

    def places() -> dict[str, str]:
        return {layout.path(block, array): name for name, block in blocks.items() for array in layout.arrays}

    def more(manifest: pa.Table) -> dict[str, bytes]:
        rows = zip(manifest["shard"].to_pylist(), manifest["objects"].to_pylist(), strict=True)
        there = {path["path"] for _, objects in rows for path in objects}
        result = {}
        for number, grid in enumerate(plan.maps.grids):
            for array in layout.arrays:
                tiles = [
                    layout.tile(block)
                    for block in blocks.values()
                    if block.grid == number and layout.path(block, array) in there
                ]
                header = header_of(grid, plan.output, array)
                path = layout.folder(array) + vrt_name(grid.name)
                result[path] = vrt_bytes(layout.tiles, grid.name, header, tiles)
        return result

    root = Visible(TILES, {"rasteret_dask": {"map": plan.note}})
    job = plan.unit_job(url, layout, root, {}, places, client, more)
    return write_units(url, job, client, progress, bounds)


def write_cogs(
    plan: MapPlan, path: str, client: ClientLike, progress: bool, bounds: Bounds | None
) -> JobReport:
    """Write a map as one COG a zone, and beside it those of counts and of valid inputs.

    First it is a store beside them, which is removed when they are there; the map's own file comes last. Each file
    says what it was made of: where all of them are this map, nothing is computed.

    Raises
    ------
    StoreError
        When something else lies there.
    """
    target = Place.of(path).url
    work, files = f"{target}.job", _cog_files(plan, target)
    for file in files:  # else it would show when all is computed
        Place.at(file.url).file("Choose another path.")
    if (report := _finished(plan, target, files)) is not None:
        _remove(work)
        if progress:
            sys.stderr.write(f"{remote.redact(target)} is finished: nothing to do\n")
        return report
    report = replace(plan.to_zarr(work, client, progress, bounds), store=remote.redact(target))
    if not report.committed:
        return report
    try:
        _put_cogs(plan, work, files, report)
    except RasteretDaskError:  # another part of an array job has seen the end as well, and was faster
        if _finished(plan, target, files) is None:
            raise
    _remove(work)
    return report


@dataclass(frozen=True, slots=True)
class _CogFile:
    """One COG of a map."""

    grid: int
    array: str
    url: str


def _cog_files(plan: MapPlan, target: str) -> list[_CogFile]:
    """Return the files of a map in the order in which they are written: of each zone the map's own comes last."""
    stem, suffix = posixpath.splitext(target)
    grids, result = plan.maps.grids, []
    for number, grid in enumerate(grids):
        own = f"{stem}_{grid.name}" if len(grids) > 1 else stem
        result += [_CogFile(number, array, f"{own}_{array}{suffix}") for array in EXTRAS]
        result.append(_CogFile(number, plan.output.variable, f"{own}{suffix}"))
    return result


def _finished(plan: MapPlan, target: str, files: Sequence[_CogFile]) -> JobReport | None:
    """Return the report of a map whose files are all there; None where some lack."""
    notes = {file.url: cog_note(file.url) for file in files}
    for url, note in reversed(notes.items()):  # the map's own first, which the user has named
        if note is not None and note.get("digest") != plan.digest:
            what = f"a map of {note['model']['name']}, of other chips or another model" if note else "a file"
            raise StoreError(
                f"map {remote.redact(target)}", f"{what} already: {remote.redact(url)}",
                f"this map ({plan.digest[:12]}), or nothing yet", "Delete it, or choose another path.",
            )  # fmt: skip
    if None in notes.values():
        return None
    rows = [
        {"shard": name, "split": None, "number": number, "chips": chips}
        for number, (name, chips) in enumerate(zip(plan.maps.names(), plan.maps.firsts, strict=True))
    ]
    kept = notes[files[-1].url] or {}
    return replace(
        JobReport.of_manifest(remote.redact(target), pa.Table.from_pylist(rows)), kept=kept["chips"]
    )


def _put_cogs(plan: MapPlan, work: str, files: Sequence[_CogFile], report: JobReport) -> None:
    """Make the files of a finished store."""
    opened = open_map(work)
    note = {
        **MAP_FILE.note,
        "meaning": MEANING,
        "digest": plan.digest,
        "model": plan.note["model"],
        "chips": report.kept,
    }
    for file in files:
        dataset: Any = opened[plan.layout().group(file.grid)] if len(plan.maps.grids) > 1 else opened
        header = replace(
            header_of(plan.maps.grids[file.grid], plan.output, file.array), note=json.dumps(note)
        )
        write_cog(file.url, header, _whole(array_blocks(_Lazy(dataset[file.array])), work))


def _whole(blocks: Iterator[Block], work: str) -> Iterator[Block]:
    """Yield the blocks of a store that was there until the last one was read: what is removed reads as nodata.

    Raises
    ------
    MissingError
        When it is removed meanwhile.
    """
    yield from blocks
    remote.head(remote.join(work, ROOT))


def _remove(work: str) -> None:
    """Remove the store that files were made of, its root first: who still reads it sees that."""
    remote.delete(remote.join(work, ROOT))
    remove_work(work)


class _Lazy:
    """A lazy array, whose parts are NumPy's."""

    def __init__(self, values: Any) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._values.shape
        return shape

    def __getitem__(self, key: Any) -> NDArray[Any]:
        # in this process: by default Dask would ask the current client's workers for what lies before it
        return np.asarray(self._values[key].compute(scheduler="threads").values)
