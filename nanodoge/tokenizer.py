"""Text in, numbers out, and back: the tokenizer.

A language model sees no letters. It sees a list of numbers, each the index of a row in its embedding table. Something
must cut text into pieces that have a number, and it must be able to cut *any* text: poems, code, emoji, binary junk.

**Bytes always work.** Every text is a string of bytes (UTF-8), and a byte is one of 256 values. Number these and every
text has a spelling. But the spelling is long: a model would spend its effort on putting letters together.

**Byte-pair encoding (BPE) shortens it.** Count which two neighbours stand side by side most often, say `t` and `h`, and
give the pair a number of its own. Replace it everywhere. Count again: now perhaps `th` and `e`. After 30,000 rounds the
common words are one number each and rare ones are a few. Nothing is ever unknown, since the 256 bytes stay. The list of
merges, in the order they were learned, *is* the tokenizer: to encode a new text, do the same merges in the same order.
(Gage 1994 invented it to compress files; Sennrich et al. 2016, arXiv:1508.07909, brought it to translation.)

**Words first.** Merges must not run across word borders, or `dog.`, `dog!` and `dog?` would each cost a number. So
PATTERN cuts the text into chunks (a word with the space before it, up to three digits, a run of punctuation, ...), and
pairs are counted inside chunks only. That also makes training fast: a chunk that occurs a million times is one entry.

**Special tokens** are numbers that no text can spell: where a document begins and ends, who speaks. What a user types
is never read as one, or a visitor could end the assistant's turn by typing `<|end_of_text|>`.

Training is ours, below, in forty lines (`train_bpe`). Encoding is left to tiktoken, which does the same merges in Rust.
On disk a vocabulary is one `tokenizer.json` in Hugging Face's format, so that what is trained here opens there and what
is published there (the Doge tokenizer, Llama-3's) opens here, with the same numbers for the same text.
"""

import codecs
import functools
import hashlib
import heapq
import json
import os
import re
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex
import tiktoken

from nanodoge.tokenizer_json import (
    _from_tiktoken,
    _line,
    _read_tokenizer_json,
    _write_tokenizer_json,
    read_object,
)

SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>",
]  # fmt: skip
REASONING_TAGS = SPECIAL_TOKENS[5:]  # the assistant's own words may hold these: it writes them while it reasons
ROLES = ("system", "user", "assistant")

# Where chunks begin and end: Llama-3's and Doge's pattern. Every regex engine involved (tiktoken's, Hugging Face's,
# Python's `regex`) reads it alike, which is not true of GPT-2's own spelling: see _portable.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The Doge tokenizer's chat layout, without the block on today's date that it opens every chat with.
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' }}
    {{- message['content'] | trim + eos_token + '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n' }}
{%- endif %}
"""

# What a chat template, a stranger's program, can raise besides jinja's own errors.
PROGRAM_ERRORS = ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Learn a vocabulary of `vocab_size` ids from `texts`: the special tokens, the 256 bytes, then merge after merge.

    The pair that occurs most often is merged; of equals, the one with the smaller ids (the left one first), so the same
    texts always give the same vocabulary. When no pair is left, the vocabulary stays smaller: see the result's
    `vocab_size`. Takes about 10 s for 32,768 ids from 20 MB. Raises ValueError when `vocab_size` cannot hold the bytes.

    Three tables keep a round cheap. Only *unique* chunks are held, each with how often it occurs. `places` knows which
    chunks a pair stands in, so that a merge touches only those. And the heap is lazy: a count that has fallen since it
    was pushed is noticed when it comes up, and pushed again. (Counts never rise: a merge makes new pairs only with the
    new token in them, and these are pushed when it is made.)
    """
    if isinstance(texts, str):
        raise ValueError("train_bpe wants many texts (a list, a file, a generator), not one str: pass [text]")
    base = len(SPECIAL_TOKENS)
    if vocab_size < base + 256:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {base} special tokens and 256 bytes need at least {base + 256}"
        )
    chunks, split = Counter(), regex.compile(PATTERN).findall
    for text in texts:
        chunks.update(split(text))
    words = [[base + byte for byte in chunk.encode("utf-8", "replace")] for chunk in chunks]
    times = list(chunks.values())
    counts, places = defaultdict(int), defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += times[index]
            places[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([byte]) for byte in range(256)]
    while heap and base + len(tokens) < vocab_size:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # an old count: the pair lost places to other merges meanwhile
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, made = base + len(tokens), set()
        tokens.append(tokens[pair[0] - base] + tokens[pair[1] - base])
        for index in places.pop(pair):
            old = words[index]
            word = _merge(old, pair, new)
            if len(word) == len(old):  # the pair stood here once, until another merge took one of its halves
                continue
            words[index] = word
            for neighbours in pairwise(old):
                counts[neighbours] -= times[index]
            for neighbours in pairwise(word):
                counts[neighbours] += times[index]
                if new in neighbours:
                    places[neighbours].add(index)
                    made.add(neighbours)
        for fresh in made:
            heapq.heappush(heap, (-counts[fresh], fresh))
    ranks = {token: base + i for i, token in enumerate(tokens)}
    assert len(ranks) == len(tokens), "two merges spelled the same token"
    return Tokenizer(ranks, {name: i for i, name in enumerate(SPECIAL_TOKENS)}, PATTERN)


