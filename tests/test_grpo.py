"""grpo.py: its loss against numbers worked out by hand and, through a model, against transformers' Doge in float64;
what is rewarded and what is not; and a test for each way in which users of such stages were hurt: groups without a
signal, one answer a group, answers that never end, a reference that drifts, other samples after a resume."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    assert_close_logs,
    assert_same_run,
    assert_same_weights,
    gradients_seen,
    make_checkpoint,
    make_set,
    stopped_after,
    texts,
    tune,
)
from transformers import AutoModelForCausalLM

import grpo
import prepare_data
import sft
from nanodoge.checkpoint import load_model
from nanodoge.examples import TokenSet
from nanodoge.machine import Machine
from nanodoge.policy import Policy, write_answers
from nanodoge.tokenizer import Tokenizer
from train import rows_of_step, scramble

QUESTIONS = [f"{text} {i}" for i, text in enumerate(texts(100, seed=5))]
GRPO = """--batch_size=4 --generations=4 --max_new_tokens=6 --slots=8 --max_steps=4 --eval_every=2 --save_every=2
    --eval_size=12 --warmup=0""".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that answers everything with 7 or 12, as it likes, and ends: so there is something to choose from."""
    folder = tmp_path_factory.mktemp("out")
    rows = [dict(question=text, answer="7" if i % 2 else "12") for i, text in enumerate(QUESTIONS)]
    data = make_set(folder / "chat", make_checkpoint(folder / "random"), rows=rows)
    extra = "--max_steps=30 --learning_rate=1e-2 --eval_every=30 --save_every=30".split()
    tune(sft.main, folder / "random", data, folder / "base", *extra)
    return folder / "base"


@pytest.fixture(scope="module")
def data(tmp_path_factory, base):
    rows = [dict(question=text, answer="#### 7.0") for text in QUESTIONS]
    return make_set(tmp_path_factory.mktemp("data") / "problems", base, "problems", rows=rows)


def selected(data, **options):
    options = grpo.GrpoOptions(**dict(sequence_length=64, max_new_tokens=6) | options)
    return grpo.select(TokenSet(data, "train", "problems", Tokenizer.load(data)), options), options


def run(base, data, out, *options, **processes):
    return tune(grpo.main, base, data, out, *GRPO, *options, **processes)


def read_samples(folder, step):
    return [json.loads(line) for line in (folder / f"samples/{step:06}.jsonl").read_text().splitlines()]


# ---- The loss


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
    above = grpo.advantages(np.array([[1.0, 0.0], [1.0, 1.0]]), divide_by_std=False)
    assert above.tolist() == [[0.5, -0.5], [0.0, 0.0]]
    now = torch.tensor([-0.5, -2.5, -2.0, -0.9, -3.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, -2.0, -1.0, -1.0, -3.0], dtype=torch.float64)
    start = torch.tensor([-0.5, -2.0, -2.0, -1.9, -2.0], dtype=torch.float64)
    per_token = torch.tensor(above.flatten()).repeat_interleave(torch.tensor([2, 1, 1, 1]))
    k3 = [0, math.exp(0.5) - 1.5, 0, math.exp(-1), math.e - 2]
    expected = [-0.65, -0.5 * math.exp(-0.5), 0.4, 0, 0]
    batch = grpo.Batch([0, 1, 2, 3], [], per_token, old, start)
    losses, columns = grpo.token_losses(now, batch, options)
    assert losses.tolist() == pytest.approx([a + 0.5 * b for a, b in zip(expected, k3, strict=True)], abs=1e-14)
    assert columns["kl"].tolist() == pytest.approx(k3, abs=1e-14)
    assert columns["clipped"].tolist() == [True, False, True, False, False]
    assert columns["entropy"].tolist() == [1, 2, 1, 1, 3]
    (gradient,) = torch.autograd.grad(losses.sum(), now)  # of k3: 1 - e^d; of a clipped token's objective: 0
    by_hand = [0, -0.5 * math.exp(-0.5) + 0.5 * (1 - math.exp(0.5)), 0, 0.5 * (1 - math.exp(-1)), 0.5 * (1 - math.e)]
    assert gradient.tolist() == pytest.approx(by_hand, abs=1e-14)


