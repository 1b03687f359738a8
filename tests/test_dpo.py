"""dpo.py: log-probabilities, losses and gradients against transformers' Doge in float64 and the formulas written out;
and a test for each way in which users of such stages were hurt: a reference that drifts, ties counted as wins, prompts
or padding that take part, answers cut in the middle."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import TUNE, VOLATILE, command, make_checkpoint, make_set, rows_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dpo
import prepare_data
import sft
import train
from nanodoge.checkpoint import load_model, load_training_state, save_checkpoint
from nanodoge.conversations import TokenSet, pad
from nanodoge.machine import Machine
from nanodoge.run import Run, read_log
from nanodoge.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("out") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory, base):
    return make_set(tmp_path_factory.mktemp("data") / "pairs", base, "preferences", count=70)


@pytest.fixture(scope="module")
def pairs(data):
    return dpo.Pairs(TokenSet(data, "train", "preferences"), 64)


@pytest.fixture(scope="module")
def reference(base):
    return float64(base).requires_grad_(False)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr("nanodoge.run.plot_loss", lambda *paths: None)  # tested elsewhere, and longer than these runs


def run(base, data, out, *options):
    dpo.main([*TUNE, f"--init_from={base}", f"--data={data}", f"--out_dir={out}", *options])
    return read_log(out / "log.csv")


def steady(rows):
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]


def float64(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()


def logp_by(model, row):
    """The log-probability of one answer by transformers' model: one row, no padding, no code of ours."""
    ids, mask = (torch.from_numpy(x) for x in row)
    logits = model(ids[None, :-1]).logits[0]
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0][mask[1:]].sum()


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def test_only_the_answers_and_their_ends_are_compared(data, pairs):
    """Read from the text with nothing but the template's tags."""
    tokenizer, part = Tokenizer.load(data), TokenSet(data, "train", "preferences")
    header = "<|start_header_id|>assistant<|end_header_id|>\n"
    for i in range(pairs.count):
        rows, prompts = pairs.pair(i), []
        for k, (ids, mask) in enumerate(rows):
            prompt, _, answer = tokenizer.decode(part.conversation(pairs.places[i] + k)[0]).rpartition(header)
            prompts.append(prompt)
            _, targets, _ = pad([(ids, mask)], tokenizer.pad_id)
            compared = targets[targets >= 0].tolist()
            assert tokenizer.decode(compared) == answer.partition("<|end_of_text|>")[0] + "<|end_of_text|>"
            assert pairs.answers[i, k] == len(compared) and pairs.rows[i, k] == len(ids) - 1
        assert prompts[0] == prompts[1] and rows[0][0].tolist() != rows[1][0].tolist()
        assert ("not<|end_of_text|>" in tokenizer.decode(rows[1][0])) and pairs.lengths[i] == 2 * pairs.rows[i].max()


