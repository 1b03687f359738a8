"""Reinforcement learning with verifiable rewards (GRPO): a model writes answers, and the right ones become likelier.

    python grpo.py                                                   the tiny model on built-in sums, minutes
    python grpo.py config/grpo_doge.py                               a real recipe
    torchrun --nproc_per_node=8 grpo.py config/grpo_doge.py          the same on eight GPUs: same problems, same draws
    python grpo.py --out_dir=out/sums-problems --resume              continues as if it had never stopped

Fine-tuning shows a model how an answer is reached. Here no answers are shown. The model gets problems whose answers can
be checked, writes its own answers, and each of these gets a number, its reward. Then every token of a good answer is
made a little likelier, and every token of a bad one less likely. The method is GRPO, group relative policy optimisation
(Shao et al. 2024, arXiv 2402.03300). Five choices decide how well it works.

Advantage. Each problem is answered several times, and an answer's advantage is its reward minus the mean of its group.
If all answers of a group have the same reward, the advantage is 0, and nothing is learned from them (the log counts
such groups as no_signal). The first GRPO also divides by the group's standard deviation. That gives most weight to
problems that are nearly always or nearly never solved (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783), so it is an
option, off here.

Clipping. The loss of a token is -min(r A, clip(r) A). A is the advantage of its answer, r the ratio of its probability
to what it was when drawn, and clip keeps r within 1 - clip_low .. 1 + clip_high (PPO, Schulman et al. 2017, arXiv
1707.06347). In the first update r = 1: the gradient is the plain policy gradient, -A grad log p. In later updates on
the same answers, a token has no gradient once its r has left this range in the direction of its advantage. A clip_high
above clip_low lets rare tokens become more likely (DAPO, Yu et al. 2025, arXiv 2503.14476).

The weight of a token. The loss is the sum over all tokens of all answers of a step, divided by their number, as in
DAPO. The first GRPO takes the mean within each answer first. Then a token of a long wrong answer has less weight than
one of a short wrong answer, so the model learns to make wrong answers long.

KL divergence. --kl=B adds to the loss of every token B times an estimate of the KL divergence from the model at the
start: k3 = exp(d) - d - 1 with d = log p_start - log p, which is never negative and on average equals the divergence
(Schulman 2020, "Approximating KL divergence"). With --kl=0 no second model is held in memory.

Reward. It counts the right number, in an answer that ends: an answer that reaches --max_new_tokens without EOS gets no
reward for its number. It counts the format: a thought between its tags, then a solution between its own, each tag once.
With --reward_length, length costs. Read the answers in OUT_DIR/samples: the reward also rises if the model has found a
way to it that you did not intend.
"""

import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from model import Doge
from nanodoge import stage
from nanodoge.answers import is_right
from nanodoge.checkpoint import clear, load_model, save_checkpoint
from nanodoge.examples import Examples, TokenSet, bucket_by_length, describe, pad
from nanodoge.machine import Machine, shard
from nanodoge.options import Count, NonNegative, Positive, Range, Share, Whole, run_command
from nanodoge.policy import Policy, with_positions, write_answers
from nanodoge.run import Run
from nanodoge.tokenizer import Tokenizer
from train import cosine, make_optimizers, optimizer_step, prepare_if_built_in, rows_of_step, scramble

# Means over the answers of a step; no_signal: the share whose group has none; entropy: the mean of -log p over their
# tokens when drawn. Of its last update: the share of tokens that are clipped, and the mean k3. Then validation.
COLUMNS = "reward reward_answer reward_format length no_signal entropy clipped kl val_accuracy val_reward".split()


