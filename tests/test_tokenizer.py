"""tokenizer.py against `tokenizers`, `transformers`, tiktoken and a BPE that recounts everything at every merge."""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import tiktoken
from helpers import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from nanodoge import template, tokenizer, tokenizer_json
from nanodoge.tokenizer import CHAT_TEMPLATE, PATTERN, SPECIAL_TOKENS, Tokenizer, split_long_whitespace, train_bpe

tokenizers = pytest.importorskip("tokenizers")
DOGE = Path(__file__).parents[2] / "shared" / "data" / "doge_tokenizer"
needs_doge = pytest.mark.skipif(not DOGE.exists(), reason="the published Doge tokenizer is not here")
STDLIB = Path(os.__file__).parent
TEXTS = [(STDLIB / name).read_text(encoding="utf-8") for name in ("argparse.py", "typing.py", "ast.py", "enum.py")]
EXOTIC = "Ünïcödé 😀👩‍👩‍👧 e\u0301 العربية 日本語 हिन्दी ﬁ ſ İ\u00a0\u3000\u200b\ufeff"

scraps = st.sampled_from(
    ["\n", "\n\n", "\r\n", " ", "   ", "\t", "don't", "I'LL", "'ſ", "1234567", "³½", "def f():\n    x", "!?."]
    + ["🙂", "👩‍👩‍👧", "e\u0301", "日本語", "\u3000", "\u0085", "\x1c", "\0"]
    + ["<|end_of_text|>", "<|begin_of_text|>", "<|"]
)
texts = st.lists(scraps | st.text(max_size=4), max_size=12).map("".join)
quick = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_bpe(TEXTS, 1000)


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("small")
    small.save(path)
    return path


@functools.cache
def library(folder: Path) -> "tokenizers.Tokenizer":
    """The same tokenizer.json in the `tokenizers` library, told not to read special tokens in text."""
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.encode_special_tokens = True
    return other


def library_ids(folder: Path, text: str) -> list[int]:
    return library(folder).encode(text, add_special_tokens=False).ids


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict:
    return {"role": "assistant", "content": content}


