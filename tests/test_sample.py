"""sample.py: streams exactly what was generated, stops where it was told to, and talks in the terminal."""

import io
import itertools
import math
import re
import sys
import types

import pytest
import torch
from helpers import TINY, command, make_data

import sample
import train
from nanodoge.checkpoint import load_model
from nanodoge.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    data = make_data(folder / "data")
    train.main([*TINY, f"--data={data}", f"--out_dir={folder / 'run'}"])
    return folder / "run"


def outputs(checkpoint, *options, capsys):
    sample.main([str(checkpoint), "--device=cpu", *options])
    return capsys.readouterr()


def test_the_text_is_what_generate_gives(checkpoint, capsys):
    model, tokenizer = load_model(checkpoint)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("the red")]])
    expected = model.generate(ids, 30, temperature=0, stop_ids=[tokenizer.eos_id])[0].tolist()
    text = tokenizer.decode(i for i in expected if i != tokenizer.eos_id)
    result = outputs(checkpoint, "--prompt=the red", "--temperature=0", "--max_new_tokens=30", capsys=capsys)
    assert result.out == f"the red{text}\n"
    assert "tokens/s]" in result.err


@pytest.mark.parametrize("temperature", [0, 1])
def test_damaged_weights_are_named(checkpoint, monkeypatch, temperature):
    model, tokenizer = load_model(checkpoint)
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    monkeypatch.setattr("sample.load_model", lambda folder: (model, tokenizer))
    with pytest.raises(ValueError, match="nan or inf: its weights are damaged"):
        sample.main([str(checkpoint), "--device=cpu", f"--temperature={temperature}"])


def test_a_seed_gives_the_same_text_and_another_seed_another(checkpoint, capsys):
    texts = [outputs(checkpoint, f"--seed={seed}", "--temperature=1", capsys=capsys).out for seed in (1, 1, 2)]
    first, again, other = texts
    assert first == again != other


def test_samples_files_and_standard_input(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("a blue ", encoding="utf-8")
    short = "--max_new_tokens=5"
    result = outputs(checkpoint, f"--file={tmp_path / 'prompt.txt'}", "--num_samples=2", short, capsys=capsys)
    assert result.out.count("a blue ") == 2 and "--- 2 of 2 ---" in result.out
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO("über".encode())))
    assert outputs(checkpoint, "--prompt=-", short, capsys=capsys).out.startswith("über")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_strings_are_cut_wherever_the_pieces_break(size):
    text = "one two END three"
    pieces = ["".join(group) for group in itertools.zip_longest(*[iter(text)] * size, fillvalue="")]
    stopper, shown = sample.Stopper(["END", "never"]), ""
    for piece in pieces:
        shown += stopper.feed(piece)
        assert "E" not in shown  # nothing of the stop string is ever shown
        if stopper.found:
            break
    assert shown == "one two " and stopper.found
    stopper = sample.Stopper(["END"])
    assert stopper.feed("one EN") == "one " and stopper.feed("", last=True) == "EN"  # it was not one after all
    assert sample.Stopper(["aab"]).feed("aaab") == "a"


def test_stop_strings_end_the_sample(checkpoint, capsys):
    options = ["--temperature=2", "--top_p=1", "--max_new_tokens=40", "--seed=1"]
    free = outputs(checkpoint, *options, capsys=capsys).out
    stop = re.findall("[a-z]{2,}", free)[1]
    assert outputs(checkpoint, *options, f"--stop={stop}", capsys=capsys).out == free[: free.index(stop)] + "\n"


def test_a_conversation_remembers_and_can_begin_anew(checkpoint, capsys, monkeypatch):
    lines = iter(["hello", "", "/new", "again", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    seen = []
    real = Tokenizer.render

    def render(self, messages, **keywords):
        seen.append([m["role"] for m in messages])
        return real(self, messages, **keywords)

    monkeypatch.setattr(Tokenizer, "render", render)
    outputs(checkpoint, "--chat", "--system=Be kind.", "--max_new_tokens=8", capsys=capsys)
    assert seen == [["system", "user"], ["system", "user"]]
    ids, mask = real(load_model(checkpoint)[1], [dict(role="user", content="hi")], add_generation_prompt=True)
    assert ids.count(ids[0]) == 1  # one BOS


@pytest.mark.parametrize("options, words", [
    (["--temperature=-1"], "temperature=-1.0 must be from 0"), (["--top_p=2"], "top_p=2.0 must be from 0 to 1"),
    (["--max_new_tokens=0"], "max_new_tokens=0"), (["--temperature=nan"], "temperature=nan"),
    (["--repetition_penalty=0"], "divide by zero"), (["--file=absent"], "absent"), (["more"], "one checkpoint folder"),
    (["--prompt=a", "--chat"], "exclude one another"), (["--device=cuda"], "--device=cuda is not available"),
])  # fmt: skip
def test_bad_options_are_named(checkpoint, options, words):
    if options == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises((ValueError, OSError), match=words):
        sample.main([str(checkpoint), *options])


def test_no_checkpoint_is_one_line(tmp_path):
    done = command(sample.main, [str(tmp_path / "nothing")])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nothing" in done.stderr
