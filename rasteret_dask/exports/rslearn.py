# SPDX-License-Identifier: Apache-2.0
"""A folder of windows as rslearn reads them: ``to_rslearn``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.crs import spelled
from rasteret_dask.errors import PlanError
from rasteret_dask.exports.chipshards import ExitChips, unit_job
from rasteret_dask.exports.filenames import ALL, check_clashes, file_name
from rasteret_dask.exports.geotiff import (
    Georeference,
    mask_geotiff,
    pixels_geotiff,
    validity_geotiff,
    wants_validity,
)
from rasteret_dask.exports.geotiffs import VALID, names_of
from rasteret_dask.exports.sheets import MaskSheet, SourceSheet, dates_of
from rasteret_dask.exports.stacitems import ChipFacts, Extent, chip_facts, collection, document_bytes
from rasteret_dask.store.encode import Piece
from rasteret_dask.store.unitruns import UnitJob, Visible
from rasteret_dask.tasks.batches import Arrays

__all__ = ["TO_RSLEARN", "WindowFolders", "rslearn_job"]

TO_RSLEARN = "to_rslearn"

DATASET = "dataset.json"
"""The root: what is put last."""

CONFIG = "config.json"
"""What rslearn opens: put just before the root, as rslearn wants no other keys in it."""

_STORED = {"bool": "uint8", "float16": "float32"}
_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32")
"""What rslearn has names for."""

_LONGEST = 64
"""Letters of a folder of bands; beyond, it is a hash."""


@dataclass(frozen=True)
class WindowFolders:
    """Makes the files of windows: ``windows/<split>/<chip>/layers/<source>/<bands>/geotiff.tif``."""

    sheets: tuple[SourceSheet, ...]
    extent: Extent

    def objects(self, number: int, arrays: Arrays) -> Iterator[tuple[str, Sequence[Piece]]]:
        """Yield path and pieces of each object of a shard's chips."""
        for row, chip in enumerate(chip_facts(arrays, self.sheets)):
            folder = _folder(chip.split or ALL, chip.chip_id)
            times = [_times(chip, sheet, self.extent) for sheet in self.sheets]
            for sheet, own in zip(self.sheets, times, strict=True):
                for path, data in _layers(arrays, row, chip, sheet, own):
                    yield f"{folder}/layers/{path}", [data]
            yield f"{folder}/metadata.json", [document_bytes(self._window(chip, times))]

    def paths(self, number: int, split: str, chips: Sequence[str]) -> Iterable[str]:
        """Return the path of every object that these chips may have."""
        ends = ["metadata.json"]
        for sheet in self.sheets:
            layers = [(sheet.name, sheet.bands), (f"{sheet.name}_{VALID}", (VALID,))]
            for layer, bands in (*layers, *((mask.name, (mask.name,)) for mask in sheet.masks)):
                own = f"layers/{layer}"
                ends += [f"{own}/completed"]
                ends += [f"{own}/{_bands_folder(bands)}/{name}" for name in ("geotiff.tif", "metadata.json")]
        return (f"{_folder(split, chip)}/{end}" for chip in chips for end in ends)

    def _window(self, chip: ChipFacts, times: Sequence[Sequence[tuple[str, str]]]) -> dict[str, Any]:
        west, south, east, north = chip.bounds
        pixel = (east - west) / self.sheets[0].shape[1]
        edges = [west / pixel, -north / pixel, east / pixel, -south / pixel]
        every = [when for own in times for pair in own for when in pair]
        return {
            "group": chip.split or ALL,
            "name": file_name(chip.chip_id),
            "projection": {"crs": spelled(chip.epsg), "x_resolution": pixel, "y_resolution": -pixel},
            "bounds": [round(edge) for edge in edges],
            "time_range": [min(every), max(every)],
            "options": {"chip_id": chip.chip_id, "split": chip.split, **chip.labels},
        }


def _folder(split: str, chip: str) -> str:
    return f"windows/{split}/{file_name(chip)}"


def _layers(
    arrays: Arrays, row: int, chip: ChipFacts, sheet: SourceSheet, times: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a source's layer, of its validity where pixels cannot say it, and of its masks."""
    pixels, valid = arrays[sheet.name][row], arrays[f"{sheet.name}/valid"][row]
    dates = dates_of(sheet, arrays[f"{sheet.name}/datetime"][row])
    place = Georeference(chip.epsg, chip.bounds)
    tif = pixels_geotiff(pixels, valid, sheet, place, dates, order="bands")
    yield from _layer(sheet.name, sheet.bands, tif, times)
    if wants_validity(pixels, valid, sheet):
        yield from _layer(f"{sheet.name}_{VALID}", (VALID,), validity_geotiff(valid, place, dates), times)
    for mask in sheet.masks:
        data = mask_geotiff(arrays[f"{sheet.name}/{mask.name}"][row], mask, place)
        yield from _layer(mask.name, (mask.name,), data, ())


def _layer(
    name: str, bands: Sequence[str], data: bytes, times: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, bytes]]:
    folder = f"{name}/{_bands_folder(bands)}"
    yield f"{folder}/geotiff.tif", data
    if times:
        text = {
            "num_channels": len(bands),
            "num_timesteps": len(times),
            "timestamps": [list(p) for p in times],
        }
        yield f"{folder}/metadata.json", document_bytes(text)
    yield f"{name}/completed", b""


