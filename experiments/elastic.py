"""What an elastic run is worth at every budget, which shape of Phi(t) suits it, and how little guidance needs.

    python train.py --method elastic --slices 2 --out runs/elastic
    python experiments/classifier.py --dataset shapes --out shapes_clf.pt
    python experiments/elastic.py --runs runs/elastic --dataset shapes --classifier shapes_clf.pt --out runs/judged

Three tables, all by samples (`--only` names some): the Frechet distance to held-out images in the classifier's
features, and the share of samples recognised as their class.

    budgets    constant shares of the channels, guidance 1 and 2
    profiles   at the sampling cost of a constant share: the paper's schedule, the same mirrored in t, humps, most
               channels at the clean end, and the files FIT/NAME-SHARE.json that fit_ranks.py has written
    guide      fewer channels in the second pass of guidance: the distance, and the time of a step beside its
               multiply-adds, in turns in one process

Several runs are seeds of one experiment: the tables give mean and standard deviation. What is judged is kept in OUT,
so a stopped call goes on where it was.
"""

import contextlib
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classifier
import common
import fit_ranks
import flops
import plot
from data import Dataset
from model import Config, DiT, read_profile
from sample import guided, load_model
from schedule import T, Profile, RankSchedule, Shares, sampling_timesteps
from script import DEVICES, InputError, Parser, pick_device, positive_int, run_script, sha256_of

TABLES = ("budgets", "profiles", "guide")
PAPER = RankSchedule()  # rho_min 0.4, logistic, warm start 0.1

# Shapes of Phi over t/T, to be scaled to a budget
SHAPES = {
    "paper": lambda u: PAPER.active(round(u * T), 1000) / 1000,
    "mirrored": lambda u: PAPER.active(T + 1 - round(u * T), 1000) / 1000,
    "hump at 500": lambda u: 0.3 + math.exp(-((u - 0.5) / 0.2) ** 2),
    "hump at 700": lambda u: 0.3 + math.exp(-((u - 0.7) / 0.2) ** 2),
    "clean end": lambda u: 1.0 if u <= 0.2 else 0.1,
}


def scaled(shape, config: Config, steps: int, share: float) -> Profile:
    """The shape times the factor with which sampling costs what a constant share does, or a little less; one share
    for each timestep that a sampler with so many steps visits, none beyond those trained."""
    visited = sampling_timesteps(steps)[:-1][::-1]  # rising
    starts = [1] + [t + 1 for t in visited[:-1]]

    def profile(factor: float) -> Profile:
        shares = (min(1.0, max(config.rho_min, factor * shape(t / T))) for t in visited)
        return tuple(zip(starts, shares))

    budget = flops.sampling(config, steps, shares=Shares(((1, share),)))
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        fits = flops.sampling(config, steps, shares=Shares(profile(middle))) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return profile(low)


class JudgedOnce:
    """Samples' distance and recognised share, judged once: kept in a file, by what they depend on."""

    def __init__(self, args, models: list[DiT], held_out: Dataset, device: torch.device):
        self.args, self.models, self.classes = args, models, len(held_out.classes)
        self.judge, self.path = classifier.Judge(args.classifier, held_out, device), args.out / "judged.json"
        files = [args.classifier, *(run / "model.pt" for run in args.runs)]
        self.of = [sha256_of(file) for file in files] + [args.num, args.sampling_steps, args.test]
        self.known = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
            saved = json.loads(self.path.read_text())
            self.known = saved["known"] if saved["of"] == self.of else {}

    def __call__(self, guidance: float, shares: Shares) -> dict:
        """{frechet: a value for each run, recognised: likewise, cost: multiply-adds of one image}"""
        key = repr((guidance, *shares))
        if key not in self.known:
            found = []
            for model in self.models:
                samples = common.draw_samples(model, self.classes, self.args.num, self.args.sampling_steps, guidance,
                                              shares)
                found.append(self.judge(*samples))
            self.known[key] = {name: [one[name] for one in found] for name in found[0]}
            plot.write_json(self.path, dict(of=self.of, known=self.known))
        cost = flops.sampling(self.models[0].config, self.args.sampling_steps, guidance, shares)
        return self.known[key] | dict(cost=cost)


def row_of(judged: JudgedOnce, guidances: list[float], shares: Shares, **first) -> dict:
    """A row of a table: what it is, its cost without guidance, and both measures at each guidance."""
    config, steps = judged.models[0].config, judged.args.sampling_steps
    row = first | dict(cost=flops.sampling(config, steps, shares=Shares(shares.ranks)))
    for w in guidances:
        found = judged(w, shares)
        row |= {f"{name}, w {w:g}": found[name] for name in ("frechet", "recognised")}
    return row


