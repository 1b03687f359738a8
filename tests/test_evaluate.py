"""evaluate.py: the loss of token-by-token decoding is the loss of the model."""

import math

import pytest
import torch
from helpers import TINY, make_data

import evaluate
import runtime
import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    data = make_data(folder / "data")
    options = train.read_options([*TINY, f"--data={data}", f"--out_dir={folder / 'out'}"])
    train.train(options, runtime.Machine("cpu", "float32"))
    return folder


def test_bits_per_byte_equal_those_that_training_logged(trained, capsys):
    evaluate.main([str(trained / "out"), f"--bpb={trained / 'data'}", "--dtype=float32,bfloat16,int8", "--tokens=100"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["float32", "bfloat16", "int8"]
    logged = [row for row in runtime.read_log(trained / "out" / "log.csv") if row["val_loss"]][-1]
    assert float(rows[0][1]) == pytest.approx(float(logged["val_loss"]), abs=1e-3)
    for row in rows[1:]:
        assert float(row[1]) == pytest.approx(float(rows[0][1]), rel=5e-3)
    assert all(math.isfinite(float(row[2])) for row in rows)


def test_a_ragged_last_row_is_counted_once(trained):
    model, tokenizer = runtime.load_model(trained / "out")
    rows = train.Rows(trained / "data", "val", 16)
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
])  # fmt: skip
def test_mistakes_are_one_line(arguments, words):
    with pytest.raises(ValueError, match=words):
        evaluate.main(arguments)


def test_data_of_another_tokenizer_is_refused(trained, tmp_path):
    data = make_data(tmp_path / "other", vocab_size=310)
    with pytest.raises(ValueError, match="another tokenizer"):
        evaluate.main([str(trained / "out"), f"--bpb={data}"])
