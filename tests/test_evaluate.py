"""evaluate.py: the loss of token-by-token decoding is the loss of the model, and the benchmarks say what lm_eval's own
way of running transformers says."""

import contextlib
import json
import math
import pathlib
import random
import sys
from types import SimpleNamespace

import jinja2
import pytest
import torch
from helpers import TINY, make_checkpoint, make_data, texts

import evaluate
import train
from model import Doge, DogeConfig
from nanodoge.checkpoint import load_model, save_checkpoint
from nanodoge.machine import Machine
from nanodoge.run import read_log

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """lm_eval lists all packages of the machine after every task, which takes longer than the tasks."""
    with contextlib.suppress(ImportError):
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    data = make_data(folder / "data")
    options = train.read_options([*TINY, f"--data={data}", f"--out_dir={folder / 'out'}"])
    train.train(options, Machine("cpu", "float32"))
    return folder


def test_bits_per_byte_equal_those_that_training_logged(trained, capsys):
    bpb = [f"--bpb={trained / 'data'}", "--eval_tokens=100"]
    evaluate.main([str(trained / "out"), "--dtype=float32,bfloat16,int8", *bpb])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["float32", "bfloat16", "int8"]
    logged = [row for row in read_log(trained / "out" / "log.csv") if row["val_loss"]][-1]
    assert float(rows[0][1]) == pytest.approx(float(logged["val_loss"]), abs=1e-3)
    for row in rows[1:]:
        assert float(row[1]) == pytest.approx(float(rows[0][1]), rel=5e-3)
    assert all(math.isfinite(float(row[2])) for row in rows)


MISTAKES = {
    "--dtype=int4": "float32, bfloat16, int8",
    "--eval_tokens=0": "--eval_tokens=0",
    "a b": "one checkpoint",
    "--tasks=piqa --dtype=int8": "--dtype=int8.*bfloat16",
    "--tasks=piqa --dtype=float32,bfloat16": "--dtype=float32,bfloat16",
    "--suite=base --num_fewshot=-2": "--num_fewshot=-2",
    "--suite=everything": "base, instruct, reason",
    "--tasks=piqa --include_path=nowhere": "--include_path=nowhere",
    "--tasks=piqa --out=nowhere/a.json": "--out=nowhere/a.json",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_line(arguments):
    with pytest.raises(ValueError, match=MISTAKES[arguments]):
        evaluate.main(arguments.split())


def test_data_of_another_tokenizer_is_refused(trained, tmp_path):
    data = make_data(tmp_path / "other", vocab_size=310)
    with pytest.raises(ValueError, match="another tokenizer"):
        evaluate.main([str(trained / "out"), f"--bpb={data}"])


# ---- Log-likelihoods without lm_eval


def pairs_of(seed, vocab=97):
    """Contexts, each with one answer or several."""
    draw = random.Random(seed)

    def ids(n):
        return [draw.randrange(vocab) for _ in range(n)]

    for context in [ids(draw.randint(1, 60)) for _ in range(30)]:
        yield from [(context, ids(draw.choice([1, 2, 2, 3, 7]))) for _ in range(draw.choice([1, 2, 4]))]


@pytest.mark.parametrize("shape", [{}, dict(keep_window_size=12), dict(is_moe=True), dict(rope_factor=2.0)], ids=str)
def test_a_context_read_once_scores_as_if_read_for_each_answer(shape):
    torch.manual_seed(0)
    shape = dict(num_experts=16, num_experts_per_tok=4, initializer_range=0.4, max_position_embeddings=66) | shape
    model = Doge(DogeConfig(97, 32, 48, num_hidden_layers=2, **shape))
    for block in model.layers:
        torch.nn.init.normal_(block.self_attn.A, std=0.3)
    pairs, wanted = list(pairs_of(0)), []
    with torch.no_grad():
        for context, answer in pairs:
            logp = model(torch.tensor([context + answer[:-1]]))[0][0, len(context) - 1 :].log_softmax(-1)
            score = sum(row[token].item() for row, token in zip(logp, answer, strict=True))
            wanted.append((score, logp.argmax(-1).tolist() == answer))
    for micro_batch_tokens in (300, 10**6):
        found = evaluate.log_likelihoods(model, pairs, micro_batch_tokens)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-4)


def test_a_context_is_read_once(monkeypatch):
    model, read = Doge(DogeConfig(97, 32, 48, num_hidden_layers=1)), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: read.append(tokens.numel()) or hidden(tokens, *rest))
    evaluate.log_likelihoods(model, [(list(range(50)), [answer, 1, 2]) for answer in range(4)])
    assert read == [50, 4 * 2]


