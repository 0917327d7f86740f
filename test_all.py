"""The tests of the top level: first the paper, an equation or a rule a test; then file by file.

    pytest test_all.py                          all of it
    pytest test_all.py -k "mask or phi"         some

The first section is a specification, to be read beside the paper. A difference is compared with the largest number of
the whole (an image, all gradients of a model) and allowed what rounding allows: a single number may be zero in exact
arithmetic, and rounds in another way on every machine. Bits are compared only between runs of one program on one.
"""

import contextlib
import copy
import functools
import gc
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
import tracemalloc
import warnings
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from signal import SIGINT, SIGKILL
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import curriculum
import data
import fid
import flops
import lowrank
import model
import sample
import schedule
import script
import train
from curriculum import Curriculum
from lowrank import Channels
from model import Config, DiT
from schedule import PREDICTIONS, RankSchedule, T

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # one has so little work done sooner than two; beside other programs, twenty times
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
CPU = torch.device("cpu")
NOISE = schedule.NoiseSchedule()
AB = NOISE.alpha_bar
GROUPS = [1, 7, 32, 111, 324, 664, 880, 961, 988, 997]  # the first timesteps of the curriculum's ten groups
SMALL = dict(depth=2, width=32, heads=2, patch=2, image_size=8, num_classes=4, dense_mlp_blocks=0)
ELASTIC = SMALL | dict(method="elastic", keep=1.0, rho_min=0.1)
PEAK, LOW = ((1, 0.3), (400, 0.8), (650, 0.07)), ((1, 1.0), (5, 0.07))  # rank profiles; PEAK neither falls nor rises
PROFILE = json.dumps(dict(zip(("t", "share"), zip(*PEAK))))
SHARES = [schedule.Shares(), schedule.Shares(guide=0.25), schedule.Shares(((1, 0.5),)), schedule.Shares(PEAK, 0.2),
          schedule.Shares(PEAK, 0.2, "same"), schedule.Shares(((1, 0.5),), 0.6, "same"), schedule.Shares(LOW, 0.5),
          schedule.Shares(guide=0.25, guide_class="same")]
ONE_BLOCK = model.PRESETS["tiny"] | dict(depth=1, width=32, heads=2)
DISTIL = ["--method", "elastic", "--distil", "0.5"]
QUICK = ["--dataset", "shapes", "--image-size", "8", "--batch-size", "4", "--log-every", "5", "--sample-every", "0",
         "--curriculum-share", "0.4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def afresh(tmp_path, monkeypatch):
    """Every test draws from seed 0, in an empty folder of its own."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


def relative(found, expected):
    """The largest difference over the largest number expected; of two lists of tensors, over all of them together."""
    if isinstance(expected, (list, tuple)):
        assert [x.shape for x in found] == [x.shape for x in expected]
        found, expected = (torch.cat([x.flatten() for x in tensors]) for tensors in (found, expected))
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, materialize_grads=True)


def awake(config, dtype=torch.float64):
    """A model whose every weight matters: as initialised, adaLN-Zero makes the output zero."""
    torch.manual_seed(0)
    net = DiT(config).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return net


def inputs(config, n, seed=0, dtype=torch.float64):
    """n noisy images, their t in ascending order, and labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, config.channels, config.image_size, config.image_size, generator=g, dtype=torch.float64)
    t = torch.randint(1, T + 1, (n,), generator=g).sort().values
    return x.to(dtype), t, torch.randint(0, config.num_classes + 1, (n,), generator=g)


def low_rank_layer(n, m, r, dtype=torch.float64):
    layer = lowrank.LowRankLinear(n, m, r).to(dtype)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer


drawn_once = functools.cache(data.draw_shapes)  # 20,000 shapes take longer than the runs that ask for them


def cli(module, *arguments):
    """Runs a script's main() with these arguments, in this process: (exit status, stdout, stderr). A warning is a line
    on stderr, as it is outside of pytest."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        patch.setattr(data, "draw_shapes", drawn_once)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                script.run_script(module.main)
            except SystemExit as stop:
                code = stop.code or 0
    return code, out.getvalue(), err.getvalue() + "".join(f"{w.filename}: {w.message}\n" for w in warned)


def done(module, *arguments):
    """What a script prints that exits with status 0 and says nothing on stderr."""
    code, out, err = cli(module, *arguments)
    assert (code, err) == (0, ""), err
    return out


def refuses(module, *arguments, says):
    """Bad input: exit status 2 and one line on stderr that holds every word of `says`."""
    code, _, err = cli(module, *arguments)
    assert code == 2 and err.count("\n") == 1 and err.endswith("\n"), err
    for word in says if isinstance(says, tuple) else (says,):
        assert word in err, err


def quick_training(*arguments):
    """What train.py prints on training one block on 8 x 8 shapes, in batches of 4: a fifth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", ONE_BLOCK)
        return done(train, *QUICK, *arguments)


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder, name="state.pt"):
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of six steps. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("run") / "r"
    quick_training("--steps", 6, "--save-every", 4, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def elastic_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic") / "r"
    assert "rank 2..16" in quick_training("--method", "elastic", "--steps", 4, "--out", folder)
    return folder


# ----------------------------------------------------------------------------------------------------
# The paper. 2.1: the diffusion process


def test_noise():
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), s = 0.008 (Nichol and Dhariwal 2021, Eq. 17),
    betas clipped at 0.999; SNR(t) = ab_t / (1 - ab_t), B.1; x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps."""
    assert AB.dtype == NOISE.log_snr.dtype == torch.float64 and len(AB) == len(NOISE.log_snr) == T + 1
    f = lambda t: math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 1, 2, 10, 500, 998, 999):
        assert AB[t].item() == pytest.approx(f(t) / f(0), rel=1e-10)
    assert (AB[T] / AB[T - 1]).item() == pytest.approx(0.001, rel=1e-9)  # the only clipped beta
    assert torch.allclose(NOISE.log_snr[1:].exp(), AB[1:] / (1 - AB[1:]), rtol=1e-10)
    assert (NOISE.log_snr.diff() < 0).all() and NOISE.log_snr[0] == torch.inf
    assert (NOISE.log_snr[T - 1] - NOISE.log_snr[T]).item() == pytest.approx(6.9, abs=0.05)
    t, (x_0, eps) = torch.tensor([1, 300, T]), torch.randn(2, 3, 3, 4, 4)
    signal, noise = NOISE.coefficients(t)
    assert signal.dtype == noise.dtype == torch.float32 and signal.shape == noise.shape == (3, 1, 1, 1)
    ab = AB[t].view(3, 1, 1, 1)
    x_t = ab.sqrt() * x_0 + (1 - ab).sqrt() * eps
    assert relative(schedule.add_noise(x_0, eps, signal, noise), x_t.float()) < 1e-6


def test_what_the_model_predicts():
    """eps (the paper), v = sqrt(ab) eps - sqrt(1 - ab) x_0, or x_0; from each and x_t back to both x_0 and eps. At one
    x_t, |error of eps|^2 = c |error of the output|^2, c = 1 for eps, alpha_bar for v, SNR for x_0."""
    t = torch.arange(1, 991)  # what rounding does at T: next test
    signal, noise = AB[t].sqrt().view(-1, 1), (1 - AB[t]).sqrt().view(-1, 1)
    x_0, eps = torch.randn(2, len(t), 5, dtype=torch.float64)
    x_t = schedule.add_noise(x_0, eps, signal, noise)
    targets = {"eps": eps, "v": signal * eps - noise * x_0, "x0": x_0}
    assert set(targets) == set(PREDICTIONS)
    for predict, expected in targets.items():
        found = schedule.target(predict, x_0, eps, signal, noise)
        assert relative(found, expected) < 1e-14
        back = schedule.predicted_x_0_and_eps(predict, found, x_t, signal, noise)
        assert relative(back[0], x_0) < 1e-12 and relative(back[1], eps) < 1e-12, predict
        error = schedule.predicted_x_0_and_eps(predict, found + 1, x_t, signal, noise)[1] - eps
        factor = {"eps": AB**0, "v": AB, "x0": NOISE.log_snr.exp()}[predict]
        assert torch.allclose(schedule.eps_loss_factor(predict, NOISE)[1:], factor[1:], rtol=1e-9)
        assert torch.allclose(error**2, factor[t, None].expand_as(error), rtol=1e-6)


def test_at_T_an_error_in_eps_is_multiplied():
    """x_0 = (x_T - sqrt(1 - ab_T) eps) / sqrt(ab_T): an error in eps counts 20,291 times, so samplers clip. From v and
    x_0, a float32 answer gives x_0 back to rounding: nothing has to be clipped."""
    signal, noise = NOISE.coefficients(torch.tensor([T]))
    x_0, eps = torch.randn(2, 4, 3, 8, 8)
    x_T = schedule.add_noise(x_0, eps, signal, noise)
    for predict, factor in (("eps", 20_291), ("v", 1), ("x0", 1)):
        answer = schedule.target(predict, x_0, eps, signal, noise)
        right, wrong = (schedule.predicted_x_0_and_eps(predict, answer + e, x_T, signal, noise)[0] for e in (0, 1))
        assert (wrong - right).mean().abs().item() == pytest.approx(factor, rel=1e-3)
        assert relative(right, x_0) < 1e-6 if factor == 1 else relative(right, x_0) > 1e-4


# 2.1: low-rank layers


def test_eq_1_a_low_rank_weight():
    """W = U V^T. Eq. (1); both factors are stored with the rank as their leading axis."""
    layer, x = low_rank_layer(12, 20, 5), torch.randn(7, 12, dtype=torch.float64)
    assert layer.U.shape == (5, 20) and layer.V.shape == (5, 12)
    W = torch.einsum("rm,rn->mn", layer.U, layer.V)
    assert relative(layer.weight(), W) < 1e-14 and relative(layer.weight(3), layer.U[:3].t() @ layer.V[:3]) < 1e-14
    assert relative(layer(x), x @ W.t() + layer.bias) < 1e-14


def test_spectral_initialisation():
    """Khodak et al. 2021: U V^T is the best rank-r approximation of W, its singular values split evenly."""
    W = torch.randn(20, 12, dtype=torch.float64)
    S = torch.linalg.svdvals(W)
    U, V = lowrank.spectral_factors(W, 5)
    assert torch.linalg.norm(W - U.t() @ V).item() == pytest.approx(S[5:].square().sum().sqrt().item(), rel=1e-10)
    assert relative(U @ U.t(), S[:5].diag()) < 1e-12 and relative(V @ V.t(), S[:5].diag()) < 1e-12


def test_orthogonality_penalty():
    """(||offdiag(U^T U)||^2 + ||offdiag(V^T V)||^2) / k, over layers and their k active channels; and its gradient."""
    net = awake(Config(**SMALL))
    active = {r: Channels(r // 2) for r in net.ranks}
    plain = 0.0
    for layer in lowrank.low_rank_layers(net):
        k = layer.rank // 2
        for factor in (layer.U[:k], layer.V[:k]):
            for i, j in itertools.permutations(range(k), 2):
                plain = plain + (factor[i] @ factor[j]) ** 2 / k
    penalty = lowrank.orthogonality_penalty(net, active)
    found, expected = (gradients(loss, *net.parameters()) for loss in (penalty, plain))
    assert penalty.item() == pytest.approx(plain.item(), rel=1e-12) and relative(found, expected) < 1e-12
    assert lowrank.orthogonality_penalty(torch.nn.ModuleList([low_rank_layer(6, 4, 1)])).item() == 0


@pytest.mark.parametrize("profile, rho_min, warm_start", [
    ("logistic", 0.4, 0.1), ("linear", 0.4, 0.1), ("linear", 0.3, 0.0), ("logistic", 0.07, 0.29), ("linear", 1.0, 0.0)])
@pytest.mark.parametrize("r_max", [1, 7, 10, 100, 136, 218])
def test_eq_2_the_rank_schedule(profile, rho_min, warm_start, r_max):
    """Phi(t) = r_min + ceil((r_max - r_min) f(t)), r_min = ceil(rho_min r_max); f(t) = sigmoid(-8 (t/T - 0.5)) or
    1 - t/T; Phi(t) = r_max for t <= floor(gamma T). Eq. (2), (7), C.1.3; in exact fractions. It never grows with t."""
    phi, rounded = (RankSchedule(profile, rho_min, warm_start, multiple=multiple) for multiple in (1, 8))
    r_min = math.ceil(Fraction(str(rho_min)) * r_max)
    for t in range(T + 1):
        if t <= math.floor(Fraction(str(warm_start)) * T):
            expected = r_max
        elif profile == "linear":
            expected = r_min + math.ceil((r_max - r_min) * (1 - Fraction(t, T)))
        else:
            expected = r_min + math.ceil((r_max - r_min) / (1 + math.exp(8 * (t / T - 0.5))))
        assert phi.active(t, r_max) == expected <= phi.active(max(0, t - 1), r_max), t
        assert rounded.active(t, r_max) == min(r_max, math.ceil(expected / 8) * 8)  # ours: up, never above r_max
    ts = torch.tensor([[0, 5], [900, T]])
    assert phi.active(ts, r_max).tolist() == [[phi.active(t, r_max) for t in row] for row in ts.tolist()]


def test_eq_3_the_mask():
    """S_ji = 1[j <= k(t_i)]: each sample uses its own first channels. Eq. (3); here (B, k), within the neediest's."""
    k, mask = lowrank.masked_channels(torch.tensor([1, 3, 2]))
    assert k == 3 and mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    layer, x = low_rank_layer(8, 6, 4), torch.randn(3, 5, 8, dtype=torch.float64)
    y = layer(x, {4: Channels(k, mask)})
    for i, k_i in enumerate((1, 3, 2)):
        assert relative(y[i], x[i] @ layer.weight(k_i).t() + layer.bias) < 1e-14
    assert relative(layer(x[:, 0], {4: Channels(k, mask)}), y[:, 0]) < 1e-14  # one vector a sample: (B, n)


@pytest.mark.parametrize("n, m, r", sorted({(l.n, l.m, l.rank) for l in model.linear_layers(Config()) if l.rank}))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_eq_4_masking_is_eq_5_slicing(n, m, r, dtype, tolerance):
    """U ((V^T x) * S) = U_{1:k} V_{1:k}^T x = W_k x, Eq. (4), (5), outputs and gradients: DiT-S/2, k all along Phi."""
    layer, zeros = low_rank_layer(n, m, r, dtype), torch.zeros(r)
    x, direction = torch.randn(2, 3, n, dtype=dtype, requires_grad=True), torch.randn(2, 3, m, dtype=dtype)

    outcome = lambda y: [y.detach(), *gradients((y * direction).sum(), x, layer.U, layer.V, layer.bias)]
    for k in RankSchedule().table(r).unique().tolist()[::10] + [r]:
        S = zeros.index_fill(0, torch.arange(k), 1).expand(2, r)
        masked, sliced = outcome(layer(x, {r: Channels(r, S)})), outcome(layer(x, {r: Channels(k)}))
        dense = outcome(F.linear(x, layer.U[:k].t() @ layer.V[:k], layer.bias))
        for a, b, c in zip(masked, sliced, dense):
            assert relative(a, c) < tolerance and relative(b, c) < tolerance
        assert not sliced[2][k:].any() and not sliced[3][k:].any()  # channels beyond k: no gradient


@pytest.mark.parametrize("n, batch", [(1, 7), (2, 7), (3, 7), (6, 7), (4, 8), (9, 4)])
@pytest.mark.parametrize("changes", [{}, dict(conditioning="shared", rank_profile="linear"),
                                     dict(factorise="attention-mlp", rho_min=0.1, warm_start=0.0, keep=0.9)], ids=str)
def test_slices_of_a_batch_are_the_masked_batch(changes, n, batch):
    """With t ascending, a batch may be cut into N parts that each compute only the channels of its neediest sample:
    the outputs, and the sum of the gradients, are those of Eq. (4) over all r_max channels."""
    net = awake(Config(**SMALL | changes))
    x, t, y = inputs(net.config, batch)
    phi = {r: net.rank_schedule.active(t, r) for r in net.ranks}
    S = {r: Channels(r, (torch.arange(r) < phi[r][:, None]).double()) for r in net.ranks}
    masked = net(x, t, y, S)
    outputs, total = [], 0
    for x_part, t_part, y_part in zip(*(whole.tensor_split(n) for whole in (x, t, y))):
        if len(t_part):
            active = net.active(t_part)
            assert {r: channels.k for r, channels in active.items()} == \
                {r: net.rank_schedule.active(int(t_part[0]), r) for r in net.ranks}
            outputs.append(net(x_part, t_part, y_part, active))
            total = total + outputs[-1].pow(3).sum() / batch
            if len(t_part) == 1:  # an image alone needs no mask, as in sampling
                alone = net(x_part, t_part, y_part, net.active(int(t_part)))
                assert relative(outputs[-1], alone) < 1e-12
    found, expected = (gradients(loss, *net.parameters()) for loss in (total, masked.pow(3).sum() / batch))
    assert relative(torch.cat(outputs), masked) < 1e-12 and relative(found, expected) < 1e-12


def test_eq_6_the_cost_of_a_layer():
    """FLOPs(r_act) = 2 r_act (m + n), by torch's counter; here and in the tables a multiply-add counts once."""
    layer, x = low_rank_layer(12, 20, 9), torch.randn(1, 12, dtype=torch.float64)
    for k in (1, 4, 9):
        with FlopCounterMode(display=False) as counter:
            layer(x, {9: Channels(k)})
        assert counter.get_total_flops() == 2 * k * (12 + 20)


# 3.1: presets and published figures


@pytest.mark.parametrize("r_base", [1, 5, 10, 96])
@pytest.mark.parametrize("given", [{}, dict(rho_min=0.1), dict(rho_min=1.0), dict(profile=PEAK), dict(profile=LOW)])
def test_iso_compute(r_base, given):
    """The r_max whose Phi, averaged over the 100 sampling timesteps, is closest to r_base. 3.1"""
    phi = RankSchedule(**given)
    distance = lambda r: abs(phi.table(r)[10::10].sum().item() / 100 - r_base)
    best = schedule.iso_compute_rank(r_base, phi, 10**6)
    assert distance(best) == min(distance(r) for r in range(1, 15 * r_base + 3))
    assert schedule.iso_compute_rank(r_base, phi, r_base) == r_base  # the limit, min(m, n)


def test_iso_presets_of_the_whole_model():
    """ISO-Param: r_max = r_base, the parameters of static. ISO-Compute: sampling costs what it costs static. r_base is
    floor(p m n / (m + n)), of the decimal that was typed."""
    assert [schedule.base_rank(p, 384, 384) for p in (0.75, 0.5, 0.25, 0.1)] == [144, 96, 48, 19]
    assert schedule.base_rank(0.07, 200, 200) == 7 and schedule.base_rank(0.29, 200, 200) == 29
    assert schedule.base_rank(0.001, 8, 8) == 1
    static, compute, param = (Config(method=method) for method in ("static", "iso-compute", "iso-param"))
    assert [l.rank for l in model.linear_layers(param)] == [l.rank for l in model.linear_layers(static)]
    assert flops.sampling(compute) == pytest.approx(flops.sampling(static), rel=0.003)
    assert flops.sampling(param) < 0.8 * flops.sampling(static)
    # section 2.1 and Table 2: all but these are factorised
    dense = {layer.name for layer in model.linear_layers(param) if layer.rank is None}
    assert dense == {"blocks.0.mlp_in", "blocks.0.mlp_out", "final_adaln", "final_out"}


# 2.2 and C.3: the curriculum


