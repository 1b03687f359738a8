"""An OpenAI-compatible API and a chat page, on a model whose state has constant size.

    python serve.py out/stories-preferences                     the page is at http://127.0.0.1:8000
    python serve.py out/stories-preferences --keep_window_size=64      lossy: see in the page what the model keeps

A client of OpenAI's API needs base_url=http://127.0.0.1:8000/v1 and any key. nanodoge/api.py has the words of the API.

A handler turns what it was sent into Requests and leaves a call in a queue, which the engine's thread makes between two
steps: to add or to cancel them. So all requests share every step (see nanodoge/engine.py), handlers never wait for a
step, and the engine never waits for a client. The thread wakes a handler at the first token and at the end; one that
streams looks by itself what has come, some times a second. A reply that is not streamed is the streamed one, collected.
"""

import asyncio
import base64
import hmac
import json
import logging
import re
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from nanodoge import options as parsing
from nanodoge.checkpoint import load_model, load_options
from nanodoge.engine import Engine, Request
from nanodoge.machine import Machine
from nanodoge.options import HERE, Count, NonNegative, Positive, Range, Share, Whole, one_line
from sample import example, make_decoder

try:
    import uvicorn
    from fastapi import Body, FastAPI, Response
    from fastapi import Request as Connection
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    from nanodoge import api
    from nanodoge.api import APIError, Chat, Choice, Completion, EngineThread, error_reply, json_reply, refusing
except ImportError as missing:
    print(f"error: serve.py needs two packages: pip install fastapi uvicorn ({one_line(missing)})", file=sys.stderr)
    sys.exit(2)


EVERYWHERE = ("0.0.0.0", "::")  # hosts that mean every address of this machine, whatever its name
PIECE = 512  # prompt tokens read in a step (see Engine): a first token waits for two steps at most
PAUSE = 0.02  # seconds between two chunks of a stream: to wake for one takes 0.3 ms of the cores that the engine needs
CHUNKS = 500  # chunks a second of all streams together, which share these moments: each takes 0.06 ms


@dataclass
class ServeOptions:
    """What to serve, and to whom"""

    checkpoint: list[str] = field(default_factory=lambda: ["out/stories-preferences"])  # folder of the model
    host: str = "127.0.0.1"  # 0.0.0.0: to the whole network
    port: Annotated[int, Range(0, 65535)] = 8000  # 0: any that is free
    api_key: str = ""  # what clients must send; empty: nothing (a browser asks for it as a password)
    cors_origin: str = ""  # origin whose pages may use the API, like https://chat.example
    # ---- What a request gets that does not say
    temperature: Annotated[float, Range(0, 2)] = 0.7  # 0 = always the likeliest token
    top_p: Share = 0.95  # draw from the likeliest tokens that make up this much probability; 1 = all
    # ---- Limits
    slots: Count = 16  # requests that are written at once
    max_queue: Whole = 256  # requests that wait; more get 429
    max_body: Count = 1_000_000  # bytes of a request; more get 413
    patience: Positive = 20.0  # seconds in which a request must have arrived, or it gets 408
    timeout: Positive = 600.0  # seconds for a reply, or it gets 504
    grace: NonNegative = 30.0  # seconds that running requests have after SIGTERM or Ctrl-C; new ones get 503
    # ---- Model
    keep_window_size: Whole = 0  # shrinks the model's window to so many keys, which is lossy; 0 = as it was trained
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"  # of the weights; int8: a byte each, see decode.py
    backend: Literal["torch", "onnx"] = "torch"  # onnx: faster on a CPU, needs pip install onnx onnxruntime

    def __post_init__(self):
        parsing.check_ranges(self)
        if len(self.checkpoint) != 1:
            raise ValueError(f"one checkpoint folder, not {len(self.checkpoint)}: {' '.join(self.checkpoint)}")


