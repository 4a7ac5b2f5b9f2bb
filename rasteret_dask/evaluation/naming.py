# SPDX-License-Identifier: Apache-2.0
"""Which class of the labels each predicted class is: by their names where both sides have some, else by number."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rasteret_dask.errors import PlanError
from rasteret_dask.lists import listed

__all__ = ["ClassCodes", "class_codes"]


@dataclass(frozen=True, slots=True)
class ClassCodes:
    """Predicted classes as classes of the labels."""

    codes: Mapping[int, int]
    """Predicted class -> class of the labels, where these differ."""
    names: Mapping[int, str]
    """Class of the labels -> its name, and those of predicted classes that the labels lack."""


def class_codes(
    truth: Mapping[int, str],
    predicted: Mapping[int, str],
    classes: Mapping[int, str | int] | None,
    seen: Collection[int] = (),
) -> ClassCodes:
    """Return which class of the labels each predicted one is.

    Parameters
    ----------
    truth, predicted
        Class -> its name, as far as each side has names.
    classes
        What the user says of predicted classes: the name or the number of the labels' class.
    seen
        Predicted classes that there are, once they are known.

    Raises
    ------
    PlanError
        When the user names a class that the labels do not have.
    """
    numbers = {name: code for code, name in truth.items()}
    codes: dict[int, int] = {}
    names = dict(truth)
    said = {**predicted, **(classes or {})}
    free = max([0, *truth, *said, *seen]) + 1
    for code, meant in said.items():
        if isinstance(meant, str) and meant in numbers:
            target = numbers[meant]
        elif isinstance(meant, str):
            if truth and classes is not None and code in classes:
                raise PlanError(
                    f"evaluate(classes={{{code}: {meant!r}}})", "a name that no label has",
                    f"one of {listed(list(numbers))}",
                    "Leave a class out that the labels lack.",
                )  # fmt: skip
            target = code if code not in truth else free
            free += target == free
            names[target] = meant
        else:
            target = int(meant)
        if target != code:
            codes[code] = target
    if truth and any(isinstance(meant, str) for meant in (classes or {}).values()):
        # who names classes compares names: a number without one is not the labels' class that happens to have it
        for code in sorted(set(truth) & set(seen) - set(said)):
            codes[code], names[free] = free, str(code)
            free += 1
    return ClassCodes(codes, names)