def test_the_clip_holds_what_went_far_enough_and_lets_it_come_back():
    learning = [(1.0, 1), (1.0, -1), (1.29, 1), (0.5, 1), (0.81, -1), (5.0, -1)]
    for ratio, advantage in [*learning, (1.31, 1), (0.79, -1), (5.0, 0), (0.1, 0)]:
        now = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        loss, clipped = grpo.clipped_losses(now, torch.zeros(1), torch.tensor([float(advantage)]), 0.2, 0.3)
        loss.sum().backward()
        learns = (ratio, advantage) in learning
        assert now.grad.item() == pytest.approx(-ratio * advantage if learns else 0), (ratio, advantage)
        assert clipped.item() == (not learns and advantage != 0), (ratio, advantage)


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


def test_advantages():
    third = 3**-0.5
    for rewards, plain, scaled in (
        ([1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25], [3 * third, -third, -third, -third]),
        ([1.1, 1.1, 1.1], [0, 0, 0], [0, 0, 0]),  # whose mean, as floats go, is not 1.1
        ([0, 0], [0, 0], [0, 0]),
        ([1, -1], [1, -1], [1, -1]),
    ):
        for divide_by_std, expected in ((False, plain), (True, scaled)):
            above = grpo.advantages(np.array([rewards, rewards], float), divide_by_std)
            assert np.isfinite(above).all() and above[0] == pytest.approx(expected, abs=1e-12)
            assert (above[0] == above[1]).all() and (any(expected) or (above == 0).all())


