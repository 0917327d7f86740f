"""LoRA-Diffusion, done right: trajectory adapters on a frozen diffusion language model, and baselines.

    python experiments/lora_diffusion.py pretrain   the base, a masked diffusion language model
    python experiments/lora_diffusion.py table      every method on SST-2, each at its own best learning rate
    python experiments/lora_diffusion.py costs      parameters, bytes a task, time a step, latency
    python experiments/lora_diffusion.py ablations  ranks, modules, regularisers, training-set size
    python experiments/lora_diffusion.py compose    three tasks: router, average, task arithmetic
    python experiments/lora_diffusion.py report     tables, pictures and results.json of what is there

Each step takes --text DIR, the folder of the three tasks, and --out DIR. The paper (Khazrak and Green 2026)
adds low-rank corrections to the hidden states of a frozen model, other ones in each of three phases of t.
Here they meet full fine-tuning, weight LoRA, T-LoRA, adapters, BitFit and prefix tuning on one base, with one
prompt and one number of steps, each at the best of four learning rates, chosen on a held-out part of the
training set.

--text holds SST-2/, Subj/ and TREC/, each with train.tsv and dev.tsv, which begin with the line
sentence<TAB>label: SST-2 is GLUE's (67,349 and 872), Subj is Pang and Lee's subjectivity dataset (we hold
1,000 out), TREC is Li and Roth's, with six classes (5,452 and 500). Lower case, words separated by blanks.

Every run is kept as a small file in OUT/runs and never done twice: a stopped step goes on where it was, the
base with the same weights, bit for bit. Read text.py, text_diffusion.py, adapters.py and classify.py before.
"""

import hashlib
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import classify
import compose
import plot
import text
import text_diffusion
from adapters import METHODS, TRAJECTORIES, Adapted, Trajectory, adapt, load_task, parameter_counts, save_task
from classify import Tuning, finetune, measure
from script import (DTYPES, InputError, Parser, add_flags, check_fields, claim_folder, duration, pick_dtype,
                    run_script, setting, sha256_of)
from text import TASKS, Sentences, Vocabulary
from text_diffusion import CPU, T, TextDiffusion

STEPS = ("pretrain", "table", "costs", "ablations", "compose", "report")
MAIN = tuple(m for m in METHODS if m not in ("LoRA-Diffusion without instruction", "adapters in phases"))
RATES = {"full fine-tuning": (2e-4, 5e-4, 1e-3, 2e-3)}  # tried for each method; the best is taken
OTHER_RATES = (3e-4, 1e-3, 3e-3, 1e-2)

# ----------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings:
    """What the flags say"""
    seeds: int = setting(5, "repeat each run of the table with seeds 0 to N-1", low=1, high=100)
    steps: int = setting(500, "of fine-tuning", low=1)
    batch_size: int = setting(128, "sentences drawn a step; about half have a masked label, and only those "
                              "are computed", low=1)
    tune_steps: int = setting(150, "of each run that only compares learning rates", low=1)
    held_out: int = setting(1000, "training sentences that are held out to choose a learning rate by", low=1)
    ablation_seeds: int = setting(3, "repeat each ablation with seeds 0 to N-1", low=1, high=100)
    ablation_sentences: int = setting(10_000, "training sentences of each ablation", low=1)
    ablation_steps: int = setting(200, "of fine-tuning in each ablation", low=1)
    dtype: str | None = setting(None, "of matrix products; bfloat16 halves the time on a CPU that has "
                                "instructions for it, and is rounded more coarsely (default float32)",
                                choices=DTYPES)
    threads: int = setting(1, "of the CPU", low=1, high=1024)
    width: int = setting(192, "of the base", low=8, high=4096)
    depth: int = setting(4, "blocks of the base", low=1, high=100)
    heads: int = setting(4, "attention heads of the base", low=1, high=64)
    base_steps: int = setting(4000, "of pretraining", low=1)
    base_tokens: int = setting(1024, "of a batch in pretraining, padding included", low=64)
    base_lr: float = setting(1e-3, "highest learning rate of pretraining", above=0, high=1)
    save_every: int = setting(500, "steps of pretraining between two saves, each with samples and validation",
                              low=1)


