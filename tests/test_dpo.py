"""dpo.py: log-probabilities, losses and gradients against transformers' Doge in float64 and the formulas written out;
and a test for each way in which users of such stages were hurt: a reference that drifts, ties counted as wins, prompts
or padding that take part, answers cut in the middle."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_close_logs, assert_same_run, gradients_seen, make_checkpoint, make_set, stopped_after, tune
from transformers import AutoModelForCausalLM

import dpo
import train
from nanodoge.checkpoint import load_model, load_training_state, save_checkpoint
from nanodoge.examples import TokenSet
from nanodoge.machine import Machine
from nanodoge.policy import Policy
from nanodoge.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory, base):
    return make_set(tmp_path_factory.mktemp("data") / "pairs", base, "preferences", count=70)


@pytest.fixture(scope="module")
def pairs(data):
    return selected(TokenSet(data, "train", "preferences"))


@pytest.fixture(scope="module")
def reference(base):
    return float64(base).requires_grad_(False)


def selected(token_set, length=64):
    return dpo.select(token_set, dpo.DpoOptions(sequence_length=length))


def run(base, data, out, *options, **processes):
    return tune(dpo.main, base, data, out, *options, **processes)


def float64(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()


def logp_by(model, row):
    """The log-probability of one answer by transformers' model: one row, no padding, no code of ours."""
    ids, mask = (torch.from_numpy(x) for x in row)
    logits = model(ids[None, :-1]).logits[0]
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0][mask[1:]].sum()


# ---- What is compared


@pytest.mark.parametrize("length", [20, 40, 55, 200])
def test_pairs_too_long_are_left_out_and_counted(data, length):
    part, eos_id, kept = TokenSet(data, "train", "preferences"), Tokenizer.load(data).eos_id, []
    for i in range(0, len(part), 2):
        fits = [np.flatnonzero(part.conversation(i + k)[1])[-1] <= length for k in range(2)]
        kept += [i] if all(fits) else []
    if not kept:
        with pytest.raises(ValueError, match=f"no pairs to use: {len(part) // 2} longer than"):
            selected(part, length)
        return
    pairs = selected(part, length)
    assert pairs.first.tolist() == kept and [*pairs.left_out.values()] == [len(part) // 2 - len(kept)]
    for i in range(pairs.count):
        for k, (ids, mask) in enumerate(pairs.rows(i)):
            whole, learned = part.conversation(kept[i] + k)
            assert ids.tolist() == whole[: len(ids)].tolist() and mask.sum() == learned.sum()
            assert ids[-1] == eos_id and mask[-1]
            assert pairs.targets[i, k] == mask.sum() and pairs.sizes[i, k] == len(ids) - 1
        assert pairs.lengths[i] == 2 * pairs.sizes[i].max()


# ---- Log-probabilities, losses, gradients


def test_log_probabilities_equal_float64_whatever_the_company(base, pairs, reference, monkeypatch):
    """Alone or with others, and whatever fills the rows."""
    machine, model = Machine("cpu", "float32"), Policy(load_model(base)[0])
    with torch.no_grad():
        wanted = torch.stack([torch.stack([logp_by(reference, row) for row in pairs.rows(i)]) for i in range(8)]).T
        for filling in (2, 7):
            monkeypatch.setattr(pairs.set, "tokenizer", SimpleNamespace(pad_id=filling))
            found = dpo.answer_logp(model, pairs, range(8), machine)[0]
            torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-5)
        for i in (0, 5, 7):
            alone = dpo.answer_logp(model, pairs, [i], machine)[0].double()
            torch.testing.assert_close(alone, wanted[:, i : i + 1], rtol=1e-6, atol=1e-5)


def formula(options, policy, reference, sizes):
    """The loss of a pair, from the papers: floats in, float out, chosen before rejected."""
    ratio = [p - r for p, r in zip(policy, reference, strict=True)]
    mean = [x / n for x, n in zip(ratio, sizes, strict=True)]
    if options.loss == "sigmoid":
        return torch.log1p(torch.exp(-options.beta * (ratio[0] - ratio[1])))
    if options.loss == "sigmoid_norm":
        return torch.log1p(torch.exp(-options.beta * (mean[0] - mean[1])))
    return (mean[0] - mean[1] - 1 / (2 * options.beta)) ** 2


