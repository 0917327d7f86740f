"""Sentences, words, labels and instructions: what text_diffusion.py and lora_diffusion.py read.

A folder of texts holds, for each of three tasks, train.tsv and dev.tsv: a header `sentence<TAB>label`, then a
line for each sentence, UTF-8, lower case, its words separated by blanks, its label a number.

    SST-2   is a phrase of a film review negative (0) or positive (1)?   Socher et al. 2013; the files of GLUE
    Subj    is a sentence opinion (0) or plot (1)?   Pang and Lee 2004, "subjectivity dataset v1.0"; 1,000 of
            them held out
    TREC    what does a question ask for: description 0, entity 1, abbreviation 2, person 3, place 4,
            number 5?   Li and Roth 2002, the split of 5,452 and 500 questions

Nothing here is about diffusion. Read text_diffusion.py after.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
from script import InputError

LONGEST = 62  # words of a sentence that are read; with separator and label it has 64 tokens
PAD, MASK, UNKNOWN = 0, 1, 2  # the first words of every vocabulary

# ----------------------------------------------------------------------------------------------------
# Tasks


class Task(NamedTuple):
    """labels: what the numbers in the files mean. instructions: paraphrases to train with. unseen:
    paraphrases by which a router is judged."""
    labels: tuple[str, ...]
    instructions: tuple[str, ...]
    unseen: tuple[str, ...]


TASKS = {
    "SST-2": Task(
        ("negative", "positive"),
        ("is this review positive or negative ?", "say whether the writer likes the film",
         "find the sentiment of the sentence", "is the feeling good or bad ?",
         "tell if the critic likes or hates the movie", "judge the tone of this review"),
        ("does the critic like the movie ?", "is the sentiment of the writer good or bad ?",
         "tell whether this is praise", "is it a positive or a negative sentence ?")),
    "Subj": Task(
        ("opinion", "plot"),
        ("is this sentence an opinion or a fact ?", "say whether the text tells a story or gives a view",
         "find out if the sentence is subjective", "is this about the plot or what someone thinks ?",
         "tell an opinion from a fact", "does the sentence describe events or a view ?"),
        ("is this a fact or what someone thinks ?", "is the text subjective ?",
         "tell if the sentence describes the story", "find out if this is an opinion")),
    "TREC": Task(
        ("description", "entity", "abbreviation", "person", "place", "number"),
        ("what kind of answer does the question want ?", "is it a person , a place or a number ?",
         "find the type of the question", "say what is asked for", "what would answer this question ?",
         "does the question want a name , a place or a date ?"),
        ("what type of answer is asked for ?", "say what kind of question this is",
         "does it want a person or a place ?", "find what would answer the question")),
}

# Two instructions in one, which no adapter saw
BOTH = "is this sentence an opinion or a fact , and is this review positive or negative ?"

# ----------------------------------------------------------------------------------------------------
# Files


def read_sentences(path: Path, labels: int) -> list[tuple[str, int]]:
    """The (sentence, label) pairs of one file. Raises InputError for a file that is not there or not like
    that."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); --text takes a folder with SST-2, Subj and "
                         "TREC in it, each with train.tsv and dev.tsv") from None
    if lines[0].rstrip("\r") != "sentence\tlabel":
        raise InputError(f"{path} must begin with the line sentence<TAB>label")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line and number == len(lines):
            break  # the file ends with a newline
        sentence, tab, label = line.rstrip("\r").rpartition("\t")
        if not tab or "\t" in sentence:
            raise InputError(f"{path}, line {number}: must be a sentence, one tab and a label")
        if not sentence.split():
            raise InputError(f"{path}, line {number}: the sentence is empty")
        if label not in map(str, range(labels)):
            raise InputError(f"{path}, line {number}: the label {label[:20]!r} is unknown; use 0 to "
                             f"{labels - 1}")
        rows.append((" ".join(sentence.split()), int(label)))
    if not rows:
        raise InputError(f"{path} holds no sentences")
    return rows


class Texts(NamedTuple):
    """Of each task: the pairs to train with and to judge by. left_out: of how many sentences of train.tsv the
    development set has a copy; they are not trained with."""
    train: dict[str, list[tuple[str, int]]]
    dev: dict[str, list[tuple[str, int]]]
    left_out: dict[str, int]


