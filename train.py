"""Trains a diffusion transformer, by default a noise-adaptive low-rank one (NA-LR).

    python train.py                                     shapes, model tiny: minutes on a laptop
    python train.py --dataset cifar10                   the paper's run (DiT-S/2, 800,000 steps): a GPU
    python train.py --dataset FOLDER --model tiny       your own images: a folder, class folders, .zip, .npz
    python train.py --resume                            go on with the newest run
    torchrun --nproc_per_node=4 train.py ...            the same steps, shared out to four GPUs

The defaults are those of D.1, for every DiT-* model; tiny has
{TINY}
Runs of fewer steps than the paper's shorten the warm-up to 5 % of the steps and let the EMA forget faster.
A run folder holds config.json, metrics.jsonl, state.pt (to go on), model.pt (EMA, to sample) and samples/.
"""

import contextlib
import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import flops
from curriculum import Curriculum, cluster_timesteps, speed, uniform
from data import DATASETS, Dataset, Source, batch_indices, decode, open_source, to_unit
from lowrank import orthogonality_penalty
from model import PRESETS, SIZES, Config, DiT, parameter_count, preset_config, rank_summary
from sample import draw_images, grid_columns, newest_run, save_grid
from schedule import WEIGHTINGS, T, NoiseSchedule, add_noise, eps_loss_factor, loss_weight, target
from script import (DEVICES, DTYPES, InputError, Parser, Processes, Stop, add_flags, check_fields, duration,
                    end_progress, flag, lock, one_line, pick_device, pick_dtype, read_checkpoint, run_script,
                    setting, show_progress, to_device, write_then_rename)

# ----------------------------------------------------------------------------------------------------
# Settings. Those of the model are in model.py: Config.


@dataclass(frozen=True)
class Settings:
    """How to train. None where `choose_settings` or the machine decides."""
    dataset: str = setting("shapes", f"{', '.join(DATASETS)}, or a folder, .zip or .npz", metavar="NAME|PATH")
    data_dir: str = setting("data", "where named datasets and decoded caches are kept", metavar="DIR")
    image_size: int | None = setting(None, "shapes: size to draw (16); files: crop and resize (as they are)", low=1)
    model: str = setting("DiT-S/2", f"{', '.join(SIZES)} with /2, /4, /8, or tiny, the default for shapes",
                         choices=PRESETS, metavar="NAME")
    steps: int = setting(800_000, "optimiser steps", low=1)
    batch_size: int = setting(128, "images per step", low=1)
    lr: float = setting(1e-4, "base learning rate of AdamW; decays to zero by a cosine", above=0)
    warmup: int = setting(3000, "warm-up steps, at most 5 % of all", low=0)
    ema_decay: float = setting(0.9999, "of the weights that sampling uses", low=0, high=1)
    label_dropout: float = setting(0.1, 'chance that a label becomes "no class"', low=0, high=1)
    flip: bool = setting(True, "random horizontal flips")
    orthogonality: float = setting(1e-4, "weight of the orthogonality penalty", low=0)
    curriculum_groups: int | None = setting(None, "timestep groups, 0 = off (default 10 for iso-*, else 0)",
                                            low=0, high=50)  # the rate would be zero with the 51st (C.3.4)
    curriculum_share: float = setting(0.4, "the curriculum takes at most this share of the steps; 1 = no limit",
                                      above=0, high=1)
    curriculum_alpha: float = setting(0.05, "of the loss's EMA, whose plateau brings the next group", low=0, high=1)
    curriculum_sampling: str = setting("progressive", "groups that are in keep their share (C.3.3), or all that are "
                                       "in are alike", choices=("progressive", "uniform"))
    restart: bool = setting(True, "fresh optimiser state and learning rate with each group (C.3.4)")
    timesteps: str = setting("uniform", "how t is drawn; stratified spreads every batch over all noise levels",
                             choices=("uniform", "stratified", "speed", "speed-stratified"))
    t_first: int = setting(1, "lowest timestep to train on, without a curriculum", low=1, high=T)
    t_last: int = setting(T, "highest timestep to train on, without a curriculum", low=1, high=T)
    weighting: str = setting("none", "of the loss along t, with mean 1", choices=WEIGHTINGS)
    seed: int = setting(0, "of weights, data order, noise, timesteps and drawn shapes", low=0, high=2**31)
    slices: int | None = setting(None, "parts of a batch that each compute only the channels they need: the same "
                                 "result, fewer products; 1: only masks (default 6 for DiT-* on a CPU, else 1)", low=1)
    device: str = setting("auto", "where to train", choices=DEVICES)
    dtype: str | None = setting(None, "of matrix products (default bfloat16 on CUDA, else float32)", choices=DTYPES)
    compile: bool = setting(False, "torch.compile the model")
    log_every: int = setting(50, "steps per line of metrics.jsonl; the curriculum reads its losses then", low=1)
    save_every: int = setting(5000, "steps per state.pt and model.pt", low=1)
    keep_models: bool = setting(False, "also keep the model of every save, as model_0005000.pt")
    sample_every: int = setting(20_000, "steps per sample grid; 0: none, not even at the end", low=0)
    guidance: float = setting(2.0, "guidance scale of this run's samples", metavar="W")


