"""From conversations to tokens with a mark: the data that sft.py, dpo.py and grpo.py read.

A chat model is a language model that has read conversations. Written out by the chat template, one looks like this:

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>
    Where does Anna live?<|end_of_text|>

    <|start_header_id|>assistant<|end_header_id|>
    Larkhill<|end_of_text|>

It is to learn to write what the assistant says, and the token that ends it, and nothing else: not the user's part,
which it will be given, and not the header, which is there before it begins. So beside the ids stands a mask, 1 at
`Larkhill` and at the <|end_of_text|> behind it. tokenizer.render makes both. This file does the rest:

Rows.    Data sets spell conversations in a handful of ways. `document` brings a row into one form, whatever its
         columns are called, and says what is wrong with one that it cannot read.
Tokens.  `encode` turns that form into ids and masks, for prepare_data.py to write.
Sets.    `TokenSet` maps what was written into memory; `pad` makes batches of it.

What a folder holds, a `train` and a `val` file of each:

    ids.bin, mask.bin    all conversations one after the other; uint16 or uint32, and uint8
    offsets.bin          int64: conversation i is ids[offsets[i] : offsets[i + 1]], the last offset is the length
    answers.jsonl        problems only: {"answer": ...}, a line a problem, whose prompt is the conversation

A preference is two conversations in a row, 2i the chosen and 2i + 1 the rejected. Their prompt is the same, and the
mask marks the last answer alone. The prompt of a problem ends with the assistant's header; it has no mask. A text with
a label is no conversation: it is BOS, the text, and, where the next token would be, the number of its label, which
alone is marked.
"""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanodoge.checkpoint import checkpoint_file, load_config, locate
from nanodoge.data import read_meta
from nanodoge.tokenizer import Tokenizer, read_object

# Made on the spot when they are not there: no network is needed.
BUILT_IN = {"data/stories-chat": ["stories"], "data/stories-preferences": ["stories"], "data/sums-chat": ["sums"],
            "data/sums-problems": ["sums"]}  # fmt: skip
# How data sets call the speakers: the roles of the template, and ShareGPT's and OpenThoughts' names for them.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
SCHEMAS = {
    "chat": "messages | conversations | instruction, output | question, answer | problem, solution",
    "preferences": "prompt, chosen, rejected (texts or lists of messages)",
    "problems": "question, answer | problem, answer | messages, answer",
    "labels": "text, label",
}


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def rows(kind, system="", labels=()):
    """How prepare_data.py reads the rows of this kind: `document` for each, all columns. (kind, columns, function)"""
    return kind, None, lambda row, where: document(row, kind, system, where, labels)


def document(row, kind, system, where, labels=()):
    """A row -> one line of JSON: {"messages": [{"role", "content"}, ...]} and, by kind, nothing more (chat),
    "chosen" and "rejected" texts (preferences), "answer" (problems), or "label", its number among `labels`. A row that
    cannot be used is {"left_out": reason}. A row may say that it is "held_out". `system` is put before conversations
    that have none.

    Raises ValueError, naming `where`, for a row of no known schema.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a row of columns but {type(row).__name__}")
    makers = dict(chat=chat_of, preferences=preference_of, problems=problem_of, labels=partial(labelled, labels))
    made = makers[kind](row, where)
    if made is None:
        raise ValueError(f"{where}: no --kind={kind} in the columns {', '.join(map(str, row))}; needed is one of "
                         f"{SCHEMAS[kind]}")  # fmt: skip
    if "left_out" not in made:
        system = row.get("system") or system
        if system and isinstance(system, str) and made["messages"][0]["role"] != "system":
            made["messages"].insert(0, dict(role="system", content=system))
        if "held_out" in row:
            made["held_out"] = bool(row["held_out"])
    return json.dumps(made, ensure_ascii=False)


def messages_of(value, where):
    """A list of messages, by role and content or by from and value -> the same by role and content. A text is one
    message of the user's."""
    if isinstance(value, str):
        return [dict(role="user", content=value)]
    if not isinstance(value, list):
        raise ValueError(f"{where}: a conversation must be a list of messages, not {type(value).__name__}")
    messages = []
    for message in value:
        role, content = "role", "content"
        if isinstance(message, dict) and "from" in message:
            role, content = "from", "value"
        if not isinstance(message, dict) or not isinstance(message.get(content), str):
            raise ValueError(f"{where}: message {len(messages)} has no text as its {content!r}")
        if message.get(role) not in [*ROLES]:  # a list, for it may be nothing that a dict can be asked for
            raise ValueError(f"{where}: message {len(messages)} is from {message.get(role)!r}, not one of "
                             f"{' '.join(ROLES)}")  # fmt: skip
        messages.append(dict(role=ROLES[message[role]], content=message[content]))
    return messages


