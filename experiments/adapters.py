"""Ways to adapt a frozen masked diffusion language model to a task: LoRA-Diffusion, and its baselines.

LoRA-Diffusion (Khazrak and Green 2026) leaves all layers alone and corrects the final hidden states by

    h'_t = h_t + sigma(t) sum_i g_i(h_t, t, c)                                                Eq. (2), (3)
    g_i  = W_A (gamma(c) * relu(W_B [h_t; Emb(t)])) + beta(c)                                 Eq. (4)

with modules of their own for each of three phases of t. Weight LoRA, bottleneck adapters and prefixes are
layers that take the place of layers of the base. Every method has in addition a few rows of its own: the
embedding of the separator, and embedding and output of the task's labels. Read text_diffusion.py before,
lora_diffusion.py after.
"""

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import rank_analysis
import schedule
from lowrank import Active, LowRankLinear, masked_channels
from schedule import RankSchedule
from script import InputError, read_checkpoint, write_then_rename
from text import LONGEST, MASK, PAD
from text_diffusion import Block, T, TextDiffusion, distance_bias

# ----------------------------------------------------------------------------------------------------
# LoRA-Diffusion: phases

EARLY, MIDDLE, LATE = 0, 1, 2  # early in sampling: much noise


def phase(t: torch.Tensor, steps: int = T) -> torch.Tensor:
    """early t > 2T/3, middle T/3 < t <= 2T/3, late t <= T/3; section 3.3. steps: T"""
    return (3 * t <= 2 * steps).long() + (3 * t <= steps).long()


class Trajectory(NamedTuple):
    """What g is made of. Ranks and sigma: early, middle, late. The paper's ranks 64 / 32 / 8 are those of
    width 768; ours scale with the width (`ranks_at`). condition: what c is, `instruction` (as printed),
    `sentence`, too (the instruction and then the sentence), `none` (gamma = 1, beta = 0), or `given`: e(c)
    comes from elsewhere."""
    ranks: tuple[int, int, int]
    sigma: tuple[float, float, float] = (1.0, 0.5, 0.25)
    modules: int = 2
    condition: str = "instruction"
    beta: bool = True
    rank_weight: float = 0.01  # lambda_rank, Eq. (5)
    orthogonality_weight: float = 0.001  # lambda_orth


def ranks_at(width: int, ranks=(64, 32, 8)) -> tuple[int, ...]:
    return tuple(max(1, round(r * width / 768)) for r in ranks)


# ----------------------------------------------------------------------------------------------------
# LoRA-Diffusion: instruction encoder and modules


