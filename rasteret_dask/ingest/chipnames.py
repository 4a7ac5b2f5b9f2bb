# SPDX-License-Identifier: Apache-2.0
"""Which chip a file is of, and which split: told by patterns of paths, folders, lists of names and tables."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rasteret_dask.errors import PlanError, SourceError
from rasteret_dask.ingest.filelist import FileRow
from rasteret_dask.lists import listed
from rasteret_dask.net.remote import get, is_local, join, local_path, redact

__all__ = ["SPLIT_FOLDERS", "ChipName", "ChipPattern", "NameIndex", "folder_splits", "listed_splits"]

SPLIT_FOLDERS = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "holdout", "hold_out")
)
"""Folders, in lower case, that are splits."""

_GROUP = "(?P<"
_WILD = re.compile(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])")


@dataclass(frozen=True, slots=True)
class ChipName:
    """What a path tells of a chip."""

    chip: str
    groups: Mapping[str, str]
    """Groups of a regular expression, but for ``chip``."""


@dataclass(frozen=True, slots=True)
class ChipPattern:
    """Paths of one kind of file, and which part of them names the chip."""

    text: str
    regex: re.Pattern[str]
    by_groups: bool
    """Whether it is a regular expression with named groups; else what wildcards stand for names the chip."""

    @classmethod
    def of(cls, text: Any, argument: str) -> ChipPattern:
        """Read a pattern: with wildcards, or a regular expression with a group ``(?P<chip>...)``.

        Raises
        ------
        PlanError
            When it is neither.
        """
        if not isinstance(text, str) or not text:
            raise PlanError(
                f"read_chips({argument}=)", repr(text), "a pattern such as 'images/*.tif', or a regular expression "
                "with a group (?P<chip>...)",
            )  # fmt: skip
        if _GROUP not in text:
            parts = _WILD.split(text)
            return cls(text, re.compile("".join(map(_as_regex, parts))), False)
        try:
            regex = re.compile(text)
        except re.error as error:
            raise PlanError(
                f"read_chips({argument}=)", f"{text!r} ({error})", "a regular expression"
            ) from error
        if "chip" not in regex.groupindex:
            raise PlanError(
                f"read_chips({argument}=)", f"{text!r}, which has no group chip", "a group (?P<chip>...)",
                "Name the part of the path that tells chips apart: (?P<chip>.+).",
            )  # fmt: skip
        return cls(text, regex, True)

    def match(self, path: str) -> ChipName | None:
        """Return what a path below the folder tells; None where it is of another kind."""
        found = self.regex.fullmatch(path)
        if found is None:
            return None
        if self.by_groups:
            groups = {name: text for name, text in found.groupdict().items() if text is not None}
            return ChipName(groups.pop("chip"), groups)
        parts = [text.strip("/") for text in found.groups() if text and text.strip("/")]
        return ChipName("/".join(parts) or _stem(path), {})


def _as_regex(part: str) -> str:
    words = {"**/": "((?:.*/)?)", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}
    if part in words:
        return words[part]
    if part.startswith("[") and len(part) > 2 and part.endswith("]"):
        return f"({part.replace('[!', '[^', 1)})"
    return re.escape(part)


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


class NameIndex:
    """Chips by what people call them: their name, the last part of it, the path or name of a file of theirs.

    Parameters
    ----------
    files
        Chip -> its files.
    """

    def __init__(self, files: Mapping[str, Sequence[FileRow]]) -> None:
        self._chips = files
        self._other: dict[str, set[str]] = defaultdict(set)
        for chip, own in files.items():
            self._other[chip.rpartition("/")[2]].add(chip)
            for row in own:
                base = row.path.rpartition("/")[2]
                for name in (row.path, _stem(row.path), base, _stem(base), row.href):
                    self._other[name].add(chip)

    def chip(self, name: str, subject: str) -> str | None:
        """Return the chip that is meant; None where there is none.

        Raises
        ------
        SourceError
            When several are called so.
        """
        if name in self._chips:
            return name
        found = self._other.get(name.removeprefix("./")) or self._other.get(_stem(name)) or set()
        if len(found) > 1:
            raise SourceError(
                subject, f"{name!r}, as several chips are called: {listed(sorted(found))}", "one chip by each name",
                f"Write names in full: {min(found)!r}.",
            )  # fmt: skip
        return next(iter(found), None)

    def some(self) -> str:
        """Return the first names, for messages."""
        return listed([repr(chip) for chip in sorted(self._chips)])


def folder_splits(files: Mapping[str, FileRow]) -> dict[str, str] | None:
    """Return chip -> the folder above its file that is a split; None where no file lies in such a folder.

    Raises
    ------
    SourceError
        When only some do.
    """
    splits: dict[str, str] = {}
    for chip, row in files.items():
        for folder in row.path.split("/")[:-1]:
            if folder.lower() in SPLIT_FOLDERS:
                splits[chip] = folder
                break
    if not splits:
        return None
    others = [row.path for chip, row in files.items() if chip not in splits]
    if others:
        raise SourceError(
            "read_chips(split='folders')", f"{len(others)} of {len(files)} files in no folder of a split: "
            f"{listed(others)}", f"all of them in folders such as {listed(sorted(set(splits.values())))}",
            "Say images= so that it leaves them out; split=None for no splits; or split={'train': 'train.txt', ...}.",
        )  # fmt: skip
    return splits


def listed_splits(
    lists: Mapping[str, Any], index: NameIndex, folder: str, skips: bool
) -> tuple[dict[str, str], list[str]]:
    """Return chip -> the split whose list names it, and the names that are no chip's.

    Parameters
    ----------
    lists
        Split -> names, or the path of a text file with a name a line.
    index
        The chips.
    folder
        What paths are relative to.
    skips
        Whether names of no chip are left out.

    Raises
    ------
    SourceError
        When a list names no chip, or two lists name one.
    """
    splits: dict[str, str] = {}
    strangers: list[str] = []
    for split, names in lists.items():
        subject = f"read_chips(split=), list of {split!r}"
        own = _names(names, folder, subject)
        chips = [(name, index.chip(name, subject)) for name in own]
        unknown = [name for name, chip in chips if chip is None]
        if len(unknown) == len(chips) or (unknown and not skips):
            raise SourceError(
                subject, f"{len(unknown)} of {len(chips)} names are no chip's: {listed([repr(n) for n in unknown])}",
                f"names of chips: {index.some()}",
                "Correct the list"
                + ("." if len(unknown) == len(chips) else "; or leave such names out: on_error='skip'."),
            )  # fmt: skip
        strangers += unknown
        for _, chip in chips:
            if chip is not None and splits.setdefault(chip, split) != split:
                raise SourceError(
                    subject, f"chip {chip!r}, which is in the list of {splits[chip]!r} too", "each chip in one split",
                    "Take it out of one of the lists.",
                )  # fmt: skip
    return splits, strangers


def _names(names: Any, folder: str, subject: str) -> list[str]:
    if isinstance(names, str | os.PathLike):
        text = os.fspath(names)
        place = text if "://" in text or os.path.isabs(os.path.expanduser(text)) else join(folder, text)
        if is_local(place):
            try:
                with open(local_path(os.path.expanduser(place)), encoding="utf-8") as file:
                    lines = file.read().splitlines()
            except OSError as error:
                raise SourceError(
                    subject, f"{redact(place)}: {error.strerror}", "a text file with a name a line",
                    "Say the names themselves as a list, or a path relative to the folder.",
                )  from error  # fmt: skip
        else:
            lines = bytes(get(place)).decode("utf-8", "replace").splitlines()
        return [line.strip() for line in lines if line.strip()]
    if isinstance(names, Iterable) and not isinstance(names, bytes):
        return [str(name) for name in names]
    raise SourceError(subject, repr(names), "names of chips, or the path of a text file with a name a line")
