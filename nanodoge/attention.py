"""Dynamic Mask Attention, fast and exact: what `attention_by_definition` of model.py defines, by three facts.

1. Within the window the mask costs nothing. The score s_j belongs to the key, not to the (query, key) pair, so it is
   one more column of the dot product: q.k / sqrt(D) + s = [q, 1] . [k, s sqrt(D)] / sqrt(D). The fused causal kernel
   computes that without ever building a (T, T) tensor.  -> fold, causal_attention

2. A key, once dropped, never returns: its rank among the keys seen so far can only get worse. So a cache of W slots is
   exact for a text of any length. A new key takes the slot of the weakest; no shape changes from token to token,
   nothing is allocated, and the rows of a batch may stand at different positions.  -> Cache

3. Prefill and training are linear in the length. For the same reason a chunk of c queries can see the W keys alive at
   its start and its own c, no others: T (W + c) products instead of T T.  -> eviction_steps, iter_chunks

Shapes: B batch, T query length, S key length, H attention heads, K key/value heads, G = H / K heads that share keys,
        D head size, W keep window, N slots of a cache, R = B K rows of keys.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanodoge.memory import outside_graphs

CHUNK = 256  # queries in a chunk on a CPU: of W + CHUNK keys that are gathered, the last 2 CHUNK are masked
GPU_CHUNK = 1024  # on a GPU: its kernels divide queries, 64 each, among more than a hundred cores (not measured)
LARGEST = 80.0  # exponent of a key's score: see key_scores
NEVER = -1e30  # score of padding and of empty slots: exp(NEVER - anything) is 0; being finite, it makes no inf - inf


def dynamic_mask_attention(q: Tensor, k: Tensor, v: Tensor, s: Tensor, window: int, chunk: int | None = None):
    """Returns the attention outputs (B, H, T, D), and the indices (B, K, at most W), in order of position, of the keys
    that a later query could still see. Time and memory are linear in the length.

    q (B, H, T, D); k, v (B, K, S, D); s (B, K, S) fp32. The queries are those of the last T of S positions. chunk:
    queries computed together beyond the window, which changes speed only; None: the device's default.
    """
    T, S = q.shape[2], k.shape[2]
    within = min(T, window) if T == S else 0  # with no earlier keys, the first W queries see all keys up to their own
    if within == S:
        return causal_attention(q, k, v, s), torch.arange(S, device=s.device).expand(s.shape)
    out, kept = chunked_attention(q[:, :, within:], k, v, s, window, chunk)
    if within:
        out = torch.cat((causal_attention(*(x[:, :, :within] for x in (q, k, v, s))), out), dim=2)
    return out, kept


# ---- 1. The score folded into the keys


def key_scores(A: Tensor, dt: Tensor) -> Tensor:
    """exp(A softplus(dt)) (..., K) in fp32, the scores of keys, of A (K,) and dt (..., K).

    The exponent stops at 80. exp overflows fp32 and bf16 above 88.7, and a softmax over inf is nan; `fold` multiplies
    by sqrt(D), for which e^80 = 5.5e34 leaves room. A score that large draws all attention to its key whatever its
    value; a stopped one has no gradient. (fp16 ends at 65,504, so `fold` clamps there; no stage trains in it.)
    """
    return torch.exp((A.float() * F.softplus(dt.float())).clamp(max=LARGEST))


def fold(k: Tensor, s: Tensor) -> Tensor:
    """k (..., S, D) and scores s (..., S) fp32 -> (..., S, D + 8), whose product with fold_queries(q) is q.k +
    sqrt(D) s. Kernels want a width that is a multiple of 8. In bf16 two of these columns hold the score, its rounded
    value and the remainder, so it keeps 16 bits."""
    column = (s[..., None] * math.sqrt(k.shape[-1])).clamp(max=torch.finfo(k.dtype).max / 2)  # room for q.k beside it
    high = column.to(k.dtype)
    low = (column - high.float()).to(k.dtype)
    return torch.cat((k, high, low, k.new_zeros(6).expand(*k.shape[:-1], 6)), dim=-1)


def fold_queries(q: Tensor) -> Tensor:
    """q (..., T, D) -> (..., T, D + 8): a 1 for each of the two columns of the score."""
    columns = torch.cat((q.new_ones(2), q.new_zeros(6)))
    return torch.cat((q, columns.expand(*q.shape[:-1], 8)), dim=-1)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, H, T, D), by torch's kernel: q (B, H, T, D + 8) and k (B, K, S, D + 8) folded, v (B, K, S, D). mask (B, 1, T,
    S) is added to the logits; without one T = S, and attention is causal."""
    D = v.shape[-1]
    v = torch.cat((v, v.new_zeros(8).expand(*v.shape[:-1], 8)), dim=-1)  # as wide as k, or the kernel is a slower one
    options = dict(attn_mask=mask, is_causal=mask is None, scale=D**-0.5, enable_gqa=mask is None)
    return F.scaled_dot_product_attention(q, k, v, **options)[..., :D]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Dynamic Mask Attention within the window, where only the causal mask is left: q (B, H, T, D), k and v (B, K, T,
    D), s (B, K, T) fp32 -> (B, H, T, D)."""
    return fused_attention(fold_queries(q), fold(k, s), v)


# ---- 2. The constant-size cache


class Slots(NamedTuple):
    """What one layer remembers: N = min(W, length) + 1 slots, the last of which is a spare that is never read."""

    k: Tensor  # (B, K, N, D)
    v: Tensor  # (B, K, N, D)
    s: Tensor  # (B, K, N) fp32, NEVER in an empty slot
    position: Tensor  # (B, K, N) int64, of the key, which breaks ties; -1 in an empty slot


class Cache:
    """The W strongest keys of each layer so far, in memory that does not grow with the text.

    While there is room, a key goes to the slot of its position. After that it takes the slot of the weakest key, or, if
    it is weaker itself, the spare slot.

    layers: [Slots]. length (B,) int64: tokens read so far, whether or not their keys were kept. frequencies (D,): of
    the rotary embedding in this text. evicts: whether the text may have more keys than slots. used: all keys are in
    the first `used` slots, which are all that a single token reads (None: all slots). chunk: as for
    dynamic_mask_attention.
    """

    def __init__(self, num_layers, batch_size, num_heads, window, length, frequencies, dtype=None):
        """num_heads: key/value heads (K). window: keys to keep (W). length: tokens that the text may have."""
        device, self.frequencies, self.window, self.chunk = frequencies.device, frequencies, window, None
        self.evicts, self.used = length > window, None
        shape = batch_size, num_heads, min(window, length) + 1

        def empty():
            k, v = (torch.zeros(*shape, len(frequencies), device=device, dtype=dtype) for _ in range(2))
            return Slots(k, v, torch.full(shape, NEVER, device=device), torch.full(shape, -1, device=device))

        self.layers = [empty() for _ in range(num_layers)]
        self.length = torch.zeros(batch_size, dtype=torch.long, device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        """Adds keys and values (B, K, T, D) with scores s (B, K, T) to a layer; returns what the queries (B, H, T, D)
        find, (B, H, T, D). Padding keys get score NEVER, so zero attention weight. q may cover only the last
        positions."""
        if k.shape[2] > 1:
            return self.extend(self.layers[layer], q, k, v, s)
        remember(self.layers[layer], self.length, self.evicts, k, v, s)
        return attend_cache(self.layers[layer], q, self.used)

    def extend(self, slots: Slots, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        """`attend` for several tokens: the kept keys, in order of position, stand before the new ones."""
        position = self.length[:, None, None] + torch.arange(k.shape[2], device=k.device).expand(s.shape)
        held = int(self.length.max())
        if held:
            order = slots.position.argsort(dim=-1)[..., -min(held, self.window + 1) :]
            k = torch.cat((pick(slots.k, order), k.to(slots.k.dtype)), dim=2)
            v = torch.cat((pick(slots.v, order), v.to(slots.v.dtype)), dim=2)
            s = torch.cat((slots.s.gather(2, order), s), dim=2)
            position = torch.cat((slots.position.gather(2, order), position), dim=2)
        out, kept = dynamic_mask_attention(q, k, v, s, self.window, self.chunk)
        # Keys before padding, so that the keys of a row that is not full lie in the slots of their positions.
        kept = kept.gather(-1, (s.gather(-1, kept) == NEVER).byte().argsort(dim=-1, stable=True))
        n = kept.shape[-1]
        slots.k[:, :, :n], slots.v[:, :, :n] = pick(k, kept), pick(v, kept)
        slots.s[:, :, :n], slots.position[:, :, :n] = s.gather(2, kept), position.gather(2, kept)
        slots.s[:, :, n:], slots.position[:, :, n:] = NEVER, -1
        return out

    def append(self, layer: int, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        """For attention by definition, in a cache that never evicts: puts keys and values (B, K, T, D) with scores s
        (B, K, T) into the slots of their positions -> k, v, s of all positions so far, and the new positions (B, T)."""
        slots, row = self.layers[layer], torch.arange(len(k), device=k.device)[:, None]
        position = self.length[:, None] + torch.arange(k.shape[2], device=k.device)
        position = position.clamp(max=slots.s.shape[2] - 1)  # padding may reach beyond the text
        for slot, new in zip(slots, (k, v, s, position[:, None].expand(s.shape)), strict=True):
            slot[row, :, position] = new.transpose(1, 2).to(slot.dtype)
        return *(x[:, :, : int(position.max()) + 1] for x in slots[:3]), position


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x (B, K, S, D), index (B, K, n) -> (B, K, n, D). Copies whole rows, where gather copies number by number."""
    B, K, S, D = x.shape
    rows = index + torch.arange(0, B * K * S, S, device=x.device).view(B, K, 1)
    return F.embedding(rows, x.reshape(-1, D))


