"""Text in, tokens out: the data that train.py, sft.py, dpo.py and grpo.py read.

A language model reads integers, not text. This script cuts each document into tokens, puts a BOS token before it and an
EOS token after it, and appends it to train.bin or val.bin: two bytes per token (four if the vocabulary has more than
65,536) and nothing else. So train.py can map a file into memory, even one that is larger than the machine's memory.

    python prepare_data.py                                              the built-in stories: data/stories
    python prepare_data.py book.txt --out=data/book                     a text of your own
    python prepare_data.py web.jsonl@0.7 code/@0.3 --tokens=1_000_000   two sources, mixed 70 to 30 by tokens
    python prepare_data.py --config=config/smollm_corpus.py             what Doge was trained on

The tuning stages read rows, tokenised for the model to be tuned; conversations.py lists their columns:

    python prepare_data.py --kind=chat stories sums --tokenizer=out/stories                  built-in conversations
    python prepare_data.py --kind=chat hf:HuggingFaceTB/smoltalk:all --tokenizer=out/doge20m --out=data/smoltalk
    python prepare_data.py --kind=preferences pairs.jsonl --tokenizer=out/chat               prompt, chosen, rejected
    python prepare_data.py --kind=problems hf:openai/gsm8k:main --tokenizer=out/chat         question, answer
    python prepare_data.py --kind=labels reviews.jsonl --labels=bad,good --tokenizer=out/chat     text, label

A SOURCE is one of these; an existing file or folder comes before the other meanings of a name:

    stories                      the built-in world of stories.py, the same on every machine
    sums                         problems of adding and counting from that world (--kind=chat or problems)
    stdlib                       the language reference and the sources of this Python's standard library
    FILE                         .txt .md .py .jsonl .parquet, the text ones also as .gz or .zst
    FOLDER                       every such file below it in sorted order, except names that start with a dot
    http(s)://...[#sha256=HEX]   one such file, downloaded once; an interrupted download continues where it stopped
    hf:NAME[:SUBSET[:SPLIT]]     a dataset of the Hugging Face hub, or a local folder of one, streamed; split "train"
    swh:NAME[:SUBSET[:SPLIT]]    the same for a dataset whose rows name files of the Software Heritage archive (blob_id)

Documents. A row is one document (its --text_column), and so is a .py file, and text up to a --document_separator.
Without a separator, .txt and .md files are cut into pieces of at most --piece_chars characters: after the last blank
line in the second half of the piece, else a line, else a space. No text is lost. Empty documents are counted only.

Train or validation? The hash of a document decides (of a row: the hash of the user's first words). So a document stays
on its side when data is added, and two copies of it are never on both sides.

Mixing. SOURCE@RATIO gives each source a share of the --tokens training tokens. A source that is used up starts again,
and its number of epochs is reported. Without ratios the shares follow the sizes (equal if one is unknown); without
--tokens every document is taken once. Documents of different sources alternate from start to end.

Stopping. Tokens are written to OUT.partial. After every 128 MB of text meta.json records how far each source is read: a
killed run continues from there and ends with the same bytes. OUT appears at the end, in one rename.
"""

import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from filelock import FileLock  # torch and datasets bring it
from tqdm import tqdm

from nanodoge import answers, conversations
from nanodoge.checkpoint import flush, locate, read_json
from nanodoge.options import Count, Range, Whole, check_ranges, parse_options, run_command
from nanodoge.sources import Source, check_space, in_validation, open_source, parse_source, shares_of, text_of
from nanodoge.tokenizer import Tokenizer, train_bpe

SAMPLE = 20_000_000  # characters a vocabulary is learned from; our trainer takes about ten seconds for 32,768 tokens
BATCH = 1 << 19  # characters a thread tokenises at a time: about 50 ms
AHEAD = 64  # batches read ahead of the one being written: work for as many cores, at most 32 MB of text
SHARD = 1 << 27  # characters between two commits: a killed run loses a few seconds of work at most


