"""Text in, tokens out: the data that train.py reads.

A language model never sees text. It sees a long row of integers, and this file writes that row: read documents from
wherever they are, cut each into tokens, put a BOS token before it and an EOS token behind it, append it to a file.
Two bytes a token (four when the vocabulary has more than 65,536) and nothing else, so that train.py can map the file
into memory and read any window of it, even when it is larger than the machine's memory.

    python prepare_data.py                                              the built-in stories: data/stories
    python prepare_data.py book.txt --out=data/book                     a text of your own
    python prepare_data.py web.jsonl@0.7 code/@0.3 --tokens=1_000_000   two sources, mixed 70 to 30 by tokens
    python prepare_data.py --config=config/smollm_corpus.py             what Doge was trained on

A SOURCE is one of these. An existing file or folder always wins over the other meanings of a name.

    stories                      the built-in world of stories.py, the same on every machine
    stdlib                       the language reference and the sources of this Python's standard library
    FILE                         .txt .md .py .jsonl .parquet, the text ones also as .gz or .zst
    FOLDER                       every such file below it, in sorted order (names that start with a dot are passed over)
    http(s)://...[#sha256=HEX]   one such file, downloaded once; an interrupted download continues where it stopped
    hf:NAME[:SUBSET[:SPLIT]]     a dataset of the Hugging Face hub, or a local folder of one, streamed; split "train"
    swh:NAME[:SUBSET[:SPLIT]]    the same for a dataset whose rows name files of the Software Heritage archive (blob_id)

What a document is. A row of a .jsonl, .parquet or dataset is one (--text_column), a .py file is one, a piece of text up
to --document_separator is one. Without a separator, .txt and .md files are cut into pieces of at most --piece_chars
characters, after the last blank line in the second half of the piece, else after a line, else after a space. No
character is lost. Nothing is truncated; empty documents are left out and counted.

Train or validation? The hash of a document's text decides, so a document stays on its side when data is added, and two
copies of it are never on both sides.

Mixing. `SOURCE@RATIO` gives every source a share of the --tokens training tokens. A source that is used up starts
again, and its number of epochs is reported. Without ratios the shares follow the sizes (equal if one is unknown), and
without --tokens every document is taken once. Documents of different sources are interleaved all along.

Stopping. Tokens go to OUT.partial; after every 128 MB of text the files are flushed and meta.json notes how far each
source has been read. A killed run continues from that note and ends with the same bytes. OUT appears at the end, whole.

Why threads and not processes: tiktoken lets go of Python's lock while it works, and a thread costs no memory.
"""

import ast
import codecs
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import sysconfig
import time
import tokenize
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow
import pyarrow.parquet
import requests
from tqdm import tqdm

import runtime
import stories
from tokenizer import Tokenizer, train_bpe

BATCH = 1 << 19  # characters in the unit of work of a thread: some 50 ms of tokenising, so that hand-over costs nothing
AHEAD = 64  # batches read ahead of the one being written: work for as many cores, at most 32 MB of text
SHARD = 1 << 27  # characters between two commits: a few seconds of work are lost at most
MAX_DOCUMENT = 1 << 24  # characters; a longer document is refused, for memory's sake (the Bible has 4.3 million)
SAMPLE = 20_000_000  # characters a vocabulary is learned from; our trainer takes about ten seconds for 32,768 tokens
BLOBS = "https://softwareheritage.s3.amazonaws.com/content/"  # the public bucket of archived files, each one gzipped
FETCHES = 32  # archived files on their way at a time: each is small and takes a round trip
TRIES, WAIT = 6, 1.0  # a connection that makes no progress is tried this often, after WAIT, 2 WAIT, 4 WAIT... seconds
TIMEOUT = (10, 60)  # seconds to connect, and between two bytes
TEXT = (".txt", ".md", ".py", ".jsonl")
# Not part of the library proper (tests, an editor, tables of codecs), generated on this machine, or somebody else's.
NOT_STDLIB = {"test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "site-packages", "dist-packages",
              "__pycache__", "_bundled", "pydoc_data"}  # fmt: skip


