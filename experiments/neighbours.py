"""Where along t should the effort go? Races the answers of other methods at equal multiply-adds.

    python experiments/neighbours.py --dataset shapes            about 25 minutes on two CPU cores, no download
    python experiments/neighbours.py --method iso-compute,full --seeds 3 --only erd,curriculum
    python experiments/neighbours.py --model DiT-S/2 --image-size 32 --steps 800000 --batch-size 128    a GPU

NA-LR spends *rank* where noise is low; others weight the loss or draw some timesteps more often, and NA-LR's
curriculum and slices of the batch save multiply-adds that can be spent on more steps. The contestants:

    plain               t uniform, loss unweighted, ranks masked: its --steps steps are everyone's budget
    erd, min-snr, p2    loss weights along t (schedule.py), each with mean 1
    speed-weight        SpeeD's weight alone
    speed               SpeeD as published: its weight, and its distribution of t
    stratified          every batch spread evenly over all t
    curriculum          the paper's (NA-LR 2.2, C.3): cheap steps first, so more of them
    slices              stratified, and each sixth of the batch computes only the channels that it needs: the same
                        gradients for less, so more steps (needs a rank schedule)

Each is compared with plain, slices with stratified: one thing changes at a time. How many steps a contestant may
take follows from shapes alone (flops.training_run); what it really spent stands beside it. All are judged by the
unweighted loss of eps on held-out images. That is not neutral: a weight that gives up some timesteps for others
moves the mean whatever it does for the pictures. With --classifier (made by experiments/classifier.py) samples are
judged as well. Flags that are not listed here go to train.py, such as --predict eps.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classifier
import common
import curves
import flops
import plot
from common import GROUP_EDGES, GROUP_NAMES
from model import METHODS, Config
from sample import save_npz
from schedule import T
from script import Parser, flag, pick_device, positive_int, run_script, sha256_of
from train import Settings

# ----------------------------------------------------------------------------------------------------
# Settings

PLAIN = dict(slices=1, curriculum_groups=0, weighting="none", timesteps="uniform")
CONTESTANTS = {
    "plain": {},
    "erd": dict(weighting="erd"),
    "min-snr": dict(weighting="min-snr"),
    "p2": dict(weighting="p2"),
    "speed-weight": dict(weighting="speed"),
    "speed": dict(weighting="speed", timesteps="speed"),
    "stratified": dict(timesteps="stratified"),
    "curriculum": dict(curriculum_groups=10, curriculum_share=0.4),
    "slices": dict(timesteps="stratified", slices=6),
}
REFERENCE = dict.fromkeys(CONTESTANTS, "plain") | {"slices": "stratified"}

# ----------------------------------------------------------------------------------------------------
# Equal multiply-adds


def expected_cost(s: Settings, config: Config, steps: int) -> int:
    """Multiply-adds of a run of `steps` steps, if no plateau shortens its curriculum."""
    stages = flops.longest_curriculum(steps, s.curriculum_groups, s.curriculum_share, config.noise)
    return flops.training_run(config, steps, s.batch_size, stages, s.orthogonality > 0, s.slices)


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
# The result


def in_words(method: str, name: str, runs: list[dict], others: list[dict]) -> str:
    """How a contestant differs from its reference, and whether that can be told from chance."""
    mean, half = common.loss_changes(runs, others)
    said = []
    for i, label in enumerate(["in all", *(f"t {group}" for group in GROUP_NAMES)]):
        said.append(f"{label} {100 * mean[i]:+.1f} %")
        if half is not None:
            beyond = "beyond" if abs(mean[i]) > half[i] else "within"
            said[-1] += f" ± {100 * half[i]:.1f} ({beyond} the spread)"
    return (f"{method}, {name} ({runs[0]['steps']:,} steps) against {REFERENCE[name]} ({others[0]['steps']:,}): "
            f"{said[0]}; {', '.join(said[1:])}")


def curve(lines: list[dict], points: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Training loss over multiply-adds. Groups (of the cosine schedule) count as under uniform t, whatever the
    contestant drew; missing while a group is not drawn."""
    steps, losses = zip(*curves.loss_curves(lines, points))  # a row for each group
    spent = np.interp(steps[0], *([0, *(line[key] for line in lines)] for key in ("step", "flops")))
    return spent, np.diff(GROUP_EDGES) / T @ np.array(losses, dtype=float)


