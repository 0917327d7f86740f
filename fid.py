"""FID, sFID, Inception Score, precision and recall: how far are generated images from real ones?

    python fid.py runs/NAME/samples.npz cifar10
    python fid.py samples/ /data/celeba64.zip --num 10000 --json
    python fid.py samples.npz shapes --features shapes_clf.features.pt

Each side is a dataset name, a folder, a ZIP, a .npz of images, or a .npz of statistics. Both go through
the same network once, batch by batch, and only sums are kept (and the features of at most --pr-num
images, for precision and recall). The default network is the Inception of 2015 that every published FID
uses; with --features FILE (experiments/classifier.py trains one) the same distance in other features is
called `frechet_distance`, never FID.

Figures compare only between runs with the same number of images, the same reference and the same
resizing. Ours is pytorch-fid's (bilinear, half-pixel centres); the TensorFlow graph of the ADM suite
places its pixels differently, so its figures are close to ours, not equal.

Reads after data.py; nothing else here depends on it. Every image is uint8 before it is measured.
"""

import contextlib
import functools
import hashlib
import json
import logging
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.linalg.lapack import dpstrf
from torchvision.models import Inception3

from data import (InputError, Parser, Source, check_sha256, duration, end_progress, gather, in_turns, open_source,
                  pick_device, positive_int, run_script, show_progress, start_processes, write_then_rename)

# ----------------------------------------------------------------------------------------------------
# The measures


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """The squared Frechet distance of two Gaussians (Heusel et al. 2017, Eq. (6)):

        |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2)

    mu (D,), sigma (D, D) symmetric, arrays or CPU tensors; computed in float64. Covariances may be rank
    deficient, as they are with fewer images than dimensions. Raises InputError if shapes do not match.

    The last trace needs no matrix square root. Write sigma1 = C C^T; then sigma1 sigma2 and the symmetric
    matrix C^T sigma2 C have the same non-zero eigenvalues, and the trace is the sum of their square roots.
    C comes from a Cholesky factorisation with pivoting: it stops at the rank of sigma1, and its columns
    shrink from first to last, in which order an eigensolver keeps the small eigenvalues accurate, too.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    d = mu1.size
    if any(a.shape != (d,) for a in (mu1, mu2)) or any(a.shape != (d, d) for a in (sigma1, sigma2)):
        raise InputError(f"statistics do not match: mu {mu1.shape} and {mu2.shape}, sigma {sigma1.shape} and "
                         f"{sigma2.shape}; both sides must come from the same features")
    factor, pivots, rank, _ = dpstrf(sigma1, lower=1)  # sigma1[pivots][:, pivots] = L L^T, L (D, rank)
    c = np.zeros((d, rank))
    c[pivots - 1] = np.tril(factor)[:, :rank]  # LAPACK counts from 1
    eigenvalues = torch.linalg.eigvalsh(torch.from_numpy(c.T @ sigma2 @ c))  # (rank,)
    trace_of_root = eigenvalues.clamp(min=0).sqrt().sum().item()  # below 0 is rounding: the matrix is PSD
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(0.0, float(distance))  # equal sides come out at +-1e-12


class Moments:
    """Mean and covariance of a stream of vectors, in float64; memory does not grow with their number."""

    def __init__(self):
        self.n = 0

    def add(self, x: torch.Tensor) -> None:
        """x: (B, D)"""
        x = x.double()
        if self.n == 0:
            # sums of squares lose digits when the mean is large beside the spread, so all is
            # accumulated around a point near the mean
            self.origin = x.mean(0)  # (D,)
            self.sum = torch.zeros_like(self.origin)
            self.products = self.sum.new_zeros(x.shape[1], x.shape[1])
        x = x - self.origin
        self.n += len(x)
        self.sum += x.sum(0)
        self.products.addmm_(x.T, x)  # (D, D)

    def merge(self, other: "Moments") -> None:
        """Adds what another process has seen."""
        if self.n == 0 or other.n == 0:
            if other.n:
                self.__dict__.update(other.__dict__)
            return
        shift = other.origin.to(self.origin.device) - self.origin
        total, products = other.sum.to(shift.device), other.products.to(shift.device)
        cross = torch.outer(total, shift)
        self.products += products + cross + cross.T + other.n * torch.outer(shift, shift)
        self.sum += total + other.n * shift
        self.n += other.n

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """mu (D,) and the unbiased sigma (D, D), as numpy.cov gives it."""
        mean = self.sum / self.n
        sigma = (self.products - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return (self.origin + mean).cpu().numpy(), sigma.cpu().numpy()


def inception_score(sums: torch.Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016, section 4), averaged over the splits.

    sums (splits, classes + 2): per split the sum over its images of p(y|x), then of sum_y p log p, then of 1.
    """
    sums = sums[sums[:, -1] > 0]  # fewer images than splits leave some empty
    p_y, p_log_p = sums[:, :-2] / sums[:, -1:], sums[:, -2] / sums[:, -1]
    return (p_log_p + torch.special.entr(p_y).sum(1)).exp().mean().item()  # entr(p) = -p log p


