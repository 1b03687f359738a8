"""Conversations as token ids with a mask: the data that sft.py, dpo.py and grpo.py read.

A chat model is a language model trained on conversations, which a template writes out like this:

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>
    Where does Anna live?<|end_of_text|>

    <|start_header_id|>assistant<|end_header_id|>
    Larkhill<|end_of_text|>

The model learns to write the assistant's words and the EOS that ends them. It does not learn the user's words, which
are given to it, nor the header, which is part of the prompt when it answers. So every id has a mask bit: here it is 1
for `Larkhill` and for the <|end_of_text|> after it, and 0 elsewhere. A data folder holds, for `train` and for `val`:

    ids.bin, mask.bin    all conversations, one after the other; uint16 or uint32, and uint8
    offsets.bin          int64: conversation i is ids[offsets[i] : offsets[i + 1]]; the last offset is the length
    answers.jsonl        problems only: {"answer": ...}, one line per problem

A preference is two conversations, 2i with the chosen answer and 2i + 1 with the rejected one: the same prompt, and only
the last answer is marked. A problem is a prompt up to the assistant's header, with nothing marked. A labelled text is
BOS, the text, and the number of its label, which alone is marked.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanodoge.data import load_tokenizer, read_meta
from nanodoge.tokenizer import Tokenizer, read_object

# The columns of a row: the first schema that fits is used. Its first column is the question (a text or a list of
# messages), the others are answers to it; a schema of one column is a whole conversation.
SCHEMAS = {
    "chat": ["messages", "conversations", "instruction, output", "question, answer", "problem, solution"],
    "preferences": ["prompt, chosen, rejected"],
    "problems": ["question, answer", "problem, answer", "messages, answer"],
    "labels": ["text, label"],
}
# What data sets call the speakers: the template's roles, and the names of ShareGPT and OpenThoughts.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


# ---------------------------------------------------------------------------------------------------------------------
# From rows to one form


def rows(kind: str, system: str = "", labels: Sequence[str] = ()) -> tuple[str, None, Callable]:
    """(kind, columns to read: None = all, function of a row): how prepare_data.py reads the rows of this kind."""
    return kind, None, lambda row, where: document(row, kind, system, where, labels)


def document(row: dict, kind: str, system: str, where: str, labels: Sequence[str] = ()) -> str:
    """A row as one line of JSON: {"messages": [{"role", "content"}, ...]} and, depending on the kind, nothing more
    (chat), "chosen" and "rejected" (preferences), "answer" (problems), or "label", a number (labels).

    A row that cannot be used is {"left_out": reason}. `system` is put before conversations that have no system message.
    A row may say that it is "held_out". Raises ValueError, naming `where`, for a row that no schema fits.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a row of columns but {type(row).__name__}")
    schema = next((schema for schema in SCHEMAS[kind] if row.keys() >= set(schema.split(", "))), None)
    if schema is None:
        columns, known = ", ".join(map(str, row)), " | ".join(SCHEMAS[kind])
        raise ValueError(f"{where}: no --kind={kind} in the columns {columns}; needed is one of {known}")
    made = READERS[kind](row, schema.split(", "), where)
    if "label" in made:
        if made["label"] not in labels:
            raise ValueError(f"{where}: label {made['label']!r} is not one of --labels={','.join(labels)}")
        made["label"] = labels.index(made["label"])
    if "left_out" not in made:
        system = row.get("system") or system
        if system and isinstance(system, str) and made["messages"][0]["role"] != "system":
            made["messages"].insert(0, dict(role="system", content=system))
        if "held_out" in row:
            made["held_out"] = bool(row["held_out"])
    return json.dumps(made, ensure_ascii=False)


def cell(row: dict, column: str, where: str, kinds: tuple[type, ...] = (str,)) -> str | list:
    """What this column holds: a text, stripped ("" for null), or a list where one may be."""
    value = "" if row[column] is None else row[column]
    if not isinstance(value, kinds):
        wanted = "text or messages" if list in kinds else "text"
        raise ValueError(f"{where}: column {column!r} holds {type(value).__name__}, not {wanted}")
    return value.strip() if isinstance(value, str) else value


