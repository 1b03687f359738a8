"""The order of documents: from which source the next one comes; and which rows are left out, and why."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nanodoge.conversations import RowError
from nanodoge.options import one_line
from nanodoge.sources import NO_ROWS, Source, shares_of

FEW = 10_000  # rows after which --max_left_out is judged; it is once more at the end


class Document(NamedTuple):
    """A document between its source and the files. A thread replaces the text by the last four fields."""

    source: int  # the number of its source
    epoch: int  # how often that source was read before
    place: tuple  # its part of that source, and its number there
    text: str | RowError  # or why it is not to be written
    characters: int  # of the text, and one
    is_val: bool
    size: int = 0  # bytes of text
    hash: int = 0  # of what decides between training and validation
    sequences: Sequence = ()  # (ids, mask): one pair, or a preference's two; the mask of plain text is None
    answer: bytes = b""  # a problem's line of answers.jsonl


class Mixer:
    """Takes the next document from the source that is furthest behind its share of the tokens.

    Until a document returns from its thread its tokens are estimated, from its characters and the tokens per character
    of its source so far. Batches return in a fixed order, so the choice depends on the data alone.
    """

    def __init__(self, sources: list[Source], meta: dict, options: Any):
        """meta: of the folder, updated in place. options: PrepareOptions."""
        self.sources, self.meta, self.mix, self.options = sources, meta, meta["mix"], options
        others = [source for source in sources if source.is_val]  # the last ones: each is read once
        self.shares = shares_of(sources[: len(sources) - len(others)])
        self.quotas = [share * options.tokens or math.inf for share in self.shares] + [math.inf] * len(others)
        self.shares += [1.0] * len(others)
        self.waiting = [0] * len(sources)  # characters handed out whose tokens are not counted yet
        self.readers = {i: self.read(i, source) for i, source in enumerate(sources)}  # of sources that have not ended

    def read(self, i: int, source: Source) -> Iterator[Document]:
        """Yields the documents of source i from the position where the last run stopped."""
        mix = self.mix[i]
        epoch, first, number = mix["position"]
        while True:
            for part in range(first, len(source.parts)):
                for text in source.read(source.parts[part], number):
                    number += 1
                    mix["position"] = [epoch, part, number]
                    characters = len(text) + 1 if isinstance(text, str) else 1
                    yield Document(i, epoch, (source.parts[part], number), text, characters, source.is_val)
                number = 0
            if not self.options.tokens or source.is_val:
                return
            if mix["position"] == [epoch, 0, 0] or (epoch > 1 and mix["characters"] and not mix["tokens"]):
                problem = f"no document to train on, so --tokens cannot be reached{left_out(self.meta)}"
                raise ValueError(f"source {source.spec!r}: {problem}")
            epoch, first = epoch + 1, 0
            mix["position"] = [epoch, 0, 0]

    def batch(self, size: int) -> list[Document]:
        """The next documents, `size` characters together; fewer when all sources have ended or should be full."""
        documents = []

        def expected(i: int) -> float:  # tokens of source i when all its documents have returned
            tokens, characters = self.mix[i]["tokens"], self.mix[i]["characters"]
            return tokens + self.waiting[i] * (tokens / characters if characters else 0.25)  # typical for English

        while size > 0 and (behind := [i for i in self.readers if expected(i) < self.quotas[i]]):
            i = min(behind, key=lambda i: expected(i) / self.shares[i])
            if document := next(self.readers[i], None):
                documents.append(document)
                size -= document.characters
                self.waiting[i] += document.characters
            else:
                del self.readers[i]
        return documents

    def count(self, document: Document) -> bool:
        """Counts a document with its tokens, or why it is left out. True if it is to be written."""
        i, is_first = document.source, document.epoch == 0
        self.waiting[i] -= document.characters
        self.mix[i]["characters"] += document.characters
        self.meta["rows"] += is_first
        if isinstance(error := document.text, RowError):
            if is_first:
                where, counts = self.sources[i].where(*document.place), self.meta["left_out"]
                detail = f": {one_line(error.detail)[:300]}" if error.detail else ""
                self.meta["first_left_out"].setdefault(error.reason, where + detail)  # the first of every reason
                counts[error.reason] = counts.get(error.reason, 0) + 1
                check_left_out(self.meta, self.options, FEW)
            return False
        if document.is_val or self.mix[i]["tokens"] >= self.quotas[i]:
            return document.is_val and is_first  # validation documents are never repeated
        self.mix[i]["tokens"] += sum(len(ids) for ids, _ in document.sequences)
        self.mix[i]["epochs"] = document.epoch + 1
        return True


def left_out(meta: dict) -> str:
    """What was left out, for messages: of each reason how many rows, and the first of them."""
    reasons = [f"{count:,} {reason} ({meta['first_left_out'][reason]})" for reason, count in meta["left_out"].items()]
    return "; left out: " + ", ".join(reasons) if reasons else ""


def check_left_out(meta: dict, options: Any, few: int = 0) -> None:
    """Raises ValueError if of more than `few` rows more than --max_left_out, and more than one, cannot be used."""
    lost = sum(count for reason, count in meta["left_out"].items() if reason not in ("empty", NO_ROWS))
    if meta["rows"] > few and lost > max(1, options.max_left_out * meta["rows"]):
        counts = f"{lost:,} of {meta['rows']:,} rows cannot be used"
        raise ValueError(f"--max_left_out={options.max_left_out}: {counts}{left_out(meta)}")
