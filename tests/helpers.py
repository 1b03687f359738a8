"""What several tests need: a small data folder, a small model, a run in a few seconds."""

import json
import random

import numpy as np

import tokenizer

TINY = ["--hidden_size=32", "--intermediate_size=48", "--num_hidden_layers=2", "--num_attention_heads=2",
        "--max_position_embeddings=16", "--batch_size=2", "--batch_tokens=64", "--max_steps=12", "--warmup_steps=2",
        "--decay_steps=4", "--learning_rate=3e-3", "--log_every=1", "--eval_every=4", "--save_every=4",
        "--eval_tokens=100", "--sample_tokens=0", "--device=cpu", "--optimizer=adamw"]  # fmt: skip
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
