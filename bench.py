"""How fast is it? Every speed and memory number of the README. (nanodoge/measure.py says how to measure one honestly.)

    python bench.py decode --peer                                         tokens per second, beside transformers' Doge
    python bench.py decode --model=20m,320m --dtype=float32,int8 --length=2048,32768         with a long text behind it
    python bench.py train prefill --length=2048,8192 --dtype=bfloat16 --peer --csv=results/bench.csv

WHAT is one or more of:

    decode     32 tokens of prompt and 128 new ones; with --length=N, new tokens after N others
    train      forward, backward and AdamW's update on sequences of --length tokens
    prefill    a prompt of --length tokens into the cache, and the logits after it
    attention  one layer of Dynamic Mask Attention, forward and backward; its peer is torch's dense causal attention
    moe        one CDMoE layer, forward and backward: whole, and its experts with an MLP of one unit
    tokenizer  the built-in stories to tokens, on one core
    data       prepare_data.py on --megabytes of text

MB is what a step takes beside the weights; of `data`, the memory of the whole process.

The peer is measured at its best. transformers has two ways to attend (above 4,096 tokens only sdpa is tried: eager
takes minutes), in bfloat16 two ways to train, and beside int8 it may choose between float32 and bfloat16. The fastest
counts and is named.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prepare_data
from model import CDMoE, Doge, DogeConfig
from nanodoge import measure, sources, stories
from nanodoge.attention import dynamic_mask_attention
from nanodoge.decode import Decoder
from nanodoge.engine import draw
from nanodoge.machine import Machine
from nanodoge.options import HERE, Count, NonNegative, Whole, check_ranges, parse_options, read_config, run_command
from nanodoge.tokenizer import train_bpe
from train import make_optimizers

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # per weight
LENGTHS = {"decode": [0], "train": [2048], "prefill": [2048, 8192], "attention": [2048, 8192], "moe": [2048]}
PEER_LONGEST = {"decode": 0, "train": 8192, "prefill": 16384}  # beyond, its T x T masks take minutes and tens of GB
PROMPT, PIECE = 32, 4096  # tokens of decode's prompt; tokens of a prompt that are read together
COLUMNS = """what name model dtype batch_size length tokens seconds tokens_per_second extra_mb reached unit limit share
    peer peer_seconds peer_tokens_per_second peer_extra_mb speedup speedup_min speedup_max rounds note""".split()


@dataclass
class BenchOptions:
    """Options"""

    what: list[str] = field(default_factory=list)  # what to measure, see below
    peer: bool = False  # measure the peer beside ours
    model: list[str] = field(default_factory=list)  # 20m, 320m_moe, ..., or config files; empty: 20m (moe: 20m_moe)
    dtype: list[str] = field(default_factory=lambda: ["float32"])  # float32, bfloat16, and int8 (decode only)
    length: list[str] = field(default_factory=list)  # tokens; empty: what a laptop does in a minute or two
    batch_size: Count = 1  # sequences at once
    new_tokens: Count = 128  # decode: tokens to write
    temperature: NonNegative = 0.0  # decode: 0 takes the likeliest tokens, above 0 tokens are drawn
    compile: bool = False  # torch.compile (train and decode)
    rounds: Whole = 0  # turns; 0: five, and one of what takes over 20 seconds
    vocab_size: Count = 32768  # tokenizer and data: the vocabulary
    megabytes: Count = 100  # data: how much text
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    csv: str = ""  # file to append the rows to, with machine, versions and date

    def __post_init__(self):
        check_ranges(self)
        for name, valid in (("what", TASKS), ("dtype", BYTES)):
            for value in getattr(self, name) or [""]:
                if value not in valid:
                    raise ValueError(f"{name} {value!r}: must be one or more of {', '.join(valid)}")
        if "int8" in self.dtype and self.what != ["decode"]:
            raise ValueError("--dtype=int8 is for decode")
        for length in self.length:
            if not length.isdecimal() or int(length) < 1:
                raise ValueError(f"--length={length} must be a whole number from 1 up")


class Case(NamedTuple):
    """One row of the table, as plain values: it is sent to the process that measures memory."""

    what: str
    name: str  # as printed
    options: BenchOptions
    model: str = ""
    config: DogeConfig | None = None
    dtype: str = ""
    length: int = 0
    part: str = ""  # moe: layer or experts

    @property
    def place(self) -> dict:
        """Where and as what tensors of this case are made: bfloat16 or float32 (int8 is a format of weights alone)."""
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        return dict(device=Machine(self.options.device).device, dtype=dtype)


class Task(NamedTuple):
    """A case ready to run: `ours` does it once, and so does each of `peers()`, functions by the name of a setting."""

    ours: Callable
    peers: Callable[[], dict[str, Callable]] = dict
    tokens: int = 0  # that one call works through
    amount: float = 0  # what it must read or compute at the least, in `unit`
    unit: str = "FLOP"  # FLOP, bytes, or text (its bytes, for which no limit is known)
    note: str = ""


# ---- Models and their peers


def config_of(model: str) -> DogeConfig:
    """The shape of a model of the family by its name (20m, 320m_moe), or of a config file. Raises ValueError."""
    family = [HERE / "config" / f"doge{name}.py" for name in (model.removesuffix("_moe"), model)]
    paths = family if family[1].is_file() else [model]  # an MoE twin's file sets the experts alone
    fields = {f.name for f in dataclasses.fields(DogeConfig)}
    return DogeConfig(**{k: value for path in paths for k, (value, _) in read_config(path).items() if k in fields})


def make_model(case: Case, dtype: str = "float32") -> tuple[Doge, Tensor]:
    """A model of this shape with random weights, its scores too, so that a window keeps some keys and drops others; and
    random tokens (B, T)."""
    torch.manual_seed(0)
    model = Doge(case.config)
    for block in model.layers:
        block.self_attn.A.data.normal_()
    tokens = torch.randint(case.config.vocab_size, (case.options.batch_size, case.length or PROMPT))
    return model.to(**case._replace(dtype=dtype).place).eval(), tokens.to(case.place["device"])


def peer_config(config: DogeConfig) -> Any:
    """The same shape for transformers."""
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key != "qk_norm"}
    return importlib.import_module("transformers").DogeConfig(**fields)


def make_peers(case: Case, formats: dict[str, str], make_step: Callable) -> dict[str, Callable]:
    """Steps of transformers' Doge with the weights of ours, for each of its ways to attend and each of `formats` (name:
    dtype). make_step: the model -> one step."""
    transformers, peers = importlib.import_module("transformers"), {}
    transformers.logging.set_verbosity_error()

    def run(reference: nn.Module, setting: str, step: Callable):
        reference.set_attn_implementation(setting)  # can be changed between calls
        step()

    for name, dtype in formats.items():
        model, _ = make_model(case, dtype)
        reference = transformers.DogeForCausalLM(peer_config(case.config)).to(model.embed_tokens.weight)
        reference.model.load_state_dict(model.state_dict())
        step = make_step(reference.eval())
        for setting in ["eager", "sdpa"] if case.length <= 4096 else ["sdpa"]:
            peers[f"{setting} {name}".strip()] = functools.partial(run, reference, setting, step)
    return peers


# ---- What is measured: a function each, Case -> Task


def read_prompt(model: Doge, tokens: Tensor, cache: Any) -> Tensor:
    """The logits (B, V) of what follows tokens (B, T), which the cache then holds."""
    for piece in tokens.split(PIECE, dim=1):  # so that memory does not grow with the prompt
        ends = torch.full((len(piece),), piece.shape[1], device=piece.device)
        x, _ = model.hidden(piece, ends, cache, ends - 1)
    return F.linear(x[:, -1], model.output_weight)


def choose(logits: Tensor, temperature: float) -> Tensor:
    """Tokens (B,): the likeliest at temperature 0, else drawn."""
    if not temperature:
        return logits.max(dim=-1).indices
    points = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device)
    return draw((logits / temperature).softmax(-1), points)[:, 0]


def decode(case: Case) -> Task:
    """The prompt and the new tokens; behind a text of case.length the new ones alone."""
    (model, prompt), new, temperature = make_model(case), case.options.new_tokens, case.options.temperature
    decoder = Decoder(model, getattr(torch, case.dtype), case.options.compile)
    total = prompt.shape[1] + new * ((case.options.rounds or measure.ROUNDS) + 1 if case.length else 1)
    options = dict(max_new_tokens=new, attention_mask=torch.ones_like(prompt), pad_token_id=0, do_sample=False)
    options |= dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {}

    @torch.inference_mode()
    def begin():
        cache = model.new_cache(len(prompt), total, room=decoder.room(total))
        return read_prompt(model, prompt, cache), cache

    kept = begin() if case.length else None  # then every turn goes on where the last one stopped
    note = f"cache {sum(x.nbytes for layer in kept[1].layers for x in layer) / 1e6:.1f} MB" if kept else ""

    @torch.inference_mode()
    def ours():
        logits, cache = kept or begin()
        for _ in range(new if kept else new - 1):
            logits = decoder(choose(logits, temperature), cache)
        return choose(logits, temperature)

    def peers():
        formats = {name: name for name in ("float32", "bfloat16")} if case.dtype == "int8" else {"": case.dtype}
        return make_peers(case, formats, lambda peer: lambda: peer.generate(prompt, eos_token_id=None, **options))

    size = model.flops_per_token(1) / 6 * BYTES[case.dtype]  # bytes of the weights that a token passes through
    return Task(ours, peers, len(prompt) * new, size * new, "bytes", note)


def train(case: Case) -> Task:
    """One step on one batch: forward, backward, update, as train.py does it."""
    (model, tokens), machine = make_model(case), Machine(case.options.device, case.dtype)
    targets, fused = tokens.roll(-1, dims=1), machine.device.type in ("cpu", "cuda")
    adamw = SimpleNamespace(optimizer="adamw", weight_decay=0.01, beta1=0.9, beta2=0.95)
    network = torch.compile(model.train()) if case.options.compile else model.train()
    [optimizer] = make_optimizers(model, adamw, machine)

    def update(loss_of: Callable, optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.float32):
        with machine.autocast() if dtype == torch.float32 else contextlib.nullcontext():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def make_step(reference: nn.Module):
        own = torch.optim.AdamW(reference.train().parameters(), lr=0.0, fused=fused)
        return lambda: update(lambda: reference(tokens, labels=tokens, use_cache=False).loss, own, reference.dtype)

    def peers():
        both = {"autocast": "float32", "bfloat16 weights": "bfloat16"}
        return make_peers(case, both if case.dtype == "bfloat16" else {"": "float32"}, make_step)

    flops = model.flops_per_token(case.length) * tokens.numel()
    return Task(lambda: update(lambda: network(tokens, targets)[1], optimizer), peers, tokens.numel(), flops)


def prefill(case: Case) -> Task:
    """A prompt into an empty cache, and the logits after it. (The output matrix is used once, not for every token.)"""
    model, tokens = make_model(case, case.dtype)

    @torch.inference_mode()
    def ours():
        read_prompt(model, tokens, model.new_cache(len(tokens), case.length))

    def make_step(reference: nn.Module):
        return torch.inference_mode()(lambda: reference(tokens, use_cache=True, logits_to_keep=1))

    flops = (model.flops_per_token(case.length) / 3 - 2 * model.output_weight.numel()) * tokens.numel()
    return Task(ours, lambda: make_peers(case, {"": case.dtype}, make_step), tokens.numel(), flops)


def attention(case: Case) -> Task:
    """One layer's attention alone: queries, keys, values and scores in, gradients of all four out."""
    c, B, T = case.config, case.options.batch_size, case.length
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, D).to(**case.place).requires_grad_() for heads in (H, K, K))
    s, gradient = torch.randn(B, K, T).to(q.device).requires_grad_(), torch.ones_like(q)

    def ours():
        dynamic_mask_attention(q, k, v, s, c.keep_window_size)[0].backward(gradient)
        q.grad = k.grad = v.grad = s.grad = None

    def dense():
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).backward(gradient)
        q.grad = k.grad = v.grad = None

    return Task(ours, lambda: {"dense causal": dense}, B * T)


