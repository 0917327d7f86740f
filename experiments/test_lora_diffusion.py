"""Tests of LoRA-Diffusion on text: text.py, text_diffusion.py, adapters.py, classify.py, compose.py,
lora_diffusion.py; and on images: lora_images.py."""

import contextlib
import io
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import adapters
import classifier
import classify
import compose
import lora_diffusion
import lora_images
import model as model_py
import text
import text_diffusion
from adapters import METHODS, TRAJECTORIES, Trajectory, TrajectoryAdapter, adapt, ranks_at
from script import InputError
from test_experiments import cli
from text import MASK, PAD, TASKS, Sentences
from text_diffusion import ALPHA, UNMASKED, WEIGHT, Config, T, TextDiffusion

WORDS, WIDTH = 20, 24


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return TextDiffusion(Config(WORDS, WIDTH, 2, 2)).eval()


def sentences(n=6, seed=0, labels=2):
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 8, (n,), generator=g)
    ids = torch.randint(2, WORDS, (n, 7), generator=g)
    ids[torch.arange(7) >= length[:, None]] = PAD
    return Sentences(ids, length, torch.randint(labels, (n,), generator=g))


def shaken(model, scale=0.1):
    """Every trained weight off its start, so that nothing is zero by chance."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += scale * torch.randn(p.shape, generator=g)
    return model


C = torch.tensor([3, 4, 5])  # an instruction

# ----------------------------------------------------------------------------------------------------
# text.py


def write_texts(folder, rows=None):
    for name, task in TASKS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        k = len(task.labels)
        own = rows or [(f"this is the review of a film about number {i} and person {i % 3} , a place", i % k)
                       for i in range(24)]
        for part, some in (("train", own[:18]), ("dev", own[18:])):
            lines = ["sentence\tlabel", *(f"{s}\t{label % k}" for s, label in some)]
            (folder / name / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_texts_are_read_and_what_is_judged_is_not_trained_with(tmp_path):
    rows = [("a good film", 1), ("a bad film", 0), ("it is", 1)] * 6 + [("a good  film", 1), ("fine", 0)]
    texts = text.read_texts(write_texts(tmp_path, rows))
    assert texts.dev["SST-2"] == [("a good film", 1), ("fine", 0)]
    assert texts.left_out["SST-2"] == 6 and ("a good film", 1) not in texts.train["SST-2"]
    assert len(texts.train["SST-2"]) == 12


@pytest.mark.parametrize("body, says", [
    ("label\tsentence\n", "must begin"), ("sentence\tlabel\n", "no sentences"),
    ("sentence\tlabel\na film\t2\n", "line 2: the label '2' is unknown; use 0 to 1"),
    ("sentence\tlabel\nfine\t1\n \t0\n", "line 3: the sentence is empty"),
    ("sentence\tlabel\nfine\t1\n\nfine\t1\n", "line 3: must be a sentence"),
    ("sentence\tlabel\na\tb\t1\n", "line 2: must be a sentence")])
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, body, says):
    (tmp_path / "train.tsv").write_text(body)
    with pytest.raises(InputError, match=says) as error:
        text.read_sentences(tmp_path / "train.tsv", 2)
    assert "\n" not in str(error.value)


def test_missing_and_foreign_texts_are_refused(tmp_path):
    with pytest.raises(InputError, match="--text takes a folder"):
        text.read_texts(tmp_path)
    (tmp_path / "x.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(InputError, match="not UTF-8"):
        text.read_sentences(tmp_path / "x.tsv", 2)


def test_vocabulary():
    vocabulary = text.build_vocabulary(["b a a", "a b c [mask] [mask] [mask]"], least=2)
    assert vocabulary.words == ["[pad]", "[mask]", "[unknown]", "a", "b"]
    assert vocabulary.encode("a c b") == [3, text.UNKNOWN, 4] and vocabulary.decode([3, 4, PAD]) == "a b"
    assert len(vocabulary.encode("a " * 100)) == text.LONGEST
    found = text.encode(vocabulary, [("a b a", 1), ("b", 0)])
    assert found.ids.tolist() == [[3, 4, 3], [4, 0, 0]] and found.length.tolist() == [3, 1]


def test_batches_hold_every_sentence_once():
    length = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0))
    for tokens, size in ((False, 16), (True, 64)):
        batches = text.shuffled_batches(length, size, torch.Generator().manual_seed(1), tokens)
        assert torch.cat(batches).sort()[0].equal(torch.arange(200))
        padding = sum(len(b) * length[b].max() for b in batches) / length.sum()
        assert padding < 1.15
        assert all(len(b) * length[b].max() <= 64 for b in batches) if tokens else len(batches) == 13
        again = text.shuffled_batches(length, size, torch.Generator().manual_seed(1), tokens)
        assert all(a.equal(b) for a, b in zip(batches, again))


def test_no_part_of_a_held_out_sentence_is_trained_with():
    whole = [(f"the {i} film is one of the best of all {i} years", 1) for i in range(40)]
    parts = [(f"of all {i} years", 1) for i in range(40)] + [("the best", 1)]
    rest, held_out = text.split_off(whole + parts, 10, torch.Generator().manual_seed(0))
    assert len(held_out) == 10 and all("film" in sentence for sentence, _ in held_out)
    numbers = {sentence.split()[1] for sentence, _ in held_out}
    assert len(rest) == 30 + 30 + 1 and not numbers & {s.split()[2] for s, _ in rest
                                                       if s.startswith("of all")}


def test_paraphrases_to_judge_a_router_by_are_unseen():
    for task in TASKS.values():
        assert not set(task.unseen) & {one for other in TASKS.values() for one in other.instructions}
    assert text.BOTH not in {one for task in TASKS.values() for one in task.instructions + task.unseen}


# ----------------------------------------------------------------------------------------------------
# text_diffusion.py


def test_alpha():
    assert ALPHA[0] == 1 and ALPHA[T] == 0 and (ALPHA.diff() < 0).all() and len(ALPHA) == T + 1
    assert ALPHA[T // 2].item() == pytest.approx(0.5)
    assert ALPHA[25].item() == pytest.approx(math.cos(math.pi / 8) ** 2)
    assert UNMASKED[1] == 1 and UNMASKED[T] == ALPHA[T - 1]
    for t in (1, 30, 100):
        assert WEIGHT[t].item() == pytest.approx(T * (ALPHA[t - 1] - ALPHA[t]).item() / (1 - ALPHA[t]).item())
    assert (WEIGHT * (1 - ALPHA)).mean().item() * (T + 1) / T == pytest.approx(1)  # a token counts once


def test_masks():
    g = torch.Generator().manual_seed(0)
    x_0 = torch.full((400, 50), 7)
    x_0[:, 40:] = PAD
    t = torch.tensor([30, 100]).repeat(200)
    clean = torch.zeros(400, 50, dtype=torch.bool)
    clean[:, :10] = True
    x_t = text_diffusion.add_masks(x_0, t, g, clean)
    assert (x_t[:, :10] == 7).all() and (x_t[:, 40:] == PAD).all() and (x_t[1::2, 10:40] == MASK).all()
    assert (x_t[::2, 10:40] == MASK).float().mean().item() == pytest.approx(1 - ALPHA[30].item(), abs=0.015)


def test_timesteps_are_stratified():
    t = text_diffusion.stratified_t(200, torch.Generator().manual_seed(0))
    assert torch.equal(((t.sort()[0] - 1)), torch.arange(200) // 2) and not t.equal(t.sort()[0])


def test_spans_are_prompts_and_never_all_there_is():
    length = torch.randint(1, 9, (2000,), generator=torch.Generator().manual_seed(1))
    clean = text_diffusion.random_spans(length, 9, torch.Generator().manual_seed(0))
    size = clean.sum(1)
    assert ((size > 0).float()[length > 1].mean() - 0.5).abs() < 0.05 and (size[length == 1] == 0).all()
    assert (size < length).all() and not clean[torch.arange(9) >= length[:, None]].any()
    # in one piece
    assert (clean.int().diff(dim=1, prepend=torch.zeros(2000, 1, dtype=torch.int)) == 1).sum(1).max() == 1


def toy(table):
    """A model of two tokens with two words, 2 and 3: p(word | what the other token is), by
    table[other][place]"""
    def hidden(x, t):
        return torch.stack([table[x[:, 1], 0], table[x[:, 0], 1]], 1)  # (B, 2, 2)
    return SimpleNamespace(hidden=hidden, logits=lambda h: h)


def expected_loss(model, x_0):
    """The loss's mean over t and over all four ways to mask two tokens, exactly."""
    total = 0.0
    for t in range(1, T + 1):
        for masked in itertools.product((False, True), repeat=2):
            chance = math.prod((1 - ALPHA[t]).item() if m else ALPHA[t].item() for m in masked)
            x_t = torch.where(torch.tensor([masked]), MASK, x_0)
            total += chance * text_diffusion.negative_elbo(model, x_0, x_t, torch.tensor([t])).item() / T
    return total


