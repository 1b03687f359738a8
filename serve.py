"""An OpenAI-compatible API and a chat page, on a model whose state has constant size.

    python serve.py out/stories-preferences                     the page is at http://127.0.0.1:8000
    python serve.py out/stories-preferences --keep_window_size=64      lossy: see in the page what the model keeps

A client of OpenAI's API needs base_url=http://127.0.0.1:8000/v1 and any key. One thread owns the engine: between two
steps it takes the calls that HTTP handlers left in a queue (add, cancel), and after a step it wakes the handlers whose
requests have new text. So all requests share every step (see nanodoge/engine.py), and handlers never wait for a step. A
reply that is not streamed is the streamed one, collected. Whoever disconnects frees their slot before the next step.
"""

import asyncio
import base64
import hmac
import json
import re
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch

from nanodoge import options as parsing
from nanodoge.checkpoint import load_model, load_options
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request
from nanodoge.machine import Machine
from nanodoge.options import HERE, Count, NonNegative, Positive, Range, Share, Whole, one_line
from nanodoge.tokenizer import REASONING_TAGS
from sample import example

try:
    import uvicorn
    from fastapi import Body, FastAPI, Response
    from fastapi import Request as Connection
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    from nanodoge import api
    from nanodoge.api import APIError, Chat, Choice, ClientRequest, Completion, error_fields, error_reply, json_reply
except ImportError as missing:
    print(f"error: serve.py needs two packages: pip install fastapi uvicorn ({one_line(missing)})", file=sys.stderr)
    sys.exit(2)


PIECE = 512  # prompt tokens read in a step (see Engine): a first token waits for two steps at most


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
    decoder = Decoder(model, torch.int8 if options.dtype == "int8" else machine.dtype)
    engine = Engine(model, decoder, options.slots, tokenizer=tokenizer, piece=PIECE, reuse=True)
    trained = load_options(options.checkpoint[0])
    shown = example(engine, str(trained.get("data", "")))
    engine.allocate(config.max_position_embeddings + 2)  # `kept` wants two tokens more
    engine.generate([Request([tokenizer.bos_id], 2)])  # ValueError for damaged weights
    return engine, dict(
        chat="epochs" in trained if trained else bool(tokenizer.chat_template), example=shown and shown[0]
    )


def load_service(options: ServeOptions) -> "Service":
    return Service(options, api.EngineThread(lambda: load_engine(options)))


# ---- From what a client sent to what it gets