def moe(case: Case) -> Task:
    """One CDMoE layer and its gradients. transformers' router mixes tokens, at the same cost."""
    width = 1 if case.part == "experts" else case.config.intermediate_size  # the MLP is the same for both
    c = dataclasses.replace(case.config, is_moe=True, intermediate_size=width)
    torch.manual_seed(0)
    layer = CDMoE(c).to(**case.place)
    x = torch.randn(case.options.batch_size, case.length, c.hidden_size).to(**case.place).requires_grad_()

    def step(layer: nn.Module):
        layer(x)[0].backward(x.detach())
        layer.zero_grad(set_to_none=True)
        x.grad = None

    def peers():
        theirs = importlib.import_module("transformers.models.doge.modeling_doge").DogeCDMoE(peer_config(c))
        theirs.load_state_dict(layer.state_dict())
        return {"DogeCDMoE": functools.partial(step, theirs.to(x))}

    return Task(functools.partial(step, layer), peers, case.options.batch_size * case.length)


def tokenizer(case: Case) -> Task:
    """The built-in stories cut into tokens, in one thread."""
    texts = [stories.Story(i, "all").text for i in range(3000)]
    own, size = train_bpe(texts, case.options.vocab_size), sum(len(text.encode()) for text in texts)
    tokens = sum(len(own.encode(text)) for text in texts)
    note = f"{size / tokens:.2f} bytes per token, 1 thread"
    return Task(lambda: [own.encode(text) for text in texts], dict, tokens, size, "text", note)


