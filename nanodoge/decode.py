"""Decoding: one token after another, as fast as the machine can read the weights.

    decoder = Decoder(model, torch.int8)
    logits = decoder(token, cache)          # the prompt is read by the model itself

For one token the model reads every weight once and uses it for two operations. So at batch 1 decoding is, at best,
memory bandwidth / bytes of weights. Two things keep a program from that limit.

Too many bytes. A weight takes 4 bytes in float32, 2 in bfloat16, 1 in int8. For int8, every row of a weight matrix is
divided by a scale of its own, so that its largest entry becomes 127, and rounded; the scale multiplies the result
(weight-only, per output channel, nothing is retrained). Computation stays in floating point.

Too many operations. The model of model.py runs 65 a layer, and for a small model each takes less time than Python and
torch need to launch it. So here the projections of one input are one matrix, what is the same for every layer is
computed once per token, and of several ways to write an operation the quickest to launch is taken (costs: NOTES.md);
41 are left. On a GPU torch.compile can turn several layers at a time into a few kernels; it takes half a minute or more
for every length of cache, which are few (see room). Python checks every tensor that it hands to a compiled function, so
the weights of these layers are one tensor a kind. On a CPU nanodoge/cpp_step.py is faster, where there is a compiler.

Shapes as in model.py: B batch, C hidden size, V vocabulary, H heads, K key/value heads, D head size.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import CDMoE, Doge, RMSNorm, rotary_table
from nanodoge.attention import Cache, Slots, key_scores, put, remember, rows_of

LAYERS_AT_A_TIME = 8  # compiled as one function: 8 fit a 20M model whole; more layers call it again, compiled once


class Weight(NamedTuple):
    """A matrix, or n of them, from inputs to outputs. Of (in, out) a CPU's BLAS reads a row the fastest."""

    values: Tensor  # fp32 (in, out), bf16 (out, in) or int8 (out, in)
    scale: Tensor | None = None  # (out,) of int8; bf16 for torch's kernel


def pack(weight: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype = torch.bfloat16) -> Weight:
    """weight (out, in) or (n, out, in) -> Weight. Raises ValueError for another dtype than float32, bfloat16, int8."""
    weight = weight.detach().float()
    if dtype == torch.float32:
        return Weight(weight.mT.contiguous())
    if dtype == torch.bfloat16:
        return Weight(weight.to(dtype).contiguous())
    if dtype == torch.int8:
        scale = weight.abs().amax(dim=-1).clamp(min=1e-12) / 127  # an all-zero row stays zero
        return Weight((weight / scale[..., None]).round().to(torch.int8), scale.to(scale_dtype))
    raise ValueError(f"dtype={dtype} must be float32, bfloat16 or int8")


def product(x: Tensor, weight: Weight) -> Tensor:
    """x (B, in) fp32 times a matrix -> (B, out) fp32."""
    values, scale = weight
    if values.dtype == torch.float32:
        return torch.mm(x, values)
    if scale is None:
        return F.linear(x.to(values.dtype), values).float()
    if values.shape[1] % 16:  # the kernel reads 16 inputs at a time and does not look where the row ends
        return F.linear(x, values.float()) * scale
    return torch._weight_int8pack_mm(x.bfloat16(), values, scale).float()


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Within it a CPU multiplies one row of bfloat16 by torch's own loop: oneDNN takes 20 us before it begins."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes in one thread: after an operation in several, its threads wait for the next by spinning,
    on the cores that a decoder with threads of its own needs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Shape(NamedTuple):
    heads: int  # H
    key_heads: int  # K
    head_dim: int  # D
    qk_norm: bool
    eps: Tensor  # of inverse_norm for C
    head_eps: Tensor  # and for D


class Layers(NamedTuple):
    """The weights of n blocks of model.py."""

    vectors: Tensor  # (n, all sizes together) fp32: the small weights of a block, one after another
    sizes: list[int]  # of these
    heads: Tensor  # (n, H + K, D) fp32: the weights of the norms of queries and keys
    projections: list[Weight]  # n matrices each, those of one input joined
    experts: list[CDMoE | None]  # as they are: of their tables a token reads only a few rows


class Step(NamedTuple):
    """What is the same in all layers of one step."""

    length: Tensor  # (B,): of each row, before this token
    evicts: bool  # whether a key may have to leave
    used: int | None  # the first slots, in which all keys are; None: all slots
    rows: Tensor  # (B K,): if none has to, the slots of the new keys (see attention.rows_of)
    position: Tensor  # (B K,): of the new keys


