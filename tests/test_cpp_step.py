"""The decoder in C++ computes what the model computes, for every row by itself, with and without rounded weights."""

import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from test_decode import EXPERTS, make_model
from test_model import distinct_tokens

from nanodoge import cpp_step, decode
from nanodoge.attention import NEVER
from nanodoge.cpp_step import CppDecoder
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request

pytestmark = pytest.mark.skipif(not cpp_step.find_compiler(), reason="there is no C++ compiler")
FORMS = {"window": {}, "wide": dict(keep_window_size=64), "experts": EXPERTS, "odd": dict(vocab_size=99)}
FORMS |= {"old": dict(qk_norm=False, tie_word_embeddings=False), "scaled": dict(rope_factor=2.0)}


@torch.inference_mode()
def logits_of(model, tokens, prompt, decoder):
    """The logits after every token from the prompt on, (B, T - prompt, V), and the cache."""
    cache = model.new_cache(len(tokens), tokens.shape[1])
    model.hidden(tokens[:, :prompt], None, cache)
    return torch.stack([decoder(tokens[:, t], cache).clone() for t in range(prompt, tokens.shape[1])], dim=1), cache


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_one_token_at_a_time_equals_one_full_pass(changes):
    """And it leaves in the cache what the other decoder leaves: the same keys, in the same slots."""
    model, tokens = make_model(**changes), distinct_tokens(3, 40, 97)
    with torch.no_grad():
        expected = model(tokens)[0][:, 5:]
    got, cache = logits_of(model, tokens, 5, CppDecoder(model))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    _, theirs = logits_of(model, tokens, 5, Decoder(model))
    for ours, reference in zip(cache.layers, theirs.layers, strict=True):
        assert torch.equal(ours.position, reference.position) and (ours.s[..., -1] == NEVER).all()  # the spare
        for name in "ksv":
            a, b = (getattr(slots, name).flatten(2)[:, :, : -model.config.head_dim] for slots in (ours, reference))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_of_equally_weak_keys_the_oldest_leaves():
    """Five tokens over and over: in the first layer equal tokens have equal scores."""
    model, tokens = make_model(), torch.randint(5, (2, 40), generator=torch.Generator().manual_seed(0))
    (_, ours), (_, theirs) = (logits_of(model, tokens, 1, decoder(model)) for decoder in (CppDecoder, Decoder))
    assert torch.equal(ours.layers[0].position[..., :-1], theirs.layers[0].position[..., :-1])
    assert len(theirs.layers[0].s[0, 0, :-1].unique()) < 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_row_depends_neither_on_its_batch_nor_on_the_threads(dtype, monkeypatch):
    """Bit for bit: three rows by one thread, and each row alone by two."""
    model, tokens = make_model(hidden_size=320, intermediate_size=300), distinct_tokens(3, 30, 97)
    decoder = CppDecoder(model, dtype)

    def by_threads(count, tokens):
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        cache = model.new_cache(len(tokens), 30)
        return torch.stack([decoder(token, cache).clone() for token in tokens.T], dim=1)

    together = by_threads(1, tokens)
    for row, expected in zip(tokens, together, strict=True):
        assert torch.equal(by_threads(2, row[None])[0], expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-4), (torch.int8, 0.02)])
def test_fewer_bits_are_rounded_weights(dtype, tolerance):
    """The logits of a model whose weights were rounded. In int8 the inputs of products are rounded, too."""
    model, rounded = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)
    rounded.load_state_dict(model.state_dict())

    def rounding(weight):
        values, scale = decode.pack(weight, dtype, torch.float32)
        return values.float() if scale is None else values.float() * scale[:, None]

    for name, p in rounded.named_parameters():
        if name.endswith("proj.weight") and "dt_proj" not in name:
            p.data = rounding(p)
    tokens, head = distinct_tokens(2, 20, 97), rounding(model.output_weight)
    with torch.no_grad():
        expected = F.linear(rounded.hidden(tokens)[0], head)[:, 5:]
        cache, decoder = model.new_cache(2, 20), CppDecoder(model, dtype)
        rounded.hidden(tokens[:, :5], None, cache)
        got = torch.stack([decoder(tokens[:, t], cache).clone() for t in range(5, 20)], dim=1)
    torch.testing.assert_close(got, expected, atol=tolerance * max(1.0, expected.abs().max().item()), rtol=0)


