"""A small convolutional autoencoder: images to latents that train.py takes, and the decoder that sample.py needs.

    python experiments/autoencoder.py --dataset cifar10 --out runs/ae
    python train.py --dataset runs/ae/latents.npz --model tiny --out runs/latent
    python sample.py --run runs/latent --decoder runs/ae/decoder.pt

Squared error and a light Kullback-Leibler term that keeps the latents near a normal distribution, nothing adversarial:
reconstructions are smooth. Two halvings: 32x32x3 becomes 8x8x4, a twelfth of the numbers. Minutes on a CPU. Reported is
what is lost on held-out images: PSNR, and with --classifier the Frechet distance between reconstructions and originals
in its features.
"""

import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classifier
import common
import plot
from data import batch_indices, from_unit, load, to_unit
from script import (DEVICES, InputError, Parser, check_writable, duration, end_progress, pick_device, positive_int,
                    run_script, seed_number, show_progress, write_then_rename)


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                                  nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


def build_encoder(channels: int, width: int) -> nn.Sequential:
    """Images in [-1, 1] (N, 3, H, W) -> mean and log-variance of the latents, (N, 2 channels, H / 4, W / 4)."""
    return nn.Sequential(nn.Conv2d(3, width, 4, stride=2, padding=1), Residual(width),
                         nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), Residual(2 * width),
                         nn.Conv2d(2 * width, 2 * channels, 1))


def build_decoder(channels: int, width: int) -> nn.Sequential:
    """Latents (N, channels, h, w) -> images in about [-1, 1], (N, 3, 4 h, 4 w)."""
    return nn.Sequential(nn.Conv2d(channels, 2 * width, 1), Residual(2 * width),
                         nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), Residual(width),
                         nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1))


def loss_of(x, mean, log_variance, decoder, kl: float, noise: torch.Tensor) -> torch.Tensor:
    """Squared error of what is decoded from mean + deviation * noise, mean over pixels, plus kl times the divergence of
    the latents from N(0, 1), mean over their numbers (Kingma and Welling 2014, Eq. 10)."""
    decoded = decoder(mean + (log_variance / 2).exp() * noise)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
    return F.mse_loss(decoded, x) + kl * divergence


@torch.no_grad()
def encode(encoder: nn.Module, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> the means of the latents, float32 (N, C, H / 4, W / 4) on the CPU."""
    return torch.cat([encoder(to_unit(part.to(device))).chunk(2, 1)[0].cpu() for part in images.split(500)])


@torch.no_grad()
def decode(decoder: nn.Module, latents: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The way back: uint8 (N, 3, H, W) on the CPU."""
    return torch.cat([from_unit(decoder(part.to(device))).cpu() for part in latents.split(500)])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of uint8 images, dB: 10 log10(255^2 / mean squared error)."""
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    common.add_image_flags(parser, "32")
    add("--channels", type=positive_int, default=4, metavar="N", help="of the latents (default 4)")
    add("--width", type=positive_int, default=32, metavar="N", help="channels of the first convolution, a multiple "
        "of 8 (default 32)")
    add("--kl", type=float, default=1e-3, metavar="F", help="weight of the divergence (default 0.001)")
    add("--steps", type=positive_int, default=3000, metavar="N", help="(default 3000)")
    add("--batch-size", type=positive_int, default=64, metavar="N", help="(default 64)")
    add("--lr", type=float, default=1e-3, metavar="F", help="highest learning rate, one cycle (default 0.001)")
    add("--seed", type=seed_number, default=0, metavar="N", help="(default 0)")
    add("--classifier", type=Path, metavar="FILE", help="of experiments/classifier.py, for the Frechet distance")
    add("--out", type=Path, default=Path("runs/autoencoder"), metavar="DIR", help="(default runs/autoencoder)")
    add("--device", choices=DEVICES, default="auto", help="(default auto)")
    args = parser.parse_args()
    if args.width % 8 or not 0 < args.lr < 1 or not 0 <= args.kl < math.inf:
        raise InputError("--width takes a multiple of 8, --lr a number between 0 and 1, --kl one of at least 0")
    check_writable(args.out / "decoder.pt", "--out")
    args.image_size = args.image_size or (None if args.dataset.lower().endswith(".npz") else 32)
    common.settle_image_flags(args)
    device = pick_device(args.device)
    images, test = load(args.dataset, args.data_dir, "train", args.image_size), common.load_held_out(args, 2000)
    if images.images.dtype != torch.uint8 or images.images.shape[-1] % 4 or images.images.shape[-2] % 4:
        raise InputError(f"{args.dataset} must hold images whose sides are multiples of 4")
    judge = classifier.Judge(args.classifier, test, device) if args.classifier else None

    torch.manual_seed(args.seed)
    encoder, decoder = (build(args.channels, args.width).to(device) for build in (build_encoder, build_decoder))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=args.lr, weight_decay=0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, max(2, args.steps))
    on_device, start = images.to(device), time.time()
    for step in range(args.steps):
        index = batch_indices(len(images.images), step, args.batch_size, args.seed, device)
        x = to_unit(on_device.images[index])
        mean, log_variance = encoder(x).chunk(2, 1)
        loss = loss_of(x, mean, log_variance.clamp(-20, 10), decoder, args.kl, torch.randn_like(mean))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 100 == 99 or step == args.steps - 1:
            if not torch.isfinite(loss):
                raise InputError(f"the loss stopped being finite before step {step + 1}; lower --lr or --kl")
            left = (time.time() - start) / (step + 1) * (args.steps - step - 1)
            show_progress(f"step {step + 1}/{args.steps}, loss {loss.item():.4f}, {duration(left)} left")
    end_progress()

    encoder.eval(), decoder.eval()
    latents = encode(encoder, images.images, device).numpy().astype(np.float16)
    if not np.abs(latents).max() < 1e4:
        raise InputError("the latents reach 10,000, which train.py takes for damage; lower --lr or raise --kl")
    again = decode(decoder, encode(encoder, test.images, device), device)
    result = dict(psnr=psnr(again, test.images), frechet=None, recognised=None)
    if judge:
        result |= judge(again, test.labels)
    write_then_rename(args.out / "latents.npz", lambda file: np.savez(
        file, latents=latents, **(dict(labels=images.labels.numpy()) if images.classes else {})))
    with warnings.catch_warnings(action="ignore"):  # newer torch calls TorchScript old; it is what loads everywhere
        scripted = torch.jit.trace(decoder.cpu(), torch.from_numpy(latents[:2]).float())
        write_then_rename(args.out / "decoder.pt", lambda file: torch.jit.save(scripted, file))
    plot.write_json(args.out / "results.json", dict(settings=vars(args), classes=images.classes, **result))
    print(f"held-out images: PSNR {result['psnr']:.2f} dB" + (
        f", Frechet distance {result['frechet']:.3f}, {result['recognised']:.1%} recognised" if judge else ""))
    print(f"wrote {len(latents):,} latents {latents.shape[1:]} and their decoder: {args.out}/latents.npz, decoder.pt")


if __name__ == "__main__":
    run_script(main)