@pytest.mark.parametrize("loss, size", [("sigmoid", 128), ("sigmoid_norm", 256), ("ipo", 10_000)])
def test_loss_and_gradient_of_a_later_step_equal_float64(
    base, data, pairs, reference, tmp_path, monkeypatch, loss, size
):
    """Of the second step, when the model is no longer its reference; with a batch that no micro-batch divides, and the
    output matrix in pieces."""
    monkeypatch.setattr("nanodoge.losses.rows_at_once", lambda *_: 7)
    extra = f"--loss={loss} --micro_batch_tokens={size} --max_steps=2 --grad_clip=0 --batch_size=7".split()
    with gradients_seen() as seen:
        log = run(base, data, tmp_path / "run", *extra)
    model, tokenizer = load_model(base)
    with torch.no_grad():
        for p, (value, _) in zip(model.parameters(), seen[1], strict=True):
            p.copy_(value)
    save_checkpoint(tmp_path / "now", model, tokenizer)
    policy, options, losses = float64(tmp_path / "now"), dpo.DpoOptions(loss=loss), []
    for i in train.rows_of_step(1, pairs.count, 7, 233):
        before = [logp_by(reference, row) for row in pairs.rows(i)]
        losses.append(formula(options, [logp_by(policy, row) for row in pairs.rows(i)], before, pairs.targets[i]))
    wanted = torch.stack(losses).mean()
    wanted.backward()
    assert float(log[2]["loss"]) == pytest.approx(wanted.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    for (name, _), (_, found) in zip(model.named_parameters(), seen[1], strict=True):
        grad = gradients[f"model.{name}"]
        assert (found - grad).norm() <= 1e-5 * max(grad.norm(), 1e-2), name
    assert all(math.isfinite(float(log[2][name])) for name in ("kl", "margin", "chosen_reward", "rejected_reward"))


def test_losses_and_columns_by_hand():
    """Log-ratios of 2 and -1 over 4 and 2 tokens: 0.5 and -0.5 a token."""
    logp, reference = torch.tensor([[-8.0], [-5.0]]), torch.tensor([[-10.0], [-4.0]])
    sizes = torch.tensor([[4], [2]])
    for loss, wanted, beta in (
        ("sigmoid", math.log(1 + math.exp(-0.3)), 0.1),
        ("ipo", 16.0, 0.1),
        ("sigmoid_norm", math.log(1 + math.exp(-5)), 5.0),
    ):
        chosen, rejected = (2, -1) if loss == "sigmoid" else (0.5, -0.5)
        values = dpo.compare(logp, reference, sizes, dpo.DpoOptions(loss=loss))
        rewards = dict(chosen_reward=beta * chosen, rejected_reward=beta * rejected, margin=beta * (chosen - rejected))
        assert {name: x.item() for name, x in values.items()} == pytest.approx(
            dict(loss=wanted, accuracy=1, chosen_logp=-8, kl=1.25, **rewards)
        )
    assert dpo.DpoOptions(loss="sigmoid_norm", beta=2.0).beta == 2.0


def test_ties_are_not_won():
    logp = torch.tensor([[1.0, 1.0, 1.05, 1.15], [1.0, 2.0, 1.0, 1.0]])
    for loss in dpo.BETA:  # alike, whether sums or means are compared
        won = dpo.compare(logp, torch.zeros(2, 4), torch.full((2, 4), 20), dpo.DpoOptions(loss=loss))["accuracy"]
        assert won.tolist() == [0, 0, 0, 1], loss


def test_a_run_starts_at_ln_2_without_wins_and_a_rate_of_zero_keeps_it_there(base, data, pairs, tmp_path):
    """And the reference was asked about the pairs that are used, and no others."""
    log = run(base, data, tmp_path / "run", "--learning_rate=0", "--max_steps=3", "--eval_every=1", "--batch_size=5")
    names = (tmp_path / "run" / "log.csv").read_text().splitlines()[0].split(",")
    assert len(set(names)) == len(names)  # a column twice would lose one of its values in csv.DictReader
    known = load_training_state(tmp_path / "run")["reference"]["train"].isfinite().all(1)
    used = [i for step in range(3) for i in train.rows_of_step(step, pairs.count, 5, 233)]
    assert known.nonzero()[:, 0].tolist() == sorted(used)
    for row in log[1:]:
        assert float(row["loss"]) == pytest.approx(math.log(2), abs=1e-6)
        assert all(abs(float(row[name])) < 1e-5 for name in ("margin", "chosen_reward", "rejected_reward", "kl"))
    for row in log:  # the first is of the model as it came
        assert float(row["val_loss"]) == pytest.approx(math.log(2), abs=1e-6)
        assert float(row["accuracy"] or 0) == float(row["val_accuracy"]) == 0


def test_validation_by_hand_and_it_learns(base, data, reference, tmp_path):
    """The rejected answers say `not`: that is learned. The figures are those of transformers' model in float64."""
    log = run(base, data, tmp_path / "run", "--eval_every=12", "--learning_rate=1e-2", "--eval_size=9")
    assert float(log[-1]["loss"]) < 0.5 and float(log[-1]["accuracy"]) > 0.7
    policy, options = float64(tmp_path / "run"), dpo.DpoOptions()
    val = selected(TokenSet(data, "val", "preferences"))
    rows = [val.rows(i) for i in range(min(9, val.count))]
    with torch.no_grad():
        now, before = ([[logp_by(model, row) for row in pair] for pair in rows] for model in (policy, reference))
    losses = [formula(options, a, b, [1, 1]).item() for a, b in zip(now, before, strict=True)]
    margins = [0.1 * ((a[0] - b[0]) - (a[1] - b[1])).item() for a, b in zip(now, before, strict=True)]
    assert float(log[-1]["val_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(log[-1]["val_margin"]) == pytest.approx(np.mean(margins), rel=1e-4)
    assert float(log[-1]["val_accuracy"]) == pytest.approx(np.mean([margin > 0.1 * dpo.TIE for margin in margins]))
    assert float(log[-1]["val_chosen_logp"]) == pytest.approx(np.mean([a[0] for a in now]), rel=1e-5)


# ---- Runs


def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(base, data, pairs, reference, tmp_path):
    """And the reference does not drift, even if the model that it was has been overwritten since."""
    start = shutil.copytree(base, tmp_path / "start")
    run(base, data, tmp_path / "whole", "--max_steps=8")
    with stopped_after(6):
        run(start, data, tmp_path / "cut", "--max_steps=8")
    make_checkpoint(start, seed=1)
    dpo.main([f"--out_dir={tmp_path / 'cut'}", "--resume"])
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    kept = load_training_state(tmp_path / "cut")["reference"]
    for i in range(0, pairs.count, 5):
        wanted = torch.stack([logp_by(reference, row) for row in pairs.rows(i)]).float()
        torch.testing.assert_close(kept["train"][i], wanted, rtol=1e-6, atol=1e-5)
    assert kept["train"].isfinite().all() and kept["val"].isfinite().all()
    state = load_training_state(tmp_path / "cut")
    state["reference"]["val"] = state["reference"]["val"][:-1]
    torch.save(state, tmp_path / "cut" / "training_state.pt")
    with pytest.raises(ValueError, match="began with other pairs than the .* of the val split"):
        dpo.main([f"--out_dir={tmp_path / 'cut'}", "--resume"])


def test_two_processes_equal_one(base, data, tmp_path):
    alone = run(base, data, tmp_path / "one", "--max_steps=4")
    names = "loss grad_norm accuracy margin chosen_reward rejected_reward kl val_loss val_accuracy val_chosen_logp"
    assert_close_logs(alone, run(base, data, tmp_path / "two", "--max_steps=4", processes=2), names.split(), 1e-4)


def test_before_the_first_step_an_example_shows_what_is_compared(base, data, tmp_path, capsys):
    run(base, data, tmp_path / "run", "--max_steps=1", "--sequence_length=58")
    out, short = capsys.readouterr().out, selected(TokenSet(data, "train", "preferences"), 58)
    prompt, _, rest = out.partition("chosen answer first:\n\n")[2].partition("{+")
    chosen, _, rest = rest.partition("+}\n\n{-")
    assert prompt.startswith("<|begin_of_text|>") and prompt.endswith("assistant<|end_header_id|>\n")
    assert chosen.endswith("<|end_of_text|>") and rest.partition("-}")[0].endswith(" not<|end_of_text|>")
    count = short.left_out["longer than --sequence_length=58"]
    assert count and f"{count} train pairs longer than --sequence_length=58" in out


def test_a_model_with_experts_in_bfloat16(data, tmp_path):
    experts = dict(is_moe=True, num_experts=16, num_experts_per_tok=2, router_aux_loss_coef=0.01)
    start = make_checkpoint(tmp_path / "start", keep_window_size=16, **experts)
    extra = "--dtype=bfloat16 --max_steps=3 --learning_rate=1e-2 --gradient_checkpointing".split()
    log = run(start, data, tmp_path / "run", *extra)
    assert float(log[1]["loss"]) == pytest.approx(math.log(2) + 0.01, abs=0.01)
    assert float(log[-1]["loss"]) < float(log[1]["loss"]) and float(log[-1]["accuracy"]) > 0.5
