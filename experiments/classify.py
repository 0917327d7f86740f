"""Classification by a masked diffusion language model: sentence, separator, one label token.

In fine-tuning t is uniform and masks the label with probability 1 - alpha_t, while the sentence stays clean.
The accuracy is read at t = T, where the label is masked for certain: which of the task's labels is the most
probable? Read adapters.py before, lora_diffusion.py after.
"""

import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import text
from adapters import Adapted, Trajectory, adapt, effective_rank, phase
from script import InputError
from text import MASK, PAD, Sentences
from text_diffusion import ALPHA, UNMASKED, T, TextDiffusion, one_cycle, stratified_t, validation_elbo

# ----------------------------------------------------------------------------------------------------
# The format


def with_label(model: Adapted, sentences: Sentences, index: torch.Tensor, last) -> torch.Tensor:
    """The sentences' words, the separator, and then `last`: MASK, or a token for each. int64 (B, L + 2)"""
    length, rows = sentences.length[index], torch.arange(len(index))
    x = F.pad(sentences.ids[index, :length.max()], (0, 2), value=PAD)
    x[rows, length], x[rows, length + 1] = model.words, last
    return x


def label_states(model: Adapted, sentences: Sentences, index: torch.Tensor, t: torch.Tensor, c: torch.Tensor,
                 last=MASK) -> torch.Tensor:
    """h'_t where the label is: (B, D). c: the instruction's ids"""
    x = with_label(model, sentences, index, last)
    h = model.base_hidden(x, t)[torch.arange(len(index)), sentences.length[index] + 1]  # (B, D)
    if model.trajectory is None:
        return h
    return h + model.correction(h[:, None], x, t, c)[:, 0]  # of this position alone: it needs no other's h


# ----------------------------------------------------------------------------------------------------
# Fine-tuning


class Tuning(NamedTuple):
    lr: float
    steps: int
    batch_size: int = 64  # sentences drawn; where the label is not masked, there is no loss
    seed: int = 0
    dtype: torch.dtype = torch.float32


def label_loss(model: Adapted, train: Sentences, index: torch.Tensor, c: torch.Tensor,
               generator: torch.Generator) -> torch.Tensor:
    """L_denoise, Eq. (5), of a batch: cross-entropy of the masked labels over words and labels, divided by
    the number of all its sentences. Where the label survived there is nothing to predict."""
    t = stratified_t(len(index), generator)
    masked = torch.rand(len(index), generator=generator, dtype=torch.float64) >= ALPHA[t]
    index, t, drawn = index[masked], t[masked], len(index)
    if not len(index):
        return torch.zeros((), requires_grad=True)
    logits = model.logits(label_states(model, train, index, t, c)).float()  # (M, words - 2 + labels)
    return F.cross_entropy(logits, model.words - 2 + train.label[index], reduction="sum") / drawn


def finetune(base: TextDiffusion, labels: int, method: str, instructions: list[torch.Tensor],
             train: Sentences, tuning: Tuning, trajectory: Trajectory | None = None) -> tuple[Adapted, dict]:
    """The adapted model; seconds a step and the loss at the end. Raises InputError if the loss diverges."""
    torch.manual_seed(tuning.seed)
    model = adapt(base, labels, method, trajectory)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, tuning.lr, (0.9, 0.98), weight_decay=0.01, fused=True)
    generator, batches, recent, start = torch.Generator().manual_seed(tuning.seed), [], [], time.time()
    for step in range(tuning.steps):
        if not batches:
            batches = text.shuffled_batches(train.length, tuning.batch_size, generator)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, tuning.steps, tuning.lr, max(1, tuning.steps // 20))
        c = instructions[torch.randint(len(instructions), (1,), generator=generator)]
        with torch.autocast("cpu", tuning.dtype, enabled=tuning.dtype != torch.float32):
            loss = label_loss(model, train, batches.pop(), c, generator)
        optimizer.zero_grad(set_to_none=True)
        (loss + model.penalty()).backward()  # Eq. (5)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        recent = [*recent[-99:], loss.item()]
    if not math.isfinite(sum(recent)):
        raise InputError(f"the loss of {method} at learning rate {tuning.lr:g} stopped being finite")
    facts = dict(seconds_a_step=(time.time() - start) / tuning.steps, loss=sum(recent) / len(recent))
    return model.eval(), facts


# ----------------------------------------------------------------------------------------------------
# Reading the label


def in_batches(sentences: Sentences, size: int = 128) -> list[torch.Tensor]:
    """All indices, sentences of similar length together"""
    return list(sentences.length.argsort(stable=True).split(size))


@torch.no_grad()
def read_labels(model: Adapted, sentences: Sentences, c: torch.Tensor, dtype=torch.float32, t: int = T):
    """The most probable label at t, where it is masked: int64 (N,)"""
    found = torch.empty_like(sentences.length)
    for index in in_batches(sentences):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            h = label_states(model, sentences, index, torch.full_like(index, t), c)
            found[index] = model.label_logits(h).argmax(1)
    return found


@torch.no_grad()
def generate_labels(model: Adapted, sentences: Sentences, c: torch.Tensor, seed: int, dtype=torch.float32):
    """Full reverse diffusion of the label from t = T: a token of words and labels, int64 (N,).

    Each step from t to t - 1 unmasks it with probability (alpha_{t-1} - alpha_t) / (1 - alpha_t) and then
    draws it from the model's distribution at that t. Until then nothing changes, so the model is asked once a
    sentence."""
    generator = torch.Generator().manual_seed(seed)
    # column j: the step from T - j
    u = torch.rand(len(sentences.length), T, generator=generator, dtype=torch.float64)
    # the first step that unmasks; the last one always does
    when = T - (u < UNMASKED[1:].flip(0)).int().argmax(1)
    choice = torch.rand(len(sentences.length), generator=generator, dtype=torch.float64)
    token = torch.empty_like(sentences.length)
    for index in in_batches(sentences):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model.logits(label_states(model, sentences, index, when[index], c))
        cumulative = logits.float().softmax(1).cumsum(1)  # drawn by its own uniform number: not by the batch
        place = (cumulative < choice[index, None] * cumulative[:, -1:]).sum(1)
        # words from [unknown]; the separator is never drawn
        token[index] = place + 2 + (place >= model.words - 2)
    return token


@torch.no_grad()
def final_states(model: Adapted, sentences: Sentences, c: torch.Tensor, token: torch.Tensor,
                 dtype=torch.float32):
    """The hidden state of the label's place at t = 1, where the reverse diffusion has put `token`: float32
    (N, D)"""
    states = torch.empty(len(token), model.base.config.width)
    for index in in_batches(sentences):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            states[index] = label_states(model, sentences, index, torch.ones_like(index), c,
                                         token[index]).float()
    return states


def fit_head(states: torch.Tensor, label: torch.Tensor, labels: int) -> nn.Linear:
    """Multinomial logistic regression with a small ridge penalty"""
    head = nn.Linear(states.shape[1], labels)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(states), label) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def paper_accuracy(accuracy: float) -> float:
    """The share of three masked tokens, "[CLS] label [SEP]", that are predicted, if two of them never change.

    Always saying "positive" on SST-2's development set, right in 444 of 872, this is (2 + 444/872) / 3 =
    83.64 %: the paper prints 83.81 for full fine-tuning, 83.71 for LoRA, 83.63 for adapters and 83.72 for
    BitFit."""
    return (2 + accuracy) / 3


