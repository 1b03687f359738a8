"""Supervised fine-tuning (SFT): a model that continues text learns to answer.

    python sft.py                                                   the tiny model, questions about built-in stories
    python sft.py config/sft_doge.py                                a real recipe
    torchrun --nproc_per_node=8 sft.py config/sft_doge.py           the same on eight GPUs: same batches, same losses
    python sft.py --out_dir=out/stories-chat --resume               continues as if it had never stopped

A base model that is asked a question may write three more questions, because texts often go on like that. So it is
trained on conversations. It predicts the next token as before, but only the tokens that the assistant writes are
targets: the data has a mask of them (made by Tokenizer.render). Four things about it are easy to get wrong.

The mask. It covers the assistant's words, and the EOS that ends each answer: a model that never learned the end does
not stop. It does not cover the user's words, or the model would learn to ask. One example is printed with its targets
marked: look at it.

The weight of a token. The loss of a step is the sum over all its targets, divided by their number. Micro-batches and
ranks have different numbers of targets, so a mean of their means would weight a token by the size of its micro-batch.

Packing. Several conversations in one row need a mask that separates them, and then plain causal attention, which is the
fastest, cannot be used. Here every conversation is a row of its own. Rows of similar length share a micro-batch, so
that there is little padding. They are padded on the right: no token attends to later ones, so no mask is needed.

Long conversations. A conversation is cut after the last answer that fits, and left out if none does; both are counted.
An answer cut in the middle would teach the model to stop there.

Reasoning is learned in the same way, from answers that begin with a thought (config/sft_reason_tiny.py). With
--kind=labels a classifier is trained: the only target of a text is its label, at the position after its last token, and
a matrix with one row per label replaces the output matrix.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch

from model import Doge
from nanodoge import stage
from nanodoge.answers import final_answer
from nanodoge.examples import Examples, TokenSet, describe, fit_answers
from nanodoge.machine import Machine, shard
from nanodoge.options import Whole, run_command
from nanodoge.policy import write_answers
from nanodoge.run import Run
from nanodoge.tokenizer import Tokenizer
from train import cosine, loss_sum, make_optimizers, optimizer_step, prepare_if_built_in, rows_of_step


@dataclass
class SftOptions(stage.TuneOptions):
    """Supervised fine-tuning."""

    recipe: ClassVar[str] = "sft_tiny.py"
    may_change: ClassVar[str] = stage.TuneOptions.may_change + " eval_answers"
    data: str = "data/stories-chat"  # folder made by prepare_data.py
    kind: Literal["chat", "labels"] = "chat"  # of the data: conversations, or texts with a label
    eval_answers: Whole = 0  # validation answers that are written and compared word for word; of labels, always all


def select(token_set: TokenSet, options: SftOptions) -> Examples:
    """The conversations, each up to the end of the last answer that fits into sequence_length tokens."""
    length = options.sequence_length
    sizes, targets, cut = fit_answers(token_set, length)
    kept = np.flatnonzero(sizes)
    left_out = {
        f"cut after an earlier answer, to fit into --sequence_length={length}": int((cut[kept] > 0).sum()),
        f"without an answer that ends within --sequence_length={length}": len(sizes) - len(kept),
    }
    return Examples("conversations", token_set, kept, sizes[kept, None], targets[kept, None], left_out)


@torch.no_grad()
def evaluate(machine: Machine, model: Doge, val: Examples, tokenizer: Tokenizer, options: SftOptions) -> dict:
    """{log column: value}. val_loss: mean loss per target of the first eval_size examples, in nats. val_exact: of the
    first eval_answers conversations, the share whose last answer the model writes word for word; of a classifier, the
    share of the texts that get their label. The ranks share the work."""
    count, nats, targets, right = min(val.count, options.eval_size), 0.0, 0, 0
    for group in val.micro_batches(range(count), options.micro_batch_tokens)[machine.rank :: machine.world_size]:
        batch = val.batch(group)
        nats += loss_sum(model, *batch, machine).item()
        targets += int(val.targets[group].sum())
        if model.labels:
            tokens, labels = machine.to_device(*batch)
            with machine.autocast():
                right += int((model(tokens)[0].argmax(-1) == labels).sum())
    nats, targets, right = machine.sum([nats, float(targets), float(right)])
    asked = count if model.labels else min(val.count, options.eval_answers)
    if asked and not model.labels:
        right = count_exact(machine, model, [val.rows(i)[0] for i in range(asked)], tokenizer)
    return dict(val_loss=nats / targets) | (dict(val_exact=right / asked) if asked else {})


def count_exact(machine: Machine, model: Doge, rows: list[tuple], tokenizer: Tokenizer) -> int:
    """How many conversations (ids, mask) end in the answer that the model writes there at temperature 0. An answer
    counts if it comes to the same (see final_answer) and the model ends it with EOS."""
    prompts, wanted = [], []
    for ids, mask in rows:
        begin = np.flatnonzero(~mask)[-1] + 1  # of the last answer, which ends the row
        prompts.append(ids[:begin].tolist())
        wanted.append(ids[begin:].tolist())
    written = write_answers(machine, model, tokenizer, prompts, max(map(len, wanted)) + 8)
    ended = [(a[:-1], b[:-1]) for a, b in zip(written, wanted, strict=True) if a[-1] == tokenizer.eos_id]
    return sum(final_answer(tokenizer.decode(a)) == final_answer(tokenizer.decode(b)) for a, b in ended)


def train(options: SftOptions, machine: Machine) -> None:
    """Runs the whole tuning and leaves a checkpoint, log.csv and loss.png in options.out_dir."""
    prepare_if_built_in(options, machine, options.kind)
    model, state, data, val = stage.start_tuning(options, machine, options.kind, select)
    tokenizer = data.set.tokenizer
    if options.shard:
        shard(model, machine)
    optimizers, flops = make_optimizers(model, options, machine), model.flops_per_token(data.sizes.mean())
    validate = partial(evaluate, machine, model, val, tokenizer, options)
    run = Run(options, machine, model, model, tokenizer, optimizers, validate, flops, state, columns=["val_exact"])
    longest = data.longest(options.micro_batch_tokens)
    batch, examples = data.batch(longest), options.max_steps * options.batch_size / machine.world_size
    count = examples * data.lengths.mean() / data.lengths[longest].sum()
    stage.announce(run, lambda network: loss_sum(network, *batch, machine), count, describe(data, val, options))
    [first] = rows_of_step(0, data.count, 1, options.seed)
    machine.print(f"an example, with what is learned marked:\n\n{data.show(first)}\n")

    with run:
        for step in run.steps():
            lr = options.learning_rate * cosine(step, options.max_steps, int(options.warmup * options.max_steps))
            rows = rows_of_step(step, data.count, options.batch_size, options.seed)
            groups = data.micro_batches(rows, options.micro_batch_tokens, machine.world_size)  # of all ranks
            targets, loss = int(data.targets[rows].sum()), 0.0  # targets of the whole step
            for group in run.micro_batches(groups[machine.rank :: machine.world_size]):
                loss += run.backward(loss_sum(run.network, *data.batch(group), machine) / targets)
            grad_norm = optimizer_step(model, optimizers, lr, options.grad_clip)
            run.end_step(loss=loss, grad_norm=grad_norm, lr=lr, tokens=int(data.sizes[rows].sum()))
    stage.print_answer(options, machine, model, val)


def main(argv: list[str]) -> None:
    stage.run_stage(train, stage.read_run_options(SftOptions, argv))


if __name__ == "__main__":
    run_command(main)
