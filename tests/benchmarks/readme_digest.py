"""Prints the digest of the store that a contender wrote in a process of its own: ``readme_digest.py JOB.json``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import readme_store
from contender import Prepared, leave
from jobs import ReadmeJob


def main() -> None:
    """Compare nothing here; tell what was written."""
    job = ReadmeJob.read(Path(sys.argv[1]))
    written = Prepared(Path, partial(readme_store.aligned, job), partial(readme_store.resampled, job))
    print(leave(job, written, Path(job.store)))


if __name__ == "__main__":
    main()
