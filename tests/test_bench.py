"""bench.py: every command measures something on a tiny model and writes a row of the CSV; what it counts (FLOP, memory)
agrees with counting by hand; its peer computes what ours does. No time is ever asserted."""

import csv
import json
import os
import re
import subprocess
import sys
import time

import gpu_trials
import pytest
import torch
import torch.nn.functional as F
from helpers import STARTED
from torch.utils.flop_counter import FlopCounterMode

import bench
import bench_gpu
from model import Doge, DogeConfig
from nanodoge import engine, measure
from nanodoge.llama import llama_writer, write_gguf
from nanodoge.options import HERE, parse_options

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SHAPE |= dict(num_key_value_heads=1, keep_window_size=16, num_experts=16, num_experts_per_tok=4)
CPU = torch.device("cpu")


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "small.py"
    path.write_text("\n".join(f"{key} = {value}" for key, value in SHAPE.items()))
    return f"--model={path}"


@pytest.fixture
def quick(monkeypatch):
    """The machine's limits and fresh processes take seconds, and each is tested by itself."""
    monkeypatch.setattr(measure, "machine_limit", lambda *rest, **place: 1e9)
    monkeypatch.setattr(measure, "in_fresh_process", lambda *rest: (3_000_000, 500_000_000))


def table(tmp_path, capsys, *argv):
    """Runs bench.py here -> (rows of the CSV, what it printed)."""
    path = tmp_path / "rows.csv"
    bench.main([*argv, f"--csv={path}", "--device=cpu", "--rounds=2"])
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), capsys.readouterr().out


def read(*argv):
    return parse_options(bench.BenchOptions, list(argv), positional="what")


def case(length=0, peer=False):
    options = read("decode", "--device=cpu", "--new_tokens=3")
    return bench.Case("decode", "a case", options, "small", DogeConfig(**SHAPE), "float32", length, peer=peer)


PEERS = dict.fromkeys(["decode", "train", "prefill"], ["eager {}", "sdpa {}"])
PEERS |= dict(attention=["dense causal"], moe=["DogeCDMoE"])


@pytest.mark.parametrize("what", PEERS)
def test_ours_and_the_peer_give_a_row(what, shape, tmp_path, capsys, quick):
    parts, tokens = ["layer", "experts"] if what == "moe" else [""], 3 if what == "decode" else 24
    argv = [what, "--peer", shape, "--new_tokens=3", "--dtype=float32,bfloat16"]
    rows, printed = table(tmp_path, capsys, *argv, *["--length=24"] * (what != "decode"))
    assert [row["dtype"] for row in rows] == [dtype for dtype in ("float32", "bfloat16") for _ in parts]
    for part, row in zip(parts * 2, rows, strict=True):
        assert list(row) == [*bench.COLUMNS, *measure.conditions()]
        number = {key: float(row[key]) for key in row if key == "seconds" or key.startswith(("peer_s", "sp"))}
        assert all(value > 0 for value in number.values()) and part in row["name"]
        assert number["speedup_min"] <= number["speedup"] <= number["speedup_max"]
        assert int(row["rounds"]) == 2 and row["what"] == what and row["model"] == "small"
        assert float(row["tokens_per_second"]) == pytest.approx(tokens / number["seconds"], rel=1e-4)
        if what in ("decode", "train", "prefill"):
            assert float(row["share"]) == pytest.approx(float(row["reached"]) / 1e9, rel=1e-4)
        assert row["torch"] == torch.__version__ and row["cpu"] and row["date"] and row["transformers"]
        assert row["peer"] in [peer.format(row["dtype"]) for peer in PEERS[what]]
        assert float(row["extra_mb"]) == float(row["peer_extra_mb"]) == 3
        assert row["name"] in printed and row["peer"] in printed and str(tmp_path) not in row["name"]


def test_a_long_text_is_read_once_and_gone_on_with(shape, tmp_path, capsys, quick):
    """The peer, whose prompts take minutes, is left out, and the row says so."""
    argv = ["decode", "--peer", shape, "--length=20,24", "--new_tokens=3", "--temperature=0.7"]
    rows, printed = table(tmp_path, capsys, *argv)
    assert [row["length"] for row in rows] == ["20", "24"] and all("drawn" in row["name"] for row in rows)
    assert not any(row["peer"] or row["speedup"] for row in rows) and "no peer at this length" in printed
    assert bench.decode(case(length=24)).note == "cache 0.0 MB"


