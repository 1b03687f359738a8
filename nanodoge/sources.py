"""Where text comes from: files, folders, addresses on the web, datasets of the hub, the built-in world.

prepare_data.py says what a SOURCE of its command line can be. Here each becomes a `Source`: a list of parts (files,
shards) whose documents are read one after the other, so that a killed run continues in the right part and no source is
held in memory. A document is a text; conversations.document makes it from a row. Nothing is skipped in silence: a file
must be UTF-8 text, a download must have the promised length and hash, a row that cannot be used becomes a RowError in
place of a document, and files passed over are counted.
"""

import ast
import hashlib
import os
import platform
import re
import sysconfig
import time
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow
import requests
from huggingface_hub.utils.sha import sha_fileobj
from tqdm import tqdm

from nanodoge import stories
from nanodoge.conversations import RowError
from nanodoge.options import convert, one_line
from nanodoge.readers import MAX_DOCUMENT, READABLE, SUFFIXES, TOO_LONG, documents_of, kind_of, read_file

SAMPLE = 20_000_000  # characters a vocabulary is learned from; our trainer takes about ten seconds for 32,768 tokens
NO_ROWS = "files in a folder, without the columns"
BLOBS = "https://softwareheritage.s3.amazonaws.com/content/"  # the public bucket of archived files, each one gzipped
TRIES, WAIT, TIMEOUT = 6, 1.0, (10, 60)  # attempts; seconds before the second; to connect, and between two bytes
FETCHES = 32  # archived files fetched at a time: each is small and costs a round trip
# {source: {--kind: (what makes a row, None for text; about how many bytes of text it has)}}
BUILT_IN = {
    "stories": {"text": (None, 640), "chat": (stories.conversation, 470), "preferences": (stories.preference, 400)},
    "sums": {"chat": (stories.worked_sum, 200), "problems": (stories.worked_sum, 100)},
}


@dataclass
class Source:
    """A place that documents come from. `open_source` fills in the last three fields."""

    spec: str  # as the user wrote it
    kind: str  # stories, sums, stdlib, file, url, hf, swh
    place: str  # path, address, name
    ratio: float  # its share, 0 if none was given
    inputs: list  # equal for a later call that reads the same: names, sizes and times of files
    note: str = ""  # printed at the end
    is_val: bool = False  # a source of --val
    parts: Sequence = ()
    documents: Callable[[Any, int], Iterator[str | RowError]] | None = None  # (part, skip)
    size: int = 0  # about how many bytes of text, 0 if unknown

    def read(self, part: Any, skip: int = 0) -> Iterator[str | RowError]:
        """Yields the documents of a part after the first `skip`. Raises ValueError for what cannot be read, and if the
        first row lacks the columns (but a folder may also have .json and .csv files of other things)."""
        is_first = not skip
        try:
            for number, text in enumerate(self.documents(part, skip), skip + 1):
                if isinstance(text, str):
                    text, is_first = text if len(text) <= MAX_DOCUMENT else TOO_LONG, False
                elif text.is_schema and is_first:
                    if len(self.parts) == 1 or self.kind != "file" or kind_of(part) in (".jsonl", ".parquet"):
                        raise ValueError(f"{self.where(part, number)}: {text.reason}; {text.detail}")
                    yield RowError(NO_ROWS, text.reason)
                    return
                yield text
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            place, again = (self.spec, " (run again to continue)") if self.kind in ("hf", "swh") else (part, "")
            problem = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else one_line(error)
            raise ValueError(f"{place}: {problem}{again}") from None

    def where(self, part: Any, number: int) -> str:
        """The place of a document, for messages: the line of a .jsonl file, else the number of a row or piece."""
        if self.kind in ("file", "url"):
            return f"{part}{':' if kind_of(part) == '.jsonl' else ', row '}{number}"
        return f"{self.spec}, row {number} of part {part}"