class Service:
    """A model and the clients it serves."""

    def __init__(self, options: ServeOptions, thread: api.EngineThread):
        self.options, self.name, self.thread = options, Path(options.checkpoint[0]).name, thread
        self.engine, self.coder = thread.engine, thread.engine.tokenizer
        self.context = self.engine.model.config.max_position_embeddings
        self.pending, self.at_once = 0, options.slots + options.max_queue  # requests that run or wait; most of them
        self.is_stopping, self.statuses = False, Counter()  # of replies

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Special tokens written in a text are these tokens, and BOS stands in front, as evaluate.py has it."""
        ids, bos = [], self.coder.bos_id
        for i, part in enumerate(self.coder.split[None](text)):
            ids += [self.coder.special_tokens[part]] if i % 2 else self.coder.encode(part)
        return ids if not add_bos or ids[:1] == [bos] else [bos, *ids]

    def render(self, messages: list[api.Message], add_generation_prompt: bool) -> list[int]:
        self.check_length(len(messages) * 4, "messages")  # each takes more than four tokens, and a template is slow
        rows = []
        for message in messages:
            parts = message.content if isinstance(message.content, list) else ()
            content = "".join(part.text for part in parts) if parts else message.content or ""
            rows.append(dict(role=message.role.replace("developer", "system"), content=content))
        try:
            return self.coder.render(rows, add_generation_prompt)[0]
        except ValueError as error:
            raise APIError(400, str(error), param="messages") from None

    def check_length(self, length: int, param: str) -> None:
        if length > self.context:
            words = f"prompt and reply have {length} tokens or more, and the model's context is {self.context}"
            raise APIError(400, words, "context_length_exceeded", param)

    def check(self, ids: list[int], param: str, new: int) -> None:
        """Raises APIError if the model cannot read these and write `new` tokens."""
        self.check_length(len(ids) + new, param)
        try:
            self.coder.decode(ids)
        except ValueError as error:
            raise APIError(400, str(error), param=param) from None
        if not ids:
            raise APIError(400, "the prompt is empty", param=param)

    def choices(self, body: Chat | Completion) -> list[Choice]:
        """What a chat or completion asks for. Raises APIError for what cannot be done."""
        for name, harmless in api.UNSUPPORTED.items():
            if (value := body.model_extra.get(name)) and value not in harmless:
                raise APIError(400, f"{name} is not supported", "unsupported_parameter", name)
        if isinstance(body, Chat):
            given, param, kind = [self.render(body.messages, True)], "messages", "delta" if body.stream else "message"
            limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
            logprobs, echo = body.top_logprobs or 0 if body.logprobs else None, False
        else:
            is_one = isinstance(body.prompt, str) or bool(body.prompt) and isinstance(body.prompt[0], int)
            given, param, kind = [body.prompt] if is_one else body.prompt, "prompt", "text"
            limit, logprobs, echo = body.max_tokens, body.logprobs, bool(body.echo)
        if not 0 < len(given) * (body.n or 1) <= self.at_once:
            raise APIError(400, f"from 1 to {self.at_once} continuations in one request", param="prompt")
        asked = {name: value for name in api.SAMPLING if (value := getattr(body, name)) is not None}
        common = dict(temperature=self.options.temperature, top_p=self.options.top_p) | asked
        if common["temperature"] < 1e-3:  # logits are divided by it
            common["temperature"] = 0.0
        common |= dict(stop=[body.stop] if isinstance(body.stop, str) else body.stop or [], logprobs=logprobs)
        common |= dict(stop_ids=[] if body.ignore_eos else [self.coder.eos_id], echo=echo and logprobs is not None)
        common |= dict(event=asyncio.Event(), streams=bool(body.stream))
        seed, found = secrets.randbits(62) if body.seed is None else body.seed, []
        for prompt in given:
            ids = self.encode(prompt) if isinstance(prompt, str) else prompt
            self.check(ids, param, 0 if limit == 0 else 1)
            room = self.context - len(ids)
            new, echoed = room if limit is None else min(limit, room), ""
            if echo:
                echoed = prompt if isinstance(prompt, str) else self.coder.decode(ids)
            for i in range(body.n or 1):
                request = ClientRequest(ids, max(new, 1), **common, seed=seed + i)
                found.append(Choice(len(found), request, new, kind, echoed))
        return found

    async def pieces(self, connection: Connection, choices: list[Choice]) -> AsyncIterator[dict]:
        """What choices have to say, as it comes. Leaving it cancels them, as does the client that disconnects."""
        requests, thread, loop = [choice.request for choice in choices], self.thread, asyncio.get_running_loop()
        if self.pending + len(requests) > self.at_once:
            raise APIError(429, "too many requests are waiting", "queue_full", **{"Retry-After": "1"})

        def cancel():
            thread.calls.put(lambda: [thread.cancel(request) for request in requests])

        async def watch():
            while (await connection.receive())["type"] != "http.disconnect":
                pass
            cancel()

        thread.loop, self.pending, event = loop, self.pending + len(requests), requests[0].event
        watcher, timer = asyncio.create_task(watch()), loop.call_later(self.options.timeout, cancel)
        try:
            thread.calls.put(lambda: [thread.add(request) for request in requests])
            while not all(choice.ended for choice in choices):
                await event.wait()
                event.clear()
                for choice in choices:
                    if not choice.ended and (piece := choice.take(self.coder)):
                        yield piece
        finally:
            watcher.cancel(), timer.cancel(), cancel()
            self.pending -= len(requests)

    async def reply(self, connection: Connection, body: Chat | Completion) -> Response:
        """The reply to a chat or completion, streamed or collected."""
        choices = await asyncio.to_thread(self.choices, body)
        kind = "chat.completion" if isinstance(body, Chat) else "text_completion"
        head = dict(id=f"{kind[:4]}-{secrets.token_hex(12)}", object=kind, created=int(time.time()), model=self.name)
        stream = self.pieces(connection, choices)
        first = await anext(stream)  # what goes wrong before it has a status of its own
        if not body.stream:
            found = sorted([first, *[piece async for piece in stream]], key=lambda piece: piece["index"])
            return json_reply(head | dict(choices=found, usage=self.usage(body, choices)))
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        head |= dict(object=kind + ".chunk") if isinstance(body, Chat) else {}
        head |= dict(usage=None) if with_usage else {}

        async def events():
            def event(fields):
                return f"data: {json.dumps(fields)}\n\n"

            yield event(head | dict(choices=[first]))
            try:
                async for piece in stream:
                    yield event(head | dict(choices=[piece]))
            except APIError as error:
                yield event(error_fields(error))
                return
            if with_usage:
                yield event(head | dict(choices=[], usage=self.usage(body, choices)))
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    def usage(self, body: Chat | Completion, choices: list[Choice]) -> dict:
        prompts = [choice.request for choice in choices[:: body.n or 1]]
        read, reused = sum(len(request.prompt) for request in prompts), sum(request.reused for request in prompts)
        written = sum(min(len(choice.request.tokens), choice.limit) for choice in choices)
        counts = dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
        return counts | dict(prompt_tokens_details=dict(cached_tokens=reused))

    async def kept(self, connection: Connection, messages: list[api.Message], layer: int | None) -> Response:
        """For each token of a conversation, how many (layer, key/value head) caches hold it after reading all."""
        ids, shape = await asyncio.to_thread(self.render, messages, False), self.info()
        self.check(ids, "messages", 0)
        if layer is not None and layer >= shape["layers"]:
            raise APIError(400, f"layer {layer} must be below {shape['layers']}", param="layer")
        request = ClientRequest(ids, 2, temperature=0.0, wants_held=True)
        async for _ in self.pieces(connection, [Choice(0, request, 2)]):
            pass
        kept, following, feed = Counter(), Counter(), self.coder.stream()
        layers = request.held if layer is None else [request.held[layer]]
        for positions, scores in (pair for each in layers for pair in zip(*(x.tolist() for x in each), strict=True)):
            keys = [(score, at) for score, at in zip(scores, positions, strict=True) if at >= 0]
            kept.update(at for _, at in keys)
            if len(keys) == shape["window"]:
                following[min(keys)[1]] += 1  # the weakest; of equal ones the oldest
        texts = [feed(id) for id in ids]
        texts[-1] += feed(None)
        fields = {name: shape[name] for name in ("window", "layers", "kv_heads")} | dict(layer=layer)
        fields |= dict(object="nanodoge.kept", tokens=texts, possible=len(layers) * shape["kv_heads"])
        counts = {"kept": kept, "next": following}
        return json_reply(fields | {name: [count[i] for i in range(len(ids))] for name, count in counts.items()})

    def info(self) -> dict:
        config, has_tags = self.engine.model.config, set(REASONING_TAGS) <= self.coder.special_tokens.keys()
        sizes = dict(context=self.context, window=config.keep_window_size, layers=config.num_hidden_layers)
        sizes |= dict(kv_heads=config.num_key_value_heads, reasoning=has_tags)
        defaults = dict(temperature=self.options.temperature, top_p=self.options.top_p, max_tokens=None)
        return dict(model=self.name, defaults=defaults) | sizes | self.thread.about

    def metrics(self) -> str:
        """In Prometheus's format."""
        engine = self.engine
        numbers = dict(slots=engine.slots, running=len(engine.live), waiting=len(engine.waiting), pending=self.pending)
        rows = [(name, "gauge", value) for name, value in numbers.items()]
        rows += [(f"{name}_total", "counter", value) for name, value in self.thread.sums.items()]
        text = "".join(f"# TYPE nanodoge_{name} {kind}\nnanodoge_{name} {value}\n" for name, kind, value in rows)
        replies = [f'nanodoge_replies_total{{status="{code}"}} {n}\n' for code, n in sorted(self.statuses.items())]
        return text + "".join(["# TYPE nanodoge_replies_total counter\n", *replies])


