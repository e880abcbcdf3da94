"""Checking a store without the model: sizes against commit records, or every byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gstds_cache.config import CHECK_LEVEL
from gstds_cache.errors import ChunkCorruptError, IntegrityError
from gstds_cache.files.location import Location, LocationLike
from gstds_cache.runtime.progress import Counted
from gstds_cache.store import layout
from gstds_cache.store.grown import read_metadata
from gstds_cache.store.hidden import read_hidden
from gstds_cache.store.metadata import Problem, StoreMetadata, corrupt

Level = Literal["quick", "full", "sample"]


@dataclass(frozen=True)
class VerifyReport:
    """What a check found.

    Attributes:
        location: The store.
        level: How deep it looked.
        shards: Shards in all.
        committed: Shards with a commit record that can be read.
        complete: Whether COMPLETE is there.
        bytes_hashed: Bytes of shard objects that were hashed.
        problems: Empty where all is well.
        sampled: Rows that were embedded again and compared.
        cosine_min: Smallest cosine between those and the stored ones; None where none were compared.
        hidden: Rows that selections leave out.
    """

    location: str
    level: Level
    shards: int
    committed: int
    complete: bool
    bytes_hashed: int
    problems: tuple[Problem, ...]
    sampled: tuple[int, ...] = ()
    cosine_min: float | None = None
    hidden: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"problems": [str(problem) for problem in self.problems]}

    @property
    def error(self) -> ChunkCorruptError | None:
        """The error that names the problems and the command that mends them; None where all is well."""
        return corrupt(Location.parse(self.location), self.problems) if self.problems else None

    @property
    def bad_shards(self) -> list[int]:
        """Shards that have to be done again."""
        return sorted({problem.shard for problem in self.problems if problem.shard is not None})


def verify(
    where: LocationLike | StoreMetadata,
    level: Literal["quick", "full"] = CHECK_LEVEL,
    *,
    progress: Counted | None = None,
) -> VerifyReport:
    """Check a store.

    Args:
        where: The store; or its metadata, which reads each commit record once.
        level: ``quick`` compares sizes with commit records and hashes the small objects; ``full`` hashes every object.
        progress: Called with shards hashed and shards in all.

    Returns:
        The report.

    Raises:
        StoreNotFoundError: There is no store at ``where``.
        IntegrityError: The specification cannot be read at all.
    """
    metadata = where if isinstance(where, StoreMetadata) else read_metadata(where)
    commits, problems = metadata.scan_commits()
    problems += metadata.check_hashes(commits, progress) if level == "full" else metadata.check_sizes(commits)
    try:
        record = metadata.complete()
    except ChunkCorruptError as error:
        record = None
        problems.append(Problem(layout.COMPLETE, error.message))
    named = {problem.shard for problem in problems}
    if record is not None:
        problems += [p for p in metadata.check_complete(record, commits) if p.shard is None or p.shard not in named]
    try:
        hidden = len(read_hidden(metadata.transport, metadata.spec.items))
    except IntegrityError as error:
        hidden = 0
        problems.append(Problem(layout.HIDDEN, str(error)))
    return VerifyReport(
        location=str(metadata.location),
        level=level,
        shards=metadata.spec.shards,
        committed=len(commits),
        complete=record is not None,
        bytes_hashed=sum(commit.size for commit in commits.values()) if level == "full" else 0,
        problems=tuple(problems),
        hidden=hidden,
    )
