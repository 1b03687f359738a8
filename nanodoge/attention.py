"""Dynamic Mask Attention, fast and exact: scores folded into the keys, chunks of live keys, a constant-size cache."""

import math

import torch
import torch.nn.functional as F

CHUNK = 256  # queries handled together beyond the window: for c of them W + c keys are picked, and 2 c masked
GPU_CHUNK = 1024  # on a GPU: its kernels divide queries, 64 each, among more than a hundred cores (not measured)
LARGEST = 80.0  # exponent of a key's score: see key_scores
NEVER = -1e30  # score of a slot without a key: exp(NEVER - anything) is 0, and it is finite, so no inf - inf = nan


def key_scores(A, dt):
    """exp(A softplus(dt)) in fp32: A (K,), dt (..., K) -> (..., K), the scores of keys.

    Above 88.7 exp leaves the range of fp32 (which is bf16's too), and a softmax over inf is nan. `fold` multiplies by
    sqrt(D) on top of it. So the exponent stops at 80: e^80 = 5.5e34 leaves room for a factor of 6,000. A score so large
    draws all attention to its key whatever it is exactly; one that was stopped has no gradient. (fp16 ends at 65,504,
    which an exponent of 8.7 reaches for heads of 128; no stage trains in it, and `fold` stops scores there at half.)
    """
    return torch.exp((A.float() * F.softplus(dt.float())).clamp(max=LARGEST))


def fold(k, s):
    """k (..., S, D) with 8 columns more, which add sqrt(D) s, of the scores s (..., S) fp32, to the products with what
    fold_queries makes of a query.

    softmax(q.k / sqrt(D) + s) is plain attention over vectors one column longer: [q, 1] . [k, s sqrt(D)]. The fused
    kernels want the width a multiple of 8; in bf16 the score is split over two of those columns, high part and
    remainder, and keeps 16 bits.
    """
    column = (s[..., None] * math.sqrt(k.shape[-1])).clamp(max=torch.finfo(k.dtype).max / 2)  # room for q.k beside it
    high = column.to(k.dtype)
    low = (column - high.float()).to(k.dtype)
    return torch.cat((k, high, low, k.new_zeros(6).expand(*k.shape[:-1], 6)), dim=-1)


def fold_queries(q):
    """q (..., T, D) with 8 columns more, which meet those of k: 1 for the two parts of the score."""
    columns = torch.cat((q.new_ones(2), q.new_zeros(6)))
    return torch.cat((q, columns.expand(*q.shape[:-1], 8)), dim=-1)


def attend(q, k, v, mask=None):
    """The fused kernel: q (B, H, T, D + 8) and k (B, K, S, D + 8) folded, v (B, K, S, D) -> (B, H, T, D). `mask` (B, 1,
    T, S) is added to the logits; without one, T = S and every query sees all keys up to its own."""
    size = v.shape[-1]
    v = torch.cat((v, v.new_zeros(8).expand(*v.shape[:-1], 8)), dim=-1)  # the kernels want it as wide as k
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=size**-0.5, enable_gqa=mask is None
    )[..., :size]  # fmt: skip


def causal_attention(q, k, v, s):
    """Dynamic Mask Attention within the window, where the mask is only the causal one: no T x T tensor is made.
    q (B, H, T, D), k and v (B, K, T, D), s (B, K, T) fp32 -> (B, H, T, D)."""
    return attend(fold_queries(q), fold(k, s), v)


def strongest(s):
    """The indices of s (..., n), which stands in order of position, from the strongest to the weakest. Of equal scores
    the later key wins: a stable sort of the reversed row meets it first."""
    return s.shape[-1] - 1 - s.flip(-1).sort(dim=-1, descending=True, stable=True).indices


def lifetimes(order, window):
    """When each key leaves: order (..., S), from the strongest key to the weakest -> end (..., S) int64. Key j is seen
    by the queries i with j <= i < end_j; those with end_j = S are still kept after the last key.

    A key is gone once W stronger ones have been seen. So walk from the strongest to the weakest: a key's end is the
    W-th smallest of the positions walked before it, or its own position if that is later. The W-th smallest of every
    such beginning of the walk is found for all at once, by halving the range it is in: count the positions in the lower
    half; if they are W or more it is there, else seek what is left of W in the upper half. After each round the walk is
    split by halves, in order, so that the walk within a range stands together and a running sum counts the next halves
    (a wavelet tree; Grossi, Gupta and Vitter 2003). S log S steps, none of which waits for another key.
    """
    S = order.shape[-1]
    end, place, walk = torch.full_like(order, S), torch.arange(S, device=order.device), order
    count = place[window:].expand_as(order[..., window:])  # how much of each beginning lies in its range
    base, rank = torch.zeros_like(count), torch.full_like(count, window)  # where the range starts; which one is sought
    for half in [2**bit for bit in reversed(range((S - 1).bit_length()))] if S > window else []:
        lower = walk & half == 0
        before = F.pad(lower.cumsum(-1), (1, 0))  # lower ones ahead of a place; a range of 2 half has half of them
        below = before.gather(-1, base + count) - (base >> 1)
        up = below < rank
        base, rank, count = base + up * half, rank - up * below, torch.where(up, count - below, below)
        start = (place & -2 * half) >> 1  # lower ones ahead of the range that a place is in
        target = torch.where(lower, start + before[..., :-1], start + half + place - before[..., :-1])
        walk = torch.empty_like(walk).scatter_(-1, target, walk)
    return end.scatter_(-1, order[..., window:], torch.maximum(base, order[..., window:]))


