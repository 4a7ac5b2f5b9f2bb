# SPDX-License-Identifier: Apache-2.0
"""Steps of a plan as the calls that a user would type: dates, boxes in degrees, long lists summed up."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from keyword import iskeyword
from typing import Any

import pyarrow as pa
import shapely

from rasteret_dask.footprint import box_around
from rasteret_dask.lists import MOST_LISTED, listed
from rasteret_dask.planning.plan import (
    TIME,
    ChipSpec,
    CutChips,
    Filter,
    FilterChips,
    FilterPixels,
    Folds,
    Harmonize,
    HarmonizeSpec,
    Join,
    Map,
    Merge,
    Node,
    Predicate,
    Random,
    Sample,
    Select,
    Source,
    Split,
    SplitSpec,
    WithTable,
    changes,
    is_number,
)
from rasteret_dask.rules.masks import AnyOf, Mask, Named
from rasteret_dask.rules.picks import PICKS, Pick
from rasteret_dask.rules.units import PHYSICAL, UNITS, Unit, Units
from rasteret_dask.zones import BoxGrid, ChipGrid, CrsGrid

__all__ = ["call", "calls", "chain", "condition", "quoted", "rows_in"]

THEN = " > "
"""Stands between a step and the next; inside a call that is a dot."""

TableRows = Callable[[str], int | None]
"""Token -> how many rows the table has; None: nobody knows."""


def chain(node: Node, rows: TableRows = lambda token: None) -> str:
    """Return a plan as one line: ``s2 > subset(cloud_cover_lt=30) > chips(128)``.

    Parameters
    ----------
    node
        The plan's last step.
    rows
        How many rows the tables have that steps name.
    """
    return THEN.join(calls(node, rows))


def calls(node: Node, rows: TableRows = lambda token: None) -> Iterator[str]:
    """Yield the steps of a plan, the first one first; what lies below a merge or a join stands inside its call."""
    match node:
        case Merge(below):
            yield f"merge({', '.join('.'.join(calls(child, rows)) for child in below)})"
        case Join(names, below, require):
            sides = [_side(name, child, rows) for name, child in zip(names, below, strict=True)]
            yield f"join({', '.join([*sides, *_set(require=require)])})"
        case Source(name, _, where):
            yield name
            yield from _filters(where)
        case Filter(child, where):
            yield from calls(child, rows)
            yield from _filters(where)
        case _:
            yield from calls(node.child, rows)
            yield call(node, rows)


def call(node: Node, rows: TableRows = lambda token: None) -> str:
    """Return the last step of a plan as a call, without what lies below."""
    match node:
        case Harmonize(_, spec):
            return f"harmonize({', '.join(_harmonized(spec))})"
        case Map(_, function, source):
            return f"map({', '.join([function.name, *_set(source=source)])})"
        case Join(names, _, require):
            return f"join({', '.join([*names, *_set(require=require)])})"
        case Merge(below):
            return f"merge(of {len(below)})"
        case Sample(_, n, seed, by):
            return f"sample({', '.join([str(n), *_set(seed=seed or None, by=by)])})"
        case Random(_, n, seed, size, balance, places):
            columns: object = balance[0] if len(balance) == 1 else balance or None
            columns = columns if places is None else _Typed(_table(places, rows))
            return f"random({', '.join([str(n), *_set(seed=seed or None, size=size, balance=columns)])})"
        case CutChips(_, spec):
            return f"chips({', '.join(_cut(spec, rows))})"
        case Split(_, spec):
            return f"split({', '.join(_dealt(spec, rows))})"
        case Folds(_, spec):
            return f"folds({', '.join(_folded(spec, rows))})"
        case Select(_, splits):
            return f"select({', '.join(map(quoted, splits))})"
        case FilterPixels(_, spec):
            own = [] if spec.function is None else [spec.function.name]
            shares = _set(
                min_valid=spec.min_valid, max_cloud=spec.max_cloud, min_labelled=spec.min_labelled,
                source=spec.source,
            )  # fmt: skip
            return f"filter_pixels({', '.join([*own, *shares])})"
        case WithTable(_, token):
            return f"with_table({_table(token, rows)})"
        case Filter(_, where) | FilterChips(_, where):
            return ".".join(_filters(where))
        case Source(name):
            return name
    raise AssertionError(node)


def rows_in(tables: Mapping[str, object]) -> TableRows:
    """Return what tells how many rows a plan's tables have: of those in memory, as others would have to be read."""

    def rows(token: str) -> int | None:
        table = tables.get(token)
        return table.num_rows if isinstance(table, pa.Table) else None

    return rows


