# SPDX-License-Identifier: Apache-2.0
"""Versions of what is written: a format says how it is read, the meaning which pixels it holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rasteret_dask._version import __version__
from rasteret_dask.errors import FormatError

__all__ = [
    "ANSWERS", "MAP_FILE", "MEANING", "PLAN", "STATE", "STORE", "TABLE", "Format", "check_table", "table_metadata",
]  # fmt: skip

MEANING = 3
"""Version of what a plan makes: part of the digest of every job and shard, in place of the package's version.

Raise it where the same plan and files give other pixels, or the same pixels another place or encoding in a store.
Then unfinished jobs and stream states of before are refused by name; whatever else changes, they go on.
"""

_KEY = b"rasteret_dask"  # of a table's schema metadata

_VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,40}")


@dataclass(frozen=True, slots=True)
class Format:
    """The format of one kind of thing that is written, and what to do with one of an earlier format."""

    kind: str
    """What it is called in messages: ``"store"``."""
    number: int
    """Raised where an older package would misread it."""
    remedy: str
    """What to do with one of an older format."""

    @property
    def note(self) -> dict[str, Any]:
        """What is written into it: the format, and the package that wrote it."""
        return {"format": self.number, "version": __version__}

    def check(self, subject: str, note: Mapping[str, Any]) -> None:
        """Compare the note of something that is read.

        Parameters
        ----------
        subject
            What is read, for errors.
        note
            What was written into it; other keys are ignored.

        Raises
        ------
        FormatError
            When it is newer than this package knows, older than it reads, or there is none.
        """
        number, version = note.get("format"), note.get("version")
        if number == self.number and not isinstance(number, bool):
            return
        writer = version if isinstance(version, str) and _VERSION.fullmatch(version) else None
        by = f", written by rasteret_dask {writer}" if writer else ""
        if isinstance(number, int) and not isinstance(number, bool) and number > self.number:
            raise FormatError(
                subject, f"a {self.kind} of format {number}{by}",
                f"format {self.number}, which rasteret_dask {__version__} reads",
                f"Update the package: pip install 'rasteret-dask>={writer}'." if writer else "Update the package.",
            )  # fmt: skip
        found = (
            f"a {self.kind} of format {number!r}" if "format" in note else f"a {self.kind} without a format"
        )
        raise FormatError(subject, f"{found}{by}", f"format {self.number}", self.remedy)


STORE = Format("store", 2, "Write it again with to_zarr.")
PLAN = Format("saved plan", 2, "Save it again with save_plan.")
TABLE = Format("record table", 1, "Build it again, or export it with the version that wrote it.")
ANSWERS = Format("table of a model's answers", 1, "Write it again with predict or embed.")
MAP_FILE = Format("map as a GeoTIFF", 1, "Write it again with predict.")
STATE = Format("stream state", 2, "Begin the epoch again: state_dict() of a new stream.")


def table_metadata() -> dict[bytes, bytes]:
    """Return the key-value of a record table's schema that holds its note."""
    return {_KEY: json.dumps(TABLE.note).encode()}


def check_table(subject: str, metadata: Mapping[bytes, bytes] | None) -> None:
    """Compare the note of a record table; those that others wrote have none, and are judged by their columns.

    Parameters
    ----------
    subject
        What is read, for errors.
    metadata
        The metadata of the table's schema.

    Raises
    ------
    FormatError
        When there is a note, and it is of a format that this version does not read.
    """
    text = (metadata or {}).get(_KEY)
    if text is None:
        return
    try:
        note = json.loads(text)
    except (ValueError, RecursionError):
        note = None
    TABLE.check(subject, note if isinstance(note, dict) else {"format": None})
