"""Where along t should the effort go? Races the answers of other methods at equal multiply-adds.

    python experiments/neighbours.py --dataset shapes            about 25 minutes on two CPU cores, no download
    python experiments/neighbours.py --method iso-compute,full --seeds 3 --only plain,erd,curriculum
    python experiments/neighbours.py --model DiT-S/2 --image-size 32 --steps 800000 --batch-size 128    a GPU

NA-LR spends *rank* where noise is low; others weight the loss or draw some timesteps more often, and NA-LR's curriculum
saves multiply-adds that can be spent on more steps. The contestants:

    plain               t uniform, loss unweighted, ranks masked: its --steps steps are everyone's budget
    erd, min-snr, p2    loss weights along t (schedule.py), each with mean 1
    speed-weight        SpeeD's weight alone
    speed               SpeeD as published: its weight, and its distribution of t
    stratified          every batch spread evenly over all t
    curriculum          the paper's (NA-LR 2.2, C.3): cheap steps first, so more of them
    sorted              plain and stratified, but each sample multiplies by its own ranks only (needs a rank schedule)

How many steps a contestant may take follows from shapes alone (flops.training_run); what it really spent stands beside
it. All are judged by the unweighted denoising loss on held-out images. That is not neutral: a weight that gives up some
timesteps for others moves the mean whatever it does for the pictures. With --classifier (made by
experiments/classifier.py) the samples are judged as well. Flags that are not listed here go to train.py.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import flops
import plot
import train
from classifier import load_classifier, predict
from data import (InputError, Parser, add_image_flags, load_held_out, pick_device, positive_int, run_script,
                  settle_image_flags)
from model import METHODS, PRESETS, config_from_flags
from sample import draw_images, load_model
from schedule import T
from train import GROUP_NAMES

# ----------------------------------------------------------------------------------------------------
# Settings

PLAIN = ["--rank-execution", "mask", "--curriculum-groups", "0", "--weighting", "none", "--timesteps", "uniform"]
CONTESTANTS = {  # flags of train.py; of a flag that is there twice the last one counts
    "plain": PLAIN,
    "erd": [*PLAIN, "--weighting", "erd"],
    "min-snr": [*PLAIN, "--weighting", "min-snr"],
    "p2": [*PLAIN, "--weighting", "p2"],
    "speed-weight": [*PLAIN, "--weighting", "speed"],
    "speed": [*PLAIN, "--weighting", "speed", "--timesteps", "speed"],
    "stratified": [*PLAIN, "--timesteps", "stratified"],
    "curriculum": [*PLAIN, "--curriculum-groups", "10", "--curriculum-share", "0.4"],
    "sorted": [*PLAIN, "--rank-execution", "sorted", "--timesteps", "stratified"],
}

# ----------------------------------------------------------------------------------------------------
# Equal multiply-adds


def expected_cost(flags: list[str], image_size: int, classes: int, steps: int) -> int:
    """Multiply-adds of train.py with these flags, for `steps` steps, if no plateau shortens the curriculum."""
    parser, args = train.parse_arguments(flags)
    s = train.choose_settings({name: value for name, value in vars(args).items() if value is not None})
    train.check_settings(s)
    try:
        config = config_from_flags(args, s["model"], image_size=image_size, num_classes=classes)
    except ValueError as error:
        parser.error(str(error))
    stages = flops.longest_curriculum(steps, s["curriculum_groups"], s["curriculum_share"])
    return flops.training_run(config, steps, s["batch_size"], stages, s["orthogonality"] > 0,
                              execution=s["rank_execution"])


def steps_for(budget: int, cost) -> int:
    """The number of steps whose cost(steps), which grows with them, is closest to the budget."""
    high = 1
    while cost(high) < budget:
        high *= 2
    low = high // 2  # cost(low) < budget <= cost(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < budget else (low, middle)
    return low if low and budget - cost(low) < cost(high) - budget else high


# ----------------------------------------------------------------------------------------------------
# One run


def recognised(folder: Path, judge, num: int, seed: int, device) -> float:
    """The share of `num` samples of a run that the classifier takes for the class they were asked to be."""
    model, state = load_model(folder, device)
    right = 0
    for first in range(0, num, 250):
        images, labels = draw_images(model, range(first, min(first + 250, num)), list(range(len(state["classes"]))),
                                     seed, guidance=state["guidance"])
        right += (predict(judge, lambda i, j: images[i:j], len(images), device) == labels).sum().item()
    return right / num


# ----------------------------------------------------------------------------------------------------
# The result


def losses(runs: list[dict]) -> np.ndarray:
    """(seeds, 6): held-out loss in all, then in each group"""
    return np.array([[run["loss"], *run["loss_by_group"]] for run in runs])


def in_words(name: str, runs: list[dict], plain: list[dict]) -> str:
    """How a contestant differs from `plain`, and whether that can be told from chance."""
    mean, half = plot.relative_change(losses(runs), losses(plain))
    said, names = [], ["in all", *(f"t {group}" for group in GROUP_NAMES)]
    for label, value, spread in zip(names, mean, [None] * 6 if half is None else half):
        sure = "" if spread is None else " (beyond the spread)" if abs(value) > spread else " (within the spread)"
        said.append(f"{label} {100 * value:+.1f} %" + ("" if spread is None else f" ± {100 * spread:.1f}{sure}"))
    return f"{name}: {said[0]}; {', '.join(said[1:])}"


def curve(lines: list[dict], points: int = 30) -> tuple[list[float], list[float]]:
    """Training loss over multiply-adds: means over `points` stretches of the log. Groups count as under uniform t,
    whatever the contestant drew; missing while a group is not drawn."""
    share = np.diff(train.GROUP_EDGES) / T
    values = np.array([line["loss_by_group"] for line in lines], dtype=float)  # (lines, 5)
    parts = np.array_split(np.arange(len(lines)), min(points, len(lines)))
    means = [np.nansum(values[part], 0) / np.isfinite(values[part]).sum(0).clip(1e-9) for part in parts]
    seen = [np.isfinite(values[part]).any(0).all() for part in parts]
    return ([lines[part[-1]]["flops"] for part in parts],
            [float(share @ mean) if all_in else None for mean, all_in in zip(means, seen)])


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--only", default=",".join(CONTESTANTS), metavar="NAME,NAME", help="which ones, beside plain (default: all)")
    add("--method", default="iso-compute", metavar="NAME,NAME", help=f"of {', '.join(METHODS)}; each has its own race "
        "and budget (default iso-compute)")
    add_image_flags(parser)
    add("--model", choices=PRESETS, default="tiny", metavar="NAME", help="tiny, DiT-S/2, ... (default tiny)")
    add("--steps", type=positive_int, default=1500, metavar="N", help="of the plain run (default 1500)")
    add("--batch-size", type=positive_int, default=64, metavar="N", help="images per step (default 64)")
    add("--seeds", type=positive_int, default=1, metavar="N", help="race with seeds 0 to N-1; from two on, differences "
        "are told from chance, if barely: take three (default 1)")
    add("--per-group", type=positive_int, default=2000, metavar="N", help="held-out samples in each noise group "
        "(default 2000)")
    add("--classifier", metavar="FILE", help="of experiments/classifier.py: also tell how many samples it recognises")
    add("--num", type=positive_int, default=500, metavar="N", help="samples of each run to recognise (default 500)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    add("--out", type=Path, default=Path("runs/neighbours"), metavar="DIR", help="run folders, results.json, figure.png"
        " (default runs/neighbours)")
    args, extra = parser.parse_known_args()
    methods, chosen = (list(dict.fromkeys(text.split(","))) for text in (args.method, f"plain,{args.only}"))
    for flag, names, allowed in (("--method", methods, METHODS), ("--only", chosen, CONTESTANTS)):
        if unknown := [name for name in names if name not in allowed]:
            raise InputError(f"{flag} {unknown[0]!r} is unknown; use {', '.join(allowed)}, separated by commas")
    varied = {"--seed", *(word for flags in CONTESTANTS.values() for word in flags if word.startswith("--"))}
    if clash := [word for word in extra if word.split("=")[0] in varied]:
        raise InputError(f"{clash[0]} is set by this script; leave it out, or change CONTESTANTS in it")
    settle_image_flags(args)
    device = pick_device(args.device)
    judge, known = load_classifier(args.classifier, device) if args.classifier else (None, None)
    held_out = load_held_out(args, 5000)
    width = held_out.images.shape[-1]
    if known and (known["classes"], known["config"]["image_size"]) != (held_out.classes, width):
        raise InputError(f"{args.classifier} knows other classes or another image size than {held_out.name} at "
                         f"{width}x{width}")
    common = ["--dataset", args.dataset, "--data-dir", args.data_dir, "--model", args.model, "--batch-size",
              str(args.batch_size), "--sample-every", "0", "--device", args.device]
    common += ["--image-size", str(args.image_size)] if args.image_size else []

    # the plan: flags and steps of every contestant
    plan = {}  # method -> contestant -> (flags, steps, expected multiply-adds)
    for method in methods:
        plan[method] = {}
        for name in chosen:
            if name == "sorted" and not method.startswith("iso"):
                continue  # one rank for all t: nothing to sort by
            flags = [*common, "--method", method, *extra, *CONTESTANTS[name]]
            cost = lambda steps: expected_cost(flags, width, len(held_out.classes), steps)
            budget = cost(args.steps) if name == "plain" else budget
            steps = args.steps if name == "plain" else steps_for(budget, cost)
            plan[method][name] = flags, steps, cost(steps)

    results = {method: {name: [] for name in race} for method, race in plan.items()}
    for seed in range(args.seeds):
        for method, race in plan.items():
            for name, (flags, steps, expected) in race.items():
                print(f"\n{method}, {name}, seed {seed}: {steps:,} steps", flush=True)
                folder = args.out / "-".join([method, name, *(word.lstrip("-").replace("/", "_") for word in extra),
                                              "steps", str(steps), "seed", str(seed)])
                flags = [*flags, "--steps", str(steps), "--seed", str(seed)]
                run = train.train_and_measure(folder, flags, held_out, args.per_group, device)
                run |= dict(run=folder.name, steps=steps, expected=expected)
                run["recognised"] = recognised(folder, judge, args.num, seed, device) if judge else None
                results[method][name].append(run)

    print()
    table, charts, words = [], [], []
    spread = lambda values, spec: format(np.mean(values), spec) + (f" ± {np.std(values, ddof=1):{spec}}"
                                                                   if len(values) > 1 else "")
    for method, race in results.items():
        plain = race["plain"]
        for name, runs in race.items():
            row = {"method": method, "contestant": name, "steps": runs[0]["steps"],
                   "expected, T": runs[0]["expected"] / 1e12,
                   "spent, T": spread([run["flops"] / 1e12 for run in runs], ".5g")}
            row |= {label: spread(values, spec) for label, values, spec in
                    zip(["loss", *(f"t {group}" for group in GROUP_NAMES)], losses(runs).T, [".5f", *[".3g"] * 5])}
            row |= {"recognised": spread([run["recognised"] for run in runs], ".1%")} if judge else {}
            table.append(row)
        others = [name for name in race if name != "plain"]
        if others:
            values = [100 * plot.relative_change(losses(race[name]), losses(plain))[0] for name in others]
            title = f"{method}: held-out loss against plain, %"
            charts.append(plot.heat_map(values, others, ["all t", *GROUP_NAMES], title,
                                        "%", "timesteps t", spec="+.1f"))
            words += [f"{method}, {in_words(name, race[name], plain)}" for name in others]
        charts.append(plot.line_chart({name: curve(runs[0]["lines"]) for name, runs in race.items()},
                                      f"{method}: training loss", "multiply-adds", "loss, t uniform", log_y=True))
        best = min(race, key=lambda name: losses(race[name])[:, 0].mean())
        words.append(f"{method}: the lowest held-out loss in all has {best}")
        if judge:
            best = max(race, key=lambda name: np.mean([run["recognised"] for run in race[name]]))
            words[-1] += f"; most samples are recognised of {best}"
    plot.print_table(table, {key: {"steps": ",d", "expected, T": ".5g"}.get(key, "") for key in table[0]})
    certainty = "one seed: nothing of it can be told from chance" if args.seeds == 1 else "± 95 % interval over seeds"
    print(f"\nHeld-out loss against plain at equal multiply-adds ({certainty})")
    print(*[f"  {line}" for line in words], sep="\n")
    print("A weight changes which timesteps a model cares for, so the unweighted mean is not a neutral judge of it; "
          "samples are" + ("." if judge else ": --classifier FILE judges them."))
    rows = {method: {name: [{key: value for key, value in run.items() if key != "lines"} for run in runs]
                     for name, runs in race.items()} for method, race in results.items()}
    settings = vars(args) | {"out": str(args.out), "train": extra}
    plot.write_json(args.out / "results.json", dict(settings=settings, groups=GROUP_NAMES, methods=rows, words=words))
    plot.save(args.out / "figure.png", *charts)
    print(f"wrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


if __name__ == "__main__":
    run_script(main)
