"""serve.py under load, and against its own description. For hand and hour, not for the test suite.

    python tests/load.py out/doge20m --dtype=bfloat16 --llama=BF16,Q8_0    adds to results/load.csv
    python tests/load.py out/stories --requests=200 --out=         a rehearsal
    python tests/load.py out/stories --cases=2000                  schemathesis: never a 500, never a hang

The server is a process of its own. Storm: 64 clients send requests of mixed length, streamed and not, and leave a fifth
of them midway. Afterwards no error has come but the promised ones (429), no slot is lost, the process has not grown
since the first tenth, and the greedy text of every request is that which the engine alone writes. Speed: tokens per
second at 1, 4, 16, 64 clients beside the engine's own, in one process without HTTP, and how long the first token of a
short request takes while a prompt as long as the context is read.
"""

import asyncio
import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import httpx
import torch
from screenshots import serving

from nanodoge.checkpoint import load_model
from nanodoge.decode import make_decoder
from nanodoge.engine import Engine, Request
from nanodoge.llama import llama_writer
from nanodoge.options import Count, Whole, check_ranges, parse_options, run_command


@dataclass
class LoadOptions:
    """What is tried"""

    checkpoint: list[str] = field(default_factory=lambda: ["out/stories"])  # folder of the model
    requests: Count = 2000  # of the storm
    clients: Count = 64  # at once
    new_tokens: Count = 64  # a request of the measurement of speed
    slots: Count = 64  # of the server
    rounds: Count = 3  # of the measurement of speed, of which the median counts
    llama: str = ""  # kinds of weights, like F32,BF16,Q8_0, of llama.cpp beside it (see nanodoge/llama.py); empty: none
    cases: Whole = 0  # only schemathesis, so many cases
    out: str = "results/load.csv"  # the table, to which rows are added; empty: none
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"  # of the weights
    backend: Literal["auto", "cpp", "onnx", "torch"] = "auto"  # as in serve.py
    seed: Whole = 0  # of lengths and prompts

    def __post_init__(self):
        check_ranges(self)


@contextmanager
def server(options: LoadOptions):
    """Within it a server runs; gives (address, process)."""
    argv = ["--temperature=0", "--patience=5", f"--max_queue={options.clients}"]
    argv += [f"--{name}={getattr(options, name)}" for name in ("dtype", "backend", "slots")]
    with serving(options.checkpoint[0], *argv) as (url, process):
        yield url, process
        process.terminate()
        assert process.wait(60) == 0, "the server did not end in peace"


