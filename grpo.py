"""Reinforcement learning with verifiable rewards: a model tries, is told what was right, and does more of that.

    python grpo.py                                                   the tiny model on built-in sums, minutes
    python grpo.py config/grpo_doge20m.py                            a real recipe
    torchrun --nproc_per_node=8 grpo.py config/grpo_doge20m.py       the same on eight GPUs: same problems, same draws
    python grpo.py --out_dir=out/sums-problems --resume              go on as if it had never stopped

Fine-tuning shows a model how an answer is reached. Here nobody shows it anything. It gets problems whose answer can be
checked, writes some answers of its own, and each earns a number, its reward. Then every token of a good answer is made
a little likelier, and every token of a bad one less likely. That is all of it; the method is GRPO, group relative
policy optimisation (Shao et al. 2024, arXiv 2402.03300). Its questions are these.

Good compared with what? A reward of 1 says little if every answer earns it. So a problem is answered several times, and
the group is its own yardstick: an answer's advantage is its reward minus the group's mean. Where all earn the same
there is nothing to learn, and the advantage is 0 (the log counts such groups as no_signal). One answer a problem would
always be its own mean, so fewer than two are refused. GRPO also divides by the group's standard deviation; that
weighs problems most which are nearly always, or nearly never, solved (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783), so
here it is an option that is off.

How far? The loss of a token is -min(r A, clip(r) A): A is the advantage of its answer, r how much likelier the token
has become since it was drawn, and clip holds r within 1 - clip_low .. 1 + clip_high (PPO, Schulman et al. 2017, arXiv
1707.06347). At first r = 1 and the gradient is the plain policy gradient, -A grad log p. With several updates on the
same answers r moves, and a token that has moved that far with its advantage is left alone. A clip_high above clip_low
leaves rare tokens room to grow (DAPO, Yu et al. 2025, arXiv 2503.14476). With one update nothing is clipped.

How much does a token count? The loss is the sum over all tokens of all answers of a step, divided by their number, as
in DAPO. A mean within each answer first, as in the first GRPO, would make a token of a long wrong answer cheaper than
one of a short wrong answer, and so teach to be wrong at length. As in sft.py, every micro-batch gives its share of one
sum, so neither their size nor the number of processes changes the result.

Away from where? With --kl=B, B times an estimate of the KL divergence from the model as it was at the start is added to
the loss of every token: k3 = exp(d) - d - 1 with d = log p_start - log p, never negative, on average the divergence
(Schulman 2020, "Approximating KL divergence"). Without it no second model is held in memory.

What is rewarded is learned, so it must be what is meant. The answer must be the right number and must end: one that
runs into --max_new_tokens without its EOS earns nothing for what it says. The form is the thought between its tags,
then the solution between its own, each tag once. Length, if it is given a weight, costs. Look at what is written, in
OUT_DIR/samples.jsonl: a number that rises may mean that the model found what you did not think of.
"""

import json
import math
import os
import re
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch

from dpo import Policy, with_targets
from nanodoge.checkpoint import clear, load_model, save_checkpoint
from nanodoge.conversations import divide, final_answer, generate, open_sets, pad
from nanodoge.decode import Decoder
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
from nanodoge.tokenizer import read_object
from train import cosine, make_optimizers, optimizer_step, rows_of_step, scramble

# Of the answers of a step: their mean reward; the shares that are right, and in form; their mean length in tokens; the
# share of groups without a signal; the mean of -log p over the tokens as they were drawn, which estimates the entropy.
# Of its last update: the share of tokens clipped, and the mean k3. Then what validation finds.
COLUMNS = "reward reward_answer reward_format length no_signal entropy clipped kl val_accuracy val_reward".split()