def learned(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> str:
    """The text that the mask marks."""
    return tokenizer.decode(id for id, on in zip(ids, mask, strict=True) if on)


def answers(messages: list[dict]) -> str:
    return "".join(m["content"].strip() + "<|end_of_text|>" for m in messages if m["role"] == "assistant")


# ------------------------------------------------------------------------------------------------ training


def brute_force(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """BPE as its definition reads: cut, count every pair anew, merge the most frequent; ids as ours, specials first."""
    words = [[9 + byte for byte in chunk.encode()] for text in texts for chunk in regex.findall(PATTERN, text)]
    spelled = {9 + byte: bytes([byte]) for byte in range(256)}
    while 9 + len(spelled) < vocab_size and (counts := Counter(pair for word in words for pair in pairwise(word))):
        best, new = min(counts, key=lambda pair: (-counts[pair], pair)), 9 + len(spelled)
        spelled[new] = spelled[best[0]] + spelled[best[1]]
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [new]
                i += 1
    return {token: id for id, token in spelled.items()}


REPEATS = "aaaa aaa aa a aaaaaaa abababab babab" + "ab" * 50 + "\n" * 30


@given(st.lists(st.text(alphabet="ab \n", max_size=30), max_size=5))
@example([TEXTS[3][:6000]])
@example([REPEATS])
@example([EXOTIC * 3])
@quick
def test_training_equals_brute_force(parts):
    assert train_bpe(parts, 400).vocabulary.ranks == brute_force(parts, 400)


def test_training_layout_and_limits(small):
    assert [small.decode([i]) for i in range(len(SPECIAL_TOKENS))] == SPECIAL_TOKENS
    assert [small.token_bytes(9 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert (small.vocab_size, small.bos_id, small.eos_id, small.pad_id) == (1000, 0, 1, 2)
    assert train_bpe(iter(TEXTS), 1000).digest == small.digest  # a generator will do, and twice is the same
    assert train_bpe(["ab ab"], 5000).vocab_size == 9 + 256 + 2  # "ab", " ab", and then there is no pair left
    assert train_bpe([], 265).vocab_size == 265
    for size in (264, 2**21):
        refused(lambda size=size: train_bpe(TEXTS, size), f"vocab_size={size}", "265")
    refused(lambda: train_bpe("a text", 300), "[text]")


# ------------------------------------------------------------------------------------------------ ids and text


@given(texts)
@quick
def test_ids_equal_the_library(small, folder, text):
    ids = small.encode(text)
    assert ids == library_ids(folder, text)
    assert small.decode(ids) == text
    assert not set(ids) & set(range(9))  # nothing a user types is a special token


@needs_doge
def test_the_published_doge_tokenizer(tmp_path):
    doge = Tokenizer.load(DOGE)
    assert (doge.vocab_size, doge.bos_id, doge.eos_id, doge.pad_id) == (32768, 0, 1, 2)

    def same(text):
        ids = doge.encode(text)
        assert ids == library_ids(DOGE, text) and doge.decode(ids) == text

    for text in [*TEXTS, EXOTIC * 5, " " * 300 + "x\n" * 50, "<|end_of_text|> <|reserved_special_token_5|>"]:
        same(text)
    given(texts)(quick(same))()
    doge.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (DOGE / "tokenizer.json").read_bytes()
    again = Tokenizer.load(tmp_path)
    assert (again.digest, again.chat_template) == (doge.digest, doge.chat_template)
    # Our own writer, from the ranks alone, finds the published merges again, all and in order.
    ours = Tokenizer(doge.vocabulary)
    written, published = json.loads(ours.to_json())["model"], json.loads(doge.to_json())["model"]
    assert [m.split(" ") for m in written["merges"]] == published["merges"]
    assert written["vocab"] == published["vocab"]


@pytest.mark.parametrize("text", [" " * 1_100_000, "a" * 1_100_000, "\n" * 499_999 + "x" + " \t" * 500_000])
def test_a_million_of_the_same_character(small, text):
    """tiktoken's regex engine aborts on a million blanks; one such document must not end a run over a corpus."""
    assert small.decode(small.encode(f"x{text}y")) == f"x{text}y"


@given(st.text(alphabet="a \n\u3000", max_size=60), st.integers(1, 8))
@quick
def test_long_whitespace_is_cut_after_every_limit_of_a_run(text, limit):
    runs = re.findall(r"\s+|\S+", text)
    pieces = [run[i : i + limit] for run in runs for i in range(0, len(run), limit) if run.isspace()]
    parts = split_long_whitespace(text, limit)
    assert "".join(parts) == text and not any(re.search(rf"\s{{{limit + 1}}}", part) for part in parts)
    assert sum(map(bool, parts[:-1])) == (sum(len(piece) == limit for piece in pieces) if len(text) > limit else 0)


def test_cutting_long_whitespace_is_linear():
    """Runs just below the limit: ten times as many, or as long, need about ten times the work, not a hundred times."""

    def seconds(count: int, size: int) -> float:
        text, times = (" " * size + "x") * count, []
        for _ in range(3):
            start = time.process_time()
            assert split_long_whitespace(text, size + 1) == [text]
            times.append(time.process_time() - start)
        return min(times)

    once = seconds(10, 2_000)
    assert seconds(100, 2_000) <= 40 * once and seconds(10, 20_000) <= 40 * once


@given(st.lists(st.binary(max_size=6), max_size=8))
@quick
def test_stream_prints_what_decode_prints(small, parts):
    ids = [9 + byte for part in parts for byte in part]
    assert "".join(map(small.stream(), [*ids, None])) == small.decode(ids)


def test_stream_never_prints_half_a_character(small):
    ids = [9 + byte for byte in (EXOTIC + "🙂").encode()]
    pieces = list(map(small.stream(), [*ids, None]))
    assert all(len(piece) <= 1 for piece in pieces) and "".join(pieces) == EXOTIC + "🙂" and pieces[-1] == ""
    feed = small.stream(skip_special=True)
    assert [feed(i) for i in (small.bos_id, ids[0], small.eos_id, ids[1])] == ["", "", "", "Ü"]
    feed(9 + 0xF0)
    assert feed(None) == "\ufffd"  # cut off in the middle of an emoji: shown, not swallowed


@given(st.lists(st.integers(0, 999), max_size=30))
@quick
def test_decode_equals_the_library(small, folder, ids):
    assert small.decode(ids) == b"".join(map(small.token_bytes, ids)).decode(errors="replace")
    text = [i for i in ids if i >= 9]
    assert small.decode(text) == library(folder).decode(text, skip_special_tokens=False)
    assert small.decode(ids, skip_special=True) == small.decode(text)
    assert small.decode(np.array(ids, dtype=np.uint32)) == small.decode(ids)


@pytest.mark.parametrize("bad", [1000, -1, 2**40])
def test_ids_that_are_not_there(small, bad):
    refused(lambda: small.decode([5, bad]), str(bad), "1000")
    refused(lambda: small.stream()(bad), str(bad), "1000")


# ------------------------------------------------------------------------------------------------ files


def test_save_and_load(small, folder, tmp_path):
    again = Tokenizer.load(folder)
    assert again.digest == small.digest == Tokenizer.load(folder / "tokenizer.json").digest
    assert [again.encode(text) for text in TEXTS] == [small.encode(text) for text in TEXTS]
    assert (again.special_tokens, again.chat_template) == (small.special_tokens, CHAT_TEMPLATE)
    again.save(tmp_path / "deep" / "er")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "deep" / "er" / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(os.listdir(folder)) == ["tokenizer.json", "tokenizer_config.json"]
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    alone = Tokenizer.load(tmp_path)  # without its config: our names are known
    assert (alone.bos_id, alone.eos_id, alone.pad_id, alone.chat_template) == (0, 1, 2, CHAT_TEMPLATE)


def open_automatically(folder: Path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def auto(folder):
    return open_automatically(folder)


def test_transformers_opens_what_we_save(small, auto):
    for text in [*TEXTS, EXOTIC]:
        assert auto(text)["input_ids"] == [small.bos_id, *small.encode(text)]  # exactly one BOS
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id, len(auto)) == (0, 1, 2, 1000)
    assert auto.chat_template == CHAT_TEMPLATE
    assert auto.decode(small.encode("Hello , world ' s")) == "Hello , world ' s"  # no cleaning up of spaces


def parsed(folder: Path) -> dict:
    return json.loads((folder / "tokenizer.json").read_bytes())


def load(document: dict, folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    library.cache_clear()
    return Tokenizer.load(folder)


def llama_layout(document: dict) -> None:
    """Special tokens in added_tokens only, behind the vocabulary."""
    for token in document["added_tokens"]:
        del document["model"]["vocab"][token["content"]]
        token["id"] += 2000


def older_layout(document: dict) -> None:
    """No ignore_merges, and merges as pairs: both may stand in files of any age."""
    document["model"]["ignore_merges"] = False
    document["model"]["merges"] = [merge.split(" ") for merge in document["model"]["merges"]]


@pytest.mark.parametrize("change", [llama_layout, older_layout])
def test_other_layouts_load(folder, tmp_path, change):
    document = parsed(folder)
    change(document)
    loaded = load(document, tmp_path)
    for text in [*TEXTS, EXOTIC, "  \n x  1234 don't I'LL\n\n"]:
        assert loaded.encode(text) == library_ids(tmp_path, text)
    if change is llama_layout:
        assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (2000, 2001, 2009)
        refused(lambda: loaded.decode([1500]), "1500")  # a hole among the ids


def test_a_token_that_no_merges_lead_to(small, folder, tmp_path):
    """Published vocabularies have some. It is found where it is a whole chunk, if the file says ignore_merges."""
    document = parsed(folder)
    document["model"]["vocab"]["ĠZqXj"] = 1000
    loaded = load(document, tmp_path)
    Tokenizer(loaded.vocabulary).save(tmp_path / "again")
    for text in (" ZqXj", " ZqXjs", "a ZqXj ZqXj\n"):
        assert loaded.encode(text) == library_ids(tmp_path, text) == library_ids(tmp_path / "again", text)
    assert loaded.encode(" ZqXj") == [1000] != small.encode(" ZqXj")
    document["model"]["ignore_merges"] = False
    refused(lambda: load(document, tmp_path), "ZqXj")


WORDS = ["<think>", "</think>", "<tool_call>", "dog", " ", "\n\n", "<|pad", "|>", "self", "<|im|>", "日本", "<t>"]


@given(st.lists(st.sampled_from(WORDS), unique=True, max_size=5), st.lists(st.sampled_from([*WORDS, "a", "<|pad|>"])))
@settings(max_examples=20, deadline=None)
def test_added_words_give_the_ids_of_the_library_or_are_refused(folder, tmp_path_factory, words, parts):
    """Added tokens that are not special are found in every text: same ids, after saving too, or a reason."""
    other, text = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), "".join(parts)
    other.add_tokens(words)
    other.encode_special_tokens = True
    place = tmp_path_factory.mktemp("words")
    other.save(str(place / "tokenizer.json"))
    try:
        ours = Tokenizer.load(place)
    except ValueError as error:
        pairs = [pair for a in words for b in [*words, *SPECIAL_TOKENS] if a != b for pair in ((a, b), (b, a))]
        shared = [(a, b) for a, b in pairs if a in b or any(b.startswith(a[n:]) for n in range(1, len(a)))]
        assert "overlaps" in str(error) and shared
        return
    ids = other.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids and ours.decode(ids) == text
    again = Tokenizer(ours.vocabulary)
    again.save(place)
    assert Tokenizer.load(place).digest == ours.digest and Tokenizer.load(place).encode(text) == ids
    assert (ours.digest == Tokenizer.load(folder).digest) == (not words)


@pytest.mark.parametrize("saved_by", ["transformers", "tokenizers"])
def test_a_tokenizer_that_was_saved_again_is_the_same(small, folder, tmp_path, saved_by):
    if saved_by == "transformers":
        auto = open_automatically(folder)
        auto(["a", "a b c"], padding=True, truncation=True, max_length=2)  # leaves its settings in the file
        auto.save_pretrained(tmp_path)
    else:
        library(folder).save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.load(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() != (folder / "tokenizer.json").read_bytes()
    assert (again.digest, again.chat_template) == (small.digest, small.chat_template)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
    assert Tokenizer.load(tmp_path).digest != small.digest  # documents would end with another id


def test_of_two_special_tokens_the_longer(folder, tmp_path):
    document = parsed(folder)
    document["added_tokens"].append({**document["added_tokens"][0], "id": 1000, "content": "<|pad|>ding"})
    ours, other = load(document, tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours.chat_template = "<|pad|>ding <|pad|>din {{ messages[0]['content'] }}"
    ids, _ = ours.render([user("x")])
    assert ids == other.encode("<|pad|>ding <|pad|>din x", add_special_tokens=False).ids and ids[0] == 1000


DROP = object()


def change_at(document: dict, path: tuple, value: object) -> None:
    for step in path[:-1]:
        document = document[step]
    if value is DROP:
        del document[path[-1]]
    else:
        document[path[-1]] = value(document[path[-1]]) if callable(value) else value


def swapped_merges(merges: list[str]) -> list[str]:
    merges[3], merges[300] = merges[300], merges[3]
    return merges


def another_pair(merges: list[str]) -> list[str]:
    """The longest token merged from another pair: the same vocabulary, other ids for some texts."""
    vocab = {merge.replace(" ", "") for merge in merges}
    i = next(i for i, m in enumerate(merges) if len(m) > 5)
    whole, left = merges[i].replace(" ", ""), merges[i].index(" ")
    splits = [(whole[:k], whole[k:]) for k in range(1, len(whole)) if k != left]
    merges[i] = " ".join(next(split for split in splits if all(len(half) == 1 or half in vocab for half in split)))
    return merges


STEPS, MERGES = ("pre_tokenizer", "pretokenizers"), ("model", "merges")
REGEX = (*STEPS, 0, "pattern", "Regex")
OTHER_WORD = {"content": "<think>", "id": 1500, "special": False}  # the library would number it 1000
AMBIGUOUS = {"content": "é", "id": 9 + 0xE9, "special": False}  # as a word two bytes, in the byte-level alphabet one
# What is changed, its new value (a function: of the old one), and a word of the reason.
DAMAGE = [
    (("model", "type"), "Unigram", "Unigram"),
    (("model", "dropout"), 0.1, "dropout"),
    (("model", "end_of_word_suffix"), "</w>", "</w>"),
    (("normalizer",), {"type": "NFC"}, "NFC"),
    (("pre_tokenizer",), {"type": "Whitespace"}, "pre_tokenizer"),
    ((*STEPS, 1, "add_prefix_space"), True, "pre_tokenizer"),
    ((*STEPS, 0, "behavior"), "Removed", "pre_tokenizer"),
    (REGEX, r"\s+$|\S+", "$"),
    (REGEX, r"\w+", "be lost"),  # letters alone
    (REGEX, "x*", "be lost"),  # may be empty
    (REGEX, "(((a", "tokenizer.json"),
    (("model", "vocab", "A"), DROP, "256 bytes"),
    (("model", "vocab", "self"), DROP, "merges make"),
    ((*MERGES, -1), DROP, "do not lead to its token"),
    (MERGES, swapped_merges, "order"),
    (MERGES, another_pair, "merges"),
    (("model", "vocab", "B"), 9 + 67, "share"),
    (("model", "vocab", "A"), -3, "whole numbers"),
    (("added_tokens", 1, "content"), "", "empty"),
    (("model", "vocab", "A"), "7", "whole numbers"),
    *((("model", "vocab", f"a{letter}"), 5000, "byte-level alphabet") for letter in "\0 \xad\u0144\u6f22▁"),
    *((("added_tokens", 0, flag), True, "blanks") for flag in ("lstrip", "rstrip", "single_word")),
    (("added_tokens",), lambda tokens: [*tokens, OTHER_WORD], "'<think>' has the id 1500, which should be 1000"),
    (("added_tokens",), lambda tokens: [*tokens, AMBIGUOUS], "'é'"),
    (("added_tokens", 0, "id"), 4000, "another id"),
    (("added_tokens", 1, "content"), "<|stop|>", "eos_token"),
]


@pytest.mark.parametrize(("path", "value", "word"), DAMAGE)
def test_files_that_cannot_be_represented(folder, tmp_path, path, value, word):
    document = parsed(folder)
    if word == "eos_token":
        del document["model"]["vocab"]["<|end_of_text|>"]
    change_at(document, path, value)
    refused(lambda: load(document, tmp_path), "tokenizer.json", word)


NO_TOKENIZERS = [b"", b'{"model": {"ty', b"no json", b"\xff\xfe\x00\xd8", b"[1, 2]", b"null", b"{}"]
NO_TOKENIZERS += [b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}', b"[" * 9**5]


@pytest.mark.parametrize("data", NO_TOKENIZERS)
def test_files_that_are_no_tokenizer(folder, tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    refused(lambda: Tokenizer.load(tmp_path), "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    if data != b"{}":  # a config may be empty
        (tmp_path / "tokenizer_config.json").write_bytes(data)
        refused(lambda: Tokenizer.load(tmp_path), "tokenizer_config.json")


def test_any_field_may_be_nonsense(tmp_path):
    """Every field of a small file left out, or of every kind of JSON value: it loads, or says why in one line."""
    good, paths = train_bpe(["ab ab abc"], 268).to_json(), []

    def walk(node, path):
        keys = node.keys() if isinstance(node, dict) else range(min(2, len(node))) if isinstance(node, list) else ()
        for key in list(keys)[:12]:
            paths.append((*path, key))
            walk(node[key], (*path, key))

    walk(json.loads(good), ())
    for path, value in product(paths, (DROP, None, -1, "x", [], ["x"], {"x": 1})):
        document = json.loads(good)
        change_at(document, path, value)
        try:
            load(document, tmp_path).encode("ab <|end_of_text|>")
        except ValueError as error:
            assert "\n" not in str(error) and "tokenizer.json" in str(error)


def test_the_config_beside_it(folder, tmp_path):
    def with_config(**config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load(parsed(folder), tmp_path)

    refused(lambda: with_config(eos_token="<|nope|>"), "tokenizer_config.json", "<|nope|>")
    several = [{"name": "default", "template": "x"}]
    refused(lambda: with_config(chat_template=several), "tokenizer_config.json", "chat templates")
    assert with_config(eos_token={"content": "<|end_of_thought|>"}).eos_id == 6
    (tmp_path / "chat_template.jinja").write_text("\ufeff{{ bos_token }}{{ messages[0]['content'] }}", encoding="utf-8")
    assert Tokenizer.load(tmp_path).render([user("x")])[0][0] == 0


# ------------------------------------------------------------------------------------------------ tiktoken's encodings


@pytest.fixture
def no_download(monkeypatch, small):
    """tiktoken's encodings with their own patterns and special tokens, and our small vocabulary for their large one."""
    ranks = {token: rank - 9 for token, rank in small.vocabulary.ranks.items()}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks)


@pytest.mark.parametrize("name", openai_public.ENCODING_CONSTRUCTORS)
def test_tiktoken_encodings_survive_saving(no_download, name, tmp_path):
    spec = openai_public.ENCODING_CONSTRUCTORS[name]()
    spec.pop("explicit_n_vocab", None)
    original, ours = tiktoken.Encoding(**spec), Tokenizer.load(name)
    assert ours.bos_id == ours.eos_id == ours.pad_id == spec["special_tokens"]["<|endoftext|>"]
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.digest == ours.digest and again.vocab_size == ours.vocab_size == original.n_vocab

    def same(text):
        expected = original.encode_ordinary(text)
        assert ours.encode(text) == again.encode(text) == library_ids(tmp_path, text) == expected

    for text in ["a \n\n b  \n", "1234567 12", "x   \n   \n", "tail   ", *TEXTS]:
        same(text)
    given(texts)(quick(same))()
    refused(lambda: ours.render([user("Hi")]), "chat template")


def test_merges_of_a_file_that_was_saved_here_are_not_checked_again(small, folder, tmp_path, monkeypatch):
    """Unless it has changed."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(tokenizer_json, "check_merges", lambda *_: tokenizer_json.refuse_if(True, "checked"))
    assert Tokenizer.load(tmp_path).digest == small.digest
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b"\n")
    refused(lambda: Tokenizer.load(tmp_path), "checked")


def test_a_folder_wins_over_a_tiktoken_name(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.save("gpt2")
    assert Tokenizer.load("gpt2").digest == small.digest
    refused(lambda: Tokenizer.load("gpt-two"), "'gpt-two'", "cl100k_base")
    (tmp_path / "empty").mkdir()
    refused(lambda: Tokenizer.load("empty"), "empty", "tokenizer.json")


def test_offline(tmp_path, monkeypatch):
    """Nobody listens: a line, at once. Somebody listens and says nothing: a line after the time is up, not a hang."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name, value in {"NO_PROXY": "", "no_proxy": "", "HTTPS_PROXY": proxy, "https_proxy": proxy}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tokenizer_json, "FETCH_SECONDS", 0.3)
        refused(lambda: Tokenizer.load("gpt2"), "cannot fetch the tiktoken encoding 'gpt2'", "timed out", "once")
    monkeypatch.setattr(tokenizer_json, "FETCH_SECONDS", 20)
    refused(lambda: Tokenizer.load("cl100k_base"), "cannot fetch the tiktoken encoding 'cl100k_base'", "network once")


# ------------------------------------------------------------------------------------------------ conversations

words = texts.filter(lambda text: "<|" not in text)
message = st.fixed_dictionaries({"role": st.sampled_from(tokenizer.ROLES), "content": words})
chats = st.lists(message, min_size=1, max_size=5)
# Layouts of others: not trimmed, only the user's trimmed, no special token after an answer, an answer repeated.
UNTRIMMED = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>
{{ m.content }}\n<|end_of_text|>\n{% endfor %}"""
ONE_TRIMMED = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ m.content | trim }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"""
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
TWICE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{{ m.content }}{% endfor %}"
SHOUTED = "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}"
TEMPLATES = [CHAT_TEMPLATE, UNTRIMMED, ONE_TRIMMED, PLAIN, TWICE, SHOUTED]


@pytest.mark.parametrize("template", [*TEMPLATES, pytest.param(None, marks=needs_doge)])
def test_chats_equal_transformers(folder, auto, template):
    """Our own vocabulary with the templates; and, for None, the published one with its own."""
    ours = Tokenizer.load(folder if template else DOGE)
    theirs = auto if template else open_automatically(DOGE)
    ours.chat_template = template or ours.chat_template

    def same(messages, prompt):
        ids, mask = ours.render(messages, add_generation_prompt=prompt)
        options = {"chat_template": template, "add_generation_prompt": prompt}
        assert ids == theirs.apply_chat_template(messages, **options)["input_ids"]
        assert len(mask) == len(ids) and set(mask) <= {0, 1}
        if not template:
            assert learned(ours, ids, mask) == answers(messages)
            assert ids.count(ours.bos_id) == 1 and ids[0] == ours.bos_id

    given(chats, st.booleans())(quick(same))()


@given(chats)
@quick
def test_mask_equals_transformers(small, auto, messages):
    """Our template says `generation`, as trl's assistant_only_loss needs it; without it, ours finds the same part."""
    theirs = auto.apply_chat_template(messages, return_assistant_tokens_mask=True)
    assert small.render(messages) == (theirs["input_ids"], theirs["assistant_masks"])
    plain = Tokenizer(small.vocabulary, {"chat_template": re.sub("{%- (end)?generation %}", "", CHAT_TEMPLATE)})
    ids, mask = small.render(messages)
    assert plain.render(messages) == (ids, mask) and learned(small, ids, mask) == answers(messages)
    prompt, none = small.render(messages, add_generation_prompt=True)
    ids, mask = small.render([*messages, assistant("Hello.")])  # which goes on exactly where generation would
    assert ids[: len(prompt)] == prompt and not any(none[len(theirs["input_ids"]) :]) and mask[len(prompt)] == 1


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rill <|pad|>"}}}
SENT = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}  # as APIs do
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "k <|pad|>": 1}}}]
TALK = [user("Weather in Rill?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
TALK += [{"role": "tool", "content": '12 "degrees"', "name": "weather"}, assistant("It is 12 degrees.")]
# Templates that use what transformers gives them. The second is the published Doge's way to write calls and results.
ENVIRONMENT = [
    CHAT_TEMPLATE,
    """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n' }}
{%- if 'tool_calls' in m %}{% set call = m.tool_calls[0].function %}
    {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}' }}
{%- elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}{{ eos_token }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n' }}{% endif %}""",
    """{% set ns = namespace(n=0) %}{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if ns.n > 9 %}{% break %}{% endif %}{{ m.content | upper }}
{{- m.name | default('nobody') }}{{ dict(a='<é>') | tojson }}{{ ns.n }}{% generation %}{% for c in m.tool_calls %}
{{ c.function.arguments | items | list | string | length > 0 }}{% endfor %}x{% endgeneration %}{% endfor %}""",
    "{{ strftime_now('%Y') }}{% if not messages %}{{ raise_exception('none') }}{% endif %}{{ documents is none }}",
]


@pytest.mark.parametrize("template", ENVIRONMENT)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_of_transformers(small, auto, template, tools):
    ours, sent = Tokenizer(small.vocabulary, {"chat_template": template}), [{**m} for m in TALK]
    ids, mask = ours.render(TALK, tools=tools)
    theirs = auto.apply_chat_template(TALK, tools=tools, chat_template=template, tokenize=False)
    assert ours.decode(ids) == theirs and ours.pad_id not in ids  # what messages and tools say is text
    sent[1]["tool_calls"] = [SENT]
    assert ours.render(sent, tools=tools) == (ids, mask)
    if "header_id" in template:  # a call is learned from its first character, and its result is not
        call = json.dumps(CALL["function"]) if template is CHAT_TEMPLATE else '{"name": "weather", "parameters": '
        call += "" if template is CHAT_TEMPLATE else json.dumps(CALL["function"]["arguments"]) + "}"
        assert learned(ours, ids, mask) == f"{call}<|end_of_text|>It is 12 degrees.<|end_of_text|>"


KNOWS = "{% for m in messages %}{% if m.reasoning_content %}<{{ m.reasoning_content }}>{% endif %}{{ m.content }}"
KNOWS += "{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_written_and_learned(small, field):
    ids, mask = small.render([user("5+1?"), {**assistant("6"), field: " One past 5.\n"}])
    thought = "<|begin_of_thought|>\nOne past 5.\n<|end_of_thought|>\n\n<|begin_of_solution|>\n6\n<|end_of_solution|>"
    assert learned(small, ids, mask) == thought + "<|end_of_text|>" and {5, 6, 7, 8} < set(ids)
    assert small.render([user("5+1?"), {**assistant(thought), field: "twice"}]) == (ids, mask)
    knows = Tokenizer(small.vocabulary, {"chat_template": KNOWS})
    ids, mask = knows.render([user("5+1?"), {**assistant("6"), field: "One past 5."}])
    assert learned(knows, ids, mask) == "One past 5.>6<|end_of_text|>"  # no generation prompt says where "<" belongs


def test_a_conversation_is_rendered_twice_however_long(folder, monkeypatch):
    ours, runs = Tokenizer.load(folder), []
    compiled = template.compile_template(UNTRIMMED)
    counting = SimpleNamespace(render=lambda values: runs.append(1) or compiled.render(values))
    monkeypatch.setattr(template, "compile_template", lambda _: counting)
    ours.render([user(" a\n"), assistant(" b\n")] * 50)
    assert len(runs) == 2


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|begin_of_", "text|>", "Hi", " ", "\n", "\x000\x00"]), max_size=8))
@quick
def test_what_users_type_is_text(small, parts):
    content = "".join(parts)
    ids, mask = small.render([user(content), {"role": "system", "content": content}])
    assert not any(mask)
    assert [i for i in ids if i < 9] == [0, 3, 4, 1, 3, 4, 1]
    said = content.strip() + "<|end_of_text|>\n\n"
    header = "<|start_header_id|>{}<|end_header_id|>\n"
    assert small.decode(ids) == "<|begin_of_text|>" + header.format("user") + said + header.format("system") + said


def test_a_token_belongs_to_whoever_wrote_its_first_byte(folder, auto):
    ours = Tokenizer.load(folder)
    ours.chat_template = UNTRIMMED
    ids, mask = ours.render([assistant("\nx = 1\n")])
    pieces = [(ours.decode([i]), on) for i, on in zip(ids, mask, strict=True)]
    assert pieces[pieces.index(("<|end_header_id|>", 0)) + 1] == ("\n\n", 0)  # begins in the header
    assert pieces[-3:-1] == [("\n\n", 1), ("<|end_of_text|>", 1)]  # begins in the answer
    ours.chat_template = PLAIN  # no special token ends the turn: the words alone
    ids, mask = ours.render([assistant("x"), user("y")])
    assert learned(ours, ids, mask) == "x"


def test_messages_as_apis_send_them(small):
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
    named = user("Hello you") | {"name": "Ann", "tool_calls": None}
    assert small.render([user(parts)]) == small.render([named]) == small.render([user("Hello you")])
    ids, mask = small.render([user(""), assistant("")])
    assert learned(small, ids, mask) == "<|end_of_text|>" and sum(mask) == 1
    small.render([user("half a pair \ud83d")])


NO_MESSAGES = [([], "not empty"), ("Hi", "not empty"), (None, "not empty"), (["Hi"], "message 0")]
NO_MESSAGES += [([{"role": "user"}], "message 0"), ([{"content": "Hi"}], "message 0"), ([user(None)], "None")]
NO_MESSAGES += [([user("Hi"), {"role": "robot", "content": "Hi"}], "'robot'"), ([user(5)], "5")]
NO_MESSAGES += [([{"role": ["user"], "content": "Hi"}], "message 0")]
NO_MESSAGES += [([user([{"type": "image_url", "image_url": "x"}])], "image_url")]


@pytest.mark.parametrize(("messages", "word"), NO_MESSAGES)
def test_messages_that_make_no_sense(small, messages, word):
    refused(lambda: small.render(messages), word)


BAD_TEMPLATES = {
    "{{ messages[0]['content'].split('i')[-1] }}<|pad|>": "cuts",
    "{% if messages[0]['content'] == 'Hi' %}secret{% endif %}": "rewrites",
    "{{ raise_exception('no system\\nplease') }}": "no system",
    "{% for %}": "cannot be used",
    "{{ nothing.at.all }}": "undefined",
    "{{ messages.__class__.__mro__ }}": "unsafe",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_templates_that_cannot_be_used(folder, template):
    ours = Tokenizer.load(folder)
    ours.chat_template = template
    refused(lambda: ours.render([user("Hi")]), BAD_TEMPLATES[template])


def test_importing_needs_no_torch():
    code = "import sys, nanodoge.tokenizer as t; t.train_bpe(['ab ab'], 266); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
