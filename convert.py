"""Converts a published Doge into a checkpoint folder, and a checkpoint folder into files for others.

    python convert.py SmallDoge/Doge-60M-Instruct out/doge60m-instruct       from the Hugging Face hub
    python convert.py out/chat out/chat8 --dtype=int8                        from a folder; a quarter of the size
    python convert.py out/moe exports/moe --to=transformers                  says what will differ there
    python convert.py out/chat exports/chat --to=onnx --dtype=int8           runs without torch: nanodoge/export.py

No stage needs this step: each takes a name on the hub, or a folder in any published layout (nanodoge/layouts.py).

transformers (5.18 or newer: before, its sdpa attention sees later tokens, its issue 48748) opens a folder of ours as it
is, if it computes the same. It would compute two kinds of model differently: models without norms on queries and keys,
which it always has, and models with experts, where its router mixes the tokens of a text. Their folders say
`"model_type": "nanodoge"`, so that transformers refuses them. `--to=transformers` writes a folder that it opens.
Without the norms this is refused; with experts the folder is written, and the differences are printed.

With --dtype=int8 the matrices are stored as one byte per weight and one scale per row, and every program here opens
such a folder. The change of the loss, measured on a text that the model itself has written, is printed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from model import Doge, DogeConfig
from nanodoge.checkpoint import checkpoint_file, load_model, locate, open_checkpoint, save_checkpoint
from nanodoge.export import write_export
from nanodoge.layouts import dequantise, quantise
from nanodoge.options import parse_options, run_command
from nanodoge.tokenizer import Tokenizer


@dataclass
class ConvertOptions:
    """What is converted"""

    paths: list[str] = field(default_factory=list)  # what to read, a folder or a name on the hub; the folder to write
    to: Literal["nanodoge", "transformers", "onnx"] = "nanodoge"  # who is to open the folder; onnx: no torch needed
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"  # of the weights in the new folder
    web: str = ""  # with onnx: the folder dist of the npm package onnxruntime-web, for a page beside the model

    def __post_init__(self):
        if len(self.paths) != 2:
            raise ValueError(f"python convert.py SOURCE FOLDER: two words, not {len(self.paths)}")
        files = "config.json", "model.safetensors", "model.onnx"
        if any(checkpoint_file(self.paths[1], name).exists() for name in files):
            raise ValueError(f"{self.paths[1]} holds a checkpoint already: name a folder that does not exist")
        if self.web and self.to != "onnx":
            raise ValueError("--web is of use with --to=onnx only")
        if (self.to, self.dtype) in {("onnx", "bfloat16"), ("transformers", "int8")}:
            raise ValueError(f"--dtype={self.dtype} is not possible with --to={self.to}")


def differences(config: DogeConfig) -> list[str]:
    """What transformers computes differently with this model, in words. Raises ValueError for queries and keys without
    norms: then everything differs."""
    if not config.qk_norm:
        reason = "transformers' Doge always normalises queries and keys, and this model does not"
        raise ValueError(f"--to=transformers: {reason}; without --for it is converted for nanoDoge")
    router = "its router mixes the tokens it gets at once: the same experts only for one text, read token by token"
    rope = f"beyond {config.max_position_embeddings} tokens it rotates each cached key by the length at that time"
    return [router] * config.is_moe + [rope] * bool(config.rope_factor)


@torch.inference_mode()
def loss_change(model: Doge, tokenizer: Tokenizer) -> str:
    """How int8 weights change the loss, in words, on the 256 tokens that the model writes at temperature 1."""
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([[tokenizer.bos_id]])
    text = torch.cat((start, model.generate(start, 256, generator=generator)), dim=1)
    rounded = Doge(model.config).eval()
    rounded.load_state_dict(dequantise(quantise(model.state_dict())))
    before, after = (float(m(text[:, :-1], text[:, 1:])[1]) for m in (model, rounded))
    return f"int8: on a text of its own its loss changes from {before:.4f} to {after:.4f} nats per token"


def main(argv: list[str]) -> None:
    options = parse_options(ConvertOptions, argv, positional="paths")
    source, target = options.paths
    layout, _ = open_checkpoint(locate(source))
    heads = layout.config.num_key_value_heads
    repeated = f", {heads // layout.repeat} key/value heads repeated to {heads}" if layout.repeat > 1 else ""
    print(f"{source}: {len(layout.tensors)} tensors{repeated}" + ", without q/k norms" * (not layout.config.qk_norm))
    warnings = differences(layout.config) if options.to == "transformers" else []
    model, tokenizer = load_model(source, labels=() if layout.labels else None)
    if options.dtype == "int8":
        print(loss_change(model, tokenizer))
    if options.to == "onnx":
        write_export(model, tokenizer, Path(target), getattr(torch, options.dtype), options.web)
    else:
        fields = dict(model_type="doge") if options.to == "transformers" else {}
        int8 = options.dtype == "int8"  # transformers would not know what to do with the scales
        fields, weights = (dict(model_type="nanodoge"), quantise(model.state_dict())) if int8 else (fields, None)
        model = model if int8 else model.to(getattr(torch, options.dtype))
        save_checkpoint(target, model, tokenizer, fields=fields, weights=weights)
    size = sum(path.stat().st_size for path in Path(target).iterdir())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{target}: {parameters:,} parameters, {options.dtype}, {size / 1e6:,.1f} MB")
    for warning in warnings:
        print(f"  in transformers {warning}")


if __name__ == "__main__":
    run_command(main)
