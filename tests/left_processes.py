"""Processes of a server that tests start: all those which it started have a mark, and none of them may be left."""

from __future__ import annotations

import contextlib

import psutil

__all__ = ["MARK", "assert_none_left", "environment_of", "processes_of"]

MARK = "SERVER_OF_TESTS"
"""Environment variable that all processes of one server have."""


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Return the environment of a process: none, if it has ended meanwhile."""
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except psutil.Error:
        return {}


def processes_of(mark: str) -> list[psutil.Process]:
    """Return the processes that have a mark and run."""
    return [process for process in psutil.process_iter() if environment_of(process).get(MARK) == mark]


def assert_none_left(mark: str) -> None:
    """Look, after a server has ended, that its processes have ended or do so now; those that stay are killed."""
    _, left = psutil.wait_procs(processes_of(mark), timeout=60)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert not left, f"the server left {left}"
