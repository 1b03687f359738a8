"""model.py against its own definition, against transformers' Doge (same weights: same logits, loss, gradients, text),
against brute force where that library is wrong or arbitrary, and against itself: what must not change anything does
not. Each fast path is held against the definition within the window and beyond it."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DogeConfig as ReferenceConfig
from transformers import DogeForCausalLM

import model as m
from model import Doge, DogeConfig
from nanodoge import losses, memory
from nanodoge.attention import dynamic_mask_attention, eviction_steps, key_scores, rank_by_score
from nanodoge.experts import RoutedExperts

SMALL = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2, keep_window_size=64)
MOE = SMALL | dict(is_moe=True, num_experts=49, num_experts_per_tok=5)
BEYOND = SMALL | dict(keep_window_size=9)
KINDS = {"dense": SMALL, "moe": MOE, "beyond the window": BEYOND, "moe beyond": MOE | BEYOND}
CHUNKED = functools.partial(dynamic_mask_attention, chunk=8)


def randomise(model, seed=0, spread=0.1):
    """Weights far from their initial values, A and dt_proj above all, so that no term is invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if name.endswith(".A") or "dt_proj" in name else spread  # scores from about 0.5 to 3
            p += scale * torch.randn(p.shape, generator=generator)
    return model.eval()


def make(shape=SMALL, seed=0, spread=0.1, **changes):
    return randomise(Doge(DogeConfig(**shape | changes)), seed, spread)


def reference_of(model):
    """transformers' Doge with the weights of ours."""
    config = {key: value for key, value in dataclasses.asdict(model.config).items() if key != "qk_norm"}
    reference = DogeForCausalLM(ReferenceConfig(**config, attn_implementation="eager"))
    state = {key if key.startswith("lm_head") else f"model.{key}": w for key, w in model.state_dict().items()}
    missing = reference.load_state_dict(state, strict=not model.config.tie_word_embeddings)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    reference.tie_weights()
    return reference.eval()


def distinct_tokens(rows, length, vocab_size, seed=0):
    """Rows without repeated tokens: equal tokens have equal scores in layer 0, and the reference breaks ties anyhow."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(vocab_size, generator=generator)[:length] for _ in range(rows)])


def gradients(model, tokens):
    return torch.autograd.grad(model(tokens, tokens)[1], list(model.parameters()))


def with_gradients(function, inputs, direction=None):
    """[what function(*inputs) returns, the gradients of inputs], in float64. direction: dL/d(out), or out itself."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, out.detach() if direction is None else direction.to(out.dtype))
    return [x.double() for x in (out, *grads)]


def assert_all_close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@torch.no_grad()
def greedy(model, tokens, count, lengths=None, piece=1000):
    """The likeliest `count` tokens after each row (B, T), through the cache; the prompt is read `piece` at a time."""
    B, T = tokens.shape
    lengths, cache = torch.full((B,), T) if lengths is None else lengths, model.new_cache(B, T + count)
    x, text = torch.zeros(B, 1, model.config.hidden_size), []
    for start in range(0, T, piece):
        part = tokens[:, start : start + piece]
        ends = (lengths - start).clamp(0, part.shape[1])  # 0 in a row that has ended
        states, _ = model.hidden(part, ends, cache, (ends - 1).clamp(min=0))
        x = torch.where((ends > 0)[:, None, None], states, x)
    logits = F.linear(x[:, 0], model.output_weight)
    for _ in range(count):
        text.append(logits.argmax(-1))
        logits = F.linear(model.hidden(text[-1][:, None], None, cache)[0][:, 0], model.output_weight)
    return torch.stack(text, dim=1)


# ---- The fast paths against the definition


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_equals_the_definition(kind, monkeypatch):
    """Logits, loss, gradients of all parameters, and greedy text of rows of different lengths through the cache."""
    monkeypatch.setattr(m, "dynamic_mask_attention", CHUNKED)
    model, tokens = make(KINDS[kind], router_aux_loss_coef=0.1), distinct_tokens(3, 40, 97)
    lengths, found = torch.tensor([40, 5, 17]), {}
    for model.config.attention in ("fast", "definition"):
        loss = model(tokens, tokens)[1]
        grads = torch.autograd.grad(loss, list(model.parameters()))
        texts = [greedy(model, tokens, 30, lengths, piece) for piece in (1000, 7)]
        found[model.config.attention] = model(tokens)[0], loss, grads, texts
    (logits, loss, grads, texts), expected = found["fast"], found["definition"]
    torch.testing.assert_close(logits, expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected[1])
    assert_all_close(grads, expected[2], atol=1e-5, rtol=1e-3)
    for text in (texts[1], *expected[3]):
        assert torch.equal(text, texts[0])
    model.config.attention = "fast"
    for row, n in enumerate(lengths.tolist()):  # whoever shares the batch
        assert torch.equal(greedy(model, tokens[row : row + 1, :n], 30)[0], texts[0][row])


