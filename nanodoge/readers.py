"""From a file to its documents: text files in pieces or as a whole, and files of rows.

A row that cannot be used is a RowError in place of a document, so that it can be counted. A file that cannot be read to
its end is a ValueError: what it has lost is not known.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow
import pyarrow.parquet

from nanodoge.conversations import RowError, document, parse_json
from nanodoge.options import one_line

MAX_DOCUMENT = 1 << 24  # characters; a longer document would take too much memory (the Bible has 4.3 million)
MAX_LINE = 4 * MAX_DOCUMENT  # of a file of rows: escapes make a text longer
TOO_LONG = RowError(f"longer than {MAX_DOCUMENT:,} characters")
SMALLEST = 200  # characters of a piece, of however small a file
SUFFIXES = ".txt .md .py .json .jsonl .csv .tsv (also .gz .zst) .parquet"
READABLE = re.compile(r"(?is).*[^/\\](\.txt|\.md|\.py|\.jsonl?|\.csv|\.tsv|\.parquet(?!\.))(?:\.gz|\.zst)?")
PACKED = {".gz": ("gzip", b"\x1f\x8b"), ".zst": ("zstd", b"\x28\xb5\x2f\xfd")}  # suffix: name, first bytes


def read_text(path: str) -> Iterator[str]:
    """Yields the text of a UTF-8 file in blocks of about 1 MB, without a byte order mark, and decompressed if its name
    ends in .gz or .zst."""
    with open(path, "rb") as file:
        head, compression = file.read(4), None
    for suffix, (name, magic) in PACKED.items():
        is_packed = head.startswith(magic)
        if is_packed != path.lower().endswith(suffix):
            raise ValueError(f"{path}: {name} inside; add {suffix} to its name" if is_packed else f"{path}: not {name}")
        compression = name if is_packed else compression
    with pyarrow.input_stream(path, compression=compression) as stream:
        for block in codecs.iterdecode(iter(partial(stream.read, 1 << 20), b""), "utf-8-sig"):
            if "\0" in block:
                raise ValueError(f"{path}: a binary file (it has a zero byte), not text")
            yield block


def split_records(blocks: Iterable[str], separator: str, limit: int = MAX_DOCUMENT) -> Iterator[str | RowError]:
    """Yields the text between separators, TOO_LONG for more than `limit` characters. A text file has no zero bytes, so
    "\0" gives the whole file."""
    rest, is_long = "", False
    for block in blocks:
        *records, rest = (rest + block).split(separator)
        for record in records:
            yield TOO_LONG if is_long else record
            is_long = False
        if len(rest) > limit:
            rest, is_long = rest[-len(separator) :], True
    if rest or is_long:
        yield TOO_LONG if is_long else rest


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


def read_json(path: str) -> Iterator[Any]:
    """Yields the rows of a file of JSON: its lines, of which some may be broken, unless it begins as an array or as an
    object of several lines."""
    blocks = read_text(path)
    first = next(blocks, "")
    if re.match(r"\s*(\[|\{\s*\n)", first):
        yield from read_json_values(chain([first.lstrip().removeprefix("[")], blocks))
        return
    for line in split_records(chain([first], blocks), "\n", MAX_LINE):
        try:
            yield parse_json(line) if isinstance(line, str) else line
        except RowError as error:
            yield error


def read_json_values(blocks: Iterable[str]) -> Iterator[Any]:
    """Yields values of JSON that stand one after the other, with commas or without. Where one ends is known only from
    reading it, so nothing after a broken one can be read."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,\]]*")
    text, start, error = "", 0, ""
    for block in blocks:
        text, start = text[start:] + block, 0
        while (start := between.match(text, start).end()) < len(text):
            try:
                value, start = decode(text, start)
            except (ValueError, RecursionError) as problem:  # or it goes on in the next block
                error = one_line(problem)
                break
            yield value
        if len(text) - start > MAX_LINE:
            break
    if start < len(text):
        yield RowError("not JSON, nor is read what follows it in the file", error, is_schema=True)


def read_csv(path: str, delimiter: str) -> Iterator[dict | RowError]:
    """Yields the rows of a table whose first line has the names of its columns."""

    def lines() -> Iterator[str]:
        for line in split_records(read_text(path), "\n", MAX_LINE):
            if not isinstance(line, str):
                raise ValueError(f"{path}: a line {line.reason}")
            yield line + "\n"

    csv.field_size_limit(MAX_LINE)
    rows = csv.DictReader(lines(), delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            if "unexpected end" in str(error):  # a quote that nothing closes has taken in all that follows it
                raise ValueError(f"{path}:{rows.line_num + 1}: a quoted field does not end") from None
            row = RowError("not CSV", str(error))
        if row is None:
            return
        yield RowError("with more fields than there are columns") if isinstance(row, dict) and None in row else row


def read_parquet(path: str, column: str | None) -> Iterator[dict]:
    """column: the only one to read, if the file has it; None: all."""
    with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        columns = [column] if column in file.schema_arrow.names else None
        for batch in file.iter_batches(64, columns=columns):  # few rows in memory at a time
            yield from batch.to_pylist()


def kind_of(path: str) -> str:
    """The suffix that says how to read a file: ".jsonl" for A.JSONL.gz. Raises ValueError if it cannot be read."""
    if match := READABLE.fullmatch(path):
        return match[1].lower()
    raise ValueError(f"{path}: cannot read this kind of file; readable: {SUFFIXES}")


def read_file(path: str, skip: int, options: Any, size: int) -> Iterator[str | RowError]:
    """Yields the documents of one file after the first `skip`. options: PrepareOptions. size: bytes of all files of the
    source; a small text is cut into eight pieces or more, so that one of them can be held out."""
    suffix, is_text, separator = kind_of(path), options.kind == "text", options.document_separator
    if suffix in (".json", ".jsonl"):
        documents = documents_of(read_json(path), options)
    elif suffix in (".csv", ".tsv"):
        documents = documents_of(read_csv(path, "," if suffix == ".csv" else "\t"), options)
    elif suffix == ".parquet":
        documents = documents_of(read_parquet(path, options.text_column if is_text else None), options)
    elif not is_text:
        raise ValueError(f"{path}: --kind={options.kind} reads rows: .json .jsonl .csv .tsv .parquet or a dataset")
    elif suffix != ".py" and options.piece_chars and not separator:
        documents = split_pieces(read_text(path), min(options.piece_chars, max(size // 8, SMALLEST)))
    else:
        documents = split_records(read_text(path), separator if separator and suffix != ".py" else "\0")
    return islice(documents, skip, None)


def documents_of(rows: Iterable[Any], options: Any) -> Iterator[str | RowError]:
    """Yields the document of every row, or why it has none."""
    for row in rows:
        try:
            yield row if isinstance(row, RowError) else document(row, options)
        except RowError as error:
            yield error
        except RecursionError:
            yield RowError("nested too deeply")
