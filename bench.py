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
    gpu        all that matters on one GPU, in --minutes of them: the experiments of bench_gpu.py

MB is what a step takes beside the weights; of `data`, the memory of the whole process.

The peer is measured at its best: with each of transformers' two ways to attend (above 4,096 tokens only sdpa: eager
takes minutes), and beside int8 in float32 and in bfloat16. The fastest counts and is named. With `decode
--peer=llama.cpp` it is a Llama of the same shape, beside int8 in Q8_0 and in BF16 (pip install llama-cpp-python gguf).
It chooses every token, as ours does; the row's note has our speed-up over its logits alone.
"""

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
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prepare_data
from model import CDMoE, Doge, DogeConfig
from nanodoge import measure, sources, stories
from nanodoge.attention import dynamic_mask_attention
from nanodoge.decode import make_decoder
from nanodoge.engine import Engine, Request
from nanodoge.llama import llama_writer
from nanodoge.machine import Machine
from nanodoge.options import HERE, Count, NonNegative, Whole, check_ranges, parse_options, read_config, run_command
from nanodoge.tokenizer import train_bpe

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # per weight
LLAMA_KINDS = {"float32": ["F32"], "bfloat16": ["BF16"], "int8": ["Q8_0", "BF16"]}  # llama.cpp's formats beside ours
LOGITS = ", logits alone"  # ends the name of a peer that chooses no tokens, against which no speed-up is reported
LENGTHS = {"decode": [0], "train": [2048], "prefill": [2048, 8192], "attention": [2048, 8192], "moe": [2048]}
PEER_LONGEST = {"decode": 0, "train": 8192, "prefill": 16384}  # beyond, its T x T masks take minutes and tens of GB
PROMPT, PIECE = 32, 4096  # tokens of decode's prompt; tokens of a prompt that are read together
COLUMNS = """what name model dtype batch_size length tokens seconds tokens_per_second extra_mb reached unit limit share
    peer peer_seconds peer_tokens_per_second peer_extra_mb speedup speedup_min speedup_max rounds note""".split()


@dataclass
class BenchOptions:
    """Options"""

    what: list[str] = field(default_factory=list)  # what to measure, see below
    peer: Literal["", "transformers", "llama.cpp"] = ""  # measure it beside ours; --peer alone: transformers
    model: list[str] = field(default_factory=list)  # 20m, 320m_moe, ..., or config files; empty: 20m (moe: 20m_moe)
    dtype: list[str] = field(default_factory=lambda: ["float32"])  # float32, bfloat16, and int8 (decode only)
    length: list[str] = field(default_factory=list)  # tokens; empty: what a laptop does in a minute or two
    batch_size: Count = 1  # sequences at once
    new_tokens: Count = 128  # decode: tokens to write
    temperature: NonNegative = 0.0  # decode: 0 takes the likeliest tokens, above 0 tokens are drawn
    compile: bool = False  # torch.compile (train; on a GPU decode)
    backend: Literal["torch", "cpp", "onnx"] = "torch"  # decode: what computes a step, as in sample.py
    rounds: Whole = 0  # turns; 0: five, and one of what takes over 20 seconds
    vocab_size: Count = 32768  # tokenizer and data: the vocabulary
    megabytes: Count = 100  # data: how much text
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    csv: str = ""  # file to append the rows to, with machine, versions and date
    minutes: Count = 9  # gpu: how long it may take
    out: str = "out/gpu"  # gpu: folder for its rows

    def __post_init__(self):
        check_ranges(self)
        if "gpu" in self.what and len(self.what) > 1:
            raise ValueError(f"what {' '.join(self.what)}: gpu is measured alone")
        for name, valid in (("what", [*TASKS, "gpu"]), ("dtype", BYTES)):
            if wrong := [value for value in getattr(self, name) or [""] if value not in valid]:
                raise ValueError(f"{name} {wrong[0]!r}: must be one or more of {', '.join(valid)}")
        for option, values in dict(dtype=self.dtype, peer=[self.peer], backend=[self.backend]).items():
            if self.what != ["decode"] and (special := {"int8", "llama.cpp", "cpp", "onnx"}.intersection(values)):
                raise ValueError(f"--{option}={special.pop()} is for decode")
        if wrong := [length for length in self.length if not length.isdecimal() or int(length) < 1]:
            raise ValueError(f"--length={wrong[0]} must be a whole number from 1 up")


class Case(NamedTuple):
    """A row of the table before it is measured. Plain values: it is sent to the process that measures memory."""

    what: str
    name: str  # as printed
    options: BenchOptions
    model: str = ""
    config: DogeConfig | None = None
    dtype: str = ""
    length: int = 0
    part: str = ""  # moe: layer or experts
    peer: bool = False  # whether to make the peer's steps, too

    @property
    def device(self) -> torch.device:
        return Machine(self.options.device).device


class Task(NamedTuple):
    """A case ready to run."""

    steps: dict[str, Callable]  # "ours", then the peer's by the name of a setting; a call does the work once
    tokens: int = 0  # that one call works through
    amount: float = 0  # what it must read or compute at the least, in `unit`; 0: unknown
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
        for weight in (block.self_attn.A, block.self_attn.dt_proj.weight):
            weight.data.normal_()
    tokens = torch.randint(case.config.vocab_size, (case.options.batch_size, case.length or PROMPT))
    return model.to(case.device, getattr(torch, dtype)).eval(), tokens.to(case.device)


def peer_config(config: DogeConfig) -> Any:
    """The same shape for transformers."""
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key != "qk_norm"}
    return importlib.import_module("transformers").DogeConfig(**fields)


def peer_model(case: Case, dtype: str) -> nn.Module:
    """transformers' Doge with the weights of ours."""
    model, _ = make_model(case, dtype)
    reference = importlib.import_module("transformers").DogeForCausalLM(peer_config(case.config))
    reference.to(model.embed_tokens.weight).model.load_state_dict(model.state_dict())
    return reference.eval()