def condition(predicate: Predicate) -> str:
    """Return a predicate in words: ``cloud cover < 30``, ``touches the box (13.0, 52.0, 13.5, 52.5)``."""
    column, op, value = predicate
    if column == "datetime" and op == "overlaps":
        start, end = _dates(value)
        return f"from {start or 'the beginning'} to {end or 'the end'}"
    if op in ("intersects", "near"):
        return f"{'near' if op == 'near' else 'on'} {_area(value)}"
    return f"{column} {op} {quoted(value)}"


def quoted(value: object, noun: str = "values") -> str:
    """Return a value as it would be typed; tuples as lists, long ones summed up."""
    if isinstance(value, str):
        return f'"{value}"' if value.isprintable() and not set('"\\') & set(value) else repr(value)
    if isinstance(value, tuple | list):
        if len(value) <= MOST_LISTED:
            return f"[{', '.join(quoted(one) for one in value)}]"
        return f"[{listed(value, noun)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{quoted(key)}: {quoted(one)}' for key, one in value.items())}}}"
    return str(value)


def _filters(where: tuple[Predicate, ...]) -> Iterator[str]:
    """Yield the calls of subset() and filter() that keep what fulfils all predicates."""
    subset, equal, triples = [], [], []
    for predicate in where:
        column, op, value = predicate
        if column == "datetime" and op == "overlaps":
            start, end = _dates(value)
            subset.append(f"date_range=({_none_or(start)}, {_none_or(end)})")
        elif column == "eo:cloud_cover" and op == "<" and is_number(value) and 0 <= float(str(value)) <= 100:
            subset.append(f"cloud_cover_lt={_figure(value)}")
        elif op == "intersects":
            subset.append(f"{'bbox' if column == 'bbox' else 'geometries'}={_area(value)}")
        elif _is_keyword(column) and op == ("in" if isinstance(value, tuple) else "=="):
            equal.append(f"{column}={quoted(value)}")
        else:
            triples.append(f"({quoted(column)}, {quoted(op)}, {quoted(value)})")
    if subset:
        yield f"subset({', '.join([*subset, *equal])})"
        equal = []
    if triples or equal:
        yield f"filter({', '.join([*triples, *equal])})"


def _is_keyword(column: str) -> bool:
    """Whether a column can be given by name: ``platform="sentinel-2a"``."""
    taken = ("self", "bbox", "date_range", "cloud_cover_lt", "geometries", "split_column")
    return column.isidentifier() and not iskeyword(column) and column not in taken


def _keyword(name: str, text: str) -> str:
    """Return an argument that may have any name."""
    return (
        f"{name}={text}" if name.isidentifier() and not iskeyword(name) else f"**{{{quoted(name)}: {text}}}"
    )


def _side(name: str, node: Node, rows: TableRows) -> str:
    return f"{name}={'.'.join(calls(node, rows))}"


def _harmonized(spec: HarmonizeSpec) -> list[str]:
    values = changes(spec, HarmonizeSpec())
    bands = [quoted(values.pop("bands"), "bands")] if "bands" in values else []
    if spec.units is not None:
        values["units"] = None if str(spec.units) == PHYSICAL else _units(spec.units)
    if spec.mask is not None:
        values["mask"] = _mask(spec.mask)
    if spec.pick is not None:
        values["pick"] = _pick(spec.pick)
    if spec.kinds is not None:
        values["kinds"] = dict(spec.kinds)
    return bands + _set(**values)


def _cut(spec: ChipSpec, rows: TableRows) -> list[str]:
    values = changes(spec, spec.plain)
    if "aoi" in values:
        values["aoi"] = _Typed(_area(spec.aoi))
    for name in ("at", "labels"):
        if name in values:
            values[name] = _Typed(_table(values[name], rows))
    if "grid" in values:
        values["grid"] = _grid(spec.grid)
    if spec.context_m:
        values["context_m"] = dict(spec.context_m)
    if spec.classes and not isinstance(spec.rasterize, str):
        values["classes"] = dict(spec.classes)
    return [str(spec.size), *_set(**values)]


