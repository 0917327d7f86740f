"""Functions of the timestep t: noise, what the model predicts, the timesteps a sampler visits, and rank.

NA-LR sections 2.1 and C.1. t = 0 is the clean image, t = 1 nearly clean, t = T = 1000 noise. Arrays over t
have length T + 1 and are indexed by t itself. Read this file first, then lowrank.py. Loss weights of
other methods and elastic models stand at the end.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

T = 1000
TABLE = dict(dtype=torch.float64, device="cpu")  # of what is indexed by t, whatever the default device is

# ----------------------------------------------------------------------------------------------------
# Noise

NOISES = ("cosine", "linear")


class NoiseSchedule:
    """cosine, the paper's (Nichol and Dhariwal 2021, Eq. 17; s = 0.008, betas clipped at 0.999), or linear:
    betas from 1e-4 to 0.02 (Ho et al. 2020).

    alpha_bar: float64 (T + 1,), the share of signal variance in x_t; alpha_bar[0] = 1
    log_snr:   float64 (T + 1,), log(alpha_bar / (1 - alpha_bar)), decreasing; log_snr[0] = inf
    """

    def __init__(self, kind: str = "cosine"):
        """Raises ValueError for an unknown kind."""
        if kind not in NOISES:
            raise ValueError(f"noise schedule {kind!r} is unknown; use {' or '.join(NOISES)}")
        t = torch.arange(T + 1, **TABLE)
        if kind == "cosine":
            f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            beta = torch.linspace(1e-4, 0.02, T, **TABLE)
        self.alpha_bar = torch.cat([torch.ones(1, **TABLE), torch.cumprod(1 - beta, 0)])
        self.log_snr = torch.log(self.alpha_bar) - torch.log1p(-self.alpha_bar)

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise amplitudes sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t), float32, shaped
        (B, 1, 1, 1) for images. t: int64 (B,) on the CPU, where the float64 table is."""
        ab = self.alpha_bar[t][:, None, None, None]
        return ab.sqrt().float(), (1 - ab).sqrt().float()


def add_noise(x_0: torch.Tensor, eps: torch.Tensor, signal, noise) -> torch.Tensor:
    """x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps, with the amplitudes from `coefficients(t)`."""
    return signal * x_0 + noise * eps


# ----------------------------------------------------------------------------------------------------
# What the model predicts: c_x x_0 + c_eps eps. Signal is sqrt(ab_t), noise sqrt(1 - ab_t): floats, or tensors
# from `coefficients(t)`.

PREDICTIONS = ("eps", "v", "x0")


def target_coefficients(predict: str, signal, noise):
    """c_x and c_eps of the target. v = sqrt(ab) eps - sqrt(1 - ab) x_0 is from Salimans and Ho 2022."""
    return {"eps": (0.0, 1.0), "v": (-noise, signal), "x0": (1.0, 0.0)}[predict]


def target(predict: str, x_0: torch.Tensor, eps: torch.Tensor, signal, noise) -> torch.Tensor:
    """What the model should answer to x_t = signal x_0 + noise eps."""
    c_x, c_eps = target_coefficients(predict, signal, noise)
    return c_x * x_0 + c_eps * eps


def predicted_x_0_and_eps(predict: str, output: torch.Tensor, x_t: torch.Tensor, signal, noise):
    """The way back: (x_0, eps) from the model's answer to x_t, two linear equations in two unknowns.

    Of a model that predicts eps, x_0 is a division by the signal, which at t = T is 1/20,291 of the noise: an
    error is multiplied by that much, and a sampler has to clip. With v and x_0 it is not: clipping only keeps
    images in range. (Of x_0, eps is a division by the noise, 1/156 of the signal at t = 1.)"""
    c_x, c_eps = target_coefficients(predict, signal, noise)
    determinant = signal * c_eps - noise * c_x  # eps: signal, v: 1, x_0: -noise
    return (c_eps * x_t - noise * output) / determinant, (signal * output - c_x * x_t) / determinant