# ---- With lm_eval, against its own `hf` model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with opinions, and task files: multiple choice of 2 or 3, generation, a group, and what fails."""
    pytest.importorskip("lm_eval", reason="lm_eval is optional")
    folder = tmp_path_factory.mktemp("harness")
    make_checkpoint(folder / "model", max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False)
    model, tokenizer = load_model(folder / "model")
    torch.manual_seed(1)
    for block in model.layers:
        torch.nn.init.normal_(block.self_attn.A)
    save_checkpoint(folder / "model", model, tokenizer)
    words, draw = texts(200), random.Random(0)
    rows = [dict(goal=words[4 * i], sols=words[4 * i + 1 : 4 * i + 3 + i % 2]) for i in range(18)]
    rows = [row | dict(label=draw.randrange(len(row["sols"]))) for row in rows]
    lines = [json.dumps(row | dict(answer=row["sols"][row["label"]])) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines[:4]))
    (folder / "test.jsonl").write_text("".join(lines[4:]))
    common = f"""
dataset_path: json
dataset_kwargs:
  cache_dir: {folder / "cache"}
  data_files: {{train: {folder / "train.jsonl"}, test: {folder / "test.jsonl"}}}
training_split: train
test_split: test
"""
    metric = "{metric: %s, aggregation: mean, higher_is_better: true}"
    tasks = dict(
        choose=f"""task: choose{common}output_type: multiple_choice
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_choice: sols
doc_to_target: label
metric_list: [{metric % "acc"}, {metric % "acc_norm"}]
""",
        write=f"""task: write{common}output_type: generate_until
doc_to_text: "{{{{goal}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [" t", "@U"], do_sample: false, temperature: 0.0, max_gen_toks: 16}}
metric_list: [{metric % "exact_match"}]
""",
        again='task: again\ninclude: choose.yaml\ndoc_to_choice: "{{sols[:2]}}"\ndoc_to_target: 0\n',
        both="group: both\ntask: [choose, again]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
        beams="task: beams\ninclude: write.yaml\ngeneration_kwargs: {until: [], num_beams: 4}\n",
        gone="task: gone\ninclude: choose.yaml\ndataset_path: nobody/gone\ndataset_kwargs: {}\n",
        faulty='task: faulty\ninclude: choose.yaml\ndoc_to_text: "{{goal.nothing.at_all}}"\n',
    )
    (folder / "tasks").mkdir()
    for name, text in tasks.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def models(folder):
    """(ours, hf) for one checkpoint."""
    from lm_eval.models.huggingface import HFLM

    hf = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=1)
    return evaluate.harness_model(*load_model(folder / "model"), micro_batch_tokens=500), hf


def run_both(folder, models, **options):
    """-> for ours and for hf, lm_eval's (results, samples) of the two tasks."""
    from lm_eval.evaluator import simple_evaluate

    manager = evaluate.find_tasks(["choose", "write"], str(folder / "tasks"))
    for harness in models:
        options |= dict(task_manager=manager, bootstrap_iters=10)
        results = simple_evaluate(harness, tasks=["choose", "write"], **options)
        yield results["results"], results["samples"]


@pytest.mark.parametrize("options", [dict(num_fewshot=2), dict(num_fewshot=1, apply_chat_template=True)])
def test_tasks_score_as_with_lm_evals_own_model(folder, models, options):
    (ours, our_samples), (theirs, their_samples) = run_both(folder, models, **options)
    for task in ("choose", "write"):
        assert ours[task] == theirs[task]
        for mine, its in zip(our_samples[task], their_samples[task], strict=True):
            assert mine["arguments"] == its["arguments"]
    for mine, its in zip(our_samples["choose"], their_samples["choose"], strict=True):
        for (score, greedy), (wanted, was_greedy) in zip(mine["filtered_resps"], its["filtered_resps"], strict=True):
            assert score == pytest.approx(wanted, rel=1e-6, abs=1e-4) and greedy == was_greedy
    written = [sample["filtered_resps"][0] for sample in our_samples["write"]]
    assert written == [sample["filtered_resps"][0] for sample in their_samples["write"]]
    assert not any(" t" in text or "@U" in text for text in written)
    if "apply_chat_template" not in options:  # where a random model's words depend on how the prompt ends
        assert len(set(written)) > 5 and min(map(len, written)) < max(map(len, written))
    assert models[0].shortened  # some prompts were too long, and lost the same words


