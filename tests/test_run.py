"""run.py, stage.py and machine.py: a log without a torn or doubled row, training states with the old names of options,
and what a process says that is alone or on an unknown GPU."""

import contextlib
import errno
import os
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    TINY,
    TUNE,
    assert_refused,
    assert_same_run,
    make_checkpoint,
    make_data,
    make_set,
    stopped_after,
    texts,
    tune,
)
from matplotlib.axes import Axes

import dpo
import grpo
import sft
import train
from nanodoge.checkpoint import load_model, load_training_state, save_checkpoint
from nanodoge.examples import TokenSet
from nanodoge.machine import Machine
from nanodoge.run import Log, read_log
from nanodoge.stage import run_stage, saved_options

# ---- The log


@pytest.mark.parametrize("text", ["step,loss\n1,x\n", "step,loss\n²,1\n", "step\n" + "9" * 5000 + "\n", "step\n1,2\n"])
def test_a_log_that_holds_no_numbers_is_refused(tmp_path, text):
    (tmp_path / "log.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="log.csv is damaged: .*; move it away"):
        Log(tmp_path / "log.csv", 1)


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
    rows = [(row["step"], row["loss"]) for row in read_log(path)]
    assert rows == [("1", "0.5"), ("2", "1.0"), ("3", "1.5"), ("4", "9")]


def test_a_log_with_another_column_goes_on(tmp_path):
    """Older versions logged the memory in bytes."""
    (tmp_path / "log.csv").write_text("step,tokens,loss,memory\n1,8,2.5,300000000\n")
    Log(tmp_path / "log.csv", 1).write(dict(step=2, loss=1.5, memory_mb=310))
    rows = [(row["step"], row["loss"], row["memory_mb"]) for row in read_log(tmp_path / "log.csv")]
    assert rows == [("1", "2.5", ""), ("2", "1.5", "310")]


@pytest.mark.draws
def test_copy_steps_have_a_loss_of_their_own_and_a_shaded_part_of_the_picture(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(Axes, "axvspan", lambda self, *span, **rest: drawn.append((span, rest["label"])))
    copies = [*TINY, "--copy_steps=3", "--eval_every=1", f"--out_dir={tmp_path / 'run'}"]
    train.main([*copies, f"--data={make_data(tmp_path / 'data')}"])
    rows, out = read_log(tmp_path / "run" / "log.csv"), capsys.readouterr().out
    copying = [train.is_copy_step(step, 3, 233) for step in range(12)]
    assert [row["loss"] == "" for row in rows] == [row["copy_loss"] != "" for row in rows] == copying
    assert drawn == [((0, 64 * (12 - copying[::-1].index(True))), "copy steps, mixed with others")]
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert out.count("the copy steps end") == 1 and "step      1  copy_loss " in out and " left\n" in out


def test_the_weights_are_readable_as_their_neighbours(tmp_path):
    modes = {path.stat().st_mode for path in make_checkpoint(tmp_path / "model").iterdir()}
    assert len(modes) == 1


def test_a_gradient_of_exactly_zero_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "loss_sum", lambda network, *rest: 0.0 * sum(p.sum() for p in network.parameters()))
    train.main([*TINY, "--eval_every=100", f"--out_dir={tmp_path / 'run'}", f"--data={make_data(tmp_path / 'data')}"])
    assert capsys.readouterr().out.count("warning: the gradient of step 1 is exactly 0, so nothing is learned") == 1


# ---- Tuning stages


@pytest.fixture(scope="module")
def data(tmp_path_factory, base):
    """{kind: a data folder of this kind}."""
    folder, labelled = tmp_path_factory.mktemp("data"), [dict(text=t, label="ab"[len(t) % 2]) for t in texts(40)]
    made = {kind: make_set(folder / kind, base, kind, 60) for kind in ("chat", "preferences", "problems")}
    return made | dict(labels=make_set(folder / "labels", base, "labels", rows=labelled, labels=["a", "b"]))


REFUSED = """
sft chat --init_from=nowhere | no checkpoint folder 'nowhere'
sft chat --data=nowhere | nowhere
sft chat --sequence_length=2 | has no conversations to use
sft chat --micro_batch_tokens=10 | less than one sequence
sft chat --warmup=1 | warmup=1
sft chat --hidden_size=9 | no option 'hidden_size'
sft chat --resume | no run to go on with
dpo preferences --sequence_length=2 | has no pairs to use
dpo preferences --micro_batch_tokens=100 | micro_batch_tokens=100 is less than one pair
dpo preferences --beta=-1 | beta=-1
dpo preferences --loss=hinge | 'hinge' is not one of sigmoid, ipo, sigmoid_norm
dpo preferences --eval_answers=3 | no option 'eval_answers'
grpo problems --generations=1 | generations=1 must be a number from 2
grpo problems --clip_low=1.5 | clip_low=1.5
grpo problems --reward_answer=0 --reward_format=0 | nothing is rewarded
grpo problems --max_new_tokens=63 | no problems to use: .* with --max_new_tokens=63
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_bad_options_are_named(base, data, tmp_path, case):
    stage, kind, case = case.split(" ", 2)
    main = dict(sft=sft, dpo=dpo, grpo=grpo)[stage].main
    assert_refused(lambda out, *options: tune(main, base, data[kind], out, *options), tmp_path / "run", case)


@pytest.mark.parametrize("stage, kind", [(sft, "chat"), (dpo, "preferences"), (grpo, "problems"), (sft, "labels")])
def test_a_stage_ends_with_an_answer_where_the_model_is_and_what_is_next(base, data, stage, kind, tmp_path, capsys):
    out, options = tmp_path / "run", [f"--kind={kind}"] * (stage is sft)
    options += ["--max_new_tokens=8", "--sequence_length=60"] if stage is grpo else []
    tune(stage.main, base, data[kind], out, "--max_steps=1", "--sample_tokens=5", *options)
    end = capsys.readouterr().out.partition(f"The model is in {out}. It answers a held-out example:\n\n")[2]
    prompt, answer = re.fullmatch(r"(.*)\{\+(.*)\+\}\n\nMore: .*\n", end, re.DOTALL).groups()
    assert str(out) in end.splitlines()[-1]
    model, tokenizer = load_model(out, labels=() if kind == "labels" else None)
    val = TokenSet(data[kind], "val", kind)
    ids = next(ids for ids, _ in map(val.conversation, range(len(val))) if tokenizer.decode(ids).startswith(prompt))
    size = next(n for n in range(len(ids), 0, -1) if tokenizer.decode(ids[:n]) == prompt)
    tokens = torch.tensor([ids[:size].tolist()])
    if kind == "labels":
        assert answer == model.labels[model(tokens)[0][0, -1].argmax()]
        return
    written = model.generate(tokens, 5, temperature=0.0, stop_ids=[tokenizer.eos_id])[0].tolist()
    assert answer == tokenizer.decode(written)


# ---- Training states of older versions

OLD_NAMES = {
    train: dict(micro_batch_size="batch_size"),
    sft: dict(batch_size="batch_rows", micro_batch_tokens="micro_tokens", eval_size="eval_rows"),
}


@pytest.mark.parametrize("stage", OLD_NAMES)
def test_a_run_with_the_old_names_of_options_resumes(stage, tmp_path):
    if stage is train:
        argv = [*TINY, f"--data={make_data(tmp_path / 'data')}"]
    else:
        base = make_checkpoint(tmp_path / "base")
        argv = [*TUNE, "--eval_answers=0", f"--init_from={base}", f"--data={make_set(tmp_path / 'set', base)}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stage.main([*argv, f"--out_dir={whole}"])
    with stopped_after(6):
        stage.main([*argv, f"--out_dir={cut}"])
    state = load_training_state(cut)
    state["options"] = {OLD_NAMES[stage].get(name, name): value for name, value in state["options"].items()}
    save_checkpoint(cut, *load_model(cut), state)
    stage.main([f"--out_dir={cut}", "--resume"])
    assert_same_run(cut, whole)


def test_old_names_of_options_are_read_as_the_new_ones():
    """batch_size was what train.py calls micro_batch_size; in the tuning stages it is what was batch_rows."""
    old = dict(batch_rows=1, micro_tokens=2, eval_rows=3, rollout_rows=4)
    new = dict(batch_size=1, micro_batch_tokens=2, eval_size=3, slots=4)
    assert saved_options(grpo.GrpoOptions, dict(options=old)) == new
    assert saved_options(grpo.GrpoOptions, dict(options=new)) == new
    assert saved_options(train.TrainOptions, dict(options=dict(batch_size=5))) == dict(micro_batch_size=5)


# ---- The machine


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


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_stage_made_is_deleted_before_the_process_group(monkeypatch, fails):
    """DDP holds Python's lock if it is the last to own the process group: a rank hung at exit once."""
    made, alive = [], []

    def stage(options, machine):
        network = torch.nn.Linear(1, 1)
        network.itself, machine.world_size = [network], 2  # a reference cycle
        made.append(weakref.ref(network))
        if fails:
            raise FloatingPointError

    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: alive.append(made[0]() is not None))
    with pytest.raises(FloatingPointError) if fails else contextlib.nullcontext():
        run_stage(stage, SimpleNamespace(device="cpu", dtype="auto", patience=9))
    assert alive == [False]


PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L4": 121e12}
PEAKS |= {"GTX 970": None, "NVIDIA H100 NVL": None, "RTX 4090 Laptop GPU": None}


def test_an_unknown_gpu_has_no_mfu():
    machine = Machine("cpu")
    assert machine.peak_flops() is None
    for name, flops in PEAKS.items():
        machine.device, machine.name, machine.dtype = torch.device("cuda"), name, torch.bfloat16
        assert machine.peak_flops() == flops
