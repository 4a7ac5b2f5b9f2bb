# SPDX-License-Identifier: Apache-2.0
"""What the pixels of some chips look like, of all sources: shown, saved, and used to normalize."""

from __future__ import annotations

import base64
import functools
import json
import operator
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import PRESENT
from rasteret_dask.display.card import Card, Fact, counted
from rasteret_dask.display.html import Markup, fold, svg_bars, table
from rasteret_dask.display.tableview import TableView
from rasteret_dask.errors import PlanError, SchemaError
from rasteret_dask.lists import listed
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.planning.bandkinds import BandKind
from rasteret_dask.rules.kinds import kind_of
from rasteret_dask.statistics import labelcounts
from rasteret_dask.statistics.labelcounts import LabelCounts, Value
from rasteret_dask.statistics.sketch import SourceStats, added, measured, valid_pixels
from rasteret_dask.tasks.batches import Arrays, SourcePixels

__all__ = ["Stats", "measure", "merged"]

VERSION = 4
"""Of the JSON text; what the numbers of version 1 mean depends on their dtype, 2 knows no kinds, 3 no labels."""


@dataclass(frozen=True)
class Stats:
    """What the pixels of some chips look like: ``stats["optical"].mean``, ``stats.normalize(batch)``.

    Examples
    --------
    >>> stats = chips.select("train").stats()
    >>> stats.table["band"].to_pylist()
    ['red', 'nir']
    >>> round(float(stats["s2"].mean[0]), 2)
    0.07
    """

    sources: Mapping[str, SourceStats]
    chips: int
    """How many were measured."""
    labels: Mapping[str, LabelCounts] = field(default_factory=dict)
    """Column -> how many chips have each of its values, of the user's columns but for times."""

    def __add__(self, other: Stats) -> Stats:
        """Return the statistics of the chips of both: of two splits, or of two stores of the same sources.

        Counts, extremes and percentiles are the same as if all chips had been measured at once; mean and deviation
        but for the rounding of float64.

        Raises
        ------
        PlanError
            When their sources, bands, dtypes, units or kinds of bands differ.

        Examples
        --------
        >>> train, val = (chips.select(split).stats(progress=False) for split in ("train", "val"))
        >>> (train + val).chips == train.chips + val.chips
        True
        """
        if not isinstance(other, Stats):
            return NotImplemented
        _same_sources(self, other)
        sources = {name: added(own, other.sources[name]) for name, own in self.sources.items()}
        chips = self.chips, other.chips
        columns = dict.fromkeys((*self.labels, *other.labels))
        labels = {
            name: labelcounts.add(self.labels.get(name), other.labels.get(name), chips) for name in columns
        }
        return Stats(sources, sum(chips), labels)

    def __getitem__(self, source: str) -> SourceStats:
        """Return one source's.

        Raises
        ------
        PlanError
            When there is no such source.
        """
        if source not in self.sources:
            raise PlanError(
                f"statistics of source {source!r}", "none", f"one of {', '.join(self.sources)}",
                "Measure it too: stats(), without sources=; or normalize the others only: "
                f"partial(stats.normalize, sources={list(self.sources)}).",
            )  # fmt: skip
        return self.sources[source]

    def normalize(
        self, arrays: Arrays, nan: float = float("nan"), sources: Sequence[str] | None = None
    ) -> Arrays:
        """Return chips with (pixels - mean) / std per band, as float32; a band that never varies becomes 0.

        Classes, bit fields, masks and label columns are targets and keep their numbers: a source of nothing else stays
        as it is, integers too; beside measured bands they become float32 with these.

        Parameters
        ----------
        arrays
            Chips as arrays, a batch say, of the sources, bands and units that were measured. What is not pixels stays
            as it is, but ``<source>/valid`` is False where floats are infinite, as it is where they are NaN.
        nan
            What invalid pixels become, in all bands: NaN, or 0 for the bands' mean. NaN and infinite pixels are
            invalid, and so is all of a source that a chip lacks.
        sources
            The sources to normalize; the others stay as they are, measured or not. None: all.

        Raises
        ------
        PlanError
            When there are pixels of a source that was not measured, of another dtype, or with other bands; when
            ``sources`` names one that was not measured.

        Examples
        --------
        >>> stats = chips.select("train").stats()
        >>> arrays = stats.normalize(stored.take(list(stored)[:4]), nan=0)
        >>> arrays["s2"].dtype
        dtype('float32')
        """
        result, chosen = dict(arrays), self._chosen(sources)
        for name, values in arrays.items():
            if values.ndim == 5 and (chosen is None or name in chosen):
                own = self[name]
                _same(name, f"{values.shape[2]} bands", f"{len(own.bands)} bands")
                _same(name, f"{values.dtype.name} pixels", f"{own.dtype} pixels")
                if own.kept.all():
                    continue
                _keeps(name, own)
                valid = result[f"{name}/valid"] = _valid(name, arrays)
                result[name] = _scaled(values, valid, own, nan)
        return result

    def _chosen(self, sources: Sequence[str] | None) -> frozenset[str] | None:
        names = (sources,) if isinstance(sources, str) else sources
        return None if names is None else frozenset(name for name in names if self[name])

    def check(self, pixels: Mapping[str, SourcePixels], sources: Sequence[str] | None = None) -> None:
        """Raise an error unless chips can be normalized by these statistics; nothing is read.

        Parameters
        ----------
        pixels
            Source -> what its pixels are. Units "" are unknown, and fit any.
        sources
            The sources that are normalized; None: all.

        Raises
        ------
        PlanError
            When a source was not measured, with other bands or another order of them, or in another dtype or units; or
            when codes beside measured bands are beyond what float32 holds.

        Examples
        --------
        >>> stats = stored.select("train").stats()
        >>> stats.check(stored.stored.map.pixels)  # PlanError where bands, dtypes or units are others
        """
        chosen = self._chosen(sources)
        for name, given in pixels.items():
            if chosen is not None and name not in chosen:
                continue
            own = self[name]
            _same(name, f"bands {', '.join(given.bands)}", f"bands {', '.join(own.bands)}")
            _same(name, f"{given.dtype} pixels", f"{own.dtype} pixels")
            _keeps(name, own)
            if given.units and own.units:
                _same(name, f"units {given.units!r}", f"units {own.units!r}")
            if given.kinds and own.kinds:
                _same(
                    name, *(f"bands of kind {', '.join(str(k.kind) for k in b.kinds)}" for b in (given, own))
                )

    @property
    def table(self) -> TableView:
        """One row a source and band; NaN where numbers of that kind have no such statistic.

        Examples
        --------
        >>> stats = chips.select("train").stats()
        >>> stats.table.column_names[:6]
        ['source', 'band', 'kind', 'count', 'valid_fraction', 'mean']
        """
        rows: list[dict[str, Any]] = []
        for name, own in self.sources.items():
            columns = {
                "count": own.count, "valid_fraction": own.valid_fraction, "mean": own.mean, "std": own.std,
                "min": own.min, "p2": own.percentile(2), "p50": own.percentile(50), "p98": own.percentile(98),
                "max": own.max,
            }  # fmt: skip
            rows += [
                {"source": name, "band": band, "kind": kind, **{k: v[i].item() for k, v in columns.items()}}
                for i, (band, kind) in enumerate(zip(own.bands, own.kind_names, strict=True))
            ]
        return TableView(pa.Table.from_pylist(rows))

    @property
    def class_table(self) -> TableView:
        """One row a value of each band of codes and label column: source, band, value, name, count, share.

        Masks have the source ``"<source>/mask"``, label columns ``"labels"``. The name is "" where nothing tells; text
        in a label column is a name, and has no value. Counts are of pixels, of a label column of chips.

        Examples
        --------
        >>> chips = embeddings.chips(32, cell_km=0.96)
        >>> chips.stats(sample=4).class_table.num_rows  # no band of classes
        0
        """
        rows: list[tuple[Any, ...]] = [
            (name, band, value, own.names.get(band, {}).get(value, ""), count, own.shares[band][value])
            for name, own in self.sources.items()
            for band, coded in zip(own.bands, own.coded, strict=True)
            for value, count in (own.classes.get(band, {}) if coded else {}).items()
        ]
        for column, found in self.labels.items():
            counts = found.counts or {}
            for label, count in counts.items():
                value, name = (int(label), "") if isinstance(label, int) else (None, str(label))
                rows.append(("labels", column, value, name, count, count / sum(counts.values())))
        columns = zip(*rows, strict=True) if rows else [()] * len(_CLASS_ROWS)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _CLASS_ROWS, strict=True)]
        return TableView(pa.table(arrays, schema=_CLASS_ROWS))

    def classes(self, target: str) -> TableView:
        """Return the classes of a target, how many pixels or chips each has, and what it is called.

        Parameters
        ----------
        target
            ``"labels/<column>"``, ``"<source>/mask"``, a source with one band of classes, or ``"<source>/<band>"``.

        Returns
        -------
        TableView
            ``value``, ``name``, ``count``, ``share``, a row a class, by value. Classes that have a name and no pixel
            have count 0. Label columns of text have names only, in their order.

        Raises
        ------
        PlanError
            When there is no such target, or it holds no classes.

        Examples
        --------
        >>> import pyarrow as pa
        >>> ids = chips.table.column("chip_id")
        >>> crops = pa.table({"chip_id": ids, "crop": ["maize", "wheat"] * (len(ids) // 2)})
        >>> stats = chips.with_table(crops).stats(progress=False)
        >>> stats.classes("labels/crop").select(["name", "count", "share"]).to_pylist()
        [{'name': 'maize', 'count': 77, 'share': 0.5}, {'name': 'wheat', 'count': 77, 'share': 0.5}]
        """
        counts, names = self._target(target)
        total = max(sum(counts.values()), 1)
        rows = [
            (
                int(value) if isinstance(value, int) else None,
                names.get(value, "") if isinstance(value, int) else str(value),
                count,
                count / total,
            )
            for value, count in counts.items()
        ]
        columns = zip(*rows, strict=True) if rows else [()] * 4
        fields = [_CLASS_ROWS.field(name) for name in ("value", "name", "count", "share")]
        arrays = [pa.array(column, own.type) for column, own in zip(columns, fields, strict=True)]
        return TableView(pa.table(arrays, schema=pa.schema(fields)))

    def class_weights(
        self, target: str, ignore: Sequence[Value] = (), *, names: bool = False
    ) -> dict[Value, float]:
        """Return a weight for each class: the rarer, the larger, for a loss or a sampler.

        It is n / (k * count) of n pixels (of a label column: chips) in k classes, as scikit-learn's ``"balanced"``:
        the mean of the weights of all pixels is 1, and all classes weigh the same together.

        Parameters
        ----------
        target
            As in :meth:`classes`.
        ignore
            Values that do not count, such as a background, or names of classes: their weight is 0.
        names
            Call classes by their names, where these are known: those of burned text, or of a band's classes in the
            records.

        Returns
        -------
        dict
            Value -> weight, by value; 0 of classes that have a name and no pixel. With ``names``, in the same order:
            name -> weight, but for classes without a name, or of a name that two have.

        Raises
        ------
        PlanError
            When there is no such target, it holds no classes, or ``ignore`` leaves none.

        Examples
        --------
        >>> import pyarrow as pa
        >>> ids = chips.table.column("chip_id")
        >>> crops = pa.table({"chip_id": ids, "crop": ["maize", "wheat"] * (len(ids) // 2)})
        >>> stats = chips.with_table(crops).stats(progress=False)
        >>> stats.class_weights("labels/crop")
        {'maize': 1.0, 'wheat': 1.0}
        >>> import geopandas, shapely
        >>> boxes = shapely.box([14.975, 14.993], 50.163, [14.985, 15.007], 50.171)
        >>> fields = geopandas.GeoDataFrame({"crop": ["maize", "wheat"]}, geometry=boxes, crs=4326)
        >>> red = collection.harmonize(["red"], time="3MS")
        >>> stats = red.chips(32, cell_km=0.96, labels=fields, rasterize="crop").stats(progress=False)
        >>> list(stats.class_weights("s2/mask", ignore=[0], names=True))
        [0, 'maize', 'wheat']
        """
        counts, known = self._target(target)
        alike = Counter(known.values())
        called = {value: name for value, name in known.items() if name and alike[name] == 1}
        pairs: list[tuple[Value, Value]] = [(name, value) for value, name in called.items()]
        value_of = dict([*pairs, *((value, value) for value in counts)])
        unknown = [value for value in ignore if value not in value_of]
        without = {value_of[value] for value in ignore if value in value_of}
        left = {value: count for value, count in counts.items() if count and value not in without}
        if unknown or not left:
            raise PlanError(
                f"class_weights({target!r}, ignore={list(ignore)})",
                f"no class {unknown[0]!r}" if unknown else "no class with a pixel or chip",
                f"some of {listed(list(counts), 'classes')}" if counts else "at least one",
                "Leave out of ignore what is no class, or measure chips that have one.",
            )  # fmt: skip
        total = sum(left.values())
        weights = {value: total / (len(left) * left[value]) if value in left else 0.0 for value in counts}
        keys: dict[Value, Value] = dict(called) if names else {}  # type: ignore[arg-type]
        return {keys.get(value, value): weight for value, weight in weights.items()}

    def _target(self, target: str) -> tuple[Mapping[Value, int], Mapping[int, str]]:
        """Return the counts of a target by value, and the names of its values."""
        columns = {f"labels/{name}": own for name, own in self.labels.items()}
        if target in columns:
            counts = columns[target].counts
            if counts is None:
                raise PlanError(
                    f"classes of {target!r}", f"more than {labelcounts.MOST_VALUES:,} different values",
                    "a column of classes", "Put classes into a column: chips.with_table(table of chip_id and class).",
                )  # fmt: skip
            return counts, {}
        found = {f"{name}/{band}": (own, band) for name, own in self.sources.items() for band in own.classes}
        for name, source in self.sources.items():
            bands = [band for band, coded in zip(source.bands, source.coded, strict=True) if coded]
            bands = bands or list(source.classes)
            if len(bands) == 1 and bands[0] in source.classes:
                found[name] = source, bands[0]
        if target not in found:
            raise PlanError(
                f"classes of {target!r}", "no such target",
                f"one of {', '.join([*columns, *found]) or 'none: there are neither classes nor label columns'}",
                "Say which bands hold classes: harmonize(kinds={'map': 'class'}).",
            )  # fmt: skip
        own, band = found[target]
        names, pixels = own.names.get(band, {}), own.classes[band]
        by_value: dict[Value, int] = {value: pixels.get(value, 0) for value in sorted({*pixels, *names})}
        return by_value, names

    @property
    def _card(self) -> Card:
        rows = [Fact(name, _summary(own), partial(_drawn, own)) for name, own in self.sources.items()]
        rows += [
            Fact(f"labels/{name}", _label_summary(own), partial(_label_drawn, name, own))
            for name, own in self.labels.items()
        ]
        return Card(f"Stats of {counted(self.chips, 'chip')}", rows)

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON, to a local path or a URL.

        Examples
        --------
        >>> stats = chips.select("train").stats(sample=4)
        >>> stats.save("train-stats.json")  # ranks load what one of them measured
        """
        remote.put(Place.of(path).url, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stats:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ReadError
            When nothing lies there, or it cannot be read.
        SchemaError
            When it is something else, is damaged, or was written by a version that measured otherwise.

        Examples
        --------
        >>> chips.select("train").stats(sample=4).save("train-stats.json")
        >>> rd.Stats.load("train-stats.json").table.num_rows
        2
        """
        return cls.from_json(remote.get(Place.of(path).url), os.fspath(path))

    def to_json(self) -> str:
        """Return them as JSON text.

        Examples
        --------
        >>> import json
        >>> sorted(json.loads(chips.stats(sample=4).to_json()))
        ['chips', 'labels', 'sources', 'version']
        """
        sources = {name: _fields(own) for name, own in self.sources.items()}
        labels = {
            name: {"counts": None if own.counts is None else list(own.counts.items()), "missing": own.missing}
            for name, own in self.labels.items()
        }
        return json.dumps({"version": VERSION, "chips": self.chips, "sources": sources, "labels": labels})

    @classmethod
    def from_json(cls, text: str | bytes, subject: str = "statistics") -> Stats:
        """Return what :meth:`to_json` made.

        Raises
        ------
        SchemaError
            As :meth:`load` does.

        Examples
        --------
        >>> stats = chips.stats(sample=4)
        >>> rd.Stats.from_json(stats.to_json()).table.to_pylist() == stats.table.to_pylist()
        True
        """
        try:
            said = json.loads(text)
            if said["version"] != VERSION:
                raise ValueError(f"version {said['version']!r}")
            labels = {
                name: LabelCounts(None if own["counts"] is None else dict(own["counts"]), int(own["missing"]))
                for name, own in said["labels"].items()
            }
            return cls({name: _of(own) for name, own in said["sources"].items()}, int(said["chips"]), labels)
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            raise SchemaError(
                f"reading {subject}", f"{type(error).__name__}: {error}", "what Stats.save of this version wrote",
                "Measure again, with stats().",
            ) from error  # fmt: skip


