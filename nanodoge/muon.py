"""Muon (Jordan et al. 2024): updates of hidden matrices that are orthogonal, so that all directions move alike."""

import math

import torch
from torch import Tensor

from nanodoge.machine import full_tensor, shard_like


class Muon(torch.optim.Muon):
    """torch's Muon, with all matrices of one shape in one product, and in float32 on a CPU, where bfloat16 products are
    slow. Measured there: 2 to 4 times as fast (NOTES.md)."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, matrices in shapes.items():
                updates = []
                for p in matrices:
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    nesterov = p.grad.lerp(state["momentum_buffer"], group["momentum"])
                    updates.append(full_tensor(nesterov))  # with --shard every rank does all the work that follows
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # match_rms_adamw
                updates = orthogonal(torch.stack(updates), *group["ns_coefficients"])
                for p, update in zip(matrices, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(shard_like(update, p), alpha=-rate)


def orthogonal(x: Tensor, a: float, b: float, c: float, steps: int = 5) -> Tensor:
    """x (n, rows, columns) made about orthogonal: U V of x = U S V. A polynomial that moves the singular values towards
    1 is applied `steps` times (Newton-Schulz; coefficients of Jordan et al. 2024)."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    if x.device.type != "cpu":
        wide = wide.bfloat16()
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if x.shape[1] <= x.shape[2] else wide.mT).to(x.dtype)
