"""Text to token ids and back: a byte-level BPE tokenizer.

A language model reads a list of numbers, each the index of a row of its embedding table. So text must be cut into
pieces that have a number, and it must be possible to cut *any* text: poems, code, emoji, binary junk.

**Bytes always work.** Every text is a string of bytes (UTF-8), and a byte is one of 256 values. Number these and every
text has a spelling. But the spelling is long: a model would spend its effort on putting letters together.

**Byte-pair encoding (BPE) shortens it.** Count which two neighbours occur most often, say `t` and `h`, and give the
pair a number of its own. Replace it everywhere. Count again: now perhaps `th` and `e`. After 30,000 rounds the common
words are one number each and rare ones are a few. The list of merges, in the order they were learned, *is* the
tokenizer: to encode a new text, do the same merges in the same order. (Gage 1994 invented it to compress files;
Sennrich et al. 2016, arXiv:1508.07909, brought it to translation.)

**Words first.** If merges ran across word borders, `dog.`, `dog!` and `dog?` would each cost a number. So PATTERN cuts
the text into chunks (a word with the space before it, up to three digits, a run of punctuation, ...), and pairs are
counted inside chunks only.

**Special tokens** are numbers that no text can spell: where a document begins and ends, who speaks. What a user types
is never read as one, or a visitor could end the assistant's turn by typing `<|end_of_text|>`.

Training is `train_bpe`, below, in forty lines. Encoding is left to tiktoken, which does the same merges in Rust. On
disk a vocabulary is one `tokenizer.json` in Hugging Face's format (tokenizer_json.py).
"""

import codecs
import functools
import hashlib
import heapq
import json
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import groupby, pairwise
from operator import add, itemgetter
from pathlib import Path

import numpy as np
import regex
import tiktoken

from nanodoge import tokenizer_json
from nanodoge.options import one_line
from nanodoge.template import CHAT_TEMPLATE, ROLES, fix_surrogates, written_parts
from nanodoge.tokenizer_json import Vocabulary, read_object, refuse_if

SPECIAL_TOKENS = (
    "<|begin_of_text|> <|end_of_text|> <|pad|> <|start_header_id|> <|end_header_id|> "
    "<|begin_of_thought|> <|end_of_thought|> <|begin_of_solution|> <|end_of_solution|>"
).split()
CHECKED = "nanodoge_checked"  # in tokenizer_config.json: the sha256 of the tokenizer.json that was saved with it
REASONING_TAGS = SPECIAL_TOKENS[5:]  # these the assistant may write in its messages

# Where chunks begin and end: the pattern of Llama-3 and Doge. tiktoken's regex engine, Hugging Face's and Python's
# `regex` all read it alike, which is not true of GPT-2's own spelling.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """A vocabulary of `vocab_size` ids learned from `texts`: the special tokens, the 256 bytes, then merge after merge;
    of fewer, when no pair is left. Takes about 10 s for 32,768 ids from 20 MB.

    The pair that occurs most often is merged; of equals, the one with the smaller ids (the left one first).

    A chunk is held as a string with one character per token, chr(id), so `chunk.replace(pair, new)` is a merge.
    Three tables keep a round cheap. Only *unique* chunks are held, each with how often it occurs. `places` knows which
    chunks contain a pair, so that a merge touches only those. And the heap is lazy: a count that has fallen since it
    was pushed is noticed when it is popped, and pushed again. (Counts never rise: new pairs have the new token.)
    """
    refuse_if(isinstance(texts, str), "train_bpe needs several texts (a list, a generator), not one str: pass [text]")
    base = len(SPECIAL_TOKENS)
    if not base + 256 <= vocab_size <= 2**20:
        valid = f"from {base + 256} ({base} special tokens and 256 bytes) to {2**20}"
        raise ValueError(f"vocab_size={vocab_size}: valid is {valid}")
    counted = Counter()
    for text in texts:
        counted.update(regex.findall(PATTERN, text))
    chunks = ["".join(chr(base + byte) for byte in chunk.encode("utf-8", "replace")) for chunk in counted]
    times = list(counted.values())
    counts, places = defaultdict(int), defaultdict(set)
    for index, chunk in enumerate(chunks):
        for pair in map(add, chunk, chunk[1:]):
            counts[pair] += times[index]
            places[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([byte]) for byte in range(256)]
    while heap and base + len(tokens) < vocab_size:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # an old count: other merges have since used up some places of the pair
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, made = chr(base + len(tokens)), set()
        tokens.append(b"".join(tokens[ord(half) - base] for half in pair))
        for index in places.pop(pair):
            old, chunks[index] = chunks[index], chunks[index].replace(pair, new)
            for neighbours in map(add, old, old[1:]):
                counts[neighbours] -= times[index]
            for neighbours in map(add, chunks[index], chunks[index][1:]):
                counts[neighbours] += times[index]
                if new in neighbours:
                    places[neighbours].add(index)
                    made.add(neighbours)
        for fresh in made:
            heapq.heappush(heap, (-counts[fresh], fresh))
    ranks = {token: base + i for i, token in enumerate(tokens)}
    assert len(ranks) == len(tokens), "two merges spelled the same token"
    return Tokenizer(Vocabulary(ranks, {name: i for i, name in enumerate(SPECIAL_TOKENS)}, PATTERN))


class EncodingPerThread(threading.local):
    """tiktoken's encoder, made once for every thread: several that share one take 1.4 to 1.9 times as long."""

    def __init__(self, vocabulary: Vocabulary):
        ranks, special, pattern, words = vocabulary
        names = special | words
        self.encoding = tiktoken.Encoding("doge", pat_str=pattern, mergeable_ranks=ranks, special_tokens=names)


