"""On a device beside the processor everything computes the same, and a training step never waits for it."""

import pytest
import torch
from accelerator import NAME, POSSIBLE, Toy, ToyTensor, without_inference_mode
from helpers import TINY, TUNE, make_checkpoint, make_data, make_set, texts

import dpo
import evaluate
import grpo
import sample
import sft
import train
from model import Doge, DogeConfig
from nanodoge.checkpoint import load_model
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request
from nanodoge.machine import Machine
from nanodoge.run import Run, read_log

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="this torch can have no device made in Python")
UNLOCKED = (Engine, "step"), (Engine, "cancel"), (Decoder, "__call__")  # what generation computes
SHAPE = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, keep_window_size=16)


def inside(x):
    return x.inside if isinstance(x, ToyTensor) else x


def pair(**options):
    """A model on the processor, and the same on the device."""
    models = [Doge(DogeConfig(**SHAPE | options)) for _ in range(2)]
    for block in models[0].layers:
        block.self_attn.A.data.normal_()
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1].to(NAME)


def test_the_device_is_strict_and_counts():
    with Toy() as toy:
        x = torch.ones(4).to(NAME, non_blocking=True) + 1
        assert x.device.type == NAME and not toy.waits
        with pytest.raises(AssertionError, match="meets tensors of the processor"):
            x + torch.ones(4)
        waiting = [lambda: x.sum().item(), lambda: x[x > 1], lambda: x.cpu(), lambda: torch.ones(4).to(NAME),
                   lambda: torch.tensor([1, 2], device=NAME), lambda: bool((x > 1).all())]  # fmt: skip
        for count, wait in enumerate(waiting, 1):
            wait()
            assert len(toy.waits) == count