def peer_steps(case: Case, make_step: Callable[[nn.Module], Callable]) -> dict[str, Callable]:
    """{"sdpa float32": a step of transformers' Doge with the weights of ours, ...}, or {} if the case has no peer."""
    if not case.peer or case.options.peer == "llama.cpp":
        return {}
    importlib.import_module("transformers").logging.set_verbosity_error()
    steps = {}

    def run(reference: nn.Module, attention: str, step: Callable):
        reference.set_attn_implementation(attention)  # can be changed between calls
        step()

    for dtype in ["float32", "bfloat16"] if case.dtype == "int8" else [case.dtype]:
        reference = peer_model(case, dtype)
        step = make_step(reference)
        for attention in ["eager", "sdpa"] if case.length <= 4096 else ["sdpa"]:
            steps[f"{attention} {dtype}"] = functools.partial(run, reference, attention, step)
    return steps


# ---- What is measured: a function each, Case -> Task


def decode(case: Case) -> Task:
    """The prompt and the new tokens, as sample.py writes them; behind a text of case.length the new ones alone."""
    o, (model, prompt) = case.options, make_model(case, "bfloat16" if case.dtype == "bfloat16" else "float32")
    engine = Engine(model, make_decoder(model, case.dtype, o.backend, o.compile), slots=o.batch_size)
    sampling = dict(do_sample=True, temperature=o.temperature, top_k=0) if o.temperature else dict(do_sample=False)
    sampling |= dict(max_new_tokens=o.new_tokens, pad_token_id=0, eos_token_id=None)

    def requests(count: int) -> list[Request]:
        return [Request(ids, count, o.temperature, seed=i) for i, ids in enumerate(prompt.tolist())]

    def ours():
        if not case.length:
            return engine.generate(requests(o.new_tokens))
        for _ in range(o.new_tokens):  # each turn continues where the last one stopped
            engine.step()

    note = ""
    if case.length:
        for request in requests(o.new_tokens * (o.rounds + measure.ROUNDS + 1) + case.length):  # more than are needed
            engine.add(request)
        while len(engine.live) < o.batch_size:
            engine.step()
        note = f"cache {sum(x.nbytes for slots in engine.cache.layers for x in slots) / 1e6:.1f} MB"
    mask, shape = torch.ones_like(prompt), (o.batch_size, PROMPT, o.new_tokens, torch.get_num_threads())
    peers = peer_steps(case, lambda peer: lambda: peer.generate(prompt, attention_mask=mask, **sampling))
    if case.peer and o.peer == "llama.cpp":
        peers = {kind: llama_writer(case.config, kind, *shape) for kind in LLAMA_KINDS[case.dtype]}
        peers |= {kind + LOGITS: functools.partial(step, draws=False) for kind, step in peers.items()}
    size = model.flops_per_token(1) / 6 * BYTES[case.dtype]  # bytes of the weights that a token passes through
    return Task({"ours": ours} | peers, o.batch_size * o.new_tokens, size * o.new_tokens, "bytes", note)


def train(case: Case) -> Task:
    """Forward, backward and update on one batch. In bfloat16 our weights stay float32, as in train.py, and the peer's
    are bfloat16, its fastest way."""
    (model, tokens), machine = make_model(case), Machine(case.options.device, case.dtype)
    network = torch.compile(model) if case.options.compile else model

    def make_step(network: nn.Module, loss_of: Callable[[], Tensor]) -> Callable:
        fused = machine.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(network.train().parameters(), lr=0.0, fused=fused)

        def step():
            loss_of().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def loss():
        with machine.autocast():
            return network(tokens, tokens.roll(-1, dims=1))[1]

    peers = peer_steps(case, lambda p: make_step(p, lambda: p(tokens, labels=tokens, use_cache=False).loss))
    flops = model.flops_per_token(case.length) * tokens.numel()
    return Task({"ours": make_step(network, loss)} | peers, tokens.numel(), flops)


