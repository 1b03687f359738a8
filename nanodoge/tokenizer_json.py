"""Vocabularies as files: Hugging Face's tokenizer.json, read strictly and written, and tiktoken's encodings by name.

A tokenizer.json can say much more than a Vocabulary: normalizers, other kinds of models, tokens that include the blanks
around them. It is read only if tiktoken and Hugging Face's library give the same ids for every text. Any other file is
refused with the reason, because a model that gets slightly wrong ids gives no error.
"""

import functools
import json
import re
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import regex

from nanodoge.options import one_line

# Byte -> the printable character that stands for it in tokenizer.json: GPT-2's alphabet. Bytes that print in Latin-1
# stand for themselves, the other 68 are the characters from U+0100 on, so a space is written 'Ġ'.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
LETTERS = {byte: chr(byte) for byte in PRINTABLE}
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
BYTES = dict.fromkeys(range(256), 256) | {ord(letter): byte for byte, letter in LETTERS.items()}  # 256: no letter

# The two steps of the pre_tokenizer that is read and written here.
SPLIT = {"type": "Split", "pattern": None, "behavior": "Isolated", "invert": False}  # pattern: each file has its own
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
FETCH_SECONDS = 120  # a download fails after so long a silence


class Vocabulary(NamedTuple):
    """What decides the ids that tiktoken gives a text."""

    ranks: dict[bytes, int]  # token -> id; a smaller id is an earlier merge
    special_tokens: dict[str, int]  # text -> id
    pattern: str  # the regex that cuts text into chunks
    words: dict[str, int] = {}  # added tokens that are not special, found in every text; text -> id


def refuse_if(condition: object, reason: str) -> None:
    """Raises ValueError with the reason."""
    if condition:
        raise ValueError(reason)