def _dealt(spec: SplitSpec, rows: TableRows) -> list[str]:
    others = _deal(changes(spec, SplitSpec(spec.ratios, by=spec.by, values=spec.values)), spec, rows)
    if spec.by == TIME:
        ranges = [(name, _dates(own)) for name, own in spec.values if own is not None]
        parts = [_keyword(name, f"({_none_or(a)}, {_none_or(b)})") for name, (a, b) in ranges]
        return [*_set(by=TIME), *parts, *_set(**others)]
    if spec.regions is not None:
        others.pop("regions", None)
        values = [_keyword(name, quoted(own)) for name, own in spec.values if own is not None]
        return [*_set(by=_Typed(_table(spec.regions, rows))), *values, *_set(**others)]
    if spec.column is not None:
        values = [_keyword(name, quoted(own)) for name, own in spec.values if own is not None]
        return [*_set(by=spec.by), *values, *_set(**others)]
    shares = [_figure(share) for _, share in spec.ratios]
    if spec.names != ("train", "val", "test")[: len(shares)]:
        shares = list(map(_keyword, spec.names, shares))
    return shares + _set(**{"seed": spec.seed, "by": None if spec.by == "ground" else spec.by, **others})


def _folded(spec: SplitSpec, rows: TableRows) -> list[str]:
    others = changes(spec, SplitSpec(spec.ratios, salt=spec.salt))
    return [str(len(spec.ratios)), *_set(**_deal(others, spec, rows))]


def _deal(others: dict[str, Any], spec: SplitSpec, rows: TableRows) -> dict[str, Any]:
    """Put what decides the deal of split cells as it would be typed."""
    if len(spec.stratify) == 1:
        others["stratify"] = spec.stratify[0]
    if spec.raster is not None:
        count = rows(spec.raster)
        others["stratify"] = _Typed(
            f"<classes of {spec.stratify[0]}{'' if count is None else f' in {count:,} cells'}>"
        )
        del others["raster"]
    if spec.cells is not None:
        others["cells"] = _Typed(_table(spec.cells, rows))
    return others


class _Typed(str):
    """Text that stands in a call as it is, without quotes."""


def _set(**values: object) -> list[str]:
    """Return the keywords that are set."""
    return [f"{name}={_as_typed(value)}" for name, value in values.items() if value is not None]


def _table(token: str | None, rows: TableRows) -> str:
    count = None if token is None else rows(token)
    return "<a table>" if count is None else f"<a table of {count:,} rows>"


def _units(units: Units) -> object:
    if not units.bands:
        return PHYSICAL if units.default is None else _unit(units.default)
    return _Typed("{" + ", ".join(f"{quoted(b)}: {_as_typed(_unit(unit))}" for b, unit in units.bands) + "}")


def _unit(unit: Unit) -> object:
    return unit.name if UNITS.get(unit.name) == unit else _Typed(repr(unit))


def _pick(pick: Pick) -> object:
    return pick.name if PICKS.get(pick.name) == pick else _Typed(repr(pick))


def _mask(mask: Mask) -> object:
    masks = mask.masks if isinstance(mask, AnyOf) else (mask,)
    parts: list[object] = []
    for one in masks:
        parts += one.words if isinstance(one, Named) else [_Typed(repr(one))]
    if len(parts) == 1:
        return parts[0]
    return _Typed(f"[{', '.join(map(_as_typed, parts))}]")


def _as_typed(value: object) -> str:
    if isinstance(value, _Typed):
        return str(value)
    return _figure(value) if isinstance(value, float) else quoted(value)


def _grid(grid: ChipGrid) -> object:
    plain = not isinstance(grid, BoxGrid) and (not isinstance(grid, CrsGrid) or grid == CrsGrid(grid.crs))
    return str(grid) if plain else _Typed(f"<{grid}>")


def _area(value: Any) -> str:
    """Return a box, or the box around another area, in degrees."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_figure, value))})"
    try:
        shape = shapely.from_wkb(bytes.fromhex(str(value)))
    except (ValueError, shapely.errors.ShapelyError):
        return f"<{value}>"
    if shapely.is_empty(shape):
        return "<an empty area>"
    box = ", ".join(f"{degrees:.6g}" for degrees in box_around(shape))
    if shape.equals(shapely.box(*shape.bounds)):
        return f"({box})"
    return f"<{shape.geom_type} in {box}>"


def _dates(value: Any) -> tuple[str | None, str | None]:
    """Return a half-open range of times as it would be typed: days where it is whole days, the last one included."""
    start, end = value
    if start is not None:
        start = _day(str(start), 0)
    return start, None if end is None else _day(str(end), 1)


def _day(text: str, before: int) -> str:
    plain = text.removesuffix("+00:00").removesuffix("Z")
    date, _, time = plain.partition("T")
    try:
        day = dt.date.fromisoformat(date)
    except ValueError:  # a plan that somebody wrote by hand
        return text
    if time.strip("0:.") or day == dt.date.min:
        return plain
    return (day - dt.timedelta(days=before)).isoformat()


def _none_or(text: str | None) -> str:
    return "None" if text is None else quoted(text)


def _figure(value: Any) -> str:
    """Return a number without a needless ``.0``."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
