"""The Doge language model: RMSNorm, rotary embedding, Dynamic Mask Attention, MLP, CDMoE, the blocks, the model.

A language model reads a sequence of tokens and says, at each position, how likely every token of the vocabulary is to
come next. Doge is a Llama-like transformer: an embedding, a stack of blocks, a last norm, and the embedding again as
output matrix. A block adds to the hidden state x first the output of attention, which combines earlier positions, then
the output of a feed-forward network, which works on each position by itself:

    x = input_residual          * x + Attention(RMSNorm(x))
    x = post_attention_residual * x + MLP(RMSNorm(x))              the two scales are learned vectors, 1 at the start

Two things are Doge's own.

Dynamic Mask Attention (DMA). Every key j gets a score from its value vector alone, s_j = exp(A softplus(dt_proj(v_j))).
The score is added to the attention logits of all queries that may see j, and a query sees only the W earlier keys of
largest score (`keep_window_size`; of equal scores the later key wins). So the model learns which keys to keep.
-> visible, attention_by_definition; in linear time and constant memory: nanodoge/attention.py

Cross Domain Mixture of Experts (CDMoE). Beside the usual MLP, a layer has E experts of one hidden unit each. A router
gives scores x_i to sqrt(E) rows and y_j to sqrt(E) columns. Expert (i, j) has the score x_i + y_j, and a token uses its
k best experts. So the best of E experts are found from 2 sqrt(E) scores.
-> routed_by_definition; without gathering the experts' vectors: nanodoge/experts.py

With the config field `attention` = "definition" both are computed as they are defined here; "fast" gives the same
numbers. Names of parameters and options are those of Hugging Face's Doge, so that its checkpoints load as they are.
Where that implementation differs from the architecture (its router mixes tokens), this one follows the architecture.
Papers: Wonderful Matrices (arXiv 2412.11834), Trainable Dynamic Mask Sparse Attention (arXiv 2508.02124).

Shapes: B batch, T query length, S key length, H attention heads, K key/value heads, D head size, C hidden size,
        V vocabulary, W keep window, E experts, k experts per token.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanodoge import memory
from nanodoge.attention import NEVER, Cache, dynamic_mask_attention, key_scores
from nanodoge.experts import routed_experts
from nanodoge.losses import linear_cross_entropy

LAYERS, SIZE = 256, 2**24  # the most that a config may ask for: beyond is a typing error, and would build for hours


@dataclass
class DogeConfig:
    """The shape of a model. Raises ValueError for shapes that cannot be built."""

    vocab_size: int = 32768  # number of token ids (V)
    hidden_size: int = 256  # width of the hidden state (C)
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
    num_experts: int = 1024  # experts in a layer (E), a perfect square
    num_experts_per_tok: int = 16  # experts per token (k)
    router_aux_loss_coef: float = 0.0  # weight of the load-balancing loss; 0 turns it off
    attention: Literal["fast", "definition"] = "fast"  # definition: slow, as model.py defines it; not saved

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
        if self.attention not in ("fast", "definition"):
            raise ValueError(f"attention={self.attention} must be fast or definition")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def rope_base(self, length: int) -> float:
        """The base of the rotary wavelengths in a text that may reach `length` tokens.

        Positions beyond max_position_embeddings would bring angles that the model has never seen. Dynamic NTK scaling,
        with which the family is published, raises the base with the length, so that the slowest dimensions turn no
        further than in training and the fastest, which tell neighbours apart, hardly change. All keys of a text need
        the same base: a forward pass takes it from the length of its rows, generation, once, from the length that
        prompt and completion may reach. (transformers changes it at every token, but not for the keys in its cache.)
        """
        if not self.rope_factor or length <= self.max_position_embeddings:
            return self.rope_theta
        stretch = self.rope_factor * length / self.max_position_embeddings - (self.rope_factor - 1)
        return self.rope_theta * stretch ** (self.head_dim / (self.head_dim - 2))


# ---- RMSNorm and rotary embedding


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return memory.rms_norm(x, self.weight, self.eps)  # this formula, with a gradient that keeps only x


def rotary_frequencies(head_dim: int, theta: float, device=None) -> Tensor:
    """(D,) fp32: each dimension's angle per position, theta^(-2d/D) for d < D/2, and the same for the second half;
    negative in the first half, which gives its sines the sign that `rotate` needs."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    return torch.cat((-frequencies, frequencies))


