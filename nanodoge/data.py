"""A data folder: its meta.json, its tokenizer, and the bits per byte of its validation text.

A model that gives the next token the probability p needs -log2(p) bits to store it. Summed over a text and divided by
its bytes, this does not depend on how the text was cut into tokens, so models with different vocabularies can be
compared: 8 is no model at all, a good compressor of English needs about 2, a language model less.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanodoge.checkpoint import read_json
from nanodoge.machine import Machine
from nanodoge.tokenizer import Tokenizer


def read_meta(folder: str | Path, kind: str | None = "text") -> dict:
    """The meta.json of a data folder of this kind (None: of any). Raises ValueError for a folder that prepare_data.py
    did not finish, or that holds another kind of data."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        command = f"python prepare_data.py SOURCE --kind={kind or 'text'} --out={folder}"
        raise ValueError(f"{folder}: there is no {path}; {command} makes one")
    meta = read_json(path)
    if kind not in (None, found := meta.get("kind", "text")):
        raise ValueError(f"{folder} holds --kind={found}, and this stage reads --kind={kind}")
    counts = [part.get("tokens") if isinstance(part := meta.get(name), dict) else None for name in ("train", "val")]
    labels = meta.get("labels") if found == "labels" else ["", ""]
    checks = {
        "dtype": meta.get("dtype") in ("uint16", "uint32"),
        "vocab_size": type(meta.get("vocab_size")) is int and meta["vocab_size"] >= 0,
        "tokenizer_sha256": isinstance(meta.get("tokenizer_sha256"), str),
        "number of tokens": all(type(n) is int and n >= 0 for n in counts),
        "sizes": found == "text" or isinstance(meta.get("sizes"), dict),
        "labels": isinstance(labels, list) and len(labels) > 1 and all(isinstance(label, str) for label in labels),
    }
    if wrong := [name for name, is_right in checks.items() if not is_right]:
        raise ValueError(f"{path} is damaged: its {wrong[0]} is missing or wrong")
    return meta


def check_tokenizer(tokenizer: Tokenizer, data: str | Path, source: str | Path = "") -> None:
    """Raises ValueError unless `tokenizer`, that of the checkpoint `source` or else the data folder's own, is the one
    that the folder's tokens were made with: same ids and, for conversations, same chat template."""
    meta, file = read_meta(data, kind=None), Path(data) / "tokenizer.json"
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == meta["tokenizer_sha256"]:
        meta["tokenizer_sha256"] = Tokenizer.load(data).digest  # folders of before November 2026 name the file's bytes
    own = dict(tokenizer_sha256=tokenizer.digest, vocab_size=tokenizer.vocab_size)
    own |= dict(chat_template=tokenizer.chat_template) if meta.get("kind", "text") != "text" else {}
    if different := [name for name, value in own.items() if meta.get(name) != value]:
        what = "chat template" if different == ["chat_template"] else "tokenizer"
        if source:
            raise ValueError(f"{source} has another {what} than --data={data}: prepare it with --tokenizer={source}")
        raise ValueError(f"{data}: its {what} is not the one its tokens were made with ({different[0]} differs)")


def load_tokenizer(data: str | Path) -> Tokenizer:
    """The tokenizer of a data folder. Raises ValueError if its tokens were made with another one."""
    tokenizer = Tokenizer.load(data)
    check_tokenizer(tokenizer, data)
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """(V,) int64: how many bytes of text each token stands for; 0 for a special token."""
    special = set(tokenizer.special_tokens.values())
    return torch.tensor([0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


def bits_per_byte(
    nats_of: Callable[[Tensor, Tensor], float],
    data: Any,
    bytes_of: Tensor,
    max_tokens: int,
    batch_size: int,
    machine: Machine,
) -> tuple[float, float, int]:
    """Mean loss in nats per token, bits per byte, and number of tokens, of the first max_tokens of a text, rounded up
    to whole sequences. The ranks share them. Bits count every token, also the end of a document; bytes are the text's.

    nats_of(tokens, targets), both (B, T) -> the sum of -log p(target) over the targets that are not -100. data:
    train.py's Sequences. bytes_of (V,): see token_bytes. batch_size: sequences at once.
    """
    count = math.ceil(min(len(data.tokens) - 1, max_tokens) / data.length)
    mine, nats, seen, size = range(count)[machine.rank :: machine.world_size], 0.0, 0, 0
    for i in range(0, len(mine), batch_size):
        tokens, targets = data.batch(mine[i : i + batch_size])
        real = targets[targets >= 0]
        nats += nats_of(tokens, targets)
        seen, size = seen + len(real), size + bytes_of[real].sum().item()
    nats, seen, size = machine.sum([nats, float(seen), float(size)])
    return nats / seen, nats / math.log(2) / max(size, 1), int(seen)