def texts_of(row, where, *columns):
    """The texts of these columns, stripped; a missing value is ""."""
    for column in columns:
        if not isinstance(row[column], str | None):
            raise ValueError(f"{where}: column {column!r} holds {type(row[column]).__name__}, not text")
    return [(row[column] or "").strip() for column in columns]


def exchange(question, answer):
    return [dict(role="user", content=question), dict(role="assistant", content=answer)]


def chat_of(row, where):
    """What follows the last answer is cut off: there is nothing in it to learn."""
    if "messages" in row or "conversations" in row:
        messages = messages_of(row["messages"] if "messages" in row else row["conversations"], where)
    elif {"instruction", "output"} <= row.keys():  # Alpaca; "input" is what the instruction is about
        instruction, answer = texts_of(row, where, "instruction", "output")
        more = texts_of(row, where, "input")[0] if "input" in row else ""
        messages = exchange(f"{instruction}\n\n{more}".strip(), answer)
    elif {"question", "answer"} <= row.keys():  # GSM8K
        messages = exchange(*texts_of(row, where, "question", "answer"))
    elif {"problem", "solution"} <= row.keys():
        messages = exchange(*texts_of(row, where, "problem", "solution"))
    else:
        return None
    if not any(message["content"].strip() for message in messages):
        return dict(left_out="empty")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        return dict(left_out="without an answer")
    return dict(messages=messages)


def preference_of(row, where):
    """`chosen` and `rejected` are the answers, or the whole conversations up to them, or what follows the prompt."""
    if not {"prompt", "chosen", "rejected"} <= row.keys():
        return None
    if not isinstance(row["prompt"], str | list):
        raise ValueError(f"{where}: column 'prompt' holds {type(row['prompt']).__name__}, not text or messages")
    prompts, answers = [], []
    for column in ("chosen", "rejected"):
        messages = row[column]
        if not isinstance(messages, str | list):
            raise ValueError(f"{where}: column {column!r} holds {type(messages).__name__}, not text or messages")
        if isinstance(messages, str):
            messages = [dict(role="assistant", content=messages)]
        messages = messages_of(messages, where)
        if not messages or messages[-1]["role"] != "assistant":
            return dict(left_out="without an answer")
        answers.append(messages.pop()["content"].strip())
        prompts.append(messages or messages_of(row["prompt"], where))
    if prompts[0] != prompts[1]:
        raise ValueError(f"{where}: chosen and rejected do not answer the same: their earlier messages differ")
    if not all(answers) or not prompts[0]:
        return dict(left_out="without an answer")
    if answers[0] == answers[1]:
        return dict(left_out="with two equal answers")
    return dict(messages=prompts[0], chosen=answers[0], rejected=answers[1])


