"""What an audit's page shows: charts, and the images that a person has to look at to believe a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gstds_cache.auditing import charts
from gstds_cache.auditing.duplicates import Groups, Pairs
from gstds_cache.auditing.labels import Doubts, FlipTest
from gstds_cache.data.source import ImageSource
from gstds_cache.report.thumbnails import Thumbnail, thumbnail
from gstds_cache.store.reader import EmbeddingStore

SIDE = 96  # pixels
MOST_CELLS = 12  # of the joint counts


@dataclass(frozen=True)
class Tile:
    """One image with what there is to say of it.

    Attributes:
        image: The image.
        lines: Short lines below it.
    """

    image: Thumbnail
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Tiles that belong together, under a heading."""

    title: str
    tiles: tuple[Tile, ...]


@dataclass
class Part:
    """One question of an audit.

    Attributes:
        title: Its heading.
        text: What was found, and how to read it: sentences, one paragraph each.
        missing: Why there is no answer, or no images; empty where there is.
        charts: SVG texts.
        rows: Rows of tiles.
        table: Lines of a table, its head first.
    """

    title: str
    text: list[str] = field(default_factory=list)
    missing: str = ""
    charts: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    table: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Pictures:
    """Images of a store's rows.

    Attributes:
        store: The store.
        source: Its data set; None where there is none.
        why: Why not, and what to pass.
        ids: Its items' ids.
    """

    store: EmbeddingStore
    source: ImageSource | None
    why: str
    ids: Callable[[int], str]

    def label(self, label: int) -> str:
        """A class's name."""
        classes = self.store.classes
        return classes[label] if 0 <= label < len(classes) else "no label" if label < 0 else f"class {label}"

    def tile(self, row: int, *lines: str) -> Tile:
        """A row's image; without images its id stands for it."""
        title = f"{self.ids(row)} (row {row:,}, {self.label(int(self.store.labels[row]))})"
        image = Thumbnail("", title) if self.source is None else thumbnail(self.source, row, title, SIDE)
        return Tile(image, (*lines, *([] if image.uri else [self.ids(row)])))

    def labelled(self, row: int, *lines: str) -> Tile:
        """A row's image, its label first."""
        return self.tile(row, self.label(int(self.store.labels[row])), *lines)


def _pair_rows(pairs: Pairs, ones: Pictures, others: Pictures, most: int) -> list[Row]:
    rows = []
    for place in range(min(most, len(pairs))):
        same = ", the same bytes" if pairs.same_bytes[place] else ""
        tiles = ones.labelled(int(pairs.one[place])), others.labelled(int(pairs.other[place]))
        rows.append(Row(f"cosine {pairs.cosine[place]:.4f}{same}", tiles))
    return rows


def view_threshold(
    key: str, title: str, nearest: np.ndarray, threshold: float, above: Pairs, below: Pairs, ones: Pictures,
    others: Pictures
) -> Part:  # fmt: skip
    """A threshold on examples: the pairs just above it and just below it."""
    part = Part(
        title,
        [
            f"Pairs just above the threshold of {threshold:g} come first, then pairs just below it. If the first are "
            "no duplicates, raise it; if the second are duplicates, lower it."
        ],
        missing=ones.why or others.why,
    )
    if len(nearest):
        part.charts.append(charts.cosines(f"{key}-cosines", nearest, "cosine to the nearest row", threshold))
    for word, pairs in (("above", above), ("below", below)):
        rows = _pair_rows(pairs, ones, others, len(pairs))
        part.rows += [Row(f"{word}: {row.title}", row.tiles) for row in rows]
    return part


def view_groups(groups: Groups, pictures: Pictures, threshold: float, exact: bool, shown: int) -> Part:
    """Groups of near-duplicates: those whose labels differ first, then the largest."""
    labels = np.asarray(pictures.store.labels[groups.row], np.int64)
    begins = np.flatnonzero(groups.first)
    sizes = np.diff(np.append(begins, len(groups.row)))
    differ = np.array([len(np.unique(labels[at : at + n])) > 1 for at, n in zip(begins, sizes, strict=True)], bool)
    same, spare = int(groups.same_bytes.sum()), many(groups.spare, "row")
    part = Part(
        "Near-duplicates",
        [
            f"{many(groups.count, 'group')} of {many(len(groups.row), 'row')} whose cosine reaches {threshold:g}, "
            f"directly or by way of others; {many(same, 'row')} with the bytes of another. "
            f"{spare} could go, each a near-duplicate of one that stays. In {many(int(differ.sum()), 'group')} labels "
            "differ.",
            *([] if exact else ["Rows were compared with those of their nearest cells, not with all."]),
        ],
        missing=pictures.why if groups.count else "",
    )
    if not groups.count:
        part.text[0] = f"None: no two rows reach a cosine of {threshold:g}, or have the same bytes."
    order = np.lexsort((begins, -sizes, ~differ))[:shown]
    if len(order) < groups.count:
        part.text.append(
            f"{many(len(order), 'group')} of these are shown: those whose labels differ first, then the largest. All "
            "are in duplicates.parquet."
        )
    for number in order.tolist():
        at, size = int(begins[number]), int(sizes[number])
        tiles = tuple(
            pictures.labelled(int(groups.row[at + place]), f"{groups.cosine[at + place]:.3f}")
            for place in range(min(size, 8))
        )
        more = f", 8 of {size:,} shown" if size > 8 else ""
        part.rows.append(
            Row(f"group {number}: {many(size, 'row')}{', labels differ' * bool(differ[number])}{more}", tiles)
        )
    return part


