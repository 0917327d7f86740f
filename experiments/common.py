"""What the scripts that compare models share: flags, held-out images and losses, runs that are measured once.

Each of them trains its models by train.py's own command line, in folders under --out, and judges them by images
that they have not seen. Read train.py before; plot.py draws the charts and prints the tables.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import curves
import plot
import train
from data import DATASETS, Dataset, load, open_source, to_unit
from model import PRESETS, Config, DiT, preset_config
from sample import ImageNoise, draw_images, load_model
from schedule import T, Shares, eps_loss_factor
from script import DEVICES, InputError, Parser, flag, positive_int, sha256_of

GROUP_EDGES = [*train.loss_groups("cosine"), T + 1]  # five groups of t of similar log-SNR, NA-LR B.1
GROUP_NAMES = [f"{first}-{end - 1}" for first, end in zip(GROUP_EDGES, GROUP_EDGES[1:])]

# ----------------------------------------------------------------------------------------------------
# Images, flags


def add_image_flags(parser: Parser, default_size: str = "16", default_dataset: str = "cifar10, downloaded once") -> None:
    """The defaults in words, for --help"""
    add = parser.add_argument
    add("--dataset", default="cifar10", metavar="NAME|PATH", help=f"what to train on, or was trained on: "
        f"{', '.join(DATASETS)}, or a folder, .zip or .npz (default {default_dataset})")
    add("--test", metavar="NAME|PATH", help="images to hold out; needed with a PATH (default: the test split of a "
        "named dataset)")
    add("--data-dir", default="data", metavar="DIR", help="where datasets and caches are kept (default data)")
    add("--image-size", type=positive_int, metavar="N", help="draw or resize images to this size (default "
        f"{default_size}; a .npz is taken as it is)")


def settle_image_flags(args: Namespace) -> None:
    """Fills in args.test and args.image_size. Raises InputError if there is nothing to hold out."""
    if not args.test and args.dataset not in DATASETS:
        raise InputError(f"{args.dataset} has no test split of its own; add --test with images to hold out")
    args.test = args.test or args.dataset
    args.image_size = args.image_size or (None if args.dataset.lower().endswith(".npz") else 16)
    note_if_same(args.dataset, args.test)


def note_if_same(dataset: str, test: str) -> None:
    if dataset not in DATASETS and Path(dataset).resolve() == Path(test).resolve():  # names have a test split
        print(f"note: --test is --dataset {dataset}: the held-out images are the training images")


def kind(images: torch.Tensor) -> tuple:
    """What two datasets, of images uint8 (N, 3, H, W) or latents float (N, C, H, W), must have in common."""
    return images.is_floating_point(), *images.shape[1:]


def load_held_out(args: Namespace, num: int) -> Dataset:
    """The images that models trained on args.dataset are judged by (of shapes, `num`). Raises InputError if they
    have other classes than those of args.dataset, another size, or are latents where those are images."""
    source = open_source(args.dataset, args.data_dir, image_size=args.image_size, num=10)  # shapes: one a class
    test = load(args.test, args.data_dir, "test", args.image_size, num)
    if (source.classes, kind(source.read(0, 1))) != (test.classes, kind(test.images)):
        raise InputError(f"--test {args.test} has other classes or another kind or size of images than {args.dataset}")
    return test


def every_second(dataset: Dataset, first: int) -> Dataset:
    """Every second ten of the images, from the first ten on (first 0) or the second (1): what is fitted and what is
    judged must not meet the same ones. Tens, because the ten classes of shapes come in turns. Raises InputError if
    there are too few."""
    index = torch.arange(len(dataset.images))
    index = index[index // 10 % 2 == first]
    if len(index) < 2:
        raise InputError(f"{dataset.name} holds {len(dataset.images)} images, too few to judge by; give at least 20")
    return Dataset(dataset.name, dataset.images[index], dataset.labels[index], dataset.classes)


def held_out_for(args: Namespace, runs: dict[Path, dict], num: int = 10_000) -> Dataset:
    """The held-out images that finished runs are judged by; of shapes, `num`. runs: {folder: its model.pt}. Fills in
    args.test and args.image_size. Raises InputError if a run is of other images."""
    if not args.dataset.lower().endswith(".npz"):
        args.image_size = args.image_size or next(iter(runs.values()))["config"]["image_size"]
    settle_image_flags(args)
    images = load_held_out(args, num)
    for folder, state in runs.items():
        config = Config(**state["config"])
        its_kind = (bool(config.mean), config.channels, config.image_size, config.image_size)
        if (state["classes"], its_kind) != (images.classes, kind(images.images)):
            raise InputError(f"{folder} is a model of other classes or another kind or size of images than "
                             f"{args.test}; name its images with --dataset and --test")
    return images


def add_run_flags(parser: Parser, out: str) -> None:
    add_image_flags(parser)
    add = parser.add_argument
    add("--model", choices=PRESETS, metavar="NAME", default="tiny", help="tiny, DiT-S/2, ... (default tiny)")
    add("--batch-size", type=positive_int, metavar="N", default=64, help="images a step (default 64; paper: 128)")
    add("--device", choices=DEVICES, default="auto", help="(default auto)")
    add("--out", type=Path, metavar="DIR", default=Path(out), help=f"folder of everything (default {out})")


def add_repeat_flags(parser: Parser, seeds: int = 1, per_group: int = 2000) -> None:
    add = parser.add_argument
    add("--seeds", type=positive_int, metavar="N", default=seeds, help="repeat with seeds 0 to N-1; from two on, "
        f"differences can be told from chance, if barely: take three (default {seeds})")
    add("--per-group", type=positive_int, metavar="N", default=per_group, help="held-out samples in each of the "
        f"five noise groups (default {per_group})")


def add_judge_flags(parser: Parser, num: int) -> None:
    add = parser.add_argument
    add("--num", type=int, metavar="N", default=num, help="samples of each run to judge; 0: none. A Frechet distance "
        f"is biased upwards, the more the fewer samples: compare equal numbers (default {num})")
    add("--guidances", default="1,2", metavar="W,...", help="of the samples (default 1,2)")
    add("--sampling-steps", type=positive_int, metavar="N", default=50, help="of DDIM (default 50)")
    add("--classifier", type=Path, metavar="FILE", help="of experiments/classifier.py, trained once where it does not "
        "exist (default OUT/classifier.pt)")


def settle_judge_flags(args: Namespace) -> None:
    """Makes args.guidances numbers, and args.classifier a path, or None where nothing is judged. Raises InputError.
    """
    args.guidances = choose_numbers("--guidances", args.guidances)
    if args.num < 0 or args.num == 1 or args.sampling_steps > T:
        raise InputError(f"--num takes 0, or at least 2; --sampling-steps at most {T}")
    args.classifier = (args.classifier or args.out / "classifier.pt") if args.num else None


def parse_flags(parser: Parser, own: Iterable[str]) -> Namespace:
    """What was typed. Flags that the parser does not know are meant for train.py: `train_flags`. Raises InputError
    for those of them that the script sets itself, `own`."""
    args, args.train_flags = parser.parse_known_args([word for word in sys.argv[1:] if word != "--"])
    for word in args.train_flags:
        if word.split("=")[0] in {"--seed", "--resume", *own}:
            raise InputError(f"{word} is set by this script; leave it out")
    return args


def choose(name: str, text: str, allowed: Iterable[str]) -> list[str]:
    """The words of a flag such as --only, separated by commas. Raises InputError for an unknown one."""
    words = list(dict.fromkeys(text.split(",")))
    if unknown := [word for word in words if word not in allowed]:
        raise InputError(f"{name} {unknown[0]!r} is unknown; use {', '.join(allowed)}, separated by commas")
    return words


def choose_numbers(name: str, text: str, low: float = -1e6, high: float = 1e6) -> list[float]:
    """Numbers of a flag, separated by commas. Raises InputError for what is none, or outside low..high."""
    numbers = []
    for word in text.split(","):
        try:
            numbers.append(float(word))
        except ValueError:
            raise InputError(f"{name} {text!r} must be numbers separated by commas, such as 0.5,0.25") from None
        if not low <= numbers[-1] <= high:
            raise InputError(f"{name} {word} must lie between {low:g} and {high:g}")
    return list(dict.fromkeys(numbers))


def as_flags(settings: dict) -> list[str]:
    """{"log_every": 1, "restart": False, "lr": None} -> --log-every 1 --no-restart"""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif value is not None:
            words += [flag(name), str(value)]
    return words


def run_flags(args: Namespace, **settings) -> list[str]:
    """The command line of train.py for a run, but for --out: what a script's runs share, then `settings`."""
    shared = dict(dataset=args.dataset, data_dir=args.data_dir, image_size=args.image_size, model=args.model,
                  batch_size=args.batch_size, device=args.device, sample_every=0)
    return as_flags(shared | settings) + args.train_flags


