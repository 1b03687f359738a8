"""Where text comes from: files, folders, addresses on the web, datasets of the hub, the built-in world.

prepare_data.py says what a SOURCE of its command line can be. Here each becomes a `Source`: a list of parts (files,
shards) whose documents are read one after the other, so that a killed run continues in the right part and no source is
held in memory. A document is a text; document(row, where=...) makes it from a row of a .jsonl, .parquet or dataset.
Nothing is skipped in silence: a file must be UTF-8 text, a download must have the promised length and hash, and a
mistake in a row is reported with its file and line.
"""

import ast
import codecs
import hashlib
import json
import os
import platform
import re
import shutil
import sysconfig
import time
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import requests
from tqdm import tqdm

from nanodoge import stories
from nanodoge.options import convert, one_line

MAX_DOCUMENT = 1 << 24  # characters; a longer document would take too much memory (the Bible has 4.3 million)
BLOBS = "https://softwareheritage.s3.amazonaws.com/content/"  # the public bucket of archived files, each one gzipped
FETCHES = 32  # archived files fetched at a time: each is small and costs a round trip
TRIES, WAIT, TIMEOUT = 6, 1.0, (10, 60)  # attempts; seconds before the second; to connect, and between two bytes
SUFFIXES = ".txt .md .py .jsonl (also .gz .zst) .parquet"
READABLE = re.compile(r".*[^/\\](?:(\.txt|\.md|\.py|\.jsonl)(?:\.gz|\.zst)?|(\.parquet))", re.DOTALL)


# ---- Files


def read_text(path: str) -> Iterator[str]:
    """Yields the text of a UTF-8 file in blocks of about 1 MB, decompressed if its name ends in .gz or .zst."""
    with pyarrow.input_stream(path, compression="detect") as stream:
        for block in codecs.iterdecode(iter(partial(stream.read, 1 << 20), b""), "utf-8"):
            if "\0" in block:
                raise ValueError(f"{path}: a binary file (it has a zero byte), not text")
            yield block


def split_records(blocks: Iterable[str], separator: str, path: str) -> Iterator[str]:
    """Yields the text between separators. A text file has no zero bytes, so "\\0" gives the whole file."""
    rest = ""
    for block in blocks:
        *records, rest = (rest + block).split(separator)
        yield from records
        if len(rest) > MAX_DOCUMENT:
            raise ValueError(f"{path}: a document of more than {MAX_DOCUMENT:,} characters; please split it")
    if rest:
        yield rest


def split_pieces(blocks: Iterable[str], size: int) -> Iterator[str]:
    """Yields pieces of at most `size` characters that add up to the text; each ends after a blank line if it can."""
    text = ""
    for block in blocks:
        text, start = text + block, 0
        while len(text) - start > size:
            middle, end = start + size // 2, start + size
            found = (text.rfind(mark, middle, end) + len(mark) for mark in ("\n\n", "\n", " "))
            cut = next((place for place in found if place > middle), end)
            yield text[start:cut]
            start = cut
        text = text[start:]
    if text:
        yield text


def text_of(row: Any, column: str, where: str) -> str:
    """The text in a column of a row; a missing value (null) is an empty document."""
    if not isinstance(row, dict) or column not in row:
        names = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
        raise ValueError(f"{where}: no column {column!r}; set --text_column to one of: {names}")
    if not isinstance(row[column], str | None):
        raise ValueError(f"{where}: column {column!r} holds {type(row[column]).__name__}, not text")
    return row[column] or ""


def read_jsonl(path: str, document: Callable) -> Iterator[str]:
    for number, line in enumerate(split_records(read_text(path), "\n", path), 1):
        if line.strip():
            try:
                text = document(json.loads(line), where=f"{path}:{number}")
                text.encode() if "\\u" in line else None  # JSON can spell half a character, which UTF-8 cannot
            except (json.JSONDecodeError, RecursionError, UnicodeEncodeError) as error:
                raise ValueError(f"{path}:{number}: {one_line(error)}") from None
            yield text


def read_parquet(path: str, document: Callable, column: str | None) -> Iterator[str]:
    """column: the only one to read, if the file has it; None: all."""
    with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        columns = [column] if column in file.schema_arrow.names else None
        batches = file.iter_batches(64, columns=columns)  # few rows in memory at a time
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield document(row, where=f"{path}, row {number}")