@dataclass
class PrepareOptions:
    """The options people need first"""

    sources: list[str] = field(default_factory=lambda: ["stories"])  # where the text comes from, see below
    out: str = ""  # the folder to write; empty: data/ and the name of the first source
    tokenizer: str = ""  # a tokenizer.json, its folder or hub name, an encoding of tiktoken (gpt2); empty: train one
    vocab_size: int = 4096  # of the tokenizer to train; small, or a tiny model is all embedding; real runs use 32768
    kind: Literal["text", "chat", "preferences", "problems", "labels"] = "text"  # what the rows are, see below
    tokens: Whole = 0  # training tokens to write; 0: every document of every source, once
    val_fraction: Annotated[float, Range(0, 1, True, True)] = 0.05  # share of the documents kept for validation
    text_column: str = "text"  # the column of .jsonl, .parquet and datasets
    stories: Count = 20000  # of the built-in world: stories and lessons (12 MB of text), or rows
    overwrite: bool = False  # replace what an earlier, different call wrote to OUT
    # ---- Details
    labels: list[str] = field(default_factory=list)  # what the label of a row may be, in the order of their numbers
    system: str = ""  # a system message for the conversations that have none
    piece_chars: Annotated[int, Range(0, 10_000_000)] = 4096  # longest piece of a .txt or .md file; 0: never cut
    document_separator: str = ""  # cut .txt and .md files here instead, as at <|endoftext|>
    workers: Whole = 0  # threads; 0: one per core; the output does not depend on it
    cache: str = ""  # folder for downloads; empty: downloads/ beside OUT

    def __post_init__(self) -> None:
        check_ranges(self)
        names = self.labels
        if self.kind != "text" and not self.tokenizer:
            raise ValueError(f"--kind={self.kind} needs the --tokenizer of the model to be tuned")
        if self.kind in ("text", "labels") and self.system:
            raise ValueError("--system is a message of conversations: it needs --kind=chat, preferences or problems")
        if (self.kind == "labels") != bool(names) or len(names) == 1 or len(set(names)) < len(names):
            raise ValueError(f"--labels={','.join(names)}: --kind=labels, and no other, needs two different names")


# ---- From documents to files


class Document(NamedTuple):
    """A document on its way to the files. A thread takes the text away and adds the last five fields."""

    source: int  # the number of its source
    epoch: int  # how often that source was read before
    text: str
    characters: int  # of the text, and one
    size: int = 0  # bytes of text
    is_val: bool = False
    left_out: str = ""  # why it is not to be written
    sequences: Sequence = ()  # (ids, mask): one pair, or a preference's two; the mask of plain text is None
    answer: bytes = b""  # a problem's line of answers.jsonl


class Mixer:
    """Chooses whose document comes next: that of the source which is furthest behind its share of the tokens.

    Until a document returns from its thread its tokens are estimated, from its characters and the tokens per character
    of its source so far. Batches return in a fixed order, so the choice depends on the data alone.
    """

    def __init__(self, sources: list[Source], meta: dict, tokens: int):
        """meta: of the folder, updated in place. tokens: the aim; 0: every document once."""
        self.mix, self.left_out, self.repeat = meta["mix"], meta["left_out"], tokens > 0
        self.shares = shares_of(sources)
        self.quotas = [share * tokens or math.inf for share in self.shares]
        self.waiting = [0] * len(sources)  # characters handed out whose tokens are not counted yet
        self.readers = {i: self.read(i, source) for i, source in enumerate(sources)}  # of sources that have not ended

    def read(self, i: int, source: Source) -> Iterator[Document]:
        """Yields the documents of source i from the position where the last run stopped."""
        mix = self.mix[i]
        epoch, first, document = mix["position"]
        while True:
            for part in range(first, len(source.parts)):
                for text in source.read(source.parts[part], document):
                    document += 1
                    mix["position"] = [epoch, part, document]
                    yield Document(i, epoch, text, len(text) + 1)
                document = 0
            if not self.repeat:
                return
            if mix["position"] == [epoch, 0, 0] or (epoch > 1 and mix["characters"] and not mix["tokens"]):
                raise ValueError(f"source {source.spec!r}: no document to train on, so --tokens cannot be reached")
            epoch, first = epoch + 1, 0
            mix["position"] = [epoch, 0, 0]

    def batch(self) -> list[Document]:
        """The next documents, BATCH characters together; fewer when all sources have ended or should be full."""
        documents, size = [], 0

        def expected(i: int) -> float:  # tokens of source i when all its documents have returned
            tokens, characters = self.mix[i]["tokens"], self.mix[i]["characters"]
            return tokens + self.waiting[i] * (tokens / characters if characters else 0.25)  # typical for English

        while size < BATCH and (behind := [i for i in self.readers if expected(i) < self.quotas[i]]):
            i = min(behind, key=lambda i: expected(i) / self.shares[i])
            if document := next(self.readers[i], None):
                documents.append(document)
                size += document.characters
                self.waiting[i] += document.characters
            else:
                del self.readers[i]
        return documents

    def count(self, document: Document) -> bool:
        """Counts a document that has returned from its thread. True if it is to be written."""
        i, is_first = document.source, document.epoch == 0
        self.waiting[i] -= document.characters
        self.mix[i]["characters"] += document.characters
        if document.left_out:
            self.left_out[document.left_out] = self.left_out.get(document.left_out, 0) + is_first
            return False
        if document.is_val or self.mix[i]["tokens"] >= self.quotas[i]:
            return document.is_val and is_first  # validation documents are never repeated
        self.mix[i]["tokens"] += sum(len(ids) for ids, _ in document.sequences)
        self.mix[i]["epochs"] = document.epoch + 1
        return True


