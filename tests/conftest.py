"""The same random numbers in every run, no network, one thread per test process (more of them only wait), and neither
pictures of the loss nor waiting for the disk, which take longer than most runs here."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.access(os.path.expanduser("~"), os.W_OK):  # libraries keep caches there
    HOME = tempfile.TemporaryDirectory()
    os.environ["HOME"] = HOME.name

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A small checkpoint with random weights, and a tokenizer with a chat template."""
    from helpers import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("out") / "base")


@pytest.fixture(autouse=True)
def seed():
    import torch  # here: the process that only distributes the tests does without

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def without_waiting(request, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: None)
    if "draws" not in request.keywords:
        monkeypatch.setattr("nanodoge.run.plot_loss", lambda *paths: None)