def read_texts(folder: Path) -> Texts:
    """Raises InputError."""
    train, dev, left_out = {}, {}, {}
    for name, task in TASKS.items():
        rows, dev[name] = (read_sentences(folder / name / f"{part}.tsv", len(task.labels))
                           for part in ("train", "dev"))
        judged = {sentence for sentence, _ in dev[name]}
        train[name] = [row for row in rows if row[0] not in judged]
        left_out[name] = len(rows) - len(train[name])
        if not train[name]:
            raise InputError(f"{folder / name}: every sentence of train.tsv is in dev.tsv, too")
    return Texts(train, dev, left_out)


def split_off(rows: list[tuple[str, int]], n: int, generator: torch.Generator) -> tuple[list, list]:
    """(the rest, n held-out pairs) of training pairs, to choose a learning rate by.

    SST-2's training set consists of sentences and of their parts. What is held out is of more than five
    words, as the development set's sentences are (where there are such), and a part of more than three words
    of a held-out one is in neither of the two: it would give its label away. What contains a held-out one stays
    (for four of five of them there is such a row), so accuracies on these are too high; they only choose rates."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    order.sort(key=lambda i: len(rows[i][0].split()) <= 5)  # stable: long ones first
    held_out = [rows[i] for i in order[:n]]
    everything = "\n".join(f" {sentence} " for sentence, _ in held_out)
    taken = set(order[:n])
    rest = [row for i, row in enumerate(rows) if i not in taken
            and (row[0].count(" ") < 3 or f" {row[0]} " not in everything)]
    return rest, held_out


# ----------------------------------------------------------------------------------------------------
# Words


class Vocabulary:
    """Words and their numbers. The first three are no words: padding, mask, and any word that is not
    listed."""

    def __init__(self, words: Sequence[str]):
        self.words = ["[pad]", "[mask]", "[unknown]", *words]
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentence: str) -> list[int]:
        """The first LONGEST words as numbers."""
        return [self.index.get(word, UNKNOWN) for word in sentence.split()[:LONGEST]]

    def decode(self, ids) -> str:
        return " ".join(self.words[i] for i in ids if i != PAD)


def build_vocabulary(sentences: list[str], least: int = 3) -> Vocabulary:
    """Words seen at least so often, the most frequent first (of equally frequent ones in the alphabet's
    order)."""
    counts = Counter(word for sentence in sentences for word in sentence.split())
    for special in ("[pad]", "[mask]", "[unknown]"):
        counts.pop(special, None)
    return Vocabulary(sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w)))


class Sentences(NamedTuple):
    """ids: int64 (N, L), padded at the end; length: int64 (N,); label: int64 (N,), -1 where there is none"""
    ids: torch.Tensor
    length: torch.Tensor
    label: torch.Tensor


def encode(vocabulary: Vocabulary, rows: list[tuple[str, int]]) -> Sentences:
    found = [vocabulary.encode(sentence) for sentence, _ in rows]
    length = torch.tensor([len(words) for words in found])
    ids = torch.full((len(rows), int(length.max())), PAD)
    for i, words in enumerate(found):
        ids[i, :len(words)] = torch.tensor(words)
    return Sentences(ids, length, torch.tensor([label for _, label in rows]))


# ----------------------------------------------------------------------------------------------------
# Batches: sentences of similar length together, so that little padding is computed. Each is a function of
# seed and epoch alone: a run that was stopped goes on with the same ones.


def shuffled_batches(length: torch.Tensor, size: int, generator: torch.Generator,
                     tokens: bool = False) -> list[torch.Tensor]:
    """The indices of all sentences, cut into batches of `size` sentences, or with `tokens` of at most so many
    tokens including padding; the batches in random order."""
    order = torch.randperm(len(length), generator=generator)
    order = order[length[order].argsort(stable=True)]  # equal lengths stay in random order
    if not tokens:
        batches = list(order.split(size))
    else:
        batches, first, sizes = [], 0, length[order].tolist()
        while first < len(order):
            last = first + 1
            while last < len(order) and (last + 1 - first) * sizes[last] <= size:
                last += 1
            batches.append(order[first:last])
            first = last
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