K = 3  # the neighbour that spans a ball of precision and recall
BLOCK = 2048  # rows and columns of distances held at once: 32 MB


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(A, D), (B, D) -> (A, B) float64: float32 would lose the order of near neighbours to cancellation."""
    a, b = a.double(), b.double()
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def _squared_radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """(N, D) -> (N,): the squared distance from each point to its k-th nearest neighbour."""
    radii = []
    for rows in _reporting(x.split(BLOCK), "neighbours", "blocks"):
        nearest = rows.new_full((len(rows), k + 1), torch.inf, dtype=torch.float64)  # k + 1: itself is one
        for columns in x.split(BLOCK):
            nearest = torch.cat([nearest, _squared_distances(rows, columns)], 1).topk(k + 1, largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = K) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq. (1) and (2)).

    Around each point lies a ball that reaches to its k-th nearest neighbour on the same side. Precision is
    the share of generated points inside some real ball, recall the share of real points inside some
    generated ball. Inside is `<`, as in the prdc package; the paper writes `<=`, and continuous features
    cannot tell. real (N, D), generated (M, D), with N, M > k. Both depend on N and M: keep them equal.
    """
    if min(len(real), len(generated)) <= k:
        raise InputError(f"precision and recall with k = {k} need more than {k} images a side, "
                         f"got {len(real)} and {len(generated)}")
    real_radii, generated_radii = _squared_radii(real, k), _squared_radii(generated, k)
    inside_real = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    inside_generated = []
    for rows, radii in _reporting(list(zip(real.split(BLOCK), real_radii.split(BLOCK))), "real x generated", "blocks"):
        covered = torch.zeros(len(rows), dtype=torch.bool, device=real.device)
        for i in range(0, len(generated), BLOCK):
            distances = _squared_distances(rows, generated[i:i + BLOCK])  # (rows, columns)
            inside_real[i:i + BLOCK] |= (distances < radii[:, None]).any(0)
            covered |= (distances < generated_radii[i:i + BLOCK]).any(1)
        inside_generated.append(covered)
    return inside_real.double().mean().item(), torch.cat(inside_generated).double().mean().item()


def _reporting(batches, what: str, unit: str):
    """Yields the batches; every ten seconds a line says how far it is and how long it will take."""
    start = last = time.time()
    for done, batch in enumerate(batches):
        if time.time() - last > 10:
            last = time.time()
            left = (last - start) / done * (len(batches) - done)
            show_progress(f"{what}: {done:,} of {len(batches):,} {unit}, {duration(left)} left")
        yield batch
    if last > start:
        end_progress()


# ----------------------------------------------------------------------------------------------------
# The networks

INCEPTION = "inception-2015-12-05"
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def _with_pool(block: nn.Module, x: torch.Tensor, pool) -> torch.Tensor:
    """A torchvision block with another pooling in its last branch: it computes the branches, (N, C_i, h, w)
    each, and we replace the last."""
    return torch.cat(block._forward(x)[:-1] + [block.branch_pool(pool(x))], 1)


