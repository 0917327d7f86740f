"""Multiply-adds and parameters from shapes alone, and the paper's tables beside ours.

NA-LR Eq. (6), Tables 1 to 8, B.4. No model is built and no GPU is asked: every figure follows from
`linear_layers` (model.py) and Phi(t) (schedule.py). One counting function, `products`, serves our
accounting and the paper's; they differ by the `Convention` that is handed to it. Read model.py before,
sample.py or train.py after.

    python flops.py                            the default model: forward, sampling, training, a chart
    python flops.py --model DiT-S/2 --method iso-param --keep 0.75
    python flops.py --paper                    every published figure beside the one that is computed
    python flops.py --run runs/NAME            what a run has spent, and what it saved
"""

import functools
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from curriculum import Curriculum, cluster_timesteps
from data import InputError, Parser, positive_int, run_script
from model import (PRESETS, TRAINING, Config, LinearLayer, add_model_flags, chunk_batch, config_from_flags,
                   linear_layers, parameter_count, rank_summary)
from schedule import T, NoiseSchedule, sampling_timesteps

# ----------------------------------------------------------------------------------------------------
# Conventions


@dataclass(frozen=True)
class Convention:
    """What is counted besides linear layers and the patch convolution. One FLOP is one multiply-add."""
    attention_products: bool  # q k^T and (attention) v
    layer_norm: int  # operations per normalised element
    unpatchify: bool  # half an operation per output value, for moving it from its token to its pixel
    embedder_0_again: bool  # block 0's embedder runs a second time, for the final layer
    pass_at_0: bool  # a sampler of n steps evaluates the model at the final t = 0, too: n + 1 passes
    exact_backward: bool  # a layer whose input is data has no input gradient; else backward is 2 x forward
    pixel_layers_in_training: bool  # the patch convolution and the last projection (tokens to pixels)
    merge: bool  # a sampler multiplies by the dense W_k where that costs less (lowrank.Merged)


# every matrix product and nothing elementwise: half of what torch.utils.flop_counter reports
OURS = Convention(attention_products=True, layer_norm=0, unpatchify=False, embedder_0_again=False, pass_at_0=False,
                  exact_backward=True, pixel_layers_in_training=True, merge=True)
# Worked out from the printed figures, which it reproduces to the last digit. fvcore, the paper's counter
# (D.2), has no rule for fused attention and does count layer norm and the einsum that un-patchifies. Of
# training, both pixel layers left out fit all three figures; the patch convolution alone would give 1.678e18.
PAPER = Convention(attention_products=False, layer_norm=4, unpatchify=True, embedder_0_again=True, pass_at_0=True,
                   exact_backward=False, pixel_layers_in_training=False, merge=False)

# ----------------------------------------------------------------------------------------------------
# Counting


@functools.cache  # the search for an ISO-Compute rank is the only slow part of this file
def _layers(config: Config) -> dict[LinearLayer, int]:
    """{layer: how many are alike}, the blocks being equal; the names that a convention asks for are kept."""
    named = ("embedders.0.time_in", "embedders.0.time_out", "final_out")
    return Counter(layer if layer.name in named else replace(layer, name="") for layer in linear_layers(config))


@functools.cache
def _phi(config: Config) -> dict[int, list[int]]:
    """{r_max: [Phi(0), ..., Phi(T)]}; without a rank schedule Phi is r_max everywhere."""
    schedule = config.rank_schedule()
    ranks = sorted({layer.rank for layer in _layers(config) if layer.rank is not None})
    return {r: schedule.table(r).tolist() if schedule else [r] * (T + 1) for r in ranks}


def channels(config: Config, t: int) -> dict[int, int]:
    """{r_max: Phi(t)}: the channels that a sampler computes at t, and a masked training step whose
    lowest timestep is t."""
    return {r: phi[t] for r, phi in _phi(config).items()}


