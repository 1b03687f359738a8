"""nanodoge/engine.py: how a token is drawn; that a request's text is what model.generate defines, whoever shares the
batch; what a slot costs and when it is free."""

import contextlib
import itertools
import math
import types

import pytest
import torch
from test_model import SMALL, distinct_tokens, randomise, reference_of

from model import Doge, DogeConfig
from nanodoge import engine
from nanodoge.decode import Decoder
from nanodoge.engine import Engine, Request, TextStream
from nanodoge.tokenizer import train_bpe


def make_model(seed=0, **change):
    torch.manual_seed(seed)
    return randomise(Doge(DogeConfig(**SMALL | change)), spread=0.3)


def random_points(count, seed=1):
    return 1 - torch.rand(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw_often(logits, count, seed=1, temperature=1.0, **options):
    """`count` tokens drawn from logits (1, V) with the same options."""
    options = {name: torch.full((count, 1), value) for name, value in dict(temperature=temperature, **options).items()}
    return engine.sample(logits.expand(count, -1), random_points(count, seed), **options)


# ---- How a token is drawn


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
        "greedy": (dict(temperature=0.0), {order[0]}),
        "all": (dict(top_p=1.0, min_p=0.0), set(range(50))),
    }
    for name, (options, expected) in allowed.items():
        drawn = draw_often(logits, 4000, **options)
        assert set(drawn.tolist()) <= expected, name
        assert len(set(drawn.tolist())) >= min(len(expected), 5), name
    frequency = torch.bincount(draw_often(logits, 20000, seed=2), minlength=50) / 20000
    assert (frequency - p).abs().max() < 0.02


@pytest.mark.parametrize("size", [1000, 1024])  # one block of tokens, and four
def test_draws_are_in_proportion_and_nothing_is_drawn_that_cannot_be(size):
    p = (3 * torch.randn(size, generator=torch.Generator().manual_seed(0))).softmax(-1)
    p[::3] = 0
    p[-300:] = 0  # padding of the vocabulary: a whole block of it
    drawn = engine.draw(p.expand(20000, -1), random_points(20000))[:, 0]
    counts, expected = torch.bincount(drawn, minlength=size).double(), 20000 * p.double() / p.double().sum()
    often = expected > 5
    chi2 = ((counts - expected)[often].square() / expected[often]).sum()
    assert abs(chi2 - often.sum()) < 4 * (2 * often.sum()).sqrt()  # its mean and its deviation
    assert counts[p == 0].sum() == 0
    first, last = p.nonzero()[0].item(), p.nonzero()[-1].item()
    for point, token in ((1.0, last), (2**-53, first)):  # the ends of what a generator can give
        assert engine.draw(p[None], torch.tensor([[point]], dtype=torch.float64)).item() == token


def test_unlikely_tokens_get_their_share():
    """Ten thousand of 1e-9 each, which float32 would not add to 1."""
    p = torch.full((1, 10240), 1e-9)
    p[0, 5000] = 1.0
    before = torch.arange(0, 5000, 100)[:, None]
    points = (before.double() + 0.5) * 1e-9 / (1 + 10239e-9)
    assert torch.equal(engine.draw(p.expand(len(points), -1), points), before)


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_top_p_of_a_large_vocabulary_peaked_or_flat(scale):
    """Whether or not the few likeliest tokens that are looked at first reach top_p."""
    logits = scale * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    p, order = logits[0].softmax(-1).sort(descending=True)
    count = int((p.cumsum(0) < 0.9).sum()) + 1
    assert (count > engine.LIKELY) == (scale == 0.1)
    drawn = draw_often(logits, 3000, top_p=0.9)
    assert set(drawn.tolist()) <= set(order[:count].tolist())
    assert len(set(drawn.tolist())) > count / 2


def test_each_row_is_drawn_by_its_own_options():
    """A batch of all kinds of options draws what each row alone does."""
    kinds = itertools.product((0.0, 0.7, 1.3), (0, 3, 40, 2000), (0.5, 0.99, 1.0), (0.0, 0.2))
    columns = [torch.tensor(column)[:, None] for column in zip(*kinds, strict=True)]
    names, count = ("temperature", "top_k", "top_p", "min_p"), len(columns[0])
    logits = torch.randn(count, 1000, generator=torch.Generator().manual_seed(0))
    points = random_points(count)
    together = engine.sample(logits, points, **dict(zip(names, columns, strict=True)))
    for i in range(count):
        alone = {name: column[i : i + 1] for name, column in zip(names, columns, strict=True)}
        used = {name: x for name, x in alone.items() if x.item() != dict(top_k=0, top_p=1, min_p=0).get(name)}
        assert engine.sample(logits[i : i + 1], points[i : i + 1], **used) == together[i]


