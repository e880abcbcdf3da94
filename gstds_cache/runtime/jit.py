"""Where compiled code is kept, so that the next process need not compile again: where one can write, or nowhere.

numba looks for a place when a function is decorated, which is when it is imported, and ends the program where it finds
none: an installation that may only be read, and no home. Here compiled code is a convenience. What differs from numba's
own cache:

- Places are ``$NUMBA_CACHE_DIR``, the package's ``__pycache__``, a folder of the cache, a temporary folder; each only
  if it takes a file. The last two are this user's alone, since code that is found there is run.
- A file that cannot be read or written, is damaged, or holds the code of another signature (two processes that save at
  once can bring that about) costs compiling and nothing else.
- Code counts as stale when any file it may have been compiled from was edited; numba looks at the function's own alone,
  and takes no notice of what it calls, or of constants that it imports.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.sigutils import normalize_signature

from gstds_cache.files import mapped
from gstds_cache.files.derived import WritablePath, find_cache_root, first_writable, is_private
from gstds_cache.files.location import expanded

settings: Any = numba.config
PACKAGE = Path(__file__).parents[1]


class CodeCache(FunctionCache):
    """One function's compiled code on the disk."""

    def __init__(self, function: Callable[..., Any], folder: str) -> None:
        """Find the files.

        Args:
            function: What is compiled.
            folder: Where its code is kept; empty for numba's own place, the package's ``__pycache__``.

        Raises:
            RuntimeError: numba finds no place.
        """
        before = settings.CACHE_DIR
        settings.CACHE_DIR = folder  # read while the parent class looks for a place, and nowhere else
        try:
            super().__init__(function)
        finally:
            settings.CACHE_DIR = before
        # Named by what it was made from: processes of two versions at once would mix up each other's files.
        self._file_names = f"{self._impl.filename_base}-"
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=f"{self._file_names}{sources_digest()[:12]}",
            source_stamp=(self._impl.locator.get_source_stamp(), sources_digest()),
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled code of a signature, or None."""
        with suppress(Exception):  # a damaged file can raise anything in a pickle
            found = super().load_overload(sig, target_context)
            # Two processes that save at once, each its first signature, choose one name for both. Code for arrays of
            # another layout runs, and reads the wrong numbers.
            if found is not None and tuple(found.signature.args) == tuple(normalize_signature(sig)[0]):
                return found
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the compiled code of a signature, where that can be done."""
        with suppress(OSError):
            if not self._index_reads():
                self.flush()
            super().save_overload(sig, data)
            self._discard_older()

    def _discard_older(self) -> None:
        """Delete what was compiled from other versions of the sources."""
        ours = f"{self._file_names}{sources_digest()[:12]}."
        for path in Path(self._cache_path).glob(f"{glob.escape(self._file_names)}*.nb[ci]"):
            if not path.name.startswith(ours):
                path.unlink(missing_ok=True)

    def _index_reads(self) -> bool:
        try:
            self._cache_file._load_index()
        except Exception:  # a damaged file can raise anything in a pickle
            return False
        return True


def code_cache(function: Callable[..., Any]) -> CodeCache | None:
    """Where ``function``'s compiled code is kept, or None where there is no place."""
    in_tree = Path(function.__code__.co_filename).parent / "__pycache__"
    place = place_of_code(in_tree)
    if place.path is None:
        return None
    with suppress(RuntimeError):  # numba finds none all the same: a disk that filled up just now
        return CodeCache(function, "" if place.path == in_tree else str(place.path))
    return None


def why_not_kept() -> str:
    """Why compiled code is kept nowhere, and what to set; empty where it is kept."""
    place = place_of_code(Path(__file__).parent / "__pycache__")
    if place.path is not None:
        return ""
    return (
        f"compiled code is kept nowhere, so each process compiles anew ({place.note}): "
        "set NUMBA_CACHE_DIR to a folder that can be written"
    )


@cache
def place_of_code(in_tree: Path) -> WritablePath:
    """The folder for compiled code.

    Args:
        in_tree: The ``__pycache__`` of the source.

    Returns:
        It, or the place before it that the user named, or one after it; None where none can be written.
    """
    first = first_writable(
        [*([expanded(settings.CACHE_DIR, "NUMBA_CACHE_DIR")] if settings.CACHE_DIR else []), in_tree]
    )
    if first.path is not None:
        return first
    root, temporary = find_cache_root(), mapped.folder()
    user = os.geteuid()
    folders = [root / f"compiled-{user}"] if root is not None else []
    folders += [Path(temporary) / f"gstds-cache-compiled-{user}"] if temporary is not None else []
    place = first_writable([folder for folder in folders if is_private(folder)])
    return WritablePath(place.path, "; ".join(filter(None, (first.note, place.note))))


@cache
def sources_digest() -> str:
    """SHA-256 of what compiled code is made from: all of graph/ and spectral/, and the compiled rules."""
    digest = hashlib.sha256()
    for path in sorted(path for part in ("graph", "spectral", "selection") for path in (PACKAGE / part).glob("*.py")):
        text = path.read_bytes()
        if path.parent.name != "selection" or b"@compiled" in text:
            digest.update(path.name.encode() + b"\0" + text + b"\0")
    return digest.hexdigest()
