"""Latents that people already have, as the .npz that train.py takes.

    python experiments/latents.py features/imagenet256_features --labels features/imagenet256_labels --out latents.npz
    python experiments/latents.py vae-sd/ --out latents.npz
    python experiments/latents.py vae-sd.zip --mean --out latents.npz

Two layouts are known. fast-DiT: a folder of {i}.npy, (1, C, H, W) or (C, H, W), and a folder of {i}.npy with their
labels. EDM2 and REPA: a folder or ZIP of img-mean-std-*.npy, in any subfolders, of 2 C channels: the means of the
autoencoder's normal distribution and then its deviations; labels stand in dataset.json. Of these one latent each is
drawn (--seed), or with --mean the means are taken. Latents are written in float16, scaled by nothing: train.py
normalises each channel and keeps how.
"""

import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
from script import (InputError, Parser, check_writable, end_progress, one_line, run_script, seed_number, show_progress,
                    write_then_rename)


def open_files(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """The names of all files in a folder or ZIP, and a way to read one. Raises InputError."""
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return names, lambda name: (path / name).read_bytes()
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is neither a folder nor a ZIP ({one_line(error)})") from None
    members = {name.replace("\\", "/"): name for name in archive.namelist()}  # some programs write a\1.npy
    return sorted(members), lambda name: archive.read(members[name])


def read_array(read: Callable[[str], bytes], name: str) -> np.ndarray:
    """Raises InputError if it is no .npy of finite numbers."""
    try:
        array = np.load(io.BytesIO(read(name)), allow_pickle=False)
        if array.dtype.kind not in "fiu" or not array.size or not np.isfinite(array).all():
            raise ValueError("it does not hold finite numbers")
    except Exception as error:  # foreign bytes can fail in any way
        raise InputError(f"{name} is no .npy of latents or labels ({one_line(error)})") from None
    return array


def numbered(names: list[str], where: Path) -> dict[int, str]:
    """{i: name} of i.npy, in order. Raises InputError if there are none, or two of one number."""
    found = {}
    for name in names:
        stem = Path(name).stem
        if name.endswith(".npy") and stem.isdecimal():
            if int(stem) in found:
                raise InputError(f"{where} holds {found[int(stem)]} and {name}, of one number; convert each folder "
                                 "by itself")
            found[int(stem)] = name
    if not found:
        raise InputError(f"{where} holds neither img-mean-std-*.npy nor 0.npy, 1.npy, ...")
    return dict(sorted(found.items()))


def as_float16(array: np.ndarray, name: str) -> np.ndarray:
    """At once, for ImageNet's latents take 10 GB in float16. Raises InputError for numbers that are none of latents."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.abs(half).max() < 1e4:  # NaN, too
        raise InputError(f"{name} holds numbers of 10,000 and more, which train.py takes for damage")
    return half


def stack(arrays: list[np.ndarray], names: list[str]) -> np.ndarray:
    for array, name in zip(arrays, names):
        if array.ndim != 3 or array.shape != arrays[0].shape:
            raise InputError(f"{name} has the shape {array.shape}, {names[0]} {arrays[0].shape}; expected are equal "
                             "shapes (C, H, W)")
    return np.stack(arrays)


def class_number(array: np.ndarray, file: Path) -> int:
    if array.size != 1 or array.item() != int(array.item()):
        raise InputError(f"{file} must hold one class number")
    return int(array.item())


def from_fast_dit(path: Path, labels: Path | None) -> tuple[np.ndarray, np.ndarray | None]:
    """latents float16 (N, C, H, W), labels int64 (N,) or None. Raises InputError."""
    names, read = open_files(path)
    files, arrays, values = numbered(names, path), [], None
    if labels is not None:
        label_names, read_label = open_files(labels)
        of = numbered(label_names, labels)
        if list(of) != list(files):
            raise InputError(f"{labels} has {len(of)} labels that are not those of the {len(files)} latents in {path}")
        values = np.array([class_number(read_array(read_label, name), labels / name) for name in of.values()])
    for name in files.values():
        array = read_array(read, name)
        arrays.append(as_float16(array[0] if array.ndim == 4 and len(array) == 1 else array, name))
        if len(arrays) % 1000 == 0:
            show_progress(f"{len(arrays):,} of {len(files):,} latents")
    return stack(arrays, list(files.values())), values


def is_mean_std(name: str) -> bool:
    return Path(name).name.startswith("img-mean-std-") and name.endswith(".npy")


def from_mean_std(path: Path, take_mean: bool, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """latents float16 (N, C, H, W), labels int64 (N,) or None. Raises InputError."""
    names, read = open_files(path)
    files = [name for name in names if is_mean_std(name)]
    rng, arrays = np.random.default_rng(seed), []
    for name in files:
        array = read_array(read, name).astype(np.float32, copy=False)
        if array.ndim != 3 or len(array) % 2:
            raise InputError(f"{name} has the shape {array.shape}, not that of means and deviations, (2 C, H, W)")
        mean, std = np.split(array, 2)
        if std.min() < 0:
            raise InputError(f"{name} has negative deviations; its second half must hold the deviations")
        latent = mean if take_mean else mean + std * rng.standard_normal(mean.shape, dtype=np.float32)
        arrays.append(as_float16(latent, name))
        if len(arrays) % 1000 == 0:
            show_progress(f"{len(arrays):,} of {len(files):,} latents")
    labels = None
    if any(Path(name).name == "dataset.json" for name in names):
        listing = next(name for name in names if Path(name).name == "dataset.json")
        try:
            of = {str(Path(name)): label for name, label in json.loads(read(listing))["labels"] or []}
            folder = Path(listing).parent
            listed = [of[str(Path(name).relative_to(folder))] for name in files] if of else []
            if any(type(label) is not int for label in listed):
                raise ValueError("labels must be whole numbers")
            labels = np.array(listed) if of else None
        except Exception as error:  # foreign bytes can fail in any way
            raise InputError(f"{listing} does not name a class number for every file ({one_line(error)})") from None
    return stack(arrays, files), labels


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a folder or a .zip of latents")
    add("--labels", type=Path, metavar="DIR", help="fast-DiT: the folder of labels")
    add("--mean", action="store_true", help="EDM2, REPA: the means instead of a draw")
    add("--seed", type=seed_number, default=0, metavar="N", help="of the draw (default 0)")
    add("--out", type=Path, required=True, metavar="FILE.npz")
    args = parser.parse_args()
    if args.out.suffix != ".npz":
        raise InputError(f"--out {args.out} must be FILE.npz")
    check_writable(args.out, "--out")
    names, _ = open_files(args.source)
    with_deviations = any(map(is_mean_std, names))
    if args.labels if with_deviations else args.mean:
        raise InputError("--labels is for folders of i.npy, --mean for img-mean-std-*.npy, whose labels stand in "
                         "dataset.json")
    if with_deviations:
        latents, labels = from_mean_std(args.source, args.mean, args.seed)
    else:
        latents, labels = from_fast_dit(args.source, args.labels)
    end_progress()
    if labels is not None and not 0 <= labels.min() <= labels.max() <= 9999:
        raise InputError(f"{args.source} has labels from {labels.min()} to {labels.max()}, expected are 0 to 9999")
    arrays = dict(latents=latents) | ({} if labels is None else dict(labels=labels))
    write_then_rename(args.out, lambda file: np.savez(file, **arrays))
    classes = "no labels" if labels is None else f"{labels.max() + 1} classes"
    print(f"wrote {len(latents):,} latents {latents.shape[1:]}, {classes}: {args.out}")


if __name__ == "__main__":
    run_script(main)
