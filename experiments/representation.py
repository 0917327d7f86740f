"""What can a noisy image still say, and what does the network make of it? ERD's analyses (Fig. 1 to 4) of a run.

    python experiments/representation.py --run runs/NAME                    shapes: minutes on a CPU
    python experiments/representation.py --run runs/NAME --test data/cifar/test --train-images 10000

At each noise level t, with x_t = alpha x_0 + sigma eps, alpha = sqrt(ab_t), sigma = sqrt(1 - ab_t):

    (1) Fig. 1: effective rank and spectrum of the predicted x_0 and eps over many images
    (2) 3.2, Fig. 2: the Bayes floor E|y - E[y | x_t]|^2 and the model's loss, for the targets eps, x_0, v, and
        eps - x_0 ("flow")
    (3) 3.3, Fig. 3: recoverable signal |E[y | x_t] - E[y]| against irreducible noise |y - E[y | x_t]|
    (4) 2.2, Fig. 4: the empirical neural tangent kernel (NTK): how training at one t moves the answers at another,
        and its spectrum at each t

The floor is exact, and that of the *empirical* distribution: x_0 is one of the run's training images (or of
--train-images of them, at random; mirrored ones count where training mirrors), of the class that the model is told, so
E[x_0 | x_t] is their mean, weighted by a softmax. Who reaches it has memorised the images: at low noise x_t names its
image, and the floor is zero. A model that generalises cannot, and should not, reach it there: that part of its loss is
not waiting to be optimised away. The held-out loss says which it is: near the training loss, the model generalises.

One fact before the figures: at one x_t all targets are linear in x_0, so that loss and floor of any two differ by one
common factor. Their ratio is the same for all four; a target decides how levels weigh against each other, no more.
"""

import math
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import common
import plot
from data import Dataset, load, to_unit
from model import DiT
from rank_analysis import effective_rank, spearman, trend
from sample import load_model
from schedule import T, predicted_x_0_and_eps, target_coefficients
from script import (DEVICES, InputError, Parser, check_writable, duration, pick_device, positive_int, run_script,
                    seed_number, show_progress)
from train import Batch, read_config

TARGETS = ("eps", "x0", "v", "flow")
LEVELS = "1,20,50,100,200,300,400,500,600,700,800,900,950,990"

# ----------------------------------------------------------------------------------------------------
# The Bayes predictor. Images are rows of D numbers; alpha and sigma are Python floats.


def coefficients(target: str, alpha: float, sigma: float) -> tuple[float, float]:
    """c_x and c_eps of the target y = c_x x_0 + c_eps eps, ERD 2.1. flow: the straight line's velocity."""
    return (-1.0, 1.0) if target == "flow" else target_coefficients(target, alpha, sigma)


def error_factor(target: str, alpha: float, sigma: float) -> float:
    """How far y moves for one unit of x_0 at the same x_t, where eps = (x_t - alpha x_0) / sigma moves as well:
    c_x - c_eps alpha / sigma. Errors of two targets differ by the ratio of these."""
    c_x, c_eps = coefficients(target, alpha, sigma)
    return c_x - c_eps * alpha / sigma


def posterior(x_t: torch.Tensor, images: torch.Tensor, alpha: float, sigma: float, chunk: int = 4096):
    """Mean E[x_0 | x_t] (B, D) and variance E|x_0 - mean|^2 (B,), float64, for x_0 any of `images` (N, D) with the
    same chance. x_t: float64 (B, D).

    log p(image | x_t) = -|x_t - alpha image|^2 / (2 sigma^2) + const, and a softmax over all images, in chunks: the
    largest logarithm so far (`top`) is taken out of all sums. float64, for sigma^2 is 4e-5 at t = 1."""
    top = x_t.new_full((len(x_t), 1), -math.inf)
    total, square, mean = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(x_t)
    for part in images.split(chunk):
        part = part.double()
        norms = part.square().sum(1)  # (n,)
        log_p = (alpha * x_t @ part.T - alpha**2 / 2 * norms) / sigma**2  # (B, n); |x_t|^2 is the same for all
        before, top = top, torch.maximum(top, log_p.amax(1, keepdim=True))
        p, shrink = torch.exp(log_p - top), torch.exp(before - top)
        total = shrink * total + p.sum(1, keepdim=True)
        square = shrink * square + p @ norms[:, None]
        mean = shrink * mean + p @ part
    mean = mean / total
    return mean, (square / total).squeeze(1).sub(mean.square().sum(1)).clamp(min=0)


