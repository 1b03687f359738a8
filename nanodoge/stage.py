"""How a training stage starts and ends: its options, the model it tunes, one profiled step, and what it prints before
the first step and after the last one."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from model import Doge
from nanodoge.checkpoint import checkpoint_file, load_model, load_training_state
from nanodoge.data import check_tokenizer
from nanodoge.examples import Examples, TokenSet, open_sets
from nanodoge.machine import Machine, unsharded
from nanodoge.options import (
    HERE,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Whole,
    changed,
    check_ranges,
    is_out_of_memory,
    one_line,
    read_option,
    read_values,
)
from nanodoge.policy import write_answers
from nanodoge.run import Run, duration

# ---- Options


@dataclasses.dataclass
class RunOptions:
    """Every training stage."""

    data: str = ""  # folder made by prepare_data.py
    init_from: str = ""  # checkpoint folder, or name on the hub, to start from
    out_dir: str = ""  # where checkpoints, log.csv and loss.png go; empty = out/ and the name of the data
    overwrite: bool = False  # replace the run that out_dir holds
    resume: bool = False  # continue the run in out_dir as if it had never stopped
    resume_or_start: bool = False  # resume if out_dir holds a run, else start one: for jobs that restart themselves
    max_steps: Count = 8000  # optimizer steps in all
    learning_rate: NonNegative = 8e-3  # peak learning rate
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the hidden matrices, the rest stays with adamw
    beta1: Fraction = 0.9  # Adam: decay of the mean of the gradient
    beta2: Fraction = 0.95  # Adam: decay of the mean of its square
    weight_decay: NonNegative = 0.01  # of the matrices; A, the residual scales and the norms are not decayed
    grad_clip: NonNegative = 1.0  # largest gradient norm; 0 = no clipping
    seed: Annotated[int, Range(0, 2**63 - 1)] = 233  # of initial weights and data order (the original recipes' seed)
    log_every: Count = 10  # steps between rows of log.csv
    eval_every: Count = 100  # steps between validations
    save_every: Count = 100  # steps between checkpoints
    sample_tokens: Whole = 240  # longest sample printed at the end (a built-in story has about 180); 0 = none
    keep_best: bool = False  # also keep the model of the lowest val_loss, in OUT_DIR/best
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; weights stay in float32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on a GPU, without --shard
    gradient_checkpointing: bool = False  # recompute each block in the backward pass: less memory, a third more work
    shard: bool = False  # divide weights, gradients and moments over the ranks: for a model too large for one GPU
    patience: Annotated[int, Range(1, 10**6)] = 600  # seconds to wait for a rank that does not answer
    # What a resumed run may change: its cost, and where and how often it reports. The rest would make it another run.
    may_change: ClassVar[str] = """resume out_dir overwrite keep_best log_every eval_every save_every sample_tokens
        device dtype compile patience shard gradient_checkpointing"""

    def __post_init__(self):
        check_ranges(self)
        self.data = Path(self.data).as_posix()  # ./data/x is data/x
        self.out_dir = Path(self.out_dir or f"out/{Path(self.data).name}").as_posix()
        if self.init_from and not self.resume:
            source = Path(self.init_from).resolve()
            if Path(self.out_dir).resolve() in [source, *source.parents]:
                advice = "give the new run another folder"
                raise ValueError(f"--out_dir={self.out_dir} holds --init_from={self.init_from}: {advice}")


@dataclasses.dataclass
class TuneOptions(RunOptions):
    """Tuning. The model's shape, tokenizer and chat template are the checkpoint's."""

    init_from: str = "out/stories"  # checkpoint folder of the model to tune
    epochs: Positive = 2.0  # passes over the data
    max_steps: Whole = 0  # optimizer steps in all; 0 = as many as the epochs take
    batch_size: Count = 128  # conversations, pairs or problems per step, over all ranks and micro-batches
    micro_batch_tokens: Count = 16384  # tokens that a rank computes at once, with padding: as many as its memory holds
    sequence_length: Whole = 0  # longest sequence in tokens (T); 0 = the model's max_position_embeddings
    learning_rate: NonNegative = 8e-4  # peak learning rate
    warmup: Fraction = 0.1  # share of the steps in which the rate rises; then half a cosine down to a tenth of it
    freeze_embeddings: bool = False  # so that words which the data has not are not unlearned
    eval_size: Count = 1000  # conversations, pairs or problems of a validation, always the first ones
    first: ClassVar[str] = """init_from data out_dir resume epochs max_steps learning_rate batch_size
        micro_batch_tokens device"""
    may_change: ClassVar[str] = RunOptions.may_change + " eval_size micro_batch_tokens"


# Options under the names that older training states have.
RENAMED = {"batch_size": "micro_batch_size", "batch_rows": "batch_size", "micro_tokens": "micro_batch_tokens"}
RENAMED |= {"eval_rows": "eval_size", "rollout_rows": "slots"}


def read_run_options(cls: type, argv: list[str], inherited: Callable | None = None) -> Any:
    """The options of a run: the class's defaults, then its recipe (in config/) if argv names no config file, then
    argv; with --resume those of the run in out_dir. inherited(--init_from): the options that a new run takes over from
    a checkpoint, in place of the recipe."""
    from_files, from_line = read_values(cls, argv, default_config=HERE / "config" / cls.recipe)
    asked = from_files | from_line
    out = Path(asked.get("out_dir") or f"out/{Path(asked.get('data') or cls.data).name}").as_posix()
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"--out_dir={out} is not a folder")
    for name in ("resume", "resume_or_start"):
        if asked.get(name) and asked.get("overwrite"):
            raise ValueError(f"--overwrite replaces the run in --out_dir={out}, --{name} goes on with it: choose one")
    files = ("training_state.pt", "model.safetensors", "config.json")
    can_resume, *others = (checkpoint_file(out, name).is_file() for name in files)
    if asked.get("resume") or (asked.get("resume_or_start") and can_resume):
        return resumed_options(cls, from_line, out)
    if inherited and asked.get("init_from"):
        from_files = inherited(asked["init_from"]) | read_values(cls, argv)[0]
    options = cls(**from_files | from_line)
    if (can_resume or any(others)) and not options.overwrite:
        advice = "--resume goes on with it, --overwrite replaces it, or choose another folder"
        raise ValueError(f"--out_dir={out} holds a run already: {advice}")
    return options


def resumed_options(cls: type, from_line: dict[str, Any], out: str) -> Any:
    """The options of the run in the folder `out`, with those of `cls.may_change` that the command line names; a config
    file only tells where the run is."""
    if not (state := load_training_state(out)):
        raise ValueError(f"--resume: there is no run to go on with in --out_dir={out}")
    if (saved := saved_options(cls, state)) is None:
        raise ValueError(f"--resume: the run in {out} is of another stage, or of a newer version")
    options = cls(**saved | from_line | dict(out_dir=out, resume=True))
    for name, before in saved.items():
        if name not in cls.may_change.split() and (value := getattr(options, name)) != before:
            advice = "a resumed run cannot change it (--init_from starts a new run from its weights)"
            raise ValueError(f"--{name}={value}: the run in {out} has {before}; {advice}")
    return options


def saved_options(cls: type, state: dict) -> dict[str, Any] | None:
    """The options in a training state, by their names in `cls`; None if it is that of another stage."""
    names, saved = {field.name for field in dataclasses.fields(cls)}, {}
    for name, value in state["options"].items():
        name = name if name in names else RENAMED.get(name, name)
        if name not in names:
            return None
        saved[name] = read_option(cls, name, value, f"{name} of the run")
    return saved


# ---- Start


def run_stage(stage: Callable[[Any, Machine], None], options: RunOptions) -> None:
    """Calls stage(options, machine) on the machine that the options ask for."""
    machine = Machine(options.device, options.dtype, options.patience)
    try:
        stage(options, machine)
    finally:
        machine.close()


def start_tuning(
    options: TuneOptions, machine: Machine, kind: str, select: Callable[[TokenSet, Any], Examples]
) -> tuple[Doge, dict | None, Examples, Examples]:
    """The model to tune, on the device; the training state of a resumed run, else None; and what `select` takes of the
    training and of the validation set. Resolves sequence_length and max_steps. Sequences longer than the model's
    context make it a model of that context."""
    folder = options.out_dir if options.resume else options.init_from
    *sets, _ = open_sets(options.data, kind)
    model, own = load_model(folder, labels=tuple(sets[0].meta["labels"]) if kind == "labels" else None)
    check_tokenizer(own, options.data, source=folder)
    options.sequence_length = options.sequence_length or model.config.max_position_embeddings
    model.config.max_position_embeddings = max(options.sequence_length, model.config.max_position_embeddings)
    if (limit := options.micro_batch_tokens) < options.sequence_length:
        raise ValueError(f"--micro_batch_tokens={limit} is less than one sequence of {options.sequence_length}")
    data, val = (select(token_set, options) for token_set in sets)
    if options.batch_size < machine.world_size:
        raise ValueError(f"--batch_size={options.batch_size}: each of {machine.world_size} processes needs an example")
    options.max_steps = options.max_steps or math.ceil(options.epochs * data.count / options.batch_size)
    model.gradient_checkpointing = options.gradient_checkpointing
    model.embed_tokens.requires_grad_(not options.freeze_embeddings)
    state = load_training_state(folder) if options.resume else None
    return model.train().to(machine.device), state, data, val


def good_steps(tokens: int, batch_tokens: int) -> int:
    """The steps of a run on a text of so many tokens: six epochs, after which the tiny model overfits
    (NOTES.md), between 20 steps and what takes minutes on a CPU."""
    return max(20, math.ceil(min(6 * tokens, 2_457_600) / batch_tokens))


def count_phases(options: Any) -> None:
    """Resolves the phases of train.py's options, those below 1 being shares of max_steps. Raises ValueError for phases
    that do not fit."""
    for name in ("warmup_steps", "decay_steps", "copy_steps", "moe_warmup_steps"):
        value = getattr(options, name)
        steps = round(value * options.max_steps) if 0 < value < 1 else int(value)
        if value > 1 and value != steps:
            raise ValueError(f"--{name}={value} is neither a share below 1 nor a whole number of steps")
        setattr(options, name, steps)
    if options.warmup_steps + options.decay_steps > options.max_steps:
        phases = f"--warmup_steps={options.warmup_steps} and --decay_steps={options.decay_steps}"
        advice = "shares, such as --decay_steps=0.2, fit any number"
        raise ValueError(f"{phases} do not fit into --max_steps={options.max_steps}: {advice}")


def announce(
    run: Run,
    loss_of: Callable,
    micro_batches: float,
    lines: dict[str, str],
    size_option: str = "micro_batch_tokens",
    more_seconds: float = 0.0,
) -> None:
    """Tries a micro-batch and prints, before the first step, what is going to happen, on what, and at what cost.

    loss_of(network): the loss of the largest micro-batch. micro_batches: how many of that size a rank computes in the
    run. lines: the stage's own, by their labels. size_option: what to lower when memory does not suffice.
    more_seconds: what else the run takes.
    """
    options, machine, parameters = run.options, run.machine, sum(p.numel() for p in run.model.parameters())
    seconds, compile_note = profile_step(run, loss_of, size_option)
    moments = 0 if run.begin_from else 8 * parameters / (machine.world_size if options.shard else 1)
    memory = machine.peak_memory() + moments  # Adam's, which are made in the first step
    c, source = run.model.config, f", from {options.init_from}" if options.init_from else ""
    experts = f", {c.num_experts_per_tok} of {c.num_experts:,} experts per token" if c.is_moe else ""
    attention = "causal scaled_dot_product_attention, scores folded into the keys"
    if options.sequence_length > c.keep_window_size:
        attention += f"; beyond {c.keep_window_size:,} tokens, chunks of live keys"
    if c.attention == "definition":
        attention = "by definition, every query with every key: slow"
    left = max(0, options.max_steps - run.step)  # a resumed run has fewer steps to do
    time_needed = duration((seconds * micro_batches + more_seconds) * left / options.max_steps)
    common = {
        "options": changed(options) or "as --help shows them",
        "model": f"{parameters:,} parameters, {c.num_hidden_layers} layers of {c.hidden_size}{experts}{source}",
        **lines,
        "attention": attention,
        "device": f"{machine.summary}; {compile_note}",
        "cost": f"{left:,} steps, at most about {time_needed}, {memory / 1e9:.2g} GB per process",
    }
    for label, text in common.items():
        machine.print(f"{label:<9} {text}")


def profile_step(run: Run, loss_of: Callable, size_option: str) -> tuple[float, str]:
    """The seconds of a micro-batch, forward and backward, and whether it is compiled. run.network is the model from
    here on compiled where that is asked for and works, and in DDP if there are several ranks. Raises ValueError naming
    `size_option` when memory does not suffice: better now than at the first validation."""
    options, machine, eager = run.options, run.machine, run.network

    def timed(network: nn.Module) -> float:
        for _ in range(2):  # the first pass also compiles and warms up
            start = time.perf_counter()
            loss_of(network).backward()
            machine.sum([0.0])  # waits for the device and the other ranks
            seconds = time.perf_counter() - start
        network.zero_grad(set_to_none=True)
        return seconds

    seconds, compile_note = None, "eager (--compile=on tries torch.compile)"
    try:
        is_usual = machine.device.type == "cuda" and not options.shard
        if options.compile == "on" or (options.compile == "auto" and is_usual):
            try:
                run.network, compile_note = torch.compile(eager), "torch.compile"
                seconds = timed(run.network)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # of dynamo and inductor; a missing C++ compiler is one
                run.network, compile_note = eager, f"eager, since torch.compile failed here: {one_line(error)[:150]}"
        seconds = seconds or timed(run.network)
        if machine.world_size > 1 and not options.shard:
            # No broadcast of buffers: they are constants, and in a validation the ranks may have different numbers of
            # batches, so that a collective would hang. (torch 2.9 lacks the argument that replaces this one.)
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            run.network = DistributedDataParallel(run.network, gradient_as_bucket_view=True, broadcast_buffers=False)
            # DDP adds up gradients in an order that follows the first backward pass. With one at every start it is the
            # same in all steps that count, also after a --resume.
            loss_of(run.network).backward()
            run.network.zero_grad(set_to_none=True)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "out of memory; lower it, or --gradient_checkpointing=true"
        raise ValueError(f"--{size_option}={getattr(options, size_option)}: {advice}") from None
    return seconds, compile_note


# ---- End


def print_answer(options: TuneOptions, machine: Machine, model: Doge, val: Examples) -> None:
    """Prints how the tuned model answers the first held-out example. Every rank must call it."""
    if not options.sample_tokens:
        return
    tokenizer, (ids, mask) = val.set.tokenizer, val.rows(0)[0]
    prompt = ids[: np.flatnonzero(~mask)[-1] + 1]  # up to the last answer; of a problem, all of it
    if model.labels:
        with torch.no_grad(), unsharded(model), machine.autocast():
            logits = model(*machine.to_device(torch.from_numpy(prompt)[None]))[0][0, -1]
        text = model.labels[int(logits.argmax())]
        more = f'AutoModelForSequenceClassification.from_pretrained("{options.out_dir}") of transformers'
    else:
        [answer] = write_answers(machine, model, tokenizer, [prompt.tolist()], options.sample_tokens)
        text, more = tokenizer.decode(answer), f"python sample.py {options.out_dir} --chat"
    text = f"{tokenizer.decode(prompt)}{{+{text}+}}"
    machine.print(f"\nThe model is in {options.out_dir}. It answers a held-out example:\n\n{text}\n\nMore: {more}")