@dataclass
class PrepareOptions:
    sources: list[str] = field(default_factory=lambda: ["stories"])  # where the text comes from, see above
    out: str = ""  # the folder to write; empty: data/ and the name of the first source
    tokenizer: str = ""  # a tokenizer.json, its folder, or an encoding of tiktoken (gpt2); empty: train one
    vocab_size: int = 4096  # of the tokenizer to train; small, or a tiny model is all embedding; real runs use 32768
    tokens: int = 0  # training tokens to write; 0: every document of every source, once
    val_fraction: float = 0.05  # share of the documents kept for validation; enough for a book, large corpora need less
    text_column: str = "text"  # the column of .jsonl, .parquet and datasets
    piece_chars: int = 4096  # longest piece a .txt or .md file is cut into; 0: a file is one document
    document_separator: str = ""  # cut .txt and .md files here instead, as at <|endoftext|>
    stories: int = 12000  # how many stories; about 9 MB of text, minutes of training on a CPU
    workers: int = 0  # threads; 0: one for each core; the output does not depend on it
    cache: str = ""  # folder for downloads; empty: downloads/ beside OUT
    overwrite: bool = False  # replace what an earlier, different call wrote to OUT


# ---------------------------------------------------------------------------------------------------------------------
# Reading files


def read_text(path):
    """Yields the text of a UTF-8 file in blocks of about 1 MB, decompressed when its name ends in .gz or .zst."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with pyarrow.input_stream(str(path), compression="detect") as stream:
            while block := stream.read(1 << 20):
                if b"\0" in block:
                    raise ValueError(f"{path}: a binary file (a zero byte after byte {done}), not text")
                yield decoder.decode(block)
                done += len(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} within 1 MB of byte {done})") from None
    except OSError as error:
        raise ValueError(f"{path}: {runtime.one_line(error)}") from None


def split_records(blocks, separator, path):
    """Yields the stretches of text between separators. A file has no zero bytes, so "\\0" gives the whole file."""
    rest = ""
    for block in blocks:
        *records, rest = (rest + block).split(separator)
        yield from records
        if len(rest) > MAX_DOCUMENT:
            raise ValueError(f"{path}: a document of more than {MAX_DOCUMENT:,} characters; please split it")
    if rest:
        yield rest


def split_pieces(blocks, size):
    """Yields pieces of at most `size` characters that add up to the text; each ends after a blank line if it can."""
    text = ""
    for block in blocks:
        text, start = text + block, 0
        while len(text) - start > size:
            cut = end = start + size
            for mark in ("\n\n", "\n", " "):
                if (at := text.rfind(mark, start + size // 2, end)) >= 0:
                    cut = at + len(mark)
                    break
            yield text[start:cut]
            start = cut
        text = text[start:]
    if text:
        yield text


def text_of(row, column, where):
    """The text in a row; a missing value (null) is an empty document."""
    if not isinstance(row, dict) or column not in row:
        names = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
        raise ValueError(f"{where}: no column {column!r}; set --text_column to one of: {names}")
    if not isinstance(row[column], str | None):
        raise ValueError(f"{where}: column {column!r} holds {type(row[column]).__name__}, not text")
    return row[column] or ""


def read_jsonl(path, column):
    for number, line in enumerate(split_records(read_text(path), "\n", path), 1):
        if not line.strip():
            continue
        try:
            text = text_of(json.loads(line), column, f"{path}:{number}")
            if "\\u" in line:
                text.encode()  # JSON can spell half a surrogate pair, which no UTF-8 file can hold
        except (json.JSONDecodeError, RecursionError, UnicodeEncodeError) as error:
            raise ValueError(f"{path}:{number}: {runtime.one_line(error)}") from None
        yield text


def read_parquet(path, column, skip):
    """Yields the texts after the first `skip`, a few rows in memory at a time; row groups to skip are not read."""
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path}: no column {column!r}; set --text_column to one of: {names}")
            row = 0
            for group in range(file.num_row_groups):
                row += (rows := file.metadata.row_group(group).num_rows)
                if row <= skip:
                    continue
                row -= rows
                for batch in file.iter_batches(64, row_groups=[group], columns=[column]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        if row > skip:
                            yield text_of({column: value}, column, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {runtime.one_line(error)}") from None


def read_file(path, options, skip):
    """Yields the documents of one file after the first `skip`."""
    suffix = kind_of(path)
    if suffix == ".parquet":
        return read_parquet(path, options.text_column, skip)
    if suffix == ".jsonl":
        documents = read_jsonl(path, options.text_column)
    elif suffix == ".py" or not (options.document_separator or options.piece_chars):
        documents = split_records(read_text(path), "\0", path)
    elif options.document_separator:
        documents = split_records(read_text(path), options.document_separator, path)
    else:
        documents = split_pieces(read_text(path), options.piece_chars)
    return itertools.islice(documents, skip, None)


def kind_of(path, required=False):
    """The suffix that says how to read a file: `.jsonl` for `a.jsonl.gz`, "" for a kind we cannot read."""
    packed = Path(path).suffix in (".gz", ".zst")
    suffix = Path(Path(path).stem if packed else path).suffix
    known = suffix in TEXT or (suffix == ".parquet" and not packed)
    if required and not known:
        raise ValueError(f"{path}: cannot read this kind of file; readable: {' '.join(TEXT)} (also .gz .zst) .parquet")
    return suffix if known else ""


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@dataclass
class Source:
    """A place that documents come from. `open_source` fills in the last three fields."""

    spec: str  # as the user wrote it
    kind: str  # stories, stdlib, file, url, hf, swh
    place: str  # path, address, name
    ratio: float  # its share, 0 if none was given
    inputs: list  # what tells that a later call asks for the same: names, sizes and times of files
    parts: list = field(default_factory=list)  # files, shards: a resumed run goes straight to the right one
    read: object = None  # read(part, skip) yields the documents of a part after the first `skip`
    size: int = 0  # about how many bytes of text, 0 if unknown


def parse_source(spec):
    """Returns the Source that a SOURCE of the command line means. Looks at local files only, and opens none."""
    place, ratio = spec, 0.0
    head, _, tail = spec.rpartition("@")
    if head and not os.path.exists(spec) and re.fullmatch(r"[0-9.]+", tail):
        place, ratio = head, runtime.convert(tail, float, f"ratio of {spec!r}")
        if ratio <= 0:
            raise ValueError(f"ratio of {spec!r}: must be above 0")
    kind, colon, rest = place.partition(":")
    if os.path.exists(place):
        stamps = [[path, os.path.getsize(path), os.stat(path).st_mtime_ns] for path in list_files(place)]
        return Source(spec, "file", place, ratio, stamps)
    if place == "stories":
        return Source(spec, place, place, ratio, [hashlib.sha256(Path(stories.__file__).read_bytes()).hexdigest()])
    if place == "stdlib":
        return Source(spec, place, place, ratio, [platform.python_version()])
    if kind in ("http", "https"):
        if not re.fullmatch(r"[^#]+(#sha256=[0-9a-f]{64})?", place):
            raise ValueError(f"{place}: behind the # must be sha256= and 64 hexadecimal digits")
        kind_of(urlsplit(place).path, required=True)
        return Source(spec, "url", place, ratio, [])
    if kind in ("hf", "swh") and rest:
        return Source(spec, kind, rest, ratio, [])
    advice = f"; the dataset of that name is hf:{place}" if re.fullmatch(r"[\w.-]+/[\w.-]+", place) else ""
    raise ValueError(f"source {place!r}: there is no such file or folder{advice} (--help lists the kinds of source)")


def list_files(place):
    """The file, or the readable files below the folder, in an order that no file system has a say in."""
    if os.path.isfile(place):
        kind_of(place, required=True)
        if not os.path.getsize(place):
            raise ValueError(f"{place}: the file is empty")
        return [place]
    below = [p.relative_to(place) for p in Path(place).rglob("*") if kind_of(p) and p.is_file()]
    below = sorted(p.as_posix() for p in below if not any(name.startswith(".") for name in p.parts))
    if not below:
        raise ValueError(f"{place}: no file in this folder ends in {' '.join(TEXT)} (also .gz .zst) or .parquet")
    return [str(Path(place) / p) for p in below]


def open_source(source, options, cache, quiet):
    """Downloads or connects where needed, and fills in parts, read and size. Raises ValueError if that cannot be."""
    if source.kind == "stories":
        source.parts, source.size = [options.stories], options.stories * 770  # bytes of a story, about
        source.read = lambda count, skip: stories.stories(count - skip, start=skip)
    elif source.kind == "stdlib":
        source.parts, source.read = stdlib_parts(), read_stdlib
        source.size = sum(map(os.path.getsize, source.parts))
    elif source.kind in ("hf", "swh"):
        open_dataset(source, options.text_column)
    else:
        is_url = source.kind == "url"
        source.parts = [str(download(source.place, cache, quiet))] if is_url else [path for path, *_ in source.inputs]
        source.read = lambda path, skip: read_file(path, options, skip)
        source.size = sum(map(os.path.getsize, source.parts))


def stdlib_parts():
    """The language reference and the sources of the standard library: about 9 MB in 400 files on every Python."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {p: p.relative_to(root) for p in root.rglob("*.py")}
    paths = [p for p, below in paths.items() if not NOT_STDLIB.intersection(below.parts[:-1])
             and not below.parts[0].startswith(("config-", "_sysconfigdata"))]  # fmt: skip
    topics = root / "pydoc_data" / "topics.py"
    if not paths or not topics.is_file():
        raise ValueError(f"stdlib: this Python carries no sources of its library in {root}")
    return [str(topics)] + sorted(map(str, paths))