def read_messages(row: dict, column: str, where: str, role: str = "user") -> list[dict]:
    """A column of messages, with role and content or with from and value -> the same with role and content. A text is
    one message, of this role."""
    value, messages = cell(row, column, where, (str, list)), []
    for message in [dict(role=role, content=value)] if isinstance(value, str) else value:
        keys = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        if not isinstance(message, dict) or not isinstance(message.get(keys[1]), str):
            raise ValueError(f"{where}: message {len(messages)} has no text as its {keys[1]!r}")
        if message.get(keys[0]) not in [*ROLES]:  # a list: what is looked up may not be hashable
            known = " ".join(ROLES)
            raise ValueError(f"{where}: message {len(messages)} is from {message.get(keys[0])!r}, not one of {known}")
        messages.append(dict(role=ROLES[message[keys[0]]], content=message[keys[1]]))
    return messages


def read_chat(row: dict, columns: list[str], where: str) -> dict:
    """A conversation up to its last answer: after it there is nothing to learn."""
    if columns[0] == "instruction" and "input" in row:  # Alpaca: what the instruction is about
        row = row | dict(instruction="\n\n".join(cell(row, column, where) for column in ("instruction", "input")))
    speakers = zip(columns, ("user", "assistant"), strict=False)
    messages = [message for column, role in speakers for message in read_messages(row, column, where, role)]
    if not any(message["content"].strip() for message in messages):
        return dict(left_out="empty")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    return dict(messages=messages) if answers and all(answers) else dict(left_out="without an answer")


def read_preference(row: dict, columns: list[str], where: str) -> dict:
    """Two answers to one prompt. Each is a text, or messages: the answer alone, or the conversation that it ends."""
    question, prompts, answers = read_messages(row, columns[0], where), [], []
    for column in columns[1:]:
        messages = read_messages(row, column, where, "assistant")
        if not messages or messages[-1]["role"] != "assistant":
            return dict(left_out="without an answer")
        answers.append(messages.pop()["content"].strip())
        prompts.append(messages or question)
    if prompts[0] != prompts[1]:
        raise ValueError(f"{where}: chosen and rejected do not answer the same: their earlier messages differ")
    if not all(answers) or not prompts[0]:
        return dict(left_out="without an answer")
    if answers[0] == answers[1]:
        return dict(left_out="with two equal answers")
    return dict(messages=prompts[0], chosen=answers[0], rejected=answers[1])


def read_problem(row: dict, columns: list[str], where: str) -> dict:
    """A conversation without the answer at its end, and what the answer comes to."""
    messages, answer = read_messages(row, columns[0], where), final_answer(cell(row, columns[1], where))
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not answer or not messages or not messages[-1]["content"].strip():
        return dict(left_out="without an answer")
    return dict(messages=messages, answer=answer)


def read_label(row: dict, columns: list[str], where: str) -> dict:
    text = cell(row, columns[0], where)
    return (
        dict(messages=[dict(role="user", content=text)], label=str(row[columns[1]])) if text else dict(left_out="empty")
    )


READERS = dict(chat=read_chat, preferences=read_preference, problems=read_problem, labels=read_label)


def final_answer(text: str) -> str:
    """What an answer comes to: the text between the solution tags, else after the last ####, else all of it. "" for a
    solution that does not end."""
    if "<|begin_of_solution|>" in text:
        found = re.search(r".*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>", text, re.DOTALL)
        text = found[1] if found else ""
    return text.rpartition("####")[2].strip()


# ---------------------------------------------------------------------------------------------------------------------
# From one form to ids


