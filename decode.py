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
easily as float32.

    decoder = Decoder(model, torch.int8, compile=True)
    for token in model.stream(prompt, 100, decoder=decoder): ...

The prompt itself is read by the model as it is: many tokens at once use every weight many times, and need none of this.

Shapes as in model.py: B batch, T tokens, C hidden size, V vocabulary, H heads, K key/value heads, D head size.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import CDMoE, key_scores, recall, remember, rotary_table, rotate

LAYERS_AT_A_TIME = 8  # compiled as one function: 8 fit a 20M model whole; more layers call it again, compiled once


class Weight(NamedTuple):
    """A matrix that maps a row of `size` inputs to outputs: fp32 (in, out), bf16 (out, in), or int8 (out, in) with the
    scale (out,) of every output. Read row by row, (in, out) is what a processor's BLAS is fastest with."""

    values: torch.Tensor
    scale: torch.Tensor | None = None


def pack(weight, dtype):
    """weight (out, in) -> Weight. Raises ValueError for another dtype than float32, bfloat16, int8."""
    weight = weight.detach().float()
    if dtype == torch.float32:
        return Weight(weight.T.contiguous())
    if dtype == torch.bfloat16:
        return Weight(weight.to(dtype).contiguous())
    if dtype == torch.int8:
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # an all-zero row stays zero
        return Weight((weight / scale[:, None]).round().to(torch.int8), scale)
    raise ValueError(f"dtype={dtype} must be float32, bfloat16 or int8")


def product(x, weight):
    """x (B, in) fp32 -> (B, out) fp32."""
    values, scale = weight
    if values.dtype == torch.float32:
        return x @ values
    if torch.compiler.is_compiling() and len(x) == 1 and x.device.type == "cpu":
        y = (values.float() * materialise(x)).sum(-1)[None]
        return y if scale is None else y * scale
    if scale is None:
        return F.linear(x.to(values.dtype), values).float()
    if values.shape[1] % 16:  # the kernel reads 16 inputs at a time and does not look where the row ends
        return F.linear(x, values.float()) * scale
    return torch._weight_int8pack_mm(x.bfloat16(), values, scale.bfloat16()).float()


def materialise(x):
    """Tells the compiler to store x, which every output needs, instead of computing it anew for each."""
    return x.as_strided(x.shape, x.stride())


@torch.no_grad()
def layer_weights(block, dtype):
    """The weights of a block of model.py as one tuple, projections of the same input joined."""
    attention, mlp = block.self_attn, block.mlp
    join = lambda *layers: pack(torch.cat([layer.weight for layer in layers]), dtype)  # noqa: E731
    small = block.input_layernorm, attention.q_norm, attention.k_norm, attention.dt_proj, block.post_attention_layernorm
    return (
        [module.weight.float() if hasattr(module, "weight") else None for module in small],  # q/k norm may be missing
        [x.float() for x in (attention.A, block.input_residual, block.post_attention_residual)],
        join(attention.q_proj, attention.k_proj, attention.v_proj),
        join(attention.o_proj),
        join(mlp.gate_proj, mlp.up_proj),
        join(mlp.down_proj),
        mlp if isinstance(mlp, CDMoE) else None,  # of the experts' tables only a few rows are read: left as they are
    )


def norm(x, weight, eps):
    return x if weight is None else F.rms_norm(x, x.shape[-1:], weight, eps)


def layer_step(x, rotary, length, evicts, slots, weights, sizes):
    """One block for one token a row: x (B, C) -> (B, C). Computes what Block of model.py computes."""
    (H, K, D), eps = sizes
    norms, (A, input_residual, post_attention_residual), qkv, out, gate_up, down, experts = weights
    B = len(x)
    q, k, v = product(norm(x, norms[0], eps), qkv).split((H * D, K * D, K * D), dim=-1)
    s = key_scores(A, F.linear(v, norms[3]))[..., None]  # (B, K, 1)
    q = rotate(norm(q.view(B, H, 1, D), norms[1], eps), *rotary)
    k = rotate(norm(k.view(B, K, 1, D), norms[2], eps), *rotary)
    remember(*slots, length, evicts, k, v.view(B, K, 1, D), s)
    x = input_residual * x + product(recall(*slots[:3], q.to(slots[0].dtype)).float().view(B, -1), out)
    h = norm(x, norms[4], eps)
    gate, up = product(h, gate_up).chunk(2, dim=-1)
    y = product(F.silu(gate) * up, down)
    if experts is not None:
        y = y + experts.routed(h[:, None].to(experts.up_embed.weight.dtype))[0][:, 0].float()
    return post_attention_residual * x + y


def layers_step(x, rotary, length, evicts, slots, weights, sizes, head=None):
    """Several blocks one after another; with `head`, the last norm's weight and the output matrix, then the logits."""
    for layer_slots, layer in zip(slots, weights, strict=True):
        x = layer_step(x, rotary, length, evicts, layer_slots, layer, sizes)
    return x if head is None else product(norm(x, head[0], sizes[1]), head[1])


class Decoder:
    """The weights of a model in the form that one token at a time reads fastest. They lie beside the model's own.

    decoder(token (B,), cache) -> logits (B, V) fp32, and the cache holds the token. dtype: float32, bfloat16 or int8.
    """

    def __init__(self, model, dtype=torch.float32, compile=False):
        config = model.config
        self.config, self.embedding = config, model.embed_tokens
        self.layers = [layer_weights(block, dtype) for block in model.layers]
        self.head = model.norm.weight.detach().float(), pack(model.output_weight, dtype)
        self.sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim), config.rms_norm_eps
        self.compiled = compile
        if compile:  # a form for each length of cache (see room), dtype and model; torch gives up after 8
            torch._dynamo.config.recompile_limit = 64
        self.layers_step = torch.compile(layers_step, dynamic=False, fullgraph=True) if compile else layers_step

    def room(self, length):
        """How long a cache to make for a text of `length`: compiled code is made for one length, so few are used."""
        return 2 ** math.ceil(math.log2(length)) if self.compiled else length

    @torch.inference_mode()
    def __call__(self, token, cache):
        x = self.embedding(token).float()
        rotary = rotary_table(cache.length[:, None, None], self.config.head_dim, cache.rope_base)
        for i in range(0, len(self.layers), LAYERS_AT_A_TIME):
            j = min(i + LAYERS_AT_A_TIME, len(self.layers))
            head = self.head if j == len(self.layers) else None
            state = cache.length, cache.evicts, cache.layers[i:j]
            x = self.layers_step(x, rotary, *state, self.layers[i:j], self.sizes, head)
        cache.length += 1
        return x
