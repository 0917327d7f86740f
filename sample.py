"""Samplers (DDIM, DDPM, Heun, DPM-Solver++), guidance, and the script that draws images from a trained run.

    python sample.py                            100 images of all classes from the newest run, as a grid
    python sample.py --classes 3,9 --num 16     sixteen images of classes 3 and 9 in turn
    python sample.py --num 500 --out x.npz      a file for fid.py
    python sample.py --budget 0.3               a run of --method elastic, with fewer of its channels

NA-LR section 2.1 (slicing, Eq. 5) and D.1. At one t all images share the active rank, so every
low-rank layer multiplies by its first Phi(t) channels only. Read schedule.py and model.py before.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import flops
from data import IMAGE_ENDINGS, from_unit
from model import Config, DiT, read_profile
from schedule import T, NoiseSchedule, Shares, predicted_x_0_and_eps, sampling_timesteps
from script import (DEVICES, DTYPES, InputError, Parser, add_flags, check_fields, check_writable,
                    duration, end_progress, newest_run, one_line, pick_device, pick_dtype, read_checkpoint,
                    read_torchscript, run_script, setting, show_progress, write_then_rename)

# ----------------------------------------------------------------------------------------------------
# From the model to x_0 and eps

Predictor = Callable[[torch.Tensor, int], torch.Tensor]  # (x, t) -> what is predicted, such as eps


def guided(model: DiT, y: torch.Tensor | None, guidance: float, shares: Shares = Shares()) -> Predictor:
    """The model's answer with classifier-free guidance (Ho and Salimans 2022): out_u + w (out_c - out_u).
    Whatever the model predicts is linear in eps at a given x, so this is their formula for eps.

    y: int64 (B,), or None for "no class". `Shares.passes` says which passes are needed; two of equal rank run
    as one batch.
    """
    def answer(x, t, y, share):
        active = model.active(t, share)
        return model(x, torch.full_like(y, t), y, active).float()

    def output(x, t):
        none = torch.full((len(x),), model.config.num_classes, device=x.device)  # the label of "no class"
        label = none if y is None else y
        weak_label = label if shares.guide_class == "same" else none  # what the second pass is told
        share, weak_share = shares.passes(t, guidance, labelled=y is not None)
        if weak_share is None:
            return answer(x, t, label, share)
        if share is None:
            return answer(x, t, weak_label, weak_share)
        if share == weak_share:
            out_c, out_u = answer(torch.cat([x, x]), t, torch.cat([label, weak_label]), share).chunk(2)
        else:
            out_c, out_u = answer(x, t, label, share), answer(x, t, weak_label, weak_share)
        return out_u + guidance * (out_c - out_u)

    return output


def noise_of(model: DiT | Predictor) -> NoiseSchedule:
    """The model's own, or the cosine schedule."""
    return model.noise_schedule if isinstance(model, DiT) else NoiseSchedule()


def denoiser(model: DiT | Predictor, y: torch.Tensor | None, guidance: float, clip: bool,
             shares: Shares = Shares()):
    """(x, t) -> (x_0, eps), as the model sees them in x. x_0 comes from the model's own answer: by way of eps
    in float32 it would lose four digits at t = T. model: a DiT, used with labels y and guidance, or any
    callable eps(x, t).

    clip: x_0 is clipped to [-1, 1] and eps made to fit it; why, `schedule.predicted_x_0_and_eps` says.
    Latents, which have no bounds, are never clipped."""
    alpha_bar = noise_of(model).alpha_bar.tolist()  # Python floats: float64
    output, predict = model, "eps"
    if isinstance(model, DiT):
        output, predict = guided(model, y, guidance, shares), model.config.predict
        clip = clip and not model.config.mean

    def x_0_and_eps(x, t):
        signal, noise = alpha_bar[t] ** 0.5, (1 - alpha_bar[t]) ** 0.5
        x_0, eps = predicted_x_0_and_eps(predict, output(x, t), x, signal, noise)
        if clip:
            x_0 = x_0.clamp(-1, 1)
            eps = (x - signal * x_0) / noise
        return x_0, eps

    return x_0_and_eps


