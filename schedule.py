"""Functions of the timestep t: noise, loss weights, the timesteps a sampler visits, and rank.

NA-LR sections 2.1 and C.1. Time runs from t = 1 (nearly clean) to t = T = 1000 (noise). Arrays over t
have length T + 1 and are indexed by t itself; entry 0 is the clean image. Read this file first, then
lowrank.py.
"""

import math
from bisect import bisect_left
from fractions import Fraction

import torch

T = 1000

# ----------------------------------------------------------------------------------------------------
# Noise


class NoiseSchedule:
    """The cosine schedule (Nichol and Dhariwal 2021, Eq. 17; s = 0.008, betas clipped at 0.999).

    alpha_bar: float64 (T + 1,), the share of signal variance in x_t; alpha_bar[0] = 1
    log_snr:   float64 (T + 1,), log(alpha_bar / (1 - alpha_bar)), decreasing; log_snr[0] = inf
    """

    def __init__(self):
        t = torch.arange(T + 1, dtype=torch.float64)
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])
        self.log_snr = torch.log(self.alpha_bar) - torch.log1p(-self.alpha_bar)

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise amplitudes sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t), float32, shaped
        (B, 1, 1, 1) for images. t: int64 (B,) on the CPU, where the float64 table is."""
        ab = self.alpha_bar[t][:, None, None, None]
        return ab.sqrt().float(), (1 - ab).sqrt().float()


def add_noise(x_0: torch.Tensor, eps: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps, with the amplitudes from `coefficients(t)`."""
    return signal * x_0 + noise * eps


