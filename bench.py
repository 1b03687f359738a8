"""How fast is it, and how do we know? Every speed and memory number of the README, and how to measure one honestly.

    python bench.py decode --peer                                         tokens a second, beside transformers' Doge
    python bench.py decode --model=20m,320m --dtype=float32,int8 --length=2048,32768      with a long text behind it
    python bench.py train prefill --length=2048,8192 --dtype=bfloat16 --peer --csv=results/bench.csv
    python bench.py data --megabytes=1000                                 a gigabyte of text into tokens

WHAT is one or more of these:

    decode     32 tokens of prompt and 128 new ones; with --length=N, new tokens when N are behind them already
    train      forward, backward and AdamW's update on rows of --length tokens
    prefill    a prompt of --length tokens into the cache, and the logits after it
    attention  one layer of Dynamic Mask Attention, forward and backward; its peer is torch's dense causal attention
    moe        one CDMoE layer, forward and backward (--model=20m_moe,320m_moe): whole, and its experts alone, with an
               MLP of one unit: the MLP, which all tokens share, is half of our work or more, and the same for both
    tokenizer  text to tokens, and the training of a vocabulary; its peer is Hugging Face's tokenizers
    data       prepare_data.py on --megabytes of text, and the memory of the whole process

A time alone says little: the machine may be busy, warm, throttled, or another one than yours. So:

Side by side. What is compared runs in the same process on the same weights, in turns: A B, A B, A B. Whatever slows
the machine for a while slows both. Each turn gives a ratio of its own; we print their median and, in brackets, the
least and the greatest. A wide bracket says: do not believe this one, measure again. Medians, because one turn that the
operating system interrupted would spoil a mean; a first turn that warms up (caches, compilers) is not counted.

The peer at its best. transformers has two ways to attend and, in bfloat16, two ways to train. All are tried, and the
fastest is the one that takes part and is named.

Against the machine. "Twice as fast" may still be slow. Two things bound every computation: how fast bytes come from
memory, and how fast numbers are multiplied. The picture with these two bounds is the roofline (Williams et al. 2009).
To write one token every weight is read once and used for one multiplication, so reading is the bound: bytes of the
weights times tokens a second, beside the bytes a second that a plain pass over as many bytes reaches here. (Over 100 %
means that some stayed in the processor's cache.) Training uses each weight for thousands of tokens, so multiplying is
the bound: the FLOP that the step needs by its formula, beside those of one large matrix product in the same number
format. What is recomputed or copied does not count as work, so this is the share of the machine that was put to use.

Memory in a process of its own. What a system lends a process it takes back late, and "the most this process ever held"
remembers all that ran before. So a fresh process builds the model, forgets its high-water mark, does the thing once,
and tells how far the mark rose: MB is what it takes beside the weights. (On a GPU the allocator keeps that count.)
"""

import contextlib
import csv
import dataclasses
import datetime
import functools
import gc
import importlib
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

import prepare_data
from model import CDMoE, Doge, DogeConfig
from nanodoge import sources, stories
from nanodoge.attention import dynamic_mask_attention
from nanodoge.decode import Decoder
from nanodoge.layouts import hf_name
from nanodoge.machine import Machine
from nanodoge.options import HERE, convert, parse_options, read_config, run_command
from nanodoge.tokenizer import SPECIAL_TOKENS, train_bpe
from train import make_optimizers

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a weight
FORMAT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}  # of what is not a weight
ATTENTION = ["eager", "sdpa"]  # transformers' ways to attend
LENGTHS = {"decode": [0], "train": [2048], "prefill": [2048, 8192], "attention": [2048, 8192], "moe": [2048]}
PEER_LONGEST = {"train": 8192, "prefill": 16384}  # beyond, transformers' T x T masks take minutes and tens of GB
ROUNDS, SLOW = 5, 20.0  # what takes more seconds is measured once if not asked otherwise, and its warm-up is that once


