"""Damage for tests/fuzz.py: changes good files into bad ones, as copying, disks, users and attackers do.

Every function draws what it does from `draw`, so that the same seed damages in the same way.
"""

import json
import math
import os
import pickle
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from nanodoge.tokenizer import CHAT_TEMPLATE

TEXTS = ["", " ", "\0", "a\0b", "\ud800", "\udcff", "\n", "\u2028", "é\u202e", "x" * 5000]
TEXTS += "../x .. . /dev/null <|pad|> None nan 1e999 -1 1_0 ² ٣ true {} %s --resume a,b C:\\x".split()
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 2**16, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 10**400]
NUMBERS += [0.0, -0.0, 0.5, 1.5, 1e300, 5e-324, -1e9, math.nan, math.inf, -math.inf]
DEEP = "@deep@"  # stands for lists in lists, too deep for json to write
OTHERS = [None, True, False, [], {}, [[]], [None], {"": None}, [1, "a"], DEEP, {"a": {"b": []}}]


def nasty(draw: Random) -> Any:
    """A value that probably does not fit."""
    return draw.choice(draw.choices([NUMBERS, TEXTS, OTHERS], [4, 3, 3])[0])


def as_text(value: Any) -> str:
    return str(value).replace(DEEP, "[" * 3000).replace("\0", "")  # no command line can hold a zero byte


def corrupt(draw: Random, data: bytes) -> bytes:
    """The bytes with flipped bits, with pieces removed, doubled or overwritten, or with the end missing."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5, 20])):
        place, size, kind = draw.randrange(len(data) + 1), draw.choice([1, 1, 2, 4, 8, 64]), draw.randrange(7)
        if kind < 2 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del data[place : place + size]
        elif kind == 3:
            data[place:place] = data[place : place + size]
        elif kind == 4:
            data[place : place + size] = draw.choice([b"\0", b"\xff", b"9", b"[", b'"', b"\n", b"\xed\xa0\x80"]) * size
        elif kind == 5:
            data[place : place + size] = draw.randbytes(size)
        elif draw.random() < 0.3:
            del data[place:]
    return bytes(data)


def twist(draw: Random, value: dict | list) -> None:
    """Changes one place in nested dicts and lists: another value, one less, one more, two exchanged, a number off."""
    while value:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and draw.random() < 0.8:
            value = value[key]
            continue
        kind, old = draw.randrange(8), value[key]
        if kind < 3 and type(old) in (int, float):
            value[key] = draw.choice([old + 1, old - 1, 2 * old, -old, 0.5])
        elif kind == 3:
            del value[key]
        elif kind == 4:
            other = draw.choice(keys)
            value[key], value[other] = value[other], old
        elif kind == 5 and isinstance(value, dict):
            value[str(nasty(draw))[:50]] = old
        else:
            value[key] = nasty(draw)
        return


def dump(value: Any, depth: int = 100_000) -> bytes:
    """JSON of any value: with NaN, half characters, and DEEP as that many nested lists."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode()


# These change a file, or one of a folder, and return why it must be refused, "" if it need not be.


def json_file(draw: Random, path: Path) -> str:
    if draw.random() < 0.25:
        path.write_bytes(corrupt(draw, path.read_bytes()))
        return ""
    value = json.loads(path.read_bytes())
    if draw.random() < 0.1:
        key = draw.choice(list(value))
        path.write_bytes(b"{" + json.dumps(key).encode() + b": 77, " + dump(value)[1:])
        return f"{key} has two values"
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        twist(draw, value)
    path.write_bytes(dump(value))
    return ""


def place(draw: Random, path: Path) -> str:
    """Removes a file or folder, or puts a link, a folder, a pipe or an empty file there."""
    link = draw.choice(["/dev/zero", "../beside/secret", path.name, "../beside", ""])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if link:
        path.symlink_to(link)
    else:
        draw.choice([path.mkdir, lambda: os.mkfifo(path), path.touch, lambda: None])()
    return ""


def numbers(draw: Random, path: Path, dtype: str) -> str:
    """Changes some numbers of a .bin file, or its length."""
    data, kind = np.fromfile(path, dtype), draw.randrange(5)
    if kind == 0:
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    elif kind == 1:
        path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice([1, 2, 8, 4096])))
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        for _ in range(draw.choice([1, 3, len(data)])):
            value = draw.choice([high, low, 0, 1, 2, 400, draw.randint(low, high)])
            data[draw.randrange(len(data))] = min(value, high)
        data.tofile(path)
    return "its length is not that of meta.json" if kind < 2 else ""


def safetensors_file(draw: Random, path: Path) -> str:
    data, kind = path.read_bytes(), draw.randrange(6)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    if kind == 0:
        path.write_bytes(corrupt(draw, data[: 8 + size]) + body)
    elif kind == 1:
        path.write_bytes(data[: draw.randrange(len(data))])
        return "it is cut off"
    elif kind == 2:
        size = draw.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", size) + data[8:])
    else:
        header = json.loads(header)
        for _ in range(draw.choice([1, 1, 2])):
            header_entry(draw, header)
        text = dump(header, 10_000)
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return ""


