"""Supervised fine-tuning: a model that continues text learns to answer.

    python sft.py                                                   the tiny model on questions about built-in stories
    python sft.py config/sft_doge20m.py                             a real recipe
    torchrun --nproc_per_node=8 sft.py config/sft_doge20m.py        the same on eight GPUs: same batches, same losses
    python sft.py --out_dir=out/stories-chat --resume               go on as if it had never stopped

A base model asked a question may well ask three more: that is how such texts go on. So it is shown conversations, and
trained as before to predict the next token, with one difference: only where the assistant speaks. What is learned is
decided by the mask of the data, and four things about it are easy to get wrong, each of which has cost others weeks.

What counts. The assistant's words, and the EOS that ends its turn: a model that is not shown the end never stops. Not
the user's words, or it learns to ask. Before the first step one row is printed with its trained part marked: look.

How much a token counts. The loss of a step is the sum over all its targets divided by their number. Micro-batches and
processes hold different numbers of targets, so a mean of their means would weigh a token by its company; each gives
its sum over the whole step's number instead, which every process knows beforehand.

Who sees whom. Packing several conversations into a row needs a mask that keeps them apart, and attention is then no
longer the plain causal one that is fastest. Here every conversation is a row of its own. Rows of like length go
together and are filled up on the right, where no token looks: exact without any mask, and with rows sorted by length
there is little to fill (the start of a run says how much).

What is too long. A conversation is cut after the last answer that fits, and one whose first answer does not fit is
left out; both are counted. An answer cut in the middle would teach to stop there, and a row without a target teaches
nothing and divides by zero.

Reasoning is learned in the same way from conversations whose answers begin with a thought (config/sft_reason_*.py).

A classifier too (--kind=labels, data of prepare_data.py --kind=labels): of a text the one thing to predict, behind its
last token, is its label. A small matrix with a row a label takes the place of the vocabulary, and the rest is the same.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from nanodoge.conversations import divide, final_answer, generate, open_sets, pad
from nanodoge.machine import shard
from nanodoge.options import run_command
from nanodoge.run import Run
from nanodoge.stage import (
    TUNE_MAY_CHANGE,
    TuneOptions,
    count_steps,
    profile_step,
    read_run_options,
    run_stage,
    start_tuning,
)
from train import cosine, make_optimizers, optimizer_step, rows_of_step


@dataclass
class SftOptions(TuneOptions):
    data: str = "data/stories-chat"  # folder made by prepare_data.py
    kind: Literal["chat", "labels"] = "chat"  # of the data: conversations, or texts with a label
    eval_answers: int = 0  # validation answers that are written and compared word for word; of labels, always all

    def __post_init__(self):
        super().__post_init__()
        if self.eval_answers < 0:
            raise ValueError(f"--eval_answers={self.eval_answers} must be from 0 up")


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Conversations:
    """The rows of a TokenSet: each conversation up to the end of its last answer that fits into `length` tokens.

    lengths, targets, answers (count,) int64: tokens that go into the model; how many of their successors are learned,
    at least one; where the last answer begins. cut and left_out: how many conversations lost their end, or were lost
    whole.
    """

    def __init__(self, token_set, length):
        self.set, offsets = token_set, np.asarray(token_set.offsets)
        begins, ends = turns(token_set.mask)
        learned = np.concatenate(([0], np.cumsum(ends - begins + 1)))
        first, stop = np.searchsorted(ends, offsets[:-1]), np.searchsorted(ends, offsets[1:])  # the turns of each
        fits = np.minimum(stop, np.searchsorted(ends, offsets[:-1] + length, side="right"))
        rows = np.flatnonzero(fits > first)
        last = fits[rows] - 1
        self.starts = offsets[:-1][rows]
        self.lengths, self.answers = ends[last] - self.starts, begins[last] - self.starts
        self.targets = learned[last + 1] - learned[first[rows]]
        self.count, self.cut = len(rows), int((fits < stop)[rows].sum())
        self.left_out = len(token_set) - self.count

    def row(self, i):
        """ids and mask, lengths[i] + 1 of each: the last one is only a target."""
        span = slice(self.starts[i], self.starts[i] + self.lengths[i] + 1)
        return self.set.ids[span].astype(np.int64), self.set.mask[span].astype(bool)


def turns(mask, piece=1 << 26):
    """The first and the last place of every run of 1 in a mask (n,), which is read in pieces, for it may be larger than
    memory. A conversation begins with a 0, so no run goes from one to the next."""
    begins, ends, before = [], [], np.int8(0)
    for start in range(0, len(mask), piece):
        part = mask[start : start + piece].astype(np.int8)
        edges = np.diff(part, prepend=before)
        begins.append(start + np.flatnonzero(edges == 1))
        ends.append(start + np.flatnonzero(edges == -1) - 1)
        before = part[-1]
    return np.concatenate(begins), np.concatenate(ends + [np.full(int(before), len(mask) - 1)])


def show_example(rows, i, tokenizer, machine, labels=()):
    """Prints a row with what is learned marked: green on a terminal, between {+ and +} elsewhere."""
    begin, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("{+", "+}")
    ids, mask = rows.row(i)
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    parts = np.split(ids, edges)
    pieces = [labels[part[0]] if labels and k % 2 else tokenizer.decode(part) for k, part in enumerate(parts)]
    machine.print("an example, with what is learned marked:\n\n"
                  + "".join(begin + text + end if k % 2 else text for k, text in enumerate(pieces)) + "\n")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Validation


def make_evaluate(machine, model, loss_sum, rows, tokenizer, options):
    """-> evaluate(): mean loss a target over the first eval_size conversations; and the share of the first eval_answers
    whose last answer, written by taking the likeliest token each time, is right to the last word; of a classifier, the
    share of all whose label is. All processes share the work."""
    count, asked = min(rows.count, options.eval_size), min(rows.count, options.eval_answers)
    asked = count if model.labels else asked
    groups = divide(rows.lengths[:count], options.micro_batch_tokens)[machine.rank :: machine.world_size]

    @torch.no_grad()
    def evaluate():
        nats = sum(loss_sum(rows, group, network=model).item() for group in groups)
        targets = sum(int(rows.targets[group].sum()) for group in groups)
        if model.labels:
            right = sum(count_labels(model, rows, group, tokenizer, machine) for group in groups)
        else:
            right = count_right(model, rows, range(asked)[machine.rank :: machine.world_size], tokenizer, machine)
        nats, targets, right = machine.sum([float(nats), float(targets), float(right)])
        return dict(val_loss=nats / targets) | (dict(val_exact=right / asked) if asked else {})

    return evaluate


def count_right(model, rows, which, tokenizer, machine):
    """How many of the conversations `which` end in the model's own last answer, given all that came before it. An
    answer counts when it comes to the same (see final_answer) and the model ends it."""
    if not len(which):
        return 0
    wanted = [rows.row(i)[0][rows.answers[i] :].tolist() for i in which]
    prompts = [rows.row(i)[0][: rows.answers[i]] for i in which]
    with machine.autocast():
        written = generate(model, tokenizer, prompts, max(map(len, wanted)) + 8, temperature=0.0)
    same = [final_answer(tokenizer.decode(a[:-1])) == final_answer(tokenizer.decode(b[:-1]))
            for a, b in zip(written, wanted, strict=True) if a[-1] == tokenizer.eos_id]  # fmt: skip
    return sum(same)


def count_labels(model, rows, group, tokenizer, machine):
    """How many texts of a group the classifier gives their label."""
    tokens, targets, _ = pad([rows.row(i) for i in group], tokenizer.pad_id)
    tokens, targets = machine.to_device(tokens, targets)
    with machine.autocast():
        found = model(tokens)[0].argmax(-1)
    return int((found == targets).sum())


# ---------------------------------------------------------------------------------------------------------------------
# The run


def describe(options, machine, model, train_rows, val_rows, seconds, which):
    """Prints, before the first step, what is going to happen, on what, and what it will cost."""
    used, steps = int(train_rows.lengths.sum()), options.max_steps
    step = rows_of_step(0, train_rows.count, options.batch_size, options.seed)
    groups = divide(train_rows.lengths[step], options.micro_batch_tokens, machine.world_size)
    padded = sum(len(group) * int(train_rows.lengths[step][group].max()) for group in groups)
    duration = seconds * len(groups) / machine.world_size * steps
    for split, rows in (("training", train_rows), ("validation", val_rows)):
        if rows.cut or rows.left_out:
            machine.print(f"too long for {options.sequence_length} tokens: {rows.cut:,} {split} conversations are cut "
                          f"after an earlier answer, {rows.left_out:,} left out, for not one answer fits")  # fmt: skip
    machine.print(
        f"model     {sum(p.numel() for p in model.parameters()):,} parameters, from {options.init_from}\n"
        f"data      {options.data}: {train_rows.count:,} conversations, {used:,} tokens, {train_rows.targets.sum():,} "
        f"of them learned; {steps * options.batch_size / train_rows.count:.2f} epochs\n"
        f"step      {options.batch_size} conversations in about {len(groups)} micro-batches on {machine.world_size} "
        f"processes; {1 - train_rows.lengths[step].sum() / padded:.0%} of the first step is padding\n"
        f"device    {machine.summary}; {which}\n"
        f"cost      {steps:,} steps; about {duration // 3600:.0f} h {duration // 60 % 60 + 1:.0f} min at the most"
    )


def train(options, machine):
    """Runs the whole tuning and leaves a checkpoint, log.csv and loss.png in options.out_dir."""
    train_set, val_set, tokenizer = open_sets(options, options.kind, machine)
    labels = tuple(train_set.meta["labels"]) if options.kind == "labels" else None
    model, state = start_tuning(options, machine, tokenizer, labels)
    train_rows, val_rows = (Conversations(token_set, options.sequence_length) for token_set in (train_set, val_set))
    if not (train_rows.count and val_rows.count):
        raise ValueError(f"--sequence_length={options.sequence_length}: of {len(train_set)} training and "
                         f"{len(val_set)} validation conversations, {train_rows.count} and {val_rows.count} fit")
    count_steps(options, train_rows.count, machine)
    if options.shard:
        shard(model, machine)
    optimizers = make_optimizers(model, options, machine)

    def loss_sum(rows, group, network):
        """The cross-entropies of the targets of these rows, added up."""
        tokens, targets, _ = pad([rows.row(i) for i in group], tokenizer.pad_id)
        with machine.autocast():
            mean = network(*machine.to_device(tokens, targets))[1]
        return mean * int(rows.targets[group].sum())

    longest = np.argsort(-train_rows.lengths, kind="stable")[: options.micro_batch_tokens // train_rows.lengths.max()]
    tried = profile_step(machine, model, lambda network: loss_sum(train_rows, longest, network), options)
    network, seconds, which = tried
    describe(options, machine, model, train_rows, val_rows, seconds, which)
    show_example(train_rows, rows_of_step(0, train_rows.count, 1, options.seed)[0], tokenizer, machine, model.labels)
    evaluate = make_evaluate(machine, model, loss_sum, val_rows, tokenizer, options)
    run = Run(options, machine, model, network, tokenizer, optimizers, evaluate,
              model.flops_per_token(train_rows.lengths.mean()), columns=["val_exact"],
              evaluate_first=True)  # fmt: skip
    if options.resume:
        run.restore(state)
    with run:
        for step in run.steps():
            rows = np.array(rows_of_step(step, train_rows.count, options.batch_size, options.seed))
            groups = divide(train_rows.lengths[rows], options.micro_batch_tokens, machine.world_size)
            targets = int(train_rows.targets[rows].sum())  # of the whole step, on all processes
            lr = options.learning_rate * cosine(step, options.max_steps, int(options.warmup * options.max_steps))
            loss = 0.0
            for group in run.micro_batches(groups[machine.rank :: machine.world_size]):
                loss += run.backward(loss_sum(train_rows, rows[group], network) / targets)
            grad_norm = optimizer_step(model, optimizers, lr, options.grad_clip)
            run.end_step(loss=loss, grad_norm=grad_norm, lr=lr, tokens=int(train_rows.lengths[rows].sum()))
    run.finish()


def main(argv):
    run_stage(train, read_run_options(SftOptions, argv, "sft_tiny.py", TUNE_MAY_CHANGE | {"eval_answers"}))


if __name__ == "__main__":
    run_command(main)