def _bands_folder(bands: Sequence[str]) -> str:
    """Return the folder of a set of bands, as rslearn names it (``get_bandset_dirname``)."""
    if any("_" in band for band in bands):
        return hashlib.sha256(json.dumps(list(bands)).encode()).hexdigest()
    name = "_".join(bands)
    return name if len(name) <= _LONGEST else hashlib.sha256(name.encode()).hexdigest()


def _times(chip: ChipFacts, sheet: SourceSheet, extent: Extent) -> list[tuple[str, str]]:
    """Return from when to when each slot is: the acquisition's moment, else the slot's, else that of all chips."""
    result = []
    for slot in chip.slots[sheet.name]:
        when = slot["datetime"] or slot.get("slot")
        result.append(
            (_offset(when), _offset(when)) if when else (_offset(extent.start), _offset(extent.end))
        )
    return result


def _offset(when: str) -> str:
    """Return a time with the offset that Python's ``fromisoformat`` reads in any version."""
    return when.removesuffix("Z") + "+00:00"


def _config(sheets: Sequence[SourceSheet]) -> dict[str, Any]:
    """Return the layers as rslearn's dataset configuration."""
    layers: dict[str, Any] = {}
    for sheet in sheets:
        nodata = {} if sheet.fill is None else {"nodata_value": sheet.fill}
        layers[sheet.name] = _raster(sheet.dtype, sheet.bands, nodata)
        if sheet.fill is not None and sheet.times > 1:
            layers[f"{sheet.name}_{VALID}"] = _raster("uint8", (VALID,), {})
        for mask in sheet.masks:
            layers[mask.name] = _raster(mask.dtype, (mask.name,), _class_names(mask))
    return {"layers": layers}


def _class_names(mask: MaskSheet) -> dict[str, Any]:
    return {"class_names": [[name for _, name in mask.named]]} if mask.classes else {}


def _raster(dtype: str, bands: Sequence[str], more: Mapping[str, Any]) -> dict[str, Any]:
    own = {"dtype": _STORED.get(dtype, dtype), "bands": list(bands), **more}
    return {"type": "raster", "resampling_method": "nearest", "band_sets": [own]}


def _check(sheets: Sequence[SourceSheet], bounds: NDArray[np.float64]) -> None:
    """Raise PlanError where rslearn's windows cannot say what chips are."""
    names = names_of(sheets)
    bad = [name for name in names if file_name(name) != name or "." in name]
    if bad:
        raise PlanError(
            TO_RSLEARN, f"a source called {bad[0]!r}", "letters, digits, _, + and -: rslearn's layers are folders",
            "Give it another name: join(name=...).",
        )  # fmt: skip
    for sheet in sheets:
        dtype = _STORED.get(sheet.dtype, sheet.dtype)
        if dtype not in _DTYPES:
            raise PlanError(
                TO_RSLEARN, f"{sheet.name} of {sheet.dtype}", f"one of {', '.join(_DTYPES)}, as rslearn has",
                'Say harmonize(dtype="float32").',
            )  # fmt: skip
        if sheet.reach_m:
            raise PlanError(
                TO_RSLEARN, f"windows of {sheet.name} that are larger than the chips", "windows of one size",
                "Leave context_m= out, or write GeoTIFFs: chips.to_geotiff(folder).",
            )  # fmt: skip
    pixel = (bounds[:, 2] - bounds[:, 0]) / sheets[0].shape[1]
    edges = bounds[:, [0, 3]] / pixel[:, None]
    off = np.flatnonzero(np.abs(edges - np.round(edges)).max(axis=1) > 1e-6)
    if len(off):
        west, north = bounds[off[0], [0, 3]]
        raise PlanError(
            TO_RSLEARN, f"a pixel corner at ({west:g}, {north:g}) with pixels of {pixel[off[0]]:g}",
            "corners at multiples of the pixels' size, in which rslearn counts windows",
            "Resample to such a grid, as harmonize(resolution=10) of Sentinel-2 has, or call to_geotiff(folder).",
        )  # fmt: skip


def rslearn_job(chips: ExitChips, url: str) -> UnitJob:
    """Return what is to lie in a folder of windows.

    Parameters
    ----------
    chips
        The chips.
    url
        The folder.

    Raises
    ------
    PlanError
        When rslearn's windows cannot say what the chips are.
    """
    check_clashes(TO_RSLEARN, names_of(chips.sheets), ())
    _check(chips.sheets, chips.bounds)
    about = collection(chips.sheets, chips.labels, chips.splits, chips.extent, chips.reading.provenance)
    names = ("title", "description", "license", "providers", "sci:citation", "extent", "rasteret_dask")
    document = {"type": "rslearn", **{name: about[name] for name in names if name in about}}

    def config(manifest: pa.Table) -> dict[str, bytes]:
        return {CONFIG: document_bytes(_config(chips.sheets))}

    return unit_job(
        TO_RSLEARN, url, chips, WindowFolders(chips.sheets, chips.extent), Visible(DATASET, document), config,
        dict.fromkeys(chips.splits, CONFIG),
    )  # fmt: skip
