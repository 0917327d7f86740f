"""Train full rank, truncate, distil: is it better than training low rank from the start, and what does it cost?

    python experiments/compress.py                               CIFAR-10 at 16x16, model tiny: 20 minutes
    python experiments/compress.py --dataset data/cifar/train --test data/cifar/test --steps 4000
    python experiments/compress.py --teacher runs/001-cifar10-DiT-S-2-full --test cifar10
    python experiments/compress.py --model DiT-S/2 --image-size 32 --steps 800000 --batch-size 128 -- --compile

NA-LR appendix E.2, Tables 6 and 7. The post-hoc pipeline (ELR-diffusion) has three parts: a full-rank teacher is
trained; the singular value decomposition of its layers is cut to the ranks of the static method; the low-rank student
is tuned to give the same eps as the teacher at the same x_t. Beside it stand the two presets of NA-LR, trained from the
start: iso-compute has the student's sampling cost, iso-param its parameters. Measured is the denoising loss on held-out
images, the same images, timesteps and noise for all, against all the multiply-adds that were spent on the way.

The student's folder serves sample.py as any run does: python sample.py --run OUT/s0/student. A stopped call goes on
where it was.
"""

import copy
import functools
import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import flops
import plot
import train
from data import (Dataset, InputError, Parser, add_image_flags, batch_indices, end_progress, load, load_held_out,
                  pick_device, positive_int, read_checkpoint, run_script, settle_image_flags, show_progress, to_unit,
                  write_then_rename)
from lowrank import factorise
from model import PRESETS, TRAINING, Config, DiT, config_from_flags, linear_layers, parameter_count
from sample import load_model
from schedule import T, NoiseSchedule, add_noise

DEFAULTS = {"dataset": "cifar10", "image_size": None, "model": "tiny", "steps": 2000, "batch_size": 64}
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


def tuning_step(student: Config, teacher: Config, batch_size: int) -> int:
    """Multiply-adds of one distillation step: the student forward and backward, the teacher forward."""
    return flops.train_step(student, batch_size, penalty=0) + batch_size * flops.forward(teacher)


def draw_batch(dataset: Dataset, step: int, s: dict, none: int, device: torch.device):
    """x_t, t, y of tuning step `step`, as in train.py with t uniform. Every step seeds its own noise, so that a
    resumed run needs no saved generator."""
    g, host = (torch.Generator(d).manual_seed(s["seed"] * 1_000_003 + step) for d in (device, "cpu"))
    t = torch.randint(1, T + 1, (s["batch_size"],), generator=host)
    index = batch_indices(len(dataset.images), step, s["batch_size"], s["seed"], device)
    x_0, y = to_unit(dataset.images[index]), dataset.labels[index]
    if s["flip"]:
        x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1, device=device, generator=g) < 0.5, x_0.flip(3), x_0)
    dropped = torch.rand(len(y), device=device, generator=g) < (s["label_dropout"] if dataset.classes else 2)
    eps = torch.randn(x_0.shape, device=device, generator=g)
    signal, noise = (a.to(device) for a in NoiseSchedule().coefficients(t))
    return add_noise(x_0, eps, signal, noise), t.to(device), torch.where(dropped, none, y)


