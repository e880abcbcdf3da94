"""Stores that rows were appended to: what they were before is untouched, and one record makes the new rows count.

The K-th append writes a store of its own, ``parts/K-F/`` (F: the first digits of its fingerprint), and then, in one
step, ``grown/K.json``. A reader takes the records 1, 2, ... that are there: what was written and has no record is as if
it were not there. No object that was there before is replaced or deleted, so the store can be opened as it was before.

A part begins with the first row of a shard. Where the store's last shard was not full, its rows are copied into the
part's first one; what they were in the store is then no longer read. So every shard of the whole is one object, and the
whole has the rows, and the fingerprint, of a store of all its items that was made at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from jaxtyping import Int

from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.errors import IntegrityError, StoreNotFoundError, command_line
from gstds_cache.files import mapped
from gstds_cache.files.digest import canonical_json, digest_of
from gstds_cache.files.location import LocationLike
from gstds_cache.runtime.progress import Counted
from gstds_cache.store import layout
from gstds_cache.store.commit_record import CommitRecord, commits_root, counts_of
from gstds_cache.store.metadata import Complete, Problem, StoreMetadata, corrupt
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.transport import Transport


@dataclass(frozen=True)
class Growth:
    """The record of one append.

    Attributes:
        number: Which append, from 1.
        part: Name of the part's folder.
        first_row: Row of the whole that the part's first row is; the first of a shard.
        part_fingerprint: The part's.
        items: Rows of the whole, with this part.
        items_root: Merkle root of all its items.
        fingerprint: Of the whole.
        before: Fingerprint of the whole without this part.
        classes: Class names by label.
        dataset: Where the data set was, if it has all items of the whole in order; else empty.
    """

    number: int
    part: str
    first_row: int
    part_fingerprint: str
    items: int
    items_root: str
    fingerprint: str
    before: str
    classes: list[str]
    dataset: str

    @property
    def key(self) -> str:
        """Key of the record."""
        return growth_key(self.number)

    def to_bytes(self) -> bytes:
        """Canonical JSON of the fields and ``sha256``, the hash of that of the fields; and a line end."""
        fields = asdict(self)
        return canonical_json(fields | {"sha256": digest_of(fields)}) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Growth:
        """Parse what :meth:`to_bytes` gave.

        Raises:
            ValueError: It is something else.
        """
        try:
            fields = json.loads(data)
            told = fields.pop("sha256")
            record = cls(**fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if told != digest_of(fields):
            raise ValueError("its own hash is another")
        return record


def growth_key(number: int) -> str:
    """Key of the record of an append."""
    return f"{layout.GROWN}/{number}.json"


def read_metadata(
    where: LocationLike, *, state: str | None = None, transport: Transport | None = None
) -> StoreMetadata:
    """What a store says of itself, with the rows that were appended to it.

    Args:
        where: The store.
        state: The fingerprint that it had before rows were appended, to read it as it was then; None, or one that it
            never had, for as it is.
        transport: Its objects, where they are open already.

    Returns:
        Its metadata.

    Raises:
        StoreNotFoundError: There is no store.
        IntegrityError: The specification, or a record of an append, is damaged.
    """
    base = StoreMetadata(where, transport=transport)
    listed = base.transport.sizes(f"{layout.GROWN}/")
    records: list[Growth] = []
    while growth_key(len(records) + 1) in listed and state != _fingerprint(base, records):
        records.append(_read_record(base, len(records) + 1, _fingerprint(base, records)))
    return GrownMetadata(base, records) if records else base


def _read_record(base: StoreMetadata, number: int, before: str) -> Growth:
    """The record of an append.

    Raises:
        IntegrityError: It is damaged, or of another store.
    """
    problem = "it belongs to another store"
    try:
        record = Growth.from_bytes(base.transport.get(growth_key(number)))
    except ValueError as error:
        problem = str(error)
    else:
        if (record.number, record.before) == (number, before):
            return record
    raise IntegrityError(
        f"{base.location}/{growth_key(number)} is damaged: {problem}",
        hint="it makes appended rows count: delete it and append the same data set again, which takes over the rows "
        "that are there",
    )


def _fingerprint(base: StoreMetadata, records: list[Growth]) -> str:
    return records[-1].fingerprint if records else base.spec.fingerprint


class GrownMetadata(StoreMetadata):
    """The metadata of a store that rows were appended to, as if it had been made at once.

    Attributes:
        base: The store as it was first.
        records: The appends, in order.
        parts: The first shard of each store that it is made of, its key below the whole, and its metadata.
    """

    def __init__(self, base: StoreMetadata, records: list[Growth]) -> None:
        self.base, self.records = base, records
        self.location, self.transport = base.location, base.transport
        self._commits = {}
        last = records[-1]
        self.kind, self.classes = base.kind, tuple(last.classes)
        self.spec: CacheSpec = replace(base.spec, items=last.items, items_root=last.items_root)
        self.provenance: dict[str, Any] = dict(base.provenance)
        self.provenance.pop("dataset", None)
        if last.dataset:
            self.provenance["dataset"] = last.dataset
        self.parts = [(0, "", base)]
        for record in records:
            where = base.location.below(layout.PARTS, record.part)
            try:
                part = StoreMetadata(where)
            except StoreNotFoundError as error:
                raise _wrong_part(base, record) from error
            if part.spec.fingerprint != record.part_fingerprint or record.first_row % base.spec.shard_rows:
                raise _wrong_part(base, record)
            self.parts.append((record.first_row // base.spec.shard_rows, f"{layout.PARTS}/{record.part}/", part))
        if self.spec.fingerprint != last.fingerprint:
            raise _wrong_part(base, last)

    @property
    def finish_command(self) -> str:
        """The command that makes it whole: it was, before rows were appended."""
        return command_line("gstds-cache", "repair", self.location)

    def part_of(self, shard: int) -> tuple[int, str, StoreMetadata]:
        """The part that a shard is read from: the last that has it."""
        return next(part for part in reversed(self.parts) if part[0] <= shard)

    def object_key(self, shard: int) -> str:
        """Key of a shard's object."""
        first, prefix, _ = self.part_of(shard)
        return prefix + layout.object_key(shard - first)

    def object_sizes(self) -> dict[str, int]:
        """Bytes of every shard's object that is there, and of what else is in the parts."""
        return self.transport.sizes("embeddings/") | self.transport.sizes(f"{layout.PARTS}/")

    def committed(self) -> list[int]:
        """Shards that have a commit record now, ascending."""
        there = [(first, set(part.committed())) for first, _, part in self.parts]
        found = dict(there)
        return [shard for shard in range(self.spec.shards)
                if shard - (first := self.part_of(shard)[0]) in found[first]]  # fmt: skip

    def scan_commits(self, among: range | None = None) -> tuple[dict[int, CommitRecord], list[Problem]]:
        """The commit records that can be read, by shard of the whole, and a problem for each that cannot.

        Args:
            among: The shards whose records are returned; None for all. All are read.

        Returns:
            The records, and what is wrong.
        """
        found: dict[int, CommitRecord] = {}
        problems = []
        for first, prefix, part in self.parts:
            commits, wrong = part.scan_commits()
            mine = {shard + first: commit for shard, commit in commits.items()}
            found |= {shard: _of_whole(commit, first, self.spec.shard_rows) for shard, commit in mine.items()
                      if self.part_of(shard)[2] is part and (among is None or shard in among)}  # fmt: skip
            problems += [_of_part(problem, first, prefix) for problem in wrong]
        return dict(sorted(found.items())), problems

    def complete(self) -> Complete | None:
        """The completeness record that the whole would have; None where a part's is missing."""
        if any(part.complete() is None for _, _, part in self.parts):
            return None
        commits = self.scan_commits()[0]
        ok, quarantined = counts_of(self.spec, commits)
        return Complete(
            fingerprint=self.spec.fingerprint,
            items=self.spec.items,
            ok=ok,
            quarantined=quarantined,
            shards=self.spec.shards,
            commits_sha256=commits_root(commits, self.spec.names),
            objects={},
        )

    def check_complete(self, record: Complete, commits: dict[int, CommitRecord]) -> list[Problem]:  # noqa: ARG002
        """Problems between each part's completeness record, its commit records and its small objects."""
        problems = []
        for first, prefix, part in self.parts:
            told = part.complete()
            assert told is not None
            wrong = part.check_complete(told, part.scan_commits()[0])
            problems += [_of_part(problem, first, prefix) for problem in wrong]
        missing = [shard for shard in range(self.spec.shards) if shard not in commits]
        known = {problem.shard for problem in problems}
        return problems + [Problem(self.object_key(s), "no commit record", s) for s in missing if s not in known]

    def check_hashes(self, commits: dict[int, CommitRecord], progress: Counted | None = None) -> list[Problem]:
        """Problems found by hashing every shard of the whole."""
        return super().check_hashes(commits, progress)

    def labels(self) -> Int[np.ndarray, " N"]:
        """Label of each row, -1 where there is none, in the smallest integers that hold them."""
        parts = [part.labels() for _, _, part in self.parts]
        values = np.empty(self.spec.items, np.result_type(*parts))
        for (first, _, _), part in zip(self.parts, parts, strict=True):
            values[first * self.spec.shard_rows :][: len(part)] = part
        return values

    def manifest(self) -> DatasetManifest:
        """All items, in the order of the rows.

        Raises:
            ChunkCorruptError: A part's list of items is missing or damaged, or they are not those of the whole.
        """  # noqa: DOC501
        manifests = [part.manifest() for _, _, part in self.parts]
        starts = [first * self.spec.shard_rows for first, _, _ in self.parts]
        whole = joined(manifests, starts, self.classes)
        if whole.root != self.spec.items_root:
            key = self.records[-1].key
            raise corrupt(self.location, [Problem(key, f"the items are not those that {key} tells of")])
        return whole

    def discarded(self) -> set[int]:
        """Shards that a repair has discarded and not yet committed again."""
        return {shard + first for first, _, part in self.parts for shard in part.discarded()
                if self.part_of(shard + first)[2] is part}  # fmt: skip


