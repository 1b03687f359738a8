"""The published layouts of Doge: config.json and tensors by name -> the DogeConfig and state dict of model.py.

Names.    Those of transformers (4.54 and later), which are ours after `model.`; or those of the original repository
          until June 2025 (RENAMED). Some versions mixed both, so each name is translated by itself.
Heads.    transformers has one A and one row of dt_proj per key/value head, the original one per attention head; the
          shape of A tells which. Ours have one mask per key/value head, so for the original each key/value head is
          repeated until every attention head has its own: the same function, a KV cache as many times larger.
Norms.    The original does not normalise queries and keys, and has no `q_norm` and `k_norm`: the field `qk_norm`.
Numbers.  bfloat16 and float16 become float32, exactly. int8 becomes float32 by a scale per row, in a tensor beside it
          (NAME_scale): our own layout, written by convert.py.
Output.   A matrix of its own (`lm_head.weight`), or the embedding (`tie_word_embeddings`). A classifier has
          `score.weight` instead, with one row per label.

Nothing is guessed: what is missing, left over, of another shape, or set to what model.py does not compute raises
ValueError with the field or tensor. These functions open no file.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import Doge, DogeConfig
from nanodoge.decode import pack

RENAMED = {
    "word_embed.": "embed_tokens.",
    "final_layernorm.": "norm.",
    ".pre_layernorm.": ".input_layernorm.",
    ".post_layernorm.": ".post_attention_layernorm.",
    ".pre_residual.weight": ".input_residual",
    ".post_residual.weight": ".post_attention_residual",
    ".feed_forward.": ".mlp.",
}
# Fields of config.json that change what is computed, with the only value that is computed here.
FIXED = dict(hidden_act="silu", hidden_bias=False, attention_bias=False, mlp_bias=False, sliding_window=None)
FIXED |= dict(dynamic_mask_ratio=0.0)
NEEDED = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # other types are packed or scaled
SCALE = "_scale"  # what follows the name of an int8 matrix in the name of its scales
UNSAVED = ("attention",)  # fields of DogeConfig that say how to compute, not what: never in a config.json


def our_name(name: str) -> str:
    """The name in model.py of a published tensor."""
    name = name.removeprefix("model.")
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def hf_name(name: str) -> str:
    """The name in transformers of a parameter of model.py."""
    return name if name.startswith(("lm_head", "score")) else f"model.{name}"


# ---- config.json


class Layout(NamedTuple):
    """A published checkpoint, understood and not converted yet."""

    config: DogeConfig
    labels: tuple[str, ...]  # of a classifier, else empty
    tensors: dict[str, Tensor]  # by their published names
    repeat: int  # key/value heads of the model per key/value head of the file


def read_layout(fields: dict[str, Any], tensors: dict[str, Tensor]) -> Layout:
    """The Layout of config.json's fields and the tensors beside it, of which only names and shapes are looked at."""
    fields = {name: value for name, value in fields.items() if value is not None}
    if (kind := fields.get("model_type")) not in ("doge", "nanodoge"):
        raise ValueError(f"model_type is {kind!r}, not 'doge' or 'nanodoge'")
    ours = {our_name(name): w for name, w in tensors.items()}
    config, labels = read_config(fields, ours), read_labels(fields, ours.get("score.weight"))
    heads, A = config.num_attention_heads, ours.get("layers.0.self_attn.A")
    repeat = heads // config.num_key_value_heads if A is not None and A.shape == (heads,) else 1
    config.num_key_value_heads *= repeat
    return Layout(config, labels, tensors, repeat)


def read_config(fields: dict[str, Any], tensors: dict[str, Tensor]) -> DogeConfig:
    """DogeConfig of config.json's fields; what these leave open is read off the tensors' names."""
    experts = ["num_experts", "num_experts_per_tok"] if fields.get("is_moe") else []
    if missing := [name for name in NEEDED + experts if name not in fields]:
        raise ValueError(f"{missing[0]} is missing")
    defaults = dict(
        num_key_value_heads=fields["num_attention_heads"],
        tie_word_embeddings="lm_head.weight" not in tensors,
        qk_norm=any(name.endswith("q_norm.weight") for name in tensors),
    )
    fields, values = defaults | fields | read_rope(fields), {}
    for field in dataclasses.fields(DogeConfig):
        if field.name in fields and field.name not in UNSAVED:
            value, kind = fields[field.name], type(field.default)
            is_whole = kind is float and type(value) is int and abs(value) < 2**63
            if type(value) is not kind and not is_whole:
                raise ValueError(f"{field.name}: {value!r} is not of type {kind.__name__}")
            values[field.name] = kind(value)
    config = DogeConfig(**values)
    for name, value in (FIXED | dict(head_dim=config.head_dim)).items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} is {fields[name]!r}, and only {value!r} is computed here")
    return config


def read_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """{rope_theta, rope_factor} of config.json's fields, of which newer and older files use different ones."""
    rope = fields.get("rope_parameters", fields.get("rope_scaling", {}))
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling is {rope!r}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = fields.get("rope_theta", rope.get("rope_theta", DogeConfig.rope_theta))
    if kind == "default":
        return dict(rope_theta=theta, rope_factor=0.0)
    context = fields.get("max_position_embeddings", DogeConfig.max_position_embeddings)
    original = rope.get("original_max_position_embeddings", context)
    if kind != "dynamic" or "factor" not in rope:
        raise ValueError(f"rope_type is {kind!r}, and only 'default' and 'dynamic' with a factor are computed here")
    if original != context:
        raise ValueError(f"original_max_position_embeddings={original} must be max_position_embeddings={context}")
    return dict(rope_theta=theta, rope_factor=rope["factor"])


