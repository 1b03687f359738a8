"""tokenizer.py against `tokenizers`, `transformers`, tiktoken and a BPE that recounts everything at every merge."""

import json
import os
import pickle
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from nanodoge import tokenizer, tokenizer_json
from nanodoge.tokenizer import CHAT_TEMPLATE, PATTERN, SPECIAL_TOKENS, Tokenizer, train_bpe

tokenizers = pytest.importorskip("tokenizers")
DOGE = Path(__file__).parents[2] / "shared" / "data" / "doge_tokenizer"
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


def reference(file: Path) -> "tokenizers.Tokenizer":
    """The same file in the `tokenizers` library, told not to read special tokens in text."""
    other = tokenizers.Tokenizer.from_file(str(file))
    other.encode_special_tokens = True
    return other


def one_line(call, *words: str) -> str:
    """`call` must raise a ValueError of one line that holds all the words."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# ------------------------------------------------------------------------------------------------ training


def brute_force(texts: list[str], vocab_size: int) -> list[bytes]:
    """BPE as its definition reads: cut, count every pair anew, merge the most frequent; ids as ours, specials first."""
    base = len(SPECIAL_TOKENS)
    words = [[base + byte for byte in chunk.encode()] for text in texts for chunk in regex.findall(PATTERN, text)]
    spelled = {base + byte: bytes([byte]) for byte in range(256)}
    while base + len(spelled) < vocab_size:
        counts = Counter((a, b) for word in words for a, b in zip(word, word[1:], strict=False))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        new = base + len(spelled)
        spelled[new] = spelled[best[0]] + spelled[best[1]]
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [new]
                i += 1
    return list(spelled.values())


REPEATS = "aaaa aaa aa a aaaaaaa abababab babab" + "ab" * 50 + "\n" * 30


@pytest.mark.parametrize("text", [TEXTS[3][:6000], REPEATS, EXOTIC * 3])
def test_training_equals_brute_force(text):
    ours = train_bpe([text], 400)
    expected = brute_force([text], 400)
    assert [ours.token_bytes(len(SPECIAL_TOKENS) + i) for i in range(len(expected))] == expected
    assert ours.vocab_size == len(SPECIAL_TOKENS) + len(expected)


@given(st.lists(st.text(alphabet="ab \n", max_size=30), max_size=5))
@quick
def test_training_equals_brute_force_on_short_alphabets(parts):
    ours = train_bpe(parts, 290)
    assert [ours.token_bytes(i) for i in range(9, ours.vocab_size)] == brute_force(parts, 290)


def test_training_is_as_good_as_the_libraries(small):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        TEXTS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=1000, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    theirs = sum(len(library.encode(text).ids) for text in TEXTS)
    ours = sum(len(small.encode(text)) for text in TEXTS)
    assert ours == pytest.approx(theirs, rel=1e-3)  # they break ties otherwise, so a few late tokens differ


def test_training_layout_and_limits(small):
    assert [small.decode([i]) for i in range(len(SPECIAL_TOKENS))] == SPECIAL_TOKENS
    assert [small.token_bytes(9 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert (small.vocab_size, small.bos_id, small.eos_id, small.pad_id) == (1000, 0, 1, 2)
    assert train_bpe(iter(TEXTS), 1000).digest == small.digest  # a generator will do, and twice is the same
    assert train_bpe(["ab ab"], 5000).vocab_size == 9 + 256 + 2  # "ab", " ab", and then there is no pair left
    assert train_bpe([], 265).vocab_size == 265
    one_line(lambda: train_bpe(TEXTS, 264), "vocab_size=264", "265")
    one_line(lambda: train_bpe("a text", 300), "[text]")


# ------------------------------------------------------------------------------------------------ ids and text


@given(texts)
@quick
def test_ids_equal_the_library(small, folder, text):
    ids = small.encode(text)
    assert ids == reference_of(folder).encode(text, add_special_tokens=False).ids
    assert small.decode(ids) == text
    assert not set(ids) & set(range(9))  # nothing a user types is a special token


CACHE: dict[Path, "tokenizers.Tokenizer"] = {}


def reference_of(folder: Path) -> "tokenizers.Tokenizer":
    return CACHE.setdefault(folder, reference(folder / "tokenizer.json"))


@pytest.mark.skipif(not DOGE.exists(), reason="the published Doge tokenizer is not here")
def test_the_published_doge_tokenizer(tmp_path):
    doge = Tokenizer.load(DOGE)
    other = reference_of(DOGE)
    assert (doge.vocab_size, doge.bos_id, doge.eos_id, doge.pad_id) == (32768, 0, 1, 2)
    for text in [*TEXTS, EXOTIC * 5, " " * 300 + "x\n" * 50, "<|end_of_text|> <|reserved_special_token_5|>"]:
        assert doge.encode(text) == other.encode(text, add_special_tokens=False).ids
        assert doge.decode(doge.encode(text)) == text

    @given(texts)
    @quick
    def same(text):
        assert doge.encode(text) == other.encode(text, add_special_tokens=False).ids

    same()
    doge.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (DOGE / "tokenizer.json").read_bytes()
    again = Tokenizer.load(tmp_path)
    assert (again.digest, again.chat_template) == (doge.digest, doge.chat_template)
    # Our own writer, from the ranks alone, finds the published merges again, all and in order.
    ours = Tokenizer(doge.vocabulary)
    written, published = json.loads(ours.to_json())["model"], json.loads(doge.to_json())["model"]
    assert [m.split(" ") for m in written["merges"]] == published["merges"]
    assert written["vocab"] == published["vocab"]


def test_batch_equals_single(small):
    many = ["", "a", EXOTIC, "half a pair: \ud83d", "<|end_of_text|>", *TEXTS, *TEXTS[0].splitlines()]
    batch = small.encode_batch(many)
    assert all(isinstance(ids, np.ndarray) and ids.dtype == np.uint32 for ids in batch)
    assert [ids.tolist() for ids in batch] == [small.encode(text) for text in many]
    assert small.encode_batch([]) == []


def test_batch_in_several_threads_equals_single(small):
    many = [[f"{i} {text}" for text in TEXTS] for i in range(12)]
    with ThreadPoolExecutor(3) as pool:
        for texts, batch in zip(many, pool.map(small.encode_batch, many), strict=True):
            assert [ids.tolist() for ids in batch] == [small.encode(text) for text in texts]


@pytest.mark.parametrize("character", [" ", "a"])
def test_a_million_of_the_same_character(small, character):
    """tiktoken's regex engine aborts on a million blanks; one such document must not end a run over a corpus."""
    text = "x" + character * 1_100_000 + "y"
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert small.encode_batch([text])[0].tolist() == ids