def kind_of(path: str) -> str:
    """The suffix that says how to read a file: ".jsonl" for a.jsonl.gz. Raises ValueError if it cannot be read."""
    if match := READABLE.fullmatch(path):
        return match[1] or match[2]
    raise ValueError(f"{path}: cannot read this kind of file; readable: {SUFFIXES}")


def read_file(path: str, skip: int, options: Any, document: Callable) -> Iterator[str]:
    """Yields the documents of one file after the first `skip`. options: PrepareOptions."""
    suffix, is_text, separator = kind_of(path), options.kind == "text", options.document_separator
    if suffix == ".jsonl":
        documents = read_jsonl(path, document)
    elif suffix == ".parquet":
        documents = read_parquet(path, document, options.text_column if is_text else None)
    elif not is_text:
        raise ValueError(f"{path}: --kind={options.kind} reads rows: .jsonl (also .gz .zst), .parquet or a dataset")
    elif suffix != ".py" and options.piece_chars and not separator:
        documents = split_pieces(read_text(path), options.piece_chars)
    else:
        documents = split_records(read_text(path), separator if separator and suffix != ".py" else "\0", path)
    return islice(documents, skip, None)


# ---- Sources


@dataclass
class Source:
    """A place that documents come from. `open_source` fills in the last three fields."""

    spec: str  # as the user wrote it
    kind: str  # stories, sums, stdlib, file, url, hf, swh
    place: str  # path, address, name
    ratio: float  # its share, 0 if none was given
    inputs: list  # equal for a later call that reads the same: names, sizes and times of files
    parts: list | None = None
    documents: Callable[[Any, int], Iterator[str]] | None = None  # (part, skip)
    size: int = 0  # about how many bytes of text, 0 if unknown

    def read(self, part: Any, skip: int = 0) -> Iterator[str]:
        """Yields the documents of a part after the first `skip`. Raises ValueError for what cannot be read."""
        try:
            yield from self.documents(part, skip)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            place, again = (self.spec, " (run again to continue)") if self.kind in ("hf", "swh") else (part, "")
            problem = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else one_line(error)
            raise ValueError(f"{place}: {problem}{again}") from None


def parse_source(spec: str) -> Source:
    """The Source that a SOURCE of the command line means. Looks at local files only, and opens none."""
    place, ratio, inputs = spec, 0.0, []
    if not os.path.exists(spec) and (match := re.fullmatch(r"(.+)@([0-9.]+)", spec)):
        place, ratio = match[1], convert(match[2], float, f"ratio of {spec!r}")
        if ratio <= 0:
            raise ValueError(f"ratio of {spec!r}: must be above 0")
    kind, _, name = place.partition(":")
    if os.path.exists(place):
        kind, inputs = "file", [[path, os.path.getsize(path), os.stat(path).st_mtime_ns] for path in list_files(place)]
    elif place in ("stories", "sums"):
        world = [path.read_bytes() for path in (Path(stories.__file__), stories.WORLD)]  # text and code
        inputs = [hashlib.sha256(b"".join(world)).hexdigest()]
    elif place == "stdlib":
        inputs = [platform.python_version()]
    elif kind in ("http", "https"):
        if not re.fullmatch(r"[^#]+(#sha256=[0-9a-f]{64})?", place):
            raise ValueError(f"{place}: after the # must come sha256= and 64 hexadecimal digits")
        kind_of(urlsplit(place).path)
        kind = "url"
    elif kind in ("hf", "swh") and name:
        place = name
    else:
        advice = f"; the dataset of that name is hf:{place}" if re.fullmatch(r"[\w.-]+/[\w.-]+", place) else ""
        raise ValueError(
            f"source {place!r}: there is no such file or folder{advice} (--help lists the kinds of source)"
        )
    return Source(spec, kind, place, ratio, inputs)


def shares_of(sources: list[Source]) -> list[float]:
    """The part of the tokens that each source contributes: by its ratio, else by its size, else all alike."""
    sized = all(source.size for source in sources)
    weights = [source.ratio or (source.size if sized else 1) for source in sources]
    return [weight / sum(weights) for weight in weights]