def read_command_line(argv: list[str] | None) -> tuple[Namespace, Settings]:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("step", choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    add("--text", type=Path, metavar="DIR", default=Path("data/text"),
        help="folder with SST-2, Subj and TREC (default data/text)")
    add("--out", type=Path, metavar="DIR", default=Path("runs/lora-diffusion"),
        help="folder of everything (default runs/lora-diffusion)")
    add("--only", metavar="NAMES", help=f"methods of the table, separated by semicolons: {'; '.join(MAIN)}")
    add_flags(parser, Settings)
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in Settings.__dataclass_fields__
             if getattr(args, name) is not None}
    settings = Settings(**given)
    check_fields(settings)
    if settings.width % settings.heads or settings.width % 2:
        raise InputError(f"--width {settings.width} must be even and divisible by the {settings.heads} heads")
    if args.only and args.step != "table":
        raise InputError(f"--only names methods of the step table; {args.step} takes none")
    args.only = args.only.split(";") if args.only else list(MAIN)
    args.only = [name.strip() for name in args.only]
    if unknown := [name for name in args.only if name not in METHODS]:
        raise InputError(f"--only {unknown[0]!r} is unknown; use {'; '.join(METHODS)}, separated by "
                         "semicolons")
    return args, settings


# ----------------------------------------------------------------------------------------------------
# Everything that the runs share


class Lab(NamedTuple):
    folder: Path
    s: Settings
    dtype: torch.dtype
    base: TextDiffusion
    base_sha: str
    vocabulary: Vocabulary
    train: dict[str, list]  # (sentence, label) pairs, by task
    dev: dict[str, Sentences]
    instructions: dict[str, list[torch.Tensor]]
    unseen: dict[str, list[torch.Tensor]]
    general: Sentences  # of all tasks, without labels: what may be forgotten


def ids(vocabulary: Vocabulary, sentence: str) -> torch.Tensor:
    return torch.tensor(vocabulary.encode(sentence))


def open_lab(args: Namespace, s: Settings) -> Lab:
    texts = text.read_texts(args.text)
    path = args.out / "base.pt"
    base, vocabulary, of_base = text_diffusion.load_base(path)
    _, width, depth, heads = of_base["config"]
    s = replace(s, width=width, depth=depth, heads=heads, base_steps=of_base["steps"], base_tokens=of_base["tokens"],
                base_lr=of_base["lr"])
    if vocabulary.words != text.build_vocabulary(all_sentences(texts.train)).words:
        raise InputError(f"{path} is a base of other texts than {args.text}; give its --text, or another "
                         "--out")
    general = [row for name in TASKS for row in texts.dev[name][::6]]  # about 400
    return Lab(args.out, s, pick_dtype(s.dtype or "float32", CPU), base, sha256_of(path), vocabulary,
               texts.train, {name: text.encode(vocabulary, rows) for name, rows in texts.dev.items()},
               {name: [ids(vocabulary, one) for one in task.instructions] for name, task in TASKS.items()},
               {name: [ids(vocabulary, one) for one in task.unseen] for name, task in TASKS.items()},
               text.encode(vocabulary, general))


def all_sentences(parts: dict[str, list]) -> list[str]:
    return [sentence for rows in parts.values() for sentence, _ in rows]