def read_stdlib(path, skip):
    """A source file is one document. The language reference is a file that assigns a dictionary: a document a topic.
    Nothing is imported or run."""
    with tokenize.open(path) as file:
        text = file.read()
    if not path.endswith("topics.py"):
        return itertools.islice([text], skip, None)
    [topics] = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return itertools.islice([text for _, text in sorted(ast.literal_eval(topics).items())], skip, None)


def open_dataset(source, column):
    """Connects to a dataset of the hub. Its parts are the shards it is stored in: a resumed run fetches none twice.

    python-edu of smollm-corpus has no text: its rows name files in the archive of Software Heritage (swh:).
    """
    import datasets

    name, subset, split = (source.place.split(":") + ["", ""])[:3]
    try:
        data = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source.spec}: {runtime.one_line(error)}") from None
    column = "blob_id" if source.kind == "swh" else column

    def read(shard, skip):
        try:
            for row in data.shard(data.num_shards, shard).skip(skip):
                yield text_of(row, column, source.spec)
        except OSError as error:
            raise ValueError(f"{source.spec}: {runtime.one_line(error)} (run again to continue)") from None

    source.parts = list(range(data.num_shards))
    source.read = read if source.kind == "hf" else lambda shard, skip: fetch_blobs(read(shard, skip))


