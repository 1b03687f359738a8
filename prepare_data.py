"""Text in, tokens out: the data that train.py, sft.py, dpo.py and grpo.py read.

A language model reads integers, not text. This script cuts each document into tokens, puts a BOS token before it and an
EOS token after it, and appends it to train.bin or val.bin: two bytes per token (four if the vocabulary has more than
65,536) and nothing else. So train.py can map a file into memory, even one that is larger than the machine's memory.

    python prepare_data.py                                              the built-in stories: data/stories
    python prepare_data.py book.txt --out=data/book                     a text of your own
    python prepare_data.py web.jsonl@0.7 code/@0.3 --tokens=1_000_000   two sources, mixed 70 to 30 by tokens
    python prepare_data.py --config=config/smollm_corpus.py             what Doge was trained on

The tuning stages read rows, tokenised for the model to be tuned; their columns are listed at the end:

    python prepare_data.py --kind=chat stories sums --tokenizer=out/stories                  built-in conversations
    python prepare_data.py --kind=problems hf:openai/gsm8k:main --tokenizer=out/chat
    python prepare_data.py --kind=labels reviews.csv --labels=bad,good --tokenizer=out/chat

A SOURCE is one of these; an existing file or folder comes before the other meanings of a name:

    stories                      the built-in world of stories.py, the same on every machine
    sums                         problems of adding and counting from that world (--kind=chat or problems)
    stdlib                       the language reference and the sources of this Python's standard library
    FILE                         .txt .md .py .json .jsonl .csv .tsv, also as .gz or .zst; .parquet
    FOLDER                       every such file below it in sorted order, except names that start with a dot; other
                                 files are counted, links to folders followed
    http(s)://...[#sha256=HEX]   one such file, downloaded once; an interrupted download continues where it stopped
    hf:NAME[:SUBSET[:SPLIT]]     a dataset of the Hugging Face hub, or a local folder of one, streamed; split "train"
    swh:NAME[:SUBSET[:SPLIT]]    the same for a dataset whose rows name files of the Software Heritage archive (blob_id)

Documents. A row is one document (its --text_column), and so is a .py file, and text up to a --document_separator.
Without one, .txt and .md files are cut into pieces of at most --piece_chars characters (a small text into eight pieces
or more): after the last blank line in the second half of a piece, else a line, else a space. No text is lost.

Train or validation? The hash of a document decides (of a row: the hash of the user's first words). So a document stays
on its side when data is added, and two copies of it are never on both sides. If all documents would be on one
side, the one with the smallest hash is held out. --val=SOURCE gives a validation set of your own instead.

Bad rows. A row that cannot be used is left out and counted, with the reason and the place of the first. The run stops
when there are more than --max_left_out, and at once if the first row of a file has not the columns it needs.

Mixing. SOURCE@RATIO gives each source a share of the --tokens training tokens. A source that is used up starts again.
Without ratios the shares follow the sizes (equal if one is unknown); without --tokens every document is taken once.

Stopping. Tokens are written to OUT.partial. After every 128 MB of text meta.json records how far each source is read: a
killed run continues from there and ends with the same bytes. OUT appears at the end, in one rename.
"""

import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from filelock import FileLock  # torch and datasets bring it
from tqdm import tqdm

from nanodoge import answers, conversations
from nanodoge.checkpoint import flush, locate, read_json
from nanodoge.conversations import RowError
from nanodoge.mixer import Document, Mixer, check_left_out, left_out
from nanodoge.options import Count, Range, Share, Whole, check_ranges, parse_options, run_command
from nanodoge.sources import Source, hash_of, open_source, parse_sources, sample
from nanodoge.tokenizer import Tokenizer, train_bpe

