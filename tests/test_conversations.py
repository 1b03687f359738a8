"""conversations.py and the data it makes: every schema ends in the same conversation, the mask is what the assistant
says and nothing else, and a row that cannot be used is counted or named."""

import json
import re

import numpy as np
import pytest
from helpers import make_set, rows_of

import prepare_data
from nanodoge import stories
from nanodoge.conversations import RowError, document, final_answer
from nanodoge.data import read_meta
from nanodoge.examples import TokenSet, bucket_by_length, pad
from nanodoge.tokenizer import Tokenizer


def read(row, kind="chat", system=""):
    """What a row means, or the reason why it is left out."""
    system = "" if kind == "labels" else system
    labels = ["a", "b"] * (kind == "labels")
    options = prepare_data.PrepareOptions(tokenizer="x", kind=kind, system=system, labels=labels)
    try:
        return json.loads(document(row, options))
    except RowError as error:
        return error.reason


NO_ANSWER = "without an answer"
ASKED = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four"}]
PROMPT, FIVE = ASKED[:1], {"role": "assistant", "content": " Five\n"}
SHARE_GPT = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four"}]
ROWS = {
    "chat": [
        {"messages": ASKED},
        {"messages": [*ASKED, {"role": "user", "content": "Thanks"}]},  # nothing to learn after the last answer
        {"conversations": SHARE_GPT},
        {"conversations": [{"from": "user", "value": "Two and two?"}, {"from": "assistant", "value": "Four"}]},
        {"instruction": "Two and two?", "input": "", "output": "Four"},
        {"instruction": "Two and two?", "output": "Four", "text": "Below is an instruction"},
        {"question": "Two and two?", "answer": "Four"},
        {"problem": "Two and two?", "solution": "Four", "answer": "4"},
        {"messages": json.dumps(ASKED)},
        {"messages": [{"role": "User", "content": "Two and two?"}, {"role": "Assistant", "content": "Four"}]},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in ASKED]},
        {"prompt": "Two and two?", "completion": "Four"},
        {"prompt": PROMPT, "completion": ASKED[1:]},
        {"prompt": "\ufeffTwo and two?", "response": "Four"},
        {"instruction": "Two and two?", "context": "", "response": "Four", "category": "sums"},
        {"input": "Two and two?", "output": "Four"},
        {"conversations": "\n\nHuman: Two and two?\n\nAssistant: Four"},
    ],
    "preferences": [
        {"prompt": "Two and two?", "chosen": "Four", "rejected": "Five"},
        {"prompt": "Two and two?", "chosen": ASKED, "rejected": [*PROMPT, FIVE], "score_chosen": 9.0},
        {"prompt": PROMPT, "chosen": ASKED[1:], "rejected": [FIVE]},
        {"prompt": "Two and two?", "chosen": ASKED[1], "rejected": FIVE},
        {"chosen": ASKED, "rejected": [*PROMPT, FIVE]},
        {"chosen": "\n\nHuman: Two and two?\n\nAssistant: Four", "rejected": "Human: Two and two?\n\nAssistant: Five"},
        {"question": "Two and two?", "chosen": "Four", "rejected": "Five"},
        {"instruction": "Two and two?", "input": "", "chosen": "Four", "rejected": "Five"},
        {"conversations": SHARE_GPT[:1], "chosen": SHARE_GPT[1], "rejected": {"from": "gpt", "value": "Five"}},
    ],
    "problems": [
        {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        {"problem": "Two and two?", "answer": "4", "solution": "It is \\boxed{4}.", "messages": ASKED},
        {"messages": ASKED, "answer": "4"},
        {"question": "Two and two?", "answer": 4},
        {"prompt": "Two and two?", "answer": "4"},
        {"problem": "Two and two?", "solution": "It is \\boxed{4}."},
    ],
}
MEANING = {
    "chat": {"messages": ASKED},
    "preferences": {"messages": PROMPT, "chosen": "Four", "rejected": "Five"},
    "problems": {"messages": PROMPT, "answer": "4"},
}


