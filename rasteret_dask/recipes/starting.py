# SPDX-License-Identifier: Apache-2.0
"""The first recipe of somebody's own: commented, and ready to be run."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rasteret_dask.catalogs.catalog import find
from rasteret_dask.catalogs.catalogfile import Entry
from rasteret_dask.ingest.filelist import files_of
from rasteret_dask.rules.kinds import CLASS, EMBEDDING
from rasteret_dask.rules.masks import quality_among

__all__ = ["SCHEMA_FILE", "starter"]

SCHEMA_FILE = "recipe.schema.json"
"""What the JSON Schema is called that editors complete recipes by, beside the recipe."""

DEMO = "demo/sentinel-2-l2a"
COLOURS = ("red", "green", "blue", "nir")

ANNUAL = frozenset((EMBEDDING.name, CLASS.name))
"""Kinds of bands that are made for a year, as far as known datasets go."""

_DATES = {r"(?<!\d)(?P<date>\d{8})(?!\d)": "%Y%m%d", r"(?P<date>\d{4}-\d\d-\d\d)": "%Y-%m-%d"}
"""{how dates stand in file names: how ``strptime`` reads them}."""

_HEAD = """\
#:schema {schema}
# A job as one file. Look at it first, then run it; a second run does what is missing, and nothing else:
#
#   rasteret-dask explain {name}
#   rasteret-dask run {name}
#
# Lines behind # are examples of what else there is; docs/recipes.md has all of it.

# Scenes. Each collection begins with one of: dataset, stac, stac_api, files, table, records, from, merge, join.
"""

_TAIL = """
# Training samples: squares of the ground.
[chips]
{chips}

# Which of them train. The same ground is always in the same split.
[split]
train = 0.7
val = 0.15
test = 0.15
# seed = 42                                       # another seed deals the ground out anew
# buffer_m = 500                                  # no val or test chip nearer to a train chip

# Steps on chips, in order, one [[steps]] each:
# [[steps]]
# filter_pixels = {{ min_valid = 0.5 }}             # at least half of each chip is valid

# What is written, one [[outputs]] each: zarr, table, plan or stats.
[[outputs]]
zarr = "train.zarr"
splits = ["train"]                                # left out: all chips

# [[outputs]]
# table = "chips.parquet"                         # where each chip is, and its split

# Where it runs; left out: on threads of one process.
# [cluster]
# kind = "local"                                  # processes of this machine; or "gateway", "kubernetes", "slurm"
# workers = 4                                     # left out: as many as there is work for, at most 4
# memory = "4GiB"                                 # of each; left out: what explain tells
# address = "tcp://scheduler:8786"                # instead of all that: a Dask cluster that runs
"""


def starter(
    beginning: Mapping[str, Any] | None = None,
    *,
    bands: Sequence[str] | None = None,
    name: str = "recipe.toml",
    schema: str = SCHEMA_FILE,
) -> str:
    """Return a commented recipe to begin with.

    Parameters
    ----------
    beginning
        What the collection begins with, and further arguments: ``{"dataset": "earthsearch/sentinel-2-l2a",
        "bbox": [10.9, 45.4, 11.1, 45.6]}``, ``{"files": "ortho/*.tif"}``, ``{"records": "s2.parquet"}``. Local files
        are looked for, and their dates are read from their names. None: the demo's Sentinel-2 scenes.
    bands
        The bands of the chips; None: what the dataset is known to have, else all.
    name
        What the recipe's file will be called, in its comments.
    schema
        Where editors find the JSON Schema, seen from the recipe.

    Raises
    ------
    SourceError
        When there is no such dataset, or there are no such files.

    Examples
    --------
    >>> from rasteret_dask.recipes.starting import starter
    >>> starter({"dataset": "demo/sentinel-2-l2a"}).splitlines()[0]
    '#:schema recipe.schema.json'
    """
    values = dict(beginning or {"dataset": DEMO})
    entry = find(str(values["dataset"])) if "dataset" in values else None
    lines = ["[collections.scenes]"]
    if entry is not None:
        values = _searched(values, entry)
    if "files" in values:
        values |= _dated(values)
    lines += [_line(f"{key} = {_toml(value)}", _WORDS.get(key, "")) for key, value in values.items()]
    if "date_range" not in values and entry is None:
        lines.append(
            _line('# subset = { date_range = ["2024-04-01", "2024-06-30"] }', "the last day is included")
        )
    lines += ["", "# The same bands, units, grid and times for all scenes of a collection."]
    lines += _harmonized(entry, bands)
    return (
        _HEAD.format(schema=schema, name=name)
        + "\n".join(lines)
        + "\n"
        + _TAIL.format(chips="\n".join(_chips(entry)))
    )


_WORDS = {
    "dataset": "rasteret-dask datasets lists them",
    "bbox": "west, south, east, north, degrees",
    "date_range": "the last day is included",
    "files": "a path, a pattern, a folder, or a list of them",
    "filename_regex": "where the date stands in a file's name",
    "static": "no time in the files' names: they hold at any time",
    "records": "what rasteret-dask build wrote",
    "stac": "items, a static catalog, or STAC GeoParquet",
}


def _searched(values: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """Return what a dataset is searched for: a place and a time, where nobody named them."""
    result = dict(values)
    if entry.catalog is None and "bbox" not in result:
        result["bbox"] = [10.9, 45.4, 11.1, 45.6]
    if "date_range" not in result and not entry.static:
        year = (entry.time_end or "2024")[:4]
        kinds = {band.kind for band in entry.dataset.bands} if entry.dataset is not None else set()
        annual = bool(kinds) and kinds <= ANNUAL
        result["date_range"] = [year, year] if annual else [f"{year}-04-01", f"{year}-06-30"]
    return result


def _dated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return where local files' names have their dates; that they hold at any time, where they have none."""
    if {"filename_regex", "date_tag", "static"} & values.keys():
        return {}
    names = [row.path for row in files_of(values["files"], "scenes").rows]
    for pattern, style in _DATES.items():
        if all((match := re.search(pattern, name)) and _is_date(match["date"], style) for name in names):
            return {"filename_regex": pattern, **({} if style == "%Y%m%d" else {"date_format": style})}
    return {"static": True}