# the graph of 2015 averages over the pixels that exist; torchvision counts the zeros of the padding, too
_average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class Inception(Inception3):
    """Inception-v3 as the TensorFlow graph inception-2015-12-05 has it: torchvision's layers with other
    poolings. Averages leave the padding out, and the last block takes the maximum (which looks like a
    slip of 2015, but belongs to what FID means). 1,008 classes.
    """

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """uint8 (N, 3, H, W) -> features (N, 2048), spatial features (N, 2023), logits (N, 1008), float32."""
        x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
        x = self.Conv2d_1a_3x3(2 * x - 1)  # (N, 32, 149, 149)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x))  # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (N, 192, 35, 35)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d):
            x = _with_pool(block, x, _average)  # (N, 288, 35, 35)
        x = self.Mixed_6a(x)  # (N, 768, 17, 17)
        for block in (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d):
            x = _with_pool(block, x, _average)
        # what the ADM suite calls mixed_6/conv: the 1x1 branch, which comes first in Mixed_6d (TensorFlow
        # counts the blocks from 5b as 0); its first 7 channels, flattened in TensorFlow's order
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (N, 7, 17, 17) -> (N, 2023)
        x = _with_pool(self.Mixed_6e, x, _average)
        x = self.Mixed_7a(x)  # (N, 1280, 8, 8)
        x = _with_pool(self.Mixed_7b, x, _average)
        x = _with_pool(self.Mixed_7c, x, _maximum)  # (N, 2048, 8, 8)
        features = x.mean((2, 3))  # (N, 2048)
        return features, spatial, F.linear(features, self.fc.weight)  # without fc.bias, as the ADM suite


@dataclass
class Extractor:
    """Which features: `name` for people, `key` (the file's SHA-256) for the cache, and load(device), which
    gives a function from uint8 (N, 3, H, W) to (features, spatial or None, logits or None)."""
    name: str
    key: str
    load: Callable


def _hash_of(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); give the path of an existing file") from None


def inception_extractor(path: Path | None = None) -> Extractor:
    """The Inception network; its weights come from `path`, or from torch's hub cache, fetched there once."""
    key = _hash_of(path) if path else INCEPTION_SHA256

    def load(device: torch.device):
        file = path or Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name
        if not file.exists():
            try:  # elsewhere first: a failed download leaves nothing behind
                with tempfile.TemporaryDirectory() as folder:
                    fetched = Path(folder) / file.name
                    torch.hub.download_url_to_file(INCEPTION_URL, str(fetched), INCEPTION_SHA256, sys.stderr.isatty())
                    write_then_rename(file, lambda f: f.write(fetched.read_bytes()))
            except Exception as error:  # no network, a proxy's refusal, another file than asked for, a full disk
                raise InputError(f"cannot download {INCEPTION_URL} ({error}); put {file.name} into {file.parent}/, "
                                 "or name it with --inception FILE, or use other --features FILE") from None
        if not path:
            check_sha256(file, INCEPTION_SHA256)
        net = Inception().eval()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own remark on a TorchScript file
                net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # a foreign file can fail in any way
            raise InputError(f"{file} does not hold the weights of the FID Inception network "
                             f"({str(error).splitlines()[0][:100]})") from None
        return net.to(device)

    # weights of your own are named by their file, and their distance is not called FID
    name = INCEPTION if key == INCEPTION_SHA256 else f"{path.name} sha256:{key[:12]}"
    return Extractor(name, key, functools.cache(load))


def file_extractor(path: Path) -> Extractor:
    """A TorchScript file, or one of torch.export (.pt2), from uint8 (N, 3, H, W) to float (N, D). It is code,
    and runs: open such files only from people you trust."""
    key = _hash_of(path)

    def load(device: torch.device):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer torch calls TorchScript old
                logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # its traceback; ours is one line
                if path.suffix == ".pt2":
                    module = torch.export.load(path).module().to(device)  # knows no eval(): it is fixed as exported
                else:
                    module = torch.jit.load(path, device).eval()
        except Exception:  # a foreign file can fail in any way
            raise InputError(f"--features {path} is no TorchScript file (torch.jit.save) and no .pt2 file of "
                             "torch.export.save; experiments/classifier.py writes one (NAME.features.pt)") from None

        def run(images: torch.Tensor):
            try:
                features = module(images)
            except Exception as error:  # it is a stranger's code
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:150]
                raise InputError(f"--features {path} fails on uint8 images {tuple(images.shape)}: {reason}") from None
            given = tuple(features.shape) if torch.is_tensor(features) else (type(features).__name__,)
            if len(given) != 2 or given[0] != len(images) or given[1] < 1:
                raise InputError(f"--features {path} gave {given} for images {tuple(images.shape)}; "
                                 "expected one row of features per image, (N, D), D >= 1")
            return features, None, None

        return run

    return Extractor(f"{path.name} sha256:{key[:12]}", key, functools.cache(load))


