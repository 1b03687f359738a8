"""Hands the stages ten thousand broken files and command lines, and looks how they take it.

    python tests/fuzz.py --cases=10000 --out=results/fuzz.csv     all of it, by hand: some minutes
    python tests/fuzz.py --only=tokenizer --case=123              one case once more, with everything it says

People download checkpoints, tokenizers and data from strangers, copies are cut off, disks rot, hands mistype. So every
kind of file that is read is made from a good one and damaged: bits flip, ends are missing, JSON has keys too few, twice
or of another type, numbers are huge or NaN, texts hold half characters and zero bytes, lists are nested ten thousand
deep, links lead out of the folder, a pickle asks for a program to be run. Then the real entry point reads it, as far as
one training step or a few tokens. What must hold:

    works, or ends in one line     `error: ...` on stderr and exit status 2. The line must be one that somebody wrote: a
                                   ValueError that Python raised inside our code names neither file nor option
    no silent wrong reading        a file that contradicts itself is refused, a tokenizer loses no text
    nothing hangs or eats memory   a case has SECONDS and PATIENCE of time, and MEMORY bytes
    nothing is written elsewhere   every case has a folder of its own; what lies beside it stays as it is, and what the
                                   process opens for writing, renames or removes is looked at (sys.addaudithook)

The damage is drawn from (seed, part, number of the case), so every case can be repeated. The cases run in processes
forked from this one, which has imported everything and computed nothing; where one dies, the next goes on behind it.

Options that ask for work (BUSY) are given no large numbers: a run that does as it was told does not hang. For the same
reason a chat template that computes for ever, or fills the memory, is not among the cases: it is a program, which is
kept from everything else here.
"""

import collections
import contextlib
import csv
import datetime
import io
import json
import math
import os
import pickle
import platform
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: no pool of threads, which a fork would not take along
os.environ["HF_HUB_OFFLINE"] = "1"
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import numpy as np  # noqa: E402
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
import torch  # noqa: E402
from helpers import TINY, TUNE, make_data, make_set, rows_of  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import convert  # noqa: E402
import dpo  # noqa: E402
import evaluate  # noqa: E402
import grpo  # noqa: E402
import model  # noqa: E402
import prepare_data  # noqa: E402
import sample  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
from nanodoge import tokenizer  # noqa: E402
from nanodoge.options import HERE, is_out_of_memory, parse_options, run_command  # noqa: E402
from nanodoge.run import Run  # noqa: E402

SOURCES = [*HERE.glob("*.py"), *HERE.glob("nanodoge/*.py")]
LINES = {str(path): path.read_text(encoding="utf-8").splitlines() for path in SOURCES}
SECONDS = 20  # of a case, on the processor
PATIENCE = 120  # seconds on the clock
MEMORY = 1 << 30  # bytes that a process may take beyond what it was forked with
AT_A_TIME = 1000  # cases of one process: the libraries keep a little of each


@dataclass
class Options:
    """What fuzz.py is asked to do."""

    cases: int = 10_000  # of all parts
    seed: int = 0  # of the damage
    only: list[str] = field(default_factory=list)  # these parts of the table; empty = all
    case: int = -1  # this case of the parts alone, in this process, with all it prints
    out: str = ""  # csv file to write, empty = none


# ---------------------------------------------------------------------------------------------------------------------
# Damage

TEXTS = ["", " ", "\0", "a\0b", "\ud800", "\udcff", "../x", "..", ".", "/dev/null", "x" * 5000, "\n", "\u2028",
         "é\u202e", "<|pad|>", "None", "nan", "1e999", "-1", "1_0", "²", "٣", "true", "{}", "%s", "--resume", "a,b",
         "C:\\x"]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 2**16, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5,
           1e300, 5e-324, -1e9, math.nan, math.inf, -math.inf]  # fmt: skip
DEEP = "@deep@"  # stands for lists in lists, which json cannot write


def nasty(draw):
    """Some value that is probably not what stood there."""
    kind = draw.randrange(10)
    if kind < 4:
        return draw.choice(NUMBERS)
    if kind < 7:
        return draw.choice(TEXTS)
    return draw.choice([None, True, False, [], {}, [[]], [None], {"": None}, [1, "a"], DEEP, {"a": {"b": []}}])


