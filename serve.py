"""An OpenAI-compatible API and a chat page, on a model whose state has constant size.

    python serve.py out/stories-preferences                     the page is at http://127.0.0.1:8000
    python serve.py out/stories-preferences --keep_window_size=64      lossy: see in the page what the model keeps

A client of OpenAI's API needs base_url=http://127.0.0.1:8000/v1 and any key. Here are the options, the addresses and
the connections. nanodoge/api.py has the words of the API, and how requests share the engine.
"""

import asyncio
import base64
import hmac
import logging
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Annotated, Literal

from nanodoge import options as parsing
from nanodoge.checkpoint import load_model, load_options
from nanodoge.decode import make_decoder
from nanodoge.engine import Engine, Request
from nanodoge.machine import Machine
from nanodoge.options import HERE, Count, NonNegative, Positive, Range, Share, Whole, one_line
from sample import example

try:
    import uvicorn
    from fastapi import Body, FastAPI, Response
    from fastapi import Request as Connection
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, PlainTextResponse
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    from nanodoge import api
    from nanodoge.api import APIError, Service, error_reply, json_reply, refusing
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
    grace: NonNegative = 30.0  # seconds that running requests have after SIGTERM or Ctrl-C; there are no new ones
    # ---- Model
    keep_window_size: Whole = 0  # shrinks the model's window to so many keys, which is lossy; 0 = as it was trained
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"  # of the weights; int8: a byte each, see decode.py
    backend: Literal["auto", "cpp", "onnx", "torch"] = "auto"  # auto: cpp on a CPU with a C++ compiler, else torch

    def __post_init__(self):
        parsing.check_ranges(self)
        if len(self.checkpoint) != 1:
            raise ValueError(f"one checkpoint folder, not {len(self.checkpoint)}: {' '.join(self.checkpoint)}")


def load_service(options: ServeOptions) -> Service:
    """The page is told whether the model was tuned on conversations, and a question that it answers right."""
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
    return Service(options, engine, dict(chat=is_chat, example=shown and shown[0]))


# ---- HTTP


def make_app(service: Service) -> FastAPI:
    errors = {status: dict(description="An error, in OpenAI's envelope") for status in ("4XX", "5XX")}
    handlers = dict.fromkeys((HTTPException, RequestValidationError), lambda _, error: error_reply(error))
    app = FastAPI(title="nanoDoge", docs_url=None, redoc_url=None, responses=errors, exception_handlers=handlers)
    app.add_middleware(guard, options=service.options)
    if origin := service.options.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=[origin], allow_methods=["*"], allow_headers=["*"])
    streams = {200: {"content": {"text/event-stream": {}}}}
    app.get("/metrics", response_class=PlainTextResponse)(service.metrics)
    app.post("/v1/nanodoge/kept")(service.kept)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(HERE / "nanodoge" / "web" / "chat.html")

    @app.get("/health")
    async def health() -> Response:
        return json_reply(dict(status="ok"))

    @app.get("/v1/models")
    async def models() -> Response:
        return json_reply(dict(object="list", data=[service.card]))

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        if name != service.name:
            raise APIError(404, f"there is only {service.name}", "model_not_found", "model")
        return json_reply(service.card)

    @app.post("/v1/chat/completions", responses=streams)
    async def chat(body: api.Chat, connection: Connection) -> Response:
        return await service.reply(body, connection)

    @app.post("/v1/completions", responses=streams)
    async def completions(body: api.Completion, connection: Connection) -> Response:
        return await service.reply(body, connection)

    @app.get("/v1/nanodoge/info")
    async def info() -> Response:
        return json_reply(service.about)

    @app.post("/tokenize")
    async def tokenize(prompt: Annotated[str, Body()], add_special_tokens: Annotated[bool, Body()] = True) -> Response:
        ids = await asyncio.to_thread(service.coder.encode_prompt, prompt, add_special_tokens)
        return json_reply(dict(tokens=ids, count=len(ids), max_model_len=service.context))

    @app.post("/detokenize")
    async def detokenize(tokens: Annotated[list[int], Body(embed=True)]) -> Response:
        with refusing("tokens"):
            return json_reply(dict(prompt=service.coder.decode(tokens)))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:  # with this lm_eval needs no tokenizer of its own
        return json_reply(service.coder.names | dict(chat_template=service.coder.chat_template))

    return app


