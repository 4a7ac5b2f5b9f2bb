"""One tree of errors, each carrying the id of what failed, what was found, what was expected and what to do."""

from __future__ import annotations

import functools
import os
import sys

__all__ = [
    "BandError",
    "ConcurrentWriteWarning",
    "FormatError",
    "GridError",
    "JobError",
    "MissingExtraError",
    "MixedScalesWarning",
    "PlanError",
    "RasteretDaskError",
    "ReadError",
    "SchemaError",
    "SignedHrefsWarning",
    "SourceError",
    "StoreError",
    "TrustError",
    "UnknownKindWarning",
    "UnreadableAssetsError",
    "UnreadableTilesWarning",
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
    """A step of the plan cannot be carried out as it was asked."""


class SchemaError(RasteretDaskError, ValueError):
    """A table does not have the columns or types its contract asks for."""


class BandError(RasteretDaskError, KeyError):
    """A band was asked for that a collection does not have, or that its name does not settle."""

    __str__ = RasteretDaskError.__str__


class GridError(RasteretDaskError, ValueError):
    """Sizes, resolutions or coordinate systems do not fit each other."""


class SourceError(RasteretDaskError, ValueError):
    """STAC items, a catalog or a table could not be turned into records."""


class TrustError(SourceError):
    """A record names a place that its origin must not name (a local path in a remote catalog, say)."""


class UnreadableAssetsError(RasteretDaskError):
    """The plan needs assets whose headers could not be read; lists all of them."""


class ReadError(RasteretDaskError):
    """The pixels of an asset could not be read."""


class StoreError(RasteretDaskError):
    """The output store holds something else, or cannot be written."""


class UnwritableStoreError(StoreError):
    """A store takes no more bytes: the disk or a quota is full, or the place must not be written."""


class FormatError(RasteretDaskError, ValueError):
    """A store, plan, table or state was written in a format that this version of the package does not read."""


class JobError(RasteretDaskError):
    """Some shards failed; the others are written, the store is not committed, and a rerun does only those."""


class MissingExtraError(RasteretDaskError, ImportError):
    """A package that only some exits need is not installed; the remedy is the command that installs it."""


class MixedScalesWarning(UserWarning):
    """Raw numbers that mean different things by scale or offset come into the same array."""


class SignedHrefsWarning(UserWarning):
    """Hrefs arrived with signatures or passwords, which this process keeps in its memory and never writes."""


class UnknownKindWarning(UserWarning):
    """Integers of a band whose kind nobody tells are averaged: right for measured numbers, wrong for class codes."""


class UnreadableTilesWarning(UserWarning):
    """Tiles could not be read; as ``on_error="mask"`` asks, their pixels are invalid."""


class ConcurrentWriteWarning(UserWarning):
    """Another client writes the same store at this moment: the store will be right, but work is done twice."""


_INSIDE = (
    os.path.dirname(__file__) + os.sep,
    functools.__file__,
)  # cached properties are computed by functools


def user_level() -> int:
    """Return the ``stacklevel`` with which a warning of the caller names the first line outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
