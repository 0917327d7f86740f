"""The diffusion transformer (Peebles and Xie 2023), dense or low-rank.

NA-LR section 3.1 and D.1. `Config` says everything about the architecture, `linear_layers` lists every
linear layer with its rank (the model is factorised by that list, and flops.py counts from it), and `DiT` is
the network. Read lowrank.py before, curriculum.py after.
"""

import functools
import json
import math
from collections import Counter
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from lowrank import Active, Channels, Linear, factorise, masked_channels
from schedule import (NOISES, PREDICTIONS, PROFILES, NoiseSchedule, RankSchedule, base_rank,
                      channels_of, iso_compute_rank)
from script import InputError, check_fields, one_line, setting, to_device

METHODS = ("full", "static", "iso-compute", "iso-param", "elastic")

# depth, width, heads of the original DiT family; each comes with patches of 2, 4 and 8 pixels
SIZES = {"DiT-S": (12, 384, 6), "DiT-B": (12, 768, 12), "DiT-L": (24, 1024, 16), "DiT-XL": (28, 1152, 16)}
PRESETS = {
    f"{name}/{patch}": dict(depth=depth, width=width, heads=heads, patch=patch)
    for name, (depth, width, heads) in SIZES.items() for patch in (2, 4, 8)
}
# small enough to learn `shapes` on two CPU cores in minutes
PRESETS["tiny"] = dict(depth=3, width=192, heads=6, patch=4, conditioning="shared", dense_mlp_blocks=0,
                       predict="v", keep=0.25)
# what a CPU core can teach photographs of 32x32 in an hour or two
PRESETS["small"] = dict(depth=6, width=256, heads=4, patch=4, conditioning="shared", dense_mlp_blocks=0,
                        predict="v")
ELASTIC = dict(keep=1.0, rho_min=0.1)  # as many parameters as full rank, a tenth of the channels at least


def read_profile(text: str) -> str | tuple:
    """A name, or the content of a JSON file {"t": [1, 34], "share": [1.0, 0.6]}, which means: from each t on,
    that share of r_max; as pairs (t, share). Raises InputError."""
    if text in PROFILES:
        return text
    try:
        with open(text, "rb") as file:
            found = json.load(file)
        profile = tuple(zip(found["t"], found["share"], strict=True))
        RankSchedule(profile)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"rank profile {text!r} is neither {' nor '.join(PROFILES)} nor a JSON file like "
                         f'{{"t": [1, 34], "share": [1.0, 0.6]}} ({one_line(error)})') from None
    return profile