class InstructionEncoder(nn.Module):
    """Two transformer layers over the base's embeddings of words, then their mean: e(c), (B, D). The paper's
    has 37.8 M parameters, about an embedding table of BERT's and two layers; ours borrows the base's table,
    frozen."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.position = nn.Parameter(torch.empty(2 * LONGEST, width).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, words, there):
        """words (B, N, D), embedded; there: bool (B, N), False for padding"""
        h = words + self.position[:words.shape[1]]
        bias = distance_bias(self.blocks[0].heads, h.shape[1])
        for block in self.blocks:
            h = block(h, there, bias)  # (B, N, D)
        there = there[:, :, None].to(h.dtype)
        return (self.norm(h) * there).sum(1) / there.sum(1)  # (B, D)


class Module(nn.Module):
    """g_i of one phase, Eq. (4). W_A, gamma - 1 and beta start at zero, and so does g."""

    def __init__(self, width: int, rank: int, conditional: bool, beta: bool):
        super().__init__()
        self.W_B = nn.Parameter(torch.empty(rank, 2 * width).normal_(std=(2 * width) ** -0.5))
        self.W_A = nn.Parameter(torch.zeros(width, rank))
        self.gamma = zeros_linear(width, rank) if conditional else None
        self.beta = zeros_linear(width, width) if conditional and beta else None

    def forward(self, h, time, e):
        """h (B, N, D), time (B, D), e = e(c) (B, D) or (1, D) -> g (B, N, D)"""
        time = time[:, None].expand(-1, h.shape[1], -1)
        v = F.relu(F.linear(torch.cat([h, time], -1), self.W_B))  # (B, N, r)
        if self.gamma is not None:
            v = (1 + self.gamma(e))[:, None] * v
        g = F.linear(v, self.W_A)  # (B, N, D)
        return g if self.beta is None else g + self.beta(e)[:, None]


def zeros_linear(n: int, m: int) -> nn.Linear:
    layer = nn.Linear(n, m)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class TrajectoryAdapter(nn.Module):
    """sigma(t) sum_i g_i: three banks of modules, one for each phase of the T = `steps` steps."""

    def __init__(self, config: Trajectory, width: int, heads: int, steps: int = T):
        super().__init__()
        self.config, self.steps = config, steps
        conditional = config.condition != "none"
        self.banks = nn.ModuleList(
            nn.ModuleList(Module(width, rank, conditional, config.beta) for _ in range(config.modules))
            for rank in config.ranks)
        reads = config.condition in ("instruction", "sentence")
        self.encoder = InstructionEncoder(width, heads) if reads else None

    def forward(self, h, t, time, e):
        """delta_t of Eq. (2), (B, N, D): h (B, N, D), t (B,), time = Emb(t) (B, D), e (B, D), (1, D) or
        None"""
        delta = torch.zeros_like(h)
        for number, (bank, sigma) in enumerate(zip(self.banks, self.config.sigma)):
            rows = (phase(t, self.steps) == number).nonzero()[:, 0]
            if len(rows):
                e_rows = e if e is None or len(e) == 1 else e[rows]
                g = sum(module(h[rows], time[rows], e_rows) for module in bank)
                delta = delta.index_add(0, rows, (sigma * g).to(delta.dtype))
        return delta

    def shift(self, t, e):
        """The part of delta_t that does not depend on h, and that no rank bounds: sigma(t) sum_i beta_i(c),
        (B, D)"""
        by_phase = torch.stack([
            sigma * sum(torch.zeros_like(e) if m.beta is None else m.beta(e) for m in bank)
            for bank, sigma in zip(self.banks, self.config.sigma)])  # (3, 1 or B, D)
        return by_phase.expand(-1, len(t), -1)[phase(t, self.steps), torch.arange(len(t))]

    def penalty(self):
        """lambda_rank R_rank + lambda_orth R_orth, over all banks: Eq. (5)"""
        c, total = self.config, 0.0
        for bank in self.banks:
            if c.rank_weight:
                total = total + c.rank_weight * sum(nuclear_norm(m.W_A) + nuclear_norm(m.W_B) for m in bank)
            if c.orthogonality_weight:
                total = total + c.orthogonality_weight * overlap([m.W_A for m in bank])
        return total


class _NuclearNorm(torch.autograd.Function):
    """The sum of the singular values s of W = P s Q^T. Its gradient is P Q^T, over the s that are not zero:
    where W has too low a rank this is the smallest subgradient, and a matrix of zeros (W_A at the start)
    feels none. From the eigenvalues of the small W W^T in float64, several times faster than the
    decomposition of W."""

    @staticmethod
    def forward(ctx, W):
        small = (W if W.shape[0] <= W.shape[1] else W.t()).double()  # (r, n)
        s_squared, P = torch.linalg.eigh(small @ small.t())  # (r,), (r, r)
        s = s_squared.clamp(min=0).sqrt()
        inverse = torch.where(s > 1e-6 * s.max().clamp(min=1e-9), 1 / s.clamp(min=1e-30), 0)
        gradient = (P * inverse) @ (P.t() @ small)  # (W W^T)^(-1/2) W = P Q^T
        ctx.save_for_backward((gradient if W.shape[0] <= W.shape[1] else gradient.t()).to(W.dtype))
        return s.sum().to(W.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


def nuclear_norm(W: torch.Tensor) -> torch.Tensor:
    """||W||_*, Eq. (6)"""
    return _NuclearNorm.apply(W)


def overlap(W_As: list[torch.Tensor]) -> torch.Tensor | float:
    """sum over i != j of ||W_A(i)^T W_A(j)||_F^2, Eq. (7); both orders of a pair count"""
    return sum(((a.t() @ b).square().sum() for i, a in enumerate(W_As) for j, b in enumerate(W_As) if i != j),
               0.0)


def effective_rank(delta: torch.Tensor) -> float:
    """exp of the entropy of the singular values' shares (section 3.8): delta (N, D), a correction a row. 1 of
    no correction at all."""
    return rank_analysis.effective_rank(delta) if delta.any() else 1.0


# ----------------------------------------------------------------------------------------------------
# Baselines: layers that stand where a layer of the base stood


class LoRALinear(nn.Module):
    """y = W x + b + U V^T x, U from zero (Hu et al. 2021). `active` masks channels by t: T-LoRA."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer = layer
        self.low = LowRankLinear(layer.in_features, layer.out_features, rank, bias=False)  # U and V are zero
        nn.init.normal_(self.low.V, std=layer.in_features**-0.5)

    def forward(self, x, active: Active = None):
        return self.layer(x) + self.low(x, active)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One dense layer that does the same, if no channels are masked."""
        layer = copy.deepcopy(self.layer)
        layer.weight += self.low.weight()
        return layer


class WithBottleneck(nn.Module):
    """y + W_up relu(W_down y), y what the layer gives (Houlsby et al. 2019; W_up from zero)."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer, self.rank = layer, rank
        self.down, self.up = nn.Linear(layer.out_features, rank), zeros_linear(rank, layer.out_features)

    def forward(self, x, active: Active = None):
        y = self.layer(x)
        h = F.relu(self.down(y))  # (B, N, r)
        if active is not None:
            k, mask = active[self.rank]
            h = F.pad(h[..., :k] * mask[:, None].to(h.dtype), (0, self.rank - k))
        return y + self.up(h)


