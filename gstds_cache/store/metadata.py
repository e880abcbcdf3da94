"""What a store says of itself: specification, commit records, completeness. Readers and the writer share it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int

from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.errors import ChunkCorruptError, IntegrityError, StoreNotFoundError, command_line
from gstds_cache.files.digest import canonical_json
from gstds_cache.files.location import Location, LocationLike
from gstds_cache.runtime.progress import Counted
from gstds_cache.store import layout
from gstds_cache.store.commit_record import CommitRecord, commits_root, counts_of
from gstds_cache.store.factory import open_transport
from gstds_cache.store.format import Format
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.transport import Transport, map_object

HASHERS = 4
"""Objects that are hashed at a time."""
AT_ONCE = 1 << 10
"""Objects that are asked for together; each that waits takes a kilobyte of memory."""

METADATA_KEYS = (
    layout.GROUP,
    "embeddings/zarr.json",
    "label/zarr.json",
    "valid/zarr.json",
    layout.LABEL,
    layout.VALID,
    layout.ITEMS,
)


@dataclass(frozen=True)
class Complete:
    """The record that a store is whole.

    Attributes:
        fingerprint: The store's.
        items: Rows in all; ``items == ok + quarantined``.
        ok: Rows with an embedding.
        quarantined: Rows whose item could not be decoded.
        shards: Number of shards.
        commits_sha256: Merkle root over all commit records.
        objects: SHA-256 of every object that is not a shard.
    """

    fingerprint: str
    items: int
    ok: int
    quarantined: int
    shards: int
    commits_sha256: str
    objects: dict[str, str]

    def to_bytes(self, names: Format) -> bytes:
        """Canonical JSON and a line end."""
        return canonical_json(names.to_disk(vars(self))) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, names: Format) -> Complete:
        """Parse what :meth:`to_bytes` gave.

        Raises:
            ValueError: ``data`` is something else.
            TypeError: It lacks fields, or has others.
            AttributeError: It is JSON of another kind.
        """
        record = cls(**names.from_disk(json.loads(data)))
        if record.to_bytes(names) != data:
            raise ValueError("it is not as it was written")
        return record


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a store.

    Attributes:
        key: The object it shows in.
        text: What is wrong, for people.
        shard: The shard that has to be done again, or None where the fault is in an object that belongs to no shard.
    """

    key: str
    text: str
    shard: int | None = None

    def __str__(self) -> str:
        return self.text if self.shard is None else f"shard {self.shard}: {self.text}"