@dataclass(frozen=True)
class Config:
    """Everything that decides the shape of a model and what it predicts. Raises InputError, a ValueError, for
    values that do not fit. Fields with a text are flags of train.py and flops.py.

    num_classes: label rows besides the extra one for "no class"; 0 for unconditional data
    mean, std: of each channel of the latents that the model is for; empty for one of images
    """
    depth: int = setting(12, low=1, high=1000)  # or a damaged file would build layers for hours
    width: int = setting(384, low=1)
    heads: int = setting(6, low=1)
    patch: int = setting(2, low=1)
    image_size: int = setting(32, low=1, high=2**15)
    channels: int = setting(3, low=1)
    num_classes: int = setting(10, "label rows of the model; train.py: as the dataset has", low=0, high=10**6)
    noise: str = setting("cosine", "noise schedule; linear: betas from 1e-4 to 0.02", choices=NOISES)
    predict: str = setting("eps", "what the model predicts: the noise, v = sqrt(ab) eps - sqrt(1 - ab) x_0, "
                           "or the image; tiny, small, latents: v", choices=PREDICTIONS)
    method: str = setting("iso-compute", "full: dense; static: one rank for all t; iso-compute: adapted to "
                          "noise, at the cost of static; iso-param: the same with the parameters of static; "
                          "elastic: any share of the channels can be used for sampling", choices=METHODS)
    keep: float = setting(0.5, "share of parameters that a static layer keeps; tiny: 0.25, elastic: 1",
                          above=0, high=1)
    rank_profile: str | tuple = setting("logistic", "shape of Phi(t): logistic, linear, or a file of shares",
                                        choices=PROFILES, parse=read_profile, metavar="NAME|FILE.json")
    rho_min: float = setting(0.4, "smallest share of r_max that is active; elastic: 0.1", above=0, high=1)
    warm_start: float = setting(0.1, "share of t, from the clean end, that always has r_max", low=0, high=1)
    rank_multiple: int = setting(1, "round active ranks up to a multiple; tensor cores like 8 or 16", low=1)
    conditioning: str = setting("per-block", "timestep and label embedder in every block, as the published "
                                "counts, or one for all, as the original DiT; tiny, small: shared",
                                choices=("per-block", "shared"))
    dense_mlp_blocks: int = setting(1, "first blocks whose MLP stays dense; tiny, small: 0", low=0)
    factorise: str = setting("all", "low-rank layers: also adaLN and timestep embedders, as the published "
                             "counts, or what the paper's text names", choices=("all", "attention-mlp"))
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        if isinstance(self.rank_profile, list):  # as JSON has it; a tuple can be hashed
            object.__setattr__(self, "rank_profile", tuple(map(tuple, self.rank_profile)))
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        check_fields(self)
        if self.mean and not len(self.mean) == len(self.std) == self.channels:
            raise InputError(f"mean {self.mean} and std {self.std} are not those of {self.channels} channels")
        if not all(abs(m) < 1e4 and 1e-6 < s < 1e4 for m, s in zip(self.mean, self.std)):
            raise InputError(f"mean {self.mean} and std {self.std}: latents with a constant channel, or one "
                             "of 10,000 and more, cannot be normalised; leave it out")
        self.rank_schedule()  # raises ValueError for a profile that is none
        if self.image_size % self.patch:
            raise InputError(f"image size {self.image_size} is not divisible by the patch size {self.patch}; "
                             "choose another --image-size or a model with another patch (DiT-S/2, /4, /8)")
        if self.width % self.heads or self.width % 4:
            raise InputError(f"width {self.width} must be divisible by the {self.heads} heads and by 4")

    def rank_schedule(self) -> RankSchedule | None:
        """Phi(t) of this model; None where every timestep uses all channels."""
        if not self.method.startswith("iso"):
            return None
        return RankSchedule(self.rank_profile, self.rho_min, self.warm_start, multiple=self.rank_multiple)

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def embedders(self) -> int:
        return self.depth if self.conditioning == "per-block" else 1


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer: n inputs, m outputs, applied to `rows` vectors a sample (its tokens, or 1 for
    conditioning). rank is r_max, or None if dense. no_input_grad: its input is data, so the backward
    pass computes one product instead of two."""
    name: str
    n: int
    m: int
    rows: int
    rank: int | None
    no_input_grad: bool


TIME_WIDTH = 256  # of the sinusoidal timestep embedding: 128 frequencies, cosines and sines


@functools.cache
def linear_layers(config: Config) -> tuple[LinearLayer, ...]:
    """Every linear layer of the model with its rank: embedders, then block by block. The patch
    convolution is not among them."""
    d, tokens = config.width, config.tokens
    everywhere = config.factorise == "all"
    layers = []

    def add(name: str, n: int, m: int, rows: int, low_rank: bool = True, no_input_grad: bool = False):
        rank = None
        if low_rank and config.method != "full":
            rank = base_rank(config.keep, m, n)
            if config.method == "iso-compute":
                rank = iso_compute_rank(rank, config.rank_schedule(), min(m, n))
        layers.append(LinearLayer(name, n, m, rows, rank, no_input_grad))

    for e in range(config.embedders):
        add(f"embedders.{e}.time_in", TIME_WIDTH, d, 1, everywhere, no_input_grad=True)
        add(f"embedders.{e}.time_out", d, d, 1, everywhere)
    for b in range(config.depth):
        add(f"blocks.{b}.adaln", d, 6 * d, 1, everywhere)
        for name in ("q", "k", "v", "out"):
            add(f"blocks.{b}.{name}", d, d, tokens)
        add(f"blocks.{b}.mlp_in", d, 4 * d, tokens, b >= config.dense_mlp_blocks)
        add(f"blocks.{b}.mlp_out", 4 * d, d, tokens, b >= config.dense_mlp_blocks)
    add("final_adaln", d, 2 * d, 1, low_rank=False)
    add("final_out", d, config.patch**2 * config.channels, tokens, low_rank=False)
    return tuple(layers)


# ----------------------------------------------------------------------------------------------------
# Embeddings


def timestep_embedding(t: torch.Tensor) -> torch.Tensor:
    """Sinusoids of t (B,) at 128 frequencies that fall from 1 towards 1/10000, cosines first: (B, 256)."""
    half = TIME_WIDTH // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].float() * frequency  # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def position_embedding(width: int, side: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions of a side x side grid, row by row: (side * side, width), of torch's
    default dtype like the weights. The first half of the width encodes the column, the second the row."""
    frequency = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    parts = []
    for axis in (column, row):
        angle = axis.reshape(-1, 1).double() * frequency  # (side * side, width / 4)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).to(torch.get_default_dtype())


