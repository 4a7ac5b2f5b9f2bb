# SPDX-License-Identifier: Apache-2.0
"""Folders of GeoTIFFs that are chips already, our own exports and others' data sets, become Chips."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from rasteret_dask.chipping.chiptable import MASK
from rasteret_dask.chipset import Chips
from rasteret_dask.collection import Collection
from rasteret_dask.crs import number
from rasteret_dask.errors import PlanError, ReadError, SourceError, user_level
from rasteret_dask.ingest.chipfiles import ChipFolder, FolderChips, chip_files
from rasteret_dask.ingest.chipnames import ChipPattern
from rasteret_dask.ingest.exported import exported_chips, exported_layout
from rasteret_dask.ingest.filenames import Naming
from rasteret_dask.lists import listed
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.openers import as_collection
from rasteret_dask.planning.plan import (
    FILES,
    ChipSpec,
    CutChips,
    Harmonize,
    HarmonizeSpec,
    Join,
    Split,
    SplitSpec,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.scan import Table, token_of
from rasteret_dask.rules.kinds import KindName, checked_kinds
from rasteret_dask.table.assetkinds import check_kind_names, with_kinds
from rasteret_dask.table.records import Records
from rasteret_dask.words import OnBroken
from rasteret_dask.zones import FileGrid

__all__ = ["read_chips"]

IMAGE = "images"
"""What the source is called where there is one pattern."""

_WILD = re.compile(r"[*?\[]")


def read_chips(
    folder: str | os.PathLike[str],
    *,
    images: str | Mapping[str, str] | None = None,
    masks: str | Mapping[str, str] | None = None,
    split: str | Mapping[str, str | os.PathLike[str] | Sequence[str]] | None = "folders",
    table: Any = None,
    bands: Sequence[str] | Mapping[str, Any] | None = None,
    classes: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    join: Mapping[str, Collection] | None = None,
    dataset: str | None = None,
    kinds: Mapping[str, KindName] | None = None,
    date_format: str = "%Y%m%d",
    crs: Any = None,
    on_error: OnBroken = "raise",
) -> Chips:
    r"""Read a folder of GeoTIFFs that are chips already: one file, one chip, pixel by pixel as it is.

    What :meth:`Chips.to_geotiff` wrote needs no other argument: sources, bands, times, masks, splits and label columns
    come back. Of another data set, patterns tell which files are images and masks. Chips keep the splits that
    they have: :meth:`Chips.audit` tells whether these share ground. Nothing is resampled: a chip's window is
    its file, in the file's own CRS (UTM south as its northern twin). Degrees, and files in many zones, are taken.

    Parameters
    ----------
    folder
        A path or URL of a folder; or a pattern such as ``"data/*_image.tif"``: the folder and ``images`` in one.
    images
        Which files below the folder are images: a pattern of paths, where ``*`` stands for any text and ``**`` for
        folders at any depth. The texts that wildcards stand for name the chip. Or a regular expression with groups:
        ``(?P<chip>...)`` names the chip, ``date`` its time, ``split`` its split. Several sources by name:
        ``{"s2": "s2/*.tif", "s1": "s1/*.tif"}``, the first of which is the reference. None: all files that are no mask.
    masks
        Likewise which files are masks: one band of classes, as large as the image and at its place. They become
        ``mask``, with their numbers as they are; several by name become ``mask_<name>``.
    split
        ``"folders"``: the column ``split`` of ``table``, else folders called train, val, test and the like, else the
        group ``split``; no splits where there are none. The name of another column of ``table``. Names of
        chips, or text files with a name a line, by split: ``{"train": "train.txt", "val": ["a", "b"]}``; chips in no
        list have no split. None: no splits.
    table
        What else is known of chips: a CSV or Parquet file (also below the folder), a DataFrame, anything of Arrow's.
        A column ``chip`` (or ``name``, ``id``, ``filename``, ...) names them; ``datetime`` or ``date`` tells
        when they were taken; further columns become label columns.
    bands
        Names of the bands of each file, in order, or ``{name: position from 0}``. Of several sources, a mapping from
        source to these. None: as the files describe them, else ``band_1``, ...
    classes
        What the mask's numbers 0, 1, 2, ... are called, from 0 on. Of several masks, a mapping from mask to these.
    join
        Further collections, read onto the chips' pixels: by ground, and the acquisition that is nearest in time (or
        their own slots). They are resampled where their pixels lie otherwise. ``harmonize(resolution=)`` gives
        them other pixels.
    dataset
        Name of a known dataset, for scale, kinds and masks of bands.
    kinds
        What bands are: ``{"landuse": "class"}``; see :meth:`Collection.harmonize`.
    date_format
        How the group ``date`` is written.
    crs
        The CRS of files that have none. What a file states is never replaced.
    on_error
        ``"raise"``: every image has its mask, all files can be read and have one size, all names are chips'. ``"skip"``
        leaves out what does not, with one warning that counts and names it.

    Raises
    ------
    SourceError
        When there are no files, one lacks, two are one chip's, sizes differ, or a file has no place on the ground.
    PlanError
        When an argument makes no sense.

    Notes
    -----
    Without times, chips hold at any time, as elevation does. Rasters of other sizes than the chips are no chips:
    :func:`build_from_files` takes them, and ``chips(size)`` cuts them.

    Examples
    --------
    >>> report = chips.to_geotiff("tifs", progress=False)
    >>> back = rd.read_chips("tifs")  # sources, times, splits and all
    >>> len(back) == report.kept, back.audit().ok
    (True, True)
    >>> train = rd.read_chips("tifs", images="train/*.tif", split=None)  # as files of anybody
    >>> len(train) == len(back.select("train"))
    True
    """
    place, pattern = _divided(os.fspath(folder))
    if pattern is not None:
        if images is not None:
            raise PlanError(
                f"read_chips({os.fspath(folder)!r}, images={images!r})", "two patterns", "a folder and a pattern",
                f"Say read_chips({place!r}, images=...).",
            )  # fmt: skip
        images = pattern
    named = checked_kinds(kinds, "read_chips(kinds=)")
    layout = exported_layout(place) if images is None and masks is None else None
    if layout is not None:
        files = exported_chips(place, layout)
    else:
        sources = _patterns(images, masks)
        how = ChipFolder(
            sources,
            _mask_patterns(masks),
            split,
            table,
            _bands(bands, list(sources)),
            _class_names(classes, masks),
            dataset,
            Naming.of(None, date_format, None),
            None if crs is None else number(crs),
            _skips(on_error),
        )
        try:
            files = chip_files(place, how)
        except SourceError:
            _refuse_tars(place)
            raise
    if files.left_out:
        warnings.warn(_note(files), UserWarning, stacklevel=user_level())
    records = {name: with_kinds(own, named) for name, own in files.sources.items()}
    check_kind_names(list(records.values()), named, "read_chips(kinds=)")
    return _chips(replace(files, sources=records), join or {})


def _refuse_tars(folder: str) -> None:
    """Raise SourceError where a folder is one of tars: why it has no file that is a chip."""
    from rasteret_dask.exports.webdataset import DATASET, TO_WEBDATASET

    try:
        root = json.loads(remote.get(remote.join(folder, DATASET)))
        writer = root["rasteret_dask"]["writer"]
    except (FileNotFoundError, ReadError, ValueError, KeyError, TypeError):
        return
    if writer == TO_WEBDATASET:
        raise SourceError(
            f"read_chips({remote.redact(folder)!r})", "tars that to_webdataset wrote", "a folder of GeoTIFFs",
            "The library webdataset reads tars; for read_chips, write the chips with to_geotiff.",
        )  # fmt: skip


def _divided(text: str) -> tuple[str, str | None]:
    """Return the folder of a path, and the pattern below it, if there is one."""
    wild = _WILD.search(text)
    if wild is None:
        return Place.of(text).url, None
    head, slash, _ = text[: wild.start()].rpartition("/")
    return Place.of(head or ".").url, text[len(head) + len(slash) :]


def _patterns(images: Any, masks: Any) -> dict[str, ChipPattern]:
    if images is None:
        if masks is not None:
            raise PlanError(
                f"read_chips(masks={masks!r})", "no images=", "which files are the images that masks belong to",
                "Say both: images='*_image.tif', masks='*_mask.tif'.",
            )  # fmt: skip
        images = "**/*.*"
    own = images if isinstance(images, Mapping) else {IMAGE: images}
    if not own:
        raise PlanError("read_chips(images=)", "an empty mapping", "a pattern, or one for each source")
    return {str(name): ChipPattern.of(text, "images") for name, text in own.items()}


def _mask_patterns(masks: Any) -> dict[str, ChipPattern]:
    if masks is None:
        return {}
    if not isinstance(masks, Mapping):
        return {MASK: ChipPattern.of(masks, "masks")}
    return {f"{MASK}_{name}": ChipPattern.of(text, "masks") for name, text in masks.items()}


def _bands(bands: Any, sources: Sequence[str]) -> dict[str, Any]:
    """Return the bands of each source."""
    if bands is None:
        return {}
    by_source = isinstance(bands, Mapping) and all(name in sources for name in bands)
    each = dict(bands) if by_source else dict.fromkeys(sources, bands)
    return {
        name: dict(own) if isinstance(own, Mapping) else (own,) if isinstance(own, str) else tuple(own)
        for name, own in each.items()
    }


def _class_names(classes: Any, masks: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return for each mask what its numbers from 1 on are called."""
    if classes is None:
        return ()
    if masks is None:
        raise PlanError(
            "read_chips(classes=)", "no masks=", "the masks that have these classes", "Say masks= too."
        )
    several = isinstance(masks, Mapping)
    if several != isinstance(classes, Mapping) or (several and not set(classes) <= set(masks)):
        raise PlanError(
            "read_chips(classes=)", repr(classes), "names of classes for each of several masks, by its name"
            if several else "names of the numbers 0, 1, 2, ..., in order",
            f"Say classes={{{next(iter(masks))!r}: ['background', 'water']}}." if several
            else "Say classes=['background', 'water'].",
        )  # fmt: skip
    own = {f"{MASK}_{name}": names for name, names in classes.items()} if several else {MASK: classes}
    return tuple((name, tuple(map(str, names))[1:]) for name, names in own.items())