def measure(arrays: Arrays, pixels: Mapping[str, SourcePixels]) -> Stats:
    """Measure some chips: the pixels of each source, as ``"<source>/<mask>"`` its masks, NaN aside, and label columns.

    Parameters
    ----------
    arrays
        The chips.
    pixels
        Source -> what its pixels are.
    """
    sources = {}
    for name, own in pixels.items():
        sources[name] = measured(
            arrays[name],
            arrays[f"{name}/valid"],
            own.bands,
            own.units,
            own.kinds,
            arrays.get(f"{name}/{PRESENT}"),
        )
        for mask, values in arrays.items():
            if values.ndim == 3 and mask.startswith(f"{name}/"):
                everywhere = np.ones((len(values), 1, *values.shape[1:]), dtype=bool)
                band = mask.partition("/")[2]
                names = own.classes.get(band, ())
                named = (BandKind("class", tuple(enumerate(names))),) if names else ()
                sources[mask] = measured(values[:, None, None], everywhere, (band,), kinds=named)
    columns = {key.partition("/")[2]: v for key, v in arrays.items() if key.startswith("labels/")}
    labels = {name: found for name, v in columns.items() if (found := labelcounts.count(v)) is not None}
    return Stats(sources, len(arrays["chip_id"]), labels)


_CLASS_ROWS = pa.schema(
    [("source", pa.string()), ("band", pa.string()), ("value", pa.int64()), ("name", pa.string()),
     ("count", pa.int64()), ("share", pa.float64())]
)  # fmt: skip