# ----------------------------------------------------------------------------------------------------
# One side of the comparison: images measured in one pass, or statistics read from a file


@dataclass
class Side:
    """What is known of one side; None for what is not."""
    mu: np.ndarray  # (D,) float64
    sigma: np.ndarray  # (D, D) float64
    mu_s: np.ndarray | None = None  # (2023,) of the spatial features, for sFID
    sigma_s: np.ndarray | None = None
    n: int | None = None  # how many images mu and sigma are of
    features: str | None = None  # name of the extractor
    size: str | None = None  # of the images, width x height
    points: torch.Tensor | None = None  # (P, D) float32: the features for precision and recall
    name: str = ""
    inception_score: float | None = None
    notes: list[str] = field(default_factory=list)  # what to tell the person when all went well


STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "n", "features")  # of Side; what a statistics file may hold


def spread(n: int, num: int) -> torch.Tensor:
    """`num` of the indices 0..n-1 (or all): one from each of `num` equal stretches, always the same.

    Not the first ones, for files are often sorted by class; nor at a fixed step, for classes that take
    turns (shapes do) would alias with it; so at a random place in each stretch.
    """
    num = min(n, num)
    first = torch.arange(num + 1) * n // max(num, 1)
    place = torch.rand(num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return first[:-1] + (place * first.diff()).long()


@torch.inference_mode()
def measure(source: Source, extractor: Extractor, device: torch.device, batch_size: int = 64, num: int | None = None,
            pr_num: int = 50_000, rank: int = 0, world: int = 1) -> Side:
    """Sends the images (all, or `num` of them, see `spread`) through the network once. Of `world` processes,
    number `rank` takes every world-th batch; all of them return the whole result."""
    indices = spread(len(source), num or len(source))
    n = len(indices)
    if n < 2:
        raise InputError(f"{source.name}: {n} of {len(source):,} images, and one image has no covariance; "
                         "give at least 2 (10,000 for a figure to trust)")
    keep = torch.zeros(n, dtype=torch.bool)
    keep[spread(n, pr_num)] = True
    # ten consecutive tenths, as the ADM suite splits 50,000 images; if the images come sorted by class, a
    # tenth would hold one class and score 1, so then every tenth image
    labels = source.labels
    by_class = labels is not None and bool((labels.diff() >= 0).all()) and bool(labels[0] != labels[-1])
    split = torch.arange(n) % 10 if by_class else torch.arange(n) * 10 // n

    network = extractor.load(device)
    host = torch.device("cpu") if device.type == "mps" else device  # MPS knows no float64
    moments, spatial_moments, sums, points = Moments(), Moments(), torch.zeros(10, 1008 + 2).double(), []
    mine = torch.arange(n).split(batch_size)[rank::world]
    for positions in _reporting(mine, source.name, f"batches of {batch_size}"):
        picked = indices[positions].tolist()
        if n == len(source):
            images = source.read(picked[0], picked[-1] + 1)
        else:
            images = torch.cat([source.read(i, i + 1) for i in picked])
        features, spatial, logits = network(images.to(device))
        features = features.to(host)
        finite = features.isfinite().all(1).tolist()
        if not all(finite):
            raise InputError(f"{source.name}: features of image {picked[finite.index(False)]} (counted from 0) are not "
                             f"finite; the network {extractor.name} is broken or numerically unstable")
        moments.add(features)
        points.append(features.cpu()[keep[positions]].float())
        if spatial is not None:
            spatial_moments.add(spatial.to(host))
            p = logits.cpu().double().softmax(1)
            p_log_p = -torch.special.entr(p).sum(1, keepdim=True)
            sums.index_add_(0, split[positions], torch.cat([p, p_log_p, torch.ones_like(p_log_p)], 1))
    everyone = gather((moments, spatial_moments, sums, points), world)
    for i, (others_moments, others_spatial, others_sums, _) in enumerate(everyone):
        if i != rank:
            moments.merge(others_moments), spatial_moments.merge(others_spatial)
            sums += others_sums
    points = in_turns([parts for *_, parts in everyone])
    height, width = source.read(0, 1).shape[2:]  # a process may have had no batch
    mu_s, sigma_s = spatial_moments.result() if spatial_moments.n else (None, None)
    score = inception_score(sums) if spatial_moments.n else None
    return Side(*moments.result(), mu_s, sigma_s, n, extractor.name, f"{width}x{height}",
                torch.cat(points) if pr_num else None, source.name, score)


def save_statistics(path: Path, side: Side, *more: str) -> None:
    """Writes `mu`, `sigma`, `n`, `features`, for Inception `mu_s` and `sigma_s` (the names that EDM,
    pytorch-fid and the ADM suite read), and what else is named of Side."""
    arrays = {key: getattr(side, key) for key in STATISTICS + more if getattr(side, key) is not None}
    write_then_rename(path, lambda file: np.savez(file, **arrays))


def read_statistics(path: Path) -> Side:
    """Reads what `save_statistics` wrote, or anyone else's `mu` and `sigma`. Raises InputError if damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in (*STATISTICS, "size", "points") if key in file.files}
        for key, kind in (("n", int), ("features", str), ("size", str)):
            if key in found:  # other tools may give these names to arrays
                found[key] = kind(found[key].item()) if found[key].ndim == 0 else None
        if "points" in found:
            found["points"] = torch.from_numpy(found["points"])
        pairs = [(mu, "sigma" + mu[2:]) for mu in ("mu", "mu_s") if mu in found]
        for key in sum(pairs, ()):
            found[key] = found[key].astype(np.float64)
    except Exception as error:  # truncated archives, pickled objects, a missing sigma, foreign bytes
        raise InputError(f"{path} is not a readable statistics file with `mu` and `sigma` ({error})") from None
    for mu, sigma in pairs:
        m, s = found[mu], found[sigma]
        if m.ndim != 1 or s.shape != 2 * m.shape or not len(m):
            raise InputError(f"{path}: `{mu}` is {m.shape} and `{sigma}` is {s.shape}; expected (D,) and (D, D)")
        if not (np.isfinite(m).all() and np.isfinite(s).all()):
            raise InputError(f"{path}: `{mu}` or `{sigma}` holds NaN or infinite values; compute the statistics again")
        if np.abs(s - s.T).max() > 1e-4 * np.abs(s).max() or s.diagonal().min() < -1e-4 * np.abs(s).max():
            raise InputError(f"{path}: `{sigma}` is no covariance: it is not symmetric or has a negative variance")
    return Side(**found, name=str(path))


def _content_key(source: Source) -> str:
    """Changes whenever an image does: the source's own key, or a hash of the bytes."""
    if source.cache_key:
        return source.cache_key
    digest = hashlib.sha256()
    for i in range(0, len(source), 1024):
        images = source.read(i, min(i + 1024, len(source)))
        digest.update(str(tuple(images.shape)).encode() + images.contiguous().numpy().tobytes())
    return digest.hexdigest()


def measure_once(source: Source, extractor: Extractor, device: torch.device, batch_size: int, num: int | None,
                 pr_num: int, cache: Path, rank: int = 0, world: int = 1) -> Side:
    """`measure`, or what it gave before for the same images and features: it is kept in the folder `cache`."""
    key = json.dumps([1, _content_key(source), extractor.key, num, pr_num])
    path = cache / f"fid-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    if path.exists():
        with contextlib.suppress(InputError):  # a damaged cache is only a reason to measure again
            return replace(read_statistics(path), name=source.name, features=extractor.name)  # files get renamed
    side = measure(source, extractor, device, batch_size, num, pr_num, rank, world)
    try:
        save_statistics(path, side, "size", "points")
    except OSError as error:
        side.notes.append(f"note: cannot keep the reference's statistics in {cache} ({error.strerror})")
    return side


# ----------------------------------------------------------------------------------------------------
# The script


def open_input(name: str, extractor: Extractor, args) -> tuple[Side | None, Source | None]:
    """What a path or dataset name holds: statistics, images, or both, as the ADM suite's reference files do
    (statistics of a whole dataset, and some of its images). Nothing is measured yet: what is wrong with
    a path is said at once."""
    held, statistics, images = (), None, None
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(name) as archive:  # an .npz is a ZIP
        held = archive.namelist()
    if "mu.npy" not in held or ("arr_0.npy" in held and (args.pr_num or args.features)):
        images = open_source(name, args.data_dir, args.split, args.image_size, args.num or 20_000)
    if not images or ("mu.npy" in held and not args.features):  # with both, the statistics are of Inception
        statistics = read_statistics(Path(name))
        # by the hash, which is the last word: files get renamed
        if statistics.features and statistics.features.split()[-1] != extractor.name.split()[-1]:
            raise InputError(f"{name} holds statistics of the features {statistics.features}, not of {extractor.name}; "
                             "name the features with --features, or measure the images again")
        if extractor.name == INCEPTION and len(statistics.mu) != 2048:
            raise InputError(f"{name} holds statistics of {len(statistics.mu):,} dimensions, Inception's have 2,048; "
                             "give the file that made them with --features")
    return statistics, images


def compare(generated: Side, reference: Side, extractor: Extractor, device: torch.device) -> tuple[dict, list[str]]:
    """The object that --json prints, and lines on what biases it. Raises InputError if the sides' features
    have different dimensions."""
    if len(generated.mu) != len(reference.mu):
        raise InputError(f"{generated.name} has {len(generated.mu):,} features per image and {reference.name} has "
                         f"{len(reference.mu):,}; both sides must come from the same features")
    notes = generated.notes + reference.notes

    def warn(line: str) -> None:
        notes.append(f"warning: {line}")

    for side in (generated, reference):
        if side.n is not None and side.n < 10_000:
            warn(f"{side.name}: {side.n:,} images; below 10,000 the distance is biased upwards, the more the fewer "
                 "images, so compare it only with runs of the same number")
    if None not in (generated.size, reference.size) and generated.size != reference.size:
        warn(f"images of {generated.size} against {reference.size}: the difference in sharpness counts as distance")
    if None not in (generated.n, reference.n) and generated.n < reference.n / 2:
        warn(f"{generated.n:,} generated images against {reference.n:,}: compare only with runs of these numbers")
    precision = recall = None
    if generated.points is not None and reference.points is not None:
        sizes = len(generated.points), len(reference.points)
        if sizes[0] != sizes[1]:
            warn(f"precision and recall of {sizes[0]:,} against {sizes[1]:,} images are not comparable with those of "
                 "equal numbers; --pr-num or --num makes them equal")
        if min(sizes) > K:
            host = device if device.type == "cuda" else torch.device("cpu")
            precision, recall = precision_recall(reference.points.to(host), generated.points.to(host), K)
        else:
            warn(f"precision and recall need more than {K} images a side")
    is_fid = extractor.name == INCEPTION
    spatial = (generated.mu_s, generated.sigma_s, reference.mu_s, reference.sigma_s)
    return {
        "fid" if is_fid else "frechet_distance":
            frechet_distance(generated.mu, generated.sigma, reference.mu, reference.sigma),
        "sfid": frechet_distance(*spatial) if is_fid and all(a is not None for a in spatial) else None,
        "inception_score": generated.inception_score if is_fid else None, "precision": precision, "recall": recall,
        "n_generated": generated.n, "n_reference": reference.n, "features": extractor.name}, notes


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    what = ("a folder, a .zip or a .npz of images, a .npz of statistics (mu, sigma) or of both, or shapes, cifar10, "
            "celeba")
    add("generated", metavar="GENERATED", help=what)
    add("reference", metavar="REFERENCE", help="the same kinds; what is measured of it is kept in DATA_DIR/cache")
    add("--num", type=positive_int, help="measure at most this many images of each side, one out of each of as "
        "many equal stretches, always the same ones (default: all; shapes: 20000)")
    add("--features", type=Path, metavar="FILE", help="a TorchScript or torch.export (.pt2) module from uint8 "
        "(N,3,H,W) to features (N,D) instead of Inception. Such a file is code and runs: open it only if you trust "
        "its author")
    add("--inception", type=Path, metavar="FILE", help="the Inception weights, if torch's hub cache does not hold "
        "them and there is no network")
    add("--batch-size", type=positive_int, default=64, help="images per pass through the network (default: 64)")
    add("--pr-num", type=int, default=50_000, help="at most this many images a side for precision and recall; the "
        "cost grows with the square; 0 leaves them out (default: 50000)")
    add("--save-stats", type=Path, metavar="FILE.npz", help="also write the statistics of REFERENCE (mu, sigma, n)")
    add("--data-dir", default="data", help="where datasets and the cache live (default: data)")
    add("--split", default="train", choices=("train", "test"), help="of a dataset given by name (default: train)")
    add("--image-size", type=positive_int, help="the size to draw shapes at (default: 16); images from files are "
        "cropped to the central square and resized to this")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--json", action="store_true", help="print one JSON object; null is what cannot be had")
    args = parser.parse_args()
    if args.pr_num < 0:
        raise InputError(f"--pr-num {args.pr_num}: give 0 for no precision and recall, or a number of images")
    if args.features and args.inception:
        raise InputError("--features and --inception exclude each other: the one takes the place of the other")
    rank, world, device = start_processes(pick_device(args.device))
    torch.backends.cudnn.allow_tf32 = False  # 10-bit products would move the features in the third digit
    extractor = file_extractor(args.features) if args.features else inception_extractor(args.inception)
    cache = Path(args.data_dir) / "cache"
    with contextlib.redirect_stdout(sys.stderr if rank == 0 else sys.stdout):  # stdout is for the result alone
        inputs = [open_input(name, extractor, args) for name in (args.generated, args.reference)]
        sides = []
        for (statistics, images), how in zip(inputs, (measure, functools.partial(measure_once, cache=cache))):
            if images is None:
                sides.append(statistics)
                continue
            side = how(images, extractor, device, args.batch_size, args.num, args.pr_num, rank=rank, world=world)
            if side.n < len(images):
                side.notes.append(f"note: {images.name}: {side.n:,} of {len(images):,} images, spread over all")
            if statistics:  # of more images than these, which serve for precision, recall and Inception Score
                side = replace(side, **{key: getattr(statistics, key) for key in STATISTICS})
            sides.append(side)
        generated, reference = sides
        if rank:
            return
        result, notes = compare(generated, reference, extractor, device)
    if args.save_stats:
        try:
            save_statistics(args.save_stats, reference)
        except OSError as error:
            raise InputError(f"--save-stats {args.save_stats} cannot be written ({error.strerror}); "
                             "give another path") from None
    for line in notes:  # only now, so that bad input costs one line
        print(line, file=sys.stderr)
    if args.json:
        print(json.dumps(result, allow_nan=False))
        return
    for label, side in (("generated", generated), ("reference", reference)):
        number = "an unknown number of" if side.n is None else f"{side.n:,}"
        print(f"{label:<12}{side.name}: {number} images" + (f" of {side.size}" if side.size else ""))
    print(f"{'features':<12}{extractor.name}, {len(generated.mu):,} dimensions\n")
    labels = {"fid": "FID", "frechet_distance": "Frechet distance (not an FID)", "sfid": "sFID",
              "inception_score": "Inception Score", "precision": f"precision (k = {K})", "recall": "recall"}
    for key, label in labels.items():
        if result.get(key) is not None:
            print(f"{label:<30}{result[key]:>12.4f}")


if __name__ == "__main__":
    run_script(main)
