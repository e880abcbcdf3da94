"""Named objects under a prefix of a bucket: Amazon S3, or any service that speaks its API.

An object is written by one PUT, never in parts, so that it is absent or whole. What a service may do to us, and what is
done about it:

* Errors 5xx, refused and reset connections: the client tries again for a minute (:data:`RETRY`).
* A response is lost after the service has done its work: the client's own second try of a conditional write then meets
  the object of its first, and is told that it exists. So "it exists" is never believed without reading the object.
* The service ignores the condition, and overwrites: :meth:`ObjectTransport.lock` finds out, and refuses to write.

Credentials, region and endpoint come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION or
AWS_DEFAULT_REGION, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL; AWS_SKIP_SIGNATURE=true is for public buckets. The files
under ``~/.aws`` are not read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from gstds_cache.errors import StoreUnavailableError, UsageError
from gstds_cache.files.location import Location
from gstds_cache.store.transport import PIECE, check_key

if TYPE_CHECKING:
    from obstore.store import RetryConfig

# The time is to end it, not the count: a burst of refusals lasts seconds, a restart of a gateway a minute. (Pauses are
# random: with base 2 they do not grow, and 100 tries were over in 37 s.)
RETRY: RetryConfig = {
    "max_retries": 1000,
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 3},
    "retry_timeout": timedelta(seconds=60),
}
REQUEST_TIMEOUT = "300s"  # 64 MB at 2 Mbit/s; obstore's own 30 s would need 17

READERS = 8  # threads of get_many
CREATE_TRIES = 6

PROBES = ".probe"  # a name with a leading dot is no key, and no object of the store
PROBE_SECONDS = 3600.0  # none takes as long: an older one was left by a killed writer

STATUS = r"status code: (\d{3})"
CODE = r"<Code>(\w+)</Code>"
REFUSALS = {"401", "403", "ExpiredToken", "InvalidToken", "AuthorizationHeaderMalformed"}  # the last three come as 400


class ObjectTransport:
    """Objects under ``s3://bucket/prefix`` (:class:`gstds_cache.store.transport.Transport`).

    May be pickled, and used by several threads. Not in a forked child of a process that has used one: obstore's threads
    do not live there.

    Attributes:
        exclusive: False: conditional writes decide between several writers.
        location: Where the objects are.
    """

    exclusive = False

    def __init__(self, location: Location) -> None:
        self.location = location
        self._store: Any = None
        self._bucket_seen = False

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_store": None}

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        with self._translated(check_key(key)), suppress(FileNotFoundError):
            self._obstore.head(self._opened(), key)
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
        with self._translated(check_key(key)):
            for data in self._obstore.get(self._opened(), key).stream(min_chunk_size=PIECE):
                self._bucket_seen = True
                yield bytes(data)

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
                if not isinstance(error.__cause__, self._obstore.exceptions.AlreadyExistsError):
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
                f"{self.location}: {_endpoint() or 'the service'} ignores conditional writes (If-None-Match), without "
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

    @property
    def _obstore(self) -> Any:
        # Imported when first needed: it is an extra.
        try:
            import obstore.exceptions
            import obstore.store  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError(
                f"{self.location}: stores in a bucket need obstore, which is not installed ({error})",
                hint="pip install 'gstds-cache[s3]'",
            ) from error
        return obstore

    def _opened(self) -> Any:
        # The client is made when first needed: what is pickled is the place alone.
        if _runtime_process() != os.getpid():
            raise UsageError(
                f"{self.location}: this process was forked from one that uses a bucket, and would wait forever",
                hint="start worker processes with the method spawn or forkserver",
            )
        if self._store is None:
            endpoint = _endpoint()
            try:
                self._store = self._obstore.store.S3Store(
                    self.location.bucket,
                    prefix=self.location.prefix,
                    config={"endpoint": endpoint} if endpoint else {},
                    client_options={"allow_http": endpoint.startswith("http://"), "timeout": REQUEST_TIMEOUT},
                    retry_config=RETRY,
                )
            except self._obstore.exceptions.BaseError as error:
                raise UsageError(
                    f"{self.location}: the environment does not describe a service: {_message(error)}",
                    hint="check the variables whose names begin with AWS_; a key id and its secret come together",
                ) from error
        return self._store

    def _get(self, name: str) -> bytes:
        with self._translated(name):
            data: bytes = self._obstore.get(self._opened(), name).bytes().to_bytes()
        self._bucket_seen = True
        return data

    def _put(self, name: str, data: bytes | memoryview, *, mode: Any = "overwrite") -> None:
        with self._translated(name):
            self._obstore.put(self._opened(), name, data, use_multipart=False, mode=mode)

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError), self._translated(name):
            self._obstore.delete(self._opened(), name)

    def _list(self, folder: str | None) -> list[tuple[str, int, float]]:
        """Path, bytes and time of change of every object under ``folder``."""
        with self._translated(folder or ""):
            return [
                (entry["path"], entry["size"], entry["last_modified"].timestamp())
                for entries in self._obstore.list(self._opened(), folder)
                for entry in entries
            ]

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._unavailable(name, error) from error
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.location}/{name}") from error
        except self._obstore.exceptions.BaseError as error:
            raise self._unavailable(name, error) from error

    def _unavailable(self, name: str, error: Exception) -> StoreUnavailableError:
        message = _message(error)
        found = {pattern: re.search(pattern, message) for pattern in (STATUS, CODE)}
        status, code = (match[1] if match else "" for match in found.values())
        place = _endpoint() or "Amazon S3 (AWS_ENDPOINT_URL is not set)"
        if code == "NoSuchBucket":
            return StoreUnavailableError(
                f"{self.location}: there is no bucket {self.location.bucket!r} at {place}",
                hint="make the bucket, or check its name, AWS_ENDPOINT_URL and AWS_REGION",
            )
        # Without a key in the environment, obstore asks the machine's own metadata service for one.
        keyless = "169.254.169.254" in message
        if keyless or {status, code} & REFUSALS:
            answer = " ".join(filter(None, (status, code)))
            return StoreUnavailableError(
                f"{self.location}/{name}: "
                + (f"no credentials: {message[:200]}" if keyless else f"{place} refused access: {answer}"),
                hint="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and "
                "AWS_ENDPOINT_URL, and that this key may list, read, write and delete there; ~/.aws is not read",
            )
        return StoreUnavailableError(
            f"{self.location}/{name}: {place} does not answer as it should: "
            + message.partition("<")[0][:400].strip(" :")
            + (f" {code}" if code else ""),
            hint="nothing that is there was lost: run the same command again. If it never answered: check "
            "AWS_ENDPOINT_URL and AWS_REGION",
        )

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
            if not isinstance(error.__cause__, self._obstore.exceptions.AlreadyExistsError):
                if (match := re.search(STATUS, str(error.__cause__))) and match[1] == "501":
                    return False
                raise
            honoured = True
        else:
            honoured = False
        with suppress(StoreUnavailableError):
            self._delete(probe)
        return honoured


def _endpoint() -> str:
    """Where the user says that the service is; empty for Amazon's."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((value for name in names if (value := os.environ.get(name))), "")


def _message(error: Exception) -> str:
    """What obstore says, without its structure for debugging."""
    return str(error).partition("\n\nDebug source")[0]


@cache
def _runtime_process() -> int:
    """The process that obstore's threads live in: whichever asked first. A forked child has none of them."""
    return os.getpid()
