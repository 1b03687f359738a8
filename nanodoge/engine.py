"""Generation: how a token is drawn."""

import math

import torch

LIKELY = 256  # top_p looks at this many tokens first: sorting 32,768 takes longer than a small model's whole step
BLOCK = 256  # tokens that are summed up at once when one is drawn


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
