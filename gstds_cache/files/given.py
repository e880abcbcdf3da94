"""Files that a user gives (weights, scores, ratios): whatever reading one raises is one error about that file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gstds_cache.errors import UsageError, in_words


def require_file(path: Path, what: str, kind: type[UsageError] = UsageError, hint: str = "check the path") -> None:
    """Refuse what cannot be opened as a file: a reader's own words for that are often about something else.

    Args:
        path: Where the file is.
        what: What the file is, e.g. ``weights file``.
        kind: Class of the error.
        hint: What to do.

    Raises:
        UsageError: Of class ``kind``: no such file, a folder, a pipe, an empty file, or one that may not be read.
    """
    try:
        is_file, exists = path.is_file(), path.exists()
        if is_file:
            with path.open("rb") as file:
                empty = not file.read(1)
    except (OSError, ValueError) as error:
        raise kind(f"{what} cannot be read: {path}: {getattr(error, 'strerror', None) or error}", hint=hint) from error
    if not exists:
        raise kind(f"{what} not found: {path}", hint=hint)
    if not is_file:
        raise kind(
            f"{what}: got the {'folder' if path.is_dir() else 'device or pipe'} {path}, expected a file", hint=hint
        )
    if empty:
        raise kind(f"{what} is empty: {path}", hint=hint)


@contextmanager
def reading(path: Path, expected: str, kind: type[UsageError] = UsageError, hint: str = "") -> Iterator[None]:
    """Turn whatever is raised while a user's file is read into one error.

    Readers of files from elsewhere raise nearly anything: of pickles UnpicklingError, KeyError, EOFError; of archives
    RuntimeError, BadZipFile; of headers SyntaxError, TypeError; and MemoryError where a damaged size is believed.

    Args:
        path: The file.
        expected: What it should be, e.g. ``a .npy file``.
        kind: Class of the error.
        hint: What to do.

    Yields:
        Nothing; the file is read inside.

    Raises:
        UsageError: Of class ``kind``.
    """
    try:
        yield
    except kind:
        raise
    except Exception as error:
        raise kind(f"{path} cannot be read as {expected}: {in_words(error)}", hint=hint) from error