def prefill(case: Case) -> Task:
    """A prompt into an empty cache, and the logits after it. (The output matrix is used once, not for every token.)"""
    model, tokens = make_model(case, case.dtype)

    @torch.inference_mode()
    def ours():
        cache = model.new_cache(len(tokens), case.length)
        for piece in tokens.split(PIECE, dim=1):  # so that memory does not grow with the prompt
            ends = torch.full((len(piece),), piece.shape[1], device=piece.device)
            x, _ = model.hidden(piece, ends, cache, ends - 1)
        F.linear(x[:, -1], model.output_weight)

    def make_step(peer: nn.Module):
        return torch.inference_mode()(lambda: peer(tokens, use_cache=True, logits_to_keep=1))

    flops = (model.flops_per_token(case.length) / 3 - 2 * model.output_weight.numel()) * tokens.numel()
    return Task({"ours": ours} | peer_steps(case, make_step), tokens.numel(), flops)


def gradients(output: Tensor, *inputs: Tensor) -> None:
    """Computes the gradient of every input. (That of the output may be anything: it is the output itself.)"""
    torch.autograd.grad(output, inputs, output.detach())


def attention(case: Case) -> Task:
    """One layer's attention alone: queries, keys, values and scores in, gradients of all four out."""
    c, B, T = case.config, case.options.batch_size, case.length
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    torch.manual_seed(0)
    place = dict(device=case.device, dtype=getattr(torch, case.dtype))
    q, k, v = (torch.randn(B, heads, T, D).to(**place).requires_grad_() for heads in (H, K, K))
    s = torch.randn(B, K, T).to(case.device).requires_grad_()
    dense = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    steps = {"ours": lambda: gradients(dynamic_mask_attention(q, k, v, s, c.keep_window_size)[0], q, k, v, s)}
    peers = {"dense causal": lambda: gradients(dense(q, k, v), q, k, v)} if case.peer else {}
    return Task(steps | peers, B * T)


def moe(case: Case) -> Task:
    """One CDMoE layer and its gradients. transformers' router mixes tokens, at the same cost."""
    width = 1 if case.part == "experts" else case.config.intermediate_size  # the MLP is the same for both
    c = dataclasses.replace(case.config, is_moe=True, intermediate_size=width)
    torch.manual_seed(0)
    x = torch.randn(case.options.batch_size, case.length, c.hidden_size)
    x = x.to(case.device, getattr(torch, case.dtype)).requires_grad_()
    layers = {"ours": CDMoE(c).to(x)}
    if case.peer:
        doge = importlib.import_module("transformers.models.doge.modeling_doge")
        layers["DogeCDMoE"] = doge.DogeCDMoE(peer_config(c)).to(x)
        layers["DogeCDMoE"].load_state_dict(layers["ours"].state_dict())

    def step(layer: nn.Module):
        gradients(layer(x)[0], x, *layer.parameters())

    steps = {name: functools.partial(step, layer) for name, layer in layers.items()}
    return Task(steps, case.options.batch_size * case.length)


def tokenizer(case: Case) -> Task:
    """The built-in stories cut into tokens, in one thread."""
    texts = [stories.Story(i, "all").text for i in range(3000)]
    own, size = train_bpe(texts, case.options.vocab_size), sum(len(text.encode()) for text in texts)
    tokens = sum(len(own.encode(text)) for text in texts)
    steps = {"ours": lambda: [own.encode(text) for text in texts]}
    return Task(steps, tokens, size, "text", f"{size / tokens:.2f} bytes per token, 1 thread")


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

    return Task({"ours": ours}, 0, size, "text")


TASKS = {f.__name__: f for f in (decode, train, prefill, attention, moe, tokenizer, data)}


# ---- The table


def make_cases(options: BenchOptions) -> Iterator[Case]:
    """The rows to measure, in the order they were asked for."""
    parts = {"decode": ["decoder"], "moe": ["layer", "experts"]}
    for what in options.what:
        if what not in LENGTHS:
            yield Case(what, what, options, peer=bool(options.peer))
            continue
        models = options.model or ["20m_moe" if what == "moe" else "20m"]
        lengths = [int(length) for length in options.length] or LENGTHS[what]
        for model, dtype, part, length in itertools.product(models, options.dtype, parts.get(what, [""]), lengths):
            size = f"{options.batch_size}x{length or f'{PROMPT}+{options.new_tokens}'}"
            how = ["compiled"] * (options.compile and what in ("train", "decode"))
            how += [options.backend] * (options.backend != "torch")
            how += ["drawn"] * (options.temperature > 0 and what == "decode")
            name = " ".join(filter(None, [what, Path(model).stem, dtype, part, *how, size]))
            peer = bool(options.peer) and length <= PEER_LONGEST.get(what, length)
            yield Case(what, name, options, Path(model).stem, config_of(model), dtype, length, part, peer)


