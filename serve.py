"""An OpenAI-compatible API and a chat page, on a model whose state has constant size.

    python serve.py out/stories-preferences                     the page is at http://127.0.0.1:8000
    python serve.py out/stories-preferences --keep_window_size=64      lossy: see in the page what the model keeps

A client of OpenAI's API needs base_url=http://127.0.0.1:8000/v1 and any key. Here are the options, the addresses and
the connections. nanodoge/api.py has the words of the API, nanodoge/service.py what is between it and the engine.
"""

import asyncio
import base64
import hmac
import json
import logging
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Literal

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
    from fastapi.responses import FileResponse, PlainTextResponse
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from nanodoge import api
    from nanodoge.api import APIError, Chat, Completion, error_fields, error_reply, json_reply
    from nanodoge.service import EngineThread, Service, refusing
except ImportError as missing:
    print(f"error: serve.py needs two packages: pip install fastapi uvicorn ({one_line(missing)})", file=sys.stderr)
    sys.exit(2)


EVERYWHERE = ("0.0.0.0", "::")  # hosts that mean every address of this machine, whatever its name
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
    engine.allocate(config.max_position_embeddings + 2)  # `kept` wants two tokens more
    engine.generate([Request([tokenizer.bos_id], 2)])  # ValueError for damaged weights
    is_chat = "epochs" in trained if trained else bool(tokenizer.chat_template)
    return engine, dict(chat=is_chat, example=shown and shown[0])


def load_service(options: ServeOptions) -> Service:
    return Service(options, EngineThread(lambda: load_engine(options)))


# ---- HTTP


def refusal(options: ServeOptions, is_stopping: bool, path: str, headers: dict[bytes, bytes]) -> APIError | None:
    """What keeps a request from the application: its host, its key, its size, or the server's end."""
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
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length[:20]) > options.max_body:
        return APIError(413, f"at most {options.max_body} bytes", "too_large")
    return None


def guard(app, service: Service):
    """An ASGI application: `app` behind `refusal`."""

    async def guarded(scope, receive, send):
        refused = None
        if scope["type"] == "http":
            refused = refusal(service.options, service.is_stopping, scope["path"], dict(scope["headers"]))
        await (error_reply(refused) if refused else app)(scope, receive, send)

    return guarded


def make_app(service: Service) -> FastAPI:
    errors = {status: dict(description="An error, in OpenAI's envelope") for status in ("4XX", "5XX")}
    app = FastAPI(title="nanoDoge", docs_url=None, redoc_url=None, responses=errors)
    app.add_middleware(guard, service=service)
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
        ids = await asyncio.to_thread(service.coder.encode_prompt, prompt, add_special_tokens)
        return dict(tokens=ids, count=len(ids), max_model_len=service.context)

    @app.post("/detokenize")
    async def detokenize(tokens: Annotated[list[int], Body(embed=True)]):
        with refusing("tokens"):
            return json_reply(dict(prompt=service.coder.decode(tokens)))

    @app.get("/tokenizer_info")
    async def tokenizer_info():  # with this lm_eval needs no tokenizer of its own
        return service.coder.names | dict(chat_template=service.coder.chat_template)


class Patient(H11Protocol):
    """A connection whose request must arrive in time and not be too large, and whose client must read the reply."""

    patience, max_size = 20.0, 0
    late, stuck, size = None, None, 0

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.late = self.loop.call_later(self.patience, self.refuse, 408, "the request did not arrive in time")

    def data_received(self, data: bytes) -> None:
        self.size += len(data)
        super().data_received(data)
        if self.cycle and not (self.cycle.response_complete or self.cycle.more_body):  # the request is there
            self.late = self.late and self.late.cancel()
            self.size = 0
        elif self.size > self.max_size:
            self.refuse(413, "the request is too large")
        elif not self.late:
            self.late = self.loop.call_later(self.patience, self.refuse, 408, "the request did not arrive in time")

    def refuse(self, status: int, message: str) -> None:
        if not self.transport.is_closing():
            body = json.dumps(error_fields(APIError(status, message)))
            head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
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
        most = options.max_body + 2**17  # with headers
        protocol = type("Protocol", (Patient,), dict(patience=options.patience, max_size=most))
        common = dict(ws="none", log_level="error", timeout_graceful_shutdown=1)
        super().__init__(uvicorn.Config(make_app(service), http=protocol, **common))
        self.service, self.grace, self.deadline = service, options.grace, 0.0

    def handle_exit(self, sig: int, frame) -> None:
        self.should_exit = self.force_exit = self.service.is_stopping
        logging.getLogger("uvicorn.error").disabled = self.force_exit  # it would print a traceback of every reply cut
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