def read_run_flags(flags: list[str], images: Dataset) -> tuple[train.Settings, Config]:
    """What train.py will make of a command line and of images, or latents, like these; but for the statistics of
    latents, which are those of the training set. Raises InputError."""
    _, s, given, _ = train.read_command_line(flags)
    facts = {} if images.images.dtype == torch.uint8 else train.facts_of_latents(images.images)
    return s, preset_config(s.model, given, image_size=images.images.shape[-1], num_classes=len(images.classes),
                            **facts)


# ----------------------------------------------------------------------------------------------------
# Held-out losses


def noised_batch(model: DiT, dataset: Dataset, images: torch.Tensor, t: torch.Tensor, samples: range,
                 seed: int) -> train.Batch:
    """Image number images[i] of `dataset` at timestep t[i], both int64 (B,), with the noise of sample samples[i]
    of the seed: the same whatever the model and the batch."""
    device = model.position.device
    x_0 = to_unit(dataset.images[images], model.config.mean, model.config.std).to(device)
    y = dataset.labels[images] if dataset.classes else torch.full_like(images, model.config.num_classes)
    return train.Batch(x_0, y.to(device), ImageNoise(seed, samples, x_0.shape[1:], device)(), t)


@torch.no_grad()
def denoising_losses(model: DiT, dataset: Dataset, images: torch.Tensor, t: torch.Tensor, seed: int = 0,
                     batch_size: int = 250, share: float | None = None) -> torch.Tensor:
    """The loss of eps, whatever the model predicts, of image number images[i] of `dataset` at timestep t[i], both
    int64 (N,): float64 (N,) on the CPU. share: of the channels, for an elastic model."""
    losses = []
    for first in range(0, len(t), batch_size):
        samples = range(first, min(first + batch_size, len(t)))
        batch = noised_batch(model, dataset, images[samples], t[samples], samples, seed)._replace(share=share)
        losses.append(train.denoising_loss(model, model, batch)[0].double().cpu())
    return torch.cat(losses) * eps_loss_factor(model.config.predict, model.noise_schedule)[t]