# ----------------------------------------------------------------------------------------------------
# What is measured of an adapted model


def accuracy(found: torch.Tensor, label: torch.Tensor) -> float:
    return (found == label).double().mean().item()


def general_elbo(model: Adapted, c: torch.Tensor, sentences: Sentences, dtype=torch.float32) -> float:
    """Nats per token of text without labels, with the adapter in place: what was forgotten, beside the
    base's. Over words alone: who writes text leaves a task's labels out."""
    as_language_model = SimpleNamespace(hidden=lambda x_t, t: model.hidden(x_t, t, c),
                                        logits=model.base.logits)
    return validation_elbo(as_language_model, sentences, dtype=dtype)


def measure(model: Adapted, c: torch.Tensor, train: Sentences, judged: Sentences, general: Sentences,
            dtype: torch.dtype, seed: int) -> dict:
    """Everything that the tables say of one run."""
    some = Sentences(*(part[torch.linspace(0, len(train.length) - 1, min(1000, len(train.length))).long()]
                       for part in train))
    found = read_labels(model, judged, c, dtype)
    token = generate_labels(model, judged, c, seed, dtype)
    states = final_states(model, some, c, generate_labels(model, some, c, seed, dtype), dtype)
    head = fit_head(states, some.label, model.labels)
    by_head = head(final_states(model, judged, c, token, dtype)).argmax(1)
    result = dict(accuracy=accuracy(found, judged.label), head=accuracy(by_head, judged.label),
                  generated=accuracy(token - model.words - 1, judged.label),
                  train_accuracy=accuracy(read_labels(model, some, c, dtype), some.label),
                  general_elbo=general_elbo(model, c, general, dtype))
    if model.trajectory:
        result |= corrections(model, judged, c)
    return result


@torch.no_grad()
def corrections(model: Adapted, sentences: Sentences, c: torch.Tensor, every: int = 10) -> dict:
    """Of delta_t at the label's place, for t = every, 2 every, ... T: effective rank, also about its mean,
    its size beside h_t's, and which share of its square is beta's, that no rank bounds."""
    index = torch.arange(len(sentences.length))[:128]
    index = index[sentences.length[index].argsort()]
    rows = torch.arange(len(index))
    found = dict(t=[], effective_rank=[], centred_rank=[], size=[], beta_share=[])
    for step in range(every, T + 1, every):
        t, x = torch.full_like(index, step), with_label(model, sentences, index, MASK)
        h = model.base_hidden(x, t)[rows, sentences.length[index] + 1]  # (B, D)
        delta = model.correction(h[:, None], x, t, c)[:, 0]  # (B, D)
        e = model.encode_instruction(c, x)
        shift = model.trajectory.shift(t, e) if e is not None else torch.zeros_like(delta)
        squares = shift.square().sum().item(), (delta - shift).square().sum().item()
        found["t"].append(step)
        found["effective_rank"].append(effective_rank(delta))
        found["centred_rank"].append(effective_rank(delta - delta.mean(0)))
        found["size"].append((delta.norm() / h.norm()).item())
        found["beta_share"].append(squares[0] / max(sum(squares), 1e-30))
    found["phase"] = phase(torch.tensor(found["t"])).tolist()
    return dict(corrections=found)