def encode(tokenizer: Tokenizer, row: dict, dtype: np.dtype) -> tuple[list[tuple[np.ndarray, np.ndarray]], bytes]:
    """What `document` made -> [(ids, mask)], two for a preference and one for the others; the line of answers.jsonl."""
    messages, line = row["messages"], b""
    if "label" in row:
        ids = [tokenizer.bos_id, *tokenizer.encode(messages[0]["content"]), row["label"]]
        pairs = [(ids, [0] * (len(ids) - 1) + [1])]
    elif "answer" in row:
        ids, mask = tokenizer.render(messages, add_generation_prompt=True)
        pairs, line = [(ids, [0] * len(mask))], (json.dumps({"answer": row["answer"]}) + "\n").encode()
    else:
        ends = [[dict(role="assistant", content=row[key])] for key in ("chosen", "rejected") if key in row] or [[]]
        pairs = [tokenizer.render([*messages, *end]) for end in ends]
    # A first token is never a target: no position comes before it.
    arrays = [(np.array(ids, dtype), np.array([0, *mask[1:]], np.uint8)) for ids, mask in pairs]
    for _, mask in arrays if "chosen" in row else ():  # of several answers only the last is compared
        mask[: np.flatnonzero(np.diff(mask, prepend=0) == 1)[-1]] = 0
    return arrays, line


def key_of(row: dict) -> bytes:
    """The user's first message. Its hash decides between training and validation, so two answers to one question, or
    a preference and its twin, are always on the same side."""
    first = next((m["content"] for m in row["messages"] if m["role"] == "user"), row["messages"][0]["content"])
    return first.strip().encode()


# ---------------------------------------------------------------------------------------------------------------------
# Sets


