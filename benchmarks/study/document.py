"""Text that is generated from result lines, between two markers of a document."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def placed(document: str, text: str, begin: str, end: str) -> str:
    """``document`` with ``text`` between its markers."""
    before, rest = document.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


def write_or_check(description: str | None, document: Path, render: Callable[[], str], begin: str, end: str) -> int:
    """The command of a generated part of ``document``: writes it, or with ``--check`` says if it is there.

    Returns:
        The exit code.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--check", action="store_true")
    arguments = made.parse_args()
    old = document.read_text()
    new = placed(old, render(), begin, end)
    if arguments.check:
        if new != old:
            print(f"{document} does not say what the lines say: run it without --check", file=sys.stderr)
        return int(new != old)
    document.write_text(new)
    return 0
