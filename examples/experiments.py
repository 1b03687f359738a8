"""Experiments that teach: five questions about Doge, each asked of a model small enough for one CPU core.

    python examples/experiments.py wsd           a stable checkpoint continued on other text, against a cosine run
    python examples/experiments.py experts       experts added to a dense model; the reference's router against ours
    python examples/experiments.py mask          dynamic mask, sliding window, full attention: recall and real text
    python examples/experiments.py muon          AdamW against Muon, at equal steps and at equal time
    python examples/experiments.py score         the score of the keys: on or off, with exp or without, A from 0 or not

An experiment trains the same small model in several variants, all with the same data, steps and seeds, and differing in
one thing. What a run measures goes to OUT/NAME.csv as soon as it has ended; runs that are there are not repeated, so a
command that was stopped goes on. At the end it draws PICTURES/NAME.png and prints the table of means and standard
deviations over the seeds. docs/experiments.md tells what came out.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from laboratory import BATCH, RATE, Lab, Learner, T, W, draw, mask_numbers, replaced, schedule, table
from torch import Tensor

from model import Doge, DynamicMaskAttention
from nanodoge.checkpoint import load_optimizer_state, optimizer_state
from nanodoge.options import Count, check_ranges, parse_options, run_command
from train import cosine, wsd


@dataclass
class ExperimentOptions:
    """The options people need first"""

    names: list[str] = field(default_factory=list)  # of experiments: wsd, experts, mask, muon, score
    seeds: Count = 3  # of every variant: 0, 1, 2 and so on
    max_steps: Count = 200  # of a run; phases are shares of it
    text: str = "stdlib"  # real text: a SOURCE of prepare_data.py; stdlib is Python's own documentation and library
    data: str = "data/experiments"  # where the prepared stories and the prepared text go
    out: str = "results/experiments"  # tables
    pictures: str = "docs/pictures/experiments"  # drawings

    def __post_init__(self):
        check_ranges(self)
        if wrong := [name for name in self.names or [""] if name not in EXPERIMENTS]:
            raise ValueError(f"NAMES={wrong[0]} must be of {', '.join(EXPERIMENTS)}")


# ---- (a) Warmup-Stable-Decay: going on with other text


def wsd_experiment(lab: Lab, seed: int) -> None:
    """Stories for N steps, at a rate that stays or falls along a cosine; then real text for N / 2 steps, by the same
    schedule for all but for how it begins. Adam's moments go along. The columns: bits per byte on the text, and on the
    stories that came before."""
    N, M, stories, text = lab.steps, lab.steps // 2, "stories", lab.options.text

    @functools.cache
    def trained(rate: Callable[[int], float]) -> Learner:
        learner = lab.model(seed)
        learner.fit(lab.batches(stories, seed), rate, N, measure=lambda model: {}, measurements=1)
        return learner

    stable = schedule(N, decay=0.0)
    fallen = lambda step: RATE * cosine(step, N, N // 10)  # noqa: E731
    low = lambda step: 0.1 * RATE * wsd(step, M, 0, M // 5)  # noqa: E731
    variants = {
        "stable, same rate": (partial(trained, stable), schedule(M, 0.0)),
        "stable, re-warmed": (partial(trained, stable), schedule(M)),
        "cosine, re-warmed": (partial(trained, fallen), schedule(M)),
        "cosine, peak at once": (partial(trained, fallen), schedule(M, 0.0)),
        "cosine, its last rate": (partial(trained, fallen), low),
        "no stories before": (lambda: lab.model(seed), schedule(M)),
    }

    def measure(model: Doge) -> dict[str, float]:
        return dict(bpb=lab.bpb(model, text), stories_bpb=lab.bpb(model, stories))

    for variant, (start, rate) in variants.items():
        lab.run(seed, variant, text, start, batch=lab.batches(text, seed), rate=rate, steps=M, measure=measure)


# ---- (b) Experts


class MixingRouter(nn.Linear):
    """The reference's router. Its logits (N, 2 sqrt(E)) of all N tokens of a batch are viewed as (2, N, sqrt(E)), so
    token n gets its rows of experts from token n // 2, and its columns from token N / 2 + n // 2, a later one."""

    mixes = True  # False: every token by itself, as when the model writes, one token at a time

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if not self.mixes:
            return logits
        halves = logits.view(2, -1, logits.shape[-1] // 2)  # (2, N, sqrt(E))
        return halves.transpose(0, 1).reshape(logits.shape)


def experts_experiment(lab: Lab, seed: int) -> None:
    """Half of the steps dense, then the same model with or without experts; or with experts from the start. All
    variants see the same tokens. bpb_alone: bits per byte when every token is routed by itself."""
    N, first, source = lab.steps, lab.steps // 2, "stories"
    experts = dict(is_moe=True, num_experts=256, num_experts_per_tok=8)
    fit = dict(batch=lab.batches(source, seed), rate=schedule(N), steps=N)

    @functools.cache
    def dense() -> Learner:
        learner = lab.model(seed)
        learner.fit(**fit | dict(steps=first), measure=lambda model: {}, measurements=1)
        return learner

    def grown(random_start: bool) -> Learner:
        """The dense model with experts, and with what its optimizer knew."""
        torch.manual_seed(seed)
        model = Doge.from_dense(dense().model, experts["num_experts"], experts["num_experts_per_tok"])
        for layer in model.layers if random_start else []:
            nn.init.normal_(layer.mlp.up_embed.weight, std=model.config.initializer_range)
        learner, names = lab.learner(model), [{p: n for n, p in m.named_parameters()} for m in (dense().model, model)]
        load_optimizer_state(learner.optimizers, names[1], optimizer_state(dense().optimizers, names[0]))
        return learner

    def mixing() -> Learner:
        learner = lab.model(seed, **experts)
        for layer in learner.model.layers:
            old = layer.mlp.router_gate
            layer.mlp.router_gate = replaced(old, MixingRouter(old.in_features, old.out_features, bias=False))
        return lab.learner(learner.model)

    def measure(model: Doge) -> dict[str, float]:
        found = dict(bpb=lab.bpb(model, source))
        MixingRouter.mixes = False
        found["bpb_alone"] = lab.bpb(model, source)
        MixingRouter.mixes = True
        return found

    variants = {
        "dense throughout": (dense, first),
        "dense, then experts from zero": (partial(grown, False), first),
        "dense, then experts from normal(0, .02)": (partial(grown, True), first),
        "experts from the start": (lambda: lab.model(seed, **experts), 0),
        "... with the reference's router": (mixing, 0),
    }
    for variant, (start, step) in variants.items():
        lab.run(seed, variant, source, start, **fit, measure=measure, first=step)


# ---- (c) The dynamic mask


def recall_batch(step: int, seed: int, facts: int = 4, values: int = 16) -> tuple[Tensor, Tensor]:
    """A task that nothing but memory solves. Of each of 4 kinds one of 16 values stands somewhere in the first 32
    positions; 32 later positions ask for a kind, and the target there is its value. The rest is filler."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    random = partial(torch.randint, generator=generator)
    kinds, asks = facts * values, facts * values + facts  # ids: values, then questions, then filler
    tokens, targets = random(asks, 2 * kinds, (BATCH, T)), torch.full((BATCH, T), -100)
    value = random(0, values, (BATCH, facts)) + values * torch.arange(facts)
    row = torch.arange(BATCH)[:, None]
    tokens[row, torch.rand(BATCH, 32, generator=generator).argsort(1)[:, :facts]] = value
    place = 32 + torch.rand(BATCH, T - 32, generator=generator).argsort(1)[:, :32]
    kind = random(0, facts, place.shape)
    tokens[row, place], targets[row, place] = kinds + kind, value[row, kind]
    return tokens, targets


def mask_experiment(lab: Lab, seed: int) -> None:
    """The same model with three memories. A sliding window is a dynamic mask whose A stays 0: all scores are equal, and
    of equal scores the later key wins. near, far: recall of values at most W, and more than 2 W, positions back: two
    layers of a sliding window cannot pass on more."""
    N, text, held_out = lab.steps, lab.options.text, [recall_batch(-1 - i, seed) for i in range(16)]

    def learner(window: int, moves: bool, **shape) -> Learner:
        made = lab.model(seed, keep_window_size=window, **shape)
        for layer in made.model.layers:
            layer.self_attn.A.requires_grad_(moves)
        return made

    def measure_recall(model: Doge) -> dict[str, float]:
        right, asked = torch.zeros(2, BATCH, T)
        with torch.no_grad():
            for tokens, targets in held_out:
                asked += targets >= 0
                right += (model(tokens)[0].argmax(-1) == targets) & (targets >= 0)
        near, far = (right[:, part].sum() / asked[:, part].sum() for part in (slice(0, W), slice(32 + 2 * W, T)))
        return dict(bpb="", near=near.item(), far=far.item()) | mask_numbers(model, held_out[0][0])

    def measure_text(model: Doge) -> dict[str, float]:
        tokens = lab.batches(text, seed)(0)[0]
        return dict(bpb=lab.bpb(model, text), near="", far="") | mask_numbers(model, tokens)

    tasks = {
        # At RATE and N steps one of three models with full attention learned it, and none with a dynamic mask.
        "recall": dict(batch=partial(recall_batch, seed=seed), steps=2 * N, rate=schedule(2 * N, rate=RATE / 2)),
        text: dict(batch=lab.batches(text, seed), steps=N, rate=schedule(N)),
    }
    memories = {"full attention": (T, False), "sliding window": (W, False), "dynamic mask": (W, True)}
    for task, fit in tasks.items():
        shape, measure = (dict(vocab_size=128), measure_recall) if task == "recall" else ({}, measure_text)
        for variant, memory in memories.items():
            lab.run(seed, variant, task, partial(learner, *memory, **shape), **fit, measure=measure)


# ---- (d) AdamW and Muon


def muon_experiment(lab: Lab, seed: int) -> None:
    """Three learning rates each; then AdamW again, with as many steps as fit into the CPU time of Muon's run."""
    source = "stories"
    batch, measure = lab.batches(source, seed), lambda model: dict(bpb=lab.bpb(model, source))
    for rate in (4e-3, 8e-3, 16e-3):

        def run(variant: str, optimizer: str, steps: int, rate: float = rate) -> float:
            fit = dict(batch=batch, rate=schedule(steps, rate=rate), steps=steps, measure=measure)
            lab.run(seed, f"{variant}{rate:g}", source, lambda: lab.model(seed, optimizer), **fit)
            return float(lab.find(seed=seed, variant=f"{variant}{rate:g}")[-1]["seconds"])

        seconds = {name: run(f"{name} ", name.lower(), lab.steps) for name in ("AdamW", "Muon")}
        run("AdamW, equal time, ", "adamw", max(1, round(lab.steps * seconds["Muon"] / seconds["AdamW"])))


# ---- (e) The score


class PlainScore(DynamicMaskAttention):
    """s = A softplus(dt), without exp, as in the family's successor: the logarithm of Doge's score."""

    def project(self, x: Tensor, rotary, padding=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, s = super().project(x, rotary, padding)
        return q, k, v, s.log()


def score_experiment(lab: Lab, seed: int) -> None:
    """Real text, once with a window as long as the sequence, where the score is only added to the attention logits, and
    once with a quarter of it, where it also decides which keys are kept."""
    text, steps = lab.options.text, lab.steps

    def learner(window: int, attention: type, start: float, moves: bool) -> Learner:
        made = lab.model(seed, keep_window_size=window)
        for i, layer in enumerate(made.model.layers):
            layer.self_attn = replaced(layer.self_attn, attention(made.model.config, i))
            nn.init.normal_(layer.self_attn.A, std=start).requires_grad_(moves)
        return lab.learner(made.model)

    def measure(model: Doge) -> dict[str, float]:
        return dict(bpb=lab.bpb(model, text)) | mask_numbers(model, lab.batches(text, seed)(0)[0])

    variants = {
        "no score": (DynamicMaskAttention, 0.0, False),
        "exp, A from 0": (DynamicMaskAttention, 0.0, True),
        "exp, A from normal(0, .02)": (DynamicMaskAttention, 0.02, True),
        "no exp, A from 0": (PlainScore, 0.0, True),
        "no exp, A from normal(0, .02)": (PlainScore, 0.02, True),
    }
    fit = dict(batch=lab.batches(text, seed), rate=schedule(steps), steps=steps, measure=measure)
    for window in (T, W):
        for variant, parts in variants.items():
            lab.run(seed, f"W {window}: {variant}", text, lambda w=window, p=parts: learner(w, *p), **fit)


# ---- The command

# The function; the columns of the table; the panels of the picture, each with its text (* for all), x and y.
EXPERIMENTS = {
    "wsd": (wsd_experiment, "bpb, stories_bpb, stories_bpb before", "* step bpb, * step stories_bpb"),
    "experts": (experts_experiment, "bpb, bpb_alone", "* step bpb, * step bpb_alone"),
    "mask": (mask_experiment, "bpb, near, far, A, far_kept", "recall step far, text step bpb"),
    "muon": (muon_experiment, "steps, seconds, bpb", "* step bpb, * seconds bpb"),
    "score": (score_experiment, "bpb, A, far_kept", "* step bpb, * step A"),
}


def main(argv: list[str]) -> None:
    options = parse_options(ExperimentOptions, argv, positional="names")
    for name in options.names:
        experiment, columns, panels = EXPERIMENTS[name]
        lab = Lab(name, options)
        for seed in range(options.seeds):
            experiment(lab, seed)
        draw(lab.rows, panels.split(", "), Path(options.pictures) / f"{name}.png")
        print(f"\n{table(lab.rows, columns.split(', '))}\n\n{lab.path}, {options.pictures}/{name}.png")


if __name__ == "__main__":
    run_command(main)
