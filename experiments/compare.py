"""Full rank, static and noise-adaptive low rank side by side: the paper's main table at a budget one can afford.

    python experiments/compare.py                               CIFAR-10 at 16x16, model tiny, 20 runs
    python experiments/compare.py --only full-s0,full-s1        these runs alone, say in one of two processes
    python experiments/compare.py --report                      the table of what is finished
    python experiments/compare.py --model DiT-S/2 --image-size 32 --steps 800000 --batch-size 128 \\
        --num 10000 --guidance 2 --sampling-steps 100 --compile

NA-LR section 3, Tables 1 and 3. All runs have the same data, steps, batch and model; they differ in how the linear
layers are parameterised: full rank; static rank; iso-compute, which costs in sampling what static does; iso-param,
which has its parameters. The iso runs come with their curriculum, as in the paper (--curriculum-groups 0 takes it
away). A small budget hides small differences, so the rows that the paper's claims hang on (full, static 0.25,
everything at 0.5) are trained from several seeds, and a difference counts when the 95 % interval of its mean
leaves zero out.

Measured is the loss of eps on held-out images (every model meets the same images, timesteps and noise), the
Frechet distance between samples and held-out images in the features of experiments/classifier.py (not an FID), and
the share of samples that its network recognises as their class. With 2,000 samples a noise group, the difference
of two held-out losses has an error of its own of 0.1 % of the loss (standard error; full against static 0.25,
CIFAR-10 at 16x16, 250 steps), where three seeds spread by 2 %.

A stopped comparison goes on where it was by the same command. Processes that share the work (--only, one --out)
should each have a core (OMP_NUM_THREADS=1): two such do 1.35 times the work of one with two threads. Let the first
one write the classifier before the second starts. Flags that are not listed here go to train.py, such as
--predict eps.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classifier
import common
import curves
import fid
import flops
import plot
from common import GROUP_NAMES
from data import Dataset, open_source
from model import METHODS, DiT, parameter_count
from sample import save_grid
from script import InputError, Parser, pick_device, positive_int, run_script, sha256_of

KEEPS = (0.75, 0.5, 0.25)
ROWS = [("full", None)] + [(method, keep) for keep in KEEPS for method in METHODS[1:]]  # of the table
SEVERAL = [("full", None), ("static", 0.25)] + [(method, 0.5) for method in METHODS[1:]]  # rows of several seeds

# ----------------------------------------------------------------------------------------------------
# The runs and their measurements


def row_name(method: str, keep: float | None) -> str:
    return method if keep is None else f"{method}-{keep:g}"


def list_runs(seeds: int, all_seeds: bool) -> dict[str, tuple[str, float | None, int]]:
    """{name: (method, keep, seed)} in the order of training: the rows of several seeds first, seed by seed, so
    that a comparison that is stopped early already compares."""
    first = ROWS if all_seeds else SEVERAL
    runs = [(*row, seed) for seed in range(seeds) for row in first]
    runs += [(*row, 0) for row in ROWS if row not in first]
    return {f"{row_name(method, keep)}-s{seed}": (method, keep, seed) for method, keep, seed in runs}


def seconds_of(lines: list[dict], batch_size: int) -> float:
    """Seconds that the steps of a run took, from the speed in each line of its log: it does not matter how often
    the run was stopped, and pauses for saving do not count."""
    seconds, before = 0.0, 0
    for line in lines:
        seconds += (line["step"] - before) * batch_size / line["images_per_s"]
        before = line["step"]
    return seconds


def measure_run(model: DiT, folder: Path, test: Dataset, judge: Path | None, args, device: torch.device) -> dict:
    """Everything that the table says of one finished run."""
    result = common.losses_and_cost(model, folder, test, args.per_group)
    result |= dict(predict=model.config.predict, parameters=parameter_count(model.config), frechet=None,
                   recognised=None, sampling=flops.sampling(model.config, args.sampling_steps),
                   seconds=seconds_of(curves.read_log(folder), args.batch_size))
    if judge:
        path = folder / "samples.npz"
        common.write_samples(model, len(test.classes), path, args.num, args.sampling_steps, args.guidance)
        samples, extractor = open_source(str(path)), fid.file_extractor(classifier.features_file(judge))
        reference = open_source(args.test, args.data_dir, "test", args.image_size, len(test.images))
        cache = Path(args.data_dir) / "cache"
        ours = fid.measure(samples, extractor, device, 256, pr_num=0)
        theirs = fid.measure_once(reference, extractor, device, 256, None, 0, cache)
        result["frechet"] = fid.frechet_distance(ours.mu, ours.sigma, theirs.mu, theirs.sigma)
        network, state = classifier.load_classifier(judge, device)
        result["recognised"] = classifier.judge(network, state, samples, device)["recognised"]
    return result


# ----------------------------------------------------------------------------------------------------
# What differs


def interval(a: list[float], b: list[float], rows: list[list[float]]) -> tuple[float, float | None]:
    """mean(a) - mean(b), and half the width of its 95 % interval by Student's t. The variance over seeds is pooled
    over all `rows` that have several runs, as in an analysis of variance: two or three values alone say little
    about theirs, and rows of one run can be judged, too. None where no row has several."""
    difference, several = float(np.mean(a) - np.mean(b)), [x for x in rows if len(x) > 1]
    freedom = sum(len(x) - 1 for x in several)
    if not freedom:
        return difference, None
    variance = sum(np.var(x, ddof=1) * (len(x) - 1) for x in several) / freedom
    return difference, float(stats.t.ppf(0.975, freedom) * math.sqrt(variance * (1 / len(a) + 1 / len(b))))


def verdict(difference: float, half: float | None) -> str:
    """For a measure of which less is better, of `this minus that`."""
    if half is None:
        return "no spread known"
    return "better" if difference < -half else "worse" if difference > half else "not told apart"


def compare_rows(rows: dict, this: str, that: str) -> list[dict]:
    """`this` row against `that` one, by all three measures; [] unless both have been measured."""
    found = []
    for measure, label, sign in (("loss", "loss", 1), ("frechet", "Frechet distance", 1),
                                 ("recognised", "share recognised", -1)):  # -1: more is better
        values = {name: [run[measure] for run in row["runs"] if run[measure] is not None]
                  for name, row in rows.items()}
        if values.get(this) and values.get(that):
            difference, half = interval(values[this], values[that], list(values.values()))
            relative = difference / np.mean(values[that]) if any(values[that]) else math.nan
            judged = verdict(sign * difference, half)
            found.append(dict(this=this, that=that, measure=label, relative=relative, difference=difference,
                              half_width=half, verdict=judged))
    return found


def in_words(found: list[dict]) -> str:
    texts = []
    for c in found:
        spread = "" if c["half_width"] is None else f" +- {c['half_width']:.2g}"
        texts.append(f"{c['measure']} {c['difference']:+.3g}{spread} ({c['relative']:+.1%}): {c['verdict']}")
    return "; ".join(texts) or "not measured yet"


def print_words(rows: dict) -> list[dict]:
    """Which of the paper's trends the figures show. Returns the comparisons."""
    ahead = compare_rows(rows, "full", "static-0.25")
    print("\nDifferences of means, +- half the 95 % interval (the variance over seeds pooled over rows)\n\n"
          f"Is the budget enough? full against static 0.25: {in_words(ahead)}.")
    enough = bool(ahead) and ahead[0]["verdict"] == "better"
    if enough:
        print("Full rank is ahead by more than the seeds differ: capacity matters here, as the rest needs.")
    elif ahead:
        print("Full rank is not ahead beyond the spread over seeds: at this budget capacity does not decide, so\n"
              "the comparisons below say little about the methods. More --steps or a larger --model may.")
    every = list(ahead)
    for method, that, claim in (("iso-compute", "equal sampling cost", "FID 15 to 26 % lower"),
                                ("iso-param", "equal parameters", "FID within 5 %, sampling 16 to 25 % cheaper")):
        print(f"\n{method} against static at {that} (the paper: {claim})")
        mine = []
        for keep in KEEPS:
            this, static = row_name(method, keep), row_name("static", keep)
            found = compare_rows(rows, this, static)
            mine += found
            text = in_words(found)
            if found:
                cost, size = (rows[this][key] / rows[static][key] - 1 for key in ("sampling", "parameters"))
                text += f"; sampling {cost:+.1%}, parameters {size:+.1%}"
            print(f"  keep {keep:g}: {text}")
        trend = "better" if method == "iso-compute" else "not worse"
        wanted = {"better"} if trend == "better" else {"better", "not told apart"}
        for measure in dict.fromkeys(c["measure"] for c in mine):
            votes = [c["verdict"] for c in mine if c["measure"] == measure]
            counts = ", ".join(f"{votes.count(vote)} {vote}" for vote in ("better", "not told apart", "worse"))
            print(f"  by {measure}: {counts}; the paper's trend ({trend}) " + (
                "is not shown here" if not wanted.issuperset(votes) else
                "appears here" if enough else "cannot be judged at this budget"))
        every += mine
    return every


