"""Examples for tuning: data folders mapped into memory, what a stage selects of them, and micro-batches of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanodoge.data import load_tokenizer, map_file, read_meta
from nanodoge.tokenizer import Tokenizer, read_object


class TokenSet:
    """One split of a data folder, mapped into memory. len() counts conversations: a preference counts two. ids, mask,
    offsets: the files. answers: of problems. Raises ValueError for files that were changed."""

    def __init__(self, folder: str | Path, split: str, kind: str, tokenizer: Tokenizer | None = None) -> None:
        self.folder, self.split, self.meta, self.answers = Path(folder), split, read_meta(folder, kind), []
        self.tokenizer = tokenizer
        for name, dtype in dict(ids=self.meta["dtype"], mask="uint8", offsets="int64").items():
            file = f"{split}.{name}.bin"
            setattr(self, name, map_file(self.folder / file, dtype, self.meta["sizes"].get(file)))
        if wrong := self.contradiction(kind):
            raise ValueError(f"{self.folder}/{split}.{wrong}; prepare the data again")
        if kind == "problems":
            path = self.folder / f"{split}.answers.jsonl"
            lines = path.read_bytes().splitlines() if path.is_file() else ()
            answers = [read_object(line, f"{path}:{i}").get("answer") for i, line in enumerate(lines, 1)]
            self.answers = [answer for answer in answers if isinstance(answer, str)]
            if (n := len(self.answers)) != len(self):
                raise ValueError(f"{path} has {n} answers to {len(self)} problems; prepare the data again")

    def contradiction(self, kind: str) -> str:
        """What is wrong with files that do not fit each other or the vocabulary; else ""."""
        ids, mask, offsets = self.ids, self.mask, self.offsets
        size, labels = self.meta["vocab_size"], self.meta.get("labels", ())
        fits = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(ids) == len(mask) and len(ids) > 0
        if not fits or (np.diff(offsets) < 1).any() or (kind == "preferences" and len(self) % 2):
            return f"offsets.bin does not fit {self.split}.ids.bin"
        if mask.max() > 1 or mask[offsets[:-1]].any():
            return "mask.bin marks what cannot be learned"
        if ids.max() >= size:
            return f"ids.bin has the id {ids.max()}, and meta.json says vocab_size {size}"
        last = offsets[1:] - 1
        if kind == "labels" and (mask.sum() != len(self) or not mask[last].all() or ids[last].max() >= len(labels)):
            return f"ids.bin does not end every text with one of the {len(labels)} labels of meta.json"
        return ""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def conversation(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """ids int64 (n,) and mask bool (n,) of conversation i."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span].astype(np.int64), self.mask[span].astype(bool)


