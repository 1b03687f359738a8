"""Vocabularies as files: Hugging Face's tokenizer.json, and tiktoken's encodings by name."""

import functools
import json
import re
import threading
from collections import Counter

import regex

FETCH_SECONDS = 120  # tiktoken's download has no timeout of its own; its largest file, 4 MB, passes at 35 kB/s


def _line(error: Exception) -> str:
    """What a library has to say, in one line."""
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------------ tokenizer.json


@functools.lru_cache(maxsize=1)
def _byte_letters() -> dict[int, str]:
    """Byte -> the printable character that stands for it in tokenizer.json (a space is written as 'Ġ').

    GPT-2's alphabet: bytes that print in Latin-1 are themselves, the other 68 are the characters from U+0100 on.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{byte: chr(byte) for byte in shown}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts that BPE with the tokens older than `token` makes of its bytes: the two it was merged from, if it can
    be reached by merging at all (more than two parts say that it cannot)."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], ranks[token]), i) for i in range(len(parts) - 1))
        if rank >= ranks[token]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _write_tokenizer_json(ranks: dict[bytes, int], special_tokens: dict[str, int], pattern: str, bos: str) -> bytes:
    """tokenizer.json in Hugging Face's format; its post-processor puts one BOS before a text, as Doge's does."""
    letters = _byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [_last_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    ids = special_tokens | {spell[token]: i for token, i in ranks.items()}
    by_id = dict(sorted(ids.items(), key=lambda item: item[1]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    document = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in by_id.items() if name in special_tokens],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, begin, second],
            "special_tokens": {bos: {"id": bos, "ids": [special_tokens[bos]], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a chunk that is a token as it stands is that token: what tiktoken does too
            "vocab": by_id,
            "merges": [f"{spell[parts[0]]} {spell[parts[1]]}" for parts in merges if len(parts) == 2],
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=1).encode()


def _read_tokenizer_json(data: bytes) -> tuple[dict[bytes, int], dict[str, int], str]:
    """(ranks, special_tokens, pattern) of a tokenizer.json; ValueError with the reason where tiktoken would differ."""
    document = read_object(data)
    try:
        ranks, merges = _read_model(document)
        special_tokens = {token["content"]: token["id"] for token in document["added_tokens"]}
        pattern = _split_pattern(document["pre_tokenizer"])
        vocab, whole = document["model"]["vocab"], document["model"].get("ignore_merges", False)
        greedy = ("lstrip", "rstrip", "single_word")
        sticky = [token["content"] for token in document["added_tokens"] if any(map(token.get, greedy))]
        ids = [*ranks.values(), *special_tokens.values()]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ValueError("its ids are not all whole numbers from 0")
        if not all(type(token) is str and token for token in special_tokens) or len(set(ids)) < len(ids):
            raise ValueError("two of its tokens share an id, or an added token is empty or no text")
        if any(vocab.get(token, i) != i for token, i in special_tokens.items()):
            raise ValueError("one of its added tokens has another id in the vocabulary")
        if sticky:
            raise ValueError(f"its added tokens {sticky[:3]} swallow the blanks around them or want to be whole words")
        if document.get("normalizer") is not None:
            raise ValueError(f"it normalizes text ({document['normalizer']}), so what was written would be lost")
        _check_merges(ranks, merges, whole)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it is not a complete tokenizer.json ({type(error).__name__}: {error})") from None
    return ranks, special_tokens, pattern


def _read_model(document: dict) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]]:
    """The ids of ordinary tokens and the merges of a tokenizer.json, both as bytes."""
    model, added = document["model"], {token["content"] for token in document["added_tokens"]}
    kind = model.get("type", "BPE")  # files from before there were other kinds do not say
    if kind != "BPE":
        raise ValueError(f"its model is {kind}, and only byte-level BPE is known here")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"its model has {option}={model[option]!r}, which tiktoken cannot do")
    byte_of = {letter: byte for byte, letter in _byte_letters().items()}

    def spelled(token: str) -> bytes:
        if not token or not all(letter in byte_of for letter in token):
            raise ValueError(f"its token {token!r} is not written in the byte-level alphabet")
        return bytes(byte_of[letter] for letter in token)

    ranks = {spelled(token): i for token, i in model["vocab"].items() if token not in added}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return ranks, [(spelled(left), spelled(right)) for left, right in pairs]


def _check_merges(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], whole: bool) -> None:
    """ValueError unless tiktoken, which knows the ranks alone, merges as this list does.

    tiktoken joins two neighbours when the *result* is a token, Hugging Face when the *pair* is in the list. It is the
    same where every token that can be merged at all has in the list the pair it is merged from. (Another pair that
    spells it never comes up: the same bytes are merged in the same way wherever they stand.) A token that no merges
    lead to is found by both when it is a chunk as it stands, if the file says ignore_merges (`whole`).
    """
    results = [ranks.get(left + right) for left, right in merges]
    if None in results or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("its vocabulary lacks some of the 256 bytes, or a token that its merges make")
    if results != sorted(results):
        raise ValueError("its merges are not in the order of their ids")
    listed = set(merges)
    for token in ranks:
        parts = _last_merge(token, ranks)
        if len(parts) == 2 and tuple(parts) not in listed or len(parts) > 2 and not whole:
            raise ValueError(f"its merges do not lead to its token {token!r} in the order of ids")


def _split_pattern(pre_tokenizer: dict) -> str:
    """The regex by which a tokenizer.json cuts text into chunks, in the layout that Doge and Llama-3 share."""
    steps = pre_tokenizer.get("pretokenizers", [])
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if len(steps) != 2 or not split.items() <= steps[0].items() or not byte_level.items() <= steps[1].items():
        raise ValueError("its pre_tokenizer is not the one known here: Split by a regex, then ByteLevel")
    pattern = steps[0]["pattern"]["Regex"]
    # Hugging Face's engine, Oniguruma, reads these in its own way: `$` and `^` at every line, `{1,3}+` as (...)+.
    if re.search(r"(?<!\\)\$|\{[0-9,]+\}\+|(?<![\\\[])\^", pattern):
        raise ValueError(f"its split pattern {pattern!r} uses $, ^ or {{1,3}}+, which engines read differently")
    every = "".join(map(chr, range(0x3000))) + "It's 12345 words,\r\n\r\n  \u6f22\u5b57 \U0001f600!? "
    try:
        pieces = [match.group() for match in regex.finditer(pattern, every, timeout=5)]
    except (regex.error, RecursionError, TimeoutError) as error:
        raise ValueError(f"its split pattern {pattern!r} cannot be used: {_line(error)}") from None
    if "".join(pieces) != every or not all(pieces):
        raise ValueError(f"its split pattern {pattern!r} leaves out some characters: they would be lost")
    return pattern


def read_object(data: bytes, name: str = "it") -> dict:
    """A JSON object, from a stranger's file. ValueError for what is none, for a key that stands there twice (which of
    the two counts?), and for half a character, which could not be written again."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(pairs) > len(found := dict(pairs)):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"{twice!r} stands there twice")
        return found

    try:
        document = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({_line(error)})") from None
    if not isinstance(document, dict):
        raise ValueError(f"{name} holds a {type(document).__name__}, where an object was expected")
    return document


