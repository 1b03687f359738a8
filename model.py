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

from nanodoge.attention import NEVER, Cache, dynamic_mask_attention, key_scores
from nanodoge.experts import RoutedExperts
from nanodoge.losses import linear_cross_entropy

STRETCH = 1024  # tokens of a long row that a processor takes through a block together: NOTES.md has others
LAYERS, SIZE = 256, 2**24  # most of them, in a model: what is far beyond them is a slip, and would build for hours


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

    def new_cache(self, batch_size, max_length, dtype=None, room=None):
        """An empty Cache for texts of at most `max_length` tokens. With `room` it has the shape of one for longer
        texts; the rotary embedding follows max_length (see DogeConfig.rope_base)."""
        config, weight = self.config, self.embed_tokens.weight
        frequencies = rotary_frequencies(config.head_dim, config.rope_base(max_length), weight.device)
        return Cache(config.num_hidden_layers, batch_size, config.num_key_value_heads, config.keep_window_size,
                     room or max_length, frequencies, dtype or weight.dtype)  # fmt: skip

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

    @torch.inference_mode()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=0, stop_ids=(), generator=None):
        """Continues tokens (B, T) -> the new ones (B, n) int64, n <= max_new_tokens; ends when every row has had one of
        stop_ids. This is what generation means; nanodoge/engine.py computes the same for many prompts, faster."""
        cache, read, new = self.new_cache(len(tokens), tokens.shape[1] + max_new_tokens), tokens, tokens[:, :0]
        while new.shape[1] < max_new_tokens and not (stop_ids and all(set(stop_ids) & set(r) for r in new.tolist())):
            x, _ = self.hidden(read, None, cache)  # the prompt, then one token at a time
            logits = F.linear(x[:, -1], self.output_weight).float()  # (B, V)
            if top_k:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
            if temperature == 0:
                read = logits.argmax(-1, keepdim=True)
            else:
                read = (logits / temperature).softmax(-1).multinomial(1, generator=generator)
            new = torch.cat((new, read), dim=1)
        return new