@dataclass
class BenchOptions:
    what: list[str] = field(default_factory=list)  # what to measure, see above
    peer: bool = False  # measure the peer beside ours
    model: list[str] = field(default_factory=list)  # 20m, 320m_moe, ..., or config files; empty: 20m (moe: 20m_moe)
    dtype: list[str] = field(default_factory=lambda: ["float32"])  # float32, bfloat16, and int8 (decode only)
    length: list[str] = field(default_factory=list)  # tokens, see above; empty: what a laptop does in a minute or two
    batch_size: int = 1  # rows at once
    prompt: int = 32  # decode: tokens before the first new one
    new_tokens: int = 128  # decode: tokens to write (64 are enough behind a long text)
    temperature: float = 0.0  # decode: 0 writes the likeliest tokens, above 0 tokens are drawn
    engine: list[str] = field(default_factory=lambda: ["decoder"])  # decode: decoder (decode.py) or model
    compile: bool = False  # torch.compile (train; decode with the decoder)
    rounds: int = 0  # turns; 0: five, and of what takes over 20 seconds one
    attention: list[str] = field(default_factory=lambda: ATTENTION)  # the peer's settings to choose from
    memory: bool = True  # measure the memory too, in a process of its own
    text: str = ""  # tokenizer: a text file; empty: stories and sources of Python's library
    vocab_size: int = 32768  # tokenizer, data: size of the vocabulary
    megabytes: int = 100  # data: how much text
    workers: int = 0  # data: threads; 0: one for each core
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    csv: str = ""  # file to append the rows to, with machine, versions and date

    def __post_init__(self):
        """Raises ValueError for what cannot be measured."""
        for name, valid in (("what", [*TASKS]), ("dtype", [*BYTES]), ("engine", [*ENGINES]), ("attention", ATTENTION)):
            for value in getattr(self, name) or [""]:
                if value not in valid:
                    raise ValueError(f"{name} {value!r}: must be one or more of {', '.join(valid)}")
        if "int8" in self.dtype and (self.what != ["decode"] or "model" in self.engine):
            raise ValueError("--dtype=int8 is for decode with --engine=decoder")
        if self.compile and "decode" in self.what and "model" in self.engine:
            raise ValueError("--compile: decode compiles with --engine=decoder only")
        least = dict(batch_size=1, prompt=1, new_tokens=1, megabytes=1, rounds=0, workers=0, vocab_size=300)
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {value}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature={self.temperature} must be a number from 0 up")
        for length in self.length:
            if convert(length, int, "--length") < 1:
                raise ValueError(f"--length={length} must be at least 1")


@dataclass
class Case:
    """One row of the table, as plain values: it is sent to the process that measures memory."""

    what: str
    name: str  # as printed
    options: BenchOptions
    model: str = ""
    shape: dict = field(default_factory=dict)  # DogeConfig's fields
    dtype: str = ""
    length: int = 0
    variant: str = ""  # decode: the engine; moe: layer or experts; tokenizer: what it does
    text: str = ""  # tokenizer, data: which text

    @property
    def device(self):
        return Machine(self.options.device).device