# ----------------------------------------------------------------------------------------------------
# Samplers: generators that yield x after every step, the last one being the image in [-1, 1]


@torch.no_grad()
def ddim(model: DiT | Predictor, x: torch.Tensor, steps: int = 100, y: torch.Tensor | None = None,
         guidance: float = 2.0, clip: bool = True, shares: Shares = Shares(),
         timesteps: list[int] | None = None) -> Iterator[torch.Tensor]:
    """Deterministic DDIM (Song et al. 2021, Eq. 12 with eta = 0).

    model: a DiT, used with labels y, guidance and shares, or any callable eps(x, t) with an int t. To compile
    a DiT call `model.compile()`: what `torch.compile(model)` returns is no DiT any more
    x: noise (B, C, H, W), or x_t at the first of the timesteps
    timesteps: to visit, decreasing, the last one that of the result; default `sampling_timesteps(steps)`
    Yields x at each timestep but the first.
    """
    denoise, alpha_bar = denoiser(model, y, guidance, clip, shares), noise_of(model).alpha_bar.tolist()
    for t, t_next in pairwise(timesteps or sampling_timesteps(steps)):
        x_0, eps = denoise(x, t)
        x = alpha_bar[t_next] ** 0.5 * x_0 + (1 - alpha_bar[t_next]) ** 0.5 * eps
        yield x


@torch.no_grad()
def ddpm(model, x, steps=100, y=None, guidance=2.0, clip=True, shares=Shares(), timesteps=None, noise=None):
    """Ancestral sampling on the chain of the visited timesteps (Ho et al. 2020, Eq. 6 and 7), with the
    posterior variance beta-tilde of that chain. The last step adds no noise.

    noise: () -> a new standard normal tensor like x; default: of torch's global generator. Other arguments,
    and what it yields: as `ddim`.
    """
    denoise, alpha_bar = denoiser(model, y, guidance, clip, shares), noise_of(model).alpha_bar.tolist()
    noise = noise or (lambda: torch.randn_like(x))
    for t, t_next in pairwise(timesteps or sampling_timesteps(steps)):
        ab, ab_next = alpha_bar[t], alpha_bar[t_next]
        x_0, _ = denoise(x, t)
        beta = 1 - ab / ab_next  # of the step from t_next to t
        x = ab_next**0.5 * beta / (1 - ab) * x_0 + (1 - beta) ** 0.5 * (1 - ab_next) / (1 - ab) * x
        if t_next > 0:
            x = x + (beta * (1 - ab_next) / (1 - ab)) ** 0.5 * noise()
        yield x


@torch.no_grad()
def heun(model, x, steps=100, y=None, guidance=2.0, clip=True, shares=Shares(), timesteps=None):
    """Heun's second-order method in sigma = sqrt((1 - ab) / ab) (Karras et al. 2022, Algorithm 1).

    The slope of x / sqrt(ab) by sigma is eps, so a step of DDIM is Euler's; here the slope at its end is
    averaged with that at its start, for a second pass. The step that leaves T, where sigma falls from 20,291
    to 64 (cosine, 100 steps), and the one that reaches 0 are DDIM's. Arguments and what it yields: `ddim`.
    """
    denoise, alpha_bar = denoiser(model, y, guidance, clip, shares), noise_of(model).alpha_bar.tolist()
    for t, t_next in pairwise(timesteps or sampling_timesteps(steps)):
        ab, ab_next = alpha_bar[t], alpha_bar[t_next]
        x_0, eps = denoise(x, t)
        x = ab_next**0.5 * x_0 + (1 - ab_next) ** 0.5 * eps  # Euler's step
        if t < T and t_next > 0:
            _, eps_next = denoise(x, t_next)
            sigma, sigma_next = ((1 - ab) / ab) ** 0.5, ((1 - ab_next) / ab_next) ** 0.5
            x = ab_next**0.5 * (x_0 + sigma * eps + (sigma_next - sigma) * (eps + eps_next) / 2)
        yield x


