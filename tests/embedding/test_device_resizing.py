"""Images resized by cuda/resize.cu: torch's own pixels, for images of any sizes and orientations in one launch."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated import EmulatedKernel, compile_emulated
from PIL import ExifTags, Image, ImageOps

from gstds_cache.cuda import build, launch
from gstds_cache.embedding import device_resizing
from gstds_cache.embedding.device_resizing import REACH, Resizer, resize_bytes, upright
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.errors import KernelError

CPU = torch.device("cpu")
SIZES = (
    (60, 90),
    (90, 60),
    (32, 32),
    (20, 1000),
    (1000, 20),
    (11, 9),
    (40, 32),
    (33, 70),
    (1, 1),
    (31, 200),
    (500, 400),
)


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise of all values over a few large areas, [3, H, W]."""
    rng = np.random.default_rng(seed)
    areas = rng.integers(0, 256, (3, -(-height // 8), -(-width // 8))).repeat(8, 1).repeat(8, 2)[:, :height, :width]
    return torch.from_numpy(np.clip(areas + rng.integers(-90, 91, areas.shape), 0, 255).astype(np.uint8))


def by_torch(ours: Preprocessing, stored: torch.Tensor, orientation: int) -> torch.Tensor:
    (values,) = ours.resized(upright(stored, orientation)[None])
    return values.round().clamp(0, 255).to(torch.uint8)


def resized(ours: Preprocessing, decoded: list[tuple[int, torch.Tensor, int]], places: int) -> torch.Tensor:
    device = decoded[0][1].device
    pixels = torch.full((places, 3, *ours.crop), 7, dtype=torch.uint8, device=device)
    Resizer(ours, device).resize(decoded, pixels)
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_turns_them(orientation: int) -> None:
    stored, file, exif = image(40, 60), io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(stored.permute(1, 2, 0).numpy()).save(file, "PNG", exif=exif)
    with Image.open(file) as opened:
        theirs = np.asarray(ImageOps.exif_transpose(opened)).transpose(2, 0, 1)
    assert np.array_equal(upright(stored, orientation).numpy(), theirs)
    start, row, column = device_resizing.strides(40, 60, orientation)
    height, width = theirs.shape[1:]
    turned = start + row * np.arange(height)[:, None] + column * np.arange(width)
    assert np.array_equal(stored[0].numpy().reshape(-1)[turned], theirs[0])


@pytest.mark.parametrize("crop", [(28, 28), (35, 30), (40, 45)])
@pytest.mark.parametrize("resize", [32, (40, 36)])
@pytest.mark.parametrize("interpolation", REACH)
def test_the_pixels_are_torchs(emulated_kernels, interpolation, resize, crop) -> None:
    ours = Preprocessing(resize=resize, crop=crop, interpolation=interpolation)
    decoded = [
        (2 * number + 1, image(*size, number), number % 8 + 1)
        for number, size in enumerate(SIZES * 3)
    ]  # fmt: skip
    pixels = resized(ours, decoded, 2 * len(decoded) + 1)
    (kernel,) = emulated_kernels.kernels.values()
    assert len(kernel.launches) == 2, "images of all sizes by one launch, after one that tries the kernel"
    assert bool((pixels[::2] == 7).all()), "places of others stay as they are"
    theirs = torch.stack([by_torch(ours, stored, orientation) for _, stored, orientation in decoded])
    difference = (pixels[1::2].int() - theirs.int()).abs()
    assert int(difference.max()) <= 1  # sums that end at .5, which another processor rounds otherwise
    assert float((difference > 0).float().mean()) < 1e-3


CONTRACTED = ("-O2", "-mfma", "-ffp-contract=fast")
"""Compiled so, a product and a sum become one operation in some places, as on a GPU."""
AT_A_WHOLE_NUMBER = ((725, 847), (778, 921), (291, 957), (405, 300), (316, 310))
"""Sizes with pixels whose last row or column of the image is one or another, as their ends are rounded."""


@pytest.mark.skipif("fma" not in Path("/proc/cpuinfo").read_text(), reason="needs a processor with fused operations")
@pytest.mark.parametrize("interpolation", REACH)
def test_the_pixels_are_torchs_however_a_compiler_rounds(
    emulated_kernels, tmp_path, monkeypatch, interpolation
) -> None:
    define = f"REACH={REACH[interpolation]}"
    library = compile_emulated(tmp_path, "resize.cu", "resize_block", (define,), flags=CONTRACTED)
    contracted = EmulatedKernel(library, "resize_block")
    monkeypatch.setattr(build, "kernel", lambda *_, **__: contracted)
    ours = Preprocessing(resize=256, crop=(224, 224), interpolation=interpolation)
    sizes = [turned for size in AT_A_WHOLE_NUMBER for turned in (size, size[::-1])]
    decoded = [(place, image(*size, place), 1) for place, size in enumerate(sizes)]
    pixels = resized(ours, decoded, len(decoded))
    for place, stored, orientation in decoded:
        difference = (pixels[place].int() - by_torch(ours, stored, orientation).int()).abs()
        assert int(difference.max()) <= 1, sizes[place]
        assert float((difference > 0).float().mean()) < 1e-3, sizes[place]


@pytest.mark.parametrize("interpolation", REACH)
def test_the_bits_do_not_depend_on_threads_or_on_other_images(emulated_kernels, interpolation) -> None:
    ours = Preprocessing(resize=40, crop=(36, 37), interpolation=interpolation)
    decoded = [(place, image(*size, place), place % 8 + 1) for place, size in enumerate(SIZES)]
    kernel = emulated_kernels("resize.cu", "resize_block", (f"REACH={REACH[interpolation]}",))
    found = []
    for threads, schedule in ((1, "ascending"), (7, "shuffled"), (64, "descending"), (None, "shuffled")):
        kernel.threads, kernel.schedule = threads, schedule
        found.append(resized(ours, decoded, len(decoded)))
    assert all(torch.equal(one, found[0]) for one in found)
    kernel.threads = 1
    for place, stored, orientation in decoded:
        assert torch.equal(resized(ours, [(0, stored, orientation)], 1)[0], found[0][place])


def test_images_that_do_not_fit_into_shared_memory(emulated_kernels, monkeypatch) -> None:
    """The largest are torch's; those that do not fit beside each other are of several launches."""
    ours = Preprocessing(resize=(32, 32), crop=(32, 32))
    sizes = ((40, 40), (600, 40), (3000, 40), (40, 600), (40, 40))
    decoded = [(place, image(*size, place), 1) for place, size in enumerate(sizes)]
    whole = resized(ours, decoded, len(decoded))
    (kernel,) = emulated_kernels.kernels.values()
    assert len(kernel.launches) == 2
    kernel.launches.clear()
    monkeypatch.setattr(Resizer, "_other_pixels", lambda _self: "")
    monkeypatch.setattr(launch, "shared_memory_limit", lambda _device: 22 << 10)
    calls: list[int] = []
    monkeypatch.setattr(Resizer, "_by_torch", lambda _self, place, *_: calls.append(place))
    fewer = resized(ours, decoded, len(decoded))
    assert calls == [2]
    assert len(kernel.launches) == 2
    assert max(shared for _, _, shared in kernel.launches) <= 22 << 10
    others = [0, 1, 3, 4]
    assert torch.equal(fewer[others], whole[others])


def test_without_a_kernel_torch_resizes(monkeypatch) -> None:
    ours = Preprocessing(resize=32, crop=(28, 28))
    decoded = [(place, image(*size, place), place + 1) for place, size in enumerate(SIZES[:4])]
    theirs = torch.stack([by_torch(ours, stored, orientation) for _, stored, orientation in decoded])
    assert torch.equal(resized(ours, decoded, 4), theirs)
    reasons: list[str] = []
    monkeypatch.setattr(build, "why_not", lambda _device: "")
    monkeypatch.setattr(build, "log_fallback", lambda _device, reason: reasons.append(reason))

    def refused(*_: object, **__: object) -> None:
        raise KernelError("the driver is older than the compiler")

    monkeypatch.setattr(build, "kernel", refused)
    assert torch.equal(resized(ours, decoded, 4), theirs)
    assert reasons == ["the driver is older than the compiler"]


@pytest.mark.parametrize(
    ("resize", "interpolation"), [(256, "bicubic"), (256, "bilinear"), (224, "bicubic"), (146, "bicubic")]
)
def test_the_kernel_is_tried_on_sizes_where_rounding_decides_what_a_pixel_is_a_mean_of(resize, interpolation) -> None:
    ours = Preprocessing(resize=resize, crop=(128, 128), interpolation=interpolation)
    sizes = device_resizing.hard_sizes(ours)
    assert len(set(sizes)) == device_resizing.TRIED
    differ = 0
    for height, width in sizes:
        at = ours.placing(height, width)
        for kept, size in zip(at.kept, at.size, strict=True):
            scale, center = np.float32(kept) / np.float32(size), (np.arange(size) + 0.5).astype(np.float32)
            reach = np.float32(REACH[interpolation]) * max(scale, np.float32(1))
            for sign in (np.float32(-1), np.float32(1)):
                rounded = scale * center + sign * reach
                at_once = (np.float64(scale) * center + np.float64(sign * reach)).astype(np.float32)
                differ += int(
                    ((rounded + np.float32(0.5)).astype(int) != (at_once + np.float32(0.5)).astype(int)).any()
                )
    assert differ > 0


@pytest.mark.parametrize("wrong", ["nothing is written", "a column is that beside it"])
def test_a_kernel_whose_pixels_are_not_torchs_is_not_used(emulated_kernels, monkeypatch, wrong: str) -> None:
    """As where a compiler rounds in two ways what has to be the same."""
    ours = Preprocessing(resize=32, crop=(28, 28))
    right = emulated_kernels("resize.cu", "resize_block", ("REACH=1",))

    def kernel(*arguments: object) -> None:
        if wrong == "a column is that beside it":
            right(*arguments)
            pixels = arguments[-1]
            pixels[3, :, :, 5] = pixels[3, :, :, 6]

    monkeypatch.setattr(build, "kernel", lambda *_, **__: kernel)
    reasons: list[str] = []
    monkeypatch.setattr(build, "log_fallback", lambda _device, reason: reasons.append(reason))
    decoded = [(place, image(*size, place), 1) for place, size in enumerate(SIZES[:4])]
    theirs = torch.stack([by_torch(ours, stored, orientation) for _, stored, orientation in decoded])
    assert torch.equal(resized(ours, decoded, 4), theirs)
    (reason,) = reasons
    assert re.fullmatch(r"resized images are up to \d+ of 255 levels from torch's on cpu", reason)


def test_images_that_are_not_contiguous_are_torchs(emulated_kernels) -> None:
    ours = Preprocessing(resize=32, crop=(28, 28))
    stored = image(60, 90)
    part = stored[:, :, 10:70]
    assert not part.is_contiguous()
    assert torch.equal(resized(ours, [(0, part, 1)], 1)[0], by_torch(ours, part, 1))


def test_the_bytes_of_a_block_are_those_of_the_kernel(emulated_kernels) -> None:
    library = emulated_kernels("resize.cu", "resize_block", ("REACH=2",)).library
    for sizes in ((224, 9, 30), (37, 1, 1), (384, 60, 500)):
        assert library.resize_bytes(*sizes) == resize_bytes(*sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("interpolation", REACH)
def test_on_a_gpu_the_pixels_are_torchs_up_to_rounding(interpolation) -> None:
    """One level, where the sum is at a half: in the last bit of a float32 two compilers may differ."""
    ours = Preprocessing(resize=256, crop=(224, 224), interpolation=interpolation)
    sizes = ((387, 516), (447, 447), (1080, 1920), (3000, 4000), (100, 120), (256, 256), (30, 900), (9, 1))
    sizes += AT_A_WHOLE_NUMBER
    decoded = [(n, image(*size, n).cuda(), n % 8 + 1) for n, size in enumerate(sizes * 2)]
    assert build.why_not(torch.device("cuda")) == ""
    pixels = resized(ours, decoded, len(decoded))
    for place, stored, orientation in decoded:
        difference = (pixels[place].int() - by_torch(ours, stored, orientation).int()).abs()
        told = (tuple(stored.shape), orientation, int(difference.max()), int((difference > 0).sum()))
        assert int(difference.max()) <= 1, told
        assert float((difference > 0).float().mean()) < 1e-3, told
        assert torch.equal(resized(ours, [(0, stored, orientation)], 1)[0], pixels[place]), "alone, the same bits"
