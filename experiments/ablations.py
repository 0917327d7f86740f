"""Which of NA-LR's choices matter? Changes them one at a time and trains each variant for equally many steps.

    python experiments/ablations.py --dataset shapes                 about an hour on two CPU cores, no download
    python experiments/ablations.py --only profile,restart --seeds 3
    python experiments/ablations.py --model DiT-S/2 --image-size 32 --steps 800000 --batch-size 128    the paper's scale

NA-LR appendix C (Figures 10, 11, 13 to 17) and E.1 (Table 5). The paper judges most of them by FID; here it is the
denoising loss on held-out images, in all and per noise group, beside the multiply-adds of the training. Variants:

    rho-min      0.3 to 0.6, and `static`, the model that is not noise-adaptive (iso-compute keeps the average cost:
                 the smaller rho_min, the larger r_max)
    profile      logistic or linear Phi(t)
    warm-start   all channels for t <= 100, or not
    curriculum   on or off
    alpha        factor of the loss's EMA: how long the curriculum takes if no share of the steps limits it
    sampling     progressive uniform sampling, or plainly uniform within the groups that are in
    restart      learning-rate boost and optimiser reset with each group, or not

Every run is a folder under --out, named by its flags; the baseline serves all comparisons. The same command goes on
where it was stopped. Flags that are not listed here go to train.py.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import plot
import train
from data import (InputError, Parser, add_image_flags, load_held_out, pick_device, positive_int, run_script,
                  settle_image_flags)
from model import PRESETS
from train import GROUP_NAMES

# ----------------------------------------------------------------------------------------------------
# Settings

# The paper's choices, as flags of train.py; a variant changes some of them. A flag without a value is "".
BASELINE = {"rho-min": "0.4", "rank-profile": "logistic", "warm-start": "0.1", "curriculum-groups": "10",
            "curriculum-share": "0.4", "curriculum-alpha": "0.05", "curriculum-sampling": "progressive"}
NO_CURRICULUM = {"curriculum-groups": "0"}
ABLATIONS = {
    "rho-min": {rho: {"rho-min": rho} for rho in ("0.3", "0.4", "0.5", "0.6")} | {"static": {"method": "static"}},
    "profile": {"logistic": {}, "linear": {"rank-profile": "linear"}},
    "warm-start": {"0.1": {}, "0": {"warm-start": "0"}},
    "curriculum": {"on": {}, "off": NO_CURRICULUM},
    "alpha": {a: {"curriculum-share": "1", "curriculum-alpha": a} for a in ("0.1", "0.05", "0.01", "0.005")},
    "sampling": {"progressive": {}, "uniform": {"curriculum-sampling": "uniform"}, "no curriculum": NO_CURRICULUM},
    "restart": {"on": {}, "off": {"no-restart": ""}, "no curriculum": NO_CURRICULUM},
}
CLEANEST, NOISIEST = 0, 4
HARMLESS = 0.01  # Table 5: with a curriculum FID changes by -0.9 to +0.8 %

# ----------------------------------------------------------------------------------------------------
# One run


def as_flags(settings: dict[str, str]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", value) if word]


def differing(change: dict[str, str]) -> dict[str, str]:
    """What of a variant differs from the baseline: empty for the baseline itself, whatever it is called."""
    return {name: value for name, value in change.items() if BASELINE.get(name) != value}


def folder_name(change: dict[str, str], extra: list[str], steps: int, seed: int) -> str:
    """baseline-steps-1500-seed-0, rho-min-0.3-steps-1500-seed-0, ... Identical flags are one run."""
    words = (as_flags(differing(change)) or ["baseline"]) + extra + ["steps", str(steps), "seed", str(seed)]
    return "-".join(word.lstrip("-").replace("/", "_") for word in words)


def until_all_in(lines: list[dict], groups: int) -> tuple[int | None, int]:
    """After how many steps the last of the curriculum's groups came (None: it did not), and how many came. Plateaus are
    noticed at log lines, so a stage that a line is the first to show began at the line before."""
    came = (before["step"] for before, line in zip([{"step": 0}, *lines], lines) if line["stage"] == groups - 1)
    return next(came, None), lines[-1]["stage"] + 1


def forgetting(lines: list[dict], group: int, groups: int) -> float | None:
    """Training loss of a noise group in the last quarter of the curriculum, over that in the second: above 1 what was
    learned first is being forgotten. None if the curriculum has fewer than eight log lines, or draws it too rarely."""
    values = np.array([line["loss_by_group"][group] for line in lines if line["stage"] < groups - 1], dtype=float)
    quarter = len(values) // 4
    early, late = values[quarter:2 * quarter], values[len(values) - quarter:]
    if quarter < 2 or np.isnan(early).all() or np.isnan(late).all():
        return None
    return float(np.nanmean(late) / np.nanmean(early))


# ----------------------------------------------------------------------------------------------------
# Verdicts


def figure(mean: float, half: float | None) -> str:
    return f"{100 * mean:+.2f} %" + ("" if half is None else f" ± {100 * half:.2f}")


def verdict(mean: float, half: float | None, sign: int, limit: float = 0.0) -> str:
    """Does the paper's claim appear, that a difference lies above (sign +1) or below (-1) `limit`?"""
    excess = sign * (mean - limit)
    if half is None:
        return f"{'as' if excess > 0 else 'not as'} the paper says, in one seed, which cannot be told from chance"
    if abs(excess) <= half:
        return "undecided: within the spread of the seeds"
    beyond = ", beyond the spread of the seeds" if half else ""
    return ("appears" if excess > 0 else "does not appear: the opposite") + beyond


