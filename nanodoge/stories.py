"""A small made-up world that writes short English stories, so that a first model can be trained without any network.

1. *The same bytes everywhere.* Story number i is a pure function of i, on every machine and Python version. So a loss
   printed in the README can be compared with yours, and nothing needs to be downloaded or licensed.
2. *A small model can learn it.* Eldan & Li, "TinyStories" (2023, arXiv 2305.07759), showed that models of a few million
   parameters write fluent English when the training text keeps to a child's vocabulary. They let a large model write
   the stories; here a grammar does. A cast is drawn (who, where, what, which weather), then one of the plots of
   stories.txt is told with it. The wording is drawn too, so the loss has a floor well above zero for any model.
3. *Answers can be checked.* Every `Story` carries its facts, each with a question that has exactly one right answer.
   The conversations, preferences and rewards of the later stages are made from them.

**Train and held out.** One in five names, towns, objects, foods and sums is held out: `split="train"` never draws
these, `split="test"` draws nothing else. A model that answers questions about test stories has learned to read, not to
remember. Pretraining text, its lessons included, draws on all (`split="all"`), so that the words are known.

The words and plots are in stories.txt, which begins with how to read and edit them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from random import Random
from typing import Any

WORLD = Path(__file__).with_name("stories.txt")
HELD_OUT = "girls boys surnames pet_names towns foods items things sums greetings elsewhere".split()
SMALL_WORDS = "a an and at by for in of on the to with".split()  # without a capital in a title
CHAT_SEED, PREFERENCE_SEED = 1 << 32, 2 << 32  # rows about stories that pretraining never reads
OUTSIDE = 0.12  # share of the conversations with a turn of a user who does not know what can be asked
HASTY = 0.6  # share of the worked sums without any working
ARTICLE = re.compile(r"\b([Aa])n? (?=([aeio]|u(?!s[eiu]|ni)|hour|honest)|\w)", re.IGNORECASE)  # 2: "an" is right


@cache
def world() -> dict:
    """The sections of stories.txt by name: a list of strings, a table (a list of rows, which are lists of strings), or
    texts (a dictionary of lists of paragraphs). The facts are a dictionary of the other columns by the first."""
    text, sections = re.sub(r"(?m)^# .*\n", "", WORLD.read_text(encoding="utf-8")), {}
    for name, body in (section.strip().split("\n", 1) for section in text.split("\n## ")[1:]):
        if "### " in body:
            texts = (part.strip().split("\n", 1) for part in body.split("### ")[1:])
            sections[name] = {title: re.sub(r"(?<!\n)\n(?!\n)", " ", text).split("\n\n") for title, text in texts}
        elif ";" in body:
            sections[name] = [[column.strip() for column in row.split(";")] for row in body.split("\n")]
        else:
            sections[name] = " ".join(body.split()).split(", ")
    return sections | {"facts": {kind: templates for kind, *templates in sections["facts"]}}


@cache
def lexicon(split: str) -> dict[str, list]:
    """What a cast is drawn from, by list name. Of a list in HELD_OUT every fifth entry is "test", the rest "train"."""
    assert split in ("train", "test", "all"), split
    lists = {name: entries for name, entries in world().items() if isinstance(entries, list)}
    numbers = lists["numbers"]
    lists["things"] = [[thing, *rest] for *rest, things in lists["things"] for thing in things.split()]
    lists["sums"] = [[numbers[n], numbers[m], numbers[n + m]] for n in range(2, 10) for m in range(2, 10)]
    for name in HELD_OUT if split != "all" else ():
        lists[name] = [word for i, word in enumerate(lists[name]) if (i % 5 == 4) == (split == "test")]
    return lists


def choose(random: Random, options: Sequence) -> Any:
    """One of `options`. (Random.choice may change between Python versions; Random.random is promised not to.)"""
    return options[int(random.random() * len(options))]


def draw_cast(random: Random, split: str) -> dict[str, str]:
    """Who and what one story is about: a value for every slot of the templates."""
    lists, cast = lexicon(split), {}

    def draw(name: str, slots: str, other: str = ""):
        entry = choose(random, lists[name])
        while other and cast[other] in entry:
            entry = choose(random, lists[name])
        cast.update(zip(slots.split(), [entry] if isinstance(entry, str) else entry, strict=False))

    a_is_girl = random.random() < 0.5
    for name, *pronouns in lists["children"]:
        is_a = (name == "girls") == a_is_girl
        draw(name, "A" if is_a else "B")
        cast.update(zip([slot + "2" * (not is_a) for slot in "he him his hers child".split()], pronouns, strict=True))
    for row in lists["cast"]:
        draw(*row)
    for slot in ("material", "material2"):
        cast[slot] = choose(random, cast[slot].split(", "))
    cast["give"], cast["keep"] = choose(random, [row[:2] for row in lists["sums"] if row[2] == cast["sum"]])
    return cast


@cache
def parse(template: str) -> list:
    """A template as nested lists: a list of alternatives, each a list of parts, each a string or again such a list."""
    stack = [[[]]]
    for token in re.findall(r"[][|]|\{[^}]*\}|[^][|{}]+", template):
        if token == "[":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        else:
            part = stack.pop() if token == "]" else token
            stack[-1][-1].append(part)
    assert len(stack) == 1, f"brackets do not match in {template!r}"
    return stack[0]


def tidy(text: str) -> str:
    """`text` with single spaces, none before a comma, and the right one of "a" and "an"."""
    text = " ".join(text.split()).replace(" ,", ",")
    return ARTICLE.sub(lambda match: match[1] + ("n " if match[2] else " "), text)


@dataclass(frozen=True)
class Fact:
    """One thing that a story says. `answer` stands in the text word for word. `reply` says it, with * in its place."""

    kind: str
    subject: str
    answer: str
    question: str
    reply: str

    def say(self, answer: str = "") -> str:
        """The reply with the right answer, or with another one."""
        return tidy(self.reply.replace("*", answer or self.answer))


class Story:
    """The story of a seed, always the same, with the names and things of `split`, or its first `paragraphs`. text: a
    title and paragraphs, with blank lines between; body: without the title; facts: what they tell."""

    def __init__(self, seed: int, split: str = "train", paragraphs: int | None = None):
        self.random, self.told = Random(seed), []
        self.slots = {name: rule for name, [rule] in world()["rules"].items()} | draw_cast(self.random, split)
        title, plot = choose(self.random, list(world()["plots"].items()))
        title = " ".join(w if w in SMALL_WORDS else w[0].upper() + w[1:] for w in self.fill(title).split())
        self.body = "\n\n".join(map(self.fill, plot[:paragraphs]))
        self.text = f"{title}\n\n{self.body}"

    @cached_property
    def facts(self) -> list[Fact]:
        return [Fact(kind, *map(self.fill, world()["facts"][kind])) for kind in dict.fromkeys(self.told)]

    def fill(self, template: str) -> str:
        """One random expansion of a template with this story's cast. The facts it tells are added to `told`."""
        return tidy(self.expand(parse(template)))

    def expand(self, part: str | list) -> str:
        """The text of a part of a parsed template: of alternatives one, drawn at random."""
        if isinstance(part, list):
            parts = choose(self.random, part) if len(part) > 1 else part[0]
            return "".join(map(self.expand, parts))
        if part[0] != "{":
            return part
        name = part[1:-1]
        if name[0] == "+":
            self.told.append(name[1:])
            return ""
        if name in self.slots:
            return self.expand(parse(self.slots[name]))
        text = self.expand("{" + name[0].lower() + name[1:] + "}")  # {Thing} is {thing} with a capital
        return text[0].upper() + text[1:]


