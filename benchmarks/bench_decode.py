"""Photographs of 12 megapixels: JPEGs decoded scaled down beside exactly, and other libraries' decoders beside Pillow.

    python benchmarks/bench_decode.py imagefolder:flowers [--images 96] [--megapixels 12]

Photographs are made from the images of a data set: half of them enlarged, with a sensor's noise, and half tiled with
enlarged and mirrored copies, which holds detail down to a few pixels. Measured: CPU seconds of one image from bytes to
the model's pixels; images embedded a second, in one process; the cosine between rows embedded exactly and scaled; and
which rows the default rule keeps of each. `gap` is how many times as large as what it is resized to a decoded image
still is: `scaled` takes 2. torchcodec and torchvision decode the same files at full size, where they are installed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import parser, report, spread, version_of
from PIL import Image, ImageOps

from gstds_cache.api.select_batches import select
from gstds_cache.config import DEFAULT_MODEL, EmbedConfig
from gstds_cache.data.decode import Decoding, decode_image
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders import preprocessing
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.store.reader import EmbeddingStore

GAPS = (1, 2, 4)
EPOCHS = 8


def photograph(image: Image.Image, size: tuple[int, int], number: int) -> Image.Image:
    """A large image made of a small one."""
    if number % 2:
        noise = np.random.default_rng(number).normal(0, 6, (256, 256, 1)).astype(np.int16)
        repeats = (-(-size[1] // 256), -(-size[0] // 256), 1)
        large = np.asarray(image.resize(size, Image.Resampling.BICUBIC)) + np.tile(noise, repeats)[: size[1], : size[0]]
        return Image.fromarray(np.clip(large, 0, 255).astype(np.uint8))
    tile = image.resize((image.width * 3, image.height * 3), Image.Resampling.BICUBIC)
    mirrored, whole = ImageOps.mirror(tile), Image.new("RGB", size)
    for y in range(0, size[1], tile.height):
        for x in range(0, size[0], tile.width):
            whole.paste(mirrored if (x // tile.width + y // tile.height) % 2 else tile, (x, y))
    return whole


def make(source: ImageSource, count: int, megapixels: float, folder: Path) -> list[Path]:
    """Photographs in one class folder."""
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5 / 16) * 16
    paths = []
    for number, row in enumerate(np.linspace(0, len(source) - 1, count).astype(int).tolist()):
        paths.append(folder / "photographs" / f"{number:04d}.jpg")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        photograph(source.image(row), (width, width * 3 // 4), number).save(paths[-1], quality=90)
    return paths


def cpu_ms(work: Callable[[bytes], object], files: list[bytes]) -> float:
    """Median CPU milliseconds for one file; the first is done twice, and counts once."""
    work(files[0])
    seconds = []
    for data in files:
        begun = time.process_time()
        work(data)
        seconds.append(time.process_time() - begun)
    return round(1000 * float(np.median(seconds)), 1)


def of_gaps(files: list[bytes], model: str) -> dict[str, Any]:
    """From bytes to the model's pixels, at several gaps: CPU time, and cosines with exact decoding."""
    encoder = open_encoder(model, allow_untrained=True)
    way = encoder.spec.preprocessing
    exact, found = None, {}
    for gap in (0, *sorted(GAPS, reverse=True)):
        how = Decoding(side=gap * int(np.max(way.resize)))
        pixels = torch.stack([way.pixels(decode_image(data, how)) for data in files])
        rows = encoder.embed(pixels)
        exact = rows if exact is None else exact
        cosines = (rows * exact).sum(dim=1)
        found[f"gap {gap}" if gap else "exact"] = {
            "cpu_ms": cpu_ms(lambda data, how=how: way.pixels(decode_image(data, how)), files),
            "cosine_min": round(float(cosines.min()), 5),
            "cosine_median": round(float(cosines.median()), 5),
        }
    for one in found.values():
        one["speed_over_exact"] = round(found["exact"]["cpu_ms"] / one["cpu_ms"], 2)
    return found


def of_libraries(files: list[bytes]) -> dict[str, Any]:
    """Decoding alone, at full size, by other libraries: CPU time, and how far their pixels are from Pillow's."""
    from torchvision import io

    ways: dict[str, Callable[[bytes], torch.Tensor]] = {
        "pillow": lambda data: torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1),
        "torchvision": lambda data: io.decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), io.ImageReadMode.RGB
        ),
    }
    if find_spec("torchcodec") is not None:
        from torchcodec.decoders import decode_jpeg

        ways["torchcodec"] = decode_jpeg
    found: dict[str, Any] = {"torchcodec": f"not installed ({version_of('torchcodec')})"}
    for name, decode in ways.items():
        apart = [(decode(data).int() - ways["pillow"](data).int()).abs() for data in files[:2]]
        found[name] = {
            "cpu_ms": cpu_ms(decode, files),
            "largest_difference_of_255": max(int(one.max()) for one in apart),
            "share_of_values_that_differ": round(max(float((one > 0).float().mean()) for one in apart), 5),
        }
    return found