class Conditioning(nn.Module):
    """Embeds timestep and label into the vector that steers adaLN."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.time_in = Linear(TIME_WIDTH, width)
        self.time_out = Linear(width, width)
        self.label = nn.Embedding(num_classes + 1, width)  # the last row means "no class"

    def forward(self, t_emb, y, active=None):
        t = self.time_out(F.silu(self.time_in(t_emb, active)), active)  # (B, D)
        # every adaLN layer starts with this SiLU; applied here, it runs once
        return F.silu(t + self.label(y))  # (B, D)


# ----------------------------------------------------------------------------------------------------
# The transformer


def modulate(x, shift, scale):
    """LayerNorm without parameters, then scale and shift: x (B, N, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, each (B, heads, N, d)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        # in bfloat16 the backward pass of PyTorch's CPU kernel takes twice as long (64 tokens; 12 times: 16)
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Attention and MLP, each between a modulated LayerNorm and a gate (adaLN-Zero)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.adaln = Linear(width, 6 * width)
        # three layers, not one fused projection: each of Q, K, V has factors of its own
        self.q, self.k, self.v, self.out = (Linear(width, width) for _ in range(4))
        self.mlp_in, self.mlp_out = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x, condition, active=None):
        """x (B, N, D); condition (B, 1, 6D), what `adaln` makes of timestep and label (`DiT.forward`)."""
        B, N, D = x.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = condition.chunk(6, dim=2)  # (B, 1, D)
        h = modulate(x, shift_1, scale_1)  # (B, N, D)
        q, k, v = (y.view(B, N, self.heads, D // self.heads).transpose(1, 2)  # (B, heads, N, D/heads)
                   for y in (self.q(h, active), self.k(h, active), self.v(h, active)))
        h = attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = torch.addcmul(x, gate_1, self.out(h, active))
        h = modulate(x, shift_2, scale_2)
        # the original takes the tanh approximation (less than 5e-4 off), which is slower on a CPU
        h = F.gelu(self.mlp_in(h, active))  # (B, N, 4D)
        return torch.addcmul(x, gate_2, self.mlp_out(h, active))  # (B, N, D)


class DiT(nn.Module):
    """DiT(x_t, t, y) predicts the noise in x_t, or what else config.predict says.

    config.method other than 'full' factorises the layers that `linear_layers` gives a rank.
    """

    def __init__(self, config: Config, initialise: bool = True):
        """initialise=False leaves the weights for `load_state_dict` to fill, and saves the SVDs."""
        super().__init__()
        self.config = config
        self.rank_schedule, self.noise_schedule = config.rank_schedule(), NoiseSchedule(config.noise)
        d = config.width
        self.patchify = nn.Conv2d(config.channels, d, config.patch, stride=config.patch)
        self.embedders = nn.ModuleList(Conditioning(d, config.num_classes) for _ in range(config.embedders))
        self.blocks = nn.ModuleList(Block(d, config.heads) for _ in range(config.depth))
        self.final_adaln = Linear(d, 2 * d)
        self.final_out = Linear(d, config.patch**2 * config.channels)
        position = position_embedding(d, config.image_size // config.patch)
        self.register_buffer("position", position, persistent=False)

        if initialise:
            self.initialise()
        ranks = {layer.name: layer.rank for layer in linear_layers(config) if layer.rank is not None}
        factorise(self, ranks, initialise)
        self.ranks = sorted(set(ranks.values()))  # the distinct r_max

    @torch.no_grad()
    def initialise(self):
        """As the original DiT: the low-rank factors then come from the SVD of these weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patchify.weight.flatten(1))  # seen as the linear layer that it is
        nn.init.zeros_(self.patchify.bias)
        for embedder in self.embedders:
            for weight in (embedder.time_in.weight, embedder.time_out.weight, embedder.label.weight):
                nn.init.normal_(weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, the whole model as output = 0
        for layer in [block.adaln for block in self.blocks] + [self.final_adaln, self.final_out]:
            nn.init.zeros_(layer.weight)

    def active(self, t: int | torch.Tensor, share: float | torch.Tensor | None = None) -> Active:
        """How many channels every layer uses at timestep t; None where all of them are.

        t int: slicing, for a batch that shares t. t int64 (B,) on the CPU: a mask per sample, inside the
        channels that the neediest sample uses.
        share: of r_max, which no sample exceeds whatever the rank schedule says: a float for all, or float64
        (B,) on the CPU. None: no such limit.
        """
        if self.rank_schedule is None and share is None:
            return None
        active = {}
        for r in self.ranks:
            k = torch.as_tensor(r if self.rank_schedule is None else self.rank_schedule.active(t, r))
            if share is not None:
                k = k.clamp(max=channels_of(share, r))
            if k.dim() == 0:
                active[r] = Channels(int(k))
            else:
                k, mask = masked_channels(k)
                active[r] = Channels(k, to_device(mask, self.position.device))
        return active

    def active_from(self, t_low: int) -> Active:
        """The channels that any timestep from t_low up uses: those of a stage of the curriculum."""
        if self.rank_schedule is None:
            return None
        return {r: Channels(int(self.rank_schedule.table(r)[t_low:].max())) for r in self.ranks}

    def forward(self, x, t, y, active: Active = None):
        """x (B, C, H, W) float, t int64 (B,) in 1..T, y int64 (B,) in 0..num_classes, where
        num_classes means "no class". Returns what config.predict says, (B, C, H, W).

        active: from `self.active`. None: each sample is masked to its own Phi(t), or uses all channels where
        there is no rank schedule; to a layer, None always means all its channels.
        """
        if active is None and self.rank_schedule is not None:
            active = self.active(t.cpu())
        t_emb = timestep_embedding(t).to(self.position.dtype)  # (B, 256)
        c = [embedder(t_emb, y, active) for embedder in self.embedders]  # each (B, D)
        conditions = [block.adaln(c[i % len(c)], active)[:, None] for i, block in enumerate(self.blocks)]
        # with an embedder in every block, the published model takes the first one's vector at the end
        return self.output(self.hidden(x, conditions, active), self.final_adaln(c[0])[:, None])

    def hidden(self, x, conditions: list[torch.Tensor], active: Active = None):
        """What all blocks make of the image, each told shifts, scales and gates (B, 1, 6D):
        x (B, C, H, W) -> (B, N, D)."""
        # contiguous: or the residual stream of all blocks would keep the convolution's order (D before N)
        h = self.patchify(x).flatten(2).transpose(1, 2).contiguous() + self.position  # (B, N, D)
        for block, condition in zip(self.blocks, conditions):
            h = block(h, condition, active)  # (B, N, D)
        return h

    def output(self, h, condition):
        """The final layer, told shift and scale (B, 1, 2D): h (B, N, D) -> (B, C, H, W)."""
        shift, scale = condition.chunk(2, dim=2)  # (B, 1, D)
        h = self.final_out(modulate(h, shift, scale))  # (B, N, p*p*C)
        p, side = self.config.patch, self.config.image_size // self.config.patch
        h = h.view(-1, side, side, p, p, self.config.channels).permute(0, 5, 1, 3, 2, 4)
        return h.reshape(len(h), self.config.channels, side * p, side * p)  # (B, C, H, W)


def parameter_count(config: Config) -> int:
    """Parameters of the model, from shapes alone."""
    count = config.width * (config.channels * config.patch**2 + 1)  # patch convolution
    count += config.embedders * (config.num_classes + 1) * config.width
    for layer in linear_layers(config):
        weights = layer.n * layer.m if layer.rank is None else layer.rank * (layer.n + layer.m)
        count += weights + layer.m
    return count


def preset_config(model: str, given: dict, **facts) -> Config:
    """The preset, overlaid with what --method elastic has otherwise, with `facts` (image_size, channels,
    num_classes of the data), and with those of the given flags that are fields of Config. Raises ValueError
    as `Config` does."""
    given = {f.name: given[f.name] for f in fields(Config) if f.name in given}
    by_method = ELASTIC if given.get("method") == "elastic" else {}
    return Config(**(PRESETS[model] | by_method | facts | given))


def summary(config: Config) -> str:
    """Method and parameters, and a line per distinct layer shape: its rank, with a warning where low rank
    costs more than dense."""
    full = parameter_count(replace(config, method="full"))
    text = config.method + ("" if config.method == "full" else f" keep {config.keep:g}")
    text += f", predicts {config.predict}: {parameter_count(config):,} parameters (full rank {full:,})"
    schedule = config.rank_schedule()
    shapes = Counter((layer.m, layer.n, layer.rank) for layer in linear_layers(config) if layer.rank)
    for (m, n, r), count in sorted(shapes.items()):
        least = r
        if schedule:
            least = int(schedule.table(r).min())
        elif config.method == "elastic":
            least = channels_of(config.rho_min, r)
        ranks = f"{r}" if least == r else f"{least}..{r}"
        text += f"\n{count:16d} layers {m:5d} x {n:<5d} rank {ranks}"
        if r * (m + n) > m * n:
            text += f"  (above m n / (m + n) = {m * n / (m + n):.0f}: costs more than dense)"
    return text
