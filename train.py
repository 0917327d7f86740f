"""Trains a diffusion transformer, by default a noise-adaptive low-rank one (NA-LR).

    python train.py                                     shapes, model tiny: minutes on a laptop
    python train.py --dataset cifar10                   the paper's run (DiT-S/2, 800,000 steps): a GPU
    python train.py --dataset FOLDER --model tiny       your own images: a folder, class folders, .zip, .npz
    python train.py --resume                            go on with the newest run
    torchrun --nproc_per_node=4 train.py ...            the same steps, shared out to four GPUs

The settings of D.1 are the defaults of every DiT-* model:
{PAPER}
`tiny` has its own:
{TINY}
Runs of fewer steps than the paper's shorten the warm-up to 5 % of the steps and let the EMA forget faster.
A run folder holds config.json, metrics.jsonl, state.pt (to go on), model.pt (to sample) and samples/.
"""

import argparse
import copy
import functools
import json
import math
import os
import signal
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import flops
from curriculum import Curriculum, cluster_timesteps, speed, uniform
from data import (DATASETS, Dataset, InputError, Parser, batch_indices, decode, duration, end_progress,
                  first_process_first, gather, keep_large_blocks, open_source, pick_device, positive_int,
                  read_checkpoint, run_script, show_progress, start_processes, to_unit, write_then_rename)
from lowrank import orthogonality_penalty
from model import (PRESETS, TRAINING, Config, DiT, add_model_flags, chunk_batch, config_from_flags, parameter_count,
                   rank_summary)
from sample import ImageNoise, draw_images, grid_columns, load_model, newest_run, save_grid
from schedule import WEIGHTINGS, T, NoiseSchedule, add_noise, loss_weight

# ----------------------------------------------------------------------------------------------------
# Settings

DEVICES, DTYPES = ("auto", "cpu", "cuda", "mps"), (None, "float32", "bfloat16")
TIMESTEPS = ("uniform", "stratified", "speed", "speed-stratified")
EXECUTIONS = ("mask", "sorted")

PAPER, TINY = TRAINING["DiT"], TRAINING["tiny"]

# the noise groups of `loss_by_group`: NA-LR B.1
LOSS_GROUPS = cluster_timesteps(NoiseSchedule().log_snr, 5)  # their first timesteps
GROUP_EDGES = LOSS_GROUPS + [T + 1]
GROUP_NAMES = [f"{first}-{end - 1}" for first, end in zip(GROUP_EDGES, GROUP_EDGES[1:])]

# What a resumed run may be told anew. Everything else would make it another run.
# (The dataset may have moved; that it still holds the same images and classes is checked.)
MAY_CHANGE = {"dataset", "data_dir", "steps", "lr", "device", "dtype", "compile", "save_every", "sample_every",
              "keep_models", "guidance", "rank_execution"}