@torch.no_grad()
def dpmpp(model, x, steps=100, y=None, guidance=2.0, clip=True, shares=Shares(), timesteps=None):
    """DPM-Solver++ (2M) (Lu et al. 2022, Algorithm 2): second order at one pass a step.

    Each step is DDIM's, but towards an x_0 extrapolated from this step's and the last one's, linearly in half
    the log-SNR. The first step, which has no last one, and the one that reaches 0 are DDIM's. Arguments, and
    what it yields: as `ddim`.
    """
    denoise, alpha_bar = denoiser(model, y, guidance, clip, shares), noise_of(model).alpha_bar.tolist()
    half_log_snr = (noise_of(model).log_snr / 2).tolist()
    last_x_0, last_h = None, None
    for t, t_next in pairwise(timesteps or sampling_timesteps(steps)):
        ab, ab_next = alpha_bar[t], alpha_bar[t_next]
        h = half_log_snr[t_next] - half_log_snr[t]
        x_0, _ = denoise(x, t)
        goal = x_0  # their D = (1 + 1/2r) x_0 - 1/2r last_x_0, where r = last_h / h
        if last_x_0 is not None and t_next > 0:
            goal = x_0 + h / (2 * last_h) * (x_0 - last_x_0)
        x = ab_next**0.5 * goal + ((1 - ab_next) / (1 - ab)) ** 0.5 * (x - ab**0.5 * goal)
        last_x_0, last_h = x_0, h
        yield x


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "heun": heun, "dpm++": dpmpp}

# ----------------------------------------------------------------------------------------------------
# Images


class ImageNoise:
    """Standard normal noise with one generator per image: image i of a seed meets the same noise
    whatever batch it is drawn in, and on every device (it is drawn on the CPU). Calling it gives the
    next draw, float32 (len(indices), *shape)."""

    def __init__(self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device):
        # Philox takes (seed, image) as its key, so no two images can share a stream
        self.generators = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in indices]
        self.shape, self.device = shape, device

    def __call__(self) -> torch.Tensor:
        draws = [g.standard_normal(self.shape, dtype=np.float32) for g in self.generators]
        return torch.from_numpy(np.stack(draws)).to(self.device)


def draw_images(model: DiT, indices: range, classes: list[int], seed: int = 0, sampler: str = "ddim",
                steps: int = 100, guidance: float = 2.0, clip: bool = True, shares: Shares = Shares(),
                dtype: torch.dtype = torch.float32, on_step: Callable[[int], None] = lambda n: None):
    """Images number `indices` of this seed: uint8 (n, 3, H, W) on the CPU, or latents float32 (n, C, H, W) as
    the autoencoder gave them; and their labels (n,).

    classes: image i is of class classes[i % len(classes)]; empty for unconditional images
    dtype: of the matrix products; on_step: called with the number of sampling steps done
    """
    device = model.position.device
    noise = ImageNoise(seed, indices, (model.config.channels,) + (model.config.image_size,) * 2, device)
    labels = torch.tensor([classes[i % len(classes)] if classes else 0 for i in indices])
    y = labels.to(device) if classes else None
    more = dict(noise=noise) if sampler == "ddpm" else {}
    images = SAMPLERS[sampler](model, noise(), steps, y, guidance, clip, shares, **more)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for done, x in enumerate(images, 1):
            on_step(done)
    return from_unit(x, model.config.mean, model.config.std).cpu(), labels


# ----------------------------------------------------------------------------------------------------
# Files and the script


