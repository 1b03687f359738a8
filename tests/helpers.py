"""What several tests need: a small data folder, a small checkpoint, a run of a few seconds."""

import contextlib
import csv
import faulthandler
import http.server
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import prepare_data
from model import Doge, DogeConfig
from nanodoge import tokenizer
from nanodoge.checkpoint import load_training_state, save_checkpoint
from nanodoge.options import run_command
from nanodoge.run import Run, read_log

TINY = """--hidden_size=32 --intermediate_size=48 --num_hidden_layers=2 --num_attention_heads=2
    --max_position_embeddings=16 --micro_batch_size=2 --batch_tokens=64 --max_steps=12 --warmup_steps=2
    --decay_steps=4 --learning_rate=3e-3 --log_every=1 --eval_every=4 --save_every=4
    --eval_tokens=100 --sample_tokens=0 --device=cpu --optimizer=adamw --copy_steps=0""".split()
TUNE = """--batch_size=8 --micro_batch_tokens=256 --max_steps=12 --learning_rate=3e-3 --log_every=1 --eval_every=4
    --save_every=4 --device=cpu --sequence_length=64 --optimizer=adamw --freeze_embeddings=false
    --sample_tokens=0""".split()
VOLATILE = ("seconds", "tokens_per_second", "memory_mb")  # columns of log.csv that differ between equal runs


# ---- Data and checkpoints


def texts(count, seed=0):
    draw = random.Random(seed).random
    words = "the a red blue cat dog sees finds ball tree house runs sleeps and then under over".split()
    return [" ".join(words[int(draw() * len(words))] for _ in range(5 + int(draw() * 20))) for _ in range(count)]


def make_data(folder, vocab_size=300, count=60, seed=0):
    """A data folder of texts, as prepare_data.py leaves it."""
    folder.mkdir(parents=True)
    tok = tokenizer.train_bpe(texts(200, seed=1), vocab_size)
    tok.save(folder)
    meta = dict(dtype="uint16", vocab_size=tok.vocab_size, tokenizer="tokenizer.json", tokenizer_sha256=tok.digest)
    for split, documents in (("train", texts(count, seed)), ("val", texts(12, seed + 100))):
        ids = [i for text in documents for i in (tok.bos_id, *tok.encode(text), tok.eos_id)]
        np.array(ids, dtype="<u2").tofile(folder / f"{split}.bin")
        meta[split] = dict(tokens=len(ids), bytes=sum(map(len, documents)), documents=len(documents))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def roughen(model):
    """The model with weights far from their initial values, so that no term is invisible."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += (0.5 if name.endswith(".A") or "dt_proj" in name else 0.1) * torch.randn(p.shape)
    return model.eval()


def make_checkpoint(folder, vocab_size=400, seed=0, **shape):
    """A checkpoint of a small model with random weights, and a tokenizer with a chat template."""
    tok = tokenizer.train_bpe(texts(300, seed=2), vocab_size)
    fields = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    fields |= dict(vocab_size=tok.vocab_size, num_key_value_heads=1, max_position_embeddings=64)
    torch.manual_seed(seed)
    save_checkpoint(folder, Doge(DogeConfig(**fields | shape)), tok)
    return folder


def write_weights(folder, state, parts=1, suffix="safetensors"):
    """Writes a state dict as `parts` files, with an index if these are several, of safetensors or pickles (bin)."""
    base = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{base}-{i + 1:05}-of-{parts:05}.{suffix}" for i in range(parts)] if parts > 1 else [f"{base}.{suffix}"]
    place = {name: names[i % parts] for i, name in enumerate(state)}
    for name in names:
        piece = {key: w for key, w in state.items() if place[key] == name}
        (save_file if suffix == "safetensors" else torch.save)(piece, folder / name)
    if parts > 1:
        (folder / f"{base}.{suffix}.index.json").write_text(json.dumps(dict(metadata={}, weight_map=place)))


def rows_of(kind, count, seed=0):
    """Yields rows of a data set of this kind, of different lengths and numbers of turns."""
    words, draw = iter(texts(9 * count, seed)), random.Random(seed).random
    for i in range(count):
        question = f"{next(words)} {i}"
        if kind == "preferences":
            yield dict(prompt=question, chosen=next(words), rejected=next(words) + " not")
        elif kind == "problems":
            yield dict(question=question, answer=f"{next(words)}\n#### {int(draw() * 100)}")
        else:
            messages = [dict(role="system", content=next(words))] if draw() < 0.3 else []
            for turn in range(1 + int(draw() * 3)):
                messages.append(dict(role="user", content=next(words) if turn else question))
                messages.append(dict(role="assistant", content=next(words)[: 20 + 10 * turn]))
            yield dict(messages=messages)


def make_set(folder, checkpoint, kind="chat", count=120, rows=None, **options):
    """A data folder of rows, made by prepare_data.py with the checkpoint's tokenizer."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = folder.with_name(folder.name + ".jsonl")
    if not source.exists():
        source.write_text("".join(json.dumps(row) + "\n" for row in rows or rows_of(kind, count)), encoding="utf-8")
    options = dict(val_fraction=0.2, tokenizer=str(checkpoint), kind=kind) | options
    return prepare_data.prepare(prepare_data.PrepareOptions([str(source)], str(folder), **options), quiet=True)


