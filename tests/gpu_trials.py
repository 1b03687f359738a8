"""The trials of `python bench.py gpu` (bench_gpu.py has their order): functions of device, tiny, ... to a dictionary.

First whether a GPU is right: every check compares with something slower, a definition in float64 or float32,
transformers, the CPU, an uninterrupted run. Then how fast it is, beside candidates that are not part of nanoDoge until
a GPU says that they are faster: FlexAttention, CUDA graphs, other constants. tiny: small shapes, for a CPU.
"""

import contextlib
import functools
import io
import os
import signal
import subprocess
import tempfile
import threading
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import bench
import train
from model import attention_by_definition
from nanodoge import measure
from nanodoge.attention import dynamic_mask_attention, eviction_steps, rank_by_score
from nanodoge.checkpoint import load_model
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request
from nanodoge.machine import Machine
from nanodoge.options import HERE
from nanodoge.run import read_log
from prepare_data import PrepareOptions, prepare

RIGHT = {"float32": 1e-3, "bfloat16": 5e-2}  # the largest relative error that counts as right
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
SMALL = TINY | dict(vocab_size=512, keep_window_size=32, num_experts=64, num_experts_per_tok=4)
SHRINK = 64  # tiny: lengths are divided by it
TOKENS = 32768  # of one attention: a micro-batch of the 20M recipe
COMPILE = torch.compile
NO_BACKWARD = "no backward on this device"  # of FlexAttention on a CPU


def off(x, expected):
    """The relative error of x: the norm of the difference by that of what is expected."""
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def result(error, dtype, **more):
    return dict(error=error, right=error < RIGHT[dtype], dtype=dtype, **more)


def attention(device, tiny, attend, dtype, window):
    """Output and gradients of one layer's attention, attend(q, k, v, s, window), against its definition in float64."""
    shapes = [(2, heads, 768, 16 if tiny else 128) for heads in (2, 1, 1)]
    inputs = [torch.randn(shape, device=device).to(getattr(torch, dtype)) for shape in shapes]
    inputs.append(torch.randn(2, 1, 768, device=device))
    exact = [x.double().requires_grad_() for x in inputs]
    expected, found = [attention_by_definition(*exact, window)], [attend(*inputs, window)]
    try:
        inputs = [x.requires_grad_() for x in inputs]
        out = attend(*inputs, window)
        found += torch.autograd.grad(out, inputs, out.detach())
        expected += torch.autograd.grad(expected[0], exact, out.detach().double())
        note = ""
    except NotImplementedError:
        note = NO_BACKWARD
    error = max(off(x, y) for x, y in zip(found, expected, strict=False))
    return result(error, dtype, window=window, length=768, note=note)


def case_and_reference(device, tiny, name, length, how, **changes):
    """A case of bench.py in float32, and its model by definition or (how) that of transformers."""
    config = replace(bench.config_of(name), **changes)
    config = replace(config, **TINY, num_experts=64, num_experts_per_tok=4) if tiny else config
    case = bench.Case("decode", "", bench.BenchOptions(["decode"], device=device), name, config, "float32", length)
    if how != "transformers":
        return case, bench.make_model(case._replace(config=replace(config, attention="definition")))[0]
    peer = bench.peer_model(case, "float32")
    peer.set_attn_implementation("eager")
    return case, peer


def model(device, tiny, name, dtype, window, how=""):
    """Loss and gradient of two layers, against the same weights by definition, in the same dtype, or (how) by
    transformers in float32. With experts bfloat16 is not judged: a last bit changes which are chosen (NOTES.md)."""
    changes = dict(num_hidden_layers=2, keep_window_size=window, vocab_size=1024)
    case, other = case_and_reference(device, tiny, name, 768, how, **changes)
    ours, _ = bench.make_model(case)
    # No token twice: equal tokens have equal scores in the first layer, and transformers breaks ties anyhow.
    tokens = torch.randperm(1024, device=device)[None, :768]
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    whole = window >= tokens.shape[1]  # within the window a break of the graph is an error
    network = torch.compile(ours, fullgraph=whole) if how == "compiled" else ours
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
        loss = network(tokens, targets)[1]
        if how == "transformers":
            expected = other(tokens, labels=tokens, use_cache=False).loss
        else:
            expected = other(tokens, targets)[1]
    gradients = []
    for loss_of, network in ((loss, ours), (expected, other)):
        weights = [p for _, p in sorted(network.named_parameters())]
        gradients.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss_of, weights)]))
    row = result(max(off(loss, expected), off(*gradients)), dtype, window=window, length=768)
    return row | dict(right="", note="not judged") if case.config.is_moe and dtype == "bfloat16" else row


