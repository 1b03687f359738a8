"""Cross-entropy and log-probabilities without the (N, V) logits."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOSS_ELEMENTS = 2**20  # logits alive at once in the loss: 4 MB, so that they stay in a processor's cache
LOSS_ROWS = 256  # but at least these rows of them, to keep the matrix product busy


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