def brute_visible(s, window):
    """Every query ranks all keys up to its own by (score, position) and keeps the best `window`: s (B, K, T) -> (B, K,
    T, T)."""
    B, K, T = s.shape
    seen = torch.zeros(B, K, T, T, dtype=torch.bool)
    for b, k, i in torch.cartesian_prod(*map(torch.arange, (B, K, T))).tolist():
        kept = sorted(range(i + 1), key=lambda j: (s[b, k, j].item(), j))[-window:]
        seen[b, k, i, kept] = True
    return seen


@pytest.mark.parametrize("window", [1, 4, 30, 64])
def test_the_definition_of_visible_against_a_ranking_of_every_query(window):
    for s in (torch.rand(2, 2, 30), torch.randint(0, 4, (2, 2, 30)) / 2):
        assert torch.equal(m.visible(s, window), brute_visible(s, window))
    i, j = torch.arange(30)[:, None], torch.arange(30)  # A = 0: all scores equal, so the last W keys are visible
    assert torch.equal(m.visible(torch.ones(1, 1, 30), window)[0, 0], (j <= i) & (j > i - window))


def attention_inputs(T, scores="random", seed=0, B=2, H=4, K=2, D=8):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, heads, T, D, dtype=torch.float64, generator=g) for heads in (H, K, K))
    s = torch.rand(B, K, T, generator=g)
    up, few = s.sort().values, (4 * s).floor() / 2
    kinds = dict(random=s, equal=torch.ones_like(s), few=few, rising=up, falling=up.flip(-1))
    return [x.double().requires_grad_() for x in (q, k, v, kinds[scores])]


CUTS = [(50, 0, 64, 8), (50, 0, 50, 8), (50, 0, 13, 8), (50, 0, 5, 16), (33, 0, 1, 8), (40, 0, 7, 64)]
CUTS += [(100, 0, window, 16) for window in (2, 99, 101, 300)]
CUTS += [(30, 7, 64, 8), (30, 7, 13, 8), (20, 14, 13, 8), (9, 50, 5, 4)]  # as after a cache: T queries, held + T keys


@pytest.mark.parametrize("scores", ["random", "equal", "few", "rising", "falling"])
@pytest.mark.parametrize("T, held, window, chunk", CUTS)
def test_attention_and_its_gradients_equal_the_definition(T, held, window, chunk, scores):
    q, k, v, s = inputs = attention_inputs(held + T, scores)
    out, kept = dynamic_mask_attention(q[:, :, held:], k, v, s, window, chunk)
    expected = m.attention_by_definition(q[:, :, held:], k, v, s, window)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected))
    assert_all_close(ours, theirs, atol=1e-6, rtol=1e-5)
    seen = m.visible(s, window)
    assert torch.equal(kept, seen[:, :, -1].nonzero()[:, -1].view(kept.shape))
    ends = eviction_steps(rank_by_score(s), window)  # a key is seen from its position on, until another takes its place
    assert torch.equal(ends, torch.arange(held + T) + seen.sum(dim=-2))