def spread_over(group: range, n: int) -> torch.Tensor:
    """n timesteps that lie evenly in the group, ascending: int64 (n,)"""
    return group[0] + ((torch.arange(n, dtype=torch.float64) + 0.5) / n * len(group)).long()


def held_out_loss(model: DiT, dataset: Dataset, per_group: int = 1000, seed: int = 0,
                  share: float | None = None) -> tuple[float, list[float]]:
    """The loss of eps on images the model has not seen: its mean over all t, and in each of the five groups. Every
    model meets the same images, noise and timesteps, which are spread evenly over each group, so that differences
    between models are not those of the draw."""
    t = torch.cat([spread_over(range(*edges), per_group) for edges in zip(GROUP_EDGES, GROUP_EDGES[1:])])
    order = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(seed))  # mixes the classes
    losses = denoising_losses(model, dataset, order[torch.arange(len(t)) % len(order)], t, seed, share=share)
    by_group = losses.view(5, per_group).mean(1)
    widths = torch.tensor(GROUP_EDGES, dtype=torch.float64).diff() / T
    return (widths * by_group).sum().item(), by_group.tolist()


# ----------------------------------------------------------------------------------------------------
# Runs


def check_settings(folder: Path, flags: list[str], names: Iterable[str] = ("dataset", "steps", "lr", "dtype")) -> None:
    """Raises InputError if the folder holds a run of other settings than `flags`, those of train.py, in what that lets
    a resumed run change: a comparison takes runs that were trained alike from their first step."""
    now = asdict(train.read_command_line(flags)[1])
    try:
        was = json.loads((folder / "config.json").read_text())["train"]
        differ = [f"{flag(name)} {was[name]}, not {now[name]}" for name in names if was[name] != now[name]]
    except (OSError, ValueError, KeyError, TypeError):
        return  # there is none, or train.py will say what is wrong with it
    if differ:
        raise InputError(f"{folder} is a run of {differ[0]}; ask for the same as then, or choose another --out")