MOST_BANDS = 8
"""Bands of a source that a text names one by one."""

MOST_NAMED = 12
"""Classes of a band that a text names, the most frequent ones."""


def _summary(stats: SourceStats) -> str:
    """Return one source in a line."""
    parts = [f"{_percent(stats.valid_fraction.min(initial=1.0))} valid"]
    if stats.units:
        parts[0] += f", {stats.units}"
    parts += [_classes(stats, band) for band, coded in zip(stats.bands, stats.coded, strict=True) if coded]
    plain = np.flatnonzero(~stats.coded)
    if len(plain) > MOST_BANDS:
        names = listed([stats.bands[at] for at in plain], "bands")
        mean, std = stats.mean[plain], stats.std[plain]
        parts.append(f"{names}, means {_range(mean)}, std {_range(std)}")
    else:
        parts += [f"{stats.bands[at]} {stats.mean[at]:.4g} \u00b1 {stats.std[at]:.3g}" for at in plain]
    return "; ".join(parts)


def _classes(stats: SourceStats, band: str) -> str:
    """Return the shares of a band's values, the most frequent first."""
    shares, names = stats.shares.get(band), stats.names.get(band, {})
    if shares is None:
        return f"{band}: codes"
    return f"{band}: {_shares(shares, names) or 'no valid pixel'}"