__doc__ += conversations.SCHEMAS_HELP  # for --help
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
    val: list[str] = field(default_factory=list)  # sources to hold out, instead of a share of SOURCE
    overwrite: bool = False  # replace what an earlier, different call wrote to OUT
    # ---- Details
    labels: list[str] = field(default_factory=list)  # what the label of a row may be, in the order of their numbers
    system: str = ""  # a system message for the conversations that have none
    piece_chars: Annotated[int, Range(0, 10_000_000)] = 4096  # longest piece of a .txt or .md file; 0: never cut
    document_separator: str = ""  # cut .txt and .md files here instead, as at <|endoftext|>
    max_left_out: Share = 0.01  # the run stops when more of the rows cannot be used (one always may be so)
    workers: Whole = 0  # threads; 0: one per core; the output does not depend on it

    def __post_init__(self) -> None:
        check_ranges(self)
        names, self.limit = self.labels, 0 if self.val else self.val_fraction * 2**64  # validation is what hashes below
        self.whole = False  # the hash is of whole rows
        if self.kind != "text" and not self.tokenizer:
            raise ValueError(f"--kind={self.kind} needs the --tokenizer of the model to be tuned")
        if self.kind in ("text", "labels") and self.system:
            raise ValueError("--system is a message of conversations: it needs --kind=chat, preferences or problems")
        if (self.kind == "labels") != bool(names) or len(names) == 1 or len(set(names)) < len(names):
            raise ValueError(f"--labels={','.join(names)}: --kind=labels, and no other, needs two different names")


# ---- From documents to files


def encode(tokenizer: Tokenizer, options: PrepareOptions, dtype: np.dtype, document: Document) -> Document:
    """The document with its tokens in place of its text. Runs in a thread: tiktoken releases Python's lock."""
    if isinstance(document.text, RowError):
        return document
    text, answer = document.text, b""
    try:
        if not text:
            raise RowError("empty")
        utf8 = text.encode()
        if options.kind == "text":
            ids = np.concatenate(([tokenizer.bos_id], tokenizer.encode_to_numpy(text), [tokenizer.eos_id]))
            sequences, number = [(ids.astype(dtype), None)], hash_of(utf8)
        else:
            row = json.loads(text)  # as conversations.document made it
            sequences, answer = conversations.encode(tokenizer, row, dtype)
            number = hash_of(utf8 if options.whole else conversations.key_of(row))
            if "held_out" in row and not options.val:
                number = 0 if row["held_out"] else 2**64
    except UnicodeEncodeError:  # JSON can spell half a character, which UTF-8 cannot
        return document._replace(text=RowError("with half a character (a lone surrogate)"))
    except RowError as error:
        return document._replace(text=error)
    is_val = document.is_val or number < options.limit
    return document._replace(text="", is_val=is_val, size=len(utf8), hash=number, sequences=sequences, answer=answer)


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
        counts, (low, high) = self.meta[split], self.meta["hashes"]
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
        self.meta["hashes"] = [min(low, document.hash), max(high, document.hash)]
        counts["bytes"] += document.size
        counts["documents"] += 1

    def commit(self, finished: bool = False) -> None:
        """Makes what was written count."""
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.meta["sizes"][name] = file.tell()
        self.meta["finished"], temporary = finished, self.folder / "meta.json.tmp"
        temporary.write_text(json.dumps(self.meta, indent=1), encoding="utf-8")
        flush(temporary)
        os.replace(temporary, self.folder / "meta.json")


def write_documents(sources: list[Source], options: PrepareOptions, folder: Path, meta: dict, quiet: bool) -> None:
    """The main loop: this thread reads and writes, the pool tokenises in between; batches return in order."""
    mixer, pending, since_commit = Mixer(sources, meta, options), deque(), 0
    work = partial(encode, Tokenizer.load(folder), options, np.dtype(meta["dtype"]).newbyteorder("<"))
    unit, total = ("tokens", options.tokens) if options.tokens else ("bytes", sum(source.size for source in sources))
    with ExitStack() as stack:
        writer, pool = Writer(folder, meta, stack), ThreadPoolExecutor(options.workers or os.cpu_count())
        stack.callback(pool.shutdown, cancel_futures=True)
        bar = tqdm(desc=folder.stem, total=total or None, unit=unit, unit_scale=True, disable=quiet or None)
        stack.enter_context(bar)
        while (batch := mixer.batch(BATCH)) or pending:
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
        check_left_out(meta, options)
        if meta["train"]["documents"] and meta["val"]["documents"]:
            writer.commit(finished=True)


