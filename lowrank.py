"""The low-rank layer W = U V^T: all its channels, the first k, or per-sample masks; initialisation; penalty.

NA-LR Eq. (1), (3) to (5). How many channels a forward pass may use is decided once, from t, and handed down
to every layer as the argument `active`: a `Channels` for each r_max, since layers of different shapes have
different ranks; or None: all channels of the layer. Nothing is stored on a module, so passes with
different ranks can share one model. Read schedule.py before, model.py after.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------
# Which channels are active


class Channels(NamedTuple):
    """The first k rank channels are computed, Eq. (5). In a batch whose samples differ, `mask` (B, k), 0 or
    1, says which of them each sample uses, Eq. (4)."""
    k: int
    mask: torch.Tensor | None = None


Active = dict[int, Channels] | None  # by r_max


def masked_channels(phi: torch.Tensor) -> Channels:
    """NA-LR Eq. (3), transposed: S[i, j] = 1 where j < Phi(t_i), j from 0. Only the columns that the neediest
    sample uses are made. phi: int64 (B,), on the CPU, because k is a shape."""
    k = int(phi.max())
    return Channels(k, (torch.arange(k) < phi[:, None]).float())  # (B, k)


# ----------------------------------------------------------------------------------------------------
# The layer


class Linear(nn.Linear):
    """A dense layer that takes `active` like its low-rank sibling, and has no use for it."""

    def forward(self, x, active: Active = None):
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

    def forward(self, x, active: Active = None):
        """x (B, n) or (B, N, n) -> (B, m) or (B, N, m)"""
        k, mask = Channels(self.rank) if active is None else active[self.rank]
        h = F.linear(x, self.V[:k])  # V_{1:k}^T x, Eq. (5): (B, N, k)
        if mask is not None:
            h = h * (mask if x.dim() == 2 else mask[:, None]).to(h.dtype)  # (V^T x) * S, Eq. (4)
        return F.linear(h, self.U[:k].t(), self.bias)  # U_{1:k} h + bias: (B, N, m)

    def weight(self, k: int | None = None) -> torch.Tensor:
        """The dense W_k = U_k V_k^T, Eq. (1): (m, n); all channels for None."""
        return self.U[:k].t() @ self.V[:k]

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
# Orthogonality


def orthogonality_penalty(model: nn.Module, active: Active = None) -> torch.Tensor:
    """sum over layers of (||offdiag(U^T U)||_F^2 + ||offdiag(V^T V)||_F^2) / k, over the first k channels of
    each; a float32 scalar, 0.0 for a dense model. k = 1 gives zero, and a channel beyond k gets no gradient.

    The paper says "light orthogonality regularisation" without a formula. Only the off-diagonal is
    penalised, so the singular values stay free.
    """
    groups = defaultdict(list)  # equal shapes share one batched product
    for layer in low_rank_layers(model):
        k = layer.rank if active is None else active[layer.rank].k
        groups[k, layer.U.shape[1]].append(layer.U[:k])
        groups[k, layer.V.shape[1]].append(layer.V[:k])
    total = 0.0
    for (k, _), factors in groups.items():
        stack = torch.stack(factors)  # (layers, k, m or n): stored transposed
        gram = stack @ stack.mT  # (layers, k, k)
        off = gram - torch.diag_embed(torch.diagonal(gram, dim1=1, dim2=2))
        total = total + off.square().sum() / k
    return total
