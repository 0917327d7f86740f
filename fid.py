"""FID, Inception Score, precision and recall: how far are generated images from real ones?

    python fid.py runs/NAME/samples.npz cifar10
    python fid.py part0.npz part1.npz part2.npz /data/celeba64.zip --num 10000 --json
    python fid.py samples.npz shapes --features shapes_clf.features.pt

The last one is the reference; those before it are generated and measured as one set, so that several
processes can each draw a part (`sample.py --first N --num M --out part.npz`). Read data.py before.

The network is the Inception of 2015 that every published FID uses. With --features FILE, which
experiments/classifier.py writes, the distance is called `frechet_distance`, never FID. Figures compare only
between runs with the same number of images, the same reference and the same resizing: ours is pytorch-fid's;
the ADM suite's TensorFlow places its pixels differently, so its figures are close to ours, not equal.
"""

import contextlib
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg.lapack import dpstrf
from torchvision.models import Inception3

from data import Source, open_source
from script import (InputError, Parser, check_sha256, check_writable, end_progress, one_line,
                    pick_device, positive_int, read_torchscript, run_script, sha256_of, show_progress,
                    write_then_rename)

# ----------------------------------------------------------------------------------------------------
# The measures


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """The squared Frechet distance of two Gaussians (Heusel et al. 2017, Eq. (6)):

        |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2)

    mu (D,), sigma (D, D), arrays or CPU tensors; computed in float64. sigma may be rank deficient, as it is
    with fewer images than dimensions. Raises InputError if shapes do not match, a number is not finite, or
    sigma is no covariance.

    The last trace needs no matrix square root. Write sigma1 = C C^T; then sigma1 sigma2 and the symmetric
    matrix C^T sigma2 C have the same non-zero eigenvalues, and the trace is the sum of their square roots.
    C comes from a Cholesky factorisation with pivoting: it stops at the rank of sigma1, and its columns
    shrink from first to last, in which order an eigensolver keeps the small eigenvalues accurate, too.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    d = mu1.size
    if any(a.shape != (d,) for a in (mu1, mu2)) or any(a.shape != (d, d) for a in (sigma1, sigma2)):
        raise InputError(f"mu {mu1.shape} and {mu2.shape} or sigma {sigma1.shape} and {sigma2.shape} do not "
                         "match; both sides must come from the same features")
    if not all((np.abs(a) < 1e75).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise InputError("mu or sigma hold NaN, infinity or more than 1e75; a covariance takes two images")
    factor, pivots, rank, _ = dpstrf(sigma1, lower=1)  # sigma1[pivots][:, pivots] = L L^T, L (D, rank)
    c = np.zeros((d, rank))
    c[pivots - 1] = np.tril(factor)[:, :rank]  # LAPACK counts from 1
    eigenvalues = torch.linalg.eigvalsh(torch.from_numpy(c.T @ sigma2 @ c))  # (rank,)
    # what the factor leaves of a covariance is rounding, and so are eigenvalues below 0
    left = np.trace(sigma1) - np.square(c).sum()
    if abs(left) > 1e-3 * np.trace(sigma1) or (rank and eigenvalues.min() < -1e-3 * eigenvalues.max()):
        raise InputError("sigma is no covariance: it has negative eigenvalues")
    trace_of_root = eigenvalues.clamp(min=0).sqrt().sum().item()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(0.0, float(distance))  # equal sides come out at +-1e-12


class Moments:
    """Mean and covariance of a stream of vectors, in float64; memory does not grow with their number."""

    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0, 0

    def add(self, x: torch.Tensor) -> None:
        """x: (B, D). Sums of squares would lose digits where the mean is large beside the spread; the scatter
        around the means does not (Chan, Golub and LeVeque 1979, Eq. (2.1))."""
        x, n = x.double(), self.n + len(x)
        mean = x.mean(0)  # (D,)
        x, shift = x - mean, mean - self.mean
        self.scatter = self.scatter + x.T @ x + self.n * len(x) / n * torch.outer(shift, shift)  # (D, D)
        self.mean = self.mean + len(x) / n * shift
        self.n = n

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """mu (D,) and the unbiased sigma (D, D), as numpy.cov gives it."""
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy()


def inception_score(logits: torch.Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016, section 4), averaged over ten parts as usual.

    logits (N, classes), in random order: consecutive images of one class would score 1.
    """
    scores = []
    for part in logits.tensor_split(min(10, len(logits))):
        p = part.double().softmax(1)  # (N / 10, classes)
        entropies = torch.special.entr(p).sum(1)  # entr(p) = -p log p
        mean_kl = torch.special.entr(p.mean(0)).sum() - entropies.mean()
        scores.append(mean_kl.exp().item())
    return sum(scores) / len(scores)