def t_range(text: str) -> list[int]:
    """argparse type: '359-900' -> [359, 900]."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= T):
        raise argparse.ArgumentTypeError(f"{text} is not FIRST-LAST with 1 <= FIRST <= LAST <= {T}")
    return [int(first), int(last)]


def parse_arguments(argv):
    def listed(settings):
        return textwrap.fill(", ".join(f"{name} {value}" for name, value in settings.items()), 100)

    tiny = listed({name: value for name, value in TINY.items() if value != PAPER[name]})
    parser = Parser(description=__doc__.replace("{TINY}", tiny).replace("{PAPER}", listed(PAPER)))
    p = parser.add_argument_group("data and output")
    p.add_argument("--dataset", metavar="NAME|PATH",
                   help=f"{', '.join(DATASETS)}, or a folder, .zip or .npz (default shapes)")
    p.add_argument("--data-dir", metavar="DIR", help="where named datasets and decoded caches are kept (default data)")
    p.add_argument("--image-size", type=positive_int, metavar="N",
                   help="shapes: size to draw (default 16); files: crop to a square and resize (default: as is)")
    p.add_argument("--out", metavar="DIR", help="run folder (default: a new one under runs/)")
    p.add_argument("--resume", action="store_true",
                   help="go on with the run in --out (default: the newest under runs/)")
    add_model_flags(parser)
    p = parser.add_argument_group("training")
    p.add_argument("--steps", type=positive_int, metavar="N", help="optimiser steps")
    p.add_argument("--batch-size", type=positive_int, metavar="N", help="images per step")
    p.add_argument("--lr", type=float, metavar="F", help="base learning rate of AdamW; decays to zero by a cosine")
    p.add_argument("--warmup", type=int, metavar="N", help="warm-up steps (at most 5 %% of the steps)")
    p.add_argument("--ema-decay", type=float, metavar="F", help="of the weights that sampling uses")
    p.add_argument("--label-dropout", type=float, metavar="F",
                   help="chance that a label becomes \"no class\" (default 0.1)")
    p.add_argument("--no-flip", dest="flip", action="store_false", default=None, help="no random horizontal flips")
    p.add_argument("--orthogonality", type=float, metavar="F",
                   help="weight of the orthogonality penalty (default 1e-4)")
    p.add_argument("--curriculum-groups", type=int, metavar="N",
                   help="timestep groups of the curriculum, 0 = off (default 10 for iso-*, 0 for full and static)")
    p.add_argument("--curriculum-share", type=float, metavar="F",
                   help="the curriculum takes at most this share of the steps; 1 = no such limit (default 0.4, "
                        "tiny 0.2)")
    p.add_argument("--curriculum-alpha", type=float, metavar="F",
                   help="factor of the loss's EMA whose plateau brings the next group (default 0.05)")
    p.add_argument("--curriculum-sampling", choices=("progressive", "uniform"),
                   help="progressive: groups that are in keep their share (C.3.3); uniform: all that are in alike "
                        "(default progressive)")
    p.add_argument("--no-restart", dest="restart", action="store_false", default=None,
                   help="keep optimiser state and learning rate when a group comes (C.3.4 restarts both)")
    p.add_argument("--timesteps", choices=TIMESTEPS,
                   help="how t is drawn: uniform, or as SpeeD does; each independently or stratified, which spreads "
                        "every batch over all noise levels (default uniform)")
    p.add_argument("--t-range", type=t_range, metavar="A-B", help="train on these timesteps alone (no curriculum)")
    p.add_argument("--weighting", choices=WEIGHTINGS,
                   help="of the loss along t, with mean 1 under the distribution of t (default none)")
    p.add_argument("--seed", type=int, metavar="N",
                   help="of weights, data order, noise, timesteps and the drawn shapes (default 0)")
    p = parser.add_argument_group("machine and reports")
    p.add_argument("--device", choices=DEVICES)
    p.add_argument("--dtype", choices=DTYPES[1:],
                   help="of the matrix products (default bfloat16 on CUDA, else float32)")
    p.add_argument("--compile", action="store_true", default=None, help="torch.compile the model")
    p.add_argument("--rank-execution", choices=EXECUTIONS,
                   help="mask: every sample computes r_max channels, as in the paper; sorted: the same result from "
                        "chunks of similar rank, about 0.73 of the products (default sorted, tiny mask)")
    p.add_argument("--log-every", type=positive_int, metavar="N",
                   help="steps per line of metrics.jsonl; the curriculum, too, reads its losses then")
    p.add_argument("--save-every", type=positive_int, metavar="N", help="steps per state.pt and model.pt")
    p.add_argument("--keep-models", action="store_true", default=None,
                   help="also keep the model of every save, as model_0005000.pt")
    p.add_argument("--sample-every", type=int, metavar="N", help="steps per sample grid; 0: none, not even at the end")
    p.add_argument("--guidance", type=float, metavar="W",
                   help="guidance scale of this run's samples (default 2, tiny 4)")
    return parser, parser.parse_args(argv)


def choose_settings(given: dict) -> dict:
    """All settings of the training: `given`, and defaults that depend on its dataset, model and method.
    The settings of the model are kept apart, in Config."""
    dataset = given.get("dataset", "shapes")
    model = given.get("model", "tiny" if dataset == "shapes" else "DiT-S/2")
    adaptive = given.get("method", "iso-compute").startswith("iso")
    defaults = dict(dataset=dataset, data_dir="data", image_size=None, model=model, flip=True, orthogonality=1e-4,
                    curriculum_groups=10 if adaptive and not given.get("t_range") else 0, curriculum_alpha=0.05,
                    curriculum_sampling="progressive", restart=True, timesteps="uniform", t_range=None,
                    weighting="none", seed=0, device="auto", dtype=None, compile=False, keep_models=False)
    defaults |= TINY if model == "tiny" else PAPER
    return {name: given.get(name, default) for name, default in defaults.items()}


def check_settings(s: dict) -> None:
    """Raises InputError for a value that no run can use."""
    for name, low, high in (("lr", 0, math.inf), ("warmup", 0, math.inf), ("ema_decay", 0, 1), ("label_dropout", 0, 1),
                            ("orthogonality", 0, math.inf), ("curriculum_groups", 0, T), ("curriculum_share", 0, 1),
                            ("curriculum_alpha", 0, 1), ("sample_every", 0, math.inf), ("seed", 0, 2**31),
                            ("guidance", -math.inf, math.inf)):
        if type(s[name]) not in (int, float) or not (math.isfinite(s[name]) and low <= s[name] <= high):
            raise InputError(f"--{name.replace('_', '-')} {s[name]} must be a finite number between {low} and {high}")
    for name in ("steps", "batch_size", "log_every", "save_every"):
        if type(s[name]) is not int or s[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} {s[name]} must be a whole number of at least 1")
    for name, allowed in (("model", PRESETS), ("device", DEVICES), ("dtype", DTYPES), ("timesteps", TIMESTEPS),
                          ("weighting", WEIGHTINGS), ("rank_execution", EXECUTIONS),
                          ("curriculum_sampling", ("progressive", "uniform"))):
        if s[name] not in allowed:
            raise InputError(f"--{name.replace('_', '-')} {s[name]} is unknown; use {', '.join(map(str, allowed))}")
    if s["t_range"] and (s["curriculum_groups"] > 1 or s["timesteps"].startswith("speed")):
        raise InputError("--t-range trains on one fixed range of timesteps; leave out --curriculum-groups and SpeeD's "
                         "--timesteps")


def learning_rate(step: int, start: int, stage: int, s: dict) -> float:
    """Linear warm-up, then a cosine to zero at the last step; afresh from `start`, the step at which
    curriculum stage `stage` began, with 2 % less for each introduction and a fifth of the warm-up.
    NA-LR D.1, C.3.4; that the decay is a cosine is our choice."""
    warmup = min(s["warmup"], 0.05 * s["steps"]) * (1 if stage == 0 else 0.2)
    base = s["lr"] * (1 - 0.02 * stage)
    if step - start < warmup:
        return base * min(1, (step - start + 1) / warmup)
    progress = (step - start - warmup) / max(1, s["steps"] - start - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------------------
# Held-out loss


def noised_losses(model: DiT, dataset: Dataset, images: torch.Tensor, t: torch.Tensor, samples: Sequence[int],
                  seed: int) -> torch.Tensor:
    """The denoising loss (B,) of image number images[i] of `dataset` at timestep t[i], both int64 (B,), with the noise
    that samples[i] of the seed meets: on the model's device, with its graph."""
    device = model.position.device
    x_0 = to_unit(dataset.images[images]).to(device)
    y = dataset.labels[images] if dataset.classes else torch.full_like(images, model.config.num_classes)
    eps = ImageNoise(seed, samples, x_0.shape[1:], device)()
    x_t = add_noise(x_0, eps, *(a.to(device) for a in NoiseSchedule().coefficients(t)))
    return (model(x_t, t.to(device), y.to(device)).float() - eps).square().mean((1, 2, 3))


