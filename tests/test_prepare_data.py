"""prepare_data.py against the documents that went in: everything comes out again, in every way a run can go."""

import gzip
import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import command

import prepare_data
from nanodoge import sources as reading
from nanodoge.data import read_meta
from nanodoge.tokenizer import Tokenizer, train_bpe
from prepare_data import PrepareOptions, prepare

ROOT = Path(__file__).parents[1]
WORDS = "the dog ran home and saw a small cat naïve café 東京 🐕 x=1; def f(): return <|end_of_text|> zip".split(" ")


def documents(count, seed=0, words=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) + f"\n\n #{seed}.{i}\n" for i in range(count)]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    train_bpe(documents(200), 400).save(folder)
    return str(folder)


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def run(sources, out, vocabulary, **options):
    sources = [sources] if isinstance(sources, str) else sources
    return prepare(PrepareOptions(sources=sources, out=str(out), tokenizer=vocabulary, **options), quiet=True)


def meta_of(out):
    return json.loads((Path(out) / "meta.json").read_text(encoding="utf-8"))


def read_back(out, split):
    """The documents of a bin. Checks that each is [BOS] ... [EOS] with neither inside, and the counts of meta.json."""
    tokenizer, meta = Tokenizer.load(str(out)), meta_of(out)
    assert tokenizer.digest == meta["tokenizer_sha256"] and tokenizer.vocab_size == meta["vocab_size"]
    ids = np.fromfile(Path(out) / f"{split}.bin", dtype=np.dtype(meta["dtype"]).newbyteorder("<")).tolist()
    assert len(ids) == meta[split]["tokens"]
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    ends = [-1] + [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
    texts = []
    for start, end in pairwise(ends):
        assert ids[start + 1] == tokenizer.bos_id and tokenizer.bos_id not in ids[start + 2 : end]
        texts.append(tokenizer.decode(ids[start + 2 : end]))
    assert meta[split]["documents"] == len(texts)
    assert meta[split]["bytes"] == sum(len(text.encode()) for text in texts)
    return texts


# ---- What goes in comes out


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_round_trip(tmp_path, vocabulary, kind):
    texts = documents(300) + ["", "a document\0with a zero byte" if kind == "parquet" else "one\r\nmore", "  \n"]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts + [None]}), path, row_group_size=50)
    else:
        plain = Path(write_jsonl(tmp_path / "plain.jsonl", texts + [None])).read_bytes()
        with pa.output_stream(str(path), compression="detect") as stream:
            stream.write(plain)
    out = run(str(path), tmp_path / "out", vocabulary)
    train, val = read_back(out, "train"), read_back(out, "val")
    wanted = [text for text in texts if text]
    hashed = [int(hashlib.blake2b(t.encode(), digest_size=8).hexdigest(), 16) < 0.05 * 2**64 for t in wanted]
    assert train == [text for text, is_val in zip(wanted, hashed, strict=True) if not is_val]
    assert val == [text for text, is_val in zip(wanted, hashed, strict=True) if is_val]
    assert val and meta_of(out)["left_out"] == {"empty": 2}


@pytest.mark.parametrize("text", [
    "".join(documents(400)), "".join(map(str, range(12_000))), " ".join(map(str, range(9_000))),
    "\r\n\r\n".join(map(str, range(9_000)))])  # fmt: skip
def test_text_files_are_cut_and_lose_nothing(tmp_path, vocabulary, text):
    pieces = list(reading.split_pieces([text[i : i + 777] for i in range(0, len(text), 777)], 1000))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 1000 and min(map(len, pieces[:-1])) >= 500
    assert pieces == list(reading.split_pieces([text], 1000))  # whatever blocks the file was read in
    (tmp_path / "x.txt").write_bytes(text.encode())
    out = run(str(tmp_path / "x.txt"), tmp_path / "out", vocabulary, val_fraction=0.3, piece_chars=1000)
    assert sorted(read_back(out, "train") + read_back(out, "val")) == sorted(pieces)


