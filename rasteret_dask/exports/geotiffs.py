# SPDX-License-Identifier: Apache-2.0
"""A folder of GeoTIFFs with a STAC Item for each chip: ``to_geotiff``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rasteret_dask.errors import PlanError
from rasteret_dask.exports.chipshards import ExitChips, kept_chips, unit_job
from rasteret_dask.exports.filenames import ALL, check_clashes, file_name
from rasteret_dask.exports.geotiff import (
    Georeference,
    category_names,
    mask_geotiff,
    pixels_geotiff,
    tells_validity,
    validity_geotiff,
    wants_validity,
)
from rasteret_dask.exports.sheets import MaskSheet, SourceSheet, dates_of, window_of
from rasteret_dask.exports.stacitems import (
    CATALOG,
    COLLECTION,
    GEOTIFF,
    ChipFacts,
    Extent,
    File,
    catalog,
    chip_facts,
    collection,
    document_bytes,
    item,
    item_links,
    mask_asset,
    pixel_asset,
    validity_asset,
)
from rasteret_dask.store.encode import Piece
from rasteret_dask.store.unitruns import UnitJob, Visible
from rasteret_dask.tasks.batches import Arrays

__all__ = ["TO_GEOTIFF", "ChipFiles", "GeoTiffs", "chip_files", "geotiff_job"]

TO_GEOTIFF = "to_geotiff"

VALID = "valid"
"""What stands behind a source's name where its validity is a file of its own."""

_SIDECAR = ".aux.xml"


@dataclass(frozen=True, slots=True)
class ChipFiles:
    """The GeoTIFFs of one chip, and what its STAC Item says of them."""

    files: tuple[tuple[str, bytes], ...]
    """(what stands behind the chip's name, bytes): ``s2.tif``."""
    assets: Mapping[str, Mapping[str, Any]]


def chip_files(
    arrays: Arrays, row: int, chip: ChipFacts, sheets: Sequence[SourceSheet], before: str
) -> ChipFiles:
    """Return the GeoTIFFs of one chip.

    Parameters
    ----------
    arrays
        The chips of a shard.
    row
        Which of them.
    chip
        What is known of it.
    sheets
        What the sources are.
    before
        What its files' names begin with, as seen from its Item.
    """
    files: list[tuple[str, bytes]] = []
    assets: dict[str, Mapping[str, Any]] = {}
    for sheet in sheets:
        pixels, valid = arrays[sheet.name][row], arrays[f"{sheet.name}/valid"][row]
        window = window_of(arrays, row, sheet)
        place = Georeference(chip.epsg, window)
        dates = dates_of(sheet, arrays[f"{sheet.name}/datetime"][row])
        name, shape = f"{file_name(sheet.name)}.tif", pixels.shape[-2:]
        files.append((name, pixels_geotiff(pixels, valid, sheet, place, dates)))
        file = File(before + name, GEOTIFF, place.window, shape)
        plain = tells_validity(pixels, valid, sheet)
        assets[sheet.name] = pixel_asset(
            file, sheet, chip.slots[sheet.name], sheet.descriptions(dates), plain
        )
        if wants_validity(pixels, valid, sheet):
            name = f"{file_name(sheet.name)}_{VALID}.tif"
            files.append((name, validity_geotiff(valid, place, dates)))
            file = File(before + name, GEOTIFF, place.window, shape)
            assets[f"{sheet.name}_{VALID}"] = validity_asset(file, sheet.name)
    for mask, values, place in _masks(arrays, row, chip, sheets):
        name = f"{file_name(mask.name)}.tif"
        files.append((name, mask_geotiff(values, mask, place)))
        if mask.classes:
            files.append((name + _SIDECAR, category_names(mask)))
        assets[mask.name] = mask_asset(File(before + name, GEOTIFF, place.window, values.shape), mask)
    return ChipFiles(tuple(files), assets)


def _masks(
    arrays: Arrays, row: int, chip: ChipFacts, sheets: Sequence[SourceSheet]
) -> Iterator[tuple[MaskSheet, Any, Georeference]]:
    """Yield the burned labels of a chip: they lie on the chip itself, however far a source's window reaches."""
    for sheet in sheets:
        for mask in sheet.masks:
            yield mask, arrays[f"{sheet.name}/{mask.name}"][row], Georeference(chip.epsg, chip.bounds)


@dataclass(frozen=True)
class GeoTiffs:
    """Makes the files of a folder of GeoTIFFs."""

    sheets: tuple[SourceSheet, ...]
    extent: Extent

    def objects(self, number: int, arrays: Arrays) -> Iterator[tuple[str, Sequence[Piece]]]:
        """Yield path and pieces of each object of a shard's chips."""
        for row, chip in enumerate(chip_facts(arrays, self.sheets)):
            folder, name = chip.split or ALL, file_name(chip.chip_id)
            own = chip_files(arrays, row, chip, self.sheets, f"./{name}_")
            for end, data in own.files:
                yield f"{folder}/{name}_{end}", [data]
            document = item(chip, self.sheets, own.assets, self.extent, item_links())
            yield f"{folder}/{name}.json", [document_bytes(document)]

    def paths(self, number: int, split: str, chips: Sequence[str]) -> Iterable[str]:
        """Return the path of every object that these chips may have."""
        ends = [".json"]
        for sheet in self.sheets:
            ends += [f"_{file_name(sheet.name)}.tif", f"_{file_name(sheet.name)}_{VALID}.tif"]
            for mask in sheet.masks:
                ends += [f"_{file_name(mask.name)}.tif", f"_{file_name(mask.name)}.tif{_SIDECAR}"]
        return (f"{split}/{file_name(chip)}{end}" for chip in chips for end in ends)


def names_of(sheets: Sequence[SourceSheet]) -> list[str]:
    """Return what files of sources, of their validity and of masks are called."""
    return [
        name
        for sheet in sheets
        for name in (sheet.name, f"{sheet.name}_{VALID}", *(mask.name for mask in sheet.masks))
    ]


def geotiff_job(chips: ExitChips, url: str) -> UnitJob:
    """Return what is to lie in a folder of GeoTIFFs.

    Parameters
    ----------
    chips
        The chips.
    url
        The folder.

    Raises
    ------
    PlanError
        When two files would have one name.
    """
    ids = (chip for one in chips.units for own in one.splits().values() for chip in own)
    check_clashes(TO_GEOTIFF, names_of(chips.sheets), ids)
    if COLLECTION in chips.splits or CATALOG in chips.splits:
        raise PlanError(TO_GEOTIFF, f"a split called {COLLECTION!r}", "another name", "Split by other names.")
    document = collection(chips.sheets, chips.labels, chips.splits, chips.extent, chips.reading.provenance)

    paths = {folder: f"{folder}/{CATALOG}" for folder in chips.splits}

    def catalogs(manifest: pa.Table) -> dict[str, bytes]:
        result = {}
        for folder, own in kept_chips(chips, manifest).items():
            files = ((chip, f"{file_name(chip)}.json") for chip in own)
            result[paths[folder]] = document_bytes(catalog(folder, files))
        return result

    encoder, root = GeoTiffs(chips.sheets, chips.extent), Visible(COLLECTION, document)
    return unit_job(TO_GEOTIFF, url, chips, encoder, root, catalogs, paths)
