"""Where things are kept that the user gave no place for.

What is derived from a store (selections, guidance, a mirror, what it cost) lies beside it. That is a convenience: where
nothing can be written beside a store it goes to a folder of the cache, and where nothing can be written there either it
is not kept. It is looked for in both.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gstds_cache.errors import UsageError
from gstds_cache.files.location import Location, local_file

SELECTIONS, GUIDANCE, MIRROR, COST = ".selections", ".guidance", ".mirror", ".cost.json"
"""What is derived from a store: added to its name, the name of a folder or file beside it."""

BLOCK = 4096  # bytes that a folder must take to be written to; a full disk often still takes an empty file


@dataclass(frozen=True)
class WritablePath:
    """Where something can be kept.

    Attributes:
        path: The place; None where nothing can be written.
        note: Why it is not the first choice, in words; empty where it is.
    """

    path: Path | None
    note: str = ""


def find_cache_root() -> Path | None:
    """Where stores without a path of their own live, or None where neither ``$GSTDS_CACHE`` nor a home says."""
    named = os.environ.get("GSTDS_CACHE")
    if named:
        return local_file(named, "$GSTDS_CACHE")
    try:
        return Path.home() / ".cache" / "gstds-cache"
    except RuntimeError:
        return None


def cache_root(instead: str = "") -> Path:
    """Where stores without a path of their own live: ``$GSTDS_CACHE``, else ``~/.cache/gstds-cache``.

    Args:
        instead: What a user can give instead of a default place, for the error, e.g. ``cache=STORE``.

    Returns:
        The folder, which need not exist.

    Raises:
        UsageError: ``$GSTDS_CACHE`` is not set, and no home is known.
    """
    root = find_cache_root()
    if root is None:
        raise UsageError(
            "there is no default place for stores: GSTDS_CACHE and HOME are not set, and this user id has no entry",
            hint=(f"give {instead}, or " if instead else "") + "set GSTDS_CACHE to a folder",
        )
    return root


def hashes_folder() -> Path | None:
    """Where hashes of files are remembered; None where there is no place for them."""
    root = find_cache_root()
    return None if root is None else root / "hashes"


def derived_paths(location: Location, suffix: str) -> list[Path]:
    """Where something derived from the store at ``location`` may be, in the order to look for it.

    Args:
        location: The store.
        suffix: What is kept there: :data:`SELECTIONS`, :data:`GUIDANCE`, :data:`MIRROR` or :data:`COST`.

    Returns:
        ``STORE`` + ``suffix`` for a directory; then a folder of the cache, named by a digest of the place. Empty for a
        bucket where there is no cache.
    """
    root = find_cache_root()
    if location.path is None:
        return [] if root is None else [root / "remote" / f"{_distinct(location.name, str(location))}{suffix}"]
    path = location.path if location.path.name not in {"", ".."} else location.path.resolve()
    found = [path.with_name(path.name + suffix)] if path.name else []  # "/" has nothing beside it
    # The same store by way of a symbolic link is the same store: what there is lies beside its own name.
    real = Path(_real(path))
    if found and path.is_symlink() and real.name:
        found.insert(0, real.with_name(real.name + suffix))
    return found if root is None else [*found, root / "derived" / f"{_distinct(path.name, _real(path))}{suffix}"]


def existing_derived(location: Location) -> list[Path]:
    """Every folder and file derived from the store at ``location`` that exists."""
    paths = [path for suffix in (SELECTIONS, GUIDANCE, MIRROR, COST) for path in derived_paths(location, suffix)]
    return [path for path in paths if os.path.lexists(path)]


def first_writable(folders: Sequence[Path]) -> WritablePath:
    """The first of ``folders`` that takes a file, made if need be.

    Args:
        folders: Folders, the best one first.

    Returns:
        The folder, and why it is not the first.
    """
    why: list[str] = []
    for folder in folders:
        problem = _why_not_writable(folder)
        if not problem:
            return WritablePath(folder, "; ".join(why))
        why.append(problem)
    return WritablePath(None, "; ".join(why) or "GSTDS_CACHE and HOME are not set")


def is_private(folder: Path) -> bool:
    """Make ``folder``, or look whose it is: where code is found that is then run, nobody else may be able to write."""
    user = os.geteuid()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022


def keep(write: Callable[[Path], None], paths: Sequence[Path]) -> WritablePath:
    """Write a small file at the first of ``paths`` that takes it.

    Args:
        write: Writes the file; raises OSError where that is impossible.
        paths: Paths, the best one first. Their folders are made.

    Returns:
        Where it is, and why not at the first.
    """
    why: list[str] = []
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as error:
            why.append(f"{path.parent}: {error.strerror or error}")
        else:
            return WritablePath(path, "; ".join(why))
    return WritablePath(None, "; ".join(why) or "GSTDS_CACHE and HOME are not set")


def _why_not_writable(folder: Path) -> str:
    """Make ``folder`` and try it with a file; empty where it takes one. A new folder that does not is removed again."""
    new = not os.path.isdir(folder)  # noqa: PTH112 - Path's raises where the way there may not be searched
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:  # has no name that a kill would leave behind
            trial.write(bytes(BLOCK))
            trial.flush()
    except OSError as error:
        if new:
            with suppress(OSError):
                folder.rmdir()
        return f"{folder}: {error.strerror or error}"
    return ""


def _distinct(name: str, whole: str) -> str:
    return f"{name[:40]}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:12]}"


def _real(path: Path) -> str:
    return os.path.realpath(path)