TINY = dict(steps=2000, batch_size=64, lr=2e-3, warmup=100, ema_decay=0.998, curriculum_share=0.2, log_every=20,
            save_every=500)

# What a resumed run may be told anew. Everything else would make it another run.
# (The dataset may have moved; that it still holds the same images and classes is checked.)
MAY_CHANGE = {"dataset", "data_dir", "steps", "lr", "device", "dtype", "compile", "save_every", "sample_every",
              "keep_models", "guidance", "slices"}


def choose_settings(given: dict) -> Settings:
    """The flags that were given, and defaults that depend on dataset, model or method. Raises InputError."""
    model = given.get("model", "tiny" if given.get("dataset", "shapes") == "shapes" else Settings.model)
    adaptive = given.get("method", Config.method).startswith("iso")
    a_range = "t_first" in given or "t_last" in given
    depends = dict(model=model, curriculum_groups=10 if adaptive and not a_range else 0)
    depends |= TINY if model == "tiny" else {}
    names = {f.name for f in fields(Settings)}
    s = Settings(**(depends | {name: value for name, value in given.items() if name in names}))
    check_fields(s)
    if s.t_first > s.t_last or (a_range and (s.curriculum_groups > 1 or s.timesteps.startswith("speed"))):
        raise InputError(f"--t-first {s.t_first} and --t-last {s.t_last} must be one range; it excludes a curriculum "
                         "and SpeeD's --timesteps")
    return s


