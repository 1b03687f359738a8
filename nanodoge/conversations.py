"""From a row of a data set to a conversation, and from that to token ids with a mask.

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
from collections.abc import Sequence
from functools import partial

import numpy as np

from nanodoge.answers import final_answer
from nanodoge.tokenizer import Tokenizer

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


# ---- From rows to one form


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
    readers = dict(
        chat=read_chat, preferences=read_preference, problems=read_problem, labels=partial(read_label, labels)
    )
    made = readers[kind](row, schema.split(", "), where)
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


def read_label(labels: Sequence[str], row: dict, columns: list[str], where: str) -> dict:
    """A text and the number of its label."""
    text, label = cell(row, columns[0], where), str(row[columns[1]])
    if label not in labels:
        raise ValueError(f"{where}: label {label!r} is not one of --labels={','.join(labels)}")
    made = dict(messages=[dict(role="user", content=text)], label=labels.index(label))
    return made if text else dict(left_out="empty")


# ---- From one form to ids


def encode(tokenizer: Tokenizer, row: dict, dtype: np.dtype) -> tuple[list[tuple[np.ndarray, np.ndarray]], bytes]:
    """What `document` made -> [(ids, mask)], two for a preference and one for the others; the line of answers.jsonl."""
    messages, line = row["messages"], b""
    if "label" in row:
        ids = [tokenizer.bos_id, *tokenizer.encode(messages[-1]["content"]), row["label"]]
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