def decompose(target: str, alpha: float, sigma: float, x_t, mean, variance, centre, predicted_x_0) -> dict[str, float]:
    """ERD Lemma 3.2 and Fig. 3 for a target: means over x_t (B, D) and over the D numbers of an image.

    recoverable |E[y | x_t] - E[y]|^2 + floor = E[|y - E[y]|^2 | x_t], and loss = floor + excess, the squared distance
    of the model to the Bayes predictor: both exact for each x_t, without a draw of y. centre (B, D): the mean x_0,
    which is known before x_t is seen; ERD takes it to be 0."""
    c_x, c_eps = coefficients(target, alpha, sigma)
    factor = error_factor(target, alpha, sigma) ** 2
    bayes = c_x * (mean - centre) + c_eps * (x_t - alpha * mean) / sigma
    floor = factor * variance.mean().item() / x_t.shape[1]
    return dict(recoverable=bayes.square().mean().item(), floor=floor,
                loss=floor + factor * (predicted_x_0 - mean).square().mean().item())


# ----------------------------------------------------------------------------------------------------
# The model at one noise level


def noisy(batch: Batch, alpha: float, sigma: float) -> torch.Tensor:
    """x_t, float64 (B, C, H, W)"""
    return alpha * batch.x_0.double() + sigma * batch.eps.double()


@torch.no_grad()
def predict(model: DiT, x_t: torch.Tensor, y: torch.Tensor, t: int, alpha: float, sigma: float):
    """The predicted x_0 and eps for x_t (B, C, H, W): float64 (B, D)"""
    found = []
    for x, labels in zip(x_t.split(250), y.split(250)):
        output = model(x.float(), torch.full_like(labels, t), labels, model.active(t)).double()
        found.append(predicted_x_0_and_eps(model.config.predict, output, x, alpha, sigma))
    return tuple(torch.cat(parts).flatten(1) for parts in zip(*found))


def measure_level(model: DiT, t: int, seen: Batch, unseen: Batch, images: Dataset) -> dict:
    """(1) to (3) at timestep t. seen, unseen: training images, of those in `images`, and held-out ones. Effective ranks
    and the spectrum (shares of the variance) are those of a cloud of answers (B, D) around its mean."""
    ab = model.noise_schedule.alpha_bar[t].item()
    alpha, sigma = ab**0.5, (1 - ab) ** 0.5
    x_t = noisy(seen, alpha, sigma)
    x_0_hat, eps_hat = predict(model, x_t, seen.y, t, alpha, sigma)  # (B, D)
    x_t = x_t.flatten(1)
    mean, centre, variance = torch.empty_like(x_t), torch.empty_like(x_t), x_t.new_empty(len(x_t))
    for label in seen.y.unique().tolist():
        mine, same = seen.y == label, images.labels == label if images.classes else slice(None)
        of_class = to_unit(images.images[same], model.config.mean, model.config.std).flatten(1).to(x_t.device)
        mean[mine], variance[mine] = posterior(x_t[mine], of_class, alpha, sigma)
        centre[mine] = of_class.double().mean(0)
    held_out, _ = predict(model, noisy(unseen, alpha, sigma), unseen.y, t, alpha, sigma)
    held_out = (held_out - unseen.x_0.double().flatten(1)).square().mean().item()

    row = dict(t=t, targets={})
    for target in TARGETS:
        row["targets"][target] = decompose(target, alpha, sigma, x_t, mean, variance, centre, x_0_hat)
        row["targets"][target]["held_out"] = error_factor(target, alpha, sigma) ** 2 * held_out
    for what, clouds in (("x0", dict(model=x_0_hat, bayes=mean, true=seen.x_0)),
                         ("eps", dict(model=eps_hat, bayes=(x_t - alpha * mean) / sigma, true=seen.eps))):
        centred = {whose: cloud.flatten(1).double() - cloud.flatten(1).double().mean(0)
                   for whose, cloud in clouds.items()}
        variances = torch.linalg.svdvals(centred["model"]).square()
        row[what] = dict(rank={whose: effective_rank(cloud) for whose, cloud in centred.items()},
                         spectrum=(variances / variances.sum()).tolist())
    return row


