"""LoRA-Diffusion on images: the trajectory adapter of adapters.py before the last layer of a frozen DiT.

    python experiments/lora_images.py --out runs/lora-images      two CPU cores: about an hour

A DiT is trained on eight of the ten classes of `shapes`, then adapted to the other two from 20, 100 and 1,000
images of them: by corrections of the final hidden states in three phases of t (Eq. 2 to 4 of the paper; c is
the class), by weight LoRA on attention and MLP, by training all weights, or by the two classes' embeddings
alone, which all methods train. A classifier (classifier.py) then says how many samples it recognises, of the
new classes and of the old ones: what was learned and what was forgotten. Learning rates are chosen by the
loss on held-out images of the new classes.

Everything finished is kept in --out and not done again. Read adapters.py before.
"""

import copy
import json
import math
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classifier
import plot
from adapters import LoRALinear, Trajectory, TrajectoryAdapter, ranks_at
from data import draw_shapes, from_unit, to_unit
from model import DiT, preset_config, timestep_embedding
from sample import ImageNoise, ddim, save_grid
from schedule import T, add_noise, predicted_x_0_and_eps, target
from script import (DTYPES, InputError, Parser, claim_folder, duration, end_progress, pick_dtype,
                    positive_int, read_checkpoint, run_script, show_progress, write_then_rename)
from text_diffusion import CPU, stratified_t

NEW = (8, 9)  # classes that the base never sees
COUNTS = (20, 100, 1000)  # images of them to adapt to
RATES = {"LoRA-Diffusion": (1e-3, 3e-3, 1e-2, 3e-2), "weight LoRA": (1e-3, 3e-3, 1e-2, 3e-2),
         "full fine-tuning": (1e-4, 3e-4, 1e-3, 3e-3), "embeddings alone": (1e-3, 1e-2, 3e-2, 1e-1)}

# ----------------------------------------------------------------------------------------------------
# Models


class AdaptedDiT(nn.Module):
    """A DiT, frozen but for what a method trains. The new classes' rows stand apart, so that the old ones'
    stay."""

    def __init__(self, base: DiT, method: str):
        super().__init__()
        self.method = method
        self.base = copy.deepcopy(base).requires_grad_(method == "full fine-tuning")
        d, label = base.config.width, base.embedders[0].label.weight
        self.base.embedders[0].label.requires_grad_(False)
        self.rows = nn.Parameter(label[:NEW[0]].detach().mean(0).repeat(len(NEW), 1))  # (2, D)
        self.trajectory = None
        if method == "LoRA-Diffusion":
            config = Trajectory(ranks_at(d), condition="given")
            self.trajectory = TrajectoryAdapter(config, d, base.config.heads, steps=T)
        if method == "weight LoRA":
            for block in self.base.blocks:
                for name in ("q", "k", "v", "out", "mlp_in", "mlp_out"):
                    setattr(block, name, LoRALinear(getattr(block, name), ranks_at(d)[0]))

    def forward(self, x, t, y):
        """As DiT.forward, with h' = h + delta before the final layer: (B, C, H, W)"""
        base, embedder = self.base, self.base.embedders[0]
        time = embedder.time_out(F.silu(embedder.time_in(timestep_embedding(t))))  # Emb(t): (B, D)
        old, new = embedder.label(y), F.embedding((y - NEW[0]).clamp(0, len(NEW) - 1), self.rows)
        e = torch.where(((y >= NEW[0]) & (y <= NEW[-1]))[:, None], new, old)  # e(c): (B, D)
        c = F.silu(time + e)
        h = base.hidden(x, [block.adaln(c)[:, None] for block in base.blocks])  # (B, N, D)
        if self.trajectory is not None:
            h = h + self.trajectory(h, t, time, e)  # Eq. (2)
        return base.output(h, base.final_adaln(c)[:, None])


def loss_of(model, x_0, y, t, eps) -> torch.Tensor:
    """The squared error of what the model predicts, mean over pixels: (B,)"""
    base = model if isinstance(model, DiT) else model.base
    signal, noise = base.noise_schedule.coefficients(t)
    output = model(add_noise(x_0, eps, signal, noise), t, y).float()
    return (output - target(base.config.predict, x_0, eps, signal, noise)).square().mean((1, 2, 3))


