# SPDX-License-Identifier: Apache-2.0
"""The map of errors: where chips lie, coloured by how wrong the predictions are on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from rasteret_dask.display.colours import INK, NO_LABEL
from rasteret_dask.errors import PlanError
from rasteret_dask.show.maps import outlines_of
from rasteret_dask.show.plot import for_any_page, pyplot

__all__ = ["plot_errors"]

COLOURS = "viridis"
"""From few errors (dark) to many: told apart by colour-blind readers."""


def plot_errors(table: pa.Table, is_class: bool, unit: str, ax: Any = None) -> Any:
    """Draw chips coloured by their share of errors, in percent, or by their RMSE; see :meth:`Evaluation.plot`."""
    if not table.num_rows:
        raise PlanError("plot", "no chips", "at least one chip")
    plt = pyplot()
    from matplotlib.collections import PolyCollection

    axes = plt.subplots(figsize=(6.6, 5.6), layout="constrained")[1] if ax is None else ax
    corners, names, aspect = outlines_of(table)
    column = table.column("accuracy" if is_class else "rmse").to_numpy()
    values = 100.0 * (1.0 - column) if is_class else column
    there = np.isfinite(values)
    axes.add_collection(
        PolyCollection([corners[i] for i in np.flatnonzero(~there)], facecolors=NO_LABEL, alpha=0.45)
    )
    top = max(float(values[there].max(initial=0.0)), 1.0 if is_class else 1e-12)
    drawn = PolyCollection(
        [corners[i] for i in np.flatnonzero(there)], array=values[there], cmap=COLOURS, clim=(0.0, top),
        edgecolors="face", linewidths=0.3,
    )  # fmt: skip
    axes.add_collection(drawn)
    axes.autoscale_view()
    axes.set_aspect(aspect, anchor="N")
    axes.set(xlabel=names[0], ylabel=names[1])
    text = (f"Errors, % of the {unit}s" if unit == "pixel" else "Errors, %") if is_class else "RMSE"
    bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.65, label=text)
    bar.ax.tick_params(labelsize="small", colors=INK)
    bar.ax.yaxis.label.set_color(INK)
    bar.outline.set_visible(False)
    count, missing = int(there.sum()), int((~there).sum())
    title = f"{count:,} chips" + (f"; {missing:,} without a comparison are grey" if missing else "")
    axes.set_title(title, loc="left", fontsize="medium", color=INK)
    for_any_page(axes)
    return axes
