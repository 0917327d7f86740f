"""At one sampling cost, which rank schedule gives the better images? And does an elastic model match its siblings?

    python experiments/compare.py                                 CIFAR-10 at 16x16, model tiny, keep 0.25
    python experiments/compare.py --dataset shapes --rows static,fitted --fit runs/elastic/ranks
    python experiments/compare.py --only static-0.25-s0           this run alone, say in one of two processes
    python experiments/compare.py --report                        the table of what is finished
    python experiments/compare.py --rows full,static,iso-compute,iso-param --keeps 0.75,0.5,0.25 --model DiT-S/2 \\
        --image-size 32 --steps 800000 --batch-size 128 --num 50000 --sampling-steps 100 --curriculum-groups 10

NA-LR section 3, Tables 1 and 3. All runs have the same data, steps, batch and model; they differ in their rows:

    static            one rank for all t, of the share that --keeps names
    iso-compute       the paper's schedule, of the same sampling cost
    fitted            another profile of the same cost, from fit_ranks.py: FIT/OBJECTIVE-KEEP.train.json
    iso-compute-eps   the paper's schedule and its target: predicts eps, where the other rows predict v
    elastic           one run for all keeps, sampled with that constant share of its channels
    full, iso-param   all channels; the paper's schedule with static's parameters

No row has the curriculum, unless --curriculum-groups N is added. A difference counts when the 95 % interval of its
mean over seeds leaves zero out. Measured is the loss of eps on held-out images (every model meets the same images,
timesteps and noise), and at each guidance the Frechet distance between samples and held-out images in the features of
experiments/classifier.py (not an FID), and the share of samples that its network recognises as their class.

A stopped comparison goes on where it was by the same command. Processes that share the work (--only, one --out)
should each have a core (OMP_NUM_THREADS=1): two such do 1.35 times the work of one with two threads. Let the first
one write the classifier before the second starts. Flags that are not listed here go to train.py.
"""

import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classifier
import common
import curves
import flops
import plot
from common import GROUP_NAMES
from data import Dataset, open_source
from model import DiT, parameter_count
from sample import save_grid, save_npz
from schedule import Shares
from script import InputError, Parser, pick_device, positive_int, run_script, sha256_of

ROWS = {  # name: flags of train.py
    "full": dict(method="full"),
    "static": dict(method="static"),
    "iso-compute": dict(method="iso-compute"),
    "fitted": dict(method="iso-compute"),  # and a profile
    "iso-compute-eps": dict(method="iso-compute", predict="eps"),
    "elastic": dict(method="elastic"),
    "iso-param": dict(method="iso-param"),
}
PAIRS = (("iso-compute", "static"), ("fitted", "static"), ("elastic", "static"), ("iso-compute-eps", "iso-compute"),
         ("iso-param", "static"), ("full", "static"))

# ----------------------------------------------------------------------------------------------------
# The runs and their measurements


class Entry(NamedTuple):
    """A row of the table from one seed."""
    row: str
    keep: float | None
    seed: int
    run: str  # the name of its folder: the keeps of an elastic row share one
    flags: dict  # of train.py

    @property
    def name(self) -> str:
        """In the table."""
        return self.row if self.keep is None else f"{self.row}-{self.keep:g}"

    @property
    def shares(self) -> Shares:
        return Shares(((1, self.keep),)) if self.row == "elastic" else Shares()


def list_entries(rows: list[str], keeps: list[float], seeds: int, fit: Path | None, objective: str) -> list[Entry]:
    """Everything to judge, seed by seed, so that a comparison that is stopped early already compares."""
    found = []
    for seed in range(seeds):
        for row in rows:
            for keep in [None] if row == "full" else keeps:
                flags = dict(ROWS[row])
                if row not in ("full", "elastic"):
                    flags["keep"] = keep
                if row == "fitted":
                    flags["rank_profile"] = fit / f"{objective}-{keep:g}.train.json"
                run = row if keep is None or row == "elastic" else f"{row}-{keep:g}"
                found.append(Entry(row, keep, seed, f"{run}-s{seed}", flags))
    return found


