"""sft.py: its loss and gradient against transformers' Doge in float64, one conversation at a time; and a test for each
way in which users of such stages were hurt: the mask, the end, rows too long or empty, uneven means, resuming."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_close_logs,
    assert_same_run,
    gradients_seen,
    make_checkpoint,
    make_set,
    rows_of,
    stopped_after,
    tune,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup

import dpo
import prepare_data
import sft
import train
from nanodoge.checkpoint import load_config, load_model
from nanodoge.examples import TokenSet, pad
from nanodoge.run import read_log
from nanodoge.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory, base):
    return make_set(tmp_path_factory.mktemp("data") / "chat", base)


@pytest.fixture(scope="module")
def rows(data):
    return selected(TokenSet(data, "train", "chat"))


def selected(token_set, length=64):
    return sft.select(token_set, sft.SftOptions(sequence_length=length))


def run(base, data, out, *options, **processes):
    return tune(sft.main, base, data, out, "--eval_answers=0", *options, **processes)


# ---- What is learned


def said_by_the_assistant(text):
    """[(text, is learned)] of a conversation as the template wrote it, read with nothing but the tags."""
    parts, header = [], "<|start_header_id|>assistant<|end_header_id|>\n"
    while header in text:
        before, _, text = text.partition(header)
        answer, end, text = text.partition("<|end_of_text|>")
        parts += [(before + header, False), (answer + end, True)]
    return parts


@pytest.mark.parametrize("length", [1, 9, 20, 30, 45, 64, 200])
def test_long_conversations_are_cut_after_an_answer(data, length):
    """Against a walk through every conversation."""
    part = TokenSet(data, "train", "chat")
    kept, cut = [], 0
    for i in range(len(part)):
        ids, mask = part.conversation(i)
        ends = [p for p in range(len(ids)) if mask[p] and (p + 1 == len(ids) or not mask[p + 1])]
        fitting = [p for p in ends if p <= length]
        if fitting:
            kept.append((ids[: fitting[-1] + 1].tolist(), mask[: fitting[-1] + 1].tolist()))
            cut += fitting[-1] < ends[-1]
    if not kept:
        with pytest.raises(ValueError, match=f"{len(part)} without an answer that ends within"):
            selected(part, length)
        return
    rows = selected(part, length)
    assert [tuple(x.tolist() for x in rows.rows(i)[0]) for i in range(rows.count)] == kept
    assert [*rows.left_out.values()] == [cut, len(part) - len(kept)]
    assert (rows.targets > 0).all() and (rows.lengths <= length).all()
    assert rows.targets[:, 0].tolist() == [sum(mask) for _, mask in kept]


def reference_step(base, rows, ids_of_step):
    """The mean loss over all targets of a step and its gradients, by transformers' model in float64, each conversation
    by itself: no padding, no batch, no code of ours."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").double()
    total, count = 0.0, 0
    for i in ids_of_step:
        ids, mask = (torch.from_numpy(x) for x in rows.rows(i)[0])
        logits = model(ids[None, :-1]).logits[0]
        losses = F.cross_entropy(logits, ids[1:], reduction="none")
        total, count = total + losses[mask[1:]].sum(), count + int(mask[1:].sum())
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [64, 100, 100_000])
def test_loss_and_gradient_equal_float64_whatever_the_micro_batches(base, data, rows, tmp_path, size):
    with gradients_seen() as seen:
        log = run(base, data, tmp_path / "run", f"--micro_batch_tokens={size}", "--max_steps=1", "--grad_clip=0")
    loss, gradients = reference_step(base, rows, train.rows_of_step(0, rows.count, 8, 233))
    assert float(log[1]["loss"]) == pytest.approx(loss, rel=1e-5)
    for (name, _), (_, found) in zip(load_model(base)[0].named_parameters(), seen[0], strict=True):
        wanted = gradients[f"model.{name}"]
        assert (found - wanted).norm() <= 1e-5 * max(wanted.norm(), 1e-3), name
    norm = torch.stack([g.norm() for name, g in gradients.items() if name != "lm_head.weight"]).norm()
    assert float(log[1]["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)


def test_it_learns_to_answer_and_to_stop(base, tmp_path):
    """And the loss says of what it is: it goes to zero, though what the users say stays as random as it was."""
    answer = dict(role="assistant", content="a red ball")
    rows = [[answer if m["role"] == "assistant" else m for m in row["messages"]] for row in rows_of("chat", 120)]
    rows = [dict(messages=messages) for messages in rows]
    data = make_set(tmp_path / "set", base, rows=rows)
    log = run(base, data, tmp_path / "run", "--max_steps=40", "--learning_rate=2e-2", "--eval_answers=20")
    assert float(log[-1]["loss"]) < 0.01 and float(log[-1]["val_exact"]) == 1.0
    model, tokenizer = load_model(tmp_path / "run")
    ids, _ = tokenizer.render([dict(role="user", content="the tree 99")], add_generation_prompt=True)
    new = model.generate(torch.tensor([ids]), 20, temperature=0.0, stop_ids=[tokenizer.eos_id])[0].tolist()
    assert tokenizer.decode(new) == "a red ball<|end_of_text|>"


def test_exact_match_by_hand(base, data, tmp_path):
    """Each answer written by itself from the text of the conversation so far."""
    rows = [dict(messages=m["messages"][:-1] + [dict(role="assistant", content="a cat")]) for m in rows_of("chat", 60)]
    data = make_set(tmp_path / "set", base, rows=rows)
    log = run(base, data, tmp_path / "run", "--max_steps=12", "--eval_answers=12", "--learning_rate=1e-2")
    model, tokenizer = load_model(tmp_path / "run")
    val, right = selected(TokenSet(data, "val", "chat")), 0
    for i in range(min(12, val.count)):
        ids, mask = val.rows(i)[0]
        *_, (before, _), (answer, _) = said_by_the_assistant(tokenizer.decode(ids))
        prompt = ids[: np.flatnonzero(~mask)[-1] + 1]
        assert tokenizer.decode(prompt).endswith(before[-20:])
        new = model.generate(torch.from_numpy(prompt)[None], 12, temperature=0.0, stop_ids=[tokenizer.eos_id])
        written = tokenizer.decode(new[0].tolist())
        right += written.endswith("<|end_of_text|>") and written == answer
    assert float(log[-1]["val_exact"]) == pytest.approx(right / min(12, val.count))
    nats, count = 0.0, 0
    for i in range(val.count):
        tokens, targets = pad([val.rows(i)[0]], 0)
        nats += F.cross_entropy(model(tokens)[0][0].double(), targets[0], reduction="sum").item()
        count += int((targets >= 0).sum())
    assert float(log[-1]["val_loss"]) == pytest.approx(nats / count, rel=1e-5)


def test_cosine_equals_transformers_and_stays_at_its_floor():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, 100, min_lr_rate=0.1).lr_lambdas[0]
    for step in range(99):  # ours has no step that does nothing at the start, and its last is at the floor
        assert train.cosine(step, 100, 10) == pytest.approx(reference(step + 1), abs=1e-9), step
    assert [train.cosine(step, 100, 10) for step in (99, 100, 101, 10**9)] == pytest.approx([0.1] * 4)
    assert train.cosine(0, 1, 0) == pytest.approx(0.1) and train.cosine(0, 1, 1) == 1


# ---- Runs


def test_before_the_first_step_an_example_shows_what_is_learned(base, data, tmp_path, capsys):
    run(base, data, tmp_path / "run", "--max_steps=1")
    out = capsys.readouterr().out
    example = out.partition("marked:\n\n")[2].partition("\n\nstep ")[0]
    text = example.replace("{+", "").replace("+}", "")
    assert text.startswith("<|begin_of_text|><|start_header_id|>") and text.count("<|begin_of_text|>") == 1
    marked = [part.partition("+}")[0] for part in example.split("{+")[1:]]
    assert marked == [part for part, learned in said_by_the_assistant(text) if learned]
    run(base, data, tmp_path / "short", "--max_steps=1", "--sequence_length=50")
    rows = selected(TokenSet(data, "train", "chat"), 50)
    out = capsys.readouterr().out
    for reason, count in rows.left_out.items():
        assert count and f"{count} train conversations {reason}" in out


def test_epochs_make_the_steps(base, data, rows, tmp_path):
    log = run(base, data, tmp_path / "run", "--max_steps=0", "--epochs=1.5", "--eval_every=100")
    assert len(log) == 1 + -(-rows.count * 3 // 16)  # the first row is of the model as it came
    order = [i for step in range(len(log) - 1) for i in train.rows_of_step(step, rows.count, 8, 233)]
    assert sorted(order[: rows.count]) == list(range(rows.count))  # each once before any again
    assert int(log[1]["tokens"]) == rows.lengths[order[:8]].sum()
    assert float(log[-1]["lr"]) == pytest.approx(3e-4)  # a tenth of the peak


@pytest.mark.parametrize("extra", [[], ["--optimizer=muon", "--freeze_embeddings=true"]], ids=["adamw", "muon"])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(base, data, tmp_path, extra):
    run(base, data, tmp_path / "whole", *extra, "--eval_answers=4")
    with stopped_after(6):
        run(base, data, tmp_path / "cut", *extra, "--eval_answers=4")
    for _ in range(2):  # the same command line: to the end, and once more, with nothing left to do
        run(base, data, tmp_path / "cut", *extra, "--eval_answers=4", "--resume_or_start")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "cut"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == ({"model.embed_tokens.weight"} if extra else set())
    with pytest.raises(ValueError, match="is of another stage"):
        train.main([f"--out_dir={tmp_path / 'cut'}", "--resume"])


def test_four_processes_equal_one(base, data, tmp_path):
    """Though they hold different numbers of targets."""
    alone = run(base, data, tmp_path / "one", "--eval_answers=6")
    four = run(base, data, tmp_path / "four", "--eval_answers=6", processes=4)
    assert_close_logs(alone, four, ("loss", "grad_norm", "val_loss", "val_exact"), 2e-5)


EXPERTS = dict(is_moe=True, num_experts=16, num_experts_per_tok=2, router_aux_loss_coef=0.01)


@pytest.mark.parametrize("shape", [dict(keep_window_size=16), EXPERTS], ids=str)
def test_longer_rows_make_a_longer_model(data, tmp_path, shape):
    """Beyond the window of keys that it keeps too; and a model with experts is tuned like any other."""
    start = make_checkpoint(tmp_path / "start", **shape)
    log = run(start, data, tmp_path / "run", "--max_steps=3", "--sequence_length=100")
    assert load_config(tmp_path / "run").max_position_embeddings == 100
    assert float(log[-1]["loss"]) < float(log[1]["loss"])


def test_the_checkpoint_goes_on_to_the_next_stage(base, data, tmp_path):
    run(base, data, tmp_path / "first", "--max_steps=2")
    run(tmp_path / "first", data, tmp_path / "second", "--max_steps=2")
    pretrain = train.read_options([f"--init_from={tmp_path / 'second'}", f"--out_dir={tmp_path / 'third'}"])
    assert (pretrain.hidden_size, pretrain.max_steps) == (32, train.TrainOptions.max_steps)


def test_data_of_another_tokenizer_or_template_is_refused(base, data, tmp_path):
    other = make_checkpoint(tmp_path / "other", vocab_size=300)
    with pytest.raises(ValueError, match="has another tokenizer than --data"):
        run(other, data, tmp_path / "run")
    template = Tokenizer.load(base)
    template.chat_template = template.chat_template.replace("\\n\\n", "\\n")
    again = make_checkpoint(tmp_path / "again")
    template.save(again)
    with pytest.raises(ValueError, match="has another chat template than --data"):
        run(again, data, tmp_path / "run")


@pytest.mark.parametrize(
    "stage, start, out, column",
    [(sft, "stories", "stories-chat", "val_exact"), (dpo, "stories-chat", "stories-preferences", "val_accuracy")],
)
def test_without_a_word_it_tunes_what_the_stage_before_left(stage, start, out, column, tmp_path, monkeypatch):
    """`python sft.py`: the built-in conversations are prepared on the spot."""
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "out" / start, max_position_embeddings=1024)  # its tokens are short
    real = prepare_data.prepare
    monkeypatch.setattr(prepare_data, "prepare", lambda options: real(dataclasses.replace(options, stories=50), True))
    stage.main(["--max_steps=1", "--device=cpu", "--batch_size=4", "--eval_size=4"])
    log = read_log(tmp_path / "out" / out / "log.csv")
    assert [row["step"] for row in log] == ["0", "1"] and all(row[column] != "" for row in log)