def rotary_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (..., T, D) fp32 of the angles of positions (..., T), of frequencies (D,). After rotation q.k depends
    only on the relative position (Su et al. 2021)."""
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, D) rotated by cos, sin (T, D) of rotary_table. Dimension d is paired with d + D/2 (the half-split
    convention of Llama), which a roll by D/2 brings beside it."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


# ---- Dynamic Mask Attention, by definition


def visible(s: Tensor, window: int) -> Tensor:
    """Which keys each query sees, (B, K, query T, key T) bool, from the scores s (B, K, T) of the keys.

    Query i sees key j <= i unless `window` keys up to i beat j: a larger score, or an equal one and later.
    """
    j = torch.arange(s.shape[-1], device=s.device)
    score, other = s[..., :, None], s[..., None, :]
    beaten = (other > score) | ((other == score) & (j > j[:, None]))  # (B, K, j, m): key m beats key j
    times = beaten.cumsum(dim=-1).mT  # (B, K, i, j): how many of the keys up to i beat key j
    return (times < window) & (j <= j[:, None])


def attention_by_definition(q: Tensor, k: Tensor, v: Tensor, s: Tensor, window: int, positions=None) -> Tensor:
    """softmax(q.k / sqrt(D) + s, over the visible keys) v: q (B, H, T, D), k and v (B, K, S, D), s (B, K, S) -> (B, H,
    T, D). The queries are at positions (B, T); None: the last T of the S."""
    seen = visible(s, window)  # (B, K, S, S)
    seen = seen[:, :, -q.shape[2] :] if positions is None else seen.take_along_dim(positions[:, None, :, None], dim=2)
    k, v, s, seen = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v, s, seen))  # K heads -> H
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + s[:, :, None]  # (B, H, T, S)
    return logits.masked_fill(~seen, -math.inf).softmax(dim=-1).to(v.dtype) @ v


class DynamicMaskAttention(nn.Module):
    """Grouped-query attention whose keys carry a score, computed from the values of all key/value heads."""

    def __init__(self, config: DogeConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
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

    def forward(self, x: Tensor, rotary, padding=None, cache=None) -> Tensor:
        """x (B, T, C) -> (B, T, C). rotary: cos and sin of rotary_table; padding (B, T): True where a row has no token;
        cache: the keys of earlier positions."""
        return self.output(self.attend(*self.project(x, rotary, padding), cache))

    def project(self, x: Tensor, rotary, padding=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, H, T, D), k and v (B, K, T, D), s (B, K, T) fp32."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        values = self.v_proj(x)  # (B, T, K D)
        v = values.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = (rotate(x, *rotary).to(v.dtype) for x in (q, k))  # under autocast the norms gave fp32
        s = key_scores(self.A, self.dt_proj(values)).transpose(1, 2)  # exp(A softplus(dt)), (B, K, T)
        if padding is not None:
            s = s.masked_fill(padding[:, None], NEVER)
        return q, k, v, s

    def attend(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, cache=None) -> Tensor:
        """What the queries find, (B, H, T, D). q may cover only one position of each row, with no key after it."""
        if self.config.attention == "definition":
            positions = None
            if cache is not None:
                k, v, s, positions = cache.append(self.layer, k, v, s)
            return attention_by_definition(q, k, v, s, self.window, positions if q.shape[2] > 1 else None)
        if cache is not None:
            return cache.attend(self.layer, q, k, v, s)
        return dynamic_mask_attention(q, k, v, s, self.window)[0]  # the same numbers in linear time

    def output(self, found: Tensor) -> Tensor:
        return self.o_proj(found.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


# ---- Feed-forward


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), called SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DogeConfig):
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor):
        """x (B, T, C) -> its output (B, T, C) and a load-balance value, which an MLP does not have: 0."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), 0.0


