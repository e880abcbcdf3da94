"""A selection to where it is wanted: from beside its store where it is finished already, else as it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gstds_cache.places import beside
from gstds_cache.selection.selected import Selection
from gstds_cache.stream.pipe import replay, write_pipe
from gstds_cache.stream.schema import ByteStream
from gstds_cache.stream.writer import copy_file, header_of, is_finished, stored_header, write_file

if TYPE_CHECKING:
    from gstds_cache.selection.run import BatchSelector

Say = Callable[[str], None]


def kept_path(selector: BatchSelector) -> Path:
    """Where a store keeps this selection: a file in ``STORE.selections/``, by its digest."""
    return beside(selector.store.location, ".selections") / f"{selector.digest[:16]}.arrow"


def deliver_kept(selector: BatchSelector, out: Path | ByteStream, *, replace: bool, say: Say) -> bool:
    """Deliver a selection that is finished already, computing nothing.

    Args:
        selector: The run that would make it.
        out: A file, or a pipe.
        replace: Whether a file that holds something else may be replaced.
        say: Told where it was found.

    Returns:
        Whether it was finished; where not, nothing was written.

    Raises:
        UsageError: The file holds something else, and ``replace`` is off.
        BrokenPipeError: The reader of the pipe went away.
    """
    kept = kept_path(selector)
    stored = stored_header(kept) == header_of(selector)
    if not isinstance(out, Path):
        if stored:
            say(f"this selection is in {kept} already, nothing is computed")
            replay(kept, out)
        return stored
    if is_finished(selector, out, replace=replace):
        say(f"this selection is in {out} already, nothing was computed")
        return True
    if out != kept and stored and is_finished(selector, kept, replace=True):
        copy_file(kept, out)
        say(f"this selection was in {kept} already, and was copied")
        return True
    return False


def deliver_computed(selector: BatchSelector, out: Path | ByteStream, *, note: Say) -> Iterator[Selection]:
    """Compute a selection into a file or a pipe, and keep it beside its store; an interrupted run's batches stay.

    Args:
        selector: The run.
        out: A file, or a pipe.
        note: Told why it is not kept, where it cannot be; it is delivered all the same.

    Yields:
        The batches that were computed now.

    Raises:
        IncompleteError: Another process is writing the same file.
        BrokenPipeError: The reader of the pipe went away.
    """
    kept = kept_path(selector)
    if not isinstance(out, Path):
        yield from write_pipe(selector, out, keep=kept, note=note)
        return
    yield from write_file(selector, out)
    if out != kept:
        try:
            copy_file(out, kept)
        except OSError as error:
            note(f"not kept beside the store for other runs: {error}")
