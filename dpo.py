"""Direct preference optimisation: of two answers the better one becomes likelier.

    python dpo.py                                                   the tiny model on answers about built-in stories
    python dpo.py config/dpo_doge20m.py                             a real recipe
    torchrun --nproc_per_node=8 dpo.py config/dpo_doge20m.py        the same on eight GPUs: same batches, same losses
    python dpo.py --out_dir=out/stories-preferences --resume        go on as if it had never stopped

Fine-tuning shows good answers, and never what is wrong with a bad one. A preference shows both: a prompt, an answer
that was chosen, one that was rejected. Saying which of two is better is also easier than writing the best.

The idea (Rafailov et al. 2023, arXiv 2305.18290). Say an answer has a reward, and that of two answers people choose
the first with probability sigmoid(its reward - the other's). Of all models that do not stray far from where they
began, the reference, the one with the most reward is known: it writes an answer as often as the reference does, times
exp(reward / beta), times something that is the same for all answers to a prompt. Read backwards, this says that every
model is the best one for some reward, namely

    reward(answer) = beta * (log p(answer) - log p_reference(answer))          but for what depends on the prompt alone

so what people chose can be made likely without a reward model and without a sample: it is a loss like any other.

    loss = -log sigmoid(reward(chosen) - reward(rejected))

The smaller beta, the farther must the model go from its reference to earn a margin. Five things are easy to get wrong.

What is compared. log p is summed over the tokens of the answer and the EOS that ends it. The prompt does not count.

What the reference is. The model as it was at the start, for good. Its log-probabilities of all answers, two numbers a
pair, are computed once, before the first step; so a step costs one model and not two. They are saved with every
checkpoint: a resumed run has the reference it began with, whatever has become of --init_from since.

Who wins. At first the model is its reference: every reward is 0, the loss is ln 2 = 0.693, and all pairs are ties. A
tie is not won, so accuracy starts at 0 and not at a flattering 1/2; nor is a margin that may be rounding (TIE).

Where the words go. The loss sees a difference, and is content when both answers become unlikely, the rejected one
faster (arXiv 2402.13228). So val_chosen_logp tells how likely the chosen answers are: a little fall is usual, a
collapse is a model that has forgotten how to speak. Then lower --learning_rate, or raise --beta.

What is too long. A pair of which one row does not fit is left out and counted. Cut at the end, an answer would lose
its EOS and be compared for half of what it says; cut at the front, the prompt would lose what was asked.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from nanodoge.conversations import divide, open_sets, pad
from nanodoge.losses import token_logprobs
from nanodoge.machine import shard, unsharded
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

# Nats. A chosen answer that has gained less on the rejected one than this is in a tie with it: with the usual beta, one
# would be preferred at 50.25 % and the other at 49.75 %. Rounding alone makes 3e-5 in float32 and 0.15 in bfloat16 (the
# tiny model on a processor, the largest of 60 pairs), so in bfloat16 the first step may show a few wins all the same.
TIE = 0.1
# What --beta=0 stands for: the first is the DPO paper's and everybody's; the last belongs to log-probabilities a token,
# which are that much smaller (Tulu 3, arXiv 2411.15124).
BETA = {"sigmoid": 0.1, "ipo": 0.1, "sigmoid_norm": 5.0}


@dataclass
class DpoOptions(TuneOptions):
    init_from: str = "out/stories-chat"  # checkpoint folder of the model to tune, which is also the reference
    data: str = "data/stories-preferences"  # folder made by prepare_data.py --kind=preferences
    loss: Literal["sigmoid", "ipo", "sigmoid_norm"] = "sigmoid"  # sigmoid: DPO's own; the others take means a token
    beta: float = 0.0  # how firmly the reference is held on to; 0 = 0.1, for sigmoid_norm 5
    learning_rate: float = 8e-5  # peak learning rate

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"--beta={self.beta} must be a number above 0, or 0 for the usual one")
        self.beta = self.beta or BETA[self.loss]


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Pairs:
    """The pairs of a TokenSet that can be compared: both rows fit into `length` tokens, and the answers differ and are
    not empty.

    answers (count, 2) int64: tokens of the chosen and of the rejected answer, each with its EOS. rows (count, 2):
    tokens that go into the model. lengths (count,): what a pair takes of a micro-batch, both rows filled up to the
    longer one. too_long and no_choice: how many pairs were left out.
    """

    def __init__(self, token_set, length):
        self.set, self.too_long, self.no_choice = token_set, 0, 0
        places, rows, answers = [], [], []
        for place in range(0, len(token_set), 2):
            (chosen, mask), (rejected, other) = (self.conversation(place + k) for k in range(2))
            if mask.sum() < 2 or other.sum() < 2 or np.array_equal(chosen[mask], rejected[other]):
                self.no_choice += 1
            elif max(len(chosen), len(rejected)) - 1 > length:
                self.too_long += 1
            else:
                places.append(place)
                rows.append((len(chosen) - 1, len(rejected) - 1))
                answers.append((mask.sum(), other.sum()))
        self.places, self.count = places, len(places)
        self.rows, self.answers = (np.array(x, np.int64).reshape(-1, 2) for x in (rows, answers))
        self.lengths = 2 * self.rows.max(1, initial=0)

    def conversation(self, place):
        """ids and mask up to the end of the answer: what the template writes after it is nobody's."""
        ids, mask = self.set.conversation(place)
        end = len(mask) - int(mask[::-1].argmax())
        return ids[:end], mask[:end]

    def pair(self, i):
        """[(ids, mask) of the chosen row, (ids, mask) of the rejected one]: the last id of each is only a target."""
        return [self.conversation(self.places[i] + k) for k in range(2)]


