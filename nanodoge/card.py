"""The model card of a finished run: OUT_DIR/README.md in Hugging Face's format, from the run's own facts."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

from nanodoge.data import read_meta
from nanodoge.options import changed

MARK = "# Written by nanoDoge. Without this line the file is yours, and no run replaces it."
NANODOGE = """from nanodoge.checkpoint import load_model

model, tokenizer = load_model("{out}")"""
TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{out}"), AutoTokenizer.from_pretrained("{out}")"""


def write_card(run: Any, log: list[dict[str, str]]) -> None:
    """Writes the card of a Run that has ended. A README.md of the user's own is left alone."""
    path = run.folder / "README.md"
    if not path.exists() or (path.is_file() and MARK.encode() in path.read_bytes()):
        path.write_text(card(run, log), encoding="utf-8")


def metadata(run: Any, sources: list[str]) -> dict[str, Any]:
    """What huggingface_hub.ModelCard reads; only what is known: nothing is said of the language of a user's text."""
    config, base, labels = run.model.config, run.options.init_from, run.model.labels
    built_in = sources and all(re.fullmatch("(stories|sums)(@.*)?", source) for source in sources)
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) and not Path(base).exists()
    opens = config.qk_norm and not config.is_moe and not labels  # in AutoModelForCausalLM of transformers
    found = dict(license="apache-2.0" if built_in and not is_hub_name else "unknown", language="en" if built_in else "")
    found |= dict(library_name="transformers" if opens else "nanodoge", base_model=base if is_hub_name else "")
    found["pipeline_tag"] = "text-classification" if labels else "text-generation"
    found["tags"] = ["doge", "nanodoge", *["mixture-of-experts"] * config.is_moe]
    found["datasets"] = [source.split(":")[1].split("@")[0] for source in sources if source.startswith("hf:")]
    return {name: value for name, value in found.items() if value}


def card(run: Any, log: list[dict[str, str]]) -> str:
    """The text of the card: metadata, model, data, recipe, results, use. log: the rows of log.csv."""
    options, config, meta = run.options, run.model.config, read_meta(run.options.data, kind=None)
    head = metadata(run, sources := [str(source) for source in meta.get("source") or ()])
    experts = f", {config.num_experts_per_tok} of {config.num_experts:,} experts per token" if config.is_moe else ""
    source = f" It started from `{options.init_from}`." if options.init_from else ""
    values = {name: row[name] for row in log for name in row if name.endswith("loss") or name.startswith("val_")}
    values |= {name: row[name] for row in log for name in values if row.get(name)}  # the last one of each
    picture = "![The loss over the tokens](loss.png)\n\n" if (run.folder / "loss.png").is_file() else ""
    lines = [
        f"---\n{MARK}",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items()),
        f"---\n\n# {run.folder.name}\n",
        f"A Doge model with {sum(p.numel() for p in run.model.parameters()):,} parameters: {config.num_hidden_layers} "
        f"layers of {config.hidden_size}{experts}, vocabulary {config.vocab_size:,}, context "
        f"{config.max_position_embeddings:,}, keep window {config.keep_window_size:,}.{source}\n",
        f"## Data\n\n`{options.data}`, made of {', '.join(sources) or 'unknown sources'}: {meta['train']['tokens']:,} "
        f"tokens to train on, {meta['val']['tokens']:,} held out.\n",
        f"## Recipe\n\n{run.step:,} steps, {run.tokens:,} tokens, {run.seconds:,.0f} s; {run.machine.summary}; torch "
        f"{torch.__version__}, Python {platform.python_version()}. Options that differ from the stage's defaults:\n",
        f"```\n{changed(options)}\n```\n",
        f"{picture}## Results\n\nThe last of each; `val_` is on held-out data, losses are in nats.\n",
        "| measure | value |\n|---|---|",
        *(f"| {name} | {float(value):.4f} |" for name, value in values.items() if value),
        f"\n## Use\n\n```python\n{TRANSFORMERS if head['library_name'] == 'transformers' else NANODOGE}\n```",
    ]
    return "\n".join(lines).replace("{out}", run.folder.as_posix()) + "\n"
