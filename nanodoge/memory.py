"""Less memory: RMSNorm that keeps only its input for the backward pass, blocks that run in slices or are recomputed.

Memory is also time: on a CPU, fresh pages cost as much as the arithmetic on them.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SLICE = 1024  # positions of a long row that a CPU takes through a block together (other sizes: NOTES.md)


class Normalise(torch.autograd.Function):
    """y * weight with y = x / sqrt(mean(x^2) + eps) in fp32: x (..., C), weight (C,), eps -> (..., C). With dy =
    dout * weight the gradient is dx = (dy - y * mean(dy * y)) * rstd. By hand it needs fewer passes over memory than
    the automatic one (training steps of the 20M model take 0.96 of the time), and keeps x and rstd instead of y."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, rstd)
        return weight * (x * rstd).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, weight, rstd = ctx.saved_tensors
        y = x * rstd
        dweight = (dout * y).flatten(0, -2).sum(0)
        dy = dout * weight
        mean = torch.linalg.vecdot(dy, y)[..., None] / x.shape[-1]
        return (torch.addcmul(dy, y, mean, value=-1) * rstd).to(x.dtype), dweight.to(weight.dtype), None


rms_norm = Normalise.apply
recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def outside_graphs(function: Callable) -> Callable:
    """`function`, which torch.compile calls as it is instead of tracing it. The decorator torch.compiler.disable would
    import the compiler at every start, which takes a second."""

    @functools.wraps(function)
    def call(*inputs, **options):
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*inputs, **options)

    return call


def run_block(
    block: nn.Module,
    x: Tensor,
    *inputs,
    last: Tensor | None = None,
    recompute: bool = False,
    whole: bool = False,
    size: int | None = None,
) -> tuple[Tensor, Tensor | float]:
    """What block(x, *inputs) of model.py returns, x (B, T, C) -> (B, T, C) and a number, but with `last` (B,) only
    these positions, (B, 1, C): the others are there for their keys.

    recompute: the block is computed again in the backward pass (Chen et al. 2016, arXiv 1604.06174). In rows beyond the
    window attention is most of the work, and all else most of the memory, so there all else is, in any case.
    size: positions in a slice; None: SLICE on a CPU, where fresh pages cost time, so intermediate tensors are kept
    small; a GPU is faster with large ones. whole: no slices (experts balance their load over the whole row).
    """
    T, learning = x.shape[1], torch.is_grad_enabled()
    beyond = learning and T > block.self_attn.window
    cut = x.device.type == "cpu" and not whole and (beyond or not learning)
    size = (size or SLICE) if cut else T
    if learning and recompute:
        sliced = functools.partial(block.in_slices, last=None, recompute=False, size=size)
        return checkpoint(sliced if size < T else block, x, *inputs, use_reentrant=False)
    if last is None and not beyond and size >= T:
        return block(x, *inputs)
    return block.in_slices(x, *inputs, last=last, recompute=beyond, size=size)


def in_slices(
    block: nn.Module, x: Tensor, rotary, padding=None, cache=None, *, last: Tensor | None, recompute: bool, size: int
) -> tuple[Tensor, Tensor | float]:
    """The equations of Block, cut before and after attention, which alone needs the whole row."""
    run = recomputed if recompute else lambda function, *inputs: function(*inputs)

    def before(x, rotary, padding):
        return block.self_attn.project(block.input_layernorm(x), rotary, padding)

    def after(x, found):
        x = block.input_residual * x + block.self_attn.output(found)
        out, balance = block.mlp(block.post_attention_layernorm(x))
        return block.post_attention_residual * x + out, balance

    xs, rotary = x.split(size, dim=1), zip(*(part.split(size, dim=-2) for part in rotary), strict=True)
    padding = [None] * len(xs) if padding is None else padding.split(size, dim=1)
    parts = [run(before, *part) for part in zip(xs, rotary, padding, strict=True)]
    q, k, v, s = (join(part, dim=2) for part in zip(*parts, strict=True))
    if last is not None:
        row = torch.arange(len(x), device=x.device)
        x, q = x[row, last][:, None], q[row, :, last][:, :, None]
    found = block.self_attn.attend(q, k, v, s, cache).split(size, dim=2)
    parts = [run(after, *part) for part in zip(x.split(size, dim=1), found, strict=True)]
    return join([x for x, _ in parts], dim=1), parts[-1][1]


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat, which would copy a part that is alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
