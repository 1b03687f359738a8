"""A checkpoint as files that run without torch: one step of generation as an ONNX graph, and what a chat needs.

    model.onnx     token and state in; logits, and what the token changes in the state, out
    export.json    the vocabulary, the layout of a chat, and the shape of the state
    run.py         a conversation in the terminal, by onnxruntime and numpy
    index.html     the same in a browser, with onnxruntime-web, from any server of files

The state of Doge has a constant size (see nanodoge/attention.py): of each layer and key/value head, keys and values of
at most W + 1 slots, their scores and positions. So one graph generates text of any length. The graph reads the state
and returns the new key, value and score of every layer with the slot they belong in; the caller writes them there. To
return whole states would copy them at every token. A caller may begin with few slots, and double them until there are
W + 1: while a text is shorter than the window, its key j belongs in slot j.
"""

import hashlib
import json
import logging
import re
import shutil
from itertools import groupby
from pathlib import Path

import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import CDMoE, Doge, RMSNorm, rotary_frequencies, rotary_table
from nanodoge.attention import NEVER, key_scores
from nanodoge.decode import pack
from nanodoge.template import written_parts
from nanodoge.tokenizer import Tokenizer

WEB = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")  # of onnxruntime-web
BLOCK = 32  # inputs that share a scale in onnxruntime's int8 product; here all blocks of a row have the row's
OPSET = 23  # the first that has RMSNorm as one operation
LARGEST = 1_900_000_000  # bytes of weights in one file: ONNX ends at 2 GiB; what is larger goes to a file beside it


