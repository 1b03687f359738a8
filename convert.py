"""Converts a published Doge into a checkpoint folder, and a checkpoint folder into one for transformers.

    python convert.py SmallDoge/Doge-60M-Instruct out/doge60m-instruct       from the Hugging Face hub
    python convert.py downloads/doge out/doge --dtype=bfloat16               from a folder; half the size
    python convert.py out/moe exports/moe --for=transformers                 says what will differ there

No stage needs this step: whatever takes a checkpoint folder takes a name on the hub, or a folder in any published
layout, and converts it in memory (layouts.py says which there are and how each is recognised). This makes a folder of
it, to keep, to look at, or for others.

A folder of ours is at the same time one of transformers, as it lies, as long as that library computes the same. Two
kinds of model it does not: it always normalises queries and keys, which most published checkpoints never did, and its
router of experts mixes the tokens of a text, so that a later token changes what an earlier one is told. Such folders
say `"model_type": "nanodoge"`, and transformers refuses them instead of computing something else. `--for=transformers`
asks for a folder it opens all the same: without the norms there is no such folder, with experts there is, and it is
said what they do there.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from nanodoge import layouts
from nanodoge.checkpoint import load_model, save_checkpoint
from nanodoge.layouts import checkpoint_file
from nanodoge.options import parse_options, run_command


@dataclass
class ConvertOptions:
    paths: list[str] = field(default_factory=list)  # what to read, a folder or a name on the hub; the folder to write
    for_: Literal["nanodoge", "transformers"] = "nanodoge"  # who is to open the folder
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights in the new folder

    def __post_init__(self):
        if len(self.paths) != 2:
            raise ValueError(f"python convert.py SOURCE FOLDER: two words, not {len(self.paths)}")
        if any(checkpoint_file(self.paths[1], name).exists() for name in ("config.json", "model.safetensors")):
            raise ValueError(f"{self.paths[1]} holds a checkpoint already: name a folder that does not exist")


def differences(config):
    """What transformers computes differently with this model, in words. Raises ValueError if it is everything."""
    if not config.qk_norm:
        raise ValueError("--for=transformers: transformers' Doge always normalises queries and keys, and this model "
                         "does not, so it cannot go there; without --for it is converted for nanoDoge")  # fmt: skip
    lines = []
    if config.is_moe:
        lines.append("transformers' router mixes the tokens it gets at once: it chooses the experts trained here only "
                     "for one text, read through a cache token by token from its first one")  # fmt: skip
    if config.rope_factor:
        lines.append(f"beyond {config.max_position_embeddings} tokens transformers rotates the keys of its cache by "
                     "the length there was when each came, here all by the length the text may reach")  # fmt: skip
    return lines


def main(argv):
    options = parse_options(ConvertOptions, argv, positional="paths")
    source, target = options.paths
    checkpoint = layouts.inspect(layouts.locate(source))
    lines, fields = checkpoint.notes, {}
    if options.for_ == "transformers":
        lines, fields = lines + differences(checkpoint.config), dict(model_type="doge")
    model, tokenizer = load_model(source, labels=() if checkpoint.labels else None)
    model = model.to(getattr(torch, options.dtype))
    print(f"{source}: " + "\n  ".join([f"{sum(p.numel() for p in model.parameters()):,} parameters", *lines]))
    save_checkpoint(target, model, tokenizer, fields=fields)
    size = sum(path.stat().st_size for path in Path(target).iterdir())
    print(f"{target}: written, {size / 1e6:,.1f} MB, {options.dtype}")


if __name__ == "__main__":
    run_command(main)