@pytest.mark.parametrize("length", [20, 40, 55, 200])
def test_pairs_too_long_are_left_out_and_counted(data, length):
    part, eos_id, kept = TokenSet(data, "train", "preferences"), Tokenizer.load(data).eos_id, []
    for i in range(0, len(part), 2):
        fits = [np.flatnonzero(part.conversation(i + k)[1])[-1] <= length for k in range(2)]
        kept += [i] if all(fits) else []
    pairs = dpo.Pairs(part, length)
    assert pairs.places == kept and (pairs.too_long, pairs.no_choice) == (len(part) // 2 - len(kept), 0)
    for i in range(pairs.count):
        assert all(ids[-1] == eos_id and mask[-1] for ids, mask in pairs.pair(i))


def test_equal_and_empty_answers_are_no_choice():
    """What prepare_data.py does not write, others may."""
    prompt, eos = [0, 7, 8], 1
    sets = [[5, eos], [5, eos], [eos], [5, eos], [5, eos], [eos], [5, eos], [5, 6, eos]]
    rows = [(np.array(prompt + answer + [9]), np.array([0] * 3 + [1] * len(answer) + [0], bool)) for answer in sets]
    rows += [(rows[0][0], np.zeros(6, bool)), rows[1]]
    fake = type("Fake", (), dict(conversation=lambda self, i: rows[i], __len__=lambda self: len(rows)))()
    pairs = dpo.Pairs(fake, 10)
    assert pairs.places == [6] and (pairs.too_long, pairs.no_choice) == (0, 4)
    assert pairs.rows.tolist() == [[4, 5]] and pairs.answers.tolist() == [[2, 3]]
    assert dpo.Pairs(fake, 4).count == 0 and dpo.Pairs(fake, 4).lengths.shape == (0,)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities, losses, gradients


def test_log_probabilities_equal_float64_whatever_the_company(base, pairs, reference, monkeypatch):
    """Alone or with others, whatever fills the rows, and in pieces of any size."""
    machine, model = Machine("cpu", "float32"), dpo.Policy(load_model(base)[0])
    rows = [row for i in range(8) for row in pairs.pair(i)]
    with torch.no_grad():
        wanted = torch.stack([logp_by(reference, row) for row in rows])
        for filling, size in ((2, 256), (7, 5)):
            monkeypatch.setattr("nanodoge.losses.LOSS_ROWS", size)
            monkeypatch.setattr("nanodoge.losses.LOSS_ELEMENTS", 1)
            found = dpo.answer_logp(model, rows, filling, machine)[0]
            torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-5)
        for i in (0, 5, 15):
            alone = dpo.answer_logp(model, rows[i : i + 1], 2, machine)[0].double()
            torch.testing.assert_close(alone, wanted[i : i + 1], rtol=1e-6, atol=1e-5)


def formula(options, policy, reference, sizes):
    """The loss of a pair, from the papers: floats in, float out, chosen before rejected."""
    ratio = [p - r for p, r in zip(policy, reference, strict=True)]
    mean = [x / n for x, n in zip(ratio, sizes, strict=True)]
    if options.loss == "sigmoid":
        return torch.log1p(torch.exp(-options.beta * (ratio[0] - ratio[1])))
    if options.loss == "sigmoid_norm":
        return torch.log1p(torch.exp(-options.beta * (mean[0] - mean[1])))
    return (mean[0] - mean[1] - 1 / (2 * options.beta)) ** 2