def pretrain(args: Namespace, s: Settings) -> None:
    texts = text.read_texts(args.text)
    claim_folder(args.out)
    for name, count in texts.left_out.items():
        if count:
            print(f"{name}: {count} training sentences are in the development set, too, and left out")
    vocabulary = text.build_vocabulary(all_sentences(texts.train))
    train, dev = (text.encode(vocabulary, [row for rows in part.values() for row in rows])
                  for part in (texts.train, texts.dev))
    config = text_diffusion.Config(len(vocabulary), s.width, s.depth, s.heads)
    text_diffusion.pretrain(args.out, vocabulary, train, dev, config, s.base_steps, s.base_tokens, s.base_lr,
                            0, s.dtype or "float32", s.save_every)


# ----------------------------------------------------------------------------------------------------
# One run


class Run(NamedTuple):
    """A fine-tuning that is measured once. sentences: of the training set, None for all; held_out: how many
    of it to judge by instead of the development set. brief: of an ablation, nothing is measured that its
    table does not show. trajectory: another than the method's own."""
    task: str
    method: str
    lr: float
    steps: int
    batch_size: int
    seed: int
    sentences: int | None = None
    held_out: int = 0
    brief: bool = False
    trajectory: Trajectory | None = None


def slug(words: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in words.lower())


def run_file(lab: Lab, run: Run) -> Path:
    """Its name tells the run, and by a hash everything that it depends on."""
    own = run.trajectory or TRAJECTORIES.get(run.method)
    of = [*run[:-1], list(own) if own else None, str(lab.dtype), lab.base_sha]
    digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]
    return lab.folder / "runs" / f"{slug(run.task)}-{slug(run.method)}-s{run.seed}-{digest}.json"


def finished(lab: Lab, run: Run) -> dict | None:
    try:
        return json.loads(run_file(lab, run).read_text())["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def train_model(lab: Lab, run: Run) -> tuple[Adapted, dict, Sentences, Sentences]:
    """The adapted model, what fine-tuning says, and what it was trained with and is judged by"""
    rows, judged = lab.train[run.task], lab.dev[run.task]
    generator = torch.Generator().manual_seed(0)  # the same sentences for every method and seed
    if run.held_out:
        rows, held_out = text.split_off(rows, min(run.held_out, len(rows) // 2), generator)
        judged = text.encode(lab.vocabulary, held_out)
    if run.sentences and run.sentences < len(rows):
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:run.sentences].tolist()]
    train = text.encode(lab.vocabulary, rows)
    tuning = Tuning(run.lr, run.steps, min(run.batch_size, len(rows)), run.seed, lab.dtype)
    model, facts = finetune(lab.base, len(TASKS[run.task].labels), run.method, lab.instructions[run.task],
                            train, tuning, run.trajectory)
    return model, facts, train, judged


def result_of(lab: Lab, run: Run, keep: bool = False) -> dict:
    """Of a run that is finished, or done now. keep: its adapter, too, as the task's file."""
    path = run_file(lab, run)
    found, kept = finished(lab, run), path.with_suffix(".pt")
    if found is not None and (kept.exists() or not keep):
        return found
    model, facts, train, judged = train_model(lab, run)
    c = lab.instructions[run.task][0]
    if run.held_out or run.brief:
        found = dict(accuracy=classify.accuracy(classify.read_labels(model, judged, c, lab.dtype),
                                                judged.label))
        if run.brief and model.trajectory:
            found |= classify.corrections(model, judged, c)
    else:
        found = measure(model, c, train, judged, lab.general, lab.dtype, run.seed)
    found |= facts | parameter_counts(model)
    if keep:
        found["bytes"] = save_task(kept, model, dict(task=run.task, base=lab.base_sha))
    plot.write_json(path, dict(run=run._asdict() | dict(base=lab.base_sha, dtype=str(lab.dtype)),
                               result=found))
    return found


def do_runs(lab: Lab, runs: list[Run], keep: Callable[[Run], bool] = lambda run: False) -> list[dict]:
    """The results of all, with a line for each that was not there yet and the time that is left."""
    results, start, done = [], time.time(), 0
    missing = sum(finished(lab, run) is None for run in runs)
    for run in runs:
        new = finished(lab, run) is None
        results.append(result_of(lab, run, keep(run)))
        if new:
            done += 1
            left = (time.time() - start) / done * (missing - done)
            print(f"{run.task} {run.method}, seed {run.seed}, lr {run.lr:g}: {results[-1]['accuracy']:.1%}   "
                  f"{done} of {missing}, {duration(left)} left", flush=True)
    return results


def tuned_rate(lab: Lab, method: str) -> float:
    """The learning rate whose short run is best on the held-out part of SST-2's training set"""
    runs = tuning_runs(lab, method)
    return best_rate(runs, do_runs(lab, runs))


def tuning_runs(lab: Lab, method: str) -> list[Run]:
    return [Run("SST-2", method, lr, lab.s.tune_steps, lab.s.batch_size, 0, held_out=lab.s.held_out)
            for lr in RATES.get(method, OTHER_RATES)]


def best_rate(runs: list[Run], results: list[dict]) -> float:
    return max(zip(runs, results), key=lambda pair: pair[1]["accuracy"])[0].lr


# ----------------------------------------------------------------------------------------------------
# The main table


def main_runs(lab: Lab, methods, rates: dict[str, float]) -> list[Run]:
    """Seed by seed: a stopped table has whole columns of pairs."""
    return [Run("SST-2", method, rates[method], lab.s.steps, lab.s.batch_size, seed)
            for seed in range(lab.s.seeds) for method in methods]


def is_composed(run: Run) -> bool:
    """Adapters that the step `compose` needs, too"""
    return run.method in ("LoRA-Diffusion", "weight LoRA") and run.seed < 3


def known_rates(lab: Lab, methods) -> dict[str, float]:
    """Of the methods whose learning rates have been compared"""
    rates = {}
    for method in methods:
        runs = tuning_runs(lab, method)
        found = [finished(lab, run) for run in runs]
        if None not in found:
            rates[method] = best_rate(runs, found)
    return rates


def make_table(lab: Lab, methods: list[str]) -> None:
    rates = {method: tuned_rate(lab, method) for method in methods}
    do_runs(lab, main_runs(lab, methods, rates), keep=is_composed)


def mean_sd_interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """Mean, standard deviation over seeds, and half of the 95 % interval of the mean (Student's t)"""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), None, None
    sd = float(np.std(values, ddof=1))
    return float(np.mean(values)), sd, float(stats.t.ppf(0.975, n - 1) * sd / n**0.5)