def chunks(end, first, window, dtype):
    """Cuts the queries `first` .. S, whose keys have the ends `end` (R, S), into chunks of c. Yields the queries as a
    slice counted from `first`, the n keys they may see (R, n) as rows of an (R S, D) matrix, and the mask (R, c, m) of
    `dtype` to add to the logits of the last m of these keys.

    The keys are the W at most that are alive at the chunk's start, and its own c. A new key pushes out at most one, so
    at most c of the old leave within the chunk: put in order of their ends, those are the last c, and stand beside the
    new ones. Only these m = 2 c columns need to be compared.
    """
    R, S = end.shape
    kept = torch.arange(first, device=end.device).expand(R, first)
    offset = torch.arange(0, R * S, S, device=end.device)[:, None]
    size = CHUNK if end.device.type == "cpu" else GPU_CHUNK
    for start in range(first, S, size):
        new = torch.arange(start, min(start + size, S), device=end.device)
        query = (new - start)[:, None].float()  # counted from the start, so that float32 is exact
        kept = kept.gather(-1, end.gather(-1, kept).sort(dim=-1, descending=True).indices[:, :window])
        kept = torch.cat((kept, new.expand(R, -1)), dim=-1)
        risk = kept[:, -2 * len(new) :]  # (R, m), against the queries (c, 1)
        comes = (risk - start).clamp(min=0)[:, None].float()
        leaves = (end.gather(-1, risk) - start).clamp(max=len(new))[:, None].float()
        inside = torch.minimum(query + 1 - comes, leaves - query)  # above 0 while a key is there
        mask = F.threshold(inside, 0.0, -math.inf).clamp_(max=0.0)  # faster than comparisons
        yield slice(start - first, start - first + len(new)), kept + offset, mask.to(dtype)


def probabilities(q, k, mask, memory):
    """q (G c, D + 8) and k (n, D + 8) folded; mask (c, m) for the last m keys -> the softmax (G c, n), and a tensor of
    that shape to write over. Both lie in `memory`: new memory comes from the system page by page, filled with zeros
    first, which for every chunk takes half as long as all the rest."""
    logits, p = memory[: 2 * len(q) * len(k)].view(2, len(q), len(k))
    torch.addmm(logits, q, k.T, beta=0, alpha=(q.shape[1] - 8) ** -0.5, out=logits)
    logits.view(-1, len(mask), len(k))[..., -mask.shape[1] :] += mask
    return torch.softmax(logits, -1, out=p), logits