def test_separator_and_whole_files(tmp_path, vocabulary):
    texts = [text.replace("<|end_of_text|>", "") for text in documents(100)]
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("<|end_of_text|>".join(texts[:60]), encoding="utf-8")
    (folder / "sub" / "a.md.gz").write_bytes(gzip.compress("<|end_of_text|>".join(texts[60:]).encode()))
    (folder / "code.py").write_text("x = 1\n\n\n" * 4000)
    (folder / "picture.png").write_bytes(b"\0\1")
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden.txt").write_text("hidden")
    out = run(str(folder), tmp_path / "out", vocabulary, document_separator="<|end_of_text|>", val_fraction=0.2)
    assert sorted(read_back(out, "train") + read_back(out, "val")) == sorted(texts + ["x = 1\n\n\n" * 4000])


def test_vocabulary_is_trained_saved_and_uint32_when_large(tmp_path, vocabulary):
    path = write_jsonl(tmp_path / "x.jsonl", documents(300), column="story")
    out = prepare(PrepareOptions([path], out=str(tmp_path / "o"), vocab_size=500, text_column="story"), quiet=True)
    assert meta_of(out)["vocab_size"] == 500 and sorted(os.listdir(out)) == [
        "meta.json", "tokenizer.json", "tokenizer_config.json", "train.bin", "val.bin"]  # fmt: skip
    assert len(read_back(out, "train") + read_back(out, "val")) == 300
    big = Tokenizer.load(vocabulary)
    big.vocab_size = 70_000
    meta = prepare_data.begin(tmp_path / "big.partial", {"sources": []}, big)
    assert meta["dtype"] == "uint32"


def test_default_data_and_stdlib(tmp_path, monkeypatch, vocabulary):
    monkeypatch.chdir(tmp_path)
    out = prepare(PrepareOptions(stories=300, tokenizer=vocabulary), quiet=True)
    texts = list(reading.stories.documents(300))
    assert out == Path("data/stories") and sorted(read_back(out, "train") + read_back(out, "val")) == sorted(texts)
    parts = reading.stdlib_parts()
    topics = list(reading.read_stdlib(parts[0], 0))
    assert len(topics) > 70 and any(text.startswith('The "if" statement') for text in topics)
    assert any(path.endswith(f"json{os.sep}decoder.py") for path in parts)
    assert not any(f"{os.sep}test{os.sep}" in path or "site-packages" in path for path in parts)
    assert 6e6 < sum(map(os.path.getsize, parts)) < 20e6


def test_hub_dataset_from_local_parquet(tmp_path, vocabulary):
    texts = documents(90)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for i in range(3):
        table = pa.table({"text": texts[30 * i : 30 * i + 30], "id": list(range(30))})
        pq.write_table(table, tmp_path / "hub" / "data" / f"train-0000{i}-of-00003.parquet")
    name = f"hf:{tmp_path / 'hub'}"
    out = run(name, tmp_path / "out", vocabulary, val_fraction=0.3)
    assert sorted(read_back(out, "train") + read_back(out, "val")) == sorted(texts)
    source = reading.parse_source(name)
    reading.open_source(source, PrepareOptions(), partial(reading.text_of, column="text"), tmp_path, True)
    assert [list(source.read(part, 25)) for part in source.parts] == [texts[25:30], texts[55:60], texts[85:90]]
    for bad, hint in ((f"{name}:nosubset", "nosubset"), (f"{name}::nosplit", "nosplit")):
        with pytest.raises(ValueError, match=hint):
            run(bad, tmp_path / "bad", vocabulary)
    with pytest.raises(ValueError, match="no column 'body'.*text, id"):
        run(name, tmp_path / "bad", vocabulary, text_column="body")


# ---- The order of documents depends on the sources and nothing else


@pytest.fixture
def small_steps(monkeypatch):
    """So that a few hundred documents make many batches and several commits."""
    monkeypatch.setattr(prepare_data, "BATCH", 2000)
    monkeypatch.setattr(prepare_data, "AHEAD", 5)
    monkeypatch.setattr(prepare_data, "SHARD", 20_000)


