"""Cross-entropy and log-probabilities without the (N, V) logits.

The logits of all positions would be by far the largest tensor of a training step: 2 GB for 16,384 positions and a
vocabulary of 32,768. So positions are taken a few at a time.

Shapes: N positions (of all sequences), C hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanodoge.memory import outside_graphs, recomputed

LOSS_ELEMENTS = 2**20  # logits alive at once: 4 MB, so that they stay in a CPU's cache
LOSS_ROWS = 256  # but at least these positions, to keep the matrix product busy


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """Mean cross-entropy, in nats, of the logits x @ weight.T over the targets that are not -100; 0 if there are none.
    x (N, C), weight (V, C), targets (N,) int64. rows: positions at once; None: see rows_at_once."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # counting synchronises a GPU
        kept = (targets != -100).nonzero()[:, 0]
        if len(kept) < len(targets):  # nine in ten are ignored where only answers are learned
            x, targets = x[kept], targets[kept]
    total = LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled(), rows or rows_at_once(x, weight))
    return total / (targets != -100).sum().clamp(min=1)


@outside_graphs  # the number of pieces differs from batch to batch, and each would be compiled anew
def token_logprobs(
    x: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, rows: int | None = None
) -> Tensor:
    """The log-probabilities (N,) fp32 of targets (N,) under the logits x @ weight.T / temperature, of x (N, C), weight
    (V, C).

    Each piece of the logits is computed again in the backward pass: the weight of a token may depend on the others
    (the two answers of a pair, dpo.py), so its gradient cannot be made in the forward pass, as LinearCrossEntropy does.
    """

    def logprobs(x, target):
        return -F.cross_entropy(F.linear(x, weight).float() / temperature, target, reduction="none")

    rows = rows or rows_at_once(x, weight)
    pieces = zip(x.split(rows), targets.split(rows), strict=True)
    return torch.cat([recomputed(logprobs, *piece) for piece in pieces])


def rows_at_once(x: Tensor, weight: Tensor) -> int:
    """How many positions are multiplied by the output matrix at once."""
    budget = LOSS_ELEMENTS if x.device.type == "cpu" else 64 * LOSS_ELEMENTS  # a GPU is faster with large pieces
    return max(LOSS_ROWS, budget // len(weight))


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies, whose gradient is made in the forward pass.

    All that the backward pass needs of the logits is their gradient, softmax - onehot, and of that only its products
    with x and with weight. So for a few positions at a time the logits turn into their gradient in place, are
    multiplied twice, and are overwritten. Nothing is computed a second time. (The idea is Liger-Kernel's, arXiv
    2410.10989.) The backward pass scales both products by one number.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, wants_gradient, rows):
        rows = max(1, min(len(x), rows))
        dtype = F.linear(x[:1], weight[:1]).dtype  # autocast's, if there is one
        matrix, total, dx, dweight = weight.to(dtype), torch.zeros((), device=x.device), torch.empty_like(x), None
        if wants_gradient and ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(weight, dtype=torch.float32)
        # Every piece overwrites the last: on a CPU fresh pages cost time.
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
            # Not +=: under the compiler of torch 2.11 that makes every gradient zero.
            total = total + (norm.log() - own).masked_fill(ignored, 0.0).sum()
            if wants_gradient:  # dlogits = e / norm - onehot; instead of it, the shorter rows it multiplies are scaled
                # Not added into e, which compiled code would then store in fp32, too. At the target e is exp(own).
                dlogits = e.to(dtype).scatter_(1, target, (own.exp() - norm).to(dtype))
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
        return dx * scale, dweight if dweight is None else dweight * scale, None, None, None