def show_example(pairs, i, tokenizer, machine):
    """Prints a pair with what is compared marked: green and red on a terminal, {+ +} and {- -} elsewhere."""
    marks = ("\033[32m", "\033[0m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("{+", "+}", "{-", "-}")
    (chosen, mask), (rejected, other) = pairs.pair(i)
    prompt, *answers = (tokenizer.decode(part) for part in (chosen[~mask], chosen[mask], rejected[other]))
    machine.print(f"an example, with what is compared marked, the chosen answer first:\n\n{prompt}"
                  f"{marks[0]}{answers[0]}{marks[1]}\n\n{marks[2]}{answers[1]}{marks[3]}\n")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities and what is made of them


class Policy(nn.Module):
    """The model as what draws tokens, at `temperature` and of the first vocab_size ids (None: of all). tokens (B, T),
    places and targets (see with_targets) -> the log-probabilities (N,) fp32 that the drawing gives the targets, in
    nats, and the load-balance value of the experts."""

    def __init__(self, model, vocab_size=None, temperature=1.0):
        super().__init__()
        self.model, self.vocab_size, self.temperature = model, vocab_size, temperature

    def forward(self, tokens, places, targets):
        x, balance = self.model.hidden(tokens)
        weight = self.model.output_weight[: self.vocab_size]
        return token_logprobs(x.flatten(0, 1)[places], weight, targets, self.temperature), balance


def with_targets(targets):
    """targets (B, T), -100 = none -> the N places in the flattened (B T) that have one, (N,), and theirs, (N,). Only
    those have to meet the output matrix. To be called on the host: a GPU would have to be waited for to count them."""
    places = (targets.flatten() != -100).nonzero()[:, 0]
    return places, targets.flatten()[places]


def answer_logp(policy, rows, filling, machine):
    """rows: ids and which of them are targets (see conversations.pad) -> the log-probabilities (rows,) fp32 of each
    row's targets, added up, and the load-balance value of the experts."""
    tokens, targets, _ = pad(rows, filling)
    shape, (tokens, places, targets) = tokens.shape, machine.to_device(tokens, *with_targets(targets))
    with machine.autocast():
        logp, balance = policy(tokens, places, targets)
    each = torch.zeros(shape, device=machine.device).flatten().index_copy(0, places, logp)
    return each.view(shape).sum(-1), balance


def compare(logp, reference, sizes, options):
    """logp, reference, sizes (2, n): the answers' log-probabilities, those of the reference, and their tokens; chosen
    above rejected -> {"loss" and the columns of the log: (n,)}.

    sigmoid       -log sigmoid(reward margin), rewards of whole answers (arXiv 2305.18290, eq. 7)
    sigmoid_norm  the same of means a token, so that being long is neither a merit nor a fault (arXiv 2411.15124)
    ipo           (difference of the log-ratios - 1 / (2 beta))^2: a margin to reach, where the sigmoid always wants
                  more (arXiv 2310.12036, eq. 17; of means a token, which is what its authors computed, says TRL)

    kl is half the squared log-ratio of an answer, the mean of the two. Over answers that the model itself writes, its
    mean is the KL divergence from the reference to second order (Schulman's k2). These are the answers of the data, so
    it is a gauge of how far the model has gone, in nats an answer, and not that divergence.
    """
    ratios = logp - reference
    sizes = torch.ones_like(sizes) if options.loss == "sigmoid" else sizes
    scored = ratios / sizes
    ahead = scored[0] - scored[1]
    if options.loss == "ipo":
        loss = (ahead - 1 / (2 * options.beta)) ** 2
    else:
        loss = -F.logsigmoid(options.beta * ahead)
    rewards, ahead, won = options.beta * scored.detach(), ahead.detach(), ahead > TIE / sizes.amax(0)
    return dict(loss=loss, accuracy=won.float(), margin=options.beta * ahead, chosen_reward=rewards[0],
                rejected_reward=rewards[1], kl=ratios.detach().square().mean(0) / 2)  # fmt: skip


def reference_logp(answers, pairs, which, machine, options):
    """The log-probabilities of both answers of the pairs `which`, by the model as it is -> (count, 2) fp32 on the CPU,
    NaN for the other pairs. All processes share the work and get the whole."""
    groups = divide(pairs.lengths[which], options.micro_batch_tokens)[machine.rank :: machine.world_size]
    found = torch.zeros(pairs.count, 2)
    hidden = None if machine.is_main else True  # None: shown on a terminal, and no litter in a file
    bar = tqdm(total=sum(map(len, groups)), unit="pair", desc="reference", disable=hidden, dynamic_ncols=True)
    with bar, torch.no_grad():
        for group in groups:
            found[which[group]] = answers(pairs, which[group])[0].T.cpu()
            bar.update(len(group))
    [total] = machine.sum([found])
    whole = torch.full_like(found, math.nan)
    whole[which] = torch.tensor(total, dtype=torch.float32).view(-1, 2)[which]
    return whole


def make_evaluate(machine, answers, pairs, reference, options):
    """-> evaluate(): loss, accuracy, margin and the chosen answers' log-probability, means over the first eval_size
    pairs. All processes share the work."""
    count = min(pairs.count, options.eval_size)
    groups = divide(pairs.lengths[:count], options.micro_batch_tokens)[machine.rank :: machine.world_size]

    @torch.no_grad()
    def evaluate():
        sums = dict.fromkeys(("loss", "accuracy", "margin", "chosen_logp"), 0.0)
        for group in groups:
            logp, _ = answers(pairs, group)
            values = compare(logp, *facts(pairs, reference, group, machine), options) | dict(chosen_logp=logp[0])
            sums = {name: sums[name] + values[name].sum().cpu().double() for name in sums}
        return {f"val_{name}": value / count
                for name, value in zip(sums, machine.sum(sums.values()), strict=True)}  # fmt: skip

    return evaluate


def facts(pairs, reference, group, machine):
    """What is known of these pairs beforehand: the reference's log-probabilities and the answers' tokens, (2, n)."""
    return machine.to_device(reference[group].T, torch.from_numpy(pairs.answers[group].T))


# ---------------------------------------------------------------------------------------------------------------------
# The run


def describe(options, machine, model, train_pairs, val_pairs, which, seconds, line):
    """Prints, before the first step, what is going to happen, on what, and what it will cost. which: the pairs that the
    run will see; seconds: of one micro-batch; line: on how it is computed."""
    steps, step = options.max_steps, rows_of_step(0, train_pairs.count, options.batch_size, options.seed)
    groups = divide(train_pairs.lengths[step], options.micro_batch_tokens, machine.world_size)
    padded = sum(len(group) * int(train_pairs.lengths[step][group].max()) for group in groups)
    for split, pairs in (("training", train_pairs), ("validation", val_pairs)):
        if pairs.too_long or pairs.no_choice:
            machine.print(f"left out: {pairs.too_long:,} {split} pairs longer than {options.sequence_length} tokens, "
                          f"{pairs.no_choice:,} with equal or empty answers")  # fmt: skip
    a_pair = seconds * len(groups) / machine.world_size / options.batch_size
    first = 0 if options.resume else a_pair / 3 * (len(which) + val_pairs.count)  # no backward pass
    duration = first + a_pair * options.batch_size * steps
    machine.print(
        f"model     {sum(p.numel() for p in model.parameters()):,} parameters, from {options.init_from}\n"
        f"data      {options.data}: {train_pairs.count:,} pairs, {train_pairs.rows.sum():,} tokens, "
        f"{train_pairs.answers.sum():,} of them compared; {steps * options.batch_size / train_pairs.count:.2f} epochs\n"
        f"loss      {options.loss}, beta {options.beta}\n"
        f"step      {options.batch_size} pairs in about {len(groups)} micro-batches on {machine.world_size} processes; "
        f"{1 - train_pairs.rows[step].sum() / padded:.0%} of the first step is padding\n"
        f"device    {machine.summary}; {line}\n"
        f"cost      {steps:,} steps; about {duration // 3600:.0f} h {duration // 60 % 60 + 1:.0f} min at the most, "
        f"{first:.0f} s of it to ask the reference, before the first step"
    )


def train(options, machine):
    """Runs the whole tuning and leaves a checkpoint, log.csv and loss.png in options.out_dir."""
    train_set, val_set, tokenizer = open_sets(options, "preferences", machine)
    model, state = start_tuning(options, machine, tokenizer)
    train_pairs, val_pairs = (Pairs(token_set, options.sequence_length) for token_set in (train_set, val_set))
    if not (train_pairs.count and val_pairs.count):
        raise ValueError(f"--sequence_length={options.sequence_length}: of {len(train_set) // 2} training and "
                         f"{len(val_set) // 2} validation pairs, {train_pairs.count} and {val_pairs.count} fit")
    if options.micro_batch_tokens < 2 * options.sequence_length:
        raise ValueError(f"--micro_batch_tokens={options.micro_batch_tokens} is less than one pair, two rows of "
                         f"{options.sequence_length}")  # fmt: skip
    count_steps(options, train_pairs.count, machine)
    if options.shard:
        shard(model, machine, "hidden")
    optimizers = make_optimizers(model, options, machine)
    policy = Policy(model)

    def answers(pairs, group, network=policy):
        """-> log-probabilities (2, n) of the chosen and rejected answers of these pairs; the load-balance value."""
        rows = [row for column in zip(*(pairs.pair(i) for i in group), strict=True) for row in column]
        logp, balance = answer_logp(network, rows, tokenizer.pad_id, machine)
        return logp.view(2, -1), balance

    longest = np.argsort(-train_pairs.lengths, kind="stable")[: options.micro_batch_tokens // train_pairs.lengths.max()]
    tried = profile_step(machine, policy, lambda network: answers(train_pairs, longest, network)[0].sum(),
                            options)  # fmt: skip
    network, seconds, line = tried
    which = pairs_of_run(options, train_pairs.count)
    describe(options, machine, model, train_pairs, val_pairs, which, seconds, line)
    show_example(train_pairs, rows_of_step(0, train_pairs.count, 1, options.seed)[0], tokenizer, machine)
    # of all validation pairs, since a resumed run may raise --eval_size
    if options.resume:
        reference = kept_reference(options, state, train_pairs, val_pairs)
    else:
        with unsharded(model):
            reference = dict(train=reference_logp(answers, train_pairs, which, machine, options),
                             val=reference_logp(answers, val_pairs, np.arange(val_pairs.count), machine, options))
    evaluate = make_evaluate(machine, answers, val_pairs, reference["val"], options)
    columns = "accuracy margin chosen_reward rejected_reward kl val_accuracy val_margin val_chosen_logp".split()
    run = Run(options, machine, model, network, tokenizer, optimizers, evaluate,
              model.flops_per_token(train_pairs.rows.mean()), columns=columns,
              extra_state=dict(reference=reference), evaluate_first=True)  # fmt: skip
    if options.resume:
        run.restore(state)

    def loss_of(group):  # a micro-batch's share of the mean over the whole step
        logp, balance = answers(train_pairs, group, network)
        values = compare(logp, *facts(train_pairs, reference["train"], group, machine), options)
        shares = {name: value.sum() / options.batch_size for name, value in values.items()}
        balance = model.config.router_aux_loss_coef * balance * len(group) / options.batch_size
        return shares.pop("loss") + balance, shares

    with run:
        for step in run.steps():
            rows = np.array(rows_of_step(step, train_pairs.count, options.batch_size, options.seed))
            groups = divide(train_pairs.lengths[rows], options.micro_batch_tokens, machine.world_size)
            lr = options.learning_rate * cosine(step, options.max_steps, int(options.warmup * options.max_steps))
            loss, columns = 0.0, {}
            for group in run.micro_batches(groups[machine.rank :: machine.world_size]):
                share, values = loss_of(rows[group])
                loss += run.backward(share)
                columns = {name: columns.get(name, 0.0) + value for name, value in values.items()}
            grad_norm = optimizer_step(model, optimizers, lr, options.grad_clip)
            tokens = int(train_pairs.rows[rows].sum())
            run.end_step(loss=loss, grad_norm=grad_norm, lr=lr, tokens=tokens, **columns)
    run.finish()


def pairs_of_run(options, count):
    """The numbers of the pairs that the run will see: all of them after an epoch."""
    steps = min(options.max_steps, math.ceil(count / options.batch_size))
    return np.unique([i for step in range(steps) for i in rows_of_step(step, count, options.batch_size, options.seed)])


def kept_reference(options, state, train_pairs, val_pairs):
    """What the checkpoint of a resumed run knows of its reference. Raises ValueError if that is of other data."""
    reference = state.get("reference", {})
    for split, pairs in (("train", train_pairs), ("val", val_pairs)):
        known = reference.get(split) if isinstance(reference, dict) else None
        if not isinstance(known, torch.Tensor) or known.shape != (pairs.count, 2) or known.dtype != torch.float32:
            raise ValueError(f"--resume: the run in {options.out_dir} began with other pairs than the {pairs.count} "
                             f"of the {split} split that --data={options.data} has now")  # fmt: skip
    return reference


def main(argv):
    run_stage(train, read_run_options(DpoOptions, argv, "dpo_tiny.py", TUNE_MAY_CHANGE))


if __name__ == "__main__":
    run_command(main)
