"""Direct preference optimisation (DPO): of two answers the better one becomes likelier.

    python dpo.py                                                   the tiny model, answers about built-in stories
    python dpo.py config/dpo_doge20m.py                             a real recipe
    torchrun --nproc_per_node=8 dpo.py config/dpo_doge20m.py        the same on eight GPUs: same batches, same losses
    python dpo.py --out_dir=out/stories-preferences --resume        continues as if it had never stopped

Fine-tuning shows good answers, but never what is wrong with a bad one. A preference shows both: a prompt, an answer
that was chosen, and one that was rejected. Saying which of two is better is also easier than writing the best.

The idea (Rafailov et al. 2023, arXiv 2305.18290). Suppose that an answer has a reward, and that people choose the first
of two answers with probability sigmoid(its reward - the other's). Of all models that stay close to a reference, the
model they began as, the one with the most reward is known: the probability of an answer is the reference's, times
exp(reward / beta), times a factor that depends only on the prompt. Read backwards, every model is the best one for some
reward:

    reward(answer) = beta * (log p(answer) - log p_reference(answer)) + (a term that depends only on the prompt)

So the choices of people can be made likely without a reward model and without drawing samples:

    loss = -log sigmoid(reward(chosen) - reward(rejected))

With a smaller beta the model must go farther from its reference for the same margin. Five things are easy to get wrong.

What is compared. log p is the sum over the tokens of the answer and the EOS that ends it, without the prompt.

What the reference is. The model at the start, for the whole run. Its log-probabilities of all answers, two numbers per
pair, are computed once before the first step, so a step costs one model and not two. They are part of every checkpoint:
a resumed run has the reference it began with, even if --init_from has been overwritten.

Ties. At first the model is its reference: every reward is 0, the loss is ln 2 = 0.693, and every pair is a tie. A tie
is not won, and neither is a margin that may be rounding (TIE), so accuracy starts at 0 and not at 1/2.

What the loss does not see. It compares, so it also falls when both answers become unlikely, the rejected one faster
(arXiv 2402.13228). val_chosen_logp shows how likely the chosen answers are. A small fall is usual. After a collapse the
model no longer writes text: lower --learning_rate or raise --beta.

Long pairs. A pair of which one row does not fit is left out and counted. Cut at the end, an answer would lose its EOS
and be compared by its first half; cut at the front, the prompt would lose the question.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanodoge.conversations import Examples, TokenSet, fit_answers, open_sets
from nanodoge.machine import gathered, shard
from nanodoge.options import run_command
from nanodoge.policy import Policy, with_positions
from nanodoge.run import Run, TuneOptions, carry_out, count_steps, read_tune_options, start_tuning, try_out
from train import cosine, make_optimizers, rows_of_step

# Nats. A chosen answer that has gained less than this on the rejected one is tied with it: 50.25 % against 49.75 % at
# the usual beta. Rounding alone makes 3e-5 in float32 and 0.15 in bfloat16 (the largest of 60 pairs, tiny model, CPU),
# so in bfloat16 the first step may show a few wins.
TIE = 0.1
# What --beta=0 stands for: 0.1 as in the DPO paper. Means per token are smaller, hence 5 as in Tulu 3 (2411.15124).
BETA = {"sigmoid": 0.1, "ipo": 0.1, "sigmoid_norm": 5.0}
COLUMNS = "accuracy margin chosen_reward rejected_reward kl val_accuracy val_margin val_chosen_logp".split()


@dataclass
class DpoOptions(TuneOptions):
    init_from: str = "out/stories-chat"  # checkpoint folder of the model to tune, which is also the reference
    data: str = "data/stories-preferences"  # folder made by prepare_data.py --kind=preferences
    loss: Literal["sigmoid", "ipo", "sigmoid_norm"] = "sigmoid"  # sigmoid: DPO's own; the others use means per token
    beta: float = 0.0  # the larger, the closer the model stays to the reference; 0 = 0.1, for sigmoid_norm 5
    learning_rate: float = 8e-5  # peak learning rate

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"--beta={self.beta} must be a number above 0, or 0 for the usual one")
        self.beta = self.beta or BETA[self.loss]


def select(token_set: TokenSet, length: int) -> Examples:
    """The pairs that can be compared: both rows fit into `length` tokens, and the answers differ and are not empty."""
    sizes, targets, _ = (x.reshape(-1, 2) for x in fit_answers(token_set, len(token_set.ids)))
    first = 2 * np.arange(len(sizes))
    pairs = Examples(token_set, first, sizes, targets, {})
    is_choice = (targets >= 2).all(1)  # an answer is at least one token and EOS
    for i in np.flatnonzero(is_choice & (targets[:, 0] == targets[:, 1])):
        chosen, rejected = (ids[mask] for ids, mask in pairs.rows(i))
        is_choice[i] = not np.array_equal(chosen, rejected)
    fits = sizes.max(1) <= length
    kept = np.flatnonzero(is_choice & fits)
    left_out = {
        f"longer than {length} tokens": int((is_choice & ~fits).sum()),
        "with equal or empty answers": int((~is_choice).sum()),
    }
    return Examples(token_set, first[kept], sizes[kept], targets[kept], left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities, and the loss


def answer_logp(network, pairs, group, pad_id, machine) -> tuple[Tensor, Tensor]:
    """The log-probabilities (2, n) fp32 of the chosen and the rejected answers of the n pairs `group`, each summed over
    its tokens; and the load-balance value of the experts."""
    tokens, targets = pairs.batch(group, pad_id)  # (2n, T)
    shape, (tokens, positions, targets) = tokens.shape, machine.put(tokens, *with_positions(targets))
    with machine.autocast():
        logp, balance = network(tokens, positions, targets)  # (N,)
    each = torch.zeros(shape, device=machine.device).flatten().index_copy(0, positions, logp)
    return each.view(shape).sum(-1).view(2, -1), balance


def compare(logp: Tensor, reference: Tensor, sizes: Tensor, options: DpoOptions) -> dict[str, Tensor]:
    """{"loss" and columns of the log: (n,)} of n pairs. logp, reference, sizes (2, n): log-probabilities of the answers
    by the model and by the reference, and their tokens; row 0 the chosen ones.

    sigmoid       -log sigmoid(reward margin), rewards of whole answers (arXiv 2305.18290, eq. 7)
    sigmoid_norm  the same with means per token, so that length neither helps nor hurts (arXiv 2411.15124)
    ipo           (difference of the log-ratios - 1 / (2 beta))^2: a margin to reach, where the sigmoid always wants
                  more (arXiv 2310.12036, eq. 17; with means per token, which is what its authors computed, says TRL)

    kl is half the squared log-ratio of an answer, the mean of the two. For answers that the model itself draws, its
    mean is the KL divergence from the reference to second order (Schulman's k2). These answers are the data's, so it
    only indicates how far the model has moved, in nats per answer.
    """
    ratios = logp - reference
    sizes = torch.ones_like(sizes) if options.loss == "sigmoid" else sizes
    scored = ratios / sizes
    ahead = scored[0] - scored[1]
    if options.loss == "ipo":
        loss = (ahead - 1 / (2 * options.beta)) ** 2
    else:
        loss = -F.logsigmoid(options.beta * ahead)
    rewards, ahead = options.beta * scored.detach(), ahead.detach()
    return dict(
        loss=loss,
        accuracy=(ahead > TIE / sizes.amax(0)).float(),
        margin=options.beta * ahead,
        chosen_reward=rewards[0],
        rejected_reward=rewards[1],
        kl=ratios.detach().square().mean(0) / 2,
    )


def compare_group(network, pairs, reference, group, pad_id, machine, options):
    """`compare` for the pairs `group`, with the log-probabilities (n,) of the chosen answers as "chosen_logp"; and the
    load-balance value. reference (count, 2): its log-probabilities of all pairs."""
    logp, balance = answer_logp(network, pairs, group, pad_id, machine)
    known = machine.put(reference[group].T, torch.from_numpy(pairs.targets[group].T))
    return compare(logp, *known, options) | dict(chosen_logp=logp[0].detach()), balance


# ---------------------------------------------------------------------------------------------------------------------
# The reference, and validation


@torch.no_grad()
def reference_logp(policy, pairs, which, pad_id, machine, options) -> Tensor:
    """The log-probabilities (count, 2) fp32, on the CPU, of both answers of the pairs `which` by the model as it is,
    and NaN for the other pairs. The ranks share the work, and all get the whole."""
    groups = pairs.micro_batches(which, options.micro_tokens)[machine.rank :: machine.world_size]
    found = torch.zeros(pairs.count, 2)
    hidden = None if machine.is_main else True  # None: shown on a terminal only
    for group in tqdm(groups, unit="batch", desc="reference", disable=hidden, dynamic_ncols=True):
        found[group] = answer_logp(policy, pairs, group, pad_id, machine)[0].T.cpu()
    [total] = machine.sum([found])
    known = torch.full_like(found, math.nan)
    known[which] = torch.tensor(total, dtype=torch.float32).view(-1, 2)[which]
    return known


def kept_reference(options, state, sets):
    """{split: (count, 2)} of a resumed run, from its training state. Raises ValueError if it is of other data."""
    reference = state.get("reference", {})
    for split, pairs in sets.items():
        known = reference.get(split) if isinstance(reference, dict) else None
        if not isinstance(known, torch.Tensor) or known.shape != (pairs.count, 2) or known.dtype != torch.float32:
            raise ValueError(
                f"--resume: the run in {options.out_dir} began with other pairs than the {pairs.count} "
                f"of the {split} split that --data={options.data} has now"
            )
    return reference


@torch.no_grad()
def evaluate(machine, policy, val, reference, pad_id, options):
    """{log column: value}: means over the first eval_rows pairs. The ranks share the work."""
    count = min(val.count, options.eval_rows)
    sums = dict.fromkeys(("loss", "accuracy", "margin", "chosen_logp"), 0.0)
    for group in val.micro_batches(range(count), options.micro_tokens)[machine.rank :: machine.world_size]:
        values, _ = compare_group(policy, val, reference, group, pad_id, machine, options)
        sums = {name: sums[name] + values[name].sum().cpu().double() for name in sums}
    return {f"val_{name}": value / count for name, value in zip(sums, machine.sum(sums.values()), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Run(Run):
    """A run whose checkpoints also hold the reference's log-probabilities: {split: (count, 2)}."""

    reference = None

    def state(self):
        return super().state() | dict(reference=self.reference)


def announce(options, machine, model, train_pairs, val_pairs, which, seconds, line):
    """Prints, before the first step, what is going to happen, on what, and what it will cost. which: the pairs that the
    run will see; seconds: of one micro-batch; line: on how it is computed."""
    steps, step = options.max_steps, rows_of_step(0, train_pairs.count, options.batch_rows, options.seed)
    groups = train_pairs.micro_batches(step, options.micro_tokens, machine.world_size)
    padded = sum(len(group) * int(train_pairs.lengths[group].max()) for group in groups)
    for split, pairs in (("training", train_pairs), ("validation", val_pairs)):
        for reason, count in pairs.left_out.items():
            if count:
                machine.print(f"left out: {count:,} {split} pairs {reason}")
    a_pair = seconds * len(groups) / machine.world_size / options.batch_rows
    first = 0 if options.resume else a_pair / 3 * (len(which) + val_pairs.count)  # no backward pass
    duration = first + a_pair * options.batch_rows * steps
    machine.print(
        f"model     {sum(p.numel() for p in model.parameters()):,} parameters, from {options.init_from}\n"
        f"data      {options.data}: {train_pairs.count:,} pairs, {train_pairs.sizes.sum():,} tokens, "
        f"{train_pairs.targets.sum():,} of them compared; {steps * options.batch_rows / train_pairs.count:.2f} epochs\n"
        f"loss      {options.loss}, beta {options.beta}\n"
        f"step      {options.batch_rows} pairs in about {len(groups)} micro-batches on {machine.world_size} processes; "
        f"{1 - train_pairs.sizes[step].sum() / padded:.0%} of the first step is padding\n"
        f"device    {machine.summary}; {line}\n"
        f"cost      {steps:,} steps; about {duration // 3600:.0f} h {duration // 60 % 60 + 1:.0f} min at the most, "
        f"{first:.0f} s of it to ask the reference, before the first step"
    )


def train(options, machine):
    """Runs the whole tuning and leaves a checkpoint, log.csv and loss.png in options.out_dir."""
    *sets, tokenizer = open_sets(options, "preferences", machine)
    model, state = start_tuning(options, machine, tokenizer)
    pairs, val = (select(token_set, options.sequence_length) for token_set in sets)
    if not (pairs.count and val.count):
        raise ValueError(
            f"--sequence_length={options.sequence_length}: of {len(sets[0]) // 2} training and "
            f"{len(sets[1]) // 2} validation pairs, {pairs.count} and {val.count} fit"
        )
    if options.micro_tokens < 2 * options.sequence_length:
        raise ValueError(
            f"--micro_tokens={options.micro_tokens} is less than one pair, two rows of {options.sequence_length}"
        )
    count_steps(options, pairs.count, machine)
    shard(model, options, machine, "hidden")
    optimizers = make_optimizers(model, options, fused=machine.device.type in ("cpu", "cuda"))
    policy, pad_id = Policy(model), tokenizer.pad_id

    longest = np.argsort(-pairs.lengths, kind="stable")[: options.micro_tokens // pairs.lengths.max()]
    tried = try_out(machine, policy, lambda n: answer_logp(n, pairs, longest, pad_id, machine)[0].sum(), options)
    network, seconds, line = tried
    steps = min(options.max_steps, math.ceil(pairs.count / options.batch_rows))  # after an epoch every pair was used
    used = np.unique(
        [i for step in range(steps) for i in rows_of_step(step, pairs.count, options.batch_rows, options.seed)]
    )
    announce(options, machine, model, pairs, val, used, seconds, line)
    example = pairs.show(rows_of_step(0, pairs.count, 1, options.seed)[0], tokenizer)
    machine.print(f"an example, with what is compared marked, the chosen answer first:\n\n{example}\n")
    if options.resume:
        reference = kept_reference(options, state, dict(train=pairs, val=val))
    else:
        with gathered(model):
            reference = {
                "train": reference_logp(policy, pairs, used, pad_id, machine, options),
                # of all validation pairs, since a resumed run may raise --eval_rows
                "val": reference_logp(policy, val, np.arange(val.count), pad_id, machine, options),
            }
    run = Run(
        options,
        machine,
        model,
        network,
        tokenizer,
        optimizers,
        lambda: evaluate(machine, policy, val, reference["val"], pad_id, options),
        model.flops_per_token(pairs.sizes.mean()),
        columns=COLUMNS,
    )
    run.reference = reference
    if options.resume:
        run.restore(state)

    def loss_of(group):  # a micro-batch's share of the mean over the whole step
        values, balance = compare_group(run.network, pairs, reference["train"], group, pad_id, machine, options)
        shares = {name: value.sum() / options.batch_rows for name, value in values.items() if name != "chosen_logp"}
        balance = model.config.router_aux_loss_coef * balance * len(group) / options.batch_rows
        return shares.pop("loss") + balance, shares

    with run:
        for step in run.steps():
            rows = rows_of_step(step, pairs.count, options.batch_rows, options.seed)
            groups = pairs.micro_batches(rows, options.micro_tokens, machine.world_size)
            lr = options.learning_rate * cosine(step, options.max_steps, int(options.warmup * options.max_steps))
            run.update(groups[machine.rank :: machine.world_size], loss_of, int(pairs.sizes[rows].sum()), lr)
    run.finish()


def main(argv):
    carry_out(train, read_tune_options(DpoOptions, argv, "dpo_tiny.py"))


if __name__ == "__main__":
    run_command(main)
