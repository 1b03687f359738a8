"""Generation: what a trained model writes, from a prompt or in a conversation.

    python sample.py out/stories                               a document from its very beginning
    python sample.py out/stories --prompt="The Lost Kite"      from a prompt; --prompt=- reads standard input
    python sample.py out/stories --file=beginning.txt --num_samples=3
    python sample.py out/chat --chat                           a conversation; Ctrl-D or /quit ends it

A model gives a probability to every possible next token, and generating means drawing one, appending it, and asking
again. Drawing from the bare probabilities lets the many unlikely tokens derail a text now and then; always taking the
likeliest makes it loop. The options in between: temperature sharpens (below 1) or flattens the distribution, top_k,
top_p and min_p cut its tail, repetition_penalty makes what was said already less likely.

Text appears as it is made. A token may end in the middle of a character, and a stop string may begin at the end of
what is known: both are held back until it is clear what they are.
"""

import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from nanodoge.checkpoint import load_model
from nanodoge.decode import Decoder
from nanodoge.machine import Machine
from nanodoge.options import parse_options, run_command


@dataclass
class SampleOptions:
    checkpoint: list[str] = field(default_factory=lambda: ["out/stories"])  # folder of the model
    prompt: str = ""  # text to continue; - reads standard input; empty: the beginning of a document
    file: str = ""  # a file with the text to continue
    chat: bool = False  # hold a conversation in the terminal
    system: str = ""  # chat: the system message
    num_samples: int = 1  # continuations of the same prompt
    max_new_tokens: int = 256  # longest continuation in tokens
    temperature: float = 0.7  # 0 = always the likeliest token
    top_k: int = 0  # draw from this many likeliest tokens; 0 = all
    top_p: float = 0.95  # draw from the likeliest tokens that make up this much probability; 1 = all
    min_p: float = 0.0  # draw from tokens at least this fraction as likely as the likeliest; 0 = all
    repetition_penalty: float = 1.0  # above 1: tokens that have occurred become less likely
    stop: list[str] = field(default_factory=list)  # end at any of these strings (separated by commas)
    seed: int = 0  # of the draws; the same seed gives the same text
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"  # of the weights; int8: a byte each, see decode.py
    compile: bool = False  # torch.compile: half a minute or more for every power of two in length, then faster

    def __post_init__(self):
        limits = dict(num_samples=(1, None), max_new_tokens=(1, None), temperature=(0, None), top_k=(0, None),
                      top_p=(0, 1), min_p=(0, 1), repetition_penalty=(0, None))  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not (value >= low and value < float("inf") and (high is None or value <= high)):
                raise ValueError(f"--{name}={value} must be from {low} {f'to {high}' if high is not None else 'up'}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed={self.seed} must fit into 64 bits")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"--temperature={self.temperature} must be 0 or at least 0.001")
        if self.system and not self.chat:
            raise ValueError("--system is the system message of a conversation: it needs --chat")
        if self.repetition_penalty == 0:
            raise ValueError("--repetition_penalty=0 would divide by zero; 1 has no effect, above 1 discourages")
        if len(self.checkpoint) != 1:
            raise ValueError(f"one checkpoint folder, not {len(self.checkpoint)}: {' '.join(self.checkpoint)} "
                             "(a prompt is given as --prompt=...)")  # fmt: skip
        if bool(self.prompt) + bool(self.file) + self.chat > 1:
            raise ValueError("--prompt, --file and --chat exclude one another")