# ----------------------------------------------------------------------------------------------------
# Table and pictures


def collect(runs: dict, results: dict) -> dict:
    """{row name: its cost, its runs and the means of all measures}, in the order of the table."""
    rows = {}
    for method, keep in ROWS:
        mine = [results[name] for name, run in runs.items() if run[:2] == (method, keep) and name in results]
        if mine:
            row = {"method": method, "keep": keep, "n": len(mine), "runs": mine}
            for key in ("parameters", "sampling", "flops", "seconds", "loss", "loss_by_group", "frechet",
                        "recognised"):
                values = [run[key] for run in mine if run[key] is not None]
                row[key] = np.mean(values, 0).tolist() if values else None
            rows[row_name(method, keep)] = row
    return rows


def print_tables(rows: dict) -> None:
    table, by_group = [], []
    for row in rows.values():
        runs, first = row["runs"], {"method": row["method"], "keep": row["keep"]}
        line = first | {
            "n": row["n"], "params, M": row["parameters"] / 1e6, "sampling": flops.amount(round(row["sampling"])),
            "training": flops.amount(round(row["flops"])), "minutes": row["seconds"] / 60}
        for key, spec in (("loss", ".5f"), ("frechet", ".2f"), ("recognised", ".1%")):
            line[key] = common.mean_and_sd([run[key] for run in runs], spec)
        table.append(line)
        losses = zip(GROUP_NAMES, zip(*(run["loss_by_group"] for run in runs)))
        by_group.append(first | {group: common.mean_and_sd(values, ".4g") for group, values in losses})
    specs = {"method": "", "keep": "g"}
    print()
    plot.print_table(table, dict.fromkeys(table[0], "") | specs | {"params, M": ".2f", "minutes": ".1f"})
    print("\nHeld-out loss at timesteps t")
    plot.print_table(by_group, dict.fromkeys(by_group[0], "") | specs)
    print(f"±: standard deviation over seeds. {common.about_losses(runs[0]['predict'])}")


