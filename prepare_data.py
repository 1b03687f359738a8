"""Text in, tokens out: the data that train.py reads.

A language model never sees text. It sees a long row of integers, and this file writes that row: read documents from
wherever they are, cut each into tokens, put a BOS token before it and an EOS token behind it, append it to a file.
Two bytes a token (four when the vocabulary has more than 65,536) and nothing else, so that train.py can map the file
into memory and read any window of it, even when it is larger than the machine's memory.

    python prepare_data.py                                              the built-in stories: data/stories
    python prepare_data.py book.txt --out=data/book                     a text of your own
    python prepare_data.py web.jsonl@0.7 code/@0.3 --tokens=1_000_000   two sources, mixed 70 to 30 by tokens
    python prepare_data.py --config=config/smollm_corpus.py             what Doge was trained on

and the other data, that sft.py, dpo.py and grpo.py read, made with the tokenizer of the model that is to be tuned:

    python prepare_data.py --kind=chat stories sums --tokenizer=out/stories                  built-in conversations
    python prepare_data.py --kind=chat hf:HuggingFaceTB/smoltalk:all --tokenizer=out/doge20m --out=data/smoltalk
    python prepare_data.py --kind=preferences pairs.jsonl --tokenizer=out/chat               prompt, chosen, rejected
    python prepare_data.py --kind=problems hf:openai/gsm8k:main --tokenizer=out/chat         question, answer
    python prepare_data.py --kind=labels reviews.jsonl --labels=bad,good --tokenizer=out/chat     text, label

A SOURCE is one of these. An existing file or folder always wins over the other meanings of a name.

    stories                      the built-in world of stories.py, the same on every machine
    sums                         problems of adding and counting from that world (--kind=chat or problems)
    stdlib                       the language reference and the sources of this Python's standard library
    FILE                         .txt .md .py .jsonl .parquet, the text ones also as .gz or .zst
    FOLDER                       every such file below it, in sorted order (names that start with a dot are passed over)
    http(s)://...[#sha256=HEX]   one such file, downloaded once; an interrupted download continues where it stopped
    hf:NAME[:SUBSET[:SPLIT]]     a dataset of the Hugging Face hub, or a local folder of one, streamed; split "train"
    swh:NAME[:SUBSET[:SPLIT]]    the same for a dataset whose rows name files of the Software Heritage archive (blob_id)

What a row of another --kind is: conversations.py lists the schemas it reads, and what the written files hold.

What a document is. A row of a .jsonl, .parquet or dataset is one (--text_column), a .py file is one, a piece of text up
to --document_separator is one. Without a separator, .txt and .md files are cut into pieces of at most --piece_chars
characters, after the last blank line in the second half of the piece, else after a line, else after a space. No
character is lost. Nothing is truncated; empty documents are left out and counted.

Train or validation? The hash of a document's text decides, so a document stays on its side when data is added, and two
copies of it are never on both sides. Of a row it is the hash of the user's first words.

Mixing. `SOURCE@RATIO` gives every source a share of the --tokens training tokens. A source that is used up starts
again, and its number of epochs is reported. Without ratios the shares follow the sizes (equal if one is unknown), and
without --tokens every document is taken once. Documents of different sources are interleaved all along.

Stopping. Tokens go to OUT.partial; after every 128 MB of text the files are flushed and meta.json notes how far each
source has been read. A killed run continues from that note and ends with the same bytes. OUT appears at the end, whole.

Why threads and not processes: tiktoken lets go of Python's lock while it works, and a thread costs no memory.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from filelock import FileLock  # torch and datasets bring it

from nanodoge import conversations
from nanodoge.checkpoint import locate, read_json
from nanodoge.options import parse_options, run_command
from nanodoge.sources import Rows, check_space, in_validation, open_source, parse_source, progress, text_rows
from nanodoge.tokenizer import Tokenizer, train_bpe

BATCH = 1 << 19  # characters in the unit of work of a thread: some 50 ms of tokenising, so that hand-over costs nothing
AHEAD = 64  # batches read ahead of the one being written: work for as many cores, at most 32 MB of text
SHARD = 1 << 27  # characters between two commits: a few seconds of work are lost at most
SAMPLE = 20_000_000  # characters a vocabulary is learned from; our trainer takes about ten seconds for 32,768 tokens


@dataclass
class PrepareOptions:
    sources: list[str] = field(default_factory=lambda: ["stories"])  # where the text comes from, see above
    out: str = ""  # the folder to write; empty: data/ and the name of the first source
    tokenizer: str = ""  # a tokenizer.json, its folder or hub name, an encoding of tiktoken (gpt2); empty: train one
    vocab_size: int = 4096  # of the tokenizer to train; small, or a tiny model is all embedding; real runs use 32768
    kind: Literal["text", "chat", "preferences", "problems", "labels"] = "text"  # what the rows are, see above
    labels: list[str] = field(default_factory=list)  # what the label of a row may be, in the order of their numbers
    system: str = ""  # a system message for the conversations that have none
    tokens: int = 0  # training tokens to write; 0: every document of every source, once
    val_fraction: float = 0.05  # share of the documents kept for validation; enough for a book, large corpora need less
    text_column: str = "text"  # the column of .jsonl, .parquet and datasets
    piece_chars: int = 4096  # longest piece a .txt or .md file is cut into; 0: a file is one document
    document_separator: str = ""  # cut .txt and .md files here instead, as at <|endoftext|>
    stories: int = 20000  # how many stories and lessons (12 MB of text, minutes of training on a CPU), or built-in rows
    workers: int = 0  # threads; 0: one for each core; the output does not depend on it
    cache: str = ""  # folder for downloads; empty: downloads/ beside OUT
    overwrite: bool = False  # replace what an earlier, different call wrote to OUT


# ---------------------------------------------------------------------------------------------------------------------
# From documents to bins


def shares_of(sources):
    """What part of the tokens each source contributes: by its ratio, else by its size, else all alike."""
    sized = all(source.size for source in sources)
    weights = [source.ratio or (source.size if sized else 1) for source in sources]
    return [weight / sum(weights) for weight in weights]


class Mixer:
    """Chooses whose document comes next: always the source that is furthest behind its share of the tokens.

    How many tokens a document has is known only when it comes back from a thread. Until then its characters count, at
    the rate of this source so far. Batches come back in a fixed order, so the choice depends on nothing but the data.
    """

    def __init__(self, sources, mix, tokens):
        """mix: for each source the dictionary that meta.json keeps, updated in place. tokens: the aim, 0 for all."""
        self.sources, self.mix, self.repeat = sources, mix, bool(tokens)
        self.shares = shares_of(sources)
        self.quotas = [share * tokens if tokens else math.inf for share in self.shares]
        self.waiting = [0] * len(sources)  # characters handed out whose tokens are not counted yet
        self.readers = [self.read(i) for i in range(len(sources))]
        self.ended = set()

    def read(self, i):
        """Yields the documents of source i from where `mix` says that the last run stopped, as (i, epoch, text)."""
        source, mix = self.sources[i], self.mix[i]
        epoch, part, document = mix["position"]
        while True:
            while part < len(source.parts):
                for text in source.read(source.parts[part], document):
                    document += 1
                    mix["position"] = [epoch, part, document]
                    yield i, epoch, text
                part, document = part + 1, 0
            if not self.repeat:
                return
            if mix["position"] == [epoch, 0, 0] or (epoch > 1 and mix["characters"] and not mix["tokens"]):
                raise ValueError(f"source {source.spec!r}: no document to train on, so --tokens cannot be reached")
            epoch, part = epoch + 1, 0
            mix["position"] = [epoch, 0, 0]

    def expected(self, i):
        mix = self.mix[i]
        rate = mix["tokens"] / mix["characters"] if mix["characters"] else 0.25  # tokens a character; typical English
        return mix["tokens"] + rate * self.waiting[i]

    def next(self):
        """(source, epoch, text), or None while every source has ended or can be expected to have filled its share."""
        while True:
            behind = [i for i in range(len(self.mix)) if i not in self.ended and self.expected(i) < self.quotas[i]]
            if not behind:
                return None
            i = min(behind, key=lambda i: self.expected(i) / self.shares[i])
            if (document := next(self.readers[i], None)) is not None:
                self.waiting[i] += len(document[2]) + 1
                return document
            self.ended.add(i)


class Document(NamedTuple):
    """What comes back from a thread: one document as tokens."""

    source: int
    epoch: int
    characters: int  # of the text it was read as
    size: int = 0  # bytes of text
    is_val: bool = False
    left_out: str = ""  # why it is not to be written
    tokens: list = []  # an array, a preference's two
    masks: list = []  # as many, but for plain text
    line: bytes = b""  # for answers.jsonl


def encode(tokenizer, options, dtype, batch):
    """Runs in a thread. [(source, epoch, text)] -> [Document]"""
    if options.kind != "text":
        return [encode_row(tokenizer, options, dtype, *document) for document in batch]
    done = []
    for (source, epoch, text), ids in zip(batch, tokenizer.encode_batch([text for *_, text in batch], 1), strict=True):
        utf8, tokens = text.encode(), np.empty(len(ids) + 2, dtype)
        tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
        is_val = in_validation(utf8, options.val_fraction)
        done.append(Document(source, epoch, len(text) + 1, len(utf8), is_val, "" if text else "empty", [tokens]))
    return done


def encode_row(tokenizer, options, dtype, source, epoch, text):
    """The same for a row that conversations.document has brought into form."""
    row, start = json.loads(text), (source, epoch, len(text) + 1)
    if "left_out" in row:
        return Document(*start, left_out=row["left_out"])
    is_val = row.get("held_out", in_validation(conversations.key_of(row), options.val_fraction))
    pairs, line = conversations.encode(tokenizer, row, dtype)
    ids, masks = map(list, zip(*pairs, strict=True))
    return Document(*start, len(text.encode()), is_val, "", ids, masks, line)


class Writer:
    """The files and meta.json of an unfinished folder."""

    def __init__(self, folder, meta, bar):
        self.folder, self.meta, self.bar, self.files = folder, meta, bar, {}
        for name, size in meta["sizes"].items():
            path = folder / name
            path.touch()
            os.truncate(path, size)  # what came after is redone
            self.files[name] = open(path, "ab")

    def write(self, batch, mixer):
        """Appends a batch that came back from its thread; leaves out what a share no longer needs."""
        for document in batch:
            mix, split = self.meta["mix"][document.source], "val" if document.is_val else "train"
            mixer.waiting[document.source] -= document.characters
            mix["characters"] += document.characters
            if document.left_out:
                reasons = self.meta["left_out"]
                reasons[document.left_out] = reasons.get(document.left_out, 0) + (not document.epoch)
                continue
            if document.epoch if document.is_val else mix["tokens"] >= mixer.quotas[document.source]:
                continue  # validation documents are never repeated
            count = self.append(document, split)
            if not document.is_val:
                mix["tokens"] += count
                mix["epochs"] = document.epoch + 1
            self.bar.update(document.size if not mixer.repeat else 0 if document.is_val else count)

    def append(self, document, split):
        """Writes one document and counts it. -> how many tokens it has"""
        counts, before = self.meta[split], self.meta[split]["tokens"]
        for tokens, mask in zip(document.tokens, document.masks or [None], strict=True):
            counts["tokens"] += len(tokens)
            if mask is None:
                self.files[f"{split}.bin"].write(tokens)
                continue
            self.files[f"{split}.ids.bin"].write(tokens)
            self.files[f"{split}.mask.bin"].write(mask)
            self.files[f"{split}.offsets.bin"].write(np.array(counts["tokens"], "<i8"))
            counts["targets"] += int(mask.sum())
        if document.line:
            self.files[f"{split}.answers.jsonl"].write(document.line)
        counts["bytes"] += document.size
        counts["documents"] += 1
        return counts["tokens"] - before

    def commit(self, finished=False):
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.meta["sizes"][name] = file.tell()
        self.meta["finished"] = finished
        write_meta(self.folder, self.meta)

    def close(self):
        for file in self.files.values():
            file.close()


def write_bins(sources, tokenizer, options, folder, meta, bar):
    """The main loop: this thread reads and writes, the pool tokenises in between; batches come back in order."""
    workers = options.workers or os.cpu_count() or 1
    mixer, writer = Mixer(sources, meta["mix"], options.tokens), Writer(folder, meta, bar)
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    pool, pending, since_commit = ThreadPoolExecutor(workers), deque(), 0
    try:
        while True:
            batch, size = [], 0
            while size < BATCH and (document := mixer.next()):
                batch.append(document)
                size += len(document[2]) + 1
            if batch:
                pending.append(pool.submit(encode, tokenizer, options, dtype, batch))
                since_commit += size
            elif not pending:
                break
            full = since_commit >= SHARD
            keep = 0 if full else AHEAD if batch else len(pending) - 1
            while pending and (len(pending) > keep or sum(mixer.waiting) > AHEAD * BATCH):
                writer.write(pending.popleft().result(), mixer)
            if full:
                writer.commit()
                since_commit = 0
        for split in ("train", "val"):
            if not meta[split]["documents"]:
                count = meta["train"]["documents"] + meta["val"]["documents"]
                raise ValueError(f"--val_fraction={options.val_fraction}: of {count} documents none is in {split}.bin; "
                                 "give more text, another fraction or smaller --piece_chars")
        writer.commit(finished=True)
    finally:
        pool.shutdown(cancel_futures=True)
        writer.close()


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def sample(sources, options):
    """Yields training documents to learn a vocabulary from: up to SAMPLE characters, shared by the sources as they are
    mixed and by up to 64 evenly spaced parts of each."""
    for source, share in zip(sources, shares_of(sources), strict=True):
        parts = source.parts[:: -(-len(source.parts) // 64) or 1]
        for part in parts:
            left = SAMPLE * share / len(parts)
            for text in source.read(part, 0):
                if not in_validation(text.encode(), options.val_fraction):
                    yield text
                if (left := left - len(text)) <= 0:
                    break


def check_options(options, sources):
    for name, low, high in (("stories", 1, 1e9), ("tokens", 0, 1e15), ("workers", 0, 1024), ("piece_chars", 0, 1e7)):
        if not low <= getattr(options, name) <= high:
            raise ValueError(f"--{name}={getattr(options, name)}: must be from {low} to {high:.0f}")
    if not 0 < options.val_fraction < 1:
        raise ValueError(f"--val_fraction={options.val_fraction}: must be above 0 and below 1")
    if len({source.place for source in sources}) < len(sources) or not sources:
        raise ValueError(f"sources {options.sources}: at least one is needed, and each only once")
    ratios = [source.ratio for source in sources]
    if any(ratios) and not all(ratios):
        raise ValueError(f"source {sources[ratios.index(0)].spec!r} has no @RATIO: give one to every source or to none")
    if any(ratios) and not options.tokens:
        raise ValueError("ratios need --tokens=N: the training tokens they are shares of")
    if options.kind != "text" and not options.tokenizer:
        raise ValueError(f"--kind={options.kind} needs the --tokenizer of the model to be tuned: its checkpoint folder")
    if options.kind in ("text", "labels") and options.system:
        raise ValueError("--system is a message of conversations: it needs --kind=chat, preferences or problems")
    labels = options.labels
    if (options.kind == "labels") != bool(labels) or len(labels) == 1 or len(set(labels)) < len(labels):
        raise ValueError(f"--labels={','.join(labels)}: --kind=labels, and no other, needs two or more different names")


def read_meta(folder):
    path = Path(folder) / "meta.json"
    return read_json(path) if path.is_file() else None


def write_meta(folder, meta):
    temporary = folder / "meta.json.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / "meta.json")


def is_there(out, request, overwrite):
    """True if `out` is the finished output of the same request. Raises ValueError if it is anything else of value."""
    meta = read_meta(out) if out.is_dir() else None
    if meta and meta.get("request") == request:
        return True
    if meta and not overwrite:
        raise ValueError(f"{out}: of another call ({differences(meta, request)}); give another --out, or --overwrite")
    if not meta and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: exists and was not made by prepare_data.py; give another --out")
    return False


def differences(meta, request):
    old = meta.get("request", {})
    return "differs in " + ", ".join(key for key in request if old.get(key) != request[key])


def describe(options, sources, tokenizer):
    """Everything the output depends on: two calls with equal descriptions write the same bytes."""
    same = ("sources", "tokens", "val_fraction", "text_column", "piece_chars", "document_separator", "stories")
    same += ("kind", "system") if options.kind != "text" else ()
    same += ("labels",) if options.kind == "labels" else ()
    request = {name: getattr(options, name) for name in same}
    request["inputs"] = [source.inputs for source in sources]
    request["tokenizer"] = tokenizer.digest if tokenizer else f"trained, vocab_size={options.vocab_size}"
    return json.loads(json.dumps(request))


def begin(partial, request, tokenizer, sources):
    """Makes the unfinished folder, with its tokenizer and a meta.json that says that nothing is written yet."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(partial)
    meta = {"dtype": "uint16" if tokenizer.vocab_size <= 65536 else "uint32", "vocab_size": tokenizer.vocab_size}
    meta |= {"tokenizer": "tokenizer.json", "tokenizer_sha256": tokenizer.digest, "source": request["sources"]}
    names = ["bin"]
    if (kind := request.get("kind", "text")) != "text":
        meta |= {"kind": kind, "chat_template": tokenizer.chat_template}
        meta |= {"labels": request["labels"]} if kind == "labels" else {}
        names = ["ids.bin", "mask.bin", "offsets.bin"] + ["answers.jsonl"] * (kind == "problems")
    for split in ("train", "val"):
        meta[split] = {"tokens": 0, "bytes": 0, "documents": 0} | ({"targets": 0} if kind != "text" else {})
    meta["sizes"] = {f"{split}.{name}": 0 for split in ("train", "val") for name in names}
    for split in ("train", "val") if kind != "text" else ():
        (partial / f"{split}.offsets.bin").write_bytes(bytes(8))  # the first conversation begins at 0
        meta["sizes"][f"{split}.offsets.bin"] = 8
    start = {"tokens": 0, "characters": 0, "epochs": 1, "position": [0, 0, 0]}
    meta |= {"mix": [{"source": source.spec, **start} for source in sources], "left_out": {}}
    meta |= {"finished": False, "request": request}
    write_meta(partial, meta)
    return meta