def test_the_first_gradient_is_the_plain_policy_gradient(base, data, tmp_path):
    """Of a run, in several micro-batches, by transformers' model in float64: one answer at a time, at a temperature, no
    padding. So the position of every token, what is part of an answer, and its weight are right too."""
    extra = "--temperature=0.7 --batch_size=5 --micro_batch_tokens=100 --max_steps=1 --grad_clip=0".split()
    with gradients_seen() as seen:
        log = run(base, data, tmp_path / "run", *extra)
    problems, options = selected(data, temperature=0.7)
    machine, (model, tokenizer) = Machine("cpu", "float32"), load_model(base)
    prompts, wanted = grpo.read_problems(problems, np.repeat(rows_of_step(0, problems.count, 5, 233), 4))
    written = write_answers(machine, model, tokenizer, prompts, 6, temperature=0.7, seed=scramble(scramble(233)))
    rewards = grpo.judge(written, wanted, tokenizer, options)["reward"]
    above, tokens = grpo.advantages(rewards.reshape(5, 4), False).flatten(), sum(map(len, written))
    assert above.any()
    other, total, surprise = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").double(), 0.0, 0.0
    for prompt, answer, advantage in zip(prompts, written, above, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        logits = other(ids).logits[0, len(prompt) - 1 : -1] / 0.7
        logp = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        total, surprise = total - advantage * logp.sum() / tokens, surprise - logp.sum().item() / tokens
    total.backward()
    lengths = [len(ids) for ids in written]
    assert float(log[1]["loss"]) == pytest.approx(-(above * lengths).sum() / tokens, abs=1e-5)
    assert float(log[1]["entropy"]) == pytest.approx(surprise, abs=1e-5) and float(log[1]["clipped"]) == 0
    theirs = {name.removeprefix("model."): p.grad for name, p in other.named_parameters()}
    for (name, _), (_, found) in zip(model.named_parameters(), seen[0], strict=True):
        torch.testing.assert_close(found.double(), theirs[name], atol=1e-6, rtol=1e-4, msg=name)


def test_logprobs_are_those_of_the_drawing_over_the_ids_that_can_be_drawn(base):
    model, _ = load_model(base)
    tokens = torch.randint(300, (7, 60))
    logits = model(tokens)[0][..., :300] / 2.0
    expected = logits.log_softmax(-1).gather(2, tokens[..., None]).flatten()
    found, _ = Policy(model, vocab_size=300, temperature=2.0)(tokens, torch.arange(420), tokens.flatten())
    torch.testing.assert_close(found, expected)


# ---- Rewards


THINK, END_THINK = "<|begin_of_thought|>", "<|end_of_thought|>"
SOLVE, END_SOLVE = "<|begin_of_solution|>", "<|end_of_solution|>"
RIGHT = {  # what is wanted: what is right, separated by |
    "42": "42|42.0|42.|042|+42|$42| 42\n|so #### 42|#### 41 #### 42|42%|42 apples|42 €|€42|42 km/h|x = 42|$x=42$",
    "7": r"$7$|**7**|\boxed{7}|so \boxed{6}, no: $\boxed{7}$.|\(7\)|`7`|7\text{ cm}|7^\circ|7cm|14/2|\frac{14}{2}",
    "0.5": r"1/2|\frac{1}{2}|\dfrac12|50%|50\%|50 percent|5e-1|.5|5 \times 10^{-1}",
    "2.5": "2 1/2|5/2",
    "1000": r"1,000|1000.|$1,000.00|1e3|10^3|10^{3}|1{,}000|1\,000|1 thousand|1×10^3",
    "36 eggs": "3 dozen|36|36 egg|3 dozen eggs",
    "1,000.00": "1000|+1000",
    "-3": "-3|-3.0|-$3|$-3|\N{MINUS SIGN}3|\N{EN DASH}3|-6/2|-\\frac{6}{2}",
    "0.50": ".5|0.5",
    "0": "-0|0.0",
    "12345678": "12,345,678",
    "Paris": "Paris| Paris |**Paris**|\\text{Paris}.",
    "3/4": "3/4|0.75",
    "nan": "nan",
}
WRONG = {
    "42": "43|4 2|42 43|41\n42||-42|4,2|0x2a|٤٢|4_2|nan|inf|$|forty-two|#### 42 ####|42.0000000000000001|42 million",
    "-42": "--42|-$-42|42",
    "100": "1,00",
    "1000": "10,00|1e2|10^2",
    "5": r"5x|5\pi|5\sqrt{2}|5 pi|5^2|5!|3:30|5 or 6|1,5|5/0|\boxed{5|5 apples and 3 pears",
    "5 km": "5 m|5 apples",
    "0.5%": "50%|0.005%",
    "0": ",000|.|-|",
    "Paris": "paris|Pari",
    "1": "1e999999999",
    "0.3": "0.30000000000000004",
}


def test_what_is_right():
    for table, right in ((RIGHT, True), (WRONG, False)):
        for wanted, answers in table.items():
            for said in answers.split("|"):
                assert grpo.is_right(said, wanted) is right, (said, wanted)
    for said, wanted, right in (
        ("9" * 5000, "9" * 5000 + ".0", True),
        ("9" * 5000, "9" * 4999, False),
        ("1/" + "9" * 5000, "0", False),
        (" ".join("*$" * 50_000), "5", False),
        ("\\boxed{" * 50_000 + "5", "5", False),
        (SOLVE * 50_000, "5", False),
        (r"so \boxed{\frac{\sqrt{2}}{2}}.", r"\frac{\sqrt{2}}{2}", True),
        (f"{SOLVE}42{END_SOLVE}{SOLVE}41", "42", True),
        (f"{SOLVE}42{END_SOLVE}", "42", True),
        (f"{SOLVE}41{END_SOLVE}{SOLVE}42{END_SOLVE}", "42", True),
        (f"42 {SOLVE}", "42", False),
        (f"{SOLVE}42", "42", False),
        (f"{SOLVE}{END_SOLVE}", "", False),
        (f"42 {SOLVE}41{END_SOLVE}", "42", False),
    ):
        assert grpo.is_right(said, wanted) is right, (said[:20], wanted[:20])


def test_preparation_says_how_many_answers_are_numbers(base, tmp_path, capsys):
    rows = [dict(question=f"What is {i}?", answer=f"{i} cats" if i % 4 else "a cat") for i in range(80)]
    folder = make_set(tmp_path / "set", base, "problems", rows=rows)
    lines = (folder / "train.answers.jsonl").read_text().splitlines()
    count = sum('"a cat"' not in line for line in lines)
    prepare_data.report(folder, json.loads((folder / "meta.json").read_text()))
    assert f"  {count} of {len(lines)} answers are numbers (see nanodoge/answers.py)" in capsys.readouterr().out


THOUGHT, SOLUTION = f"{THINK}\n1, 2\n{END_THINK}", f"{SOLVE}\n2\n{END_SOLVE}"


def test_what_is_in_format():
    t, s = THOUGHT, SOLUTION
    for text in (f"{t}\n\n{s}", f" {t}{s}\n"):
        assert grpo.is_in_format(text), text
    for text in ("", "2", s, t, s + t, t + s + s, t + t + s, f"{t} so {s}", f"{t}{s} ok", f"well {t}{s}", t + s[:-1]):
        assert not grpo.is_in_format(text), text
    assert not grpo.is_in_format(t[:-20] + s + t[-20:])


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
    earned = np.array([2.5, 0, 2, 0, 0.5, 0]) - 0.25 * columns["length"] / 100
    assert columns["reward"] == pytest.approx(earned)


# ---- The run


def test_what_is_rewarded_is_learned(base, data, tmp_path):
    """From 7 or 12 to 7. The log says what happened, and a group that agrees is counted as one without a signal."""
    extra = "--max_steps=20 --eval_every=20 --save_every=20 --learning_rate=3e-3 --seed=2".split()
    log = run(base, data, tmp_path / "run", *extra)
    assert [row["step"] for row in log] == [str(i) for i in range(21)]  # 0: where it starts
    rewards = [float(row["reward_answer"]) for row in log[1:]]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3
    assert float(log[0]["val_accuracy"]) < 1 == float(log[-1]["val_accuracy"]) == float(log[-1]["val_reward"])
    for row in log[1:]:
        parts = float(row["reward_answer"]) + 0.1 * float(row["reward_format"])
        assert float(row["reward"]) == pytest.approx(parts, abs=1e-9)
        assert 1 <= float(row["length"]) <= 6 and 0 <= float(row["no_signal"]) <= 1 and row["kl"] == ""
        assert (float(row["grad_norm"]) == 0) == (float(row["no_signal"]) == 1)
    assert [sample["step"] for sample in read_samples(tmp_path / "run", 0)] == [0] * 4
    samples = read_samples(tmp_path / "run", 20)
    assert samples[-1]["problem"].endswith("<|start_header_id|>assistant<|end_header_id|>\n")
    assert samples[-1]["written"] == "7<|end_of_text|>" and samples[-1]["wanted"] == "7.0"


def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(base, data, tmp_path):
    """With the same answers drawn, whatever random numbers were used before; and with the same reference, though the
    folder it was loaded from is gone."""
    extra = ["--kl=0.05", "--updates_per_rollout=2", "--learning_rate=2e-2", "--divide_by_std=true"]
    start = shutil.copytree(base, tmp_path / "start")
    whole = run(start, data, tmp_path / "whole", *extra)
    with stopped_after(3):
        run(start, data, tmp_path / "cut", *extra)
    (tmp_path / "cut" / "samples" / "000004.jsonl").write_text('{"step": 4, "of": "a run that was ki')
    shutil.rmtree(start)
    torch.randn(3)
    grpo.main([f"--out_dir={tmp_path / 'cut'}", "--resume"])
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert_same_weights(tmp_path / "cut" / "reference", tmp_path / "whole" / "reference")
    assert_same_weights(base, tmp_path / "cut" / "reference")  # it has not drifted; the model has moved
    with pytest.raises(AssertionError):
        assert_same_weights(base, tmp_path / "cut")
    for step in (0, 2, 4):
        assert read_samples(tmp_path / "cut", step) == read_samples(tmp_path / "whole", step)
    assert float(whole[1]["kl"]) > 0 and float(whole[-1]["kl"]) > 0  # the second update of a step is somewhere else
    assert max(float(row["clipped"]) for row in whole[1:]) > 0


def test_two_processes_equal_one(base, data, tmp_path):
    """They draw the same answers, though each writes only some, of 3 pieces one writes two, and each keeps only half
    of the weights."""
    extra = ["--slots=6", "--kl=0.1", "--eval_every=4", "--save_every=4", "--sample_tokens=5"]
    alone = run(base, data, tmp_path / "one", *extra)
    two = run(base, data, tmp_path / "two", *extra, "--shard", processes=2)
    names = ("loss", "grad_norm", "kl", *grpo.COLUMNS)
    assert_close_logs(alone, two, names, 2e-5)
    assert len({row["length"] for row in alone}) > 2  # they did differ from step to step
    assert read_samples(tmp_path / "one", 4) == read_samples(tmp_path / "two", 4)


def test_what_is_drawn_depends_on_seed_and_step(base, data):
    machine, model = Machine("cpu", "float32"), load_model(base)[0]

    def draw(step=0, **changes):
        options = dict(batch_size=2, generations=8, temperature=5.0, slots=8, seed=1) | changes
        batches, columns, _ = grpo.rollout(machine, model, *selected(data, **options), step)
        rows = [pair for batch in batches for pair in zip(batch.rows, batch.inputs[0].tolist(), strict=True)]
        return [ids for _, ids in sorted(rows)], columns

    rows, columns = draw()
    assert len({tuple(ids) for ids in rows}) > 8  # the answers of a group are drawn one by one
    assert all(column.shape == (16,) for column in columns.values())
    assert draw()[0] == draw(slots=3)[0] == rows != draw(seed=2)[0]
    assert draw(step=1)[0] != rows and draw(temperature=1.0)[0] != rows


def test_a_run_without_any_signal_goes_on_and_says_so_once(base, data, tmp_path, capsys):
    """No answer is in form, so nothing is learned: no NaN. And experts are tuned like anything else."""
    experts = dict(is_moe=True, num_experts=16, num_experts_per_tok=2, router_aux_loss_coef=0.0)
    model = make_checkpoint(tmp_path / "moe", **experts)
    log = run(model, data, tmp_path / "run", "--max_steps=2", "--reward_answer=0", "--divide_by_std=true")
    assert [float(row["no_signal"]) for row in log[1:]] == [1, 1]
    assert [float(row["loss"]) for row in log[1:]] == [float(row["grad_norm"]) for row in log[1:]] == [0, 0]
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1
    assert "step 1 learns nothing: all answers to a problem earn the same; " in out


def test_data_without_its_answers_is_refused_and_an_old_run_replaced(base, data, tmp_path):
    short = shutil.copytree(data, tmp_path / "short")
    lines = (short / "train.answers.jsonl").read_text().splitlines(keepends=True)
    (short / "train.answers.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=f"answers.jsonl has {len(lines) - 1} answers to {len(lines)} problems"):
        run(base, short, tmp_path / "run")
    (short / "train.answers.jsonl").unlink()
    with pytest.raises(ValueError, match="answers.jsonl has 0 answers"):
        run(base, short, tmp_path / "run")
    run(base, data, tmp_path / "run", "--max_steps=1")
    (tmp_path / "run/samples/000009.jsonl").touch()
    log = run(base, data, tmp_path / "run", "--max_steps=1", "--overwrite", "--kl=0.1")
    assert [path.name for path in sorted((tmp_path / "run/samples").iterdir())] == ["000000.jsonl", "000001.jsonl"]
    assert [row["step"] for row in log] == ["0", "1"]  # of the new run, and no row of the one it replaced
