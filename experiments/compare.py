"""Full rank, static and noise-adaptive low rank beside each other: the paper's main table at a budget one can afford.

    python experiments/compare.py                               CIFAR-10 at 16x16, model tiny, 20 runs
    python experiments/compare.py --only full-s0,full-s1        these runs alone, say in one of two processes
    python experiments/compare.py --report                      the table of what is finished
    python experiments/compare.py --model DiT-S/2 --image-size 32 --steps 800000 --batch-size 128 \\
        --num 10000 --guidance 2 --sampling-steps 100 -- --compile

NA-LR section 3, Tables 1 and 3. All runs have the same data, steps, batch and model; they differ in how the linear
layers are parameterised: full rank; static rank; iso-compute, which costs in sampling what static does; iso-param,
which has its parameters. The iso runs come with their curriculum, as in the paper (`-- --curriculum-groups 0` takes
it away). A small budget hides small differences, so the rows that the paper's claims hang on are trained from several
seeds, and a difference counts when the 95 % interval of its mean leaves zero out.

Measured is the denoising loss on held-out images (every model meets the same images, timesteps and noise), the Frechet
distance between samples and held-out images in the features of experiments/classifier.py (not an FID), and the share of
samples that its network recognises as their class. With 2,000 samples a noise group, the difference of two held-out
losses has an error of its own of 0.1 % of the loss (standard error; full against static 0.25, CIFAR-10 at 16x16, 250
steps), where three seeds spread by 2 %.

A stopped comparison goes on where it was by the same command. Processes that share the work (--only, one --out) should
each have a core (OMP_NUM_THREADS=1): two such do 1.35 times the work of one with two threads. Let the first one write
the classifier before the second starts.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classifier
import fid
import flops
import plot
import train
from data import (Dataset, InputError, Parser, add_image_flags, end_progress, load_held_out, open_source, pick_device,
                  positive_int, run_script, settle_image_flags, show_progress, write_then_rename)
from model import METHODS, PRESETS, parameter_count
from sample import draw_images, load_model, save_grid
from schedule import T

KEEPS = (0.75, 0.5, 0.25)
ROWS = [("full", None)] + [(method, keep) for keep in KEEPS for method in METHODS[1:]]  # of the table
SEVERAL = [("full", None), ("static", 0.25)] + [(method, 0.5) for method in METHODS[1:]]  # rows of several seeds
MEASURES = ("loss", "frechet", "recognised", "training", "seconds")

# ----------------------------------------------------------------------------------------------------
# The runs


def row_name(method: str, keep: float | None) -> str:
    return method if keep is None else f"{method}-{keep:g}"


def list_runs(seeds: int, all_seeds: bool) -> dict[str, tuple[str, float | None, int]]:
    """{name: (method, keep, seed)} in the order of training: the rows of several seeds first, seed by seed, so that
    a comparison that is stopped early already compares."""
    first = ROWS if all_seeds else SEVERAL
    runs = [(*row, seed) for seed in range(seeds) for row in first] + [(*row, 0) for row in ROWS if row not in first]
    return {f"{row_name(method, keep)}-s{seed}": (method, keep, seed) for method, keep, seed in runs}


def training_flags(args, method: str, keep: float | None, seed: int) -> list[str]:
    """The command line of train.py for one run, but for --out and --device."""
    flags = ["--dataset", args.dataset, "--data-dir", args.data_dir, "--model", args.model, "--method", method,
             "--seed", str(seed), "--steps", str(args.steps), "--batch-size", str(args.batch_size),
             "--sample-every", "0", "--guidance", str(args.guidance)]
    for flag, value in (("--keep", keep), ("--image-size", args.image_size)):
        flags += [] if value is None else [flag, f"{value:g}"]
    return flags + args.train_flags


def wall_seconds(folder: Path, batch_size: int) -> float:
    """Seconds that the steps of a run took, from the speed in each line of metrics.jsonl: it does not matter how
    often the run was stopped, and pauses for saving do not count."""
    seconds, before = 0.0, 0
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        seconds += (line["step"] - before) * batch_size / line["images_per_s"]
        before = line["step"]
    return seconds


def settings_of(args, name: str, run: tuple, judge: Path | None) -> dict:
    """All that a measurement depends on: it is made again when any of this has changed."""
    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.exists() else None

    return {"train": training_flags(args, *run), "model": digest(args.out / name / "model.pt"), "test": args.test,
            "per_group": args.per_group, "num": args.num, "sampling_steps": args.sampling_steps,
            "guidance": args.guidance, "classifier": digest(judge)}


def finished(folder: Path, settings: dict) -> dict | None:
    """What measured.json of a run says, or None if it is not there, damaged, or of other settings."""
    try:
        measured = json.loads((folder / "measured.json").read_text())
        return measured if measured["settings"] == settings and set(MEASURES) < set(measured) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ----------------------------------------------------------------------------------------------------
# One run's measurements


def write_samples(model, classes: int, args, path: Path) -> None:
    """args.num images, the classes in turn, as sample.py writes them into a .npz."""
    batch, images, labels = 100 if model.position.device.type == "cpu" else 500, [], []
    for first in range(0, args.num, batch):
        drawn = draw_images(model, range(first, min(first + batch, args.num)), list(range(classes)),
                            steps=args.sampling_steps, guidance=args.guidance)
        images.append(drawn[0])
        labels.append(drawn[1])
        show_progress(f"{path.parent.name}: {first + len(drawn[0])} of {args.num} samples")
    end_progress()
    arrays = {"arr_0": torch.cat(images).permute(0, 2, 3, 1).numpy(), "labels": torch.cat(labels).numpy()}
    write_then_rename(path, lambda file: np.savez(file, **arrays))


def measure_run(folder: Path, test: Dataset, judge: Path | None, args, device: torch.device) -> dict:
    """Everything that the table says of one finished run."""
    model, _ = load_model(folder, device)
    config, settings, steps, spent = flops.read_run(folder)
    loss, by_group = train.held_out_loss(model, test, args.per_group)
    result = {"loss": loss, "by_group": by_group, "frechet": None, "recognised": None,
              "parameters": parameter_count(config), "sampling": flops.sampling(config, args.sampling_steps),
              "training": spent, "steps": steps, "seconds": wall_seconds(folder, settings["batch_size"])}
    if judge:
        write_samples(model, len(test.classes), args, folder / "samples.npz")
        samples = open_source(str(folder / "samples.npz"))
        extractor = fid.file_extractor(classifier.features_file(judge))
        reference = open_source(args.test, args.data_dir, "test", args.image_size, len(test.images))
        ours = fid.measure(samples, extractor, device, 256, pr_num=0)
        theirs = fid.measure_once(reference, extractor, device, 256, None, 0, Path(args.data_dir) / "cache")
        result["frechet"] = fid.frechet_distance(ours.mu, ours.sigma, theirs.mu, theirs.sigma)
        network, state = classifier.load_classifier(judge, device)
        result["recognised"] = classifier.judge(network, state, samples, device)["recognised"]
    return result


# ----------------------------------------------------------------------------------------------------
# What differs


def interval(a: list[float], b: list[float], rows: list[list[float]]) -> tuple[float, float | None]:
    """mean(a) - mean(b), and half the width of its 95 % interval by Student's t. The variance over seeds is pooled over
    all `rows` that have several runs, as in an analysis of variance: two or three values alone say little about theirs,
    and rows of one run can be judged, too. None where no row has several."""
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
    for measure, label, less_is_better in (("loss", "loss", True), ("frechet", "Frechet distance", True),
                                           ("recognised", "share recognised", False)):
        values = {name: [run[measure] for run in row["runs"] if run[measure] is not None] for name, row in rows.items()}
        if values.get(this) and values.get(that):
            difference, half = interval(values[this], values[that], list(values.values()))
            judged = verdict(difference if less_is_better else -difference, half)
            relative = difference / np.mean(values[that]) if any(values[that]) else math.nan
            found.append({"this": this, "that": that, "measure": label, "relative": relative, "difference": difference,
                          "half_width": half, "verdict": judged})
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
        print("Full rank is ahead by more than the seeds differ: capacity matters at this budget, as the rest needs.")
    elif ahead:
        print("Full rank is not ahead beyond the spread over seeds: at this budget capacity does not decide, so the\n"
              "comparisons below say little about the methods. More --steps or a larger --model may.")
    every = list(ahead)
    for method, that, claim in (("iso-compute", "equal sampling cost", "FID 15 to 26 % lower"),
                                ("iso-param", "equal parameters", "FID within 5 %, sampling 16 to 25 % cheaper")):
        print(f"\n{method} against static at {that} (the paper: {claim})")
        for keep in KEEPS:
            this, static = row_name(method, keep), row_name("static", keep)
            found = compare_rows(rows, this, static)
            every += found
            text = in_words(found)
            if found:
                cost, size = (rows[this][k] / rows[static][k] - 1 for k in ("sampling", "parameters"))
                text += f"; sampling {cost:+.1%}, parameters {size:+.1%}"
            print(f"  keep {keep:g}: {text}")
        trend = "better" if method == "iso-compute" else "not worse"
        wanted = {"better"} if trend == "better" else {"better", "not told apart"}
        for measure in dict.fromkeys(c["measure"] for c in every if c["this"].startswith(method)):
            votes = [c["verdict"] for c in every if c["this"].startswith(method) and c["measure"] == measure]
            counts = ", ".join(f"{votes.count(v)} {v}" for v in ("better", "not told apart", "worse"))
            print(f"  by {measure}: {counts}; the paper's trend ({trend}) " + (
                "is not shown here" if not wanted.issuperset(votes) else
                "appears here" if enough else "cannot be judged at this budget"))
    return every


# ----------------------------------------------------------------------------------------------------
# Table and pictures


def collect(runs: dict, measured: dict) -> dict:
    """{row name: its runs, mean and standard deviation of every measure, cost}, in the order of the table."""
    rows = {}
    for method, keep in ROWS:
        mine = [measured[name] for name, run in runs.items() if run[:2] == (method, keep) and name in measured]
        if not mine:
            continue
        row = {"method": method, "keep": keep, "n": len(mine), "parameters": mine[0]["parameters"],
               "sampling": mine[0]["sampling"], "runs": mine,
               "by_group": np.mean([m["by_group"] for m in mine], 0).tolist(), "by_group_sd": None}
        if len(mine) > 1:
            row["by_group_sd"] = np.std([m["by_group"] for m in mine], 0, ddof=1).tolist()
        for key in MEASURES:
            values = [m[key] for m in mine if m[key] is not None]
            row[key] = float(np.mean(values)) if values else None
            row[key + "_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows[row_name(method, keep)] = row
    return rows


def print_tables(rows: dict, groups: list[str]) -> None:
    table, by_group = [], []
    for row in rows.values():
        line = {"method": row["method"], "keep": row["keep"], "n": row["n"], "params, M": row["parameters"] / 1e6,
                "sampling": flops.amount(row["sampling"]), "training": flops.amount(round(row["training"])),
                "minutes": row["seconds"] / 60, "loss": row["loss"], "sd ": row["loss_sd"],
                "Frechet": row["frechet"], "sd": row["frechet_sd"], "recognised": row["recognised"],
                " sd": row["recognised_sd"]}
        table.append(line)
        spread = row["by_group_sd"] or [None] * len(groups)
        by_group.append({"method": row["method"], "keep": row["keep"]} | {
            group: f"{mean:.4g}" + ("" if sd is None else f" ± {sd:.1g}")
            for group, mean, sd in zip(groups, row["by_group"], spread)})
    print()
    plot.print_table(table, {"method": "", "keep": "g", "n": "d", "params, M": ".2f", "sampling": "", "training": "",
                             "minutes": ".1f", "loss": ".5f", "sd ": ".5f", "Frechet": ".2f", "sd": ".2f",
                             "recognised": ".1%", " sd": ".1%"})
    print("\nHeld-out loss per noise group (timesteps t), ± standard deviation over seeds")
    plot.print_table(by_group, {"method": "", "keep": "g"} | dict.fromkeys(groups, ""))


def draw(rows: dict, groups: list[str], args) -> None:
    """figure.png, and samples.png where there are samples: a row of images for each row of the table."""
    def curves(key):
        lines = {method: [row for row in rows.values() if row["method"] == method and row[key] is not None]
                 for method in METHODS}
        return {method: ([row["sampling"] for row in line], [row[key] for row in line],
                         [row[key + "_sd"] or 0 for row in line]) for method, line in lines.items() if line}

    x_label = f"multiply-adds of {args.sampling_steps} sampling steps, one image"
    charts = [plot.line_chart(curves("loss"), f"held-out loss after {args.steps:,} steps", x_label,
                              "loss, +- sd over seeds")]
    if "full" in rows:
        full = [rows["full"]["loss"], *rows["full"]["by_group"]]
        others = [name for name in rows if name != "full"]
        if others:
            values = [[100 * (a / b - 1) for a, b in zip([rows[name]["loss"], *rows[name]["by_group"]], full)]
                      for name in others]
            charts.append(plot.heat_map(values, others, ["all t", *groups], "held-out loss against full rank, %", "%",
                                        "timesteps t", spec="+.1f"))
    if curves("frechet"):
        charts.append(plot.line_chart(curves("frechet"), f"{args.num:,} samples, guidance {args.guidance:g}", x_label,
                                      "Frechet distance (classifier), +- sd"))
    plot.save(args.out / "figure.png", *charts)
    pictured = [name for name in rows if (args.out / f"{name}-s0" / "samples.npz").exists()]
    if pictured and args.num:
        parts = []
        for name in pictured:
            source = open_source(str(args.out / f"{name}-s0" / "samples.npz"))
            parts.append(source.read(0, min(10, args.num)))
        save_grid(args.out / "samples.png", torch.cat(parts), len(parts[0]))
        print(f"wrote {args.out / 'samples.png'} (rows: {', '.join(pictured)}; the same noise and classes in each)")


# ----------------------------------------------------------------------------------------------------
# The script


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_image_flags(parser)
    add("--model", choices=PRESETS, metavar="NAME", default="tiny", help="tiny, or DiT-S/2 and the like (default tiny)")
    add("--steps", type=positive_int, default=3000, help="training steps of every run (default 3000; the paper: "
        "800000)")
    add("--batch-size", type=positive_int, default=64, help="images a step (default 64; the paper: 128)")
    add("--seeds", type=positive_int, default=3, help="of the rows "
        f"{', '.join(row_name(*row) for row in SEVERAL)} (default 3)")
    add("--all-seeds", action="store_true", help="train the other rows from all seeds, too (default: from one)")
    add("--only", metavar="NAME,...", help="train and measure these runs alone, such as full-s0,static-0.25-s1")
    add("--report", action="store_true", help="train nothing: the table of what is finished")
    add("--per-group", type=positive_int, default=2000, metavar="N", help="held-out samples in each of the five noise "
        "groups (default 2000)")
    add("--num", type=int, default=1000, help="samples for the Frechet distance; 0 leaves it and the accuracy out. It "
        "is biased upwards, the more the fewer samples: compare equal numbers (default 1000)")
    add("--guidance", type=float, default=1.5, help="of the samples (default 1.5; the paper: 2)")
    add("--sampling-steps", type=positive_int, default=50, help="of DDIM (default 50; the paper: 100)")
    add("--classifier", type=Path, metavar="FILE", help="of experiments/classifier.py; it and its .features.pt are "
        "trained once where they do not exist (default OUT/classifier.pt)")
    add("--out", type=Path, default=Path("runs/compare"), help="folder of everything (default runs/compare)")
    add("--device", choices=train.DEVICES, default="auto")
    add("train_flags", nargs="*", metavar="-- FLAGS", help="after --: further flags of train.py, the same for every "
        "run")
    args = parser.parse_args()
    runs = list_runs(args.seeds, args.all_seeds)
    mine = list(runs) if args.only is None else args.only.split(",")
    if unknown := [name for name in mine if name not in runs]:
        parser.error(f"--only {unknown[0]}: the runs are {', '.join(runs)}")
    if args.num < 0 or args.num == 1 or not math.isfinite(args.guidance) or args.sampling_steps > T:
        parser.error("--num takes 0, or at least 2; --guidance a finite number; --sampling-steps at most 1000")
    device = pick_device(args.device)
    settle_image_flags(args)
    for run in runs.values():  # a mistyped flag costs a second, not the time it takes to train a classifier
        train.check_settings(train.choose_settings({key: value for key, value in vars(
            train.parse_arguments(training_flags(args, *run))[1]).items() if value is not None}))
    judge = (args.classifier or args.out / "classifier.pt") if args.num else None
    features = judge and classifier.features_file(judge)

    if not args.report:
        test = load_held_out(args, 10_000)
        if judge and not (judge.exists() and features.exists()):
            print(f"training the classifier {judge}")
            flags = [] if args.image_size is None else ["--image-size", str(args.image_size)]
            flags += ["--test", args.test] if args.test != args.dataset else []
            classifier.main(["--dataset", args.dataset, "--data-dir", args.data_dir, "--device", args.device,
                             "--out", str(judge), *flags])
        if judge:
            state = classifier.load_classifier(str(judge), device)[1]
            if state["classes"] != test.classes or state["config"]["image_size"] != test.images.shape[-1]:
                raise InputError(f"{judge} is of other classes or another image size than {args.test}; "
                                 "name another file")
        for name in mine:
            folder = args.out / name
            if finished(folder, settings_of(args, name, runs[name], features)):
                continue
            print(f"\n{name}, {1 + mine.index(name)} of {len(mine)}", flush=True)
            train.main(["--resume", "--out", str(folder), "--device", args.device,
                        *training_flags(args, *runs[name])])
            result = measure_run(folder, test, judge, args, device)
            result["settings"] = settings_of(args, name, runs[name], features)
            plot.write_json(folder / "measured.json", result)

    measured = {name: finished(args.out / name, settings_of(args, name, run, features)) for name, run in runs.items()}
    missing = [name for name, result in measured.items() if result is None]
    rows = collect(runs, {name: result for name, result in measured.items() if result})
    if not rows:
        raise InputError(f"{args.out} holds no finished run of these settings; leave --report out to train them")
    groups = train.GROUP_NAMES
    print_tables(rows, groups)
    comparisons = print_words(rows)
    print(f"\n{len(missing)} of {len(runs)} runs are missing: {', '.join(missing)}" if missing else "\nall runs are in")
    draw(rows, groups, args)
    plot.write_json(args.out / "results.json", {"groups": groups, "rows": list(rows.values()), "missing": missing,
                                                "comparisons": comparisons})
    print(f"wrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


if __name__ == "__main__":
    run_script(main)