@dataclass
class GrpoOptions(TuneOptions):
    init_from: str = "out/sums-chat"  # checkpoint folder of the model to tune
    data: str = "data/sums-problems"  # folder made by prepare_data.py --kind=problems
    batch_size: int = 16  # problems a step, over all processes
    generations: int = 8  # answers a problem (G), which are compared with each other
    max_new_tokens: int = 256  # longest answer; what has not ended by then is not right
    temperature: float = 1.0  # of the drawing of answers, and of the probabilities that are learned
    slots: int = 64  # answers a process writes at once: as many as its memory holds; decides what is drawn
    updates_per_rollout: int = 1  # updates of the weights a step, all on the same answers
    clip_low: float = 0.2  # a token of a bad answer is left alone below 1 - this times its probability when drawn
    clip_high: float = 0.2  # one of a good answer above 1 + this times it
    divide_by_std: bool = False  # divide advantages by the standard deviation of their group
    kl: float = 0.0  # weight of the divergence from the model at the start; 0 = that model is not held
    reward_answer: float = 1.0  # for the right answer: as a number where both are one, else as text
    reward_format: float = 0.1  # for a thought and then a solution, each once between its tags
    reward_length: float = 0.0  # taken from an answer of max_new_tokens, from shorter ones in proportion
    learning_rate: float = 8e-5  # peak learning rate
    eval_size: int = 200  # validation problems, always the first ones
    eval_samples: int = 4  # of them, how many are kept in OUT_DIR/samples.jsonl with what the model writes

    def __post_init__(self):
        super().__post_init__()
        if self.generations < 2:
            raise ValueError(f"--generations={self.generations} must be at least 2: an answer is judged by comparing "
                             "it with others to the same problem")  # fmt: skip
        for name in ("max_new_tokens", "slots", "updates_per_rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        for name in ("clip_high", "kl", "reward_answer", "reward_format", "reward_length", "eval_samples"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name}={getattr(self, name)} must be a number from 0 up")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"--clip_low={self.clip_low} must be from 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature={self.temperature} must be a number above 0: equal answers teach nothing")
        if not self.reward_answer + self.reward_format + self.reward_length:
            raise ValueError("--reward_answer, --reward_format and --reward_length are all 0: nothing is rewarded")


