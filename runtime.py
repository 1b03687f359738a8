"""What every stage stands on: options, device and ranks, checkpoints, the log, the run.

A training script is a loop of a dozen lines surrounded by chores: read the options, find the GPU, agree with the
other processes, save, resume, write the log, draw the curve. The chores are the same in every stage, and they are
where days of training are lost. They live here once, so that train.py can be about training.

Options.      A stage declares one dataclass: a field is an option, its comment is the help text. Values come from the
              defaults, then from config files (plain assignments, read as literals and never executed), then from
              `--name=value`. A name nobody declared, or a value of another type, ends the run before it starts.
Machine.      Which device, which number format, how many processes, and why.
Checkpoints.  A folder that sample.py and transformers open. It is written beside the old one and takes its place in
              one rename, so at any instant a whole checkpoint is on the disk.
Shards.       A model that is too large for one device, divided among several.
Run.          A training run that can be killed at any moment and continued as if nothing had happened. That is easy
              when nothing is random by accident: the order of data is a pure function of (seed, step), so the state
              of a run is its weights, its optimizer and the number of the step.
"""

import ast
import csv
import dataclasses
import datetime
import difflib
import inspect
import json
import keyword
import math
import os
import re
import shutil
import signal
import sys
import time
import typing
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from layouts import checkpoint_file, hf_name, locate, one_line, read_json, read_pickle, read_weights
from layouts import inspect as inspect_checkpoint
from model import Doge
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# Entry point and options


