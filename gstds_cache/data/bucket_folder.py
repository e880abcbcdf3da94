"""``imagefolder:s3://bucket/prefix``: class folders in a bucket; the same items in the same order as on disk."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

import numpy as np

from gstds_cache.data.files import IMAGE_EXTENSIONS, has_image_extension
from gstds_cache.data.names import Names
from gstds_cache.data.objects import Objects, ObjectSource
from gstds_cache.data.shards import object_signature
from gstds_cache.errors import DatasetError
from gstds_cache.files import mapped
from gstds_cache.files.bucket import Bucket
from gstds_cache.files.location import Location


def open_bucket_folder(uri: str, where: str, _params: Mapping[str, str] | None = None) -> ObjectSource:
    """Open class folders in a bucket: PREFIX/CLASS/IMAGE, images anywhere below a class.

    The bucket is listed once. Ids, labels and order are those that the same files have on disk
    (:func:`gstds_cache.data.folder.open_folder`), so that both are one data set. Names that begin with a dot are passed
    over. A class is one that has an image: there are no empty folders in a bucket.

    Args:
        uri: The data set as the user named it.
        where: ``s3://bucket/prefix``.

    Returns:
        The source.

    Raises:
        UsageError: ``where`` names no place in a bucket.
        DatasetError: There is no class folder with an image.
        StoreUnavailableError: The bucket is not there, does not answer, or refuses.
    """
    bucket = Bucket(Location.parse(where, f"data set {uri!r}"), "data sets")
    listing = _Listing(bucket)
    listed = Names.of(listing.images_found())  # one pass, and no name stays in memory
    names, etags = (Names.of(pair.split("\n")[place] for pair in listed) for place in (0, 1))
    if not names:
        got = f"{listing.stray:,} images right there" if listing.stray else "no image"
        raise DatasetError(
            f"image folder {where!r}: got {got} and no class folder with one, expected PREFIX/CLASS/IMAGE, images that "
            f"end in {' '.join(IMAGE_EXTENSIONS)}",
            hint="check the prefix: it is the folder that the class folders lie in",
        )
    order = listing.order(names)
    if order is not None:
        names, etags = (Names.of(all_of[row] for row in order.tolist()) for all_of in (names, etags))
    signatures = mapped.zeros((len(names), 4), np.int64)
    for start in range(0, len(names), _ROWS):
        part = slice(start, start + _ROWS)
        rows = np.arange(len(names))[part] if order is None else order[part]
        signatures[part] = np.frombuffer(listing.signatures, np.int64).reshape(-1, 4)[rows]
    classes = sorted(listing.images, key=str.encode)
    labels = mapped.zeros((len(names),), np.int64)
    # By the bytes of whole names a-b/1.png comes before a/1.png, and the class a before a-b.
    met = sorted(range(len(classes)), key=lambda label: f"{classes[label]}/".encode())
    labels[:] = np.repeat(met, [listing.images[classes[label]] for label in met])
    return ObjectSource(
        uri=uri,
        kind="imagefolder",
        ids=names,
        labels=labels,
        objects=Objects(f"{bucket.location}/", names, signatures, etags),
        bucket=bucket,
        classes=tuple(classes),
        notes=tuple(listing.notes()),
    )


_ROWS = 1 << 16


class _Listing:
    """One listing of a bucket: images by class, and counts of what was passed over."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.images: Counter[str] = Counter()
        self.signatures = array("q")
        self.stray = 0
        self._ignored: Counter[str] = Counter()

    def images_found(self) -> Iterator[str]:
        """Go through the objects.

        Yields:
            Name and etag of every image, on a line each, in the order of the service.
        """
        for entry in self._bucket.entries():
            name, parts = entry.path, entry.path.split("/")
            if any(part.startswith(".") for part in parts) or "\n" in name:
                continue
            if not has_image_extension(name):
                self._ignored[PurePosixPath(name).suffix.lower()] += 1
            elif len(parts) == 1:
                self.stray += 1
            else:
                self.images[parts[0]] += 1
                self.signatures.extend(object_signature(entry))
                yield f"{name}\n{entry.etag}"

    def order(self, names: Names) -> np.ndarray | None:
        """The place of each item in the listing; None where it is by the bytes of names, as most services list."""
        before = b""
        for name in names:
            key = name.encode()
            if key < before:
                return np.array(sorted(range(len(names)), key=lambda row: names[row].encode()), np.int64)
            before = key
        return None

    def notes(self) -> Iterator[str]:
        """What the user should be told.

        Yields:
            A note each.
        """
        if self.stray:
            yield f"ignored {self.stray:,} image{'s' if self.stray > 1 else ''} outside any class folder"
        if self._ignored:
            kinds = ", ".join(suffix or "no extension" for suffix, _ in self._ignored.most_common(5))
            yield f"ignored {self._ignored.total():,} objects without an image extension ({kinds})"