ROWS = 1024  # points whose distances to all others are held at once


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq. (1) and (2)).

    Around each point lies a ball that reaches to its k-th nearest neighbour on the same side. Precision is
    the share of generated points inside some real ball, recall the share of real points inside some
    generated ball. real (N, D), generated (M, D), with N, M > k. Both depend on N and M: keep them equal.
    """
    if min(len(real), len(generated)) <= k:
        raise InputError(f"precision and recall need more than {k} images a side, not "
                         f"{len(real)} and {len(generated)}")
    real, generated = real.double(), generated.double()  # float32 would lose the order of near neighbours
    return share_inside(generated, real, k), share_inside(real, generated, k)


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean, of the rows of a (M, D) from those of b (N, D), float64: (M, N). What rounding leaves
    between equal rows, in products that run at full speed, is set to zero: copies have no distance."""
    found = torch.cdist(a, b)
    return found.masked_fill(found < 1e-6 * (a.norm(dim=1)[:, None] + b.norm(dim=1)), 0)


def share_inside(points: torch.Tensor, centres: torch.Tensor, k: int) -> float:
    """The share of `points` (M, D) that lie inside some ball around one of `centres` (N, D). Inside is `<`,
    as in the prdc package; the paper writes `<=`, and continuous features cannot tell."""
    # k + 1, because the nearest neighbour of a centre is itself
    radii = [distances(rows, centres).kthvalue(k + 1).values for rows in centres.split(ROWS)]
    radii = torch.cat(radii) * (1 - 1e-7)  # (N,); a point exactly as far is outside, also after rounding
    inside = [(distances(rows, centres) < radii).any(1) for rows in points.split(ROWS)]
    return torch.cat(inside).double().mean().item()


# ----------------------------------------------------------------------------------------------------
# The Inception network, and one pass of the images through it


def pooled_otherwise(block: torch.nn.Module, x: torch.Tensor, is_last: bool = False) -> torch.Tensor:
    """A torchvision block with another pooling in its last branch: it computes the branches, (N, C_i, h, w)
    each, and we replace the last. Averages leave the padding out; the last block takes the maximum (which
    looks like a slip of 2015, but belongs to what FID means)."""
    if is_last:
        x_pooled = F.max_pool2d(x, 3, stride=1, padding=1)
    else:
        x_pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return torch.cat(block._forward(x)[:-1] + [block.branch_pool(x_pooled)], 1)