def test_timestep_groups():
    """Contiguous groups whose largest log-SNR difference is least, and which are as long as can be from low noise up.
    B.1, C.3.1: of the cosine schedule, and against all partitions of ten timesteps."""
    for n, starts in ((10, GROUPS), (5, [1, 34, 359, 901, 991]), (1, [1])):
        assert curriculum.cluster_timesteps(NOISE.log_snr, n) == starts
    for seed in range(8):
        log_snr = -torch.rand(11, generator=torch.Generator().manual_seed(seed)).double().mul(8).ceil().cumsum(0)
        s, cut_into = log_snr.clone(), 1 + seed % 5
        s[-1] = s[-2]  # the clipped beta at T would make a group of its own
        largest = lambda cuts: max((s[a] - s[b - 1]).item() for a, b in itertools.pairwise([1, *cuts, 11]))
        partitions = list(itertools.combinations(range(2, 11), cut_into - 1))
        least = min(map(largest, partitions))
        best = max(cuts for cuts in partitions if largest(cuts) == least)  # later starts: longer groups before them
        assert curriculum.cluster_timesteps(log_snr, cut_into) == [1, *best]


def test_a_group_comes_when_the_loss_has_stopped_improving():
    """EMA_t = alpha L_t + (1 - alpha) EMA_{t-1}; the next group after 200 steps without a new least. C.3.1, C.3.2"""
    c = Curriculum([1, 500], T, 10**6, share=1)
    falling = [2 - 0.001 * i for i in range(300)]
    c.observe(0, falling)
    ema = falling[0]
    for loss in falling[1:]:
        ema = 0.05 * loss + 0.95 * ema
    assert c.ema == pytest.approx(ema, rel=1e-12) and not c.advance(300)
    c.observe(300, [5.0] * 200)
    assert c.t_low == 500 and c.advance(500) and c.t_low == 1 and c.start == 500
    c.observe(498, [1.0, 2.0, 3.0])  # afresh: the first two belong to the stage before
    assert c.ema == 3.0


@pytest.mark.parametrize("every", [1, 7, 50, 300, 1000])
def test_a_plateau_is_noticed_at_the_next_log_line(every):
    """A plateau of 200 steps brings the next group although the loss has fallen again before the line, C.3.2: the log's
    interval delays a group by less than itself."""
    c, losses = Curriculum([1, 500], T, 10**6, share=1), [2.0] * 230 + [1.0] * 770
    for step in range(1001):  # the 201st loss is the 200th without a new least
        if step and step % every == 0:
            c.observe(step - every, losses[step - every:step])
        if c.advance(step):
            break
    assert c.stage == 1 and c.start == math.ceil(201 / every) * every


@pytest.mark.parametrize("share, groups, steps", [  # 0.55 * 3000 > 1650 in floats
    ("0.4", 10, 3000), ("0.4", 10, 77), ("0.55", 2, 3000), ("0.07", 3, 3000), ("0.28", 4, 3000), ("0.56", 10, 3000),
    ("0.3", 7, 3000), ("0.4", 1, 50)])
def test_the_curriculum_takes_at_most_its_share(share, groups, steps):
    """Ours, so that short runs finish it: group j of N - 1 comes at the latest at step share * steps * j / (N - 1), and
    flops.py counts a run in which no plateau brings it sooner. A share of 1 is no limit."""
    starts = curriculum.cluster_timesteps(NOISE.log_snr, groups)
    c, endless = (Curriculum(starts, T, steps, limit) for limit in (float(share), 1))
    latest = [math.ceil(Fraction(share) * steps * j / (groups - 1)) for j in range(1, groups)]
    assert [step for step in range(steps) if c.advance(step)] == latest
    stages = [(end - begin, t_low) for begin, end, t_low in zip([0, *latest], latest, reversed(starts))]
    assert flops.longest_curriculum(steps, groups, float(share)) == stages
    assert not any(endless.advance(step) for step in range(steps))


def test_progressive_uniform_sampling():
    """Timesteps of earlier groups keep the probability 1/T, the newest group shares the rest. C.3.3"""
    c = Curriculum(GROUPS, T, 1000)
    for c.stage in range(10):
        p, newest, earlier = c.probabilities(), GROUPS[9 - c.stage], [*GROUPS, T + 1][10 - c.stage]
        assert c.t_low == newest and not p[:newest].any() and p.sum().item() == pytest.approx(1)
        rest = 1 - (T + 1 - earlier) / T
        assert torch.allclose(p[earlier:], torch.tensor(1 / T, dtype=torch.float64))
        assert torch.allclose(p[newest:earlier], torch.tensor(rest / (earlier - newest), dtype=torch.float64))
    assert torch.allclose(p[1:], torch.tensor(1 / T, dtype=torch.float64))  # at the end: uniform


def test_learning_rate():
    """Linear warm-up, then a cosine to zero; afresh at introduction k, from base (1 - 0.02 k), with a fifth of the
    warm-up. D.1, C.3.4"""
    s = train.Settings(steps=100_000, lr=1e-4, warmup=3000)
    lr = lambda step, start=0, stage=0: train.learning_rate(step, start, stage, s)
    assert lr(0) == pytest.approx(1e-4 / 3000) and lr(2999) == pytest.approx(1e-4)
    assert lr(51_500) == pytest.approx(0.5e-4) and lr(100_000) == pytest.approx(0, abs=1e-12)
    assert lr(20_000, 20_000, 3) == pytest.approx(0.94e-4 / 600) and lr(20_600, 20_000, 3) == pytest.approx(0.94e-4)
    assert train.learning_rate(49, 0, 0, replace(s, steps=1000)) == pytest.approx(1e-4)  # short runs: 5 % of the steps
    assert all(lr(40_000 + 700 * k, 40_000 + 700 * k, k) > 0 for k in range(50))  # as many groups as there can be


def test_the_papers_settings():
    """D.1: the defaults of `--dataset cifar10`. A curriculum for what it can slice."""
    s = train.choose_settings({"dataset": "cifar10"})
    expected = dict(model="DiT-S/2", steps=800_000, batch_size=128, lr=1e-4, warmup=3000, ema_decay=0.9999, flip=True,
                    label_dropout=0.1, guidance=2.0, curriculum_groups=10, curriculum_share=0.4)
    assert {name: value for name, value in asdict(s).items() if name in expected} == expected
    assert train.choose_settings({"dataset": "cifar10", "method": "static"}).curriculum_groups == 0
    assert Config().predict == "eps" and model.preset_config("tiny", {}).predict == "v"


def test_training_written_out(tmp_path):
    """Four steps from the public pieces give the weights that train.py saves: batch, flip, label dropout, x_t, target,
    Eq. (4), penalty over the stage's channels, AdamW, EMA. (Fewer would not reach the labels: adaLN-Zero lets
    gradients through layer by layer.)"""
    quick_training("--steps", 4, "--curriculum-groups", 3, "--curriculum-share", 1, "--orthogonality", 0.1,
                   "--label-dropout", 0.5, "--ema-decay", 0.2, "--seed", 5, "--slices", 2, "--out", tmp_path / "r")
    found = saved(tmp_path / "r")
    dataset = data.load("shapes", image_size=8, seed=5)
    torch.manual_seed(5)
    net = DiT(Config(**ONE_BLOCK, image_size=8))
    average = start = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0)
    host, device = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + 2**31)
    t_low = curriculum.cluster_timesteps(NOISE.log_snr, 3)[-1]
    for step in range(4):
        index = data.batch_indices(len(dataset.images), step, 4, 5, CPU)
        x_0, y = dataset.images[index], dataset.labels[index]
        flip = torch.rand(4, 1, 1, 1, generator=device).flatten() < 0.5
        x_0[flip] = x_0[flip].flip(3)
        y[torch.rand(4, generator=device) < 0.5] = 10  # "no class"
        x_0, eps = x_0.float() / 127.5 - 1, torch.randn(4, 3, 8, 8, generator=device)
        t = t_low + (torch.rand(4, dtype=torch.float64, generator=host) * (T + 1 - t_low)).floor().long().sort().values
        ab = AB[t].view(4, 1, 1, 1)
        x_t = (ab.sqrt() * x_0 + (1 - ab).sqrt() * eps).float()
        v = (ab.sqrt() * eps - (1 - ab).sqrt() * x_0).float()
        loss = F.mse_loss(net(x_t, t, y), v) + 0.1 * lowrank.orthogonality_penalty(net, net.active(t_low))
        loss.backward()
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, 0, 0, train.choose_settings({"steps": 4}))
        optimizer.step(), optimizer.zero_grad()
        decay = min(0.2, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, net.parameters())]
    difference = lambda a, b: torch.cat([(x - y).flatten() for x, y in zip(a, b)]).norm()
    for name, expected in (("model", list(net.parameters())), ("ema", average)):
        # all weights together: where a gradient is zero, AdamW makes steps of its rounding
        assert difference(found[name].values(), expected) < 1e-3 * difference(expected, start), name
    moments = [optimizer.state[p]["exp_avg"] for p in net.parameters()]
    assert relative([m["exp_avg"] for m in found["optimizer"]["state"].values()], moments) < 1e-4
    assert log_of(tmp_path / "r")[-1]["t_low"] == t_low


# Sampling: 2.1, D.1


def gaussian_eps(mean, std):
    """The exact eps(x, t) for images whose pixels are N(mean, std^2): the posterior mean of the noise."""
    def eps(x, t):
        ab = AB[t].item()
        return (1 - ab) ** 0.5 * (x - ab**0.5 * mean) / (ab * std**2 + 1 - ab)
    return eps


def test_ddim():
    """x_s = sqrt(ab_s) x_0 + sqrt(1 - ab_s) eps (Song et al. 2021, Eq. 12); an x_0 outside [-1, 1] is clipped, and eps
    then made to fit it."""
    x_0, e = torch.rand(2, 3, 4, 4).double() - 0.5, torch.randn(2, 3, 4, 4).double()
    first = next(sample.ddim(lambda x, t: e, AB[T].sqrt() * x_0 + (1 - AB[T]).sqrt() * e, 4))
    assert relative(first, AB[750].sqrt() * x_0 + (1 - AB[750]).sqrt() * e) < 1e-9
    wrong = torch.ones_like(x_0)  # at x = 0 this eps means x_0 = -20,291
    clipped, free = (next(sample.ddim(lambda x, t: wrong, 0 * x_0, 4, clip=clip)) for clip in (True, False))
    e = AB[T].sqrt() / (1 - AB[T]).sqrt()  # that of x_0 = -1
    assert relative(clipped, ((1 - AB[750]).sqrt() * e - AB[750].sqrt()) * wrong) < 1e-9 and free.abs().max() > 100


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("heun", 2), ("dpm++", 2)])
def test_the_order_of_a_sampler(sampler, order):
    """On Gaussian images, whose probability flow is known: from t = 900 to 100, twice the steps leave half of DDIM's
    error and a quarter of that of Heun (Karras et al. 2022) and DPM-Solver++ 2M (Lu et al. 2022). From T to 0 in 50
    steps they are more exact, too, since the step that leaves T and the one that reaches 0 are DDIM's."""
    x, draw = torch.randn(4, 3, 8, 8, dtype=torch.float64), sample.SAMPLERS[sampler]

    def error(timesteps):
        ab, end = AB[timesteps[0]].item(), AB[timesteps[-1]].item()
        expected = end**0.5 * 0.2 + ((end * 0.25 + 1 - end) / (ab * 0.25 + 1 - ab)) ** 0.5 * (x - ab**0.5 * 0.2)
        return relative([*draw(gaussian_eps(0.2, 0.5), x, clip=False, timesteps=timesteps)][-1], expected)

    coarse, fine = (error([*range(900, 99, -step)]) for step in (10, 5))
    assert coarse / fine == pytest.approx(2**order, rel=0.1)
    whole = error(schedule.sampling_timesteps(50))
    assert whole < 5e-3 if order == 2 else 2e-2 < whole < 5e-2


def test_one_step_of_heun_and_dpm_solver():
    """Heun: in y = x / sqrt(ab), y + (sigma' - sigma) (eps + eps') / 2, eps' at the end of Euler's step. DPM-Solver++
    2M: x' = sigma'/sigma x - alpha' (exp(-h) - 1) ((1 + 1/2r) x_0 - 1/2r x_0 before), r = h before / h."""
    visited, calls = [900, 600, 500, 0], []
    eps = lambda x, t: calls.append((x, t)) or torch.tanh(x) * t / 1000
    alpha, sigma = AB.sqrt(), (1 - AB).sqrt()
    x_0 = lambda x, t: (x - sigma[t] * eps(x, t)) / alpha[t]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    first, second, last = sample.heun(eps, x, clip=False, timesteps=visited)
    assert [t for _, t in calls] == [900, 600, 600, 500, 500] and torch.equal(calls[4][0], second)
    ratio = sigma / alpha
    euler = alpha[600] * (x / alpha[900] + (ratio[600] - ratio[900]) * eps(x, 900))
    slope = (eps(x, 900) + eps(euler, 600)) / 2
    assert relative(first, alpha[600] * (x / alpha[900] + (ratio[600] - ratio[900]) * slope)) < 1e-9
    assert relative(last, x_0(second, 500)) < 1e-9  # DDIM's
    calls.clear()
    first, second, last = sample.dpmpp(eps, x, clip=False, timesteps=visited)
    assert [t for _, t in calls] == [900, 600, 500]
    assert relative(first, alpha[600] * x_0(x, 900) + sigma[600] * eps(x, 900)) < 1e-9
    half = NOISE.log_snr / 2
    h, r = half[500] - half[600], (half[600] - half[900]) / (half[500] - half[600])
    goal = (1 + 1 / (2 * r)) * x_0(first, 600) - x_0(x, 900) / (2 * r)
    assert relative(second, sigma[500] / sigma[600] * first - alpha[500] * ((-h).exp() - 1) * goal) < 1e-9
    assert relative(last, x_0(second, 500)) < 1e-9


def test_ddpm():
    """Ho et al. 2020, Eq. (6), (7): a step draws from q(x_s | x_t, x_0), by Bayes' rule on the chain of the visited
    timesteps; the last adds no noise. A thousand of them draw Gaussian images as they are."""
    (x_0, z, x_t), s = torch.randn(3, 2, 3, 4, 4).double(), 750
    x_0 = x_0.clamp(-1, 1)
    e = (x_t - AB[T].sqrt() * x_0) / (1 - AB[T]).sqrt()
    found = next(sample.ddpm(lambda x, t: e, x_t, 4, noise=lambda: z))
    a = (AB[T] / AB[s]).item()  # x_t = sqrt(a) x_s + sqrt(1 - a) noise
    precision = 1 / (1 - AB[s]) + a / (1 - a)  # of x_s: prior given x_0, and likelihood of x_t
    mean = (AB[s].sqrt() * x_0 / (1 - AB[s]) + a**0.5 * x_t / (1 - a)) / precision
    assert relative(found, mean + precision**-0.5 * z) < 1e-9
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    drawn = [*sample.ddpm(gaussian_eps(0.2, 0.5), x, 1000, clip=False)][-1]
    assert drawn.mean().item() == pytest.approx(0.2, abs=0.02) and drawn.std().item() == pytest.approx(0.5, abs=0.02)
    calls = []
    [*sample.ddpm(gaussian_eps(0.2, 0.5), x, 7, noise=lambda: calls.append(1) or torch.zeros_like(x))][-1]
    assert len(calls) == 6


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_guidance(predict):
    """eps = eps_u + w (eps_c - eps_u) (Ho and Salimans 2022), in whatever the model predicts: at one x_t its answer is
    linear in eps. Which passes are made: test_guidance_of_two_ranks."""
    net = awake(Config(**SMALL, predict=predict))
    x, _, _ = inputs(net.config, 3)
    y, t = torch.tensor([0, 1, 2]), torch.full((3,), 800)
    answers = net(x, t, y), net(x, t, torch.full((3,), 4))
    amplitudes = AB[800].sqrt().item(), (1 - AB[800]).sqrt().item()
    eps_c, eps_u = (schedule.predicted_x_0_and_eps(predict, answer, x, *amplitudes)[1] for answer in answers)
    for w in (0.0, 1.0, 2.0, -0.5):
        _, eps = sample.denoiser(net, y, w, clip=False)(x, 800)
        assert relative(eps, eps_u + w * (eps_c - eps_u)) < 1e-5  # a model's answer is handed on in float32
    assert relative(sample.denoiser(net, None, 2.0, clip=False)(x, 800)[1], eps_u) < 1e-5


# ----------------------------------------------------------------------------------------------------
# schedule.py


@pytest.mark.parametrize("n", [1, 3, 7, 100, 333, 1000])
def test_sampling_timesteps(n):
    """n evenly spaced timesteps from T down, rounded, then 0."""
    visited = schedule.sampling_timesteps(n)
    assert len(visited) == n + 1 and visited[0] == T and visited[-1] == 0
    assert all(abs(t - T * (n - i) / n) <= 0.5 for i, t in enumerate(visited))
    assert all(a > b for a, b in zip(visited, visited[1:]))
    assert n != 100 or visited == [*range(1000, 0, -10), 0]


@pytest.mark.parametrize("r_max", [1, 7, 100, 136])
@pytest.mark.parametrize("profile", [PEAK, LOW, ((1, 1),)])
def test_a_rank_profile_of_any_shape(profile, r_max):
    """From each t on, Phi(t) = ceil(share r_max), in exact fractions."""
    phi, rounded = (RankSchedule(profile, multiple=multiple) for multiple in (1, 8))
    share = [[share for first, share in profile if first <= max(1, t)][-1] for t in range(T + 1)]
    expected = [math.ceil(Fraction(str(x)) * r_max) for x in share]
    assert phi.active(torch.arange(T + 1), r_max).tolist() == [phi.active(t, r_max) for t in range(T + 1)] == expected
    assert rounded.table(r_max).tolist() == [min(r_max, math.ceil(k / 8) * 8) for k in expected]
    decimals = torch.cat([torch.arange(1, 1001), torch.tensor([1e-9])]).double() / 1000  # exact, but never 0
    found = schedule.channels_of(decimals, r_max).tolist()
    assert found == [math.ceil(Fraction(i, 1000) * r_max) for i in range(1, 1001)] + [1]
    assert found == [schedule.channels_of(x, r_max) for x in decimals.tolist()]