def documents(count: int, start: int = 0) -> Iterator[str]:
    """What the tiny model is pretrained on: documents start ... start + count - 1, a story after every two lessons.
    Most facts are told once in a story, so only the questions of the lessons make it worth learning to look them up."""
    for i in range(start, start + count):
        yield Story(i, "all").text if i % 3 == 2 else lesson(i)


def lesson(number: int) -> str:
    """The beginning of story `number` and up to six questions about it, each with its answer, as in a school reader."""
    beginning, random = Story(number, "all", paragraphs=1), Random(f"lesson {number}")
    facts = sorted(beginning.facts, key=lambda _: random.random())[:6]
    return "\n\n".join([beginning.body, *(f"{fact.question}\n{fact.say()}" for fact in facts)])


def conversation(number: int, split: str) -> dict:
    """Row `number` for SFT: one to three questions about the beginning of a story, each with its answer. A share
    OUTSIDE of the rows has another turn before them, after them, or instead."""
    random, passage = Random(f"conversation {number}"), Story(CHAT_SEED + number, split, paragraphs=1)
    facts, messages = list(passage.facts), []
    for _ in range(min(len(facts), 1 + int(random.random() * 3))):
        fact = facts.pop(int(random.random() * len(facts)))
        asked = fact.question if messages else f"{passage.body}\n\n{fact.question}"
        messages += [dict(role="user", content=asked), dict(role="assistant", content=fact.say())]
    if random.random() < OUTSIDE:
        kind = choose(random, ["greetings", "elsewhere", "child", "line"])
        told = choose(random, [messages, []]) if kind in ("greetings", "elsewhere") else []
        turn = outside(random, passage, split, kind)
        messages = choose(random, [turn + told, told + turn])
    return dict(messages=messages)


