"""Which of NA-LR's choices matter? Changes them one at a time and trains each variant for equally many steps.

    python experiments/ablations.py --dataset shapes                 about an hour on two CPU cores, no download
    python experiments/ablations.py --only profile,restart --seeds 3
    python experiments/ablations.py --model DiT-S/2 --image-size 32 --steps 800000 --batch-size 128     the paper's

NA-LR appendix C (Figures 10, 11, 13 to 17) and E.1 (Table 5). The paper judges two of them by FID (profile,
curriculum), the others by training losses, by iterations or not at all; here it is the loss of eps on held-out
images, in all and per noise group, beside the multiply-adds of the training. Variants:

    rho-min      0.3 to 0.6, and `static`, the model that is not noise-adaptive (iso-compute keeps the average
                 cost: the smaller rho_min, the larger r_max)
    profile      logistic or linear Phi(t)
    warm-start   all channels for t <= 100, or not
    curriculum   on or off
    alpha        factor of the loss's EMA: how long the curriculum takes if no share of the steps limits it
    sampling     progressive uniform sampling, or plainly uniform within the groups that are in
    restart      learning-rate boost and optimiser reset with each group, or not

Every run is a folder under --out, named by its flags; the baseline serves all comparisons. The same command goes
on where it was stopped. Flags that are not listed here go to train.py, such as --predict eps.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import common
import curves
import plot
from common import GROUP_NAMES
from script import Parser, flag, pick_device, positive_int, run_script

# ----------------------------------------------------------------------------------------------------
# Settings

# The paper's choices, as settings of train.py; a variant changes some of them.
BASELINE = dict(rho_min=0.4, rank_profile="logistic", warm_start=0.1, curriculum_groups=10, curriculum_share=0.4,
                curriculum_alpha=0.05, curriculum_sampling="progressive")
NO_CURRICULUM = dict(curriculum_groups=0)
ABLATIONS = {
    "rho-min": {str(rho): dict(rho_min=rho) for rho in (0.3, 0.4, 0.5, 0.6)} | {"static": dict(method="static")},
    "profile": {"logistic": {}, "linear": dict(rank_profile="linear")},
    "warm-start": {"0.1": {}, "0": dict(warm_start=0)},
    "curriculum": {"on": {}, "off": NO_CURRICULUM},
    "alpha": {str(alpha): dict(curriculum_share=1, curriculum_alpha=alpha) for alpha in (0.1, 0.05, 0.01, 0.005)},
    "sampling": {"progressive": {}, "uniform": dict(curriculum_sampling="uniform"),
                 "no curriculum": NO_CURRICULUM},
    "restart": {"on": {}, "off": dict(restart=False), "no curriculum": NO_CURRICULUM},
}
CLEANEST, NOISIEST = 0, 4
CLEANEST_LOSS, NOISIEST_LOSS = (f"loss at t {GROUP_NAMES[group]}" for group in (CLEANEST, NOISIEST))


class Claim(NamedTuple):
    """Of the paper: the variant `ours` has more (sign +1) or less (-1) of a measure than `theirs`."""
    ablation: str
    paper: str
    measure: str
    key: str | int  # of a run's result, or the number of a noise group
    ours: str
    theirs: str
    sign: int
    limit: float = 0.0  # more or less than this relative difference
    beside: tuple = ()  # further variants to tell of, the last one being what the others are compared with


CLAIMS = (
    Claim("rho-min", "below 0.4 a gap remains on the noisiest group (Figure 10)", NOISIEST_LOSS, NOISIEST,
          "0.3", "0.4", +1, beside=("0.3", "0.4", "0.5", "0.6", "static")),
    Claim("profile", "logistic is better than linear (FID, Figure 11)", "loss", "loss", "linear", "logistic", +1),
    Claim("warm-start", "it keeps the last channels from underfitting (C.1.3, without a figure)", CLEANEST_LOSS,
          CLEANEST, "0", "0.1", +1),
    Claim("curriculum", "harmless: FID changes by -0.9 to +0.8 % (Table 5)", "loss", "loss", "on", "off", -1,
          limit=0.01),
    Claim("curriculum", "cheaper (5 to 12 % with all presets, section 3)", "multiply-adds", "flops", "on", "off",
          -1),
    Claim("sampling", "uniform sampling forgets the groups that came first (Figures 14, 16)",
          f"training {NOISIEST_LOSS}, last over second quarter of the curriculum", "forgetting", "uniform",
          "progressive", +1),
    Claim("sampling", "progressive sampling makes the whole better (C.3.3)", "loss", "loss", "uniform",
          "progressive", +1),
    Claim("restart", "boost and reset help the groups that come last (Figure 17)", CLEANEST_LOSS, CLEANEST, "off",
          "on", +1, beside=("on", "off", "no curriculum")),
)

# ----------------------------------------------------------------------------------------------------
# One run


def differing(change: dict) -> dict:
    """What of a variant differs from the baseline: empty for the baseline itself, whatever it is called."""
    return {name: value for name, value in change.items() if BASELINE.get(name) != value}


def folder_name(change: dict, method: str, train_flags: list[str], steps: int, seed: int) -> str:
    """baseline-steps-1500-seed-0, rho-min-0.3-steps-1500-seed-0, ... Identical flags are one run."""
    words = common.as_flags(differing(change)) or ["baseline"]
    words += [] if method == "iso-compute" else [method]
    words += train_flags + common.as_flags(dict(steps=steps, seed=seed))
    return "-".join(word.lstrip("-").replace("/", "_") for word in words)


def until_all_in(lines: list[dict], groups: int) -> tuple[int | None, int]:
    """After how many steps the last of the curriculum's groups came (None: it did not), and how many came. Counted to
    the log line before: there plateaus are noticed; what the share of the steps brings comes up to a line later."""
    came = (before["step"] for before, line in zip([{"step": 0}, *lines], lines) if line["stage"] == groups - 1)
    return next(came, None), lines[-1]["stage"] + 1


def forgetting(lines: list[dict], group: int, groups: int) -> float | None:
    """Training loss of a noise group in the last quarter of the curriculum, over that in the second: above 1 what
    was learned first is being forgotten. None if the curriculum has fewer than eight log lines, or draws the group
    too rarely."""
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


def values(runs: list[dict], key: str | int) -> list[float]:
    return [run["loss_by_group"][key] if isinstance(key, int) else run[key] for run in runs]


def judge(results: dict) -> list[dict]:
    """[{ablation, paper, here, verdict}] for what was trained."""
    said = []
    for claim in (claim for claim in CLAIMS if claim.ablation in results):
        row = dict(ablation=claim.ablation, paper=claim.paper)
        here = f"{claim.measure}, {claim.ours} against {claim.theirs}: "
        of = {name: values(runs, claim.key) for name, runs in results[claim.ablation].items()}
        ours, theirs = of[claim.ours], of[claim.theirs]
        if None in ours + theirs:
            said.append(row | dict(here=here + "not known", verdict="run more steps"))
            continue
        mean, half = common.relative_change(ours, theirs)
        here += figure(mean, half)
        if claim.key == "forgetting":
            here += f"; {claim.ours} {np.mean(ours):.2f}, {claim.theirs} {np.mean(theirs):.2f} (1: standstill)"
        if claim.beside:
            *names, reference = claim.beside
            changes = (f"{name} {figure(*common.relative_change(of[name], of[reference]))}" for name in names)
            here += f"; against {reference}: {', '.join(changes)}"
        spread = 0.0 if claim.key == "flops" else half  # multiply-adds need no second seed
        said.append(row | dict(here=here, difference=mean, interval=half,
                               verdict=verdict(mean, spread, claim.sign, claim.limit)))
    return said + ([judge_alpha(results["alpha"])] if "alpha" in results else [])


def judge_alpha(runs: dict) -> dict:
    def length(run):
        return run["until_all_in"] or float("inf"), -run["groups_in"]  # fewer groups in: it is longer

    fast, *slow = runs.values()
    pairs = [(length(a), length(b)) for variant in slow for a, b in zip(variant, fast)]
    longer, shorter = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    found = "appears" if longer == len(pairs) else "appears in part" if longer > shorter else "does not appear"
    return dict(ablation="alpha", paper="at 0.05 and below the curriculum is longer than at 0.1 (Figure 13)",
                here=f"longer in {longer} and shorter in {shorter} of {len(pairs)} pairs of runs",
                verdict=found if longer + shorter else "run more --alpha-steps")


# ----------------------------------------------------------------------------------------------------
# Table and figure


def report(results: dict) -> None:
    """Prints a row for each variant: means over the seeds, with their standard deviation."""
    table = []
    for ablation, variants in results.items():
        for name, runs in variants.items():
            row = {"ablation": ablation, "variant": name, "loss": common.mean_and_sd(values(runs, "loss"), ".5f")}
            for i, group in enumerate(GROUP_NAMES):
                row[f"t {group}"] = common.mean_and_sd(values(runs, i), ".3g")
            row["multiply-adds, T"] = common.mean_and_sd([run["flops"] / 1e12 for run in runs], ".4g")
            row["all groups in after"] = ", ".join(
                "-" if run["groups"] == 1 else f"{run['until_all_in']:,}" if run["until_all_in"] is not None
                else f"> {run['steps']:,} ({run['groups_in']} of {run['groups']} in)" for run in runs)
            table.append(row)
    plot.print_table(table, dict.fromkeys(table[0], ""))


def draw(results: dict, out: Path) -> None:
    """Held-out losses against the baseline, and the first seed's training curves as the paper plots them."""
    charts, rows = [], {}
    logs = {ablation: {name: curves.read_log(out / runs[0]["run"]) for name, runs in variants.items()}
            for ablation, variants in results.items()}
    for ablation, variants in results.items():
        if ablation != "alpha":  # its runs have other settings, and may have another length
            baseline, *others = sorted(variants, key=lambda name: len(differing(ABLATIONS[ablation][name])))
            for name in others:
                change, _ = common.loss_changes(variants[name], variants[baseline])
                rows.setdefault(variants[name][0]["run"], (f"{ablation} {name}", 100 * change))
    if rows:
        names, changes = zip(*rows.values())
        charts.append(plot.heat_map(changes, names, ["all t", *GROUP_NAMES], "Held-out loss against the baseline",
                                    "%", "timesteps t", spec="+.1f"))
    for ablation, group, title in (("rho-min", NOISIEST, "Smallest rank, and the noisiest group"),
                                   ("sampling", NOISIEST, "Sampling, and the group that comes first"),
                                   ("restart", CLEANEST, "Restart, and the group that comes last")):
        if ablation in results:
            losses = {name: curves.loss_curves(lines, points=40)[group] for name, lines in logs[ablation].items()}
            label = f"training loss, t {GROUP_NAMES[group]}"
            charts.append(plot.line_chart(losses, title, "steps", label, log_y=True))
    if "alpha" in results:
        stages = {f"alpha {name}": ([line["step"] for line in lines], [line["stage"] + 1 for line in lines])
                  for name, lines in logs["alpha"].items()}
        charts.append(plot.line_chart(stages, "How fast the curriculum goes", "steps", "groups that are in"))
    plot.save(out / "figure.png", *charts)


