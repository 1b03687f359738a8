"""Generation: the only code that turns logits into tokens.

    engine = Engine(model, make_decoder(model), slots=16, tokenizer=tokenizer)
    engine.generate([Request(prompt, max_new_tokens=100, seed=i) for i in range(1000)])  # a list of new ids each
    for id in engine.stream(Request(prompt, max_new_tokens=100)): ...

A step of generation reads all weights, whether for one row or for many. So requests share it (continuous batching;
Orca, Yu et al. 2022): each has a row of one cache, and joins and leaves between the tokens of the others. In a step

    1. one forward pass over the live rows gives the logits of their next tokens, and a Sampler chooses these;
    2. free rows go to waiting requests, whose prompts are read together, up to `piece` tokens (short ones: see `read`);
    3. of a prompt that is longer than that, the next piece is read, so that it delays the others by no more.

The live rows are always the first of the cache: when a request ends, the last row is copied into the gap. So no row is
computed without a request. Memory is allocated once: W keys per row are enough for a text of any length.

A request's output does not depend on the others: its row sees only its own keys, and it has its own random numbers, one
per token. (A batch's shape may change the last bits of its logits, and so which of two equally likely tokens is taken.)

With reuse=True the row of a request that has ended is kept while no other needs it. A prompt that begins with all the
tokens it has read (a next turn) continues from it: a row is a function of these tokens, also where keys were evicted. A
prompt that shares only some continues from a copy without the other keys, if the row has evicted nothing: a shorter
text might have kept what was evicted.
"""

import copy
import math
import random
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanodoge.attention import NEVER, Cache, Slots
from nanodoge.losses import rows_at_once

LIKELY = 256  # top_p looks at so many tokens first: sorting 32,768 takes as long as a small model's whole step
BLOCK = 256  # probabilities that are summed at once when a token is drawn
WORTH = 32  # tokens of a kept row that are worth using: fewer are read sooner, with other prompts, than copied


def sample(logits: Tensor, points: Tensor, temperature: Tensor, top_k=None, top_p=None, min_p=None) -> Tensor:
    """Tokens (B,) int64 drawn from logits (B, V) fp32, row i by the random number points[i] in (0, 1], points (B, 1).

    The options are tensors (B, 1), or None where no row uses them. A row of temperature 0 takes the likeliest token.
    Otherwise its logits are divided by the temperature, and of its tokens only these stay: the top_k likeliest (0:
    all), the likeliest whose probabilities first reach top_p (1: all), those at least min_p as likely as the likeliest.
    """
    greedy, bare, V = temperature == 0, logits, logits.shape[-1]
    logits = logits / temperature.masked_fill(greedy, 1.0)
    if top_k is not None:
        k = top_k.clamp(max=V)
        least = logits.topk(int(k.max())).values.gather(1, (k - 1).clamp(min=0))
        logits = logits.masked_fill((logits < least) & (k > 0), -math.inf)
    p = logits.softmax(-1)
    least = 0.0 if min_p is None else min_p * p.amax(-1, keepdim=True)
    if top_p is not None:
        values = p.topk(min(LIKELY, V)).values
        if bool(((top_p < 1) & (values.sum(-1, keepdim=True) < top_p)).any()):  # a flat distribution: look at all
            values = torch.from_numpy(-np.sort(-p.numpy())) if p.is_cpu else p.sort(descending=True).values
        inside = (values.cumsum(-1) - values < top_p).sum(-1, keepdim=True).clamp(min=1)  # the likeliest always stays
        least = values.gather(1, inside - 1).masked_fill(top_p == 1, 0.0).clamp(min=least)
    token = draw(p if top_p is None and min_p is None else p.masked_fill_(p < least, 0.0), points)[:, 0]
    return torch.where(greedy[:, 0], bare.argmax(-1), token) if bool(greedy.any()) else token


def draw(p: Tensor, points: Tensor) -> Tensor:
    """The index (B, 1) int64 of one of p (B, n) fp32 >= 0, drawn in proportion to them by points (B, 1) in (0, 1].

    The cumulative sums of p divide a line, and points[i] of its length lies in the interval of one index. (That is one
    random number per row; torch.multinomial takes n, and as long as a small model's whole step.) To sum less, first the
    block of indices is found, then the index. In float64: in float32 thousands of unlikely tokens share the last bit.
    """
    blocks = p.unflatten(1, (-1, BLOCK if p.shape[1] % BLOCK == 0 else p.shape[1]))
    ends = blocks.sum(-1, dtype=points.dtype).cumsum(-1)
    point = points * ends[:, -1:]
    block = torch.searchsorted(ends, point)  # the first whose end is not before the point
    inner = blocks.take_along_dim(block[..., None], 1)[:, 0].cumsum(-1, dtype=points.dtype)
    point = point - ends.gather(1, block) + inner[:, -1:]  # counted from where the block begins
    point = point.clamp(min=torch.finfo(points.dtype).tiny).minimum(inner[:, -1:])  # rounded, it stays in the block
    return block * blocks.shape[2] + torch.searchsorted(inner, point)


