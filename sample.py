"""Generation: what a trained model writes, from a prompt or in a conversation.

    python sample.py out/stories                               a document from its very beginning
    python sample.py out/stories --prompt="The Lost Kite"      from a prompt; --prompt=- reads standard input
    python sample.py out/stories --file=beginning.txt --num_samples=3
    python sample.py out/chat --chat                           a conversation; Ctrl-D or /quit ends it

A model gives a probability to every possible next token. Generating means to draw one, append it, and ask again. With
the bare probabilities an unlikely token derails the text now and then; always taking the likeliest makes it loop. The
options in between: temperature sharpens (below 1) or flattens the distribution; top_k, top_p and min_p cut its tail;
repetition_penalty makes tokens that have occurred less likely.

Text is printed as it is made, and Ctrl-C ends it: what was written stays.
"""

import itertools
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch

from nanodoge.checkpoint import load_model
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request
from nanodoge.machine import Machine
from nanodoge.options import Count, NonNegative, Positive, Range, Share, Whole, check_ranges, parse_options, run_command


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
    compile: bool = False  # torch.compile: half a minute or more for every power of two in length, then faster
    attention: Literal["fast", "definition"] = "fast"  # definition: slow, as model.py defines it

    def __post_init__(self):
        check_ranges(self)
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"--temperature={self.temperature} must be 0 or at least 0.001")
        if self.attention == "definition" and (self.compile or self.dtype == "int8"):
            raise ValueError("--attention=definition is computed by model.py: without --compile and --dtype=int8")
        if self.system and not self.chat:
            raise ValueError("--system is the system message of a conversation: it needs --chat")
        if len(self.checkpoint) != 1:
            words = f"{len(self.checkpoint)}: {' '.join(self.checkpoint)}"
            raise ValueError(f"one checkpoint folder, not {words} (a prompt is given as --prompt=...)")
        if bool(self.prompt) + bool(self.file) + self.chat > 1:
            raise ValueError("--prompt, --file and --chat exclude one another")


def write(engine: Engine, ids: list[int], options: SampleOptions, seed: int, prompt: str = "") -> str:
    """Prints the prompt, what the model writes after ids, as it is made, and the speed. -> the new text."""
    limit, start, shown = engine.model.config.max_position_embeddings, time.perf_counter(), 0
    if len(ids) + options.max_new_tokens > limit:
        print(f"[prompt and continuation may exceed the {limit} tokens the model was trained on]", file=sys.stderr)
    names = "max_new_tokens temperature top_k top_p min_p repetition_penalty stop".split()
    choices = {name: getattr(options, name) for name in names}
    request = Request(ids, **choices, seed=seed, stop_ids=[engine.tokenizer.eos_id])
    print(prompt, end="", flush=True)
    try:
        for _ in engine.stream(request):
            print(request.text.text[shown:], end="", flush=True)
            shown = len(request.text.text)
    except KeyboardInterrupt:
        engine.cancel(request)
    print(request.text.text[shown:])
    count, seconds = len(request.tokens), time.perf_counter() - start
    print(f"[{count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s]", file=sys.stderr)
    return request.text.text


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
    prompt = read_prompt(options)
    ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode(prompt)]
    for i in range(options.num_samples):
        if options.num_samples > 1:
            print(f"--- {i + 1} of {options.num_samples} ---")
        write(engine, ids, options, options.seed + i, prompt)


def chat(engine: Engine, options: SampleOptions) -> None:
    """Reads a line, answers it, remembers both. A model that was not tuned on conversations (sft.py) will ramble."""
    messages = system = [{"role": "system", "content": options.system}] if options.system else []
    print("Ctrl-D or /quit ends the conversation, /new begins another.", file=sys.stderr)
    for turn in itertools.count():
        try:
            line = input("> ").strip()
        except EOFError:
            return print()
        if line == "/quit":
            return None
        if line == "/new":
            messages = system
        elif line:
            messages = [*messages, {"role": "user", "content": line}]
            ids, _ = engine.tokenizer.render(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": write(engine, ids, options, options.seed + turn)})


def main(argv: list[str]) -> None:
    options = parse_options(SampleOptions, argv, positional="checkpoint")
    machine = Machine(options.device, "auto" if options.dtype == "int8" else options.dtype)
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))  # what torch calls
    if options.compile and machine.device.type == "cpu" and not shutil.which(compiler):
        raise ValueError(f"--compile=true needs a C++ compiler, and there is no {compiler} (set CXX to another)")
    model, tokenizer = load_model(options.checkpoint[0])
    model = model.to(machine.device, machine.dtype)
    model.config.attention, decoder = options.attention, None
    if options.attention == "fast":
        decoder = Decoder(model, torch.int8 if options.dtype == "int8" else machine.dtype, options.compile)
    engine = Engine(model, decoder, slots=1, tokenizer=tokenizer)
    (chat if options.chat else complete)(engine, options)


if __name__ == "__main__":
    run_command(main)