@dataclass
class Task:
    """A case ready to run: `ours` does it once, and so does each of `peers()`, functions by the name of a setting."""

    ours: Callable
    peers: Callable | None = None  # None: there is nothing to compare with
    tokens: int = 0  # that one call works through
    amount: float = 0.0  # what it must read or compute at the least, in `unit`
    unit: str = "FLOP"  # FLOP, bytes, or text (its bytes, for which no limit is known)
    note: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def timed(step, device):
    """Seconds of one call. A GPU is told what to do and does it later: the time is up when it has done it."""
    wait = getattr(torch, device.type).synchronize
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def alternate(ours, peers, rounds, device):
    """Ours and the fastest of `peers` in turns -> seconds of ours, seconds of the peer (a number a round), its name, ""
    if there is none or it has not enough memory."""
    first, everyone = {}, {"ours": ours} | peers
    for name, step in everyone.items():
        try:
            first[name] = timed(step, device)
        except torch.OutOfMemoryError:
            if name == "ours":
                raise ValueError("out of memory: lower --batch_size or --length") from None
    if first["ours"] > SLOW and not rounds:  # that may have been the compiler
        first["ours"] = timed(ours, device)
    slow = {name for name, seconds in first.items() if seconds > SLOW and not rounds}
    trial = {name: first[name] if name in slow else timed(everyone[name], device) for name in first if name != "ours"}
    best = min(trial, key=trial.get, default="")
    turns = ["ours", best] if best else ["ours"]
    seconds = {name: [] for name in turns}
    for _ in range(1 if slow.intersection(turns) else rounds or ROUNDS):
        for name in turns:
            seconds[name].append(first[name] if name in slow else timed(everyone[name], device))
    return seconds["ours"], seconds.get(best, []), best


def resident(key):
    """Bytes this process holds ("VmRSS") or has held at the most ("VmHWM"). What getrusage reports begins, on Linux,
    with the most of the process that started this one, so it serves only where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return Machine("cpu").peak_memory()


def alone(case, who):
    """What the fresh process does -> seconds, bytes held beside what was there before, bytes in all, result."""
    task, device = TASKS[case.what](case), case.device
    step = task.ours if who == "ours" else task.peers()[who]
    torch.ones(512, 512, device=device) @ torch.ones(512, 512, device=device)  # the libraries' own buffers
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now: man 5 proc
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident("VmRSS")
    result = []
    seconds = timed(lambda: result.append(step()), device)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    return seconds, peak - before, peak, result[0]


def in_fresh_process(case, who):
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(alone, case, who).result()
    except BrokenProcessPool:
        raise ValueError(f"{case.name}, {who}: its process was killed, for want of memory?") from None


def rate(step, device, amount):
    """amount a second: the median of nine calls after one."""
    timed(step, device)
    return amount / statistics.median(timed(step, device) for _ in range(9))


def read_limit(device, size):
    """Bytes a second that come from memory when `size` bytes are read over and over, by a sum or by a matrix-vector
    product, whichever is faster here. (A processor reads what fits its cache several times faster: the size counts.)"""
    matrix = torch.ones(4096, max(1, size // (4 * 4096)), device=device)
    vector = torch.ones(matrix.shape[1], device=device)
    return max(rate(step, device, matrix.nbytes) for step in (matrix.sum, lambda: matrix.mv(vector)))


def product_limit(device, dtype):
    """FLOP a second of a large square matrix product: two for each of its n^3 multiplications with an addition."""
    n = 8192 if device.type == "cuda" else 2048
    matrix = torch.full((n, n), 1 / n, device=device, dtype=FORMAT[dtype])
    return rate(lambda: matrix @ matrix, device, 2 * n**3)


# ---------------------------------------------------------------------------------------------------------------------
# Models and their peers


def read_shape(name):
    """A model of the family by its name (20m, 320m_moe), or a config file -> the DogeConfig fields it sets."""
    folder = HERE / "config"
    known = sorted(path.stem.removeprefix("doge") for path in folder.glob("doge*.py"))
    if name in known:  # an MoE twin's file sets the experts alone: the rest is in the dense model's
        paths = [folder / f"doge{name.removesuffix('_moe')}.py", folder / f"doge{name}.py"]
    elif Path(name).is_file():
        paths = [Path(name)]
    else:
        raise ValueError(f"--model={name}: neither a config file nor one of {', '.join(known)}")
    fields = {f.name for f in dataclasses.fields(DogeConfig)}
    return {key: value for path in paths for key, (value, _) in read_config(path).items() if key in fields}


def make_model(case, dtype="float32"):
    """A model of this shape with random weights, its scores too, so that a window keeps some keys and drops others."""
    torch.manual_seed(0)
    model = Doge(DogeConfig(**case.shape))
    for block in model.layers:
        block.self_attn.A.data.normal_()
    return model.to(case.device, FORMAT[dtype]).eval()


def random_tokens(case, length):
    return torch.randint(case.shape.get("vocab_size", DogeConfig.vocab_size), (case.options.batch_size, length),
                         generator=torch.Generator().manual_seed(1)).to(case.device)  # fmt: skip


def work(model, length):
    """-> the weights that a token passes through, and the FLOP of its attention, forward and backward, in a row of
    `length`: the two terms of Doge.flops_per_token."""
    config = model.config
    weights = (model.flops_per_token(1) - 12 * config.hidden_size * config.num_hidden_layers) / 6
    return weights, model.flops_per_token(length) - 6 * weights


def need(module):
    """The peer's library. It is no part of what nanoDoge needs, so it may be absent."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"--peer needs {module.partition('.')[0]}, which is not installed here") from None