class Allocated(TorchDispatchMode):
    """Counts the numbers in all tensors that operations return, views excluded."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        fresh = [] if func.is_view or func._schema.name.endswith("_") else tree_leaves(out)
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in fresh if isinstance(x, torch.Tensor)]
        self.total, self.largest = self.total + sum(sizes), max([self.largest, *sizes])
        return out


def test_work_and_memory_grow_with_the_length_and_not_with_its_square():
    """Counted and not timed: numbers written, numbers held for the backward pass, and the largest tensor."""
    counts = []
    for T in (1024, 2048, 4096):
        inputs, held = [x.float().detach().requires_grad_() for x in attention_inputs(T, B=1, H=2, K=1)], []
        with Allocated() as counter:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):  # noqa: B023
                out, _ = dynamic_mask_attention(*inputs, 64, 32)
            torch.autograd.grad(out.sum(), inputs)
        storages = {x.untyped_storage().data_ptr(): x.numel() for x in held}
        counts.append((counter.total, counter.largest, sum(storages.values())))
        assert max(counts[-1][1:]) < 5 * inputs[0].numel()  # held: q, k, v and their folded forms
    for a, b in zip(counts, counts[1:], strict=False):
        assert all(y < 2.2 * x for x, y in zip(a, b, strict=True)), counts


@pytest.mark.parametrize("window", [256, 90])
def test_bf16_attention_and_its_gradients_are_no_worse_than_the_reference_form(window):
    """Within the window, and beyond it in chunks. The reference form keeps mask and probabilities in bf16."""
    q, k, v, s = (x.detach() for x in attention_inputs(256, D=64, B=1))
    s = (4 * s).float()
    unseen = ~m.visible(s, window).repeat_interleave(2, 1)

    def reference(q, k, v, s):
        k, v, s = (x.repeat_interleave(2, 1) for x in (k, v, s))
        mask = s[:, :, None].to(q.dtype).masked_fill(unseen, -math.inf)
        weights = (q @ k.transpose(-1, -2) / 8 + mask).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        return weights.to(q.dtype) @ v

    rounded, ones = [*(x.bfloat16() for x in (q, k, v)), s], torch.ones_like(q)
    exact = with_gradients(lambda *x: m.attention_by_definition(*x, window), [q, k, v, s.double()], ones)
    ours = with_gradients(lambda *x: dynamic_mask_attention(*x, window, 32)[0], rounded, ones)
    for a, b, true in zip(ours, with_gradients(reference, rounded, ones), exact, strict=True):
        assert (a - true).square().mean() <= (b - true).square().mean()


def test_scores_up_to_their_bound_are_exact_and_beyond_it_stay_numbers():
    exponents = torch.tensor([0.5, 20.0, 79.9, 80.1, 88.8, 1e30])
    dt = exponents + torch.log(-torch.expm1(-exponents))  # the inverse of softplus
    scores = key_scores(torch.ones(6), dt)
    torch.testing.assert_close(scores[:3], exponents[:3].exp(), rtol=1e-4, atol=0)
    assert (scores[3:] == math.exp(80)).all() and torch.exp(exponents[4]).isinf()
    assert (scores * math.sqrt(2**15)).bfloat16().isfinite().all()  # folded, for heads of up to 32,768 dimensions
    tokens = torch.arange(60).view(2, 30)
    for dtype in (torch.float32, torch.bfloat16):
        for window in (64, 5):
            model = make(keep_window_size=window, num_hidden_layers=1)
            torch.nn.init.constant_(model.layers[0].self_attn.A, 1e4)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(tokens, tokens)[1]
            loss.backward()
            assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():  # weights that convert.py wrote as float16
        assert model.half()(tokens)[0].isfinite().all()


# ---- The cache


@pytest.mark.parametrize("window", [5, 16, 200])
def test_the_cache_equals_no_cache_whatever_the_cut(window):
    """Prompt, several tokens at once, one at a time, several again: always the logits of one full pass."""
    model = make(keep_window_size=window)
    tokens = distinct_tokens(2, 60, 97)  # equal tokens tie up to rounding, which depends on the shape of a product
    expected, cache, done, pieces = model(tokens)[0], model.new_cache(2, 60), 0, []
    cache.chunk = 8
    with torch.no_grad():
        for count in [23, 4, 1, 1, 9, 1, 1, 1, 1, 18]:
            pieces.append(model.hidden(tokens[:, done : done + count], None, cache)[0])
            done += count
        logits = F.linear(torch.cat(pieces, dim=1), model.output_weight)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert cache.layers[0].k.shape[2] == min(window, 60) + 1


# ---- transformers' Doge

SHAPES = [
    dict(),
    dict(num_attention_heads=2, num_key_value_heads=2),  # groups of 1
    dict(num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=False),  # groups of 4, untied
    dict(keep_window_size=13),  # T beyond the window
    dict(keep_window_size=13, num_key_value_heads=1, tie_word_embeddings=False, num_hidden_layers=3),
]


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_logits_loss_and_gradients_equal_transformers(change):
    model = make(**change)
    reference, tokens = reference_of(model), distinct_tokens(3, 40, 97)
    logits, none = model(tokens)
    assert none is None
    torch.testing.assert_close(logits, reference(tokens).logits, atol=1e-4, rtol=0)

    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    loss = model(tokens, targets)[1]
    expected = F.cross_entropy(reference(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    loss.backward(), expected.backward()
    theirs = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    for name, p in model.named_parameters():
        error = (p.grad - theirs[name]).norm() / theirs[name].norm()
        assert error < 1e-4, f"{name}: relative gradient error {error}"


def their_text(reference, prompt, count, mask=None):
    options = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(prompt) if mask is None else mask
    return reference.generate(prompt, attention_mask=mask, **options)[:, prompt.shape[1] :]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_greedy_text_of_64_tokens_equals_transformers(groups):
    """Within the window: beyond it repeated tokens tie, and the reference breaks ties arbitrarily."""
    model = make(keep_window_size=128, num_key_value_heads=4 // groups, seed=groups, spread=0.3)  # a livelier text
    prompt = distinct_tokens(4, 8, 97, seed=groups)
    ours = greedy(model, prompt, 64)
    assert torch.equal(ours, their_text(reference_of(model), prompt, 64))
    assert len(ours.unique()) > 8  # the text is not one repeated token


def test_padded_rows_equal_transformers_and_equal_the_rows_alone():
    model, tokens, lengths = make(), distinct_tokens(3, 30, 97), torch.tensor([30, 11, 1])
    reference, mask = reference_of(model), (torch.arange(30) < lengths[:, None]).long()
    logits, expected = model(tokens * mask)[0], reference(tokens * mask, attention_mask=mask).logits
    for row, n in enumerate(lengths):
        torch.testing.assert_close(logits[row, :n], expected[row, :n], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[row, :n], model(tokens[row : row + 1, :n])[0][0], atol=1e-5, rtol=0)

    batch = greedy(model, tokens * mask, 20, lengths)
    left = torch.stack([tokens[row].roll(30 - n.item()) for row, n in enumerate(lengths)])  # as transformers wants it
    assert torch.equal(batch, their_text(reference, left * mask.flip(1), 20, mask.flip(1)))


# ---- Mixture of experts


@pytest.mark.parametrize("k", [1, 5, 12, 49])  # fewer than sqrt(E), more, all
def test_experts_and_their_gradients_equal_the_definition_and_a_sum_over_all(k):
    layer = m.CDMoE(DogeConfig(**MOE | dict(num_experts_per_tok=k))).double()
    x = torch.randn(2, 7, 64, dtype=torch.float64, requires_grad=True)
    rows, columns = layer.router_gate(x).view(2, 7, 2, 7).unbind(2)
    scores = (rows[..., :, None] + columns[..., None, :]).flatten(-2)  # (2, 7, E): every expert scored
    best = scores.topk(k)
    weights = torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(-1))
    routed = (F.silu(x @ layer.down_embed.weight.T) * weights) @ layer.up_embed.weight
    expected = m.MLP.forward(layer, x)[0] + routed
    assert torch.equal(layer.route(x)[1].sort(-1).values, best.indices.sort(-1).values)
    parameters, direction = [x, *layer.parameters()], torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, parameters, direction, retain_graph=True)
    for layer.config.attention in ("definition", "fast"):
        out = layer(x)[0]
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
        for a, b in zip(torch.autograd.grad(out, parameters, direction), theirs, strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm() + 1e-12  # the router's softmax is in fp32
    alone = torch.cat([layer(row[None, None])[0][0] for row in x[1]])  # one token at a time is written another way
    torch.testing.assert_close(alone, out[1], atol=1e-6, rtol=1e-6)


def test_routed_experts_keep_no_gathered_vectors_and_repeat_bit_for_bit():
    layer = m.CDMoE(DogeConfig(**MOE | dict(num_experts=400, num_experts_per_tok=20)))
    x, kept = torch.randn(1, 50, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        first = torch.autograd.grad(layer(x)[0].sin().sum(), list(layer.parameters()))
    assert max(kept) <= 400 * 64 < 50 * 20 * 64  # the tables themselves, not the vectors of all slots
    again = torch.autograd.grad(layer(x)[0].sin().sum(), list(layer.parameters()))
    assert all(map(torch.equal, first, again))


def test_routed_experts_in_bf16_are_no_worse_than_gathers_in_bf16():
    half = [torch.randn(*shape).bfloat16() for shape in ((40, 64), (49, 64), (49, 64))]
    weights, experts = torch.rand(40, 5).bfloat16(), torch.rand(40, 49).topk(5).indices

    def gathered(x, down, up):
        hidden = F.silu((down[experts] @ x[..., None]).squeeze(-1)) * weights.to(x.dtype)
        return (hidden[:, None] @ up[experts]).squeeze(1)

    ours = with_gradients(lambda *inputs: RoutedExperts.apply(*inputs, weights, experts), half)
    exact = with_gradients(gathered, [x.double() for x in half])
    for a, b, true in zip(ours, with_gradients(gathered, half), exact, strict=True):
        assert (a - true).norm() < 1.1 * (b - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("attention", ["fast", "definition"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_moe_under_autocast(tokens, attention):
    layer, x = m.CDMoE(DogeConfig(**MOE, attention=attention)), torch.randn(1, tokens, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)[0]
    mixed.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    exact = layer(x)[0]
    error = (mixed - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 0.02  # not the largest: rounding the router's logits can choose another expert


def test_load_balance_of_a_uniform_and_of_a_collapsed_router():
    """The closed forms 1 and E / k, where the library's old form, averaging by rank, calls a collapse balanced."""
    E, k, N = 49, 5, 98
    experts = torch.arange(N * k).remainder(E).view(N, k)
    assert m.load_balance(experts, torch.zeros(N, 2, 7)).item() == pytest.approx(1)
    logits = torch.zeros(N, 2, 7)
    logits[..., 3] = 100.0
    collapsed = torch.tensor([24, 0, 1, 2, 3]).expand(N, k)  # expert (3, 3) has id 3 * 7 + 3
    assert m.load_balance(collapsed, logits).item() == pytest.approx(E / k)
    x = torch.randn(N, 2, 7)
    p = (x[:, 0, :, None] + x[:, 1, None, :]).flatten(1).softmax(-1).mean(0)
    f = torch.bincount(experts.flatten(), minlength=E) / (N * k)
    assert m.load_balance(experts, x).item() == pytest.approx(E * (f * p).sum().item(), rel=1e-5)


