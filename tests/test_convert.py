"""layouts.py and convert.py: every published layout gives the function it was trained as, which for the original
repository's is written out here once more, plainly; folders go to transformers and come from it; a name on the hub is
as good as a folder; and what is damaged or foreign is refused in a line."""

import http.server
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from damage import Program
from helpers import TINY, TUNE, make_data, make_set, refused, roughen, serving, texts, tune, write_weights
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DogeForCausalLM,
    DogeForSequenceClassification,
)
from transformers import DogeConfig as ReferenceConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import convert
import evaluate
import sft
import train
from model import Doge, DogeConfig
from nanodoge import checkpoint, layouts, tokenizer
from nanodoge.checkpoint import load_model, save_checkpoint
from nanodoge.run import read_log

SHAPE = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, max_position_embeddings=64)
MOE = dict(is_moe=True, num_experts=16, num_experts_per_tok=3)


@pytest.fixture(scope="module")
def words():
    return tokenizer.train_bpe(texts(200, seed=1), 300)


def random_model(**shape):
    torch.manual_seed(0)
    return roughen(Doge(DogeConfig(**SHAPE | shape)))


def published_state(model):
    """{name: tensor} as transformers writes it, with the embedding not stored twice."""
    return {layouts.hf_name(name): w.detach().clone() for name, w in model.state_dict().items()}


def write_folder(folder, state, words, parts=1, suffix="safetensors", **fields):
    """A checkpoint folder as it is published: files of weights, config.json, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, state, parts, suffix)
    tied = "lm_head.weight" not in state
    config = dict(model_type="doge", hidden_act="silu", hidden_dropout=0.0, tie_word_embeddings=tied, rope_theta=1e4)
    (folder / "config.json").write_text(json.dumps(config | SHAPE | fields))
    words.save(folder)
    return folder


# ---- The original model, from its state dict: A and dt_proj per attention head, no norm of queries and keys

OLD = {"model.embed_tokens.weight": "model.word_embed.weight", "model.norm.weight": "model.final_layernorm.weight"}
OLD |= dict(input_layernorm="pre_layernorm", post_attention_layernorm="post_layernorm", mlp="feed_forward")
OLD |= dict(input_residual="pre_residual.weight", post_attention_residual="post_residual.weight")


def original_state(groups=2, experts=0, tied=True):
    """{name of the library: tensor} of the original's shapes: 4 attention heads of 8, `groups` key/value heads."""
    moe = dict(is_moe=True, num_experts=experts) if experts else {}
    state = published_state(random_model(num_key_value_heads=groups, tie_word_embeddings=tied, qk_norm=False, **moe))
    for i in range(2):
        state[f"model.layers.{i}.self_attn.A"] = 0.3 * torch.randn(4)
        state[f"model.layers.{i}.self_attn.dt_proj.weight"] = 0.3 * torch.randn(4, groups * 8)
    return state


def renamed(state, names=OLD):
    for new, old in names.items():
        if "." in new:
            state = {old if name == new else name: w for name, w in state.items()}
        else:
            parts = {name: [old if part == new else part for part in name.split(".")] for name in state}
            state = {".".join(parts[name]): w for name, w in state.items()}
    return state