class Inception(Inception3):
    """Inception-v3 as the TensorFlow graph inception-2015-12-05 has it: torchvision's layers with other
    poolings and 1,008 classes."""

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (N, 3, H, W) -> features (N, 2048), logits (N, 1008), float32."""
        x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
        x = self.Conv2d_1a_3x3(2 * x - 1)  # (N, 32, 149, 149)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x))  # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (N, 192, 35, 35)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d):
            x = pooled_otherwise(block, x)  # (N, 288, 35, 35)
        x = self.Mixed_6a(x)  # (N, 768, 17, 17)
        for block in (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e):
            x = pooled_otherwise(block, x)
        x = self.Mixed_7a(x)  # (N, 1280, 8, 8)
        x = pooled_otherwise(self.Mixed_7b, x)
        x = pooled_otherwise(self.Mixed_7c, x, is_last=True)  # (N, 2048, 8, 8)
        features = x.mean((2, 3))  # (N, 2048)
        return features, F.linear(features, self.fc.weight)  # without fc.bias, as the ADM suite


@dataclass
class Extractor:
    """Which features. load(device) gives a function from uint8 (N, 3, H, W) to features (N, D) and logits,
    which are None for a network that is not Inception."""
    name: str  # ends in a hash of the file, which its statistics are recognised by
    load: Callable


@dataclass
class Side:
    """What is known of one side of the comparison; None for what is not."""
    mu: np.ndarray  # (D,) float64
    sigma: np.ndarray  # (D, D) float64
    n: int | None = None  # how many images mu and sigma are of
    features: str | None = None  # name of the extractor
    points: np.ndarray | None = None  # (P, D) float32: the features for precision and recall
    inception_score: float | None = None


@torch.inference_mode()
def measure(source: Source, extractor: Extractor, device: torch.device, batch_size: int = 64,
            num: int | None = None, pr_num: int = 50_000) -> Side:
    """Sends the uint8 images (all, or `num` of them) through the network once, in a random order, always the
    same: files are often sorted by class. Kept are sums, the features of the first `pr_num`, and logits."""
    order = torch.randperm(source.n, generator=torch.Generator().manual_seed(0))[:num]
    if len(order) < 2:
        raise InputError(f"{source.name}: {len(order)} image has no covariance; give at least 2, or 10,000 "
                         "for a figure to trust")
    network = extractor.load(device)
    host = torch.device("cpu") if device.type == "mps" else device  # MPS knows no float64
    moments, all_logits, points = Moments(), [], []
    start, readers = time.time(), ThreadPoolExecutor()  # files are decoded side by side
    last = start
    for batch in order.split(batch_size):
        images = torch.cat(list(readers.map(lambda i: source.read(i, i + 1), batch.tolist())))  # (B, 3, H, W)
        features, logits = apply_network(network, images.to(device), extractor.name)  # (B, D), (B, classes)
        points.append(features[:max(0, pr_num - moments.n)].float().cpu())
        if moments.n and features.shape[1] != len(moments.mean):
            raise InputError(f"{extractor.name} gives {len(moments.mean)} features, then {features.shape[1]}")
        moments.add(features.to(host))
        if logits is not None:
            all_logits.append(logits.cpu())
        if time.time() > last + 10:
            last = time.time()
            show_progress(f"{source.name}: {moments.n:,} of {len(order):,} images")
    if last > start:
        end_progress()
    score = inception_score(torch.cat(all_logits)) if all_logits else None
    return Side(*moments.result(), moments.n, extractor.name, torch.cat(points).numpy(), score)


# ----------------------------------------------------------------------------------------------------
# Plumbing: what follows opens, keeps, compares and prints


def apply_network(network: Callable, images: torch.Tensor, name: str) -> tuple:
    """network(images). Raises InputError if it fails, as a stranger's may, or gives no usable features."""
    try:
        outputs = network(images)
        shape = tuple(outputs[0].shape)
        if len(shape) != 2 or shape[0] != len(images) or shape[1] == 0:
            raise ValueError(f"it gives {shape}")
        if not all((x.abs() < 1e30).all() for x in outputs if x is not None):  # beyond, products overflow
            raise ValueError("it gives numbers that are not finite")
    except Exception as error:
        raise InputError(f"{name} fails on uint8 images {tuple(images.shape)}: {one_line(error)}; expected "
                         "are features (N, D), one row of finite numbers per image") from None
    return outputs


INCEPTION = "inception-2015-12-05"
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def inception_extractor() -> Extractor:
    """The Inception network; its weights come from torch's hub cache, fetched there once."""
    def load(device: torch.device) -> Callable:
        network = Inception().eval()
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name
        try:
            if not file.exists():  # torch renames it when it is whole and has this hash
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, file, INCEPTION_SHA256, sys.stderr.isatty())
            check_sha256(file, INCEPTION_SHA256)
            network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # no network, a full disk, a foreign file
            raise InputError(f"no weights of the FID Inception in {file} ({one_line(error)}); put those of "
                             f"{INCEPTION_URL} there") from None
        return network.to(device)

    return Extractor(INCEPTION, load)