def log_probabilities(logits: Tensor, ids: Tensor, count: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row of logits (N, V) fp32 the log-probability of its id, and the `count` likeliest with theirs."""
    total = logits.logsumexp(-1, keepdim=True)
    own, top = logits.gather(1, ids[:, None]) - total, logits.topk(count)
    likeliest = zip(top.indices.tolist(), (top.values - total).tolist(), strict=True)
    return [(x, list(zip(*pair, strict=True))) for (x,), pair in zip(own.tolist(), likeliest, strict=True)]


class TextStream:
    """The text of ids that come one at a time. Held back until it is certain: the bytes of half a character, and an end
    that could be the beginning of a stop string. `text`: what is certain; `stopped`: a stop string was found."""

    def __init__(self, tokenizer, stop: Collection[str] = (), skip_special: bool = False):
        self.decode, self.stop = tokenizer.stream(skip_special), [string for string in stop if string]
        self.text, self.held, self.stopped = "", "", False

    def feed(self, id: int | None) -> str:
        """The new piece of text after this id, or at the end, when id is None."""
        self.held += "" if self.stopped else self.decode(id)
        found = [at for at in map(self.held.find, self.stop) if at >= 0]
        begun = (n for string in self.stop for n in range(len(string) - 1, 0, -1) if self.held.endswith(string[:n]))
        certain = min(found) if found else len(self.held) - (0 if id is None else max(begun, default=0))
        piece, self.held = self.held[:certain], "" if found else self.held[certain:]
        self.stopped, self.text = self.stopped or bool(found), self.text + piece
        return piece


@dataclass(eq=False)
class Request:
    """A prompt to continue. An engine fills the fields from `tokens` on."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 1.0  # 0: always the likeliest token; for this and the next three see `sample`
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and of the text so far become less likely
    frequency_penalty: float = 0.0  # taken from a token's logit for each time that it is among the new tokens
    presence_penalty: float = 0.0  # taken once, if it is among them
    logprobs: int | None = None  # record the log-probability of every new token, and those of so many of the likeliest
    echo: bool = False  # and before them those of the prompt's tokens
    seed: int = 0  # of its random numbers
    stop_ids: Collection[int] = ()  # the request ends with one of these ids
    stop: Collection[str] = ()  # or with one of these strings, which takes an engine with a tokenizer
    tokens: list[int] = field(default_factory=list, init=False)  # the new ids, with the stop id if it came
    text: TextStream | None = field(default=None, init=False)  # of the new ids, if the engine has a tokenizer
    scores: list = field(default_factory=list, init=False)  # see log_probabilities; None for a prompt's first token
    reused: int = field(default=0, init=False)  # prompt tokens that a kept row had read
    finish_reason: str = field(default="", init=False)  # in the end "stop", "length", "cancelled" or "error"

    def __post_init__(self):
        self.prompt, self.random = list(map(int, self.prompt)), random.Random(self.seed)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and continuation at most."""
        return len(self.prompt) + self.max_new_tokens

    def append(self, id: int) -> None:
        self.tokens.append(id)
        stopped = id in self.stop_ids
        if self.text and not stopped:
            self.text.feed(id)
            stopped = self.text.stopped
        if stopped or len(self.tokens) == self.max_new_tokens:
            self.finish("stop" if stopped else "length")

    def finish(self, reason: str) -> None:
        if self.text:
            self.text.feed(None)
        self.finish_reason = self.finish_reason or reason  # last: another thread that sees it finds the text complete


class Sampler:
    """Chooses the next tokens of some requests. It holds their options as tensors, and is made anew when one leaves."""

    def __init__(self, requests: list[Request], vocab_size: int, device: torch.device):
        def column(name, unused):  # (B, 1), or None
            values = [getattr(request, name) for request in requests]
            return None if all(x == unused for x in values) else torch.tensor(values, device=device)[:, None]

        self.requests, self.vocab_size = requests, vocab_size
        self.temperature, self.penalty = column("temperature", 0), column("repetition_penalty", 1)
        self.cuts = column("top_k", 0), column("top_p", 1), column("min_p", 0)
        if self.penalty is not None:
            seen = torch.zeros(len(requests), vocab_size, dtype=torch.bool)
            for row, request in enumerate(requests):
                seen[row, [id for id in request.prompt + request.tokens if id < vocab_size]] = True
            self.seen = seen.to(device)
        self.counts = None  # of the new tokens
        if any(request.frequency_penalty or request.presence_penalty for request in requests):
            rows = [torch.tensor(request.tokens, dtype=torch.long) for request in requests]
            self.counts = torch.stack([row.bincount(minlength=vocab_size) for row in rows]).float().to(device)
            self.frequency, self.presence = column("frequency_penalty", None), column("presence_penalty", None)
        self.scored = [row for row, request in enumerate(requests) if request.logprobs is not None]

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens (B,) for logits (B, V), below vocab_size. Unless all are greedy, takes a random number per request."""
        bare = logits = logits[:, : self.vocab_size].float()
        if self.counts is not None:
            logits = logits - self.frequency * self.counts - self.presence * (self.counts > 0)
        if self.penalty is not None:
            less = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)  # Keskar et al. 2019
            logits = torch.where(self.seen, less, logits)
        if self.temperature is None:
            # On a CPU numpy takes 5 us for 32,768 logits, torch 50.
            tokens = torch.from_numpy(logits.numpy().argmax(-1)) if logits.is_cpu else logits.argmax(-1)
        else:
            points = [[1 - request.random.random()] for request in self.requests]  # above 0
            wide = torch.float32 if logits.device.type == "mps" else torch.float64
            points = torch.tensor(points, dtype=wide, device=logits.device)
            tokens = sample(logits, points, self.temperature, *self.cuts)
        if self.penalty is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens[:, None], torch.ones_like(self.counts[:, :1]))
        if self.scored:  # of the bare model: before penalties and temperature
            count = max(self.requests[row].logprobs for row in self.scored)
            found = log_probabilities(bare[self.scored], tokens[self.scored], count)
            for row, (own, top) in zip(self.scored, found, strict=True):
                self.requests[row].scores.append((own, top[: self.requests[row].logprobs]))
        return tokens