def show(rows: list[dict]) -> None:
    """Prints a table; lists of numbers, one for each run, as mean and standard deviation."""
    printed = []
    for row in rows:
        line = {}
        for name, value in row.items():
            if isinstance(value, list):
                value = common.mean_and_sd(value, ".1%" if name.startswith("recognised") else ".2f")
            line[name] = flops.amount(value) if name == "cost" else value
        printed.append(line)
    plot.print_table(printed, {name: "g" if name in ("share", "first", "guide", "w") else ".2f" for name in printed[0]})


def time_of_guidance(model: DiT, share: float, guides: list[float], turns: int = 15, batch: int = 100) -> list[float]:
    """Time of one guided step at each guide's share, as a ratio to that with equal passes: medians of the ratios in a
    turn, in which every one takes its turn."""
    config = model.config
    x = torch.randn(batch, config.channels, config.image_size, config.image_size, device=model.position.device)
    y = torch.arange(batch, device=x.device) % max(1, config.num_classes)
    steps = {g: guided(model, y, 2.0, Shares(((1, share),), g)) for g in [share, *guides]}
    ratios = {g: [] for g in guides}
    with torch.no_grad():
        for turn in range(turns + 2):  # two to warm up
            seconds = {}
            for g, step in steps.items():
                start = time.perf_counter()
                step(x, 500).sum().item()  # waits for the device
                seconds[g] = time.perf_counter() - start
            if turn >= 2:
                for g in guides:
                    ratios[g].append(seconds[g] / seconds[share])
    return [statistics.median(ratios[g]) for g in guides]


