"""On a device beside the CPU everything computes the same, and a training step never waits for it."""

import re

import pytest
import torch
from accelerator import NAME, POSSIBLE, Toy, ToyTensor
from helpers import TINY, TUNE, make_checkpoint, make_data, make_set, texts

import dpo
import evaluate
import grpo
import sample
import sft
import train
from model import Doge, DogeConfig
from nanodoge.checkpoint import load_model, save_checkpoint
from nanodoge.data import load_tokenizer
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request
from nanodoge.experts import routed_experts
from nanodoge.machine import Machine
from nanodoge.run import Run, read_log

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="this torch can have no device made in Python")
SHAPE = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, keep_window_size=16)
EXPERTS = dict(is_moe=True, num_experts=64, num_experts_per_tok=4)


def inside(x):
    return x.inside if isinstance(x, ToyTensor) else x


def pair(**options):
    """A model on the CPU, and the same on the device."""
    models = [Doge(DogeConfig(**SHAPE | options)) for _ in range(2)]
    for block in models[0].layers:
        block.self_attn.A.data.normal_()
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1].to(NAME)


def test_the_device_is_strict_and_counts():
    with Toy() as toy:
        x = torch.ones(4).to(NAME, non_blocking=True) + 1
        assert x.device.type == NAME and not toy.waits
        with pytest.raises(AssertionError, match="combines devices"):
            x + torch.ones(4)
        waiting = [
            lambda: x.sum().item(),
            lambda: x[x > 1],
            lambda: x.cpu(),
            lambda: torch.ones(4).to(NAME),
            lambda: torch.tensor([1, 2], device=NAME),
            lambda: bool((x > 1).all()),
        ]
        for count, wait in enumerate(waiting, 1):
            wait()
            assert len(toy.waits) == count


@pytest.mark.parametrize("length", [16, 50])
@pytest.mark.parametrize("experts", [False, True])
def test_a_step_equals_the_cpus_and_does_not_wait(experts, length, monkeypatch):
    monkeypatch.setattr("nanodoge.attention.GPU_CHUNK", 8)
    tokens = torch.randint(300, (2, length))
    with Toy() as toy:
        model, away = pair(**(EXPERTS | dict(router_aux_loss_coef=0.1) if experts else {}))
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
def test_what_it_writes_equals_the_cpus(experts, dtype):
    """Prompts of different lengths, beyond the window; by the model itself and by a Decoder."""
    prompts, written = [torch.randint(300, (length,)).tolist() for length in (40, 7, 23)], []
    with Toy():
        for model in pair(**(EXPERTS if experts else {})):
            engine = Engine(model, dtype and Decoder(model, dtype), slots=2)
            ids = model.generate(torch.tensor(prompts[:1], device=engine.device), 8, temperature=0)
            written.append([ids.tolist(), engine.generate([Request(prompt, 8, temperature=0) for prompt in prompts])])
    assert written[0] == written[1]


class Older(Toy):
    """torch 2.11 on CUDA, which has no kernel for the products of slots in bfloat16."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "per_sample_weights_backward" not in str(function) or args[0].dtype != torch.bfloat16
        return super().__torch_dispatch__(function, types, args, kwargs)


def test_experts_in_bfloat16_need_no_missing_kernel():
    scores, experts = torch.rand(1, 5, 16).topk(3)
    inputs = [torch.randn(*shape).bfloat16() for shape in ((1, 5, 8), (16, 8), (16, 8))]

    def results(move):
        moved = [move(x).requires_grad_() for x in inputs]
        out = routed_experts(*moved, move(scores), move(experts))
        return [inside(x).float() for x in (out, *torch.autograd.grad(out, moved, out.detach()))]

    expected = results(lambda x: x.float() if x.is_floating_point() else x)
    with Older():
        found = results(lambda x: x.to(NAME))
    assert all((x - y).norm() < 0.02 * y.norm() for x, y in zip(found, expected, strict=True))


class Away(Machine):
    """The machine, whatever device the options name."""

    def __init__(self, device, *rest):
        super().__init__(NAME, *rest)


MUON = """--optimizer=muon --keep_window_size=8 --copy_steps=2
    --is_moe=true --num_experts=16 --num_experts_per_tok=2 --router_aux_loss_coef=0.1"""
GRPO = "--batch_size=2 --generations=2 --max_new_tokens=5 --eval_size=2 --kl=0.1"
STAGES = [(train, None, MUON), (sft, "chat", "--eval_answers=2"), (sft, "labels", "--kind=labels")]
STAGES += [(dpo, "preferences", ""), (grpo, "problems", GRPO)]


@pytest.mark.parametrize("stage, kind, options", STAGES)
def test_a_stage_equals_the_cpus_and_waits_only_to_log(stage, kind, options, tmp_path, monkeypatch):
    """Reading the loss is waiting for all steps before. (Rollouts wait: their tokens are judged on the host.)"""
    if stage is train:
        arguments = [*TINY, "--decay_steps=2", f"--data={make_data(tmp_path / 'data')}"]
    else:
        base, extra = make_checkpoint(tmp_path / "base"), {}
        if kind == "labels":
            rows = [dict(text=text, label=text.split()[0]) for text in texts(400) if text.startswith(("a ", "the "))]
            extra = dict(labels=["a", "the"], rows=rows)
        arguments = [*TUNE, f"--init_from={base}", f"--data={make_set(tmp_path / 'set', base, kind, 40, **extra)}"]
    arguments += f"--max_steps=4 --log_every=2 --eval_every=4 --save_every=4 {options}".split()

    stage.main([*arguments, f"--out_dir={tmp_path / 'here'}"])
    waited, end_step = {}, Run.end_step
    with Toy() as toy:

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


def test_samples_and_scores_equal_the_cpus(tmp_path, monkeypatch, capsys):
    data, folder = make_data(tmp_path / "data"), tmp_path / "model"
    save_checkpoint(folder, Doge(DogeConfig(**SHAPE, max_position_embeddings=32)), load_tokenizer(data))
    model, tokenizer = load_model(folder)
    words = "--max_new_tokens=8 --top_p=0.9 --top_k=50 --repetition_penalty=1.1 --device=cpu".split()
    options = evaluate.EvaluateOptions([str(folder)], bpb=str(data), dtype=["float32", "int8"])
    pairs = [([0, 5, 6], [7, 8]), ([0, 5, 6], [9]), ([0, 7, 11], [7, 8, 9])]

    def outputs(model, machine):
        sample.main([str(folder), "--prompt=the cat", *words])
        text = capsys.readouterr().out
        evaluate.print_bits_per_byte(model, tokenizer, options, machine)
        bits = [float(number) for number in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
        return text, [*bits, *(score for score, _ in evaluate.log_likelihoods(model, pairs))]

    text, numbers = outputs(model, Machine("cpu"))
    with Toy():
        monkeypatch.setattr("sample.Machine", Away)
        same_text, same_numbers = outputs(model.to(NAME), Away("cpu"))
    assert text == same_text and numbers == pytest.approx(same_numbers, rel=1e-4)