@pytest.mark.parametrize("kind, row", [(kind, row) for kind, rows in ROWS.items() for row in rows])
def test_every_schema_means_the_same(kind, row):
    assert read(row, kind) == MEANING[kind]


def test_input_of_an_instruction_and_system_messages():
    row = {"instruction": "Translate.", "input": "chat", "output": "cat"}
    assert read(row)["messages"][0]["content"] == "Translate.\n\nchat"
    identity, own = {"role": "system", "content": "I am Doge."}, {"role": "system", "content": "Be brief."}
    assert read(row, system="I am Doge.")["messages"][0] == identity
    assert read({"messages": [own, *ASKED]}, system="I am Doge.")["messages"][0] == own
    assert read({"messages": ASKED, "system": "Be brief."}, system="I am Doge.")["messages"][0] == own  # OpenThoughts
    assert read({"messages": [own | {"role": "developer"}, *ASKED]})["messages"][0] == own
    assert read({"messages": [own | {"content": None}, *ASKED]})["messages"][0] == own | {"content": ""}


def test_no_known_field_is_lost():
    """Earlier turns, thoughts, tools; numbers as JSON spells them."""
    row = {"instruction": "And three?", "input": "", "output": 7, "history": [["Two and two?", "Four"]]}
    more = [{"role": "user", "content": "And three?"}, {"role": "assistant", "content": "7"}]
    assert read(row)["messages"] == ASKED + more
    thought = "<|begin_of_thought|>\n2 + 2\n<|end_of_thought|>\n\n<|begin_of_solution|>\nFour\n<|end_of_solution|>"
    row = {"messages": [*PROMPT, ASKED[1] | {"reasoning_content": "2 + 2"}]}
    assert read(row)["messages"][1]["content"] == thought and final_answer(thought) == "Four"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    row = {"messages": [*PROMPT, asks, {"role": "tool", "content": "4"}, ASKED[1]], "tools": [{"name": "add"}]}
    made = read(row)
    assert made["tools"] == row["tools"] and made["messages"][1] == asks | {"content": ""}
    assert made["messages"][2] == {"role": "tool", "content": "4"}
    numbers = {0.5: "0.5", 42: "42", True: "true", float("nan"): NO_ANSWER}
    for number, text in numbers.items():
        made = read({"question": "How much?", "answer": number}, "problems")
        assert (made if made == NO_ANSWER else made["answer"]) == text