def prepare(options, quiet=False):
    """Makes the folder that `options` (PrepareOptions) describe, unless it is there already. Returns its path.

    Raises ValueError with one line for a user's mistake; what an earlier call made is then untouched.
    """
    say = (lambda *words: None) if quiet else print
    sources = [parse_source(spec) for spec in options.sources]
    check_options(options, sources)
    name = re.split(r"[/\\:]", sources[0].place.partition("#")[0].rstrip("/\\"))[-1].split(".")[0] or "text"
    out = Path(options.out or f"data/{name}" + f"-{options.kind}" * (options.kind != "text"))
    if not out.name:
        raise ValueError(f"--out={options.out}: not the name of a folder of its own")
    given = Tokenizer.load(locate(options.tokenizer)) if options.tokenizer else None
    request = describe(options, sources, given)
    if not is_there(out, request, options.overwrite):
        out.parent.mkdir(parents=True, exist_ok=True)
        with alone(out):
            if not is_there(out, request, options.overwrite):  # another process may have made it meanwhile
                make(options, sources, given, request, out, say, quiet)
                return out
    say(f"{out} is there already, made by the same call")
    return out


@contextlib.contextmanager
def alone(out):
    """Waits until no other process prepares `out`: two at once would write into each other's files."""
    path = out.with_name(out.name + ".lock")
    try:
        with FileLock(path):
            yield
    finally:
        path.unlink(missing_ok=True)