def products(config: Config, k: dict[int, int] | None = None, convention: Convention = OURS, merge: bool = False,
             k_vectors: dict[int, int] | None = None) -> tuple[int, int]:
    """Multiply-adds for one image: (forward, forward and backward). NA-LR Eq. (6) for each layer.

    k: {r_max: channels computed}; None for all
    merge: layers multiply by the dense W_k where that is less
    k_vectors: the k of layers that see one vector a sample, where it is another (sorted execution)

    In the backward pass a layer makes two products of the
    forward pass's size: the gradients of its weight and of its input.
    """
    d, tokens = config.width, config.tokens
    from_data = 2 if convention.exact_backward else 3  # how often training makes a product whose input is data
    pixels = convention.pixel_layers_in_training
    parts = [(tokens * d * config.channels * config.patch**2, from_data * pixels)]  # patch convolution
    for layer, copies in _layers(config).items():
        runs = 2 if convention.embedder_0_again and layer.name.startswith("embedders.0.") else copies
        k_layer = k_vectors if k_vectors and layer.rows == 1 else k
        r = layer.rank if k is None or layer.rank is None else k_layer[layer.rank]
        dense = r is None or (merge and r * (layer.n + layer.m) > layer.n * layer.m)
        sizes = (layer.n * layer.m,) if dense else (layer.n * r, r * layer.m)  # V^T x, then U h
        if k_vectors and layer.rows > 1 and not dense:
            parts.append((layer.rows * runs * layer.m, 2))  # sorted execution: the bias is a channel; 1 has no gradient
        for i, size in enumerate(sizes):
            in_training = from_data if layer.no_input_grad and i == 0 else 3
            parts.append((layer.rows * runs * size, in_training * (pixels or layer.name != "final_out")))
    if convention.attention_products:
        parts.append((config.depth * 2 * tokens**2 * d, 3))  # of all heads together
    if convention.unpatchify:
        parts.append((config.channels * config.image_size**2 // 2, 3))
    parts.append((convention.layer_norm * (2 * config.depth + 1) * tokens * d, 3))
    return sum(size for size, _ in parts), sum(size * times for size, times in parts)


def forward(config: Config, k: dict[int, int] | None = None, convention: Convention = OURS, merge: bool = False) -> int:
    """Multiply-adds of one forward pass for one image; arguments as `products`."""
    return products(config, k, convention, merge)[0]


def train_step(config: Config, batch_size: int, k: dict[int, int] | None = None, penalty: int = 1,
               convention: Convention = OURS) -> int:
    """Multiply-adds of forward and backward for a batch whose layers compute k[r_max] channels for
    every sample (masks inside them save nothing); k = None for all channels.

    penalty: how many processes compute `lowrank.orthogonality_penalty`, 0 for none. Its Gram matrix costs
    k x k x m for each factor (k, m), and its gradient the same again.
    """
    return batch_size * products(config, k, convention)[1] + penalty * _penalty(config, k)


def _penalty(config: Config, k: dict[int, int] | None) -> int:
    total = 0
    for layer, copies in _layers(config).items():
        if layer.rank is not None:
            r = layer.rank if k is None else k[layer.rank]
            total += copies * 2 * r * r * (layer.n + layer.m)
    return total


@functools.cache
def _sorted_sample(config: Config, t: int, t_low: int) -> int:
    return products(config, channels(config, t), k_vectors=channels(config, t_low))[1]


def sorted_step(config: Config, t: list[int], t_low: int = 1, penalty: int = 1, processes: int = 1) -> int:
    """Multiply-adds of forward and backward for the batch of timesteps t, ascending, in sorted execution:
    every sample computes Phi of its chunk's first t; layers that see one vector a sample, Phi(t_low).

    processes: they share the batch out in turn, and each cuts chunks of its own
    """
    total = penalty * _penalty(config, channels(config, t_low))
    for part in (t[i::processes] for i in range(processes)):
        chunks = chunk_batch(config, part)
        ends = [first for first, *_ in chunks[1:]] + [len(part)]
        total += sum((end - first) * _sorted_sample(config, t_first, t_low)
                     for (first, t_first, _), end in zip(chunks, ends))
    return total


@functools.cache
def sampling(config: Config, steps: int = 100, guidance: bool = False, convention: Convention = OURS) -> int:
    """Multiply-adds of sampling one image, each pass sliced to its Phi(t). NA-LR Eq. (5).

    guidance: classifier-free guidance, two passes a step. Timestep and label layers count for every
    image, though a batch computes them once; `merging` is not included, for all images of a batch share it.
    """
    visited = sampling_timesteps(steps)
    passes = visited if convention.pass_at_0 else visited[:-1]
    equal = Counter(tuple(channels(config, t).items()) for t in passes)  # many timesteps share their ranks
    per_image = sum(n * forward(config, dict(k), convention, convention.merge) for k, n in equal.items())
    return (2 if guidance else 1) * per_image


def merging(config: Config) -> int:
    """Multiply-adds of `lowrank.Merged` in a sampling run of a batch: each layer that ever has more than
    m n / (m + n) channels multiplies its r_max channels once."""
    return sum(copies * layer.n * layer.m * layer.rank for layer, copies in _layers(config).items()
               if layer.rank is not None and layer.rank * (layer.n + layer.m) > layer.n * layer.m)


def training_run(config: Config, steps: int, batch_size: int, stages: list[tuple[int, int]] = (),
                 penalty: bool = True, convention: Convention = OURS, execution: str = "mask") -> int:
    """Multiply-adds of a training run of `steps` steps.

    stages: (number of steps, t_low) of each curriculum stage; a stage computes Phi(t_low) channels. The
    steps that no stage takes have t_low = 1, as the whole run has without a curriculum. Raises ValueError
    when the stages take more than `steps`.
    execution: 'sorted' counts for every step of a stage what its typical batch costs, whose timesteps are
    the middles of `batch_size` equal strata; random batches cost a little more or less.
    """
    rest = steps - sum(n for n, _ in stages)
    if rest < 0:
        raise ValueError(f"the curriculum's stages take {steps - rest} steps of a run of {steps}")
    plan = [*stages, (rest, 1)]
    if execution == "mask" or config.rank_schedule() is None:
        return sum(n * train_step(config, batch_size, channels(config, t_low), penalty, convention)
                   for n, t_low in plan)
    curriculum, total = Curriculum(sorted(t_low for _, t_low in plan), T, steps), 0
    for curriculum.stage, (n, t_low) in enumerate(plan):
        middles = (torch.arange(batch_size, dtype=torch.float64) + 0.5) / batch_size
        t = torch.searchsorted(curriculum.probabilities().cumsum(0), middles).clamp(max=T)
        total += n * sorted_step(config, t.tolist(), t_low, penalty)
    return total


@functools.cache
def longest_curriculum(steps: int, groups: int = 10, share: float = 0.4) -> list[tuple[int, int]]:
    """The stages of a run whose groups of timesteps all come as late as curriculum.py allows, for
    `training_run`: no loss reaches a plateau before. groups: 0 or 1 for none. Raises ValueError for
    groups or a share that no curriculum can have."""
    if not 0 <= share <= 1:
        raise ValueError(f"curriculum share {share} must lie in [0, 1]")
    if groups in (0, 1):
        return []
    starts = cluster_timesteps(NoiseSchedule().log_snr, groups)
    begins = [math.ceil(share * steps * j / (groups - 1)) for j in range(groups)]
    return [(end - begin, t_low) for begin, end, t_low in zip(begins, begins[1:], reversed(starts))]


# ----------------------------------------------------------------------------------------------------
# The paper's tables. What is printed there stands in PRINTED, and nothing is computed from it.

# tables, model, image size, method, keep, GFLOPs of "100 DDIM steps", parameters in 10^6, training FLOPs in 10^18
PRINTED = (
    ("1 2 3", "DiT-S/2", 32, "full", None, 551.674, 39.80, 1.677),
    ("1 2 3", "DiT-S/2", 32, "static", 0.75, 421.256, 31.34, 1.281),
    ("1 2 3", "DiT-S/2", 32, "iso-compute", 0.75, 421.159, 37.60, 1.369),
    ("1 2 3", "DiT-S/2", 32, "iso-param", 0.75, 343.214, 31.34, 1.149),
    ("2 3", "DiT-S/2", 32, "static", 0.5, 291.060, 22.94, None),
    ("2 3", "DiT-S/2", 32, "iso-compute", 0.5, 290.754, 27.12, None),
    ("2 3", "DiT-S/2", 32, "iso-param", 0.5, 238.572, 22.94, None),
    ("2 3", "DiT-S/2", 32, "static", 0.25, 160.865, 14.53, None),
    ("2 3", "DiT-S/2", 32, "iso-compute", 0.25, 160.974, 16.69, None),
    ("2 3", "DiT-S/2", 32, "iso-param", 0.25, 134.335, 14.53, None),
    ("4 6 7", "DiT-S/2", 64, "full", None, 2202.420, 39.80, 6.696),
    ("4", "DiT-S/2", 64, "static", 0.75, 1681.805, 31.34, None),
    ("4", "DiT-S/2", 64, "iso-compute", 0.75, 1681.451, 37.60, None),
    ("4", "DiT-S/2", 64, "iso-param", 0.75, 1269.420, 31.34, None),
    ("4", "DiT-S/2", 64, "static", 0.5, 1162.066, 22.94, None),
    ("4 6 7", "DiT-S/2", 64, "iso-compute", 0.5, 1161.756, 27.12, 3.723),
    ("4 6 7", "DiT-S/2", 64, "iso-param", 0.5, 887.041, 22.94, 3.110),
    ("6 7", "DiT-S/2", 64, "compression", 0.5, 1162.066, 22.94, 7.097),
    ("4", "DiT-S/2", 64, "static", 0.25, 642.328, 14.53, None),
    ("4", "DiT-S/2", 64, "iso-compute", 0.25, 642.108, 16.69, None),
    ("4", "DiT-S/2", 64, "iso-param", 0.25, 503.332, 14.53, None),
    ("8", "DiT-B/2", 32, "full", None, 2203.974, 147.42, None),
    ("8", "DiT-B/2", 32, "iso-compute", 0.5, 1162.366, 105.00, None),
    ("B.4", "DiT-S/2", 32, "static", 0.1, None, None, None),
)

NOTES = """
Adaptive rows do not follow from the schedule that the paper states (rho_min 0.4, k 8, m 0.5, gamma 0.1): its
  ISO-Param savings mean an average active rank of 0.80 r_max at 32x32 and 0.73 at 64x64, where that schedule
  averages 0.70, and its ISO-Compute parameters mean r_max = 1.25 r_base, where that schedule needs 1.42. When
  its groups of timesteps came is not printed: here all come as late as curriculum.py allows, over 40 % of the steps.
Table 5 repeats figures of other rows: beside the FIDs of ISO-Param stand the GFLOPs and parameters of the static
  models (with curriculum) and of ISO-Compute (NC).
Table 7, compression: full-rank training, then 200,000 steps of a static student (three passes) with its full-rank
  teacher (one). The printed sum is smaller and does not decode.
Table 8 is called ImageNet-128 on latents; its full-rank row is DiT-B/2 on 32x32x3."""


def paper_rows() -> list[dict]:
    """Every row of PRINTED beside what the paper's accounting gives: GFLOPs of 100 DDIM steps for one
    image, parameters, training FLOPs of 800,000 steps of 128 images (None where the paper does not say
    how long it trained). The models have 1,000 classes even for CIFAR-10."""
    steps, batch = 800_000, 128  # D.1, E.1, E.2
    run = functools.partial(training_run, batch_size=batch, penalty=False, convention=PAPER)
    rows = []
    for tables, model, size, method, keep, gflops, params, train in PRINTED:
        full = Config(**PRESETS[model], image_size=size, num_classes=1000, method="full")
        if method == "compression":  # E.2
            config, tuning = replace(full, method="static", keep=keep), 200_000
            spent = run(full, steps) + run(config, tuning) + tuning * batch * forward(full, None, PAPER)
        else:
            config = replace(full, method=method, keep=keep or 1.0)
            spent = run(config, steps, stages=longest_curriculum(steps) if method.startswith("iso") else ())
        rows.append(dict(table=tables, model=model, image_size=size, method=method, keep=keep,
                         gflops=sampling(config, 100, convention=PAPER) / 1e9, paper_gflops=gflops,
                         params=parameter_count(config), paper_params=params and round(params * 1e6),
                         train_flops=None if tables in ("8", "B.4") else spent,
                         paper_train_flops=train and round(train * 1e18)))
    return rows


def one_row_a_table(rows: list[dict]) -> list[dict]:
    """The rows as each table prints them: Table 7 has training FLOPs alone, Table 1 has them too."""
    blank = {"1": (), "7": ("paper_gflops", "paper_params")}
    return [row | {"table": table} | dict.fromkeys(blank.get(table, ("paper_train_flops",)))
            for table in sorted({t for row in rows for t in row["table"].split()})
            for row in rows if table in row["table"].split()]


def print_paper(rows: list[dict]) -> None:
    columns = (("gflops", 1, 3, "GFLOPs"), ("params", 1e6, 2, "params, M"), ("train_flops", 1e18, 3, "train, 1e18"))
    print(f"{'tables':7}{'model':9}{'size':6}{'method':16}"
          + "".join(f"{title:>13}{'paper':>10}{'ratio':>7}" for *_, title in columns))
    for row in rows:
        method = row["method"] + (f" {row['keep']:.0%}" if row["keep"] else "")
        line = f"{row['table']:7}{row['model']:9}{row['image_size']:<6}{method:16}"
        for key, scale, digits, _ in columns:
            ours, theirs = row[key], row["paper_" + key]
            line += " " * 13 if ours is None else f"{ours / scale:13.{digits}f}"
            line += " " * 17 if theirs is None else f"{theirs / scale:10.{digits}f}{ours / theirs:7.3f}"
        print(line.rstrip())
    params, gflops = (rows[-1][key] / rows[0][key] for key in ("params", "gflops"))
    print(f"{NOTES}\nB.4: {params:.1%} of the parameters and {gflops:.1%} of the FLOPs of full rank; "
          "the paper says 24% and 15%.")


# ----------------------------------------------------------------------------------------------------
# A model or a run beside its siblings, in our accounting


def read_run(folder: Path) -> tuple[Config, dict, int, int]:
    """(model, training settings, steps done, multiply-adds spent) of a run folder. Raises InputError."""
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_bytes())
        config, kinds = Config(**saved["model"]), dict(steps=int, batch_size=int, orthogonality=float)
        train = {key: kind(saved["train"][key]) for key, kind in kinds.items()}
        path = folder / "metrics.jsonl"
        complete = path.read_bytes().split(b"\n")[:-1]  # a kill may have cut off what follows the last newline
        line = json.loads(complete[-1]) if complete else {"step": 0, "flops": 0}
        done, spent = int(line["step"]), int(line["flops"])
    except OSError:
        raise InputError(f"cannot read {path}; give the folder of a run that train.py has written") from None
    except (ValueError, TypeError, KeyError, OverflowError) as error:  # OverflowError: int(Infinity)
        raise InputError(f"{path} is not as train.py writes it ({error!r})") from None
    if min(done, spent) < 1:
        raise InputError(f"{path} has no complete line yet; wait until the run has logged its first steps")
    train["rank_execution"] = saved["train"].get("rank_execution", "mask")
    return config, train, done, spent


def compare(config: Config, steps: int, batch_size: int, penalty: bool, sampling_steps: int,
            training: int, execution: str) -> list[dict]:
    """The model and what it is measured against: parameters, multiply-adds of a forward pass with all
    channels, of sampling an image without and with guidance (None if unconditional), of training for
    `steps` steps. `training` is that of the model itself, with its curriculum."""
    models = {"this model": config}
    if config.method.startswith("iso"):
        models |= {"masked": config} if execution == "sorted" else {}  # neither sorted nor with a curriculum
        models |= {"no curriculum": config, "static": replace(config, method="static")}
    if config.method != "full":
        models["full"] = replace(config, method="full")
    rows = []
    for name, c in models.items():
        guided = sampling(c, sampling_steps, guidance=True) if c.num_classes else None
        how = "mask" if name == "masked" else execution
        spent = training_run(c, steps, batch_size, penalty=penalty, execution=how) if rows else training
        rows.append(dict(name=name, params=parameter_count(c), forward=forward(c), sampling=sampling(c, sampling_steps),
                         sampling_guided=guided, training=spent))
    for row in rows:  # what the model itself saves against this row
        row["sampling_saved"], row["training_saved"] = (1 - rows[0][key] / row[key] for key in ("sampling", "training"))
    return rows


def amount(n: int | None) -> str:
    """1.234 G and the like; - for None."""
    scale, unit = next(((s, u) for s, u in zip((1e18, 1e15, 1e12, 1e9, 1e6), "EPTGM") if (n or 0) >= s), (1e3, "k"))
    return "-" if n is None else f"{n / scale:.4g} {unit}"


def print_comparison(rows: list[dict], steps: int, sampling_steps: int) -> None:
    print(f"\n{'multiply-adds':15}{'parameters':>11}{'forward':>10}{f'{sampling_steps} steps':>12}{'saved':>8}"
          f"{'guided':>10}{f'{steps:,} training steps':>26}{'saved':>8}")
    for row in rows:
        n = {key: amount(value) for key, value in row.items() if key != "name"}
        for key in ("sampling_saved", "training_saved"):
            n[key] = f"{row[key]:.1%}" if row is not rows[0] else ""
        print(f"{row['name']:15}{n['params']:>11}{n['forward']:>10}{n['sampling']:>12}{n['sampling_saved']:>8}"
              f"{n['sampling_guided']:>10}{n['training']:>26}{n['training_saved']:>8}".rstrip())


CHART_T = [*range(T, 0, -T // 20), 1]


def chart(config: Config, name: str | None) -> list[str]:
    """Lines over t: the active rank of one layer (None: the one of the largest rank), and the
    multiply-adds of a forward pass. Raises InputError for a layer that is not there or has no rank."""
    low_rank = {layer.name: layer for layer in linear_layers(config) if layer.rank is not None}
    if name is not None and name not in low_rank:
        raise InputError(f"--layer {name} is not a low-rank layer of this model; its layers are "
                         + (f"{', '.join(list(low_rank)[:9])}, ..." if low_rank else "all dense"))
    if config.rank_schedule() is None:
        return [f"every t costs the same: {amount(forward(config))} multiply-adds a forward pass"]
    layer = low_rank[name] if name else max(low_rank.values(), key=lambda layer: layer.rank)
    lines = [f"   t  {f'active rank of {layer.name}, of {layer.rank}':37}  multiply-adds of a sampler's pass"]
    for t in CHART_T:
        k, cost = channels(config, t)[layer.rank], forward(config, channels(config, t), merge=True)
        rank_bar, cost_bar = ("#" * round(24 * share) for share in (k / layer.rank, cost / forward(config)))
        lines.append(f"{t:4d}  {rank_bar:.<24} {k:5d} {k / layer.rank:5.0%}   {cost_bar:.<24} {amount(cost):>9}")
    return lines


# ----------------------------------------------------------------------------------------------------
# The script


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same figures as JSON")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--paper", action="store_true", help="the paper's tables; the flags below do not matter then")
    what.add_argument("--run", type=Path, metavar="DIR", help="a run folder; its config.json replaces the flags below")
    add_model_flags(parser)
    add = parser.add_argument_group("data, training and sampling (defaults in brackets: tiny, DiT-*)").add_argument
    add("--image-size", type=positive_int, metavar="N", help="[16, 32]")
    add("--channels", type=positive_int, metavar="N", help="of an image [3]")
    add("--steps", type=positive_int, metavar="N", help="of training [3000, 800000]")
    add("--batch-size", type=positive_int, metavar="N", help="[64, 128]")
    add("--orthogonality", type=float, default=1e-4, metavar="F", help="0 leaves the penalty out [1e-4]")
    add("--curriculum-groups", type=int, metavar="N", help="0 = off [10 for iso-*, else 0]")
    add("--curriculum-share", type=float, metavar="F", help="of the steps, over which the groups come [0.2, 0.4]")
    add("--rank-execution", choices=("mask", "sorted"), help="how training runs the masks [mask, sorted]")
    add("--sampling-steps", type=positive_int, default=100, metavar="N", help="also with --run [100]")
    add("--layer", metavar="NAME", help="whose rank the chart shows, e.g. blocks.0.q; also with --run")
    args = parser.parse_args()

    if args.paper:
        rows = paper_rows()
        print(json.dumps(one_row_a_table(rows), indent=1, allow_nan=False)) if args.json else print_paper(rows)
        return
    if args.run:
        config, train, steps, spent = read_run(args.run)
        batch, penalty, execution = train["batch_size"], train["orthogonality"] > 0, train["rank_execution"]
        title = f"{args.run}: {steps:,} of {train['steps']:,} steps done, {amount(spent)} multiply-adds spent"
    if not args.orthogonality >= 0:
        parser.error(f"orthogonality {args.orthogonality} must not be negative")
    try:
        if not args.run:
            tiny = args.model in (None, "tiny")
            config = config_from_flags(args, "tiny", image_size=16 if tiny else 32, num_classes=10)
            defaults = TRAINING["tiny" if tiny else "DiT"]
            steps, batch, share = (defaults[name] for name in ("steps", "batch_size", "curriculum_share"))
            steps, batch, groups = args.steps or steps, args.batch_size or batch, args.curriculum_groups
            groups = 10 * config.method.startswith("iso") if groups is None else groups
            share = share if args.curriculum_share is None else args.curriculum_share
            stages, penalty = longest_curriculum(steps, groups, share), args.orthogonality > 0
            execution = args.rank_execution or defaults["rank_execution"]
            spent = training_run(config, steps, batch, stages, penalty, execution=execution)
            keep = "" if config.method == "full" else f" keep {config.keep:g}"
            title = f"{args.model or 'tiny'}, {config.method}{keep}"
        rows = compare(config, steps, batch, penalty, args.sampling_steps, spent, execution)
    except ValueError as error:
        parser.error(str(error))
    picture = chart(config, args.layer)
    if args.json:
        by_t = [dict(t=t, channels=channels(config, t), forward=forward(config, channels(config, t), merge=True))
                for t in CHART_T]
        print(json.dumps(dict(run=args.run and str(args.run), config=asdict(config), steps=steps, batch_size=batch,
                              penalty=penalty, rank_execution=execution, merging=merging(config),
                              sampling_steps=args.sampling_steps, models=rows, by_t=by_t), indent=1))
        return
    print(f"{title}; {config.channels}x{config.image_size}x{config.image_size}, {config.num_classes} classes")
    for line in rank_summary(config):
        print(line)
    if merging(config):
        print(f"sampling merges the layers above m n / (m + n), for {amount(merging(config))} multiply-adds a batch")
    print_comparison(rows, steps, args.sampling_steps)
    print("", *picture, sep="\n")


if __name__ == "__main__":
    run_script(main)