def divide_again(meta: dict, options: PrepareOptions) -> dict:
    """How to divide documents that all fell on one side: the smallest hash is held out; if all rows begin alike, their
    hash is that of the whole row. Raises ValueError if there is nothing to divide."""
    count, (low, high) = sum(meta[split]["documents"] for split in ("train", "val")), meta["hashes"]
    if not options.val and low < high:
        note = f"{meta['note']}too few to hold out a share: the smallest hash is for validation"
        return dict(limit=low + 1, whole=meta["whole"], note=note)
    if not options.val and options.kind != "text" and not meta["whole"] and count > 1:
        note = "all rows begin alike: the same words may be on both sides; "
        return dict(limit=meta["limit"], whole=True, note=note)
    problem = f"of {count} documents none is in {'val' if meta['train']['documents'] else 'train'}.bin{left_out(meta)}"
    raise ValueError(f"--val_fraction={options.val_fraction}: {problem}; give more text or more rows")


# ---- The folder


def describe(options: PrepareOptions, sources: list[Source], tokenizer: Tokenizer | None) -> dict:
    """All that the output depends on: calls with equal requests write the same bytes."""
    names = "sources tokens val_fraction text_column piece_chars document_separator stories"
    names += {"text": "", "labels": " kind system labels"}.get(options.kind, " kind system")
    request = {name: getattr(options, name) for name in names.split()}
    request |= {"val": options.val} if options.val else {}
    request["inputs"] = [source.inputs for source in sources]
    request["tokenizer"] = tokenizer.digest if tokenizer else f"trained, vocab_size={options.vocab_size}"
    return request


def meta_of(folder: Path) -> dict:
    path = Path(folder, "meta.json")
    return read_json(path) if path.is_file() else {}


def holds(folder: Path, request: dict, overwrite: bool) -> bool:
    """True if `folder` is of this request. Raises ValueError if it is of another that must not be overwritten."""
    meta = meta_of(folder)
    if meta.get("request") == request:
        return True
    if meta and not overwrite and (meta.get("finished") or meta["train"]["documents"]):
        what = "of another call" if meta.get("finished") else "unfinished work of another call"
        differs = ", ".join(key for key in request if meta.get("request", {}).get(key) != request[key])
        raise ValueError(f"{folder}: {what} (differs in {differs}); give another --out, or --overwrite")
    return False


def begin(folder: Path, request: dict, tokenizer: Tokenizer) -> dict:
    """Makes the unfinished folder with its tokenizer -> what its meta.json will say: nothing is written yet."""
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
    meta["mix"] = [{"source": spec, **start} for spec in request["sources"] + request.get("val", [])]
    meta |= {"rows": 0, "left_out": {}, "first_left_out": {}, "hashes": [2**64, 0]}
    return meta | {"finished": False, "request": request}


def default_out(place: str, kind: str) -> str:
    """data/ and the name of a source, and the kind of its rows."""
    name = re.split(r"[/\\:]", place.partition("#")[0].rstrip("/\\"))[-1].split(".")[0] or "text"
    return f"data/{name}" + f"-{kind}" * (kind != "text")


def prepare(options: PrepareOptions, quiet: bool = False) -> Path:
    """The folder that `options` describe, made unless it is there. A ValueError leaves an earlier one untouched."""
    sources = parse_sources(options)
    out = Path(options.out or default_out(sources[0].place, options.kind))
    if not out.name or (out.exists() and not meta_of(out) and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"--out={out}: exists and was not made by prepare_data.py; give another folder")
    tokenizer = Tokenizer.load(locate(options.tokenizer)) if options.tokenizer else None
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(out.name + ".lock")
    try:
        with FileLock(lock):  # two processes would write into each other's files: the second waits
            is_there = holds(out, describe(options, sources, tokenizer), options.overwrite)
            meta = meta_of(out) if is_there else make(out, sources, tokenizer, options, quiet)
    finally:
        lock.unlink(missing_ok=True)
    if not quiet:
        notes = [f"{source.spec}: {source.note}" for source in sources if source.note]
        notes += [f"--val={','.join(options.val)} is held out, and --val_fraction is not used"] * bool(options.val)
        print(*notes, f"{out} is there already, made by the same call" if is_there else f"{out} is complete", sep="\n")
        report(out, meta)
    return out


