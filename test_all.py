"""Every test: sections in the order of the files, one property per test, the equation in its docstring.

    pytest test_all.py                  all, about three minutes on two CPU cores
    pytest test_all.py -k "mask or phi" some
"""

import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import curriculum
import data
import fid
import flops
import lowrank
import model
import sample
import schedule
import train
from model import Config, DiT
from schedule import T

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "experiments"))
import ablations
import classifier
import compare
import compress
import neighbours
import plot
import rank_analysis

SMALL = dict(depth=2, width=32, heads=2, patch=2, image_size=8, num_classes=4, dense_mlp_blocks=0)


def relative(a, b):
    """max |a - b| / max |b|"""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def awake(config, seed=0, dtype=torch.float64):
    """A model whose every weight matters: as initialised, adaLN-Zero makes the output zero."""
    torch.manual_seed(seed)
    net = DiT(config).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return net


def inputs(config, n, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, config.channels, config.image_size, config.image_size, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(1, T + 1, (n,), generator=g), torch.randint(0, config.num_classes + 1, (n,), generator=g)


def cli(module, *arguments):
    """Runs a script's main() with these arguments, in this process: (exit status, stdout, stderr)."""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            data.run_script(module.main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def refuses(module, *arguments, says):
    """Bad input: exit status 2 and one line on stderr that holds every word of `says`."""
    code, _, err = cli(module, *arguments)
    assert code == 2, err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    for word in says if isinstance(says, tuple) else (says,):
        assert word in err, err
    return err


# ----------------------------------------------------------------------------------------------------
# schedule.py


def test_cosine_noise_schedule():
    """Nichol and Dhariwal 2021, Eq. (17): alpha_bar_t = f(t)/f(0); beta clipped at 0.999 changes T alone."""
    s = schedule.NoiseSchedule()
    assert s.alpha_bar.dtype == s.log_snr.dtype == torch.float64 and len(s.alpha_bar) == len(s.log_snr) == T + 1
    assert s.alpha_bar[0] == 1
    f = lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (1, 2, 10, 500, 998, 999):
        assert s.alpha_bar[t].item() == pytest.approx(f(t) / f(0), rel=1e-10)
    assert (s.alpha_bar[T] / s.alpha_bar[T - 1]).item() == pytest.approx(0.001, rel=1e-9)


def test_log_snr():
    """SNR(t) = ab_t / (1 - ab_t), NA-LR B.1; it falls with every t, and by 6.9 at T."""
    s = schedule.NoiseSchedule()
    assert torch.allclose(s.log_snr[1:].exp(), s.alpha_bar[1:] / (1 - s.alpha_bar[1:]), rtol=1e-10)
    assert (s.log_snr.diff() < 0).all() and s.log_snr[0] == torch.inf
    assert (s.log_snr[T - 1] - s.log_snr[T]).item() == pytest.approx(6.9, abs=0.05)


def test_add_noise_keeps_variance():
    """x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps"""
    s, t = schedule.NoiseSchedule(), torch.tensor([1, 300, 1000])
    signal_, noise = s.coefficients(t)
    assert signal_.dtype == noise.dtype == torch.float32 and signal_.shape == (3, 1, 1, 1)
    assert torch.allclose(signal_.squeeze() ** 2, s.alpha_bar[t].float(), rtol=1e-6)
    x_0, eps = torch.randn(2, 3, 3, 4, 4)
    x_t = schedule.add_noise(x_0, eps, signal_, noise)
    assert torch.allclose(x_t[1], s.alpha_bar[300].sqrt().float() * x_0[1] + (1 - s.alpha_bar[300]).sqrt().float() * eps[1])


@pytest.mark.parametrize("n", [1, 3, 7, 100, 333, 1000])
def test_sampling_timesteps(n):
    """n evenly spaced timesteps from T down, rounded, then 0."""
    visited = schedule.sampling_timesteps(n)
    assert len(visited) == n + 1 and visited[0] == T and visited[-1] == 0
    assert all(abs(t - T * (n - i) / n) <= 0.5 for i, t in enumerate(visited))
    assert all(a > b for a, b in zip(visited, visited[1:]))
    if n == 100:
        assert visited == [*range(1000, 0, -10), 0]


@pytest.mark.parametrize("n", [0, 1001])
def test_sampling_timesteps_out_of_range(n):
    with pytest.raises(ValueError, match="1 to 1000"):
        schedule.sampling_timesteps(n)


@pytest.mark.parametrize("profile, rho_min, warm_start", [("logistic", 0.4, 0.1), ("linear", 0.4, 0.1), ("linear", 0.3, 0.0),
                                                          ("logistic", 0.07, 0.29), ("linear", 1.0, 0.0)])
@pytest.mark.parametrize("r_max", [1, 7, 10, 100, 136, 218])
def test_phi(profile, rho_min, warm_start, r_max):
    """NA-LR Eq. (2), (7) and C.1.3, against exact fractions where the profile is rational."""
    phi = schedule.RankSchedule(profile, rho_min, warm_start)
    r_min = math.ceil(Fraction(str(rho_min)) * r_max)
    for t in range(T + 1):
        if t <= math.floor(Fraction(str(warm_start)) * T):
            expected = r_max
        elif profile == "linear":
            expected = r_min + math.ceil((r_max - r_min) * (1 - Fraction(t, T)))
        else:
            expected = r_min + math.ceil((r_max - r_min) / (1 + math.exp(8 * (t / T - 0.5))))
        assert phi.active(t, r_max) == expected, t
    assert torch.equal(phi.active(torch.tensor([0, 5, T]), r_max), torch.tensor([phi.active(t, r_max) for t in (0, 5, T)]))


def test_phi_is_nested_and_reaches_r_max():
    """t_1 < t_2 implies Phi(t_1) >= Phi(t_2); r_max at the clean end, r_min only with the linear profile."""
    logistic, linear = (schedule.RankSchedule(p) for p in ("logistic", "linear"))
    for phi in (logistic, linear):
        table = phi.table(136)
        assert (table.diff() <= 0).all() and table[1] == table[100] == 136 > table[101]
    assert linear.active(T, 136) == math.ceil(0.4 * 136) == logistic.active(T, 136) - 2


def test_rank_of_a_kept_share():
    """r = floor(p m n / (m + n)), from the decimal that was typed."""
    assert [schedule.base_rank(p, 384, 384) for p in (0.75, 0.5, 0.25, 0.1)] == [144, 96, 48, 19]
    assert schedule.base_rank(0.07, 200, 200) == 7 and schedule.base_rank(0.29, 200, 200) == 29
    assert schedule.base_rank(0.001, 8, 8) == 1


@pytest.mark.parametrize("r_base", [1, 5, 10, 48, 96, 153])
@pytest.mark.parametrize("rho_min", [0.1, 0.4, 1.0])
def test_iso_compute_matches_the_average_rank(r_base, rho_min):
    """NA-LR 3.1: no r_max brings the schedule's average over the 100 sampling timesteps closer to r_base."""
    phi = schedule.RankSchedule(rho_min=rho_min)
    average = lambda r: sum(phi.active(t, r) for t in range(10, T + 1, 10)) / 100
    best = schedule.iso_compute_rank(r_base, phi, 10**6)
    assert all(abs(average(best) - r_base) <= abs(average(r) - r_base) for r in range(1, 4 * r_base + 3))
    assert schedule.iso_compute_rank(r_base, phi, r_base) == r_base  # the limit, min(m, n)


# ----------------------------------------------------------------------------------------------------
# lowrank.py


def layer(n, m, r, dtype):
    torch.manual_seed(n + m)
    low = lowrank.LowRankLinear(n, m, r).to(dtype)
    with torch.no_grad():
        for p in low.parameters():
            p.normal_()
    return low


DIT_S = sorted({(l.n, l.m, l.rank) for l in model.linear_layers(Config()) if l.rank})  # every layer shape of DiT-S/2


@pytest.mark.parametrize("n, m, r", DIT_S)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_masked_sliced_and_dense_product_agree(n, m, r, dtype, tolerance):
    """Eq. (4) = Eq. (5) = U_k V_k^T x for every layer shape and every distinct Phi(t): outputs and gradients."""
    low = layer(n, m, r, dtype)
    x = torch.randn(2, 3, n, dtype=dtype, requires_grad=True)
    direction = torch.randn(2, 3, m, dtype=dtype)

    def run(y):
        return [y.detach()] + [g.detach() for g in torch.autograd.grad((y * direction).sum(), [x, low.U, low.V, low.bias])]

    for k in schedule.RankSchedule().table(r).unique().tolist():
        sliced = run(low(x, {r: k}))
        masked = run(low(x, lowrank.masks({r: torch.full((2,), k)}, {r: r})))
        dense = run(F.linear(x, low.U[:k].t() @ low.V[:k], low.bias))
        assert torch.equal(low.weight(k), low.U[:k].t() @ low.V[:k])
        for a, b, c in zip(sliced, masked, dense):
            assert relative(a, c) < tolerance and relative(b, c) < tolerance
        assert not sliced[2][k:].any() and not sliced[3][k:].any()  # unused channels: gradient of zero


def test_mask_is_per_sample():
    """S_{j,i} = 1[j <= k(t_i)], Eq. (3), here j from 0; samples of one batch use different ranks."""
    phi = torch.tensor([1, 3, 4])
    mask = lowrank.masks({4: phi}, {4: 4})[4]
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    low, x = layer(8, 6, 4, torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    y = low(x, {4: mask.double()})
    for i, k in enumerate(phi.tolist()):
        assert relative(y[i], low(x[i:i + 1], {4: k})[0]) < 1e-12
    assert relative(low(x[:, 0], {4: mask.double()}), y[:, 0]) < 1e-12  # per-sample layers: (B, n) without tokens


def test_two_ranks_in_two_threads():
    """The rank is an argument: nothing on the module changes, so two passes can share one model."""
    net = awake(Config(**SMALL))
    x, _, y = inputs(net.config, 2)
    results, alone = {}, {}

    def run(t, into):
        for _ in range(20):
            with torch.no_grad():
                into[t] = net(x, torch.full((2,), t), y, net.active_ranks(t))

    for t in (1, 1000):
        run(t, alone)
    threads = [threading.Thread(target=run, args=(t, results)) for t in (1, 1000)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(torch.equal(results[t], alone[t]) for t in alone) and not torch.equal(alone[1], alone[1000])


def test_spectral_initialisation():
    """Khodak et al. 2021: U V^T is the best rank-r approximation of W, its singular values split evenly."""
    W = torch.randn(20, 12, dtype=torch.float64)
    S = torch.linalg.svdvals(W)
    U, V = lowrank.spectral_factors(W, 5)
    assert U.shape == (5, 20) and V.shape == (5, 12)
    assert torch.linalg.norm(W - U.t() @ V).item() == pytest.approx(S[5:].square().sum().sqrt().item(), rel=1e-10)
    assert torch.allclose(U @ U.t(), S[:5].diag()) and torch.allclose(V @ V.t(), S[:5].diag())


def test_a_layer_of_zeros_still_trains():
    """adaLN starts at zero: U = 0, V orthonormal, so the first gradient of U is not zero."""
    dense = torch.nn.ModuleDict({"a": lowrank.Linear(12, 20)})
    torch.nn.init.zeros_(dense["a"].weight)
    lowrank.factorise(dense, {"a": 5})
    low = dense["a"]
    assert not low.U.any() and torch.allclose(low.V @ low.V.t(), torch.eye(5), atol=1e-5)
    low(torch.randn(4, 12)).square().sum().add(low(torch.ones(1, 12)).sum()).backward()
    assert low.U.grad.abs().max() > 0


def test_factorise_at_the_full_rank_changes_nothing():
    """Turning a dense DiT into a low-rank one: at rank min(m, n) its output is the dense model's."""
    net = awake(Config(**SMALL, method="full"))
    x, t, y = inputs(net.config, 3)
    before = net(x, t, y)
    lowrank.factorise(net, {l.name: min(l.m, l.n) for l in model.linear_layers(net.config)})
    assert len(lowrank.low_rank_layers(net)) == len(model.linear_layers(net.config))
    assert relative(net(x, t, y), before) < 1e-10


def test_orthogonality_penalty():
    """(||offdiag(U^T U)||^2 + ||offdiag(V^T V)||^2) / k over the active channels, and its gradient."""
    net = awake(Config(**SMALL))
    active = {r: r // 2 for r in net.ranks}
    plain = 0.0
    for low in lowrank.low_rank_layers(net):
        for factor in (low.U, low.V):
            f = factor[:active[low.rank]]
            gram = f @ f.t()
            plain = plain + (gram - gram.diag().diag()).square().sum() / len(f)
    expected = torch.autograd.grad(plain, [p for p in net.parameters()], allow_unused=True)
    penalty = lowrank.orthogonality_penalty(net, active)
    found = torch.autograd.grad(penalty, [p for p in net.parameters()], allow_unused=True)
    assert penalty.item() == pytest.approx(plain.item(), rel=1e-12)
    assert all((a is None) == (b is None) and (a is None or relative(a, b) < 1e-12) for a, b in zip(found, expected))
    low = lowrank.low_rank_layers(net)[0]
    gradient = dict(zip(net.parameters(), found))[low.U]
    assert not gradient[active[low.rank]:].any() and gradient[:active[low.rank]].any()  # sliced away: untouched


def test_orthogonality_penalty_of_rank_one_is_zero():
    assert lowrank.orthogonality_penalty(torch.nn.ModuleList([layer(6, 4, 1, torch.float32)])).item() == 0


def test_orthogonality_penalty_lowers_the_off_diagonals():
    """Its default weight visibly orthogonalises the factors and leaves the denoising loss alone."""
    outcome = []
    for weight in (0.0, 1e-4):
        net = DiT(Config(**SMALL, method="static"))
        net.load_state_dict(awake(net.config, dtype=torch.float32).state_dict())
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0)
        g = torch.Generator().manual_seed(0)
        for _ in range(120):
            x, t, y = torch.randn(16, 3, 8, 8, generator=g), torch.randint(1, T + 1, (16,), generator=g), torch.zeros(16).long()
            loss = (net(x, t, y) - x).square().mean()
            (loss + weight * lowrank.orthogonality_penalty(net)).backward()
            optimizer.step(), optimizer.zero_grad()
        outcome.append((lowrank.orthogonality_penalty(net).item(), loss.item()))
    (off, loss), (off_with, loss_with) = outcome
    assert off_with < 0.9 * off and abs(loss_with - loss) < 0.05 * loss


# ----------------------------------------------------------------------------------------------------
# model.py


@pytest.mark.parametrize("method, keep, published", [("full", 1.0, 39_795_852), ("static", 0.75, 31.34), ("static", 0.5, 22.94),
                                                     ("static", 0.25, 14.53), ("iso-param", 0.25, 14.53)])
def test_published_parameter_counts(method, keep, published):
    """NA-LR Table 2, with 1,000 classes: the built model, to the last printed digit."""
    config = Config(method=method, keep=keep, num_classes=1000)
    built = sum(p.numel() for p in DiT(config, initialise=False).parameters())
    assert built == model.parameter_count(config)
    assert built == published if method == "full" else f"{built / 1e6:.2f}" == f"{published:.2f}"


def test_published_parameters_of_dit_b():
    """NA-LR Table 8."""
    assert model.parameter_count(Config(**model.PRESETS["DiT-B/2"], num_classes=1000, method="full")) == 147_421_452


@pytest.mark.parametrize("method", model.METHODS)
@pytest.mark.parametrize("more", [{}, {"conditioning": "shared", "factorise": "attention-mlp"}, {"dense_mlp_blocks": 1, "num_classes": 0}])
def test_linear_layers_describe_the_built_model(method, more):
    """Names, shapes and ranks of `linear_layers` are those of the modules; nothing is left out."""
    config = Config(**SMALL | more, method=method)
    net = DiT(config)
    layers = {l.name: l for l in model.linear_layers(config)}
    built = {name: module for name, module in net.named_modules() if isinstance(module, (lowrank.Linear, lowrank.LowRankLinear))}
    assert built.keys() == layers.keys()
    for name, module in built.items():
        l = layers[name]
        if l.rank is None:
            assert module.weight.shape == (l.m, l.n)
        else:
            assert module.U.shape == (l.rank, l.m) and module.V.shape == (l.rank, l.n)
    assert sum(p.numel() for p in net.parameters()) == model.parameter_count(config)


def test_the_published_layers_are_factorised():
    """Per block Q, K, V, Out, adaLN, both embedder layers; MLPs but in the first block; nothing final."""
    dense = {l.name for l in model.linear_layers(Config()) if l.rank is None}
    assert dense == {"blocks.0.mlp_in", "blocks.0.mlp_out", "final_adaln", "final_out"}


@pytest.mark.parametrize("conditioning", ["per-block", "shared"])
def test_a_masked_batch_is_each_sample_sliced(conditioning):
    """The whole model: a batch of different t, masked, equals each sample alone, sliced to its Phi(t)."""
    net = awake(Config(**SMALL, conditioning=conditioning))
    x, _, y = inputs(net.config, 5)
    t = torch.tensor([1, 150, 500, 700, 1000])
    whole = net(x, t, y)
    for i in range(5):
        alone = net(x[i:i + 1], t[i:i + 1], y[i:i + 1], net.active_ranks(int(t[i])))
        assert relative(whole[i], alone[0]) < 1e-12


def test_a_stage_slices_and_masks_to_the_same_gradients():
    """In a curriculum stage, t >= t_low: slicing to Phi(t_low) and masking within gives masking's gradients."""
    net = awake(Config(**SMALL))
    x, _, y = inputs(net.config, 6)
    t = torch.tensor([664, 700, 800, 900, 990, 1000])
    gradients = []
    for t_low in (664, 1):
        active = net.active_ranks(t, t_low)
        assert lowrank.widths(active) == {r: net.rank_schedule.active(t_low, r) for r in net.ranks}
        loss = net(x, t, y, active).square().mean()
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    assert lowrank.widths(net.active_ranks(t, 664)) != lowrank.widths(net.active_ranks(t, 1))
    assert all(relative(a, b) < 1e-10 for a, b in zip(*gradients))


def test_channels_that_a_stage_does_not_use_do_not_move():
    """AdamW moves a parameter of zero gradient while it has momentum: unused channels must have none."""
    net = awake(Config(**SMALL), dtype=torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    x, _, y = inputs(net.config, 4, dtype=torch.float32)
    t = torch.tensor([900, 950, 990, 1000])
    for _ in range(3):
        active = net.active_ranks(t, 900)
        (net(x, t, y, active).square().mean() + lowrank.orthogonality_penalty(net, active)).backward()
        optimizer.step(), optimizer.zero_grad()
    for name, module in net.named_modules():
        if isinstance(module, lowrank.LowRankLinear):
            k = net.rank_schedule.active(900, module.rank)
            for factor in ("U", "V"):
                now, then = getattr(module, factor), before[f"{name}.{factor}"]
                assert torch.equal(now[k:], then[k:]) and k < module.rank
                assert not torch.equal(now[:k], then[:k])


@pytest.mark.parametrize("method", ["full", "iso-compute"])
def test_adaln_zero(method):
    """A fresh DiT predicts eps = 0 for everything (Peebles and Xie 2023), and its first gradient is not zero."""
    torch.manual_seed(0)
    net = DiT(Config(**SMALL, method=method))
    x, t, y = inputs(net.config, 3, dtype=torch.float32)
    out = net(x, t, y)
    assert not out.any()
    (out - x).square().mean().backward()
    assert net.final_out.weight.grad.abs().max() > 0


def test_patches_come_back_to_their_place():
    """With identity blocks, every output patch is the LayerNorm of the input patch at the same place."""
    config = Config(depth=1, width=12, heads=1, patch=2, image_size=6, method="full")
    net = DiT(config).double()
    with torch.no_grad():
        # both ends as the identity on a patch's values in the order (row, column, channel)
        identity = torch.eye(12, dtype=torch.float64)
        net.patchify.weight.copy_(identity.view(12, 2, 2, 3).permute(0, 3, 1, 2))
        net.final_out.weight.copy_(identity)
        net.position.zero_()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    y = net(x, torch.tensor([1, 2]), torch.tensor([0, 1]))
    for i, j in itertools.product(range(0, 6, 2), repeat=2):
        patch = x[:, :, i:i + 2, j:j + 2].permute(0, 2, 3, 1).reshape(2, 12)
        expected = F.layer_norm(patch, (12,), eps=1e-6).view(2, 2, 2, 3).permute(0, 3, 1, 2)
        assert relative(y[:, :, i:i + 2, j:j + 2], expected) < 1e-12


@pytest.mark.parametrize("conditioning", ["per-block", "shared"])
def test_the_transformer_written_out(conditioning):
    """Peebles and Xie 2023, Fig. 3 (adaLN-Zero), in plain products: attention, GELU, modulation, gates."""
    config = Config(**SMALL, method="full", conditioning=conditioning)
    net = awake(config)
    x, t, y = inputs(config, 2)
    linear = lambda layer, v: v @ layer.weight.t() + layer.bias
    silu = lambda v: v / (1 + (-v).exp())
    norm = lambda v: (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    t_emb = model.timestep_embedding(t).double()
    c = [silu(linear(e.time_out, silu(linear(e.time_in, t_emb))) + e.label.weight[y]) for e in net.embedders]
    patches = x.view(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 12)
    h = patches @ net.patchify.weight.flatten(1).t() + net.patchify.bias + model.position_embedding(32, 4).double()
    for i, block in enumerate(net.blocks):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(block.adaln, c[i % len(c)])[:, None].split(32, -1)
        a = norm(h) * (1 + scale_1) + shift_1
        q, k, v = (linear(layer, a).view(2, 16, 2, 16).transpose(1, 2) for layer in (block.q, block.k, block.v))
        a = ((q @ k.mT / 16**0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 32)
        h = h + gate_1 * linear(block.out, a)
        m = linear(block.mlp_in, norm(h) * (1 + scale_2) + shift_2)
        h = h + gate_2 * linear(block.mlp_out, m * 0.5 * (1 + torch.erf(m / 2**0.5)))
    shift, scale = linear(net.final_adaln, c[0])[:, None].split(32, -1)
    h = linear(net.final_out, norm(h) * (1 + scale) + shift)
    expected = h.view(2, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 8, 8)
    assert relative(net(x, t, y), expected) < 1e-10


def test_initial_spread():
    """DiT's initialisation: embedders N(0, 0.02), the rest Xavier, biases zero."""
    torch.manual_seed(0)
    net = DiT(Config(method="full", depth=1, num_classes=1000))
    assert net.embedders[0].label.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert net.embedders[0].time_in.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert net.blocks[0].mlp_in.weight.std().item() == pytest.approx((2 / (5 * 384)) ** 0.5, rel=0.01)
    assert net.patchify.weight.std().item() == pytest.approx((2 / (12 + 384)) ** 0.5, rel=0.03)
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def test_embeddings():
    """Sinusoids at 10000^(-i/128), cosines first; 2-D positions: column in the first half, row in the second."""
    e = model.timestep_embedding(torch.tensor([0, 700]))
    assert e.shape == (2, 256) and e[0, :128].eq(1).all() and e[0, 128:].eq(0).all()
    assert e[1, 5].item() == pytest.approx(math.cos(700 * 10000 ** (-5 / 128)), abs=1e-4)
    p = model.position_embedding(16, 3).view(3, 3, 16)  # (row, column, D)
    assert p[2, 1, 1].item() == pytest.approx(math.sin(1 * 10000 ** (-1 / 4)))
    assert p[2, 1, 8 + 4].item() == pytest.approx(math.cos(2))


def test_conditioning_reaches_the_output():
    """Different t, different y, and "no class" all give different outputs; per-block embedders are separate."""
    net = awake(Config(**SMALL, method="full"))
    x = inputs(net.config, 1)[0]
    outs = [net(x, torch.tensor([t]), torch.tensor([y])) for t, y in ((5, 0), (6, 0), (5, 1), (5, 4))]
    assert all(relative(a, b) > 1e-4 for a, b in itertools.combinations(outs, 2))
    assert len(net.embedders) == 2 and len(DiT(Config(**SMALL, conditioning="shared")).embedders) == 1


@pytest.mark.parametrize("wrong", [dict(image_size=9), dict(keep=0.0), dict(keep=1.5), dict(heads=3), dict(method="lora"),
                                   dict(rho_min=0.0), dict(warm_start=2.0), dict(num_classes=-1), dict(rank_profile="cubic")])
def test_config_refuses(wrong):
    with pytest.raises(ValueError):
        Config(**SMALL | wrong)


# ----------------------------------------------------------------------------------------------------
# curriculum.py


@pytest.mark.parametrize("n, starts", [(10, [1, 7, 32, 111, 324, 664, 880, 961, 988, 997]), (5, [1, 34, 359, 901, 991]), (1, [1])])
def test_timestep_groups(n, starts):
    """NA-LR B.1, C.3.1: the groups of the cosine schedule."""
    assert curriculum.cluster_timesteps(schedule.NoiseSchedule().log_snr, n) == starts


@pytest.mark.parametrize("seed", range(8))
def test_timestep_groups_are_optimal(seed):
    """Against all partitions: least largest cost, then the longest groups from low noise up."""
    size, n = 10, 1 + seed % 5
    steps = torch.rand(size + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(8).ceil()
    log_snr = -steps.cumsum(0)
    s = log_snr.clone()
    s[-1] = s[-2]

    def largest(cuts):
        edges = [1, *cuts, size + 1]
        return max((s[a] - s[b - 1]).item() for a, b in zip(edges, edges[1:]))

    partitions = list(itertools.combinations(range(2, size + 1), n - 1))
    least = min(map(largest, partitions))
    best = max(cuts for cuts in partitions if largest(cuts) == least)  # later starts: longer groups before them
    assert curriculum.cluster_timesteps(log_snr, n) == [1, *best]


def test_progressive_uniform_sampling():
    """C.3.3: earlier groups keep 1/T per timestep, the newest shares the rest; at the end, uniform."""
    starts = curriculum.cluster_timesteps(schedule.NoiseSchedule().log_snr, 10)
    c = curriculum.Curriculum(starts, T, 1000)
    for stage in range(10):
        c.stage = stage
        p = c.probabilities()
        newest, above = starts[9 - stage], (starts[10 - stage] if stage else T + 1)
        assert not p[:newest].any() and p.sum().item() == pytest.approx(1)
        assert torch.allclose(p[above:], torch.tensor(1 / T, dtype=torch.float64))
        assert torch.allclose(p[newest:above], torch.tensor((1 - (T + 1 - above) / T) / (above - newest), dtype=torch.float64))
    assert torch.allclose(p[1:], torch.full((T,), 1 / T, dtype=torch.float64)) and p[0] == 0


def test_drawn_timesteps_follow_the_probabilities():
    c = curriculum.Curriculum([1, 500, 900, 990], T, 1000)
    c.stage = 1
    t = c.sample(200_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.min() == 900 and t.max() == T
    share = (t < 990).double().mean().item()
    assert share == pytest.approx(1 - 11 / 1000, abs=0.001)  # group 900..989 has what 990..1000 leaves
    counts = t.bincount(minlength=T + 1)[900:990].double()
    assert ((counts - counts.mean()).square() / counts.mean()).sum() < 89 + 5 * (2 * 89) ** 0.5  # chi-square


def test_the_curriculum_goes_on_when_the_ema_stops_improving():
    """C.3.1, C.3.2: EMA_t = alpha L_t + (1 - alpha) EMA_{t-1}; 200 steps without improvement; afresh after."""
    c = curriculum.Curriculum([1, 500], T, 10**6, share=1)
    falling = [2 - 0.001 * i for i in range(300)]
    c.observe(0, falling)
    assert not c.advance(300) and c.since_best == 0
    ema = falling[0]
    for loss in falling[1:]:
        ema = 0.05 * loss + 0.95 * ema
    assert c.ema == pytest.approx(ema, rel=1e-12)
    c.observe(300, [5.0] * 199)
    assert not c.advance(499)
    c.observe(499, [5.0])
    assert c.advance(500) and c.t_low == 1 and c.start == 500 and c.ema is None and c.best == math.inf
    c.observe(498, [1.0, 2.0, 3.0])  # the first two belong to the stage before
    assert c.ema == 3.0


def test_the_curriculum_takes_at_most_its_share():
    """Group j of N - 1 comes at the latest at step 0.4 steps j / (N - 1); with share 1 there is no limit."""
    starts = curriculum.cluster_timesteps(schedule.NoiseSchedule().log_snr, 10)
    c = curriculum.Curriculum(starts, T, 3000)
    assert [step for step in range(3000) if c.advance(step)] == [math.ceil(Fraction(1200 * j, 9)) for j in range(1, 10)]
    c = curriculum.Curriculum(starts, T, 3000, share=1)
    assert not any(c.advance(step) for step in range(3000))


def test_without_a_curriculum_sampling_is_uniform():
    c = curriculum.Curriculum([1], T, 100)
    assert not any(c.advance(step) for step in range(100))
    assert torch.allclose(c.probabilities()[1:], torch.full((T,), 1 / T, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------
# data.py


def test_shapes_are_drawn_from_the_seed():
    images, labels = data.draw_shapes(40, 16, seed=3)
    again, _ = data.draw_shapes(40, 16, seed=3)
    other, _ = data.draw_shapes(40, 16, seed=4)
    assert images.shape == (40, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert labels.bincount().tolist() == [4] * 10 and len(data.SHAPES) == 10
    # bright on dark, wholly inside: the border is ground
    assert (images.amax((1, 2, 3)) > 150).all()
    assert data.draw_shapes(40, 33, seed=3)[0].shape == (40, 3, 33, 33)


@pytest.fixture
def folder(tmp_path):
    """12 images of 8 x 8 pixels in class folders `a` and `b`."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = tmp_path / "set" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    order = [*range(0, 12, 2), *range(1, 12, 2)]  # sorted by class, then name
    return tmp_path / "set", torch.from_numpy(pixels[order]).permute(0, 3, 1, 2), torch.tensor([0] * 6 + [1] * 6)


def test_folder_zip_and_npz_are_the_same_dataset(folder, tmp_path):
    path, images, labels = folder
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z, zipfile.ZipFile(tmp_path / "wrapped.zip", "w") as w:
        for file in path.rglob("*.png"):
            z.write(file, file.relative_to(path))
            w.write(file, Path("top") / file.relative_to(path))
    np.savez(tmp_path / "set.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    for source in (path, tmp_path / "set.zip", tmp_path / "wrapped.zip", tmp_path / "set.npz"):
        dataset = data.load(str(source), tmp_path / "data")
        assert torch.equal(dataset.images, images) and torch.equal(dataset.labels, labels), source
    assert data.load(str(path), tmp_path / "data").classes == ["a", "b"]


def test_flat_folders_have_no_classes(folder, tmp_path):
    path, images, _ = folder
    dataset = data.load(str(path / "a"), tmp_path / "data")
    assert torch.equal(dataset.images, images[:6]) and dataset.classes == [] and not dataset.labels.any()


def test_a_stray_image_beside_class_folders_is_named(folder, tmp_path):
    path, *_ = folder
    (path / "stray.png").write_bytes((path / "a" / "00.png").read_bytes())
    with pytest.raises(data.InputError, match="stray.png lies beside class folders"):
        data.open_source(str(path))


def test_orientation_is_followed_and_16_bits_are_refused(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = data.open_source(str(tmp_path)).read(0, 1)[0, 0]
    assert upright[:4].eq(255).all() and not upright[4:].any()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(data.InputError, match="b.png.*8 bits"):
        data.open_source(str(tmp_path)).read(0, 2)


def test_test_shapes_are_no_other_seeds_training_shapes():
    test, other = (data.open_source("shapes", split=s, num=20, seed=n).read(0, 20) for s, n in (("test", 0), ("train", 1)))
    assert not torch.equal(test, other)


def test_images_are_decoded_once(folder, tmp_path, monkeypatch):
    path, images, _ = folder
    data.load(str(path), tmp_path / "data")
    monkeypatch.setattr(data.Image, "open", None)  # decoding again would fail
    assert torch.equal(data.load(str(path), tmp_path / "data").images, images)
    monkeypatch.undo()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path / "a" / "00.png")  # changed content, changed key
    assert not data.load(str(path), tmp_path / "data").images[0].any()


def test_image_size_crops_to_the_centre_and_resizes(tmp_path):
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 2:10] = 200  # the central square
    (tmp_path / "s").mkdir()
    Image.fromarray(pixels).save(tmp_path / "s" / "x.png")
    assert data.open_source(str(tmp_path / "s"), image_size=4).read(0, 1).eq(200).all()


def test_celeba_is_cropped_to_140_and_resized_to_64(tmp_path, monkeypatch):
    """The score-model convention; torchvision's checks of the text files are skipped for this fake."""
    import torchvision

    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    picture = np.zeros((218, 178, 3), np.uint8)
    picture[39:179, 19:159] = 255
    Image.fromarray(picture).save(tmp_path / "celeba" / "img_align_celeba" / "000001.png")

    class Fake:
        file_list = torchvision.datasets.CelebA.file_list

        def __init__(self, *_, **__):
            self.filename = ["000001.png"]

    with pytest.raises(data.InputError, match="img_align_celeba"):
        data.open_source("celeba", str(tmp_path / "nowhere"))
    monkeypatch.setattr(torchvision.datasets, "CelebA", Fake)
    source = data.open_source("celeba", str(tmp_path))
    assert source.read(0, 1).shape == (1, 3, 64, 64) and source.read(0, 1).eq(255).all() and source.labels is None


def test_no_network_says_which_file_to_put_where(tmp_path, monkeypatch):
    import torchvision.datasets.utils

    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    refuses(train, "--dataset", "cifar10", "--data-dir", tmp_path / "d", says=("cifar-10-python.tar.gz", "--dataset PATH"))


def test_a_wrong_archive_is_not_unpacked(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
    refuses(train, "--dataset", "cifar10", "--data-dir", tmp_path, says=("SHA-256", "cifar-10-python.tar.gz"))
    assert os.listdir(tmp_path) == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("n, batch", [(10, 4), (10, 10), (3, 8)])
def test_every_epoch_is_a_permutation(n, batch):
    """Batches run on across epochs; which images a step sees depends on seed and step alone."""
    stream = torch.cat([data.batch_indices(n, step, batch, 5, torch.device("cpu")) for step in range(15)])
    for epoch in stream[:len(stream) // n * n].view(-1, n):
        assert sorted(epoch.tolist()) == list(range(n))
    assert not torch.equal(stream[:n], data.batch_indices(n, 0, n, 6, torch.device("cpu")))


def test_pixels_survive_the_round_trip():
    """uint8 -> [-1, 1] -> uint8 is the identity; values outside are clipped, not wrapped."""
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_unit(levels)), levels)
    assert data.to_unit(levels)[[0, 255]].tolist() == [-1, 1]
    assert data.to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def half(file):
        file.write(b"ne")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        data.write_then_rename(path, half)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


# ----------------------------------------------------------------------------------------------------
# flops.py

FLOPS_SMALL = Config(depth=3, width=32, heads=4, patch=2, image_size=8, num_classes=3)


def counted(config, t, active, backward=True, penalty=False):
    """Multiply-adds by torch's own counter (which books 2 for each) of a real step of `len(t)` images.
    Fused attention is not counted on every device, hence MATH."""
    torch.manual_seed(0)
    net = DiT(config)
    x = torch.randn(len(t), config.channels, config.image_size, config.image_size)
    y = torch.zeros(len(t), dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.MATH), counter:
        active = active(net)
        loss = net(x, t, y, active).square().mean()
        if penalty:
            loss = loss + lowrank.orthogonality_penalty(net, active)
        if backward:
            loss.backward()
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("method", ["full", "static", "iso-compute", "iso-param"])
@pytest.mark.parametrize("changes", [{}, {"conditioning": "shared"}, {"factorise": "attention-mlp", "dense_mlp_blocks": 0},
                                     {"image_size": 12, "patch": 4, "channels": 1, "keep": 0.25}], ids=str)
def test_our_forward_is_torchs_count_at_every_rank(method, changes):
    """Eq. (5), (6): a sliced pass, at several t."""
    config = replace(FLOPS_SMALL, method=method, **changes)
    for t in (1, 250, 500, T):
        found = counted(config, torch.tensor([t]), lambda net: net.active_ranks(t), backward=False)
        assert flops.forward(config, flops.channels(config, t)) == found


@pytest.mark.parametrize("method", ["full", "static", "iso-compute", "iso-param"])
@pytest.mark.parametrize("changes", [{}, {"conditioning": "shared"}, {"factorise": "attention-mlp", "dense_mlp_blocks": 0},
                                     {"image_size": 12, "patch": 4, "channels": 1, "keep": 0.25}], ids=str)
def test_our_training_step_is_torchs_count_of_forward_and_backward(method, changes):
    """Eq. (4): masked within the channels of t_low. The first layers have no input gradient."""
    config, t = replace(FLOPS_SMALL, method=method, **changes), torch.tensor([600, 800, T])
    for t_low in (1, 300, 600):
        found = counted(config, t, lambda net: net.active_ranks(t, t_low))
        assert flops.train_step(config, len(t), flops.channels(config, t_low), penalty=False) == found


@pytest.mark.parametrize("method", ["full", "static", "iso-param"])
def test_the_penaltys_products_are_counted(method):
    """Two products of k x k x m for each factor: the Gram matrix, and its gradient."""
    config, t = replace(FLOPS_SMALL, method=method), torch.tensor([700, 900])
    for t_low in (1, 600):
        found = counted(config, t, lambda net: net.active_ranks(t, t_low), penalty=True)
        assert flops.train_step(config, len(t), flops.channels(config, t_low)) == found


def test_sliced_training_costs_the_same_as_masked():
    """Eq. (4) and (5): with t_low = t, a mask inside the first Phi(t) channels and a slice are one computation."""
    config, t = replace(FLOPS_SMALL, method="iso-compute"), torch.tensor([400, 400])
    sliced = counted(config, t, lambda net: net.active_ranks(400))
    assert sliced == counted(config, t, lambda net: net.active_ranks(t, 400))
    assert sliced == flops.train_step(config, 2, flops.channels(config, 400), penalty=False)


def test_no_channels_given_means_all():
    """lowrank.py's convention: active = None computes r_max channels."""
    config = replace(FLOPS_SMALL, method="iso-param")
    every = {layer.rank: layer.rank for layer in model.linear_layers(config) if layer.rank}
    assert flops.forward(config) == flops.forward(config, every)
    assert flops.train_step(config, 2) == flops.train_step(config, 2, flops.channels(config, 1))


@pytest.mark.parametrize("name,method", [("tiny", "static"), ("DiT-S/2", "static"), ("DiT-B/4", "full"), ("DiT-L/8", "static"),
                                         ("DiT-XL/2", "full")])
def test_model_sizes_are_torchs_count(name, method):
    """D.1 and the DiT family, on the meta device: shapes alone."""
    config = Config(**model.PRESETS[name], method=method)
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        t = torch.zeros(1, dtype=torch.int64)
        DiT(config, initialise=False)(torch.zeros(1, 3, 32, 32), t, t)
    assert 2 * flops.forward(config) == counter.get_total_flops()


def paper_model(name="DiT-S/2", size=32, method="full", keep=1.0):
    return Config(**model.PRESETS[name], image_size=size, num_classes=1000, method=method, keep=keep)


def test_one_full_rank_pass_as_published():
    """Tables 1 and 4 over the 101 passes of 100 DDIM steps."""
    assert flops.forward(paper_model(), convention=flops.PAPER) == 5_462_115_840
    assert flops.forward(paper_model(size=64), convention=flops.PAPER) == 21_806_143_488


@pytest.mark.parametrize("row", [r for r in flops.PRINTED if r[3] in ("full", "static") and r[5]],
                         ids=lambda row: f"{row[1]} {row[2]} {row[3]} {row[4]}")
def test_full_and_static_rows_agree_to_the_last_printed_digit(row):
    """Tables 1 to 4, 7 and 8."""
    _, name, size, method, keep, gflops, params, spent = row
    config = paper_model(name, size, method, keep or 1.0)
    assert round(flops.sampling(config, 100, convention=flops.PAPER) / 1e9, 3) == gflops
    assert round(flops.parameter_count(config) / 1e6, 2) == params
    if spent:
        ours = flops.training_run(config, 800_000, 128, penalty=False, convention=flops.PAPER)
        assert round(ours / 1e18, 3) == spent


def test_published_training_is_three_passes_without_the_pixel_layers():
    """Tables 1 and 7: the patch convolution and the last projection, 12 values a token each, are not in them."""
    for size in (32, 64):
        one_pass, pixel_layer = flops.forward(paper_model(size=size), None, flops.PAPER), (size // 2) ** 2 * 12 * 384
        found = flops.train_step(paper_model(size=size), 128, penalty=False, convention=flops.PAPER)
        assert found == 128 * 3 * (one_pass - 2 * pixel_layer)


def test_parameters_to_the_last_one():
    """Tables 2 and 8, before rounding."""
    assert flops.parameter_count(paper_model()) == 39_795_852
    assert flops.parameter_count(paper_model("DiT-B/2")) == 147_421_452


def test_a_tenth_of_each_layer_is_24_and_15_percent():
    """B.4."""
    full, tenth = paper_model(), paper_model(method="static", keep=0.1)
    assert round(flops.parameter_count(tenth) / flops.parameter_count(full), 2) == 0.24
    assert round(flops.forward(tenth, convention=flops.PAPER) / flops.forward(full, convention=flops.PAPER), 2) == 0.15


def test_the_note_on_adaptive_rows_tells_our_figures():
    """C.1, 3.1: with the stated schedule the average is 0.70 r_max, and ISO-Compute's r_max 1.42 r_base."""
    iso, static = paper_model(method="iso-param", keep=0.75), paper_model(method="static", keep=0.75)
    dense = flops.forward(iso, dict.fromkeys(flops.channels(iso, 1), 0))
    share = (flops.sampling(iso) / 100 - dense) / (flops.forward(iso) - dense)
    ranks = [sum(layer.rank for layer in model.linear_layers(c) if layer.rank) for c in (replace(iso, method="iso-compute"), static)]
    assert round(share, 2) == 0.70 and round(ranks[0] / ranks[1], 1) == 1.4
    assert "averages 0.70" in flops.NOTES and "needs 1.42" in flops.NOTES


def test_no_printed_figure_enters_a_computation(monkeypatch):
    """PRINTED with other figures: the same computed ones."""
    before = flops.paper_rows()
    monkeypatch.setattr(flops, "PRINTED", [row[:5] + tuple(f and 3 * f for f in row[5:]) for row in flops.PRINTED])
    for a, b in zip(before, flops.paper_rows()):
        assert {k: v for k, v in a.items() if "paper" not in k} == {k: v for k, v in b.items() if "paper" not in k}


def test_the_papers_tables_take_less_than_half_a_second():
    """Nothing but shapes is looked at. The best of three: the machine may have other work."""
    seconds = []
    for _ in range(3):
        for cached in (flops._layers, flops._phi, flops.sampling, flops.longest_curriculum):
            cached.cache_clear()
        start = time.process_time()
        flops.paper_rows()
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5


def test_sampling_adds_up_the_sliced_passes():
    """Eq. (5): each visited timestep with its Phi(t); guidance runs the model twice."""
    config = replace(FLOPS_SMALL, method="iso-compute")
    passes = [flops.forward(config, flops.channels(config, t)) for t in schedule.sampling_timesteps(7)[:-1]]
    assert flops.sampling(config, 7) == sum(passes) and len(passes) == 7
    assert flops.sampling(config, 7, guidance=True) == 2 * sum(passes)


def test_iso_compute_samples_at_the_cost_of_static():
    """3.1: the schedule's average over 100 steps is the rank of the static model."""
    static, iso = (Config(**model.PRESETS["DiT-S/2"], method=method) for method in ("static", "iso-compute"))
    assert flops.sampling(iso) == pytest.approx(flops.sampling(static), rel=0.003)


def test_a_training_run_adds_up_its_stages():
    """2.2: a stage computes Phi(t_low) channels; steps outside the stages have t_low = 1."""
    config = replace(FLOPS_SMALL, method="iso-param")
    cost = {t: flops.train_step(config, 4, flops.channels(config, t)) for t in (1, 400, 900)}
    assert cost[1] > cost[400] > cost[900]
    assert flops.training_run(config, 10, 4, [(2, 900), (3, 400)]) == 2 * cost[900] + 3 * cost[400] + 5 * cost[1]
    assert flops.training_run(config, 10, 4) == 10 * cost[1]
    with pytest.raises(ValueError, match="12 steps of a run of 10"):
        flops.training_run(config, 10, 4, [(12, 400)])


@pytest.mark.parametrize("steps,groups,share", [(1000, 10, 0.4), (77, 10, 0.4), (500, 5, 0.3), (1000, 10, 0.0), (50, 1, 0.4)])
def test_the_longest_curriculum_is_the_one_that_no_plateau_shortens(steps, groups, share):
    """C.3: the stages that curriculum.py goes through when the loss always improves."""
    c = curriculum.Curriculum(curriculum.cluster_timesteps(schedule.NoiseSchedule().log_snr, groups), T, steps, share)
    t_lows = []
    for step in range(steps):
        c.advance(step)
        t_lows.append(c.t_low)
    stages = flops.longest_curriculum(steps, groups, share)
    spread = [t_low for n, t_low in stages for _ in range(n)]
    assert spread + [1] * (steps - len(spread)) == t_lows


# the command line


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    return json.loads(text, parse_constant=refuse)


def test_paper_json_keeps_its_contract():
    """One object for each row of each table; null where the paper prints nothing."""
    status, out, _ = cli(flops, "--paper", "--json")
    rows = strict(out)
    keys = {"table", "method", "keep", "image_size", "gflops", "paper_gflops", "params", "paper_params", "train_flops",
            "paper_train_flops"}
    assert status == 0 and all(keys <= set(row) for row in rows)
    count = {table: sum(row["table"] == table for row in rows) for table in {row["table"] for row in rows}}
    assert count == {"1": 4, "2": 10, "3": 10, "4": 10, "6": 4, "7": 4, "8": 2, "B.4": 1}
    for row in rows:
        assert (row["paper_train_flops"] is not None) == (row["table"] in ("1", "7"))
        assert (row["paper_gflops"] is not None) == (row["table"] not in ("7", "B.4"))
    static = next(row for row in rows if row["table"] == "1" and row["method"] == "static")
    assert round(static["gflops"], 3) == static["paper_gflops"] == 421.256
    assert (static["params"], static["paper_params"]) == (31_344_780, 31_340_000)
    assert round(static["train_flops"], -15) == static["paper_train_flops"] == 1_281 * 10**15


def test_paper_prints_ours_beside_theirs():
    """Tables 1 to 8 in the terminal."""
    status, out, _ = cli(flops, "--paper")
    assert status == 0 and "nan" not in out
    assert out.splitlines()[1].split() == ("1 2 3 DiT-S/2 32 full 551.674 551.674 1.000 39.80 39.80 1.000 "
                                           "1.677 1.677 1.000").split()
    assert "23.8%" in out and "15.0%" in out


def test_the_default_report_shows_the_schedule():
    """Eq. (7) as a chart: rank and cost fall with t."""
    status, out, _ = cli(flops, "--layer", "blocks.0.mlp_in")
    chart = [line.split() for line in out.splitlines() if "#" in line]
    assert status == 0 and [int(row[0]) for row in chart] == flops.CHART_T
    assert [int(row[2]) for row in chart] == sorted(int(row[2]) for row in chart)
    assert int(chart[-1][2]) == int(out.split("blocks.0.mlp_in, of ")[1].split()[0])  # r_max at t = 1
    status, out, _ = cli(flops, "--json", "--model", "DiT-S/4", "--method", "static", "--num-classes", 0)
    report = strict(out)
    assert status == 0 and [row["name"] for row in report["models"]] == ["this model", "full"]
    assert report["models"][0]["sampling_guided"] is None  # without classes there is nothing to guide with
    assert report["models"][0]["sampling"] == 100 * report["models"][0]["forward"]


def write_run(folder, config=FLOPS_SMALL, lines=((10, 1000), (20, 3000)), ending="", **train):
    folder.mkdir(exist_ok=True)
    train = dict(steps=40, batch_size=4, orthogonality=1e-4, curriculum_groups=10) | train
    (folder / "config.json").write_text(json.dumps(dict(dataset="shapes", model=asdict(config), train=train)))
    text = "".join(json.dumps(dict(step=s, stage=0, t_low=997, t_high=T, flops=f)) + "\n" for s, f in lines)
    (folder / "metrics.jsonl").write_text(text + ending)
    return folder


def test_a_run_is_compared_with_its_siblings(tmp_path):
    """Spent, and saved against no curriculum, static and full rank, at the same number of steps."""
    config = replace(FLOPS_SMALL, method="iso-compute")
    low = flops.training_run(config, 20, 4, [(20, 997)])
    folder = write_run(tmp_path / "run", config, [(10, low // 2), (20, low)])
    status, out, _ = cli(flops, "--run", folder, "--json")
    rows = {row["name"]: row for row in strict(out)["models"]}
    assert status == 0 and list(rows) == ["this model", "no curriculum", "static", "full"]
    assert rows["this model"]["training"] == low
    static, full = replace(config, method="static"), replace(config, method="full")
    for name, sibling in (("no curriculum", config), ("static", static), ("full", full)):
        assert rows[name]["training"] == flops.training_run(sibling, 20, 4)
        assert rows[name]["training_saved"] == pytest.approx(1 - low / rows[name]["training"])
        assert rows[name]["sampling_guided"] == 2 * flops.sampling(sibling)
    assert cli(flops, "--run", folder)[1].startswith(f"{folder}: 20 of 40 steps done")


def test_a_run_without_penalty_is_compared_without_it(tmp_path):
    """The siblings train as the run did."""
    folder = write_run(tmp_path / "run", orthogonality=0.0)
    rows = strict(cli(flops, "--run", folder, "--json")[1])["models"]
    assert rows[1]["training"] == flops.training_run(FLOPS_SMALL, 20, 4, penalty=False)


def test_a_half_written_last_line_is_ignored(tmp_path):
    """A run may be killed at any moment."""
    folder = write_run(tmp_path / "run", ending='{"step": 30, "flo')
    status, out, _ = cli(flops, "--run", folder, "--json")
    assert status == 0 and strict(out)["steps"] == 20


@pytest.mark.parametrize("arguments", [
    ["--keep", "1.5"], ["--keep", "nan"], ["--rho-min", "0"], ["--model", "DiT-Q/2"], ["--model", "DiT-S/8", "--image-size", "20"],
    ["--steps", "0"], ["--sampling-steps", "2000"], ["--curriculum-groups", "-1"], ["--curriculum-groups", "2000"],
    ["--curriculum-share", "2"], ["--orthogonality", "-1"], ["--orthogonality", "nan"], ["--layer", "blocks.9.q"],
    ["--method", "full", "--layer", "blocks.0.q"], ["--paper", "--run", "x"], ["--run", "nowhere"]], ids=" ".join)
def test_bad_flags_cost_one_line(arguments):
    """Exit status 2, one line on stderr."""
    status, out, err = cli(flops, *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("flops.py: ")


@pytest.mark.parametrize("name,content", [
    ("config.json", "{"), ("config.json", "[]"), ("config.json", '{"model": {"depth": 0}, "train": {}}'),
    ("config.json", '{"model": {"wings": 2}, "train": {}}'), ("config.json", '{"model": {}, "train": {"steps": "many"}}'),
    ("config.json", b"\xff\xfe"), ("metrics.jsonl", ""), ("metrics.jsonl", '{"st'), ("metrics.jsonl", "broken\n{}\n"),
    ("metrics.jsonl", '{"step": 4}\n'), ("metrics.jsonl", "[1]\n"), ("metrics.jsonl", '{"step": 0, "flops": 0}\n'),
    ("metrics.jsonl", '{"step": 5, "flops": NaN}\n'),
    ("metrics.jsonl", '{"step": 5, "flops": 0}\n'), ("metrics.jsonl", '{"step": 5, "flops": Infinity}\n'), ("metrics.jsonl", None)], ids=repr)
def test_a_damaged_run_costs_one_line(name, content, tmp_path):
    """Exit status 2, and the line names the file."""
    folder = write_run(tmp_path / "run")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = cli(flops, "--run", folder)
    assert status == 2 and out == "" and err.count("\n") == 1 and name in err


# ----------------------------------------------------------------------------------------------------
# sample.py

ALPHA_BAR = schedule.NoiseSchedule().alpha_bar


def gaussian_eps(mean, std):
    """The exact eps(x, t) for images whose pixels are N(mean, std^2): the posterior mean of the noise."""
    def eps(x, t):
        ab = ALPHA_BAR[t].item()
        return (1 - ab) ** 0.5 * (x - ab**0.5 * mean) / (ab * std**2 + 1 - ab)
    return eps


def last(images):
    for x in images:
        pass
    return x


def test_ddim_solves_the_gaussian_case():
    """The probability flow of a Gaussian maps x_T to mean + std (x_T - sqrt(ab_T) mean) / std_T, exactly."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    ab = ALPHA_BAR[T].item()
    expected = 0.2 + 0.5 * (x - ab**0.5 * 0.2) / (ab * 0.25 + 1 - ab) ** 0.5
    errors = [relative(last(sample.ddim(gaussian_eps(0.2, 0.5), x, n, clip=False)), expected) for n in (100, 1000)]
    assert errors[1] < 0.01 and errors[1] < errors[0] / 5  # first order in the step


def test_one_ddim_step():
    """Song et al. 2021, Eq. (12): x_s = sqrt(ab_s) x_0 + sqrt(1 - ab_s) eps, x_0 from x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps."""
    x_0, e = torch.rand(2, 3, 4, 4).double() - 0.5, torch.randn(2, 3, 4, 4).double()
    x = ALPHA_BAR[T].sqrt() * x_0 + (1 - ALPHA_BAR[T]).sqrt() * e
    first = next(sample.ddim(lambda x, t: e, x, 4))
    assert relative(first, ALPHA_BAR[750].sqrt() * x_0 + (1 - ALPHA_BAR[750]).sqrt() * e) < 1e-6


def test_clipping_recomputes_eps():
    """x_0 outside [-1, 1] is clipped, and eps then made to fit it; the step lands on the line between the two."""
    x, wrong = torch.zeros(1, 3, 2, 2, dtype=torch.float64), torch.ones(1, 3, 2, 2, dtype=torch.float64)
    clipped, free = (next(sample.ddim(lambda x, t: wrong, x, 4, clip=c)) for c in (True, False))
    e = (0 - ALPHA_BAR[T].sqrt() * -1) / (1 - ALPHA_BAR[T]).sqrt()
    assert relative(clipped, (ALPHA_BAR[750].sqrt() * -1 + (1 - ALPHA_BAR[750]).sqrt() * e) * torch.ones_like(x)) < 1e-9
    assert free.abs().max() > 100  # what an error in eps costs at t = T without clipping


def test_one_ddpm_step_is_the_posterior():
    """Ho et al. 2020, Eq. (6), (7): q(x_s | x_t, x_0) by Bayes' rule on the respaced chain."""
    x_0, z = torch.rand(2, 3, 4, 4).double() - 0.5, torch.randn(2, 3, 4, 4).double()
    x_t = torch.randn(2, 3, 4, 4).double()
    e = (x_t - ALPHA_BAR[T].sqrt() * x_0) / (1 - ALPHA_BAR[T]).sqrt()
    found = next(sample.ddpm(lambda x, t: e, x_t, 4, noise=lambda: z))
    a = (ALPHA_BAR[T] / ALPHA_BAR[750]).item()  # x_t = sqrt(a) x_s + sqrt(1 - a) noise
    precision = 1 / (1 - ALPHA_BAR[750]) + a / (1 - a)  # of x_s: prior given x_0, and likelihood of x_t
    mean = (ALPHA_BAR[750].sqrt() * x_0 / (1 - ALPHA_BAR[750]) + a**0.5 * x_t / (1 - a)) / precision
    assert relative(found, mean + precision**-0.5 * z) < 1e-6


def test_ddpm_draws_the_gaussian():
    """With the exact eps and 1,000 steps the samples have the data's mean and spread; the last step adds no noise."""
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    out = last(sample.ddpm(gaussian_eps(0.2, 0.5), x, 1000, clip=False))
    assert out.mean().item() == pytest.approx(0.2, abs=0.02) and out.std().item() == pytest.approx(0.5, abs=0.02)
    calls = []
    last(sample.ddpm(gaussian_eps(0.2, 0.5), x, 7, noise=lambda: calls.append(1) or torch.zeros_like(x)))
    assert len(calls) == 6


def test_samplers_show_every_image():
    x = torch.randn(1, 3, 4, 4)
    assert [len(list(s(gaussian_eps(0, 1), x, 7))) for s in (sample.ddim, sample.ddpm)] == [7, 7]


def test_guidance():
    """eps_u + w (eps_c - eps_u), the two halves in one batch sliced to Phi(t)."""
    net = awake(Config(**SMALL))
    x, _, _ = inputs(net.config, 3)
    y = torch.tensor([0, 1, 2])
    t, none = torch.full((3,), 800), torch.full((3,), 4)
    eps_c, eps_u = net(x, t, y), net(x, t, none)
    for w in (0.0, 1.0, 2.0, -0.5):
        assert relative(sample.guided(net, y, w)(x, 800), eps_u + w * (eps_c - eps_u)) < 1e-10
    assert relative(sample.guided(net, None, 2.0)(x, 800), eps_u) < 1e-10
    seen = []
    net.blocks[0].register_forward_hook(lambda _, args, out: seen.append((len(args[0]), args[2])))
    for w in (2.0, 1.0, 0.0):
        sample.guided(net, y, w)(x, 800)
    assert [n for n, _ in seen] == [6, 3, 3] and seen[0][1] == {r: net.rank_schedule.active(800, r) for r in net.ranks}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(sampler):
    """One seed per image: image i starts from the same noise, and in DDPM meets the same noise, in any batch."""
    net = awake(Config(**SMALL), dtype=torch.float32)
    draw = lambda indices, seed=7: sample.draw_images(net, indices, [2, 0], seed, sampler, 5)
    together, labels = draw(range(6))
    apart = torch.cat([draw(range(0, 1))[0], draw(range(1, 4))[0], draw(range(4, 6))[0]])
    assert (together.int() - apart.int()).abs().max() <= 1 and labels.tolist() == [2, 0, 2, 0, 2, 0]
    assert not torch.equal(draw(range(6), 8)[0], together)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny finished run: 4 x 4 patches of 8 x 8 images."""
    folder = tmp_path_factory.mktemp("run") / "r"
    code, out, err = quick_training("--steps", 6, "--out", folder)
    assert code == 0, err
    return folder


def test_sample_script_writes_a_grid_an_array_and_a_folder(run, tmp_path):
    common = ["--run", run, "--num", 5, "--steps", 3, "--batch-size", 2, "--device", "cpu"]
    for out in ("x.png", "x.npz", "folder"):
        code, _, err = cli(sample, *common, "--out", tmp_path / out, "--classes", "3,star")
        assert code == 0, err
    with np.load(tmp_path / "x.npz") as file:
        images, labels = file["arr_0"], file["labels"]
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8 and labels.tolist() == [3, 7, 3, 7, 3]
    assert sorted(os.listdir(tmp_path / "folder")) == [f"{i:06d}.png" for i in range(5)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / "000004.png")), images[4])
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    assert np.array_equal(grid[2:66:8, 2:66:8], images[0])  # two columns of images enlarged to 64 pixels
    source = data.open_source(str(tmp_path / "x.npz"))  # what fid.py reads
    assert source.read(0, 5).shape == (5, 3, 8, 8) and source.labels.tolist() == labels.tolist()


class Attack:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_malicious_checkpoint_is_refused_unopened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (lambda f: torch.save({"config": Attack()}, f), lambda f: pickle.dump(Attack(), f, protocol=2)):
        with open("model.pt", "wb") as file:
            write(file)
        refuses(sample, "--run", tmp_path, says="model.pt cannot be loaded")
        assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("arguments, says", [
    (["--classes", "10"], ("'10'", "0 to 9")), (["--classes", "0,unicorn"], "unicorn"), (["--num", "0"], "at least 1"),
    (["--steps", "1001"], "1 to 1000"), (["--seed", "-1"], "seed"), (["--sampler", "euler"], "ddim"),
    (["--guidance", "two"], "guidance"), (["--guidance", "nan"], "finite"), (["--seed", str(2**64)], "seed"),
    (["--out", "x.jpg"], "FILE.png"), (["--steps", "1e3"], "whole number"), (["--device", "cuda"], "--device cuda is not available"), (["--batch-size", "-3"], "at least 1"),
])
def test_sample_script_refuses(run, arguments, says):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    before = sorted(run.rglob("*"))
    refuses(sample, "--run", run, *arguments, says=says)
    assert sorted(run.rglob("*")) == before


def test_sample_script_refuses_files_that_are_no_runs(run, tmp_path, monkeypatch):
    refuses(sample, "--run", tmp_path / "nowhere", says=("model.pt does not exist", "train.py"))
    whole = (run / "model.pt").read_bytes()
    for name, content in (("truncated", whole[:len(whole) // 2]), ("empty", b""), ("text", b"hello")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pt").write_bytes(content)
        refuses(sample, "--run", tmp_path / name, says="cannot be loaded")
    (tmp_path / "foreign").mkdir()
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign" / "model.pt")
    refuses(sample, "--run", tmp_path / "foreign", says="not a file that train.py wrote")
    state = torch.load(run / "model.pt", weights_only=True)
    state["config"]["width"] = 64
    torch.save(state, tmp_path / "foreign" / "model.pt")
    refuses(sample, "--run", tmp_path / "foreign", says="does not describe a model")
    (tmp_path / "foreign" / "x.png").touch()
    refuses(sample, "--run", run, "--out", tmp_path / "foreign", says="not an empty folder")
    monkeypatch.chdir(tmp_path)
    refuses(sample, says="no run under runs/")


# ----------------------------------------------------------------------------------------------------
# train.py

# small enough for a test: 8 x 8 images, batch 4; the final picture is not drawn but for its file
QUICK = ["--dataset", "shapes", "--image-size", "8", "--batch-size", "4", "--log-every", "5", "--curriculum-share", "0.4",
         "--device", "cpu"]


def quick_training(*arguments):
    real = train.draw_images
    train.draw_images = lambda net, indices, classes, guidance: real(net, range(2), classes, guidance=guidance, steps=1)
    try:
        return cli(train, *QUICK, *arguments)
    finally:
        train.draw_images = real


def flat(state, prefix=""):
    """Every leaf of nested dicts, lists and tuples, by path."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in flat(value, f"{prefix}/{key}").items()}
    return {prefix: state}


def same_state(a, b):
    a, b = (flat(torch.load(folder / "state.pt", weights_only=True)) for folder in (a, b))
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key], key


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start_process(*arguments):
    return subprocess.Popen([sys.executable, HERE / "train.py", *QUICK, *map(str, arguments)], cwd=HERE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process, seconds=120):
    end = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def thirty_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "r"
    code, out, err = quick_training("--steps", 30, "--out", folder)
    assert code == 0, err
    return folder, out


@pytest.mark.parametrize("killed_after", ["state.pt", "config.json"])
def test_a_killed_run_resumes_bit_identically(killed_after, thirty_steps, tmp_path):
    """30 steps straight against 13 + SIGKILL + 17, across curriculum stages; and against a kill before the
    first save. Weights, EMA, optimiser, generators, curriculum and the log agree to the last bit."""
    process = start_process("--steps", 30, "--save-every", 13, "--out", tmp_path / "r")
    wait_for(tmp_path / "r" / killed_after, process)
    process.kill()
    process.wait()
    process.stdout.close(), process.stderr.close()
    (tmp_path / "r" / ".state.pt.1.tmp").touch()  # what a kill during a write leaves
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 29, "lo')  # half a line
    code, out, err = quick_training("--resume", "--out", tmp_path / "r")
    assert code == 0, err
    assert ("going on after step 13" in out) == (killed_after == "state.pt")
    same_state(thirty_steps[0], tmp_path / "r")
    timeless = lambda folder: [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines(folder)]
    assert timeless(tmp_path / "r") == timeless(thirty_steps[0])
    assert not list((tmp_path / "r").glob(".*.tmp"))


def test_ctrl_c_saves_and_exits_130(tmp_path):
    process = start_process("--steps", 100_000, "--out", tmp_path / "r")
    wait_for(tmp_path / "r" / "metrics.jsonl", process)
    while not (tmp_path / "r" / "metrics.jsonl").stat().st_size:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
    state = torch.load(tmp_path / "r" / "state.pt", weights_only=True)
    assert state["step"] >= 5 and len(state["losses"]) == state["step"] % 5


def test_the_log(thirty_steps):
    """Stage, range, active rank, five loss groups (null where empty), learning rate, multiply-adds."""
    folder, out = thirty_steps
    log = lines(folder)
    config = Config(**json.loads((folder / "config.json").read_text())["model"])
    assert [line["step"] for line in log] == [5, 10, 15, 20, 25, 30]
    assert log[0]["loss_by_group"][:2] == [None] * 2 and log[0]["loss_by_group"][4] > 0 and log[0]["stage"] >= 1
    assert log[-1]["stage"] == 9 and log[-1]["t_low"] == 1 and log[-1]["t_high"] == T and log[-1]["loss_by_group"][2] > 0
    r = max(l.rank for l in model.linear_layers(config) if l.rank)
    for line in log:
        assert line["active_rank"] == config.rank_schedule().active(line["t_low"], r)
        begun = max(math.ceil(Fraction(12 * j, 9)) for j in range(line["stage"] + 1))  # 40 % of 30 steps, nine groups
        settings = dict(steps=30, lr=train.TINY["lr"], warmup=train.TINY["warmup"])
        assert line["lr"] == train.learning_rate(line["step"] - 1, begun, line["stage"], settings)
        assert line["images_per_s"] > 0
    for word in ("parameters", "rank", "multiply-adds a step", "device", "left", "final.png", "python sample.py"):
        assert word in out
    assert (folder / "samples" / "final.png").exists()


def test_spent_multiply_adds_are_those_of_the_computed_ranks(thirty_steps):
    """The log's `flops`: every step at the channels of its stage; less than without a curriculum."""
    folder, _ = thirty_steps
    config = Config(**json.loads((folder / "config.json").read_text())["model"])
    c = curriculum.Curriculum(curriculum.cluster_timesteps(schedule.NoiseSchedule().log_snr, 10), T, 30)
    spent = 0
    for step in range(30):
        c.advance(step)
        k = {l.rank: config.rank_schedule().active(c.t_low, l.rank) for l in model.linear_layers(config) if l.rank}
        spent += flops.train_step(config, 4, k)
    assert lines(folder)[-1]["flops"] == spent < 30 * flops.train_step(config, 4)


def test_four_steps_of_the_loop_written_out(tmp_path):
    """Batch, flip, label dropout, x_t, masks inside the stage's slice, eps loss and penalty, AdamW, EMA:
    four steps from the public pieces give the weights that train.py saves. (Fewer would not reach the labels:
    adaLN-Zero lets gradients through layer by layer.)"""
    code, _, err = quick_training("--steps", 4, "--curriculum-groups", 3, "--curriculum-share", 1, "--orthogonality", 0.1,
                                  "--label-dropout", 0.5, "--seed", 5, "--out", tmp_path / "r")
    assert code == 0, err
    found = torch.load(tmp_path / "r" / "state.pt", weights_only=True)
    images, labels = data.draw_shapes(20_000, 8, seed=5)
    torch.manual_seed(5)
    net = DiT(Config(**model.PRESETS["tiny"], image_size=8))
    average = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0)
    host, device = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + 2**31)
    noise = schedule.NoiseSchedule()
    t_low = curriculum.cluster_timesteps(noise.log_snr, 3)[-1]
    for step in range(4):
        index = data.batch_indices(20_000, step, 4, 5, torch.device("cpu"))
        x_0 = images[index]
        flip = torch.rand(4, 1, 1, 1, generator=device).flatten() < 0.5
        x_0[flip] = x_0[flip].flip(3)
        y = labels[index]
        y[torch.rand(4, generator=device) < 0.5] = 10
        eps = torch.randn(4, 3, 8, 8, generator=device)
        t = t_low + (torch.rand(4, dtype=torch.float64, generator=host) * (T + 1 - t_low)).floor().long().sort().values
        ab = noise.alpha_bar[t].view(4, 1, 1, 1)
        x_t = (ab.sqrt() * (x_0.double() / 127.5 - 1) + (1 - ab).sqrt() * eps).float()
        phi = {r: net.rank_schedule.active(t, r) for r in net.ranks}
        active = lowrank.masks(phi, {r: net.rank_schedule.active(t_low, r) for r in net.ranks})
        loss = F.mse_loss(net(x_t, t, y, active), eps) + 0.1 * lowrank.orthogonality_penalty(net, active)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, 0, 0, dict(steps=4, lr=train.TINY["lr"], warmup=100))
        optimizer.step(), optimizer.zero_grad()
        decay = min(train.TINY["ema_decay"], (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, net.parameters())]
    for (name, p), a in zip(net.named_parameters(), average):
        assert torch.allclose(found["model"][name], p, rtol=1e-4, atol=1e-6), name
        assert torch.allclose(found["ema"][name], a, rtol=1e-4, atol=1e-6), name
    assert lines(tmp_path / "r")[-1]["t_low"] == t_low


def test_a_plateau_introduces_a_group(tmp_path, monkeypatch):
    """The loop gives every batch loss to the curriculum, at log lines, and asks it before every step."""
    seen, real = [], curriculum.Curriculum.observe

    def observe(self, first_step, losses):
        real(self, first_step, losses)
        seen.append((first_step, losses))
        self.since_best = self.patience  # as after 200 steps without improvement

    monkeypatch.setattr(curriculum.Curriculum, "observe", observe)
    quick_training("--steps", 20, "--curriculum-share", 1, "--out", tmp_path / "r")
    log = lines(tmp_path / "r")
    assert [line["stage"] for line in log] == [0, 1, 2, 3]
    assert [(first, len(losses)) for first, losses in seen] == [(0, 5), (5, 5), (10, 5), (15, 5)]
    assert [np.mean(losses) for _, losses in seen] == pytest.approx([line["loss"] for line in log])


def test_learning_rate():
    """Linear warm-up, cosine to zero; afresh at each introduction from base (1 - 0.02 k), a fifth of the warm-up."""
    s = dict(steps=100_000, lr=1e-4, warmup=3000)
    lr = lambda step, start=0, stage=0: train.learning_rate(step, start, stage, s)
    assert lr(0) == pytest.approx(1e-4 / 3000) and lr(2999) == pytest.approx(1e-4) and lr(100_000) == pytest.approx(0)
    assert lr(51_500) == pytest.approx(0.5e-4)
    assert lr(20_000, 20_000, 3) == pytest.approx(0.94e-4 / 600) and lr(20_600, 20_000, 3) == pytest.approx(0.94e-4)
    assert train.learning_rate(49, 0, 0, s | dict(steps=1000)) == pytest.approx(1e-4)  # short runs: 5 % of the steps


def test_a_new_group_clears_the_optimiser_but_not_the_ema(tmp_path):
    """C.3.4. After the last introduction at step 12, AdamW has counted the 18 steps since; the EMA all 30."""
    quick_training("--steps", 30, "--out", tmp_path / "r")
    state = torch.load(tmp_path / "r" / "state.pt", weights_only=True)
    assert state["curriculum"]["stage"] == 9 and state["curriculum"]["start"] == 12
    assert {int(p["step"]) for p in state["optimizer"]["state"].values()} == {18}
    assert len(state["optimizer"]["state"]) == len(state["model"])


def test_ema_of_the_weights(tmp_path, monkeypatch):
    """ema <- d ema + (1 - d) w with d = min(decay, (1 + n) / (10 + n)), after every step."""
    seen, real = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda e, p, w: seen.append(w) or real(e, p, w))
    quick_training("--steps", 12, "--ema-decay", 0.5, "--out", tmp_path / "r")
    assert seen == pytest.approx([1 - min(0.5, (1 + n) / (10 + n)) for n in range(12)])


@pytest.mark.parametrize("method", ["full", "static", "iso-param"])
def test_every_method_trains_without_a_curriculum(method, tmp_path):
    code, _, err = quick_training("--steps", 5, "--method", method, "--curriculum-groups", 0, "--out", tmp_path / "r")
    assert code == 0, err
    log = lines(tmp_path / "r")[-1]
    assert log["stage"] == 0 and log["t_low"] == 1 and (log["active_rank"] is None) == (method == "full")


def test_images_without_classes_train_with_the_no_class_label(folder, tmp_path):
    code, _, err = quick_training("--dataset", folder[0] / "a", "--data-dir", tmp_path, "--model", "tiny", "--steps", 2,
                                  "--out", tmp_path / "r")
    assert code == 0, err
    assert json.loads((tmp_path / "r" / "config.json").read_text())["model"]["num_classes"] == 0
    code, _, err = cli(sample, "--run", tmp_path / "r", "--num", 2, "--steps", 2, "--out", tmp_path / "x.png")
    assert code == 0 and (tmp_path / "x.png").exists()


def test_the_papers_settings():
    """NA-LR D.1 are the defaults of --dataset cifar10."""
    s = train.choose_settings({"dataset": "cifar10"})
    expected = dict(model="DiT-S/2", steps=800_000, batch_size=128, lr=1e-4, warmup=3000, ema_decay=0.9999,
                    label_dropout=0.1, guidance=2.0, flip=True, curriculum_groups=10, curriculum_share=0.4)
    assert {name: s[name] for name in expected} == expected
    assert train.choose_settings({"dataset": "cifar10", "method": "static"})["curriculum_groups"] == 0


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    code, _, err = quick_training("--steps", 12, "--save-every", 5, "--lr", "1e-3", "--out", tmp_path / "r")
    assert code == 0, err
    good = (tmp_path / "r" / "state.pt").read_bytes()
    real = train.to_unit
    train.to_unit = lambda x: real(x) * math.nan
    try:
        code, _, err = quick_training("--resume", "--steps", 24, "--out", tmp_path / "r")
    finally:
        train.to_unit = real
    assert code == 2 and err.count("\n") == 1 and "finite" in err and "--lr 0.0005" in err
    assert (tmp_path / "r" / "state.pt").read_bytes() == good


def test_an_absurd_learning_rate_never_saves_a_broken_state(tmp_path):
    code, _, err = quick_training("--steps", 40, "--save-every", 1, "--lr", "1e30", "--out", tmp_path / "r")
    assert code == 2 and "finite" in err
    if (tmp_path / "r" / "state.pt").exists():
        state = torch.load(tmp_path / "r" / "state.pt", weights_only=True)
        assert all(torch.isfinite(p).all() for p in state["model"].values())


BAD_TRAINING = [
    (["--dataset", "imagenet"], ("imagenet", "shapes, cifar10, celeba")), (["--image-size", "9"], "not divisible"),
    (["--steps", "0"], "at least 1"), (["--batch-size", "-1"], "at least 1"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--keep", "0"], "keep"), (["--keep", "1.1"], "keep"), (["--rho-min", "2"], "rho_min"), (["--warm-start", "-1"], "warm_start"),
    (["--model", "DiT-H/2"], "DiT-H/2"), (["--method", "lora"], "lora"), (["--num-classes", "3"], "10 classes"),
    (["--device", "tpu"], "tpu"), (["--device", "cuda"], "not available"), (["--curriculum-groups", "5000"], "curriculum-groups"),
    (["--curriculum-share", "2"], "curriculum-share"), (["--dense-mlp-blocks", "-1"], "at least 0"), (["--label-dropout", "7"], "label-dropout"),
    (["--frobnicate"], "frobnicate"), (["--seed", "-5"], "seed"), (["--dataset", ""], "no dataset"), (["--lr", "inf"], "--lr"),
    (["--steps", "1e3"], "whole number"), (["--guidance", "inf"], "--guidance"),
]


@pytest.mark.parametrize("arguments, says", BAD_TRAINING, ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_train_script_refuses(arguments, says, tmp_path, monkeypatch):
    """One line, exit status 2, and nothing written."""
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    refuses(train, "--out", "r", *arguments, says=says)
    assert os.listdir(tmp_path) == []


def test_train_script_refuses_broken_image_folders(folder, tmp_path):
    path, *_ = folder
    common = ["--data-dir", tmp_path / "d", "--out", tmp_path / "r", "--model", "tiny", "--dataset"]
    (tmp_path / "empty").mkdir()
    refuses(train, *common, tmp_path / "empty", says="holds no images")
    (tmp_path / "x.zip").write_bytes(b"PK no zip")
    refuses(train, *common, tmp_path / "x.zip", says="neither a folder")
    np.savez(tmp_path / "x.npz", pictures=np.zeros(3))
    refuses(train, *common, tmp_path / "x.npz", says=("pictures", "images"))
    np.savez(tmp_path / "y.npz", images=np.array([{}], dtype=object))
    refuses(train, *common, tmp_path / "y.npz", says="not a readable .npz")
    whole = (path / "a" / "04.png").read_bytes()
    (path / "a" / "04.png").write_bytes(whole[:60])
    refuses(train, *common, path, says=("04.png", "not a readable image"))
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(path / "a" / "04.png")
    refuses(train, *common, path, says=("a/04.png is 10x8", "8x8", "--image-size"))
    assert not (tmp_path / "r").exists() and not (tmp_path / "d").exists()


def test_train_script_keeps_a_run_that_is_there(run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    refuses(train, "--out", run, says=("already holds a run", "--resume"))
    refuses(train, "--out", run, "--resume", "--keep", "0.25", "--seed", "3", says=("--keep 0.25 (the run has 0.5)", "--seed 3"))
    refuses(train, "--out", run, "--resume", "--steps", 5, says="already trained 6 steps")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_kill_between_the_two_writes_is_made_good(run, tmp_path):
    """model.pt is written before state.pt: the older state goes on and writes both again."""
    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / "state.pt").unlink()
    (tmp_path / "r" / "model.pt").write_bytes(b"half")
    code, _, err = quick_training("--resume", "--out", tmp_path / "r")
    assert code == 0, err
    same_state(run, tmp_path / "r")
    assert torch.load(tmp_path / "r" / "model.pt", weights_only=True)["step"] == 6


def test_resume_refuses_other_data_and_foreign_states(run, folder, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    resume = ["--resume", "--out", tmp_path / "r"]
    refuses(train, *resume, "--dataset", folder[0], "--data-dir", tmp_path, says="must be the same")
    config = json.loads((run / "config.json").read_text())
    for name, value in (("lr", "fast"), ("batch_size", 0), ("device", "tpu"), ("dtype", "float8"), ("curriculum_groups", 3)):
        changed = config | {"train": config["train"] | {name: value}}
        (tmp_path / "r" / "config.json").write_text(json.dumps(changed))
        refuses(train, *resume, says="state.pt" if name == "curriculum_groups" else name.replace("_", "-"))
    (tmp_path / "r" / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"depth": 2.5}}))
    refuses(train, *resume, says="depth")


def test_resuming_a_finished_run_draws_its_picture(run, tmp_path):
    """A kill between the last save and the picture must not leave a run without one."""
    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / "samples" / "final.png").unlink()
    code, _, err = quick_training("--resume", "--out", tmp_path / "r")
    assert code == 0 and (tmp_path / "r" / "samples" / "final.png").exists(), err
    same_state(run, tmp_path / "r")


def test_resume_refuses_a_broken_state(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    whole = (tmp_path / "r" / "state.pt").read_bytes()
    (tmp_path / "r" / "state.pt").write_bytes(whole[:1000])
    refuses(train, "--resume", "--steps", 20, "--out", tmp_path / "r", says="state.pt cannot be loaded")
    (tmp_path / "r" / "config.json").write_text("{")
    refuses(train, "--resume", "--out", tmp_path / "r", says="config.json is not a run's settings")


def test_help_teaches(capsys):
    for module in (train, sample):
        code, out, _ = cli(module, "--help")
        assert code == 0 and "python train.py" in out or "python sample.py" in out


# ----------------------------------------------------------------------------------------------------
# fid.py


def formula(shape, a, b):
    """Numbers that look random and are the same on every machine and numpy version, in [-1, 1)."""
    i = np.arange(np.prod(shape), dtype=np.float64)
    return ((a * i * i + b * i) % 1 * 2 - 1).reshape(shape)


def test_frechet_distance_of_commuting_gaussians():
    """FID Eq. (6): with diagonal covariances the distance is |mu1 - mu2|^2 + sum (s1 - s2)^2."""
    g = np.random.default_rng(0)
    m1, m2, s1, s2 = g.normal(size=(4, 40))
    q = np.linalg.qr(g.normal(size=(40, 40)))[0]  # the same rotation of both changes nothing
    ours = fid.frechet_distance(q @ m1, q @ np.diag(s1**2) @ q.T, q @ m2, q @ np.diag(s2**2) @ q.T)
    assert ours == pytest.approx(((m1 - m2) ** 2).sum() + ((abs(s1) - abs(s2)) ** 2).sum(), rel=1e-10)


# made once with mpmath 1.3 at 40 digits: singular values of A B^T, A and B the centred rows / sqrt(n - 1)
@pytest.mark.parametrize("n1, n2, d, expected", [
    (40, 50, 12, 0.068117025309648178), (9, 50, 16, 0.11900381451397744), (9, 11, 24, 0.089254589796297743)])
def test_frechet_distance_against_forty_digits(n1, n2, d, expected):
    """FID Eq. (6), full rank and rank deficient, on ill-scaled features."""
    scale = 2.0 ** -np.arange(d)
    x, y = formula((n1, d), 0.3819660112, 0.7548776662) * scale, formula((n2, d), 0.2451223337, 0.5698402909) * scale
    ours = fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert ours == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_needs_matching_shapes():
    eye = np.eye(3)
    assert fid.frechet_distance(np.zeros(3), eye, np.zeros(3), eye) == 0
    assert fid.frechet_distance(np.zeros(3), 0 * eye, np.ones(3), eye) == 6  # a point against a Gaussian
    with pytest.raises(data.InputError, match="same features"):
        fid.frechet_distance(np.zeros(3), eye, np.zeros(4), np.eye(4))


@pytest.mark.parametrize("sizes", [[100], [1, 99], [30, 30, 30, 10]])
def test_moments_are_the_mean_and_covariance(sizes):
    """Streaming gives numpy's mean and unbiased covariance, also far from zero, whatever the batches."""
    x = torch.randn(100, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    moments = fid.Moments()
    for part in x.split(sizes):
        moments.add(part)
    mu, sigma = moments.result()
    np.testing.assert_allclose(mu, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x.numpy() - 1e6, rowvar=False), rtol=1e-9, atol=1e-9)


def test_precision_recall_by_definition(monkeypatch):
    """Kynkaanniemi et al. Eq. (1), (2), by counting. Integer features, so that distances tie exactly."""
    monkeypatch.setattr(fid, "BLOCK", 16)
    g = np.random.default_rng(0)
    real, fake = g.integers(-3, 4, (50, 3)), g.integers(-2, 5, (37, 3))

    def squared(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(2)

    for k in (1, 3):
        radius = [np.sort(squared(x, x), 1)[:, k] for x in (real, fake)]
        precision = np.mean([any(squared(real, fake)[:, j] < radius[0]) for j in range(37)])
        recall = np.mean([any(squared(real, fake)[i] < radius[1]) for i in range(50)])
        ours = fid.precision_recall(torch.tensor(real).float(), torch.tensor(fake).float(), k)
        assert ours == (precision, recall) and 0 < precision < 1 and 0 < recall < 1
    with pytest.raises(data.InputError, match="more than 3"):
        fid.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2), 3)


def test_precision_recall_as_prdc():
    """prdc 0.2 gave these on the same features (sums and products of features alone, no random numbers)."""
    real = torch.from_numpy(formula((300, 8), 0.3819660112, 0.7548776662))
    fake = torch.from_numpy(formula((200, 8), 0.2451223337, 0.5698402909)) * 0.9 + 0.15
    assert fid.precision_recall(real, fake, 3) == (0.82, 0.75)


def test_inception_score():
    """Salimans et al. 2016: exp E KL(p(y|x) || p(y)); certain and balanced gives the classes, uniform 1."""
    def score(p):
        p = p.double()
        p_log_p = -torch.special.entr(p).sum(-1, keepdim=True)
        return fid.inception_score(torch.cat([p, p_log_p, torch.ones_like(p_log_p)], -1).sum(1))

    certain = torch.eye(8).repeat(2, 1, 1)  # (splits, images, classes)
    assert score(certain) == pytest.approx(8)
    assert score(torch.full((2, 5, 8), 1 / 8)) == pytest.approx(1)
    p = torch.tensor([[[0.9, 0.1], [0.3, 0.7]], [[0.5, 0.5], [0.5, 0.5]]])  # the second split scores 1
    marginal = torch.tensor([0.6, 0.4])
    assert score(p) == pytest.approx((1 + (p[0] * (p[0] / marginal).log()).sum(1).mean().exp().item()) / 2)


def test_splits_of_the_inception_score():
    """Ten consecutive tenths; if the labels come sorted, every tenth image (a tenth would hold one class)."""
    images = torch.arange(10).repeat_interleave(10)[:, None, None, None].expand(100, 3, 4, 4).to(torch.uint8)

    def network(x):  # class c with probability 0.9
        x = x[:, 0, 0, 0]
        p = torch.full((len(x), 1008), 1e-30)
        p[:, :10] = 0.1 / 9
        p[torch.arange(len(x)), x.long()] = 0.9
        return torch.stack([x, x * x], 1).float(), torch.stack([x, x * x], 1).float(), p.log()

    sorted_by_class = data.Source("x", 100, lambda i, j: images[i:j], images[:, 0, 0, 0].long(), [])
    unlabelled = data.Source("x", 100, lambda i, j: images[i:j], None, [])
    extractor = fid.Extractor("x", "x", lambda device: network)
    scores = [fid.measure(s, extractor, torch.device("cpu"), 7).inception_score for s in (sorted_by_class, unlabelled)]
    kl = 0.9 * np.log(0.9 / 0.1) + 0.1 * np.log(0.1 / 9 / 0.1)
    assert scores == pytest.approx([np.exp(kl), 1.0])


@pytest.fixture(scope="module")
def inception():
    """The network with made-up weights that are the same everywhere, and activations of order one."""
    net = fid.Inception().eval()
    state = net.state_dict()
    for i, (name, w) in enumerate(state.items()):
        if w.ndim == 0:
            continue
        values = torch.from_numpy(formula(w.shape, 0.3819660112 + i * 1e-4, 0.7548776662)).float()
        if w.ndim == 4:
            values *= (6 / w[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            values = 1 + 0.5 * values
        elif w.ndim == 2:
            values *= 0.05
        state[name] = 0.3 * values if name.endswith(("bias", "running_mean")) else values
    net.load_state_dict(state)
    return net


def some_images():
    """uint8 (2, 3, 24, 340): waves, to be made higher and narrower by the resize."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(340.0), indexing="ij")
    waves = [(x * (0.3 + 0.1 * c) + y * (0.2 + 0.15 * n)).sin() + (x * y / (40 + 9 * c)).cos() for n in range(2) for c in range(3)]
    return (torch.stack(waves).reshape(2, 3, 24, 340) * 63 + 127).round().to(torch.uint8)


PYTORCH_FID = [  # mean, spread, then some entries
    [2.592785, 3.634893, 0.297273, 24.15967, 0.000299, 0.327809, 24.236818, 0.0],
    [0.936915, 1.264961, 0.0, 0.037425, 4.085309, 0.0, 0.0, 4.057065],
    [0.326836, 5.671558, -4.565959, 4.710322, -4.816909, -4.673604, 4.805509, -4.914541]]


def test_inception_as_pytorch_fid(inception):
    """pytorch-fid 0.3.0 gave these with the same weights on the same images, its own resize included (its
    InceptionV3 with the `inception` fixture's state dict; Mixed_6d.branch1x1 by a hook; logits less bias)."""
    with torch.no_grad():
        features, spatial, logits = inception(some_images())
    assert features.shape == (2, 2048) and spatial.shape == (2, 7 * 17 * 17) and logits.shape == (2, 1008)
    for ours, expected in zip((features, spatial, logits), PYTORCH_FID):
        ours = [ours.mean().item(), ours.std().item(), *ours[:, 5::ours.shape[1] // 3].flatten().tolist()]
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_inception_weights_are_checked_and_offline_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    code, out, err = cli(fid, tmp_path / "a.npz", tmp_path / "a.npz", "--data-dir", tmp_path, "--device", "cpu")
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out and "put pt_inception-2015-12-05-6726825d.pth into" in last and str(tmp_path) in last
    assert err.count("\n") == 1 and not (tmp_path / "checkpoints").exists()  # nothing is left behind
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"something else")
    code, _, err = cli(fid, tmp_path / "a.npz", tmp_path / "a.npz", "--data-dir", tmp_path, "--device", "cpu")
    assert code == 2 and "SHA-256" in err and err.count("\n") == 1


def test_spread():
    """One index from each stretch, for sorted classes and for classes that take turns alike."""
    i = fid.spread(20_000, 500)
    assert len(i) == 500 and bool((i // 40 == torch.arange(500)).all())
    assert (torch.bincount(i % 10, minlength=10) > 20).all()
    assert fid.spread(7, 9).tolist() == list(range(7)) and len(fid.spread(7, 0)) == 0


class Pixels(torch.nn.Module):
    """Features that a person can compute by hand: mean and spread of each channel."""

    def forward(self, images):
        x = images.float() / 255
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)  # (N, 6)


class Broken(torch.nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def forward(self, images):
        x = images.float().mean((2, 3))
        if self.how == "nan":
            return x / 0 - x / 0
        if self.how == "shape":
            return x[:1]
        return x @ x  # fails


def script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with two sets of shapes as .npz, a feature file, and statistics."""
    folder = tmp_path_factory.mktemp("fid")
    for name, seed, n in (("a", 1, 120), ("b", 2, 100)):
        images, labels = data.draw_shapes(n, 8, seed)
        np.savez(folder / f"{name}.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    script(Pixels(), folder / "pixels.pt")
    return folder


def run_fid(folder, *arguments):
    return cli(fid, *arguments, "--data-dir", folder / "data", "--device", "cpu")


def test_fid_end_to_end(work):
    """The script's figures are those of the definitions on the same features; stdout is the JSON alone."""
    code, out, err = run_fid(work, work / "a.npz", work / "b.npz", "--features", work / "pixels.pt", "--json", "--batch-size", 7)
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and "biased" in err
    assert list(result) == ["frechet_distance", "sfid", "inception_score", "precision", "recall", "n_generated",
                            "n_reference", "features"]
    assert "pixels.pt" in result["features"] and result["inception_score"] is None and result["sfid"] is None
    assert (result["n_generated"], result["n_reference"]) == (120, 100)
    x, y = (Pixels()(data.load(str(work / name)).images).double() for name in ("a.npz", "b.npz"))
    statistics = [(z.mean(0), z.T.cov()) for z in (x, y)]
    assert result["frechet_distance"] == pytest.approx(fid.frechet_distance(*statistics[0], *statistics[1]), rel=1e-5)
    assert (result["precision"], result["recall"]) == fid.precision_recall(y, x, 3)
    code, out, _ = run_fid(work, work / "a.npz", work / "b.npz", "--features", work / "pixels.pt")
    assert code == 0 and "Frechet distance (not an FID)" in out


def test_statistics_files(work, tmp_path):
    """Written statistics give the same distance, hold `n`, and so do bare `mu` and `sigma` of other tools."""
    flags = "--features", work / "pixels.pt", "--json"
    code, out, _ = run_fid(work, work / "a.npz", work / "b.npz", *flags, "--save-stats", tmp_path / "b.npz")
    images = json.loads(out)
    with np.load(tmp_path / "b.npz") as file:
        assert file["n"] == 100 and file["mu"].dtype == np.float64 and "points" not in file.files
        np.savez(tmp_path / "bare.npz", mu=file["mu"].astype(np.float32), sigma=file["sigma"])
    saved = json.loads(run_fid(work, work / "a.npz", tmp_path / "b.npz", *flags)[1])
    assert saved["frechet_distance"] == images["frechet_distance"] and saved["n_reference"] == 100
    assert saved["precision"] is None and saved["recall"] is None
    bare = json.loads(run_fid(work, work / "a.npz", tmp_path / "bare.npz", *flags)[1])
    assert bare["frechet_distance"] == pytest.approx(saved["frechet_distance"], rel=1e-3) and bare["n_reference"] is None
    code, _, err = run_fid(work, work / "a.npz", tmp_path / "b.npz", "--features", script(Broken("ok"), tmp_path / "other.pt"))
    assert code == 2  # that file fails; and one that works must still not be compared with these statistics
    code, _, err = run_fid(work, tmp_path / "b.npz", tmp_path / "b.npz")
    assert code == 2 and "--features" in err and err.count("\n") == 1


def test_adm_reference_files_give_all_figures(work, tmp_path):
    """They hold the images (`arr_0`) beside the Inception statistics; other features come from the images."""
    with np.load(work / "b.npz") as file:
        images = file["images"]
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=np.zeros(2048), sigma=np.eye(2048))
    flags = "--features", work / "pixels.pt", "--json"
    results = [json.loads(run_fid(work, work / "a.npz", reference, *flags)[1]) for reference in (work / "b.npz", tmp_path / "adm.npz")]
    assert results[0]["frechet_distance"] == results[1]["frechet_distance"] and results[1]["precision"] is not None


def test_foreign_arrays_in_statistics_files_do_not_matter(work, tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(6), sigma=np.eye(6), features=np.zeros((4, 6)), inception_score=np.ones(3))
    code, out, err = run_fid(work, work / "a.npz", tmp_path / "s.npz", "--features", work / "pixels.pt", "--json")
    assert code == 0 and json.loads(out)["frechet_distance"] > 0, err


def test_the_reference_is_cached_by_content(work, tmp_path, monkeypatch):
    calls = []
    measure = fid.measure
    monkeypatch.setattr(fid, "measure", lambda source, *a, **k: calls.append(source.name) or measure(source, *a, **k))
    flags = "--features", work / "pixels.pt", "--json", "--data-dir", tmp_path / "data", "--device", "cpu"
    reference = tmp_path / "b.npz"
    reference.write_bytes((work / "b.npz").read_bytes())
    first = cli(fid, work / "a.npz", reference, *flags)[1]
    reference = reference.rename(tmp_path / "moved.npz")  # the same content under another name
    assert cli(fid, work / "a.npz", reference, *flags)[1] == first and len(calls) == 3
    with np.load(reference) as file:
        images = file["images"].copy()
    images[3, 0, 0, 0] ^= 255  # one pixel
    np.savez(reference, images=images)
    assert cli(fid, work / "a.npz", reference, *flags)[1] != first and len(calls) == 5
    for cache in (tmp_path / "data" / "cache").iterdir():
        cache.write_bytes(cache.read_bytes()[:500])  # damaged: measured again, not an error
    assert cli(fid, work / "a.npz", reference, *flags)[0] == 0 and len(calls) == 7


def test_exported_features(work, tmp_path):
    """A .pt2 file of torch.export serves like TorchScript."""
    batch = torch.export.Dim("batch", min=1, max=1000)
    program = torch.export.export(Pixels(), (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "pixels.pt2")
    results = [json.loads(run_fid(work, work / "a.npz", work / "b.npz", "--features", file, "--json")[1])
               for file in (work / "pixels.pt", tmp_path / "pixels.pt2")]
    assert results[0]["frechet_distance"] == pytest.approx(results[1]["frechet_distance"], rel=1e-6)


def test_bad_input_to_fid_is_one_line(work, tmp_path):
    a, pixels = work / "a.npz", work / "pixels.pt"
    np.savez(tmp_path / "one.npz", images=np.zeros((1, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "mu5.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(6), sigma=np.eye(5))
    np.savez(tmp_path / "nosigma.npz", mu=np.zeros(6))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(6), sigma=np.full((6, 6), np.nan))
    np.savez(tmp_path / "skew.npz", mu=np.zeros(6), sigma=np.tril(np.ones((6, 6))))
    (tmp_path / "cut.npz").write_bytes((work / "a.npz").read_bytes()[:-30])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.pt2").write_text("hello")
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.png").write_text("no image")
    broken = {how: script(Broken(how), tmp_path / f"{how}.pt") for how in ("nan", "shape", "fails")}
    for generated, reference, features, said in [
            (tmp_path / "none", a, pixels, "no dataset"), (tmp_path / "empty", a, pixels, "holds no images"),
            (tmp_path / "one.npz", a, pixels, "at least 2"), (tmp_path / "broken", a, pixels, "b.png"),
            (a, tmp_path / "mu5.npz", pixels, "6 features per image"), (a, tmp_path / "odd.npz", pixels, "(D, D)"),
            (a, tmp_path / "nosigma.npz", pixels, "sigma"), (a, tmp_path / "nan.npz", pixels, "NaN"),
            (a, tmp_path / "skew.npz", pixels, "symmetric"), (a, tmp_path / "cut.npz", pixels, "cut.npz"),
            (a, a, tmp_path / "text.pt", "TorchScript"), (a, a, tmp_path / "text.pt2", "TorchScript"),
            (a, a, tmp_path / "none.pt", "cannot read"), (a, a, broken["nan"], "not finite"),
            (a, a, broken["shape"], "(N, D)"), (a, a, broken["fails"], "fails on uint8")]:
        code, out, err = run_fid(work, generated, reference, "--features", features)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1, (code, out, err)
    code, _, err = run_fid(work, a, a, "--features", broken["nan"], "--num", 20)
    assert code == 2 and err.count("\n") == 1, err  # no note before the error
    code, _, err = run_fid(work, a, a, "--features", pixels, "--save-stats", pixels / "x.npz")
    assert code == 2 and err.count("\n") == 1, err
    assert run_fid(work, a, a, "--features", pixels, "--inception", pixels)[0] == 2
    assert run_fid(work, a, a, "--features", pixels, "--pr-num", -1)[0] == 2


def test_warnings(work, tmp_path):
    images, _ = data.draw_shapes(300, 16, 5)
    np.savez(tmp_path / "big.npz", images=images.permute(0, 2, 3, 1).numpy())
    flags = "--features", work / "pixels.pt", "--json"
    _, out, err = run_fid(work, work / "b.npz", tmp_path / "big.npz", *flags)
    assert "8x8 against 16x16" in err and "below 10,000" in err and "not comparable" in err and "100 generated" in err
    _, out, err = run_fid(work, work / "b.npz", tmp_path / "big.npz", *flags, "--num", 50)
    result = json.loads(out)
    assert result["n_generated"] == result["n_reference"] == 50 and "50 of 100 images" in err and "not comparable" not in err
    assert json.loads(run_fid(work, work / "a.npz", work / "b.npz", *flags, "--pr-num", 0)[1])["precision"] is None


# ----------------------------------------------------------------------------------------------------
# experiments/

def test_classifier_trains_and_judges(tmp_path):
    """Beats chance by far on fresh shapes after a few steps, judges true labels high and wrong ones low."""
    flags = "--data-dir", tmp_path, "--device", "cpu", "--json"
    out_file = tmp_path / "c.pt"
    code, out, _ = cli(classifier, "--image-size", 8, "--num", 2000, "--steps", 120, "--width", 16, "--out", out_file, *flags)
    result = json.loads(out)
    assert code == 0 and result["held_out_accuracy"] > 0.5
    images, labels = data.draw_shapes(400, 8, 9)
    np.savez(tmp_path / "good.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    np.savez(tmp_path / "wrong.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=(labels.numpy() + 1) % 10)
    judged = {name: json.loads(cli(classifier, "--classifier", out_file, "--generated", tmp_path / f"{name}.npz", *flags)[1])
              for name in ("good", "wrong")}
    assert judged["good"]["recognised"] > 0.5 > judged["wrong"]["recognised"]
    assert [row["class"] for row in judged["good"]["per_class"]] == list(data.SHAPES)
    for name in ("star", "circle"):  # class folders are matched by name
        (tmp_path / "folders" / name).mkdir(parents=True)
        for i in range(3):
            pixels = images[labels == list(data.SHAPES).index(name)][i].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / "folders" / name / f"{i}.png")
    folders = json.loads(cli(classifier, "--classifier", out_file, "--generated", tmp_path / "folders", *flags)[1])
    by_name = {row["class"]: row["n"] for row in folders["per_class"]}
    assert by_name["star"] == by_name["circle"] == 3 and sum(by_name.values()) == 6
    # its features serve fid.py, and are the classifier's own
    features = fid.file_extractor(tmp_path / "c.features.pt").load(torch.device("cpu"))(images)[0]
    model, _ = classifier.load_classifier(out_file, torch.device("cpu"))
    with torch.no_grad():
        assert torch.allclose(features, model.eval().features(images), atol=1e-5)
        assert torch.equal(model.head(features).argmax(1), model(images).argmax(1))


def test_bad_input_to_classifier_is_one_line(tmp_path):
    np.savez(tmp_path / "plain.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    (tmp_path / "text.pt").write_text("hello")
    for arguments, said in [
            (["--dataset", tmp_path / "plain.npz"], "no classes"), (["--classifier", tmp_path / "text.pt"], "--generated"),
            (["--classifier", tmp_path / "text.pt", "--generated", tmp_path / "plain.npz"], "not a classifier"),
            (["--classifier", tmp_path / "none.pt", "--generated", tmp_path / "plain.npz"], "no classifier"),
            (["--generated", tmp_path / "none.npz"], "no dataset"), (["--steps", 0], "at least 1")]:
        code, out, err = cli(classifier, *arguments, "--data-dir", tmp_path, "--device", "cpu", "--out", tmp_path / "x.pt")
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1, (arguments, code, out, err)


# ----------------------------------------------------------------------------------------------------
# sorted execution, loss weights, stratified timesteps


def counter():
    """PyTorch's counter, which knows addmm but not its in-place form."""
    def in_place(self, a, b, *_, out_shape=None, **__):
        return 2 * a[0] * a[1] * b[1]
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


def sorted_active(net, t, t_low=1):
    return net.active_ranks(t, t_low, model.chunk_batch(net.config, t.tolist()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("changes", [{}, dict(conditioning="shared"), dict(factorise="attention-mlp"), dict(patch=8),
                                     dict(rho_min=0.1, warm_start=0.0, keep=0.9), dict(rank_profile="linear")])
def test_sorted_equals_masked_in_outputs_and_every_gradient(changes, dtype, tolerance):
    """Eq. (3), (4): the same result from chunks, for every parameter and for the input."""
    net = awake(Config(**SMALL | changes), dtype=dtype)
    x, t, y = inputs(net.config, 13, dtype=dtype)
    t = t.sort().values
    for t_low in (1, int(t[0])):
        results = []
        for active in (net.active_ranks(t, t_low), sorted_active(net, t, t_low)):
            net.zero_grad()
            x_in = x.clone().requires_grad_()
            out = net(x_in, t, y, active)
            (out**3).mean().backward()
            results.append([out.detach(), x_in.grad] + [p.grad for p in net.parameters()])
        assert len(model.chunk_batch(net.config, t.tolist())) > 1
        masked, ours = (dict(zip(["output", "input", *dict(net.named_parameters())], found)) for found in results)
        for name in masked:
            if name.endswith(".k.bias"):  # adds the same to all scores of a query: its gradient is zero but for rounding
                scale = masked[name.replace(".k.", ".v.")].abs().max()
                assert max(masked[name].abs().max(), ours[name].abs().max()) < tolerance * scale, name
            else:
                assert relative(ours[name], masked[name]) < tolerance, name


@pytest.mark.parametrize("n, m, r", sorted({(l.n, l.m, l.rank) for l in model.linear_layers(
    Config(**model.PRESETS["DiT-S/2"])) if l.rank and l.rows > 1}))
def test_sorted_equals_masked_in_every_layer_of_dit_s(n, m, r):
    """At the sizes of DiT-S/2, float64, with rows that no chunk computes (they get a gradient of zero)."""
    torch.manual_seed(r)
    layer = lowrank.LowRankLinear(n, m, r).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    config = Config(**model.PRESETS["DiT-S/2"])
    t = torch.tensor([300, 301, 450, 640, 641, 642, 990])
    phi = {r: config.rank_schedule().active(t, r)}
    mask = lowrank.masks(phi, {r: r})[r]
    chunks = [(first, *(config.rank_schedule().active(int(t_i), r) for t_i in ends))
              for first, *ends in model.chunk_batch(config, t.tolist())]
    x = torch.randn(7, 5, n, dtype=torch.float64)
    found = []
    for active in (mask, lowrank.Sorted(mask, torch.tensor(chunks))):
        layer.zero_grad()
        x_in = x.clone().requires_grad_()
        y = layer(x_in, {r: active})
        y.square().sum().backward()
        found.append([y.detach(), x_in.grad, layer.U.grad, layer.V.grad, layer.bias.grad])
    for a, b in zip(*found):
        assert relative(b, a) < 1e-12
    assert not found[1][2][phi[r].max():].any() and found[1][2][:phi[r].max()].any(1).all()


def test_sorted_without_bias_and_for_one_vector_a_sample():
    layer = lowrank.LowRankLinear(6, 8, 5, bias=False).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    mask = lowrank.masks({5: torch.tensor([5, 3, 2])}, {5: 5})[5]
    active = lowrank.Sorted(mask, torch.tensor([(0, 5, 3), (2, 2, 2)]))
    for x in (torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)):
        assert relative(layer(x, {5: active}), layer(x, {5: mask})) < 1e-14


def test_sorted_under_bfloat16_autocast():
    """Products in bfloat16, gradients in float32; no further from float32 than masking is (twice, at most)."""
    net = awake(Config(**SMALL), dtype=torch.float32)
    x, t, y = inputs(net.config, 13, dtype=torch.float32)
    t = t.sort().values
    grads = []
    for active, enabled in ((net.active_ranks(t), False), (net.active_ranks(t), True), (sorted_active(net, t), True)):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = net(x, t, y, active)
        out.float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    error = [(g - grads[0]).norm() / grads[0].norm() for g in grads[1:]]
    assert 1e-4 < error[1] < 2 * error[0]  # it did run in bfloat16


def test_sorted_passes_the_checks_of_custom_operators():
    """Shapes for the compiler, aliasing, autograd registration: PyTorch's own checker."""
    torch.manual_seed(0)
    x, V, U_1, U_2, b_1, b_2 = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in (
        (3, 4, 6), (5, 2, 6), (5, 8), (5, 7), (8,), (7,)))
    mask = lowrank.masks({5: torch.tensor([5, 3, 2])}, {5: 5})[5].double()
    for biases in ([b_1, b_2], []):
        torch.library.opcheck(lowrank._sorted_forward, (x, V, [U_1, U_2], biases, mask,
                                                        torch.tensor([(0, 5, 3), (2, 2, 2)])),
                              test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_tokens_lie_in_memory_one_after_the_other():
    """The convolution gives (D, N); what is added to a tensor in that order stays in it, through all blocks."""
    net, contiguous = awake(Config(**SMALL), dtype=torch.float32), []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda module, args: contiguous.append(args[0].is_contiguous()))
    net(*inputs(net.config, 3, dtype=torch.float32))
    assert contiguous == [True] * len(net.blocks)


@pytest.mark.parametrize("rank", [5, 30])  # 3 layers of 30 channels are laid out the other way, see channels_first
@pytest.mark.parametrize("bias", [True, False])
def test_sorted_layers_side_by_side_are_each_layer_alone(rank, bias):
    """Outputs and every gradient, also where one of the outputs is not used; and layers that are not sorted."""
    torch.manual_seed(0)
    layers = [lowrank.LowRankLinear(40, m, rank, bias=bias).double() for m in (32, 33, 34)]
    for p in (parameters := [p for layer in layers for p in layer.parameters()]):
        torch.nn.init.normal_(p)
    mask = lowrank.masks({rank: torch.tensor([rank, 3, 2])}, {rank: rank})[rank].double()
    x = torch.randn(3, 4, 40, dtype=torch.float64, requires_grad=True)
    is_sorted = {rank: lowrank.Sorted(mask, torch.tensor([(0, rank, 3), (2, 2, 2)]))}
    for active in (is_sorted, {rank: mask}, {rank: 3}, None):
        together, alone = lowrank.side_by_side(layers, x, active), [layer(x, active) for layer in layers]
        for used in (slice(3), slice(1, 3)):
            grads = [torch.autograd.grad(sum((y * y.sum()).sum() for y in ys[used]), [x, *parameters], retain_graph=True,
                                         allow_unused=True) for ys in (together, alone)]
            for a, b in zip(*([*ys, *g] for ys, g in zip((together, alone), grads))):
                assert (b is None or not b.any()) and (a is None or not a.any()) or relative(a, b) < 1e-13
    dense = [lowrank.Linear(40, 8) for _ in range(2)]
    for a, layer in zip(lowrank.side_by_side(dense, x.float(), is_sorted), dense):
        assert torch.equal(a, layer(x.float()))


def test_cut_finds_the_fewest_chunks():
    """Brute force over every way to cut small batches: no fewer chunks stay within the slack, and no other
    cut into as many is cheaper."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        cost = sorted(rng.integers(40, 137, rng.integers(1, 9)).tolist(), reverse=True)
        slack = rng.choice([0.0, 0.02, 0.1, 0.5])
        price = lambda firsts: sum(cost[a] * (b - a) for a, b in zip(firsts, [*firsts[1:], len(cost)]))
        every = [[0, *rest] for n in range(len(cost)) for rest in itertools.combinations(range(1, len(cost)), n)]
        fewest = min(len(f) for f in every if price(f) <= (1 + slack) * sum(cost))
        found = lowrank.cut(cost, slack)
        assert len(found) == fewest and price(found) == min(price(f) for f in every if len(f) == fewest)


@pytest.mark.parametrize("batch", [8, 32, 128, 1024])
def test_sorted_computes_at_most_four_percent_more_than_needed(batch):
    config = Config(**model.PRESETS["DiT-S/2"])
    cost, g = model.rank_cost(config), torch.Generator().manual_seed(0)
    assert cost[400] == sum(l.rows * (l.n + l.m) * config.rank_schedule().active(400, l.rank)
                            for l in model.linear_layers(config) if l.rank)
    for stratified in (False, True):
        t = curriculum.Curriculum([1], T, 1).sample(batch, g, stratified).tolist()
        chunks = model.chunk_batch(config, t)
        ends = [first for first, *_ in chunks[1:]] + [batch]
        assert all((t_first, t_last) == (t[first], t[end - 1]) for (first, t_first, t_last), end in zip(chunks, ends))
        done = sum((end - first) * cost[t_first] for (first, t_first, _), end in zip(chunks, ends))
        assert done <= 1.04 * sum(cost[i] for i in t) and len(chunks) <= 12


def test_multiply_adds_of_a_sorted_step():
    """sorted_step equals what PyTorch counts when the operators' own Python runs (it cannot see inside them)."""
    config = Config(**SMALL | dict(image_size=16))
    net = awake(config, dtype=torch.float32)
    x, t, y = inputs(config, 9, dtype=torch.float32)
    t = t.sort().values
    for t_low in (1, int(t[0])):
        real = (lowrank._sorted_forward, lowrank._sorted_backward)

        class Plain(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, V, mask, chunks, *Us_and_biases):
                Us, biases = Us_and_biases[::2], Us_and_biases[1::2]
                *ys, packed = real[0]._init_fn(x, V, list(Us), list(biases), mask, chunks)
                ctx.save_for_backward(x, packed, V, mask, chunks, *Us)
                return *ys, packed

            @staticmethod
            def backward(ctx, *grads):
                x, packed, V, mask, chunks, *Us = ctx.saved_tensors
                dx, dV, *dU_1s = real[1]._init_fn(grads[:-1], x, packed, V, Us, mask, chunks, True, True)
                return dx, dV, None, None, *(part for dU_1 in dU_1s for part in (dU_1[1:], dU_1[0]))

        def plain(x, V, Us, biases, mask, chunks):
            return Plain.apply(x, V, mask, chunks, *(part for pair in zip(Us, biases, strict=True) for part in pair))

        with pytest.MonkeyPatch.context() as patch, counter() as count, sdpa_kernel(SDPBackend.MATH):
            patch.setattr(lowrank, "_sorted_forward", plain)
            net.zero_grad()
            loss = net(x, t, y, active := sorted_active(net, t, t_low)).square().mean()
            (loss + lowrank.orthogonality_penalty(net, active)).backward()
        counted = count.get_total_flops() // 2
        assert flops.sorted_step(config, t.tolist(), t_low) == counted
        assert counted < flops.train_step(config, 9, flops.channels(config, t_low))
    parts = [flops.sorted_step(config, t[i::2].tolist(), penalty=0) for i in range(2)]
    assert flops.sorted_step(config, t.tolist(), penalty=0, processes=2) == sum(parts)


def test_a_sorted_training_run_is_counted_by_typical_batches():
    """Between the need of the average rank and 4 % more, and equal to the mean over random batches within 2 %."""
    config = Config(**model.PRESETS["DiT-S/2"])
    run = flops.training_run(config, 1, 64, penalty=False, execution="sorted")
    g = torch.Generator().manual_seed(0)
    random = [flops.sorted_step(config, curriculum.Curriculum([1], T, 1).sample(64, g).tolist(), penalty=0)
              for _ in range(50)]
    assert run == pytest.approx(np.mean(random), rel=0.02)
    assert flops.training_run(config, 1, 64, penalty=False) > 1.2 * run
    stages = [(2, 900), (3, 400)]
    c = curriculum.Curriculum([1, 400, 900], T, 10)
    total = 0
    for c.stage, n in enumerate((2, 3, 5)):
        p = c.probabilities()
        t = [int((p.cumsum(0) > (i + 0.5) / 8).nonzero()[0]) for i in range(8)]
        total += n * flops.sorted_step(config, t, c.t_low)
    assert flops.training_run(config, 10, 8, stages, execution="sorted") == total
    full = replace(config, method="full")
    assert flops.training_run(full, 3, 8, execution="sorted") == flops.training_run(full, 3, 8)


def test_stratified_draws_one_timestep_in_each_stratum_and_keeps_the_distribution():
    c = curriculum.Curriculum([1, 500, 900], T, 1000)
    for c.stage in range(3):
        p, g = c.probabilities(), torch.Generator().manual_seed(c.stage)
        draws = torch.stack([c.sample(50, g, stratified=True) for _ in range(4000)])
        assert (draws.diff(dim=1) >= 0).all()
        frequency = torch.bincount(draws.flatten(), minlength=T + 1).double() / draws.numel()
        groups = lambda q: torch.stack([part.sum() for part in q[1:].split(20)])
        n = draws.numel()
        expected = groups(p)
        assert ((groups(frequency) - expected).abs() <= 5 * (expected / n).sqrt() + 1e-12).all()
        low, high = (torch.searchsorted(p.cumsum(0), torch.arange(50).double() / 50 + shift, right=True)
                     for shift in (1e-12, 0.02 - 1e-12))
        assert (draws >= low).all() and (draws <= high).all()
    assert (c.sample(999, torch.Generator().manual_seed(0)).diff() >= 0).all()  # plain draws ascend, too


def test_stratified_batches_vary_less():
    config, c = Config(), curriculum.Curriculum([1], T, 1)
    cost = torch.tensor(model.rank_cost(config)).double()
    spread = {s: torch.stack([cost[c.sample(32, torch.Generator().manual_seed(i), s)].mean() for i in range(200)]).std()
              for s in (False, True)}
    assert spread[True] < 0.1 * spread[False]


def test_speed_draws_early_timesteps_twice_as_often():
    """SpeeD: t <= 700 with weight k = 2."""
    p = curriculum.speed(T)
    assert p[0] == 0 and p.sum().item() == pytest.approx(1)
    assert p[700].item() == pytest.approx(2 / 1700) and p[701].item() == pytest.approx(1 / 1700) == p[T].item()
    c = curriculum.Curriculum([1, 500], T, 10, base=p)
    q = c.probabilities()
    assert q[:500].sum() == 0 and q.sum().item() == pytest.approx(1) and (q[600] / q[800]).item() == pytest.approx(2)
    c.stage = 1
    assert torch.allclose(c.probabilities(), p)


def test_curriculum_sampling_may_be_uniform_and_may_have_a_range():
    """C.3.1: uniform over the groups that are in; --t-range: over a part of 1..T."""
    c = curriculum.Curriculum([1, 500, 900], T, 10, progressive=False)
    c.stage = 1
    assert torch.allclose(c.probabilities()[500:], torch.full((501,), 1 / 501, dtype=torch.float64))
    c = curriculum.Curriculum([34], T, 10, base=curriculum.uniform(T, 34, 358))
    t = c.sample(20_000, torch.Generator().manual_seed(0))
    assert c.t_low == t.min() == 34 and t.max() == 358 and not c.advance(9)


def test_loss_weights():
    """The formulas as published, at a few t, in Python floats; each divided by its mean under the draws of t."""
    s = schedule.NoiseSchedule()
    ab = s.alpha_bar.tolist()
    snr = [a / (1 - a) if a < 1 else math.inf for a in ab]
    growth = [ab[t - 1] - ab[t] for t in range(1, T + 1)]  # of the variance 1 - alpha_bar
    low, high = min(growth), max(growth)
    formulas = {
        "none": lambda t: 1.0,
        "erd": lambda t: math.sqrt(1 - ab[t]),
        "min-snr": lambda t: min(snr[t], 5) / snr[t],
        "p2": lambda t: 1 / (1 + snr[t]),
        "speed": lambda t: 1.0 if t > 700 else 0.4 + 0.2 * (growth[t - 1] - low) / (high - low),
    }
    assert set(formulas) == set(schedule.WEIGHTINGS)
    for p in (curriculum.uniform(T), curriculum.speed(T), curriculum.uniform(T, 300, 600)):
        for name, formula in formulas.items():
            w = schedule.loss_weight(name, s, p)
            assert w.dtype == torch.float64 and (w * p)[1:].sum().item() == pytest.approx(1)
            mean = sum(formula(t) * p[t].item() for t in range(1, T + 1))
            for t in (1, 2, 100, 364, 500, 700, 701, 999, T):
                assert w[t].item() == pytest.approx(formula(t) / mean, rel=1e-9), (name, t)


def test_training_weighs_the_loss_it_minimises_and_logs_the_plain_one(tmp_path, monkeypatch):
    """The weight of each sample's own t enters the gradient; metrics.jsonl stays comparable."""
    assert quick_training("--steps", 1, "--out", tmp_path / "plain", "--method", "full")[0] == 0
    monkeypatch.setitem(schedule.WEIGHTINGS, "p2", lambda s: (torch.arange(T + 1) > 500).double())  # seen by both
    assert quick_training("--steps", 1, "--out", tmp_path / "p2", "--method", "full", "--weighting", "p2")[0] == 0
    assert lines(tmp_path / "p2")[0]["loss"] == lines(tmp_path / "plain")[0]["loss"]
    plain, weighted = (torch.load(tmp_path / n / "state.pt", weights_only=True) for n in ("plain", "p2"))
    moments = [s["optimizer"]["state"] for s in (plain, weighted)]
    assert any(relative(moments[1][i]["exp_avg"], moments[0][i]["exp_avg"]) > 0.05 for i in moments[0])


def test_rank_multiple_rounds_up_and_never_above_r_max():
    plain, rounded = schedule.RankSchedule(), schedule.RankSchedule(multiple=8)
    for r in (5, 96, 137):
        for t in (0, 1, 100, 101, 400, 777, T):
            k = plain.active(t, r)
            assert rounded.active(t, r) == min(r, -(-k // 8) * 8)
    with pytest.raises(ValueError, match="multiple"):
        schedule.RankSchedule(multiple=0)
    refuses(flops, "--rank-multiple", 0, says="multiple")
    wide, narrow = (flops.sampling(Config(**model.PRESETS["DiT-S/2"], method="iso-param", rank_multiple=n)) for n in (16, 1))
    assert wide > narrow


# ----------------------------------------------------------------------------------------------------
# sampling: merged weights, conditioning once


def test_merged_weights_equal_the_slices_they_replace():
    """Above m n / (m + n) channels a layer multiplies by W_k; W_k grows by the new channels alone."""
    net = awake(Config(**SMALL | dict(keep=0.9)))
    x, _, y = inputs(net.config, 3)
    merged, products, last = lowrank.Merged(net), 0, {}
    for t in (1000, 600, 500, 400, 100, 50, 900):  # the last one goes back
        active = net.active_ranks(t)
        both = merged(active)
        dense = {layer for layer in lowrank.low_rank_layers(net)
                 if active[layer.rank] * (layer.U.shape[1] + layer.V.shape[1]) > layer.U.shape[1] * layer.V.shape[1]}
        assert set(both.get("merged", {})) == dense and {k: v for k, v in both.items() if k != "merged"} == active
        for layer in dense:
            assert relative(both["merged"][layer], layer.weight(active[layer.rank])) < 1e-13
        assert relative(net(x, torch.full((3,), t), y, both), net(x, torch.full((3,), t), y, active)) < 1e-12
    assert dense or t == 900
    with counter() as count:
        merged = lowrank.Merged(net)
        for t in schedule.sampling_timesteps(50)[:-1]:
            merged(net.active_ranks(t))
    assert count.get_total_flops() // 2 == flops.merging(net.config) > 0
    assert flops.merging(Config(**SMALL)) == 0


def test_sampling_counts_merged_layers_as_dense():
    config = Config(**SMALL | dict(keep=0.9))
    net = awake(config, dtype=torch.float32)
    x = torch.randn(1, 3, 8, 8)
    eps, total = sample.guided(net, torch.tensor([1]), 1.0), 0
    for t in schedule.sampling_timesteps(20)[:-1]:
        with counter() as count, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            eps(x, t)
        total += count.get_total_flops() // 2
    assert total == flops.sampling(config, 20) + flops.merging(config)


def test_conditioning_is_computed_once_for_each_label():
    net = awake(Config(**SMALL))
    x, _, _ = inputs(net.config, 6)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    rows = []
    net.blocks[0].adaln.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    for labels, w in ((y, 2.0), (y, 1.0), (y, 0.0), (None, 2.0)):
        sample.guided(net, labels, w)(x, 500)
    assert rows == [3, 2, 1, 1]


# ----------------------------------------------------------------------------------------------------
# several processes


def torchrun(n, script, *arguments, cwd=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                           "--", str(HERE / script), *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
                          env=environment, timeout=300)


def test_two_processes_take_the_steps_of_one(tmp_path):
    """--batch-size is the global batch: timesteps, noise, flips and dropped labels are those of one process, the
    curriculum watches the loss of all, process 0 writes, and a resumed run may have another number."""
    run = ["--dataset", "shapes", "--image-size", 8, "--model", "tiny", "--batch-size", 8, "--log-every", 3, "--sample-every",
           0, "--seed", 3, "--device", "cpu", "--rank-execution", "sorted", "--orthogonality", 0.01]
    one = torchrun(1, "train.py", "--steps", 12, "--save-every", 12, *run, "--out", tmp_path / "one")  # as many threads
    assert one.returncode == 0, one.stderr
    done = torchrun(2, "train.py", "--steps", 12, "--save-every", 8, *run, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done,") == 1 and "2 processes" in done.stdout
    (tmp_path / "two" / "model.pt").unlink()
    a, b = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("one", "two"))
    for name, value in a["model"].items():  # AdamW makes much of a rounding where gradients are near zero
        assert torch.allclose(b["model"][name], value, rtol=1e-3, atol=2e-4), name
    gradients = [torch.cat([m["exp_avg"].flatten() for m in run["optimizer"]["state"].values()]) for run in (a, b)]
    assert (gradients[1] - gradients[0]).norm() < 1e-4 * gradients[0].norm()
    for x, y in zip(lines(tmp_path / "one"), lines(tmp_path / "two")):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5) and y["t_low"] == x["t_low"]
        for a, b in zip(x["loss_by_group"], y["loss_by_group"]):
            assert a is b is None or b == pytest.approx(a, rel=1e-4)
    code, _, err = cli(train, "--resume", "--steps", 14, "--out", tmp_path / "two")  # two began it, one goes on
    assert code == 0 and torch.load(tmp_path / "two" / "state.pt", weights_only=True)["step"] == 14, err


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path):
    done = torchrun(2, "train.py", "--batch-size", 7, "--steps", 1, "--out", tmp_path / "r", "--device", "cpu")
    assert done.returncode != 0 and "--batch-size 7" in done.stderr and not (tmp_path / "r").exists()


def test_two_processes_draw_and_measure_the_same_images(run, tmp_path):
    """sample.py and fid.py share batches out; images and figures are those of one process."""
    for n, name in ((1, "one"), (2, "two")):
        done = torchrun(n, "sample.py", "--run", run, "--num", 14, "--steps", 3, "--batch-size", 4, "--device", "cpu",
                        "--out", tmp_path / f"{name}.npz")
        assert done.returncode == 0 and done.stdout.count("14 images") == 1, done.stderr
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["labels"], two["labels"])

    module = torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Unflatten(1, (3, 64)), Mean()))
    module.save(tmp_path / "features.pt")
    results = []
    for n in (1, 2):
        done = torchrun(n, "fid.py", tmp_path / "one.npz", "shapes", "--image-size", 8, "--num", 100, "--batch-size", 4,
                        "--features", tmp_path / "features.pt", "--data-dir", tmp_path / f"data{n}", "--device", "cpu", "--json")
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    for key, value in results[0].items():
        assert results[1][key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), key


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.float().mean(2)


def test_the_ema_leaves_no_graph_behind(tmp_path, monkeypatch):
    """Averaging outside no_grad would chain every step's operation to the last."""
    seen = []
    monkeypatch.setattr(train, "save_grid", lambda *_: None)
    monkeypatch.setattr(train, "draw_images", lambda ema, *_, **__: (seen.extend(ema.parameters()), None))
    assert quick_training("--steps", 2, "--out", tmp_path / "r")[0] == 0
    assert seen and not any(p.requires_grad or p.grad_fn for p in seen)


def test_held_out_loss(tmp_path):
    """A model that answers zero has loss |eps|^2, about 1, in every group; the mean weighs groups by their length;
    the same figures whatever the batch."""
    images = data.load("shapes", split="test", image_size=8, num=300)
    net = DiT(Config(**model.PRESETS["tiny"], image_size=8))
    loss, groups = train.held_out_loss(net, images, per_group=100)
    assert groups == pytest.approx([1] * 5, abs=0.02)
    net = awake(Config(**model.PRESETS["tiny"], image_size=8), dtype=torch.float32)
    loss, groups = train.held_out_loss(net, images, per_group=60)
    sizes = np.diff([1, 34, 359, 901, 991, 1001])
    assert loss == pytest.approx(np.dot(sizes, groups) / 1000) and (loss, groups) == train.held_out_loss(net, images, 60)
    t, index = torch.tensor([5, 500, 990]), torch.tensor([7, 3, 250])
    together = train.denoising_losses(net, images, index, t, seed=4)
    assert torch.allclose(train.denoising_losses(net, images, index, t, 4, batch_size=1), together, rtol=1e-5)
    eps = sample.ImageNoise(4, range(3), (3, 8, 8), torch.device("cpu"))()
    ab = schedule.NoiseSchedule().alpha_bar[500]
    x_t = ab.sqrt() * data.to_unit(images.images[3]) + (1 - ab).sqrt() * eps[1]
    expected = (net(x_t[None].float(), t[1:2], images.labels[3:4]) - eps[1]).square().mean()
    assert together[1].item() == pytest.approx(expected.item(), rel=1e-4)


def test_bench_smoke(tmp_path):
    import bench
    code, out, err = cli(bench, "--model", "tiny", "--image-size", 8, "--repetitions", 1, "--passes", 1, "--sampling-steps", 3,
                         "--batch-size", 4, "--sampling-batch", 2, "--device", "cpu", "--out", tmp_path / "b.json")
    assert code == 0, err
    found = json.loads((tmp_path / "b.json").read_text())
    rows = {row["variant"]: row for row in found["training"]["4"]["rows"]}
    assert list(rows) == ["full", "static", "r_max", "masked", "sorted"] and rows["full"]["time / full"] == 1
    assert rows["r_max"]["multiply-adds / full"] == rows["masked"]["multiply-adds / full"] \
        > rows["sorted"]["multiply-adds / full"]
    assert found["training"]["4"]["sorted low-rank multiply-adds / need, largest"] <= 1.04
    assert 0 < rows["full"]["of peak"] and found["sampling"]["2"]["iso-param / static"] > 0
    refuses(bench, "--keep", 2, says="keep")
    refuses(bench, "--sampling-steps", 1001, says="1 to 1000")


# ----------------------------------------------------------------------------------------------------
# experiments/plot.py


def pixel_of(chart, xs, ys, x, y, log_x=False, log_y=False):
    """The colour of the pixel where a chart of xs, ys must show the point (x, y)."""
    column = plot.position(x, plot.nice_ticks(xs, log_x), plot.LEFT, plot.RIGHT, log_x)
    row = plot.position(y, plot.nice_ticks(ys, log_y, 5), plot.BOTTOM, plot.TOP, log_y)
    return chart.getpixel((round(float(column)), round(float(row))))


@pytest.mark.parametrize("values", [[0, 1], [1, 1000], [-0.031, 0.27], [3, 3], [0, 0], [1e-9, 7e-9], [123456, 123999],
                                    [0.3, 0.9], [-5, None, 2], [math.nan], [], [2e12, 9e15]])
def test_linear_ticks_are_nice_and_cover_the_data(values):
    """A step of 1, 2 or 5 times a power of ten, all ticks multiples of it, none to spare at either end."""
    ticks = np.array(plot.nice_ticks(values))
    steps = np.diff(ticks)
    mantissa = float(f"{steps[0]:.9e}".split("e")[0])
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6 and np.allclose(steps, steps[0], rtol=1e-6)
    assert np.allclose(ticks / steps[0], (ticks / steps[0]).round(), atol=1e-6) and 2 <= len(ticks) <= 9
    known = [v for v in values if v is not None and math.isfinite(v)]
    if known and max(known) > min(known):
        assert ticks[0] <= min(known) < ticks[1] and ticks[-2] < max(known) <= ticks[-1]
    elif known:
        assert ticks[0] < known[0] < ticks[-1]
    labels = plot.tick_labels(list(ticks))
    assert len(set(labels)) == len(ticks) and max(map(len, labels)) <= 8


def test_log_ticks():
    """Decades for wide ranges, at most about nine; 1-2-5 for narrower ones; values that are not positive do not count."""
    assert plot.nice_ticks([0.02, 80], log=True) == [0.01, 0.1, 1, 10, 100]
    assert plot.nice_ticks([1, 1000], log=True) == [1, 10, 100, 1000]
    assert plot.nice_ticks([0.3, 6, 0, -1, None], log=True) == [0.2, 0.5, 1, 2, 5, 10]
    assert plot.nice_ticks([1, 10], log=True) == [1, 2, 5, 10] and plot.nice_ticks([0, None], log=True) == [1, 2, 5, 10]
    wide = plot.nice_ticks([1e-12, 1e12], log=True)
    assert len(wide) <= 9 and wide[0] <= 1e-12 and wide[-1] >= 1e12
    narrow = plot.nice_ticks([7, 7.5], log=True)
    assert len(narrow) >= 4 and 0 < narrow[0] <= 7 and narrow[-1] >= 7.5
    assert plot.position([1, 10, 100, 0, -3, None], [1, 10, 100], 0, 10, log=True)[:3].tolist() == [0, 5, 10]
    assert np.isnan(plot.position([0, -3, None], [1, 10, 100], 0, 10, log=True)).all()


def test_tick_labels():
    assert plot.tick_labels([0, 0.5, 1]) == ["0", "0.5", "1.0"]
    assert plot.tick_labels([0, 500, 1000]) == ["0", "500", "1,000"]
    assert plot.tick_labels([0, 500000, 1000000]) == ["0", "0.5M", "1.0M"]
    assert plot.tick_labels([-2e-6, 0, 2e-6]) == ["-2e-6", "0", "2e-6"]
    assert plot.tick_labels([0.01, 1, 100, 10000], log=True) == ["0.01", "1", "100", "10k"]


@pytest.mark.parametrize("log", [False, True])
def test_points_and_lines_are_where_they_belong(log):
    """Markers at the points and, half way in pixels between two of them, the line, in the curve's own colour."""
    xs, ys = [1, 10, 100], np.array([2.0, 40.0, 900.0])
    others = torch.tensor([500.0, 5.0, 3.0])
    chart = plot.line_chart({"a": (xs, ys), "b": (xs, others)}, "t", "x", "y", log_x=log, log_y=log)
    every = np.concatenate([ys, others])
    for colour, values in zip(plot.COLOURS, (ys, others.numpy())):
        for x, y in zip(xs, values):
            assert pixel_of(chart, xs, every, x, y, log, log) == colour
        between = (1000**0.5, (values[1] * values[2]) ** 0.5) if log else (55, values[1:].mean())
        assert pixel_of(chart, xs, every, *between, log, log) == colour
    bare = plot.line_chart({"a": (xs, ys), "b": (xs, others)}, "t", "x", "y", log_x=log, log_y=log, lines=False)
    assert pixel_of(bare, xs, every, xs[2], ys[2], log, log) == plot.COLOURS[0]
    assert pixel_of(bare, xs, every, *between, log, log) == (255, 255, 255)  # without lines, the points alone


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_missing_values_leave_gaps(missing):
    """No line to either side of the missing point, a line elsewhere, and a marker on a point left alone."""
    xs, ys = [0, 13, 27, 33, 47, 60], [7, 7, missing, 7, 7, 9]
    chart = plot.line_chart({"a": (xs, ys)}, "t", "x", "y")
    shows = {x: pixel_of(chart, xs, ys, x, 7) == plot.COLOURS[0] for x in (6, 17, 23, 27, 31, 37)}
    assert shows == {6: True, 17: False, 23: False, 27: False, 31: False, 37: True}
    alone = plot.line_chart({"a": (list(range(99)), [5, missing, 7] + [missing, 6] * 48)}, "t", "x", "y")
    assert pixel_of(alone, range(99), [5, 7], 2, 7) == plot.COLOURS[0]
    plot.line_chart({"a": ([1, 2], [missing, None]), "b": ([], [])}, "t", "x", "y", log_x=True, log_y=True)


def test_spread_is_a_band_or_bars():
    """A light band between ys - spread and ys + spread, white outside; with bars nothing between the points."""
    xs, ys = np.arange(20.0), np.full(20, 5.0)
    ends = [3.0, 7.0]  # what the axis covers
    band, bars = (plot.line_chart({"a": (xs, ys, np.full(20, 2.0))}, "t", "x", "y", shade=shade) for shade in (True, False))
    inside = np.array(pixel_of(band, xs, ends, 9.5, 6.3))
    share = (255 - inside) / (255 - np.array(plot.COLOURS[0]))
    assert np.allclose(share, 50 / 255, atol=0.02)  # white mixed with the curve's colour
    assert pixel_of(bars, xs, ends, 9.5, 6.3) == (255, 255, 255) != pixel_of(bars, xs, ends, 9, 6.3)
    low = plot.line_chart({"a": ([1, 2], [5, 5], [9, 9]), "b": ([1, 2], [1, 100])}, "t", "x", "y", log_y=True, shade=True)
    assert pixel_of(low, [1, 2], [1, 100], 1.5, 2) != (255, 255, 255)  # ys - spread < 0: the band goes down to the axis


def test_curves_differ_and_the_legend_names_them_below():
    """Ten colours; a constant and a single point are drawn; more names make the picture longer, not the box smaller."""
    assert len(set(plot.COLOURS)) == 10
    few = plot.line_chart({"constant": ([1, 2], [4, 4]), "point": ([1.5], [4.5])}, "t", "x", "y")
    assert pixel_of(few, [1, 2], [4, 4.5], 1.3, 4) == plot.COLOURS[0]
    assert pixel_of(few, [1, 2], [4, 4.5], 1.5, 4.5) == plot.COLOURS[1]
    many = plot.line_chart({f"a rather long name {i}": ([1, 2], [i, i + 1]) for i in range(10)}, "t", "x", "y")
    assert many.width == few.width and many.height > few.height
    below = {colour for _, colour in many.crop((0, plot.BOTTOM + 60, many.width, many.height)).getcolors(100000)}
    assert set(plot.COLOURS) <= below


def test_nothing_is_cut_off():
    """Whatever the texts and values, the outermost pixels stay white."""
    long = "a very long text that goes on and on, far beyond what anybody should give to a chart like this"
    charts = [plot.line_chart({long: ([799990.0, 800000.0], [-123456.78, 99999.5]), "b": ([799995], [1.0])}, long, long, long),
              plot.heat_map([[123456.789, 1], [2, 3]], [long, "b"], ["c", long], long, long, long, long, spec=".6f")]
    for chart in charts:
        pixels = np.array(chart)
        assert (pixels[:, [0, -1]] == 255).all() and (pixels[[0, -1]] == 255).all()


def test_heat_map_colours_follow_the_values():
    """Larger is darker, equal is equal, missing is grey; the bar beside runs from the darkest to the lightest."""
    values = np.array([[3.0, None, 1.0], [2.0, 9.0, 3.0]], dtype=object)
    chart = plot.heat_map(values, ["r", "s"], ["a", "b", "c"], "t", "loss", "columns", "rows")
    grey = np.array(chart.convert("L")).astype(float)
    row = np.array(chart)[plot.TOP + 10]
    cells = np.flatnonzero((row != 255).any(1))[10]  # inside the first cell
    width = (plot.RIGHT - 90 - cells) / 3
    colour = [[chart.getpixel((int(cells + c * width), y)) for c in range(3)] for y in (plot.TOP + 10, plot.BOTTOM - 10)]
    assert colour[0][0] == colour[1][2] and colour[0][1] == plot.MISSING
    light = [sum(c) for c in (colour[0][2], colour[1][0], colour[0][0], colour[1][1])]  # of 1, 2, 3, 9
    assert light == sorted(light, reverse=True) and len(set(light)) == 4
    assert colour[0][2] == plot.heat_colour(0) and colour[1][1] == plot.heat_colour(1)
    assert (np.diff(grey[plot.TOP:plot.BOTTOM, plot.RIGHT - 64]) >= 0).all()
    plot.heat_map(torch.ones(1, 2), ["r"], [1, 2], "t", "constant")
    plot.heat_map([[None]], ["r"], ["c"], "t", "nothing known")


def test_chart_mistakes_are_value_errors(tmp_path):
    for curves in ({}, {"a": ([1, 2], [1])}, {"a": ([1], [1], [1, 2])}, {"a": ([1],)}, {"a": ([[1]], [[1]])}, {"a": (1, 2)}):
        with pytest.raises(ValueError):
            plot.line_chart(curves, "t", "x", "y")
    for values in ([[1, 2]], [1, 2], [[1], [2]]):
        with pytest.raises(ValueError):
            plot.heat_map(values, ["r"], ["c"], "t", "v")
    with pytest.raises(ValueError):
        plot.save(tmp_path / "x.png")
    with pytest.raises(ValueError):
        plot.save(tmp_path / "x.png", Image.new("RGB", (2, 2)), columns=0)
    assert not list(tmp_path.iterdir())


def test_save_puts_charts_side_by_side(tmp_path):
    """Row by row, each unchanged, the next row below the tallest of the last."""
    colours = ["red", "lime", "blue"]
    images = [Image.new("RGB", (20, height), colour) for height, colour in zip((10, 30, 10), colours)]
    plot.save(tmp_path / "new" / "x.png", *images, columns=2)
    page = Image.open(tmp_path / "new" / "x.png").convert("RGB")
    assert page.size == (40, 40)
    assert [page.getpixel(p) for p in ((5, 5), (25, 25), (5, 35), (5, 20))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3]
    plot.save(tmp_path / "one.png", images[0], columns=3)
    assert Image.open(tmp_path / "one.png").size == (20, 10)


def test_table_is_aligned_markdown(capsys):
    rows = [{"method": "full | rank", "FID": 12.345, "MACs": 5462}, {"method": "half", "FID": None},
            {"method": None, "FID": math.nan, "MACs": np.int64(7)}]
    plot.print_table(rows, {"method": "", "FID": ".1f", "MACs": ",d"})
    assert capsys.readouterr().out.splitlines() == ["| method       |  FID |  MACs |",
                                                    "| ------------ | ---: | ----: |",
                                                    "| full \\| rank | 12.3 | 5,462 |",
                                                    "| half         |    - |     - |",
                                                    "| -            |    - |     7 |"]


def test_json_has_no_nan_and_is_complete_or_absent(tmp_path, monkeypatch):
    """NaN and infinities become null at any depth; a failure or a kill leaves the old file as it was."""
    path = tmp_path / "new" / "x.json"
    plot.write_json(path, {"a": [1, math.nan, (2.5, -math.inf)], "b": np.array([[1.0, np.nan]]), "c": torch.tensor([3]),
                           "d": np.float32("nan"), "e": None, "f": "NaN", "g": torch.tensor(math.inf), "h": True})
    assert json.loads(path.read_text()) == {"a": [1, None, [2.5, None]], "b": [[1.0, None]], "c": [3], "d": None, "e": None,
                                            "f": "NaN", "g": None, "h": True}
    old = path.read_bytes()
    with pytest.raises(TypeError):
        plot.write_json(path, {"a": object()})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plot.write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        plot.save(tmp_path / "new" / "x.png", Image.new("RGB", (2, 2)))
    assert [p.name for p in path.parent.iterdir()] == ["x.json"] and path.read_bytes() == old


# ----------------------------------------------------------------------------------------------------
# experiments/rank_analysis.py


def rotation(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def test_effective_rank():
    """exp(-sum p log p), p = s / sum s: counts equal singular values; known for s = 1, 1/2, 1/4."""
    Q, P = rotation(9), rotation(7, 1)
    for k in (1, 4, 7):
        assert rank_analysis.effective_rank(3 * Q[:, :k] @ P[:k]) == pytest.approx(k, rel=1e-9)
    matrix = Q[:, :3] @ torch.diag(torch.tensor([1, 0.5, 0.25], dtype=torch.float64)) @ P[:3]
    p = [4 / 7, 2 / 7, 1 / 7]
    assert rank_analysis.effective_rank(matrix) == pytest.approx(math.prod(q**-q for q in p), rel=1e-12)
    assert math.isnan(rank_analysis.effective_rank(torch.zeros(3, 3)))
    mean_rank, mean_norm, ranks, norms = rank_analysis.measure([matrix, 2 * matrix.float()])
    assert mean_rank == pytest.approx(ranks[0]) and norms == pytest.approx([21**0.5 / 4, 21**0.5 / 2], rel=1e-6)
    assert mean_norm == pytest.approx(0.375 * 21**0.5, rel=1e-6)


def test_subspace_holds_95_percent_of_the_squares():
    """B.6: s^2 = 90, 6, 4 needs two of three directions; of 96, 2, 2 one; it is the output side."""
    Q, P = rotation(6), rotation(5, 1)
    for squares, k in (((90, 6, 4), 2), ((96, 2, 2), 1), ((40, 30, 30), 3)):
        gradient = Q[:, :3] @ torch.diag(torch.tensor(squares, dtype=torch.float64).sqrt()) @ P[:3]  # (6, 5)
        U = rank_analysis.subspace(gradient)
        assert U.shape == (6, k) and U.dtype == torch.float64
        assert torch.allclose(U @ U.T, Q[:, :k] @ Q[:, :k].T, atol=1e-10)
    assert rank_analysis.subspace(gradient, energy=1.0).shape[0] == 6


def test_overlap_is_the_mean_cosine_of_the_principal_angles():
    """Against scipy's angles; planes at known angles; a line inside a plane overlaps by 1, whatever the bases."""
    import scipy.linalg
    a, b = rotation(8, 2)[:, :3], rotation(8, 3)[:, :5]
    expected = np.cos(scipy.linalg.subspace_angles(a.numpy(), b.numpy()))
    assert len(expected) == 3 and rank_analysis.overlap(a, b) == pytest.approx(expected.mean(), rel=1e-9)
    assert rank_analysis.overlap(b, a) == pytest.approx(expected.mean(), rel=1e-9)
    Q, c, s = rotation(4), math.cos(0.3), math.sin(0.3)
    tilted = torch.stack([c * Q[:, 0] + s * Q[:, 2], Q[:, 3]], 1)
    assert rank_analysis.overlap(Q[:, :2], tilted) == pytest.approx(c / 2, abs=1e-12)
    assert rank_analysis.overlap(tilted[:, :1], Q[:, [0, 2]] @ rotation(2)) == pytest.approx(1)


def test_group_gradients_are_those_of_the_mean_loss():
    """Against one backward pass in float64 over all samples at once; the batches only split the sum. Same images and
    noise in every group, timesteps evenly over it."""
    config = Config(**SMALL, method="full")
    net, net_64 = awake(config, dtype=torch.float32), awake(config)
    net_64.load_state_dict(net.state_dict())
    g, n, (first, last) = torch.Generator().manual_seed(1), 12, (34, 358)
    dataset = data.Dataset("some", torch.randint(256, (7, 3, 8, 8), generator=g, dtype=torch.uint8),
                           torch.randint(4, (7,), generator=g), list("abcd"))
    split, whole = (rank_analysis.group_gradients(net, dataset, (first, last), n, batches, 5) for batches in (3, 1))
    t = torch.tensor([math.floor(first + (i + 0.5) * (last - first + 1) / n) for i in range(n)])
    image = [torch.randperm(7, generator=torch.Generator().manual_seed(5))[i % 7] for i in range(n)]
    eps = sample.ImageNoise(5, range(n), (3, 8, 8), torch.device("cpu"))().double()
    x_0 = torch.stack([dataset.images[i].double() / 127.5 - 1 for i in image])
    ab = schedule.NoiseSchedule().alpha_bar[t].view(-1, 1, 1, 1)
    y = torch.stack([dataset.labels[i] for i in image])
    ((net_64(ab.sqrt() * x_0 + (1 - ab).sqrt() * eps, t, y) - eps) ** 2).mean().backward()
    names = list(rank_analysis.weight_matrices(net))
    assert names == [f"blocks.{b}.{layer}.weight" for b in range(2)
                     for layer in ("adaln", "q", "k", "v", "out", "mlp_in", "mlp_out")]
    assert t[0] == first + 13 and t[-1] == last - 13
    for name, a, b in zip(names, split, whole):
        assert a.dtype == torch.float64
        expected = net_64.get_parameter(name).grad
        assert relative(a, expected) < 1e-4 and relative(b, expected) < 1e-4, name


def test_similarity_of_gradients():
    """Two matrices, five groups: equal column spaces overlap by 1, orthogonal ones by 0, and the mean is over matrices;
    random lines in 200 dimensions hardly overlap, random subspaces of 190 of them share at least 180."""
    Q = rotation(200)
    line = lambda i: Q[:, i:i + 1] @ torch.ones(1, 3, dtype=torch.float64)
    gradients = [[line(0), line(i // 2)] for i in range(5)]  # second matrix: groups 0, 1 and 2, 3 pair up
    result = rank_analysis.gradient_similarity(gradients, 0)
    expected = [[1 if i // 2 == j // 2 else 0.5 for j in range(5)] for i in range(5)]
    assert np.allclose(result["similarity"], expected, atol=1e-12) and np.allclose(np.diag(result["chance"]), 1)
    assert result["dimensions"] == [1] * 5 and 0 < np.mean(np.array(result["chance"])[0, 1:]) < 0.2
    assert rank_analysis.gradient_similarity([[Q], [Q @ Q]], 0)["chance"][0][1] > 180 / 190
    # pairs by hand
    means = rank_analysis.pair_means([[10 * i + j for j in range(5)] for i in range(5)])
    assert means == {"neighbours": pytest.approx((1 + 12 + 23 + 34) / 4), "low t": pytest.approx((1 + 2 + 12) / 3),
                     "high t": pytest.approx((23 + 24 + 34) / 3), "distant": pytest.approx((2 + 3 + 4 + 13 + 14 + 24) / 6),
                     "all": pytest.approx((70 + 60) / 10)}


def test_loss_difference_in_bins_and_groups():
    """Bins and groups are means over their timesteps; the standard error is that of the paired differences."""
    nets = [awake(Config(**SMALL, method=m, keep=0.1), dtype=torch.float32) for m in ("full", "static")]
    images, labels = data.draw_shapes(30, 8, 0)
    dataset = data.Dataset("shapes", images, labels % 4, list("abcd"))
    result = rank_analysis.loss_difference(*nets, dataset, 2, 3)
    t = torch.cat([torch.arange(1, T + 1)] * 2)
    index = torch.randint(30, (2 * T,), generator=torch.Generator().manual_seed(3))
    full, low = (train.denoising_losses(net, dataset, index, t, 3) for net in nets)
    assert [row["t"] for row in result["bins"]] == [[i + 1, i + 20] for i in range(0, T, 20)]
    assert [row["t"] for row in result["groups"]] == [[1, 33], [34, 358], [359, 900], [901, 990], [991, 1000]]
    for row in result["bins"] + result["groups"]:
        here = (t >= row["t"][0]) & (t <= row["t"][1])
        assert row["full"] == pytest.approx(full[here].mean().item()) and row["low_rank"] == pytest.approx(low[here].mean().item())
        pairs = (low - full)[here].numpy()
        assert row["difference"] == pytest.approx(pairs.mean())
        assert row["standard_error"] == pytest.approx(pairs.std(ddof=1) / len(pairs) ** 0.5)
    assert result["parameters"] == [sum(p.numel() for p in net.parameters()) for net in nets]


def ranks_as_the_paper(direction=1):
    """Results in which every claim holds (direction 1), or the opposite of every one (-1)."""
    def falling(scale=1.0):
        return [10 * math.exp(-direction * scale * g / 5) for g in range(5)]
    def pairs(k):  # similar where near, more so at high t; less at later checkpoints
        return [[0.5 + direction * (0.02 * (i + j) - 0.1 * abs(i - j) - 0.01 * k) for j in range(5)] for i in range(5)]
    rows = [{"step": 10 * k, "effective_rank": falling(k), "norm": falling(2 * k)} for k in range(1, 7)]
    added = falling(8)
    groups = [{"t": list(t), "full": 1.0, "low_rank": 1 + a, "difference": a} for t, a in zip(rank_analysis.GROUPS, added)]
    return {"gradients": rows, "weights": rows, "loss": {"groups": groups},
            "similarity": [{"step": 10 * k, "similarity": pairs(k), "chance": pairs(0)} for k in range(1, 7)]}


def test_claims_follow_the_figures():
    """All appear in data made so, none in the opposite; less than 0.9 is no trend, nor are four checkpoints."""
    found = rank_analysis.claims(ranks_as_the_paper())
    assert len(found) == 11 and {c["section"] for c in found} == {"B.2", "B.3", "B.4", "B.6"}
    assert {c["verdict"] for c in found} == {"appears"}
    added = [n * math.exp(-1.6 * g) for g, n in enumerate((33, 325, 542, 90, 10))]  # of all timesteps of each group
    share = next(c["figures"] for c in found if "concentrated" in c["claim"])
    assert f"36% of the timesteps, have {sum(added[:2]) / sum(added):.0%} of it" in share
    opposite = rank_analysis.claims(ranks_as_the_paper(-1))
    assert {c["verdict"] for c in opposite} <= {"the opposite appears", "does not appear"}
    assert [c["verdict"] for c in opposite].count("the opposite appears") == 10  # all but the share of the added loss
    results = ranks_as_the_paper()
    last = results["gradients"][-1]["effective_rank"]
    last[:3] = last[2::-1]
    verdict = {c["claim"]: c for c in rank_analysis.claims(results)}["effective rank of gradients falls with t"]
    assert verdict["verdict"] == "does not appear" and "-0.60" in verdict["figures"]
    results = {key: value[:4] if isinstance(value, list) else value for key, value in ranks_as_the_paper().items()}
    assert [c["verdict"] for c in rank_analysis.claims(results)].count("too few checkpoints") == 3
    assert rank_analysis.rank_correlation([3, 1, 4, 1, 5]) == pytest.approx(
        np.corrcoef([1, 2, 3, 4, 5], [3, 1.5, 4, 1.5, 5])[0, 1])  # ties share their mean rank
    assert math.isnan(rank_analysis.rank_correlation([2, 2, 2]))
    assert rank_analysis.trend(rank_analysis.rank_correlation([1, 2, 3, 5, 4])) == "appears"  # exactly 0.9


def image_files(folder):
    """Flags that name 40 labelled 8 x 8 images to train on and as many to hold out."""
    for name, seed in (("train", 1), ("test", 2)):
        images, labels = data.draw_shapes(40, 8, seed)
        labels[:10] = torch.arange(10)  # both have all ten
        np.savez(folder / f"{name}.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return ["--dataset", folder / "train.npz", "--test", folder / "test.npz", "--data-dir", folder]


@pytest.fixture(scope="module")
def rank_runs(tmp_path_factory):
    """A finished rank analysis of a very small model, and the flags it was made with."""
    folder = tmp_path_factory.mktemp("ranks")
    flags = [*image_files(folder), "--steps", 40, "--group-steps", 20, "--checkpoints", 2, "--batch-size", 4,
             "--gradient-batch", 4, "--per-timestep", 1, "--device", "cpu", "--out", folder / "out"]
    small = dict(depth=1, width=32, heads=2, patch=4, conditioning="shared", dense_mlp_blocks=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", small)
        code, out, err = cli(rank_analysis, *flags)
    assert code == 0, err
    return folder, flags, out


def test_rank_analysis_end_to_end(rank_runs):
    folder, flags, out = rank_runs
    results = strict((folder / "out" / "results.json").read_text())
    assert results["groups"] == [[1, 33], [34, 358], [359, 900], [901, 990], [991, 1000]] and len(results["matrices"]) == 7
    assert [r["step"] for r in results["gradients"]] == [20, 40] and [r["step"] for r in results["weights"]] == [10, 20]
    for row in results["gradients"] + results["weights"]:
        assert len(row["norm_by_matrix"]) == 5 and min(map(min, row["norm_by_matrix"])) > 0
        assert np.allclose(row["effective_rank"], np.mean(row["effective_rank_by_matrix"], 1))
        assert 1 <= min(map(min, row["effective_rank_by_matrix"])) and max(map(max, row["effective_rank_by_matrix"])) <= 32
    for row in results["similarity"]:
        matrix = np.array(row["similarity"])
        assert np.allclose(matrix, matrix.T) and np.allclose(np.diag(matrix), 1) and (matrix > 0).all() and (matrix < 1.001).all()
    # the weights are the checkpoint's
    state = torch.load(folder / "out" / "t_34-358" / "model_0000010.pt", weights_only=True)["model"]
    norms = [state[name].norm().item() for name in results["matrices"]]
    assert results["weights"][0]["norm_by_matrix"][1] == pytest.approx(norms, rel=1e-5)
    assert len(results["claims"]) == 11 and all(c["verdict"].upper() in out and c["figures"] in out for c in results["claims"])
    assert len(results["loss"]["bins"]) == 50 and results["loss"]["parameters"][1] < results["loss"]["parameters"][0]
    config = json.loads((folder / "out" / "low_rank" / "config.json").read_text())
    assert (config["model"]["method"], config["model"]["keep"]) == ("static", 0.1)
    assert json.loads((folder / "out" / "t_991-1000" / "config.json").read_text())["train"]["t_range"] == [991, 1000]
    with Image.open(folder / "out" / "figure.png") as picture:
        assert picture.width == 2 * plot.WIDTH
    # called again it trains nothing and finds the same
    before = {p: p.stat().st_mtime_ns for p in (folder / "out").rglob("model*.pt")}
    code, _, err = cli(rank_analysis, *flags)
    assert code == 0, err
    assert strict((folder / "out" / "results.json").read_text()) == results
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_rank_analysis_refuses(rank_runs, folder, tmp_path):
    """One line and exit status 2; nothing is written for bad flags."""
    runs, flags, _ = rank_runs
    new = [*flags[:-1], tmp_path / "new"]
    for arguments, says in ((["--steps", 45], ("--steps 45", "multiple")), (["--group-steps", 18], "--group-steps 18"),
                            (["--seed", -1], "seed"), (["--image-size", 16], "--image-size"), (["--per-timestep", 0], "at least 1"),
                            (["--test", tmp_path / "none"], "no dataset"), (["--test", "shapes"], "other classes"),
                            (["--device", "abacus"], "abacus"), (["--model", "huge"], "huge"), (["--batch-size", "x"], "x")):
        refuses(rank_analysis, *new, *arguments, says=says)
    refuses(rank_analysis, "--dataset", folder[0], "--out", tmp_path / "new", says=("add --test", str(folder[0])))
    assert not (tmp_path / "new").exists()
    refuses(rank_analysis, *flags, "--steps", 80, says=("run of 40 steps, not 80", "--out"))
    for name, content, says in (("model_0000020.pt", None, "model_0000020.pt does not exist"),
                                ("model_0000020.pt", b"nonsense", "model_0000020.pt cannot be loaded"),
                                ("config.json", b"{}", "config.json is not a run's settings")):
        copy_ = tmp_path / f"damaged{len(list(tmp_path.iterdir()))}"
        shutil.copytree(runs / "out", copy_)
        if content is None:
            (copy_ / "full" / name).unlink()
        else:
            (copy_ / "full" / name).write_bytes(content)
        real = sys.stdout
        refuses(rank_analysis, *flags[:-1], copy_, says=says)
        assert sys.stdout is real


def test_cifar10_is_resized(tmp_path, monkeypatch):
    """--image-size shrinks it as it shrinks image files, within the rounding."""
    import torchvision.datasets
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)

    class Cifar:
        data, targets, classes = pixels, [0, 1, 2], ["a", "b", "c"]
        filename, base_folder = torchvision.datasets.CIFAR10.filename, "."

        def __init__(self, *_, **__):
            pass

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    small = data.open_source("cifar10", str(tmp_path), image_size=16).read(0, 3)
    for i, image in enumerate(pixels):
        expected = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(small[i].permute(1, 2, 0).numpy() - expected).max() <= 1
    assert torch.equal(data.open_source("cifar10", str(tmp_path)).read(0, 3), torch.tensor(pixels).permute(0, 3, 1, 2))


# ----------------------------------------------------------------------------------------------------
# experiments/ablations.py and experiments/neighbours.py


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """Flags for runs of a second."""
    return [*image_files(tmp_path_factory.mktemp("few")), "--batch-size", 4, "--per-group", 8, "--device", "cpu",
            "--log-every", 1, "--steps", 20]


def held_out_of(flags):
    return data.load(str(flags[flags.index("--test") + 1]))


def test_ablations_end_to_end(few_images, tmp_path, monkeypatch):
    """Shared runs are trained once; losses are those of train.py; a second call trains and measures nothing."""
    command = [*few_images, "--only", "curriculum,sampling", "--seeds", 2, "--out", tmp_path / "a"]
    code, out, err = cli(ablations, *command)
    assert code == 0, err
    result = json.loads((tmp_path / "a" / "results.json").read_text())
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if p.is_dir()) == sorted(
        f"{name}-log-every-1-steps-20-seed-{seed}" for seed in (0, 1)
        for name in ("baseline", "curriculum-groups-0", "curriculum-sampling-uniform"))
    runs = result["ablations"]
    assert runs["curriculum"]["on"] == runs["sampling"]["progressive"] != runs["curriculum"]["off"]
    row = runs["curriculum"]["on"][0]
    folder = tmp_path / "a" / row["run"]
    net, _ = sample.load_model(folder, torch.device("cpu"))
    assert (row["loss"], row["loss_by_group"]) == train.held_out_loss(net, held_out_of(few_images), 8)
    assert row["flops"] == lines(folder)[-1]["flops"] < runs["curriculum"]["off"][0]["flops"]
    assert row["groups_in"] == 10 and row["until_all_in"] == 8  # the last group comes with 40 % of the steps
    settings = json.loads((folder / "config.json").read_text())["train"]
    assert (settings["curriculum_share"], settings["seed"], settings["steps"]) == (0.4, 0, 20)
    cheaper = next(v for v in result["verdicts"] if v["paper"].startswith("cheaper"))
    spent = [[run["flops"] for run in runs["curriculum"][name]] for name in ("on", "off")]
    assert cheaper["difference"] == pytest.approx(np.mean([a / b - 1 for a, b in zip(*spent)]))
    assert cheaper["verdict"] == "appears"
    assert Image.open(tmp_path / "a" / "figure.png").width > 600 and "| curriculum | off" in out
    command += ["--only", "curriculum", "--seeds", 1]
    with monkeypatch.context() as patch:
        patch.setattr(train, "held_out_loss", None)
        patch.setattr(torch.optim.AdamW, "step", None)
        assert cli(ablations, *command)[0] == 0
    read = lambda name: json.loads((tmp_path / "a" / "results.json").read_text())["ablations"]["curriculum"][name]
    assert read("on") == [row]
    # other held-out samples, or a damaged record: measured again
    (folder / "measured.json").write_text('{"step": 20')
    command[command.index("--per-group") + 1] = 4
    assert cli(ablations, *command)[0] == 0
    again = read("on")[0]
    assert read("off")[0]["loss"] != runs["curriculum"]["off"][0]["loss"]
    assert (again["loss"], again["loss_by_group"]) == train.held_out_loss(net, held_out_of(few_images), 4)
    # a damaged run
    (folder / "metrics.jsonl").write_text("")
    refuses(ablations, *command, says=("metrics.jsonl", "damaged"))


@pytest.mark.parametrize("module", ["ablations", "neighbours"])
def test_ablations_and_neighbours_refuse(module, few_images, tmp_path):
    script_, flags = globals()[module], [*few_images, "--out", tmp_path / "x"]
    np.savez(tmp_path / "three.npz", images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3))
    refuses(script_, *flags, "--only", "nonsense", says=("nonsense", "curriculum"))
    refuses(script_, *flags[2:], "--dataset", tmp_path / "none", says="no dataset")
    refuses(script_, "--dataset", tmp_path, "--out", tmp_path / "x", says="--test")
    refuses(script_, *flags, "--test", tmp_path / "three.npz", says="other classes")
    refuses(script_, *flags, "--curriculum-groups=3", says="--curriculum-groups")
    refuses(script_, *flags, "--seed", 3, says="--seed")
    refuses(script_, *flags, "--lr", "-1", says="--lr")
    refuses(script_, *flags, "--nonsense", says="--nonsense")
    refuses(script_, *flags, "--seeds", 0, says="--seeds")
    assert not (tmp_path / "x").exists()


def test_differences_are_paired_by_seed():
    """The interval is that of Student's one-sample test on the ratios."""
    g = np.random.default_rng(0)
    theirs = g.uniform(1, 2, 5)
    ours = theirs * g.normal(1.1, 0.05, 5)
    mean, half = plot.relative_change(list(ours), list(theirs))
    expected = scipy.stats.ttest_1samp(ours / theirs, 1).confidence_interval(0.95)
    assert (1 + mean - half, 1 + mean + half) == pytest.approx((expected.low, expected.high))
    assert plot.relative_change([3.0], [2.0]) == (0.5, None)
    mean, half = plot.relative_change(np.stack([ours, theirs], 1), np.stack([theirs, theirs], 1))
    assert mean == pytest.approx([(ours / theirs).mean() - 1, 0]) and half[1] == 0 < half[0]


def test_steps_until_all_groups_are_in():
    """As the curriculum itself counts them, when it reads its losses at log lines."""
    c = curriculum.Curriculum([1, 300, 600, 900], T, 200, share=1, patience=10)
    begins, log = {}, []
    for step in range(200):
        if c.advance(step):
            begins[c.stage] = step
        if (step + 1) % 7 == 0:
            c.observe(step - 6, [1.0] * 7)
            log.append({"step": step + 1, "stage": c.stage})
    assert len(begins) == 3
    assert ablations.until_all_in(log, 4) == (begins[3], 4)
    few = [line for line in log if line["step"] <= begins[3]]
    assert ablations.until_all_in(few, 4) == (None, 3)
    assert ablations.until_all_in([{"step": 7, "stage": 0}], 1) == (0, 1)  # no curriculum


def test_forgetting():
    """Mean loss of the last over that of the second quarter of the curriculum's log lines."""
    losses = [9, 9, 2, 4, 9, 9, 9, None, 6, 99]
    log = [{"stage": min(i // 3, 3), "loss_by_group": [None, value]} for i, value in enumerate(losses)]
    assert ablations.forgetting(log, 1, 4) == 6 / 3  # nine lines with stage < 3: two in a quarter
    assert ablations.forgetting(log, 0, 4) is None and ablations.forgetting(log[:7], 1, 4) is None
    assert ablations.forgetting(log, 1, 1) is None


def test_verdicts():
    for mean, half, sign, limit, says in [
            (0.2, None, 1, 0, "as the paper says, in one seed"), (0.2, None, -1, 0, "not as the paper says"),
            (0.2, 0.3, 1, 0, "undecided"), (0.2, 0.1, 1, 0, "appears, beyond"), (0.2, 0.1, -1, 0, "does not appear"),
            (0.005, 0.004, -1, 0.01, "appears, beyond"), (0.005, 0.006, -1, 0.01, "undecided"),
            (0.2, 0.0, 1, 0, "appears")]:
        assert ablations.verdict(mean, half, sign, limit).startswith(says), (mean, half, sign, limit)


@pytest.mark.parametrize("as_published", [True, False])
def test_every_trend_of_the_paper_is_found_where_it_is(as_published):
    """Runs made up so that all of the paper's claims hold, or none."""
    g, sign = np.random.default_rng(0), 1 if as_published else -1

    def runs(all_=1.0, low=1.0, noisy=1.0, flops=1.0, forgetting=1.0, until=100, groups=10):
        return [dict(loss=a * all_**sign, loss_by_group=[a * low**sign, a, a, a, a * noisy**sign],
                     flops=flops**sign, forgetting=a * forgetting**sign, until_all_in=until, groups_in=groups)
                for a in g.normal(1, 0.001, 3)]

    lengths = [300, 600, 900, None] if as_published else [900, 300, 200, 100]
    made_up = {"rho-min": {"0.3": runs(noisy=1.2), "0.4": runs(), "0.5": runs(), "0.6": runs(), "static": runs()},
               "profile": {"logistic": runs(), "linear": runs(all_=1.1)},
               "warm-start": {"0.1": runs(), "0": runs(low=1.1)},
               "curriculum": {"on": runs(all_=0.95, flops=0.9), "off": runs()},
               "alpha": {a: runs(until=n, groups=10 if n else 8) for a, n in zip(ablations.ABLATIONS["alpha"], lengths)},
               "sampling": {"progressive": runs(), "uniform": runs(all_=1.1, forgetting=1.3), "no curriculum": runs()},
               "restart": {"on": runs(), "off": runs(low=1.1), "no curriculum": runs()}}
    said = ablations.judge(made_up)
    assert {row["ablation"] for row in said} == set(ablations.ABLATIONS) and len(said) == 9
    for row in said:
        assert row["verdict"].startswith("appears" if as_published else "does not appear"), row
    assert ("+20." in said[0]["here"]) == as_published  # 0.3 against 0.4, and against static
    for runs_ in made_up["alpha"].values():  # none came far enough, some a group less far
        for run_ in runs_:
            run_.update(until_all_in=None, groups_in=4)
    alpha = lambda: next(row for row in ablations.judge(made_up) if row["ablation"] == "alpha")["verdict"]
    assert alpha() == "run more --alpha-steps"
    for name in ("0.05", "0.01"):
        made_up["alpha"][name][0]["groups_in"] = 3
    assert alpha() == "appears in part"


def test_curves_average_stretches_of_the_log():
    log = [{"step": 5 * i, "flops": 10 * i, "loss_by_group": [i, 1, 1, None, 2]} for i in range(1, 6)]
    steps, means = ablations.curve(log, 0, points=2)
    assert steps == [15, 25] and means == [2, 4.5]  # three lines, then two
    assert ablations.curve(log, 3, points=2)[1] == [None, None]
    spent, means = neighbours.curve(log, points=2)
    assert spent == [30, 50] and means == [None, None]
    log[3]["loss_by_group"][3] = 7
    expected = (33 * 4.5 + 325 * 1 + 542 * 1 + 90 * 7 + 10 * 2) / 1000  # sizes of the groups: how often uniform t draws them
    assert neighbours.curve(log, points=2)[1] == [None, pytest.approx(expected)]


@pytest.mark.parametrize("name", ["plain", "curriculum", "sorted"])
def test_equal_multiply_adds(name):
    """No other number of steps comes closer to the budget."""
    flags = ["--dataset", "shapes", "--batch-size", "4", *neighbours.CONTESTANTS[name]]
    cost = functools.cache(lambda steps: neighbours.expected_cost(flags, 8, 10, steps))
    for budget in (1, cost(1) * 7 // 5, cost(23), cost(23) + cost(1) // 3):
        assert abs(cost(neighbours.steps_for(budget, cost)) - budget) == min(abs(cost(n) - budget) for n in range(1, 45))
    assert neighbours.steps_for(cost(23), cost) == 23


def test_neighbours_end_to_end(few_images, tmp_path, monkeypatch):
    """Everyone spends what the plain masked run spends; masked runs exactly what is expected of them."""
    torch.manual_seed(0)
    judge = classifier.Classifier(10, 8, 4)
    judge.head.bias.data[3] = 1e6  # sees class 3 everywhere
    classes = [str(i) for i in range(10)]
    torch.save(dict(config=dict(num_classes=10, image_size=8, width=4), classes=classes, dataset="few", accuracy=0.1,
                    n_test=1, model=judge.state_dict()), tmp_path / "judge.pt")
    command = [*few_images, "--out", tmp_path / "n", "--classifier", tmp_path / "judge.pt", "--num", 14, "--only",
               "erd,speed,curriculum,sorted"]
    monkeypatch.setattr(neighbours, "draw_images", functools.partial(sample.draw_images, steps=2))
    code, out, err = cli(neighbours, *command)
    assert code == 0, err
    result = json.loads((tmp_path / "n" / "results.json").read_text())
    race = {name: runs[0] for name, runs in result["methods"]["iso-compute"].items()}
    assert list(race) == ["plain", "erd", "speed", "curriculum", "sorted"]
    config = Config(**json.loads((tmp_path / "n" / race["plain"]["run"] / "config.json").read_text())["model"])
    budget = flops.training_run(config, 20, 4)
    assert race["plain"]["flops"] == race["erd"]["flops"] == race["speed"]["flops"] == budget
    assert race["curriculum"]["steps"] > 20 < race["sorted"]["steps"]
    assert race["curriculum"]["flops"] == race["curriculum"]["expected"] == pytest.approx(budget, rel=0.03)
    assert race["sorted"]["flops"] == pytest.approx(race["sorted"]["expected"], rel=0.03) == pytest.approx(budget, rel=0.03)
    trained_with = {name: json.loads((tmp_path / "n" / run_["run"] / "config.json").read_text())["train"]
                    for name, run_ in race.items()}
    assert [trained_with["speed"][key] for key in ("weighting", "timesteps")] == ["speed", "speed"]
    assert [trained_with["erd"][key] for key in ("weighting", "curriculum_groups")] == ["erd", 0]
    assert [trained_with["sorted"][key] for key in ("rank_execution", "timesteps")] == ["sorted", "stratified"]
    assert all(run_["recognised"] == 2 / 14 for run_ in race.values())  # images 3 and 13 of 14 are asked to be of class 3
    net, _ = sample.load_model(tmp_path / "n" / race["sorted"]["run"], torch.device("cpu"))
    assert race["sorted"]["loss"] == train.held_out_loss(net, held_out_of(few_images), 8)[0]
    change = 100 * (race["erd"]["loss"] / race["plain"]["loss"] - 1)
    assert f"erd: in all {change:+.1f} %" in out and "one seed" in out and "--classifier FILE" not in out
    assert Image.open(tmp_path / "n" / "figure.png").width > 600
    refuses(neighbours, *command, "--classifier", tmp_path / "none.pt", says="no classifier")
    refuses(neighbours, *command, "--method", "thin", says=("thin", "iso-compute"))
    # without a rank schedule there is nothing to sort by
    code, _, err = cli(neighbours, *few_images, "--method", "full", "--only", "sorted", "--out", tmp_path / "f", "--seeds", 2)
    assert code == 0, err
    assert list(json.loads((tmp_path / "f" / "results.json").read_text())["methods"]["full"]) == ["plain"]


# ----------------------------------------------------------------------------------------------------
# experiments/compare.py


def test_order_of_the_compared_runs():
    """The paper's ten rows; those of several seeds first, seed by seed."""
    runs = list(compare.list_runs(3, False))
    assert runs[:5] == ["full-s0", "static-0.25-s0", "static-0.5-s0", "iso-compute-0.5-s0", "iso-param-0.5-s0"]
    assert [name[-2:] for name in runs] == ["s0"] * 5 + ["s1"] * 5 + ["s2"] * 5 + ["s0"] * 5
    assert len(set(runs)) == 20 and len({name[:-3] for name in runs}) == 10
    assert len(compare.list_runs(2, True)) == 20 and len(compare.list_runs(1, False)) == 10


def test_interval_of_a_difference():
    """Two rows of equal size: Student's two-sample test, which scipy has; the variance is pooled over all rows."""
    a, b, c = [1.0, 1.2, 1.7], [2.0, 2.5, 2.1], [5.0, 9.0]
    ours, theirs = compare.interval(a, b, [a, b, [4.0]]), compare.stats.ttest_ind(a, b).confidence_interval(0.95)
    assert ours[0] == pytest.approx(-0.9)
    assert ours[0] - ours[1] == pytest.approx(theirs.low) and ours[0] + ours[1] == pytest.approx(theirs.high)
    # squared deviations 0.26, 0.14 and 8 with 2 + 2 + 1 degrees of freedom; t(0.975, 5) = 2.5706
    difference, half = compare.interval([3.0], a, [a, b, c, [3.0]])
    assert difference == pytest.approx(1.7) and half == pytest.approx(2.570582 * (8.4 / 5 * (1 + 1 / 3)) ** 0.5, rel=1e-5)
    assert compare.interval([3.0], [1.0], [[3.0], [1.0]]) == (2.0, None)
    assert [compare.verdict(*x) for x in ((-2, 1), (2, 1), (-0.5, 1), (-2, None))] == ["better", "worse", "not told apart",
                                                                                    "no spread known"]


def test_words_of_the_comparison(capsys):
    """A trend appears if all keeps show it and full rank is ahead of static 0.25; else it is not judged, or not shown."""
    def rows(full, adaptive):
        losses = {"full": [full - 0.01, full + 0.01], "static-0.25": [1.99, 2.01]}
        losses |= {name: [loss] for keep in ("0.75", "0.5") for name, loss in
                   ((f"static-{keep}", 1.8), (f"iso-compute-{keep}", adaptive), (f"iso-param-{keep}", 1.8))}
        return {name: dict(runs=[dict(loss=x, frechet=None, recognised=None) for x in xs], sampling=100, parameters=10) for name, xs in losses.items()}

    for full, adaptive, compute, param in ((1.0, 1.5, "appears here", "appears here"), (2.0, 1.5, "cannot be judged", "cannot be judged"),
                                           (1.0, 1.8, "is not shown", "appears here"), (1.0, 2.1, "is not shown", "appears here")):
        found = compare.print_words(rows(full, adaptive))
        trends = [line for line in capsys.readouterr().out.splitlines() if "the paper's trend" in line]
        assert [text in line for text, line in zip((compute, param), trends)] == [True, True] and len(trends) == 2
        assert len(found) == 5 and found[0]["difference"] == pytest.approx(full - 2)
        # four values of standard deviation 0.01414 in two rows: t(0.975, 2) = 4.3027
        assert found[1]["half_width"] == pytest.approx(4.302653 * 0.02**0.5 * 0.1 * 2**0.5, rel=1e-5)


def test_more_recognised_is_better_and_more_loss_is_not():
    measures = lambda x: dict(loss=x, frechet=x, recognised=x)
    rows = {name: dict(runs=[measures(x - 0.01), measures(x + 0.01)]) for name, x in (("a", 0.9), ("b", 0.3))}
    verdicts = {c["measure"]: c["verdict"] for c in compare.compare_rows(rows, "a", "b")}
    assert verdicts == {"loss": "worse", "Frechet distance": "worse", "share recognised": "better"}
    none = dict(runs=[measures(0.0)] * 2)
    assert math.isnan(compare.compare_rows({"a": rows["a"], "none": none}, "a", "none")[0]["relative"])


def test_seconds_of_a_run(tmp_path):
    """100 steps of 8 at 80 images/s, then 50 at 40: 10 s and 10 s, however often the run was stopped."""
    lines = [{"step": 100, "images_per_s": 80.0}, {"step": 150, "images_per_s": 40.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare.wall_seconds(tmp_path, 8) == pytest.approx(20)


def test_compare_script(tmp_path):
    """Trains and measures what --only names; a second call keeps it; other settings measure again; what is missing is said."""
    for seed, name in enumerate(("a.npz", "b.npz")):
        images, labels = data.draw_shapes(100, 8, seed)
        np.savez(tmp_path / name, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    flags = ["--dataset", tmp_path / "a.npz", "--test", tmp_path / "b.npz", "--data-dir", tmp_path, "--steps", 4, "--batch-size", 8,
             "--num", 10, "--per-group", 5, "--sampling-steps", 2, "--device", "cpu", "--out", tmp_path / "out"]
    small = ["--", "--curriculum-share", "0.5"]
    code, out, err = cli(compare, *flags, "--only", "full-s0,static-0.25-s0,static-0.25-s1,iso-param-0.5-s0", *small)
    assert code == 0, err
    assert "16 of 20 runs are missing" in out and "Is the budget enough?" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["method"], row["keep"], row["n"]) for row in results["rows"]] == [("full", None, 1), ("iso-param", 0.5, 1),
                                                                                 ("static", 0.25, 2)]
    assert results["groups"] == ["1-33", "34-358", "359-900", "901-990", "991-1000"] and len(results["missing"]) == 16
    run = tmp_path / "out" / "static-0.25-s0"
    net, _ = sample.load_model(run, torch.device("cpu"))
    measured = json.loads((run / "measured.json").read_text())
    loss, by_group = train.held_out_loss(net, data.load(str(tmp_path / "b.npz")), 5)
    assert measured["loss"] == pytest.approx(loss) and measured["by_group"] == pytest.approx(by_group)
    extractor = fid.file_extractor(tmp_path / "out" / "classifier.features.pt")
    sides = [fid.measure(data.open_source(str(path)), extractor, torch.device("cpu"), pr_num=0)
             for path in (run / "samples.npz", tmp_path / "b.npz")]
    assert measured["frechet"] == pytest.approx(fid.frechet_distance(*(x for side in sides for x in (side.mu, side.sigma))),
                                                rel=1e-5)
    judge, _ = classifier.load_classifier(tmp_path / "out" / "classifier.pt", torch.device("cpu"))
    assert measured["parameters"] == sum(p.numel() for p in net.parameters())
    assert measured["sampling"] == flops.sampling(net.config, 2) and measured["training"] == flops.read_run(run)[3]
    assert measured["seconds"] > 0
    images, labels = sample.draw_images(net, range(10), list(range(10)), steps=2, guidance=1.5)
    with np.load(run / "samples.npz") as kept:
        assert np.array_equal(kept["arr_0"], images.permute(0, 2, 3, 1).numpy()) and kept["labels"].tolist() == labels.tolist()
    with torch.no_grad():
        assert measured["recognised"] == pytest.approx((judge.eval()(images).argmax(1) == labels).double().mean().item())
    losses = [json.loads((tmp_path / "out" / f"static-0.25-s{i}" / "measured.json").read_text())["loss"] for i in (0, 1)]
    row = results["rows"][2]
    assert row["loss"] == pytest.approx(sum(losses) / 2) and row["loss_sd"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert Image.open(tmp_path / "out" / "samples.png").width > Image.open(tmp_path / "out" / "samples.png").height
    assert (tmp_path / "out" / "figure.png").exists()
    # nothing is measured twice, unless the settings are others; a run with other training flags is refused
    before = (run / "measured.json").stat().st_mtime_ns
    code, again, _ = cli(compare, *flags, "--only", "static-0.25-s0", *small)
    assert code == 0 and (run / "measured.json").stat().st_mtime_ns == before and "step 4" not in again
    assert cli(compare, *flags, "--report", *small)[1].splitlines()[:9] == again.splitlines()[:9]
    code, out, _ = cli(compare, *flags, "--per-group", 6, "--only", "static-0.25-s0", *small)
    assert code == 0 and "19 of 20 runs are missing" in out and (run / "measured.json").stat().st_mtime_ns > before
    refuses(compare, *flags, "--only", "static-0.25-s0", "--", "--lr", "1e-3", "--curriculum-share", "0.1",
            says=("cannot resume", "--curriculum-share"))


def test_bad_input_to_compare_is_one_line(tmp_path):
    refuses(compare, "--only", "full-s7", says=("full-s7", "iso-param-0.5-s2"))
    refuses(compare, "--dataset", tmp_path, says="--test")
    refuses(compare, "--num", 1, says="--num")
    refuses(compare, "--dataset", tmp_path / "absent", "--test", "shapes", says="no dataset")
    refuses(compare, "--", "--lr", "fast", says="--lr")
    refuses(compare, "--", "--ema-decay", "7", says="--ema-decay")
    refuses(compare, "--report", "--out", tmp_path / "o", says="no finished run")
    for name, size, classes in (("a", 8, 4), ("b", 8, 4), ("smaller", 4, 4), ("fewer", 8, 3)):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((20, size, size, 3), np.uint8), labels=np.arange(20) % classes)
    for name in ("smaller", "fewer"):
        refuses(compare, "--dataset", tmp_path / "a.npz", "--test", tmp_path / f"{name}.npz", "--out", tmp_path / "o",
                says=("other classes", name))
    cli(classifier, "--dataset", tmp_path / "fewer.npz", "--steps", 2, "--width", 8, "--device", "cpu", "--out", tmp_path / "c.pt")
    refuses(compare, "--dataset", tmp_path / "a.npz", "--test", tmp_path / "b.npz", "--classifier", tmp_path / "c.pt", "--out",
            tmp_path / "o", says=("c.pt", "other classes"))
    (tmp_path / "c.pt").write_bytes(b"nothing")
    refuses(compare, "--dataset", tmp_path / "a.npz", "--test", tmp_path / "b.npz", "--classifier", tmp_path / "c.pt", "--out",
            tmp_path / "o", says="c.pt is not a classifier")
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------------------------------
# experiments/compress.py

DISTIL = dict(steps=4, batch_size=6, lr=1e-2, warmup=2, ema_decay=0.5, label_dropout=0.3, flip=True, dtype=None, guidance=2.0,
              save_every=2, seed=3, keep=0.5, teacher="t", orthogonality=0.0)


def teacher_and_data():
    images, labels = data.draw_shapes(20, 8, 0)
    teacher = awake(Config(**SMALL | dict(method="full", num_classes=10)), dtype=torch.float32).eval().requires_grad_(False)
    return teacher, data.Dataset("shapes", images, labels, list(data.SHAPES))


def test_truncation_is_the_best_approximation_of_its_rank():
    """Every low-rank layer: the first r terms of numpy's SVD. All others, and the biases: the teacher's."""
    teacher, _ = teacher_and_data()
    student = compress.truncate(teacher, 0.5)
    assert student.config == replace(teacher.config, method="static", keep=0.5)
    dense, ranks = dict(teacher.named_modules()), {layer.name: layer.rank for layer in model.linear_layers(student.config)}
    low = {name: layer for name, layer in student.named_modules() if isinstance(layer, lowrank.LowRankLinear)}
    assert set(low) == {name for name, rank in ranks.items() if rank}
    for name, layer in low.items():
        P, S, Qt = np.linalg.svd(dense[name].weight.double().numpy())
        best = (P[:, :ranks[name]] * S[:ranks[name]]) @ Qt[:ranks[name]]
        assert layer.rank == ranks[name] < len(S) and np.allclose(layer.weight().detach().numpy(), best, atol=1e-4)
    others = {name: p for name, p in student.named_parameters() if not name.endswith((".U", ".V"))}
    assert len(others) == len(dict(teacher.named_parameters())) - len(low)
    assert all(torch.equal(p, teacher.get_parameter(name)) for name, p in others.items())


def test_tuning_cost_is_counted_exactly():
    """Three products for the student (two where the input is data), one for the teacher: half of torch's own count."""
    teacher, _ = teacher_and_data()
    student = compress.truncate(teacher, 0.5).requires_grad_(True)
    x, t, y = inputs(teacher.config, 5, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.mse_loss(student(x, t, y), teacher(x, t, y)).backward()
    assert compress.tuning_step(student.config, teacher.config, 5) * 2 == counter.get_total_flops()


def test_batches_of_distillation():
    """x_t = signal x_0 + noise eps with the same eps whatever the images; labels drop out; half of the images are flipped."""
    _, dataset = teacher_and_data()
    s = DISTIL | dict(batch_size=2000, flip=False)
    black = replace(dataset, images=torch.zeros_like(dataset.images))
    a, b = (compress.draw_batch(d, 5, s, 10, torch.device("cpu")) for d in (dataset, black))
    index = data.batch_indices(20, 5, 2000, 3, torch.device("cpu"))
    signal_ = schedule.NoiseSchedule().coefficients(a[1])[0]
    assert relative(a[0] - b[0], signal_ * (data.to_unit(dataset.images[index]) + 1)) < 1e-5
    eps = (a[0] - signal_ * data.to_unit(dataset.images[index])) / schedule.NoiseSchedule().coefficients(a[1])[1]
    assert eps.mean().abs() < 0.01 and abs(eps.std() - 1) < 0.01
    assert a[1].min() >= 1 and a[1].max() <= T and abs(a[1].double().mean() - 500.5) < 30 and a[1].unique().numel() > 700
    kept = a[2] != 10
    assert torch.equal(a[2][kept], dataset.labels[index][kept]) and abs(kept.double().mean() - 0.7) < 0.05
    assert not torch.equal(compress.draw_batch(dataset, 6, s, 10, torch.device("cpu"))[0], a[0])
    plain = compress.draw_batch(replace(dataset, classes=[]), 5, s, 10, torch.device("cpu"))
    assert (plain[2] == 10).all()
    flipped = compress.draw_batch(dataset, 5, s | dict(flip=True, label_dropout=0), 10, torch.device("cpu"))
    assert torch.equal(flipped[2], dataset.labels[index])
    side = torch.zeros_like(dataset.images)
    side[..., :4] = 255  # white on the left
    x_t, t, _ = compress.draw_batch(replace(dataset, images=side), 5, s | dict(flip=True), 10, torch.device("cpu"))
    left = (x_t[..., :4].mean((1, 2, 3)) > x_t[..., 4:].mean((1, 2, 3)))[t < 100].double().mean()
    assert abs(left - 0.5) < 0.15


def test_distillation_written_out(tmp_path):
    """Four steps of plain Adam towards the teacher's eps, warm-up over 5 % of the steps, then a cosine to zero, EMA."""
    teacher, dataset = teacher_and_data()
    found = compress.distil(teacher, dataset, tmp_path / "r", DISTIL, torch.device("cpu"))
    student = compress.truncate(teacher, 0.5)
    with torch.no_grad():
        assert relative(student(*inputs(teacher.config, 4, dtype=torch.float32)),
                        found(*inputs(teacher.config, 4, dtype=torch.float32))) > 1e-3
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in student.named_parameters()}
    ema, m, v = ({name: p.detach().clone() * scale for name, p in parameters.items()} for scale in (1, 0, 0))
    for step in range(4):
        x_t, t, y = compress.draw_batch(dataset, step, DISTIL, 10, torch.device("cpu"))
        difference = torch.func.functional_call(student, parameters, (x_t, t, y)) - teacher(x_t, t, y)
        gradient = torch.autograd.grad(difference.square().mean(), parameters.values(), allow_unused=True)
        lr = DISTIL["lr"] * (1 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 0.2) / 3.8)))  # warm-up: 0.2 steps
        for (name, p), g in zip(parameters.items(), gradient):
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            with torch.no_grad():
                p -= lr * (m[name] / (1 - 0.9 ** (step + 1))) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                decay = min(0.5, (1 + step) / (10 + step))
                ema[name] = decay * ema[name] + (1 - decay) * p
    assert all(relative(found.get_parameter(name), p) < 2e-3 for name, p in ema.items())
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    cost = compress.tuning_step(student.config, teacher.config, 6)
    assert [(line["step"], line["flops"]) for line in lines] == [(2, 2 * cost), (4, 4 * cost)]


def test_stopped_distillation_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    teacher, dataset = teacher_and_data()
    straight = compress.distil(teacher, dataset, tmp_path / "a", DISTIL, torch.device("cpu"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        draw = compress.draw_batch
        patch.setattr(compress, "draw_batch", lambda d, step, *more: draw(d, step, *more) if step < 3 else
                      (_ for _ in ()).throw(KeyboardInterrupt))
        compress.distil(teacher, dataset, tmp_path / "b", DISTIL, torch.device("cpu"))
    assert torch.load(tmp_path / "b" / "state.pt", weights_only=True)["step"] == 2
    resumed = compress.distil(teacher, dataset, tmp_path / "b", DISTIL, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))
    assert len((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()) == 2
    for change in (dict(lr=1e-3), dict(teacher="another")):
        with pytest.raises(data.InputError, match="other settings"):
            compress.distil(teacher, dataset, tmp_path / "b", DISTIL | change, torch.device("cpu"))


def test_compress_script(tmp_path):
    for seed, name in enumerate(("a.npz", "b.npz")):
        images, labels = data.draw_shapes(100, 8, seed)
        np.savez(tmp_path / name, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    flags = ["--dataset", tmp_path / "a.npz", "--test", tmp_path / "b.npz", "--data-dir", tmp_path, "--steps", 8, "--batch-size", 8,
             "--per-group", 5, "--device", "cpu", "--out", tmp_path / "o"]
    code, out, err = cli(compress, *flags)
    assert code == 0, err
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    rows = {row["model"]: row for row in results["rows"]}
    assert list(rows) == list(compress.MODELS) and results["tune_steps"] == 2 and len(results["comparisons"]) == 2
    teacher, state = sample.load_model(tmp_path / "o" / "s0" / "full", torch.device("cpu"))
    student, state = sample.load_model(tmp_path / "o" / "s0" / "student", torch.device("cpu"))
    assert state["step"] == 2 and student.config.method == "static"
    held_out = data.load(str(tmp_path / "b.npz"))
    for name, net in (("full", teacher), ("truncated", compress.truncate(teacher, 0.5)), ("student", student)):
        assert rows[name]["loss"] == pytest.approx(train.held_out_loss(net, held_out, 5)[0])
        assert rows[name]["sampling"] == flops.sampling(net.config) and rows[name]["loss_sd"] is None
        assert rows[name]["parameters"] == sum(p.numel() for p in net.parameters())
    taught = flops.training_run(teacher.config, 8, 8, penalty=False)
    assert rows["full"]["training"] == rows["truncated"]["training"] == taught
    assert rows["student"]["training"] == taught + 2 * (flops.train_step(student.config, 8, penalty=0)
                                                        + 8 * flops.forward(teacher.config))
    assert rows["iso-param"]["parameters"] == rows["student"]["parameters"] and ("0 of 1" in out or "1 of 1" in out)
    # a quarter of the steps with three passes of the student (Table 4's static row) and one of the teacher
    paper = {row["method"]: row for row in results["paper"]}
    assert paper["compression"]["of full, printed"] == pytest.approx(7.097 / 6.696)
    assert paper["compression"]["computed, 1e18"] == pytest.approx(6.696 + (3.532 + 6.696 / 3) / 4, rel=2e-3)
    assert (tmp_path / "o" / "figure.png").exists()
    # the student samples and is counted like any run, but train.py cannot go on with it
    assert cli(sample, "--run", tmp_path / "o" / "s0" / "student", "--num", 2, "--steps", 2, "--device", "cpu")[0] == 0
    assert cli(flops, "--run", tmp_path / "o" / "s0" / "student")[0] == 0
    refuses(train, "--resume", "--out", tmp_path / "o" / "s0" / "student", says="lacks")
    # a finished call is over at once, and a given teacher serves as well
    code, again, _ = cli(compress, *flags)
    assert code == 0 and "distillation: step" not in again
    assert json.loads((tmp_path / "o" / "results.json").read_text()) == results
    code, out, err = cli(compress, "--teacher", tmp_path / "o" / "s0" / "full", "--test", tmp_path / "b.npz", "--data-dir", tmp_path,
                         "--per-group", 5, "--device", "cpu", "--out", tmp_path / "p")
    assert code == 0, err
    assert json.loads((tmp_path / "p" / "results.json").read_text())["rows"] == results["rows"]
    refuses(compress, *flags, "--teacher", tmp_path / "o" / "s0" / "iso-param", says="no full-rank model")
    refuses(compress, *flags, "--tune-lr", 1e-4, says="other settings")


def test_bad_input_to_compress_is_one_line(tmp_path):
    refuses(compress, "--dataset", tmp_path, says="--test")
    refuses(compress, "--keep", 0, says="--keep")
    refuses(compress, "--tune-lr", -1, says="--tune-lr")
    refuses(compress, "--teacher", tmp_path, says="config.json")
    refuses(compress, "--teacher", tmp_path, "--seeds", 2, says="--seeds")
    refuses(compress, "--dataset", tmp_path / "absent", "--test", "shapes", says="no dataset")
    refuses(compress, "--", "--lr", "fast", says="--lr")
    for name, size in (("a", 8), ("b", 16), ("odd", 6)):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((4, size, size, 3), np.uint8), labels=np.arange(4))
    refuses(compress, "--dataset", tmp_path / "a.npz", "--test", tmp_path / "b.npz", "--out", tmp_path / "o", says="another image size")
    refuses(compress, "--dataset", tmp_path / "odd.npz", "--test", tmp_path / "odd.npz", "--out", tmp_path / "o", says="patch")
    assert not (tmp_path / "o").exists()
