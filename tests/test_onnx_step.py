"""Decoding by onnxruntime, against the engine without it and against float32."""

import pytest
import torch
import torch.nn.functional as F
from helpers import make_checkpoint

from model import Doge, DogeConfig
from nanodoge import stories
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request
from nanodoge.tokenizer import train_bpe

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")
from nanodoge.onnx_step import OnnxDecoder

DENSE = dict(vocab_size=300, hidden_size=64, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=64)
DENSE |= dict(num_attention_heads=4, num_key_value_heads=2, keep_window_size=8)
SHAPES = {
    "dense": DENSE,
    "moe": DENSE | dict(is_moe=True, num_experts=16, num_experts_per_tok=4),
    "wide": DENSE | dict(keep_window_size=2048, qk_norm=False, tie_word_embeddings=False, num_hidden_layers=1),
    "scaled": DENSE | dict(rope_factor=2.0),
}


def make(name):
    """A model whose scores differ from key to key, so that which keys are kept matters."""
    torch.manual_seed(0)
    model = Doge(DogeConfig(**SHAPES[name])).eval()
    for block in model.layers:
        torch.nn.init.normal_(block.self_attn.A, std=2.0)
        torch.nn.init.normal_(block.self_attn.dt_proj.weight)
    return model


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_greedy_text_is_that_of_the_model(name, slots):
    """Beyond five windows, rows of unequal length, which leave and join."""
    model, prompts = make(name), [([1, 2, 3, 4, 5], 40), ([9] * 3, 13), (list(range(30)), 30), ([7], 20)]
    requests = [[Request(ids, n, temperature=0) for ids, n in prompts] for _ in range(2)]
    expected = Engine(model, slots=slots).generate(requests[0])
    assert Engine(model, OnnxDecoder(model), slots=slots).generate(requests[1]) == expected


def test_tokens_may_be_a_column_of_a_table():
    """onnxruntime is given an address, so a strided tensor must be copied."""
    model, tokens = make("dense"), torch.arange(6).view(2, 3)
    by_column, by_row = (model.new_cache(2, 8) for _ in range(2))
    step = OnnxDecoder(model)
    for i in range(3):
        first = step(tokens[:, i], by_column).clone()
        assert torch.equal(first, step(tokens[:, i].contiguous(), by_row))


@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_read_at_once_leaves_what_the_model_leaves(name):
    """In two pieces, into one row of a cache with others: its logits, its keys, and nothing in the other rows."""
    model, ids = make(name), [5, 9, 5, 200, 17, 3, 88]  # 7 of a window of 8
    theirs, all_rows = model.new_cache(1, 20), Engine(model, slots=2)
    all_rows.allocate(20)
    decoder = OnnxDecoder(model)
    mine = all_rows.rows(1, 1, decoder)
    with torch.inference_mode():
        x, _ = model.hidden(torch.tensor([ids]), None, theirs)
        expected = F.linear(x[:, -1], model.output_weight)
    decoder.read(torch.tensor(ids[:4]), mine)
    torch.testing.assert_close(decoder.read(torch.tensor(ids[4:]), mine), expected)
    assert mine.length.item() == all_rows.cache.length[1] == len(ids) and all_rows.cache.length[0] == 0
    for ours, reference, every in zip(mine.layers, theirs.layers, all_rows.cache.layers, strict=True):
        for name, x in ours._asdict().items():
            torch.testing.assert_close(x[:, :, : len(ids)], getattr(reference, name)[:, :, : len(ids)])
        assert not every.k[0].any() and (every.position[0] == -1).all()


def test_the_engine_has_short_prompts_read_in_int8_unless_keys_have_to_leave(monkeypatch):
    """Prompts of 3, 8 and 9 tokens, of which 9 are more than the window; in float32 none."""
    read, model = [], make("dense")
    whole = OnnxDecoder.read
    monkeypatch.setattr(OnnxDecoder, "read", lambda self, ids, cache: read.append(len(ids)) or whole(self, ids, cache))
    for dtype, expected in ((torch.float32, []), (torch.int8, [3, 8])):
        engine = Engine(model, OnnxDecoder(model, dtype), slots=2)
        for n in (3, 8, 9):
            [text] = engine.generate([Request(list(range(n)), 12, temperature=0)])
            assert len(text) == 12
        assert read == expected
    engine.decoder.reads = 5
    alone = [engine.generate([Request([7] * n, 5, temperature=0)])[0] for n in (4, 6)]
    both = [Request([7] * n, 5, temperature=0) for n in (4, 6)]
    assert engine.generate(both) == alone and read[2:] == [4, 4]  # the 6 are read by the model, beside 4 or alone


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_int8_logits_are_near_those_of_float32(name):
    """As near as those of torch's int8, whose inputs are not rounded, within a factor of two."""
    model = make(name)

    def logits(decoder):
        cache = model.new_cache(1, 64)
        rows = []
        for i, token in enumerate(torch.arange(40)[:, None]):
            cache.used, cache.evicts = (i + 1, False) if i < 8 else (None, True)
            rows.append(decoder(token, cache).clone())
        return torch.stack(rows)

    exact = logits(Decoder(model))
    mine, theirs = ((logits(d(model, torch.int8)) - exact).std() / exact.std() for d in (OnnxDecoder, Decoder))
    assert mine < 2 * theirs + 0.01


def test_int8_changes_the_held_out_loss_of_a_trained_model_by_less_than_a_thousandth():
    texts = [stories.Story(i, "all").text for i in range(400)]
    tokenizer = train_bpe(texts, 512)
    tokens = torch.tensor([id for text in texts for id in tokenizer.encode(text)])
    rows = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    learned, held_out = rows[:-32], rows[-32:]
    torch.manual_seed(0)
    model = Doge(DogeConfig(**DENSE | dict(vocab_size=512, intermediate_size=128, keep_window_size=128)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        batch = learned[torch.arange(8 * step, 8 * step + 8) % len(learned)]
        model(batch[:, :-1], batch[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    def loss(decoder):
        cache, total = model.new_cache(32, 128), 0.0
        for i in range(127):
            cache.used = i + 1
            total += F.cross_entropy(decoder(held_out[:, i], cache).clone(), held_out[:, i + 1]).item() / 127
        return total

    frequency = torch.bincount(tokens, minlength=512) / len(tokens)
    exact = loss(Decoder(model.eval()))
    assert exact < 0.9 * -torch.xlogy(frequency, frequency).sum()  # more is learned than how often each token occurs
    assert abs(loss(OnnxDecoder(model, torch.int8)) / exact - 1) < 1e-3


def test_the_server_writes_the_same_text(tmp_path):
    """serve.py --backend=onnx: several slots, rows kept for the next turn."""
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    import serve

    make_checkpoint(tmp_path / "model", hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    texts = []
    for backend in ("torch", "onnx"):
        engine = serve.load_service(serve.ServeOptions([str(tmp_path / "model")], backend=backend, slots=3)).engine
        texts.append(engine.generate([Request(list(range(9, 9 + n)), 12, temperature=0) for n in (3, 40, 7, 43)]))
    assert texts[0] == texts[1]
