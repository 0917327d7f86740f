"""Trains a diffusion transformer, by default a noise-adaptive low-rank one (NA-LR).

    python train.py                                     shapes, model tiny: minutes on a laptop
    python train.py --dataset cifar10                   the paper's run (DiT-S/2, 800,000 steps): a GPU
    python train.py --dataset FOLDER --model tiny       your own images: a folder, class folders, .zip, .npz
    python train.py --method elastic                    one model for every budget of sampling
    python train.py --resume                            go on with the newest run
    torchrun --nproc_per_node=4 train.py ...            the same steps, shared out to four GPUs

The defaults are those of D.1, for every DiT-* model; tiny and small have their own (OTHER_DEFAULTS).
The warm-up is never longer than 5 % of the steps, and the EMA of a short run forgets faster.
A run folder holds config.json, metrics.jsonl, state.pt (to go on), model.pt (EMA, to sample) and samples/.
Read model.py and curriculum.py before, sample.py after.
"""

import contextlib
import copy
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

import flops
from curriculum import TIMESTEPS, Curriculum, base_distribution, clts, cluster_timesteps
from data import DATASETS, Dataset, batch_indices, decode, open_source, to_unit
from lowrank import orthogonality_penalty
from model import PRESETS, SIZES, Config, DiT, preset_config, summary
from sample import draw_images, grid_columns, save_grid, save_model
from schedule import (WEIGHTINGS, T, NoiseSchedule, add_noise, elastic_shares, eps_loss_factor, loss_weight,
                      speed_tau, target)
from script import (DEVICES, DTYPES, InputError, Parser, Processes, Stop, add_flags, check_fields,
                    duration, end_progress, flag, newest_run, numbered_folder, one_line, pick_device,
                    pick_dtype, read_checkpoint, run_script, setting, show_progress, start_run, to_device,
                    write_then_rename)

# ----------------------------------------------------------------------------------------------------
# Settings. Those of the model are in model.py: Config.


@dataclass(frozen=True)
class Settings:
    """How to train. None where `choose_settings` or the machine decides."""
    dataset: str = setting("shapes", f"{', '.join(DATASETS)}, or a folder, .zip or .npz", metavar="NAME|PATH")
    data_dir: str = setting("data", "where named datasets and decoded caches are kept", metavar="DIR")
    image_size: int | None = setting(None, "draw shapes (16), or crop and resize files, to this size",
                                     low=1, high=2**15)
    model: str = setting("DiT-S/2", f"{', '.join(SIZES)} with /2, /4, /8; small: photographs on a CPU; "
                         "tiny: the default for shapes", choices=PRESETS, metavar="NAME")
    steps: int = setting(800_000, "optimiser steps", low=1)
    batch_size: int = setting(128, "images per step", low=1, high=2**31)
    lr: float = setting(1e-4, "base learning rate of AdamW; decays to zero by a cosine", above=0)
    warmup: int = setting(3000, "warm-up steps, at most 5 % of all", low=0)
    ema_decay: float = setting(0.9999, "of the weights that sampling uses", low=0, high=1)
    label_dropout: float = setting(0.1, 'chance that a label becomes "no class"', low=0, high=1)
    flip: bool = setting(True, "random horizontal flips")
    orthogonality: float = setting(1e-4, "weight of the orthogonality penalty", low=0)
    curriculum_groups: int = setting(10, "timestep groups, 0 = off; off unless iso-*",
                                     low=0, high=50)  # the rate would be zero with the 51st (C.3.4)
    curriculum_share: float = setting(0.4, "its longest, as share of the steps; 1: no limit", above=0, high=1)
    curriculum_alpha: float = setting(0.05, "of the loss's EMA, whose plateau brings a group", low=0, high=1)
    curriculum_sampling: str = setting("progressive", "C.3.3, or all timesteps that are in alike",
                                       choices=("progressive", "uniform"))
    restart: bool = setting(True, "fresh optimiser state and learning rate with each group (C.3.4)")
    timesteps: str = setting("uniform", "how t is drawn; stratified: each batch over all noise levels",
                             choices=TIMESTEPS)
    distil: float = setting(0.0, "elastic: weight of the error against the full-rank prediction", low=0)
    weighting: str = setting("none", "of the loss along t, with mean 1", choices=WEIGHTINGS)
    seed: int = setting(0, "of weights, data order, noise, timesteps and drawn shapes", low=0, high=2**31)
    slices: int | None = setting(None, "parts of a batch that compute only the channels they need; same "
                                 "result as 1, plain masking (default 4 for DiT-* on a CPU, else 1)", low=1)
    device: str = setting("auto", "where to train", choices=DEVICES)
    dtype: str | None = setting(None, "of matrix products (default bfloat16 on CUDA)", choices=DTYPES)
    compile: bool = setting(False, "torch.compile the model")
    log_every: int = setting(50, "steps per line of metrics.jsonl; the curriculum reads then", low=1)
    save_every: int = setting(5000, "steps per state.pt and model.pt", low=1)
    sample_every: int = setting(20_000, "steps per sample grid; 0: none, not even at the end", low=0)
    guidance: float = setting(2.0, "guidance scale of this run's samples", metavar="W")

    def __post_init__(self):
        check_fields(self)