class Engine:
    """Continues requests, `slots` of them at once. For one thread.

    decoder: from make_decoder, faster than the model itself (one by torch.compile is compiled for each number of rows).
    vocab_size: ids from there on are never produced (a vocabulary rounded up has ids without a token); the default is
    the tokenizer's. piece: prompt tokens read in a step, and as many again of a long prompt. reuse: see above.
    """

    def __init__(self, model, decoder=None, slots=16, vocab_size=None, tokenizer=None, piece=1024, reuse=False):
        self.model, self.decoder, self.tokenizer, self.slots, self.piece = model, decoder, tokenizer, slots, piece
        self.vocab_size = vocab_size or (tokenizer or model.config).vocab_size
        self.cache, self.max_length, self.device = None, 0, model.embed_tokens.weight.device
        self.enough = model.config.keep_window_size + 1 if model.config.attention == "fast" else math.inf
        self.waiting: deque[Request] = deque()
        self.live: list[Request] = []  # request i is decoded in row i of the cache
        self.reader, self.done = None, 0  # a request with a long prompt, in the last row; how much of it has been read
        self.batch = None  # the live rows of the cache; None when they have changed
        self.reuse = reuse and not model.config.rope_factor  # with it a key depends on its text's length
        self.kept: dict[int, list[int]] = {}  # {row behind the live ones: the tokens it has read}, the oldest first

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """The new ids of every request, in order."""
        self.allocate(max((request.max_length for request in requests), default=0))
        try:
            for request in sorted(requests, key=lambda request: len(request.prompt)):  # alike prompts are read together
                self.add(request)
            for request in requests:
                while not request.finish_reason:
                    self.step()
        finally:
            for request in requests:
                self.cancel(request)
        return [request.tokens for request in requests]

    def stream(self, request: Request) -> Iterator[int]:
        """The new ids of a request, one after another. Closing the iterator cancels it."""
        self.allocate(request.max_length)
        try:
            self.add(request)
            while not request.finish_reason:
                if request in self.step():
                    yield request.tokens[-1]
        finally:
            self.cancel(request)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError for an empty prompt."""
        if not request.prompt:
            raise ValueError("the prompt is empty: generation needs at least one token, for example the BOS token")
        if request.max_length > self.max_length:
            self.allocate(max(request.max_length, self.model.config.keep_window_size + 1))
        if self.tokenizer:
            request.text = TextStream(self.tokenizer, request.stop)
        if request.max_new_tokens > 0:
            self.waiting.append(request)
        else:
            request.finish("length")

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Ends a request and frees its slot at once. One that has ended is left alone."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request is self.reader:
            self.reader = None
        request.finish("cancelled")
        self.leave()

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One token for every live row, and a piece of the waiting prompts -> the requests that have a new token.
        Raises ValueError if the weights are damaged."""
        new = self.decode() if self.live else []
        if self.waiting and not self.reader and len(self.live) < self.slots and (held := self.recall(self.waiting[0])):
            self.reader, self.done = self.waiting.popleft(), held
        joining, longest, free = [], 0, self.slots - len(self.live) - (self.reader is not None)
        while self.waiting and len(joining) < free:
            longest = max(longest, len(self.waiting[0].prompt))
            if (len(joining) + 1) * longest > self.piece:  # with padding
                break
            joining.append(self.waiting.popleft())
        if joining:
            new += self.begin(joining, self.read(joining, len(self.live), 0))
        elif self.waiting and free and not self.reader:
            self.reader, self.done = self.waiting.popleft(), 0
        if self.reader:
            request, row = self.reader, len(self.cache.length) - 1
            logits = self.read([request], row, self.done)
            self.done += self.piece
            if self.done >= len(request.prompt):
                self.reader = None
                self.kept.pop(len(self.live), None)
                self.copy(row, len(self.live))
                new += self.begin([request], logits)
        return new

    def decode(self) -> list[Request]:
        """The next token of every live row."""
        if self.batch is None:
            self.batch = self.rows(0, len(self.live), self.decoder)
            self.longest = int(self.batch.length.max())  # tokens read so far
            self.sampler = Sampler(self.live[:], self.vocab_size, self.device)
            self.token = torch.tensor([request.tokens[-1] for request in self.live], device=self.device)
        self.longest += 1
        if self.decoder is None or not self.decoder.compiled:
            self.batch.evicts = self.longest > self.batch.window
            self.batch.used = None if self.batch.evicts else self.longest
        if self.decoder:
            logits = self.decoder(self.token, self.batch)
        else:
            x, _ = self.model.hidden(self.token[:, None], None, self.batch)
            logits = F.linear(x[:, 0], self.model.output_weight)
        with self.decoder.sampling() if self.decoder and self.sampler.temperature is not None else nullcontext():
            self.token = self.sampler(logits)
        return self.give(self.live[:], self.token.tolist())

    def read(self, requests: list[Request], row: int, start: int) -> Tensor:
        """Reads a piece of each prompt, from token `start` on, into rows from `row` on -> the next logits (B, V)."""
        pieces = [request.prompt[start : start + self.piece] for request in requests]
        T, reads = max(map(len, pieces)), self.decoder.reads if self.decoder else 0
        if len(pieces) > 1 and min(map(len, pieces)) <= reads:  # each alone, so that none depends on the others
            return torch.cat([self.read([request], i, start) for i, request in enumerate(requests, row)])
        tokens = torch.tensor([piece + [0] * (T - len(piece)) for piece in pieces], device=self.device)
        lengths = torch.tensor([len(piece) for piece in pieces], device=self.device)
        for i, request in enumerate(requests, row):
            self.kept.pop(i, None)
            self.cache.length[i] = start
            if self.model.config.rope_factor:  # then wavelengths follow the length that a text may reach
                self.frequencies[i] = self.model.new_cache(1, request.max_length, room=1).frequencies
        cache = self.rows(row, len(requests))
        for slots in cache.layers if start == 0 else ():
            slots.s.fill_(NEVER), slots.position.fill_(-1)
        echo = any(request.echo for request in requests)
        if T <= reads and start + T <= self.cache.window and not echo:
            return self.decoder.read(tokens[0], self.rows(row, 1, self.decoder))
        x, _ = self.model.hidden(tokens, lengths, cache, None if echo else lengths - 1)
        if echo:
            for i in (i for i, request in enumerate(requests) if request.echo):
                self.score_prompt(requests[i], x[i], start)
            x = x[torch.arange(len(x)), lengths - 1][:, None]
        return F.linear(x[:, 0], self.model.output_weight)

    def score_prompt(self, request: Request, states: Tensor, start: int) -> None:
        """Records the log-probabilities of the prompt's tokens that the states (T, C) from token `start` on predict."""
        request.scores += [None] if start == 0 else []
        ids = torch.tensor(request.prompt[start + 1 : start + 1 + len(states)], device=self.device)
        size = rows_at_once(states, self.model.output_weight)
        for x, some in zip(states[: len(ids)].split(size), ids.split(size), strict=True):
            logits = F.linear(x, self.model.output_weight)[:, : self.vocab_size].float()
            request.scores += log_probabilities(logits, some, request.logprobs or 0)

    def begin(self, requests: list[Request], logits: Tensor) -> list[Request]:
        """Makes requests live whose prompts are in the rows behind the live ones, and gives them their first token."""
        if not bool(logits.isfinite().all()):
            for request in requests:
                request.finish("error")
            raise ValueError("the model answers this prompt with nan or inf: its weights are damaged")
        self.live, self.batch = self.live + requests, None
        return self.give(requests, Sampler(requests, self.vocab_size, self.device)(logits).tolist())

    def give(self, requests: list[Request], ids: list[int]) -> list[Request]:
        for request, id in zip(requests, ids, strict=True):
            request.append(id)
        self.leave()
        return requests

    def leave(self) -> None:
        """Frees the rows of requests that have ended: the last rows fill the gaps."""
        for row in reversed(range(len(self.live))):
            if self.live[row].finish_reason:
                request, last, self.batch = self.live[row], self.live.pop(), None
                if self.reuse and not self.waiting:
                    self.keep(request, row)
                if row < len(self.live):
                    self.live[row] = last
                    self.copy(len(self.live), row)

    def keep(self, request: Request, row: int) -> None:
        """Keeps what a request that has ended left in `row`, in the last row that is free, or the one kept longest."""
        first = len(self.live) + (row != len(self.live))  # the last live row has still to move to `row`
        free = [other for other in range(first, self.slots) if other not in self.kept]
        target = free[-1] if free else next(iter(self.kept), None)
        if target is not None:
            self.copy(row, target)
            self.kept.pop(target, None)  # the newest comes last
            self.kept[target] = (request.prompt + request.tokens)[: int(self.cache.length[row])]

    def recall(self, request: Request) -> int:
        """How many of a prompt's tokens a kept row has read; it is copied to the last row, with the keys of these."""
        best, source, prompt = 0, 0, request.prompt[:-1]  # one token is read again, for its logits
        for row, read in self.kept.items() if not request.echo else ():
            pairs = enumerate(zip(read, prompt, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(read), len(prompt)))
            if same >= max(WORTH, best + 1) and (same == len(read) or len(read) <= self.cache.window):
                best, source = same, row
        if best:
            target, request.reused = len(self.cache.length) - 1, best
            self.copy(source, target, best)
            if best == len(self.kept[source]) or source == target:  # its text goes on
                del self.kept[source]
        return best

    def held(self, request: Request) -> list[tuple[Tensor, Tensor]]:
        """For each layer the positions (K, W) of the keys that a live request holds, -1 for none, and their scores."""
        row = self.live.index(request)
        return [(layer.position[row, :, :-1].clone(), layer.s[row, :, :-1].clone()) for layer in self.cache.layers]

    def allocate(self, length: int) -> None:
        """Memory for texts of `length` tokens, if there is less. Where keys leave, W + 1 suffice for any text."""
        length = min(length, self.enough)
        if self.max_length < length:
            assert not self.live and not self.reader, "the first request to an idle engine decides how long all may be"
            room = self.decoder.room(length) if self.decoder else length
            self.cache = self.model.new_cache(self.slots + (self.slots > 1), length, room=room)
            self.frequencies = self.cache.frequencies.repeat(len(self.cache.length), 1)
            self.kept.clear()
            self.max_length = math.inf if length == self.enough else length

    def rows(self, first: int, count: int, decoder=None) -> Cache:
        """A Cache of some rows, which shares their memory."""
        cache, some = copy.copy(self.cache), slice(first, first + count)
        cache.layers = [Slots(*(x[some] for x in slots)) for slots in self.cache.layers]
        cache.length = self.cache.length[some]
        if self.model.config.rope_factor:
            cache.frequencies = self.frequencies[some].view((count, 1, -1) if decoder else (count, 1, 1, -1))
        return cache

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Copies a row, or what it was after `length` tokens, which takes a row that has evicted nothing."""
        if source == target and length is None:
            return
        n = int(self.cache.length[source]) if length is None else length
        self.cache.length[target], self.frequencies[target] = n, self.frequencies[source]
        for slots in self.cache.layers:
            for x in slots:
                x[target, :, :n] = x[source, :, :n]  # until keys leave, a key is in the slot of its position
            slots.s[target, :, n:], slots.position[target, :, n:] = NEVER, -1