def remember(slots: Slots, length: Tensor, evicts: bool, k: Tensor, v: Tensor, s: Tensor) -> None:
    """Puts one key and value (B, K, 1, D) of score s (B, K, 1) into the slots of a layer, in place. length (B,) and
    evicts: as in Cache."""
    spare = slots.s.shape[-1] - 1
    slot = position = length[:, None, None].expand(s.shape)
    if evicts:
        held = slots.s[..., :spare]
        weakest = held == held.amin(-1, keepdim=True)
        last = torch.iinfo(torch.long).max
        oldest = slots.position[..., :spare].masked_fill(~weakest, last).argmin(-1, keepdim=True)
        full = position >= spare
        loses = full & (s < held.gather(-1, oldest))
        slot = torch.where(loses, spare, torch.where(full, oldest, position))
        s = s.masked_fill(loses, NEVER)
    put(slots, rows_of(slot, spare + 1), k.flatten(0, 2), v.flatten(0, 2), s.flatten(), position.flatten())


def rows_of(slot: Tensor, size: int) -> Tensor:
    """Slots of B K heads, each counted within its head of `size` slots, -> (B K,), counted through all heads."""
    return slot.flatten() + torch.arange(0, slot.numel() * size, size, device=slot.device)


def put(slots: Slots, rows: Tensor, k: Tensor, v: Tensor, s: Tensor, position: Tensor) -> None:
    """Writes k, v (B K, D), s and position (B K,) into `rows` of a layer's slots, in place."""
    slots.k.view(-1, k.shape[1]).index_copy_(0, rows, k.to(slots.k.dtype))
    slots.v.view(-1, v.shape[1]).index_copy_(0, rows, v.to(slots.v.dtype))
    slots.s.view(-1).index_copy_(0, rows, s)
    slots.position.view(-1).index_copy_(0, rows, position)