def corrupt(draw, data):
    """Bytes -> bytes: bits flipped, a stretch removed, doubled, overwritten or moved, the end cut off."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5, 20])):
        place, size = draw.randrange(len(data) + 1), draw.choice([1, 1, 2, 4, 8, 64])
        kind = draw.randrange(7)
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
    """Changes one place of nested dicts and lists: another value, one less, one more, two exchanged, a number off."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and draw.random() < 0.8:
            value = value[key]
            continue
        kind, number = draw.randrange(8), type(value[key]) in (int, float)
        if number and kind < 3:
            value[key] = draw.choice([value[key] + 1, value[key] - 1, 2 * value[key], -value[key], 0.5])
        elif kind == 3:
            del value[key]
        elif kind == 4:
            other = draw.choice(keys)
            value[key], value[other] = value[other], value[key]
        elif kind == 5 and isinstance(value, dict):
            value[str(nasty(draw))[:50]] = value[key]
        else:
            value[key] = nasty(draw)
        return


def write_json(path, value):
    """Writes JSON with whatever is in it, NaN, half characters and depth too."""
    depth = 100_000
    text = json.dumps(value).replace(json.dumps(DEEP), "[" * depth + "]" * depth)
    path.write_bytes(text.encode())


def damage_json(draw, path):
    """-> why the file must be refused, "" if it need not be."""
    if draw.random() < 0.25:
        path.write_bytes(corrupt(draw, path.read_bytes()))
        return ""
    value = json.loads(path.read_bytes())
    if draw.random() < 0.1:  # a key twice
        key = draw.choice(list(value))
        write_json(path, value)
        text = path.read_text()
        path.write_text("{" + json.dumps(key) + ": 77, " + text[1:])
        return f"{key} has two values"
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        twist(draw, value)
    write_json(path, value)
    return ""


def damage_place(draw, path):
    """What stands in a file's place is not a file, or not there."""
    kind = draw.randrange(5)
    target = dict(enumerate(["/dev/zero", "../beside/secret", path.name, "../beside"])).get(kind)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if target:
        path.symlink_to(target)
    elif draw.random() < 0.3:
        path.mkdir()
    elif draw.random() < 0.3:
        os.mkfifo(path)
    elif draw.random() < 0.5:
        path.write_bytes(b"")


def damage_numbers(draw, path, dtype):
    """A file of numbers: some become others. -> whether it is of another length."""
    data = np.fromfile(path, dtype)
    kind = draw.randrange(5)
    if kind == 0:
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    elif kind == 1:
        path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice([1, 2, 8, 4096])))
    else:
        info = np.iinfo(dtype)
        for _ in range(draw.choice([1, 3, len(data)])):
            value = draw.choice([info.max, info.min, 0, 1, 2, 400, draw.randint(info.min, info.max)])
            data[draw.randrange(len(data))] = min(value, info.max)
        data.tofile(path)
    return kind < 2


def damage_safetensors(draw, path):
    """-> why the file must be refused, or ""."""
    data, kind = path.read_bytes(), draw.randrange(6)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if kind == 0:
        path.write_bytes(corrupt(draw, data[: 8 + size]) + body)
        return ""
    if kind == 1:
        path.write_bytes(data[: draw.randrange(len(data))])
        return "it is cut off"
    if kind == 2:
        path.write_bytes(struct.pack("<Q", draw.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])) + data[8:])
        return ""
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw.choice([1, 1, 2])):
        entry = header[draw.choice(names)]
        what = draw.randrange(5)
        if what == 0:
            entry["dtype"] = draw.choice(["F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64", "F4", "x"])
        elif what == 1:
            entry["shape"] = draw.choice([entry["shape"][::-1], [], [2**62, 4], [-1], [0], [2**32, 2**32], [1] * 200])
        elif what == 2:
            other = header[draw.choice(names)]["data_offsets"]
            entry["data_offsets"] = draw.choice([other, [0, 0], [0, 2**63], entry["data_offsets"][::-1], [5, 2**64]])
        else:
            twist(draw, header)
            names = [name for name in header if isinstance(header[name], dict) and name != "__metadata__"]
            names = [name for name in names if {"dtype", "shape", "data_offsets"} <= header[name].keys()]
            if not names or not all(isinstance(header[name]["shape"], list) for name in names):
                break
    text = json.dumps(header).replace(json.dumps(DEEP), "[" * 10_000 + "]" * 10_000).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return ""


class Program:
    """What a hostile pickle would like to have done: it makes the file `owned`."""

    def __reduce__(self):
        return open, ("owned", "w")


def damage_pickle(draw, path):
    """-> why the file must be refused, or ""."""
    kind = draw.randrange(6)
    if kind == 0:
        path.write_bytes(corrupt(draw, path.read_bytes()))
        return ""
    state = torch.load(path, weights_only=True)
    if kind == 1:
        state[draw.choice(list(state))] = Program()
        if draw.random() < 0.3:
            path.write_bytes(pickle.dumps(state))
        else:
            torch.save(state, path)
        return "it asks for a program to be run"
    if kind == 2:  # inside the archive, where no checksum is looked at
        data = path.read_bytes()
        begin = data.find(b"data.pkl") + 8
        path.write_bytes(data[:begin] + corrupt(draw, data[begin : begin + 3000]) + data[begin + 3000 :])
        return ""
    for _ in range(draw.choice([1, 1, 2])):
        twist_state(draw, state)
    torch.save(state, path)
    return ""


