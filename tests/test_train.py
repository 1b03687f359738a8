"""train.py: the schedule against transformers', the order of data as a pure function, and whole runs: stopped and
resumed equals never stopped, two processes equal one, and nothing that exists is ever overwritten by mistake."""

import dataclasses
import functools
import importlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed.run
import torch.nn.functional as F
from helpers import (
    TINY,
    assert_close_logs,
    assert_refused,
    assert_same_run,
    assert_same_weights,
    command,
    make_data,
    stopped_after,
    weights,
)
from torch.optim import _muon
from transformers import get_wsd_schedule

import train
from model import Doge, DogeConfig
from nanodoge.checkpoint import load_model, load_training_state, save_checkpoint
from nanodoge.machine import Machine
from nanodoge.options import HERE, parse_options
from nanodoge.run import Run, read_log


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that was never stopped: 12 steps, checkpoints after 4, 8 (also in stable/) and 12."""
    out = tmp_path_factory.mktemp("out") / "whole"
    run(data, out)
    return out


def run(data, out, *options):
    train.main([*TINY, f"--data={data}", f"--out_dir={out}", *options])
    return log_of(out)


def run_from_config(data, out, *options):
    """`run` without config/tiny.py underneath, as --init_from and --resume are used."""
    train.main([f"--data={data}", f"--out_dir={out}", *TINY[5:], *options])  # TINY[5:]: all but the model's shape
    return log_of(out)


def resume(out, *options):
    train.main([f"--out_dir={out}", "--resume", *options])
    return log_of(out)


def log_of(out):
    return read_log(out / "log.csv")


def losses_of(rows):
    return [float(row["loss"] or row["copy_loss"]) for row in rows]


# ---- Schedule and optimizer


@pytest.mark.parametrize("decay", ["linear", "cosine", "1-sqrt"])
def test_wsd_equals_transformers_and_is_zero_past_the_end(decay):
    optimizer, phases = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), (10, 30)
    reference = get_wsd_schedule(optimizer, *phases, num_training_steps=100, decay_type=decay).lr_lambdas[0]
    for step in range(130):
        # ours starts at 1/warmup instead of at a step that does nothing, one step ahead while it warms up
        expected = reference(step + 1 if step < 10 else step)
        assert train.wsd(step, 100, *phases, decay) == pytest.approx(expected, abs=1e-9), step
    assert [train.wsd(step, 100, 0, 30, decay) for step in (100, 101, 10**12)] == [0, 0, 0]
    assert all(0 < train.wsd(step, 100, 0, 30, decay) <= 1 for step in range(100))
    assert [train.wsd(step, 50, 0, 0, decay) for step in (48, 49, 50)] == [1, 1, 0]


def test_muon_is_torchs(monkeypatch):
    """All matrices of a shape at once, and in another precision, but the same steps."""
    cast = r"grad\.(bfloat16\(\)|to\(dtype=torch\.bfloat16, copy=True\))"  # of torch 2.13, of 2.15
    source = re.sub(cast, "grad.clone()", inspect.getsource(_muon._zeropower_via_newtonschulz))
    assert "bfloat16" not in source
    exec(textwrap.dedent(source), vars(_muon), scope := {})
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", scope["_zeropower_via_newtonschulz"])
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 16), (16, 8), (8, 16), (12, 12)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizers = train.Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_groups_of_the_optimizer():
    """A, the residual scales and the norms are not decayed; Muon gets the hidden matrices and nothing else."""
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, tie_word_embeddings=False)
    model = Doge(DogeConfig(**shape, is_moe=True, num_experts=16, num_experts_per_tok=2))
    names = {p: name for name, p in model.named_parameters()}
    for kind in ("adamw", "muon"):
        optimizers = train.make_optimizers(model, train.TrainOptions(optimizer=kind), Machine("cpu"))
        groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
        assert sorted(names[p] for _, group in groups for p in group["params"]) == sorted(names.values())
        for optimizer, group in groups:
            for name in (names[p] for p in group["params"]):
                plain = name.endswith((".A", "_residual", "norm.weight"))
                assert group["weight_decay"] == (0.0 if plain else 0.01), name
                assert group["routed"] == any(word in name for word in ("router", "_embed")), name
                hidden = any(f"{part}_proj" in name for part in ("q", "k", "v", "o", "gate", "up", "down"))
                assert isinstance(optimizer, torch.optim.Muon) == (kind == "muon" and hidden), name


# ---- Data


def test_copies_are_rare_tokens_that_stood_before():
    """Brute force, on random rows, of which the last ends in the middle."""
    row, common = torch.randint(0, 30, (4, 65)), np.arange(30) < 5
    targets = row[:, 1:].clone()
    targets[3, 32:] = -100
    found = train.only_copies(row[:, :-1], targets, common)
    for b, t in np.ndindex(4, 64):
        target = targets[b, t].item()
        is_copy = target in row[b, : t + 1].tolist() and target >= 5
        assert found[b, t] == (target if is_copy else -100)
    assert train.common_tokens(np.repeat([0, 1, 2], [9970, 21, 9]), 4).tolist() == [True, True, False, False]


def test_copy_steps_fade():
    found = [[train.is_copy_step(step, 3000, seed) for step in range(3100)] for seed in (0, 1)]
    assert found[0] != found[1] and found[0][0] and not any(found[0][3000:] + found[1][3000:])
    for third, share in enumerate((26 / 27, 20 / 27, 8 / 27)):  # of 1 - x^2 over each third
        assert abs(sum(found[0][third * 1000 : third * 1000 + 1000]) / 1000 - share) < 0.05


def test_copy_steps_count_every_copy_alike(data, tmp_path, monkeypatch):
    """The loss of a step is the mean over its copies, however they fall into micro-batches."""
    monkeypatch.setattr(train, "COMMON", 1 / 20)
    some = ["--copy_steps=2", "--max_steps=6"]
    one = losses_of(run(data, tmp_path / "one", *some, "--micro_batch_size=4"))
    many = losses_of(run(data, tmp_path / "many", *some, "--micro_batch_size=1"))
    assert one == pytest.approx(many, rel=1e-4)
    monkeypatch.setattr(train, "COMMON", 0)
    none = losses_of(run(data, tmp_path / "none", *some))  # steps without a single target
    assert none[0] == 0 and none[5] > 1
    plain = losses_of(run(data, tmp_path / "plain", "--max_steps=6", "--micro_batch_size=4"))
    assert abs(plain[0] - one[0]) > 1e-3


def test_the_shuffle_is_even():
    """Each row comes first about equally often over many epochs: a chi-squared test with a wide margin."""
    firsts = np.bincount([train.shuffled(0, 20, key) for key in range(4000)], minlength=20)
    assert ((firsts - 200) ** 2 / 200).sum() < 60  # 19 degrees of freedom: 60 has a chance of 4e-6


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000])
def test_rows_of_steps_are_epochs_without_replacement(count):
    rows = [row for step in range(count) for row in train.rows_of_step(step, count, 3, seed=5)]
    epochs = [rows[i : i + count] for i in range(0, 3 * count, count)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 3
    if count > 10:
        assert epochs[0] != epochs[1] != epochs[2] != list(range(count))
        assert train.rows_of_step(2, count, 4, seed=5) == rows[8:12] != train.rows_of_step(2, count, 4, seed=6)


def test_a_row_overlaps_its_neighbour_by_the_one_token_that_is_only_a_target(data):
    rows = train.Sequences(data, "train", 16)
    raw = np.fromfile(data / "train.bin", dtype="<u2").astype(int)
    tokens, targets = rows.batch([0, 3])
    assert tokens[1].tolist() == raw[48:64].tolist() and targets[1].tolist() == raw[49:65].tolist()
    assert rows.count == (len(raw) - 1) // 16
    tokens, targets = rows.batch([rows.count])  # the rest of the file, filled up
    rest = raw[rows.count * 16 + 1 :].tolist()
    assert targets[0].tolist() == rest + [-100] * (16 - len(rest)) and tokens.min() >= 0
    rows.vocab_size = raw[48:65].max()  # as if one id were not in the vocabulary
    with pytest.raises(ValueError, match=f"train.bin has the id {rows.vocab_size} at or after token 48, and meta.json"):
        rows.batch([3])


@pytest.mark.skipif(sys.platform == "win32", reason="there a file with a hole takes up its whole length")
def test_rows_beyond_four_billion_bytes(data, tmp_path):
    meta, count = json.loads((data / "meta.json").read_text()), 2**32 + 5
    meta["train"]["tokens"] = count
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with open(tmp_path / "train.bin", "wb") as file:
        file.seek(2 * count - 10)
        file.write(np.arange(1, 6, dtype="<u2").tobytes())
    rows = train.Sequences(tmp_path, "train", 4)
    tokens, targets = rows.batch([rows.count - 1])
    assert rows.count == 2**30 + 1 and tokens.tolist() == [[1, 2, 3, 4]] and targets.tolist() == [[2, 3, 4, 5]]


def test_bits_per_byte_by_hand(tmp_path):
    data = make_data(tmp_path / "data", seed=1)
    rows = run(data, tmp_path / "run", "--eval_tokens=1000000")
    model, tokenizer = load_model(tmp_path / "run")
    raw = torch.from_numpy(np.fromfile(data / "val.bin", dtype="<u2").astype(np.int64))
    nats, size = 0.0, 0
    assert (len(raw) - 1) % 16  # the last sequence is shorter
    for start in range(0, len(raw) - 1, 16):
        tokens, targets = raw[start : start + 16][: len(raw) - 1 - start], raw[start + 1 : start + 17]
        nats += F.cross_entropy(model(tokens[None])[0][0].double(), targets, reduction="sum").item()
        words = [i for i in targets.tolist() if i not in tokenizer.special_tokens.values()]
        size += len(tokenizer.decode(words).encode())
    assert float(rows[-1]["val_loss"]) == pytest.approx(nats / (len(raw) - 1), rel=1e-5)
    assert float(rows[-1]["val_bpb"]) == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert size == json.loads((data / "meta.json").read_text())["val"]["bytes"]


# ---- Runs


def test_the_loss_falls_and_the_log_is_complete(data, tmp_path):
    rows = run(data, tmp_path / "run", "--max_steps=60", "--learning_rate=1e-2")
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    assert losses_of(rows)[-1] < 0.7 * losses_of(rows)[0]
    assert all((row["val_bpb"] != "") == (int(row["step"]) % 4 == 0) for row in rows)
    assert [int(row["tokens"]) for row in rows[:2]] == [64, 128]


MOE = ["--is_moe", "--num_experts=16", "--num_experts_per_tok=2"]


@pytest.mark.parametrize("extra", [[], MOE], ids=["dense", "moe"])  # with AdamW: the next tests
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(data, tmp_path, extra):
    extra = [*extra, "--optimizer=muon"]
    run(data, tmp_path / "whole", *extra)
    with stopped_after(6):
        assert len(run(data, tmp_path / "cut", *extra)) == 6  # two rows more than the checkpoint knows of
    resume(tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_the_same_command_line_starts_a_run_and_goes_on_with_it(data, whole, tmp_path):
    """What torchrun --max-restarts and job queues do, before the first checkpoint, after it, and after the end."""
    cut = tmp_path / "cut"
    for steps in (2, 6):
        with stopped_after(steps):
            run(data, cut, "--resume_or_start")
    for _ in range(2):
        run(data, cut, "--resume_or_start")
        assert_same_run(cut, whole)
    for option in ("--resume", "--resume_or_start"):
        with pytest.raises(ValueError, match=f"--overwrite replaces the run in .*, {option} goes on with it"):
            run(data, cut, "--overwrite", option)


def test_a_run_killed_between_its_checkpoint_and_its_row_loses_no_row(data, whole, tmp_path, monkeypatch):
    write_row = Run.write_row
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Run, "write_row", lambda self: 1 / 0 if self.step == 8 else write_row(self))
        run(data, tmp_path / "cut")
    resume(tmp_path / "cut")
    assert_same_run(tmp_path / "cut", whole)


def test_two_processes_go_on_where_one_was_stopped_and_one_where_they_were(data, tmp_path):
    """On the same rows in the same order, so the losses are those of one; the two divide the weights between them.
    (Four from the start, each with all weights: tests/test_sft.py; kills: tests/crash.py.)"""
    alone, two = run(data, tmp_path / "one", "--optimizer=muon"), tmp_path / "two"
    with stopped_after(6):
        run(data, two, "--optimizer=muon")
    torchrun = ["--standalone", "--nproc_per_node=2", str(HERE / "train.py"), f"--out_dir={two}"]
    torchrun += "--resume --shard --max_steps=8 --decay_steps=0 --keep_best".split()
    done = command(torch.distributed.run.main, torchrun, timeout=300)
    assert done.returncode == 0 and "2 processes" in done.stdout, done.stderr
    assert_same_weights(two / "best", two)
    rows = resume(two, "--max_steps=12", "--decay_steps=4", "--shard=false")
    assert_close_logs(alone, rows, ["loss", "val_bpb"], 1e-5)


def test_ranks_validate_a_moe_model_with_different_numbers_of_batches(data, tmp_path):
    """A collective in the network's forward pass, such as DDP's broadcast of buffers, would hang. DDP broadcasts in
    the first batch of a validation only, so here one rank has no batch."""
    extra = [*MOE, "--eval_tokens=16", "--micro_batch_size=1", "--max_steps=4", "--decay_steps=1"]  # one sequence
    alone, out = run(data, tmp_path / "one", *extra), tmp_path / "two"
    done = command(train.main, [*TINY, f"--data={data}", f"--out_dir={out}", *extra, "--patience=20"], processes=2)
    assert done.returncode == 0, done.stderr
    assert_close_logs(alone, log_of(out), ["loss", "val_bpb"], 1e-5)


def run_signalled(number, data, out, *options):
    """A run that gets a signal when its seventh step begins: it ends after that step, with a checkpoint."""
    rows_of_step = train.rows_of_step

    def interrupted(step, *rest):
        if step == 6:
            os.kill(os.getpid(), number)
        return rows_of_step(step, *rest)

    with patch.object(train, "rows_of_step", interrupted), pytest.raises(SystemExit) as stop:
        run(data, out, *options)
    assert stop.value.code == 128 + number
    assert load_training_state(out)["step"] == 7


def test_ctrl_c_saves_and_says_how_to_go_on(data, whole, tmp_path, capsys):
    run_signalled(signal.SIGINT, data, tmp_path / "run")
    assert "--resume" in capsys.readouterr().out
    resume(tmp_path / "run")
    assert "cost      5 steps, " in capsys.readouterr().out  # 7 of 12 are done
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_is_obeyed_where_the_loss_is_not_read_in_every_step(data, tmp_path, monkeypatch):
    """As on a GPU: the run ends after that step with a checkpoint all the same."""
    enter = Run.__enter__
    monkeypatch.setattr(Run, "__enter__", lambda self: setattr(self, "reads_every_step", False) or enter(self))
    rarely = "--log_every=100 --save_every=100 --eval_every=100 --decay_steps=0".split()
    run_signalled(signal.SIGTERM, data, tmp_path / "run", *rarely)


def test_init_from_the_stable_phase_goes_on_at_the_stable_rate(whole, tmp_path):
    stable = whole / "stable"
    assert load_training_state(stable)["step"] == 8  # the last step before the decay
    other = make_data(tmp_path / "other", seed=7)
    rows = run_from_config(other, tmp_path / "second", f"--init_from={stable}", "--warmup_steps=0")
    assert {float(row["lr"]) for row in rows[:8]} == {3e-3}  # no warm-up
    with_warmup = run_from_config(other, tmp_path / "third", f"--init_from={stable}", "--max_steps=7")
    assert [float(row["lr"]) for row in with_warmup[:3]] == [1.5e-3, 3e-3, 3e-3]  # as TINY asks
    assert losses_of(rows)[0] < losses_of(log_of(whole))[4]  # and no fresh start
    optimizer = load_training_state(tmp_path / "second")["optimizer"]
    assert optimizer["norm.weight"]["step"].item() == 20  # Adam went on counting: 8 + 12


def test_init_from_goes_on_with_the_recipe_of_its_checkpoint(data, tmp_path):
    """The README's line: no config, no option but the checkpoint, the data and the place."""
    run(data, tmp_path / "first", "--optimizer=muon")
    stable = tmp_path / "first" / "stable"
    options = train.read_options([f"--init_from={stable}", f"--data={data}", f"--out_dir={tmp_path / 'second'}"])
    assert (options.optimizer, options.batch_tokens, options.max_steps, options.hidden_size) == ("muon", 64, 12, 32)
    (tmp_path / "c.py").write_text(f"init_from = {str(stable)!r}\nmax_steps = 6\ndecay_steps = 2\n")
    assert train.read_options([str(tmp_path / "c.py")]).hidden_size == 32
    rows = run_from_config(data, tmp_path / "other", f"--init_from={stable}")  # adamw now: Muon's state is not for it
    assert len(rows) == 12
    with pytest.raises(ValueError, match="give the new run another folder"):
        run_from_config(data, tmp_path / "first", f"--init_from={stable}", "--overwrite")


