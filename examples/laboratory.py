"""What examples/experiments.py stands on: a small model, the loop, the table of the runs, its picture."""

import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare_data
from model import Doge, DogeConfig, visible
from nanodoge.attention import key_scores
from nanodoge.data import Sequences, load_tokenizer, token_bytes
from nanodoge.machine import Machine
from nanodoge.measure import append_csv
from train import TrainOptions, evaluate, make_optimizers, optimizer_step, rows_of_step, wsd

T, W, BATCH = 256, 64, 8  # tokens per sequence, a window of a quarter of it, sequences per step
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
RATE = 6e-3  # peak learning rate, where the experiment is not about it


class Lab:
    """The data of an experiment and the table of its runs."""

    def __init__(self, name: str, options: Any):
        self.options, self.steps, self.machine = options, options.max_steps, Machine("cpu", "float32", 60)
        self.path = Path(options.out) / f"{name}.csv"
        self.rows = list(csv.DictReader(self.path.open(encoding="utf-8"))) if self.path.is_file() else []
        if other := {row["max_steps"] for row in self.rows} - {str(self.steps)}:
            raise ValueError(f"--max_steps={self.steps}: {self.path} has runs of {min(other)}; choose another --out")

    def text(self, source: str) -> Sequences:
        """The text of a SOURCE of prepare_data.py, in tokens of one tokenizer, which is trained on stories and text."""
        folder = Path(self.options.data) / Path(self.options.text).stem  # another text has another tokenizer
        both, name = folder / "both", Path(source).stem
        common = dict(stories=5000, vocab_size=1024, piece_chars=8192)
        if not both.is_dir():
            self.prepare(["stories", self.options.text], both, tokens=1_000_000, **common)
        if not (folder / name).is_dir():
            self.prepare([source], folder / name, tokenizer=str(both), **common)
        return Sequences(folder / name, "train", T)

    def prepare(self, sources: list[str], out: Path, **options) -> None:
        prepare_data.prepare(prepare_data.PrepareOptions(sources, str(out), **options), quiet=True)

    def bpb(self, model: Doge, source: str) -> float:
        """Bits per byte on the held-out part of a text."""
        folder = self.text(source).path.parent
        options = TrainOptions(data=str(folder), micro_batch_size=BATCH, eval_tokens=16384)
        bytes_of = token_bytes(load_tokenizer(folder))
        return evaluate(model, Sequences(folder, "val", T), bytes_of, self.machine, options)["val_bpb"]

    def batches(self, source: str, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """step -> tokens, targets (B, T)."""
        data = self.text(source)
        return lambda step: data.batch(rows_of_step(step, data.count, BATCH, seed))

    def model(self, seed: int, optimizer: str = "adamw", **shape) -> "Learner":
        """A new model and its optimizers."""
        torch.manual_seed(seed)
        shape = SHAPE | dict(vocab_size=1024, max_position_embeddings=T, keep_window_size=T) | shape
        return self.learner(Doge(DogeConfig(**shape)), optimizer)

    def learner(self, model: Doge, optimizer: str = "adamw") -> "Learner":
        return Learner(model, make_optimizers(model, TrainOptions(optimizer=optimizer), self.machine))

    def run(self, seed: int, variant: str, source: str, start: Callable[[], "Learner"], **fit) -> None:
        """Trains a copy of what start() returns (see Learner.fit); writes the rows, unless the table has this run."""
        run = dict(seed=seed, variant=variant, data=Path(source).stem, max_steps=self.steps)
        if not self.find(**run):
            rows = [run | row for row in copy.deepcopy(start()).fit(**fit)]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_csv(str(self.path), list(rows[0]), *rows)
            self.rows += [{name: str(value) for name, value in row.items()} for row in rows]
            print(*(f"{name} {value:.4g}" if isinstance(value, float) else value for name, value in rows[-1].items()))

    def find(self, **run) -> list[dict[str, str]]:
        """The rows of the table with these values."""
        return [row for row in self.rows if all(row[name] == str(value) for name, value in run.items())]


@dataclass
class Learner:
    """A model and the optimizers that know its parameters. A deep copy of it is a branch."""

    model: Doge
    optimizers: list[torch.optim.Optimizer]

    def fit(
        self,
        batch: Callable[[int], tuple[Tensor, Tensor]],  # step -> tokens, targets
        rate: Callable[[int], float],  # step -> learning rate
        steps: int,
        measure: Callable[[Doge], dict[str, float]],
        measurements: int = 4,  # beside the first, before any step; the last one is after the last step
        first: int = 0,
    ) -> list[dict]:
        """The loop of train.py. Returns what `measure` finds on the way, with the seconds of CPU time of training."""
        rows, seconds = [dict(steps=steps, step=first, seconds=0.0, loss="") | measure(self.model)], 0.0
        for step in range(first, steps):
            start = time.process_time()
            loss = self.model(*batch(step))[1]
            loss.backward()
            optimizer_step(self.model, self.optimizers, rate(step), grad_clip=1.0)
            seconds += time.process_time() - start
            if (steps - step - 1) % max(1, steps // measurements) == 0:
                row = dict(steps=steps, step=step + 1, seconds=round(seconds, 2), loss=loss.item())
                rows.append(row | measure(self.model))
        return rows


def schedule(steps: int, warmup: float = 0.1, decay: float = 0.2, rate: float = RATE) -> Callable[[int], float]:
    """train.py's Warmup-Stable-Decay: phases are shares of `steps`."""
    return lambda step: rate * wsd(step, steps, round(warmup * steps), round(decay * steps))


# ---- Models


@torch.no_grad()
def scores(model: Doge, tokens: Tensor) -> list[Tensor]:
    """The scores s (B, K, T) of the keys, one tensor per layer."""
    found, parts = [], [layer.self_attn for layer in model.layers]
    hooks = [part.dt_proj.register_forward_hook(lambda module, x, dt: found.append(dt.mT)) for part in parts]
    model(tokens)
    [hook.remove() for hook in hooks]
    return [key_scores(part.A[:, None], dt) for part, dt in zip(parts, found, strict=True)]


def mask_numbers(model: Doge, tokens: Tensor) -> dict[str, float]:
    """Mean |A|, and the share of the keys which the last query sees that lie before its last W positions."""
    window, A = model.config.keep_window_size, torch.stack([layer.self_attn.A for layer in model.layers])
    seen = torch.stack([visible(s, window)[..., -1, :] for s in scores(model, tokens)])  # (layers, B, K, T)
    far = seen[..., : T - window].sum() / seen.sum()
    return dict(A=A.abs().mean().item(), far_kept=far.item())


def replaced(old: nn.Module, new: nn.Module) -> nn.Module:
    """`new`, with the weights of `old`."""
    new.load_state_dict(old.state_dict())
    return new


# ---- Tables and pictures


def series(rows: list[dict[str, str]], x: str, y: str) -> dict[tuple[str, str], list[tuple[float, list[float]]]]:
    """{(data, variant): [(mean of x, the seeds' values of y) for every measurement]}."""
    runs = {}
    for row in rows:
        if row[y]:
            runs.setdefault((row["data"], row["variant"]), {}).setdefault(row["seed"], []).append(row)
    means = {}
    for key, seeds in runs.items():
        points = [*zip(*(reversed(measured) for measured in seeds.values()), strict=False)][::-1]  # the ends together
        means[key] = [(statistics.mean(float(r[x]) for r in p), [float(r[y]) for r in p]) for p in points]
    return means


def table(rows: list[dict[str, str]], columns: list[str]) -> str:
    """A markdown table of what the runs ended with: mean and standard deviation over the seeds."""
    ends = {}
    for column in columns:
        name, _, before = column.partition(" ")  # "bpb before" is bpb before the first step
        ends[column] = {key: points[0 if before else -1][1] for key, points in series(rows, "step", name).items()}
    keys = dict.fromkeys((row["data"], row["variant"]) for row in rows)

    def cell(values: list[float]) -> str:
        if not values:
            return ""
        mean = f"{statistics.mean(values):.3f}"
        return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"

    lines = [["text", "variant", *columns], ["---"] * (len(columns) + 2)]
    lines += [
        [*key, *(cell(ends[column].get(key, [])) for column in columns)] for key in sorted(keys, key=lambda k: k[0])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: list[dict[str, str]], panels: list[str], path: Path) -> None:
    """One panel per "data x y": the mean over the seeds of every variant, and the range of the seeds shaded. data: a
    text, * for all, or `text` for all but the recall task."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 4))
    for (data, x, y), axis in zip(map(str.split, panels), axes, strict=True):
        for (source, variant), points in series(rows, x, y).items():
            if data in ("*", source) or (data == "text" and source != "recall"):
                places, values = zip(*points, strict=True)
                [line] = axis.plot(places, [statistics.mean(v) for v in values], ".-", label=variant, linewidth=1)
                axis.fill_between(places, [min(v) for v in values], [max(v) for v in values], alpha=0.15)
        axis.set(xlabel=x, ylabel=y, title=data.strip("*"))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, bbox_inches="tight")
    pyplot.close(figure)
