# SPDX-License-Identifier: Apache-2.0
"""Refusals that last: a full disk, a quota, a place that must not be written, keys that have expired."""

from __future__ import annotations

import errno
import os
import re
import shutil

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from rasteret_dask.errors import CredentialsError, UnwritableStoreError

__all__ = ["FIND_BUCKET", "is_refusal", "keys_refusal", "lacks_bucket", "refusal"]

_FULL = {"ENOSPC", "EDQUOT", "EFBIG"}
_FORBIDDEN = {"EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP"}

_OF_SYSTEM = re.compile(r"\(os error (\d+)\)")
"""How obstore's texts end that pass an error of the operating system on: all that it tells of them."""

_FULL_STATUS = re.compile(r"status code: 507")  # Insufficient Storage, as MinIO and WebDAV say

_CODE = re.compile(r"<Code>(\w+)</Code>")
"""The reason in an S3 answer: ``QuotaExceeded``, say."""

_EXPIRED = re.compile(
    r"<Code>(ExpiredToken|ExpiredTokenException|TokenRefreshRequired)</Code>"
    # Azure's details of a token, and of a shared access signature
    r"|Lifetime validation failed|Signature not valid in the specified time frame"
)
"""S3 answers such a request with status 400, which says nothing."""

_UNACCEPTED = re.compile(r"<Code>(InvalidAccessKeyId|InvalidToken|SignatureDoesNotMatch)</Code>")

_NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>|The specified bucket does not exist")
"""As S3, Azure and Google say it."""

FIND_BUCKET = "Make it, or correct its name, the region or the endpoint (AWS_REGION, AWS_ENDPOINT_URL)."

_STAYS = "What is written stays, and a rerun does the rest."


def is_refusal(error: BaseException) -> bool:
    """Tell whether a store refuses for good: no room, no permission, read-only, or no such place."""
    return (
        _is_full(error)
        or _name(error) in _FORBIDDEN
        or _is_denied(error)
        or lacks_bucket(error)
        or keys_refusal("", error) is not None
    )


def lacks_bucket(error: BaseException) -> bool:
    """Tell whether there is no bucket, rather than no object in it."""
    return _NO_BUCKET.search(str(error)) is not None


def keys_refusal(subject: str, error: BaseException) -> CredentialsError | None:
    """Return the error that says that a store refuses the keys of this process, or None where it refuses otherwise.

    Parameters
    ----------
    subject
        What was being read or written, fit for messages.
    error
        What obstore raised.
    """
    expired, unaccepted = _EXPIRED.search(str(error)), _UNACCEPTED.search(str(error))
    match = expired or unaccepted
    if match is None:
        return None
    code = f" ({match[1]})" if match[1] else ""
    return CredentialsError(
        subject,
        f"keys that have expired{code}" if expired else f"keys that the store does not accept{code}",
        "keys that the store accepts",
        "Start this process and every worker anew with fresh ones, then run the same again: what is written stays.",
    )


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
    refused = keys_refusal(subject, error)
    if refused is not None:
        return refused
    if lacks_bucket(error):
        return UnwritableStoreError(subject, "no such bucket (404)", "one that is there", FIND_BUCKET)
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
