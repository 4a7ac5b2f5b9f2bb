# SPDX-License-Identifier: Apache-2.0
"""One HTML page about a finished store: splits, chips, statistics, losses, timings, where everything comes from."""

from __future__ import annotations

import base64
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import is_mask
from rasteret_dask.display import html
from rasteret_dask.display.colours import colours_of
from rasteret_dask.display.html import Outline
from rasteret_dask.lists import first_of, listed
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.progress import nbytes_text
from rasteret_dask.show.explain import radiometry_lines
from rasteret_dask.show.pictures import Picture, Sheet, sheet_of
from rasteret_dask.statistics.sketch import SourceStats
from rasteret_dask.statistics.stats import Stats
from rasteret_dask.store.jobreport import JobReport, report_of_stores
from rasteret_dask.store.ledger import RECIPE
from rasteret_dask.store.provenance import Provenance, provenance_of_parts
from rasteret_dask.storeset import StoredChips, open_chips
from rasteret_dask.tasks.filtering import tally

__all__ = ["report", "report_page"]

MOST_MEASURED = 512
"""Chips of a split that are measured; of more, so many are chosen by a hash of their ids."""

PER_SPLIT = 4
"""Chips of a split that are shown."""

MOST_SPLITS = 6
"""Splits that are shown and measured: the largest ones."""

SLOTS = 3
"""Slots of a source that are shown, evenly taken."""

LARGEST_PX = 128
"""Side of a picture, at most."""

PICTURES_NBYTES = 1_800_000
"""All pictures before compression, about: the page stays below 3 MB."""

MOST_OUTLINES = 20_000
"""Chips of the map: of more, every n-th is looked at."""

MOST_PICTURES = 400
"""Of the page: where sources and slots are many, fewer chips of a split are shown."""

MOST_BANDS = 12
"""Bands of a source that get a histogram."""

MOST_ROWS = 64
"""Rows of a table."""

BINS = 48
"""Bins of a histogram."""

TILES = 10
"""Unreadable tiles that are named."""

NOT_KEPT = "Not kept: an earlier version wrote this store."

_VERSIONS = ("rasteret-dask", "dask", "zarr", "numpy", "pyarrow", "rasterio")


def report(
    store: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str] = "report.html",
    progress: bool = True,
) -> str:
    """Write one self-contained HTML page about a finished store; return its path.

    Parameters
    ----------
    store
        What ``to_zarr`` or :func:`compact` wrote: a local path or a URL; or several, as :func:`open_chips` takes them.
    path
        Where the page goes: a local path, or a URL.
    progress
        Show how far the measuring is.

    Raises
    ------
    StoreError
        When there is no store, it is not finished, or it is damaged; or the page cannot be written.

    Notes
    -----
    The page asks for nothing from elsewhere, runs no script, follows the reader's choice of light or dark, and prints.
    It reads four chips a split for pictures, and measures up to 512 chips a split unless ``stats()`` was called before;
    its size is at most about 3 MB, however large the store is.

    Examples
    --------
    >>> import rasteret_dask as rd
    >>> rd.report("train.zarr", "report.html")
    'report.html'
    """
    place = Place.of(path).url
    remote.put(place, report_page(store, progress).encode())
    return os.fspath(path)


def report_page(
    store: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], progress: bool = True
) -> str:
    """Return the page that :func:`report` writes.

    Raises
    ------
    StoreError
        When there is no store, it is not finished, or it is damaged.
    """
    from jinja2 import Environment, StrictUndefined

    stores: list[Any] = list(store) if isinstance(store, list | tuple) else [store]
    chips = open_chips(store, duplicates="first")
    page = _Page(chips, report_of_stores(stores), progress)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = files("rasteret_dask.display").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(page.values())