def test_log_likelihoods_of_real_questions_and_texts(models):
    ours, hf = models
    words = texts(40, seed=5)
    requests = [(f"Question: {a}\nAnswer:", f" {b}") for a, b in zip(words[::2], words[1::2], strict=True)]
    requests += [("", "no context at all"), ("blanks at its end  ", "are the answer's"), ("ünï", "códe \U0001f415")]
    if SHARED.is_dir():
        rows = map(json.loads, (SHARED / "piqa_valid.jsonl").read_text(encoding="utf-8").splitlines()[:50])
        requests += [(f"Question: {row['goal']}\nAnswer:", f" {row[sol]}") for row in rows for sol in ("sol1", "sol2")]
    requests = [SimpleNamespace(args=args, task_name="") for args in requests if len(args[1]) < 120]
    found = ours.loglikelihood(requests, disable_tqdm=True)
    wanted = hf.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-6, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_rolling_reads_one_bos_and_predicts_every_token_once(models):
    """With its default, hf puts a second BOS before texts and adds the probability of the first to the result."""
    ours, hf = models
    long = " ".join(texts(30))
    requests = [SimpleNamespace(args=(text,)) for text in ("short", long, long[:-100], "")]
    assert len(ours.tok_encode(long)) > 2 * ours.max_length
    before, hf.add_bos_token = hf.add_bos_token, False
    wanted = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    hf.add_bos_token = before
    assert ours.loglikelihood_rolling(requests) == pytest.approx(wanted, rel=1e-6, abs=1e-3)


def test_bos_has_the_id_0_and_comes_once(models):
    ours, hf = models
    assert ours.prefix_token_id == hf.prefix_token_id == 0 and ours.eot_token_id == hf.eot_token_id == 1
    system, user = dict(role="system", content="red"), dict(role="user", content="a cat")
    for messages in ([user], [system, user]):
        text = ours.apply_chat_template(messages)
        assert text == hf.apply_chat_template(messages)
        assert ours.tok_encode(text) == hf.tok_encode(text) and ours.tok_encode(text).count(0) == 1
    messages = [dict(role="user", content="a cat"), dict(role="assistant", content=" I think ")]
    assert ours.apply_chat_template(messages, False) == hf.apply_chat_template(messages, False)
    for text in ("a cat", "", " a<|end_of_text|>b"):
        assert ours.tok_encode(text) == hf.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == hf.tok_encode(text, add_special_tokens=False)


def test_an_answer_without_tokens_or_longer_than_the_model_is_one_line(models):
    for answer in ([], [5] * 200):
        with pytest.raises(ValueError, match="'answer' has .* tokens.*max_position_embeddings=128"):
            models[0]._loglikelihood_tokens([(("", "answer"), [0], answer)])


def test_the_table_is_lm_evals_and_the_file_holds_everything(folder, capsys):
    asked = [f"--include_path={folder / 'tasks'}", f"--out={folder / 'results.json'}", "--limit=9", "--device=cpu"]
    evaluate.main([str(folder / "model"), "--tasks=both,write=0,write=0", *asked])
    lines = capsys.readouterr().out.replace("|", " ").splitlines()
    rows = [line.split() for line in lines if "0.0" in line or "±" in line]
    assert [(row[0], row[4]) for row in rows] == [("both", "acc"), ("write", "exact_match")]
    scores = json.loads((folder / "results.json").read_text())["results"]
    assert scores["both"]["acc,none"] == pytest.approx((scores["choose"]["acc,none"] + scores["again"]["acc,none"]) / 2)


def test_a_task_that_fails_is_named_and_the_others_are_kept(folder, capsys):
    out = folder / "kept.json"
    asked = [str(folder / "model"), f"--include_path={folder / 'tasks'}", f"--out={out}", "--limit=3", "--device=cpu"]
    with pytest.raises(ValueError) as error:
        evaluate.main([*asked, "--tasks=gone,choose=50,beams,choose=2,write"])
    said = str(error.value)
    assert "\n" not in said and "--include_path=FOLDER" in said and "pip install lm_eval[ifeval,math]" in said
    few = "--tasks=choose=50: ValueError: Sample larger than population"
    for words in ("--tasks=gone: ", few, "--tasks=beams: ", "num_beams"):
        assert words in said
    assert [*map(capsys.readouterr().out.count, ("|choose", "|write"))] == [1, 1]
    assert json.loads(out.read_text())["n-shot"] == dict(choose=2, write=0)
    # what nobody foresaw keeps its traceback, and loses the others as little
    with pytest.raises(jinja2.UndefinedError):
        evaluate.main([*asked, "--tasks=gone,faulty,write"])
    assert json.loads(out.read_text())["results"].keys() == {"write"}


def test_wrong_names_of_tasks_are_one_line(folder, monkeypatch):
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: manager(None, include_path, False))
    with pytest.raises(ValueError, match="--tasks=chose: .*did you mean choose"):
        evaluate.find_tasks(["choose", "chose"], str(folder / "tasks"))


def test_without_lm_eval_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    for name in ("lm_eval.tasks", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install lm_eval"):
        evaluate.main([str(tmp_path), "--suite=base", "--device=cpu"])