def load_engine(options: ServeOptions) -> tuple[Engine, dict]:
    """The engine, and {chat: whether the model was tuned on conversations, example: a question it answers right}."""
    machine = Machine(options.device, "auto" if options.dtype == "int8" else options.dtype)
    model, tokenizer = load_model(options.checkpoint[0])
    model, config = model.to(machine.device, machine.dtype), model.config
    if options.keep_window_size > config.keep_window_size:
        valid = f"at most the model's own, {config.keep_window_size}"
        raise ValueError(f"--keep_window_size={options.keep_window_size} must be {valid}")
    config.keep_window_size = options.keep_window_size or config.keep_window_size
    decoder = make_decoder(model, options.dtype, options.backend)
    engine = Engine(model, decoder, options.slots, tokenizer=tokenizer, piece=PIECE, reuse=True)
    trained = load_options(options.checkpoint[0])
    shown = example(engine, str(trained.get("data", "")))
    engine.allocate(config.max_position_embeddings + 1)
    engine.generate([Request([tokenizer.bos_id], 2)])  # ValueError for damaged weights
    is_chat = "epochs" in trained if trained else bool(tokenizer.chat_template)
    return engine, dict(chat=is_chat, example=shown and shown[0])


def load_service(options: ServeOptions) -> "Service":
    return Service(options, EngineThread(lambda: load_engine(options)))


# ---- What each address does