def twist_state(draw, state):
    """As twist; tensors become others too."""
    optimizer = state.get("optimizer")
    if isinstance(optimizer, dict) and draw.random() < 0.5:
        name = draw.choice(list(optimizer))
        entry = optimizer[name]
        if isinstance(entry, dict) and entry and draw.random() < 0.8:
            key = draw.choice(list(entry))
            tensor = entry[key] if isinstance(entry[key], torch.Tensor) else torch.ones(())
            entry[key] = draw.choice([tensor[None], tensor.flatten()[:1], tensor.double(), tensor.long(),
                                      torch.ones(()), torch.zeros(0), tensor.to(torch.complex64), tensor * math.nan,
                                      nasty(draw)])  # fmt: skip
            if draw.random() < 0.2:
                del entry[key]
            return
    twist(draw, state)


# ---------------------------------------------------------------------------------------------------------------------
# Good files, to be damaged


def build(root):
    """Makes one of everything in root/good, and root/beside, which no case may touch. Computes gradients, so main gives
    it a process of its own."""
    good = root / "good"
    good.mkdir()
    (root / "beside").mkdir()
    (root / "beside" / "secret").write_text("secret")
    os.chdir(good)
    make_data(good / "data", count=30)
    train.main([*TRAIN, "--out_dir=run"])
    for name in ("training_state.pt", "log.csv"):
        shutil.copy(good / "run" / name, good)
    (good / "model").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "training_state.pt"):
        shutil.copy(good / "run" / name, good / "model")
    for kind in ("chat", "preferences", "problems"):
        make_set(good / kind, "model", kind, count=40)
    labelled = [dict(text=f"number {i}", label="ab"[i % 2]) for i in range(40)]
    make_set(good / "labels", "model", "labels", rows=labelled, labels=["a", "b"])
    for stage, argv in STAGES.items():
        if stage.startswith(("sft", "dpo", "grpo")):
            MAINS[stage]([*argv, "--max_steps=2", f"--out_dir={stage}-run"])
    split(good)


def split(good):
    """The same model in the other layouts: several files with an index, and a pickle."""
    weights = load_file(good / "model" / "model.safetensors")
    for layout in ("parts", "pickled"):
        shutil.copytree(good / "model", good / layout)
        (good / layout / "model.safetensors").unlink()
    names, files = sorted(weights), {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in names[i::2]}, good / "parts" / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names[i::2], file)
    (good / "parts" / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=files)))
    torch.save(weights, good / "pickled" / "pytorch_model.bin")


TRAIN = [*TINY, "--hidden_size=16", "--intermediate_size=16", "--num_hidden_layers=1", "--batch_tokens=32",
         "--data=data", "--max_steps=2", "--warmup_steps=0", "--decay_steps=0", "--save_every=1",
         "--eval_every=1"]  # fmt: skip
TUNED = [*TUNE, "--init_from=model", "--max_steps=1", "--sequence_length=96", "--batch_size=4", "--save_every=1",
         "--eval_every=1", "--eval_size=2"]  # fmt: skip
STAGES = {
    "train": [*TRAIN, "--out_dir=new"],
    "sft": [*TUNED, "--data=chat", "--out_dir=new", "--eval_answers=1"],
    "sft_labels": [*TUNED, "--kind=labels", "--data=labels", "--out_dir=new"],
    "dpo": [*TUNED, "--data=preferences", "--out_dir=new"],
    "grpo": [*TUNED, "--data=problems", "--out_dir=new", "--max_new_tokens=3", "--generations=2", "--batch_size=2"],
    "sample": ["model", "--max_new_tokens=3"],
    "evaluate": ["model", "--bpb=data", "--tokens=40"],
    "convert": ["model", "converted"],
    "prepare_data": ["text.txt", "--out=made", "--vocab_size=280", "--stories=5", "--workers=1", "--val_fraction=0.3",
                     "--piece_chars=100"],
}  # fmt: skip
MAINS = dict(train=train.main, sft=sft.main, sft_labels=sft.main, dpo=dpo.main, grpo=grpo.main, sample=sample.main,
             evaluate=evaluate.main, convert=convert.main, prepare_data=prepare_data.main)  # fmt: skip
