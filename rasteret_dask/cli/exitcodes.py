# SPDX-License-Identifier: Apache-2.0
"""What the process ends with, and the message that an error becomes."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from rasteret_dask.errors import (
    BandError,
    GridError,
    IncompleteError,
    PlanError,
    RasteretDaskError,
    ReadError,
    RecipeError,
    StoreError,
)

__all__ = ["AGAIN", "ExitCode", "Failure", "failure_of", "told_as_bug"]


class ExitCode(IntEnum):
    """What the process ends with: scripts and queues decide by it whether to run the same command again."""

    DONE = 0
    """All that was asked for is done, or was done before."""
    FAILED = 1
    """Something failed; the message says what and how to mend it."""
    USAGE = 2
    """The command line or the recipe makes no sense; nothing was begun."""
    INCOMPLETE = 3
    """Stopped before the end, on purpose: run the same command again."""
    UNVERIFIED = 4
    """A store is not what was written, or not finished."""
    INTERRUPTED = 130
    """By Ctrl-C: what was written stays, run the same command again."""
    TERMINATED = 143
    """By SIGTERM, as queues and Kubernetes send it: the same."""


AGAIN = "What was written stays: run the same command again to go on."
"""What to do after a command was stopped, or failed for a reason that passes."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error, as the command line tells it."""

    code: ExitCode
    message: str
    """What was done, what was found, and what to do."""


_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_FILES = (errno.EMFILE, errno.ENFILE)


def failure_of(error: BaseException) -> Failure | None:
    """Return what to tell of an error and which code to end with; None where it is a bug.

    Parameters
    ----------
    error
        What a command raised: an error of this package, of the operating system, of the network or of Dask's cluster.

    Examples
    --------
    >>> failure_of(PermissionError(13, "Permission denied", "out.zarr")).code
    <ExitCode.FAILED: 1>
    >>> failure_of(KeyError("x")) is None
    True
    """
    if isinstance(error, KeyboardInterrupt):
        return Failure(ExitCode.INTERRUPTED, f"stopped by Ctrl-C. {AGAIN}")
    if isinstance(error, SystemExit) and error.code == ExitCode.TERMINATED:
        return Failure(ExitCode.TERMINATED, f"stopped by SIGTERM. {AGAIN}")
    if isinstance(error, RasteretDaskError):
        return Failure(_code_of(error), str(error))
    if isinstance(error, MemoryError):
        return Failure(
            ExitCode.FAILED,
            f"memory: found none left{_detail(error)}. Use a machine with more, fewer threads "
            f"(DASK_NUM_WORKERS=1), or a cluster whose workers have a memory limit. {AGAIN}",
        )
    if isinstance(error, OSError):
        return Failure(ExitCode.FAILED, _of_system(error))
    if _is_of_cluster(error):
        return Failure(
            ExitCode.FAILED,
            f"the Dask cluster: found {type(error).__name__}{_detail(error)}; expected workers that stay. Look at the "
            f"logs and the memory of its workers. {AGAIN}",
        )
    return None


def _code_of(error: RasteretDaskError) -> ExitCode:
    if isinstance(error, IncompleteError):
        return ExitCode.INCOMPLETE
    if isinstance(error, RecipeError) and _failed_outside(error.__cause__):
        return ExitCode.FAILED
    return ExitCode.USAGE if isinstance(error, _SENSELESS) else ExitCode.FAILED


_SENSELESS = (RecipeError, PlanError, BandError, GridError)
"""What was asked for makes no sense, which is told before anything is begun."""


def _failed_outside(error: BaseException | None) -> bool:
    """Tell whether a table of a recipe was right, and a file, a server or a disk failed while it was carried out."""
    if not isinstance(error, RasteretDaskError):
        return False
    while error is not None:
        if isinstance(error, ReadError | StoreError | OSError):
            return True
        error = error.__cause__
    return False


def _of_system(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        subject, remedy = (
            "waiting for an answer",
            f"Check that the address is right and can be reached. {AGAIN}",
        )
    elif isinstance(error, ConnectionError) or _is_of_cluster(error):
        subject, remedy = "a connection", f"Check that the other side runs and can be reached. {AGAIN}"
    elif error.errno in _ROOM:
        subject, remedy = "writing", f"Make room. {AGAIN}"
    elif error.errno in _FORBIDDEN:
        subject, remedy = "opening", "Choose another place, or change who may read and write this one."
    elif error.errno in _ABSENT:
        subject, remedy = "opening", "Check the path."
    elif error.errno in _FILES:
        subject, remedy = "opening", f"Raise the limit of open files: ulimit -n 4096. {AGAIN}"
    else:
        subject, remedy = "the operating system", AGAIN
    place = f" {error.filename}" if error.filename else ""
    text = error.strerror or str(error) or type(error).__name__
    return f"{subject}{place}: found {text[:1].lower()}{text[1:]}. {remedy}"


def _is_of_cluster(error: BaseException) -> bool:
    """Tell whether an error is one of distributed's classes, without importing it."""
    return any(kind.__module__.partition(".")[0] == "distributed" for kind in type(error).__mro__)


def _detail(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f" ({text[:300]})" if text else ""


def told_as_bug(error: BaseException) -> Iterator[str]:
    """Yield the lines that say that an error is a bug."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].name}, line {frames[-1].lineno}" if frames else ""
    yield (
        f"found {type(error).__name__}{_detail(error)}{place}; this is a bug of rasteret_dask. The same command "
        "with --debug shows where it comes from: please report it with that text."
    )
