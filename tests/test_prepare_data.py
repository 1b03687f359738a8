"""prepare_data.py against the documents that went in: everything comes out again, in every way a run can go."""

import gzip
import hashlib
import http.server
import itertools
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import command, rows_of, serving

import prepare_data
from nanodoge import readers
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


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(vocabulary):
    """run(source, ..., **options) prepares the folder `out`."""

    def run(*sources, **options):
        options = {"sources": [*sources], "out": "out", "tokenizer": vocabulary} | options
        return prepare(PrepareOptions(**options), True)

    return run


def write_jsonl(path, texts, column="text"):
    Path(path).write_text("".join(json.dumps({column: text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


def meta_of(out):
    return json.loads((Path(out) / "meta.json").read_text(encoding="utf-8"))


def read_back(out, split):
    """The documents of a bin. Checks that each is [BOS] ... [EOS] with neither inside, and the counts of meta.json."""
    tokenizer, meta = Tokenizer.load(str(out)), meta_of(out)
    assert tokenizer.digest == meta["tokenizer_sha256"] and tokenizer.vocab_size == meta["vocab_size"]
    ids = np.fromfile(Path(out) / f"{split}.bin", dtype=np.dtype(meta["dtype"]).newbyteorder("<")).tolist()
    assert len(ids) == meta[split]["tokens"] and ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    ends = [-1] + [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
    texts = []
    for start, end in pairwise(ends):
        assert ids[start + 1] == tokenizer.bos_id and tokenizer.bos_id not in ids[start + 2 : end]
        texts.append(tokenizer.decode(ids[start + 2 : end]))
    assert meta[split]["documents"] == len(texts)
    assert meta[split]["bytes"] == sum(len(text.encode()) for text in texts)
    return texts


def read_all(out):
    return sorted(read_back(out, "train") + read_back(out, "val"))


def same_bins(one, other):
    files = [[(path.name, path.read_bytes()) for path in sorted(out.glob("*.bin"))] for out in (one, other)]
    return files[0] == files[1] and len(files[0]) > 1


# ---- What goes in comes out


def csv_of(rows, delimiter=","):
    quoted = ['"' + row["text"].replace('"', '""') + '"' for row in rows]
    return f"n{delimiter}text\n" + "".join(f"{i}{delimiter}{text}\r\n" for i, text in enumerate(quoted))


def lines_of(rows):
    return "\n".join(map(json.dumps, rows))


FILES = dict.fromkeys(["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "lines.json", "x.parquet"], lines_of)
FILES |= {
    "array.jsonl": json.dumps,
    "array.json": lambda rows: json.dumps(rows, indent=1),
    "pretty.jsonl": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "mark.JSONL": lambda rows: "\ufeff" + lines_of(rows),
    "table.csv": csv_of,
    "table.tsv": lambda rows: csv_of(rows, "\t"),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_in_every_form_come_out_again(run, name):
    special = "a zero\0byte" if name == "x.parquet" else "one\r\nmore"
    texts = [*documents(300), 'a "quoted", one', "two\nlines", special, "  \n", "\ufeffmark", ""]
    rows = [{"text": text} for text in texts] + [{"text": None}] * ("table" not in name)
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), name, row_group_size=50)
    else:
        with pa.output_stream(name, compression="detect") as stream:
            stream.write(FILES[name](rows).encode())
    out, wanted = run(name), {"train": [], "val": []}
    for text in [*texts[:-2], "mark"]:
        is_val = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) < 0.05 * 2**64
        wanted["val" if is_val else "train"].append(text)
    assert {split: read_back(out, split) for split in wanted} == wanted
    assert wanted["val"] and meta_of(out)["left_out"] == {"empty": len(rows) - len(texts) + 1}


@pytest.mark.parametrize("separator", [None, "", " ", "\r\n\r\n"])
def test_text_files_are_cut_and_lose_nothing(run, separator):
    text = "".join(documents(400)) if separator is None else separator.join(map(str, range(10_000)))
    pieces = list(readers.split_pieces([text[i : i + 777] for i in range(0, len(text), 777)], 1000))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 1000 and min(map(len, pieces[:-1])) >= 500
    assert pieces == list(readers.split_pieces([text], 1000))  # whatever blocks the file was read in
    Path("x.txt").write_bytes(text.encode())
    assert read_all(run("x.txt", val_fraction=0.3, piece_chars=1000)) == sorted(pieces)


def test_separator_and_whole_files(run):
    texts = [text.replace("<|end_of_text|>", "") for text in documents(100)]
    Path("folder/sub").mkdir(parents=True)
    Path("folder/b.txt").write_text("<|end_of_text|>".join(texts[:60]), encoding="utf-8")
    Path("folder/sub/a.md.gz").write_bytes(gzip.compress("<|end_of_text|>".join(texts[60:]).encode()))
    Path("folder/code.py").write_text("x = 1\n\n\n" * 4000)
    for name in ("picture.png", "empty.txt", ".hidden.txt"):
        Path("folder", name).write_bytes(b"" if name == "empty.txt" else b"hidden")
    out = run("folder", document_separator="<|end_of_text|>", val_fraction=0.2)
    assert read_all(out) == sorted(texts + ["x = 1\n\n\n" * 4000])


def test_vocabulary_is_trained_saved_and_uint32_when_large(run, vocabulary):
    out = run(write_jsonl("x.jsonl", documents(300), "story"), tokenizer="", vocab_size=500, text_column="story")
    files = "meta.json tokenizer.json tokenizer_config.json train.bin val.bin".split()
    assert meta_of(out)["vocab_size"] == 500 and sorted(os.listdir(out)) == files and len(read_all(out)) == 300
    big = Tokenizer.load(vocabulary)
    big.vocab_size = 70_000
    assert prepare_data.begin(Path("big.partial"), {"sources": []}, big)["dtype"] == "uint32"


def test_default_data_and_stdlib(run):
    out = run("stories", out="", stories=300)
    assert out == Path("data/stories") and read_all(out) == sorted(reading.stories.documents(300))
    parts = reading.stdlib_parts()
    topics = list(reading.read_stdlib(parts[0], 0))
    assert len(topics) > 70 and any(text.startswith('The "if" statement') for text in topics)
    assert any(path.endswith(f"json{os.sep}decoder.py") for path in parts)
    assert not any(f"{os.sep}test{os.sep}" in path or "site-packages" in path for path in parts)
    assert 6e6 < sum(map(os.path.getsize, parts)) < 20e6


def test_built_in_folders_are_made_once_and_only_those(monkeypatch):
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


def test_hub_dataset_from_local_parquet(run):
    texts = documents(90)
    Path("hub/data").mkdir(parents=True)
    for i in range(3):
        table = pa.table({"text": texts[30 * i : 30 * i + 30], "id": list(range(30))})
        pq.write_table(table, f"hub/data/train-0000{i}-of-00003.parquet")
    name = f"hf:{Path('hub').resolve()}"
    assert read_all(run(name, val_fraction=0.3)) == sorted(texts)
    source = reading.parse_source(name)
    reading.open_source(source, PrepareOptions(), "cache", True)
    assert [list(source.read(part, 25)) for part in source.parts] == [texts[25:30], texts[55:60], texts[85:90]]
    wrong = {f"{name}:nosubset": "nosubset", f"{name}::nosplit": "nosplit", name: "no column 'body'.*text, id"}
    for bad, hint in wrong.items():
        with pytest.raises(ValueError, match=hint):
            run(bad, out="bad", text_column="body")


# ---- The order of documents depends on the sources and nothing else


SMALL_STEPS = {"BATCH": 2000, "AHEAD": 5, "SHARD": 20_000}


@pytest.fixture
def small_steps():
    """So that a few hundred documents make many batches and several commits."""
    with patch.multiple(prepare_data, **SMALL_STEPS):
        yield


def three_sources():
    """Different sizes, different lengths, different numbers of characters per token."""
    rng = random.Random(1)
    digits = [" ".join(str(rng.random()) for _ in range(rng.randint(3, 30))) for _ in range(300)]
    mix = {"web.jsonl@0.7": documents(600), "code.jsonl@0.2": documents(80, 3, 300), "maths.jsonl@0.1": digits}
    for name, texts in mix.items():
        write_jsonl(name.partition("@")[0], texts)
    return list(mix)


@pytest.mark.parametrize("tokens", [30_000, 200_000])
def test_mixed_by_token_with_repetition_whatever_the_workers(run, vocabulary, small_steps, tokens):
    one = run(*three_sources(), out="one", tokens=tokens, workers=1)
    assert same_bins(one, run(*three_sources(), out="many", tokens=tokens, workers=7))
    meta, train, val = meta_of(one), read_back(one, "train"), read_back(one, "val")
    counts = [len(ids) + 2 for ids in map(Tokenizer.load(vocabulary).encode, train)]
    for mix, share in zip(meta["mix"], (0.7, 0.2, 0.1), strict=True):  # filled, and over by less than one document
        assert share * tokens <= mix["tokens"] < share * tokens + max(counts)
        assert tokens < 100_000 or mix["tokens"] / meta["train"]["tokens"] == pytest.approx(share, abs=0.01)
    assert len(val) == len(set(val)) and not set(val) & set(train)  # never repeated, never on both sides
    assert (len(train) > len(set(train))) == (max(mix["epochs"] for mix in meta["mix"]) > 1) == (tokens == 200_000)
    is_web = [" #0." in text for text in train]
    for part in range(9):  # mixed from start to end: every stretch of the file has its 70 % of web
        start, end = len(train) * part // 9, len(train) * (part + 1) // 9
        web = sum(n for n, yes in zip(counts[start:end], is_web[start:end], strict=True) if yes)
        assert abs(web - 0.7 * sum(counts[start:end])) < 2 * max(counts)


def test_validation_side_is_for_ever(run):
    first, more = documents(300), documents(300, seed=9)
    few = run(write_jsonl("few.jsonl", first), out="few")
    many = run(write_jsonl("many.jsonl", more[:150] + first + first[:100] + more[150:]), out="many")
    assert set(read_back(few, "val")) == set(read_back(many, "val")) & set(first)
    assert not set(read_back(many, "val")) & set(read_back(many, "train"))


def prepare_and_die(argv):
    """prepare_data.py, whose process ends after its second commit."""
    commit, count = prepare_data.Writer.commit, itertools.count(1)

    def dying(self, finished=False):
        commit(self, finished)
        if next(count) == 2:
            os._exit(9)

    with patch.multiple(prepare_data, **SMALL_STEPS), patch.object(prepare_data.Writer, "commit", dying):
        prepare_data.main(argv)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_killed_run_continues_to_the_same_bytes(run, vocabulary, small_steps, monkeypatch, kind):
    taken, encode, tokens = [], prepare_data.encode, 150_000 if kind == "text" else 0
    monkeypatch.setattr(prepare_data, "encode", lambda *a: taken.append(a[-1]) or encode(*a))
    sources = three_sources() if kind == "text" else ["chat.jsonl"]
    if kind == "chat":
        Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("chat", 600)))
    whole = run(*sources, out="whole", kind=kind, tokens=tokens)
    in_one_go = len(taken)
    argv = [*sources, "--out=cut", f"--tokenizer={vocabulary}", f"--kind={kind}", f"--tokens={tokens}"]
    assert command(prepare_and_die, argv).returncode == 9
    done = meta_of("cut.partial")["train"]["documents"]
    assert 0 < done < meta_of(whole)["train"]["documents"] and not Path("cut").exists()
    with open(Path("cut.partial", min(path.name for path in whole.glob("*.bin"))), "ab") as file:
        file.write(b"bytes after the last commit")
    with pytest.raises(ValueError, match="unfinished work of another call.*val_fraction"):
        run(*sources, out="cut", kind=kind, tokens=tokens, val_fraction=0.5)
    taken.clear()
    cut = run(*sources, out="cut", kind=kind, tokens=tokens)
    assert same_bins(cut, whole) and meta_of(cut)["train"] == meta_of(whole)["train"]
    assert not Path("cut.partial").exists() and len(taken) <= in_one_go - done


def test_same_call_does_nothing_and_another_is_refused(run):
    Path("latin1.txt").write_bytes("café".encode("latin-1") * 100_000)
    out = run(write_jsonl("x.jsonl", documents(200)))
    before = (out / "train.bin").stat().st_mtime_ns
    assert run("x.jsonl") == out and (out / "train.bin").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="of another call.*val_fraction.*--overwrite"):
        run("x.jsonl", val_fraction=0.3)
    write_jsonl("x.jsonl", documents(250))
    with pytest.raises(ValueError, match="differs in inputs"):
        run("x.jsonl")
    with pytest.raises(ValueError, match="not UTF-8"):
        run("latin1.txt", overwrite=True)
    assert (out / "train.bin").stat().st_mtime_ns == before and not Path("out.partial").exists()
    assert len(read_all(run("x.jsonl", overwrite=True))) == 250
    Path("mine").mkdir()
    Path("mine/thesis.doc").write_text("precious")
    with pytest.raises(ValueError, match="not made by prepare_data.py"):
        run("x.jsonl", out="mine", overwrite=True)


def test_two_at_once_do_not_write_into_each_other(run, tmp_path):
    """The second one waits, and then finds the work done."""
    Path("a.txt").write_text("\n".join(f"line {i} of a text" for i in range(3000)))
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: run("a.txt", val_fraction=0.5), range(2)))
    assert (folders[0] / "train.bin").stat().st_size == 2 * meta_of(folders[1])["train"]["tokens"]
    assert sorted(os.listdir()) == ["a.txt", "out"]