@pytest.mark.parametrize("n", [1, 3, 8, 64])
def test_elastic_shares(n):
    """Falling, one draw in each of n equal strata of a distribution that gives an eighth all channels, an eighth
    rho_min, and the rest uniformly between. Without a generator, the middles of the strata."""
    g, of = torch.Generator().manual_seed(0), lambda u: (0.1 + 0.9 * (u - 1 / 8) / (6 / 8)).clamp(0.1, 1)
    draws = torch.stack([schedule.elastic_shares(n, 0.1, g) for _ in range(2000)]).flip(1)
    strata = of((torch.arange(n).double()[:, None] + torch.linspace(0, 1, 999).double()) / n)  # (n, 999)
    middles = schedule.elastic_shares(n, 0.1).flip(0)
    assert draws.dtype == middles.dtype == torch.float64 and torch.allclose(middles, strata[:, 499], rtol=1e-12)
    assert (draws >= strata[:, 0] - 1e-12).all() and (draws <= strata[:, -1] + 1e-12).all()
    assert (draws.diff() >= 0).all()
    assert torch.allclose(draws.mean(0), strata.mean(1), atol=0.04)
    for end in (0.1, 1):
        assert (draws == end).double().mean().item() == pytest.approx(1 / 8, abs=0.04)
        assert n % 8 or ((draws == end).sum(1) == n // 8).all()


@pytest.mark.parametrize("call, says", [
    (lambda: RankSchedule("cubic"), "cubic"), (lambda: RankSchedule(rho_min=0), "rho_min"),
    (lambda: RankSchedule(rho_min=1.1), "rho_min"), (lambda: RankSchedule(warm_start=2), "warm_start"),
    (lambda: RankSchedule(multiple=0), "multiple"), (lambda: RankSchedule().active(1001, 9), "0..1000"),
    (lambda: RankSchedule().active(5, 0), "r_max"), (lambda: schedule.sampling_timesteps(0), "1 to 1000"),
    (lambda: schedule.sampling_timesteps(1001), "1 to 1000"), (lambda: Curriculum([1], T, 1, share=1.5), "share"),
    (lambda: curriculum.cluster_timesteps(NOISE.log_snr, 1001), "1 to 1000"),
    (lambda: lowrank.LowRankLinear(4, 6, 5), "1..4"), (lambda: lowrank.LowRankLinear(4, 6, 0), "1..4"),
    *((lambda wrong=wrong: Config(**SMALL | wrong), next(iter(wrong)).replace("_", ".")) for wrong in (
        dict(image_size=9), dict(keep=0.0), dict(keep=1.5), dict(keep="0.5"), dict(keep=math.nan), dict(heads=3),
        dict(method="lora"), dict(method=["full"]), dict(rho_min=0.0), dict(depth=2.5), dict(depth=10**8),
        dict(width=10**30), dict(warm_start=2.0), dict(rank_profile="cubic"), dict(predict="x_0")))])
def test_values_out_of_range(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("kind, tau", [("cosine", 946), ("linear", 700)])
def test_loss_weights(predict, kind, tau):
    """As published, for each target, in Python floats; each divided by its mean under the draws of t. P2 and SpeeD
    weigh the eps loss, w: on v that is w alpha_bar, on x_0 w SNR."""
    noise = schedule.NoiseSchedule(kind)
    ab = noise.alpha_bar.tolist()
    snr = [math.inf] + [a / (1 - a) for a in ab[1:]]
    growth = [ab[t - 1] - ab[t] for t in range(1, T + 1)]  # of the variance 1 - alpha_bar
    low, high = min(growth), max(growth)
    of_eps_loss = lambda t: {"eps": 1, "v": ab[t], "x0": snr[t]}[predict]
    formulas = {
        "none": lambda t: 1.0,
        "erd": lambda t: {"eps": (1 - ab[t])**0.5, "x0": ab[t]**0.5, "v": (2 * ab[t] * (1 - ab[t]))**0.5}[predict],
        "min-snr": lambda t: min(snr[t], 5) / {"eps": snr[t], "x0": 1, "v": snr[t] + 1}[predict],
        "p2": lambda t: of_eps_loss(t) / (1 + snr[t]),
        "speed": lambda t: of_eps_loss(t) * (1.0 if t > tau else 0.4 + 0.2 * (growth[t - 1] - low) / (high - low)),
    }
    assert set(formulas) == set(schedule.WEIGHTINGS)
    for p in (curriculum.uniform(T), curriculum.speed(T, tau), curriculum.uniform(T, 300, 600)):
        for name, formula in formulas.items():
            w = schedule.loss_weight(name, noise, predict, p)
            assert w.dtype == torch.float64 and (w * p)[1:].sum().item() == pytest.approx(1)
            mean = sum(formula(t) * p[t].item() for t in range(1, T + 1))
            for t in (1, 2, 100, 364, 500, 700, 701, 946, 947, 999, T):
                assert w[t].item() == pytest.approx(formula(t) / mean, rel=1e-8), (name, t)


# ----------------------------------------------------------------------------------------------------
# lowrank.py


def test_a_layer_of_zeros_still_trains():
    """adaLN starts at zero: U = 0, V orthonormal, so the first gradient of U is not zero."""
    net = torch.nn.ModuleDict({"a": lowrank.Linear(12, 20)})
    torch.nn.init.zeros_(net["a"].weight)
    lowrank.factorise(net, {"a": 5})
    layer = net["a"]
    assert not layer.U.any() and torch.allclose(layer.V @ layer.V.t(), torch.eye(5), atol=1e-5)
    layer(torch.randn(4, 12)).sum().backward()
    assert layer.U.grad.abs().max() > 0.01


def test_the_orthogonality_penalty_lowers_the_off_diagonals():
    """Its default weight visibly orthogonalises the factors and leaves the denoising loss alone."""
    outcome = []
    for weight in (0.0, train.Settings.orthogonality):
        net = awake(Config(**SMALL, method="static"), dtype=torch.float32)
        optimizer, g = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0), torch.Generator().manual_seed(0)
        for _ in range(90):
            x, t = torch.randn(16, 3, 8, 8, generator=g), torch.randint(1, T + 1, (16,), generator=g)
            loss = (net(x, t, torch.zeros(16).long()) - x).square().mean()
            (loss + weight * lowrank.orthogonality_penalty(net)).backward()
            optimizer.step(), optimizer.zero_grad()
        outcome.append((lowrank.orthogonality_penalty(net).item(), loss.item()))
    (off, loss), (off_with, loss_with) = outcome
    assert off_with < 0.9 * off and abs(loss_with - loss) < 0.05 * loss


def test_two_ranks_in_two_threads():
    """How many channels to use is an argument: nothing on the module changes, so two passes can share one model."""
    net = awake(Config(**SMALL))
    x, _, y = inputs(net.config, 2)
    passes = lambda t: [net(x, torch.full((2,), t), y, net.active(t)).detach() for _ in range(20)][-1]
    alone = [passes(t) for t in (1, T)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(passes, (1, T)))
    assert all(relative(a, b) < 1e-12 for a, b in zip(together, alone)) and relative(*alone) > 1e-3


# ----------------------------------------------------------------------------------------------------
# model.py


@pytest.mark.parametrize("method", model.METHODS)
@pytest.mark.parametrize("more", [{}, {"conditioning": "shared", "factorise": "attention-mlp"},
                                  {"dense_mlp_blocks": 1, "num_classes": 0}], ids=str)
def test_linear_layers_describe_the_built_model(method, more):
    """Names, shapes and ranks of `linear_layers` are those of the modules; nothing is left out."""
    config = Config(**SMALL | more, method=method)
    net, layers = DiT(config), {layer.name: layer for layer in model.linear_layers(config)}
    kinds = lowrank.Linear, lowrank.LowRankLinear
    built = {name: module for name, module in net.named_modules() if isinstance(module, kinds)}
    assert built.keys() == layers.keys()
    for name, layer in layers.items():
        if layer.rank is None:
            assert built[name].weight.shape == (layer.m, layer.n)
        else:
            assert built[name].U.shape == (layer.rank, layer.m) and built[name].V.shape == (layer.rank, layer.n)
    assert sum(p.numel() for p in net.parameters()) == model.parameter_count(config)


@pytest.mark.parametrize("changes", [{}, dict(conditioning="shared", dense_mlp_blocks=1)], ids=str)
def test_an_elastic_model_holds_a_model_for_every_share(changes):
    """Each sample masked to its first k = ceil(share r_max) channels, or sliced to them alone, is the dense model whose
    weights are U_{1:k} V_{1:k}^T: outputs and gradients."""
    net = awake(Config(**ELASTIC | changes))
    (x, t, y), share = inputs(net.config, 5), schedule.elastic_shares(5, 0.1)
    dense, weights = awake(replace(net.config, method="full")), dict(net.named_parameters())
    low = [layer for layer in model.linear_layers(net.config) if layer.rank]
    cut = lambda share: weights | {f"{layer.name}.weight": net.get_submodule(layer.name).weight(
        math.ceil(share * layer.rank - 1e-9)) for layer in low}
    one = [(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(5)]
    masked = net(x, t, y, net.active(t, share))
    sliced = torch.cat([net(*part, net.active(int(part[1]), k)) for part, k in zip(one, share.tolist())])
    expected = torch.cat([torch.func.functional_call(dense, cut(k), part) for part, k in zip(one, share.tolist())])
    masked, sliced, expected = ((y, gradients(y.pow(3).sum(), *net.parameters())) for y in (masked, sliced, expected))
    for found in (masked, sliced):
        assert relative(found[0], expected[0]) < 1e-12 and relative(found[1], expected[1]) < 1e-12
    for r in net.ranks:  # no more is computed than the neediest sample needs
        assert net.active(t[2:], share[2:])[r].k == math.ceil(share[2] * r) and net.active(T, 0.1)[r].mask is None


def test_slices_under_bfloat16_autocast():
    """Products in bfloat16, gradients in float32, and no further from float32 than masking is (twice, at most)."""
    net, found = awake(Config(**SMALL), dtype=torch.float32), []
    x, t, y = inputs(net.config, 13, dtype=torch.float32)
    for n, enabled in ((1, False), (1, True), (4, True)):
        loss = 0
        for part in zip(*(whole.tensor_split(n) for whole in (x, t, y))):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = loss + net(*part).float().square().sum() / x.numel()
        found.append(torch.cat([g.flatten() for g in gradients(loss, *net.parameters())]))
    exact, masked, sliced = found
    assert sliced.dtype == torch.float32
    assert 1e-4 < (sliced - exact).norm() / exact.norm() < 2 * (masked - exact).norm() / exact.norm()


def test_attention_is_trained_in_float32_on_a_cpu():
    """There alone: the sampler's stays in bfloat16, that of float64 in float64. With autocast and without."""
    for dtype, grad, autocast, wanted in ((torch.bfloat16, True, True, torch.float32),
                                          (torch.bfloat16, True, False, torch.float32),
                                          (torch.bfloat16, False, True, torch.bfloat16),
                                          (torch.float64, True, False, torch.float64)):
        q, k, v = (torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(grad):
            found = model.attention(q, k, v)
        expected = F.scaled_dot_product_attention(*(x.detach().to(wanted) for x in (q, k, v))).to(dtype)
        assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("method", ["full", "iso-compute"])
def test_adaln_zero(method):
    """A fresh DiT answers zero to everything (Peebles and Xie 2023), and its first gradient is not zero."""
    net = DiT(Config(**SMALL, method=method))
    x, t, y = inputs(net.config, 3, dtype=torch.float32)
    out = net(x, t, y)
    assert not out.any()
    (out - x).square().mean().backward()
    assert net.final_out.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("conditioning", ["per-block", "shared"])
def test_the_transformer_written_out(conditioning):
    """Peebles and Xie 2023, Fig. 3 (adaLN-Zero), in plain products: attention, GELU, modulation, gates; sinusoids of t,
    cosines first, and of places, column before row. Tokens lie in memory one after the other through all blocks."""
    config = Config(**SMALL, method="full", conditioning=conditioning)
    net, contiguous = awake(config), []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda _, arguments: contiguous.append(arguments[0].is_contiguous()))
    x, t, y = inputs(config, 2)
    linear = lambda layer, v: v @ layer.weight.t() + layer.bias
    silu = lambda v: v / (1 + (-v).exp())
    norm = lambda v: (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    angle = t[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    t_emb = torch.cat([angle.cos(), angle.sin()], 1)
    assert relative(model.timestep_embedding(t).double(), t_emb) < 1e-4  # float32: angles up to 1,000
    t_emb, place = model.timestep_embedding(t).double(), torch.zeros(4, 4, 32).double()  # (row, column, D)
    for i, j, f in itertools.product(range(4), range(4), range(8)):
        for place_on_axis, first in ((j, f), (i, 16 + f)):
            angle = place_on_axis * 10000 ** (-f / 8)
            place[i, j, first], place[i, j, first + 8] = math.sin(angle), math.cos(angle)
    c = [silu(linear(e.time_out, silu(linear(e.time_in, t_emb))) + e.label.weight[y]) for e in net.embedders]
    patches = x.view(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 12)
    h = patches @ net.patchify.weight.flatten(1).t() + net.patchify.bias + place.view(16, 32)
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
    assert relative(net(x, t, y), expected) < 1e-6 and contiguous == [True, True]  # places are float32
    assert len(net.embedders) == {"per-block": 2, "shared": 1}[conditioning]


def test_a_model_of_other_defaults():
    """On the meta device weights have shapes alone; tables over t have values there, and everywhere else later. Of
    float64 weights positions are float64, too."""
    config = Config(**SMALL | dict(keep=0.43))  # ranks that no other test has met: tables are kept
    with torch.device("meta"):
        net = DiT(config, initialise=False)
    assert sum(p.numel() for p in net.parameters()) == model.parameter_count(config)
    assert torch.equal(net.noise_schedule.alpha_bar, AB)
    assert {r: k for r, (k, _) in net.active(1).items()} == {r: r for r in net.ranks}
    torch.set_default_dtype(torch.float64)
    try:
        assert DiT(config)(*inputs(config, 2)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_initial_spread():
    """DiT's initialisation: embedders N(0, 0.02), the rest Xavier, biases zero."""
    net = DiT(Config(method="full", depth=1, num_classes=1000))
    assert net.embedders[0].label.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert net.embedders[0].time_in.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert net.blocks[0].mlp_in.weight.std().item() == pytest.approx((2 / (5 * 384)) ** 0.5, rel=0.01)
    assert net.patchify.weight.std().item() == pytest.approx((2 / (12 + 384)) ** 0.5, rel=0.03)
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))


# ----------------------------------------------------------------------------------------------------
# curriculum.py


@pytest.mark.parametrize("stratified", [False, True])
def test_drawn_timesteps(stratified):
    """In ascending order, as often as `probabilities` says; stratified: one in each of n equal strata."""
    c = Curriculum([1, 500, 900, 990], T, 1000)
    for c.stage in range(4):
        p, g = c.probabilities(), torch.Generator().manual_seed(c.stage)
        draws = torch.stack([c.sample(200, g, stratified) for _ in range(500)])
        assert draws.dtype == torch.int64 and (draws.diff(dim=1) >= 0).all() and c.t_low == draws.min()
        in_twenties = lambda x: torch.stack([part.sum() for part in x[1:].double().split(20)])
        found, expected = in_twenties(draws.flatten().bincount(minlength=T + 1)), in_twenties(p) * draws.numel()
        assert ((found - expected).abs() <= 5 * expected.sqrt() + 1e-6).all()
        low, high = (torch.searchsorted(p.cumsum(0), torch.arange(200).double() / 200 + shift, right=True)
                     for shift in (1e-12, 0.005 - 1e-12))
        assert ((draws >= low) & (draws <= high)).all() == stratified


def test_other_ways_to_sample():
    """C.3.1: uniform over the groups that are in; over a part of 1..T alone. SpeeD: t up to 700 twice as often."""
    c = Curriculum([1, 500, 900], T, 10, progressive=False)
    c.stage = 1
    assert torch.allclose(c.probabilities()[500:], torch.full((501,), 1 / 501, dtype=torch.float64))
    c = Curriculum([34], T, 10, base=curriculum.uniform(T, 34, 358))
    t = c.sample(20_000, torch.Generator().manual_seed(0))
    assert c.t_low == t.min() == 34 and t.max() == 358 and not c.advance(9)
    p = curriculum.speed(T)
    assert p[0] == 0 and p[[1, 700, 701, T]].tolist() == pytest.approx([2 / 1700, 2 / 1700, 1 / 1700, 1 / 1700])
    c = Curriculum([1, 500], T, 10, base=p)
    q = c.probabilities()
    assert q[:500].sum() == 0 and q.sum().item() == pytest.approx(1) and (q[600] / q[800]).item() == pytest.approx(2)
    c.stage = 1
    assert torch.allclose(c.probabilities(), p)


def test_distributions_of_the_neighbours():
    """log-normal: what a normal draw of logit(u) makes of u, on the grid u_t = sqrt(1 - alpha_bar_t), of which most
    noisy samples are the same. clts moves from uniform to a Gaussian at 300. All sum to 1 and never draw 0."""
    for kind in schedule.NOISES:
        noise = schedule.NoiseSchedule(kind)
        u = (1 - noise.alpha_bar).sqrt()
        p = curriculum.log_normal(noise.alpha_bar)
        drawn = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sigmoid()
        for low, high in ((0.05, 0.3), (0.3, 0.6), (0.6, 0.9)):
            inside = p[(u > low) & (u <= high)].sum().item()
            assert inside == pytest.approx(((drawn > low) & (drawn <= high)).double().mean().item(), abs=0.02)
        for p in (curriculum.clts(T, 0.25), *(
                curriculum.base_distribution(name, noise.alpha_bar, 700) for name in curriculum.TIMESTEPS)):
            assert p[0] == 0 and (p[1:] >= 0).all() and p.sum().item() == pytest.approx(1)
    start, middle, end = (curriculum.clts(T, progress) for progress in (0, 0.5, 1))
    assert torch.allclose(start, curriculum.uniform(T)) and torch.allclose(middle, (start + end) / 2)
    assert end.argmax() == 300 and (end[500] / end[300]).item() == pytest.approx(math.exp(-0.5))


def test_clts_moves_while_a_run_trains():
    """Each step draws from, and weights are normalised by, the mixture of its own step; the others stand still."""
    config, dataset = Config(**SMALL), data.load("shapes", image_size=8, num=100)
    for name, moves in (("clts-stratified", True), ("log-normal", False), ("speed", False)):
        s, state = training_state(config)
        s = replace(s, timesteps=name, steps=10)
        state.curriculum.base = curriculum.base_distribution(name, AB, 946)
        state.step = 5
        train.draw_batch(dataset, state, s)
        expected = curriculum.clts(T, 0.5) if moves else curriculum.base_distribution(name, AB, 946)
        assert torch.allclose(state.curriculum.probabilities(), expected, rtol=1e-9)


def test_the_linear_noise_schedule():
    """Betas from 1e-4 to 0.02 (Ho et al. 2020); all that is a function of log-SNR follows a model's own schedule."""
    noise, ab = schedule.NoiseSchedule("linear"), 1.0
    for t in range(1, T + 1):
        ab *= 1 - (1e-4 + (t - 1) / 999 * (0.02 - 1e-4))
        assert noise.alpha_bar[t].item() == pytest.approx(ab, rel=1e-9)
    assert train.loss_groups("linear") == curriculum.cluster_timesteps(noise.log_snr, 5) != train.loss_groups("cosine")
    net = awake(Config(**SMALL, noise="linear", predict="v"))
    x, t, y = inputs(net.config, 2)
    x_0, eps = torch.rand_like(x) - 0.5, torch.randn_like(x)
    signal, sigma = (a.sqrt().float()[:, None, None, None] for a in (noise.alpha_bar[t], 1 - noise.alpha_bar[t]))
    v = signal * eps - sigma * x_0
    expected = (net(signal * x_0 + sigma * eps, t, y) - v).square().mean((1, 2, 3))
    assert relative(train.denoising_loss(net, net, train.Batch(x_0, y, eps, t))[0], expected) < 1e-5
    answer = net(x, torch.full((2,), 700), y)
    a, b = noise.alpha_bar[700].sqrt().item(), (1 - noise.alpha_bar[700]).sqrt().item()
    assert relative(sample.denoiser(net, y, 1.0, clip=False)(x, 700)[0], a * x - b * answer) < 1e-5
    s, state = training_state(net.config)
    assert torch.equal(state.model.noise_schedule.alpha_bar, noise.alpha_bar)
    assert flops.longest_curriculum(100, 4, 0.4, "linear") != flops.longest_curriculum(100, 4, 0.4)


# ----------------------------------------------------------------------------------------------------
# data.py

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LIE = b"\x93NUMPY\1\0v\0" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (999999999, 8, 8, 3)}".ljust(118)
NO_LABELS = [3, [0] * 11, [0.0] * 12, [-1] * 12, [10**4] * 12, [2**63] * 12, [None] * 12, np.full(12, "NaT", "m8")]


def to_bytes(write, *arguments, **options) -> bytes:
    file = io.BytesIO()
    write(file, *arguments, **options)
    return file.getvalue()


def png(pixels, kind="PNG", **options) -> bytes:
    return to_bytes(Image.fromarray(pixels).save, kind, **options)


def zipped(name, content) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def load_files(path, files, **options):
    """Writes the files, {name: content}, and loads their folder, or the only one if it is a .zip or .npz."""
    for name, content in files.items():
        (path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "set" / name).write_bytes(content)
    return data.load(str(path / "set" / (name if name.endswith((".zip", ".npz")) else "")), path / "data", **options)


@pytest.mark.parametrize("n, batch", [(10, 4), (10, 10), (3, 8)])
def test_every_epoch_is_a_permutation(n, batch):
    """Batches run on across epochs; which images a step sees depends on seed and step alone."""
    stream = torch.cat([data.batch_indices(n, step, batch, 5, CPU) for step in range(15)])
    for epoch in stream[:len(stream) // n * n].view(-1, n):
        assert sorted(epoch.tolist()) == list(range(n))
    assert not torch.equal(stream[:n], data.batch_indices(n, 0, n, 6, CPU))


def test_pixels_survive_the_round_trip():
    """uint8 -> [-1, 1] -> uint8 is the identity; values outside are clipped, not wrapped."""
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.from_unit(data.to_unit(levels)), levels)
    assert data.to_unit(levels)[[0, 255]].tolist() == [-1, 1]
    assert data.from_unit(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


@pytest.mark.parametrize("n, size", [(1, 16), (5, 33), (9, 16), (40, 16)])
def test_shapes_are_drawn_from_the_seed(n, size):
    """Ten classes in turn, bright on dark; also fewer images than classes."""
    images, labels = data.draw_shapes(n, size, seed=3)
    again, other = data.draw_shapes(n, size, seed=3)[0], data.draw_shapes(n, size, seed=4)[0]
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert images.shape == (n, 3, size, size) and images.dtype == torch.uint8
    assert labels.tolist() == [i % 10 for i in range(n)] and len(data.SHAPES) == 10
    assert (images.amax((1, 2, 3)) > 150).all() and images[:, :, 0, 0].amax() <= 40


@pytest.mark.parametrize("seed", [0, 1, 1234, 2**31])
def test_test_shapes_are_no_training_shapes(seed):
    """Neither of the same seed, of which torch keeps 32 bits, nor of its neighbours."""
    test = data.open_source("shapes", split="test", num=20, seed=seed).read(0, 20)
    near = [data.open_source("shapes", num=20, seed=abs(seed + i)).read(0, 20) for i in (-1, 0, 1)]
    assert torch.equal(near[1], data.draw_shapes(20, seed=seed)[0])
    assert all((test != train).flatten(1).any(1).all() for train in near)


@pytest.fixture
def folder(tmp_path):
    """12 images of 8 x 8 pixels in class folders `a` and `b`: the folder, the images and their labels."""
    for i, image in enumerate(PIXELS):
        path = tmp_path / "set" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return tmp_path / "set", torch.tensor(np.r_[PIXELS[::2], PIXELS[1::2]]).permute(0, 3, 1, 2), torch.arange(12) // 6


def test_folder_zip_and_npz_are_the_same_dataset(folder):
    """In the same order, also where one class's name begins another's ("-" < "/"). Class folders may be links, as
    torchvision's ImageFolder takes them; a ZIP may hold a folder around them, names with \\ or after ./, and what a Mac
    adds. No folders, no classes."""
    path, images, labels = folder
    (path / "b").rename(path / "a-b")
    os.mkdir("linked")
    for name in ("a", "a-b"):
        Path("linked", name).symlink_to(path / name)
    np.savez("set.npz", images=images.permute(0, 2, 3, 1), labels=labels)
    for i, form in enumerate(("{}/{}", "top/{}/{}", "./{}/{}", "{}\\{}")):
        with zipfile.ZipFile(f"{i}.zip", "w") as archive:
            for file in path.rglob("*.png"):
                archive.writestr(form.format(file.parent.name, file.name), file.read_bytes())
                archive.writestr(f"__MACOSX/top/._{file.name}", b"what a Mac adds")
    (path / "a" / "gone.png").symlink_to("nowhere")
    for source in (path, "linked", "0.zip", "1.zip", "2.zip", "3.zip", "set.npz"):
        dataset = data.load(str(source))
        assert torch.equal(dataset.images, images) and torch.equal(dataset.labels, labels), source
        assert dataset.classes == (["0", "1"] if source == "set.npz" else ["a", "a-b"])
    flat = data.load(str(path / "a"))
    assert torch.equal(flat.images, images[:6]) and flat.classes == [] and not flat.labels.any()


def test_archives_of_edm_have_the_classes_of_their_listing(folder):
    """dataset_tool.py writes folders of a thousand images, which are no classes, and the numbers in dataset.json."""
    path, images, _ = folder
    names = [f"{file.parent.name}/{file.name}" for file in sorted(path.rglob("*.png"))]
    numbers = [3, 0, 1] * 4
    for listed, expected in ((list(zip(names, numbers)), numbers), (None, [0] * 12)):
        (path / "dataset.json").write_text(json.dumps({"labels": listed}))
        dataset = data.load(str(path))
        assert torch.equal(dataset.images, images) and dataset.labels.tolist() == expected
        assert dataset.classes == (["0", "1", "2", "3"] if listed else [])
    for text in ("[", "{}", '{"labels": [["x.png", 1]]}', json.dumps({"labels": [[name, 0.5] for name in names]}),
                 json.dumps({"labels": [[name, -1] for name in names]})):
        (path / "dataset.json").write_text(text)
        with pytest.raises(script.InputError, match="dataset.json|labels"):
            data.open_source(str(path))


def test_decoding_ends_when_asked_to(folder, monkeypatch):
    """Ctrl-C does not wait for what stands in the queue; and a cache that cannot be written costs no training."""
    path, images, _ = folder
    decoded = []

    def interrupted(*_):
        decoded.append(time.sleep(0.05))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "THREADS", ThreadPoolExecutor(1))
        patch.setattr(data, "_pixels", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.open_source(str(path)).read(0, 12)
        data.THREADS.shutdown()
    assert len(decoded) < 12
    Path("bad.zip").write_bytes(zipped("a.png", b"no image"))
    source = data.open_source("bad.zip")
    gc.disable()  # an archive that failed is closed at once, not when somebody clears up
    try:
        archive = weakref.ref(source.read)
        with pytest.raises(script.InputError, match="not a readable image"):
            source.read(0, 1)
        del source
        assert archive() is None
    finally:
        gc.enable()
    Path("file").touch()
    assert torch.equal(data.load(str(path), "file").images, images)


def test_a_folder_is_read_whole_or_refused(folder):
    """What cannot be read is not left out in silence, and nothing is read for ever."""
    path, *_ = folder
    (path / "b" / "back").symlink_to(path)
    with pytest.raises(script.InputError, match="back is a link"):
        data.open_source(str(path))
    if os.geteuid():  # root may read everything
        (path / "b").chmod(0)
        with pytest.raises(OSError):
            data.open_source(str(path))
        (path / "b").chmod(0o700)


def test_images_are_decoded_once(folder, tmp_path, monkeypatch):
    """Until a file changes. Elsewhere, other images may lie under the same names, of the same size and time."""
    path, images, _ = folder
    data.load(str(path), tmp_path / "data")
    for name, colour in (("one", 10), ("two", 200)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), (colour,) * 3).save(tmp_path / name / "a.bmp")
        os.utime(tmp_path / name / "a.bmp", (0, 0))
        assert (data.load(str(tmp_path / name), tmp_path / "data").images == colour).all()
    monkeypatch.setattr(data.Image, "open", None)  # decoding again would fail
    assert torch.equal(data.load(str(path), tmp_path / "data").images, images)
    monkeypatch.undo()
    (path / "a" / "00.png").write_bytes(png(0 * PIXELS[0]))
    assert not data.load(str(path), tmp_path / "data").images[0].any()


def test_images_are_seen_upright_and_cropped_to_the_centre(tmp_path):
    """Where --image-size is given; a camera that was turned says by how much (6: 90 degrees to the right)."""
    pixels = np.pad(np.uint8([[200, 90]] * 2), [(1, 1), (0, 0)], constant_values=7)
    odd, turned = bytes([3, 1, 2, 0, 2, 0, 0, 0, *b"x", 0, 0, 0]), bytes([18, 1, 3, 0, 1, 0, 0, 0, 6, 0, 0, 0])
    exif = b"II*\0" + bytes([8, 0, 0, 0, 2, 0]) + odd + turned + bytes(4)  # the odd tag Pillow reads, and cannot write
    seen = load_files(tmp_path, {"a.png": png(pixels, exif=exif)}, image_size=2).images
    assert seen[0, 0].tolist() == [[200, 200], [90, 90]]


@pytest.mark.parametrize("mode, ending, transparency", [
    ("RGBA", "png", None), ("RGBA", "webp", None), ("LA", "png", None), ("PA", "tif", None), ("P", "gif", 90),
    ("P", "png", 90), ("P", "png", bytes([255] * 90 + [0])), ("L", "png", 90), ("RGB", "png", (90, 90, 90))])
def test_transparent_pixels_are_black(mode, ending, transparency, tmp_path):
    """However a file says that the grey of 90 is transparent."""
    grey = Image.fromarray(np.uint8([[200, 90]] * 2))
    image = grey.convert(mode.replace("PA", "P")).convert(mode)
    if transparency is None:
        image.putalpha(grey.point(lambda level: 255 * (level == 200)))
    image.save(tmp_path / f"a.{ending}", lossless=True, transparency=transparency)
    assert Image.open(tmp_path / f"a.{ending}").mode == mode
    assert data.load(str(tmp_path), tmp_path / "data").images[0, :, 0].tolist() == [[200, 0]] * 3


def test_celeba_is_cropped_to_140_and_resized_to_64(tmp_path, monkeypatch):
    """The score-model convention; torchvision's checks of the text files are skipped for this fake."""
    path = tmp_path / "celeba" / "img_align_celeba" / "000001.png"
    with pytest.raises(script.InputError, match="img_align_celeba"):
        data.open_source("celeba", str(tmp_path))
    path.parent.mkdir(parents=True)
    path.write_bytes(png(np.pad(np.full((140, 140), 255, np.uint8), [(39, 39), (19, 19)])))
    monkeypatch.setattr(torchvision.datasets, "CelebA", Mock(return_value=Mock(filename=[path.name])))
    source = data.open_source("celeba", str(tmp_path))
    assert source.labels is None and source.read(0, 1).eq(torch.full((1, 3, 64, 64), 255)).all()


def test_cifar10_is_resized(tmp_path, monkeypatch):
    """--image-size shrinks it as it shrinks image files, within the rounding."""
    cifar10 = Mock(return_value=Mock(data=PIXELS, targets=[0] * 12, classes="a"), filename="archive", base_folder=".")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar10)
    whole, small = (data.load("cifar10", str(tmp_path), image_size=size).images for size in (None, 4))
    files = load_files(tmp_path, {f"{i:02d}.png": png(image) for i, image in enumerate(PIXELS)}, image_size=4)
    assert (whole.permute(0, 2, 3, 1).numpy() == PIXELS).all() and (small.int() - files.images).abs().max() <= 1


def test_cifar10_that_cannot_be_had(tmp_path, monkeypatch):
    """Without a network, one line says which file to put where; a wrong one is not unpacked."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("service\nnot known")))
    for says in ("--dataset PATH.*service not known", "SHA-256"):
        with pytest.raises(script.InputError, match="cifar-10-python.tar.gz .*" + says):
            data.open_source("cifar10", str(tmp_path))
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("files, says", [
    ({"a.txt": b""}, "holds no images"), ({"a.png": png(PIXELS[0])[:-30]}, "'a.png' is not a readable image"),
    ({"a.png": png(np.zeros((8, 8), np.uint16))}, "a.png.*8 bits"),
    ({"a.tif": png(PIXELS[0], "TIFF", compression="tiff_lzw")}, "a.tif.*compressed"),
    ({"a.png": png(PIXELS[0]), "b.png": png(PIXELS[0, :4])}, "'b.png' and 'a.png' differ in size.*--image-size"),
    ({"a.png": png(PIXELS[0]), "c/b.png": png(PIXELS[0])}, "'a.png' lies beside class folders"),
    ({"x.zip": b""}, "neither a folder"), ({"x.zip": zipped("a.txt", b"")}, "holds no images"),
    ({"x.zip": zipped("a\nb.png", b"")}, "b.png' is not a readable image"), ({"x.npz": b""}, "not a readable .npz"),
    ({"x.npz": zipped("images.npy", LIE)}, "not a readable .npz"),
    ({"x.npz": to_bytes(np.savez, mu=PIXELS)}, "not a readable .npz of `images`, `arr_0` or `latents`"),
    *[({"x.npz": to_bytes(np.savez, arr_0=x)}, "are|pickle") for x in (PIXELS / 2, PIXELS[0], PIXELS[:0], 3, [None])],
    *[({"x.npz": to_bytes(np.savez, images=PIXELS, labels=x)}, "`labels` is|pickle") for x in NO_LABELS]])
def test_what_cannot_be_used_is_refused_in_one_line(files, says, tmp_path):
    with pytest.raises(script.InputError, match=says) as refusal:
        load_files(tmp_path, files)
    assert len(str(refusal.value).splitlines()) == 1


def test_bombs_are_refused_and_large_datasets_are_not(tmp_path):
    """By the size that files declare, before they are unpacked; if they lie, no more is unpacked than they say."""
    bomb = zipped("a.png", bytes(130_000_000))
    lie = bomb.replace((130_000_000).to_bytes(4, "little"), (99).to_bytes(4, "little"))
    bombs = {"x.zip": (bomb, "over 400 fold"), "x.npz": (bomb, "over 400 fold"), "y.zip": (lie, "CRC"),
             "a.png": (png(np.zeros((10_000, 10_000), bool)), "10000x10000 pixels, at most 67,108,864")}
    tracemalloc.start()
    for name, (content, says) in bombs.items():
        with pytest.raises(script.InputError, match=says):
            load_files(tmp_path / name[0], {name: content})
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    flat = np.tile(data.draw_shapes(100, 64)[0].permute(0, 2, 3, 1), (58, 1, 1, 1))  # 70 MB, packed to a 25th
    assert len(load_files(tmp_path, {"x.npz": to_bytes(np.savez_compressed, images=flat)}).images) == 5800


def test_mutated_files_are_read_or_refused(tmp_path, recwarn, capfd):
    """InputError is the only exception, its message one line, and no warning is printed."""
    g = np.random.default_rng(0)
    files = {"x.npz": to_bytes(np.savez, images=PIXELS, labels=[0] * 12), "x.zip": zipped("a.png", png(PIXELS[0]))}
    files |= {f"a.{kind.lower()}": png(PIXELS[0], kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")}
    files |= {"a.tif": png(PIXELS[0], "TIFF", compression="tiff_deflate")}
    for i, (name, content) in enumerate([*files.items()] * 3):
        content = np.frombuffer(content[:len(content) - 99 * (i % 2)], np.uint8).copy()
        content[g.integers(0, 300, 4) % len(content)] = g.integers(0, 256, 4)
        try:
            load_files(tmp_path / str(i), {name: content.tobytes()})
        except script.InputError as error:
            assert len(str(error).splitlines()) == 1
    assert not [w for w in recwarn if w.category is not ResourceWarning] and not capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------
# flops.py

CHANGES = [{}, {"conditioning": "shared"}, {"factorise": "attention-mlp", "dense_mlp_blocks": 1},
           {"image_size": 12, "patch": 4, "channels": 1, "keep": 0.25, "width": 64, "depth": 1}]


def training_state(config, t_low=1, **given):
    """Settings and state in a stage of a curriculum; all weights matter, and the optimiser does w <- w - gradient."""
    s = train.choose_settings({"model": "tiny", "method": config.method, **given})
    state = train.State(s, config, CPU)
    state.model = awake(config)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    state.curriculum = Curriculum([t_low], T, 1)
    return s, state


def batch_of(config, t, share=None):
    """Random images in [-1, 1], labels and noise for the timesteps t."""
    x_0, _, y = inputs(config, len(t), seed=1)
    return train.Batch(x_0.clamp(-1, 1), y, inputs(config, len(t), seed=2)[0], torch.tensor(t), share)


class TorchsCounter(TorchDispatchMode):
    """torch.utils.flop_counter's formulas, applied to every operator: FlopCounterMode without its slow search
    inside of operators that have none."""
    total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        if operator._overloadpacket in flop_registry:
            self.total += flop_registry[operator._overloadpacket](*args, **kwargs or {}, out_val=result)
        return result


@contextlib.contextmanager
def multiply_adds(counted):
    """Appends what torch's own counter, which books 2 for each, finds inside. Fused attention it may not know."""
    with sdpa_kernel(SDPBackend.MATH), TorchsCounter() as counter:
        yield
    counted.append(counter.total // 2)


@pytest.mark.parametrize("method", model.METHODS)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_sampling_is_torchs_count(method, changes):
    """Eq. (5), (6): passes sliced to Phi(t), two with guidance; without channels given, a pass computes all of them."""
    config = Config(**SMALL | changes, method=method)
    net, (x, t, _), y = awake(config), inputs(config, 1), torch.tensor([0])
    with torch.no_grad(), multiply_adds(counted := []):
        [*sample.ddim(net, x, 3, y, 1.0)]
    passes = [flops.one_image(config, t)[0] for t in schedule.sampling_timesteps(3)[:-1]]
    assert counted == [sum(passes)] == [flops.sampling(config, 3)] and len(passes) == 3
    assert flops.sampling(config, 3, guidance=2.0) == 2 * sum(passes)
    with torch.no_grad(), multiply_adds(counted := []):
        net(x, t, y, {r: Channels(r) for r in net.ranks})
    assert counted == [flops.one_image(config, 1)[0]] == [sum(p.size for p in flops.products(config))]


@pytest.mark.parametrize("method", ["full", "static", "iso-param", "elastic", PEAK])  # PEAK is of iso-compute
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_training_step_is_torchs_count(method, changes):
    """Forward, backward and penalty of train.train_step, over slices that each compute what their neediest sample
    needs, by its t or the share that it drew; and the teacher's pass of --distil."""
    given = dict(rank_profile=PEAK) if method == PEAK else dict(method=method, rho_min=0.1)
    config, t = Config(**SMALL | changes | given), [350, 600, 601, 800, T]
    s, state = training_state(config, t_low=200)
    elastic, share = method == "elastic", schedule.elastic_shares(5, 0.1)
    for slices, penalty, distil in ((1, 0.0, 0.0), (3, 0.1, 1.0 * elastic), (9, 0.1, 0.0)):
        count = lambda i, step, processes: flops.train_step(
            config, t[i::step], slices, 200, penalty > 0, processes, *([share[i::step], distil > 0] if elastic else []))
        with multiply_adds(counted := []):
            batch = batch_of(config, t, share if elastic else None)
            train.train_step(state.model, state, batch, replace(s, orthogonality=penalty, distil=distil), slices)
        assert counted == [count(0, 1, 1)] and count(0, 1, 2) == count(0, 2, 1) + count(1, 2, 1)
    s = replace(s, batch_size=8, distil=1.0)  # what a run is compared with: a step of its neediest t, without slices
    more = dict(share=schedule.elastic_shares(8, 0.1), distil=True) if elastic else {}
    whole = flops.train_step(config, [500 if method == PEAK else 1] * 8, **more)
    assert train.Run(Path(), s, state, None, script.Processes(CPU)).masked_cost == whole
    if str(method).startswith("iso"):
        assert flops.train_step(config, t, 3) < flops.train_step(config, t, 2) < flops.train_step(config, t, 1)
    assert flops.train_step(config, t, 10**12) == flops.train_step(config, t, 5)


@pytest.mark.parametrize("changes", [{}, dict(width=24, keep=0.77), dict(width=64, keep=0.5)], ids=str)
def test_the_share_that_a_budget_pays_for(changes):
    """The largest whose pass takes at most this part of the multiply-adds of all channels."""
    config = Config(**ELASTIC | changes)
    cost = lambda share: flops.one_image(config, 1, share=share)[0] / flops.one_image(config, 1)[0]
    grid = {i / 2000: cost(i / 2000) for i in range(1, 2001)}
    for budget in [0.3 + i / 50 for i in range(36)] + [cost(i / 40) for i in range(1, 41)]:
        share = flops.budget_share(config, budget)
        assert cost(share) <= budget * (1 + 1e-9)
        assert all(more > budget for other, more in grid.items() if other > share), budget
    assert flops.budget_share(config, 1) == 1
    with pytest.raises(ValueError, match="one channel"):
        flops.budget_share(config, cost(1e-9) - 1e-6)


def test_a_training_run_adds_up_its_stages():
    """2.2: steps of a typical batch in each stage, at t_low = 1 outside of them; slices save what random ones do."""
    config = Config(**SMALL)
    c, total = Curriculum([1, 400, 900], T, 10), 0
    for c.stage, n in enumerate((2, 3, 5)):
        cumulative = c.probabilities().cumsum(0)
        t = [int((cumulative > (i + 0.5) / 8).nonzero()[0]) for i in range(8)]
        total += n * flops.train_step(config, t, 3, c.t_low)
    assert flops.training_run(config, 10, 8, [(2, 900), (3, 400)], slices=3) == total
    assert flops.training_run(config, 10, 8, [(2, 900), (3, 400)]) > total
    assert flops.training_run(config, 10, 8) == 10 * flops.training_run(config, 1, 8)
    with pytest.raises(ValueError, match="12 steps of a run of 10"):
        flops.training_run(config, 10, 4, [(12, 400)])
    g, c = torch.Generator().manual_seed(0), Curriculum([1], T, 1)
    drawn = [flops.train_step(config, c.sample(32, g).tolist(), 6, penalty=False) for _ in range(100)]
    assert flops.training_run(config, 1, 32, penalty=False, slices=6) == pytest.approx(np.mean(drawn), rel=0.02)


def test_the_report_compares_the_model_with_its_siblings():
    """Parameters, passes, sampling and training of this model, only masked, static and full."""
    config, common = Config(**model.PRESETS["tiny"], image_size=16), ["--steps", 100, "--batch-size", 8]
    out = done(flops, *common)
    report = json.loads(done(flops, "--json", *common, "--slices", 3), parse_constant=pytest.fail)
    rows, static = {row["name"]: row for row in report["models"]}, replace(config, method="static")
    spent = flops.training_run(config, 100, 8, flops.longest_curriculum(100, 10, 0.2), slices=3)
    assert list(rows) == ["this model", "only masked", "static", "full"] and rows["this model"]["training"] == spent
    assert rows["only masked"]["training"] == flops.training_run(config, 100, 8)
    assert rows["static"]["training"] == flops.training_run(static, 100, 8)
    assert rows["static"]["sampling_guided"] == 2 * rows["static"]["sampling"] == 2 * flops.sampling(static)
    saved = 1 - flops.sampling(config) / flops.sampling(replace(config, method="full"))
    assert next(line for line in out.splitlines() if line.startswith("full ")).split()[7] == f"{saved:.1%}"
    report = json.loads(done(flops, "--json", "--method", "static", "--num-classes", 0, "--orthogonality", 0, *common))
    assert [row["name"] for row in report["models"]] == ["this model", "full"]
    assert report["models"][0]["sampling_guided"] is None  # without classes there is nothing to guide with
    static = replace(static, num_classes=0)
    assert report["models"][0]["training"] == flops.training_run(static, 100, 8, penalty=False)


# ----------------------------------------------------------------------------------------------------
# sample.py


@pytest.mark.parametrize("predict", ["v", "x0"])
@pytest.mark.parametrize("clip", [True, False])
def test_samplers_take_any_model_as_they_take_its_eps(predict, clip):
    """Every image on the way, of DDIM and DDPM, is that of the callable eps(x, t) that the model's answers amount to;
    and x_0 takes no detour over eps, which in float32 would cost it four digits at t = T."""
    net = awake(Config(**SMALL, predict=predict))
    x, y = inputs(net.config, 2)[0], torch.tensor([1, 3])

    def eps(x, t):
        signal, noise = AB[t].sqrt(), (1 - AB[t]).sqrt()
        answer = net(x, torch.full((2,), t), y).float().double()  # float32, as a model hands it on
        return noise * x + signal * answer if predict == "v" else (x - signal * answer) / noise

    for sampler, more in ((sample.ddim, {}), (sample.ddpm, {"noise": lambda: x.flip(0)})):
        ours, theirs = (list(sampler(m, x, 6, y, 1.0, clip, **more)) for m in (net, eps))
        assert len(ours) == 6 and relative(ours, theirs) < 1e-5
    net, coarse = net.float(), x.float()
    x_0, _ = sample.denoiser(net, y, 1.0, clip=False)(coarse, T)
    answer = net(coarse, torch.full((2,), T), y).double()
    exact = AB[T].sqrt() * coarse.double() - (1 - AB[T]).sqrt() * answer if predict == "v" else answer
    assert clip or relative(x_0.double(), exact) < 1e-5


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_guidance_of_two_ranks(shares):
    """out_2 + w (out_1 - out_2), each pass with channels of its own: the second one's never exceed the first one's. A
    pass without weight, or like the other, is left out; at equal ranks both run as one batch."""
    net, x, none = awake(Config(**ELASTIC)), inputs(Config(**ELASTIC), 3)[0], torch.full((3,), 4)
    first = [share for start, share in shares.ranks if start <= 800][-1]
    second = min(first, shares.guide)
    of = lambda y, share: net(x, torch.full((3,), 800), y, {r: Channels(math.ceil(share * r)) for r in net.ranks})
    for labels, w in itertools.product((torch.tensor([0, 1, 0]), None), (0.0, 1.0, 2.0, -0.5)):
        y, seen = none if labels is None else labels, []
        told = y if shares.guide_class == "same" else none
        with net.blocks[0].register_forward_hook(lambda _, arguments, out: seen.append(len(out))):
            found = sample.guided(net, labels, w, shares)(x, 800)
        out_1, out_2 = of(y, first), of(told, second)
        assert relative(found, (out_2 + w * (out_1 - out_2)).float()) < 1e-5
        both = w not in (0, 1) and not (second == first and y.equal(told))
        assert seen == ([3] if not both else [6] if second == first else [3, 3])


def test_an_image_does_not_depend_on_its_batch():
    """One seed per image: image i starts from the same noise, and in DDPM meets the same noise, in any batch."""
    net = awake(Config(**SMALL), dtype=torch.float32)
    draw = lambda indices, seed=7: sample.draw_images(net, indices, [2, 0], seed, "ddpm", 5)
    together, labels = draw(range(6))
    apart = torch.cat([draw(range(0, 1))[0], draw(range(1, 4))[0], draw(range(4, 6))[0]])
    assert (together.int() - apart.int()).abs().max() <= 1 and labels.tolist() == [2, 0, 2, 0, 2, 0]
    assert not torch.equal(draw(range(6), 8)[0], together)


def test_sample_script_writes_a_grid_an_array_and_a_folder(run, tmp_path):
    """--first N draws images N, N + 1, ... of one large call; --dtype is that of the matrix products."""
    common = ["--run", run, "--steps", 3, "--batch-size", 2, "--device", "cpu", "--classes", "3,star"]

    def written(name, *arguments):
        assert "guidance 2" in done(sample, *common, "--out", tmp_path / name, *arguments)
        return data.load(str(tmp_path / name)) if name.endswith(".npz") else None  # what fid.py reads

    images, rest = written("x.npz", "--num", 5), written("rest.npz", "--first", 3, "--num", 2)
    for name in ("x.png", "folder"):
        written(name, "--num", 5)
    written("folder 2", "--first", 12, "--num", 2)
    assert images.images.shape == (5, 3, 8, 8) and images.labels.tolist() == [3, 7, 3, 7, 3]
    assert (rest.images.int() - images.images[3:]).abs().max() <= 1 and rest.labels.tolist() == [7, 3]
    assert (rest.images.int() - images.images[:2]).abs().max() > 50
    assert sorted(os.listdir(tmp_path / "folder")) == [f"{i:06d}.png" for i in range(5)]
    assert sorted(os.listdir(tmp_path / "folder 2")) == ["000012.png", "000013.png"]
    with np.load(tmp_path / "x.npz") as file:
        array = file["arr_0"]
    assert array.shape == (5, 8, 8, 3) and array.dtype == np.uint8
    assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / "000004.png")), array[4])
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    assert np.array_equal(grid[2:66:8, 2:66:8], array[0])  # two columns of images enlarged to 64 pixels
    coarse = written("coarse.npz", "--num", 5, "--dtype", "bfloat16").images.int()
    assert (coarse != images.images).any() and (coarse - images.images).abs().float().mean() < 2