class Service:
    """A model and its clients. Its methods that return a Response are the handlers of `make_app`'s addresses."""

    def __init__(self, options: ServeOptions, thread: EngineThread):
        self.options, self.name, self.thread = options, Path(options.checkpoint[0]).name, thread
        self.engine, self.coder = thread.engine, thread.engine.tokenizer
        self.context = self.engine.model.config.max_position_embeddings
        self.pending, self.at_once = 0, options.slots + options.max_queue  # requests that run or wait; most of them
        self.is_stopping = False  # set by the server
        self.defaults = dict(temperature=options.temperature, top_p=options.top_p)
        self.card = dict(id=self.name, object="model", created=int(time.time()), owned_by="nanodoge")

    async def page(self) -> Response:
        return FileResponse(HERE / "nanodoge" / "web" / "chat.html")

    async def health(self) -> Response:
        return json_reply(dict(status="ok"))

    async def metrics(self) -> Response:
        """In Prometheus's format."""
        rows = dict(slots=self.engine.slots, running=len(self.engine.live), waiting=len(self.engine.waiting))
        rows |= dict(pending=self.pending) | {f"{name}_total": count for name, count in self.thread.sums.items()}
        kinds = {name: "counter" if name.endswith("_total") else "gauge" for name in rows}
        text = "".join(f"# TYPE nanodoge_{x} {kinds[x]}\nnanodoge_{x} {n}\n" for x, n in rows.items())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        return json_reply(dict(object="list", data=[self.card]))

    async def model(self, name: str) -> Response:
        if name != self.name:
            raise APIError(404, f"there is only {self.name}", "model_not_found", "model")
        return json_reply(self.card)

    async def tokenize(
        self, prompt: Annotated[str, Body()], add_special_tokens: Annotated[bool, Body()] = True
    ) -> Response:
        ids = await asyncio.to_thread(self.coder.encode_prompt, prompt, add_special_tokens)
        return json_reply(dict(tokens=ids, count=len(ids), max_model_len=self.context))

    async def detokenize(self, tokens: Annotated[list[int], Body(embed=True)]) -> Response:
        with refusing("tokens"):
            return json_reply(dict(prompt=self.coder.decode(tokens)))

    async def tokenizer_info(self) -> Response:  # with this lm_eval needs no tokenizer of its own
        return json_reply(self.coder.names | dict(chat_template=self.coder.chat_template))

    async def info(self) -> Response:
        return json_reply(self.about())

    def about(self) -> dict:
        config = self.engine.model.config
        sizes = dict(context=self.context, window=config.keep_window_size, layers=config.num_hidden_layers)
        sizes |= dict(kv_heads=config.num_key_value_heads, defaults=self.defaults)
        return dict(model=self.name) | sizes | self.thread.about

    async def chat(self, body: Chat, connection: Connection) -> Response:
        return await self.reply(body, connection)

    async def completions(self, body: Completion, connection: Connection) -> Response:
        return await self.reply(body, connection)

    def check(self, ids: list[int], param: str, new: int) -> None:
        """Raises APIError if the model cannot read these and write `new` tokens."""
        if not 0 < len(ids) <= self.context - new:
            words = f"the prompt has {len(ids)} tokens, and the context holds from 1 to {self.context}, reply included"
            raise APIError(400, words, "context_length_exceeded" if ids else None, param)
        with refusing(param):
            self.coder.decode(ids)

    def render(self, messages: list[api.Message], add_generation_prompt: bool) -> list[int]:
        self.check(4 * [0] * len(messages), "messages", 0)  # each has four tokens or more, and a template is slow
        rows = [dict(role=each.role.replace("developer", "system"), content=each.content) for each in messages]
        with refusing("messages"):
            return self.coder.render(rows, add_generation_prompt)[0]

    def choices(self, body: Chat | Completion) -> list[Choice]:
        """What a chat or completion asks for. Raises APIError for what cannot be done."""
        for name, harmless in api.UNSUPPORTED.items():
            if (value := body.model_extra.get(name)) and value not in harmless:
                raise APIError(400, f"{name} is not supported", "unsupported_parameter", name)
        if isinstance(body, Chat):
            prompts, param, kind = [self.render(body.messages, True)], "messages", "delta" if body.stream else "message"
            limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
            logprobs, echo = body.top_logprobs or 0 if body.logprobs else None, False
        else:
            is_one = isinstance(body.prompt, str) or bool(body.prompt) and isinstance(body.prompt[0], int)
            prompts, param, kind = [body.prompt] if is_one else body.prompt, "prompt", "text"
            limit, logprobs, echo = body.max_tokens, body.logprobs, bool(body.echo)
        if not 0 < len(prompts) * (body.n or 1) <= self.at_once:
            raise APIError(400, f"from 1 to {self.at_once} continuations in one request", param="prompt")
        common = self.defaults | body.model_dump(include=api.SAMPLING, exclude_none=True)
        common["temperature"] *= common["temperature"] >= 1e-3  # logits are divided by it
        common |= dict(stop=[body.stop] if isinstance(body.stop, str) else body.stop or [], logprobs=logprobs)
        common |= dict(stop_ids=[] if body.ignore_eos else [self.coder.eos_id], echo=echo and logprobs is not None)
        common |= dict(event=asyncio.Event(), streams=bool(body.stream), kind=kind)
        seed, found = secrets.randbits(62) if body.seed is None else body.seed, []
        for prompt in prompts:
            ids = self.coder.encode_prompt(prompt) if isinstance(prompt, str) else prompt
            self.check(ids, param, 0 if limit == 0 else 1)
            new = min(self.context - len(ids), self.context if limit is None else limit)
            echoed = prompt if isinstance(prompt, str) else self.coder.decode(ids)
            common |= dict(limit=new, echoed=echoed if echo else "")
            for i in range(body.n or 1):
                found.append(Choice(ids, max(new, 1), **common, seed=seed + i, index=len(found)))
        return found

    async def pieces(self, connection: Connection, choices: list[Choice]) -> AsyncIterator[dict]:
        """What choices have to say, as it comes. Leaving it cancels them, as does the client that disconnects."""
        thread, loop, event = self.thread, asyncio.get_running_loop(), choices[0].event
        if self.pending + len(choices) > self.at_once:
            raise APIError(429, "too many requests are waiting", "queue_full", **{"Retry-After": "1"})

        def cancel():
            thread.calls.put(lambda: thread.cancel(choices))

        async def watch():
            while (await connection.receive())["type"] != "http.disconnect":
                pass
            cancel()

        thread.loop, self.pending = loop, self.pending + len(choices)
        watcher, timer = asyncio.create_task(watch()), loop.call_later(self.options.timeout, cancel)
        try:
            thread.calls.put(lambda: thread.add(choices))
            while not all(choice.ended for choice in choices):
                await event.wait()
                event.clear()
                for choice in choices:
                    if not choice.ended and (piece := choice.take(self.coder)):
                        yield piece
                if choices[0].streams:
                    pause = max(PAUSE, self.pending / CHUNKS)
                    loop.call_at((loop.time() // pause + 1) * pause, event.set)  # all streams at the same moments
        finally:
            watcher.cancel(), timer.cancel(), cancel()
            self.pending -= len(choices)

    async def reply(self, body: Chat | Completion, connection: Connection) -> Response:
        """The reply to a chat or completion, streamed or collected."""
        choices = await asyncio.to_thread(self.choices, body)
        kind = "chat.completion" if isinstance(body, Chat) else "text_completion"
        head = dict(id=f"{kind[:4]}-{secrets.token_hex(12)}", object=kind, created=int(time.time()), model=self.name)
        pieces = self.pieces(connection, choices)
        first = await anext(pieces)  # what goes wrong before it has a status of its own
        if not body.stream:
            found = sorted([first, *[piece async for piece in pieces]], key=lambda piece: piece["index"])
            return json_reply(head | dict(choices=found, usage=usage(choices, body.n or 1)))
        with_usage = (body.stream_options or {}).get("include_usage")
        head |= dict(object=kind + ".chunk") if isinstance(body, Chat) else {}
        head |= dict(usage=None) if with_usage else {}

        async def events():
            try:
                yield json.dumps(head | dict(choices=[first]))
                async for piece in pieces:
                    yield json.dumps(head | dict(choices=[piece]))
                if with_usage:
                    yield json.dumps(head | dict(choices=[], usage=usage(choices, body.n or 1)))
                yield "[DONE]"
            except APIError as error:
                yield error_reply(error).body.decode()

        stream = (f"data: {event}\n\n" async for event in events())
        return StreamingResponse(stream, media_type="text/event-stream")

    async def kept(
        self,
        connection: Connection,
        messages: Annotated[api.Messages, Body()],
        layer: Annotated[api.Whole, Body()] = None,
    ) -> Response:
        """For each token of a conversation, how many (layer, key/value head) caches hold it after reading all."""
        ids, about = await asyncio.to_thread(self.render, messages, False), self.about()
        self.check(ids, "messages", 0)
        if layer is not None and layer >= about["layers"]:
            raise APIError(400, f"layer {layer} must be below {about['layers']}", param="layer")
        choice, feed = api.HeldChoice(ids, 1, temperature=0.0, engine=self.engine), self.coder.stream()
        async for _ in self.pieces(connection, [choice]):
            pass
        layers = choice.held if layer is None else [choice.held[layer]]
        positions, scores = (np.concatenate([x.cpu().numpy() for x in each]) for each in zip(*layers, strict=True))
        kept = np.bincount(positions[positions >= 0], minlength=len(ids))
        positions, scores = (x[positions.min(1) >= 0] for x in (positions, scores))  # of full caches the weakest key is
        weakest = np.where(scores == scores.min(1, keepdims=True), positions, len(ids)).min(
            1
        )  # next, of equal ones the oldest
        following = np.bincount(weakest, minlength=len(ids))
        texts = [feed(id) for id in ids]
        texts[-1] += feed(None)
        counts = dict(kept=kept.tolist(), next=following.tolist(), possible=len(layers) * about["kv_heads"])
        return json_reply(about | dict(object="nanodoge.kept", layer=layer, tokens=texts) | counts)


def usage(choices: list[Choice], n: int) -> dict:
    """The tokens of `n` choices for each prompt."""
    read = sum(len(choice.prompt) for choice in choices[::n])
    written = sum(min(len(choice.tokens), choice.limit) for choice in choices)
    details = dict(cached_tokens=sum(choice.reused for choice in choices[::n]))
    counts = dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
    return counts | dict(prompt_tokens_details=details)


# ---- HTTP


def make_app(service: Service) -> FastAPI:
    errors = {status: dict(description="An error, in OpenAI's envelope") for status in ("4XX", "5XX")}
    handlers = dict.fromkeys((HTTPException, RequestValidationError), lambda _, error: error_reply(error))
    app = FastAPI(title="nanoDoge", docs_url=None, redoc_url=None, responses=errors, exception_handlers=handlers)
    app.add_middleware(guard, service=service)
    if origin := service.options.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=[origin], allow_methods=["*"], allow_headers=["*"])
    app.get("/", include_in_schema=False)(service.page)
    app.get("/health")(service.health)
    app.get("/metrics", response_class=PlainTextResponse)(service.metrics)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name}")(service.model)
    streams = {200: {"content": {"text/event-stream": {}}}}
    app.post("/v1/chat/completions", responses=streams)(service.chat)
    app.post("/v1/completions", responses=streams)(service.completions)
    app.get("/v1/nanodoge/info")(service.info)
    app.post("/v1/nanodoge/kept")(service.kept)
    app.post("/tokenize")(service.tokenize)
    app.post("/detokenize")(service.detokenize)
    app.get("/tokenizer_info")(service.tokenizer_info)
    return app


