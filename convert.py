"""Converts a published Doge into a checkpoint folder, and a checkpoint folder into one for transformers.

    python convert.py SmallDoge/Doge-60M-Instruct out/doge60m-instruct       from the Hugging Face hub
    python convert.py downloads/doge out/doge --dtype=bfloat16               from a folder; half the size
    python convert.py out/moe exports/moe --for=transformers                 says what will differ there

No stage needs this step: each takes a name on the hub, or a folder in any published layout (nanodoge/layouts.py), and
converts it in memory. This writes a folder to keep, to look at, or for others.

transformers (5.18 or newer: before, its sdpa attention sees later tokens, its issue 48748) opens a folder of ours as
it is, as long as it computes the same. For two kinds of model it does not: it
always normalises queries and keys, which most published checkpoints never did, and its router of experts mixes the
tokens of a text, so that a later token changes an earlier one's experts. Such folders say `"model_type": "nanodoge"`,
so that transformers refuses them. `--for=transformers` asks for a folder that it opens all the same: without the norms
this is refused, with experts it is written and the differences are printed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from model import DogeConfig
from nanodoge.checkpoint import checkpoint_file, load_model, locate, open_checkpoint, save_checkpoint
from nanodoge.options import parse_options, run_command


@dataclass
class ConvertOptions:
    """What is converted"""

    paths: list[str] = field(default_factory=list)  # what to read, a folder or a name on the hub; the folder to write
    for_: Literal["nanodoge", "transformers"] = "nanodoge"  # who is to open the folder
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights in the new folder

    def __post_init__(self):
        if len(self.paths) != 2:
            raise ValueError(f"python convert.py SOURCE FOLDER: two words, not {len(self.paths)}")
        if any(checkpoint_file(self.paths[1], name).exists() for name in ("config.json", "model.safetensors")):
            raise ValueError(f"{self.paths[1]} holds a checkpoint already: name a folder that does not exist")


def differences(config: DogeConfig) -> list[str]:
    """What transformers computes differently with this model, in words. Raises ValueError for queries and keys without
    norms: then everything differs."""
    if not config.qk_norm:
        reason = "transformers' Doge always normalises queries and keys, and this model does not"
        raise ValueError(f"--for=transformers: {reason}; without --for it is converted for nanoDoge")
    router = "its router mixes the tokens it gets at once: the same experts only for one text, read token by token"
    rope = f"beyond {config.max_position_embeddings} tokens it rotates each cached key by the length at that time"
    return [router] * config.is_moe + [rope] * bool(config.rope_factor)


def main(argv: list[str]) -> None:
    options = parse_options(ConvertOptions, argv, positional="paths")
    source, target = options.paths
    layout, _ = open_checkpoint(locate(source))
    heads = layout.config.num_key_value_heads
    repeated = f", {heads // layout.repeat} key/value heads repeated to {heads}" if layout.repeat > 1 else ""
    norm = "" if layout.config.qk_norm else ", queries and keys without a norm"
    print(f"{source}: {len(layout.tensors)} tensors{repeated}{norm}")
    warnings = differences(layout.config) if options.for_ == "transformers" else []
    fields = dict(model_type="doge") if options.for_ == "transformers" else None
    model, tokenizer = load_model(source, labels=() if layout.labels else None)
    save_checkpoint(target, model.to(getattr(torch, options.dtype)), tokenizer, fields=fields)
    size = sum(path.stat().st_size for path in Path(target).iterdir())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{target}: {parameters:,} parameters, {options.dtype}, {size / 1e6:,.1f} MB")
    for warning in warnings:
        print(f"  in transformers {warning}")


if __name__ == "__main__":
    run_command(main)
