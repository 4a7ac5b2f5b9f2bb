# SPDX-License-Identifier: Apache-2.0
"""Rectangles that overlap become rectangles that do not, with the same ground."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["apart"]

PIECES = 16
"""Strips that a rectangle is cut into, on average, at most: beyond, the ground is halved first."""

FEW = 256
"""Rectangles that are never halved."""


def apart(boxes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return rectangles that do not overlap and cover what the given ones cover, shape (n, 4).

    Parameters
    ----------
    boxes
        Shape (box, 4): xmin, ymin, xmax, ymax, in whole numbers.

    Notes
    -----
    All edges cut the ground into strips from north to south; in a strip, what rectangles cover are intervals, and equal
    intervals of neighbouring strips are one rectangle. Where rectangles lie freely, there are so many strips that the
    ground is halved until a part has few, or one rectangle covers it whole. A million chips of a lattice take a second.
    """
    if not len(boxes):
        return np.zeros((0, 4), dtype=np.int64)
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    return np.concatenate([*_parts(boxes, low, high), np.zeros((0, 4), dtype=np.int64)])


def _parts(
    boxes: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """Yield the rectangles of parts of the ground from ``low`` to ``high`` (x, y), which all boxes lie in."""
    if not len(boxes):
        return
    if bool(((boxes[:, :2] <= low) & (boxes[:, 2:] >= high)).all(axis=1).any()):
        yield np.concatenate([low, high])[None]
        return
    edges = np.unique(boxes[:, [1, 3]])
    first, last = (np.searchsorted(edges, boxes[:, at]) for at in (1, 3))
    if len(boxes) <= FEW or int((last - first).sum()) <= PIECES * len(boxes):
        yield _strips(boxes, edges, first, last)
        return
    axis = int(np.argmax(high - low))
    middle = int(np.median(boxes[:, [axis, axis + 2]]))
    middle = min(max(middle, int(low[axis]) + 1), int(high[axis]) - 1)
    for side, bound in ((axis + 2, np.minimum), (axis, np.maximum)):
        half = boxes.copy()
        half[:, side] = bound(half[:, side], middle)
        corners = (low.copy(), high.copy())
        corners[0 if side == axis else 1][axis] = middle
        yield from _parts(half[half[:, axis] < half[:, axis + 2]], *corners)


def _strips(
    boxes: NDArray[np.int64], edges: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rectangles that boxes become, each of which lies in the strips from its first to before its last."""
    west, width = boxes[:, 0].min(), boxes[:, 2].max() - boxes[:, 0].min() + 1
    count = last - first
    strip = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
    # a line of all strips, one behind the other
    start = strip * width + np.repeat(boxes[:, 0] - west, count)
    stop = strip * width + np.repeat(boxes[:, 2] - west, count)
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(stop[order])
    begin = np.flatnonzero(np.append(True, start[1:] > reach[:-1]))
    strip, left = np.divmod(start[begin], width)
    right = reach[np.append(begin[1:], len(start)) - 1] - strip * width
    order = np.lexsort((strip, right, left))
    strip, left, right = strip[order], left[order], right[order]
    new = np.append(True, (np.diff(left) != 0) | (np.diff(right) != 0) | (np.diff(strip) != 1))
    top = np.flatnonzero(new)
    bottom = np.append(top[1:], len(new)) - 1
    return np.stack([left[top] + west, edges[strip[top]], right[top] + west, edges[strip[bottom] + 1]], -1)