# ---- HTTP


class Guard:
    """Before the application (ASGI): the host, the key and the size of what arrives, and the server's end."""

    def __init__(self, app, service: Service):
        self.app, self.service, self.options = app, service, service.options

    def refusal(self, path: str, headers: dict[bytes, bytes]) -> APIError | None:
        options, length = self.options, headers.get(b"content-length", b"0")
        host = re.sub(r":\d*$", "", headers.get(b"host", b"localhost").decode("latin-1")).strip("[]").lower()
        if options.host not in ("0.0.0.0", "::") and host not in (
            "localhost",
            "127.0.0.1",
            "::1",
            options.host.lower(),
        ):
            # a page of another host, whose name its owner points to this machine (DNS rebinding), comes with that name
            return APIError(403, f"this server is not {host[:80]}: see --host", "wrong_host")
        scheme, _, given = headers.get(b"authorization", b"").strip().partition(b" ")
        if scheme.lower() == b"basic":  # of a browser, which asks for a password: user:password in base64
            given = base64.urlsafe_b64decode(given + b"==").partition(b":")[2]
        if path != "/health" and options.api_key and not hmac.compare_digest(given.strip(), options.api_key.encode()):
            return APIError(401, "the API key is missing or wrong", "invalid_api_key", **{"WWW-Authenticate": "Basic"})
        if self.service.is_stopping:
            return APIError(503, "the server is stopping", "stopping", **{"Retry-After": "5", "Connection": "close"})
        if length.isdigit() and int(length) > options.max_body:
            return APIError(413, f"at most {options.max_body} bytes", "too_large")
        return None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size = 0

        async def receive_and_count():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.options.max_body:
                raise APIError(413, f"at most {self.options.max_body} bytes", "too_large", Connection="close")
            return message

        async def count_and_send(message):
            if message["type"] == "http.response.start":
                self.service.statuses[message["status"]] += 1
            await send(message)

        refused = self.refusal(scope["path"], dict(scope["headers"]))
        await (error_reply(refused) if refused else self.app)(scope, receive_and_count, count_and_send)