def seconds_of(lines: list[dict], batch_size: int) -> float:
    """Seconds that the steps of a run took, from the speed in each line of its log: it does not matter how often
    the run was stopped, and pauses for saving do not count."""
    seconds, before = 0.0, 0
    for line in lines:
        seconds += (line["step"] - before) * batch_size / line["images_per_s"]
        before = line["step"]
    return seconds


def measure_run(model: DiT, folder: Path, one: Entry, test: Dataset, judge: classifier.Judge | None, args) -> dict:
    """Everything that the table says of one finished run."""
    share = one.keep if one.row == "elastic" else None
    loss, by_group = common.held_out_loss(model, test, args.per_group, share=share)
    result = dict(loss=loss, loss_by_group=by_group, flops=common.spent(folder), predict=model.config.predict,
                  parameters=parameter_count(model.config),
                  seconds=seconds_of(curves.read_log(folder), args.batch_size),
                  sampling=flops.sampling(model.config, args.sampling_steps, shares=one.shares))
    for w in args.guidances if judge else ():
        samples = common.draw_samples(model, len(test.classes), args.num, args.sampling_steps, w, one.shares)
        for name, value in judge(*samples).items():
            result[f"{name}, w {w:g}"] = value
        save_npz(folder / f"samples-{one.name}-w{w:g}.npz", *samples)
    return result


# ----------------------------------------------------------------------------------------------------
# What differs


def interval(a: list[float], b: list[float]) -> tuple[float, float | None]:
    """mean(a) - mean(b), and half the width of its 95 % interval after Welch (1947): some rows spread several times as
    much over their seeds as others, so variances are not pooled. None where one of them has a single run, or neither
    spreads. Nothing is corrected for the number of comparisons."""
    difference = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return difference, None
    variances = np.array([np.var(x, ddof=1) / len(x) for x in (a, b)])  # of the means
    freedom = variances.sum() ** 2 / sum(variances**2 / [len(a) - 1, len(b) - 1])
    return difference, float(stats.t.ppf(0.975, freedom) * variances.sum() ** 0.5)


def verdict(difference: float, half: float | None) -> str:
    """For a measure of which less is better, of `this minus that`."""
    if half is None:
        return "no spread known"
    return "better" if difference < -half else "worse" if difference > half else "not told apart"


def compare_rows(rows: dict, this: str, that: str, measures: list[str]) -> list[dict]:
    """`this` row against `that` one, by each measure; [] unless both have been measured."""
    found = []
    for measure in measures:
        values = {name: [run[measure] for run in row["runs"]] for name, row in rows.items()}
        if this in values and that in values:
            difference, half = interval(values[this], values[that])
            relative = difference / np.mean(values[that]) if any(values[that]) else math.nan
            sign = -1 if measure.startswith("recognised") else 1  # more is better
            found.append({"this": this, "that": that, "measure": measure, "difference": difference, "+-": half,
                          "relative": relative, "verdict": verdict(sign * difference, half)})
    return found


def print_differences(rows: dict, keeps: list[float], measures: list[str]) -> list[dict]:
    found = []
    for this, that in PAIRS:
        for keep in keeps:
            names = [row if row == "full" else f"{row}-{keep:g}" for row in (this, that)]
            found += compare_rows(rows, *names, measures)
    if found:
        print("\nDifferences of means, +- half the 95 % interval over seeds (Welch)")
        plot.print_table(found, {"this": "", "that": "", "measure": "", "difference": "+.3g", "+-": ".2g",
                                 "relative": "+.1%", "verdict": ""})
    return found


# ----------------------------------------------------------------------------------------------------
# Table and pictures


def collect(judged: list[Entry], results: list[dict | None], measures: list[str]) -> dict:
    """{name in the table: its cost, its runs and the means of all measures}."""
    rows = {}
    for one, result in zip(judged, results):
        if result:
            row = rows.setdefault(one.name, {"row": one.row, "keep": one.keep, "runs": []})
            row["runs"].append(result)
    for row in rows.values():
        row["n"] = len(row["runs"])
        for key in ("parameters", "sampling", "flops", "seconds", "loss_by_group", *measures):
            row[key] = np.mean([run[key] for run in row["runs"]], 0).tolist()
    return rows