def peer_of(model):
    """transformers' Doge with the weights of ours, in the same number format."""
    transformers = need("transformers")
    transformers.logging.set_verbosity_error()
    with torch.device(model.output_weight.device):
        reference = transformers.DogeForCausalLM(peer_config(model.config)).to(model.output_weight.dtype)
    weights = {hf_name(key): w for key, w in model.state_dict().items()}
    reference.load_state_dict(weights | {"lm_head.weight": model.output_weight})
    reference.tie_weights()
    return reference.eval()


def peer_config(config):
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key != "qk_norm"}
    return need("transformers").DogeConfig(**fields)


def with_settings(reference, settings, step, suffix=""):
    """{setting: step with this attention}, of one model: its attention can be changed between calls."""

    def run(setting):
        reference.set_attn_implementation(setting)
        return step(reference)

    return {setting + suffix: functools.partial(run, setting) for setting in settings}


# ---------------------------------------------------------------------------------------------------------------------
# What is measured: a function each, Case -> Task


def model_engine(model, dtype, compile):
    return model.to(getattr(torch, dtype)).stream


def decoder_engine(model, dtype, compile):
    decoder = Decoder(model, getattr(torch, dtype), compile)
    return functools.partial(model.stream, decoder=decoder)


ENGINES = {"model": model_engine, "decoder": decoder_engine}  # model, dtype, compile -> a function like Doge.stream


def nbytes(x):
    """Of a tensor, or of all in nested lists and tuples."""
    return sum(map(nbytes, x)) if isinstance(x, (list, tuple)) else getattr(x, "nbytes", 0)


def decode(case):
    """The prompt and the new tokens, or behind a text of case.length the new ones alone."""
    options, B, new = case.options, case.options.batch_size, case.options.new_tokens
    model, prompt = make_model(case), random_tokens(case, case.length or options.prompt)
    size, note = work(model, 1)[0] * BYTES[case.dtype], ""  # bytes of weights that a step reads
    engine = ENGINES[case.variant](model, case.dtype, options.compile)
    stream = functools.partial(engine, temperature=options.temperature)
    if case.length:
        total = new * ((options.rounds or ROUNDS) + 1) + 1  # a turn more, to warm up
        text = stream(prompt, total)
        next(text)  # the prompt goes through the model here, and does not count
        cache = model.new_cache(B, case.length + total)
        note = f"cache {sum(map(nbytes, vars(cache).values())) / 1e6:.1f} MB"

    def ours():
        return sum(1 for _ in (itertools.islice(text, new) if case.length else stream(prompt, new)))

    return Task(ours, lambda: decode_peers(case, prompt), B * new, size * new, "bytes", note)


