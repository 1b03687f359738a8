"""nanodoge/engine.py: how a token is drawn."""

import pytest
import torch
from test_model import SMALL, distinct_tokens, randomise, reference_of

import model as m
from model import Doge, DogeConfig
from nanodoge import engine


def test_sampling_options_against_their_definition():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    p = logits[0].softmax(-1)
    order = p.argsort(descending=True).tolist()
    nucleus = next(n for n in range(1, 51) if p[order[:n]].sum() >= 0.6)
    allowed = {
        "top_k": (dict(top_k=5), set(order[:5])),
        "top_p": (dict(top_p=0.6), set(order[:nucleus])),
        "min_p": (dict(min_p=0.3), {i for i in range(50) if p[i] >= 0.3 * p.max()}),
        "tiny top_p": (dict(top_p=1e-9), {order[0]}),
    }
    for name, (options, expected) in allowed.items():
        drawn = engine.sample(logits.expand(4000, 50), 1.0, **options, generator=torch.Generator().manual_seed(1))
        assert set(drawn.tolist()) <= expected, name
        assert len(set(drawn.tolist())) >= min(len(expected), 5), name
    assert engine.sample(logits, 0).item() == order[0]
    flat = engine.sample(logits.expand(20000, 50), 1.0, generator=torch.Generator().manual_seed(2))
    frequency = torch.bincount(flat, minlength=50) / 20000
    assert (frequency - p).abs().max() < 0.02


@pytest.mark.parametrize("size", [1000, 1024])  # one block of tokens, and four
def test_draws_are_in_proportion_and_nothing_is_drawn_that_cannot_be(monkeypatch, size):
    p = (3 * torch.randn(size, generator=torch.Generator().manual_seed(0))).softmax(-1)
    p[::3] = 0
    p[-300:] = 0  # padding of the vocabulary: a whole block of it
    drawn = engine.draw(p.expand(20000, -1), torch.Generator().manual_seed(1))[:, 0]
    counts, expected = torch.bincount(drawn, minlength=size).double(), 20000 * p.double() / p.double().sum()
    often = expected > 5
    chi2 = ((counts - expected)[often].square() / expected[often]).sum()
    assert abs(chi2 - often.sum()) < 4 * (2 * often.sum()).sqrt()  # its mean and its deviation
    assert counts[p == 0].sum() == 0
    first, last = p.nonzero()[0].item(), p.nonzero()[-1].item()
    for number, token in ((0.0, last), (1 - 2**-53, first)):  # the ends of what torch.rand can give
        point = torch.tensor([[number]], dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *size, point=point, **options: point)
        assert engine.draw(p[None]).item() == token


def test_unlikely_tokens_get_their_due(monkeypatch):
    """Ten thousand of 1e-9 each, which float32 would not add to 1."""
    p = torch.full((1, 10240), 1e-9)
    p[0, 5000] = 1.0
    before = torch.arange(0, 5000, 100)[:, None]
    points = 1 - (before.double() + 0.5) * 1e-9 / (1 + 10239e-9)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: points)
    assert torch.equal(engine.draw(p.expand(len(points), -1)), before)


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_top_p_of_a_large_vocabulary_peaked_or_flat(scale):
    """Whether or not the few likeliest tokens that are looked at first reach top_p."""
    logits = scale * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    p, order = logits[0].softmax(-1).sort(descending=True)
    count = int((p.cumsum(0) < 0.9).sum()) + 1
    assert (count > engine.LIKELY) == (scale == 0.1)
    drawn = engine.sample(logits.expand(3000, -1), 1.0, top_p=0.9, generator=torch.Generator().manual_seed(1))
    assert set(drawn.tolist()) <= set(order[:count].tolist())
    assert len(set(drawn.tolist())) > count / 2


def test_repetition_penalty_equals_transformers_and_padding_ids_are_never_drawn():
    model = randomise(Doge(DogeConfig(**SMALL | dict(keep_window_size=200))))
    reference, prompt = reference_of(model), distinct_tokens(1, 8, 97)
    theirs = reference.generate(prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.7, eos_token_id=None,
                                pad_token_id=0)[:, 8:]  # fmt: skip
    assert torch.equal(model.generate(prompt, 40, temperature=0, repetition_penalty=1.7), theirs)
    generator = torch.Generator().manual_seed(0)
    assert model.generate(prompt, 60, temperature=5.0, vocab_size=40, generator=generator).max() < 40


def test_generation_stops_at_a_stop_id_and_refuses_an_empty_prompt():
    model = randomise(Doge(DogeConfig(**SMALL)))
    prompt = distinct_tokens(1, 8, 97)
    free = model.generate(prompt, 30, temperature=0)[0].tolist()
    stop = free[4]
    assert model.generate(prompt, 30, temperature=0, stop_ids=[stop])[0].tolist() == free[: free.index(stop) + 1]
    assert model.generate(prompt, 0).shape == (1, 0)
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(prompt[:, :0], 5)


@pytest.mark.parametrize("window", [12, 100])
def test_a_prompt_read_in_pieces_gives_the_same_text(monkeypatch, window):
    """Rows that end before, at and after the borders of the pieces; alone and whole, each gives the same tokens."""
    model = randomise(Doge(DogeConfig(**SMALL | dict(keep_window_size=window))))
    tokens, lengths = distinct_tokens(4, 40, 97), torch.tensor([40, 5, 14, 22])
    alone = [model.generate(tokens[i : i + 1, :n], 20, temperature=0)[0] for i, n in enumerate(lengths.tolist())]
    monkeypatch.setattr(m, "PIECE", 7)
    together = model.generate(tokens, 20, temperature=0, lengths=lengths)
    assert torch.equal(together, torch.stack(alone))