def text(device, tiny, name, dtype, how=""):
    """How many of 32 greedy tokens after 300, by engine and Decoder, are those of the definition, or of transformers
    within the window, in float32. Rounded weights may choose others."""
    case, other = case_and_reference(device, tiny, name, 300, how, keep_window_size=1024 if how else 256)
    ours, prompt = bench.make_model(case)
    if how == "transformers":
        settings = dict(attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = other.generate(prompt, max_new_tokens=32, **settings)[:, 300:]
    else:
        expected = other.generate(prompt, 32, temperature=0)
    engine = Engine(ours, Decoder(ours, getattr(torch, dtype)), slots=1)
    [found] = engine.generate([Request(prompt[0].tolist(), 32, temperature=0)])
    pairs = enumerate(zip(found, expected[0].tolist(), strict=True))
    same = next((i for i, (x, y) in pairs if x != y), 32)
    return dict(tokens=same, right=same == 32 or dtype != "float32", dtype=dtype, length=300)


def run_recipe(device, tiny, folder, name, *options):
    """Trains by config/doge20m.py on built-in stories in `folder`; returns the rows of log.csv."""
    if not os.path.exists(f"{folder}/data"):
        prepare(PrepareOptions(["stories"], f"{folder}/data", stories=100 if tiny else 4000), quiet=True)
    argv = [f"{HERE}/config/doge20m.py", f"--data={folder}/data", f"--out_dir={folder}/{name}", f"--device={device}"]
    argv += ["--copy_steps=0", "--warmup_steps=2", "--decay_steps=0", "--sample_tokens=0", "--eval_tokens=100000"]
    if tiny:
        argv += "--max_position_embeddings=32 --batch_tokens=64 --micro_batch_size=2 --vocab_size=4096".split()
        argv += ["--eval_tokens=100", *(f"--{name}={value}" for name, value in TINY.items())]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*argv, *options])
    return read_log(f"{folder}/{name}/log.csv")


def resume(device, tiny, deterministic):
    """The weights after 8 steps against those after 4, a stop and 4 more. error 0: equal bit for bit."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when the first product is computed
    torch.use_deterministic_algorithms(deterministic)
    options = ["--compile=off", *([] if tiny else ["--batch_tokens=65536"])]
    with tempfile.TemporaryDirectory() as folder:
        for words in ("whole --max_steps=8", "parts --max_steps=4", "parts --max_steps=8 --resume"):
            run_recipe(device, tiny, folder, *words.split(), *options)
        models = [load_model(f"{folder}/{run}")[0] for run in ("parts", "whole")]
        parts, whole = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    torch.use_deterministic_algorithms(False)
    same = torch.equal(parts, whole)
    return dict(error=off(parts, whole), right=same or not deterministic)


def first_losses(device, tiny):
    """The losses of five training steps against the CPU's in float32."""
    options = ["--max_steps=5", "--log_every=1", "--compile=off", "--eval_tokens=2000"]
    options += [] if tiny else ["--max_position_embeddings=256", "--batch_tokens=1024", "--micro_batch_size=4"]
    with tempfile.TemporaryDirectory() as folder:
        logs = [run_recipe(where, tiny, folder, f"on_{where}{i}", *options) for i, where in enumerate(("cpu", device))]
    losses = [[float(row["loss"]) for row in log] for log in logs]
    error = max(abs(here / cpu - 1) for cpu, here in zip(*losses, strict=True))
    return dict(error=error, right=error < 0.02, note=f"losses {losses[1]}")


# ---- Measuring


def make_case(tiny, what, model="20m", length=0, batch=1, **options):
    """A case of bench.py in bfloat16, unless options has a dtype."""
    dtype, config = options.pop("dtype", "bfloat16"), bench.config_of(model)
    if tiny:
        config, length, batch = replace(config, **SMALL), length // SHRINK, min(batch, 2)
        options |= dict(new_tokens=4)
    options = bench.BenchOptions([what], dtype=[dtype], batch_size=batch, **options)
    return bench.Case(what, what, options, model, config, dtype, length, peer=options.peer)


def measured(device, tiny, *shape, part="", **options):
    """A case of bench.py: its row; mfu is the share of the datasheet's peak; breaks in the graph of torch.compile."""
    import torch._dynamo.utils

    case = make_case(tiny, *shape, device=device, **options)._replace(part=part)
    row, peak = bench.measure_case(case), Machine(device, case.dtype).peak_flops()
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return row | dict(mfu=row["reached"] / peak if peak and row["unit"] == "FLOP" else "", graph_breaks=breaks)


