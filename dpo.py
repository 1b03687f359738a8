"""Direct preference optimisation (DPO): of two answers the better one becomes likelier.

    python dpo.py                                                   the tiny model, answers about built-in stories
    python dpo.py config/dpo_doge.py                                a real recipe
    torchrun --nproc_per_node=8 dpo.py config/dpo_doge.py           the same on eight GPUs: same batches, same losses
    python dpo.py --out_dir=out/stories-preferences --resume        continues as if it had never stopped

Fine-tuning shows good answers, but never what is wrong with a bad one. A preference shows both: a prompt, an answer
that was chosen, and one that was rejected.

The idea (Rafailov et al. 2023, arXiv 2305.18290). Suppose that an answer has a reward, and that people choose the first
of two answers with probability sigmoid(its reward - the other's). Look for the model with the most reward that stays
close to a reference, the model at the start. The solution is known: p(answer) = p_reference(answer) exp(reward / beta),
times a factor that depends only on the prompt. Solved for the reward, this equation gives every model the reward for
which it is the best. So the choices of people can be made likely without a reward model and without drawing samples:

    reward(answer) = beta * (log p(answer) - log p_reference(answer)) + (a term that depends only on the prompt)
    loss = -log sigmoid(reward(chosen) - reward(rejected))

With a smaller beta the model must move farther from its reference for the same margin. Five things are easy to get
wrong.

What is compared. log p is the sum over the tokens of the answer and the EOS that ends it, without the prompt.

What the reference is. The model at the start, for the whole run. Its log-probabilities of all answers are computed once
before the first step, so a step costs one model and not two. They are part of every checkpoint, for a resumed run.

Ties. At first the model is its reference: every reward is 0, the loss is ln 2 = 0.693, and every pair is a tie. A tie
does not count as won, nor does a margin so small that it may be rounding (TIE). So accuracy starts at 0 and not at 1/2.

What the loss does not show. It depends on a difference, so it also falls when both answers become unlikely, the
rejected one faster (arXiv 2402.13228). Watch val_chosen_logp: a small fall is usual. After a large fall the model no
longer writes text; then a lower --learning_rate or a higher --beta helps.

Long pairs. A pair with a row that is too long is left out and counted. Cut at the end, an answer would lose its EOS;
cut at the front, the prompt would lose the question.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanodoge import stage
from nanodoge.examples import Examples, TokenSet, describe, fit_answers
from nanodoge.machine import Machine, shard, unsharded
from nanodoge.options import NonNegative, run_command
from nanodoge.policy import Policy, with_positions
from nanodoge.run import Run
from train import cosine, make_optimizers, optimizer_step, prepare_if_built_in, rows_of_step

# Nats. A chosen answer that has gained less than this on the rejected one is tied with it: 50.25 % against 49.75 % at
# the usual beta. Rounding alone makes 3e-5 in float32 and 0.15 in bfloat16 (the largest of 60 pairs, tiny model, CPU),
# so in bfloat16 the first step may show a few wins.
TIE = 0.1
# What --beta=0 stands for: 0.1 as in the DPO paper. Means per token are smaller, hence 5 as in Tulu 3 (2411.15124).
BETA = {"sigmoid": 0.1, "ipo": 0.1, "sigmoid_norm": 5.0}
COLUMNS = "accuracy margin chosen_reward rejected_reward chosen_logp kl".split()  # of a step
VALIDATED = "loss accuracy margin chosen_logp".split()  # as val_loss and so on


@dataclass
class DpoOptions(stage.TuneOptions):
    """Direct preference optimisation."""

    recipe: ClassVar[str] = "dpo_tiny.py"
    init_from: str = "out/stories-chat"  # checkpoint folder of the model to tune, which is also the reference
    data: str = "data/stories-preferences"  # folder made by prepare_data.py --kind=preferences
    loss: Literal["sigmoid", "ipo", "sigmoid_norm"] = "sigmoid"  # sigmoid: DPO's own; the others use means per token
    beta: NonNegative = 0.0  # the larger, the closer the model stays to the reference; 0 = 0.1, for sigmoid_norm 5
    learning_rate: NonNegative = 8e-5  # peak learning rate

    def __post_init__(self):
        super().__post_init__()
        self.beta = self.beta or BETA[self.loss]


def select(token_set: TokenSet, options: DpoOptions) -> Examples:
    """The pairs of which both rows fit into sequence_length tokens, and have an answer."""
    sizes, targets, _ = (x.reshape(-1, 2) for x in fit_answers(token_set, len(token_set.ids)))
    kept = np.flatnonzero((sizes.max(1) <= options.sequence_length) & (targets > 0).all(1))
    left_out = {f"longer than --sequence_length={options.sequence_length}": len(sizes) - len(kept)}
    return Examples("pairs", token_set, 2 * kept, sizes[kept], targets[kept], left_out)


# ---- Log-probabilities, and the loss


def answer_logp(network: nn.Module, pairs: Examples, group: Sequence[int], machine: Machine) -> tuple[Tensor, Tensor]:
    """The log-probabilities (2, n) fp32, summed over tokens, of the chosen and the rejected answers of the n pairs
    `group`; and the load-balance value of the experts."""
    tokens, targets = pairs.batch(group)  # (2n, T)
    shape, (tokens, positions, targets) = tokens.shape, machine.to_device(tokens, *with_positions(targets))
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

    kl is half the squared log-ratio of an answer (Schulman's k2), the mean of the two. The answers are the data's and
    not the model's, so it only indicates how far the model has moved, in nats per answer.
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
        chosen_logp=logp[0].detach(),
        kl=ratios.detach().square().mean(0) / 2,
    )


def compare_group(
    network: nn.Module, pairs: Examples, reference: Tensor, group: np.ndarray, machine: Machine, options: DpoOptions
) -> tuple[dict[str, Tensor], Tensor]:
    """`compare` for the pairs `group`, and the load-balance value. reference (count, 2): its log-probabilities."""
    logp, balance = answer_logp(network, pairs, group, machine)
    known = machine.to_device(reference[group].T, torch.from_numpy(pairs.targets[group].T))
    return compare(logp, *known, options), balance


# ---- The reference, and validation


@torch.no_grad()
def reference_logp(policy: Policy, pairs: Examples, which: np.ndarray, machine: Machine, options: DpoOptions) -> Tensor:
    """The log-probabilities (count, 2) fp32, on the CPU, of both answers of the pairs `which` by the model as it is,
    and NaN for the other pairs. The ranks share the work."""
    groups = pairs.micro_batches(which, options.micro_batch_tokens)[machine.rank :: machine.world_size]
    found = torch.zeros(pairs.count, 2)
    hidden = None if machine.is_main else True  # None: shown on a terminal only
    for group in tqdm(groups, unit="batch", desc="reference", disable=hidden, dynamic_ncols=True):
        found[group] = answer_logp(policy, pairs, group, machine)[0].T.cpu()
    [total] = machine.sum([found])
    known = torch.full_like(found, math.nan)
    known[which] = torch.tensor(total, dtype=torch.float32).view(-1, 2)[which]
    return known


def kept_reference(state: dict, sets: dict[str, Examples], options: DpoOptions) -> dict[str, Tensor]:
    """{split: (count, 2)} of a resumed run, from its training state. Raises ValueError if it is of other data."""
    reference = state.get("reference")
    for split, pairs in sets.items():
        known = reference.get(split) if isinstance(reference, dict) else None
        if not isinstance(known, Tensor) or known.shape != (pairs.count, 2) or known.dtype != torch.float32:
            here = f"the {pairs.count} of the {split} split that --data={options.data} has now"
            raise ValueError(f"--resume: the run in {options.out_dir} began with other pairs than {here}")
    return reference


@torch.no_grad()
def evaluate(
    machine: Machine, policy: Policy, val: Examples, reference: Tensor, options: DpoOptions
) -> dict[str, float]:
    """{log column: value}: means over the first eval_size pairs. The ranks share the work."""
    count, sums = min(val.count, options.eval_size), dict.fromkeys(VALIDATED, 0.0)
    for group in val.micro_batches(range(count), options.micro_batch_tokens)[machine.rank :: machine.world_size]:
        values, _ = compare_group(policy, val, reference, group, machine, options)
        sums = {name: total + values[name].sum().cpu().double() for name, total in sums.items()}
    return {f"val_{name}": value / count for name, value in zip(sums, machine.sum(sums.values()), strict=True)}


# ---- The run


def train(options: DpoOptions, machine: Machine) -> None:
    """Runs the whole tuning and leaves a checkpoint, log.csv and loss.png in options.out_dir."""
    prepare_if_built_in(options, machine, "preferences")
    model, state, data, val = stage.start_tuning(options, machine, "preferences", select)
    if options.micro_batch_tokens < (pair := 2 * options.sequence_length):
        raise ValueError(f"--micro_batch_tokens={options.micro_batch_tokens} is less than one pair, {pair} tokens")
    if options.shard:
        shard(model, machine, "hidden")
    policy, reference = Policy(model), {}
    optimizers, flops = make_optimizers(model, options, machine), model.flops_per_token(data.sizes.mean())

    def validate() -> dict[str, float]:
        return evaluate(machine, policy, val, reference["val"], options)

    settings = dict(columns=[*COLUMNS, *(f"val_{n}" for n in VALIDATED)], extra_state=dict(reference=reference))
    run = Run(options, machine, model, policy, data.set.tokenizer, optimizers, validate, flops, state, **settings)
    longest = data.longest(options.micro_batch_tokens)
    examples = options.max_steps * options.batch_size / machine.world_size
    count = examples * data.lengths.mean() / data.lengths[longest].sum()
    lines = describe(data, val, options) | dict(loss=f"{options.loss}, beta {options.beta}")
    stage.announce(run, lambda network: answer_logp(network, data, longest, machine)[0].sum(), count, lines)
    [first] = rows_of_step(0, data.count, 1, options.seed)
    machine.print(f"an example, with what is compared marked, the chosen answer first:\n\n{data.show(first)}\n")

    if options.resume:
        reference |= kept_reference(state, dict(train=data, val=val), options)
    else:
        steps = range(min(options.max_steps, math.ceil(data.count / options.batch_size)))  # after an epoch, all pairs
        used = np.unique([rows_of_step(step, data.count, options.batch_size, options.seed) for step in steps])
        with unsharded(model):  # of all validation pairs, since a resumed run may raise --eval_size
            val_reference = reference_logp(policy, val, np.arange(val.count), machine, options)
            reference |= dict(train=reference_logp(policy, data, used, machine, options), val=val_reference)

    with run:
        for step in run.steps():
            lr = options.learning_rate * cosine(step, options.max_steps, int(options.warmup * options.max_steps))
            rows = rows_of_step(step, data.count, options.batch_size, options.seed)
            groups = data.micro_batches(rows, options.micro_batch_tokens, machine.world_size)  # of all ranks
            loss, columns = 0.0, dict.fromkeys(COLUMNS, 0.0)
            for group in run.micro_batches(groups[machine.rank :: machine.world_size]):
                values, balance = compare_group(run.network, data, reference["train"], group, machine, options)
                balance = model.config.router_aux_loss_coef * balance * len(group) / options.batch_size
                loss += run.backward(values["loss"].sum() / options.batch_size + balance)
                columns = {name: total + values[name].sum() / options.batch_size for name, total in columns.items()}
            grad_norm = optimizer_step(model, optimizers, lr, options.grad_clip)
            run.end_step(loss=loss, grad_norm=grad_norm, lr=lr, tokens=int(data.sizes[rows].sum()), **columns)
    stage.print_answer(options, machine, model, val)


def main(argv: list[str]) -> None:
    stage.run_stage(train, stage.read_run_options(DpoOptions, argv))


if __name__ == "__main__":
    run_command(main)