def eps_loss_factor(predict: str, schedule: NoiseSchedule) -> torch.Tensor:
    """The squared error of eps for one unit of that of the output, at the same x_t: 1 for eps, ab for v, SNR
    for x_0. float64 (T + 1,). Reported losses are those of eps, whatever is predicted, so that runs
    compare."""
    signal, noise = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    c_x, c_eps = target_coefficients(predict, signal, noise)
    return (signal / (signal * c_eps - noise * c_x)) ** 2


# ----------------------------------------------------------------------------------------------------
# Sampling


def sampling_timesteps(n: int) -> list[int]:
    """The n + 1 timesteps that a sampler with n steps visits: n evenly spaced from T down, rounded,
    then 0. For n = 100: 1000, 990, ..., 10, 0.

    The spacing is part of every FID: a sampler that starts at 991 ("leading" spacing) or that crowds
    its steps at one end draws other images from the same model. Raises ValueError unless 1 <= n <= T.
    """
    if not 1 <= n <= T:
        raise ValueError(f"{n} sampling steps; a sampler takes 1 to {T}")
    # rounded in integers, so that no machine rounds a half the other way
    return [(2 * T * i + n) // (2 * n) for i in range(n, 0, -1)] + [0]


# ----------------------------------------------------------------------------------------------------
# Rank


def channels_of(share, r_max: int):
    """k = ceil(share r_max): an int for a float, int64 of its shape for a tensor. Less 1e-9 of a channel, for
    0.07 * 100 is 7.000000000000001 in floats, whose ceiling would be 8; but never 0."""
    if isinstance(share, torch.Tensor):
        return torch.ceil(share * r_max - 1e-9).long().clamp(min=1)
    return max(1, math.ceil(share * r_max - 1e-9))


Profile = tuple[tuple[int, float], ...]  # pairs (t, share): from each t on, that share of r_max
PROFILES = ("logistic", "linear")


@dataclass(frozen=True)
class RankSchedule:
    """Phi(t), how many of a layer's r_max rank channels are active at timestep t. NA-LR Eq. (2), (7).

        Phi(t) = r_min + ceil((r_max - r_min) f(t)),  r_min = ceil(rho_min r_max)
        logistic:  f(t) = sigmoid(-steepness (t/T - midpoint))      linear:  f(t) = 1 - t/T
        warm start (C.1.3):  Phi(t) = r_max for t <= floor(warm_start T)

    The paper's Phi never increases with t, so the channels used at more noise are the first of those used at
    less (nested). It prints the two boundary conditions swapped. With the logistic profile f(T) is
    0.018, so the ceiling keeps Phi(T) one or more above r_min; only the linear profile reaches it.

    Ours: with a profile such as ((1, 1.0), (34, 0.6)), Phi(t) = ceil(share r_max), which may have any shape;
    rho_min and warm_start are then ignored. And every Phi(t) is rounded up to a `multiple`, at most to r_max,
    in training as well: sampling must not use channels at t that were never trained there.

    Raises ValueError for an unknown profile, one whose timesteps do not rise from 1 or whose shares lie
    outside (0, 1], rho_min outside (0, 1], warm_start outside [0, 1] or a multiple below 1.
    """
    profile: str | Profile = "logistic"
    rho_min: float = 0.4
    warm_start: float = 0.1
    steepness: float = 8.0
    midpoint: float = 0.5
    multiple: int = 1

    def __post_init__(self):
        if isinstance(self.profile, tuple):
            if not all(type(t) is int and type(share) in (int, float) for t, share in self.profile):
                raise ValueError("a rank profile consists of whole timesteps and numbers as their shares")
            starts = [t for t, _ in self.profile]
            if starts[:1] != [1] or starts != sorted(set(starts)) or starts[-1] > T:
                raise ValueError(f"the timesteps of a rank profile must rise from 1 and end by {T}")
            if not all(0 < share <= 1 for _, share in self.profile):
                raise ValueError("the shares of a rank profile must lie in (0, 1]")
        elif self.profile not in PROFILES:
            raise ValueError(f"rank profile {self.profile!r} is unknown; use {' or '.join(PROFILES)}")
        if not 0 < self.rho_min <= 1:
            raise ValueError(f"rho_min {self.rho_min} must lie in (0, 1]")
        if not 0 <= self.warm_start <= 1:
            raise ValueError(f"warm_start {self.warm_start} must lie in [0, 1]")
        if type(self.multiple) is not int or self.multiple < 1:
            raise ValueError(f"rank multiple {self.multiple!r} must be a whole number of at least 1")

    @functools.lru_cache(100)
    def table(self, r_max: int) -> torch.Tensor:
        """Phi(t) for every t: int64 (T + 1,). Kept for the next call; treat it as read-only."""
        t = torch.arange(T + 1, **TABLE)
        if isinstance(self.profile, tuple):
            phi = torch.full((T + 1,), channels_of(self.profile[0][1], r_max), device="cpu")
            for first, share in self.profile:
                phi[first:] = channels_of(share, r_max)
        else:
            r_min = channels_of(self.rho_min, r_max)
            if self.profile == "linear":
                # multiplied first: (r_max - r_min)(1 - t/T) would miss exact integers by a rounding
                grown = (r_max - r_min) * (T - t) / T
            else:
                grown = (r_max - r_min) * torch.sigmoid(-self.steepness * (t / T - self.midpoint))
            phi = r_min + torch.ceil(grown).long()
            phi[:math.floor(self.warm_start * T + 1e-9) + 1] = r_max
        return (-(-phi // self.multiple) * self.multiple).clamp(max=r_max)

    def active(self, t, r_max: int):
        """Phi(t). An int t gives an int; an integer tensor t gives an int64 tensor of its shape on its
        device. Raises ValueError for an int t outside 0..T or r_max < 1."""
        if r_max < 1:
            raise ValueError(f"r_max {r_max} must be at least 1")
        if isinstance(t, torch.Tensor):
            return self.table(r_max).to(t.device)[t]
        if not 0 <= t <= T:
            raise ValueError(f"timestep {t} must lie in 0..{T}")
        return int(self.table(r_max)[t])


# ----------------------------------------------------------------------------------------------------
# ISO presets (NA-LR 3.1): from the kept share of the parameters to a rank


def base_rank(keep: float, m: int, n: int) -> int:
    """r = floor(p m n / (m + n)), at least 1: the rank at which U and V together hold the share p of
    the m x n weights. At p = 1 a factorised layer costs exactly as much as the dense one."""
    return max(1, math.floor(keep * m * n / (m + n) + 1e-9))  # 1e-9: as in `channels_of`


@functools.cache  # many layers have one shape
def iso_compute_rank(r_base: int, rank_schedule: RankSchedule, limit: int) -> int:
    """ISO-Compute: the r_max from r_base to limit whose schedule, averaged over the sampling timesteps, is
    closest to r_base (the smaller one of two equally close). The timesteps are always those of 100 steps, so
    that the model does not depend on how it will be sampled."""
    visited = sampling_timesteps(100)[:-1]

    def average(r_max: int) -> float:
        return rank_schedule.table(r_max)[visited].double().mean().item()

    # the average grows with r_max: beyond the first one that reaches r_base none is closer
    largest = next((r_max for r_max in range(r_base, limit) if average(r_max) >= r_base), limit)
    return min(range(r_base, largest + 1), key=lambda r_max: abs(average(r_max) - r_base))


# ----------------------------------------------------------------------------------------------------
# Loss weights: other answers to the question where along t the effort should go. Each is the weight of the
# squared error of what is predicted, float64 (T + 1,); entry 0 is not used.


def erd_weight(schedule: NoiseSchedule, predict: str) -> torch.Tensor:
    """ERD: sqrt((c_x alpha)^2 + (c_eps sigma)^2) for the target c_x x_0 + c_eps eps: sigma for eps, alpha for
    x_0, sqrt(2) alpha sigma for v. The rule is derived for uniform log-SNR; like its authors' discrete runs
    we use it as it is with uniform t."""
    signal, noise = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    c_x, c_eps = target_coefficients(predict, signal, noise)
    return ((c_x * signal) ** 2 + (c_eps * noise) ** 2) ** 0.5


def min_snr_weight(schedule: NoiseSchedule, predict: str) -> torch.Tensor:
    """Min-SNR-5 (Hang et al. 2023): min(SNR, 5) / SNR of the eps loss."""
    return eps_loss_factor(predict, schedule) * (5 * torch.exp(-schedule.log_snr)).clamp(max=1)


def p2_weight(schedule: NoiseSchedule, predict: str) -> torch.Tensor:
    """P2 (Choi et al. 2022) with both constants 1: 1 / (1 + SNR) of the eps loss."""
    return eps_loss_factor(predict, schedule) / (1 + torch.exp(schedule.log_snr))


def speed_tau(schedule: NoiseSchedule) -> int:
    """SpeeD's tau, after which an image counts as noise alone: 700 of their linear schedule, and of another
    the last t that has as much signal left: 946 of the cosine one."""
    return int((schedule.alpha_bar >= NoiseSchedule("linear").alpha_bar[700]).sum()) - 1


def speed_weight(schedule: NoiseSchedule, predict: str, lam: float = 0.6) -> torch.Tensor:
    """SpeeD (Wang et al. 2024), of the eps loss: up to `speed_tau` the growth of the noise variance,
    alpha_bar_{t-1} - alpha_bar_t, whose minimum and maximum over all t become 1 - lam and lam; 1 above it."""
    growth = -schedule.alpha_bar.diff(prepend=schedule.alpha_bar[:1])  # entry 0 is 0 and not used
    low, high = growth[1:].min(), growth[1:].max()
    weight = 1 - lam + (2 * lam - 1) * (growth - low) / (high - low)
    weight[speed_tau(schedule) + 1:] = 1
    return eps_loss_factor(predict, schedule) * weight


WEIGHTINGS = {"none": lambda schedule, predict: torch.ones_like(schedule.alpha_bar), "erd": erd_weight,
              "min-snr": min_snr_weight, "p2": p2_weight, "speed": speed_weight}


def loss_weight(name: str, schedule: NoiseSchedule, predict: str, probabilities) -> torch.Tensor:
    """The weight called `name`, divided by its mean under the distribution of t in use, so that learning
    rates stay comparable. float64 (T + 1,). probabilities: float64 (T + 1,), the chance of each t."""
    weight = WEIGHTINGS[name](schedule, predict)
    return weight / (weight * probabilities)[1:].sum()


# ----------------------------------------------------------------------------------------------------
# Elastic models (ours): any share of the channels. To be read when train.py asks for `elastic_shares`, and
# sample.py, where guidance is explained, for `Shares`.


def elastic_shares(n: int, rho_min: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """The shares of the channels that the n samples of an elastic model's batch draw: float64 (n,), falling.

    An eighth of them uses all channels, an eighth rho_min, and the rest lies uniformly between; one draw in
    each of n equal strata, so that every batch has its large and small ones, as the sandwich rule of Yu and
    Huang (2019) asks for. Without a generator: the middles of the strata."""
    u = torch.rand(n, dtype=torch.float64, generator=generator) if generator else 0.5
    u = (torch.arange(n - 1, -1, -1, dtype=torch.float64) + u) / n
    return (rho_min + (1 - rho_min) * (u - 1 / 8) * 8 / 6).clamp(rho_min, 1)


class Shares(NamedTuple):
    """The shares of the channels that an elastic model computes in sampling.

    ranks: from each t on, the share of r_max, such as ((1, 0.5),) for half of the channels everywhere
    guide: the largest share in the second pass of guidance, which is never given more than the first
    guide_class: what the second pass is told, "none": classifier-free guidance, or "same": the class, so that
    the passes differ in their rank alone (autoguidance, Karras et al. 2024)
    """
    ranks: Profile = ((1, 1.0),)
    guide: float = 1.0
    guide_class: str = "none"

    def passes(self, t: int, guidance: float, labelled: bool = True) -> tuple[float | None, float | None]:
        """The shares of the first and of the second pass at t; None for a pass that would say nothing new:
        with weight zero (guidance 0 and 1), or the same as the other. labelled: the first is told a class."""
        first = [share for start, share in self.ranks if start <= t][-1]  # the last pair that began
        second = min(first, self.guide)
        alike = first == second and (self.guide_class == "same" or not labelled)
        if guidance == 1 or alike:
            return first, None
        return (None, second) if guidance == 0 else (first, second)

    @property
    def differ(self) -> bool:
        """Whether the second pass computes fewer channels than the first at some t."""
        return self.guide < max(share for _, share in self.ranks)
