# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found: scores of all chips, and of any group of them, from the counts of each chip."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rasteret_dask.display.card import Card, Fact, counted
from rasteret_dask.display.html import Markup, Outline, markup, svg_map
from rasteret_dask.display.html import table as html_table
from rasteret_dask.display.tableview import Columns, TableView
from rasteret_dask.errors import PlanError, SchemaError
from rasteret_dask.evaluation.confusion import (
    CLASS_SCORES,
    DIFFERENCES,
    OVERALL,
    DifferenceSums,
    Pairs,
    class_scores,
    differences,
    overall,
)
from rasteret_dask.lists import listed
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.planning.names import in_order
from rasteret_dask.table import geoparquet

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Evaluation", "Note"]

FORMAT = 1
_KEY = b"rasteret_dask:evaluation"

REASONS = {
    "repeated": "in an earlier chip too",
    "unlabelled": "without a label",
    "unpredicted": "where the map does not reach",
    "invalid": "invalid in the map",
}
"""Column of pixels that are not compared -> why."""


@dataclass(frozen=True, slots=True)
class Note:
    """What was compared, as values of JSON."""

    predictions: str
    labels: str
    is_class: bool
    unit: str = "pixel"
    """What is counted: pixels, or chips."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Class -> its name, as far as names are known."""
    distances_m: tuple[float, ...] = ()
    """Where bins of distance begin; () without a training plan."""
    has_regions: bool = False
    nearest: int = 0
    """Chips whose pixels are not pixels of the map, which were read by nearest."""

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(
            {"format": FORMAT, **asdict(self), "names": [[k, v] for k, v in self.names.items()]}
        )

    @classmethod
    def again(cls, text: bytes, subject: str) -> Note:
        """Return what :meth:`to_json` wrote."""
        values = json.loads(text)
        if values.pop("format", None) != FORMAT:
            raise SchemaError(
                subject, "an evaluation of another format", f"format {FORMAT}", "Evaluate again."
            )
        return cls(**{**values, "names": dict(values["names"]), "distances_m": tuple(values["distances_m"])})


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What :meth:`Chips.evaluate` found.

    All scores follow from the counts of each chip, which :attr:`chips` holds, so that any group of chips has its own:
    :meth:`by`. Counts are whole numbers: neither the order of chips nor who counts them changes a score.

    Examples
    --------
    >>> import pyarrow as pa
    >>> ids = chips.table["chip_id"]
    >>> surveyed = chips.with_table(pa.table({"chip_id": ids, "cover": ["water"] * len(chips)}))
    >>> guesses = pa.table({"chip_id": ids, "class": ["water", "land"] * (len(chips) // 2)})
    >>> scores = surveyed.evaluate(guesses, "cover")
    >>> scores.overall["accuracy"]
    0.5
    >>> scores.confusion.sel(truth="water", predicted="land").item()
    77
    """

    table: pa.Table
    """What :attr:`chips` shows, a ``pyarrow.Table``."""
    note: Note
    errors: Callable[[Path, bool], tuple[Path, ...]] | None = None
    """Writes the map of errors; None where the evaluation was loaded, or is of chips as a whole."""

    @property
    def chips(self) -> TableView:
        """A row a chip: where it lies, split, region, distance to train, what was compared, and its own scores.

        ``counts`` has the pairs of classes of the chip (truth, predicted, pixels); of measured numbers ``sums``
        has what scores are made of. ``repeated``, ``unlabelled``, ``unpredicted`` and ``invalid`` are the pixels that
        were not compared: with ``pixels`` they are all of the chip.

        Examples
        --------
        >>> evaluation.chips.column_names[:4]
        ['chip_id', 'split', 'region', 'distance_m']
        """
        return TableView(self.table, self._looks)

    def _looks(self, rows: pa.Table) -> Columns:
        names = ["chip_id", "split", "region", "distance_m", "pixels", *REASONS]
        score = ["errors", "accuracy"] if self.note.is_class else ["bias", "rmse"]
        there = [name for name in (*names, *score) if rows.column(name).null_count < rows.num_rows]
        return {name: rows.column(name).to_pylist() for name in there}

    @property
    def classes(self) -> dict[int, str]:
        """Class -> its name (its number where it has none), of every class that labels or predictions have.

        Examples
        --------
        >>> evaluation.classes
        {1: 'forest', 2: 'water'}
        """
        codes = np.unique(np.concatenate([self._pairs.truth, self._pairs.predicted])).tolist()
        return {code: self._label(code) for code in codes}

    def _label(self, code: int) -> str:
        name = self.note.names.get(code, str(code))
        return name if list(self.note.names.values()).count(name) <= 1 else f"{name} ({code})"

    @property
    def overall(self) -> dict[str, float | None]:
        """The scores of all chips together; None where one is 0 / 0.

        Of classes: accuracy, Cohen's kappa, and the means over all classes of precision, recall, f1 and iou. Of
        measured numbers: bias (predicted - true), rmse, mae and r2.

        Examples
        --------
        >>> sorted(evaluation.overall)
        ['accuracy', 'f1', 'iou', 'kappa', 'precision', 'recall']
        """
        return self._scored(None)

    @property
    def confusion(self) -> xr.DataArray:
        """How many pixels of each true class (rows) have each predicted one (columns): int64, (truth, predicted).

        Raises
        ------
        PlanError
            When measured numbers are compared, which have none.

        Examples
        --------
        >>> evaluation.confusion.dims, int(evaluation.confusion.sum()) == evaluation.pixels
        (('truth', 'predicted'), True)
        """
        import xarray as xr

        if not self.note.is_class:
            raise PlanError(
                "confusion", "measured numbers", "classes", "Look at overall: bias, rmse, mae, r2."
            )
        names, codes = list(self.classes.values()), list(self.classes)
        return xr.DataArray(
            self._pairs.matrix(codes),
            dims=("truth", "predicted"),
            coords={
                "truth": names, "predicted": names, "truth_code": ("truth", codes),
                "predicted_code": ("predicted", codes),
            },
            name=f"{self.note.unit}s",
        )  # fmt: skip

    @property
    def scores(self) -> TableView:
        """A row a class: pixels of it in labels and predictions, precision, recall, f1 and iou; null where 0 / 0.

        Of measured numbers it is one row: pixels, bias, rmse, mae and r2.

        Examples
        --------
        >>> evaluation.scores.column_names
        ['class', 'code', 'truth', 'predicted', 'precision', 'recall', 'f1', 'iou']
        """
        if not self.note.is_class:
            return TableView(
                pa.table({"pixels": [self.pixels], **{k: _floats([v]) for k, v in self.overall.items()}})
            )
        matrix, classes = self._pairs.matrix(list(self.classes)), self.classes
        names, codes = pa.array(classes.values(), pa.string()), pa.array(classes, pa.int64())
        columns = [
            names,
            codes,
            matrix.sum(axis=1),
            matrix.sum(axis=0),
            *map(_floats, class_scores(matrix).values()),
        ]
        heads = ["class", "code", "truth", "predicted", *CLASS_SCORES]
        return TableView(pa.Table.from_arrays([pa.array(column) for column in columns], heads))

    @property
    def only_in_labels(self) -> tuple[str, ...]:
        """Classes that no prediction names.

        Examples
        --------
        >>> evaluation.only_in_labels
        ()
        """
        return self._one_sided(self._pairs.truth, self._pairs.predicted)

    @property
    def only_in_predictions(self) -> tuple[str, ...]:
        """Classes that no label has, where both were compared.

        Examples
        --------
        >>> evaluation.only_in_predictions
        ()
        """
        return self._one_sided(self._pairs.predicted, self._pairs.truth)

    def _one_sided(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> tuple[str, ...]:
        return tuple(self._label(code) for code in np.setdiff1d(one, other).tolist())

    @property
    def pixels(self) -> int:
        """How many pixels were compared; chips, where each has one class as a whole.

        Examples
        --------
        >>> evaluation.pixels <= 32 * 32 * len(evaluation.chips)
        True
        """
        return int(self.table.column("pixels").to_numpy().sum())

    @property
    def left_out(self) -> dict[str, int]:
        """Why pixels were not compared -> how many.

        Examples
        --------
        >>> list(evaluation.left_out)
        ['repeated', 'unlabelled', 'unpredicted', 'invalid']
        """
        return {name: int(self.table.column(name).to_numpy().sum()) for name in REASONS}

    @property
    def by_split(self) -> TableView:
        """A row a split: its chips, the pixels that were compared, and the scores of :attr:`overall`.

        Examples
        --------
        >>> evaluation.by_split.column("split").to_pylist()
        ['train', 'val', 'test']
        """
        return self.by("split")

    @property
    def by_region(self) -> TableView:
        """The same for each region; null are chips that lie in none as a whole.

        Raises
        ------
        PlanError
            When no ``regions=`` were given.

        Examples
        --------
        >>> evaluation.by("row").num_rows > 1  # any column has such a table
        True
        """
        if not self.note.has_regions:
            raise PlanError(
                "by_region",
                "an evaluation without regions",
                "evaluate(regions=)",
                "Give polygons with a name each.",
            )
        return self.by("region")

    @property
    def by_distance(self) -> TableView:
        """The same for each distance to the nearest train chip: from ``from_m`` to less than ``to_m``, metres.

        Raises
        ------
        PlanError
            When no training plan was given.

        Examples
        --------
        >>> evaluation.by_distance.column("to_m").to_pylist()
        [1000.0, 5000.0, 20000.0, None]
        """
        if not self.note.distances_m:
            raise PlanError(
                "by_distance",
                "an evaluation without a training plan",
                "evaluate(splits=)",
                "Give the chips that the model was trained with.",
            )
        distance = self.table.column("distance_m").to_numpy()
        edges = [*self.note.distances_m, np.inf]
        masks = [(distance >= a) & (distance < b) for a, b in pairwise(edges)]
        masks[-1] |= np.isinf(distance)
        heads = {
            "from_m": pa.array(edges[:-1], pa.float64()),
            "to_m": pa.array([*edges[1:-1], None], pa.float64()),
        }
        return self._grouped(heads, masks)

    def by(self, column: str) -> TableView:
        """Return the scores of each value of a column of :attr:`chips`, such as one of your own labels.

        Parameters
        ----------
        column
            Its name.

        Raises
        ------
        PlanError
            When there is no such column.

        Examples
        --------
        >>> evaluation.by("split").column_names[:4]
        ['split', 'chips', 'pixels', 'accuracy']
        """
        if column not in self.table.column_names or column in ("counts", "sums", "geometry"):
            own = [name for name in self.table.column_names if name not in ("counts", "sums", "geometry")]
            raise PlanError("by", repr(column), f"one of {', '.join(own)}")
        values = np.array(self.table.column(column).to_pylist(), dtype=object)
        there = {value for value in values.tolist() if value is not None}
        names: Sequence[Any] = (
            in_order(there) if all(isinstance(one, str) for one in there) else sorted(there)
        )
        missing = np.array([value is None for value in values], dtype=bool)
        groups = [*names, *([None] if missing.any() else [])]
        masks = [
            missing if one is None else np.array([value == one for value in values], dtype=bool)
            for one in groups
        ]
        return self._grouped({column: pa.array(groups, self.table.schema.field(column).type)}, masks)

    def _grouped(self, heads: Mapping[str, pa.Array], masks: Sequence[NDArray[np.bool_]]) -> TableView:
        pixels = self.table.column("pixels").to_numpy()
        rows = [self._scored(mask) for mask in masks]
        names = OVERALL if self.note.is_class else DIFFERENCES
        return TableView(pa.table({
            **heads,
            "chips": pa.array([int(mask.sum()) for mask in masks], pa.int64()),
            "pixels": pa.array([int(pixels[mask].sum()) for mask in masks], pa.int64()),
            **{name: _floats([row[name] for row in rows]) for name in names},
        }))  # fmt: skip

    def _scored(self, chips: NDArray[np.bool_] | None) -> dict[str, float | None]:
        if self.note.is_class:
            return overall(self._pairs.matrix(list(self.classes), chips))
        return differences(self._sums if chips is None else self._sums.of_chips(chips))

    @cached_property
    def _pairs(self) -> Pairs:
        if "counts" not in self.table.column_names:
            none = np.zeros(0, dtype=np.int64)
            return Pairs(none, none, none, none)
        column = self.table.column("counts").combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        flat = column.flatten()
        chip = np.repeat(np.arange(len(column)), np.diff(np.asarray(column.offsets)))
        return Pairs(chip, *(flat.field(name).to_numpy() for name in ("truth", "predicted", "pixels")))

    @cached_property
    def _sums(self) -> DifferenceSums:
        column = self.table.column("sums").combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        names = ("bias", "square", "absolute", "mean", "spread")
        return DifferenceSums(
            self.table.column("pixels").to_numpy(), *(column.field(name).to_numpy() for name in names)
        )

    # Pictures and files

    def plot(self, ax: Any = None) -> Any:
        """Draw the map of errors: each chip coloured by its share of wrong pixels, or by its RMSE.

        Chips of which nothing was compared are grey.

        Parameters
        ----------
        ax
            Matplotlib axes to draw on; None: new ones.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        MissingExtraError
            When matplotlib is not installed.

        Examples
        --------
        >>> evaluation.plot().figure.savefig("errors.png")
        """
        from rasteret_dask.evaluation.picture import plot_errors

        return plot_errors(self.table, self.note.is_class, self.note.unit, ax)

    def error_map(self, to: str | os.PathLike[str], progress: bool = True) -> tuple[Path, ...]:
        """Write where predictions and labels differ, pixel by pixel, on the grid of the predictions.

        Chips are read once more. A GeoTIFF holds of classes 1 where both agree, 2 where they differ and 0 (nodata)
        where nothing was compared; of measured numbers predicted - true. Where several pixels of chips lie in one
        pixel of the map, it holds the largest error.

        Parameters
        ----------
        to
            A local file; or a folder, where the map has several rasters (zones, tiles).
        progress
            Show how many shards are done.

        Returns
        -------
        tuple of pathlib.Path
            The files.

        Raises
        ------
        PlanError
            When the evaluation was loaded from a file, or is of chips as a whole.

        Examples
        --------
        >>> evaluation.error_map("errors.tif", progress=False)
        (PosixPath('errors.tif'),)
        """
        if self.errors is None:
            raise PlanError(
                "error_map", "an evaluation that was loaded, or one of whole chips",
                "one of pixels, as evaluate() returns it",
                "Evaluate again: an evaluation's file holds counts of chips, not pixels.",
            )  # fmt: skip
        place = Place.of(to)
        if not place.is_local:
            raise PlanError("error_map", place.url, "a local path", "Write it here, and copy it.")
        return self.errors(Path(to).expanduser(), progress)

    def to_dict(self) -> dict[str, Any]:
        """Return all scores as plain values.

        Examples
        --------
        >>> evaluation.to_dict()["confusion"]["classes"]
        ['forest', 'water']
        """
        note = asdict(self.note)
        result: dict[str, Any] = {
            "predictions": note["predictions"], "labels": note["labels"], "chips": self.table.num_rows,
            "pixels": self.pixels, "left_out": self.left_out, "overall": self.overall,
            "scores": self.scores.to_pylist(),
        }  # fmt: skip
        if self.note.is_class:
            result["confusion"] = {
                "classes": list(self.classes.values()),
                "pixels": self.confusion.values.tolist(),
            }
        result["by_split"] = self.by_split.to_pylist()
        if self.note.has_regions:
            result["by_region"] = self.by_region.to_pylist()
        if self.note.distances_m:
            result["by_distance"] = self.by_distance.to_pylist()
        return result

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON text.

        Examples
        --------
        >>> import json
        >>> json.loads(evaluation.to_json())["pixels"] == evaluation.pixels
        True
        """
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :attr:`chips` as GeoParquet, with all that :meth:`load` needs; to a local path or a URL.

        Examples
        --------
        >>> evaluation.save("scores.parquet")  # QGIS draws it
        """
        table = self.table.replace_schema_metadata(
            {**(self.table.schema.metadata or {}), _KEY: self.note.to_json()}
        )
        remote.put(Place.of(path).url, geoparquet.to_bytes(table))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ReadError
            When nothing lies there.
        SchemaError
            When it is something else.

        Examples
        --------
        >>> evaluation.save("scores.parquet")
        >>> rd.Evaluation.load("scores.parquet").overall == evaluation.overall
        True
        """
        subject = f"evaluation {os.fspath(path)}"
        try:
            table = pq.read_table(pa.py_buffer(remote.get(Place.of(path).url)))
        except pa.ArrowInvalid as error:
            raise SchemaError(subject, str(error), "a file that Evaluation.save wrote") from error
        text = (table.schema.metadata or {}).get(_KEY)
        if text is None:
            raise SchemaError(subject, "another Parquet file", "a file that Evaluation.save wrote")
        return cls(table.replace_schema_metadata(None), Note.again(text, subject))

    def without_errors(self) -> Evaluation:
        """Return the counts alone, which pickle small: :meth:`error_map` needs the map and the chips.

        Examples
        --------
        >>> evaluation.without_errors().overall == evaluation.overall
        True
        """
        return replace(self, errors=None)

    @property
    def _card(self) -> Card:
        title = f"Evaluation of {self.note.predictions} against {self.note.labels}"
        return Card(title, list(self._facts()), [self._map])

    def _facts(self) -> Iterator[Fact]:
        own = counted(self.pixels, self.note.unit)
        chips = counted(self.table.num_rows, "chip")
        yield Fact("compared", own if self.note.unit == "chip" else f"{own} of {chips}")
        lost = [f"{n:,} {REASONS[name]}" for name, n in self.left_out.items() if n]
        if lost:
            yield Fact("left out", "; ".join(lost))
        yield Fact("scores", ", ".join(f"{name} {_figure(value)}" for name, value in self.overall.items()))
        if self.note.is_class:
            yield Fact("classes", self._class_text, self._class_table)
            sides = (("only in labels", self.only_in_labels), ("only in map", self.only_in_predictions))
            yield from (Fact(name, listed(names)) for name, names in sides if names)
        score = "accuracy" if self.note.is_class else "rmse"
        tables = [("splits", self.by_split, "split")]
        tables += [("regions", self.by_region, "region")] if self.note.has_regions else []
        for name, view, column in tables:
            if view.column(column).null_count < len(view):
                yield Fact(name, _texts(view, column, score), partial(_drawn, view))
        if self.note.distances_m:
            yield Fact("to train", self._distance_text(score), partial(_drawn, self.by_distance))
        if self.note.nearest:
            yield Fact(
                "pixels", f"of {counted(self.note.nearest, 'chip')} are not the map's: read by nearest"
            )

    @property
    def _class_text(self) -> str:
        f1 = class_scores(self._pairs.matrix(list(self.classes)))["f1"]
        return "f1 of " + ", ".join(
            f"{name} {_figure(v)}" for name, v in zip(self.classes.values(), f1, strict=True)
        )

    def _class_table(self) -> Markup:
        names, matrix = list(self.classes.values()), self.confusion.values.tolist()
        rows = [[name, *row] for name, row in zip(names, matrix, strict=True)]
        drawn = html_table(["true \\ predicted", *names], rows) if len(names) <= 12 else markup("")
        return Markup(drawn + self.scores._repr_html_())

    def _distance_text(self, score: str) -> str:
        parts = []
        for row in self.by_distance.to_pylist():
            if row["chips"]:
                end = "" if row["to_m"] is None else f" to {row['to_m'] / 1000:g}"
                parts.append(f"{score} {_figure(row[score])} from {row['from_m'] / 1000:g}{end} km")
        return "; ".join(parts)

    def _map(self) -> Markup:
        import shapely

        score = "accuracy" if self.note.is_class else "rmse"
        shapes = shapely.from_wkb(self.table.column("geometry").to_numpy(zero_copy_only=False))
        if self.note.is_class:
            labels = [_level(value) for value in self.table.column(score).to_pylist()]
        else:
            labels = [None if value is None else "compared" for value in self.table.column(score).to_pylist()]
        return svg_map([Outline(shape, label or "") for shape, label in zip(shapes, labels, strict=True)])

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html


def _drawn(view: TableView) -> Markup:
    return Markup(view._repr_html_())


def _level(accuracy: float | None) -> str | None:
    if accuracy is None:
        return None
    return "9 in 10 right" if accuracy >= 0.9 else "half or more right" if accuracy >= 0.5 else "most wrong"


def _texts(view: TableView, column: str, score: str) -> str:
    rows = [row for row in view.to_pylist() if row["chips"]]
    return ", ".join(
        f"{row[column] if row[column] is not None else 'none'} {score} {_figure(row[score])}" for row in rows
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _floats(values: Sequence[float | None]) -> pa.Array:
    return pa.array(values, pa.float64())