CLASSES = dict(train=train.TrainOptions, sft=sft.SftOptions, sft_labels=sft.SftOptions, dpo=dpo.DpoOptions,
               grpo=grpo.GrpoOptions, sample=sample.SampleOptions, evaluate=evaluate.EvaluateOptions,
               convert=convert.ConvertOptions, prepare_data=prepare_data.PrepareOptions)  # fmt: skip
# They ask for work or for a network: not given large numbers, or left alone.
BUSY = {"batch_size", "batch_tokens", "generations", "updates_per_rollout", "num_samples", "max_new_tokens", "stories",
        "sources", "chat", "prompt", "file", "compile", "tasks", "suite", "include_path",
        "cache"}  # fmt: skip
KINDS = {"sft": "chat", "sft_labels": "labels", "dpo": "preferences", "grpo": "problems"}


# ---------------------------------------------------------------------------------------------------------------------
# The parts: each draws a case -> (main, argv, why it must be refused or "")


def bring(*names):
    """Copies good files into the case's folder, which is the current one."""
    for name in names:
        source = Path("..") / "good" / name
        if source.is_dir():
            shutil.copytree(source, name)
        else:
            shutil.copy(source, name)


def bring_for(stage):
    if stage == "prepare_data":
        Path("text.txt").write_text("the cat sees the dog and runs to the tree.\n\n" * 40)
    else:
        bring("model", KINDS.get(stage, "data"))


def word(draw):
    return str(nasty(draw)).replace(DEEP, "[" * 3000)


def command_line(draw):
    stage = draw.choice(list(STAGES))
    argv, names = list(STAGES[stage]), [f.name for f in fields(CLASSES[stage]) if f.name not in BUSY]
    bring_for(stage)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kind, name = draw.randrange(10), draw.choice(names).rstrip("_")
        if kind < 6:
            argv.append(f"--{name}={word(draw)}")
        elif kind == 6:
            argv.append(f"--{name}")
        elif kind == 7:
            argv.append(f"--{name[: draw.randrange(len(name))]}{word(draw)}")
        elif kind == 8:
            argv.append(draw.choice(["--", "-", "", "=", "--=", "--config=", "--config=data", "--help", word(draw)]))
        elif argv[-1].startswith("--") and not argv[-1].startswith(("--data", "--out", "--stories")):
            argv.pop()
    argv = [argument.replace("\0", "") for argument in argv]  # no command line can hold one
    return MAINS[stage], argv, ""


SOURCES = ["1e999", "__import__('os').system('touch owned')", "[1] * 10**9", "-" * 3000 + "1", "(" * 300 + ")" * 300,
           "'\\ud800'", "'a\\0b'", "0x" + "f" * 6000, "9" * 6000, "b'x'", "{}", "...", "1j", "f'{1}'",
           "open('owned', 'w')", "[[[]]]", "None", "not True", "1 if 1 else 2", "lambda: 0", "'''", "\\", "nan",
           "{1: 2, **{}}", "{[]: 1}", "((1, 2), 3)", "+1", "1 + 1j", "'a' 'b'", "" "True"]  # fmt: skip


def config_file(draw):
    stage = draw.choice([stage for stage in STAGES if stage != "convert"])
    bring_for(stage)
    given = [argument[2:].partition("=") for argument in STAGES[stage] if argument.startswith("--")]
    words = [argument for argument in STAGES[stage] if not argument.startswith("--")]
    lines = [f"{name} = {value if value.replace('.', '').isdigit() else repr(value)}" for name, _, value in given]
    for _ in range(draw.choice([0, 1, 1, 2])):
        name = draw.choice([f.name for f in fields(CLASSES[stage]) if f.name not in BUSY])
        value = draw.choice([draw.choice(SOURCES), repr(nasty(draw)).replace(DEEP, "[" * 3000)])
        lines.insert(draw.randrange(len(lines) + 1), f"{name} = {value}")
    data = "\n".join(lines).encode(errors="surrogatepass")
    if draw.random() < 0.5:
        data = corrupt(draw, data)
    Path("c.py").write_bytes(data)
    if draw.random() < 0.05:
        damage_place(draw, Path("c.py"))
    kept = BUSY | {"data", "out", "tokens"}
    safe = [argument for argument in STAGES[stage] if argument.partition("=")[0][2:] in kept]
    return MAINS[stage], [*words, "--config=c.py", *safe], ""


