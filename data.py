"""Images as one uint8 tensor, and their labels.

A small dataset fits in memory as a whole: CIFAR-10 is 154 MB as uint8. So there are no worker
processes here. Every dataset ends as one tensor (N, 3, H, W) on the device, a batch is an index into
it, and flips happen on the device. FID reads the same sources slice by slice instead, so that its
memory does not grow with the number of images.

`shapes`, the default dataset, is drawn by this file. Everything a person can get wrong about images is
said in one line by `InputError`; the scripts' common command-line habits stand here too.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from script import InputError, check_sha256, end_progress, show_progress, write_then_rename  # noqa

# ----------------------------------------------------------------------------------------------------
# shapes: ten classes of bright shapes on dark ground. A shape is the set of points where a condition
# on (x, y) holds, in coordinates where it fills about the unit disc; y points up.

def _polygon(x, y, corners, radius):
    """Inside a regular polygon with a corner at the top; `radius` is that of the circle through them."""
    angle = torch.atan2(x, y)
    sector = 2 * math.pi / corners
    from_edge_middle = torch.remainder(angle, sector) - sector / 2
    return torch.hypot(x, y) * torch.cos(from_edge_middle) < radius * math.cos(math.pi / corners)


def _star(x, y):
    """Inside a five-pointed star: the edge runs straight from a tip (radius 1) to a notch (0.5)."""
    angle = torch.remainder(torch.atan2(x, y), 2 * math.pi / 5)
    angle = torch.minimum(angle, 2 * math.pi / 5 - angle)  # folded: 0 at the tip, pi/5 at the notch
    px, py = torch.hypot(x, y) * torch.sin(angle), torch.hypot(x, y) * torch.cos(angle)
    nx, ny = 0.5 * math.sin(math.pi / 5), 0.5 * math.cos(math.pi / 5)
    return nx * (py - 1) - (ny - 1) * px < 0


def _plus(x, y):
    return (torch.minimum(x.abs(), y.abs()) < 0.36) & (torch.maximum(x.abs(), y.abs()) < 0.95)


def _heart(x, y):
    x, y = 1.2 * x, 1.2 * y + 0.15
    return (x * x + y * y - 1) ** 3 - x * x * y**3 < 0


SHAPES = {
    "circle": lambda x, y: torch.hypot(x, y) < 0.9,
    "ring": lambda x, y: (torch.hypot(x, y) < 0.95) & (torch.hypot(x, y) > 0.45),
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.78,
    "triangle": lambda x, y: _polygon(x, y + 0.2, 3, 1.1),
    "diamond": lambda x, y: x.abs() / 0.7 + y.abs() < 1,
    "plus": _plus,
    "cross": lambda x, y: _plus((x + y) / math.sqrt(2), (x - y) / math.sqrt(2)),
    "star": _star,
    "moon": lambda x, y: (torch.hypot(x, y) < 0.95) & (torch.hypot(x, y - 0.65) > 0.75),
    "heart": _heart,
}


def draw_shapes(n: int, size: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws n images of the ten SHAPES, class i % 10 for image i.

    Random per image: colour (bright), ground (dark), radius, place (always wholly inside) and a
    rotation of up to 10 degrees. Antialiased by 4 x 4 points a pixel.
    Returns uint8 (n, 3, size, size) and int64 labels (n,). The same seed draws the same images.
    """
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(SHAPES)
    radius = 0.8 + 0.15 * torch.rand(n, generator=g)  # of half the image's side
    shift = (1 - radius)[:, None] * (2 * torch.rand(n, 2, generator=g) - 1)
    rotation = (2 * torch.rand(n, generator=g) - 1) * math.pi / 18
    ground = 40 * torch.rand(n, 3, 1, 1, generator=g)
    hue = torch.rand(n, 1, generator=g) + torch.tensor([0, 1 / 3, 2 / 3])  # (n, 3)
    colour = 255 * (0.25 + 0.75 * (0.5 + 0.5 * torch.cos(2 * math.pi * hue)))[:, :, None, None]

    points = 4 * size  # a row of sampling points; the first row is the top, where y = +1
    grid = (torch.arange(points) + 0.5) / points * 2 - 1
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for label, inside in enumerate(SHAPES.values()):
        members = torch.arange(label, n, len(SHAPES))
        for i in members.split(256):  # a few hundred at a time keep the 16-fold points in memory
            dx = (grid - shift[i, :1])[:, None, :] / radius[i, None, None]  # (b, 1, points)
            dy = (-grid - shift[i, 1:])[:, :, None] / radius[i, None, None]  # (b, points, 1)
            c, s = torch.cos(rotation[i])[:, None, None], torch.sin(rotation[i])[:, None, None]
            covered = inside(c * dx + s * dy, c * dy - s * dx).float()  # (b, points, points)
            alpha = F.avg_pool2d(covered[:, None], 4)  # (b, 1, size, size)
            images[i] = (ground[i] + alpha * (colour[i] - ground[i])).round().to(torch.uint8)
    return images, labels