def make_app(service: Service) -> FastAPI:
    errors = {status: dict(description="An error, in OpenAI's envelope") for status in ("4XX", "5XX")}
    app = FastAPI(title="nanoDoge", docs_url=None, redoc_url=None, responses=errors)
    app.add_middleware(Guard, service=service)
    if origin := service.options.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=[origin], allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    async def error_handler(_, error):
        return error_reply(error)

    add_routes(app, service)
    return app


def add_routes(app: FastAPI, service: Service) -> None:
    streams = {200: {"content": {"text/event-stream": {}}}}
    card = dict(id=service.name, object="model", created=int(time.time()), owned_by="nanodoge")

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(HERE / "nanodoge" / "web" / "chat.html")

    @app.get("/health")
    async def health():
        return dict(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics():
        return Response(service.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models():
        return dict(object="list", data=[card])

    @app.get("/v1/models/{name}")
    async def model(name: str):
        if name != service.name:
            raise APIError(404, f"there is only {service.name}", "model_not_found", "model")
        return card

    @app.post("/v1/chat/completions", responses=streams)
    async def chat(body: Chat, connection: Connection):
        return await service.reply(connection, body)

    @app.post("/v1/completions", responses=streams)
    async def completions(body: Completion, connection: Connection):
        return await service.reply(connection, body)

    @app.get("/v1/nanodoge/info")
    async def info():
        return service.info()

    @app.post("/v1/nanodoge/kept")
    async def kept(
        connection: Connection, messages: Annotated[api.Messages, Body()], layer: Annotated[api.Whole, Body()] = None
    ):
        return await service.kept(connection, messages, layer)

    @app.post("/tokenize")
    async def tokenize(prompt: Annotated[str, Body()], add_special_tokens: Annotated[bool, Body()] = True):
        ids = await asyncio.to_thread(service.encode, prompt, add_special_tokens)
        return dict(tokens=ids, count=len(ids), max_model_len=service.context)

    @app.post("/detokenize")
    async def detokenize(tokens: Annotated[list[int], Body(embed=True)]):
        try:
            return json_reply(dict(prompt=service.coder.decode(tokens)))
        except ValueError as error:
            raise APIError(400, str(error), param="tokens") from None

    @app.get("/tokenizer_info")
    async def tokenizer_info():  # with this lm_eval needs no tokenizer of its own
        return service.coder.names | dict(chat_template=service.coder.chat_template)


class Patient(AutoHTTPProtocol):
    """A connection that is closed if a request does not arrive in time, or its client does not read the reply."""

    patience, late, stuck = 20.0, None, None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.late = self.loop.call_later(self.patience, self.give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_waiting = self.cycle is None or self.cycle.response_complete or self.cycle.more_body  # for the rest
        if self.late and not is_waiting:
            self.late.cancel()
        self.late = (self.late or self.loop.call_later(self.patience, self.give_up)) if is_waiting else None

    def give_up(self) -> None:
        if not self.transport.is_closing():
            body = json.dumps(error_fields(APIError(408, "the request did not arrive in time", "slow")))
            head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            self.transport.write(f"{head}\r\nConnection: close\r\n\r\n{body}".encode())
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stuck.cancel()


class Server(uvicorn.Server):
    """uvicorn, but on a signal it first lets the running requests end. On a second one it ends at once."""

    def __init__(self, service: Service, options: ServeOptions):
        protocol = type("Protocol", (Patient,), dict(patience=options.patience))
        common = dict(ws="none", log_level="error", timeout_graceful_shutdown=1)
        super().__init__(uvicorn.Config(make_app(service), http=protocol, **common))
        self.service, self.grace, self.deadline = service, options.grace, 0.0

    def handle_exit(self, sig: int, frame) -> None:
        self.should_exit = self.force_exit = self.service.is_stopping
        self.service.is_stopping, self.deadline = True, time.monotonic() + self.grace

    async def on_tick(self, counter: int) -> bool:
        is_over = not self.service.pending or time.monotonic() > self.deadline
        self.should_exit |= self.service.is_stopping and is_over
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
