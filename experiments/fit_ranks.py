"""Where along t do samples need rank? Fits a profile of shares to a budget, from one elastic run.

    python train.py --method elastic --out runs/elastic
    python experiments/classifier.py --dataset shapes --out shapes_clf.pt
    python experiments/fit_ranks.py --run runs/elastic --dataset shapes --classifier shapes_clf.pt
    python sample.py --run runs/elastic --ranks runs/elastic/ranks/elbo-0.25.json
    python train.py --rank-profile runs/elastic/ranks/elbo-0.25.train.json --keep 0.25    a model of its own

NA-LR fixes Phi(t) by hand and calls learning it future work. An elastic model has trained every share at every t, so
the harm that few channels do can be measured: a table, groups of log-SNR by shares, for each of four objectives.

    loss       the mean loss of eps over t, by which the paper chooses
    elbo       the same losses, weighted by half |d log-SNR|: what they add to the bound on the log-likelihood
    class      how far eps with the label minus eps without it moves, weighted alike: what the label says of the image
    rollout    how far images move, in a classifier's features, when one group of a sampler's steps has few channels

A profile for a budget then has the least sum of harms among those whose sampling costs what a constant share does. It
comes in two files: for sample.py in shares of all channels; for train.py, which chooses the number of channels itself,
scaled so that the largest share is 1.
Losses are those of every second held-out image, rollouts start from seed 1; compare.py and elastic.py judge by the
other images and by seed 0.
"""

import copy
import math
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classifier
import common
import flops
import plot
import train
from data import Dataset, from_unit
from lowrank import low_rank_layers
from model import Config, DiT
from sample import ImageNoise, Shares, ddim, load_model
from schedule import T, Profile, add_noise, predicted_x_0_and_eps, sampling_timesteps, share_of
from script import (DEVICES, InputError, Parser, end_progress, pick_device, positive_int, run_script,
                    show_progress)

EDGES = (4, 2.5, 1.5, 0.75, 0, -0.75, -1.5, -2.5, -4)  # of log-SNR, between groups: fine in the middle
SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)  # of the channels, which are measured
OBJECTIVES = ("loss", "elbo", "class", "rollout")

# ----------------------------------------------------------------------------------------------------
# Groups of timesteps


def noise_groups(log_snr: torch.Tensor, visited: list[int]) -> list[range]:
    """Timesteps 1 to T cut at EDGES of log-SNR, low noise first. A group that a sampler does not visit is joined to
    its noisier neighbour."""
    firsts = [1] + [int((log_snr > edge).sum()) for edge in EDGES]  # entry 0 counts, as t does
    groups, first = [], 1
    for end in (*firsts[1:], T + 1):
        if any(first <= t < end for t in visited):
            groups.append(range(first, end))
            first = end
    return groups  # a sampler visits T, so the last group is never empty


def elbo_weights(log_snr: torch.Tensor) -> torch.Tensor:
    """half |d log-SNR| of each t: the weight of the squared error of eps, summed over pixels, in the bound on the
    log-likelihood (Kingma et al. 2021, Eq. 13, in discrete time). float64 (T + 1,). The clipped last beta would make
    T alone half of everything: as in the clustering, log_snr[T] counts as log_snr[T - 1]. Entry 1 would be infinite:
    the step from the clean image counts as much as the next one."""
    log_snr = log_snr.clone()
    log_snr[T] = log_snr[T - 1]
    weights = -log_snr.diff(prepend=log_snr[:1]) / 2
    weights[:2] = weights[2]
    return weights


# ----------------------------------------------------------------------------------------------------
# Harm by objective: what a share of the channels adds, for all timesteps of a group. All are float64 (G, K).


@torch.no_grad()
def eps_answers(model: DiT, batch: train.Batch, share: float | None) -> torch.Tensor:
    """eps as the model sees it in a batch, with and without labels: (2, B, C, H, W)."""
    signal, noise = (x.to(batch.x_0.device) for x in model.noise.coefficients(batch.t))
    x_t, active = add_noise(batch.x_0, batch.eps, signal, noise), model.active(batch.t, share)
    answers = []
    for y in (batch.y, torch.full_like(batch.y, model.config.num_classes)):
        output = model(x_t, batch.t.to(y.device), y, active).float()
        answers.append(predicted_x_0_and_eps(model.config.predict, output, x_t, signal, noise)[1])
    return torch.stack(answers)