# ----------------------------------------------------------------------------------------------------
# The neural tangent kernel


def jacobian_rows(model: DiT, x_t: torch.Tensor, y: torch.Tensor, t: int, directions: torch.Tensor) -> torch.Tensor:
    """u^T J for the Jacobian J (D, P) of the output by all parameters, at each x_t (B, C, H, W) and along each output
    direction u of (K, C, H, W): float32 (B, K, P). ERD Eq. (2): Theta(x, x') = J(x) J(x')^T."""
    parameters, active = list(model.parameters()), model.active(t)
    rows = []
    for x, label in zip(x_t.float(), y):
        output = model(x[None], torch.full_like(label, t)[None], label[None], active)[0]  # (C, H, W)
        for u in directions:
            gradients = torch.autograd.grad(output, parameters, u, retain_graph=True, materialize_grads=True,
                                            allow_unused=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows).view(len(x_t), len(directions), -1)


def tangent_kernel(model: DiT, batch: Batch, levels: list[int], count: int, seed: int, say=print) -> dict:
    """The kernel on the samples of `batch`, the same at all levels, and `count` random output directions.

    Directions are normal with variance 1 / count, so that the sum of u^T Theta u over them is, in the mean over draws,
    the trace of Theta. Of each level: the eigenvalues of its (B K, B K) matrix over B, a sketch of the spectrum of
    Theta as an operator over x_t, to compare levels by; their effective rank; and how alike gradients of different
    samples are (mean cosine along one direction: 1 if every image moves the weights in the same way). Between levels:
    the cosine between the gradients of a sample at the one and the other, mean over samples and directions."""
    u = torch.randn(count, *batch.x_0.shape[1:], generator=torch.Generator().manual_seed(seed)) / count**0.5
    u = u.to(batch.x_0.device)  # (K, C, H, W)
    amplitudes = [(ab**0.5, (1 - ab) ** 0.5) for ab in model.noise_schedule.alpha_bar[levels].tolist()]
    model.requires_grad_(True)
    rows = []
    for t, (alpha, sigma) in zip(levels, amplitudes):
        J = jacobian_rows(model, noisy(batch, alpha, sigma), batch.y, t, u)  # (B, K, P)
        B, K = J.shape[:2]
        gram = (J.flatten(0, 1) @ J.flatten(0, 1).T).double() / B
        unit = J / J.norm(dim=2, keepdim=True)
        cosines = torch.einsum("ikp,jkp->ij", unit, unit) / K
        rows.append(dict(t=t, eigenvalues=torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).tolist(),
                         rank=effective_rank(gram), alike=((cosines.sum() - B) / (B * (B - 1))).item()))
        say(f"NTK spectrum at t {t}")
    coupling = torch.zeros(len(levels), len(levels))
    for i in range(len(batch.t)):  # sample by sample: all levels of all samples need not fit into memory
        one = batch.part(slice(i, i + 1))
        J = torch.cat([jacobian_rows(model, noisy(one, *amplitude), one.y, t, u)
                       for t, amplitude in zip(levels, amplitudes)])  # (L, K, P)
        J = J / J.norm(dim=2, keepdim=True)
        coupling += torch.einsum("akp,bkp->ab", J, J).cpu() / (count * len(batch.t))
        say(f"NTK between levels, sample {i + 1}")
    model.requires_grad_(False)
    return dict(levels=rows, coupling=coupling.tolist())