def file_extractor(path: Path) -> Extractor:
    """A TorchScript file, from uint8 (N, 3, H, W) to features (N, D). It is code, and runs: open such files
    only from people you trust."""
    name = f"{path.name} sha256:{sha256_of(path)[:12]}"

    def load(device: torch.device) -> Callable:
        what = "--features; experiments/classifier.py writes one (NAME.features.pt)"
        module = read_torchscript(path, device, what)
        return lambda images: (module(images), None)

    return Extractor(name, load)


STATISTICS = ("mu", "sigma", "n", "features")  # of Side, in a .npz of statistics


def save_statistics(path: Path, side: Side, *more: str) -> None:
    """Writes the STATISTICS (EDM and pytorch-fid read mu and sigma) and what else is named."""
    arrays = {key: getattr(side, key) for key in STATISTICS + more if getattr(side, key) is not None}
    write_then_rename(path, lambda file: np.savez(file, **arrays))


def read_statistics(path: Path, *more: str) -> Side:
    """Reads what `save_statistics` wrote, or anyone else's `mu` and `sigma`. Raises InputError if damaged."""
    try:
        with np.load(path) as file:
            found = {key: file[key] for key in STATISTICS + more if key in file.files}
        for key, kind in (("n", int), ("features", one_line)):
            if key in found:  # other tools may give these names to arrays
                found[key] = kind(found[key].item()) if found[key].ndim == 0 else None
        mu = found["mu"] = found["mu"].astype(np.float64, casting="same_kind")
        sigma = found["sigma"] = found["sigma"].astype(np.float64, casting="same_kind")
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
            raise ValueError(f"they are {mu.shape} and {sigma.shape}")
        if not (np.abs(mu).max() < 1e60 and np.abs(sigma).max() < 1e60):
            raise ValueError("they hold NaN or infinite values")
        wrong = max(np.abs(sigma - sigma.T).max(), -sigma.diagonal().min())
        if wrong > 1e-4 * np.abs(sigma).max():
            raise ValueError("sigma is not symmetric or has a negative variance")
        return Side(**found)
    except Exception as error:  # truncated archives, pickled objects, a missing sigma, foreign bytes
        raise InputError(f"{path} is no file of `mu` (D,) and `sigma` (D, D): {one_line(error)}") from None


def measure_once(source, extractor, device, batch_size, num, pr_num, cache: Path) -> Side:
    """`measure`, or what it gave before for the same images and features, kept in the folder `cache`."""
    content = hashlib.sha256(str((source.cache_key, extractor.name, num, pr_num)).encode())
    if not source.cache_key:
        for i in range(0, source.n, 1024):
            images = source.read(i, i + 1024)
            content.update(str(images.shape).encode() + images.contiguous().numpy().tobytes())
    path = cache / f"fid-{content.hexdigest()[:32]}.npz"
    with contextlib.suppress(InputError):  # not there yet, or damaged
        return read_statistics(path, "points")
    side = measure(source, extractor, device, batch_size, num, pr_num)
    with contextlib.suppress(OSError):  # a full disk costs time the next time, not this result
        save_statistics(path, side, "points")
    return side


