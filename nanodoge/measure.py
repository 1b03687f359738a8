"""How to measure speed and memory honestly: what bench.py stands on.

A time alone says little: the machine may be busy, warm, throttled, or another one than yours. So:

Side by side. What is compared runs in one process on the same weights, in turns: A B, A B, A B. Whatever slows the
machine for a while slows both. Each turn gives a ratio; reported are their median and, in brackets, the least and the
greatest. A wide bracket means: measure again. The first turn warms up (caches, compilers) and is not counted.

Against the machine. Two things bound every computation: how fast bytes come from memory, and how fast numbers are
multiplied (the roofline, Williams et al. 2009). Decoding reads every weight once per token: bytes of weights times
tokens per second are compared with a plain pass over as many bytes. (Over 100 % means that some stayed in the CPU's
cache.) Training and prefill use each weight for many tokens: the FLOP of the formula are compared with one large matrix
product in the same format. What is recomputed or copied is not counted as work.

Memory in a process of its own. A process's peak remembers all that ran before. So a fresh process builds the model,
resets its high-water mark, does the thing once, and reports how far the mark rose. On a GPU the allocator keeps count.
"""

import csv
import datetime
import gc
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROUNDS, SLOW = 5, 20.0  # turns; above so many seconds in the first turn, one


def timed(step: Callable, device: torch.device) -> float:
    """Seconds of one call. A GPU computes later than it is told to, so it is waited for."""
    wait = getattr(torch, device.type).synchronize
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def alternate(steps: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """The seconds of every step in each turn, after one that warms up. rounds: turns; 0: ROUNDS, or one if slow."""
    slowest = max(timed(step, device) for step in steps.values())
    seconds = {name: [] for name in steps}
    for _ in range(rounds or (1 if slowest > SLOW else ROUNDS)):
        for name, step in steps.items():
            seconds[name].append(timed(step, device))
    return seconds


def machine_limit(unit: str, size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes per second when `size` bytes are read over and over, by a sum or a matrix-vector product, whichever is
    faster; or FLOP per second of a large square matrix product. The median of nine calls after one."""
    if unit == "bytes":
        matrix = torch.ones(4096, max(1, size // (4 * 4096)), device=device)
        vector, amount = matrix[0].clone(), matrix.nbytes
        steps = {"sum": matrix.sum, "product": lambda: matrix @ vector}
    else:
        n = 8192 if device.type == "cuda" else 2048
        matrix, amount = torch.full((n, n), 1 / n, device=device, dtype=dtype), 2 * n**3
        steps = {"product": lambda: matrix @ matrix}
    return max(amount / median(seconds) for seconds in alternate(steps, 9, device).values())


def memory_of(make_step: Callable[[], Callable], device: torch.device) -> tuple[int, int]:
    """Bytes that one call of a step takes beside what the process held before it, and bytes in all (0 where the system
    has no /proc)."""
    step, clear, is_gpu = make_step(), Path("/proc/self/clear_refs"), device.type == "cuda"

    def held(key: str) -> int:
        found = re.search(rf"{key}:\s+(\d+)", clear.with_name("status").read_text()) if clear.exists() else None
        return int(found[1]) * 1024 if found else 0

    torch.ones(512, 512, device=device) @ torch.ones(512, 512, device=device)  # the libraries' own buffers
    gc.collect()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif clear.exists():
        clear.write_text("5")  # the high-water mark falls to what is held now: man 5 proc
    before = torch.cuda.memory_allocated() if is_gpu else held("VmRSS")
    timed(step, device)
    peak = torch.cuda.max_memory_allocated() if is_gpu else held("VmHWM")
    return peak - before, peak


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """What function(*arguments) returns there. Raises ValueError if that process is killed."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise ValueError("the process that measures memory was killed, for want of memory?") from None


def conditions() -> dict[str, Any]:
    """Date, machine and versions, without which a figure says nothing."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return dict(
        date=datetime.date.today().isoformat(),
        cpu=cpu[1] if cpu else platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=getattr(sys.modules.get("transformers"), "__version__", ""),
    )


def append_csv(path: str, columns: list[str], *rows: dict[str, Any]) -> None:
    """Appends rows to a file that may be new. Raises ValueError for a file of other columns."""
    with open(path, "a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = file.readline().strip()
        if header not in ("", ",".join(columns)):
            raise ValueError(f"--csv={path}: this file has other columns; name a new one")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not header:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