def train_on(model, images, labels, steps: int, batch_size: int, lr: float, seed: int, dtype, name: str,
             state=None, save=None) -> None:
    """AdamW with a cosine-decayed learning rate. Batch and noise depend on seed and step alone, so that a run
    that goes on from a saved `state` (step, optimizer) is the one that it would have been."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, first = torch.optim.AdamW(weights, lr, (0.9, 0.99), fused=True), 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    start = time.time()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        g = torch.Generator().manual_seed(1_000_003 * seed + step)
        index = torch.randint(len(images), (batch_size,), generator=g)
        x_0, y = to_unit(images[index]), labels[index]
        t = stratified_t(batch_size, g, T)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, x_0, y, t, torch.randn(x_0.shape, generator=g)).mean()
        if getattr(model, "trajectory", None) is not None:
            loss = loss + model.trajectory.penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            if not torch.isfinite(loss):
                raise InputError(f"{name}: the loss stopped being finite before step {step + 1}")
            left = (time.time() - start) / (step + 1 - first) * (steps - step - 1)
            show_progress(f"{name}: step {step + 1:,} of {steps:,}  loss {loss.item():.4f}  "
                          f"{duration(left)} left")
        if save and ((step + 1) % 500 == 0 or step + 1 == steps):
            save(step + 1, optimizer)
    end_progress()


@torch.no_grad()
def held_out_loss(model, images, labels) -> float:
    """Every model meets the same timesteps and noise."""
    g, n = torch.Generator().manual_seed(0), len(images)
    t = (torch.arange(n) * T // n + 1)[torch.randperm(n, generator=g)]
    x_0 = to_unit(images)
    return loss_of(model, x_0, labels, t, torch.randn(x_0.shape, generator=g)).mean().item()


@torch.no_grad()
def draw(model: AdaptedDiT, classes, num: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """num images, the classes in turn, by DDIM with our own eps(x, t): uint8 (num, 3, H, W), and their
    labels"""
    config, y = model.base.config, torch.tensor([classes[i % len(classes)] for i in range(num)])
    x = ImageNoise(0, range(num), (config.channels, config.image_size, config.image_size), CPU)()

    def eps(x, t: int):
        signal, noise = (c[:1] for c in model.base.noise_schedule.coefficients(torch.tensor([t])))
        output = model(x, torch.full((num,), t), y)
        return predicted_x_0_and_eps(config.predict, output, x, signal, noise)[1]

    for x in ddim(eps, x, steps):
        pass
    return from_unit(x), y


# ----------------------------------------------------------------------------------------------------
# The experiment


def pretrained(args, images, labels, dtype) -> DiT:
    """The base, or what there is of it gone on with"""
    config = preset_config(args.model, dict(method="full"), image_size=args.image_size, num_classes=10)
    torch.manual_seed(0)
    model, path, state = DiT(config), args.out / "base.pt", None
    of = dict(config={name: str(value) for name, value in asdict(config).items()}, steps=args.steps,
              n=len(images), dtype=str(dtype))
    if path.exists():
        state = read_checkpoint(path, ("of", "model", "optimizer", "step"))
        if state["of"] != of:
            raise InputError(f"{path} is a base of other settings; give its flags, or another --out")
        model.load_state_dict(state["model"])

    def save(step, optimizer):
        saved = dict(of=of, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
        write_then_rename(path, lambda file: torch.save(saved, file))

    if state is None or state["step"] < args.steps:
        train_on(model, images, labels, args.steps, 64, 1e-3, 0, dtype, "base", state, save)
    return model.eval()


def load_judge(args) -> classifier.Classifier:
    path = args.out / f"classifier-{args.judge_num}.pt"
    if not path.exists():
        classifier.main(["--image-size", str(args.image_size), "--out", str(path), "--device", "cpu", "--num",
                         str(args.judge_num)])
    return classifier.load_classifier(path, CPU)[0].eval()


def recognised(judge, model, classes, num, steps) -> tuple[float, torch.Tensor]:
    images, y = draw(model, classes, num, steps)
    found = classifier.predict(judge, lambda i, j: images[i:j], num, CPU)
    return (found == y).double().mean().item(), images


def adapted(args, base, method, images, labels, lr, seed, dtype, name) -> AdaptedDiT:
    torch.manual_seed(seed)
    model = AdaptedDiT(base, method)
    train_on(model, images, labels, args.adapt_steps, min(64, 2 * len(images)), lr, seed + 1, dtype, name)
    return model.eval()


def kept(path: Path, of: dict, make) -> dict:
    """What the small file says, if it is of the same settings; else it is made"""
    try:
        found = json.loads(path.read_text())
        if found["of"] == json.loads(json.dumps(of)):
            return found["result"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    result = make()
    plot.write_json(path, dict(of=of, result=result))
    return result


def read_command_line() -> Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", default=Path("runs/lora-images"),
        help="folder of everything (default runs/lora-images)")
    add("--model", default="tiny", choices=("tiny", "small"), help="the base (default tiny)")
    add("--image-size", type=positive_int, default=16, metavar="N", help="of shapes (default 16)")
    add("--steps", type=positive_int, default=2500, metavar="N", help="of pretraining (default 2500)")
    add("--adapt-steps", type=positive_int, default=400, metavar="N", help="of each adaptation (default 400)")
    add("--seeds", type=positive_int, default=3, metavar="N", help="of each adaptation (default 3)")
    add("--num", type=positive_int, default=200, metavar="N",
        help="samples of the new classes, and as many of the old ones (default 200)")
    add("--sampling-steps", type=positive_int, default=50, metavar="N", help="of DDIM (default 50)")
    add("--train-num", type=positive_int, default=10_000, metavar="N",
        help="drawn shapes, a fifth of which are of the new classes (default 10000)")
    add("--judge-num", type=positive_int, default=20_000, metavar="N",
        help="shapes to train the classifier on (default 20000)")
    add("--dtype", choices=DTYPES, default="float32", help="of matrix products (default float32)")
    add("--threads", type=positive_int, default=1, metavar="N", help="of the CPU (default 1)")
    args = parser.parse_args()
    preset_config(args.model, {}, image_size=args.image_size, num_classes=10)  # raises InputError
    if args.sampling_steps > T or args.image_size < 8:
        raise InputError(f"--sampling-steps is at most {T}, --image-size at least 8")
    return args


def main():
    args = read_command_line()
    torch.set_num_threads(args.threads)
    dtype = pick_dtype(args.dtype, CPU)
    claim_folder(args.out)

    images, labels = draw_shapes(args.train_num, args.image_size, 0)
    is_new = labels >= NEW[0]
    new_images, new_labels = images[is_new], labels[is_new]
    if len(new_images) < 4:
        raise InputError(f"--train-num {args.train_num} holds too few images; give at least 20")
    counts = sorted({min(count, len(new_images)) for count in COUNTS})
    base, judge = pretrained(args, images[~is_new], labels[~is_new], dtype), load_judge(args)
    test_images, test_labels = draw_shapes(1000, args.image_size, 99)
    held_out = test_labels >= NEW[0]
    test_images, test_labels = test_images[held_out], test_labels[held_out]

    rows, old = [], tuple(range(NEW[0]))
    shared = dict(vars(args), out=None, seeds=None)
    before, _ = recognised(judge, AdaptedDiT(base, "embeddings alone").eval(), old, args.num,
                           args.sampling_steps)
    print(f"base: {before:.1%} of its samples of the eight old classes are recognised")
    for method, rates in RATES.items():
        def try_rate(lr):
            model = adapted(args, base, method, new_images[:100], new_labels[:100], lr, 0, dtype,
                            f"{method}, lr {lr:g}")
            return dict(loss=held_out_loss(model, test_images, test_labels))
        tried = [kept(args.out / "runs" / f"rate-{method}-{lr:g}.json".replace(" ", "-"),
                      shared | dict(lr=lr),
                      lambda lr=lr: try_rate(lr)) for lr in rates]
        lr = min(zip(rates, tried), key=lambda pair: pair[1]["loss"])[0]
        for count in counts:
            found = []
            for seed in range(args.seeds):
                def run():
                    model = adapted(args, base, method, new_images[:count], new_labels[:count], lr, seed,
                                    dtype, f"{method}, {count} images, seed {seed}")
                    new, drawn = recognised(judge, model, NEW, args.num, args.sampling_steps)
                    kept_share, drawn_old = recognised(judge, model, old, args.num, args.sampling_steps)
                    if seed == 0:
                        save_grid(args.out / f"{method}-{count}.png".replace(" ", "-"),
                                  torch.cat([drawn[:10], drawn_old[:10]]), 10)
                    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                    return dict(new=new, old=kept_share, trained=trained,
                                loss=held_out_loss(model, test_images, test_labels))
                name = f"{method}-{count}-s{seed}.json".replace(" ", "-")
                found.append(kept(args.out / "runs" / name, shared | dict(lr=lr, seed=seed), run))
            row = dict(method=method, images=count, lr=lr, trained=found[0]["trained"])
            for key in ("new", "old", "loss"):
                values = [one[key] for one in found]
                row[key] = np.mean(values)
                row[f"{key}_sd"] = np.std(values, ddof=1) if len(values) > 1 else None
            rows.append(row)
    report(args, before, rows)


def report(args: Namespace, before: float, rows: list[dict]) -> None:
    """Table, figure.png and results.json. before: the share of the base's samples that is recognised."""
    plot.print_table(rows, {"method": "", "images": "", "trained": ",", "lr": "g", "new": ".1%",
                            "new_sd": ".1%", "old": ".1%", "old_sd": ".1%", "loss": ".4f"})
    by_method = {method: [row for row in rows if row["method"] == method] for method in RATES}
    charts = [plot.line_chart({method: (np.log10([row["images"] for row in some]), [100 * row[key] for row in some],
                                        [100 * (row[f"{key}_sd"] or 0) for row in some])
                               for method, some in by_method.items()},
                              f"Recognised samples of the {words} classes", "log10 of images to adapt to",
                              "%")
              for key, words in (("new", "two new"), ("old", "eight old"))]
    plot.save(args.out / "figure.png", *charts)
    plot.write_json(args.out / "results.json", dict(settings=vars(args), base=before, rows=rows))
    print(f"wrote {args.out / 'results.json'} and {args.out / 'figure.png'}")


if __name__ == "__main__":
    run_script(main)
