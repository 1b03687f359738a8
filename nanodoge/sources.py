"""Where text comes from: files, folders, addresses on the web, datasets of the hub, the built-in world.

prepare_data.py says what a SOURCE of its command line can be. Here each becomes a Source: a list of parts (files,
shards) and a function read(part, skip) that yields the documents of a part after the first `skip`, so that a run that
was killed goes on in the right part and nothing is kept in memory. A document is a text. Where rows are read (.jsonl,
.parquet, datasets), a `Rows` says which columns and how a row becomes a document.

What is checked: a file must be UTF-8 text, a download must have the length and, if one was given, the hash that was
promised, and a mistake in a row names its file and line. Nothing is skipped in silence.
"""

import ast
import codecs
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sysconfig
import time
import tokenize
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import requests
from tqdm import tqdm

from nanodoge import stories
from nanodoge.options import convert, one_line

MAX_DOCUMENT = 1 << 24  # characters; a longer document is refused, for memory's sake (the Bible has 4.3 million)
BLOBS = "https://softwareheritage.s3.amazonaws.com/content/"  # the public bucket of archived files, each one gzipped
FETCHES = 32  # archived files on their way at a time: each is small and takes a round trip
TRIES, WAIT = 6, 1.0  # a connection that makes no progress is tried this often, after WAIT, 2 WAIT, 4 WAIT... seconds
TIMEOUT = (10, 60)  # seconds to connect, and between two bytes
TEXT = (".txt", ".md", ".py", ".jsonl")
# Not part of the library proper (tests, an editor, tables of codecs), generated on this machine, or somebody else's.
NOT_STDLIB = {"test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "site-packages", "dist-packages",
              "__pycache__", "_bundled", "pydoc_data"}  # fmt: skip


class Rows(NamedTuple):
    """How a row of a .jsonl, a .parquet or a dataset becomes a document."""

    kind: str  # text, chat, preferences, problems: what the documents are
    columns: list | None  # the columns to read; None: all of them
    document: Callable  # (row as a dictionary, where it stands) -> text; "" is an empty document


def text_rows(column):
    """The usual case: one column holds the text."""
    return Rows("text", [column], lambda row, where: text_of(row, column, where))


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
        raise ValueError(f"{path}: {one_line(error)}") from None


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


def read_jsonl(path, rows):
    for number, line in enumerate(split_records(read_text(path), "\n", path), 1):
        if not line.strip():
            continue
        try:
            text = rows.document(json.loads(line), f"{path}:{number}")
            if "\\u" in line:
                text.encode()  # JSON can spell half a surrogate pair, which no UTF-8 file can hold
        except (json.JSONDecodeError, RecursionError, UnicodeEncodeError) as error:
            raise ValueError(f"{path}:{number}: {one_line(error)}") from None
        yield text