def refusal(options: ServeOptions, path: str, headers: dict[bytes, bytes]) -> APIError | None:
    """What keeps a request from the application: its host or its key."""
    # A page of another host, whose name its owner points to this machine (DNS rebinding), comes with that name.
    host = re.sub(r":\d*$", "", headers.get(b"host", b"localhost").decode("latin-1")).strip("[]").lower()
    if options.host not in EVERYWHERE and host not in ("localhost", "127.0.0.1", "::1", options.host.lower()):
        return APIError(403, f"this server is not {host[:80]!r}: see --host", "wrong_host")
    scheme, _, given = headers.get(b"authorization", b"").strip().partition(b" ")
    if scheme.lower() == b"basic":  # of a browser, which asks for a password: user:password in base64
        given = base64.urlsafe_b64decode(given + b"==").partition(b":")[2]
    if path != "/health" and options.api_key and not hmac.compare_digest(given.strip(), options.api_key.encode()):
        return APIError(401, "the API key is missing or wrong", "invalid_api_key", **{"WWW-Authenticate": "Basic"})
    return None


def guard(app, options: ServeOptions):
    """An ASGI application: `app` behind `refusal`, with bodies of at most --max_body bytes."""

    async def guarded(scope, receive, send):
        size = 0

        async def limited():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > options.max_body:
                raise APIError(413, f"at most {options.max_body} bytes", "too_large")
            return message

        refused = scope["type"] == "http" and refusal(options, scope["path"], dict(scope["headers"]))
        await (error_reply(refused) if refused else app)(scope, limited, send)

    return guarded


class Server(uvicorn.Server):
    """uvicorn; it also leaves slow clients, and at a second signal it ends at once."""

    def __init__(self, service: Service):
        self.service, self.since = service, {}  # {request or connection: when its client had to act}
        common = dict(http="h11", ws="none", proxy_headers=False, log_level="error")
        common |= dict(timeout_graceful_shutdown=service.options.grace)
        super().__init__(uvicorn.Config(make_app(service), **common))

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        finally:
            self.service.calls.put(None)

    def handle_exit(self, sig: int, frame) -> None:
        if self.should_exit:
            self.force_exit = True
            self.service.calls.put(None)  # from Python 3.12 on, uvicorn would still wait until clients have left
        self.should_exit = True
        logging.getLogger("uvicorn.error").disabled = True  # it would print a traceback of every reply that is cut

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second. True ends the server."""
        now, since, patience = time.monotonic(), {}, self.service.options.patience
        for connection in list(self.server_state.connections):
            cycle, is_stuck = connection.cycle, connection.flow.write_paused
            if not cycle or cycle.more_body or cycle.response_complete or is_stuck:  # the client has to act
                since[cycle or connection] = start = self.since.get(cycle or connection, now)
                if now > start + patience and is_stuck:
                    connection.transport.abort()
                elif now > start + patience:
                    late = error_reply(APIError(408, "the request did not arrive in time")).body
                    head = b"HTTP/1.1 408 Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
                    connection.transport.write(head + late)
                    connection.transport.close()
        self.since = since
        self.service.calls.put(bool)  # does nothing but wake the main thread: without, Windows delivers no Ctrl-C
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
        server = Server(service)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)
        threading.Thread(target=server.run, args=([listening],), daemon=True).start()
        service.run()  # here: OpenMP gives each thread that computes a team of threads; two teams are slow


if __name__ == "__main__":
    parsing.run_command(main)
