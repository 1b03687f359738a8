"""OpenAI's API on an engine: what clients may send, what they get, and what is done for it. (serve.py is the server.)

A request body is a pydantic model, which checks it and describes it in /openapi.json. A Choice turns tokens into the
fields of a reply, as many as have come since it was last asked: a chunk of a stream, or all. A Service has the engine.
"""

import asyncio
import itertools
import json
import queue
import re
import secrets
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from fastapi import Body, HTTPException, Response
from fastapi import Request as Connection
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nanodoge.engine import Engine, Request
from nanodoge.tokenizer import REASONING_TAGS, Tokenizer

PAUSE = 0.02  # seconds between two chunks of a stream: to wake for one takes 0.3 ms of the cores that the engine needs
LONG = 20_000  # bytes of a body that another thread encodes: that takes some ms, and the hand-over 0.3 ms
CHUNKS = 500  # chunks a second of all streams together, which share these moments: each takes 0.06 ms

# ---- What clients send

Penalty = Annotated[float, Field(ge=-2, le=2)] | None
Share = Annotated[float, Field(ge=0, le=1)] | None
Whole = Annotated[int, Field(ge=0, lt=2**31)] | None
Few = Annotated[int, Field(ge=0, le=20)] | None
StopText = Annotated[str, Field(max_length=128)]


class Part(BaseModel):
    type: Literal["text"]
    text: str


def joined(content: str | list[Part] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[Part] | None, AfterValidator(joined)] = ""


Messages = Annotated[list[Message], Field(min_length=1)]


class Sampled(BaseModel):
    """What chats and completions have in common. Null means absent. Other fields are ignored, but for UNSUPPORTED."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    model: str | None = None
    stream: bool | None = False
    stream_options: dict | None = Field(None, description="include_usage: whether the last chunk has the usage")
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    max_tokens: Whole = Field(None, description="absent: up to the context")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: bool | None = False
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share = None
    top_k: Whole = None
    min_p: Share = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None


class Chat(Sampled):
    messages: Messages
    max_completion_tokens: Whole = None
    logprobs: bool | None = False
    top_logprobs: Few = 0


class Completion(Sampled):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    echo: bool | None = False
    logprobs: Few = None


# Fields that would change the answer: {name: values with which they do not}.
UNSUPPORTED = dict.fromkeys("tools functions logit_bias suffix audio prediction web_search_options".split(), ())
UNSUPPORTED |= {"response_format": [{"type": "text"}], "modalities": [["text"]], "best_of": [1]}
SAMPLING = set("temperature top_p top_k min_p repetition_penalty frequency_penalty presence_penalty".split())

# ---- Errors


class APIError(HTTPException):
    """A reply that is an error: its status, its message, and a code that clients know."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(status, message, headers)
        self.code, self.param = code, param


@contextmanager
def refusing(param: str):
    """Within it a ValueError says what is wrong with a parameter."""
    try:
        yield
    except ValueError as error:
        raise APIError(400, str(error), param=param) from None


def json_reply(content: dict, status: int = 200, headers: dict | None = None) -> Response:
    """json.dumps escapes half characters, which a client can send and UTF-8 cannot hold."""
    return Response(json.dumps(content), status, headers, "application/json")


def error_reply(error: Exception) -> Response:
    """An error in OpenAI's envelope."""
    if isinstance(error, RequestValidationError):
        # Of a field that may be a text or a list, one error says that it is not the other.
        first = min(error.errors(), key=lambda error: error["type"].endswith("_type"))
        where = [str(place) for place in first["loc"] if place != "body"]
        error = APIError(400, f"{'.'.join(where) or 'body'}: {first['msg']}", "invalid", where[0] if where else None)
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if error.status_code >= 500 else kinds.get(error.status_code, "invalid_request_error")
    about = {name: getattr(error, name, None) for name in ("param", "code")}  # Starlette's own errors have none
    return json_reply(dict(error=dict(message=error.detail, type=kind) | about), error.status_code, error.headers)


# ---- From tokens to replies