def attend_cache(slots: Slots, q: Tensor, used: int | None = None) -> Tensor:
    """What one query a head, (B, H, 1, D), finds in the slots of a layer, (B, H, 1, D). used: as in Cache."""
    (B, H, _, D), K = q.shape, slots.k.shape[1]
    k, v = slots.k.flatten(0, 1)[:, :used], slots.v.flatten(0, 1)[:, :used]
    s = slots.s.view(B * K, 1, -1)[..., :used]
    logits = torch.bmm(q.reshape(B * K, H // K, D), k.mT).float() * D**-0.5 + s
    return torch.bmm(logits.softmax(-1).to(v.dtype), v).view(B, H, 1, D)


# ---- 3. Chunks of live keys


def rank_by_score(s: Tensor) -> Tensor:
    """The indices of s (..., S), which is in order of position, from the strongest key to the weakest. Of equal scores
    the later key comes first: a stable sort of the reversed row."""
    return s.shape[-1] - 1 - s.flip(-1).sort(dim=-1, descending=True, stable=True).indices


def eviction_steps(order: Tensor, window: int) -> Tensor:
    """When each key is dropped: order (..., S), from rank_by_score, -> end (..., S) int64. Query i sees key j if
    j <= i < end_j; keys with end_j = S are still kept after the last position.

    Key j is dropped once W stronger keys have been seen. So its end is the W-th smallest position among the keys that
    precede it in `order`, or its own position if that is later. The W-th smallest of every prefix of `order` is found
    for all prefixes at once, by halving the range of positions it is in: count the prefix's positions in the lower
    half; if they are W or more it is there, else look in the upper half for the rest of W. After each round the
    positions are partitioned stably by halves, so that those of a range stay contiguous and a running sum counts the
    next halves (a wavelet tree; Grossi, Gupta and Vitter 2003). S log S steps, all of them parallel over keys.
    """
    S = order.shape[-1]
    end, index, values = torch.full_like(order, S), torch.arange(S, device=order.device), order
    count = index[window:].expand_as(order[..., window:])  # how many of each prefix lie in its range
    base, rank = torch.zeros_like(count), torch.full_like(count, window)  # start of the range; the rank sought in it
    for half in [2**bit for bit in reversed(range((S - 1).bit_length()))] if S > window else []:
        lower = values & half == 0
        before = F.pad(lower.cumsum(-1), (1, 0))  # lower ones ahead of an index; a range of 2 half has half of them
        below = before.gather(-1, base + count) - (base >> 1)
        up = below < rank
        base, rank, count = base + up * half, rank - up * below, torch.where(up, count - below, below)
        start = (index & -2 * half) >> 1  # lower ones ahead of the range that an index is in
        target = torch.where(lower, start + before[..., :-1], start + half + index - before[..., :-1])
        values = torch.empty_like(values).scatter_(-1, target, values)
    return end.scatter_(-1, order[..., window:], torch.maximum(base, order[..., window:]))


def uses_kernel(x: Tensor) -> bool:
    """Whether torch's fused kernel computes a chunk. A CPU's has small tiles: plain products of so many rows are faster
    there."""
    return x.device.type != "cpu"


def iter_chunks(q: Tensor, k: Tensor, v: Tensor, end: Tensor, window: int, size: int):
    """Cuts the T queries of ChunkedAttention, whose inputs these are, into chunks of `size`. Yields of each the c
    queries as a slice, the keys they may see as rows (R, n) of k and v, and the inputs of attend_chunk.

    The keys are the at most W that are alive at the chunk's start, and its own c. A new key evicts at most one, so at
    most c of the old are dropped within the chunk: ordered by their ends, those are the last c, next to the new
    keys. Only these m = 2 c columns need a mask.
    """
    (_, G, T, _), (R, S), device = q.shape, end.shape, q.device
    memory = q.new_empty(0 if uses_kernel(q) else 2 * G * min(size, T) * min(window + size, S))
    alive = torch.arange(S - T, device=device).expand(R, S - T)
    offset = torch.arange(0, R * S, S, device=device)[:, None]
    for start in range(S - T, S, size):
        new = torch.arange(start, min(start + size, S), device=device)
        query = (new - start)[:, None].float()  # counted from the start, so that float32 is exact
        alive = alive.gather(-1, end.gather(-1, alive).sort(dim=-1, descending=True).indices[:, :window])
        alive = torch.cat((alive, new.expand(R, -1)), dim=-1)
        masked = alive[:, -2 * len(new) :]  # (R, m), against the queries (c, 1)
        comes = (masked - start).clamp(min=0)[:, None].float()
        leaves = (end.gather(-1, masked) - start).clamp(max=len(new))[:, None].float()
        inside = torch.minimum(query + 1 - comes, leaves - query)  # above 0 while a key is visible
        mask = F.threshold(inside, 0.0, -math.inf).clamp_(max=0.0).to(q.dtype)  # faster than comparisons
        queries, rows = slice(start - S + T, start - S + T + len(new)), alive + offset
        yield queries, rows, (q[:, :, queries].flatten(1, 2), F.embedding(rows, k), F.embedding(rows, v), mask, memory)


def probabilities(q: Tensor, k: Tensor, mask: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """q (G c, D + 8) and k (n, D + 8) folded, mask (c, m) for the last m keys -> the softmax (G c, n), and a tensor of
    that shape to overwrite. Both lie in `memory`, which all chunks share: on a CPU fresh pages cost as much time as
    half of the rest."""
    logits, p = memory[: 2 * len(q) * len(k)].view(2, len(q), len(k))
    torch.addmm(logits, q, k.T, beta=0, alpha=(q.shape[1] - 8) ** -0.5, out=logits)
    logits.view(-1, len(mask), len(k))[..., -mask.shape[1] :] += mask
    return torch.softmax(logits, -1, out=p), logits


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, memory: Tensor) -> Tensor:
    """q (R, G c, D + 8) folded, the heads that share keys one after another; k (R, n, D + 8) folded; v (R, n, D); mask
    (R, c, m) for the last m keys -> (R, G c, D). (A kernel takes a mask, or keys that heads share, not both.)"""
    if uses_kernel(q):
        mask = F.pad(mask, (k.shape[1] - mask.shape[2], 0)).repeat(1, q.shape[1] // mask.shape[1], 1)
        return fused_attention(*(x[:, None] for x in (q, k, v, mask)))[:, 0]
    out = q.new_empty(*q.shape[:2], v.shape[2])
    for r in range(len(q)):
        torch.mm(probabilities(q[r], k[r], mask[r], memory)[0], v[r], out=out[r])
    return out


def chunk_gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, memory: Tensor):
    """The gradients of q, k, v from dout, that of attend_chunk(q, k, v, mask, memory), which is computed again."""
    if uses_kernel(q):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            return torch.autograd.grad(attend_chunk(*inputs, mask, memory), inputs, dout)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for r in range(len(q)):
        p, logits = probabilities(q[r], k[r], mask[r], memory)
        torch.mm(p.T, dout[r], out=dv[r])
        dp = torch.mm(dout[r], v[r].T, out=logits)
        dlogits = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
        torch.mm(dlogits, k[r], out=dq[r])
        torch.mm(dlogits.T, q[r], out=dk[r])
    scale = v.shape[-1] ** -0.5
    return dq.mul_(scale), dk.mul_(scale), dv


def key_lifetimes(s: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Of scores s (B, K, S): eviction_steps (B K, S), and the keys kept at the end (B, K, at most W) by position."""
    order = rank_by_score(s)
    return eviction_steps(order.flatten(0, 1), window), order[..., :window].sort(dim=-1).values


def attend_chunks(q: Tensor, k: Tensor, v: Tensor, end: Tensor, window: int, size: int) -> Tensor:
    """The forward pass of ChunkedAttention."""
    out = q.new_empty(*q.shape[:3], v.shape[1])
    for queries, _, inputs in iter_chunks(q, k, v, end, window, size):
        out[:, :, queries] = attend_chunk(*inputs).view(out[:, :, queries].shape)
    return out


def chunks_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, end: Tensor, window: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v of attend_chunks from dout, that of its output."""
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
    for queries, rows, inputs in iter_chunks(q, k, v, end, window, size):
        dx, *parts = chunk_gradients(dout[:, :, queries].flatten(1, 2), *inputs)
        dq[:, :, queries] = dx.view(dq[:, :, queries].shape)
        for total, part in zip((dk, dv), parts, strict=True):
            total.index_add_(0, rows.flatten(), part.flatten(0, 1).to(total.dtype))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


class ChunkedAttention(torch.autograd.Function):
    """q (R, G, T, D + 8), the last T queries of R rows of S keys; k (R S, D + 8), v (R S, D); end (R, S) -> (R, G, T,
    D). q and k are folded.

    Written by hand, because the automatic gradient of gathering keys would be a tensor as long as the text for each
    chunk, T T in all; here every chunk adds to one. And the gathered keys and their probabilities, W / c times the
    text, are not kept for the backward pass but computed again.
    """

    @staticmethod
    def forward(ctx, q, k, v, end, window, size):
        ctx.save_for_backward(q, k, v, end)
        ctx.window, ctx.size = window, size
        return attend_chunks(q, k, v, end, window, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return *chunks_gradients(dout, *ctx.saved_tensors, ctx.window, ctx.size), None, None, None


@outside_graphs  # on a GPU its backward pass runs autograd, which the compiler cannot trace
def chunked_attention(q: Tensor, k: Tensor, v: Tensor, s: Tensor, window: int, chunk: int | None):
    """dynamic_mask_attention, all of it in chunks. A CPU computes it in fp32 at least: many have no faster product, and
    rounded to bf16 the logits would be as coarse as 1/16."""
    K, by_kernel = s.shape[1], uses_kernel(q)
    end, kept = key_lifetimes(s.detach(), window)  # which keys are kept has no gradient
    dtype = q.dtype if by_kernel else torch.promote_types(q.dtype, torch.float32)
    queries = fold_queries(q.unflatten(1, (K, -1)).flatten(0, 1).to(dtype))  # (B K, G, T, D + 8)
    keys, values = fold(k.to(dtype), s).flatten(0, 2), v.to(dtype).flatten(0, 2)
    out = ChunkedAttention.apply(queries, keys, values, end, window, chunk or (GPU_CHUNK if by_kernel else CHUNK))
    return out.view(q.shape).to(q.dtype), kept
