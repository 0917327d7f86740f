"""Which timesteps a training step draws: clustering by log-SNR, progression, sampling.

NA-LR sections 2.2, B.1 and C.3. Training starts with the noisiest group of timesteps and adds groups
towards the clean end. While a stage runs, no timestep below its range occurs, so all rank channels that
only lower timesteps use can be sliced away. Nothing here knows about ranks or models. Read schedule.py
before, train.py after.
"""

import math

import torch

# ----------------------------------------------------------------------------------------------------
# How often each t is drawn when all are in: float64 (T + 1,), summing to 1; entry 0 is 0


def uniform(T: int, first: int = 1, last: int | None = None) -> torch.Tensor:
    """Every t from `first` to `last` (default T) alike."""
    p = torch.zeros(T + 1, dtype=torch.float64)
    p[first:(last or T) + 1] = 1
    return p / p.sum()


def speed(T: int, tau: int = 700) -> torch.Tensor:
    """SpeeD (Wang et al. 2024): t <= tau drawn twice as often as later ones. tau: `schedule.speed_tau`"""
    p = torch.ones(T + 1, dtype=torch.float64)
    p[0] = 0
    p[1:tau + 1] = 2
    return p / p.sum()


def log_normal(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Logit-normal (Esser et al. 2024; mean 0, deviation 1) in u = sqrt(1 - alpha_bar), the noise amplitude:
    P(t) in proportion to density(u_t) (u_t - u_{t-1}). (The code of SpeeD's authors multiplies by u / (1 - u)
    and leaves the widths of the steps in u out.) alpha_bar: float64 (T + 1,)"""
    u = (1 - alpha_bar).sqrt()
    logit = torch.log(u) - torch.log1p(-u)
    density = torch.exp(-logit.square() / 2) / (u * (1 - u))
    p = density * u.diff(prepend=u[:1])
    p[0] = 0
    return p / p.sum()


def clts(T: int, progress: float, mean: float = 300.0, deviation: float = 200.0) -> torch.Tensor:
    """CLTS (Xu et al. 2024): from uniform, at progress 0, to a Gaussian over t at the end of training, 1.
    That the mixture moves linearly, and the deviation, are our choice: SpeeD's authors compare with CLTS, and
    in their code it is so small that the Gaussian draws hardly anything but t = 300."""
    t = torch.arange(T + 1, dtype=torch.float64)
    gaussian = torch.exp(-((t - mean) / deviation).square() / 2)
    gaussian[0] = 0
    return (1 - progress) * uniform(T) + progress * gaussian / gaussian.sum()


TIMESTEPS = ("uniform", "stratified", "speed", "speed-stratified", "log-normal", "log-normal-stratified",
             "clts", "clts-stratified")


def base_distribution(name: str, alpha_bar: torch.Tensor, tau: int) -> torch.Tensor:
    """What one of TIMESTEPS draws from when training starts; clts moves on from there. (stratified is a way
    to draw: `Curriculum.sample`.) tau: SpeeD's"""
    T = len(alpha_bar) - 1
    if name.startswith("speed"):
        return speed(T, tau)
    return log_normal(alpha_bar) if name.startswith("log-normal") else uniform(T)


# ----------------------------------------------------------------------------------------------------
# The curriculum


def cluster_timesteps(log_snr: torch.Tensor, n: int) -> list[int]:
    """Cuts t = 1..T into n contiguous groups and returns the first timestep of each. NA-LR B.1, C.3.1.

    The cost of a group is the largest log-SNR difference inside it; dynamic programming minimises the
    largest cost. (The sum of costs would only cut out the few huge gaps at the two ends.) Many
    partitions are equally good; of these, the one whose groups, from low noise up, are as long as
    possible. The clipped last beta makes log-SNR fall by 6.9 at T alone, which would make {T} a group
    of its own, so log_snr[T] counts as log_snr[T - 1].

    log_snr: float64 (T + 1,), decreasing, indexed by t; entry 0 is not used.
    Raises ValueError unless 1 <= n <= T.
    """
    T = len(log_snr) - 1
    if not 1 <= n <= T:
        raise ValueError(f"{n} timestep groups; there can be 1 to {T}")
    s = log_snr[1:].clone()  # position i holds t = i + 1
    if T > 1:
        s[-1] = s[-2]

    # worst[j]: the smallest possible largest cost when positions 0..j are cut into g groups
    cost = s[:, None] - s[None, :]  # cost[i, j] of one group i..j, for i <= j
    cost = torch.where(cost.new_ones(T, T).triu().bool(), cost, torch.inf)
    worst = cost[0]
    for _ in range(n - 1):
        # the last group starts at i: 0..i-1 is left
        before = torch.cat([worst.new_full((1,), torch.inf), worst[:-1]])
        worst = torch.maximum(before[:, None], cost).amin(0)
    allowed = worst[-1]

    first, starts = 0, []
    for group in range(n):
        starts.append(first + 1)
        longest = int((cost[first] <= allowed).nonzero()[-1]) + 1
        first = min(longest, T - (n - 1 - group))  # every later group still needs a timestep
    return starts


def latest_introduction(share: float, steps: int, j: int, later: int) -> int:
    """The step at which group j of the `later` ones after the first comes at the latest: the first one not
    below share * steps * j / later. (Less 1e-12 of it: 0.55 * 3000 is 1650.0000000000002 in floats.)"""
    return math.ceil(share * steps * j / later * (1 - 1e-12))


class Curriculum:
    """The timestep curriculum of NA-LR C.3, a step at a time. With one group it plainly samples `base`,
    which is what a run without a curriculum does.

    stage:  how many groups have been introduced after the first
    t_low:  the smallest timestep of this stage; the largest is always T
    start:  the step at which this stage began
    """

    def __init__(self, starts: list[int], T: int, steps: int, share: float = 0.4, patience: int = 200,
                 alpha: float = 0.05, base: torch.Tensor | None = None, progressive: bool = True):
        """starts: first timesteps of the groups, ascending (`cluster_timesteps`); base has none before them.

        share: the curriculum takes at most this share of all `steps`, so that short runs finish it:
               group j of the N - 1 later ones comes at the latest at step share * steps * j / (N - 1).
               1 switches this rule off. Raises ValueError outside [0, 1].
        patience, alpha: a group also comes when the EMA of the loss (factor alpha, C.3.2) has not
               improved for `patience` steps (C.3.1)
        base: the chance of each t once all groups are in (default `uniform`)
        progressive: as C.3.3; False draws from `base` within the groups that are in, as C.3.1
        """
        if not 0 <= share <= 1:
            raise ValueError(f"curriculum share {share} must lie in [0, 1]")
        self.starts, self.T, self.steps = starts, T, steps
        self.share, self.patience, self.alpha = share, patience, alpha
        self.base, self.progressive = uniform(T) if base is None else base, progressive
        self.stage, self.start = 0, 0
        self._forget_losses()

    def _forget_losses(self):
        self.ema, self.best, self.since_best = None, math.inf, 0

    @property
    def t_low(self) -> int:
        return self.starts[len(self.starts) - 1 - self.stage]

    def probabilities(self) -> torch.Tensor:
        """Progressive uniform sampling (C.3.3): float64 (T + 1,), the chance of each t.

        Timesteps of earlier groups keep the chance that they have at the end of the curriculum, so they
        are not forgotten; the newest group shares the rest.
        """
        newest = len(self.starts) - 1 - self.stage
        end = self.starts[newest + 1] if self.stage and self.progressive else self.T + 1  # of the newest
        p = self.base.clone()
        p[:self.t_low] = 0
        p[self.t_low:end] *= (1 - p[end:].sum()) / p[self.t_low:end].sum()
        return p

    def sample(self, n: int, generator: torch.Generator, stratified: bool = False) -> torch.Tensor:
        """n timesteps in ascending order, int64 (n,), on the CPU: the host must know them to choose ranks,
        and must not ask a device for them. (Images come in random order, so that of t is free; sorted,
        samples of similar rank lie side by side.)

        stratified: one draw in each of n equal strata of the cumulative distribution. Each t is as likely
        as before, but every batch covers all noise levels, so its cost and its loss vary less.
        """
        p = self.probabilities()
        cumulative = p.cumsum(0)
        cumulative[p.nonzero()[-1]:] = 2  # a rounding below 1 would leave the largest draws without a t
        u = torch.rand(n, dtype=torch.float64, generator=generator)
        u = (torch.arange(n) + u) / n if stratified else u.sort().values
        return torch.searchsorted(cumulative, u, right=True)

    def observe(self, first_step: int, losses: list[float]) -> None:
        """Takes the denoising losses of consecutive steps from `first_step` on; those of an earlier stage
        are ignored. EMA_t = alpha L_t + (1 - alpha) EMA_{t-1} (C.3.2), afresh in each stage. Once a
        plateau is found it stands until `advance` acts on it, even if the loss improves meanwhile."""
        for step, loss in enumerate(losses, first_step):
            if step < self.start or self.since_best >= self.patience:
                continue
            self.ema = loss if self.ema is None else self.alpha * loss + (1 - self.alpha) * self.ema
            self.since_best = 0 if self.ema < self.best else self.since_best + 1
            self.best = min(self.best, self.ema)

    def advance(self, step: int) -> bool:
        """To be called before each step: introduces the next group if it is due, and says whether."""
        before, later = self.stage, len(self.starts) - 1
        while self.stage < later and (
                self.since_best >= self.patience
                or (self.share < 1
                    and step >= latest_introduction(self.share, self.steps, self.stage + 1, later))):
            self.stage, self.start = self.stage + 1, step
            self._forget_losses()
        return self.stage > before

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("stage", "start", "ema", "best", "since_best")}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for what cannot be a state."""
        for name in self.state_dict():
            if not isinstance(state[name], (int, float, type(None))):
                raise ValueError(f"{name} of the curriculum is not a number")
            setattr(self, name, state[name])
