"""The low-rank layer W = U V^T and its ways to run; spectral initialisation; orthogonality penalty.

NA-LR Eq. (1), (3) to (5). Which rank a forward pass may use is decided once, from t, and handed down
to every layer as the argument `active`:

    None                 all r_max channels (full rank is reached at t near 0, and by a static model)
    {r_max: k}           slicing, Eq. (5): the first k channels, for a batch that shares one t
    {r_max: mask (B,k)}  masking, Eq. (3), (4), inside the first k channels: sample i uses the channels
                         where mask[i] is 1; k is what the neediest sample may need
    {r_max: Sorted}      the same result for a batch in ascending order of t, without most of the products
                         that masking multiplies by zero: see "Sorted execution"
    "merged": {layer: W} beside the others: these layers multiply by a dense W_k (m,n), see `Merged`

The key is the layer's own r_max, because layers of different shapes have different ranks. Nothing is
stored on a module, so passes with different ranks can share one model.
"""

from collections import defaultdict
from typing import List, NamedTuple  # List: operators of torch 2.6 do not know list

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Linear(nn.Linear):
    """A dense layer that takes `active` like its low-rank sibling, and has no use for it."""

    def forward(self, x, active=None):
        return super().forward(x)


def channels_first(k: int) -> bool:
    """Whether to lay out V^T x as (k, vectors) instead of (vectors, k). Some k fit a CPU's vector units badly, the many
    vectors do not: MKL is up to 1.8 times as fast that way. With few channels it is half as fast. GPUs do not mind."""
    return k > 56


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
        if active is None:
            channels = self.rank
        elif "merged" in active and self in active["merged"]:
            return F.linear(x, active["merged"][self], self.bias)
        else:
            channels = active[self.rank]
        if in_chunks(x, channels):
            return sorted_low_rank([self], x, channels)[0]
        if isinstance(channels, Sorted):
            channels = channels.mask
        masked = isinstance(channels, torch.Tensor)
        k = channels.shape[1] if masked else channels
        U, V = self.first(k)
        flat = x.reshape(-1, x.shape[-1])  # (vectors, n)
        h = torch.mm(V, flat.t()) if channels_first(k) else torch.mm(flat, V.t()).t()  # (k, vectors)
        if masked:
            # not in place: autograd would copy the gradient twice for a change of a view
            mask = channels.t()[:, :, None].to(h.dtype)  # (k, B, 1)
            h = (h.view(k, len(x), -1) * mask).view(k, -1)  # (k, B, vectors of a sample)
        y = torch.mm(h.t(), U) if self.bias is None else torch.addmm(self.bias, h.t(), U)  # (vectors, m)
        return y.view(*x.shape[:-1], -1)

    def first(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first k channels of U and V: (k, m), (k, n). Channels beyond k get a gradient of zero."""
        return (self.U, self.V) if k == self.rank else (self.U[:k], self.V[:k])

    def weight(self, k: int | None = None) -> torch.Tensor:
        """The dense W_k = U_k V_k^T, (m, n); all channels for None."""
        U, V = self.first(self.rank if k is None else k)
        return U.t() @ V

    def extra_repr(self) -> str:
        return f"{self.V.shape[1]} -> {self.U.shape[1]}, rank {self.rank}"


def in_chunks(x, channels) -> bool:
    """Whether sorted execution cuts the batch x. Not where a sample is one vector: what takes time there is reading the
    weights, and every chunk would read them again; such layers are a hundredth of the multiply-adds."""
    return isinstance(channels, Sorted) and x.dim() > 2 and x.shape[1] > 1


def side_by_side(layers: list[nn.Module], x, active=None) -> list[torch.Tensor]:
    """What each of the layers makes of the same tokens x (B, rows, n), as `layer(x, active)` would; in sorted execution
    with fewer products. The layers are all dense, or all low-rank of the same rank."""
    channels = active and active.get(getattr(layers[0], "rank", None))
    if in_chunks(x, channels):
        return sorted_low_rank(layers, x, channels)
    return [layer(x, active) for layer in layers]


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
    """{r_max: k}, the most channels that a sample may use, of any `active` but None."""
    masks = {r: c.mask if isinstance(c, Sorted) else c for r, c in active.items()}
    return {r: c.shape[1] if isinstance(c, torch.Tensor) else c for r, c in masks.items()}


def masks(phi: dict[int, torch.Tensor], k: dict[int, int]) -> dict[int, torch.Tensor]:
    """Per-sample masks, NA-LR Eq. (3): S[i, j] = 1 where channel j < Phi(t_i), inside the first k.

    phi: {r_max: Phi(t_i) (B,)}; k: {r_max: channels to compute}, at least the largest Phi(t_i).
    Returns {r_max: float32 (B, k)}.
    """
    return {r: (torch.arange(k[r], device=p.device) < p[:, None]).float() for r, p in phi.items()}


# ----------------------------------------------------------------------------------------------------
# Sorted execution: exact slicing in training, without a curriculum
#
# Masking multiplies every sample by all k channels and then throws some of the result away. In a batch in
# ascending order of t, ranks descend: cut it into a few chunks, and each needs only the channels of its
# first sample. The masks inside a chunk make the result exactly that of masking.


class Sorted(NamedTuple):
    """mask: float (B, k), as in masking. chunks: int64 (C, 3) on the CPU, for each chunk its first sample,
    how many channels that one needs, and how many the last one needs; a tensor, because torch.compile would
    compile anew for every list of numbers."""
    mask: torch.Tensor
    chunks: torch.Tensor


def cut(cost: list[int], slack: float = 0.035, places: int = 64) -> list[int]:
    """Where to cut a sorted batch: the first samples of as few chunks as possible, whose total cost is
    at most (1 + slack) times what the samples themselves need, or else as low as `places` allow.

    cost: of each sample, falling; a chunk costs each of its samples what its first one costs
    places: cuts are tried at so many evenly spaced samples, so that large batches are cut fast, too
    """
    cost = np.asarray(cost, dtype=np.float64)
    B = len(cost)
    at = np.unique(np.linspace(0, B, min(B, places) + 1).round().astype(int))  # from 0 to B
    one = cost[at[:-1], None] * (at[None, 1:] - at[:-1, None])  # one[i, j]: a chunk from at[i] to at[j + 1]
    one = np.where(one > 0, one, np.inf)
    best, before = one[0], []  # best[j]: the cheapest way to cover samples 0..at[j + 1] with so many chunks
    while best[-1] > (1 + slack) * cost.sum() and len(before) < len(at) - 2:
        total = best[:-1, None] + one[1:]
        before.append(total.argmin(0) + 1)
        best = total.min(0)
    last, first = len(at) - 2, []
    for choice in reversed(before):
        first.append(int(choice[last]))
        last = first[-1] - 1
    return [0] + [int(at[i]) for i in reversed(first)]


def _chunks(chunks: torch.Tensor, rows: int, mask: torch.Tensor, *tensors: torch.Tensor):
    """For each chunk: its channels k, how many of them its last sample needs, the mask (k - least, 1, samples, 1) of
    the others, and the chunk's part of each of the `tensors` (B * rows, ...)."""
    firsts, ks, least = chunks.t().tolist()
    ends = firsts[1:] + [len(mask)]
    masks = [mask.t()[l:k, None, first:end, None] for first, end, l, k in zip(firsts, ends, least, ks)]
    return zip(ks, least, masks, *(tensor.split([(b - a) * rows for a, b in zip(firsts, ends)]) for tensor in tensors))


def _block(buffer: torch.Tensor, k: int, layers: int, vectors: int, start: int = 0) -> torch.Tensor:
    """Numbers of a flat buffer from `start` on, as the k channels of so many layers: (k * layers, vectors)."""
    k *= layers
    return buffer.as_strided((k, vectors), (vectors, 1) if channels_first(k) else (1, k), start)


# Every product is written where it belongs: no padding to r_max, nothing concatenated. Layers that share their input
# (Q, K and V) run together: one product for all their V, which is wider, so faster, and reads x once. For that, V holds
# channel j of all of them side by side, and the first k channels of all are still one block of memory.


@torch.library.custom_op("nalr::sorted_forward", mutates_args=())
def _sorted_forward(x: torch.Tensor, V: torch.Tensor, Us: List[torch.Tensor], biases: List[torch.Tensor],
                    mask: torch.Tensor, chunks: torch.Tensor) -> List[torch.Tensor]:
    """For L layers: x (B, rows, n), V (r, L, n), each U (r, m) and each bias (m,), or no biases -> each y (B, rows, m)
    and, for the backward pass, the masked V^T x of all chunks, packed into one flat buffer.

    The bias is one more channel, in front, that is always 1: the product with U adds it on the way (and the
    backward pass has its gradient), where `addmm` would first write it to all of y."""
    (B, rows, n), L, one = x.shape, len(Us), int(len(biases) > 0)
    U_1s = [torch.cat([bias[None], U]) for bias, U in zip(biases, Us, strict=True)] if one else Us  # (one + r, m)
    ys = [x.new_empty(B * rows, U.shape[1]) for U in Us]
    packed, used = x.new_empty(B * rows * (one + mask.shape[1]) * L), 0
    for k, least, mask_c, x_c, *y_c in _chunks(chunks, rows, mask, x.reshape(B * rows, n), *ys):
        flat = _block(packed, one + k, L, len(x_c), used)
        h_1, used = flat.view(-1, L, len(x_c)), used + flat.numel()  # (one + k, L, vectors)
        h_1[:one] = 1
        torch.mm(V[:k].view(-1, n), x_c.t(), out=flat[one * L:])
        if least < k:
            h_1[one + least:].view(k - least, L, -1, rows).mul_(mask_c)
        for i, U_1 in enumerate(U_1s):
            torch.mm(h_1[:, i].t(), U_1[:one + k], out=y_c[i])
    return [y.view(B, rows, -1) for y in ys] + [packed]


@torch.library.custom_op("nalr::sorted_backward", mutates_args=())
def _sorted_backward(grads: List[torch.Tensor], x: torch.Tensor, packed: torch.Tensor, V: torch.Tensor,
                     Us: List[torch.Tensor], mask: torch.Tensor, chunks: torch.Tensor, input_grad: bool,
                     bias: bool) -> List[torch.Tensor]:
    """Gradients of x (empty unless input_grad), of V and of each U below that of its bias, if there is one. The first
    chunk has the most channels: it writes its rows of the factors' gradients, the others add to theirs, and only
    rows that no chunk computes are filled with zeros."""
    (B, rows, n), L, one = x.shape, len(Us), int(bias)
    x, grads = x.reshape(B * rows, n), [grad.reshape(B * rows, -1) for grad in grads]
    dx = torch.empty_like(x) if input_grad else x.new_empty(B * rows, 0)
    dU_1s, dV = [U.new_empty(one + U.shape[0], U.shape[1]) for U in Us], torch.empty_like(V)
    scratch, used = None, 0
    for k, least, mask_c, x_c, dx_c, *grad_c in _chunks(chunks, rows, mask, x, dx, *grads):
        flat = _block(packed, one + k, L, len(x_c), used)
        h_1 = flat.view(-1, L, len(x_c))  # (one + k, L, vectors)
        is_first, used = used == 0, used + flat.numel()
        if scratch is None or len(scratch) < flat.numel():
            scratch = x.new_empty(flat.numel())  # one for all chunks: small, so it stays in the cache
        flat = _block(scratch, k, L, len(x_c))
        dh = flat.view(-1, L, len(x_c))  # (k, L, vectors)
        for i, U in enumerate(Us):
            torch.mm(U[:k], grad_c[i].t(), out=dh[:, i])
        if least < k:
            dh[least:].view(k - least, L, -1, rows).mul_(mask_c)
        V_k, dV_k = V[:k].view(-1, n), dV[:k].view(-1, n)  # (k * L, n)
        if input_grad:
            torch.mm(flat.t(), V_k, out=dx_c)
        if is_first:
            torch.mm(flat, x_c, out=dV_k)
            dV[k:] = 0
            for i, dU_1 in enumerate(dU_1s):
                torch.mm(h_1[:, i], grad_c[i], out=dU_1[:one + k])
                dU_1[one + k:] = 0
        else:
            dV_k.addmm_(flat, x_c)
            for i, dU_1 in enumerate(dU_1s):
                dU_1[:one + k].addmm_(h_1[:, i], grad_c[i])
    return [dx.view(B, rows, -1) if input_grad else x.new_empty(0), dV, *dU_1s]


@_sorted_forward.register_fake
def _(x, V, Us, biases, mask, chunks):
    B, rows, _ = x.shape
    channels = mask.shape[1] + (len(biases) > 0)
    return [x.new_empty(B, rows, U.shape[1]) for U in Us] + [x.new_empty(B * rows * channels * len(Us))]


@_sorted_backward.register_fake
def _(grads, x, packed, V, Us, mask, chunks, input_grad, bias):
    dU_1s = [U.new_empty(bias + U.shape[0], U.shape[1]) for U in Us]
    return [x.new_empty(x.shape if input_grad else 0), torch.empty_like(V), *dU_1s]


def _save(ctx, inputs, output):
    x, V, Us, biases, mask, chunks = inputs
    ctx.bias = len(biases) > 0
    ctx.set_materialize_grads(False)  # or autograd would fill a gradient of zeros for the packed blocks
    ctx.save_for_backward(x, output[-1], V, mask, chunks, *Us)


def _backward(ctx, grads):
    x, packed, V, mask, chunks, *Us = ctx.saved_tensors
    wants_x = ctx.needs_input_grad[0]
    grads = [x.new_zeros(*x.shape[:2], U.shape[1]) if grad is None else grad for grad, U in zip(grads, Us)]
    dx, dV, *dU_1s = _sorted_backward(grads, x, packed, V, Us, mask, chunks, wants_x, ctx.bias)
    dbiases, dUs = ([dU_1[0] for dU_1 in dU_1s], [dU_1[1:] for dU_1 in dU_1s]) if ctx.bias else ([], dU_1s)
    return dx if wants_x else None, dV, dUs, dbiases, None, None


_sorted_forward.register_autograd(_backward, setup_context=_save)


def sorted_low_rank(layers: list[LowRankLinear], x, active: Sorted) -> list[torch.Tensor]:
    """What layers of equal rank make of the same x (B, rows, n), chunk by chunk: a (B, rows, m) for each."""
    V = torch.stack([layer.V for layer in layers], 1) if len(layers) > 1 else layers[0].V[:, None]  # (r, L, n)
    Us, biases = [layer.U for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
    if torch.is_autocast_enabled(x.device.type):  # autocast does not look into our own operators
        dtype = torch.get_autocast_dtype(x.device.type)
        x, V, Us, biases = x.to(dtype), V.to(dtype), [U.to(dtype) for U in Us], [bias.to(dtype) for bias in biases]
    return _sorted_forward(x, V, Us, biases, active.mask, active.chunks)[:-1]


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


# ----------------------------------------------------------------------------------------------------
# Sampling: above the rank m n / (m + n) one dense product costs less than two thin ones


class Merged:
    """The dense W_k = U_k V_k^T of those layers whose k is above that rank, for a sampler that goes
    through the timesteps. Called with `active`, {r_max: k}, it returns it with "merged": {layer: W_k} added.

    k grows from step to step, and W_k with it, by the new channels' products alone: a whole sampling run
    merges each layer once. The weights must not change meanwhile.
    """

    def __init__(self, model: nn.Module):
        self.layers = low_rank_layers(model)
        self.k, self.W = dict.fromkeys(self.layers, 0), {}

    def __call__(self, active: dict) -> dict:
        merged = {}
        for layer in self.layers:
            k, have, (n, m) = active[layer.rank], self.k[layer], (layer.V.shape[1], layer.U.shape[1])
            if k * (m + n) <= m * n:
                continue
            if layer not in self.W or k < have:
                self.W[layer], have = layer.U.new_zeros(m, n), 0
            if k > have:
                self.W[layer].addmm_(layer.U[have:k].t(), layer.V[have:k])
            self.k[layer] = k
            merged[layer] = self.W[layer]
        return active | {"merged": merged} if merged else active
