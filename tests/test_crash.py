"""tests/crash.py with a handful of kills: it finds nothing, and it would find something."""

import pathlib
import sys

import crash
import pytest
import torch
from helpers import command


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_killed_at_random_moments_nothing_is_lost():
    done = command(crash.main, ["--kills=2", "--only=train"])
    assert done.returncode == 0 and "tries=2" in done.stdout and "failures=0" in done.stdout, done.stdout + done.stderr


def test_the_checks_see_what_they_are_for(tmp_path, monkeypatch):
    """A row lost or doubled, weights of another run, a checkpoint that is older than one before it."""
    whole, states = object.__new__(crash.Undisturbed), {"run": dict(step=2)}
    whole.rows, whole.snapshots = [dict(step=str(step)) for step in (1, 2, 3)], pathlib.PurePosixPath("whole")
    tensors, rows = {"run": torch.zeros(2), "whole/2": torch.zeros(2)}, {"run": whole.rows[:2]}
    monkeypatch.setattr(crash, "load_model", lambda folder: None)
    monkeypatch.setattr(crash, "load_training_state", lambda folder: states.get(str(folder)))
    monkeypatch.setattr(crash, "weights", lambda folder: {"w": tensors[str(folder)]})
    monkeypatch.setattr(crash, "steady", lambda folder: rows[str(folder)])
    assert whole.check("run", 0) == (2, [])
    assert whole.check("run", 4)[1] == ["unreadable: step 2 after step 4"]
    for bad in ([whole.rows[0]] * 2, whole.rows[1:], []):
        rows["run"] = bad
        assert "lost rows" in whole.check("run", 0)[1][0]
    rows["run"], tensors["run"] = whole.rows[:2], torch.ones(2)
    assert whole.check("run", 0)[1] == ["unreadable: weights"]