@dataclass(eq=False)
class Choice(Request):
    """One of the continuations that a client asked for: a Request, and how much of it has been taken."""

    index: int = 0
    limit: int = 1  # new tokens at most; the engine makes at least one
    kind: str = "text"  # the field of the reply: "text" or, of a chat, "message" or "delta"
    echoed: str = ""  # the prompt's text, if it is wanted
    streams: bool = False
    event: asyncio.Event = field(default_factory=asyncio.Event)  # set at the end and, if it streams, at a first token
    sent: dict[str, int] = field(default_factory=dict, init=False)  # {field: how much of its text}
    scored: int = field(default=0, init=False)  # tokens whose log-probabilities were taken
    ended: bool = field(default=False, init=False)  # all was taken

    def take(self, coder: Tokenizer) -> dict | None:
        """The fields of a reply, with what has come since the last call. Raises APIError if the request failed."""
        reason = self.finish_reason  # first: when it is there, so is all the rest
        if reason == "cancelled":
            raise APIError(504, "the reply took longer than this server allows", "timeout")
        if reason == "error":
            raise APIError(503, "the model could not compute this request", "engine_error")
        if not (reason or self.streams):
            return None
        text, scores = self.echoed + (self.text.text if self.limit and self.text else ""), []
        thoughts, answer = ("", text) if self.kind == "text" else split_thoughts(text, bool(reason))
        whole = dict(text=text) if self.kind == "text" else dict(content=answer, reasoning_content=thoughts)
        before, new = self.sent, {name: part[self.sent.get(name, 0) :] for name, part in whole.items()}
        if self.logprobs is not None:
            ids = (self.prompt if self.echo else []) + self.tokens[: self.limit]
            scores = list(zip(ids, self.scores, strict=False))[self.scored :]
        if not (any(new.values()) or scores or reason):
            return None
        self.sent = {name: len(part) for name, part in whole.items()}
        self.scored, self.ended = self.scored + len(scores), bool(reason)
        fields = dict(index=self.index, finish_reason=(reason and (reason if self.limit else "length")) or None)
        if self.kind == "text":
            return fields | new | dict(logprobs=text_logprobs(coder, scores, before.get("text", 0)) if scores else None)
        fields["logprobs"] = dict(content=[chat_logprob(coder, *score) for score in scores]) if scores else None
        message = {} if before else dict(role="assistant", content="")
        return fields | {self.kind: message | {name: part for name, part in new.items() if part}}


def split_thoughts(text: str, is_complete: bool) -> tuple[str, str]:
    """(thoughts, answer) of what a reasoning model wrote. A tag that has only begun is held back."""
    if "<" not in text:
        return "", text.lstrip()
    text = text if is_complete else re.sub(r"<(\|\w*\|?)?$", "", text)
    pieces = re.split(f"({'|'.join(map(re.escape, REASONING_TAGS))})", text)
    parts = list(zip(["", *pieces[1::2]], pieces[::2], strict=True))
    thoughts = "".join(piece for tag, piece in parts if tag == REASONING_TAGS[0])
    return thoughts.lstrip(), "".join(piece for tag, piece in parts if tag != REASONING_TAGS[0]).lstrip()


def token_text(coder: Tokenizer, id: int) -> str:
    """The text of a token. Half a character is written by its bytes, as OpenAI does: different tokens differ."""
    data = coder.token_bytes(id)
    text = data.decode(errors="backslashreplace")
    return text if text.encode() == data else f"bytes:{text}"


def chat_logprob(coder: Tokenizer, id: int, score: tuple) -> dict:
    def fields(id, logprob):
        return dict(token=token_text(coder, id), logprob=logprob, bytes=list(coder.token_bytes(id)))

    return fields(id, score[0]) | dict(top_logprobs=[fields(*pair) for pair in score[1]])


def text_logprobs(coder: Tokenizer, scores: list, offset: int) -> dict:
    """The log-probabilities of a completion. A token's own is always among the likeliest."""
    tokens = [token_text(coder, id) for id, _ in scores]
    top = [score and {token_text(coder, i): x for i, x in [*score[1], (id, score[0])]} for id, score in scores]
    offsets = [*itertools.accumulate(map(len, tokens), initial=offset)][:-1]
    own = [score and score[0] for _, score in scores]
    return dict(tokens=tokens, token_logprobs=own, top_logprobs=top, text_offset=offsets)


@dataclass(eq=False)
class HeldChoice(Choice):
    """A choice that remembers what its caches hold when its prompt has been read: see Engine.held."""

    engine: Engine | None = None

    def append(self, id: int) -> None:
        self.held = self.engine.held(self)
        super().append(id)


# ---- The engine and its clients


