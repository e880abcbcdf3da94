"""What a process runs: its versions, and a digest of this package's code. Two that differ do not share one run."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gstds_cache
from gstds_cache.errors import FingerprintMismatchError

LIBRARIES = ("gstds-cache", "torch", "torchvision", "timm", "pillow", "numpy", "numba", "faiss-gpu", "zarr")
CODE = "code of gstds_cache"


@cache
def versions() -> dict[str, str]:
    """The versions of what decides the bytes of a result, and the SHA-256 of this package's Python files."""
    found = {"python": platform.python_version(), CODE: _code()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _code() -> str:
    root, digest = Path(gstds_cache.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def require_same_versions(expected: Mapping[str, str], where: str) -> None:
    """Refuse to compute in this process what another one began.

    Args:
        expected: The versions there.
        where: This process, for the error.

    Raises:
        FingerprintMismatchError: A version here is another.
    """
    mine = versions()
    wrong = [name for name in expected if mine.get(name) != expected[name]]
    if wrong:
        lines = [f"{name}: got {mine.get(name, 'nothing')[:16]}, expected {expected[name][:16]}" for name in wrong]
        raise FingerprintMismatchError(
            f"{where} runs other versions than the process that began this run:\n    " + "\n    ".join(lines),
            hint="install the same versions everywhere, e.g. by one container image; then run the same command again",
        )
