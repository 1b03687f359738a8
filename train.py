"""Pretraining: a model learns to continue text, one sequence of tokens at a time.

    python train.py                                          the tiny model on the built-in stories, minutes
    python train.py config/doge20m.py --data=data/web        a real recipe
    torchrun --nproc_per_node=8 train.py config/doge20m.py   the same on eight GPUs: same batches, same losses
    python train.py --out_dir=out/stories --resume           continue as if it had never stopped

The data is one long array of token ids, documents one after the other, cut into sequences of T tokens. At every
position the model predicts the next token. One step: take the sequences of this step, compute the mean loss and its
gradient, move the weights a little against the gradient. The measure of quality is bits per byte of held-out text.
Unlike the loss per token, it can be compared between tokenizers. Four choices are explained here.

Data order. An epoch visits every sequence once, in an order that is a pure function of (seed, epoch). So the sequences
of step n are known without running the steps before it, and a run that was killed continues with the sequences that it
would have read. On a CPU its weights become the same, bit for bit (not on a GPU, nor with another version of torch).

Schedule. The learning rate warms up, stays, and decays: Warmup-Stable-Decay (Hu et al. 2024, arXiv 2404.06395; Hagele
et al. 2024, arXiv 2405.18392). Unlike with a cosine, the number of steps need not be known beforehand. `--init_from`
continues from the weights just before the decay, OUT_DIR/stable, at the same rate. A MoE model starts from the stable
weights of its dense twin.

Optimizer. AdamW, with weight decay on the matrices alone; or Muon (Jordan et al. 2024), which makes every update of a
hidden matrix orthogonal, for the matrices between embedding and output.

Copy curriculum. A small model learns early that a name comes next, but only much later which name. So the tiny recipe
begins with `copy_steps`. Most of these train only on tokens that already occurred in their sequence. A model that has
first learned to copy uses the right names in its stories (NOTES.md has the figures, and texts where it did not help).
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from model import Doge, DogeConfig
from nanodoge import stage
from nanodoge.checkpoint import load_config, load_model, load_training_state
from nanodoge.data import Sequences, bits_per_byte, check_tokenizer, load_tokenizer, read_meta, token_bytes
from nanodoge.machine import Machine, full_tensor, shard
from nanodoge.muon import Muon
from nanodoge.options import Count, NonNegative, Range, Whole, run_command
from nanodoge.policy import write_answers
from nanodoge.run import Run
from nanodoge.stage import RunOptions, saved_options
from nanodoge.tokenizer import Tokenizer


@dataclass
class TrainOptions(DogeConfig, RunOptions):
    """Pretraining. DogeConfig's fields are the shape of a model trained from scratch; with --init_from it is given.
    A phase is a number of steps or, below 1, a share of max_steps."""

    data: str = "data/stories"  # folder made by prepare_data.py
    vocab_size: Whole = 0  # number of token ids; 0 = as many as the data's tokenizer has
    sequence_length: Whole = 0  # tokens per sequence (T); 0 = max_position_embeddings
    batch_tokens: Count = 524_288  # tokens per step, over all ranks and micro-batches
    micro_batch_size: Count = 8  # sequences that a rank computes at once: as many as its memory holds
    max_steps: Whole = 8000  # optimizer steps in all; 0 = from the size of the data
    warmup_steps: NonNegative = 0.1  # phase of rising learning rate; none after --init_from unless given
    decay_steps: NonNegative = 0.1  # phase of falling learning rate at the end
    decay: Literal["linear", "cosine", "1-sqrt"] = "linear"  # shape of the fall
    copy_steps: Annotated[float, Range(-1)] = -1  # first phase, mostly of copies; -1 = 0.5 on built-in stories, else 0
    moe_warmup_steps: NonNegative = 0  # first phase, which trains the router and the experts only
    eval_tokens: Count = 1_000_000  # validation tokens, always the first ones of val.bin
    recipe: ClassVar[str] = "tiny.py"
    first: ClassVar[str] = """data init_from out_dir resume max_steps learning_rate batch_tokens micro_batch_size
        optimizer device"""
    may_change: ClassVar[str] = RunOptions.may_change + " max_steps decay_steps eval_tokens attention micro_batch_size"

    def __post_init__(self):
        """The checks that need no data; DogeConfig's own wait until the vocabulary is known."""
        RunOptions.__post_init__(self)
        self.sequence_length = self.sequence_length or self.max_position_embeddings
        if self.max_steps:
            stage.count_phases(self)


