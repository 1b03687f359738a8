"""The exported model beside this file, by onnxruntime and numpy alone: a conversation, or a text from its beginning.

python run.py [--prompt="It was"] [--temperature=0.7] [--max_new_tokens=256]
"""

import argparse
import hashlib
import json
import re
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime

EMPTY = {"k": 0.0, "v": 0.0, "s": -1e30, "position": -1}  # what an empty slot of the state holds


class Model:
    def __init__(self, folder: Path):
        self.__dict__ |= json.loads((folder / "export.json").read_text(encoding="utf-8"))
        if hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest() != self.sha256:
            raise ValueError("model.onnx is not the file that was exported")
        self.session, self.length, self.state = onnxruntime.InferenceSession(folder / "model.onnx"), 0, {}
        self.bytes = [token.encode("latin-1") for token in self.tokens]
        self.ranks = {token: id for id, token in enumerate(self.bytes) if token and id not in self.special}
        self.token, self.before = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.logits = np.zeros((1, len(self.tokens)), np.float32)
        self.slot = np.zeros((self.layers, self.heads), np.int64)
        self.resize(min(64, self.window + 1))

    def resize(self, slots: int) -> None:
        """More slots for keys. The new state of a step is written over the old one: both are the same memory."""
        for name, empty in EMPTY.items():
            shape = self.layers, self.heads, 1, *((slots, self.head_dim) if name in "kv" else (1, slots))
            new = np.full(shape, empty, np.int64 if name == "position" else np.float32)
            if name in self.state:
                used = [slice(size) for size in self.state[name].shape]
                new[tuple(used)] = self.state[name]
            self.state[name] = new
        arrays = {f"{name}{i}": x[i] for name, x in self.state.items() for i in range(self.layers)}
        self.binding = self.session.io_binding()
        for name, x in (arrays | {"token": self.token, "length": self.before}).items():
            self.binding.bind_input(name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
        arrays = {f"new_{name}": x for name, x in arrays.items()}
        for name, x in (arrays | {"logits": self.logits, "slot": self.slot}).items():
            self.binding.bind_output(name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)

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
        slots = self.state["s"].shape[-1]
        if self.length == slots - 1 < self.window:
            slots = min(2 * slots, self.window + 1)
            self.resize(slots)
        self.token[0], self.before[0] = token, self.length
        self.session.run_with_iobinding(self.binding)
        if self.length >= slots - 1:  # the new key is in the last slot, and goes where another left
            layer, head = np.ogrid[: self.layers, : self.heads]
            for x in (self.state["k"], self.state["v"]):
                x[layer, head, 0, self.slot] = x[:, :, 0, -1]
        self.length += 1
        return self.logits[0].copy()

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
    with suppress(EOFError, KeyboardInterrupt):  # Ctrl-D and Ctrl-C end the conversation
        while line := input("> ").strip():
            model.write([*before, line, *model.chat["answer"]], *limits)
            before = model.chat["next"]
