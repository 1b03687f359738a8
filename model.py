"""The Doge language model, whole: RMSNorm, rotary embedding, Dynamic Mask Attention, MLP, CDMoE, cache, generation.

A language model reads a row of tokens and says, at each place, how likely every token of the vocabulary is to come
next. Doge is a Llama-like transformer: an embedding, a stack of blocks, a last norm, and the embedding again as output
matrix. A block adds to the running state x first what attention gathers from earlier tokens, then what a feed-forward
network makes of the result:

    x = input_residual          * x + Attention(RMSNorm(x))
    x = post_attention_residual * x + MLP(RMSNorm(x))              the two scales are learned vectors, 1 at the start

Two things are Doge's own.

Dynamic Mask Attention (DMA). Every key j gets a score from its value vector alone, s_j = exp(A softplus(dt_proj(v_j))).
The score is added to the attention logits of all queries that may see j, and a query sees only the W earlier keys of
largest score (`keep_window_size`; of equal scores the later key wins). So the model itself decides what is worth
remembering. Three facts make it fast, and the functions below are these facts, written down:

    1. s_j belongs to the key, not to the (query, key) pair, so it is one more column of the dot product: q gets a 1
       and k gets s_j. The fused causal kernel then computes DMA without ever building a T x T tensor.
       -> causal_attention
    2. A key that has been dropped never comes back, since its rank among the keys seen so far can only get worse. So
       generation needs W slots and no more, however long the text: the new key takes the place of the weakest.
       -> Cache
    3. For the same reason the keys that a stretch of c queries can see are the W kept at its start and its own c.
       A long text costs T (W + c) instead of T T, exactly.
       -> dynamic_mask_attention

Cross Domain Mixture of Experts (CDMoE). Beside the usual MLP stand E tiny experts of one hidden unit each. A router
names sqrt(E) rows and sqrt(E) columns, expert (i, j) scores x_i + y_j, and a token uses its k best experts. Thousands
of experts are searched at the price of two short lists.  -> CDMoE

Names of parameters and options are those of Hugging Face's Doge, so that its checkpoints load as they are; where that
implementation departs from the architecture (its router mixes tokens) ours does not follow, see tests/test_model.py.
Papers: Wonderful Matrices (arXiv 2412.11834), Trainable Dynamic Mask Sparse Attention (arXiv 2508.02124).

Shapes: B batch, T queries, S keys, H attention heads, K key/value heads, G = H / K, D head size, C hidden size,
        V vocabulary, W keep window, E experts.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # queries handled together beyond the window: for c of them W + c keys are picked, and 2 c masked
GPU_CHUNK = 1024  # on a GPU: its kernels divide queries, 64 each, among more than a hundred cores (not measured)
STRETCH = 1024  # tokens of a long row that a processor takes through a block together: NOTES.md has others
PIECE = 4096  # tokens of a prompt read together: two windows of the family, so that reading is mostly new tokens
LOSS_ELEMENTS = 2**20  # logits alive at once in the loss: 4 MB, so that they stay in a processor's cache
LOSS_ROWS = 256  # but at least these rows of them, to keep the matrix product busy
LIKELY = 256  # top_p looks at this many tokens first: sorting 32,768 takes longer than a small model's whole step
BLOCK = 256  # tokens that are summed up at once when one is drawn
LARGEST = 80.0  # exponent of a key's score: see key_scores
LAYERS, SIZE = 256, 2**24  # most of them, in a model: what is far beyond them is a slip, and would build for hours
NEVER = -1e30  # score of a slot without a key: exp(NEVER - anything) is 0, and it is finite, so no inf - inf = nan


@dataclass
class DogeConfig:
    """The shape of a model. Raises ValueError for shapes that cannot be built."""

    vocab_size: int = 32768  # number of token ids (V)
    hidden_size: int = 256  # width of the running state (C)
    intermediate_size: int = 512  # width inside the MLP; the family uses twice the hidden size
    num_hidden_layers: int = 8  # number of blocks
    num_attention_heads: int = 2  # query heads (H); head size is hidden_size / num_attention_heads
    num_key_value_heads: int = 1  # key/value heads (K), each shared by H / K query heads
    keep_window_size: int = 2048  # keys a query may see (W), those of largest dynamic-mask score
    max_position_embeddings: int = 2048  # context length the model is trained for
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_factor: float = 0.0  # stretches them in texts beyond max_position_embeddings (see rope_base); 0 = never
    rms_norm_eps: float = 1e-6  # keeps the norm of a zero vector finite
    initializer_range: float = 0.02  # standard deviation of the initial weights
    tie_word_embeddings: bool = True  # output matrix = embedding matrix
    qk_norm: bool = True  # RMSNorm on queries and keys (the oldest published checkpoints have none)
    is_moe: bool = False  # add CDMoE's experts to every MLP
    num_experts: int = 1024  # experts a layer (E), a perfect square
    num_experts_per_tok: int = 16  # experts a token uses (k)
    router_aux_loss_coef: float = 0.0  # weight of the load-balancing loss; 0 turns it off

    def __post_init__(self):
        sizes = [field.name for field in dataclasses.fields(DogeConfig) if field.type in (int, "int")]
        for name in sizes:
            most = LAYERS if name == "num_hidden_layers" else SIZE
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, and at most {most:,}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number above 0")
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(f"router_aux_loss_coef={self.router_aux_loss_coef} must be a number from 0 up")
        if self.rope_factor and not (1 <= self.rope_factor < math.inf and self.head_dim > 2):
            raise ValueError(f"rope_factor={self.rope_factor} must be 0 or a number from 1 up, and heads wider than 2")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(f"hidden_size={self.hidden_size} must be an even multiple of num_attention_heads={heads}")
        if heads % groups:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}")
        if self.is_moe and math.isqrt(self.num_experts) ** 2 != self.num_experts:
            nearest = round(math.sqrt(self.num_experts)) ** 2
            raise ValueError(f"num_experts={self.num_experts} must be a perfect square, for example {nearest}")
        if self.is_moe and self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}")

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    def rope_base(self, length):
        """The base of the rotary wavelengths in a text that may reach `length` tokens.

        Positions beyond the trained ones would bring angles that the model has never met. Dynamic NTK scaling, with
        which the family is published, raises the base with the length, so that the slowest dimensions turn no further
        than they did in training and the fastest, which tell neighbours apart, are left alone. Up to
        max_position_embeddings nothing changes. The base must be one for all keys of a text, or their distances mean
        nothing: a forward pass takes it from the length of its row, generation, once and for all, from the length that
        prompt and answer may reach. (transformers takes it anew at every token, from the length so far, and leaves the
        keys of its cache rotated by the base that was right when they came.)
        """
        if not self.rope_factor or length <= self.max_position_embeddings:
            return self.rope_theta
        stretch = self.rope_factor * length / self.max_position_embeddings - (self.rope_factor - 1)
        return self.rope_theta * stretch ** (self.head_dim / (self.head_dim - 2))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return Normalise.apply(x, self.weight, self.eps)


class Normalise(torch.autograd.Function):
    """x (..., C), weight (C,), eps -> what RMSNorm gives (..., C), with its gradient. If y = x / sqrt(mean(x^2) + eps),
    what reaches x is the part of the gradient of y that is, but for eps, at right angles to y. The automatic
    gradient takes more operations to find it, and keeps y, which is made again here."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(size.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (x * scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, weight, scale = ctx.saved_tensors
        y = x * scale
        dweight = (dout * y).flatten(0, -2).sum(0)
        dy = dout * weight
        along = torch.linalg.vecdot(dy, y)[..., None] / x.shape[-1]
        return (torch.addcmul(dy, y, along, value=-1) * scale).to(x.dtype), dweight.to(weight.dtype), None