@dataclass
class GrpoOptions(stage.TuneOptions):
    """Reinforcement learning."""

    recipe: ClassVar[str] = "grpo_tiny.py"
    may_change: ClassVar[str] = stage.TuneOptions.may_change + " eval_samples slots"
    init_from: str = "out/sums-chat"  # checkpoint folder of the model to tune
    data: str = "data/sums-problems"  # folder made by prepare_data.py --kind=problems
    batch_size: Count = 16  # problems per step, over all ranks
    learning_rate: NonNegative = 8e-5  # peak learning rate
    # ---- Answers
    generations: Annotated[int, Range(2)] = 8  # answers per problem (G), which are compared with each other
    max_new_tokens: Count = 256  # longest answer; one that has not ended by then is not right
    temperature: Positive = 1.0  # of the drawing of answers, and of the probabilities that are learned
    slots: Count = 64  # answers that a rank writes at once: as many as its memory holds
    # ---- Loss
    updates_per_rollout: Count = 1  # updates of the weights per step, all on the same answers
    clip_low: Share = 0.2  # a token of a bad answer has no gradient below 1 - this times its probability when drawn
    clip_high: NonNegative = 0.2  # one of a good answer above 1 + this times it

    divide_by_std: bool = False  # divide advantages by the standard deviation of their group
    kl: NonNegative = 0.0  # weight of the divergence from the model at the start; 0 = that model is not kept
    # ---- Rewards
    reward_answer: NonNegative = 1.0  # for the right answer: see nanodoge/answers.py
    reward_format: NonNegative = 0.1  # for a thought and then a solution, each once between its tags
    reward_length: NonNegative = 0.0  # cost of an answer of max_new_tokens; of a shorter one in proportion
    # ---- Validation
    eval_size: Count = 200  # validation problems, always the first ones
    eval_samples: Whole = 4  # of these, how many are kept in OUT_DIR/samples with what the model writes

    def __post_init__(self):
        super().__post_init__()
        if not self.reward_answer + self.reward_format + self.reward_length:
            raise ValueError("--reward_answer, --reward_format and --reward_length are all 0: nothing is rewarded")


def select(token_set: TokenSet, options: GrpoOptions) -> Examples:
    """The problems whose prompt leaves room for an answer of max_new_tokens in sequence_length tokens."""
    sizes, length, room = np.diff(token_set.offsets), options.sequence_length, options.max_new_tokens
    kept = np.flatnonzero(sizes <= length - room)
    left_out = {f"longer than --sequence_length={length} with --max_new_tokens={room}": len(sizes) - len(kept)}
    return Examples("problems", token_set, kept, sizes[kept, None] - 1, np.zeros((len(kept), 1), np.int64), left_out)


def read_problems(problems: Examples, which: Sequence[int]) -> tuple[list[list[int]], list[str]]:
    """The prompts (ids, up to the assistant's header) and the right answers of the problems `which`."""
    prompts = [problems.rows(i)[0][0].tolist() for i in which]
    return prompts, [problems.set.answers[problems.first[i]] for i in which]


# ---- Rewards

TAGS = [f"<|{edge}_of_{part}|>" for part in ("thought", "solution") for edge in ("begin", "end")]


def is_in_format(text: str) -> bool:
    """Whether a text is a thought and then a solution, each tag once, and nothing else but space around them."""
    pattern = r"\s*{}.*{}\s*{}.*{}\s*".format(*map(re.escape, TAGS))
    return all(text.count(tag) == 1 for tag in TAGS) and bool(re.fullmatch(pattern, text, re.DOTALL))


def judge(written: list[list[int]], wanted: list[str], tokenizer: Tokenizer, options: GrpoOptions) -> dict:
    """What n answers earn: {column: (n,) float64}. written: the ids of each, with the EOS if it came. reward is the
    weighted sum of its parts. reward_answer and reward_format are 0 or 1, and 0 for an answer that does not end."""
    ended = [tokenizer.decode(ids[:-1]) if ids[-1] == tokenizer.eos_id else "" for ids in written]
    right = np.array([is_right(text, answer) for text, answer in zip(ended, wanted, strict=True)], float)
    in_format = np.array([is_in_format(text) for text in ended], float)
    length = np.array([len(ids) for ids in written], float)
    reward = options.reward_answer * right + options.reward_format * in_format
    reward = reward - options.reward_length * length / options.max_new_tokens
    return dict(reward=reward, reward_answer=right, reward_format=in_format, length=length)


def advantages(rewards: np.ndarray, divide_by_std: bool) -> np.ndarray:
    """rewards (P, G) of G answers to each of P problems -> (P, G): reward minus the mean of the group, if asked for
    divided by the group's standard deviation. Exactly 0 in a group whose rewards are all equal."""
    above = rewards - rewards.mean(axis=1, keepdims=True)
    if divide_by_std:
        above = above / np.maximum(rewards.std(axis=1, keepdims=True), np.finfo(float).tiny)
    return np.where(rewards.max(axis=1, keepdims=True) > rewards.min(axis=1, keepdims=True), above, 0.0)


