"""An OpenAI-compatible API and a chat page, on a model whose state has constant size.

    python serve.py out/stories-preferences                     the page is at http://127.0.0.1:8000
    python serve.py out/stories-preferences --keep_window_size=64      lossy: see in the page what the model keeps

A client of OpenAI's API needs base_url=http://127.0.0.1:8000/v1 and any key. One thread owns the engine: between two
steps it takes the calls that HTTP handlers left in a queue (add, cancel), and after a step it wakes the handlers whose
requests have new text. So all requests share every step (see nanodoge/engine.py), and a handler only formats text. A
reply that is not streamed is the streamed one, collected. Whoever disconnects frees their slot before the next step.
"""

import asyncio
import base64
import hmac
import json
import socket
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch

from nanodoge import options as parsing
from nanodoge.checkpoint import load_model, load_options
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request
from nanodoge.machine import Machine
from nanodoge.options import HERE, Count, NonNegative, Positive, Range, Share, Whole, one_line
from sample import example

try:
    import uvicorn
    from fastapi import FastAPI, Response
    from fastapi import Request as Connection
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, PlainTextResponse
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from nanodoge import api
    from nanodoge.api import APIError, error_fields, error_reply, json_reply
    from nanodoge.service import EngineThread, Service
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
    backend: Literal["torch", "onnx"] = "torch"  # onnx: new tokens by onnxruntime, on a CPU; faster, above all in int8

    def __post_init__(self):
        parsing.check_ranges(self)
        if len(self.checkpoint) != 1:
            raise ValueError(f"one checkpoint folder, not {len(self.checkpoint)}: {' '.join(self.checkpoint)}")


def load_engine(options: ServeOptions, about: dict) -> Engine:
    """The engine, tried out. about: gets what `info` says of the model (see Service)."""
    machine = Machine(options.device, "auto" if options.dtype == "int8" else options.dtype)
    model, tokenizer = load_model(options.checkpoint[0])
    model, config = model.to(machine.device, machine.dtype), model.config
    if options.keep_window_size > config.keep_window_size:
        valid = f"at most the model's own, {config.keep_window_size}"
        raise ValueError(f"--keep_window_size={options.keep_window_size} must be {valid}")
    config.keep_window_size = options.keep_window_size or config.keep_window_size
    kind = Decoder
    if options.backend == "onnx":
        from nanodoge.onnx_step import OnnxDecoder

        kind = OnnxDecoder
    decoder = kind(model, torch.int8 if options.dtype == "int8" else machine.dtype)
    engine = Engine(model, decoder, options.slots, tokenizer=tokenizer, piece=PIECE, reuse=True)
    trained = load_options(options.checkpoint[0])
    shown = example(engine, str(trained.get("data", "")))
    about["chat"] = "epochs" in trained if trained else bool(tokenizer.chat_template)
    about["example"] = shown and shown[0]
    engine.allocate(config.max_position_embeddings + 2)  # `kept` wants two tokens more
    engine.generate([Request([tokenizer.bos_id], 2)])  # ValueError for damaged weights
    return engine


def load_service(options: ServeOptions) -> Service:
    name, about = Path(options.checkpoint[0]).name, {}
    thread = EngineThread(partial(load_engine, options, about))
    defaults = dict(temperature=options.temperature, top_p=options.top_p)
    return Service(thread, name, defaults, options.max_queue, options.timeout, about)


# ---- HTTP


class Guard:
    """Before the application (ASGI): the key, the size and pace of what arrives, and the server's end."""

    def __init__(self, app, service: Service, options: ServeOptions):
        self.app, self.service, self.options = app, service, options

    def refusal(self, path: str, headers: dict[bytes, bytes]) -> APIError | None:
        options, length = self.options, headers.get(b"content-length", b"0")
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
        most, patience = self.options.max_body, self.options.patience
        loop, size, is_whole = asyncio.get_running_loop(), 0, False
        deadline = loop.time() + patience

        async def receive_in_time():
            nonlocal size, is_whole
            if is_whole:  # what comes then is the disconnection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                raise APIError(408, f"the body took more than {patience} s", "slow", Connection="close") from None
            size, is_whole = size + len(message.get("body", b"")), not message.get("more_body", False)
            if size > most:
                raise APIError(413, f"at most {most} bytes", "too_large", Connection="close")
            return message

        async def count_and_send(message):
            if message["type"] == "http.response.start":
                self.service.statuses[message["status"]] += 1
            await send(message)

        refused = self.refusal(scope["path"], dict(scope["headers"]))
        await (error_reply(refused) if refused else self.app)(scope, receive_in_time, count_and_send)