@dataclass(frozen=True)
class _Page:
    """What stands on the page of one store."""

    chips: StoredChips
    job: JobReport
    progress: bool = True

    def values(self) -> dict[str, Any]:
        """Return what the template asks for."""
        place = self.job.store
        sheet = self._sheet
        return {
            "style": html.STYLE,
            "name": place.rstrip("/").rpartition("/")[2] or place,
            "place": place,
            "version": str(self.chips.stored.map.note["version"]),
            "facts": self._facts(),
            "sections": [
                ("splits", "Splits"), ("chips", "Chips"), ("statistics", "Statistics"), ("losses", "Losses"),
                ("timings", "Timings"), ("provenance", "Provenance"),
            ],
            **self._splits(),
            "legends": [*sheet.legend.items(), *([("", (("cloud or no data", "hatch"),))] if sheet.has_gaps else [])],
            "sheets": self._sheets(sheet),
            "chip_px": min(24 + 122 * len(sheet.columns), 570),
            "measured": self._measured(),
            "split_keys": [(name or "all chips", colour) for name, colour in self._colours.items()],
            "statistics": [self._source(name) for name in self._source_names],
            "losses": self._losses(),
            "tiles": self._tiles(),
            **self._timings(),
            **self._provenance(),
        }  # fmt: skip

    @cached_property
    def _counts(self) -> dict[str, int]:
        """Split -> chips, in the store's order; "" where there are no splits."""
        names = [name or "" for name in self.chips.stored.table.column("split").to_pylist()]
        return dict(Counter(names))

    @cached_property
    def _colours(self) -> dict[str, str]:
        """Split -> colour, of those that are shown and measured."""
        largest = sorted(self._counts, key=lambda name: -self._counts[name])[:MOST_SPLITS]
        return colours_of(largest)

    def _of(self, split: str) -> StoredChips:
        return self.chips.select(split) if split else self.chips

    def _facts(self) -> list[tuple[str, str]]:
        store = self.chips.stored.map
        shape = store.first[0].arrays["pixels"].shape
        size = f"{shape[-1]} x {shape[-2]} px"
        return [
            ("Chips", f"{len(self.chips):,}"),
            ("Splits", ", ".join(name or "none" for name in self._counts)),
            ("Size", size),
            ("Sources", ", ".join(store.sources)),
            ("Stored", nbytes_text(self.job.bytes_written)),
            ("Shards", f"{self.job.shards:,}"),
        ]

    # Splits

    def _splits(self) -> dict[str, Any]:
        table = self._columns("geometry", "split")
        step = -(-len(table) // MOST_OUTLINES) or 1
        some = table.take(pa.array(np.arange(0, len(table), step)))
        shapes = shapely.from_wkb(some.column("geometry").to_numpy(zero_copy_only=False))
        names = [name or "" for name in some.column("split").to_pylist()]
        outlines = [Outline(shape, name) for shape, name in zip(shapes.tolist(), names, strict=True)]
        total, colours = max(len(self.chips), 1), colours_of(self._counts)
        rows = []
        for name, count in self._counts.items():
            share = count / total
            rows.append(
                (_key(colours[name], name or "no split"), count, f"{share:.1%}", _bar(share, colours[name]))
            )
        return {
            "map": html.svg_map(outlines),
            "splits": html.bare_table(["split", "chips", "share", ""], rows),
            "ground": self._ground(),
        }

    def _ground(self) -> str:
        table = self._columns("xmin", "ymin", "xmax", "ymax", "epsg")
        first = table.slice(0, 1).to_pylist()[0]
        wide, high = first["xmax"] - first["xmin"], first["ymax"] - first["ymin"]
        codes = table.column("epsg").unique()
        area = len(self.chips) * wide * high / 1e6
        some = f" The map shows every {step}th chip." if (step := -(-len(table) // MOST_OUTLINES)) > 1 else ""
        return (
            f"A chip is {wide / 1000:g} x {high / 1000:g} km in its CRS ({len(codes)} in use); {area:,.4g} km\u00b2 in "
            f"all, where chips do not overlap.{some}"
        )

    def _columns(self, *names: str) -> pa.Table:
        """Return some columns of the chips; only these are read."""
        return self.chips.stored.columns(names)

    # Chips

    @cached_property
    def _sheet(self) -> Sheet:
        ids = [
            chip
            for split in self._colours
            for chip in self._of(split).sample(min(PER_SPLIT, self._counts[split]))
        ]
        return sheet_of(self.chips.filter(("chip_id", "in", ids)).load(), len(ids), SLOTS)

    def _sheets(self, sheet: Sheet) -> list[tuple[str, list[dict[str, Any]]]]:
        groups: dict[str, list[dict[str, Any]]] = {split: [] for split in self._colours}
        most, side = sizes(len(groups), len(sheet.columns))
        for row in sheet.rows:
            if len(groups[row.split]) == most:
                continue
            pictures = []
            for column, picture in zip(sheet.columns, row.pictures, strict=True):
                title = ", ".join(column.title.split("\n"))
                alt = f"chip {row.chip_id}: {title}, {picture.caption}"
                pictures.append(
                    {"src": _png(picture, side), "alt": alt, "title": title, "caption": picture.caption}
                )
            labels = [f"{name}: {value}" for name, value in row.labels]
            groups[row.split].append({"id": row.chip_id, "labels": labels, "pictures": pictures})
        return [
            (f"{split or 'All chips'} ({len(own)} of {self._counts[split]:,})", own)
            for split, own in groups.items()
            if own
        ]

    # Statistics

    @cached_property
    def _stats(self) -> dict[str, Stats]:
        """Split -> statistics of its chips, or of some."""
        return {
            split: self._of(split).stats(
                sample=MOST_MEASURED if self._counts[split] > MOST_MEASURED else None,
                progress=self.progress,
            )
            for split in self._colours
        }

    def _measured(self) -> str:
        parts = [
            f"{split or 'all'} {stats.chips:,} of {self._counts[split]:,}"
            for split, stats in self._stats.items()
        ]
        return f"Valid pixels of these chips: {', '.join(parts)}."

    @property
    def _source_names(self) -> list[str]:
        return list(next(iter(self._stats.values())).sources)

    def _source(self, name: str) -> dict[str, Any]:
        """Return the statistics of one source, or of a mask."""
        stats = {split: own[name] for split, own in self._stats.items()}
        first = next(iter(stats.values()))
        measured = [i for i, coded in enumerate(first.coded.tolist()) if not coded]
        shown = []
        for i in measured:
            for split, own in stats.items():
                percentiles = [own.percentile(q) for q in (2, 50, 98)]
                values = (own.mean, own.std, own.min, *percentiles, own.max)
                shown.append((
                    first.bands[i], _key(self._colours[split], split or "all"), first.kind_names[i],
                    f"{own.valid_fraction[i]:.1%}", *(f"{value[i]:.4g}" for value in values),
                ))  # fmt: skip
        columns = ["band", "split", "kind", "valid", "mean", "std", "min", "2 %", "50 %", "98 %", "max"]
        more = len(measured) - MOST_BANDS
        bands = html.bare_table(columns, shown[: MOST_ROWS * len(stats)]) if shown else html.Markup("")
        return {
            "title": f"{name} ({first.units})" if first.units and measured else name,
            "bands": html.fold(f"Table of {len(measured)} bands", bands) if more > 0 else bands,
            "histograms": self._histograms(stats, measured[:MOST_BANDS]),
            "note": f"Histograms of the first {MOST_BANDS} bands of {len(measured)}." if more > 0 else "",
            "classes": [
                ("" if len(first.bands) == 1 else f"{name} {band}", self._classes(name, band))
                for band, coded in zip(first.bands, first.coded.tolist(), strict=True)
                if coded
            ],
        }

    def _histograms(self, stats: Mapping[str, SourceStats], bands: Sequence[int]) -> list[dict[str, Any]]:
        """Return the histogram of some bands, a line a split, from the 0.5th to the 99.5th percentile of all."""
        percentiles = np.array([[own.percentile(q) for q in (0.5, 99.5)] for own in stats.values()])
        ends = np.stack([np.fmin.reduce(percentiles[:, 0]), np.fmax.reduce(percentiles[:, 1])], axis=-1)
        counts = {split: own.histogram(BINS, ends) for split, own in stats.items()}
        first = next(iter(stats.values()))
        result = []
        for band in bands:
            low, high = ends[band].tolist()
            shares = {
                split: counts[split][band] / max(int(own.count[band]), 1) for split, own in stats.items()
            }
            empty = {"name": first.bands[band], "unit": "no valid pixel", "svg": "", "low": "", "high": ""}
            full = {
                "svg": _lines(shares, self._colours),
                "low": f"{low:.4g}",
                "high": f"{high:.4g}",
                "unit": "",
            }
            result.append(empty if np.isnan(low) else empty | full)
        return result

    def _classes(self, source: str, band: str) -> html.Markup:
        """Return a row a class: its name, and its pixels in each split."""
        counts = {split: own[source].classes.get(band, {}) for split, own in self._stats.items()}
        shares = {split: own[source].shares.get(band, {}) for split, own in self._stats.items()}
        names = {
            value: name
            for own in self._stats.values()
            for value, name in own[source].names.get(band, {}).items()
        }
        title = source.replace("/", " ") if is_mask(band) else f"{source} {band}"
        keys = dict(self._sheet.legend.get(title.strip(), ()))
        values = sorted({value for own in counts.values() for value in own})
        rows = []
        for value in values[:MOST_ROWS]:
            name = names.get(value, "") or ("no label" if value == 0 and is_mask(band) else "")
            row: list[object] = [value, _key(keys.get(name or str(value), ""), name)]
            for split, colour in self._colours.items():
                share = shares[split].get(value, 0.0)
                row += [counts[split].get(value, 0), f"{share:.1%}", _bar(share, colour)]
            rows.append(row)
        titles = [title for split in self._colours for title in (f"{split or 'all'} pixels", "share", "")]
        return html.bare_table(["value", "class", *titles], rows)

    # Losses

    def _losses(self) -> html.Markup:
        rows: list[tuple[object, ...]] = [
            (f"{count:,}", "windows", "left out by the plan", why)
            for why, count in self._origin.dropped.items()
        ]
        dropped: dict[str, list[str]] = {}
        for row in self.chips.dropped.to_pylist():
            dropped.setdefault(row["split"] or "all", []).append(row["reason"])
        rows += [
            (f"{len(reasons):,}", "chips", "dropped by filter_pixels", f"{split}: {tally(reasons)}")
            for split, reasons in dropped.items()
        ]
        rows += [
            (f"{share:.2%}", "pixels", "invalid: masked, nodata or without a scene", source)
            for source, share in self.job.masked.items()
        ]
        rows += [
            (f"{count:,}", "values", "clipped to what the stored type holds", band)
            for band, count in self.job.clipped.items()
        ]
        rows.append(
            (
                f"{self.job.unreadable:,}",
                "tiles",
                "could not be read; their pixels are invalid",
                "all sources",
            )
        )
        return html.bare_table(["how many", "of what", "what became of them", "why, or where"], rows)

    def _tiles(self) -> str:
        texts = self.job.table.column("unreadable_tiles").to_pylist()
        tiles = [tile for text in texts for tile in json.loads(text)]
        where = ": manifest.parquet, column unreadable_tiles" if len(tiles) > TILES else ""
        return first_of(tiles, TILES, "\n") + where

    # Timings

    def _timings(self) -> dict[str, Any]:
        job = self.job
        total = sum(job.stages.values())
        read, written = nbytes_text(job.bytes_fetched), nbytes_text(job.bytes_written)
        summary = (
            f"Shards: {job.shards:,}, tried again: {job.retries:,}. Processes: {len(job.processes):,}. "
            f"Read: {read} by {job.requests:,} requests. Written: {written}."
        )
        longest = max(job.stages.values(), default=1.0) or 1.0
        stages = [
            (stage, f"{seconds:,.1f}", f"{seconds / (total or 1):.0%}", _bar(seconds / longest, "#2f7fc1"))
            for stage, seconds in job.stages.items()
        ]
        slow = [(shard, f"{seconds:,.1f}", process) for shard, seconds, process in job.slowest]
        by_process = [(process, f"{count:,}") for process, count in list(job.processes.items())[:MOST_ROWS]]
        return {
            "time_summary": summary,
            "stages": html.bare_table(["stage", "seconds, all shards", "share", ""], stages)
            if stages
            else NOT_KEPT,
            "slowest": html.bare_table(["slowest shards", "seconds", "process"], slow) if slow else "",
            "processes": html.bare_table(["process", "shards"], by_process),
        }

    # Provenance

    @cached_property
    def _origin(self) -> Provenance:
        return provenance_of_parts(self.chips.stored.places)

    def _provenance(self) -> dict[str, Any]:
        origins = [
            (
                one.source, one.member, one.records, f"{one.start[:10]} to {one.end[:10]}",
                one.terms.dataset or ", ".join(one.collections), ", ".join(one.hosts),
                _licence(one.terms.licence, one.terms.licence_url), one.terms.attribution or "not stated",
            )
            for one in self._origin.origins
        ]  # fmt: skip
        columns = ["source", "member", "records", "dates", "dataset", "files", "licence", "attribution"]
        note = self.chips.stored.map.note
        packages = ", ".join(f"{name} {version(name)}" for name in _VERSIONS)
        writer = f"{note['writer']}, format {note['format']}, meaning {note['meaning']}"
        versions = [
            ("written by", f"rasteret_dask {note['version']} ({writer})"),
            ("plan", note["digest"]),
            ("this page made with", f"Python {platform.python_version()}, {packages}"),
        ]
        attributions = dict.fromkeys(filter(None, (one.terms.attribution for one in self._origin.origins)))
        return {
            "origins": html.bare_table(columns, origins) if origins else NOT_KEPT,
            "attributions": list(attributions),
            "sources": self._sources(),
            "steps": list(self._origin.steps),
            "recipe": self._recipe(),
            "versions": html.bare_table(["", ""], versions),
        }

    def _sources(self) -> html.Markup:
        rows = []
        for group in self.chips.stored.map.first:
            pixels, attrs = self.chips.stored.map.pixels[group.source], group.attrs
            bands = listed(pixels.bands, "bands")
            shape = group.arrays["pixels"].shape
            rules = radiometry_lines(attrs.get("radiometry", []))
            rows.append((
                group.source, bands, pixels.units, pixels.dtype, f"{float(attrs.get('resolution') or 0):g} m", shape[1],
                ", ".join(attrs.get("mask", ())) or "none", attrs.get("pick", ""), "\n".join(rules),
            ))  # fmt: skip
        return html.bare_table(
            ["source", "bands", "unit", "type", "pixel", "slots", "mask", "pick", "scale and offset"], rows
        )

    def _recipe(self) -> str:
        try:
            return bytes(remote.get(remote.join(self.chips.stored.url, RECIPE))).decode("utf-8", "replace")
        except remote.MissingError:
            return ""


def sizes(splits: int, columns: int) -> tuple[int, int]:
    """Return how many chips of a split are shown, and the side of their pictures in pixels, so that a page is small."""
    most = min(max(MOST_PICTURES // (splits * columns), 1), PER_SPLIT)
    side = np.sqrt(PICTURES_NBYTES / 4 / (most * splits * columns))
    return most, int(min(side, LARGEST_PX))


def _licence(name: str, url: str) -> object:
    if not name:
        return "not stated"
    if not url.startswith(("http://", "https://")):
        return name
    return html.Markup(f'<a href="{html.markup(url)}" rel="noreferrer">{html.markup(name)}</a>')


def _key(colour: str, name: str) -> html.Markup:
    """Return a name behind its colour."""
    spot = f'<i class="key" style="background:{colour}"></i>' if colour else ""
    return html.Markup(f'<span class="key-of">{spot}{html.markup(name)}</span>')


def _bar(share: float, colour: str) -> html.Markup:
    """Return a bar, a pixel a hundredth."""
    if not share:
        return html.Markup("")
    return html.Markup(f'<i class="bar" style="width:{share * 100:.1f}px;background:{colour}"></i>')


def _lines(shares: Mapping[str, NDArray[np.float64]], colours: Mapping[str, str]) -> html.Markup:
    """Return an inline SVG with a step line for each split, as high as the highest bin."""
    top = max(float(own.max(initial=0.0)) for own in shares.values()) or 1.0
    wide, high = 200, 64
    paths = []
    for split, own in shares.items():
        step = wide / len(own)
        line = "".join(
            f"V{high - high * value / top:.1f}H{(i + 1) * step:.1f}" for i, value in enumerate(own.tolist())
        )
        colour = colours[split]
        paths.append(f'<path d="M0 {high}{line}V{high}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
    title = ", ".join(split or "all" for split in shares)
    return html.Markup(
        f'<svg viewBox="-1 -2 {wide + 2} {high + 4}" role="img"><title>Histogram: {html.markup(title)}</title>'
        f'{"".join(paths)}<path d="M0 {high}H{wide}" stroke="currentColor" stroke-opacity=".4"/></svg>'
    )


def _png(picture: Picture, side: int) -> str:
    """Return a picture as a data URI, with every n-th pixel where it is larger than ``side``."""
    from imagecodecs import png_encode

    step = -(-max(picture.rgba.shape[:2]) // side)
    pixels = np.ascontiguousarray((picture.rgba[::step, ::step] * 255).round().astype(np.uint8))
    return f"data:image/png;base64,{base64.b64encode(png_encode(pixels, level=9)).decode()}"
