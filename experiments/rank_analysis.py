"""Do noisier timesteps need fewer dimensions? What motivates NA-LR (appendix B), measured on a small budget.

    python experiments/rank_analysis.py                     CIFAR-10 at 16x16, model tiny: minutes on two cores
    python experiments/rank_analysis.py --dataset shapes    the same without a download
    python experiments/rank_analysis.py --model DiT-S/2 --image-size 32 --batch-size 128 --steps 800000 \\
        --group-steps 800000 --checkpoints 20 --gradient-batch 512       a GPU, and 20 GB of checkpoints

Timesteps fall into five groups of similar log-SNR (B.1). Seven models are trained: full rank, low rank (static, a
tenth of each linear layer's parameters), and full rank on each group alone. Then

    (a) B.2: effective rank and Frobenius norm of the full-rank model's gradient in each group, over checkpoints
    (b) B.3: effective rank and Frobenius norm of the weights of the five models trained on one group each
    (c) B.4: what low rank adds to the held-out loss of eps, along t
    (d) B.6: the overlap of the groups' gradient subspaces in the full-rank model, over its checkpoints

Gradients are those of the plain loss of what the models predict, without mirrored images or dropped labels. Weight
matrices are the 2-D weights of the linear layers inside the blocks: adaLN, Q, K, V, Out and both MLP layers. Every
figure is the mean over them; results.json has (a) and (b) for each matrix, too. Checkpoints hold the EMA of the weights, so that is
what is measured. A model starts with zero adaLN and final layers (adaLN-Zero), through which no gradient passes to
the rest: the first checkpoint comes after some training. A stopped script goes on when it is called again with the
same flags. Flags that are not listed here go to train.py, such as --predict eps.
"""

import math
import statistics
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import common
import plot
import train
from common import GROUP_EDGES, GROUP_NAMES
from curriculum import uniform
from data import Dataset, load
from model import DiT, parameter_count
from sample import load_model, save_model
from schedule import T
from script import Parser, pick_device, pick_dtype, positive_int, run_script, seed_number

GROUPS = [(first, end - 1) for first, end in zip(GROUP_EDGES, GROUP_EDGES[1:])]
BIN = 20  # timesteps in a point of the loss curve
BATCHES = 10  # in which the gradients of (a) are accumulated (B.2)
KEEP = 0.1  # share of each linear layer's parameters that low rank leaves (B.4)
ENERGY = 0.95  # share of the squared singular values that spans a gradient's subspace (B.6.1)

# ----------------------------------------------------------------------------------------------------
# Matrices


