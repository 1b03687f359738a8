"""Checkpoints survive a crash at any moment, open in transformers, and are refused in a line when they are damaged."""

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import shutil
from unittest.mock import Mock

import pytest
import torch
from damage import Program
from helpers import make_data, roughen, texts
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import Doge, DogeConfig
from nanodoge import data, tokenizer
from nanodoge.checkpoint import (
    finish_interrupted_save,
    load_config,
    load_model,
    load_optimizer_state,
    load_training_state,
    save_checkpoint,
)
from nanodoge.run import Log


@pytest.fixture(scope="module")
def small():
    """A model and a tokenizer that belong together."""
    tok = tokenizer.train_bpe(texts(50), 280)
    torch.manual_seed(0)
    shape = dict(vocab_size=tok.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return roughen(Doge(DogeConfig(**shape))), tok


def state_of(step):
    return dict(options={}, optimizer={}, step=step, tokens=0, seconds=0.0, row=None)


@pytest.fixture
def folder(small, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", *small, state_of(1))
    return tmp_path / "checkpoint"


def test_data_of_older_commits_and_tokenizers_saved_again_fit(tmp_path):
    """Older data folders name the bytes of their tokenizer.json."""
    make_data(tmp_path / "data")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    AutoTokenizer.from_pretrained(tmp_path / "data").save_pretrained(tmp_path / "again")
    again, other = tokenizer.Tokenizer.load(tmp_path / "again"), tokenizer.train_bpe(texts(50), 300)
    older = hashlib.sha256((tmp_path / "data" / "tokenizer.json").read_bytes()).hexdigest()
    for change in ({}, dict(tokenizer_sha256=older)):
        (tmp_path / "data" / "meta.json").write_text(json.dumps(meta | change))
        data.load_tokenizer(tmp_path / "data")
        data.check_tokenizer(again, tmp_path / "data", source="again")
        with pytest.raises(ValueError, match="other has another tokenizer"):
            data.check_tokenizer(other, tmp_path / "data", source="other")


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
        save_checkpoint(folder, old_model, old_tok, state_of(1))
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
                save_checkpoint(folder, new_model, tok, state_of(2))
                break
            except KeyboardInterrupt:
                pass
        for is_finished in (False, True):  # read as it lies, and after the next run has tidied up
            if is_finished:
                finish_interrupted_save(folder)
                assert not (folder / ".saving").exists() and not (folder / ".saved").exists()
            step = load_training_state(folder)["step"]
            model, found = load_model(folder)
            weights = model.state_dict()
            assert found.chat_template == (old_tok if step == 1 else tok).chat_template
            expected = (old_model if step == 1 else new_model).state_dict()
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
            seen.add((step, is_finished))
    else:
        pytest.fail("saving never finished")
    assert seen == {(1, False), (1, True), (2, False), (2, True)} and last > 10


@pytest.mark.parametrize("what", ["empty", "junk", "pickle", "evil", "cut"])
def test_a_training_state_is_never_executed(folder, what):
    path = folder / "training_state.pt"
    plain = dict(empty=b"", junk=b"junk", pickle=pickle.dumps(Program()), cut=path.read_bytes()[:-9])
    torch.save(Program(), path) if what == "evil" else path.write_bytes(plain[what])
    with pytest.raises(ValueError, match="damaged or not ours"):
        load_training_state(folder)


def test_a_folder_copied_by_halves_is_refused(small, folder, tmp_path):
    save_checkpoint(tmp_path / "newer", *small, state_of(2))
    shutil.copy(tmp_path / "newer" / "model.safetensors", folder)
    with pytest.raises(ValueError, match="model.safetensors is of step 2, training_state.pt of step 1"):
        load_training_state(folder)
    load_model(folder)  # as a model it is whole


def test_a_wrong_folder_is_refused_with_those_that_are_there(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"there are {folder}$"):
        load_model(f"{folder}s")
    with pytest.raises(ValueError, match=f"'out/stories' in {tmp_path}; a stage such as train.py writes one$"):
        load_model("out/stories")


@pytest.mark.parametrize(
    "change",  # both moments: the fused kernel would write past the end of a short one
    [dict(exp_avg=torch.zeros(3, 3)), dict(exp_avg_sq=torch.zeros(3, 3)), dict(exp_avg_sq=None)],
)
def test_an_optimizer_of_another_shape_is_refused(change):
    w = torch.nn.Parameter(torch.zeros(2, 3))
    state = {"w": dict(step=torch.tensor(1.0), exp_avg=torch.zeros(2, 3), exp_avg_sq=torch.zeros(2, 3)) | change}
    with pytest.raises(ValueError, match=rf"training_state.pt .* no {[*change][0]} of w.*\[2, 3\]"):
        load_optimizer_state([torch.optim.AdamW([w])], {w: "w"}, state)


@pytest.mark.skipif(os.name == "nt", reason="links are for administrators there")
def test_links_do_not_lead_out_of_a_folder(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    (other / "mine").write_text("mine")
    (folder / ".saved").symlink_to(other)
    (folder / ".saving").symlink_to(other)
    (folder / "log.csv.new").symlink_to(other / "mine")
    finish_interrupted_save(folder)
    Log(folder / "log.csv", 1)
    assert (other / "mine").read_text() == "mine" and not (folder / "mine").exists()


@pytest.mark.skipif(os.name == "nt", reason="folders hold no pipes there")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pipe_in_place_of_the_weights_is_not_waited_for(folder, name):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} is not a file"):
        load_model(folder)
    load_training_state(folder)


FULL_DISK = {  # the ways in which the libraries say it, as tests/crash.py met them
    "No space left.*disk full": ("save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    "unexpected pos 576 vs 470; is the": ("torch.save", RuntimeError("unexpected pos 576 vs 470\na page of stack")),
    "No space left": ("flush", OSError(errno.ENOSPC, "No space left on device")),
    "Read-only": ("Path.mkdir", OSError(errno.EROFS, "Read-only file system")),
}


@pytest.mark.parametrize("words", FULL_DISK)
def test_a_disk_that_takes_no_more_leaves_the_old_checkpoint(small, folder, monkeypatch, words):
    where, error = FULL_DISK[words]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(f"nanodoge.checkpoint.{where}", Mock(side_effect=error))
    with pytest.raises(OSError, match=f"cannot write a checkpoint to {folder} .one before it stays whole.: .*{words}"):
        save_checkpoint(folder, *small, state_of(2))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_fields_that_say_how_to_compute_are_neither_saved_nor_read(small, folder, monkeypatch):
    monkeypatch.setattr("nanodoge.layouts.UNSAVED", ("initializer_range",))
    save_checkpoint(folder, Doge(dataclasses.replace(small[0].config, initializer_range=0.5)), small[1])
    assert "initializer_range" not in json.loads((folder / "config.json").read_text())
    config = json.loads((folder / "config.json").read_text()) | dict(initializer_range="of another program")
    (folder / "config.json").write_text(json.dumps(config))
    assert load_config(folder).initializer_range == DogeConfig.initializer_range
