"""Decoding: one token after another, as fast as the machine can read the weights.

To draw one token the model reads every weight once and uses it for two operations. A processor computes far faster
than it reads memory, so at batch 1 the speed of generation is, at best, memory bandwidth / bytes of weights. Two things
keep a program from that limit, and this file is about both.

Too many bytes. A weight takes 4 bytes in float32, 2 in bfloat16, 1 in int8. For int8, every row of a weight matrix is
divided by a scale of its own, so that its largest entry becomes 127, and rounded; the scale multiplies the result
(weight-only, per output channel, nothing is retrained). Computation stays in floating point.

Too many steps. The model of model.py runs 65 operations a layer. For a small model each takes less time than Python and
torch need to launch it. So here the projections that share an input are one matrix, what is the same for every layer is
found once a token, and of several ways to write an operation the quickest to launch is taken (NOTES.md has what they
cost); 41 are left. On request torch.compile turns several layers at a time into one C++ function. That needs a C++
compiler, and half a minute or more for every length of cache, which are few (see room); torch keeps what it compiled on
disk. One row against one matrix is then written as multiply and sum, a plain loop that the compiler vectorises, and
which reads bfloat16 and int8 as easily as float32. What Python hands to the compiled function it checks at every call,
tensor by tensor, so the weights of these layers are one tensor of each kind.

    decoder = Decoder(model, torch.int8, compile=True)
    for token in model.stream(prompt, 100, decoder=decoder): ...

The prompt itself is read by the model as it is: many tokens at once use every weight many times, and need none of this.

Shapes as in model.py: B batch, T tokens, C hidden size, V vocabulary, H heads, K key/value heads, D head size.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import CDMoE, RMSNorm, rotary_table
from nanodoge.attention import key_scores, put, remember, rows_of

LAYERS_AT_A_TIME = 8  # compiled as one function: 8 fit a 20M model whole; more layers call it again, compiled once
STREAMS = 4  # rows far apart that a compiled step reads side by side: following several, a core waits less for memory
WIDE = 512  # only where rows are wider: the weights of smaller models stay in the processor's cache
FEW_SLOTS = 512  # a compiled step reads as many of the cache by loops of its own; beyond them products are faster


class Weight(NamedTuple):
    """A matrix, or n of them, that map a row of inputs to outputs: fp32 (in, out), bf16 (out, in), or int8 (out, in)
    with the scale (out,) of every output, fp32 or, as torch's int8 kernel wants it, bf16. Read row by row, (in, out) is
    what a processor's BLAS is fastest with."""

    values: torch.Tensor
    scale: torch.Tensor | None = None


def pack(weight, dtype, compiled=False):
    """weight (out, in) or (n, out, in) -> Weight, `compiled` or not. Raises ValueError for another dtype than float32,
    bfloat16, int8."""
    weight = weight.detach().float()
    if dtype == torch.float32:
        return Weight(weight.mT.contiguous())
    if dtype == torch.bfloat16:
        return Weight(weight.to(dtype).contiguous())
    if dtype == torch.int8:
        scale = weight.abs().amax(dim=-1).clamp(min=1e-12) / 127  # an all-zero row stays zero
        return Weight((weight / scale[..., None]).round().to(torch.int8), scale if compiled else scale.bfloat16())
    raise ValueError(f"dtype={dtype} must be float32, bfloat16 or int8")


def product(x, weight):
    """x (B, in) fp32 -> (B, out) fp32."""
    values, scale = weight
    if values.dtype == torch.float32:
        return torch.mm(x, values)
    if torch.compiler.is_compiling() and len(x) == 1 and x.device.type == "cpu":
        x, parts = materialise(x), values.chunk(STREAMS if values.shape[1] > WIDE else 1)
        y = torch.cat([(part.float() * x).sum(-1) for part in parts])[None]
        return y if scale is None else y * scale
    if scale is None:
        return F.linear(x.to(values.dtype), values).float()
    if values.shape[1] % 16:  # the kernel reads 16 inputs at a time and does not look where the row ends
        return F.linear(x, values.float()) * scale
    return torch._weight_int8pack_mm(x.bfloat16(), values, scale.bfloat16()).float()


