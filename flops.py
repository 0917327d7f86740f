"""Multiply-adds and parameters from shapes alone.

NA-LR Eq. (6). No model is built and no GPU is asked: every figure follows from `linear_layers` (model.py) and
Phi(t) (schedule.py). We count every matrix product, attention's two included, and nothing elementwise, which
is half of what torch.utils.flop_counter reports. Slices count as 1 unless given, whatever --help says;
the defaults named there are those of DiT-*, and `train.py --help` has those of tiny. Read model.py and
curriculum.py before.

    python flops.py                            the model of `python train.py`: forward, sampling, training
    python flops.py --model DiT-S/2 --method iso-param --keep 0.75
    python flops.py --paper                    the published figures beside ours (experiments/paper_tables.py)
"""

import bisect
import functools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from curriculum import Curriculum, cluster_timesteps, latest_introduction
from model import Config, linear_layers, parameter_count, preset_config, summary
from schedule import T, NoiseSchedule, Shares, channels_of, elastic_shares, sampling_timesteps
from script import Parser, add_flags, positive_int, run_script

# ----------------------------------------------------------------------------------------------------
# One image


class Product(NamedTuple):
    """A matrix product of the forward pass: which layer's, its multiply-adds for one image, and how many
    products of this size forward and backward make together. The backward pass has two, the gradients of the
    weight and of the input; only one where the input is data."""
    layer: str
    size: int
    in_training: int


def products(config: Config, k: dict[int, int] | None = None) -> list[Product]:
    """Every matrix product of one forward pass. k: {r_max: channels computed}; None for all."""
    d, tokens = config.width, config.tokens
    found = [Product("patchify", tokens * d * config.channels * config.patch**2, 2)]
    for layer in linear_layers(config):
        if layer.rank is None:
            sizes = [layer.n * layer.m]
        else:
            r = layer.rank if k is None else k[layer.rank]
            sizes = [layer.n * r, r * layer.m]  # V^T x, then U h: Eq. (6)
        for i, size in enumerate(sizes):
            from_data = layer.no_input_grad and i == 0
            found.append(Product(layer.name, layer.rows * size, 2 if from_data else 3))
    # q k^T and (attention) v, of all heads and blocks
    found.append(Product("attention", config.depth * 2 * tokens**2 * d, 3))
    return found


@functools.cache
def _channels(config: Config) -> dict[int, list[int]]:
    """{r_max: [Phi(0), ..., Phi(T)]}; without a rank schedule Phi is r_max everywhere."""
    schedule = config.rank_schedule()
    ranks = sorted({layer.rank for layer in linear_layers(config) if layer.rank is not None})
    return {r: schedule.table(r).tolist() if schedule else [r] * (T + 1) for r in ranks}


def active_channels(config: Config, *t: int, share: float = 1.0) -> dict[int, int]:
    """{r_max: channels computed}: by a sampler at t, by a slice of a batch with these t, or in a stage of the
    curriculum, of all its t; never more than `share` of r_max."""
    return {r: min(max(phi[i] for i in t), channels_of(share, r)) for r, phi in _channels(config).items()}


@functools.lru_cache(10_000)
def _cost(config: Config, *k: int) -> tuple[int, int]:
    """Multiply-adds of one image with k channels for each r_max: (forward pass, forward and backward)."""
    found = products(config, dict(zip(_channels(config), k)))
    return sum(p.size for p in found), sum(p.size * p.in_training for p in found)


def one_image(config: Config, *t: int, share: float = 1.0) -> tuple[int, int]:
    """Multiply-adds of one image with these `active_channels`: (forward pass, forward and backward pass)."""
    return _cost(config, *active_channels(config, *t, share=share).values())


def sampling(config: Config, steps: int = 100, guidance: float = 1.0, shares: Shares = Shares(),
             labelled: bool = True, sampler: str = "ddim") -> int:
    """Multiply-adds of sampling one image, each pass sliced to its Phi(t). NA-LR Eq. (5).

    Which passes guidance makes, `Shares.passes` says. sampler: heun looks at the end of its steps, too, but
    for the first and the last one.
    """
    total, visited = 0, sampling_timesteps(steps)
    for t in visited[:-1] + (visited[2:-1] if sampler == "heun" else []):
        passes = shares.passes(t, guidance, labelled)
        total += sum(one_image(config, t, share=share)[0] for share in passes if share is not None)
    return total