def test_dense_to_moe_starts_where_the_dense_model_stood(data, whole, tmp_path):
    stable = whole / "stable"
    moe = [*MOE, f"--init_from={stable}", "--moe_warmup_steps=3"]
    rows = run_from_config(data, tmp_path / "moe", *moe, "--max_steps=4", "--decay_steps=1")
    dense = run_from_config(data, tmp_path / "on", f"--init_from={stable}", "--max_steps=4", "--decay_steps=1")
    assert rows[0]["loss"] == dense[0]["loss"]  # bit for bit
    run_from_config(data, tmp_path / "short", *moe, "--max_steps=3", "--decay_steps=0")
    before, after = weights(stable), weights(tmp_path / "short")
    assert all(torch.equal(before[name], after[name]) for name in before)  # three steps moved the experts alone
    assert after["model.layers.0.mlp.up_embed.weight"].abs().sum() > 0
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["model_type"] == "nanodoge"


def test_a_resumed_run_may_become_longer(whole, tmp_path):
    """By --max_steps; the config file it was started with, given again, does not change what the run is."""
    out = shutil.copytree(whole, tmp_path / "run")
    train.main([str(HERE / "config" / "tiny.py"), f"--out_dir={out}", "--resume"])
    assert len(log_of(out)) == 12
    assert len(resume(out, "--max_steps=14")) == 14