def test_both_can_draw_their_tokens(shape, tmp_path, capsys, quick, monkeypatch):
    drawn, sample = [], engine.sample
    monkeypatch.setattr(engine, "sample", lambda *args: drawn.append(float(args[2])) or sample(*args))
    [row], _ = table(tmp_path, capsys, "decode", "--peer", shape, "--new_tokens=3", "--temperature=0.7", "--dtype=int8")
    assert row["name"] == "decode small int8 decoder drawn 1x32+3" and len(drawn) == 9
    assert drawn == pytest.approx([0.7] * 9) and row["peer"].split()[1] in ("float32", "bfloat16")


def test_texts_and_files(tmp_path, capsys, quick, monkeypatch):
    monkeypatch.setattr(bench.sources, "stdlib_parts", lambda: [])  # the stories alone: reading 400 files is slow
    argv = ["tokenizer", "data", "--megabytes=1", "--vocab_size=300"]
    (words, files), _ = table(tmp_path, capsys, *argv)
    assert int(words["tokens"]) > 1000 and words["unit"] == files["unit"] == "text"
    assert float(files["reached"]) == pytest.approx(1e6 / float(files["seconds"]), rel=1e-4)
    assert float(files["extra_mb"]) == 500 and not words["extra_mb"]


def test_memory_is_that_of_the_step_and_not_of_what_went_before():
    """64 MB that the step holds are seen; the 512 MB that were given back before it are not."""

    def make_step():
        torch.ones(128_000_000)
        return lambda: torch.ones(16_000_000).numel()

    extra, whole = measure.memory_of(make_step, CPU)
    assert 60e6 < extra < 90e6 and whole > extra


def test_a_process_that_dies_is_one_line(monkeypatch):
    monkeypatch.setattr(measure.multiprocessing, "get_context", lambda kind: STARTED)
    with pytest.raises(ValueError, match="was killed, for want of memory"):
        measure.in_fresh_process(os._exit, 9)


def test_the_peer_is_ours_with_the_same_weights():
    seen = []
    one = case(length=12, peer=True)
    peers = bench.peer_steps(one, lambda peer: seen.append(peer) or (lambda: None))
    model, tokens = bench.make_model(one)
    torch.testing.assert_close(model(tokens)[0], seen[0](tokens).logits, atol=1e-4, rtol=0)
    assert set(peers) == {"eager float32", "sdpa float32"}


def test_flop_are_counted_as_by_hand():
    one, weights = case(length=40), sum(p.numel() for p in Doge(DogeConfig(**SHAPE)).parameters())
    keys = sum(min(i + 1, 16) for i in range(40)) / 40  # brute force: what each query sees
    attention = 12 * 32 * keys * 2  # 12 C per key and layer
    assert bench.train(one).amount == pytest.approx((6 * weights + attention) * 40)
    assert bench.prefill(one).amount == pytest.approx((2 * (weights - 97 * 32) + attention / 3) * 40)
    assert bench.decode(case()).amount == pytest.approx(3 * 4 * weights, rel=0.02)  # three tokens of float32 weights


def test_turns_alternate_and_a_slow_one_is_measured_once(monkeypatch):
    calls, takes = [], {"a": 1.0, "b": 30.0}
    monkeypatch.setattr(measure, "timed", lambda step, device: calls.append(step) or takes[step])
    assert measure.alternate({"ours": "a", "sdpa": "b"}, 0, CPU) == {"ours": [1.0], "sdpa": [30.0]}
    assert calls == ["a", "b", "a", "b"]
    assert measure.alternate({"ours": "a", "sdpa": "b"}, 3, CPU) == {"ours": [1.0] * 3, "sdpa": [30.0] * 3}
    assert measure.alternate({"ours": "a"}, 0, CPU) == {"ours": [1.0] * 5}


def test_the_limits_of_this_machine_are_rates():
    assert 1e7 < measure.machine_limit("bytes", 1_000_000, CPU, torch.float32) < 1e13


def test_rows_are_appended_and_a_file_of_other_columns_is_left_alone(shape, tmp_path, capsys, quick):
    argv = ["attention", shape, "--length=8"]
    assert len(table(tmp_path, capsys, *argv)[0]) == 1 and len(table(tmp_path, capsys, *argv)[0]) == 2
    other = tmp_path / "other.csv"
    other.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="other.csv: this file has other columns"):
        bench.main([*argv, f"--csv={other}"])
    assert other.read_text() == "step,loss\n1,2\n"
    header = (HERE / "results" / "bench.csv").read_text().partition("\n")[0]
    assert header == ",".join([*bench.COLUMNS, *measure.conditions()])  # which the README's rows are in