def budget_share(config: Config, budget: float) -> float:
    """The largest share of the channels whose forward pass takes at most `budget` times the multiply-adds of
    all channels. Cost grows in steps, where share * r_max passes a whole number for some r_max; the largest
    share on a step is j / r_max: these are searched. Raises ValueError if not even the first one fits."""
    # t = 1 stands for any t: an elastic model has no rank schedule
    allowed = budget * one_image(config, 1)[0] * (1 + 1e-12)  # a budget may be the rounded ratio of two costs
    steps = sorted({j / r for r in _channels(config) for j in range(1, r + 1)})
    fitting = bisect.bisect_right(steps, allowed, key=lambda share: one_image(config, 1, share=share)[0])
    if not fitting:
        raise ValueError(f"a budget of {budget:g} does not even pay for one channel in every layer")
    return steps[fitting - 1]


# ----------------------------------------------------------------------------------------------------
# Training


@functools.cache  # asked at every step of a training
def penalty_step(config: Config, t_low: int = 1) -> int:
    """Multiply-adds of `lowrank.orthogonality_penalty` over the channels from t_low up: for each factor
    (k, m) the Gram matrix costs k k m, and the gradient two such products."""
    k = active_channels(config, *range(t_low, T + 1))
    return sum(3 * k[layer.rank] ** 2 * (layer.n + layer.m) for layer in linear_layers(config) if layer.rank)


def train_step(config: Config, t: list[int], slices: int = 1, t_low: int = 1, penalty: bool = True,
               processes: int = 1, share: torch.Tensor | None = None, distil: bool = False) -> int:
    """Multiply-adds of a training step on the timesteps t, in the order of the batch. Every slice computes
    for all its samples the channels that its neediest one uses; masks inside it save nothing.

    t_low: the lowest timestep of the curriculum's stage, for the penalty
    processes: they share the batch out in turns; each cuts slices of its own and computes the penalty
    share: of the channels, for each sample of an elastic model (B,)
    distil: samples that drew less than all channels pass forward once more, with all of them
    """
    total = processes * penalty_step(config, t_low) if penalty else 0
    share = [1.0] * len(t) if share is None else share.tolist()
    for process in range(processes):
        rows = torch.arange(process, len(t), processes)
        for part in rows.tensor_split(min(slices, len(rows))):
            part = part.tolist()
            needed = max(share[i] for i in part)
            total += len(part) * one_image(config, *(t[i] for i in part), share=needed)[1]
    if distil:
        total += sum(x < 1 for x in share) * one_image(config, 1)[0]
    return total


def training_run(config: Config, steps: int, batch_size: int, stages: list[tuple[int, int]] = (),
                 penalty: bool = True, slices: int = 1, distil: bool = False) -> int:
    """Multiply-adds of a run of `steps` steps, each counted by a typical batch: its timesteps (and shares, if
    elastic) are the middles of `batch_size` equal strata; random batches cost a little more or less.

    stages: (number of steps, t_low) of each curriculum stage; the steps that no stage takes have t_low = 1,
    as the whole run has without a curriculum. Raises ValueError when the stages take more than `steps`."""
    rest = steps - sum(n for n, _ in stages)
    if rest < 0:
        raise ValueError(f"the curriculum's stages take {steps - rest} steps of a run of {steps}")
    plan = [*stages, (rest, 1)]
    curriculum, total = Curriculum(sorted(t_low for _, t_low in plan), T, steps), 0
    middles = (torch.arange(batch_size, dtype=torch.float64) + 0.5) / batch_size
    share = elastic_shares(batch_size, config.rho_min) if config.method == "elastic" else None
    for stage, (n, t_low) in enumerate(plan):
        curriculum.stage = stage
        t = torch.searchsorted(curriculum.probabilities().cumsum(0), middles).clamp(max=T).tolist()
        t.sort(key=lambda i: -sum(active_channels(config, i).values()))  # by falling rank, as a batch is
        total += n * train_step(config, t, slices, t_low, penalty, 1, share, distil)
    return total


