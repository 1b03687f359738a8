"""A model and its clients: the thread that owns the engine, and what an HTTP handler does for a request.

A handler turns what it was sent into Requests and leaves a call in a queue, which the engine's thread makes between two
steps: to add or to cancel them. It waits for an event that the thread sets after a step, and formats what has come. So
all requests share every step (see nanodoge/engine.py), handlers never wait for a step, and the engine never waits for a
client. A reply that is not streamed is the streamed one, collected.
"""

import asyncio
import contextlib
import json
import queue
import secrets
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path

from fastapi import Request as Connection
from fastapi import Response
from fastapi.responses import StreamingResponse

from nanodoge import api
from nanodoge.api import APIError, Chat, Choice, ClientRequest, Completion, Message
from nanodoge.engine import Engine

CHUNKS = 500  # of streams a second, of all together: a chunk takes 0.1 ms of two cores that the engine needs


class EngineThread(threading.Thread):
    """The only thread that touches the engine. Others leave calls in a queue; None ends it.

    It makes the engine, too. OpenMP gives every thread that computes with torch a team of threads. If all teams
    together have more threads than there are cores, they wait by sleeping instead of spinning, and a token takes 1.5
    times as long.
    """

    def __init__(self, make: Callable[[], tuple[Engine, dict]]):
        """Starts. `engine` and `about` are what make() returned. Raises what it raises."""
        super().__init__(daemon=True)
        self.calls, self.active, self.sums = queue.SimpleQueue(), set(), Counter()
        self.loop: asyncio.AbstractEventLoop | None = None  # of the handlers
        self.to_wake, self.last_wake = set(), 0.0
        self.make, self.made = make, Future()
        self.start()
        self.engine, self.about = self.made.result()

    def run(self) -> None:
        try:
            engine, about = self.make()
        except BaseException as error:
            return self.made.set_exception(error)
        self.made.set_result((engine, about))
        while True:
            with contextlib.suppress(queue.Empty):
                if (call := self.calls.get(block=not self.active)) is None:
                    return
                call()
                continue
            try:
                self.notify(engine.step())
            except Exception as error:  # damaged weights, full memory: these requests fail, the server stays
                traceback.print_exception(error)
                for request in self.active:
                    request.finish("error")
                    engine.cancel(request)
                self.notify([])

    def notify(self, new: list[ClientRequest]) -> None:
        """Wakes handlers: at a first token and at an end at once, else so that there are CHUNKS a second."""
        ended = {request for request in self.active if request.finish_reason}
        self.active -= ended
        for request in new:
            if request.wants_held and request.held is None:
                request.held = self.engine.held(request)
        for request in ended:
            self.sums.update(prompt_tokens=len(request.prompt), reused_tokens=request.reused)
        self.sums["generated_tokens"] += len(new)
        self.to_wake.update(request.event for request in (*new, *ended) if request.streams or request in ended)
        is_urgent = ended or any(len(request.tokens) == 1 for request in new)
        if self.to_wake and (is_urgent or time.monotonic() > self.last_wake + len(self.to_wake) / CHUNKS):
            events, self.to_wake, self.last_wake = self.to_wake, set(), time.monotonic()
            with contextlib.suppress(RuntimeError):  # the loop is closed: a second signal has ended the server
                self.loop.call_soon_threadsafe(lambda: [event.set() for event in events])

    def stop(self) -> None:
        self.calls.put(None)
        self.join()

    def add(self, request: ClientRequest) -> None:
        self.active.add(request)
        self.engine.add(request)

    def cancel(self, request: ClientRequest) -> None:
        if request in self.active:
            self.engine.cancel(request)
            self.notify([])


@contextlib.contextmanager
def refusing(param: str):
    """Within it a ValueError says what is wrong with a parameter."""
    try:
        yield
    except ValueError as error:
        raise APIError(400, str(error), param=param) from None


