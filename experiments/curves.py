"""Draws what train.py wrote down about a run: loss, active rank, curriculum stage, learning rate.

    python experiments/curves.py                             the newest run under runs/, into RUN/curves.png
    python experiments/curves.py runs/A runs/B --out AB.png  several runs over one another

Losses differ by a factor of 1,000 and more between noise levels, so five groups of timesteps (NA-LR B.1) are
shown apart: one run has them in one chart, several have a chart for each. They are losses of eps whatever a
run predicts, so that runs compare.

A single line of a log is too noisy to be read. The lines are cut into --points stretches of equally many, and
a point of a loss curve is the mean over the lines of a stretch, at the step in its middle. Lines in which no
timestep of a group was drawn do not count for it; a stretch without others is a gap. The other charts show
every line; the active rank is the largest of the stage's timesteps, in the layer with the most channels.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import plot
from schedule import T
from script import InputError, Parser, newest_run, positive_int, run_script
from train import loss_groups

GROUPS = 5  # of timesteps


def group_names(folder: Path) -> list[str]:
    """Of a run's groups of timesteps, which its noise schedule decides."""
    try:
        noise = json.loads((folder / "config.json").read_text())["model"]["noise"]
        starts = loss_groups(noise)
    except (OSError, ValueError, KeyError, TypeError):
        starts = loss_groups("cosine")  # an older run, or a log alone
    return [f"t {first}-{after - 1}" for first, after in zip(starts, [*starts[1:], T + 1])]


# ----------------------------------------------------------------------------------------------------
# From metrics.jsonl to curves. A curve is (steps, values), with None for a value that is missing.


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. Raises InputError if it is missing, empty or damaged."""
    path = folder / "metrics.jsonl"
    try:
        texts = path.read_bytes().split(b"\n")[:-1]  # at the end: nothing, or half a line after a kill
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist; name the folder of a run of train.py") from None
    lines, step = [], 0
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            losses, rank, before, step = line["loss_by_group"], line["active_rank"], step, line["step"]
            fits = type(step) is int and step > before and len(losses) == GROUPS
            fits = fits and all(map(is_number, (step, line["stage"], line["lr"])))
            fits = fits and all(value is None or is_number(value) for value in (rank, *losses))
        except (ValueError, KeyError, TypeError, RecursionError):
            fits = False
        if not fits:
            raise InputError(f"{path} is damaged: line {number} should hold step, stage, lr, active_rank and "
                             f"{GROUPS} losses as train.py writes them; delete it to draw the others")
        lines.append(line)
    if not lines:
        raise InputError(f"{path} has no lines yet; train.py adds one every --log-every steps")
    return lines


def is_number(value) -> bool:
    """Zero or a positive number of a size that can occur: a damaged file may hold any, an axis cannot."""
    return type(value) in (int, float) and (value == 0 or 1e-30 < value < 1e30)


def loss_curves(lines: list[dict], points: int) -> list[tuple[list, list]]:
    """A curve for each group, averaged over at most `points` stretches of the log."""
    ends = [0, *(line["step"] for line in lines)]  # line i is about the steps from ends[i] to ends[i + 1]
    n = min(points, len(lines))
    stretches = [(k * len(lines) // n, (k + 1) * len(lines) // n) for k in range(n)]
    steps = [(ends[a] + ends[b]) / 2 for a, b in stretches]
    curves = []
    for group in range(GROUPS):
        means = []
        for a, b in stretches:
            losses = [line["loss_by_group"][group] for line in lines[a:b]]
            known = [loss for loss in losses if loss is not None]
            means.append(sum(known) / len(known) if known else None)
        curves.append((steps, means))
    return curves


def stairs(lines: list[dict], values: list) -> tuple[list, list]:
    """A curve on which each line's value holds for all the steps that the line is about."""
    steps, doubled, before = [], [], 0
    for line, value in zip(lines, values):
        steps += [before, line["step"]]
        doubled += [value, value]
        before = line["step"]
    return steps, doubled


# ----------------------------------------------------------------------------------------------------
# The picture


def draw(logs: dict[str, list[dict]], losses: dict[str, list], groups: list[str]) -> list:
    """The charts of runs. logs: {name: lines}; losses: {name: `loss_curves` of them}; groups: their names."""
    charts, last_step = [], max(lines[-1]["step"] for lines in logs.values())

    def add(title: str, y_label: str, curves: dict, log_y: bool = False):
        if all(value is None for _, values in curves.values() for value in values):
            return  # as the active rank where all models are of full rank
        if len(curves) == 1:
            curves = {"": curve for curve in curves.values()}  # no legend: there is nothing to tell apart
        # nothing is drawn at the two missing points, but they give all charts the same horizontal axis
        curves = {name: ([0, *steps, last_step], [None, *values, None])
                  for name, (steps, values) in curves.items()}
        charts.append(plot.line_chart(curves, title, "steps", y_label, log_y=log_y))

    if len(losses) == 1:
        for name, curves in losses.items():
            add(f"Loss of {name}", "squared error of eps", dict(zip(groups, curves)), log_y=True)
    else:
        for group, title in enumerate(groups):
            curves = {name: curves[group] for name, curves in losses.items()}
            add(f"Loss at {title}", "squared error of eps", curves, log_y=True)
    add("Active rank", "channels of the largest layer",
        {name: stairs(lines, [line["active_rank"] for line in lines]) for name, lines in logs.items()})
    add("Curriculum stage (no curriculum: 1)", "timestep groups that are in",
        {name: stairs(lines, [line["stage"] + 1 for line in lines]) for name, lines in logs.items()})
    add("Learning rate", "step size of AdamW",
        {name: ([line["step"] for line in lines], [line["lr"] for line in lines])
         for name, lines in logs.items()})
    return charts


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: the newest)")
    parser.add_argument("--out", type=Path, metavar="FILE.png",
                        help="the picture (default: curves.png in the run, or beside the first of several)")
    parser.add_argument("--points", type=positive_int, default=40, metavar="N",
                        help="stretches that losses are averaged over (default 40)")
    args = parser.parse_args()
    folders = list(dict.fromkeys(args.runs)) or [newest_run(file="metrics.jsonl")]
    out = args.out or (folders[0] if len(folders) == 1 else folders[0].parent) / "curves.png"
    if out.suffix != ".png":
        raise InputError(f"--out {out} must name a picture, FILE.png")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    logs = {name: read_log(folder) for name, folder in zip(names, folders)}
    losses = {name: loss_curves(lines, args.points) for name, lines in logs.items()}
    groups = [" or ".join(dict.fromkeys(name)) for name in zip(*map(group_names, folders))]
    plot.save(out, *draw(logs, losses, groups))

    rows = [{"run": name, "steps": logs[name][-1]["step"],
             **{group: means[-1] for group, (_, means) in zip(groups, curves)}}
            for name, curves in losses.items()]
    print("squared error of eps, mean of the last stretch:")
    plot.print_table(rows, {"run": "", "steps": ",d"} | dict.fromkeys(groups, ".3g"))
    print(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