# ---------------------------------------------------------------------------------------------------------------------
# Position: rotary embedding (Su et al. 2021)


def rotary_frequencies(head_dim, theta, device=None):
    """-> (D,) fp32: how far each dimension turns a token, theta^(-2d/D) for d < D/2. The two halves turn alike, the
    first one backwards, which gives its sines the sign that `rotate` wants."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    return torch.cat((-frequencies, frequencies))


def rotary_table(positions, frequencies):
    """positions (..., T) integers, frequencies (D,) -> cos, sin (..., T, D) fp32 of the angles. A query and a key that
    have been rotated meet in a product that knows only their distance."""
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates x (B, heads, T, D) by the cos, sin (T, D) of rotary_table: dimension d is paired with d + D/2 (the
    half-split convention of Llama), which a roll by D/2 puts in its place."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic Mask Attention


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
    of the rotary embedding in a text of max_length tokens (see DogeConfig.rope_base). With `room` the cache has the
    shape of one for longer texts.
    """

    def __init__(self, config, batch_size, max_length, device=None, dtype=None, room=None):
        room, self.window = room or max_length, config.keep_window_size
        self.frequencies = rotary_frequencies(config.head_dim, config.rope_base(max_length), device)
        self.evicts = room > self.window  # else no key ever has to leave
        shape = batch_size, config.num_key_value_heads, min(self.window, room) + 1
        self.layers = [
            (torch.zeros(*shape, config.head_dim, device=device, dtype=dtype),
             torch.zeros(*shape, config.head_dim, device=device, dtype=dtype),
             torch.full(shape, NEVER, device=device), torch.full(shape, -1, device=device))
            for _ in range(config.num_hidden_layers)
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


class DynamicMaskAttention(nn.Module):
    """Grouped-query attention whose keys carry a score, computed from the values of all key/value heads."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.keep_window_size
        C, key_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, key_size, bias=False)
        self.v_proj = nn.Linear(C, key_size, bias=False)
        self.A = nn.Parameter(torch.zeros(config.num_key_value_heads))  # 0: s = 1 everywhere, plain causal attention
        self.dt_proj = nn.Linear(key_size, config.num_key_value_heads, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x, rotary, padding=None):
        """x (B, T, C), rotary = (cos, sin) -> q (B, H, T, D), k and v (B, K, T, D), s (B, K, T). padding (B, T) is True
        where a row has no token."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        values = self.v_proj(x)  # (B, T, K D)
        v = values.view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = (rotate(x, *rotary).to(v.dtype) for x in (q, k))  # under autocast the norms gave fp32
        s = key_scores(self.A, self.dt_proj(values)).transpose(1, 2)  # (B, K, T)
        if padding is not None:
            s = s.masked_fill(padding[:, None], NEVER)
        return q, k, v, s

    def forward(self, q, k, v, s, cache=None, layer=None):
        """What `project` returns -> what the queries find, (B, H, T, D)."""
        return dynamic_mask_attention(q, k, v, s, self.window)[0] if cache is None else cache.attend(layer, q, k, v, s)


# ---------------------------------------------------------------------------------------------------------------------
# Feed-forward


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, all three of one shape (Shazeer 2020). For the backward pass it keeps gate and up; the automatic
    gradient keeps silu(gate) beside them, which is made again here."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dout * up, gate), F.silu(gate).mul_(dout)


class MLP(nn.Module):
    """down(SwiGLU(gate(x), up(x)))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        """x (B, T, C) -> its output (B, T, C) and a load-balance value, which an MLP does not have: 0."""
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x))), 0.0


class CDMoE(MLP):
    """Cross Domain Mixture of Experts: the MLP, shared by all tokens, plus E experts of one hidden unit each.

    out = mlp(x) + sum over the k chosen experts e of  w_e * silu(down_embed[e] . x) * up_embed[e]
    """

    def __init__(self, config):
        super().__init__(config)
        self.top_k, self.num_keys = config.num_experts_per_tok, math.isqrt(config.num_experts)
        self.router_gate = nn.Linear(config.hidden_size, 2 * self.num_keys, bias=False)
        self.down_embed = nn.Embedding(config.num_experts, config.hidden_size)
        self.up_embed = nn.Embedding(config.num_experts, config.hidden_size)
        ranks = range(min(self.top_k, self.num_keys))
        pairs = [(i, j) for i in ranks for j in ranks if (i + 1) * (j + 1) <= self.top_k]
        # (2, about k log k); on the CPU even where weights are only planned, since no checkpoint brings it
        self.register_buffer("pairs", torch.tensor(pairs, device="cpu").T.contiguous(), persistent=False)

    def route(self, x):
        """x (B, T, C) -> weights (B, T, k) that sum to 1, expert ids (B, T, k), router logits (B, T, 2, sqrt(E)).

        The k best of the E sums x_i + y_j are found among the k best x_i and the k best y_j (product keys, Lample et
        al. 2019). Few of those pairs have a chance: the i-th best x with the j-th best y is no better than any of the
        i * j pairs up to these ranks, so it takes part only if i * j <= k. For k = 64, 280 pairs of 4,096 are left.
        Both halves are of the same token.
        """
        logits = self.router_gate(x).unflatten(-1, (2, self.num_keys)).float()
        best, index = logits.topk(min(self.top_k, self.num_keys), dim=-1)  # (B, T, 2, k)
        (best_x, best_y), (index_x, index_y) = best.unbind(-2), index.unbind(-2)
        i, j = self.pairs
        scores, pair = (best_x.index_select(-1, i) + best_y.index_select(-1, j)).topk(self.top_k, dim=-1)
        i, j = self.pairs[:, pair]  # ranks (B, T, k)
        return scores.softmax(-1), index_x.gather(-1, i) * self.num_keys + index_y.gather(-1, j), logits

    def forward(self, x):
        """x (B, T, C) -> (B, T, C) and the load-balance value of this batch (see load_balance)."""
        shared, _ = super().forward(x)
        routed, balance = self.routed(x)
        return shared + routed, balance

    def routed(self, x):
        """What the experts add to the MLP: x (B, T, C) -> (B, T, C), and the load-balance value of this batch, which is
        there for its gradient: 0 where none is wanted."""
        weights, experts, logits = self.route(x)
        if experts.shape[:2] == (1, 1):  # generation: the k experts are a small MLP
            hidden = F.silu(F.linear(x, self.down_embed(experts.flatten()))) * weights.to(x.dtype)  # (1, 1, k)
            return hidden @ self.up_embed(experts.flatten()), 0.0
        down, up = self.down_embed.weight, self.up_embed.weight
        flat, weights = x.to(down.dtype).flatten(0, 1), weights.to(down.dtype).flatten(0, 1)
        out = RoutedExperts.apply(flat, down, up, weights, experts.flatten(0, 1)).view(x.shape)
        return out, load_balance(experts, logits) if torch.is_grad_enabled() else 0.0


class RoutedExperts(torch.autograd.Function):
    """out[n] = sum over j of  w[n,j] * silu(down[e[n,j]] . x[n]) * up[e[n,j]], without the vectors it picks.

    x (N, C), down and up (E, C), weights w and experts e (N, k) -> (N, C). Gathered, down[e] and up[e] are (N, k, C):
    0.5 GB each for 2,048 tokens, 64 experts and 1,024 dimensions, and kept for the backward pass. But the N k slots
    are the entries of a sparse (N, E) matrix S, and everything, gradients too, is one of three products that read the
    vectors where they lie:

        entries of x @ down.T    the product of each slot's token with its expert               -> slot_products
        S @ up                   each token's weighted sum over its experts                     -> embedding_bag
        S.T @ x                  each expert's sum over its tokens: the gradient of a table     -> embedding_bag

    The slots are sorted by expert once. The third product needs that, and the first then meets each expert's vector
    only once, in order of memory. The order of every sum is fixed. What is kept for backward is (N, k).
    """

    @staticmethod
    def forward(ctx, x, down, up, weights, experts):
        expert, order = experts.flatten().sort(stable=True)  # slots sorted by expert
        token = order // experts.shape[1]
        h = slot_products(x, token, down, expert)
        a = torch.empty_like(weights)
        a.view(-1)[order] = F.silu(h) * weights.flatten()[order]
        ctx.save_for_backward(x, down, up, weights, experts, expert, order, token, h)
        return F.embedding_bag(experts, up, per_sample_weights=a, mode="sum")

    @staticmethod
    def backward(ctx, dout):
        x, down, up, weights, experts, expert, order, token, h = ctx.saved_tensors
        dout, w, silu = dout.contiguous(), weights.flatten()[order], F.silu(h)
        starts = torch.searchsorted(expert, torch.arange(len(down) + 1, device=expert.device))
        bags = dict(offsets=starts, mode="sum", include_last_offset=True)
        da = slot_products(dout, token, up, expert)
        dh = torch.ops.aten.silu_backward(da * w, h)
        dweights, by_token = torch.empty_like(weights), torch.empty_like(weights)
        dweights.view(-1)[order], by_token.view(-1)[order] = da * silu, dh
        dx = F.embedding_bag(experts, down, per_sample_weights=by_token, mode="sum")
        ddown = F.embedding_bag(token, x, per_sample_weights=dh, **bags)
        dup = F.embedding_bag(token, dout, per_sample_weights=silu * w, **bags)
        return dx, ddown, dup, dweights, None


def slot_products(a, i, b, j):
    """a (M, C), b (E, C), indices i and j (n,) -> (n,): the products a[i] . b[j]. It is what embedding_bag calls the
    gradient of its weights; torch has no public name for it that works in every dtype and under torch.compile."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, j, j, i, 0)


def load_balance(experts, logits):
    """E * sum_e f_e P_e: 1 for a uniform router, E / k when one expert has all the probability (Switch Transformer,
    Fedus et al. 2021, eq. 4). f_e is the share of the routed slots that expert e received, P_e its mean probability
    under a softmax over all E scores. That softmax factorises, P(i, j) = Px(i) Py(j), so the mean over the N tokens
    is one matrix product and no (N, E) tensor is built. experts (..., k) ids, logits (..., 2, sqrt(E))."""
    x, y = logits.softmax(-1).flatten(0, -3).unbind(1)  # (N, sqrt(E)) each
    mean = (x.T @ y / len(x)).flatten()
    slots = experts.flatten()
    received = torch.zeros_like(mean).index_add_(0, slots, mean.new_ones(()).expand(len(slots)))
    return mean.numel() * (received / len(slots) * mean).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The model


def join(parts, dim):
    """torch.cat, which would copy a part that is alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DynamicMaskAttention(config)
        self.input_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = CDMoE(config) if config.is_moe else MLP(config)
        self.post_attention_residual = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x, rotary, padding=None, cache=None, layer=None, last=None):
        """x (B, T, C) -> (B, T, C) and the load-balance value of its MLP. rotary and padding are those of
        DynamicMaskAttention.project, cache and layer say where Cache.attend puts the keys. With `last` (B,), where each
        row ends, only that place comes back, (B, 1, C): the others are there for their keys.

        In rows beyond the window attention is most of the work, and all the rest most of the memory that the backward
        pass waits for. So there the rest is computed again (Chen et al. 2016, arXiv 1604.06174).

        A processor does so a stretch of the row at a time, and reads prompts likewise: new memory costs it time, and
        leaves holes when it goes, so what is needed on the way had better be small. (The balance of experts is one of
        the whole row, and a GPU wants large pieces.)"""
        T, learning = x.shape[1], torch.is_grad_enabled()
        beyond = T > self.self_attn.window
        whole = x.device.type != "cpu" or isinstance(self.mlp, CDMoE) or (learning and not beyond)
        size = T if whole else STRETCH
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        run = again if learning and beyond else lambda function, *inputs: function(*inputs)

        xs, rotary = x.split(size, dim=1), zip(*(part.split(size, dim=-2) for part in rotary), strict=True)
        padding = [None] * len(xs) if padding is None else padding.split(size, dim=1)
        parts = [run(self.before_attention, *part) for part in zip(xs, rotary, padding, strict=True)]
        q, k, v, s = (join(part, dim=2) for part in zip(*parts, strict=True))
        if last is not None:
            row = torch.arange(len(x), device=x.device)
            x, q = x[row, last][:, None], q[row, :, last][:, :, None]
        out = self.self_attn(q, k, v, s, cache, layer).split(size, dim=2)
        parts = [run(self.after_attention, *part) for part in zip(x.split(size, dim=1), out, strict=True)]
        return join([x for x, _ in parts], dim=1), parts[-1][1]

    def before_attention(self, x, rotary, padding):
        """x (B, T, C) -> q, k, v, s, see DynamicMaskAttention.project."""
        return self.self_attn.project(self.input_layernorm(x), rotary, padding)

    def after_attention(self, x, out):
        """x (B, T, C) and what attention found for it (B, H, T, D) -> what forward returns."""
        x = self.input_residual * x + self.self_attn.o_proj(out.transpose(1, 2).flatten(2))
        out, balance = self.mlp(self.post_attention_layernorm(x))
        return self.post_attention_residual * x + out, balance


class Doge(nn.Module):
    """The model. `logits, loss = model(tokens, targets)`, `model.generate(tokens, ...)`.

    With `labels` (names) it is a classifier: its output is not one of the tokens but one of these. What it says at the
    last token of a text is about the text.
    """

    def __init__(self, config, labels=()):
        super().__init__()
        self.config, self.labels = config, tuple(labels)
        self.gradient_checkpointing = False  # recompute each block in the backward pass: less memory, a third more work
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if labels:
            self.score = nn.Linear(config.hidden_size, len(labels), bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)

    @classmethod
    def from_dense(cls, dense, num_experts, num_experts_per_tok):
        """A MoE model that computes bit for bit what `dense` does: the same weights, and experts whose output vectors
        (up_embed) are zero. They learn from the first step on; the router and down_embed from the second."""
        if dense.config.is_moe:
            raise ValueError("from_dense needs a dense model, and this one has experts already")
        shape = dict(is_moe=True, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        model = cls(dataclasses.replace(dense.config, **shape)).to(dense.embed_tokens.weight)
        weights = model.state_dict() | dense.state_dict()
        weights.update({name: torch.zeros_like(w) for name, w in weights.items() if name.endswith("up_embed.weight")})
        model.load_state_dict(weights)
        return model

    @property
    def output_weight(self):
        """(V, C), or (labels, C) of a classifier"""
        if self.labels:
            return self.score.weight
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(self, tokens, lengths=None, cache=None, last=None):
        """tokens (B, T) int64 -> the final state (B, T, C) and the mean load-balance value of the layers. Rows shorter
        than T are padded on the right, and `lengths` (B,) tells how long they are. With a cache the tokens continue
        what it holds, each row at its own position, and are added to it. With `last` (B,) the final state is only that
        of these places, (B, 1, C), which have to be where the rows end; the last block is then spared most work."""
        B, T = tokens.shape
        steps = torch.arange(T, device=tokens.device)
        padding = None if lengths is None else steps >= lengths[:, None]  # (B, T)
        positions = steps if cache is None else (cache.length[:, None] + steps)[:, None]  # (T,) or (B, 1, T)
        if cache is None:
            frequencies = rotary_frequencies(self.config.head_dim, self.config.rope_base(T), tokens.device)
        rotary = rotary_table(positions, frequencies if cache is None else cache.frequencies)
        x, balance = self.embed_tokens(tokens), 0.0
        for layer, block in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, value = checkpoint(block, x, rotary, padding, use_reentrant=False)
            else:
                x, value = block(x, rotary, padding, cache, layer, last if block is self.layers[-1] else None)
            balance = balance + value / len(self.layers)
        if cache is not None:
            cache.length += T if lengths is None else lengths
        return self.norm(x), balance

    def forward(self, tokens, targets=None):
        """tokens (B, T) int64 -> (logits (B, T, V), None); with targets (B, T), -100 = ignored, (None, mean loss in
        nats a target), 0 when there is no target. The loss never holds all logits, which is why there are none."""
        x, balance = self.hidden(tokens)
        if targets is None:
            return F.linear(x, self.output_weight), None
        loss = linear_cross_entropy(x.flatten(0, 1), self.output_weight, targets.flatten())
        if torch.is_grad_enabled():  # the balance is there for its gradient; a validation loss is that of the text
            loss = loss + self.config.router_aux_loss_coef * balance
        return None, loss

    def flops_per_token(self, length):
        """Floating-point operations to train on one token of a row of `length`: 6 a weight that is used (2 forward, 4
        backward; PaLM, arXiv 2204.02311, appendix B) and 12 C a visible key and layer, on average half the row."""
        config = self.config
        unused = config.num_experts - config.num_experts_per_tok if config.is_moe else 0
        weights = sum(p.numel() for p in self.parameters()) - 2 * unused * config.hidden_size * len(self.layers)
        weights -= 0 if config.tie_word_embeddings else self.embed_tokens.weight.numel()
        window = min(length, config.keep_window_size)
        keys = (window * (window + 1) / 2 + (length - window) * window) / length
        return 6 * weights + 12 * config.hidden_size * keys * len(self.layers)

    def read(self, tokens, lengths, cache):
        """Reads prompts (B, T) of `lengths` (B,) into a cache -> the logits (B, V) of what follows each. Takes PIECE
        tokens at a time, so that memory does not grow with the prompt."""
        x = self.norm.weight.new_zeros(len(tokens), 1, self.config.hidden_size)
        for start in range(0, tokens.shape[1], PIECE):
            piece = tokens[:, start : start + PIECE]
            ends = (lengths - start).clamp(0, piece.shape[1])  # of a row that was over before: 0
            states, _ = self.hidden(piece, ends, cache, (ends - 1).clamp(min=0))
            x = torch.where((ends > 0)[:, None, None], states, x)
        return F.linear(x[:, 0], self.output_weight)

    def next_logits(self, token, cache):
        """token (B,), the cache before it -> the logits (B, V) of what follows; the cache then holds the token."""
        return F.linear(self.hidden(token[:, None], None, cache)[0][:, -1], self.output_weight)

    @torch.inference_mode()
    def stream(self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
               lengths=None, generator=None, vocab_size=None, dtype=None, decoder=None):
        """Continues tokens (B, T), yielding the next token of every row (B,) int64, max_new_tokens times.

        temperature 0 takes the likeliest token; else see `sample`. Rows of different length are padded on the right,
        `lengths` (B,) says how long each is. Ids from vocab_size on are never produced (a vocabulary rounded up has
        rows without a token). Memory is fixed from the first token on. `decoder`: a Decoder of decode.py, faster.
        Raises ValueError for an empty prompt, and if the weights are damaged.
        """
        B, T = tokens.shape
        if T == 0 or (lengths is not None and int(lengths.min()) < 1):
            raise ValueError("the prompt is empty: generation needs at least one token, for example the BOS token")
        real = torch.full((B,), T, device=tokens.device) if lengths is None else lengths
        length, dtype = T + max_new_tokens, dtype or self.embed_tokens.weight.dtype
        cache = Cache(self.config, B, length, tokens.device, dtype, decoder.room(length) if decoder else length)
        logits = self.read(tokens, real, cache)
        if not bool(logits.isfinite().all()):
            raise ValueError("the model answers this prompt with nan or inf: its weights are damaged")
        seen = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=tokens.device)
        if repetition_penalty != 1.0:
            inside = torch.arange(T, device=tokens.device) < real[:, None]
            seen.scatter_(1, torch.where(inside, tokens, tokens[:, :1]), True)
        for count in range(max_new_tokens):
            logits = logits.float()
            if vocab_size is not None:
                logits[:, vocab_size:] = -math.inf
            if repetition_penalty != 1.0:
                logits = torch.where(seen, penalise(logits, repetition_penalty), logits)
            token = sample(logits, temperature, top_k, top_p, min_p, generator)
            yield token
            if count + 1 < max_new_tokens:
                if repetition_penalty != 1.0:
                    seen.scatter_(1, token[:, None], True)
                logits = (decoder or self.next_logits)(token, cache)

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_ids=(), **options):
        """Collects `stream` into (B, n) int64, n <= max_new_tokens. A row ends with its first id of `stop_ids`, which
        is then repeated to fill the row; generation ends when every row has."""
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        columns = []
        for token in self.stream(tokens, max_new_tokens, temperature, top_k, top_p, **options):
            columns.append(torch.where(done, columns[-1], token) if columns else token)
            for stop in stop_ids:
                done = done | (columns[-1] == stop)
            if stop_ids and bool(done.all()):
                break
        return torch.stack(columns, dim=1) if columns else tokens[:, :0]


def penalise(logits, penalty):
    """Makes a token less likely whatever the sign of its logit (Keskar et al. 2019, as Hugging Face applies it)."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def sample(logits, temperature, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Draws a token from logits (B, V) fp32 -> (B,) int64.

    Temperature 0 takes the likeliest. Otherwise the logits are divided by it, and of the tokens only these stay: the
    top_k likeliest (0: all), the likeliest whose probabilities first reach top_p together (1: all), those at least
    min_p as likely as the likeliest (0: all).
    """
    if temperature == 0:
        return logits.max(dim=-1).indices  # on a processor faster than argmax
    logits, order = logits / temperature, None
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    p, size = logits.softmax(-1), LIKELY
    if top_p < 1.0:
        values, order = p.topk(min(size, p.shape[-1]))
        while size < p.shape[-1] and bool((values.sum(-1) < top_p).any()):  # a flat distribution: look at more of it
            size *= 16
            values, order = p.topk(min(size, p.shape[-1]))
        inside = values.cumsum(-1) - values < top_p
        inside[:, 0] = True  # the likeliest itself always stays
        p = values * inside
    if min_p > 0.0:
        p = p * (p >= min_p * p.amax(-1, keepdim=True))
    drawn = draw(p, generator)
    return (drawn if order is None else order.gather(1, drawn))[:, 0]


def draw(p, generator=None):
    """The index of one of p (B, n) fp32, at least 0, drawn in proportion to them -> (B, 1) int64. Of what is 0, none.

    The sums up to every index divide a line, and a point on it, drawn evenly, falls to one of them: one random number a
    row, where torch.multinomial takes one for every token, and as long as a small model's whole step. To sum less, it
    is first found in which block of tokens the point lies, then where in the block. In float64, so that the unlikely
    ones get their due: in float32, thousands would share the last bit.
    """
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    blocks = p.unflatten(1, (-1, BLOCK if p.shape[1] % BLOCK == 0 else p.shape[1]))
    ends = blocks.sum(-1, dtype=wide).cumsum(-1)
    point = (1 - torch.rand(len(p), 1, dtype=wide, device=p.device, generator=generator)) * ends[:, -1:]  # above 0
    block = torch.searchsorted(ends, point)  # the first whose end is not before the point
    inner = blocks.take_along_dim(block[..., None], 1)[:, 0].cumsum(-1, dtype=wide)
    point = point - ends.gather(1, block) + inner[:, -1:]  # counted from where the block begins
    point = point.clamp(min=torch.finfo(wide).tiny).minimum(inner[:, -1:])  # rounded, it must not have left the block
    return block * blocks.shape[2] + torch.searchsorted(inner, point)


def linear_cross_entropy(x, weight, targets):
    """Mean cross-entropy of the logits x @ weight.T in nats, over the targets that are not -100; 0 if there are none.
    x (N, C), weight (V, C), targets (N,) int64."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere to count them is to wait
        kept = (targets != -100).nonzero()[:, 0]
        if len(kept) < len(targets):  # nine in ten, when only answers are learned
            x, targets = x[kept], targets[kept]
    return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled()) / (targets != -100).sum().clamp(min=1)


