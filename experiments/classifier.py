"""How many generated images would a classifier recognise as the class they were asked to be?

Trains a plain convolutional classifier on real images (minutes on a CPU), reports its accuracy on images it has
not seen, and then the share of generated images that it assigns to their own class. Unlike FID this needs no
thousands of samples and no ImageNet, and it says *which* class fails. It says nothing about variety: a model that
draws one perfect image per class scores 100 %.

    python experiments/classifier.py --dataset shapes --out shapes_clf.pt
    python experiments/classifier.py --classifier shapes_clf.pt --generated samples.npz
    python fid.py samples.npz shapes --split test --features shapes_clf.features.pt

The last line uses the second file that training writes: the classifier without its last layer, as TorchScript,
from which fid.py computes a Frechet distance where the Inception network has nothing to say.
"""

import contextlib
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's top level
import common
import fid
from data import Dataset, Source, batch_indices, load, open_source, to_unit
from script import DEVICES, InputError, Parser, pick_device, positive_int, run_script, seed_number, write_then_rename

# ----------------------------------------------------------------------------------------------------
# The network


class Classifier(nn.Module):
    """Convolutions that halve the side until it is 4, then the mean over places, then one linear layer."""

    def __init__(self, num_classes: int, image_size: int, width: int = 32):
        super().__init__()
        widths = [width]
        while image_size > 4 * 2 ** (len(widths) - 1):
            widths.append(min(2 * widths[-1], 4 * width))
        layers, last = [], 3
        for i, w in enumerate(widths + widths[-1:]):  # the last width once more, at the smallest side
            stride = 2 if 0 < i < len(widths) else 1
            layers += [nn.Conv2d(last, w, 3, stride, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU()]
            last = w
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(last, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, D)"""
        return self.body(to_unit(images)).mean((2, 3))  # (N, D, h, w) -> (N, D)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> class scores (N, classes)"""
        return self.head(self.features(images))


class Features(nn.Module):
    """What fid.py --features wants: called, it gives features."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.features(images)


@torch.no_grad()
def predict(model: Classifier, read, n: int, device: torch.device) -> torch.Tensor:
    """Predicted classes, int64 (n,), of the images that read(i, j) gives, a few hundred at a time."""
    model.eval()
    return torch.cat([model(read(i, min(i + 256, n)).to(device)).argmax(1).cpu() for i in range(0, n, 256)])


# ----------------------------------------------------------------------------------------------------
# Training


def training_data(args) -> tuple[Dataset, Dataset]:
    """To train on, and to hold out. Raises InputError."""
    if args.dataset == "shapes":
        if args.test:
            raise InputError("--test: shapes has a test split of its own; leave it out")
        # a seed of its own: train.py draws seed 0, and judging a model by the very images it was
        # trained on would reward memorising them
        return tuple(load("shapes", args.data_dir, split, args.image_size, num, args.seed)
                     for split, num in (("train", args.num), ("test", 2000)))
    found = load(args.dataset, args.data_dir, "train", args.image_size)
    if len(found.classes) < 2:
        raise InputError(f"{args.dataset} has no classes to tell apart; give a folder with a folder per class, "
                         "or a .npz with `labels`")
    if args.dataset == "cifar10" or args.test:
        args.test = args.test or args.dataset
        common.note_if_same(args.dataset, args.test)
        return found, common.load_held_out(args, 2000)
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(args.seed))
    if len(order) < 2:
        raise InputError(f"{args.dataset} holds {len(order)} image(s), too few to train on and to hold some out")
    tenth = max(1, len(order) // 10)
    return tuple(replace(found, images=found.images[part], labels=found.labels[part])
                 for part in (order[tenth:], order[:tenth]))


def train(args, device: torch.device, generated: Source | None) -> tuple[Classifier, dict]:
    """Trains, writes both files, and gives the model with what the classifier file holds. `generated` is
    what will be judged: if it does not fit, that is said before minutes of training, not after."""
    with contextlib.redirect_stdout(sys.stderr):  # load() shows progress; stdout is for the result
        dataset, test = training_data(args)
    n, size = len(dataset.images), dataset.images.shape[-1]
    check_images(dataset.name, dataset.images)
    check_images(test.name, test.images)
    if generated:
        wanted_classes(generated, dataset.classes, size)
    dataset = dataset.to(device)
    torch.manual_seed(args.seed)
    config = {"num_classes": len(dataset.classes), "image_size": size, "width": args.width}
    model = Classifier(**config).to(device)
    steps = args.steps or max(1, args.epochs * n // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps) if steps > 1 else None
    g = torch.Generator().manual_seed(args.seed)  # of the augmentation
    pad = max(1, size // 16)
    start = time.time()
    model.train()
    for step in range(1, steps + 1):
        index = batch_indices(n, step - 1, args.batch_size, args.seed, device)
        x, y = dataset.images[index], dataset.labels[index]
        if not args.no_flip and torch.rand((), generator=g) < 0.5:
            x = x.flip(3)
        dy, dx = torch.randint(2 * pad + 1, (2,), generator=g).tolist()  # one small shift for the whole batch
        x = F.pad(x.float(), (pad,) * 4, mode="replicate")[:, :, dy:dy + size, dx:dx + size]
        loss = F.cross_entropy(model(x), y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if decay:
            decay.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step:,} of {steps:,}  loss {loss.item():.3f}  {time.time() - start:.0f} s",
                  file=sys.stderr)

    predicted = predict(model, lambda i, j: test.images[i:j], len(test.images), device)
    accuracy = (predicted == test.labels).double().mean().item()
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    state = {"config": config, "classes": dataset.classes, "dataset": args.dataset, "accuracy": accuracy,
             "n_test": len(test.images), "model": weights}
    write_then_rename(args.out, lambda file: torch.save(state, file))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # newer torch versions call TorchScript old; it is what loads everywhere
        scripted = torch.jit.trace(Features(model.cpu().eval()), test.images[:2])
        write_then_rename(features_file(args.out), lambda file: torch.jit.save(scripted, file))
    return model.to(device), state


def check_images(name: str, images: torch.Tensor) -> None:
    """Raises InputError unless they are bytes (N, 3, H, H), which latents are not."""
    if images.dtype != torch.uint8 or images.shape[-1] != images.shape[-2]:
        kind, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape[1:])
        raise InputError(f"{name} has {kind} {shape}; a classifier takes square images of bytes")


def features_file(out: Path) -> Path:
    return out.with_name(out.stem + ".features" + (out.suffix or ".pt"))


def load_classifier(path: Path, device: torch.device, test: Dataset | None = None) -> tuple[Classifier, dict]:
    """Reads the classifier file (tensors and plain values alone: it cannot run code). Raises InputError if it is
    none, or not for images like those of `test`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own remark when it is handed the .features.pt file
            state = torch.load(path, map_location="cpu", weights_only=True)
        model = Classifier(**state["config"])
        model.load_state_dict(state["model"])
        if not {"classes", "dataset", "accuracy", "n_test"} <= state.keys():
            raise ValueError("it lacks entries")
    except FileNotFoundError:
        raise InputError(f"no classifier {path}; train one with --dataset ... --out {path}") from None
    except Exception as error:  # whatever else a foreign file makes of itself
        raise InputError(f"{path} is not a classifier that this script wrote ({type(error).__name__}); give the "
                         "file named by --out, not the .features.pt beside it") from None
    if test:
        check_images(test.name, test.images)
        if (state["classes"], state["config"]["image_size"]) != (test.classes, test.images.shape[-1]):
            raise InputError(f"{path} is of other classes or another image size than {test.name}; name another file")
    return model.to(device), state


# ----------------------------------------------------------------------------------------------------
# Judging


def wanted_classes(source: Source, classes: list[str], image_size: int) -> torch.Tensor:
    """Which of `classes` each generated image should be, int64 (N,). Raises InputError if that is not
    known, or if the images have another size."""
    first = source.read(0, 1)
    check_images(source.name, first)
    size = first.shape[-1]
    if size != image_size:
        raise InputError(f"{source.name} has images {size} pixels wide, the classifier is for {image_size}")
    if source.labels is None:
        raise InputError(f"{source.name} does not say which class each image should be: give a .npz with `labels` "
                         "or a folder with a folder per class")
    # class folders are matched by name first; 0, 1, 2, ... in order, as a .npz has them, are class indices
    names = {name: i for i, name in enumerate(classes)}
    numbers = {str(i): i for i in range(len(classes))}
    in_order = source.classes == [str(i) for i in range(len(source.classes))]
    index = names | numbers if in_order else numbers | names
    unknown = [source.classes[i] for i in source.labels.unique().tolist() if source.classes[i] not in index]
    if unknown:
        raise InputError(f"{source.name} has the class {unknown[0]!r}; the classifier knows {', '.join(classes)} "
                         f"(or 0 to {len(classes) - 1})")
    return torch.tensor([index.get(name, -1) for name in source.classes])[source.labels]


def judge(model: Classifier, state: dict, source: Source, device: torch.device) -> dict:
    """The share of generated images recognised as their class, over all and per class."""
    labels = wanted_classes(source, state["classes"], state["config"]["image_size"])
    predicted = predict(model, source.read, source.n, device)
    per_class = []
    for i, name in enumerate(state["classes"]):
        mine, taken = predicted[labels == i], predicted == i
        wrong = torch.bincount(mine[mine != i], minlength=len(state["classes"]))
        per_class.append({
            "class": name, "n": len(mine),
            "recognised": (mine == i).double().mean().item() if len(mine) else None,
            "taken_for_it": taken.sum().item(),
            "most_often_taken_for": state["classes"][wrong.argmax()] if wrong.sum() else None})
    return {"recognised": (predicted == labels).double().mean().item(), "n_generated": len(labels),
            "per_class": per_class}


class Judge:
    """Of generated images: the Frechet distance to held-out ones in the classifier's features (not an FID), and the
    share recognised as their class, both from one pass."""

    def __init__(self, path: Path, held_out: Dataset, device: torch.device):
        """Raises InputError if the file at `path` is no classifier for such images."""
        self.network, self.device = load_classifier(path, device, held_out)[0].eval(), device
        self.real = self.look_at(held_out.images)[:2]

    @torch.no_grad()
    def look_at(self, images: torch.Tensor) -> tuple:
        """uint8 (N, 3, H, W) -> mean (D,) and covariance (D, D) of the features, and the predicted classes (N,)"""
        features = torch.cat([self.network.features(part.to(self.device)) for part in images.split(256)])  # (N, D)
        moments = fid.Moments()
        moments.add(features.cpu())
        return *moments.result(), self.network.head(features).argmax(1).cpu()

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict:
        """images uint8 (N, 3, H, W), labels int64 (N,)"""
        mu, sigma, predicted = self.look_at(images)
        return dict(frechet=fid.frechet_distance(mu, sigma, *self.real),
                    recognised=(predicted == labels).double().mean().item())


def trained_judge(args, held_out: Dataset, device: torch.device) -> Judge:
    """The judge of a script that has common.py's flags, by the file args.classifier, which is trained on
    args.dataset if it does not exist. Raises InputError."""
    if not args.classifier.exists():
        print(f"training the classifier {args.classifier}")
        wanted = dict(dataset=args.dataset, data_dir=args.data_dir, image_size=args.image_size, device=args.device,
                      out=args.classifier)
        wanted |= dict(test=args.test) if args.test != args.dataset else {}
        main(common.as_flags(wanted))
    return Judge(args.classifier, held_out, device)


def main(argv: list[str] | None = None):
    """argv: the command line, for scripts that need a classifier; default what was typed."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--dataset", default="shapes", help="shapes, cifar10, or a folder of class folders, a .zip of one, or a "
        ".npz with images and labels (default: shapes)")
    add("--test", help="with a PATH dataset: where the held-out images are (default: a random tenth of --dataset)")
    add("--data-dir", default="data", help="where datasets and caches live (default: data)")
    add("--image-size", type=positive_int, help="shapes: the size to draw (default 16); a PATH dataset: crop to "
        "the central square and resize to this")
    add("--num", type=positive_int, default=20_000, help="shapes: how many to draw for training (default: 20000)")
    add("--seed", type=seed_number, default=1234, help="of the drawn shapes, the weights and the order; the generative "
        "model is trained on shapes of seed 0, so keep another (default: 1234)")
    add("--epochs", type=positive_int, default=6, help="passes over the training images (default: 6)")
    add("--steps", type=positive_int, help="train for this many batches instead of --epochs")
    add("--batch-size", type=positive_int, default=128, help="images per step (default: 128)")
    add("--width", type=positive_int, default=32, help="channels of the first convolution; the features have up "
        "to 4 times as many (default: 32)")
    add("--lr", type=float, default=4e-3, help="highest learning rate of the one-cycle schedule (default: 0.004)")
    add("--no-flip", action="store_true", help="no left-right flips; for images such as digits, whose mirror "
        "image is another class")
    add("--out", type=Path, default=Path("classifier.pt"), help="where training writes the classifier; "
        "NAME.features.pt beside it is the TorchScript file for fid.py --features. TorchScript is code: open such "
        "files only from people you trust (default: classifier.pt)")
    add("--classifier", type=Path, metavar="FILE", help="do not train; read what an earlier call wrote with --out")
    add("--generated", metavar="PATH", help="images to judge: a .npz with `images` (or `arr_0`) and `labels`, or "
        "a folder with a folder per class, named by the class or its number")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--device", choices=DEVICES, default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    if args.classifier and not args.generated:
        raise InputError("--classifier alone has nothing to do; add --generated PATH to judge images with it")
    if not 0 < args.lr < 1:
        raise InputError(f"--lr {args.lr} must lie between 0 and 1")
    if args.out.is_dir() and not args.classifier:
        raise InputError(f"--out {args.out} is a folder; give the name of a file")
    generated = open_source(args.generated, args.data_dir) if args.generated else None
    device = pick_device(args.device)
    model, state = load_classifier(args.classifier, device) if args.classifier else train(args, device, generated)
    result = {"dataset": state["dataset"], "held_out_accuracy": state["accuracy"], "n_held_out": state["n_test"],
              "classifier": str(args.classifier or args.out),
              "features": None if args.classifier else str(features_file(args.out)),
              "recognised": None, "n_generated": None, "per_class": None}
    if generated:
        result |= judge(model, state, generated, device)
    if args.json:
        print(json.dumps(result, allow_nan=False))
        return
    print(f"{state['dataset']}: {100 * state['accuracy']:.1f} % of {state['n_test']:,} held-out images recognised")
    if not args.classifier:
        print(f"wrote {args.out} and {features_file(args.out)}")
    if generated:
        print(f"\n{'class':<14} {'n':>6} {'recognised':>11}   {'most often taken for'}")
        for row in result["per_class"]:
            share = "-" if row["recognised"] is None else f"{100 * row['recognised']:.1f} %"
            print(f"{row['class']:<14} {row['n']:>6} {share:>11}   {row['most_often_taken_for'] or ''}")
        print(f"{'all':<14} {result['n_generated']:>6} {100 * result['recognised']:>9.1f} %")


if __name__ == "__main__":
    run_script(main)
