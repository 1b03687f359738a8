"""What several tests need: a small data folder, a small model, a run in a few seconds."""

import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

import prepare_data
from model import Doge, DogeConfig
from nanodoge import tokenizer
from nanodoge.checkpoint import save_checkpoint
from nanodoge.options import run_command

TINY = ["--hidden_size=32", "--intermediate_size=48", "--num_hidden_layers=2", "--num_attention_heads=2",
        "--max_position_embeddings=16", "--micro_batch_size=2", "--batch_tokens=64", "--max_steps=12",
        "--warmup_steps=2", "--decay_steps=4", "--learning_rate=3e-3", "--log_every=1", "--eval_every=4",
        "--save_every=4", "--eval_tokens=100", "--sample_tokens=0", "--device=cpu", "--optimizer=adamw",
        "--copy_steps=0"]  # fmt: skip
VOLATILE = ("seconds", "tokens_per_second", "memory")  # columns of log.csv that differ between equal runs


def texts(count, seed=0):
    draw = random.Random(seed).random
    words = "the a red blue cat dog sees finds ball tree house runs sleeps and then under over".split()
    return [" ".join(words[int(draw() * len(words))] for _ in range(5 + int(draw() * 20))) for _ in range(count)]


def make_data(folder, vocab_size=300, count=60, seed=0):
    """A data folder as prepare_data.py leaves it."""
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


TUNE = ["--batch_size=8", "--micro_batch_tokens=256", "--max_steps=12", "--learning_rate=3e-3", "--log_every=1",
        "--eval_every=4", "--save_every=4", "--device=cpu", "--sequence_length=64", "--optimizer=adamw",
        "--freeze_embeddings=false"]  # fmt: skip


def make_checkpoint(folder, vocab_size=400, seed=0, **shape):
    """A small model with random weights, and a tokenizer that can chat, as train.py leaves them."""
    tok = tokenizer.train_bpe(texts(300, seed=2), vocab_size)
    fields = dict(vocab_size=tok.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(seed)
    save_checkpoint(folder, Doge(DogeConfig(**fields | shape)), tok)
    return folder


def rows_of(kind, count, seed=0):
    """Rows of a data set of this kind: of some length, of one or several turns."""
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
                messages += [dict(role="user", content=next(words) if turn else question),
                             dict(role="assistant", content=next(words)[: 20 + 10 * turn])]  # fmt: skip
            yield dict(messages=messages)


def make_set(folder, checkpoint, kind="chat", count=120, rows=None, **options):
    """A data folder of rows, made by prepare_data.py with the checkpoint's tokenizer."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = folder.with_name(folder.name + ".jsonl")
    if not source.exists():
        source.write_text("".join(json.dumps(row) + "\n" for row in rows or rows_of(kind, count)), encoding="utf-8")
    options = dict(val_fraction=0.2, tokenizer=str(checkpoint), kind=kind) | options
    return prepare_data.prepare(prepare_data.PrepareOptions([str(source)], str(folder), **options), quiet=True)


# Starting Python and torch takes seconds: processes are forked from one that has imported everything (not on Windows).
STARTED = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
STARTED.set_forkserver_preload("crash dpo grpo prepare_data sample sft train torch.distributed.fsdp".split())


def call(main, argv, rank, world_size, port, folder):
    """The body of a process of `command`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [f"{main.__module__}.py", *argv]
    run_command(main)


def command(main, argv, processes=1, timeout=120):
    """What `python train.py ARGV` does (with main = train.main), or torchrun with so many processes: -> returncode of
    the first that failed or else 0, stdout and stderr of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        started = [STARTED.Process(target=call, args=(main, argv, rank, processes, port, folder))
                   for rank in range(processes)]  # fmt: skip
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # for the one that imports
            for process in started:
                process.start()
        for process in started:
            process.join(timeout)
            process.kill()
            process.join()
        out, err = (Path(folder, name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return SimpleNamespace(returncode=next((p.exitcode for p in started if p.exitcode), 0), stdout=out, stderr=err)