class Problems:
    """The problems of a TokenSet that leave room for an answer in `length` tokens.

    lengths (count,) of their prompts. left_out: how many have no room."""

    def __init__(self, token_set, length, max_new_tokens):
        lengths = np.diff(token_set.offsets)
        self.set, self.fits = token_set, np.flatnonzero(lengths <= length - max_new_tokens)
        self.lengths, self.count = lengths[self.fits], len(self.fits)
        self.left_out = len(token_set) - self.count

    def some(self, which):
        """-> the prompts, ids (n,) int64 up to where the assistant begins, and the right answers, texts."""
        return zip(*((self.set.conversation(i)[0], self.set.answers[i]) for i in self.fits[which]), strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards

NUMBER = re.compile(r"([-+]?)\$?([-+]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(\.[0-9]*)?", re.ASCII)
FORMAT = [f"<|{edge}_of_{part}|>" for part in ("thought", "solution") for edge in ("begin", "end")]


def number(text):
    """What a text is as a number, a Decimal; None if it is none. "42", "42.0", "42.", "$42" and " +42 " are the same,
    and so are "1,000" and "1000". Units, fractions, percentages and powers are not read."""
    found = NUMBER.fullmatch(text.strip())
    if not found or not re.search("[0-9]", text) or (found[1] and found[2]):
        return None
    return Decimal((found[1] or found[2]) + (found[3] or "0").replace(",", "") + (found[4] or ""))


def is_right(text, wanted):
    """Whether what an answer comes to (see final_answer) is what is wanted: equal numbers, else equal texts."""
    found = final_answer(text)
    if (a := number(found)) is not None and (b := number(wanted)) is not None:
        return a == b
    return found != "" and found == wanted.strip()


def is_in_form(text):
    """Whether a text is a thought and then a solution, each tag there once, and nothing around them."""
    pattern = r"\s*{}.*{}\s*{}.*{}\s*".format(*map(re.escape, FORMAT))
    return all(text.count(tag) == 1 for tag in FORMAT) and bool(re.fullmatch(pattern, text, re.DOTALL))


def judge(written, wanted, tokenizer, options):
    """What answers earn. written: a list of ids for each, with the EOS if it came; wanted: texts. -> {column: (n,)
    float64}: reward, the weighted sum of its parts; reward_answer and reward_format, each 0 or 1 and before its weight,
    and both 0 for an answer without an end; length in tokens."""
    ended = [tokenizer.decode(ids[:-1]) if ids[-1] == tokenizer.eos_id else "" for ids in written]
    parts = dict(
        reward_answer=np.array([is_right(text, answer) for text, answer in zip(ended, wanted, strict=True)], float),
        reward_format=np.array([is_in_form(text) for text in ended], float),
        length=np.array([len(ids) for ids in written], float),
    )
    reward = options.reward_answer * parts["reward_answer"] + options.reward_format * parts["reward_format"]
    return dict(reward=reward - options.reward_length * parts["length"] / options.max_new_tokens) | parts


def advantages(rewards, divide_by_std):
    """rewards (P, G) of the G answers to each of P problems -> (P, G): what each earned above the mean of its group, if
    asked for in standard deviations of the group. Exactly 0 in a group whose rewards are all equal."""
    above = rewards - rewards.mean(axis=1, keepdims=True)
    if divide_by_std:
        above = above / np.maximum(rewards.std(axis=1, keepdims=True), np.finfo(float).tiny)
    return np.where(rewards.max(axis=1, keepdims=True) > rewards.min(axis=1, keepdims=True), above, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


def write_answers(machine, model, tokenizer, prompts, options, key=None):
    """Lets the model answer prompts (lists of ids) -> a list of ids each, of which all processes have all.

    They are written in pieces of slots, of like length, which the processes share. What is drawn in a piece
    depends on its number and `key`, so it is the same however many processes there are. Without a key the likeliest
    token is taken each time.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    pieces = [order[i : i + options.slots] for i in range(0, len(order), options.slots)]
    mine = {}
    with unsharded(model), machine.autocast():
        decoder = Decoder(model, machine.dtype)
        for i in range(machine.rank, len(pieces), machine.world_size):
            sampling = dict(temperature=0.0)
            if key is not None:
                generator = torch.Generator(machine.device).manual_seed(scramble(key + i))
                sampling = dict(temperature=options.temperature, generator=generator)
            answers = generate(model, tokenizer, [prompts[j] for j in pieces[i]], options.max_new_tokens,
                               options.slots, decoder=decoder, **sampling)  # fmt: skip
            mine.update(zip(pieces[i], answers, strict=True))
    written = {}
    for part in machine.gather(mine):
        written.update(part)
    return [written[i] for i in range(len(prompts))]


def rollout(machine, model, tokenizer, problems, options, step):
    """The answers that step `step` learns from -> prompts and written (lists of ids, one for each answer), advantages
    (n,), and the log's columns {name: (n,)}. The answers to a problem stand together."""
    chosen = rows_of_step(step, problems.count, options.batch_size, options.seed)
    prompts, wanted = problems.some(np.repeat(chosen, options.generations))
    written = write_answers(machine, model, tokenizer, prompts, options, scramble(scramble(options.seed) + step))
    columns = judge(written, wanted, tokenizer, options)
    above = advantages(columns["reward"].reshape(-1, options.generations), options.divide_by_std)
    columns["no_signal"] = np.repeat((above == 0).all(axis=1), options.generations).astype(float)
    return prompts, written, above.flatten(), columns


@dataclass
class Batch:
    """A micro-batch of answers with their prompts. Its N tokens are those of the answers, row after row."""

    rows: np.ndarray  # which answers of the step they are
    tokens: torch.Tensor  # (B, T) what goes into the model
    places: torch.Tensor  # (N,) where in the flattened (B T) the tokens are predicted
    targets: torch.Tensor  # (N,) their ids
    advantages: torch.Tensor  # (N,)
    old: torch.Tensor | None = None  # (N,) their log-probabilities when they were drawn
    start: torch.Tensor | None = None  # (N,) their log-probabilities under the model at the start


def make_batches(machine, prompts, written, above, tokenizer, options):
    """-> this process's micro-batches of a rollout, and how many tokens go into the model on all processes."""
    lengths = [len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, written, strict=True)]
    batches = []
    for group in divide(lengths, options.micro_batch_tokens, machine.world_size)[machine.rank :: machine.world_size]:
        pairs = [(np.concatenate((prompts[i], written[i])),
                  np.repeat((False, True), (len(prompts[i]), len(written[i])))) for i in group]  # fmt: skip
        tokens, targets, _ = pad(pairs, tokenizer.pad_id)
        per_token = torch.tensor(np.repeat(above[group], [len(written[i]) for i in group]), dtype=torch.float32)
        batches.append(Batch(np.array(group), *machine.to_device(tokens, *with_targets(targets), per_token)))
    return batches, sum(lengths)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def clipped_losses(logprobs, old, advantages, clip_low, clip_high):
    """The clipped objective's losses (N,) of N tokens, and which of them (N,) bool the clip takes out of the learning.
    logprobs, old: log-probabilities (N,) now and when they were drawn."""
    ratio = (logprobs - old).exp()
    free, held = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(free, held), held < free


def divergence(logprobs, start):
    """k3 (N,) of the log-probabilities of drawn tokens now and at the start. Its mean over what is drawn now is
    KL(now || start); the mean of its gradient is that of KL(start || now). Both are 0 only where the two agree."""
    difference = start - logprobs
    return torch.expm1(difference) - difference


def make_loss(machine, policy, reference, columns, coefficient, options):
    """-> loss_of(batch): its share of the loss and of what the log shows, for Run.update. policy, reference: Policy, or
    None for no reference; columns: {name: (n,)} of all answers of the step; coefficient: of the experts' load balance.

    The first update computes with the very weights that drew the answers, so its log-probabilities are the old ones.
    """
    count, tokens = len(columns["length"]), columns["length"].sum()

    def loss_of(batch):
        inputs = batch.tokens, batch.places, batch.targets
        with machine.autocast():
            logprobs, balance = policy(*inputs)
            if reference is not None and batch.start is None:
                with torch.no_grad():
                    batch.start = reference(*inputs)[0]
        if batch.old is None:
            batch.old = logprobs.detach()
        losses, clipped = clipped_losses(logprobs, batch.old, batch.advantages, options.clip_low, options.clip_high)
        shares = {name: column[batch.rows].sum() / count for name, column in columns.items()}
        shares |= dict(entropy=-batch.old.sum() / tokens, clipped=clipped.sum() / tokens)
        if reference is not None:
            kl = divergence(logprobs, batch.start)
            losses = losses + options.kl * kl
            shares["kl"] = kl.detach().sum() / tokens
        return losses.sum() / tokens + coefficient * balance * (len(batch.rows) / count), shares

    return loss_of


# ---------------------------------------------------------------------------------------------------------------------
# Validation


def make_evaluate(machine, model, problems, tokenizer, options):
    """-> evaluate(step): the first eval_size problems answered with the likeliest token each time; val_accuracy is the
    share of right answers, val_reward the mean reward. A few answers are kept to be looked at."""
    prompts, wanted = problems.some(slice(options.eval_size))

    def evaluate(step):
        written = write_answers(machine, model, tokenizer, prompts, options)
        columns = judge(written, wanted, tokenizer, options)
        if machine.is_main:
            keep_samples(Path(options.out_dir) / "samples.jsonl", step, [
                dict(step=step, problem=tokenizer.decode(prompts[i]), wanted=wanted[i],
                     written=tokenizer.decode(written[i]), **{name: float(columns[name][i]) for name in columns})
                for i in range(min(options.eval_samples, len(prompts)))])  # fmt: skip
        return dict(val_accuracy=float(columns["reward_answer"].mean()), val_reward=float(columns["reward"].mean()))

    return evaluate


def keep_samples(path, step, samples):
    """Adds dicts, a line of JSON each, to those of earlier steps. Lines of this step or later ones are of a run that
    was killed after it wrote them, or of one that was replaced, and a torn line is nobody's: they go."""
    kept = []
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")  # splitlines takes more for ends
        for i, line in enumerate(lines[:-1], 1):
            if line.endswith("}"):
                before = read_object(line.encode(errors="surrogateescape"), f"{path}:{i}").get("step")
                if not isinstance(before, int):
                    raise ValueError(f"{path}:{i}: its step is {before!r}, not a number; move the file away")
                kept += [line + "\n"] * (before < step)
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)  # a link would lead elsewhere
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    temporary.write_text("".join(kept) + text, encoding="utf-8")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def load_reference(options, machine, model, tokenizer):
    """The model at the start, frozen, as a Policy; None if --kl=0. It is kept in OUT_DIR/reference: whatever becomes of
    init_from, a resumed run is held to the same model."""
    if not options.kl:
        return None
    folder = Path(options.out_dir) / "reference"
    if machine.is_main and not options.resume:
        clear(options.out_dir)  # a run that --overwrite gave up could not go on with this reference
        save_checkpoint(folder, model, tokenizer)
    machine.barrier()
    reference = load_model(folder)[0].requires_grad_(False).to(machine.device)
    return Policy(reference, tokenizer.vocab_size, options.temperature)