def encode(tokenizer: Tokenizer, options: PrepareOptions, dtype: np.dtype, document: Document) -> Document:
    """The document with its tokens. Runs in a thread: tiktoken releases Python's lock, and a thread costs no memory."""
    text, utf8 = document.text, document.text.encode()
    document = document._replace(text="", size=len(utf8))
    if not text:
        return document._replace(left_out="empty")
    if options.kind == "text":
        ids = tokenizer.encode_to_numpy(text)
        ids = np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id])).astype(dtype)
        return document._replace(is_val=in_validation(utf8, options.val_fraction), sequences=[(ids, None)])
    row = json.loads(text)  # as conversations.document made it
    if "left_out" in row:
        return document._replace(left_out=row["left_out"])
    is_val = row.get("held_out", in_validation(conversations.key_of(row), options.val_fraction))
    sequences, answer = conversations.encode(tokenizer, row, dtype)
    return document._replace(is_val=is_val, sequences=sequences, answer=answer)


class Writer:
    """The files of an unfinished folder, and its meta.json, which says how much of each counts."""

    def __init__(self, folder: Path, meta: dict, stack: ExitStack):
        self.folder, self.meta, self.files = folder, meta, {}
        for name, size in meta["sizes"].items():
            file = self.files[name] = stack.enter_context(open(folder / name, "ab"))
            file.truncate(size)  # what follows is written again
            file.seek(size)

    def write(self, document: Document) -> None:
        """Appends a document and counts it."""
        split = "val" if document.is_val else "train"
        counts = self.meta[split]
        for ids, mask in document.sequences:
            counts["tokens"] += len(ids)
            if mask is None:
                self.files[f"{split}.bin"].write(ids)
                continue
            counts["targets"] += int(mask.sum())
            for name, array in {"ids": ids, "mask": mask, "offsets": np.array(counts["tokens"], "<i8")}.items():
                self.files[f"{split}.{name}.bin"].write(array)
        if document.answer:
            self.files[f"{split}.answers.jsonl"].write(document.answer)
        counts["bytes"] += document.size
        counts["documents"] += 1

    def commit(self, finished: bool = False) -> None:
        """Makes what was written count."""
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.meta["sizes"][name] = file.tell()
        self.meta["finished"] = finished
        write_meta(self.folder, self.meta)


def write_documents(sources: list[Source], options: PrepareOptions, folder: Path, meta: dict, quiet: bool) -> None:
    """The main loop: this thread reads and writes, the pool tokenises in between; batches return in order."""
    mixer, pending, since_commit = Mixer(sources, meta, options.tokens), deque(), 0
    work = partial(encode, Tokenizer.load(folder), options, np.dtype(meta["dtype"]).newbyteorder("<"))
    unit, total = ("tokens", options.tokens) if options.tokens else ("bytes", sum(source.size for source in sources))
    with ExitStack() as stack:
        writer, pool = Writer(folder, meta, stack), ThreadPoolExecutor(options.workers or os.cpu_count())
        stack.callback(pool.shutdown, cancel_futures=True)
        bar = tqdm(desc=folder.stem, total=total or None, unit=unit, unit_scale=True, disable=quiet or None)
        stack.enter_context(bar)
        while (batch := mixer.batch()) or pending:
            if batch:
                pending.append(pool.submit(list, map(work, batch)))
                since_commit += sum(document.characters for document in batch)
            keep = 0 if since_commit >= SHARD else AHEAD if batch else len(pending) - 1
            while pending and (len(pending) > keep or sum(mixer.waiting) > AHEAD * BATCH):
                for document in filter(mixer.count, pending.popleft().result()):
                    writer.write(document)
                bar.update(meta["train"][unit] + meta["val"][unit] - bar.n)
            if since_commit >= SHARD:
                writer.commit()
                since_commit = 0
        for split in ("train", "val"):
            if not meta[split]["documents"]:
                problem = f"of {meta['train']['documents'] + meta['val']['documents']} documents none is in {split}.bin"
                advice = "give more text, another --val_fraction or smaller --piece_chars"
                raise ValueError(f"--val_fraction={options.val_fraction}: {problem}; {advice}")
        writer.commit(finished=True)