def test_a_finished_run_that_becomes_longer_goes_on_from_the_weights_before_the_decay(data, whole, tmp_path, capsys):
    """Without a jump of the learning rate from 0 to its peak: it equals a run that was to be so long from the start."""
    run(data, tmp_path / "long", "--max_steps=20")
    out = shutil.copytree(whole, tmp_path / "run")
    capsys.readouterr()
    resume(out, "--max_steps=20")
    assert f"from {out}/stable, step 8, for --max_steps=20 --decay_steps=4" in capsys.readouterr().out
    assert_same_run(out, tmp_path / "long")
    for options in (["--max_steps=22", "--decay_steps=7"], ["--max_steps=30"]):
        with pytest.raises(ValueError, match=r"falling since step 16; to go on otherwise takes .*/stable"):
            resume(out, *options)
        shutil.rmtree(out / "stable", ignore_errors=True)


def test_no_number_ends_at_32_bits(whole, tmp_path):
    """A run that has done more steps and seen more tokens than 32 bits count, on data with more rows and bytes."""
    state = load_training_state(whole) | dict(step=2**33, tokens=2**60)
    state["row"] |= dict(step=2**33)
    state["options"] |= dict(max_steps=2**33 + 4)
    out = shutil.copytree(whole, tmp_path / "run")
    save_checkpoint(out, *load_model(out), state)
    rows = resume(out, f"--max_steps={2**33 + 2}")
    assert [int(row["step"]) for row in rows[12:]] == [2**33, 2**33 + 1, 2**33 + 2]
    assert int(rows[-1]["tokens"]) == 2**60 + 128 and 0 < float(rows[-1]["lr"]) < float(rows[-2]["lr"])
    assert sorted(train.rows_of_step(10**12, 20, 20, seed=5)) == list(range(20))
    many = train.rows_of_step(2**31 // 500, 2**40, 1000, seed=5)
    assert len(set(many)) == 1000 and 2**38 < min(many) + max(many) < 2**41 and max(many) < 2**40


def test_a_vocabulary_rounded_up_trains_and_never_writes_an_id_without_a_token(data, tmp_path):
    run(data, tmp_path / "run", "--vocab_size=320", "--sample_tokens=40")
    model, tokenizer = load_model(tmp_path / "run")
    assert model.config.vocab_size == 320 > tokenizer.vocab_size


LESS_MEMORY = {
    "accumulation": ["--micro_batch_size=4", "--micro_batch_size=1"],
    "gradient checkpointing": ["--keep_window_size=5", "--keep_window_size=5 --gradient_checkpointing"],
}


@pytest.mark.parametrize("name", LESS_MEMORY)
def test_less_memory_changes_no_loss(data, tmp_path, name):
    a, b = (run(data, tmp_path / str(i), *options.split()) for i, options in enumerate(LESS_MEMORY[name]))
    assert_close_logs(a, b, ["loss"], 1e-5)


@pytest.mark.parametrize("extra", [[], MOE, ["--keep_window_size=5"]], ids=["dense", "moe", "beyond the window"])
def test_bf16_autocast_learns_like_fp32(data, tmp_path, extra):
    full, half = (run(data, tmp_path / dtype, f"--dtype={dtype}", *extra) for dtype in ("float32", "bfloat16"))
    assert losses_of(half)[-1] == pytest.approx(losses_of(full)[-1], rel=0.01)
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "bfloat16").values())


