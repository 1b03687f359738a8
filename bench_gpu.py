"""The experiments of `python bench.py gpu`: what one GPU does with Doge, in ten minutes.

`plan` lists them, the most valuable first. Each has a process of its own. A trial that fails, hangs or runs out of
memory costs one row, which says why, and the next trial starts in a new process. Trials whose times do not count, and
the compiler for the others, run side by side. Without a GPU all of it is rehearsed with tiny shapes, whose numbers say
nothing.
"""

import contextlib
import datetime
import gc
import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


# ---- The plan


class Trial(NamedTuple):
    """A row: function(device, tiny, *inputs, **options), in which the names in `changes` stand for other objects."""

    name: str
    function: Callable[..., Row]
    inputs: tuple = ()
    options: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    seconds: float = 60  # beyond them it counts as hanging
    timed: bool = True  # nothing may run beside it


def checks() -> list[Trial]:
    """Whether the GPU is right."""
    right = [Trial("limits", gpu.limits)]
    windows = (1024, 256)  # of texts of 768 tokens: above and below their length
    for way, dtype, W in itertools.product((gpu.chunks, gpu.flex), gpu.RIGHT, windows):
        right.append(Trial(f"right: {way.__name__} {dtype} window {W}", gpu.attention, (way, dtype, W)))
    for how, model, W in itertools.product(("", "transformers", "compiled"), ("20m", "20m_moe"), windows):
        compiled = "float32" if "moe" in model else "bfloat16"  # bfloat16 is not judged with experts
        for dtype in dict(transformers=["float32"], compiled=[compiled]).get(how, gpu.RIGHT):
            if (how, model) != ("transformers", "20m_moe"):  # whose router mixes tokens
                inputs = model, dtype, W, how
                right.append(Trial(f"right: {model} {dtype} window {W} {how}", gpu.model, inputs, seconds=90))
    texts = [("20m", "float32", "transformers"), *itertools.product(("20m", "20m_moe"), gpu.RIGHT, [""])]
    for model, dtype, how in texts:
        right.append(Trial(f"right: text {model} {dtype} {how}", gpu.text, (model, dtype, how)))
    return sorted(right, key=lambda trial: "flex" in trial.name)  # the slow ones last


