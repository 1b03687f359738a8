"""Pretraining: a model learns to continue text, one row of tokens at a time.

    python train.py                                          the tiny model on the built-in stories, minutes
    python train.py config/doge20m.py --data=data/web        a real recipe
    torchrun --nproc_per_node=8 train.py config/doge20m.py   the same on eight GPUs: same batches, same losses
    python train.py --out_dir=out/stories --resume           go on as if it had never stopped

The data is one long line of token ids on the disk, documents one after the other. It is cut into rows of T tokens,
and at every place of a row the model is asked for the next token. One step: take the rows of this step, compute the
mean loss and its gradient, move the weights a little against it. The rest of this file is about four choices.

Which rows. An epoch visits every row once, in an order that is a pure function of (seed, epoch). So the rows of step
n are known without having run the steps before, and a run that was killed goes on with exactly what it would have read.
On a processor it ends at the same weights to the last bit. With --compile=on it did so too where it was tried, for the
same torch makes the same functions again; but nothing promises it on another version or machine, nor on a GPU.

How far. The learning rate warms up, stays, and decays: Warmup-Stable-Decay (Hu et al. 2024, arXiv 2404.06395; Hagele
et al. 2024, arXiv 2405.18392). Unlike a cosine it need not know the end beforehand. The weights just before the decay
are kept in OUT_DIR/stable: `--init_from` goes on from them on other data at the same rate, without a new warm-up, and
a MoE model starts from its dense twin's.

Which way. AdamW, with weight decay on the matrices alone; or Muon (Jordan et al. 2024), which makes every update of a
hidden matrix orthogonal, for the matrices between embedding and output.

What first. A small model soon knows that a name comes next, and for long not which: it treats all names alike. So the
tiny recipe begins with `copy_steps`, most of which learn only tokens that stood in the row before, and a model that has
learned to look back first keeps to its names (NOTES.md has the figures, and texts where it did not help).

The yardstick is bits per byte on text the model never saw: how many bits it would need to write a byte of it. Unlike
the loss a token, it does not depend on the tokenizer.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from model import Doge, DogeConfig
from nanodoge.checkpoint import load_config, load_model, load_optimizer_state, load_run, read_meta
from nanodoge.machine import gathered, part_like, shard, whole
from nanodoge.options import HERE, parse_options, read_values, run_command
from nanodoge.run import Run, RunOptions, carry_out, is_resumed, refuse_to_overwrite, resumed_options, try_out
from nanodoge.tokenizer import Tokenizer

TINY = HERE / "config" / "tiny.py"
BUILT_IN = ("data/stories", "data/stdlib")  # made on the spot when they are not there: both come without a network


@dataclass
class TrainOptions(DogeConfig, RunOptions):
    """DogeConfig's fields give the shape of a model trained from scratch; with --init_from the checkpoint does."""

    data: str = "data/stories"  # folder made by prepare_data.py
    init_from: str = ""  # checkpoint folder to start from: stable learning rate at once, its optimizer if it has one
    overwrite: bool = False  # replace the run that out_dir holds
    vocab_size: int = 0  # number of token ids; 0 = as many as the data's tokenizer has
    sequence_length: int = 0  # tokens a row (T); 0 = max_position_embeddings
    batch_size: int = 8  # rows a process computes at once: as many as its memory holds
    batch_tokens: int = 524_288  # tokens a step, over all processes and micro-batches
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the hidden matrices, the rest stays with adamw
    beta1: float = 0.9  # Adam: memory of the gradient
    beta2: float = 0.95  # Adam: memory of its square
    weight_decay: float = 0.01  # of the matrices; A, the residual scales and the norms are not decayed
    warmup_steps: int = 800  # steps of rising learning rate; none after --init_from
    decay_steps: int = 800  # steps of falling learning rate at the end
    decay: Literal["linear", "cosine", "1-sqrt"] = "linear"  # shape of the fall
    copy_steps: int = 0  # first steps, most of which learn only copies (see copies); none after --init_from
    moe_warmup_steps: int = 0  # first steps that train the router and the experts only
    gradient_checkpointing: bool = False  # recompute each block in the backward pass: less memory, a third more work
    eval_tokens: int = 1_000_000  # validation tokens, always the first ones of val.bin
    sample_tokens: int = 240  # longest sample printed at the end (a built-in story has about 180); 0 = none

    def __post_init__(self):
        """The checks that need no data; DogeConfig's own wait until the vocabulary is known."""
        self.check()
        self.data = Path(self.data).as_posix()  # ./data/x is data/x
        self.out_dir = Path(self.out_dir or f"out/{Path(self.data).name}").as_posix()
        self.sequence_length = self.sequence_length or self.max_position_embeddings
        if self.init_from:  # a checkpoint is warm, and can copy
            self.warmup_steps = self.copy_steps = 0
        for name in ("sequence_length", "batch_size", "batch_tokens", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        for name in ("warmup_steps", "decay_steps", "copy_steps", "moe_warmup_steps", "weight_decay", "sample_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name}={getattr(self, name)} must be a number from 0 up")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be from 0 up and below 1")
        if self.warmup_steps + self.decay_steps > self.max_steps:
            raise ValueError(f"--warmup_steps={self.warmup_steps} and --decay_steps={self.decay_steps} "
                             f"do not fit into --max_steps={self.max_steps}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Rows:
    """The rows of a .bin file: row i is tokens iT .. iT + T, the last one being only a target. The file is mapped,
    not read: the operating system brings in the pages that are touched."""

    def __init__(self, folder, split, length):
        self.folder, self.length = Path(folder), length
        meta = read_meta(folder)
        self.path = path = self.folder / f"{split}.bin"
        self.vocab_size = meta["vocab_size"]
        dtype, size = np.dtype(meta["dtype"]).newbyteorder("<"), path.stat().st_size
        if size != meta[split]["tokens"] * dtype.itemsize:
            raise ValueError(f"{path} has {size:,} bytes, and meta.json says {meta[split]['tokens']:,} {dtype.name} "
                             "tokens: it was not written to its end, or changed; prepare the data again")  # fmt: skip
        self.tokens = np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
        self.count = (len(self.tokens) - 1) // length
        if split == "train" and self.count < 1:
            raise ValueError(f"--sequence_length={length} is longer than the data: {path} has {len(self.tokens)} "
                             "tokens, and a row takes one more than its length")  # fmt: skip

    def piece(self, start, stop):
        """These tokens. Raises ValueError for an id that the vocabulary has not; the file is too large to be looked
        through beforehand."""
        tokens = self.tokens[start:stop]
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise ValueError(f"{self.path} has the id {tokens.max()} at or after token {start}, and meta.json says "
                             f"vocab_size {self.vocab_size}: it was changed; prepare the data again")  # fmt: skip
        return tokens

    def batch(self, rows):
        """Row numbers -> tokens, targets (B, T) int64. A row past the end of the file is filled with token 0 and the
        target -100, which the loss ignores."""
        span = np.full((len(rows), self.length + 1), -1, dtype=np.int64)
        for i, row in enumerate(rows):
            piece = self.piece(row * self.length, (row + 1) * self.length + 1)
            span[i, : len(piece)] = piece
        tokens, targets = torch.from_numpy(span[:, :-1]), torch.from_numpy(span[:, 1:])
        return tokens.clamp(min=0), targets.masked_fill(targets < 0, -100)


COMMON = 1 / 500  # of all tokens: a copy of "the" or "." says nothing. A tiny world's names have less than a thousandth


def common_tokens(tokens, vocab_size):
    """(V,) bool: the tokens that make up more than COMMON of a text."""
    counts = np.bincount(tokens, minlength=vocab_size)
    return counts > COMMON * counts.sum()


def is_copy_step(step, copy_steps, seed):
    """Whether a step learns copies alone: at first every one does, from copy_steps on none, and in between it is drawn
    with a chance that falls as 1 - (step / copy_steps)^2. An end from one step to the next undid much of what was
    learned (NOTES.md)."""
    return step < copy_steps and scramble(scramble(seed) + step) / 2**64 >= (step / copy_steps) ** 2


def copies(tokens, targets, common):
    """targets (B, T) with -100 in place of all that are not copies: tokens that stood in their row before and are not
    `common` (V,). See "What first" at the top of this file."""
    rows = torch.cat((tokens[:, :1], targets), dim=1).numpy()
    keep = np.ones(rows.shape, bool)
    for i, row in enumerate(rows):
        keep[i, np.unique(row, return_index=True)[1]] = False  # the first of each
    keep &= ~common[rows.clip(min=0)]  # a target of -100 stays one
    return targets.masked_fill(torch.from_numpy(~keep[:, 1:]), -100)


def open_data(options, machine):
    """-> training rows, validation rows, tokenizer of options.data. Built-in data is prepared if it is not there."""
    if options.data in BUILT_IN and not Path(options.data, "meta.json").is_file():
        if machine.is_main:
            import prepare_data

            source = Path(options.data).name
            machine.print(f"preparing the built-in {source} in {options.data}")
            prepare_data.prepare(prepare_data.PrepareOptions(sources=[source], out=options.data))
    machine.barrier()
    meta = read_meta(options.data)
    train, val = (Rows(options.data, split, options.sequence_length) for split in ("train", "val"))
    tokenizer = Tokenizer.load(options.data)
    if (tokenizer.digest, tokenizer.vocab_size) != (meta["tokenizer_sha256"], meta["vocab_size"]):
        raise ValueError(f"{options.data}/tokenizer.json is not the one its tokens were made with (sha256 or "
                         "vocab_size differs)")  # fmt: skip
    if len(val.tokens) < 2:
        raise ValueError(f"{options.data}/val.bin has {len(val.tokens)} tokens: too few to validate on")
    return train, val, tokenizer


def shuffled(index, count, key):
    """The index-th element of a pseudo-random order of 0 .. count - 1: a pure function, so that no list of the order
    is ever stored. A Feistel network permutes the numbers of an even number of bits, whatever its round function is
    (Luby & Rackoff 1988); a result that is not below `count` is permuted again until it is."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            left, right = right, left ^ (scramble(right ^ scramble(key * 8 + turn)) & mask)
        index = left << half | right
        if index < count:
            return index


def scramble(x):
    """A 64-bit hash of an integer: the finaliser of splitmix64 (Steele, Lea & Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def rows_of_step(step, count, rows_per_step, seed):
    """The row numbers of a step: the next rows_per_step of the endless sequence of shuffled epochs."""
    places = range(step * rows_per_step, (step + 1) * rows_per_step)
    return [shuffled(place % count, count, scramble(seed) + place // count) for place in places]


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate and optimizer


def wsd(step, max_steps, warmup_steps, decay_steps, decay="linear"):
    """The Warmup-Stable-Decay multiple of the peak learning rate at `step` (from 0): a line up to 1 over warmup_steps,
    1, and over the last decay_steps down to 0 along a line, half a cosine, or 1 - sqrt. 0 from max_steps on."""
    if step >= max_steps:
        return 0.0
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if max_steps - step >= decay_steps:
        return 1.0
    p = 1 - (max_steps - step) / decay_steps
    return {"linear": 1 - p, "cosine": 0.5 + 0.5 * math.cos(math.pi * p), "1-sqrt": 1 - math.sqrt(p)}[decay]


def cosine(step, max_steps, warmup_steps, floor=0.1):
    """The multiple of the peak learning rate that tuning uses at `step` (from 0): a line up to 1 over warmup_steps,
    then half a cosine down to `floor`, reached with the last step and kept after it."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step + 1 - warmup_steps) / max(1, max_steps - warmup_steps))
    return floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * done))


class Muon(torch.optim.Muon):
    """torch's Muon, with all matrices of one shape in one product. On a processor, where products of bfloat16 are slow,
    they are of float32. Measured there: 2 to 4 times as fast (NOTES.md)."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, matrices in shapes.items():
                updates = []
                for p in matrices:
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    nesterov = p.grad.lerp(state["momentum_buffer"], group["momentum"])
                    updates.append(whole(nesterov))  # with --shard every process does all the work that follows
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # match_rms_adamw
                updates = orthogonal(torch.stack(updates), *group["ns_coefficients"])
                for p, update in zip(matrices, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(part_like(update, p), alpha=-rate)


def orthogonal(x, a, b, c, steps=5):
    """Matrices x (n, rows, columns) -> all about orthogonal: U V of x = U S V. A polynomial of x that moves the
    singular values towards 1 is applied `steps` times (Newton-Schulz; coefficients of Jordan et al. 2024)."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    if x.device.type != "cpu":
        wide = wide.bfloat16()
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if x.shape[1] <= x.shape[2] else wide.mT).to(x.dtype)


def is_routed(name):
    return any(part in name for part in ("router_gate", "down_embed", "up_embed"))


def make_optimizers(model, options, fused):
    """A list of one optimizer, or of two with Muon. Their groups carry `routed`: the experts' parameters, which
    moe_warmup_steps trains first.

    Muon takes the matrices of attention and MLP; its update is scaled to the size of AdamW's (match_rms_adamw, Liu et
    al. 2025, arXiv 2502.16982), so that both follow one learning rate. Embeddings, experts and vectors stay with AdamW.
    """
    groups = {}
    for name, p in model.named_parameters():
        hidden = name.startswith("layers") and "_proj" in name and "dt_proj" not in name
        kind = "muon" if options.optimizer == "muon" and hidden else "adamw"
        groups.setdefault((kind, p.ndim >= 2, is_routed(name)), []).append(p)
    kinds = {"adamw": [], "muon": []}
    for (kind, decays, routed), parameters in groups.items():
        decay = options.weight_decay if decays else 0.0
        kinds[kind].append(dict(params=parameters, routed=routed, weight_decay=decay))
    betas = options.beta1, options.beta2
    optimizers = [torch.optim.AdamW(kinds["adamw"], lr=0.0, betas=betas, eps=1e-8, fused=fused)]
    if kinds["muon"]:
        optimizers.append(Muon(kinds["muon"], lr=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


# ---------------------------------------------------------------------------------------------------------------------
# The run


def start(options, machine, tokenizer):
    """-> the model to train and, where it takes one up, a training state: of a resumed run or of the checkpoint."""
    folder = options.out_dir if options.resume else options.init_from
    if not folder:
        vocab_size = options.vocab_size or tokenizer.vocab_size
        if vocab_size < tokenizer.vocab_size:
            raise ValueError(f"--vocab_size={vocab_size} is smaller than the {tokenizer.vocab_size} ids of the "
                             f"tokenizer of --data={options.data}")  # fmt: skip
        torch.manual_seed(options.seed)
        fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(DogeConfig)}
        return Doge(DogeConfig(**fields | {"vocab_size": vocab_size})).to(machine.device), None
    model, own_tokenizer = load_model(folder)
    if own_tokenizer.digest != tokenizer.digest:
        raise ValueError(f"{folder} was trained with another tokenizer than --data={options.data}: prepare the data "
                         f"with --tokenizer={folder}")  # fmt: skip
    state = load_run(folder)
    if options.init_from and not options.resume:
        becomes_moe = options.is_moe and not model.config.is_moe
        shape = ("is_moe", "num_experts", "num_experts_per_tok") if becomes_moe else ()
        for field in dataclasses.fields(DogeConfig):
            asked, has = getattr(options, field.name), getattr(model.config, field.name)
            if field.name not in (*shape, "router_aux_loss_coef", "attention") and asked != has:
                raise ValueError(f"--{field.name}={asked}: the model of --init_from={folder} has {has}")
        if becomes_moe:
            torch.manual_seed(options.seed)
            model = Doge.from_dense(model, options.num_experts, options.num_experts_per_tok)
        model.config.router_aux_loss_coef = options.router_aux_loss_coef
    model.config.attention = options.attention
    return model.train().to(machine.device), state


def bytes_of_tokens(tokenizer):
    """(V,) int64: how many bytes of text each token stands for; a special token for none."""
    special = set(tokenizer.special_tokens.values())
    return torch.tensor([0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


def make_evaluate(machine, forward, rows, tokenizer, options):
    """-> evaluate(): mean loss and bits per byte over the first eval_tokens of the validation text, which all
    processes share. Bits count every token, the end of a document too; bytes are those of the text alone."""
    sizes = bytes_of_tokens(tokenizer)
    count = min(math.ceil((len(rows.tokens) - 1) / rows.length), math.ceil(options.eval_tokens / rows.length))
    mine = range(count)[machine.rank :: machine.world_size]

    @torch.no_grad()
    def evaluate():
        nats, targets_seen, size = 0.0, 0, 0
        for i in range(0, len(mine), options.batch_size):
            tokens, targets = rows.batch(mine[i : i + options.batch_size])
            real = targets[targets >= 0]
            nats += forward(tokens, targets).double().item() * len(real)
            targets_seen, size = targets_seen + len(real), size + sizes[real].sum().item()
        nats, targets_seen, size = machine.sum([nats, float(targets_seen), float(size)])
        return dict(val_loss=nats / targets_seen, val_bpb=nats / math.log(2) / max(size, 1))

    return evaluate


def announce(options, machine, model, train_rows, tokenizer, accumulation, seconds, which):
    """Prints, before the first step, what is going to happen, on what, and what it will cost."""
    c, T, steps = model.config, options.sequence_length, options.max_steps
    parameters, tokens = sum(p.numel() for p in model.parameters()), steps * options.batch_tokens
    kind = f"MoE, {c.num_experts_per_tok} of {c.num_experts:,} experts" if c.is_moe else "dense"
    attention = "causal scaled_dot_product_attention, scores folded into the keys"
    if T > c.keep_window_size:
        attention += f"; beyond {c.keep_window_size:,} tokens, chunks of live keys"
    duration = seconds * accumulation * steps
    owned = parameters / (machine.world_size if options.shard else 1)
    memory = machine.peak_memory() + 8 * owned  # Adam's two moments come with the first step
    machine.print(
        f"model     {parameters:,} parameters ({kind}), {c.num_hidden_layers} layers of {c.hidden_size}, "
        f"vocabulary {c.vocab_size:,}\n"
        f"data      {options.data}: {len(train_rows.tokens):,} tokens, {tokens / len(train_rows.tokens):.2f} epochs\n"
        f"step      {options.batch_tokens:,} tokens: {options.batch_size} rows of {T} x {accumulation} x "
        f"{machine.world_size} processes\n"
        f"device    {machine.summary}; {which}\n"
        f"attention {attention}\n"
        f"cost      {steps:,} steps, {tokens:,} tokens, {model.flops_per_token(T) * tokens / 1e15:.3g} PFLOP; about "
        f"{duration // 3600:.0f} h {duration // 60 % 60 + 1:.0f} min and {memory / 1e9:.2g} GB a process"
    )


def train(options, machine):
    """Runs the whole training and leaves a checkpoint, log.csv and loss.png in options.out_dir."""
    train_rows, val_rows, tokenizer = open_data(options, machine)
    model, state = start(options, machine, tokenizer)
    model.gradient_checkpointing = options.gradient_checkpointing
    if options.moe_warmup_steps and not model.config.is_moe:
        raise ValueError(f"--moe_warmup_steps={options.moe_warmup_steps}: this model has no experts to train first")
    rows_per_step, accumulation = divide_batch(options, machine)
    shard(model, options, machine)
    optimizers = make_optimizers(model, options, fused=machine.device.type in ("cpu", "cuda"))

    def forward(tokens, targets, network=model):
        with machine.autocast():
            return network(*machine.put(tokens, targets))[1]

    example = train_rows.batch(rows_of_step(0, train_rows.count, options.batch_size, options.seed))
    network, seconds, which = try_out(machine, model, lambda n: forward(*example, n), options)
    announce(options, machine, model, train_rows, tokenizer, accumulation, seconds, which)
    evaluate = make_evaluate(machine, functools.partial(forward, network=network), val_rows, tokenizer, options)
    stable_until = options.max_steps - options.decay_steps
    milestones = {stable_until: Path(options.out_dir) / "stable"} if options.decay_steps and stable_until else {}
    run = Run(options, machine, model, network, tokenizer, optimizers, evaluate,
                      model.flops_per_token(options.sequence_length), milestones)  # fmt: skip
    if options.resume:
        run.restore(state)
    elif state:
        load_optimizer_state(optimizers, run.names, state["optimizer"])

    def loss_of(rows):  # a micro-batch's share of the mean over the whole step
        return forward(*train_rows.batch(rows), run.network) / (accumulation * machine.world_size)

    common = common_tokens(train_rows.piece(0, 10_000_000), tokenizer.vocab_size) if options.copy_steps else None

    def copies_in(rows):
        tokens, targets = train_rows.batch(rows)
        return tokens, copies(tokens, targets, common)

    def loss_of_copies(rows, all):  # the same for the mean over `all` copies of the step
        tokens, targets = copies_in(rows)
        return forward(tokens, targets, run.network) * (targets >= 0).sum().item() / all

    with run:
        for step in run.steps():
            schedule = options.max_steps, options.warmup_steps, options.decay_steps, options.decay
            lr = options.learning_rate * wsd(step, *schedule)
            rows = rows_of_step(step, train_rows.count, rows_per_step, options.seed)
            parts = [rows[i : i + options.batch_size] for i in range(0, len(rows), options.batch_size)]
            share = loss_of
            if is_copy_step(step, options.copy_steps, options.seed):
                all_copies = sum(int((copies_in(part)[1] >= 0).sum()) for part in parts)
                share = functools.partial(loss_of_copies, all=max(1, all_copies))
            run.update(parts[machine.rank :: machine.world_size], share, options.batch_tokens, lr,
                       experts_only=step < options.moe_warmup_steps)  # fmt: skip
    run.finish()
    if options.sample_tokens:
        with gathered(model):
            if machine.is_main:
                print_sample(model, tokenizer, machine, options)


def divide_batch(options, machine):
    """-> rows a step, micro-batches a process and step. Raises ValueError if the parts do not make up the whole."""
    T, B, world = options.sequence_length, options.batch_size, machine.world_size
    if options.batch_tokens % (T * B * world):
        raise ValueError(f"--batch_tokens={options.batch_tokens} is not a multiple of sequence_length * batch_size * "
                         f"processes = {T} * {B} * {world} = {T * B * world}")  # fmt: skip
    return options.batch_tokens // T, options.batch_tokens // (T * B * world)


def print_sample(model, tokenizer, machine, options):
    """What the model writes after the token that begins every document."""
    generator = torch.Generator(machine.device).manual_seed(options.seed)
    begin = torch.tensor([[tokenizer.bos_id]], device=machine.device)
    with machine.autocast():
        ids = model.eval().generate(begin, options.sample_tokens, temperature=0.7, top_p=0.95, generator=generator,
                                    stop_ids=[tokenizer.eos_id], vocab_size=tokenizer.vocab_size)  # fmt: skip
    text = tokenizer.decode([i for i in ids[0].tolist() if i != tokenizer.eos_id])
    machine.print(f"\nThe model is in {options.out_dir}. It writes:\n\n{text}\n\n"
                  f"More: python sample.py {options.out_dir}")  # fmt: skip


# What a resumed run may change: what it costs, where and how often it reports, and when it ends. The rest is the run.
MAY_CHANGE = set("""resume out_dir overwrite keep_best max_steps decay_steps log_every eval_every eval_tokens
    save_every device dtype attention compile patience shard batch_size gradient_checkpointing sample_tokens""".split())


def read_options(argv):
    """The options of this run. Without a config file they are those of config/tiny.py; with --init_from those of the
    checkpoint's run, with --resume those of the run itself. What `argv` says comes last, and wins."""
    tiny = [] if any(not argument.startswith("--") for argument in argv) else [str(TINY)]
    asked = read_values(TrainOptions, tiny + argv)
    out = asked.get("out_dir") or f"out/{Path(asked.get('data', TrainOptions.data)).name}"
    if is_resumed(asked, out):
        return resumed_options(TrainOptions, argv, out, MAY_CHANGE)
    base = {}
    if source := asked.get("init_from"):
        state = load_run(source) or {}
        where, known = ("out_dir", "data", "init_from", "overwrite"), {f.name for f in dataclasses.fields(TrainOptions)}
        recipe = state.get("options", {})
        if recipe.keys() <= known:  # else it was tuned, and only its shape is of use here
            base = {name: value for name, value in recipe.items() if name not in where}
        base |= dataclasses.asdict(load_config(source))
    options = parse_options(TrainOptions, argv if base else tiny + argv, base=base)
    refuse_to_overwrite(options)
    return options


def main(argv):
    carry_out(train, read_options(argv))


if __name__ == "__main__":
    run_command(main)
