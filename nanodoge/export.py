"""A checkpoint as files that run without torch: one step of generation as an ONNX graph, and what a chat needs.

    model.onnx     token and state in; logits, and what the token changes in the state, out
    export.json    the vocabulary, the layout of a chat, and the shape of the state
    run.py         a conversation in the terminal, by onnxruntime and numpy
    index.html     the same in a browser, with onnxruntime-web, from any server of files

The graph is that of nanodoge/onnx_step.py, whose `step_model` says what its inputs and outputs are. The state has a
constant size, so that it generates text of any length. A caller may begin with few slots, and double them until there
are W + 1: while a text is shorter than the window, its key j belongs in slot j.
"""

import hashlib
import json
import re
import shutil
from itertools import groupby
from pathlib import Path

import regex
import torch

from model import Doge
from nanodoge.template import written_parts
from nanodoge.tokenizer import Tokenizer

WEB = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")  # of onnxruntime-web


def portable_pattern(pattern: str) -> str:
    r"""The pattern of a tokenizer for Python's `re` and JavaScript alike. Both lack `\p{L}` or `(?i:...)`, and `\s` is
    other characters there, so classes are spelled out as ranges. Raises ValueError for what neither has (`a++`)."""
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))

    def ranges(kind: str) -> str:
        runs = regex.findall(rf"{kind}+", everything)  # neighbours, but for the surrogates, which no text has
        return "".join(run if len(run) < 3 else f"{run[0]}-{run[-1]}" for run in runs)

    def either_case(group: re.Match) -> str:
        spelled = ("".join(regex.findall(f"(?i){c}", everything)) if c.isalpha() else "" for c in group[1])
        return "(?:" + "".join(f"[{cases}]" if cases else c for c, cases in zip(group[1], spelled, strict=True)) + ")"

    pattern, inside = re.sub(r"\(\?i:([\w'|]+)\)", either_case, pattern), False
    parts = re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL)
    for i, part in enumerate(parts):
        inside = part == "[" or (inside and part != "]")
        if re.fullmatch(r"\\p\{\w+\}|\\s", part):
            parts[i] = ranges(part) if inside else f"[{ranges(part)}]"
        elif part == r"\S":
            parts[i] = ranges(part) if inside else f"[^{ranges(chr(92) + 's')}]"
    pattern = "".join(parts)
    if re.search(r"\\[pP]|\(\?[^:!=]|[+*?}]\+", pattern):
        raise ValueError(f"the tokenizer's pattern cannot be written for Python's re and JavaScript: {pattern:.60}")
    return pattern


def chat_parts(tokenizer: Tokenizer) -> dict[str, list[int | str]] | None:
    """What the chat template writes around messages, as lists of ids of special tokens and texts: {"start": before the
    first user message, "answer": after it, up to the assistant's, "next": from there to the next user message, and
    "system": [before, after] the system message, or null}. None for a tokenizer or a template without such parts."""
    if not tokenizer.chat_template:
        return None

    split, special = tokenizer.split[None], tokenizer.special_tokens

    def around(*roles: str) -> list[list[int | str]]:
        messages = [{"role": role, "content": f"<{i}>"} for i, role in enumerate(roles)]
        values = tokenizer.names | {"add_generation_prompt": roles[-1] == "user"}
        written = written_parts(tokenizer.chat_template, messages, None, split, **values)
        runs = groupby(written, key=lambda part: part[1] is None)
        texts = ["".join(text for text, *_ in run) for is_template, run in runs if is_template]
        return [[special.get(piece, piece) for piece in split(text) if piece] for text in texts]

    try:
        start, answer = around("user")
        whole = around("user", "assistant", "user", "assistant", "user")
        with_system = around("system", "user")
    except ValueError:
        return None
    _, _, following, *_ = whole
    if whole != [start, answer, following, answer, following, answer]:
        return None
    system = with_system[:2] if len(with_system) == 3 and with_system[2] == answer else None
    return dict(start=start, answer=answer, next=following, system=system)


def write_export(model: Doge, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, web: str = "") -> None:
    """Writes the files above into a new folder. web: the folder `dist` of the npm package onnxruntime-web, of which a
    copy goes with the page. Raises ValueError if onnx is not installed, or `web` lacks a file."""
    from nanodoge.onnx_step import save_step

    if web and (missing := [name for name in WEB if not Path(web, name).is_file()]):
        raise ValueError(f"--web={web} must be the folder dist of onnxruntime-web; it has no {missing[0]}")
    settings = export_settings(model, tokenizer)  # before the long part, since it may refuse
    folder.mkdir(parents=True, exist_ok=True)
    save_step(model.float(), folder / "model.onnx", dtype, tokenizer.vocab_size, expand=bool(web))
    settings["sha256"] = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "export.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    tokenizer.save(folder)
    here = Path(__file__).parent / "web"
    shutil.copy(here / "run.py", folder / "run.py")
    if web:
        shutil.copy(here / "local.html", folder / "index.html")
        for name in WEB:
            shutil.copy(Path(web, name), folder / name)


def export_settings(model: Doge, tokenizer: Tokenizer) -> dict:
    """export.json: the bytes of each token as text of U+0000 to U+00FF, ids of special tokens, the pattern, the parts
    of a chat, and the sizes of the state."""
    config, special = model.config, sorted(tokenizer.special_tokens.values())
    ids = set(tokenizer.vocabulary.ranks.values()) | set(special)
    tokens = [tokenizer.token_bytes(id).decode("latin-1") if id in ids else "" for id in range(tokenizer.vocab_size)]
    return dict(
        tokens=tokens,
        special=special,
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        pattern=portable_pattern(tokenizer.vocabulary.pattern),
        chat=chat_parts(tokenizer),
        layers=config.num_hidden_layers,
        heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        window=config.keep_window_size,
        context=config.max_position_embeddings,
    )