@torch.no_grad()
def denoising_losses(model: DiT, dataset: Dataset, images: torch.Tensor, t: torch.Tensor, seed: int = 0,
                     batch_size: int = 250) -> torch.Tensor:
    """The denoising loss of image number images[i] of `dataset` at timestep t[i], both int64 (N,):
    float64 (N,) on the CPU. Sample i of a seed meets the same noise whatever the model and the batch."""
    losses = []
    for first in range(0, len(t), batch_size):
        samples = range(first, min(first + batch_size, len(t)))
        losses.append(noised_losses(model, dataset, images[samples], t[samples], samples, seed).double().cpu())
    return torch.cat(losses)


def held_out_loss(model: DiT, dataset: Dataset, per_group: int = 1000, seed: int = 0) -> tuple[float, list[float]]:
    """The denoising loss on images the model has not seen: its mean over all t, and in each of the five
    log-SNR groups of `loss_by_group`. Every model meets the same images, noise and timesteps, which
    are spread evenly over each group, so that differences between models are not those of the draw."""
    places = (torch.arange(per_group, dtype=torch.float64) + 0.5) / per_group
    t = torch.cat([first + (places * (end - first)).long() for first, end in zip(GROUP_EDGES, GROUP_EDGES[1:])])
    order = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(seed))  # not class by class
    losses = denoising_losses(model, dataset, order[torch.arange(len(t)) % len(order)], t, seed)
    by_group = losses.view(5, per_group).mean(1)
    share = torch.tensor(GROUP_EDGES, dtype=torch.float64).diff() / T
    return (share * by_group).sum().item(), by_group.tolist()