def measure_harm(models: list[tuple[DiT, float | None]], images: Dataset, groups: list[range], per_group: int,
                 seed: int = 0) -> tuple[dict[str, np.ndarray], list[float]]:
    """{objective: harm (G, K)} of K ways to use fewer channels, (model, share) each, against the last of them, which
    uses all; same images, noise and timesteps for all. And, as a check, how many nats the label says of the image by
    the last one's losses, for each group: their sum should lie near or below the logarithm of the number of classes.
    Where it does not, the two losses differ by the model's errors rather than by what the label tells."""
    weights, harm = elbo_weights(models[0][0].noise.log_snr), {name: np.zeros((len(groups), len(models))) for name in OBJECTIVES[:3]}
    order, nats = torch.randperm(len(images.images), generator=torch.Generator().manual_seed(seed)), []
    for g, group in enumerate(groups):
        places = (torch.arange(per_group, dtype=torch.float64) + 0.5) / per_group
        t = group[0] + (places * len(group)).long()
        index, samples = order[torch.arange(per_group) % len(order)], range(g * per_group, (g + 1) * per_group)
        batch = common.noised_batch(models[0][0], images, index, t, samples, seed)
        weight, pixels = weights[t], batch.x_0[0].numel()
        found = []  # for each way: squared error with and without labels, mean over pixels (2, B); the label's share
        for model, share in models:
            answers = eps_answers(model, batch, share)
            errors = (answers - batch.eps).square().mean((2, 3, 4)).double().cpu()
            found.append((errors, (answers[0] - answers[1]).cpu()))
        full, says = found[-1]
        for k, (errors, label) in enumerate(found):
            worse = errors[0] - full[0]  # (B,)
            moved = (label - says).square().sum((1, 2, 3)).double()
            harm["loss"][g, k] = len(group) / T * worse.mean()
            harm["elbo"][g, k] = len(group) * pixels * (weight * worse).mean()
            harm["class"][g, k] = len(group) * (weight * moved).mean()
        nats.append(float(len(group) * pixels * (weight * (full[1] - full[0])).mean()))
        show_progress(f"losses: group {g + 1} of {len(groups)}")
    end_progress()
    return harm, nats


@torch.no_grad()
def measure_rollouts(model: DiT, judge: classifier.Judge, groups: list[range], steps: int, guidance: float, num: int,
                     seed: int = 1) -> np.ndarray:
    """Mean squared distance, in the classifier's features, between images sampled with a share of the channels in one
    group and all elsewhere, and those of the same noise sampled with all: (G, K)."""
    config, visited = model.config, sampling_timesteps(steps)
    shape = (config.channels, config.image_size, config.image_size)
    noise = ImageNoise(seed, range(num), shape, model.position.device)()
    y = torch.arange(num, device=noise.device) % config.num_classes if config.num_classes else None
    xs = [noise, *ddim(model, noise, steps, y, guidance)]  # x at each visited timestep
    wanted = judge.network.features(from_unit(xs[-1]))
    harm = np.zeros((len(groups), len(SHARES)))
    for g, group in enumerate(groups):
        first = next(i for i, t in enumerate(visited) if t in group)  # up to here nothing differs
        for k, share in enumerate(SHARES[:-1]):
            shares = Shares(((1, 1.0), (group[0], share), (group[-1] + 1, 1.0)))
            *_, x = ddim(model, xs[first], y=y, guidance=guidance, shares=shares, timesteps=visited[first:])
            harm[g, k] = (judge.network.features(from_unit(x)) - wanted).square().sum(1).mean()
        show_progress(f"rollouts: group {g + 1} of {len(groups)}")
    end_progress()
    return harm


# ----------------------------------------------------------------------------------------------------
# From harm to a profile


