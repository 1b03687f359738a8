"""The experts of a CDMoE layer, without gathering their vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def routed_experts(x: Tensor, down: Tensor, up: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """sum over the k experts e of  w_e * silu(down[e] . x) * up[e], (B, T, C), of x (B, T, C), tables down and up (E,
    C), weights w and expert ids e (B, T, k)."""
    if experts.shape[:2] == (1, 1):  # one token: its k experts are a small MLP
        chosen = experts.flatten()
        hidden = F.silu(F.linear(x, F.embedding(chosen, down))) * weights.to(x.dtype)  # (1, 1, k)
        return hidden @ F.embedding(chosen, up)
    flat, weights = x.to(down.dtype).flatten(0, 1), weights.to(down.dtype).flatten(0, 1)
    return RoutedExperts.apply(flat, down, up, weights, experts.flatten(0, 1)).view(x.shape)


class RoutedExperts(torch.autograd.Function):
    """out[n] = sum over j of  w[n,j] * silu(down[e[n,j]] . x[n]) * up[e[n,j]], without the vectors it picks.

    x (N, C), down and up (E, C), weights w and experts e (N, k) -> (N, C). Gathered, down[e] and up[e] are (N, k, C):
    0.5 GB each for 2,048 tokens, 64 experts and 1,024 dimensions, and kept for the backward pass. But the N k slots
    are the entries of a sparse (N, E) matrix S, and everything, gradients too, is one of three products that read the
    vectors where they lie:

        entries of x @ down.T    the product of each slot's token with its expert               -> slot_products
        S @ up                   each token's weighted sum over its experts                     -> embedding_bag
        S.T @ x                  each expert's sum over its tokens: the gradient of a table     -> embedding_bag

    The slots are sorted by expert once. The third product needs that, and the first then reads each expert's vector
    only once, in order of memory. The order of every sum is fixed. What is kept for backward is (N, k).
    """

    @staticmethod
    def forward(ctx, x, down, up, weights, experts):
        expert, order = experts.flatten().sort(stable=True)  # slots sorted by expert
        token = order // experts.shape[1]
        h = slot_products(x, token, down, expert)
        a = torch.empty_like(weights)
        a.view(-1)[order] = F.silu(h) * weights.flatten()[order]
        ctx.save_for_backward(x, down, up, weights, experts, expert, order, token, h)
        return F.embedding_bag(experts, up, per_sample_weights=a, mode="sum")

    @staticmethod
    def backward(ctx, dout):
        x, down, up, weights, experts, expert, order, token, h = ctx.saved_tensors
        dout, w, silu = dout.contiguous(), weights.flatten()[order], F.silu(h)
        starts = torch.searchsorted(expert, torch.arange(len(down) + 1, device=expert.device))
        bags = dict(offsets=starts, mode="sum", include_last_offset=True)
        da = slot_products(dout, token, up, expert)
        dh = torch.ops.aten.silu_backward(da * w, h)
        dweights, by_token = torch.empty_like(weights), torch.empty_like(weights)
        dweights.view(-1)[order], by_token.view(-1)[order] = da * silu, dh
        dx = F.embedding_bag(experts, down, per_sample_weights=by_token, mode="sum")
        ddown = F.embedding_bag(token, x, per_sample_weights=dh, **bags)
        dup = F.embedding_bag(token, dout, per_sample_weights=silu * w, **bags)
        return dx, ddown, dup, dweights, None


def slot_products(a: Tensor, i: Tensor, b: Tensor, j: Tensor) -> Tensor:
    """a (M, C), b (E, C), indices i and j (n,) -> (n,): the products a[i] . b[j]. It is what embedding_bag calls the
    gradient of its weights; torch has no public name for it that works in every dtype and under torch.compile. (CUDA
    has no bf16 kernel for it in torch 2.11: there bf16 is computed in fp32.)"""
    if a.device.type != "cpu" and a.dtype == torch.bfloat16:
        return slot_products(a.float(), i, b.float(), j).to(a.dtype)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, j, j, i, 0)
