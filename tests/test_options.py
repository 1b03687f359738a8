"""options.py: where values come from, and mistakes that end in one line naming what would be right."""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
from helpers import refused

from nanodoge.options import (
    HERE,
    Count,
    Positive,
    Range,
    check_ranges,
    defaults,
    field_comments,
    help_text,
    parse_options,
    read_config,
    run_command,
)


@dataclass
class Options:
    steps: int = 10  # how many
    rate: float = 0.5  # how fast
    name: str = "run"  # what to call it
    loud: bool = False  # say so
    shape: Literal["round", "square"] = "round"  # which
    parts: list[str] = field(default_factory=lambda: ["a"])  # of what


@dataclass
class Switches:
    compile: Literal["auto", "on", "off"] = "auto"
    peer: bool = False


@dataclass
class Ranges:
    count: Count = 1  # of steps
    # ---- Numbers of other kinds
    rate: Positive = 1.0  # above 0
    share: Annotated[float, Range(0, 1)] = 0.5  # both ends included
    first: ClassVar = "rate"

    def __post_init__(self):
        check_ranges(self)


def parse(*argv, **keywords):
    return parse_options(Options, list(argv), **keywords)


def test_values_come_from_defaults_files_and_the_command_line_in_this_order(tmp_path):
    config = tmp_path / "c.py"
    config.write_text('"""why"""\nsteps = 1_000  # a comment\nrate = 2\nname = "file"\nparts = ["x", "y"]\n')
    options = parse(str(config), "--name=line", "--loud", "--shape=square")
    assert options == Options(1000, 2.0, "line", True, "square", ["x", "y"])
    assert isinstance(options.rate, float)
    assert parse("--parts=b,c", "--rate=1e-3", "--loud=false") == Options(rate=1e-3, parts=["b", "c"])
    assert parse("--name=a=b").name == "a=b"
    assert parse_options(Ranges, ["--count", "3", "--share=1"]) == Ranges(3, 1.0, 1.0)  # both ends are in a range
    assert parse("one", "two", f"--config={config}", positional="parts").parts == ["one", "two"]


# A row: the class, what is typed | a part of the error.
MISTAKES = """
Options --stesp=3    | did you mean 'steps'
Options --zzzzz=3    | --help lists the options
Options --steps      | --steps=...
Options --steps=many | 'many' is not a whole number
Options --steps=1.5  | '1.5' is not a whole number
Options --steps=     | is not a whole number
Options --rate=x     | 'x' is not a number
Options --loud=maybe | not true or false
Options --shape=oval | not one of round, square
Options absent.py    | no config file 'absent.py'
Ranges --count=0         | --count=0 must be a number from 1 up
Ranges --rate=0          | --rate=0.0 must be a number above 0
Ranges --rate inf        | --rate=inf must be a number above 0
Ranges --share=nan       | --share=nan must be from 0 to 1
Ranges --count --rate=2  | --count needs a value
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_a_wrong_option_is_named_with_what_would_be_right(mistake):
    argv, words = mistake.split(" | ")
    name, *argv = argv.split()
    refused(lambda: parse_options(globals()[name], argv), words)


@pytest.mark.parametrize("words", [("on", "off"), ("true", "false"), ("1", "0"), ("True", "False")])
def test_on_and_off_have_the_same_words_in_every_option(words):
    for word, is_on in zip(words, (True, False), strict=True):
        options = parse_options(Switches, [f"--compile={word}", f"--peer={word}"])
        assert options == Switches("on" if is_on else "off", is_on)
    assert parse_options(Switches, ["--compile=auto", "--peer"]) == Switches("auto", True)
    with pytest.raises(ValueError, match="'maybe' is not one of auto, on, off"):
        parse_options(Switches, ["--compile=maybe"])


BAD_FILES = {
    "steps = ": "not a file of assignments",
    "import os": "only plain assignments",
    "steps += 1": "only plain",
    "steps = len('abc')": "must be a literal",
    "steps = '3x'": "'3x' is not a whole number",
    "step = 3": "'steps'",
    "\nsteps = True": ":2: 'True' is not",
    "\0": "not a file of assignments",
    "(" * 999: "not a file",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_config_file_is_read_and_never_run(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    refused(lambda: parse(str(tmp_path / "c.py")), BAD_FILES[text])


def test_help_lists_every_option_with_default_and_comment_the_first_ones_at_the_top():
    text = help_text(Options)
    for line in ("--steps=10", "how many", "--shape=round", "which [round, square]", "--parts=a"):
        assert line in text
    text = help_text(Ranges)
    parts = "people need first:\n  --rate", "--count", "Numbers of other kinds:\n  --share"
    assert sorted(parts, key=text.index) == list(parts)


@pytest.mark.parametrize("stage", ["train", "sft", "dpo", "grpo", "sample", "prepare_data"])
def test_help_of_a_stage_explains_every_option_and_shows_what_a_bare_command_uses(stage, capsys):
    module = __import__(stage)
    options = getattr(module, f"{stage.removesuffix('_data').capitalize()}Options")
    assert {f.name for f in dataclasses.fields(options)} <= field_comments(options).keys()
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    if stage in ("sample", "prepare_data"):
        return
    first = text.split("\n\n")[1]
    assert first.startswith("The options people need first:") and first.count("\n  --") == 10
    used, bare = defaults(options), parse_options(options, [], default_config=HERE / "config" / options.recipe)
    filled_in = {"out_dir", "vocab_size", "sequence_length", "beta"}  # 0 or empty in --help, which says what it means
    assert {name for name, value in used.items() if getattr(bare, name) != value} <= filled_in
    assert f"  --max_steps={used['max_steps']} " in text and "['" not in text and "[, " not in text


# ---- How a command ends


def failing(error):
    def main(argv):
        raise error

    return main


def test_a_mistake_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    for mistake, words in (
        (lambda argv: read_config("absent.py"), "there is no config file 'absent.py'"),
        (lambda argv: open("/absent/file"), "/absent/file: No such file or directory"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_command(mistake)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith(f"error: {words}") and said.count("\n") == 1
    with pytest.raises(json.JSONDecodeError):
        run_command(lambda argv: json.loads("{"))
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(failing(RuntimeError("a bug")))


LOST = {
    "pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typ ...": "another process of this run has ended",
    "unbound_buffer.cc:78] Timed out waiting 30000ms for recv ...": "has not answered for --patience seconds",
}


@pytest.mark.parametrize("message", LOST)
def test_a_lost_process_is_one_line(capsys, monkeypatch, message):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        run_command(failing(RuntimeError(f"[gloo/transport/tcp/{message}")))
    assert stop.value.code == 1 and LOST[message] in capsys.readouterr().err