def learning_rate(step: int, start: int, stage: int, s: Settings) -> float:
    """Linear warm-up, then a cosine to zero at the last step; afresh from `start`, the step at which
    curriculum stage `stage` began, with 2 % less for each introduction and a fifth of the warm-up.
    NA-LR D.1, C.3.4; that the decay is a cosine is our choice."""
    warmup = min(s.warmup, 0.05 * s.steps) * (1 if stage == 0 else 0.2)
    base = s.lr * (1 - 0.02 * stage)
    if step - start < warmup:
        return base * min(1, (step - start + 1) / warmup)
    progress = (step - start - warmup) / max(1, s.steps - start - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------------------
# One training step


NOISE = NoiseSchedule()
LOSS_GROUPS = cluster_timesteps(NOISE.log_snr, 5)  # first timesteps of the groups of `loss_by_group`, B.1


class Batch(NamedTuple):
    """One process's part of a batch, in ascending order of t."""
    x_0: torch.Tensor  # (B, 3, H, W) in [-1, 1]
    y: torch.Tensor  # (B,) labels, or the number of classes for "no class"
    eps: torch.Tensor  # (B, 3, H, W)
    t: torch.Tensor  # (B,) on the CPU: ranks are chosen there, and no device has to be asked


def draw_batch(dataset: Dataset, state: "State", s: Settings, mine: slice = slice(None)) -> tuple[Batch, torch.Tensor]:
    """The next batch, of which this process takes `mine`, and the t of all of it. Images come in random order, so
    that of t is free; sorted, samples of similar rank lie side by side."""
    config, device, rng = state.model.config, dataset.images.device, state.device_rng
    index = batch_indices(len(dataset.images), state.step, s.batch_size, s.seed, device)
    x_0, y = dataset.images[index], dataset.labels[index]
    if s.flip:
        flipped = torch.rand(len(x_0), 1, 1, 1, device=device, generator=rng) < 0.5
        x_0 = torch.where(flipped, x_0.flip(3), x_0)
    if dataset.classes:
        dropped = torch.rand(len(y), device=device, generator=rng) < s.label_dropout
        y = torch.where(dropped, config.num_classes, y)
    else:
        y = torch.full_like(y, config.num_classes)
    eps = torch.randn(x_0.shape, device=device, generator=rng)
    t = state.curriculum.sample(s.batch_size, state.host_rng, s.timesteps.endswith("stratified"))
    return Batch(to_unit(x_0[mine]), y[mine], eps[mine], t[mine]), t


def denoising_loss(net, model: DiT, batch: Batch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The squared error of what the model predicts, mean over pixels: float32 (B,), unweighted. `net` is the model,
    or what runs it (compiled, in parallel)."""
    device, predict = batch.x_0.device, model.config.predict
    signal, noise = (to_device(a, device) for a in NOISE.coefficients(batch.t))
    x_t = add_noise(batch.x_0, batch.eps, signal, noise)
    active = model.active(batch.t)  # how many channels each sample may use: decided here, once
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = net(x_t, to_device(batch.t, device), batch.y, active)
    return (output.float() - target(predict, batch.x_0, batch.eps, signal, noise)).square().mean((1, 2, 3))


def train_step(net, state: "State", batch: Batch, s: Settings, slices: int = 1,
               dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One step of AdamW on a batch; returns its denoising losses (B,), unweighted.

    The batch is cut into slices, and each is an ordinary masked pass, NA-LR Eq. (4), which computes only the channels
    that its neediest sample uses, Eq. (5). Gradients accumulate to those of the whole batch; one slice is the
    paper's masking.
    """
    model, t_low = state.model, state.curriculum.t_low
    weight = loss_weight(s.weighting, NOISE, model.config.predict, state.curriculum.probabilities())  # (T + 1,)
    parts = [Batch(*part) for part in zip(*(x.tensor_split(min(slices, len(batch.t))) for x in batch))]
    losses = []
    for part in parts:
        is_last = part is parts[-1]
        # several processes average their gradients once a step, with the last slice
        with contextlib.nullcontext() if is_last or not hasattr(net, "no_sync") else net.no_sync():
            sample_loss = denoising_loss(net, model, part, dtype)  # (B of the slice,)
            weights = to_device(weight[part.t].float(), sample_loss.device)
            loss = (weights * sample_loss).sum() / len(batch.t)
            if is_last and s.orthogonality > 0 and model.ranks:
                loss = loss + s.orthogonality * orthogonality_penalty(model, model.active(t_low))
            loss.backward()
        losses.append(sample_loss.detach())
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return torch.cat(losses)


@torch.no_grad()  # or every step would leave a piece of graph behind
def update_ema(state: "State", s: Settings) -> None:
    """ema <- d ema + (1 - d) w, with a d that grows from 1/10, so that short runs forget their start."""
    decay = min(s.ema_decay, (1 + state.step) / (10 + state.step))
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - decay)


# ----------------------------------------------------------------------------------------------------
# The script


def main(argv: list[str] | None = None) -> None:
    """argv: the command line, for scripts that train; default what was typed."""
    folder, s, given, saved = read_command_line(argv)
    processes = Processes(pick_device(s.device))
    device, dtype = processes.device, pick_dtype(s.dtype, processes.device)
    with processes.first_one_first():
        source = open_source(s.dataset, s.data_dir, image_size=s.image_size, seed=s.seed)
    config = choose_config(source, s, given, saved, processes)
    with processes.first_one_first():
        dataset = decode(source, s.data_dir)
    state = State(s, config, device)
    if saved and (folder / "state.pt").exists():
        state.load(folder / "state.pt", s, processes)
    folder = start_folder(folder, s, state, dataset, processes)
    print_summary(folder, s, given, state, dataset, processes, dtype)
    dataset = dataset.to(device)
    net = torch.compile(state.model) if s.compile else state.model
    if processes.count > 1:  # averages the gradients; all weights are alike from the start
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    slices = s.slices or (6 if s.model != "tiny" and device.type == "cpu" else 1)
    mine = slice(processes.number, None, processes.count)  # with t ascending, as much work as the others'
    log, stop = Log(folder, s, state, processes), Stop()

    while state.step < s.steps and not stop.asked:
        if state.curriculum.advance(state.step) and s.restart:
            state.optimizer.state.clear()  # C.3.4; the EMA of the weights goes on
        start, stage = (state.curriculum.start, state.curriculum.stage) if s.restart else (0, 0)
        lr = learning_rate(state.step, start, stage, s)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        batch, t = draw_batch(dataset, state, s, mine)
        state.losses.append(train_step(net, state, batch, s, slices, dtype))
        state.timesteps.append(t)
        update_ema(state, s)
        state.spent += flops.train_step(state.model.config, t.tolist(), slices, state.curriculum.t_low,
                                        s.orthogonality > 0, processes.count)
        state.step += 1

        if len(state.losses) == s.log_every or state.step == s.steps:
            log.write(lr)
        if processes.count > 1:  # they agree on stopping when they talk anyway
            stop.asked = not state.losses and any(processes.gather(stop.asked))
        with log.pause():
            if state.step % s.save_every == 0 or state.step == s.steps or stop.asked:
                save(folder, s, state, dataset, processes)
            all_in = state.curriculum.t_low == s.t_first  # a picture takes all timesteps
            if s.sample_every and state.step % s.sample_every == 0 and state.step < s.steps and all_in:
                save_samples(folder, f"step_{state.step:07d}.png", s, state, dataset, processes)

    stop.restore_handlers()
    end_progress()
    if state.step < s.steps:
        print(f"stopped after step {state.step}; go on with: python train.py --resume --out {folder}", file=sys.stderr)
        sys.exit(130)
    print_end(folder, s, state, dataset, processes, log)


# ====================================================================================================
# Below this line: what is saved, the run folder, what is printed. Nothing of the method.


class State:
    """Everything that changes while a run trains, and so is saved for it to go on to the same last bit."""
    PARTS = ("model", "ema", "optimizer", "curriculum")  # with a state_dict of their own

    def __init__(self, s: Settings, config: Config, device: torch.device):
        torch.manual_seed(s.seed)
        self.model = DiT(config).to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=s.lr, weight_decay=0.0,
                                           fused=device.type in ("cpu", "cuda"))
        starts = cluster_timesteps(NOISE.log_snr, s.curriculum_groups) if s.curriculum_groups > 1 else [s.t_first]
        base = speed(T) if s.timesteps.startswith("speed") else uniform(T, s.t_first, s.t_last)
        self.curriculum = Curriculum(starts, T, s.steps, s.curriculum_share, alpha=s.curriculum_alpha, base=base,
                                     progressive=s.curriculum_sampling == "progressive")
        self.host_rng = torch.Generator().manual_seed(s.seed)  # of the timesteps
        self.device_rng = torch.Generator(device).manual_seed(s.seed + 2**31)  # of everything else
        self.step, self.spent = 0, 0  # steps done; multiply-adds spent
        self.losses, self.timesteps = [], []  # since the last log line: (B,) of this process; (B,) of all

    def all_losses(self, processes: Processes) -> torch.Tensor:
        """Of whole batches since the last log line, (steps, B) on the CPU; the one thing that waits for the device."""
        mine = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0, 0)
        return torch.stack(processes.gather(mine), dim=2).flatten(1)

    def save(self, path: Path, s: Settings, losses: torch.Tensor) -> None:
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        state |= dict(step=self.step, spent=self.spent, losses=losses, timesteps=list(self.timesteps),
                      host_rng=self.host_rng.get_state(), device_rng=self.device_rng.get_state(),
                      device=self.device_rng.device.type, settings=fixed_settings(s))
        write_then_rename(path, lambda file: torch.save(state, file))

    def load(self, path: Path, s: Settings, processes: Processes) -> None:
        """Raises InputError if the file is damaged or of another run."""
        device = self.device_rng.device
        state = read_checkpoint(path, self.PARTS + ("step", "spent", "losses", "timesteps", "host_rng", "device_rng",
                                                    "device", "settings"))
        if state["settings"] != fixed_settings(s):
            raise InputError(f"{path} belongs to a run with other settings than its config.json")
        try:
            for saved, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups):
                saved["fused"] = own["fused"]  # the state may be of another device; a fused optimiser is then moved
            for name in self.PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.step, self.spent, self.timesteps = int(state["step"]), int(state["spent"]), list(state["timesteps"])
            self.losses = list(state["losses"][:, processes.number::processes.count].to(device))
            self.host_rng.set_state(state["host_rng"])
            if state["device"] == device.type:
                self.device_rng.set_state(state["device_rng"])
            else:
                self.device_rng.manual_seed(s.seed + 2**31 + self.step)
                print(f"resumed on {device.type}, not {state['device']}: the noise to come is another")
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise InputError(f"{path} does not fit config.json: {one_line(error)}") from None
        if self.step > s.steps:
            raise InputError(f"{path.parent} has already trained {self.step} steps; --steps {s.steps} cannot take any "
                             "back")