class WithPrefix(nn.Module):
    """Learned keys, or values, before those of the sentence (Li and Liang 2021)."""

    def __init__(self, layer: nn.Linear, length: int):
        super().__init__()
        self.layer = layer
        self.prefix = nn.Parameter(torch.empty(length, layer.out_features).normal_(std=0.02))

    def forward(self, x, active: Active = None):
        y = self.layer(x)  # (B, N, D)
        return torch.cat([self.prefix.to(y.dtype).expand(len(y), -1, -1), y], 1)  # (B, length + N, D)


# ----------------------------------------------------------------------------------------------------
# The adapted model

# T-LoRA: fewer channels at more noise, from all at t = 0 to half of them at t = T. schedule.py counts 1,000
# steps.
T_LORA = RankSchedule("linear", rho_min=0.5, warm_start=0.0)
# The shares of LoRA-Diffusion's ranks in its phases, for adapters that are otherwise plain
PHASES = RankSchedule(((1, 8 / 64), (340, 32 / 64), (670, 1.0)))

TRAJECTORIES = {  # LoRA-Diffusion and its variants, ranks those of width 768
    "LoRA-Diffusion": Trajectory((64, 32, 8)),
    "LoRA-Diffusion, reads the sentence": Trajectory((64, 32, 8), condition="sentence"),
    "LoRA-Diffusion without beta": Trajectory((64, 32, 8), beta=False),
    "LoRA-Diffusion without instruction": Trajectory((64, 32, 8), condition="none"),
}
METHODS = ("full fine-tuning", *TRAJECTORIES, "weight LoRA", "T-LoRA", "adapters", "adapters in phases",
           "BitFit", "prefix tuning", "head only")