class TokenSet:
    """One split of a data folder, mapped into memory. len() counts conversations: a preference counts two.

    ids, mask, offsets: the whole files. answers: the texts of problems. Raises ValueError for a folder of another kind
    ("chat", "preferences", "problems" or "labels") and for files that were changed.
    """

    def __init__(self, folder: str | Path, split: str, kind: str) -> None:
        self.folder, self.split, self.meta, self.answers = Path(folder), split, read_meta(folder, kind), []
        for name, dtype in dict(ids=self.meta["dtype"], mask="uint8", offsets="int64").items():
            path, size = self.folder / f"{split}.{name}.bin", self.meta["sizes"].get(f"{split}.{name}.bin")
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{path} has not the {size} bytes of meta.json: it is cut off; prepare the data again")
            dtype = np.dtype(dtype).newbyteorder("<")
            setattr(self, name, np.memmap(path, dtype, "r") if size else np.zeros(0, dtype))
        if wrong := self.contradiction(kind):
            raise ValueError(f"{self.folder}/{split}.{wrong}; prepare the data again")
        if kind == "problems":
            path = self.folder / f"{split}.answers.jsonl"
            lines = path.read_bytes().splitlines() if path.is_file() else ()
            answers = [read_object(line, f"{path}:{i}").get("answer") for i, line in enumerate(lines, 1)]
            self.answers = [answer for answer in answers if type(answer) is str]
            if len(self.answers) != len(self):
                count = f"{len(self.answers)} answers to {len(self)} problems"
                raise ValueError(f"{path} has {count}; prepare the data again")

    def contradiction(self, kind: str) -> str:
        """What is wrong with files that do not fit each other, or that no model could read; else ""."""
        ids, mask, offsets, size = self.ids, self.mask, self.offsets, self.meta["vocab_size"]
        fits = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(ids) == len(mask) and len(ids) > 0
        if not fits or (np.diff(offsets) < 1).any() or (kind == "preferences" and len(self) % 2):
            return f"offsets.bin does not fit {self.split}.ids.bin"
        if mask.max() > 1 or mask[offsets[:-1]].any():
            return "mask.bin marks what cannot be learned"
        if kind == "labels" and (mask.sum() != len(self) or not mask[offsets[1:] - 1].all()):
            return "mask.bin does not mark the labels"
        if ids.max() >= size:
            return f"ids.bin has the id {ids.max()}, and meta.json says vocab_size {size}"
        if kind == "labels" and ids[offsets[1:] - 1].max() >= len(self.meta["labels"]):
            return f"ids.bin has another label than the {len(self.meta['labels'])} of meta.json"
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

    def batch(self, which: Sequence[int], pad_id: int) -> tuple[Tensor, Tensor]:
        """tokens and targets (k n, T) of the n examples `which` (see pad): all first rows, then all second ones."""
        return pad([row for rows in zip(*map(self.rows, which), strict=True) for row in rows], pad_id)

    def describe(self, val: "Examples", groups: list[np.ndarray], options: Any) -> dict[str, str]:
        """Lines for stage.announce. val: the validation examples; groups: the micro-batches of the first step."""
        left_out = [
            f"{count:,} {split} {self.noun} {reason}"
            for split, examples in (("training", self), ("validation", val))
            for reason, count in examples.left_out.items()
            if count
        ]
        padding = 1 - self.sizes[np.concatenate(groups)].sum() / sum(len(g) * self.lengths[g].max() for g in groups)
        epochs = options.max_steps * options.batch_size / self.count
        targets = f", {self.targets.sum():,} of them targets" if self.targets.any() else ""
        sizes = f"{self.count:,} {self.noun}, {self.sizes.sum():,} tokens{targets}; {epochs:.2f} epochs"
        step = f"{options.batch_size} {self.noun} in about {len(groups)} micro-batches, {padding:.0%} of them padding"
        lines = dict(data=f"{options.data}: {sizes}", step=step)
        return lines | ({"left out": "; ".join(left_out)} if left_out else {})

    def show(self, i: int, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> str:
        """Example i as text, its targets between {+ and +}. Of a second row only the targets, between {- and -}."""
        texts = []
        for (ids, mask), sign in zip(self.rows(i), "+-", strict=False):
            parts = np.split(ids, np.flatnonzero(np.diff(mask, prepend=False, append=False)))
            words = [labels[part[0]] if labels and n % 2 else tokenizer.decode(part) for n, part in enumerate(parts)]
            marked = ["{" + sign + text + sign + "}" if n % 2 else text for n, text in enumerate(words)]
            texts.append("".join(marked[1::2] if texts else marked))
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


def answer_spans(mask: np.ndarray, piece: int = 1 << 26) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last position of every run of 1 in a mask (n,). The mask is read in pieces, because it may be
    larger than memory. A conversation begins with a 0, so no run crosses from one to the next."""
    begins, ends, before = [], [], np.int8(0)
    for start in range(0, len(mask), piece):
        part = mask[start : start + piece].astype(np.int8)
        edges = np.diff(part, prepend=before)
        begins.append(start + np.flatnonzero(edges == 1))
        ends.append(start + np.flatnonzero(edges == -1) - 1)
        before = part[-1]
    return np.concatenate(begins), np.concatenate(ends + [np.full(int(before), len(mask) - 1)])


def open_sets(folder: str, kind: str) -> tuple[TokenSet, TokenSet, Tokenizer]:
    """The training and the validation set of a data folder, and its tokenizer."""
    train, val = (TokenSet(folder, split, kind) for split in ("train", "val"))
    return train, val, load_tokenizer(folder)


def check_not_empty(train: Examples, val: Examples, options: Any) -> None:
    """Raises ValueError, with the reasons, if no example was selected for training or for validation."""
    for split, examples in (("training", train), ("validation", val)):
        if not examples.count:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in examples.left_out.items() if count)
            raise ValueError(
                f"--sequence_length={options.sequence_length}: no {split} {examples.noun} left ({reasons})"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def bucket_by_length(lengths: Sequence[int], limit: int, parts: int = 1) -> list[list[int]]:
    """The numbers 0 .. n - 1 in micro-batches: neighbours in length together, so that there is little padding, and at
    most `limit` tokens, padding included (a row longer than that is alone). There is a multiple of `parts` of them:
    rank r takes groups[r::parts], and all ranks have equally many. n must be at least `parts`."""
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
    """[(ids (n,), mask (n,)), ...] -> tokens and targets (B, T) int64: what the model reads, and for every position the
    token that it is to predict there, -100 where that is not marked.

    Rows are filled up on the right. No position attends to a later one, so the padding changes nothing: no attention
    mask is needed, and no conversation sees another.
    """
    T = max(len(ids) for ids, _ in rows) - 1
    tokens, targets = np.full((len(rows), T), pad_id), np.full((len(rows), T), -100)
    for b, (ids, mask) in enumerate(rows):
        tokens[b, : len(ids) - 1] = ids[:-1]
        targets[b, : len(ids) - 1] = np.where(mask[1:], ids[1:], -100)
    return torch.from_numpy(tokens), torch.from_numpy(targets)
