"""Damage for tests/fuzz.py: changes good files into bad ones, as copying, disks, users and attackers do.

Every function draws what it does from `draw`, so that the same seed damages in the same way.
"""

import json
import math
import os
import pickle
import shutil
import struct

import numpy as np
import torch

from nanodoge.tokenizer import CHAT_TEMPLATE

TEXTS = ["", " ", "\0", "a\0b", "\ud800", "\udcff", "\n", "\u2028", "é\u202e", "x" * 5000]
TEXTS += "../x .. . /dev/null <|pad|> None nan 1e999 -1 1_0 ² ٣ true {} %s --resume a,b C:\\x".split()
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 2**16, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 10**400]
NUMBERS += [0.0, -0.0, 0.5, 1.5, 1e300, 5e-324, -1e9, math.nan, math.inf, -math.inf]
DTYPES = dict(mask="u1", offsets="<i8")  # of train.NAME.bin; "<u2" of all others
DEEP = "@deep@"  # stands for lists in lists, too deep for json to write
OTHERS = [None, True, False, [], {}, [[]], [None], {"": None}, [1, "a"], DEEP, {"a": {"b": []}}]


def nasty(draw):
    """A value that probably does not fit."""
    return draw.choice(draw.choices([NUMBERS, TEXTS, OTHERS], [4, 3, 3])[0])


def as_text(value):
    return str(value).replace(DEEP, "[" * 3000).replace("\0", "")  # no command line can hold a zero byte


def corrupt(draw, data):
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


def twist(draw, value):
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
        break


def dump(value, depth=100_000):
    """JSON of any value: with NaN, half characters, and DEEP as that many nested lists."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode()


# These change a file, or one of a folder, and return why it must be refused, if it must.


def json_file(draw, path):
    if draw.random() < 0.25:
        path.write_bytes(corrupt(draw, path.read_bytes()))
        return None
    value = json.loads(path.read_bytes())
    if draw.random() < 0.1:
        key = draw.choice(list(value))
        path.write_bytes(b"{" + json.dumps(key).encode() + b": 77, " + dump(value)[1:])
        return f"{key} has two values"
    if path.name == "tokenizer.json" and draw.random() < 0.1:
        value["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = draw.choice([*PATTERNS, "", nasty(draw)])
    elif path.name == "tokenizer_config.json" and draw.random() < 0.3:
        value["chat_template"] = template(draw).decode(errors="replace")
    else:
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            twist(draw, value)
    path.write_bytes(dump(value))


def place(draw, path):
    """Removes a file or folder, or puts a link, a folder, a pipe or an empty file there."""
    link = draw.choice(["/dev/zero", "../beside/secret", path.name, "../beside", ""])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if link:
        path.symlink_to(link)
    else:
        draw.choice([path.mkdir, lambda: os.mkfifo(path), path.touch, lambda: None])()


def numbers(draw, path):
    """Changes some numbers of a .bin file, or its length."""
    dtype = DTYPES.get(path.name.split(".")[1], "<u2")
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
    return "its length is not that of meta.json" if kind < 2 else None


def safetensors_file(draw, path):
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


def header_entry(draw, header):
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


def pickle_file(draw, path):
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


def training_state(draw, state):
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


LINES = ["", "{}", "[]", "{", "null", "[]}", '{"answer": 1}', '{"answer": "\\ud800"}', '{"answer": ' + "[" * 5000]
LINES += ["step\n" + "9" * 5000, '"' + "a" * 200_000, '{"step": "x"}', '{"a": ' + "[" * 9000 + "}"]


def lines(draw, path):
    """Changes a file of lines: answers or a log."""
    data, kind, bad = path.read_bytes(), draw.randrange(5), draw.choice(LINES).encode()
    if kind < 3:
        data = [corrupt(draw, data), data + draw.randbytes(50), bad][kind]
    elif kind == 3:
        data = data.replace(*draw.choice([(b"1", "²".encode()), (b",", b",nan")]))
    else:
        rows = data.splitlines()
        rows[draw.randrange(len(rows))] = bad
        data = b"\n".join(rows)
    path.write_bytes(data)


def template(draw):
    return draw.choice([draw.choice(TEMPLATES).encode(), corrupt(draw, CHAT_TEMPLATE.encode())])


BY_SUFFIX = {".json": json_file, ".safetensors": safetensors_file, ".pt": pickle_file, ".bin": numbers}
BY_SUFFIX |= {".csv": lines, ".jsonl": lines}


def some_file(draw, folder, words):
    """Damages one of the files of a folder that the words match, each as likely, or puts something else there."""
    paths = [sorted(folder.glob(word)) or [folder / word] * ("*" not in word) for word in words.split()]
    path = draw.choice(sum(paths, []))
    if path.suffix == ".jinja" and draw.random() < 0.9:
        path.write_bytes(template(draw))
    elif not path.is_file() or draw.random() < 0.1:
        place(draw, path)
    else:
        return (pickle_file if path.name == "pytorch_model.bin" else BY_SUFFIX[path.suffix])(draw, path)
    return None
