"""Where things are kept that the user gave no place for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_root() -> Path:
    """Where stores without a path of their own live: ``$GSTDS_CACHE``, else ``~/.cache/gstds-cache``."""
    return Path(os.environ.get("GSTDS_CACHE") or Path.home() / ".cache" / "gstds-cache")


def beside(where: str | Path, suffix: str) -> Path:
    """The local folder for what is derived from the store at ``where`` and may be deleted at any time.

    Args:
        where: A store: a directory, or a URL.
        suffix: What is kept there, e.g. ``.selections``.

    Returns:
        ``STORE`` + ``suffix`` for a directory; for a bucket, a folder of the cache named by a digest of the URL.
    """
    if isinstance(where, str) and where.startswith("s3://"):
        name = where.rstrip("/").rpartition("/")[2]
        return (
            cache_root()
            / "remote"
            / f"{name[:40]}-{hashlib.sha256(where.rstrip('/').encode()).hexdigest()[:12]}{suffix}"
        )
    path = Path(where)
    path = path if path.name not in {"", ".."} else path.resolve()
    return path.with_name(path.name + suffix)