def _shares(shares: Mapping[Any, float], names: Mapping[Any, str]) -> str:
    order = sorted(shares, key=lambda value: -shares[value])
    shown = [f"{names.get(value) or value} {_percent(shares[value])}" for value in order[:MOST_NAMED]]
    more = f", {len(order) - MOST_NAMED} more" if len(order) > MOST_NAMED else ""
    return f"{', '.join(shown)}{more}"


def _label_summary(counts: LabelCounts) -> str:
    """Return the values of a label column in a line."""
    missing = f"; {counted(counts.missing, 'chip')} without a value" if counts.missing else ""
    if counts.counts is None:
        return f"more than {labelcounts.MOST_VALUES:,} values{missing}"
    total = max(sum(counts.counts.values()), 1)
    shares = {value: count / total for value, count in counts.counts.items()}
    return f"{_shares(shares, {}) or 'no value'}{missing}"


def _label_drawn(name: str, counts: LabelCounts) -> Markup:
    """Return the values of a label column as a table, long ones folded."""
    total = max(sum((counts.counts or {}).values()), 1)
    rows = [[str(value), count, _percent(count / total)] for value, count in (counts.counts or {}).items()]
    drawn = table([f"value of {name}", "chips", "share"], rows)
    return fold(_label_summary(counts), drawn) if len(rows) > MOST_BANDS or not rows else drawn