@pytest.mark.parametrize("texts, val_fraction", [([""], 0.05), (documents(50), 1 - 1e-9)])
def test_nothing_to_train_on_is_no_endless_loop(run, small_steps, texts, val_fraction):
    with pytest.raises(ValueError, match="no document to train on"):
        run(write_jsonl("x.jsonl", texts), tokens=1000, val_fraction=val_fraction)


# ---- What people have


def test_bad_rows_are_counted_and_too_many_of_them_stop_the_run(run):
    good = [json.dumps({"text": text}) for text in documents(120)]
    bad = ["{", '{"body": 1}', '{"text": {}}', "5", '{"text": "\\udc00"}', json.dumps({"text": "x" * 18_000_000})]
    Path("x.jsonl").write_text("\n".join([*good[:60], *bad, *good[60:], '{"text": null}', '{"text": 42}']))
    with pytest.raises(ValueError, match="max_left_out=0.01: 6 of 128 rows .*1 not JSON .x.jsonl:61: Expecting"):
        run("x.jsonl")
    out = run("x.jsonl", max_left_out=0.1)  # goes on with what the other run began
    assert read_all(out) == sorted([*documents(120), "42"]) and sum(meta_of(out)["left_out"].values()) == 7
    pq.write_table(pa.table({"text": [*documents(20), "x" * 18_000_000]}), "x.parquet")
    assert meta_of(run("x.parquet", out="same"))["first_left_out"] == {readers.TOO_LONG.reason: "x.parquet, row 21"}