def plan() -> list[tuple[float, list[Trial]]]:
    """(share of the minutes, trials) of every experiment."""
    attend, steps, constants, writing = [], [], [], []
    resumed = [Trial(f"right: resume, deterministic={sure}", gpu.resume, (sure,)) for sure in (True, False)]
    resumed.append(Trial("right: first losses", gpu.first_losses, seconds=90))

    for T, W in ((2048, 2048), (32768, 2048), (8192, 2048), (8192, 8192), (32768, 32768)):
        for way in (gpu.chunks, gpu.flex, *[gpu.dense] * (T == W)):
            attend.append(Trial(f"attention {way.__name__} {T} window {W}", gpu.attention_speed, (way, T, W)))

    def step(model: str, batch: int, how: str, changes: dict[str, Any] = {}) -> Trial:  # noqa: B006
        options = dict(compile="compiled" in how, peer="transformers" * ("peer" in how))
        inputs = "train", model, 2048, batch
        return Trial(f"train {model} {batch} x 2048 {how}", gpu.measured, inputs, options, changes, seconds=120)

    steps += [step("20m", 16, "compiled"), step("20m", 16, "compiled by block", gpu.BY_BLOCK)]
    steps += [step("20m", 16, "eager, peer"), Trial("kernels", gpu.train_kernels)]
    steps += [step(model, 16, "compiled by block", gpu.BY_BLOCK) for model in ("160m", "320m", "60m")]
    more = ("20m", 64), ("20m_moe", 16), ("20m", 32)
    steps += [step(model, batch, "compiled") for model, batch in more]
    steps += [step("20m", 16, f"compiled, {name}", changes) for name, changes in gpu.VARIANTS.items()]
    start = [Trial("recipe", gpu.recipe, seconds=150)]

    for rows in (2048, 8192, 32768):
        changes = {"nanodoge.losses.rows_at_once": lambda x, weight, rows=rows: rows}
        constants.append(step("20m", 16, f"eager, {rows} rows of logits", changes))
    for chunk in (512, 1024, 2048):
        changes = {"nanodoge.attention.GPU_CHUNK": chunk}
        constants.append(Trial(f"chunks of {chunk}", gpu.attention_speed, (gpu.chunks, 16384, 2048), changes=changes))
    for model, dtype in itertools.product(("20m_moe", "320m_moe"), gpu.RIGHT):
        options = dict(part="experts", dtype=dtype)
        for name, changes in ("bags", {}), ("dense products", gpu.DENSE_EXPERTS):
            trial = Trial(f"experts {model} {dtype} by {name}", gpu.measured, ("moe", model, 8192), options, changes)
            constants.append(trial)
    constants += [step("160m", 8, f"eager, {name}", changes) for name, changes in gpu.OPTIMIZERS.items()]

    for batch, dtype, model in itertools.product((1, 64, 256), ("bfloat16", "int8"), ("20m", "320m")):
        options = dict(dtype=dtype, peer="transformers" * ((batch, dtype, model) == (1, "bfloat16", "20m")))
        writing.append(Trial(f"decode {model} {dtype} x {batch}", gpu.measured, ("decode", model, 0, batch), options))
        if dtype == "bfloat16":
            writing.append(Trial(f"decode {model} x {batch}, CUDA graph", gpu.decode_by_graph, (model, batch)))
    for T in (2048, 8192, 65536):
        options = dict(peer="transformers" * (T == 2048))
        writing.append(Trial(f"prefill 20m {T}", gpu.measured, ("prefill", "20m", T), options))

    eager, compiled = ([trial for trial in checks() if ("compiled" in trial.name) == how] for how in (False, True))
    eager += [*map(compile_ahead, (trial for trial in attend if "flex" in trial.name)), *resumed]
    compiled = [*map(compile_ahead, (trial for trial in steps if "compiled" in trial.name)), *compiled]
    beside = [[trial._replace(timed=False) for trial in trials] for trials in (eager, compiled)]
    experiments = beside[0], attend, writing, constants, beside[1], steps, start
    return list(zip((0.12, 0.1, 0.1, 0.08, 0.24, 0.22, 0.14), experiments, strict=True))


def compile_ahead(trial: Trial) -> Trial:
    """A trial that leaves its compiled code in torch's cache on disk, and no times."""
    return trial._replace(name=f"compile {trial.name}", function=gpu.run_once, inputs=(trial.function, *trial.inputs))


# ---- Running it


def work(sender: Connection, plan: Callable, names: list[str], device: str, tiny: bool) -> None:
    """The body of a process: sends one row after another, until one fails; what is left behind then is not known."""
    trials = {trial.name: trial for _, trials in plan() for trial in trials}
    sender.send({})  # ready
    for trial in map(trials.get, names):
        start = time.monotonic()
        try:
            with contextlib.ExitStack() as stack:
                for name, value in ((REHEARSAL if tiny else {}) | trial.changes).items():
                    stack.enter_context(patch(name, value))
                row = trial.function(device, tiny, *trial.inputs, **trial.options)
            row["took"] = round(time.monotonic() - start, 1)
        except Exception as error:
            row = dict(failed=f"{type(error).__name__}: {one_line(error)[:300]}")
        sender.send(row)
        if "failed" in row:
            return
        gc.collect()