def report(results: dict, predict: str, out: Path) -> list[str]:
    """Prints the table and draws the figure; gives the result in words."""
    table, charts, words = [], [], []
    for method, race in results.items():
        for name, runs in race.items():
            row = {"method": method, "contestant": name, "steps": runs[0]["steps"],
                   "expected, T": runs[0]["expected"] / 1e12,
                   "spent, T": common.mean_and_sd([run["flops"] / 1e12 for run in runs], ".5g")}
            row["loss"] = common.mean_and_sd([run["loss"] for run in runs], ".5f")
            for i, group in enumerate(GROUP_NAMES):
                row[f"t {group}"] = common.mean_and_sd([run["loss_by_group"][i] for run in runs], ".3g")
            row["recognised"] = common.mean_and_sd([run["recognised"] for run in runs], ".1%")
            table.append(row)
        others = [name for name in race if name != "plain"]
        if others:
            changes = [100 * common.loss_changes(race[name], race[REFERENCE[name]])[0] for name in others]
            charts.append(plot.heat_map(changes, [f"{name} / {REFERENCE[name]}" for name in others],
                                        ["all t", *GROUP_NAMES], f"{method}: change of held-out loss", "%",
                                        "timesteps t", spec="+.1f"))
        words += [in_words(method, name, race[name], race[REFERENCE[name]]) for name in others]
        lines = {name: curve(curves.read_log(out / runs[0]["run"])) for name, runs in race.items()}
        charts.append(plot.line_chart(lines, f"{method}: training loss", "multiply-adds", "loss, t uniform",
                                      log_y=True))
        best = min(race, key=lambda name: np.mean([run["loss"] for run in race[name]]))
        words.append(f"{method}: the lowest held-out loss in all has {best}")
        if runs[0]["recognised"] is not None:
            best = max(race, key=lambda name: np.mean([run["recognised"] for run in race[name]]))
            words[-1] += f"; most samples are recognised of {best}"
    print()
    plot.print_table(table, {key: {"steps": ",d", "expected, T": ".5g"}.get(key, "") for key in table[0]})
    one_seed = len(runs) == 1
    print("\nHeld-out loss at equal multiply-adds "
          f"({'one seed: nothing of it can be told from chance' if one_seed else '± 95 % interval over seeds'})")
    print(*[f"  {line}" for line in words], sep="\n")
    print(common.about_losses(predict))
    print("A weight changes which timesteps a model cares for, so the unweighted mean is not a neutral judge of "
          "it;\nsamples are (--classifier FILE).")
    plot.save(out / "figure.png", *charts)
    return words


# ----------------------------------------------------------------------------------------------------
# The script


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--only", default=",".join(CONTESTANTS), metavar="NAME,NAME", help="which ones, beside what they are "
        "compared with (default: all)")
    add("--method", default="iso-compute", metavar="NAME,NAME", help=f"of {', '.join(METHODS)}; each has its own "
        "race and budget (default iso-compute)")
    common.add_run_flags(parser, "runs/neighbours")
    add("--steps", type=positive_int, default=1500, metavar="N", help="of the plain run (default 1500)")
    common.add_repeat_flags(parser)
    add("--classifier", type=Path, metavar="FILE", help="of experiments/classifier.py: also tell how many samples "
        "it recognises")
    common.add_sample_flags(parser, num=500, guidance=2.0, steps=100)
    args = common.parse_flags(parser, [flag(name) for change in (PLAIN, *CONTESTANTS.values()) for name in change])
    common.check_sample_flags(args)
    methods = common.choose("--method", args.method, METHODS)
    chosen = common.choose("--only", args.only, CONTESTANTS)
    chosen = {"plain", *chosen, *(REFERENCE[name] for name in chosen)}
    common.settle_image_flags(args)
    device = pick_device(args.device)
    held_out = common.load_held_out(args, 5000)
    judge = classifier.Judge(args.classifier, held_out, device) if args.classifier and args.num else None
    depends = {name: getattr(args, name) for name in ("test", "per_group", "num", "guidance", "sampling_steps")}
    depends["classifier"] = sha256_of(args.classifier) if judge else None

    def flags_of(method: str, name: str, **settings) -> list[str]:
        return common.run_flags(args, method=method, **PLAIN | CONTESTANTS[name], **settings)

    def measure(model, folder: Path) -> dict:
        result = common.losses_and_cost(model, folder, held_out, args.per_group) | dict(recognised=None)
        if judge:
            classes = len(held_out.classes)
            samples = common.draw_samples(model, classes, args.num, args.sampling_steps, args.guidance)
            save_npz(folder / "samples.npz", *samples)
            result["recognised"] = judge(*samples)["recognised"]
        return result

    plan = {}  # method -> contestant -> (steps, expected multiply-adds)
    for method in methods:
        plan[method] = {}
        for name in (name for name in CONTESTANTS if name in chosen):
            s, config = common.read_run_flags(flags_of(method, name), held_out)
            if name == "slices" and config.rank_schedule() is None:
                continue  # all samples need all channels
            cost = lambda steps: expected_cost(s, config, steps)
            if name == "plain":
                budget = cost(args.steps)
            steps = steps_for(budget, cost)
            plan[method][name] = steps, cost(steps)

    results = {method: {name: [] for name in race} for method, race in plan.items()}
    for seed in range(args.seeds):
        for method, race in plan.items():
            for name, (steps, expected) in race.items():
                print(f"\n{method}, {name}, seed {seed}: {steps:,} steps", flush=True)
                words = [method, name, *args.train_flags, "steps", str(steps), "seed", str(seed)]
                folder = args.out / "-".join(word.lstrip("-").replace("/", "_") for word in words)
                flags = flags_of(method, name, steps=steps, seed=seed)
                run = common.train_and_measure(folder, flags, depends, device, measure)
                results[method][name].append(run | dict(run=folder.name, steps=steps, expected=expected))

    words = report(results, config.predict, args.out)
    plot.write_json(args.out / "results.json", dict(settings=vars(args), groups=GROUP_NAMES, methods=results,
                                                    words=words))
    print(f"wrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


if __name__ == "__main__":
    run_script(main)