# ------------------------------------------------------------------------------------------------ tiktoken's encodings


def _portable(pattern: str) -> str:
    r"""tiktoken's split pattern, spelled so that Hugging Face's regex engine (Oniguruma) cuts alike.

    To Oniguruma `$` is the end of a line, to tiktoken the end of the text, which both call `\z`. And `{1,3}+` is
    "possessive" to tiktoken, which changes nothing at the end of an alternative, and "again and again" to Oniguruma.
    """
    return pattern.replace("$", r"\z").replace("{1,3}+", "{1,3}")


def _from_tiktoken(name: str) -> tuple[dict[bytes, int], dict[str, int], str]:
    """One of tiktoken's own encodings by name. The first time it is fetched over the network and kept in a cache."""
    from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS

    if name not in ENCODING_CONSTRUCTORS:
        raise ValueError(
            f"{name!r} is no folder with a tokenizer.json, no such file and no tiktoken encoding "
            f"({', '.join(ENCODING_CONSTRUCTORS)})"
        )
    done: list = []

    def fetch() -> None:
        try:
            done.append(ENCODING_CONSTRUCTORS[name]())
        except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors), or a damaged download
            done.append(error)

    # In a thread that can be left behind: requests, called without a timeout, waits for a silent network for ever.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    spec = done[0] if done else TimeoutError(f"no answer for {FETCH_SECONDS} seconds")
    if isinstance(spec, Exception):
        reason = f"{type(spec).__name__}: {_line(spec)}"
        raise ValueError(
            f"cannot fetch the tiktoken encoding {name!r}: {reason[:200]}; it needs the network once, and is then kept "
            "in TIKTOKEN_CACHE_DIR; a tokenizer.json on disk needs none"
        )
    names = {i: name for name, i in reversed(spec["special_tokens"].items())}  # o200k_harmony names one id twice
    special_tokens = {name: i for i, name in names.items()}
    return spec["mergeable_ranks"], special_tokens, _portable(spec["pat_str"])