def run(main):
    """Calls `main(argv)` and turns a user's mistake into one line on stderr and exit status 2.

    The convention of the whole project: bad input raises ValueError with a line that names the option, the value and
    what would be valid; a bug raises anything else. So a ValueError from one of our own files is a message and one
    from inside a library is a bug that keeps its traceback. OSError (no such file, no permission, disk full) is always
    about the user's machine, wherever it is raised.
    """
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # whoever read our output, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        ours = Path(frame.tb_frame.f_code.co_filename).resolve().parent == HERE
        if isinstance(error, ValueError) and not ours:
            raise
        message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        print("error: " + "\\n".join(message.splitlines()), file=sys.stderr)  # names can hold ends of lines
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            print(f"error: out of memory: {one_line(error)[:200]}", file=sys.stderr)
            sys.exit(2)
        if not re.search("(gloo|socket).*(Connection (closed|reset) by peer|[Tt]imed out)", str(error), re.DOTALL):
            raise
        print("error: another process of this run has ended, or has not answered for --patience seconds; once its own "
              "message is dealt with, --resume goes on from the last checkpoint", file=sys.stderr)  # fmt: skip
        sys.stderr.flush()
        os._exit(1)  # at once: to take a process group apart that has lost a member can take for ever
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error):
    """torch has an error for a full GPU, and for a full memory a RuntimeError like any other."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def parse_options(options_class, argv, positional=None, base=None):
    """Builds `options_class` from its defaults, then `base` (a dict: the options of a run that is resumed), then
    config files, then `--name=value`, later ones winning.

    Bare words are config files; where `positional` names a list field (the SOURCES of prepare_data.py) they fill that
    field and a config file is given as `--config=FILE`. `--name` alone sets a boolean. Raises ValueError for an
    unknown name (with the nearest valid one), a wrong type, a missing file.
    """
    hints = typing.get_type_hints(options_class)
    base = {name: convert(value, hints[name], f"{name} of that run") for name, value in (base or {}).items()}
    return options_class(**base | read_values(options_class, argv, positional))


def read_values(options_class, argv, positional=None):
    """What `argv` says, as {option: value}: the types are checked, the ranges are not. --help prints and exits."""
    if "--help" in argv or "-h" in argv:
        print(help_text(options_class, positional))
        sys.exit(0)
    hints = typing.get_type_hints(options_class)
    names = [field.name for field in dataclasses.fields(options_class)]
    values, words = {}, []

    def assign(name, value, where):
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean {close[0]!r}?" if close else "--help lists the options"
            raise ValueError(f"{where}: there is no option {name!r}; {advice}")
        values[name] = convert(value, hints[name], where)

    def load(path):
        for name, (value, line) in read_config(path).items():
            assign(name, value, f"{path}:{line}")

    for argument in argv:
        if not argument.startswith("--"):
            words.append(argument) if positional else load(argument)
            continue
        name, equals, text = argument[2:].partition("=")
        name = name.replace("-", "_")
        name += "_" * keyword.iskeyword(name)  # --for is the field for_
        if name == "config" and "config" not in names:
            load(text)
        elif not equals and name in names and hints[name] is not bool:
            raise ValueError(f"--{name} needs a value: --{name}=...")
        else:
            assign(name, text if equals else "true", f"--{name}")
    if words:
        values[positional] = words
    return values


def read_config(path):
    """Reads a config file into {name: (value, line number)}. Only `name = literal` is allowed, so a config can be
    printed, compared and trusted: nothing in it runs."""
    if not Path(path).is_file():
        raise ValueError(f"there is no config file {str(path)!r} (options are written --name=value)")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: not a file of assignments ({error})") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ValueError(f"{path}:{node.lineno}: only plain assignments are allowed: name = value")
        try:
            values[node.targets[0].id] = (ast.literal_eval(node.value), node.lineno)
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{path}:{node.lineno}: the value must be a literal: a number, string, list") from None
    return values


def convert(value, hint, where):
    """Returns `value` (a literal from a config file, or text from the command line) as the type `hint`: int, float,
    bool, str, list[str] or Literal[...]. A whole number is accepted for a float and never the reverse."""
    try:
        text = value if isinstance(value, str) else repr(value)
        if b"\0" in text.encode():
            raise ValueError
    except ValueError:  # half a character; a number of thousands of digits
        raise ValueError(f"{where}: not a value that a file or a terminal could hold") from None
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where}: {text!r} is not one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{where}: {text!r} is not true or false")
        return text.lower() in ("true", "1")
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = hint(text)
            if hint is float or abs(number) < 2**63:
                return number
            kind = "a whole number below 2^63"
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
        raise ValueError(f"{where}: {text!r} is not {kind}")
    if hint is str and isinstance(value, str):
        return value
    if hint == list[str] and isinstance(value, (str, list, tuple)):
        return value.split(",") if isinstance(value, str) else [str(item) for item in value]
    raise ValueError(f"{where}: {text!r} is not of type {getattr(hint, '__name__', hint)}")


def field_comments(options_class):
    """{field name: the comment on its line}, read from the source of the class and its bases."""
    comments = {}
    for cls in reversed(options_class.__mro__[:-1]):
        for name, comment in re.findall(r"^ {4}(\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.MULTILINE):
            comments[name] = comment
    return comments


def help_text(options_class, positional=None):
    """The text of --help: the script's own opening lines, then each option with its default and comment."""
    module = sys.modules[options_class.__module__]
    usage = f"{positional.upper()} ... [--config=FILE]" if positional else "[config/FILE.py ...]"
    lines = [f"python {Path(module.__file__).name} {usage} [--name=value ...]", "", (module.__doc__ or "").strip(), ""]
    comments, hints = field_comments(options_class), typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        if field.name == positional:
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        choices = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ()
        among = f" [{', '.join(map(str, choices))}]" if choices else ""
        lines.append(f"  --{field.name.rstrip('_')}={default}".ljust(34) + f" {comments.get(field.name, '')}{among}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The machine


@dataclass
class RunOptions:
    """The options that every training stage has."""

    out_dir: str = ""  # where checkpoints, log.csv and loss.png go; empty = out/ and the name of the data
    resume: bool = False  # continue the run in out_dir as if it had never stopped
    resume_or_start: bool = False  # the same if out_dir holds a run, else start one: for what restarts by itself
    max_steps: int = 8000  # optimizer steps in all
    learning_rate: float = 8e-3  # peak learning rate
    grad_clip: float = 1.0  # largest gradient norm; 0 = no clipping
    seed: int = 233  # of the initial weights and of the order of the data (233 is the original recipes' seed)
    log_every: int = 10  # steps between rows of log.csv
    eval_every: int = 100  # steps between validations
    save_every: int = 100  # steps between checkpoints
    keep_best: bool = False  # also keep the model of the lowest val_loss, in OUT_DIR/best
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; weights stay in float32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on a GPU, without --shard
    patience: int = 600  # seconds that processes wait for one of them that does not answer; then the run ends
    shard: bool = False  # divide the weights, gradients and moments over the processes: for a model too large for one

    def check(self):
        """Raises ValueError for values no run can have. Called by a stage once its options are complete."""
        if self.out_dir and (source := getattr(self, "init_from", "")) and not self.resume:
            if Path(self.out_dir).resolve() in [place := Path(source).resolve(), *place.parents]:
                raise ValueError(f"--out_dir={self.out_dir} holds --init_from={source}: "
                                 "give the new run another folder")  # fmt: skip
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed={self.seed} must be from 0 up and below 2^63")
        for name in ("max_steps", "log_every", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.patience <= 10**6:
            raise ValueError(f"--patience={self.patience} must be from 1 to 1,000,000 seconds")
        for name in ("learning_rate", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name}={getattr(self, name)} must be a number from 0 up")


@dataclass
class TuneOptions(RunOptions):
    """The options that the stages after pretraining share. The shape of the model, its tokenizer and its chat template
    are the checkpoint's, so there is no option for them. A row is a conversation, a preference or a problem."""

    init_from: str = "out/stories"  # checkpoint folder of the model to tune
    data: str = ""  # folder made by prepare_data.py
    overwrite: bool = False  # replace the run that out_dir holds
    epochs: float = 2.0  # how often every row is seen
    max_steps: int = 0  # optimizer steps in all; 0 = as many as the epochs take
    batch_rows: int = 128  # rows a step, over all processes and micro-batches
    micro_tokens: int = 16384  # tokens a process computes at once, padding included: as many as its memory holds
    sequence_length: int = 0  # longest row in tokens (T); 0 = the model's max_position_embeddings
    learning_rate: float = 8e-4  # peak learning rate
    warmup: float = 0.1  # share of the steps that have a rising learning rate; then half a cosine to a tenth of it
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the hidden matrices, the rest stays with adamw
    beta1: float = 0.9  # Adam: memory of the gradient
    beta2: float = 0.95  # Adam: memory of its square
    weight_decay: float = 0.01  # of the matrices; A, the residual scales and the norms are not decayed
    freeze_embeddings: bool = False  # leave the words' vectors as they are: those that no row teaches are not unlearned
    gradient_checkpointing: bool = False  # recompute each block in the backward pass: less memory, a third more work
    eval_rows: int = 1000  # validation rows, always the first ones

    def __post_init__(self):
        self.data = Path(self.data).as_posix()
        self.out_dir = Path(self.out_dir or f"out/{Path(self.data).name}").as_posix()
        steps, self.max_steps = self.max_steps, max(self.max_steps, 1)  # 0 stands until the rows are counted
        self.check()
        self.max_steps = steps
        for name in ("batch_rows", "micro_tokens", "eval_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        for name in ("max_steps", "sequence_length", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name}={getattr(self, name)} must be a number from 0 up")
        for name in ("beta1", "beta2", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be from 0 up and below 1")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"--epochs={self.epochs} must be a number above 0")


# What a resumed tuning run may change: what it costs, and where and how often it reports. The rest is the run.
TUNE_MAY_CHANGE = set("""resume out_dir overwrite keep_best log_every eval_every eval_rows save_every device
    dtype compile patience shard micro_tokens gradient_checkpointing""".split())


def read_tune_options(options_class, argv, default_config, may_change=()):
    """The options of a tuning run. Without a config file they are those of `default_config` (in config/), with --resume
    those of the run itself. What `argv` says comes last, and wins."""
    if all(argument.startswith("--") for argument in argv):
        argv = [str(HERE / "config" / default_config), *argv]
    asked = read_values(options_class, argv)
    out = asked.get("out_dir") or f"out/{Path(asked.get('data') or options_class.data).name}"
    if is_resumed(asked, out):
        return resumed_options(options_class, argv, out, TUNE_MAY_CHANGE | set(may_change))
    options = parse_options(options_class, argv)
    refuse_to_overwrite(options)
    return options


def start_tuning(options, machine, tokenizer, labels=None):
    """-> the model to tune, and the training state of a resumed run (else None). Fills in sequence_length; rows longer
    than the model was made for make it one of that length. tokenizer: that of the data; labels: its, for a classifier.
    Raises ValueError if the checkpoint has another one, or another chat template."""
    folder = options.out_dir if options.resume else options.init_from
    model, own = load_model(folder, labels=labels)
    if own.digest != tokenizer.digest or own.chat_template != tokenizer.chat_template:
        what = "tokenizer" if own.digest != tokenizer.digest else "chat template"
        raise ValueError(f"{folder} has another {what} than --data={options.data}: prepare the data with "
                         f"--tokenizer={folder}")  # fmt: skip
    options.sequence_length = options.sequence_length or model.config.max_position_embeddings
    model.config.max_position_embeddings = max(options.sequence_length, model.config.max_position_embeddings)
    if options.micro_tokens < options.sequence_length:
        raise ValueError(f"--micro_tokens={options.micro_tokens} is less than one row of {options.sequence_length}")
    model.gradient_checkpointing = options.gradient_checkpointing
    model.embed_tokens.requires_grad_(not options.freeze_embeddings)
    return model.train().to(machine.device), load_run(folder) if options.resume else None


def count_steps(options, count, machine):
    """Fills in max_steps, for `count` rows of training data."""
    if count < 1 or options.batch_rows < machine.world_size:
        raise ValueError(f"--batch_rows={options.batch_rows}: there are {count} rows and {machine.world_size} "
                         "processes, each of which needs one")  # fmt: skip
    options.max_steps = options.max_steps or math.ceil(options.epochs * count / options.batch_rows)


def is_resumed(asked, out):
    """Whether the options `asked` for (a dict) go on with the run in the folder `out`: --resume always, and
    --resume_or_start if there is one (torchrun --max-restarts and job queues repeat the very same command line)."""
    for name in ("resume", "resume_or_start"):
        if asked.get(name) and asked.get("overwrite"):
            raise ValueError(f"--overwrite replaces the run in --out_dir={out}, --{name} goes on with it: choose one")
    return asked.get("resume") or asked.get("resume_or_start") and checkpoint_file(out, "training_state.pt").is_file()


def refuse_to_overwrite(options):
    """Raises ValueError if out_dir holds a run, or a part of one, unless --overwrite says that it may go."""
    out = options.out_dir
    if any(checkpoint_file(out, name).is_file() for name in ("training_state.pt", "model.safetensors", "config.json")):
        if not options.overwrite:
            raise ValueError(f"--out_dir={out} holds a run already: --resume goes on with it, --overwrite replaces it, "
                             "or choose another folder")  # fmt: skip


def resumed_options(options_class, argv, out, may_change):
    """The options of the run in the folder `out`, with the changes that `argv` names as --name=value (a config file
    only tells where the run is). Raises ValueError for a change that would make it another run."""
    state = load_run(out)
    if state is None:
        raise ValueError(f"--resume: there is no run to go on with in --out_dir={out}")
    changes = [argument for argument in argv if argument.startswith("--") and not argument.startswith("--config=")]
    names = {field.name for field in dataclasses.fields(options_class)}
    if not state["options"].keys() <= names:
        raise ValueError(f"--resume: the run in {out} is of another stage: it has the options "
                         f"{' '.join(sorted(map(str, state['options'].keys() - names)))}")  # fmt: skip
    base = state["options"] | dict(out_dir=Path(out).as_posix(), resume=True)
    options = parse_options(options_class, changes, base=base)
    for name, before in state["options"].items():
        if name not in may_change and getattr(options, name) != before:
            raise ValueError(f"--{name}={getattr(options, name)}: the run in {out} has {before}; a resumed run cannot "
                             "change it (--init_from starts a new run from its weights)")  # fmt: skip
    return options


def product_seconds(dtype):
    """Seconds that this processor takes to multiply two matrices (512, 512) of dtype: the least of five."""
    matrix, seconds = torch.full((512, 512), 1 / 512, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Machine:
    """The device this process computes on, the format it computes in, and its place among its fellows."""

    def __init__(self, device="auto", dtype="auto", patience=600):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        kind, reason = device, "asked for"
        if device == "auto":
            kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
            reason = "the best there is here"
        elif device != "cpu" and not getattr(torch, device).is_available():
            raise ValueError(f"--device={device} is not available here; --device=cpu always is")
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        if kind == "cuda":
            if self.device.index >= torch.cuda.device_count():
                raise ValueError(f"process {self.device.index + 1} of this machine has no GPU: there are "
                                 f"{torch.cuda.device_count()}; start as many processes")  # fmt: skip
            torch.cuda.set_device(self.device)
        has_bf16 = kind == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)  # Ampere or newer
        self.dtype = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if has_bf16 else torch.float32
        self.name = torch.cuda.get_device_name(self.device) if kind == "cuda" else f"{torch.get_num_threads()} threads"
        why = "asked for" if dtype != "auto" else "fast and safe here" if has_bf16 else "no fast bfloat16 to rely on"
        if kind == "cpu" and self.dtype == torch.bfloat16:  # for which many a processor has no arithmetic
            ratio = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
            why += f", its products take {ratio:.1f} times the time of float32's here"
        self.summary = f"{kind} ({self.name}), {reason}; {str(self.dtype).removeprefix('torch.')}, {why}"
        if self.world_size > 1:
            try:
                wait = datetime.timedelta(seconds=patience)
                dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=wait)
            except RuntimeError as error:  # gloo waits up to five times as long for one that has just died
                advice = f"one has ended, or not answered for --patience={patience} seconds"
                if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
                    # torchrun keeps the addresses of the processes that died (pytorch issues 135712, 167288)
                    advice = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun --max-restarts"
                raise ValueError(f"the {self.world_size} processes of this run do not find each other: {advice} "
                                 f"({one_line(error)[:150]})") from error  # fmt: skip
            self.summary += f"; {self.world_size} processes"

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *words):
        if self.is_main:
            tqdm.write(" ".join(map(str, words)))

    def autocast(self):
        """Matrix products in self.dtype, everything that needs the range in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, *tensors):
        """Tensors of the host -> the same on the device. A GPU copies pinned memory while the host goes on; for other
        memory the host waits until the GPU has done all it was asked before. (On mps what does not wait is not safe.)
        """
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=self.device.type not in ("cpu", "mps")) for tensor in tensors]

    def sum(self, values):
        """A list of numbers, or of tensors of one shape, added up over all processes -> list of floats, or of lists."""
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        total = torch.stack([torch.as_tensor(value).detach().to(self.device, exact) for value in values])
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """What every process calls `value`, anything that can be pickled -> a list of world_size of them."""
        parts = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(parts, value)
        return parts

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()

    def peak_memory(self):
        """Bytes: on a GPU the most its allocator has held, elsewhere the most this process has been; 0 if unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource  # not on Windows
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes

    def peak_flops(self):
        """Dense bf16 FLOP/s of this GPU by its datasheet, times the processes; None where we know no figure."""
        table = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12,
                 "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "A10G": 70e12, "RTX A6000": 155e12}  # fmt: skip
        known = [flops for name, flops in table.items() if re.search(rf"\b{name}\b", self.name)]
        other = self.dtype != torch.bfloat16 or re.search(r"MIG|Laptop|NVL|4090 D", self.name)  # slower relatives
        return known[0] * self.world_size if known and not other and self.device.type == "cuda" else None


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def shard(model, options, machine, entry="forward"):
    """With --shard, leaves each process its part of the weights, and so of their gradients and of Adam's moments:
    16 / processes bytes a parameter instead of 16 (torch's FSDP2). The weights of a layer are gathered when it
    computes, and let go of after it. Of the family only the 320M's twin with experts asks for it: 23 GB, and the next
    largest 8. A checkpoint is the same with and without. entry: the method by which the stage's losses are computed.

    To be called before the optimizers are made, for it puts other parameters, DTensors, in the place of the model's.
    """
    if options.shard and machine.world_size > 1:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # most of a second to import

        for layer in (*model.layers, model):  # the model last: what is left, the embedding among it
            fully_shard(layer)
        if entry != "forward":
            register_fsdp_forward_method(model, entry)


@contextmanager
def gathered(model):
    """Within it each process has the whole weights of a sharded model, 4 bytes a parameter, and can compute without
    the others: they may have more rows to validate, or longer answers to write."""
    parts = [part for part in model.modules() if hasattr(part, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)  # the model's own are needed to the end


def whole(tensor):
    """A tensor that may be sharded, whole; every process must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_like(tensor, p):
    """This process's part of a whole tensor, if the parameter p is sharded."""
    if not hasattr(p, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)  # None: all have it already


def collect(tensors):
    """{name: tensor} with all that are sharded whole, on the CPU, for the first process to save."""
    found = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            full = tensor.full_tensor()
            tensor = full.cpu() if dist.get_rank() == 0 else None  # else each process would hold them all
        found[name] = tensor
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Data folders


def read_meta(folder, kind="text"):
    """meta.json of a data folder. Raises ValueError for a folder that prepare_data.py did not finish, or that holds
    another kind of data."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise ValueError(f"{folder}: there is no {path}; python prepare_data.py SOURCE "
                         f"--kind={kind} --out={folder} makes one")  # fmt: skip
    try:
        meta = read_json(path)
        numbers = [meta["vocab_size"], meta["train"]["tokens"], meta["val"]["tokens"]]
        if meta["dtype"] not in ("uint16", "uint32") or not all(type(n) is int and n >= 0 for n in numbers):
            raise KeyError(f"dtype {meta['dtype']}, numbers {numbers}")
        if kind != "text" and not isinstance(meta.get("sizes"), dict):
            raise KeyError("sizes")
        labels = meta["labels"] if kind == meta.get("kind") == "labels" else ["", ""]
        if type(labels) is not list or len(labels) < 2 or not all(type(label) is str for label in labels):
            raise KeyError(f"labels {labels}")
        if (found := meta.get("kind", "text")) != kind:
            raise ValueError(f"{folder} holds --kind={found}, and this stage reads --kind={kind}")
        return meta | {"tokenizer_sha256": str(meta["tokenizer_sha256"])}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def hugging_face_config(model, tokenizer):
    """The config.json of a checkpoint: Hugging Face's DogeConfig fields. A model that transformers would compute
    differently (no q/k norm; experts, whose router mixes tokens there) must not open there, so its type is another."""
    config = model.config
    same = config.qk_norm and not config.is_moe
    fields = dataclasses.asdict(config)
    if factor := fields.pop("rope_factor"):
        context = config.max_position_embeddings
        fields["rope_scaling"] = dict(rope_type="dynamic", factor=factor, original_max_position_embeddings=context)
    ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    kind = dict(model_type="doge" if same else "nanodoge", architectures=["DogeForCausalLM"],
                torch_dtype=str(model.norm.weight.dtype).removeprefix("torch."))  # fmt: skip
    if model.labels:
        kind |= dict(architectures=["DogeForSequenceClassification"], id2label=dict(enumerate(model.labels)),
                     label2id={label: i for i, label in enumerate(model.labels)})  # fmt: skip
    return kind | fields | ids | dict(hidden_act="silu", hidden_dropout=0.0, attention_dropout=0.0)


def save_checkpoint(folder, model, tokenizer, state=None, fields=None, weights=None):
    """Writes model.safetensors, config.json, tokenizer.json and, if given, training_state.pt into `folder`. fields: of
    config.json, in place of what it would say. weights: what model.state_dict() says, of a sharded model (collect).

    The files must change together. They are written to folder/.saving, flushed to the disk, and the rename of that
    to .saved is the moment the checkpoint exists: a crash before it leaves the old files, a crash after it leaves a
    .saved folder that every reader looks into first and the next save moves into place.
    """
    folder = Path(folder)
    saving, saved = folder / ".saving", folder / ".saved"
    settle(folder)
    weights = {hf_name(name): w.detach().contiguous().cpu() for name, w in (weights or model.state_dict()).items()}
    stamp = {} if state is None else {"step": str(state["step"])}  # see load_training_state
    try:
        saving.mkdir(parents=True)
        save_file(weights, saving / "model.safetensors", metadata={"format": "pt"} | stamp)
        if state is not None:
            torch.save(state, saving / "training_state.pt")
        text = json.dumps(hugging_face_config(model, tokenizer) | (fields or {}), indent=2)
        (saving / "config.json").write_text(text, encoding="utf-8")
        tokenizer.save(saving)
        for path in [*saving.iterdir(), saving]:
            if path.is_file() or os.name == "posix":  # Windows cannot flush a folder
                flush(path)
    except (SafetensorError, RuntimeError, OSError) as error:  # the first two: what these libraries make of a full disk
        shutil.rmtree(saving, ignore_errors=True)
        there = checkpoint_file(folder, "config.json").is_file()
        before = "the one before it is whole" if there else "there is none yet"
        reason = error if isinstance(error, OSError) else f"{one_line(error)}; is the disk full?"
        raise OSError(f"cannot write a checkpoint to {folder} ({before}): {reason}") from None
    os.rename(saving, saved)
    settle(folder)


def flush(path):
    """Waits until a file or a folder is on the disk, where a power cut does not reach it."""
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(folder):
    """Finishes or undoes what an interrupted save left behind: a .saved folder is whole, a .saving folder is not."""
    saving, saved = Path(folder) / ".saving", Path(folder) / ".saved"
    if saved.is_dir() and not saved.is_symlink():  # a link would bring in somebody else's files
        for path in saved.iterdir():
            os.replace(path, Path(folder) / path.name)
        saved.rmdir()
    if saving.is_dir() and not saving.is_symlink():
        shutil.rmtree(saving)
    saving.unlink(missing_ok=True)  # none of ours


def clear(folder):
    """Removes a checkpoint, and nothing else, from a folder."""
    settle(folder)
    for name in "training_state.pt model.safetensors config.json tokenizer.json tokenizer_config.json".split():
        (Path(folder) / name).unlink(missing_ok=True)


def load_config(source):
    """The DogeConfig of a checkpoint: a folder, or a name on the hub. Raises ValueError, naming the file, for what is
    not one."""
    return inspect_checkpoint(locate(source)).config


def load_model(source, device="cpu", labels=None):
    """A checkpoint -> (model in eval mode, tokenizer). source: a folder, or a name on the hub, in any published layout
    (see layouts.py). labels: None for a language model; () for a classifier; names for a classifier of these, which a
    language model becomes, all labels being equally likely at first. Raises ValueError, naming the file and the tensor,
    for a checkpoint that is incomplete, damaged, or of the other kind."""
    folder = locate(source)
    checkpoint = inspect_checkpoint(folder)
    places = (checkpoint_file(folder, name).parent for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = Tokenizer.load(*places)  # two, if a crash came while settle was at work
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} ids, config.json "
                         f"{checkpoint.config.vocab_size}")  # fmt: skip
    has, wants = checkpoint.labels, checkpoint.labels if labels == () else tuple(labels or ())
    if (has and has != wants) or (labels is not None and not wants):
        what = "a classifier of " + ", ".join(has) if has else "a language model"
        asked = "a classifier of " + ", ".join(wants) if wants else "a language model" if has else "a classifier"
        raise ValueError(f"{folder} is {what}, and what is needed here is {asked}")
    with torch.device("meta"):
        model = Doge(checkpoint.config, wants)
    weights = read_weights(checkpoint, device)
    if wants and not has:
        weights.pop("lm_head.weight", None)
        weights["score.weight"] = torch.zeros(len(wants), checkpoint.config.hidden_size, device=device)
    model.load_state_dict(weights, assign=True)
    return model.eval(), tokenizer


def load_training_state(folder):
    """The dict that save_checkpoint got as `state`, or None if the folder has none. Nothing in it is executed. Raises
    ValueError if it is damaged, or of another step than the weights beside it, as after a copy that was cut off."""
    path = checkpoint_file(folder, "training_state.pt")
    if not path.is_file():
        return None
    state, step = read_pickle(path), None
    with suppress(SafetensorError, OSError):  # load_model says what is wrong with the weights
        with safe_open(checkpoint_file(folder, "model.safetensors"), framework="pt") as file:
            step = (file.metadata() or {}).get("step")
    if step is not None and step != str(state.get("step")):
        raise ValueError(f"{folder} is a mixture of two checkpoints: model.safetensors is of step {step}, "
                         f"training_state.pt of step {one_line(repr(state.get('step')))[:50]}; "
                         "copy it again, whole")  # fmt: skip
    return state


def load_run(folder):
    """load_training_state of a training run. Raises ValueError if it is not that of one."""
    state = load_training_state(folder)
    kinds = dict(options=dict, optimizer=dict, step=int, tokens=int, seconds=int | float, row=dict | None)
    for name, kind in kinds.items() if state is not None else ():
        value = state.get(name)
        whole = isinstance(value, kind) and (not isinstance(value, int | float) or 0 <= value < 2**62)
        if not whole or name == "optimizer" and not all(isinstance(entry, dict) for entry in value.values()):
            raise ValueError(f"{folder}/training_state.pt is not that of a training run: its {name} is "
                             f"{one_line(repr(value))[:50]}")  # fmt: skip
    return state


def optimizer_state(optimizers, names):
    """{parameter name: {quantity: tensor}} of all optimizers: by name, so that a model with more parameters (a MoE
    twin) can take it over. names = {parameter: its name}."""
    return {names[p]: collect(state) for optimizer in optimizers for p, state in optimizer.state.items()}


def load_optimizer_state(optimizers, names, state):
    """Gives every parameter that `state` knows its part of it back. The others start afresh, and so do those whose
    state another kind of optimizer left."""
    for optimizer in optimizers:
        muon = isinstance(optimizer, torch.optim.Muon)
        own = ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq", "step")
        for group in optimizer.param_groups:
            for p in (p for p in group["params"] if own[0] in state.get(names[p], ())):
                optimizer.state[p] = {}
                for k in own:  # the kernels do not look whether the shapes are right
                    v, shape = state[names[p]].get(k), () if k == "step" else p.shape
                    if not isinstance(v, torch.Tensor) or v.dtype != torch.float32:
                        raise ValueError(f"training_state.pt is damaged: it has no {k} of {names[p]} in float32")
                    if v.shape != shape:
                        raise ValueError(f"training_state.pt has {names[p]} of shape {list(v.shape)}, the model "
                                         f"{list(shape)}: they are not of one run")  # fmt: skip
                    # a step counter stays on the host, but for fused kernels, which read it themselves
                    v = v.to(p.device, copy=True) if v.dim() or group.get("fused") else v.clone()
                    optimizer.state[p][k] = part_like(v, p) if v.dim() else v


# ---------------------------------------------------------------------------------------------------------------------
# The log

COLUMNS = ("step tokens seconds loss lr grad_norm tokens_per_second mfu val_loss val_bpb memory").split()


class Log:
    """log.csv: one row a logged step, each flushed as it is written. A run that continues from step n drops the rows
    after n first, and a last line that was torn, so that no row is lost or doubled."""

    def __init__(self, path, last_step, columns=COLUMNS):
        self.path, self.columns = Path(path), columns
        rows = [row for row in read_log(path) if int(row["step"]) <= last_step] if self.path.is_file() else []
        rows = [{column: row.get(column, "") for column in columns} for row in rows]
        self.steps = {int(row["step"]) for row in rows}
        self.best = min((float(row["val_loss"]) for row in rows if row["val_loss"]), default=math.inf)
        temporary = self.path.with_name(self.path.name + ".new")
        temporary.unlink(missing_ok=True)  # a link would lead elsewhere
        self.append(temporary, "w", [dict(zip(columns, columns, strict=True)), *rows])
        os.replace(temporary, self.path)

    def append(self, path, mode, rows):
        try:
            with open(path, mode, newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerows(rows)
            flush(path)  # before the next checkpoint: one that survives a power cut then finds its rows
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk does not say where it is

    def write(self, row):
        self.append(self.path, "a", [row])
        self.steps.add(row["step"])


def read_log(path):
    """log.csv -> list of {column: text}, without a last line that a crash cut short. Raises ValueError for a file whose
    numbers are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
        rows = [row for row in rows if None not in row.values() and row.get("step", "").isdigit()]
        for row in rows:
            int(row["step"]), int(row.get("tokens") or 0), [float(value or 0) for value in row.values()]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}; move it away") from None
    return rows


def plot_loss(log_path, picture_path):
    """Draws training and validation loss over the tokens seen."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for column, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(int(row["tokens"]), float(row[column])) for row in read_log(log_path) if row.get(column)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=column, linewidth=1, markersize=3)
    axes.set(xlabel="tokens", ylabel="loss", title=str(Path(log_path).parent))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture_path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# A run


def carry_out(stage, options):
    """stage(options, machine), on the machine that the options ask for."""
    machine = Machine(options.device, options.dtype, options.patience)
    machine.print("options   " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(options).items()))
    try:
        stage(options, machine)
    finally:
        machine.close()


def try_out(machine, model, loss_of, options):
    """Runs one micro-batch forward and backward before anything counts, to learn what a step will cost and whether
    the model compiles here. loss_of(model) -> loss. Returns (the model or its compiled form, seconds, a line on which).

    Raises ValueError when the memory does not suffice: better now than at the first validation of the night.
    """

    def timed(candidate):
        seconds = 0.0
        for _ in range(2):  # the first pass also compiles and warms up
            start = time.perf_counter()
            loss_of(candidate).backward()
            machine.sum([0.0])  # waits for the device, and for the other processes
            seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return seconds

    line = "eager (--compile=on tries torch.compile)"
    try:
        by_itself = machine.device.type == "cuda" and not options.shard
        if options.compile == "on" or (options.compile == "auto" and by_itself):
            try:
                candidate = torch.compile(model)
                return candidate, timed(candidate), "torch.compile"
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what dynamo and inductor raise, a missing C++ compiler among it
                line = f"eager, since torch.compile failed here: {one_line(error)[:150]}"
        return model, timed(model), line
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        name = "batch_size" if hasattr(options, "batch_size") else "micro_tokens"
        raise ValueError(f"--{name}={getattr(options, name)}: out of memory; lower it, or --gradient_checkpointing=true"
                         ) from None  # fmt: skip


class Run:
    """One training run: where it stands, its log and its checkpoints. The loop stays the stage's own:

        with run:
            for step in run.steps():
                ... choose the rows of this step, divide them into micro-batches ...
                run.update(micro_batches, loss_of, tokens, lr)

    network: what the losses are computed with, the model itself or a module around it, compiled or not; run.network is
    that, made one with those of the other processes. evaluate() -> dict of log columns. milestones = {steps done:
    folder}: checkpoints kept beside the newest one. columns: names that a stage adds to the log.
    """

    def __init__(self, options, machine, model, network, tokenizer, optimizers, evaluate, flops_per_token,
                 milestones=None, columns=()):  # fmt: skip
        self.options, self.machine, self.model, self.tokenizer = options, machine, model, tokenizer
        several = machine.world_size > 1
        self.copies = several and not options.shard  # every process has a whole model, and they add up their gradients
        self.network = DistributedDataParallel(network, gradient_as_bucket_view=True) if self.copies else network
        self.columns = [*COLUMNS, *columns]
        self.optimizers, self.evaluate, self.flops_per_token = optimizers, evaluate, flops_per_token
        self.folder, self.milestones = Path(options.out_dir), milestones or {}
        self.names = {p: name for name, p in model.named_parameters()}
        self.step, self.tokens, self.seconds, self.row = 0, 0, 0.0, None  # step = how many are done
        self.log, self.fresh = None, True  # fresh: nothing saved yet
        # The order in which several processes add up gradients follows the first backward pass: one that does not
        # count, at every start, makes it the same in all steps that do, those after a --resume too.
        self.settling = several
        self.signal = self.stop = 0  # the signal this process got; the one all processes know of
        self.peak_flops = machine.peak_flops()
        # Reading the loss makes the host wait for the device, and for the other processes: not in every step then.
        self.reads_every_step = machine.device.type == "cpu" and machine.world_size == 1

    def restore(self, state):
        """Takes a training state up where it was left. (The weights come from load_model.)"""
        load_optimizer_state(self.optimizers, self.names, state["optimizer"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.row, self.fresh = state["row"], False
        row = self.row or dict(step=self.step, loss=0.0)
        if not {"step", "loss"} <= row.keys() <= set(self.columns) or row["step"] != self.step or not (
                isinstance(row["loss"], float) and all(isinstance(value, int | float | str) for value in row.values())
        ):  # fmt: skip
            raise ValueError(f"training_state.pt is damaged: the row of its step {self.step} is "
                             f"{one_line(repr(row))[:100]}")  # fmt: skip

    def state(self):
        options = {k: v for k, v in dataclasses.asdict(self.options).items() if not k.startswith("resume")}
        return dict(optimizer=optimizer_state(self.optimizers, self.names), step=self.step, tokens=self.tokens,
                    seconds=self.seconds, row=self.row, options=options)  # fmt: skip

    def __enter__(self):
        """Opens the log and starts to listen for Ctrl-C and SIGTERM, which end the run after a whole step."""
        if self.machine.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            settle(self.folder)
            if self.fresh and self.options.overwrite:  # from here on: what is left of the old run is not to be resumed
                (self.folder / "training_state.pt").unlink(missing_ok=True)
                clear(self.folder / "stable")
                clear(self.folder / "best")
            self.log = Log(self.folder / "log.csv", self.step or -1, self.columns)  # -1: a new run keeps no row
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        unlogged = bool(self.log and self.row and self.row["step"] not in self.log.steps)
        if self.machine.sum([unlogged])[0] and (self.is_due("log_every") or self.is_due("eval_every")):
            self.write_row()  # the run was killed between its checkpoint and the row of that step
        if self.fresh and isinstance(self.options, TuneOptions):
            self.row = dict(step=0, tokens=0)  # what the tuned model is to be compared with
            self.write_row()
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt  # the second time: at once
        self.signal = number
        self.machine.print("finishing this step, then saving (once more to stop at once)")

    def is_due(self, option):
        return self.step % getattr(self.options, option) == 0 or self.step == self.options.max_steps

    def steps(self):
        """Yields the numbers of the steps still to do, 0 .. max_steps - 1 in all, with a bar beside it."""
        hidden = None if self.machine.is_main else True  # None: shown on a terminal, and no litter in a file
        bar = tqdm(total=self.options.max_steps, initial=self.step, unit="step", disable=hidden, dynamic_ncols=True)
        with bar as self.bar:
            self.mark = time.perf_counter(), self.tokens
            while self.step < self.options.max_steps and not self.stop:
                yield self.step

    def update(self, batches, loss_of, tokens, lr, experts_only=False):
        """One step of the optimizers, and what is due after it.

        batches: this process's micro-batches, of which it has at least one. loss_of(batch) -> that micro-batch's share
        of the step's loss, such that the shares of all micro-batches of all processes add up to it; or (share, {column:
        share}), which add up in the same way to what the log shows. tokens: how many the step has, of all processes.
        experts_only: this step moves the groups that are `routed` and no others (see train.make_optimizers).
        """
        loss, norm, extra = self.move(batches, loss_of, lr, experts_only)
        self.end_step(tokens, loss, norm, lr, extra)

    def move(self, batches, loss_of, lr, experts_only=False):
        """Moves the weights once -> loss, gradient norm, {column: value}. For steps of several updates: all but the
        last are a move, the last is an update."""
        processes, loss, extra = self.machine.world_size, 0.0, {}
        if processes > 1 and self.settling:
            self.settling = False
            share = loss_of(batches[0])
            (share[0] if isinstance(share, tuple) else share).backward()
            self.model.zero_grad(set_to_none=True)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1  # gradients are exchanged once a step, but for shards, which hold only theirs
            with self.network.no_sync() if self.copies and not last else nullcontext():
                share = loss_of(batch)
                share, columns = share if isinstance(share, tuple) else (share, {})
                (share * processes).backward()  # the exchange takes the mean over the processes, and we want the sum
            loss = loss + share.detach()
            extra = {name: extra.get(name, 0.0) + value for name, value in columns.items()}
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.grad_clip or math.inf))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr if group["routed"] or not experts_only else 0.0
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss, norm, extra

    def end_step(self, tokens, loss, grad_norm, lr, extra):
        """Counts a step and does what is due after it, in this order: check, save, validate, log. Saving comes before
        validating, so that running out of memory there costs nothing. tokens: of all processes; loss and the values of
        extra: this process's shares. Raises ValueError when the numbers are not finite any more."""
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.bar.update()
        logs, saves = self.is_due("log_every") or self.is_due("eval_every"), self.is_due("save_every")
        milestone = self.milestones.get(self.step)
        must_stop = self.signal and self.machine.world_size == 1  # several processes agree at the next logged step
        if not (logs or saves or milestone or must_stop or self.reads_every_step):
            return
        loss, signals, *values = self.machine.sum([loss, float(self.signal), *extra.values()])
        self.stop = self.signal or (signal.SIGTERM if signals else 0)
        saves = saves or bool(self.stop)
        numbers = {"loss": loss, "gradient norm": float(grad_norm)}
        if saves or milestone:  # what is saved is good: weights that this step's loss does not depend on are asked too
            numbers["norm of the weights"] = float(whole(torch.nn.utils.get_total_norm(self.model.parameters())))
        if not all(math.isfinite(number) for number in numbers.values()):
            where = "nothing was saved yet" if self.fresh else f"{self.folder} holds the last good checkpoint"
            raise ValueError(", ".join(f"{name} {number}" for name, number in numbers.items()) +
                             f" at step {self.step}: stopped; {where}. A lower --learning_rate or a longer warm-up "
                             "usually cures this")  # fmt: skip
        if not (logs or saves or milestone):
            return
        (before, seen), now = self.mark, time.perf_counter()
        self.seconds += now - before
        speed = (self.tokens - seen) / (now - before)
        mfu = f"{self.flops_per_token * speed / self.peak_flops:.4f}" if self.peak_flops else ""
        self.row = dict(step=self.step, tokens=self.tokens, seconds=round(self.seconds, 2), loss=loss, lr=lr,
                        grad_norm=numbers["gradient norm"], tokens_per_second=round(speed), mfu=mfu,
                        memory=self.machine.peak_memory(), **dict(zip(extra, values, strict=True)))  # fmt: skip
        self.bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:,.0f}")
        if saves or milestone:
            self.save([milestone] * bool(milestone) + [self.folder] * saves, self.state())  # resumed, a run needs both
        self.fresh = self.fresh and not saves
        if logs:
            self.write_row()
        self.mark = time.perf_counter(), self.tokens

    def save(self, folders, state=None):
        """Saves the model in each of the folders. Every process must call it: each may have a part of the weights."""
        weights = collect(self.model.state_dict())
        for folder in folders if self.machine.is_main else []:
            save_checkpoint(folder, self.model, self.tokenizer, state, weights=weights)

    def write_row(self):
        """Completes the current row with a validation where one is due, and writes it."""
        row = dict(self.row)
        if self.is_due("eval_every"):
            with gathered(self.model):
                row |= self.evaluate()
            self.machine.print(f"step {row['step']:>6}  "
                               + "  ".join(f"{k} {row[k]:.4f}" for k in row if k == "loss" or k.startswith("val")))
        best = self.options.keep_best and self.log and row.get("val_loss", math.inf) < self.log.best
        if self.options.keep_best and self.machine.sum([bool(best)])[0]:  # what the first process finds
            self.save([self.folder / "best"])
        if self.log:
            self.log.best = row["val_loss"] if best else self.log.best
            self.log.write(row)

    def finish(self):
        """Draws the curve. Ends the process, after a line on how to go on, if it was a signal that ended the loop."""
        self.machine.barrier()
        if self.machine.is_main:
            plot_loss(self.folder / "log.csv", self.folder / "loss.png")
        if self.stop:
            self.machine.print(f"stopped and saved after step {self.step}; to go on: "
                               f"python {Path(sys.argv[0]).name} --out_dir={self.folder} --resume")  # fmt: skip
            sys.exit(128 + self.stop)