def read_fitted(args, config: Config, shares: list[float]) -> dict[float, dict[str, tuple]]:
    """{share: {objective: profile}} of the files of fit_ranks.py. Raises InputError if one of them has shares that were
    not trained, or costs more than the constant share, and if --fit names a folder without any."""
    folder, found = args.fit or args.runs[0] / "ranks", {share: {} for share in shares}

    def cost(profile: tuple) -> int:
        return flops.sampling(config, args.sampling_steps, shares=Shares(profile))

    for share, objective in itertools.product(shares, fit_ranks.OBJECTIVES):
        file = folder / f"{objective}-{share:g}.json"
        if file.exists():
            profile = read_profile(str(file))
            least = min(part for _, part in profile)
            if least < config.rho_min:
                raise InputError(f"{file}: share {least:g} was not trained; these runs take {config.rho_min:g} to 1")
            if cost(profile) > 1.001 * cost(((1, share),)):
                raise InputError(f"{file} costs more than the constant share {share:g} at {args.sampling_steps} steps; "
                                 "fit it by as many")
            found[share][objective] = profile
    if args.fit and not any(found.values()):
        raise InputError(f"--fit {args.fit} holds no profile for {', '.join(f'{share:g}' for share in shares)}; "
                         "experiments/fit_ranks.py writes them")
    return found


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--runs", type=Path, nargs="+", required=True, metavar="DIR", help="folders of elastic runs, seeds of one "
        "experiment")
    common.add_image_flags(parser, "the run's")
    add("--classifier", type=Path, required=True, metavar="FILE", help="of experiments/classifier.py")
    add("--only", default=",".join(TABLES), metavar="NAME,...", help="these tables (default all)")
    add("--fit", type=Path, metavar="DIR", help="profiles of fit_ranks.py (default the first run's ranks/)")
    add("--shares", default="0.5,0.25,0.12", metavar="F,...", help="budgets of the profiles (default 0.5,0.25,0.12)")
    add("--guidances", default="1,2", metavar="W,...", help="of budgets and profiles (default 1,2)")
    add("--num", type=positive_int, default=1000, metavar="N", help="samples a figure; a distance is biased upwards, "
        "the more the fewer (default 1000)")
    add("--sampling-steps", type=positive_int, default=50, metavar="N", help="of DDIM (default 50)")
    add("--out", type=Path, default=Path("runs/judged"), metavar="DIR", help="(default runs/judged)")
    add("--device", choices=DEVICES, default="auto", help="(default auto)")
    args = parser.parse_args()
    tables, device = common.choose("--only", args.only, TABLES), pick_device(args.device)
    models, states = zip(*(load_model(run, device) for run in args.runs))
    config = models[0].config
    if any(model.config != config or config.method != "elastic" for model in models):
        raise InputError("--runs takes runs of --method elastic whose models are of one shape")
    if args.sampling_steps > T or args.num < 2:
        raise InputError("--sampling-steps takes at most 1000, --num at least 2")
    shares = common.choose_numbers("--shares", args.shares, config.rho_min, 1)
    guidances = common.choose_numbers("--guidances", args.guidances)
    fitted = read_fitted(args, config, shares) if "profiles" in tables else {}
    held_out = common.every_second(common.held_out_for(args, dict(zip(args.runs, states))), 1)
    judged, results = JudgedOnce(args, models, held_out, device), {}

    if "budgets" in tables:
        rows = []
        trained = {share for share in (1.0, 0.7, 0.35, 0.18) if share >= config.rho_min}
        for share in sorted({config.rho_min, *trained, *shares}, reverse=True):
            rows.append(row_of(judged, guidances, Shares(((1, share),)), share=share))
        results["budgets"] = rows
        print("\nConstant shares of the channels")
        show(rows)

    if "profiles" in tables:
        rows = []
        for share in shares:
            profiles = {"constant": ((1, share),)}
            profiles |= {name: scaled(shape, config, args.sampling_steps, share) for name, shape in SHAPES.items()}
            for objective, profile in fitted[share].items():
                profiles[f"fitted by {objective}"] = profile
            for name, profile in profiles.items():
                rows.append(row_of(judged, guidances, Shares(profile), share=share, profile=name))
        results["profiles"] = rows
        print("\nProfiles over t at the sampling cost of a constant share")
        show(rows)

    if "guide" in tables:
        guides, rows = [g for g in (1.0, 0.5, 0.25, 0.1) if g >= config.rho_min], []
        for first in (1.0, max(0.5, config.rho_min)):
            below = [first, *(g for g in guides if g < first)]
            ratios = time_of_guidance(models[0], first, below)
            for (g, ratio), w in itertools.product(zip(below, ratios), (1.5, 2.0, 3.0)):
                found = judged(w, Shares(((1, first),), g))
                full = flops.sampling(config, args.sampling_steps, 2.0, Shares(((1, first),)))
                rows.append(dict(first=first, guide=g, w=w, cost=found["cost"], time=ratio,
                                 multiply_adds=found["cost"] / full, frechet=found["frechet"],
                                 recognised=found["recognised"]))
        weak = max(0.25, config.rho_min)
        found = judged(2.0, Shares(((1, 1.0),), weak, "same"))
        rows.append(dict(first=1.0, guide=weak, w=2.0, cost=found["cost"], time=None, multiply_adds=None,
                         frechet=found["frechet"], recognised=found["recognised"]))
        results["guide"] = rows
        print("\nChannels of the second pass of guidance; time and multiply_adds against equal passes (last row: the "
              "second pass is told the class, too)")
        show(rows)
    draw(results, args.out)
    plot.write_json(args.out / "results.json", dict(settings=vars(args), tables=results))
    print(f"wrote results.json and elastic.png in {args.out}")


def draw(results: dict, out: Path) -> None:
    """elastic.png: distance against multiply-adds, a chart for each table."""
    charts = []

    def curve(rows: list[dict], key: str) -> tuple:
        values = [torch.tensor(row[key]) for row in rows]
        return ([row["cost"] for row in rows], [v.mean().item() for v in values],
                [v.std().item() if len(v) > 1 else 0.0 for v in values])

    x_label, y_label = "multiply-adds of an image", "Frechet distance, +- sd over runs"
    for table in ("budgets", "profiles"):
        rows = results.get(table, [])
        for key in [name for name in (rows[0] if rows else ()) if name.startswith("frechet")]:
            by_profile = {}
            for row in rows:
                by_profile.setdefault(row.get("profile", "constant share"), []).append(row)
            curves = {name: curve(mine, key) for name, mine in by_profile.items()}
            charts.append(plot.line_chart(curves, f"{table}, {key.split(', ')[1]}", x_label, y_label))
    guide = [row for row in results.get("guide", []) if row["time"] is not None]
    if guide:
        curves = {}
        for first, w in itertools.product(sorted({row["first"] for row in guide}), (1.5, 2.0, 3.0)):
            mine = [row for row in guide if (row["first"], row["w"]) == (first, w)]
            curves[f"first pass {first:g}, w {w:g}"] = curve(mine, "frechet")
        charts.append(plot.line_chart(curves, "fewer channels in the second pass", x_label, y_label))
    plot.save(out / "elastic.png", *charts)


if __name__ == "__main__":
    run_script(main)