def test_a_case_is_named_after_its_options_and_has_the_shape_of_its_recipe():
    for how, name in ([], "decoder"), (["--compile"], "decoder compiled"):
        assert [c.name for c in bench.make_cases(read("decode", *how))] == [f"decode 20m float32 {name} 1x32+128"]
    for name, hidden, experts in (("20m_moe", 256, 1024), ("320m_moe", 1024, 16384)):
        config = bench.config_of(name)
        assert config.hidden_size == hidden and config.num_experts == experts and config.is_moe


MISTAKES = {
    "": "what '': must be one or more of decode",
    "decod": "what 'decod': must be one or more of decode, train",
    "decode --model=30m": "there is no config file '30m'",
    "train --dtype=int8": "int8 is for decode",
    "train --dtype=float16": "dtype 'float16': must be one or more of float32",
    "decode --length=2k": "--length=2k must be a whole number",
    "decode --length=0": "--length=0 must be a whole number from 1 up",
    "decode --rounds=-1": "--rounds=-1 must be a number from 0 up",
    "decode --temperature=-1": "--temperature=-1.0 must be a number from 0 up",
    "decode --pear": "did you mean 'peer'",
    "gpu train": "gpu is measured alone",
    "gpu --minutes=0": "--minutes=0 must be a number from 1 up",
    "train --peer=llama.cpp": "^--peer=llama.cpp is for decode$",
    "decode --peer=llama.cpp": "^llama.cpp needs two packages: pip install llama-cpp-python gguf$",
    "decode --peer": "^--peer needs transformers, which is not installed here$",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_or_a_missing_peer_is_one_line(line, monkeypatch):
    for name in ("transformers", "llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=MISTAKES[line]) as error:
        bench.main(line.split())
    assert "\n" not in str(error.value)


def test_as_a_program_with_its_memory(shape, tmp_path):
    """As users call it: `__main__` must be able to send its cases to a fresh process."""
    argv = [shape, "--new_tokens=3", "--rounds=1", "--device=cpu", f"--csv={tmp_path / 'rows.csv'}"]
    done = subprocess.run([sys.executable, "bench.py", "decode", *argv], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert 0 < float(row["extra_mb"]) < 500


# ---- bench.py gpu


FAULTS = dict(wrong="KeyError: 'what'", full="can't allocate memory", hanging="no result after 1 s")
FAULTS["killed"] = "its process ended with status 9"


def behave(device, tiny, how=""):
    if how == "wrong":
        raise KeyError("what")
    if how == "full":
        torch.empty(10**15)
    if how == "hanging":
        time.sleep(600)
    if how == "killed":
        os._exit(9)
    return dict(right=True, seconds=0.5)


def faulty():
    trials = [bench_gpu.Trial("first", behave)]
    for how in FAULTS:
        trials += [bench_gpu.Trial(how, behave, (how,), seconds=1 if how == "hanging" else 60)]
        trials += [bench_gpu.Trial(f"after {how}", behave)]
    return [*trials, bench_gpu.Trial("beside", behave, timed=False), bench_gpu.Trial("last", behave)]


def test_a_failing_a_hanging_and_a_full_trial_cost_one_row_each(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_gpu.multiprocessing, "get_context", lambda kind: STARTED)
    bench_gpu.run("cpu", 5, str(tmp_path), faulty)
    [lines], [table] = tmp_path.glob("*.jsonl"), tmp_path.glob("*.csv")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["trial"] for row in rows] == [trial.name for trial in faulty()]
    for row in rows:
        assert FAULTS.get(row["trial"], "") in row.get("failed", "") and ("failed" in row) == (row["trial"] in FAULTS)
    with open(table, newline="", encoding="utf-8") as file:
        assert [row["failed"] for row in csv.DictReader(file)] == [row.get("failed", "") for row in rows]
    printed = capsys.readouterr().out
    assert all(words in printed for words in ["a rehearsal", *FAULTS.values()])


def test_hours_are_forecast_from_the_best_rate(capsys):
    rates = [("20m", 5e5), ("20m", 1e6), ("20m_moe", 5e5), ("60m", 1e6), ("160m", 1e6), ("320m", 1e6)]
    rows = [dict(what="train", model=model, tokens_per_second=rate) for model, rate in rates]
    bench_gpu.print_forecast([dict(failed="no memory"), dict(what="decode", model="20m"), *rows])
    printed = capsys.readouterr().out
    assert "config/doge20m.py, an estimate: 1.17 h; 0.15 h on eight" in printed  # 8,000 x 0.5M tokens
    assert "config/doge20m_moe.py, an estimate: 2.33 h" in printed and printed.count("an estimate") == 5


def test_what_there_is_no_time_for_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu.multiprocessing, "get_context", lambda kind: STARTED)
    bench_gpu.run("cpu", 0, str(tmp_path), faulty)
    rows = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    assert len(rows) == 11 and all("not started: --minutes were over" in row["failed"] for row in rows)


def test_the_plan_names_each_trial_once_and_changes_what_exists():
    trials, changes = bench_gpu.plan(), gpu_trials.CHANGES
    assert len({trial.name for trial in trials}) == len(trials) and {trial.change for trial in trials} == set(changes)
    for name in {name for change in [*changes.values(), bench_gpu.REHEARSAL] for name in change}:
        module, _, attribute = name.rpartition(".")
        assert hasattr(sys.modules[module], attribute)


@pytest.mark.parametrize("window", [1024, 256])
def test_flex_attention_is_dynamic_mask_attention(window, monkeypatch):
    monkeypatch.setattr(torch, "compile", gpu_trials.trace)
    assert gpu_trials.attention("cpu", True, gpu_trials.flex, "float32", window)["error"] < 1e-5


def test_the_blocks_of_flex_attention_skip_most_of_a_long_text(monkeypatch):
    seen, causal = {}, 128 * 129 / 2
    monkeypatch.setattr(gpu_trials, "compiled_flex", lambda: lambda q, k, v, **rest: seen.update(rest) or q)
    for window, low, high in ((16384, causal, causal), (1024, 0, 0.4 * causal)):
        q, s = torch.randn(1, 1, 16384, 16), torch.rand(1, 1, 16384)
        gpu_trials.flex(q, q, q, s, window)
        mask = seen["block_mask"]
        assert low <= (mask.kv_num_blocks + mask.full_kv_num_blocks).sum() <= high


def test_flop_of_a_step_agree_with_those_torch_counts():
    """The definition computes all T x T pairs, of which flops_per_token counts the visible ones."""
    model, T = Doge(DogeConfig(**SHAPE | dict(keep_window_size=64), attention="definition")), 64
    tokens = torch.zeros(2, T).long()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten()).backward()
    pairs = 12 * 32 * 2 * (T - (T + 1) / 2)  # 12 C per pair and layer
    assert counter.get_total_flops() == pytest.approx((model.flops_per_token(T) + pairs) * 2 * T, rel=0.02)