# ----------------------------------------------------------------------------------------------------
# The script


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--only", default=",".join(ABLATIONS), metavar="NAME,NAME", help="which ablations (default: all)")
    common.add_run_flags(parser, "runs/ablations")
    add("--method", choices=("iso-compute", "iso-param"), default="iso-compute", help="(default iso-compute)")
    add("--steps", type=positive_int, default=1500, metavar="N", help="of each run (default 1500)")
    add("--alpha-steps", type=positive_int, metavar="N", help="of the runs of `alpha`: ten groups with a patience "
        "of 200 steps need 1,800 at least (default four times --steps)")
    common.add_repeat_flags(parser)
    args = common.parse_flags(parser, [*map(flag, BASELINE), "--restart", "--no-restart", "--noise"])
    chosen = common.choose("--only", args.only, ABLATIONS)
    common.settle_image_flags(args)
    device = pick_device(args.device)
    held_out = common.load_held_out(args, 5000)

    def flags_of(change: dict, steps: int, seed: int) -> list[str]:
        return common.run_flags(args, **dict(method=args.method, steps=steps, seed=seed) | BASELINE | change)

    def measure(model, folder: Path) -> dict:
        return common.losses_and_cost(model, folder, held_out, args.per_group)

    _, config = common.read_run_flags(flags_of({}, args.steps, 0), held_out)
    planned = [(ablation, name, seed) for seed in range(args.seeds) for ablation in chosen
               for name in ABLATIONS[ablation]]
    results, done = {ablation: {name: [] for name in ABLATIONS[ablation]} for ablation in chosen}, {}
    for number, (ablation, name, seed) in enumerate(planned, 1):
        change = ABLATIONS[ablation][name]
        steps = args.steps if ablation != "alpha" else args.alpha_steps or 4 * args.steps
        folder = args.out / folder_name(change, args.method, args.train_flags, steps, seed)
        if folder not in done:
            print(f"\n{number} of {len(planned)}: {ablation} {name}, seed {seed}", flush=True)
            run = common.train_and_measure(folder, flags_of(change, steps, seed),
                                    dict(test=args.test, per_group=args.per_group), device, measure)
            lines, groups = curves.read_log(folder), max(1, (BASELINE | change)["curriculum_groups"])
            run |= dict(run=folder.name, steps=steps, groups=groups)
            run["forgetting"] = forgetting(lines, NOISIEST, groups)
            run["until_all_in"], run["groups_in"] = until_all_in(lines, groups)
            done[folder] = run
        results[ablation][name].append(done[folder])

    print()
    report(results)
    said = judge(results)
    for row in said:
        sentence = row["verdict"][0].upper() + row["verdict"][1:]
        print(f"\n{row['ablation']}. The paper: {row['paper']}.\n  Here: {row['here']}.\n  {sentence}.")
    print(f"\n{common.about_losses(config.predict)}\n{args.steps:,} steps, {args.seeds} seed(s); ± in the table: "
          "standard deviation over the seeds, in\nthe sentences: 95 % interval of differences, paired by seed.")
    plot.write_json(args.out / "results.json", dict(settings=vars(args), baseline=BASELINE, groups=GROUP_NAMES,
                                                    ablations=results, verdicts=said))
    draw(results, args.out)
    print(f"wrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


if __name__ == "__main__":
    run_script(main)