def run_trials(
    plan: Callable, trials: list[Trial], device: str, tiny: bool, left: Callable[[], float]
) -> Iterator[tuple[Trial, Row]]:
    """The rows of an experiment. left(): seconds until all must have ended."""
    trials, context = list(trials), multiprocessing.get_context("spawn")
    while trials:
        receiver, sender = context.Pipe(duplex=False)
        names = [trial.name for trial in trials]
        process = context.Process(target=work, args=(sender, plan, names, device, tiny))
        process.start()
        sender.close()

        def receive(seconds: float, receiver=receiver, process=process) -> Row:
            try:
                if receiver.poll(seconds := max(0.0, min(seconds, left()))):
                    return receiver.recv()
                return dict(failed=f"no result after {seconds:.0f} s")
            except EOFError:
                process.join()
                return dict(failed=f"its process ended with status {process.exitcode}")

        try:
            row = receive(START)
            while "failed" not in row and trials:
                row = receive(trials[0].seconds)
                yield trials.pop(0), row
            if len(trials) == len(names):
                yield trials.pop(0), row  # the process did not start
        finally:
            process.join(2)  # one that has sent its last row ends by itself
            process.kill()
            process.join()


def run(device: str, minutes: int, out: str, plan: Callable = plan) -> None:
    """Prints the rows, and writes them to a new file in the folder `out`: .jsonl as they come, .csv in the end."""
    tiny, end = Machine(device).device.type != "cuda", time.monotonic() + 60 * minutes
    kind = "cpu" if tiny else "cuda"
    path = Path(out) / f"gpu_{datetime.datetime.now():%Y-%m-%d_%H%M%S}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    conditions, rows = measure.conditions(), []
    waiting = {trial.name: trial for _, trials in plan() for trial in trials}
    print("  ".join(f"{key} {value}" for key, value in conditions.items() if value), flush=True)
    if tiny:
        print("No GPU: a rehearsal with tiny shapes on the CPU. Its numbers say nothing about speed.", flush=True)

    def emit(trial: Trial, row: Row) -> None:
        rows.append(dict(trial=trial.name) | {key: value for key, value in row.items() if value not in ("", None)})
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1] | conditions, default=str) + "\n")
        shown = {key: row[key] for key in SHOWN if row.get(key) not in ("", None)}
        cells = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())
        print(f"{trial.name:<48} {'  '.join(cells)}", flush=True)

    lock, until = threading.Lock(), 0.0

    def work_through(trials: list[Trial]) -> None:
        results = run_trials(plan, trials, kind, tiny, lambda: end - time.monotonic())
        while time.monotonic() < until and (found := next(results, None)):
            with lock:
                emit(*found)
                del waiting[found[0].name]
        results.close()

    for share, trials in [*plan(), (1.0, None)]:  # in the end those for which there was no time
        until = min(end, time.monotonic() + 60 * minutes * share)
        trials = trials or list(waiting.values())
        at_once = 1 if any(trial.timed for trial in trials) else BESIDE
        with ThreadPoolExecutor(at_once) as pool:
            try:
                list(pool.map(work_through, [trials[i::at_once] for i in range(at_once)]))
            except KeyboardInterrupt:
                until = 0
                raise
    for trial in waiting.values():
        emit(trial, dict(failed=f"not started: --minutes={minutes} were over"))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    measure.append_csv(str(path.with_suffix(".csv")), [*columns, *conditions], *(row | conditions for row in rows))
    print_forecast([] if tiny else rows)
    print(f"The rows are in {path} and {path.with_suffix('.csv').name}.")


def print_forecast(rows: list[Row]) -> None:
    """How long each recipe takes by the best rate that was measured."""
    for model in dict.fromkeys(row["model"] for row in rows if row.get("what") == "train"):
        recipe = read_config(f"{HERE}/config/doge{model.removesuffix('_moe')}.py")  # an MoE twin follows its dense one
        tokens = recipe["max_steps"][0] * recipe["batch_tokens"][0]
        rate = max(row["tokens_per_second"] for row in rows if row.get("what") == "train" and row["model"] == model)
        hours = tokens / rate / 3600
        print(f"config/doge{model}.py, an estimate: {hours:.2f} h; {hours / 8:.2f} h on eight cards that lose nothing")
