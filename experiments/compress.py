"""Train full rank, truncate, distil: better than low rank from the start, and what does it cost?

    python experiments/compress.py                               CIFAR-10 at 16x16, model tiny: 20 minutes
    python experiments/compress.py --dataset data/cifar/train --test data/cifar/test --steps 4000
    python experiments/compress.py --teacher runs/001-cifar10-DiT-S-2-full --test cifar10
    python experiments/compress.py --model DiT-S/2 --image-size 32 --steps 800000 --batch-size 128 --compile

NA-LR appendix E.2, Tables 6 and 7. The post-hoc pipeline (ELR-diffusion) has three parts: a full-rank teacher is
trained; the singular value decomposition of its layers is cut to the ranks of the static method; the low-rank
student is tuned to give the same output as the teacher at the same x_t. Beside it stand the two presets of NA-LR,
trained from the start: iso-compute has the student's sampling cost, iso-param its parameters. Measured is the loss
of eps on held-out images, the same images, timesteps and noise for all, against all the multiply-adds that were
spent on the way.

The student's folder serves sample.py as any run does: python sample.py --run OUT/s0/student. A stopped call goes
on where it was. Flags that are not listed here go to train.py, for teacher and NA-LR runs, such as --predict eps.
"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import common
import flops
import plot
import train
from common import GROUP_NAMES
from lowrank import factorise
from model import Config, DiT, linear_layers, parameter_count
from sample import load_model
from schedule import T, add_noise
from script import (InputError, Parser, pick_device, pick_dtype, positive_int, run_script, sha256_of, to_device,
                    write_then_rename)

MODELS = ("full", "truncated", "student", "iso-compute", "iso-param")  # of the table

# ----------------------------------------------------------------------------------------------------
# The student


@torch.no_grad()
def truncate(teacher: DiT, keep: float) -> DiT:
    """The static low-rank model whose layers are the teacher's, their singular values cut off at its ranks."""
    config = replace(teacher.config, method="static", keep=keep)
    cut = copy.deepcopy(teacher)
    factorise(cut, {layer.name: layer.rank for layer in linear_layers(config) if layer.rank is not None})
    student = DiT(config, initialise=False).to(teacher.position.device)
    student.load_state_dict(cut.state_dict())
    return student


def tuning_cost(student: Config, teacher: Config, batch_size: int) -> int:
    """Multiply-adds of one distillation step: the student forward and backward, the teacher forward."""
    forward, _ = flops.one_image(teacher, T)  # every t costs the same
    return flops.train_step(student, [T] * batch_size, penalty=False) + batch_size * forward