def write_csv(path, rows):
    """Writes rows, of which the first has all columns."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def serving(handler):
    """The address of a server in a thread of this process, whose requests `handler` answers."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# ---- Runs


def steady(rows):
    """Rows of log.csv without the columns that differ between equal runs."""
    return [{name: value for name, value in row.items() if name not in VOLATILE} for row in rows]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b):
    """Asserts that two checkpoint folders hold the same weights, bit for bit."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_run(a, b):
    """Asserts that two runs left the same log, weights and state of the optimizer, bit for bit."""
    assert steady(read_log(a / "log.csv")) == steady(read_log(b / "log.csv"))
    assert_same_weights(a, b)
    a, b = (load_training_state(folder)["optimizer"] for folder in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[name][key], b[name][key]) for name in b for key in b[name])


@contextlib.contextmanager
def stopped_after(steps):
    """Within it every run ends after this many of its own steps, as if it had no more to do."""
    every = Run.steps

    def some(self):
        for _, step in zip(range(steps), every(self), strict=False):
            yield step

    with patch.object(Run, "steps", some):
        yield


@contextlib.contextmanager
def gradients_seen():
    """Within it every clipping appends [(a parameter, its gradient), ...], copies, to the list that it gives."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        seen.append([(p.detach().clone(), p.grad.clone()) for p in parameters])
        return clip(parameters, limit)

    with patch.object(torch.nn.utils, "clip_grad_norm_", spy):
        yield seen


def assert_close_logs(a, b, names, tolerance):
    """Asserts that rows of two log.csv agree: the columns `names` within the tolerance, tokens and lr exactly."""
    for x, y in zip(a, b, strict=True):
        for name in names:
            assert x[name] == y[name] == "" or abs(float(x[name]) - float(y[name])) <= tolerance, name
        assert x["tokens"] == y["tokens"] and x["lr"] == y["lr"]


def refused(call, *words):
    """Asserts that `call` raises a ValueError of one line that holds all the words."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def assert_refused(run, folder, case):
    """Asserts that run(folder, *options) ends in one line and leaves no folder. case: "options | a pattern of it"."""
    options, pattern = case.split(" | ")
    with pytest.raises(ValueError, match=pattern) as error:
        run(folder, *options.split())
    assert "\n" not in str(error.value) and not folder.exists()


# Starting Python and torch takes seconds: processes are forked from one that has imported everything (not on Windows).
STARTED = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
STARTED.set_forkserver_preload("crash dpo grpo prepare_data sample sft train torch.distributed.fsdp".split())


def call(main, argv, rank, world_size, port, out, err):
    """The body of a process of `start`."""
    if hasattr(faulthandler, "register"):  # not on Windows
        faulthandler.register(signal.SIGUSR1)  # writes the stack
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [f"{main.__module__}.py", *argv]
    run_command(main)


def start(context, main, argv, out, err, world_size=1):
    """The started processes, one per rank, of what `python train.py ARGV` does with main = train.main. They append what
    they print to the files `out` and `err`. context: of multiprocessing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    each = [(main, argv, rank, world_size, port, out, err) for rank in range(world_size)]
    processes = [context.Process(target=call, args=args) for args in each]
    for process in processes:
        process.start()
    return processes


def command(main, argv, processes=1, timeout=120):
    """Runs a command line in processes of its own. Returns stdout and stderr of all ranks, and the returncode of the
    first that failed, else 0."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # for the one that imports
            started = start(STARTED, main, argv, *files, processes)
        for process in started:
            process.join(timeout)
            process.kill()
            process.join()
        out, err = (path.read_text(encoding="utf-8") for path in files)
    return SimpleNamespace(returncode=next((p.exitcode for p in started if p.exitcode), 0), stdout=out, stderr=err)


def tune(main, base, data, out, *options, processes=1):
    """Runs a tuning stage from the checkpoint `base` on the folder `data`, and returns the rows of its log.csv."""
    argv = [*TUNE, f"--init_from={base}", f"--data={data}", f"--out_dir={out}", *options]
    if processes > 1:
        done = command(main, argv, processes)
        assert done.returncode == 0, done.stderr
    else:
        main(argv)
    return read_log(out / "log.csv")