def paired_p(ours: list[float], theirs: list[float], comparisons: int) -> float | None:
    """Two-sided p of the paired t-test over seeds, times the number of comparisons (Bonferroni), at most 1"""
    difference = np.asarray(ours) - np.asarray(theirs)
    if len(difference) < 2:
        return None
    if not difference.std():
        return 1.0 if not difference.any() else 0.0
    return float(min(1.0, comparisons * stats.ttest_rel(ours, theirs).pvalue))


def table_rows(lab: Lab) -> list[dict]:
    """A row for each method of which there are results, with the seeds from 0 on that it has; tests take those
    that both have."""
    rates = known_rates(lab, METHODS)
    found = {}
    for method, lr in rates.items():
        runs = [Run("SST-2", method, lr, lab.s.steps, lab.s.batch_size, seed) for seed in range(lab.s.seeds)]
        results = [finished(lab, run) for run in runs]
        results = results[:results.index(None)] if None in results else results  # pairs need the same seeds
        if results:
            found[method] = results
    rows = []
    for method, results in found.items():
        accuracies = [result["accuracy"] for result in results]
        mean, sd, half = mean_sd_interval(accuracies)
        row = dict(method=method, lr=rates[method], seeds=len(results), accuracy=mean, sd=sd, interval=half,
                   accuracies=accuracies)
        for name in ("generated", "head", "train_accuracy", "general_elbo"):
            row[name] = float(np.mean([result[name] for result in results]))
        row["paper_accuracy"] = classify.paper_accuracy(mean)
        row |= {name: results[0][name] for name in ("trained", "encoder", "beta", "rows")}
        row["corrections"] = [result.get("corrections") for result in results]
        for other in ("full fine-tuning", "LoRA-Diffusion"):
            n = min(len(found.get(other, [])), len(results))
            theirs = [result["accuracy"] for result in found.get(other, [])[:n]]
            row[f"p_{slug(other)}"] = None if other == method or not n else paired_p(
                accuracies[:n], theirs, len(found) - 1)
        rows.append(row)
    return rows