def _merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`word` with every `pair` replaced by `new`, from the left."""
    left, right = pair
    out, i, last = [], 0, len(word) - 1
    while i <= last:
        if word[i] == left and i < last and word[i + 1] == right:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


class _Thread(threading.local):
    """What belongs to a thread: its own encoding of every tokenizer it has used and that still exists."""

    def __init__(self):
        self.encodings = weakref.WeakKeyDictionary()


_THREAD = _Thread()


class Tokenizer:
    """A vocabulary and how to use it. Made by `train_bpe` or `Tokenizer.load`.

    vocab_size: the largest id + 1. bos_id, eos_id, pad_id: ids. special_tokens: text -> id. chat_template: jinja2 text,
    or "" for a vocabulary without a chat. digest: sha256 of its tokenizer.json, by which data and checkpoints know it.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        special_tokens: dict[str, int],
        pattern: str,
        config: dict | None = None,
        data: bytes | None = None,
    ):
        """ranks: token -> id, where a smaller id is an earlier merge. config: what tokenizer_config.json said.
        data: the tokenizer.json this was read from, kept so that saving gives the same bytes."""
        self._ranks, self._pattern, self._data = ranks, pattern, data
        self._config = config or {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        self.special_tokens = special_tokens
        self._encoding = self._new_encoding()
        self.vocab_size = self._encoding.n_vocab
        eos = self._named("eos_token", "<|end_of_text|>", "<|endoftext|>")
        if eos is None:
            raise ValueError("the tokenizer has no end-of-text token: name one as eos_token in tokenizer_config.json")
        # A vocabulary like GPT-2's has the one token for everything: a text begins where another ended.
        bos = self._named("bos_token", "<|begin_of_text|>") or eos
        pad = self._named("pad_token", "<|pad|>", "<|finetune_right_pad_id|>") or eos
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.bos_id, self.eos_id, self.pad_id = (special_tokens[name] for name in (bos, eos, pad))
        template = self._config.get("chat_template")
        self.chat_template = template or (CHAT_TEMPLATE if set(SPECIAL_TOKENS[3:5]) <= set(special_tokens) else "")
        self._specials = _splitter(special_tokens)
        self._tags = _splitter(tag for tag in REASONING_TAGS if tag in special_tokens)

    def _named(self, key: str, *usual: str) -> str | None:
        """The special token that the config names for a part (`bos_token`, ...), else the first usual one there is."""
        token = self._config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            token = next((name for name in usual if name in self.special_tokens), None)
        elif not isinstance(token, str) or token not in self.special_tokens:
            raise ValueError(f"tokenizer_config.json names {key} {token!r}, which tokenizer.json does not have")
        return token

    # ------------------------------------------------------------------------------------------- files

    @classmethod
    def load(cls, path: str | os.PathLike, config_folder: str | os.PathLike | None = None) -> "Tokenizer":
        """A folder with a tokenizer.json, such a file, or the name of a tiktoken encoding ("gpt2", "cl100k_base", ...).

        A file or folder wins over a name. Beside tokenizer.json, or in `config_folder`, tokenizer_config.json and
        chat_template.jinja are read if they are there. Raises ValueError for a file that cannot be represented here
        with exactly the same ids.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
            if not file.is_file():
                raise ValueError(f"the folder {path} holds no tokenizer.json")
        elif not file.is_file():
            return cls(*_from_tiktoken(str(path)))
        data = file.read_bytes()
        try:
            return cls(*_read_tokenizer_json(data), config=_read_config(Path(config_folder or file.parent)), data=data)
        except ValueError as error:
            raise ValueError(f"{file} cannot be used: {_line(error)}") from None

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `Tokenizer.load` and transformers' AutoTokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        template = {"chat_template": self.chat_template} if self.chat_template else {}
        config = json.dumps({**self._config, **self._names, **template}, ensure_ascii=False, indent=2)
        for name, data in (("tokenizer_config.json", config.encode()), ("tokenizer.json", self._json())):
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            try:
                temporary.write_bytes(data)
                os.replace(temporary, folder / name)  # so a reader sees the old file or the new one, never half of one
            finally:
                temporary.unlink(missing_ok=True)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self._json()).hexdigest()

    def _json(self) -> bytes:
        """The tokenizer.json as it was read, or else one for this vocabulary, made once."""
        if self._data is None:
            bos = self._names["bos_token"]
            self._data = _write_tokenizer_json(self._ranks, self.special_tokens, self._pattern, bos)
        return self._data

    # ------------------------------------------------------------------------------------------- text and ids

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text: no BOS, no EOS, and special tokens written in it are just characters."""
        return [i for part in _breathe(text) for i in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: list[str], threads: int | None = None) -> list[np.ndarray]:
        """`encode` for many texts: a uint32 array each, a ninth of a list's memory. Threads (default: one a core) help,
        since tiktoken lets go of Python's lock. Each needs 60 ms to set up, so there is one a million characters at
        the most."""
        threads = min(threads or os.cpu_count() or 1, 1 + sum(map(len, texts)) // 1_000_000)
        size = max(1, -(-len(texts) // (4 * threads)))  # four helpings a thread, so that one slow text delays little

        def helping(start: int) -> list[np.ndarray]:
            encode = functools.partial(self._own_encoding().encode_to_numpy, disallowed_special=())
            parts = [[encode(part) for part in _breathe(_whole(text))] for text in texts[start : start + size]]
            return [ids[0] if len(ids) == 1 else np.concatenate(ids) for ids in parts]

        if threads == 1:
            return [ids for start in range(0, len(texts), size) for ids in helping(start)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for done in pool.map(helping, range(0, len(texts), size)) for ids in done]

    def _own_encoding(self) -> tiktoken.Encoding:
        """An encoding for this thread alone. The regex engine below gives its working memory to the first thread that
        comes; others borrow some at every match, which makes them half again to twice as slow."""
        if self not in _THREAD.encodings:
            _THREAD.encodings[self] = self._new_encoding()
        return _THREAD.encodings[self]

    def _new_encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            "nanodoge", pat_str=self._pattern, mergeable_ranks=self._ranks, special_tokens=self.special_tokens
        )

    def token_bytes(self, id: int) -> bytes:
        """The bytes one id stands for; they may be half a character. Raises ValueError for an id that is not there."""
        try:
            return self._encoding.decode_single_token_bytes(int(id))
        except (KeyError, OverflowError):
            raise ValueError(f"token id {id} is not in this vocabulary of {self.vocab_size} ids") from None

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; special tokens are kept as text unless skipped."""
        hidden = set(self.special_tokens.values()) if skip_special else ()
        return b"".join(self.token_bytes(i) for i in ids if i not in hidden).decode("utf-8", "replace")

    def stream(self, skip_special: bool = False) -> Callable[[int | None], str]:
        """A function to feed ids one by one: it returns what can be printed by now. Feed it None at the end.

        A character may be spread over several tokens (an emoji is four bytes), so bytes wait until theirs is complete.
        """
        hidden = set(self.special_tokens.values()) if skip_special else ()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def feed(id: int | None) -> str:
            return decoder.decode(b"" if id is None or id in hidden else self.token_bytes(id), final=id is None)

        return feed

    # ------------------------------------------------------------------------------------------- conversations

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """A conversation as (ids, assistant_mask), both of the same length; the mask is 1 where the assistant speaks.

        messages: [{"role": "user", "content": "Hi"}, ...]; other keys are not looked at. The ids are those that
        transformers' `apply_chat_template` gives, except that special tokens in what people wrote stay plain text. (The
        assistant may write the reasoning tags.) So there is one BOS, where the template puts it.

        The mask marks what the model is to learn to write: the assistant's words and the special token that ends its
        turn, EOS. Not the header before them, and not the blank lines after. A token belongs to whoever wrote its first
        byte: one that begins in the header and runs into the answer is not the assistant's, since at generation time
        the header is already there. Raises ValueError for messages that make no sense and templates that rewrite them.
        """
        if not self.chat_template:
            raise ValueError("the tokenizer has no chat template and no header tokens: it cannot render a conversation")
        contents = _contents(messages)
        ids, mask = [], []
        run: list[tuple[str, bool]] = []  # text since the last special token; it must be encoded in one piece
        answered = False  # the part before this one was the assistant's
        for text, index in self._parts(messages, contents, add_generation_prompt):
            if index is None:
                pieces = self._specials.split(text)
                ours = 2 if answered and len(pieces) > 1 else 0  # up to the special token that ends the turn
                answered = False
            else:
                answered = messages[index]["role"] == "assistant"
                pieces = self._tags.split(text) if answered else [text]
                ours = len(pieces) if answered else 0
            for k, piece in enumerate(pieces):
                if k % 2:
                    self._encode_run(run, ids, mask)
                    run = []
                    ids.append(self.special_tokens[piece])
                    mask.append(int(k < ours))
                else:
                    run.append((piece, k < ours))
        self._encode_run(run, ids, mask)
        return ids, mask

    def _encode_run(self, run: list[tuple[str, bool]], ids: list[int], mask: list[int]) -> None:
        """Append the ids of the joined texts, and for each whether its first byte is the assistant's."""
        owner = b"".join(bytes([ours]) * len(text.encode()) for text, ours in run)
        position = 0
        for id in self.encode("".join(text for text, _ in run)):
            ids.append(id)
            mask.append(owner[position])
            position += len(self.token_bytes(id))

    def _parts(self, messages: list[dict], contents: list[str], prompt: bool) -> list[tuple[str, int | None]]:
        """The rendered conversation as (text, index of the message it is from, None for the template's own) parts.

        A template is a program; which characters of its output came from whom cannot be read off the output. So it is
        run again with a numbered mark in place of every content, and the marks are replaced after.
        """
        template = _compile(self.chat_template)

        def run(contents: list[str]) -> str:
            filled = [{"role": m["role"], "content": text} for m, text in zip(messages, contents, strict=True)]
            return _fill(template, messages=filled, add_generation_prompt=prompt, **self._names)

        text = run(contents)
        for i, content in enumerate(contents):  # many templates trim: then what counts is the trimmed content
            trimmed = [*contents[:i], content.strip(), *contents[i + 1 :]]
            if trimmed[i] != content and run(trimmed) == text:
                contents = trimmed
        pieces = re.split("\0([0-9]+)\0", run([f"\0{i}\0" for i in range(len(contents))]))
        parts = [(contents[int(piece)], int(piece)) if k % 2 else (piece, None) for k, piece in enumerate(pieces)]
        if "".join(part for part, _ in parts) != text:
            raise ValueError("the chat template rewrites what the messages say: whose words are whose is lost")
        return parts


def _contents(messages: list[dict]) -> list[str]:
    """The text of every message, or ValueError. A list of text parts, as some clients send it, is joined."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('messages must be a list that is not empty, like [{"role": "user", "content": "Hi"}]')
    contents = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'message {i} must have a role and a content, like {{"role": "user", "content": "Hi"}}')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"message {i} has role {role!r}: valid are {', '.join(ROLES)}")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError(f"message {i} must have text as its content, not {type(content).__name__}")
        contents.append(_whole(content))
    return contents


@functools.lru_cache(maxsize=8)
def _compile(source: str):
    """A chat template ready to fill, with the settings and the helpers that transformers gives its templates."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # a downloaded template is a stranger's program

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.globals["raise_exception"] = raise_exception
    try:
        return jinja.from_string(source)
    except (TemplateError, *PROGRAM_ERRORS) as error:
        raise ValueError(f"the chat template cannot be read: {_line(error)}") from None


def _fill(template, **values) -> str:
    from jinja2 import TemplateError

    try:
        return template.render(tools=None, documents=None, **values)
    except (TemplateError, *PROGRAM_ERRORS) as error:
        raise ValueError(f"the chat template refuses these messages: {_line(error)}") from None


def _splitter(tokens: Iterable[str]) -> re.Pattern:
    """A pattern whose `split` gives text, token, text, token, ..., text; of two tokens at one place, the longer."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")  # (?!) matches nowhere


def _whole(text: str) -> str:
    """`text` with half characters (lone surrogates, which JSON can smuggle in) made U+FFFD, as tiktoken does."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _breathe(text: str, limit: int = 500_000) -> list[str]:
    r"""`text`, cut after half a million blanks in a row: `\s+(?!\S)` on a million overflows tiktoken's regex engine."""
    if len(text) <= limit:
        return [text]
    cuts = [0, *(match.end() for match in re.finditer(rf"\s{{{limit}}}", text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def _read_config(folder: Path) -> dict | None:
    """tokenizer_config.json, with the chat template that newer transformers keep in a file of its own beside it."""
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if not file.is_file() and not template.is_file():
        return None
    config = read_object(file.read_bytes(), file.name) if file.is_file() else {}
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    if not isinstance(config.get("chat_template") or "", str):
        raise ValueError("tokenizer_config.json has several chat templates: leave the one to use, as text")
    return config