class Tokenizer:
    """A vocabulary and how to use it. vocab_size: the largest id + 1. special_tokens: text -> id. chat_template: jinja2
    text, or "". digest: by which data and checkpoints know it."""

    def __init__(self, vocabulary: Vocabulary, config: dict | None = None, data: bytes | None = None):
        """config: what tokenizer_config.json said. data: the tokenizer.json that was read; saving writes it again."""
        self.vocabulary, self.special_tokens, self.data = vocabulary, vocabulary.special_tokens, data
        self.config = config or {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        self.local = EncodingPerThread(vocabulary)
        self.vocab_size = self.local.encoding.n_vocab
        eos = self.special_token("eos_token", "<|end_of_text|>", "<|endoftext|>")
        bos = self.special_token("bos_token", "<|begin_of_text|>", eos)  # GPT-2 has one token for all three
        pad = self.special_token("pad_token", "<|pad|>", "<|finetune_right_pad_id|>", eos)
        self.names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.bos_id, self.eos_id, self.pad_id = (self.special_tokens[name] for name in (bos, eos, pad))
        ours = CHAT_TEMPLATE if set(SPECIAL_TOKENS[3:5]) <= self.special_tokens.keys() else ""
        self.chat_template = self.config.get("chat_template") or ours
        # Role of who wrote a text (None: the template) -> splits it at the special tokens that this writer may use.
        may_use = {None: self.special_tokens, "assistant": set(REASONING_TAGS) & self.special_tokens.keys()}
        self.split = {role: splitter(may_use.get(role, ())) for role in (None, *ROLES)}

    def special_token(self, key: str, *usual: str) -> str:
        """The special token that the config names for `key`, else the first of the usual ones that exists."""
        token = self.config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        token = next((name for name in usual if name in self.special_tokens), None) if token is None else token
        if token not in list(self.special_tokens):  # a list: what a file says may be unhashable
            raise ValueError(f"tokenizer_config.json must name one of the special tokens as {key}, not {token!r}")
        return token

    @classmethod
    def load(cls, path: str | os.PathLike, config_folder: str | os.PathLike | None = None) -> "Tokenizer":
        """The tokenizer of a tokenizer.json, of its folder, or of a tiktoken encoding ("gpt2", ...), with the
        tokenizer_config.json and chat_template.jinja beside it or in `config_folder`. Raises ValueError for a file
        whose ids would differ here."""
        file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        if not file.is_file():
            refuse_if(file != Path(path), f"the folder {path} holds no tokenizer.json")
            return cls(tokenizer_json.read_tiktoken(str(path)))
        folder, config = Path(config_folder or file.parent), {}
        try:
            if (place := folder / "tokenizer_config.json").is_file():
                config = read_object(place.read_bytes(), place.name)
            if (place := folder / "chat_template.jinja").is_file():  # where newer transformers keep it
                config["chat_template"] = place.read_text(encoding="utf-8-sig")
            several = not isinstance(config.get("chat_template") or "", str)
            refuse_if(several, "tokenizer_config.json has several chat templates: leave the one to use, as text")
            data = file.read_bytes()
            is_checked = config.pop(CHECKED, "") == hashlib.sha256(data).hexdigest()
            return cls(tokenizer_json.read_tokenizer_json(data, is_checked), config, data)
        except ValueError as error:
            raise ValueError(f"{file} cannot be used: {one_line(error)}") from None

    def save(self, folder: str | os.PathLike, max_length: int | None = None) -> None:
        """Writes tokenizer.json and tokenizer_config.json, for `Tokenizer.load` and transformers' AutoTokenizer, which
        is to pad on the left, since a text is continued at its right end. max_length: of the model."""
        more = {"chat_template": self.chat_template} if self.chat_template else {}
        more |= {"model_max_length": max_length} if max_length else {}
        config = {"padding_side": "left", **self.config, **self.names, **more}
        config[CHECKED] = hashlib.sha256(self.to_json()).hexdigest()  # so that loading it is faster
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), "utf-8")
        Path(folder, "tokenizer.json").write_bytes(self.to_json())

    def to_json(self) -> bytes:
        """The tokenizer.json as it was read, or else one for this vocabulary, made once."""
        self.data = self.data or tokenizer_json.write_tokenizer_json(self.vocabulary, self.names["bos_token"])
        return self.data

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of what decides the ids of a document: the same for every file with this meaning."""
        ranks, special, pattern, words = self.vocabulary
        tables = {token.hex(): i for token, i in ranks.items()}, special, words
        tables = [sorted(table.items(), key=itemgetter(1)) for table in tables]
        return hashlib.sha256(json.dumps([tables, pattern, self.bos_id, self.eos_id]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text: no BOS, no EOS, and special tokens written in it are just characters."""
        return self.encode_to_numpy(text).tolist()

    def encode_prompt(self, text: str, add_bos: bool = True) -> list[int]:
        """`encode`, but special tokens written in the text are these tokens, since a conversation may come as a text.
        One BOS stands in front."""
        ids = []
        for i, part in enumerate(self.split[None](text)):
            ids += [self.special_tokens[part]] if i % 2 else self.encode(part)
        return ids if not add_bos or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """`encode` as a uint32 array: a ninth of a list's memory, and threads run in parallel, without the GIL."""
        encode, parts = self.local.encoding.encode_to_numpy, split_long_whitespace(fix_surrogates(text))
        choices = dict(allowed_special={*self.vocabulary.words}, disallowed_special=())
        return np.concatenate([encode(part, **choices) for part in parts])

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one id; they may be half a character. Raises ValueError for an id that is not there."""
        try:
            return self.local.encoding.decode_single_token_bytes(int(id))
        except (KeyError, OverflowError):
            raise ValueError(f"token id {id} is not in this vocabulary of {self.vocab_size} ids") from None

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; special tokens are kept as text unless skipped."""
        hidden = set(self.special_tokens.values()) if skip_special else ()
        return b"".join(self.token_bytes(i) for i in ids if i not in hidden).decode("utf-8", "replace")

    def stream(self, skip_special: bool = False) -> Callable[[int | None], str]:
        """A function that takes ids one by one, and None at the end, and returns the text that is complete by then. (A
        character may be several tokens: an emoji is four bytes.)"""
        hidden = {None, *(self.special_tokens.values() if skip_special else ())}
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda id: decoder.decode(b"" if id in hidden else self.token_bytes(id), final=id is None)

    def render(
        self, messages: list[dict], add_generation_prompt: bool = False, tools: list[dict] | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of a conversation in the layout of the chat template. messages: as for plain_messages in
        template.py. tools: JSON schemas for the template. The ids are those of transformers' `apply_chat_template`,
        but special tokens in messages and tools stay plain text. (The assistant may write the reasoning tags.)

        The mask marks what the model learns to write: what the template puts between its `generation` tags, else the
        assistant's words and the special token that ends its turn, EOS. A token belongs to the writer of its first
        byte: one that begins in the header and runs into the answer is not the assistant's, because at generation time
        the header is already there.
        """
        refuse_if(not self.chat_template, "the tokenizer has no chat template: it cannot render a conversation")
        learned, pieces = bytearray(), []  # a flag per byte; (text, is it a special token)
        values = dict(add_generation_prompt=add_generation_prompt, **self.names)
        for text, role, flag in written_parts(self.chat_template, messages, tools, self.split[None], **values):
            learned += bytes([flag]) * len(text.encode())
            pieces += [(piece, k % 2) for k, piece in enumerate(self.split[role](text))]
        ids, mask, start = [], [], 0
        for is_special, run in groupby(pieces, key=itemgetter(1)):
            texts = [text for text, _ in run]  # text between two special tokens is encoded as one
            for id in map(self.special_tokens.get, texts) if is_special else self.encode("".join(texts)):
                ids.append(id)
                mask.append(learned[start])
                start += len(self.token_bytes(id))
        return ids, mask


def splitter(tokens: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that splits text into [text, token, text, ..., text]; of two tokens at one place, the longer wins."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})").split  # (?!) matches nowhere


def split_long_whitespace(text: str, limit: int = 500_000) -> list[str]:
    r"""`text`, cut after every `limit` blanks in a row: `\s+(?!\S)` on a million overflows tiktoken's regex engine. The
    lookbehind makes a match begin where a run begins; else a short run would be read again from each of its blanks."""
    if len(text) <= limit:
        return [text]
    runs = re.finditer(rf"\s(?<!\s\s)\s{{{limit - 1},}}", text)
    cuts = [cut for run in runs for cut in range(run.start() + limit, run.end() + 1, limit)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
