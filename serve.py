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
import functools
import hmac
import itertools
import json
import queue
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch

from nanodoge.checkpoint import load_model
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request
from nanodoge.machine import Machine
from nanodoge.options import (
    HERE,
    Count,
    NonNegative,
    Positive,
    Range,
    Share,
    Whole,
    check_ranges,
    one_line,
    parse_options,
    run_command,
)
from nanodoge.tokenizer import REASONING_TAGS

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Response
    from fastapi import Request as Connection
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, StreamingResponse
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.exceptions import HTTPException as PlainHTTPException
    from starlette.middleware.cors import CORSMiddleware
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as missing:
    print(f"error: serve.py needs two packages: pip install fastapi uvicorn ({one_line(missing)})", file=sys.stderr)
    sys.exit(2)


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
        check_ranges(self)
        if len(self.checkpoint) != 1:
            raise ValueError(f"one checkpoint folder, not {len(self.checkpoint)}: {' '.join(self.checkpoint)}")


# ---- What clients send. The OpenAPI description is made of these classes.


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    include_usage: bool | None = False


StopText = Annotated[str, Field(max_length=128)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Limit = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """What chats and completions have in common. Other fields are ignored, but for those in UNSUPPORTED."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    max_tokens: Limit | None = Field(None, description="absent: up to the context")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = 1.0
    frequency_penalty: Penalty | None = 0.0
    presence_penalty: Penalty | None = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


class Chat(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = 0


class Completion(Body):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Kept(BaseModel):
    messages: Annotated[list[Message], Field(min_length=1)]
    layer: Annotated[int, Field(ge=0)] | None = None


class Text(BaseModel):
    prompt: str
    add_special_tokens: bool = True


class Tokens(BaseModel):
    tokens: list[int]


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorFields


# Fields that would change the answer: {name: values with which they do not}.
UNSUPPORTED = dict.fromkeys("tools functions logit_bias suffix audio prediction web_search_options".split(), [])
UNSUPPORTED |= {"response_format": [{"type": "text"}], "modalities": [["text"]], "best_of": [1]}


class APIError(HTTPException):
    """An answer that is an error, in OpenAI's envelope."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(status, message, headers)
        self.code, self.param = code, param


def json_reply(content: Any, status: int = 200, headers: dict | None = None) -> Response:
    """json.dumps escapes half characters, which a client can send and UTF-8 cannot hold."""
    return Response(json.dumps(content), status, headers, "application/json")


def error_fields(error: PlainHTTPException) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if error.status_code >= 500 else kinds.get(error.status_code, "invalid_request_error")
    code, param = getattr(error, "code", None), getattr(error, "param", None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": code}}


def error_reply(error: PlainHTTPException) -> Response:
    return json_reply(error_fields(error), error.status_code, error.headers)


# ---- The engine's thread


@dataclass(eq=False)
class ClientRequest(Request):
    """A request of a client, and how its handler is woken: `event` is set when there are new tokens, or, if they are not
    streamed, when it has ended. held: what its row holds after the prompt, if that is wanted (see Engine.held)."""

    event: asyncio.Event = field(default_factory=asyncio.Event)
    streams: bool = False
    wants_held: bool = False
    held: list | None = field(default=None, init=False)


class EngineThread(threading.Thread):
    """The only thread that touches the engine. Others leave calls in a queue; None ends it."""

    def __init__(self, engine: Engine):
        super().__init__(daemon=True)
        self.engine, self.calls, self.active, self.counts = engine, queue.SimpleQueue(), set(), Counter()
        self.loop: asyncio.AbstractEventLoop | None = None  # of the handlers

    def run(self) -> None:
        engine = self.engine
        while True:
            while not self.calls.empty() or not (engine.live or engine.waiting or engine.reader):
                call = self.calls.get()
                if call is None:
                    return
                call()
            try:
                self.notify(engine.step())
            except Exception as error:  # damaged weights, full memory: these requests fail, the server stays
                traceback.print_exception(error)
                for request in self.active:
                    request.finish("error")
                    engine.cancel(request)
                self.notify([])

    def notify(self, new: list[ClientRequest]) -> None:
        """Wakes the handlers of requests with a new token that is streamed, and of those that have ended."""
        ended = {request for request in self.active if request.finish_reason}
        self.active -= ended
        for request in new:
            if request.wants_held and request.held is None:
                request.held = self.engine.held(request)
        for request in ended:
            self.counts.update(prompt_tokens=len(request.prompt), reused_tokens=request.reused)
        self.counts["generated_tokens"] += len(new)
        events = {request.event for request in (*new, *ended) if request.streams or request in ended}
        if events:
            self.loop.call_soon_threadsafe(lambda: [event.set() for event in events])

    def add(self, request: ClientRequest) -> None:
        self.active.add(request)
        self.engine.add(request)

    def cancel(self, request: ClientRequest) -> None:
        if request in self.active:
            self.engine.cancel(request)
            self.notify([])


# ---- From tokens to pieces of a reply


class Piece(NamedTuple):
    """What is new in one choice."""

    index: int
    text: str = ""
    thoughts: str = ""
    scores: tuple = ()  # [(token, its score: see Request.scores)]
    finish_reason: str | None = None


def split_thoughts(text: str, is_complete: bool) -> tuple[str, str]:
    """(thoughts, answer) of what a reasoning model wrote. A tag that has only begun is held back."""
    text = text if is_complete else re.sub(r"<(\|\w*\|?)?$", "", text)
    parts, inside = ["", ""], 1
    for piece in re.split(f"({'|'.join(map(re.escape, REASONING_TAGS))})", text):
        if piece in REASONING_TAGS:
            inside = 0 if piece == REASONING_TAGS[0] else 1
        else:
            parts[inside] += piece
    return parts[0].lstrip(), parts[1].lstrip() if len(parts[1]) < len(text) else text


class Choice:
    """One of the continuations that a client asked for, and how much of it has been sent."""

    def __init__(self, index: int, request: ClientRequest, is_chat: bool, limit: int, echoed: str):
        """limit: as max_tokens; the engine makes at least one token. echoed: the prompt's text, or ""."""
        self.index, self.request, self.is_chat, self.limit = index, request, is_chat, limit
        self.echoed, self.sent, self.scored, self.ended = echoed, [0, 0], 0, False

    def pieces(self) -> list[Piece]:
        """What has come since the last call. Raises APIError if the request could not be completed."""
        request, reason = self.request, self.request.finish_reason  # first: when it is there, so is all the rest
        if reason == "cancelled":
            raise APIError(504, "the reply took longer than this server allows", "timeout")
        if reason == "error":
            raise APIError(503, "the model could not compute this request", "engine_error")
        parts = ["", self.echoed + (request.text.text if request.text and self.limit else "")]
        if self.is_chat:
            parts = split_thoughts(parts[1], bool(reason))
        new = [part[sent:] for part, sent in zip(parts, self.sent, strict=True)]
        ids = (request.prompt if request.echo else []) + request.tokens[: self.limit]
        scores = tuple(zip(ids, request.scores, strict=False))[self.scored :]
        self.sent, self.scored = [len(part) for part in parts], self.scored + len(scores)
        found = [Piece(self.index, new[1], new[0], scores)] if any(new) or scores else []
        self.ended = bool(reason)
        return found + ([Piece(self.index, finish_reason=reason if self.limit else "length")] if reason else [])


class Service:
    """A model and the clients it serves."""

    def __init__(self, options: ServeOptions):
        self.options, self.name, self.created = options, Path(options.checkpoint[0]).name, int(time.time())
        machine = Machine(options.device, "auto" if options.dtype == "int8" else options.dtype)
        model, self.tokenizer = load_model(options.checkpoint[0])
        model, config = model.to(machine.device, machine.dtype), model.config
        if options.keep_window_size > config.keep_window_size:
            valid = f"at most the model's own, {config.keep_window_size}"
            raise ValueError(f"--keep_window_size={options.keep_window_size} must be {valid}")
        config.keep_window_size = options.keep_window_size or config.keep_window_size
        decoder = Decoder(model, torch.int8 if options.dtype == "int8" else machine.dtype)
        self.config, self.context = config, config.max_position_embeddings
        engine = Engine(model, decoder, options.slots, tokenizer=self.tokenizer, reuse=True)
        engine.allocate(self.context + 2)  # two, because Kept wants a token and one more
        engine.generate([Request([self.tokenizer.bos_id], 2)])  # ValueError for damaged weights
        self.thread, self.pending, self.stopping, self.statuses = EngineThread(engine), 0, 0.0, Counter()
        self.thread.start()

    # ---- From what a client sent to requests of the engine

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Special tokens written in a text are these tokens, and BOS stands in front, as evaluate.py has it."""
        coder, ids = self.tokenizer, []
        for i, part in enumerate(coder.split[None](text)):
            ids += [coder.special_tokens[part]] if i % 2 else coder.encode(part)
        return ids if not add_bos or ids[:1] == [coder.bos_id] else [coder.bos_id, *ids]

    def render(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        if len(messages) > self.context // 4:  # a message has at least four tokens
            raise self.too_long(f"{len(messages)} messages")
        roles = {"developer": "system"}
        rows = [dict(role=roles.get(m.role, m.role), content=self.text_of(m.content)) for m in messages]
        try:
            return self.tokenizer.render(rows, add_generation_prompt)[0]
        except ValueError as error:
            raise APIError(400, str(error), param="messages") from None

    def text_of(self, content: str | list[Part] | None) -> str:
        return content if isinstance(content, str) else "".join(part.text for part in content or ())

    def too_long(self, what: str) -> APIError:
        words = f"this model's context is {self.context} tokens, and the prompt has {what}"
        return APIError(400, words, "context_length_exceeded", "messages")

    def check(self, ids: list[int], new: int = 1) -> list[int]:
        if not ids:
            raise APIError(400, "the prompt is empty", param="prompt")
        if len(ids) + new > self.context:
            raise self.too_long(f"{len(ids)}")
        try:
            self.tokenizer.decode(ids)
        except ValueError as error:
            raise APIError(400, str(error), param="prompt") from None
        return ids

    def choices(self, body: Chat | Completion) -> list[Choice]:
        """The requests of a chat or completion. Raises APIError for what cannot be done."""
        for name, harmless in UNSUPPORTED.items():
            value = (body.model_extra or {}).get(name)
            if value not in (None, [], {}, "", *harmless):
                raise APIError(400, f"{name} is not supported", "unsupported_parameter", name)
        is_chat, limit, coder = isinstance(body, Chat), body.max_tokens, self.tokenizer
        if is_chat:
            limit = limit if body.max_completion_tokens is None else body.max_completion_tokens
            prompts = [self.render(body.messages, True)]
        else:
            given = body.prompt
            is_list = isinstance(given, list) and not (given and isinstance(given[0], int))
            prompts = [self.encode(p) if isinstance(p, str) else p for p in (given if is_list else [given])]
        n, at_once = body.n or 1, self.options.slots + self.options.max_queue
        if not 0 < len(prompts) * n <= at_once:
            raise APIError(400, f"from 1 to {at_once} continuations at once", param="n")
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        temperature = self.options.temperature if body.temperature is None else body.temperature
        common = dict(
            temperature=temperature if temperature >= 1e-3 else 0.0,  # logits are divided by it
            top_p=self.options.top_p if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            stop=stop,
            stop_ids=[coder.eos_id],
            event=asyncio.Event(),
            streams=bool(body.stream),
        )
        if is_chat:
            common["logprobs"] = body.top_logprobs or 0 if body.logprobs else None
        else:
            common |= dict(logprobs=body.logprobs, echo=bool(body.echo) and body.logprobs is not None)
        seed, found = secrets.randbits(62) if body.seed is None else body.seed, []
        for number, ids in enumerate(prompts):
            room = self.context - len(self.check(ids, 0 if limit == 0 else 1))
            echoed = "" if is_chat or not body.echo else self.echoed(body, number, ids)
            new = room if limit is None else min(limit, room)
            for i in range(n):
                request = ClientRequest(ids, max(new, 1), seed=seed + i, **common)
                found.append(Choice(number * n + i, request, is_chat, new, echoed))
        return found

    def echoed(self, body: Completion, number: int, ids: list[int]) -> str:
        """The text of a prompt, as it was given."""
        given = body.prompt[number] if isinstance(body.prompt, list) and body.prompt else body.prompt
        return given if isinstance(given, str) else self.tokenizer.decode(ids)

    async def follow(self, connection: Connection, choices: list[Choice]):
        """Yields the Pieces of choices as they come. Leaving it cancels them, as does the client that disconnects."""
        requests, thread, loop = [choice.request for choice in choices], self.thread, asyncio.get_running_loop()
        if self.pending + len(requests) > self.options.slots + self.options.max_queue:
            raise APIError(429, "too many requests are waiting", "queue_full", **{"Retry-After": "1"})

        def cancel():
            for request in requests:
                thread.calls.put(functools.partial(thread.cancel, request))

        async def watch():
            while (await connection.receive())["type"] != "http.disconnect":
                pass
            cancel()

        thread.loop, self.pending, event = loop, self.pending + len(requests), requests[0].event
        watcher, timer = asyncio.create_task(watch()), loop.call_later(self.options.timeout, cancel)
        try:
            for request in requests:
                thread.calls.put(functools.partial(thread.add, request))
            while not all(choice.ended for choice in choices):
                await event.wait()
                event.clear()
                for choice in choices:
                    for piece in () if choice.ended else choice.pieces():
                        yield piece
        finally:
            watcher.cancel(), timer.cancel(), cancel()
            self.pending -= len(requests)

    # ---- Replies

    async def reply(self, connection: Connection, body: Chat | Completion) -> Response:
        """The reply to a chat or completion, streamed or collected."""
        choices = await asyncio.to_thread(self.choices, body)
        is_chat = isinstance(body, Chat)
        kind = "chat.completion" if is_chat else "text_completion"
        head = dict(id=f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}", object=kind)
        head |= dict(created=int(time.time()), model=self.name)
        stream = self.follow(connection, choices)
        first = await anext(stream)  # what goes wrong before it has a status of its own
        if body.stream:
            head["object"] += ".chunk" if is_chat else ""
            return StreamingResponse(self.events(head, body, choices, first, stream), media_type="text/event-stream")
        found: list[list[Piece]] = [[] for _ in choices]
        found[first.index].append(first)
        async for piece in stream:
            found[piece.index].append(piece)
        whole = [self.collect(pieces) for pieces in found]
        shown = [self.choice_fields(piece, body, "message") for piece in whole]
        return json_reply(head | dict(choices=shown, usage=self.usage(body, choices)))

    def collect(self, pieces: list[Piece]) -> Piece:
        index, texts, thoughts, scores, reasons = zip(*pieces, strict=True)
        return Piece(index[0], "".join(texts), "".join(thoughts), sum(scores, ()), reasons[-1])

    async def events(self, head: dict, body: Chat | Completion, choices: list[Choice], first: Piece, stream):
        """The server-sent events of a streamed reply."""

        def event(content):
            return f"data: {json.dumps(content)}\n\n"

        usage = dict(usage=None) if body.stream_options and body.stream_options.include_usage else {}
        try:
            for choice in choices if isinstance(body, Chat) else ():
                delta = dict(index=choice.index, delta=dict(role="assistant", content=""), finish_reason=None)
                yield event(head | dict(choices=[delta]) | usage)
            yield event(head | dict(choices=[self.choice_fields(first, body, "delta")]) | usage)
            async for piece in stream:
                yield event(head | dict(choices=[self.choice_fields(piece, body, "delta")]) | usage)
        except APIError as error:
            yield event(error_fields(error))
            return
        if usage:
            yield event(head | dict(choices=[], usage=self.usage(body, choices)))
        yield "data: [DONE]\n\n"

    def choice_fields(self, piece: Piece, body: Chat | Completion, name: str) -> dict:
        """A choice of a reply. name: of the field with a chat's text, "message" or "delta"."""
        fields, scores = dict(index=piece.index, finish_reason=piece.finish_reason, logprobs=None), piece.scores
        if isinstance(body, Completion):
            offset = len(piece.text)
            return fields | dict(text=piece.text, logprobs=self.completion_logprobs(scores) if scores else None)
        text = dict(content=piece.text) if piece.text or name == "message" else {}
        text |= dict(reasoning_content=piece.thoughts) if piece.thoughts else {}
        if scores:
            fields["logprobs"] = dict(content=[self.token_fields(id, own, top) for id, (own, top) in scores])
        return fields | {name: text | (dict(role="assistant") if name == "message" else {})}

    def token_fields(self, id: int, logprob: float, top: list = ()) -> dict:
        likeliest = dict(top_logprobs=[self.token_fields(*pair) for pair in top]) if top is not None else {}
        data = self.tokenizer.token_bytes(id)
        return dict(token=self.token_text(id), logprob=logprob, bytes=list(data)) | likeliest

    def token_text(self, id: int) -> str:
        """The text of a token. Half a character is written as OpenAI writes it, so that different tokens differ."""
        data = self.tokenizer.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def completion_logprobs(self, scores: tuple) -> dict:
        tokens = [self.token_text(id) for id, _ in scores]
        top = [score and {self.token_text(id): x for id, x in [*score[1], (i, score[0])]} for i, score in scores]
        offsets = [0, *itertools.accumulate(map(len, tokens))][:-1]
        own = [score and score[0] for _, score in scores]
        return dict(tokens=tokens, token_logprobs=own, top_logprobs=top, text_offset=offsets)

    def usage(self, body: Chat | Completion, choices: list[Choice]) -> dict:
        prompts = choices[:: body.n or 1]
        read = sum(len(choice.request.prompt) for choice in prompts)
        written = sum(min(len(choice.request.tokens), choice.limit) for choice in choices)
        reused = dict(cached_tokens=sum(choice.request.reused for choice in prompts))
        counts = dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
        return counts | dict(prompt_tokens_details=reused)

    async def kept(self, connection: Connection, body: Kept) -> dict:
        """Which tokens of a conversation each layer's cache still holds; read from the engine's own."""
        ids = self.check(await asyncio.to_thread(self.render, body.messages, False), 0)
        layers, heads, window = (
            self.config.num_hidden_layers,
            self.config.num_key_value_heads,
            self.config.keep_window_size,
        )
        if body.layer is not None and body.layer >= layers:
            raise APIError(400, f"layer {body.layer} must be below {layers}", param="layer")
        request = ClientRequest(ids, 2, temperature=0.0, wants_held=True)
        async for _ in self.follow(connection, [Choice(0, request, False, 2, "")]):
            pass
        kept, following = Counter(), Counter()
        for position, s in request.held if body.layer is None else [request.held[body.layer]]:
            for positions, scores in zip(position.tolist(), s.tolist(), strict=True):
                keys = [(score, p) for score, p in zip(scores, positions, strict=True) if p >= 0]
                kept.update(p for _, p in keys)
                if len(keys) == window:
                    following[min(keys)[1]] += 1  # the weakest; of equal ones the oldest
        feed, places = self.tokenizer.stream(), range(len(ids))
        texts = [feed(id) for id in ids]
        texts[-1] += feed(None)
        shape = dict(object="nanodoge.kept", window=window, layers=layers, kv_heads=heads, layer=body.layer)
        counts = dict(kept=[kept[i] for i in places], next=[following[i] for i in places])
        return shape | dict(tokens=texts, possible=heads * (layers if body.layer is None else 1)) | counts

    def info(self) -> dict:
        options, shape = self.options, self.config
        defaults = dict(temperature=options.temperature, top_p=options.top_p, max_tokens=None)
        return dict(
            model=self.name,
            context=self.context,
            window=shape.keep_window_size,
            layers=shape.num_hidden_layers,
            kv_heads=shape.num_key_value_heads,
            chat=bool(self.tokenizer.chat_template),
            reasoning=set(REASONING_TAGS) <= self.tokenizer.special_tokens.keys(),
            defaults=defaults,
        )

    def metrics(self) -> str:
        engine, counts = self.thread.engine, self.thread.counts
        gauges = dict(slots=engine.slots, running=len(engine.live), waiting=len(engine.waiting), pending=self.pending)
        gauges |= dict(kept_rows=len(engine.kept))
        lines = [f"# TYPE nanodoge_{name} gauge\nnanodoge_{name} {value}" for name, value in gauges.items()]
        lines += [
            f"# TYPE nanodoge_{name}_total counter\nnanodoge_{name}_total {counts[name]}"
            for name in ("prompt_tokens", "reused_tokens", "generated_tokens")
        ]
        lines += ["# TYPE nanodoge_replies_total counter"]
        lines += [f'nanodoge_replies_total{{status="{s}"}} {count}' for s, count in sorted(self.statuses.items())]
        return "\n".join(lines) + "\n"


# ---- HTTP


class Guard:
    """Before the application (ASGI): the key, the size and pace of what arrives, and the server's end."""

    def __init__(self, app, service: Service):
        self.app, self.service = app, service

    def refusal(self, path: str, headers: dict[bytes, bytes]) -> APIError | None:
        options, length = self.service.options, headers.get(b"content-length", b"0")
        scheme, _, given = headers.get(b"authorization", b"").strip().partition(b" ")
        if scheme.lower() == b"basic":  # of a browser, which asks for a password: user:password in base64
            given = base64.b64decode(given + b"==").partition(b":")[2]
        if path != "/health" and options.api_key and not hmac.compare_digest(given.strip(), options.api_key.encode()):
            return APIError(401, "the API key is missing or wrong", "invalid_api_key", **{"WWW-Authenticate": "Basic"})
        if self.service.stopping:
            return APIError(503, "the server is stopping", "stopping", **{"Retry-After": "5", "Connection": "close"})
        if length.isdigit() and int(length) > options.max_body:
            return APIError(413, f"at most {options.max_body} bytes", "too_large")
        return None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        options, loop, size, is_whole = self.service.options, asyncio.get_running_loop(), 0, False
        deadline = loop.time() + options.patience

        async def receive_in_time():
            nonlocal size, is_whole
            if is_whole:  # what comes then is the disconnection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                raise APIError(
                    408, f"the body did not arrive in {options.patience} s", "slow", Connection="close"
                ) from None
            size, is_whole = size + len(message.get("body", b"")), not message.get("more_body", False)
            if size > options.max_body:
                raise APIError(413, f"at most {options.max_body} bytes", "too_large", Connection="close")
            return message

        async def count_and_send(message):
            if message["type"] == "http.response.start":
                self.service.statuses[message["status"]] += 1
            await send(message)

        refused = self.refusal(scope["path"], dict(scope["headers"]))
        await (error_reply(refused) if refused else self.app)(scope, receive_in_time, count_and_send)


def make_app(service: Service) -> FastAPI:
    """The routes."""
    errors = {status: {"model": ErrorReply} for status in ("4XX", "5XX")}
    app = FastAPI(title="nanoDoge", docs_url=None, redoc_url=None, responses=errors)
    app.add_middleware(Guard, service=service)
    if service.options.cors_origin:
        headers = dict(allow_methods=["*"], allow_headers=["*"])
        app.add_middleware(CORSMiddleware, allow_origins=[service.options.cors_origin], **headers)

    @app.exception_handler(PlainHTTPException)
    async def http_error(_, error):
        return error_reply(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error):
        first = error.errors()[0]
        where = [str(place) for place in first["loc"] if place != "body"]
        return error_reply(
            APIError(400, f"{'.'.join(where) or 'body'}: {first['msg']}", "invalid", where[0] if where else None)
        )

    card = dict(id=service.name, object="model", created=service.created, owned_by="nanodoge")

    @app.get("/", include_in_schema=False)
    async def page():
        path = HERE / "nanodoge" / "web" / "chat.html"
        if not path.is_file():
            raise APIError(404, "the page is missing")
        return FileResponse(path)

    @app.get("/health")
    async def health():
        return dict(status="ok")

    @app.get("/metrics")
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

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, connection: Connection):
        return await service.reply(connection, body)

    @app.post("/v1/completions")
    async def completions(body: Completion, connection: Connection):
        return await service.reply(connection, body)

    @app.post("/v1/nanodoge/kept")
    async def kept(body: Kept, connection: Connection):
        return json_reply(await service.kept(connection, body))

    @app.post("/tokenize")
    async def tokenize(body: Text):
        ids = await asyncio.to_thread(service.encode, body.prompt, body.add_special_tokens)
        return dict(tokens=ids, count=len(ids), max_model_len=service.context)

    @app.post("/detokenize")
    async def detokenize(body: Tokens):
        try:
            return json_reply(dict(prompt=service.tokenizer.decode(body.tokens)))
        except ValueError as error:
            raise APIError(400, str(error), param="tokens") from None

    @app.get("/tokenizer_info")
    async def tokenizer_info():  # with this lm_eval needs no tokenizer of its own
        return service.tokenizer.names | dict(chat_template=service.tokenizer.chat_template)

    return app