def test_the_balance_loss_joins_the_loss_and_reaches_the_router():
    tokens, plain = torch.randint(0, 97, (2, 12)), make(MOE)
    balanced = Doge(dataclasses.replace(plain.config, router_aux_loss_coef=0.1))
    balanced.load_state_dict(plain.state_dict())
    losses = [net(tokens, tokens)[1] for net in (balanced, plain)]
    assert (losses[0] - losses[1]).item() == pytest.approx(0.1 * plain.hidden(tokens)[1].item(), rel=1e-4)
    router = [net.layers[0].mlp.router_gate.weight for net in (balanced, plain)]
    together, alone = (torch.autograd.grad(*pair)[0] for pair in zip(losses, router, strict=True))
    assert (together - alone).norm() > 0
    with torch.no_grad():  # and stays out of a validation loss
        assert torch.equal(balanced(tokens, tokens)[1], plain(tokens, tokens)[1])


def test_from_dense_is_bit_identical_and_learns():
    dense, tokens = make(), torch.randint(0, 97, (2, 30))
    sparse = Doge.from_dense(dense, 49, 5)
    assert torch.equal(dense(tokens)[0], sparse(tokens)[0])
    sparse(tokens, tokens)[1].backward()
    assert sparse.layers[0].mlp.up_embed.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="dense"):
        Doge.from_dense(sparse, 49, 5)


