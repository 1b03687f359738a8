"""Generation: what a trained model writes, from a prompt or in a conversation.

    python sample.py out/stories                               a document from its very beginning
    python sample.py out/stories --prompt="The Lost Kite"      from a prompt; --prompt=- reads standard input
    python sample.py out/stories --file=beginning.txt --num_samples=3
    python sample.py out/chat --chat                           a conversation; /help lists what else can be typed

A model gives a probability to every possible next token. Generating means to draw one, append it, and ask again. If
tokens are drawn from the unchanged probabilities, now and then an unlikely one spoils the text; always taking the
likeliest leads to repetitions. The options are in between: temperature makes the distribution sharper (below 1) or
flatter; top_k, top_p and min_p exclude unlikely tokens; repetition_penalty makes tokens that have occurred less likely.

Text is printed while it is generated. Ctrl-C ends the generation.
"""

import itertools
import json
import math
import os
import re
import select
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from nanodoge import stories
from nanodoge.answers import final_answer
from nanodoge.checkpoint import load_model, load_options
from nanodoge.decode import make_decoder
from nanodoge.engine import Engine, Request
from nanodoge.machine import Machine
from nanodoge.options import Count, NonNegative, Positive, Range, Share, Whole, check_ranges, parse_options, run_command
from nanodoge.tokenizer import REASONING_TAGS

HELP = """/new or /clear begins another conversation, /system TEXT changes the system message (none without TEXT),
/save FILE writes the conversation as prepare_data.py --kind=chat reads it, /quit or Ctrl-D leaves. Ctrl-C stops an
answer. A line that ends in \\ goes on in the next one; pasted lines stay together."""
DIM, PLAIN = "\033[2m", "\033[0m"  # of a terminal
CODES = dict(zip(REASONING_TAGS, (DIM, PLAIN, "", ""), strict=True))


@dataclass
class SampleOptions:
    """What to write."""

    checkpoint: list[str] = field(default_factory=lambda: ["out/stories"])  # folder of the model
    prompt: str = ""  # text to continue; - reads standard input; empty: the beginning of a document
    file: str = ""  # a file with the text to continue
    chat: bool = False  # hold a conversation in the terminal
    system: str = ""  # chat: the system message
    num_samples: Count = 1  # continuations of the same prompt
    max_new_tokens: Count = 256  # longest continuation in tokens
    stop: list[str] = field(default_factory=list)  # end at any of these strings (separated by commas)
    # ---- How tokens are drawn
    temperature: NonNegative = 0.7  # 0 = always the likeliest token
    top_k: Whole = 0  # draw from this many likeliest tokens; 0 = all
    top_p: Share = 0.95  # draw from the likeliest tokens that make up this much probability; 1 = all
    min_p: Share = 0.0  # draw from tokens at least this fraction as likely as the likeliest; 0 = all
    repetition_penalty: Positive = 1.0  # above 1: tokens that have occurred become less likely
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] = 0  # of the draws; the same seed gives the same text
    # ---- Device
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"  # of the weights; int8: a byte each, see decode.py
    backend: Literal["auto", "cpp", "onnx", "torch"] = "auto"  # auto: cpp on a CPU with a C++ compiler, else torch
    compile: bool = False  # torch.compile, for a GPU: half a minute or more for every power of two in length
    attention: Literal["fast", "definition"] = "fast"  # definition: slow, as model.py defines it

    def __post_init__(self):
        check_ranges(self)
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"--temperature={self.temperature} must be 0 or at least 0.001")
        if self.backend in ("cpp", "onnx") and (self.compile or self.attention == "definition"):
            words = "without --compile and --attention=definition"
            raise ValueError(f"--backend={self.backend} computes by itself: {words}")
        if self.attention == "definition" and (self.compile or self.dtype == "int8"):
            raise ValueError("--attention=definition is computed by model.py: without --compile and --dtype=int8")
        if self.system and not self.chat:
            raise ValueError("--system is the system message of a conversation: it needs --chat")
        if len(self.checkpoint) != 1:
            words = f"{len(self.checkpoint)}: {' '.join(self.checkpoint)}"
            raise ValueError(f"one checkpoint folder, not {words} (a prompt is given as --prompt=...)")
        if bool(self.prompt) + bool(self.file) + self.chat > 1:
            raise ValueError("--prompt, --file and --chat exclude one another")


def write(engine: Engine, ids: list[int], options: SampleOptions, seed: int, prompt: str = "") -> Request:
    """Prints the prompt, what the model writes after ids, as it is made, and the speed. -> the ended request. In a
    conversation in a terminal, thoughts are dimmed."""
    start, shown, codes = time.perf_counter(), 0, CODES if options.chat and sys.stdout.isatty() else {}
    names = "max_new_tokens temperature top_k top_p min_p repetition_penalty stop".split()
    choices = {name: getattr(options, name) for name in names}
    request = Request(ids, **choices, seed=seed, stop_ids=[engine.tokenizer.eos_id])
    print(prompt, end="", flush=True)
    try:
        for _ in engine.stream(request):
            piece, shown = request.text.text[shown:], len(request.text.text)
            print(re.sub(r"<\|\w+\|>", lambda tag: codes.get(tag[0], tag[0]), piece), end="", flush=True)
    except KeyboardInterrupt:
        engine.cancel(request)
    print(request.text.text[shown:] + (PLAIN if codes else ""))
    count, seconds = len(request.tokens), time.perf_counter() - start
    print(f"[{count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s]", file=sys.stderr)
    return request