@pytest.mark.parametrize(
    "change, attention",
    [
        ([], "causal scaled_dot_product_attention, scores folded into the keys\n"),
        (["--keep_window_size=8"], "; beyond 8 tokens, chunks of live keys\n"),
        (["--attention=definition"], "by definition, every query with every key: slow\n"),
    ],
)
def test_before_the_first_step_a_run_says_what_it_costs_and_how_it_computes(data, tmp_path, capsys, change, attention):
    run(data, tmp_path / "run", "--max_steps=1", "--warmup_steps=0", "--decay_steps=0", "--copy_steps=0", *change)
    printed = [line for line in capsys.readouterr().out.splitlines(keepends=True) if " " in line]
    lines = dict(line.split(maxsplit=1) for line in reversed(printed))  # of several lines "step ..." the first
    assert lines["attention"].endswith(attention) and lines["device"].startswith("cpu")
    for label, said in dict(options="max_steps=1", model="parameters", data="epochs", step="micro-batches").items():
        assert said in lines[label]
    assert lines["cost"].startswith("1 steps, at most about") and "GB per process" in lines["cost"]


def test_where_torch_compile_fails_the_run_goes_on_and_says_so(data, tmp_path, monkeypatch, capsys):
    def broken(*batch):
        raise RuntimeError("No working C++ compiler found\nand a page of details")

    monkeypatch.setattr(torch, "compile", lambda model: broken)
    assert len(run(data, tmp_path / "run", "--compile=on")) == 12
    assert "eager, since torch.compile failed here: No working C++ compiler found\n" in capsys.readouterr().out


