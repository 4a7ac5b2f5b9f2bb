# SPDX-License-Identifier: Apache-2.0
"""Nodata in the pixel's own dtype: what a tag, an item or a table spells becomes the number that pixels hold."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

__all__ = ["BEYOND_MEASURE", "INEXACT", "Number", "number_of", "spelled", "text_of"]

Number: TypeAlias = int | float

INEXACT = frozenset({"int64", "uint64"})
"""Types of which a double, and so a kernel other than nearest, rounds numbers beyond 2**53."""

BEYOND_MEASURE = 3.39e38
"""No measurement is so large: nodata from here on means all numbers beyond it too, as FLT_MAX has many spellings."""

_FLT_MAX = float(np.finfo(np.float32).max)
_ROUNDED = 1.001
"""FLT_MAX is spelled with as few as two digits, 3.403e+38 for instance, which is beyond it."""
_REAL = {"complex64": "float32", "complex128": "float64"}


def text_of(value: Any) -> str | None:
    """Return nodata as text, which loses nothing; None where a value is neither text nor a number."""
    if isinstance(value, str):
        return value.strip("\0 \n\t") or None
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    return repr(value.item() if isinstance(value, np.generic) else value)


@lru_cache(maxsize=1024)  # all files of a collection spell the same
def number_of(text: str | None, dtype: str) -> Number | None:
    """Return nodata as the number that a pixel of a dtype holds.

    Parameters
    ----------
    text
        As GDAL's tag, an item or a table spells it.
    dtype
        NumPy name of the pixels' type. Of complex pixels the real part holds it, beside 0.

    Returns
    -------
    int, float or None
        An int for integer pixels, exact to 64 bits; a float that is a number of the dtype for others. None where
        the text is no number, or no pixel of this dtype can hold it (-9999 in uint16): no pixel is nodata then.
    """
    exact = _decimal(text)
    if exact is None:
        return None
    kind = np.dtype(_REAL.get(dtype, dtype))
    if kind.kind in "iub":
        limits = np.iinfo(np.uint8 if kind.kind == "b" else kind)
        inside = exact.is_finite() and limits.min <= exact <= limits.max
        return int(exact) if inside and exact == int(exact) else None
    largest, value = float(np.finfo(kind).max), float(exact)
    if exact.is_finite():
        if np.isinf(value):  # DBL_MAX, rounded up
            value = float(np.copysign(np.finfo(np.float64).max, value))
        if _FLT_MAX < abs(value) <= _FLT_MAX * _ROUNDED:
            value = float(np.copysign(_FLT_MAX, value))
        if abs(value) > largest:
            return None
    return float(kind.type(value))


def spelled(number: Number | None) -> str | None:
    """Return a number as the text that tables keep: the shortest that gives it back."""
    if isinstance(number, float) and number.is_integer() and abs(number) < 2**53:
        return str(int(number))
    return None if number is None else repr(number)


def _decimal(text: str | None) -> Decimal | None:
    """Return the number that a text spells; Windows spells "nan" as "-1.#QNAN" and infinity as "1.#INF"."""
    words = (text or "").strip("\0 \n\t").lower()
    try:
        return Decimal(words) if not words.startswith("snan") else None
    except InvalidOperation:
        pass
    if "nan" in words or "#ind" in words:
        return Decimal("nan")
    if "#inf" in words:
        return Decimal("-inf" if words.startswith("-") else "inf")
    return None