class Attack:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("write", [
    lambda file: torch.save({"config": Attack()}, file), lambda file: pickle.dump(Attack(), file, protocol=2),
    lambda file: pickle.dump({"config": np.float64(1), "model": np.arange(3)}, file),
    lambda file: torch.save({"config": np.float64(1), "model": np.arange(3)}, file)], ids=range(4))
def test_a_checkpoint_of_other_things_is_refused_unopened(write):
    """Nothing but tensors and plain values is ever unpickled; and torch's or numpy's remarks add no line to ours."""
    with open("model.pt", "wb") as file:
        write(file)
    refuses(sample, "--run", ".", says="model.pt cannot be loaded")
    assert os.listdir() == ["model.pt"]


@pytest.mark.parametrize("arguments, says", [
    (["--classes", 10], ("'10'", "0 to 9")), (["--classes", "1" * 5000], "is unknown"), (["--num", 0], "at least 1"),
    (["--classes", "0,unicorn"], "unicorn"), (["--steps", 1001], "at most 1000"), (["--seed", -1], "seed"),
    (["--seed", 2**64], "seed"), (["--first", -1], "first"), (["--guidance", "nan"], "finite"),
    (["--sampler", "euler"], "ddim"), (["--device", "tpu"], "tpu"), (["--batch-size", -3], "at least 1"),
    (["--out", "x.jpg"], "FILE.png"), *((["--budget", budget], "--budget") for budget in (0, 2, "nan")),
    (["--budget", 0.01], ("smallest", "0.1,")), (["--budget", 0.5, "--ranks", "p.json"], "exclude each other"),
    (["--ranks", "p.json"], "share 0.07 was not trained"), (["--ranks", "linear"], "--ranks"),
    *((["--ranks", name], "JSON") for name in ("", "none.json", ".")), (["--guide-share", 0.05], "0.1 to 1"),
    *((["--guide-share", share], "at most 1") for share in (0, 1.5, "nan")),
    (["--guide-class", "same"], "give a --guide-share"),
    (["--budget", 0.5, "--guide-share", 0.9, "--guide-class", "same"], "give a --guide-share")], ids=str)