# ---- Rollouts


@dataclass
class Batch:
    """A micro-batch of prompts with their answers. Its N tokens are those of the answers, row after row."""

    rows: list[int]  # which answers of the step they are
    inputs: list[Tensor]  # of a Policy: tokens (B, T), positions (N,), targets (N,)
    advantages: Tensor  # (N,)
    old: Tensor | None = None  # (N,) their log-probabilities when they were drawn
    start: Tensor | None = None  # (N,) their log-probabilities by the model at the start, with --kl


def rollout(
    machine: Machine, model: Doge, problems: Examples, options: GrpoOptions, step: int
) -> tuple[list[Batch], dict[str, np.ndarray], int]:
    """What step `step` learns from: this rank's micro-batches; the columns of the log, {name: (n,)} of all n answers;
    and the tokens that the model reads, on all ranks."""
    tokenizer, G = problems.set.tokenizer, options.generations
    which = np.repeat(rows_of_step(step, problems.count, options.batch_size, options.seed), G)
    prompts, wanted = read_problems(problems, which)
    sampling = dict(seed=scramble(scramble(options.seed) + step), temperature=options.temperature)
    written = write_answers(machine, model, tokenizer, prompts, options.max_new_tokens, options.slots, **sampling)
    columns = judge(written, wanted, tokenizer, options)
    above = advantages(columns["reward"].reshape(-1, G), options.divide_by_std)
    columns["no_signal"] = np.repeat((above == 0).all(axis=1), G).astype(float)

    rows = [(np.array(p + a), np.arange(len(p) + len(a)) >= len(p)) for p, a in zip(prompts, written, strict=True)]
    lengths, batches = [len(ids) - 1 for ids, _ in rows], []
    groups = bucket_by_length(lengths, options.micro_batch_tokens, machine.world_size)
    for group in groups[machine.rank :: machine.world_size]:
        tokens, targets = pad([rows[i] for i in group], tokenizer.pad_id)
        per_token = torch.tensor(np.repeat(above.flatten()[group], [len(written[i]) for i in group]))
        *inputs, per_token = machine.to_device(tokens, *with_positions(targets), per_token.float())
        batches.append(Batch(group, inputs, per_token))
    return batches, columns, sum(lengths)


# ---- The loss


