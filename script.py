"""What the command-line scripts share: errors in one line, flags, device, processes, progress, files, runs.

Nothing here is about diffusion; a reader of the method may skip it. It imports nothing from the project.
"""

import argparse
import atexit
import contextlib
import ctypes
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# ----------------------------------------------------------------------------------------------------
# Errors


class InputError(argparse.ArgumentTypeError, ValueError):
    """Something a person typed or supplied cannot be used. The message is one line: what was given,
    what is allowed, what to do. Scripts, and argparse, print it and exit with status 2 (`run_script`)."""


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main(): an `InputError`, what the file system refuses, or too little memory end in one
    line on stderr and exit status 2, Ctrl-C in 130. All else is a bug of ours and keeps its traceback."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the shell
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # `... | head` closed our output: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as error:  # OSError: a file for a folder, a full disk; it names the path
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        words = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")  # torch's
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in words):
            raise
        print(f"{Path(sys.argv[0]).name}: not enough memory for this batch or model ({one_line(error)})",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def one_line(error: Exception) -> str:
    """What an exception of somebody else's code says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ----------------------------------------------------------------------------------------------------
# Flags. A dataclass field made by `setting` carries its default, bounds and help: its flag and the check
# of its value are generated from it, so that each stands in one place.


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag costs one line instead of the whole usage text, and `--help` keeps the
    line breaks of the description."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists what is allowed)\n")


def positive_int(text: str, low: int = 1) -> int:
    """argparse type: a whole number of at least `low`."""
    if not text.isdecimal() or not low <= int(text) <= 2**31:
        raise InputError(f"{text[:60]} is not a whole number of at least {low} and at most 2**31")
    return int(text)


def seed_number(text: str) -> int:
    """argparse type: a seed that every generator takes."""
    return positive_int(text, low=0)


def setting(default, help: str = "", low=-math.inf, high=math.inf, above=-math.inf,
            choices: Iterable | None = None, metavar: str | None = None,
            parse: Callable[[str], Any] | None = None) -> Any:
    """A dataclass field. Its type: int, float, bool, str, or one of these and another, such as `int | None`.

    low, high: the smallest and the largest value; above: larger than this. parse: from what was typed to the
    value, raises InputError. A field without `help` gets no flag."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, above=above, choices=choices,
                                                metavar=metavar, parse=parse))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(f) -> type:
    """float of a field annotated `float | None`, and the like."""
    return f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type


def add_flags(parser, dataclass, only: tuple[str, ...] | None = None) -> None:
    """A flag for every field that has a help text, or for those named. What is not given stays None, so that
    it can be told from a default. parser: or a group of one."""
    for f in fields(dataclass):
        m, kind = f.metadata, _kind(f)
        if not m.get("help") or (only and f.name not in only):
            continue
        default = {True: "on", False: "off"}[f.default] if kind is bool else f.default
        text = (m["help"] + ("" if default is None else f" (default {default})")).replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, default=None, help=text)
            continue
        metavar = m["metavar"] or (None if m["choices"] else {int: "N", float: "F"}[kind])
        choices = None if m["parse"] else m["choices"]
        parser.add_argument(flag(f.name), type=m["parse"] or kind, choices=choices, help=text,
                            metavar=metavar)


def check_fields(values) -> None:
    """Checks every field of a dataclass instance that `setting` made. Raises InputError naming the flag."""
    for f in fields(values):
        value, m, kind = getattr(values, f.name), f.metadata, _kind(f)
        if not m or (isinstance(f.type, types.UnionType) and type(value) in f.type.__args__[1:]):
            continue  # not made by `setting`; or None, say
        if m["choices"]:
            fits = isinstance(value, str) and value in m["choices"]
            wanted = f"one of {', '.join(m['choices'])}"
        elif kind in (bool, str):
            fits, wanted = type(value) is kind, "on or off" if kind is bool else "a text"
        else:
            fits = type(value) in (int, kind) and abs(value) < 2**63  # not infinite, not NaN
            fits = fits and value > m["above"] and m["low"] <= value <= m["high"]
            limits = {"at least": m["low"], "above": m["above"], "at most": m["high"]}
            limits = " and ".join(f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit))
            wanted = f"a {'whole' if kind is int else 'finite'} number" + (f", {limits}" if limits else "")
            if type(value) in (int, kind) and abs(value) >= 2**63:
                wanted += ", below 2**63"
        if not fits:
            raise InputError(f"{flag(f.name)} {str(value)[:60]} must be {wanted}")