def _drawn(stats: SourceStats) -> Markup:
    """Return one source as a table with a histogram a band, long ones folded, and a bar for each band of codes."""
    heads = ["band", "kind", "valid", "", "mean", "std", "min", "median", "max"]
    numbers = zip(
        stats.bands, stats.kind_names, stats.valid_fraction.tolist(), stats.histogram().tolist(), stats.mean.tolist(),
        stats.std.tolist(), stats.min.tolist(), stats.percentile(50).tolist(), stats.max.tolist(), strict=True,
    )  # fmt: skip
    rows = [
        [
            band,
            kind,
            _percent(valid),
            svg_bars(bars, f"{band}: 0.5th to 99.5th percentile"),
            *map(_figure, figures),
        ]
        for band, kind, valid, bars, *figures in numbers
    ]
    found = table(heads, rows)
    classes = [
        table(["value", f"class of {band}", "pixels", "share"], [
            [str(value), stats.names.get(band, {}).get(value, ""), count, _percent(stats.shares[band][value])]
            for value, count in stats.classes[band].items()
        ])
        for band, coded in zip(stats.bands, stats.coded, strict=True) if coded and band in stats.classes
    ]  # fmt: skip
    found = Markup(found + "".join(classes))
    return fold(_summary(stats), found) if len(rows) > MOST_BANDS else found