def clipped_losses(logp: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The losses (N,) of N tokens by the clipped objective, and (N,) bool: which tokens the clip leaves no gradient.
    logp, old: log-probabilities (N,) by the model as it is, and when they were drawn."""
    ratio = (logp - old).exp()
    free, held = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(free, held), held < free


def divergence(logp: Tensor, start: Tensor) -> Tensor:
    """k3 (N,), from the log-probabilities of drawn tokens by the model as it is and by the one at the start. For tokens
    that the model draws, its mean is KL(model || start), and the mean of its gradient that of KL(start || model)."""
    difference = start - logp
    return torch.expm1(difference) - difference


def token_losses(logp: Tensor, batch: Batch, options: GrpoOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses (N,) of a micro-batch's tokens, and {column of the log: (N,)}."""
    losses, clipped = clipped_losses(logp, batch.old, batch.advantages, options.clip_low, options.clip_high)
    columns = dict(entropy=-batch.old, clipped=clipped)
    if batch.start is not None:
        k3 = divergence(logp, batch.start)
        losses, columns["kl"] = losses + options.kl * k3, k3.detach()
    return losses, columns


# ---- Validation


def evaluate(machine: Machine, model: Doge, problems: Examples, options: GrpoOptions, step: int) -> dict[str, float]:
    """{log column: value}: the first eval_size problems, answered with the likeliest token each time. val_accuracy is
    the share of right answers, val_reward the mean reward. A few answers are kept in samples/STEP.jsonl."""
    tokenizer = problems.set.tokenizer
    prompts, wanted = read_problems(problems, range(min(problems.count, options.eval_size)))
    written = write_answers(machine, model, tokenizer, prompts, options.max_new_tokens, options.slots)
    columns = judge(written, wanted, tokenizer, options)
    folder, lines = Path(options.out_dir) / "samples", ""
    for i in range(min(len(prompts), options.eval_samples)):
        texts = dict(problem=tokenizer.decode(prompts[i]), wanted=wanted[i], written=tokenizer.decode(written[i]))
        sample = dict(step=step) | texts | {name: float(values[i]) for name, values in columns.items()}
        lines += json.dumps(sample, ensure_ascii=False) + "\n"
    if machine.is_main and lines:
        if step == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that this one replaces
        folder.mkdir(exist_ok=True)
        (folder / f"{step:06}.jsonl").write_text(lines, encoding="utf-8")
    return dict(val_accuracy=float(columns["reward_answer"].mean()), val_reward=float(columns["reward"].mean()))


# ---- The run


def train(options: GrpoOptions, machine: Machine) -> None:
    """Runs the whole tuning and leaves a checkpoint, log.csv, loss.png and samples/ in options.out_dir."""
    prepare_if_built_in(options, machine, "problems")
    model, state, problems, val = stage.start_tuning(options, machine, "problems", select)
    tokenizer = problems.set.tokenizer
    policy = Policy(model, tokenizer.vocab_size, options.temperature)
    reference, folder = None, Path(options.out_dir) / "reference"  # the model at the start, kept for a resumed run
    if options.kl and machine.is_main and not options.resume:
        clear(options.out_dir)  # a run that --overwrite replaces could not be resumed with this reference
        save_checkpoint(folder, model, tokenizer)
    machine.barrier()
    if options.kl:
        start = load_model(folder)[0].requires_grad_(False).to(machine.device)
        reference = Policy(start, tokenizer.vocab_size, options.temperature)

    begin = time.perf_counter()
    batches, *_ = rollout(machine, model, problems, options, 0)
    writing = time.perf_counter() - begin
    if options.shard:
        shard(model, machine, "hidden")
    optimizers, flops = make_optimizers(model, options, machine), model.flops_per_token(problems.sizes.mean())

    def validate() -> dict[str, float]:
        return evaluate(machine, model, val, options, run.step)

    run = Run(options, machine, model, policy, tokenizer, optimizers, validate, flops, state, columns=COLUMNS)
    lines, inputs = describe(problems, val, options), batches[0].inputs
    lines["step"] = f"{options.generations} answers to each of {options.batch_size} problems, {options.slots} at once"
    count, writing = options.max_steps * len(batches) * options.updates_per_rollout, options.max_steps * writing
    stage.announce(run, lambda network: network(*inputs)[0].sum(), count, lines, more_seconds=writing)

    with run:
        for step in run.steps():
            lr = options.learning_rate * cosine(step, options.max_steps, int(options.warmup * options.max_steps))
            batches, earned, read = rollout(machine, model, problems, options, step)
            answers, tokens = len(earned["length"]), earned["length"].sum()  # of all ranks
            if earned["no_signal"].all():
                advice = f"if it stays so, read {options.out_dir}/samples, and try easier or harder problems"
                run.warn(f"step {step + 1} learns nothing: all answers to a problem earn the same; {advice}")
            for batch in batches if reference else ():
                with torch.no_grad(), machine.autocast():
                    batch.start = reference(*batch.inputs)[0]
            for update in range(options.updates_per_rollout):
                loss, columns = 0.0, dict(entropy=0.0, clipped=0.0, kl=0.0)
                for batch in run.micro_batches(batches):
                    with machine.autocast():
                        logp, balance = run.network(*batch.inputs)
                    if update == 0:
                        batch.old = logp.detach()  # the weights are those that drew the tokens
                    losses, values = token_losses(logp, batch, options)
                    balance = model.config.router_aux_loss_coef * balance * (len(batch.rows) / answers)
                    loss += run.backward(losses.sum() / tokens + balance)
                    columns = {name: columns[name] + value.sum() / tokens for name, value in values.items()}
                grad_norm = optimizer_step(model, optimizers, lr, options.grad_clip)
            mine = [i for batch in batches for i in batch.rows]
            columns |= {name: values[mine].sum() / answers for name, values in earned.items()}
            run.end_step(loss=loss, grad_norm=grad_norm, lr=lr, tokens=read, **columns)
    stage.print_answer(options, machine, model, val)


def main(argv: list[str]) -> None:
    stage.run_stage(train, stage.read_run_options(GrpoOptions, argv))


if __name__ == "__main__":
    run_command(main)
