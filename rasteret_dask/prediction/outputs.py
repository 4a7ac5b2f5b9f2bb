# SPDX-License-Identifier: Apache-2.0
"""What a model's numbers are: classes, probabilities or values, of every pixel or of a chip."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import ModelError, PlanError

__all__ = ["ModelOutput", "OutputKind", "Outputs", "OutputsLike", "outputs_of", "settled"]

OutputKind: TypeAlias = Literal["classes", "probabilities", "values"]
"""What a model's numbers are."""

_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_MOST_CODES = 65_535


@dataclass(frozen=True)
class Outputs:
    """What a model's numbers are, and what they are called.

    Parameters
    ----------
    kind
        ``"classes"``: the model gives a score a class, and the class with the highest one stays; or it gives the codes
        themselves. ``"probabilities"``: the scores stay, and must lie within 0 and 1. ``"values"``: whatever else:
        heights, fluxes, embeddings.
    classes
        Code -> name; or names, whose codes count from 0. The scores of a model are in the order of the codes as they
        are given here. None: codes count from 0, and have no names.
    colors
        Code or name -> ``"#rrggbb"``.
    names
        Of values, what each number is called; None: ``0``, ``1`` and so on.

    Raises
    ------
    PlanError
        When an argument is none of these.

    Examples
    --------
    >>> rd.Outputs("classes", classes={1: "water", 2: "forest"}, colors={"water": "#3b76c4"}).colors
    {1: '#3b76c4'}
    >>> rd.Outputs("values", names=["height"]).kind
    'values'
    """

    kind: OutputKind = "values"
    classes: Mapping[int, str] | Sequence[str] | None = None
    colors: Mapping[int | str, str] = field(default_factory=dict)
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(OutputKind):
            words = ", ".join(map(repr, get_args(OutputKind)))
            raise PlanError("outputs=", repr(self.kind), f"{words}, or an Outputs")
        if self.kind == "values" and (self.classes is not None or self.colors):
            raise PlanError("Outputs('values')", "classes or colors", "none", "Values have names=.")
        if self.kind != "values" and self.names is not None:
            raise PlanError(f"Outputs({self.kind!r})", "names", "none", "Classes have classes=.")
        classes = _classes(self.classes)
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "colors", _colours(self.colors, classes))
        if self.names is not None:
            names = (self.names,) if isinstance(self.names, str) else tuple(map(str, self.names))
            if len(set(names)) != len(names) or not names:
                raise PlanError("Outputs(names=)", repr(names), "names that are all different")
            object.__setattr__(self, "names", names)

    @property
    def note(self) -> dict[str, Any]:
        """The same as JSON values: part of what a map is known by.

        Examples
        --------
        >>> rd.Outputs("classes", classes=["land", "water"]).note["classes"]
        [[0, 'land'], [1, 'water']]
        """
        classes = None if self.classes is None else [[code, name] for code, name in self._pairs]
        colours = [
            [code, colour] for code, colour in sorted(self.colors.items(), key=lambda own: str(own[0]))
        ]
        return {
            "kind": self.kind,
            "classes": classes,
            "colors": colours,
            "names": None if self.names is None else list(self.names),
        }

    @property
    def _pairs(self) -> tuple[tuple[int, str], ...]:
        assert isinstance(self.classes, Mapping)
        return tuple(self.classes.items())


OutputsLike: TypeAlias = "OutputKind | Outputs"
"""What every exit that predicts takes for outputs."""


def outputs_of(outputs: OutputsLike) -> Outputs:
    """Return what an exit was given, as Outputs."""
    return outputs if isinstance(outputs, Outputs) else Outputs(outputs)


def _classes(classes: Any) -> dict[int, str] | None:
    if classes is None:
        return None
    try:
        pairs = list(classes.items() if isinstance(classes, Mapping) else enumerate(classes))
        result = {int(code): str(name) for code, name in pairs}
    except (TypeError, ValueError) as error:
        raise PlanError("Outputs(classes=)", repr(classes), "code -> name, or names") from error
    names = list(result.values())
    wrong = [code for code in result if not 0 <= code < _MOST_CODES]
    if (
        isinstance(classes, str)
        or not result
        or wrong
        or len(result) != len(pairs)
        or len(set(names)) != len(names)
    ):
        raise PlanError(
            "Outputs(classes=)",
            repr(classes),
            f"codes from 0 to {_MOST_CODES - 1:,} with names, all different",
        )
    return result


