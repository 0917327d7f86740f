"""Where along t do samples need rank? Fits a profile of shares to a budget, from one elastic run.

    python train.py --method elastic --slices 2 --out runs/elastic
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
Losses are those of every second ten of the held-out images, rollouts start from seed 1; compare.py and elastic.py judge
by the other images and by seed 0, but in the features of the same classifier unless they are given another: that
favours `rollout`, which was fitted in them.
"""

import copy
import math
import sys
from argparse import Namespace
from collections.abc import Callable
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
from sample import ImageNoise, ddim, load_model
from schedule import T, Profile, Shares, add_noise, channels_of, predicted_x_0_and_eps, sampling_timesteps
from script import (DEVICES, InputError, Parser, end_progress, pick_device, positive_int, run_script,
                    show_progress)

EDGES = (4, 2.5, 1.5, 0.75, 0, -0.75, -1.5, -2.5, -4)  # of log-SNR, between groups: fine in the middle
OBJECTIVES = ("loss", "elbo", "class", "rollout")


def measured_shares(rho_min: float) -> list[float]:
    """Of the channels: those whose harm is measured, the least that an elastic run has trained first."""
    return [rho_min] + [s for s in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0) if s > rho_min]


def profile_shares(rho_min: float) -> list[float]:
    """Those that a profile may have; the harm of those between is what the hull says."""
    return [rho_min] + [i / 400 for i in range(1, 401) if i / 400 > rho_min]


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
    log-likelihood in continuous time (Kingma et al. 2021, Eq. 17), as a sum over the timesteps. float64 (T + 1,). The
    clipped last beta would make T alone half of everything: as in the clustering, log_snr[T] counts as
    log_snr[T - 1], so T has no weight. Entry 1 would be infinite: it counts as much as entry 2."""
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
    signal, noise = (x.to(batch.x_0.device) for x in model.noise_schedule.coefficients(batch.t))
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
    weights = elbo_weights(models[0][0].noise_schedule.log_snr)
    harm = {name: np.zeros((len(groups), len(models))) for name in OBJECTIVES[:3]}
    order, nats = torch.randperm(len(images.images), generator=torch.Generator().manual_seed(seed)), []
    for g, group in enumerate(groups):
        t = common.spread_over(group, per_group)
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
def measure_rollouts(model: DiT, features: Callable, groups: list[range], steps: int, guidance: float, num: int,
                     classes: int, seed: int = 1) -> np.ndarray:
    """Mean squared distance, in a classifier's `features` of uint8 images, between images sampled with a share of the
    channels in one group and all elsewhere, and those of the same noise sampled with all: (G, K). classes: of the
    images; the model may have rows for more labels, which it has never seen."""
    config, visited = model.config, sampling_timesteps(steps)
    shape = (config.channels, config.image_size, config.image_size)
    noise = ImageNoise(seed, range(num), shape, model.position.device)()
    y = torch.arange(num, device=noise.device) % classes if classes else None
    xs = [noise, *ddim(model, noise, steps, y, guidance)]  # x at each visited timestep
    wanted, shares = features(from_unit(xs[-1])), measured_shares(config.rho_min)
    harm = np.zeros((len(groups), len(shares)))
    for g, group in enumerate(groups):
        first = next(i for i, t in enumerate(visited) if t in group)  # up to here nothing differs
        for k, share in enumerate(shares[:-1]):
            in_group = Shares(((1, 1.0), (group[0], share), (group[-1] + 1, 1.0)))
            *_, x = ddim(model, xs[first], y=y, guidance=guidance, shares=in_group, timesteps=visited[first:])
            harm[g, k] = (features(from_unit(x)) - wanted).square().sum(1).mean()
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
    the price is bisected: the same as to raise, again and again, the group that gains most per multiply-add, which is
    optimal where harm is convex. Where levels tie, as on one edge of a hull, what is left is spent from low noise up.
    never_rises: no group gets more than the one below it in noise. smooth: harm of each level between neighbours. With
    either of them groups tie together: all rise by a level at a time as long as the budget pays for all, which keeps
    to the constraint and is still best at that price. Raises ValueError if the lowest levels cost more than the budget.
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

    if steps.sum() * cost[0] > budget * (1 + 1e-12):
        raise ValueError("the budget does not pay for the least share everywhere")
    low, high = 0.0, 1.0
    while (steps * cost[cheapest(high)]).sum() > budget and high < 1e30:
        high *= 4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if (steps * cost[cheapest(middle)]).sum() <= budget else (middle, high)
    levels, tied = cheapest(high), cheapest(low * (1 - 1e-9))  # less: or rounding would settle some of the ties
    while never_rises or smooth:
        raised = np.minimum(levels + 1, tied)
        if (raised == levels).all() or (steps * cost[raised]).sum() > budget:
            return levels
        levels = raised
    for g in range(G):
        while levels[g] < tied[g]:
            more = steps[g] * (cost[levels[g] + 1] - cost[levels[g]])
            if (steps * cost[levels]).sum() + more > budget:
                break
            levels[g] += 1
    return levels


def fit(harm: np.ndarray, config: Config, groups: list[range], visited: list[int], share: float, **constraints):
    """(profile, its harm) of the least harm at the sampling cost of a constant share. harm (G, K): of
    `measured_shares`."""
    steps = np.array([sum(t in group for t in visited) for group in groups])
    fine = profile_shares(config.rho_min)
    measured, cost, (budget,) = (pass_costs(config, s) for s in (measured_shares(config.rho_min), fine, [share]))
    hulls = np.stack([lower_hull(measured, row, cost) for row in harm])
    levels = solve(hulls, cost, steps, len(visited) * budget, **constraints)
    profile = tuple((group[0], fine[level]) for group, level in zip(groups, levels))
    return profile, float(hulls[np.arange(len(groups)), levels].sum())


def pass_costs(config: Config, shares: list[float]) -> np.ndarray:
    """Multiply-adds of a forward pass with each share of the channels: (K,)"""
    return np.array([float(flops.one_image(config, T, share=share)[0]) for share in shares])


def harm_of_constant(harm: np.ndarray, config: Config, share: float) -> float:
    """Of one share everywhere, from the same hulls."""
    measured, cost = (pass_costs(config, shares) for shares in (measured_shares(config.rho_min), [share]))
    return float(sum(lower_hull(measured, row, cost)[0] for row in harm))


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
        layer.U[channels_of(share, layer.rank):] = 0
    return fewer


def saved_by(config: Config, names: list[str], share: float) -> int:
    """Multiply-adds of a forward pass that these layers save with that share."""
    all_of_them, some = (flops.products(config, flops.active_channels(config, T, share=s)) for s in (1.0, share))
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


def draw(harms: dict, rho_min: float, fitted: dict, groups: list[range], shares: list[float], out: Path) -> None:
    """harm.png: one heat map for each objective; profiles.png: the fitted profiles, a chart for each budget."""
    names, maps = [str(group[0]) for group in groups], []
    for objective, table in harms.items():
        per_cent = 100 * table.T / max(table.sum(0).max(), 1e-30) + 0.0  # no -0.0
        maps.append(plot.heat_map(per_cent, [f"{s:g}" for s in measured_shares(rho_min)], names, f"harm by {objective}",
                                  "% of all harm of the least share", "first timestep of the group", "share", ".1f"))
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
    common.add_image_flags(parser, "the run's")
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
    model, state = load_model(args.run, device)
    config = model.config
    if config.method != "elastic":
        raise InputError(f"{args.run} is of --method {config.method}; give a run of --method elastic")
    shares = common.choose_numbers("--shares", args.shares, config.rho_min, 1)
    images = common.every_second(common.held_out_for(args, {args.run: state}), 0)
    visited = sampling_timesteps(args.sampling_steps)[:-1]
    groups = noise_groups(model.noise_schedule.log_snr, visited)
    network = classifier.load_classifier(args.classifier, device, images)[0].eval() if args.classifier else None
    ways = [(model, share) for share in measured_shares(config.rho_min)]
    harms, nats = measure_harm(ways, images, groups, args.per_group)
    if images.classes:
        by_group = ", ".join(f"{group[0]}-{group[-1]}: {x:.2f}" for group, x in zip(groups, nats))
        most = math.log(len(images.classes))
        print(f"what the label says of an image: at most ln {len(images.classes)} = {most:.2f} nats; "
              f"by the model's losses {sum(nats):.2f} ({by_group})")
    else:
        del harms["class"]
    if network:
        harms["rollout"] = measure_rollouts(model, network.features, groups, args.sampling_steps, args.guidance,
                                            args.rollouts, len(images.classes))

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
            ratios = [least / constant, falling / constant] if constant else [None, None]  # of all channels: no harm
            rows.append({"objective": objective, "share": share, "fitted / constant": ratios[0],
                         "never rising / constant": ratios[1], "file": str(path)}
                        | {f"{group[0]}-{group[-1]}": s for group, (_, s) in zip(groups, profile)})
    print("\nProfiles: predicted harm against that of a constant share, and the share of each group of t")
    columns = {"objective": "", "share": "g", "fitted / constant": ".2f", "never rising / constant": ".2f"}
    plot.print_table(rows, columns | {f"{group[0]}-{group[-1]}": ".2f" for group in groups})
    layers = print_layers(model, images, groups, args.per_group, max(0.25, config.rho_min)) if args.layers else None
    draw(harms, config.rho_min, fitted, groups, shares, args.out)
    plot.write_json(args.out / "harm.json", dict(settings=vars(args), nats=nats, layers=layers,
                                                 shares=measured_shares(config.rho_min), harm=harms,
                                                 groups=[(g[0], g[-1]) for g in groups]))
    print(f"wrote {len(rows)} profiles, harm.json, harm.png and profiles.png in {args.out}")


if __name__ == "__main__":
    run_script(main)