def _figure(number: float) -> str:
    return "" if np.isnan(number) else f"{number:.4g}"


def _range(numbers: NDArray[np.float64]) -> str:
    known = numbers[np.isfinite(numbers)]
    return f"{known.min():.3g} to {known.max():.3g}" if len(known) else "unknown"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def merged(parts: Iterable[Stats]) -> Stats:
    """Return the statistics of all chips of some parts, of the same sources and bands."""
    return functools.reduce(operator.add, parts)


def _same_sources(a: Stats, b: Stats) -> None:
    """Raise PlanError where statistics are not of the same sources, bands, dtypes, units and kinds."""
    one, two = (
        [
            f"{name}: {', '.join(f'{band} ({kind})' for band, kind in zip(own.bands, own.kind_names, strict=True))}, "
            f"{own.dtype}" + (f", {own.units}" if own.units else "")
            for name, own in sorted(stats.sources.items())
        ]
        for stats in (a, b)
    )
    if one != two:
        apart = next((pair for pair in zip(one, two, strict=False) if pair[0] != pair[1]), None)
        found = apart or ("; ".join(one), "; ".join(two))
        raise PlanError(
            "adding statistics",
            found[1],
            found[0],
            "Add those of chips of the same sources, bands, dtype and units.",
        )


def _same(name: str, value: str, wanted: str) -> None:
    if value != wanted:
        raise PlanError(
            f"normalizing source {name!r}", value, f"the {wanted} that were measured",
            "Give the statistics of these chips' train split, measured by stats().",
        )  # fmt: skip