def distillation_loss(student: DiT, teacher: DiT, batch: train.Batch, dtype: torch.dtype) -> torch.Tensor:
    """The squared difference of what both models answer to the same x_t, mean over pixels: float32 (B,)."""
    device = batch.x_0.device
    signal, noise = (to_device(a, device) for a in student.noise_schedule.coefficients(batch.t))
    x_t, t = add_noise(batch.x_0, batch.eps, signal, noise), to_device(batch.t, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            wanted = teacher(x_t, t, batch.y)
        output = student(x_t, t, batch.y)
    return (output.float() - wanted.float()).square().mean((1, 2, 3))


def distil(teacher: DiT, folder: Path, flags: list[str], origin: str) -> DiT:
    """Tunes the truncated teacher by the settings in `flags`, those of train.py for a static model, and gives the
    EMA of its weights. Goes on where it was stopped. origin: the SHA-256 of the teacher's file, which must then be
    the same."""
    s = train.read_command_line(flags)[1]
    made_of, known = json.dumps(origin).encode(), folder / "distilled.json"
    if known.exists() and known.read_bytes() != made_of:
        raise InputError(f"{folder} holds a student of another teacher; choose another --out")
    common.check_settings(folder, flags)
    run = common.open_run(folder, flags)
    write_then_rename(known, lambda file: file.write(made_of))
    state, dtype = run.state, pick_dtype(s.dtype, run.processes.device)
    if state.step == 0:
        weights = truncate(teacher, state.model.config.keep).state_dict()
        state.model.load_state_dict(weights)
        state.ema.load_state_dict(weights)

    def take_step(batch: train.Batch) -> torch.Tensor:
        losses = distillation_loss(state.model, teacher, batch, dtype)  # (B,)
        losses.mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.spent += tuning_cost(state.model.config, teacher.config, s.batch_size)
        return losses.detach()

    train.run_steps(run, take_step)
    return state.ema


# ----------------------------------------------------------------------------------------------------
# Table, words, picture


def print_words(rows: dict, seeds: int, adaptive_steps: int) -> list[dict]:
    """The paper's trends of E.2 in our figures; returns the comparisons."""
    print()
    spread = "one seed each: a hint, no more" if seeds == 1 else f"{seeds} seeds each"
    lost, won = (rows[name]["loss"] / rows["full"]["loss"] - 1 for name in ("truncated", "student"))
    print(f"Loss against full rank: {lost:+.1%} of the truncated teacher, {won:+.1%} of the distilled student.")
    found = []
    for name, equal in (("iso-compute", "sampling cost"), ("iso-param", "parameters")):
        ours, theirs = rows["student"], rows[name]
        lower = sum(a < b for a, b in zip(ours["losses"], theirs["losses"]))
        cost, sampling, difference = (ours[key] / theirs[key] - 1 for key in ("training", "sampling", "loss"))
        which = "appears here" if lower == seeds else "is reversed here" if lower == 0 else "is not clear here"
        found.append({"against": name, "loss": difference, "training": cost, "sampling": sampling,
                      "lower_in": lower, "seeds": seeds})
        print(f"Against {name} (equal {equal}): the student's loss is {difference:+.1%}, lower in {lower} of "
              f"{seeds} ({spread}),\n  for {cost:+.1%} multiply-adds in training and {sampling:+.1%} in sampling. "
              "The paper's trend, better for much\n  more training, "
              f"{which if cost > 0.1 else 'is not tested by these costs'}.")
    match = adaptive_steps * rows["student"]["training"] / rows["iso-compute"]["training"]
    print(f"For the student's training cost iso-compute could have had {match:,.0f} steps (--adaptive-steps).")
    return found


def draw(path: Path, rows: dict) -> None:
    groups, full = list(range(1, 6)), rows["full"]["loss_by_group"]
    relative = {name: (groups, [a / b for a, b in zip(row["loss_by_group"], full)])
                for name, row in rows.items()}  # full rank, too: a model keeps its colour in both charts
    cost = {name: ([row["training"]], [row["loss"]], [row["loss_sd"] or 0]) for name, row in rows.items()}
    x = ", ".join(f"{i}: t {name}" for i, name in enumerate(GROUP_NAMES, 1))
    plot.save(path, plot.line_chart(cost, "held-out loss against training", "multiply-adds in training", "loss"),
              plot.line_chart(relative, "held-out loss per noise group", x, "loss / full rank's", log_y=True))


def report(rows: dict, args, predict: str) -> None:
    """Tables, words, results.json and figure.png."""
    print()
    plot.print_table([{"model": row["model"], "params, M": row["parameters"] / 1e6, "loss": row["loss"],
                       "100 DDIM steps": flops.amount(row["sampling"]), "sd": row["loss_sd"],
                       "training": flops.amount(round(row["training"])),
                       **dict(zip(GROUP_NAMES, row["loss_by_group"]))} for row in rows.values()],
                     {"model": "", "params, M": ".2f", "100 DDIM steps": "", "training": "", "loss": ".5f",
                      "sd": ".5f"} | dict.fromkeys(GROUP_NAMES, ".4g"))
    print(f"truncated: the teacher before distillation; student: after {args.tune_steps:,} steps of it\n"
          + common.about_losses(predict))
    comparisons = print_words(rows, args.seeds, args.adaptive_steps)
    print("The paper's costs, its Table 7, beside the ones that follow from shapes: python flops.py --paper")
    plot.write_json(args.out / "results.json", dict(settings=vars(args), groups=GROUP_NAMES, predict=predict,
                                                    rows=list(rows.values()), comparisons=comparisons))
    draw(args.out / "figure.png", rows)
    print(f"\nwrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


# ----------------------------------------------------------------------------------------------------
# The script


def read_command_line():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    common.add_run_flags(parser, "runs/compress")
    add("--keep", type=float, default=0.5, metavar="P", help="share of the parameters that the student keeps "
        "(default 0.5)")
    add("--steps", type=positive_int, metavar="N", help="training steps of the teacher (default 2000; the paper: "
        "800000)")
    add("--tune-steps", type=positive_int, metavar="N", help="of distillation (default: a quarter of --steps, as "
        "in the paper)")
    add("--adaptive-steps", type=positive_int, metavar="N", help="training steps of iso-compute and iso-param "
        "(default: --steps)")
    add("--tune-lr", type=float, metavar="F", help="highest learning rate of distillation (default: half that of "
        "training)")
    add("--teacher", type=Path, metavar="RUN", help="a finished full-rank run of train.py; the flags that say "
        "what and how long to train then default to its own (default: train one)")
    common.add_repeat_flags(parser, per_group=1000)
    parser.set_defaults(dataset=None, model=None, batch_size=None)  # so that --teacher can say
    args = common.parse_flags(parser, ("--method",))
    defaults = dict(dataset="cifar10", image_size=None, model="tiny", steps=2000, batch_size=64)
    if args.teacher:
        if args.seeds > 1:
            raise InputError("--teacher is one run; leave --seeds out")
        if not (args.teacher / "config.json").exists():
            raise InputError(f"--teacher {args.teacher} has no config.json; give the folder of a run of train.py")
        config, s = train.read_config(args.teacher)
        defaults = dict(dataset=s.dataset, image_size=config.image_size, model=s.model, steps=s.steps,
                        batch_size=s.batch_size)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.tune_steps = args.tune_steps or max(1, args.steps // 4)
    args.adaptive_steps = args.adaptive_steps or args.steps
    if not 0 < args.keep <= 1 or (args.tune_lr is not None and not 0 < args.tune_lr < 1):
        raise InputError("--tune-lr must lie between 0 and 1, --keep in (0, 1]")
    common.settle_image_flags(args)
    return args


def main():
    args = read_command_line()
    device = pick_device(args.device)
    steps = {"full": args.steps, "student": args.tune_steps, "iso-compute": args.adaptive_steps,
             "iso-param": args.adaptive_steps}
    folders = [{name: args.out / f"s{seed}" / name for name in steps} for seed in range(args.seeds)]
    if args.teacher:
        folders[0]["full"] = args.teacher

    def flags_of(method: str, seed: int) -> list[str]:
        return common.run_flags(args, method=method, keep=args.keep, seed=seed, steps=steps[method])

    # everything that can be wrong is checked before anything is trained
    test = common.load_held_out(args, 10_000)
    settings, config = common.read_run_flags(flags_of("full", 0), test)
    tuning = dict(method="static", steps=args.tune_steps, lr=args.tune_lr or settings.lr / 2, curriculum_groups=0,
                  orthogonality=0, weighting="none", timesteps="uniform")

    def tuning_flags(seed: int) -> list[str]:
        return flags_of("full", seed) + common.as_flags(tuning)  # of a flag given twice the last one counts

    for seed, of_seed in enumerate(folders):
        for name, folder in of_seed.items():
            if folder == args.teacher:
                common.check_settings(folder, flags_of(name, seed), ["steps"])
            else:
                common.check_settings(folder, tuning_flags(seed) if name == "student" else flags_of(name, seed))
    if args.teacher:
        theirs = load_model(args.teacher, device)[0].config
        if theirs != replace(config, keep=theirs.keep, mean=theirs.mean, std=theirs.std):
            raise InputError(f"{args.teacher} is no full-rank model of these flags (it is {theirs.method}, "
                             f"predicts {theirs.predict}, for {theirs.num_classes} classes of "
                             f"{theirs.image_size}x{theirs.image_size} images); give its flags")

    results = {name: [] for name in MODELS}  # of every seed: (model, loss, loss by group, training multiply-adds)
    for seed, of_seed in enumerate(folders):
        for method in ("full", "iso-compute", "iso-param"):
            if of_seed[method] != args.teacher:
                print(f"\n{of_seed[method]}", flush=True)
                train.main(["--resume", "--out", str(of_seed[method]), *flags_of(method, seed)])
        print(f"\n{of_seed['student']}", flush=True)
        models = {name: load_model(of_seed[name], device)[0] for name in ("full", "iso-compute", "iso-param")}
        models["truncated"] = truncate(models["full"], args.keep)
        models["student"] = distil(models["full"], of_seed["student"], tuning_flags(seed),
                                   sha256_of(of_seed["full"] / "model.pt"))
        spent = {name: common.spent(folder) for name, folder in of_seed.items()}
        spent["truncated"] = spent["full"]
        spent["student"] += spent["full"]
        for name in MODELS:
            results[name].append((models[name], *common.held_out_loss(models[name], test, args.per_group),
                                  spent[name]))

    rows = {}
    for name, found in results.items():
        models, losses, by_group, spent = zip(*found)
        shape = models[0].config
        rows[name] = {"model": name, "parameters": parameter_count(shape), "sampling": flops.sampling(shape),
                      "training": float(np.mean(spent)), "loss": float(np.mean(losses)), "losses": list(losses),
                      "loss_sd": float(np.std(losses, ddof=1)) if args.seeds > 1 else None,
                      "loss_by_group": np.mean(by_group, 0).tolist()}
    report(rows, args, config.predict)


if __name__ == "__main__":
    run_script(main)