# ----------------------------------------------------------------------------------------------------
# The result


def claims(rows: list[dict], kernel: dict) -> list[tuple[str, str, str]]:
    """(what ERD says and where, whether it appears, the figures). A trend over t, or over its noisier half, is a
    Spearman correlation of 0.9."""
    found, levels, C, half = [], kernel["levels"], np.array(kernel["coupling"]), (len(rows) - 1) // 2

    def over_t(claim, values, sign, note=""):
        rho, rho_half = spearman(values), spearman(values[half:])
        verdict, in_half = trend(sign * rho, len(rows)), trend(sign * rho_half, len(rows) - half)
        if verdict == "does not appear" and in_half.endswith("appears"):
            verdict = f"{in_half} in the noisier half"
        shown = ", ".join(f"{values[i]:.3g} at t {rows[i]['t']}" for i in (0, half, -1))
        shown += f": correlation {rho:+.2f}, from t {rows[half]['t']} on {rho_half:+.2f}"
        found.append((claim, verdict, shown + note))

    for what, figure in (("x0", "1a"), ("eps", "1b")):
        bayes = ", ".join(f"{rows[i][what]['rank']['bayes']:.3g}" for i in (0, half, -1))
        over_t(f"Fig. {figure}: effective rank of the predicted {what} falls with t",
               [row[what]["rank"]["model"] for row in rows], -1,
               f"; of the Bayes answer {bayes}; of the true {what} {rows[0][what]['rank']['true']:.3g}")
    for target in TARGETS:
        floors, losses = np.array([[row["targets"][target][key] for key in ("floor", "loss")] for row in rows]).T
        excess = losses - floors
        floors = np.where(floors > 1e-8, floors, 0)  # below, it is rounding
        rho = spearman(excess.tolist(), floors.tolist())
        found.append((f"F.2, Fig. 7: excess over the floor of {target} falls where the floor rises",
                      trend(-rho, len(rows)), f"floor {floors[0]:.3g} and excess {excess[0]:.3g} at t {rows[0]['t']}, "
                      f"{floors[-1]:.3g} and {excess[-1]:.3g} at t {rows[-1]['t']}: correlation {rho:+.2f}"))
    for target, where, row in (("x0", "high", rows[-1]), ("eps", "low", rows[0])):
        exact, as_model = (noise / signal if signal else math.inf for signal, noise in phase(row["targets"][target]))
        found.append((f"3.3, Fig. 3: noise outgrows the recoverable signal of {target} at {where} noise",
                      "appears" if exact > 1 else "does not appear", f"noise / signal {exact:.3g} at t {row['t']}; "
                      f"{as_model:.3g} if what the model misses on held-out images counts as noise"))
    near, far = np.diag(C, 1).mean(), C[0, -1]
    found.append(("3.3, Fig. 4a: noise levels are coupled by shared weights",
                  "appears" if near > 0.1 else "does not appear",
                  f"cosine of neighbouring levels {near:.2f}, of the two ends {far:.2f}"))
    largest = [row["eigenvalues"][0] for row in levels]
    over_t("3.3, Fig. 4b: the largest eigenvalue of the NTK falls with t", largest, -1)
    over_t("F.4, Fig. 11: the effective rank of the NTK falls with t", [row["rank"] for row in levels], -1)
    over_t("F.4, Fig. 12: gradients of different images grow alike with t", [row["alike"] for row in levels], 1)
    return found


def phase(parts: dict) -> list[tuple[float, float]]:
    """Fig. 3: rms of signal and noise of a target; then the same with the model's held-out error as the noise, for the
    floor of the training images is one that only memory reaches. A signal below nothing counts as none."""
    total = parts["recoverable"] + parts["floor"]
    return [(max(total - noise, 0) ** 0.5, noise**0.5) for noise in (parts["floor"], parts["held_out"])]


