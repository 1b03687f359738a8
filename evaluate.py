"""How good is a model? Bits per byte of text it has never seen, with the weights in any format.

    python evaluate.py out/stories --bpb=data/stories
    python evaluate.py out/mine --bpb=data/mine --dtype=float32,bfloat16,int8

A model that gives the next token the probability p needs -log2(p) bits to say it. Summed over a text and divided by the
bytes of that text, this does not depend on how the text was cut into tokens, so models of different vocabularies can be
compared: 8 is no model at all, a good compressor of English needs about 2, and a language model less.

The tokens go through decode.py one at a time, as in generation, with its eager arithmetic; embedding and cache are
float32. So what int8 changes here is what it changes when the model writes.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import runtime
from decode import Decoder
from model import Cache
from train import Rows, bytes_of_tokens

DTYPES = ["float32", "bfloat16", "int8"]


@dataclass
class EvaluateOptions:
    checkpoint: list[str] = field(default_factory=lambda: ["out/stories"])  # folder of the model
    bpb: str = "data/stories"  # data folder whose validation text is measured
    dtype: list[str] = field(default_factory=lambda: ["float32"])  # of the weights: float32, bfloat16, int8
    tokens: int = 32768  # of the validation text at most, rounded up to whole rows
    batch_size: int = 64  # rows at once
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is

    def __post_init__(self):
        for dtype in self.dtype or [""]:
            if dtype not in DTYPES:
                raise ValueError(f"--dtype={dtype} must be one or more of {', '.join(DTYPES)}")
        for name in ("tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        if len(self.checkpoint) != 1:
            raise ValueError(f"one checkpoint folder, not {len(self.checkpoint)}: {' '.join(self.checkpoint)}")


@torch.inference_mode()
def nats(model, decoder, tokens, targets):
    """The sum of -log p(target) over tokens, targets (B, T), -100 = ignored, of a decoder that reads token by token."""
    cache = Cache(model.config, *tokens.shape, tokens.device, model.embed_tokens.weight.dtype)
    total = 0.0
    for t in range(tokens.shape[1]):
        total += F.cross_entropy(decoder(tokens[:, t], cache), targets[:, t], reduction="sum").item()
    return total


def bits_per_byte(model, decoder, rows, sizes, options):
    """-> mean loss in nats a token, bits per byte, tokens, over the first options.tokens of rows. sizes (V,): bytes."""
    device = model.embed_tokens.weight.device
    count = math.ceil(min(len(rows.tokens) - 1, options.tokens) / rows.length)
    loss, seen, size = 0.0, 0, 0
    for i in tqdm(range(0, count, options.batch_size), unit="batch", leave=False, disable=None):
        tokens, targets = rows.batch(range(i, min(i + options.batch_size, count)))
        real = targets[targets >= 0]
        loss += nats(model, decoder, tokens.to(device), targets.to(device))
        seen, size = seen + len(real), size + sizes[real].sum().item()
    return loss / seen, loss / math.log(2) / max(size, 1), seen


def main(argv):
    options = runtime.parse_options(EvaluateOptions, argv, positional="checkpoint")
    device = runtime.Machine(options.device).device
    model, tokenizer = runtime.load_model(options.checkpoint[0])
    model = model.float().to(device)
    rows = Rows(options.bpb, "val", model.config.max_position_embeddings)
    if runtime.read_meta(options.bpb)["tokenizer_sha256"] != tokenizer.digest:
        raise ValueError(f"--bpb={options.bpb} was made with another tokenizer than {options.checkpoint[0]}'s")
    if len(rows.tokens) < 2:
        raise ValueError(f"--bpb={options.bpb}: val.bin has {len(rows.tokens)} tokens, too few to measure")
    sizes, first = bytes_of_tokens(tokenizer), None
    print(f"{'weights':<10}{'loss':>10}{'bits/byte':>12}{'change':>10}{'tokens':>10}")
    for dtype in options.dtype:
        loss, bits, seen = bits_per_byte(model, Decoder(model, getattr(torch, dtype)), rows, sizes, options)
        first = first or loss
        print(f"{dtype:<10}{loss:>10.4f}{bits:>12.4f}{loss / first - 1:>+10.2%}{seen:>10,}", flush=True)


if __name__ == "__main__":
    runtime.run(main)