# ---- The folder


def sample(sources: list[Source], options: PrepareOptions) -> Iterator[str]:
    """Yields training documents to learn a vocabulary from: SAMPLE characters, shared by the sources as they are mixed
    and by up to 64 evenly spaced parts of each."""
    for source, share in zip(sources, shares_of(sources), strict=True):
        for part in (parts := source.parts[:: -(-len(source.parts) // 64) or 1]):
            left = SAMPLE * share / len(parts)
            for text in source.read(part):
                if not in_validation(text.encode(), options.val_fraction):
                    yield text
                if (left := left - len(text)) <= 0:
                    break


def parse_sources(options: PrepareOptions) -> list[Source]:
    """The sources of the command line. Raises ValueError for a combination that has no meaning."""
    sources = [parse_source(spec) for spec in options.sources]
    if len({source.place for source in sources}) < len(sources) or not sources:
        raise ValueError(f"sources {options.sources}: at least one is needed, and each only once")
    bare = [source.spec for source in sources if not source.ratio]
    if 0 < len(bare) < len(sources):
        raise ValueError(f"source {bare[0]!r} has no @RATIO: give one to every source or to none")
    if not bare and not options.tokens:
        raise ValueError("ratios need --tokens=N: the training tokens they are shares of")
    return sources


def describe(options: PrepareOptions, sources: list[Source], tokenizer: Tokenizer | None) -> dict:
    """All that the output depends on: calls with equal descriptions write the same bytes."""
    names = "sources tokens val_fraction text_column piece_chars document_separator stories"
    names += {"text": "", "labels": " kind system labels"}.get(options.kind, " kind system")
    request = {name: getattr(options, name) for name in names.split()}
    request["inputs"] = [source.inputs for source in sources]
    request["tokenizer"] = tokenizer.digest if tokenizer else f"trained, vocab_size={options.vocab_size}"
    return request


def read_meta(folder: Path) -> dict:
    path = Path(folder, "meta.json")
    return read_json(path) if path.is_file() else {}


def write_meta(folder: Path, meta: dict) -> None:
    temporary = folder / "meta.json.tmp"
    temporary.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    flush(temporary)
    os.replace(temporary, folder / "meta.json")


def holds(folder: Path, request: dict, overwrite: bool) -> bool:
    """True if `folder` is of this request. Raises ValueError if it is of another one that it must not overwrite."""
    meta = read_meta(folder)
    if meta.get("request") == request:
        return True
    if meta and not overwrite and (meta.get("finished") or meta["train"]["documents"]):
        what = "of another call" if meta.get("finished") else "unfinished work of another call"
        differs = ", ".join(key for key in request if meta.get("request", {}).get(key) != request[key])
        raise ValueError(f"{folder}: {what} (differs in {differs}); give another --out, or --overwrite")
    return False


def begin(folder: Path, request: dict, tokenizer: Tokenizer) -> dict:
    """Makes the unfinished folder with its tokenizer -> its meta.json, which says that nothing is written yet."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    meta = {"dtype": "uint16" if tokenizer.vocab_size <= 65536 else "uint32", "vocab_size": tokenizer.vocab_size}
    meta |= {"tokenizer": "tokenizer.json", "tokenizer_sha256": tokenizer.digest, "source": request["sources"]}
    counts, files = {"tokens": 0, "bytes": 0, "documents": 0}, {"bin": 0}
    if "kind" in request:
        meta |= {"kind": request["kind"], "chat_template": tokenizer.chat_template}
        meta |= {"labels": request["labels"]} if "labels" in request else {}
        counts, files = counts | {"targets": 0}, {"ids.bin": 0, "mask.bin": 0, "offsets.bin": 8}  # 8 bytes: a first 0
        files |= {"answers.jsonl": 0} if request["kind"] == "problems" else {}
    meta |= {"train": counts, "val": dict(counts)}
    meta["sizes"] = {f"{split}.{name}": size for split in ("train", "val") for name, size in files.items()}
    start = {"tokens": 0, "characters": 0, "epochs": 1, "position": [0, 0, 0]}
    meta["mix"] = [{"source": spec, **start} for spec in request["sources"]]
    meta |= {"left_out": {}, "finished": False, "request": request}
    write_meta(folder, meta)
    return meta


def default_out(place: str, kind: str) -> str:
    """data/ and the name of a source, and the kind of its rows."""
    name = re.split(r"[/\\:]", place.partition("#")[0].rstrip("/\\"))[-1].split(".")[0] or "text"
    return f"data/{name}" + f"-{kind}" * (kind != "text")


def prepare(options: PrepareOptions, quiet: bool = False) -> Path:
    """The folder that `options` describe, made unless it is there already. Raises ValueError with one line for a user's
    mistake; what an earlier call made is then untouched."""
    sources = parse_sources(options)
    out = Path(options.out or default_out(sources[0].place, options.kind))
    if not out.name or (out.exists() and not read_meta(out) and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"--out={out}: exists and was not made by prepare_data.py; give another folder")
    tokenizer = Tokenizer.load(locate(options.tokenizer)) if options.tokenizer else None
    request = describe(options, sources, tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(out.name + ".lock")
    try:
        with FileLock(lock):  # two processes would write into each other's files: the second waits
            is_there = holds(out, request, options.overwrite)
            meta = read_meta(out) if is_there else make(out, sources, tokenizer, options, quiet)
    finally:
        lock.unlink(missing_ok=True)
    if not quiet:
        print(f"{out} is there already, made by the same call" if is_there else f"{out} is complete")
        report(out, meta)
    return out


def make(out: Path, sources: list[Source], tokenizer: Tokenizer | None, options: PrepareOptions, quiet: bool) -> dict:
    """Reads the sources into OUT.partial, from where an earlier call was stopped, then makes that `out` -> its meta."""
    folder, request = out.with_name(out.name + ".partial"), describe(options, sources, tokenizer)
    meta = read_meta(folder) if holds(folder, request, options.overwrite) else {}
    document = partial(text_of, column=options.text_column)
    if options.kind != "text":
        document = partial(conversations.document, kind=options.kind, system=options.system, labels=options.labels)
    for source in sources:
        open_source(source, options, document, options.cache or out.parent / "downloads", quiet)
    size = sum(source.size for source in sources)
    check_space(out.parent, 2 * (options.tokens or size / 4), f"writing {out}")  # 2 bytes per token of 4 bytes of text
    if not meta:
        if not tokenizer and not quiet:
            print(f"learning a vocabulary of {options.vocab_size} tokens")
        meta = begin(folder, request, tokenizer or train_bpe(sample(sources, options), options.vocab_size))
    try:
        if not meta["finished"]:
            write_documents(sources, options, folder, meta, quiet)
    except ValueError:
        if not read_meta(folder)["train"]["documents"]:  # nothing worth continuing
            shutil.rmtree(folder)
        raise
    replaced = out.with_name(out.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        os.replace(out, replaced)
    os.replace(folder, out)
    shutil.rmtree(replaced, ignore_errors=True)
    return meta


def report(out: Path, meta: dict) -> None:
    """Prints what a folder holds."""
    for split in ("train", "val"):
        count = meta[split]
        what = f"{count['documents']:,} {meta.get('kind', 'documents')}, {count['tokens']:,} tokens"
        learn = f", {count['targets']:,} of them to learn" if count.get("targets") else ""
        print(f"{out / split}: {what}{learn}, {count['bytes'] / count['tokens']:.2f} bytes per token")
    answers.report(out / "train.answers.jsonl")
    for mix in meta["mix"]:
        print(f"  {mix['tokens'] / meta['train']['tokens']:6.1%} {mix['source']}, epochs: {mix['epochs']}")
    for reason, count in meta["left_out"].items():
        print(f"  left out: {count:,} {reason}")


def prepare_built_in(folder: str, kind: str = "text", tokenizer: str = "", say: Callable = print) -> None:
    """Makes data/stories, data/stdlib, data/stories-chat, data/sums-problems and their like, unless it is there. Does
    nothing for a folder of another name or kind. tokenizer: as --tokenizer. Of several ranks, rank 0 calls this."""
    for source in ("stories", "stdlib", "sums"):
        if folder == default_out(source, kind) and not Path(folder, "meta.json").is_file():
            say(f"preparing the built-in {folder}")
            prepare(PrepareOptions([source], folder, tokenizer, kind=kind))


def main(argv: list[str]) -> None:
    prepare(parse_options(PrepareOptions, argv, positional="sources"))


if __name__ == "__main__":
    run_command(main)