def _skips(on_error: str) -> bool:
    if on_error not in ("skip", "raise"):
        raise PlanError("on_error", repr(on_error), "'skip' or 'raise'")
    return on_error == "skip"


def _note(files: FolderChips) -> str:
    parts = [f"{why}: {len(names)} ({listed(names)})" for why, names in files.left_out.items()]
    return f"read_chips leaves out {'; '.join(parts)}"


def _as_stored(source: Collection, records: pa.Table, slotted: bool) -> Collection:
    """Return a source with all of its bands, quality bands too, and its numbers as they are in the files."""
    spec = HarmonizeSpec(bands=tuple(Records(records).bands), time=FILES if slotted else None)
    return Collection(source.query.then(Harmonize(source.plan, spec)))


def _joined(sources: Mapping[str, Collection], optional: frozenset[str]) -> Collection:
    """Return sources side by side, some of which chips may lack."""
    for name, own in sources.items():
        if not isinstance(own, Collection) or isinstance(own.plan, Join):
            raise PlanError(
                f"read_chips(join=), {name!r}", f"a {type(own).__name__}", "a collection that is no join",
                "Name each source of it in join=.",
            )  # fmt: skip
    required = tuple(name for name in sources if name not in optional)
    plan = Join(tuple(sources), tuple(own.plan for own in sources.values()), required)
    return Collection(Query.together(plan, [own.query for own in sources.values()]))