def three_sources(folder):
    """Different sizes, different lengths, different numbers of characters to the token."""
    rng = random.Random(1)
    digits = [" ".join(str(rng.random()) for _ in range(rng.randint(3, 30))) for _ in range(300)]
    web, code = documents(600), documents(80, 3, 300)
    mix = (("web", web, 0.7), ("code", code, 0.2), ("maths", digits, 0.1))
    return [f"{write_jsonl(folder / f'{name}.jsonl', texts)}@{ratio}" for name, texts, ratio in mix]


@pytest.mark.parametrize("tokens", [30_000, 200_000])
def test_mixed_by_token_with_repetition_whatever_the_workers(tmp_path, vocabulary, small_steps, tokens):
    sources = three_sources(tmp_path)
    one = run(sources, tmp_path / "one", vocabulary, tokens=tokens, workers=1)
    many = run(sources, tmp_path / "many", vocabulary, tokens=tokens, workers=7)
    for split in ("train", "val"):
        assert (one / f"{split}.bin").read_bytes() == (many / f"{split}.bin").read_bytes()
    meta, train = meta_of(one), read_back(one, "train")
    counts = [len(ids) + 2 for ids in Tokenizer.load(vocabulary).encode_batch(train)]
    for mix, share in zip(meta["mix"], (0.7, 0.2, 0.1), strict=True):  # filled, and over by less than one document
        assert share * tokens <= mix["tokens"] < share * tokens + max(counts)
        assert tokens < 100_000 or mix["tokens"] / meta["train"]["tokens"] == pytest.approx(share, abs=0.01)
    val = read_back(one, "val")
    assert len(val) == len(set(val)) and not set(val) & set(train)  # never repeated, never on both sides
    assert (len(train) > len(set(train))) == (max(mix["epochs"] for mix in meta["mix"]) > 1) == (tokens == 200_000)
    is_web = [" #0." in text for text in train]
    for part in range(9):  # interleaved all along: every stretch of the file has its 70 % of web
        start, end = len(train) * part // 9, len(train) * (part + 1) // 9
        web = sum(n for n, yes in zip(counts[start:end], is_web[start:end], strict=True) if yes)
        assert abs(web - 0.7 * sum(counts[start:end])) < 2 * max(counts)


def test_validation_side_is_for_ever(tmp_path, vocabulary):
    first, more = documents(300), documents(300, seed=9)
    few = run(write_jsonl(tmp_path / "few.jsonl", first), tmp_path / "few", vocabulary)
    mixed = more[:150] + first + first[:100] + more[150:]
    many = run(write_jsonl(tmp_path / "many.jsonl", mixed), tmp_path / "many", vocabulary)
    assert set(read_back(few, "val")) == set(read_back(many, "val")) & set(first)
    assert not set(read_back(many, "val")) & set(read_back(many, "train"))


SLOW = """
import sys, time, prepare_data
prepare_data.BATCH, prepare_data.AHEAD, prepare_data.SHARD = 2000, 5, 20_000
fast = prepare_data.Writer.commit
def commit(self, finished=False):
    fast(self, finished)
    print("committed", flush=True)
    time.sleep(0.2)
prepare_data.Writer.commit = commit
prepare_data.main(sys.argv[1:])
"""