# ----------------------------------------------------------------------------------------------------
# Sources: images that can be read slice by slice

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
DATASETS = ("shapes", "cifar10", "celeba")


@dataclass
class Source:
    """N images that are decoded when they are asked for.

    read:     read(i, j) gives images i..j-1 as uint8 (j - i, 3, H, W); raises InputError naming a
              broken image, or one whose size differs from the first
    labels:   int64 (N,), or None where the source has none
    classes:  names of the classes, by label; empty where there are none
    cache_key: a string that changes with the content, or None where reading is already fast
    """
    name: str
    n: int
    read: Callable[[int, int], torch.Tensor]
    labels: torch.Tensor | None
    classes: list[str]
    cache_key: str | None = None

    def __len__(self) -> int:
        return self.n


def open_source(name: str, data_dir: str = "data", split: str = "train", image_size: int | None = None,
                num: int = 20_000, seed: int = 0) -> Source:
    """Opens a dataset by name, a folder of images or of class folders, a ZIP of either, or a `.npz`.

    image_size: for shapes the size to draw (default 16); for files, each image is cropped to its
                central square and resized to this
    num, seed:  for shapes alone: how many to draw, and from which seed (split 'test' has seeds of its own)
    Raises InputError for anything that cannot be read.
    """
    if name == "shapes":
        images, labels = draw_shapes(num, image_size or 16, seed + 2**40 * (split == "test"))
        return _from_arrays(f"shapes {split} (seed {seed})", images, labels, list(SHAPES))
    if name == "cifar10":
        return _cifar10(Path(data_dir), split, image_size)
    if name == "celeba":
        return _celeba(Path(data_dir), split, image_size)
    path = Path(name)
    if not name or not path.exists():
        raise InputError(f"no dataset {name!r}: give {', '.join(DATASETS)}, or the path of a folder, a .zip or a .npz")
    if path.is_dir():
        # sorted: the order of the images, and with it every run, must not depend on the file system
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
        names = [p.relative_to(path).as_posix() for p in files]
        stamps = [(p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return _from_files(path, names, lambda member: open(path / member, "rb"), stamps, image_size)
    if path.suffix.lower() == ".npz":
        return _npz(path, image_size)
    if zipfile.is_zipfile(path):
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise InputError(f"{path} is a damaged ZIP archive ({error})") from None
        infos = sorted((i for i in archive.infolist() if i.filename.lower().endswith(IMAGE_ENDINGS)),
                       key=lambda i: i.filename)
        return _from_files(path, [i.filename for i in infos], archive.open, [(i.file_size, i.CRC) for i in infos],
                           image_size)
    raise InputError(f"{path} is neither a folder, a ZIP archive nor a .npz file")


def _from_arrays(name: str, images, labels, classes: list[str]) -> Source:
    return Source(name, len(images), lambda i, j: torch.as_tensor(images[i:j]), labels, classes)


def _from_files(path: Path, names: list[str], open_file, stamps: list, size: int | None, crop: int | None = None,
                labelled: bool = True) -> Source:
    """Image files in a folder or a ZIP; `names` are their sorted paths inside it, '/'-separated."""
    keep = [i for i, n in enumerate(names) if not any(p.startswith((".", "__MACOSX")) for p in n.split("/"))]
    names, stamps = [names[i] for i in keep], [stamps[i] for i in keep]
    if not names:
        raise InputError(f"{path} holds no images ({' '.join(IMAGE_ENDINGS)})")

    # a ZIP often wraps everything in one top folder, which is no class
    parts = [n.split("/") for n in names]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    classes, labels = [], None
    if labelled and len({len(p) > 1 for p in parts}) == 2:
        stray = next(n for n, p in zip(names, parts) if len(p) == 1)
        raise InputError(f"{path}: {stray} lies beside class folders; move it into one, or all images into one folder")
    if labelled and len(parts[0]) > 1:
        classes = sorted({p[0] for p in parts})
        index = {c: i for i, c in enumerate(classes)}
        labels = torch.tensor([index[p[0]] for p in parts])

    def decode(i: int) -> np.ndarray:
        try:
            with open_file(names[i]) as file, Image.open(io.BytesIO(file.read())) as image:
                if image.mode[0] in "IF":  # Pillow would clip 16 bits to 8
                    raise ValueError(f"it has pixels of mode {image.mode}, 8 bits per channel are needed")
                image = ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # whatever a decoder makes of foreign bytes, the answer is the same
            reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
            raise InputError(f"{path}: {names[i]} is not a readable image{reason}; repair or remove it") from None
        if crop or size:
            side = min(crop or min(image.size), *image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if size:
            image = image.resize((size, size), Image.Resampling.BILINEAR)  # Pillow's is antialiased
        return np.asarray(image)

    first_shape = functools.cache(lambda: decode(0).shape)
    threads = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes outside the interpreter lock

    def read(i: int, j: int) -> torch.Tensor:
        images = list(threads.map(decode, range(i, min(j, len(names)))))
        for name, image in zip(names[i:j], images):
            if image.shape != first_shape():
                (h, w, _), (h0, w0, _) = image.shape, first_shape()
                raise InputError(f"{path}: {name} is {w}x{h} but {names[0]} is {w0}x{h0}; "
                                 "all images must have one size (--image-size N crops and resizes them)")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (n, 3, H, W)

    key = hashlib.sha256(json.dumps([names, stamps, size, crop]).encode()).hexdigest()
    return Source(str(path), len(names), read, labels, classes, key)


def _npz(path: Path, image_size: int | None) -> Source:
    """`images` (N, H, W, 3) uint8 with optional `labels`, or `arr_0` as the ADM evaluation suite writes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            key = next((k for k in ("images", "arr_0") if k in file.files), None)
            if key is None:
                raise InputError(f"{path} holds {', '.join(file.files) or 'nothing'}; "
                                 "expected `images` or `arr_0`, uint8 (N, H, W, 3)")
            images = np.asarray(file[key])
            labels = np.asarray(file["labels"]) if "labels" in file.files else None
    except InputError:
        raise
    except Exception as error:  # truncated archives, pickled objects, foreign bytes
        raise InputError(f"{path} is not a readable .npz file ({error})") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise InputError(f"{path}: `{key}` is {images.dtype} {images.shape}; expected uint8 (N, H, W, 3), N >= 1")
    if image_size not in (None, images.shape[1]):
        raise InputError(f"{path} holds images of {images.shape[2]}x{images.shape[1]}, which are taken as they are; "
                         "leave --image-size out")
    classes = []
    if labels is not None:
        if (labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0
                or labels.max() >= 10_000):
            raise InputError(f"{path}: `labels` is {labels.dtype} {labels.shape}; expected {len(images)} class numbers "
                             "from 0 to at most 9,999")
        classes = [str(c) for c in range(int(labels.max()) + 1)]
        labels = torch.from_numpy(labels.astype(np.int64))
    return _from_arrays(str(path), torch.from_numpy(images).permute(0, 3, 1, 2), labels, classes)


CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"


def _cifar10(data_dir: Path, split: str, image_size: int | None) -> Source:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    archive = data_dir / CIFAR10.filename
    if not (data_dir / CIFAR10.base_folder).is_dir():
        if not archive.exists():
            part = archive.with_name(archive.name + ".part")  # an interrupted download must not pass for the file
            try:
                download_url(CIFAR10.url, str(data_dir), part.name)
                os.replace(part, archive)
            except Exception as error:  # no network, a proxy's refusal, a full disk
                part.unlink(missing_ok=True)
                raise InputError(f"cannot download CIFAR-10 ({error}); put {CIFAR10.filename} into {data_dir}/, or use "
                                 "--dataset PATH with a folder of class folders, a .zip or a .npz") from None
        check_sha256(archive, CIFAR10_SHA256)
    try:
        # with the archive in place `download` only unpacks it; the batch files are pickles, and
        # torchvision checks the hash of each before it opens one
        data = CIFAR10(str(data_dir), train=split == "train", download=archive.exists())
    except (RuntimeError, OSError):
        raise InputError(f"{data_dir / CIFAR10.base_folder} is incomplete; delete it and put "
                         f"{CIFAR10.filename} into {data_dir}/") from None
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    if image_size not in (None, 32):
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)  # as Pillow's
    return _from_arrays(f"cifar10 {split}", images, torch.tensor(data.targets), list(data.classes))


def _celeba(data_dir: Path, split: str, image_size: int | None) -> Source:
    """CelebA as the score-based models take it: the central 140 x 140, resized to 64 x 64, no labels."""
    from torchvision.datasets import CelebA

    try:
        data = CelebA(str(data_dir), split=split, download=False)
    except (RuntimeError, OSError):
        texts = ", ".join(name for _, _, name in CelebA.file_list if name.endswith(".txt"))
        raise InputError(f"CelebA is not in {data_dir}/celeba/: put the unpacked folder img_align_celeba/ and {texts} "
                         "there (its server allows no plain download), or use --dataset PATH") from None
    folder = data_dir / "celeba" / "img_align_celeba"
    names = sorted(data.filename)
    return _from_files(folder, names, lambda name: open(folder / name, "rb"), [split] * len(names),
                       image_size or 64, crop=140, labelled=False)


# ----------------------------------------------------------------------------------------------------
# Datasets: everything decoded, one tensor


@dataclass
class Dataset:
    """images uint8 (N, 3, H, W); labels int64 (N,), zeros where there are no classes."""
    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]

    def to(self, device: torch.device) -> "Dataset":
        return Dataset(self.name, self.images.to(device), self.labels.to(device), self.classes)


def load(name: str, data_dir: str = "data", split: str = "train", image_size: int | None = None,
         num: int = 20_000, seed: int = 0) -> Dataset:
    """A whole source (`open_source`, same arguments and errors) in memory."""
    return decode(open_source(name, data_dir, split, image_size, num, seed), data_dir)


def decode(source: Source, data_dir: str = "data") -> Dataset:
    """Reads all images of a source. Image files are decoded once: the tensor is kept in `data_dir`/cache
    under a hash of names, sizes and times. Raises InputError for a broken image."""
    labels = torch.zeros(len(source), dtype=torch.int64) if source.labels is None else source.labels
    cache = Path(data_dir) / "cache" / f"{source.cache_key}.npy"
    if source.cache_key and cache.exists():
        try:
            return Dataset(source.name, torch.from_numpy(np.load(cache, allow_pickle=False)), labels, source.classes)
        except (ValueError, OSError, EOFError):
            pass  # a damaged cache is only a reason to decode again
    parts = []
    for i in range(0, len(source), 4096):
        parts.append(source.read(i, i + 4096))
        if len(source) > 4096 and source.cache_key:
            show_progress(f"decoding {source.name}: {min(i + 4096, len(source)):,} of {len(source):,} images")
    if len(source) > 4096 and source.cache_key:
        end_progress()
    images = torch.cat(parts).contiguous()
    if source.cache_key:
        write_then_rename(cache, lambda file: np.save(file, images.numpy()))
    return Dataset(source.name, images, labels, source.classes)


# ----------------------------------------------------------------------------------------------------
# Batches


@functools.lru_cache(maxsize=2)  # a batch touches at most two epochs unless the dataset is tiny
def _epoch_order(n: int, seed: int, epoch: int, device: torch.device) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)  # on the CPU: the same order on every device
    return torch.randperm(n, generator=g).to(device)


def batch_indices(n: int, step: int, batch_size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Which images step number `step` (from 0) sees: int64 (batch_size,).

    Every epoch is a new permutation, and batches run on across its end, so each image is seen equally
    often. The order is a function of the seed and the step alone: a resumed run needs no saved state.
    """
    first = step * batch_size
    epochs = range(first // n, (first + batch_size - 1) // n + 1)
    order = torch.cat([_epoch_order(n, seed, epoch, device) for epoch in epochs])
    return order[first - epochs[0] * n:][:batch_size]


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """float in [-1, 1] -> uint8 0..255, rounded to nearest; values outside are clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