def judge(results: dict) -> list[dict]:
    """[{ablation, paper, here, verdict}] for what was trained."""
    said = []

    def say(ablation, paper, what, ours, theirs, key, sign, limit=0.0):
        """Compares variants `ours` and `theirs`. key: a measure, or the number of a noise group."""
        a, b = ([row["loss_by_group"][key] if isinstance(key, int) else row[key] for row in results[ablation][name]]
                for name in (ours, theirs))
        if None in a + b:
            said.append(dict(ablation=ablation, paper=paper, here=f"{what}: not known", verdict="run more steps"))
            return
        mean, half = plot.relative_change(a, b)
        found = verdict(mean, 0.0 if key == "flops" else half, sign, limit)  # multiply-adds need no second seed
        said.append(dict(ablation=ablation, paper=paper, here=f"{what}: {figure(mean, half)}", difference=mean,
                         interval=half, verdict=found))

    def against(ablation, names, reference, group):
        rows = results[ablation]
        of = lambda name: [row["loss_by_group"][group] for row in rows[name]]
        return ", ".join(f"{name} {figure(*plot.relative_change(of(name), of(reference)))}" for name in names)

    if "rho-min" in results:
        say("rho-min", "below 0.4 a gap remains on the noisiest group (Figure 10)",
            f"loss at t {GROUP_NAMES[NOISIEST]}, 0.3 against 0.4", "0.3", "0.4", NOISIEST, +1)
        said[-1]["here"] += f"; against static: {against('rho-min', ('0.3', '0.4', '0.5', '0.6'), 'static', NOISIEST)}"
    if "profile" in results:
        say("profile", "logistic is better than linear (FID, Figure 11)", "loss, linear against logistic", "linear",
            "logistic", "loss", +1)
    if "warm-start" in results:
        say("warm-start", "it keeps the last channels from underfitting (C.1.3, without a figure)",
            f"loss at t {GROUP_NAMES[CLEANEST]}, without against with", "0", "0.1", CLEANEST, +1)
    if "curriculum" in results:
        say("curriculum", f"harmless: FID within {HARMLESS:.0%} (Table 5)", "loss, on against off", "on", "off",
            "loss", -1, HARMLESS)
        say("curriculum", "cheaper (5 to 12 % with all presets, section 3)", "multiply-adds, on against off", "on",
            "off", "flops", -1)
    if "alpha" in results:
        rows, slow = results["alpha"], ("0.05", "0.01", "0.005")
        length = lambda row: (row["until_all_in"] or float("inf"), -row["groups_in"])  # fewer groups in: it is longer
        pairs = [(length(row), length(fast)) for name in slow for row, fast in zip(rows[name], rows["0.1"])]
        longer, shorter = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        said.append(dict(ablation="alpha", paper="at 0.05 and below the curriculum is longer than at 0.1 (Figure 13)",
                         here=f"longer in {longer} and shorter in {shorter} of {len(pairs)} pairs of runs",
                         verdict="run more --alpha-steps" if not longer + shorter else "appears" if longer == len(pairs)
                         else "appears in part" if longer > shorter else "does not appear"))
    if "sampling" in results:
        say("sampling", "uniform sampling forgets the groups that came first (Figures 14, 16)",
            f"training loss at t {GROUP_NAMES[NOISIEST]}, last over second quarter of the curriculum, uniform against "
            "progressive", "uniform", "progressive", "forgetting", +1)
        ratios = {name: [row["forgetting"] for row in results["sampling"][name]] for name in ("progressive", "uniform")}
        if None not in ratios["progressive"] + ratios["uniform"]:
            said[-1]["here"] += "".join(f"; {name} {np.mean(r):.2f}" for name, r in ratios.items()) + " (1: standstill)"
        say("sampling", "progressive sampling makes the whole better (C.3.3)", "loss, uniform against progressive",
            "uniform", "progressive", "loss", +1)
    if "restart" in results:
        say("restart", "boost and reset help the groups that come last (Figure 17)",
            f"loss at t {GROUP_NAMES[CLEANEST]}, without against with", "off", "on", CLEANEST, +1)
        gaps = against("restart", ("on", "off"), "no curriculum", CLEANEST)
        said[-1]["here"] += f"; against no curriculum: {gaps}"
    return said