def memory(process: subprocess.Popen) -> float:
    """Resident MB (Linux)."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def gauges(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}


# ---- The storm


def make_requests(options: LoadOptions, vocab_size: int, context: int) -> list[dict]:
    """Bodies of /v1/completions whose prompts and replies are of any length, most of them short."""
    draw, bodies = random.Random(options.seed), []
    for i in range(options.requests):
        length = min(int(context / 2 * draw.random() ** 3) + 1, context - 2)
        prompt = [draw.randrange(256, vocab_size) for _ in range(length)]
        new = int(min(context - length, 200) * draw.random() ** 2) + 1
        bodies.append(dict(prompt=prompt, max_tokens=new, temperature=0, stream=i % 2 == 0))
    return bodies


async def ask(client: httpx.AsyncClient, url: str, body: dict) -> tuple:
    """(status, text). A 429 is tried again."""
    while True:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            if reply.status_code == 200 and body["stream"]:
                text, is_done = "", False
                async for line in reply.aiter_lines():
                    is_done |= line == "data: [DONE]"
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
                return 200 if is_done else "cut off", text
            data = json.loads(await reply.aread())
        if reply.status_code != 429:
            return reply.status_code, data["choices"][0]["text"] if reply.is_success else data
        await asyncio.sleep(0.1)


async def storm(url: str, process: subprocess.Popen, options: LoadOptions, bodies: list[dict]) -> dict:
    """Sends all, and returns what came of it."""
    draw, queue, replies, sizes = random.Random(1), list(enumerate(bodies)), {}, []
    limits = httpx.Limits(max_connections=2 * options.clients, max_keepalive_connections=options.clients)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:

        async def run():
            while queue:
                i, body = queue.pop()
                leave_after = draw.random() * 0.5 if draw.random() < 0.4 else None  # some are answered before
                try:
                    replies[i] = await asyncio.wait_for(ask(client, url, body), leave_after)
                except asyncio.TimeoutError:
                    replies[i] = None  # the client left
                if len(replies) % max(len(bodies) // 20, 1) == 0:
                    sizes.append(memory(process))

        await asyncio.gather(*(run() for _ in range(options.clients)))
    for _ in range(100):
        state = gauges(url)
        if not state["nanodoge_pending"] + state["nanodoge_running"] + state["nanodoge_waiting"]:
            break
        await asyncio.sleep(0.1)
    errors = [reply for reply in replies.values() if reply and reply[0] != 200]
    assert not errors, errors[:3]
    assert not state["nanodoge_running"] + state["nanodoge_waiting"] + state["nanodoge_pending"], "a slot is lost"
    left = sum(reply is None for reply in replies.values())
    if len(bodies) >= 1000:  # of fewer, chance decides too much
        assert left >= len(bodies) / 5, f"only {left} clients left midway"
        assert max(sizes) < 1.05 * sizes[1], f"memory grew from {sizes[1]} MB to {max(sizes)}"
    return dict(replies=replies, left=left, first_mb=sizes[1], last_mb=sizes[-1], most_mb=max(sizes))


def same_texts(engine: Engine, bodies: list[dict], replies: dict) -> tuple[int, int]:
    """(replies equal to those of the request alone, those that are not). Beyond a token that is as likely as another up
    to rounding, texts may differ: products of another shape round otherwise."""
    same = other = 0
    for i, reply in replies.items():
        if reply is None:
            continue
        request = Request(bodies[i]["prompt"], bodies[i]["max_tokens"], 0, stop_ids=[engine.tokenizer.eos_id])
        engine.generate([request])
        same, other = same + (request.text.text == reply[1]), other + (request.text.text != reply[1])
    return same, other


# ---- Speed


async def complete(url: str, body: dict) -> bytes:
    """The raw reply. (The client shares the server's cores, and httpx would take as much of them as the server.)"""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data, head = json.dumps(body).encode(), b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    writer.write(head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    reply = await reader.read()
    writer.close()
    return reply


async def complete_all(url: str, prompts: list[list[int]], new: int, streams: bool) -> None:
    """All at once."""
    common = dict(max_tokens=new, temperature=0, ignore_eos=True, stream=streams)
    common |= dict(stream_options=dict(include_usage=True)) if streams else {}
    replies = await asyncio.gather(*(complete(url, dict(prompt=prompt) | common) for prompt in prompts))
    assert all(b'"completion_tokens": %d,' % new in reply for reply in replies)


def speed_rows(options: LoadOptions, url: str, model, decoder: Callable, prompts: list[list[int]]) -> list[tuple]:
    """Tokens per second at 1, 4, 16, 64 clients, prompts included, and the median of the server's share of the engine's
    in the same round. All see the same machine: they take turns. Few clients are soon done, and have more rounds."""
    rows, ways = [], {}
    for count in (1, 4, 16, 64):
        some, new, engine = prompts[:count], options.new_tokens, Engine(model, decoder, slots=count)
        engine.allocate(model.config.max_position_embeddings + 2)
        ways["engine"] = lambda: engine.generate([Request(prompt, new, 0) for prompt in some])  # noqa: B023
        for name, streams in (("server", False), ("server, streaming", True)):
            ways[name] = lambda streams=streams: asyncio.run(complete_all(url, some, new, streams))  # noqa: B023
        for kind in options.llama.split(",") if options.llama else ():
            ways[f"llama.cpp, {kind}"] = llama_writer(
                model.config, kind, count, len(some[0]), new, torch.get_num_threads()
            )
        found = {name: [] for name in ways}
        for _ in range(options.rounds * max(1, 16 // count)):
            for name, measure in ways.items():
                start = time.perf_counter()
                measure()
                found[name].append(count * new / (time.perf_counter() - start))
        rows += [(f"tokens/s, {count} clients, {name}", round(median(speeds))) for name, speeds in found.items()]
        for name in ("server", "server, streaming"):
            shares = [own / engine for own, engine in zip(found[name], found["engine"], strict=True)]
            rows.append((f"share, {count} clients, {name}", round(median(shares), 2)))
    return rows


async def first_token(url: str, short: list[int], long: list[int] | None) -> float:
    """Seconds to the first token of a short request, while a long prompt is read."""
    async with httpx.AsyncClient(timeout=300) as client:
        await client.get(f"{url}/health")
        body = dict(prompt=long, max_tokens=1, temperature=0)
        reading = asyncio.create_task(client.post(f"{url}/v1/completions", json=body)) if long else None
        await asyncio.sleep(0.02)  # until it is being read
        start = time.perf_counter()
        body = dict(prompt=short, max_tokens=4, temperature=0, stream=True)
        async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            async for _ in reply.aiter_lines():
                seconds = time.perf_counter() - start
                break
        if reading:
            await reading
    return seconds


def median(values) -> float:
    return sorted(values)[len(values) // 2]


# ---- Against its own description


def try_schema(url: str, cases: int) -> int:
    """Sends `cases` requests that schemathesis draws from /openapi.json, valid and not, and returns how many. Raises if
    a reply is a server error, takes 30 s, or is not what the description says."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode, checks
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    wanted = [checks.not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    schema, sent = schemathesis.openapi.from_url(f"{url}/openapi.json"), 0
    operations = [result.ok() for result in schema.get_all_operations()]
    takes_body = [operation for operation in operations if operation.body]
    for operation in operations:
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if operation.body else [GenerationMode.POSITIVE]
        for mode in modes:
            count = cases // (2 * len(takes_body)) + 1 if operation.body else 1
            how = dict(max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate])

            @settings(**how, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                nonlocal sent
                sent += 1
                if isinstance(case.body, dict) and case.body.get("max_tokens") is None and "n" not in case.body:
                    case.body["max_tokens"] = 8  # else a valid case writes up to the context
                case.validate_response(case.call(timeout=30), checks=wanted)

            check()
    return sent


def main(argv: list[str]) -> None:
    options = parse_options(LoadOptions, argv, positional="checkpoint")
    with server(options) as (url, process):
        if options.cases:
            print(f"{try_schema(url, options.cases)} cases, no fault; {json.dumps(gauges(url))}")
            return
        model, tokenizer = load_model(options.checkpoint[0])
        context = model.config.max_position_embeddings
        model = model.to(torch.bfloat16 if options.dtype == "bfloat16" else torch.float32)  # as serve.py has it
        decoder = make_decoder(model, options.dtype, options.backend)
        bodies = make_requests(options, tokenizer.vocab_size, context)
        rows, start = [], time.perf_counter()
        found = asyncio.run(storm(url, process, options, bodies))
        seconds = time.perf_counter() - start
        same, other = same_texts(Engine(model, decoder, slots=1, tokenizer=tokenizer), bodies, found["replies"])
        rows += [("requests", len(bodies)), ("clients", options.clients), ("left midway", found["left"])]
        rows += [("seconds", round(seconds, 1)), ("same text as alone", same), ("other text", other)]
        rows += [(f"memory, MB, {name[:-3]}", round(found[name])) for name in ("first_mb", "last_mb", "most_mb")]
        prompts = [(body["prompt"] * 32)[:32] for body in bodies[:64]]
        rows += speed_rows(options, url, model, decoder, prompts)
        long = [256 + i % (tokenizer.vocab_size - 256) for i in range(context - 2)]
        for name, prompt in (("alone", None), (f"while {len(long)} tokens are read", long)):
            times = [asyncio.run(first_token(url, [300 + i], prompt)) for i in range(options.rounds)]
            rows += [(f"first token, ms, {name}", round(1000 * median(times), 1))]
    for name, value in rows:
        print(f"{name:<45}{value:>10}")
    if options.out:
        kind = f"{options.dtype}, {options.backend}"
        about = [f"{Path(options.checkpoint[0]).name}, {kind}", "tests/load.py " + " ".join(argv)]
        is_new = not Path(options.out).exists()
        with open(options.out, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [("model", "command", "what", "figure")] * is_new + [[*about, *row] for row in rows]
            )


if __name__ == "__main__":
    run_command(main)