class CDMoE(MLP):
    """Cross Domain Mixture of Experts: the MLP, shared by all tokens, plus E experts of one hidden unit each."""

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.top_k, self.num_keys = config.num_experts_per_tok, math.isqrt(config.num_experts)
        self.router_gate = nn.Linear(config.hidden_size, 2 * self.num_keys, bias=False)
        self.down_embed = nn.Embedding(config.num_experts, config.hidden_size)
        self.up_embed = nn.Embedding(config.num_experts, config.hidden_size)
        ranks = range(min(self.top_k, self.num_keys))
        pairs = [(i, j) for i in ranks for j in ranks if (i + 1) * (j + 1) <= self.top_k]
        # (2, about k log k); on the CPU even where weights are only planned, since no checkpoint brings it
        self.register_buffer("pairs", torch.tensor(pairs, device="cpu").T.contiguous(), persistent=False)

    def forward(self, x: Tensor):
        """x (B, T, C) -> (B, T, C) and the load-balance value of this batch: 0 where no gradient is wanted."""
        shared, _ = super().forward(x)
        routed, balance = self.routed_by_definition(x) if self.config.attention == "definition" else self.routed(x)
        return shared + routed, balance

    def routed_by_definition(self, x: Tensor):
        """sum over the k best experts e of  w_e * silu(down_embed[e] . x) * up_embed[e]: x (B, T, C) -> (B, T, C), and
        the load-balance value. w is the softmax of the k scores. Both halves of the router are of the same token."""
        logits = self.router_gate(x).unflatten(-1, (2, self.num_keys)).float()
        rows, columns = logits.unbind(-2)  # (B, T, sqrt(E)) each
        scores = (rows[..., :, None] + columns[..., None, :]).flatten(-2)  # (B, T, E): of expert (i, j) x_i + y_j
        best, experts = scores.topk(self.top_k, dim=-1)  # (B, T, k)
        down, up = self.down_embed(experts), self.up_embed(experts)  # (B, T, k, C)
        hidden = F.silu((down @ x[..., None].to(down.dtype))[..., 0]) * best.softmax(dim=-1)  # (B, T, k)
        routed = (hidden[..., None, :].to(up.dtype) @ up)[..., 0, :]
        return routed, load_balance(experts, logits) if torch.is_grad_enabled() else 0.0

    def routed(self, x: Tensor):
        """The same numbers without gathering (B, T, k, C) vectors."""
        weights, experts, logits = self.route(x)
        routed = routed_experts(x, self.down_embed.weight, self.up_embed.weight, weights, experts)
        return routed, load_balance(experts, logits) if torch.is_grad_enabled() else 0.0

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> weights (B, T, k) that sum to 1, expert ids (B, T, k), router logits (B, T, 2, sqrt(E)).

        The k best of the E sums x_i + y_j are found among the k best x_i and the k best y_j (product keys, Lample et
        al. 2019). Few of those pairs can be among them: the i-th best x with the j-th best y is no better than any of
        the i * j pairs up to these ranks, so only i * j <= k. For k = 64, 280 pairs of 4,096 are left.
        """
        logits = self.router_gate(x).unflatten(-1, (2, self.num_keys)).float()
        best, index = logits.topk(min(self.top_k, self.num_keys), dim=-1)  # (B, T, 2, k)
        (best_x, best_y), (index_x, index_y) = best.unbind(-2), index.unbind(-2)
        i, j = self.pairs
        scores, pair = (best_x.index_select(-1, i) + best_y.index_select(-1, j)).topk(self.top_k, dim=-1)
        i, j = self.pairs[:, pair]  # ranks (B, T, k)
        return scores.softmax(-1), index_x.gather(-1, i) * self.num_keys + index_y.gather(-1, j), logits


def load_balance(experts: Tensor, logits: Tensor) -> Tensor:
    """E * sum_e f_e P_e, from experts (..., k) ids and logits (..., 2, sqrt(E)): 1 for a uniform router, E / k when one
    expert has all the probability (Switch Transformer, Fedus et al. 2021, eq. 4). f_e is the share of the routed slots
    that expert e received, P_e its mean probability under a softmax over all E scores. That softmax factorises, P(i, j)
    = Px(i) Py(j), so the mean over the N tokens is one matrix product and no (N, E) tensor is built."""
    x, y = logits.softmax(-1).flatten(0, -3).unbind(1)  # (N, sqrt(E)) each
    mean = (x.T @ y / len(x)).flatten()
    slots = experts.flatten()
    received = torch.zeros_like(mean).index_add_(0, slots, mean.new_ones(()).expand(len(slots)))
    return mean.numel() * (received / len(slots) * mean).sum()


# ---- The model


class Block(nn.Module):
    def __init__(self, config: DogeConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DynamicMaskAttention(config, layer)
        self.input_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = CDMoE(config) if config.is_moe else MLP(config)
        self.post_attention_residual = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor, rotary, padding=None, cache=None):
        """x (B, T, C) -> (B, T, C) and the load-balance value of its MLP. Other inputs: see DynamicMaskAttention."""
        x = self.input_residual * x + self.self_attn(self.input_layernorm(x), rotary, padding, cache)
        out, balance = self.mlp(self.post_attention_layernorm(x))
        return self.post_attention_residual * x + out, balance

    in_slices = memory.in_slices  # the same in less memory, for long rows


class Doge(nn.Module):
    """The model. `logits, loss = model(tokens, targets)`, `model.generate(tokens, ...)`. With `labels` (names) it is a
    classifier: its output is one of these, and the one at the last token of a text is the label of the text."""

    def __init__(self, config: DogeConfig, labels=()):
        super().__init__()
        self.config, self.labels = config, tuple(labels)
        self.gradient_checkpointing = False  # recompute each block in the backward pass: less memory, a third more work
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if labels:
            self.score = nn.Linear(config.hidden_size, len(labels), bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)

    @classmethod
    def from_dense(cls, dense: "Doge", num_experts: int, num_experts_per_tok: int) -> "Doge":
        """A MoE model that computes bit for bit what `dense` does: the same weights, and experts whose output vectors
        (up_embed) are zero. They learn from the first step on; the router and down_embed from the second."""
        if dense.config.is_moe:
            raise ValueError("from_dense needs a dense model, but this one has experts already")
        shape = dict(is_moe=True, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
        model = cls(dataclasses.replace(dense.config, **shape)).to(dense.embed_tokens.weight)
        weights = model.state_dict() | dense.state_dict()
        weights.update({name: torch.zeros_like(w) for name, w in weights.items() if name.endswith("up_embed.weight")})
        model.load_state_dict(weights)
        return model

    @property
    def output_weight(self) -> Tensor:
        """(V, C), or (labels, C) of a classifier."""
        if self.labels:
            return self.score.weight
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def new_cache(self, batch_size: int, max_length: int, dtype=None, room: int | None = None) -> Cache:
        """An empty Cache for texts of at most `max_length` tokens, from which the rotary embedding follows (see
        DogeConfig.rope_base). room: the length for which it has slots, if that is longer."""
        config, weight, room = self.config, self.embed_tokens.weight, room or max_length
        window = config.keep_window_size if config.attention == "fast" else room  # the definition keeps all keys
        frequencies = rotary_frequencies(config.head_dim, config.rope_base(max_length), weight.device)
        shape = config.num_hidden_layers, batch_size, config.num_key_value_heads, window, room
        return Cache(*shape, frequencies, dtype or weight.dtype)

    def hidden(self, tokens: Tensor, lengths=None, cache: Cache | None = None, last=None):
        """tokens (B, T) int64 -> the final state (B, T, C) and the mean load-balance value of the layers. Rows shorter
        than T are padded on the right, and `lengths` (B,) tells how long they are. With a cache the tokens continue
        what it holds, each row at its own position, and are added to it. With `last` (B,) the final state is that of
        these positions only, (B, 1, C), which must be where the rows end: the last block then skips most work."""
        B, T = tokens.shape
        steps = torch.arange(T, device=tokens.device)
        padding = None if lengths is None else steps >= lengths[:, None]  # (B, T)
        positions = steps if cache is None else (cache.length[:, None] + steps)[:, None]  # (T,) or (B, 1, T)
        if cache is None:
            frequencies = rotary_frequencies(self.config.head_dim, self.config.rope_base(T), tokens.device)
        rotary = rotary_table(positions, frequencies if cache is None else cache.frequencies)
        x, balance = self.embed_tokens(tokens), 0.0
        options = dict(recompute=self.gradient_checkpointing, whole=self.config.is_moe)
        for block in self.layers:  # x, value = block(x, rotary, padding, cache), in less memory
            ends = last if block is self.layers[-1] else None
            x, value = memory.run_block(block, x, rotary, padding, cache, last=ends, **options)
            balance = balance + value / len(self.layers)
        if cache is not None:
            cache.length += T if lengths is None else lengths
        return self.norm(x), balance

    def forward(self, tokens: Tensor, targets: Tensor | None = None):
        """tokens (B, T) int64 -> (logits (B, T, V), None); with targets (B, T), -100 = ignored, (None, mean loss in
        nats per target), 0 when there is none. The loss never holds all logits, which is why none are returned."""
        x, balance = self.hidden(tokens)
        if targets is None:
            return F.linear(x, self.output_weight), None
        loss = linear_cross_entropy(x.flatten(0, 1), self.output_weight, targets.flatten())
        if torch.is_grad_enabled():  # the balance is for its gradient; a validation loss is that of the text alone
            loss = loss + self.config.router_aux_loss_coef * balance
        return None, loss

    def flops_per_token(self, length: float) -> float:
        """Floating-point operations to train on one token of a row of `length`: 6 per weight used (2 forward, 4
        backward; PaLM, arXiv 2204.02311, appendix B) and 12 C per visible key and layer, on average half the row."""
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