def _is_date(text: str, style: str) -> bool:
    try:
        return 1970 <= dt.datetime.strptime(text, style).year <= 2100
    except ValueError:
        return False


def _harmonized(entry: Entry | None, bands: Sequence[str] | None) -> list[str]:
    every = () if entry is None or entry.dataset is None else entry.dataset.bands
    codes = [band.code for band in every if band.role == "data" and not band.optional]
    common = {band.common_name for band in every}
    names = [
        name for name in (*COLOURS, "nir08") if name in common and not (name == "nir08" and "nir" in common)
    ]
    radar = [code for code in codes if code in ("vv", "vh")]  # what nearly all scenes over land have
    chosen = list(bands or names or radar or (codes if len(codes) <= 4 else ()))
    lines = ["[collections.scenes.harmonize]"]
    lines.append(
        _line(f"bands = {_toml(chosen)}", "names, or the sensor's own codes")
        if chosen
        else _line('# bands = ["red", "nir"]', "left out: all bands")
    )
    finest = "" if entry is None or entry.resolution_m is None else f"{entry.resolution_m:g}"
    lines.append(_line(f"# resolution = {finest or 10}", "metres; left out: that of the first band"))
    clouds = quality_among([band.code for band in every]) is not None and bool(names)
    mark = "" if clouds else "# "
    lines += [
        _line(f'{mark}mask = "clouds"', "what becomes invalid, by the scenes' quality band"),
        _line(f'{mark}time = "1MS"', "a slot a month; left out: a chip for each acquisition"),
        _line(f'{mark}pick = "least_cloudy"', "which acquisition a slot takes"),
        _line(f"{mark}fill = true", "what is invalid in it comes from the next"),
    ]
    return lines


def _chips(entry: Entry | None) -> list[str]:
    metres = 10.0 if entry is None or entry.resolution_m is None else entry.resolution_m
    size = 64 if metres > 90 or (entry is not None and entry.catalog is not None) else 128
    lines = [_line(f"size = {size}", "pixels of a side")]
    side = size * metres / 1000.0
    cell: float | None = None
    if entry is not None and entry.id.startswith("demo/"):
        cell = side  # its world is some km wide
    elif abs(15.36 / side - round(15.36 / side)) > 1e-9:  # chips do not fill the default cell
        cell = side * max(1, round(15.36 / side))
    shown = f"cell_km = {cell:g}" if cell is not None else "# cell_km = 5.12"
    return [
        *lines,
        _line(shown, "side of the squares of ground that splits are made of"),
        _line('# aoi = "field.geojson"', "only chips in these shapes"),
    ]


def _line(line: str, comment: str) -> str:
    return f"{line:<49} # {comment}" if comment else line


def _toml(value: Any) -> str:
    """Return text, numbers and lists of them as TOML; patterns in quotes that take backslashes as they are."""
    if isinstance(value, str) and "\\" in value and "'" not in value:
        return f"'{value}'"
    return json.dumps(value, ensure_ascii=False)
