# SPDX-License-Identifier: Apache-2.0
"""One tree of errors, each carrying the id of what failed, what was found, what was expected and what to do."""

from __future__ import annotations

import contextlib
import functools
import os
import sys

__all__ = [
    "BandError",
    "ConcurrentWriteWarning",
    "CredentialsError",
    "EmptyError",
    "FormatError",
    "GridError",
    "IncompleteError",
    "JobError",
    "MissingExtraError",
    "MixedScalesWarning",
    "ModelError",
    "PlanError",
    "RasteretDaskError",
    "ReadError",
    "RecipeError",
    "SchemaError",
    "SignedHrefsWarning",
    "SourceError",
    "StoreError",
    "StrataWarning",
    "TrustError",
    "UnknownKindWarning",
    "UnreadableAssetsError",
    "UnreadableTilesWarning",
    "UntiledFilesWarning",
    "UnwritableStoreError",
    "user_level",
]


class RasteretDaskError(Exception):
    """Base of every error this package raises on purpose.

    Parameters
    ----------
    subject
        What was being done, and to which record, asset, chip, step or store.
    found
        What was found.
    expected
        What was expected instead; may be empty.
    remedy
        What to do about it; may be empty.

    Notes
    -----
    The four fields are the exception's ``args``, so every subclass pickles and reaches the client whole.

    Examples
    --------
    >>> try:
    ...     rd.build("sentinel-2")
    ... except rd.RasteretDaskError as error:
    ...     print(error.subject, "|", error.found)
    dataset 'sentinel-2' | no such id
    """

    def __init__(self, subject: str, found: str, expected: str = "", remedy: str = "") -> None:
        super().__init__(subject, found, expected, remedy)
        self.subject = subject
        self.found = found
        self.expected = expected
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.subject}: found {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        if self.remedy:
            text += f". {self.remedy}"
        return text


class PlanError(RasteretDaskError, ValueError):
    """A step of the plan cannot be carried out as it was asked.

    Examples
    --------
    >>> try:
    ...     chips.stream(batch_size=0)
    ... except rd.PlanError as error:
    ...     print(error.expected)
    a whole number from 1 on
    """


class SchemaError(RasteretDaskError, ValueError):
    """A table does not have the columns or types its contract asks for.

    Examples
    --------
    >>> import pyarrow as pa
    >>> try:
    ...     rd.as_collection(pa.table({"name": ["a"]}), name="mine")
    ... except rd.SchemaError as error:
    ...     print(error.expected)
    at least id, datetime, geometry, assets
    """


class BandError(RasteretDaskError, KeyError):
    """A band was asked for that a collection does not have, or that its name does not settle.

    Examples
    --------
    >>> try:
    ...     collection.harmonize(["swir1"]).chips(32).table
    ... except rd.BandError as error:
    ...     print(error.expected)
    a band code, a common name or an asset key
    """

    __str__ = RasteretDaskError.__str__


class GridError(RasteretDaskError, ValueError):
    """Sizes, resolutions or coordinate systems do not fit each other.

    Examples
    --------
    >>> try:
    ...     collection.harmonize(["red"]).chips(128, cell_km=0.96).table
    ... except rd.GridError as error:
    ...     print(error.remedy)
    Choose a smaller size or a larger cell_km.
    """


class SourceError(RasteretDaskError, ValueError):
    """STAC items, a catalog or a table could not be turned into records.

    Examples
    --------
    >>> try:
    ...     rd.build("sentinel-2")
    ... except rd.SourceError as error:
    ...     print(error.found)
    no such id
    """


class EmptyError(PlanError, SourceError):
    """Nothing is there: no scene in the area and dates, no record that the filters leave, or no chip.

    A job that runs every week meets it in weeks without a clear scene, and can leave them out.

    Examples
    --------
    >>> try:
    ...     chips.filter(split="training").table
    ... except rd.EmptyError as error:
    ...     print(error.remedy)
    Ask for less, or remove the step.
    """


class TrustError(SourceError):
    """A record names a place that its origin must not name (a local path in a remote catalog, say).

    Examples
    --------
    >>> try:
    ...     with rd.trust(hosts=["*.example.com"]):
    ...         rd.load("https://data.example.org/scenes.parquet")
    ... except rd.TrustError as error:
    ...     print(error.found)
    host 'data.example.org'
    """


class UnreadableAssetsError(RasteretDaskError):
    """The plan needs assets whose headers could not be read; lists all of them.

    Examples
    --------
    >>> readable = collection.where(readable=True)  # leaves out records with such assets
    >>> len(readable) == len(collection)
    True
    """


class ReadError(RasteretDaskError):
    """The pixels of an asset could not be read.

    Examples
    --------
    >>> pixels = chips.select("val").load(on_error="mask")  # tiles that cannot be read are invalid, instead of an error
    """


class StoreError(RasteretDaskError):
    """The output store holds something else, or cannot be written.

    Examples
    --------
    >>> try:
    ...     rd.open_chips("nothing.zarr")
    ... except rd.StoreError as error:
    ...     print(error.expected)
    a store that to_zarr wrote
    """


class UnwritableStoreError(StoreError):
    """A store takes no more bytes: the disk or a quota is full, or the place must not be written.

    Examples
    --------
    >>> try:
    ...     report = chips.select("val").to_zarr("val.zarr", progress=False)
    ... except rd.UnwritableStoreError as error:  # make room, then call it again: what is written stays
    ...     print(error.remedy)
    """


class CredentialsError(UnwritableStoreError):
    """A store refuses the keys or the token of a process: they have expired, or it does not know them.

    Nothing is read or written with them, so this is no ReadError: ``on_error="mask"`` masks no pixel because of it.

    Examples
    --------
    >>> try:
    ...     report = chips.select("val").to_zarr("val.zarr", progress=False)
    ... except rd.CredentialsError as error:  # set fresh ones, then call it again: what is written stays
    ...     print(error.remedy)
    """


class RecipeError(RasteretDaskError, ValueError):
    """A recipe cannot be read, or one of its tables cannot be carried out; names the file and the line.

    Parameters
    ----------
    path
        The recipe's file.
    line
        Counted from 1; None where no line of the file is at fault, such as a value given beside it.
    found, expected, remedy
        As for every error of this package.

    Examples
    --------
    >>> try:
    ...     rd.load_recipe("nothing.toml")
    ... except rd.RecipeError as error:
    ...     print(error.path, error.line)
    nothing.toml None
    """

    def __init__(self, path: str, line: int | None, found: str, expected: str = "", remedy: str = "") -> None:
        place = path if line is None else f"{path}:{line}"
        super().__init__(f"recipe {place}", found, expected, remedy)
        self.args = (path, line, found, expected, remedy)
        self.path = path
        self.line = line


class FormatError(RasteretDaskError, ValueError):
    """A store, plan, table or state was written in a format that this version of the package does not read.

    Examples
    --------
    >>> stream = chips.stream(batch_size=32)
    >>> try:
    ...     stream.load_state_dict({**stream.state_dict(), "format": 99})
    ... except rd.FormatError as error:
    ...     print(error.expected)
    format 2, which rasteret_dask ... reads
    """


class JobError(RasteretDaskError):
    """Some shards failed; the others are written, the store is not committed, and a rerun does only those.

    Examples
    --------
    >>> try:
    ...     report = chips.select("val").to_zarr("val.zarr", progress=False)
    ... except rd.JobError as error:  # mend what it names, then call it again: only the missing shards are computed
    ...     print(error.found)
    """


class IncompleteError(JobError):
    """A run has stopped before the end, as it was told to; what is written stays, and a rerun does the rest.

    Examples
    --------
    >>> limits = rd.RunLimits(max_time="8h")  # of a queue that ends jobs after eight hours
    >>> try:
    ...     report = chips.select("val").to_zarr("val.zarr", progress=False, limits=limits)
    ... except rd.IncompleteError as error:  # submit the job again: it does the rest
    ...     print(error.remedy)
    """


class MissingExtraError(RasteretDaskError, ImportError):
    """A package that only some exits need is not installed; the remedy is the command that installs it.

    Examples
    --------
    >>> try:
    ...     frame = chips.to_geopandas()
    ... except rd.MissingExtraError as error:
    ...     print(error.remedy)  # the command that installs it
    """


class ModelError(RasteretDaskError):
    """A model cannot be loaded or has no such device, raises, or returns what is no answer to the chips that it got.

    Examples
    --------
    >>> try:
    ...     rd.Model("nothing.onnx")
    ... except rd.ModelError as error:
    ...     print(error.found)
    no such file
    """


class MixedScalesWarning(UserWarning):
    """Raw numbers that mean different things by scale or offset come into the same array.

    Examples
    --------
    >>> scaled = collection.harmonize(["red"])  # each record by its own scale: no such warning
    >>> cells = scaled.to_torchgeo_dataset(chip_size=64, cell_km=1.28)
    """


class SignedHrefsWarning(UserWarning):
    """Hrefs arrived with signatures or passwords, which this process keeps in its memory and never writes.

    Examples
    --------
    >>> rd.sign("https://data.example.com", "?token=abc")  # for every process that is to read
    >>> rd.sign("https://data.example.com", None)
    """


class StrataWarning(UserWarning):
    """Classes lie in fewer split cells than there are splits: no stratified split has all of them.

    Examples
    --------
    >>> import warnings
    >>> warnings.simplefilter("error", rd.errors.StrataWarning)  # stop instead
    """


class UnknownKindWarning(UserWarning):
    """Integers of a band whose kind nobody tells are averaged: right for measured numbers, wrong for class codes.

    Examples
    --------
    >>> told = collection.harmonize(["red"], kinds={"red": "reflectance"})
    """


class UnreadableTilesWarning(UserWarning):
    """Tiles could not be read; as ``on_error="mask"`` asks, their pixels are invalid.

    Examples
    --------
    >>> import pyarrow.parquet as pq
    >>> "unreadable_tiles" in pq.read_schema("train.zarr/manifest.parquet").names
    True
    """


class UntiledFilesWarning(UserWarning):
    """Files lie in long strips or huge tiles: they work, and a chip reads many times its own pixels.

    Examples
    --------
    >>> import warnings
    >>> warnings.simplefilter("ignore", rd.UntiledFilesWarning)  # such files are read once
    """


class ConcurrentWriteWarning(UserWarning):
    """Another client writes the same store at this moment: the store will be right, but work is done twice.

    Examples
    --------
    >>> import warnings
    >>> warnings.simplefilter("error", rd.ConcurrentWriteWarning)  # stop rather than compute shards twice
    """


_INSIDE = (
    os.path.dirname(__file__) + os.sep,
    functools.__file__,
    contextlib.__file__,
)  # cached properties are computed by functools, and the ends of blocks by contextlib


def user_level() -> int:
    """Return the ``stacklevel`` with which a warning of the caller names the first line outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
