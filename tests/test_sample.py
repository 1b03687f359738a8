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
from nanodoge.engine import Engine
from nanodoge.options import parse_options
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


def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch):
    data = "\ufeffOnce".encode()
    (tmp_path / "prompt.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    for option in (dict(file=str(tmp_path / "prompt.txt")), dict(prompt="-")):
        assert sample.read_prompt(sample.SampleOptions(**option)) == "Once"
    (tmp_path / "config.py").write_bytes("\ufefftop_k = 3".encode())
    assert parse_options(sample.SampleOptions, [f"--config={tmp_path / 'config.py'}"]).top_k == 3


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


def test_a_text_beyond_the_trained_context_is_only_noticed(checkpoint, capsys, monkeypatch):
    notice = "exceed the 16 tokens the model was trained on"
    assert notice not in outputs(checkpoint, "--max_new_tokens=15", capsys=capsys).err
    assert notice in outputs(checkpoint, "--max_new_tokens=16", capsys=capsys).err
    lines = iter(["hello there", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert notice in outputs(checkpoint, "--chat", "--max_new_tokens=15", capsys=capsys).err


def test_ctrl_c_ends_the_text_and_keeps_what_was_written(checkpoint, capsys, monkeypatch):
    options = ["--temperature=0", "--prompt=the red", "--max_new_tokens=30"]
    whole, step, steps = outputs(checkpoint, *options, capsys=capsys).out, Engine.step, itertools.count()

    def interrupted(self):
        if next(steps) == 9:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    result = outputs(checkpoint, *options, capsys=capsys)
    assert "[9 tokens" in result.err and "the red" < result.out.rstrip("\n") < whole
    assert whole.startswith(result.out.rstrip("\n"))


def test_attention_by_definition_writes_the_same(checkpoint, capsys):
    fast, slow = (
        outputs(checkpoint, "--temperature=0", "--max_new_tokens=20", f"--attention={kind}", capsys=capsys).out
        for kind in ("fast", "definition")
    )
    assert fast == slow


BAD_OPTIONS = {
    "--temperature=-1": "temperature=-1.0 must be a number from 0",
    "--temperature=nan": "temperature=nan",
    "--top_p=2": "top_p=2.0 must be from 0 to 1",
    "--max_new_tokens=0": "max_new_tokens=0",
    "--repetition_penalty=0": "repetition_penalty=0.0 must be a number above 0",
    "--file=absent": "absent",
    "more": "one checkpoint folder",
    "--prompt=a --chat": "exclude one another",
    "--attention=definition --dtype=int8": "without --compile and --dtype=int8",
    "--device=cuda": "--device=cuda is not available",
}


@pytest.mark.parametrize("options, words", BAD_OPTIONS.items())
def test_bad_options_are_named(checkpoint, options, words):
    if options == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises((ValueError, OSError), match=words):
        sample.main([str(checkpoint), *options.split()])


def test_no_checkpoint_is_one_line(tmp_path):
    done = command(sample.main, [str(tmp_path / "nothing")])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nothing" in done.stderr