@given(st.lists(st.binary(max_size=6), max_size=8))
@quick
def test_stream_prints_what_decode_prints(small, parts):
    ids = [9 + byte for part in parts for byte in part]
    feed = small.stream()
    pieces = [feed(i) for i in ids]
    assert "".join(pieces) + feed(None) == small.decode(ids)


def test_stream_never_prints_half_a_character(small):
    ids = [9 + byte for byte in (EXOTIC + "🙂").encode()]
    feed = small.stream()
    pieces = [feed(i) for i in ids]
    assert "\ufffd" not in "".join(pieces) and feed(None) == ""
    assert all(len(piece) <= 1 for piece in pieces) and "".join(pieces) == EXOTIC + "🙂"
    feed = small.stream(skip_special=True)
    assert [feed(i) for i in (small.bos_id, ids[0], small.eos_id, ids[1])] == ["", "", "", "Ü"]
    feed(9 + 0xF0)
    assert feed(None) == "\ufffd"  # cut off in the middle of an emoji: shown, not swallowed


@given(st.lists(st.integers(0, 999), max_size=30))
@quick
def test_decode_equals_the_library(small, folder, ids):
    assert small.decode(ids) == b"".join(map(small.token_bytes, ids)).decode(errors="replace")
    text = [i for i in ids if i >= 9]
    assert small.decode(text) == reference_of(folder).decode(text, skip_special_tokens=False)
    assert small.decode(ids, skip_special=True) == small.decode(text)
    assert small.decode(np.array(ids, dtype=np.uint32)) == small.decode(ids)


def test_ids_that_are_not_there(small):
    for bad in (1000, -1, 2**40):
        one_line(lambda bad=bad: small.decode([5, bad]), str(bad), "1000")
        one_line(lambda bad=bad: small.stream()(bad), str(bad), "1000")


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
    assert pickle.loads(pickle.dumps(small)).encode("pickled") == small.encode("pickled")  # for worker processes


@pytest.mark.parametrize(("where", "name"), [(Path, "write_bytes"), (os, "replace")])
def test_a_failed_save_leaves_the_old_files(small, tmp_path, monkeypatch, where, name):
    small.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, name, full)
    with pytest.raises(OSError, match="No space"):
        train_bpe(["other"], 270).save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.fixture(scope="module")
