# SPDX-License-Identifier: Apache-2.0
"""What lies in the folder of a saved plan: its job, and what a store, a map or a table says of it beside."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
from rasteret_dask.chipping.frame import frame_of, outline_wkb
from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.net.sums import crc32_of, document_of, sealed
from rasteret_dask.prediction.modelchips import ChipGround
from rasteret_dask.store.law import Law
from rasteret_dask.store.layout import Layout
from rasteret_dask.store.provenance import Provenance
from rasteret_dask.tasks.job import Job
from rasteret_dask.tasks.jobfile import JOB_FILE, job_objects, open_job, read_note, write_job

__all__ = ["PlanFiles", "save_plan"]

SIZES = "sizes.json"
"""Kept chips of each shard, where rules on pixels drop some."""

GROUND, PROVENANCE, LAW, RECIPE = "ground.json", "provenance.json", "law.json", "recipe.toml"
"""What a map asks of a plan beside its job; what a store does."""


@dataclass(frozen=True)
class PlanFiles:
    """A saved plan; what lies beside its job is read once it is asked for."""

    url: str
    job: Job
    """Without the outlines of chips, which batches do not need."""

    @classmethod
    def at(cls, url: str) -> PlanFiles:
        """Open a saved plan.

        Raises
        ------
        StoreError
            When there is none, or it is damaged.
        FormatError
            When it was written in a format that this version does not read.
        """
        try:
            note = read_note(url)
        except remote.MissingError:
            raise StoreError(
                f"plan {remote.redact(url)}", f"no {JOB_FILE}", "what save_plan writes",
                "chips.save_plan(path) saves a plan; rd.open_chips(path) opens a store.",
            ) from None  # fmt: skip
        return cls(url, open_job(url, str(note["digest"])))

    @cached_property
    def with_outlines(self) -> Job:
        """The job, with the outlines of chips."""
        outlines = outline_wkb(frame_of(self.job.chips))
        table = self.job.chips.append_column(CHIP_SCHEMA.field("geometry"), outlines)
        of_chips = [name for name in CHIP_SCHEMA.names if name in table.column_names]
        own = [name for name in table.column_names if name not in of_chips]
        return replace(self.job, chips=table.select([*of_chips, *own]))

    @cached_property
    def ground(self) -> ChipGround:
        """On which maps chips lie, and when their slots begin and end."""
        return ChipGround.of(self._of_plan(GROUND))

    @cached_property
    def provenance(self) -> Provenance:
        """Where chips come from."""
        return Provenance.of(self._document(PROVENANCE))

    @cached_property
    def law(self) -> Law:
        """What every part that is appended to a store of these chips must share with it."""
        return Law.of(self._document(LAW))

    @cached_property
    def recipe(self) -> str | None:
        """The text of the recipe that was run, where one was."""
        try:
            return remote.get(remote.join(self.url, RECIPE)).decode()
        except remote.MissingError:
            return None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many chips of each shard are kept, where the job has rules on pixels."""
        return tuple(self._of_plan(SIZES)["sizes"])

    def _of_plan(self, name: str) -> dict[str, Any]:
        document = self._document(name)
        if document["digest"] != self.job.digest:
            raise self._lacking(f"a {name} of another plan")
        return document

    def _document(self, name: str) -> dict[str, Any]:
        try:
            document = document_of(remote.get(remote.join(self.url, name)))
        except remote.MissingError:
            raise self._lacking(f"no {name} beside it") from None
        if document is None:
            raise self._lacking(f"a {name} that does not match its checksum")
        return document

    def _lacking(self, what: str) -> StoreError:
        return StoreError(
            f"plan {remote.redact(self.url)}", what, "what save_plan writes",
            "Save the plan again, in the same place: chips.save_plan(path).",
        )  # fmt: skip


def save_plan(
    layout: Layout, ground: ChipGround, place: str | os.PathLike[str], sizes: tuple[int, ...] | None = None
) -> None:
    """Write a plan, JSON and Arrow tables, to a new folder; of a plan that is there, or half there, what is missing.

    Parameters
    ----------
    layout
        The job, and what a store of it would say.
    ground
        What of the plan its job does not say.
    place
        A folder of its own: a local path or a URL.
    sizes
        Kept chips of each shard, where the job has rules on pixels.

    Raises
    ------
    StoreError
        When something else lies there.
    """
    folder, job = Place.of(place), layout.job
    url = folder.url
    names = set() if folder.is_file else set(remote.listing(url))
    note = read_note(url) if JOB_FILE in names else {}
    documents = {
        GROUND: sealed({"digest": job.digest, **ground.to_json()}),
        PROVENANCE: layout.provenance.to_bytes(),
        LAW: layout.law.to_bytes(),
    }
    if sizes is not None:
        documents[SIZES] = sealed({"digest": job.digest, "sizes": list(sizes)})
    if layout.recipe is not None:
        documents[RECIPE] = layout.recipe.encode()
    is_there = note.get("digest") == job.digest
    # a save that was killed leaves some of these, and no job's JSON, which comes last
    is_left = bool(names) and not note and names <= {*documents, *job_objects(job)}
    if folder.is_file or (names and not is_there and not is_left):
        raise StoreError(
            f"save_plan {remote.redact(url)}", "another plan" if note else "something else", "an empty place",
            "Choose another place, or delete what lies there.",
        )  # fmt: skip
    for name, data in documents.items():
        if not (is_there and name in names and _is_sound(url, name)):
            remote.put(remote.join(url, name), data)
    if not (note and all(_is_whole(url, name, sums, names) for name, sums in note["tables"].items())):
        write_job(job, url)


def _is_sound(url: str, name: str) -> bool:
    """Tell whether a document of a saved plan is undamaged; a recipe is text as it was, and says of no checksum."""
    return name == RECIPE or document_of(remote.get(remote.join(url, name))) is not None


def _is_whole(url: str, name: str, sums: list[int], names: set[str]) -> bool:
    """Tell whether a table of a saved plan is what was written."""
    data = remote.get(remote.join(url, name)) if name in names else b""
    return sums == [len(data), crc32_of(data)]
