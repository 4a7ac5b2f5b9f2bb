# SPDX-License-Identifier: Apache-2.0
"""Datasets by name: the package's catalog and a user's own file, read whenever it is asked for.

The user's file is named by ``RASTERET_DASK_CATALOG``, else it is ``catalog.toml`` in the user's folder of settings
(``~/.config/rasteret_dask`` on Linux). :func:`rasteret_dask.register` writes it; ``catalog.toml`` in the package
shows its form. Nothing is kept from import, so every process of a user sees the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path

import platformdirs
import pyarrow as pa

from rasteret_dask.catalogs.bands import Dataset
from rasteret_dask.catalogs.catalogfile import Catalog, Entry, Raw, Store, catalog_of, parse_toml
from rasteret_dask.display.tableview import Columns, TableView
from rasteret_dask.errors import SourceError

__all__ = [
    "DATASETS",
    "Entry",
    "catalog",
    "dataset_of",
    "datasets",
    "find",
    "known_dataset",
    "package",
    "store_of",
    "user_file",
]

VARIABLE = "RASTERET_DASK_CATALOG"

_HOMES = ("HOME", "XDG_CONFIG_HOME", "LOCALAPPDATA", "USERPROFILE")  # what the user's folder depends on

_COLUMNS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("title", pa.string()),
        pa.field("stac_api", pa.string()),
        pa.field("collection", pa.string()),
        pa.field("catalog", pa.string()),  # static STAC
        pa.field("index", pa.string()),  # Parquet
        pa.field("bands", pa.list_(pa.string())),
        pa.field("common_names", pa.list_(pa.string())),  # in the order of bands, null where there is none
        pa.field("resolution_m", pa.float64()),
        pa.field("access", pa.string()),
        pa.field("licence", pa.string()),
        pa.field("licence_url", pa.string()),
        pa.field("attribution", pa.string()),
        pa.field("time_start", pa.string()),
        pa.field("time_end", pa.string()),
        pa.field("bbox", pa.list_(pa.float64())),
        pa.field("source", pa.string()),  # "package", or the user's file
    ]
)


def find(name: str) -> Entry:
    """Return the entry of a dataset id.

    Parameters
    ----------
    name
        As ``earthsearch/sentinel-2-l2a``; see :func:`datasets`.

    Raises
    ------
    SourceError
        When there is none; the nearest ids are named.
    """
    entries = catalog().entries
    if name in entries:
        return entries[name]
    near = [one for one in entries if one.split("/")[-1] == name.casefold()]
    near += [one for one in get_close_matches(name.casefold(), entries, n=3, cutoff=0.5) if one not in near]
    raise SourceError(
        f"dataset {name!r}",
        "no such id",
        f"{' or '.join(map(repr, near))}" if near else f"one of {', '.join(entries)}",
        "rd.datasets() and `rasteret-dask datasets` list them; rd.register(...) adds one, build_from_stac(...) takes "
        "any STAC API.",
    )


def datasets() -> TableView:
    """Return all known datasets: a row each, the package's first.

    Returns
    -------
    TableView
        An Arrow table that prints what each is, its bands, pixel size, time and licence. Its columns:
        id, title, stac_api, collection, catalog, index, bands, common_names, resolution_m (metres), access,
        licence, licence_url, attribution, time_start, time_end (days; null: still going on), bbox (west, south, east,
        north, degrees), source.

    Examples
    --------
    >>> known = rd.datasets()
    >>> "earthsearch/sentinel-2-l2a" in known["id"].to_pylist()
    True
    """
    rows = [_row(entry) for entry in catalog().entries.values()]
    return TableView(pa.Table.from_pylist(rows, schema=_COLUMNS), _looks)


def _looks(entries: pa.Table) -> Columns:
    """Return what is printed of datasets."""
    rows = entries.to_pylist()
    return {
        "id": [row["id"] for row in rows],
        "title": [row["title"] for row in rows],
        "bands": [len(row["bands"]) for row in rows],
        "pixel, m": [row["resolution_m"] for row in rows],
        "since": [row["time_start"] for row in rows],
        "until": [row["time_end"] or "now" for row in rows],
        "licence": [row["licence"] for row in rows],
    }


def known_dataset(dataset: str | Dataset | None, collection: str | None = None) -> Dataset | None:
    """Return bands and rules: of the dataset asked for, else of the one that a STAC collection id names, or None.

    Parameters
    ----------
    dataset
        A dataset's name, an entry's id, or the thing itself.
    collection
        What an item says; only looked at where ``dataset`` is None.

    Raises
    ------
    SourceError
        When ``dataset`` is given and not known.
    """
    if dataset is None:
        return dataset_of(collection)
    if isinstance(dataset, Dataset):
        return dataset
    known = catalog()
    if dataset in known.entries:
        return known.entries[dataset].dataset
    found = dataset_of(dataset)
    if found is None:
        raise SourceError(f"dataset {dataset!r}", "no such dataset", f"one of {', '.join(known.datasets)}")
    return found


def dataset_of(collection: str | None) -> Dataset | None:
    """Return the dataset that a STAC collection id, or another name of it, names; None where it is not known."""
    known = catalog()
    name = known.aliases.get(collection, collection) if collection is not None else None
    return None if name is None else known.datasets.get(name)


def store_of(place: str) -> Store | None:
    """Return how a store (``s3://bucket``, ``https://host``) is accessed; None where no file says."""
    path = user_file()
    return _store_of(path, _stamp(path), place.lower())


def catalog() -> Catalog:
    """Return what the package's file and the user's say together, as they are now.

    Raises
    ------
    SourceError
        When the user's file is broken.
    """
    path = user_file()
    return _read(path, _stamp(path))


def user_file() -> Path:
    """Return the user's own file, whether it is there or not."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else _usual_file(*map(os.environ.get, _HOMES))


@lru_cache(maxsize=8)
def _usual_file(*_homes: str | None) -> Path:
    return platformdirs.user_config_path("rasteret_dask", False) / "catalog.toml"


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file does, None where there is no file."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SourceError(
            f"catalog {path}", error.strerror or str(error), "a file that can be read"
        ) from error
    return found.st_mtime_ns, found.st_size, found.st_ino


@lru_cache(maxsize=4)
def _read(path: Path, stamp: tuple[int, ...] | None) -> Catalog:
    if stamp is None:
        return catalog_of(package())
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"catalog {path}", str(error), "a TOML file that can be read") from error
    return catalog_of(package(), parse_toml(text, str(path)), str(path))


@lru_cache(maxsize=256)
def _store_of(path: Path, stamp: tuple[int, ...] | None, place: str) -> Store | None:
    stores = _read(path, stamp).stores
    return next((store for store in stores if fnmatchcase(place, store.place.lower())), None)


@cache
def package() -> Raw:
    """Return the tables of the package's own file."""
    return parse_toml(
        files("rasteret_dask.catalogs").joinpath("catalog.toml").read_text(encoding="utf-8"), "package"
    )


def _row(entry: Entry) -> dict[str, object]:
    bands = entry.dataset.bands if entry.dataset else ()
    fields = {name: getattr(entry, name) for name in _COLUMNS.names if hasattr(entry, name)}
    return {
        **fields,
        "collection": entry.stac_collection,
        "bands": [band.code for band in bands],
        "common_names": [band.common_name for band in bands],
        "bbox": None if entry.bbox is None else list(entry.bbox),
    }


DATASETS: Mapping[str, Dataset] = catalog_of(package()).datasets
"""The package's datasets by name: a constant, equal in every process."""