def fetch_blobs(names):
    """Yields the contents of archived files in the order of their names, FETCHES of them on their way at a time."""
    with ThreadPoolExecutor(FETCHES) as pool, requests.Session() as session:
        session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=FETCHES))
        while some := list(itertools.islice(names, 16 * FETCHES)):
            yield from pool.map(lambda name: fetch_blob(session, name), some)


def fetch_blob(session, name):
    """The text of one archived file. One that the archive no longer has is an empty document, so it is counted."""
    for attempt in range(TRIES):
        try:
            response = session.get(BLOBS + name, timeout=TIMEOUT)
            if response.status_code == 404:
                return ""
            response.raise_for_status()
            return zlib.decompress(response.content, wbits=31).decode("utf-8", errors="replace")  # 31: gzip
        except (requests.RequestException, zlib.error) as error:
            reason = runtime.one_line(error)
            time.sleep(WAIT * 2**attempt)
    raise ValueError(f"{BLOBS}{name}: {reason} (run again to continue)")


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


def download(url, cache, quiet):
    """Returns the path of the downloaded file. It has that name only once it is complete and its hash is right."""
    address, _, digest = url.partition("#sha256=")
    name = Path(unquote(urlsplit(address).path)).name
    path = Path(cache) / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while not path.exists():
        before = part.stat().st_size if part.exists() else 0
        try:
            download_rest(address, part, quiet)
            if digest and sha256_of(part) != digest:
                part.unlink()
                raise ValueError(f"{address}: the file's sha256 is not the {digest} that was asked for")
            os.replace(part, path)
        except requests.RequestException as error:
            attempt = 0 if part.exists() and part.stat().st_size > before else attempt + 1
            if attempt == TRIES:
                raise ValueError(f"{address}: {runtime.one_line(error)} (run again to continue)") from None
            if not quiet:
                tqdm.write(f"{address}: {runtime.one_line(error)[:200]}; trying again in {WAIT * 2**attempt:.0f} s")
            time.sleep(WAIT * 2**attempt)
    return path


def download_rest(url, part, quiet):
    """Appends to `part` what it still lacks. Raises RequestException for what another attempt may cure.

    `Range` asks for the bytes from here on (answer 206), `If-Range` for all of them (answer 200) if the file has
    changed since; a server that knows nothing of either sends everything with 200. So 200 means: start again.
    """
    have = part.stat().st_size if part.exists() else 0
    version = part.with_name(part.name + ".version")
    headers = {"Accept-Encoding": "identity"}  # or the length would be that of a compressed stream
    if have:
        headers["Range"] = f"bytes={have}-"
        if version.exists() and version.read_text(encoding="utf-8"):
            headers["If-Range"] = version.read_text(encoding="utf-8")
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if 400 <= response.status_code < 500 and response.status_code not in (408, 416, 429):
            raise ValueError(f"{url}: the server answers {response.status_code} {response.reason}")
        if response.status_code == 416:  # there are no bytes from here on: not a prefix of this file
            part.unlink()
        response.raise_for_status()
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if response.status_code == 206 and resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        check_space(part.parent, (total or 0) - have, f"downloading {url}")
        tag = response.headers.get("ETag", "")
        tag = response.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
        version.write_text(tag, encoding="utf-8")
        with open(part, "ab" if have else "wb") as file, progress(quiet, part.stem, "B", total, have) as bar:
            for block in response.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise requests.ConnectionError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
    version.unlink()


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_space(folder, need, purpose):
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(f"{folder}: {purpose} needs over {need / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free")