# ---- What must not change anything


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_no_earlier_logit_nor_do_other_rows(kind, monkeypatch):
    monkeypatch.setattr(m, "dynamic_mask_attention", CHUNKED)
    model, tokens = make(KINDS[kind]), torch.randint(0, 97, (4, 30))
    before = model(tokens)[0]
    torch.testing.assert_close(before[2:3], model(tokens[2:3])[0], atol=1e-5, rtol=0)
    for place in [29, 17, 4]:
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 97
        after = model(changed)[0]
        torch.testing.assert_close(after[0, :place], before[0, :place], atol=1e-5, rtol=0)
        assert (after[0, place] - before[0, place]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["checkpoint", "checkpoint in slices", "slices"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_or_sliced_changes_no_gradient(how, kind, monkeypatch):
    """Nor a state, of all positions or of the last ones."""
    model, tokens, last = make(KINDS[kind]), torch.randint(0, 97, (2, 20)), torch.tensor([19, 12])
    with torch.no_grad():
        states, _ = model.hidden(tokens, last + 1)
    expected = gradients(model, tokens)
    monkeypatch.setattr(memory, "SLICE", 8 if "slices" in how else 1024)
    model.gradient_checkpointing = "checkpoint" in how
    assert_all_close(gradients(model, tokens), expected)
    with torch.no_grad():
        sliced, ends = (model.hidden(tokens, last + 1, last=which)[0] for which in (None, last))
    torch.testing.assert_close(sliced, states)
    torch.testing.assert_close(ends[:, 0], states[torch.arange(2), last])


COMPILED = [("dense", False), ("moe", False), *itertools.product(("beyond the window", "moe beyond"), (False, True))]


@pytest.mark.parametrize("kind, by_kernel", COMPILED)  # by_kernel: as on a GPU
def test_compiled_code_computes_the_same(kind, by_kernel, monkeypatch):
    """Within the window a training step is one graph: there a break would be an error."""
    model, tokens = make(KINDS[kind], num_hidden_layers=1), torch.randint(0, 97, (2, 20))
    expected, options = gradients(model, tokens), dict(backend="aot_eager", fullgraph="beyond" not in kind)
    monkeypatch.setattr("nanodoge.attention.uses_kernel", lambda x: by_kernel)
    assert_all_close(gradients(torch.compile(model, **options), tokens), expected)
    if kind == "moe":  # one token at a time is written another way
        layer, x = model.layers[0].mlp, torch.randn(1, 1, 64)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(layer, **options)(x)[0], layer(x)[0])


@pytest.mark.parametrize("window, least, most", [(256, 3, 8), (2048, 15, 25)])
def test_beyond_the_window_only_attention_is_held_for_the_backward_pass(window, least, most):
    """In numbers per token, dimension and layer; the rest, which is made again, begins with x, one more."""
    model, held = make(keep_window_size=window), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def hold(x):
        if x.untyped_storage().data_ptr() not in weights:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        x, _ = model.hidden(torch.randint(0, 97, (1, 2048)))
    assert least < sum(held.values()) / (4 * 2048 * 64 * 2) < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_and_its_gradient_are_those_of_the_formula(dtype):
    norm, x = m.RMSNorm(64, 1e-6), torch.randn(3, 5, 64).to(dtype).requires_grad_()
    torch.nn.init.normal_(norm.weight)
    expected = norm.weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
    direction = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, (x, norm.weight), direction) for y in (norm(x), expected))
    assert_all_close((norm(x), *ours), (expected, *theirs), atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0.02)