# ----------------------------------------------------------------------------------------------------
# Figures


def curve(lines: list[dict], group: int, points: int = 40) -> tuple[list[float], list[float]]:
    """Training loss of a noise group: (steps, means over `points` stretches of equally many log lines)."""
    values = np.array([line["loss_by_group"][group] for line in lines], dtype=float)
    parts = np.array_split(np.arange(len(lines)), min(points, len(lines)))
    return ([lines[part[-1]]["step"] for part in parts],
            [np.nanmean(values[part]) if np.isfinite(values[part]).any() else None for part in parts])


def draw(results: dict, path: Path) -> None:
    """Held-out losses against the baseline, and the first seed's training curves as the paper plots them."""
    charts, rows = [], {}
    losses = lambda runs: np.array([[run["loss"], *run["loss_by_group"]] for run in runs])
    for ablation, variants in results.items():
        if ablation != "alpha":  # its runs have other settings, and may have another length
            baseline, *others = sorted(variants, key=lambda name: len(differing(ABLATIONS[ablation][name])))
            for name in others:
                change = plot.relative_change(losses(variants[name]), losses(variants[baseline]))[0]
                rows.setdefault(variants[name][0]["run"], (f"{ablation} {name}", 100 * change))
    if rows:
        names, values = zip(*rows.values())
        charts.append(plot.heat_map(values, names, ["all t", *GROUP_NAMES], "Held-out loss against the baseline, %",
                                    "%", "timesteps t", spec="+.1f"))
    for ablation, group, title in (("rho-min", NOISIEST, "Smallest rank, and the noisiest group"),
                                   ("sampling", NOISIEST, "Sampling, and the group that comes first"),
                                   ("restart", CLEANEST, "Restart, and the group that comes last")):
        if ablation in results:
            curves = {name: curve(runs[0]["lines"], group) for name, runs in results[ablation].items()}
            charts.append(plot.line_chart(curves, title, "steps", f"training loss, t {GROUP_NAMES[group]}", log_y=True))
    if "alpha" in results:
        stages = {name: [(line["step"], line["stage"] + 1) for line in runs[0]["lines"]]
                  for name, runs in results["alpha"].items()}
        charts.append(plot.line_chart({f"alpha {name}": tuple(zip(*points)) for name, points in stages.items()},
                                      "How fast the curriculum goes", "steps", "groups that are in"))
    plot.save(path, *charts)


def report(results: dict, n_groups: int) -> None:
    """Prints a row for each variant: means over the seeds, with their standard deviation."""
    def cell(values, spec):
        if None in values:
            return None
        return format(np.mean(values), spec) + (f" ± {np.std(values, ddof=1):{spec}}" if len(values) > 1 else "")

    table = []
    for ablation, variants in results.items():
        for name, runs in variants.items():
            row = {"ablation": ablation, "variant": name, "loss": cell([run["loss"] for run in runs], ".5f")}
            row |= {f"t {group}": cell([run["loss_by_group"][i] for run in runs], ".3g")
                    for i, group in enumerate(GROUP_NAMES)}
            row["multiply-adds, T"] = cell([run["flops"] / 1e12 for run in runs], ".4g")
            row["all groups in after"] = ", ".join(
                "-" if not run["curriculum"] else f"{run['until_all_in']:,}" if run["until_all_in"] is not None
                else f"> {run['lines'][-1]['step']:,} ({run['groups_in']} of {n_groups} in)" for run in runs)
            table.append(row)
    plot.print_table(table, dict.fromkeys(table[0], ""))