def progress(quiet, title, unit, total=None, start=0):
    hidden = True if quiet else None  # None: shown on a terminal, and no litter in a file
    return tqdm(desc=title, unit=unit, unit_scale=True, total=total, initial=start, disable=hidden, smoothing=0.05)


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


def in_validation(utf8, fraction):
    """True for this fraction of all possible texts, whatever else is in the data: the hash is the die."""
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "big") < fraction * 2**64


def encode(tokenizer, options, dtype, batch):
    """Runs in a thread. [(source, epoch, text)] -> [(source, epoch, characters, bytes, is in validation, tokens)]."""
    done = []
    for (source, epoch, text), ids in zip(batch, tokenizer.encode_batch([text for *_, text in batch], 1), strict=True):
        utf8 = text.encode()
        tokens = np.empty(len(ids) + 2, dtype)
        tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
        done.append((source, epoch, len(text) + 1, len(utf8), in_validation(utf8, options.val_fraction), tokens))
    return done


class Writer:
    """The two bins and meta.json of an unfinished folder."""

    def __init__(self, folder, meta, bar):
        self.folder, self.meta, self.bar, self.files = folder, meta, bar, {}
        for split in ("train", "val"):
            path = folder / f"{split}.bin"
            path.touch()
            os.truncate(path, meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize)  # what came after is redone
            self.files[split] = open(path, "ab")

    def write(self, batch, mixer):
        """Appends a batch that came back from its thread; leaves out what a share no longer needs."""
        for source, epoch, characters, size, is_val, tokens in batch:
            mix, split = self.meta["mix"][source], "val" if is_val else "train"
            mixer.waiting[source] -= characters
            mix["characters"] += characters
            if not size:
                self.meta["empty_documents"] += not epoch
                continue
            if epoch if is_val else mix["tokens"] >= mixer.quotas[source]:
                continue  # validation documents are never repeated
            self.files[split].write(tokens)
            for key, count in (("tokens", len(tokens)), ("bytes", size), ("documents", 1)):
                self.meta[split][key] += count
            if not is_val:
                mix["tokens"] += len(tokens)
                mix["epochs"] = epoch + 1
            self.bar.update(size if not mixer.repeat else 0 if is_val else len(tokens))

    def commit(self, finished=False):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
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


def read_meta(folder):
    path = Path(folder) / "meta.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:
        raise ValueError(f"{path}: not the JSON that prepare_data.py writes") from None


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
    meta |= {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in ("train", "val")}
    start = {"tokens": 0, "characters": 0, "epochs": 1, "position": [0, 0, 0]}
    meta |= {"mix": [{"source": source.spec, **start} for source in sources], "empty_documents": 0}
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
    out = Path(options.out or f"data/{name}")
    if not out.name:
        raise ValueError(f"--out={options.out}: not the name of a folder of its own")
    given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    request = describe(options, sources, given)
    if is_there(out, request, options.overwrite):
        say(f"{out} is there already, made by the same call")
        return out
    partial = out.with_name(out.name + ".partial")
    meta = read_meta(partial)
    if meta and meta["request"] != request:
        if meta["train"]["documents"] and not options.overwrite:
            raise ValueError(f"{partial}: unfinished work of another call ({differences(meta, request)}); finish that, "
                             "or discard it with --overwrite")
        meta = None
    out.parent.mkdir(parents=True, exist_ok=True)
    for source in sources:
        open_source(source, options, options.cache or out.parent / "downloads", quiet)
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
    return out


def replace_folder(new, out):
    """Renames `new` to `out`; a folder that was there is moved aside first and deleted last."""
    old = out.with_name(out.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)


def report(out, meta, say):
    for split in ("train", "val"):
        count = meta[split]
        say(f"{out / split}.bin: {count['tokens']:,} tokens, {count['documents']:,} documents, "
            f"{count['bytes'] / count['tokens']:.2f} bytes a token")
    for mix in meta["mix"]:
        if len(meta["mix"]) > 1 or mix["epochs"] > 1:
            again = f", read {mix['epochs']} times" if mix["epochs"] > 1 else ""
            say(f"  {mix['tokens'] / meta['train']['tokens']:6.1%} {mix['source']}{again}")
    if meta["empty_documents"]:
        say(f"  {meta['empty_documents']:,} empty documents were left out")


def main(argv):
    prepare(runtime.parse_options(PrepareOptions, argv, positional="sources"))


if __name__ == "__main__":
    runtime.run(main)