def read_labels(fields: dict[str, Any], head: Tensor | None) -> tuple[str, ...]:
    """The labels of a classifier with the output matrix `head`; () without one. Without names they are LABEL_0, ..."""
    if head is None:
        return ()
    numbers = [str(i) for i in range(len(head) if head.ndim else 0)]
    names = fields.get("id2label", {number: f"LABEL_{number}" for number in numbers})
    if not isinstance(names, dict) or set(names) != set(numbers) or len(numbers) < 2:
        raise ValueError(f"id2label is {names!r}, and score.weight has {len(numbers)} rows")
    return tuple(str(names[number]) for number in numbers)


# ---- Tensors


def quantise(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of model.py with its large matrices in int8, each with a NAME_scale (rows,) fp32. The router and the
    scores of keys decide what is kept, and are small: they stay."""
    packed = {}
    for name, w in weights.items():
        if w.dim() == 2 and not name.endswith(("dt_proj.weight", "router_gate.weight")):
            packed[name], packed[name + SCALE] = pack(w, torch.int8, torch.float32)
        else:
            packed[name] = w
    return packed


def dequantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those in int8 as float32, and without their scales. Raises ValueError for another shape."""
    plain = {name: w for name, w in tensors.items() if name + SCALE not in tensors}
    for name in tensors.keys() - plain.keys():
        w, scale = tensors[name], tensors[name + SCALE]
        if w.dtype != torch.int8 or w.dim() != 2 or scale.shape != w.shape[:1]:
            raise ValueError(f"has {name + SCALE} of shape {list(scale.shape)} for {w.dtype} of {list(w.shape)}")
        plain[name] = w.float() * scale.float()[:, None]
    return {name: w for name, w in plain.items() if not (name.endswith(SCALE) and name[: -len(SCALE)] in plain)}


class Shapes(TorchFunctionMode):
    """Within it a model is made on the meta device, of shapes alone. torch.nn.init does nothing: on that device it
    would import the compiler, which takes a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        with torch.device("meta"):
            return func(*args, **(kwargs or {}))


def convert(layout: Layout) -> dict[str, Tensor]:
    """The state dict of model.py's Doge, float32. Raises ValueError unless the checkpoint has exactly the tensors of
    the model that its config.json describes."""
    found = {}
    for name, w in dequantise(layout.tensors).items():
        if (ours := our_name(name)) in found:
            raise ValueError(f"has both {found[ours][0]} and {name}, two names of one tensor")
        if not ours.startswith("rotary_emb."):  # wavelengths, which follow from config.json
            found[ours] = name, w
    if layout.config.tie_word_embeddings and "lm_head.weight" in found and "embed_tokens.weight" in found:
        name, head = found.pop("lm_head.weight")
        if not torch.equal(head.float(), found["embed_tokens.weight"][1].float()):
            raise ValueError(f"has {name} that differs from the embedding, and config.json says tie_word_embeddings")
    config, repeat = layout.config, layout.repeat
    narrow = dataclasses.replace(config, num_key_value_heads=config.num_key_value_heads // repeat)
    with Shapes():
        expected = {name: list(w.shape) for name, w in Doge(narrow, layout.labels).state_dict().items()}
    for name, shape in expected.items():
        shape[0] *= repeat if name.endswith((".A", "dt_proj.weight")) else 1
    wrong = [f"lacks {hf_name(name)}" for name in expected if name not in found]
    for ours, (name, w) in found.items():
        if ours not in expected:
            wrong.append(f"has {name}, which this model has not")
        elif list(w.shape) != expected[ours]:
            wrong.append(f"has {name} of shape {list(w.shape)}, not {expected[ours]}")
        elif w.dtype not in FLOATS:
            wrong.append(f"has {name} as {w.dtype}, and only 16, 32 and 64 bit floats are read")
    if wrong:
        raise ValueError(wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))
    # A copy, in memory that torch allocates: a file's tensors may start at any address, and on some CPUs the dot
    # products of BLAS round differently by the alignment of their inputs, so a resumed run would not be the same.
    weights = {ours: w.to(torch.float32, copy=True) for ours, (_, w) in found.items()}
    return {name: widen(name, w, repeat, config.head_dim) for name, w in weights.items()} if repeat > 1 else weights


def widen(name: str, w: Tensor, repeat: int, head_dim: int) -> Tensor:
    """A tensor for `repeat` times as many key/value heads: k_proj and v_proj get the rows of each head `repeat` times;
    dt_proj, which reads the values of all heads, reads the first of every `repeat` equal ones."""
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        return w.unflatten(0, (-1, head_dim)).repeat_interleave(repeat, dim=0).flatten(0, 1)
    if name.endswith("dt_proj.weight"):
        heads = w.unflatten(1, (-1, 1, head_dim))  # (H, K, 1, D)
        return torch.cat((heads, heads.new_zeros(*heads.shape[:2], repeat - 1, head_dim)), dim=2).flatten(1)
    return w
