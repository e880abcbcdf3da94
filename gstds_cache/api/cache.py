"""Functions for stores as a whole: list, describe, verify and remove them.

Nothing here loads torch but ``verify_store(level="sample")``: ``gstds-cache ls`` has to answer at once.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gstds_cache.config import CHECK_LEVEL, DEVICE, SAMPLE_ROWS, SAMPLE_SEED, as_type
from gstds_cache.errors import GstdsError, UsageError
from gstds_cache.files.derived import cache_root, existing_derived
from gstds_cache.files.location import Location, LocationLike, local_file
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.store.describe import StoreSummary, summarise
from gstds_cache.store.remove import remove_store as remove_objects
from gstds_cache.store.verify import Level, VerifyReport, verify


@dataclass(frozen=True)
class StoreList:
    """The stores in a folder.

    Attributes:
        folder: The folder.
        stores: Those that can be read, by name.
        damaged: Names of the others, and what is wrong with each.
    """

    folder: Path
    stores: tuple[StoreSummary, ...]
    damaged: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return {
            "root": str(self.folder),
            "stores": [store.to_dict() for store in self.stores],
            "damaged": self.damaged,
        }


@dataclass(frozen=True)
class RemoveReport:
    """What was removed.

    Attributes:
        store: Where the store was.
        objects: How many objects it had.
        derived: What was derived from it, and removed with it: selections, guidance, a mirror, the record of its cost.
        remaining: Why what could not be removed is still there, one sentence each.
    """

    store: str
    objects: int
    derived: tuple[Path, ...]
    remaining: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"derived": list(map(str, self.derived))}


def list_stores(folder: str | Path | None = None) -> StoreList:
    """List the stores in a folder.

    Args:
        folder: The folder; None is the default place for stores, which need not exist.

    Returns:
        The stores; those that cannot be read with what is wrong with them.

    Raises:
        UsageError: There is no such folder.
    """
    path = cache_root() if folder is None else local_file(folder, "`folder`")
    if folder is not None and not path.is_dir():
        raise UsageError(f"no folder at {path}", hint="leave `folder` out for the default place")
    stores: list[StoreSummary] = []
    damaged: dict[str, str] = {}
    for entry in sorted(path.iterdir()) if path.is_dir() else []:
        if (entry / "zarr.json").is_file():
            try:
                stores.append(summarise(entry))
            except GstdsError as error:
                damaged[entry.name] = str(error)
    return StoreList(path, tuple(stores), damaged)


def describe_store(store: LocationLike) -> StoreSummary:
    """What a store holds and how it was made, complete or not, without reading embeddings.

    Args:
        store: Its location: a directory, or ``s3://BUCKET/PREFIX``.

    Returns:
        The summary.

    Raises:
        StoreNotFoundError: There is none.
        IntegrityError: Its specification or a commit record is damaged.
    """
    return summarise(Location.parse(store, "`store`"))


def list_derived(store: LocationLike) -> list[Path]:
    """What was derived from a store: selections, guidance, a mirror, the record of its cost, as far as it exists.

    Args:
        store: Its location.

    Returns:
        Folders and files, which :func:`remove_store` removes.
    """
    return existing_derived(Location.parse(store, "`store`"))


def verify_store(
    store: LocationLike,
    *,
    level: Level = CHECK_LEVEL,
    rows: int = SAMPLE_ROWS,
    seed: int = SAMPLE_SEED,
    dataset: Any = None,
    model: str | None = None,
    device: str = DEVICE,
    progress: Progress | bool | None = True,
) -> VerifyReport:
    """Check a store.

    Args:
        store: Its location: a directory, or ``s3://BUCKET/PREFIX``.
        level: ``quick`` compares sizes with the commit records and hashes the small objects; ``full`` hashes every
            byte; ``sample`` is ``quick``, and embeds some rows again and compares them, where nothing else is wrong.
        rows: Rows that ``sample`` compares.
        seed: Which rows these are.
        dataset: Where the data set is now, for ``sample``; None is where it was when the store was made.
        model: Where the model is now, for ``sample``; None is where it was when the store was made.
        device: Where the model runs.
        progress: As for :func:`gstds_cache.embed`; counts shards.

    Returns:
        What was found. A problem is a part of the report, not an exception.

    Raises:
        UsageError: An argument cannot be meant, or the store does not say where its data set or model is.
        StoreNotFoundError: There is no store.
        FingerprintMismatchError: The data set or the model is not the store's.
        IntegrityError: The specification cannot be read at all.
    """
    level, model, device = (
        as_type("level", level, Level),
        as_type("model", model, str | None),
        as_type("device", device, str),
    )
    rows, seed = as_type("rows", rows, int), as_type("seed", seed, int)
    for name, number, least in (("rows", rows, 1), ("seed", seed, 0)):
        if number < least:
            raise UsageError(f"`{name}`: got {number}, expected {least} or more")
    with showing(progress, "shards") as show:
        report = verify(
            store, "full" if level == "full" else "quick", progress=lambda done, total: show("check", done, total, {})
        )
    if level != "sample" or report.problems:
        return replace(report, level=level)
    from gstds_cache.api.repair import compare_sample

    sample = compare_sample(store, rows=rows, seed=seed, dataset=dataset, model=model, device=device)
    return replace(report, level=level, problems=sample.problems, sampled=sample.rows, cosine_min=sample.cosine_min)


def remove_store(store: LocationLike) -> RemoveReport:
    """Remove a store and what was derived from it: selections, guidance, its mirror, the record of its cost.

    Files in its directory that are not its own stay.

    Args:
        store: Its location: a directory, or ``s3://BUCKET/PREFIX``.

    Returns:
        What was removed, and what could not be.

    Raises:
        StoreNotFoundError: There is no store; nothing was removed.
        UsageError: It is a link to one; nothing was removed.
        IncompleteError: Another process is writing it.
    """
    location = Location.parse(store, "`store`")
    derived = existing_derived(location)
    objects = remove_objects(location)
    remaining = [why for path in derived if (why := _remove(path))]
    return RemoveReport(str(location), objects, tuple(derived), tuple(remaining))


def _remove(path: Path) -> str:
    """Remove a folder or file; returns why it is still there, empty where it is not."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        # A folder that this user cannot even look into holds nothing of theirs.
        return f"not removed: {path}: {error.strerror or error}" if os.path.lexists(path) else ""
    return ""
