"""Composition of tasks: adapters that were trained apart, used together. LoRA-Diffusion Eq. (8), 4.5.

    h'_t = h_t + sum_j w_j sigma(t) sum_i g_i^(j)(h_t, t, c),   w = softmax(Router(Enc(c)))

c is the task's instruction. What is not of the trajectory, the separator's embedding, is composed by the same
weights, so that with w = (1, 0, 0) the first task's model is there again, exactly. Read lora_diffusion.py
before.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import plot
from adapters import Adapted, LoRALinear
from classify import accuracy, in_batches, read_labels, with_label
from text import MASK, PAD, TASKS, Sentences
from text_diffusion import T, TextDiffusion

# ----------------------------------------------------------------------------------------------------
# Router


@torch.no_grad()
def encode(base: TextDiffusion, instruction: torch.Tensor) -> torch.Tensor:
    """Enc(c): the mean of the frozen base's final hidden states at t = 1, (D,)"""
    return base.hidden(instruction[None], torch.ones(1, dtype=torch.long))[0].mean(0)


def train_router(base: TextDiffusion, instructions: dict[str, list], unseen: dict[str, list], seed: int,
                 steps: int = 200) -> tuple[nn.Module, float]:
    """A two-layer MLP with 512 hidden units on Enc(c), trained on the paraphrases that the adapters were
    trained with; and the share of unseen paraphrases whose task it finds."""
    torch.manual_seed(seed)
    d = base.config.width
    router = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 512), nn.ReLU(), nn.Linear(512, len(TASKS)))
    x = torch.stack([encode(base, c) for task in TASKS for c in instructions[task]])
    y = torch.tensor([j for j, task in enumerate(TASKS) for _ in instructions[task]])
    optimizer = torch.optim.AdamW(router.parameters(), 1e-3, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(router(x), y).backward()
        optimizer.step()
    router.eval().requires_grad_(False)
    right = [weights(base, router, c).argmax().item() == j
             for j, task in enumerate(TASKS) for c in unseen[task]]
    return router, float(np.mean(right))


@torch.no_grad()
def weights(base: TextDiffusion, router: nn.Module, instruction: torch.Tensor) -> torch.Tensor:
    """w of Eq. (8): (tasks,), in the order of TASKS"""
    return router(encode(base, instruction)).softmax(0)


# ----------------------------------------------------------------------------------------------------
# Composed models


@torch.no_grad()
def read_composed(models: dict[str, Adapted], w: torch.Tensor, c: torch.Tensor, task: str,
                  sentences: Sentences, dtype: torch.dtype) -> torch.Tensor:
    """The most probable label of `task` at t = T, under Eq. (8): int64 (N,)"""
    found, first = torch.empty_like(sentences.length), models[task]
    for index in in_batches(sentences):
        t, length, rows = torch.full_like(index, T), sentences.length[index], torch.arange(len(index))
        x = with_label(first, sentences, index, MASK)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            embedded = first.embed(x)  # (B, L + 2, D)
            embedded[rows, length] = sum(share * m.own_embedding[0] for share, m in zip(w, models.values()))
            h = first.base.transform(embedded, t, x != PAD)[rows, length + 1]  # (B, D)
            h = h + sum(share * m.correction(h[:, None], x, t, c)[:, 0]
                        for share, m in zip(w, models.values()))
            found[index] = first.label_logits(h).argmax(1)
    return found


@torch.no_grad()
def task_arithmetic(models: dict[str, Adapted], task: str, scale: float) -> Adapted:
    """Weight LoRA's changes of all tasks, summed and scaled: W + scale sum_j U_j V_j^T (Ilharco et al. 2023);
    the separator's embedding is their mean, the output that of `task`."""
    model = copy.deepcopy(models[task])
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            for other in models.values():
                layer.layer.weight += scale * other.get_submodule(name).low.weight()
            layer.low.U.zero_()
    model.own_embedding[0] = torch.stack([other.own_embedding[0] for other in models.values()]).mean(0)
    return model


# ----------------------------------------------------------------------------------------------------
# Judging


def judge(base: TextDiffusion, ours: dict[str, Adapted], lora: dict[str, Adapted], router: nn.Module,
          dev: dict[str, Sentences], instructions: dict[str, list], unseen: dict[str, list],
          both: torch.Tensor, dtype: torch.dtype) -> dict:
    """Accuracies on the development sets, by task and way of composing; the router reads a paraphrase that it
    has not seen. `both`: the instruction that asks for sentiment and subjectivity at once."""
    even = torch.full((len(TASKS),), 1 / len(TASKS))
    table = {}
    for j, task in enumerate(TASKS):
        label, c, alone = dev[task].label, instructions[task][0], torch.eye(len(TASKS))[j]
        routed = weights(base, router, unseen[task][0])
        table[task] = {
            "single task": accuracy(read_composed(ours, alone, c, task, dev[task], dtype), label),
            "router": accuracy(read_composed(ours, routed, unseen[task][0], task, dev[task], dtype), label),
            "average": accuracy(read_composed(ours, even, c, task, dev[task], dtype), label),
            "another task's": float(np.mean([  # what an adapter of the wrong task does
                accuracy(read_composed(ours, torch.eye(len(TASKS))[i], c, task, dev[task], dtype), label)
                for i in range(len(TASKS)) if i != j])),
            "weight LoRA, single": accuracy(read_labels(lora[task], dev[task], c, dtype), label),
            "task arithmetic": accuracy(
                read_labels(task_arithmetic(lora, task, 1 / len(TASKS)), dev[task], c, dtype), label),
            "task arithmetic, sum": accuracy(
                read_labels(task_arithmetic(lora, task, 1.0), dev[task], c, dtype), label),
        }

    # One model, one instruction, two answers: the sentiment of SST-2's sentences (of reviews: opinions, all
    # of them, or nearly), and whether Subj's sentences are opinions
    w = weights(base, router, both)
    pair = torch.tensor([0.5, 0.5, 0.0])
    named = {"router": w, "half and half": pair, "SST-2 alone": torch.eye(3)[0],
             "Subj alone": torch.eye(3)[1]}
    two = {}
    for name, share in named.items():
        sentiment = read_composed(ours, share, both, "SST-2", dev["SST-2"], dtype) == dev["SST-2"].label
        opinion = read_composed(ours, share, both, "Subj", dev["SST-2"], dtype) == 0
        subjective = accuracy(read_composed(ours, share, both, "Subj", dev["Subj"], dtype), dev["Subj"].label)
        two[name] = {"w": share.tolist(), "sentiment, on SST-2": sentiment.double().mean().item(),
                     "subjectivity, on Subj": subjective,
                     "both, on SST-2": (sentiment & opinion).double().mean().item()}
    return dict(table=table, two=two)


def show(found: list[dict]) -> list:
    """Prints the means over seeds; gives a heat map of them. found: what `judge` says, for each seed."""
    names = list(found[0]["table"]["SST-2"])
    cells = {task: {name: [100 * one["table"][task][name] for one in found] for name in names}
             for task in TASKS}
    print(f"\nComposition, development sets, %; {len(found)} seeds; the router finds the task of "
          f"{np.mean([one['router_unseen'] for one in found]):.0%} of the paraphrases that it has not seen\n")
    plot.print_table([dict(way=name) | {task: spread(cells[task][name]) for task in TASKS} for name in names],
                     {"way": ""} | dict.fromkeys(TASKS, ""))
    print("\nTwo instructions at once: is this an opinion or a plot, and is it negative or positive?\n")
    keys = ("sentiment, on SST-2", "subjectivity, on Subj", "both, on SST-2")
    plot.print_table([
        {"weights": way, "w of SST-2, Subj, TREC": ", ".join(
            f"{np.mean([one['two'][way]['w'][j] for one in found]):.2f}" for j in range(len(TASKS)))}
        | {key: spread([100 * one["two"][way][key] for one in found]) for key in keys}
        for way in found[0]["two"]], {"weights": "", "w of SST-2, Subj, TREC": ""} | dict.fromkeys(keys, ""))
    values = [[np.mean(cells[task][name]) for task in TASKS] for name in names]
    return [plot.heat_map(values, names, list(TASKS), "Composition: accuracy, %", "accuracy, %", spec=".1f")]


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
