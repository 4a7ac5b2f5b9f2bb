# SPDX-License-Identifier: Apache-2.0
"""Masks that are files, one for each chip: taken as they are, number by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import MASK
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.errors import PlanError, RasteretDaskError, ReadError
from rasteret_dask.net.remote import is_local, local_path, redact

__all__ = ["MaskFiles", "labels_again"]

COLUMNS = ("chip", "mask", "href", "dtype")
"""Of the table that a plan names: the chip, the variable, the file, the type of its numbers."""


@dataclass(frozen=True, eq=False)
class MaskFiles(Labels):
    """Files whose pixels are the mask of a chip each; they lie on the pixels of the chip's own file.

    ``table`` has the columns ``chip`` and ``href``, a row a chip.
    """

    number: str = "uint8"
    """NumPy name of the type of the masks."""

    @classmethod
    def of_table(
        cls, table: pa.Table, source: int, classes: Mapping[str, Sequence[str]]
    ) -> tuple[MaskFiles, ...]:
        """Return the masks of a table with :data:`COLUMNS`, a value for each variable.

        Parameters
        ----------
        table
            The table.
        source
            The source on whose pixels masks lie.
        classes
            Variable -> names of the numbers 1, 2, ...
        """
        result = []
        for name in dict.fromkeys(table.column("mask").to_pylist()):
            own = table.filter(pc.equal(table.column("mask"), name))
            dtype = str(own.column("dtype")[0].as_py())
            plain = own.select(["chip", "href"]).combine_chunks()
            column = name.removeprefix(f"{MASK}_")
            result.append(cls(plain, column, source, tuple(classes.get(name, ())), name, dtype))
        return tuple(result)

    @property
    def note(self) -> dict[str, Any]:
        """All but the table, as JSON values."""
        return {**super().note, "number": self.number}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The mask's dtype."""
        return np.dtype(self.number)

    @property
    def what(self) -> str:
        """What masks are made of, in a word."""
        return "file"

    @cached_property
    def _hrefs(self) -> dict[str, str]:
        columns = (self.table.column(name).to_pylist() for name in ("chip", "href"))
        return dict(zip(*columns, strict=True))

    def burned(
        self, bounds: NDArray[np.float64], epsg: NDArray[np.int64], size: int, chips: Sequence[str] = ()
    ) -> NDArray[Any]:
        """Return the masks of chips, shape (chip, y, x); parameters as of polygons, of which ``chips`` alone counts.

        Raises
        ------
        ReadError
            When a file cannot be read, or is another one than when the plan was made.
        PlanError
            When it is not known which chips are meant, as of windows that are no files.
        """
        if len(chips) != len(bounds):
            raise PlanError(
                f"{self.name} of files", "windows that are no files", "chips of rd.read_chips as they are",
                "Leave out the step that asks for it.",
            )  # fmt: skip
        masks = np.full((len(chips), size, size), self.fill, dtype=self.dtype)
        for at, chip in enumerate(chips):
            href = self._hrefs.get(chip)
            if href is not None:
                masks[at] = _pixels(href, size, self.dtype)
        return masks


def labels_again(table: pa.Table, note: Mapping[str, Any]) -> Labels:
    """Return the labels that a table and a note were taken from."""
    own = Labels.again(table, note)
    if "number" not in note:
        return own
    return MaskFiles(own.table, own.column, own.source, own.classes, own.name, note["number"])


def _pixels(href: str, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the pixels of a file, shape (y, x)."""
    import rasterio  # it takes a while to load: only who has masks waits for it
    from rasterio.errors import RasterioError

    from rasteret_dask.net.gdalfiles import GdalFile

    subject = f"mask {redact(href)}"

    def read(dataset: Any) -> NDArray[Any]:
        if dataset.shape != (size, size) or np.dtype(dataset.dtypes[0]) != dtype:
            found = f"{dataset.shape[0]} x {dataset.shape[1]} pixels of {dataset.dtypes[0]}"
            raise ReadError(
                subject, found, f"{size} x {size} pixels of {dtype}, as when the plan was made",
                "Make the plan again: rd.read_chips(...).",
            )  # fmt: skip
        return np.asarray(dataset.read(1))

    if is_local(href):
        try:
            with rasterio.open(local_path(href)) as dataset:
                return read(dataset)
        except RasterioError as error:
            failure = ReadError(subject, str(error), "a raster that GDAL reads")
        raise failure  # outside of the except block: what rasterio chains to its errors does not unpickle
    file = GdalFile(href)
    try:
        dataset = file.open("GTiff")
        return file.call(lambda: read(dataset))
    except RasterioError as error:
        known: RasteretDaskError = file.failure or ReadError(subject, str(error), "a GeoTIFF")
    finally:
        file.close()
    raise known