def _keeps(name: str, stats: SourceStats) -> None:
    """Raise PlanError where float32, which measured bands become, would change the codes of bands beside them."""
    if stats.kept.all():
        return
    for band, kept, low, high in zip(stats.bands, stats.kept, stats.min, stats.max, strict=True):
        if kept and max(-low, high) > _EXACT:
            raise PlanError(
                f"normalizing source {name!r}", f"band {band!r} of codes up to {int(max(-low, high))}",
                "codes that float32 holds, as measured bands become (up to 2**24)",
                f"Join it as a source of its own: rd.join({name}=..., classes=source.harmonize([{band!r}])).",
            )  # fmt: skip


_EXACT = 2.0**24
"""Whole numbers up to this are exact in float32."""


def _valid(name: str, arrays: Arrays) -> NDArray[np.bool_]:
    values, said = arrays[name], arrays.get(f"{name}/valid")
    if said is None:
        if values.dtype.kind != "f":
            raise PlanError(
                f"normalizing source {name!r}", f"no {name}/valid", "where its integers are valid"
            )
        said = np.ones((*values.shape[:2], *values.shape[3:]), dtype=bool)
    result = np.empty_like(said)
    for chip, seen, out in zip(values, said, result, strict=True):
        out[...] = valid_pixels(chip, seen)
    return result


def _scaled(
    values: NDArray[Any], valid: NDArray[np.bool_], stats: SourceStats, fill: float
) -> NDArray[np.float32]:
    """Return normalized pixels, made chip by chip, so that temporaries stay in the processor's cache."""
    wide = np.result_type(values.dtype, np.float32)  # float64 but for types that float32 holds exactly
    mean = stats.mean.astype(wide)[:, None, None]
    spread = np.where(stats.constant, np.inf, stats.std).astype(wide)[:, None, None]
    kept = np.flatnonzero(stats.kept)
    result = np.empty(values.shape, dtype=np.float32)
    for chip, seen, out in zip(values, valid, result, strict=True):
        with np.errstate(
            invalid="ignore"
        ):  # an infinite pixel of a band that never varies: it is filled below
            apart = np.subtract(chip, mean, dtype=wide)
            apart /= spread
        out[...] = apart
        out[:, kept] = chip[:, kept]
        if not seen.all():
            np.copyto(out, np.float32(fill), where=~seen[:, None])
    return result


_ARRAYS = ("mean", "square", "min", "max")


def _fields(stats: SourceStats) -> dict[str, Any]:
    packed = [[_packed(numbers), _packed(counts)] for numbers, counts in stats.buckets]
    numbers = {k: [None if np.isnan(v) else v for v in getattr(stats, k).tolist()] for k in _ARRAYS}
    head = {
        "bands": list(stats.bands), "dtype": stats.dtype, "units": stats.units, "total": stats.total,
        "count": stats.count.tolist(), "by_value": list(stats.by_value),
        "kinds": [[kind.kind, list(kind.classes)] for kind in stats.kinds],
    }  # fmt: skip
    return {**head, **numbers, "buckets": packed}


def _of(fields: Mapping[str, Any]) -> SourceStats:
    arrays = {k: np.array([np.nan if v is None else v for v in fields[k]], dtype=np.float64) for k in _ARRAYS}
    buckets = tuple((_unpacked(a), _unpacked(b)) for a, b in fields["buckets"])
    if len({len(fields[k]) for k in (*_ARRAYS, "bands", "count", "buckets", "by_value")}) != 1:
        raise ValueError("columns of several lengths")
    if [int(counts.sum()) for _, counts in buckets] != fields["count"]:
        raise ValueError("buckets that do not add up to the count")
    return SourceStats(
        bands=tuple(fields["bands"]),
        dtype=str(fields["dtype"]),
        units=str(fields["units"]),
        total=int(fields["total"]),
        count=np.array(fields["count"], dtype=np.int64),
        buckets=buckets,
        by_value=tuple(bool(known) for known in fields["by_value"]),
        kinds=tuple(
            BandKind(kind_of(kind).name, tuple((int(value), str(name)) for value, name in classes))
            for kind, classes in fields["kinds"]
        ),
        **arrays,
    )


def _packed(values: NDArray[np.int64]) -> str:
    return base64.b64encode(zlib.compress(values.astype("<i8").tobytes())).decode()


def _unpacked(text: str) -> NDArray[np.int64]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8").astype(np.int64)