def test_files_passed_over_and_links(run, capsys):
    for place, name, text in [("f", "A.TXT", "one"), ("other", "b.txt", "two"), ("f", "c.PDF", "-"), ("f", "d", "-")]:
        Path(place).mkdir(exist_ok=True)
        Path(place, name).write_text(text)
    Path("f/settings.json").write_text('{"colour": "red"}')
    Path("f/link").symlink_to(Path("other").resolve())
    Path("f/circle").symlink_to(Path("f").resolve())
    out = prepare(PrepareOptions(["f"], "out", vocab_size=270))
    assert read_all(out) == ["one", "two"]
    said = capsys.readouterr().out
    assert "passed over: 2 files (.pdf 1, without a suffix 1)" in said and "1 files in a folder, without" in said


def test_a_validation_set_of_ones_own(run, capsys):
    write_jsonl("x.jsonl", documents(100))
    write_jsonl("val.jsonl", documents(30, 5))
    out = run("x.jsonl", val=["val.jsonl"])
    assert sorted(read_back(out, "val")) == sorted(documents(30, 5))
    assert sorted(read_back(out, "train")) == sorted(documents(100)) and len(meta_of(out)["mix"]) == 2
    out = run("x.jsonl", val=["val.jsonl"], tokens=20_000, out="many")  # x.jsonl is repeated, what is held out is not
    assert sorted(read_back(out, "val")) == sorted(documents(30, 5)) and meta_of(out)["mix"][0]["epochs"] > 1