def notice_length(request: Request, limit: float) -> float:
    """Says once that a text is longer than limit, the model's context -> the limit for the next text."""
    if len(request.prompt) + len(request.tokens) <= limit:
        return limit
    print(f"[texts that exceed the {limit} tokens the model was trained on may lose their thread]", file=sys.stderr)
    return math.inf


def read_prompt(options: SampleOptions) -> str:
    """The text to continue. Raises ValueError for a file or an input that is not UTF-8 text."""
    try:
        if options.file:
            return Path(options.file).read_text(encoding="utf-8-sig")
        return sys.stdin.buffer.read().decode("utf-8-sig") if options.prompt == "-" else options.prompt
    except UnicodeDecodeError:
        raise ValueError(f"{options.file or 'standard input'} is not UTF-8 text") from None


def complete(engine: Engine, options: SampleOptions) -> None:
    """Prints num_samples continuations of the prompt, the prompt first."""
    prompt, limit = read_prompt(options), engine.model.config.max_position_embeddings
    ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode(prompt)]
    for i in range(options.num_samples):
        if options.num_samples > 1:
            print(f"--- {i + 1} of {options.num_samples} ---")
        limit = notice_length(write(engine, ids, options, options.seed + i, prompt), limit)


def example(engine: Engine, data: str) -> tuple[str, str] | None:
    """A question that the model has not seen and its right answer, if `data`, which it was tuned on, is built in. None
    for other data, and for a model that answers none of the first 20 questions right."""
    make = {"stories": stories.conversation, "sums": stories.worked_sum}.get(Path(data).name.split("-")[0])
    for number in range(20) if make else ():
        question, wanted = make(number, "test")["messages"][:2]
        ids, _ = engine.tokenizer.render([question], add_generation_prompt=True)
        [new] = engine.generate([Request(ids, 100, temperature=0, stop_ids=[engine.tokenizer.eos_id])])
        answer = final_answer(engine.tokenizer.decode(id for id in new if id != engine.tokenizer.eos_id))
        if re.search(rf"(?<!\w){re.escape(final_answer(wanted['content']))}(?!\w)", answer):
            return question["content"], answer


def read_message() -> str:
    """What is typed up to Enter, and goes on after a backslash. Pasted lines GNU readline returns as one text; without
    it, the lines that are there already belong together."""
    lines, terminal = [input("> ")], sys.stdin.isatty() and os.name == "posix"  # on Windows, select knows only sockets
    while lines[-1].endswith("\\") or (terminal and select.select([sys.stdin], [], [], 0.05)[0]):
        lines.append(input())
    return "\n".join(line.removesuffix("\\") for line in lines).strip()


def save(messages: list[dict], name: str) -> None:
    """Writes a conversation into a new file, or says why it cannot."""
    try:
        with Path(name).expanduser().open("x", encoding="utf-8", errors="replace") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        print(f"[not saved: {error}]", file=sys.stderr)


def chat(engine: Engine, options: SampleOptions) -> None:
    """Reads a message, answers it, remembers both."""
    with suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401, from here on input() edits lines and has a history
    trained = load_options(options.checkpoint[0])
    print("Ctrl-D or /quit ends the conversation, /new begins another, /help lists the rest.", file=sys.stderr)
    if trained and "epochs" not in trained:
        print("[this model was not tuned on conversations, which sft.py does: it will ramble]", file=sys.stderr)
    elif shown := example(engine, str(trained.get("data", ""))):
        told = "It was tuned on {} and knows no more. Asked\n\n{}\n\nit answers: {}\n"
        print(told.format(trained["data"], *shown), file=sys.stderr)
    messages, system, turns, leaving = [], options.system, itertools.count(options.seed), False
    limit = engine.model.config.max_position_embeddings
    while True:
        try:
            text, leaving = read_message(), False
        except (EOFError, KeyboardInterrupt) as reason:
            if leaving or isinstance(reason, EOFError):
                return print()
            print("\n[Ctrl-C again leaves, as do Ctrl-D and /quit]", file=sys.stderr)
            leaving = True
            continue
        word, _, rest = text.partition(" ")
        head = [{"role": "system", "content": system}] if system else []
        if word == "/quit":
            return None
        if word in ("/new", "/clear"):
            messages = []
        elif word == "/system":
            system = rest.strip()
        elif word == "/save":
            save(head + messages, rest.strip())
        elif re.fullmatch("/[a-z]+", word):
            print(HELP, file=sys.stderr)
        elif text:
            messages.append({"role": "user", "content": text})
            ids, _ = engine.tokenizer.render(head + messages, add_generation_prompt=True)
            request = write(engine, ids, options, next(turns))
            messages.append({"role": "assistant", "content": request.text.text})
            limit = notice_length(request, limit)


def main(argv: list[str]) -> None:
    options = parse_options(SampleOptions, argv, positional="checkpoint")
    machine = Machine(options.device, "auto" if options.dtype == "int8" else options.dtype)
    if options.compile and machine.device.type == "cpu":
        raise ValueError("--compile=true is for a GPU: on a CPU, --backend=cpp is compiled, in seconds")
    model, tokenizer = load_model(options.checkpoint[0])
    model = model.to(machine.device, machine.dtype)
    model.config.attention, decoder = options.attention, None
    if options.attention == "fast":
        decoder = make_decoder(model, options.dtype, options.backend, options.compile)
    engine = Engine(model, decoder, slots=1, tokenizer=tokenizer)
    (chat if options.chat else complete)(engine, options)


if __name__ == "__main__":
    run_command(main)