def outside(random: Random, passage: Story, split: str, kind: str) -> list[dict]:
    """A turn without the passage. kind "line": some of its facts and a question, on one line. Otherwise what the model
    cannot answer, a greeting or a question about the world outside ("elsewhere") or a story that was not told
    ("child"), and a reply that says so. One user in four writes small letters and no mark at the end."""
    fact, [reply] = choose(random, passage.facts), world()["replies"]["greeting" if kind == "greetings" else "unknown"]
    if kind == "line":
        told = [fact, *(choose(random, passage.facts) for _ in range(2))]
        told = [other.say() for other in sorted(dict.fromkeys(told), key=lambda _: random.random())]
        asked, reply = " ".join([*told, fact.question]), fact.say()
    else:
        asked = fact.question if kind == "child" else passage.fill(choose(random, lexicon(split)[kind]))
        asked = asked.lower().rstrip(".?!") if random.random() < 0.25 else asked
    return [dict(role="user", content=asked), dict(role="assistant", content=reply)]


def preference(number: int, split: str) -> dict:
    """A question about the beginning of a story with two answers. The right one, politely put, is better than a wrong
    one (that of another story), and than right ones that are rude or ramble."""
    random, passage = Random(f"preference {number}"), Story(PREFERENCE_SEED + number, split, paragraphs=1)
    fact = choose(random, passage.facts)
    wrong = fact.answer
    while wrong == fact.answer:
        wrong = Story(int(random.random() * 2**31), split, paragraphs=1).fill(world()["facts"][fact.kind][1])
    wordings = {kind: text.split("|") for kind, [text] in world()["replies"].items()}
    chosen = choose(random, wordings["polite"]).replace("*", fact.say())
    flaw = random.random()
    kind = "polite" if flaw < 0.5 else "rude" if flaw < 0.75 else "rambling"
    rejected = choose(random, wordings[kind]).replace("*", fact.say(wrong if flaw < 0.5 else fact.answer))
    return dict(prompt=f"{passage.body}\n\n{fact.question}", chosen=chosen, rejected=rejected)


def worked_sum(number: int, split: str) -> dict:
    """A problem of adding, taking away or counting; how a child would work it out, step by step; and the number.

    The working repeats the two numbers in the problem's words, then counts: "has 17, gives her 8", "18 1, 19 2, ...".
    What a step needs stands just before it, so a model that can count solves pairs (n, m) that it never saw: one in
    five is held out, those with 2 n + m = 4 modulo 5. In a share HASTY of the rows "Easy." replaces the working, so a
    model trained on them mostly guesses, and that counting pays is left for a reward to show (grpo.py).
    """
    random, lists = Random(f"sum {number}"), lexicon(split)
    pairs = [(n, m) for n in range(1, 21) for m in range(1, 10) if ((2 * n + m) % 5 == 4) == (split == "test")]
    n, m = choose(random, [pair for pair in pairs if min(pair) > 1])
    a, b, items = (choose(random, lists[name]) for name in ("girls", "boys", "items"))
    kind, row = choose(random, ("add", "take away", "count")), ()
    if kind == "count":
        row = choose(random, [(i, j) for i, j in pairs if i != j and i < 10])
        row += tuple(sorted({*range(1, 10)} - {*row}, key=lambda _: random.random()))[: m - 2]
        answer, steps = m, ", ".join(f"{number} {i}" for i, number in enumerate(row, 1))
    else:
        n, sign, gives = (n, 1, "gives her") if kind == "add" else (n + m, -1, "gives")
        answer = n + sign * m
        steps = f"has {n}, {gives} {m}\n" + ", ".join(f"{n + sign * i} {i}" for i in range(1, m + 1))
    problem = world()["problems"][kind][0].format(a=a, b=b, n=n, m=m, items=items, numbers=", ".join(map(str, row)))
    thought = "Easy." if random.random() < HASTY else steps
    reply = f"<|begin_of_thought|>\n{thought}\n<|end_of_thought|>\n\n"
    reply += f"<|begin_of_solution|>\n{answer}\n<|end_of_solution|>"
    messages = [dict(role="user", content=problem), dict(role="assistant", content=reply)]
    return dict(messages=messages, answer=str(answer))
