"""tests/fuzz.py with a few of its cases: they find nothing, and they would find something."""

import os
import sys

import pytest

import train
from nanodoge.layouts import locate
from nanodoge.options import convert

if sys.platform != "linux":
    pytest.skip("fuzz.py needs Linux's signals and limits", allow_module_level=True)

import fuzz

COUNTS = dict(command_line=40, config_file=20, tokenizer=25, rows=6, text_data=8, tuning_data=8, checkpoint=16,
              convert=2, resume=3)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, before = tmp_path_factory.mktemp("fuzz").resolve(), os.getcwd()
    with fuzz.shortened():
        fuzz.build(root)
    yield root
    os.chdir(before)


def test_broken_files_and_command_lines_are_refused_in_a_line(root):
    results = {(part, n): fuzz.run_case(root, part, n, 0) for part, count in COUNTS.items() for n in range(count)}
    assert {place: said for place, said in results.items() if said[0] not in ("worked", "refused")} == {}
    found = [result for result, _ in results.values()]
    assert found.count("worked") > 20 and found.count("refused") > 40


def test_the_checks_see_what_they_are_for(root):
    def refuse(argv):
        convert("x", int, "--n")

    def chatter(argv):
        print("\nwhat is this?\nerror: something", file=sys.stderr)
        refuse(argv)

    assert fuzz.attempt(refuse, [], "") == ("refused", "error: --n: 'x' is not a whole number\n")
    assert fuzz.attempt(lambda argv: None, [], "")[0] == "worked"
    assert fuzz.attempt(chatter, [], "")[0].startswith("not one line")
    assert fuzz.attempt(lambda argv: {}["x"], [], "")[0].startswith("KeyError")
    assert fuzz.attempt(lambda argv: locate("\0").stat(), [], "")[0].startswith("ValueError")
    assert fuzz.attempt(train.read_options, ["--resume", "--overwrite"], "")[0] == "refused"
    assert fuzz.attempt(lambda argv: None, [], "it is cut off")[0] == "read in silence, though it is cut off"
    assert fuzz.attempt(lambda argv: bytearray(1 << 60), [], "")[0].startswith("out of memory")
    (root / "beside" / "more").write_text("")
    assert not fuzz.stands_as_it_was(root)
    (root / "beside" / "more").unlink()