def list_files(place: str) -> list[str]:
    """The file, or the readable files below the folder, sorted: the order must not depend on the file system."""
    if os.path.isfile(place):
        kind_of(place)
        if not os.path.getsize(place):
            raise ValueError(f"{place}: the file is empty")
        return [place]
    below = [p.relative_to(place) for p in Path(place).rglob("*") if READABLE.fullmatch(str(p)) and p.is_file()]
    names = sorted(p.as_posix() for p in below if not any(name.startswith(".") for name in p.parts))
    if not names:
        raise ValueError(f"{place}: no file in this folder ends in one of {SUFFIXES}")
    return [str(Path(place, name)) for name in names]


def open_source(source: Source, options: Any, document: Callable, cache: str | Path, quiet: bool) -> None:
    """Downloads or connects where needed, and fills in parts, documents and size. options: PrepareOptions."""
    if options.kind != "text" and source.kind in ("stdlib", "swh"):
        raise ValueError(f"source {source.spec!r} has no --kind={options.kind}: it is plain text")
    if source.kind in ("stories", "sums"):
        return open_built_in(source, options, document)
    if source.kind in ("hf", "swh"):
        return open_dataset(source, document)
    if source.kind == "stdlib":
        source.parts, source.documents = stdlib_parts(), read_stdlib
    else:
        is_url = source.kind == "url"
        source.parts = [str(download(source.place, cache, quiet))] if is_url else [path for path, *_ in source.inputs]
        source.documents = partial(read_file, options=options, document=document)
    source.size = sum(map(os.path.getsize, source.parts))


def open_built_in(source: Source, options: Any, document: Callable) -> None:
    """The built-in world: its text, or rows about it. The number of a row decides whether it is held out, and held-out
    rows have other words (see stories.py), so the row says on which side it is."""
    makers = {  # --kind: (what makes a row, about how many bytes of text it has)
        "stories": {"text": (None, 640), "chat": (stories.conversation, 470), "preferences": (stories.preference, 400)},
        "sums": {"chat": (stories.worked_sum, 200), "problems": (stories.worked_sum, 100)},
    }[source.kind]
    if options.kind not in makers:
        raise ValueError(f"source {source.spec!r} has no --kind={options.kind}; it has {' '.join(makers)}")
    make, size = makers[options.kind]

    def rows(count: int, skip: int) -> Iterator[str]:
        for i in range(skip, count):
            held_out = in_validation(f"{source.kind} {i}".encode(), options.val_fraction)
            row = make(i, "test" if held_out else "train") | {"held_out": held_out}
            yield document(row, where=f"{source.kind}, number {i}")

    source.parts, source.size = [options.stories], options.stories * size
    source.documents = rows if make else lambda count, skip: stories.documents(count - skip, start=skip)


