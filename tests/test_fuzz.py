"""tests/fuzz.py with a few of its cases: they find nothing, and they would find something."""

import os
import sys

import pytest

import train
from nanodoge.checkpoint import locate
from nanodoge.options import convert

if sys.platform != "linux":
    pytest.skip("fuzz.py needs Linux's signals and limits", allow_module_level=True)

import fuzz

COUNTS = dict(command_line=40, config_file=20, tokenizer=32, rows=6, text_data=8, tuning_data=8, checkpoint=16)
COUNTS |= dict(convert=2, resume=3, long_run=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, before = tmp_path_factory.mktemp("fuzz").resolve(), os.getcwd()
    with fuzz.quick():
        fuzz.build(root)
    yield root
    os.chdir(before)


def test_broken_files_and_command_lines_are_refused_in_one_line(root):
    results = {(part, n): fuzz.run_case(root, part, n, 0) for part, count in COUNTS.items() for n in range(count)}
    assert {case: result for case, result in results.items() if result[0] not in ("worked", "refused")} == {}
    found = [result for result, _ in results.values()]
    assert found.count("worked") > 20 and found.count("refused") > 40


def refuse(argv):
    convert("x", int, "--n")


def chatter(argv):
    print("\nwhat is this?\nerror: something", file=sys.stderr)
    refuse(argv)


def test_the_checks_find_what_they_are_for(root):
    assert fuzz.attempt(refuse, [], "") == ("refused", "error: --n: 'x' is not a whole number below 2^63\n")
    for main, must, result in [
        (lambda argv: None, "", "worked"),
        (lambda argv: None, "it is cut off", "read silently, though it is cut off"),
        (chatter, "", "not one line"),
        (lambda argv: {}["x"], "", "KeyError"),
        (lambda argv: locate("\0").stat(), "", "ValueError"),
        (lambda argv: bytearray(1 << 60), "", "out of memory"),
    ]:
        assert fuzz.attempt(main, [], must)[0].startswith(result)
    assert fuzz.attempt(train.read_options, ["--resume", "--overwrite"], "")[0] == "refused"
    (root / "beside" / "more").write_text("")
    (root / "case").mkdir(exist_ok=True)
    assert not fuzz.is_untouched(root)
    (root / "beside" / "more").unlink()
    assert fuzz.is_untouched(root)
