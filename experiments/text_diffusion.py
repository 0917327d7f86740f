"""A masked diffusion language model: the frozen base that lora_diffusion.py adapts.

Absorbing-state diffusion (Austin et al. 2021, D3PM; in the simple form of Sahoo et al. 2024, MDLM). x_0 is a
sentence; in x_t each token has been replaced by [mask], on its own, with probability 1 - alpha_t. The model
sees x_t and t and gives a distribution over words at every masked token. Read text.py before, adapters.py
after.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import text
from lowrank import Linear
from script import (InputError, duration, end_progress, pick_dtype, read_checkpoint, show_progress,
                    write_then_rename)
from text import LONGEST, MASK, PAD, Sentences, Vocabulary

T = 100  # steps; t = 0 is the sentence, t = T all masks
CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------------------------
# Noise


def _alpha() -> torch.Tensor:
    alpha = torch.cos(math.pi / 2 * torch.arange(T + 1, dtype=torch.float64) / T) ** 2
    alpha[T] = 0  # not 4e-33: at t = T every token is masked, for certain
    return alpha


ALPHA = _alpha()  # float64 (T + 1,): the share of tokens that survive, cos^2(pi t / 2 T), from 1 down to 0
# Of the tokens masked at t, the share that the step from t to t - 1 unmasks; entry 0 is not used
UNMASKED = torch.cat([torch.zeros(1, dtype=torch.float64), (ALPHA[:-1] - ALPHA[1:]) / (1 - ALPHA[1:])])
WEIGHT = T * UNMASKED  # of the cross-entropy of a masked token, for t uniform in 1..T


def stratified_t(n: int, generator: torch.Generator, steps: int = T) -> torch.Tensor:
    """n timesteps, int64 (n,), each uniform in 1..steps; one from each of n equal strata, in random order."""
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
    return (u * steps).long().clamp(max=steps - 1) + 1


def add_masks(x_0: torch.Tensor, t: torch.Tensor, generator: torch.Generator,
              clean: torch.Tensor | None = None) -> torch.Tensor:
    """x_t ~ q(x_t | x_0): each token survives with probability alpha_t; padding is no token. int64 (B, N).
    clean: bool (B, N), tokens that stay what they are: a prompt."""
    masked = torch.rand(x_0.shape, generator=generator, dtype=torch.float64) >= ALPHA[t][:, None]
    masked &= x_0 != PAD
    if clean is not None:
        masked &= ~clean
    return torch.where(masked, MASK, x_0)


def random_spans(length: torch.Tensor, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """bool (B, tokens): for each second sentence on average, one span of 1 to length - 1 tokens, anywhere."""
    n = len(length)
    size = 1 + (torch.rand(n, generator=generator) * (length - 1)).long()  # 1..length - 1; 1 of a single word
    first = (torch.rand(n, generator=generator) * (length - size + 1)).long()
    chosen = (torch.rand(n, generator=generator) < 0.5) & (length > 1)
    place = torch.arange(tokens)
    return chosen[:, None] & (place >= first[:, None]) & (place < (first + size)[:, None])


# ----------------------------------------------------------------------------------------------------
# The model


class Config(NamedTuple):
    words: int  # size of the vocabulary, its three special tokens included
    width: int = 192
    depth: int = 4
    heads: int = 4


def time_features(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of t (B,), at width / 2 frequencies from 1 down to 1/1000 a step: float32 (B, width)"""
    frequency = torch.exp(-math.log(1000) * torch.arange(width // 2) / (width // 2))
    angle = t[:, None] * frequency  # (B, width / 2)
    return torch.cat([angle.cos(), angle.sin()], 1)


def distance_bias(heads: int, tokens: int) -> torch.Tensor:
    """What is added to the attention of token i on token j: float32 (heads, N, N). The first head sees all
    places alike; the others mind the distance, -|i - j| times a slope, as in ALiBi (Press et al. 2022), in
    turns to the left, to the right and to both sides. A base of minutes has no time to learn where its
    neighbours are."""
    apart = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]  # (N, N): j - i
    bias = torch.zeros(heads, tokens, tokens)
    for head in range(1, heads):
        side = (head - 1) % 3
        bias[head] = -apart.abs() * (1.0, 1.0, 0.5)[side]
        if side < 2:
            bias[head] -= 4.0 * ((apart > 0) if side == 0 else (apart < 0))  # the other side, faintly
    return bias


class Block(nn.Module):
    """Attention and MLP behind a LayerNorm each. The layers take `active` and hand it on (lowrank.py):
    adapters put others into their places, whose rank may depend on t."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (Linear(width, width) for _ in range(4))
        self.mlp_in, self.mlp_out = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x, there, bias, active=None):
        """x (B, N, D); there: bool (B, N), False for padding; bias (heads, N, N), from `distance_bias`"""
        B, N, D = x.shape
        h = self.norm_1(x)
        q, k, v = (layer(h, active).view(B, -1, self.heads, D // self.heads).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))  # (B, heads, N, D/heads)
        # prefix tuning puts keys and values before those of the sentence
        bias = F.pad(bias.masked_fill(~there[:, None, None], -math.inf), (k.shape[2] - N, 0))
        scores = q @ k.mT / (D // self.heads) ** 0.5 + bias  # (B, heads, N, prefix + N)
        h = scores.softmax(-1) @ v  # (B, heads, N, D/heads); PyTorch's fused one is slower on so few tokens
        x = x + self.out(h.transpose(1, 2).reshape(B, N, D), active)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_2(x), active)), active)  # (B, N, D)


class TextDiffusion(nn.Module):
    """Logits over words for each masked token of x_t. Input and output share the words' embeddings."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        d = config.width
        self.embedding = nn.Embedding(config.words, d)
        self.position = nn.Parameter(torch.zeros(LONGEST + 2, d))
        self.time_in, self.time_out = nn.Linear(d, d), nn.Linear(d, d)
        self.blocks = nn.ModuleList(Block(d, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(d)
        self.output_bias = nn.Parameter(torch.zeros(config.words - 2))  # padding and mask are never predicted
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=0.02)  # as output; as input `embed` makes it larger
        nn.init.normal_(self.position, std=0.1)
        # or t would drown the words, and the model learn nothing but their frequencies
        self.time_out.weight *= 0.1
        for block in self.blocks:  # the residual stream starts nearly as the embedding
            block.out.weight *= 0.3
            block.mlp_out.weight *= 0.3

    def embed(self, x):
        """Words (B, N) -> (B, N, D), of about the size of what the blocks add to them"""
        return self.embedding(x) * self.config.width**0.5

    def time(self, t: torch.Tensor) -> torch.Tensor:
        """Emb(t): (B, D)"""
        return self.time_out(F.silu(self.time_in(time_features(t, self.config.width))))

    def transform(self, h, t, there, active=None):
        """What the blocks make of embedded tokens h (B, N, D) at t (B,): the final hidden states, (B, N,
        D)"""
        h = h + self.position[:h.shape[1]] + self.time(t)[:, None]
        bias = distance_bias(self.config.heads, h.shape[1])
        for block in self.blocks:
            h = block(h, there, bias, active)
        return self.norm(h)

    def hidden(self, x_t, t):
        return self.transform(self.embed(x_t), t, x_t != PAD)  # (B, N, D)

    def logits(self, h):
        """Final hidden states (..., D) -> logits (..., words - 2) of the vocabulary from [unknown] on"""
        return F.linear(h, self.embedding.weight[2:], self.output_bias)

    def forward(self, x_t, t):
        return self.logits(self.hidden(x_t, t))


# ----------------------------------------------------------------------------------------------------
# The loss


def negative_elbo(model, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """T (alpha_{t-1} - alpha_t) / (1 - alpha_t) times the cross-entropy summed over masked tokens: float32
    (B,).

    Its mean over t uniform in 1..T and over x_t is the negative ELBO of x_0 in nats (MDLM Eq. 9 in discrete
    time; the step at t = 1, from x_1 to x_0, included; the prior's term is 0, for alpha_T is). The logits are
    computed of masked tokens alone. model: `hidden(x_t, t)` and `logits(h)`."""
    masked = x_t == MASK
    h = model.hidden(x_t, t)[masked]  # (M, D)
    losses = F.cross_entropy(model.logits(h).float(), x_0[masked] - 2, reduction="none")  # (M,)
    row = masked.nonzero()[:, 0]
    per_sentence = torch.zeros(len(x_0)).index_add(0, row, losses)  # (B,)
    return WEIGHT[t].float() * per_sentence


@torch.no_grad()
def validation_elbo(model, sentences: Sentences, seed: int = 0, repeats: int = 1,
                    dtype: torch.dtype = torch.float32) -> float:
    """The negative ELBO in nats per token. Every model meets the same sentences, timesteps and masks."""
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for _ in range(repeats):
        for index in text.shuffled_batches(sentences.length, 64, generator):
            x_0 = sentences.ids[index, :sentences.length[index].max()]
            t = stratified_t(len(index), generator)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                total += negative_elbo(model, x_0, add_masks(x_0, t, generator), t).double().sum().item()
    return total / (repeats * sentences.length.sum().item())


def unigram_log_probabilities(train: Sentences, words: int) -> torch.Tensor:
    """How frequent each word from [unknown] on is, each counted once more: float64 (words - 2,)"""
    count = torch.bincount(train.ids[train.ids != PAD], minlength=words).double()[2:] + 1
    return (count / count.sum()).log()


def unigram_nats(train: Sentences, judged: Sentences, words: int) -> float:
    """Nats per token of a model that knows how frequent each word is, and no more."""
    return -unigram_log_probabilities(train, words)[judged.ids[judged.ids != PAD] - 2].mean().item()


# ----------------------------------------------------------------------------------------------------
# Sampling


@torch.no_grad()
def unmask(model, x: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Ancestral sampling: x (B, N) with [mask] where a word is wanted, everything else being prompt or
    padding. In the step from t to t - 1 each masked token is unmasked with probability (alpha_{t-1} -
    alpha_t) / (1 - alpha_t), its word drawn from the model's distribution. Yields x after each of the T
    steps."""
    for t in range(T, 0, -1):
        chosen = (torch.rand(x.shape, generator=generator, dtype=torch.float64) < UNMASKED[t]) & (x == MASK)
        if chosen.any():  # else the step changes nothing, and the model need not be asked
            h = model.hidden(x, torch.full((len(x),), t))[chosen]  # (M, D)
            p = model.logits(h).float().softmax(-1)
            x = x.clone()
            x[chosen] = torch.multinomial(p, 1, generator=generator)[:, 0] + 2
        yield x


def generate(model, sentences: Sentences, n: int, seed: int) -> torch.Tensor:
    """n new sentences as long as n random ones of `sentences`: int64 (n, L)"""
    generator = torch.Generator().manual_seed(seed)
    long_ones = sentences.length[sentences.length > 5] if (sentences.length > 5).any() else sentences.length
    length = long_ones[torch.randint(len(long_ones), (n,), generator=generator)]
    x = torch.where(torch.arange(length.max()) < length[:, None], MASK, PAD)
    for x in unmask(model, x, generator):
        pass
    return x


# ----------------------------------------------------------------------------------------------------
# Pretraining


def neighbour_embeddings(ids: torch.Tensor, words: int, width: int, window: int = 5) -> torch.Tensor:
    """Embeddings in which words are alike that stand beside the same words: the singular vectors of the
    matrix of positive pointwise mutual information, log n_ij n / (n_i n_j), of words at most `window` apart
    (Levy et al. 2015, with their exponent 0.75). ids (N, L), padded -> (words, width), each of length 0.02
    sqrt(width).

    A base that is trained for minutes would spend most of them to find this out."""
    pairs = []
    for apart in range(1, min(window, ids.shape[1] - 1) + 1):
        left, right = ids[:, :-apart].flatten(), ids[:, apart:].flatten()
        both = (left != PAD) & (right != PAD)
        pairs += [torch.stack([left[both], right[both]]), torch.stack([right[both], left[both]])]
    embeddings = 0.004 * torch.randn(words, width)
    if pairs and pairs[0].numel():
        pairs = torch.cat(pairs, 1)  # (2, pairs)
        counted = torch.sparse_coo_tensor(pairs, torch.ones(pairs.shape[1]), (words, words),
                                          check_invariants=False).coalesce()
        (i, j), n = counted.indices(), counted.values()
        n_i = torch.bincount(i, n, words)
        n_j = n_i**0.75
        mutual = (n * n_j.sum() / (n_i[i] * n_j[j])).log().clamp(min=0)
        matrix = torch.sparse_coo_tensor(torch.stack([i, j]), mutual, (words, words), check_invariants=False)
        U, S, _ = torch.svd_lowrank(matrix, min(width, words))
        found = U * S.sqrt()
        embeddings[:, :found.shape[1]] += found / found.norm(dim=1, keepdim=True).clamp(min=1e-3)
        embeddings *= 0.02 * width**0.5 / embeddings.norm(dim=1, keepdim=True)
    return embeddings


def pretraining_batch(train: Sentences, batches: list[torch.Tensor], seed: int, step: int):
    """x_0, x_t and t of a step. `batches` are those of its epoch; the noise depends on seed and step
    alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    index = batches[step % len(batches)]
    length = train.length[index]
    x_0, t = train.ids[index, :length.max()], stratified_t(len(index), generator)
    clean = random_spans(length, x_0.shape[1], generator)
    return x_0, add_masks(x_0, t, generator, clean), t


def one_cycle(step: int, steps: int, lr: float, warmup: int) -> float:
    """Learning rate: up in a line, then down to zero along a cosine."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(folder: Path, vocabulary: Vocabulary, train: Sentences, dev: Sentences, config: Config,
             steps: int, tokens: int, lr: float, seed: int, dtype_name: str | None,
             every: int = 500) -> TextDiffusion:
    """Trains on sentences without labels, or goes on where `folder`/base.pt stands: the same weights, bit for
    bit. tokens: of a batch, padding included. Raises InputError if the file is of other settings."""
    path, dtype = folder / "base.pt", pick_dtype(dtype_name, CPU)
    settings = dict(config=list(config), words=vocabulary.words, steps=steps, tokens=tokens, lr=lr, seed=seed,
                    dtype=str(dtype))
    torch.manual_seed(seed)
    model = TextDiffusion(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=0.01, fused=True)
    step = 0
    if path.exists():
        state = read_checkpoint(path, ("settings", "model", "optimizer", "step"))
        if state["settings"] != settings:
            raise InputError(f"{path} is a base of other texts or settings; give its flags, or another --out")
        model.load_state_dict(state["model"])
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    else:  # what counting can tell need not be learned
        model.embedding.weight.data.copy_(neighbour_embeddings(train.ids, config.words, config.width))
        model.output_bias.data.copy_(unigram_log_probabilities(train, config.words))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(vocabulary):,} words; "
          f"{len(train.length):,} sentences, {train.length.sum():,} tokens")

    per_epoch = len(text.shuffled_batches(train.length, tokens, torch.Generator().manual_seed(0),
                                          tokens=True))
    epoch, batches, recent, start, first = None, None, [], time.time(), step
    while step < steps:
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            generator = torch.Generator().manual_seed(seed + 7919 * epoch)
            batches = text.shuffled_batches(train.length, tokens, generator, tokens=True)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, lr, 200)
        x_0, x_t, t = pretraining_batch(train, batches, seed, step)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = negative_elbo(model, x_0, x_t, t).sum() / (x_0 != PAD).sum()  # nats per token
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent.append(loss.item())
        if step % 25 == 0 or step == steps:
            if not math.isfinite(sum(recent)):
                raise InputError(f"the loss stopped being finite before step {step}; try a lower --base-lr")
            left = (time.time() - start) / (step - first) * (steps - step)
            show_progress(f"step {step:,} of {steps:,}  epoch {step / per_epoch:.1f}  loss "
                          f"{sum(recent) / len(recent):.3f} nats a token  {duration(left)} left")
            recent = []
        if step % every == 0 or step == steps:
            saved = dict(settings=settings, model=model.state_dict(), step=step,
                         optimizer=optimizer.state_dict() if step < steps else None)  # not needed any more
            write_then_rename(path, lambda file: torch.save(saved, file))
            end_progress()
            print(f"development set: {validation_elbo(model, dev, dtype=dtype):.3f} nats a token, unigrams "
                  f"{unigram_nats(train, dev, len(vocabulary)):.3f}")
            for x in generate(model, train, 3, step):
                print("   ", vocabulary.decode(x.tolist()), flush=True)
    return model


def load_base(path: Path) -> tuple[TextDiffusion, Vocabulary, dict]:
    """The finished base, its words and settings. Raises InputError if the file is none."""
    if not path.exists():
        raise InputError(f"there is no base {path}; make one with the step `pretrain`")
    state = read_checkpoint(path, ("settings", "model", "step"))
    try:
        settings = state["settings"]
        config, vocabulary = Config(*settings["config"]), Vocabulary(settings["words"][3:])
        if state["step"] < settings["steps"]:
            raise InputError(f"{path} has had {state['step']:,} of its {settings['steps']:,} steps; go on "
                             "with the step `pretrain`")
        model = TextDiffusion(config)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a base that the step `pretrain` wrote "
                         f"({type(error).__name__})") from None
    return model.eval(), vocabulary, settings