@pytest.mark.parametrize("loss, micro_batch_tokens", [("sigmoid", 128), ("sigmoid_norm", 256), ("ipo", 10_000)])
def test_loss_and_gradient_of_a_later_step_equal_float64(base, data, pairs, reference, tmp_path, monkeypatch, loss,
                                                         micro_batch_tokens):  # fmt: skip
    """Of the second step, when the model is no longer its reference; and with a batch that no micro-batch divides."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        seen.append([(p.detach().clone(), p.grad.clone()) for p in parameters])
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    log = run(base, data, tmp_path / "run", f"--loss={loss}", f"--micro_batch_tokens={micro_batch_tokens}",
              "--max_steps=2", "--grad_clip=0", "--batch_size=7")  # fmt: skip
    model, tokenizer = load_model(base)
    with torch.no_grad():
        for p, (value, _) in zip(model.parameters(), seen[1], strict=True):
            p.copy_(value)
    save_checkpoint(tmp_path / "now", model, tokenizer)
    policy, options, losses = float64(tmp_path / "now"), dpo.DpoOptions(loss=loss), []
    for i in train.rows_of_step(1, pairs.count, 7, 233):
        before = [logp_by(reference, row) for row in pairs.pair(i)]
        losses.append(formula(options, [logp_by(policy, row) for row in pairs.pair(i)], before, pairs.answers[i]))
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
    values = {loss: dpo.compare(logp, reference, sizes, dpo.DpoOptions(loss=loss)) for loss in dpo.BETA}
    values = {loss: {name: x.item() for name, x in columns.items()} for loss, columns in values.items()}
    assert values["sigmoid"] == pytest.approx(dict(loss=math.log(1 + math.exp(-0.3)), accuracy=1, margin=0.3,
                                                   chosen_reward=0.2, rejected_reward=-0.1, kl=1.25))  # fmt: skip
    assert values["ipo"] == pytest.approx(dict(loss=16.0, accuracy=1, margin=0.1, chosen_reward=0.05,
                                               rejected_reward=-0.05, kl=1.25))  # fmt: skip
    assert values["sigmoid_norm"] == pytest.approx(dict(loss=math.log(1 + math.exp(-5)), accuracy=1, margin=5.0,
                                                        chosen_reward=2.5, rejected_reward=-2.5, kl=1.25))  # fmt: skip
    assert dpo.DpoOptions(loss="sigmoid_norm", beta=2.0).beta == 2.0


def test_ties_are_not_won():
    logp = torch.tensor([[1.0, 1.0, 1.05, 1.15], [1.0, 2.0, 1.0, 1.0]])
    for loss in dpo.BETA:  # alike, whether sums or means are compared
        won = dpo.compare(logp, torch.zeros(2, 4), torch.full((2, 4), 20), dpo.DpoOptions(loss=loss))["accuracy"]
        assert won.tolist() == [0, 0, 0, 1], loss


def test_a_run_starts_at_ln_2_without_wins_and_a_rate_of_zero_keeps_it_there(base, data, pairs, tmp_path):
    """And the reference was asked about the pairs that are used, and no others."""
    log = run(base, data, tmp_path / "run", "--learning_rate=0", "--max_steps=3", "--eval_every=1", "--batch_size=5")
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
    val = dpo.Pairs(TokenSet(data, "val", "preferences"), 64)
    rows = [val.pair(i) for i in range(min(9, val.count))]
    with torch.no_grad():
        now, before = ([[logp_by(model, row) for row in pair] for pair in rows] for model in (policy, reference))
    losses = [formula(options, a, b, [1, 1]).item() for a, b in zip(now, before, strict=True)]
    margins = [0.1 * ((a[0] - b[0]) - (a[1] - b[1])).item() for a, b in zip(now, before, strict=True)]
    assert float(log[-1]["val_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(log[-1]["val_margin"]) == pytest.approx(np.mean(margins), rel=1e-4)
    assert float(log[-1]["val_accuracy"]) == pytest.approx(np.mean([margin > 0.1 * dpo.TIE for margin in margins]))
    assert float(log[-1]["val_chosen_logp"]) == pytest.approx(np.mean([a[0] for a in now]), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(base, data, pairs, reference, tmp_path, monkeypatch):
    """And the reference does not drift, even if the model that it was has been overwritten since."""
    start = shutil.copytree(base, tmp_path / "start")
    whole = run(base, data, tmp_path / "whole", "--max_steps=8")
    end_step = Run.end_step
    monkeypatch.setattr("nanodoge.run.Run.end_step", lambda self, **a: 1 / 0 if self.step == 6 else end_step(self, **a))
    with pytest.raises(ZeroDivisionError):
        run(start, data, tmp_path / "cut", "--max_steps=8")
    monkeypatch.setattr("nanodoge.run.Run.end_step", end_step)
    make_checkpoint(start, seed=1)
    dpo.main([f"--out_dir={tmp_path / 'cut'}", "--resume"])
    assert steady(read_log(tmp_path / "cut" / "log.csv")) == steady(whole)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    kept = load_training_state(tmp_path / "cut")["reference"]
    for i in range(0, pairs.count, 5):
        wanted = torch.stack([logp_by(reference, row) for row in pairs.pair(i)]).float()
        torch.testing.assert_close(kept["train"][i], wanted, rtol=1e-6, atol=1e-5)
    assert kept["train"].isfinite().all() and kept["val"].isfinite().all()
    with pytest.raises(ValueError, match="beta=0.2: the run in .* has 0.1"):
        dpo.main([f"--out_dir={tmp_path / 'cut'}", "--resume", "--beta=0.2"])
    with pytest.raises(ValueError, match="is of another stage"):
        sft.main([f"--out_dir={tmp_path / 'cut'}", "--resume"])
    state = load_training_state(tmp_path / "cut")
    state["reference"]["val"] = state["reference"]["val"][:-1]
    torch.save(state, tmp_path / "cut" / "training_state.pt")
    with pytest.raises(ValueError, match="began with other pairs than the .* of the val split"):
        dpo.main([f"--out_dir={tmp_path / 'cut'}", "--resume"])


def test_two_processes_equal_one(base, data, tmp_path):
    alone = run(base, data, tmp_path / "one", "--max_steps=4")
    argv = [*TUNE, f"--init_from={base}", f"--data={data}", f"--out_dir={tmp_path / 'two'}", "--max_steps=4"]
    done = command(dpo.main, argv, processes=2)
    assert done.returncode == 0, done.stderr
    names = "loss grad_norm accuracy margin chosen_reward rejected_reward kl val_loss val_accuracy val_chosen_logp"
    for a, b in zip(alone, read_log(tmp_path / "two" / "log.csv"), strict=True):
        for name in names.split():
            assert a[name] == b[name] == "" or float(a[name]) == pytest.approx(float(b[name]), abs=1e-4), name
        assert a["tokens"] == b["tokens"] and a["lr"] == b["lr"]


def test_before_the_first_step_an_example_shows_what_is_compared(base, data, tmp_path, capsys):
    run(base, data, tmp_path / "run", "--max_steps=1", "--sequence_length=58")
    out, short = capsys.readouterr().out, dpo.Pairs(TokenSet(data, "train", "preferences"), 58)
    prompt, _, rest = out.partition("chosen answer first:\n\n")[2].partition("{+")
    chosen, _, rest = rest.partition("+}\n\n{-")
    assert prompt.startswith("<|begin_of_text|>") and prompt.endswith("assistant<|end_header_id|>\n")
    assert chosen.endswith("<|end_of_text|>") and rest.partition("-}")[0].endswith(" not<|end_of_text|>")
    assert short.too_long and f"left out: {short.too_long} training pairs longer than 58 tokens" in out


def test_a_model_with_experts_in_bfloat16(data, tmp_path):
    start = make_checkpoint(tmp_path / "start", is_moe=True, num_experts=16, num_experts_per_tok=2, keep_window_size=16,
                            router_aux_loss_coef=0.01)  # fmt: skip
    log = run(start, data, tmp_path / "run", "--dtype=bfloat16", "--max_steps=3", "--learning_rate=1e-2",
              "--gradient_checkpointing")  # fmt: skip
    assert float(log[1]["loss"]) == pytest.approx(math.log(2) + 0.01, abs=0.01)
    assert float(log[-1]["loss"]) < float(log[1]["loss"]) and float(log[-1]["accuracy"]) > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("options, words", [
    (["--init_from=nowhere"], "no checkpoint folder 'nowhere'"), (["--data=nowhere"], "nowhere"),
    (["--sequence_length=2"], "0 and 0 fit"),
    (["--micro_batch_tokens=100"], "micro_batch_tokens=100 is less than one pair"),
    (["--batch_size=0"], "batch_size=0"), (["--beta=-1"], "beta=-1"), (["--beta=nan"], "beta=nan"),
    (["--loss=hinge"], "'hinge' is not one of sigmoid, ipo, sigmoid_norm"), (["--resume"], "no run to go on with"),
    (["--eval_answers=3"], "no option 'eval_answers'"),
])  # fmt: skip
def test_bad_options_are_named(base, data, tmp_path, options, words):
    with pytest.raises(ValueError, match=words) as error:
        run(base, data, tmp_path / "run", *options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_data_of_another_kind_is_refused(base, tmp_path):
    chats = make_set(tmp_path / "chats", base, rows=list(rows_of("chat", 20)))
    with pytest.raises(ValueError, match="holds --kind=chat, and this stage reads --kind=preferences"):
        run(base, chats, tmp_path / "run")


def test_without_a_word_it_tunes_what_sft_py_left(tmp_path, monkeypatch):
    """`python dpo.py`: the built-in preferences are prepared on the spot."""
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "out" / "stories-chat", max_position_embeddings=1024)  # its tokens are short
    real = prepare_data.prepare
    monkeypatch.setattr(prepare_data, "prepare", lambda options: real(dataclasses.replace(options, stories=40), True))
    dpo.main(["--max_steps=1", "--device=cpu", "--batch_size=4", "--eval_size=4"])
    log = read_log(tmp_path / "out" / "stories-preferences" / "log.csv")
    assert [row["step"] for row in log] == ["0", "1"] and all(row["val_accuracy"] != "" for row in log)