def fixed_settings(s: Settings) -> dict:
    return {name: value for name, value in asdict(s).items() if name not in MAY_CHANGE}


# ----------------------------------------------------------------------------------------------------
# The run folder

RUN_FILES = ("config.json", "state.pt", "model.pt", "metrics.jsonl")


def read_command_line(argv: list[str] | None):
    """(run folder or None where one is to be made, settings, flags given, config.json's content or None). Nothing is
    created before everything that a person can get wrong has been checked."""
    parser = Parser(description=__doc__.replace("{TINY}", ", ".join(f"{k} {v}" for k, v in TINY.items())))
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: a new one under runs/)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out (default: the newest under runs/)")
    add_flags(parser.add_argument_group("training"), Settings)
    add_flags(parser.add_argument_group("model"), Config)
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("out", "resume")}
    folder = newest_run(file="config.json") if args.resume and not args.out else args.out
    if args.resume and (folder / "config.json").exists():
        config, s, saved = read_config(folder)
        known = asdict(s) | asdict(config)
        differ = [f"{flag(k)} {v} (the run has {known[k]})" for k, v in given.items()
                  if k not in MAY_CHANGE and v != known[k]]
        if differ:
            raise InputError(f"cannot resume {folder} with other settings: {', '.join(differ)}; leave them out, "
                             "or train a new run without --resume")
        s = replace(s, **{k: v for k, v in given.items() if k in MAY_CHANGE})
        check_fields(s)
        return folder, s, given, saved
    if args.resume and not given and not folder.exists():
        raise InputError(f"--resume: {folder} does not exist; name the folder of a run")
    if args.resume:  # a job that was killed before it wrote anything goes on by the same command
        print(f"nothing to resume in {folder} yet: starting")
    elif folder and folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; name a folder")
    elif folder and any((folder / name).exists() for name in RUN_FILES):
        raise InputError(f"{folder} already holds a run; add --resume to go on with it, or choose another --out")
    return folder, choose_settings(given), given, None