@pytest.mark.parametrize("name", ["x.txt", "two.jsonl"])
@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_both_sides_have_something(run, name, val_fraction):
    text = "".join(documents(20))[:2500]
    Path(name).write_bytes(text.encode())
    if name.endswith("jsonl"):
        write_jsonl(name, documents(12))
    out, again = (run(name, val_fraction=val_fraction, out=out, tokenizer="", vocab_size=300) for out in "ab")
    assert read_back(out, "train") and read_back(out, "val") and same_bins(out, again)
    whole = sorted(documents(12)) if name == "two.jsonl" else None
    assert read_all(out) == whole if whole else sum(map(len, read_all(out))) == len(text)


# ---- Mistakes: one line, and what was there stays


def broken_parquet(path):
    pq.write_table(pa.table({"text": documents(2000)}), path)
    data = bytearray(Path(path).read_bytes())
    data[200:2000] = os.urandom(1800)
    Path(path).write_bytes(data)


BAD = {
    "missing.txt": (None, "no such file or folder"),
    "owner/name": (None, "hf:owner/name"),
    "empty.txt": (b"", "the file is empty"),
    "one_word.txt": (b"word", "documents none is in (train|val).bin"),
    "packed.jsonl": (gzip.compress(b'{"text": "a"}'), "gzip inside; add .gz"),
    "binary.txt": (b"GIF89a\0\1\2" * 99, "a binary file"),
    "latin1.txt": ("café".encode("latin-1") * 9, "not UTF-8"),
    "cut.txt": ("café".encode()[:-1], "not UTF-8"),
    "cut.txt.gz": (gzip.compress(os.urandom(99_999))[:5000], "cut.txt.gz"),
    "no.jsonl.gz": (b"plain text", "no.jsonl.gz: not gzip"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b', r"none is in .*1 not JSON \(broken.jsonl:3: Unterminated"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: not JSON"),
    "column.jsonl": (b'{"body": "b", "n": 1}\n{"text": "a"}', "column.jsonl:1: no column 'text'.*body, n"),
    "list.jsonl": (b'["text"]', "list.jsonl:1: not a row of columns"),
    "kind.jsonl": (b'{"text": ["a"]}\n' * 9, r"0.01: 9 of 9 rows cannot be used; left out: 9 with list in .*jsonl:1\)"),
    "table.csv": (b'text,n\n"a,1\nb,2', "table.csv:2: a quoted field does not end"),
    "column.csv": (b"a;b\n1;2\n", "column.csv, row 1: no column 'text'; set --text_column to one of: a;b"),
    "array.json": (b'[{"text": "a"}, {"te', "array.json, row 2: Unterminated"),
    "surrogate.jsonl": (rb'{"text": "\ud800"}', r"1 with half a character .*surrogate.jsonl:1"),
    "long.jsonl": (b'{"text": "' + b"x" * 18_000_000 + b'"}', r"longer than 16,777,216 characters \(long.jsonl:1"),
    "picture.png": (b"abc", "cannot read this kind of file"),
    "not.parquet": (b"PAR1 but not really", "not.parquet"),
    "x.parquet": (broken_parquet, "x.parquet"),
    "stories@0.5": (None, "ratios need --tokens"),
    "stories@0": (None, "must be above 0"),
    "http://localhost/x.png": (None, "cannot read this kind of file"),
    "http://localhost/x.txt#md5=1": (None, "sha256="),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(run, name):
    content, message = BAD[name]
    if callable(content):
        content(name)
    elif content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        run(name)
    assert "\n" not in str(info.value) and not Path("out").exists() and not Path("out.partial").exists()
    assert Path(info.traceback[-1].path).parent in (ROOT, ROOT / "nanodoge")  # what run_command goes by


def test_a_long_text_without_lines_is_cut(run, monkeypatch):
    for module in (readers, reading):
        monkeypatch.setattr(module, "MAX_DOCUMENT", 100_000)
    Path("x.txt").write_text("x" * 200_000)  # longer than the longest document
    assert len(read_all(run("x.txt"))) > 40


@pytest.mark.parametrize(
    "option, message",
    [
        ({"val_fraction": 2.0}, "val_fraction=2.0"),
        ({"tokenizer": "", "vocab_size": 9}, "vocab_size=9"),
        ({"tokens": -1}, "tokens=-1"),
        ({"out": "."}, "out=."),
        ({"tokenizer": "no/such"}, "no/such"),
        ({"sources": []}, "at least one"),
        ({"sources": ["x.jsonl", "x.jsonl"]}, "only once"),
        ({"sources": ["x.jsonl@0.5", "stories"], "tokens": 9}, "'stories' has no @RATIO"),
        ({"labels": ["a", "b"]}, "labels=a,b: --kind=labels, and no other"),
        ({"kind": "labels", "labels": ["a", "a", "b"]}, "labels=a,a,b"),
        ({"kind": "labels", "labels": ["0"]}, "labels=0: --kind=labels, and no other, needs two different names"),
        ({"kind": "chat", "tokenizer": ""}, "--kind=chat needs the --tokenizer"),
        ({"kind": "text", "system": "x"}, "needs --kind=chat"),
        ({"kind": "chat", "sources": ["stdlib"]}, "plain text"),
        ({"kind": "preferences", "sources": ["sums"]}, "it has chat problems"),
        ({"sources": ["sums"]}, "'sums' has no --kind=text"),
        ({"kind": "chat", "sources": ["x.txt"]}, "reads rows"),
        ({"kind": "chat", "sources": ["x.txt"], "val": ["x.txt"]}, "only once"),
    ],
)
def test_bad_options(run, option, message):
    write_jsonl("x.jsonl", documents(300))
    Path("x.txt").write_text("some text " * 100)
    with pytest.raises(ValueError, match=message) as info:
        run(**{"sources": ["x.jsonl"], **option})
    assert "\n" not in str(info.value) and sorted(os.listdir()) == ["x.jsonl", "x.txt"]


# ---- Downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`. /cut/ breaks off after 200,000 bytes, /norange/ too and ignores Range, /changes/ is a new file at
    every request, /shifts/ breaks off too and then sends another range than was asked for, /busy/ answers 503 twice."""

    files, log = {}, []

    def log_message(self, *_):
        pass

    def do_GET(self):
        kind, name = self.path.strip("/").split("/", 1)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.log.append((kind, start))
        data, tag = self.files.get(name), '"one"'
        if data is None or (kind == "busy" and len(self.log) < 3):
            return self.send_error(404 if data is None else 503)
        if kind == "changes":
            data, tag = (data, '"one"') if len(self.log) == 1 else (data[::-1], '"two"')
            start = start if self.headers.get("If-Range") == tag else 0
        start = 0 if kind == "norange" else start + 5 if kind == "shifts" and start else start
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", tag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        is_cut = kind in ("cut", "norange", "changes", "shifts") and len(self.log) == 1
        self.wfile.write(data[start : start + 200_000] if is_cut else data[start:])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(reading, "WAIT", 0.001)
    monkeypatch.setattr(reading, "TRIES", 3)
    monkeypatch.setattr(Server, "files", {"x.txt": "".join(documents(3000)).encode()})
    monkeypatch.setattr(Server, "log", [])
    with serving(Server) as address:
        yield address


REQUESTS = dict(plain=[0], cut=[0, 19], norange=[0, 19], changes=[0, 19], shifts=[0, 19, 0], busy=[0, 0, 0])


@pytest.mark.parametrize("kind", REQUESTS)
def test_download(server, kind):
    data = Server.files["x.txt"]
    path = reading.download(f"{server}/{kind}/x.txt", "cache", True)
    assert path.read_bytes() == (data[::-1] if kind == "changes" else data)
    assert [start // 10_000 for _, start in Server.log] == REQUESTS[kind]  # up to 64 kB that had arrived may be lost
    assert reading.download(f"{server}/{kind}/x.txt", "cache", True) == path
    assert len(Server.log) == len(REQUESTS[kind]) and os.listdir("cache") == [path.name]


def test_download_of_a_source_with_hash_and_failures(run, server):
    data = Server.files["x.txt"]
    out = run(f"{server}/cut/x.txt#sha256={hashlib.sha256(data).hexdigest()}", val_fraction=0.3)
    assert sum(map(len, read_all(out))) == len(data.decode()) and Path("downloads").is_dir()
    wrong, missing, closed = f"{server}/x/x.txt#sha256={'0' * 64}", f"{server}/x/no.txt", "http://127.0.0.1:1/x.txt"
    for url, message in ((wrong, "sha256 is not"), (missing, "404"), (closed, "run again to continue")):
        with pytest.raises(ValueError, match=message) as info:
            run(url, out="bad")
        assert "\n" not in str(info.value) and not list(Path("downloads").glob("*.part"))


def test_software_heritage_rows(run, server, monkeypatch):
    texts = documents(60)
    monkeypatch.setattr(reading, "BLOBS", f"{server}/plain/")
    monkeypatch.setattr(reading, "FETCHES", 4)
    monkeypatch.setattr(Server, "files", {f"b{i}": gzip.compress(text.encode()) for i, text in enumerate(texts)})
    names = [f"b{i}" for i in range(60)]
    Path("hub").mkdir()
    pq.write_table(pa.table({"blob_id": names[:30] + ["gone"] + names[30:]}), "hub/train.parquet")
    out = run(f"swh:{Path('hub').resolve()}", val_fraction=0.3)
    assert read_all(out) == sorted(texts) and meta_of(out)["left_out"] == {"empty": 1}


# ---- What a SOURCE means


def test_smollm_recipe_is_readable():
    config = f"--config={ROOT / 'config' / 'smollm_corpus.py'}"
    sources = reading.parse_sources(prepare_data.parse_options(PrepareOptions, [config], positional="sources"))
    assert reading.shares_of(sources) == pytest.approx([0.70, 0.20, 0.05, 0.05])
    assert [source.kind for source in sources] == ["hf", "hf", "swh", "hf"]


def test_an_existing_path_wins():
    assert reading.parse_source("stories").kind == "stories"
    for name in ("stories", "a@0.5", "b@2.txt"):
        Path(name).mkdir()
        Path(name, "x.txt").write_text("text")
        source = reading.parse_source(name)
        assert (source.kind, source.ratio) == ("file", 0)
    assert reading.parse_source("a@0.5@0.25").ratio == 0.25