def decode_peers(case, prompt):
    """transformers' generate; behind a long text, whose prefill takes it minutes, its step with a cache of random
    numbers of that length. It has no int8 on a processor: beside ours it may choose between its other formats."""
    options, new, peers = case.options, case.options.new_tokens, {}
    drawn = dict(do_sample=True, temperature=options.temperature, top_k=0, top_p=1.0) if options.temperature else {}

    def generate(reference):
        reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
                           eos_token_id=None, pad_token_id=0, **dict(do_sample=False) | drawn)  # fmt: skip

    @torch.inference_mode()
    def go_on(reference, cache):
        token = prompt[:, -1:]
        for _ in range(new):
            logits = reference(token, past_key_values=cache, use_cache=True).logits[:, -1]
            p = (logits / options.temperature).softmax(-1) if drawn else None
            token = torch.multinomial(p, num_samples=1) if drawn else logits.argmax(-1, keepdim=True)
        cache.crop(-new)

    for dtype in ["float32", "bfloat16"] if case.dtype == "int8" else [case.dtype]:
        reference, step = peer_of(make_model(case, dtype)), generate
        if case.length:
            c, cache = reference.config, need("transformers").DynamicCache(config=reference.config)
            size = options.batch_size, c.num_key_value_heads, case.length, c.hidden_size // c.num_attention_heads
            for layer in range(c.num_hidden_layers):
                keys, values = torch.randn(2, *size, device=case.device, dtype=FORMAT[dtype])
                cache.update(keys, values, layer)
            step = functools.partial(go_on, cache=cache)
        peers |= with_settings(reference, options.attention, step, f" {dtype}" * (case.dtype == "int8"))
    return peers


def train(case):
    """One step on one batch: forward, backward, update, as train.py does it."""
    model, tokens = make_model(case).train(), random_tokens(case, case.length)
    machine = Machine(case.options.device, case.dtype)
    adamw = SimpleNamespace(optimizer="adamw", weight_decay=0.01, beta1=0.9, beta2=0.95)
    [optimizer] = make_optimizers(model, adamw, fused=machine.device.type in ("cpu", "cuda"))
    network, targets = torch.compile(model) if case.options.compile else model, tokens.roll(-1, dims=1)

    def update(loss, optimizer):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def ours():
        with machine.autocast():
            loss = network(tokens, targets)[1]
        update(loss, optimizer)

    def peers():
        def step(reference, optimizer, autocast):
            with autocast:
                loss = reference(tokens, labels=tokens, use_cache=False).loss  # it shifts the labels itself
            update(loss, optimizer)

        steps, settings = {}, case.options.attention
        for dtype in dict.fromkeys(("float32", case.dtype)):  # bfloat16: over float32 weights, and of bfloat16 weights
            reference = peer_of(make_model(case, dtype)).train()
            own = torch.optim.AdamW(reference.parameters(), lr=0.0, fused=machine.device.type in ("cpu", "cuda"))
            mixed = machine.autocast() if dtype == "float32" else contextlib.nullcontext()
            suffix = "" if case.dtype == "float32" else " autocast" if dtype == "float32" else " bfloat16 weights"
            steps |= with_settings(reference, settings, functools.partial(step, optimizer=own, autocast=mixed), suffix)
        return steps

    return Task(ours, peers, tokens.numel(), model.flops_per_token(case.length) * tokens.numel())


def prefill(case):
    """A prompt into an empty cache, and the logits behind it. (The output matrix is used once, not for every token.)"""
    model, tokens = make_model(case, case.dtype), random_tokens(case, case.length)
    weights, attention = work(model, case.length)

    @torch.inference_mode()
    def ours():
        cache = model.new_cache(len(tokens), case.length)
        model.read(tokens, torch.full((len(tokens),), case.length, device=case.device), cache)

    @torch.inference_mode()
    def step(reference):
        reference(tokens, use_cache=True, logits_to_keep=1)

    flops = (2 * (weights - model.output_weight.numel()) + attention / 3) * tokens.numel()
    return Task(ours, lambda: with_settings(peer_of(model), case.options.attention, step), tokens.numel(), flops)


