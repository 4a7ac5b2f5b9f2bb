# SPDX-License-Identifier: Apache-2.0
"""Run a recipe for each of the last weeks that has no finished store yet: python weekly.py recipe.toml.

The recipe is the same every week. Each ``date_range`` in it becomes the week, from Monday to Sunday, and each output
gets the week's name: ``s3://bucket/train.zarr`` becomes ``s3://bucket/train-2024-W20.zarr``. Splits belong to the
ground, so the same place has the same split in every week's store.

A week without a scene, a record or a chip that the recipe takes gets no store, and is no failure. A week whose stores
are finished is left alone, whatever its catalog has published since. A store that is not finished goes on where it
stopped; if other scenes were published meanwhile, it is refused, and its folder is to be deleted.
"""

from __future__ import annotations

import argparse
import datetime as dt
import sys
import tomllib
from collections.abc import Iterator

import rasteret_dask as rd

DAYS = dt.timedelta(days=1)


def mondays(until: dt.date, count: int) -> Iterator[dt.date]:
    """Yield the Mondays of the last weeks whose Sunday is not after a day, the oldest first."""
    last = until - (until.weekday() + 1) % 7 * DAYS - 6 * DAYS
    for number in reversed(range(count)):
        yield last - 7 * number * DAYS


def name_of(monday: dt.date) -> str:
    """Return the name of a week in ISO 8601: 2024-W20."""
    year, week, _ = monday.isocalendar()
    return f"{year}-W{week:02}"


def of_week(recipe: rd.Recipe, monday: dt.date) -> rd.Recipe:
    """Return the recipe with the dates of one week, and outputs that have its name."""
    dates = [monday.isoformat(), (monday + 6 * DAYS).isoformat()]
    tables = tomllib.loads(recipe.text)["collections"]
    overrides: dict[str, object] = {
        f"collections.{name}.date_range": dates for name, table in tables.items() if "date_range" in table
    }
    for number, output in enumerate(recipe.outputs):
        stem, dot, suffix = output.name.rpartition(".")
        overrides[f"outputs.{number}.{output.kind}"] = f"{stem}-{name_of(monday)}{dot}{suffix}"
    return rd.load_recipe(recipe.path, overrides=overrides)


def is_finished(recipe: rd.Recipe) -> bool:
    """Tell whether all stores of a recipe open; one that is not finished does not."""
    try:
        for output in recipe.outputs:
            if output.kind == "zarr":
                rd.open_chips(output.place)
    except rd.StoreError:
        return False
    return True


def main() -> int:
    """Return 0; 1 where a week failed; 2 where the recipe makes no sense."""
    parser = argparse.ArgumentParser(
        description="Run a recipe for each of the last weeks that has no store yet."
    )
    parser.add_argument("recipe")
    parser.add_argument(
        "--weeks", type=int, default=4, help="how many, so that a missed one is caught up (4)"
    )
    parser.add_argument(
        "--lag-days", type=int, default=7, help="scenes arrive for so long after a week ends (7)"
    )
    parser.add_argument(
        "--today", type=dt.date.fromisoformat, default=None, help="another day, as 2024-05-20"
    )
    options = parser.parse_args()
    try:
        recipe = rd.load_recipe(options.recipe)
    except rd.RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    if not any(output.kind == "zarr" for output in recipe.outputs):
        print(f"{recipe.path}: found no store; expected an [[outputs]] with zarr = ...", file=sys.stderr)
        return 2
    today = options.today or dt.datetime.now(dt.UTC).date()
    failed = 0
    for monday in mondays(today - options.lag_days * DAYS, options.weeks):
        name, one = name_of(monday), of_week(recipe, monday)
        if is_finished(one):
            print(f"{name}: finished", flush=True)
            continue
        print(f"{name}: begins", flush=True)
        try:
            one.run()
        except rd.RasteretDaskError as error:
            if isinstance(error.__cause__, rd.EmptyError):
                print(f"{name}: nothing. {error}", flush=True)
                continue
            failed += 1
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