def test_llama_cpp_is_a_peer(shape, tmp_path, capsys, quick):
    """A file of the same shape is written, read and run; the row names its format, and what its logits alone give."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    [row], printed = table(tmp_path, capsys, "decode", "--peer=llama.cpp", shape, "--new_tokens=3", "--batch_size=2")
    assert row["peer"] == "F32" and float(row["peer_seconds"]) > 0 and row["speedup"] and "F32" in printed
    assert re.fullmatch(r"[\d.]+ x its logits alone", row["note"]) and row["note"] in printed


def test_llama_cpp_writes_the_greedy_text(tmp_path, monkeypatch):
    """Each token follows from the likeliest after those before it, by llama.cpp's own class, which reads all at once.
    The one above the likeliest is written, else the text repeats one token. 200 prompts take two batches."""
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    greedy, config, path = llama.llama_sampler_sample, DogeConfig(**SHAPE), tmp_path / "model.gguf"
    monkeypatch.setattr(llama, "llama_sampler_sample", lambda *place: (greedy(*place) + 1) % 97)
    write_gguf(path, config, "F32")
    alone = llama.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    for rows, row in ((2, 0), (2, 1), (200, 199)):
        write = llama_writer(config, "F32", rows, 12, 5, 1)
        text, prompt = write()[row], [(row * 12 + i) % 97 for i in range(12)]
        alone.reset()
        alone.eval(prompt + text)
        assert len(set(text)) == 5 and ((alone.scores[11:16].argmax(-1) + 1) % 97).tolist() == text
        assert write(draws=False)[row] == prompt[-1:] * 5