def refusal(options: ServeOptions, is_stopping: bool, path: str, headers: dict[bytes, bytes]) -> APIError | None:
    """What keeps a request from the application: its host, its key, or the server's end."""
    # A page of another host, whose name its owner points to this machine (DNS rebinding), comes with that name.
    host = re.sub(r":\d*$", "", headers.get(b"host", b"localhost").decode("latin-1")).strip("[]").lower()
    if options.host not in EVERYWHERE and host not in ("localhost", "127.0.0.1", "::1", options.host.lower()):
        return APIError(403, f"this server is not {host[:80]!r}: see --host", "wrong_host")
    scheme, _, given = headers.get(b"authorization", b"").strip().partition(b" ")
    if scheme.lower() == b"basic":  # of a browser, which asks for a password: user:password in base64
        given = base64.urlsafe_b64decode(given + b"==").partition(b":")[2]
    if path != "/health" and options.api_key and not hmac.compare_digest(given.strip(), options.api_key.encode()):
        return APIError(401, "the API key is missing or wrong", "invalid_api_key", **{"WWW-Authenticate": "Basic"})
    if is_stopping:
        return APIError(503, "the server is stopping", "stopping", **{"Retry-After": "5", "Connection": "close"})
    return None


def guard(app, service: Service):
    """An ASGI application: `app` behind `refusal`, with bodies of at most --max_body bytes."""

    async def guarded(scope, receive, send):
        size, options = 0, service.options

        async def limited():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > options.max_body:
                raise APIError(413, f"at most {options.max_body} bytes", "too_large")
            return message

        is_http = scope["type"] == "http"
        refused = is_http and refusal(options, service.is_stopping, scope["path"], dict(scope["headers"]))
        await (error_reply(refused) if refused else app)(scope, limited, send)

    return guarded


