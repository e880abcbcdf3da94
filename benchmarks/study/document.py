"""Text that is generated from result lines, between two markers of docs/method.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "method.md"


def placed(document: str, text: str, begin: str, end: str) -> str:
    """``document`` with ``text`` between its markers."""
    before, rest = document.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


def write_or_check(description: str | None, render: Callable[[], str], begin: str, end: str) -> int:
    """The command of a generated part: writes it, or with ``--check`` says whether it is there.

    Returns:
        The exit code.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--check", action="store_true")
    arguments = made.parse_args()
    old = DOCUMENT.read_text()
    new = placed(old, render(), begin, end)
    if arguments.check:
        if new != old:
            print(f"{DOCUMENT} does not say what the lines say: run it without --check", file=sys.stderr)
        return int(new != old)
    DOCUMENT.write_text(new)
    return 0
