"""bench.py: every command measures something on a tiny model and says so in the table and in the CSV; what it counts
(weights, FLOP, memory) agrees with counting by hand; its peer computes what ours does. No time is ever asserted."""

import csv
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from helpers import STARTED

import bench
from model import Doge, DogeConfig
from nanodoge.options import HERE, parse_options

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, keep_window_size=16, num_experts=16, num_experts_per_tok=4)  # fmt: skip


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "small.py"
    path.write_text("\n".join(f"{key} = {value}" for key, value in SHAPE.items()))
    return str(path)


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    """The machine's limits take seconds, and one small measurement of each is a test of its own."""
    monkeypatch.setattr(bench, "read_limit", lambda device, size: 1e9)
    monkeypatch.setattr(bench, "product_limit", lambda device, dtype: 1e9)


def table(tmp_path, capsys, *argv):
    """Runs bench.py here -> (rows of the CSV, what it printed)."""
    path = tmp_path / "rows.csv"
    bench.main([*argv, f"--csv={path}", "--device=cpu", "--rounds=2"])
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), capsys.readouterr().out


def case(options=(), **fields):
    argv = ["decode", "--device=cpu", "--rounds=2", "--new_tokens=3", *options]
    options = parse_options(bench.BenchOptions, argv, positional="what")
    return bench.Case("decode", "a case", options, **dict(shape=SHAPE, dtype="float32", variant="model") | fields)


MODELS = ["decode", "train", "prefill", "attention", "moe"]


@pytest.mark.parametrize("what", MODELS)
def test_ours_and_the_peer_give_a_row(what, shape, tmp_path, capsys):
    argv = [what, "--peer", f"--model={shape}", "--length=24", "--new_tokens=3", "--memory=false"]
    rows, printed = table(tmp_path, capsys, *argv, "--dtype=float32,bfloat16")
    twice = ["layer", "experts"] if what == "moe" else [""]
    assert [row["dtype"] for row in rows] == [dtype for dtype in ("float32", "bfloat16") for _ in twice]
    assert all(name in row["name"] for name, row in zip(twice * 2, rows, strict=False))
    for row in rows:
        assert list(row) == bench.COLUMNS
        number = {key: float(row[key]) for key in bench.COLUMNS if key == "seconds" or key.startswith(("peer_s", "sp"))}
        assert all(value > 0 for value in number.values())
        assert number["speedup_min"] <= number["speedup"] <= number["speedup_max"]
        assert int(row["rounds"]) == 2 and row["what"] == what and row["model"] == "small" and row["length"] == "24"
        tokens = 3 if what == "decode" else 24
        assert float(row["tokens_per_second"]) == pytest.approx(tokens / number["seconds"], rel=1e-4)
        assert float(row["share"]) == pytest.approx(float(row["reached"]) / 1e9, rel=1e-4)
        assert row["torch"] == torch.__version__ and row["cpu"] and row["date"] and row["transformers"]
        assert row["name"] in printed and row["peer"] in printed and str(tmp_path) not in row["name"]
    theirs = {"attention": ["dense causal"], "moe": ["DogeCDMoE"]}.get(what, ["eager", "sdpa"])
    assert rows[0]["peer"] in theirs


@pytest.mark.parametrize("length", [[], ["--length=24"]])
def test_both_can_draw_their_tokens(length, shape, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: drawn.append(p) or p[:, :1].long())
    argv = ["decode", "--peer", f"--model={shape}", "--new_tokens=3", "--memory=false", "--temperature=0.7", *length]
    [row], _ = table(tmp_path, capsys, *argv)
    assert " drawn " in row["name"] and float(row["speedup"]) > 0 and len(drawn) >= 3  # the peer's


def test_without_the_peer_its_columns_are_empty(shape, tmp_path, capsys):
    rows, printed = table(tmp_path, capsys, "decode", f"--model={shape}", "--new_tokens=3", "--memory=false")
    assert not any(value for key, value in rows[0].items() if key.startswith(("peer", "speedup")))
    assert "peer" not in printed