@dataclass
class Examples:
    """What a stage has selected from a TokenSet: count examples of k rows each, k = 2 for a preference, else 1."""

    noun: str  # what an example is called, in the plural
    set: TokenSet
    first: np.ndarray  # (count,) which conversation of the set is an example's first row
    sizes: np.ndarray  # (count, k) tokens of a row that the model reads; one more id follows, which is only a target
    targets: np.ndarray  # (count, k) targets of a row
    left_out: dict[str, int]  # {reason: how many of the set}

    def __post_init__(self) -> None:
        self.count, self.k = self.sizes.shape
        if not self.count:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.left_out.items() if n)
            raise ValueError(f"{self.set.folder}: its {self.set.split} split has no {self.noun} to use: {reasons}")
        self.lengths = self.k * self.sizes.max(1, initial=0)  # what an example takes of a micro-batch, in tokens

    def rows(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The k rows of example i: (ids, mask), size + 1 of each."""
        rows = [self.set.conversation(self.first[i] + j) for j in range(self.k)]
        return [(ids[: size + 1], mask[: size + 1]) for (ids, mask), size in zip(rows, self.sizes[i], strict=True)]

    def micro_batches(self, which: Sequence[int], limit: int, parts: int = 1) -> list[np.ndarray]:
        """The examples `which`, in groups of at most `limit` tokens (see bucket_by_length)."""
        which = np.asarray(which)
        return [which[group] for group in bucket_by_length(self.lengths[which], limit, parts)]

    def longest(self, limit: int) -> np.ndarray:
        """The longest examples, as many as a micro-batch of `limit` tokens holds."""
        return np.argsort(-self.lengths, kind="stable")[: limit // self.lengths.max()]

    def batch(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """tokens and targets (k n, T) of the n examples `which` (see pad): all first rows, then all second ones."""
        rows = [row for rows in zip(*map(self.rows, which), strict=True) for row in rows]
        return pad(rows, self.set.tokenizer.pad_id)

    def show(self, i: int) -> str:
        """Example i as text, its targets between {+ and +}. Of a second row only the targets, between {- and -}."""
        texts, labels = [], self.set.meta.get("labels")
        for (ids, mask), sign in zip(self.rows(i), "+-", strict=False):
            parts = np.split(ids, np.flatnonzero(np.diff(mask, prepend=False, append=False)))  # every second: targets
            for n, part in enumerate(parts):
                text = labels[part[0]] if labels and n % 2 else self.set.tokenizer.decode(part)
                parts[n] = "{" + sign + text + sign + "}" if n % 2 else text
            texts.append("".join(parts[1::2] if texts else parts))
        return "\n\n".join(texts)


def fit_answers(token_set: TokenSet, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every conversation (n,): the tokens that the model reads up to the end of the last answer that fits into
    `length` tokens (0 if none does), the targets among them, and the number of answers after it."""
    offsets, (begins, ends) = np.asarray(token_set.offsets), answer_spans(token_set.mask)
    first, stop = np.searchsorted(ends, offsets[:-1]), np.searchsorted(ends, offsets[1:])  # its answers
    fits = np.minimum(stop, np.searchsorted(ends, offsets[:-1] + length, side="right"))
    sizes = np.where(fits > first, np.append(ends, 0)[fits - 1] - offsets[:-1], 0)
    learned = np.concatenate(([0], np.cumsum(ends - begins + 1)))
    return sizes, learned[fits] - learned[first], stop - fits


def answer_spans(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last position of every run of 1 in a mask (n,) uint8. A conversation begins with a 0, so no run
    crosses from one to the next."""
    zero = np.uint8(0)  # a plain 0 would make the copy eight times as large
    edges = np.flatnonzero(np.diff(mask, prepend=zero, append=zero))  # begin of a run, one after its end, begin, ...
    return edges[::2], edges[1::2] - 1


# ---- Batches


def bucket_by_length(lengths: Sequence[int], limit: int, parts: int = 1) -> list[list[int]]:
    """The numbers 0 .. n - 1 in micro-batches: neighbours in length together, so that there is little padding, and at
    most `limit` tokens, padding included (a longer row is alone). Their number is a multiple of `parts`: rank r takes
    groups[r::parts]. n must be at least `parts`."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > limit:
            groups.append([])
        groups[-1].append(i)
    while len(groups) % parts:
        largest = max(groups, key=len)
        assert len(largest) > 1, f"{len(lengths)} rows do not make {parts} parts"
        groups.append([largest.pop() for _ in range(len(largest) // 2)])
    return groups


def pad(rows: list[tuple[np.ndarray, np.ndarray]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[(ids (n,), mask (n,)), ...] -> tokens and targets (B, T) int64: what the model reads, and what it is to predict
    there, -100 where that is not marked. Padding is on the right, where no earlier position attends to it."""
    tokens = [torch.from_numpy(ids[:-1]) for ids, _ in rows]
    targets = [torch.from_numpy(np.where(mask[1:], ids[1:], -100)) for ids, mask in rows]
    return pad_sequence(tokens, True, pad_id), pad_sequence(targets, True, -100)


# ---- For the stages


def open_sets(folder: str, kind: str) -> tuple[TokenSet, TokenSet, Tokenizer]:
    """The training and the validation set of a data folder, and its tokenizer."""
    read_meta(folder, kind)  # raises ValueError for another kind
    tokenizer = load_tokenizer(folder)
    return *(TokenSet(folder, split, kind, tokenizer) for split in ("train", "val")), tokenizer


def describe(train: Examples, val: Examples, options: Any) -> dict[str, str]:
    """Lines for stage.announce."""
    epochs = f"{options.max_steps * options.batch_size / train.count:.2f} epochs, {options.batch_size} per step"
    targets = f", {train.targets.sum():,} of them targets" if train.targets.any() else ""
    sizes = f"{train.count:,} {train.noun}, {train.sizes.sum():,} tokens{targets}; {epochs}"
    left_out = [f"{n:,} {e.set.split} {e.noun} {reason}" for e in (train, val) for reason, n in e.left_out.items() if n]
    return {"data": f"{options.data}: {sizes}", "left out": "; ".join(left_out) or "nothing"}
