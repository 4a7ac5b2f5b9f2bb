"""Refusals that last: a full disk, a quota, a place that must not be written. Trying again does not help."""

from __future__ import annotations

import errno
import os
import re
import shutil

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from rasteret_dask.errors import UnwritableStoreError

__all__ = ["is_refusal", "refusal"]

_FULL = {"ENOSPC", "EDQUOT", "EFBIG"}
_FORBIDDEN = {"EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP"}

_OF_SYSTEM = re.compile(r"\(os error (\d+)\)")
"""How obstore's texts end that pass an error of the operating system on: all that it tells of them."""

_FULL_STATUS = re.compile(r"status code: 507")  # Insufficient Storage, as MinIO and WebDAV say

_CODE = re.compile(r"<Code>(\w+)</Code>")
"""The reason in an S3 answer: ``QuotaExceeded``, say."""

_STAYS = "What is written stays, and a rerun does the rest."


def is_refusal(error: BaseException) -> bool:
    """Tell whether a store refuses for good: no room, no permission, read-only, or no such place."""
    return _is_full(error) or _name(error) in _FORBIDDEN or _is_denied(error)


def refusal(
    subject: str, error: BaseException, folder: str | None, nbytes: int
) -> UnwritableStoreError | None:
    """Return the error that says why a place takes no more bytes, or None where trying again may help.

    Parameters
    ----------
    subject
        What was being written, fit for messages.
    error
        What obstore raised.
    folder
        Where on this machine; None: elsewhere.
    nbytes
        What was to be written.
    """
    if not is_refusal(error):
        return None
    free = "" if folder is None else _free(folder)
    if _is_full(error):
        remedy = f"Make room, raise the quota, or choose another place. {_STAYS}"
        return UnwritableStoreError(subject, f"{_words(error)}{free}", f"room for {nbytes:,} bytes", remedy)
    remedy = f"Give the process that writes the right to, or choose another place. {_STAYS}"
    return UnwritableStoreError(subject, f"{_words(error)}{free}", "a place that may be written", remedy)


def _is_full(error: BaseException) -> bool:
    return _name(error) in _FULL or _FULL_STATUS.search(str(error)) is not None


def _is_denied(error: BaseException) -> bool:
    return isinstance(error, PermissionError | PermissionDeniedError | UnauthenticatedError)


def _name(error: BaseException) -> str:
    """Return the name of an operating system's error (``ENOSPC``), or nothing."""
    number = _OF_SYSTEM.search(str(error))
    return errno.errorcode.get(int(number[1]), "") if number else ""


def _words(error: BaseException) -> str:
    name, code = _name(error), _CODE.search(str(error))
    if name:
        return f"{os.strerror(getattr(errno, name)).lower()} ({name})"
    words = "no room (507)" if _is_full(error) else "access denied (401 or 403)"
    return f"{words}, {code[1]}" if code else words


def _free(folder: str) -> str:
    """Say what is free where a folder is, or would be."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    usage = shutil.disk_usage(folder)
    return f"; {usage.free:,} of {usage.total:,} bytes are free at {folder}"
