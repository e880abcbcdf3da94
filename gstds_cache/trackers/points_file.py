"""The points of a run on disk, a line each: what every tracker is told, whenever it can be told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gstds_cache.files.atomic import atomic_write, writing
from gstds_cache.trackers.tracker import Point


class PointsFile:
    """Appends points and reads them back. A line without its end was being written when a session was killed."""

    def __init__(self, path: Path) -> None:
        """Nothing is read or written yet; the folder exists when it is."""
        self.path = path

    def keep(self, step: int) -> tuple[int, Point | None]:
        """Drop the points after ``step``, and final ones: a resumed run has them again.

        Returns:
            How many points stay, and the last of them.
        """
        count, last, kept = 0, None, 0
        if not self.path.exists():
            return 0, None
        with self.path.open("rb") as file:
            for line in file:
                point = _parse(line)
                if point is None or point.final or point.step > step:
                    break
                count, last, kept = count + 1, point, kept + len(line)
        if kept < self.path.stat().st_size:
            with self.path.open("rb") as old, atomic_write(self.path, durable=False) as new:
                new.write(old.read(kept))
        return count, last

    def append(self, points: Sequence[Point]) -> None:
        """Append points.

        Raises:
            OSError: They cannot be written.
        """
        text = "".join(
            json.dumps({"step": point.step, **({"final": True} if point.final else {}), "values": point.values}) + "\n"
            for point in points
        )
        with writing(self.path), self.path.open("a") as file:
            file.write(text)

    def reader(self, first: int) -> PointsReader:
        """Reads the points from place ``first`` on, while others are appended."""
        return PointsReader(self.path, first)


class PointsReader:
    """Reads points in order, as they are asked for."""

    def __init__(self, path: Path, first: int) -> None:
        """Begin at place ``first``; the points before it may still have to be appended."""
        self._path, self._offset, self._skip = path, 0, first

    def take(self, count: int) -> list[Point]:
        """The next ``count`` points, all of which were appended before."""
        points: list[Point] = []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                point = _parse(line) if not self._skip else None
                self._offset += len(line)
                if self._skip:
                    self._skip -= 1
                    continue
                if point is not None:
                    points.append(point)
                if len(points) == count:
                    break
        return points


def _parse(line: bytes) -> Point | None:
    """A line's point; None of one that is damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        fields = json.loads(line)
        return Point(int(fields["step"]), dict(fields["values"]), bool(fields.get("final", False)))
    except (ValueError, KeyError, TypeError):
        return None