def original_norm(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def original_attention(w, x, heads, window):
    """x (T, C) -> (T, C), one head and one query after the other."""
    T, C = x.shape
    D, groups = C // heads, len(w["k_proj.weight"]) * heads // C
    q, k, v = (x @ w[f"{part}_proj.weight"].T for part in "qkv")
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    turn = torch.polar(torch.ones_like(angles), angles)  # dimension d and d + D/2 are one complex number

    def rotated(z):
        z = torch.complex(z[:, : D // 2], z[:, D // 2 :]) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    mask = torch.exp(w["A"] * F.softplus(v @ w["dt_proj.weight"].T))  # (T, heads): a score an attention head
    out = []
    for h in range(heads):
        g = h // (heads // groups)
        query, key = rotated(q[:, h * D : (h + 1) * D]), rotated(k[:, g * D : (g + 1) * D])
        rows = []
        for i in range(T):
            kept = mask[: i + 1, h].topk(min(window, i + 1)).indices
            p = (key[kept] @ query[i] / math.sqrt(D) + mask[kept, h]).softmax(0)
            rows.append(p @ v[kept, g * D : (g + 1) * D])
        out.append(torch.stack(rows))
    return torch.cat(out, dim=1) @ w["o_proj.weight"].T


def original_mlp(w, x, k):
    out = (F.silu(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)) @ w["down_proj.weight"].T
    if "router_gate.weight" not in w:
        return out
    rows = []
    for token in x:  # one token at a time, as it routes in generation
        left, right = (w["router_gate.weight"] @ token).view(2, -1)
        scores, experts = (left[:, None] + right).flatten().topk(k)
        hidden = F.silu(w["down_embed.weight"][experts] @ token) * scores.softmax(0)
        rows.append(hidden @ w["up_embed.weight"][experts])
    return out + torch.stack(rows)


def original_logits(state, tokens, heads=4, window=2048, k=3):
    """tokens (T,) -> (T, V)"""
    x = state["model.embed_tokens.weight"][tokens]
    for i in range(2):
        block = {name.split(f"layers.{i}.")[1]: w for name, w in state.items() if f"layers.{i}." in name}
        parts = {
            part: {name.removeprefix(part + "."): w for name, w in block.items() if name.startswith(part)}
            for part in ("self_attn", "mlp")
        }
        h = original_norm(x, block["input_layernorm.weight"])
        x = block["input_residual"] * x + original_attention(parts["self_attn"], h, heads, window)
        h = original_norm(x, block["post_attention_layernorm.weight"])
        x = block["post_attention_residual"] * x + original_mlp(parts["mlp"], h, k)
    x = original_norm(x, state["model.norm.weight"])
    return x @ state.get("lm_head.weight", state["model.embed_tokens.weight"]).T


SOME_OLD = {new: OLD[new] for new in ("input_layernorm", "input_residual", "mlp")}  # of a version between the two


CHANGES = [dict(groups=2), dict(groups=1, tied=False), dict(groups=4), dict(groups=2, experts=16)]
CHANGES += [dict(groups=2, window=11)]


@pytest.mark.parametrize("names", [{}, OLD, SOME_OLD], ids=["new names", "old names", "mixed names"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_an_original_checkpoint_computes_what_it_was_trained_as(tmp_path, words, names, change):
    state = original_state(**{key: value for key, value in change.items() if key != "window"})
    moe = MOE if "experts" in change else {}
    window = change.get("window", 2048)
    fields = moe | dict(num_key_value_heads=change["groups"], keep_window_size=window)
    folder = write_folder(tmp_path, renamed(state, names), words, **fields)
    model, _ = load_model(folder)
    assert model.config.num_key_value_heads == 4 and not model.config.qk_norm
    tokens = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:24]  # no two alike, so no equal scores
    expected = original_logits(state, tokens, window=window)
    assert (model(tokens[None])[0][0] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_converting_writes_the_model_that_loading_gives(tmp_path, words, capsys):
    state = original_state()
    source, target = write_folder(tmp_path / "old", renamed(state), words), tmp_path / "new"
    convert.main([str(source), str(target)])
    said = capsys.readouterr().out
    for phrase in ("2 key/value heads repeated to 4", "without q/k norms"):
        assert phrase in said
    (before, _), (after, reader) = load_model(source), load_model(target)
    assert after.config == before.config and reader.digest == words.digest
    assert all(torch.equal(w, after.state_dict()[name]) for name, w in before.state_dict().items())
    assert json.loads((target / "config.json").read_text())["model_type"] == "nanodoge"
    with pytest.raises(ValueError, match="^--to=transformers: transformers' Doge always normalises"):
        convert.main([str(source), str(tmp_path / "third"), "--to=transformers"])
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        convert.main([str(source), str(target)])
    with pytest.raises(ValueError, match="SOURCE FOLDER: two words, not 1"):
        convert.main([str(source)])


# ---- Files and numbers


LAYOUTS = ["no prefix", "rotary buffers", "head stored twice", dict(parts=3), dict(suffix="bin")]


@pytest.mark.parametrize("layout", [*LAYOUTS, dict(suffix="bin", parts=2)], ids=str)
def test_every_layout_of_files_gives_the_same_model(tmp_path, words, layout):
    model = random_model()
    state, files = published_state(model), layout if isinstance(layout, dict) else {}
    fields = {}
    if layout == "no prefix":
        state = {name.removeprefix("model."): w for name, w in state.items()}
    if layout == "rotary buffers":
        state["model.rotary_emb.inv_freq"] = torch.ones(4)
    if layout == "head stored twice":
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        fields = dict(tie_word_embeddings=True)
    loaded, reader = load_model(write_folder(tmp_path, state, words, **files, **fields))
    assert loaded.config == model.config and reader.digest == words.digest
    assert all(torch.equal(w, loaded.state_dict()[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly_and_written(tmp_path, words, dtype):
    state = {name: w.to(getattr(torch, dtype)) for name, w in published_state(random_model()).items()}
    source = write_folder(tmp_path / "half", state, words, torch_dtype=dtype)
    model, _ = load_model(source)
    for name, w in model.state_dict().items():
        assert w.dtype == torch.float32 and torch.equal(w, state[layouts.hf_name(name)].float())
    convert.main([str(source), str(tmp_path / "new"), f"--dtype={dtype}"])
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(w, written[name]) and w.dtype == written[name].dtype for name, w in state.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").dtype == getattr(torch, dtype)


# ---- To transformers and from it


def theirs_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


ROPE = dict(rope_type="dynamic", rope_theta=5000.0, factor=4.0)
OTHER_LENGTH = dict(original_max_position_embeddings=32)
TIED = dict(tie_word_embeddings=True, num_key_value_heads=1)


@pytest.mark.parametrize("change", [dict(), TIED, MOE, dict(rope_parameters=ROPE)], ids=str)
def test_what_transformers_writes_is_read(tmp_path, words, change):
    torch.manual_seed(0)
    theirs = roughen(DogeForCausalLM(ReferenceConfig(**SHAPE | change, attn_implementation="eager")))
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    words.save(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, _ = load_model(tmp_path)
    tokens = torch.randint(0, 300, (1, 20))
    if model.config.is_moe:  # their router mixes the tokens of a text, so one at a time
        state, expected = None, []
        for token in tokens[0]:
            out = theirs(token[None, None], past_key_values=state, use_cache=True)
            state, expected = out.past_key_values, [*expected, out.logits]
        expected = torch.cat(expected, dim=1)
    else:
        expected = theirs(tokens).logits
    torch.testing.assert_close(model(tokens)[0], expected, atol=1e-5, rtol=0)


def test_transformers_is_no_older_than_5_18(tmp_path, words):
    """Before, its sdpa attention let later tokens change earlier logits (its issue 48748)."""
    save_checkpoint(tmp_path, random_model(), words)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    tokens = torch.randint(0, 300, (1, 30))
    changed = torch.cat([tokens[:, :20], torch.randint(0, 300, (1, 10))], dim=1)
    before, after = theirs(tokens).logits[:, :20], theirs(changed).logits[:, :20]
    assert torch.allclose(before, after, atol=1e-5), f"transformers {transformers.__version__} sees later tokens"


def test_a_padded_batch_in_transformers_equals_its_rows(tmp_path, words):
    """The tokenizer's files say that padding goes on the left, and how long a text the model was trained on."""
    save_checkpoint(tmp_path, random_model(), words)
    theirs, reader = theirs_of(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (reader.padding_side, reader.model_max_length) == ("left", 64)
    prompts = ["the cat", "the dog sees a red ball and then", "blue"]
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=reader.pad_token_id)
    together = theirs.generate(**reader(prompts, padding=True, return_tensors="pt"), **options)[:, -12:]
    alone = [theirs.generate(**reader(prompt, return_tensors="pt"), **options)[0, -12:] for prompt in prompts]
    assert torch.equal(together, torch.stack(alone))


def test_experts_go_to_transformers_with_a_warning(tmp_path, words, capsys):
    model = random_model(**MOE)
    save_checkpoint(tmp_path / "ours", model, words)
    convert.main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to=transformers"])
    assert "router mixes the tokens" in capsys.readouterr().out
    theirs, tokens = theirs_of(tmp_path / "theirs"), torch.randint(0, 300, (1, 9))
    ids = tokens[:, :1]  # one text, from its first token
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=2, eos_token_id=None)
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(out[:, 1:], model.generate(ids, 12, temperature=0))
    again, _ = load_model(tmp_path / "theirs")  # and back
    assert torch.equal(again(tokens)[0], model(tokens)[0])


# ---- Dynamic NTK scaling


@pytest.mark.parametrize("factor", [1.0, 2.5, 4.0])
def test_the_rotary_base_is_transformers_own_at_every_length(factor):
    ours = DogeConfig(**SHAPE, rope_factor=factor)
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=factor, original_max_position_embeddings=64)
    theirs = ReferenceConfig(**SHAPE, rope_parameters=rope)
    for length in (1, 63, 64, 65, 100, 640, 5000):
        expected = ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", seq_len=length)[0]
        frequencies = ours.rope_base(length) ** (-torch.arange(0, 8, 2) / 8)
        torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert ours.rope_base(64) == ours.rope_theta < ours.rope_base(65)
    assert DogeConfig(**SHAPE).rope_base(5000) == 10000.0


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_computes_the_same_in_transformers_also_beyond_the_trained_length(tmp_path, words, tied):
    shape = dict(max_position_embeddings=16, tie_word_embeddings=tied)
    model, plain = random_model(rope_factor=4.0, **shape), random_model(**shape)
    save_checkpoint(tmp_path, model, words)
    theirs = theirs_of(tmp_path)
    for length in (15, 16, 17, 40):
        tokens = torch.randint(0, 300, (2, length))
        torch.testing.assert_close(model(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=0)
        assert torch.equal(model(tokens)[0], plain(tokens)[0]) == (length <= 16)
    assert load_model(tmp_path)[0].config == model.config
    # and generation equals the forward pass
    prompt = torch.randint(0, 300, (2, 10))
    text = torch.cat((prompt, model.generate(prompt, 30, temperature=0)), dim=1)  # 40 tokens, decided from the start
    assert torch.equal(model(text)[0][:, 9:-1].argmax(-1), text[:, 10:])


# ---- The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client asks for: revisions, lists of files, files."""

    models: dict = {}  # name: folder
    asked: list = []

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/").split("/")
        self.asked.append("/".join(path))
        name = "/".join(path[2:4] if path[0] == "api" else path[:2])
        if name not in self.models:
            return self.answer(b'{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})
        files, commit = sorted(Path(self.models[name]).glob("*.*")), "c" * 40
        if path[0] != "api":
            data = (Path(self.models[name]) / path[-1]).read_bytes()
            return self.answer(data, 200, {"ETag": f'"{path[-1]}"', "X-Repo-Commit": commit})
        if path[4] == "tree":
            sizes = [dict(path=file.name, size=file.stat().st_size) for file in files]
            listed = [file | dict(type="file", oid=f"{i:040}") for i, file in enumerate(sizes)]
            return self.answer(json.dumps(listed).encode(), 200, {})
        about = dict(id=name, sha=commit, siblings=[dict(rfilename=file.name) for file in files])
        self.answer(json.dumps(about).encode(), 200, {})

    def answer(self, data, status, headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture(scope="module")
def endpoint():
    with serving(Hub) as address:
        yield address


@pytest.fixture
def hub(endpoint, tmp_path, monkeypatch):
    """This process's huggingface_hub asks our server, and keeps what it gets in a folder of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # what HF_ENDPOINT sets
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "models", {})
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.chdir(tmp_path)
    checkpoint.download.cache_clear()
    yield Hub
    checkpoint.download.cache_clear()


def test_a_name_on_the_hub_converts(hub, tmp_path, words, capsys):
    hub.models["SmallDoge/Doge-tiny"] = write_folder(tmp_path / "far", renamed(original_state()), words, parts=2)
    (tmp_path / "far" / "optimizer.pt").write_bytes(b"not wanted")
    convert.main(["SmallDoge/Doge-tiny", "here"])
    assert "2 key/value heads repeated to 4" in capsys.readouterr().out
    assert hub.asked and not any("optimizer" in path for path in hub.asked)
    near, far = load_model("here")[0], load_model("far")[0]
    assert all(torch.equal(w, far.state_dict()[name]) for name, w in near.state_dict().items())


def test_every_stage_takes_a_name_on_the_hub(hub, tmp_path, words, capsys):
    shape = dict(vocab_size=words.vocab_size, max_position_embeddings=64)
    model = random_model(**shape)
    hub.models["SmallDoge/Doge-tiny"] = write_folder(tmp_path / "far", published_state(model), words, suffix="bin")
    name = "SmallDoge/Doge-tiny"
    data = make_data(tmp_path / "text")  # with the same vocabulary
    words.save(data)
    meta = json.loads((data / "meta.json").read_text()) | dict(tokenizer_sha256=words.digest)
    (data / "meta.json").write_text(json.dumps(meta))
    evaluate.main([name, f"--bpb={data}", "--eval_tokens=64", "--device=cpu"])
    chats = make_set(tmp_path / "chats", name, count=30)  # prepare_data.py --tokenizer=NAME
    options = [option for option in TINY if not option.startswith(("--hidden", "--inter", "--num", "--max_"))]
    options += f"--init_from={name} --out_dir=run --max_steps=4 --warmup_steps=0 --batch_tokens=128".split()
    train.main([*options, f"--data={data}"])
    sft.main([*TUNE, f"--data={chats}", f"--init_from={name}", "--out_dir=chat", "--max_steps=1"])
    assert capsys.readouterr().out.count(f"from {name}") == 2  # train.py and sft.py
    assert sum(path.endswith("revision/main") for path in hub.asked) <= 2  # one download for all of them
    # and what the stages wrote opens in transformers as it lies
    for folder in ("run", "chat"):
        ours, reader = load_model(folder)
        theirs, their_reader = theirs_of(folder), AutoTokenizer.from_pretrained(folder)
        ids = torch.tensor([reader.render([dict(role="user", content="the cat")], add_generation_prompt=True)[0]])
        chat = their_reader.apply_chat_template([dict(role="user", content="the cat")], add_generation_prompt=True)
        assert chat["input_ids"] == ids[0].tolist()
        torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, atol=1e-5, rtol=0)
        text = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        new = ours.generate(ids, 20, temperature=0, stop_ids=[reader.eos_id])
        assert torch.equal(text[:, ids.shape[1] :], new)


def test_what_the_hub_cannot_give_is_said_in_a_line(hub, tmp_path, monkeypatch):
    def refusal(name, words=""):
        refused(lambda: load_model(name), f"there is no checkpoint folder '{name}'", words)

    refusal("SmallDoge/Absent", "no model of this name on http://127.0.0.1")
    refusal("Small--Doge/x", "could not be fetched")
    seen = len(hub.asked)
    (tmp_path / "runs").mkdir()
    for folder in ("out/missing", "runs/missing", "missing", "a/b/c", "../up"):  # folders that are not there
        refusal(folder)
    assert len(hub.asked) == seen  # which is nobody else's business
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as closed:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.server_port}")
    refusal("SmallDoge/Doge-tiny", "could not be fetched")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refusal("SmallDoge/Doge-tiny", "could not be fetched")


# ---- Refusals


BLOCK, ATTENTION = "model.layers.0.mlp", "model.layers.1.self_attn"
SPOILED = {  # what is said of changed tensors: {name, or a part of the names of removed ones: the new tensor or None}
    r"model.safetensors lacks model.layers.1.mlp.up_proj.weight$": {"1.feed_forward.up_proj": None},
    r"has model.layers.0.mlp.keys, which this model has not$": {f"{BLOCK}.keys": torch.zeros(2, 4)},
    r"has \S+dt_proj.weight of shape \[2, 16\], not \[4, 16\]$": {f"{ATTENTION}.dt_proj.weight": torch.zeros(2, 16)},
    r"has model.layers.1.self_attn.q_proj.bias, which": {f"{ATTENTION}.q_proj.bias": torch.zeros(32)},
    r"has both \S+.final_layernorm.weight and model.norm.weight, two names": {"model.norm.weight": torch.zeros(32)},
    r"as torch.int8, and only 16, 32 and 64 bit": {f"{ATTENTION}.q_proj.weight": torch.zeros(32, 32, dtype=torch.int8)},
    r"lacks model.layers.0.\S+ \(and 25 more\)$": {"layers": None},
    r"has lm_head.weight that differs from the embedding": {"lm_head.weight": torch.zeros(300, 32)},
}
FIELDS = {  # what is wrong with config.json
    r"lacks lm_head.weight$": dict(tie_word_embeddings=False),
    r"config.json: model_type is 'llama'": dict(model_type="llama"),
    r"config.json.* hidden_size": dict(hidden_size=None),
    r"config.json: hidden_size=33 must be": dict(hidden_size=33),
    r"config.json: num_hidden_layers: 'two' is not of type int$": dict(num_hidden_layers="two"),
    r"hidden_act is 'gelu', and only 'silu'": dict(hidden_act="gelu"),
    r"sliding_window is 128": dict(sliding_window=128),
    r"dynamic_mask_ratio is 0.5": dict(dynamic_mask_ratio=0.5),
    r"head_dim is 64": dict(head_dim=64),
    r"rope_type is 'yarn'": dict(rope_scaling=dict(type="yarn", factor=2.0)),
    r"rope_scaling is 'dynamic', not an object": dict(rope_scaling="dynamic"),
    r"factor": dict(rope_scaling=dict(type="dynamic")),
    r"rope_factor=0.5 must be 0 or": dict(rope_scaling=dict(type="dynamic", factor=0.5)),
    r"original_max_position.*32.*max_position_embeddings=64": dict(rope_scaling=ROPE | OTHER_LENGTH),
}


def pickled(folder, content):
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


FIRST, SECOND, THIRD = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2, 3))
PICKLE = "pytorch_model.bin is damaged or not ours: "
DAMAGED_FILES = {
    r"model-\*-of-\*.safetensors lacks model\..* \(and .* more\)$": lambda at: (at / SECOND).unlink(),
    f"{FIRST} is damaged: ": lambda at: os.truncate(at / FIRST, 20_000),
    f"{THIRD} has .*, which another file has too$": lambda at: shutil.copy(at / FIRST, at / THIRD),
    "is not a checkpoint: it has no config.json$": lambda at: (at / "config.json").unlink(),
    "config.json is damaged: it is not JSON": lambda at: (at / "config.json").write_text("{"),
    "config.json is damaged: it holds a list": lambda at: (at / "config.json").write_text("[]"),
    "has no model.safetensors": lambda at: [(at / name).unlink() for name in (FIRST, SECOND)],
    "tokenizer.json has 300 ids, config.json 299$": lambda at: write_folder(
        at, renamed(original_state()), tokenizer.Tokenizer.load(at), vocab_size=299
    ),
    "holds no tokenizer.json$": lambda at: (at / "tokenizer.json").unlink(),
    f"{PICKLE}Weights": lambda at: pickled(at, Program()),
    "pytorch_model.bin holds a, which is not a tensor$": lambda at: pickled(at, {"a": "b"}),
    f"{PICKLE}it holds a list$": lambda at: pickled(at, [1]),
    f"{PICKLE}it is not a whole zip archive$": lambda at: os.truncate(pickled(at, {}), 200),
}


@pytest.mark.parametrize("message", [*SPOILED, *FIELDS, *DAMAGED_FILES])
def test_a_foreign_or_damaged_checkpoint_is_refused_with_file_and_tensor(tmp_path, words, message):
    state, fields = renamed(original_state()), FIELDS.get(message, {})
    for part, w in SPOILED.get(message, {}).items():
        state = state | {part: w} if w is not None else {name: x for name, x in state.items() if part not in name}
    if "lm_head" in message:
        fields = dict(tie_word_embeddings="embedding" in message)
    write_folder(tmp_path, state, words, parts=2 if message in DAMAGED_FILES else 1, **fields)
    DAMAGED_FILES.get(message, lambda at: None)(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# ---- Classifiers


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, words):
    """A language model, tuned to tell texts of cats from texts of dogs, and a folder of these."""
    folder = tmp_path_factory.mktemp("labels")
    torch.manual_seed(0)
    save_checkpoint(folder / "base", Doge(DogeConfig(**SHAPE | dict(tie_word_embeddings=False))), words)
    animals = zip(texts(200), ["cat", "dog"] * 100, strict=True)
    rows = [dict(text=f"{text} {animal}", label=animal) for text, animal in animals]  # the last word decides
    data = make_set(folder / "data", folder / "base", "labels", rows=rows, labels=["dog", "cat"])
    tune(sft.main, folder / "base", data, folder / "run", "--kind=labels", "--learning_rate=1e-2")
    return folder


def test_a_classifier_learns_and_goes_to_transformers(classifier, words):
    log = read_log(classifier / "run" / "log.csv")
    assert abs(float(log[0]["val_loss"]) - math.log(2)) < 1e-5 and float(log[-1]["val_exact"]) == 1
    ours, _ = load_model(classifier / "run", labels=())
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier / "run", attn_implementation="eager").eval()
    assert ours.labels == ("dog", "cat") and theirs.config.id2label == {0: "dog", 1: "cat"}
    rows = [[words.bos_id, *words.encode(text)] for text in ("a red dog", "then runs the blue cat", "a cat")]
    tokens = torch.full((3, max(map(len, rows))), words.pad_id)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    expected = theirs(tokens).logits  # at the last token that is not padding
    logits = torch.stack([ours(torch.tensor([row]))[0][0, -1] for row in rows])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert logits.argmax(-1).tolist() == [0, 1, 1]


def test_the_loss_and_gradients_of_a_classifier_are_transformers(classifier, words):
    ours, _ = load_model(classifier / "run", labels=("dog", "cat"))
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier / "run", attn_implementation="eager")
    tokens, labels = torch.randint(9, 300, (4, 12)), torch.tensor([0, 1, 1, 0])
    targets = torch.full((4, 12), -100)
    targets[:, -1] = labels
    loss, expected = ours(tokens, targets)[1], theirs(tokens, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward(), expected.backward()
    gradients = {layouts.our_name(name): p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-3)


def test_what_transformers_writes_of_a_classifier_is_read(tmp_path, words):
    config = ReferenceConfig(**SHAPE, num_labels=3, attn_implementation="eager", pad_token_id=2)
    theirs = DogeForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    words.save(tmp_path / "theirs")
    convert.main([str(tmp_path / "theirs"), str(tmp_path / "ours")])
    model, _ = load_model(tmp_path / "ours", labels=())
    tokens = torch.randint(9, 300, (2, 12))
    torch.testing.assert_close(model(tokens)[0][:, -1], theirs(tokens).logits, atol=1e-5, rtol=0)
    assert model.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_a_classifier_is_no_language_model_and_labels_are_checked(classifier, tmp_path):
    with pytest.raises(ValueError, match="run is a classifier of dog, cat, and what is needed here is a language mod"):
        load_model(classifier / "run")
    with pytest.raises(ValueError, match="base is a language model, and what is needed here is a classifier$"):
        load_model(classifier / "base", labels=())
    with pytest.raises(ValueError, match="of dog, cat, and what is needed here is a classifier of a, b$"):
        load_model(classifier / "run", labels=("a", "b"))
    for row, message in [
        (dict(text="x", label=3), "with another label .*: '3' is not one of --labels=0,1"),
        (dict(text="x"), "needed is one of text, label$"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_set(tmp_path / f"{len(message)}", classifier / "base", "labels", rows=[row], labels=["0", "1"])
    with pytest.raises(ValueError, match="holds --kind=labels, and this stage reads --kind=chat"):
        tune(sft.main, classifier / "base", classifier / "data", tmp_path / "run")