def test_sample_script_refuses(elastic_run, arguments, says):
    """In a line, with nothing written: also shares that were not trained."""
    Path("p.json").write_text(PROFILE)
    before = sorted(elastic_run.rglob("*"))
    refuses(sample, "--run", elastic_run, *arguments, says=says)
    assert sorted(elastic_run.rglob("*")) == before and os.listdir() == ["p.json"]


@pytest.mark.parametrize("arguments, says", [
    ([], ""), (["--budget", 0.5], "share 0.36 of"), (["--budget", 1], "share 1 of"), (["--ranks", "p.json"], ""),
    (["--guide-share", 0.25], ""), (["--guide-share", 0.25, "--guide-class", "same"], ""),
    (["--ranks", "p.json", "--guide-share", 0.4, "--guide-class", "same"], ""), (["--budget", "least"], "share 0.1"),
    (["--guide-share", 0.25, "--guidance", 0], ""), (["--guide-share", 0.25, "--guidance", 1], ""),
    (["--budget", 0.5, "--guide-share", 0.9, "--sampler", "ddpm"], ""), (["--sampler", "heun", "--steps", 4], ""),
    (["--sampler", "dpm++", "--budget", 0.5], "share 0.36 of")], ids=str)
def test_sample_script_at_any_share(elastic_run, arguments, says):
    """It prints the multiply-adds that torch counts, and what is saved; the least budget is the one that it names."""
    if "least" in arguments:
        arguments = ["--budget", cli(sample, "--run", elastic_run, "--budget", 0.01)[2].split("takes ")[1].split()[0]]
    Path("p.json").write_text(PROFILE.replace("0.07", "0.1"))
    with multiply_adds(counted := []):
        out = done(sample, "--run", elastic_run, "--num", 1, "--steps", 3, *arguments, "--out", "x.png")
    assert f"{flops.amount(*counted)} multiply-adds an image" in out and says in out
    full = flops.sampling(sample.load_model(elastic_run, CPU)[0].config, 3, 1.0 if "--guidance" in arguments else 2.0)
    assert (f", {1 - counted[0] / full:.1%} less than" in out) == (counted[0] < full)


def test_a_grid_that_is_asked_otherwise_has_another_name(elastic_run):
    """And its columns are those of the classes from its first image on."""
    shutil.copytree(elastic_run, "r")
    for arguments, name, columns in (
            (["--first", 4, "--classes", "3,star,0"], "first-4_classes-3,star,0", "star, circle, triangle"),
            (["--classes", "3,star", "--no-clip"], "classes-3,star_clip-False", "triangle, star"),
            (["--guidance", 1.5, "--budget", 0.5], "guidance-1.5_budget-0.5", ", ".join(data.SHAPES)),
            (["--guide-share", 0.25], "guide_share-0.25", ", ".join(data.SHAPES)),
            (["--guide-share", 0.25, "--guide-class", "same"], "guide_share-0.25_guide_class-same",
             ", ".join(data.SHAPES))):
        assert f"columns: {columns}\n" in done(sample, "--run", "r", "--num", 10, "--steps", 2, *arguments)
        assert Path(f"r/samples/ddim2_seed0_num-10_{name}.png").exists()
    assert "columns: circle, ring\n" in done(sample, "--run", "r", "--num", 2, "--steps", 1)  # what there is
    refuses(sample, "--run", "r", "--classes", ",".join("3" * 200), says=("too long", "--out"))