def kept(store: EmbeddingStore, batch_size: int, knn: int, out: Path) -> np.ndarray:
    """Which rows the default rule keeps in each epoch [E, N], a quarter of each batch."""
    selection = select(
        store,
        keep=0.25,
        out=out,
        batch_size=batch_size,
        knn=knn,
        epochs=EPOCHS,
        guidance="none",
        progress=False,
        threads=1,
    )
    rows = np.zeros((EPOCHS, len(store)), bool)
    for batch in selection:
        rows[batch.epoch, batch.kept] = True
    return rows


def of_stores(uri: str, model: str, folder: Path, trials: int, batch_size: int, knn: int) -> dict[str, Any]:
    """The whole embedding, in turn exactly, scaled, and scaled to no more than what is needed (gap 1).

    Times are of the wall clock and of the CPU: on a machine that others use, the CPU's say more.
    """
    source = open_source(uri)
    rates: dict[str, list[float]] = {way: [] for way in ("exact", "scaled", "gap 1")}
    cpu_rates: dict[str, list[float]] = {way: [] for way in rates}
    stores: dict[str, EmbeddingStore] = {}
    for trial in range(trials):
        for way, rate in rates.items():
            decode = "exact" if way == "exact" else "scaled"
            config = EmbedConfig(model=model, decode=decode, workers=0, device="cpu", allow_untrained=True)  # type: ignore[arg-type]
            with gap_of(1 if way == "gap 1" else preprocessing.SCALED_GAP):
                begun = time.process_time()
                stores[way] = embed_dataset(source, config, where=folder / f"{way.replace(' ', '-')}-{trial}")
                cpu_rates[way].append(len(source) / (time.process_time() - begun))
            rate.append(stores[way].report.images_per_second)  # type: ignore[union-attr]
    rows = {
        name: store.gather(np.arange(len(store)), np.empty((len(store), store.spec.dim), np.float32))
        for name, store in stores.items()
    }
    chosen = {name: kept(store, batch_size, knn, folder / f"{name[:5]}.arrow") for name, store in stores.items()}
    found: dict[str, Any] = {
        "fingerprints_differ": stores["exact"].fingerprint != stores["scaled"].fingerprint,
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "images_per_cpu_second": {name: spread(values) for name, values in cpu_rates.items()},
        "kept_rows_of": {"batch_size": batch_size, "knn": knn, "epochs": EPOCHS},
    }
    for way in ("scaled", "gap 1"):
        cosines = (rows["exact"] * rows[way]).sum(axis=1)
        both = int((chosen["exact"] & chosen[way]).sum())
        found[way] = {
            "over_exact": spread([b / a for a, b in zip(rates["exact"], rates[way], strict=True)]),
            "over_exact_by_cpu": spread([b / a for a, b in zip(cpu_rates["exact"], cpu_rates[way], strict=True)]),
            "cosine": {"min": round(float(cosines.min()), 5), "median": round(float(np.median(cosines)), 5)},
            "kept_rows_overlap": round(both / int(chosen["exact"].sum()), 4),
        }
    return found


@contextmanager
def gap_of(gap: int) -> Iterator[None]:
    """Decode scaled at another gap than ours.

    Yields:
        Nothing.
    """
    before, preprocessing.SCALED_GAP = preprocessing.SCALED_GAP, gap
    try:
        yield
    finally:
        preprocessing.SCALED_GAP = before


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(trials=1)
    made.add_argument("dataset", nargs="?", default="digits")
    made.add_argument("--model", default=DEFAULT_MODEL)
    made.add_argument("--images", type=int, default=96)
    made.add_argument("--timed", type=int, default=12, help="images for the times of decoders")
    made.add_argument("--megapixels", type=float, default=12)
    made.add_argument("--batch-size", type=int, default=48)
    made.add_argument("--knn", type=int, default=5)
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.images, arguments.timed, arguments.model, arguments.megapixels = 16, 2, "timm:test_resnet", 1.6
        arguments.batch_size, arguments.knn = 8, 3
    keep_freed_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make(open_source(arguments.dataset), arguments.images, arguments.megapixels, folder / "images")
        files = [path.read_bytes() for path in paths[: arguments.timed]]
        result = {
            "model": arguments.model,
            "images": len(paths),
            "megapixels": arguments.megapixels,
            "megabytes": round(float(np.mean([len(data) for data in files])) / 1e6, 2),
            "to_pixels": of_gaps(files, arguments.model),
            "decoders_at_full_size": of_libraries(files),
            "embedding": of_stores(
                f"imagefolder:{folder / 'images'}",
                arguments.model,
                folder,
                arguments.trials,
                arguments.batch_size,
                arguments.knn,
            ),
        }
    report("decode", result, arguments)


if __name__ == "__main__":
    main()
