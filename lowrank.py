"""The low-rank layer W = U V^T and its ways to run; spectral initialisation; orthogonality penalty.

NA-LR Eq. (1), (3) to (5). Which rank a forward pass may use is decided once, from t, and handed down
to every layer as the argument `active`:

    None                 all r_max channels (full rank is reached at t near 0, and by a static model)
    {r_max: k}           slicing, Eq. (5): the first k channels, for a batch that shares one t
    {r_max: mask (B,k)}  masking, Eq. (3), (4), inside the first k channels: sample i uses the channels
                         where mask[i] is 1; k is what the neediest sample may need

The key is the layer's own r_max, because layers of different shapes have different ranks. Nothing is
stored on a module, so passes with different ranks can share one model.
"""

from collections import defaultdict

import torch
import torch.nn as nn
import torch.nn.functional as F


class Linear(nn.Linear):
    """A dense layer that takes `active` like its low-rank sibling, and has no use for it."""

    def forward(self, x, active=None):
        return super().forward(x)


class LowRankLinear(nn.Module):
    """y = U V^T x + bias with nested rank channels. NA-LR Eq. (1), (4), (5).

    Both factors keep the rank as their leading axis, U (r, m) and V (r, n), so that the first k
    channels are one contiguous block of memory: slicing is a view and costs nothing.
    The factors start at zero; `factorise` fills them.
    """

    def __init__(self, n: int, m: int, rank: int, bias: bool = True):
        """n inputs, m outputs. Raises ValueError unless 1 <= rank <= min(m, n)."""
        super().__init__()
        if not 1 <= rank <= min(m, n):
            raise ValueError(f"rank {rank} of a {m}x{n} layer must lie in 1..{min(m, n)}")
        self.rank = rank
        self.U = nn.Parameter(torch.zeros(rank, m))
        self.V = nn.Parameter(torch.zeros(rank, n))
        self.bias = nn.Parameter(torch.zeros(m)) if bias else None

    def forward(self, x, active=None):
        """x (B, ..., n) -> (B, ..., m), with the channels that `active` allows (see the top)."""
        channels = self.rank if active is None else active[self.rank]
        masked = isinstance(channels, torch.Tensor)
        U, V = self.first(channels.shape[1] if masked else channels)
        h = F.linear(x, V)  # (B, ..., k)
        if masked:
            # in place: nothing else needs h, and a second (B, ..., k) would have to go through memory
            h.mul_(channels if h.dim() == 2 else channels[:, None])  # (B, k) or (B, 1, k)
        return F.linear(h, U.t(), self.bias)  # (B, ..., m)

    def first(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first k channels of U and V: (k, m), (k, n). Channels beyond k get a gradient of zero."""
        return (self.U, self.V) if k == self.rank else (self.U[:k], self.V[:k])

    def weight(self, k: int | None = None) -> torch.Tensor:
        """The dense W_k = U_k V_k^T, (m, n); all channels for None."""
        U, V = self.first(self.rank if k is None else k)
        return U.t() @ V

    def extra_repr(self) -> str:
        return f"{self.V.shape[1]} -> {self.U.shape[1]}, rank {self.rank}"


def low_rank_layers(model: nn.Module) -> list[LowRankLinear]:
    return [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]


# ----------------------------------------------------------------------------------------------------
# From dense to low rank


def spectral_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-r approximation of W (m, n), split evenly: U = P_r sqrt(S_r), V = Q_r sqrt(S_r)
    with W = P S Q^T (spectral initialisation, Khodak et al. 2021). Returns (r, m) and (r, n).

    A weight of zeros (adaLN starts there) would make both factors zero, and zero times zero never
    trains: each factor's gradient is a product with the other. There V gets orthonormal rows and U
    stays zero, so the layer starts at zero like the dense one and leaves it at the first step.
    """
    if not weight.any():
        V = spectral_factors(nn.init.normal_(torch.empty_like(weight)), rank)[1]
        return torch.zeros_like(weight[:, :rank].t()), F.normalize(V, dim=1)
    P, S, Qt = torch.linalg.svd(weight, full_matrices=False)
    root = S[:rank].sqrt()
    return (P[:, :rank] * root).t(), root[:, None] * Qt[:rank]


@torch.no_grad()
def factorise(model: nn.Module, ranks: dict[str, int], initialise: bool = True) -> None:
    """Replaces the dense layers named in `ranks` by low-rank ones that approximate them; in place.

    ranks: module name -> r_max. initialise=False leaves the factors at zero, for a model whose weights
    are about to be loaded. Works on a fresh model (spectral initialisation) and on a trained one
    (post-hoc compression) alike.
    """
    for name, rank in ranks.items():
        dense = model.get_submodule(name)
        low = LowRankLinear(dense.in_features, dense.out_features, rank, bias=dense.bias is not None)
        low.to(dense.weight.device, dense.weight.dtype)
        if initialise:
            U, V = spectral_factors(dense.weight, rank)
            low.U.copy_(U)
            low.V.copy_(V)
        if dense.bias is not None:
            low.bias.copy_(dense.bias)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, low)


# ----------------------------------------------------------------------------------------------------
# Which channels are active


def widths(active) -> dict[int, int]:
    """{r_max: k}, the channels that are computed, of any `active` but None."""
    return {r: c.shape[1] if isinstance(c, torch.Tensor) else c for r, c in active.items()}


def masks(phi: dict[int, torch.Tensor], k: dict[int, int]) -> dict[int, torch.Tensor]:
    """Per-sample masks, NA-LR Eq. (3): S[i, j] = 1 where channel j < Phi(t_i), inside the first k.

    phi: {r_max: Phi(t_i) (B,)}; k: {r_max: channels to compute}, at least the largest Phi(t_i).
    Returns {r_max: float32 (B, k)}.
    """
    return {r: (torch.arange(k[r], device=p.device) < p[:, None]).float() for r, p in phi.items()}


# ----------------------------------------------------------------------------------------------------
# Orthogonality


def orthogonality_penalty(model: nn.Module, active=None) -> torch.Tensor:
    """sum over layers of (||offdiag(U^T U)||_F^2 + ||offdiag(V^T V)||_F^2) / k, over the k channels
    that the step computes; a float32 scalar. k = 1 gives zero, and a channel that is not computed gets
    no gradient.

    The paper says "light orthogonality regularisation" without a formula. Only the off-diagonal is
    penalised, so the singular values stay free.
    """
    k_of = {} if active is None else widths(active)
    groups = defaultdict(list)  # equal shapes share one batched product
    for layer in low_rank_layers(model):
        for factor in layer.first(k_of.get(layer.rank, layer.rank)):
            groups[factor.shape].append(factor)
    total = 0.0
    for (k, _), factors in groups.items():
        stack = torch.stack(factors)  # (L, k, m)
        gram = stack @ stack.detach().mT  # (L, k, k)
        off = gram - torch.diag_embed(torch.diagonal(gram, dim1=1, dim2=2))
        penalty = off.square().sum() / k
        # The Gram matrix is symmetric: one side's gradient, doubled, is the whole gradient, and the
        # backward pass saves a product. The value stays what the formula says.
        total = total + 2 * penalty - penalty.detach()
    return total