# ---- A request's text


def many_requests(count=20, **options):
    """Requests of different lengths. (Distinct tokens: equal ones tie up to rounding when keys have to leave.)"""
    lengths = torch.randint(1, 60, (count, 2), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [distinct_tokens(1, n, 97, seed=i)[0].tolist() for i, (n, _) in enumerate(lengths)]
    return [Request(prompts[i], new // 2, seed=i, **options) for i, (_, new) in enumerate(lengths)]


def greedy_text(model, prompt, count, **options):
    return model.generate(torch.tensor([prompt]), count, temperature=0, **options)[0].tolist()


MODELS = {
    "fast": dict(),
    "beyond the window": dict(keep_window_size=13),
    "experts": dict(is_moe=True, num_experts=49, num_experts_per_tok=5),
    "stretched": dict(rope_factor=4.0, max_position_embeddings=20),
    "by definition": dict(keep_window_size=13, attention="definition"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_is_that_of_model_generate(kind):
    """Alone and in company, prompts whole and in pieces, rows that join and leave; by the model and by a Decoder."""
    model = make_model(**MODELS[kind])
    expected = [greedy_text(model, request.prompt, request.max_new_tokens) for request in many_requests()]
    runs = [(None, 5, 100), (None, 16, 8)]
    if kind != "by definition":
        runs += [(Decoder(model), *rest) for rest in ((1, 8), (5, 100), (16, 8))]
    for decoder, slots, piece in runs:
        requests = many_requests(temperature=0)
        assert Engine(model, decoder, slots=slots, piece=piece).generate(requests) == expected
        assert all(request.finish_reason == "length" for request in requests)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_other_formats_write_in_company_what_they_write_alone(dtype):
    model = make_model()
    decoder = Decoder(model.bfloat16() if dtype == torch.bfloat16 else model, dtype)
    alone = [Engine(model, decoder, slots=1).generate([r])[0][:4] for r in many_requests(8, temperature=0)]
    together = Engine(model, decoder, slots=8).generate(many_requests(8, temperature=0))
    same = sum(a == b[:4] for a, b in zip(alone, together, strict=True))
    assert same >= 6  # products of another shape round otherwise, which in few bits can change a token


@pytest.mark.parametrize("options", [{}, dict(top_p=0.9), dict(top_k=7, min_p=0.01, repetition_penalty=1.3)], ids=str)
def test_drawn_text_depends_on_the_seed_and_not_on_the_company(options):
    model = make_model()
    alone = [Engine(model, slots=1).generate([request])[0] for request in many_requests(**options)]
    mixed = many_requests(**options)
    others = [Request(request.prompt, 9, temperature=i % 3 / 2, top_p=0.5) for i, request in enumerate(mixed)]
    together = Engine(model, slots=7).generate([r for pair in zip(mixed, others, strict=True) for r in pair])
    assert together[::2] == alone
    again = [Request(request.prompt, request.max_new_tokens, seed=99, **options) for request in mixed]
    assert Engine(model, slots=7).generate(again) != alone


def test_repetition_penalty_equals_transformers_and_padding_ids_are_never_drawn():
    model = make_model(keep_window_size=200)
    prompt = distinct_tokens(1, 8, 97)
    options = dict(max_new_tokens=40, do_sample=False, repetition_penalty=1.7, eos_token_id=None, pad_token_id=0)
    theirs = reference_of(model).generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, 8:]
    request = Request(prompt[0].tolist(), 40, temperature=0, repetition_penalty=1.7)
    assert Engine(model).generate([request]) == theirs.tolist()
    drawn = Engine(model, vocab_size=40).generate([Request(prompt[0].tolist(), 60, temperature=5.0)])
    assert max(drawn[0]) < 40


def test_a_request_ends_at_a_stop_id_and_an_empty_prompt_is_refused():
    model, prompt = make_model(), distinct_tokens(1, 8, 97)[0].tolist()
    free = greedy_text(model, prompt, 30)
    expected = free[: free.index(free[4]) + 1]
    request = Request(prompt, 30, temperature=0, stop_ids=[free[4]])
    assert Engine(model).generate([request]) == [expected] and request.finish_reason == "stop"
    assert greedy_text(model, prompt, 30, stop_ids=[free[4]]) == expected
    assert Engine(model).generate([Request(prompt, 0)]) == [[]] and Engine(model).generate([]) == []
    with pytest.raises(ValueError, match="prompt is empty"):
        Engine(model).generate([Request([], 5)])


def test_damaged_weights_are_named_and_the_engine_is_free_again():
    model, good = make_model(), make_model()
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    broken, requests = Engine(model, slots=2), many_requests()
    with pytest.raises(ValueError, match="nan or inf: its weights are damaged"):
        broken.generate(requests)
    assert requests[0].finish_reason == "error" and not broken.live
    model.load_state_dict(good.state_dict())
    assert broken.generate([Request([5, 6], 4, 0)]) == Engine(good).generate([Request([5, 6], 4, 0)])


# ---- Slots


def test_requests_join_and_leave_between_tokens():
    """The 4 slots are always in use while there is work, and no row is computed without a request."""
    model, rows = make_model(), []
    decoder = Decoder(model)

    def count(token, cache):
        rows.append(len(token))
        return decoder(token, cache)

    vars(count).update(room=decoder.room, compiled=False, reads=0, sampling=contextlib.nullcontext)
    requests = [Request([7 + i], 3 + 5 * (i % 4), 0) for i in range(20)]
    Engine(model, count, slots=4).generate(requests)
    assert sum(rows) == sum(request.max_new_tokens - 1 for request in requests)  # the first comes from the prompt
    assert max(rows) == 4 and sum(rows) > 3.3 * len(rows)


def test_a_cancelled_request_frees_its_slot_at_once():
    model = make_model()
    engine, (a, b, c) = Engine(model, slots=2), (Request([i], 50, 0) for i in (5, 6, 7))
    for request in (a, b, c):
        engine.add(request)
    assert set(engine.step()) == {a, b}
    engine.cancel(a)
    assert a.finish_reason == "cancelled" and len(a.tokens) == 1
    assert set(engine.step()) == {b, c}
    d = Request([8], 3, 0)
    engine.add(d)
    engine.cancel(d)  # while it waits
    engine.cancel(b), engine.cancel(c), engine.cancel(c)
    assert engine.step() == [] and d.tokens == []
    stream = engine.stream(e := Request([9], 50, 0))
    assert next(stream) == e.tokens[0]
    stream.close()
    assert e.finish_reason == "cancelled" and not engine.live
    assert b.tokens == greedy_text(model, [6], len(b.tokens))


def test_a_long_prompt_is_read_a_piece_per_step_beside_the_others_tokens():
    """A token per step for who writes already, and for who comes later: neither waits for the long prompt."""
    model, tokens = make_model(max_position_embeddings=512), torch.randint(97, (1, 400)).tolist()[0]
    engine = Engine(model, slots=3, piece=50)
    writing, long, short = Request([5], 90, 0), Request(tokens, 5, 0), Request([6, 7], 5, 0)
    engine.add(writing), engine.step(), engine.add(long)
    for step in range(7):
        if step == 2:
            engine.add(short)
        assert set(engine.step()) == ({writing} if step < 2 or step > 6 else {writing, short})
    assert set(engine.step()) == {writing, long}
    engine.generate([])
    while not long.finish_reason:
        engine.step()
    assert long.tokens == greedy_text(model, tokens, 5)
    cancelled = Request(tokens, 5, 0)
    engine.add(cancelled), engine.step(), engine.cancel(cancelled)
    assert engine.reader is None


def test_memory_is_allocated_once_and_is_enough_for_any_length():
    """In a window of 13 keys, a text of 300 tokens."""
    model = make_model(keep_window_size=13)
    engine, first, second = Engine(model, slots=2), Request([5], 20, 0), Request([6], 300, 0)
    engine.add(first), engine.add(second)
    before = [(x.data_ptr(), x.shape) for slots in engine.cache.layers for x in slots]
    while not second.finish_reason:
        engine.step()
    assert before == [(x.data_ptr(), x.shape) for slots in engine.cache.layers for x in slots]
    assert before[0][1][2] == 14 and len(second.tokens) == 300


# ---- Text


class Letters:
    """A tokenizer whose ids are pieces of text."""

    vocab_size = 97

    def stream(self, skip_special=False):
        return lambda id: "" if id is None else id if isinstance(id, str) else chr(id + 32)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_strings_are_cut_wherever_the_pieces_break(size):
    text = "one two END three"
    pieces = ["".join(group) for group in itertools.zip_longest(*[iter(text)] * size, fillvalue="")]
    stream, shown = TextStream(Letters(), ["END", "never"]), ""
    for piece in pieces:
        shown += stream.feed(piece)
        assert "E" not in shown and shown == stream.text  # nothing of the stop string is ever shown
    assert shown == "one two " and stream.stopped and stream.feed(None) == ""
    stream = TextStream(Letters(), ["END"])
    assert stream.feed("one EN") == "one " and stream.feed(None) == "EN"  # it was not one after all
    assert TextStream(Letters(), ["aab"]).feed("aaab") == "a"


def test_half_a_character_is_held_back():
    tokenizer = train_bpe(["a b c"], 300)
    stream, text = TextStream(tokenizer), "a é 😀!"
    pieces = [stream.feed(id) for id in tokenizer.encode(text)] + [stream.feed(None)]
    assert "".join(pieces) == text == stream.text and not any("\ufffd" in piece for piece in pieces)


def test_a_stop_string_ends_a_request():
    model, tokenizer = make_model(), Letters()
    request = Request([5], 40, 0)
    Engine(model, tokenizer=tokenizer).generate([request])
    assert request.text.text == "".join(chr(id + 32) for id in request.tokens)
    stop = request.text.text[5:8]
    again = Request([5], 40, 0, stop=["never", stop])
    Engine(model, tokenizer=types.SimpleNamespace(stream=tokenizer.stream, vocab_size=97)).generate([again])
    assert again.finish_reason == "stop" and again.text.text == request.text.text.partition(stop)[0]
    assert again.tokens == request.tokens[: len(again.text.text) + 3]


# ---- Log-probabilities, penalties, kept rows


@pytest.mark.parametrize("piece", [8, 100])
def test_log_probabilities_of_prompt_and_text_are_those_of_the_model(piece):
    model, prompt = make_model(), distinct_tokens(1, 30, 97)[0].tolist()
    requests = [Request(prompt[i:], 6, 0, logprobs=3, echo=i % 2 == 0) for i in range(4)]
    requests.append(Request(prompt, 6, 0))
    Engine(model, Decoder(model), slots=3, piece=piece).generate(requests)
    for request in requests[:-1]:
        ids = request.prompt + request.tokens
        logp = model(torch.tensor([ids]))[0][0].log_softmax(-1)
        first = 1 if request.echo else len(request.prompt)
        scores = request.scores[1:] if request.echo else request.scores
        assert not request.echo or request.scores[0] is None
        assert len(scores) == len(ids) - first
        for at, (own, top) in enumerate(scores, first):
            assert own == pytest.approx(logp[at - 1, ids[at]].item(), abs=1e-4)
            likeliest = logp[at - 1].topk(3)
            assert [id for id, _ in top] == likeliest.indices.tolist()
            assert [x for _, x in top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
    assert requests[-1].scores == [] and requests[-1].tokens == requests[0].tokens


def test_frequency_and_presence_penalties_against_their_definition():
    """OpenAI's: logit - count * frequency - (count > 0) * presence, with the counts of the new tokens."""
    model, prompt = make_model(), [5, 6, 7]
    for frequency, presence in ((0.8, 0.0), (0.0, 1.5), (-0.5, 0.7)):
        new = []
        while len(new) < 30:
            logits = model(torch.tensor([prompt + new]))[0][0, -1]
            counts = torch.tensor(new, dtype=torch.long).bincount(minlength=97)
            new.append(int((logits - counts * frequency - (counts > 0) * presence).argmax()))
        request = Request(prompt, 30, 0, frequency_penalty=frequency, presence_penalty=presence)
        assert Engine(model, slots=2).generate([request, Request([8], 9, 0)])[0] == new


@pytest.mark.parametrize("window", [200, 40])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_kept_row_continues_a_conversation_and_is_cut_only_if_nothing_left_it(window, slots):
    model, tokens = make_model(keep_window_size=window), torch.randperm(97).tolist()
    engine = Engine(model, Decoder(model), slots=slots, reuse=True)
    engine.allocate(150)
    first = Request(tokens[:45], 10, 0)
    engine.generate([first, Request([3], 20, 0)] if slots > 1 else [first])
    for shared, new in ((tokens[:45] + first.tokens, [2, 4]), (tokens[:40], [1, 9, 8])):
        request = Request(shared + new, 12, 0)
        engine.generate([request])
        is_whole = shared != tokens[:40]
        assert request.reused == (len(shared) - 1 if is_whole else 40 if window == 200 else 0)
        assert request.tokens == Engine(model, Decoder(model), slots=1).generate([Request(shared + new, 12, 0)])[0]


def test_rows_are_kept_only_while_others_need_them_not():
    model, generator = make_model(max_position_embeddings=512), torch.Generator().manual_seed(0)
    engine, prompts = Engine(model, slots=4, reuse=True), torch.randint(97, (12, 60), generator=generator).tolist()
    engine.allocate(300)
    for turn in range(3):
        requests = [Request(prompt, 5, 0) for prompt in prompts]
        engine.generate(requests)
        assert len(engine.kept) <= 4 and not engine.live
        assert sum(request.reused > 0 for request in requests) == 0 if turn == 0 else True
        for request in requests:
            assert request.tokens == greedy_text(model, request.prompt, 5)
        prompts = [request.prompt + request.tokens + [7, 8] for request in requests]