def describe(options, machine, model, train, val, batches, seconds, which):
    """Prints, before the first step, what is going to happen, on what, and what it will cost. batches: micro-batches of
    the first step on this process; seconds: to write its answers, and to learn from one micro-batch."""
    duration = options.max_steps * (seconds[0] + seconds[1] * batches * options.updates_per_rollout)
    answers = options.batch_size * options.generations
    for split, problems in (("training", train), ("validation", val)):
        if problems.left_out:
            machine.print(f"too long for {options.sequence_length} tokens with an answer of {options.max_new_tokens}: "
                          f"{problems.left_out:,} {split} problems are left out")  # fmt: skip
    machine.print(
        f"model     {sum(p.numel() for p in model.parameters()):,} parameters, from {options.init_from}\n"
        f"data      {options.data}: {train.count:,} problems; "
        f"{options.max_steps * options.batch_size / train.count:.2f} epochs\n"
        f"step      {options.generations} answers to each of {options.batch_size} problems, written in "
        f"{math.ceil(answers / options.slots)} pieces on {machine.world_size} processes, "
        f"{batches} micro-batches a process\n"
        f"device    {machine.summary}; {which}\n"
        f"cost      {options.max_steps:,} steps; about {duration // 3600:.0f} h {duration // 60 % 60 + 1:.0f} min, and "
        "the validations"
    )