TEMPLATES = ["{% for i in range(10**9) %}a{% endfor %}", "{{ messages[99].x.y }}", "{{ 1 / 0 }}", "{{ messages + 1 }}",
             "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no\nno') }}", "{% if", "{{ messages | tojson }}",
             "{{ x.y }}", "{{ '%d' % 'a' }}", "{{ messages[0]['content'][::0] }}", "{{ [] | first }}",
             "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ bos_token }}", "", "{{ 'a'.encode('x') }}",
             "{{ range(-1)[5] }}", "{% include 'x' %}", "{% import 'os' as os %}", "{{ messages | map('x') | list }}",
             "{{ messages | batch(0) | list }}", "{{ 'é' | urlize }}",
             "{% for m in messages %}{{ m.content | upper }}{% endfor %}", "{{ strftime_now('%Y') }}",
             "{{ [1] | sum('x') }}", "{{ 'x'.format_map(messages) }}", "{{ messages | xmlattr }}",
             "{{ dict(a=1, **1) }}"]  # fmt: skip


def damage_tokenizer(draw, folder):
    folder = Path(folder)
    kind = draw.randrange(8)
    if kind < 4:
        return damage_json(draw, folder / "tokenizer.json")
    if kind == 4:
        return damage_json(draw, folder / "tokenizer_config.json")
    template = draw.choice([draw.choice(TEMPLATES).encode(), corrupt(draw, tokenizer.CHAT_TEMPLATE.encode())])
    if kind == 5:
        (folder / "chat_template.jinja").write_bytes(template)
    elif kind == 6:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = template.decode(errors="replace")
        write_json(folder / "tokenizer_config.json", config)
    elif draw.random() < 0.5:
        damage_place(draw, folder / draw.choice(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]))
    else:
        document = json.loads((folder / "tokenizer.json").read_text())
        split = document["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        split["Regex"] = draw.choice([r"a", r"(a+)+b", "", "(", r"\p{X}", r"(?=a)", r".", r"\w+|\s", "x*",
                                      r"(?:.?){9999}", r"(\w+)*\d", r"[\s\S]", r"\1", "(?<=a+)b", r"(.*?,){40}P",
                                      nasty(draw)])  # fmt: skip
        write_json(folder / "tokenizer.json", document)
    return ""


PROBE = "The cat's 12345 blue  dogs\n\n\tran: \u00e9t\u00e9, \u6f22\u5b57 \U0001f600!? " + "a" * 40 + " " * 30
PROBE += "<|pad|>\0\x7f"


def use_tokenizer(argv):
    """What every stage does with one."""
    tok = tokenizer.Tokenizer.load(argv[0])
    ids = tok.encode(PROBE)
    assert tok.decode(ids) == PROBE, "text is lost"
    assert all(0 <= i < tok.vocab_size for i in [*ids, tok.bos_id, tok.eos_id, tok.pad_id])
    assert tok.encode_batch([PROBE])[0].tolist() == ids
    tok.save("saved")
    again = tokenizer.Tokenizer.load("saved")
    assert again.digest == tok.digest and again.encode(PROBE) == ids
    messages = [dict(role="user", content=PROBE), dict(role="assistant", content="so")]
    ids, mask = tok.render(messages)
    assert len(ids) == len(mask) and all(0 <= i < tok.vocab_size for i in ids)


def tokenizer_files(draw):
    Path("model").mkdir()
    bring("model/tokenizer.json", "model/tokenizer_config.json")
    return use_tokenizer, ["model"], damage_tokenizer(draw, "model")


def text_data(draw):
    stage = draw.choice(["train", "evaluate", "evaluate"])
    bring_for(stage)
    kind, must, folder = draw.randrange(8), "", Path("data")
    if kind < 3:
        must = damage_json(draw, folder / "meta.json")
    elif kind == 3 and stage == "train":
        must = damage_tokenizer(draw, folder)
        meta = json.loads((folder / "meta.json").read_text())  # made to fit, or nothing would look inside
        with contextlib.suppress(ValueError, OSError):
            meta["tokenizer_sha256"] = tokenizer.Tokenizer.load(folder).digest
        (folder / "meta.json").write_text(json.dumps(meta))
    elif kind == 4:
        damage_place(draw, folder / draw.choice(["meta.json", "train.bin", "val.bin", "tokenizer.json"]))
    else:
        split = draw.choice(["train", "val"] if stage == "train" else ["val"])
        if damage_numbers(draw, folder / f"{split}.bin", "<u2"):
            must = "its length is not that of meta.json"
    return MAINS[stage], STAGES[stage], must


