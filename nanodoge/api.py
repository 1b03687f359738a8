"""The words of OpenAI's API: what a client may send, and how tokens become its reply. (serve.py has the server.)

A request body is a pydantic model, which checks it and describes it in /openapi.json. A Choice turns the tokens of a
request into the fields of a reply, as many as have come since it was last asked: a chunk of a stream, or all.
"""

import asyncio
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import HTTPException, Response
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nanodoge.engine import Request
from nanodoge.tokenizer import REASONING_TAGS, Tokenizer

# ---- What clients send

Penalty = Annotated[float, Field(ge=-2, le=2)] | None
Part01 = Annotated[float, Field(ge=0, le=1)] | None
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


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Sampled(BaseModel):
    """What chats and completions have in common. Null means absent. Other fields are ignored, but for UNSUPPORTED."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    max_tokens: Whole = Field(None, description="absent: up to the context")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: bool | None = False
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Part01 = None
    top_k: Whole = None
    min_p: Part01 = None
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


def json_reply(content, status: int = 200, headers=None) -> Response:
    """json.dumps escapes half characters, which a client can send and UTF-8 cannot hold."""
    return Response(json.dumps(content), status, headers, "application/json")


def error_fields(error: Exception) -> dict:
    """OpenAI's envelope."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = [str(place) for place in first["loc"] if place != "body"]
        error = APIError(400, f"{'.'.join(where) or 'body'}: {first['msg']}", "invalid", where[0] if where else None)
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if error.status_code >= 500 else kinds.get(error.status_code, "invalid_request_error")
    code, param = getattr(error, "code", None), getattr(error, "param", None)
    return dict(error=dict(message=str(error.detail), type=kind, param=param, code=code))


def error_reply(error: Exception) -> Response:
    return json_reply(error_fields(error), getattr(error, "status_code", 400), getattr(error, "headers", None))


# ---- From tokens to replies


@dataclass(eq=False)
class ClientRequest(Request):
    """A Request, and how its handler is woken: `event` is set when it has new tokens, if `streams`, and at its end."""

    event: asyncio.Event = field(default_factory=asyncio.Event)
    streams: bool = False
    wants_held: bool = False
    held: list | None = field(default=None, init=False)  # if wanted: see Engine.held, after the prompt


class Choice:
    """One of the continuations that a client asked for, and how much of it has been taken."""

    def __init__(self, index: int, request: ClientRequest, limit: int, kind: str = "text", echoed: str = ""):
        """limit: new tokens at most; the engine makes at least one. kind: the field of the reply, "text" or, of a chat,
        "message" or "delta". echoed: the prompt's text, if it is wanted."""
        self.index, self.request, self.limit, self.kind, self.echoed = index, request, limit, kind, echoed
        self.sent, self.scored, self.ended = None, 0, False

    def take(self, coder: Tokenizer) -> dict | None:
        """The choice of a reply, with what has come since the last call. Raises APIError if the request failed."""
        request, reason = self.request, self.request.finish_reason  # first: when it is there, so is all the rest
        if reason == "cancelled":
            raise APIError(504, "the reply took longer than this server allows", "timeout")
        if reason == "error":
            raise APIError(503, "the model could not compute this request", "engine_error")
        if not (reason or request.streams):
            return None
        whole = "", self.echoed + (request.text.text if self.limit and request.text else "")
        whole = whole if self.kind == "text" else split_thoughts(whole[1], bool(reason))
        before = self.sent or (0, 0)
        thoughts, text = (part[at:] for part, at in zip(whole, before, strict=True))
        scores = []
        if request.logprobs is not None:
            ids = (request.prompt if request.echo else []) + request.tokens[: self.limit]
            scores = list(zip(ids, request.scores, strict=False))[self.scored :]
        if not (text or thoughts or scores or reason):
            return None
        message = {} if self.sent else dict(role="assistant", content="")
        self.sent, self.scored, self.ended = tuple(map(len, whole)), self.scored + len(scores), bool(reason)
        fields = dict(index=self.index, logprobs=None)
        fields["finish_reason"] = (reason if self.limit else "length") if reason else None
        if self.kind == "text":
            return fields | dict(text=text, logprobs=text_logprobs(coder, scores, before[1]) if scores else None)
        if scores:
            fields["logprobs"] = dict(content=[chat_logprob(coder, *score) for score in scores])
        message |= dict(content=text) if text else {}
        return fields | {self.kind: message | (dict(reasoning_content=thoughts) if thoughts else {})}


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
    """The text of a token. Half a character is written as OpenAI writes it, so that different tokens differ."""
    data = coder.token_bytes(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


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
