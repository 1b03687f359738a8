"""A training run: its options, log, signals and checkpoints, so that it can be killed and resumed at any moment."""

import csv
import dataclasses
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nanodoge.checkpoint import (
    clear,
    flush,
    load_model,
    load_optimizer_state,
    load_run,
    optimizer_state,
    save_checkpoint,
    settle,
)
from nanodoge.layouts import checkpoint_file
from nanodoge.machine import Machine, collect, gathered, whole
from nanodoge.options import HERE, is_out_of_memory, one_line, parse_options, read_values


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