def tuning_data(draw):
    stage = draw.choice(["sft", "sft_labels", "dpo", "grpo"])
    bring_for(stage)
    folder, kind, must = Path(KINDS[stage]), draw.randrange(8), ""
    split = draw.choice(["train", "val"])
    if kind < 3:
        must = damage_json(draw, folder / "meta.json")
    elif kind == 3 and stage == "grpo":
        path = folder / f"{split}.answers.jsonl"
        lines = path.read_text().splitlines()
        answers = ["", "{}", "[]", '{"answer": 1}', '{"answer": "\\ud800"}', "{", '{"answer": ' + "[" * 5000, "null"]
        lines[draw.randrange(len(lines))] = draw.choice(answers)
        path.write_bytes(corrupt(draw, path.read_bytes()) if draw.random() < 0.5 else "\n".join(lines).encode())
    elif kind == 4:
        damage_place(draw, draw.choice(sorted(folder.iterdir())))
    elif kind == 5:
        must = damage_tokenizer(draw, folder)
    else:
        name, dtype = draw.choice([("ids", "<u2"), ("mask", "u1"), ("offsets", "<i8"), ("offsets", "<i8")])
        if damage_numbers(draw, folder / f"{split}.{name}.bin", dtype):
            must = "its length is not that of meta.json"
    return MAINS[stage], STAGES[stage], must


def some_rows(draw, kind):
    """Good rows with a few bad ones among them."""
    if kind == "labels":
        rows = [dict(text=f"number {i}", label="ab"[i % 2]) for i in range(12)]
    elif kind == "text":
        rows = [dict(text=f"number {i} and so on") for i in range(12)]
    else:
        rows = list(rows_of(kind, 12, seed=draw.randrange(99)))
    for _ in range(draw.choice([0, 1, 1, 3])):
        twist(draw, rows)
    if draw.random() < 0.1:
        rows[draw.randrange(len(rows)) if rows else 0 :] = [nasty(draw)]
    return rows


def rows(draw):
    kind = draw.choice(["text", "chat", "preferences", "problems", "labels"])
    made, folder = some_rows(draw, kind), Path("in")
    suffix = draw.choice(["jsonl", "jsonl", "jsonl.gz", "parquet", "parquet"])
    folder.mkdir()
    path = folder / f"a.{suffix}"
    if suffix == "parquet":
        with contextlib.suppress(pyarrow.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)
        if not path.exists():
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some_rows(random.Random(1), "text")), path)
    else:
        lines = [json.dumps(row, ensure_ascii=draw.random() < 0.9) for row in made]
        data = "\n".join(lines).replace(json.dumps(DEEP), "[" * 20_000).encode(errors="surrogatepass")
        with pyarrow.output_stream(str(path), compression="detect") as file:
            file.write(data)
    if draw.random() < (0.5 if suffix != "jsonl" else 0.3):
        path.write_bytes(corrupt(draw, path.read_bytes()))
    if draw.random() < 0.03:
        damage_place(draw, path)
    argv = [draw.choice(["in", str(path)]), "--out=made", "--val_fraction=0.4", "--workers=1", f"--kind={kind}"]
    argv += ["--tokens=200"] * (draw.random() < 0.2)
    argv += ["--tokenizer=model"] if kind != "text" else ["--vocab_size=270"]
    argv += ["--labels=a,b"] * (kind == "labels")
    if kind != "text":
        Path("model").mkdir()
        bring("model/tokenizer.json", "model/tokenizer_config.json")
    return prepare_data.main, argv, ""


def damage_checkpoint(draw, folder):
    folder, kind, must = Path(folder), draw.randrange(10), ""
    weights = {"parts": "model-00001-of-00002.safetensors", "pickled": "pytorch_model.bin"}
    weights = folder / weights.get(folder.name, "model.safetensors")
    if kind < 3:
        must = damage_json(draw, folder / "config.json")
    elif kind < 7:
        must = damage_pickle(draw, weights) if weights.suffix == ".bin" else damage_safetensors(draw, weights)
    elif kind == 7 and folder.name == "parts":
        must = damage_json(draw, folder / "model.safetensors.index.json")
    elif kind == 8:
        must = damage_tokenizer(draw, folder)
    else:
        damage_place(draw, draw.choice([*sorted(folder.iterdir()), folder / ".saved", folder / ".saving"]))
    return must


def checkpoint(draw):
    stage = draw.choice(["sample", "sample", "sample", "sft"])
    layout = draw.choice(["model", "model", "parts", "pickled"])
    bring(layout, *["chat"] * (stage == "sft"))
    must = damage_checkpoint(draw, layout)
    argv = [layout, "--max_new_tokens=3"] if stage == "sample" else [*STAGES[stage], f"--init_from={layout}"]
    return MAINS[stage], argv, must


def convert_source(draw):
    layout = draw.choice(["model", "parts", "pickled"])
    bring(layout)
    argv = [layout, "converted", f"--for={draw.choice(['nanodoge', 'transformers'])}"]
    return convert.main, argv, damage_checkpoint(draw, layout)


