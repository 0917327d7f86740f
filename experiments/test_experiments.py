"""Tests of the scripts in this folder, a section for each."""

import contextlib
import copy
import io
import itertools
import json
import math
import shutil
import sys
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import ablations
import autoencoder
import bench
import classifier
import common
import compare
import compress
import curves
import data
import elastic
import fid
import fit_ranks
import flops
import latents
import model
import neighbours
import paper_tables
import plot
import rank_analysis
import representation
import sample
import samplers
import schedule
import script
import train
from curriculum import Curriculum
from lowrank import LowRankLinear
from model import Config, DiT
from schedule import T

CPU, NOISE = torch.device("cpu"), schedule.NoiseSchedule()
TINY = dict(depth=2, width=32, heads=2, patch=4, conditioning="shared", dense_mlp_blocks=0, predict="v")


@pytest.fixture(autouse=True, scope="module")
def smaller_tiny():
    """The scripts' default model, one block for runs of a second, on one thread: two would wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", TINY | dict(depth=1))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Flags that name 40 labelled 8 x 8 images to train on and as many to hold out, for runs of a second."""
    folder = tmp_path_factory.mktemp("few")
    for name, seed in (("train", 1), ("test", 2)):
        save_npz(folder / f"{name}.npz", *data.draw_shapes(40, 8, seed))
    return ["--dataset", folder / "train.npz", "--test", folder / "test.npz", "--data-dir", folder, "--batch-size", 4,
            "--device", "cpu"]


def save_npz(path, images, labels):
    np.savez(path, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())


def cli(module, *arguments):
    """Runs a script's main() with these arguments, in this process: (exit status, stdout, stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        try:
            script.run_script(module.main)
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def runs(module, *arguments):
    code, out, err = cli(module, *arguments)
    assert code == 0, err
    return out


def refuses(module, *arguments, says):
    """Bad input: exit status 2 and one line on stderr that holds every word of `says`."""
    code, _, err = cli(module, *arguments)
    assert code == 2 and err.count("\n") == 1 and err.endswith("\n"), (arguments, err)
    assert all(word in err for word in ([says] if isinstance(says, str) else says)), (arguments, err)


def results_in(folder):
    assert Image.open(folder / "figure.png").width > 600
    return json.loads((folder / "results.json").read_text())


def opened(folder):
    return sample.load_model(folder, CPU)[0], train.read_config(folder)[1]


def held_out_loss(net, flags, per_group):
    return list(common.held_out_loss(net, data.load(str(flags[3])), per_group))


def shapes(n, classes=10):
    images, labels = data.draw_shapes(n, 8, 7)
    return data.Dataset("shapes", images, labels % classes, list(data.SHAPES)[:classes])


def awake(**changes):
    """A model whose every weight matters: as initialised, adaLN-Zero makes the output zero."""
    torch.manual_seed(0)
    net = DiT(Config(**TINY | dict(image_size=8) | changes))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return net


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ----------------------------------------------------------------------------------------------------
# common.py


@pytest.mark.parametrize("predict", schedule.PREDICTIONS)
def test_held_out_losses_are_those_of_eps(predict):
    """Whatever is predicted: |eps_hat - eps|^2, with eps_hat from the model's output and x_t. The same figures whatever
    the batch; the mean over t weighs groups by their length; without classes the label is the row of "no class"."""
    images, net, t, index = shapes(300), awake(predict=predict), torch.tensor([5, 500, 990]), torch.tensor([7, 3, 250])
    together = common.denoising_losses(net, images, index, t, seed=4)
    assert torch.allclose(common.denoising_losses(net, images, index, t, 4, batch_size=1), together, rtol=1e-5)
    eps = sample.ImageNoise(4, range(3), (3, 8, 8), CPU)()
    for i in range(3):
        signal, noise = (x.item() for x in NOISE.coefficients(t[i:i + 1]))
        x_t = signal * data.to_unit(images.images[index[i]]) + noise * eps[i]
        output = net(x_t[None], t[i:i + 1], images.labels[index[i:i + 1]])
        _, eps_hat = schedule.predicted_x_0_and_eps(predict, output, x_t, signal, noise)
        assert together[i].item() == pytest.approx((eps_hat - eps[i]).square().mean().item(), rel=1e-3)
    loss, groups = common.held_out_loss(net, images, per_group=60)
    assert loss == pytest.approx(np.dot(np.diff([1, 34, 359, 901, 991, 1001]), groups) / 1000)
    assert (loss, groups) == common.held_out_loss(net, images, 60)
    assert common.noised_batch(net, replace(images, classes=[]), index, t, range(3), 0).y.tolist() == [10] * 3
    zero = DiT(Config(**TINY | dict(predict="eps"), image_size=8))  # as initialised: |eps|^2 in every group
    assert common.held_out_loss(zero, images, per_group=100)[1] == pytest.approx([1] * 5, abs=0.02)


def test_held_out_images_that_are_the_training_images_are_told(few, tmp_path, monkeypatch, capsys):
    """One line of notice from one place, however the path is written; named datasets have a test split."""
    path = few[1]
    monkeypatch.chdir(path.parent)
    for dataset, test, notes in ((path, path, 1), (path, path.name, 1), (path, few[3], 0), ("shapes", "shapes", 0),
                                 ("shapes", None, 0)):
        common.settle_image_flags(Namespace(dataset=str(dataset), test=test and str(test), image_size=None))
        out = capsys.readouterr().out
        assert out.count("note: ") == out.count("\n") == notes and (not notes or "training images" in out)
    flags = "--test", path, "--steps", 2, "--width", 8, "--device", "cpu", "--out", tmp_path / "c"
    assert cli(classifier, "--dataset", path, *flags)[2].count("note: ") == 1


def test_flags_for_train(monkeypatch):
    """What a script does not know goes to train.py, with or without --."""
    words = common.as_flags(dict(log_every=1, restart=False, compile=True, lr=None))
    assert words == ["--log-every", "1", "--no-restart", "--compile"]
    parser, typed = script.Parser(), "x.py --predict eps --dataset shapes -- --compile --batch-size 8"
    common.add_run_flags(parser, "runs/x")
    monkeypatch.setattr(sys, "argv", typed.split())
    args = common.parse_flags(parser, ["--method"])
    assert common.run_flags(args, seed=3)[-5:] == ["--seed", "3", "--predict", "eps", "--compile"]
    assert args.batch_size == 8 and common.read_run_flags(common.run_flags(args), shapes(10))[1].predict == "eps"
    few_latents = data.Dataset("latents", torch.randn(20, 4, 8, 8), torch.zeros(20, dtype=torch.int64), ["0"])
    config = common.read_run_flags(["--model", "DiT-S/2"], few_latents)[1]  # as train.py makes it
    assert (config.predict, config.channels, config.image_size, len(config.mean)) == ("v", 4, 8, 4)


def test_differences_are_paired_by_seed():
    """The interval is that of Student's one-sample test on the ratios."""
    g = np.random.default_rng(0)
    theirs, factors = g.uniform(1, 2, 5), g.normal(1.1, 0.05, 5)
    mean, half = common.relative_change(np.stack([theirs * factors, theirs], 1), np.stack([theirs, theirs], 1))
    expected = scipy.stats.ttest_1samp(factors, 1).confidence_interval(0.95)
    assert (1 + mean[0] - half[0], 1 + mean[0] + half[0]) == pytest.approx((expected.low, expected.high))
    assert mean[1] == half[1] == 0 and common.relative_change([3.0], [2.0]) == (0.5, None)
    assert common.mean_and_sd([1.0, 2.0], ".2f") == "1.50 ± 0.71" and common.mean_and_sd([1.0, None], ".2f") is None


# ----------------------------------------------------------------------------------------------------
# classifier.py and bench.py


def test_classifier_trains_and_judges(tmp_path):
    """Beats chance by far on fresh shapes after a few steps, judges true labels high and wrong ones low."""
    flags, file = ("--data-dir", tmp_path, "--device", "cpu", "--json"), tmp_path / "c.pt"
    out = runs(classifier, "--image-size", 8, "--num", 2000, "--steps", 120, "--width", 16, "--out", file, *flags)
    assert json.loads(out)["held_out_accuracy"] > 0.5
    images, labels = data.draw_shapes(400, 8, 9)
    save_npz(tmp_path / "good.npz", images, labels)
    save_npz(tmp_path / "wrong.npz", images, (labels + 1) % 10)
    for name in ("star", "circle"):  # class folders are matched by name
        (tmp_path / "folders" / name).mkdir(parents=True)
        for i in range(3):
            pixels = images[labels == list(data.SHAPES).index(name)][i].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / "folders" / name / f"{i}.png")
    judged = {name: json.loads(runs(classifier, "--classifier", file, "--generated", tmp_path / name, *flags))
              for name in ("good.npz", "wrong.npz", "folders")}
    assert judged["good.npz"]["recognised"] > 0.5 > judged["wrong.npz"]["recognised"]
    by_name = {row["class"]: row["n"] for row in judged["folders"]["per_class"]}
    assert by_name == dict.fromkeys(data.SHAPES, 0) | {"star": 3, "circle": 3} and list(by_name) == list(data.SHAPES)
    # its features serve fid.py, and are the classifier's own
    features = fid.file_extractor(tmp_path / "c.features.pt").load(CPU)(images)[0]
    network, _ = classifier.load_classifier(file, CPU)
    with torch.no_grad():
        assert relative(features, network.eval().features(images)) < 1e-5
        assert torch.equal(network.head(network.features(images)).argmax(1), network(images).argmax(1))


def test_bench_smoke(tmp_path):
    """As its docstring says. (To be checked by bench.py's owner.)"""
    runs(bench, "--model", "tiny", "--repetitions", 1, "--passes", 1, "--batch-size", 4, "--sampling-batch", 2,
         "--sampling-steps", 3, "--device", "cpu", "--out", tmp_path / "b.json")
    found = json.loads((tmp_path / "b.json").read_text())
    macs = {row["variant"]: row["multiply-adds / full"] for row in found["training"]["4"]["rows"]}
    assert list(macs) == ["full", "static", "r_max", "masked", "slices"] and macs["full"] == 1
    assert macs["static"] < macs["r_max"] == macs["masked"] > macs["slices"]
    assert found["training"]["4"]["rows"][0]["of peak"] > 0 and found["sampling"]["2"]["iso-param / static"] > 0
    refuses(bench, "--keep", 2, says="keep")
    refuses(bench, "--sampling-steps", 1001, says="1 to 1000")


# ----------------------------------------------------------------------------------------------------
# rank_analysis.py