def auto(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def test_transformers_opens_what_we_save(small, auto):
    for text in [*TEXTS, EXOTIC]:
        assert auto(text)["input_ids"] == [small.bos_id, *small.encode(text)]  # exactly one BOS
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id, len(auto)) == (0, 1, 2, 1000)
    assert auto.chat_template == CHAT_TEMPLATE
    assert auto.decode(small.encode("Hello , world ' s")) == "Hello , world ' s"  # no cleaning up of spaces


def llama_layout(document: dict) -> None:
    """Special tokens in added_tokens only, behind the vocabulary."""
    model, added = document["model"], document["added_tokens"]
    for token in added:
        del model["vocab"][token["content"]]
        token["id"] += 2000


def older_layout(document: dict) -> None:
    """No ignore_merges, and merges as pairs: both may stand in files of any age."""
    document["model"]["ignore_merges"] = False
    document["model"]["merges"] = [merge.split(" ") for merge in document["model"]["merges"]]


@pytest.mark.parametrize("change", [llama_layout, older_layout])
def test_other_layouts_load(folder, tmp_path, change):
    document = json.loads((folder / "tokenizer.json").read_bytes())
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    loaded, other = Tokenizer.load(tmp_path), reference(tmp_path / "tokenizer.json")
    for text in [*TEXTS, EXOTIC, "  \n x  1234 don't I'LL\n\n"]:
        assert loaded.encode(text) == other.encode(text, add_special_tokens=False).ids
    if change is llama_layout:
        assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (2000, 2001, 2009)
        one_line(lambda: loaded.decode([1500]), "1500")  # a hole among the ids


