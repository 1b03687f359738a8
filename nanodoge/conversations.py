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
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanodoge.answers import final_answer
from nanodoge.options import one_line
from nanodoge.template import with_thought
from nanodoge.tokenizer import Tokenizer

# The columns of a row: the first schema that fits is used. Its first column is the question, the others are answers to
# it; a schema of one column is a whole conversation, and `chosen, rejected` are two of them that begin alike.
SCHEMAS = {
    "chat": [
        *("messages", "conversations", "instruction, output", "question, answer", "problem, solution"),
        *("prompt, completion", "prompt, response", "instruction, response", "question, response", "input, output"),
    ],
    "preferences": [
        *("prompt, chosen, rejected", "question, chosen, rejected", "instruction, chosen, rejected"),
        *("conversations, chosen, rejected", "messages, chosen, rejected", "chosen, rejected"),
    ],
    "problems": ["question, answer", "problem, answer", "messages, answer", "prompt, answer", "problem, solution"],
    "labels": ["text, label"],
}
SCHEMAS_HELP = """
Columns of rows, by --kind; the first that fit are used. A cell is a text, a message, a list of messages, their JSON, or
"Human: ... Assistant: ...". Used with them: system or system_prompt, an instruction's input or context and its history,
a message's reasoning_content, and tools and tool_calls, if the chat template writes them.

""" + "\n".join(f"    {kind:<12} {schema}" for kind, schemas in SCHEMAS.items() for schema in schemas)
# What data sets call the speakers, in lower case -> the template's roles.
ROLES = dict(system="system", developer="system", user="user", human="user", assistant="assistant", gpt="assistant")
ROLES |= dict(model="assistant", tool="tool", function="tool", observation="tool")


@dataclass(eq=False)
class RowError(Exception):
    """Why a row cannot be used: it is counted and left out, and the run goes on."""

    reason: str  # under which it is counted
    detail: str = ""  # what is wrong with this row
    is_schema: bool = False  # it lacks the columns; if the first row of a file does, the run ends


# ---- From rows to one form


def document(row: Any, options: Any) -> str:
    """A row as a document: for --kind=text its --text_column, else JSON: {"messages": [{"role", "content"}, ...]}, and
    as the row has them tools, chosen and rejected, answer, label (its number), held_out. options: PrepareOptions.
    Raises RowError."""
    if not isinstance(row, dict):
        raise RowError("not a row of columns", f"it is {type(row).__name__}", is_schema=True)
    if options.kind == "text":
        if options.text_column not in row:
            advice = f"set --text_column to one of: {', '.join(map(str, row))}"
            raise RowError(f"no column {options.text_column!r}", advice, is_schema=True)
        return text_of(row[options.text_column])
    schema = next((schema for schema in SCHEMAS[options.kind] if row.keys() >= set(schema.split(", "))), None)
    if schema is None:
        known = f"{', '.join(map(str, row))}; needed is one of {' | '.join(SCHEMAS[options.kind])}"
        raise RowError(f"no --kind={options.kind} in the columns", known, is_schema=True)
    made = READERS[options.kind](row, schema.split(", "), options)
    system = text_of(row.get("system") or row.get("system_prompt")) or options.system
    if system and made["messages"][0]["role"] != "system":
        made["messages"].insert(0, dict(role="system", content=system))
    if tools := row.get("tools"):
        made["tools"] = parse_json(tools) if isinstance(tools, str) else tools
    if "held_out" in row:
        made["held_out"] = bool(row["held_out"])
    return json.dumps(made, ensure_ascii=False, default=str)


def text_of(value: Any) -> str:
    """The text in a cell: "" for null and NaN, a table's null; numbers as JSON spells them; text parts joined."""
    if isinstance(value, str):
        return value.removeprefix("\ufeff")
    if value is None or value != value:
        return ""
    if isinstance(value, int | float):
        return json.dumps(value)
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise RowError(f"with {type(value).__name__} in place of a text")


def parse_json(text: str) -> Any:
    """The value that `text` spells. Raises RowError if there is none."""
    if not text.strip():
        raise RowError("empty")
    try:
        return json.loads(text)
    except RecursionError:
        raise RowError("not JSON", "nested too deeply") from None
    except ValueError as error:  # also of a number with thousands of digits
        raise RowError("not JSON", str(error)) from None


def read_messages(value: Any, role: str = "user") -> list[dict]:
    """A cell -> messages with the template's roles. A text is one message, of this role, unless it spells several: as
    JSON, or as "Human: ... Assistant: ..."."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and not {"role", "from"} & value[0].keys():
        value = text_of(value)  # the parts of one message
    if not isinstance(value, list | dict):
        text = text_of(value).strip()
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text) if text.startswith("Human:") else ()
        if len(parts) > 3:
            value = [{"role": who, "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
        elif text.startswith("[") and re.match(r'\[\s*\{\s*"(role|content|from|value)"', text):
            value = parse_json(text)
        else:
            value = dict(role=role, content=text)
    return [read_message(message) for message in ([value] if isinstance(value, dict) else value)]


def read_message(message: Any) -> dict:
    """A message -> role, content, and tool_calls if it has any. What the assistant thought goes before its answer."""
    if not isinstance(message, dict):
        raise RowError("with a message that is none", f"it is {type(message).__name__}")
    who, said = ("from", "value") if "from" in message else ("role", "content")
    role = ROLES.get(str(message.get(who)).lower())
    if role is None:
        raise RowError("with an unknown speaker", f"{message.get(who)!r:.50} is not one of {' '.join(ROLES)}")
    made = dict(role=role, content=text_of(message.get(said)))
    thought = message.get("reasoning_content") or message.get("thinking")
    if thought and role == "assistant":
        made["content"] = with_thought(text_of(thought), made["content"])
    if calls := message.get("tool_calls") or message.get("function_call"):
        made["tool_calls"] = calls if isinstance(calls, list) else [dict(type="function", function=calls)]
    return made


def read_question(row: dict, column: str) -> list[dict]:
    """The messages that an answer follows. An instruction may follow Alpaca's history, [[question, answer], ...]."""
    if column != "instruction":
        return read_messages(row[column])
    history = row.get("history") or []
    history = parse_json(history) if isinstance(history, str) else history
    if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise RowError("with a history that is not pairs of a question and an answer")
    turns = [read_messages(question) + read_messages(answer, "assistant") for question, answer in history]
    parts = [text_of(row.get(name)).strip() for name in ("instruction", "input", "context")]
    return sum(turns, []) + read_messages("\n\n".join(filter(None, parts)))