def run_once(device, tiny, function, *inputs, **options):
    function(device, tiny, *inputs, **options)
    return {}


def longest_kernels(step, device):
    """Seconds of a step, its ten longest kernels, and the share of its time in which the GPU waits for Python."""
    seconds = median(measure.alternate({"": step}, 0, torch.device(device))[""])
    kind, name = ("CUDA", "self_device_time_total") if device == "cuda" else ("CPU", "self_cpu_time_total")
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profiler:
        measure.timed(step, torch.device(device))
    events = [event for event in profiler.key_averages() if getattr(event, name) > 0]
    events.sort(key=lambda event: -getattr(event, name))
    waits = max(0.0, 1 - sum(getattr(event, name) for event in events) / 1e6 / seconds)
    top = [f"{getattr(event, name) / 1e3:.3f} ms {event.count}x {event.key[:80]}" for event in events[:10]]
    return dict(seconds=seconds, waits=waits, launches=sum(event.count for event in events), kernels="; ".join(top))


def limits(device, tiny):
    """The card and what it reaches: clocks, one large product, reading, copying."""
    note = "a rehearsal"
    if not tiny:
        asked = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        note = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        note += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    size, place = 2**24 if tiny else 2**31, torch.device(device)
    source, target = torch.empty(2, size, dtype=torch.uint8, device=device)
    seconds = median(measure.alternate({"": lambda: target.copy_(source)}, 0, place)[""])
    product, read = (measure.machine_limit(unit, size, place, torch.bfloat16) for unit in ("FLOP", "bytes"))
    return dict(tflops=product / 1e12, read_gb=read / 1e9, copy_gb=2 * size / seconds / 1e9, note=note)