def _wrong_part(base: StoreMetadata, record: Growth) -> IntegrityError:
    where = f"{layout.PARTS}/{record.part}"
    return IntegrityError(
        f"{base.location}: {where} is missing, or is not the part that {record.key} tells of",
        hint=f"restore {base.location}/{where} from a copy; or delete {record.key}, which gives the store as it was "
        "before, and append again",
    )


def joined(manifests: list[DatasetManifest], starts: list[int], classes: tuple[str, ...]) -> DatasetManifest:
    """Lists of items, each from its start on in the place of what was there.

    Args:
        manifests: The lists.
        starts: Row of the whole that each begins with; 0 for the first.
        classes: Class names of the whole.

    Returns:
        The whole.
    """
    from gstds_cache.data.names import Names

    items = starts[-1] + len(manifests[-1])
    ends = [*starts[1:], items]
    sha256, labels = mapped.zeros((items, 32), np.uint8), mapped.zeros((items,), np.int64)

    def names() -> Iterator[str]:
        return chain.from_iterable(
            islice(iter(part.ids), end - start) for part, start, end in zip(manifests, starts, ends, strict=True)
        )

    for part, start, end in zip(manifests, starts, ends, strict=True):
        sha256[start:end] = part.sha256[: end - start]
        labels[start:end] = part.labels[: end - start]
    return DatasetManifest(manifests[0].kind, Names.of(names(), "strict"), sha256, labels, classes)


def _of_whole(commit: CommitRecord, first: int, shard_rows: int) -> CommitRecord:
    """A part's commit record with the shard and rows of the whole."""
    if not first:
        return commit
    by = first * shard_rows
    return replace(
        commit,
        shard=commit.shard + first,
        rows=(commit.rows[0] + by, commit.rows[1] + by),
        quarantined=tuple(replace(item, row=item.row + by) for item in commit.quarantined),
    )


def _of_part(problem: Problem, first: int, prefix: str) -> Problem:
    """A part's problem, with the key and the shard of the whole."""
    return Problem(prefix + problem.key, problem.text, None if problem.shard is None else problem.shard + first)