def print_tables(rows: dict, measures: list[str]) -> None:
    table, by_group = [], []
    for row in rows.values():
        runs, first = row["runs"], {"row": row["row"], "keep": row["keep"]}
        line = first | {
            "n": row["n"], "params, M": row["parameters"] / 1e6, "sampling": flops.amount(round(row["sampling"])),
            "training": flops.amount(round(row["flops"])), "minutes": row["seconds"] / 60}
        table.append(line | common.shown(runs, measures))
        losses = zip(GROUP_NAMES, zip(*(run["loss_by_group"] for run in runs)))
        by_group.append(first | {group: common.mean_and_sd(values, ".4g") for group, values in losses})
    specs = {"row": "", "keep": "g"}
    print()
    plot.print_table(table, dict.fromkeys(table[0], "") | specs | {"params, M": ".2f", "minutes": ".1f"})
    print("\nHeld-out loss at timesteps t")
    plot.print_table(by_group, dict.fromkeys(by_group[0], "") | specs)
    print("±: standard deviation over seeds. Losses are those of eps, whatever a model predicts: so they compare.")


def draw(rows: dict, args) -> None:
    """figure.png, and samples.png where there are samples: a row of images for each row of the table."""
    def over_cost(key):
        found = {}
        for name in ROWS:
            line = sorted((row for row in rows.values() if row["row"] == name), key=lambda row: row["sampling"])
            spread = [np.std([run[key] for run in row["runs"]], ddof=1) if row["n"] > 1 else 0 for row in line]
            if line:
                found[name] = [row["sampling"] for row in line], [row[key] for row in line], spread
        return found

    x_label = f"multiply-adds of {args.sampling_steps} steps without guidance"
    charts = [plot.line_chart(over_cost("loss"), f"held-out loss after {args.steps:,} steps", x_label,
                              "loss, +- sd over seeds")]
    for w in args.guidances if args.num else ():
        charts.append(plot.line_chart(over_cost(f"frechet, w {w:g}"), f"{args.num:,} samples, guidance {w:g}", x_label,
                                      "Frechet distance, +- sd over seeds"))
    static = next((name for name in rows if name.startswith("static")), None)
    if static and len(rows) > 1:
        losses = {name: np.array([row["loss"], *row["loss_by_group"]]) for name, row in rows.items()}
        changes = [100 * (losses[name] / losses[static] - 1) for name in rows]
        charts.append(plot.heat_map(changes, list(rows), ["all t", *GROUP_NAMES], f"held-out loss against {static}",
                                    "%", "timesteps t", spec="+.1f"))
    plot.save(args.out / "figure.png", *charts)
    pictured = {}
    for name, row in rows.items():
        run = row["row"] if row["row"] in ("full", "elastic") else name
        file = args.out / f"{run}-s0" / f"samples-{name}-w{args.guidances[-1]:g}.npz"
        if args.num and file.exists():
            pictured[name] = open_source(str(file)).read(0, min(10, args.num))
    if pictured:
        save_grid(args.out / "samples.png", torch.cat(list(pictured.values())), min(10, args.num))
        print(f"wrote {args.out / 'samples.png'} (rows: {', '.join(pictured)}; the same noise and classes in all)")


# ----------------------------------------------------------------------------------------------------
# The script