def make(options, sources, given, request, out, say, quiet):
    """Reads the sources into OUT.partial, from where an earlier call was stopped, then makes that `out`."""
    partial = out.with_name(out.name + ".partial")
    meta = read_meta(partial)
    if meta and meta.get("request") != request:
        if meta["train"]["documents"] and not options.overwrite:
            raise ValueError(f"{partial}: unfinished work of another call ({differences(meta, request)}); finish that, "
                             "or discard it with --overwrite")
        meta = None
    rows = text_rows(options.text_column)
    if options.kind != "text":
        rows = Rows(*conversations.rows(options.kind, options.system, options.labels))
    for source in sources:
        open_source(source, options, rows, options.cache or out.parent / "downloads", quiet)
    width = 2 if not given or given.vocab_size <= 65536 else 4
    size = sum(source.size for source in sources)
    check_space(out.parent, width * (options.tokens or size / 4), f"writing {out}")  # 4 bytes a token at the best
    if meta is None:
        if not given:
            say(f"learning a vocabulary of {options.vocab_size} tokens")
        meta = begin(partial, request, given or train_bpe(sample(sources, options), options.vocab_size), sources)
    else:
        say(f"continuing after {meta['train']['documents']:,} documents")
    if not meta["finished"]:
        goal = {"unit": "tok", "total": options.tokens} if options.tokens else {"unit": "B", "total": size or None}
        done = meta["train"]["tokens"] if options.tokens else meta["train"]["bytes"] + meta["val"]["bytes"]
        try:
            with progress(quiet, out.name, start=done, **goal) as bar:
                write_bins(sources, Tokenizer.load(partial), options, partial, meta, bar)
        except ValueError:
            if not read_meta(partial)["train"]["documents"]:  # nothing worth continuing
                shutil.rmtree(partial)
            raise
    replace_folder(partial, out)
    report(out, meta, say)


