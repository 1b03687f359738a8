"""run.py, stage.py and machine.py: a log without a torn or doubled row, training states with the old names of options,
and what a process says that is alone or on an unknown GPU."""

import errno
import os

import pytest
import torch
from helpers import TINY, TUNE, assert_same_weights, make_checkpoint, make_data, make_set, steady, stopped_after

import grpo
import sft
import train
from nanodoge.checkpoint import load_model, load_training_state, save_checkpoint
from nanodoge.machine import Machine
from nanodoge.run import Log, read_log
from nanodoge.stage import saved_options

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
    assert steady(read_log(cut / "log.csv")) == steady(read_log(whole / "log.csv"))
    assert_same_weights(cut, whole)


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


PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L4": 121e12}
PEAKS |= {"GTX 970": None, "NVIDIA H100 NVL": None, "RTX 4090 Laptop GPU": None}


def test_an_unknown_gpu_has_no_mfu():
    machine = Machine("cpu")
    assert machine.peak_flops() is None
    for name, flops in PEAKS.items():
        machine.device, machine.name, machine.dtype = torch.device("cuda"), name, torch.bfloat16
        assert machine.peak_flops() == flops