def read_config(folder: Path) -> tuple[Config, Settings, dict]:
    """The model, the settings and all else in a run's config.json. Raises InputError."""
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_bytes())
        if "rank_execution" in saved["train"]:
            raise ValueError("an older version wrote rank_execution: delete that line; --slices N does what sorted did")
        config, s = Config(**saved["model"]), Settings(**saved["train"])
        check_fields(s)
        if type(saved["n_images"]) is not int or not all(type(name) is str for name in saved["classes"]):
            raise ValueError("n_images must be a number, classes names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a run's settings ({one_line(error)})") from None
    return config, s, saved


def choose_config(source: Source, s: Settings, given: dict, saved: dict | None, processes: Processes) -> Config:
    """The model for these images, or that of the resumed run. Raises InputError where things do not fit."""
    height, width = source.read(0, 1).shape[2:]
    if height != width:
        raise InputError(f"{source.name} has images of {width}x{height} pixels; --image-size N crops them to squares")
    if s.batch_size % processes.count:
        raise InputError(f"--batch-size {s.batch_size} is for all processes together, which cannot share it equally; "
                         f"give a multiple of {processes.count}")
    try:
        config = (Config(**saved["model"]) if saved else
                  preset_config(s.model, given | {"image_size": height}, num_classes=len(source.classes)))
    except ValueError as error:
        raise InputError(str(error)) from None
    if config.num_classes < len(source.classes) or config.image_size != height:
        raise InputError(f"{source.name} has {len(source.classes)} classes of {height}x{width} images, the model "
                         f"{config.num_classes} classes of {config.image_size}x{config.image_size}")
    if saved and (saved["n_images"], saved["classes"]) != (len(source), source.classes):
        raise InputError(f"{source.name} has {len(source)} images of {len(source.classes)} classes, the run was trained "
                         f"on {saved['n_images']} of {len(saved['classes'])}; to go on they must be the same")
    return config