class Matrix(nn.Module):
    """A matrix (out, in) of float32, float16 or int8. `expand`: int8 is made float32 when the graph is loaded, for
    runtimes whose int8 product is slower (in a browser by ten times); else onnxruntime multiplies int8 by int8."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, expand: bool):
        super().__init__()
        self.dtype, self.expand, (self.outputs, self.inputs) = dtype, expand, weight.shape
        weight = weight.detach().float()
        if dtype == torch.int8 and self.inputs % BLOCK == 0:
            values, scale = pack(weight, dtype, compiled=True)
            self.register_buffer("values", (values.int() + 128).to(torch.uint8).unflatten(1, (-1, BLOCK)))
            self.register_buffer("scale", scale[:, None].repeat(1, self.inputs // BLOCK))
        else:
            self.dtype = torch.float32 if dtype == torch.int8 else dtype
            self.register_buffer("values", weight.to(self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (1, in) -> (1, out)"""
        if self.dtype != torch.int8 or self.expand:
            return F.linear(x, self.rows(slice(None)))
        level = 4  # x becomes int8 too, with a scale for each block
        sizes = dict(K=self.inputs, N=self.outputs, bits=8, block_size=BLOCK, accuracy_level=level)
        operands, result = (x, self.values, self.scale), dict(dtype=torch.float32, shape=(1, self.outputs))
        return torch.onnx.ops.symbolic("com.microsoft::MatMulNBits", operands, sizes, version=1, **result)

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows (n, in) fp32."""
        if self.dtype != torch.int8:
            return self.values[index].float()
        return (self.values[index].flatten(1).float() - 128) * self.scale[index, :1]


class StepLayer(nn.Module):
    """The weights of a block of model.py, as Step reads them."""

    def __init__(self, block: nn.Module, shape: tuple[int, int, int], matrix):
        super().__init__()
        attention, mlp, (H, K, D) = block.self_attn, block.mlp, shape
        self.norm1, self.norm2 = block.input_layernorm.weight, block.post_attention_layernorm.weight
        self.residual1, self.residual2 = block.input_residual, block.post_attention_residual
        self.qk = matrix(torch.cat((attention.q_proj.weight, attention.k_proj.weight)))
        self.v, self.out = matrix(attention.v_proj.weight), matrix(attention.o_proj.weight)
        self.gate, self.up, self.down = (matrix(getattr(mlp, f"{name}_proj").weight) for name in ("gate", "up", "down"))
        self.A, self.dt_proj = attention.A, attention.dt_proj.weight
        norms = (attention.q_norm, attention.k_norm)
        q, k = (norm.weight if isinstance(norm, RMSNorm) else torch.ones(D) for norm in norms)
        heads = torch.cat(((q * D**-0.5).expand(H, D), k.expand(K, D)))  # the norms' weights, and attention's scale
        self.register_buffer("heads", heads.detach().contiguous())
        if isinstance(mlp, CDMoE):
            self.expert_down, self.expert_up = matrix(mlp.down_embed.weight), matrix(mlp.up_embed.weight)
            self.router = mlp

    def experts(self, h: Tensor) -> Tensor:
        """What the experts add to the MLP: h (1, C) -> (1, C)."""
        weights, experts, _ = self.router.route(h[None])
        chosen = experts.flatten()
        hidden = F.silu(h @ self.expert_down.rows(chosen).T) * weights[0]  # (1, k)
        return hidden @ self.expert_up.rows(chosen)


class Step(nn.Module):
    """One token through the model. Shapes as in model.py, with L layers and N slots; batch size 1."""

    def __init__(self, model: Doge, dtype: torch.dtype, vocab_size: int, expand: bool):
        super().__init__()
        self.config = config = model.config
        self.shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim

        def matrix(weight: Tensor) -> Matrix:
            return Matrix(weight, dtype, expand)

        self.embedding = matrix(model.embed_tokens.weight[:vocab_size])
        self.head = self.embedding if config.tie_word_embeddings else matrix(model.lm_head.weight[:vocab_size])
        self.layers = nn.ModuleList(StepLayer(block, self.shape, matrix) for block in model.layers)
        self.norm = model.norm.weight
        self.register_buffer("frequencies", rotary_frequencies(config.head_dim, config.rope_theta))

    def forward(self, token: Tensor, length: Tensor, s: Tensor, position: Tensor, keys: list, values: list):
        """token (1,) int64, the number of tokens before it (1,) int64; the state: s (L, K, N) fp32 and position (L, K,
        N) int64, NEVER and -1 in empty slots, and for each layer keys and values (K, N, D) fp32. -> logits (V,), and
        what the state gets: key and value (L, K, D), score (L, K), and their slot (L, K). It is remember() of
        nanodoge/attention.py: a key weaker than all that are kept goes to the last slot, whose score stays NEVER."""
        (H, K, D), eps, W = self.shape, self.config.rms_norm_eps, self.config.keep_window_size
        cos, sin = rotary_table(length, self.frequencies)  # (1, D)
        full, held = length >= W, s[..., :-1]
        least = held.amin(-1, keepdim=True)  # (L, K, 1)
        latest = torch.iinfo(torch.int64).max
        oldest = position[..., :-1].masked_fill(held != least, latest).argmin(-1, keepdim=True)
        leaving = torch.where(full, oldest, length)  # (L, K, 1): the slot of a key that leaves, or the next empty slot
        others = s.masked_fill(torch.arange(s.shape[-1]) == leaving, NEVER)
        x, new = self.embedding.rows(token), []
        for i, layer in enumerate(self.layers):
            h = F.rms_norm(x, x.shape[1:], layer.norm1, eps)
            qk, v = layer.qk(h).view(H + K, D), layer.v(h)
            qk = (F.rms_norm(qk, (D,), eps=eps) if self.config.qk_norm else qk) * layer.heads
            qk = qk * cos + torch.cat((qk[:, D // 2 :], qk[:, : D // 2]), dim=-1) * sin
            q, k = qk[:H].view(K, H // K, D), qk[H:].view(K, D, 1)
            score = key_scores(layer.A, F.linear(v, layer.dt_proj)).view(K, 1)
            weaker = full & (score < least[i])
            score = torch.where(weaker, NEVER, score)
            bias = torch.cat((torch.where(weaker, s[i], others[i]), score), dim=-1)[:, None]  # (K, 1, N + 1)
            v = v.view(K, 1, D)
            p = (torch.cat((q @ keys[i].mT, q @ k), dim=-1) + bias).softmax(-1)  # (K, H / K, N + 1)
            found = p[..., :-1] @ values[i] + p[..., -1:] * v
            x = layer.out(found.view(1, H * D)) + layer.residual1 * x
            h = F.rms_norm(x, x.shape[1:], layer.norm2, eps)
            y = layer.down(F.silu(layer.gate(h)) * layer.up(h))
            x = (y + layer.experts(h) if self.config.is_moe else y) + layer.residual2 * x
            new.append((k[..., 0], v[:, 0], score))
        key, value, score = (torch.stack(parts) for parts in zip(*new, strict=True))
        slot = torch.where(score == NEVER, s.shape[-1] - 1, leaving)[..., 0]
        logits = self.head(F.rms_norm(x, x.shape[1:], self.norm, eps))[0]
        return logits, key, value, score[..., 0], slot


def portable_pattern(pattern: str) -> str:
    r"""The pattern of a tokenizer for Python's `re` and JavaScript alike. Both lack `\p{L}` or `(?i:...)`, and `\s` is
    other characters there, so classes are spelled out as ranges. Raises ValueError for what neither has (`a++`)."""
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))

    def ranges(kind: str) -> str:
        runs = regex.findall(rf"{kind}+", everything)  # neighbours, but for the surrogates, which no text has
        return "".join(run if len(run) < 3 else f"{run[0]}-{run[-1]}" for run in runs)

    def either_case(group: re.Match) -> str:
        spelled = ("".join(regex.findall(f"(?i){c}", everything)) if c.isalpha() else "" for c in group[1])
        return "(?:" + "".join(f"[{cases}]" if cases else c for c, cases in zip(group[1], spelled, strict=True)) + ")"

    pattern, inside = re.sub(r"\(\?i:([\w'|]+)\)", either_case, pattern), False
    parts = re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL)
    for i, part in enumerate(parts):
        inside = part == "[" or (inside and part != "]")
        if re.fullmatch(r"\\p\{\w+\}|\\s", part):
            parts[i] = ranges(part) if inside else f"[{ranges(part)}]"
        elif part == r"\S":
            parts[i] = ranges(part) if inside else f"[^{ranges(chr(92) + 's')}]"
    pattern = "".join(parts)
    if re.search(r"\\[pP]|\(\?[^:!=]|[+*?}]\+", pattern):
        raise ValueError(f"the tokenizer's pattern cannot be written for Python's re and JavaScript: {pattern:.60}")
    return pattern


def chat_parts(tokenizer: Tokenizer) -> dict[str, list[int | str]] | None:
    """What the chat template writes around messages, as lists of ids of special tokens and texts: {"start": before the
    first user message, "answer": after it, up to the assistant's, "next": from there to the next user message, and
    "system": [before, after] the system message, or null}. None for a tokenizer or a template without such parts."""
    if not tokenizer.chat_template:
        return None

    split, special = tokenizer.split[None], tokenizer.special_tokens

    def around(*roles: str) -> list[list[int | str]]:
        messages = [{"role": role, "content": f"<{i}>"} for i, role in enumerate(roles)]
        values = tokenizer.names | {"add_generation_prompt": roles[-1] == "user"}
        written = written_parts(tokenizer.chat_template, messages, None, split, **values)
        runs = groupby(written, key=lambda part: part[1] is None)
        texts = ["".join(text for text, *_ in run) for is_template, run in runs if is_template]
        return [[special.get(piece, piece) for piece in split(text) if piece] for text in texts]

    try:
        start, answer = around("user")
        whole = around("user", "assistant", "user", "assistant", "user")
        with_system = around("system", "user")
    except ValueError:
        return None
    _, _, following, *_ = whole
    if whole != [start, answer, following, answer, following, answer]:
        return None
    system = with_system[:2] if len(with_system) == 3 and with_system[2] == answer else None
    return dict(start=start, answer=answer, next=following, system=system)


def write_export(model: Doge, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, web: str = "") -> None:
    """Writes the files above into a new folder. web: the folder `dist` of the npm package onnxruntime-web, of which a
    copy goes with the page. Raises ValueError if onnx and onnxscript are not installed, or `web` lacks a file."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError("--to=onnx needs the packages onnx and onnxscript: pip install onnx onnxscript") from None
    if web and (missing := [name for name in WEB if not Path(web, name).is_file()]):
        raise ValueError(f"--web={web} must be the folder dist of onnxruntime-web; it has no {missing[0]}")
    settings = export_settings(model, tokenizer)  # before the long part, since it may refuse
    config = model.config
    L, K, D, N = config.num_hidden_layers, config.num_key_value_heads, config.head_dim, 64
    step = Step(model.float(), dtype, tokenizer.vocab_size, bool(web)).eval()
    keys, values = ([torch.zeros(K, N, D) for _ in range(L)] for _ in range(2))
    inputs = torch.tensor([0]), torch.tensor([0]), torch.full((L, K, N), NEVER), torch.full((L, K, N), -1), keys, values
    slots = torch.export.Dim("slots", min=2, max=2**30)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that nothing here needs
    program = torch.onnx.export(
        step,
        inputs,
        input_names=["token", "length", "s", "position", *(f"{kind}{i}" for kind in "kv" for i in range(L))],
        output_names=["logits", "key", "value", "score", "slot"],
        dynamic_shapes=(None, None, {2: slots}, {2: slots}, [{1: slots}] * L, [{1: slots}] * L),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(x.numel() * x.element_size() for x in step.state_dict().values())
    program.save(folder / "model.onnx", external_data=size > LARGEST)
    settings["sha256"] = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "export.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    tokenizer.save(folder)
    here = Path(__file__).parent / "web"
    shutil.copy(here / "run.py", folder / "run.py")
    if web:
        shutil.copy(here / "local.html", folder / "index.html")
        for name in WEB:
            shutil.copy(Path(web, name), folder / name)


def export_settings(model: Doge, tokenizer: Tokenizer) -> dict:
    """export.json: the bytes of each token as text of U+0000 to U+00FF, ids of special tokens, the pattern, the parts
    of a chat, and the sizes of the state."""
    config, special = model.config, sorted(tokenizer.special_tokens.values())
    ids = set(tokenizer.vocabulary.ranks.values()) | set(special)
    tokens = [tokenizer.token_bytes(id).decode("latin-1") if id in ids else "" for id in range(tokenizer.vocab_size)]
    return dict(
        tokens=tokens,
        special=special,
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        pattern=portable_pattern(tokenizer.vocabulary.pattern),
        chat=chat_parts(tokenizer),
        layers=config.num_hidden_layers,
        heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        window=config.keep_window_size,
        context=config.max_position_embeddings,
    )