def data(case: Case) -> Task:
    """prepare_data.py on a file of the built-in stories and the sources of Python's library, again and again."""
    folder, size = tempfile.TemporaryDirectory(), case.options.megabytes * 1_000_000
    modules = (text for path in sources.stdlib_parts() for text in sources.read_stdlib(path, 0))
    text = "\n\n".join([*(stories.Story(i, "all").text for i in range(3000)), *modules])
    with open(f"{folder.name}/text.txt", "w", encoding="utf-8") as file:
        for left in range(size, 0, -len(text)):
            file.write(text[:left])

    def ours():
        options = [f"{folder.name}/text.txt"], f"{folder.name}/bins{time.time_ns()}"
        prepare_data.prepare(prepare_data.PrepareOptions(*options, vocab_size=case.options.vocab_size), quiet=True)

    return Task(ours, dict, 0, size, "text")


TASKS = {f.__name__: f for f in (decode, train, prefill, attention, moe, tokenizer, data)}


# ---- The table


def make_cases(options: BenchOptions) -> Iterator[Case]:
    """The rows to measure, in the order they were asked for."""
    parts = {"decode": ["decoder"], "moe": ["layer", "experts"]}
    for what in options.what:
        if what not in LENGTHS:
            yield Case(what, what, options)
            continue
        models = options.model or ["20m_moe" if what == "moe" else "20m"]
        lengths = [int(length) for length in options.length] or LENGTHS[what]
        for model, dtype, part, length in itertools.product(models, options.dtype, parts.get(what, [""]), lengths):
            size = f"{options.batch_size}x{length or f'{PROMPT}+{options.new_tokens}'}"
            how = ["compiled"] * (options.compile and what in ("train", "decode"))
            how += ["drawn"] * (options.temperature > 0 and what == "decode")
            name = " ".join(filter(None, [what, Path(model).stem, dtype, part, *how, size]))
            yield Case(what, name, options, Path(model).stem, config_of(model), dtype, length, part)


