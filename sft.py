"""Supervised fine-tuning (SFT): a model that continues text learns to answer.

    python sft.py                                                   the tiny model, questions about built-in stories
    python sft.py config/sft_doge20m.py                             a real recipe
    torchrun --nproc_per_node=8 sft.py config/sft_doge20m.py        the same on eight GPUs: same batches, same losses
    python sft.py --out_dir=out/stories-chat --resume               continues as if it had never stopped

A base model that is asked a question may write three more questions, because texts often go on like that. So it is
trained on conversations. It predicts the next token as before, but only where the assistant speaks. What it learns is
decided by the mask of the data, and four things about it are easy to get wrong.

What is learned. The assistant's words, and the EOS that ends each answer: a model that never learned the end does not
stop. Not the user's words, or it learns to ask. Before the first step one example is printed with its targets marked:
look at it.

The weight of a token. The loss of a step is the sum over all its targets, divided by their number. Micro-batches and
ranks have different numbers of targets, so a mean of their means would weight a token by the size of its micro-batch.
Each contributes its sum divided by the targets of the whole step, which every rank knows beforehand.

Packing. Several conversations in one row need a mask that separates them, and attention is then no longer the plain
causal one, which is the fastest. Here every conversation is a row of its own. Rows of similar length share a
micro-batch and are padded on the right, where no token looks: exact without any mask, and with little padding.

Long conversations. A conversation is cut after the last answer that fits. If not one fits, it is left out. Both are
counted and printed. An answer cut in the middle would teach the model to stop there, and a row without targets teaches
nothing.

Reasoning is learned in the same way, from answers that begin with a thought (config/sft_reason_tiny.py).

A classifier too (--kind=labels, data of prepare_data.py --kind=labels): the only target of a text is its label, at the
position after its last token. A matrix with one row per label replaces the output matrix; all else is the same.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from nanodoge.conversations import Examples, TokenSet, final_answer, fit_answers, generate, open_sets
from nanodoge.machine import shard
from nanodoge.options import run_command
from nanodoge.run import Run, TuneOptions, carry_out, count_steps, read_tune_options, start_tuning, try_out
from train import cosine, make_optimizers, rows_of_step


@dataclass
class SftOptions(TuneOptions):
    data: str = "data/stories-chat"  # folder made by prepare_data.py
    kind: Literal["chat", "labels"] = "chat"  # of the data: conversations, or texts with a label
    eval_answers: int = 0  # validation answers that are written and compared word for word; of labels, always all

    def __post_init__(self):
        super().__post_init__()
        if self.eval_answers < 0:
            raise ValueError(f"--eval_answers={self.eval_answers} must be from 0 up")


def select(token_set: TokenSet, length: int) -> Examples:
    """The conversations, each up to the end of the last answer that fits into `length` tokens."""
    sizes, targets, cut = fit_answers(token_set, length)
    kept = np.flatnonzero(sizes)
    left_out = {
        "cut after an earlier answer": int((cut[kept] > 0).sum()),
        "left out, as not one answer fits": len(sizes) - len(kept),
    }
    return Examples(token_set, kept, sizes[kept, None], targets[kept, None], left_out)


def loss_sum(network, examples, group, pad_id, machine):
    """The cross-entropies of all targets of the examples `group`, added up."""
    tokens, targets = machine.put(*examples.batch(group, pad_id))
    with machine.autocast():
        return network(tokens, targets)[1] * int(examples.targets[group].sum())


# ---------------------------------------------------------------------------------------------------------------------
# Validation


@torch.no_grad()
def evaluate(machine, model, val, tokenizer, options):
    """-> {log column: value}. val_loss: mean loss per target over the first eval_rows examples, in nats. val_exact: of
    the first eval_answers conversations, the share whose last answer the model writes word for word; of a classifier,
    the share of all texts that get their label. All ranks share the work."""
    count, asked = min(val.count, options.eval_rows), min(val.count, options.eval_answers)
    nats, targets, right = 0.0, 0, 0
    for group in val.micro_batches(range(count), options.micro_tokens)[machine.rank :: machine.world_size]:
        nats += loss_sum(model, val, group, tokenizer.pad_id, machine).item()
        targets += int(val.targets[group].sum())
        if model.labels:
            right += count_labels(model, val, group, tokenizer.pad_id, machine)
    if not model.labels:
        right += count_exact(model, val, range(asked)[machine.rank :: machine.world_size], tokenizer, machine)
    nats, targets, right = machine.sum([nats, float(targets), float(right)])
    asked = count if model.labels else asked
    return dict(val_loss=nats / targets) | (dict(val_exact=right / asked) if asked else {})


def count_exact(model, val, which, tokenizer, machine):
    """How many of the conversations `which` end in the answer that the model writes there, always taking the likeliest
    token. An answer counts when it comes to the same (see final_answer) and the model ends it with EOS."""
    if not len(which):
        return 0
    prompts, wanted = [], []
    for ids, mask in (val.rows(i)[0] for i in which):
        begin = np.flatnonzero(~mask)[-1] + 1  # of the last answer, which ends the row
        prompts.append(ids[:begin].tolist())
        wanted.append(ids[begin:].tolist())
    with machine.autocast():
        written = generate(model, tokenizer, prompts, max(map(len, wanted)) + 8, temperature=0.0)
    ended = [(a[:-1], b[:-1]) for a, b in zip(written, wanted, strict=True) if a[-1] == tokenizer.eos_id]
    return sum(final_answer(tokenizer.decode(a)) == final_answer(tokenizer.decode(b)) for a, b in ended)


def count_labels(model, val, group, pad_id, machine):
    """How many of the texts `group` get their label from the classifier."""
    tokens, targets = machine.put(*val.batch(group, pad_id))
    with machine.autocast():
        return int((model(tokens)[0].argmax(-1) == targets).sum())


# ---------------------------------------------------------------------------------------------------------------------
# The run


def announce(options, machine, model, train_set, val_set, seconds, which):
    """Prints, before the first step, what is going to happen, on what, and what it will cost."""
    used, steps = int(train_set.lengths.sum()), options.max_steps
    step = rows_of_step(0, train_set.count, options.batch_rows, options.seed)
    groups = train_set.micro_batches(step, options.micro_tokens, machine.world_size)
    padded = sum(len(group) * int(train_set.lengths[group].max()) for group in groups)
    duration = seconds * len(groups) / machine.world_size * steps
    for split, rows in (("training", train_set), ("validation", val_set)):
        for reason, count in rows.left_out.items():
            if count:
                machine.print(f"longer than {options.sequence_length} tokens: {count:,} {split} conversations {reason}")
    machine.print(
        f"model     {sum(p.numel() for p in model.parameters()):,} parameters, from {options.init_from}\n"
        f"data      {options.data}: {train_set.count:,} conversations, {used:,} tokens, {train_set.targets.sum():,} "
        f"of them learned; {steps * options.batch_rows / train_set.count:.2f} epochs\n"
        f"step      {options.batch_rows} conversations in about {len(groups)} micro-batches on {machine.world_size} "
        f"processes; {1 - train_set.lengths[step].sum() / padded:.0%} of the first step is padding\n"
        f"device    {machine.summary}; {which}\n"
        f"cost      {steps:,} steps; about {duration // 3600:.0f} h {duration // 60 % 60 + 1:.0f} min at the most"
    )


def train(options, machine):
    """Runs the whole tuning and leaves a checkpoint, log.csv and loss.png in options.out_dir."""
    *sets, tokenizer = open_sets(options, options.kind, machine)
    labels = tuple(sets[0].meta["labels"]) if options.kind == "labels" else None
    model, state = start_tuning(options, machine, tokenizer, labels)
    train_set, val_set = (select(token_set, options.sequence_length) for token_set in sets)
    if not (train_set.count and val_set.count):
        raise ValueError(
            f"--sequence_length={options.sequence_length}: of {len(sets[0])} training and "
            f"{len(sets[1])} validation conversations, {train_set.count} and {val_set.count} fit"
        )
    count_steps(options, train_set.count, machine)
    shard(model, options, machine)
    optimizers = make_optimizers(model, options, fused=machine.device.type in ("cpu", "cuda"))
    longest = np.argsort(-train_set.lengths, kind="stable")[: options.micro_tokens // train_set.lengths.max()]
    tried = try_out(machine, model, lambda n: loss_sum(n, train_set, longest, tokenizer.pad_id, machine), options)
    network, seconds, which = tried
    announce(options, machine, model, train_set, val_set, seconds, which)
    example = train_set.show(rows_of_step(0, train_set.count, 1, options.seed)[0], tokenizer, labels or ())
    machine.print(f"an example, with what is learned marked:\n\n{example}\n")
    run = Run(
        options,
        machine,
        model,
        network,
        tokenizer,
        optimizers,
        lambda: evaluate(machine, model, val_set, tokenizer, options),
        model.flops_per_token(train_set.lengths.mean()),
        columns=["val_exact"],
    )
    if options.resume:
        run.restore(state)
    with run:
        for step in run.steps():
            rows = rows_of_step(step, train_set.count, options.batch_rows, options.seed)
            groups = train_set.micro_batches(rows, options.micro_tokens, machine.world_size)
            targets = int(train_set.targets[rows].sum())  # of the whole step, on all ranks
            lr = options.learning_rate * cosine(step, options.max_steps, int(options.warmup * options.max_steps))
            run.update(
                groups[machine.rank :: machine.world_size],
                lambda group, all=targets: loss_sum(run.network, train_set, group, tokenizer.pad_id, machine) / all,
                int(train_set.lengths[rows].sum()),
                lr,
            )
    run.finish()


def main(argv):
    carry_out(train, read_tune_options(SftOptions, argv, "sft_tiny.py", may_change=["eval_answers"]))


if __name__ == "__main__":
    run_command(main)
