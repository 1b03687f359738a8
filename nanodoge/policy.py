"""The model as a policy: it writes answers, and it gives the tokens of answers their log-probabilities."""

import torch.nn as nn
from torch import Tensor

from model import Doge
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request
from nanodoge.losses import token_logprobs
from nanodoge.machine import Machine, unsharded
from nanodoge.tokenizer import Tokenizer


class Policy(nn.Module):
    """The model as a distribution over tokens: at `temperature`, over the first vocab_size ids (None: over all)."""

    def __init__(self, model: Doge, vocab_size: int | None = None, temperature: float = 1.0) -> None:
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


def write_answers(
    machine: Machine,
    model: Doge,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    slots: int = 64,
    seed: int = 0,
    **sampling: float,
) -> list[list[int]]:
    """The model's answer to each prompt: new ids, with the EOS that ends them if it came in time. The ranks share the
    work, `slots` answers at once on each, and each gets all. Answer i draws with its own seed, seed + i, so it depends
    on neither slots nor ranks. sampling: fields of a Request, by default temperature 0."""
    settings = dict(temperature=0.0, stop_ids=[tokenizer.eos_id]) | sampling
    requests = [Request(ids, max_new_tokens, seed=seed + i, **settings) for i, ids in enumerate(prompts)]
    with unsharded(model), machine.autocast():
        decoder = Decoder(model, machine.dtype) if model.config.attention == "fast" else None
        engine = Engine(model, decoder, slots, tokenizer.vocab_size)
        mine = engine.generate(requests[machine.rank :: machine.world_size])
    written = [[]] * len(prompts)
    for rank, answers in enumerate(machine.gather(mine)):
        written[rank :: machine.world_size] = answers
    return written
