"""Functions of the timestep t: how much noise, which timesteps a sampler visits, and how much rank.

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

    Phi never increases with t, so the channels used at more noise are the first of those used at less
    (nested). The paper prints the two boundary conditions swapped. With the logistic profile f(T) is
    0.018, so the ceiling keeps Phi(T) one or more above r_min; only the linear profile reaches it.
    """

    def __init__(self, profile: str = "logistic", rho_min: float = 0.4, warm_start: float = 0.1,
                 k: float = 8.0, m: float = 0.5):
        """Raises ValueError for an unknown profile, rho_min outside (0, 1] or warm_start outside [0, 1]."""
        if profile not in ("logistic", "linear"):
            raise ValueError(f"rank profile {profile!r} is unknown; use logistic or linear")
        if not 0 < rho_min <= 1:
            raise ValueError(f"rho_min {rho_min} must lie in (0, 1]")
        if not 0 <= warm_start <= 1:
            raise ValueError(f"warm_start {warm_start} must lie in [0, 1]")
        self.profile, self.rho_min, self.warm_start, self.k, self.m = profile, rho_min, warm_start, k, m
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
        return phi

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
