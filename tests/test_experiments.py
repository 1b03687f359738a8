"""examples/experiments.py: the page has the tables of the runs, a stopped command goes on; expected losses."""

import csv
import sys

import pytest
from helpers import stopped_after, texts

import prepare_data
import train
from nanodoge.options import HERE
from nanodoge.run import read_log

sys.path.insert(0, str(HERE / "examples"))
import experiments
import laboratory

PAGE = (HERE / "docs/experiments.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_the_page_shows_the_tables_of_the_committed_runs(name):
    rows = list(csv.DictReader((HERE / f"results/experiments/{name}.csv").open(encoding="utf-8")))
    assert laboratory.table(rows, experiments.EXPERIMENTS[name][1].split(", ")) in PAGE
    assert f"pictures/experiments/{name}.png" in PAGE and (HERE / f"docs/pictures/experiments/{name}.png").is_file()


def test_a_run_of_the_table_is_not_repeated(tmp_path, monkeypatch):
    def prepare(lab, sources, out, tokenizer="", **options):
        prepare_data.prepare(prepare_data.PrepareOptions(sources, str(out), tokenizer, 300, stories=200), quiet=True)

    monkeypatch.setattr(laboratory, "SHAPE", laboratory.SHAPE | dict(hidden_size=16, intermediate_size=16))
    monkeypatch.setattr(laboratory.Lab, "prepare", prepare)
    monkeypatch.setattr(laboratory.Lab, "bpb", lambda *args: 1.0)  # measuring and drawing take longer than training
    monkeypatch.setattr(experiments, "draw", lambda *args: None)
    (tmp_path / "book.txt").write_text("\n\n".join(" ".join(texts(40, seed)) for seed in range(20)))
    argv = ["wsd", "experts", f"--text={tmp_path / 'book.txt'}", "--max_steps=2", "--seeds=1"]
    argv += [f"--{name}={tmp_path / name}" for name in ("data", "out", "pictures")]
    experiments.main(argv)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(before) == 2
    monkeypatch.setattr(laboratory.Learner, "fit", None)
    experiments.main(argv)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_another_number_of_steps_needs_another_table(tmp_path):
    (tmp_path / "wsd.csv").write_text("seed,max_steps\n0,7\n")
    with pytest.raises(ValueError, match="--max_steps=200: .* has runs of 7"):
        experiments.main(["wsd", f"--out={tmp_path}"])


def test_the_tiny_recipe_has_the_expected_losses(tmp_path, monkeypatch):
    monkeypatch.setattr("nanodoge.run.plot_loss", lambda *paths: None)
    prepare_data.main(["stories", "--stories=1000", "--vocab_size=1024", f"--out={tmp_path / 'data'}"])
    argv = [f"--data={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", "--max_steps=200", "--batch_tokens=2048"]
    argv += ["--log_every=1", "--eval_tokens=100", "--sample_tokens=0", "--save_every=3", "--device=cpu"]
    with stopped_after(3):
        train.main(argv)
    logs = [read_log(path) for path in (tmp_path / "out/log.csv", HERE / "results/expected/tiny.csv")]
    found, expected = ([float(row["copy_loss"]) for row in log[:3]] for log in logs)
    assert found == pytest.approx(expected, abs=1e-3)
