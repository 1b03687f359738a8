"""grpo.py: its loss against numbers worked out by hand and, through a model, against transformers' Doge in float64;
what is rewarded and what is not; and a test for each way in which users of such stages were hurt: groups without a
signal, one answer a group, answers that never end, a reference that drifts, other samples after a resume."""

import contextlib
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TUNE, VOLATILE, command, make_checkpoint, make_set, texts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import grpo
import sft
from dpo import Policy
from nanodoge.checkpoint import load_model
from nanodoge.conversations import TokenSet
from nanodoge.machine import Machine
from nanodoge.run import Run, read_log
from nanodoge.tokenizer import Tokenizer

QUESTIONS = [f"{text} {i}" for i, text in enumerate(texts(100, seed=5))]
GRPO = [*TUNE, "--batch_size=4", "--generations=4", "--max_new_tokens=6", "--slots=8", "--max_steps=4",
        "--eval_every=2", "--save_every=2", "--eval_size=12", "--warmup=0"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that answers everything with 7 or 12, as it likes, and ends: so there is something to choose from."""
    folder = tmp_path_factory.mktemp("out")
    rows = [dict(question=text, answer="7" if i % 2 else "12") for i, text in enumerate(QUESTIONS)]
    data = make_set(folder / "chat", make_checkpoint(folder / "random"), rows=rows)
    sft.main([*TUNE, f"--init_from={folder / 'random'}", f"--data={data}", f"--out_dir={folder / 'base'}",
              "--max_steps=30", "--learning_rate=1e-2", "--eval_every=30", "--save_every=30"])  # fmt: skip
    return folder / "base"


@pytest.fixture(scope="module")
def data(tmp_path_factory, base):
    rows = [dict(question=text, answer="#### 7.0") for text in QUESTIONS]
    return make_set(tmp_path_factory.mktemp("data") / "problems", base, "problems", rows=rows)


def run(base, data, out, *options):
    grpo.main([*GRPO, f"--init_from={base}", f"--data={data}", f"--out_dir={out}", *options])
    return read_log(out / "log.csv")


def steady(rows):
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_the_loss_equals_an_example_worked_out_by_hand():
    """Two problems, two answers to each, of 2, 1, 1 and 1 tokens. clip 0.2 down and 0.3 up, kl 0.5.

    The first group earns 1 and 0, so its advantages are 0.5 and -0.5; the second earns 1 and 1: 0 and 0.

    token  advantage  old    now    ratio  clipped  min(r A, clip(r) A)  start  d = start - now  k3 = e^d - d - 1
    1       0.5       -1.0   -0.5   e^0.5  1.3       0.65                -0.5    0               0
    2       0.5       -2.0   -2.5   e^-.5  0.8       0.5 e^-0.5          -2.0    0.5             e^0.5 - 1.5
    3      -0.5       -1.0   -2.0   e^-1   0.8      -0.4                 -2.0    0               0
    4       0         -1.0   -0.9   e^0.1  ...       0                   -1.9   -1.0             e^-1
    5       0         -3.0   -3.0   1      1         0                   -2.0    1.0             e - 2
    """
    options = grpo.GrpoOptions(clip_low=0.2, clip_high=0.3, kl=0.5)
    rewards = np.array([[1.0, 0.0], [1.0, 1.0]])
    above = grpo.advantages(rewards, divide_by_std=False)
    assert above.tolist() == [[0.5, -0.5], [0.0, 0.0]]
    now = torch.tensor([-0.5, -2.5, -2.0, -0.9, -3.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, -2.0, -1.0, -1.0, -3.0], dtype=torch.float64)
    start = torch.tensor([-0.5, -2.0, -2.0, -1.9, -2.0], dtype=torch.float64)
    lengths = torch.tensor([2, 1, 1, 1])
    per_token = torch.tensor(above.flatten()).repeat_interleave(lengths)
    columns = dict(reward=rewards.flatten(), length=lengths.numpy().astype(float))
    machine = SimpleNamespace(autocast=contextlib.nullcontext)

    def share(rows, tokens):
        """The micro-batch of these answers, whose tokens are these."""
        batch = grpo.Batch(np.array(rows), None, None, None, per_token[tokens], old[tokens], start[tokens])
        return grpo.make_loss(machine, lambda *_: (now[tokens], 0.0), object(), columns, 0.0, options)(batch)

    k3 = [0, math.exp(0.5) - 1.5, 0, math.exp(-1), math.e - 2]
    expected = -(0.65 + 0.5 * math.exp(-0.5) - 0.4) / 5 + 0.5 * sum(k3) / 5
    whole, shown = share([0, 1, 2, 3], slice(0, 5))
    assert whole.item() == pytest.approx(expected, abs=1e-14)
    assert shown["kl"].item() == pytest.approx(sum(k3) / 5, abs=1e-14)
    assert shown["clipped"].item() == pytest.approx(2 / 5)  # tokens 1 and 3
    assert shown["entropy"].item() == pytest.approx(8 / 5)
    assert (shown["reward"], shown["length"]) == (0.75, 1.25)
    parts = [share([0], slice(0, 2)), share([1, 2], slice(2, 4)), share([3], slice(4, 5))]  # micro-batches add up
    assert sum(part[0] for part in parts).item() == pytest.approx(expected, abs=1e-14)
    assert sum(part[1]["reward"] for part in parts) == pytest.approx(0.75)
    (gradient,) = torch.autograd.grad(whole, now)  # of k3: 1 - e^d; of a clipped token's objective: 0
    by_hand = [0, (-0.5 * math.exp(-0.5) + 0.5 * (1 - math.exp(0.5))) / 5, 0, 0.5 * (1 - math.exp(-1)) / 5,
               0.5 * (1 - math.e) / 5]  # fmt: skip
    assert gradient.tolist() == pytest.approx(by_hand, abs=1e-14)


@pytest.mark.parametrize("ratio, advantage, learns", [
    (1.0, 1, True), (1.0, -1, True), (1.29, 1, True), (1.31, 1, False), (0.5, 1, True), (0.81, -1, True),
    (0.79, -1, False), (5.0, -1, True), (5.0, 0, False), (0.1, 0, False),
])  # fmt: skip
def test_the_clip_holds_what_went_far_enough_and_lets_it_come_back(ratio, advantage, learns):
    now = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, clipped = grpo.clipped_losses(now, torch.zeros(1), torch.tensor([float(advantage)]), 0.2, 0.3)
    loss.sum().backward()
    assert now.grad.item() == pytest.approx(-ratio * advantage if learns else 0)
    assert clipped.item() == (not learns and advantage != 0)


def test_k3_is_never_negative_and_is_the_divergence_on_average():
    now, start = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    k3 = grpo.divergence(now, start)
    assert (k3 >= 0).all() and grpo.divergence(now, now).abs().max() == 0
    assert (now.exp() * k3).sum().item() == pytest.approx((now.exp() * (now - start)).sum().item(), abs=1e-12)
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    now = logits.log_softmax(-1)
    theirs = torch.autograd.grad((start.exp() * (start - now)).sum(), logits, retain_graph=True)[0]
    ours = torch.autograd.grad((now.detach().exp() * grpo.divergence(now, start)).sum(), logits)[0]
    torch.testing.assert_close(ours, theirs)
    assert grpo.divergence(torch.tensor(-1.0), torch.tensor(-1.0 + 1e-4)).item() == pytest.approx(5e-9, rel=1e-3)


@pytest.mark.parametrize("rewards, plain, scaled", [
    ([1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25], [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
    ([1.1, 1.1, 1.1], [0, 0, 0], [0, 0, 0]),  # whose mean, as floats go, is not 1.1
    ([0, 0], [0, 0], [0, 0]), ([1, -1], [1, -1], [1, -1]),
])  # fmt: skip
def test_advantages(rewards, plain, scaled):
    rewards = np.array([rewards, rewards], float)
    for divide_by_std, expected in ((False, plain), (True, scaled)):
        above = grpo.advantages(rewards, divide_by_std)
        assert np.isfinite(above).all() and above[0] == pytest.approx(expected, abs=1e-12)
        assert (above[0] == above[1]).all() and (expected != [0] * len(expected) or (above == 0).all())


def test_the_first_gradient_is_the_plain_policy_gradient(base, data):
    """By transformers' model in float64, one answer at a time, at a temperature: no padding, no pieces, no code of
    ours. So the place of every token, and what counts as an answer, are right too."""
    tokenizer, problems = Tokenizer.load(data), grpo.Problems(TokenSet(data, "train", "problems"), 64, 6)
    machine = Machine("cpu", "float32")
    prompts, _ = problems.some(np.arange(9) // 3)
    above, temperature = np.random.default_rng(0).normal(size=9), 0.7
    model = load_model(base)[0]
    options = grpo.GrpoOptions(max_new_tokens=6, temperature=temperature, micro_batch_tokens=100)
    written = grpo.write_answers(machine, model, tokenizer, prompts, options, key=1)
    tokens = sum(map(len, written))
    policy = Policy(model, tokenizer.vocab_size, temperature)
    loss_of = grpo.make_loss(machine, policy, None, dict(length=np.array([len(w) for w in written])), 0.0, options)
    loss = entropy = 0.0
    batches, _ = grpo.make_batches(machine, prompts, written, above, tokenizer, options)
    assert len(batches) > 2 and sorted(i for batch in batches for i in batch.rows) == list(range(9))
    for batch in batches:
        share, shown = loss_of(batch)
        share.backward()
        loss, entropy = loss + share.item(), entropy + shown["entropy"].item()
        assert shown["clipped"] == 0
    other, total, surprise = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").double(), 0.0, 0.0
    for prompt, answer, advantage in zip(prompts, written, above, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        logprobs = (other(ids).logits[0] / temperature).log_softmax(-1)
        for place, token in enumerate(answer, start=len(prompt)):
            total = total - advantage * logprobs[place - 1, token] / tokens
            surprise -= logprobs[place - 1, token].item() / tokens
    total.backward()
    assert loss == pytest.approx(-sum(a * len(w) for a, w in zip(above, written, strict=True)) / tokens, abs=1e-5)
    assert entropy == pytest.approx(surprise, abs=1e-5)
    theirs = {name.removeprefix("model."): p.grad for name, p in other.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), theirs[name], atol=1e-6, rtol=1e-4, msg=name)


def test_logprobs_are_those_of_the_drawing(base):
    """Over the ids that can be drawn, and in pieces as in one."""
    model, _ = load_model(base)
    policy = Policy(model, vocab_size=300, temperature=2.0)
    tokens = torch.randint(300, (7, 60))
    x = model.hidden(tokens)[0]
    expected = (x @ model.output_weight[:300].T / 2.0).log_softmax(-1).gather(2, tokens[..., None]).flatten()
    got, _ = policy(tokens, torch.arange(420), tokens.flatten())
    torch.testing.assert_close(got, expected)
    pieces = pytest.MonkeyPatch()
    pieces.setattr("nanodoge.losses.LOSS_ELEMENTS", 1)
    pieces.setattr("nanodoge.losses.LOSS_ROWS", 100)
    again, _ = policy(tokens, torch.arange(420), tokens.flatten())
    pieces.undo()
    torch.testing.assert_close(again, expected)
    gradients = [torch.autograd.grad(y.square().sum(), model.embed_tokens.weight) for y in (got, again)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize("said, wanted, right", [
    ("42", "42", True), ("42.0", "42", True), ("42.", "42", True), ("042", "42", True), ("+42", "42", True),
    ("$42", "42", True), (" 42\n", "42", True), ("1,000", "1000", True), ("1000", "1,000.00", True), ("-3", "-3", True),
    ("-$3", "$-3", True), (".5", "0.50", True), ("-0", "0", True), ("12,345,678", "12345678", True),
    ("so #### 42", "42", True), ("#### 41 #### 42", "42", True), ("Paris", "Paris", True), ("3/4", "3/4", True),
    ("43", "42", False), ("4 2", "42", False), ("42 43", "42", False), ("41\n42", "42", False), ("", "42", False),
    ("-42", "42", False), ("--42", "-42", False), ("-$-42", "-42", False), ("4,2", "42", False),
    ("1,00", "100", False), ("10,00", "1000", False), (",000", "0", False), ("1e3", "1000", False),
    ("0x2a", "42", False), ("٤٢", "42", False), ("4_2", "42", False), ("nan", "nan", True), ("nan", "42", False),
    ("inf", "42", False), ("$", "42", False), (".", "0", False), ("-", "0", False), ("42%", "42", False),
    ("forty-two", "42", False), ("42 apples", "42", False), ("#### 42 ####", "42", False), ("paris", "Paris", False),
    ("42.0000000000000000000001", "42", False), ("9" * 5000, "9" * 5000 + ".0", True), ("9" * 5000, "9" * 4999, False),
    ("1e999999999", "1", False), ("0.30000000000000004", "0.3", False),
    ("<|begin_of_solution|>42<|end_of_solution|>", "42", True), ("42 <|begin_of_solution|>", "42", False),
    ("<|begin_of_solution|>42", "42", False), ("<|begin_of_solution|><|end_of_solution|>", "", False),
    ("<|begin_of_solution|>41<|end_of_solution|><|begin_of_solution|>42<|end_of_solution|>", "42", True),
    ("42 <|begin_of_solution|>41<|end_of_solution|>", "42", False),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_what_is_right(said, wanted, right):
    assert grpo.is_right(said, wanted) is right


THOUGHT, SOLUTION = "<|begin_of_thought|>\n1, 2\n<|end_of_thought|>", "<|begin_of_solution|>\n2\n<|end_of_solution|>"


@pytest.mark.parametrize("text, good", [
    (f"{THOUGHT}\n\n{SOLUTION}", True), (f" {THOUGHT}{SOLUTION}\n", True), ("", False), ("2", False),
    (SOLUTION, False), (THOUGHT, False), (f"{SOLUTION}{THOUGHT}", False), (f"{THOUGHT}{SOLUTION}{SOLUTION}", False),
    (f"{THOUGHT}{THOUGHT}{SOLUTION}", False), (f"{THOUGHT} so {SOLUTION}", False), (f"{THOUGHT}{SOLUTION} ok", False),
    (f"well {THOUGHT}{SOLUTION}", False), (f"{THOUGHT}{SOLUTION[:-1]}", False),
    (THOUGHT[:-20] + SOLUTION + THOUGHT[-20:], False),
])  # fmt: skip
def test_what_is_in_form(text, good):
    assert grpo.is_in_form(text) is good


def test_an_answer_earns_the_weighted_sum_of_its_parts_and_only_if_it_ends(data):
    tokenizer = Tokenizer.load(data)
    messages = [dict(role="user", content="?"), dict(role="assistant", content=f"{THOUGHT}\n\n{SOLUTION}")]
    ids, mask = tokenizer.render(messages)
    right = [i for i, counts in zip(ids, mask, strict=True) if counts]  # as sft.py teaches it, with its end
    assert right[-1] == tokenizer.eos_id
    bare = [*tokenizer.encode("2.0"), tokenizer.eos_id]
    written = [right, right[:-1], bare, bare[:-1], right, [tokenizer.eos_id]]
    options = grpo.GrpoOptions(max_new_tokens=100, reward_answer=2.0, reward_format=0.5, reward_length=0.25)
    columns = grpo.judge(written, ["2"] * 4 + ["3", "2"], tokenizer, options)
    assert columns["reward_answer"].tolist() == [1, 0, 1, 0, 0, 0]
    assert columns["reward_format"].tolist() == [1, 0, 0, 0, 1, 0]
    assert columns["length"].tolist() == [len(ids) for ids in written]
    earned = [2.5, 0, 2, 0, 0.5, 0]
    assert columns["reward"].tolist() == pytest.approx(
        [a - 0.25 * len(ids) / 100 for a, ids in zip(earned, written, strict=True)])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The run


def test_what_is_rewarded_is_learned(base, data, tmp_path):
    """From 7 or 12 to 7. The log says what happened, and a group that agrees is counted as one without a signal. (At so
    high a rate two seeds of six end where nothing is in form any more.)"""
    log = run(base, data, tmp_path / "run", "--max_steps=12", "--eval_every=12", "--save_every=12",
              "--learning_rate=1e-2", "--seed=2")  # fmt: skip
    assert [row["step"] for row in log] == [str(i) for i in range(13)]  # 0: where it starts
    rewards = [float(row["reward_answer"]) for row in log[1:]]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3
    assert float(log[0]["val_accuracy"]) < 1 == float(log[-1]["val_accuracy"]) == float(log[-1]["val_reward"])
    for row in log[1:]:
        assert float(row["reward"]) == pytest.approx(
            float(row["reward_answer"]) + 0.1 * float(row["reward_format"]), abs=1e-9)  # fmt: skip
        assert 1 <= float(row["length"]) <= 6 and 0 <= float(row["no_signal"]) <= 1 and row["kl"] == ""
        assert (float(row["grad_norm"]) == 0) == (float(row["no_signal"]) == 1)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 4 + [12] * 4
    assert samples[-1]["problem"].endswith("<|start_header_id|>assistant<|end_header_id|>\n")
    assert samples[-1]["written"] == "7<|end_of_text|>" and samples[-1]["wanted"] == "7.0"


def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(base, data, tmp_path, monkeypatch):
    """With the same answers drawn, whatever random numbers were used before; and with the same reference, though the
    folder it was loaded from is gone."""
    extra = ["--kl=0.05", "--updates_per_rollout=2", "--learning_rate=2e-2", "--divide_by_std=true"]
    start = shutil.copytree(base, tmp_path / "start")
    whole = run(start, data, tmp_path / "whole", *extra)
    end_step = Run.end_step
    monkeypatch.setattr("nanodoge.run.Run.end_step", lambda self, **a: 1 / 0 if self.step == 3 else end_step(self, **a))
    with pytest.raises(ZeroDivisionError):
        run(start, data, tmp_path / "cut", *extra)
    monkeypatch.undo()
    with open(tmp_path / "cut" / "samples.jsonl", "a") as file:
        file.write('{"step": 4, "of": "a run that was killed"}\n{"step": 4, "to')
    shutil.rmtree(start)
    torch.randn(3)
    grpo.main([f"--out_dir={tmp_path / 'cut'}", "--resume"])
    assert steady(read_log(tmp_path / "cut" / "log.csv")) == steady(whole)
    names = "model.safetensors", "reference/model.safetensors"
    for (a, b), name in (([load_file(tmp_path / run / name) for run in ("cut", "whole")], name) for name in names):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
        same = all(torch.equal(a[key], w) for key, w in load_file(base / "model.safetensors").items())
        assert same == (name == "reference/model.safetensors")  # it has not drifted; the model has moved
    samples = [(tmp_path / run / "samples.jsonl").read_text() for run in ("cut", "whole")]
    assert samples[0] == samples[1] and [json.loads(line)["step"] for line in samples[0].splitlines()] == [
        step for step in (0, 2, 4) for _ in range(4)]  # fmt: skip
    assert float(whole[1]["kl"]) > 0 and float(whole[-1]["kl"]) > 0  # the second update of a step is somewhere else
    assert max(float(row["clipped"]) for row in whole[1:]) > 0
    with pytest.raises(ValueError, match="generations=5: the run in .* has 4"):
        grpo.main([f"--out_dir={tmp_path / 'cut'}", "--resume", "--generations=5"])


def test_two_processes_equal_one(base, data, tmp_path):
    """They draw the same answers, though each writes only some, of 3 pieces one writes two, and each keeps only half
    of the weights."""
    extra = ["--slots=6", "--kl=0.1", "--eval_every=4", "--save_every=4"]
    alone = run(base, data, tmp_path / "one", *extra)
    argv = [*GRPO, f"--init_from={base}", f"--data={data}", f"--out_dir={tmp_path / 'two'}", *extra, "--shard"]
    done = command(grpo.main, argv, processes=2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(alone, read_log(tmp_path / "two" / "log.csv"), strict=True):
        for name in ("loss", "grad_norm", "kl", *grpo.COLUMNS):
            assert a[name] == b[name] == "" or float(a[name]) == pytest.approx(float(b[name]), abs=2e-5), name
        assert a["tokens"] == b["tokens"] and a["lr"] == b["lr"]
    assert len({row["length"] for row in alone}) > 2  # they did differ from step to step
    samples = [(tmp_path / run / "samples.jsonl").read_text() for run in ("one", "two")]
    assert samples[0] == samples[1]


def test_what_is_drawn_depends_on_seed_step_and_piece(base, data):
    tokenizer, problems = Tokenizer.load(data), grpo.Problems(TokenSet(data, "train", "problems"), 64, 6)
    machine, model = Machine("cpu", "float32"), load_model(base)[0]
    draw = lambda step=0, **options: grpo.rollout(machine, model, tokenizer, problems, grpo.GrpoOptions(  # noqa: E731
        **dict(batch_size=2, generations=8, max_new_tokens=6, temperature=5.0, slots=8, seed=1) | options), step)
    prompts, written, above, columns = draw()
    assert [p.tolist() for p in prompts] == [p.tolist() for p in (*[prompts[0]] * 8, *[prompts[8]] * 8)]
    assert len({tuple(ids) for ids in written}) > 8  # the answers of a group are drawn one by one
    assert above.shape == columns["reward"].shape == columns["no_signal"].shape == (16,)
    assert draw()[1] == written != draw(seed=2)[1]
    assert draw(step=1)[1] != written and draw(temperature=1.0)[1] != written


def test_a_run_without_any_signal_goes_on(base, data, tmp_path):
    """No answer is in form, so nothing is learned: no NaN. And experts are tuned like anything else."""
    model = make_checkpoint(tmp_path / "moe", is_moe=True, num_experts=16, num_experts_per_tok=2,
                            router_aux_loss_coef=0.0)  # fmt: skip
    log = run(model, data, tmp_path / "run", "--max_steps=2", "--reward_answer=0", "--divide_by_std=true")
    assert [float(row["no_signal"]) for row in log[1:]] == [1, 1]
    assert [float(row["loss"]) for row in log[1:]] == [float(row["grad_norm"]) for row in log[1:]] == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("options, words", [
    (["--generations=1"], "generations=1 must be at least 2"), (["--temperature=0"], "temperature=0.0 must be"),
    (["--max_new_tokens=0"], "max_new_tokens=0"), (["--slots=0"], "slots=0"),
    (["--updates_per_rollout=0"], "updates_per_rollout=0"), (["--clip_low=1.5"], "clip_low=1.5"),
    (["--clip_high=-1"], "clip_high=-1"), (["--kl=nan"], "kl=nan"), (["--reward_format=-1"], "reward_format=-1"),
    (["--reward_answer=0", "--reward_format=0"], "nothing is rewarded"), (["--eval_samples=-1"], "eval_samples=-1"),
    (["--max_new_tokens=63"], "max_new_tokens=63 of .* problems, 0 and 0 leave that"), (["--data=nowhere"], "nowhere"),
    (["--init_from=nowhere"], "no checkpoint folder 'nowhere'"), (["--resume"], "no run to go on with"),
])  # fmt: skip
def test_bad_options_are_named(base, data, tmp_path, options, words):
    with pytest.raises(ValueError, match=words) as error:
        run(base, data, tmp_path / "run", *options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_data_of_another_kind_or_without_its_answers_is_refused(base, data, tmp_path):
    with pytest.raises(ValueError, match="holds --kind=chat, and this stage reads --kind=problems"):
        run(base, base.parent / "chat", tmp_path / "run")
    short = shutil.copytree(data, tmp_path / "short")
    lines = (short / "train.answers.jsonl").read_text().splitlines(keepends=True)
    (short / "train.answers.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=f"answers.jsonl has {len(lines) - 1} answers to {len(lines)} problems"):
        run(base, short, tmp_path / "run")
    (short / "train.answers.jsonl").unlink()
    with pytest.raises(ValueError, match="answers.jsonl has 0 answers"):
        run(base, short, tmp_path / "run")
    run(base, data, tmp_path / "run", "--max_steps=1")
    with pytest.raises(ValueError, match="holds a run already"):
        run(base, data, tmp_path / "run")
    log = run(base, data, tmp_path / "run", "--max_steps=1", "--overwrite", "--kl=0.1")
    assert [row["step"] for row in log] == ["0", "1"]  # of the new run, and no row of the one it replaced


def test_samples_are_one_line_each_whatever_is_written(tmp_path):
    strange = "a\u2028b\x85c\x0bd\r\n\ud7ff\ufffd"
    for step in (0, 5, 10, 5, 7):
        grpo.keep_samples(tmp_path / "samples.jsonl", step, [dict(step=step, written=strange)] * 2)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [0, 0, 5, 5, 7, 7] and lines[-1] == ""
    assert all(json.loads(line)["written"] == strange for line in lines[:-1])