def test_killed_run_continues_to_the_same_bytes(tmp_path, vocabulary, small_steps, monkeypatch):
    sources = three_sources(tmp_path)
    taken = []
    encode = prepare_data.encode
    monkeypatch.setattr(prepare_data, "encode", lambda *a: taken.extend(a[-1]) or encode(*a))
    whole = run(sources, tmp_path / "whole", vocabulary, tokens=150_000)
    in_one_go = len(taken)
    command = [sys.executable, "-c", SLOW, *sources, f"--out={tmp_path / 'cut'}", f"--tokenizer={vocabulary}"]
    with subprocess.Popen(command + ["--tokens=150000"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL) as process:  # fmt: skip
        for _ in range(3):
            while "committed" not in process.stdout.readline():
                assert process.poll() is None
        process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    partial = tmp_path / "cut.partial"
    done = meta_of(partial)["train"]["documents"]
    assert 0 < done < meta_of(whole)["train"]["documents"] and not (tmp_path / "cut").exists()
    with open(partial / "train.bin", "ab") as file:
        file.write(b"bytes after the last commit")
    with pytest.raises(ValueError, match="unfinished work of another call.*val_fraction"):
        run(sources, tmp_path / "cut", vocabulary, tokens=150_000, val_fraction=0.5)
    taken.clear()
    cut = run(sources, tmp_path / "cut", vocabulary, tokens=150_000)
    for split in ("train", "val"):
        assert (cut / f"{split}.bin").read_bytes() == (whole / f"{split}.bin").read_bytes()
    assert meta_of(cut)["train"] == meta_of(whole)["train"] and not partial.exists()
    assert len(taken) <= in_one_go - done


def test_same_call_does_nothing_and_another_is_refused(tmp_path, vocabulary, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", documents(200))
    out = run(path, tmp_path / "out", vocabulary)
    before = (out / "train.bin").stat().st_mtime_ns
    assert run(path, tmp_path / "out", vocabulary) == out and (out / "train.bin").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="of another call.*val_fraction.*--overwrite"):
        run(path, tmp_path / "out", vocabulary, val_fraction=0.3)
    write_jsonl(tmp_path / "x.jsonl", documents(250))
    with pytest.raises(ValueError, match="differs in inputs"):
        run(path, tmp_path / "out", vocabulary)
    run(path, tmp_path / "out", vocabulary, overwrite=True)
    assert len(read_back(out, "train") + read_back(out, "val")) == 250
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("precious")
    with pytest.raises(ValueError, match="not made by prepare_data.py"):
        run(path, tmp_path / "mine", vocabulary, overwrite=True)
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(ValueError, match="needs over .* of disk"):
        run(path, tmp_path / "full", vocabulary)


def test_nothing_to_train_on_is_no_endless_loop(tmp_path, vocabulary, small_steps):
    path = write_jsonl(tmp_path / "x.jsonl", documents(50))
    for texts, options in (([""], {}), (documents(50), {"val_fraction": 1 - 1e-9})):
        write_jsonl(tmp_path / "x.jsonl", texts)
        with pytest.raises(ValueError, match="no document to train on"):
            run(path, tmp_path / "out", vocabulary, tokens=1000, **options)


# ---- Mistakes: one line, and what was there stays


def broken_parquet(path):
    pq.write_table(pa.table({"text": documents(2000)}), path)
    data = bytearray(path.read_bytes())
    data[200:2000] = os.urandom(1800)
    path.write_bytes(data)


BAD = {
    "missing.txt": (None, "no such file or folder"),
    "owner/name": (None, "hf:owner/name"),
    "empty.txt": (b"", "the file is empty"),
    "one_word.txt": (b"word", "documents none is in (train|val).bin"),
    "binary.txt": (b"GIF89a\0\1\2" * 99, "a binary file"),
    "latin1.txt": ("café".encode("latin-1") * 9, "not UTF-8"),
    "cut.txt": ("café".encode()[:-1], "not UTF-8"),
    "cut.txt.gz": (gzip.compress(os.urandom(99_999))[:5000], "cut.txt.gz"),
    "no.jsonl.gz": (b"plain text", "no.jsonl.gz"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b', r"broken.jsonl:3: "),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: "),
    "column.jsonl": (b'{"text": "a"}\n{"body": "b", "n": 1}', "column.jsonl:2: no column 'text'.*body, n"),
    "list.jsonl": (b'["text"]', "list.jsonl:1: no column"),
    "number.jsonl": (b'{"text": 5}', "number.jsonl:1: column 'text' holds int"),
    "surrogate.jsonl": (rb'{"text": "\ud800"}', "surrogate.jsonl:1: "),
    "picture.png": (b"abc", "cannot read this kind of file"),
    "not.parquet": (b"PAR1 but not really", "not.parquet"),
    "x.parquet": (broken_parquet, "x.parquet"),
    "stories@0.5": (None, "ratios need --tokens"),
    "stories@0": (None, "must be above 0"),
    "http://localhost/x.png": (None, "cannot read this kind of file"),
    "http://localhost/x.txt#md5=1": (None, "sha256="),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path, vocabulary, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, message = BAD[name]
    if callable(content):
        content(tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        run(name, tmp_path / "out", vocabulary)
    assert "\n" not in str(info.value) and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert Path(info.traceback[-1].path).parent in (ROOT, ROOT / "nanodoge")  # what run_command goes by


def test_a_document_beyond_memory_is_refused(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT", 3_000_000)
    write_jsonl(tmp_path / "x.jsonl", ["x" * 5_000_000])
    with pytest.raises(ValueError, match="more than 3,000,000 characters"):
        run(str(tmp_path / "x.jsonl"), tmp_path / "out", vocabulary)
    (tmp_path / "x.txt").write_text("x" * 5_000_000)
    assert run(str(tmp_path / "x.txt"), tmp_path / "out", vocabulary)  # plain text is cut, however long its lines


@pytest.mark.parametrize("option, message", [
    ({"val_fraction": 2.0}, "val_fraction=2.0"), ({"tokenizer": "", "vocab_size": 9}, "vocab_size=9"),
    ({"tokens": -1}, "tokens=-1"), ({"out": "."}, "out=."), ({"tokenizer": "no/such"}, "no/such"),
    ({"sources": []}, "at least one"),
])  # fmt: skip
def test_bad_options(tmp_path, vocabulary, monkeypatch, option, message):
    monkeypatch.chdir(tmp_path)
    path = write_jsonl(tmp_path / "x.jsonl", documents(300))
    with pytest.raises(ValueError, match=message) as info:
        prepare(PrepareOptions(**{"sources": [path], "out": "out", "tokenizer": vocabulary, **option}), quiet=True)
    assert "\n" not in str(info.value) and os.listdir(tmp_path) == ["x.jsonl"]


@pytest.mark.parametrize("arguments", [["latin1.txt"], ["good.jsonl", "--fraction=2"]])
def test_command_line_exits_2_and_keeps_what_was_there(tmp_path, monkeypatch, arguments):
    write_jsonl(tmp_path / "good.jsonl", documents(300))
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1") * 100_000)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "meta.json").write_text("{}")
    (tmp_path / "out" / "train.bin").write_bytes(b"earlier")
    monkeypatch.chdir(tmp_path)
    done = command(prepare_data.main, [*arguments, "--out=out", "--overwrite"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"earlier" and not (tmp_path / "out.partial").exists()


# ---- Downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`. /cut/ breaks off after 200,000 bytes, /norange/ too and ignores Range, /changes/ is a new file at
    every request, /busy/ answers 503 twice."""

    files, log = {}, []

    def log_message(self, *_):
        pass

    def do_GET(self):
        kind, name = self.path.strip("/").split("/", 1)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.log.append((kind, start))
        data, tag = self.files.get(name), '"one"'
        if kind == "busy" and len(self.log) < 3:
            return self.send_error(503)
        if data is None:
            return self.send_error(404)
        if kind == "changes":
            data, tag = (data, '"one"') if len(self.log) == 1 else (data[::-1], '"two"')
            start = start if self.headers.get("If-Range") == tag else 0
        if kind == "norange":
            start = 0
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", tag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        limit = 200_000 if kind in ("cut", "norange", "changes") and len(self.log) == 1 else len(data)
        self.wfile.write(data[start : start + limit])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(reading, "WAIT", 0.001)
    monkeypatch.setattr(reading, "TRIES", 3)
    monkeypatch.setattr(Server, "files", {"x.txt": "".join(documents(3000)).encode(), "blob": b"", "one.txt": b"x"})
    monkeypatch.setattr(Server, "log", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind, requests", [
    ("plain", [0]), ("cut", [0, 19]), ("norange", [0, 19]), ("changes", [0, 19]), ("busy", [0, 0, 0])
])  # fmt: skip
def test_download(tmp_path, server, kind, requests):
    data = Server.files["x.txt"]
    path = reading.download(f"{server}/{kind}/x.txt", tmp_path, True)
    assert path.read_bytes() == (data[::-1] if kind == "changes" else data)
    assert [start // 10_000 for _, start in Server.log] == requests  # up to 64 kB that had arrived may be lost
    assert reading.download(f"{server}/{kind}/x.txt", tmp_path, True) == path and len(Server.log) == len(requests)
    assert os.listdir(tmp_path) == [path.name]


def test_download_of_a_source_with_hash_and_failures(tmp_path, server, vocabulary):
    data = Server.files["x.txt"]
    digest = hashlib.sha256(data).hexdigest()
    out = run(f"{server}/cut/x.txt#sha256={digest}", tmp_path / "out", vocabulary, val_fraction=0.3)
    texts = read_back(out, "train") + read_back(out, "val")
    assert sum(map(len, texts)) == len(data.decode()) and (tmp_path / "downloads").is_dir()
    wrong, missing, closed = f"{server}/x/x.txt#sha256={'0' * 64}", f"{server}/x/no.txt", "http://127.0.0.1:1/x.txt"
    for url, message in ((wrong, "sha256 is not"), (missing, "404"), (closed, "run again to continue")):
        with pytest.raises(ValueError, match=message) as info:
            run(url, tmp_path / "bad", vocabulary)
        assert "\n" not in str(info.value) and not list((tmp_path / "downloads").glob("*.part"))


def test_software_heritage_rows(tmp_path, server, vocabulary, monkeypatch):
    texts = documents(60)
    monkeypatch.setattr(reading, "BLOBS", f"{server}/plain/")
    monkeypatch.setattr(reading, "FETCHES", 4)
    monkeypatch.setattr(Server, "files", {f"b{i}": gzip.compress(text.encode()) for i, text in enumerate(texts)})
    (tmp_path / "hub").mkdir()
    names = [f"b{i}" for i in range(60)]
    pq.write_table(pa.table({"blob_id": names[:30] + ["gone"] + names[30:]}), tmp_path / "hub" / "train.parquet")
    out = run(f"swh:{tmp_path / 'hub'}", tmp_path / "out", vocabulary, val_fraction=0.3)
    assert sorted(read_back(out, "train") + read_back(out, "val")) == sorted(texts)
    assert meta_of(out)["left_out"] == {"empty": 1}


def test_smollm_recipe_is_readable():
    options = prepare_data.parse_options(
        PrepareOptions, [f"--config={ROOT / 'config' / 'smollm_corpus.py'}"], positional="sources")  # fmt: skip
    sources = prepare_data.parse_sources(options)
    assert prepare_data.shares_of(sources) == pytest.approx([0.70, 0.20, 0.05, 0.05])
    assert [source.kind for source in sources] == ["hf", "hf", "swh", "hf"]


def test_an_existing_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reading.parse_source("stories").kind == "stories"
    for name in ("stories", "a@0.5", "b@2.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("text")
        source = reading.parse_source(name)
        assert (source.kind, source.ratio) == ("file", 0)
    assert reading.parse_source("a@0.5@0.25").ratio == 0.25


def test_two_at_once_do_not_write_into_each_other(tmp_path):
    """The second one waits, and then finds the work done."""
    (tmp_path / "a.txt").write_text("\n".join(f"line {i} of a text" for i in range(3000)))
    options = prepare_data.PrepareOptions([str(tmp_path / "a.txt")], str(tmp_path / "out"), vocab_size=300,
                                          val_fraction=0.5)  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: prepare_data.prepare(options, quiet=True), range(2)))
    meta = read_meta(folders[0])
    assert (folders[0] / "train.bin").stat().st_size == 2 * meta["train"]["tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_built_in_folders_are_made_once_and_only_those(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls, real = [], prepare_data.prepare
    smaller = {"stories": 40, "vocab_size": 400}
    monkeypatch.setattr(prepare_data, "prepare", lambda o: calls.append(o) or real(replace(o, **smaller), True))
    prepare_data.prepare_built_in("data/stories", say=lambda *_: None)
    assert read_meta("data/stories")["source"] == ["stories"]
    prepare_data.prepare_built_in("data/sums-problems", "problems", "data/stories")
    assert read_meta("data/sums-problems", "problems")["train"]["documents"] > 0
    prepare_data.prepare_built_in("data/stories")  # is there
    prepare_data.prepare_built_in("data/mine")  # is none
    prepare_data.prepare_built_in("data/stories-chat", "preferences")  # is of another kind
    assert [options.out for options in calls] == ["data/stories", "data/sums-problems"]