OTHER_DEFAULTS = {  # of a preset
    "tiny": dict(steps=3000, batch_size=64, lr=2e-3, warmup=100, ema_decay=0.998, curriculum_share=0.2,
                 log_every=20, save_every=500),
    "small": dict(steps=6600, lr=1e-3, warmup=300, ema_decay=0.999, save_every=250),
}

# What a resumed run may be told anew; everything else would make it another run (`Run.identity`)
MAY_CHANGE = {"dataset", "data_dir", "image_size", "steps", "lr", "device", "dtype", "compile", "save_every",
              "guidance", "sample_every", "slices"}


def choose_settings(given: dict) -> Settings:
    """The flags that were given, and defaults that depend on dataset, model or method. Raises InputError."""
    model = given.get("model", "tiny" if given.get("dataset", "shapes") == "shapes" else Settings.model)
    depends = dict(model=model) | OTHER_DEFAULTS.get(model, {})
    if not given.get("method", Config.method).startswith("iso"):
        depends["curriculum_groups"] = 0
    return Settings(**(depends | {f.name: given[f.name] for f in fields(Settings) if f.name in given}))


def learning_rate(step: int, start: int, stage: int, s: Settings) -> float:
    """Linear warm-up, then a cosine to zero at the last step; afresh from `start`, the step at which
    curriculum stage `stage` began, with 2 % less for each introduction and a fifth of the warm-up.
    NA-LR D.1, C.3.4; that the decay is a cosine is our choice."""
    warmup = min(s.warmup, 0.05 * s.steps) * (1 if stage == 0 else 0.2)
    base = s.lr * (1 - 0.02 * stage)
    if step - start < warmup:
        return base * min(1, (step - start + 1) / warmup)
    progress = (step - start - warmup) / (s.steps - start - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------------------
# What is trained, and one training step


class State:
    """Everything that changes while a run trains, and so is saved for it to go on to the same last bit."""

    def __init__(self, s: Settings, config: Config, device: torch.device):
        torch.manual_seed(s.seed)
        self.model = DiT(config).to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=s.lr, weight_decay=0.0,
                                           fused=device.type in ("cpu", "cuda"))
        noise = self.model.noise_schedule
        starts = cluster_timesteps(noise.log_snr, max(1, s.curriculum_groups))
        base = base_distribution(s.timesteps, noise.alpha_bar, speed_tau(noise))
        self.curriculum = Curriculum(starts, T, s.steps, s.curriculum_share, alpha=s.curriculum_alpha,
                                     base=base, progressive=s.curriculum_sampling == "progressive")
        self.host_rng = torch.Generator().manual_seed(s.seed)  # of timesteps and elastic shares
        self.device_rng = torch.Generator(device).manual_seed(s.seed + 2**31)  # of flips, labels and noise
        self.step, self.spent, self.lines = 0, 0, 0  # steps done; multiply-adds spent; lines logged
        self.losses, self.timesteps = [], []  # of each step since the last line: this process's, all t