@torch.no_grad()
def stack(blocks, dtype: torch.dtype) -> Layers:
    """Blocks of model.py -> Layers."""

    def small(block):  # layer_step takes them apart in this order
        attention, norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
        weights = [norm.weight.float() * len(norm.weight) ** 0.5 for norm in norms]  # see inverse_norm
        weights += [block.input_residual, block.post_attention_residual, attention.dt_proj.weight, attention.A]
        return [weight.float().flatten() for weight in weights]

    def head(attention):
        """(H + K, D): the weights of the norms of queries and keys, and attention's 1 / sqrt(D) for queries."""
        D, H, K = attention.head_dim, attention.q_proj.out_features // attention.head_dim, len(attention.A)
        norms, one = (attention.q_norm, attention.k_norm), torch.ones(1, device=attention.A.device)
        q, k = (norm.weight.float() * D**0.5 if isinstance(norm, RMSNorm) else one for norm in norms)  # else Identity
        return torch.cat([(q * D**-0.5).expand(H, D), k.expand(K, D)])

    def join(*names):
        joined = [torch.cat([block.get_submodule(name).weight for name in names]) for block in blocks]
        return pack(torch.stack(joined), dtype)

    qkv = join("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out, gate_up, down = join("self_attn.o_proj"), join("mlp.gate_proj", "mlp.up_proj"), join("mlp.down_proj")
    return Layers(
        vectors=torch.stack([torch.cat(small(block)) for block in blocks]),
        sizes=[len(vector) for vector in small(blocks[0])],
        heads=torch.stack([head(block.self_attn) for block in blocks]),
        projections=[qkv, out, gate_up, down],
        experts=[block.mlp if isinstance(block.mlp, CDMoE) else None for block in blocks],
    )


def unstack(layers: Layers):
    """For each block its vectors, its projections and its experts. All are views, nothing is copied."""
    for i, experts in enumerate(layers.experts):
        projections = [Weight(values[i], None if scale is None else scale[i]) for values, scale in layers.projections]
        yield layers.vectors[i].split(layers.sizes), projections, experts


def inverse_norm(x: Tensor, eps: Tensor) -> Tensor:
    """1 / sqrt(n (mean(x^2) + eps)) over the last dimension, of size n: RMSNorm's weights here have the factor sqrt(n)
    in them. eps is a tensor, n eps: torch takes longer to make one of a number than to add it."""
    return ((x * x).sum(-1, keepdim=True) + eps).rsqrt()


def attend_slots(slots: Slots, q: Tensor, used: int | None = None) -> Tensor:
    """What the queries (B, H, D) fp32, divided by sqrt(D), find in the slots of a layer: (B, H D) fp32."""
    (B, H, D), (K, N) = q.shape, slots.s.shape[1:]
    k, v = slots.k.view(B * K, N, D)[:, :used], slots.v.view(B * K, N, D)[:, :used]
    s = slots.s.view(B * K, 1, N)[..., :used]
    p = (torch.bmm(q.reshape(B * K, H // K, D).to(k.dtype), k.mT).float() + s).softmax(-1)
    return torch.bmm(p.to(v.dtype), v).float().view(B, -1)


def layer_step(x: Tensor, cos: Tensor, sin: Tensor, step: Step, slots: Slots, weights, shape: Shape) -> Tensor:
    """One block for one token a row, x (B, C) -> (B, C): what Block of model.py computes. cos, sin (B, H + K, D): of
    the rotary embedding, times the weights of the heads' norms. weights: from unstack."""
    (norm1, norm2, residual1, residual2, dt_proj, A), (qkv, out, gate_up, down), experts = weights
    (H, K, D, qk_norm, eps, head_eps), B = shape, x.shape[0]
    qk, v = product(x * inverse_norm(x, eps) * norm1, qkv).tensor_split(((H + K) * D,), dim=1)
    s, qk = key_scores(A, torch.mm(v, dt_proj.view(K, -1).T)), qk.view(B, H + K, D)
    rotated = torch.addcmul(qk * cos, qk.roll(D // 2, dims=-1), sin)  # see rotate in model.py
    rotated = rotated * inverse_norm(qk, head_eps) if qk_norm else rotated
    if step.evicts:
        remember(slots, step.length, True, rotated[:, H:, None], v.view(B, K, 1, D), s[..., None])
    else:
        keys, values = rotated[:, H:].reshape(B * K, D), v.reshape(B * K, D)
        put(slots, step.rows, keys, values, s.view(-1), step.position)
    x = torch.addcmul(product(attend_slots(slots, rotated[:, :H], step.used), out), residual1, x)
    h = x * inverse_norm(x, eps) * norm2
    gate, up = product(h, gate_up).chunk(2, dim=-1)
    y = product(F.silu(gate) * up, down)
    if experts is not None:
        y = y + experts.routed(h[:, None].to(experts.up_embed.weight.dtype))[0][:, 0].float()
    return torch.addcmul(y, residual2, x)


def layers_step(x, state, slots, layers, blocks, shape, embedding=None, head=None) -> Tensor:
    """Several blocks one after another: `layers`, and in `blocks` what unstack makes of it, if that is known already.
    state: length, frequencies, evicts and used of the cache. With `embedding` (V, C) x is not the hidden state (B, C)
    but tokens (B,); with `head`, the last norm's weight and the output matrix, the result is the logits."""
    length, frequencies, evicts, used = state
    K, D = shape.key_heads, shape.head_dim
    x = x if embedding is None else F.embedding(x, embedding).float()
    cos, sin = rotary_table(length[:, None], frequencies)  # (B, 1, D); a norm's weight rotates with what it multiplies
    heads = layers.heads[:, None]
    tables = (heads * cos).unbind(), (heads.roll(D // 2, dims=-1) * sin).unbind()
    position = length[:, None].expand(-1, K).flatten()
    step = Step(length, evicts, used, rows_of(position, slots[0].s.shape[-1]), position)
    for layer_slots, weights, cos, sin in zip(slots, blocks or unstack(layers), *tables, strict=True):
        x = layer_step(x, cos, sin, step, layer_slots, weights, shape)
    return x if head is None else product(x * inverse_norm(x, shape.eps) * head[0], head[1])


class Decoder:
    """The weights of a model in the form that one token at a time reads fastest, beside the model's own.

    decoder(token (B,), cache) -> logits (B, V) fp32, and the cache holds the token. dtype: float32, bfloat16 or int8.
    """

    reads = 0  # tokens of the longest prompt that it reads itself, by a method `read`; 0: the model reads all prompts
    sampling = contextlib.nullcontext  # the context in which the engine chooses tokens

    def __init__(self, model: Doge, dtype: torch.dtype = torch.float32, compile: bool = False):
        config, blocks = model.config, model.layers
        assert config.attention == "fast", "attention by definition has no decoder"
        self.embedding = model.embed_tokens.weight.detach()
        C, D, one = config.hidden_size, config.head_dim, torch.ones((), device=self.embedding.device)
        heads = config.num_attention_heads, config.num_key_value_heads, D
        self.shape = Shape(*heads, config.qk_norm, one * config.rms_norm_eps * C, one * config.rms_norm_eps * D)
        groups = [blocks[i : i + LAYERS_AT_A_TIME] for i in range(0, len(blocks), LAYERS_AT_A_TIME)]
        self.layers = [stack(group, dtype) for group in groups]
        self.head = model.norm.weight.detach().float() * C**0.5, pack(model.output_weight, dtype)
        self.compiled, self.layers_step = compile, layers_step
        self.single_bf16 = dtype == torch.bfloat16 and self.embedding.device.type == "cpu" and not compile
        self.blocks = [None if compile else list(unstack(layers)) for layers in self.layers]  # once and for all
        if compile:  # a form for each length of cache (see room), dtype and model; torch gives up after 8
            torch._dynamo.config.recompile_limit = 64
            self.layers_step = torch.compile(layers_step, dynamic=False, fullgraph=True)

    def room(self, length: int) -> int:
        """How long a cache to make for a text of `length`: compiled code is made for one length, so few are used."""
        return 2 ** math.ceil(math.log2(length)) if self.compiled else length

    @torch.inference_mode()
    def __call__(self, token: Tensor, cache: Cache) -> Tensor:
        x, state = token, (cache.length, cache.frequencies, cache.evicts, cache.used)
        with without_onednn() if self.single_bf16 and len(token) == 1 else contextlib.nullcontext():
            for i, (layers, blocks) in enumerate(zip(self.layers, self.blocks, strict=True)):
                slots = cache.layers[i * LAYERS_AT_A_TIME : (i + 1) * LAYERS_AT_A_TIME]
                ends = None if i else self.embedding, self.head if i == len(self.layers) - 1 else None
                x = self.layers_step(x, state, slots, layers, blocks, self.shape, *ends)
        cache.length += 1
        return x


def make_decoder(model: Doge, dtype: str = "auto", backend: str = "auto", compile: bool = False) -> Callable:
    """What computes the next token: for the device and dtype of the model, or for int8 if `dtype` says so. backend:
    auto, cpp, onnx or torch; auto is cpp on a CPU where there is a C++ compiler, else torch. Raises ValueError for one
    that cannot be had."""
    from nanodoge import cpp_step  # which needs this module

    dtype = torch.int8 if dtype == "int8" else model.embed_tokens.weight.dtype
    if backend == "onnx":
        from nanodoge.onnx_step import OnnxDecoder  # an optional package

        return OnnxDecoder(model, dtype)
    is_cpu = model.embed_tokens.weight.device.type == "cpu"
    if backend == "cpp" or (backend == "auto" and is_cpu and not compile and cpp_step.find_compiler()):
        return cpp_step.CppDecoder(model, dtype)
    return Decoder(model, dtype, compile)