# ----------------------------------------------------------------------------------------------------
# The run folder


RUN_FILES = ("config.json", "state.pt", "model.pt", "metrics.jsonl")


def open_run(args, given: dict) -> tuple[Path | None, dict | None]:
    """The folder to write to and, with --resume, what its config.json says. A folder of None is to be
    chosen later: nothing is created before everything a person can get wrong has been checked."""
    if not args.resume:
        if args.out and any((Path(args.out) / name).exists() for name in RUN_FILES):
            raise InputError(f"{args.out} already holds a run; add --resume to go on with it, or choose another --out")
        if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
            raise InputError(f"--out {args.out} is a file; name a folder")
        return (Path(args.out) if args.out else None), None
    folder = Path(args.out) if args.out else newest_run(file="config.json")
    if not (folder / "config.json").exists():
        if not given and not folder.exists():
            raise InputError(f"--resume: {folder} does not exist; name the folder of a run")
        # a job that was killed before it wrote anything goes on by the same command
        print(f"nothing to resume in {folder} yet: starting")
        return folder, None
    try:
        saved = json.loads((folder / "config.json").read_text())
        known = saved["train"] | saved["model"]
        Config(**saved["model"])
        saved["n_images"], saved["classes"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} is not a run's settings ({error})") from None
    differ = [f"--{k.replace('_', '-')} {v} (the run has {known.get(k)})" for k, v in given.items()
              if k not in MAY_CHANGE and v != known.get(k)]
    if differ:
        raise InputError(f"cannot resume {folder} with other settings: {', '.join(differ)}; leave them out, "
                         "or train a new run without --resume")
    return folder, saved


def new_folder(s: dict, config: Config) -> Path:
    """Makes and returns runs/003-shapes-tiny-iso-compute-0.5, counting up."""
    keep = "" if config.method == "full" else f"-{config.keep:g}"
    name = f"{Path(s['dataset']).stem}-{s['model'].replace('/', '-')}-{config.method}{keep}"
    numbers = [p.name.split("-")[0] for p in Path("runs").glob("*-*")]
    number = max((int(n) for n in numbers if n.isdecimal()), default=0) + 1
    while True:
        folder = Path("runs") / f"{number:03d}-{name}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run took it a moment ago
            number += 1