def sampling_timesteps(n: int) -> list[int]:
    """The n + 1 timesteps that a sampler with n steps visits: n evenly spaced from T down, rounded,
    then 0. For n = 100: 1000, 990, ..., 10, 0.

    The spacing is part of every FID: a sampler that starts at 991 ("leading" spacing) or that crowds
    its steps at one end draws other images from the same model. Raises ValueError unless 1 <= n <= T.
    """
    if not 1 <= n <= T:
        raise ValueError(f"{n} sampling steps; a sampler takes 1 to {T}")
    # in integers: round-half-up has no platform-dependent ties
    return [(2 * T * i + n) // (2 * n) for i in range(n, 0, -1)] + [0]


# ----------------------------------------------------------------------------------------------------
# Loss weights: other answers to the question where along t the effort should go. Each is a function of
# the NoiseSchedule, float64 (T + 1,), for a model that predicts eps; entry 0 is not used.


def erd_weight(s: NoiseSchedule) -> torch.Tensor:
    """ERD: sqrt((c_x alpha)^2 + (c_e sigma)^2) for the target c_x x_0 + c_e eps, and eps alone leaves
    sigma = sqrt(1 - alpha_bar). The rule is derived for uniform log-SNR; like its authors' discrete runs we
    use it as it is with uniform t."""
    return (1 - s.alpha_bar).sqrt()


def min_snr_weight(s: NoiseSchedule, gamma: float = 5.0) -> torch.Tensor:
    """Min-SNR-gamma (Hang et al. 2023): min(SNR, gamma) / SNR."""
    return (gamma * torch.exp(-s.log_snr)).clamp(max=1)


def p2_weight(s: NoiseSchedule, gamma: float = 1.0, k: float = 1.0) -> torch.Tensor:
    """P2 (Choi et al. 2022): 1 / (k + SNR)^gamma."""
    return (k + torch.exp(s.log_snr)) ** -gamma


def speed_weight(s: NoiseSchedule, tau: int = 700, lam: float = 0.6) -> torch.Tensor:
    """SpeeD (Wang et al. 2024): up to tau the growth of the noise variance, alpha_bar_{t-1} - alpha_bar_t,
    whose minimum and maximum over all t become 1 - lam and lam; 1 above tau. Their tau belongs to a linear
    noise schedule; with the cosine one, noise is far from complete at 700."""
    growth = -s.alpha_bar.diff(prepend=s.alpha_bar[:1])  # entry 0 is 0 and not used
    low, high = growth[1:].min(), growth[1:].max()
    weight = 1 - lam + (2 * lam - 1) * (growth - low) / (high - low)
    weight[tau + 1:] = 1
    return weight


WEIGHTINGS = {"none": lambda s: torch.ones_like(s.alpha_bar), "erd": erd_weight, "min-snr": min_snr_weight,
              "p2": p2_weight, "speed": speed_weight}


def loss_weight(name: str, s: NoiseSchedule, probabilities: torch.Tensor) -> torch.Tensor:
    """The weight called `name`, divided by its mean under the distribution of t in use, so that learning
    rates stay comparable. float64 (T + 1,). probabilities: float64 (T + 1,), the chance of each t."""
    weight = WEIGHTINGS[name](s)
    return weight / (weight * probabilities)[1:].sum()


# ----------------------------------------------------------------------------------------------------
# Rank


def _exact(x: float) -> Fraction:
    """The decimal number that was typed: 0.07 * 100 is 7 here, not 7.000000000000001, whose ceiling
    would be 8."""
    return Fraction(str(x))


class RankSchedule:
    """Phi(t), how many of a layer's r_max rank channels are active at timestep t. NA-LR Eq. (2), (7).

        Phi(t) = r_min + ceil((r_max - r_min) f(t)),  r_min = ceil(rho_min r_max)
        logistic:  f(t) = sigmoid(-k (t/T - m)),  k = 8, m = 0.5       linear:  f(t) = 1 - t/T
        warm start (C.1.3):  Phi(t) = r_max for t <= floor(warm_start T)

    multiple (ours): Phi(t) is rounded up to a multiple of this, but never above r_max. Tensor cores like
    8 or 16. It belongs to the model, for channels that were never trained at t must not speak there.

    Phi never increases with t, so the channels used at more noise are the first of those used at less
    (nested). The paper prints the two boundary conditions swapped. With the logistic profile f(T) is
    0.018, so the ceiling keeps Phi(T) one or more above r_min; only the linear profile reaches it.
    """

    def __init__(self, profile: str = "logistic", rho_min: float = 0.4, warm_start: float = 0.1,
                 k: float = 8.0, m: float = 0.5, multiple: int = 1):
        """Raises ValueError for an unknown profile, rho_min outside (0, 1], warm_start outside [0, 1] or a
        multiple below 1."""
        if profile not in ("logistic", "linear"):
            raise ValueError(f"rank profile {profile!r} is unknown; use logistic or linear")
        if not 0 < rho_min <= 1:
            raise ValueError(f"rho_min {rho_min} must lie in (0, 1]")
        if not 0 <= warm_start <= 1:
            raise ValueError(f"warm_start {warm_start} must lie in [0, 1]")
        if type(multiple) is not int or multiple < 1:
            raise ValueError(f"rank multiple {multiple!r} must be a whole number of at least 1")
        self.profile, self.rho_min, self.warm_start, self.k, self.m = profile, rho_min, warm_start, k, m
        self.multiple = multiple
        self._tables = {}

    def table(self, r_max: int) -> torch.Tensor:
        """Phi(t) for every t: int64 (T + 1,). Computed once for each r_max; treat it as read-only."""
        if r_max not in self._tables:
            self._tables[r_max] = self._compute(r_max)
        return self._tables[r_max]

    def _compute(self, r_max: int) -> torch.Tensor:
        r_min = math.ceil(_exact(self.rho_min) * r_max)
        t = torch.arange(T + 1, dtype=torch.float64)
        if self.profile == "linear":
            # multiplied before the division: (r_max - r_min)(1 - t/T) would miss exact integers by a rounding
            grown = (r_max - r_min) * (T - t) / T
        else:
            grown = (r_max - r_min) * torch.sigmoid(-self.k * (t / T - self.m))
        phi = r_min + torch.ceil(grown).long()
        phi[:math.floor(_exact(self.warm_start) * T) + 1] = r_max
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
    return max(1, math.floor(_exact(keep) * m * n / (m + n)))


def iso_compute_rank(r_base: int, rank_schedule: RankSchedule, limit: int) -> int:
    """ISO-Compute: the r_max <= limit whose schedule, averaged over the sampling timesteps, is closest
    to r_base (the smaller one of two equally close). The timesteps are always those of 100 steps, so
    that the model does not depend on how it will be sampled."""
    visited = torch.tensor(sampling_timesteps(100)[:-1])

    def average(r_max: int) -> float:
        return rank_schedule.table(r_max)[visited].double().mean().item()

    # the average never falls as r_max grows, and is at least rho_min of it: bisection finds the place
    candidates = range(min(r_base, limit), min(limit, math.ceil(r_base / _exact(rank_schedule.rho_min))) + 1)
    i = bisect_left(candidates, r_base, key=average)
    closest = min(candidates[max(0, i - 1):i + 1], key=lambda r_max: abs(average(r_max) - r_base))
    return candidates[bisect_left(candidates, average(closest), key=average)]
