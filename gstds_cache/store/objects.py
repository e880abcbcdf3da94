"""Named objects under a prefix of a bucket: Amazon S3, or any service that speaks its API.

An object is written by one PUT, never in parts, so that it is absent or whole. What a service may do to us, and what is
done about it:

* Errors 5xx, refused and reset connections: the client tries again for a minute (:mod:`gstds_cache.files.bucket`).
* A response is lost after the service has done its work: the client's own second try of a conditional write then meets
  the object of its first, and is told that it exists. So "it exists" is never believed without reading the object.
* The service ignores the condition, and overwrites: :meth:`ObjectTransport.lock` finds out, and refuses to write.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from gstds_cache.errors import StoreUnavailableError, UsageError
from gstds_cache.files.bucket import STATUS, Bucket, endpoint
from gstds_cache.files.location import Location
from gstds_cache.store.transport import check_key

READERS = 8  # threads of get_many
CREATE_TRIES = 6

PROBES = ".probe"  # a name with a leading dot is no key, and no object of the store
PROBE_SECONDS = 3600.0  # none takes as long: an older one was left by a killed writer


class ObjectTransport:
    """Objects under ``s3://bucket/prefix`` (:class:`gstds_cache.store.transport.Transport`).

    May be pickled, and used by several threads. Not in a forked child of a process that has used one
    (:class:`gstds_cache.files.bucket.Bucket`).

    Attributes:
        exclusive: False: conditional writes decide between several writers.
        location: Where the objects are.
    """

    exclusive = False

    def __init__(self, location: Location) -> None:
        self.location = location
        self._bucket = Bucket(location, "stores")
        self._bucket_seen = False

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        with self._bucket.translated(check_key(key)), suppress(FileNotFoundError):
            self._bucket.obstore.head(self._bucket.opened(), key)
            self._bucket_seen = True
            return True
        if not self._bucket_seen:
            # A HEAD has no body, and cannot say that it is the bucket that is not there.
            with suppress(FileNotFoundError):
                self._get(key)
            self._bucket_seen = True
        return False

    def get(self, key: str) -> bytes:
        """All bytes of an object; FileNotFoundError where there is none."""
        return self._get(check_key(key))

    def pieces(self, key: str) -> Iterator[bytes]:
        """All bytes of an object, some at a time; FileNotFoundError where there is none.

        Yields:
            A MiB or so.
        """
        for data in self._bucket.pieces(check_key(key)):
            self._bucket_seen = True
            yield data

    def sha256(self, key: str) -> str:
        """SHA-256 of an object's bytes; FileNotFoundError where there is none."""
        digest = hashlib.sha256()
        for data in self.pieces(key):
            digest.update(data)
        return digest.hexdigest()

    def get_many(self, keys: Sequence[str]) -> list[bytes]:
        """All bytes of several objects, in order, :data:`READERS` at a time."""
        if len(keys) < 2:
            return [self.get(key) for key in keys]
        with ThreadPoolExecutor(min(READERS, len(keys)), thread_name_prefix="objects") as pool:
            try:
                return list(pool.map(self.get, keys))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object under the folder ``prefix``; names with a leading dot are no objects."""
        listed = self._list(check_key(prefix.removesuffix("/")) if prefix else None)
        return {path: size for path, size, _ in listed if not any(part.startswith(".") for part in path.split("/"))}

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object durably, replacing one that is there. May be done twice over; the bytes are the same."""
        self._put(check_key(key), data)

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool:
        """Write an object durably unless one is there.

        Returns:
            Whether the object has these bytes now: ours, or another writer's that wrote the same.

        Raises:
            StoreUnavailableError: It could not be written, and is not there; or the service will not say.
        """
        check_key(key)
        for attempt in range(CREATE_TRIES):
            try:
                self._put(key, data, mode="create")
                return True
            except StoreUnavailableError as error:
                # Compare whatever went wrong: a response may have been lost, even the last try's.
                with suppress(FileNotFoundError, StoreUnavailableError):
                    return self._get(key) == data
                if not isinstance(error.__cause__, self._bucket.obstore.exceptions.AlreadyExistsError):
                    raise
            # "Exists", and does not: it was deleted just now, or 409, another conditional write was under way.
            time.sleep(0.1 * 2**attempt)
        raise StoreUnavailableError(
            f"{self.location}: the service said {CREATE_TRIES} times that {key} exists, and does not give it out",
            hint="run the same command again",
        )

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""
        self._delete(check_key(key))

    def collect_temporaries(self) -> int:
        """Delete the probes of :meth:`lock` that killed writers left; there are no half objects in a bucket."""
        now = datetime.now(UTC).timestamp()
        old = [path for path, _, changed in self._list(PROBES) if now - changed > PROBE_SECONDS]
        for path in old:
            self._delete(path)
        return len(old)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """The right to write, which every writer has: commit records are written with a condition, and decide.

        Yields:
            Nothing.

        Raises:
            UsageError: The service ignores conditional writes: one writer would overwrite another's objects.
            StoreUnavailableError: The service does not answer, or refuses.
        """
        if not self._honours_conditions():
            raise UsageError(
                f"{self.location}: {endpoint() or 'the service'} ignores conditional writes (If-None-Match), without "
                "which two writers overwrite each other's objects; stores there can only be read",
                hint="embed into a directory and copy it there, or use a service that honours them "
                "(AWS_CONDITIONAL_PUT must not be 'disabled')",
            )
        yield

    def mark_used(self) -> None:
        """Nothing: a read leaves no trace in a bucket."""

    def last_used(self) -> float | None:
        """None: a bucket knows when an object was written, not when it was read."""
        return None

    def free_bytes(self) -> int | None:
        """None: a bucket is never full."""
        return None

    def _get(self, name: str) -> bytes:
        data = self._bucket.get(name)
        self._bucket_seen = True
        return data

    def _put(self, name: str, data: bytes | memoryview, *, mode: Any = "overwrite") -> None:
        with self._bucket.translated(name):
            self._bucket.obstore.put(self._bucket.opened(), name, data, use_multipart=False, mode=mode)

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError), self._bucket.translated(name):
            self._bucket.obstore.delete(self._bucket.opened(), name)

    def _list(self, folder: str | None) -> list[tuple[str, int, float]]:
        """Path, bytes and time of change of every object under ``folder``."""
        return [(entry.path, entry.size, entry.changed) for entry in self._bucket.entries(folder)]

    def _honours_conditions(self) -> bool:
        # Is a second conditional write of one name refused?
        probe = f"{PROBES}/{uuid4().hex}"
        try:
            self._put(probe, b"", mode="create")
            self._put(probe, b"", mode="create")
        except NotImplementedError:  # AWS_CONDITIONAL_PUT=disabled: the user says so
            return False
        except StoreUnavailableError as error:
            # Even the first may be refused, on account of itself: its response was lost, and the client tried again.
            if not isinstance(error.__cause__, self._bucket.obstore.exceptions.AlreadyExistsError):
                if (match := re.search(STATUS, str(error.__cause__))) and match[1] == "501":
                    return False
                raise
            honoured = True
        else:
            honoured = False
        with suppress(StoreUnavailableError):
            self._delete(probe)
        return honoured