def attention(case):
    """One layer's attention alone: queries, keys, values and scores in, gradients of all four out."""
    config, generator = DogeConfig(**case.shape | {"num_hidden_layers": 1}), torch.Generator().manual_seed(0)

    def random(*shape, dtype=FORMAT[case.dtype]):
        return torch.randn(shape, generator=generator).to(case.device, dtype).requires_grad_()

    B, T = case.options.batch_size, case.length
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = random(B, H, T, D), random(B, K, T, D), random(B, K, T, D)
    s, gradient = random(B, K, T, dtype=torch.float32), random(B, H, T, D).detach()

    def ours():
        dynamic_mask_attention(q, k, v, s, config.keep_window_size)[0].backward(gradient)
        q.grad = k.grad = v.grad = s.grad = None

    def dense():
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).backward(gradient)
        q.grad = k.grad = v.grad = None

    with torch.device("meta"):
        flops = work(Doge(config), T)[1] * B * T
    return Task(ours, lambda: {"dense causal": dense}, B * T, flops)


def moe(case):
    """One CDMoE layer and its gradients. transformers' mixes up whose router logits are whose, at the same cost."""
    alone = {"intermediate_size": 1} if case.variant == "experts" else {}
    config = DogeConfig(**case.shape | {"is_moe": True} | alone)
    torch.manual_seed(0)
    layer = CDMoE(config).to(case.device, FORMAT[case.dtype])
    shape = case.options.batch_size, case.length, config.hidden_size
    x = torch.randn(shape, device=case.device, dtype=FORMAT[case.dtype], requires_grad=True)

    def step(layer):
        out, _ = layer(x)
        out.backward(x.detach())
        layer.zero_grad(set_to_none=True)
        x.grad = None

    def peers():
        need("transformers")
        theirs = importlib.import_module("transformers.models.doge.modeling_doge").DogeCDMoE(peer_config(config))
        theirs.load_state_dict(layer.state_dict())
        return {"DogeCDMoE": functools.partial(step, theirs.to(x))}

    weights = sum(p.numel() for p in layer.parameters())
    weights -= 2 * (config.num_experts - config.num_experts_per_tok) * config.hidden_size
    return Task(functools.partial(step, layer), peers, shape[0] * shape[1], 6 * weights * shape[0] * shape[1])


def read_texts(case):
    """The documents to cut into tokens: about 2.5 million characters, or the file of --text."""
    if case.options.text:
        return list(sources.split_pieces(sources.read_text(case.options.text), 4096))
    if case.text == "stories":
        return [stories.Story(i, "all").text for i in range(3000)]
    return [text for path in sources.stdlib_parts()[:100] for text in sources.read_stdlib(path, 0)]


def tokenizer(case):
    """A vocabulary learned from the text, and the text cut by it: in one thread, or in one for each core."""
    texts, vocab_size = read_texts(case), case.options.vocab_size
    size = sum(len(text.encode()) for text in texts)
    tokenizers = need("tokenizers") if case.options.peer else None
    name = f"tokenizers {tokenizers.__version__}" if tokenizers else ""

    def hugging_face(own):
        with tempfile.TemporaryDirectory() as folder:
            own.save(folder)
            return tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")

    def learn():
        letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS,
                                                 initial_alphabet=letters, show_progress=False)  # fmt: skip
        hugging_face(train_bpe(["a"], 300)).train_from_iterator(texts, trainer)  # of a tokenizer that cuts words alike

    if case.variant == "learn":
        return Task(lambda: train_bpe(texts, vocab_size), lambda: {name: learn}, 0, size, "text",
                    f"{vocab_size} tokens; ours in one thread, the peer in all")  # fmt: skip
    own = train_bpe(texts, vocab_size)
    tokens, batch = sum(len(ids) for ids in own.encode_batch(texts)), case.variant == "batch"

    def ours():
        own.encode_batch(texts) if batch else [own.encode(text) for text in texts]

    def peers():
        fast = functools.partial(hugging_face(own).encode_batch_fast, add_special_tokens=False)
        return {name: lambda: fast(texts) if batch else [fast([text]) for text in texts]}  # one: in one thread

    note = f"{size / tokens:.2f} bytes a token, " + (f"{os.cpu_count()} threads" if batch else "1 thread")
    return Task(ours, peers, tokens, size, "text", note)