@pytest.mark.parametrize("config", sorted(path.name for path in (HERE / "config").glob("doge*.py")))
@pytest.mark.parametrize("steps", [8, 80, 12_345])
def test_every_recipe_takes_any_number_of_steps(config, steps):
    """The phases are shares of it; given as numbers they stay what they are."""
    config = str(HERE / "config" / config)
    options = train.read_options([config, f"--max_steps={steps}", "--out_dir=nowhere"])
    assert options.warmup_steps in (0, round(steps / 10)) and options.decay_steps == round(steps / 10)
    options = train.read_options([config, "--max_steps=9", "--warmup_steps=4", "--decay_steps=1"])
    assert (options.warmup_steps, options.decay_steps) == (4, 1)


def test_a_text_of_ones_own_has_its_own_recipe(data, tmp_path):
    """Steps from its size, no steps of copies, unless they are asked for; the built-in stories have 600 and 300."""
    machine, folder = train.Machine("cpu", "auto", 600), shutil.copytree(data, tmp_path / "text")
    asked = ["--max_steps=31", "--copy_steps=0.5", "--decay_steps=7"]
    for source, extra, expected in (("stories", [], (20, 10, 7)), ("x", [], (20, 0, 7)), ("x", asked, (31, 16, 7))):
        meta = json.loads((data / "meta.json").read_text()) | dict(source=[source])
        (folder / "meta.json").write_text(json.dumps(meta))
        options = train.read_options([f"--data={folder}", f"--out_dir={tmp_path / 'run'}", *extra])
        train.open_data(options, machine)
        assert (options.max_steps, options.copy_steps, options.decay_steps) == expected
    assert [train.stage.good_steps(tokens, 4096) for tokens in (10**3, 300_000, 3 * 10**6)] == [20, 440, 600]