def test_sample_script_refuses_files_that_are_no_runs_and_shares_of_other_methods(run):
    refuses(sample, says="no run under runs/")
    refuses(sample, "--run", "nowhere", says=("model.pt does not exist", "train.py"))
    os.mkdir("r")
    whole, state = (run / "model.pt").read_bytes(), saved(run, "model.pt")
    for content in (whole[:len(whole) // 2], b"", b"hello"):
        Path("r/model.pt").write_bytes(content)
        refuses(sample, "--run", "r", says="cannot be loaded")
    for content, says in (({"weights": torch.ones(3)}, "not a file that train.py wrote"),
                          (state | {"config": state["config"] | {"width": 64}}, "does not describe a model"),
                          (state | {"config": [1]}, "does not describe a model"), (state | {"classes": [3]}, "names")):
        torch.save(content, "r/model.pt")
        refuses(sample, "--run", "r", says=says)
    refuses(sample, "--run", run, "--out", "r", says="not an empty folder")
    refuses(sample, "--run", run, "--out", "r/model.pt/x/y.png", says="r/model.pt is no folder")
    Path("p.json").write_text(PROFILE)
    for shares in (["--budget", 0.5], ["--ranks", "p.json"], ["--guide-share", 0.5], ["--guide-class", "same"]):
        refuses(sample, "--run", run, *shares, says="take a run of --method elastic")
    assert sorted(os.listdir()) == ["p.json", "r"] and os.listdir("r") == ["model.pt"]
    del state["config"]["predict"]  # of an older version
    torch.save(state, "r/model.pt")
    assert [sample.load_model(folder, CPU)[0].config.predict for folder in (run, "r")] == ["v", "eps"]


# ----------------------------------------------------------------------------------------------------
# script.py


@dataclass(frozen=True)
class Knobs:
    hidden: int = script.setting(3)
    count: int | None = script.setting(None, "how many", low=0, high=9)
    rate: float = script.setting(0.5, "how fast: 100 %", above=0)
    mode: str = script.setting("a", "which", choices=("a", "b"))
    on: bool = script.setting(True, "whether")


def test_flags_and_checks_come_from_the_fields(capsys):
    """One field carries default, bounds and help; what is not given is None; a wrong value names its flag."""
    parser = script.Parser(prog="x.py")
    script.add_flags(parser, Knobs)
    read = lambda *words: vars(parser.parse_args(words))
    assert read() == dict(count=None, rate=None, mode=None, on=None)
    assert read("--count", "4", "--rate", "1e-3", "--no-on") == dict(count=4, rate=1e-3, mode=None, on=False)
    assert "(default 0.5)" in parser.format_help() and "100 %" in parser.format_help()
    for words in (["--count", "4.5"], ["--mode", "c"], ["--hidden", "1"], ["--mo", "a"], ["--rate", "x"]):
        with pytest.raises(SystemExit, match="2"):
            read(*words)
        assert capsys.readouterr().err.count("\n") == 1
    script.check_fields(Knobs()), script.check_fields(Knobs(count=9, rate=1e-9, on=False))
    for wrong in (dict(count=10), dict(count=-1), dict(count=2.0), dict(count=True), dict(rate=0), dict(rate=math.inf),
                  dict(rate=10**400), dict(rate=None), dict(mode=["a"]), dict(mode={}), dict(on=1), dict(hidden="3")):
        with pytest.raises(script.InputError, match="--" + next(iter(wrong))):
            script.check_fields(Knobs(**wrong))
    with pytest.raises(script.InputError, match="above 0, below"):
        script.check_fields(Knobs(rate=1e300))
    for module in (train, sample, flops):  # --help teaches
        assert f"python {module.__name__}.py" in done(module, "--help")


@pytest.mark.parametrize("error, status, says", [
    (script.InputError("no such thing"), 2, "x.py: no such thing\n"), (OSError(28, "No space left"), 2, "No space"),
    (KeyboardInterrupt(), 130, "interrupted"), (MemoryError(), 2, "memory"), (RuntimeError("a bug"), None, "a bug"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "memory")])
def test_what_a_script_ends_with(error, status, says, capsys, monkeypatch):
    """One line and a status for what a person can mend; a bug of ours keeps its traceback."""
    def main():
        raise error
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit if status else RuntimeError, match=str(status or says)):
        script.run_script(main)
    err = capsys.readouterr().err
    assert not status or says in err and len(err.strip().splitlines()) == 1


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(TypeError):
        script.write_then_rename(tmp_path / "f", lambda file: file.write(b"ne") and file.write(None))
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


# ----------------------------------------------------------------------------------------------------
# train.py


@pytest.mark.parametrize("predict, given, distil", [
    *((predict, {}, 0.0) for predict in PREDICTIONS), ("v", dict(rank_profile=PEAK), 0.0), ("eps", ELASTIC, 0.0),
    ("v", ELASTIC, 0.7), ("v", dict(conditioning="shared", rank_profile="linear", rho_min=0.1, warm_start=0.0), 0.0),
    ("eps", dict(factorise="attention-mlp", keep=0.9), 0.0)], ids=str)
def test_a_step_of_one_or_more_slices(predict, given, distil):
    """Eq. (4), --slices N: the gradient of the mean of w(t) |error|^2 over the batch, and of the penalty over the
    channels that the stage uses from t_low up, whatever the batch needs; it returns the unweighted losses. All other
    channels get a gradient of exactly zero: with momentum from a rounding, AdamW would move them. --distil W adds W
    |difference|^2 to what the model itself says with all its channels, which is given: no gradient goes there."""
    config = Config(**SMALL | given, predict=predict)
    s, state = training_state(config, 300, weighting="p2", orthogonality=0.1, distil=distil)
    before, share = copy.deepcopy(state.model), schedule.elastic_shares(7, 0.1) if config.method == "elastic" else None
    batch, phi = batch_of(config, [700, 720, 800, 801, 950, 990, T], share), config.rank_schedule()
    most = {r: int(phi.table(r)[300:].max()) if phi else r for r in before.ranks}
    amplitudes, t, losses, error = NOISE.coefficients(batch.t), batch.t, [], 0
    x_t = schedule.add_noise(batch.x_0, batch.eps, *amplitudes)
    target = schedule.target(predict, batch.x_0, batch.eps, *amplitudes)
    weights = schedule.loss_weight("p2", NOISE, predict, Curriculum([300], T, 1).probabilities())[t]
    for i in range(7):  # naively, sample by sample
        k = {r: Channels(phi.active(int(t[i]), r) if phi else math.ceil(share[i] * r)) for r in before.ranks}
        answer, full = (before(x_t[i:i + 1], t[i:i + 1], batch.y[i:i + 1], k) for k in (k, {r: Channels(r) for r in k}))
        losses.append((answer - target[i]).square().mean())
        error = error + weights[i] * (losses[i] + distil * (answer - full.detach()).square().mean()) / 7
    loss = error + 0.1 * lowrank.orthogonality_penalty(before, {r: Channels(k) for r, k in most.items()})
    expected, losses = gradients(loss, *before.parameters()), torch.stack(losses)
    layers = list(zip(lowrank.low_rank_layers(state.model), lowrank.low_rank_layers(before)))
    for n in (1, 2, 3, 5, 9):
        state.model.load_state_dict(before.state_dict())
        assert relative(train.train_step(state.model, state, batch, s, n), losses) < 1e-6
        steps = [old - new for old, new in zip(before.parameters(), state.model.parameters())]
        assert relative(steps, expected) < 1e-6  # losses are float32
        for layer, old in layers:
            low, high = most[layer.rank], phi.active(700, layer.rank) if phi else 0
            assert torch.equal(layer.U[low:], old.U[low:]) and not torch.equal(layer.U[high:low], old.U[high:low])
    state.ema = copy.deepcopy(before).requires_grad_(False)
    train.update_ema(state, s)
    assert not any(p.grad_fn for p in state.ema.parameters())  # or every step would leave a piece of graph behind


@pytest.mark.parametrize("given", [{}, dict(rank_profile=PEAK), ELASTIC], ids=str)
def test_a_batch_comes_by_falling_rank(given):
    """Its timesteps are those that the curriculum draws: ascending for the paper's Phi, by falling Phi(t) for any
    other, and in an order drawn by chance beside the falling shares of an elastic model."""
    config, dataset = Config(**SMALL | given), data.load("shapes", image_size=8, num=100)
    s, state = training_state(config, t_low=100)
    for state.step in range(9):
        g = torch.Generator().set_state(state.host_rng.get_state())
        expected = state.curriculum.sample(64, g)
        batch = train.draw_batch(dataset, state, s)
        part, t, share = batch.part(slice(1, None, 2)), batch.t, batch.share
        assert torch.equal(t.sort().values, expected) and torch.equal(part.t, t[1::2]) and len(part.x_0) == 32
        if given is ELASTIC:
            assert torch.equal(t, expected[torch.randperm(64, generator=g)]) and torch.equal(part.share, share[1::2])
            assert torch.equal(share, schedule.elastic_shares(64, 0.1, g)) and (share.diff() <= 0).all()
        else:
            phi = config.rank_schedule().active(t, max(state.model.ranks))
            assert share is part.share is None and (phi.diff() <= 0).all() and (given or torch.equal(t, expected))


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_losses_and_multiply_adds_of_the_log(predict, tmp_path, monkeypatch):
    """Reported losses are those of eps, so that runs compare; the curriculum observes those of what is predicted (in
    the scale of eps, that of v at T would be 2e-9), all of them, at log lines. Multiply-adds: every slice's."""
    steps, seen, ema, observe = [], [], train.update_ema, Curriculum.observe

    def after_a_step(state, s):
        steps.append((state.timesteps[-1], state.losses[-1], state.curriculum.t_low))
        ema(state, s)

    def recorded_observe(self, first_step, losses):
        observe(self, first_step, losses)
        seen.append((first_step, losses))
        self.since_best = self.patience  # as after 200 steps without improvement

    monkeypatch.setattr(train, "update_ema", after_a_step)
    monkeypatch.setattr(Curriculum, "observe", recorded_observe)
    quick_training("--steps", 20, "--curriculum-share", 1, "--predict", predict, "--weighting", "p2", "--slices", 2,
                   "--out", tmp_path / "r")
    log, factor = log_of(tmp_path / "r"), schedule.eps_loss_factor(predict, NOISE)
    assert [line["stage"] for line in log] == [0, 1, 2, 3] and [first for first, _ in seen] == [0, 5, 10, 15]
    for i, (line, (_, observed)) in enumerate(zip(log, seen)):
        t, losses, _ = zip(*steps[5 * i:5 * i + 5])
        t, losses = torch.stack(t), torch.stack(losses).double()
        assert observed == pytest.approx(losses.mean(1).tolist())
        of_eps = losses * factor[t]
        assert line["loss"] == pytest.approx(of_eps.mean().item())
        for (first, end), loss in zip(itertools.pairwise([1, 34, 359, 901, 991, T + 1]), line["loss_by_group"]):
            inside = of_eps[(first <= t) & (t < end)]
            assert loss == (pytest.approx(inside.mean().item()) if len(inside) else None)
    config, _ = train.read_config(tmp_path / "r")
    assert log[-1]["flops"] == sum(flops.train_step(config, t.tolist(), 2, t_low) for t, _, t_low in steps)


def assert_same(a, b, place="state.pt"):
    """Nested dicts and lists of tensors and plain values, to the last bit."""
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b), place
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key], f"{place}/{key}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, place


@pytest.fixture(scope="module")
def thirty_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "r"
    return folder, quick_training("--steps", 30, "--sample-every", 10, "--out", folder)


# what another process does that finds the lock of a folder free
LOCK = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); "


def test_ctrl_c_saves_a_run(tmp_path, monkeypatch):
    """It ends after the step, with everything saved. Until then the folder is locked for other processes."""
    folder, lock, draw, refused = tmp_path / "r", tmp_path / "r" / ".lock", train.draw_batch, []

    def draw_batch(dataset, state, s):
        if state.step == 7:
            other = subprocess.run([sys.executable, "-c", LOCK, lock], capture_output=True, text=True)
            refused.append("BlockingIOError" in other.stderr)
            os.kill(os.getpid(), SIGINT)
        return draw(dataset, state, s)

    monkeypatch.setattr(train, "draw_batch", draw_batch)
    monkeypatch.setitem(model.PRESETS, "tiny", ONE_BLOCK)
    code, _, err = cli(train, *QUICK, "--steps", 100, "--out", folder)
    assert code == 130 and refused == [True] and "--resume" in err and "Traceback" not in err
    state = saved(folder)
    assert state["step"] == 8 and len(state["losses"]) == len(state["timesteps"]) == 8 % 5


def test_a_second_training_is_refused(run, tmp_path):
    """While another process holds its folder, and also when both have just begun and nothing is written yet."""
    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "new").mkdir()
    for folder, arguments in (("r", ["--resume", "--steps", 9]), ("new", [*QUICK, "--steps", 5])):
        hold = [sys.executable, "-c", f"{LOCK} print(flush=True); sys.stdin.read()", tmp_path / folder / ".lock"]
        holder = subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holder.stdout.readline()
        refuses(train, *arguments, "--out", tmp_path / folder, says="another process")
        holder.communicate()
    assert os.listdir(tmp_path / "new") == [".lock"]


def test_the_log(thirty_steps):
    """Stage, range, active rank, learning rate, five loss groups (null where empty). No sample grid before all groups
    are in: it is drawn through all timesteps. AdamW's state is no older than the last group, C.3.4."""
    folder, out = thirty_steps
    log, (config, s) = log_of(folder), train.read_config(folder)
    assert [line["step"] for line in log] == [5, 10, 15, 20, 25, 30]
    assert log[0]["loss_by_group"][:2] == [None] * 2 and log[0]["loss_by_group"][4] > 0 and log[0]["stage"] >= 1
    assert (log[-1]["stage"], log[-1]["t_low"], log[-1]["t_high"]) == (9, 1, T) and log[-1]["loss_by_group"][2] > 0
    r = max(layer.rank for layer in model.linear_layers(config) if layer.rank)
    for line in log:
        assert line["active_rank"] == config.rank_schedule().active(line["t_low"], r) and line["images_per_s"] > 0
        begun = max(math.ceil(Fraction(12 * j, 9)) for j in range(line["stage"] + 1))  # 40 % of 30 steps, nine groups
        assert line["lr"] == train.learning_rate(line["step"] - 1, begun, line["stage"], s)
    for word in ("parameters", "rank", "multiply-adds a step", "device", "left", "final.png", "python sample.py"):
        assert word in out
    # the last group came at step 12
    assert sorted(os.listdir(folder / "samples")) == ["final.png", "step_0000020.png"]
    state = saved(folder)
    assert [int(moments["step"]) for moments in state["optimizer"]["state"].values()] == [30 - 12] * len(state["model"])


def images_of_nothing():
    """Flags that name twelve images of 8 x 8 pixels without labels."""
    np.savez("x.npz", images=PIXELS)
    return ["--dataset", "x.npz", "--model", "tiny"]


def test_images_without_classes(monkeypatch):
    """They train with the label "no class"; guidance has nothing to guide with; their size may be given again."""
    folder, more = Path("r"), ["--batch-size", 4, "--steps", 2, "--sample-every", 0, "--device", "cpu"]
    monkeypatch.setitem(model.PRESETS, "tiny", ONE_BLOCK)
    done(train, *images_of_nothing(), *more, "--out", folder)
    config, s = train.read_config(folder)
    assert config.num_classes == 0 and s.image_size is None
    out = done(sample, "--run", folder, "--num", 2, "--steps", 2, "--guidance", 3, "--out", "x.png")
    assert "note: --guidance has no effect" in out and "guidance 3" not in out and Path("x.png").exists()
    done(sample, "--run", folder, "--num", 2, "--steps", 2, "--out", "y.npz")
    assert data.load("y.npz").classes == []  # or a model of them would have one
    refuses(sample, "--run", folder, "--classes", "0", says="without classes")
    refuses(train, "--resume", "--out", folder, "--image-size", 16, says="leave --image-size out")
    assert "after step 2" in done(train, "--resume", "--out", folder, "--steps", 3, "--image-size", 8)


@pytest.mark.parametrize("arguments, without_effect", [
    ("--method full --keep 0.25 --rho-min 0.9 --factorise all --dense-mlp-blocks 0 --orthogonality 1",
     "keep rho-min factorise dense-mlp-blocks orthogonality curriculum-share"),
    ("--method static --rank-profile linear --warm-start 0 --rank-multiple 2 --slices 2 --keep 0.3",
     "rank-profile warm-start rank-multiple slices curriculum-share"),
    ("--curriculum-groups 0 --curriculum-alpha 0.5 --curriculum-sampling uniform --no-restart",
     "curriculum-alpha curriculum-sampling restart curriculum-share"),
    ("--dataset x.npz --label-dropout 0.5 --guidance 1", "label-dropout guidance"),
    ("--method elastic --rank-profile p.json --rho-min 0.3 --warm-start 0 --rank-multiple 2 --slices 2 --distil 1",
     "rank-profile warm-start rank-multiple curriculum-share"),
    ("--method static --rank-profile p.json --rho-min 0.3 --warm-start 0 --distil 1",
     "rank-profile rho-min warm-start distil curriculum-share"),
    ("--rank-profile p.json --rho-min 0.3 --warm-start 0 --rank-multiple 2", "rho-min warm-start"),
    ("--keep 0.3 --rho-min 0.9 --dense-mlp-blocks 1 --orthogonality 1 --rank-profile linear --warm-start 0 --slices 2 "
     "--rank-multiple 2 --factorise all --curriculum-alpha 0.5 --no-restart --label-dropout 0.5 --guidance 1", "")])
def test_flags_without_effect_are_named(arguments, without_effect):
    """One note each (QUICK gives --curriculum-share); flags that do something cost no words. Every method trains."""
    Path("p.json").write_text(PROFILE)
    images_of_nothing()
    out = quick_training("--model", "tiny", "--steps", 1, *arguments.split(), "--out", "r")
    notes = [line for line in out.splitlines() if line.startswith("note:")]
    assert all("has no effect: " in line for line in notes)
    log = log_of(Path("r"))[-1]
    assert (log["active_rank"] is None) == ("full" in arguments)
    assert (log["t_low"] == 1) == ("curriculum-share" in without_effect)
    assert "--slices" in arguments or log["t_low"] > 1 or "than with masks alone" not in out  # random t saved it
    assert sorted(line.split()[1] for line in notes) == sorted(f"--{name}" for name in without_effect.split())


def test_labels_that_are_not_trained_are_named(monkeypatch):
    """As a note: "no class" or all others, and classes without an image, as labels from 1 on have."""
    monkeypatch.setitem(model.PRESETS, "tiny", ONE_BLOCK)
    np.savez("x.npz", images=np.zeros((12, 8, 8, 3), np.uint8), labels=1 + np.arange(12) % 3)
    for dropout, says in ((0, "sample with --guidance 1"), (1, "sample with --guidance 0"), (0.1, "")):
        out = done(train, "--dataset", "x.npz", "--model", "tiny", "--steps", 1, "--batch-size", 2, "--sample-every", 0,
                   "--device", "cpu", "--label-dropout", dropout, "--out", f"r{dropout}")
        notes = [line for line in out.splitlines() if line.startswith("note:")]
        assert len(notes) == 1 + bool(says) and says in notes[0] and "no image is of class 0;" in notes[-1]


def test_classes_go_by_name_or_number():
    """By name alone where the names are numbers."""
    assert sample.choose_classes("1, star,0", ["circle", "ring", "star"]) == [1, 2, 0]
    assert sample.choose_classes("1,10", ["1", "10", "2"]) == [0, 1]
    with pytest.raises(script.InputError, match="class '0' is unknown"):
        sample.choose_classes("1,0", ["1", "10", "2"])


def test_what_the_surroundings_say(monkeypatch, tmp_path):
    """float32 means float32 on CUDA, too; half of torchrun's variables are no processes, wrong ones a line; a file system
    without locks keeps nobody from training."""
    try:
        for name, precision in (("float32", "highest"), (None, "high"), ("bfloat16", "high")):
            script.pick_dtype(name, torch.device("cuda"))
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setenv("RANK", "1")
    assert (script.Processes(CPU).number, script.Processes(CPU).count) == (0, 1)
    for size in ("2", "x"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(script.InputError, match="torchrun"):
            script.Processes(CPU)
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(38, "Function not implemented")))
    script.claim_folder(tmp_path / "r")
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=BlockingIOError))
    with pytest.raises(script.InputError, match="another process writes"):
        script.claim_folder(tmp_path / "r")


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path, monkeypatch):
    quick_training("--steps", 6, "--save-every", 5, "--lr", "1e-3", "--out", tmp_path / "r")
    good, real = (tmp_path / "r" / "state.pt").read_bytes(), train.to_unit
    with monkeypatch.context() as patch:
        patch.setattr(train, "to_unit", lambda *x: real(*x) * math.nan)
        refuses(train, "--resume", "--steps", 24, "--out", tmp_path / "r", says=("finite", "--lr 0.0005"))
    assert (tmp_path / "r" / "state.pt").read_bytes() == good
    monkeypatch.setitem(model.PRESETS, "tiny", ONE_BLOCK)
    refuses(train, *QUICK, "--steps", 40, "--save-every", 1, "--lr", "1e18", "--out", tmp_path / "s", says="finite")
    for file in (tmp_path / "s").glob("state.pt"):
        assert all(torch.isfinite(p).all() for p in saved(tmp_path / "s")["model"].values())


TRAIN_REFUSES = [
    (["--dataset", "imagenet"], ("imagenet", "shapes, cifar10, celeba")), (["--image-size", 9], "not divisible"),
    (["--image-size", 2**62], ("--image-size", "at most")), (["--batch-size", 2**62], ("--batch-size", "at most")),
    (["--steps", 0], "at least 1"), (["--batch-size", -1], "at least 1"), (["--seed", -5], "--seed"),
    (["--lr", "inf"], "--lr"), (["--keep", 0], "--keep"), (["--keep", 1.1], "--keep"), (["--rho-min", 2], "--rho-min"),
    (["--warm-start", -1], "--warm-start"), (["--model", "DiT-H/2"], "DiT-H/2"), (["--slices", 0], "--slices"),
    (["--num-classes", 3], "10 classes"), (["--num-classes", 2**63 - 1], "--num-classes"), (["--device", "tpu"], "tpu"),
    (["--curriculum-groups", 100], ("--curriculum-groups 100", "at most 50")), (["--curriculum-share", 0], "above 0"),
    (["--curriculum-share", 2], "--curriculum-share"), (["--dense-mlp-blocks", -1], "at least 0"),
    (["--dataset", ""], "no dataset"), (["--label-dropout", 7], "--label-dropout"), (["--guidance", "inf"], "finite"),
    (["--device", "cuda"], "not available"), (["--rank-execution", "mask"], "--rank-execution")]


@pytest.mark.parametrize("module, arguments, says", [
    *((train, ["--out", "r", *arguments], says) for arguments, says in TRAIN_REFUSES),
    *((fid, ["shapes", "shapes", name, "1" + "0" * 30], (name, "at most"))
      for name in ("--num", "--image-size", "--batch-size")),
    *((fid, ["shapes", "shapes", "--save-stats", path], "is a folder") for path in (".", "", "/")),
    *((flops, arguments, ("flops.py: ", says)) for arguments, says in (
        (["--keep", 1.5], "--keep"), (["--model", "DiT-S/8", "--image-size", 20], "divisible"),
        (["--run", "x"], "--run"), (["--sampling-steps", 2000], "1 to 1000"),
        (["--curriculum-groups", 100], "at most 50"), (["--steps", 0], "steps")))])
def test_scripts_refuse(module, arguments, says):
    """One line, exit status 2, and nothing written."""
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refuses(module, *arguments, says=says)
    assert os.listdir() == []


def test_train_script_refuses_images_and_batches_that_it_cannot_use(monkeypatch):
    np.savez("wide.npz", images=np.zeros((4, 8, 10, 3), np.uint8))
    os.mkdir("empty")
    refuses(train, "--dataset", "empty", "--out", "r", says="empty")
    refuses(train, "--dataset", "wide.npz", "--out", "r", says=("10x8", "--image-size"))
    two = script.Processes(CPU)
    two.count, two.gather = 2, lambda x: [x]
    monkeypatch.setattr(train, "Processes", lambda device: two)
    refuses(train, *QUICK, "--batch-size", 7, "--out", "r", says=("--batch-size 7", "multiple", "2"))
    assert sorted(os.listdir()) == ["empty", "wide.npz"]


def test_train_script_begins_afresh_where_nothing_was_saved(tmp_path):
    """What ended before its first save, say for want of memory, left its settings and nothing else."""
    quick_training("--steps", 2, "--out", tmp_path / "r")
    whole = (tmp_path / "r" / "metrics.jsonl").read_text()
    for name in ("state.pt", "model.pt"):
        (tmp_path / "r" / name).unlink()
    quick_training("--steps", 3, "--seed", 5, "--out", tmp_path / "r")
    again = (tmp_path / "r" / "metrics.jsonl").read_text()
    assert saved(tmp_path / "r", "state.pt")["step"] == 3 and again and whole not in again