def longest_curriculum(steps: int, groups: int, share: float, noise: str = "cosine") -> list[tuple[int, int]]:
    """The stages of a run whose groups of timesteps all come as late as curriculum.py allows, for
    `training_run`: no loss reaches a plateau before. groups: 0 or 1 for none."""
    if groups in (0, 1):
        return []
    starts = cluster_timesteps(NoiseSchedule(noise).log_snr, groups)
    if share == 1:  # without a limit, no group need ever follow the first
        return [(steps, starts[-1])]
    begins = [latest_introduction(share, steps, j, groups - 1) for j in range(groups)]
    return [(end - begin, t_low) for begin, end, t_low in zip(begins, begins[1:], reversed(starts))]


# ----------------------------------------------------------------------------------------------------
# The script: a model or a run beside its siblings


def compare(config: Config, s, sampling_steps: int) -> list[dict]:
    """The model and what it is measured against: parameters, multiply-adds of a forward pass with all
    channels, of sampling an image without and with guidance (None if unconditional), of training by the
    settings s (train.py): the model itself with its slices and its curriculum, the others without."""
    stages = longest_curriculum(s.steps, s.curriculum_groups, s.curriculum_share, config.noise)
    own = dict(stages=stages, slices=s.slices or 1, distil=s.distil > 0)
    models = {"this model": config}
    if config.method.startswith("iso"):
        models |= {"only masked": config, "static": replace(config, method="static")}
    if config.method != "full":
        models["full"] = replace(config, method="full")
    rows = []
    for name, c in models.items():
        how = own if name == "this model" else {}
        training = training_run(c, s.steps, s.batch_size, penalty=s.orthogonality > 0, **how)
        guided = sampling(c, sampling_steps, guidance=2.0) if c.num_classes else None
        rows.append(dict(name=name, params=parameter_count(c), forward=sum(p.size for p in products(c)),
                         sampling=sampling(c, sampling_steps), sampling_guided=guided, training=training))
    return rows


def amount(n: int) -> str:
    """1.234 G and the like."""
    units = {1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}
    scale = next((scale for scale in units if n >= scale), 1e3)
    return f"{n / scale:.4g} {units[scale]}"


def print_comparison(rows: list[dict], steps: int, sampling_steps: int) -> None:
    """Saved is what the model itself, in the first row, saves against a row."""
    print(f"\n{'multiply-adds':15}{'parameters':>11}{'forward':>10}{f'{sampling_steps} steps':>12}"
          f"{'saved':>8}{'guided':>10}{f'{steps:,} training steps':>26}{'saved':>8}")
    for row in rows:
        n = {key: amount(value) if value else "-" for key, value in row.items() if key != "name"}
        saved = {key: f"{1 - rows[0][key] / row[key]:.1%}" for key in ("sampling", "training")}
        print(f"{row['name']:15}{n['params']:>11}{n['forward']:>10}{n['sampling']:>12}{saved['sampling']:>8}"
              f"{n['sampling_guided']:>10}{n['training']:>26}{saved['training']:>8}")


def main():
    from train import Settings, choose_settings  # here, because train.py imports this file

    parser = Parser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same figures as JSON")
    parser.add_argument("--paper", action="store_true", help="the paper's tables, whatever else is given")
    parser.add_argument("--sampling-steps", type=positive_int, default=100, metavar="N", help="(default 100)")
    add_flags(parser.add_argument_group("model"), Config)
    add_flags(parser.add_argument_group("training"), Settings, only=(
        "model", "image_size", "steps", "batch_size", "orthogonality", "curriculum_groups",
        "curriculum_share", "slices", "distil"))
    args = parser.parse_args()

    if args.paper:
        sys.path.append(str(Path(__file__).resolve().parent / "experiments"))
        import paper_tables
        return paper_tables.show(args.json)
    try:
        given = {name: value for name, value in vars(args).items() if value is not None}
        s = choose_settings(given)
        config = preset_config(s.model, given, image_size=16 if s.model == "tiny" else 32)
        rows = compare(config, s, args.sampling_steps)
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        settings = dict(steps=s.steps, batch_size=s.batch_size, slices=s.slices or 1,
                        penalty=s.orthogonality > 0, sampling_steps=args.sampling_steps)
        print(json.dumps(dict(config=asdict(config), **settings, models=rows), indent=1))
        return
    size = f"{config.channels}x{config.image_size}x{config.image_size}"
    print(f"{size}, {config.num_classes} classes; {s.model}, {summary(config)}")
    print_comparison(rows, s.steps, args.sampling_steps)


if __name__ == "__main__":
    run_script(main)