# ---- Ways to attend: from q (B, H, T, D), k, v (B, K, T, D), s (B, K, T) and a window to (B, H, T, D)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, s, window):
    """Dynamic Mask Attention by FlexAttention: score_mod adds s to the logits, so heads stay D wide.

    A query sees a key from its position on until it is dropped. Where keys stand by position, those that are alive are
    scattered over all blocks, and no block can be left out. So keys are sorted by the power of two that their lifetime
    reaches, then by position: the lifetimes of a block overlap, and most queries skip most blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (B, H, T, _), K = q.shape, k.shape[1]
    G, size = H // K, min(128, T)  # 128: FlexAttention's own blocks, of which T is a multiple
    born = torch.arange(T, device=q.device).expand(B, K, T)
    dies = eviction_steps(rank_by_score(s.detach()).flatten(0, 1), window).view(B, K, T)
    if window < T:
        order = ((dies - born).clamp(min=1).log2().ceil().long() * T + born).argsort(-1)
        born, dies, s = (x.gather(-1, order) for x in (born, dies, s))
        k, v = (x.gather(2, order[..., None].expand_as(x)) for x in (k, v))
    start = torch.arange(0, T, size, device=q.device)[:, None, None]  # (query blocks, 1, 1), to (key blocks, size):
    births, deaths = (x.view(B, K, 1, -1, size) for x in (born, dies))
    some = ((births < start + size) & (deaths > start)).any(-1)  # (B, K, query blocks, key blocks): a pair is visible
    full = ((births <= start) & (deaths >= start + size)).all(-1)  # all are
    blocks = []
    for chosen in (x.repeat_interleave(G, 1) for x in (some & ~full, full)):
        blocks += chosen.sum(-1).int(), chosen.byte().argsort(dim=-1, descending=True, stable=True).int()

    def visible(b, h, i, j):
        return (born[b, h // G, j] <= i) & (i < dies[b, h // G, j])

    def add_score(logit, b, h, i, j):
        return logit + s[b, h // G, j]

    mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=size, mask_mod=visible)
    return compiled_flex()(q, k, v, score_mod=add_score, block_mask=mask, enable_gqa=True)


def chunks(*inputs):
    return dynamic_mask_attention(*inputs)[0]  # within the window folded, beyond it in chunks


def dense(q, k, v, s, window):
    """Causal attention without scores: what nothing of ours can beat within the window."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attention_speed(device, tiny, attend, length, window):
    """Forward alone, and with backward. FLOP: of visible keys, the backward pass being 2.5 forward ones."""
    B, T, W, D = TOKENS // length, length, window, 128
    B, T, W, D = (1, T // SHRINK, W // SHRINK, 32) if tiny else (B, T, W, D)
    q, k, v = (torch.randn(B, n, T, D, device=device).bfloat16().requires_grad_() for n in (2, 1, 1))
    s = torch.randn(B, 1, T, device=device, requires_grad=True)
    flop = 4 * q.numel() * sum(min(i + 1, W) for i in range(T)) / T
    constant = [x.detach() for x in (q, k, v, s)]
    row = longest_kernels(lambda: attend(*constant, W), device)
    row |= dict(length=T, batch=B, window=W, forward_seconds=row["seconds"])
    row["forward_tflops"] = flop / row["seconds"] / 1e12
    inputs = [q, k, v] if attend is dense else [q, k, v, s]
    try:
        steps = {"": lambda: bench.gradients(attend(q, k, v, s, W), *inputs)}
        row["seconds"] = median(measure.alternate(steps, 0, torch.device(device))[""])
    except NotImplementedError:
        return row | dict(note=NO_BACKWARD)
    extra, _ = measure.memory_of(lambda: steps[""], torch.device(device))
    return row | dict(tflops=3.5 * flop / row["seconds"] / 1e12, extra_mb=extra / 1e6)


def train_kernels(device, tiny):
    """Of a compiled training step of the 20M model."""
    case = make_case(tiny, "train", "20m", 2048, 16, compile=True, device=device)
    return longest_kernels(bench.train(case).steps["ours"], device)


# ---- Other candidates


def compile_blocks(model):
    """A block compiled once instead of every layer: starts sooner, for deep models."""
    for block in model.layers:
        block.forward = COMPILE(block.forward)
    return model


def decode_by_graph(device, tiny, model, batch):
    """128 likeliest tokens a row by a Decoder whose step is one CUDA graph: no time for Python between kernels."""
    case = make_case(tiny, "decode", model, 0, batch, device=device)
    network, prompt = bench.make_model(case)
    decoder, cache, token = Decoder(network, torch.bfloat16), network.new_cache(len(prompt), 160), prompt[:, 0].clone()

    @torch.inference_mode()
    def step():
        token.copy_(decoder(token, cache).argmax(-1))

    step()  # allocates what libraries keep, which must not happen within the graph
    if device != "cuda":
        return dict(model=model, batch=len(prompt), note="no CUDA graph on this device")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    steps = {"": lambda: [cache.length.zero_(), *(graph.replay() for _ in range(128))]}
    seconds = median(measure.alternate(steps, 0, torch.device(device))[""])
    read = 128 * network.flops_per_token(1) / 6 * 2  # bytes, as bench.decode counts them
    rates = dict(tokens_per_second=128 * batch / seconds, reached=read / seconds)
    return dict(model=model, batch=batch, seconds=seconds, **rates)


def recipe(device, tiny, steps=100, seconds=100):
    """The first steps of the 20M recipe by train.py, as many as fit: rates, losses, and where the host waits."""
    stop = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))  # then train.py saves and exits
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        stop.start()
        with contextlib.suppress(SystemExit):
            run_recipe(device, tiny, folder, "run", f"--max_steps={20 if tiny else steps}", "--eval_every=100")
        stop.cancel()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        log = read_log(f"{folder}/run/log.csv")
    waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
    rates = [float(row["tokens_per_second"]) for row in log]
    note = f"{len(log)} logged steps, the slowest at {min(rates):,.0f} tokens/s; the host waited at {dict(waits)}"
    last = {key: log[-1][key] for key in ("step", "loss", "mfu")}
    return last | dict(tokens_per_second=median(rates), note=note)


# What stands for what else in a trial, by the name of the change: {what is called so: other object}.
LOGIT_ROWS, CHUNKS = (2048, 8192, 32768), (512, 1024, 2048)
CHANGES = {
    "": {},
    "by block": {"torch.compile": compile_blocks},
    "CUDA graphs": {"torch.compile": lambda model: COMPILE(model, mode="reduce-overhead")},
}
CHANGES |= {f"{n} rows of logits": {"nanodoge.losses.rows_at_once": lambda x, weight, n=n: n} for n in LOGIT_ROWS}
CHANGES |= {f"chunks of {n}": {"nanodoge.attention.GPU_CHUNK": n} for n in CHUNKS}


def trace(function, original=torch.compile, fullgraph=False, **options):
    """torch.compile without its compiler: finds what cannot be traced, in a rehearsal."""
    return original(function, backend="aot_eager", fullgraph=fullgraph)