def _colours(colours: Mapping[int | str, str], classes: Mapping[int, str] | None) -> dict[int, str]:
    code_of = {name: code for code, name in (classes or {}).items()}
    result = {}
    for key, colour in colours.items():
        code = code_of.get(key) if isinstance(key, str) else int(key)
        if code is None or (classes is not None and code not in classes):
            raise PlanError("Outputs(colors=)", repr(key), "codes or names of classes")
        if not isinstance(colour, str) or not _COLOUR.fullmatch(colour):
            raise PlanError("Outputs(colors=)", f"{colour!r} for {key!r}", "'#rrggbb'")
        result[code] = colour
    return result


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What one model gives for a chip, and what of it is stored."""

    kind: OutputKind
    side: int | None
    """Pixels of a side of what it gives for a chip; None: it gives one answer for the whole chip."""
    codes: tuple[int, ...]
    """Of classes and probabilities: the code of each score; of values ()."""
    names: tuple[str, ...]
    """Of each score or value."""
    colors: tuple[tuple[int, str], ...] = ()
    votes: bool = False
    """Whether the model gives codes of classes, not scores: each chip then has a vote."""
    named: bool = False
    """Whether the classes have names of the user's."""

    @property
    def channels(self) -> int:
        """Numbers of a pixel, or of a chip, while they are blended."""
        return len(self.names)

    @property
    def variable(self) -> str:
        """What the array is called: ``classes``, ``probabilities`` or ``values``."""
        return self.kind

    @property
    def dtype(self) -> str:
        """Of what is stored."""
        if self.kind != "classes":
            return "float32"
        return "uint8" if max(self.codes) < 255 else "uint16"

    @property
    def nodata(self) -> float:
        """What invalid pixels hold: NaN, or of classes 0, or where that is a class the greatest number of the dtype."""
        if self.kind != "classes":
            return math.nan
        return 0 if 0 not in self.codes else int(np.iinfo(self.dtype).max)

    @property
    def is_flat(self) -> bool:
        """Whether the stored array is (y, x), without an axis of bands."""
        return self.kind == "classes"

    @property
    def classes(self) -> tuple[tuple[int, str], ...]:
        """Code -> name of classes, ascending; () where they have none, or there are no classes."""
        return tuple(sorted(zip(self.codes, self.names, strict=True))) if self.named else ()

    def numbers(self, rows: NDArray[Any], ids: Sequence[str] | NDArray[Any]) -> NDArray[np.float32]:
        """Return what a model gave as channels: shape (chip, channel, ...), float32.

        Raises
        ------
        ModelError
            When a code is none of the classes', or a probability does not lie within 0 and 1.
        """
        shape = (len(rows), *((self.side, self.side) if self.side is not None else ()))
        if self.votes:
            flat = rows.reshape(shape)
            codes = np.array(self.codes)
            strange = ~np.isin(flat, codes)
            if strange.any():
                at = np.argwhere(strange)[0]
                raise ModelError(
                    f"chip {ids[at[0]]}", f"class {flat[tuple(at)]}", f"one of the codes {_few(self.codes)}",
                    "Name all codes that the model gives: Outputs('classes', classes={code: name}).",
                )  # fmt: skip
            votes = flat[:, None] == codes.reshape(1, -1, *([1] * (flat.ndim - 1)))
            return np.asarray(votes, dtype=np.float32)
        values = np.asarray(rows.reshape(shape[0], self.channels, *shape[1:]), dtype=np.float32)
        if self.kind == "probabilities":
            with np.errstate(invalid="ignore"):
                outside = (values < -1e-6) | (values > 1 + 1e-6)
            if outside.any():
                at = np.argwhere(outside)[0]
                raise ModelError(
                    f"chip {ids[at[0]]}", f"{values[tuple(at)]:.6g} for {self.names[at[1]]!r}",
                    "probabilities from 0 to 1",
                    "Of a model that gives other scores: rd.Model(..., activation='softmax') or 'sigmoid'.",
                )  # fmt: skip
        return values

    def stored(self, blended: NDArray[np.float32]) -> NDArray[Any]:
        """Return blended channels, shape (channel, ...), as they are stored; NaN in all channels: invalid."""
        if self.kind != "classes":
            return blended
        top, codes = blended[0].copy(), np.full(blended.shape[1:], self.codes[0], dtype=self.dtype)
        for scores, code in zip(blended[1:], self.codes[1:], strict=True):  # argmax would copy all channels
            better = scores > top
            np.copyto(top, scores, where=better)
            codes[better] = code
        codes[np.isnan(top)] = self.nodata
        return codes


