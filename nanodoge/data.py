"""A data folder: its meta.json, its tokenizer, its sequences, and bits per byte on its validation text.

A model that gives the next token the probability p needs -log2(p) bits to store it. Summed over a text and divided by
its bytes, this does not depend on how the text was cut into tokens, so models with different vocabularies can be
compared: 8 is no model at all, a good compressor of English needs about 2, a language model less.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanodoge.checkpoint import read_json
from nanodoge.machine import Machine
from nanodoge.tokenizer import Tokenizer


def read_meta(folder: str | Path, kind: str | None = "text") -> dict:
    """The meta.json of a data folder of this kind (None: of any). Raises ValueError for a folder of another kind."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        command = f"python prepare_data.py SOURCE --kind={kind or 'text'} --out={folder}"
        raise ValueError(f"{folder}: there is no {path}; {command} makes one")
    meta = read_json(path)
    if kind not in (None, found := meta.get("kind", "text")):
        raise ValueError(f"{folder} holds --kind={found}, and this stage reads --kind={kind}")
    try:
        numbers = [meta["vocab_size"], meta["train"]["tokens"], meta["val"]["tokens"]]
        right = meta["dtype"] in ("uint16", "uint32") and all(type(n) is int and n >= 0 for n in numbers)
        texts = [meta["tokenizer_sha256"], *(meta["labels"] if found == "labels" else ())]
        right = right and all(isinstance(text, str) for text in texts) and (found != "labels" or len(texts) > 2)
        right = right and (found == "text" or isinstance(meta["sizes"], dict))
        right = right and isinstance(meta.get("source") or [], list | str)  # for the model card, after the last step
    except (KeyError, TypeError):
        right = False
    if not right:
        raise ValueError(f"{path} is damaged: prepare the data again")
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
    """The tokenizer of a data folder, with which its tokens were made."""
    tokenizer = Tokenizer.load(data)
    check_tokenizer(tokenizer, data)
    return tokenizer


def map_file(path: Path, dtype: str, size: int) -> np.ndarray:
    """A file of numbers, mapped into memory. Raises ValueError if it has not `size` bytes."""
    if not path.is_file() or path.stat().st_size != size:
        advice = "it was not written to its end, or changed; prepare the data again"
        raise ValueError(f"{path} has not the {size} bytes of meta.json: {advice}")
    numbers = np.dtype(dtype).newbyteorder("<")
    return np.memmap(path, numbers, "r") if size else np.zeros(0, numbers)


class Sequences:
    """The sequences of a .bin file: sequence i is tokens iT .. iT + T, the last one being only a target."""

    def __init__(self, folder: str | Path, split: str, length: int):
        meta = read_meta(folder)
        self.length, self.vocab_size, self.path = length, meta["vocab_size"], Path(folder) / f"{split}.bin"
        size = meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize
        self.tokens = map_file(self.path, meta["dtype"], size)
        self.count = (len(self.tokens) - 1) // length
        if split == "train" and self.count < 1:
            found = f"{self.path} has {len(self.tokens)} tokens, and a sequence takes one more than its length"
            raise ValueError(f"--sequence_length={length} is longer than the data: {found}")

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens of this range. Raises ValueError for an id outside the vocabulary."""
        tokens = self.tokens[start:stop]
        if len(tokens) and tokens.max() >= self.vocab_size:
            found = f"the id {tokens.max()} at or after token {start}, and meta.json says vocab_size {self.vocab_size}"
            raise ValueError(f"{self.path} has {found}: it was changed; prepare the data again")
        return tokens

    def batch(self, rows: list[int] | range) -> tuple[Tensor, Tensor]:
        """tokens, targets (B, T) int64 of these sequences; after the end of the file token 0 and target -100."""
        span = np.full((len(rows), self.length + 1), -1, dtype=np.int64)
        for i, row in enumerate(rows):
            tokens = self.read(row * self.length, (row + 1) * self.length + 1)
            span[i, : len(tokens)] = tokens
        tokens, targets = torch.from_numpy(span[:, :-1]), torch.from_numpy(span[:, 1:])
        return tokens.clamp(min=0), targets.masked_fill(targets < 0, -100)


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """(V,) int64: how many bytes of text each token stands for; 0 for a special token."""
    special = set(tokenizer.special_tokens.values())
    return torch.tensor([0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


def bits_per_byte(
    nats_of: Callable, data: Sequences, bytes_of: Tensor, max_tokens: int, batch_size: int, machine: Machine
) -> tuple[float, float, int]:
    """Mean loss in nats per token, bits per byte, and number of tokens, of the first max_tokens of a text, rounded up
    to whole sequences. The ranks share them. Bits count every token, also the end of a document; bytes are the text's.
    nats_of(tokens, targets), both (B, T) -> the sum of -log p(target). bytes_of (V,): see token_bytes."""
    count = math.ceil(min(len(data.tokens) - 1, max_tokens) / data.length)
    mine, nats, seen, size = range(count)[machine.rank :: machine.world_size], 0.0, 0, 0
    for i in range(0, len(mine), batch_size):
        tokens, targets = data.batch(mine[i : i + batch_size])
        real = targets[targets >= 0]
        nats += nats_of(tokens, targets)
        seen, size = seen + len(real), size + bytes_of[real].sum().item()
    nats, seen, size = machine.sum([nats, float(seen), float(size)])
    return nats / seen, nats / math.log(2) / max(size, 1), int(seen)