def test_tokenizer_and_its_peer(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 300, encoding="utf-8")
    rows, printed = table(tmp_path, capsys, "tokenizer", "--peer", f"--text={text}", "--vocab_size=300")
    assert [row["name"].split()[1] for row in rows] == ["learn", "encode", "batch"]
    assert all(row["peer"].startswith("tokenizers ") and float(row["speedup"]) > 0 for row in rows)
    assert {row["unit"] for row in rows} == {"text"}
    assert int(rows[1]["tokens"]) == int(rows[2]["tokens"]) > 1000
    assert float(rows[1]["reached"]) == pytest.approx(text.stat().st_size / float(rows[1]["seconds"]), rel=1e-4)


@pytest.fixture
def forked(monkeypatch):
    """Processes that need not be fresh, and so need not import everything anew."""
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: STARTED)


def test_data_reports_the_whole_process(tmp_path, capsys, monkeypatch, forked):
    monkeypatch.setattr(bench.sources, "stdlib_parts", lambda: [])  # the stories alone: reading 400 files is slow
    rows, _ = table(tmp_path, capsys, "data", "--megabytes=1", "--vocab_size=300", "--workers=1")
    assert 100_000 < int(rows[0]["tokens"]) < 1_000_000
    assert 50 < float(rows[0]["extra_mb"]) < 4000  # a process with torch in it


def test_memory_is_that_of_the_step_and_not_of_what_went_before(monkeypatch):
    """64 MB that the step holds are seen; the 512 MB that were given back before it are not."""

    def hold(case):
        torch.ones(128_000_000)
        return bench.Task(lambda: torch.ones(16_000_000).numel())

    monkeypatch.setitem(bench.TASKS, "hold", hold)
    _, extra, whole, result = bench.alone(dataclasses.replace(case(), what="hold"), "ours")
    assert result == 16_000_000 and 60e6 < extra < 90e6 and whole > extra


class Dies(str):
    def __reduce__(self):
        return os._exit, (9,)


def test_a_process_that_dies_is_one_line(forked):
    with pytest.raises(ValueError, match="a case, ours: its process was killed, for want of memory"):
        bench.in_fresh_process(dataclasses.replace(case(), what=Dies()), "ours")


def test_the_peer_is_ours_with_the_same_weights():
    one = case(length=12)
    model, tokens = bench.make_model(one), bench.random_tokens(one, 12)
    torch.testing.assert_close(model(tokens)[0], bench.peer_of(model)(tokens).logits, atol=1e-4, rtol=0)
    assert set(bench.decode(case(["--prompt=5"])).peers()) == {"eager", "sdpa"}


def test_work_is_the_weights_in_use_and_six_flop_each():
    config = DogeConfig(**SHAPE)
    model = Doge(config)
    weights, attention = bench.work(model, 40)
    assert weights == sum(p.numel() for p in model.parameters())
    keys = sum(min(i + 1, 16) for i in range(40)) / 40  # brute force: what each query sees
    assert attention == pytest.approx(12 * 32 * keys * 2)  # 12 C a key and layer
    assert 6 * weights + attention == model.flops_per_token(40)


def test_a_turn_of_what_is_slow_counts_its_warm_up(monkeypatch):
    calls, takes = [], {"a": 1.0, "b": 30.0, "c": 2.0}
    monkeypatch.setattr(bench, "timed", lambda step, device: calls.append(step) or takes[step])
    assert bench.alternate("a", {"b": "b"}, 0, None) == ([1.0], [30.0], "b") and calls == ["a", "b", "a"]
    assert bench.alternate("a", {"b": "b"}, 3, None) == ([1.0] * 3, [30.0] * 3, "b")
    assert bench.alternate("a", {"b": "b", "c": "c"}, 0, None) == ([1.0] * 5, [2.0] * 5, "c")
    assert bench.alternate("a", {}, 2, None) == ([1.0, 1.0], [], "")