def make_step(case: Case, who: str) -> Callable:
    task = TASKS[case.what](case)
    return task.ours if who == "ours" else task.peers()[who]


def measure_case(case: Case) -> dict[str, Any]:
    """The case's row, a dictionary of COLUMNS."""
    o, task, device = case.options, TASKS[case.what](case), case.place["device"]
    fits = case.length <= PEER_LONGEST.get(case.what, case.length)
    peers = task.peers() if o.peer and fits else {}
    seconds = measure.alternate({"ours": task.ours} | peers, o.rounds, device)
    ours, best = seconds.pop("ours"), min(seconds, key=lambda name: median(seconds[name]), default="")
    row = dict(what=case.what, name=case.name, model=case.model, dtype=case.dtype, length=case.length)
    note = task.note if fits or not o.peer else "no peer at this length"
    row |= dict(batch_size=o.batch_size, note=note, rounds=len(ours), tokens=task.tokens, unit=task.unit)
    row |= dict(seconds=median(ours), tokens_per_second=task.tokens / median(ours), reached=task.amount / median(ours))
    if task.amount and task.unit != "text":
        row["limit"] = measure.machine_limit(task.unit, int(task.amount / o.new_tokens), **case.place)
        row["share"] = row["reached"] / row["limit"]
    if best:
        ratios = [b / a for a, b in zip(ours, seconds[best], strict=True)]
        row |= dict(peer=best, speedup=median(ratios), speedup_min=min(ratios), speedup_max=max(ratios))
        row |= dict(peer_seconds=median(seconds[best]), peer_tokens_per_second=task.tokens / median(seconds[best]))
    del task, peers
    for who, column in (("ours", "extra_mb"), (best, "peer_extra_mb")):
        if who and case.what != "tokenizer":
            memory = measure.in_fresh_process(measure.memory_of, functools.partial(make_step, case, who), device)
            row[column] = memory[case.what == "data"] / 1e6
    return row


