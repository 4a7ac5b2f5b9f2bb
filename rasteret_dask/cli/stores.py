# SPDX-License-Identifier: Apache-2.0
"""Commands about stores that were written: whether they are whole, and what is in them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rasteret_dask.cli.exitcodes import ExitCode
from rasteret_dask.cli.options import Json, Overrides, Quiet, command
from rasteret_dask.cli.printing import answer, details, listing, plain, tell_written
from rasteret_dask.cli.recipes import loaded, report_lines
from rasteret_dask.lists import first_of

if TYPE_CHECKING:
    import pyarrow as pa

    from rasteret_dask.statistics.stats import Stats
    from rasteret_dask.store.verifying import Verification

__all__ = ["Store", "commit", "preview", "report", "stats", "verify"]

Store = Annotated[
    str, typer.Argument(metavar="STORE", show_default=False, help="The folder of a Zarr store, or its URL.")
]

SHOWN = 10
"""Paths of damaged objects that are printed of each kind; --json has all of them."""


@command
def commit(store: Store, as_json: Json = False) -> None:
    """Finish a store whose shards are all written, by parts of an array job that have not finished it themselves.

    The part that ends last does so by itself: this is for when it was stopped right before.
    """
    from rasteret_dask.store.committing import commit as committed

    report = committed(store)
    answer(report.to_dict(), details(report_lines(report), report.store), as_json)


@command
def verify(
    store: Store,
    sources: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="Also read N chips again from their scenes, and compare every pixel with what is stored.",
        ),
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            show_default=False,
            help="With --sources: import this module first, of --folder or an installed package: it has functions that "
            "the chips' plan names. Repeatable.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            show_default=False, help="Where modules of --import lie: the recipe's folder. By default here."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read every object of a store and compare it with the size and checksum that were written.

    Ends with code 4 when an object is missing or damaged, a chip differs from its scenes, or the store is not finished.
    """
    from rasteret_dask.store.verifying import verify as verified

    if (modules or folder) and sources is None:
        raise typer.BadParameter("functions are used by --sources alone.", param_hint="--import")
    for module in modules or ():
        from rasteret_dask.recipes.functions import imported

        imported(module, (folder or Path.cwd()).absolute(), f"--import {module}")
    report = verified(store, progress=not quiet, sources=sources)
    answer({**plain(report), "ok": report.ok}, _verification(report), as_json)
    if not report.ok:
        raise typer.Exit(ExitCode.UNVERIFIED)


def _verification(report: Verification) -> Any:
    from rasteret_dask.display.card import counted
    from rasteret_dask.progress import nbytes_text

    kinds = {"missing": report.missing, "damaged": report.damaged, "unexpected": report.unexpected}
    state = "every object is what was written"
    if report.missing or report.damaged:
        state = "damaged"
    elif not report.finished:
        state = "not finished"
    elif report.differences:
        state = "other pixels than its scenes"
    remedy = "" if report.ok else "Run the recipe again: what is missing or damaged is written anew."
    return details(
        [
            ("state", state),
            ("as written", f"{report.objects:,} objects, {nbytes_text(report.nbytes)}"),
            (
                "read again",
                f"{counted(report.compared, 'chip')} from their scenes" if report.compared else None,
            ),
            *((kind, first_of(paths, SHOWN, "\n")) for kind, paths in kinds.items()),
            ("differences", first_of(report.differences, SHOWN, "\n")),
            ("what to do", remedy),
        ],
        report.store,
    )


@command
def report(
    store: Store,
    output: Annotated[
        str, typer.Option("--output", "-o", help="The page to write: a path or a URL.")
    ] = "report.html",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a finished store: map, chips, statistics, losses, timings, where it all comes from.

    The page needs no network and runs no script: it can be sent by mail.
    """
    from rasteret_dask.reportpage import report as written

    place = written(store, output, progress=not quiet)
    tell_written(f"{place} is written.", {"path": place, "store": store}, as_json=as_json, quiet=quiet)


@command
def preview(
    store: Store,
    output: Annotated[
        str, typer.Option("--output", "-o", help="The picture to write, as its ending says: png, pdf or svg.")
    ] = "preview.png",
    number: Annotated[int, typer.Option("--chips", "-n", min=1, help="How many chips.")] = 6,
    split: Annotated[
        str | None, typer.Option(show_default=False, help="Only the chips of this split: train.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw some chips of a store, with their masks and labels; needs matplotlib."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # the picture goes to a file, with or without a screen
    import rasteret_dask as rd
    from rasteret_dask.net import remote
    from rasteret_dask.net.places import Place

    kind = output.rpartition(".")[2].lower()
    if kind not in ("png", "pdf", "svg"):
        raise typer.BadParameter(f"found {output!r}; expected a name that ends in .png, .pdf or .svg.")
    chips = rd.open_chips(store, split)
    figure = chips.preview(number)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=130)
    remote.put(Place.of(output).url, picture.getvalue())
    document = {"path": output, "store": store, "chips": min(number, len(chips))}
    tell_written(f"{output} is written.", document, as_json=as_json, quiet=quiet)


@command
def stats(
    place: Annotated[
        str,
        typer.Argument(
            metavar="STORE|RECIPE", show_default=False, help="A finished store (path or URL), or a recipe."
        ),
    ],
    split: Annotated[
        str | None, typer.Option(show_default=False, help="Only the chips of this split: train.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Measure so many chips instead of all.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(show_default=False, help="Measure only this source; may be given several times."),
    ] = None,
    settings: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the pixels of a store or recipe: mean, standard deviation, percentiles and classes of each band.

    Masks and label columns are counted.

    What is measured of a store stays with it: a second call reads no pixels. Of a recipe, the chips before outputs are
    measured, and nothing is written.
    """
    import rasteret_dask as rd

    chips: rd.Chips | rd.StoredChips
    if place.endswith(".toml"):
        chips = loaded(place, settings).chips()
        chips = chips if split is None else chips.select(split)
    elif settings:
        raise typer.BadParameter(
            "a store has no values to replace: name a recipe (.toml).", param_hint="--set"
        )
    else:
        chips = rd.open_chips(place, split)
    measured = chips.stats(sample, progress=not quiet, sources=source or None)
    answer(_stats_document(measured), _stats_tables(measured), as_json)


def _stats_document(measured: Stats) -> dict[str, Any]:
    return {
        "chips": measured.chips,
        "bands": measured.table.to_pylist(),
        "classes": measured.class_table.to_pylist(),
    }


SHOWN_COLUMNS = (
    ("source", "source"),
    ("band", "band"),
    ("kind", "kind"),
    ("valid_fraction", "valid"),
    ("mean", "mean"),
    ("std", "std"),
    ("p2", "2 %"),
    ("p50", "50 %"),
    ("p98", "98 %"),
)
"""Columns that fit into a terminal of 80 characters, and what they are called; --json has all of them."""


def _stats_tables(measured: Stats) -> Any:
    from rich.console import Group

    bands, classes = measured.table.select([name for name, _ in SHOWN_COLUMNS]), measured.class_table
    tables = [listing([title for _, title in SHOWN_COLUMNS], _rows(bands), f"{measured.chips:,} chips")]
    if classes.num_rows:
        tables.append(listing(classes.column_names, _rows(classes), "Classes"))
    return Group(*tables)


def _rows(table: pa.Table) -> list[list[Any]]:
    return [list(row.values()) for row in table.to_pylist()]