# ----------------------------------------------------------------------------------------------------
# Device and processes

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16")


def pick_device(name: str) -> torch.device:
    """'auto' takes CUDA, then Apple's MPS, then the CPU. Raises InputError if `name` is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available.get(name):
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise InputError(f"--device {name} is not available on this machine; use one of: auto, {usable}")
    return torch.device(name)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The data type of matrix products: as named, or by default bfloat16 on CUDA and float32 elsewhere."""
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if device.type == "cuda":  # TF32 for the few float32 products beside autocast; not where all are meant
        torch.set_float32_matmul_precision("high" if name == "bfloat16" else "highest")
    elif device.type == "cpu":
        _keep_large_blocks()
    return getattr(torch, name)


def _keep_large_blocks() -> None:
    """On Linux: malloc keeps freed blocks of more than 32 MB. Otherwise it returns them to the kernel, and
    gets them anew, zeroed page by page, several times in every layer: a tenth of a DiT-S/2 step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library does as it likes
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30), mallopt(-1, 2**31 - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """From pinned memory the copy to a GPU runs beside the computation: nothing waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Processes:
    """The processes that torchrun has started, or this one alone. Only number 0 speaks and writes."""

    def __init__(self, device: torch.device):
        self.number, self.count, self.device = 0, 1, device
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            try:
                self.number, self.count, local, _ = (
                    int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
            except (KeyError, ValueError) as error:
                raise InputError(f"RANK and WORLD_SIZE are set, but not as torchrun does ({error}); start by "
                                 "torchrun, or unset them") from None
        if self.count > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", local)
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
            if self.number:
                sys.stdout = open(os.devnull, "w")

    def gather(self, x) -> list:
        """What each process holds, in the order of their numbers, on all of them."""
        if self.count == 1:
            return [x]
        everyones = [None] * self.count
        dist.all_gather_object(everyones, x)
        return everyones


class Stop:
    """Ctrl-C, and torchrun's SIGTERM after it, only set `asked`, so that a loop can end in good order; a
    second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = False
        self.handlers = {n: signal.signal(n, self.receive) for n in (signal.SIGINT, signal.SIGTERM)}

    def receive(self, number, _):
        if self.asked and number == signal.SIGINT:
            os._exit(130)
        self.asked = True
        print("\nstopping soon, with everything saved; once more stops at once, without", file=sys.stderr)

    def restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------
# Progress


def show_progress(line: str) -> None:
    """One line of progress on stdout: rewritten in place in a terminal, a line of its own in a file."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be rewritten
        print(f"\r\033[K{line[:width]}", end="", flush=True)
    else:
        print(line, flush=True)


def end_progress() -> None:
    """Leaves the progress line standing; what is printed next starts below it."""
    if sys.stdout.isatty():
        print(flush=True)


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 04 s or 5 s."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    h, m = divmod(minutes, 60)
    return f"{h} h {m:02d} min" if h else f"{m} min {s:02d} s" if m else f"{s} s"


# ----------------------------------------------------------------------------------------------------
# Files


def check_writable(path: Path, flag: str) -> None:
    """Whether a file, or a folder of files, can be made at `path`, which is better known before the work.
    Raises InputError if not."""
    place = path if path.is_dir() else next(parent for parent in path.parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"{flag} {path}: {place} is no folder that you may write into; name another place")


def write_then_rename(path: Path, write: Callable[[io.BufferedWriter], None]) -> None:
    """Calls `write(file)` on a temporary neighbour of `path` and renames it, so that a kill at any
    moment leaves either the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the name must not point at data that a power cut can still lose
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path, keys: tuple[str, ...]) -> dict:
    """Loads a .pt file that holds a dict with at least `keys`, onto the CPU. Only tensors and plain
    values are ever unpickled (weights_only), so a file from a stranger cannot run code.
    Raises InputError if the file is missing, damaged, not ours, or wants to run code."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's and numpy's remarks: ours is one line
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist; give the folder of a run of train.py") from None
    except Exception as error:  # a foreign file can fail in any way inside the unpickler
        raise InputError(f"{path} cannot be loaded: it is damaged, not a PyTorch file, or holds more than "
                         f"tensors and plain values ({one_line(error)})") from None
    missing = [key for key in keys if not isinstance(state, dict) or key not in state]
    if missing:
        raise InputError(f"{path} is not a file that train.py wrote (it lacks {', '.join(missing)})")
    return state


def sha256_of(path: Path) -> str:
    """Raises InputError if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); give an existing file") from None


def check_sha256(path: Path, expected: str) -> None:
    """Raises InputError unless the file's SHA-256 is `expected`. Called before a file is opened."""
    found = sha256_of(path)
    if found != expected:
        raise InputError(f"{path} is damaged or not the file it claims to be (SHA-256 {found[:12]}..., "
                         f"expected {expected[:12]}...); delete it and fetch it again")


def read_torchscript(path: Path, device: torch.device, what: str) -> Callable:
    """A TorchScript module in evaluation mode. It is code, and runs: for files of people you trust alone.
    what: the flag and where such files come from, for the InputError if it is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # newer torch calls TorchScript old
            return torch.jit.load(path, device).eval()
    except Exception:  # a foreign file can fail in any way
        raise InputError(f"{path} is no TorchScript file (torch.jit.save) for {what}") from None


# ----------------------------------------------------------------------------------------------------
# Run folders


def numbered_folder(parent: Path, name: str) -> Path:
    """parent/003-name, counting up from the folders that are there; nothing is made yet."""
    numbers = [p.name.split("-")[0] for p in parent.glob("*-*")]
    return parent / f"{1 + max((int(n) for n in numbers if n.isdecimal()), default=0):03d}-{name}"


def newest_run(file: str = "model.pt") -> Path:
    """The run under runs/ whose `file` was written last. Raises InputError if there is none."""
    files = sorted(Path("runs").glob(f"*/{file}"), key=lambda p: p.stat().st_mtime)
    if not files:
        raise InputError("no run under runs/; train one with `python train.py`, or name one")
    return files[-1].parent


def start_run(folder: Path, config: dict, log_lines: int) -> None:
    """Claims the folder, writes config.json, and leaves the first lines of metrics.jsonl: those on steps
    after the last saved state will be written again."""
    claim_folder(folder)
    text, metrics = json.dumps(config, indent=2).encode(), folder / "metrics.jsonl"
    write_then_rename(folder / "config.json", lambda file: file.write(text))
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    write_then_rename(metrics, lambda file: file.writelines(lines[:log_lines]))


def claim_folder(folder: Path) -> None:
    """Makes the folder, removes what a kill has left half written in it, and locks it as long as this process
    lives. Raises InputError if another process writes to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ImportError):  # Windows: nothing keeps two apart there
        import fcntl

        lock = os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY, 0o666)  # a bare number: nothing closes it
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # of other kinds on a file system that knows no locks
            if isinstance(error, (BlockingIOError, PermissionError)):
                raise InputError(f"another process writes to {folder}; wait, or choose another "
                                 "--out") from None
    for leftover in folder.glob(".*.[0-9]*.tmp"):  # as `write_then_rename` names them
        leftover.unlink()
