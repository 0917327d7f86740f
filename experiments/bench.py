"""Does time follow the multiply-adds? Training steps and sampling, timed side by side.

    python experiments/bench.py                                     DiT-S/2, batch 32: half an hour on two CPU cores
    python experiments/bench.py --device cuda --batch-size 128 1024 --compile          and on a GPU
    python experiments/bench.py --model tiny --repetitions 5 --passes 1                a first look, in a minute

On a shared machine a time means little, and a ratio of two times taken far apart means little more. So all
variants take turns in one process, and every figure is a median over the turns; ratios are medians of the
ratios within a turn. The peak is that of a large matrix product in the same data type, timed in the same turns.

Training (one step of train.py: forward, backward, orthogonality penalty, AdamW, EMA):
    full      dense
    static    --method static
    r_max     the iso-compute model with all its channels for every sample: static at the rank of the next two
    masked    iso-compute, --slices 1
    slices    iso-compute, --slices N
Sampling (DDIM, no guidance): full, static, iso-compute and iso-param, sliced as sample.py does it.
Multiply-adds are those of flops.py: every matrix product, nothing elementwise.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import flops
import plot
import train
from curriculum import Curriculum
from model import PRESETS, Config, DiT
from sample import guided
from schedule import T, sampling_timesteps
from script import (DTYPES, InputError, Parser, end_progress, pick_device, pick_dtype, positive_int, run_script,
                    show_progress)


def timed(work, device: torch.device) -> float:
    """Seconds that work() takes, the device's part included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def wake(model: DiT) -> DiT:
    """Makes gradients flow everywhere: at first adaLN-Zero keeps most of them zero."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


class Peak:
    """Multiply-adds a second of one large square matrix product; `rate` is the median of all measurements."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.n, self.device, self.rates = 8192 if device.type == "cuda" else 2048, device, []
        self.a, self.b = (torch.randn(self.n, self.n, device=device, dtype=dtype) for _ in range(2))

    def measure(self):
        self.rates.append(self.n**3 / timed(lambda: self.a @ self.b, self.device))

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