def effective_rank(matrix: torch.Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007): 1 for a matrix of
    rank one, min(m, n) where all singular values are equal. NaN for a matrix of zeros."""
    s = torch.linalg.svdvals(matrix.double())
    return torch.special.entr(s / s.sum()).sum().exp().item()


def subspace(gradient: torch.Tensor, energy: float = ENERGY) -> torch.Tensor:
    """B.6: the first left singular vectors of a gradient (m, n), as many as it takes for the squares of their
    singular values to hold the share `energy` of all. An orthonormal basis of output directions, float64 (m, d).
    """
    U, s, _ = torch.linalg.svd(gradient.double(), full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    return U[:, :int((share < energy).sum()) + 1]


def overlap(U_1: torch.Tensor, U_2: torch.Tensor) -> float:
    """B.6: the mean cosine of the principal angles between the spans of two orthonormal bases (m, d_1), (m, d_2).

    The paper divides the sum of the singular values of U_1^T U_2 by "k", though each gradient has its own. Here it
    is divided by min(d_1, d_2), the number of principal angles that there are: a subspace inside another one
    overlaps with it by 1. (max(d_1, d_2) would count dimensions that the smaller one lacks as orthogonal.)
    """
    return torch.linalg.svdvals(U_1.T @ U_2).clamp(max=1).mean().item()


def measure(matrices: list[torch.Tensor]) -> tuple[float, float, list[float], list[float]]:
    """Mean effective rank, mean Frobenius norm, and both of each matrix."""
    ranks, norms = [effective_rank(m) for m in matrices], [m.double().norm().item() for m in matrices]
    return statistics.mean(ranks), statistics.mean(norms), ranks, norms


# ----------------------------------------------------------------------------------------------------
# The models


def checkpoint(step: int) -> str:
    return f"model_{step:07d}.pt"


def train_on(folder: Path, flags: list[str], first: int, last: int) -> None:
    """Trains on the timesteps from first to last alone, and keeps the model of every save."""
    print(f"\n{folder}", flush=True)
    run = common.open_run(folder, flags)
    state, dtype = run.state, pick_dtype(run.s.dtype, run.processes.device)
    state.curriculum.base = uniform(T, first, last)

    def take_step(batch: train.Batch) -> torch.Tensor:
        state.spent += run.masked_cost
        return train.train_step(state.model, state, batch, run.s, dtype=dtype)

    def keep_model() -> None:  # before the state: what a kill cuts off is done again
        save_model(folder / checkpoint(state.step), state.ema, run.dataset.classes, run.s.guidance, state.step)

    train.run_steps(run, take_step, keep_model)


# ----------------------------------------------------------------------------------------------------
# (a), (d): gradients of one group of timesteps


def weight_matrices(model: DiT) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2}


def group_gradients(model: DiT, dataset: Dataset, group: tuple[int, int], n: int, batches: int,
                    seed: int) -> list[torch.Tensor]:
    """The gradient of the mean training loss over n samples with timesteps in `group`, for each weight matrix:
    float64 on the CPU. B.2, B.6.1.

    Images and noise depend on the seed alone: they are the same for every group and checkpoint. The timesteps are
    spread evenly over the group. Each of the batches is computed in float32, which leaves effective ranks within
    1e-5 of those from float64; sums over batches and all singular values are float64.
    """
    matrices = list(weight_matrices(model).values())
    model.requires_grad_(False)
    for p in matrices:
        p.requires_grad_(True)
    all_t = common.spread_over(range(group[0], group[1] + 1), n)
    order = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(seed))
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in matrices]
    for b in range(batches):
        samples = range(b, n, batches)  # every batch covers the whole group
        images = order[torch.tensor(samples) % len(order)]
        batch = common.noised_batch(model, dataset, images, all_t[samples], samples, seed)
        loss = train.denoising_loss(model, model, batch)[0].sum() / n
        for sum_, g in zip(total, torch.autograd.grad(loss, matrices)):
            sum_ += g.cpu()
    return total


def gradient_similarity(gradients: list[list[torch.Tensor]], seed: int) -> dict:
    """B.6.1 from gradients[group][matrix]: the overlap of each pair of groups, the mean over matrices; the same
    where one subspace of the pair is replaced by a random one of its size; and the mean dimension of each group.

    The random ones are ours: large subspaces overlap by chance, two of more than m/2 dimensions even necessarily.
    """
    n, g = len(gradients), torch.Generator().manual_seed(seed)
    similarity, chance = torch.zeros(2, n, n, dtype=torch.float64)
    dimensions = torch.zeros(n, dtype=torch.float64)
    for of_groups in zip(*gradients):  # one matrix, all groups
        bases = [subspace(gradient) for gradient in of_groups]
        dimensions += torch.tensor([U.shape[1] for U in bases])
        for i in range(n):
            for j in range(i + 1, n):
                random = torch.linalg.qr(torch.randn(bases[j].shape, dtype=torch.float64, generator=g))[0]
                similarity[i, j] += overlap(bases[i], bases[j])
                chance[i, j] += overlap(bases[i], random)
    count = len(gradients[0])
    similarity, chance = ((a + a.T + count * torch.eye(n)) / count for a in (similarity, chance))
    return {"similarity": similarity.tolist(), "chance": chance.tolist(),
            "dimensions": (dimensions / count).tolist()}


def pair_means(matrix: list[list[float]]) -> dict[str, float]:
    """Means over pairs of the five groups: neighbours, all other pairs ("distant"), the pairs of the three
    noisiest groups ("high t"), those of the three cleanest ("low t"), and all."""
    chosen = {"neighbours": lambda i, j: j == i + 1, "distant": lambda i, j: j > i + 1,
              "high t": lambda i, j: i >= 2, "low t": lambda i, j: j <= 2, "all": lambda i, j: True}
    return {name: statistics.mean(matrix[i][j] for i in range(5) for j in range(i + 1, 5) if belongs(i, j))
            for name, belongs in chosen.items()}


# ----------------------------------------------------------------------------------------------------
# (c): the loss along t


def loss_difference(full: DiT, low_rank: DiT, dataset: Dataset, per_t: int, seed: int) -> dict:
    """Held-out losses of both models at every t, on the same per_t images with the same noise; in bins of BIN
    timesteps and in the five groups, with the standard error of the difference (of the pairs, so smaller than that
    of a loss)."""
    t = torch.arange(1, T + 1).repeat(per_t)
    images = torch.randint(len(dataset.images), t.shape, generator=torch.Generator().manual_seed(seed))
    losses = [common.denoising_losses(net, dataset, images, t, seed).view(per_t, T) for net in (full, low_rank)]

    def means(parts):
        rows = []
        for first, last in parts:
            a, b = (loss[:, first - 1:last].flatten() for loss in losses)
            error = (b - a).std().item() / len(a) ** 0.5
            rows.append({"t": [first, last], "full": a.mean().item(), "low_rank": b.mean().item(),
                         "difference": (b - a).mean().item(), "standard_error": error})
        return rows

    return {"bins": means([(first, first + BIN - 1) for first in range(1, T, BIN)]), "groups": means(GROUPS),
            "parameters": [parameter_count(model.config) for model in (full, low_rank)]}


# ----------------------------------------------------------------------------------------------------
# The paper's claims


def spearman(values: list[float], others: list[float] | None = None) -> float:
    """Spearman's correlation of the values with others, by default their place in the list; NaN if either do not
    differ."""
    others = range(len(values)) if others is None else others
    return spearmanr(others, values).statistic.item() if min(len(set(values)), len(set(others))) > 1 else math.nan


def trend(rho: float, points: int = 5) -> str:
    """Five values in random order reach a correlation of +0.9 once in 24 times, so less is not called a trend."""
    if points < 5:
        return "too few points"
    return "appears" if rho > 0.899 else "the opposite appears" if rho < -0.899 else "does not appear"


def claims(results: dict) -> list[dict]:
    """For each claim of the paper: its section, whether it appears, and the figures that say so."""
    found = []

    def add(section, claim, verdict, figures):
        found.append({"section": section, "claim": claim, "verdict": verdict, "figures": figures})

    def falls_with_t(section, what, values):
        rho = spearman(values)
        add(section, f"{what} falls with t", trend(-rho),
            f"{', '.join(format(v, '.3g') for v in values)}: correlation with the group {rho:+.2f}")

    def over_training(values, section, what, sign):
        steps, rho = [row["step"] for row in results["gradients"]], spearman(values)
        add(section, what, trend(sign * rho, len(values)), f"{values[0]:.3g} at step {steps[0]}, {values[-1]:.3g} "
            f"at {steps[-1]}: correlation with the step {rho:+.2f}")

    for section, whose in (("B.2", "gradients"), ("B.3", "weights")):
        rows = results[whose]
        for key, name in (("effective_rank", "effective rank"), ("norm", "norm")):
            falls_with_t(section, f"{name} of {whose}", rows[-1][key])
            if section == "B.2":
                over_training([row[key][0] / row[key][-1] for row in rows], section,
                              f"{name} of gradients, cleanest / noisiest group, grows with training", 1)

    groups = results["loss"]["groups"]
    falls_with_t("B.4", "loss added by low rank", [g["difference"] for g in groups])
    size = [g["t"][1] + 1 - g["t"][0] for g in groups]
    added = [n * g["difference"] for n, g in zip(size, groups)]  # summed over the timesteps
    low, timesteps = sum(added[:2]) / sum(added), sum(size[:2]) / T
    ratios = ", ".join(format(g["low_rank"] / g["full"], ".3g") for g in groups)
    add("B.4", "added loss is concentrated at low t",
        "appears" if sum(added) > 0 and low > timesteps else "does not appear",
        f"the two cleanest groups, {timesteps:.0%} of the timesteps, have {low:.0%} of it; low rank / full rank "
        f"by group: {ratios}")

    means, chance = ([pair_means(row[key]) for row in results["similarity"]] for key in ("similarity", "chance"))
    for claim, a, b in (("neighbouring groups are more similar", "neighbours", "distant"),
                        ("high-t groups are more similar than low-t ones", "high t", "low t")):
        true = sum(m[a] > m[b] for m in means)
        verdict = "appears" if true == len(means) else "does not appear" if true else "the opposite appears"
        add("B.6", claim, verdict, f"{a} {means[-1][a]:.3f}, {b} {means[-1][b]:.3f} at the end (by chance "
            f"{chance[-1][a]:.3f}, {chance[-1][b]:.3f}); in this order at {true} of {len(means)} checkpoints")
    over_training([m["all"] for m in means], "B.6", "similarity of all pairs falls with training", -1)
    return found


# ----------------------------------------------------------------------------------------------------
# The script


def draw(results: dict) -> list:
    """The panels of the figure, two a row."""
    panels = []
    for title, key in (("(a) gradients", "gradients"), ("(b) weights of models trained on one group", "weights")):
        rows = results[key]
        for value, label in (("effective_rank", "effective rank"), ("norm", "Frobenius norm")):
            curves = {f"t {name}": ([row["step"] for row in rows], [row[value][group] for row in rows])
                      for group, name in enumerate(GROUP_NAMES)}
            log_y = (key, value) == ("gradients", "norm")
            panels.append(plot.line_chart(curves, title, "steps", label, log_y=log_y))
    bins = results["loss"]["bins"]
    t = [sum(b["t"]) / 2 for b in bins]
    added = [b["difference"] for b in bins], [b["standard_error"] for b in bins]
    panels.append(plot.line_chart({"low rank - full rank (± standard error)": (t, *added)}, "(c) held-out loss",
                                  "t", "loss added by low rank"))
    panels.append(plot.line_chart({"low rank / full rank": (t, [b["low_rank"] / b["full"] for b in bins])},
                                  "(c) held-out loss", "t", "ratio of the losses"))
    rows = results["similarity"]
    pairs = torch.tensor(rows[-1]["similarity"]).fill_diagonal_(math.nan)  # a group with itself: 1 says nothing
    title = f"(d) gradient subspaces at step {rows[-1]['step']}"
    panels.append(plot.heat_map(pairs, GROUP_NAMES, GROUP_NAMES, title, "mean cosine", "t", "t", ".2f"))
    steps, means = [row["step"] for row in rows], [pair_means(row["similarity"]) for row in rows]
    curves = {name: (steps, [m[name] for m in means]) for name in means[0]}
    curves["all, by chance"] = steps, [pair_means(row["chance"])["all"] for row in rows]
    panels.append(plot.line_chart(curves, "(d) gradient subspaces", "steps", "mean cosine"))
    return panels


def print_table(results: dict) -> None:
    gradients, weights, similarity = (results[key][-1] for key in ("gradients", "weights", "similarity"))
    table = {"gradient rank": (".1f", gradients["effective_rank"]), "gradient norm": (".3g", gradients["norm"]),
             "dimensions": (".1f", similarity["dimensions"]), "weight rank": (".2f", weights["effective_rank"]),
             "weight norm": (".3f", weights["norm"])}
    for name, key, spec in (("full-rank loss", "full", ".4g"), ("low-rank loss", "low_rank", ".4g"),
                            ("difference", "difference", ".3g"), ("± s.e.", "standard_error", ".1g")):
        table[name] = spec, [row[key] for row in results["loss"]["groups"]]
    full, low = results["loss"]["parameters"]
    print(f"\nAt the last checkpoints: gradients of the full-rank model's own loss, and the dimensions that hold "
          f"{ENERGY:.0%} of\ntheir energy; weights of models trained on one group; held-out losses, low rank with "
          f"{low / full:.0%} of the\nparameters. {common.about_losses(results['predict'])}\n")
    rows = [{"t": group} | {name: values[i] for name, (_, values) in table.items()}
            for i, group in enumerate(GROUP_NAMES)]
    plot.print_table(rows, {"t": ""} | {name: spec for name, (spec, _) in table.items()})


def read_command_line():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    common.add_run_flags(parser, "runs/rank_analysis")
    add("--steps", type=positive_int, default=1200, metavar="N", help="of the full-rank and the low-rank model "
        "(default 1200)")
    add("--group-steps", type=positive_int, default=1000, metavar="N", help="of each model of one group (default "
        "1000)")
    add("--checkpoints", type=positive_int, default=8, metavar="N", help="evenly spaced, so it divides both "
        "numbers of steps; trends over training need five (default 8)")
    add("--gradient-batch", type=positive_int, default=128, metavar="N", help="samples in each of the ten batches "
        "of (a), and in the one of (d) (default 128; the paper: 512)")
    add("--per-timestep", type=positive_int, default=20, metavar="N", help="held-out images a t (default 20)")
    add("--seed", type=seed_number, default=0, metavar="N", help="of everything (default 0)")
    args = common.parse_flags(parser, ("--method", "--keep", "--save-every", "--curriculum-groups", "--timesteps",
                                       "--compile", "--slices", "--weighting", "--noise"))
    for flag, steps in (("--steps", args.steps), ("--group-steps", args.group_steps)):
        if steps % args.checkpoints or steps < 10 * args.checkpoints:
            parser.error(f"{flag} {steps} must be a multiple of --checkpoints {args.checkpoints}, ten times it or "
                         "more")
    common.settle_image_flags(args)
    return args


def main():
    args = read_command_line()
    device = pick_device(args.device)
    test = common.load_held_out(args, 2000)
    training = load(args.dataset, args.data_dir, "train", args.image_size, seed=args.seed)

    # the seven models
    alone = [args.out / f"t_{first}-{last}" for first, last in GROUPS]
    ranges = {args.out / "full": (1, T), args.out / "low_rank": (1, T)} | dict(zip(alone, GROUPS))
    flags = {}
    for folder in ranges:
        steps = args.group_steps if folder in alone else args.steps
        method = dict(method="static", keep=KEEP) if folder.name == "low_rank" else dict(method="full")
        flags[folder] = common.run_flags(args, **method, steps=steps, save_every=steps // args.checkpoints,
                                         seed=args.seed)
        common.check_settings(folder, flags[folder])
        _, config = common.read_run_flags(flags[folder], test)
    for folder, (first, last) in ranges.items():
        train_on(folder, flags[folder], first, last)
    torch.set_float32_matmul_precision("highest")  # training on CUDA allows TF32, too coarse for small gradients

    # (a), (b), (d) at each checkpoint, then (c)
    keys = ("effective_rank", "norm", "effective_rank_by_matrix", "norm_by_matrix")  # each a list over the groups
    results = {"settings": vars(args), "predict": config.predict, "groups": GROUPS, "gradients": [], "weights": [],
               "similarity": []}
    print()
    for number in range(1, args.checkpoints + 1):
        step, group_step = (steps // args.checkpoints * number for steps in (args.steps, args.group_steps))
        full, _ = load_model(args.out / "full", device, checkpoint(step))
        rows = [measure(group_gradients(full, training, group, BATCHES * args.gradient_batch, BATCHES, args.seed))
                for group in GROUPS]
        results["gradients"].append({"step": step} | dict(zip(keys, zip(*rows))))
        one_batch = [group_gradients(full, training, group, args.gradient_batch, 1, args.seed) for group in GROUPS]
        results["similarity"].append({"step": step} | gradient_similarity(one_batch, args.seed))
        models = [load_model(folder, device, checkpoint(group_step))[0] for folder in alone]
        rows = [measure([p.cpu() for p in weight_matrices(model).values()]) for model in models]
        results["weights"].append({"step": group_step} | dict(zip(keys, zip(*rows))))
        print(f"measured checkpoint {number} of {args.checkpoints}", flush=True)
    results["matrices"] = list(weight_matrices(full))
    low_rank, _ = load_model(args.out / "low_rank", device)
    results["loss"] = loss_difference(full, low_rank, test, args.per_timestep, args.seed)
    results["claims"] = claims(results)
    plot.save(args.out / "figure.png", *draw(results))
    plot.write_json(args.out / "results.json", results)
    print_table(results)
    print(f"\nThe paper's claims, after {args.steps:,} steps ({args.group_steps:,} on one group), one seed; "
          "a trend is a Spearman\ncorrelation of 0.9 or more\n")
    for c in results["claims"]:
        print(f"{c['section']} {c['claim']}: {c['verdict'].upper()}\n     {c['figures']}")
    print(f"\nwrote {args.out / 'figure.png'} and {args.out / 'results.json'}")


if __name__ == "__main__":
    run_script(main)