def show(row: dict[str, Any]) -> None:
    """Prints a row of the table, and a line for its peer."""
    unit, scale = {"FLOP": ("GFLOP/s", 1e9), "bytes": ("GB/s", 1e9), "text": ("MB/s", 1e6)}[row["unit"]]
    more = [f"{row['reached'] / scale:,.1f} {unit}"] if row["reached"] else []
    more += [f"{row['share']:.0%} of the machine's"] if "share" in row else []
    for who, name in (("", row["name"]), ("peer_", f"  {row.get('peer')}")):
        if who + "seconds" in row:
            rate, memory = row[who + "tokens_per_second"], row.get(who + "extra_mb", 0)
            cells = f"{name:<46}{row[who + 'seconds']:>10.4g} s{rate:>12,.0f} tokens/s{memory:>8,.0f} MB"
            print("  ".join([cells, *more, row["note"] * (not who)]).rstrip(), flush=True)
        if "peer" in row:
            more = [f"ours is {row['speedup']:.2f} x as fast [{row['speedup_min']:.2f}, {row['speedup_max']:.2f}]"]


def main(argv: list[str]) -> None:
    options = parse_options(BenchOptions, argv, positional="what")
    cases, columns = list(make_cases(options)), COLUMNS + measure.CONDITIONS
    if options.peer and not importlib.util.find_spec("transformers"):
        raise ValueError("--peer needs transformers, which is not installed here")
    if options.csv:
        measure.append_csv(options.csv, columns)  # a mistake in the name shows now and not after an hour
    print("  ".join(f"{key} {value}" for key, value in measure.conditions().items() if value), flush=True)
    for case in cases:
        row = measure_case(case)
        show(row)
        if options.csv:
            measure.append_csv(options.csv, columns, row | measure.conditions())


if __name__ == "__main__":
    run_command(main)