@pytest.mark.parametrize("name", train.RUN_FILES)
def test_train_script_leaves_files_of_others_alone(name, tmp_path):
    """In a folder that is no run: they are not overwritten. In one that is: they are not taken for its leftovers."""
    (tmp_path / name).write_text('{"mine": 1}')
    refuses(train, "--out", tmp_path, says="is not a run's settings")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == '{"mine": 1}'
    (tmp_path / name).unlink()
    for leftover in (".mine.tmp", f".{name}.123.tmp"):
        (tmp_path / leftover).touch()
    quick_training("--steps", 1, "--out", tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", ".mine.tmp", *train.RUN_FILES, "model.pt", "state.pt"]


def test_train_script_keeps_a_run_that_is_there(run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    refuses(train, "--out", run, says=("already holds a run", "--resume"))
    refuses(train, "--resume", "--out", run / "none", says="holds no run")
    resume = ["--resume", "--out", run]
    refuses(train, *resume, "--keep", 0.5, "--seed", 3, says=("--keep 0.5 (the run has 0.25)", "--seed 3"))
    refuses(train, *resume, "--predict", "eps", says="--predict eps (the run has v)")
    refuses(train, *resume, "--steps", 5, says="trained 6 steps")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_guidance_that_cannot_be_had_is_told(run):
    """A finished run's model.pt is not written again; and guidance needs the answer to "no class"."""
    shutil.copytree(run, "r")
    assert "note: --guidance has no effect: the run is" in done(train, "--resume", "--out", "r", "--guidance", 1.5)
    out = quick_training("--steps", 1, "--label-dropout", 0, "--out", "s")
    assert 'note: "no class" is not trained' in out


NO_PROFILES = ["{", "[]", "3", '{"t": [1]}', '{"t": [1, 9], "share": [1]}', '{"t": [], "share": []}', "[" * 100_000] + [
    f'{{"t": {t}, "share": {share}}}' for t, share in [
        *(("[1]", f"[{x}]") for x in (0, 1.1, -0.5, "NaN", "1e999", 10**50, '"1"', "true", "null", "[1]", "[[1]]")),
        *((f"[1, {t}]", "[1, 0.5]") for t in (1, 0, 1001, 10**30, 34.5, "NaN", '"34"', "null", "[34]")),
        ("[2]", "[1]"), ("[1, 9, 8]", "[1, 1, 1]"), ('"12"', "[1, 1]"), ("1", "1"), ("[[1]]", "[1]")]]


def test_a_rank_profile_from_a_file():
    """Kept in config.json and model.pt, logged by stage; a run goes on with the same one alone. What is none is refused
    in a line, before anything is written."""
    os.mkdir("d")
    Path("p.json").write_text(PROFILE)
    Path("other.json").write_text('{"t": [1], "share": [0.5]}')
    quick_training("--rank-profile", "p.json", "--curriculum-groups", 3, "--steps", 12, "--log-every", 1, "--out", "r")
    config, *_ = train.read_config(Path("r"))
    assert config.rank_profile == PEAK and {config: 1}[sample.load_model(Path("r"), CPU)[0].config]
    phi = config.rank_schedule().table(max(layer.rank or 0 for layer in model.linear_layers(config)))
    assert all(line["active_rank"] == int(phi[line["t_low"]:].max()) for line in log_of(Path("r")))
    resume = ["--resume", "--out", "r", "--steps", 13, "--rank-profile"]
    refuses(train, *resume, "other.json", says=("--rank-profile ((1, 0.5),) (the run has ((1, 0.3), (400", "new run"))
    refuses(train, *resume, "linear", says="--rank-profile linear")
    assert "after step 12" in done(train, *resume, "p.json")
    for content in (*NO_PROFILES, "\xff", "d", "nowhere.json", "cubic"):
        name = content if content in ("d", "nowhere.json", "cubic") else "p.json"
        Path("p.json").write_bytes(content.encode("latin-1"))
        refuses(train, *QUICK, "--steps", 1, "--out", "s", "--rank-profile", name, says=(name, "logistic"))
    assert sorted(os.listdir()) == ["d", "other.json", "p.json", "r"]


def test_what_a_kill_leaves_is_made_good(run, tmp_path):
    """model.pt is written before state.pt: an older state writes both again. A picture that is missing is drawn."""
    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / "state.pt").unlink()
    (tmp_path / "r" / "model.pt").write_bytes(b"half")
    quick_training("--resume", "--out", tmp_path / "r")
    assert saved(tmp_path / "r", "model.pt")["step"] == 6
    done(train, "--resume", "--sample-every", 5, "--out", tmp_path / "r")
    assert (tmp_path / "r" / "samples" / "final.png").exists()
    assert_same(saved(run), saved(tmp_path / "r"))
    config, state = json.loads((run / "config.json").read_text()), saved(run)
    del config["train"]["distil"], state["settings"]["distil"]  # an older version did not have this flag
    (tmp_path / "r" / "config.json").write_text(json.dumps(config)), torch.save(state, tmp_path / "r" / "state.pt")
    assert "after step 6" in done(train, "--resume", "--steps", 7, "--out", tmp_path / "r")


def test_resume_refuses_what_does_not_belong_together(run, tmp_path):
    """Other data, another run's state, half a state; and a config.json with anything where a word or number belongs."""
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    refuses(train, "--resume", "--out", folder, *images_of_nothing(), says=("--dataset 12 images", "has 20000 images"))
    refuses(train, "--resume", "--out", tmp_path, says="holds no run")  # the name of the run forgotten
    config = json.loads((run / "config.json").read_text())
    for part, name, value, says in (
            ("train", "lr", "fast", "--lr"), ("train", "bell", 1, "bell"), ("train", "dtype", "int", "--dtype"),
            ("train", "curriculum_groups", None, "config.json"), ("train", "curriculum_groups", 3, "state.pt"),
            ("model", "method", ["full"], "--method"), ("model", "width", 10**30, "--width")):
        (folder / "config.json").write_text(json.dumps(config | {part: config[part] | {name: value}}))
        refuses(train, "--resume", "--out", folder, says=says)
    for text in ("{", "[1, 2]", '"x"', "null", json.dumps(config | {"train": [1]}), json.dumps(config | {"model": "x"}),
                 json.dumps({k: v for k, v in config.items() if k != "model"}), "[" * 100_000):
        (folder / "config.json").write_text(text)
        refuses(train, "--resume", "--out", folder, says="config.json is not a run's settings")
    (folder / "config.json").write_text(json.dumps(config))
    whole, state = (run / "state.pt").read_bytes(), saved(run)
    moments = state["optimizer"]["state"] | {0: state["optimizer"]["state"][0] | {"exp_avg": torch.zeros(10**5)}}
    for content, says in (({"step": 6}, "not a file that train.py wrote"), (state | {"model": {}}, "does not fit"),
                          (state | {"step": "six"}, "does not fit"),
                          (state | {"curriculum": state["curriculum"] | {"start": [1]}}, "start of the curriculum"),
                          (state | {"optimizer": state["optimizer"] | {"state": moments}}, "optimiser")):
        torch.save(content, folder / "state.pt")
        refuses(train, "--resume", "--steps", 20, "--out", folder, says=("state.pt", says))
    (folder / "state.pt").write_bytes(whole[:1000])
    refuses(train, "--resume", "--out", folder, says="state.pt cannot be loaded")


@pytest.mark.parametrize("seed", range(30))
def test_files_changed_at_random_cost_at_most_a_line(seed, run, tmp_path):
    """A run goes on or is drawn from, or a line says what is wrong; never a traceback."""
    rng, folder = random.Random(seed), tmp_path / "r"
    shutil.copytree(run, folder)
    path = folder / ("config.json", "metrics.jsonl", "state.pt", "model.pt")[seed % 4]
    content = bytearray(path.read_bytes())
    if seed % 3 == 0:
        del content[rng.randrange(len(content)):]
    else:
        for _ in range(rng.choice((1, 2, 30))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)
    if path.name == "model.pt":
        code, _, err = cli(sample, "--run", folder, "--num", 2, "--steps", 2, "--out", tmp_path / "x.png")
    else:
        code, _, err = cli(train, "--resume", "--steps", 8, "--device", "cpu", "--out", folder)
    assert (code, err.count("\n")) in ((0, 0), (2, 1)), err


def test_an_optimiser_state_from_another_device_fits_a_fused_optimiser(run):
    """The fused kernels want step counts where the weights are: a state that says fused=False, as one from MPS does, is
    loaded as this device's own. Here the device is "meta"."""
    (config, s), theirs = train.read_config(run), saved(run)
    state = train.State(s, config, CPU)
    theirs["optimizer"]["param_groups"][0]["fused"] = False
    state.optimizer = torch.optim.AdamW([p.detach().to("meta").requires_grad_() for p in state.model.parameters()])
    state.optimizer.param_groups[0]["fused"] = True
    train.restore(state, theirs, script.Processes(CPU))
    moments = state.optimizer.state.values()
    assert len(moments) == len(theirs["model"]) and {m["step"].device.type for m in moments} == {"meta"}
    assert state.optimizer.param_groups[0]["fused"] and state.step == 6


# ----------------------------------------------------------------------------------------------------
# Latents


DECODERS = {  # of latents (N, 4, h, w): images of twice the side, float beyond [-1, 1] or uint8; and what is none
    "float": lambda z: z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3) - 2,
    "bytes": lambda z: ((DECODERS["float"](z) + 1) * 100).clamp(0, 255).to(torch.uint8),
    "grey": lambda z: z[:, :1], "nothing": lambda z: z[:, :3, :0], "whole": lambda z: z[:, :3].long(),
    "nan": lambda z: z[:, :3] / 0}