def _chips(files: FolderChips, others: Mapping[str, Collection]) -> Chips:
    """Return the plan whose windows are files."""
    both = sorted(set(files.sources) & set(others))
    if both:
        raise PlanError(
            f"read_chips(join=), {both[0]!r}", "a source of that name among the files", "another name",
            f"Say join={{'{both[0]}_2': ...}}.",
        )  # fmt: skip
    sources = {name: as_collection(records, name=name) for name, records in files.sources.items()}
    sources = {
        name: _as_stored(own, files.sources[name], name in files.slots) for name, own in sources.items()
    }
    everything = {**sources, **others}
    whole = _joined(everything, files.optional) if len(everything) > 1 else next(iter(sources.values()))
    tables: dict[str, Table] = {token_of(files.facts): files.facts}
    if files.masks is not None:
        tables[token_of(files.masks)] = files.masks
    spec = ChipSpec(
        size=files.size,
        stride=files.size,
        grid=FileGrid(),
        reference=next(iter(sources)),
        at=token_of(files.facts),
        labels=None if files.masks is None else token_of(files.masks),
        classes=files.classes,
        context_m=files.context_m,
    )
    query = whole.query.then(CutChips(whole.plan, spec), tables)
    if "split" in files.facts.column_names:
        query = query.then(Split(query.plan, SplitSpec((), by="split")))
    return Chips(query)
