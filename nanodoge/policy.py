"""The model as a policy: it writes answers, and it gives the tokens of answers their log-probabilities."""

import torch.nn as nn
from torch import Tensor

from nanodoge.losses import token_logprobs


class Policy(nn.Module):
    """The model as what draws tokens: at `temperature`, from the first vocab_size ids (None: from all)."""

    def __init__(self, model: nn.Module, vocab_size: int | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.vocab_size, self.temperature = model, vocab_size, temperature

    def forward(self, tokens: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T), positions and targets (N,), see with_positions -> the log-probabilities (N,) fp32 of the
        targets, in nats, and the load-balance value of the experts."""
        x, balance = self.model.hidden(tokens)  # (B, T, C)
        weight = self.model.output_weight[: self.vocab_size]  # (V, C)
        return token_logprobs(x.flatten(0, 1)[positions], weight, targets, self.temperature), balance


def with_positions(targets: Tensor) -> tuple[Tensor, Tensor]:
    """targets (B, T), -100 = none -> the N positions in the flattened (B T) that have one, and these targets, both
    (N,): only they are multiplied by the output matrix. On the host, because counting synchronises a GPU."""
    positions = (targets.flatten() != -100).nonzero()[:, 0]
    return positions, targets.flatten()[positions]