def problem_of(row, where):
    """The answer is the whole column, or what final_answer finds in a solution."""
    if "answer" not in row or not {"question", "problem", "messages"} & row.keys():
        return None
    answer = final_answer(texts_of(row, where, "answer")[0])
    if "question" in row or "problem" in row:
        messages = messages_of(texts_of(row, where, "question" if "question" in row else "problem")[0], where)
    else:
        messages = messages_of(row["messages"], where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not answer or not messages or not messages[-1]["content"].strip():
        return dict(left_out="without an answer")
    return dict(messages=messages, answer=answer)


def labelled(labels, row, where):
    if not {"text", "label"} <= row.keys():
        return None
    text, label = texts_of(row, where, "text")[0], str(row["label"])
    if label not in labels:
        raise ValueError(f"{where}: label {label!r} is not one of --labels={','.join(labels)}")
    return dict(messages=messages_of(text, where), label=labels.index(label)) if text else dict(left_out="empty")


def final_answer(text):
    """What an answer comes to: the words between the solution tags, else behind the last ####, else all of it. A
    solution that was begun and not ended has come to nothing: ""."""
    if "<|begin_of_solution|>" in text:
        found = re.search(r".*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>", text, re.DOTALL)
        text = found[1] if found else ""
    return text.rpartition("####")[2].strip()


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def encode(tokenizer, row, dtype):
    """What `document` made, read back -> ([(ids, mask)]: one, or a preference's two; a line for answers.jsonl)."""
    messages = row["messages"]
    if "label" in row:
        ids = [tokenizer.bos_id, *tokenizer.encode(messages[0]["content"]), row["label"]]
        return [arrays(ids, [0] * (len(ids) - 1) + [1], dtype)], b""
    if "chosen" in row:
        answers = [dict(role="assistant", content=row[which]) for which in ("chosen", "rejected")]
        pairs = [arrays(*tokenizer.render([*messages, answer]), dtype) for answer in answers]
        for _, mask in pairs:
            first = np.flatnonzero(np.diff(mask, prepend=0) == 1)[-1]  # where the last answer begins
            mask[:first] = 0
        return pairs, b""
    if "answer" in row:
        ids, mask = tokenizer.render(messages, add_generation_prompt=True)
        return [arrays(ids, [0] * len(mask), dtype)], (json.dumps({"answer": row["answer"]}) + "\n").encode()
    return [arrays(*tokenizer.render(messages), dtype)], b""


def arrays(ids, mask, dtype):
    """A first token is nobody's target: there is nothing before it to predict it from."""
    return np.array(ids, dtype), np.array([0, *mask[1:]], np.uint8)


def key_of(row):
    """What decides, by its hash, on which side a row is: the first words of the user. So two answers to one question,
    or a preference and its twin, are never on both sides."""
    first = next((m["content"] for m in row["messages"] if m["role"] == "user"), row["messages"][0]["content"])
    return first.strip().encode()


# ---------------------------------------------------------------------------------------------------------------------
# Sets


class TokenSet:
    """One split of a folder, mapped into memory. len() counts conversations: a preference counts two.

    kind "chat", "preferences", "problems" or "labels". answers: list of texts, for problems. ids, mask and offsets are
    the whole files. Raises ValueError for a folder of another kind and for files that are not as they were written.
    """

    def __init__(self, folder, split, kind):
        self.folder, self.split = Path(folder), split
        self.meta = meta = read_meta(folder, kind)
        names = {"ids": meta["dtype"], "mask": "uint8", "offsets": "int64"}
        for name, dtype in names.items():
            path, size = self.folder / f"{split}.{name}.bin", meta["sizes"].get(f"{split}.{name}.bin")
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{path} has not the {size} bytes that meta.json says: it was not written to its end, "
                                 "or changed; prepare the data again")  # fmt: skip
            dtype = np.dtype(dtype).newbyteorder("<")
            setattr(self, name, np.memmap(path, dtype, "r") if size else np.zeros(0, dtype))
        self.check(kind)
        self.answers = []
        if kind == "problems":
            path = self.folder / f"{split}.answers.jsonl"
            lines = path.read_bytes().splitlines() if path.is_file() else ()
            answers = [read_object(line, f"{path}:{i}").get("answer") for i, line in enumerate(lines, 1)]
            self.answers = [answer for answer in answers if type(answer) is str]
            if len(self.answers) != len(self):
                raise ValueError(f"{path} has {len(self.answers)} answers to {len(self)} problems; prepare the data "
                                 "again")  # fmt: skip

    def check(self, kind):
        """Raises ValueError for files that contradict each other, or that a model could not be fed."""
        ids, mask, offsets, begins = self.ids, self.mask, self.offsets, self.offsets[:-1]
        fits = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(ids) == len(mask) and len(ids) > 0
        if not fits or (np.diff(offsets) < 1).any() or (kind == "preferences" and len(self) % 2):
            what = f"offsets.bin does not fit {self.split}.ids.bin"
        elif mask.max() > 1 or mask[begins].any():
            what = "mask.bin marks what cannot be learned"
        elif kind == "labels" and (mask.sum() != len(self) or not mask[offsets[1:] - 1].all()):
            what = "mask.bin does not mark the labels"
        elif ids.max() >= self.meta["vocab_size"]:
            what = f"ids.bin has the id {ids.max()}, and meta.json says vocab_size {self.meta['vocab_size']}"
        elif kind == "labels" and ids[offsets[1:] - 1].max() >= len(self.meta["labels"]):
            what = f"ids.bin has another label than the {len(self.meta['labels'])} of meta.json"
        else:
            return
        raise ValueError(f"{self.folder}/{self.split}.{what}; prepare the data again")

    def __len__(self):
        return len(self.offsets) - 1

    def conversation(self, i):
        """ids int64 (n,) and mask bool (n,) of conversation i."""
        start, end = self.offsets[i], self.offsets[i + 1]
        return self.ids[start:end].astype(np.int64), self.mask[start:end].astype(bool)


