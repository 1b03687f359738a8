"""Decoding: one token after another, as fast as the machine can read the weights.

To draw one token the model reads every weight once and uses it for two operations. A processor computes far faster
than it reads memory, so at batch 1 the speed of generation is, at best, memory bandwidth / bytes of weights. Two things
keep a program from that limit, and this file is about both.

Too many bytes. A weight takes 4 bytes in float32, 2 in bfloat16, 1 in int8. For int8, every row of a weight matrix is
divided by a scale of its own, so that its largest entry becomes 127, and rounded; the scale multiplies the result
(weight-only, per output channel, nothing is retrained). Computation stays in floating point.

Too many steps. The model of model.py runs some 25 operations a layer. For a small model each takes less time than
Python and torch need to launch it. So here the projections that share an input are one matrix, and on request
torch.compile turns several layers at a time into one C++ function. That needs a C++ compiler, and half a minute or more
for every length of cache, which are few (see room); torch keeps what it compiled on disk. One row against one matrix
is then written as multiply and sum, a plain loop that the compiler vectorises, and which reads bfloat16 and int8 as
easily as float32. What Python hands to the compiled function it checks at every call, tensor by tensor, so the weights
of these layers are one tensor of each kind.

    decoder = Decoder(model, torch.int8, compile=True)
    for token in model.stream(prompt, 100, decoder=decoder): ...

The prompt itself is read by the model as it is: many tokens at once use every weight many times, and need none of this.

Shapes as in model.py: B batch, T tokens, C hidden size, V vocabulary, H heads, K key/value heads, D head size.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import CDMoE, RMSNorm, key_scores, recall, remember, rotary_table, rotate

LAYERS_AT_A_TIME = 8  # compiled as one function: 8 fit a 20M model whole; more layers call it again, compiled once
STREAMS = 4  # rows far apart that a compiled step reads side by side: following several, a core waits less for memory
WIDE = 512  # only where rows are wider: the weights of smaller models stay in the processor's cache
FEW_SLOTS = 512  # a compiled step reads as many of the cache by loops of its own; beyond them products are faster


class Weight(NamedTuple):
    """A matrix, or n of them, that map a row of inputs to outputs: fp32 (in, out), bf16 (out, in), or int8 (out, in)
    with the scale (out,) of every output. Read row by row, (in, out) is what a processor's BLAS is fastest with."""

    values: torch.Tensor
    scale: torch.Tensor | None = None


def pack(weight, dtype):
    """weight (out, in) or (n, out, in) -> Weight. Raises ValueError for another dtype than float32, bfloat16, int8."""
    weight = weight.detach().float()
    if dtype == torch.float32:
        return Weight(weight.mT.contiguous())
    if dtype == torch.bfloat16:
        return Weight(weight.to(dtype).contiguous())
    if dtype == torch.int8:
        scale = weight.abs().amax(dim=-1).clamp(min=1e-12) / 127  # an all-zero row stays zero
        return Weight((weight / scale[..., None]).round().to(torch.int8), scale)
    raise ValueError(f"dtype={dtype} must be float32, bfloat16 or int8")


def product(x, weight):
    """x (B, in) fp32 -> (B, out) fp32."""
    values, scale = weight
    if values.dtype == torch.float32:
        return x @ values
    if torch.compiler.is_compiling() and len(x) == 1 and x.device.type == "cpu":
        x, parts = materialise(x), values.chunk(STREAMS if values.shape[1] > WIDE else 1)
        y = torch.cat([(part.float() * x).sum(-1) for part in parts])[None]
        return y if scale is None else y * scale
    if scale is None:
        return F.linear(x.to(values.dtype), values).float()
    if values.shape[1] % 16:  # the kernel reads 16 inputs at a time and does not look where the row ends
        return F.linear(x, values.float()) * scale
    return torch._weight_int8pack_mm(x.bfloat16(), values, scale.bfloat16()).float()


def materialise(x):
    """Tells the compiler to store x, which a whole loop needs, instead of computing it anew in each of its rounds."""
    return x.as_strided(x.shape, x.stride())


class Layers(NamedTuple):
    """The weights of n blocks of model.py. vectors (n, all together) fp32 holds the small ones of a block, one after
    another, of these `sizes`; projections are Weights of n matrices, those of the same input joined; experts are the
    CDMoE of each block, or None: of their tables a token reads only a few rows, so they stay as they are."""

    vectors: torch.Tensor
    sizes: list[int]
    projections: list[Weight]
    experts: list[CDMoE | None]