def settled(outputs: Outputs, shape: Sequence[int], dtype: Any, size: int, name: str) -> ModelOutput:
    """Return what a model gives, from its answer to one chip.

    Parameters
    ----------
    outputs
        What the user says of it.
    shape, dtype
        Of the answer to one chip: (), (k,), (y, x) or (k, y, x).
    size
        Side of a chip, pixels.
    name
        Of the model, for errors.

    Raises
    ------
    ModelError
        When the answer has another number of classes, or does not fit the grid of the chips.
    """
    subject, kind = f"model {name}", np.dtype(dtype).kind
    answer = f"{np.dtype(dtype)} of shape {tuple(shape)} for a chip"
    side: int | None = None
    channels = 1
    if len(shape) in (2, 3):
        side = _side(shape, size, subject, answer)
        channels = shape[0] if len(shape) == 3 else 1
    elif len(shape) == 1:
        channels = shape[0]
    elif len(shape) > 3:
        raise ModelError(
            subject, answer, "(k, y, x) or (y, x) for each pixel, (k,) or () for each chip",
            "Choose one of several times or outputs: rd.Model(..., output=), or a function around the model.",
        )  # fmt: skip
    if outputs.kind == "values":
        names = tuple(outputs.names) if outputs.names is not None else tuple(map(str, range(channels)))
        if len(names) != channels:
            raise ModelError(
                subject,
                answer,
                f"{len(names)} values, as names= says",
                "Name each value, or leave names= out.",
            )
        return ModelOutput("values", side, (), names)
    votes = outputs.kind == "classes" and kind in "iub" and channels == 1
    given = outputs.classes
    assert given is None or isinstance(given, Mapping)
    if votes and given is None:
        raise ModelError(
            subject, f"{answer}: codes of classes", "the codes that there are",
            "Name them: Outputs('classes', classes={1: 'water', 2: 'forest'}).",
        )  # fmt: skip
    codes = tuple(given) if given is not None else tuple(range(channels))
    if not votes and len(codes) != channels:
        raise ModelError(
            subject, answer, f"{len(codes)} scores, one for each of the classes {_few(codes)}",
            "Give classes= in the order of the model's scores, all of them.",
        )  # fmt: skip
    if outputs.kind == "classes" and len(codes) < 2:
        raise ModelError(
            subject, answer, "a score for each of two classes at least",
            "Of a model with one score: outputs='probabilities', or let it return 1 - p and p.",
        )  # fmt: skip
    names = tuple(given.values()) if given is not None else tuple(map(str, codes))
    colours = tuple(sorted((int(code), colour) for code, colour in outputs.colors.items()))
    return ModelOutput(outputs.kind, side, codes, names, colours, votes, given is not None)


def _side(shape: Sequence[int], size: int, subject: str, answer: str) -> int:
    height, width = shape[-2:]
    if height != width or height < 1 or (size % height and height % size):
        fitting = ", ".join(f"{s} x {s}" for s in dict.fromkeys((size, size // 2, size * 2)) if s)
        raise ModelError(
            subject, answer, f"a square whose side divides the chip's {size} pixels, or is a multiple: {fitting}",
            "Crop or pad inside the model, or choose another size of chips.",
        )  # fmt: skip
    return int(height)


def _few(codes: Sequence[int]) -> str:
    return ", ".join(map(str, codes[:8])) + (" ..." if len(codes) > 8 else "")