class Service:
    """A model and the clients it serves."""

    def __init__(self, options, thread: EngineThread):
        """options: serve.py's ServeOptions."""
        self.options, self.name, self.thread = options, Path(options.checkpoint[0]).name, thread
        self.engine, self.coder = thread.engine, thread.engine.tokenizer
        self.context = self.engine.model.config.max_position_embeddings
        self.pending, self.at_once = 0, options.slots + options.max_queue  # requests that run or wait; most of them
        self.is_stopping = False  # set by the server

    def render(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        self.check(4 * [0] * len(messages), "messages", 0)  # each has four tokens or more, and a template is slow
        rows = [dict(role=each.role.replace("developer", "system"), content=each.content) for each in messages]
        with refusing("messages"):
            return self.coder.render(rows, add_generation_prompt)[0]

    def check(self, ids: list[int], param: str, new: int) -> None:
        """Raises APIError if the model cannot read these and write `new` tokens."""
        if not 0 < len(ids) <= self.context - new:
            words = f"the prompt has {len(ids)} tokens, and the context holds from 1 to {self.context}, reply included"
            raise APIError(400, words, "context_length_exceeded" if ids else None, param)
        with refusing(param):
            self.coder.decode(ids)

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
        common = dict(temperature=self.options.temperature, top_p=self.options.top_p)
        common |= body.model_dump(include=api.SAMPLING, exclude_none=True)
        if common["temperature"] < 1e-3:  # logits are divided by it
            common["temperature"] = 0.0
        common |= dict(stop=[body.stop] if isinstance(body.stop, str) else body.stop or [], logprobs=logprobs)
        common |= dict(stop_ids=[] if body.ignore_eos else [self.coder.eos_id], echo=echo and logprobs is not None)
        common |= dict(event=asyncio.Event(), streams=bool(body.stream))
        seed, found = secrets.randbits(62) if body.seed is None else body.seed, []
        for prompt in given:
            ids = self.coder.encode_prompt(prompt) if isinstance(prompt, str) else prompt
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
            return api.json_reply(head | dict(choices=found, usage=self.usage(body, choices)))
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
                yield event(api.error_fields(error))
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

    async def kept(self, connection: Connection, messages: list[Message], layer: int | None) -> Response:
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
        for positions, scores in (head for each in layers for head in zip(*each, strict=True)):
            kept.update(positions[positions >= 0].tolist())
            if positions.min() >= 0:  # full: the weakest key is next, of equal ones the oldest
                following[int(positions[scores == scores.min()].min())] += 1
        texts = [feed(id) for id in ids]
        texts[-1] += feed(None)
        fields = {name: shape[name] for name in ("window", "layers", "kv_heads")} | dict(layer=layer)
        fields |= dict(object="nanodoge.kept", tokens=texts, possible=len(layers) * shape["kv_heads"])
        counts = {"kept": kept, "next": following}
        return api.json_reply(fields | {name: [count[i] for i in range(len(ids))] for name, count in counts.items()})

    def info(self) -> dict:
        config = self.engine.model.config
        sizes = dict(context=self.context, window=config.keep_window_size, layers=config.num_hidden_layers)
        defaults = dict(temperature=self.options.temperature, top_p=self.options.top_p, max_tokens=None)
        about = dict(model=self.name, defaults=defaults, kv_heads=config.num_key_value_heads)
        return about | sizes | self.thread.about

    def metrics(self) -> str:
        """In Prometheus's format."""
        engine, sums = self.engine, self.thread.sums
        rows = dict(slots=engine.slots, running=len(engine.live), waiting=len(engine.waiting), pending=self.pending)
        rows |= {f"{name}_total": sums[name] for name in ("prompt_tokens", "reused_tokens", "generated_tokens")}
        kinds = {name: "counter" if name.endswith("_total") else "gauge" for name in rows}
        return "".join(f"# TYPE nanodoge_{x} {kinds[x]}\nnanodoge_{x} {n}\n" for x, n in rows.items())
