"""The words of OpenAI's API, and the thread that owns the engine. (serve.py is the server.)

A request body is a pydantic model, which checks it and describes it in /openapi.json. A Choice turns tokens into the
fields of a reply, as many as have come since it was last asked: a chunk of a stream, or all.
"""

import asyncio
import itertools
import json
import queue
import re
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import HTTPException, Response
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nanodoge.engine import Engine, Request
from nanodoge.tokenizer import REASONING_TAGS, Tokenizer

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
        first = error.errors()[0]
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
    """The text of a token. The bytes of half a character are written as \\xff, so that different tokens differ."""
    return coder.token_bytes(id).decode(errors="backslashreplace")


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


# ---- The engine's thread


class EngineThread(threading.Thread):
    """The only thread that touches the engine. Others leave calls in the queue `calls`; None ends it.

    It makes the engine, too. OpenMP gives every thread that computes with torch a team of threads. If all teams
    together have more threads than there are cores, they wait by sleeping instead of spinning, and a token takes 1.5
    times as long.
    """

    def __init__(self, make: Callable[[], tuple[Engine, dict]]):
        """Starts. `engine` and `about` are what make() returned. Raises what it raises."""
        super().__init__(daemon=True)
        self.calls, self.active, self.make, self.made = queue.SimpleQueue(), set(), make, Future()
        self.sums = Counter(prompt_tokens=0, reused_tokens=0, generated_tokens=0)
        self.loop: asyncio.AbstractEventLoop | None = None  # of the handlers
        self.start()
        self.engine, self.about = self.made.result()

    def run(self) -> None:
        try:
            engine, about = self.make()
        except BaseException as error:
            return self.made.set_exception(error)
        self.made.set_result((engine, about))
        while True:
            while not (self.active and self.calls.empty()):
                if (call := self.calls.get()) is None:
                    return
                call()
            try:
                self.notify(engine.step())
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

    def stop(self) -> None:
        self.calls.put(None)
        self.join()


@dataclass(eq=False)
class HeldChoice(Choice):
    """A choice that remembers what its caches hold when its prompt has been read: see Engine.held."""

    engine: Engine | None = None

    def append(self, id: int) -> None:
        self.held = self.engine.held(self)
        super().append(id)
