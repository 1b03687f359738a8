"""The fast decoder computes what the model computes, in every form it has."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from test_model import distinct_tokens, make

from nanodoge import decode
from nanodoge.decode import Decoder

EXPERTS = dict(is_moe=True, num_experts=49, num_experts_per_tok=5)


def needs_compiler(compile):
    if compile and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")


def make_model(**changes):
    return make(spread=0.05, **dict(num_hidden_layers=3, keep_window_size=12) | changes)


@torch.inference_mode()
def logits_of(model, tokens, prompt, decoder):
    """The logits after every token from the prompt on, (B, T - prompt, V)."""
    cache = model.new_cache(len(tokens), tokens.shape[1])
    model.hidden(tokens[:, :prompt], None, cache)
    return torch.stack([decoder(tokens[:, t], cache) for t in range(prompt, tokens.shape[1])], dim=1)


FORMS = [(False, {}), (True, {}), (False, dict(keep_window_size=64)), (False, EXPERTS)]
FORMS += [(False, dict(qk_norm=False, tie_word_embeddings=False))]


@pytest.mark.parametrize("compile, changes", FORMS)
def test_one_token_at_a_time_equals_one_full_pass(monkeypatch, compile, changes):
    needs_compiler(compile)
    monkeypatch.setattr(decode, "LAYERS_AT_A_TIME", 1)  # the head comes with the last
    model = make_model(num_hidden_layers=1 if compile else 2, **changes)
    tokens = distinct_tokens(2, 40, 97)
    with torch.no_grad():
        expected = model(tokens)[0][:, 5:]
    decoder = Decoder(model, compile=compile)
    torch.testing.assert_close(logits_of(model, tokens, 5, decoder), expected, atol=1e-4, rtol=0)
    with torch.compiler.set_stance("fail_on_recompile"):  # another text, within the window and beyond: compiled once
        again = logits_of(model, tokens.flip(1), 3, decoder)
    assert again.isfinite().all()


@pytest.mark.parametrize("changes", [{}, EXPERTS])
def test_a_bfloat16_model_is_decoded_as_it_is(changes):
    model, tokens = make_model(**changes).bfloat16(), distinct_tokens(2, 20, 97)
    with torch.no_grad():
        expected = model(tokens)[0][:, 5:].float()
    got = logits_of(model, tokens, 5, Decoder(model, torch.bfloat16))
    assert (got - expected).pow(2).mean() < 0.001 * expected.pow(2).mean()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_fewer_bits_are_rounded_weights_and_nothing_else(dtype):
    """The same logits as a model whose weights were rounded and stored in float32 again."""
    model, rounded = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)
    rounded.load_state_dict(model.state_dict())

    def rounding(weight):
        values, scale = decode.pack(weight, dtype)
        return values.float() if scale is None else values.float() * scale[:, None]

    for name, p in rounded.named_parameters():
        if name.endswith("proj.weight") and "dt_proj" not in name:
            p.data = rounding(p)
    tokens, head = distinct_tokens(1, 20, 97), rounding(model.output_weight)
    with torch.no_grad():
        expected = F.linear(rounded.hidden(tokens)[0], head)[:, 5:]
        cache = model.new_cache(1, 20)
        rounded.hidden(tokens[:, :5], None, cache)
        decoder = Decoder(model, dtype)
        got = torch.stack([decoder(tokens[:, t], cache) for t in range(5, 20)], dim=1)
    tolerance = 0.02 * expected.abs().max().item()  # activations are bf16 as well
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("inputs", [40, 64])
def test_int8_of_several_rows_and_of_sizes_that_the_kernel_does_not_take(inputs):
    """torch's int8 kernel reads 16 inputs at a time and does not look where the row ends."""
    x, weight = torch.randn(3, inputs), torch.randn(7, inputs)
    got = decode.product(x, decode.pack(weight, torch.int8))
    torch.testing.assert_close(got, x @ weight.T, atol=0.2, rtol=0)  # roundings of up to 1/254 of a row's largest


def test_int8_rows_keep_their_largest_entry_and_an_empty_row_stays_zero():
    weight = torch.randn(5, 32)
    weight[2] = 0
    values, scale = decode.pack(weight, torch.int8, torch.float32)
    assert values.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
    assert (values.float() * scale[:, None] - weight).abs().max() <= scale.max() / 2 + 1e-7
    with pytest.raises(ValueError, match="float32, bfloat16 or int8"):
        decode.pack(weight, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_changes_no_shape_and_no_setting_and_allocates_no_cache(dtype):
    model = make_model()
    cache, decoder = model.new_cache(1, 50), Decoder(model, dtype)
    before = [(t.data_ptr(), t.shape) for layer in cache.layers for t in layer], torch.backends.mkldnn.enabled
    for t in range(50):
        decoder(torch.tensor([t]), cache)
    with pytest.raises(IndexError):
        decoder(torch.tensor([97]), cache)  # no such token
    after = [(t.data_ptr(), t.shape) for layer in cache.layers for t in layer], torch.backends.mkldnn.enabled
    assert before == after and int(cache.length) == 50