def attend_chunk(q, k, v, mask, memory):
    """A chunk of queries and the keys picked for them: q (R, G c, D + 8) folded, the heads that share keys one after
    another; k (R, n, D + 8) folded; v (R, n, D); mask (R, c, m) for the last m keys -> (R, G c, D). On a processor
    plain products of so many rows are faster than the fused kernel, which cuts them into smaller tiles. (On a GPU a
    kernel takes a mask, or keys that heads share, and not both: hence the heads one after another.)"""
    if q.device.type != "cpu":
        mask = F.pad(mask, (k.shape[1] - mask.shape[2], 0)).repeat(1, q.shape[1] // mask.shape[1], 1)
        return attend(*(x[:, None] for x in (q, k, v, mask)))[:, 0]
    out = q.new_empty(*q.shape[:2], v.shape[2])
    for r in range(len(q)):
        torch.mm(probabilities(q[r], k[r], mask[r], memory)[0], v[r], out=out[r])
    return out


def chunk_gradients(dout, q, k, v, mask, memory):
    """The gradients of q, k and v, from that of the output of attend_chunk, which is computed again."""
    if q.device.type != "cpu":
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


class ChunkedAttention(torch.autograd.Function):
    """q (R, G, T, D + 8), the last T queries of R rows of S keys; k (R S, D + 8), v (R S, D); end (R, S) -> (R, G, T,
    D). q and k are folded.

    A Function of its own, because the automatic gradient of picking keys would be a tensor as long as the text for each
    chunk, T T in all; here every chunk adds to the same one. And neither the picked keys nor their probabilities are
    held for the backward pass, which would be W / CHUNK times the text, but found again.
    """

    @staticmethod
    def forward(ctx, q, k, v, end, window):
        ctx.save_for_backward(q, k, v, end)
        ctx.window = window
        out = q.new_empty(*q.shape[:3], v.shape[1])
        for piece, _, inputs in picked(q, k, v, end, window):
            out[:, :, piece] = attend_chunk(*inputs).view(out[:, :, piece].shape)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, end = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for piece, rows, inputs in picked(q, k, v, end, ctx.window):
            dx, *parts = chunk_gradients(dout[:, :, piece].flatten(1, 2), *inputs)
            dq[:, :, piece] = dx.view(dq[:, :, piece].shape)
            for total, part in zip((dk, dv), parts, strict=True):
                total.index_add_(0, rows.flatten(), part.flatten(0, 1).to(total.dtype))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def picked(q, k, v, end, window):
    """What ChunkedAttention is given -> for each chunk its queries as a slice, its keys as rows of k and v, and the
    arguments of attend_chunk."""
    R, G, T, _ = q.shape
    memory = q.new_empty(2 * G * min(CHUNK, T) * min(window + CHUNK, end.shape[1]) if q.device.type == "cpu" else 0)
    for piece, rows, mask in chunks(end, end.shape[1] - T, window, q.dtype):
        keys, values = F.embedding(rows, k), F.embedding(rows, v)  # whole rows, where gather goes number by number
        yield piece, rows, (q[:, :, piece].flatten(1, 2), keys, values, mask, memory)


@torch.compiler.disable  # the number of chunks is no constant of a graph
def chunked_attention(q, k, v, s, window):
    """Dynamic Mask Attention of the last T queries q (B, H, T, D) to the S keys k, v (B, K, S, D) with scores s (B, K,
    S), and what dynamic_mask_attention returns. A processor computes it in fp32 at least: many have no faster product,
    and rounded to bf16 the logits would be as coarse as 1/16."""
    K, S = s.shape[1:]
    order = strongest(s.detach())  # what is kept is a choice, not a quantity: it has no gradient
    end = lifetimes(order.flatten(0, 1), window)
    wide = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
    rows = q.unflatten(1, (K, -1)).flatten(0, 1)  # (B K, G, T, D): the queries that share a row of keys
    rows, keys, values = fold_queries(rows.to(wide)), fold(k.to(wide), s).flatten(0, 2), v.to(wide).flatten(0, 2)
    out = ChunkedAttention.apply(rows, keys, values, end, window).view(q.shape)
    return out.to(q.dtype), order[..., :window].sort(dim=-1).values


def dynamic_mask_attention(q, k, v, s, window):
    """Dynamic Mask Attention of any length, exact, in time and memory linear in the length.

    q (B, H, T, D); k, v (B, K, S, D); s (B, K, S) fp32. The queries belong to the last T of the S keys, which stand in
    order of position. Returns the outputs (B, H, T, D) and the indices (B, K, at most W) of the keys that a later query
    could still see, in order of position.
    """
    T, S = q.shape[2], k.shape[2]
    done = min(T, window) if T == S else 0  # with no earlier keys, the first W queries see everything before them
    if done == S:
        return causal_attention(q, k, v, s), torch.arange(S, device=s.device).expand(s.shape)
    out, kept = chunked_attention(q[:, :, done:], k, v, s, window)
    if done:
        out = torch.cat((causal_attention(*(x[:, :, :done] for x in (q, k, v, s))), out), dim=2)
    return out, kept


class Cache:
    """What generation remembers: for each layer the W strongest keys so far, whatever the length of the text.

    While there is room a key goes to the slot of its position. After that the new key takes the place of the weakest
    one, or, if it is weaker still, goes to the spare slot at the end, which nobody ever reads. So no shape changes from
    token to token, nothing is allocated, and rows of a batch may stand at different positions.

    layers: for each one k, v (B, K, N, D), s (B, K, N) fp32, NEVER where a slot holds no key, and when (B, K, N), the
    positions, which break ties. length (B,): tokens read so far, whether or not their keys were kept. frequencies (D,):
    of the rotary embedding in this text.
    """

    def __init__(self, num_layers, batch_size, num_heads, window, length, frequencies, dtype=None):
        """num_heads: key/value heads (K). window: keys to keep (W). length: tokens that the text may reach."""
        device, self.frequencies, self.window = frequencies.device, frequencies, window
        self.evicts = length > window  # else no key ever has to leave
        shape = batch_size, num_heads, min(window, length) + 1
        self.layers = [
            (torch.zeros(*shape, len(frequencies), device=device, dtype=dtype),
             torch.zeros(*shape, len(frequencies), device=device, dtype=dtype),
             torch.full(shape, NEVER, device=device), torch.full(shape, -1, device=device))
            for _ in range(num_layers)
        ]  # fmt: skip
        self.length = torch.zeros(batch_size, dtype=torch.long, device=device)

    def attend(self, layer, q, k, v, s):
        """Adds keys and values (B, K, T, D) with scores s (B, K, T) to a layer and returns what the queries (B, H, T,
        D) see, themselves included. Padded places have the score NEVER, hence no say. Of several tokens the queries may
        be fewer: they are those of the last."""
        if k.shape[2] > 1:
            return self.extend(*self.layers[layer], q, k, v, s)
        remember(self.layers[layer], self.length, self.evicts, k, v, s)
        return recall(*self.layers[layer][:3], q)

    def extend(self, slot_k, slot_v, slot_s, slot_when, q, k, v, s):
        when = self.length[:, None, None] + torch.arange(k.shape[2], device=k.device).expand(s.shape)
        held = int(self.length.max())
        if held:  # put what is in the slots before the new keys, in order of position
            order = slot_when.argsort(dim=-1)[..., -min(held, self.window + 1) :]
            k = torch.cat((pick(slot_k, order), k.to(slot_k.dtype)), dim=2)
            v = torch.cat((pick(slot_v, order), v.to(slot_v.dtype)), dim=2)
            s = torch.cat((slot_s.gather(2, order), s), dim=2)
            when = torch.cat((slot_when.gather(2, order), when), dim=2)
        out, kept = dynamic_mask_attention(q, k, v, s, self.window)
        # Keys before padding: then a row that is not full has its keys in the slots 0, 1, 2 ...
        kept = kept.gather(-1, (s.gather(-1, kept) == NEVER).byte().argsort(dim=-1, stable=True))
        n = kept.shape[-1]
        slot_k[:, :, :n], slot_v[:, :, :n] = pick(k, kept), pick(v, kept)
        slot_s[:, :, :n], slot_when[:, :, :n] = s.gather(2, kept), when.gather(2, kept)
        slot_s[:, :, n:], slot_when[:, :, n:] = NEVER, -1
        return out


def pick(x, index):
    """x (B, K, S, D), index (B, K, n) -> (B, K, n, D). Copies whole rows, where gather goes number by number."""
    B, K, S, D = x.shape
    rows = index + torch.arange(0, B * K * S, S, device=x.device).view(B, K, 1)
    return F.embedding(rows, x.reshape(-1, D))


def remember(slots, length, evicts, k, v, s):
    """Puts one key and value (B, K, 1, D) of score s (B, K, 1) into the slots of a layer (see Cache), in place."""
    slot_s, slot_when = slots[2:]
    spare = slot_s.shape[-1] - 1
    slot = position = length[:, None, None].expand(s.shape)
    if evicts:
        held = slot_s[..., :spare]
        weakest = held == held.amin(-1, keepdim=True)
        oldest = slot_when[..., :spare].masked_fill(~weakest, torch.iinfo(torch.long).max).argmin(-1, keepdim=True)
        full = position >= spare
        loses = full & (s < held.gather(-1, oldest))
        slot = torch.where(loses, spare, torch.where(full, oldest, position))
        s = s.masked_fill(loses, NEVER)
    put(slots, rows_of(slot, spare + 1), k.flatten(0, 2), v.flatten(0, 2), s.flatten(), position.flatten())


def rows_of(slot, size):
    """Slots, one for each of B K heads and counted in a head of `size`, -> (B K,), counted through all heads."""
    return slot.flatten() + torch.arange(0, slot.numel() * size, size, device=slot.device)


def put(slots, rows, k, v, s, position):
    """Writes k, v (B K, D), s and position (B K,) into these of a layer's slots, in place."""
    slot_k, slot_v, slot_s, slot_when = slots
    slot_k.view(-1, k.shape[1]).index_copy_(0, rows, k.to(slot_k.dtype))
    slot_v.view(-1, v.shape[1]).index_copy_(0, rows, v.to(slot_v.dtype))
    slot_s.view(-1).index_copy_(0, rows, s)
    slot_when.view(-1).index_copy_(0, rows, position)


def recall(slot_k, slot_v, slot_s, q):
    """What one query a head (B, H, 1, D) finds in the slots of a layer: (B, H, 1, D)."""
    (B, H, _, D), K = q.shape, slot_k.shape[1]
    k, v, s = slot_k.flatten(0, 1), slot_v.flatten(0, 1), slot_s.view(B * K, 1, -1)
    logits = torch.bmm(q.reshape(B * K, H // K, D), k.mT).float() * D**-0.5 + s
    return torch.bmm(logits.softmax(-1).to(v.dtype), v).view(B, H, 1, D)
