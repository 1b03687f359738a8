"""A model and its clients: the thread that owns the engine, and what an HTTP handler does for a request.

An HTTP handler turns what it was sent into Requests, leaves these to the engine's thread as calls in a queue, waits for
an event that the thread sets after a step, and formats what has come. So handlers never wait for a step, and the engine
never waits for a client. A reply that is not streamed is the streamed one, collected.
"""

import asyncio
import json
import queue
import secrets
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial

from fastapi import Request as Connection
from fastapi import Response
from fastapi.responses import StreamingResponse

from nanodoge.api import (
    SAMPLING,
    UNSUPPORTED,
    APIError,
    Chat,
    Choice,
    ClientRequest,
    Completion,
    Kept,
    Message,
    Piece,
    choice_fields,
    error_fields,
    join_pieces,
    json_reply,
)
from nanodoge.engine import Engine
from nanodoge.tokenizer import REASONING_TAGS


class EngineThread(threading.Thread):
    """The only thread that touches the engine. Others leave calls in a queue; None ends it.

    It makes the engine, too. OpenMP gives every thread that computes with torch a team of threads. If all teams
    together have more threads than there are cores, they wait by sleeping instead of spinning, and a token takes 1.5
    times as long.
    """

    def __init__(self, make: Callable[[], Engine]):
        """Starts. `engine` is what make() returned. Raises what it raises."""
        super().__init__(daemon=True)
        self.calls, self.active, self.sums = queue.SimpleQueue(), set(), Counter()
        self.loop: asyncio.AbstractEventLoop | None = None  # of the handlers
        self.make, self.made = make, Future()
        self.start()
        self.engine = self.made.result()

    def run(self) -> None:
        try:
            engine = self.make()
        except BaseException as error:
            return self.made.set_exception(error)
        self.made.set_result(engine)
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

    def stop(self) -> None:
        self.calls.put(None)
        self.join()

    def notify(self, new: list[ClientRequest]) -> None:
        """Wakes the handlers of requests with a new token that is streamed, and of those that have ended."""
        ended = {request for request in self.active if request.finish_reason}
        self.active -= ended
        for request in new:
            if request.wants_held and request.held is None:
                request.held = self.engine.held(request)
        for request in ended:
            self.sums.update(prompt_tokens=len(request.prompt), reused_tokens=request.reused)
        self.sums["generated_tokens"] += len(new)
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