def draw(rows: list[dict], kernel: dict) -> list:
    """The panels of the figure, two a row."""
    t, levels, panels = [row["t"] for row in rows], kernel["levels"], []
    for what in ("x0", "eps"):
        curves = {f"{name} {what}": (t, [row[what]["rank"][key] for row in rows])
                  for key, name in (("model", "predicted"), ("bayes", "Bayes"), ("true", "true"))}
        panels.append(plot.line_chart(curves, f"(1) effective rank of {what}", "t", "effective rank"))
    some = [rows[i] for i in sorted({round(x) for x in np.linspace(0, len(rows) - 1, 6)})]
    for what in ("x0", "eps"):
        curves = {f"t {row['t']}": (range(1, 65), (row[what]["spectrum"] + 64 * [None])[:64]) for row in some}
        panels.append(plot.line_chart(curves, f"(1) spectrum of the predicted {what}", "principal direction",
                                      "share of the variance", log_y=True))
    for target in TARGETS:  # a floor below 1e-8 is as good as 0
        values = {name: [row["targets"][target][key] for row in rows] for name, key in
                  (("loss, training images", "loss"), ("held-out images", "held_out"), ("Bayes floor", "floor"))}
        curves = {name: (t, [y if y > 1e-8 else None for y in ys]) for name, ys in values.items()}
        panels.append(plot.line_chart(curves, f"(2) loss of {target}", "t", "squared error", log_y=True))
    for i, noise in enumerate(("irreducible noise", "the model's held-out error")):
        curves = {target: tuple(zip(*(phase(row["targets"][target])[i] for row in rows))) for target in TARGETS}
        panels.append(plot.line_chart(curves | {"as much of both": ([0, 1], [0, 1])}, f"(3) signal, and {noise}",
                                      "recoverable signal, rms", f"{noise}, rms"))
    panels.append(plot.heat_map(kernel["coupling"], t, t, "(4) NTK between levels", "cosine", "t", "t", ".2f"))
    count = len(levels[0]["eigenvalues"])
    curves = {f"number {n}": (t, [row["eigenvalues"][n - 1] for row in levels]) for n in (1, 2, 3, 8, 24) if n <= count}
    panels.append(plot.line_chart(curves, "(4) NTK: eigenvalues", "t", "eigenvalue", log_y=True))
    for key, label in (("rank", f"effective rank, of {count}"), ("alike", "cosine of the gradients of two images")):
        panels.append(plot.line_chart({label: (t, [row[key] for row in levels])}, f"(4) NTK: {label}", "t", label))
    return panels


def print_table(rows: list[dict], kernel: dict, target: str) -> None:
    table = []
    for row, level in zip(rows, kernel["levels"]):
        parts = row["targets"][target]
        ranks = {f"rank of {what}, {whose}": row[what]["rank"][whose] for what in ("x0", "eps")
                 for whose in ("model", "bayes")}
        losses = {key: parts[key] for key in ("floor", "loss", "held_out", "recoverable")}
        table.append({"t": row["t"]} | ranks | losses |
                     {"NTK, largest": level["eigenvalues"][0], "its rank": level["rank"], "alike": level["alike"]})
    specs = {key: ".1f" if "rank" in key else ".3g" for key in table[0]} | {"t": ""}
    print(f"\nfloor, losses and recoverable signal are those of {target}, mean over pixels")
    plot.print_table(table, specs)


# ----------------------------------------------------------------------------------------------------
# The script


def random_part(dataset: Dataset, n: int, seed: int) -> Dataset:
    """n images at random, of all classes: those of folders come class by class."""
    index = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(seed))[:n]
    return Dataset(dataset.name, dataset.images[index], dataset.labels[index], dataset.classes)