def test_out_of_memory_of_the_peer_is_noted_and_of_ours_is_an_error():
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    cpu = torch.device("cpu")
    assert bench.alternate(lambda: None, {"sdpa": fails}, 2, cpu)[2] == ""
    assert bench.alternate(lambda: None, {"sdpa": fails, "eager": lambda: None}, 2, cpu)[2] == "eager"
    with pytest.raises(ValueError, match="lower --batch_size or --length"):
        bench.alternate(fails, {}, 2, cpu)


def test_the_limits_of_this_machine_are_rates(monkeypatch):
    monkeypatch.undo()
    cpu = torch.device("cpu")
    assert 1e7 < bench.read_limit(cpu, 1_000_000) < 1e13


def test_a_long_peer_is_left_out_and_said_so(shape, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.PEER_LONGEST, "prefill", 20)
    rows, _ = table(tmp_path, capsys, "prefill", "--peer", f"--model={shape}", "--length=20,24", "--memory=false")
    assert rows[0]["peer"] and not rows[1]["peer"] and "no peer" in rows[1]["note"]


def test_rows_are_appended_and_a_file_of_other_columns_is_left_alone(shape, tmp_path, capsys):
    argv = ["attention", f"--model={shape}", "--length=8", "--memory=false"]
    assert len(table(tmp_path, capsys, *argv)[0]) == 1 and len(table(tmp_path, capsys, *argv)[0]) == 2
    other = tmp_path / "other.csv"
    other.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="other.csv: this file has other columns"):
        bench.main([*argv, f"--csv={other}"])
    assert other.read_text() == "step,loss\n1,2\n"


def test_a_compiled_row_says_so():
    for how, name in (([], "decode 20m float32 decoder 1x32+128"),
                      (["--compile=true"], "decode 20m float32 decoder compiled 1x32+128")):  # fmt: skip
        options = parse_options(bench.BenchOptions, ["decode", *how], positional="what")
        assert [case.name for case in bench.make_cases(options, "")] == [name]


def test_a_moe_twin_has_the_shape_of_its_dense_model():
    for name, hidden, experts in (("20m_moe", 256, 1024), ("320m_moe", 1024, 16384)):
        shape = bench.read_shape(name)
        assert shape["hidden_size"] == hidden and shape["num_experts"] == experts and shape["is_moe"]


@pytest.mark.parametrize("argv, message", [
    ([], "what '': must be one or more of decode"),
    (["decod"], "what 'decod': must be one or more of decode, train"),
    (["decode", "--model=30m"], "--model=30m: neither a config file nor one of 160m"),
    (["train", "--dtype=int8"], "int8 is for decode with --engine=decoder"),
    (["train", "--dtype=float16"], "dtype 'float16': must be one or more of float32"),
    (["decode", "--compile", "--engine=model"], "decode compiles with --engine=decoder"),
    (["decode", "--length=2k"], "'2k' is not a whole number"),
    (["decode", "--length=0"], "--length=0 must be at least 1"),
    (["decode", "--rounds=-1"], "--rounds=-1 must be at least 0"),
    (["decode", "--temperature=-1"], "--temperature=-1.0 must be a number from 0 up"),
    (["data", "--workers=-1"], "--workers=-1"),
    (["decode", "--pear"], "did you mean 'peer'"),
])  # fmt: skip
def test_a_mistake_is_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        bench.main(argv)
    assert "\n" not in str(error.value)


def test_a_missing_peer_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="^--peer needs transformers, which is not installed here$"):
        bench.main(["decode", "--peer"])


def test_as_a_program_with_its_memory(shape, tmp_path):
    """As users call it: `__main__` must be able to send its cases to a fresh process."""
    command = [sys.executable, "bench.py", "decode", f"--model={shape}", "--new_tokens=3", "--rounds=1", "--device=cpu",
               f"--csv={tmp_path / 'rows.csv'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert 0 < float(row["extra_mb"]) < 500