# ----------------------------------------------------------------------------------------------------
# The script


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--only", default=",".join(ABLATIONS), metavar="NAME,NAME", help="which ablations (default: all)")
    add_image_flags(parser)
    add("--model", choices=PRESETS, default="tiny", metavar="NAME", help="tiny, DiT-S/2, ... (default tiny)")
    add("--method", choices=("iso-compute", "iso-param"), default="iso-compute", help="(default iso-compute)")
    add("--steps", type=positive_int, default=1500, metavar="N", help="of each run (default 1500)")
    add("--alpha-steps", type=positive_int, metavar="N", help="of the runs of `alpha`: ten groups with a patience of "
        "200 steps need 1,800 at least (default four times --steps)")
    add("--batch-size", type=positive_int, default=64, metavar="N", help="images per step (default 64)")
    add("--seeds", type=positive_int, default=1, metavar="N", help="train everything with seeds 0 to N-1; from two on, "
        "differences are told from chance, if barely: take three (default 1)")
    add("--per-group", type=positive_int, default=2000, metavar="N", help="held-out samples in each noise group "
        "(default 2000)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    add("--out", type=Path, default=Path("runs/ablations"), metavar="DIR", help="run folders, results.json, figure.png "
        "(default runs/ablations)")
    args, extra = parser.parse_known_args()
    chosen = list(dict.fromkeys(args.only.split(",")))
    if unknown := [name for name in chosen if name not in ABLATIONS]:
        raise InputError(f"--only {unknown[0]!r} is not an ablation; use {', '.join(ABLATIONS)}, separated by commas")
    varied = {"seed", *BASELINE}.union(*(change for variants in ABLATIONS.values() for change in variants.values()))
    if clash := [word for word in extra if word.split("=")[0].removeprefix("--") in varied]:
        raise InputError(f"{clash[0]} is set by this script; leave it out, or change BASELINE and ABLATIONS in it")
    settle_image_flags(args)
    device = pick_device(args.device)
    held_out = load_held_out(args, 5000)
    common = {"dataset": args.dataset, "data-dir": args.data_dir, "model": args.model, "method": args.method,
              "batch-size": str(args.batch_size), "sample-every": "0", "device": args.device}
    common |= {"image-size": str(args.image_size)} if args.image_size else {}

    planned = [(ablation, name, seed) for seed in range(args.seeds) for ablation in chosen
               for name in ABLATIONS[ablation]]
    results, done = {ablation: {name: [] for name in ABLATIONS[ablation]} for ablation in chosen}, {}
    for i, (ablation, name, seed) in enumerate(planned):
        change = ABLATIONS[ablation][name]
        steps = args.steps if ablation != "alpha" else args.alpha_steps or 4 * args.steps
        folder = args.out / folder_name(change, extra, steps, seed)
        if folder not in done:
            print(f"\n{i + 1} of {len(planned)}: {ablation} {name}, seed {seed}", flush=True)
            flags = as_flags(common | {"steps": str(steps), "seed": str(seed)} | BASELINE | change) + extra
            run = done[folder] = train.train_and_measure(folder, flags, held_out, args.per_group, device)
            groups = max(1, int((BASELINE | change)["curriculum-groups"]))
            run["until_all_in"], run["groups_in"] = until_all_in(run["lines"], groups)
            run["forgetting"] = forgetting(run["lines"], NOISIEST, groups)
            run["run"], run["curriculum"] = folder.name, groups > 1
        results[ablation][name].append(done[folder])

    print()
    report(results, int(BASELINE["curriculum-groups"]))
    said = judge(results)
    for row in said:
        print(f"\n{row['ablation']}. The paper: {row['paper']}.\n  Here: {row['here']}.\n  {row['verdict'][0].upper()}"
              f"{row['verdict'][1:]}.")
    print(f"\n{args.steps:,} steps, {args.seeds} seed(s); ± in the table: standard deviation over the seeds, in the "
          "sentences: 95 % interval of the differences, paired by seed. The paper: 800,000 steps, judged by FID.")
    without_lines = {ablation: {name: [{key: value for key, value in run.items() if key != "lines"} for run in runs]
                                for name, runs in variants.items()} for ablation, variants in results.items()}
    settings = vars(args) | {"out": str(args.out), "train": extra}
    plot.write_json(args.out / "results.json", dict(settings=settings, baseline=BASELINE, groups=GROUP_NAMES,
                                                    ablations=without_lines, verdicts=said))
    draw(results, args.out / "figure.png")
    print(f"wrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


if __name__ == "__main__":
    run_script(main)