class Training:
    """The steps of one model as train.py takes them, on fixed random images."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype, compiled: bool, batch: int):
        self.settings = train.choose_settings(dict(batch_size=batch, dataset="none", curriculum_groups=0))
        self.state, self.dtype = train.State(self.settings, config, device), dtype
        self.net = torch.compile(wake(self.state.model)) if compiled else wake(self.state.model)
        self.x_0, self.eps = (torch.randn(batch, config.channels, config.image_size, config.image_size, device=device)
                              for _ in range(2))
        self.y = torch.randint(0, config.num_classes, (batch,), device=device)

    def step(self, t: torch.Tensor, slices: int):
        """t (B,) on the host, ascending."""
        batch = train.Batch(self.x_0, self.y, self.eps, t)
        train.train_step(self.net, self.state, batch, self.settings, slices, self.dtype)
        train.update_ema(self.state, self.settings)


def summary(times: dict[str, list[float]], macs: dict[str, list[int]], images: int, peak: Peak) -> list[dict]:
    """A row per variant; times and multiply-adds of the turns, in order."""
    reference = next(iter(times))
    rows = []
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine, times[reference])]
        rows.append({"variant": name, "seconds": statistics.median(mine), "images/s": images / statistics.median(mine),
                     f"time / {reference}": statistics.median(ratios),
                     f"multiply-adds / {reference}": sum(macs[name]) / sum(macs[reference]),
                     "of peak": statistics.median(m / s for m, s in zip(macs[name], mine)) / peak.rate})
    return rows


def bench_training(configs: dict[str, Config], batch: int, device, dtype, compiled: bool, repetitions: int,
                   slices: int, peak: Peak) -> dict:
    models = {name: Training(config, device, dtype, compiled, batch) for name, config in configs.items()
              if name != "iso-param"}
    models["r_max"] = Training(configs["iso-compute"], device, dtype, compiled, batch)
    models["r_max"].state.model.rank_schedule = None  # then every sample uses all channels
    variants = {"full": ("full", 1), "static": ("static", 1), "r_max": ("r_max", 1), "masked": ("iso-compute", 1),
                "slices": ("iso-compute", slices)}
    times, macs = {name: [] for name in variants}, {name: [] for name in variants}
    curriculum, rng = Curriculum([1], T, 1), torch.Generator().manual_seed(0)
    for turn in range(-2, repetitions):  # the first two warm up
        t = curriculum.sample(batch, rng)
        order = list(variants)
        for name in order[turn % len(order):] + order[:turn % len(order)]:  # nobody always goes first
            model, n = variants[name]
            seconds = timed(lambda: models[model].step(t, n), device)
            if turn >= 0:
                times[name].append(seconds)
                low = [1] * batch if name == "r_max" else t.tolist()
                macs[name].append(flops.train_step(models[model].state.model.config, low, n))
        if turn >= 0:
            peak.measure()
        show_progress(f"training, batch {batch}: turn {max(0, turn + 1)} of {repetitions}")
    end_progress()
    against = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b]))
    return {"rows": summary(times, macs, batch, peak), "slices / masked": against("slices", "masked"),
            "masked / r_max": against("masked", "r_max"), "turns": repetitions, "slices": slices}


@torch.no_grad()
def bench_sampling(configs: dict[str, Config], batch: int, device, dtype, compiled: bool, passes: int, steps: int,
                   peak: Peak) -> dict:
    """Every timestep is a turn; of the `passes` through all of them, each timestep's median counts."""
    models = {name: wake(DiT(config).to(device)).eval() for name, config in configs.items()}
    if compiled:
        models = {name: torch.compile(model) for name, model in models.items()}
    config, visited = configs["full"], sampling_timesteps(steps)[:-1]
    x = torch.randn(batch, config.channels, config.image_size, config.image_size, device=device)
    y = torch.randint(0, config.num_classes, (batch,), device=device)
    seconds = {name: [[] for _ in visited] for name in models}
    for turn in range(passes + 1):  # the first one warms up
        output = {name: guided(model, y, 1.0) for name, model in models.items()}
        for i, t in enumerate(visited if turn else visited[::10]):
            names = list(models)
            for name in names[i % len(names):] + names[:i % len(names)]:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    spent = timed(lambda: output[name](x, t), device)
                if turn:
                    seconds[name][i].append(spent)
        if turn:
            peak.measure()
        show_progress(f"sampling, batch {batch}: pass {turn} of {passes}")
    end_progress()
    whole = {name: [sum(statistics.median(each) for each in per_t)] for name, per_t in seconds.items()}
    macs = {name: [batch * flops.sampling(configs[name], steps)] for name in whole}
    ratio = lambda a, b, of: of[a][0] / of[b][0]
    return {"rows": summary(whole, macs, batch, peak), "passes": passes, "steps": steps,
            "iso-param / static": ratio("iso-param", "static", whole),
            "iso-param / static, multiply-adds": ratio("iso-param", "static", macs)}


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=PRESETS, default="DiT-S/2", metavar="NAME", help="a preset of model.py (default DiT-S/2)")
    add("--keep", type=float, default=0.5, metavar="P", help="kept share of the parameters (default 0.5)")
    add("--image-size", type=positive_int, default=32, metavar="N")
    add("--rank-multiple", type=int, default=1, metavar="N", help="round active ranks up to a multiple (default 1)")
    add("--batch-size", type=positive_int, nargs="+", default=[32], metavar="N", help="of training (default 32)")
    add("--sampling-batch", type=positive_int, default=8, metavar="N", help="images sampled at a time (default 8)")
    add("--sampling-steps", type=positive_int, default=100, metavar="N")
    add("--repetitions", type=positive_int, default=15, metavar="N", help="turns of training steps (default 15)")
    add("--passes", type=positive_int, default=5, metavar="N", help="passes through the sampling steps (default 5)")
    add("--slices", type=positive_int, default=4, metavar="N", help="of the variant with slices (default 4)")
    add("--only", choices=("training", "sampling"))
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=DTYPES,
        help="of the matrix products (default bfloat16 on CUDA, else float32)")
    add("--compile", action="store_true", help="torch.compile the models")
    add("--out", type=Path, metavar="FILE.json", help="also write the figures there")
    args = parser.parse_args()
    if args.sampling_steps > T:
        parser.error(f"--sampling-steps {args.sampling_steps}: a sampler takes 1 to {T}")
    device = pick_device(args.device)
    if device.type == "mps":
        raise InputError("times on mps are not supported; use --device cpu")
    dtype = pick_dtype(args.dtype, device)
    try:
        full = Config(**PRESETS[args.model], image_size=args.image_size, method="full",
                      rank_multiple=args.rank_multiple)
        configs = {"full": full} | {method: replace(full, method=method, keep=args.keep)
                                    for method in ("static", "iso-compute", "iso-param")}
    except ValueError as error:
        parser.error(str(error))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    where = f"{name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}" + ", compiled" * args.compile
    size, today = f"{args.image_size}x{args.image_size}", time.strftime("%Y-%m-%d")
    print(f"{args.model}, keep {args.keep:g}, {size}; {where}; {today}")
    results = {"model": args.model, "keep": args.keep, "where": where, "training": {}, "sampling": {}}
    peak = Peak(device, dtype)
    formats = {"variant": "", "seconds": ".4f", "images/s": ".1f", "time / full": ".3f", "multiply-adds / full": ".3f",
               "of peak": ".1%"}
    jobs = [("training", b) for b in args.batch_size] + [("sampling", args.sampling_batch)]
    for what, batch in jobs:
        if args.only not in (None, what):
            continue
        if what == "training":
            found = bench_training(configs, batch, device, dtype, args.compile, args.repetitions,
                                   args.slices, peak)
            print(f"\nA training step of {batch}, medians of {args.repetitions} turns\n")
        else:
            found = bench_sampling(configs, batch, device, dtype, args.compile, args.passes, args.sampling_steps, peak)
            print(f"\n{args.sampling_steps} DDIM steps of {batch} images, medians of {args.passes} passes\n")
        plot.print_table(found["rows"], formats)
        print()
        for key, value in found.items():
            if isinstance(value, float):
                print(f"{key}: {value:.3f}")
        results[what][batch] = found
    print(f"\nmedian rate of a large matrix product: {peak.rate:.3g} multiply-adds a second")
    if args.out:
        plot.write_json(args.out, results | {"peak": peak.rate})


if __name__ == "__main__":
    run_script(main)