def draw(rows: dict, args) -> None:
    """figure.png, and samples.png where there are samples: a row of images for each row of the table."""
    def over_cost(key):
        found = {}
        for method in METHODS:
            line = [row for row in rows.values() if row["method"] == method and row[key] is not None]
            spread = [np.std([run[key] for run in row["runs"]], ddof=1) if row["n"] > 1 else 0 for row in line]
            if line:
                found[method] = [row["sampling"] for row in line], [row[key] for row in line], spread
        return found

    x_label = f"multiply-adds of {args.sampling_steps} sampling steps, one image"
    title = f"held-out loss after {args.steps:,} steps"
    charts = [plot.line_chart(over_cost("loss"), title, x_label, "loss, +- sd over seeds")]
    others = [name for name in rows if name != "full"]
    if "full" in rows and others:
        losses = {name: np.array([row["loss"], *row["loss_by_group"]]) for name, row in rows.items()}
        changes = [100 * (losses[name] / losses["full"] - 1) for name in others]
        charts.append(plot.heat_map(changes, others, ["all t", *GROUP_NAMES], "held-out loss against full rank",
                                    "%", "timesteps t", spec="+.1f"))
    if over_cost("frechet"):
        title = f"{args.num:,} samples, guidance {args.guidance:g}"
        charts.append(plot.line_chart(over_cost("frechet"), title, x_label, "Frechet distance, +- sd over seeds"))
    plot.save(args.out / "figure.png", *charts)
    files = {name: args.out / f"{name}-s0" / "samples.npz" for name in rows}
    pictured = {name: open_source(str(file)).read(0, min(10, args.num)) for name, file in files.items()
                if args.num and file.exists()}
    if pictured:
        save_grid(args.out / "samples.png", torch.cat(list(pictured.values())), min(10, args.num))
        print(f"wrote {args.out / 'samples.png'} (rows: {', '.join(pictured)}; the same noise and classes in all)")