def replace_folder(new, out):
    """Renames `new` to `out`; a folder that was there is moved aside first and deleted last."""
    old = out.with_name(out.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)


def report(out, meta, say):
    kind = meta.get("kind", "text")
    for split in ("train", "val"):
        count = meta[split]
        documents = f"{count['documents']:,} {dict(text='documents', chat='conversations').get(kind, kind)}"
        if kind == "text":
            rate = f"{count['bytes'] / count['tokens']:.2f} bytes a token"
            say(f"{out / split}.bin: {count['tokens']:,} tokens, {documents}, {rate}")
        else:
            learned = f", {count['targets']:,} of them to learn" if kind != "problems" else ""
            say(f"{out / split}.*: {documents}, {count['tokens']:,} tokens{learned}")
    for mix in meta["mix"]:
        if len(meta["mix"]) > 1 or mix["epochs"] > 1:
            again = f", read {mix['epochs']} times" if mix["epochs"] > 1 else ""
            say(f"  {mix['tokens'] / meta['train']['tokens']:6.1%} {mix['source']}{again}")
    for reason, count in meta["left_out"].items():
        say(f"  left out: {count:,} {reason}")


def main(argv):
    prepare(parse_options(PrepareOptions, argv, positional="sources"))


if __name__ == "__main__":
    run_command(main)
