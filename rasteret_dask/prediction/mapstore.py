# SPDX-License-Identifier: Apache-2.0
"""A map as a Zarr store that GeoZarr's readers and rioxarray know: its documents, and the bytes of its blocks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from rasteret_dask.crs import crs_of
from rasteret_dask.errors import PlanError
from rasteret_dask.prediction.mapgrid import BLOCK_SIDES, MapBlock, MapGrid, blocks_of
from rasteret_dask.prediction.multiscales import Halving, MapLevel, geozarr_attributes, halve, levels
from rasteret_dask.prediction.outputs import ModelOutput
from rasteret_dask.store.encode import Encoding, Piece, compressors
from rasteret_dask.store.ledger import Maker, whole
from rasteret_dask.store.unitruns import Visible

if TYPE_CHECKING:
    import zarr
    from zarr.storage import MemoryStore

__all__ = ["COUNT", "INPUTS", "MapZarr", "StoreLayout"]

COUNT, INPUTS = "count", "inputs"
"""Names of the arrays that say how many chips a pixel is made of, and how many valid inputs it has."""

LEAST_SHARD_PX = 64
"""Side of a block in the coarsest level, at least: smaller objects would be many."""

CHUNK_PX = 512
"""Side of the chunks that readers read, inside the object of a block."""


@dataclass(frozen=True, slots=True)
class MapZarr:
    """A map as a Zarr v3 store with the conventions of GeoZarr: ``chips.predict(model, to=MapZarr("map.zarr"))``.

    Parameters
    ----------
    store
        A local path, or a URL of scheme s3, gs or az.
    block_px
        Side of what one task computes, and of a shard of the store: 256, 512, 1024, 1536 or 2048 pixels. None: the
        largest that takes 256 MiB of memory at most. Pixels do not depend on it.
    multiscales
        Whether coarser levels are stored below the map, each half of the one before: groups ``2x``, ``4x`` and so on,
        down to 512 pixels, at most ``block_px`` / 64 times coarser. Classes are the most frequent ones, values means.

    Raises
    ------
    PlanError
        When ``block_px`` is anything else.

    Examples
    --------
    >>> rd.MapZarr("map.zarr", block_px=512).block_px
    512
    """

    store: str | os.PathLike[str]
    block_px: int | None = None
    multiscales: bool = False

    def __post_init__(self) -> None:
        if self.block_px is not None and self.block_px not in BLOCK_SIDES:
            sides = ", ".join(map(str, sorted(BLOCK_SIDES)))
            raise PlanError("MapZarr(block_px=)", repr(self.block_px), f"one of {sides}")


@dataclass(frozen=True)
class StoreLayout:
    """Where everything of a map goes inside its store."""

    grids: tuple[MapGrid, ...]
    output: ModelOutput
    block_px: int
    attrs: Mapping[str, Any]
    """Attributes of the root: what the map was made of."""
    multiscales: bool = False
    """Whether there are coarser levels."""

    @property
    def form(self) -> str:
        """What it makes of the same pixels."""
        return "zarr with multiscales" if self.multiscales else "zarr"

    def group(self, grid: int) -> str:
        """Return the path of a grid's group; "" where there is one grid."""
        return self.grids[grid].name if len(self.grids) > 1 else ""

    def path(self, grid: int, array: str) -> str:
        """Return the path of an array."""
        group = self.group(grid)
        return f"{group}/{array}" if group else array

    @property
    def arrays(self) -> dict[str, tuple[str, int, Any]]:
        """Name of each array that blocks have -> dtype, numbers on an axis in front of y (0: none), fill."""
        out = self.output
        front = 0 if out.is_flat else out.channels
        return {
            out.variable: (out.dtype, front, out.nodata),
            COUNT: ("uint16", 0, 0),
            INPUTS: ("uint16", 0, 0),
        }

    def pyramid(self, grid: MapGrid) -> tuple[MapLevel, ...]:
        """Return the levels of a grid, the finest first: those whose pixels one block has, of 64 x 64 at least."""
        steps = levels((grid.height, grid.width))
        return tuple(step for step in steps if step.factor <= self.block_px // LEAST_SHARD_PX)

    def _levels(self, grid: MapGrid) -> tuple[MapLevel, ...]:
        return self.pyramid(grid) if self.multiscales else self.pyramid(grid)[:1]

    def documents(self) -> tuple[dict[str, Maker], Visible]:
        """Return every object that is known before any block, and the root with the groups' documents."""
        import zarr
        from zarr.storage import MemoryStore

        store = MemoryStore()
        root = zarr.create_group(store, attributes=dict(self.attrs))
        for number, grid in enumerate(self.grids):
            path = self.group(number)
            group = root if not path else root.require_group(path)
            steps = self._levels(grid)
            for step in steps:
                below = group if step.path == "." else group.require_group(step.path)
                self._fill_group(below, coarser(grid, step), step.factor)
            how: Halving = "mode" if self.output.is_flat else "average"
            pyramid = steps if self.multiscales else ()
            shape = (grid.height, grid.width)
            conventions = geozarr_attributes(grid.code, Affine(*grid.transform), shape, pyramid, how)
            group.update_attributes({"Conventions": "CF-1.10", **conventions})
        consolidate(store)
        data = {path: buffer.to_bytes() for path, buffer in store._store_dict.items()}
        groups = {
            path: text.decode()
            for path, text in data.items()
            if path.endswith("zarr.json") and json.loads(text)["node_type"] == "group"
        }
        document = json.loads(groups.pop("zarr.json"))
        objects = {
            path: whole(text) for path, text in data.items() if path not in groups and path != "zarr.json"
        }
        return objects, Visible("zarr.json", document, groups)

    def _fill_group(self, group: zarr.Group, grid: MapGrid, factor: int) -> None:
        out = self.output
        for name, (dtype, front, fill) in self.arrays.items():
            axes = ((out.channels,) if front else ()) + (grid.height, grid.width)
            dims = ((("class",) if out.codes else ("band",)) if front else ()) + ("y", "x")
            chunk, shard = self._shapes(front, factor)
            array = group.create_array(
                name,
                shape=axes,
                dtype=dtype,
                chunks=chunk,
                shards=shard,
                dimension_names=dims,
                fill_value=fill,
                compressors=compressors("auto", dtype),
            )
            array.update_attributes(self._attributes(name, fill))
        for name, values in (("y", grid.y), ("x", grid.x)):
            axis = group.create_array(
                name, shape=values.shape, dtype="float64", chunks=values.shape, dimension_names=(name,),
                compressors=compressors("auto", "float64"),
            )  # fmt: skip
            axis[:] = values
            axis.update_attributes(_axis(grid, name))
        if not out.is_flat:
            names = np.array(out.names, dtype=object)
            axis_name = "class" if out.codes else "band"
            labels = group.create_array(
                axis_name, shape=names.shape, dtype=str, chunks=names.shape, dimension_names=(axis_name,),
                fill_value="",
            )  # fmt: skip
            labels[:] = names
        place = group.create_array("spatial_ref", shape=(), dtype="int64", chunks=(), fill_value=0)
        place[...] = 0
        place.update_attributes({**crs_of(grid.code).to_cf(), "GeoTransform": _geotransform(grid)})

    def _attributes(self, name: str, fill: Any) -> dict[str, Any]:
        own: dict[str, Any] = {"grid_mapping": "spatial_ref"}
        if name == COUNT:
            return own | {"long_name": "chips that the pixel was predicted from", "units": "1"}
        if name == INPUTS:
            return own | {"long_name": "valid inputs (source and slot) of the pixel", "units": "1"}
        out = self.output
        if out.kind == "classes":
            own |= {"_FillValue": int(fill), "flag_values": list(out.codes), "long_name": "class"}
            own["flag_meanings"] = " ".join(_flag(name) for name in out.names)
            own["class_names"] = list(out.names)
            if out.colors:
                own["flag_colors"] = " ".join(dict(out.colors).get(code, "#000000") for code in out.codes)
        elif out.kind == "probabilities":
            own |= {"long_name": "probability", "units": "1", "codes": list(out.codes)}
        return own

    def _shapes(self, front: int, factor: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of a chunk and of a shard of a level."""
        block = self.block_px // factor
        side = (min(CHUNK_PX, block),) * 2
        return ((1, *side) if front else side), ((front,) if front else ()) + (block,) * 2

    def objects(
        self, block: MapBlock, arrays: Mapping[str, NDArray[Any]]
    ) -> Iterator[tuple[str, Sequence[Piece]]]:
        """Yield path and bytes of the object of each array of a block, level by level; none where all of it is fill."""
        for name, (dtype, front, fill) in self.arrays.items():
            values = arrays[name]
            how: Halving = "max" if name in (COUNT, INPUTS) else "mode" if self.output.is_flat else "average"
            for step in self._levels(self.grids[block.grid]):
                if step.factor > 1:
                    values = halve(values, how, fill)
                pieces = _encoded(values, dtype, self._shapes(front, step.factor), fill)
                if pieces:
                    yield self._place(block, name, front, step), pieces

    def _place(self, block: MapBlock, name: str, front: int, step: MapLevel) -> str:
        array = name if step.path == "." else f"{step.path}/{name}"
        return f"{self.path(block.grid, array)}/c/{'0/' if front else ''}{block.row}/{block.col}"

    def places(self, blocks: Mapping[str, MapBlock]) -> dict[str, str]:
        """Return the path of every object that blocks may have -> the block's name.

        Parameters
        ----------
        blocks
            Name -> block.
        """
        return {
            self._place(block, array, front, step): name
            for name, block in blocks.items()
            for array, (_, front, _) in self.arrays.items()
            for step in self._levels(self.grids[block.grid])
        }


def coarser(grid: MapGrid, step: MapLevel) -> MapGrid:
    """Return the grid of a level; at the southern and eastern edges its pixels may reach beyond the finest one's."""
    height, width = step.shape
    return replace(grid, pixel=grid.pixel * step.factor, height=height, width=width)


def empty_blocks(grids: Sequence[MapGrid], blocks: Sequence[MapBlock], block_px: int) -> int:
    """Return how many blocks of the grids have no chip."""
    return sum(1 for grid in grids for _ in blocks_of(grid, block_px)) - len(blocks)


def _encoded(
    values: NDArray[Any], dtype: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], fill: Any
) -> Sequence[Piece]:
    """Return the pieces of a block's object, none where all of it is fill.

    A shard is its chunks one after another, row by row, whatever the number of axes: so chunks are encoded as those of
    an array with one axis of chunks.
    """
    chunk, shard = shapes
    steps = range(0, shard[-1], chunk[-1])
    planes = values.reshape(-1, *values.shape[-2:])
    chunks = [_chunk(plane, row, col, chunk[-1], fill) for plane in planes for row in steps for col in steps]
    encoding = _encoding(len(chunks), chunk[-1], dtype, None if np.isnan(fill) else int(fill))
    return encoding.shard_of(encoding.chips(chunks))


def _chunk(plane: NDArray[Any], row: int, col: int, side: int, fill: Any) -> NDArray[Any]:
    """Return a chunk of a plane, shape (y, x): a view, but where it reaches beyond the plane."""
    inside = plane[row : row + side, col : col + side]
    if inside.shape == (side, side):
        return inside
    whole = np.full((side, side), fill, dtype=plane.dtype)
    whole[: inside.shape[0], : inside.shape[1]] = inside
    return whole


@lru_cache(maxsize=32)
def _encoding(chunks: int, side: int, dtype: str, fill: int | None) -> Encoding:
    """Return how an object of so many chunks is encoded: as zarr-python writes it down."""
    import zarr
    from zarr.storage import MemoryStore

    store = MemoryStore()
    zarr.create_array(
        store,
        shape=(chunks, side, side),
        dtype=dtype,
        chunks=(1, side, side),
        shards=(chunks, side, side),
        fill_value=np.nan if fill is None else fill,
        compressors=compressors("auto", dtype),
    )
    return Encoding.of(store._store_dict["zarr.json"].to_bytes(), "a block of a map")


def consolidate(store: MemoryStore) -> None:
    """Put the documents of all arrays into the root's."""
    import warnings

    import zarr

    with warnings.catch_warnings():
        # zarr-python warns that other implementations may not read consolidated metadata; they read the rest
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store)


def _axis(grid: MapGrid, name: str) -> dict[str, Any]:
    geographic = crs_of(grid.code).is_geographic
    if geographic:
        word = "latitude" if name == "y" else "longitude"
        return {
            "standard_name": word,
            "axis": name.upper(),
            "units": f"degrees_{'north' if name == 'y' else 'east'}",
        }
    return {"standard_name": f"projection_{name}_coordinate", "axis": name.upper(), "units": "m"}


def _geotransform(grid: MapGrid) -> str:
    a, b, c, d, e, f = grid.transform
    return " ".join(repr(float(value)) for value in (c, a, b, f, d, e))


def _flag(name: str) -> str:
    """Return a class's name as one word, as CF's flags have them."""
    return "_".join(name.split()) or "_"