def read_chat(row: dict, columns: list[str], options: Any) -> dict:
    """A conversation up to its last answer: after it there is nothing to learn."""
    messages = read_question(row, columns[0])
    messages += read_messages(row[columns[1]], "assistant") if len(columns) > 1 else []
    if not any(message["content"].strip() for message in messages):
        raise RowError("empty")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers or not all(answer["content"].strip() or "tool_calls" in answer for answer in answers):
        raise RowError("without an answer")
    return dict(messages=messages)


def read_preference(row: dict, columns: list[str], options: Any) -> dict:
    """Two answers to one prompt. Each is a text, or messages: the answer, or the conversation that it ends."""
    question, prompts, answers = read_question(row, columns[0]) if len(columns) > 2 else [], [], []
    for column in columns[-2:]:
        messages = read_messages(row[column], "assistant")
        if not messages or messages[-1]["role"] != "assistant":
            raise RowError("without an answer")
        if "tool_calls" in messages[-1]:
            raise RowError("with tool calls as answers")
        answers.append(messages.pop()["content"].strip())
        prompts.append(messages or question)
    if prompts[0] != prompts[1]:
        raise RowError("with two answers that do not answer the same: their earlier messages differ")
    if not all(answers) or not prompts[0]:
        raise RowError("without an answer")
    if answers[0] == answers[1]:
        raise RowError("with two equal answers")
    return dict(messages=prompts[0], chosen=answers[0], rejected=answers[1])


def read_problem(row: dict, columns: list[str], options: Any) -> dict:
    """A conversation without the answer at its end, and what the answer comes to."""
    messages, answer = read_question(row, columns[0]), final_answer(text_of(row[columns[1]]))
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not answer or not messages or not messages[-1]["content"].strip():
        raise RowError("without an answer")
    return dict(messages=messages, answer=answer)


def read_label(row: dict, columns: list[str], options: Any) -> dict:
    """A text and the number of its label."""
    text, label = text_of(row[columns[0]]).strip(), str(row[columns[1]])
    if not text:
        raise RowError("empty")
    if label not in options.labels:
        raise RowError("with another label", f"{label!r:.50} is not one of --labels={','.join(options.labels)}")
    return dict(messages=[dict(role="user", content=text)], label=options.labels.index(label))


READERS = dict(chat=read_chat, preferences=read_preference, problems=read_problem, labels=read_label)


# ---- From one form to ids


def encode(tokenizer: Tokenizer, row: dict, dtype: np.dtype) -> tuple[list[tuple[np.ndarray, np.ndarray]], bytes]:
    """What `document` made -> [(ids, mask)], two for a preference and one for the others; the line of answers.jsonl.
    Raises RowError for what the chat template does not write."""
    messages, line, tools = row["messages"], b"", row.get("tools")
    has_tools = tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
    if has_tools and "tool" not in tokenizer.chat_template:
        raise RowError("with tools, which the chat template does not write")

    def render(messages: list[dict], **options: Any) -> tuple[list[int], list[int]]:
        try:
            return tokenizer.render(messages, **options, **(dict(tools=tools) if tools else {}))
        except ValueError as error:  # a template is a program, and may refuse a row: two turns of one speaker
            raise RowError("that the chat template does not write", one_line(error)) from None

    if "label" in row:
        ids = [tokenizer.bos_id, *tokenizer.encode(messages[-1]["content"]), row["label"]]
        pairs = [(ids, [0] * (len(ids) - 1) + [1])]
    elif "answer" in row:
        ids, mask = render(messages, add_generation_prompt=True)
        pairs, line = [(ids, [0] * len(mask))], (json.dumps({"answer": row["answer"]}) + "\n").encode()
    else:
        ends = [[dict(role="assistant", content=row[key])] for key in ("chosen", "rejected") if key in row] or [[]]
        pairs = [render([*messages, *end]) for end in ends]
    # A first token is never a target: no position comes before it.
    arrays = [(np.array(ids, dtype), np.array([0, *mask[1:]], np.uint8)) for ids, mask in pairs]
    for _, mask in arrays if "chosen" in row else ():  # of several answers only the last is compared
        mask[: np.flatnonzero(np.diff(mask, prepend=0) == 1)[-1]] = 0
    return arrays, line


def key_of(row: dict) -> bytes:
    """The user's first message. Its hash decides between training and validation, so two answers to one question are
    always on the same side."""
    first = next((m["content"] for m in row["messages"] if m["role"] == "user"), row["messages"][0]["content"])
    return first.strip().encode()