def save_png(path: Path, image: torch.Tensor) -> None:
    """Writes one uint8 image (3, H, W)."""
    write_then_rename(path, lambda file: Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG"))


def grid_columns(classes: int) -> int:
    """One column a class where that fits, else ten."""
    return classes if 1 < classes <= 20 else 10


def save_grid(path: Path, images: torch.Tensor, columns: int) -> None:
    """One PNG of uint8 images (n, 3, H, W), row by row, small ones enlarged by whole pixels."""
    from torchvision.utils import make_grid  # here: it brings torch's compiler, and would double every start
    scale = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    save_png(path, make_grid(images, nrow=columns, padding=2))


def save_npz(path: Path, images: torch.Tensor, labels: torch.Tensor | None) -> None:
    """What fid.py and train.py read: uint8 images (n, 3, H, W), as ADM's arr_0 (n, H, W, 3), or latents; and
    labels where there are classes."""
    arrays = dict(latents=images) if images.is_floating_point() else dict(arr_0=images.permute(0, 2, 3, 1))
    arrays |= {} if labels is None else dict(labels=labels)
    write_then_rename(path, lambda file: np.savez(file, **arrays))


def save_model(path: Path, model: DiT, classes: list[str], guidance: float, step: int) -> None:
    """Writes what `load_model` reads. guidance: the default of its samples; step: how long it has trained."""
    state = dict(config=asdict(model.config), model=model.state_dict(), classes=classes, guidance=guidance,
                 step=step)
    write_then_rename(path, lambda file: torch.save(state, file))


def load_model(run: Path, device: torch.device, file: str = "model.pt") -> tuple[DiT, dict]:
    """The EMA model of a run in evaluation mode, and the rest of its model.pt, or of another such `file`.
    Raises InputError."""
    path = Path(run) / file
    state = read_checkpoint(path, ("config", "model", "classes", "guidance", "step"))
    try:
        model = DiT(Config(**state["config"]), initialise=False)
        model.load_state_dict(state["model"])
        names, labels = state["classes"], model.config.num_classes
        if len(names) > labels or not all(isinstance(name, str) for name in names):
            raise ValueError(f"its classes are not names of {labels} labels or fewer")
        state["guidance"] = float(state["guidance"])
    except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} does not describe a model: {one_line(error)}") from None
    return model.to(device).eval().requires_grad_(False), state


def choose_classes(text: str, names: list[str]) -> list[int]:
    """'all', or numbers and names separated by commas -> class numbers; [] where the training data had no
    classes (the model may have rows for them all the same)."""
    if text == "all":
        return list(range(len(names)))
    if not names:
        raise InputError("this model was trained without classes; leave --classes out")
    index = {name: label for label, name in enumerate(names)}
    if not all(map(str.isdecimal, names)):  # or 1 would be the class 1 and the second one
        index = {str(label): label for label in range(len(names))} | index
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in index]:
        raise InputError(f"class {unknown[0]!r} is unknown: give numbers from 0 to {len(names) - 1} or names "
                         f"({', '.join(names[:20])}), or all")
    return [index[word] for word in words]


@dataclass(frozen=True)
class Options:
    """What to draw."""
    run: str | None = setting(None, "folder of a run (default: the newest under runs/)", metavar="DIR")
    num: int = setting(100, "how many images", low=1)
    first: int = setting(0, "number of the first image: image i of a seed is the same in any call, so "
                         "several processes can share out a large set", low=0)
    classes: str = setting("all", "numbers or names, e.g. 0,3 or star,heart, in turns", metavar="LIST")
    sampler: str = setting("ddim", "ddim: deterministic; ddpm: ancestral; heun, dpm++: of second order, with "
                           "nearly two passes a step, and with one", choices=SAMPLERS)
    steps: int = setting(100, "of the sampler; heun asks the model twice in most of them", low=1, high=T)
    guidance: float | None = setting(None, "eps = eps_u + W (eps_c - eps_u); 1 is plain conditional "
                                     "(default: the run's)", metavar="W")
    budget: float | None = setting(None, "elastic runs: multiply-adds of a pass as a share of those of all "
                                   "channels (default 1)", above=0, high=1)
    ranks: str | None = setting(None, "elastic runs, instead: a file of shares of the channels over t, "
                                'such as {"t": [1, 500], "share": [0.5, 0.25]}', metavar="FILE.json")
    guide_share: float = setting(1.0, "elastic runs: largest share of the channels in the second pass of "
                                 "guidance, such as 0.25", above=0, high=1)
    guide_class: str = setting("none", "what the second pass is told; same: the class, so that guidance "
                               "comes from the smaller share alone", choices=("none", "same"))
    decoder: str | None = setting(None, "models of latents: a TorchScript module from them (N, C, H, W) to "
                                  "images (N, 3, H, W), uint8 or in [-1, 1]. It is code, and runs",
                                  metavar="FILE")
    clip: bool = setting(True, "clip predicted images to [-1, 1] at every step")
    seed: int = setting(0, "of the noise", low=0)
    out: str | None = setting(None, "a grid, an array for fid.py, or a folder of PNGs (default: a grid in "
                              "the run's samples/)", metavar="FILE.png|FILE.npz|DIR")
    batch_size: int | None = setting(None, "images at a time (default 100 on a CPU, else 500)", low=1)
    device: str = setting("auto", "where to draw", choices=DEVICES)
    dtype: str | None = setting(None, "of matrix products (default bfloat16 on CUDA)", choices=DTYPES)


