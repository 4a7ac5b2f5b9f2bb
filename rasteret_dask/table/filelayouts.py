# SPDX-License-Identifier: Apache-2.0
"""Which files lay their pixels and tiles out alike: told column by column, whatever their dates and bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.table.records import Asset, Records

__all__ = ["FileLayouts"]

PLACEMENTS = ("rotated", "gcps")

LEVEL_KINDS = ("image", "overview", "mask", "overview_mask", "alpha", "overview_alpha")

SIZES = ("width", "height", "tile_width", "tile_height", "planar", "samples")


class FileLayouts:
    """Numbers of layouts, the same for all files of any band that are laid out alike.

    A layout is what decides where pixels lie, which of them a grid needs, and with which kernel they are read: the
    CRS, whether rows and columns are its axes, what the numbers are, whether only a range of them is valid, and of
    every level its place, its sizes and its tiles.

    Parameters
    ----------
    records
        The records.
    """

    def __init__(self, records: Records) -> None:
        self.records = records
        self._of_band: dict[str, NDArray[np.int64]] = {}
        self._numbers: dict[bytes, int] = {}
        self._kinds: dict[str | None, int] = {}
        self._examples: list[tuple[int, str]] = []
        self._at_hand: set[int] = set()
        self._most = int(pc.max(pc.list_value_length(_files(records))).as_py() or 0) if len(records) else 0

    def of(self, band: str) -> NDArray[np.int64]:
        """Return the number of the layout of each record's file, shape (record,)."""
        if not len(self.records):
            return np.zeros(0, dtype=np.int64)
        if band not in self._of_band:
            facts = np.ascontiguousarray(self._facts(band))
            texts = facts.view(f"V{facts.shape[1] * facts.itemsize}").ravel().tolist()
            for row, text in enumerate(texts):
                if text not in self._numbers:
                    self._numbers[text] = len(self._numbers)
                    self._examples.append((row, band))
            self._of_band[band] = np.array([self._numbers[text] for text in texts], dtype=np.int64)
        return self._of_band[band]

    def asset(self, number: int) -> Asset:
        """Return an asset whose file has a layout.

        Raises
        ------
        BandError, ReadError
            When there is no such asset, or its header is unknown.
        """
        row, band = self._examples[number]
        return self.records.asset(row, band)

    def look_up(self, numbers: NDArray[np.int64]) -> None:
        """Have assets of these layouts at hand for :meth:`asset`, all looked up together."""
        rows: dict[str, list[int]] = {}
        new = set(numbers.tolist()) - self._at_hand
        self._at_hand |= new
        for number in sorted(new):
            row, band = self._examples[number]
            rows.setdefault(band, []).append(row)
        for band, some in rows.items():
            self.records.look_up(some, (band,))

    def _facts(self, band: str) -> NDArray[np.float64]:
        """Return all that makes a layout, shape (record, fact)."""
        records = self.records
        kind, alpha, size, etag, least, most = (
            records.asset_field(band, name).combine_chunks()
            for name in ("kind", "alpha", "size", "etag", "valid_min", "valid_max")
        )
        texts = kind.dictionary_encode()
        numbers = [
            self._kinds.setdefault(text, len(self._kinds) + 1) for text in texts.dictionary.to_pylist()
        ]
        of_kind = np.array([*numbers, 0])[pc.fill_null(texts.indices, len(numbers)).to_numpy()]
        first, count = records.level_places(band)
        placement = pc.index_in(
            records.asset_field(band, "placement").combine_chunks(), value_set=pa.array(PLACEMENTS)
        )
        heads = [
            records.epsg, of_kind, pc.fill_null(placement, -1).to_numpy(), pc.fill_null(alpha, -1).to_numpy(),
            pc.or_(size.is_valid(), etag.is_valid()).to_numpy(zero_copy_only=False),
            pc.or_(least.is_valid(), most.is_valid()).to_numpy(zero_copy_only=False), count,
        ]  # fmt: skip
        nth = np.arange(self._most)
        there = nth < count[:, None]
        place = pa.array(np.where(there, first[:, None] + nth, 0).ravel())
        levels = [column.reshape(*there.shape, -1) for column in self._level_facts(place)]
        told = np.where(there[:, :, None], np.concatenate(levels, axis=-1), 0.0)
        return np.concatenate([np.column_stack(heads), told.reshape(len(count), -1)], axis=1)

    def _level_facts(self, place: pa.Array) -> list[NDArray[np.float64]]:
        """Return what makes a layout of some levels, columns of shape (level * facts,)."""
        if not len(self.records.levels):
            return [np.zeros(0)]
        fields = {name: pc.struct_field(self.records.levels, name) for name in ("transform", "kind", *SIZES)}
        taken = {name: values.take(place) for name, values in fields.items()}
        transform = pc.fill_null(taken["transform"], pa.scalar([0.0] * 6, type=taken["transform"].type))
        tables = pc.list_value_length(pc.struct_field(self.records.levels, "tile_offsets")).take(place)
        columns: list[Any] = [
            tables, pc.index_in(taken["kind"], value_set=pa.array(LEVEL_KINDS)), *(taken[n] for n in SIZES)
        ]  # fmt: skip
        numbers = [np.asarray(pc.fill_null(values, -1).to_numpy(), dtype=np.float64) for values in columns]
        return [np.asarray(pc.list_flatten(transform).to_numpy()), *numbers]


def _files(records: Records) -> pa.Array:
    """Return the list of levels of every file."""
    return records.table.column("headers_metadata").chunk(0).items
