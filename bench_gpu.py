"""The trials of `python bench.py gpu`: what one GPU does with Doge, in ten minutes.

`plan` lists them, the most valuable first. They run in another process. A trial that fails, hangs or runs out of memory
costs one row, which says why, and the next one has a new process. Trials whose times do not count, and the compiler for
the others, run side by side. Without a GPU all of it is rehearsed with tiny shapes, whose numbers say nothing.
"""

import contextlib
import datetime
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from nanodoge import measure
from nanodoge.machine import Machine
from nanodoge.options import HERE, one_line, read_config

sys.path.append(str(HERE / "tests"))
import gpu_trials as gpu

Row = dict[str, Any]
START = 120  # seconds for a new process to import torch and find the GPU
BESIDE = max(1, (os.cpu_count() or 2) // 2)  # trials at once where times do not count: most wait for a compiler
SHOWN = """failed right error seconds tokens_per_second forward_tflops tflops reached share mfu extra_mb peer speedup
    waits graph_breaks took note""".split()  # columns that are printed
REHEARSAL = {  # takes too long where the numbers say nothing
    "torch.compile": gpu.trace,
    "gpu_trials.COMPILE": gpu.trace,
    "nanodoge.measure.machine_limit": lambda *_: 1e9,
    "nanodoge.measure.in_fresh_process": lambda function, *inputs: function(*inputs),
}


class Trial(NamedTuple):
    """A row: function(device, tiny, *inputs, **options), with the objects of gpu_trials.CHANGES[change] in place."""

    name: str
    function: Callable[..., Row]
    inputs: tuple = ()
    options: dict[str, Any] = {}
    change: str = ""
    seconds: float = 60  # beyond them it counts as hanging
    timed: bool = True  # nothing may run beside it


# ---- The plan


def checks() -> list[Trial]:
    """Whether the GPU is right, for windows above and below the 768 tokens of the texts."""
    right, windows = [], (1024, 256)
    for way, dtype, W in product((gpu.chunks, gpu.flex), gpu.RIGHT, windows):
        right.append(Trial(f"right: {way.__name__} {dtype} window {W}", gpu.attention, (way, dtype, W)))
    # Not with experts: bfloat16 compiled (it is not judged), and transformers, whose router mixes tokens.
    cases = [*product(("20m", "20m_moe"), gpu.RIGHT, [""]), ("20m", "float32", "transformers")]
    for name, dtype, how in cases:
        right.append(Trial(f"right: text {name} {dtype} {how}", gpu.text, (name, dtype, how)))
    cases += [("20m", "bfloat16", "compiled"), ("20m_moe", "float32", "compiled")]
    for (name, dtype, how), W in product(cases, windows):
        right.append(Trial(f"right: {name} {dtype} window {W} {how}", gpu.model, (name, dtype, W, how), seconds=90))
    return right


def step(model: str, batch: int, how: str, change: str = "") -> Trial:
    """A training step. how: eager or compiled, and whether beside its peer."""
    options = dict(compile="compiled" in how, peer="transformers" * ("peer" in how))
    name = f"train {model} {batch} x 2048 {how} {change}".strip()
    return Trial(name, gpu.measured, ("train", model, 2048, batch), options, change, seconds=120)


def plan() -> list[Trial]:
    """All trials, the most valuable first, but those that need a compiler after the others."""
    quick, peer = [Trial("limits", gpu.limits), step("20m", 16, "eager, peer")], dict(peer="transformers")
    for T, W in ((2048, 2048), (32768, 2048), (8192, 2048), (8192, 8192), (32768, 32768)):
        for way in (gpu.chunks, gpu.flex, *[gpu.dense] * (T == W)):
            quick.append(Trial(f"attention {way.__name__} {T} window {W}", gpu.attention_speed, (way, T, W)))
    for batch, model in product((1, 64, 256), ("20m", "320m")):
        options = peer if (batch, model) == (1, "20m") else {}
        quick.append(Trial(f"decode {model} x {batch}", gpu.measured, ("decode", model, 0, batch), options))
    quick += [Trial(f"decode 20m x {n}, CUDA graph", gpu.decode_by_graph, ("20m", n)) for n in (1, 64)]
    for T in (2048, 8192, 65536):
        options = peer if T == 2048 else {}
        quick.append(Trial(f"prefill 20m {T}", gpu.measured, ("prefill", "20m", T), options))
    for model in ("20m_moe", "320m_moe"):
        quick.append(Trial(f"experts {model}", gpu.measured, ("moe", model, 8192), dict(part="experts")))
    quick += [step("20m", 16, "eager", f"{n} rows of logits") for n in gpu.LOGIT_ROWS]
    for n in gpu.CHUNKS:
        quick.append(Trial(f"chunks of {n}", gpu.attention_speed, (gpu.chunks, 16384, 2048), change=f"chunks of {n}"))

    slow = [step("20m", 16, "compiled"), Trial("kernels", gpu.train_kernels)]
    slow += [step(model, 16, "compiled", "by block") for model in ("20m", "160m", "320m", "60m")]
    slow += [step("20m", 64, "compiled"), step("20m_moe", 16, "compiled"), Trial("recipe", gpu.recipe, seconds=150)]
    slow += [step("20m", 16, "compiled", "CUDA graphs")]

    beside = [compile_ahead(trial) for trial in (*quick, *slow) if "flex" in trial.name or "compiled" in trial.name]
    beside = [trial._replace(timed=False) for trial in (*beside, *checks())]
    eager, compiled = ([trial for trial in beside if ("compiled" in trial.name) == how] for how in (False, True))
    for sure in (True, False):
        compiled.append(Trial(f"right: resume, deterministic={sure}", gpu.resume, (sure,), timed=False))
    compiled.append(Trial("right: first losses", gpu.first_losses, seconds=180, timed=False))
    return [*eager, *quick, *compiled, *slow]


def compile_ahead(trial: Trial) -> Trial:
    """A trial that leaves its compiled code in torch's cache on disk, and no times."""
    return trial._replace(name=f"compile {trial.name}", function=gpu.run_once, inputs=(trial.function, *trial.inputs))


# ---- Running it


def work(pipe: Connection, device: str, tiny: bool) -> None:
    """The body of a process: receives trials and sends their rows."""
    while trial := pipe.recv():
        start = time.monotonic()
        try:
            with contextlib.ExitStack() as stack:
                for name, value in ((REHEARSAL if tiny else {}) | gpu.CHANGES[trial.change]).items():
                    stack.enter_context(patch(name, value))
                row = trial.function(device, tiny, *trial.inputs, **trial.options)
            row["took"] = round(time.monotonic() - start, 1)
        except Exception as error:
            row = dict(failed=f"{type(error).__name__}: {one_line(error)[:300]}")
        pipe.send(row)
        gc.collect()


def run_trials(
    trials: Iterable[Trial], device: str, tiny: bool, left: Callable[[], float]
) -> Iterator[tuple[Trial, Row]]:
    """The rows of the trials. After one that fails a new process begins: what it has left behind is not known.
    left(): seconds until all must have ended."""
    context, process = multiprocessing.get_context("spawn"), None
    try:
        for trial in trials:
            if left() <= 0:
                yield trial, dict(failed="not started: --minutes were over")
                continue
            seconds = trial.seconds
            if process is None:
                seconds += START
                pipe, its_end = context.Pipe()
                process = context.Process(target=work, args=(its_end, device, tiny))
                process.start()
                its_end.close()
            seconds = max(0.0, min(seconds, left()))
            try:
                pipe.send(trial)
                row = pipe.recv() if pipe.poll(seconds) else dict(failed=f"no result after {seconds:.0f} s")
            except (EOFError, OSError):
                process.join()
                row = dict(failed=f"its process ended with status {process.exitcode}")
            if "failed" in row:
                process.kill()
                process = None
            yield trial, row
    finally:
        if process:
            pipe.send(None)
            process.join(5)
            process.kill()


def run(device: str, minutes: int, out: str, plan: Callable[[], list[Trial]] = plan) -> None:
    """Prints the rows, and writes them to a new file in the folder `out`: .jsonl as they come, .csv in the end."""
    tiny, end = Machine(device).device.type != "cuda", time.monotonic() + 60 * minutes
    path = Path(out) / f"gpu_{datetime.datetime.now():%Y-%m-%d_%H%M%S}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    conditions, rows = measure.conditions(), []
    print("  ".join(f"{key} {value}" for key, value in conditions.items() if value), flush=True)
    if tiny:
        print("No GPU: a rehearsal with tiny shapes on the CPU. Its numbers say nothing about speed.", flush=True)

    def work_through(trials: Iterable[Trial]) -> None:
        for trial, row in run_trials(trials, "cpu" if tiny else "cuda", tiny, lambda: end - time.monotonic()):
            row = dict(trial=trial.name) | {key: value for key, value in row.items() if value not in ("", None)}
            rows.append(row)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row | conditions, default=str) + "\n")
            shown = {key: row[key] for key in SHOWN if key in row}
            cells = (f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in shown.items())
            print(f"{trial.name:<48} {'  '.join(cells)}", flush=True)

    for timed, group in groupby(plan(), lambda trial: trial.timed):
        at_once, trials = 1 if timed else BESIDE, iter(list(group))  # each thread takes the next one
        with ThreadPoolExecutor(at_once) as pool:
            try:
                list(pool.map(work_through, [trials] * at_once))
            except KeyboardInterrupt:
                end = 0
                raise
    columns = list(dict.fromkeys(key for row in rows for key in row))
    measure.append_csv(str(path.with_suffix(".csv")), [*columns, *conditions], *(row | conditions for row in rows))
    print_forecast([] if tiny else rows)
    print(f"The rows are in {path} and {path.with_suffix('.csv').name}.")


def print_forecast(rows: list[Row]) -> None:
    """How long each recipe takes by the best rate that was measured."""
    best = {}
    for row in rows:
        if row.get("what") == "train":
            best[row["model"]] = max(row["tokens_per_second"], best.get(row["model"], 0))
    for model, rate in best.items():
        recipe = read_config(f"{HERE}/config/doge{model.removesuffix('_moe')}.py")  # an MoE twin follows its dense one
        hours = recipe["max_steps"][0] * recipe["batch_tokens"][0] / rate / 3600
        print(f"config/doge{model}.py, an estimate: {hours:.2f} h; {hours / 8:.2f} h on eight cards that lose nothing")
