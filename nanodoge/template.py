"""Chat templates: a conversation as text, and who wrote which part of it.

A chat template is a jinja2 program in the tokenizer's files. It gets the messages and returns one text. Templates are
written for transformers, so they run here with the settings, filters and functions that transformers gives them.

Two things must be known about every character of the result: may it be part of a special token (only the template
writes these, not a user), and is it learned (what the assistant writes). The text does not say. So the program runs a
second time with marks around every text in the messages, which are then read and taken out again: two runs, whatever
the number of messages. What the assistant writes stands between the template's own `generation` tags, if it has them.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

from nanodoge.options import one_line
from nanodoge.tokenizer_json import refuse_if

ROLES = ("system", "user", "assistant", "tool")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # names of an assistant's thought; templates know two

# The Doge tokenizer's chat layout, without the block on today's date that it opens every chat with.
CHAT_TEMPLATE = """{{- bos_token }}
{%- if tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n' + tools | tojson + eos_token + '\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] | trim }}
            {%- for call in message['tool_calls'] %}
                {{- call['function'] | tojson }}
            {%- endfor %}
            {{- eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + eos_token }}
    {%- endif %}
    {{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n' }}
{%- endif %}
"""

# What a program from outside (a chat template, a pickle) can raise besides the errors of its own language.
PROGRAM_ERRORS = ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError


@lru_cache(maxsize=8)
def compile_template(source: str) -> Any:
    """A chat template with the settings and helpers that transformers gives it, in a sandbox without files. What stands
    between its `generation` tags, which jinja2 does not know, goes through a filter that puts a mark at both ends."""
    from jinja2 import TemplateError, pass_context  # imported where used: many texts need no template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    @pass_context
    def generation(context: Any, text: str) -> str:
        return context["generation_begin"] + text + context["generation_end"]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    tags = r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})"
    source = re.sub(tags, lambda tag: tag[1] + ("endfilter" if tag[2] else "filter generation"), source)
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    # jinja's own tojson escapes <, > and & for HTML
    jinja.filters |= dict(generation=generation, tojson=partial(json.dumps, ensure_ascii=False))
    now = datetime.datetime.now
    jinja.globals |= dict(raise_exception=raise_exception, strftime_now=lambda format: now().strftime(format))
    return jinja.from_string(source)


def fix_surrogates(text: str) -> str:
    """`text` with half characters (lone surrogates, which JSON can contain) replaced by U+FFFD, as tiktoken does."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def with_thought(thought: str, content: str) -> str:
    """What an assistant thought and said as one text: between the thought tags, then between the solution tags."""
    content = content and f"\n\n<|begin_of_solution|>\n{content.strip()}\n<|end_of_solution|>"
    return f"<|begin_of_thought|>\n{thought.strip()}\n<|end_of_thought|>{content}"


def plain_messages(messages: list[dict], template: str) -> list[dict]:
    """Messages as people send them -> as transformers gives them to this template. A list of text parts is joined. Null
    counts as missing, which content may be beside tool calls. A thought (`reasoning_content`) is left to a template
    that knows the field; for another one it goes between the thought tags. Raises ValueError for unusable messages."""
    refuse_if(not isinstance(messages, list) or not messages, 'messages must be a list like [{"role": ...}], not empty')
    knows_thoughts, plain = any(name in template for name in REASONING_FIELDS[:2]), []
    for i, given in enumerate(messages):
        message = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}
        calls = message.pop("tool_calls", [])
        thought = next((message.pop(name) for name in REASONING_FIELDS if name in message), "")
        content = message.get("content", "" if calls else None)
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        right = isinstance(content, str) and isinstance(thought, str) and message.get("role") in ROLES
        if not right or not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            valid = f'like {{"role": "user", "content": "Hi"}}, with one of the roles {", ".join(ROLES)}'
            raise ValueError(f"message {i} must be {valid}, not {given!r:.200}")
        if thought.strip() and not knows_thoughts and "<|begin_of_thought|>" not in content:
            content = with_thought(thought, content)
        message |= dict.fromkeys(REASONING_FIELDS[:2], thought) if thought and knows_thoughts else {}
        message |= {"tool_calls": list(map(plain_call, calls))} if calls else {}
        plain.append(message | {"content": content})
    return plain


def plain_call(call: dict) -> dict:
    """A tool call whose arguments are an object, as templates expect them; APIs and data sets often hold its JSON."""
    function = call.get("function", call)
    with suppress(*PROGRAM_ERRORS):
        function = function | {"arguments": dict(json.loads(function.get("arguments")))}
    return {"type": "function", **call, "function": function}


def change_texts(value: Any, change: Callable[[str], str], is_name: bool = False) -> Any:
    """`value` with every text in it changed, but for names: keys, roles and types, which templates compare."""
    if isinstance(value, dict):
        return {change_texts(k, change, True): change_texts(v, change, k in ("role", "type")) for k, v in value.items()}
    if isinstance(value, list):
        return [change_texts(part, change) for part in value]
    return change(value) if isinstance(value, str) and not (is_name and value.isidentifier()) else value


def written_parts(
    template: str, messages: list[dict], tools: list[dict] | None, split: Callable[[str], list[str]], **values: Any
) -> Iterator[tuple[str, str | None, bool]]:
    """Yields the conversation in parts: (text, role of who wrote it, None for the template, is it learned). Raises
    ValueError for messages and templates that cannot be used, and for a template that hides who wrote what. split:
    splits a text at the special tokens, [text, token, text, ...]. values: what else the template is given."""
    from jinja2 import TemplateError

    messages = plain_messages(messages, template)
    roles = [message["role"] for message in messages] + ["tool"]  # the last one wrote `tools`

    def run(change: Callable[[int, str], str], begin: str = "", end: str = "", **other: Any) -> str:
        try:
            *filled, schemas = (change_texts(x, partial(change, i)) for i, x in enumerate([*messages, tools or None]))
            given = values | dict(messages=filled, tools=schemas, documents=None) | other
            given |= dict(generation_begin=begin, generation_end=end)
            return fix_surrogates(compile_template(template).render(given))
        except (TemplateError, *PROGRAM_ERRORS) as error:
            raise ValueError(f"the chat template cannot be used: {one_line(error)}") from None

    def mark(i: int, text: str) -> str:
        """Marks around a text, inside the blanks at its ends, which many templates trim. An empty text has none (a
        template may ask whether there is one), unless it is an answer: its turn ends there."""
        said, start = text.strip(), len(text) - len(text.lstrip())
        marks = f"{text[:start]}{sign}{i}{sign}{said}{sign}{sign}{text[start + len(said) :]}"
        return marks if text or roles[i] == "assistant" and len(messages[i]) == 2 else text

    text = run(lambda i, text: text)
    used = set(text)
    sign = next(letter for letter in map(chr, range(0xF0000, 0x110000)) if letter not in used)  # of no alphabet
    literal, *rest = re.split(f"{sign}([0-9<>]*){sign}", run(mark, f"{sign}<{sign}", f"{sign}>{sign}"))
    marks, texts = ["", *rest[::2]], [literal, *rest[1::2]]
    refuse_if("".join(texts) != text, "the chat template rewrites the messages: who wrote what is lost")
    whose = [found for found in marks if found not in ("<", ">")]  # "", number, "", number, ..., ""
    refuse_if(any(bool(found) != k % 2 for k, found in enumerate(whose)), "the chat template cuts the messages in two")
    if "<" not in marks:
        prompt = ""
        if any(len(message) > 2 for message in messages):  # a call begins before its first text: {"name": "lamp", ...
            other = run(lambda i, text: text, add_generation_prompt=not values["add_generation_prompt"])
            prompt = max(text, other, key=len).removeprefix(min(text, other, key=len))
        yield from guessed_parts(marks, texts, roles, prompt, split)
        return
    role, learned = None, False
    for found, part in zip(marks, texts, strict=True):
        if found in ("<", ">"):
            learned = found == "<"
        else:
            role = roles[int(found)] if found else None
        yield part, role, learned


def guessed_parts(
    marks: list[str], texts: list[str], roles: list[str], prompt: str, split: Callable[[str], list[str]]
) -> Iterator[tuple[str, str | None, bool]]:
    """The parts for a template without generation tags: learned is what the assistant says, what the template writes
    between two texts of one message, the special token after the last, and what follows the generation prompt before
    the first. marks: of each text the number of its message, or ""."""
    speaks = [None, *(mark if mark and roles[int(mark)] == "assistant" else None for mark in marks), None]
    for mark, text, before, after in zip(marks, texts, speaks, speaks[2:], strict=False):
        if mark or before == after:
            yield text, roles[int(mark)] if mark else None, bool(before or mark and roles[int(mark)] == "assistant")
            continue
        end = "".join(split(text)[:2]) if before and len(split(text)) > 1 else ""
        rest = text[len(end) :]
        begin = rest.rpartition(prompt)[2] if after and prompt and prompt in rest else ""
        yield from ((end, None, True), (rest[: len(rest) - len(begin)], None, False), (begin, None, True))