def chance(lab: Lab, task: str) -> tuple[float, float]:
    """Guessing blindly, and always saying what the training set says most often: on the development set"""
    majority = torch.tensor([label for _, label in lab.train[task]]).bincount().argmax()
    return 1 / len(TASKS[task].labels), classify.accuracy(lab.dev[task].label, majority)


# ----------------------------------------------------------------------------------------------------
# Ablations


def ablations() -> dict[str, Trajectory]:
    """By name: ranks are those of width 768, as the paper's."""
    printed = TRAJECTORIES["LoRA-Diffusion"]
    cases = {"as printed: 64 / 32 / 8": printed,
             "reversed: 8 / 32 / 64": printed._replace(ranks=(8, 32, 64))}
    cases |= {f"uniform {r}": printed._replace(ranks=(r, r, r)) for r in (8, 16, 32, 64)}
    cases |= {f"{k} module{'s' * (k > 1)}": printed._replace(modules=k) for k in (1, 4)}
    cases |= {"no nuclear norm": printed._replace(rank_weight=0.0),
              "no orthogonality": printed._replace(orthogonality_weight=0.0),
              "neither": printed._replace(rank_weight=0.0, orthogonality_weight=0.0),
              "sigma 1 / 1 / 1": printed._replace(sigma=(1.0, 1.0, 1.0)),
              "without beta": printed._replace(beta=False),
              "without instruction": printed._replace(condition="none")}
    return cases


SIZES = (100, 1000, None)  # training sentences; None: all
SIZE_METHODS = ("full fine-tuning", "LoRA-Diffusion", "LoRA-Diffusion, reads the sentence", "weight LoRA",
                "head only")
PHASED = ("adapters", "adapters in phases")  # what the phases are worth where adapters reach every layer


def ablation_runs(lab: Lab, rates: dict[str, float]) -> dict[tuple[str, str], list[Run]]:
    """By (question, case). Every case has the learning rate of its method in the main table."""
    s = lab.s
    shared = dict(steps=s.ablation_steps, batch_size=s.batch_size, brief=True)
    seeds, runs = range(s.ablation_seeds), {}
    if "LoRA-Diffusion" in rates:
        for name, trajectory in ablations().items():
            runs["LoRA-Diffusion", name] = [
                Run("SST-2", "LoRA-Diffusion", rates["LoRA-Diffusion"], seed=seed,
                    sentences=s.ablation_sentences, trajectory=trajectory, **shared) for seed in seeds]
    for method in PHASED:
        if "adapters" in rates:
            runs["phases elsewhere", method] = [
                Run("SST-2", method, rates["adapters"], seed=seed, sentences=s.ablation_sentences, **shared)
                for seed in seeds]
    for method in SIZE_METHODS:
        for n in SIZES:
            if method in rates:
                runs[f"{n or 'all'} sentences", method] = [
                    Run("SST-2", method, rates[method], seed=seed, sentences=n, **shared) for seed in seeds]
    return runs


def make_ablations(lab: Lab) -> None:
    needed = {"LoRA-Diffusion", "adapters", *SIZE_METHODS}
    rates = {method: tuned_rate(lab, method) for method in METHODS if method in needed}
    cases = ablation_runs(lab, rates)
    do_runs(lab, [runs[seed] for seed in range(lab.s.ablation_seeds) for runs in cases.values()])


