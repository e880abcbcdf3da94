"""Where a store is, parsed once: a directory on this machine, or a prefix of an S3 bucket.

A path may begin with ``~``, also in quotes, where no shell replaces it: a folder named ``~`` is never meant.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from gstds_cache.errors import UsageError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)")
REMOTE = {"s3", "gs", "gcs", "az", "abfs", "http", "https", "grpc", "grpc+tls"}
# ASCII, because some versions of obstore percent-encode the rest: other tools would then see other names.
BUCKET = re.compile(r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,254})/(?P<prefix>[A-Za-z0-9._=+@,:/-]+)", re.I)


@dataclass(frozen=True)
class Location:
    """Where a store is; made by :meth:`parse`. ``str()`` is the name a user can type.

    Attributes:
        path: The directory; None for a bucket.
        bucket: Name of the bucket; empty for a directory.
        prefix: What the keys in the bucket begin with, without a slash at either end; empty for a directory.
        typed: The directory as the user named it, where ``path`` was made absolute.
    """

    path: Path | None
    bucket: str = ""
    prefix: str = ""
    typed: Path | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, where: LocationLike, name: str = "`store`") -> Location:
        """Parse what a user named.

        Args:
            where: A path, ``file:///path`` or ``s3://bucket/prefix``, the schemes in any case; a location; or an open
                store.
            name: What is named, for errors, e.g. ```cache```.

        Returns:
            The location.

        Raises:
            UsageError: ``where`` is of another type, empty, a URL of another kind or with too few slashes, a bucket
                without a prefix or with one that some services would change, or begins with ``~`` of a user who has no
                home.
        """
        if isinstance(where, Location):
            return where
        opened = getattr(where, "location", None)
        if isinstance(opened, Location):
            return opened
        text = _text_of(where, name, "a path, file:///path, s3://bucket/prefix or an open store")
        if text[:5].lower() != "s3://":
            return cls(_local(text, name, "a path, file:///path or s3://bucket/prefix"))
        match = BUCKET.fullmatch(text)
        parts = match["prefix"].removesuffix("/").split("/") if match else [""]
        if match is None or {"", ".", ".."} & set(parts):
            raise UsageError(
                f"{name}: got {text!r}, expected s3://bucket/prefix, with parts of [A-Za-z0-9._=+@,:-]; a store has a "
                "prefix of its own"
            )
        return cls(None, match["bucket"], "/".join(parts))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.path is None else str(self.typed or self.path)

    def absolute(self) -> Location:
        """The same location whatever the current directory is; its name stays the one that the user typed."""
        if self.path is None or self.path.is_absolute():
            return self
        return Location(self.path.absolute(), typed=self.path)

    def below(self, *names: str) -> Location:
        """A folder below this one."""
        if self.path is None:
            return Location(None, self.bucket, "/".join((self.prefix, *names)))
        typed = None if self.typed is None else self.typed.joinpath(*names)
        return Location(self.path.joinpath(*names), typed=typed)

    @property
    def name(self) -> str:
        """The last part of the path or prefix."""
        return self.prefix.rpartition("/")[2] if self.path is None else self.path.name


@runtime_checkable
class HasLocation(Protocol):
    """An open store, whose location is meant."""

    location: Location


LocationLike = str | os.PathLike[str] | Location | HasLocation
"""What a public call takes for a store; parsed at once."""


def local_file(where: str | os.PathLike[str], what: str) -> Path:
    """The local file or folder that ``where`` names: a path, or ``file:///path``.

    Args:
        where: As the user gave it.
        what: What is named, for errors, e.g. ```out```.

    Returns:
        The path.

    Raises:
        UsageError: ``where`` is no path, is empty, a URL of another kind, or begins with ``~`` of a user who has no
            home.
    """
    expected = "a path on this machine, or file:///path"
    return _local(_text_of(where, what, expected), what, expected)


def file_to_write(where: str | os.PathLike[str], what: str) -> Path:
    """:func:`local_file` for a file that will be written, refused before any work where that is impossible.

    Args:
        where: As the user gave it.
        what: What is named, for errors, e.g. ```out```.

    Returns:
        The path.

    Raises:
        UsageError: ``where`` names no file on this machine, a folder, or a file in a folder that does not exist.
    """
    path = local_file(where, what)
    if os.path.isdir(path):  # noqa: PTH112 - Path's may raise
        raise UsageError(f"{what}: {path} is a folder, expected a file to write")
    if not os.path.isdir(path.parent):  # noqa: PTH112 - Path's may raise
        raise UsageError(
            f"{what}: got {path}, but there is no folder {path.parent}", hint="check the path, or make the folder"
        )
    return path


def _text_of(where: object, what: str, expected: str) -> str:
    """The text of a path. Anything has a ``str()``, which must not become the name of a folder.

    Raises:
        UsageError: It is no path.
    """
    text = os.fspath(where) if isinstance(where, str | os.PathLike) else where
    if not isinstance(text, str):
        got = "None" if text is None else type(text).__name__
        raise UsageError(f"{what}: got {got}, expected {expected}")
    return text


def _local(text: str, what: str, expected: str) -> Path:
    match = SCHEME.match(text)
    scheme, slashes = (match[1].lower(), match[2]) if match else ("", "")
    if match is not None and scheme == "file":
        return _of_file_url(text, what)
    if not text or slashes == "//" or (match is not None and scheme in REMOTE):
        # One slash is what a path makes of two: Path("s3://bucket") is s3:/bucket, and would be a folder named s3:.
        meant = f"{scheme}://{text[match.end() :]}" if match is not None and slashes == "/" else ""
        hint = f"did you mean {meant!r}? A folder of that name is './{text}'" if meant else ""
        raise UsageError(f"{what}: got {text!r}, expected {expected}", hint=hint)
    return expanded(text, what)


def expanded(path: str | Path, what: str = "path") -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced by that home.

    Args:
        path: A path.
        what: What is named, for errors.

    Returns:
        The path.

    Raises:
        UsageError: It begins with ``~`` of a user who has no home.
    """
    text = str(path)
    if not text.startswith("~"):
        return Path(path)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = text[1:].partition("/")[0]
        whose = f"no user {user!r} is known here" if user else "HOME is not set, and this user id has no entry"
        raise UsageError(
            f"{what} {text!r}: {whose}, so ~{user} stands for no folder",
            hint=f"write the whole path, or ./{text} for a name that begins so" + ("" if user else "; or set HOME"),
        ) from None


def _of_file_url(text: str, what: str) -> Path:
    parts = urlsplit(text)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise UsageError(f"{what}: got {text!r}, expected file:///absolute/path, with ? and # as %3F and %23")
    return Path(unquote(parts.path))