class Stopper:
    """Passes text on until a stop string is complete: `feed` returns what may be shown, `found` says it was met. The
    end of the text is held back while it could be the beginning of a stop string."""

    def __init__(self, stops):
        self.stops, self.held, self.found = [stop for stop in stops if stop], "", False

    def feed(self, text, last=False):
        self.held += text
        ends = [place for place in (self.held.find(stop) for stop in self.stops) if place >= 0]
        if ends:
            self.found, shown, self.held = True, self.held[: min(ends)], ""
            return shown
        begins = (n for stop in self.stops for n in range(len(stop) - 1, 0, -1) if self.held.endswith(stop[:n]))
        keep = 0 if last else max(begins, default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


def write(model, decoder, tokenizer, ids, options, generator, show):
    """Continues `ids` (a list of token ids), calling show(text) with each new piece. -> text, number of tokens."""
    stopper, decode, text, count = Stopper(options.stop), tokenizer.stream(), "", 0
    tokens = torch.tensor([ids], device=model.embed_tokens.weight.device)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    choices = {name: getattr(options, name) for name in names}
    drawn = model.stream(tokens, **choices, generator=generator, vocab_size=tokenizer.vocab_size, decoder=decoder)

    def emit(piece):
        nonlocal text
        text += piece
        if piece:
            show(piece)

    try:
        for token in drawn:
            count += 1
            if token.item() == tokenizer.eos_id:
                break
            emit(stopper.feed(decode(token.item())))
            if stopper.found:
                break
    except KeyboardInterrupt:
        show("\n")  # what was written stands
    if not stopper.found:
        emit(stopper.feed(decode(None), last=True))
    return text, count


def show(piece):
    print(piece, end="", flush=True)


def report(count, seconds):
    print()
    print(f"[{count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s]", file=sys.stderr)


def read_prompt(options):
    """The text to continue. Raises ValueError for a file or an input that is not UTF-8 text."""
    try:
        if options.file:
            return Path(options.file).read_text(encoding="utf-8")
        return sys.stdin.buffer.read().decode("utf-8") if options.prompt == "-" else options.prompt
    except UnicodeDecodeError:
        raise ValueError(f"{options.file or 'standard input'} is not UTF-8 text") from None


def complete(model, decoder, tokenizer, options, generator):
    """Prints num_samples continuations of the prompt, the prompt first."""
    prompt = read_prompt(options)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(ids) + options.max_new_tokens > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        print(f"[prompt and continuation may exceed the {limit} tokens the model was trained on]", file=sys.stderr)
    for i in range(options.num_samples):
        if options.num_samples > 1:
            print(f"--- {i + 1} of {options.num_samples} ---")
        show(prompt)
        start = time.perf_counter()
        _, count = write(model, decoder, tokenizer, ids, options, generator, show)
        report(count, time.perf_counter() - start)


def chat(model, decoder, tokenizer, options, generator):
    """Reads a line, answers it, remembers both. A model that was not tuned on conversations (sft.py) will ramble."""
    messages = [dict(role="system", content=options.system)] if options.system else []
    print("Ctrl-D or /quit ends the conversation, /new begins another.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return print()
        if line == "/quit":
            return None
        if line == "/new":
            messages = messages[:1] if options.system else []
        elif line:
            messages.append(dict(role="user", content=line))
            ids, _ = tokenizer.render(messages, add_generation_prompt=True)
            start = time.perf_counter()
            answer, count = write(model, decoder, tokenizer, ids, options, generator, show)
            report(count, time.perf_counter() - start)
            messages.append(dict(role="assistant", content=answer))


def main(argv):
    options = parse_options(SampleOptions, argv, positional="checkpoint")
    machine = Machine(options.device, "auto" if options.dtype == "int8" else options.dtype)
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))  # what torch calls
    if options.compile and machine.device.type == "cpu" and not shutil.which(compiler):
        raise ValueError(f"--compile=true needs a C++ compiler, and there is no {compiler} (set CXX to another)")
    model, tokenizer = load_model(options.checkpoint[0])
    model = model.to(machine.device, machine.dtype)
    decoder = Decoder(model, torch.int8 if options.dtype == "int8" else machine.dtype, options.compile)
    generator = torch.Generator(machine.device).manual_seed(options.seed)
    (chat if options.chat else complete)(model, decoder, tokenizer, options, generator)


if __name__ == "__main__":
    run_command(main)