@torch.no_grad()
def stack(blocks, dtype):
    """Blocks of model.py -> Layers."""

    def small(block):  # layer_step takes them apart in this order
        attention = block.self_attn
        heads, shared = attention.q_proj.out_features // attention.head_dim, len(attention.A)
        norms = [attention.q_norm] * heads + [attention.k_norm] * shared  # of some models Identity
        weights = [norm.weight for norm in norms if isinstance(norm, RMSNorm)] or [attention.A[:0]]
        weights = block.input_layernorm.weight, torch.cat(weights), attention.dt_proj.weight, attention.A
        weights += block.post_attention_layernorm.weight, block.input_residual, block.post_attention_residual
        return [weight.float().flatten() for weight in weights]

    def join(*names):
        joined = [torch.cat([block.get_submodule(name).weight for name in names]) for block in blocks]
        return pack(torch.stack(joined), dtype)

    return Layers(
        torch.stack([torch.cat(small(block)) for block in blocks]),
        [len(vector) for vector in small(blocks[0])],
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


def norm(x, weight, eps):
    """RMSNorm of x over its last dimension. (F.rms_norm takes a half longer: it checks what it is given.)"""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def attend(slots, q):
    """What the queries (B, H, 1, D) fp32 find in the slots of a layer: (B, H D) fp32."""
    slot_k, slot_v, slot_s, _ = slots
    (B, H, _, D), (K, N) = q.shape, slot_s.shape[1:]
    if not torch.compiler.is_compiling() or B > 1 or q.device.type != "cpu" or N > FEW_SLOTS + 1:
        return recall(slot_k, slot_v, slot_s, q.to(slot_k.dtype)).float().view(B, -1)
    q = materialise((q * D**-0.5).view(B, K, H // K, 1, D))
    p = materialise(((q * slot_k[:, :, None]).sum(-1) + slot_s[:, :, None]).softmax(-1))
    return (p[..., None] * slot_v[:, :, None]).sum(-2).view(B, -1)


def layer_step(x, rotary, length, evicts, slots, weights, shape):
    """One block for one token a row: x (B, C) -> (B, C). Computes what Block of model.py computes."""
    (norm1, qk_norm, dt_proj, A, norm2, residual1, residual2), (qkv, out, gate_up, down), experts = weights
    (H, K, D), eps = shape
    B = len(x)
    qk, v = product(norm(x, norm1, eps), qkv).split(((H + K) * D, K * D), dim=-1)
    s = key_scores(A, F.linear(v, dt_proj.view(K, -1)))[..., None]  # (B, K, 1)
    qk = qk.view(B, H + K, 1, D)  # both are normed and turned alike
    qk = norm(qk, qk_norm.view(H + K, 1, D), eps) if len(qk_norm) else qk
    q, k = rotate(qk, *rotary).split((H, K), dim=1)
    remember(*slots, length, evicts, k, v.view(B, K, 1, D), s)
    x = torch.addcmul(product(attend(slots, q), out), residual1, x)
    h = norm(x, norm2, eps)
    gate, up = product(h, gate_up).chunk(2, dim=-1)
    y = product(F.silu(gate) * up, down)
    if experts is not None:
        y = y + experts.routed(h[:, None].to(experts.up_embed.weight.dtype))[0][:, 0].float()
    return torch.addcmul(y, residual2, x)


def layers_step(x, state, slots, layers, shape, embedding=None, head=None):
    """Several blocks one after another. With `embedding` (V, C) x is not the running state (B, C) but tokens (B,); with
    `head`, the last norm's weight and the output matrix, what comes back is the logits."""
    length, frequencies, evicts = state
    x = x if embedding is None else F.embedding(x, embedding).float()
    rotary = rotary_table(length[:, None, None], frequencies)
    layers = unstack(layers) if isinstance(layers, Layers) else layers
    for layer_slots, weights in zip(slots, layers, strict=True):
        x = layer_step(x, rotary, length, evicts, layer_slots, weights, shape)
    return x if head is None else product(norm(x, head[0], shape[1]), head[1])


class Decoder:
    """The weights of a model in the form that one token at a time reads fastest. They lie beside the model's own.

    decoder(token (B,), cache) -> logits (B, V) fp32, and the cache holds the token. dtype: float32, bfloat16 or int8.
    """

    def __init__(self, model, dtype=torch.float32, compile=False):
        config, blocks = model.config, model.layers
        self.shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim), config.rms_norm_eps
        self.embedding = model.embed_tokens.weight.detach()
        self.layers = [stack(blocks[i : i + LAYERS_AT_A_TIME], dtype) for i in range(0, len(blocks), LAYERS_AT_A_TIME)]
        self.head = model.norm.weight.detach().float(), pack(model.output_weight, dtype)
        self.compiled, self.layers_step = compile, layers_step
        if compile:  # a form for each length of cache (see room), dtype and model; torch gives up after 8
            torch._dynamo.config.recompile_limit = 64
            self.layers_step = torch.compile(layers_step, dynamic=False, fullgraph=True)
        else:  # taken apart once and for all
            self.layers = [list(unstack(layers)) for layers in self.layers]

    def room(self, length):
        """How long a cache to make for a text of `length`: compiled code is made for one length, so few are used."""
        return 2 ** math.ceil(math.log2(length)) if self.compiled else length

    @torch.inference_mode()
    def __call__(self, token, cache):
        x, state = token, (cache.length, cache.frequencies, cache.evicts)
        for i, layers in enumerate(self.layers):
            slots = cache.layers[i * LAYERS_AT_A_TIME : (i + 1) * LAYERS_AT_A_TIME]
            ends = None if i else self.embedding, self.head if i == len(self.layers) - 1 else None
            x = self.layers_step(x, state, slots, layers, self.shape, *ends)
        cache.length += 1
        return x
