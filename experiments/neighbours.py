"""Where along t should the effort go? Races the answers of other methods at equal multiply-adds.

    python experiments/neighbours.py --dataset shapes            ERD's race: 7 contestants, 3 targets; about an hour
    python experiments/neighbours.py --dataset shapes --seeds 3 --best 3     then seeds 1 and 2 of the best three
    python experiments/neighbours.py --only curriculum,slices --predicts v --method iso-compute
    python experiments/neighbours.py --model DiT-S/2 --image-size 32 --steps 800000 --batch-size 128    a GPU

NA-LR spends *rank* where noise is low; others weight the loss or draw some timesteps more often (ERD 4.3, Fig. 6,
compares weights), and NA-LR's curriculum and slices of the batch save multiply-adds that buy more steps:

    plain               t uniform, loss unweighted, ranks masked: its --steps steps are everyone's budget
    erd, min-snr, p2    loss weights along t (schedule.py), each with mean 1
    speed               SpeeD: its weight, and its distribution of t
    log-normal, clts    distributions of t (curriculum.py): the middle; from uniform to the cleaner third
    speed-weight        SpeeD's weight alone
    stratified          every batch spread evenly over all t
    curriculum          the paper's (NA-LR 2.2, C.3): cheap steps first, so more of them
    slices              stratified, and each sixth of the batch computes only the channels that it needs: the same
                        gradients for less, so more steps (not with --method full or static)

Each is compared with plain of the same target, slices with stratified: one thing changes at a time. How many steps a
contestant may take follows from shapes alone (flops.training_run); what it really spent stands beside it.

Judged by samples, at each guidance: the Frechet distance to held-out images in the features of
experiments/classifier.py (not an FID), and the share recognised as their class. And by the unweighted loss of eps on
held-out images, which is no neutral judge: a weight that gives up some timesteps for others moves the mean whatever
it does for the pictures, and an x_0 model pays SNR times its error, 24,000 of it at t = 1. So compare losses within
a target, and targets by samples. Finished runs are found again by the same command, also with more --seeds, --only or
--predicts. Flags that are not listed here go to train.py, such as --method or --noise.
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classifier
import common
import curves
import flops
import plot
from common import GROUP_NAMES
from data import Dataset
from model import Config, DiT
from sample import save_npz
from schedule import PREDICTIONS, T
from script import InputError, Parser, flag, pick_device, positive_int, run_script, sha256_of
from train import Settings, loss_groups

# ----------------------------------------------------------------------------------------------------
# Settings

PLAIN = dict(slices=1, curriculum_groups=0, weighting="none", timesteps="uniform")
CONTESTANTS = {
    "plain": {},
    "erd": dict(weighting="erd"),
    "min-snr": dict(weighting="min-snr"),
    "p2": dict(weighting="p2"),
    "speed": dict(weighting="speed", timesteps="speed"),
    "log-normal": dict(timesteps="log-normal"),
    "clts": dict(timesteps="clts"),
    "speed-weight": dict(weighting="speed"),
    "stratified": dict(timesteps="stratified"),
    "curriculum": dict(curriculum_groups=10, curriculum_share=0.4),
    "slices": dict(timesteps="stratified", slices=6),
}
ERDS_RACE = "plain,erd,min-snr,p2,speed,log-normal,clts"
REFERENCE = dict.fromkeys(CONTESTANTS, "plain") | {"slices": "stratified"}

# ----------------------------------------------------------------------------------------------------
# Equal multiply-adds


def expected_cost(s: Settings, config: Config, steps: int) -> int:
    """Multiply-adds of a run of `steps` steps, if no plateau shortens its curriculum."""
    stages = flops.longest_curriculum(steps, s.curriculum_groups, s.curriculum_share, config.noise)
    return flops.training_run(config, steps, s.batch_size, stages, s.orthogonality > 0, s.slices, s.distil > 0)


def steps_for(budget: int, cost) -> int:
    """The number of steps whose cost(steps), which grows with them, is closest to the budget."""
    high = 1
    while cost(high) < budget:
        high *= 2
    low = high // 2  # cost(low) < budget <= cost(high)
    while high - low > 1:
        middle = (low + high) // 2
        if cost(middle) < budget:
            low = middle
        else:
            high = middle
    return low if low and budget - cost(low) < cost(high) - budget else high


# ----------------------------------------------------------------------------------------------------
# The race: results[target][contestant] is a list of runs, one for each seed


def measure_run(model: DiT, folder: Path, held_out: Dataset, judge: classifier.Judge | None, args) -> dict:
    """Everything that the tables say of one finished run."""
    result = common.losses_and_cost(model, folder, held_out, args.per_group)
    for w in args.guidances if judge else ():
        samples = common.draw_samples(model, len(held_out.classes), args.num, args.sampling_steps, w)
        save_npz(folder / f"samples-w{w:g}.npz", *samples)
        for name, value in judge(*samples).items():
            result[f"{name}, w {w:g}"] = value
    return result


def best_cells(results: dict, count: int, measure: str) -> list[tuple[str, str]]:
    """The `count` cells (target, contestant) whose first run is best by a measure of which less is better, and what
    they are compared with. plain comes along as well, and is not counted."""
    cells = [(predict, name) for predict, race in results.items() for name in race]
    cells.sort(key=lambda cell: results[cell[0]][cell[1]][0][measure])
    best = [cell for cell in cells if cell[1] != "plain"][:count]
    wanted = {*best, *((predict, REFERENCE[name]) for predict, name in best), *((p, "plain") for p, _ in best)}
    return [(predict, name) for predict, race in results.items() for name in race if (predict, name) in wanted]


# ----------------------------------------------------------------------------------------------------
# The result


def paired(race: dict, name: str, measure: str) -> tuple[list[float], list[float]]:
    """A measure of a contestant's runs and of its reference's, seed by seed, as far as both have them."""
    pairs = zip(race[name], race[REFERENCE[name]])
    return tuple(zip(*((ours[measure], theirs[measure]) for ours, theirs in pairs)))


def in_words(predict: str, name: str, race: dict, measures: list[str]) -> str:
    """How a contestant differs from its reference, and whether that can be told from chance."""
    said = []
    for measure in measures:
        mean, half = common.relative_change(*paired(race, name, measure))
        said.append(f"{measure} {100 * mean:+.1f} %")
        if half is not None:
            beyond = "beyond" if abs(mean) > half else "within"
            said[-1] += f" ± {100 * half:.1f} ({beyond} the spread)"
    steps = [race[which][0]["steps"] for which in (name, REFERENCE[name])]
    return f"{predict}, {name} ({steps[0]:,} steps) against {REFERENCE[name]} ({steps[1]:,}): {'; '.join(said)}"


def curve(lines: list[dict], noise: str, points: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Training loss over multiply-adds. The groups, those of the run's noise schedule, count as under uniform t,
    whatever the contestant drew; missing while a group is not drawn."""
    steps, losses = zip(*curves.loss_curves(lines, points))  # a row for each group
    spent = np.interp(steps[0], *([0, *(line[key] for line in lines)] for key in ("step", "flops")))
    return spent, np.diff([*loss_groups(noise), T + 1]) / T @ np.array(losses, dtype=float)