def read_parquet(path, rows, skip):
    """Yields the texts after the first `skip`, a few rows in memory at a time; row groups to skip are not read."""
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            for column in rows.columns or ():
                if column not in names:
                    raise ValueError(f"{path}: no column {column!r}; set --text_column to one of: {', '.join(names)}")
            number = 0
            for group in range(file.num_row_groups):
                number += (size := file.metadata.row_group(group).num_rows)
                if number <= skip:
                    continue
                number -= size
                for batch in file.iter_batches(64, row_groups=[group], columns=rows.columns):
                    for row in batch.to_pylist():
                        number += 1
                        if number > skip:
                            yield rows.document(row, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def read_file(path, options, rows, skip):
    """Yields the documents of one file after the first `skip`."""
    suffix = kind_of(path)
    if suffix == ".parquet":
        return read_parquet(path, rows, skip)
    if suffix == ".jsonl":
        documents = read_jsonl(path, rows)
    elif rows.kind != "text":
        raise ValueError(f"{path}: --kind={rows.kind} reads rows: .jsonl (also .gz .zst), .parquet or a dataset")
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
    kind: str  # stories, sums, stdlib, file, url, hf, swh
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
        place, ratio = head, convert(tail, float, f"ratio of {spec!r}")
        if ratio <= 0:
            raise ValueError(f"ratio of {spec!r}: must be above 0")
    kind, colon, rest = place.partition(":")
    if os.path.exists(place):
        stamps = [[path, os.path.getsize(path), os.stat(path).st_mtime_ns] for path in list_files(place)]
        return Source(spec, "file", place, ratio, stamps)
    if place in ("stories", "sums"):
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


def open_source(source, options, rows, cache, quiet):
    """Downloads or connects where needed, and fills in parts, read and size. Raises ValueError if that cannot be."""
    if source.kind in ("stories", "sums"):
        open_built_in(source, options, rows)
    elif rows.kind != "text" and source.kind in ("stdlib", "swh"):
        raise ValueError(f"source {source.spec!r} has no --kind={rows.kind}: it is plain text")
    elif source.kind == "stdlib":
        source.parts, source.read = stdlib_parts(), read_stdlib
        source.size = sum(map(os.path.getsize, source.parts))
    elif source.kind in ("hf", "swh"):
        open_dataset(source, rows)
    else:
        is_url = source.kind == "url"
        source.parts = [str(download(source.place, cache, quiet))] if is_url else [path for path, *_ in source.inputs]
        source.read = lambda path, skip: read_file(path, options, rows, skip)
        source.size = sum(map(os.path.getsize, source.parts))


def open_built_in(source, options, rows):
    """Text of the built-in world, or rows about it. A row's side is drawn from its number, and the words of the two
    sides differ (see stories.py), so it says itself on which it is."""
    made = {  # what makes a row, and about how many bytes of text it has
        ("stories", "text"): (None, 640), ("stories", "chat"): (stories.conversation, 470),
        ("stories", "preferences"): (stories.preference, 400), ("sums", "chat"): (stories.worked_sum, 200),
        ("sums", "problems"): (stories.worked_sum, 100),
    }  # fmt: skip
    if (source.kind, rows.kind) not in made:
        has = " ".join(kind for name, kind in made if name == source.kind)
        raise ValueError(f"source {source.spec!r} has no --kind={rows.kind}; it has {has}")
    make, size = made[source.kind, rows.kind]
    source.parts, source.size = [options.stories], options.stories * size

    def read(count, skip):
        for i in range(skip, count):
            held_out = in_validation(f"{source.kind} {i}".encode(), options.val_fraction)
            row = make(i, "test" if held_out else "train")
            yield rows.document(row | {"held_out": held_out}, f"{source.kind}, number {i}")

    source.read = read if make else lambda count, skip: stories.documents(count - skip, start=skip)


def in_validation(key, fraction):
    """True for this fraction of all possible texts, whatever else is in the data: the hash is the die. key: bytes."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < fraction * 2**64


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


def open_dataset(source, rows):
    """Connects to a dataset of the hub. Its parts are the shards it is stored in: a resumed run fetches none twice.

    python-edu of smollm-corpus has no text: its rows name files in the archive of Software Heritage (swh:).
    """
    import datasets

    name, subset, split = (source.place.split(":") + ["", ""])[:3]
    try:
        data = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source.spec}: {one_line(error)}") from None
    rows = text_rows("blob_id") if source.kind == "swh" else rows

    def read(shard, skip):
        try:
            for number, row in enumerate(data.shard(data.num_shards, shard).skip(skip), skip + 1):
                yield rows.document(row, f"{source.spec}, row {number} of shard {shard}")
        except OSError as error:
            raise ValueError(f"{source.spec}: {one_line(error)} (run again to continue)") from None

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
            reason = one_line(error)
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
                raise ValueError(f"{address}: {one_line(error)} (run again to continue)") from None
            if not quiet:
                tqdm.write(f"{address}: {one_line(error)[:200]}; trying again in {WAIT * 2**attempt:.0f} s")
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