def read_command_line() -> Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="folder of a run of train.py")
    common.add_image_flags(parser, "the run's", "the run's")
    parser.set_defaults(dataset=None, data_dir=None)
    add("--train-images", type=positive_int, metavar="N", help="of the run's dataset, N at random: the floor is then "
        "that of these alone (default: all)")
    add("--levels", default=LEVELS, metavar="T,...", help=f"timesteps (default {LEVELS})")
    add("--samples", type=positive_int, default=1000, metavar="N", help="images for (1) to (3) (default 1000)")
    add("--ntk-samples", type=positive_int, default=16, metavar="N", help="of these, for (4) (default 16)")
    add("--directions", type=positive_int, default=4, metavar="N", help="random output directions for (4) (default 4)")
    add("--seed", type=seed_number, default=0, metavar="N", help="of images, noise and directions (default 0)")
    add("--out", type=Path, metavar="DIR", help="where results go (default RUN/representation)")
    add("--device", choices=DEVICES, default="auto", help="(default auto)")
    args = parser.parse_args()
    args.out = args.out or args.run / "representation"
    check_writable(args.out / "results.json", "--out")
    levels = common.choose_numbers("--levels", args.levels, 1, T)
    if any(t % 1 for t in levels) or len(levels) < 2:
        raise InputError(f"--levels takes two or more whole numbers from 1 to {T}")
    args.levels = sorted(int(t) for t in levels)
    if min(args.samples, args.ntk_samples) < 2:
        raise InputError("--samples and --ntk-samples take at least 2")
    return args


def main():
    args = read_command_line()
    device = pick_device(args.device)
    if device.type == "mps":
        device = torch.device("cpu")  # Apple's GPU has no float64
    model, state = load_model(args.run, device)
    _, s = read_config(args.run)
    args.dataset, args.data_dir = args.dataset or s.dataset, args.data_dir or s.data_dir
    held_out = common.held_out_for(args, {args.run: state})
    training = load(args.dataset, args.data_dir, "train", args.image_size, seed=s.seed)
    if args.train_images:
        training = random_part(training, args.train_images, args.seed)
    images, labels = training.images, training.labels
    mirrors = s.flip and not model.config.mean
    if mirrors:  # as likely in training
        images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2)
    training = Dataset(training.name, images, labels, training.classes)
    print(f"the floor is that of {len(images):,} images" + (", mirrored ones among them" if mirrors else "") +
          (", of the class that the model is told" if training.classes else ""), flush=True)

    def draw_batch(dataset: Dataset, count: int, seed: int) -> Batch:
        """`count` random images of the dataset, each with its noise; the same at every level."""
        index = torch.randint(len(dataset.images), (count,), generator=torch.Generator().manual_seed(seed))
        return common.noised_batch(model, dataset, index, torch.zeros(count, dtype=torch.int64), range(count), seed)

    begin, done = time.time(), 0
    work = 3 * len(args.levels) + args.ntk_samples  # pieces that take about as long as each other

    def say(what: str, pieces: int = 1) -> None:
        nonlocal done
        done += pieces
        left = (time.time() - begin) / done * (work - done)
        show_progress(f"{what}; {duration(left)} left")

    seen, unseen = draw_batch(training, args.samples, args.seed), draw_batch(held_out, args.samples, args.seed)
    rows = []
    for t in args.levels:
        rows.append(measure_level(model, t, seen, unseen, training))
        say(f"spectra, floors and losses at t {t}", 2)
    kernel = tangent_kernel(model, seen.part(slice(args.ntk_samples)), args.levels, args.directions, args.seed, say)

    print_table(rows, kernel, model.config.predict)
    found = claims(rows, kernel)
    print(f"\nERD's claims, of one run (it predicts {model.config.predict}); a trend is a Spearman correlation with t "
          "of 0.9\n")
    for claim, verdict, figures in found:
        print(f"{claim}: {verdict.upper()}\n     {figures}")
    plot.save(args.out / "figure.png", *draw(rows, kernel))
    plot.write_json(args.out / "results.json", dict(settings=vars(args), predict=model.config.predict, levels=rows,
                                                    ntk=kernel, claims=found))
    print(f"\nwrote {args.out / 'figure.png'} and {args.out / 'results.json'}")


if __name__ == "__main__":
    run_script(main)
