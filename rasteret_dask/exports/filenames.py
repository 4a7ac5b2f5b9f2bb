# SPDX-License-Identifier: Apache-2.0
"""What files and members of tars are called after chips, whatever their ids hold."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from rasteret_dask.errors import PlanError

__all__ = ["ALL", "check_clashes", "file_name", "sample_key"]

ALL = "all"
"""The folder of chips without a split."""

LONGEST = 160
"""Letters of a name; beyond, its end is a hash. File systems take 255 bytes, and suffixes follow."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")


def file_name(text: str) -> str:
    """Return a text as part of a file's name: other characters than letters, digits and ``._+-`` as ``~2F``.

    Two texts never get one name.

    Examples
    --------
    >>> from rasteret_dask.exports.filenames import file_name
    >>> file_name("33_2.56km_-17375_1557"), file_name("plot 7/b")
    ('33_2.56km_-17375_1557', 'plot~207~2Fb')
    """
    name = _UNSAFE.sub(_escaped, text)
    if name[:1] in (".", "-"):
        name = f"~{ord(name[0]):02X}{name[1:]}"
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 33]}~{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def sample_key(text: str) -> str:
    """Return a text as the key of a sample in a tar: as a file's name, with commas for the dots that would end it.

    Examples
    --------
    >>> from rasteret_dask.exports.filenames import sample_key
    >>> sample_key("33_2.56km_-17375_1557")
    '33_2,56km_-17375_1557'
    """
    return file_name(text).replace(".", ",")


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"~{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))


def check_clashes(step: str, names: Sequence[str], chips: Iterable[str]) -> None:
    """Raise PlanError where two files would have one name.

    Parameters
    ----------
    step
        Who writes them.
    names
        Of sources and masks: what stands behind ``<chip>_``.
    chips
        All ids, which are looked at only where names leave a doubt.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = file_name(name).casefold()
        if key in seen:
            raise PlanError(
                step, f"two of its sources, masks and their validity called {name!r}",
                f"names that differ by more than case: {', '.join(names)}", "Rename one: join(name=...).",
            )  # fmt: skip
        seen[key] = name
    ends = [name for name in seen if any(other != name and name.endswith(f"_{other}") for other in seen)]
    if not ends:
        return
    paths: dict[str, str] = {}
    for chip in chips:
        for name in seen:
            path = f"{file_name(chip)}_{name}"
            if paths.setdefault(path, chip) != chip:
                raise PlanError(
                    step, f"chips {paths[path]!r} and {chip!r}, whose files would both be called {path!r}",
                    "another name of each file", f"Rename source {seen[ends[0]]!r}: join(name=...).",
                )  # fmt: skip