class StoreMetadata:
    """The specification and the commit records of one store; a commit record is read once.

    Attributes:
        location: Where the store is.
        transport: Its objects.
        spec: What it holds.
        kind: Kind of data set.
        classes: Class names by label.
        provenance: How it was made; no identity.
    """

    def __init__(self, where: LocationLike, *, transport: Transport | None = None) -> None:
        """Read the specification of the store at ``where``.

        Args:
            where: The store.
            transport: Its objects, where they are open already.

        Raises:
            StoreNotFoundError: There is no store.
            IntegrityError: The specification is damaged.
        """  # noqa: DOC501
        self.location = Location.parse(where).absolute()
        self.transport = transport or open_transport(self.location)
        self._commits: dict[int, CommitRecord] = {}
        try:
            data = self.transport.get(layout.GROUP)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _not_found(self.location) from error
        try:
            attributes: dict[str, Any] = json.loads(data)["attributes"]["gstds"]
            fields: dict[str, Any] = dict(attributes["spec"])
            self.provenance: dict[str, Any] = dict(attributes.get("provenance", {}))
            self.classes: tuple[str, ...] = tuple(attributes.get("classes", ()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"{self.location}/{layout.GROUP} is damaged or not of gstds-cache: {error!r}",
                hint="this one object says what the store holds, and cannot be made again from the others: restore it "
                "from a copy, or embed into a new store with `reuse` of another one",
            ) from error
        self.spec = CacheSpec.from_dict(fields)
        self.kind = str(attributes.get("kind", ""))
        if attributes.get("fingerprint") != self.spec.fingerprint:
            raise IntegrityError(
                f"{self.location}: the specification was altered: its fingerprint is {self.spec.fingerprint[:12]}, "
                f"recorded is {str(attributes.get('fingerprint'))[:12]}",
                hint=f"restore {self.location}/{layout.GROUP} from a copy, or embed into a new store",
            )

    @property
    def dataset_uri(self) -> str | None:
        """Where the data set was when the store was made; None where that is not recorded."""
        return self.provenance.get("dataset")

    @property
    def model_uri(self) -> str | None:
        """The name of the model that the store was made with; None where that is not recorded."""
        return self.provenance.get("model")

    @property
    def finish_command(self) -> str:
        """The command that makes an incomplete store whole."""
        default = ["gstds-cache", "import", "VECTORS"] if self.spec.imported else ["gstds-embed", "DATASET"]
        command = self.provenance.get("command", default)
        return command_line(*command, "--out" if self.spec.imported else "--cache", self.location)

    def manifest(self) -> DatasetManifest:
        """The items that the store was made of, in the order of its rows.

        Returns:
            Their ids, hashes and labels, mapped: they take no memory of the process.

        Raises:
            ChunkCorruptError: The list of items is missing, damaged, or that of another data set.
        """  # noqa: DOC501
        problem = Problem(layout.ITEMS, f"{layout.ITEMS} is not the list of items that the store was made of")
        try:
            manifest = DatasetManifest.from_arrow(map_object(self.transport, layout.ITEMS))
        except (IntegrityError, FileNotFoundError) as error:
            raise corrupt(self.location, [problem]) from error
        if manifest.root != self.spec.items_root:
            raise corrupt(self.location, [problem])
        return manifest

    def labels(self) -> Int[np.ndarray, " N"]:
        """Label of each row, -1 where there is none, in the smallest integers that hold them.

        Raises:
            ChunkCorruptError: The object of the labels is damaged.
        """  # noqa: DOC501
        try:
            return layout.label_values(self.spec, self.transport.pieces(layout.LABEL), len(self.classes))
        except (FileNotFoundError, ValueError) as error:
            problem = Problem(layout.LABEL, f"{layout.LABEL} does not decode ({error})")
            raise corrupt(self.location, [problem]) from error

    def object_key(self, shard: int) -> str:
        """Key of a shard's object."""
        return layout.object_key(shard)

    def object_sizes(self) -> dict[str, int]:
        """Bytes of every shard's object that is there, and perhaps of others."""
        return self.transport.sizes("embeddings/")

    def committed(self) -> list[int]:
        """Shards that have a commit record now, ascending. Only names are listed; no record is read."""
        listed = self.transport.sizes(f"{self.spec.names.commits}/")
        return [shard for shard in range(self.spec.shards) if self.spec.names.commit_key(shard) in listed]

    def scan_commits(self, among: range | None = None) -> tuple[dict[int, CommitRecord], list[Problem]]:
        """The commit records that can be read, by shard, and a problem for each that cannot.

        Records that were read or written by way of this object before are not read again.

        Args:
            among: The shards whose records are read; None for all.

        Returns:
            The records, and what is wrong.
        """
        names, problems = self.spec.names, list[Problem]()
        shards = [shard for shard in self.committed() if among is None or shard in among]
        unread = (shard for shard in shards if shard not in self._commits)
        while some := list(islice(unread, AT_ONCE)):
            for shard, data in zip(some, self.transport.get_many(list(map(names.commit_key, some))), strict=True):
                try:
                    self._commits[shard] = self._parse(shard, data)
                except IntegrityError as error:
                    problems.append(Problem(names.commit_key(shard), error.message, shard))
        return {shard: self._commits[shard] for shard in shards if shard in self._commits}, problems

    def remember(self, commit: CommitRecord) -> None:
        """Take note of a commit record that is stored now."""
        self._commits[commit.shard] = commit

    def forget(self, shard: int) -> None:
        """Take note that a shard's commit record is no longer stored, or may be another."""
        self._commits.pop(shard, None)

    def _parse(self, shard: int, data: bytes) -> CommitRecord:
        names = self.spec.names
        commit = CommitRecord.from_bytes(data, names, shard=shard, fingerprint=self.spec.fingerprint)
        if commit.to_bytes(names) != data or range(*commit.rows) != self.spec.rows_of(shard):
            raise IntegrityError(f"commit record of shard {shard} is not as it was written")
        return commit

    def commits(self, among: range | None = None) -> dict[int, CommitRecord]:
        """The commit records by shard: all, or those of the shards ``among``.

        Raises:
            ChunkCorruptError: One is damaged or belongs elsewhere.
        """  # noqa: DOC501
        found, problems = self.scan_commits(among)
        if problems:
            raise corrupt(self.location, problems)
        return found

    def complete(self) -> Complete | None:
        """The completeness record, or None.

        Raises:
            ChunkCorruptError: It is damaged or belongs to another store.
        """  # noqa: DOC501
        try:
            record = Complete.from_bytes(self.transport.get(layout.COMPLETE), self.spec.names)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            problem = Problem(layout.COMPLETE, f"{layout.COMPLETE} is damaged: {error}")
            raise corrupt(self.location, [problem]) from error
        if record.fingerprint != self.spec.fingerprint:
            text = f"{layout.COMPLETE} belongs to store {record.fingerprint[:12]}, not {self.spec.fingerprint[:12]}"
            raise corrupt(self.location, [Problem(layout.COMPLETE, text)])
        return record

    def discarded(self) -> set[int]:
        """Shards that a repair has discarded and not yet committed again; of a damaged note, all shards."""
        try:
            named = json.loads(self.transport.get(layout.REPAIR))[self.spec.names.shards]
            return {shard for shard in range(self.spec.shards) if shard in named}
        except FileNotFoundError:
            return set()
        except (ValueError, KeyError, TypeError):
            return set(range(self.spec.shards))

    def check_sizes(self, commits: dict[int, CommitRecord]) -> list[Problem]:
        """Problems visible without reading shards: missing ones, and ones of another size."""
        sizes = self.object_sizes()
        problems = []
        for shard, commit in commits.items():
            key = self.object_key(shard)
            if key not in sizes:
                problems.append(Problem(key, f"{key} is missing", shard))
            elif sizes[key] != commit.size:
                problems.append(
                    Problem(key, f"{key} has {sizes[key]} bytes, its commit record says {commit.size}", shard)
                )
        return problems

    def check_hashes(self, commits: dict[int, CommitRecord], progress: Counted | None = None) -> list[Problem]:
        """Problems found by hashing every committed shard.

        Args:
            commits: Commit records of the shards to hash.
            progress: Called with shards done and shards in all.

        Returns:
            What is wrong.
        """
        problems = self.check_sizes(commits)
        named = {problem.shard for problem in problems}
        left = (shard for shard in commits if shard not in named)
        pool = ThreadPoolExecutor(HASHERS, thread_name_prefix="gstds-hash")  # hashing leaves Python's lock
        done = len(named)
        try:
            while some := list(islice(left, AT_ONCE)):
                for shard, got in zip(some, pool.map(self._object_sha256, some), strict=True):
                    if progress is not None:
                        progress(done, len(commits))
                    done += 1
                    if got != (told := commits[shard].object_sha256):
                        key = self.object_key(shard)
                        text = f"{key} hashes to {got[:12]}, its commit record says {told[:12]}"
                        problems.append(Problem(key, text, shard))
        finally:
            pool.shutdown(cancel_futures=True)
        return problems

    def _object_sha256(self, shard: int) -> str:
        return self.transport.sha256(self.object_key(shard))

    def check_complete(self, record: Complete, commits: dict[int, CommitRecord]) -> list[Problem]:
        """Problems between the completeness record, the commit records and the objects that are no shards."""
        problems = [
            Problem(self.spec.names.commit_key(shard), "no commit record", shard)
            for shard in range(self.spec.shards)
            if shard not in commits
        ]
        if not problems and commits_root(commits, self.spec.names) != record.commits_sha256:
            text = f"{layout.COMPLETE}: the commit records are not the ones that were there when it was written"
            problems.append(Problem(layout.COMPLETE, text))
        counts = (self.spec.items, *counts_of(self.spec, commits))
        if not problems and (record.items, record.ok, record.quarantined, record.shards) != (*counts, self.spec.shards):
            problems.append(Problem(layout.COMPLETE, f"{layout.COMPLETE} counts other rows than the commit records"))
        for key in METADATA_KEYS:
            try:
                if self.transport.sha256(key) != record.objects.get(key):
                    problems.append(Problem(key, f"{key} was altered"))
            except FileNotFoundError:
                problems.append(Problem(key, f"{key} is missing"))
        return problems


def corrupt(location: Location, problems: Iterable[Problem]) -> ChunkCorruptError:
    """The error for a store with ``problems``, naming each and the command that mends it."""
    lines = [str(problem) for problem in problems]
    more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
    return ChunkCorruptError(
        f"{location} is damaged:\n    " + "\n    ".join([*lines[:20], *more]),
        hint=f"mend it with: {command_line('gstds-cache', 'repair', location)}",
    )


def _not_found(location: Location) -> StoreNotFoundError:
    """The error of a place without a store; what else is there is named, as a store is not made in its place."""
    listed = f"list stores with: {command_line('gstds-cache', 'ls')}"
    path = location.path
    if path is not None and path.is_file():
        return StoreNotFoundError(f"no store at {location}: it is a file", hint=f"name the store's folder; {listed}")
    with suppress(OSError):
        found = () if path is None else (one.name for one in path.iterdir() if one.name[0] != ".")
        name = min(islice(found, 100), default="")  # of a folder of a million images, too
        if name and name not in layout.OWN_NAMES:
            return StoreNotFoundError(
                f"no store at {location}: it is a folder that holds something else ({name!r})",
                hint=f"if these are images: {command_line('gstds-embed', f'imagefolder:{path}')}; {listed}",
            )
    return StoreNotFoundError(
        f"no store at {location}",
        hint=f"make one with: {command_line('gstds-embed', 'DATASET', '--cache', location)}; {listed}",
    )