class Batch(NamedTuple):
    """By falling rank: the samples that need most channels first."""
    x_0: torch.Tensor  # (B, C, H, W): images in [-1, 1], or latents of mean 0, deviation 1
    y: torch.Tensor  # (B,) labels, or the number of classes for "no class"
    eps: torch.Tensor  # (B, C, H, W)
    t: torch.Tensor  # (B,) on the CPU: channels are chosen there, and no device has to be asked
    share: torch.Tensor | float | None = None  # of the channels: (B,) on the CPU; judging, one for all

    def part(self, rows: slice) -> "Batch":
        return Batch(*(None if x is None else x[rows] for x in self))

    def slices(self, n: int) -> list["Batch"]:
        """At most n parts, of equal size or one apart."""
        split = (x.tensor_split(min(n, len(self.t))) for x in self if x is not None)
        return [Batch(*part) for part in zip(*split)]


def draw_batch(dataset: Dataset, state: State, s: Settings) -> Batch:
    """The whole next batch: every process draws it, and trains on its part."""
    config, device, rng = state.model.config, dataset.images.device, state.device_rng
    index = batch_indices(len(dataset.images), state.step, s.batch_size, s.seed, device)
    x_0, y = dataset.images[index], dataset.labels[index]
    if s.flip and not config.mean:  # a mirrored image has other latents than mirrored ones
        flipped = torch.rand(len(x_0), 1, 1, 1, device=device, generator=rng) < 0.5
        x_0 = torch.where(flipped, x_0.flip(3), x_0)
    dropout = s.label_dropout if dataset.classes else 1.0
    dropped = torch.rand(len(y), device=device, generator=rng) < dropout
    y = torch.where(dropped, config.num_classes, y)  # "no class"
    eps = torch.randn(x_0.shape, device=device, generator=rng)
    if s.timesteps.startswith("clts"):  # the others stand still
        state.curriculum.base = clts(T, state.step / s.steps)
    t = state.curriculum.sample(s.batch_size, state.host_rng, s.timesteps.endswith("stratified"))
    share = None
    if config.method == "elastic":
        t = t[torch.randperm(len(t), generator=state.host_rng)]  # it comes ascending, and share falling
        share = elastic_shares(len(t), config.rho_min, state.host_rng)
    elif state.model.rank_schedule:
        phi = state.model.rank_schedule.active(t, max(state.model.ranks))
        t = t[phi.argsort(descending=True, stable=True)]  # the order it has already if Phi falls with t
    return Batch(to_unit(x_0, config.mean, config.std), y, eps, t, share)


def denoising_loss(net, model: DiT, batch: Batch, dtype: torch.dtype = torch.float32, distil: float = 0.0):
    """The squared error of what the model predicts, mean over pixels: float32 (B,), unweighted; and what
    training minimises, the same plus `distil` times the squared difference to what the model predicts with
    all its channels. net: the model, or what runs it (compiled, in parallel)."""
    device = batch.x_0.device
    signal, noise = (to_device(a, device) for a in model.noise_schedule.coefficients(batch.t))
    x_t, t = add_noise(batch.x_0, batch.eps, signal, noise), to_device(batch.t, device)
    active = model.active(batch.t, batch.share)  # how many channels each sample may use: decided here, once
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with autocast:
        output = net(x_t, t, batch.y, active).float()
    wanted = target(model.config.predict, batch.x_0, batch.eps, signal, noise)
    error = (output - wanted).square().mean((1, 2, 3))
    if distil == 0 or batch.share is None:  # without shares, every sample uses all the channels that it may
        return error, error
    n = int((batch.share == 1).sum())  # the first ones have used all their channels already
    with torch.no_grad(), autocast:
        full = torch.cat([output[:n], model(x_t[n:], t[n:], batch.y[n:]).float()])
    return error, error + distil * (output - full).square().mean((1, 2, 3))