def open_problems(options, machine):
    """-> training Problems, validation Problems, tokenizer, model, training state (None unless it is resumed)."""
    *sets, tokenizer = open_sets(options, "problems", machine)
    model, state = start_tuning(options, machine, tokenizer)
    train, val = (Problems(token_set, options.sequence_length, options.max_new_tokens) for token_set in sets)
    if not (train.count and val.count):
        raise ValueError(f"--max_new_tokens={options.max_new_tokens} of --sequence_length={options.sequence_length}: "
                         f"of {len(sets[0])} training and {len(sets[1])} validation problems, {train.count} and "
                         f"{val.count} leave that much room")  # fmt: skip
    count_steps(options, train.count, machine)
    return train, val, tokenizer, model, state


def train(options, machine):
    """Runs the whole tuning and leaves a checkpoint, log.csv, loss.png and samples.jsonl in options.out_dir."""
    train_problems, val_problems, tokenizer, model, state = open_problems(options, machine)
    policy = Policy(model, tokenizer.vocab_size, options.temperature)
    reference = load_reference(options, machine, model, tokenizer)
    balance = model.config.router_aux_loss_coef

    begin = time.perf_counter()
    try:
        *answers, columns = rollout(machine, model, tokenizer, train_problems, options, 0)
    except (torch.OutOfMemoryError, MemoryError):
        raise ValueError(f"out of memory: lower --slots={options.slots}") from None
    writing = time.perf_counter() - begin
    batches, _ = make_batches(machine, *answers, tokenizer, options)
    if options.shard:
        shard(model, machine, "hidden")
    optimizers = make_optimizers(model, options, machine)
    tried = profile_step(machine, policy, lambda network: make_loss(
        machine, network, reference, columns, balance, options)(batches[0])[0], options)  # fmt: skip
    network, learning, which = tried
    describe(options, machine, model, train_problems, val_problems, len(batches), (writing, learning), which)

    evaluate = make_evaluate(machine, model, val_problems, tokenizer, options)
    run = Run(options, machine, model, network, tokenizer, optimizers, lambda: evaluate(run.step),
                      model.flops_per_token(train_problems.lengths.mean()), columns=COLUMNS,
              evaluate_first=True)  # fmt: skip
    if options.resume:
        run.restore(state)
    with run:
        for step in run.steps():
            *answers, columns = rollout(machine, model, tokenizer, train_problems, options, step)
            batches, tokens = make_batches(machine, *answers, tokenizer, options)
            loss_of = make_loss(machine, network, reference, columns, balance, options)
            lr = options.learning_rate * cosine(step, options.max_steps, int(options.warmup * options.max_steps))
            for _ in range(options.updates_per_rollout):
                loss, columns = 0.0, {}
                for batch in run.micro_batches(batches):
                    share, values = loss_of(batch)
                    loss += run.backward(share)
                    columns = {name: columns.get(name, 0.0) + value for name, value in values.items()}
                grad_norm = optimizer_step(model, optimizers, lr, options.grad_clip)
            run.end_step(loss=loss, grad_norm=grad_norm, lr=lr, tokens=tokens, **columns)
    run.finish()


def main(argv):
    run_stage(train, read_run_options(GrpoOptions, argv, "grpo_tiny.py", TUNE_MAY_CHANGE | {"eval_samples"}))


if __name__ == "__main__":
    run_command(main)
