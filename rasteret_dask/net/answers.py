# SPDX-License-Identifier: Apache-2.0
"""What a web server answers, and how an answer fails: known without loading what asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Answer", "BrokenError", "RefusedError"]


class BrokenError(Exception):
    """No answer, or a part of one: the connection failed or broke, or the body ended early. It may pass.

    Parameters
    ----------
    text
        What happened.
    final
        Whether another try would end the same, as with a certificate that is not trusted.
    """

    def __init__(self, text: str, final: bool = False) -> None:
        super().__init__(text, final)
        self.text, self.final = text, final


class RefusedError(Exception):
    """An answer without what was asked for.

    Parameters
    ----------
    status
        Of HTTP.
    text
        What the answer says, for messages.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status, self.text = status, text


@dataclass(frozen=True, slots=True)
class Answer:
    """A good answer (2xx)."""

    status: int
    headers: Any
    """Of the library that asked: ``get`` looks names up in any case."""
    body: bytes