def make_step(case: Case, who: str) -> Callable:
    return TASKS[case.what](case._replace(peer=who != "ours")).steps[who]


def measure_case(case: Case) -> dict[str, Any]:
    """The case's row, a dictionary of COLUMNS."""
    task, device = TASKS[case.what](case), case.device
    seconds = measure.alternate(task.steps, case.options.rounds, device)
    row = {name: getattr(case, name) for name in ("what", "name", "model", "dtype", "length")}
    row |= dict(batch_size=case.options.batch_size, rounds=len(seconds["ours"]), tokens=task.tokens, unit=task.unit)
    row["note"] = task.note if case.peer or not case.options.peer else "no peer at this length"
    row["reached"] = task.amount / median(seconds["ours"])
    if task.amount and task.unit != "text":
        size = int(task.amount / case.options.new_tokens)  # of the weights, if the unit is bytes
        row["limit"] = measure.machine_limit(task.unit, size, device, getattr(torch, case.dtype))
        row["share"] = row["reached"] / row["limit"]

    def ratios(who: str) -> list[float]:
        return [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[who], strict=True)]

    if peers := [name for name in seconds if name != "ours" and not name.endswith(LOGITS)]:
        row["peer"] = best = min(peers, key=lambda name: median(seconds[name]))
        row |= dict(speedup=median(ratios(best)), speedup_min=min(ratios(best)), speedup_max=max(ratios(best)))
        if best + LOGITS in seconds:
            row["note"] = f"{median(ratios(best + LOGITS)):.2f} x its logits alone"
    steps = task.steps if device.type == "cuda" else {}  # whose allocator counts; elsewhere it takes a fresh process
    del task  # its weights: the next process makes its own
    for prefix, who in [("", "ours"), ("peer_", row.get("peer"))][: 1 + bool(peers)]:
        row[prefix + "seconds"] = median(seconds[who])
        row[prefix + "tokens_per_second"] = row["tokens"] / median(seconds[who])
        if case.what == "tokenizer":
            continue
        if steps:
            held = measure.memory_of(lambda who=who: steps[who], device)
        else:
            held = measure.in_fresh_process(measure.memory_of, functools.partial(make_step, case, who), device)
        row[prefix + "extra_mb"] = held[case.what == "data"] / 1e6
    return row


def show(row: dict[str, Any]) -> None:
    """Prints a row of the table, and a line for its peer."""
    unit, scale = {"FLOP": ("GFLOP/s", 1e9), "bytes": ("GB/s", 1e9), "text": ("MB/s", 1e6)}[row["unit"]]
    more = [f"{row['reached'] / scale:,.1f} {unit}"] if row["reached"] else []
    more += [f"{row['share']:.0%} of the machine's"] if "share" in row else []
    lines = {"": (row["name"], [*more, row["note"]])}
    if "peer" in row:
        ratio = f"ours is {row['speedup']:.2f} x as fast [{row['speedup_min']:.2f}, {row['speedup_max']:.2f}]"
        lines["peer_"] = f"  {row['peer']}", [ratio]
    for prefix, (name, more) in lines.items():
        rate, memory = row[prefix + "tokens_per_second"], row.get(prefix + "extra_mb", 0)
        cells = f"{name:<46}{row[prefix + 'seconds']:>10.4g} s{rate:>12,.0f} tokens/s{memory:>8,.0f} MB"
        print("  ".join([cells, *more]).rstrip(), flush=True)


def read_options(argv: list[str]) -> BenchOptions:
    """The options of a command line, in which --peer alone is transformers."""
    argv = ["--peer=transformers" if word == "--peer" else word for word in argv]
    return parse_options(BenchOptions, argv, positional="what")


def main(argv: list[str]) -> None:
    options = read_options(argv)
    if options.what == ["gpu"]:
        import bench_gpu

        return bench_gpu.run(options.device, options.minutes, options.out)
    if options.peer == "transformers" and not importlib.util.find_spec("transformers"):
        raise ValueError("--peer needs transformers, which is not installed here")
    cases, machine = list(make_cases(options)), measure.conditions()
    if options.csv:
        measure.append_csv(options.csv, [*COLUMNS, *machine])  # a mistake in the name shows now and not after an hour
    print("  ".join(f"{key} {value}" for key, value in machine.items() if value), flush=True)
    for case in cases:
        row = measure_case(case)
        show(row)
        if options.csv:
            measure.append_csv(options.csv, [*COLUMNS, *machine], row | measure.conditions())


if __name__ == "__main__":
    run_command(main)