def open_side(names: list[str], extractor: Extractor, args) -> Side | Source:
    """Statistics, or images that are yet to be measured; those of several names are one set."""
    for name in names:
        arrays = []
        with contextlib.suppress(Exception), np.load(name) as file:
            arrays = file.files
        if "mu" in arrays and len(names) > 1:
            raise InputError(f"{name} holds statistics, which cannot be joined with others; give it alone")
        if "mu" in arrays:
            side = read_statistics(Path(name))
            features = side.features or "an unnamed network"  # as other tools write them
            is_other = side.features and features.split()[-1] != extractor.name.split()[-1]
            if is_other or (extractor.name == INCEPTION and len(side.mu) != 2048):
                raise InputError(f"{name} is statistics of {len(side.mu):,} features of {features}, not of "
                                 f"{extractor.name}; give the file of their network with --features")
            return side
    sources = [open_source(name, args.data_dir, args.split, args.image_size, args.num or 20_000)
               for name in names]
    firsts = [source.read(0, 1) for source in sources]
    if any(first.shape != firsts[0].shape or first.dtype != torch.uint8 for first in firsts):
        raise InputError(f"{', '.join(names)}: what is measured as one set must be uint8 images of one size")
    if len(sources) == 1:
        return sources[0]
    places = [(source, i) for source in sources for i in range(source.n)]

    def read(first: int, last: int) -> torch.Tensor:
        return torch.cat([source.read(i, i + 1) for source, i in places[first:last]])

    return Source(f"{names[0]} and {len(names) - 1} more", len(places), read, None, [])


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("generated", nargs="+", metavar="GENERATED", help="a folder, a .zip or a .npz of images, a .npz of "
        "statistics (mu, sigma), or shapes, cifar10, celeba; several of images are measured as one set")
    add("reference", metavar="REFERENCE", help="one of these; what is measured is kept in DATA_DIR/cache")
    add("--num", type=positive_int, help="images a side, taken at random (default: all; shapes: 20000)")
    add("--features", type=Path, metavar="FILE", help="a TorchScript module from uint8 (N,3,H,W) to features "
        "(N,D) instead of Inception. It is code, and runs: open it only if you trust its author")
    add("--batch-size", type=positive_int, default=64, help="images at a time (default: 64)")
    add("--pr-num", type=int, default=50_000, help="at most this many images a side for precision and "
        "recall; the cost grows with the square; 0 leaves them out (default: 50000)")
    add("--save-stats", type=Path, metavar="FILE.npz", help="also write the statistics of REFERENCE")
    add("--data-dir", default="data", help="where datasets and the cache live (default: data)")
    add("--split", default="train", choices=("train", "test"), help="of a named dataset (default: train)")
    add("--image-size", type=positive_int, help="draw shapes (default: 16), or resize files, to this size")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--json", action="store_true", help="print the result on one line; null is what cannot be had")
    args = parser.parse_intermixed_args()
    if args.pr_num < 0:
        raise InputError(f"--pr-num {args.pr_num}: give 0 for no precision and recall, or a number of images")
    if args.save_stats:
        if args.save_stats.is_dir():
            raise InputError(f"--save-stats {args.save_stats} is a folder; give FILE.npz")
        check_writable(args.save_stats, "--save-stats")
    device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # 10-bit products would move the features in the third digit
    extractor = file_extractor(args.features) if args.features else inception_extractor()
    how = extractor, device, args.batch_size, args.num, args.pr_num
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):
        generated = open_side(args.generated, extractor, args)
        reference = open_side([args.reference], extractor, args)
        shapes = {side.read(0, 1).shape for side in (generated, reference) if isinstance(side, Source)}
        if isinstance(generated, Source):
            generated = measure(generated, *how)
        if isinstance(reference, Source):
            reference = measure_once(reference, *how, Path(args.data_dir) / "cache")

        is_fid = extractor.name == INCEPTION
        distance = frechet_distance(generated.mu, generated.sigma, reference.mu, reference.sigma)
        precision = recall = None
        if generated.points is not None and reference.points is not None:
            where = device if device.type == "cuda" else "cpu"
            real, fake = (torch.from_numpy(side.points).to(where) for side in (reference, generated))
            with contextlib.suppress(InputError):  # too few images
                precision, recall = precision_recall(real, fake)
        if args.save_stats:
            save_statistics(args.save_stats, reference)

    if min(side.n or 10_000 for side in (generated, reference)) < 10_000:
        print("warning: below 10,000 images the distance is biased upwards, the more the fewer: compare only "
              f"runs of as many ({generated.n or '?'} and {reference.n or '?'})", file=sys.stderr)
    if precision is not None and len(real) != len(fake):
        print(f"warning: precision and recall of {len(fake):,} and {len(real):,} images are not comparable "
              "with those of equal numbers; --num or --pr-num makes them equal", file=sys.stderr)
    if len(shapes) > 1:
        print("warning: images of two sizes: the difference in sharpness counts as distance", file=sys.stderr)
    result = {"fid" if is_fid else "frechet_distance": distance,
              "inception_score": generated.inception_score if is_fid else None,
              "precision": precision, "recall": recall, "n_generated": generated.n,
              "n_reference": reference.n, "features": extractor.name}
    print(json.dumps(result, allow_nan=False, indent=None if args.json else 4))


if __name__ == "__main__":
    run_script(main)