def rotation(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def test_effective_rank_and_subspaces():
    """exp(-sum p log p), p = s / sum s: counts equal singular values; known for s = 1, 1/2, 1/4. B.6: the output side,
    as many directions as hold 95 % of the squares; the overlap is the mean cosine of scipy's principal angles."""
    Q, P = rotation(9), rotation(7, 1)
    made_of = lambda *s: Q[:, :len(s)] @ torch.diag(torch.tensor(s, dtype=torch.float64)) @ P[:len(s)]
    known = math.prod((7 / p) ** (p / 7) for p in (4, 2, 1))
    for s, expected in (([3], 1), ([3] * 4, 4), ([3] * 7, 7), ((1, 0.5, 0.25), known)):
        assert rank_analysis.effective_rank(made_of(*s)) == pytest.approx(expected, rel=1e-9)
    assert math.isnan(rank_analysis.effective_rank(torch.zeros(3, 3)))
    assert rank_analysis.subspace(made_of(3), energy=1.0).shape[0] == 9
    mean_rank, mean_norm, ranks, norms = rank_analysis.measure([made_of(1, 0.5, 0.25), made_of(2, 1, 0.5).float()])
    assert mean_rank == pytest.approx(ranks[0]) and norms == pytest.approx([21**0.5 / 4, 21**0.5 / 2], rel=1e-6)
    assert mean_norm == pytest.approx(0.375 * 21**0.5, rel=1e-6)
    for squares, n in (((90, 6, 4), 2), ((96, 2, 2), 1), ((40, 30, 30), 3)):
        U = rank_analysis.subspace(made_of(*(s**0.5 for s in squares)))
        assert U.shape == (9, n) and torch.allclose(U @ U.T, Q[:, :n] @ Q[:, :n].T, atol=1e-10)
    a, b = rotation(8, 2)[:, :3], rotation(8, 3)[:, :5]
    expected = np.cos(scipy.linalg.subspace_angles(a.numpy(), b.numpy())).mean()
    assert rank_analysis.overlap(a, b) == pytest.approx(expected) == rank_analysis.overlap(b, a)
    tilted = torch.stack([math.cos(0.3) * Q[:, 0] + math.sin(0.3) * Q[:, 2], Q[:, 3]], 1)
    assert rank_analysis.overlap(Q[:, :2], tilted) == pytest.approx(math.cos(0.3) / 2)
    assert rank_analysis.overlap(tilted[:, :1], Q[:, [0, 2]] @ rotation(2)) == pytest.approx(1)  # a line inside a plane


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_group_gradients_are_those_of_the_mean_loss(predict):
    """Of what is predicted, against one backward pass in float64 over all samples; batches only split the sum."""
    net, dataset, n, (first, last) = awake(method="full", predict=predict), shapes(10), 12, (34, 358)
    net_64 = copy.deepcopy(net).double()
    split, whole = (rank_analysis.group_gradients(net, dataset, (first, last), n, batches, 5) for batches in (3, 1))
    t = torch.tensor([math.floor(first + (i + 0.5) * (last - first + 1) / n) for i in range(n)])
    image = torch.randperm(10, generator=torch.Generator().manual_seed(5))[torch.arange(n) % 10]
    eps = sample.ImageNoise(5, range(n), (3, 8, 8), CPU)().double()
    x_0, ab = dataset.images[image].double() / 127.5 - 1, NOISE.alpha_bar[t].view(-1, 1, 1, 1)
    wanted = eps if predict == "eps" else ab.sqrt() * eps - (1 - ab).sqrt() * x_0
    ((net_64(ab.sqrt() * x_0 + (1 - ab).sqrt() * eps, t, dataset.labels[image]) - wanted) ** 2).mean().backward()
    layers, names = ("adaln", "q", "k", "v", "out", "mlp_in", "mlp_out"), list(rank_analysis.weight_matrices(net))
    assert names == [f"blocks.{block}.{layer}.weight" for block in range(2) for layer in layers]
    for name, a, b in zip(names, split, whole):
        expected = net_64.get_parameter(name).grad
        assert a.dtype == torch.float64 and relative(a, expected) < 1e-4 and relative(b, expected) < 1e-4, name


def test_similarity_of_gradients():
    """Equal column spaces overlap by 1, orthogonal ones by 0, and the mean is over matrices. By chance lines in 200
    dimensions hardly overlap, and subspaces of 190 of them share at least 180."""
    Q = rotation(200)
    line = lambda i: Q[:, i:i + 1] @ torch.ones(1, 3, dtype=torch.float64)
    result = rank_analysis.gradient_similarity([[line(0), line(i // 2)] for i in range(5)], 0)  # 0, 1 and 2, 3 pair up
    expected = [[1 if i // 2 == j // 2 else 0.5 for j in range(5)] for i in range(5)]
    assert np.allclose(result["similarity"], expected, atol=1e-12) and np.allclose(np.diag(result["chance"]), 1)
    assert result["dimensions"] == [1] * 5 and 0 < np.mean(np.array(result["chance"])[0, 1:]) < 0.2
    assert rank_analysis.gradient_similarity([[Q], [Q @ Q]], 0)["chance"][0][1] > 180 / 190
    pairs = {"neighbours": [1, 12, 23, 34], "distant": [2, 3, 4, 13, 14, 24], "high t": [23, 24, 34],
             "low t": [1, 2, 12], "all": [1, 12, 23, 34, 2, 3, 4, 13, 14, 24]}
    means = rank_analysis.pair_means([[10 * i + j for j in range(5)] for i in range(5)])
    assert means == {name: pytest.approx(np.mean(values)) for name, values in pairs.items()}


def test_loss_difference_in_bins_and_groups():
    """Means over their timesteps; the standard error is that of the paired differences."""
    nets, dataset = [awake(method=m, keep=0.1) for m in ("full", "static")], shapes(30)
    result, t = rank_analysis.loss_difference(*nets, dataset, 2, 3), torch.arange(1, T + 1).repeat(2)
    index = torch.randint(30, (2 * T,), generator=torch.Generator().manual_seed(3))
    full, low = (common.denoising_losses(net, dataset, index, t, 3).numpy() for net in nets)
    assert [row["t"] for row in result["bins"]] == [[i + 1, i + 20] for i in range(0, T, 20)]
    assert [row["t"] for row in result["groups"]] == [[1, 33], [34, 358], [359, 900], [901, 990], [991, 1000]]
    for row in result["bins"] + result["groups"]:
        here = ((t >= row["t"][0]) & (t <= row["t"][1])).numpy()
        a, b = full[here], low[here]
        assert (row["full"], row["low_rank"]) == pytest.approx((a.mean(), b.mean()))
        assert row["difference"] == pytest.approx((b - a).mean(), abs=1e-9 * a.mean())
        assert row["standard_error"] == pytest.approx((b - a).std(ddof=1) / len(a) ** 0.5)
    assert result["parameters"] == [sum(p.numel() for p in net.parameters()) for net in nets]


def ranks_as_the_paper(direction=1):
    """Results in which every claim holds (direction 1), or the opposite of every one (-1)."""
    def falling(scale=1.0):
        return [10 * math.exp(-direction * scale * g / 5) for g in range(5)]

    def pairs(n):  # similar where near, more so at high t; less at later checkpoints
        return [[0.5 + direction * (0.02 * (i + j) - 0.1 * abs(i - j) - 0.01 * n) for j in range(5)] for i in range(5)]

    rows = [{"step": 10 * n, "effective_rank": falling(n), "norm": falling(2 * n)} for n in range(1, 7)]
    groups = [dict(t=t, full=1.0, low_rank=1 + a, difference=a) for t, a in zip(rank_analysis.GROUPS, falling(8))]
    return {"gradients": rows, "weights": rows, "loss": {"groups": groups},
            "similarity": [{"step": 10 * n, "similarity": pairs(n), "chance": pairs(0)} for n in range(1, 7)]}


def test_claims_follow_the_figures():
    """All appear in data made so, none in the opposite; less than 0.9 is no trend, nor are four checkpoints."""
    found, opposite = (rank_analysis.claims(ranks_as_the_paper(direction)) for direction in (1, -1))
    assert {(c["section"], c["verdict"]) for c in found} == {(b, "appears") for b in ("B.2", "B.3", "B.4", "B.6")}
    added = [n * math.exp(-1.6 * g) for g, n in enumerate((33, 325, 542, 90, 10))]  # of all timesteps of each group
    share = next(c["figures"] for c in found if "concentrated" in c["claim"])
    assert f"36% of the timesteps, have {sum(added[:2]) / sum(added):.0%} of it" in share and len(found) == 11
    verdicts = sorted(c["verdict"] for c in opposite)
    assert verdicts == ["does not appear"] + ["the opposite appears"] * 10  # but for the share of the added loss
    results = ranks_as_the_paper()
    last = results["gradients"][-1]["effective_rank"]
    last[:3] = last[2::-1]
    verdict = {c["claim"]: c for c in rank_analysis.claims(results)}["effective rank of gradients falls with t"]
    assert verdict["verdict"] == "does not appear" and "-0.60" in verdict["figures"]
    short = {key: value[:4] if isinstance(value, list) else value for key, value in ranks_as_the_paper().items()}
    assert [c["verdict"] for c in rank_analysis.claims(short)].count("too few points") == 3
    ties = np.corrcoef([1, 2, 3, 4, 5], [3, 1.5, 4, 1.5, 5])[0, 1]  # they share their mean place
    assert rank_analysis.spearman([3, 1, 4, 1, 5]) == pytest.approx(ties)
    assert math.isnan(rank_analysis.spearman([2, 2, 2]))
    assert rank_analysis.trend(rank_analysis.spearman([1, 2, 3, 5, 4])) == "appears"  # exactly 0.9


def test_rank_analysis_script(few, tmp_path):
    flags = [*few, "--steps", 40, "--group-steps", 20, "--checkpoints", 2, "--gradient-batch", 4, "--per-timestep", 1,
             "--predict", "eps", "--out", tmp_path]
    said, results = runs(rank_analysis, *flags), results_in(tmp_path)
    assert [r["step"] for r in results["gradients"]] == [20, 40] and [r["step"] for r in results["weights"]] == [10, 20]
    for row in results["gradients"] + results["weights"]:
        ranks, norms = np.array(row["effective_rank_by_matrix"]), np.array(row["norm_by_matrix"])
        assert norms.shape == (5, 7) and (norms > 0).all() and ranks.min() >= 1 and ranks.max() <= 32
        assert np.allclose(row["effective_rank"], ranks.mean(1))
    for matrix in (np.array(row["similarity"]) for row in results["similarity"]):
        assert np.allclose(matrix, matrix.T) and np.allclose(np.diag(matrix), 1)
        assert 0 < matrix.min() < matrix.max() < 1.001
    # the weights are the checkpoint's
    state = torch.load(tmp_path / "t_34-358" / "model_0000010.pt", weights_only=True)["model"]
    norms = [state[name].norm().item() for name in results["matrices"]]
    assert results["weights"][0]["norm_by_matrix"][1] == pytest.approx(norms, rel=1e-5)
    assert all(c["verdict"].upper() in said and c["figures"] in said for c in results["claims"])
    assert results["loss"]["parameters"][1] < results["loss"]["parameters"][0] and len(results["loss"]["bins"]) == 50
    low, log = opened(tmp_path / "low_rank")[0].config, curves.read_log(tmp_path / "t_34-358")
    assert (low.method, low.keep) == ("static", 0.1)
    assert all([loss is None for loss in line["loss_by_group"]] == [True, False, True, True, True] for line in log)
    assert results["predict"] == low.predict == "eps" and "The models predict eps." in said
    # called again it trains nothing and finds the same; runs of another length are refused, and damaged ones
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("model*.pt")}
    runs(rank_analysis, *flags)
    assert results_in(tmp_path) == results and {p: p.stat().st_mtime_ns for p in before} == before
    refuses(rank_analysis, *flags, "--steps", 80, says=("full is a run of --steps 40, not 80", "--out"))
    refuses(rank_analysis, *flags, "--group-steps", 40, says=("t_1-33 is a run of --steps 20, not 40", "--out"))
    checkpoint, settings = (tmp_path / "full" / name for name in ("model_0000020.pt", "config.json"))
    checkpoint.unlink()
    refuses(rank_analysis, *flags, says="model_0000020.pt does not exist")
    checkpoint.touch()
    refuses(rank_analysis, *flags, says="model_0000020.pt cannot be loaded")
    settings.write_bytes(b"{}")
    refuses(rank_analysis, *flags, says="config.json is not a run's settings")


# ----------------------------------------------------------------------------------------------------
# representation.py


def two_images(t):
    """The amplitudes at t, two images (2, 5), and x_t (40, 5) made from them."""
    g, ab = torch.Generator().manual_seed(t), NOISE.alpha_bar[t].item()
    alpha, sigma = ab**0.5, (1 - ab) ** 0.5
    images = torch.randn(2, 5, dtype=torch.float64, generator=g)
    return alpha, sigma, images, alpha * images.repeat(20, 1) + sigma * torch.randn(40, 5, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("t", [1, 400, 800, 1000])
def test_posterior_of_two_images(t):
    """The softmax mean against Bayes' rule with the density of a normal distribution, whatever the chunks."""
    alpha, sigma, images, x_t = two_images(t)
    density = torch.stack([torch.distributions.Normal(alpha * image, sigma).log_prob(x_t).sum(1) for image in images])
    p = torch.sigmoid(density[1] - density[0])[:, None]  # of the second one
    for chunk in (1, 2):
        mean, variance = representation.posterior(x_t, images.float().double(), alpha, sigma, chunk)
        assert torch.allclose(mean, (1 - p) * images[0] + p * images[1], atol=1e-6)
        assert torch.allclose(variance, (p * (1 - p)).squeeze(1) * (images[1] - images[0]).square().sum(), atol=1e-5)
    if t == 1:  # x_t names its image
        assert torch.equal(mean, images.float().double().repeat(20, 1)) and not variance.any()


def test_floors_of_the_targets():
    """By the definition of each target, for every x_t: noise is the variance of y, signal and noise add up to E|y|^2
    about its mean, the loss is the mean squared error over the posterior; and the floors of two targets are related as
    at one x_t eps = (x_t - alpha x_0) / sigma says: eps error = alpha / sigma, v error = 1 / sigma, flow error = 1 +
    alpha / sigma times that of x_0."""
    for t in (20, 500, 900):
        alpha, sigma, images, x_t = two_images(t)
        mean, variance = representation.posterior(x_t, images, alpha, sigma)
        centre, answer = images.mean(0).expand_as(x_t), torch.randn_like(x_t)
        p = ((mean - images[0]) @ (images[1] - images[0]) / (images[1] - images[0]).square().sum()).clamp(0, 1)
        p = torch.stack([1 - p, p])[..., None]  # (2, 40, 1)
        eps = (x_t - alpha * images[:, None]) / sigma  # of each image, (2, 40, 5)
        eps_answer = (x_t - alpha * answer) / sigma
        targets = {"eps": (eps, eps_answer, 0 * centre), "x0": (images[:, None].expand_as(eps), answer, centre),
                   "v": (alpha * eps - sigma * images[:, None], alpha * eps_answer - sigma * answer, -sigma * centre),
                   "flow": (eps - images[:, None], eps_answer - answer, -centre)}
        floors = {}
        for target, (y, y_answer, known) in targets.items():
            parts = representation.decompose(target, alpha, sigma, x_t, mean, variance, centre, answer)
            y_mean = (p * y).sum(0)
            assert parts["floor"] == pytest.approx((p * (y - y_mean).square()).sum(0).mean().item(), abs=1e-10)
            assert parts["loss"] == pytest.approx((p * (y - y_answer).square()).sum(0).mean().item(), rel=1e-6)
            total = (p * (y - known).square()).sum(0).mean().item()
            assert parts["recoverable"] + parts["floor"] == pytest.approx(total, rel=1e-9)
            floors[target] = parts["floor"]
        for target, factor in (("eps", alpha / sigma), ("v", 1 / sigma), ("flow", 1 + alpha / sigma)):
            assert floors[target] == pytest.approx(factor**2 * floors["x0"])


class Bayes:
    """Answers with E[v | x_t, class] over all `images`, as a model would."""

    def __init__(self, images):
        self.images, self.noise_schedule, self.config = images, NOISE, Namespace(predict="v", mean=(), std=())
        self.active, self.position = lambda t: None, torch.zeros(1)

    def __call__(self, x_t, t, y, active):
        ab, answers = NOISE.alpha_bar[t[0]].item(), []
        for x, label in zip(x_t.double().flatten(1), y):
            same = data.to_unit(self.images.images[self.images.labels == label]).flatten(1)
            mean, _ = representation.posterior(x[None], same, ab**0.5, (1 - ab) ** 0.5)
            answers.append((ab**0.5 * x - mean) / (1 - ab) ** 0.5)
        return torch.cat(answers).view_as(x_t)


def test_the_bayes_predictor_reaches_the_floor():
    """And no other; its spectra are those of E[x_0 | x_t]. The true x_0 and eps have effective ranks that are known."""
    images = shapes(60)
    index, t = torch.arange(30), torch.zeros(30, dtype=torch.int64)
    net = Bayes(images)
    seen, unseen = (common.noised_batch(net, found, index, t, range(30), 5) for found in (images, shapes(90)))
    for level in (500, 960):
        row = representation.measure_level(net, level, seen, unseen, images)
        for target, parts in row["targets"].items():
            assert parts["loss"] == pytest.approx(parts["floor"], rel=1e-4, abs=1e-12)
        assert 0 < row["targets"]["x0"]["floor"] < 1
        for what, truth in (("x0", seen.x_0), ("eps", seen.eps)):
            rank = row[what]["rank"]
            assert rank["model"] == pytest.approx(rank["bayes"], rel=1e-3)
            assert rank["true"] == pytest.approx(rank_analysis.effective_rank(truth.flatten(1) - truth.flatten(1).mean(0)))
            assert row[what]["spectrum"] == sorted(row[what]["spectrum"], reverse=True)
            assert sum(row[what]["spectrum"]) == pytest.approx(1)
        net.images = shapes(40)  # it has not seen them all
        other = representation.measure_level(net, level, seen, unseen, images)["targets"]["v"]
        assert other["loss"] > 1.01 * other["floor"] == pytest.approx(1.01 * row["targets"]["v"]["floor"])
        net.images = images
    square = torch.zeros(8, 3, 2, 2)  # a cloud with four equal principal directions around its mean
    square.flatten(1)[torch.arange(8), torch.arange(8) // 2] = torch.tensor([1.0, -1.0]).repeat(4)
    batch = train.Batch(square, seen.y[:8], square, t[:8])
    net = Bayes(data.Dataset("eight", ((square + 1) * 127.5).round().to(torch.uint8), seen.y[:8], images.classes))
    assert representation.measure_level(net, 500, batch, batch, net.images)["x0"]["rank"]["true"] == pytest.approx(4)


@pytest.mark.parametrize("method", ["full", "iso-compute"])
def test_tangent_kernel_is_the_product_of_jacobians(method):
    """Every figure from explicit Jacobians of the whole output by all parameters."""
    net, images, levels = awake(method=method, image_size=4, num_classes=3).eval(), shapes(6, 3), [30, 700, 950]
    images = replace(images, images=images.images[..., :4, :4])
    batch = common.noised_batch(net, images, torch.arange(3), torch.zeros(3, dtype=torch.int64), range(3), 2)
    kernel = representation.tangent_kernel(net, batch, levels, 2, seed=8, say=lambda text: None)
    u = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(8)).flatten(1) / 2**0.5
    weights, rows = dict(net.named_parameters()), []
    for t in levels:
        ab = NOISE.alpha_bar[t].item()
        x_t = (ab**0.5 * batch.x_0.double() + (1 - ab) ** 0.5 * batch.eps.double()).float()
        for x, y in zip(x_t, batch.y):
            answer = lambda values: torch.func.functional_call(net, values, (x[None], torch.tensor([t]), y[None])).flatten()
            with sdpa_kernel(SDPBackend.MATH):
                J = torch.func.jacrev(answer)(weights)
            rows.append(u @ torch.cat([part.flatten(1) for part in J.values()], 1))  # (2, P)
    J = torch.stack(rows).view(3, 6, -1).detach()  # level, sample and direction
    cosine = lambda a, b: torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()
    for i, level in enumerate(kernel["levels"]):
        theta = J[i] @ J[i].T / 3
        assert level["eigenvalues"] == pytest.approx(torch.linalg.eigvalsh(theta).flip(0).tolist(), rel=1e-3)
        assert level["rank"] == pytest.approx(rank_analysis.effective_rank(theta), rel=1e-4)
        pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
        alike = [cosine(J[i, 2 * a:2 * a + 2], J[i, 2 * b:2 * b + 2]) for a, b in pairs]
        assert level["alike"] == pytest.approx(np.mean(alike), abs=1e-4)
        assert kernel["coupling"][i] == pytest.approx([cosine(J[i], J[j]) for j in range(3)], abs=1e-4)


def test_claims_of_erd():
    """Each in figures made so that it appears, and none in the opposite; what sets in late appears in one half."""
    def measured(sign):
        rise = [1 + sign * 0.1 * i for i in range(9)]
        rows = [dict(t=100 * i + 50, targets={
            target: dict(floor=2 * a, loss=2 * a + 1 / a, held_out=3, recoverable=(1 if sign < 0 else 0.1))
            for target in representation.TARGETS}) | {
                what: dict(rank=dict(model=9 / a, bayes=9 / a, true=9), spectrum=[1]) for what in ("x0", "eps")}
            for i, a in enumerate(rise)]
        near = np.full((9, 9), 0.5 if sign > 0 else 0.0)
        return rows, dict(coupling=near.tolist(), levels=[dict(eigenvalues=[1 / a], rank=1 / a, alike=a) for a in rise])

    rows, kernel = measured(1)
    found = representation.claims(rows, kernel)
    assert [verdict for _, verdict, _ in found] == ["appears"] * 12
    opposite = [verdict for _, verdict, _ in representation.claims(*measured(-1))]
    assert opposite.count("the opposite appears") == 5 and opposite[-4] == "does not appear"
    for level, rank in zip(kernel["levels"], [1, 2, 3, 4, 5, 4, 3, 2, 1]):
        level["rank"] = rank
    claim, verdict, figures = representation.claims(rows, kernel)[-2]
    assert "Fig. 11" in claim and verdict == "appears in the noisier half" and "from t 450 on -1.00" in figures
    few = dict(levels=kernel["levels"][:6], coupling=np.array(kernel["coupling"])[:6, :6].tolist())
    assert representation.claims(rows[:6], few)[-2][1] == "does not appear"  # four points are no half to speak of
    assert representation.phase(dict(recoverable=3, floor=1, held_out=1.75)) == [(3**0.5, 1), (1.5, 1.75**0.5)]


def test_representation_script(few, elastic_run, tmp_path):
    """Of a run's own images, mirrored where training mirrors; of --train-images of them alone when asked."""
    run, _ = elastic_run
    flags = ["--run", run, *few[2:4], "--samples", 6, "--ntk-samples", 2, "--directions", 2, "--levels", "20,990,500"]
    out = runs(representation, *flags, "--out", tmp_path)
    assert "floor is that of 80 images, mirrored ones among them, of the class" in out and "left" in out
    results = results_in(tmp_path)
    assert [row["t"] for row in results["levels"]] == [20, 500, 990] and np.shape(results["ntk"]["coupling"]) == (3, 3)
    assert len(results["claims"]) == 12 and "Fig. 4b" in out and "TOO FEW POINTS" in out
    assert len(results["ntk"]["levels"][0]["eigenvalues"]) == 4 and results["predict"] == "v"
    net, test = opened(run)[0], data.load(str(few[3]))
    index = torch.randint(40, (6,), generator=torch.Generator().manual_seed(0))
    losses = common.denoising_losses(net, test, index, torch.full((6,), 500))  # the script's held-out images and noise
    assert results["levels"][1]["targets"]["eps"]["held_out"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert "that of 20 images" in runs(representation, *flags, "--train-images", 10)
    assert "correlation +nan" in runs(representation, *flags, "--levels", "1,2")  # both floors are 0
    assert (run / "representation" / "figure.png").exists()
    by_class = data.Dataset("folders", torch.arange(200).view(200, 1, 1, 1), torch.arange(200) // 20, [*"abcdefghij"])
    part = representation.random_part(by_class, 60, 0)  # not of the first classes alone
    assert len(part.images.unique()) == 60 and part.labels.bincount(minlength=10).min() >= 2
    assert torch.equal(part.images.flatten() // 20, part.labels)
    for odd, says in ((["--levels", "5"], "--levels"), (["--levels", "5,7.5"], "--levels"), (["--samples", 1], "--samples"),
                      (["--levels", "0,5"], "--levels"), (["--seed", -1], "--seed"), (["--run", tmp_path], "model.pt"),
                      (["--dataset", tmp_path / "none"], "no dataset"), (["--train-images", 0], "at least 1")):
        refuses(representation, *flags, *odd, "--out", tmp_path / "new", says=says)
    refuses(representation, *flags, "--out", few[1], says="no folder that you may write into")
    refuses(representation, *flags[:2], says="--test")
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------
# ablations.py and neighbours.py


def test_ablations_script(few, tmp_path, monkeypatch):
    """Shared runs are trained once; losses are those of common.py; a second call trains and measures nothing."""
    command = [*few, "--log-every", 1, "--steps", 20, "--per-group", 8, "--seeds", 2, "--out", tmp_path, "--only"]
    out, result = runs(ablations, *command, "curriculum,sampling"), results_in(tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {
        f"{name}-log-every-1-steps-20-seed-{seed}" for seed in (0, 1)
        for name in ("baseline", "curriculum-groups-0", "curriculum-sampling-uniform")}
    assert ablations.folder_name({}, "iso-param", [], 3, 0) == "baseline-iso-param-steps-3-seed-0"
    on, off = (result["ablations"]["curriculum"][name] for name in ("on", "off"))
    assert on == result["ablations"]["sampling"]["progressive"] != off
    row, folder = on[0], tmp_path / on[0]["run"]
    net, s = opened(folder)
    assert [row["loss"], row["loss_by_group"]] == held_out_loss(net, few, 8)
    assert row["flops"] == curves.read_log(folder)[-1]["flops"] < off[0]["flops"]
    assert row["groups_in"] == 10 and row["until_all_in"] == 8  # the last group comes with 40 % of the steps
    assert (s.curriculum_share, s.seed, s.steps) == (0.4, 0, 20)
    cheaper = next(v for v in result["verdicts"] if v["paper"].startswith("cheaper"))
    assert cheaper["difference"] == pytest.approx(np.mean([a["flops"] / b["flops"] for a, b in zip(on, off)]) - 1)
    assert cheaper["verdict"] == "appears" and "| curriculum | off" in out and "The models predict v." in out
    refuses(ablations, *command, "curriculum", "--noise", "linear", says="--noise is set by this script")

    def again(*more):
        runs(ablations, *command, "curriculum", *more)
        return results_in(tmp_path)["ablations"]["curriculum"]["on"][0]

    with monkeypatch.context() as patch:
        patch.setattr(common, "held_out_loss", None)
        patch.setattr(torch.optim.AdamW, "step", None)
        assert again() == row
    shutil.copy(few[1], tmp_path / "copy.npz")  # a finished run of other images is not one of these
    refuses(ablations, *command, "curriculum", "--dataset", tmp_path / "copy.npz", says=("is a run of --dataset", "copy"))
    # other held-out samples, a damaged record, other weights: measured again
    assert [again("--per-group", 4)["loss"], again()["loss"]] == [held_out_loss(net, few, 4)[0], row["loss"]]
    (folder / "measured.json").write_text('{"step": 20')
    assert again() == row
    (folder / "model.pt").write_bytes((tmp_path / on[1]["run"] / "model.pt").read_bytes())
    assert again()["loss"] == on[1]["loss"]
    log = folder / "metrics.jsonl"
    for text, says in ((log.read_text().replace("flops", "flips"), "does not tell the cost"), ("", "has no lines")):
        log.write_text(text)
        refuses(ablations, *command, "curriculum", "--per-group", 3, says=("metrics.jsonl", says))


def test_steps_until_all_groups_are_in():
    """As the curriculum itself counts them, when it reads its losses at log lines."""
    c, begins, log = Curriculum([1, 300, 600, 900], T, 200, share=1, patience=10), {}, []
    for step in range(200):
        if c.advance(step):
            begins[c.stage] = step
        if (step + 1) % 7 == 0:
            c.observe(step - 6, [1.0] * 7)
            log.append({"step": step + 1, "stage": c.stage})
    assert len(begins) == 3 and ablations.until_all_in(log, 4) == (begins[3], 4)
    assert ablations.until_all_in([line for line in log if line["step"] <= begins[3]], 4) == (None, 3)
    assert ablations.until_all_in([{"step": 7, "stage": 0}], 1) == (0, 1)  # no curriculum


def test_forgetting_and_verdicts():
    """Mean loss of the last over that of the second quarter of the curriculum's log lines."""
    losses = [9, 9, 2, 4, 9, 9, 9, None, 6, 99]
    log = [{"stage": min(i // 3, 3), "loss_by_group": [None, value]} for i, value in enumerate(losses)]
    assert ablations.forgetting(log, 1, 4) == 6 / 3  # nine lines with stage < 3: two in a quarter
    assert [ablations.forgetting(*x) for x in ((log, 0, 4), (log[:7], 1, 4), (log, 1, 1))] == [None] * 3
    for mean, half, sign, limit, says in [
            (0.2, None, 1, 0, "as the paper says, in one seed"), (0.2, None, -1, 0, "not as the paper says"),
            (0.2, 0.3, 1, 0, "undecided"), (0.2, 0.1, 1, 0, "appears, beyond"), (0.2, 0.1, -1, 0, "does not appear"),
            (0.005, 0.004, -1, 0.01, "appears, b"), (0.005, 0.006, -1, 0.01, "undecided"), (0.2, 0, 1, 0, "appears")]:
        assert ablations.verdict(mean, half, sign, limit).startswith(says), (mean, half, sign, limit)


@pytest.mark.parametrize("as_published", [True, False])
def test_every_trend_of_the_paper_is_found_where_it_is(as_published):
    """Runs made up so that all of the paper's claims hold, or none."""
    g, sign = np.random.default_rng(0), 1 if as_published else -1

    def made(all_=1.0, low=1.0, noisy=1.0, flops=1.0, forgetting=1.0, until=100, groups=10):
        return [dict(loss=a * all_**sign, loss_by_group=[a * low**sign, a, a, a, a * noisy**sign],
                     flops=flops**sign, forgetting=a * forgetting**sign, until_all_in=until, groups_in=groups)
                for a in g.normal(1, 0.001, 3)]

    lengths = [300, 600, 900, None] if as_published else [900, 300, 200, 100]
    results = {ablation: {name: made() for name in variants} for ablation, variants in ablations.ABLATIONS.items()}
    results["alpha"] = {a: made(until=n, groups=10 if n else 8) for a, n in zip(results["alpha"], lengths)}
    results["rho-min"]["0.3"], results["profile"]["linear"] = made(noisy=1.2), made(all_=1.1)
    results["warm-start"]["0"], results["curriculum"]["on"] = made(low=1.1), made(all_=0.95, flops=0.9)
    results["sampling"]["uniform"], results["restart"]["off"] = made(all_=1.1, forgetting=1.3), made(low=1.1)
    said = ablations.judge(results)
    assert {row["ablation"] for row in said} == set(ablations.ABLATIONS) and len(said) == 9
    assert all(row["verdict"].startswith("appears" if as_published else "does not appear") for row in said), said
    assert ("+20." in said[0]["here"]) == as_published and "against static: 0.3" in said[0]["here"]
    for run in sum(results["alpha"].values(), []):  # none came far enough, some a group less far
        run.update(until_all_in=None, groups_in=4)
    assert ablations.judge_alpha(results["alpha"])["verdict"] == "run more --alpha-steps"
    results["alpha"]["0.05"][0]["groups_in"] = results["alpha"]["0.01"][0]["groups_in"] = 3
    assert ablations.judge_alpha(results["alpha"])["verdict"] == "appears in part"
    results["sampling"]["uniform"][0]["forgetting"] = None
    assert ablations.judge({"sampling": results["sampling"]})[0]["verdict"] == "run more steps"


@pytest.mark.parametrize("noise", schedule.NOISES)
def test_losses_over_multiply_adds(noise):
    """In the middle of each stretch of the log; groups, those of the noise schedule, weigh as uniform t draws them."""
    log = [{"step": 5 * i, "flops": 10 * i, "loss_by_group": [i, 1, 1, None, 2]} for i in range(1, 5)]
    assert np.isnan(neighbours.curve(log, noise, points=2)[1]).all()
    log[3]["loss_by_group"][3] = 7
    spent, losses = neighbours.curve(log, noise, points=2)
    assert spent.tolist() == [10, 30] and math.isnan(losses[0])
    starts = [1, 34, 359, 901, 991] if noise == "cosine" else train.loss_groups("linear")
    a, b, c, d, e = np.diff([*starts, 1001])
    assert losses[1] == pytest.approx((a * 3.5 + b + c + d * 7 + e * 2) / 1000)
    assert train.loss_groups("linear") != train.loss_groups("cosine")


def test_the_best_cells_and_what_they_are_compared_with():
    """By their first run; plain is not counted, and comes with each target. Runs are paired by seed as far as they go."""
    race = lambda **losses: {name: [dict(loss=x)] for name, x in losses.items()}
    results = {"eps": race(plain=1, erd=7, stratified=5, slices=2), "v": race(plain=3, erd=1, stratified=9, slices=8)}
    assert neighbours.best_cells(results, 2, "loss") == [
        ("eps", "plain"), ("eps", "stratified"), ("eps", "slices"), ("v", "plain"), ("v", "erd")]
    results["v"]["plain"].append(dict(loss=4))
    assert neighbours.paired(results["v"], "erd", "loss") == ((1,), (3,))
    results["v"]["erd"].append(dict(loss=2))
    assert neighbours.paired(results["v"], "erd", "loss") == ((1, 2), (3, 4))
    mean, half = -(2 / 3 + 1 / 2) / 2, scipy.stats.t.ppf(0.975, 1) * (2 / 3 - 1 / 2) / 2
    said = neighbours.in_words("v", "erd", {name: [run | dict(steps=5) for run in runs]
                                            for name, runs in results["v"].items()}, ["loss"])
    assert said == f"v, erd (5 steps) against plain (5): loss {100 * mean:+.1f} % ± {100 * half:.1f} (within the spread)"


@pytest.mark.parametrize("name", ["plain", "curriculum", "slices"])
def test_equal_multiply_adds(name):
    """No other number of steps comes closer to the budget."""
    flags = common.as_flags(dict(dataset="shapes", batch_size=4) | neighbours.PLAIN | neighbours.CONTESTANTS[name])
    s, config = common.read_run_flags(flags, shapes(10))
    cost = [neighbours.expected_cost(s, config, steps) for steps in range(64)]
    for budget in (1, cost[1] * 7 // 5, cost[23], cost[23] + cost[1] // 3):
        steps = neighbours.steps_for(budget, lambda steps: cost[steps])
        assert abs(cost[steps] - budget) == min(abs(c - budget) for c in cost[1:])
        assert steps == 23 or budget != cost[23]


@pytest.mark.parametrize("slices, distil", [(1, 0.0), (6, 0.0), (6, 0.5)])
def test_expected_cost_of_an_elastic_run(slices, distil):
    """The second pass of --distil counts, and slices save."""
    flags = common.as_flags(dict(dataset="shapes", method="elastic", distil=distil) | neighbours.PLAIN | dict(slices=slices))
    s, config = common.read_run_flags(flags, shapes(10))
    g, spent = torch.Generator().manual_seed(0), 0
    for _ in range(50):
        share = schedule.elastic_shares(s.batch_size, config.rho_min, g)
        spent += flops.train_step(config, [1] * s.batch_size, slices, share=share, distil=distil > 0)
    assert neighbours.expected_cost(s, config, 50) == pytest.approx(spent, rel=0.005)


def test_neighbours_script(few, tmp_path):
    """Everyone spends what plain spends, whatever it predicts. Slices are compared with stratified draws alone, all
    others with plain. Finished runs are found again, and only the best are repeated."""
    judge, file = classifier.Classifier(10, 8, 4), tmp_path / "judge.pt"
    judge.head.bias.data[3] = 1e6  # sees class 3 everywhere
    torch.save(dict(config=dict(num_classes=10, image_size=8, width=4), classes=[str(i) for i in range(10)],
                    dataset="few", accuracy=0.1, n_test=1, model=judge.state_dict()), file)
    command = [*few, "--log-every", 1, "--steps", 20, "--per-group", 8, "--num", 14, "--guidances", "1,3",
               "--sampling-steps", 2, "--classifier", file, "--only"]
    first = [*command, "erd,speed,curriculum,slices", "--predicts", "eps", "--out", tmp_path / "n"]
    out = runs(neighbours, *first)
    race = {name: found[0] for name, found in results_in(tmp_path / "n")["targets"]["eps"].items()}
    assert list(race) == ["plain", "erd", "speed", "stratified", "curriculum", "slices"]
    nets, s = ({name: opened(tmp_path / "n" / run["run"])[i] for name, run in race.items()} for i in (0, 1))
    budget = flops.training_run(nets["plain"].config, 20, 4)
    assert race["plain"]["expected"] == race["erd"]["expected"] == race["stratified"]["expected"] == budget
    assert race["curriculum"]["steps"] > 20 < race["slices"]["steps"] and race["stratified"]["steps"] == 20
    for run in race.values():
        assert run["expected"] == pytest.approx(budget, rel=0.03) and run["flops"] == pytest.approx(budget, rel=0.06)
        assert run["recognised, w 1"] == run["recognised, w 3"] == 2 / 14  # images 3 and 13 are asked to be of class 3
    assert (s["speed"].weighting, s["speed"].timesteps, s["erd"].weighting) == ("speed", "speed", "erd")
    assert (s["erd"].curriculum_groups, s["curriculum"].curriculum_groups, s["slices"].slices) == (0, 10, 6)
    assert dict(vars(s["slices"]).items() - vars(s["stratified"]).items()).keys() == {"slices", "steps"}
    assert {net.config.predict for net in nets.values()} == {"eps"}
    assert race["slices"]["loss"] == held_out_loss(nets["slices"], few, 8)[0]
    images, labels = sample.draw_images(nets["erd"], range(14), [*range(10)], steps=2, guidance=3.0)
    judged = classifier.Judge(file, data.load(str(few[3])), CPU)(images, labels)
    assert race["erd"]["frechet, w 3"] == pytest.approx(judged["frechet"], rel=1e-4)
    for name, reference in (("erd", "plain"), ("slices", "stratified")):
        change, moved = (100 * (race[name][key] / race[reference][key] - 1) for key in ("loss", "frechet, w 1"))
        assert (f"eps, {name} ({race[name]['steps']} steps) against {reference} (20): loss {change:+.1f} %; frechet, w 1 "
                f"{moved:+.1f} %") in out
        assert out.count(f" {name} (") == 1 and "one seed" in out
    again = runs(neighbours, *first, "--only", "erd", "--predicts", "eps,x0", "--seeds", 2, "--best", 1)
    results = results_in(tmp_path / "n")["targets"]
    assert {name: found[0] for name, found in results["eps"].items()} == {name: race[name] for name in ("plain", "erd")}
    assert again.count("multiply-adds a step of 4") == 4  # trained in this call: plain and erd for x0, for the best again
    twice = [(predict, name) for predict, cells in results.items() for name, found in cells.items() if len(found) == 2]
    assert twice == neighbours.best_cells(results, 1, "frechet, w 3") and len(twice) == again.count("seed 1: ") == 2
    # without a rank schedule there is nothing to slice by, and all cost the same
    out = runs(neighbours, *command, "slices,clts", "--method", "full", "--out", tmp_path / "f", "--predicts", "v", "--noise",
               "linear", "--num", 0)
    found = results_in(tmp_path / "f")["targets"]["v"]
    assert {name: found[name][0]["steps"] for name in found} == dict(plain=20, clts=20, stratified=20)
    assert "slices are left out" in out and "frechet" not in out


def test_a_script_runs_on_shapes(tmp_path, monkeypatch):
    draw = data.draw_shapes  # once failed for less than an image a class
    monkeypatch.setattr(data, "draw_shapes", lambda n, *more: draw(n, *more) if n >= 10 else 1 / 0)
    out = runs(neighbours, "--dataset", "shapes", "--image-size", 8, "--batch-size", 4, "--device", "cpu", "--steps", 4,
               "--per-group", 5, "--only", "erd", "--predicts", "v", "--num", 0, "--out", tmp_path)
    assert "v, erd (4 steps) against plain (4)" in out and "note: --test" not in out


# ----------------------------------------------------------------------------------------------------
# compare.py


def test_order_and_time_of_the_compared_runs():
    """Seed by seed; an elastic run is one folder for all keeps, full rank has none. Time is that of the steps alone."""
    judged = compare.list_entries(["full", "static", "fitted", "elastic"], [0.5, 0.25], 2, Path("fits"), "elbo")
    assert [one.name for one in judged if one.seed == 0] == ["full", "static-0.5", "static-0.25", "fitted-0.5",
                                                            "fitted-0.25", "elastic-0.5", "elastic-0.25"]
    runs = {one.run: one.flags for one in judged}
    assert list(runs)[:5] == ["full-s0", "static-0.5-s0", "static-0.25-s0", "fitted-0.5-s0", "fitted-0.25-s0"]
    assert len(runs) == 12 and "elastic-s1" in runs and "keep" not in runs["elastic-s0"] | runs["full-s0"]
    assert runs["fitted-0.25-s1"] == dict(method="iso-compute", keep=0.25, rank_profile=Path("fits/elbo-0.25.train.json"))
    assert [one.shares.ranks for one in judged if one.row == "elastic"] == 2 * [((1, 0.5),), ((1, 0.25),)]
    log = [{"step": 100, "images_per_s": 80.0}, {"step": 150, "images_per_s": 40.0}]  # of 8: 10 s and 10 s
    assert compare.seconds_of(log, 8) == pytest.approx(20)


def test_interval_of_a_difference():
    """Welch's, which scipy has; a row of one seed has none."""
    a, b, still = [1.0, 1.2, 1.7], [5.0, 9.0], [2.0, 2.0, 2.0]
    (mean, half), theirs = compare.interval(a, b), scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert mean == pytest.approx(-5.7) and (mean - half, mean + half) == pytest.approx((theirs.low, theirs.high))
    # alone a spreads: variance 0.13 of three, 2 degrees of freedom; t(0.975, 2) = 4.30265
    assert compare.interval(a, still) == pytest.approx((-0.7, 4.30265 * (0.13 / 3) ** 0.5), rel=1e-5)
    assert compare.interval([3.0], a)[1] is None and compare.interval(still, [1.0, 1.0]) == (1.0, None)
    verdicts = [compare.verdict(*x) for x in ((-2, 1), (2, 1), (-0.5, 1), (-2, None))]
    assert verdicts == ["better", "worse", "not told apart", "no spread known"]


def test_differences_of_rows(capsys):
    """Each row against its pair at the same keep; more recognised is better, less of all else."""
    rows = {name if keep is None else f"{name}-{keep}": dict(row=name, keep=keep, runs=[
        {"loss": x, "recognised, w 1": x} for x in (0.97 * mean, 1.03 * mean)])
        for name, keep, mean in (("static", 0.5, 0.3), ("elastic", 0.5, 0.9), ("static", 0.25, 0.0), ("full", None, 0.3))}
    found = compare.print_differences(rows, [0.5, 0.25], ["loss", "recognised, w 1"])
    verdicts = {(c["this"], c["that"], c["measure"]): c["verdict"] for c in found}
    assert verdicts["elastic-0.5", "static-0.5", "loss"] == "worse" and len(found) == 6
    assert verdicts["elastic-0.5", "static-0.5", "recognised, w 1"] == "better"
    assert verdicts["full", "static-0.5", "loss"] == "not told apart"
    assert math.isnan(found[-1]["relative"]) and "+200.0%" in capsys.readouterr().out
    wide = {name: dict(row=name, keep=None if name == "full" else 1, runs=[{"loss": x} for x in losses])
            for name, losses in (("static", [1.0, 1.001]), ("full", [0.5, 1.2]))}  # full has a spread of its own
    assert compare.compare_rows(wide, "full", "static", ["loss"])[0]["verdict"] == "not told apart"


def test_compare_script(few, tmp_path):
    """Measures what --only names, once; a run of another length is refused before anything is done."""
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "elbo-0.25.train.json").write_text('{"t": [1, 500], "share": [0.2, 0.6]}')
    flags = [*few, "--steps", 4, "--num", 10, "--per-group", 5, "--sampling-steps", 2, "--out", tmp_path, "--seeds", 2,
             "--keeps", "0.25,0.5", "--rows", "static,iso-compute,elastic", "--", "--ema-decay", "0.5"]
    out = runs(compare, *flags, "--only", "static-0.25-s0,static-0.25-s1,elastic-s0")
    results, run = results_in(tmp_path), tmp_path / "static-0.25-s0"
    assert "8 of 12 are missing" in out
    rows = {(row["row"], row["keep"]): row for row in results["rows"]}
    assert [key + (row["n"],) for key, row in rows.items()] == [
        ("static", 0.25, 2), ("elastic", 0.25, 1), ("elastic", 0.5, 1)] and len(results["missing"]) == 8
    assert results["groups"] == ["1-33", "34-358", "359-900", "901-990", "991-1000"]
    judge, measured = tmp_path / "classifier.pt", "measured-static-0.25.json"
    test = common.every_second(data.load(str(few[3])), 1)
    assert len(test.images) == 20 and (test.images == data.load(str(few[3])).images[[*range(10, 20), *range(30, 40)]]).all()
    for folder, name, share in ((run, "static-0.25", None), (tmp_path / "elastic-s0", "elastic-0.5", 0.5)):
        net = opened(folder)[0]
        found = json.loads((folder / f"measured-{name}.json").read_text())["result"]
        loss, by_group = common.held_out_loss(net, test, 5, share=share)
        assert (found["loss"], found["loss_by_group"], found["predict"]) == (loss, by_group, "v") and found["seconds"] > 0
        shares = schedule.Shares(((1, share or 1.0),))
        images, labels = sample.draw_images(net, range(10), [*range(10)], steps=2, guidance=2.0, shares=shares)
        with np.load(folder / f"samples-{name}-w2.npz") as kept, torch.no_grad():
            assert np.array_equal(kept["arr_0"], images.permute(0, 2, 3, 1)) and np.array_equal(kept["labels"], labels)
            network = classifier.load_classifier(judge, CPU)[0].eval()
            real, fake = (network.features(x).double().numpy() for x in (test.images, images))
            assert found["recognised, w 2"] == (network(images).argmax(1) == labels).double().mean().item()
        sides = [side for x in (fake, real) for side in (x.mean(0), np.cov(x, rowvar=False))]
        assert found["frechet, w 2"] == pytest.approx(fid.frechet_distance(*sides), rel=1e-5)
        assert found["parameters"] == sum(p.numel() for p in net.parameters())
        assert found["sampling"] == flops.sampling(net.config, 2, shares=shares)
        assert found["flops"] == curves.read_log(folder)[-1]["flops"]
    losses = [run["loss"] for run in rows["static", 0.25]["runs"]]
    assert f"{np.mean(losses):.5f} ± {np.std(losses, ddof=1):.5f}" in out and "| elastic-0.25 | static-0.25" in out
    assert Image.open(tmp_path / "samples.png").width > Image.open(tmp_path / "samples.png").height
    before = (run / measured).stat().st_mtime_ns
    again, report = runs(compare, *flags, "--only", "static-0.25-s0"), runs(compare, *flags, "--report")
    assert (run / measured).stat().st_mtime_ns == before and "step 4" not in again
    assert report[report.index("| row"):] == again[again.index("| row"):]
    out = runs(compare, *flags, "--per-group", 6, "--only", "static-0.25-s0")
    assert "11 of 12 are missing" in out and (run / measured).stat().st_mtime_ns > before
    refuses(compare, *flags, "--ema-decay", "0.1", says=("cannot resume", "--ema-decay"))
    shutil.copy(few[1], tmp_path / "copy.npz")
    for changed, value in (("--lr", "0.1"), ("--dtype", "bfloat16"), ("--dataset", tmp_path / "copy.npz")):
        refuses(compare, *flags, changed, value, says=("static-0.25-s0 is a run of", changed, "--out"))  # and finished
    for more in (["--only", "static-0.5-s0"], ["--report"]):
        refuses(compare, *flags, "--steps", 6, *more, says=("s0 is a run of --steps 4, not 6", "--out"))
    assert not (tmp_path / "static-0.5-s0").exists()
    out = runs(compare, *flags, "--rows", "fitted", "--keeps", "0.25", "--fit", tmp_path / "fit", "--objective", "elbo")
    net = opened(tmp_path / "fitted-0.25-s1")[0]
    assert net.config.rank_profile == ((1, 0.2), (500, 0.6)) and net.config.method == "iso-compute"
    refuses(compare, *flags, "--rows", "fitted", says="--fit")
    refuses(compare, *flags, "--rows", "static", "--fit", tmp_path, says="add it to --rows")
    refuses(compare, *flags, "--keeps", "0.5,x", says=("--keeps", "numbers"))


# ----------------------------------------------------------------------------------------------------
# fit_ranks.py and elastic.py


@pytest.fixture(scope="module")
def elastic_run(few, tmp_path_factory):
    """The folder of a short elastic run, whose adaLN gates have left zero, and a classifier for its images."""
    folder = tmp_path_factory.mktemp("elastic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", TINY)
        train.main([*map(str, [*few[:2], *few[4:]]), "--model", "tiny", "--method", "elastic", "--steps", "6",
                    "--lr", "0.01", "--ema-decay", "0", "--sample-every", "0", "--out", str(folder / "run")])
    classifier.main([*map(str, few[:4]), "--steps", "5", "--out", str(folder / "clf.pt"), "--device", "cpu"])
    return folder / "run", folder / "clf.pt"


def test_groups_and_weights_of_the_fit():
    """Groups tile 1..T, end where log-SNR passes an edge, and each has a visited timestep. The weights are half the
    fall of log-SNR; T counts as T - 1."""
    for steps in (1, 3, 10, 50, 1000):
        visited = schedule.sampling_timesteps(steps)[:-1]
        groups = fit_ranks.noise_groups(NOISE.log_snr, visited)
        assert [t for group in groups for t in group] == list(range(1, T + 1))
        assert all(any(t in group for t in visited) for group in groups)
    assert len(groups) == 10 and len(fit_ranks.noise_groups(NOISE.log_snr, [1000])) == 1
    for group, edge in zip(groups[1:], fit_ranks.EDGES):
        assert NOISE.log_snr[group[0]] <= edge < NOISE.log_snr[group[0] - 1]
    weights = fit_ranks.elbo_weights(NOISE.log_snr)
    fall = (NOISE.log_snr[1:-1] - NOISE.log_snr[2:]) / 2
    assert torch.equal(weights[2:T], fall[:-1]) and weights[T] == 0 and weights[1] == weights[2]


def test_the_solver_against_every_choice():
    """Three groups, four levels, convex harm: the best of all choices within the budget at every budget that a choice
    on the hull of totals just meets; constraints hold, and cost harm."""
    rng = np.random.default_rng(0)
    cost, steps = np.array([1.0, 2.0, 4.0, 8.0]), np.array([3, 1, 2])
    hull = fit_ranks.lower_hull(np.array([0.0, 1.0, 2.0, 3.0]), np.array([5.0, 9.0, 1.0, 0.0]), np.arange(0, 3.1, 0.5))
    assert hull.tolist() == [5, 4, 3, 2, 1, 0.5, 0]  # the second point lies above the line between its neighbours
    for _ in range(20):
        harm = np.stack([fit_ranks.lower_hull(cost, np.sort(rng.random(4))[::-1], cost) for _ in range(3)])
        choices = np.array(list(itertools.product(range(4), repeat=3)))
        spent = (steps * cost[choices]).sum(1)
        total = harm[np.arange(3), choices].sum(1)
        for budget in (6.0, 11.0, 20.0, 48.0):
            for constraint, allowed in ((dict(), spent <= budget), (
                    dict(never_rises=True), (spent <= budget) & (np.diff(choices, axis=1) <= 0).all(1))):
                levels = fit_ranks.solve(harm, cost, steps, budget, **constraint)
                mine = (choices == levels).all(1)
                assert allowed[mine].all()
                # a price cannot reach choices above the hull of all totals: nothing cheaper is better
                assert total[mine] <= total[allowed & (spent <= spent[mine])].min() + 1e-12
        assert np.ptp(fit_ranks.solve(harm, cost, steps, 30.0, smooth=100.0)) == 0
    straight = np.outer(steps, [3.0, 2.0, 1.0, 0.0])  # on one edge all levels tie: nothing affordable is left over
    even = np.array([1.0, 2.0, 3.0, 4.0])
    for budget in (7.0, 8.0, 13.0, 17.0):
        levels = fit_ranks.solve(straight, even, steps, budget)
        spent = (steps * even[levels]).sum()
        assert spent <= budget and all(spent + n > budget for n, k in zip(steps, levels) if k < 3)
    with pytest.raises(ValueError, match="least share"):
        fit_ranks.solve(straight, even, steps, 5.9)


def test_a_fitted_profile_costs_no_more_than_the_constant_share():
    config = Config(**TINY, method="elastic", keep=1.0, rho_min=0.1, image_size=8)
    visited = schedule.sampling_timesteps(25)
    groups = fit_ranks.noise_groups(NOISE.log_snr, visited[:-1])
    steps = np.array([sum(t in group for t in visited[:-1]) for group in groups])
    harm = np.outer(steps * np.arange(10, 0, -1.0), (1 - np.array(fit_ranks.measured_shares(0.1))) ** 2)  # more where it is clean
    for share in (0.5, 0.25, 0.12):
        profile, least = fit_ranks.fit(harm, config, groups, visited[:-1], share)
        costs = [flops.sampling(config, 25, shares=schedule.Shares(ranks)) for ranks in (profile, ((1, share),))]
        assert 0.95 * costs[1] < costs[0] <= costs[1] and least <= fit_ranks.harm_of_constant(harm, config, share)
        shares = [s for _, s in profile]
        assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] >= config.rho_min
        rising = np.outer(steps * np.arange(1, 11.0), (1 - np.array(fit_ranks.measured_shares(0.1))) ** 2)
        flat = fit_ranks.fit(rising, config, groups, visited[:-1], share, never_rises=True)[0]
        assert np.ptp([s for _, s in flat]) < 0.01
        middle = np.outer(steps * [1, 1, 2, 4, 9, 9, 4, 2, 1, 1][:len(steps)], harm[0])  # groups can only rise together
        least = fit_ranks.fit(middle, config, groups, visited[:-1], share, never_rises=True)[1]
        assert least <= 1.005 * fit_ranks.harm_of_constant(middle, config, share)  # which never rises, either
        for shape in elastic.SHAPES.values():
            profile = elastic.scaled(shape, config, 25, share)
            assert flops.sampling(config, 25, shares=schedule.Shares(profile)) <= costs[1]
            assert min(s for _, s in profile) >= config.rho_min
    paper = elastic.scaled(elastic.SHAPES["paper"], config, 25, 0.5)
    phi = [schedule.RankSchedule().active(t, 1000) for t in visited[:-1][::-1]]
    assert np.corrcoef([s for _, s in paper], phi)[0, 1] > 0.999


def test_harm_of_few_channels(few, elastic_run):
    """Against losses computed one by one; none for all channels; a model that does not hear the label says nothing of
    it; layers with zeroed channels are those of fewer."""
    net, images = opened(elastic_run[0])[0], data.load(str(few[3]))
    groups = fit_ranks.noise_groups(NOISE.log_snr, [200, 600, 1000])
    harm, nats = fit_ranks.measure_harm([(net, 0.2), (net, None)], images, groups, 6, seed=3)
    assert all((table[:, -1] == 0).all() for table in harm.values()) and len(nats) == len(groups)
    order, weights = torch.randperm(40, generator=torch.Generator().manual_seed(3)), fit_ranks.elbo_weights(NOISE.log_snr)
    for g, group in enumerate(groups):
        t = group[0] + ((torch.arange(6, dtype=torch.float64) + 0.5) / 6 * len(group)).long()
        batch = common.noised_batch(net, images, order[torch.arange(6)], t, range(6 * g, 6 * g + 6), 3)
        losses = [train.denoising_loss(net, net, batch._replace(share=share))[0].detach().double()
                  * schedule.eps_loss_factor("v", NOISE)[t] for share in (0.2, None)]
        worse = losses[0] - losses[1]
        assert harm["loss"][g, 0] == pytest.approx(len(group) / T * worse.mean().item(), rel=1e-3, abs=1e-9)
        assert harm["elbo"][g, 0] == pytest.approx(len(group) * 192 * (weights[t] * worse).mean().item(), rel=1e-3)
        labelled, free = (batch._replace(y=y) for y in (batch.y, torch.full_like(batch.y, 10)))
        gaps = []
        for share in (0.2, None):
            eps = [fit_ranks.eps_answers(net, part, share)[0] for part in (labelled, free)]
            gaps.append(eps[0] - eps[1])
        moved = (gaps[0] - gaps[1]).square().sum((1, 2, 3)).double()
        assert harm["class"][g, 0] == pytest.approx(len(group) * (weights[t] * moved).mean().item(), rel=1e-3)
    kinds = fit_ranks.layer_kinds(net)
    assert sorted(kinds) == ["adaln", "k", "mlp_in", "mlp_out", "out", "q", "time", "v"]
    names = [name for some in kinds.values() for name in some]
    fewer, x = fit_ranks.with_fewer(net, names, 0.3), torch.randn(2, 3, 8, 8)
    y, t = torch.tensor([1, 2]), torch.tensor([300, 300])
    assert torch.allclose(fewer(x, t, y), net(x, t, y, net.active(300, 0.3)), atol=1e-6)
    saved = sum(fit_ranks.saved_by(net.config, some, 0.3) for some in kinds.values())
    assert saved == flops.one_image(net.config, 1)[0] - flops.one_image(net.config, 1, share=0.3)[0]
    with torch.no_grad():
        for embedder in net.embedders:
            embedder.label.weight[:] = embedder.label.weight[10].clone()
    harm, nats = fit_ranks.measure_harm([(net, 0.2), (net, None)], images, groups, 6)
    assert np.allclose(nats, 0, atol=1e-6) and np.abs(harm["class"]).max() == 0


def test_rollouts_ask_for_the_classes_of_the_images(few, elastic_run, tmp_path):
    """A model may have more label rows than its images have classes (--num-classes 30): those are never drawn."""
    run, judge = elastic_run
    shutil.copytree(run, tmp_path / "more")
    state = torch.load(run / "model.pt", weights_only=True)
    state["config"]["num_classes"] = 30
    name = "embedders.0.label.weight"
    rows = state["model"][name]
    state["model"][name] = torch.cat([rows[:10], torch.full((20, rows.shape[1]), 50.0), rows[10:]])
    torch.save(state, tmp_path / "more" / "model.pt")
    for folder, out in ((run, "same"), (tmp_path / "more", "other")):
        runs(fit_ranks, "--run", folder, *few[:6], "--classifier", judge, "--per-group", 2, "--rollouts", 15,
             "--sampling-steps", 2, "--shares", "0.5", "--out", tmp_path / out)
    same, other = (json.loads((tmp_path / out / "harm.json").read_text())["harm"] for out in ("same", "other"))
    assert other["rollout"] == same["rollout"] and other["class"] == same["class"]


def test_fit_and_judge_scripts(few, elastic_run, tmp_path):
    """From a run to profiles that sample.py and train.py take, and to the tables of elastic.py, judged once."""
    run, judge = elastic_run
    flags = [*few[:6], "--classifier", judge]
    out = runs(fit_ranks, "--run", run, *flags, "--per-group", 4, "--rollouts", 3, "--sampling-steps", 4, "--layers",
               "--shares", "1,0.5,0.25", "--out", tmp_path / "fit")
    assert "what the label says of an image" in out and "per multiply-add saved" in out
    found = json.loads((tmp_path / "fit" / "harm.json").read_text())
    assert np.array(found["harm"]["rollout"])[:, -1].max() == 0 < np.array(found["harm"]["rollout"])[:, 0].min()
    for objective in fit_ranks.OBJECTIVES:
        profile = model.read_profile(str(tmp_path / "fit" / f"{objective}-0.25.json"))
        cost = flops.sampling(opened(run)[0].config, 4, shares=schedule.Shares(profile))
        assert cost <= flops.sampling(opened(run)[0].config, 4, shares=schedule.Shares(((1, 0.25),)))
        scaled = model.read_profile(str(tmp_path / "fit" / f"{objective}-0.25.train.json"))
        largest = max(share for _, share in profile)
        assert scaled == tuple((t, pytest.approx(share / largest)) for t, share in profile)
    file = tmp_path / "fit" / "elbo-0.5.json"
    assert "less than with all channels" in runs(sample, "--run", run, "--ranks", file, "--num", 4, "--steps", 2)
    table = [*flags, "--num", 4, "--sampling-steps", 4, "--shares", "0.5,0.25", "--fit", tmp_path / "fit", "--out", tmp_path]
    out = runs(elastic, "--runs", run, run, *table)
    assert "fitted by rollout" in out and "± 0.00" in out and Image.open(tmp_path / "elastic.png").width > 600
    tables = json.loads((tmp_path / "results.json").read_text())["tables"]
    row = next(row for row in tables["budgets"] if row["share"] == 0.5)
    net, test = opened(run)[0], common.every_second(data.load(str(few[3])), 1)
    images, labels = sample.draw_images(net, range(4), [*range(10)], steps=4, guidance=2.0,
                                        shares=schedule.Shares(((1, 0.5),)))
    wanted = classifier.Judge(judge, test, CPU)(images, labels)
    assert row["frechet, w 2"] == pytest.approx(2 * [wanted["frechet"]]) and row["recognised, w 2"][0] == wanted["recognised"]
    guide = [row for row in tables["guide"] if row["first"] == 1.0 and row["w"] == 2.0]
    assert [row["guide"] for row in guide] == [1.0, 0.5, 0.25, 0.1, 0.25]
    assert [row["multiply_adds"] for row in guide[:2]] == [1, guide[1]["cost"] / guide[0]["cost"]]
    before = (tmp_path / "judged.json").stat().st_mtime_ns
    runs(elastic, "--runs", run, run, *table, "--only", "budgets,profiles")
    assert (tmp_path / "judged.json").stat().st_mtime_ns == before
    refuses(elastic, "--runs", run, *table, "--shares", "0.05", says=("--shares", "0.1"))
    for shares, says in (([0.05, 0.2], "share 0.05 was not trained"), ([1, 1], "costs more than the constant share 0.5")):
        (tmp_path / "loss-0.5.json").write_text(json.dumps(dict(t=[1, 500], share=shares)))
        refuses(elastic, "--runs", run, *table, "--fit", tmp_path, says=("loss-0.5.json", says))
    refuses(elastic, "--runs", run, *table, "--fit", run, says="holds no profile for 0.5, 0.25")
    save_npz(tmp_path / "large.npz", *data.draw_shapes(40, 16, 1)), save_npz(tmp_path / "few.npz", *data.draw_shapes(10, 8, 1))
    np.savez(tmp_path / "latents.npz", latents=np.zeros((40, 3, 8, 8), np.float16), labels=np.arange(40) % 10)
    for name, says in (("large", "another kind or size"), ("latents", "another kind or size"), ("few", "at least 20")):
        images = ["--dataset", tmp_path / f"{name}.npz", "--test", tmp_path / f"{name}.npz", *few[4:6], "--classifier", judge]
        for module, word in ((elastic, "--runs"), (samplers, "--run"), (fit_ranks, "--run")):
            if (module, name) != (fit_ranks, "few"):  # which takes the other ten
                refuses(module, word, run, *images, says=says)
    refuses(fit_ranks, "--run", run, *flags, "--shares", "2", says=("--shares", "1"))
    refuses(fit_ranks, "--run", run, *few[:6], "--classifier", tmp_path / "none", "--per-group", 10**6, says="no classifier")
    refuses(fit_ranks, "--run", tmp_path, *flags, says="does not exist")
    train.main([*map(str, [*few[:2], *few[4:]]), "--model", "tiny", "--method", "static", "--steps", "1", "--sample-every",
                "0", "--out", str(tmp_path / "static")])
    refuses(fit_ranks, "--run", tmp_path / "static", *flags, says="--method elastic")
    refuses(elastic, "--runs", tmp_path / "static", *table, says="--method elastic")
    train.main([*map(str, [*few[:2], *few[4:]]), "--model", "tiny", "--method", "elastic", "--rho-min", "0.6", "--steps",
                "1", "--sample-every", "0", "--out", str(tmp_path / "wide")])
    runs(elastic, "--runs", tmp_path / "wide", *table, "--shares", 0.8, "--guidances", 1, "--only", "budgets,guide")
    tables = json.loads((tmp_path / "results.json").read_text())["tables"]
    assert [row["share"] for row in tables["budgets"]] == [1, 0.8, 0.7, 0.6]  # none that was not trained
    assert [(row["first"], row["guide"]) for row in tables["guide"] if row["w"] == 2] == [(1, 1), (0.6, 0.6), (1, 0.6)]


def test_samplers_script(few, elastic_run, tmp_path):
    """Equal passes of the network, and what they cost; the samples are those of sample.py."""
    run, judge = elastic_run
    runs(samplers, "--run", run, *few[:6], "--classifier", judge, "--passes", "2,4", "--num", 5, "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["passes"], row["sampler"], row["steps"]) for row in rows] == [
        (2, "ddim", 2), (2, "dpm++", 2), (2, "heun", 2), (4, "ddim", 4), (4, "dpm++", 4), (4, "heun", 3)]
    net, test = opened(run)[0], common.every_second(data.load(str(few[3])), 1)
    assert [row["cost"] for row in rows] == 3 * [2 * flops.sampling(net.config, 2)] + 3 * [2 * flops.sampling(net.config, 4)]
    images, labels = sample.draw_images(net, range(5), [*range(10)], sampler="heun", steps=3, guidance=2.0)
    assert rows[5]["frechet"] == pytest.approx(classifier.Judge(judge, test, CPU)(images, labels)["frechet"])
    assert samplers.steps_for("heun", 1) == 1 and samplers.steps_for("heun", 100) == 51


# ----------------------------------------------------------------------------------------------------
# autoencoder.py and latents.py


def test_the_loss_of_the_autoencoder():
    """Squared error, and the divergence of N(mean, variance) from N(0, 1), against torch's own."""
    mean, log_variance, noise = torch.randn(3, 5, 4, 2, 2, dtype=torch.float64)
    x, twice = torch.randn(5, 4, 2, 2, dtype=torch.float64), lambda z: 2 * z
    z = mean + (log_variance / 2).exp() * noise
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)).mean()
    expected = (2 * z - x).square().mean() + 0.3 * divergence
    assert autoencoder.loss_of(x, mean, log_variance, twice, 0.3, noise).item() == pytest.approx(expected.item())
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert autoencoder.psnr(images, images + 51) == pytest.approx(13.979, abs=1e-3)  # 20 log10(5)


def test_from_images_to_latents_and_back(few, tmp_path):
    """The latents train a model, whose samples the decoder turns into images; what is reported is what is written."""
    judge = tmp_path / "clf.pt"
    classifier.main([*map(str, few[:4]), "--steps", "3", "--out", str(judge), "--device", "cpu"])
    out = runs(autoencoder, *few[:6], "--steps", 30, "--width", 8, "--classifier", judge, "--out", tmp_path / "ae")
    result = json.loads((tmp_path / "ae" / "results.json").read_text())
    assert f"PSNR {result['psnr']:.2f} dB" in out and result["psnr"] > 5 and result["frechet"] > 0
    file = np.load(tmp_path / "ae" / "latents.npz")
    assert file["latents"].shape == (40, 4, 2, 2) and file["latents"].dtype == np.float16
    assert np.array_equal(file["labels"], data.load(str(few[1])).labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", TINY | dict(depth=1, patch=2))  # of 2 x 2 latents
        train.main(["--dataset", str(tmp_path / "ae" / "latents.npz"), "--model", "tiny", "--steps", "2", "--device", "cpu",
                    "--batch-size", "2", "--out", str(tmp_path / "run")])
    runs(sample, "--run", tmp_path / "run", "--decoder", tmp_path / "ae" / "decoder.pt", "--num", 2, "--steps", 1, "--out",
         tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (2, 8, 8, 3)
    refuses(autoencoder, *few[:6], "--width", 9, says="multiple of 8")
    refuses(autoencoder, *few[:6], "--kl", 1e39, "--steps", 2, "--width", 8, "--out", tmp_path / "nan", says="finite")
    assert not (tmp_path / "nan").exists()
    refuses(autoencoder, *few[:6], "--out", few[1], says="no folder that you may write into")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "encode", lambda *_: torch.full((40, 4, 2, 2), 2e4))
        refuses(autoencoder, *few[:6], "--steps", 1, "--width", 8, "--out", tmp_path / "nan", says="latents reach 10,000")
    refuses(autoencoder, "--dataset", tmp_path / "ae" / "latents.npz", "--test", few[3], says="other classes or another")


def test_latents_of_other_people(tmp_path):
    """fast-DiT's two folders; EDM2's and REPA's folder or ZIP, of which a latent is drawn or the mean taken."""
    rng = np.random.default_rng(0)
    z, labels = rng.standard_normal((12, 4, 2, 2)).astype(np.float32), rng.integers(0, 5, 12)
    for folder in ("z", "y"):
        (tmp_path / folder).mkdir()
    for i in range(12):  # 10.npy must come after 9.npy
        np.save(tmp_path / "z" / f"{i}.npy", z[i:i + 1]), np.save(tmp_path / "y" / f"{i}.npy", labels[i:i + 1])
    out = tmp_path / "out.npz"
    runs(latents, tmp_path / "z", "--labels", tmp_path / "y", "--out", out)
    assert np.array_equal(np.load(out)["latents"], z.astype(np.float16)) and np.array_equal(np.load(out)["labels"], labels)
    assert data.load(str(out)).images.shape == (12, 4, 2, 2)
    runs(latents, tmp_path / "z", "--out", out)
    assert np.load(out).files == ["latents"]

    both, edm, listing = np.concatenate([z, np.abs(z) / 2], axis=1), tmp_path / "edm", []
    for i in range(12):
        path = edm / f"0000{i % 3}" / f"img-mean-std-{i:08d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, both[i])
        listing.append([path.relative_to(edm).as_posix(), int(labels[i])])
    (edm / "dataset.json").write_text(json.dumps({"labels": listing}))
    with zipfile.ZipFile(tmp_path / "edm.zip", "w") as archive:
        for file in edm.rglob("*.*"):
            archive.write(file, str(file.relative_to(edm)).replace("/", "\\"))  # as some programs do
    order = [i for g in range(3) for i in range(g, 12, 3)]  # by name
    for source in (edm, tmp_path / "edm.zip"):
        runs(latents, source, "--mean", "--out", out)
        assert np.array_equal(np.load(out)["latents"], z[order].astype(np.float16))
        assert np.array_equal(np.load(out)["labels"], labels[order])
    runs(latents, edm, "--out", out, "--seed", 3)
    drawn = (np.load(out)["latents"] - z[order]) / (np.abs(z[order]) / 2)
    assert abs(drawn.mean()) < 0.2 and 0.8 < drawn.std() < 1.2
    refuses(latents, edm, "--out", out / "x.npz", says="no folder that you may write into")
    refuses(latents, edm, "--labels", tmp_path / "y", "--out", out, says="--labels is for folders of i.npy")
    refuses(latents, tmp_path / "z", "--mean", "--out", out, says="--mean for img-mean-std")
    for i, value, says in ((0, -1, "labels from -1"), (5, 10_000, "to 10000")):
        np.save(tmp_path / "y" / f"{i}.npy", value)
        refuses(latents, tmp_path / "z", "--labels", tmp_path / "y", "--out", out, says=says)
        np.save(tmp_path / "y" / f"{i}.npy", labels[i])
    (tmp_path / "z" / "more").mkdir()
    np.save(tmp_path / "z" / "more" / "3.npy", z[:1])
    refuses(latents, tmp_path / "z", "--out", out, says=("3.npy and", "more/3.npy", "of one number"))
    shutil.rmtree(tmp_path / "z" / "more")
    for value in (1e4, 9999.0, 1e300):  # 9999 is 10,000 in float16
        np.save(tmp_path / "z" / "3.npy", np.full((1, 4, 2, 2), value))
        refuses(latents, tmp_path / "z", "--out", out, says=("3.npy", "10,000 and more"))
    np.save(tmp_path / "y" / "12.npy", labels[:1])
    refuses(latents, tmp_path / "z", "--labels", tmp_path / "y", "--out", out, says="13 labels")
    np.save(tmp_path / "z" / "3.npy", np.full((1, 4, 2, 2), np.nan))
    refuses(latents, tmp_path / "z", "--out", out, says=("3.npy", "finite"))
    np.save(tmp_path / "z" / "3.npy", z[:1, :3])
    refuses(latents, tmp_path / "z", "--out", out, says=("3.npy", "(3, 2, 2)"))
    (edm / "dataset.json").write_text('{"labels": [["x.npy", 1]]}')
    refuses(latents, edm, "--out", out, says="dataset.json")
    for label, says in (("2.5", "dataset.json"), ("true", "dataset.json"), ("Infinity", "dataset.json"),
                        (str(10**30), "expected are 0 to 9999")):
        (edm / "dataset.json").write_text(json.dumps({"labels": listing}).replace(f", {labels[0]}]", f", {label}]"))
        refuses(latents, edm, "--out", out, says=says)
    (edm / "dataset.json").unlink()
    np.save(path, np.concatenate([z[0], -np.ones_like(z[0])]))
    refuses(latents, edm, "--out", out, says="negative deviations")
    np.save(path, z[0, :3])
    refuses(latents, edm, "--out", out, says="means and deviations")
    np.save(path, np.zeros((4, 0, 2)))
    refuses(latents, edm, "--out", out, says="finite numbers")
    content = bytearray((tmp_path / "edm.zip").read_bytes())
    content[content.index(b"NUMPY") + 200] ^= 255  # in the first member
    (tmp_path / "damaged.zip").write_bytes(content)
    refuses(latents, tmp_path / "damaged.zip", "--out", out, says="is no .npy of latents")
    refuses(latents, tmp_path / "none", "--out", out, says="neither a folder nor a ZIP")


# ----------------------------------------------------------------------------------------------------
# compress.py

TUNING = dict(model="tiny", method="static", keep=0.5, steps=4, lr=1e-2, warmup=2, ema_decay=0.5, label_dropout=0.3,
              save_every=2, log_every=2, seed=3)


def distil(teacher, few, folder, origin="hash", **changes):
    flags = few[:2] + few[4:] + common.as_flags(TUNING | dict(predict=teacher.config.predict) | changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", TINY)  # as deep as the teacher
        return compress.distil(teacher, folder, [str(word) for word in flags], origin)


def test_truncation_is_the_best_approximation_of_its_rank():
    """Every low-rank layer: the first r terms of numpy's SVD. All others, and the biases: the teacher's. The cost of
    tuning is counted exactly: three products for the student (two where the input is data), one for the teacher."""
    teacher = awake(method="full").requires_grad_(False)
    student = compress.truncate(teacher, 0.5)
    assert student.config == replace(teacher.config, method="static", keep=0.5)
    ranks = {layer.name: layer.rank for layer in model.linear_layers(student.config) if layer.rank}
    low = {name: layer for name, layer in student.named_modules() if isinstance(layer, LowRankLinear)}
    assert set(low) == set(ranks)
    for name, layer in low.items():
        P, S, Qt = np.linalg.svd(teacher.get_submodule(name).weight.double().numpy())
        best = torch.from_numpy((P[:, :ranks[name]] * S[:ranks[name]]) @ Qt[:ranks[name]])
        assert layer.rank == ranks[name] < len(S) and relative(layer.weight().detach().double(), best) < 1e-4
    others = {name: p for name, p in student.named_parameters() if not name.endswith((".U", ".V"))}
    assert len(others) == len(dict(teacher.named_parameters())) - len(low)
    assert all(torch.equal(p, teacher.get_parameter(name)) for name, p in others.items())
    x, t, y = torch.randn(5, 3, 8, 8), torch.randint(1, T + 1, (5,)), torch.randint(0, 11, (5,))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        (student(x, t, y) - teacher(x, t, y)).square().mean().backward()
    assert compress.tuning_cost(student.config, teacher.config, 5) * 2 == counter.get_total_flops()


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_distillation_written_out(predict, few, tmp_path):
    """Adam towards the teacher's output, warm-up over 5 % of the steps, a cosine to zero, EMA; the log is about eps."""
    teacher, dataset = awake(method="full", predict=predict).requires_grad_(False), data.load(str(few[1]))
    found, s = distil(teacher, few, tmp_path / "r"), train.read_config(tmp_path / "r")[1]
    student, losses = compress.truncate(teacher, 0.5), []
    weights = {name: p.detach().clone().requires_grad_(True) for name, p in student.named_parameters()}
    ema, m, v = ({name: p.detach().clone() * scale for name, p in weights.items()} for scale in (1, 0, 0))
    draws = train.State(s, student.config, CPU)
    for step in range(4):
        draws.step = step
        batch = train.draw_batch(dataset, draws, s)
        t = batch.t
        ab = NOISE.alpha_bar[t].float().view(-1, 1, 1, 1)
        x_t = ab.sqrt() * batch.x_0 + (1 - ab).sqrt() * batch.eps
        error = (torch.func.functional_call(student, weights, (x_t, t, batch.y)) - teacher(x_t, t, batch.y)) ** 2
        losses.append((error.detach() * (ab if predict == "v" else 1)).mean().item())
        gradient = torch.autograd.grad(error.mean(), weights.values())
        lr = s.lr * (1 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 0.2) / 3.8)))  # warm-up: 0.2 steps
        decay = min(0.5, (1 + step) / (10 + step))
        for (name, p), g in zip(weights.items(), gradient):
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g * g
            with torch.no_grad():
                p -= lr * (m[name] / (1 - 0.9 ** (step + 1))) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                ema[name] = decay * ema[name] + (1 - decay) * p
    # K's bias has no effect: its gradient is rounding, of which Adam makes full steps
    names = [name for name in weights if not name.endswith(".k.bias")]
    ours, theirs, start = (torch.cat([p[name].detach().flatten() for name in names])
                           for p in (dict(found.named_parameters()), ema, dict(student.named_parameters())))
    assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()
    lines, cost = curves.read_log(tmp_path / "r"), compress.tuning_cost(student.config, teacher.config, 4)
    assert [line["flops"] for line in lines] == [2 * cost, 4 * cost]
    assert [line["loss"] for line in lines] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-3)


def test_stopped_distillation_goes_on_to_the_same_bits(few, tmp_path, monkeypatch):
    teacher, draw = awake(method="full").requires_grad_(False), train.draw_batch
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "draw_batch", lambda d, state, s: draw(d, state, s) if state.step < 3 else 1 / 0)
        distil(teacher, few, tmp_path / "b")
    straight, resumed = (distil(teacher, few, tmp_path / name) for name in "ab")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))
    assert [line["step"] for line in curves.read_log(tmp_path / "b")] == [2, 4]
    for change, says in ((dict(lr=1e-3), "is a run of --lr"), (dict(keep=0.4), "other settings"),
                         (dict(origin="another"), "another teacher"), (dict(seed=5), "other settings")):
        with pytest.raises(script.InputError, match=says):
            distil(teacher, few, tmp_path / "b", **change)
    with pytest.raises(script.InputError, match="lower learning rate: train.py"):
        distil(teacher, few, tmp_path / "c", lr=1e18)


def test_compress_script(few, tmp_path):
    flags, folder = [*few, "--steps", 8, "--per-group", 5, "--out", tmp_path / "o"], tmp_path / "o" / "s0"
    out, results = runs(compress, *flags), results_in(tmp_path / "o")
    rows = {row["model"]: row for row in results["rows"]}
    assert list(rows) == list(compress.MODELS) and len(results["comparisons"]) == 2
    (teacher, _), (student, s) = opened(folder / "full"), opened(folder / "student")
    assert results["settings"]["tune_steps"] == s.steps == 2 and student.config.method == "static"
    for name, net in (("full", teacher), ("truncated", compress.truncate(teacher, 0.5)), ("student", student)):
        assert rows[name]["loss"] == pytest.approx(held_out_loss(net, few, 5)[0]) and rows[name]["loss_sd"] is None
        assert rows[name]["sampling"] == flops.sampling(net.config)
        assert rows[name]["parameters"] == sum(p.numel() for p in net.parameters())
    taught = flops.training_run(teacher.config, 8, 4, penalty=False)
    assert rows["full"]["training"] == rows["truncated"]["training"] == taught
    assert rows["student"]["training"] == taught + 2 * compress.tuning_cost(student.config, teacher.config, 4)
    assert rows["iso-param"]["parameters"] == rows["student"]["parameters"] and "The models predict v." in out
    assert "lower in 0 of 1" in out or "lower in 1 of 1" in out
    runs(sample, "--run", folder / "student", "--num", 2, "--steps", 2, "--device", "cpu")  # as any run
    # a finished call is over at once, and a given teacher serves as well
    assert "step 2/2" not in runs(compress, *flags) and results_in(tmp_path / "o") == results
    given = [*few[2:6], "--per-group", 5, "--device", "cpu", "--teacher"]
    runs(compress, *given, folder / "full", "--out", tmp_path / "p")
    assert results_in(tmp_path / "p")["rows"] == results["rows"]
    refuses(compress, *flags, "--teacher", folder / "iso-param", says="no full-rank model")
    refuses(compress, *given, folder / "full", "--predict", "eps", says=("no full-rank model", "predicts v"))
    refuses(compress, *flags, "--tune-lr", 1e-4, says="student is a run of --lr")
    for flag, name in (("--steps", "full"), ("--adaptive-steps", "iso-compute"), ("--tune-steps", "student")):
        refuses(compress, *flags, flag, 9, says=(f"{name} is a run of --steps", "not 9", "--out"))


# ----------------------------------------------------------------------------------------------------
# paper_tables.py, for `flops.py --paper`


def paper_model(name="DiT-S/2", size=32, method="full", keep=1.0):
    return Config(**model.PRESETS[name], image_size=size, num_classes=1000, method=method, keep=keep)


@pytest.mark.parametrize("row", [row for row in paper_tables.PRINTED if row[3] in ("full", "static") and row[5]],
                         ids=lambda row: " ".join(map(str, row[1:5])))
def test_full_and_static_rows_agree_to_the_last_printed_digit(row):
    """Tables 1 to 4, 7 and 8. experiments/paper_tables.py, for `flops.py --paper`."""
    _, name, size, method, keep, gflops, params, spent = row
    config = paper_model(name, size, method, keep or 1.0)
    assert round(paper_tables.sampling(config) / 1e9, 3) == gflops
    assert round(model.parameter_count(config) / 1e6, 2) == params
    assert not spent or round(paper_tables.training(config, 800_000, 128) / 1e18, 3) == spent


def test_one_full_rank_model_as_published():
    """Tables 1 and 4 over the 101 passes of 100 DDIM steps; Tables 2 and 8 before rounding; Tables 1 and 7: training is
    three passes without the patch convolution and the last projection."""
    for size, published in ((32, 5_462_115_840), (64, 21_806_143_488)):
        config, pixel_layer = paper_model(size=size), (size // 2) ** 2 * 12 * 384
        assert paper_tables.one_pass(config, 1) == published
        assert paper_tables.training(config, 5, 128) == 5 * 128 * 3 * (published - 2 * pixel_layer)
    assert model.parameter_count(paper_model()) == 39_795_852
    assert model.parameter_count(paper_model("DiT-B/2")) == 147_421_452


def test_the_note_on_adaptive_rows_tells_our_figures():
    """C.1, 3.1: with the stated schedule the average is 0.70 r_max, and ISO-Compute's r_max 1.42 r_base."""
    iso, static = paper_model(method="iso-param", keep=0.75), paper_model(method="static", keep=0.75)
    none = dict.fromkeys(flops.active_channels(iso, 1), 0)
    dense, full = (sum(p.size for p in flops.products(iso, k)) for k in (none, None))
    total = lambda config: sum(layer.rank for layer in model.linear_layers(config) if layer.rank)
    assert round((flops.sampling(iso) / 100 - dense) / (full - dense), 2) == 0.70
    assert round(total(replace(iso, method="iso-compute")) / total(static), 1) == 1.4
    assert "averages 0.70" in paper_tables.NOTES and "needs 1.42" in paper_tables.NOTES


def test_no_printed_figure_enters_a_computation(monkeypatch):
    """PRINTED with other figures: the same computed ones."""
    before = paper_tables.paper_rows()
    tripled = [row[:5] + tuple(f and 3 * f for f in row[5:]) for row in paper_tables.PRINTED]
    monkeypatch.setattr(paper_tables, "PRINTED", tripled)
    for a, b in zip(before, paper_tables.paper_rows()):
        assert {k: v for k, v in a.items() if "paper" not in k} == {k: v for k, v in b.items() if "paper" not in k}


def test_paper_json_keeps_its_contract():
    """One object for each row of each table; null where the paper prints nothing."""
    rows = json.loads(runs(flops, "--paper", "--json"), parse_constant=pytest.fail)
    keys = {"table", "method", "keep", "image_size", "gflops", "paper_gflops", "params", "paper_params", "train_flops",
            "paper_train_flops"}
    assert all(keys <= set(row) for row in rows)
    count = {table: sum(row["table"] == table for row in rows) for table in {row["table"] for row in rows}}
    assert count == {"1": 4, "2": 10, "3": 10, "4": 10, "6": 4, "7": 4, "8": 2, "B.4": 1}
    for row in rows:
        assert (row["paper_train_flops"] is not None) == (row["table"] in ("1", "7"))
        assert (row["paper_gflops"] is not None) == (row["table"] not in ("7", "B.4"))
    static = next(row for row in rows if row["table"] == "1" and row["method"] == "static")
    assert round(static["gflops"], 3) == static["paper_gflops"] == 421.256
    assert (static["params"], static["paper_params"]) == (31_344_780, 31_340_000)
    assert round(static["train_flops"], -15) == static["paper_train_flops"] == 1_281 * 10**15
    out = runs(flops, "--paper")  # in the terminal: ours beside theirs
    assert "nan" not in out and "23.8%" in out and "15.0%" in out  # B.4: a tenth of each layer
    assert out.splitlines()[1].split() == ("1 2 3 DiT-S/2 32 full 551.674 551.674 1.000 39.80 39.80 1.000 "
                                           "1.677 1.677 1.000").split()


# ----------------------------------------------------------------------------------------------------
# What people get wrong: one line, and nothing is written

EVERY = (ablations, neighbours, compare, compress, rank_analysis)
REFUSED = [  # scripts, flags in which ODD is a folder, words of the answer
    (EVERY, "--dataset ODD/none", "no dataset"), (EVERY, "--test ODD/none", "no dataset"),
    (EVERY, "--test ODD/smaller.npz", "other classes"), (EVERY, "--test ODD/fewer.npz", "other classes"),
    (EVERY, "--dataset ODD/odd.npz --test ODD/odd.npz", "patch"), (EVERY, "--image-size 16", "--image-size"),
    (EVERY, "--device abacus", "abacus"), (EVERY, "--model huge", "huge"), (EVERY, "--batch-size x", "--batch-size"),
    (EVERY, "--resume", "--resume"), (EVERY, "--method=thin", "thin"), (EVERY, "--lr -1", "--lr"),
    (EVERY, "-- --ema-decay 7", "--ema-decay"), (EVERY, "--nonsense", "--nonsense"), (EVERY[:4], "--seed 3", "--seed"),
    (EVERY[:4], "--seeds 0", "--seeds"), (EVERY[:4], "--per-group 0", "--per-group"), (EVERY[1:3], "--num 1", "--num"),
    (EVERY[:2], "--only nonsense", "nonsense"), (EVERY[:2], "--curriculum-groups=3", "--curriculum-groups"),
    (EVERY[1:3], "--sampling-steps 1001", "1000"), (EVERY[1:3], "--guidance inf", "--guidance"),
    (EVERY[1:3], "--classifier ODD/nothing.pt", "nothing.pt is not a classifier"),
    (EVERY[1:3], "--classifier ODD/fewer.pt", "fewer.pt is of other classes"),
    ([neighbours], "--predicts u", "x0"), ([neighbours], "--predict v", "--predict"),
    ([neighbours], "--best 0", "--best"), ([neighbours], "--best 1", "--seeds"),
    ([neighbours], "--best 1 --seeds 2 --num 0", "--num"), ([compare], "--only full-s7", "elastic-s2"),
    ([compare], "--report", "no finished run"), ([compress], "--keep 0", "--keep"),
    ([compress], "--tune-lr -1", "--tune-lr"), ([compress], "--teacher ODD", "config.json"),
    ([compress], "--teacher ODD --seeds 2", "--seeds"), ([rank_analysis], "--steps 45", "multiple"),
    ([rank_analysis], "--group-steps 18", "--group-steps 18"), ([rank_analysis], "--seed -1", "seed"),
    ([rank_analysis], "--per-timestep 0", "at least 1"), ([rank_analysis], "--save-every 3", "--save-every"),
    ([classifier], "--dataset ODD/plain.npz", "no classes"), ([classifier], "--test ODD/fewer.npz", "other classes"),
    ([classifier], "--classifier ODD/fewer.pt", "--generated"), ([classifier], "--lr 2", "--lr"),
    ([classifier], "--generated ODD/fewer.npz --classifier ODD/nothing.pt", "not a classifier"),
    ([classifier], "--generated ODD/fewer.npz --classifier ODD/none.pt", "no classifier"),
    ([classifier], "--generated ODD/none.npz", "no dataset"), ([classifier], "--steps 0", "at least 1"),
    ([classifier], "--dataset ODD/oblong.npz", "(3, 8, 12); a classifier takes square images of bytes"),
    ([classifier], "--dataset ODD/latents.npz", "float32 (3, 8, 8); a classifier takes square images of bytes"),
    ([classifier], "--generated ODD/oblong.npz", "square"),
    ([classifier], "--dataset shapes --test ODD/fewer.npz", "leave it out"),
    ([classifier], "--generated ODD/fewer.npz --classifier ODD/half.pt", "not a classifier"),
    ([classifier, rank_analysis], f"--seed {10**20}", "seed")]


@pytest.mark.parametrize("module", [*EVERY, classifier])
def test_bad_input_is_one_line(module, few, tmp_path):
    odd, new = tmp_path / "odd", [*few, "--out", tmp_path / "new"]
    odd.mkdir()
    for name, size, classes in (("smaller", 4, 4), ("fewer", 8, 3), ("odd", 6, 4), ("plain", 8, 0)):
        labels = dict(labels=np.arange(20) % classes) if classes else {}
        np.savez(odd / f"{name}.npz", images=np.zeros((20, size, size, 3), np.uint8), **labels)
    np.savez(odd / "oblong.npz", images=np.zeros((20, 8, 12, 3), np.uint8), labels=np.arange(20) % 3)
    np.savez(odd / "latents.npz", latents=np.zeros((20, 3, 8, 8), np.float32), labels=np.arange(20) % 3)
    for name in ("nothing.pt", "nothing.features.pt"):
        (odd / name).touch()
    runs(classifier, "--dataset", odd / "fewer.npz", "--steps", 2, "--device", "cpu", "--out", odd / "fewer.pt")
    whole = torch.load(odd / "fewer.pt", weights_only=True)
    torch.save({key: whole[key] for key in ("config", "model")}, odd / "half.pt")
    for modules, flags, says in REFUSED:
        if module in modules:
            known = new if module in EVERY else new[:2] + new[4:6] + new[8:]  # it has no --test by default
            refuses(module, *known, *flags.replace("ODD", str(odd)).split(), says=says)
    if module in EVERY:
        refuses(module, "--dataset", odd, "--out", tmp_path / "new", says=("add --test", str(odd)))
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------
# plot.py: pixels are read where the axes say a value must be


def pixel_of(chart, xs, ys, x, y, log_y=False):
    """The colour of the pixel where a chart of xs, ys must show the point (x, y)."""
    column = plot.position(x, plot.nice_ticks(xs), plot.LEFT, plot.RIGHT)
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


def test_log_ticks_and_labels():
    """Decades for wide ranges, at most nine or so, 1-2-5 for narrow ones; values that are not positive do not count."""
    for values, ticks in (([0.02, 80], [0.01, 0.1, 1, 10, 100]), ([1, 1000], [1, 10, 100, 1000]),
                          ([0.3, 6, 0, -1, None], [0.2, 0.5, 1, 2, 5, 10]), ([0, None], [1, 2, 5, 10])):
        assert plot.nice_ticks(values, log=True) == ticks
    wide, narrow = plot.nice_ticks([1e-12, 1e12], log=True), plot.nice_ticks([7, 7.5], log=True)
    assert len(wide) <= 9 and wide[0] <= 1e-12 and wide[-1] >= 1e12
    assert len(narrow) >= 4 and 0 < narrow[0] <= 7 and narrow[-1] >= 7.5
    positions = plot.position([1, 10, 100, 0, -3, None], [1, 10, 100], 0, 10, log=True)
    assert positions[:3].tolist() == [0, 5, 10] and np.isnan(positions[3:]).all()
    for ticks, labels in (([0, 0.5, 1], ["0", "0.5", "1.0"]), ([0, 500, 1000], ["0", "500", "1,000"]),
                          ([0, 5e5, 1e6], ["0", "0.5M", "1.0M"]), ([-2e-6, 0, 2e-6], ["-2e-6", "0", "2e-6"])):
        assert plot.tick_labels(ticks) == labels
    assert plot.tick_labels([0.01, 1, 100, 10000], log=True) == ["0.01", "1", "100", "10k"]


@pytest.mark.parametrize("log", [False, True])
def test_points_and_lines_are_where_they_belong(log):
    """Markers at the points and, half way in pixels between two of them, the line, in the curve's own colour."""
    xs, curves = [1, 10, 100], {"a": np.array([2.0, 40.0, 900.0]), "b": torch.tensor([500.0, 5.0, 3.0])}
    chart = plot.line_chart({name: (xs, ys) for name, ys in curves.items()}, "t", "x", "y", log_y=log)
    every = np.concatenate(list(curves.values()))
    for colour, ys in zip(plot.COLOURS, (every[:3], every[3:])):
        for x, y in [*zip(xs, ys), (55, (ys[1] * ys[2]) ** 0.5 if log else ys[1:].mean())]:
            assert pixel_of(chart, xs, every, x, y, log) == colour


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_missing_values_leave_gaps(missing):
    """No line to either side of the missing point, a line elsewhere, and a marker on a point left alone."""
    xs, ys = [0, 13, 27, 33, 47, 60], [7, 7, missing, 7, 7, 9]
    chart = plot.line_chart({"a": (xs, ys)}, "t", "x", "y")
    shows = {x: pixel_of(chart, xs, ys, x, 7) == plot.COLOURS[0] for x in (6, 17, 23, 27, 31, 37)}
    assert shows == {6: True, 17: False, 23: False, 27: False, 31: False, 37: True}
    alone = plot.line_chart({"a": (list(range(99)), [5, missing, 7] + [missing, 6] * 48)}, "t", "x", "y")
    assert pixel_of(alone, range(99), [5, 7], 2, 7) == plot.COLOURS[0]
    plot.line_chart({"a": ([1, 2], [missing, None]), "b": ([], [])}, "t", "x", "y", log_y=True)


def test_spread_is_a_band_or_bars():
    """Many points: a light band between ys - spread and ys + spread. Few: bars at the points, nothing between."""
    ends, white = [3.0, 7.0], (255, 255, 255)  # ends: what the axis covers
    band, bars = (plot.line_chart({"a": (np.arange(n), [5] * n, [2] * n)}, "t", "x", "y") for n in (20, 10))
    share = (255 - np.array(pixel_of(band, range(20), ends, 9.5, 6.3))) / (255 - np.array(plot.COLOURS[0]))
    assert np.allclose(share, 50 / 255, atol=0.02)  # white mixed with the curve's colour
    assert pixel_of(bars, range(10), ends, 4.5, 6.3) == white != pixel_of(bars, range(10), ends, 4, 6.3)
    low = {"a": (np.arange(14), [5] * 14, [9] * 14), "b": ([0, 1], [1, 100])}  # ys - spread < 0: down to the axis
    assert pixel_of(plot.line_chart(low, "t", "x", "y", log_y=True), range(14), [1, 100], 1.5, 2, True) != white


def test_curves_differ_and_nothing_is_cut_off():
    """Ten colours, all in the legend below; a constant and a single point are drawn; more names make the picture
    longer, not the box smaller. Whatever the texts and values, the outermost pixels stay white."""
    two = plot.line_chart({"constant": ([1, 2], [4, 4]), "point": ([1.5], [4.5])}, "t", "x", "y")
    assert [pixel_of(two, [1, 2], [4, 4.5], *point) for point in ((1.3, 4), (1.5, 4.5))] == plot.COLOURS[:2]
    many = plot.line_chart({f"a rather long name {i}": ([1, 2], [i, i + 1]) for i in range(10)}, "t", "x", "y")
    below = {colour for _, colour in many.crop((0, plot.BOTTOM + 60, many.width, many.height)).getcolors(100000)}
    assert set(plot.COLOURS) <= below and len(set(plot.COLOURS)) == 10
    assert many.width == two.width and many.height > two.height
    long = "a very long text that goes on and on, far beyond what anybody should give to a chart like this"
    curves = {long: ([799990.0, 800000.0], [-123456.78, 99999.5]), "b": ([799995], [1.0])}
    for chart in (plot.line_chart(curves, long, long, long),
                  plot.heat_map([[123456.7, 1], [2, 3]], [long, "b"], ["c", long], *[long] * 4, spec=".6f")):
        pixels = np.array(chart)
        assert (pixels[:, [0, -1]] == 255).all() and (pixels[[0, -1]] == 255).all()


def test_heat_map_colours_follow_the_values():
    """Larger is darker, equal is equal, missing is grey; the bar beside runs from the darkest to the lightest."""
    values = np.array([[3.0, None, 1.0], [2.0, 9.0, 3.0]], dtype=object)
    chart = plot.heat_map(values, ["r", "s"], ["a", "b", "c"], "t", "loss", "columns", "rows")
    left = np.flatnonzero((np.array(chart)[plot.TOP + 10] != 255).any(1))[10]  # inside the first cell
    xs = [int(left + column * (plot.RIGHT - 90 - left) / 3) for column in range(3)]
    upper, lower = ([chart.getpixel((x, y)) for x in xs] for y in (plot.TOP + 10, plot.BOTTOM - 10))
    assert upper[0] == lower[2] and upper[1] == plot.MISSING
    light = [sum(colour) for colour in (upper[2], lower[0], upper[0], lower[1])]  # of 1, 2, 3, 9
    assert light == sorted(light, reverse=True) and len(set(light)) == 4
    assert upper[2] == plot.heat_colour(0) and lower[1] == plot.heat_colour(1)
    bar = np.array(chart.convert("L")).astype(float)[plot.TOP:plot.BOTTOM, plot.RIGHT - 64]
    assert (np.diff(bar) >= 0).all()
    for values in (torch.ones(1, 2), [[None, None]]):  # constant; nothing known
        plot.heat_map(values, ["r"], [1, 2], "t", "v")


def test_charts_are_saved_side_by_side_and_mistakes_are_value_errors(tmp_path):
    """Row by row, each unchanged, the next row below the tallest of the last."""
    images = [Image.new("RGB", (20, height), colour) for height, colour in ((10, "red"), (30, "lime"), (10, "blue"))]
    plot.save(tmp_path / "new" / "x.png", *images)
    page = Image.open(tmp_path / "new" / "x.png").convert("RGB")
    pixels = [page.getpixel(place) for place in ((5, 5), (25, 25), (5, 35), (5, 20))]
    assert page.size == (40, 40) and pixels == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    plot.save(tmp_path / "one.png", images[0])
    assert Image.open(tmp_path / "one.png").size == (20, 10)
    wrong = [lambda: plot.save("x.png")]
    wrong += [lambda curve=curve: plot.line_chart({"a": curve} if curve else {}, "t", "x", "y") for curve in
              (None, ([1, 2], [1]), ([1], [1], [1, 2]), ([1],), ([[1]], [[1]]), (1, 2))]
    wrong += [lambda v=v: plot.heat_map(v, ["r"], ["c"], "t", "v") for v in ([[1, 2]], [1, 2], [[1], [2]])]
    for call in wrong:
        with pytest.raises(ValueError):
            call()


def test_table_is_aligned_markdown(capsys):
    rows = [{"method": "full | rank", "FID": 12.345, "MACs": 5462}, {"method": "half", "FID": None},
            {"method": None, "FID": math.nan, "MACs": np.int64(7)}]
    plot.print_table(rows, {"method": "", "FID": ".1f", "MACs": ",d"})
    assert capsys.readouterr().out.splitlines() == [
        "| method       |  FID |  MACs |", "| ------------ | ---: | ----: |", "| full \\| rank | 12.3 | 5,462 |",
        "| half         |    - |     - |", "| -            |    - |     7 |"]


def test_json_has_no_nan_and_is_complete_or_absent(tmp_path, monkeypatch):
    """NaN and infinities become null at any depth; a failure or a kill leaves the old file as it was."""
    path = tmp_path / "new" / "x.json"
    plot.write_json(path, {"a": [1, math.nan, (2.5, -math.inf)], "b": np.array([[1.0, np.nan]]), "c": torch.tensor([3]),
                           "d": np.float32("nan"), "e": None, "f": "NaN", "g": torch.tensor(math.inf), "h": Path("p")})
    assert json.loads(path.read_text()) == {"a": [1, None, [2.5, None]], "b": [[1.0, None]], "c": [3], "d": None,
                                            "e": None, "f": "NaN", "g": None, "h": "p"}
    old = path.read_bytes()
    with pytest.raises(TypeError):
        plot.write_json(path, {"a": object()})
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    for write in (lambda: plot.write_json(path, {"a": 1}), lambda: plot.save(path, Image.new("RGB", (2, 2)))):
        with pytest.raises(ZeroDivisionError):
            write()
    assert [p.name for p in path.parent.iterdir()] == ["x.json"] and path.read_bytes() == old