def make(out: Path, sources: list[Source], tokenizer: Tokenizer | None, options: PrepareOptions, quiet: bool) -> dict:
    """Reads the sources into OUT.partial, from where an earlier call was stopped, then makes that `out` -> its meta."""
    folder, request = out.with_name(out.name + ".partial"), describe(options, sources, tokenizer)
    meta = meta_of(folder) if holds(folder, request, options.overwrite) else {}
    if options.kind not in ("text", "labels") and not tokenizer.chat_template:
        raise ValueError(f"--tokenizer={options.tokenizer} has no chat template, which --kind={options.kind} needs")
    for source in sources:
        open_source(source, options, out.parent / "downloads", quiet)
    division = dict(limit=options.limit, whole=False, note="")
    try:
        while not meta.get("finished"):
            division = {name: meta.get(name, value) for name, value in division.items()}
            vars(options).update(division)
            if not meta:
                if not tokenizer and not quiet and not division["note"]:
                    print(f"learning a vocabulary of {options.vocab_size} tokens")
                meta = begin(folder, request, tokenizer or train_bpe(sample(sources, options), options.vocab_size))
            meta |= division
            write_documents(sources, options, folder, meta, quiet)
            if not meta["finished"]:
                division, meta = divide_again(meta, options), {}
    except ValueError:
        if not meta_of(folder).get("train", {}).get("documents"):  # nothing worth continuing
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if out.exists():
        shutil.rmtree(out)  # a call that is killed here finds the finished OUT.partial
    os.replace(folder, out)
    return meta


def report(out: Path, meta: dict) -> None:
    """Prints what a folder holds."""
    for split in ("train", "val"):
        count = meta[split]
        what = f"{count['documents']:,} {meta.get('kind', 'documents')}, {count['tokens']:,} tokens"
        learn = f", {count['targets']:,} of them to learn" if count.get("targets") else ""
        print(f"{out / split}: {what}{learn}, {count['bytes'] / count['tokens']:.2f} bytes per token")
    if (path := out / "train.answers.jsonl").is_file():
        found = [answers.number(json.loads(line)["answer"]) for line in path.read_bytes().splitlines()]
        numbers = f"{len(found) - found.count(None):,} of {len(found):,} answers are numbers"
        print(f"  {numbers} (see nanodoge/answers.py); the others are compared as texts")
    for mix in meta["mix"][: len(meta["source"])]:
        print(f"  {mix['tokens'] / meta['train']['tokens']:6.1%} {mix['source']}, epochs: {mix['epochs']}")
    for reason, count in meta["left_out"].items():
        print(f"  left out: {count:,} {reason} ({meta.get('first_left_out', {}).get(reason, 'unknown where')})")
    if meta.get("note"):
        print(f"  {meta['note']}")
    if meta["train"]["bytes"] < 100_000:
        print("warning: a model will learn so little text by heart; give more text if there is more")


def prepare_built_in(folder: str, kind: str = "text", tokenizer: str = "", say: Callable = print) -> None:
    """Makes `folder` if it is that of a built-in source (data/stories, data/sums-problems) and not there."""
    for source in ("stories", "stdlib", "sums"):
        if folder == default_out(source, kind) and not Path(folder, "meta.json").is_file():
            say(f"preparing the built-in {folder}")
            prepare(PrepareOptions([source], folder, tokenizer, kind=kind))


def main(argv: list[str]) -> None:
    prepare(parse_options(PrepareOptions, argv, positional="sources"))


if __name__ == "__main__":
    run_command(main)
