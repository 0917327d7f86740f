"""Images as one uint8 tensor, or latents of an autoencoder as one of floats, and their labels.

An image dataset is here one tensor (N, 3, H, W) of bytes on the device, and a batch is an index into it:
CIFAR-10 takes 154 MB. So there are no worker processes, and no file is read while a model trains.
`shapes`, the default dataset, is drawn by this file. Below it, plumbing reads what other people made.
"""

import functools
import hashlib
import io
import json
import logging
import math
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from warnings import catch_warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from script import InputError, check_sha256, end_progress, one_line, show_progress, write_then_rename


@dataclass
class Dataset:
    """images uint8 (N, 3, H, W), 0 to 255, or latents float (N, C, H, W); labels int64 (N,), zeros where
    there are no classes."""
    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]  # their names, by label

    def to(self, device: torch.device) -> "Dataset":
        return Dataset(self.name, self.images.to(device), self.labels.to(device), self.classes)


def batch_indices(n: int, step: int, batch_size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Which of n images step number `step` (from 0) sees: int64 (batch_size,).
    Every epoch is a new permutation, and batches run on across its end, so each image is seen equally
    often. The order is a function of the seed and the step alone: a resumed run needs no saved state."""
    first = step * batch_size
    epochs = range(first // n, (first + batch_size - 1) // n + 1)
    order = torch.cat([_epoch_order(n, seed, epoch, device) for epoch in epochs])
    return order[first % n:][:batch_size]


@functools.lru_cache(maxsize=2)  # a batch touches at most two epochs unless the dataset is tiny
def _epoch_order(n: int, seed: int, epoch: int, device: torch.device) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)  # on the CPU: the same order on every device
    return torch.randperm(n, generator=g).to(device)


def to_unit(images: torch.Tensor, mean: tuple = (), std: tuple = ()) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1]; or latents (N, C, H, W), of given mean and deviation for each
    channel, -> float32 of mean 0 and deviation 1."""
    if not mean:
        return images.float() / 127.5 - 1
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images.float() - mean) / std


def from_unit(x: torch.Tensor, mean: tuple = (), std: tuple = ()) -> torch.Tensor:
    """The way back: float in [-1, 1] -> uint8 0..255, rounded to nearest, the rest clipped; or latents."""
    if not mean:
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (mean, std))
    return mean + std * x.float()


# ----------------------------------------------------------------------------------------------------
# shapes: ten classes of bright shapes on dark ground. A shape is the set of points where a condition
# on (x, y) holds, in coordinates where it fills about the unit disc; y points up.


def _triangle(x, y):
    angle = torch.remainder(torch.atan2(x, y), 2 * math.pi / 3) - math.pi / 3  # from the middle of an edge
    return torch.hypot(x, y) * torch.cos(angle) < 1.1 * math.cos(math.pi / 3)


def _star(x, y):
    """Five points: the edge runs straight from a tip (radius 1) to a notch (0.5)."""
    angle = torch.remainder(torch.atan2(x, y), 2 * math.pi / 5)
    angle = torch.minimum(angle, 2 * math.pi / 5 - angle)  # folded: 0 at the tip, pi/5 at the notch
    px, py = torch.hypot(x, y) * torch.sin(angle), torch.hypot(x, y) * torch.cos(angle)
    nx, ny = 0.5 * math.sin(math.pi / 5), 0.5 * math.cos(math.pi / 5)
    return nx * (py - 1) - (ny - 1) * px < 0


def _heart(x, y):
    return (x * x + y * y - 1) ** 3 - x * x * y**3 < 0