class Adapted(nn.Module):
    """The base, frozen but for full fine-tuning and BitFit, what a method adds, and the task's own rows.

    Tokens from `words` on are the task's: first the separator, then its labels."""

    def __init__(self, base: TextDiffusion, labels: int, method: str, trajectory: Trajectory | None = None):
        """trajectory: for LoRA-Diffusion; its ranks are taken as they are."""
        super().__init__()
        self.method, self.words, self.labels = method, base.config.words, labels
        self.base = copy.deepcopy(base).requires_grad_(method == "full fine-tuning")
        d, heads = base.config.width, base.config.heads
        # as large as words are
        self.own_embedding = nn.Parameter(torch.empty(1 + labels, d).normal_(std=0.02 * d**0.5))
        # A label's embedding is read where it is unmasked, that is where there is no loss: it stays as it is,
        # for the final states of a reverse diffusion to differ by. It is counted all the same.
        self.own_output = nn.Parameter(torch.empty(labels, d).normal_(std=0.02))
        self.own_bias = nn.Parameter(torch.zeros(labels))
        self.trajectory = TrajectoryAdapter(trajectory, d, heads) if trajectory else None
        self.rank_schedule, self.rank = None, None
        rank, bottleneck = ranks_at(d, (64, 256))  # the paper's for weight LoRA and adapters
        for block in self.base.blocks:
            if method in ("weight LoRA", "T-LoRA"):
                for name in ("q", "k", "v", "out", "mlp_in", "mlp_out"):
                    setattr(block, name, LoRALinear(getattr(block, name), rank))
                if method == "T-LoRA":
                    self.rank_schedule, self.rank = T_LORA, rank
            elif method in ("adapters", "adapters in phases"):
                for name in ("out", "mlp_out"):
                    setattr(block, name, WithBottleneck(getattr(block, name), bottleneck))
                if method == "adapters in phases":
                    self.rank_schedule, self.rank = PHASES, bottleneck
            elif method == "prefix tuning":
                block.k, block.v = WithPrefix(block.k, 32), WithPrefix(block.v, 32)
        if method == "BitFit":
            for name, parameter in self.base.named_parameters():
                parameter.requires_grad_(name.endswith("bias"))

    def active(self, t: torch.Tensor) -> Active:
        if self.rank_schedule is None:
            return None
        return {self.rank: masked_channels(self.rank_schedule.active(t * (schedule.T // T), self.rank))}

    def embed(self, x):
        """x (B, N), its own tokens from `words` on -> (B, N, D)"""
        own = F.embedding((x - self.words).clamp(min=0), self.own_embedding)
        return torch.where((x >= self.words)[..., None], own, self.base.embed(x.clamp(max=self.words - 1)))

    def base_hidden(self, x_t, t, embedded=None):
        """h_t: (B, N, D)"""
        h = self.embed(x_t) if embedded is None else embedded
        return self.base.transform(h, t, x_t != PAD, self.active(t))

    def encode_instruction(self, c, x_t):
        """e(c), (1, D) or (B, D). c: ids of the instruction (L,). With condition `sentence`, the words of x_t
        come after it; a mask or a token of the task is no word."""
        encoder = self.trajectory.encoder
        if encoder is None:
            return None
        c = c[None]
        if self.trajectory.config.condition == "sentence":
            sentence = torch.where((x_t >= self.words) | (x_t == MASK), PAD, x_t)
            c = torch.cat([c.expand(len(x_t), -1), sentence], 1)
        return encoder(self.base.embed(c), c != PAD)

    def correction(self, h, x_t, t, c):
        """delta_t, Eq. (2): (B, N, D)"""
        return self.trajectory(h, t, self.base.time(t).to(h.dtype), self.encode_instruction(c, x_t))

    def hidden(self, x_t, t, c=None):
        """h'_t = h_t + delta_t, Eq. (2): (B, N, D). c: the instruction's ids, which LoRA-Diffusion reads."""
        h = self.base_hidden(x_t, t)
        return h if self.trajectory is None else h + self.correction(h, x_t, t, c)

    def label_logits(self, h):
        return F.linear(h, self.own_output, self.own_bias)  # (..., labels)

    def logits(self, h):
        """Of all words and then the task's labels: (..., words - 2 + labels)"""
        return torch.cat([self.base.logits(h), self.label_logits(h)], -1)

    def penalty(self):
        return 0.0 if self.trajectory is None else self.trajectory.penalty()


def adapt(base: TextDiffusion, labels: int, method: str, trajectory: Trajectory | None = None) -> Adapted:
    """A model to be fine-tuned. trajectory: another than the method's, its ranks those of width 768."""
    trajectory = trajectory or TRAJECTORIES.get(method)
    if trajectory:
        trajectory = trajectory._replace(ranks=ranks_at(base.config.width, trajectory.ranks))
    return Adapted(base, labels, method, trajectory)


# ----------------------------------------------------------------------------------------------------
# Accounting


def trained_weights(model: Adapted) -> dict[str, torch.Tensor]:
    """What a task has of its own, by name"""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def parameter_counts(model: Adapted) -> dict[str, int]:
    """Trained parameters: all; the instruction encoder's; those of beta; those of the task's rows."""
    count = dict(trained=0, encoder=0, beta=0, rows=0)
    for name, weight in trained_weights(model).items():
        count["trained"] += weight.numel()
        count["encoder"] += weight.numel() * (".encoder." in name)
        count["beta"] += weight.numel() * (".beta." in name)
        count["rows"] += weight.numel() * name.startswith("own_")
    return count


def save_task(path: Path, model: Adapted, facts: dict) -> int:
    """Writes what the task has of its own, as float32; the size of the file in bytes."""
    trajectory = list(model.trajectory.config) if model.trajectory else None
    saved = dict(method=model.method, labels=model.labels, trajectory=trajectory, facts=facts,
                 weights=trained_weights(model))
    write_then_rename(path, lambda file: torch.save(saved, file))
    return path.stat().st_size


def load_task(path: Path, base: TextDiffusion) -> Adapted:
    """Raises InputError if the file is no task's, or of another base."""
    state = read_checkpoint(path, ("method", "labels", "trajectory", "weights"))
    try:
        trajectory = Trajectory(*state["trajectory"]) if state["trajectory"] else None
        model = Adapted(base, state["labels"], state["method"], trajectory)
        if set(state["weights"]) != set(trained_weights(model)):
            raise KeyError("weights")
        model.load_state_dict(state["weights"], strict=False)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path} is not a task's file for this base ({type(error).__name__}); "
                         "delete it to train it again") from None
    return model.eval()