def start_folder(folder: Path | None, s: Settings, state: State, dataset: Dataset, processes: Processes) -> Path:
    """Makes the folder, by default runs/003-shapes-tiny-iso-compute-0.5, counting up. Everything that can be wrong has
    been checked: only now is anything written, and by process 0 alone."""
    config = state.model.config
    processes.gather(None)  # the others have checked, too
    if folder is None:
        numbers = [p.name.split("-")[0] for p in Path("runs").glob("*-*")]
        number = max((int(n) for n in numbers if n.isdecimal()), default=0) + 1
        keep = "" if config.method == "full" else f"-{config.keep:g}"
        name = f"{Path(s.dataset).stem}-{s.model.replace('/', '-')}-{config.method}{keep}"
        folder = processes.gather(Path("runs") / f"{number:03d}-{name}")[0]
    if processes.number:
        return folder
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    lock(folder)
    for leftover in (p for name in RUN_FILES for p in folder.glob(f".{name}.*.tmp")):  # a kill cut off its writing
        leftover.unlink()
    text = json.dumps({"dataset": dataset.name, "n_images": len(dataset.images), "classes": dataset.classes,
                       "model": asdict(config), "train": asdict(s)}, indent=2)
    write_then_rename(folder / "config.json", lambda file: file.write(text.encode()))
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    kept = [line for line in lines if is_kept(line, state.step)]
    write_then_rename(metrics, lambda file: file.writelines(kept))
    return folder