class Service:
    """A model and the clients it serves."""

    def __init__(self, thread: EngineThread, name: str, defaults: dict, max_queue: int, timeout: float, about: dict):
        """defaults: temperature and top_p of a request that has none. max_queue, timeout: see ServeOptions. about: what
        `info` says besides: chat, whether the model was tuned on conversations; example, a question it answers."""
        self.thread, self.name, self.defaults, self.timeout, self.about = thread, name, defaults, timeout, about
        engine, self.coder = thread.engine, thread.engine.tokenizer
        self.config, self.context = engine.model.config, engine.model.config.max_position_embeddings
        self.pending, self.at_once = 0, engine.slots + max_queue
        self.is_stopping, self.statuses = False, Counter()  # which the server sets and counts

    # ---- From what a client sent to requests of the engine

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Special tokens written in a text are these tokens, and BOS stands in front, as evaluate.py has it."""
        ids, bos = [], self.coder.bos_id
        for i, part in enumerate(self.coder.split[None](text)):
            ids += [self.coder.special_tokens[part]] if i % 2 else self.coder.encode(part)
        return ids if not add_bos or ids[:1] == [bos] else [bos, *ids]

    def render(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        if len(messages) > self.context // 4:  # each takes more than four tokens; a template is slow
            raise self.too_long(f"{len(messages)} messages", "messages")
        rows = []
        for message in messages:
            parts = message.content if isinstance(message.content, list) else ()
            content = "".join(part.text for part in parts) if parts else message.content or ""
            rows.append(dict(role=message.role.replace("developer", "system"), content=content))
        try:
            return self.coder.render(rows, add_generation_prompt)[0]
        except ValueError as error:
            raise APIError(400, str(error), param="messages") from None

    def too_long(self, what: str, param: str) -> APIError:
        words = f"the prompt has {what}, and with its reply must fit the model's context of {self.context} tokens"
        return APIError(400, words, "context_length_exceeded", param)

    def check(self, ids: list[int], param: str, new: int = 1) -> list[int]:
        """The prompt. Raises APIError if the model cannot read it and write `new` tokens."""
        if not ids or len(ids) + new > self.context:
            raise (
                self.too_long(f"{len(ids)} tokens", param) if ids else APIError(400, "the prompt is empty", None, param)
            )
        try:
            self.coder.decode(ids)
        except ValueError as error:
            raise APIError(400, str(error), param=param) from None
        return ids

    def prompts(self, body: Chat | Completion) -> list[tuple[list[int], str]]:
        """[(ids, what `echo` shows of them)]."""
        if isinstance(body, Chat):
            return [(self.render(body.messages, True), "")]
        is_one = isinstance(body.prompt, str) or (bool(body.prompt) and isinstance(body.prompt[0], int))
        given = [body.prompt] if is_one else body.prompt
        if not 0 < len(given) * (body.n or 1) <= self.at_once:
            raise APIError(400, f"from 1 to {self.at_once} continuations in one request", param="prompt")
        ids = [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
        new = 0 if body.max_tokens == 0 else 1
        decode = self.coder.decode
        pairs = [(self.check(row, "prompt", new), text) for row, text in zip(ids, given, strict=True)]
        return [(row, (text if isinstance(text, str) else decode(row)) if body.echo else "") for row, text in pairs]

    def choices(self, body: Chat | Completion) -> list[Choice]:
        """What a chat or completion asks for. Raises APIError for what cannot be done."""
        for name, harmless in UNSUPPORTED.items():
            if (value := body.model_extra.get(name)) and value not in harmless:
                raise APIError(400, f"{name} is not supported", "unsupported_parameter", name)
        sampling = self.defaults | {name: value for name in SAMPLING if (value := getattr(body, name)) is not None}
        if sampling["temperature"] < 1e-3:  # logits are divided by it
            sampling["temperature"] = 0.0
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        common = dict(
            stop=stop,
            stop_ids=[] if body.ignore_eos else [self.coder.eos_id],
            event=asyncio.Event(),
            streams=bool(body.stream),
        )
        is_chat, limit = isinstance(body, Chat), body.max_tokens
        if is_chat:
            limit = limit if body.max_completion_tokens is None else body.max_completion_tokens
            logprobs = body.top_logprobs or 0 if body.logprobs else None
        else:
            logprobs = body.logprobs
            common["echo"] = bool(body.echo) and logprobs is not None
        seed, found = secrets.randbits(62) if body.seed is None else body.seed, []
        for ids, echoed in self.prompts(body):
            room = self.context - len(self.check(ids, "messages" if is_chat else "prompt", 0 if limit == 0 else 1))
            new = room if limit is None else min(limit, room)
            for i in range(body.n or 1):
                request = ClientRequest(ids, max(new, 1), **sampling, **common, seed=seed + i, logprobs=logprobs)
                found.append(Choice(len(found), request, new, is_chat, echoed))
        return found

    # ---- Replies

    async def follow(self, connection: Connection, choices: list[Choice]) -> AsyncIterator[Piece]:
        """Yields the pieces of choices as they come. Leaving it cancels them, as does the client that disconnects."""
        requests, thread, loop = [choice.request for choice in choices], self.thread, asyncio.get_running_loop()
        if self.pending + len(requests) > self.at_once:
            raise APIError(429, "too many requests are waiting", "queue_full", **{"Retry-After": "1"})

        def cancel():
            for request in requests:
                thread.calls.put(partial(thread.cancel, request))

        async def watch():
            while (await connection.receive())["type"] != "http.disconnect":
                pass
            cancel()

        thread.loop, self.pending, event = loop, self.pending + len(requests), requests[0].event
        watcher, timer = asyncio.create_task(watch()), loop.call_later(self.timeout, cancel)
        try:
            for request in requests:
                thread.calls.put(partial(thread.add, request))
            while not all(choice.ended for choice in choices):
                await event.wait()
                event.clear()
                for choice in choices:
                    for piece in () if choice.ended else choice.pieces():
                        yield piece
        finally:
            watcher.cancel(), timer.cancel(), cancel()
            self.pending -= len(requests)

    async def reply(self, connection: Connection, body: Chat | Completion) -> Response:
        """The reply to a chat or completion, streamed or collected."""
        choices, is_chat = await asyncio.to_thread(self.choices, body), isinstance(body, Chat)
        kind = "chat.completion" if is_chat else "text_completion"
        head = dict(id=f"{kind[:4]}-{secrets.token_hex(12)}", object=kind, created=int(time.time()), model=self.name)
        stream, found = self.follow(connection, choices), [[] for _ in choices]
        first = await anext(stream)  # what goes wrong before it has a status of its own
        if body.stream:
            return StreamingResponse(self.events(head, body, choices, first, stream), media_type="text/event-stream")
        found[first.index].append(first)
        async for piece in stream:
            found[piece.index].append(piece)
        field = "message" if is_chat else "text"
        whole = [choice_fields(self.coder, join_pieces(pieces), field) for pieces in found]
        return json_reply(head | dict(choices=whole, usage=self.usage(body, choices)))

    async def events(self, head: dict, body, choices, first: Piece, stream) -> AsyncIterator[str]:
        """The server-sent events of a streamed reply."""
        is_chat, with_usage = isinstance(body, Chat), bool(body.stream_options and body.stream_options.include_usage)
        head |= dict(object=head["object"] + ".chunk") if is_chat else {}
        head |= dict(usage=None) if with_usage else {}

        def event(*chosen, **fields):
            return f"data: {json.dumps(head | dict(choices=chosen) | fields)}\n\n"

        def chunk(piece):
            return event(choice_fields(self.coder, piece, "delta" if is_chat else "text"))

        try:
            for choice in choices if is_chat else ():
                yield event(dict(index=choice.index, delta=dict(role="assistant", content=""), finish_reason=None))
            yield chunk(first)
            async for piece in stream:
                yield chunk(piece)
        except APIError as error:
            yield f"data: {json.dumps(error_fields(error))}\n\n"
            return
        yield event(usage=self.usage(body, choices)) if with_usage else ""
        yield "data: [DONE]\n\n"

    def usage(self, body: Chat | Completion, choices: list[Choice]) -> dict:
        prompts = [choice.request for choice in choices[:: body.n or 1]]
        read, reused = sum(len(request.prompt) for request in prompts), sum(request.reused for request in prompts)
        written = sum(min(len(choice.request.tokens), choice.limit) for choice in choices)
        counts = dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
        return counts | dict(prompt_tokens_details=dict(cached_tokens=reused))

    async def kept(self, connection: Connection, body: Kept) -> Response:
        """For each token of a conversation, how many (layer, key/value head) caches hold it after reading all."""
        ids = self.check(await asyncio.to_thread(self.render, body.messages, False), "messages", 0)
        shape = self.info() | dict(object="nanodoge.kept", layer=body.layer)
        if body.layer is not None and body.layer >= shape["layers"]:
            raise APIError(400, f"layer {body.layer} must be below {shape['layers']}", param="layer")
        request = ClientRequest(ids, 2, temperature=0.0, wants_held=True)
        async for _ in self.follow(connection, [Choice(0, request, 2)]):
            pass
        kept, following, feed = Counter(), Counter(), self.coder.stream()
        layers = request.held if body.layer is None else [request.held[body.layer]]
        for positions, scores in (pair for layer in layers for pair in zip(*(x.tolist() for x in layer), strict=True)):
            keys = [(score, at) for score, at in zip(scores, positions, strict=True) if at >= 0]
            kept.update(at for _, at in keys)
            if len(keys) == shape["window"]:
                following[min(keys)[1]] += 1  # the weakest; of equal ones the oldest
        texts = [feed(id) for id in ids]
        texts[-1] += feed(None)
        fields = {name: shape[name] for name in ("object", "window", "layers", "kv_heads", "layer")}
        fields |= dict(tokens=texts, possible=len(layers) * shape["kv_heads"])
        counts = {"kept": kept, "next": following}
        return json_reply(fields | {name: [count[i] for i in range(len(ids))] for name, count in counts.items()})

    def info(self) -> dict:
        shape, has_tags = self.config, set(REASONING_TAGS) <= self.coder.special_tokens.keys()
        sizes = dict(context=self.context, window=shape.keep_window_size, layers=shape.num_hidden_layers)
        sizes |= dict(kv_heads=shape.num_key_value_heads, reasoning=has_tags)
        return dict(model=self.name, defaults=self.defaults | dict(max_tokens=None)) | sizes | self.about

    def metrics(self) -> str:
        """In Prometheus's format."""
        engine, sums = self.thread.engine, self.thread.sums
        numbers = dict(slots=engine.slots, running=len(engine.live), waiting=len(engine.waiting), pending=self.pending)
        rows = [(name, "gauge", value) for name, value in numbers.items()]
        rows += [(f"{name}_total", "counter", value) for name, value in sums.items()]
        text = "".join(f"# TYPE nanodoge_{name} {kind}\nnanodoge_{name} {value}\n" for name, kind, value in rows)
        replies = [f'nanodoge_replies_total{{status="{code}"}} {n}\n' for code, n in sorted(self.statuses.items())]
        return text + "".join(["# TYPE nanodoge_replies_total counter\n", *replies])