def data(case):
    """prepare_data.py on a text file; measured in a process of its own, with everything that process holds."""

    def ours():
        out = Path(case.text).parent / f"bins{time.time_ns()}"
        prepare_data.prepare(prepare_data.PrepareOptions([case.text], str(out), vocab_size=case.options.vocab_size,
                                                         workers=case.options.workers), quiet=True)  # fmt: skip
        meta = prepare_data.read_meta(out)
        return meta["train"]["tokens"] + meta["val"]["tokens"]

    return Task(ours, amount=os.path.getsize(case.text), unit="text")


def write_text(folder, megabytes):
    """A file of so many megabytes: the built-in stories and sources, in turns and again and again."""
    modules = (text for path in sources.stdlib_parts() for text in sources.read_stdlib(path, 0))
    tales = (stories.Story(i, "all").text for i in range(3000))
    text, path = "\n\n".join([*tales, *modules]), Path(folder) / "text.txt"
    with open(path, "w", encoding="utf-8") as file:
        for left in range(megabytes * 1_000_000, 0, -len(text)):
            file.write(text[:left])
    return str(path)


TASKS = {f.__name__: f for f in (decode, train, prefill, attention, moe, tokenizer, data)}


# ---------------------------------------------------------------------------------------------------------------------
# The table

COLUMNS = """what name model dtype batch_size length tokens seconds tokens_per_second extra_mb reached unit limit share
    peer peer_seconds peer_tokens_per_second peer_extra_mb speedup speedup_min speedup_max rounds note
    date cpu cores threads gpu python torch transformers""".split()
HEADER = f"{'':<40}{'seconds':>9}{'tokens/s':>12}{'MB':>8}{'reached':>17}{'of limit':>9}"
PEER_HEADER = f"  {'peer':<24}{'seconds':>9}{'tokens/s':>12}{'MB':>8}{'ours is':>9}"


def make_cases(options, folder):
    """The rows to measure, in the order they were asked for."""
    for what in options.what:
        if what == "data":
            yield Case(what, f"data {options.megabytes} MB", options, text=write_text(folder, options.megabytes))
        elif what == "tokenizer":
            for text in [Path(options.text).name] if options.text else ["stories", "stdlib"]:
                for job in ("learn", "encode", "batch"):
                    yield Case(what, f"tokenizer {job} {text}", options, variant=job, text=text)
        else:
            models = options.model or ["20m_moe" if what == "moe" else "20m"]
            engines = {"decode": options.engine, "moe": ["layer", "experts"]}.get(what, [""])
            lengths = [int(length) for length in options.length] or LENGTHS[what]
            for model, dtype, engine, length in itertools.product(models, options.dtype, engines, lengths):
                size = length or f"{options.prompt}+{options.new_tokens}"
                how = [engine, "compiled" if options.compile and what in ("decode", "train") else ""]
                how += ["drawn"] * bool(options.temperature and what == "decode")
                words = [what, Path(model).stem, dtype, *filter(None, how), f"{options.batch_size}x{size}"]
                name = " ".join(words)
                yield Case(what, name, options, Path(model).stem, read_shape(model), dtype, length, engine)