def ablation_rows(lab: Lab) -> list[dict]:
    rows = []
    for (question, name), runs in ablation_runs(lab, known_rates(lab, METHODS)).items():
        results = [result for run in runs if (result := finished(lab, run)) is not None]
        if results:
            mean, sd, half = mean_sd_interval([result["accuracy"] for result in results])
            row = dict(question=question, case=name, seeds=len(results), accuracy=mean, sd=sd, interval=half,
                       trained=results[0]["trained"],
                       adapter=results[0]["trained"] - results[0]["encoder"] - results[0]["rows"])
            if "corrections" in results[0]:
                row |= by_phase([result["corrections"] for result in results])
            rows.append(row)
    return rows


def by_phase(found: list[dict]) -> dict:
    """Effective rank of the correction in each phase, and beta's share of its square; means over seeds"""
    phases = np.array(found[0]["phase"])
    rank, centred, share, size = (np.mean([one[key] for one in found], 0)
                                  for key in ("effective_rank", "centred_rank", "beta_share", "size"))
    names = ("early", "middle", "late")
    return ({f"rank {name}": rank[phases == i].mean() for i, name in enumerate(names)}
            | {f"centred {name}": centred[phases == i].mean() for i, name in enumerate(names)}
            | dict(beta_share=share.mean(), size=size.mean()))


# ----------------------------------------------------------------------------------------------------
# Costs