@pytest.mark.parametrize("rows", [50, 8])
def test_the_loss_in_pieces_is_the_loss(rows):
    x, w = torch.randn(50, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    targets = torch.randint(0, 97, (50,))
    targets[::7] = -100
    expected = F.cross_entropy(x @ w.T, targets)
    theirs = torch.autograd.grad(expected, (x, w))
    kept = losses.linear_cross_entropy(x, w, targets, rows)
    # On a GPU, where counting the targets would wait for it, the rows without one are not left out.
    whole = losses.LinearCrossEntropy.apply(x, w, targets, True, rows) / (targets >= 0).sum()
    for loss in (kept, whole, losses.linear_cross_entropy(x.detach(), w.detach(), targets, rows)):
        torch.testing.assert_close(loss, expected)
    for loss in (kept, whole):
        assert_all_close(torch.autograd.grad(3 * loss, (x, w)), [3 * grad for grad in theirs])
    [frozen] = torch.autograd.grad(losses.linear_cross_entropy(x, w.detach(), targets, rows), x)
    torch.testing.assert_close(frozen, theirs[0])
    logprobs = losses.token_logprobs(x, w, targets.clamp(min=0), 2.0, rows)
    torch.testing.assert_close(logprobs, (x @ w.T / 2).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0])


def test_a_batch_without_a_target_has_loss_zero_and_no_nan():
    model, tokens = make(), torch.randint(0, 97, (2, 9))
    loss = model(tokens, torch.full_like(tokens, -100))[1]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert losses.linear_cross_entropy(torch.zeros(0, 64), model.output_weight, tokens[:0, 0]).item() == 0  # nor a row
    for model.config.attention in ("fast", "definition"):
        states, _ = model.hidden(tokens, torch.tensor([0, 9]))  # a row of nothing but padding, its keys all masked
        assert states.isfinite().all()


# ---- Refusals (numbers of parameters: tests/test_train.py; FLOP: tests/test_bench.py)


REFUSED = [
    (dict(hidden_size=0), "hidden_size=0"),
    (dict(num_attention_heads=3), "num_attention_heads=3"),
    (dict(num_key_value_heads=3), "num_key_value_heads=3"),
    (dict(is_moe=True, num_experts=50), "perfect square"),
    (dict(is_moe=True, num_experts=49, num_experts_per_tok=50), "num_experts_per_tok=50"),
    (dict(attention="slow"), "attention=slow must be fast or definition"),
]


@pytest.mark.parametrize("change, words", REFUSED)
def test_shapes_that_cannot_be_built_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        DogeConfig(**SMALL | change)