class Server(uvicorn.Server):
    """uvicorn, but on a signal it first lets the running requests end; on the second it ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame) -> None:
        if self.service.stopping:
            self.should_exit = self.force_exit = True
        self.service.stopping = time.monotonic() + self.service.options.grace

    async def on_tick(self, counter: int) -> bool:
        is_over = not self.service.pending or time.monotonic() > self.service.stopping
        self.should_exit |= bool(self.service.stopping and is_over)
        return await super().on_tick(counter)


def make_server(service: Service) -> Server:
    class Patient(H11Protocol):
        """Closes a connection whose request line and headers do not arrive in time."""

        late = None

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            reading = self.cycle is None or self.cycle.response_complete
            if not reading and self.late:
                self.late.cancel()
            self.late = self.late or self.watch() if reading else None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self.late = self.watch()

        def watch(self):
            return self.loop.call_later(service.options.patience, self.give_up)

        def give_up(self) -> None:
            body = json.dumps(error_fields(APIError(408, "the headers did not arrive in time", "slow")))
            head = f"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            self.transport.write(f"{head}\r\nconnection: close\r\n\r\n{body}".encode())
            self.transport.close()

    config = uvicorn.Config(make_app(service), http=Patient, ws="none", log_level="error", timeout_graceful_shutdown=1)
    return Server(config, service)


def main(argv: list[str]) -> None:
    options = parse_options(ServeOptions, argv, positional="checkpoint")
    service = Service(options)
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.create_server((options.host, options.port), family=family, backlog=2048) as listening:
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{host}:{listening.getsockname()[1]}"
        print(
            f"{service.name}, {options.slots} slots, context {service.context}: {url}  (API: {url}/v1; Ctrl-C ends it)"
        )
        if options.keep_window_size:
            print(f"each layer keeps {options.keep_window_size} keys, fewer than the model was trained with: lossy")
        key = f" -H 'Authorization: Bearer {options.api_key}'" if options.api_key else ""
        body = '{"messages": [{"role": "user", "content": "Hello"}]}'
        print(f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'", flush=True)
        make_server(service).run(sockets=[listening])
    service.thread.calls.put(None)
    service.thread.join()


if __name__ == "__main__":
    run_command(main)