def lower_hull(cost: np.ndarray, harm: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The lower convex hull of the points (cost, harm), both (K,) with rising cost, at the costs `wanted`. A share
    above it is never worth its price: a mixture of its neighbours is better, and noise in a table lies there, too."""
    hull = []
    for point in zip(cost, harm):
        while len(hull) > 1 and ((hull[-1][1] - hull[-2][1]) * (point[0] - hull[-2][0])
                                 >= (point[1] - hull[-2][1]) * (hull[-1][0] - hull[-2][0])):
            hull.pop()
        hull.append(point)
    return np.interp(wanted, *zip(*hull))


def solve(harm: np.ndarray, cost: np.ndarray, steps: np.ndarray, budget: float, never_rises: bool = False,
          smooth: float = 0.0) -> np.ndarray:
    """The level of each group, int (G,), of least sum harm[g, level] for at most `budget` multiply-adds.

    harm (G, K), convex in cost for each group; cost (K,) of one sampling step at each level; steps (G,): how many of
    a sampler's steps lie in each group. For a price of multiply-adds the best levels minimise harm + price * cost, and
    the price is bisected. Without constraints that is to raise, again and again, the group that gains most per
    multiply-add, which is optimal where harm is convex.
    never_rises: no group gets more than the one below it in noise. smooth: harm of each level between neighbours.
    """
    G, K = harm.shape
    level = np.arange(K)
    between = smooth * np.abs(level[:, None] - level)  # [before, after], groups in order of noise
    if never_rises:
        between = np.where(level[:, None] < level, np.inf, between)

    def cheapest(price: float) -> np.ndarray:
        total = harm + price * steps[:, None] * cost
        best, came_from = total[0], []
        for g in range(1, G):  # best[k]: of all choices for groups 0..g that end with level k
            ways = best[:, None] + between
            came_from.append(ways.argmin(0))
            best = ways.min(0) + total[g]
        levels = [int(best.argmin())]
        for origin in reversed(came_from):
            levels.append(int(origin[levels[-1]]))
        return np.array(levels[::-1])

    low, high = 0.0, 1.0
    while (steps * cost[cheapest(high)]).sum() > budget and high < 1e30:
        high *= 4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if (steps * cost[cheapest(middle)]).sum() <= budget else (middle, high)
    return cheapest(high)


FINE = np.arange(40, 401) / 400  # shares that a profile may have: those measured, and what the hull says between


def fit(harm: np.ndarray, config: Config, groups: list[range], visited: list[int], share: float, **constraints):
    """(profile, its harm) of the least harm at the sampling cost of a constant share. Harm (G, K) as measured, the
    last column of all channels."""
    costs = {s: flops.one_image(config, T, share=s)[0] for s in (*SHARES, *FINE, share)}
    steps = np.array([sum(t in group for t in visited) for group in groups])
    fine = np.array([costs[s] for s in FINE])
    measured = np.array([costs[s] for s in SHARES])
    hulls = np.stack([lower_hull(measured, row, fine) for row in harm])
    usable = FINE >= config.rho_min
    levels = solve(hulls[:, usable], fine[usable], steps, len(visited) * costs[share], **constraints)
    profile = tuple((group[0], float(FINE[usable][level])) for group, level in zip(groups, levels))
    return profile, float(hulls[:, usable][np.arange(len(groups)), levels].sum())


def harm_of_constant(harm: np.ndarray, config: Config, share: float) -> float:
    """Of one share everywhere, from the same hulls."""
    cost = [np.array([flops.one_image(config, T, share=s)[0] for s in shares]) for shares in (SHARES, (share,))]
    return float(sum(lower_hull(cost[0], row, cost[1])[0] for row in harm))


# ----------------------------------------------------------------------------------------------------
# Layers


def layer_kinds(model: DiT) -> dict[str, list[str]]:
    """{kind: names of its low-rank layers}"""
    kinds = {}
    for name in (name for name, layer in model.named_modules() if layer in set(low_rank_layers(model))):
        last = name.rsplit(".", 1)[-1]
        kinds.setdefault("time" if last.startswith("time") else last, []).append(name)
    return kinds


def with_fewer(model: DiT, names: list[str], share: float) -> DiT:
    """A copy whose named layers use only the first ceil(share r_max) channels: the others are set to zero."""
    fewer = copy.deepcopy(model)
    for name in names:
        layer = fewer.get_submodule(name)
        layer.U[share_of(share, layer.rank):] = 0
    return fewer


def saved_by(config: Config, names: list[str], share: float) -> int:
    """Multiply-adds of a forward pass that these layers save with that share."""
    all_of_them, some = (flops.products(config, flops.channels(config, T, share=s)) for s in (1.0, share))
    return sum(a.size - b.size for a, b in zip(all_of_them, some) if a.layer in names)


def print_layers(model: DiT, images: Dataset, groups: list[range], per_group: int, share: float) -> list[dict]:
    """Which kinds of layers earn their channels: the harm of `share` in one kind alone, per multiply-add saved, as a
    ratio to that of the same share in all kinds."""
    kinds = layer_kinds(model)
    kinds["all"] = [name for names in kinds.values() for name in names]
    models = [(with_fewer(model, names, share), None) for names in kinds.values()] + [(model, None)]
    harm, _ = measure_harm(models, images, groups, per_group)
    rows = []
    for i, (kind, names) in enumerate(kinds.items()):
        row = {"layers": kind, "saved": saved_by(model.config, names, share)}
        rows.append(row | {name: table[:, i].sum() for name, table in harm.items()})
    for name in harm:
        for row in rows:
            row[f"{name} / all"] = (row[name] / row["saved"]) / (rows[-1][name] / rows[-1]["saved"])
    print(f"\nHarm of share {share:g} in one kind of layer, per multiply-add saved, against the same in all kinds")
    plot.print_table([row | {"saved": flops.amount(row["saved"])} for row in rows],
                     {"layers": "", "saved": ""} | {f"{name} / all": ".2f" for name in harm})
    return rows


# ----------------------------------------------------------------------------------------------------
# The script


def write_profile(path: Path, profile: Profile) -> None:
    """NAME.json, and NAME.train.json, whose largest share is 1: train.py has no channels that no t uses."""
    t, shares = zip(*profile)
    plot.write_json(path, dict(t=t, share=shares))
    plot.write_json(path.with_suffix(".train.json"), dict(t=t, share=[share / max(shares) for share in shares]))


def draw(harms: dict, fitted: dict, groups: list[range], shares: list[float], out: Path) -> None:
    """harm.png: one heat map for each objective; profiles.png: the fitted profiles, a chart for each budget."""
    names = [f"{group[0]}-{group[-1]}" for group in groups]
    maps = [plot.heat_map(100 * table.T / max(table.sum(0).max(), 1e-30), [f"{s:g}" for s in SHARES], names,
                          f"{objective}: harm of a share at t", "% of the largest sum", "timesteps t", "share", ".1f")
            for objective, table in harms.items()]
    plot.save(out / "harm.png", *maps)
    charts = []
    for share in shares:
        curves = {"constant": ([1, T], [share, share])}
        for objective in harms:
            profile = fitted[objective, share]
            starts = [t for t, _ in profile] + [T]
            xs = [x for first, end in zip(starts, starts[1:]) for x in (first, end)]
            curves[objective] = xs, [s for _, s in profile for _ in range(2)]
        charts.append(plot.line_chart(curves, f"fitted at the cost of a constant share {share:g}", "t", "share"))
    plot.save(out / "profiles.png", *charts)


def read_command_line() -> Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="folder of an elastic run")
    common.add_image_flags(parser)
    add("--classifier", type=Path, metavar="FILE", help="of experiments/classifier.py, for the rollouts (default: none "
        "are made)")
    add("--shares", default="0.5,0.25,0.12", metavar="F,...", help="budgets: what sampling with these constant shares "
        "costs (default 0.5,0.25,0.12)")
    add("--per-group", type=positive_int, default=1000, metavar="N", help="samples a group of t (default 1000)")
    add("--rollouts", type=positive_int, default=200, metavar="N", help="images a rollout (default 200)")
    add("--sampling-steps", type=positive_int, default=50, metavar="N", help="of DDIM (default 50)")
    add("--guidance", type=float, default=2.0, metavar="W", help="of the rollouts (default 2)")
    add("--smooth", type=float, default=0.0, metavar="F", help="harm of a step of 0.0025 between neighbouring groups, "
        "as a share of the largest harm (default 0)")
    add("--never-rises", action="store_true", help="as the paper: no group gets more than one of less noise")
    add("--layers", action="store_true", help="also measure which kinds of layers earn their channels")
    add("--out", type=Path, metavar="DIR", help="where profiles and pictures go (default RUN/ranks)")
    add("--device", choices=DEVICES, default="auto", help="(default auto)")
    args = parser.parse_args()
    args.out = args.out or args.run / "ranks"
    if args.sampling_steps > T or not math.isfinite(args.guidance) or not 0 <= args.smooth < math.inf:
        raise InputError("--sampling-steps takes at most 1000; --guidance and --smooth finite numbers")
    return args


def main():
    args = read_command_line()
    device = pick_device(args.device)
    model, _ = load_model(args.run, device)
    config = model.config
    if config.method != "elastic":
        raise InputError(f"{args.run} is of --method {config.method}; give a run of --method elastic")
    shares = common.choose_numbers("--shares", args.shares, config.rho_min, 1)
    args.image_size = args.image_size or config.image_size
    common.settle_image_flags(args)
    images = common.every_second(common.load_held_out(args, 10_000), 0)
    visited = sampling_timesteps(args.sampling_steps)[:-1]
    groups = noise_groups(model.noise.log_snr, visited)
    harms, nats = measure_harm([(model, share) for share in SHARES], images, groups, args.per_group)
    if images.classes:
        by_group = ", ".join(f"{group[0]}-{group[-1]}: {x:.2f}" for group, x in zip(groups, nats))
        print(f"what the label says of an image: at most ln {len(images.classes)} = {math.log(len(images.classes)):.2f} "
              f"nats; by the model's losses {sum(nats):.2f} ({by_group})")
    else:
        del harms["class"]
    if args.classifier:
        judge = classifier.Judge(args.classifier, images, device)
        harms["rollout"] = measure_rollouts(model, judge, groups, args.sampling_steps, args.guidance, args.rollouts)

    fitted, rows = {}, []
    for objective, harm in harms.items():
        constraints = dict(smooth=args.smooth * harm.sum(0).max(), never_rises=args.never_rises)
        for share in shares:
            profile, least = fit(harm, config, groups, visited, share, **constraints)
            falling = fit(harm, config, groups, visited, share, **constraints | dict(never_rises=True))[1]
            constant = harm_of_constant(harm, config, share)
            fitted[objective, share] = profile
            path = args.out / f"{objective}-{share:g}.json"
            write_profile(path, profile)
            rows.append({"objective": objective, "share": share, "fitted / constant": least / constant,
                         "never rising / constant": falling / constant, "file": str(path)}
                        | {f"{group[0]}-{group[-1]}": s for group, (_, s) in zip(groups, profile)})
    print("\nProfiles: predicted harm against that of a constant share, and the share of each group of t")
    columns = {"objective": "", "share": "g", "fitted / constant": ".2f", "never rising / constant": ".2f"}
    plot.print_table(rows, columns | {f"{group[0]}-{group[-1]}": ".2f" for group in groups})
    layers = print_layers(model, images, groups, args.per_group, 0.25) if args.layers else None
    draw(harms, fitted, groups, shares, args.out)
    plot.write_json(args.out / "harm.json", dict(settings=vars(args), nats=nats, shares=SHARES, layers=layers,
                                                 groups=[(g[0], g[-1]) for g in groups], harm=harms))
    print(f"wrote {len(rows)} profiles, each to sample and to train, harm.json, harm.png and profiles.png in {args.out}")


if __name__ == "__main__":
    run_script(main)
