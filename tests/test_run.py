"""runtime.py: options that complain well, checkpoints that survive a crash at any moment and open in transformers, a
log without a torn or doubled row."""

import dataclasses
import errno
import json
import os
import sys
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
import torch

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


@pytest.mark.parametrize("text", ["step,loss\n1,x\n", "step,loss\n²,1\n", "step\n" + "9" * 5000 + "\n", "step\n1,2\n"])
def test_a_log_that_holds_no_numbers_is_refused(tmp_path, text):
    (tmp_path / "log.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="log.csv is damaged: .*; move it away"):
        Log(tmp_path / "log.csv", 1)


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