def test_the_loss_is_the_elbo_of_two_tokens():
    """Against sum over t of E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), all states enumerated."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(4, 2, 2, generator=g)
    x_0 = torch.tensor([[2, 3]])
    p = table.softmax(-1)
    total = 0.0
    for t in range(1, T + 1):
        stay = (1 - ALPHA[t - 1]).item() / (1 - ALPHA[t]).item()
        for x_t in itertools.product((MASK, 2), (MASK, 3)):
            chance = math.prod((1 - ALPHA[t]).item() if x == MASK else ALPHA[t].item() for x in x_t)
            kl = 0.0
            for place in range(2):  # both distributions are products over places
                if x_t[place] == MASK:
                    word = p[x_t[1 - place], place, x_0[0, place] - 2].item()
                    q = {MASK: stay, "word": 1 - stay}
                    model = {MASK: stay, "word": (1 - stay) * word}
                    kl += sum(q[s] * math.log(q[s] / model[s]) for s in q if q[s] > 0)
            total += chance * kl
    assert expected_loss(toy(table), x_0) == pytest.approx(total, rel=1e-4)


def test_the_loss_of_two_equal_tokens_by_hand():
    """A model that knows that both tokens are equal, and each word half of the time, needs log 2 nats where
    they are unmasked one after the other, and 2 log 2 where in one step: sum_t (alpha_{t-1} - alpha_t) (1 -
    alpha_t) 2 log 2, which is log 2 for T without end."""
    table = torch.zeros(4, 2, 2)
    table[2, :, 0] = table[3, :, 1] = 40
    found = expected_loss(toy(table), torch.tensor([[3, 3]]))
    by_hand = sum((ALPHA[t - 1] - ALPHA[t]).item() * (1 - ALPHA[t]).item()
                  for t in range(1, T + 1)) * 2 * math.log(2)
    assert found == pytest.approx(by_hand, rel=1e-5) and 0 < found - math.log(2) < 0.01


def test_padding_and_hidden_words_change_nothing(base):
    x = torch.tensor([[5, MASK, 7]])
    longer = F.pad(x, (0, 3), value=PAD)
    t = torch.tensor([40])
    assert torch.allclose(base(x, t), base(longer, t)[:, :3], atol=1e-5)
    other = torch.tensor([[6, MASK, 7]])
    assert (base(x, t) - base(other, t))[0, 1].abs().max() > 1e-3  # but the context speaks
    assert (base(x, t) - base(x, t + 50))[0, 1].abs().max() > 1e-4


def test_sampling_keeps_prompts_and_unmasks_by_alpha(base):
    x = torch.full((300, 8), MASK)
    x[:, 0], x[:, 7] = 9, PAD
    steps = list(text_diffusion.unmask(base, x, torch.Generator().manual_seed(0)))
    assert len(steps) == T and (steps[-1] != MASK).all() and (x[:, 1:7] == MASK).all()
    assert all((step[:, 0] == 9).all() and (step[:, 7] == PAD).all() for step in steps)
    left = (steps[59][:, 1:7] == MASK).double().mean().item()  # at t = 40
    assert left == pytest.approx(1 - ALPHA[40].item(), abs=0.04)
    for before, after in zip(steps, steps[1:]):
        assert torch.equal(before[before != MASK], after[before != MASK])


def test_words_with_the_same_neighbours_start_alike():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 20, (400, 3), generator=g)
    # 3 and 4 stand in the same place
    ids[:200, 1], ids[:200, 0], ids[:200, 2] = 3 + torch.arange(200) % 2, 18, 19
    torch.manual_seed(0)
    E = text_diffusion.neighbour_embeddings(ids, 20, 12)
    assert torch.allclose(E.norm(dim=1), torch.full((20,), 0.02 * 12**0.5))
    alike = F.normalize(E, dim=1) @ F.normalize(E[3], dim=0)
    assert alike[[0, *range(5, 18)]].max() < alike[4] - 0.2


def test_unigram_nats():
    train, judged = (Sentences(torch.tensor(ids), torch.tensor([2]), torch.tensor([0]))
                     for ids in ([[3, 3]], [[3, 4]]))
    found = text_diffusion.unigram_nats(train, judged, 5)
    assert found == pytest.approx(-(math.log(3 / 5) + math.log(1 / 5)) / 2)


def test_pretraining_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    vocabulary, train = text.Vocabulary([f"w{i}" for i in range(WORDS - 3)]), sentences(60)
    def run(folder):
        return text_diffusion.pretrain(folder, vocabulary, train, sentences(8, 1), Config(WORDS, 16, 1, 2), 9,
                                       64, 1e-2, 0, "float32", every=4)
    whole = run(tmp_path / "whole").state_dict()
    batch = text_diffusion.pretraining_batch
    def stop(train, batches, seed, step):
        if step == 6:
            raise KeyboardInterrupt
        return batch(train, batches, seed, step)
    monkeypatch.setattr(text_diffusion, "pretraining_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    with pytest.raises(InputError, match="has had 4 of its 9 steps"):
        text_diffusion.load_base(tmp_path / "parts" / "base.pt")
    monkeypatch.setattr(text_diffusion, "pretraining_batch", batch)
    parts = run(tmp_path / "parts").state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert text_diffusion.load_base(tmp_path / "parts" / "base.pt")[1].words == vocabulary.words
    with pytest.raises(InputError, match="other texts or settings"):
        text_diffusion.pretrain(tmp_path / "parts", vocabulary, train, train, Config(WORDS, 16, 1, 2), 9, 64,
                                2e-2, 0, "float32")


def test_a_base_learns(tmp_path, capsys):
    """Two kinds of sentences, told apart by their first word: what follows is certain once it is seen."""
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]]).repeat(40, 1)
    train = Sentences(ids, torch.full((80,), 4), torch.zeros(80))
    vocabulary = text.Vocabulary([f"w{i}" for i in range(8)])
    model = text_diffusion.pretrain(tmp_path, vocabulary, train, train, Config(11, 24, 1, 2), 200, 80, 1e-2,
                                    0, "float32", every=200)
    nats = text_diffusion.validation_elbo(model, train, repeats=5)
    assert nats < 0.6 < text_diffusion.unigram_nats(train, train, 11) - 1  # log(2) / 4 = 0.17 at best
    drawn = text_diffusion.generate(model, train, 30, 0)
    assert sum(row in ids[:2].tolist() for row in drawn.tolist()) > 20


# ----------------------------------------------------------------------------------------------------
# adapters.py: LoRA-Diffusion


def test_phases_ranks_and_sigma_as_printed():
    assert adapters.phase(torch.tensor([100, 67, 66, 34, 33, 1])).tolist() == [0, 0, 1, 1, 2, 2]
    printed = TRAJECTORIES["LoRA-Diffusion"]
    assert printed == ((64, 32, 8), (1.0, 0.5, 0.25), 2, "instruction", True, 0.01, 0.001)
    assert ranks_at(768) == (64, 32, 8) and ranks_at(192) == (16, 8, 2) and ranks_at(24, (8,)) == (1,)
    net = TrajectoryAdapter(printed, WIDTH, 2)
    assert [m.W_A.shape[1] for m in net.banks[0]] == [64, 64] and net.banks[2][0].W_B.shape == (8, 2 * WIDTH)


def test_the_correction_is_equation_2_to_4():
    torch.manual_seed(0)
    net = shaken(TrajectoryAdapter(Trajectory((5, 4, 3)), WIDTH, 2))
    h, time, e = torch.randn(3, 6, WIDTH), torch.randn(3, WIDTH), torch.randn(1, WIDTH)
    found = net(h, torch.tensor([10, 90, 50]), time, e)
    for row, bank, sigma in ((0, 2, 0.25), (1, 0, 1.0), (2, 1, 0.5)):  # late, early, middle
        wanted = 0.0
        for module in net.banks[bank]:
            both = torch.cat([h[row], time[row].expand(6, -1)], 1)  # [h; Emb(t)]
            gamma = 1 + e[0] @ module.gamma.weight.t() + module.gamma.bias
            beta = e[0] @ module.beta.weight.t() + module.beta.bias
            wanted = wanted + (gamma * torch.relu(both @ module.W_B.t())) @ module.W_A.t() + beta
        assert torch.allclose(found[row], sigma * wanted, atol=1e-5)


def test_without_beta_the_rank_is_bounded_and_with_beta_it_is_not():
    torch.manual_seed(0)
    h, time, e = torch.randn(40, 1, WIDTH), torch.randn(40, WIDTH), torch.randn(40, WIDTH)
    t = torch.full((40,), 90)
    for beta, bound in ((False, 2 * 3), (True, WIDTH)):
        net = shaken(TrajectoryAdapter(Trajectory((3, 2, 1), beta=beta), WIDTH, 2))
        rank = torch.linalg.matrix_rank(net(h, t, time, e)[:, 0])
        assert rank <= bound and (beta is False or rank > 2 * 3)
        assert (net.shift(t, e) != 0).any().item() is beta


def test_shift_is_the_part_that_does_not_see_h():
    torch.manual_seed(0)
    net = shaken(TrajectoryAdapter(Trajectory((5, 4, 3)), WIDTH, 2))
    with torch.no_grad():
        for bank in net.banks:
            for module in bank:
                module.W_A.zero_()
    t, e = torch.tensor([90, 10, 40]), torch.randn(3, WIDTH)
    delta = net(torch.randn(3, 1, WIDTH), t, torch.randn(3, WIDTH), e)[:, 0]
    assert torch.allclose(delta, net.shift(t, e), atol=1e-6) and delta.abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_at_the_start_the_base_is_unchanged(base, method):
    model = adapt(base, 2, method).eval()
    x, t = sentences().ids, torch.tensor([1, 20, 40, 60, 80, 100])
    x = torch.where(torch.arange(7) == 1, MASK, x)
    there = x != PAD
    found, wanted = model.hidden(x, t, C), base.hidden(x, t)
    if method == "prefix tuning":  # a prefix takes a part of the attention from the first step on
        assert not torch.allclose(found, wanted, atol=1e-3)
    else:
        assert torch.allclose(found[there], wanted[there], atol=1e-5)
    moved = shaken(model).hidden(x, t, C)
    assert (moved - found)[there].abs().max() > (1e-2 if method != "head only" else -1)


def test_the_base_is_frozen(base):
    before = {name: p.clone() for name, p in base.named_parameters()}
    for method in METHODS:
        model, _ = classify.finetune(base, 2, method, [C], sentences(), classify.Tuning(1e-2, 3, 6))
        after = dict(model.base.named_parameters())
        for name, p in before.items():  # a layer that took another's place holds it as `layer`
            parent, _, last = name.rpartition(".")
            now = after.get(name, after.get(f"{parent}.layer.{last}"))
            free = method == "full fine-tuning" or (method == "BitFit" and name.endswith("bias"))
            assert free or torch.equal(p, now), (method, name)
        assert not torch.equal(model.own_output, adapt(base, 2, method).own_output)
        assert all(torch.equal(p, q) for p, q in zip(before.values(), base.parameters()))


def test_nuclear_norm_and_its_gradient():
    g = torch.Generator().manual_seed(0)
    for shape in ((5, 9), (9, 5), (4, 4)):
        W = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        ours, = torch.autograd.grad(3 * adapters.nuclear_norm(W), W)
        theirs, = torch.autograd.grad(3 * torch.linalg.svdvals(W).sum(), W)
        assert adapters.nuclear_norm(W).item() == pytest.approx(torch.linalg.svdvals(W).sum().item())
        assert torch.allclose(ours, theirs, atol=1e-8)
    zero = torch.zeros(4, 6, requires_grad=True)
    assert not torch.autograd.grad(adapters.nuclear_norm(zero), zero)[0].any()
    thin = (torch.randn(6, 1, generator=g) @ torch.randn(1, 4, generator=g)).requires_grad_()
    gradient, = torch.autograd.grad(adapters.nuclear_norm(thin), thin)
    assert torch.linalg.svdvals(gradient).tolist() == pytest.approx([1, 0, 0, 0], abs=1e-3)


def test_penalty_is_equation_5_to_7():
    torch.manual_seed(0)
    config = Trajectory((5, 4, 3), modules=3, rank_weight=0.2, orthogonality_weight=0.3)
    net = shaken(TrajectoryAdapter(config, WIDTH, 2))
    wanted = 0.0
    for bank in net.banks:
        for i, a in enumerate(bank):
            wanted += 0.2 * sum(torch.linalg.matrix_norm(W, "nuc").item() for W in (a.W_A, a.W_B))
            wanted += 0.3 * sum(torch.linalg.matrix_norm(a.W_A.t() @ b.W_A).item() ** 2
                                for j, b in enumerate(bank) if i != j)
    assert net.penalty().item() == pytest.approx(wanted, rel=1e-5)
    off = TrajectoryAdapter(Trajectory((5, 4, 3), rank_weight=0.0, orthogonality_weight=0.0), WIDTH, 2)
    assert off.penalty() == 0.0


def test_effective_rank():
    assert adapters.effective_rank(torch.eye(7)[:5]) == pytest.approx(5)
    assert adapters.effective_rank(torch.ones(6, 4)) == pytest.approx(1, abs=1e-4)
    s = torch.tensor([3.0, 1.0])
    entropy = -sum(p * math.log(p) for p in (0.75, 0.25))
    assert adapters.effective_rank(torch.diag(s)) == pytest.approx(math.exp(entropy))


def test_the_sentence_is_a_second_path_only_where_it_is_asked_for(base):
    x = torch.tensor([[5, 6, WORDS, MASK], [7, 8, WORDS, MASK]])
    printed, reads = (adapt(base, 2, name).eval()
                      for name in ("LoRA-Diffusion", "LoRA-Diffusion, reads the sentence"))
    assert printed.encode_instruction(C, x).shape == (1, WIDTH)
    e = reads.encode_instruction(C, x)
    assert e.shape == (2, WIDTH) and not torch.allclose(e[0], e[1], atol=1e-3)
    label = x.clone()
    label[:, 3] = WORDS + 1  # nor does it read the label
    assert torch.equal(e, reads.encode_instruction(C, label))
    assert adapt(base, 2, "LoRA-Diffusion without instruction").encode_instruction(C, x) is None


# ----------------------------------------------------------------------------------------------------
# adapters.py: baselines and accounting


def test_trained_parameters_by_formula(base):
    d, depth, k = WIDTH, 2, 6
    rows = (1 + k) * d + k * d + k
    block = 4 * d * d + 4 * d + 8 * d * d + 5 * d + 4 * d  # attention, MLP, two LayerNorms
    whole = WORDS * d + (text.LONGEST + 2) * d + 2 * (d * d + d) + depth * block + 2 * d + WORDS - 2
    r, b = ranks_at(d, (64, 256))
    encoder = 2 * text.LONGEST * d + 2 * block + 2 * d
    ab = 2 * sum(3 * d * rank for rank in ranks_at(d))
    gamma, beta = 2 * sum(d * rank + rank for rank in ranks_at(d)), 2 * 3 * (d * d + d)
    wanted = {
        "full fine-tuning": whole, "head only": 0,
        "LoRA-Diffusion": ab + gamma + beta + encoder,
        "LoRA-Diffusion, reads the sentence": ab + gamma + beta + encoder,
        "LoRA-Diffusion without beta": ab + gamma + encoder, "LoRA-Diffusion without instruction": ab,
        "weight LoRA": depth * r * (4 * 2 * d + 2 * 5 * d), "T-LoRA": depth * r * (4 * 2 * d + 2 * 5 * d),
        "adapters": depth * 2 * (2 * b * d + b + d), "adapters in phases": depth * 2 * (2 * b * d + b + d),
        "BitFit": 2 * d + depth * (4 * d + 5 * d + 2 * d) + d + WORDS - 2,
        "prefix tuning": depth * 2 * 32 * d}
    assert set(wanted) == set(METHODS)
    for method, count in wanted.items():
        found = adapters.parameter_counts(adapt(base, k, method))
        assert found["rows"] == rows and found["trained"] == count + rows, method
        assert found["encoder"] == (encoder if "LoRA-Diffusion" in method and "without ins" not in method
                                    else 0)
        assert found["beta"] == (beta if method in ("LoRA-Diffusion", "LoRA-Diffusion, reads the sentence")
                                 else 0)


def test_a_merged_weight_lora_is_the_added_one(base):
    model = shaken(adapt(base, 2, "weight LoRA"))
    layer, x = model.base.blocks[1].mlp_in, torch.randn(3, 5, WIDTH)
    assert torch.allclose(layer(x), layer.merged()(x), atol=1e-5)
    assert (layer(x) - layer.layer(x)).abs().max() > 1e-2


def test_t_lora_masks_channels_by_noise(base):
    wide = TextDiffusion(Config(WORDS, 96, 1, 2))  # rank 8
    model = shaken(adapt(wide, 2, "T-LoRA"))
    (k, mask), = model.active(torch.tensor([1, 50, 100])).values()
    assert model.rank == 8 and mask.sum(1).tolist() == [8, 6, 4]  # r_min + ceil((8 - r_min) (1 - t/T))
    layer, x = model.base.blocks[0].q, torch.randn(3, 2, 96)
    low = layer.low
    for row, r in enumerate((8, 6, 4)):
        wanted = layer.layer(x[row]) + x[row] @ low.V[:r].t() @ low.U[:r]
        assert torch.allclose(layer(x, model.active(torch.tensor([1, 50, 100])))[row], wanted, atol=1e-5)
    x, t = torch.tensor([[4, 5, 6]]), torch.tensor([100])
    before = model.hidden(x, t)
    with torch.no_grad():
        layer.low.U[4:] += 1  # silent at t = T
    assert torch.equal(before, model.hidden(x, t)) and not torch.equal(before, model.hidden(x, t - 90))


def test_adapters_in_phases_have_the_shares_of_the_paper(base):
    assert [adapters.PHASES.active(10 * t, 64) for t in (1, 33, 34, 66, 67, 100)] == [8, 8, 32, 32, 64, 64]
    model = shaken(adapt(base, 2, "adapters in phases"))  # bottleneck 8
    layer, x = model.base.blocks[0].out, torch.randn(2, 3, WIDTH)
    y = layer.layer(x)
    for row, r in ((0, 1), (1, 8)):
        h = torch.relu(y[row] @ layer.down.weight[:r].t() + layer.down.bias[:r])
        wanted = y[row] + h @ layer.up.weight[:, :r].t() + layer.up.bias
        assert torch.allclose(layer(x, model.active(torch.tensor([20, 80])))[row], wanted, atol=1e-5)


def test_a_prefix_is_attended_to_and_padding_still_is_not(base):
    model = shaken(adapt(base, 2, "prefix tuning")).eval()
    x, t = torch.tensor([[5, MASK, 7]]), torch.tensor([40])
    longer = F.pad(x, (0, 3), value=PAD)
    assert torch.allclose(model.hidden(x, t), model.hidden(longer, t)[:, :3], atol=1e-5)
    assert model.base.blocks[0].k(torch.zeros(2, 3, WIDTH)).shape == (2, 35, WIDTH)


def test_a_task_file_has_the_size_that_is_reported_and_gives_the_model_back(base, tmp_path):
    x, t = torch.tensor([[5, 6, WORDS, MASK]]), torch.tensor([80])
    for method in METHODS:
        model = shaken(adapt(base, 2, method)).eval()
        size = adapters.save_task(tmp_path / "task.pt", model, {})
        trained = adapters.parameter_counts(model)["trained"]
        assert size == (tmp_path / "task.pt").stat().st_size and 4 * trained < size < 4 * trained + 40_000
        again = adapters.load_task(tmp_path / "task.pt", base)
        assert torch.equal(again.hidden(x, t, C), model.hidden(x, t, C)), method
    torch.save({"model": 1}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match="lacks"):
        adapters.load_task(tmp_path / "foreign.pt", base)
    with pytest.raises(InputError, match="not a task's file for this base"):
        adapters.load_task(tmp_path / "task.pt", TextDiffusion(Config(WORDS + 1, 16, 1, 2)))


# ----------------------------------------------------------------------------------------------------
# classify.py


def test_the_format_and_no_label_in_the_input(base):
    model, some = adapt(base, 2, "head only"), sentences()
    x = classify.with_label(model, some, torch.arange(6), MASK)
    for row, n in enumerate(some.length.tolist()):
        assert x[row].tolist() == [*some.ids[row, :n].tolist(), WORDS, MASK] + [PAD] * (x.shape[1] - n - 2)
    seen = []
    model.base_hidden = lambda x, t, inner=model.base_hidden: seen.append((x, t)) or inner(x, t)
    classify.read_labels(model, some, C)
    assert all((t == T).all() and not (x > WORDS).any() and (x == MASK).sum() == len(x) for x, t in seen)


@pytest.mark.parametrize("method", METHODS)
def test_the_reading_does_not_see_the_label(base, method):
    model, some = shaken(adapt(base, 2, method)).eval(), sentences(40)
    found = classify.read_labels(model, some, C)
    turned = some._replace(label=1 - some.label)
    assert torch.equal(found, classify.read_labels(model, turned, C))
    assert torch.equal(classify.generate_labels(model, some, C, 0),
                       classify.generate_labels(model, turned, C, 0))


def test_label_loss_is_the_mean_over_all_drawn_sentences(base):
    model, some = shaken(adapt(base, 2, "LoRA-Diffusion")).eval(), sentences(30)
    index = torch.arange(30)
    found = classify.label_loss(model, some, index, C, torch.Generator().manual_seed(3)).item()
    g = torch.Generator().manual_seed(3)
    t = text_diffusion.stratified_t(30, g)
    survives = torch.rand(30, generator=g, dtype=torch.float64) < ALPHA[t]
    x = classify.with_label(model, some, index, torch.where(survives, WORDS + 1 + some.label, MASK))
    log_p = model.logits(model.hidden(x, t, C)).log_softmax(-1)  # (30, L, words - 2 + labels)
    each = -log_p[index, some.length + 1, WORDS - 2 + some.label]
    assert 5 < survives.sum() < 25
    assert found == pytest.approx(((~survives) * each).mean().item(), rel=1e-4)


def test_reverse_diffusion_of_the_label_unmasks_when_the_chain_does(base, monkeypatch):
    model, some, seen = adapt(base, 2, "head only").eval(), sentences(3000), []
    inner = classify.label_states
    monkeypatch.setattr(classify, "label_states",
                        lambda m, s, i, t, c: seen.append(t) or inner(m, s, i, t, c))
    token = classify.generate_labels(model, some, C, 0)
    t = torch.cat(seen)
    assert t.min() >= 1 and t.max() <= T
    for at in (20, 50, 80):  # P(unmasked before t) = alpha_t
        assert (t > at).double().mean().item() == pytest.approx(ALPHA[at].item(), abs=0.03)
    assert token.min() >= 2 and token.max() <= WORDS + 2


def test_generated_labels_follow_the_model(base):
    model, some = adapt(base, 2, "head only").eval(), sentences(4000)
    with torch.no_grad():
        model.own_output.zero_()
        model.own_bias.copy_(torch.tensor([30.0, 30.0 + math.log(3)]))  # no words; one to three
    token = classify.generate_labels(model, some, C, 0) - WORDS - 1
    assert (token >= 0).all() and token.double().mean().item() == pytest.approx(0.75, abs=0.03)


def test_chance_is_what_the_paper_prints():
    """ "[CLS] positive [SEP]" of three tokens, always: 83.64 %"""
    assert f"{classify.paper_accuracy(444 / 872):.2%}" == "83.64%"
    assert 3 * 0.8628 - 2 == pytest.approx(0.588, abs=1e-3)  # its own 86.28 in labels
    assert f"{428 / 872:.2%}" == "49.08%"  # its accuracy by generation: always negative


@pytest.fixture(scope="module")
def two_kinds(tmp_path_factory):
    """Sentences of one kind of words or of the other, and a base that knows them."""
    some = sentences(200)
    words = torch.where(some.label[:, None] == 1, 11 + some.ids % 8, 3 + some.ids % 8)
    some = some._replace(ids=torch.where(some.ids == PAD, PAD, words))
    with contextlib.redirect_stdout(io.StringIO()):
        base = text_diffusion.pretrain(tmp_path_factory.mktemp("base"),
                                       text.Vocabulary([f"w{i}" for i in range(17)]), some, some,
                                       Config(WORDS, WIDTH, 2, 2), 150, 400, 1e-2, 0, "float32", every=150)
    return some, base.eval()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(two_kinds, method):
    some, base = two_kinds
    rate = 3e-3 if method == "full fine-tuning" else 3e-2
    model, _ = classify.finetune(base, 2, method, [C, C + 1], some, classify.Tuning(rate, 30, 64))
    found = classify.accuracy(classify.read_labels(model, some, C), some.label)
    assert found > 0.9, found
    again, _ = classify.finetune(base, 2, method, [C, C + 1], some, classify.Tuning(rate, 2, 64))
    once, _ = classify.finetune(base, 2, method, [C, C + 1], some, classify.Tuning(rate, 2, 64))
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), once.parameters()))


def test_what_is_measured(base):
    some, general = sentences(30), sentences(20, 3)
    model, facts = classify.finetune(base, 2, "LoRA-Diffusion", [C], some, classify.Tuning(1e-2, 5, 16))
    found = classify.measure(model, C, some, some, general, torch.float32, 0)
    assert found["accuracy"] == found["train_accuracy"] and 0 <= found["generated"] <= 1 >= found["head"] >= 0
    assert found["corrections"]["t"] == list(range(10, 101, 10))
    assert set(found["corrections"]["phase"]) == {0, 1, 2}
    assert all(0 <= share <= 1 for share in found["corrections"]["beta_share"])
    untouched = adapt(base, 2, "LoRA-Diffusion")  # g = 0: nothing can be forgotten
    before = text_diffusion.validation_elbo(base, general)
    assert classify.general_elbo(untouched, C, general) == pytest.approx(before)
    assert found["general_elbo"] != pytest.approx(text_diffusion.validation_elbo(base, general), abs=1e-6)


def test_a_head_is_fitted():
    g = torch.Generator().manual_seed(0)
    states = torch.randn(300, 5, generator=g)
    label = (states[:, 0] > 0).long() + (states[:, 1] > 1).long()
    assert classify.accuracy(classify.fit_head(states, label, 3)(states).argmax(1), label) > 0.85


# ----------------------------------------------------------------------------------------------------
# compose.py


def test_composing_one_task_alone_is_that_task(base):
    some = sentences(40)
    ours, lora = ({task: shaken(adapt(base, len(TASKS[task].labels), method), 0.05 + 0.05 * i).eval()
                   for i, task in enumerate(TASKS)} for method in ("LoRA-Diffusion", "weight LoRA"))
    for j, task in enumerate(TASKS):
        single = classify.read_labels(ours[task], some, C)
        assert torch.equal(compose.read_composed(ours, torch.eye(3)[j], C, task, some, torch.float32), single)
    pair = {"TREC": lora["TREC"]}
    assert torch.equal(classify.read_labels(compose.task_arithmetic(pair, "TREC", 1.0), some, C),
                       classify.read_labels(lora["TREC"], some, C))


def test_composition_is_equation_8(base):
    ours = {task: shaken(adapt(base, len(TASKS[task].labels), "LoRA-Diffusion")).eval() for task in TASKS}
    w, some, seen = torch.tensor([0.2, 0.5, 0.3]), sentences(4), []
    first = ours["Subj"]
    first.label_logits = lambda h, inner=first.label_logits: seen.append(h) or inner(h)
    compose.read_composed(ours, w, C, "Subj", some, torch.float32)
    for place, row in enumerate(some.length.argsort(stable=True).tolist()):
        n, t = some.length[row], torch.tensor([T])
        x = torch.cat([some.ids[row, :n], torch.tensor([WORDS, MASK])])[None]
        embedded = base.embed(x.clamp(max=WORDS - 1))
        embedded[0, n] = sum(w[j] * m.own_embedding[0] for j, m in enumerate(ours.values()))
        h = base.transform(embedded, t, x != PAD)[:, n + 1:]
        delta = sum(w[j] * m.trajectory(h, t, base.time(t), m.encode_instruction(C, x))
                    for j, m in enumerate(ours.values()))
        assert torch.allclose(seen[0][place], (h + delta)[0, 0], atol=1e-4)


def test_task_arithmetic_adds_the_changes(base):
    lora = {task: shaken(adapt(base, len(TASKS[task].labels), "weight LoRA")) for task in TASKS}
    summed = compose.task_arithmetic(lora, "Subj", 0.5).base.blocks[0].v
    change = sum(m.base.blocks[0].v.low.weight() for m in lora.values())
    assert torch.allclose(summed.merged().weight, base.blocks[0].v.weight + 0.5 * change, atol=1e-6)


def test_router_is_judged_on_what_it_has_not_seen(base):
    seen = {task: [torch.tensor([3 + 5 * j, 4 + 5 * j, k]) for k in (18, 19)] for j, task in enumerate(TASKS)}
    unseen = {task: [torch.tensor([4 + 5 * j, 3 + 5 * j, 5 + 5 * j])] for j, task in enumerate(TASKS)}
    router, right = compose.train_router(base, seen, unseen, 0)
    assert right == 1.0 and compose.weights(base, router, seen["Subj"][0])[1] > 0.8
    swapped = {"SST-2": unseen["Subj"], "Subj": unseen["SST-2"], "TREC": unseen["TREC"]}
    assert compose.train_router(base, seen, swapped, 0)[1] == pytest.approx(1 / 3)


# ----------------------------------------------------------------------------------------------------
# lora_diffusion.py


def test_statistics():
    ours, theirs = [0.80, 0.82, 0.81, 0.83], [0.78, 0.79, 0.80, 0.79]
    p = stats.ttest_rel(ours, theirs).pvalue
    assert lora_diffusion.paired_p(ours, theirs, 3) == pytest.approx(3 * p)
    assert lora_diffusion.paired_p(ours, theirs, 1000) == 1 == lora_diffusion.paired_p(ours, ours, 3)
    mean, sd, half = lora_diffusion.mean_sd_interval(ours)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(ours))
    assert (mean - half, mean + half) == pytest.approx((low, high)) and sd == pytest.approx(stats.tstd(ours))
    assert lora_diffusion.mean_sd_interval([0.5]) == (0.5, None, None)
    assert lora_diffusion.paired_p([1], [1], 2) is None


def test_ablations_change_one_thing_each():
    cases = lora_diffusion.ablations()
    printed = TRAJECTORIES["LoRA-Diffusion"]
    for name, case in cases.items():
        changed = sum(a != b for a, b in zip(case, printed))
        assert changed == (0 if name.startswith("as printed") else 2 if name == "neither" else 1), name
    assert cases["reversed: 8 / 32 / 64"].ranks == printed.ranks[::-1]
    assert len(set(cases.values())) == len(cases)


def test_the_best_learning_rate_is_taken():
    runs = [lora_diffusion.Run("SST-2", "BitFit", lr, 1, 1, 0) for lr in (1e-3, 3e-3, 1e-2)]
    results = [dict(accuracy=accuracy) for accuracy in (0.6, 0.8, 0.7)]
    assert lora_diffusion.best_rate(runs, results) == 3e-3


def refuses(*arguments, says, module=lora_diffusion):
    code, _, err = cli(module, *arguments)
    assert code == 2 and err.count("\n") == 1 and says in err, err


def test_the_whole_script(tmp_path):
    texts, out = write_texts(tmp_path / "text"), tmp_path / "out"
    flags = ["--text", texts, "--out", out, "--width", 24, "--depth", 1, "--heads", 2, "--base-steps", 6,
             "--save-every", 6, "--base-tokens", 64, "--seeds", 2, "--steps", 2, "--tune-steps", 1,
             "--batch-size", 8, "--held-out", 4, "--ablation-seeds", 1, "--ablation-steps", 1,
             "--ablation-sentences", 10]
    refuses("table", *flags, says="make one with the step `pretrain`")
    code, said, err = cli(lora_diffusion, "pretrain", *flags)
    assert code == 0 and "nats a token, unigrams" in said and "left" in said, err
    for step in ("table", "costs", "ablations", "compose"):
        more = ["--only", "full fine-tuning; LoRA-Diffusion; weight LoRA"] if step == "table" else []
        code, said, err = cli(lora_diffusion, step, *flags, *more)
        assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    found = {row["method"] for row in results["table"]}
    assert found >= {"full fine-tuning", "LoRA-Diffusion", "weight LoRA"}
    row = next(row for row in results["table"] if row["method"] == "LoRA-Diffusion")
    assert row["seeds"] == 2 and row["paper_accuracy"] == pytest.approx((2 + row["accuracy"]) / 3)
    assert row["p_full-fine-tuning"] is not None and row["p_lora-diffusion"] is None
    assert len(results["ablations"]) == len(lora_diffusion.ablations()) + 2 + 15
    assert len(results["costs"]["rows"]) == len(METHODS)
    assert 0 <= results["composition"]["seeds"][0]["router_unseen"] <= 1
    for part in ("majority", "Ablations", "Costs", "Composition", "Two instructions"):
        assert part in said
    assert Image.open(out / "figure.png").width > 600
    written = {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    assert cli(lora_diffusion, "compose", *flags, "--seeds", 1)[0] == 0  # nothing is done twice
    assert written == {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    kept = next((out / "runs").glob("*lora-diffusion-s0*.pt"))
    result = json.loads(kept.with_suffix(".json").read_text())["result"]
    assert kept.stat().st_size == result["bytes"]
    code, said, _ = cli(lora_diffusion, "report", *flags[:4], "--steps", 7)  # with what is of these settings alone
    results = json.loads((out / "results.json").read_text())
    assert "composition.json is of another base or other settings" in said and "composition" not in results
    assert "costs" in results and (results["settings"]["width"], results["settings"]["base_steps"]) == (24, 6)

    other = write_texts(tmp_path / "other", [(f"other words are in here {i} {i} {i}", i % 2)
                                             for i in range(24)])
    refuses("report", "--text", other, "--out", out, says="is a base of other texts")
    refuses("pretrain", *flags, "--base-lr", 0.01, says="other texts or settings")
    torch.save({"x": 1}, out / "base.pt")
    refuses("report", *flags, says="lacks settings")


@pytest.mark.parametrize("flags, says", [
    (["dance"], "invalid choice"), (["table", "--only", "magic"], "'magic' is unknown"),
    (["costs", "--only", "head only"], "--only names methods of the step table"),
    (["table", "--steps", "0"], "--steps 0 must be"), (["table", "--width", "25"], "divisible"),
    (["pretrain", "--text", "nowhere"], "--text takes a folder"),
    (["pretrain", "--base-lr", "2"], "--base-lr 2")])
def test_bad_flags_are_refused(tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    refuses(*flags, says=says)


# ----------------------------------------------------------------------------------------------------
# lora_images.py


@pytest.fixture
def small_dit(monkeypatch):
    tiny = dict(depth=1, width=24, heads=2, patch=4, conditioning="shared", dense_mlp_blocks=0, predict="v")
    monkeypatch.setitem(model_py.PRESETS, "tiny", tiny)
    torch.manual_seed(0)
    dit = model_py.DiT(model_py.preset_config("tiny", dict(method="full"), image_size=8, num_classes=10))
    return shaken(dit).eval()


def test_an_adapted_dit_starts_as_the_dit(small_dit):
    x, t, y = torch.randn(5, 3, 8, 8), torch.tensor([1, 300, 500, 800, 1000]), torch.tensor([0, 3, 5, 7, 1])
    for method in lora_images.RATES:
        net = lora_images.AdaptedDiT(small_dit, method).eval()
        assert torch.allclose(net(x, t, y), small_dit(x, t, y), atol=1e-5), method
        assert not net(x, t, y + 1).equal(net(x, t, y))
        moved = shaken(net)
        changed = (moved(x, t, y) - small_dit(x, t, y)).abs().amax((1, 2, 3)) > 1e-4
        assert changed.all() if method != "embeddings alone" else not changed.any()  # old classes keep theirs
        new = torch.full_like(y, 8)
        with torch.no_grad():
            before = moved(x, t, new)
            moved.rows[0] += 1
        assert (moved(x, t, new) - before).abs().max() > 1e-3
    trajectory = lora_images.AdaptedDiT(small_dit, "LoRA-Diffusion").trajectory
    assert trajectory.steps == 1000 and adapters.phase(torch.tensor([667, 666, 334, 333]), 1000).tolist() == [
        0, 1, 1, 2]


def test_images_from_end_to_end(small_dit, tmp_path, monkeypatch):
    judge = classifier.Classifier(10, 8, 4).eval()
    monkeypatch.setattr(lora_images, "load_judge", lambda args: judge)
    monkeypatch.setattr(lora_images, "COUNTS", (4, 6, 1000))
    monkeypatch.setattr(lora_images, "RATES", {name: (1e-3,) for name in lora_images.RATES})
    flags = ["--out", tmp_path, "--image-size", 8, "--steps", 3, "--adapt-steps", 2, "--seeds", 1, "--num", 9,
             "--sampling-steps", 2, "--train-num", 60]
    for _ in range(2):
        code, said, err = cli(lora_images, *flags)
        assert code == 0, err
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert "are recognised" in said and [row["images"] for row in rows] == 4 * [4, 6, 12]  # there are no more
    assert "step" not in said  # the second time everything was there
    refuses(*flags, "--steps", 4, module=lora_images, says="base of other settings")
    refuses(*flags, "--sampling-steps", 2000, module=lora_images, says="at most 1000")


def test_a_brief_run_is_never_taken_for_a_whole_one(tmp_path):
    """An ablation of as many steps as the table's run lacks what the table shows."""
    lab = SimpleNamespace(folder=tmp_path, dtype=torch.float32, base_sha="0")
    whole = lora_diffusion.Run("SST-2", "head only", 1e-3, 500, 128, 0)
    assert lora_diffusion.run_file(lab, whole) != lora_diffusion.run_file(lab, whole._replace(brief=True))
