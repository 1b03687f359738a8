"""The words of OpenAI's API: what a client may send, and how tokens become its reply. (serve.py has the server.)

A request body is a pydantic model, which checks it and describes it in /openapi.json. A reply is built from Pieces: a
Choice hands out what has come since it was last asked, and a Piece becomes a chunk of a stream, or, all of a choice
joined, the choice of a whole reply.
"""

import asyncio
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from fastapi import HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as PlainHTTPException

from nanodoge.engine import Request
from nanodoge.tokenizer import REASONING_TAGS, Tokenizer

# ---- What clients send

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Whole = Annotated[int, Field(ge=0, lt=2**31)]
StopText = Annotated[str, Field(max_length=128)]


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Sampled(BaseModel):
    """What chats and completions have in common. Other fields are ignored, but for those in UNSUPPORTED. Null means
    absent: clients send both."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    max_tokens: Whole | None = Field(None, description="absent: up to the context")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: bool | None = False
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Whole | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None


class Chat(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = 0


class Completion(Sampled):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Kept(BaseModel):
    messages: Annotated[list[Message], Field(min_length=1)]
    layer: Whole | None = None


class Text(BaseModel):
    prompt: str
    add_special_tokens: bool = True


class Tokens(BaseModel):
    tokens: list[int]


# Fields that would change the answer: {name: values with which they do not}.
UNSUPPORTED = dict.fromkeys("tools functions logit_bias suffix audio prediction web_search_options".split(), ())
UNSUPPORTED |= {"response_format": [{"type": "text"}], "modalities": [["text"]], "best_of": [1]}
SAMPLING = "temperature top_p top_k min_p repetition_penalty frequency_penalty presence_penalty".split()


# ---- Errors


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorFields


class APIError(HTTPException):
    """A reply that is an error, in OpenAI's envelope."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(status, message, headers)
        self.code, self.param = code, param


def json_reply(content, status: int = 200, headers=None) -> Response:
    """json.dumps escapes half characters, which a client can send and UTF-8 cannot hold."""
    return Response(json.dumps(content), status, headers, "application/json")


def error_fields(error: PlainHTTPException) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if error.status_code >= 500 else kinds.get(error.status_code, "invalid_request_error")
    code, param = getattr(error, "code", None), getattr(error, "param", None)
    return dict(error=dict(message=str(error.detail), type=kind, param=param, code=code))


def error_reply(error: PlainHTTPException) -> Response:
    return json_reply(error_fields(error), error.status_code, error.headers)


# ---- From tokens to replies


@dataclass(eq=False)
class ClientRequest(Request):
    """A Request, and how its handler is woken: `event` is set when there are new tokens or, if they are not streamed,
    when it has ended. held: what its row holds after the prompt, if that is wanted (see Engine.held)."""

    event: asyncio.Event = field(default_factory=asyncio.Event)
    streams: bool = False
    wants_held: bool = False
    held: list | None = field(default=None, init=False)


class Piece(NamedTuple):
    """What is new in one choice."""

    index: int
    text: str = ""
    thoughts: str = ""
    scores: tuple = ()  # [(token, its score: see Request.scores)]
    offset: int = 0  # of the text
    finish_reason: str | None = None


class Choice:
    """One of the continuations that a client asked for, and how much of it has been handed out."""

    def __init__(self, index: int, request: ClientRequest, limit: int, is_chat: bool = False, echoed: str = ""):
        """limit: new tokens at most; the engine makes at least one. echoed: the prompt's text, if it is wanted."""
        self.index, self.request, self.limit, self.is_chat, self.echoed = index, request, limit, is_chat, echoed
        self.sent, self.scored, self.ended = [0, 0], 0, False

    def pieces(self) -> list[Piece]:
        """What has come since the last call. Raises APIError if the request could not be completed."""
        request, reason = self.request, self.request.finish_reason  # first: when it is there, so is all the rest
        if reason == "cancelled":
            raise APIError(504, "the reply took longer than this server allows", "timeout")
        if reason == "error":
            raise APIError(503, "the model could not compute this request", "engine_error")
        parts = ["", self.echoed + (request.text.text if self.limit and request.text else "")]
        if self.is_chat:
            parts = split_thoughts(parts[1], bool(reason))
        thoughts, text = (part[sent:] for part, sent in zip(parts, self.sent, strict=True))
        ids = (request.prompt if request.echo else []) + request.tokens[: self.limit]
        scores = tuple(zip(ids, request.scores, strict=False))[self.scored :]
        found = [Piece(self.index, text, thoughts, scores, self.sent[1])] if text or thoughts or scores else []
        self.sent, self.scored, self.ended = [len(part) for part in parts], self.scored + len(scores), bool(reason)
        last = Piece(self.index, finish_reason=reason if self.limit else "length")
        return [*found, last] if reason else found


def split_thoughts(text: str, is_complete: bool) -> tuple[str, str]:
    """(thoughts, answer) of what a reasoning model wrote. A tag that has only begun is held back."""
    text = text if is_complete else re.sub(r"<(\|\w*\|?)?$", "", text)
    pieces = re.split(f"({'|'.join(map(re.escape, REASONING_TAGS))})", text)
    thoughts = answer = ""
    for tag, piece in zip(["", *pieces[1::2]], pieces[::2], strict=True):
        if tag == REASONING_TAGS[0]:
            thoughts += piece
        else:
            answer += piece
    return thoughts.lstrip(), answer.lstrip()


def join_pieces(pieces: list[Piece]) -> Piece:
    index, texts, thoughts, scores, offsets, reasons = zip(*pieces, strict=True)
    return Piece(index[0], "".join(texts), "".join(thoughts), sum(scores, ()), offsets[0], reasons[-1])


def choice_fields(coder: Tokenizer, piece: Piece, field: str) -> dict:
    """A choice of a reply. field: where its text is: "text" of a completion, "message" or "delta" of a chat."""
    fields, scores = dict(index=piece.index, finish_reason=piece.finish_reason, logprobs=None), piece.scores
    if field == "text":
        return fields | dict(text=piece.text, logprobs=text_logprobs(coder, scores, piece.offset) if scores else None)
    if scores:
        tops = [dict(top_logprobs=[token_fields(coder, *pair) for pair in top]) for _, (_, top) in scores]
        own = [token_fields(coder, id, logprob) for id, (logprob, _) in scores]
        fields["logprobs"] = dict(content=[a | b for a, b in zip(own, tops, strict=True)])
    message = dict(role="assistant", content=piece.text) if field == "message" else {}
    message |= dict(content=piece.text) if piece.text else {}
    return fields | {field: message | (dict(reasoning_content=piece.thoughts) if piece.thoughts else {})}


def token_text(coder: Tokenizer, id: int) -> str:
    """The text of a token. Half a character is written as OpenAI writes it, so that different tokens differ."""
    data = coder.token_bytes(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_fields(coder: Tokenizer, id: int, logprob: float) -> dict:
    return dict(token=token_text(coder, id), logprob=logprob, bytes=list(coder.token_bytes(id)))


def text_logprobs(coder: Tokenizer, scores: tuple, offset: int) -> dict:
    """The log-probabilities of a completion. A token's own is always among the likeliest."""
    tokens = [token_text(coder, id) for id, _ in scores]
    top = [score and {token_text(coder, i): x for i, x in [*score[1], (id, score[0])]} for id, score in scores]
    offsets = [*itertools.accumulate(map(len, tokens), initial=offset)][:-1]
    own = [score and score[0] for _, score in scores]
    return dict(tokens=tokens, token_logprobs=own, top_logprobs=top, text_offset=offsets)