def keep_metrics(path: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`, which a resumed run will write again, and any that
    a kill has cut off."""
    def is_kept(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    if path.exists():
        kept = [line for line in path.read_bytes().splitlines(keepends=True) if is_kept(line)]
        write_then_rename(path, lambda file: file.writelines(kept))


# ----------------------------------------------------------------------------------------------------
# The script


def main(argv: list[str] | None = None):
    """argv: the command line, for scripts that train; default what was typed."""
    parser, args = parse_arguments(argv)
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("out", "resume")}
    folder, saved = open_run(args, given)
    s = choose_settings((saved["model"] | saved["train"] | given) if saved else given)
    check_settings(s)
    rank, world, device = start_processes(pick_device(s["device"]))  # torchrun's; 0, 1 without it
    if s["batch_size"] % world:
        raise InputError(f"--batch-size {s['batch_size']} is for all {world} processes together, which cannot share it "
                         f"equally; give a multiple of {world}")
    dtype = getattr(torch, s["dtype"] or ("bfloat16" if device.type == "cuda" else "float32"))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the few float32 products beside autocast
    elif device.type == "cpu":
        keep_large_blocks()

    # data and model
    with first_process_first(rank, world):
        source = open_source(s["dataset"], s["data_dir"], image_size=s["image_size"], seed=s["seed"])
    n_images, (height, width) = len(source), source.read(0, 1).shape[2:]
    if height != width:
        raise InputError(f"{source.name} has images of {width}x{height} pixels; --image-size N crops them to squares")
    try:
        facts = dict(image_size=height, num_classes=len(source.classes))
        config = Config(**saved["model"]) if saved else config_from_flags(args, s["model"], **facts)
    except ValueError as error:
        parser.error(str(error))
    if config.num_classes < len(source.classes) or config.image_size != height:
        raise InputError(f"{source.name} has {len(source.classes)} classes of {height}x{width} images, the model "
                         f"{config.num_classes} classes of {config.image_size}x{config.image_size}")
    if saved and (saved["n_images"], saved["classes"]) != (n_images, source.classes):
        raise InputError(f"{source.name} has {n_images} images of {len(source.classes)} classes, the run was trained "
                         f"on {saved['n_images']} of {len(saved['classes'])}; to go on they must be the same")
    with first_process_first(rank, world):
        dataset = decode(source, s["data_dir"])
    torch.manual_seed(s["seed"])
    model = DiT(config, initialise=not saved or not (folder / "state.pt").exists()).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    ema_parameters, parameters = list(ema.parameters()), list(model.parameters())
    net = torch.compile(model) if s["compile"] else model
    if world > 1:  # averages the gradients; inputs are on their devices already, and all weights alike
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(parameters, lr=s["lr"], weight_decay=0.0, fused=fused)

    # functions of t, and random numbers: timesteps on the host, which must know them, the rest on the device
    noise_schedule = NoiseSchedule()
    first, last = s["t_range"] or (1, T)
    starts = [first] if s["t_range"] else cluster_timesteps(noise_schedule.log_snr, max(1, s["curriculum_groups"]))
    base = speed(T) if s["timesteps"].startswith("speed") else uniform(T, first, last)
    curriculum = Curriculum(starts, T, s["steps"], s["curriculum_share"], alpha=s["curriculum_alpha"], base=base,
                            progressive=s["curriculum_sampling"] == "progressive")
    host_rng = torch.Generator().manual_seed(s["seed"])
    device_rng = torch.Generator(device).manual_seed(s["seed"] + 2**31)

    step, spent = 0, 0  # steps done; multiply-adds spent
    mine = slice(rank, None, world)  # this process's part of the batch: with t ascending, as much work as the others'
    rows = min(s["log_every"], s["steps"])
    losses = torch.zeros(rows, s["batch_size"] // world, device=device)  # per sample of mine, since the last log line
    timesteps = torch.zeros(rows, s["batch_size"], dtype=torch.int64)
    pending = 0  # rows of these two that are filled

    fixed_settings = {name: value for name, value in s.items() if name not in MAY_CHANGE}
    if saved and (folder / "state.pt").exists():
        state = read_checkpoint(folder / "state.pt", ("step", "model", "ema", "optimizer", "curriculum", "spent",
                                                      "losses", "timesteps", "host_rng", "device_rng", "device",
                                                      "settings"))
        if state["settings"] != fixed_settings:
            raise InputError(f"{folder / 'state.pt'} belongs to a run with other settings than its config.json")
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{folder / 'state.pt'} does not fit config.json: {reason}") from None
        for group in optimizer.param_groups:
            group["fused"] = fused  # the run may have been on another device
        curriculum.load_state_dict(state["curriculum"])
        step, spent, pending = state["step"], state["spent"], len(state["losses"])
        losses[:pending], timesteps[:pending] = state["losses"][:, mine], state["timesteps"]
        host_rng.set_state(state["host_rng"])
        if state["device"] == device.type:
            device_rng.set_state(state["device_rng"])
        else:
            device_rng.manual_seed(s["seed"] + 2**31 + step)
            print(f"resumed on {device.type}, not {state['device']}: the noise to come is another")
    if step > s["steps"]:
        raise InputError(f"{folder} has already trained {step} steps; --steps {s['steps']} cannot take any back")

    # everything that can be wrong has been checked: only now is anything written, and by process 0 alone
    gather(None, world)  # the others have checked, too
    if folder is None:
        folder = gather(new_folder(s, config) if rank == 0 else None, world)[0]
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    if saved and rank == 0:
        for leftover in (p for name in RUN_FILES for p in folder.glob(f".{name}.*.tmp")):  # a kill cut off its writing
            leftover.unlink()
    config_json = json.dumps({"dataset": dataset.name, "n_images": n_images, "classes": dataset.classes,
                              "model": asdict(config), "train": s}, indent=2)
    if rank == 0:
        write_then_rename(folder / "config.json", lambda file: file.write(config_json.encode()))
        keep_metrics(folder / "metrics.jsonl", step)
    metrics = open(folder / "metrics.jsonl" if rank == 0 else os.devnull, "a")

    is_sorted = s["rank_execution"] == "sorted" and model.rank_schedule is not None

    penalties = world * (s["orthogonality"] > 0)

    @functools.cache
    def masked_cost(t_low):
        return flops.train_step(config, s["batch_size"], flops.channels(config, t_low), penalties)

    full = parameter_count(replace(config, method="full"))
    per_step = masked_cost(first)
    print(f"run         {folder}" + (f", going on after step {step}" if step else ""))
    print(f"device      {device}, {str(dtype).removeprefix('torch.')}" + (", compiled" if s["compile"] else "")
          + (f", {world} processes" if world > 1 else ""))
    print(f"data        {dataset.name}: {n_images:,} images {height}x{width}, {len(dataset.classes) or 'no'} classes")
    print(f"model       {s['model']}, {config.method}" + ("" if config.method == "full" else f" keep {config.keep:g}")
          + f": {parameter_count(config):,} parameters (full rank {full:,})")
    for line in rank_summary(config):
        print(f"           {line}")
    slicing = ["sorted execution"] * is_sorted + ["the curriculum"] * (len(starts) > 1 and bool(model.ranks))
    print(f"cost        {per_step:.3g} multiply-adds a step of {s['batch_size']}, {per_step * s['steps']:.3g} in "
          f"{s['steps']:,} steps" + (f", less what {' and '.join(slicing)} slice{'s' * (len(slicing) < 2)} away"
                                     if slicing else ""), flush=True)

    dataset = dataset.to(device)
    none, conditional = config.num_classes, len(dataset.classes) > 0

    def to_device(x):  # pinned memory lets the copy run beside the computation: the loop never waits
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    def all_losses():
        """The pending losses of the whole batch, (pending, B) on the CPU."""
        return torch.stack(gather(losses[:pending].cpu(), world), dim=2).flatten(1)

    def save():
        global_losses = all_losses()
        if not (torch.stack(torch._foreach_norm(parameters)).isfinite().all() and global_losses.isfinite().all()):
            raise not_finite(step)
        if rank:
            return
        state = dict(step=step, model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                     curriculum=curriculum.state_dict(), spent=spent, losses=global_losses,
                     timesteps=timesteps[:pending].clone(), host_rng=host_rng.get_state(),
                     device_rng=device_rng.get_state(), device=device.type, settings=fixed_settings)
        final = dict(config=asdict(config), model=ema.state_dict(), classes=dataset.classes, guidance=s["guidance"],
                     step=step)
        for name in ("model.pt", f"model_{step:07d}.pt")[:1 + s["keep_models"]]:
            write_then_rename(folder / name, lambda file: torch.save(final, file))
        # last: a kill between the two is made good when the run goes on from the older state
        write_then_rename(folder / "state.pt", lambda file: torch.save(state, file))

    def not_finite(step):
        end_progress()
        state = "keeps its last good state" if (folder / "state.pt").exists() else "holds no state yet"
        return InputError(f"the loss stopped being finite before step {step}; {folder} {state}: "
                          f"try --resume --out {folder} --lr {s['lr'] / 2:g}")

    def save_samples(name):
        images, _ = draw_images(ema, range(100), list(range(len(dataset.classes))), guidance=s["guidance"])
        save_grid(folder / "samples" / name, images, grid_columns(len(dataset.classes)))
        return folder / "samples" / name

    interrupted = []

    def on_interrupt(number, _):
        if interrupted and number == signal.SIGINT:  # torchrun itself sends SIGTERM after a Ctrl-C
            os._exit(130)
        interrupted.append(True)
        if rank == 0:
            print("\nstopping soon, with everything saved; once more stops at once, without", file=sys.stderr)

    handlers = {sig: signal.signal(sig, on_interrupt) for sig in (signal.SIGINT, signal.SIGTERM)}
    clock, paused, logged = time.time(), 0.0, step  # of the current log interval
    begin, begin_step, stop, weight = time.time(), step, False, None

    while step < s["steps"] and not stop:
        new_stage = curriculum.advance(step)
        if new_stage or weight is None:
            weight = loss_weight(s["weighting"], noise_schedule, curriculum.probabilities()).float()  # (T + 1,)
        if new_stage and s["restart"]:
            optimizer.state.clear()  # C.3.4; the EMA of the weights goes on
        lr = learning_rate(step, *((curriculum.start, curriculum.stage) if s["restart"] else (0, 0)), s)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # a batch: every process draws all of it, and takes its part
        index = batch_indices(n_images, step, s["batch_size"], s["seed"], device)
        x_0 = dataset.images[index]
        if s["flip"]:
            flip = torch.rand(len(x_0), 1, 1, 1, device=device, generator=device_rng) < 0.5
            x_0 = torch.where(flip, x_0.flip(3), x_0)
        x_0 = to_unit(x_0)  # (B, 3, H, W) in [-1, 1]
        y = dataset.labels[index] if conditional else torch.full_like(index, none)
        if conditional:
            y = torch.where(torch.rand(len(y), device=device, generator=device_rng) < s["label_dropout"], none, y)
        eps = torch.randn(x_0.shape, device=device, generator=device_rng)
        all_t = curriculum.sample(s["batch_size"], host_rng, s["timesteps"].endswith("stratified"))  # on the host
        x_0, y, eps, t = x_0[mine], y[mine], eps[mine], all_t[mine]  # t (B,) ascends
        x_t = add_noise(x_0, eps, *map(to_device, noise_schedule.coefficients(t)))

        # one step; the rank of every sample is decided here, once
        t_device = to_device(t)
        chunks = chunk_batch(config, t.tolist()) if is_sorted else None
        active = model.active_ranks(t_device, curriculum.t_low, chunks)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            eps_hat = net(x_t, t_device, y, active)
        sample_loss = (eps_hat.float() - eps).square().mean((1, 2, 3))  # (B,)
        loss = (to_device(weight[t]) * sample_loss).mean()
        if s["orthogonality"] > 0 and model.ranks:
            loss = loss + s["orthogonality"] * orthogonality_penalty(model, active)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():  # or every step would leave a piece of graph behind
            torch._foreach_lerp_(ema_parameters, parameters, 1 - min(s["ema_decay"], (1 + step) / (10 + step)))

        losses[pending], timesteps[pending] = sample_loss.detach(), all_t
        spent += (flops.sorted_step(config, all_t.tolist(), curriculum.t_low, penalties, world) if is_sorted
                  else masked_cost(curriculum.t_low))
        step, pending = step + 1, pending + 1

        if pending == s["log_every"] or step == s["steps"]:
            values = all_losses().double()  # the one place where the loop waits for the device
            if not torch.isfinite(values).all():
                raise not_finite(step)
            curriculum.observe(step - pending, values.mean(1).tolist())
            group = np.searchsorted(LOSS_GROUPS, timesteps[:pending].flatten().numpy(), side="right") - 1
            sums = np.bincount(group, values.flatten().numpy(), len(LOSS_GROUPS))
            counts = np.bincount(group, minlength=len(LOSS_GROUPS))
            now = time.time()
            line = dict(step=step, loss=values.mean().item(),
                        loss_by_group=[float(a / c) if c else None for a, c in zip(sums, counts)], lr=lr,
                        stage=curriculum.stage, t_low=curriculum.t_low, t_high=last,
                        active_rank=max(flops.channels(config, curriculum.t_low).values(), default=None),
                        images_per_s=(step - logged) * s["batch_size"] / (now - clock - paused), flops=spent)
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            rate = (now - begin) / (step - begin_step)
            ranks = f"rank {line['active_rank']}, " if line["active_rank"] else ""
            show_progress(f"step {step}/{s['steps']}, loss {line['loss']:.4f}, lr {lr:.1e}, "
                          f"stage {curriculum.stage + 1}/{len(starts)}, {ranks}{line['images_per_s']:.0f} images/s, "
                          f"{duration(rate * (s['steps'] - step))} left")
            pending, clock, paused, logged = 0, now, 0.0, step

        if world == 1 or pending == 0:  # processes agree on it when they talk anyway
            stop = any(gather(bool(interrupted), world))
        pause = time.time()
        if step % s["save_every"] == 0 or step == s["steps"]:
            save()
        if s["sample_every"] and step % s["sample_every"] == 0 and step < s["steps"] and not stop and rank == 0:
            save_samples(f"step_{step:07d}.png")
        paused += time.time() - pause

    end_progress()
    metrics.close()
    for sig, handler in handlers.items():
        signal.signal(sig, handler)
    if step < s["steps"]:
        save()
        print(f"stopped after step {step}; go on with: python train.py --resume --out {folder}", file=sys.stderr)
        sys.exit(130)
    saved = f", {1 - spent / (per_step * s['steps']):.1%} less than without {' and '.join(slicing)}" if slicing else ""
    print(f"done, {duration(time.time() - begin)} in this call: {spent:.3g} multiply-adds{saved}")
    if s["sample_every"] and rank == 0:
        picture = save_samples("final.png")
        names = dataset.classes if len(dataset.classes) == grid_columns(len(dataset.classes)) else []
        print(f"picture     {picture}" + (f" (columns: {', '.join(names)})" if names else ""))
    print(f"more        python sample.py --run {folder}")


def train_and_measure(folder: Path, flags: list[str], held_out: Dataset, per_group: int, device) -> dict:
    """For scripts that compare runs: trains one, or goes on with it, by the command line `flags`. Returns its held-out
    losses (`loss`, `loss_by_group`), multiply-adds (`flops`) and log `lines`. The losses are kept in the run's
    measured.json with what they were measured on, and measured again if that differs."""
    main(["--resume", "--out", str(folder), *flags])
    model, state = load_model(folder, device)
    key = dict(step=state["step"], images=f"{len(held_out.images)} of {held_out.name}", per_group=per_group)
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        run = dict(lines=lines, flops=lines[-1]["flops"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder / 'metrics.jsonl'} is damaged ({error!r}); delete the folder to train it") from None
    try:
        measured = json.loads((folder / "measured.json").read_text())
        known = all(measured[name] == value for name, value in key.items())
    except (OSError, ValueError, LookupError, TypeError):
        known = False
    if not known:
        loss, by_group = held_out_loss(model, held_out, per_group)
        measured = key | dict(loss=loss, loss_by_group=by_group)
        write_then_rename(folder / "measured.json", lambda file: file.write(json.dumps(measured).encode()))
    return run | dict(loss=measured["loss"], loss_by_group=measured["loss_by_group"])


if __name__ == "__main__":
    run_script(main)