def save_torchscript(folder, functions, example):
    with warnings.catch_warnings(action="ignore"):  # newer torch calls TorchScript old
        for name, function in functions.items():
            torch.jit.save(torch.jit.trace(function, example, check_trace=False), str(folder / f"{name}.pt"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A folder with latents.npz (60, 4, 8, 8), of three classes and other means and deviations in each channel, a run
    of six steps on them, and decoders."""
    folder, g = tmp_path_factory.mktemp("latents"), torch.Generator().manual_seed(0)
    deviation, mean = torch.tensor([1, 2, 0.5, 10]).view(4, 1, 1), torch.arange(4).view(4, 1, 1)
    z = torch.randn(60, 4, 8, 8, generator=g) * deviation + mean
    np.savez(folder / "latents.npz", latents=z.half().numpy(), labels=np.arange(60) % 3)
    save_torchscript(folder, DECODERS, z)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", ONE_BLOCK | dict(predict="eps"))
        done(train, "--dataset", folder / "latents.npz", "--model", "tiny", "--steps", 6, "--batch-size", 4, "--lr",
             0.01, "--ema-decay", 0, "--out", folder / "run", "--data-dir", folder, "--device", "cpu")
    return folder


def test_latents_are_normalised_and_never_flipped_or_clipped(latents):
    """By mean and deviation of each channel, which the model keeps; v unless told otherwise; the way back is exact."""
    net, z = sample.load_model(latents / "run", CPU)[0], torch.from_numpy(np.load(latents / "latents.npz")["latents"])
    config = net.config
    assert config.channels == 4 and config.predict == "v" and config.num_classes == 3 and {config: 1}[config]
    unit = data.to_unit(z, config.mean, config.std)
    assert unit.mean((0, 2, 3)).abs().max() < 1e-4 and (unit.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert relative(data.from_unit(unit, config.mean, config.std), z.float()) < 1e-6
    dataset = data.load(str(latents / "latents.npz"))
    s, state = training_state(config, flip=True)
    batch = train.draw_batch(dataset, state, s)
    assert all(any(torch.allclose(x, image) for image in unit) for x in batch.x_0)
    wild = lambda x, t: torch.full_like(x, 3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "guided", lambda *_: wild)
        x_0, eps = sample.denoiser(net, None, 1.0, clip=True)(torch.zeros(1, 4, 8, 8), 500)
    assert relative(x_0, -3 * (1 - AB[500]).sqrt() * torch.ones(1, 4, 8, 8)) < 1e-5 and x_0.abs().max() > 1
    assert not (latents / "run" / "samples").exists()  # a grid of latents would be no picture


def test_latents_are_sampled_and_decoded(latents):
    """To a .npz as they came, whatever the batch; with a decoder to pictures; a resumed run normalises as before."""
    flags = ["--run", latents / "run", "--num", 5, "--steps", 2]
    done(sample, *flags, "--out", "all.npz")
    done(sample, *flags, "--out", "one.npz", "--batch-size", 1)
    with np.load("all.npz") as file, np.load("one.npz") as other:
        z, labels = file["latents"], file["labels"]
        assert z.dtype == np.float32 and z.shape == (5, 4, 8, 8) and labels.tolist() == [0, 1, 2, 0, 1]
        assert np.abs(z - other["latents"]).max() < 1e-4 * np.abs(z).max()
    for kind in ("float", "bytes"):
        done(sample, *flags, "--out", f"{kind}.npz", "--decoder", latents / f"{kind}.pt")
        images = DECODERS[kind](torch.from_numpy(z))
        images = images if kind == "bytes" else data.from_unit(images)
        with np.load(f"{kind}.npz") as file:
            assert np.array_equal(file["arr_0"], images.permute(0, 2, 3, 1))
    done(sample, *flags, "--out", "x.png", "--decoder", latents / "float.pt")
    shutil.copytree(latents / "run", "r")
    done(train, "--resume", "--out", "r", "--steps", 8)
    assert sample.load_model(Path("r"), CPU)[0].config == sample.load_model(latents / "run", CPU)[0].config
    np.savez("foreign.npz", latents=z.astype(">f4"))  # the bytes of other machines
    assert torch.equal(data.load("foreign.npz").images, torch.from_numpy(z))


def test_latents_that_do_not_fit_are_refused(latents, run):
    good = np.load(latents / "latents.npz")["latents"]
    constant = np.where(np.arange(4)[:, None, None] == 2, np.float16(7), good)
    for says, z in (("NaN", np.where(good > 3, np.nan, good)), ("NaN", good * np.inf), ("float64", good.astype(float)),
                    ("(60,", good[:, 0]), ("(0,", good[:0]), ("labels", good), ("constant", constant)):
        np.savez("x.npz", latents=z, labels=np.arange(9 if says == "labels" else len(z)))
        refuses(train, "--dataset", "x.npz", "--model", "tiny", says=says)
    np.savez("three.npz", latents=good[:, :3], labels=np.arange(60) % 3)
    resume, flags = ["--resume", "--out", latents / "run"], ["--run", latents / "run", "--num", 2, "--steps", 1]
    refuses(train, *resume, "--dataset", "three.npz", says="3 channels")
    refuses(train, *resume, *images_of_nothing()[:2], says=("latents", "images"))
    refuses(train, *resume, "--noise", "linear", says="--noise linear (the run has cosine)")
    refuses(sample, *flags, "--out", "x.png", says="--decoder")
    for decoder, says in (("grey.pt", "it gives (2, 1, 8, 8)"), ("nothing.pt", "it gives (2, 3, 0, 8)"), ("whole.pt", "int64"),
                          ("nan.pt", "NaN or infinity"), ("latents.npz", "no Torch"), ("none.pt", "no Torch")):
        refuses(sample, *flags, "--decoder", latents / decoder, says=says)
    refuses(sample, "--run", run, "--decoder", latents / "float.pt", says="draws images")
    refuses(fid, latents / "latents.npz", "shapes", "--features", latents / "float.pt", says="uint8")


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
    x = formula((n1, d), 0.3819660112, 0.7548776662) * scale
    y = formula((n2, d), 0.2451223337, 0.5698402909) * scale
    ours = fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert ours == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_a_point():
    """FID Eq. (6): equal sides have distance 0, a point |mu1 - mu2|^2 + tr sigma2; shapes must match."""
    eye = np.eye(3)
    assert fid.frechet_distance(np.zeros(3), eye, np.zeros(3), eye) == pytest.approx(0, abs=1e-12)
    assert fid.frechet_distance(np.zeros(3), 0 * eye, np.ones(3), eye) == pytest.approx(6)
    for sides in ((1 - eye / 2, eye), (eye, 1 - eye / 2)):  # eigenvalues 2.5, -0.5, -0.5
        with pytest.raises(script.InputError, match="no covariance"):
            fid.frechet_distance(np.zeros(3), sides[0], np.zeros(3), sides[1])
    with pytest.raises(script.InputError, match="same features"):
        fid.frechet_distance(np.zeros(3), eye, np.zeros(4), np.eye(4))
    for bad in (math.nan, math.inf, 1e80):  # max(0, nan) would be a perfect score
        for i in range(4):
            sides = [np.zeros(3), eye, np.zeros(3), eye]
            sides[i] = np.full_like(sides[i], bad)
            with pytest.raises(script.InputError, match="NaN"):
                fid.frechet_distance(*sides)


@pytest.mark.parametrize("sizes", [[100], [1, 99], [30, 30, 30, 10]])
def test_moments_are_the_mean_and_covariance(sizes):
    """Streaming gives numpy's mean and unbiased covariance, also far from zero, whatever the batches."""
    x = torch.randn(100, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    moments = fid.Moments()
    for part in x.split(sizes):
        moments.add(part)
    mu, sigma = moments.result()
    np.testing.assert_allclose(mu, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x.numpy() - 1e6, rowvar=False), rtol=0, atol=1e-8)  # of order 1


def precision_recall_by_counting(real, fake, k):
    """Kynkaanniemi et al. Eq. (1), (2): a point is inside where another one is nearer to it than to that one's
    own k-th neighbour."""
    squared = lambda a, b: (a.double()[:, None] - b.double()).square().sum(2)
    radius_of = lambda x: squared(x, x).sort(1).values[:, k]  # the nearest is x itself
    inside = lambda a, b: (squared(a, b) < radius_of(b)).any(1).double().mean().item()
    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_by_definition(k, monkeypatch):
    """Integer features, so that distances tie exactly."""
    monkeypatch.setattr(fid, "ROWS", 16)
    g = np.random.default_rng(0)
    real, fake = torch.tensor(g.integers(-3, 4, (50, 3))), torch.tensor(g.integers(-2, 5, (37, 3)))
    expected = precision_recall_by_counting(real, fake, k)
    assert fid.precision_recall(real.float(), fake.float(), k) == expected
    assert 0 < min(expected) and max(expected) < 1


@pytest.mark.parametrize("seed, n_real, n_fake", [(11, 60, 60), (16, 60, 60), (0, 100, 53), (1, 100, 53)])
def test_precision_recall_of_copies(seed, n_real, n_fake):
    """More than k equal images have radius 0 and let nobody in, and a point exactly as far as a neighbour is outside,
    however distances are rounded."""
    g = torch.Generator().manual_seed(seed)
    real, fake = (torch.randn(n, 512, generator=g).relu() for n in (n_real, n_fake))
    copies = real[:3].repeat_interleave(31, 0)
    real, fake = torch.cat([real, copies]), torch.cat([fake, copies])
    expected = precision_recall_by_counting(real, fake, 3)
    assert fid.precision_recall(real, fake) == pytest.approx(expected, abs=1e-9)


def test_precision_recall_as_prdc():
    """prdc 0.2 gave these on the same features (sums and products of features alone, no random numbers)."""
    real = torch.from_numpy(formula((300, 8), 0.3819660112, 0.7548776662))
    fake = torch.from_numpy(formula((200, 8), 0.2451223337, 0.5698402909)) * 0.9 + 0.15
    assert fid.precision_recall(real, fake, 3) == (0.82, 0.75)
    with pytest.raises(script.InputError, match="more than 3"):
        fid.precision_recall(real[:3], fake, 3)


def test_inception_score():
    """Salimans et al. 2016: exp E KL(p(y|x) || p(y)), the mean over ten consecutive tenths."""
    p = torch.from_numpy(formula((95, 8), 0.3819660112, 0.7548776662)).mul(3).softmax(1)
    expected = [(q * (q / q.mean(0)).log()).sum(1).mean().exp().item() for q in p.tensor_split(10)]
    assert fid.inception_score(p.log()) == pytest.approx(np.mean(expected))
    assert fid.inception_score(torch.zeros(4, 8)) == pytest.approx(1)  # fewer images than tenths


def test_sorted_images_are_measured_as_shuffled_ones():
    """A network that is certain scores the number of classes, but 1 if a tenth of them has one class."""
    def certain(images):
        one_hot = torch.eye(10)[images[:, 0, 0, 0].long()]
        return one_hot, 200 * one_hot

    images = torch.arange(10).repeat_interleave(500)[:, None, None, None].expand(-1, 3, 4, 4).to(torch.uint8)
    source = data.Source("x", 5000, lambda i, j: images[i:j], None, [])
    extractor = fid.Extractor("x", lambda device: certain)
    whole, part = (fid.measure(source, extractor, torch.device("cpu"), 64, num, 100) for num in (None, 2000))
    assert (whole.n, part.n, part.points.shape) == (5000, 2000, (100, 10)) and (part.points.sum(0) > 0).all()
    assert whole.mu == pytest.approx(0.1) and part.mu == pytest.approx(0.1, rel=0.1)
    assert [whole.inception_score, part.inception_score] == pytest.approx([10, 10], rel=0.05)


@pytest.fixture(scope="module")
def inception():
    """The network with made-up weights that are the same everywhere, and activations of order one; and what it
    says of four images: features (4, 2048), logits (4, 1008)."""
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
    with torch.no_grad():
        return net, *net(some_images(4))


def some_images(n):
    """uint8 (n, 3, 24, 340): waves, to be made higher and narrower by the resize."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(340.0), indexing="ij")
    waves = [(x * (0.3 + 0.1 * c) + y * (0.2 + 0.15 * i)).sin() + (x * y / (40 + 9 * c)).cos()
             for i in range(n) for c in range(3)]
    return (torch.stack(waves).reshape(n, 3, 24, 340) * 63 + 127).round().to(torch.uint8)


PYTORCH_FID = [  # mean, spread, then some entries
    [2.592785, 3.634893, 0.297273, 24.15967, 0.000299, 0.327809, 24.236818, 0.0],
    [0.326836, 5.671558, -4.565959, 4.710322, -4.816909, -4.673604, 4.805509, -4.914541]]


def test_inception_as_pytorch_fid(inception):
    """pytorch-fid 0.3.0 gave these with the same weights on the same images, its own resize included (its
    InceptionV3 with the `inception` fixture's state dict; logits less bias)."""
    assert [x.shape for x in inception[1:]] == [(4, 2048), (4, 1008)]
    for ours, expected in zip(inception[1:], PYTORCH_FID):
        ours = ours[:2]
        ours = [ours.mean().item(), ours.std().item(), *ours[:, 5::ours.shape[1] // 3].flatten().tolist()]
        assert ours == pytest.approx(expected, rel=0, abs=1e-4 * expected[1])


def pixels(images):
    """Features that a person can compute by hand: mean and spread of each channel, (N, 6)."""
    x = images.double() / 255
    return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder of sets of shapes, feature files, and files that nobody can use."""
    folder = tmp_path_factory.mktemp("fid")
    images = data.draw_shapes(220, 8, 1)[0].permute(0, 2, 3, 1).numpy()
    mu, sigma = np.zeros(6), np.eye(6)
    files = dict(a=dict(images=images[:120]), a1=dict(images=images[:50]), a2=dict(images=images[50:120]),
                 b=dict(images=images[120:]), one=dict(images=images[:1]), narrow=dict(images=images[:, 1:]),
                 bare=dict(mu=np.float32(mu), sigma=sigma), five=dict(mu=mu[1:], sigma=sigma[1:, 1:]),
                 mu=dict(mu=mu), odd=dict(mu=mu, sigma=sigma[1:, 1:]), nan=dict(mu=mu, sigma=sigma * np.nan),
                 huge=dict(mu=mu, sigma=sigma * 1e300), skew=dict(mu=mu, sigma=np.tril(sigma + 1)),
                 words=dict(mu=mu, sigma=sigma.astype(str)), complex=dict(mu=mu * 1j, sigma=sigma),
                 other=dict(mu=mu, sigma=sigma, features="of two\nlines"))
    for name, arrays in files.items():
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "cut.npz").write_bytes((folder / "bare.npz").read_bytes()[:-30])
    (folder / "text.pt").write_text("hello")
    (folder / "text.png").write_text("no image")
    (folder / "empty").mkdir()
    networks = dict(pixels=pixels, nan=lambda x: pixels(x) / 0, row=lambda x: pixels(x)[:1],
                    square=lambda x: pixels(x) @ pixels(x).T, fails=lambda x: pixels(x) @ pixels(x))
    save_torchscript(folder, networks, torch.zeros(6, 3, 8, 8, dtype=torch.uint8))
    return folder


def run_fid(work, *arguments):
    with contextlib.chdir(work):
        return cli(fid, "--features", "pixels.pt", "--device", "cpu", "--json", *arguments)


def figures(work, *arguments):
    """The JSON that fid.py prints, alone on stdout."""
    code, out, err = run_fid(work, *arguments)
    assert code == 0 and out.count("\n") == 1 and err.count("\n") == err.count("warning: "), err
    return json.loads(out)


def test_fid_end_to_end(work):
    """The script's figures are those of the definitions on the same features."""
    result = figures(work, "a.npz", "b.npz", "--batch-size", 7)
    x, y = (pixels(data.load(str(work / name)).images) for name in ("a.npz", "b.npz"))
    distance = fid.frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert result.pop("frechet_distance") == pytest.approx(distance, abs=1e-10)  # of variances of order 0.01
    assert "pixels.pt" in result.pop("features")
    precision, recall = fid.precision_recall(y, x, 3)
    assert result == dict(inception_score=None, precision=precision, recall=recall,
                          n_generated=120, n_reference=100)


def test_fid_of_inception(inception, tmp_path, monkeypatch):
    """The published weights (here the fixture's, under their hash) give FID and the Inception Score."""
    weights = tmp_path / "checkpoints" / Path(fid.INCEPTION_URL).name
    weights.parent.mkdir()
    torch.save(inception[0].state_dict(), weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fid, "INCEPTION_SHA256", script.sha256_of(weights))
    for name, part in zip("cd", some_images(4).split(2)):
        np.savez(f"{name}.npz", images=part.permute(0, 2, 3, 1).numpy())
    published = json.loads(cli(fid, "c.npz", "d.npz", "--device", "cpu", "--json")[1])
    x, y = inception[1].double().split(2)
    expected = fid.frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert published["fid"] == pytest.approx(expected, rel=1e-4)
    assert published["features"] == fid.INCEPTION and published["inception_score"] == pytest.approx(1)


def test_inception_weights_are_checked_and_offline_is_said(work, tmp_path, monkeypatch):
    """Without a network one line says where the file belongs; a damaged file is not opened."""
    def no_network(*_):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    flags = work / "a.npz", work / "b.npz", "--data-dir", tmp_path, "--device", "cpu"
    refuses(fid, *flags, says=("(no network)", str(tmp_path), fid.INCEPTION_URL))
    (tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"something else")
    refuses(fid, *flags, says="is damaged")
    refuses(fid, work / "bare.npz", *flags[1:], says=("6 features of an unnamed", fid.INCEPTION))


def test_statistics_files(work):
    """Written statistics give the same figures, but for precision and recall, and hold no features."""
    images = figures(work, "a.npz", "b.npz", "--save-stats", "s.npz")
    assert figures(work, "a.npz", "s.npz") == images | dict(precision=None, recall=None)
    with np.load(work / "s.npz") as file:
        assert file["n"] == 100 and file["mu"].dtype == np.float64 and "points" not in file.files


def test_mu_means_statistics(work):
    """A file with `mu` is statistics, whatever else it holds, as the ADM suite's references hold images."""
    with np.load(work / "b.npz") as file:
        np.savez(work / "adm.npz", arr_0=file["images"], mu=np.zeros(6), sigma=np.eye(6), n=np.ones(3),
                 features=np.zeros((4, 6)), points=np.zeros(3), inception_score=np.ones(2))
    bare = figures(work, "a.npz", "bare.npz")
    assert bare["n_reference"] is None and bare["frechet_distance"] > 0
    assert figures(work, "a.npz", "adm.npz") == bare


def test_several_generated_are_one_set(work):
    """The figures of the parts are those of one file that holds them all; `--num` is spread over all."""
    for flags in ((), ("--num", 60), ("--pr-num", 0)):
        whole = figures(work, "a.npz", "b.npz", *flags)
        assert figures(work, "a1.npz", *flags, "a2.npz", "b.npz") == whole  # flags may stand anywhere
    assert figures(work, "a1.npz", "a2.npz", "a.npz", "b.npz")["n_generated"] == 240


def test_the_reference_is_cached_by_content(work, tmp_path, monkeypatch):
    """The reference is measured again only if an image changes, or the cache is damaged."""
    calls, measure = [], fid.measure
    monkeypatch.setattr(fid, "measure", lambda *given: calls.append(given[0].name) or measure(*given))
    flags = "--data-dir", tmp_path / "data"
    reference = shutil.copy(work / "b.npz", tmp_path / "b.npz")
    first = figures(work, "a.npz", reference, *flags)
    reference = reference.rename(tmp_path / "moved.npz")  # the same content under another name
    assert figures(work, "a.npz", reference, *flags) == first and len(calls) == 3
    with np.load(reference) as file:
        images = file["images"].copy()
    images[3, 0, 0, 0] ^= 255  # one pixel
    np.savez(reference, images=images)
    assert figures(work, "a.npz", reference, *flags) != first and len(calls) == 5
    for cache in (tmp_path / "data" / "cache").iterdir():
        cache.write_bytes(cache.read_bytes()[:500])
    assert figures(work, "a.npz", reference, *flags) != first and len(calls) == 7


@pytest.mark.parametrize("arguments, says", [
    ("a.npz", "required: REFERENCE"), ("none b.npz", "no dataset"), ("empty b.npz", "holds no images"),
    ("one.npz b.npz", "at least 2"), ("text.png b.npz", "text.png"), ("a.npz cut.npz", "cut.npz"),
    ("a.npz five.npz", "same features"), ("a.npz odd.npz", "(D, D)"), ("a.npz mu.npz", "sigma"),
    ("a.npz nan.npz", "NaN"), ("a.npz huge.npz", "infinite"), ("a.npz skew.npz", "symmetric"),
    ("a.npz words.npz", "words.npz"), ("a.npz complex.npz", "complex"), ("a.npz other.npz", "of two lines"),
    ("a.npz bare.npz b.npz", "cannot be joined"), ("a.npz narrow.npz b.npz", "one size"),
    ("a.npz b.npz --features text.pt", "TorchScript"), ("a.npz b.npz --features none.pt", "cannot read"),
    ("a.npz b.npz --features nan.pt --num 20", "not finite"), ("a.npz b.npz --features row.pt", "(N, D)"),
    ("a.npz b.npz --features fails.pt", "fails on uint8"), ("a.npz b.npz --features square.pt", ", then "),
    ("a.npz b.npz --pr-num -1", "--pr-num"),
    ("a.npz b.npz --save-stats pixels.pt/x.npz", "pixels.pt")])
def test_bad_input_to_fid_is_one_line(work, arguments, says):
    code, out, err = run_fid(work, *arguments.split())
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err


def test_warnings(work):
    """What makes figures incomparable is said, and only then."""
    err = run_fid(work, "a.npz", "narrow.npz")[2]
    assert "below 10,000" in err and "120 and 220 images are not comparable" in err and "sharpness" in err
    err = run_fid(work, "a.npz", "b.npz", "--num", 90)[2]
    assert "below 10,000" in err and "comparable" not in err and "sharpness" not in err


# ----------------------------------------------------------------------------------------------------
# What takes a process of its own

# train.py, ended by SIGKILL before a certain step
KILLED = f"""import os, sys, model, train
model.PRESETS["tiny"], at, draw = {ONE_BLOCK}, int(sys.argv.pop(1)), train.draw_batch
train.draw_batch = lambda data, state, s: os.kill(os.getpid(), 9) if state.step == at else draw(data, state, s)
train.run_script(train.main)"""
# train.py, with a backend that runs what was traced; it tells how many graphs there were after each step
COMPILED = f"""import model, torch, train
model.PRESETS["tiny"], graphs, after = {ONE_BLOCK}, [], []
real_compile, ema, aot_eager = torch.compile, train.update_ema, torch._dynamo.lookup_backend("aot_eager")
backend = lambda graph, example: graphs.append(graph) or aot_eager(graph, example)
torch.compile = lambda net: real_compile(net, backend=backend)
train.update_ema = lambda state, s: after.append(len(graphs)) or ema(state, s)
train.main()
print(after)"""
IN_3_STAGES = ["--steps", 20, "--batch-size", 10, "--slices", 3, "--curriculum-groups", 3, "--log-every", 50]
IN_TWO = [*QUICK, "--batch-size", 8, "--log-every", 3, "--seed", 3, "--slices", 2, "--steps", 12]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__, *IN_TWO]
SAMPLE = [sys.executable, sample.__file__, "--run", "Läufe", "--num", 1, "--steps", 2]
KILLED_AT = lambda step, name: ["-c", KILLED, step, *QUICK, "--steps", 30, "--save-every", 13, "--out", name]
PROCESSES = {  # by name; Python's arguments, or those of another program
    "output closed": ["sh", "-c", 'exec "$@" --out a.png >&-', "sh", *SAMPLE],
    "output in ascii": ["env", "PYTHONIOENCODING=ascii", *SAMPLE],
    "compiled": ["-c", COMPILED, *QUICK, *IN_3_STAGES, "--compile", "--out", "compiled"],
    "killed at 7": KILLED_AT(7, "killed at 7"),
    "killed at 17": KILLED_AT(17, "killed at 17"),
    "killed at 17, elastic": [*KILLED_AT(17, "killed at 17, elastic"), *DISTIL],
    "two": [*TORCHRUN, "--save-every", 8, "--out", "two"],
    "two, elastic": [*TORCHRUN, *DISTIL, "--save-every", 8, "--out", "two, elastic"],
}


@pytest.fixture(scope="module", autouse=True)
def begun(request, tmp_path_factory):
    """The processes that the chosen tests name, begun before the first test: they run one after the other beside
    the tests, on a second core. (Their folder; {name: what will hold exit status and output})"""
    cases = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    named = {params["process"] for params in cases if "process" in params}
    folder, environment = tmp_path_factory.mktemp("processes"), os.environ | dict(PYTHONPATH=str(HERE))
    if named & {"output closed", "output in ascii"}:
        shutil.copytree(request.getfixturevalue("elastic_run"), folder / "Läufe")

    def run(command):
        words = [sys.executable, *command] if command[0].startswith("-") else command
        return subprocess.run([*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True)

    pool = ThreadPoolExecutor(1)
    yield folder, {name: pool.submit(run, command) for name, command in PROCESSES.items() if name in named}
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def finished(begun, process):
    """Exit status and output of the process that a test names, once it has ended."""
    return begun[1][process].result()


@pytest.mark.parametrize("process", ["output closed", "output in ascii"])
def test_output_that_is_closed_or_knows_few_letters(finished):
    """Neither is a reason to stop: a shell may close stdout, a terminal may not show the name of a folder."""
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize("process", ["compiled"])
def test_compiled_runs_take_the_same_steps_with_few_graphs(finished, begun, tmp_path):
    """--compile, here with a backend that runs what was traced: the same losses in all stages and slices, and
    after the first few graphs, widths that were never seen need no new ones."""
    assert finished.returncode == 0, finished.stderr
    quick_training(*IN_3_STAGES, "--out", tmp_path / "plain")
    plain, compiled = log_of(tmp_path / "plain")[-1], log_of(begun[0] / "compiled")[-1]
    graphs = json.loads(finished.stdout.splitlines()[-1])  # after each step
    assert plain["stage"] == compiled["stage"] == 2 and len(graphs) == 20
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert 0 < graphs[10] <= 6 and graphs[10] == graphs[-1]  # at 8, torch gives up and compiles no more


@pytest.mark.parametrize("process, more", [
    ("killed at 7", []), ("killed at 17", []), ("killed at 17, elastic", DISTIL)])
def test_a_killed_run_resumes_bit_identically(finished, process, more, begun, thirty_steps, tmp_path):
    """30 steps straight; and a kill before the first save at step 13, or after it, between log lines. Weights, EMA,
    optimiser, generators, curriculum and log agree to the last bit. --slices may change, for bits only to 1."""
    folder, straight = begun[0] / process, tmp_path / "straight" if more else thirty_steps[0]
    if more:
        quick_training("--steps", 30, *more, "--out", straight)
        (config, *_), spent, g = train.read_config(straight), 0, torch.Generator().manual_seed(0)
        for _ in range(30):
            torch.rand(4, dtype=torch.float64, generator=g), torch.randperm(4, generator=g)  # t and its order
            spent += flops.train_step(config, [1] * 4, share=schedule.elastic_shares(4, 0.1, g), distil=True)
        assert log_of(straight)[-1]["flops"] == spent
    assert finished.returncode == -SIGKILL, finished.stderr
    (folder / ".state.pt.1.tmp").touch()  # what a kill during a write leaves
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 29, "lo')  # half a line
    out = quick_training("--resume", "--out", folder, "--slices", 1)
    assert ("going on after step 13" in out) == (process != "killed at 7")
    assert_same(saved(straight), saved(folder))
    timeless = lambda folder: [{k: v for k, v in line.items() if k != "images_per_s"} for line in log_of(folder)]
    assert timeless(folder) == timeless(straight) and not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("process, more", [("two", []), ("two, elastic", DISTIL)])
def test_two_processes_take_the_steps_of_one(finished, process, more, begun, tmp_path):
    """--batch-size is the global batch: timesteps, noise, flips and dropped labels are those of one process, the
    curriculum watches the loss of all, process 0 writes, and a resumed run may have another number of both."""
    assert finished.returncode == 0 and finished.stdout.count("\ndone ") == 1, finished.stderr
    folder_1, folder_2 = tmp_path / "one", begun[0] / process
    done(train, *IN_TWO, *more, "--out", folder_1)
    a, b = saved(folder_1), saved(folder_2)
    config, s = train.read_config(folder_1)
    start = train.State(s, config, CPU).model.state_dict()
    moved = lambda x, y: torch.cat([(x[name] - y[name]).flatten() for name in start]).norm()
    assert moved(b["model"], a["model"]) < 1e-2 * moved(a["model"], start)
    a, b = (torch.cat([m["exp_avg"].flatten() for m in state["optimizer"]["state"].values()]) for state in (a, b))
    assert (b - a).norm() < 1e-3 * a.norm()
    for x, y in zip(log_of(folder_1), log_of(folder_2), strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-4) and y["t_low"] == x["t_low"]
        losses, others = ([loss or 0 for loss in line["loss_by_group"]] for line in (x, y))
        assert losses == pytest.approx(others, rel=1e-3)
    done(train, "--resume", "--steps", 14, "--slices", 1, "--out", folder_2)  # two began it, one goes on
    assert saved(folder_2)["step"] == 14
