"""sample.py: streams exactly what was generated, stops where it was told to, and talks in the terminal."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from helpers import TINY, command, make_data, make_set, tune

import sample
import sft
import train
from nanodoge import stories
from nanodoge.answers import final_answer
from nanodoge.checkpoint import load_model
from nanodoge.engine import Engine, TextStream
from nanodoge.options import HERE, parse_options
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


def test_a_continuation_imports_nothing_slow(checkpoint):
    """The compiler alone takes longer than torch without it."""
    slow = {"torch._dynamo", "torch._inductor", "sympy", "jinja2", "datasets", "requests", "matplotlib", "transformers"}
    code = f"import sys, sample; sample.main(sys.argv[1:]); print('slow:', sorted({slow} & set(sys.modules)))"
    argv = [sys.executable, "-c", code, str(checkpoint), "--prompt=the red", "--max_new_tokens=1", "--device=cpu"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=HERE)
    assert done.stdout.endswith("slow: []\n"), done.stderr


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
    "--compile": "is for a GPU: on a CPU, --backend=cpp is compiled",
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


# ---- The conversation in a terminal


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, checkpoint):
    """A checkpoint that sft.py left, of data with the name of the built-in sums."""
    folder = tmp_path_factory.mktemp("tuned")
    data = make_set(folder / "sums-chat", checkpoint, count=40)
    tune(sft.main, checkpoint, data, folder / "run", "--max_steps=2", "--save_every=2", "--eval_answers=0")
    return folder / "run"


class Terminal:
    """sample.py --chat in a process of its own, at a terminal."""

    def __init__(self, checkpoint, *options):
        import pty  # which Windows has not

        self.child, self.fd = pty.fork()
        if self.child == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it runs in the background ignore it
            os.environ.update(TERM="xterm", INPUTRC="/dev/null", PYTHONPATH=os.pathsep.join(sys.path))
            argv = [sys.executable, sample.__file__, str(checkpoint), "--chat", "--device=cpu", *options]
            os.execv(sys.executable, argv)
        self.text = ""

    def wait(self, pattern, timeout=20):
        """Reads until the pattern has come -> what was read."""
        end, start = time.monotonic() + timeout, len(self.text)
        while not re.search(pattern, self.text[start:], re.DOTALL):
            assert time.monotonic() < end and select.select([self.fd], [], [], timeout)[0], self.text[start:]
            self.text += os.read(self.fd, 4096).decode(errors="replace")
        return self.text[start:]

    def type(self, text):
        os.write(self.fd, text.encode())

    def interrupt(self):
        """Ctrl-C, and once more where nothing answers: Python loses one between its prompt and its waiting for keys."""
        self.type("\x03")
        if not select.select([self.fd], [], [], 5)[0]:
            self.type("\x03")

    def ended(self):
        with contextlib.suppress(OSError):  # a closed terminal is an error on Linux
            while os.read(self.fd, 4096):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_conversation_in_a_terminal(tuned, tmp_path):
    terminal = Terminal(tuned, "--max_new_tokens=8")
    start = terminal.wait("> $")
    assert "was not tuned" not in start
    terminal.type("\x1b[200~one\rtwo\x1b[201~\r")  # a paste of two lines is one message
    terminal.wait(r"tokens/s\].*> $")
    terminal.type("three\\\rfour\r")
    terminal.wait(r"tokens/s\].*> $")
    terminal.type("\x1b[A\x1b[A\x1b[A\r")  # the history: the message before the last two lines
    terminal.wait(r"tokens/s\].*> $")
    terminal.type("/system Be kind.\r")
    terminal.wait("kind.*> $")
    terminal.type("/save \r")
    terminal.wait("not saved.*> $")
    terminal.type(f"/save {tmp_path / 'chat.jsonl'}\r")
    terminal.wait("jsonl.*> $")
    terminal.interrupt()
    assert "Ctrl-C again leaves" in terminal.wait("> $")
    terminal.type("/nonsense\r")
    assert "/save FILE" in terminal.wait("together.*> $")
    terminal.interrupt()
    terminal.wait("again leaves.*> $")
    terminal.interrupt()
    assert terminal.ended() == 0
    [line] = (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    messages = json.loads(line)["messages"]
    assert messages[0] == dict(role="system", content="Be kind.")
    assert [m["content"] for m in messages if m["role"] == "user"][:2] == ["one\ntwo", "three\nfour"]


def test_a_base_model_warns_and_a_tuned_one_shows_what_it_knows(checkpoint, tuned, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt="": "/quit")
    assert "not tuned on conversations" in outputs(checkpoint, "--chat", capsys=capsys).err
    assert "tuned" not in outputs(tuned, "--chat", capsys=capsys).err  # it answers nothing right: no example
    engine = Engine(*load_model(tuned)[:1], slots=1, tokenizer=load_model(tuned)[1])
    wanted = stories.worked_sum(3, "test")["messages"]
    asked = []

    def generate(requests):  # a model that knows one answer
        asked.append(requests[0])
        return [engine.tokenizer.encode(wanted[1]["content"] if len(asked) == 4 else "Easy.")]

    engine.generate = generate
    question, answer = sample.example(engine, "data/sums-chat")
    assert question == wanted[0]["content"] and answer == final_answer(wanted[1]["content"])
    assert sample.example(engine, "data/mine") is None


def test_thoughts_are_dimmed_in_a_terminal(checkpoint, capsys, monkeypatch):
    tokenizer = load_model(checkpoint)[1]
    words = "<|begin_of_thought|>", "hm", "<|end_of_thought|>", "yes"
    ids = [
        i for word in words for i in ([tokenizer.special_tokens[word]] if word[0] == "<" else tokenizer.encode(word))
    ]

    def stream(self, request):
        request.text = TextStream(tokenizer)
        for id in ids:
            request.append(id)
            yield id

    monkeypatch.setattr(Engine, "stream", stream)
    for is_terminal, shown in ((True, "\033[2mhm\033[0myes\033[0m\n"), (False, "".join(words) + "\n")):
        lines = iter(["hello", "/quit"])
        monkeypatch.setattr("builtins.input", lambda prompt="", lines=lines: next(lines))
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        assert outputs(checkpoint, "--chat", capsys=capsys).out == shown


def test_the_notice_of_a_long_text_comes_once_and_only_for_one(checkpoint, capsys):
    notice, short = "may lose their thread", ["--prompt=the red", "--stop=a,e,i,o,u, "]
    assert notice not in outputs(checkpoint, *short, "--max_new_tokens=400", capsys=capsys).err
    assert outputs(checkpoint, "--num_samples=3", "--max_new_tokens=40", capsys=capsys).err.count(notice) == 1