def read_command_line() -> Namespace:
    """Flags, their lists read and checked; args.train_flags are train.py's. Raises InputError."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    common.add_run_flags(parser, "runs/compare")
    add("--rows", default="static,iso-compute,iso-compute-eps,elastic", metavar="NAME,...",
        help=f"of {', '.join(ROWS)} (default static,iso-compute,iso-compute-eps,elastic)")
    add("--keeps", default="0.25", metavar="F,...", help="kept shares of the parameters (default 0.25)")
    add("--fit", type=Path, metavar="DIR", help="where fit_ranks.py wrote its profiles, for the row `fitted`")
    add("--objective", default="rollout", metavar="NAME", help="which of them (default rollout)")
    add("--steps", type=positive_int, metavar="N", default=3000, help="training steps of every run (default 3000; "
        "the paper: 800000)")
    common.add_repeat_flags(parser, seeds=3)
    add("--only", metavar="NAME,...", help="train and measure these runs alone, such as static-0.25-s0")
    add("--report", action="store_true", help="train nothing: the table of what is finished")
    common.add_judge_flags(parser, num=5000)
    args = common.parse_flags(parser, ("--method", "--keep", "--rank-profile", "--predict"))
    common.settle_judge_flags(args)
    args.rows = common.choose("--rows", args.rows, ROWS)
    if "fitted" in args.rows and not args.fit:
        raise InputError("--rows fitted needs --fit DIR, the profiles that experiments/fit_ranks.py wrote")
    if args.fit and "fitted" not in args.rows:
        raise InputError(f"--fit {args.fit} is for the row fitted: add it to --rows")
    args.keeps = common.choose_numbers("--keeps", args.keeps, low=1e-3, high=1)
    common.settle_image_flags(args)
    return args


def main():
    args = read_command_line()
    judged = list_entries(args.rows, args.keeps, args.seeds, args.fit, args.objective)
    runs = {one.run: one for one in judged}
    mine = common.choose("--only", args.only, runs) if args.only else list(runs)
    device, flags = pick_device(args.device), {}
    profiles = {}  # what is measured of a fitted row depends on the content of its file
    for name, one in runs.items():
        if one.row == "fitted":
            profiles[name] = sha256_of(one.flags["rank_profile"])
        own = dict(curriculum_groups=0, predict="v") | one.flags
        flags[name] = common.run_flags(args, seed=one.seed, steps=args.steps, guidance=args.guidances[-1], **own)
        common.check_settings(args.out / name, flags[name])
    depends = {key: getattr(args, key) for key in ("test", "per_group", "num", "sampling_steps", "guidances")}

    if not args.report:
        everything = common.load_held_out(args, 10_000)
        for name in mine:  # a mistyped flag costs a second, not the time it takes to train a classifier
            _, config = common.read_run_flags(flags[name], everything)
            if config.method == "elastic" and min(args.keeps) < config.rho_min:
                raise InputError(f"--keeps {min(args.keeps):g}: elastic rows are sampled with that share of the "
                                 f"channels; they train none below {config.rho_min:g}")
        test = common.every_second(everything, 1)  # fit_ranks.py has seen the others
        judge = classifier.trained_judge(args, test, device) if args.num else None
    depends["classifier"] = sha256_of(args.classifier) if args.num and args.classifier.exists() else None

    def depends_of(one: Entry) -> dict:
        return depends | ({"profile": profiles[one.run]} if one.row == "fitted" else {})

    if not args.report:
        for number, one in enumerate((one for one in judged if one.run in mine), 1):
            print(f"\n{one.name}-s{one.seed}, number {number}", flush=True)
            common.train_and_measure(args.out / one.run, flags[one.run], depends_of(one), device,
                                     lambda model, folder: measure_run(model, folder, one, test, judge, args),
                                     f"measured-{one.name}")

    results = [common.measured(args.out / one.run, flags[one.run], depends_of(one), f"measured-{one.name}")
               for one in judged]
    missing = [f"{one.name}-s{one.seed}" for one, result in zip(judged, results) if result is None]
    measures = ["loss"]
    for w in args.guidances if args.num else ():
        measures += [f"frechet, w {w:g}", f"recognised, w {w:g}"]
    rows = collect(judged, results, measures)
    if not rows:
        raise InputError(f"{args.out} holds no finished run of these settings; leave --report out to train them")
    print_tables(rows, measures)
    differences = print_differences(rows, args.keeps, measures)
    print(f"\n{len(missing)} of {len(judged)} are missing: {', '.join(missing)}" if missing else "\nall runs are in")
    draw(rows, args)
    plot.write_json(args.out / "results.json", dict(settings=vars(args), groups=GROUP_NAMES, missing=missing,
                                                    rows=list(rows.values()), differences=differences))
    print(f"wrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


if __name__ == "__main__":
    run_script(main)