class Service:
    """An engine and its clients. `run` belongs to the thread that made the engine, the handlers to an event loop.

    A handler leaves calls in a queue, which `run` makes between two steps of the engine: to add or to cancel requests.
    So all requests share every step (see nanodoge/engine.py), handlers never wait for a step, nor does the engine for
    clients. `run` wakes a handler at the first token and at the end. One that streams looks by itself what has
    come, some times a second. A reply that is not streamed is the streamed one, collected.
    """

    def __init__(self, options, engine: Engine, about: dict):
        """options: serve.py's ServeOptions. about: what the page is told besides."""
        self.options, self.name = options, Path(options.checkpoint[0]).name
        self.engine, self.coder, config = engine, engine.tokenizer, engine.model.config
        self.context = config.max_position_embeddings
        self.defaults = dict(temperature=options.temperature, top_p=options.top_p)
        self.about = dict(model=self.name, defaults=self.defaults, context=self.context, window=config.keep_window_size)
        self.about |= dict(layers=config.num_hidden_layers, kv_heads=config.num_key_value_heads) | about
        self.card = dict(id=self.name, object="model", created=int(time.time()), owned_by="nanodoge")
        self.pending, self.at_once = 0, options.slots + options.max_queue  # requests that run or wait; most of them
        self.calls, self.active, self.loop = queue.SimpleQueue(), set(), None  # loop: of the handlers
        self.sums = Counter(prompt_tokens=0, reused_tokens=0, generated_tokens=0)

    # ---- The engine's thread

    def run(self) -> None:
        """Makes the calls in `calls`, and steps of the engine while there are requests. A None in it ends this."""
        while True:
            while not (self.active and self.calls.empty()):
                if (call := self.calls.get()) is None:
                    return
                call()
            try:
                self.notify(self.engine.step())
            except Exception as error:  # damaged weights, full memory: these requests fail, the server stays
                traceback.print_exception(error)
                for request in self.active:
                    request.finish("error")
                self.cancel(self.active)

    def notify(self, new: list[Choice]) -> None:
        """Counts, and wakes the handlers of what has ended or begun."""
        ended = {request for request in self.active if request.finish_reason}
        self.active -= ended
        for request in ended:
            self.sums["prompt_tokens"] += len(request.prompt)
            self.sums["reused_tokens"] += request.reused
        self.sums["generated_tokens"] += len(new)
        if to_wake := ended.union(request for request in new if request.streams and len(request.tokens) == 1):
            with suppress(RuntimeError):  # the loop is closed: a second signal has ended the server
                self.loop.call_soon_threadsafe(lambda: [request.event.set() for request in to_wake])

    def add(self, requests: list[Choice]) -> None:
        self.active.update(requests)
        for request in requests:
            self.engine.add(request)

    def cancel(self, requests: Collection[Choice]) -> None:
        for request in self.active.intersection(requests):
            self.engine.cancel(request)
        self.notify([])

    # ---- The handlers

    async def metrics(self) -> Response:
        """Counts in Prometheus's format."""
        rows = dict(slots=self.engine.slots, running=len(self.engine.live), waiting=len(self.engine.waiting))
        rows |= dict(pending=self.pending) | {f"{name}_total": count for name, count in self.sums.items()}
        kinds = {name: "counter" if name.endswith("_total") else "gauge" for name in rows}
        text = "".join(f"# TYPE nanodoge_{x} {kinds[x]}\nnanodoge_{x} {n}\n" for x, n in rows.items())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def check(self, ids: list[int], param: str, new: int) -> None:
        """Raises APIError if the model cannot read these and write `new` tokens."""
        if not 0 < len(ids) <= self.context - new:
            words = f"the prompt has {len(ids)} tokens, and the context holds from 1 to {self.context}, reply included"
            raise APIError(400, words, "context_length_exceeded" if ids else None, param)

    def render(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        self.check(4 * [0] * len(messages), "messages", 0)  # each has four tokens or more, and a template is slow
        rows = [dict(role=each.role.replace("developer", "system"), content=each.content) for each in messages]
        with refusing("messages"):
            return self.coder.render(rows, add_generation_prompt)[0]

    def choices(self, body: Chat | Completion) -> list[Choice]:
        """What a chat or completion asks for. Raises APIError for what cannot be done."""
        for name, harmless in UNSUPPORTED.items():
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
        common = self.defaults | body.model_dump(include=SAMPLING, exclude_none=True)
        common["temperature"] *= common["temperature"] >= 1e-3  # logits are divided by it
        common |= dict(stop=[body.stop] if isinstance(body.stop, str) else body.stop or [], logprobs=logprobs)
        common |= dict(stop_ids=[] if body.ignore_eos else [self.coder.eos_id], echo=echo and logprobs is not None)
        common |= dict(event=asyncio.Event(), streams=bool(body.stream), kind=kind)
        seed, found = secrets.randbits(62) if body.seed is None else body.seed, []
        for prompt in prompts:
            ids = self.coder.encode_prompt(prompt) if isinstance(prompt, str) else prompt
            self.check(ids, param, 0 if limit == 0 else 1)
            new = min(self.context - len(ids), self.context if limit is None else limit)
            with refusing(param):  # a client's ids may be none of the vocabulary's
                echoed = self.coder.decode(ids) if kind == "text" and ids is prompt else prompt
            common |= dict(limit=new, echoed=echoed if echo else "")
            for i in range(body.n or 1):
                found.append(Choice(ids, max(new, 1), **common, seed=seed + i, index=len(found)))
        return found

    async def pieces(self, connection: Connection, choices: list[Choice]) -> AsyncIterator[dict]:
        """What choices have to say, as it comes. Leaving it cancels them, as does the client that disconnects."""
        loop, event = asyncio.get_running_loop(), choices[0].event
        if self.pending + len(choices) > self.at_once:
            raise APIError(429, "too many requests are waiting", "queue_full", **{"Retry-After": "1"})

        def cancel():
            self.calls.put(lambda: self.cancel(choices))

        async def watch():
            while (await connection.receive())["type"] != "http.disconnect":
                pass
            cancel()

        self.loop, self.pending = loop, self.pending + len(choices)
        watcher, timer = asyncio.create_task(watch()), loop.call_later(self.options.timeout, cancel)
        try:
            loop.call_soon(self.calls.put, lambda: self.add(choices))  # those that came together are read together
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
        is_short = int(connection.headers.get("content-length", LONG)) < LONG
        choices = self.choices(body) if is_short else await asyncio.to_thread(self.choices, body)
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
            event = "data: {}\n\n".format
            try:
                yield event(json.dumps(head | dict(choices=[first])))
                async for piece in pieces:
                    yield event(json.dumps(head | dict(choices=[piece])))
                counts = dict(choices=[], usage=usage(choices, body.n or 1))
                yield (event(json.dumps(head | counts)) if with_usage else "") + event("[DONE]")  # in one write
            except APIError as error:
                yield event(error_reply(error).body.decode())

        return StreamingResponse(events(), media_type="text/event-stream")

    async def kept(
        self, messages: Annotated[Messages, Body()], connection: Connection, layer: Annotated[Whole, Body()] = None
    ) -> Response:
        """For each token of a conversation, how many (layer, key/value head) caches hold it after reading all."""
        ids = await asyncio.to_thread(self.render, messages, False)
        self.check(ids, "messages", 0)
        if layer is not None and layer >= self.about["layers"]:
            raise APIError(400, f"layer {layer} must be below {self.about['layers']}", param="layer")
        choice = HeldChoice(ids, 1, temperature=0.0, engine=self.engine)
        async for _ in self.pieces(connection, [choice]):
            pass
        layers, feed, n = choice.held if layer is None else [choice.held[layer]], self.coder.stream(), len(ids)
        positions, scores = (np.concatenate([x.cpu().numpy() for x in part]) for part in zip(*layers, strict=True))
        kept = np.bincount(positions[positions >= 0], minlength=n).tolist()
        positions, scores = (x[positions.min(1) >= 0] for x in (positions, scores))  # the caches that are full
        oldest = np.where(scores == scores.min(1, keepdims=True), positions, n).min(1)  # of their weakest keys
        counts = dict(possible=len(layers) * self.about["kv_heads"], kept=kept)
        counts |= dict(next=np.bincount(oldest, minlength=n).tolist())
        texts = [feed(id) for id in ids]
        texts[-1] += feed(None)
        return json_reply(self.about | dict(object="nanodoge.kept", layer=layer, tokens=texts) | counts)


def usage(choices: list[Choice], n: int) -> dict:
    """The tokens of `n` choices for each prompt."""
    read, reused = sum(len(choice.prompt) for choice in choices[::n]), sum(choice.reused for choice in choices[::n])
    written = sum(min(len(choice.tokens), choice.limit) for choice in choices)
    counts = dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
    return counts | dict(prompt_tokens_details=dict(cached_tokens=reused))