class Server(uvicorn.Server):
    """uvicorn, but it leaves slow clients, and on a signal it first lets the running requests end. On a second one it
    ends at once."""

    def __init__(self, service: Service, options: ServeOptions):
        common = dict(http="h11", ws="none", log_level="error", timeout_graceful_shutdown=1)
        super().__init__(uvicorn.Config(make_app(service), **common))
        self.service, self.options, self.since, self.deadline = service, options, {}, 0.0

    def handle_exit(self, sig: int, frame) -> None:
        self.should_exit = self.force_exit = self.service.is_stopping
        logging.getLogger("uvicorn.error").disabled = self.force_exit  # it would print a traceback of every reply cut
        self.service.is_stopping, self.deadline = True, time.monotonic() + self.options.grace

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second. True ends the server."""
        now, since = time.monotonic(), {}
        for connection in list(self.server_state.connections):
            cycle, is_stuck = connection.cycle, connection.flow.write_paused
            if not cycle or cycle.more_body or cycle.response_complete or is_stuck:  # the client has to act
                since[cycle or connection] = start = self.since.get(cycle or connection, now)
                if now > start + self.options.patience and is_stuck:
                    connection.transport.abort()
                elif now > start + self.options.patience:
                    late = error_reply(APIError(408, "the request did not arrive in time", Connection="close"))
                    head = "".join(f"{name}: {value}\r\n" for name, value in late.headers.items())
                    connection.transport.write(f"HTTP/1.1 408 Request Timeout\r\n{head}\r\n".encode() + late.body)
                    connection.transport.close()
        self.since = since
        if self.service.is_stopping:
            self.should_exit |= not self.service.pending or now > self.deadline
        return await super().on_tick(counter)


def main(argv: list[str]) -> None:
    options = parsing.parse_options(ServeOptions, argv, positional="checkpoint")
    service = load_service(options)
    family, host = (socket.AF_INET6, f"[{options.host}]") if ":" in options.host else (socket.AF_INET, options.host)
    with socket.create_server((options.host, options.port), family=family, backlog=2048) as listening:
        # asyncio does this for sockets whose protocol it knows. Without it every reply takes 40 ms more: its body waits
        # until the client has acknowledged its headers.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        url = f"http://{host}:{listening.getsockname()[1]}"
        print(f"{service.name}: {options.slots} slots, context {service.context}, page {url}, API {url}/v1")
        if options.keep_window_size:
            print(f"each layer keeps {options.keep_window_size} keys, fewer than the model was trained with: lossy")
        key = " -H 'Authorization: Bearer KEY'" if options.api_key else ""
        body = '{"messages": [{"role": "user", "content": "Hello"}]}'
        print(f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'", flush=True)
        Server(service, options).run(sockets=[listening])
    service.thread.stop()


if __name__ == "__main__":
    parsing.run_command(main)