def print_tables(results: dict, measures: list[str]) -> None:
    table, by_group = [], []
    for predict, race in results.items():
        for name, runs in race.items():
            first = {"target": predict, "contestant": name}
            row = first | {"n": len(runs), "steps": runs[0]["steps"], "expected, T": runs[0]["expected"] / 1e12,
                           "spent, T": common.mean_and_sd([run["flops"] / 1e12 for run in runs], ".5g")}
            table.append(row | common.shown(runs, measures))
            losses = zip(GROUP_NAMES, zip(*(run["loss_by_group"] for run in runs)))
            by_group.append(first | {f"t {group}": common.mean_and_sd(values, ".3g") for group, values in losses})
    print()
    plot.print_table(table, {key: {"steps": ",d", "expected, T": ".5g"}.get(key, "") for key in table[0]})
    print("\nHeld-out loss of eps at timesteps t")
    plot.print_table(by_group, dict.fromkeys(by_group[0], ""))
    print("±: standard deviation over seeds")


def draw(results: dict, measures: list[str], noise: str, out: Path) -> None:
    """figure.png: a heat map of every measure of samples, then the losses of each target."""
    charts, names = [], list(next(iter(results.values())))
    for key in measures[1:]:
        scale, spec = (100, ".0f") if key.startswith("recognised") else (1, ".2f")
        means = [[scale * np.mean([run[key] for run in race[name]]) for race in results.values()] for name in names]
        label = "% recognised" if scale == 100 else "Frechet distance"
        charts.append(plot.heat_map(means, names, list(results), f"{key}: mean over seeds", label, "what is predicted",
                                    spec=spec))
    for predict, race in results.items():
        others = [name for name in race if name != "plain"]
        if others:
            changes = [[100 * common.relative_change(*paired(race, name, key))[0] for key in ("loss", "loss_by_group")]
                       for name in others]
            changes = [[in_all, *by_group] for in_all, by_group in changes]
            charts.append(plot.heat_map(changes, [f"{name} / {REFERENCE[name]}" for name in others],
                                        ["all t", *GROUP_NAMES], f"{predict}: change of held-out loss", "%",
                                        "timesteps t", spec="+.1f"))
        lines = {name: curve(curves.read_log(out / runs[0]["run"]), noise) for name, runs in race.items()}
        charts.append(plot.line_chart(lines, f"{predict}: training loss", "multiply-adds", "loss of eps, t uniform",
                                      log_y=True))
    plot.save(out / "figure.png", *charts)