def resume(draw):
    stage = draw.choice(["train", "train", "sft", "dpo", "grpo"])
    run = Path("run" if stage == "train" else f"{stage}-run")
    bring(run.name, KINDS.get(stage, "data"))
    kind, must, more = draw.randrange(10), "", ["--max_steps=3"] * (stage == "train")
    if kind < 5:
        must = damage_pickle(draw, run / "training_state.pt")
    elif kind < 7:
        log = run / draw.choice(["log.csv", "samples.jsonl"])
        if log.is_file():
            log.write_bytes(draw.choice([corrupt(draw, log.read_bytes()), log.read_bytes() + draw.randbytes(50),
                                         log.read_bytes().replace(b"1", "²".encode()), b"step\n" + b"9" * 5000 + b"\n",
                                         b'"' + b"a" * 200_000, log.read_bytes().replace(b",", b",nan"),
                                         b'{"step": "x"}\n', b"[]}\n", b'{"a": ' + b"[" * 9000 + b"}\n"]))  # fmt: skip
    elif kind == 7:
        names = ["log.csv", "log.csv.new", "samples.jsonl.new", ".saved", ".saving", "loss.png", "training_state.pt"]
        damage_place(draw, run / draw.choice(names))
    elif stage == "train" and kind == 8:
        bring("model")
        must = damage_pickle(draw, Path("model/training_state.pt"))
        return train.main, [*STAGES["train"], "--init_from=model"], must
    else:
        must = damage_checkpoint(draw, run)
    return MAINS[stage], ["--resume", f"--out_dir={run}", *more], must