def read_object(data: bytes, name: str = "it") -> dict:
    """The JSON object in `data`. Raises ValueError for anything else, for a key that occurs twice, and for half a
    character (a lone surrogate), which could not be written again."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        refuse_if(len(found) < len(pairs), f"a key occurs twice among {list(found)[:9]}")
        return found

    try:
        document = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({one_line(error)})") from None
    refuse_if(not isinstance(document, dict), f"{name} holds a {type(document).__name__}, not an object")
    return document


def merges_of(ranks: dict[bytes, int]) -> list[list[bytes]]:
    """For every token of two bytes or more, in the order of ids, the parts that BPE with the tokens before it makes of
    its bytes: the pair that it is merged from, or more than two parts if no merges lead to it."""
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            rank, i = min((ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank >= ranks[token]:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append(parts)
    return merges


def write_tokenizer_json(vocabulary: Vocabulary, bos: str) -> bytes:
    """tokenizer.json in Hugging Face's format. Its post-processor puts one `bos` before a text, as Doge's does."""
    ranks, special_tokens, pattern, words = vocabulary
    spelled = {token: "".join(map(LETTERS.get, token)) for token in ranks}
    ids = special_tokens | {spelled[token]: i for token, i in ranks.items()}
    vocab = dict(sorted(ids.items(), key=itemgetter(1)))
    merges = [" ".join(map(spelled.get, parts)) for parts in merges_of(ranks) if len(parts) == 2]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = sorted((special_tokens | words).items(), key=itemgetter(1))
    added = [{"id": i, "content": name, **flags, "special": name in special_tokens} for name, i in names]
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB"))
    bos_ids = {bos: {"id": bos, "ids": [special_tokens[bos]], "tokens": [bos]}}
    single, pair = [begin, first], [begin, first, begin, second]
    # ignore_merges: a chunk that is a token is that token, even if no merges lead to it, as in tiktoken
    document = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": pattern}}, BYTE_LEVEL]},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": bos_ids},
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }
    return json.dumps(document, ensure_ascii=False, indent=1).encode()


def read_tokenizer_json(data: bytes, is_checked: bool = False) -> Vocabulary:
    """The vocabulary of a tokenizer.json. Raises ValueError with the reason if tiktoken would give other ids.
    is_checked: its merges are known to be right; to check 32,768 takes half a second."""
    document = read_object(data)
    try:
        model = document["model"]
        refuse_if((kind := model.get("type", "BPE")) != "BPE", f"its model is {kind}, not byte-level BPE")
        options = {key: model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")}
        options["normalizer"] = document.get("normalizer")
        refuse_if(any(options.values()), f"it has {options}, which tiktoken cannot do")
        steps = document["pre_tokenizer"].get("pretokenizers", [])
        known = len(steps) == 2 and SPLIT.items() <= (steps[0] | {"pattern": None}).items()
        known = known and BYTE_LEVEL.items() <= (steps[1] | {"trim_offsets": True}).items()  # it changes no ids
        refuse_if(not known, "its pre_tokenizer is not the one known here: Split by a regex, then ByteLevel")
        pattern = steps[0]["pattern"]["Regex"]
        check_pattern(pattern)

        added, vocab = document["added_tokens"], model["vocab"]
        names = {token["content"]: token["id"] for token in added}
        refuse_if(not all(type(text) is str and text for text in names), "an added token is empty or no text")
        words = {token["content"]: token["id"] for token in added if not token.get("special", True)}
        check_words(added if words else [], words, vocab)
        greedy = [token["content"] for token in added if any(map(token.get, ("lstrip", "rstrip", "single_word")))]
        refuse_if(greedy, f"its added tokens {greedy[:3]} include the blanks around them, or are found as words only")
        ranks = {bytes_of(text): i for text, i in vocab.items() if text not in names or text in words}
        ids = [*ranks.values(), *(i for text, i in names.items() if text not in words or text not in vocab)]
        refuse_if(not all(type(i) is int and 0 <= i < 2**31 for i in ids), "its ids are not all whole numbers from 0")
        refuse_if(len(set(ids)) < len(ids), "two of its tokens share an id")
        moved = [text for text, i in names.items() if vocab.get(text, i) != i]
        moved += [text for text in words.keys() & vocab.keys() if bytes_of(text) != text.encode()]
        refuse_if(moved, f"its added tokens {moved[:3]} have another id or meaning in the vocabulary")
        if not is_checked:
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
            check_merges(ranks, [(bytes_of(a), bytes_of(b)) for a, b in pairs], model.get("ignore_merges"))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it is not a complete tokenizer.json ({type(error).__name__}: {error})") from None
    special_tokens = {text: i for text, i in names.items() if text not in words}
    return Vocabulary(ranks, special_tokens, pattern, words)


def check_words(added: list[dict], words: dict[str, int], vocab: dict[str, int]) -> None:
    """Raises ValueError for added tokens, if some are `words`, that tiktoken and the library treat differently: they
    choose otherwise where two overlap in a text, and the library numbers those beyond the vocabulary itself."""
    names, top = [token["content"] for token in added], len(vocab) - 1
    for name, token in zip(names, added, strict=True):
        renumbered = name not in vocab and token["id"] != top + 1
        refuse_if(renumbered, f"its added token {name!r} has the id {token['id']}, which should be {top + 1}")
        top = max(top, token["id"])
        pairs = [pair for a in names if a != name and name in words for pair in ((a, name), (name, a))]
        shared = [{a, b} - {name} for a, b in pairs if a in b or any(b.startswith(a[n:]) for n in range(1, len(a)))]
        refuse_if(shared, f"its added token {name!r}, which is not special, overlaps with {shared[:1]}")


def bytes_of(text: str) -> bytes:
    """The bytes of a token that is written in the byte-level alphabet."""
    try:
        refuse_if(not text, "one of its tokens is empty")
        return text.translate(BYTES).encode("latin-1")  # which has the characters below 256 only
    except UnicodeEncodeError:
        raise ValueError(f"its token {text!r} is not in the byte-level alphabet") from None


def check_merges(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], ignore_merges: bool) -> None:
    """Raises ValueError unless Hugging Face's library with these merges does what tiktoken does with the ranks.

    tiktoken joins two neighbours if the *result* is a token, the library if the *pair* is in the list. They agree if
    the list has the pair of every token that merges lead to, in the order of ids. (Another pair with the same result
    never occurs: equal bytes are always merged in the same way.) A token that no merges lead to is found by both where
    it is a whole chunk, if the file says ignore_merges.
    """
    results, listed = [ranks.get(a + b) for a, b in merges], set(merges)
    lacks = None in results or any(bytes([byte]) not in ranks for byte in range(256))
    refuse_if(lacks, "its vocabulary lacks some of the 256 bytes, or a token that its merges make")
    refuse_if(results != sorted(results), "its merges are not in the order of their ids")
    needed = [tuple(parts) for parts in merges_of(ranks) if len(parts) == 2 or not ignore_merges]
    missing = [b"".join(parts) for parts in needed if parts not in listed]
    refuse_if(missing, f"its merges do not lead to its tokens {missing[:3]} in the order of ids")


@functools.cache
def check_pattern(pattern: str) -> None:
    """Raises ValueError for a regex that engines read differently, or that leaves out characters."""
    # Oniguruma, Hugging Face's engine, reads these in its own way: `$` and `^` at every line, `{1,3}+` as (...)+.
    unlike = re.search(r"(?<!\\)\$|\{[0-9,]+\}\+|(?<![\\\[])\^", pattern)
    refuse_if(unlike, f"its split pattern {pattern!r} uses $, ^ or {{1,3}}+, which engines read differently")
    every = "".join(map(chr, range(0x3000))) + "It's 12345 words,\r\n\r\n  \u6f22\u5b57 \U0001f600!? "
    try:
        chunks = [match.group() for match in regex.finditer(pattern, every, timeout=5)]
    except (regex.error, RecursionError, TimeoutError) as error:
        raise ValueError(f"its split pattern {pattern!r} cannot be used: {one_line(error)}") from None
    complete = "".join(chunks) == every and all(chunks)
    refuse_if(not complete, f"its split pattern {pattern!r} leaves out some characters: they would be lost")


def read_tiktoken(name: str) -> Vocabulary:
    """One of tiktoken's own encodings by name. The first time tiktoken downloads it, then it keeps it in a cache."""
    from unittest.mock import patch

    import requests
    from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS

    valid = ", ".join(ENCODING_CONSTRUCTORS)
    refuse_if(name not in ENCODING_CONSTRUCTORS, f"{name!r} is no tokenizer.json or its folder, nor one of {valid}")
    try:
        # tiktoken calls requests.get without a timeout: on a silent network it would wait for ever.
        with patch.object(requests, "get", functools.partial(requests.get, timeout=FETCH_SECONDS)):
            encoding = ENCODING_CONSTRUCTORS[name]()
    except (OSError, ValueError) as error:  # no network (the errors of requests are OSErrors), or a damaged download
        reason = f"{type(error).__name__}: {one_line(error)[:150]}"
        place = "it needs the network once, and is then kept in TIKTOKEN_CACHE_DIR"
        raise ValueError(f"cannot fetch the tiktoken encoding {name!r} ({reason}): {place}") from None
    # For Oniguruma: its `$` is the end of a line, \z the end of the text; its {1,3}+ is not possessive but repeated.
    pattern = encoding["pat_str"].replace("$", r"\z").replace("{1,3}+", "{1,3}")
    names = {i: text for text, i in reversed(encoding["special_tokens"].items())}  # o200k_harmony names one id twice
    return Vocabulary(encoding["mergeable_ranks"], {text: i for i, text in names.items()}, pattern)