def hash_of(key: bytes) -> int:
    """A number from 0 to 2^64. Validation is what lies below a limit, so it does not depend on what else is there."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


# ---- What the command line means: looks at local files only, and opens none


def parse_source(spec: str) -> Source:
    """The Source that a SOURCE of the command line means."""
    place, ratio, inputs, note = spec, 0.0, [], ""
    if not os.path.exists(spec) and (match := re.fullmatch(r"(.+)@([0-9.]+)", spec)):
        place, ratio = match[1], convert(match[2], float, f"ratio of {spec!r}")
        if ratio <= 0:
            raise ValueError(f"ratio of {spec!r}: must be above 0")
    kind, _, name = place.partition(":")
    if os.path.exists(place):
        paths, note = list_files(place)
        kind, inputs = "file", [[path, os.path.getsize(path), os.stat(path).st_mtime_ns] for path in paths]
    elif place in BUILT_IN:
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
        raise ValueError(f"source {place!r}: no such file or folder{advice} (--help lists the kinds of source)")
    return Source(spec, kind, place, ratio, inputs, note)


def parse_sources(options: Any) -> list[Source]:
    """The sources of the command line, those of --val last. options: PrepareOptions."""
    sources, vals = (list(map(parse_source, specs)) for specs in (options.sources, options.val))
    if len({source.place for source in sources + vals}) < len(sources + vals) or not sources:
        raise ValueError(f"sources {options.sources + options.val}: at least one is needed, and each only once")
    for source in vals:
        source.is_val = True
        if source.ratio:
            raise ValueError(f"--val={source.spec}: what is held out has no ratio")
    bare = [source.spec for source in sources if not source.ratio]
    if 0 < len(bare) < len(sources):
        raise ValueError(f"source {bare[0]!r} has no @RATIO: give one to every source or to none")
    if not bare and not options.tokens:
        raise ValueError("ratios need --tokens=N: the training tokens they are shares of")
    return sources + vals


def list_files(place: str) -> tuple[list[str], str]:
    """The file, or the readable files below the folder, sorted: the order must not depend on the file system. And what
    was passed over. Links to folders are followed, each folder once; names that begin with a dot are not looked at."""
    if os.path.isfile(place):
        kind_of(place)
        if not os.path.getsize(place):
            raise ValueError(f"{place}: the file is empty")
        return [place], ""
    found, others, seen = [], Counter(), set()
    for folder, folders, files in os.walk(place, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in [Path(folder, name) for name in files if not name.startswith(".")]:
            if READABLE.fullmatch(str(path)) and path.is_file():
                found.append(path.relative_to(place).as_posix())
            else:
                others[path.suffix.lower() or "without a suffix"] += 1
    kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in others.most_common(9))
    note = f"passed over: {others.total():,} files ({kinds})" if others else ""
    if not found:
        raise ValueError(f"{place}: no file in this folder ends in one of {SUFFIXES}" + f"; {note}" * bool(note))
    return [str(Path(place, name)) for name in sorted(found)], note


def shares_of(sources: list[Source]) -> list[float]:
    """The part of the tokens that each source contributes: by its ratio, else by its size, else all alike."""
    sized = all(source.size for source in sources)
    weights = [source.ratio or (source.size if sized else 1) for source in sources]
    return [weight / sum(weights) for weight in weights]


def sample(sources: list[Source], options: Any) -> Iterator[str]:
    """Yields training documents to learn a vocabulary from: SAMPLE characters, shared by the sources as they are mixed
    and by up to 64 evenly spaced parts of each."""
    sources = [source for source in sources if not source.is_val]
    for source, share in zip(sources, shares_of(sources), strict=True):
        for part in (parts := source.parts[:: -(-len(source.parts) // 64) or 1]):
            left = SAMPLE * share / len(parts)
            for text in source.read(part):
                if isinstance(text, str):
                    if hash_of(text.encode("utf-8", "replace")) >= options.limit:
                        yield text
                    if (left := left - len(text)) <= 0:
                        break


# ---- Opening


def open_source(source: Source, options: Any, cache: str | Path, quiet: bool) -> None:
    """Downloads or connects where needed, and fills in parts, documents and size. options: PrepareOptions."""
    kind = source.kind
    if options.kind != "text" and kind in ("stdlib", "swh"):
        raise ValueError(f"source {source.spec!r} has no --kind={options.kind}: it is plain text")
    if kind in BUILT_IN:
        if options.kind not in BUILT_IN[kind]:
            raise ValueError(f"source {source.spec!r} has no --kind={options.kind}; it has {' '.join(BUILT_IN[kind])}")
        source.parts, source.size = [options.stories], options.stories * BUILT_IN[kind][options.kind][1]
        source.documents = partial(read_built_in, kind, options)
    elif kind in ("hf", "swh"):
        open_dataset(source, options)
    else:
        if kind == "stdlib":
            source.parts, source.documents = stdlib_parts(), read_stdlib
        else:
            paths = [path for path, *_ in source.inputs] or [str(download(source.place, cache, quiet))]
            source.parts, source.documents = paths, lambda path, skip: read_file(path, skip, options, source.size)
        source.size = sum(map(os.path.getsize, source.parts))


def read_built_in(name: str, options: Any, count: int, skip: int) -> Iterator[str]:
    """Yields documents skip ... count - 1 of the built-in world: text, or rows about it. Held-out rows have other words
    (see stories.py), so a row says on which side it is."""
    make, _ = BUILT_IN[name][options.kind]

    def row(i: int) -> dict:
        held_out = hash_of(f"{name} {i}".encode()) < options.limit
        return make(i, "test" if held_out else "train") | {"held_out": held_out}

    return documents_of(map(row, range(skip, count)), options) if make else stories.documents(count - skip, skip)


def stdlib_parts() -> list[str]:
    """The files of the language reference and of the standard library: about 9 MB in 400 files on every Python."""
    root = Path(sysconfig.get_path("stdlib"))
    # Not the library proper (tests, an editor, tables of codecs), generated on this machine, or third-party:
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


def retry(attempt: Callable, address: str) -> Any:
    """What attempt() returns, called again WAIT, 2 WAIT, 4 WAIT, ... seconds after a network error. Raises ValueError
    after TRIES errors, and for one that stays (404)."""
    for failures in range(1, TRIES + 1):
        try:
            return attempt()
        except (requests.RequestException, zlib.error) as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if failures == TRIES or (400 <= status < 500 and status not in (408, 416, 429)):
                raise ValueError(f"{address}: {one_line(error)} (run again to continue)") from None
            time.sleep(WAIT * 2 ** (failures - 1))


def download(url: str, cache: str | Path, quiet: bool = False) -> Path:
    """The path of the downloaded file. It has that name only once it is complete and its hash is right."""
    address, _, digest = url.partition("#sha256=")
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(unquote(urlsplit(address).path)).name}"
    path, part = Path(cache, name), Path(cache, name + ".part")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        retry(partial(download_rest, address, part, quiet), address)
        with open(part, "rb") as file:
            is_right = not digest or sha_fileobj(file).hex() == digest
        if not is_right:
            part.unlink()
            raise ValueError(f"{address}: the file's sha256 is not the {digest} that was asked for")
        os.replace(part, path)
    return path


def download_rest(url: str, part: Path, quiet: bool) -> None:
    """Appends to `part` what it still lacks. `Range` asks for the bytes from here on (status 206); `If-Range` for all
    of them (200) if the file has changed since; a server that knows neither sends all of them, too. So 200 means: start
    again. Raises RequestException for what another attempt may cure."""
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


def open_dataset(source: Source, options: Any) -> None:
    """A dataset of the hub, streamed. Its parts are the shards it is stored in, so a resumed run fetches none twice.
    Rows of a swh: dataset (python-edu of smollm-corpus) have no text, but name files in Software Heritage's archive."""
    import datasets

    name, subset, split = (source.place.split(":") + ["", ""])[:3]
    try:
        data = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source.spec}: {one_line(error)}") from None
    options = replace(options, text_column="blob_id") if source.kind == "swh" else options

    def read(shard: int, skip: int) -> Iterator[str | RowError]:
        return documents_of(data.shard(data.num_shards, shard).skip(skip), options)

    source.parts = range(data.num_shards)
    source.documents = read if source.kind == "hf" else lambda shard, skip: fetch_blobs(read(shard, skip))


def fetch_blobs(names: Iterator[str | RowError]) -> Iterator[str | RowError]:
    """Yields the texts of archived files in the order of their names, FETCHES of them fetched at a time. One that the
    archive no longer has is an empty document, so it is counted."""

    def fetch(name: str) -> str:
        response = session.get(BLOBS + name, timeout=TIMEOUT)
        if response.status_code == 404:
            return ""
        response.raise_for_status()
        return zlib.decompress(response.content, wbits=31).decode("utf-8-sig", errors="replace")  # 31: gzip

    def fetched(name: str | RowError) -> str | RowError:
        return retry(partial(fetch, name), BLOBS + name) if isinstance(name, str) else name

    with ThreadPoolExecutor(FETCHES) as pool, requests.Session() as session:
        session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=FETCHES))
        while some := list(islice(names, 16 * FETCHES)):
            yield from pool.map(fetched, some)