# part: (how it draws a case, its share of the cases)
PARTS = {"command_line": (command_line, 16), "config_file": (config_file, 14), "tokenizer": (tokenizer_files, 16),
         "text_data": (text_data, 8), "tuning_data": (tuning_data, 9), "rows": (rows, 14),
         "checkpoint": (checkpoint, 10), "convert": (convert_source, 5), "resume": (resume, 8)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# A case


class Hang(BaseException):
    """The time of a case is over."""


def ring(number, frame):
    raise Hang(f"more than {SECONDS} seconds")


@contextlib.contextmanager
def shortened():
    """One training step, a few tokens, no picture, and no waiting for the disk."""
    steps, stream = Run.steps, model.Doge.stream

    def one_step(self):
        for step in steps(self):
            yield step
            return

    def few(self, *args, **kwargs):
        for _, token in zip(range(4), stream(self, *args, **kwargs), strict=False):
            yield token

    with (
        mock.patch.object(Run, "steps", one_step),
        mock.patch.object(model.Doge, "stream", few),
        mock.patch("nanodoge.run.plot_loss", lambda *paths: None),
        mock.patch.object(os, "fsync", lambda fd: None),
    ):
        yield


def attempt(main, argv, must):
    """Runs main(argv) as its command line would -> "worked" or "refused", or what went wrong, and what it said."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    before, result = signal.signal(signal.SIGPROF, ring), "worked"
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with mock.patch.object(sys, "argv", ["fuzz.py", *argv]):
                run_command(main)
    except SystemExit as stop:
        result = why_refused(stop) if stop.code == 2 else "worked" if not stop.code else f"exit status {stop.code}"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in place if Path(frame.filename).parent in (HERE, HERE / "nanodoge")]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        result = f"{type(error).__name__} at {where}: {str(error)[:200]}"
        traceback.print_exc(file=err)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    err.seek(0)
    said = err.read()
    if result == "refused" and (said.count("\n") != 1 or not said.startswith("error: ")):
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if len(errors) != 1 or said.splitlines()[-1] != errors[0]:
            result = f"not one line: {said[:200]}"
    if result == "worked" and must:
        result = f"read in silence, though {must}"
    return result, said


def why_refused(stop):
    """Whether the line that ended a run was meant to be: an OSError, or a ValueError that our code raises itself."""
    error = stop.__context__
    if is_out_of_memory(error):
        return f"out of memory: {str(error)[:200]}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = LINES.get(frame.filename, [""] * frame.lineno)[frame.lineno - 1]
    if "out of memory" in str(error):
        return f"out of memory: {error}"
    if isinstance(error, OSError) or line.strip().startswith("raise "):
        return "refused"
    return f"{type(error).__name__} that nobody wrote at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:100]}"


def stands_as_it_was(root):
    return (
        (root / "beside" / "secret").read_text() == "secret"
        and sorted(p.name for p in root.iterdir()) == ["beside", "case", "good"]
        and [p.name for p in (root / "beside").iterdir()] == ["secret"]
    )


def run_case(root, part, number, seed):
    """One case in the folder root/case -> its result (see attempt) and what it said."""
    place = root / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.chdir(place)
    main, argv, must = PARTS[part][0](random.Random(f"{seed} {part} {number}"))
    OUTSIDE.clear()
    with shortened():
        result, said = attempt(main, argv, must)
    told = part in ("command_line", "config_file")  # there the user may have named the place, and asked for much
    if told:
        result = "refused" if result.startswith("out of memory") else result
        for path in root.iterdir():
            if path.name not in ("beside", "case", "good"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif OUTSIDE:
        result = f"wrote {OUTSIDE[0]}"
    if not stands_as_it_was(root) or (place / "owned").exists():
        raise RuntimeError(f"{part} {number}: it reached out of its folder, or ran a program: {argv}")
    return result, f"{argv}\n{said}"


OUTSIDE = []  # what the current case wrote, renamed or removed outside its folder


def watch(event, args):
    """An audit hook (see sys.addaudithook)."""
    if event == "open" and (not isinstance(args[0], str | bytes) or not args[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
        return
    for path in args[: 2 if event == "os.rename" else 1]:
        if isinstance(path, int):
            continue
        path = os.fsdecode(path)
        if event == "os.mkdir" and os.path.isdir(path):
            continue  # it is there
        real = os.path.realpath(path) if event in ("open", "os.truncate") else os.path.realpath(os.path.dirname(path))
        if "/case" not in real and real != "/dev/null":
            OUTSIDE.append(f"{event} {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Many cases


def fork(work):
    """-> process id, and where to read what work(write) writes there."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    if child := os.fork():
        os.close(writing)
        return child, reading
    try:
        work(lambda line: os.write(writing, line.encode(errors="backslashreplace")))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def worker(root, part, numbers, seed):
    def work(write):
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
        sys.addaudithook(watch)
        for number in numbers:
            write(json.dumps([number, *run_case(root, part, number, seed)]) + "\n")

    return work


def run_part(root, part, count, seed):
    """-> a row of the table."""
    results, failures, start, numbers = collections.Counter(), {}, time.monotonic(), list(range(count))
    while numbers:
        child, reading = fork(worker(root, part, numbers[:AT_A_TIME], seed))
        rest, ended = b"", False
        while not ended:
            if not select.select([reading], [], [], PATIENCE)[0]:
                os.kill(child, signal.SIGKILL)
                break
            block = os.read(reading, 1 << 16)
            *lines, rest = (rest + block).split(b"\n")
            ended = not block
            for line in lines:
                number, result, said = json.loads(line)
                assert number == numbers.pop(0)
                results[result if result in ("worked", "refused") else "failed"] += 1
                if result not in ("worked", "refused"):
                    failures[number] = result
                    print(f"{part} {number}: {result}", flush=True)
        os.close(reading)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if numbers and (status or not ended):
            number = numbers.pop(0)
            results["failed"] += 1
            failures[number] = f"the process ended with status {status}"
            print(f"{part} {number}: {failures[number]}", flush=True)
    note = "; ".join(f"{number}: {what}" for number, what in list(failures.items())[:3])
    return dict(part=part, cases=count, refused=results["refused"], worked=results["worked"],
                failures=results["failed"], seconds=round(time.monotonic() - start), note=note)  # fmt: skip


COLUMNS = "part cases refused worked failures seconds note date python torch".split()


def shares(cases, parts):
    """How many of the cases each part gets."""
    weights = {part: PARTS[part][1] for part in parts}
    counts = {part: cases * weight // sum(weights.values()) for part, weight in weights.items()}
    counts[next(iter(counts))] += cases - sum(counts.values())
    return counts


def main(argv):
    options, table = parse_options(Options, argv), []
    for part in options.only:
        if part not in PARTS:
            raise ValueError(f"--only={part} is not one of {' '.join(PARTS)}")
    sys.dont_write_bytecode = True
    out = Path(options.out).absolute()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), shortened():
            child, reading = fork(lambda write: build(root))
        os.close(reading)
        assert os.waitpid(child, 0)[1] == 0, "the good files cannot be made"
        for part, count in shares(options.cases, options.only or list(PARTS)).items():
            if options.case >= 0:
                print(part, options.case, *run_case(root, part, options.case, options.seed), sep="\n")
                continue
            table.append(run_part(root, part, count, options.seed))
            print(*(f"{key}={table[-1][key]}" for key in COLUMNS[:7]), sep="  ", flush=True)
        os.chdir(TESTS)
    if options.out:
        facts = dict(date=datetime.date.today().isoformat(), python=platform.python_version(), torch=torch.__version__)
        with open(out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | facts for row in table)
    sys.exit(1 if any(row["failures"] for row in table) else 0)


if __name__ == "__main__":
    run_command(main)