def open_run(folder: Path, flags: list[str]) -> train.Run:
    """A run as train.py begins it or resumes it, for `train.run_steps` with steps of another kind."""
    return train.open_run(["--resume", "--out", str(folder), *flags])[0]


def measured(folder: Path, flags: list[str], depends: dict, name: str = "measured") -> dict | None:
    """What NAME.json says of a run; None if it is not there, damaged, or of other flags or weights, or of
    another of the things that the measurement depends on."""
    try:
        saved = json.loads((folder / f"{name}.json").read_text())
        weights = sha256_of(folder / "model.pt")
        return saved["result"] if saved["of"] == dict(flags=flags, weights=weights, **depends) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def train_and_measure(folder: Path, flags: list[str], depends: dict, device: torch.device,
                      measure: Callable[[DiT, Path], dict], name: str = "measured") -> dict:
    """What `measure(model, folder)` says of the run with these flags of train.py, which is trained, gone on with
    or found finished. Measured once for the same flags, weights and what else the measurement `depends` on."""
    result = measured(folder, flags, depends, name)
    if result is None:
        check_settings(folder, flags)
        train.main(["--resume", "--out", str(folder), *flags])
        result = measure(load_model(folder, device)[0], folder)
        of = dict(flags=flags, weights=sha256_of(folder / "model.pt"), **depends)
        plot.write_json(folder / f"{name}.json", dict(of=of, result=result))
    return result


def losses_and_cost(model: DiT, folder: Path, held_out: Dataset, per_group: int) -> dict:
    loss, by_group = held_out_loss(model, held_out, per_group)
    return dict(loss=loss, loss_by_group=by_group, flops=spent(folder))


def spent(folder: Path) -> int:
    """Multiply-adds of a run's training. Raises InputError."""
    flops = curves.read_log(folder)[-1].get("flops")
    if not curves.is_number(flops):
        raise InputError(f"{folder / 'metrics.jsonl'} does not tell the cost; delete {folder} to train it again")
    return flops


def draw_samples(model: DiT, classes: int, num: int, steps: int, guidance: float, shares: Shares = Shares(),
                 sampler: str = "ddim"):
    """Images 0 to num - 1 of seed 0, the classes in turn: uint8 (num, C, H, W), and their labels (num,)."""
    drawn, batch = [], 100 if model.position.device.type == "cpu" else 500
    for first in range(0, num, batch):
        indices = range(first, min(first + batch, num))
        drawn.append(draw_images(model, indices, range(classes), 0, sampler, steps, guidance, shares=shares))
    return tuple(map(torch.cat, zip(*drawn)))


# ----------------------------------------------------------------------------------------------------
# Figures of several runs


def about_losses(predict: str) -> str:
    return f"The models predict {predict}. Losses are those of eps, whatever a model predicts: so they compare."


def mean_and_sd(values: list[float], spec: str) -> str | None:
    """0.12 ± 0.03, the standard deviation over seeds; None where a value is not known."""
    if None in values:
        return None
    return format(np.mean(values), spec) + (f" ± {np.std(values, ddof=1):{spec}}" if len(values) > 1 else "")


def shown(runs: list[dict], measures: list[str]) -> dict[str, str | None]:
    """Of several runs: mean and deviation of the loss, of Frechet distances and of recognised shares, as in a table."""
    specs = {"loss": ".5f", "frec": ".2f", "reco": ".1%"}
    return {key: mean_and_sd([run[key] for run in runs], specs[key[:4]]) for key in measures}


def relative_change(ours, theirs) -> tuple[float, float | None]:
    """ours / theirs - 1, paired by seed (the first axis): the mean, and the half-width of its 95 % interval
    (Student's t over the seeds); None for a single seed."""
    change = np.asarray(ours, dtype=float) / np.asarray(theirs, dtype=float) - 1
    n = len(change)
    return change.mean(0), stats.t.ppf(0.975, n - 1) * change.std(0, ddof=1) / n**0.5 if n > 1 else None


def loss_changes(runs: list[dict], others: list[dict]) -> tuple[np.ndarray, np.ndarray | None]:
    """`relative_change` of the held-out loss in all, then in each group: (6,)"""
    return relative_change(*([[run["loss"], *run["loss_by_group"]] for run in some] for some in (runs, others)))