def conclusions(results: dict, measures: list[str]) -> list[str]:
    """Each contestant against its reference, then who is best by what."""
    relative = [key for key in measures if not key.startswith("recognised")]
    words = [in_words(predict, name, race, relative)
             for predict, race in results.items() for name in race if name != "plain"]
    for key in measures[1:]:
        sign, spec = (-1, ".1%") if key.startswith("recognised") else (1, ".2f")  # more is better, or less
        means = {(predict, name): np.mean([run[key] for run in runs])
                 for predict, race in results.items() for name, runs in race.items()}
        ranking = sorted(means, key=lambda cell: sign * means[cell])[:4]
        words.append(f"best by {key}: " + ", ".join(f"{predict} {name} {means[predict, name]:{spec}}"
                                                    for predict, name in ranking))
    for predict, race in results.items():
        best = min(race, key=lambda name: np.mean([run["loss"] for run in race[name]]))
        words.append(f"{predict}: the lowest held-out loss in all has {best}")
    return words


# ----------------------------------------------------------------------------------------------------
# The script


def read_command_line() -> Namespace:
    """Flags, their lists read and checked; args.train_flags are train.py's. Raises InputError."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--only", default=ERDS_RACE, metavar="NAME,...", help="which ones, beside what they are compared with "
        f"(default {ERDS_RACE})")
    add("--predicts", default=",".join(PREDICTIONS), metavar="NAME,...", help="what the models predict (default "
        f"{','.join(PREDICTIONS)})")
    common.add_run_flags(parser, "runs/neighbours")
    add("--steps", type=positive_int, default=1500, metavar="N", help="of the plain run (default 1500)")
    common.add_repeat_flags(parser)
    add("--best", type=positive_int, metavar="N", help="seeds from 1 on for these many alone, the best by their first "
        "run, and what they are compared with: a choice that flatters their first run (default: all)")
    common.add_judge_flags(parser, num=1000)
    args = common.parse_flags(parser, [flag("predict"), *(flag(name) for change in (PLAIN, *CONTESTANTS.values())
                                                          for name in change)])
    common.settle_judge_flags(args)
    args.predicts = common.choose("--predicts", args.predicts, PREDICTIONS)
    if args.best and (args.seeds == 1 or not args.num):
        raise InputError("--best N repeats the N best by their samples: it needs --seeds of at least 2, and --num")
    only = common.choose("--only", args.only, CONTESTANTS)
    args.only = [name for name in CONTESTANTS if name in {"plain", *only, *(REFERENCE[name] for name in only)}]
    common.settle_image_flags(args)
    return args


def main():
    args = read_command_line()
    device = pick_device(args.device)
    held_out = common.load_held_out(args, 5000)

    def flags_of(name: str, predict: str, **settings) -> list[str]:
        return common.run_flags(args, predict=predict, **PLAIN | CONTESTANTS[name], **settings)

    plan = {}  # contestant -> (steps, expected multiply-adds), whatever is predicted
    for name in args.only:
        s, config = common.read_run_flags(flags_of(name, "v"), held_out)
        if name == "slices" and config.method in ("full", "static"):
            print(f"note: slices are left out: with --method {config.method} all samples need all channels")
            continue
        cost = lambda steps: expected_cost(s, config, steps)
        if name == "plain":
            budget = cost(args.steps)
        steps = steps_for(budget, cost)
        plan[name] = steps, cost(steps)

    judge = classifier.trained_judge(args, held_out, device) if args.num else None
    depends = {name: getattr(args, name) for name in ("test", "per_group", "num", "guidances", "sampling_steps")}
    depends["classifier"] = sha256_of(args.classifier) if judge else None
    measures = ["loss", *(f"{name}, w {w:g}" for w in args.guidances if judge for name in ("frechet", "recognised"))]

    results = {predict: {name: [] for name in plan} for predict in args.predicts}
    cells = [(predict, name) for predict in results for name in plan]
    for seed in range(args.seeds):
        if seed == 1 and args.best:
            cells = best_cells(results, args.best, measures[-2])
        for number, (predict, name) in enumerate(cells, 1):
            steps, expected = plan[name]
            print(f"\n{predict}, {name}, seed {seed}: {steps:,} steps; number {number} of {len(cells)}", flush=True)
            words = [predict, name, *args.train_flags, "steps", str(steps), "seed", str(seed)]
            folder = args.out / "-".join(word.lstrip("-").replace("/", "_") for word in words)
            run = common.train_and_measure(folder, flags_of(name, predict, steps=steps, seed=seed), depends, device,
                                           lambda model, folder: measure_run(model, folder, held_out, judge, args))
            results[predict][name].append(run | dict(run=folder.name, steps=steps, expected=expected))

    words = conclusions(results, measures)
    print_tables(results, measures)
    one_seed = "" if args.seeds > 1 else " (one seed: nothing of it can be told from chance)"
    print(f"\nAt equal multiply-adds; ± 95 % interval over seeds{one_seed}", *words, sep="\n  ")
    print("A weight changes which timesteps a model cares for, so the unweighted mean loss is no neutral judge of it.")
    draw(results, measures, config.noise, args.out)
    plot.write_json(args.out / "results.json", dict(settings=vars(args), groups=GROUP_NAMES, targets=results,
                                                    words=words))
    print(f"wrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


if __name__ == "__main__":
    run_script(main)
