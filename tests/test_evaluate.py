"""evaluate.py: the loss of token-by-token decoding is the loss of the model, and the benchmarks say what lm_eval's own
way of running transformers says."""

import json
import math
import pathlib
import random
from types import SimpleNamespace

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    data = make_data(folder / "data")
    options = train.read_options([*TINY, f"--data={data}", f"--out_dir={folder / 'out'}"])
    train.train(options, Machine("cpu", "float32"))
    return folder


def test_bits_per_byte_equal_those_that_training_logged(trained, capsys):
    evaluate.main([str(trained / "out"), f"--bpb={trained / 'data'}", "--dtype=float32,bfloat16,int8", "--tokens=100"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["float32", "bfloat16", "int8"]
    logged = [row for row in read_log(trained / "out" / "log.csv") if row["val_loss"]][-1]
    assert float(rows[0][1]) == pytest.approx(float(logged["val_loss"]), abs=1e-3)
    for row in rows[1:]:
        assert float(row[1]) == pytest.approx(float(rows[0][1]), rel=5e-3)
    assert all(math.isfinite(float(row[2])) for row in rows)


def test_a_ragged_last_row_is_counted_once(trained):
    model, tokenizer = load_model(trained / "out")
    rows = train.Sequences(trained / "data", "val", 16)
    options = evaluate.EvaluateOptions(tokens=10**9, batch_size=3)
    sizes, decoder = train.bytes_of_tokens(tokenizer), evaluate.Decoder(model)
    loss, _, seen = evaluate.bits_per_byte(model, decoder, rows, sizes, options)
    assert seen == len(rows.tokens) - 1
    total = 0.0
    with torch.no_grad():
        for i in range(math.ceil((len(rows.tokens) - 1) / 16)):
            tokens, targets = rows.batch([i])
            total += model(tokens, targets)[1].item() * int((targets >= 0).sum())
    assert loss == pytest.approx(total / seen, rel=1e-5)


@pytest.mark.parametrize("arguments, words", [
    (["--dtype=int4"], "float32, bfloat16, int8"),
    (["--tokens=0"], "--tokens=0"),
    (["a", "b"], "one checkpoint"),
    (["--tasks=piqa", "--dtype=int8"], "--dtype=int8.*bfloat16"),
    (["--tasks=piqa", "--dtype=float32,bfloat16"], "--dtype=float32,bfloat16"),
    (["--suite=base", "--num_fewshot=-2"], "--num_fewshot=-2"),
    (["--suite=everything"], "base, instruct, reason"),
    (["--tasks=piqa", "--include_path=nowhere"], "--include_path=nowhere"),
    (["--tasks=piqa", "--out=nowhere/a.json"], "--out=nowhere/a.json"),
    (["--peer"], "--peer is for --tasks"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, words):
    with pytest.raises(ValueError, match=words):
        evaluate.main(arguments)


def test_data_of_another_tokenizer_is_refused(trained, tmp_path):
    data = make_data(tmp_path / "other", vocab_size=310)
    with pytest.raises(ValueError, match="another tokenizer"):
        evaluate.main([str(trained / "out"), f"--bpb={data}"])


# ---------------------------------------------------------------------------------------------------------------------
# Log-likelihoods without lm_eval


def pairs_of(seed, vocab=97):
    """Contexts, alone or with several answers, most of which begin with the same 60 tokens."""
    draw = random.Random(seed)

    def ids(n):
        return [draw.randrange(vocab) for _ in range(n)]

    shared = ids(60)
    return [(context, ids(draw.choice([1, 2, 2, 3, 7]))) for _ in range(30)
            for context in [(shared if draw.random() < 0.7 else []) + ids(draw.randint(1, 20))]
            for _ in range(draw.choice([1, 2, 4]))]  # fmt: skip


@pytest.mark.parametrize("shape", [
    {}, dict(keep_window_size=12), dict(is_moe=True, num_experts=16, num_experts_per_tok=4),
])  # fmt: skip
def test_what_is_read_once_for_many_scores_as_if_read_for_each(shape):
    torch.manual_seed(0)
    model = Doge(DogeConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                            max_position_embeddings=128, initializer_range=0.4, **shape))  # fmt: skip
    for block in model.layers:
        torch.nn.init.normal_(block.self_attn.A, std=0.3)
    pairs, wanted = pairs_of(0), []
    with torch.no_grad():
        for context, answer in pairs:
            logp = model(torch.tensor([context + answer[:-1]]))[0][0, len(context) - 1 :].log_softmax(-1)
            wanted.append((sum(row[token].item() for row, token in zip(logp, answer, strict=True)),
                           logp.argmax(-1).tolist() == answer))  # fmt: skip
    assert any(trunk for trunk, _ in evaluate.families([(tuple(context), [0]) for context, _ in pairs]))
    for batch_tokens in (300, 10**6):
        found = evaluate.log_likelihoods(model, pairs, batch_tokens)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-4)


def test_families_hold_every_stem_once_and_spare_what_they_promise():
    for seed in range(20):
        stems = [(tuple(context), [i]) for i, (context, _) in enumerate(pairs_of(seed, vocab=5))]
        found = evaluate.families(stems)
        assert sorted(stem for _, family in found for stem in family) == sorted(stems)
        for trunk, family in found:
            assert all(context[: len(trunk)] == trunk and len(context) > len(trunk) for context, _ in family)
            assert not trunk or len(trunk) * (len(family) - 1) >= evaluate.SPARED


# ---------------------------------------------------------------------------------------------------------------------
# With lm_eval, against its own `hf` model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with opinions, and task files: multiple choice of 2 or 3, generation, and a group of both kinds."""
    pytest.importorskip("lm_eval", reason="lm_eval is optional")
    folder = tmp_path_factory.mktemp("harness")
    make_checkpoint(folder / "model", max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False)
    model, tokenizer = load_model(folder / "model")
    torch.manual_seed(1)
    for block in model.layers:
        torch.nn.init.normal_(block.self_attn.A)
    save_checkpoint(folder / "model", model, tokenizer)
    words, draw = texts(200), random.Random(0)
    rows = [dict(goal=words[3 * i], sols=words[3 * i + 1 : 3 * i + 2 + i % 2 + 1], label=draw.randrange(2 + i % 2))
            for i in range(18)]  # fmt: skip
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
    (folder / "tasks").mkdir()
    (folder / "tasks" / "choose.yaml").write_text(f"""task: choose{common}output_type: multiple_choice
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_choice: sols
doc_to_target: label
metric_list: [{metric % "acc"}, {metric % "acc_norm"}]
""")
    (folder / "tasks" / "write.yaml").write_text(f"""task: write{common}output_type: generate_until
doc_to_text: "{{{{goal}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [" t", "@U"], do_sample: false, temperature: 0.0, max_gen_toks: 16}}
metric_list: [{metric % "exact_match"}]
""")
    (folder / "tasks" / "again.yaml").write_text("""task: again
include: choose.yaml
doc_to_choice: "{{sols[:2]}}"
doc_to_target: 0
""")
    (folder / "tasks" / "both.yaml").write_text("""group: both
task: [choose, again]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
""")
    return folder


@pytest.fixture(scope="module")
def models(folder):
    """(ours, hf) for one checkpoint."""
    from lm_eval.models.huggingface import HFLM

    hf = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=1)
    return evaluate.harness_model(*load_model(folder / "model"), batch_tokens=500), hf


def run_both(folder, models, **options):
    """-> for ours and for hf, lm_eval's (results, samples) of the two tasks."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    options["task_manager"] = TaskManager(include_defaults=False)  # else it reads 14,000 files
    for harness in models:
        items = evaluate.load_tasks({"choose": None, "write": None}, str(folder / "tasks"))
        results = simple_evaluate(harness, tasks=items, bootstrap_iters=10, **options)
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


def test_unknown_ways_to_generate_are_refused(models):
    request = SimpleNamespace(args=("a", dict(num_beams=4, until=[])))
    with pytest.raises(ValueError, match="num_beams.*top_p"):
        models[0].generate_until([request])


def test_the_table_shows_chance_and_the_file_holds_everything(folder, capsys):
    evaluate.main([str(folder / "model"), "--tasks=both,write,write", f"--include_path={folder / 'tasks'}",
                   f"--out={folder / 'results.json'}", "--limit=9", "--num_fewshot=0", "--device=cpu",
                   "--peer"])  # fmt: skip
    peer, *table = capsys.readouterr().out.splitlines()
    assert "49 of 49 answers are the same" in peer  # 9 of `write`, 22 of `choose`, 18 of `again`
    rows = [line.split() for line in table]
    assert rows[0] == "task shots questions metric value std error chance".split()
    assert [row[:4] for row in rows[1:3]] == [["both", "0", "18", "acc"], ["write", "0", "9", "exact_match"]]
    results = json.loads((folder / "results.json").read_text())
    choices = (5 / 2 + 4 / 3) / 9  # nine questions with two and three answers in turn
    guesses = dict(both=(choices + 0.5) / 2, choose=choices, again=0.5, write=0)
    assert results["nanodoge"]["chance"] == pytest.approx(guesses)
    scores = results["results"]
    assert scores["both"]["acc,none"] == pytest.approx((scores["choose"]["acc,none"] + scores["again"]["acc,none"]) / 2)


@pytest.mark.parametrize("tasks, words", [
    (["choose", "chose"], "--tasks=chose.*did you mean choose"),
    (["choose", "both"], "--tasks=both.*choose"),
])  # fmt: skip
def test_wrong_names_of_tasks_are_one_line(folder, monkeypatch, tasks, words):
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: manager(None, include_path, False))
    with pytest.raises(ValueError, match=words):
        evaluate.load_tasks(dict.fromkeys(tasks), str(folder / "tasks"))


def test_without_network_a_line_says_so(folder, monkeypatch):
    import lm_eval.tasks

    def load(self, names):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", load)
    with pytest.raises(ValueError, match="--tasks=choose.*reach 'baber/piqa'.*--include_path"):
        evaluate.load_tasks({"choose": None}, str(folder / "tasks"))


def test_without_lm_eval_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install lm_eval"):
        evaluate.load_tasks({"piqa": None})