SHAPES = {
    "circle": lambda x, y: torch.hypot(x, y) < 0.9,
    "ring": lambda x, y: (torch.hypot(x, y) < 0.95) & (torch.hypot(x, y) > 0.45),
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.78,
    "triangle": lambda x, y: _triangle(x, y + 0.2),
    "diamond": lambda x, y: x.abs() / 0.7 + y.abs() < 1,
    "plus": lambda x, y: (torch.minimum(x.abs(), y.abs()) < 0.36) & (torch.maximum(x.abs(), y.abs()) < 0.95),
    "cross": lambda x, y: SHAPES["plus"]((x + y) / math.sqrt(2), (x - y) / math.sqrt(2)),
    "star": _star,
    "moon": lambda x, y: (torch.hypot(x, y) < 0.95) & (torch.hypot(x, y - 0.65) > 0.75),
    "heart": lambda x, y: _heart(1.2 * x, 1.2 * y + 0.15),
}


def draw_shapes(n: int, size: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws n images, uint8 (n, 3, size, size), and their labels, int64 (n,): image i is of class i % 10.
    Random are colour (bright), ground (dark), radius, place (inside, but for tips of a few triangles) and a
    rotation of up to 10 degrees. Antialiased by 4 x 4 points a pixel. Seed and n decide the images."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(SHAPES)
    radius = 0.8 + 0.15 * torch.rand(n, generator=g)  # of half the image's side
    shift = (1 - radius)[:, None] * (2 * torch.rand(n, 2, generator=g) - 1)
    rotation = (2 * torch.rand(n, generator=g) - 1) * math.pi / 18
    ground = 40 * torch.rand(n, 3, 1, 1, generator=g)
    hue = torch.rand(n, 1, generator=g) + torch.tensor([0, 1 / 3, 2 / 3])  # (n, 3)
    colour = 255 * (0.25 + 0.75 * (0.5 + 0.5 * torch.cos(2 * math.pi * hue)))[:, :, None, None]
    grid = (torch.arange(4 * size) + 0.5) / (2 * size) - 1  # (points,) in (-1, 1); the top row has y = +1
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for label, inside in enumerate(SHAPES.values()):
        for i in torch.nonzero(labels == label)[:, 0].split(256):  # not all at once: the points are 16-fold
            dx = (grid - shift[i, :1])[:, None, :] / radius[i, None, None]  # (b, 1, points)
            dy = (-grid - shift[i, 1:])[:, :, None] / radius[i, None, None]  # (b, points, 1)
            c, s = torch.cos(rotation[i])[:, None, None], torch.sin(rotation[i])[:, None, None]
            covered = inside(c * dx + s * dy, c * dy - s * dx).float()  # (b, points, points)
            alpha = F.avg_pool2d(covered[:, None], 4)  # (b, 1, size, size)
            images[i] = (ground[i] + alpha * (colour[i] - ground[i])).round().to(torch.uint8)
    return images, labels


# ----------------------------------------------------------------------------------------------------
# Plumbing. A source is images that are decoded when they are asked for: fid.py reads them slice by slice.

DATASETS = ("shapes", "cifar10", "celeba")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # Pillow has more, and some run programs
THREADS = ThreadPoolExecutor()  # Pillow decodes outside the interpreter lock
MAX_PIXELS = 2**26  # of one image: 8192 x 8192, which take 200 MB
MAX_RATIO = 400  # of a ZIP member above 64 MB to its packed size: large flat shapes reach 200, zeros 1000
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
logging.getLogger("PIL").addHandler(logging.NullHandler())  # we say what is wrong with a file


@dataclass
class Source:
    name: str
    n: int
    read: Callable[[int, int], torch.Tensor]  # i..j-1: uint8 (j - i, 3, H, W) or latents (j - i, C, H, W)
    labels: torch.Tensor | None  # int64 (n,)
    classes: list[str]  # their names, by label; empty without labels
    cache_key: str | None = None  # changes with the content; None where reading is fast already


def load(name: str, data_dir: str = "data", split: str = "train", image_size: int | None = None,
         num: int = 20_000, seed: int = 0) -> Dataset:
    """A whole source (`open_source`, same arguments and errors) in memory."""
    return decode(open_source(name, data_dir, split, image_size, num, seed), data_dir)


def decode(source: Source, data_dir: str = "data") -> Dataset:
    """Reads all images of a source. Image files are decoded once: the tensor is kept in `data_dir`/cache
    under a hash of place, names, sizes and times. Raises InputError for a broken image."""
    labels = torch.zeros(source.n, dtype=torch.int64) if source.labels is None else source.labels
    if source.cache_key is None:
        return Dataset(source.name, source.read(0, source.n).contiguous(), labels, source.classes)
    cache = Path(data_dir) / "cache" / f"{source.cache_key}.npy"
    with suppress(Exception):  # none yet, or a damaged one
        return Dataset(source.name, torch.from_numpy(np.load(cache)), labels, source.classes)
    with _refusing(f"{source.name} does not fit into memory; --image-size N makes its images smaller"):
        images = torch.empty(source.n, *source.read(0, 1).shape[1:], dtype=torch.uint8)  # (N, 3, H, W)
    for i in range(0, source.n, 4096):
        images[i:i + 4096] = source.read(i, i + 4096)
        show_progress(f"decoding {source.name}: {min(i + 4096, source.n):,} of {source.n:,} images")
    end_progress()
    with suppress(OSError):  # a full disk, or one of others, costs time the next time
        write_then_rename(cache, lambda file: np.save(file, images.numpy()))
    return Dataset(source.name, images, labels, source.classes)


def open_source(name: str, data_dir: str = "data", split: str = "train", image_size: int | None = None,
                num: int = 20_000, seed: int = 0) -> Source:
    """Opens a dataset by name, a folder of images or of class folders, a ZIP of either, or a `.npz`.
    image_size: what shapes are drawn at (default 16), and the central square of image files is resized to.
    num, seed: how many shapes to draw, from which seed (0 to 2**31). Transparency is composited on black.
    Raises InputError for what cannot be read, or would unpack to far more than its file."""
    if name == "shapes":
        drawn_from = seed + 2**31 + 1 if split == "test" else seed  # torch keeps 32 bits of a seed
        images, labels = draw_shapes(num, image_size or 16, drawn_from)
        return Source(f"shapes {split} (seed {seed})", num, lambda i, j: images[i:j], labels, list(SHAPES))
    if name == "cifar10":
        return _cifar10(Path(data_dir), split, image_size)
    if name == "celeba":
        return _celeba(Path(data_dir), split, image_size)
    path = Path(name)
    if not name or not path.exists():
        raise InputError(f"no dataset {name!r}: give {', '.join(DATASETS)}, or a folder, a .zip or a .npz")
    if path.is_dir():
        return _from_files(path, _files_below(path), image_size)
    with _refusing(f"{path} is neither a folder nor a ZIP archive, and not a readable .npz file"):
        archive = zipfile.ZipFile(path)
        for member in archive.infolist():  # the packed size that it declares may lie
            if member.file_size > max(2**26, MAX_RATIO * min(member.compress_size, path.stat().st_size)):
                raise InputError(f"{path}: {member.filename!r} unpacks over {MAX_RATIO} fold; store it")
    if path.suffix.lower() == ".npz":
        return _npz(path, archive, image_size)
    # some programs write a\1.png or ./a/1.png
    members = {m.filename.replace("\\", "/").removeprefix("./"): m for m in archive.infolist()}
    stamps = {name: (member.file_size, member.CRC) for name, member in members.items()}
    return _from_files(path, stamps, image_size, open_file=lambda name: archive.open(members[name]))


def _files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """{path inside: (bytes, time of change)} of all files; links are followed. Raises OSError for a folder
    that cannot be read, InputError for one that is there twice, as in a circle of links."""
    def refuse(error: OSError):
        raise error

    files, entered = [], set()
    for place, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            raise InputError(f"{place} is a link to a folder that is there already; remove it")
        entered.add(real)
        files += [Path(place, name) for name in names]
    stats = {file.relative_to(folder).as_posix(): file.stat() for file in files if file.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@contextmanager
def _refusing(message: str):
    """Whatever a reader makes of foreign bytes, it becomes an InputError, with the reason in brackets."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise InputError(f"{message} ({reason})") from None


def _from_files(path: Path, stamps: dict, size: int | None, crop: int | None = None,
                open_file: Callable | None = None) -> Source:
    """stamps: for every path inside the folder or ZIP its size in bytes, and what changes with content.
    open_file: opens one of them; default: as files of a folder"""
    open_file = open_file or (lambda name: open(path / name, "rb"))
    names = [n for n in stamps if n.lower().endswith(IMAGE_ENDINGS) and "/." not in f"/{n}"]  # none hidden
    names.sort(key=lambda name: name.split("/"))  # no run may depend on the order of a file system
    if not names:
        raise InputError(f"{path} holds no images ({' '.join(IMAGE_ENDINGS)})")
    if "dataset.json" in stamps:  # of EDM's or StyleGAN's dataset_tool.py, whose folders are no classes
        with _refusing(f"{path}: dataset.json does not tell the class number of every image"):
            with open_file("dataset.json") as file:
                listed = json.load(file)["labels"]  # [["00000/img00000000.png", 6], ...], or null
            of = dict(listed or [])
            numbers = np.array([of[name] for name in names]) if of else None
        labels, classes = _numbered_classes(path, numbers, len(names))
    else:
        labels, classes = _class_folders(path, names)

    def decode(name: str) -> np.ndarray:
        with _refusing(f"{path}: {name!r} is not a readable image; repair or remove it"):
            with open_file(name) as file:
                return _pixels(file.read(stamps[name][0]), size, crop)

    first_shape = functools.cache(lambda: decode(names[0]).shape)

    def read(i: int, j: int) -> torch.Tensor:
        with catch_warnings(action="ignore"):  # of Pillow, whose threads must have ended before it is left
            futures = [THREADS.submit(decode, name) for name in names[i:j]]
            try:
                images = list(map(Future.result, futures))
            finally:  # on an error or Ctrl-C what waits in the queue is left
                wait([future for future in futures if not future.cancel()])
                del futures  # or a failed one would live on in its traceback, and the open archive with it
            shape = first_shape()
        for name, image in zip(names[i:j], images):
            if image.shape != shape:
                raise InputError(f"{path}: {name!r} and {names[0]!r} differ in size; add --image-size N")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (j - i, 3, H, W)

    # the place, too: files of equal names, sizes and times may hold other images elsewhere
    content = ["version 3, on black", str(path.resolve()), [(n, stamps[n]) for n in names], size, crop]
    key = hashlib.sha256(repr(content).encode())
    return Source(str(path), len(names), read, labels, classes, key.hexdigest())


def _class_folders(path: Path, names: list[str]) -> tuple[torch.Tensor | None, list[str]]:
    """Labels int64 (n,) and the names of the classes, from those of the folders; None and [] without any."""
    folders = [name.split("/")[:-1] for name in names]
    while all(folders) and len({f[0] for f in folders}) == 1:  # one folder around everything is no class
        folders = [f[1:] for f in folders]
    if any(folders) and not all(folders):
        raise InputError(f"{path}: {names[folders.index([])]!r} lies beside class folders; move it into one")
    classes = sorted({f[0] for f in folders if f})
    number = {name: label for label, name in enumerate(classes)}
    return torch.tensor([number[f[0]] for f in folders]) if classes else None, classes


def _numbered_classes(path: Path, labels: np.ndarray | None, n: int) -> tuple[torch.Tensor | None, list[str]]:
    """The same from class numbers (n,)."""
    if labels is None:
        return None, []
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9_999:
        raise InputError(f"{path}: `labels` is {labels.dtype} {labels.shape}, not {n} numbers to 9,999")
    return torch.from_numpy(labels.astype(np.int64)), [str(label) for label in range(int(labels.max()) + 1)]


def _pixels(data: bytes, size: int | None, crop: int | None) -> np.ndarray:
    """An image file as uint8 (H, W, 3): upright, in RGB, and transparent pixels composited on black."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header alone
    if not 1 <= image.width * image.height <= MAX_PIXELS:
        raise ValueError(f"it claims {image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are read")
    if image.mode[0] in "IF":  # Pillow would clip 16 bits to 8
        raise ValueError(f"it has pixels of mode {image.mode}, 8 bits per channel are needed")
    if image.tile and image.tile[0][0] == "libtiff":  # prints what it finds wrong, and trusts sizes of tiles
        raise ValueError("compressed TIFF is not read, save it as PNG")
    image.getexif(), image.info.pop("exif", None)  # or all tags would be written anew, and some cannot be
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    image = image.convert("RGB")
    if size:  # Pillow's `resize` is antialiased
        side = min(crop or image.width, image.width, image.height)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.BILINEAR)
    return np.asarray(image)


def _npz(path: Path, archive: zipfile.ZipFile, size: int | None) -> Source:
    """`images` (N, H, W, 3) uint8, or `arr_0` as the ADM evaluation suite writes, or `latents` (N, C, H, W)
    float16 or float32; and optional `labels`."""
    keys = [key.removesuffix(".npy") for key in archive.namelist()]
    key = next((key for key in ("latents", "images") if key in keys), "arr_0")
    no_npz = f"{path} is not a readable .npz of `images`, `arr_0` or `latents`"
    with _refusing(no_npz), catch_warnings(action="ignore"):
        images = np.asarray(np.load(archive.open(f"{key}.npy")))
        labels = np.asarray(np.load(archive.open("labels.npy"))) if "labels" in keys else None
    images = images.astype(images.dtype.newbyteorder("="), copy=False)  # as this machine orders its bytes
    if key == "latents":
        if images.dtype not in (np.float16, np.float32) or images.ndim != 4 or images.size == 0:
            raise InputError(f"{path}: the latents are {images.dtype} {images.shape}, "
                             "not float16 or float32 (N, C, H, W)")
        if not (-1e4 < images.min() and images.max() < 1e4):  # False for NaN
            raise InputError(f"{path}: the latents hold NaN or numbers of 10,000 and more")
        images = images.transpose(0, 2, 3, 1)
    elif images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.size == 0:
        raise InputError(f"{path}: the images are {images.dtype} {images.shape}, not uint8 (N, H, W, 3)")
    if size not in (None, images.shape[1]):
        raise InputError(f"{path} is taken as it is, in {images.shape[1:3]} pixels; leave --image-size out")
    labels, classes = _numbered_classes(path, labels, len(images))
    images = torch.from_numpy(images).permute(0, 3, 1, 2)  # (N, C, H, W)
    return Source(str(path), len(images), lambda i, j: images[i:j], labels, classes)


def _cifar10(data_dir: Path, split: str, size: int | None) -> Source:
    from torchvision.datasets import CIFAR10
    archive, folder = data_dir / CIFAR10.filename, data_dir / CIFAR10.base_folder
    with _refusing(f"no CIFAR-10: delete {folder}, put {archive.name} beside it, or use --dataset PATH"):
        if not folder.is_dir():
            if not archive.exists():
                data_dir.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(CIFAR10.url, str(archive), CIFAR10_SHA256)
            check_sha256(archive, CIFAR10_SHA256)
        data = CIFAR10(str(data_dir), train=split == "train", download=archive.exists())  # checks hashes
    images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)
    if size not in (None, 32):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)  # as Pillow's
    return Source(f"cifar10 {split}", len(images), lambda i, j: images[i:j], labels, list(data.classes))


def _celeba(data_dir: Path, split: str, size: int | None) -> Source:
    """As the score-based models take it: the central 140 x 140, resized to 64 x 64, no labels."""
    from torchvision.datasets import CelebA
    folder = data_dir / "celeba" / "img_align_celeba"
    with _refusing(f"CelebA: put the unpacked {folder} and its .txt files beside it, or use --dataset PATH"):
        data = CelebA(str(data_dir), split=split, download=False)
    return _from_files(folder, dict.fromkeys(data.filename, (-1, split)), size or 64, crop=140)
