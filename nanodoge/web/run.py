"""The exported model beside this file, by onnxruntime and numpy alone: a conversation, or a text from its beginning.

python run.py [--prompt="It was"] [--temperature=0.7] [--max_new_tokens=256]
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime

EMPTY = {"k": 0.0, "v": 0.0, "s": -1e30, "position": -1}  # what an empty slot of the state holds


class Model:
    def __init__(self, folder: Path):
        self.__dict__ |= json.loads((folder / "export.json").read_text(encoding="utf-8"))
        if hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest() != self.sha256:
            raise ValueError("model.onnx is not the file that was exported")
        self.step, self.length = onnxruntime.InferenceSession(folder / "model.onnx"), 0
        self.bytes = [token.encode("latin-1") for token in self.tokens]
        self.ranks = {token: id for id, token in enumerate(self.bytes) if token and id not in self.special}
        shapes = {name: (self.layers, self.heads, 0, self.head_dim)[: 3 + (name in "kv")] for name in EMPTY}
        self.state = {name: np.zeros(shapes[name], np.int64 if name == "position" else np.float32) for name in EMPTY}

    def encode(self, parts):
        """Yields the ids of texts, each between special tokens, which are given by their ids."""
        for part in parts:
            for chunk in [] if isinstance(part, int) else re.findall(self.pattern, part):
                whole = chunk.encode("utf-8", "replace")
                units = [whole] if whole in self.ranks else [bytes([byte]) for byte in whole]
                while len(units) > 1:  # byte-pair encoding: the pair that is the earliest token is merged
                    rank, i = min((self.ranks.get(units[i] + units[i + 1], 1e9), i) for i in range(len(units) - 1))
                    if rank == 1e9:
                        break
                    units[i : i + 2] = [units[i] + units[i + 1]]
                yield from (self.ranks[unit] for unit in units)
            yield from [part] if isinstance(part, int) else []

    def read(self, token: int):
        """The logits of the next token. The state then holds this one."""
        slots = self.state["s"].shape[2]
        if self.length == slots <= self.window:  # all are taken: twice as many, at most W + 1
            for name, x in self.state.items():
                shape = *x.shape[:2], min(max(slots, 64), self.window + 1 - slots), *x.shape[3:]
                self.state[name] = np.concatenate((x, np.full(shape, EMPTY[name], x.dtype)), axis=2)
        feeds = {f"{kind}{i}": self.state[kind][i] for kind in "kv" for i in range(self.layers)}
        feeds |= {"s": self.state["s"], "position": self.state["position"]}
        feeds |= {"token": np.array([token]), "length": np.array([self.length])}
        logits, k, v, s, slot = self.step.run(None, feeds)
        layer, head = np.ogrid[: self.layers, : self.heads]
        for name, new in {"k": k, "v": v, "s": s, "position": self.length}.items():
            self.state[name][layer, head, slot] = new
        self.length += 1
        return logits

    def write(self, parts, limit: int, temperature: float) -> None:
        """Prints what follows, as it is made."""
        for token in self.encode(parts):
            logits = self.read(token)
        data = b""
        for _ in range(limit):
            token = int((logits + temperature * np.random.gumbel(size=logits.shape)).argmax())  # a draw from softmax
            if token == self.eos:
                break
            before, data = data.decode("utf-8", "ignore"), data + self.bytes[token] * (token not in self.special)
            print(data.decode("utf-8", "ignore")[len(before) :], end="", flush=True)
            logits = self.read(token)
        print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"prompt": None, "temperature": 0.7, "max_new_tokens": 256}.items():
        parser.add_argument(f"--{name}", default=default, type=type(default or ""))
    options = parser.parse_args()
    try:
        model = Model(Path(__file__).parent)
    except Exception as error:  # those of onnxruntime have no class of their own
        sys.exit(f"this export is damaged: {error}".splitlines()[0])
    limits = options.max_new_tokens, options.temperature
    if options.prompt is not None or not model.chat:
        sys.exit(model.write([model.bos, options.prompt or ""], *limits))
    before = model.chat["start"]
    while line := input("> ").strip():
        model.write([*before, line, *model.chat["answer"]], *limits)
        before = model.chat["next"]