def make_app(service: Service, options: ServeOptions) -> FastAPI:
    errors = {status: {"model": api.ErrorReply} for status in ("4XX", "5XX")}
    app = FastAPI(title="nanoDoge", docs_url=None, redoc_url=None, responses=errors)
    app.add_middleware(Guard, service=service, options=options)
    if options.cors_origin:
        headers = dict(allow_methods=["*"], allow_headers=["*"])
        app.add_middleware(CORSMiddleware, allow_origins=[options.cors_origin], **headers)

    @app.exception_handler(HTTPException)
    async def http_error(_, error):
        return error_reply(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error):
        first = error.errors()[0]
        where = [str(place) for place in first["loc"] if place != "body"]
        message = f"{'.'.join(where) or 'body'}: {first['msg']}"
        return error_reply(APIError(400, message, "invalid", where[0] if where else None))

    add_routes(app, service)
    return app


def add_routes(app: FastAPI, service: Service) -> None:
    streams = {200: {"content": {"text/event-stream": {}}}}
    card = dict(id=service.name, object="model", created=int(time.time()), owned_by="nanodoge")

    @app.get("/", include_in_schema=False)
    async def page():
        path = HERE / "nanodoge" / "web" / "chat.html"
        if not path.is_file():
            raise APIError(404, "the page is missing")
        return FileResponse(path)

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

    @app.get("/v1/nanodoge/info")
    async def info():
        return service.info()

    @app.post("/v1/chat/completions", responses=streams)
    async def chat(body: api.Chat, connection: Connection):
        return await service.reply(connection, body)

    @app.post("/v1/completions", responses=streams)
    async def completions(body: api.Completion, connection: Connection):
        return await service.reply(connection, body)

    @app.post("/v1/nanodoge/kept")
    async def kept(body: api.Kept, connection: Connection):
        return await service.kept(connection, body)

    @app.post("/tokenize")
    async def tokenize(body: api.Text):
        ids = await asyncio.to_thread(service.encode, body.prompt, body.add_special_tokens)
        return dict(tokens=ids, count=len(ids), max_model_len=service.context)

    @app.post("/detokenize")
    async def detokenize(body: api.Tokens):
        try:
            return json_reply(dict(prompt=service.coder.decode(body.tokens)))
        except ValueError as error:
            raise APIError(400, str(error), param="tokens") from None

    @app.get("/tokenizer_info")
    async def tokenizer_info():  # with this lm_eval needs no tokenizer of its own
        return service.coder.names | dict(chat_template=service.coder.chat_template)


class Patient(H11Protocol):
    """A connection that is closed if a request's first line and headers do not arrive in time."""

    patience, late = 20.0, None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.late = self.loop.call_later(self.patience, self.give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_waiting = self.cycle is None or self.cycle.response_complete  # for the rest of the headers
        if self.late and not is_waiting:
            self.late.cancel()
        self.late = (self.late or self.loop.call_later(self.patience, self.give_up)) if is_waiting else None

    def give_up(self) -> None:
        if not self.transport.is_closing():
            body = json.dumps(error_fields(APIError(408, "the headers did not arrive in time", "slow")))
            head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            self.transport.write(f"{head}\r\nConnection: close\r\n\r\n{body}".encode())
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, but on a signal it first lets the running requests end. On a second one it ends at once."""

    def __init__(self, service: Service, options: ServeOptions):
        protocol = type("Protocol", (Patient,), dict(patience=options.patience))
        common = dict(ws="none", log_level="error", timeout_graceful_shutdown=1)
        super().__init__(uvicorn.Config(make_app(service, options), http=protocol, **common))
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
