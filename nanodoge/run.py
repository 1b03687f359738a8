"""A training run: its log, progress bar, signals, checkpoints and validations. Forward and backward are the stage's.

A run can be killed at any moment and resumed as if nothing had happened. The order of the data is a pure
function of (seed, step), so the state of a run is its weights, its optimizer and its step number.
"""

import csv
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from model import Doge
from nanodoge import checkpoint
from nanodoge.card import write_card
from nanodoge.machine import Machine, full_state_dict, full_tensor, unsharded
from nanodoge.options import one_line
from nanodoge.tokenizer import Tokenizer

COLUMNS = ("step tokens seconds loss lr grad_norm tokens_per_second mfu val_loss val_bpb memory_mb").split()


class Log:
    """log.csv: one row per logged step, flushed as it is written. A run that continues from step n first drops the rows
    after n, and a last line that a crash cut short."""

    def __init__(self, path: str | Path, last_step: int, columns: list[str] = COLUMNS):
        self.path, self.columns = Path(path), columns
        rows = read_log(path) if self.path.is_file() else []
        rows = [{name: row.get(name, "") for name in columns} for row in rows if int(row["step"]) <= last_step]
        self.steps = {int(row["step"]) for row in rows}
        self.best = min((float(row["val_loss"]) for row in rows if row["val_loss"]), default=math.inf)
        new = self.path.with_name(self.path.name + ".new")
        new.unlink(missing_ok=True)  # a link would lead to another file
        self.append(new, "w", [dict(zip(columns, columns, strict=True)), *rows])
        os.replace(new, self.path)

    def append(self, path: Path, mode: str, rows: list[dict]) -> None:
        try:
            with open(path, mode, newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerows(rows)
            checkpoint.flush(path)  # before the next checkpoint: one that survives a power cut then finds its rows
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk does not say where it is

    def write(self, row: dict) -> None:
        self.append(self.path, "a", [row])


def read_log(path: str | Path) -> list[dict[str, str]]:
    """The rows of log.csv, without a last line that a crash cut short. Raises ValueError where numbers are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
        rows = [row for row in rows if None not in row.values() and row.get("step", "").isdigit()]
        for row in rows:
            int(row["step"]), int(row.get("tokens") or 0), [float(value or 0) for value in row.values()]
        return rows
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}; move it away") from None


def plot_loss(log_path: Path, picture_path: Path) -> None:
    """Draws training and validation loss over the tokens seen, that of copy steps by itself, on a shaded part."""
    from matplotlib.figure import Figure  # without pyplot, whose backend belongs to the notebook that calls a stage

    axes = (figure := Figure(figsize=(8, 5))).subplots()
    labels = dict(loss="loss of all tokens", val_loss="validation loss", copy_loss="copy_loss: copies only")
    for (column, label), style in zip(labels.items(), ("-", "o-", "."), strict=True):
        points = [(int(row["tokens"]), float(row[column])) for row in read_log(log_path) if row.get(column)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
        if points and column == "copy_loss":
            axes.axvspan(0, points[-1][0], alpha=0.1, label="copy steps, mixed with others")
    axes.set(xlabel="tokens", ylabel="loss", title=str(Path(log_path).parent))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture_path, dpi=120, bbox_inches="tight")


def duration(seconds: float) -> str:
    """45 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(eq=False)
class Run:
    """Where a run stands, its log and its checkpoints in options.out_dir."""

    options: Any  # of the stage: a RunOptions
    machine: Machine
    model: Doge
    network: nn.Module  # computes the losses: the model or a module around it, compiled, in DDP; see profile_step
    tokenizer: Tokenizer
    optimizers: list[torch.optim.Optimizer]
    evaluate: Callable[[], dict[str, float]]  # a validation, as columns of the log
    flops_per_token: float
    begin_from: dict | None  # a training state: of this run, if it is resumed, else of the checkpoint it starts from
    columns: Iterable[str] = ()  # of the log, beside COLUMNS
    evaluate_first: bool = True  # a validation before the first step
    milestones: dict[int, Path] = field(default_factory=dict)  # {steps done: folder of a checkpoint to keep}
    extra_state: dict = field(default_factory=dict)  # saved with every checkpoint

    def __post_init__(self) -> None:
        self.folder, self.peak_flops = Path(self.options.out_dir), self.machine.peak_flops()
        self.columns = list(dict.fromkeys([*COLUMNS, *self.columns]))  # each once
        self.names = {p: name for name, p in self.model.named_parameters()}
        self.step, self.tokens, self.seconds, self.row = 0, 0, 0.0, None  # step: how many are done
        self.log, self.fresh, self.warned = None, True, False  # fresh: nothing saved yet
        self.began = time.perf_counter(), 0  # when this process began, with which step
        self.signal = self.stop = 0  # the signal this rank got; the one that all ranks know of
        # Reading the loss synchronises a GPU and the ranks, so it is not read in every step there.
        self.reads_every_step = self.machine.device.type == "cpu" and self.machine.world_size == 1
        if self.begin_from:
            checkpoint.load_optimizer_state(self.optimizers, self.names, self.begin_from["optimizer"])
            if self.options.resume:
                self.restore(self.begin_from)

    # ---- State

    def restore(self, state: dict) -> None:
        """Continues from a training state; the weights come from load_model. Raises ValueError if it is damaged."""
        self.step, self.tokens, self.seconds, self.fresh = state["step"], state["tokens"], state["seconds"], False
        row = {name: value for name, value in (state["row"] or {}).items() if name in self.columns}
        numbers = all(isinstance(value, int | float) for name, value in row.items() if name != "mfu")
        if row and (row.get("step") != self.step or not numbers):
            text = one_line(repr(row))[:100]
            raise ValueError(f"training_state.pt is damaged: the row of its step {self.step} is {text}")
        self.row = row or None

    def state(self) -> dict:
        options = {k: v for k, v in dataclasses.asdict(self.options).items() if not k.startswith("resume")}
        optimizer = checkpoint.optimizer_state(self.optimizers, self.names)
        where = dict(step=self.step, tokens=self.tokens, seconds=self.seconds, row=self.row)
        return dict(optimizer=optimizer, options=options) | where | self.extra_state

    def save(self, *folders: Path, state: dict | None = None) -> None:
        """Saves the model in each folder. Every rank must call it: each may hold a part of the weights."""
        weights = full_state_dict(self.model.state_dict())
        for folder in folders if self.machine.is_main else ():
            checkpoint.save_checkpoint(folder, self.model, self.tokenizer, state, weights=weights)

    # ---- Begin and end

    def __enter__(self) -> "Run":
        """Opens the log, and lets Ctrl-C and SIGTERM end the run after a whole step."""
        if self.machine.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.finish_interrupted_save(self.folder)
            if self.fresh and self.options.overwrite:  # no part of the old run may be resumed
                (self.folder / "training_state.pt").unlink(missing_ok=True)
                checkpoint.clear(self.folder / "stable")
                checkpoint.clear(self.folder / "best")
            self.log = Log(self.folder / "log.csv", self.step or -1, self.columns)  # -1: a new run keeps no row
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        unlogged = bool(self.log and self.row and self.row["step"] not in self.log.steps)
        if self.machine.sum([unlogged])[0] and (self.is_due("log_every") or self.is_due("eval_every")):
            self.write_row()  # the run was killed between its checkpoint and the row of that step
        if self.fresh and self.evaluate_first:
            self.row = dict(step=0, tokens=0)
            self.write_row()
        return self

    def __exit__(self, error_type: type | None, *error: Any) -> None:
        """Draws the loss curve and writes the model card. If a signal ended the loop, says how to go on, and exits."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if error_type:
            return
        self.machine.barrier()
        if self.machine.is_main:
            plot_loss(self.folder / "log.csv", self.folder / "loss.png")
            if not self.stop:
                write_card(self, read_log(self.folder / "log.csv"))
        if self.stop:
            again = f"python {Path(sys.argv[0]).name} --out_dir={self.folder} --resume"
            self.machine.print(f"stopped and saved after step {self.step}; to go on: {again}")
            sys.exit(128 + self.stop)

    def on_signal(self, number: int, frame: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt  # the second time: at once
        self.signal = number
        self.machine.print("finishing this step, then saving (once more to stop at once)")

    # ---- One step

    def steps(self) -> Iterator[int]:
        """The numbers of the steps still to do, 0 .. max_steps - 1 in all, with a progress bar."""
        hidden = None if self.machine.is_main else True  # None: only on a terminal
        bar = tqdm(total=self.options.max_steps, initial=self.step, unit="step", disable=hidden, dynamic_ncols=True)
        with bar as self.bar:
            self.mark, self.began = (time.perf_counter(), self.tokens), (time.perf_counter(), self.step)
            while self.step < self.options.max_steps and not self.stop:
                yield self.step

    def micro_batches(self, batches: list) -> Iterator[Any]:
        """This rank's micro-batches of a step, at least one. DDP exchanges gradients during the last one's backward."""
        for i, batch in enumerate(batches):
            if hasattr(self.network, "require_backward_grad_sync"):  # DDP; what its no_sync() sets
                self.network.require_backward_grad_sync = i == len(batches) - 1
            yield batch

    def backward(self, loss: Tensor) -> Tensor:
        """Adds the gradients of this micro-batch's share of the step's loss, and returns the share, detached. DDP and
        FSDP average gradients over the ranks, and we want their sum: hence the factor."""
        (loss * self.machine.world_size).backward()
        return loss.detach()

    def is_due(self, option: str) -> bool:
        return self.step % getattr(self.options, option) == 0 or self.step == self.options.max_steps

    def end_step(
        self, loss: Tensor, grad_norm: Tensor, lr: float, tokens: int, name: str = "loss", **columns: Tensor
    ) -> None:
        """Counts a step; checks, saves, validates and logs where that is due. It saves first, so that a validation that
        runs out of memory costs nothing. Raises ValueError when the numbers are not finite.

        loss and columns: this rank's shares, whose sums over all ranks are logged. tokens: of all ranks. name: the
        loss's column.
        """
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.bar.update()
        logs, saves = self.is_due("log_every") or self.is_due("eval_every"), self.is_due("save_every")
        milestone = self.milestones.get(self.step)
        must_stop = self.signal and self.machine.world_size == 1  # several ranks agree at the next logged step
        if not (logs or saves or milestone or must_stop or self.reads_every_step):
            return
        loss, signals, *values = self.machine.sum([loss, float(self.signal), *columns.values()])
        self.stop = self.signal or (signal.SIGTERM if signals else 0)
        saves = saves or bool(self.stop)
        self.check_finite(loss, float(grad_norm), weights=bool(saves or milestone))
        if float(grad_norm) == 0:
            advice = "look at what is marked as a target; bfloat16 may round to 0 (--dtype=float32)"
            self.warn(f"the gradient of step {self.step} is exactly 0, so nothing is learned. If it stays so: {advice}")
        if not (logs or saves or milestone):
            return
        (before, seen), now = self.mark, time.perf_counter()
        self.seconds += now - before
        speed = (self.tokens - seen) / (now - before)
        mfu = f"{self.flops_per_token * speed / self.peak_flops:.4f}" if self.peak_flops else ""
        where = dict(step=self.step, tokens=self.tokens, seconds=round(self.seconds, 2))
        values = dict(zip(columns, values, strict=True))
        self.row = where | {name: loss} | dict(lr=lr, grad_norm=float(grad_norm), tokens_per_second=round(speed))
        self.row |= dict(mfu=mfu, memory_mb=round(self.machine.peak_memory() / 1e6), **values)
        self.bar.set_postfix({name: f"{loss:.3f}", "tokens_per_s": f"{speed:,.0f}"})
        if saves or milestone:
            self.save(*[milestone] * bool(milestone), *[self.folder] * saves, state=self.state())  # a resume needs both
        self.fresh = self.fresh and not saves
        if logs:
            self.write_row()
        self.mark = time.perf_counter(), self.tokens

    def warn(self, text: str) -> None:
        """Prints, once in a run, that a step learns nothing, and what to do."""
        if not self.warned:
            self.machine.print(f"warning: {text}")
        self.warned = True

    def time_left(self) -> str:
        """How long the other steps take at the mean speed of this process, validations included; "" if unknown."""
        (start, first), left = self.began, self.options.max_steps - self.step
        seconds = (time.perf_counter() - start) / max(self.step - first, 1) * left
        return f"  about {duration(seconds)} left" if left > 0 and self.step > first else ""

    def check_finite(self, loss: float, grad_norm: float, weights: bool) -> None:
        """weights: check them too, before they are saved, since this step's loss may not depend on all of them."""
        numbers = {"loss": loss, "gradient norm": grad_norm}
        if weights:
            numbers["norm of the weights"] = float(full_tensor(torch.nn.utils.get_total_norm(self.model.parameters())))
        if not all(math.isfinite(number) for number in numbers.values()):
            found = ", ".join(f"{name} {number}" for name, number in numbers.items())
            where = "nothing was saved yet" if self.fresh else f"{self.folder} holds the last good checkpoint"
            advice = "A lower --learning_rate or a longer warm-up usually cures this"
            raise ValueError(f"{found} at step {self.step}: stopped; {where}. {advice}")

    def write_row(self) -> None:
        """Completes the current row with a validation where one is due, keeps the best model, writes the row."""
        row = dict(self.row)
        if self.is_due("eval_every"):
            with unsharded(self.model):
                row |= self.evaluate()
            shown = "  ".join(f"{k} {row[k]:.4f}" for k in row if k.endswith("loss") or k.startswith("val"))
            self.machine.print(f"step {row['step']:>6}  {shown}{self.time_left()}")
        best = self.log and row.get("val_loss", math.inf) < self.log.best
        if self.options.keep_best and self.machine.sum([bool(best)])[0]:  # rank 0 decides
            self.save(self.folder / "best")
        if self.log:
            if row.get("val_loss", 0) > 1.005 * self.log.best:
                advice = "the model learns its text by heart: more text or fewer --max_steps help, --keep_best"
                self.machine.print(f"val_loss has risen from {self.log.best:.4f}; {advice} keeps the best")
            self.log.best = row["val_loss"] if best else self.log.best
            self.log.write(row)
