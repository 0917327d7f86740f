"""How good are images after how many passes? DDIM, Heun and DPM-Solver++ on one run.

    python experiments/samplers.py --run runs/NAME --dataset shapes --classifier shapes_clf.pt

Compared at so many passes of the network at most, of which Heun makes nearly two a step; with guidance each of them
computes both halves. Judged by the Frechet distance of the samples to held-out images in the classifier's features
(not an FID), and by the share recognised as their class.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classifier
import common
import flops
import plot
from sample import load_model
from script import DEVICES, InputError, Parser, pick_device, positive_int, run_script

NAMES = ("ddim", "dpm++", "heun")


def steps_for(sampler: str, passes: int) -> int:
    """The most steps with at most so many passes: n, or for Heun, which makes 2 n - 2 of them, half of that."""
    return passes // 2 + 1 if sampler == "heun" and passes > 1 else passes


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="folder of a run")
    common.add_image_flags(parser, "the run's")
    add("--classifier", type=Path, required=True, metavar="FILE", help="of experiments/classifier.py")
    add("--passes", default="5,10,20,50,100", metavar="N,...", help="of the network (default 5,10,20,50,100)")
    add("--guidance", type=float, metavar="W", help="(default: the run's)")
    add("--num", type=positive_int, default=1000, metavar="N", help="samples a figure (default 1000)")
    add("--out", type=Path, metavar="DIR", help="where results go (default RUN/samplers)")
    add("--device", choices=DEVICES, default="auto", help="(default auto)")
    args = parser.parse_args()
    args.out = args.out or args.run / "samplers"
    passes = common.choose_numbers("--passes", args.passes, 1, 1000)
    if args.num < 2 or any(n % 1 for n in passes) or not math.isfinite(args.guidance or 0):
        raise InputError("--num takes at least 2, --passes whole numbers, --guidance a finite one")
    passes = [int(n) for n in passes]
    device = pick_device(args.device)
    model, state = load_model(args.run, device)
    held_out = common.every_second(common.held_out_for(args, {args.run: state}), 1)
    judge = classifier.Judge(args.classifier, held_out, device)
    guidance = state["guidance"] if args.guidance is None else args.guidance

    rows = []
    for n in passes:
        for sampler in NAMES:
            steps = steps_for(sampler, n)
            samples = common.draw_samples(model, len(state["classes"]), args.num, steps, guidance, sampler=sampler)
            cost = flops.sampling(model.config, steps, guidance, sampler=sampler)
            rows.append(dict(passes=n, sampler=sampler, steps=steps, cost=cost, **judge(*samples)))
    print(f"{args.num} samples, guidance {guidance:g}")
    plot.print_table([row | {"cost": flops.amount(row["cost"])} for row in rows],
                     dict(passes="", sampler="", steps="", cost="", frechet=".2f", recognised=".1%"))
    curves = {}
    for sampler in NAMES:
        mine = [row for row in rows if row["sampler"] == sampler]
        curves[sampler] = [row["cost"] for row in mine], [row["frechet"] for row in mine]
    plot.save(args.out / "samplers.png", plot.line_chart(curves, f"{args.num:,} samples, guidance {guidance:g}",
                                                         "multiply-adds of an image", "Frechet distance"))
    plot.write_json(args.out / "results.json", dict(settings=vars(args), guidance=guidance, rows=rows))
    print(f"wrote results.json and samplers.png in {args.out}")


if __name__ == "__main__":
    run_script(main)
