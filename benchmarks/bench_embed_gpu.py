"""Embedding photographs on a GPU, once it is under way, over the slower of the bare forward pass and the bare decode.

    python benchmarks/bench_embed_gpu.py [--sizes 0.2 12] [--images 16384 1536] [--device cuda]

The photographs are scikit-learn's two, cut and resized to so many megapixels in many shapes, with a sensor's noise, and
saved as JPEGs of quality 90; each file is there several times, as links. Both decoders run in the same process on the
same files: Pillow's workers on all cores, and nvJPEG. The bare decode is the decoder alone: as many processes as cores,
each by itself; or nvJPEG and the resizing on the device, fed by processes that read. Where the device decodes small
images, decoder and model share it, and neither can be as fast as by itself: ``decode_and_forward`` is both side by
side, files in memory, and nothing else. What is measured of a run is its steady state, the second half of its images:
what was decoded ahead while the model started is not counted, and the start-up is told apart.

Every part is written as it ends. On a CPU (``--device cpu``, and ``--smoke``) torchvision's decoder stands for nvJPEG.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin would take the cores from those that decode

import numpy as np
import torch
from harness import parser, report, spread
from PIL import Image

from gstds_cache.config import DEFAULT_MODEL, EmbedConfig
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.embedding import decoding, device_decoding
from gstds_cache.embedding.device_resizing import Resizer
from gstds_cache.embedding.forward import ForwardPasses
from gstds_cache.embedding.job import BATCH_SIZE
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.runtime.allocator import keep_freed_memory
from gstds_cache.runtime.devices import describe_device, own_stream, resolve_device
from gstds_cache.runtime.threads import cores

SHAPES = (1.0, 4 / 3, 3 / 2, 16 / 9)  # longer over shorter side
DIFFERENT = {"small": 48, "large": 12}  # files that differ, below and from a megapixel on
LARGE_BATCH = 64
"""Images of a batch from a megapixel on: a run of hundreds of them has more than a few batches."""


def photograph(megapixels: float, number: int) -> bytes:
    """A JPEG of so many megapixels: a part of a real photograph, enlarged, with noise."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(number)
    whole = Image.fromarray(load_sample_images().images[number % 2])
    shape = SHAPES[number % len(SHAPES)] ** (1 if number % 3 else -1)
    width, height = round((megapixels * 1e6 * shape) ** 0.5), round((megapixels * 1e6 / shape) ** 0.5)
    part = min(whole.width / shape, whole.height) * rng.uniform(0.7, 1.0)
    left, top = rng.uniform(0, whole.width - part * shape), rng.uniform(0, whole.height - part)
    image = whole.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + part * shape, top + part))
    tile = rng.normal(0, 8, (512, 512, 3)).astype(np.int16)
    noise = np.tile(tile, (-(-height // 512), -(-width // 512), 1))[:height, :width]
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=90
    )
    return file.getvalue()


def make_files(folder: Path, megapixels: float, images: int) -> float:
    """A data set of so many files, most of them links; returns the mean size of a file in bytes."""
    different = min(images, DIFFERENT["large" if megapixels >= 1 else "small"])
    (folder / "all").mkdir(parents=True)
    with multiprocessing.get_context("fork").Pool(min(cores(), different)) as pool:
        for number, data in enumerate(pool.imap(partial(photograph, megapixels), range(different))):
            (folder / "all" / f"{number:06d}.jpg").write_bytes(data)
    for number in range(different, images):
        os.link(folder / "all" / f"{number % different:06d}.jpg", folder / "all" / f"{number:06d}.jpg")
    return sum((folder / "all" / f"{number:06d}.jpg").stat().st_size for number in range(different)) / different


def decode_some(source: ImageSource, encoder: Encoder, seconds: float, first: int) -> float:
    """Images per second that one process decodes, while others do the same."""
    torch.set_num_threads(1)
    done, begun = 0, time.perf_counter()
    for row in cycle(range(len(source))):
        if row >= first or done:
            encoder.spec.preprocessing.pixels(source.image(row))
            done += 1
            if time.perf_counter() - begun > seconds:
                return done / (time.perf_counter() - begun)
    raise AssertionError("a cycle has no end")


def decode_on_all_cores(source: ImageSource, encoder: Encoder, seconds: float) -> dict[str, float]:
    """Images per second that Pillow decodes: one process alone, and one for every core."""
    with multiprocessing.get_context("fork").Pool(cores()) as pool:
        alone = pool.apply(decode_some, (source, encoder, seconds / 3, 0))
        places = np.linspace(0, len(source) - 1, cores()).astype(int).tolist()
        together = pool.starmap(decode_some, [(source, encoder, seconds, place) for place in places], chunksize=1)
    return {"one_process": alone, "all_cores": sum(together)}


def decode_on_device(
    source: ImageSource, encoder: Encoder, device: torch.device, size: int, seconds: float, *, large: bool
) -> dict[str, float]:
    """Images per second that the device decodes: files that lie in memory; and read, decoded and resized."""
    images = len(source)
    files = [
        torch.frombuffer(bytearray(source.payload(row)), dtype=torch.uint8)
        for row in range(min(14 if large else device_decoding.PART, images))  # as many as a part of a run holds
    ]
    assert None not in [image if image is None else 0 for image in device_decoding.decode_jpegs(files, device)]
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds / 2:
        device_decoding.decode_jpegs(files, device)
        done += len(files)
    alone = done / (time.perf_counter() - begun)
    rows = [range(start, min(start + size, images)) for start in range(0, images, size)]
    workers = decoding.start_workers(source, encoder, cores())
    times: list[tuple[float, int]] = []
    with closing(decoding.open_batches(workers, encoder, rows, device)) as batches:
        for batch in batches:
            batch.pixels[:1].cpu()  # until it is there
            times.append((time.perf_counter(), len(batch.rows)))
    return {"decoder_alone": alone, "read_decoded_resized": steady_rate(cumulative(times))}


def decode_and_forward(source: ImageSource, encoder: Encoder, device: torch.device, size: int, seconds: float) -> float:
    """Images per second of decoder, resizing and model side by side on one device, and nothing else.

    Files lie in memory, features stay on the device, no pixel is checked: what is left for a run to lose.
    """
    part = min(device_decoding.PART, size, len(source))
    files = [torch.frombuffer(bytearray(source.payload(row)), dtype=torch.uint8) for row in range(part)]
    cuda = device.type == "cuda"
    decoding_stream = own_stream(device) if cuda else None
    resizer, forward = Resizer(encoder.spec.preprocessing, device), ForwardPasses(encoder, device)

    def decode() -> list[torch.Tensor | None]:
        with device_decoding.decoding_paused(), torch.cuda.stream(decoding_stream):  # not while a pass is recorded
            return device_decoding.decode_jpegs(files, device)

    with ThreadPoolExecutor(1) as thread:
        decoding_now = deque(thread.submit(decode) for _ in range(device_decoding.DECODES_AHEAD))
        queued: deque[tuple[torch.cuda.Event | None, list[Any]]] = deque()
        done, begun = 0, 0.0
        while not begun or time.perf_counter() - begun < seconds:
            pixels = torch.empty((size // part * part, *encoder.input_shape), dtype=torch.uint8, device=device)
            held: list[Any] = []
            for start in range(0, len(pixels), part):
                images = decoding_now.popleft().result()
                decoding_now.append(thread.submit(decode))
                resizer.resize(
                    [(place, image, 1) for place, image in enumerate(images, start) if image is not None], pixels
                )
                held.append(images)
            forward(pixels)
            queued.append((torch.cuda.current_stream(device).record_event() if cuda else None, held))
            if len(queued) > 1:
                event, _ = queued.popleft()
                if event is not None:
                    event.synchronize()
                done += len(pixels)
                begun, done = (begun, done) if begun else (time.perf_counter(), 0)  # from the second batch on
        return done / (time.perf_counter() - begun)


def cumulative(times: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Times, and images until then."""
    done = np.cumsum([count for _, count in times]).tolist()
    return [(moment, count) for (moment, _), count in zip(times, done, strict=True)]


def steady_rate(times: list[tuple[float, int]]) -> float:
    """Images per second of the second half."""
    later = [(moment, count) for moment, count in times if count >= times[-1][1] / 2]
    (begun, before), (ended, after) = later[0], later[-1]
    return (after - before) / (ended - begun) if after > before else float("nan")


def forward_rate(model: str, device: torch.device, size: int, seconds: float) -> float:
    """Images per second of the bare forward pass, pixels and features staying on the device."""
    encoder = open_encoder(model, allow_untrained=True).to(device)
    pixels = torch.randint(0, 256, (size, *encoder.input_shape), dtype=torch.uint8, device=device)

    def run(passes: int) -> float:
        begun = time.perf_counter()
        for _ in range(passes):
            encoder.queue(pixels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    run(3)
    passes = max(2, round(seconds / (run(2) / 2)))
    return passes * size / run(passes)


def embedding(source: ImageSource, config: EmbedConfig) -> tuple[dict[str, Any], np.ndarray]:
    """One run into a new store: its steady state, and what came before; and some rows."""
    times, notes = list[tuple[float, int]](), list[str]()

    def progress(phase: str, done: int, _total: int, _shares: object) -> None:
        if phase == "embed" and (not times or done > times[-1][1]):
            times.append((time.perf_counter(), done))

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store = embed_dataset(source, config, where=Path(folder) / "store", progress=progress, notify=notes.append)
        rows = store.gather(np.arange(min(len(source), 256)), np.empty((min(len(source), 256), store.spec.dim), "f4"))
    done = store.report
    assert done is not None
    assert done.ok == len(source), f"{len(source) - done.ok} images were not decoded"
    return {
        "images_per_second": steady_rate(times),
        "images": done.embedded,
        "batch_size": done.batch_size,
        "workers": done.workers,
        "seconds_before_the_first_batch": times[0][0] - begun,
        "seconds": done.seconds,
        "shares": done.shares,
        "notes": notes,
    }, rows


def measure(source: ImageSource, arguments: argparse.Namespace, megapixels: float) -> Iterator[dict[str, Any]]:
    """All figures of one size of photographs, part by part.

    Yields:
        What there is so far.
    """
    device, model = arguments.resolved, arguments.model
    size = BATCH_SIZE[device.type] if megapixels < 1 else min(LARGE_BATCH, BATCH_SIZE[device.type])
    encoder = open_encoder(model, allow_untrained=True)
    found: dict[str, Any] = {"decode": {}}
    decoders = list(arguments.decoders)
    if "pillow" in decoders:
        found["decode"]["pillow"] = decode_on_all_cores(source, encoder, arguments.seconds)
        yield found
    found["forward"] = forward_rate(model, device, size, arguments.seconds / 2)
    if device.type == "cuda":  # what is left on the table: with it a row's last bits would differ from run to run
        torch.backends.cudnn.benchmark = True
        found["forward_with_cudnn_benchmark"] = forward_rate(model, device, size, arguments.seconds / 2)
        torch.backends.cudnn.benchmark = False
    yield found
    by_device = open_encoder(model, allow_untrained=True).to(device)
    if "nvjpeg" in decoders:
        decoding.decode_by(by_device, "nvjpeg", device)
        try:
            decoding.try_decoder(by_device, device)
            found["decode"]["nvjpeg"] = decode_on_device(
                source, by_device, device, size, arguments.seconds, large=megapixels >= 1
            )
        except Exception as error:  # A machine whose GPU decodes nothing still embeds with Pillow.
            found["decode"]["nvjpeg"] = {"error": f"{type(error).__name__}: {error}"}
            decoders = [name for name in decoders if name != "nvjpeg"]
        yield found
    if megapixels < 1 and "nvjpeg" in decoders:  # of larger ones the model takes a twentieth of the time
        try:
            found["decode_and_forward"] = decode_and_forward(source, by_device, device, size, arguments.seconds)
        except RuntimeError as error:  # a figure less, and the runs go on
            found["decode_and_forward_failed"] = str(error)[:500]
        yield found
    rows: dict[str, np.ndarray] = {}
    for _ in range(arguments.trials):
        for decoder in decoders:
            config = EmbedConfig(
                model=model,
                device=str(device),
                decoder=decoder,
                decode="exact",
                allow_untrained=True,
                batch_size=size,
                shard_rows=max(size, 512) if megapixels < 1 else size,  # each is one moment of the steady state
                workers=arguments.workers,
            )
            run, rows[decoder] = embedding(source, config)
            decode = found["decode"][decoder]
            bare = decode["all_cores"] if decoder == "pillow" else decode["decoder_alone"]
            limit = min(found["forward"], bare)
            rates = found.setdefault("embed", {}).setdefault(decoder, {"trials": []})
            trial = {**run, "over_limit": run["images_per_second"] / limit}
            if decoder == "nvjpeg" and "decode_and_forward" in found:
                trial["over_decode_and_forward"] = run["images_per_second"] / found["decode_and_forward"]
            rates["trials"].append(trial)
            for name in sorted(trial.keys() & {"images_per_second", "over_limit", "over_decode_and_forward"}):
                rates[name] = spread([one[name] for one in rates["trials"]])
            rates["limit_images_per_second"] = limit
            rates["limited_by"] = "forward" if limit == found["forward"] else "decode"
            if len(rows) == 2:
                cosines = (rows["nvjpeg"] * rows["pillow"]).sum(axis=1)
                found["cosine_of_rows_of_both_decoders"] = {"min": float(cosines.min()), "mean": float(cosines.mean())}
            yield found


def stand_in(device: torch.device) -> None:
    """Let a CPU pass for a device that decodes."""
    if device.type == "cpu":
        decoding.device_decoder_version = lambda _device: "stand-in"  # type: ignore[assignment]


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(trials=1)
    made.add_argument("--model", default=DEFAULT_MODEL)
    made.add_argument("--sizes", type=float, nargs="+", default=[0.2, 12.0], help="megapixels")
    made.add_argument("--images", type=int, nargs="+", default=[16384, 1536], help="of each size")
    made.add_argument("--decoders", nargs="+", default=["nvjpeg", "pillow"], choices=["nvjpeg", "pillow"])
    made.add_argument("--seconds", type=float, default=3.0, help="of each bare measurement")
    made.add_argument("--workers", type=int, help="[default: as gstds-embed chooses]")
    made.add_argument("--device", default="auto")
    arguments = made.parse_args()
    if arguments.smoke:
        arguments.sizes, arguments.images, arguments.model = [0.02, 1.0], [64, 32], "timm:test_resnet"
        arguments.seconds, arguments.workers = 0.2, 2
    if "nvjpeg" in arguments.decoders:
        decoding.keep_streams_apart("nvjpeg")
    arguments.resolved = resolve_device(arguments.device)
    stand_in(arguments.resolved)
    keep_freed_memory()
    result: dict[str, Any] = {
        "device": describe_device(arguments.resolved),
        "cores": cores(),
        "model": arguments.model,
        "limit": "the lesser of the bare forward pass and of the decoder alone, all cores or the device",
    }
    write: Callable[[], None] = partial(report, "embed-gpu", result, arguments)
    for megapixels, images in zip(arguments.sizes, arguments.images, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            made_of = make_files(Path(folder), megapixels, images)
            source = open_source(f"imagefolder:{folder}")
            for found in measure(source, arguments, megapixels):
                result[f"{megapixels:g} megapixels"] = {"bytes_of_a_file": round(made_of), "files": images, **found}
                print(time.strftime("%H:%M:%S"), megapixels, json.dumps(found), file=sys.stderr, flush=True)
                if not arguments.smoke:
                    write()
    if arguments.smoke:
        write()


if __name__ == "__main__":
    main()
