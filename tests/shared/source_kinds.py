"""The kinds of data sets that one contract holds for (tests/data/test_source_contract.py): each writes real files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from s3_api import BUCKET, upload

CLASSES = ("cats", "dogs", "owls")


@dataclass(frozen=True)
class Item:
    """One image file: its bytes, and its class, of ``CLASSES``."""

    data: bytes
    label: int


def items(count: int, *, broken: Sequence[int] = ()) -> list[Item]:
    """PNGs of different sizes, sorted by class as class folders are; of ``broken`` ones the first half."""
    made = []
    for row in range(count):
        rng = np.random.default_rng(row)
        pixels = rng.integers(0, 256, (8 + row % 3, 10, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        data = file.getvalue()
        made.append(Item(data[: len(data) // 2] if row in broken else data, row * len(CLASSES) // count))
    return made


@dataclass(frozen=True)
class Kind:
    """How a data set of a kind is written.

    Attributes:
        write: Writes items into an empty folder and returns what a user passes to open them: a name, or an object.
        labelled: Whether it has labels.
        named: Whether its classes have names.
        needs: A library without which it cannot be written.
        on_disk: Whether it lies in files, whose hashes are kept from run to run.
        encoded: Whether an item's payload is the image file's bytes.
        in_bucket: Whether it lies in the bucket of the tests' S3 API, which the environment then has to name.
    """

    write: Callable[[Path, Sequence[Item]], Any]
    labelled: bool = True
    named: bool = True
    needs: str = ""
    on_disk: bool = True
    encoded: bool = True
    in_bucket: bool = False

    @property
    def missing(self) -> bool:
        return bool(self.needs) and find_spec(self.needs) is None


def class_folders(folder: Path, made: Sequence[Item]) -> str:
    for row, item in enumerate(made):
        path = folder / CLASSES[item.label] / f"{row:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.data)
    return f"imagefolder:{folder}"


def plain_folder(folder: Path, made: Sequence[Item]) -> str:
    for row, item in enumerate(made):
        path = folder / f"{row // 7:04d}" / f"{row:05d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(item.data)
    return f"folder:{folder}"


def file_list(folder: Path, made: Sequence[Item], *, header: bool = True) -> str:
    plain_folder(folder, made)
    with (folder / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        if header:
            rows.writerow(["label", "path"])
        for row, item in enumerate(made):
            path = f"{row // 7:04d}/{row:05d}.png"
            rows.writerow([CLASSES[item.label], path] if header else [path, item.label])
    return f"list:{folder / 'list.csv'}"


def table(made: Sequence[Item], *, struct: bool = False) -> Any:
    import pyarrow as pa

    images: Any = [item.data for item in made]
    if struct:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = pa.array([{"bytes": item.data, "path": f"{row}.png"} for row, item in enumerate(made)], kind)
    return pa.table({"caption": ["x"] * len(made), "image": images, "label": [CLASSES[item.label] for item in made]})


def parquet(folder: Path, made: Sequence[Item], *, struct: bool = False, files: int = 1) -> str:
    import pyarrow.parquet as pq

    whole, each = table(made, struct=struct), -(-len(made) // files)
    for number in range(files):
        pq.write_table(whole.slice(number * each, each), folder / f"part-{number}.parquet", row_group_size=6)
    return f"parquet:{folder}" if files > 1 else f"parquet:{folder}/part-0.parquet"


def arrow(folder: Path, made: Sequence[Item], *, compression: str | None = None) -> str:
    import pyarrow as pa

    whole = table(made)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(folder / "images.arrow", whole.schema, options=options) as writer:
        for batch in whole.to_batches(6):
            writer.write_batch(batch)
    return f"arrow:{folder / 'images.arrow'}?label=label"


def hugging_face_object(made: Sequence[Item]) -> Any:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    columns = {
        "image": [{"bytes": item.data, "path": None} for item in made],
        "label": [item.label for item in made],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def hugging_face(folder: Path, made: Sequence[Item], *, how: str) -> Any:
    import datasets

    # What the library writes as a bar would be a line of the test's own output.
    datasets.disable_progress_bars()
    dataset = hugging_face_object(made)
    if how == "saved":
        dataset.save_to_disk(str(folder / "saved"))
        return f"hf:{folder / 'saved'}"
    if how == "parquet":
        dataset.to_parquet(str(folder / "train-00000-of-00001.parquet"))
        return f"parquet:{folder}"
    return dataset


def shards(folder: Path, made: Sequence[Item], *, label: str = "cls") -> str:
    import webdataset

    each = 10 if len(made) < 100 else 500

    # Written one by one: webdataset's ShardWriter prints the name of each shard.
    for number, start in enumerate(range(0, len(made), each)):
        with webdataset.TarWriter(str(folder / f"shard-{number:04d}.tar")) as writer:
            for row in range(start, min(start + each, len(made))):
                item = made[row]
                labels = {"cls": item.label, "json": {"id": row, "about": {"class": CLASSES[item.label]}}}
                writer.write({"__key__": f"{row:07d}", "png": item.data, label: labels[label]})
    pattern = f"{folder}/shard-{{0000..{number:04d}}}.tar"
    return f"webdataset:{pattern}" if label == "cls" else f"webdataset:{pattern}?label=about.class"


def in_bucket(write: Callable[[Path, Sequence[Item]], str], folder: Path, made: Sequence[Item]) -> str:
    """What ``write`` writes to the folder, in the bucket."""
    name = write(folder, made)
    prefix = f"{folder.parent.name}-{folder.name}"
    for path in folder.rglob("*.*"):
        upload(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
    return name.replace(str(folder), f"s3://{BUCKET}/{prefix}")


class MapStyle:
    """A data set object of a user's own."""

    def __init__(self, made: Sequence[Item]) -> None:
        self.made = made

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.made[row].data)), self.made[row].label


def map_style(_folder: Path, made: Sequence[Item]) -> Any:
    return MapStyle(made)


KINDS: dict[str, Kind] = {
    "class folders": Kind(class_folders),
    "folder": Kind(plain_folder, labelled=False),
    "list": Kind(file_list),
    "list without header": Kind(partial(file_list, header=False), named=False),
    "parquet": Kind(parquet),
    "parquet files of structs": Kind(partial(parquet, struct=True, files=3)),
    "parquet by datasets": Kind(partial(hugging_face, how="parquet"), needs="datasets"),
    "arrow": Kind(arrow),
    "arrow compressed": Kind(partial(arrow, compression="zstd")),
    "hf saved": Kind(partial(hugging_face, how="saved"), needs="datasets"),
    "hf object": Kind(partial(hugging_face, how="object"), needs="datasets", on_disk=False),
    "webdataset": Kind(shards, named=False, needs="webdataset"),
    "webdataset in a bucket": Kind(
        partial(in_bucket, partial(shards, label="json")), needs="webdataset", in_bucket=True
    ),
    "class folders in a bucket": Kind(partial(in_bucket, class_folders), in_bucket=True),
    "object": Kind(map_style, named=False, on_disk=False, encoded=False),
}
"""A kind that is added here is held to the whole contract."""