def in_validation(key: bytes, fraction: float) -> bool:
    """True for this fraction of all keys: the hash decides, so the answer does not depend on what else is there."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < fraction * 2**64


def stdlib_parts() -> list[str]:
    """The files of the language reference and of the standard library: about 9 MB in 400 files on every Python."""
    root = Path(sysconfig.get_path("stdlib"))
    # Not the library proper (tests, an editor, tables of codecs), generated on this machine, or somebody else's:
    other = r"(.*/)?(tests?|idlelib|lib2to3|encodings|turtledemo|(site|dist)-packages|__pycache__|_bundled|pydoc_data)/"
    other = re.compile(rf"{other}|config-|_sysconfigdata")
    paths = sorted(str(p) for p in root.rglob("*.py") if not other.match(p.relative_to(root).as_posix()))
    topics = root / "pydoc_data" / "topics.py"
    if not paths or not topics.is_file():
        raise ValueError(f"stdlib: this Python carries no sources of its library in {root}")
    return [str(topics), *paths]


def read_stdlib(path: str, skip: int = 0) -> list[str]:
    """The documents of a file: the file, or each topic of the language reference, which assigns a dictionary. Nothing
    is imported or run."""
    with tokenize.open(path) as file:
        documents = [file.read()]
    if path.endswith("topics.py"):
        [topics] = [node.value for node in ast.parse(documents[0]).body if isinstance(node, ast.Assign)]
        documents = [text for _, text in sorted(ast.literal_eval(topics).items())]
    return documents[skip:]


# ---- The network


def open_dataset(source: Source, document: Callable) -> None:
    """A dataset of the hub, streamed. Its parts are the shards it is stored in, so a resumed run fetches none twice.

    python-edu of smollm-corpus has no text: its rows name files in the archive of Software Heritage (swh:).
    """
    import datasets

    name, subset, split = (source.place.split(":") + ["", ""])[:3]
    try:
        data = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source.spec}: {one_line(error)}") from None
    document = partial(text_of, column="blob_id") if source.kind == "swh" else document

    def read(shard: int, skip: int) -> Iterator[str]:
        for number, row in enumerate(data.shard(data.num_shards, shard).skip(skip), skip + 1):
            yield document(row, where=f"{source.spec}, row {number} of shard {shard}")

    source.parts = list(range(data.num_shards))
    source.documents = read if source.kind == "hf" else lambda shard, skip: fetch_blobs(read(shard, skip))


def fetch_blobs(names: Iterator[str]) -> Iterator[str]:
    """Yields the texts of archived files in the order of their names, FETCHES of them fetched at a time. One that the
    archive no longer has is an empty document, so it is counted."""

    def fetch(name: str) -> str:
        response = session.get(BLOBS + name, timeout=TIMEOUT)
        if response.status_code == 404:
            return ""
        response.raise_for_status()
        return zlib.decompress(response.content, wbits=31).decode("utf-8", errors="replace")  # 31: gzip

    with ThreadPoolExecutor(FETCHES) as pool, requests.Session() as session:
        session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=FETCHES))
        while some := list(islice(names, 16 * FETCHES)):
            yield from pool.map(lambda name: retry(partial(fetch, name), BLOBS + name), some)


def retry(attempt: Callable, address: str, size: Callable[[], int] = lambda: 0) -> Any:
    """What attempt() returns; it is called again after a network error, WAIT, 2 WAIT, 4 WAIT, ... seconds later. Raises
    ValueError after TRIES errors in a row without growth of size(), and for an error that stays (404)."""
    failures, before = 0, size()
    while True:
        try:
            return attempt()
        except (requests.RequestException, zlib.error) as error:
            failures, before = 0 if size() > before else failures + 1, size()
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if failures == TRIES or (400 <= status < 500 and status not in (408, 416, 429)):
                raise ValueError(f"{address}: {one_line(error)} (run again to continue)") from None
            time.sleep(WAIT * 2 ** max(failures - 1, 0))


def download(url: str, cache: str | Path, quiet: bool = False) -> Path:
    """The path of the downloaded file. It has that name only once it is complete and its hash is right."""
    address, _, digest = url.partition("#sha256=")
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(unquote(urlsplit(address).path)).name}"
    path, part = Path(cache, name), Path(cache, name + ".part")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        retry(partial(download_rest, address, part, quiet), address, lambda: part.exists() and part.stat().st_size)
        if digest and sha256_of(part) != digest:
            part.unlink()
            raise ValueError(f"{address}: the file's sha256 is not the {digest} that was asked for")
        os.replace(part, path)
    return path


def download_rest(url: str, part: Path, quiet: bool) -> None:
    """Appends to `part` what it still lacks. Raises RequestException for what another attempt may cure.

    `Range` asks for the bytes from here on (status 206); `If-Range` for all of them (status 200) if the file has
    changed since. A server that knows neither also sends everything with 200. So 200 means: start again.
    """
    have = part.stat().st_size if part.exists() else 0
    version = part.with_name(part.name + ".version")  # what the server calls the version that `part` begins
    headers = {"Accept-Encoding": "identity"}  # or the length would be that of a compressed stream
    if have:
        known = version.read_text(encoding="utf-8") if version.exists() else ""
        headers |= {"Range": f"bytes={have}-", "If-Range": known or None}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 416 or (response.status_code == 206 and not is_rest):
            part.unlink()  # it is not the beginning of this file
            raise requests.ConnectionError(f"the server cannot continue after {have:,} bytes")
        response.raise_for_status()
        have = have if is_rest else 0
        total = have + int(response.headers.get("Content-Length", 0))
        check_space(part.parent, total - have, f"downloading {url}")
        tag = response.headers.get("ETag", "W/")  # a weak tag, W/..., does not promise the same bytes
        version.write_text(response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag, encoding="utf-8")
        bar = tqdm(desc=part.stem, total=total or None, initial=have, unit="B", unit_scale=True, disable=quiet or None)
        with bar, open(part, "ab" if have else "wb") as file:
            for block in response.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size < total:
        raise requests.ConnectionError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
    version.unlink()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(partial(file.read, 1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def check_space(folder: Path, need: float, purpose: str) -> None:
    """Raises ValueError if the disk of `folder` has fewer than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(f"{folder}: {purpose} needs over {need / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free")
