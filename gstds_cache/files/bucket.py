"""Objects of a bucket: Amazon S3, or any service that speaks its API. The one place that obstore is used in.

Errors 5xx, refused and reset connections: the client tries again for a minute (:data:`RETRY`).

Credentials, region and endpoint come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION or
AWS_DEFAULT_REGION, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL; AWS_SKIP_SIGNATURE=true is for public buckets. The files
under ``~/.aws`` are not read.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from gstds_cache.errors import StoreUnavailableError, UsageError
from gstds_cache.files.location import Location

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
PIECE = 1 << 20
"""Bytes of an object that are read at a time where it is not to be held whole."""

STATUS = r"status code: (\d{3})"
CODE = r"<Code>(\w+)</Code>"
REFUSALS = {"401", "403", "ExpiredToken", "InvalidToken", "AuthorizationHeaderMalformed"}  # the last three come as 400


@dataclass(frozen=True)
class Entry:
    """An object of a listing.

    Attributes:
        path: Its name below the location.
        size: Bytes.
        changed: When it was written, in seconds since 1970.
        etag: What the service says tells versions apart; empty where it says nothing.
    """

    path: str
    size: int
    changed: float
    etag: str


class Bucket:
    """The objects under ``s3://bucket/prefix``, by obstore.

    May be pickled, and used by several threads. Not in a forked child of a process that has used one: obstore's threads
    do not live there (:func:`usable_here`).

    Attributes:
        location: Where the objects are.
        what: What needs obstore, for the error where it is not installed.
    """

    def __init__(self, location: Location, what: str) -> None:
        self.location, self.what = location, what
        self._store: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_store": None}

    def get(self, path: str) -> bytes:
        """All bytes of an object; FileNotFoundError where there is none."""
        with self.translated(path):
            data: bytes = self.obstore.get(self.opened(), path).bytes().to_bytes()
        return data

    def get_range(self, path: str, start: int, size: int, etag: str = "") -> bytes:
        """Some bytes of an object; fewer where it ends before.

        Args:
            path: The object.
            start: The first of them.
            size: How many.
            etag: The version that is meant; empty for any.

        Returns:
            The bytes.

        Raises:
            FileNotFoundError: There is no such object.
            ChangedError: It is another version now.
        """
        options: dict[str, Any] = {"range": (start, start + size), **({"if_match": etag} if etag else {})}
        with self.translated(path):
            try:
                data: bytes = self.obstore.get(self.opened(), path, options=options).bytes().to_bytes()
            except self.obstore.exceptions.PreconditionError as error:
                raise ChangedError(self._named(path)) from error
        return data

    def pieces(self, path: str, etag: str = "") -> Iterator[bytes]:
        """All bytes of an object, some at a time; FileNotFoundError where there is none.

        Args:
            path: The object.
            etag: The version that is meant; empty for any.

        Yields:
            A MiB or so.

        Raises:
            ChangedError: It is another version now.
        """
        with self.translated(path):
            try:
                found = self.obstore.get(self.opened(), path, options={"if_match": etag} if etag else {})
            except self.obstore.exceptions.PreconditionError as error:
                raise ChangedError(self._named(path)) from error
            for data in found.stream(min_chunk_size=PIECE):
                yield bytes(data)

    def entries(self, folder: str | None = None) -> Iterator[Entry]:
        """Every object under ``folder``, in the order of the service.

        Yields:
            One after the other; the service is asked for the next thousand when they are needed.
        """
        with self.translated(folder or ""):
            for some in self.obstore.list(self.opened(), folder, chunk_size=1000):
                for entry in some:
                    yield _entry(entry)

    def folder(self, folder: str) -> list[Entry]:
        """The objects right in ``folder``, and none in folders below it."""
        with self.translated(folder):
            found = self.obstore.list_with_delimiter(self.opened(), folder or None)
        return [_entry(entry) for entry in found["objects"]]

    @property
    def obstore(self) -> Any:
        """The library, imported when first needed: it is an extra.

        Raises:
            UsageError: It is not installed.
        """
        try:
            import obstore.exceptions
            import obstore.store  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError(
                f"{self.location}: {self.what} in a bucket need obstore, which is not installed ({error})",
                hint="pip install 'gstds-cache[s3]'",
            ) from error
        return obstore

    def opened(self) -> Any:
        """The client, made when first needed: what is pickled is the place alone.

        Raises:
            UsageError: obstore does not work in this process, or the environment describes no service.
        """
        if not usable_here():
            raise UsageError(
                f"{self.location}: this process was forked from one that uses a bucket, and would wait forever",
                hint="start worker processes with the method spawn or forkserver",
            )
        if self._store is None:
            place = endpoint()
            try:
                self._store = self.obstore.store.S3Store(
                    self.location.bucket,
                    prefix=self.location.prefix or None,
                    config={"endpoint": place} if place else {},
                    client_options={"allow_http": place.startswith("http://"), "timeout": REQUEST_TIMEOUT},
                    retry_config=RETRY,
                )
            except self.obstore.exceptions.BaseError as error:
                raise UsageError(
                    f"{self.location}: the environment does not describe a service: {_message(error)}",
                    hint="check the variables whose names begin with AWS_; a key id and its secret come together",
                ) from error
        return self._store

    @contextmanager
    def translated(self, name: str) -> Iterator[None]:
        """Say in our words what obstore raises.

        Args:
            name: The object that it is about.

        Yields:
            Nothing.

        Raises:
            FileNotFoundError: There is no such object.
            StoreUnavailableError: There is no such bucket, or the service does not answer, or refuses.
        """
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._unavailable(name, error) from error
            raise FileNotFoundError(errno.ENOENT, "no such object", self._named(name)) from error
        except self.obstore.exceptions.BaseError as error:
            raise self._unavailable(name, error) from error

    def _named(self, path: str) -> str:
        return f"{str(self.location).removesuffix('/')}/{path}"

    def _unavailable(self, name: str, error: Exception) -> StoreUnavailableError:
        message = _message(error)
        found = {pattern: re.search(pattern, message) for pattern in (STATUS, CODE)}
        status, code = (match[1] if match else "" for match in found.values())
        place = endpoint() or "Amazon S3 (AWS_ENDPOINT_URL is not set)"
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
                f"{self._named(name)}: "
                + (f"no credentials: {message[:200]}" if keyless else f"{place} refused access: {answer}"),
                hint="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and "
                "AWS_ENDPOINT_URL, and that this key may list, read, write and delete there; ~/.aws is not read",
            )
        return StoreUnavailableError(
            f"{self._named(name)}: {place} does not answer as it should: "
            + message.partition("<")[0][:400].strip(" :")
            + (f" {code}" if code else ""),
            hint="nothing that is there was lost: run the same command again. If it never answered: check "
            "AWS_ENDPOINT_URL and AWS_REGION",
        )


def _entry(entry: Any) -> Entry:
    return Entry(entry["path"], entry["size"], entry["last_modified"].timestamp(), entry["e_tag"] or "")


class ChangedError(OSError):
    """An object is another version than the one that was meant."""


def endpoint() -> str:
    """Where the user says that the service is; empty for Amazon's."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((value for name in names if (value := os.environ.get(name))), "")


def usable_here() -> bool:
    """Whether obstore works in this process: it does not in a forked child of one that has used it."""
    return _runtime_process() == os.getpid()


def _message(error: Exception) -> str:
    """What obstore says, without its structure for debugging."""
    return str(error).partition("\n\nDebug source")[0]


@cache
def _runtime_process() -> int:
    """The process that obstore's threads live in: whichever asked first. A forked child has none of them."""
    return os.getpid()
