"""runtime.py: options that complain well, checkpoints that survive a crash at any moment and open in transformers, a
log without a torn or doubled row."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
import sys
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
import torch
from helpers import texts
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import Doge, DogeConfig
from nanodoge import tokenizer
from nanodoge.checkpoint import load_model, load_optimizer_state, load_training_state, save_checkpoint, settle
from nanodoge.machine import Machine
from nanodoge.options import (
    Count,
    Positive,
    Range,
    check_ranges,
    field_comments,
    help_text,
    parse_options,
    read_config,
    run_command,
)
from nanodoge.run import Log, read_log


@dataclass
class Options:
    steps: int = 10  # how many
    rate: float = 0.5  # how fast
    name: str = "run"  # what to call it
    loud: bool = False  # say so
    shape: Literal["round", "square"] = "round"  # which
    parts: list[str] = field(default_factory=lambda: ["a"])  # of what


def parse(*argv, **keywords):
    return parse_options(Options, list(argv), **keywords)


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_values_come_from_defaults_files_and_the_command_line_in_this_order(tmp_path):
    config = tmp_path / "c.py"
    config.write_text('"""why"""\nsteps = 1_000  # a comment\nrate = 2\nname = "file"\nparts = ["x", "y"]\n')
    options = parse(str(config), "--name=line", "--loud", "--shape=square")
    assert options == Options(1000, 2.0, "line", True, "square", ["x", "y"])
    assert isinstance(options.rate, float)
    assert parse("--parts=b,c", "--rate=1e-3", "--loud=false") == Options(rate=1e-3, parts=["b", "c"])
    assert parse("--name=a=b").name == "a=b"
    assert parse("--steps=3", base=dict(steps=5, rate=9.0)) == Options(steps=3, rate=9.0)
    assert parse("one", "two", f"--config={config}", positional="parts").parts == ["one", "two"]


@pytest.mark.parametrize("argument, words", [
    ("--stesp=3", "did you mean 'steps'"), ("--zzzzz=3", "--help lists the options"), ("--steps", "--steps=..."),
    ("--steps=many", "'many' is not a whole number"), ("--steps=1.5", "'1.5' is not a whole number"),
    ("--steps=", "is not a whole number"), ("--rate=x", "'x' is not a number"), ("--loud=maybe", "not true or false"),
    ("--shape=oval", "not one of round, square"), ("absent.py", "no config file 'absent.py'"),
])  # fmt: skip
def test_a_wrong_option_is_named_with_what_would_be_right(argument, words):
    with pytest.raises(ValueError) as error:
        parse(argument)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("steps = ", "not a file of assignments"), ("import os", "only plain assignments"), ("steps += 1", "only plain"),
    ("steps = len('abc')", "must be a literal"), ("steps = '3x'", "'3x' is not a whole number"),
    ("step = 3", "'steps'"),
    ("\nsteps = True", ":2: 'True' is not"), ("\0", "not a file of assignments"),
    ("(" * 999, "not a file"),
])  # fmt: skip
def test_a_config_file_is_read_and_never_run(tmp_path, text, words):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError) as error:
        parse(str(tmp_path / "c.py"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_help_lists_every_option_with_default_and_comment():
    text = help_text(Options)
    for line in ("--steps=10", "how many", "--shape=round", "which [round, square]", "--parts=a"):
        assert line in text
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0


@pytest.mark.parametrize("stage", ["train", "sample", "prepare_data"])
def test_every_option_of_every_stage_has_a_comment(stage):
    module = __import__(stage)
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == stage]
    [options] = [value for value in own if value.__name__.endswith("Options")]
    comments = field_comments(options)
    assert {f.name for f in dataclasses.fields(options)} <= comments.keys()
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0


def test_a_mistake_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    for mistake, words in ((lambda argv: read_config("absent.py"), "there is no config file 'absent.py'"),
                           (lambda argv: open("/absent/file"), "/absent/file: No such file or directory")):
        with pytest.raises(SystemExit) as stop:
            run_command(mistake)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith(f"error: {words}") and said.count("\n") == 1
    with pytest.raises(json.JSONDecodeError):
        run_command(lambda argv: json.loads("{"))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def small():
    """A model and a tokenizer that belong together."""
    tok = tokenizer.train_bpe(texts(50), 280)
    torch.manual_seed(0)
    model = Doge(DogeConfig(vocab_size=tok.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return model, tok


@pytest.fixture
def folder(small, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", *small, dict(step=1))
    return tmp_path / "checkpoint"


def test_a_checkpoint_comes_back_bit_for_bit(small, folder):
    model, tok = load_model(folder)
    assert model.config == small[0].config and tok.digest == small[1].digest
    for name, w in small[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], w)
    assert load_training_state(folder) == dict(step=1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_checkpoint_opens_in_transformers(small, tmp_path, tied):
    torch.manual_seed(1)
    model = Doge(dataclasses.replace(small[0].config, tie_word_embeddings=tied)).eval()
    save_checkpoint(tmp_path, model, small[1])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 20))
    torch.testing.assert_close(model(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=0)
    reader = AutoTokenizer.from_pretrained(tmp_path)
    assert reader("the red dog").input_ids == [small[1].bos_id, *small[1].encode("the red dog")]


def test_a_model_transformers_would_compute_differently_does_not_open_there(small, tmp_path):
    for change in (dict(qk_norm=False), dict(is_moe=True, num_experts=16, num_experts_per_tok=2)):
        model = Doge(dataclasses.replace(small[0].config, **change))
        save_checkpoint(tmp_path, model, small[1])
        loaded, tokens = load_model(tmp_path)[0].to("cpu"), torch.arange(9)[None]
        assert loaded.config == model.config and torch.equal(loaded(tokens)[0], model(tokens)[0])
        with pytest.raises(ValueError, match="nanodoge"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_crash_at_any_moment_of_saving_leaves_the_old_or_the_new_checkpoint_whole(small, folder, monkeypatch):
    """Every call to the file system while saving is, in turn, the last one the process makes."""
    (old_model, tok), old_tok = small, tokenizer.Tokenizer.load(folder)
    old_tok.chat_template = "of the old one"  # its file is not the tokenizer's, and moves at another moment
    new_model = Doge(old_model.config)
    seen = set()
    for last in range(60):
        shutil.rmtree(folder)
        save_checkpoint(folder, old_model, old_tok, dict(step=1))
        count = iter(range(10**6))

        def dying(real, count=count, last=last):
            def call(*args, **keywords):
                if next(count) == last:
                    raise KeyboardInterrupt
                return real(*args, **keywords)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "fsync", "open"):
                patch.setattr(os, name, dying(getattr(os, name)))
            patch.setattr("nanodoge.checkpoint.save_file", dying(save_file))
            patch.setattr(torch, "save", dying(torch.save))
            try:
                save_checkpoint(folder, new_model, tok, dict(step=2))
                break
            except KeyboardInterrupt:
                pass
        for settled in (False, True):  # read as it lies, and after the next run has tidied up
            if settled:
                settle(folder)
                assert not (folder / ".saving").exists() and not (folder / ".saved").exists()
            step = load_training_state(folder)["step"]
            model, found = load_model(folder)
            weights = model.state_dict()
            assert found.chat_template == (old_tok if step == 1 else tok).chat_template
            expected = (old_model if step == 1 else new_model).state_dict()
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
            seen.add((step, settled))
    else:
        pytest.fail("saving never finished")
    assert seen == {(1, False), (1, True), (2, False), (2, True)} and last > 10


def damage(folder, what):
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    if what == "missing tensor":
        del weights["model.layers.1.self_attn.A"]
    if what == "extra tensor":
        weights["model.layers.7.self_attn.A"] = torch.zeros(1)
    if what == "wrong shape":
        weights["model.norm.weight"] = torch.zeros(7)
    save_file(weights, folder / "model.safetensors")
    if what == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
    if what == "no header":
        (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    if what == "other kind":
        (folder / "config.json").write_text(json.dumps(config | dict(model_type="llama")))
    if what == "bad value":
        (folder / "config.json").write_text(json.dumps(config | dict(hidden_size="wide")))
    if what == "small vocabulary":
        (folder / "config.json").write_text(json.dumps(config | dict(vocab_size=100)))
    if what == "torn config":
        (folder / "config.json").write_text('{"model_type": "do')
    if what == "list config":
        (folder / "config.json").write_text("[]")
    if what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if what == "no config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize("what, words", [
    ("missing tensor", "lacks model.layers.1.self_attn.A"), ("extra tensor", "has model.layers.7.self_attn.A"),
    ("wrong shape", r"model.norm.weight of shape \[7\], not \[32\]"), ("truncated", "is damaged"),
    ("no header", "is damaged"), ("no weights", "has no model.safetensors"), ("other kind", "'llama'"),
    ("bad value", "hidden_size: 'wide'"), ("small vocabulary", "config.json 100"), ("torn config", "damaged"),
    ("list config", "damaged"), ("no tokenizer", "tokenizer.json"), ("no config", "no config.json"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_with_what_and_where(folder, what, words):
    damage(folder, what)
    with pytest.raises(ValueError, match=words) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


class Evil:
    def __reduce__(self):
        return os.system, ("echo pwned",)


@pytest.mark.parametrize("what", ["empty", "junk", "pickle", "evil", "cut"])
def test_a_training_state_is_never_executed(folder, what):
    path = folder / "training_state.pt"
    plain = dict(empty=b"", junk=b"junk", pickle=pickle.dumps(Evil()), cut=path.read_bytes()[:-9])
    if what == "evil":
        torch.save(Evil(), path)
    else:
        path.write_bytes(plain[what])
    with pytest.raises(ValueError, match="damaged or not ours"):
        load_training_state(folder)


def test_a_folder_copied_by_halves_is_refused(small, folder, tmp_path):
    save_checkpoint(tmp_path / "newer", *small, dict(step=2))
    shutil.copy(tmp_path / "newer" / "model.safetensors", folder)
    with pytest.raises(ValueError, match="model.safetensors is of step 2, training_state.pt of step 1"):
        load_training_state(folder)
    load_model(folder)  # as a model it is whole


def test_an_optimizer_of_another_shape_is_refused():
    w = torch.nn.Parameter(torch.zeros(2, 3))
    state = {"w": dict(step=torch.tensor(1.0), exp_avg=torch.zeros(3, 3), exp_avg_sq=torch.zeros(3, 3))}
    with pytest.raises(ValueError, match=r"has w of shape \[3, 3\], the model \[2, 3\]"):
        load_optimizer_state([torch.optim.AdamW([w])], {w: "w"}, state)
    state["w"]["exp_avg"] = torch.zeros(2, 3)  # the other moment too: the fused kernel would write past its end
    with pytest.raises(ValueError, match=r"has w of shape \[3, 3\], the model \[2, 3\]"):
        load_optimizer_state([torch.optim.AdamW([w])], {w: "w"}, state)
    del state["w"]["exp_avg_sq"]
    with pytest.raises(ValueError, match="it has no exp_avg_sq of w"):
        load_optimizer_state([torch.optim.AdamW([w])], {w: "w"}, state)


@pytest.mark.skipif(os.name == "nt", reason="links are for administrators there")
def test_links_do_not_lead_out_of_a_folder(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    (other / "mine").write_text("mine")
    (folder / ".saved").symlink_to(other)
    (folder / ".saving").symlink_to(other)
    (folder / "log.csv.new").symlink_to(other / "mine")
    settle(folder)
    Log(folder / "log.csv", 1)
    assert (other / "mine").read_text() == "mine" and not (folder / "mine").exists()


@pytest.mark.parametrize("text", ["step,loss\n1,x\n", "step,loss\n²,1\n", "step\n" + "9" * 5000 + "\n", "step\n1,2\n"])
def test_a_log_that_holds_no_numbers_is_refused(tmp_path, text):
    (tmp_path / "log.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="log.csv is damaged: .*; move it away"):
        Log(tmp_path / "log.csv", 1)


@pytest.mark.parametrize("where, error, words", [
    ("save_file", SafetensorError("I/O error: No space left on device (os error 28)"), "No space left.*disk full"),
    ("torch.save", RuntimeError("unexpected pos 576 vs 470\nand a page of stack"), "unexpected pos 576 vs 470; is the"),
    ("flush", OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    ("Path.mkdir", OSError(errno.EROFS, "Read-only file system"), "Read-only"),
])  # fmt: skip
def test_a_disk_that_takes_no_more_leaves_the_old_checkpoint(small, folder, monkeypatch, where, error, words):
    """The ways in which the libraries say it, as tests/crash.py met them on a disk that was full."""

    def failing(*args, **keywords):
        raise error

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(f"nanodoge.checkpoint.{where}", failing)
    with pytest.raises(OSError, match=f"cannot write a checkpoint to {folder} .the one before it is whole.: .*{words}"):
        save_checkpoint(folder, *small, dict(step=2))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_lost_process_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)

    def main(argv):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typ ...")

    def timed_out(argv):
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 30000ms for recv operation ...")

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 1 and "another process of this run has ended" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # a host that was cut off
        run_command(timed_out)
    assert "has not answered for --patience seconds" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(lambda argv: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_processes_that_torchrun_started_again_say_what_they_need(monkeypatch):
    def lost(backend, timeout):
        raise RuntimeError("Gloo connectFullMesh failed with ... Connection refused")

    monkeypatch.setattr(torch.distributed, "init_process_group", lost)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the 2 processes of this run do not find each other: one has ended, or not"):
        Machine("cpu")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"):
        Machine("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# The log


def test_a_full_disk_is_named_with_the_log(tmp_path, monkeypatch):
    log = Log(tmp_path / "log.csv", 0)
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError) as error:
        log.write(dict(step=1))
    assert error.value.filename == str(tmp_path / "log.csv") and error.value.strerror == "No space left"


def test_the_log_drops_a_torn_line_and_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "log.csv"
    log = Log(path, 0)
    for step in (1, 2, 3, 4):
        log.write(dict(step=step, loss=0.5 * step))
    path.write_text(path.read_text() + "5,20")  # the crash came in the middle of a line
    assert [row["step"] for row in read_log(path)] == ["1", "2", "3", "4"]
    log = Log(path, 3)
    log.write(dict(step=4, loss=9))
    assert [(row["step"], row["loss"]) for row in read_log(path)] == [
        ("1", "0.5"), ("2", "1.0"), ("3", "1.5"), ("4", "9"),
    ]  # fmt: skip


def test_an_unknown_gpu_has_no_mfu():
    machine = Machine("cpu")
    assert machine.peak_flops() is None
    known = {"NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L4": 121e12, "GTX 970": None,
             "NVIDIA H100 NVL": None, "RTX 4090 Laptop GPU": None}  # fmt: skip
    for name, flops in known.items():
        machine.device, machine.name, machine.dtype = torch.device("cuda"), name, torch.bfloat16
        assert machine.peak_flops() == flops


@dataclass
class Ranges:
    count: Count = 1  # of steps
    # ---- Numbers of other kinds
    rate: Positive = 1.0  # above 0
    share: Annotated[float, Range(0, 1)] = 0.5  # both ends included
    first: ClassVar = "rate"

    def __post_init__(self):
        check_ranges(self)


@pytest.mark.parametrize("argv, words", [
    (["--count=0"], "--count=0 must be a number from 1 up"), (["--rate=0"], "--rate=0.0 must be a number above 0"),
    (["--rate", "inf"], "--rate=inf must be a number above 0"), (["--share=nan"], "--share=nan must be from 0 to 1"),
    (["--count", "--rate=2"], "--count needs a value"),
])  # fmt: skip
def test_a_range_is_part_of_the_type(argv, words):
    with pytest.raises(ValueError, match=words):
        parse_options(Ranges, argv)
    assert parse_options(Ranges, ["--count", "3", "--share=1"]) == Ranges(3, 1.0, 1.0)


def test_help_has_the_first_options_at_the_top_and_the_others_in_groups():
    text = help_text(Ranges)
    assert (
        text.index("people need first:\n  --rate")
        < text.index("--count")
        < text.index("Numbers of other kinds:\n  --share")
    )
