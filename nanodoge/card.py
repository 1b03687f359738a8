"""The model card of a finished run: OUT_DIR/README.md in Hugging Face's format, from the run's own facts."""

import json
import platform
from typing import Any

import torch

from nanodoge.data import read_meta
from nanodoge.options import changed

MARK = "# Written by nanoDoge. Without this line the file is yours, and no run replaces it."


def write_card(run: Any, log: list[dict[str, str]]) -> None:
    """Writes the card of a Run that has ended. A README.md of the user's own is left alone. log: rows of log.csv."""
    path = run.folder / "README.md"
    if not path.exists() or (path.is_file() and MARK.encode() in path.read_bytes()):
        path.write_text(card(run, log), encoding="utf-8")


def card(run: Any, log: list[dict[str, str]]) -> str:
    """The text of the card: metadata, model, data, recipe, results."""
    options, config, meta = run.options, run.model.config, read_meta(run.options.data, kind=None)
    sources = [str(source) for source in meta.get("source") or ()]
    opens = config.qk_norm and not config.is_moe and not run.model.labels  # in AutoModelForCausalLM of transformers
    metadata = dict(
        license="unknown",
        library_name="transformers" if opens else "nanodoge",
        pipeline_tag="text-classification" if run.model.labels else "text-generation",
        tags=["doge", "nanodoge", *["mixture-of-experts"] * config.is_moe],
        datasets=[source.split(":")[1].split("@")[0] for source in sources if source.startswith("hf:")],
    )
    experts = f", {config.num_experts_per_tok} of {config.num_experts:,} experts per token" if config.is_moe else ""
    start = f" It started from `{options.init_from}`." if options.init_from else ""
    results = {name: value for row in log for name, value in row.items() if value}  # the last one of each
    results = {name: results[name] for name in results if name.endswith("loss") or name.startswith("val_")}
    lines = [
        f"---\n{MARK}",
        *(f"{name}: {json.dumps(value)}" for name, value in metadata.items() if value),
        f"---\n\n# {run.folder.name}\n",
        f"A Doge model with {sum(p.numel() for p in run.model.parameters()):,} parameters: {config.num_hidden_layers} "
        f"layers of {config.hidden_size}{experts}, vocabulary {config.vocab_size:,}, context "
        f"{config.max_position_embeddings:,}, keep window {config.keep_window_size:,}.{start}\n",
        f"## Data\n\n`{options.data}`, made of {', '.join(sources) or 'unknown sources'}: {meta['train']['tokens']:,} "
        f"tokens to train on, {meta['val']['tokens']:,} held out.\n",
        f"## Recipe\n\n{run.step:,} steps, {run.tokens:,} tokens, {run.seconds:,.0f} s; {run.machine.summary}; torch "
        f"{torch.__version__}, Python {platform.python_version()}. Options that differ from the stage's defaults:\n",
        f"```\n{changed(options)}\n```\n\n![The loss over the tokens](loss.png)\n",
        "## Results\n\nThe last of each; `val_` is on held-out data, losses are in nats.\n",
        "| measure | value |\n|---|---|",
        *(f"| {name} | {float(value):.4f} |" for name, value in results.items()),
    ]
    return "\n".join(lines) + "\n"