def choose_shares(config: Config, o: Options) -> Shares:
    """Those that --budget, --ranks and the --guide flags ask for. Raises InputError for channels that the
    model has not been trained with."""
    if config.method != "elastic" and (o.budget or o.ranks is not None or o.guide_share != 1
                                       or o.guide_class != "none"):
        trained = "just Phi(t) channels at t" if config.rank_schedule() else "all channels at every t"
        raise InputError(f"this run is of --method {config.method}, which has trained {trained}; --budget, "
                         "--ranks and the --guide flags take a run of --method elastic")
    if o.budget and o.ranks is not None:
        raise InputError("--budget and --ranks exclude each other")
    profile = ((1, 1.0),)  # all channels everywhere
    if o.budget:
        least = flops.one_image(config, 1, share=config.rho_min)[0] / flops.one_image(config, 1)[0]
        if o.budget < least:
            takes = math.ceil(1000 * least) / 1000  # rounded up: what is printed can be typed
            raise InputError(f"--budget {o.budget:g}: the smallest share that this run has trained, "
                             f"{config.rho_min:g}, takes {takes:g} of all multiply-adds")
        profile = ((1, flops.budget_share(config, o.budget)),)
    elif o.ranks is not None:
        profile = read_profile(o.ranks)
        if isinstance(profile, str):
            raise InputError(f"--ranks {o.ranks}: give a JSON file of shares")
    lowest = min(o.guide_share, *(share for _, share in profile))
    if lowest < config.rho_min:
        raise InputError(f"share {lowest:g} was not trained; this run takes {config.rho_min:g} to 1")
    shares = Shares(profile, o.guide_share, o.guide_class)
    if o.guide_class == "same" and not shares.differ:
        raise InputError("--guide-class same: guidance then comes from channels that the second pass lacks; "
                         "give a --guide-share below that of the first")
    return shares


def load_decoder(o: Options, config: Config, device: torch.device) -> Callable | None:
    """What --decoder names: from latents (n, C, H, W) to images uint8 (n, 3, H, W). Raises InputError."""
    if not o.decoder:
        return None
    if not config.mean:
        raise InputError("--decoder: this model draws images, not latents; leave it out")
    module = read_torchscript(Path(o.decoder), device, "--decoder; experiments/autoencoder.py writes one")

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        try:
            images = module(latents.to(device)).cpu()
            known = images.dtype == torch.uint8 or images.is_floating_point()
            if images.ndim != 4 or images.shape[:2] != (len(latents), 3) or not images.numel() or not known:
                raise ValueError(f"it gives {tuple(images.shape)} of {images.dtype}")
            if not images.isfinite().all():
                raise ValueError("it gives NaN or infinity")
        except Exception as error:  # a stranger's module can fail in any way
            raise InputError(f"{o.decoder} fails on latents {tuple(latents.shape)} ({one_line(error)}): "
                             "it must give images (N, 3, H, W)") from None
        return images if images.dtype == torch.uint8 else from_unit(images.float())

    return decode


def check_out(out: Path, as_folder: bool) -> None:
    """What cannot be written is better known before the drawing. Raises InputError."""
    if as_folder and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists and is not an empty folder; name another, a .png or a .npz")
    if out.suffix.lower() in IMAGE_ENDINGS + (".npz",) and (as_folder or out.is_dir()):
        raise InputError(f"--out {out}: give FILE.png, FILE.npz or the name of a folder")
    check_writable(out, "--out")