# ----------------------------------------------------------------------------------------------------
# The script


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    common.add_run_flags(parser, "runs/compare")
    add("--steps", type=positive_int, metavar="N", default=3000, help="training steps of every run (default 3000; "
        "the paper: 800000)")
    common.add_repeat_flags(parser, seeds=3)
    add("--all-seeds", action="store_true", help="train the other rows from all seeds, too (default: from one)")
    add("--only", metavar="NAME,...", help="train and measure these runs alone, such as full-s0,static-0.25-s1")
    add("--report", action="store_true", help="train nothing: the table of what is finished")
    common.add_sample_flags(parser, num=1000, guidance=1.5, steps=50)
    add("--classifier", type=Path, metavar="FILE", help="of experiments/classifier.py; it and its .features.pt "
        "are trained once where they do not exist (default OUT/classifier.pt)")
    args = common.parse_flags(parser, ("--method", "--keep"))
    common.check_sample_flags(args)
    runs = list_runs(args.seeds, args.all_seeds)
    mine = common.choose("--only", args.only, runs) if args.only else list(runs)
    device = pick_device(args.device)
    common.settle_image_flags(args)
    flags = {}
    for name, (method, keep, seed) in runs.items():
        common.check_length(args.out / name, args.steps)
        flags[name] = common.run_flags(args, method=method, keep=keep, seed=seed, steps=args.steps,
                                       guidance=args.guidance)
    judge = (args.classifier or args.out / "classifier.pt") if args.num else None
    features = judge and classifier.features_file(judge)
    depends = {key: getattr(args, key) for key in ("test", "per_group", "num", "sampling_steps", "guidance")}

    if not args.report:
        test = common.load_held_out(args, 10_000)
        for name in mine:  # a mistyped flag costs a second, not the time it takes to train a classifier
            common.read_run_flags(flags[name], test)
        if judge and not (judge.exists() and features.exists()):
            print(f"training the classifier {judge}")
            wanted = dict(dataset=args.dataset, data_dir=args.data_dir, image_size=args.image_size,
                          device=args.device, out=judge)
            wanted |= dict(test=args.test) if args.test != args.dataset else {}
            classifier.main(common.as_flags(wanted))
        if judge:
            classifier.load_classifier(judge, device, test)
    depends["classifier"] = sha256_of(features) if judge and features.exists() else None
    if not args.report:
        for number, name in enumerate(mine, 1):
            print(f"\n{name}, {number} of {len(mine)}", flush=True)
            common.train_and_measure(args.out / name, flags[name], depends, device,
                                     lambda model, folder: measure_run(model, folder, test, judge, args, device))

    results = {name: common.measured(args.out / name, flags[name], depends) for name in runs}
    missing = [name for name, result in results.items() if result is None]
    rows = collect(runs, {name: result for name, result in results.items() if result})
    if not rows:
        raise InputError(f"{args.out} holds no finished run of these settings; leave --report out to train them")
    print_tables(rows)
    comparisons = print_words(rows)
    print(f"\n{len(missing)} of {len(runs)} runs are missing: {', '.join(missing)}" if missing else
          "\nall runs are in")
    draw(rows, args)
    plot.write_json(args.out / "results.json", dict(settings=vars(args), groups=GROUP_NAMES, missing=missing,
                                                    rows=list(rows.values()), comparisons=comparisons))
    print(f"wrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


if __name__ == "__main__":
    run_script(main)