def _renumbered(labels: np.ndarray, classes: Sequence[str], numbers: dict[str, int]) -> np.ndarray:
    """Labels by the numbers of their classes' names in ``numbers``, which grows; -1 where there is no name."""
    number = np.array([numbers.setdefault(name, len(numbers)) for name in classes], np.int64)
    named = (labels >= 0) & (labels < len(classes))
    return np.where(named, number[np.where(named, labels, 0)], -1)


def view_leaks(
    pairs: Pairs, below: Pairs, ones: Pictures, others: Pictures, threshold: float, shown: int
) -> Part:  # fmt: skip
    """Pairs of two stores, and those just below the threshold."""
    given = np.asarray(others.store.labels[pairs.other], np.int64), np.asarray(ones.store.labels[pairs.one], np.int64)
    if ones.store.classes and others.store.classes:  # by name: the same number may mean another class in each
        numbers: dict[str, int] = {}
        given = (
            _renumbered(given[0], others.store.classes, numbers),
            _renumbered(given[1], ones.store.classes, numbers),
        )
    conflict = int(((given[0] != given[1]) & (given[0] >= 0) & (given[1] >= 0)).sum())
    near = _pair_rows(below, ones, others, len(below))
    return Part(
        "Leaks",
        [
            f"{len(np.unique(pairs.one)):,} of {len(ones.store):,} rows of {ones.store.location} have a near-duplicate "
            f"(cosine {threshold:g} or more) among the {len(others.store):,} rows of {others.store.location}: "
            f"{many(len(pairs), 'pair')}, {int(pairs.same_bytes.sum()):,} of the same bytes. In "
            f"{many(conflict, 'pair')} labels differ.",
            f"On the left the row of {ones.store.location.name}, on the right that of {others.store.location.name}; "
            "pairs just below the threshold come last.",
        ],
        missing=ones.why or others.why,
        rows=[*_pair_rows(pairs, ones, others, shown), *(Row(f"below: {row.title}", row.tiles) for row in near)],
    )


def view_labels(
    doubts: Doubts, test: FlipTest | None, no_test: str, pictures: Pictures, rank: str, shown: int
) -> Part:  # fmt: skip
    """The labels most in doubt, and how far the doubts can be trusted."""
    share = doubts.doubted.mean()
    part = Part(
        "Labels in doubt",
        [
            f"{int(doubts.doubted.sum()):,} of {len(doubts.row):,} labels ({share:.1%}) are doubted: confident "
            "learning, with a probe that did not see the row, counts it for another class. Ranked by "
            f"{rank}.",
            flip_sentence(test) if test else f"How many of them are right was not measured: {no_test}.",
            "Under each of the most doubtful images are its label and the probability that the probe gives it, then "
            "the class that the probe suggests.",
        ],
        missing=pictures.why,
    )
    for place in range(min(shown, len(doubts.row))):
        row, own = int(doubts.row[place]), doubts.own[place]
        other = pictures.label(int(doubts.suggested[place]))
        tile = pictures.tile(row, f"{pictures.label(int(pictures.store.labels[row]))} {own:.0%}",
                             f"{other} {doubts.probability[place]:.0%}")  # fmt: skip
        part.rows.append(Row("", (tile,)))
    cells = [cell for cell in doubts.joint if cell[0] != cell[1]][:MOST_CELLS]
    if cells:
        part.table = [
            ("label", "counted for", "rows"),
            *((pictures.label(given), pictures.label(to), f"{n:,}") for given, to, n in cells),
        ]
    return part


def many(count: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def flip_sentence(test: FlipTest) -> str:
    """What labels flipped on purpose say of the doubts."""
    return (
        f"Measured on {test.flipped:,} labels flipped on purpose: {test.recall:.1%} of them are doubted; of the first "
        f"{test.flipped:,} of the ranking {test.precision:.1%} are flipped ones; of the {test.left:,} labels left as "
        f"they were {test.false_positive_rate:.1%} are doubted, wrong ones among them."
    )


def view_outliers(
    key: str, mean: np.ndarray, order: np.ndarray, rows: np.ndarray, k: int, pictures: Pictures, shown: int
) -> Part:  # fmt: skip
    """The rows farthest from their neighbours."""
    part = Part(
        "Outliers",
        [f"Rows by their mean cosine to their {k} nearest, the smallest first: what is unlike everything else."],
        missing=pictures.why,
        charts=[charts.cosines(f"{key}-means", mean, f"mean cosine to the {k} nearest rows")],
    )
    for place in order[:shown].tolist():
        part.rows.append(Row("", (pictures.labelled(int(rows[place]), f"{mean[place]:.3f}"),)))
    return part