def main():
    parser = Parser(description=__doc__)
    add_flags(parser, Options)
    o = Options(**{name: value for name, value in vars(parser.parse_args()).items() if value is not None})
    check_fields(o)
    device = pick_device(o.device)
    dtype = pick_dtype(o.dtype, device)
    run = Path(o.run) if o.run else newest_run()
    model, state = load_model(run, device)
    classes, shares = choose_classes(o.classes, state["classes"]), choose_shares(model.config, o)
    guidance = state["guidance"] if o.guidance is None else o.guidance
    if not classes and not shares.differ:
        if o.guidance is not None:
            print("note: --guidance has no effect: this model was trained without classes")
        guidance = 1.0
    batch_size = o.batch_size or (100 if device.type == "cpu" else 500)
    decode = load_decoder(o, model.config, device)
    as_latents = bool(model.config.mean) and not decode
    name = f"{o.sampler}{o.steps}_seed{o.seed}"
    for word in ("num", "first", "classes", "guidance", "budget", "ranks", "guide_share", "guide_class",
                 "clip"):
        if (value := getattr(o, word)) != getattr(Options, word):
            name += f"_{word}-{Path(value).stem if word == 'ranks' else value}"
    out = Path(o.out or run / "samples" / (name + (".npz" if as_latents else ".png")))
    if not o.out and len(os.fsencode(out.name)) > 200:
        raise InputError("--classes is too long for the name of a file; name one by --out")
    as_folder = out.suffix not in (".png", ".npz")
    check_out(out, as_folder)
    if as_latents and out.suffix != ".npz":
        raise InputError(f"--out {out}: latents are no pictures; give FILE.npz, or a --decoder to see them")

    start, end, images, labels = time.time(), o.first + o.num, [], []
    for first in range(o.first, end, batch_size):
        indices = range(first, min(first + batch_size, end))

        def on_step(steps_done):
            done = first - o.first + len(indices) * steps_done / o.steps  # unfinished images in part
            rate = done / (time.time() - start)
            if steps_done == o.steps or sys.stdout.isatty():  # in a file, one line a batch is enough
                show_progress(f"{run}: step {steps_done}/{o.steps}, image {done:.0f}/{o.num}, "
                              f"{rate:.1f} images/s, {duration((o.num - done) / rate)} left")

        drawn, drawn_labels = draw_images(model, indices, classes, o.seed, o.sampler, o.steps,
                                          guidance, o.clip, shares, dtype, on_step)
        drawn = decode(drawn) if decode else drawn
        if as_folder:
            for i, image in zip(indices, drawn):
                save_png(out / f"{i:06d}.png", image)
        else:
            images.append(drawn)
            labels.append(drawn_labels)
    end_progress()
    if out.suffix == ".npz":
        save_npz(out, torch.cat(images), torch.cat(labels) if classes else None)
    elif out.suffix == ".png":
        save_grid(out, torch.cat(images), grid_columns(len(classes)))
        if len(classes) == grid_columns(len(classes)):
            columns = [classes[(o.first + i) % len(classes)] for i in range(min(o.num, len(classes)))]
            print("columns:", ", ".join(state["classes"][c] for c in columns))
    guided_by = f", guidance {guidance:g}" if guidance != 1 else ""
    print(f"{o.num} images, {o.sampler} {o.steps} steps{guided_by}: {out}")
    cost = flops.sampling(model.config, o.steps, guidance, shares, bool(classes), o.sampler)
    full = flops.sampling(model.config, o.steps, guidance, labelled=bool(classes), sampler=o.sampler)
    share = f"share {shares.ranks[0][1]:.3g} of the channels, " if o.budget else ""
    print(f"{share}{flops.amount(cost)} multiply-adds an image" +
          (f", {1 - cost / full:.1%} less than with all channels" if cost < full else ""))


if __name__ == "__main__":
    run_script(main)