def header_entry(draw: Random, header: dict) -> None:
    """Changes one entry of the header of a safetensors file."""
    keys = {"dtype", "shape", "data_offsets"}
    entries = [entry for entry in header.values() if isinstance(entry, dict) and keys <= entry.keys()]
    entries = [entry for entry in entries if isinstance(entry["shape"], list)]
    kind = draw.randrange(5) if entries else 4
    entry = draw.choice(entries) if entries else {}
    if kind == 0:
        entry["dtype"] = draw.choice("F16 BF16 F64 I8 U8 I64 BOOL F8_E4M3 C64 F4 x".split())
    elif kind == 1:
        entry["shape"] = draw.choice([entry["shape"][::-1], [], [2**62, 4], [-1], [0], [2**32, 2**32], [1] * 200])
    elif kind == 2:
        own, other = entry["data_offsets"], draw.choice(entries)["data_offsets"]
        entry["data_offsets"] = draw.choice([other, [0, 0], [0, 2**63], [own, own], [5, 2**64]])
    else:
        twist(draw, header)


class Program:
    """What a hostile pickle would run: it makes a file called `owned`."""

    def __reduce__(self):
        return open, ("owned", "w")


def pickle_file(draw: Random, path: Path) -> str:
    data, kind = path.read_bytes(), draw.randrange(6)
    if kind == 0:
        path.write_bytes(corrupt(draw, data))
    elif kind == 1:
        state = torch.load(path, weights_only=True)
        state[draw.choice(list(state))] = Program()
        if draw.random() < 0.3:
            path.write_bytes(pickle.dumps(state))
        else:
            torch.save(state, path)
        return "it asks for a program to be run"
    elif kind == 2:  # within the archive, in a place that no checksum covers
        start = data.find(b"data.pkl") + 8
        path.write_bytes(data[:start] + corrupt(draw, data[start : start + 3000]) + data[start + 3000 :])
    else:
        state = torch.load(path, weights_only=True)
        for _ in range(draw.choice([1, 1, 2])):
            training_state(draw, state)
        torch.save(state, path)
    return ""


def training_state(draw: Random, state: dict) -> None:
    """Changes one place of a training state, often a tensor of the optimizer."""
    moments = state.get("optimizer")
    moments = moments[draw.choice(list(moments))] if isinstance(moments, dict) and moments else None
    if not isinstance(moments, dict) or not moments or draw.random() < 0.6:
        return twist(draw, state)
    key = draw.choice(list(moments))
    tensor = moments[key] if isinstance(moments[key], torch.Tensor) else torch.ones(())
    others = [tensor[None], tensor.flatten()[:1], tensor.double(), tensor.long(), tensor * math.nan]
    others += [tensor.to(torch.complex64), torch.ones(()), torch.zeros(0), nasty(draw)]
    moments[key] = draw.choice(others)
    if draw.random() < 0.2:
        del moments[key]


TEMPLATES = ["{% for i in range(10**9) %}a{% endfor %}", "{{ messages[99].x.y }}", "{{ 1 / 0 }}"]
TEMPLATES += ["{{ ''.__class__.__mro__ }}", "{{ raise_exception('no\nno') }}", "{% if", "{{ messages | tojson }}", ""]
TEMPLATES += ["{{ x.y }}", "{{ '%d' % 'a' }}", "{{ messages[0]['content'][::0] }}", "{{ [] | first }}"]
TEMPLATES += ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'a'.encode('x') }}", "{{ range(-1)[5] }}"]
TEMPLATES += ["{% include 'x' %}", "{% import 'os' as os %}", "{{ messages | map('x') | list }}"]
TEMPLATES += ["{{ messages | batch(0) | list }}", "{% for m in messages %}{{ m.content | upper }}{% endfor %}"]
TEMPLATES += ["{{ messages + 1 }}", "{{ strftime_now('%Y') }}", "{{ [1] | sum('x') }}", "{{ 'é' | urlize }}"]
TEMPLATES += ["{{ bos_token }}", "{{ messages | xmlattr }}", "{{ dict(a=1, **1) }}", "{{ 'x'.format_map(messages) }}"]
PATTERNS = r"a (a+)+b ( \p{X} (?=a) . \w+|\s x* (?:.?){9999} (\w+)*\d [\s\S] \1 (?<=a+)b (.*?,){40}P".split()


def tokenizer(draw: Random, folder: Path) -> str:
    """The tokenizer of a checkpoint or data folder: its files, its chat template, the pattern that splits words."""
    kind = draw.randrange(8)
    if kind < 5:
        return json_file(draw, folder / ("tokenizer.json" if kind < 4 else "tokenizer_config.json"))
    template = draw.choice([draw.choice(TEMPLATES).encode(), corrupt(draw, CHAT_TEMPLATE.encode())])
    if kind == 5:
        (folder / "chat_template.jinja").write_bytes(template)
    elif kind == 6:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = template.decode(errors="replace")
        (folder / "tokenizer_config.json").write_bytes(dump(config))
    elif draw.random() < 0.5:
        place(draw, folder / draw.choice(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]))
    else:
        document = json.loads((folder / "tokenizer.json").read_text())
        split = document["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        split["Regex"] = draw.choice([*PATTERNS, "", nasty(draw)])
        (folder / "tokenizer.json").write_bytes(dump(document))
    return ""


def checkpoint(draw: Random, folder: Path) -> str:
    kind = draw.randrange(10)
    weights = {"parts": "model-00001-of-00002.safetensors", "pickled": "pytorch_model.bin"}
    weights = folder / weights.get(folder.name, "model.safetensors")
    if kind < 3:
        return json_file(draw, folder / "config.json")
    if kind < 7:
        return pickle_file(draw, weights) if weights.suffix == ".bin" else safetensors_file(draw, weights)
    if kind == 8:
        return tokenizer(draw, folder)
    return place(draw, draw.choice([*sorted(folder.iterdir()), folder / ".saved", folder / ".saving"]))