def measure_costs(lab: Lab, rounds: int = 7) -> list[dict]:
    """Of each method: parameters, bytes of its file, and times, which take turns: in each round every method
    is timed once, so that a busy machine slows all of them alike. Medians over the rounds."""
    train = text.encode(lab.vocabulary, lab.train["SST-2"][:4000])
    c, rows, models = lab.instructions["SST-2"][0], [], {}
    for method in METHODS:
        torch.manual_seed(0)
        models[method] = model = adapt(lab.base, 2, method)
        file = lab.folder / "size.pt"
        size = save_task(file, model, dict(task="SST-2", base=lab.base_sha))
        file.unlink()
        count = parameter_counts(model)
        rows.append(dict(method=method, **count,
                         share=count["trained"] / sum(p.numel() for p in lab.base.parameters()),
                         bytes=size, training_bytes=12 * count["trained"]))  # gradient and two moments
    times = {(method, name): [] for method in METHODS for name in ("step", "one", "batch", "long")}
    long_ones = train.length.argsort(descending=True)[:32]
    usual = train.length.argsort()[len(train.length) * 3 // 4:][:32]
    for number in range(rounds):
        for method, model in models.items():
            for name, work in (("step", lambda: one_step(lab, model, train, c)),
                               ("one", lambda: read(lab, model, train, usual[:1], c)),
                               ("batch", lambda: read(lab, model, train, usual, c)),
                               ("long", lambda: read(lab, model, train, long_ones, c))):
                start = time.perf_counter()
                work()
                if number:  # the first round warms up
                    times[method, name].append(1000 * (time.perf_counter() - start))
    for row in rows:
        for name in ("step", "one", "batch", "long"):
            row[f"{name}_ms"] = float(np.median(times[row["method"], name]))
    plot.write_json(lab.folder / "costs.json", dict(of=made_from(lab)["costs"], rows=rows))
    return rows


def one_step(lab: Lab, model: Adapted, train: Sentences, c: torch.Tensor) -> None:
    """Forward and backward of 64 sentences, without the optimiser's update"""
    index = torch.arange(64) % len(train.length)
    with torch.autocast("cpu", lab.dtype, enabled=lab.dtype != torch.float32):
        loss = classify.label_loss(model, train, index, c, torch.Generator().manual_seed(0))
    (loss + model.penalty()).backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def read(lab: Lab, model: Adapted, sentences: Sentences, index: torch.Tensor, c: torch.Tensor) -> None:
    """One pass at t = T. A reverse diffusion takes as many as there are steps that unmask something."""
    with torch.autocast("cpu", lab.dtype, enabled=lab.dtype != torch.float32):
        model.label_logits(classify.label_states(model, sentences, index, torch.full_like(index, T), c))


# ----------------------------------------------------------------------------------------------------
# Composition: runs here, what is done with them in compose.py


def compose_runs(lab: Lab, rates: dict[str, float]) -> dict[tuple[str, int], dict[str, Run]]:
    """By (method, seed): a run for each task. SST-2's are those of the main table."""
    return {(method, seed): {task: Run(task, method, rates[method], lab.s.steps, lab.s.batch_size, seed)
                             for task in TASKS}
            for seed in range(min(3, lab.s.seeds)) for method in ("LoRA-Diffusion", "weight LoRA")
            if method in rates}


def make_composition(lab: Lab) -> list[dict]:
    rates = {method: tuned_rate(lab, method) for method in ("LoRA-Diffusion", "weight LoRA")}
    by_seed = compose_runs(lab, rates)
    do_runs(lab, [run for runs in by_seed.values() for run in runs.values()], keep=lambda run: True)
    both, found = ids(lab.vocabulary, text.BOTH), []
    for seed in sorted({seed for _, seed in by_seed}):
        adapted = {method: {task: load_task(run_file(lab, run).with_suffix(".pt"), lab.base)
                            for task, run in by_seed[method, seed].items()}
                   for method in ("LoRA-Diffusion", "weight LoRA")}
        router, unseen = compose.train_router(lab.base, lab.instructions, lab.unseen, seed)
        result = compose.judge(lab.base, adapted["LoRA-Diffusion"], adapted["weight LoRA"], router, lab.dev,
                               lab.instructions, lab.unseen, both, lab.dtype)
        found.append(dict(seed=seed, router_unseen=unseen, **result))
        print(f"composition, seed {seed}: router {unseen:.0%} of unseen paraphrases", flush=True)
    plot.write_json(lab.folder / "composition.json", dict(of=made_from(lab)["composition"], seeds=found))
    return found


def made_from(lab: Lab) -> dict[str, list[str]]:
    """What costs.json and composition.json depend on"""
    of_seeds = compose_runs(lab, known_rates(lab, METHODS)).values()
    return dict(costs=[lab.base_sha, str(lab.dtype)],
                composition=[run_file(lab, run).name for runs in of_seeds for run in runs.values()])


# ----------------------------------------------------------------------------------------------------
# Report


def percent(value: float | None, digits: int = 1) -> str | None:
    return None if value is None else f"{100 * value:.{digits}f}"


def print_main(lab: Lab, rows: list[dict], before: float) -> None:
    print("\nSST-2, development set, %; read at t = T unless said otherwise\n")
    plot.print_table([{
        "method": row["method"], "trained": row["trained"],
        "accuracy": percent(row["accuracy"]) + ("" if row["sd"] is None else f" ± {100 * row['sd']:.1f}"),
        "95 %": None if row["interval"] is None else f"{100 * (row['accuracy'] - row['interval']):.1f} to "
        f"{100 * (row['accuracy'] + row['interval']):.1f}",
        "p, full": row["p_full-fine-tuning"], "p, LoRA-D.": row["p_lora-diffusion"],
        "generated": percent(row["generated"]), "head": percent(row["head"]),
        "paper's metric": percent(row["paper_accuracy"]), "training set": percent(row["train_accuracy"]),
        "forgetting": row["general_elbo"] - before, "lr": row["lr"], "seeds": row["seeds"]} for row in rows],
        {"method": "", "trained": ",", "accuracy": "", "95 %": "", "p, full": ".2g", "p, LoRA-D.": ".2g",
         "generated": "", "head": "", "paper's metric": "", "training set": "", "forgetting": "+.3f",
         "lr": "g", "seeds": ""})
    guess, majority = chance(lab, "SST-2")
    print(f"chance {guess:.1%}, majority {majority:.1%}, which is {classify.paper_accuracy(majority):.2%} in "
          "the paper's metric, two of three tokens being given;\np: paired t-test over seeds, times the "
          "comparisons "
          f"(Bonferroni); forgetting: nats a token above the base's {before:.3f}")


def report(lab: Lab) -> None:
    rows, cases = table_rows(lab), ablation_rows(lab)
    before = text_diffusion.validation_elbo(lab.base, lab.general, dtype=lab.dtype)
    train = text.encode(lab.vocabulary, [row for part in lab.train.values() for row in part])
    unigrams = text_diffusion.unigram_nats(train, lab.general, len(lab.vocabulary))
    print(f"base: {before:.3f} nats a token, unigrams {unigrams:.3f}")
    charts = []
    if rows:
        print_main(lab, rows, before)
        x = [math.log10(row["trained"]) for row in rows]
        charts.append(plot.line_chart(
            {row["method"]: ([at], [100 * row["accuracy"]], [100 * (row["sd"] or 0)])
             for at, row in zip(x, rows)},
            "SST-2: accuracy against trained parameters", "log10 of trained parameters", "accuracy, %"))
        with_rank = {row["method"]: row["corrections"] for row in rows if row["corrections"][0]}
        if with_rank:
            charts.append(plot.line_chart(
                {name: (found[0]["t"], np.mean([one["effective_rank"] for one in found], 0))
                 for name, found in with_rank.items()},
                "Effective rank of the correction", "t", "effective rank"))
    if cases:
        print("\nAblations\n")
        plot.print_table([row | {"accuracy": percent(row["accuracy"]), "sd": percent(row["sd"])}
                          for row in cases],
                         {"question": "", "case": "", "seeds": "", "adapter": ",", "accuracy": "", "sd": "",
                          "rank early": ".1f", "rank middle": ".1f", "rank late": ".1f",
                          "centred early": ".1f", "beta_share": ".0%", "size": ".2f"})
    saved = {}
    for name, of in made_from(lab).items():
        try:
            found = json.loads((lab.folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            continue
        if found.get("of") == of:
            saved[name] = found
        else:
            print(f"note: {name}.json is of another base or other settings, and left out")
    if "costs" in saved:
        print("\nCosts; ms are medians\n")
        plot.print_table(saved["costs"]["rows"], {"method": "", "trained": ",", "share": ".1%",
                                                  "encoder": ",", "beta": ",", "rows": ",", "bytes": ",",
                                                  "step_ms": ".0f",
                                                  "one_ms": ".1f", "batch_ms": ".0f", "long_ms": ".0f"})
    if "composition" in saved:
        charts += compose.show(saved["composition"]["seeds"])
    everything = dict(settings=vars(lab.s), base=before, unigrams=unigrams, table=rows, ablations=cases,
                      chance={task: chance(lab, task) for task in TASKS}, **saved)
    plot.write_json(lab.folder / "results.json", everything)
    if charts:
        plot.save(lab.folder / "figure.png", *charts)
    print(f"\nwrote {lab.folder / 'results.json'}" + (f" and {lab.folder / 'figure.png'}" if charts else ""))


def main(argv: list[str] | None = None) -> None:
    args, s = read_command_line(argv)
    torch.set_num_threads(s.threads)
    if args.step == "pretrain":
        pretrain(args, s)
        return
    lab = open_lab(args, s)
    if args.step != "report":
        claim_folder(args.out)  # nobody else writes there
    if args.step == "table":
        make_table(lab, args.only)
    elif args.step == "costs":
        measure_costs(lab)
    elif args.step == "ablations":
        make_ablations(lab)
    elif args.step == "compose":
        make_composition(lab)
    report(lab)


if __name__ == "__main__":
    run_script(main)