# ---- Data order


def shuffled(index: int, count: int, key: int) -> int:
    """The index-th element of a pseudo-random order of 0 .. count - 1: a pure function, so that the order is never
    stored. A Feistel network permutes the numbers of an even number of bits, whatever its round function is (Luby &
    Rackoff 1988); a result that is not below `count` is permuted again until it is."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for i in range(6):
            left, right = right, left ^ (scramble(right ^ scramble(key * 8 + i)) & mask)
        index = left << half | right
        if index < count:
            return index


def scramble(x: int) -> int:
    """A 64-bit hash of an integer: the finaliser of splitmix64 (Steele, Lea & Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def rows_of_step(step: int, count: int, rows_per_step: int, seed: int) -> list[int]:
    """The numbers of a step's sequences: the next rows_per_step of the endless series of shuffled epochs."""
    places = range(step * rows_per_step, (step + 1) * rows_per_step)
    return [shuffled(place % count, count, scramble(seed) + place // count) for place in places]


def prepare_if_built_in(options: RunOptions, machine: Machine, kind: str = "text") -> None:
    """Makes options.data if it is a built-in folder that is not there: for tuning with the tokenizer of its model."""
    tokenizer = "" if kind == "text" else options.out_dir if options.resume else options.init_from
    if kind != "text":
        load_config(tokenizer)  # raises ValueError if there is no checkpoint
    if machine.is_main:
        from prepare_data import prepare_built_in

        prepare_built_in(options.data, kind, tokenizer, machine.print)
    machine.barrier()


def open_data(options: TrainOptions, machine: Machine) -> tuple[Sequences, Sequences, Tokenizer]:
    """Training sequences, validation sequences, tokenizer. Built-in data is prepared if it is not there. Resolves
    max_steps and the phases."""
    prepare_if_built_in(options, machine)
    train, val = (Sequences(options.data, split, options.sequence_length) for split in ("train", "val"))
    tokenizer = load_tokenizer(options.data)
    if len(val.tokens) < 2:
        raise ValueError(f"{options.data}/val.bin has {len(val.tokens)} tokens: too few to validate on")
    if options.copy_steps < 0:
        options.copy_steps = 0.5 if read_meta(options.data).get("source") == ["stories"] else 0
    options.max_steps = options.max_steps or stage.good_steps(len(train.tokens), options.batch_tokens)
    stage.count_phases(options)
    return train, val, tokenizer


# ---- Copy curriculum

COMMON = 1 / 500  # of all tokens: a copy of "the" or "." says nothing. A tiny world's names have less than a thousandth


def common_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """(V,) bool: the tokens that make up more than COMMON of a text."""
    counts = np.bincount(tokens, minlength=vocab_size)
    return counts > COMMON * counts.sum()


def is_copy_step(step: int, copy_steps: int, seed: int) -> bool:
    """Whether a step learns only copies, drawn with probability 1 - (step / copy_steps)^2. An end from one step to the
    next undid much of what was learned (NOTES.md)."""
    return step < copy_steps and scramble(scramble(seed) + step) / 2**64 >= (step / copy_steps) ** 2


def only_copies(tokens: Tensor, targets: Tensor, common: np.ndarray) -> Tensor:
    """targets (B, T) with -100 for all but copies: tokens that occurred before in their sequence and are not
    common (V,)."""
    rows = torch.cat((tokens[:, :1], targets), dim=1).numpy()
    keep = np.ones(rows.shape, bool)
    for i, row in enumerate(rows):
        keep[i, np.unique(row, return_index=True)[1]] = False  # the first of each
    keep &= ~common[rows.clip(min=0)]  # a target of -100 stays one
    return targets.masked_fill(torch.from_numpy(~keep[:, 1:]), -100)


# ---- Learning rate


def wsd(step: int, max_steps: int, warmup_steps: int, decay_steps: int, decay: str = "linear") -> float:
    """Warmup-Stable-Decay, as a multiple of the peak learning rate at `step` (from 0): a line up to 1 over
    warmup_steps, 1, and over the last decay_steps down to 0 along a line, half a cosine, or 1 - sqrt. 0 at the end."""
    if step >= max_steps:
        return 0.0
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if max_steps - step >= decay_steps:
        return 1.0
    p = 1 - (max_steps - step) / decay_steps
    return {"linear": 1 - p, "cosine": 0.5 + 0.5 * math.cos(math.pi * p), "1-sqrt": 1 - math.sqrt(p)}[decay]


def cosine(step: int, max_steps: int, warmup_steps: int, floor: float = 0.1) -> float:
    """The multiple of the peak learning rate that tuning uses at `step` (from 0): a line up to 1 over warmup_steps,
    then half a cosine down to `floor`, reached with the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step + 1 - warmup_steps) / max(1, max_steps - warmup_steps))
    return floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * done))


# ---- Optimizers


def make_optimizers(model: Doge, options: RunOptions, machine: Machine) -> list[torch.optim.Optimizer]:
    """AdamW, and with --optimizer=muon also Muon. Their groups carry `routed`: router and experts, which
    moe_warmup_steps trains first.

    Muon takes the matrices of attention and MLP. Its update is scaled to the size of AdamW's (match_rms_adamw, Liu et
    al. 2025, arXiv 2502.16982), so that both follow one learning rate. Embeddings, experts and vectors stay with AdamW.
    """
    groups = {}
    for name, p in model.named_parameters():
        hidden = name.startswith("layers") and "_proj" in name and "dt_proj" not in name
        kind = "muon" if options.optimizer == "muon" and hidden else "adamw"
        routed = any(part in name for part in ("router_gate", "down_embed", "up_embed"))
        groups.setdefault((kind, p.ndim >= 2, routed), []).append(p)
    kinds = {"adamw": [], "muon": []}
    for (kind, decays, routed), parameters in groups.items():
        decay = options.weight_decay if decays else 0.0
        kinds[kind].append(dict(params=parameters, routed=routed, weight_decay=decay))
    betas, fused = (options.beta1, options.beta2), machine.device.type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(kinds["adamw"], lr=0.0, betas=betas, eps=1e-8, fused=fused)]
    if kinds["muon"]:
        optimizers.append(Muon(kinds["muon"], lr=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def optimizer_step(
    model: Doge, optimizers: list[torch.optim.Optimizer], lr: float, grad_clip: float, experts_only: bool = False
) -> Tensor:
    """Clips the gradient, moves the weights once, clears the gradient, and returns its norm before clipping."""
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr if group["routed"] or not experts_only else 0.0
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return grad_norm


# ---- Loss and validation


def loss_sum(
    network: nn.Module, tokens: Tensor, targets: Tensor, machine: Machine, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The sum in nats of the losses of all targets (B, T) that are not -100."""
    with machine.autocast():
        mean = network(*machine.to_device(tokens, targets))[1]
    return mean.to(dtype) * int((targets >= 0).sum())


@torch.no_grad()
def evaluate(
    network: nn.Module, data: Sequences, bytes_of: Tensor, machine: Machine, options: TrainOptions
) -> dict[str, float]:
    """Mean loss and bits per byte over the first eval_tokens of the validation text, shared by all ranks. bytes_of:
    token_bytes."""

    def nats_of(tokens: Tensor, targets: Tensor) -> float:
        return loss_sum(network, tokens, targets, machine, machine.wide_dtype).item()

    loss, bits, _ = bits_per_byte(nats_of, data, bytes_of, options.eval_tokens, options.micro_batch_size, machine)
    return dict(val_loss=loss, val_bpb=bits)


# ---- The run


def start(options: TrainOptions, machine: Machine, tokenizer: Tokenizer) -> tuple[Doge, dict | None]:
    """The model to train, and a training state if there is one: of a resumed run, or of the checkpoint. Resolves
    vocab_size."""
    folder = resumed_folder(options, machine) if options.resume else options.init_from
    if not folder:
        options.vocab_size = options.vocab_size or tokenizer.vocab_size
        if options.vocab_size < tokenizer.vocab_size:
            needed = f"the {tokenizer.vocab_size} ids of the tokenizer of --data={options.data}"
            raise ValueError(f"--vocab_size={options.vocab_size} is smaller than {needed}")
        torch.manual_seed(options.seed)
        fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(DogeConfig)}
        return Doge(DogeConfig(**fields)).to(machine.device), None
    model, own = load_model(folder)
    check_tokenizer(own, options.data, source=folder)
    if not options.resume:
        becomes_moe = options.is_moe and not model.config.is_moe
        free = {"router_aux_loss_coef", "attention"}
        free |= {"is_moe", "num_experts", "num_experts_per_tok"} if becomes_moe else set()
        for field in dataclasses.fields(DogeConfig):
            asked, has = getattr(options, field.name), getattr(model.config, field.name)
            if field.name not in free and asked != has:
                raise ValueError(f"--{field.name}={asked}: the model of --init_from={folder} has {has}")
        if becomes_moe:
            torch.manual_seed(options.seed)
            model = Doge.from_dense(model, options.num_experts, options.num_experts_per_tok)
        model.config.router_aux_loss_coef = options.router_aux_loss_coef
    model.config.attention = options.attention
    return model.train().to(machine.device), load_training_state(folder)


def resumed_folder(options: TrainOptions, machine: Machine) -> str:
    """The folder of the weights that a resumed run goes on from: out_dir, or its `stable` when these weights have begun
    to decay and the run is to end otherwise. Raises ValueError if that is not there."""
    state, folder = load_training_state(options.out_dir), f"{options.out_dir}/stable"
    before = vars(options) | saved_options(TrainOptions, state)
    falls, new_falls = (o["max_steps"] - o["decay_steps"] for o in (before, vars(options)))  # from this step on
    if (before["max_steps"], falls) == (options.max_steps, new_falls) or state["step"] <= falls:
        return options.out_dir
    asked = f"--max_steps={options.max_steps} --decay_steps={options.decay_steps}"
    what = f"the learning rate of the run in {options.out_dir} has been falling since step {falls:.0f}"
    stable = load_training_state(folder)
    if not stable or stable["step"] != falls or new_falls < falls:
        need = f"{folder} with the weights of that step, and a decay that begins no earlier"
        raise ValueError(f"{asked}: {what}; to go on otherwise takes {need} (--init_from starts a new run)")
    machine.print(f"resumed   from {folder}, step {falls:.0f}, for {asked}: {what}")
    return folder


def train(options: TrainOptions, machine: Machine) -> None:
    """Runs the whole training and leaves a checkpoint, log.csv and loss.png in options.out_dir."""
    data, val_data, tokenizer = open_data(options, machine)
    T, B, world = options.sequence_length, options.micro_batch_size, machine.world_size
    if options.batch_tokens % (T * B * world):
        parts = f"sequence_length * micro_batch_size * processes = {T} * {B} * {world} = {T * B * world}"
        raise ValueError(f"--batch_tokens={options.batch_tokens} is not a multiple of {parts}")
    model, state = start(options, machine, tokenizer)
    model.gradient_checkpointing = options.gradient_checkpointing
    if options.moe_warmup_steps and not model.config.is_moe:
        raise ValueError(f"--moe_warmup_steps={options.moe_warmup_steps}: this model has no experts to train first")
    if options.shard:
        shard(model, machine)
    stable, sizes = options.max_steps - options.decay_steps, token_bytes(tokenizer)
    milestones = {stable: Path(options.out_dir) / "stable"} if options.decay_steps and stable else {}

    def validate() -> dict[str, float]:
        return evaluate(model if options.shard else run.network, val_data, sizes, machine, options)

    optimizers, flops = make_optimizers(model, options, machine), model.flops_per_token(T)
    settings = dict(columns=["copy_loss"], evaluate_first=False, milestones=milestones)
    run = Run(options, machine, model, model, tokenizer, optimizers, validate, flops, state, **settings)
    example = data.batch(rows_of_step(0, data.count, B, options.seed))
    tokens, parts = options.max_steps * options.batch_tokens, options.batch_tokens // (T * B * world)
    lines = dict(
        data=f"{options.data}: {len(data.tokens):,} tokens; {tokens:,} are {tokens / len(data.tokens):.2f} epochs",
        step=f"{options.batch_tokens:,} tokens: {B} sequences of {T} x {parts} micro-batches x {world} processes",
    )
    count = options.max_steps * parts
    stage.announce(run, lambda network: loss_sum(network, *example, machine), count, lines, "micro_batch_size")

    schedule = options.max_steps, options.warmup_steps, options.decay_steps, options.decay
    common = common_tokens(data.read(0, 10_000_000), tokenizer.vocab_size) if options.copy_steps else None

    def batch(rows: list[int], copying: bool) -> tuple[Tensor, Tensor]:
        tokens, targets = data.batch(rows)
        return tokens, only_copies(tokens, targets, common) if copying else targets

    with run:
        for step in run.steps():
            lr = options.learning_rate * wsd(step, *schedule)
            rows = rows_of_step(step, data.count, options.batch_tokens // T, options.seed)
            micro_batches = [rows[i : i + B] for i in range(0, len(rows), B)]  # of all ranks
            copying, count = is_copy_step(step, options.copy_steps, options.seed), options.batch_tokens
            if copying:
                count = sum(int((batch(part, copying)[1] >= 0).sum()) for part in micro_batches)
            loss = 0.0
            for part in run.micro_batches(micro_batches[machine.rank :: world]):
                tokens, targets = batch(part, copying)
                loss += run.backward(loss_sum(run.network, tokens, targets, machine) / max(count, 1))
            experts_only, name = step < options.moe_warmup_steps, "copy_loss" if copying else "loss"
            grad_norm = optimizer_step(model, optimizers, lr, options.grad_clip, experts_only)
            run.end_step(loss=loss, grad_norm=grad_norm, lr=lr, tokens=options.batch_tokens, name=name)
            if step + 1 == options.copy_steps:
                machine.print(f"step {step + 1:>6}  the copy steps end: every target counts, so the loss is another")
    if options.sample_tokens:
        sampling, prompts = dict(temperature=0.7, top_p=0.95), [[tokenizer.bos_id]]  # as sample.py
        [ids] = write_answers(machine, model, tokenizer, prompts, options.sample_tokens, 1, **sampling)
        text, out = tokenizer.decode(ids, skip_special=True), options.out_dir
        machine.print(f"\nThe model is in {out}. It writes:\n\n{text}\n\nMore: python sample.py {out}")


def inherited(source: str) -> dict[str, Any]:
    """The options that a run from the checkpoint `source` takes over: its shape, and its recipe if train.py made it. It
    is warm already, and can copy."""
    state, own = load_training_state(source), "out_dir data init_from overwrite resume resume_or_start".split()
    recipe = (state and saved_options(TrainOptions, state)) or {}  # none of a tuned or published one
    recipe = {name: value for name, value in recipe.items() if name not in own}
    if 0 < recipe.get("decay_steps", 0) < recipe.get("max_steps", 0):
        recipe["decay_steps"] /= recipe["max_steps"]  # a share, which fits any --max_steps
    return recipe | dataclasses.asdict(load_config(source)) | dict(warmup_steps=0, copy_steps=0)


def read_options(argv: list[str]) -> TrainOptions:
    return stage.read_run_options(TrainOptions, argv, inherited)


def main(argv: list[str]) -> None:
    stage.run_stage(train, read_options(argv))


if __name__ == "__main__":
    run_command(main)