def test_a_rising_validation_loss_is_said_and_the_best_model_kept_if_asked(data, tmp_path, monkeypatch, capsys):
    """Though the run was killed after it, and knows of it from its log alone."""
    losses, out = iter((3.0, 1.0, 2.0)), tmp_path / "run"
    monkeypatch.setattr(train, "evaluate", lambda *rest: dict(val_loss=next(losses), val_bpb=0.0))
    with stopped_after(9):
        run(data, out, "--keep_best")
    run(data, out, "--keep_best", "--resume_or_start")
    assert_same_weights(out / "best", out / "stable")  # of step 8
    assert not torch.equal(*(weights(folder)["model.norm.weight"] for folder in (out, out / "best")))
    assert capsys.readouterr().out.count("val_loss has risen from 1.0000; the model learns its text by heart") == 1


# ---- Refusals: one line, and nothing that was there is touched

REFUSED = """
--sequence_length=100000 | sequence_length=100000 is longer than the data
--batch_tokens=100 | batch_tokens=100 is not a multiple
--micro_batch_size=3 | not a multiple
--warmup_steps=50 | do not fit into --max_steps
--warmup_steps=2.5 | neither a share below 1 nor a whole number
--decay=sudden | not one of linear, cosine, 1-sqrt
--vocab_size=20 | vocab_size=20 is smaller than the
--hidden_size=33 | hidden_size=33
--data=nowhere | nowhere
--init_from=nowhere | no checkpoint folder 'nowhere'
--resume | no run to go on with
--patience=0 | patience=0 must be from 1
--moe_warmup_steps=3 | no experts to train first
--initializer_range=-1 | initializer_range=-1.0
--seed=100000000000000000000 | seed: .100000000000000000000. is not a whole number below 2.63
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_bad_options_are_named(data, tmp_path, case):
    assert_refused(functools.partial(run, data), tmp_path / "run", case)


DAMAGED = [  # a file, how many of its bytes are left, other entries of meta.json, the error
    ("train.bin", -3, dict(), "not written to its end"),
    ("train.bin", 0, dict(train=dict(tokens=0)), "longer than the data"),
    ("train.bin", 2, dict(train=dict(tokens=1)), "longer than the data"),
    ("val.bin", 0, dict(val=dict(tokens=0)), "too few to validate on"),
    ("meta.json", None, dict(tokenizer_sha256="0" * 64), "sha256 differs"),
    ("meta.json", None, dict(train=None), "damaged"),
    ("meta.json", None, dict(source=0.5), "damaged"),
    ("meta.json", 1, dict(), "damaged"),
]


@pytest.mark.parametrize("name, size, changes, words", DAMAGED)
def test_damaged_data_is_refused(tmp_path, name, size, changes, words):
    folder = make_data(tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    with pytest.raises(ValueError, match=words):
        run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_exists_is_not_overwritten_unasked(data, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    before = files_of(out)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes(before["config.json"])  # a copy that was cut off
    other, new = make_data(tmp_path / "other", vocab_size=290), tmp_path / "new"
    refused = [
        ("holds a run already", run, data, out),
        ("half holds a run already", run, data, tmp_path / "half"),
        ("config.json is not a folder", run, data, out / "config.json"),
        ("seed=1: the run in .* has 233", resume, out, "--seed=1"),
        ("another tokenizer", run_from_config, other, new, f"--init_from={out}"),
        ("hidden_size=64: the model of", run_from_config, data, new, f"--init_from={out}", "--hidden_size=64"),
    ]
    for words, command_line, *arguments in refused:
        with pytest.raises(ValueError, match=words):
            command_line(*arguments)
    assert files_of(out) == before
    (out / "mine.txt").write_text("not the run's")
    assert len(run(data, out, "--overwrite", "--max_steps=6", "--decay_steps=0")) == 6
    assert (out / "mine.txt").exists()
    assert not (out / "stable" / "model.safetensors").exists()  # that of the run that was given up


def test_a_run_that_replaces_another_is_never_mixed_with_it(data, whole, tmp_path):
    """Killed before its first checkpoint it leaves the old model, with nothing to resume to the new log."""
    out = shutil.copytree(whole, tmp_path / "run")
    with stopped_after(3):
        run(data, out, "--overwrite", "--seed=1")
    with pytest.raises(ValueError, match="no run to go on with"):
        resume(out)
    assert_same_weights(out, whole)
    assert not (out / "stable" / "model.safetensors").exists()


def test_a_run_in_the_folder_that_holds_other_runs_leaves_them_alone(data, whole, tmp_path):
    one = shutil.copytree(whole, tmp_path / "out" / "one")
    run(data, tmp_path / "out")
    assert files_of(one) == files_of(whole)


def assert_last_good(out):
    """Asserts that the checkpoint of step 4 is the newest, and finite."""
    assert load_training_state(out)["step"] == 4
    assert all(w.isfinite().all() for w in weights(out).values())


def test_a_poisoned_weight_is_never_saved(data, tmp_path, monkeypatch):
    """Not even one that no loss depends on: the embedding of an id that the data has not."""
    end_step, options = Run.end_step, ["--vocab_size=320", "--tie_word_embeddings=false"]

    def poisoned(self, at=5, **keywords):
        if self.step == at:
            self.model.embed_tokens.weight.data[319, 0] = math.nan
        end_step(self, **keywords)

    monkeypatch.setattr(Run, "end_step", poisoned)
    with pytest.raises(ValueError, match="weights nan at step 8: stopped; .* holds the last good checkpoint"):
        run(data, tmp_path / "run", *options)
    assert_last_good(tmp_path / "run")
    monkeypatch.setattr(Run, "end_step", lambda self, **keywords: poisoned(self, at=1, **keywords))
    with pytest.raises(ValueError, match="at step 4: stopped; nothing was saved yet"):
        run(data, tmp_path / "new", *options)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    real, calls = train.wsd, []

    def broken(step, *rest):
        calls.append(step)
        return math.nan if step == 5 else real(step, *rest)

    monkeypatch.setattr(train, "wsd", broken)
    with pytest.raises(ValueError, match=r"nan.* at step 7: stopped; .* holds the last good checkpoint"):
        run(data, tmp_path / "run")
    assert calls[-1] == 6
    assert_last_good(tmp_path / "run")


def test_an_interrupted_evaluation_costs_no_checkpoint(data, tmp_path, monkeypatch):
    """Out of memory while validating, the peers' lost nights: the checkpoint of that step is on the disk by then."""
    evaluate, count = train.evaluate, iter(range(9))
    monkeypatch.setattr(train, "evaluate", lambda *rest: evaluate(*rest) if next(count) == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(data, tmp_path / "run")
    assert load_training_state(tmp_path / "run")["step"] == 8


def test_out_of_memory_is_known_before_the_first_step(data, tmp_path, monkeypatch):
    def full(*rest):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(Doge, "forward", full)
    with pytest.raises(ValueError, match="micro_batch_size=2: out of memory"):
        run(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line_ends_a_mistake_with_one_line_and_status_2(data, tmp_path):
    """Here: no permission to write, by the one means that stops root too, a file where a folder is wanted."""
    (tmp_path / "file").write_text("in the way")
    done = command(train.main, [*TINY, f"--data={data}", f"--out_dir={tmp_path / 'file' / 'run'}"])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and str(tmp_path / "file") in done.stderr


# ---- Recipes

RECIPES = {path.stem: path for path in sorted((HERE / "config").glob("*.py"))}
TUNING = [name for name in RECIPES if name.startswith(("sft", "dpo", "grpo"))]


@pytest.mark.parametrize("name", TUNING)
def test_every_tuning_recipe_is_valid_also_for_the_sizes_in_its_docstring(name):
    stage = name.split("_")[0]
    options_class = getattr(importlib.import_module(stage), f"{stage.capitalize()}Options")
    lines = [line.split() for line in RECIPES[name].read_text().splitlines()]
    sizes = [[], *(flags for flags in lines if flags and flags[0].startswith("--init_from="))]
    assert len(sizes) == (1 if "tiny" in name else 4)
    for flags in sizes:
        options = parse_options(options_class, [str(RECIPES[name]), *flags])
        model = re.search(r"doge\d+m", options.init_from)
        assert options.out_dir.endswith(model[0] if model else options.data.rpartition("/")[2])


PARAMETERS = dict(doge20m=13_118_728, doge60m=54_571_552, doge160m=152_676_168, doge320m=335_750_272)  # as published
PARAMETERS |= dict(doge20m_moe=17_444_104, doge60m_moe=122_728_992, doge160m_moe=495_953_736)
PARAMETERS |= dict(doge320m_moe=1_417_880_704)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in (*TUNING, "smollm_corpus")])
def test_every_recipe_is_valid_and_its_model_has_the_size_that_it_names(name):
    path = str(RECIPES[name])
    options = parse_options(train.TrainOptions, [path])
    if "_moe" in name:
        options = parse_options(train.TrainOptions, [path.replace("_moe", ""), path])
    else:
        assert options.batch_tokens % (options.micro_batch_size * options.sequence_length) == 0
    if size := re.search(r"([\d.,]+)(M) parameters", RECIPES[name].read_text()):
        fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(DogeConfig)}
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Doge(DogeConfig(**fields)).parameters())
        assert f"{parameters / 1e6:,.1f}" == size[1] and parameters == PARAMETERS.get(name, parameters)