@torch.compiler.disable  # the number of pieces differs from batch to batch, and each would be compiled anew
def token_logprobs(x, weight, targets, temperature=1.0):
    """The log-probabilities (N,) fp32 of targets (N,) by the logits x @ weight.T / temperature, of x (N, C), weight
    (V, C).

    As in LinearCrossEntropy all logits together would be the largest tensor of a step. Here each piece of them is made
    again in the backward pass: how much a token counts may depend on the others (the two answers of a pair, dpo.py),
    so the gradient cannot be made on the way.
    """

    def piece(x, target):
        return -F.cross_entropy(F.linear(x, weight).float() / temperature, target, reduction="none")

    rows = rows_at_once(x, weight)
    return torch.cat([checkpoint(piece, *pair, use_reentrant=False, preserve_rng_state=False)
                      for pair in zip(x.split(rows), targets.split(rows), strict=True)])  # fmt: skip


def rows_at_once(x, weight):
    """How many rows of x meet the output matrix at once."""
    budget = LOSS_ELEMENTS if x.device.type == "cpu" else 64 * LOSS_ELEMENTS  # a GPU wants large pieces
    return max(LOSS_ROWS, budget // len(weight))


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies, with its gradient made on the way.

    The logits of all rows would be by far the largest tensor of a training step: 2 GB for 16,384 rows of 32,768. But
    all that the backward pass wants of them is their gradient, softmax - onehot, and of that only its products with x
    and with weight. So the rows are taken a few at a time, and for each the logits turn into their gradient in place,
    are multiplied twice, and are forgotten. Nothing is computed a second time. (The idea is Liger-Kernel's, arXiv
    2410.10989.) What backward receives is one number to scale both products by.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, wants_gradient):
        rows = max(1, min(len(x), rows_at_once(x, weight)))
        dtype = F.linear(x[:1], weight[:1]).dtype  # autocast's, if there is one
        matrix, total, dx, dweight = weight.to(dtype), torch.zeros((), device=x.device), torch.empty_like(x), None
        if wants_gradient and ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(weight, dtype=torch.float32)
        # Every piece is written over the last: a system hands out new memory page by page, filled with zeros first.
        logits = torch.empty(rows, len(weight), dtype=dtype, device=x.device)
        exps = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
        for i in range(0, len(x), rows):
            piece, target = x[i : i + rows].to(dtype), targets[i : i + rows, None]
            ignored, target = target == -100, target.clamp(min=0)
            y = torch.mm(piece, matrix.T, out=logits[: len(piece)])
            top = y.amax(dim=-1, keepdim=True).float()
            own = y.gather(1, target) - top
            e = torch.sub(y, top, out=exps[: len(piece)]).exp_()
            norm = e.sum(dim=-1, keepdim=True)
            total += (norm.log() - own).masked_fill(ignored, 0.0).sum()
            if wants_gradient:  # dlogits = e / norm - onehot; what is divided are the short rows it is multiplied by
                dlogits = e.scatter_add_(1, target, -norm).to(dtype)
                scale = norm.reciprocal().masked_fill(ignored, 0.0)
                dx[i : i + rows] = (dlogits @ matrix) * scale
                piece = (piece * scale).to(dtype)
                if dweight is None:
                    continue
                if dtype == torch.float32:
                    dweight.addmm_(dlogits.T, piece)  # one tensor of the weight's size less
                else:
                    dweight += dlogits.T @ piece
        if wants_gradient:
            ctx.save_for_backward(dx, dweight if dweight is None else dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, scale):
        dx, dweight = ctx.saved_tensors
        return dx * scale, dweight if dweight is None else dweight * scale, None, None