def train_step(net, state: State, batch: Batch, s: Settings, slices: int = 1,
               dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One step of AdamW on a batch; returns its denoising losses (B,), unweighted.

    The batch is cut into slices, and each is an ordinary masked pass, NA-LR Eq. (4), which computes only the
    channels that its neediest sample uses, Eq. (5). Gradients accumulate to those of the whole batch; one
    slice is the paper's masking.
    """
    model, probabilities = state.model, state.curriculum.probabilities()
    weight = loss_weight(s.weighting, model.noise_schedule, model.config.predict, probabilities)  # (T + 1,)
    losses = []
    parts = batch.slices(slices)
    for part in parts:
        is_last = part is parts[-1]
        wait = not is_last and hasattr(net, "no_sync")  # processes average once, with the last slice
        with net.no_sync() if wait else contextlib.nullcontext():
            error, objective = denoising_loss(net, model, part, dtype, s.distil)  # (B of the slice,)
            loss = (to_device(weight[part.t].float(), objective.device) * objective).sum() / len(batch.t)
            if is_last and s.orthogonality > 0 and model.ranks:
                active = model.active_from(state.curriculum.t_low)
                loss = loss + s.orthogonality * orthogonality_penalty(model, active)
            loss.backward()
        losses.append(error.detach())
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return torch.cat(losses)


@torch.no_grad()  # or every step would leave a piece of graph behind
def update_ema(state: State, s: Settings) -> None:
    """ema <- d ema + (1 - d) w, with a d that grows from 1/10, so that short runs forget their start."""
    decay = min(s.ema_decay, (1 + state.step) / (10 + state.step))
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - decay)


def run_steps(run: "Run", take_step: Callable[[Batch], torch.Tensor],
              before_save: Callable[[], None] = lambda: None) -> None:
    """From where the run stands to its last step; Ctrl-C ends it after a step, with everything saved.

    take_step: moves the weights, counts in state.spent what that costs, and gives the losses (B,) of this
    process's part of the batch
    """
    s, state, processes = run.s, run.state, run.processes
    stop, stopping = Stop(), False
    clock, timed_from = time.time(), state.step
    while state.step < s.steps and not stopping:
        if state.curriculum.advance(state.step) and s.restart:
            state.optimizer.state.clear()  # C.3.4; the EMA of the weights goes on
        start, stage = (state.curriculum.start, state.curriculum.stage) if s.restart else (0, 0)
        lr = learning_rate(state.step, start, stage, s)
        state.optimizer.param_groups[0]["lr"] = lr
        batch = draw_batch(run.dataset, state, s)
        state.losses.append(take_step(batch))
        state.timesteps.append(batch.t)
        update_ema(state, s)
        state.step += 1

        logged = len(state.losses) == s.log_every or state.step == s.steps
        if logged:
            write_log(run, lr, (state.step - timed_from) * s.batch_size / (time.time() - clock))
        if processes.count == 1 or logged:  # several: after a log line, where they have met
            stopping = any(processes.gather(stop.asked))
        if state.step % s.save_every == 0 or state.step == s.steps or stopping:
            before_save()
            save(run)
        due = run.may_draw and state.step % s.sample_every == 0 and state.step < s.steps
        if due and state.curriculum.t_low == 1:  # a picture takes all timesteps
            run.draw(f"step_{state.step:07d}.png")
        if logged:  # images per second are counted from after what was saved and drawn
            clock, timed_from = time.time(), state.step

    stop.restore_handlers()
    end_progress()
    if state.step < s.steps:
        print(f"stopped after step {state.step}, all is saved in {run.folder}; go on with the same command "
              f"(train.py: --resume --out {run.shown_folder})", file=sys.stderr)
        sys.exit(130)


# ----------------------------------------------------------------------------------------------------
# The script


def main(argv: list[str] | None = None) -> None:
    """argv: the command line, for scripts that train; default what was typed."""
    run, given = open_run(argv)
    s, state, processes, device = run.s, run.state, run.processes, run.processes.device
    dtype = pick_dtype(s.dtype, device)
    print_summary(run, given, dtype)
    net = torch.compile(state.model) if s.compile else state.model
    if processes.count > 1:  # averages the gradients; all weights are alike from the start
        net = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    slices = s.slices or (4 if s.model.startswith("DiT") and device.type == "cpu" else 1)
    mine = slice(processes.number, None, processes.count)  # by falling rank: as much work as the others'

    def take_step(batch: Batch) -> torch.Tensor:
        state.spent += flops.train_step(state.model.config, batch.t.tolist(), slices, state.curriculum.t_low,
                                        s.orthogonality > 0, processes.count, batch.share, s.distil > 0)
        return train_step(net, state, batch.part(mine), s, slices, dtype)

    begin = time.time()
    run_steps(run, take_step)
    masked, saved = run.masked_cost * s.steps, ""  # of typical batches
    if (slices > 1 or s.curriculum_groups > 1) and state.spent < masked:
        saved = f", {1 - state.spent / masked:.1%} less than with masks alone"
    print(f"done        {flops.amount(state.spent)} multiply-adds{saved}; "
          f"{duration(time.time() - begin)} in this call")
    if run.may_draw:
        print(f"picture     {run.draw('final.png')}")
    print(f"more        python sample.py --run {run.shown_folder}")
    print(f"losses      python experiments/curves.py {run.shown_folder}")


# ====================================================================================================
# Below this line: what is saved, the run folder, what is printed. Of the method only the losses that the
# curriculum sees (write_log).


@dataclass
class Run:
    """What saving and printing need to know."""
    folder: Path
    s: Settings
    state: State
    dataset: Dataset
    processes: Processes

    @property
    def identity(self) -> dict:
        """What must be the same for a run to go on. A dataset may move; of its images only number, size and
        classes are compared."""
        fixed = {name: value for name, value in asdict(self.s).items() if name not in MAY_CHANGE}
        images = f"{len(self.dataset.images)} images of classes {', '.join(self.dataset.classes)}"
        return fixed | asdict(self.state.model.config) | {"dataset": images}

    @property
    def shown_folder(self) -> str:
        """For a command that a person copies."""
        return shlex.quote(str(self.folder))

    @property
    def may_draw(self) -> bool:
        """Whether this process draws sample grids. Latents are no pictures."""
        return self.s.sample_every > 0 and not self.state.model.config.mean and self.processes.number == 0

    def draw(self, name: str) -> Path:
        path = self.folder / "samples" / name
        classes = range(len(self.dataset.classes))
        images, _ = draw_images(self.state.ema, range(100), classes, guidance=self.s.guidance)
        save_grid(path, images, grid_columns(len(classes)))
        return path

    @property
    def masked_cost(self) -> int:
        """Multiply-adds of a step without slices or a curriculum."""
        s, config = self.s, self.state.model.config
        return flops.training_run(config, 1, s.batch_size, penalty=s.orthogonality > 0, distil=s.distil > 0)

    def all_losses(self) -> torch.Tensor:
        """Of whole batches since the last line, (steps, B) on the CPU; only this awaits the device. Raises
        InputError if they or the weights are not finite."""
        mine = torch.stack(self.state.losses).cpu() if self.state.losses else torch.zeros(0, 0)
        losses = torch.stack(self.processes.gather(mine), dim=2).flatten(1)
        norms = torch.stack(torch._foreach_norm(list(self.state.model.parameters())))
        if not (losses.isfinite().all() and norms.isfinite().all()):
            end_progress()
            raise InputError(f"the loss stopped being finite before step {self.state.step}; take a lower "
                             f"learning rate: train.py --resume --out {self.shown_folder} "
                             f"--lr {self.s.lr / 2:g} goes on from what was saved before")
        return losses


def save(run: Run) -> None:
    """Writes model.pt and state.pt. Raises InputError instead if a number in them is not finite."""
    state, losses = run.state, run.all_losses()
    if run.processes.number:
        return
    save_model(run.folder / "model.pt", state.ema, run.dataset.classes, run.s.guidance, state.step)
    # last: a kill between the two is made good when the run goes on from the older state
    everything = vars(state) | dict(
        model=state.model.state_dict(), ema=state.ema.state_dict(), optimizer=state.optimizer.state_dict(),
        curriculum=state.curriculum.state_dict(), host_rng=state.host_rng.get_state(),
        device_rng=state.device_rng.get_state(), losses=list(losses), settings=run.identity,
        device=run.processes.device.type)
    write_then_rename(run.folder / "state.pt", lambda file: torch.save(everything, file))


def load(run: Run) -> None:
    """Goes on from state.pt. Raises InputError if that is damaged or of another run."""
    path, now = run.folder / "state.pt", run.identity
    saved = read_checkpoint(path, (*vars(run.state), "device", "settings"))
    try:
        differ = [f"{flag(name)} {str(now.get(name))[:40]} (the run has {str(was)[:40]})"
                  for name, was in saved["settings"].items() if was != now.get(name)]
        if differ:
            raise ValueError("cannot resume with other settings or images, but train a new run: "
                             f"{', '.join(differ)}")
        restore(run.state, saved, run.processes)
        if run.state.step > run.s.steps:
            raise ValueError(f"it has trained {run.state.step} steps, --steps {run.s.steps} takes none back")
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path} does not fit: {one_line(error)}") from None


def restore(state: State, saved: dict, processes: Processes) -> None:
    """saved: with the losses of all processes. Any exception means that it does not fit."""
    # our own: where a state from another device says fused=False, it would not be moved to this one
    saved["optimizer"]["param_groups"] = state.optimizer.state_dict()["param_groups"]
    for name in ("model", "ema", "optimizer", "curriculum"):
        getattr(state, name).load_state_dict(saved[name])
    for p, moments in state.optimizer.state.items():  # the fused kernel does not look
        if any(moments[m].shape != p.shape for m in ("exp_avg", "exp_avg_sq")):
            raise ValueError("the optimiser's state is of other weights")
    state.step, state.spent, state.lines = (int(saved[name]) for name in ("step", "spent", "lines"))
    state.losses = [row[processes.number::processes.count].to(processes.device) for row in saved["losses"]]
    state.timesteps = list(saved["timesteps"])
    state.host_rng.set_state(saved["host_rng"])
    if saved["device"] == processes.device.type:
        state.device_rng.set_state(saved["device_rng"])
    else:  # another kind of generator: it goes on with other noise
        state.device_rng.manual_seed(state.device_rng.initial_seed() + state.step)


# ----------------------------------------------------------------------------------------------------
# The run folder


def open_run(argv: list[str] | None) -> tuple[Run, dict]:
    """The run that a command line begins or goes on with, and the flags given. Nothing is written before
    everything that a person can get wrong has been checked. Raises InputError."""
    folder, s, flags, given = read_command_line(argv)
    processes = Processes(pick_device(s.device))
    if s.batch_size % processes.count:
        raise InputError(f"--batch-size {s.batch_size} must be a multiple of the {processes.count} processes")
    if processes.number:
        processes.gather(None)  # waits for the first one: what that downloads or caches, the others find
    source = open_source(s.dataset, s.data_dir, image_size=s.image_size, seed=s.seed)
    first, classes = source.read(0, 1), len(source.classes)
    channels, height, width = first.shape[1:]
    if height != width:
        raise InputError(f"{source.name} has images of {width}x{height}; they must be square: --image-size N "
                         "makes those of a folder or ZIP so")
    facts = dict(num_classes=classes)
    if first.dtype != torch.uint8:
        facts |= facts_of_latents(source.read(0, source.n))
    config = preset_config(s.model, flags | {"image_size": height}, **facts)
    if bool(config.mean) != (first.dtype != torch.uint8):
        raise InputError(f"one of {source.name} and what the run was trained on holds latents, one images")
    if config.num_classes < classes or config.channels != channels:
        raise InputError(f"{source.name} has {classes} classes and {channels} channels, "
                         f"the model only {config.num_classes} and {config.channels}")
    dataset = decode(source, s.data_dir).to(processes.device)  # last: of a large folder it takes minutes
    if not processes.number:
        processes.gather(None)
    if folder is None:
        name = f"{Path(s.dataset).stem}-{s.model.replace('/', '-')}-{config.method}"
        folder = processes.gather(numbered_folder(Path("runs"), name))[0]
    run = Run(folder, s, State(s, config, processes.device), dataset, processes)
    if (folder / "state.pt").exists():
        load(run)
    if processes.number == 0:
        start_run(folder, dict(model=asdict(config), train=asdict(s)), run.state.lines)
    return run, given


def facts_of_latents(latents: torch.Tensor) -> dict:
    """What a model of such latents, float (N, C, H, W), is made for, and predicts unless told otherwise:
    unclipped, as they must be, eps would multiply errors by 20,291 at t = T."""
    std, mean = zip(*(torch.std_mean(channel.float(), correction=0) for channel in latents.unbind(1)))
    mean, std = torch.stack(mean).tolist(), torch.stack(std).tolist()
    return dict(channels=len(mean), mean=mean, std=std, predict="v")


RUN_FILES = ("config.json", "metrics.jsonl")  # what a run writes before its first save


def read_command_line(argv: list[str] | None):
    """(run folder, None where one is to be made; settings; all flags, where a run goes on with those that it
    has; those given)"""
    own = (f"{model}: " + " ".join(f"{flag(name)} {value}" for name, value in defaults.items())
           for model, defaults in OTHER_DEFAULTS.items())
    parser = Parser(description=__doc__, epilog="defaults of " + "\nand of ".join(own))
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: a new one under runs/)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out (default: the newest under runs/)")
    add_flags(parser.add_argument_group("training"), Settings)
    add_flags(parser.add_argument_group("model"), Config)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    folder, resume, flags = given.pop("out", None), given.pop("resume"), given
    if resume:
        folder = folder or newest_run(file="config.json")
        if not given and not (folder / "config.json").exists():  # with flags it may begin: a job killed early
            raise InputError(f"--resume: {folder} holds no run; name the folder of one")
        if (folder / "config.json").exists():
            config, s = read_config(folder)
            flags = asdict(config) | asdict(s) | given
    elif folder and (folder / "state.pt").exists():
        raise InputError(f"{folder} already holds a run; go on with it by --resume, or choose another --out")
    elif folder and any((folder / name).exists() for name in RUN_FILES):
        read_config(folder)  # refuses files of others; a run that ended before its first save begins afresh
    return folder, choose_settings(flags), flags, given


def read_config(folder: Path) -> tuple[Config, Settings]:
    """Model and settings of a run, from its config.json. Raises InputError."""
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_bytes())
        return Config(**saved["model"]), Settings(**saved["train"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a run's settings, or those of an older version, whose runs still "
                         f"sample but cannot go on; choose another --out ({one_line(error)})") from None


# ----------------------------------------------------------------------------------------------------
# What is logged and printed


@functools.cache
def loss_groups(noise: str) -> list[int]:
    """First timesteps of the groups of `loss_by_group`, B.1."""
    return cluster_timesteps(NoiseSchedule(noise).log_snr, 5)


def write_log(run: Run, lr: float, images_per_s: float) -> None:
    """A line of metrics.jsonl on the steps since the last one; the curriculum sees their losses. Those of an
    elastic model are of the shares that were drawn, and do not compare with other methods'."""
    s, state, config, curriculum = run.s, run.state, run.state.model.config, run.state.curriculum
    losses, t = run.all_losses().double(), torch.stack(state.timesteps)  # (steps, B)
    curriculum.observe(state.step - len(losses), losses.mean(1).tolist())
    losses = losses * eps_loss_factor(config.predict, state.model.noise_schedule)[t]  # reported: those of eps
    starts = loss_groups(config.noise)
    by_group = [losses[(first <= t) & (t < end)] for first, end in zip(starts, [*starts[1:], T + 1])]
    k = max(flops.active_channels(config, *range(curriculum.t_low, T + 1)).values(), default=None)
    line = dict(step=state.step, loss=losses.mean().item(),
                loss_by_group=[x.mean().item() if len(x) else None for x in by_group], lr=lr,
                stage=curriculum.stage, t_low=curriculum.t_low, t_high=T, active_rank=k,
                images_per_s=images_per_s, flops=state.spent)
    if run.processes.number == 0:
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    left = (s.steps - state.step) * s.batch_size / images_per_s
    show_progress(f"step {state.step}/{s.steps}, loss {line['loss']:.4f}, lr {lr:.1e}, "
                  f"stage {curriculum.stage + 1}/{len(curriculum.starts)}, rank {k or 'full'}, "
                  f"{images_per_s:.0f} images/s, {duration(left)} left")
    state.losses, state.timesteps, state.lines = [], [], state.lines + 1


def print_summary(run: Run, given: dict, dtype: torch.dtype) -> None:
    """What will be trained, and a line for each flag that was given and changes nothing."""
    s, state, dataset, processes = run.s, run.state, run.dataset, run.processes
    config, schedule = state.model.config, state.model.rank_schedule
    size, classes = config.image_size, len(dataset.classes) or "no"
    since = f"going on after step {state.step}" if state.step else "from the first step"
    print(f"run         {run.folder}, {since}")
    print(f"device      {processes.device}, {dtype}, processes: {processes.count}, compiled: {s.compile}")
    print(f"data        {dataset.name}: {len(dataset.images):,} images {size}x{size}, {classes} classes")
    print(f"model       {s.model}, {summary(config)}")
    print(f"cost        {flops.amount(run.masked_cost)} multiply-adds a step of {s.batch_size}, "
          f"{s.steps:,} steps {flops.amount(run.masked_cost * s.steps)}, "
          "less what slices and curriculum save", flush=True)
    for applies, names, why in (
            (config.method == "full", "keep factorise dense_mlp_blocks orthogonality", "--method full"),
            (config.method != "elastic", "distil", "only --method elastic has samples of fewer channels"),
            (not schedule, "rank_profile warm_start rank_multiple", "the method has no rank schedule"),
            (config.method in ("full", "static"), "rho_min slices", "every sample uses all channels"),
            (schedule and isinstance(config.rank_profile, tuple), "rho_min warm_start",
             "the rank profile says it all"),
            (s.curriculum_groups <= 1, "curriculum_share curriculum_alpha curriculum_sampling restart",
             "there is no curriculum"),
            (not dataset.classes, "label_dropout guidance", "the images have no classes"),
            (state.step == s.steps, "guidance", "the run is finished; sample.py takes it"),
            (config.mean, "flip sample_every", "latents are not flipped, and only sample.py draws them")):
        for name in names.split():
            if applies and name in given:
                print(f"note: {flag(name)} has no effect: {why}")
    if dataset.classes and s.label_dropout == 0:
        print('note: "no class" is not trained without --label-dropout: sample with --guidance 1')
    if dataset.classes and s.label_dropout == 1:
        print("note: no class is trained with --label-dropout 1: sample with --guidance 0")
    known = dataset.labels.unique().tolist()
    if missing := [name for label, name in enumerate(dataset.classes) if label not in known]:
        print(f"note: no image is of class {', '.join(missing[:10])}; leave it out in sample.py (--classes)")


if __name__ == "__main__":
    run_script(main)