def open_sets(options, kind, machine):
    """-> training TokenSet, validation TokenSet, tokenizer of options.data. Built-in data is prepared if it is not
    there, with the tokenizer of the model to be tuned."""
    if options.data in BUILT_IN and not Path(options.data, "meta.json").is_file():
        folder = options.out_dir if options.resume else options.init_from
        load_config(folder)  # whose first complaint is of a checkpoint that is not there
        if machine.is_main:
            import prepare_data

            machine.print(f"preparing the built-in {options.data}")
            tokenizer = str(checkpoint_file(locate(folder), "tokenizer.json"))
            names = BUILT_IN[options.data]
            prepare_data.prepare(prepare_data.PrepareOptions(names, options.data, tokenizer, kind=kind))
    machine.barrier()
    train, val = (TokenSet(options.data, split, kind) for split in ("train", "val"))
    tokenizer = Tokenizer.load(options.data)
    if (tokenizer.digest, tokenizer.vocab_size) != (train.meta["tokenizer_sha256"], train.meta["vocab_size"]):
        raise ValueError(f"{options.data}/tokenizer.json is not the one its tokens were made with (sha256 or "
                         "vocab_size differs)")  # fmt: skip
    if tokenizer.chat_template != train.meta.get("chat_template"):
        raise ValueError(f"{options.data}: its chat template is not the one of its tokens; prepare the data again")
    return train, val, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def divide(lengths, limit, parts=1):
    """Places 0 .. n - 1, grouped into micro-batches: rows of like length together, so that there is little to fill up,
    and at most `limit` tokens with the padding (a row longer than that is alone). Their number is a multiple of
    `parts`: process r takes groups[r::parts], and all have as many. n must be at least `parts`."""
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


def pad(rows, pad_id):
    """[(ids (n,), mask (n,)), ...] -> tokens, targets (B, T) int64 and lengths (B,): what goes into the model, for
    every place the token it is to predict there (-100 where that is not the assistant's), and each row's own length.

    Rows are filled up on the right. A token never sees what comes after it, so what stands there changes nothing: no
    mask is needed, and no conversation can see another.
    """
    lengths = [len(ids) - 1 for ids, _ in rows]
    tokens, targets = np.full((len(rows), max(lengths)), pad_id), np.full((len(rows), max(lengths)), -100)
    for i, (ids, mask) in enumerate(rows):
        tokens[i, : lengths[i]] = ids[:-1]
        targets[i, : lengths[i]] = np.where(mask[1:], ids[1:], -100)
    return torch.from_numpy(tokens), torch.from_numpy(targets), torch.tensor(lengths)


def generate(model, tokenizer, prompts, max_new_tokens, rows=64, **sampling):
    """Continues lists of ids, `rows` of them at a time, of like length -> a list of ids each, with the EOS that ends it
    if it came in time. sampling: as for model.generate; temperature 0 takes the likeliest token."""
    device, answers = model.embed_tokens.weight.device, [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        lengths = torch.tensor([len(prompts[i]) for i in some])
        tokens = torch.full((len(some), int(lengths.max())), tokenizer.pad_id)
        for row, i in enumerate(some):
            tokens[row, : lengths[row]] = torch.as_tensor(prompts[i])
        new = model.generate(tokens.to(device), max_new_tokens, lengths=lengths.to(device), **sampling,
                             stop_ids=[tokenizer.eos_id], vocab_size=tokenizer.vocab_size)  # fmt: skip
        for i, ids in zip(some, new.tolist(), strict=True):
            answers[i] = ids[: ids.index(tokenizer.eos_id) + 1] if tokenizer.eos_id in ids else ids
    return answers