def test_final_answer():
    begin, end = "<|begin_of_solution|>", "<|end_of_solution|>"
    assert final_answer("Four") == "Four" and final_answer("so\n#### 1,000 ") == "1,000" and final_answer("") == ""
    assert final_answer(f"{begin}\n7\n{end}") == "7" and final_answer(f"{begin}7") == ""
    assert final_answer(f"<|begin_of_thought|>#### 3<|end_of_thought|>{begin}7{end}") == "7"
    assert final_answer(f"{begin}1{end} no: {begin}2{end}") == "2" == final_answer(f"{begin}2{end} no: {begin}3")
    assert final_answer(r"so \boxed{1}, no, \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert final_answer(begin * 100_000) == ""  # at once


@pytest.mark.parametrize(
    "kind, row, reason",
    [
        ("chat", {"messages": []}, "empty"),
        ("chat", {"messages": None}, "empty"),
        ("chat", {"messages": "Once upon"}, NO_ANSWER),
        ("chat", {"messages": PROMPT}, NO_ANSWER),
        ("chat", {"messages": [*PROMPT, {"role": "assistant", "content": " \n"}]}, NO_ANSWER),
        ("chat", {"instruction": "", "input": "", "output": ""}, "empty"),
        ("chat", {"question": "Two?", "answer": None}, NO_ANSWER),
        ("chat", {"text": "Once"}, "no --kind=chat in the columns"),
        ("chat", ["Once"], "not a row of columns"),
        ("chat", {"messages": [{"role": "narrator", "content": "x"}]}, "with an unknown speaker"),
        ("chat", {"messages": [{"role": "user", "content": {"a": 1}}]}, "with dict in place of a text"),
        ("chat", {"messages": ["Hi"]}, "with a message that is none"),
        ("chat", {"messages": '[{"role": "user"'}, "not JSON"),
        ("chat", {"instruction": "x", "output": "y", "history": [["z"]]}, "with a history that is not pairs"),
        ("chat", {"messages": ASKED, "tools": "{"}, "not JSON"),
        ("preferences", {"prompt": "Two?", "chosen": "a", "rejected": "a "}, "with two equal answers"),
        ("preferences", {"prompt": "Two?", "chosen": "a", "rejected": ""}, NO_ANSWER),
        ("preferences", {"prompt": "Two?", "chosen": PROMPT, "rejected": PROMPT}, NO_ANSWER),
        ("preferences", {"messages": ASKED}, "no --kind=preferences"),
        ("preferences", {"prompt": "Two?", "chosen": ASKED, "rejected": "x"}, "with two answers that do not answer"),
        ("preferences", {"chosen": "x", "rejected": "y"}, NO_ANSWER),
        ("problems", {"problem": "Two?", "answer": None}, NO_ANSWER),
        ("problems", {"problem": "", "answer": "2"}, NO_ANSWER),
        ("problems", {"problem": "Two?", "answer": ["x"]}, "with list in place of a text"),
        ("problems", {"text": "x", "answer": "2"}, "no --kind=problems"),
        ("labels", {"text": "x", "label": "c"}, "with another label"),
    ],
)
def test_rows_that_cannot_be_used_have_a_reason(kind, row, reason):
    assert read(row, kind).startswith(reason)


# ---- What is written is what was said


def learned_parts(tokenizer, ids, mask):
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [tokenizer.decode(part) for part in np.split(ids, edges)[1::2]]


def test_conversations_come_out_as_they_went_in(tmp_path, base):
    """The assistant's tags of thoughts are tokens, but not its end of a turn; what a user types is letters."""
    tags = ["<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>"]
    rows, thought = list(rows_of("chat", 150)), "{}\n\nTwo,\nthree.\n{}\n\n{}\n3<|end_of_text|>{}".format(*tags)
    for row in rows[::5]:
        row["messages"][-2]["content"] += " <|end_of_text|>" + tags[0]
        row["messages"][-1]["content"] = thought
    folder = make_set(tmp_path / "set", base, rows=[*rows, {"messages": []}, {"messages": PROMPT}])
    tokenizer, meta = Tokenizer.load(folder), read_meta(folder, "chat")
    assert meta["left_out"] == {"empty": 1, "without an answer": 1}
    wanted = {}
    for row in rows:
        said = [(m["role"], m["content"].strip() + "<|end_of_text|>") for m in row["messages"]]
        text = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n{text}\n\n" for role, text in said)
        wanted["<|begin_of_text|>" + text] = said
    assert len(wanted) == len(rows)
    tag_ids = [tokenizer.special_tokens[tag] for tag in tags]
    for split in ("train", "val"):
        part = TokenSet(folder, split, "chat")
        assert len(part) == meta[split]["documents"] > 10 and part.mask.sum() == meta[split]["targets"]
        for i in range(len(part)):
            ids, mask = part.conversation(i)
            said = wanted.pop(tokenizer.decode(ids))
            assert learned_parts(tokenizer, ids, mask) == [text for role, text in said if role == "assistant"]
            assert (ids == tokenizer.bos_id).sum() == 1 and (ids == tokenizer.eos_id).sum() == len(said)
            assert [i for i in ids if i in tag_ids] == tag_ids * (said[-1][1] == thought + "<|end_of_text|>")
    assert not wanted


def test_preferences_share_their_prompt_and_learn_the_last_answer(tmp_path, base):
    earlier = [*ASKED, {"role": "user", "content": "And three?"}]
    rows, pairs = list(rows_of("preferences", 60)), [(f"Seven {i}", f"Four {i}") for i in range(3)]
    for pair in pairs:
        chosen, rejected = ([*earlier, dict(role="assistant", content=text)] for text in pair)
        rows.append(dict(prompt="x", chosen=chosen, rejected=rejected))
    pairs += [(row["chosen"], row["rejected"]) for row in rows[:60]]
    folder = make_set(tmp_path / "set", base, "preferences", rows=rows)
    tokenizer, seen = Tokenizer.load(folder), {}
    for split in ("train", "val"):
        part = TokenSet(folder, split, "preferences")
        assert len(part) % 2 == 0
        for i in range(0, len(part), 2):
            (ids, mask), (other, other_mask) = part.conversation(i), part.conversation(i + 1)
            n, m = mask.argmax(), other_mask.argmax()
            assert n == m and (ids[:n] == other[:n]).all()
            [chosen], [rejected] = learned_parts(tokenizer, ids, mask), learned_parts(tokenizer, other, other_mask)
            seen[chosen.removesuffix("<|end_of_text|>")] = rejected.removesuffix("<|end_of_text|>"), split
    assert {chosen: rejected for chosen, (rejected, _) in seen.items()} == dict(pairs)
    assert len({seen[f"Seven {i}"][1] for i in range(3)}) == 1  # one prompt, one side


def test_problems_end_where_the_assistant_begins(tmp_path, base):
    folder = make_set(tmp_path / "set", base, "problems")
    tokenizer, asked = Tokenizer.load(folder), {}
    for split in ("train", "val"):
        part = TokenSet(folder, split, "problems")
        assert len(part.answers) == len(part) > 10 and not part.mask.any()
        for i, answer in enumerate(part.answers):
            asked[tokenizer.decode(part.conversation(i)[0])] = answer
    assert asked == {
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n{row['question']}<|end_of_text|>\n\n"
        "<|start_header_id|>assistant<|end_header_id|>\n": row["answer"].split("#### ")[1]
        for row in rows_of("problems", 120)
    }


def test_rows_that_all_begin_alike_are_divided(tmp_path, base):
    """The hash of the user's first words would put all of them on one side."""
    rows = [dict(instruction=f"And {i}?", output="yes", history=[["Hi", "Hello"]]) for i in range(9)]
    meta = read_meta(make_set(tmp_path / "set", base, rows=rows), "chat")
    assert meta["train"]["documents"] + meta["val"]["documents"] == 9 and "begin alike" in meta["note"]


def test_a_damaged_or_other_folder_is_refused(tmp_path, base):
    folder = make_set(tmp_path / "set", base)
    with pytest.raises(ValueError, match="holds --kind=chat, and this stage reads --kind=preferences"):
        TokenSet(folder, "train", "preferences")
    with pytest.raises(ValueError, match="holds --kind=chat, and this stage reads --kind=text"):
        read_meta(folder)
    for name, dtype, place, value, message in (
        ("ids", "<u2", 5, 65535, "ids.bin has the id 65535, and meta.json says vocab_size"),
        ("mask", "u1", 9, 7, "mask.bin marks what cannot be learned"),
        ("mask", "u1", 0, 1, "mask.bin marks what cannot be learned"),
        ("offsets", "<i8", 1, -1, "offsets.bin does not fit train.ids.bin"),
    ):
        path = folder / f"train.{name}.bin"
        good = np.fromfile(path, dtype)
        bad = good.copy()
        bad[place] = value
        bad.tofile(path)
        with pytest.raises(ValueError, match=message):
            TokenSet(folder, "train", "chat")
        good.tofile(path)
    (folder / "train.mask.bin").write_bytes((folder / "train.mask.bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match="train.mask.bin has not the .* bytes"):
        TokenSet(folder, "train", "chat")


# ---- Built-in rows


@pytest.mark.parametrize("split", ["train", "test"])
def test_built_in_rows_have_the_words_of_their_side(split):
    own, other = (stories.lexicon(name) for name in (split, "test" if split == "train" else "train"))
    keys = ("girls", "boys", "towns", "surnames", "pet_names")
    words = {w for key in keys for w in other[key]} - {w for key in keys for w in own[key]}
    for i in range(400):
        chat, pair = stories.conversation(i, split), stories.preference(i, split)
        problem = stories.worked_sum(i, split)
        text = " ".join(m["content"] for m in chat["messages"] + problem["messages"]) + pair["prompt"] + pair["chosen"]
        assert not words & set(text.replace("'", " ").replace(",", " ").replace(".", " ").split())
        n, m, *_ = map(int, re.findall("[0-9]+", problem["messages"][0]["content"]))
        n -= m * ("gives" in problem["messages"][0]["content"] and "more" not in problem["messages"][0]["content"])
        assert ((2 * n + m) % 5 == 4) == (split == "test")


UNKNOWN = {stories.world()["replies"][kind][0] for kind in ("greeting", "unknown")}


def test_what_no_story_answers_is_asked_too_with_held_out_words():
    """Greetings, the world outside, a child of whom nothing was told: alone, before and after a story."""
    for split, other in (("train", "test"), ("test", "train")):
        chats = [stories.conversation(i, split)["messages"] for i in range(1500)]
        places = [[m["content"] in UNKNOWN for m in chat[1::2]] for chat in chats]
        assert 0.06 < sum(map(any, places)) / len(places) < 0.12  # OUTSIDE, less what is told on one line
        assert all(any(len(row) > 1 and row[end] for row in places) for end in (0, -1)) and [True] in places
        asked = [c[2 * row.index(True)]["content"] for c, row in zip(chats, places, strict=True) if any(row)]
        unseen = {text.lower().rstrip(".?!") for text in stories.lexicon(other)["greetings"]}
        assert not unseen & {text.lower().rstrip(".?!") for text in asked}


def test_built_in_answers_are_right():
    for i in range(400):
        chat = stories.conversation(i, "train")["messages"]
        assert [m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2) and 2 <= len(chat) <= 8
        facts, told = stories.Story(stories.CHAT_SEED + i, "train", paragraphs=1).facts, ""
        for asked, answer in zip(chat[::2], chat[1::2], strict=True):
            told += asked["content"]  # who says that he does not know has not been told
            known = {fact.say() for fact in facts if fact.answer in told and fact.question in asked["content"]}
            assert answer["content"] in (known or UNKNOWN), (told, answer)
        pair = stories.preference(i, "test")
        assert pair["chosen"] != pair["rejected"] and len(read(pair, "preferences")) == 3
        problem = stories.worked_sum(i, "test")
        asked, answer = (m["content"] for m in problem["messages"])
        assert final_answer(answer) == problem["answer"]
        numbers = [int(n) for n in re.findall("[0-9]+", asked)]
        more = sum(numbers) if "more" in asked else numbers[0] - numbers[1]
        assert int(problem["answer"]) == (len(set(numbers)) if "writes" in asked else more)


# ---- Batches


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_buckets_lose_nothing_and_keep_to_the_limit(parts):
    lengths = [3, 50, 7, 7, 100, 20, 20, 1, 64, 9, 33]
    groups = bucket_by_length(lengths, 128, parts)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths))) and all(groups)
    assert len(groups) % parts == 0
    assert all(len(group) * max(lengths[i] for i in group) <= 128 or len(group) == 1 for group in groups)


def test_pad_shifts_by_one_and_targets_what_is_marked():
    rows = [(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1], bool)), (np.array([5, 9]), np.array([0, 1], bool))]
    tokens, targets = pad(rows, pad_id=2)
    assert tokens.tolist() == [[5, 6, 7], [5, 2, 2]]
    assert targets.tolist() == [[-100, 7, 8], [9, -100, -100]]
    ends = [(np.array([5, 6, 2]), np.array([0, 0, 1], bool)), (np.array([5, 2]), np.array([0, 1], bool))]
    assert pad(ends, pad_id=2)[1].tolist() == [[-100, 2], [2, -100]]  # where padding and EOS are one token, EOS counts