@pytest.mark.parametrize("length", [16, 50])
@pytest.mark.parametrize("experts", [False, True])
def test_a_step_equals_the_processors_and_does_not_wait(experts, length, monkeypatch):
    monkeypatch.setattr("nanodoge.attention.GPU_CHUNK", 8)
    tokens = torch.randint(300, (2, length))
    options = dict(is_moe=True, num_experts=64, num_experts_per_tok=4, router_aux_loss_coef=0.1) if experts else {}
    with Toy() as toy:
        model, away = pair(**options)
        inputs = tokens.to(NAME)
        toy.waits.clear()
        loss = away(inputs, inputs)[1]
        loss.backward()
        assert loss.device.type == NAME and not toy.waits
        expected = model(tokens, tokens)[1]
        expected.backward()
        torch.testing.assert_close(inside(loss), expected)
        for p, q in zip(away.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(inside(p.grad), q.grad)


@pytest.mark.parametrize("experts, dtype", [(False, None), (True, None), (False, torch.bfloat16), (True, torch.int8)])
def test_what_it_writes_equals_the_processors(experts, dtype, monkeypatch):
    """Prompts of different lengths, beyond the window; by the model itself and by a Decoder."""
    prompts, lengths = torch.randint(300, (3, 40)), [40, 7, 23]
    options = dict(is_moe=True, num_experts=64, num_experts_per_tok=4) if experts else {}
    with Toy(), without_inference_mode(monkeypatch, *UNLOCKED):
        written = []
        for model in pair(**options):
            decoder = dtype and Decoder(model, dtype)
            requests = [Request(row[:n], 8, temperature=0) for row, n in zip(prompts.tolist(), lengths, strict=True)]
            written.append(Engine(model, decoder, slots=2).generate(requests))
        assert written[0] == written[1]


class Away(Machine):
    """The machine, whatever device the options name."""

    def __init__(self, device, *rest):
        super().__init__(NAME, *rest)


EXPERTS = ["--is_moe=true", "--num_experts=16", "--num_experts_per_tok=2", "--router_aux_loss_coef=0.1"]
GRPO = ["--batch_size=2", "--generations=2", "--max_new_tokens=5", "--eval_size=2"]


@pytest.mark.parametrize("stage, kind, options", [
    (train, None, []),
    (train, None, ["--optimizer=muon", "--keep_window_size=8", "--copy_steps=8", *EXPERTS]),
    (sft, "chat", ["--eval_answers=2"]),
    (sft, "labels", ["--kind=labels"]),
    (dpo, "preferences", []),
    (grpo, "problems", [*GRPO, "--kl=0.1"]),
])  # fmt: skip
def test_a_stage_equals_the_processors_and_waits_only_to_log(stage, kind, options, tmp_path, monkeypatch):
    """Reading the loss is waiting for all steps before. (Rollouts wait: their tokens are judged on the host.)"""
    often = ["--max_steps=4", "--log_every=2", "--eval_every=4", "--save_every=4"]
    if stage is train:
        arguments = [*TINY, "--decay_steps=2", f"--data={make_data(tmp_path / 'data')}"]
    else:
        base = make_checkpoint(tmp_path / "base")
        labelled = dict(labels=["a", "the"], rows=[dict(text=text, label=text.split()[0]) for text in texts(400)
                                                   if text.startswith(("a ", "the "))])  # fmt: skip
        data = make_set(tmp_path / "set", base, kind, 40, **labelled if kind == "labels" else {})
        arguments = [*TUNE, f"--init_from={base}", f"--data={data}"]
    arguments = [*arguments, *often, *options]

    stage.main([*arguments, f"--out_dir={tmp_path / 'here'}"])
    waited = {}
    with Toy() as toy, without_inference_mode(monkeypatch, *UNLOCKED):
        end_step = Run.end_step

        def watched(run, **names):
            waited[run.step] = len(toy.waits)
            end_step(run, **names)

        monkeypatch.setattr("nanodoge.run.Run.end_step", watched)
        monkeypatch.setattr("nanodoge.stage.Machine", Away)
        stage.main([*arguments, f"--out_dir={tmp_path / 'there'}"])

    here, there = (read_log(tmp_path / out / "log.csv") for out in ("here", "there"))
    assert len(here) == len(there) and len(waited) == 4
    for a, b in zip(here, there, strict=True):
        assert float(b["loss"] or 0) == pytest.approx(float(a["loss"] or 0), rel=1e-4, abs=1e-6)
        assert float(b["val_loss"] or 0) == pytest.approx(float(a["val_loss"] or 0), rel=1e-4)
    if stage is not grpo:
        assert [step for step in (0, 2) if waited[step + 1] > waited[step]] == []


def test_samples_and_scores_equal_the_processors(tmp_path, monkeypatch, capsys):
    checkpoint, data = make_checkpoint(tmp_path / "model"), make_data(tmp_path / "data")
    model, _ = load_model(checkpoint)
    pairs = [([0, 5, 6], [7, 8]), ([0, 5, 6], [9]), ([0, 7, 11], [7, 8, 9])]
    words = ["--prompt=the cat", "--max_new_tokens=8", "--top_p=0.9", "--top_k=50", "--repetition_penalty=1.1"]

    def outputs(model):
        sample.main([str(checkpoint), "--device=cpu", *words])
        rows, sizes = train.Sequences(data, "val", 16), torch.ones(model.config.vocab_size)
        bits = evaluate.bits_per_byte(model, Decoder(model, torch.int8), rows, sizes, evaluate.EvaluateOptions(["."]))
        return capsys.readouterr().out, [bits[0], *(score for score, _ in evaluate.log_likelihoods(model, pairs))]

    text, numbers = outputs(model)
    unlocked = *UNLOCKED, (evaluate, "nats"), (evaluate, "log_likelihoods")
    with Toy(), without_inference_mode(monkeypatch, *unlocked):
        monkeypatch.setattr("sample.Machine", Away)
        same_text, same_numbers = outputs(model.to(NAME))
    assert text == same_text and numbers == pytest.approx(same_numbers, rel=1e-5)
