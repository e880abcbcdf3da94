"""What a user names a place by, parsed once: a path, ``file:///path``, or ``s3://bucket/prefix``.

A path may begin with ``~``, in quotes too, where no shell replaces it: a folder named ``~`` is never meant.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gstds_cache.errors import UsageError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)")
REMOTE = {"s3", "gs", "gcs", "az", "abfs", "http", "https", "grpc", "grpc+tls"}


def parse_location(where: str | Path, what: str = "store") -> Path | str:
    """The directory or bucket that ``where`` names.

    Args:
        where: A path, ``file:///path`` or ``s3://bucket/prefix``.
        what: What is named, for errors.

    Returns:
        A path, or a URL that begins with ``s3://``.

    Raises:
        UsageError: ``where`` is empty, a URL of another kind or with too few slashes, or begins with ``~`` of a user
            who has no home.
    """
    text = str(where)
    if text[:5].lower() == "s3://":
        return "s3://" + text[5:]
    return _local(text, what, "a path, file:///path or s3://bucket/prefix")


def local_file(where: str | Path, what: str) -> Path:
    """The local file or folder that ``where`` names: a path, or ``file:///path``.

    Args:
        where: As the user gave it.
        what: What is named, for errors, e.g. ``--out``.

    Returns:
        The path.

    Raises:
        UsageError: ``where`` is empty, a URL of another kind, or begins with ``~`` of a user who has no home.
    """
    return _local(str(where), what, "a path on this machine, or file:///path")


def _local(text: str, what: str, expected: str) -> Path:
    match = SCHEME.match(text)
    scheme, slashes = (match[1].lower(), match[2]) if match else ("", "")
    if match is not None and scheme == "file":
        return _of_file_url(text, what)
    if not text or slashes == "//" or (match is not None and scheme in REMOTE):
        # One slash is what a path makes of two: Path("s3://bucket") is s3:/bucket, and would be a folder named s3:.
        meant = f"{scheme}://{text[match.end() :]}" if match is not None and slashes == "/" else ""
        hint = f"did you mean {meant!r}? A folder of that name is './{text}'" if meant else ""
        raise UsageError(f"{what} {text!r}: expected {expected}", hint=hint)
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
        raise UsageError(f"{what} {text!r}: expected file:///absolute/path, with ? and # as %3F and %23")
    return Path(unquote(parts.path))