def test_a_token_that_no_merges_lead_to(small, folder, tmp_path):
    """Published vocabularies have some. It is found where it is a whole chunk, if the file says ignore_merges."""
    document = json.loads((folder / "tokenizer.json").read_bytes())
    document["model"]["vocab"]["ĠZqXj"] = 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    loaded = Tokenizer.load(tmp_path)
    Tokenizer(loaded.vocabulary).save(tmp_path / "again")
    for text in (" ZqXj", " ZqXjs", "a ZqXj ZqXj\n"):
        for file in (tmp_path / "tokenizer.json", tmp_path / "again" / "tokenizer.json"):
            assert loaded.encode(text) == reference(file).encode(text, add_special_tokens=False).ids
    assert loaded.encode(" ZqXj") == [1000] != small.encode(" ZqXj")
    document["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    one_line(lambda: Tokenizer.load(tmp_path), "ZqXj")


def test_of_two_special_tokens_the_longer(folder, tmp_path):
    document = json.loads((folder / "tokenizer.json").read_bytes())
    document["added_tokens"].append({**document["added_tokens"][0], "id": 1000, "content": "<|pad|>ding"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    ours, other = Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours.chat_template = "<|pad|>ding <|pad|>din {{ messages[0]['content'] }}"
    ids, _ = ours.render([{"role": "user", "content": "x"}])
    assert ids == other.encode("<|pad|>ding <|pad|>din x", add_special_tokens=False).ids and ids[0] == 1000


def set_at(*path_and_value):
    *path, key, value = path_and_value

    def change(document):
        for step in path:
            document = document[step]
        document[key] = value

    return change


def drop(*path):
    def change(document):
        for step in path[:-1]:
            document = document[step]
        del document[path[-1]]

    return change


def swap_merges(document):
    merges = document["model"]["merges"]
    merges[3], merges[300] = merges[300], merges[3]


def other_split(document):
    """The longest token merged from another pair: the same vocabulary, other ids for some texts."""
    merges = document["model"]["merges"]
    i = next(i for i, m in enumerate(merges) if len(m) > 5)
    left, right = merges[i].split(" ")
    vocab = document["model"]["vocab"]
    whole = left + right
    k = next(k for k in range(1, len(whole)) if k != len(left) and whole[:k] in vocab and whole[k:] in vocab)
    merges[i] = f"{whole[:k]} {whole[k:]}"


DAMAGE = {
    "model type": (set_at("model", "type", "Unigram"), "Unigram"),
    "normalizer": (set_at("normalizer", {"type": "NFC"}), "NFC"),
    "pre-tokenizer": (set_at("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer"),
    "no pre-tokenizer": (set_at("pre_tokenizer", None), "tokenizer.json"),
    "prefix space": (set_at("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True), "pre_tokenizer"),
    "behavior": (set_at("pre_tokenizer", "pretokenizers", 0, "behavior", "Removed"), "pre_tokenizer"),
    "dollar": (set_at("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", r"\s+$|\S+"), "$"),
    "a pattern for letters alone": (set_at("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", r"\w+"), "be lost"),
    "a pattern that may be empty": (set_at("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", "x*"), "be lost"),
    "no regex": (set_at("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", "(((a"), "tokenizer.json"),
    "no model": (drop("model"), "model"),
    "no merges": (drop("model", "merges"), "merges"),
    "no vocab": (drop("model", "vocab"), "vocab"),
    "no added tokens": (drop("added_tokens"), "added_tokens"),
    "a byte is missing": (drop("model", "vocab", "A"), "256 bytes"),
    "a merge without a token": (drop("model", "vocab", "self"), "merges make"),
    "a token without a merge": (lambda d: d["model"]["merges"].pop(), "do not lead to its token"),
    "order of merges": (swap_merges, "order"),
    "another pair": (other_split, "merges"),
    "same id twice": (set_at("model", "vocab", "B", 9 + 67), "share"),
    "negative id": (set_at("model", "vocab", "A", -3), "whole numbers"),
    "id is text": (set_at("model", "vocab", "A", "7"), "whole numbers"),
    "sentencepiece": (set_at("model", "vocab", "▁the", 5000), "▁the"),
    "dropout": (set_at("model", "dropout", 0.1), "dropout"),
    "suffix": (set_at("model", "end_of_word_suffix", "</w>"), "</w>"),
    "blanks swallowed": (set_at("added_tokens", 0, "lstrip", True), "blanks"),
    "two ids": (set_at("added_tokens", 0, "id", 4000), "another id"),
    "no end of text": (lambda d: (d["added_tokens"].pop(1), d["model"]["vocab"].pop("<|end_of_text|>")), "eos_token"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_files_that_cannot_be_represented(folder, tmp_path, name):
    document = json.loads((folder / "tokenizer.json").read_bytes())
    change, word = DAMAGE[name]
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    one_line(lambda: Tokenizer.load(tmp_path), "tokenizer.json", word)


@pytest.mark.parametrize("data", [b"", b'{"model": {"ty', b"no json", b"\xff\xfe\x00\xd8", b"[1, 2]", b"null", b"{}",
                                  b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}', b"[" * 9**5])  # fmt: skip
def test_files_that_are_no_tokenizer(folder, tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    one_line(lambda: Tokenizer.load(tmp_path), "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    if data != b"{}":  # a config may be empty
        (tmp_path / "tokenizer_config.json").write_bytes(data)
        one_line(lambda: Tokenizer.load(tmp_path), "tokenizer_config.json")


def test_any_field_may_be_nonsense(tmp_path):
    """Every field of a small file replaced by every kind of JSON value: it loads, or says why in one line."""
    good = train_bpe(["ab ab abc"], 268).to_json()
    paths = []

    def walk(node, path):
        keys = node.keys() if isinstance(node, dict) else range(min(2, len(node))) if isinstance(node, list) else ()
        for key in list(keys)[:12]:
            paths.append((*path, key))
            walk(node[key], (*path, key))

    walk(json.loads(good), ())
    for path in paths:
        for value in (None, -1, "x", [], ["x"], {"x": 1}):
            document = json.loads(good)
            set_at(*path, value)(document)
            (tmp_path / "tokenizer.json").write_text(json.dumps(document))
            try:
                Tokenizer.load(tmp_path).encode("ab <|end_of_text|>")
            except ValueError as error:
                assert "\n" not in str(error) and "tokenizer.json" in str(error)


def test_config_mistakes(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for config, word in (
        ({"eos_token": "<|nope|>"}, "<|nope|>"),
        ({"chat_template": [{"name": "default", "template": "x"}]}, "chat templates"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        one_line(lambda: Tokenizer.load(tmp_path), "tokenizer_config.json", word)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end_of_thought|>"}}))
    assert Tokenizer.load(tmp_path).eos_id == 6
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
    assert Tokenizer.load(tmp_path).render([{"role": "user", "content": "x"}])[0][0] == 0


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
    other, again = reference(tmp_path / "tokenizer.json"), Tokenizer.load(tmp_path)
    assert again.digest == ours.digest and again.vocab_size == ours.vocab_size == original.n_vocab

    @given(texts)
    @settings(max_examples=40, deadline=None)
    def same(text):
        expected = original.encode_ordinary(text)
        assert ours.encode(text) == again.encode(text) == expected
        assert other.encode(text, add_special_tokens=False).ids == expected

    same()
    for text in ["a \n\n b  \n", "1234567 12", "x   \n   \n", "tail   ", *TEXTS]:
        assert other.encode(text, add_special_tokens=False).ids == original.encode_ordinary(text) == again.encode(text)
    one_line(lambda: ours.render([{"role": "user", "content": "Hi"}]), "chat template")


def test_a_folder_wins_over_a_tiktoken_name(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.save("gpt2")
    assert Tokenizer.load("gpt2").digest == small.digest
    one_line(lambda: Tokenizer.load("gpt-two"), "'gpt-two'", "cl100k_base")
    (tmp_path / "empty").mkdir()
    one_line(lambda: Tokenizer.load("empty"), "empty", "tokenizer.json")


def test_offline(tmp_path, monkeypatch):
    """Nobody listens: a line, at once. Somebody listens and says nothing: a line after the time is up, not a hang."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(tokenizer_json, "FETCH_SECONDS", 0.3)
        one_line(lambda: Tokenizer.load("gpt2"), "cannot fetch the tiktoken encoding 'gpt2'", "timed out", "once")
    monkeypatch.setattr(tokenizer_json, "FETCH_SECONDS", 20)
    one_line(lambda: Tokenizer.load("cl100k_base"), "cannot fetch the tiktoken encoding 'cl100k_base'", "network once")


# ------------------------------------------------------------------------------------------------ conversations

words = texts.filter(lambda text: "<|" not in text)
chats = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(tokenizer.ROLES), words),
    min_size=1,
    max_size=5,
)
# Layouts of others: not trimmed, text after the answer, no special token after it, an answer repeated.
TEMPLATES = {
    "ours": CHAT_TEMPLATE,
    "untrimmed": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n"
    "{{ m.content }}\n<|end_of_text|>\n{% endfor %}",
    "trims the user only": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content | trim }}"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}",
    "plain": "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}",
    "twice": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_equal_transformers(folder, auto, name):
    ours = Tokenizer.load(folder)
    ours.chat_template = TEMPLATES[name]

    @given(chats, st.booleans())
    @quick
    def same(messages, prompt):
        ids, mask = ours.render(messages, add_generation_prompt=prompt)
        options = {"chat_template": TEMPLATES[name], "add_generation_prompt": prompt}
        assert ids == auto.apply_chat_template(messages, **options)["input_ids"]
        assert len(mask) == len(ids) and set(mask) <= {0, 1}

    same()


@given(chats)
@quick
def test_mask_equals_transformers(small, auto, messages):
    """transformers can mark the assistant's part where a template says `generation`; ours finds it without."""
    speech = "{{- message['content'] | trim + eos_token + '\\n\\n' }}"
    assert speech in CHAT_TEMPLATE
    marked = CHAT_TEMPLATE.replace(
        speech,
        "{%- if message['role'] == 'assistant' %}{% generation %}{{- message['content'] | trim + eos_token }}"
        "{% endgeneration %}{{- '\\n\\n' }}{% else %}" + speech + "{% endif %}",
    )
    theirs = auto.apply_chat_template(messages, chat_template=marked, return_assistant_tokens_mask=True)
    ids, mask = small.render(messages)
    assert ids == theirs["input_ids"] and mask == theirs["assistant_masks"]
    answers = [m["content"].strip() + "<|end_of_text|>" for m in messages if m["role"] == "assistant"]
    assert small.decode(i for i, on in zip(ids, mask, strict=True) if on) == "".join(answers)


@pytest.mark.skipif(not DOGE.exists(), reason="the published Doge tokenizer is not here")
def test_chats_of_the_published_doge_tokenizer():
    doge = Tokenizer.load(DOGE)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(DOGE)

    @given(chats, st.booleans())
    @settings(max_examples=30, deadline=None)
    def same(messages, prompt):
        ids, mask = doge.render(messages, add_generation_prompt=prompt)
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        answers = [m["content"].strip() + "<|end_of_text|>" for m in messages if m["role"] == "assistant"]
        assert doge.decode(i for i, on in zip(ids, mask, strict=True) if on) == "".join(answers)
        assert ids.count(doge.bos_id) == 1 and ids[0] == doge.bos_id

    same()


def test_one_bos_one_eos_a_turn(small):
    """Peers doubled the first and never learned the second."""
    messages = [{"role": "user", "content": "Hi <|begin_of_text|>"}, {"role": "assistant", "content": "Hello."}]
    ids, mask = small.render(messages)
    assert ids.count(small.bos_id) == 1 and ids[0] == small.bos_id
    assert ids.count(small.eos_id) == 2
    last_word = max(i for i, on in enumerate(mask) if on)
    assert ids[last_word] == small.eos_id and sum(mask) == len(small.encode("Hello.")) + 1
    prompt, none = small.render(messages[:1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt and not any(none)  # training continues exactly what generation is given
    assert mask[len(prompt)] == 1


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|begin_of_", "text|>", "Hi", " ", "\n", "\x000\x00"]), max_size=8))
@quick
def test_what_users_type_is_text(small, parts):
    content = "".join(parts)
    ids, mask = small.render([{"role": "user", "content": content}, {"role": "system", "content": content}])
    assert not any(mask)
    assert [i for i in ids if i < 9] == [0, 3, 4, 1, 3, 4, 1]
    said = content.strip() + "<|end_of_text|>\n\n"
    header = "<|start_header_id|>{}<|end_header_id|>\n"
    assert small.decode(ids) == "<|begin_of_text|>" + header.format("user") + said + header.format("system") + said


def test_the_assistant_may_reason_but_not_forge_turns(small):
    content = "<|begin_of_thought|>2+2<|end_of_thought|><|begin_of_solution|>4<|end_of_solution|><|end_of_text|>"
    ids, mask = small.render([{"role": "assistant", "content": content}])
    learned = [i for i, on in zip(ids, mask, strict=True) if on]
    assert [i for i in learned if i < 9] == [5, 6, 7, 8, 1]  # the EOS is the template's; the one in the text is text
    assert small.decode(learned) == content + "<|end_of_text|>"


def test_a_token_belongs_to_whoever_wrote_its_first_byte(folder, auto):
    ours = Tokenizer.load(folder)
    ours.chat_template = TEMPLATES["untrimmed"]
    ids, mask = ours.render([{"role": "assistant", "content": "\nx = 1\n"}])
    pieces = [(ours.decode([i]), on) for i, on in zip(ids, mask, strict=True)]
    assert pieces[pieces.index(("<|end_header_id|>", 0)) + 1] == ("\n\n", 0)  # begins in the header
    assert pieces[-3:-1] == [("\n\n", 1), ("<|end_of_text|>", 1)]  # begins in the answer
    ours.chat_template = TEMPLATES["plain"]  # no special token ends the turn: the words alone
    ids, mask = ours.render([{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}])
    assert ours.decode(i for i, on in zip(ids, mask, strict=True) if on) == "x"


def test_messages_as_apis_send_them(small):
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
    plain = small.render([{"role": "user", "content": "Hello you"}])
    assert small.render([{"role": "user", "content": parts}]) == plain
    assert small.render([{"role": "user", "content": "Hello you", "name": "Ann", "tool_calls": None}]) == plain
    ids, mask = small.render([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
    assert [i for i, on in zip(ids, mask, strict=True) if on] == [small.eos_id]
    small.render([{"role": "user", "content": "half a pair \ud83d"}])


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "not empty"),
        ("Hi", "not empty"),
        (None, "not empty"),
        (["Hi"], "message 0"),
        ([{"role": "user"}], "message 0"),
        ([{"content": "Hi"}], "message 0"),
        ([{"role": "user", "content": "Hi"}, {"role": "robot", "content": "Hi"}], "'robot'"),
        ([{"role": ["user"], "content": "Hi"}], "message 0"),
        ([{"role": "user", "content": None}], "None"),
        ([{"role": "user", "content": 5}], "5"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "image_url"),
    ],
)
def test_messages_that_make_no_sense(small, messages, word):
    one_line(lambda: small.render(messages), word)


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ messages[0]['content'] | upper }}", "rewrites"),
        ("{% if messages[0]['content'] == 'Hi' %}secret{% endif %}", "rewrites"),
        ("{{ raise_exception('no system\\nplease') }}", "no system"),
        ("{% for %}", "cannot be used"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_templates_that_cannot_be_used(folder, template, word):
    ours = Tokenizer.load(folder)
    ours.chat_template = template
    one_line(lambda: ours.render([{"role": "user", "content": "Hi"}]), word)


def test_importing_needs_no_torch():
    code = "import sys, nanodoge.tokenizer as t; t.train_bpe(['ab ab'], 266); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