def is_kept(line: bytes, step: int) -> bool:
    """False for lines of metrics.jsonl after `step`, which a resumed run will write again, and for half ones."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def save(folder: Path, s: Settings, state: State, dataset: Dataset, processes: Processes) -> None:
    """Writes model.pt and state.pt. Raises InputError instead if a number in them is not finite."""
    losses = state.all_losses(processes)
    norms = torch.stack(torch._foreach_norm(list(state.model.parameters())))
    check_finite(torch.cat([norms.cpu(), losses.flatten()]), folder, s, state)
    if processes.number:
        return
    final = dict(config=asdict(state.model.config), model=state.ema.state_dict(), classes=dataset.classes,
                 guidance=s.guidance, step=state.step)
    write_then_rename(folder / "model.pt", lambda file: torch.save(final, file))
    if s.keep_models:
        write_then_rename(folder / f"model_{state.step:07d}.pt", lambda file: torch.save(final, file))
    # last: a kill between the two is made good when the run goes on from the older state
    state.save(folder / "state.pt", s, losses)


def check_finite(values: torch.Tensor, folder: Path, s: Settings, state: State) -> None:
    if not values.isfinite().all():
        end_progress()
        kept = "keeps its last good state" if (folder / "state.pt").exists() else "holds no state yet"
        raise InputError(f"the loss stopped being finite before step {state.step}; {folder} {kept}: "
                         f"try --resume --out {folder} --lr {s.lr / 2:g}")


# ----------------------------------------------------------------------------------------------------
# What is printed


class Log:
    """Lines of metrics.jsonl, and of progress."""

    def __init__(self, folder: Path, s: Settings, state: State, processes: Processes):
        self.folder, self.s, self.state, self.processes = folder, s, state, processes
        self.begin, self.begin_step = time.time(), state.step
        self.clock, self.clock_step, self.paused = self.begin, state.step, 0.0  # of the current interval

    @contextlib.contextmanager
    def pause(self):
        """What happens inside does not count as training."""
        start = time.time()
        yield
        self.paused += time.time() - start

    def write(self, lr: float) -> None:
        """A line on the steps since the last one; the curriculum sees their losses."""
        s, state, curriculum, config = self.s, self.state, self.state.curriculum, self.state.model.config
        losses, t = state.all_losses(self.processes).double(), torch.stack(state.timesteps)  # (steps, B)
        check_finite(losses, self.folder, s, state)
        curriculum.observe(state.step - len(losses), losses.mean(1).tolist())
        losses = losses * eps_loss_factor(config.predict, NOISE)[t]  # reported losses are those of eps
        group = np.searchsorted(LOSS_GROUPS, t.flatten().numpy(), side="right") - 1
        sums = np.bincount(group, losses.flatten().numpy(), len(LOSS_GROUPS))
        counts = np.bincount(group, minlength=len(LOSS_GROUPS))
        now, k = time.time(), max(flops.channels(config, curriculum.t_low).values(), default=None)
        rate = (state.step - self.clock_step) * s.batch_size / (now - self.clock - self.paused)
        line = dict(step=state.step, loss=losses.mean().item(),
                    loss_by_group=[float(a / n) if n else None for a, n in zip(sums, counts)], lr=lr,
                    stage=curriculum.stage, t_low=curriculum.t_low, t_high=s.t_last, active_rank=k,
                    images_per_s=rate, flops=state.spent)
        if self.processes.number == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        left = (now - self.begin) / (state.step - self.begin_step) * (s.steps - state.step)
        show_progress(f"step {state.step}/{s.steps}, loss {line['loss']:.4f}, lr {lr:.1e}, "
                      f"stage {curriculum.stage + 1}/{len(curriculum.starts)}, " + (f"rank {k}, " if k else "")
                      + f"{rate:.0f} images/s, {duration(left)} left")
        state.losses, state.timesteps = [], []
        self.clock, self.clock_step, self.paused = now, state.step, 0.0


def save_samples(folder: Path, name: str, s: Settings, state: State, dataset: Dataset, processes: Processes) -> Path:
    if processes.number == 0:
        images, _ = draw_images(state.ema, range(100), list(range(len(dataset.classes))), guidance=s.guidance)
        save_grid(folder / "samples" / name, images, grid_columns(len(dataset.classes)))
    return folder / "samples" / name


def masked_cost(s: Settings, config: Config, processes: Processes) -> int:
    """Multiply-adds of a step without slices or a curriculum."""
    return flops.train_step(config, [s.t_first] * s.batch_size, 1, s.t_first, s.orthogonality > 0, processes.count)


def print_summary(folder, s: Settings, given: dict, state: State, dataset: Dataset, processes, dtype) -> None:
    """What will be trained, and a line for each flag that was given and changes nothing."""
    config, per_step = state.model.config, masked_cost(s, state.model.config, processes)
    full = parameter_count(replace(config, method="full"))
    print(f"run         {folder}" + (f", going on after step {state.step}" if state.step else ""))
    print(f"device      {processes.device}, {str(dtype).removeprefix('torch.')}" + (", compiled" if s.compile else "")
          + (f", {processes.count} processes" if processes.count > 1 else ""))
    print(f"data        {dataset.name}: {len(dataset.images):,} images {config.image_size}x{config.image_size}, "
          f"{len(dataset.classes) or 'no'} classes")
    print(f"model       {s.model}, {config.method}" + ("" if config.method == "full" else f" keep {config.keep:g}")
          + f", predicts {config.predict}: {parameter_count(config):,} parameters (full rank {full:,})")
    for line in rank_summary(config):
        print(f"           {line}")
    print(f"cost        {per_step:.3g} multiply-adds a step of {s.batch_size}, {per_step * s.steps:.3g} in "
          f"{s.steps:,} steps" + (", less what slices and curriculum save" if config.rank_schedule() else ""), flush=True)
    for applies, names, why in (
            (config.method == "full", ("keep", "factorise", "dense_mlp_blocks", "orthogonality"), "--method full"),
            (config.rank_schedule() is None, ("rank_profile", "rho_min", "warm_start", "rank_multiple", "slices"),
             f"--method {config.method} uses the same channels at every t"),
            (s.curriculum_groups <= 1, ("curriculum_share", "curriculum_alpha", "curriculum_sampling", "restart"),
             "there is no curriculum"),
            (not dataset.classes, ("label_dropout", "guidance"), "the images have no classes")):
        for name in given:
            if applies and name in names:
                print(f"note: {flag(name)} has no effect: {why}")


def print_end(folder: Path, s: Settings, state: State, dataset: Dataset, processes: Processes, log: Log) -> None:
    saved = 1 - state.spent / (masked_cost(s, state.model.config, processes) * s.steps)
    print(f"done, {duration(time.time() - log.begin)} in this call: {state.spent:.3g} multiply-adds"
          + (f", {saved:.1%} less than without curriculum and slices" if saved > 0 else ""))
    if s.sample_every:
        picture = save_samples(folder, "final.png", s, state, dataset, processes)
        names = dataset.classes if len(dataset.classes) == grid_columns(len(dataset.classes)) else []
        print(f"picture     {picture}" + (f" (columns: {', '.join(names)})" if names else ""))
    print(f"more        python sample.py --run {folder}")
    print(f"losses      python experiments/curves.py {folder}")


if __name__ == "__main__":
    run_script(main)