@pytest.mark.parametrize("changes", [{}, EXPERTS])
def test_a_bfloat16_model_with_its_cache(changes):
    model, tokens = make_model(**changes).bfloat16(), distinct_tokens(2, 20, 97)
    with torch.no_grad():
        expected = model(tokens)[0][:, 5:].float()
    got, cache = logits_of(model, tokens, 5, CppDecoder(model, torch.bfloat16))
    assert (got - expected).pow(2).mean() < 0.001 * expected.pow(2).mean()
    assert cache.layers[0].k.dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{}, EXPERTS, dict(rope_factor=2.0)])
def test_greedy_text_is_that_of_the_model(changes):
    """Rows of unequal length, beyond the window, which leave and join; prompts that it reads itself."""
    model, prompts = make_model(**changes), [([1, 2, 3, 4, 5], 40), ([9] * 3, 13), (list(range(30)), 30), ([7], 20)]
    requests = [[Request(ids, n, temperature=0) for ids, n in prompts] for _ in range(2)]
    expected = Engine(model, slots=3).generate(requests[0])
    assert Engine(model, CppDecoder(model), slots=3).generate(requests[1]) == expected


@pytest.mark.parametrize("pieces", [[7], [4, 3], [1] * 7])
def test_a_prompt_read_at_once_leaves_what_the_model_leaves(pieces):
    """Into one row of a cache with others: its logits, its keys, and nothing in the other rows."""
    model, ids = make_model(), torch.tensor([5, 9, 5, 20, 17, 3, 88])
    theirs, all_rows, decoder = model.new_cache(1, 20), Engine(model, slots=2), CppDecoder(model)
    all_rows.allocate(20)
    with torch.inference_mode():
        expected = F.linear(model.hidden(ids[None], None, theirs)[0][:, -1], model.output_weight)
    for piece in ids.split(pieces):
        got = decoder.read(piece, all_rows.rows(1, 1, decoder))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for reference, every in zip(theirs.layers, all_rows.cache.layers, strict=True):
        for name, x in every._asdict().items():
            torch.testing.assert_close(x[1:2, :, : len(ids)], getattr(reference, name)[:, :, : len(ids)])
        assert not every.k[0].any() and (every.position[0] == -1).all()


@pytest.mark.parametrize("id", [-1, 97, 2**40])
def test_a_token_that_is_not_there_changes_nothing(id):
    model = make_model()
    cache, decoder = model.new_cache(2, 20), CppDecoder(model)
    with pytest.raises(IndexError, match="vocabulary"):
        decoder(torch.tensor([3, id]), cache)
    assert not cache.length.any() and not cache.layers[0].k.any()


def test_a_cache_of_another_dtype_is_refused():
    """Its memory would be read as other numbers."""
    model = make_model()
    with pytest.raises(AssertionError, match="trusts addresses"):
        CppDecoder(model)(torch.tensor([3]), model.new_cache(1, 20, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("name", ["layers.1.input_layernorm.weight", "layers.2.mlp.down_proj.weight", "norm.weight"])
def test_damaged_weights_are_noticed(dtype, name):
    model = make_model()
    model.get_parameter(name).data[3] = torch.nan
    with pytest.raises(ValueError, match="its weights are damaged"):
        Engine(model, CppDecoder(model, dtype)).generate([Request([1, 2], 5)])


def test_without_a_compiler_auto_takes_torch_and_cpp_is_refused(monkeypatch):
    monkeypatch.setattr(cpp_step, "find_compiler", lambda: None)
    assert isinstance(decode.make_decoder(make_model(), "auto", "auto"), Decoder)
    with pytest.raises(ValueError, match="--backend=cpp needs a C[+][+] compiler"):
        cpp_step.library.__wrapped__()


def test_it_is_compiled_once_and_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("false"))
    with pytest.raises(ValueError, match="false cannot compile step.cpp.*--backend=torch needs no compiler"):
        cpp_step.library.__wrapped__()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(cpp_step, "FLAGS", cpp_step.FLAGS.replace("-O3", "-O0"))
    cpp_step.library.__wrapped__()
    [made] = (tmp_path / "nanodoge").iterdir()  # and nothing else is left there
    monkeypatch.setattr(subprocess, "run", None)
    assert cpp_step.library.__wrapped__().step and made.suffix == ".so"