def distil(teacher: DiT, dataset: Dataset, folder: Path, s: dict, device: torch.device) -> DiT:
    """Tunes the truncated teacher for s["steps"] steps and gives the EMA of its weights; goes on from folder/state.pt.

    s: the settings of train.py (of which steps, batch_size, lr, warmup, ema_decay, label_dropout, flip, dtype,
    guidance, save_every and seed matter), keep, and teacher, the SHA-256 of its file
    """
    student = truncate(teacher, s["keep"]).requires_grad_(True).train()
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=s["lr"], weight_decay=0.0)
    step, per_step = 0, tuning_step(student.config, teacher.config, s["batch_size"])
    if (folder / "state.pt").exists():
        state = read_checkpoint(folder / "state.pt", ("step", "model", "ema", "optimizer", "distillation"))
        if state["distillation"] != s:
            raise InputError(f"{folder} holds a student of another teacher or other settings; choose another --out")
        step = state["step"]
        for name, part in (("model", student), ("ema", ema), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
    folder.mkdir(parents=True, exist_ok=True)
    plot.write_json(folder / "config.json", {"dataset": dataset.name, "n_images": len(dataset.images),
                                             "classes": dataset.classes, "model": asdict(student.config), "train": s})
    train.keep_metrics(folder / "metrics.jsonl", step)
    parameters, ema_parameters = list(student.parameters()), list(ema.parameters())
    losses, clock, dataset = [], time.time(), dataset.to(device)
    bfloat16 = device.type == "cuda" and s["dtype"] != "float32"
    with open(folder / "metrics.jsonl", "a") as metrics:
        while step < s["steps"]:
            lr = train.learning_rate(step, 0, 0, s)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x_t, t, y = draw_batch(dataset, step, s, teacher.config.num_classes, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                with torch.no_grad():
                    wanted = teacher(x_t, t, y)
                loss = F.mse_loss(student(x_t, t, y).float(), wanted.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(ema_parameters, parameters, 1 - min(s["ema_decay"], (1 + step) / (10 + step)))
            losses.append(loss.detach())
            step += 1
            if step % s["save_every"] == 0 or step == s["steps"]:
                mean, now = torch.stack(losses).mean().item(), time.time()
                if not math.isfinite(mean):
                    raise InputError(f"the distillation loss stopped being finite before step {step}; "
                                     f"{folder} keeps its last good state: delete it and try a lower --tune-lr")
                rate = len(losses) * s["batch_size"] / (now - clock)
                line = dict(step=step, loss=mean, lr=lr, images_per_s=rate, flops=step * per_step)
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                show_progress(f"distillation: step {step}/{s['steps']}, loss {mean:.5f}, {rate:.0f} images/s")
                final = dict(config=asdict(student.config), model=ema.state_dict(), classes=dataset.classes,
                             guidance=s["guidance"], step=step)
                state = dict(step=step, model=student.state_dict(), ema=ema.state_dict(),
                             optimizer=optimizer.state_dict(), distillation=s)
                for name, value in (("model.pt", final), ("state.pt", state)):
                    write_then_rename(folder / name, functools.partial(torch.save, value))
                losses, clock = [], time.time()
    end_progress()
    return ema


# ----------------------------------------------------------------------------------------------------
# Table, words, picture


def paper_table() -> list[dict]:
    """Table 7: training FLOPs in the paper's accounting, as computed from shapes and as printed."""
    rows = [row for row in flops.paper_rows() if "7" in row["table"].split()]
    full = next(row for row in rows if row["method"] == "full")
    return [{"method": row["method"], "keep": row["keep"], "computed, 1e18": row["train_flops"] / 1e18,
             "of full": row["train_flops"] / full["train_flops"], "printed, 1e18": row["paper_train_flops"] / 1e18,
             "of full, printed": row["paper_train_flops"] / full["paper_train_flops"]} for row in rows]


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
        found.append({"against": name, "loss": difference, "training": cost, "sampling": sampling, "lower_in": lower,
                      "seeds": seeds})
        print(f"Against {name} (equal {equal}): the student's loss is {difference:+.1%}, lower in {lower} of {seeds} "
              f"({spread}),\n  for {cost:+.1%} multiply-adds in training and {sampling:+.1%} in sampling. The paper's "
              f"trend, better for much\n  more training, {which if cost > 0.1 else 'is not tested by these costs'}.")
    match = adaptive_steps * rows["student"]["training"] / rows["iso-compute"]["training"]
    print(f"At the student's training cost iso-compute could have had about {match:,.0f} steps (--adaptive-steps).")
    return found


def draw(path: Path, rows: dict, groups: list[str]) -> None:
    relative = {name: (list(range(1, 6)), [a / b for a, b in zip(row["by_group"], rows["full"]["by_group"])])
                for name, row in rows.items()}  # full rank, too: a model keeps its colour in both charts
    cost = {name: ([row["training"]], [row["loss"]], [row["loss_sd"] or 0]) for name, row in rows.items()}
    x = ", ".join(f"{i}: t {name}" for i, name in enumerate(groups, 1))
    plot.save(path,
              plot.line_chart(cost, "held-out loss against training", "multiply-adds of the whole training", "loss"),
              plot.line_chart(relative, "held-out loss per noise group", x, "loss / loss of full rank", log_y=True))


# ----------------------------------------------------------------------------------------------------
# The script


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_image_flags(parser)
    add("--model", choices=PRESETS, metavar="NAME", help="tiny, or DiT-S/2 and the like (default tiny)")
    add("--keep", type=float, default=0.5, help="share of the parameters that the student keeps (default 0.5)")
    add("--steps", type=positive_int, help="training steps of the teacher (default 2000; the paper: 800000)")
    add("--tune-steps", type=positive_int, help="of distillation (default: a quarter of --steps, as in the paper)")
    add("--adaptive-steps", type=positive_int, help="training steps of iso-compute and iso-param (default: --steps)")
    add("--batch-size", type=positive_int, help="images a step, everywhere (default 64; the paper: 128)")
    add("--tune-lr", type=float, metavar="F", help="highest learning rate of distillation (default: half that of "
        "training)")
    add("--teacher", type=Path, metavar="RUN", help="a finished full-rank run of train.py; the flags above that say "
        "what and how long to train then default to its own (default: train one)")
    add("--seeds", type=positive_int, default=1, help="repeat everything with so many seeds (default 1)")
    add("--per-group", type=positive_int, default=1000, metavar="N", help="held-out samples in each of the five noise "
        "groups (default 1000)")
    add("--save-every", type=positive_int, default=50, metavar="N", help="distillation steps per save (default 50)")
    add("--out", type=Path, default=Path("runs/compress"), help="folder of everything (default runs/compress)")
    add("--device", choices=train.DEVICES, default="auto")
    add("train_flags", nargs="*", metavar="-- FLAGS", help="after --: further flags of train.py for teacher and NA-LR "
        "runs")
    parser.set_defaults(dataset=None)  # so that --teacher can say
    args = parser.parse_args()
    known = DEFAULTS
    if args.teacher:
        if args.seeds > 1:
            parser.error("--teacher is one run; leave --seeds out")
        config, _, done, _ = flops.read_run(args.teacher)
        known = DEFAULTS | json.loads((args.teacher / "config.json").read_bytes())["train"]
        known |= {"steps": done, "image_size": config.image_size}
    for name in DEFAULTS:
        if getattr(args, name) is None:
            setattr(args, name, known[name])
    defaults = TRAINING["tiny" if args.model == "tiny" else "DiT"]
    tune_lr = 0.5 * defaults["lr"] if args.tune_lr is None else args.tune_lr
    if not 0 < tune_lr < 1 or not 0 < args.keep <= 1:
        parser.error("--tune-lr must lie between 0 and 1, --keep in (0, 1]")
    tune_steps, adaptive_steps = args.tune_steps or max(1, args.steps // 4), args.adaptive_steps or args.steps
    device = pick_device(args.device)

    def run_flags(method: str, seed: int) -> list[str]:
        """of train.py"""
        steps = args.steps if method == "full" else adaptive_steps
        return ["--dataset", args.dataset, "--data-dir", args.data_dir, "--model", args.model, "--method", method,
                "--keep", f"{args.keep:g}", "--seed", str(seed), "--steps", str(steps),
                "--batch-size", str(args.batch_size), "--sample-every", "0", "--device", args.device,
                *(["--image-size", str(args.image_size)] if args.image_size else []), *args.train_flags]

    # everything that can be wrong is checked before anything is trained
    settle_image_flags(args)
    given = train.parse_arguments(run_flags("full", 0))[1]
    settings = train.choose_settings({key: value for key, value in vars(given).items() if value is not None})
    train.check_settings(settings)
    test = load_held_out(args, 10_000)
    datasets = [load(args.dataset, args.data_dir, "train", args.image_size, seed=seed)
                for seed in range(args.seeds if args.dataset == "shapes" else 1)]
    try:
        config = config_from_flags(given, args.model, image_size=test.images.shape[-1], num_classes=len(test.classes))
    except ValueError as error:
        parser.error(str(error))
    if args.teacher and (theirs := load_model(args.teacher, device)[0].config) != replace(config, keep=theirs.keep):
        raise InputError(f"{args.teacher} is no full-rank model of these flags (it is {theirs.method}, for images of "
                         f"{theirs.image_size}x{theirs.image_size} and {theirs.num_classes} classes); give its flags, "
                         "after -- those of train.py")

    results = {name: [] for name in MODELS}  # of every seed: (config, loss, loss by group, training multiply-adds)
    for seed in range(args.seeds):
        folders = {name: args.out / f"s{seed}" / name for name in MODELS}
        folders["full"] = args.teacher or folders["full"]
        for method in ("full", "iso-compute", "iso-param"):
            if method != "full" or not args.teacher:
                print(f"\n{folders[method]}", flush=True)
                train.main(["--resume", "--out", str(folders[method]), *run_flags(method, seed)])
        teacher = load_model(folders["full"], device)[0]
        s = settings | {"steps": tune_steps, "lr": tune_lr, "orthogonality": 0.0, "seed": seed, "keep": args.keep,
                        "teacher": hashlib.sha256((folders["full"] / "model.pt").read_bytes()).hexdigest(),
                        "save_every": args.save_every}
        print(f"\n{folders['student']}", flush=True)
        models = {"full": teacher, "truncated": truncate(teacher, args.keep),
                  "student": distil(teacher, datasets[seed % len(datasets)], folders["student"], s, device),
                  **{name: load_model(folders[name], device)[0] for name in MODELS[3:]}}
        taught = flops.read_run(folders["full"])[3]
        tuned = tune_steps * tuning_step(models["student"].config, teacher.config, args.batch_size)
        spent = {"full": taught, "truncated": taught, "student": taught + tuned,
                 **{name: flops.read_run(folders[name])[3] for name in MODELS[3:]}}
        for name in MODELS:
            loss, by_group = train.held_out_loss(models[name], test, args.per_group)
            results[name].append((models[name].config, loss, by_group, spent[name]))

    rows = {}
    for name, found in results.items():
        configs, losses, by_group, spent = zip(*found)
        rows[name] = {"model": name, "parameters": parameter_count(configs[0]), "sampling": flops.sampling(configs[0]),
                      "training": float(np.mean(spent)), "loss": float(np.mean(losses)), "losses": list(losses),
                      "loss_sd": float(np.std(losses, ddof=1)) if args.seeds > 1 else None,
                      "by_group": np.mean(by_group, 0).tolist()}
    groups = train.GROUP_NAMES
    print()
    plot.print_table([{"model": row["model"], "params, M": row["parameters"] / 1e6, "loss": row["loss"],
                       "100 DDIM steps": flops.amount(row["sampling"]), "sd": row["loss_sd"],
                       "training": flops.amount(round(row["training"])), **dict(zip(groups, row["by_group"]))}
                      for row in rows.values()],
                     {"model": "", "params, M": ".2f", "100 DDIM steps": "", "training": "", "loss": ".5f", "sd": ".5f"}
                     | dict.fromkeys(groups, ".5f"))
    print(f"truncated: the teacher before distillation; student: after {tune_steps:,} steps of it")
    comparisons = print_words(rows, args.seeds, adaptive_steps)
    print("\nThe paper's Table 7 (CelebA, DiT-S/2). Its compression row does not decode; computed: 800,000 steps of\n"
          "full rank and 200,000 of distillation, three passes of the student and one of the teacher each:")
    paper = paper_table()
    plot.print_table(paper, {"method": "", "keep": "g", "computed, 1e18": ".3f", "of full": ".1%",
                             "printed, 1e18": ".3f", "of full, printed": ".1%"})
    plot.write_json(args.out / "results.json", {"groups": groups, "rows": list(rows.values()), "paper": paper,
                                                "comparisons": comparisons, "tune_steps": tune_steps})
    draw(args.out / "figure.png", rows, groups)
    print(f"\nwrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


if __name__ == "__main__":
    run_script(main)