@contextlib.contextmanager
def one_row_of_bfloat16():
    """Within it a processor multiplies one row of bfloat16 by torch's own loop instead of oneDNN, which takes 20 us
    before it begins."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def materialise(x):
    """Tells the compiler to store x, which a whole loop needs, instead of computing it anew in each of its rounds."""
    return x.as_strided(x.shape, x.stride())


class Layers(NamedTuple):
    """The weights of n blocks of model.py. vectors (n, all together) fp32 holds the small ones of a block, one after
    another, of these `sizes`; heads (n, H + K, D) fp32 those of queries and keys, which all blocks use at once;
    projections are Weights of n matrices, those of the same input joined; experts are the CDMoE of each block, or None:
    of their tables a token reads only a few rows, so they stay as they are."""

    vectors: torch.Tensor
    sizes: list[int]
    heads: torch.Tensor
    projections: list[Weight]
    experts: list[CDMoE | None]


@torch.no_grad()
def stack(blocks, dtype, compiled):
    """Blocks of model.py -> Layers."""

    def small(block):  # layer_step takes them apart in this order
        attention, norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
        weights = [norm.weight.float() * len(norm.weight) ** 0.5 for norm in norms]  # see `inverse`
        weights += [block.input_residual, block.post_attention_residual, attention.dt_proj.weight, attention.A]
        return [weight.float().flatten() for weight in weights]

    def head(attention):
        """(H + K, D): what the norms of queries and keys multiply by, and attention's 1 / sqrt(D) for queries."""
        D, H, K = attention.head_dim, attention.q_proj.out_features // attention.head_dim, len(attention.A)
        norms, one = (attention.q_norm, attention.k_norm), torch.ones(1, device=attention.A.device)
        q, k = (norm.weight.float() * D**0.5 if isinstance(norm, RMSNorm) else one for norm in norms)  # else Identity
        return torch.cat([(q * D**-0.5).expand(H, D), k.expand(K, D)])

    def join(*names):
        joined = [torch.cat([block.get_submodule(name).weight for name in names]) for block in blocks]
        return pack(torch.stack(joined), dtype, compiled)

    return Layers(
        torch.stack([torch.cat(small(block)) for block in blocks]),
        [len(vector) for vector in small(blocks[0])],
        torch.stack([head(block.self_attn) for block in blocks]),
        [
            join("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            join("self_attn.o_proj"),
            join("mlp.gate_proj", "mlp.up_proj"),
            join("mlp.down_proj"),
        ],
        [block.mlp if isinstance(block.mlp, CDMoE) else None for block in blocks],
    )


def unstack(layers):
    """Layers -> for each block its vectors, its projections and its experts. All are views, nothing is copied."""
    for i, experts in enumerate(layers.experts):
        projections = [Weight(values[i], None if scale is None else scale[i]) for values, scale in layers.projections]
        yield layers.vectors[i].split(layers.sizes), projections, experts


def inverse(x, eps):
    """1 / sqrt(n (mean(x^2) + eps)) over the last dimension, of size n, for RMSNorm: its weights here have the factor
    sqrt(n) in them. eps is a tensor, n eps: torch takes longer to make one of a number than to add it."""
    return ((x * x).sum(-1, keepdim=True) + eps).rsqrt()


def attend(slots, q):
    """What the queries (B, H, D) fp32, divided by sqrt(D), find in the slots of a layer: (B, H D) fp32."""
    slot_k, slot_v, slot_s, _ = slots
    (B, H, D), (K, N) = q.shape, slot_s.shape[1:]
    if not torch.compiler.is_compiling() or B > 1 or q.device.type != "cpu" or N > FEW_SLOTS + 1:
        k, v, s = slot_k.view(B * K, N, D), slot_v.view(B * K, N, D), slot_s.view(B * K, 1, N)
        p = (torch.bmm(q.reshape(B * K, H // K, D).to(k.dtype), k.mT).float() + s).softmax(-1)
        return torch.bmm(p.to(v.dtype), v).float().view(B, -1)
    q = materialise(q.view(B, K, H // K, 1, D))
    p = materialise(((q * slot_k[:, :, None]).sum(-1) + slot_s[:, :, None]).softmax(-1))
    return (p[..., None] * slot_v[:, :, None]).sum(-2).view(B, -1)


def layer_step(x, turn, place, slots, weights, shape):
    """One block for one token a row: x (B, C) -> (B, C). Computes what Block of model.py computes. turn: cos and sin
    (B, H + K, D), times the weights of the heads' norms. place: the rows' length (B,); whether a key may have to leave;
    if none has to, the slots (B K,) that take the new ones, and their positions (B K,)."""
    (norm1, norm2, residual1, residual2, dt_proj, A), (qkv, out, gate_up, down), experts = weights
    (H, K, D), qk_norm, (eps, head_eps) = shape
    (length, evicts, rows, position), B = place, x.shape[0]
    qk, v = product(x * inverse(x, eps) * norm1, qkv).tensor_split(((H + K) * D,), dim=1)
    s, qk = key_scores(A, torch.mm(v, dt_proj.view(K, -1).T)), qk.view(B, H + K, D)
    turned = torch.addcmul(qk * turn[0], qk.roll(D // 2, dims=-1), turn[1])  # rotary embedding, see model.py
    turned = turned * inverse(qk, head_eps) if qk_norm else turned
    if evicts:
        remember(slots, length, evicts, turned[:, H:, None], v.view(B, K, 1, D), s[..., None])
    else:
        put(slots, rows, turned[:, H:].reshape(B * K, D), v.reshape(B * K, D), s.view(-1), position)
    x = torch.addcmul(product(attend(slots, turned[:, :H]), out), residual1, x)
    h = x * inverse(x, eps) * norm2
    gate, up = product(h, gate_up).chunk(2, dim=-1)
    y = product(F.silu(gate) * up, down)
    if experts is not None:
        y = y + experts.routed(h[:, None].to(experts.up_embed.weight.dtype))[0][:, 0].float()
    return torch.addcmul(y, residual2, x)


def layers_step(x, state, slots, layers, blocks, shape, embedding=None, head=None):
    """Several blocks one after another: `layers`, and what unstack makes of it, if that is done already. With
    `embedding` (V, C) x is not the running state (B, C) but tokens (B,); with `head`, the last norm's weight and the
    output matrix, what comes back is the logits."""
    length, frequencies, evicts = state
    (H, K, D), _, (eps, _) = shape
    x = x if embedding is None else F.embedding(x, embedding).float()
    cos, sin = rotary_table(length[:, None], frequencies)  # (B, 1, D); a norm's weight turns with what it multiplies
    heads = layers.heads[:, None]
    turns = (heads * cos).unbind(), (heads.roll(D // 2, dims=-1) * sin).unbind()
    position = length[:, None].expand(-1, K).flatten()
    place = length, evicts, rows_of(position, slots[0][2].shape[-1]), position
    for layer_slots, weights, *turn in zip(slots, blocks or unstack(layers), *turns, strict=True):
        x = layer_step(x, turn, place, layer_slots, weights, shape)
    return x if head is None else product(x * inverse(x, eps) * head[0], head[1])


class Decoder:
    """The weights of a model in the form that one token at a time reads fastest. They lie beside the model's own.

    decoder(token (B,), cache) -> logits (B, V) fp32, and the cache holds the token. dtype: float32, bfloat16 or int8.
    """

    def __init__(self, model, dtype=torch.float32, compile=False):
        config, blocks = model.config, model.layers
        self.embedding = model.embed_tokens.weight.detach()
        C, D, one = config.hidden_size, config.head_dim, torch.ones((), device=self.embedding.device)
        eps = one * config.rms_norm_eps * C, one * config.rms_norm_eps * D  # see `inverse`
        self.shape = (config.num_attention_heads, config.num_key_value_heads, D), config.qk_norm, eps
        groups = [blocks[i : i + LAYERS_AT_A_TIME] for i in range(0, len(blocks), LAYERS_AT_A_TIME)]
        self.layers = [stack(group, dtype, compile) for group in groups]
        self.head = model.norm.weight.detach().float() * C**0.5, pack(model.output_weight, dtype, compile)
        self.compiled, self.layers_step = compile, layers_step
        self.by_rows = dtype == torch.bfloat16 and self.embedding.device.type == "cpu" and not compile
        self.blocks = [None if compile else list(unstack(layers)) for layers in self.layers]  # once and for all
        if compile:  # a form for each length of cache (see room), dtype and model; torch gives up after 8
            torch._dynamo.config.recompile_limit = 64
            self.layers_step = torch.compile(layers_step, dynamic=False, fullgraph=True)

    def room(self, length):
        """How long a cache to make for a text of `length`: compiled code is made for one length, so few are used."""
        return 2 ** math.ceil(math.log2(length)) if self.compiled else length

    @torch.inference_mode()
    def __call__(self, token, cache):
        x, state = token, (cache.length, cache.frequencies, cache.evicts)
        with one_row_of_bfloat16() if self.by_rows and len(token) == 1 else contextlib.nullcontext():
            for i, (layers, blocks) in enumerate(zip(self.layers, self.blocks, strict=True)):
                slots = cache.layers[i * LAYERS_AT_A_TIME : (i + 1) * LAYERS_AT_A_TIME]
                ends = None if i else self.embedding, self.head if i == len(self.layers) - 1 else None
                x = self.layers_step(x, state, slots, layers, blocks, self.shape, *ends)
        cache.length += 1
        return x