def measure(case):
    """Case -> its row, a dictionary of COLUMNS."""
    options, task, device = case.options, TASKS[case.what](case), case.device
    row = {name: getattr(case, name) for name in ("what", "name", "model", "dtype", "length")}
    row |= dict(batch_size=options.batch_size, note=task.note)
    if case.what == "data":
        seconds, _, peak, task.tokens = in_fresh_process(case, "ours")
        ours, theirs, best, peers = [seconds], [], "", None
        row |= dict(extra_mb=peak / 1e6, note="MB is the whole process")
    else:
        fits = case.length <= PEER_LONGEST.get(case.what, case.length)
        peers = task.peers() if options.peer and fits else {}
        ours, theirs, best = alternate(task.ours, peers, options.rounds, device)
        if options.peer and not best:
            row["note"] = "the peer is out of memory" if fits else "no peer: minutes, and tens of GB"
    row |= dict(rounds=len(ours), tokens=task.tokens, seconds=statistics.median(ours), unit=task.unit)
    row |= dict(tokens_per_second=task.tokens / row["seconds"], reached=task.amount / row["seconds"])
    if task.unit != "text":
        once = int(task.amount / options.new_tokens)  # bytes of weights
        row["limit"] = read_limit(device, once) if task.unit == "bytes" else product_limit(device, case.dtype)
        row["share"] = row["reached"] / row["limit"]
    if best:
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        row |= dict(peer=best, peer_seconds=statistics.median(theirs), speedup=statistics.median(ratios),
                    speedup_min=min(ratios), speedup_max=max(ratios))  # fmt: skip
        row["peer_tokens_per_second"] = task.tokens / row["peer_seconds"]
    del task, peers
    gc.collect()
    if options.memory and case.what not in ("tokenizer", "data"):
        row["extra_mb"] = in_fresh_process(case, "ours")[1] / 1e6
        if best:
            row["peer_extra_mb"] = in_fresh_process(case, best)[1] / 1e6
    return row


def line(row):
    """A row of the table as text."""

    def cells(prefix=""):
        seconds, rate, memory = (row.get(prefix + name) for name in ("seconds", "tokens_per_second", "extra_mb"))
        memory = "" if memory is None else f"{memory:,.0f}"
        return f"{seconds:>9.4g}{f'{rate:,.0f}' if rate else '':>12}{memory:>8}"

    unit, scale = {"FLOP": ("GFLOP/s", 1e9), "bytes": ("GB/s", 1e9), "text": ("MB/s", 1e6)}[row["unit"]]
    text = f"{row['name']:<40}{cells()}{row['reached'] / scale:>9,.1f} {unit:<7}"
    text += f"{row['share']:>9.0%}" if "share" in row else " " * 9
    if row.get("peer"):
        text += f"  {row['peer']:<24}{cells('peer_')}{row['speedup']:>7.2f} x"
        text += f" [{row['speedup_min']:.2f}, {row['speedup_max']:.2f}]"
    return f"{text}  {row['note']}".rstrip()


def facts():
    """What a figure is worth nothing without."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peer = getattr(sys.modules.get("transformers"), "__version__", "")
    return dict(date=datetime.date.today().isoformat(), cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(),
                gpu=gpu, python=platform.python_version(), torch=torch.__version__, transformers=peer)  # fmt: skip


def write_csv(path, row):
    """Appends a row to the file, so that a run that is stopped loses none. A file of other columns is refused."""
    fresh = not Path(path).exists()
    if not fresh and Path(path).read_text(encoding="utf-8").partition("\n")[0] != ",".join(COLUMNS):
        raise ValueError(f"--csv={path}: this file has other columns; name a new one")
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        if row:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def main(argv):
    options = parse_options(BenchOptions, argv, positional="what")
    if options.peer:
        need("tokenizers" if options.what == ["tokenizer"] else "transformers")
    if options.csv:
        write_csv(options.csv, {})  # a mistake in the name shows now and not after an hour
    with tempfile.TemporaryDirectory() as folder:
        cases = list(make_cases(options, folder))
        known = facts()
        print("  ".join(f"{key} {value}" for key, value in known.items() if value))
        print(HEADER + PEER_HEADER * options.peer)
        for case in cases:
            row = measure(case)
            print(line(row), flush=True)
            if options.csv:
                write_csv(options.csv, row | known)


if __name__ == "__main__":
    run_command(main)
