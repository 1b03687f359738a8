"""Checkpoints as they are found in the world: where they lie, how each is recognised, and how it becomes ours.

A trained model is a table of names and numbers. What travels is a folder: `config.json` says the shape of the model,
`tokenizer.json` how text becomes ids, and a file of weights holds a tensor for every name. Nothing in the weights says
how to compute with them: two programs must agree on the names, and on what is done with each. Doge has been published
under several agreements, and this file turns them all into the one of model.py.

Where.    A folder, or a name on the Hugging Face hub: `SmallDoge/Doge-20M` is downloaded once, by huggingface_hub, into
          that library's own cache.                                                                       -> locate
Files.    `model.safetensors` is a header of names and shapes, then the bare numbers; reading it runs nothing. A large
          model is cut into several, listed in `model.safetensors.index.json`. Older repositories have
          `pytorch_model.bin`, a Python pickle, which may run any program while it is read: it is opened by a reader
          that knows tensors and nothing else, or refused.                                               -> open_tensors
Names.    The library's (transformers 4.54 and later), which are ours with `model.` before them; or those of the
          original repository until June 2025: `word_embed`, `final_layernorm`, `pre_layernorm`, `post_layernorm`,
          `pre_residual.weight`, `post_residual.weight`, `feed_forward`. Its versions mixed both, so each name is
          translated by itself.                                                                           -> our_name
Heads.    The mask's A and dt_proj belong to key/value heads in the library, and to attention heads in the original,
          which the shape of A tells. One key/value head then serves several heads with different masks, and ours have
          one mask a key/value head: so each key/value head is repeated until every attention head has its own. The
          function is the same, and the cache as many times larger.                                       -> widen
Norms.    The library normalises queries and keys, the original does not: the checkpoint has `q_norm` and `k_norm`, or
          has not. That is the switch `qk_norm` of DogeConfig.
Numbers.  bfloat16 and float16 become float32, exactly.
Output.   A head of its own (`lm_head.weight`), or the embedding (`tie_word_embeddings`); a classifier's is
          `score.weight`, a row a label.

Nothing is guessed. What is missing, left over, of another shape, or set to what model.py does not compute, is refused
with a line that names the file and the tensor or field.
"""

import functools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from model import Doge, DogeConfig
from nanodoge.options import one_line
from nanodoge.tokenizer import PROGRAM_ERRORS, read_object

# Names of the original repository -> the library's.
RENAMED = {
    "word_embed.": "embed_tokens.", "final_layernorm.": "norm.", ".pre_layernorm.": ".input_layernorm.",
    ".post_layernorm.": ".post_attention_layernorm.", ".pre_residual.weight": ".input_residual",
    ".post_residual.weight": ".post_attention_residual", ".feed_forward.": ".mlp.",
}  # fmt: skip

# Settings of either config.json that change what is computed: here they have these values, and a checkpoint must too.
FIXED = dict(hidden_act="silu", hidden_bias=False, attention_bias=False, mlp_bias=False, sliding_window=None,
             dynamic_mask_ratio=0.0)  # fmt: skip
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")  # fmt: skip
SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # others are packed or scaled, and look alike


# ---------------------------------------------------------------------------------------------------------------------
# Where


def locate(source):
    """A folder, or the name of a model on the hub -> the folder it lies in.

    A name has the form OWNER/NAME, and so has the path of a folder. A folder that exists is one; so is any other path
    that begins with a folder that exists, or with out/, where our runs go: there a typing error stays at home.
    """
    text = str(source)
    owner = text.split("/")[0]
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) or owner == "out" or Path(owner).is_dir():
        return Path(source)
    return Path(download(text))


@functools.cache  # so that all files of a run are of one revision
def download(name):
    """The folder in huggingface_hub's cache with the files of a model, fetched if they are not there."""
    from huggingface_hub import constants, errors, snapshot_download

    nothing = f"there is no checkpoint folder {name!r}, and"
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, "model*.safetensors", WEIGHT_FILES[1]]))
        if not any((folder / weights).is_file() for weights in WEIGHT_FILES[:2]):
            snapshot_download(name, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin", WEIGHT_FILES[3]])
        return folder
    except errors.HFValidationError:
        raise ValueError(f"{nothing} a model on the hub cannot have this name") from None
    except errors.GatedRepoError:
        raise ValueError(f"{nothing} the hub's model of this name asks for permission: `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{nothing} no model of this name on {constants.ENDPOINT} (private ones need "
                         "`hf auth login`)") from None  # fmt: skip
    except (OSError, errors.HTTPError) as error:  # no network; the hub is down; the disk is full; cut off on the way
        raise ValueError(f"{nothing} it could not be fetched from {constants.ENDPOINT}: {one_line(error)}") from None


def checkpoint_file(folder, name):
    """The path of a checkpoint's file, which is in folder/.saved if a save was cut off right after it was complete."""
    path = Path(folder) / ".saved" / name
    return path if path.is_file() else Path(folder) / name


# ---------------------------------------------------------------------------------------------------------------------
# Files


class Stored(NamedTuple):
    """A tensor of a checkpoint that has not been read yet."""

    file: Path
    name: str
    shape: tuple
    read: Callable


def open_tensors(folder):
    """-> the file to name when a tensor is missing, and [Stored] of all files of weights."""
    found = [path for name in WEIGHT_FILES if (path := checkpoint_file(folder, name)).is_file()]
    if not found:
        raise ValueError(f"{folder} has no model.safetensors, nor its parts with an index, nor a pytorch_model.bin")
    main = found[0]
    files = [main]
    if main.suffix == ".json":
        parts = read_json(main).get("weight_map")
        if not isinstance(parts, dict) or not all(type(p) is str and Path(p).name == p for p in parts.values()):
            raise ValueError(f"{main} is damaged: its weight_map does not name files beside it")
        files = [checkpoint_file(folder, part) for part in sorted(set(parts.values()))]
    stored = []
    for path in files:
        if not path.is_file():
            raise ValueError(f"{main} names {path.name}, which is not there")
        stored += open_pickle(path) if path.suffix == ".bin" else open_safetensors(path)
    return main, stored


def open_safetensors(path):
    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return [Stored(path, name, shape, functools.partial(file.get_tensor, name)) for name, shape in shapes.items()]


def open_pickle(path):
    state = read_pickle(path)
    if not all(isinstance(w, torch.Tensor) for w in state.values()):
        other = next(name for name, w in state.items() if not isinstance(w, torch.Tensor))
        raise ValueError(f"{path} holds {other}, which is not a tensor")
    return [Stored(path, str(name), tuple(w.shape), w.clone) for name, w in state.items()]


def read_pickle(path):
    """The dict that torch.save wrote. Nothing in it is executed: what is not made of tensors, numbers, text, lists and
    dicts is refused."""
    if not zipfile.is_zipfile(path):  # what torch.save writes, with its table of contents at the end
        raise ValueError(f"{path} is damaged or not ours: it is not a whole zip archive")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except (UnpicklingError, EOFError, RuntimeError, *PROGRAM_ERRORS) as error:  # what a damaged pickle ends in is open
        raise ValueError(f"{path} is damaged or not ours: {one_line(error)}") from None


def read_json(path):
    try:
        return read_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# What it is


class Checkpoint(NamedTuple):
    """A checkpoint that is understood and not read yet."""

    config: DogeConfig
    file: Path  # of the weights, or their index
    tensors: dict  # {our name: Stored}
    repeat: int  # how often each key/value head stands in the model for once in the file
    labels: tuple  # of a classifier, else empty
    notes: list  # what was found, in words


def our_name(name):
    """The name in model.py of a published tensor."""
    name = name.removeprefix("model.")
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def inspect(folder):
    """Reads config.json and the names and shapes of the tensors of a folder -> Checkpoint. Raises ValueError, naming
    the file, for what is not a Doge."""
    if not Path(folder).is_dir():
        raise ValueError(f"there is no checkpoint folder {str(folder)!r}")
    path = checkpoint_file(folder, "config.json")
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json")
    fields = {name: value for name, value in read_json(path).items() if value is not None}
    if (kind := fields.get("model_type")) not in ("doge", "nanodoge"):
        raise ValueError(f"{path}: model_type is {kind!r}, not 'doge' or 'nanodoge'")
    main, stored = open_tensors(folder)
    tensors = {}
    for tensor in stored:
        name = our_name(tensor.name)
        if name in tensors:
            raise ValueError(f"{main} has both {tensors[name].name} and {tensor.name}, two names of one tensor")
        if not name.startswith("rotary_emb."):  # wavelengths, which follow from config.json
            tensors[name] = tensor
    config = read_config(path, fields, tensors)
    A, heads, groups = tensors.get("layers.0.self_attn.A"), config.num_attention_heads, config.num_key_value_heads
    repeat = heads // groups if A and A.shape == (heads,) else 1
    config.num_key_value_heads = groups * repeat
    labels = read_labels(path, fields, tensors)
    notes = [f"classifier of {len(labels)} labels"] * bool(labels)
    notes += [f"{len(stored)} tensors in {len({tensor.file for tensor in stored})} file(s)"]
    if any(our_name(tensor.name) != tensor.name.removeprefix("model.") for tensor in stored):
        notes.append("names of the original repository")
    if repeat > 1:
        notes.append(f"A and dt_proj of each attention head: {groups} key/value heads repeated to {heads}")
    notes += ["queries and keys without a norm"] * (not config.qk_norm)
    if config.is_moe and kind == "doge":
        notes.append("experts chosen for every token by itself, where the original's router mixed the tokens of a text")
    return Checkpoint(config, main, tensors, repeat, labels, notes)


def read_config(path, fields, tensors):
    """config.json's fields -> DogeConfig. What the file leaves open is read off the names of the tensors."""
    needed = NEEDED + ("num_experts", "num_experts_per_tok") * bool(fields.get("is_moe"))
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"{path} lacks {missing[0]}")
    defaults = dict(tie_word_embeddings="lm_head.weight" not in tensors, num_key_value_heads=fields[NEEDED[-1]],
                    qk_norm=any(name.endswith("q_norm.weight") for name in tensors))  # fmt: skip
    fields = defaults | fields | read_rope(path, fields)
    for name, value in FIXED.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {fields[name]!r}, and only {value!r} is computed here")
    values = {}
    for field, default in DogeConfig().__dict__.items():
        value = fields.get(field, default)
        whole = type(default) is float and type(value) is int and abs(value) < 2**63
        if type(value) is not type(default) and not whole:
            raise ValueError(f"{path}: {field}: {value!r} is not of type {type(default).__name__}")
        values[field] = type(default)(value)
    try:
        config = DogeConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if fields.get("head_dim", config.head_dim) != config.head_dim:
        raise ValueError(f"{path}: head_dim is {fields['head_dim']}, not hidden_size / num_attention_heads")
    return config


def read_labels(path, fields, tensors):
    """The labels of a classifier, by their number. transformers calls those without a name LABEL_0, LABEL_1, ..."""
    head = tensors.get("score.weight")
    if head is None:
        return ()
    numbers = [str(i) for i in range(head.shape[0] if head.shape else 0)]
    names = fields.get("id2label", {number: f"LABEL_{number}" for number in numbers})
    if not isinstance(names, dict) or set(names) != set(numbers) or len(numbers) < 2:
        raise ValueError(f"{path}: id2label is {names!r}, and {head.name} has {len(numbers)} rows")
    return tuple(str(names[number]) for number in numbers)


def read_rope(path, fields):
    """The rotary embedding's settings, wherever a config.json keeps them -> {rope_theta, rope_factor}."""
    rope = fields.get("rope_parameters", fields.get("rope_scaling", {}))  # newer and older files
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {rope!r}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = fields.get("rope_theta", rope.get("rope_theta", DogeConfig.rope_theta))
    if kind == "default":
        return dict(rope_theta=theta, rope_factor=0.0)
    if kind != "dynamic":
        raise ValueError(f"{path}: rope_type is {kind!r}, and only 'default' and 'dynamic' are computed here")
    context = fields.get("max_position_embeddings", DogeConfig.max_position_embeddings)
    if (original := rope.get("original_max_position_embeddings", context)) != context:
        raise ValueError(f"{path}: original_max_position_embeddings is {original}, and scaling begins where "
                         f"max_position_embeddings={context} ends: they must be equal")  # fmt: skip
    if "factor" not in rope:
        raise ValueError(f"{path}: rope_type is 'dynamic', and there is no factor")
    return dict(rope_theta=theta, rope_factor=rope["factor"])


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def read_weights(checkpoint, device="cpu"):
    """The state dict of model.py's Doge, float32. Raises ValueError, naming file and tensor, unless the checkpoint has
    exactly the tensors of the model its config.json describes."""
    config, main, tensors, repeat, labels, _ = checkpoint
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in Doge(config, labels).state_dict().items()}
    tensors = without_copy_of_the_embedding(tensors, config)
    wrong = [f"{main} lacks {hf_name(name)}" for name in shapes if name not in tensors]
    wrong += [f"{t.file} has {t.name}, which this model has not" for name, t in tensors.items() if name not in shapes]
    for name, tensor in tensors.items():
        if name in shapes and tensor.shape != (shape := narrow_shape(name, shapes[name], repeat)):
            wrong.append(f"{tensor.file} has {tensor.name} of shape {list(tensor.shape)}, not {list(shape)}")
    if wrong:
        raise ValueError(wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))
    weights = {}
    for name, tensor in tensors.items():
        # A copy, in memory that torch allocates: a file's tensors may start at any address, and on some CPUs the dot
        # products of BLAS round differently by the alignment of their inputs, so a resumed run would not be the same.
        w = read_tensor(tensor).to(device, torch.float32, copy=True)
        weights[name] = w if repeat == 1 else widen(name, w, repeat, config.head_dim)
    return weights


def read_tensor(tensor):
    try:
        w = tensor.read()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{tensor.file} is damaged: {error}") from None
    if w.dtype not in FLOATS:
        raise ValueError(f"{tensor.file} has {tensor.name} as {w.dtype}, and only 16, 32 and 64 bit floats are read")
    return w


def without_copy_of_the_embedding(tensors, config):
    """Some files store the output matrix even where it is the embedding. Then both must be equal."""
    head = tensors.get("lm_head.weight")
    if not (config.tie_word_embeddings and head and "embed_tokens.weight" in tensors):
        return tensors
    if not torch.equal(read_tensor(head).float(), read_tensor(tensors["embed_tokens.weight"]).float()):
        raise ValueError(f"{head.file} has {head.name} that differs from the embedding, and config.json says "
                         "tie_word_embeddings")  # fmt: skip
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def hf_name(name):
    """The library's name of a parameter of model.py."""
    return name if name.startswith(("lm_head", "score")) else f"model.{name}"


def narrow_shape(name, shape, repeat):
    """The shape of a tensor in a file whose key/value heads are repeated `repeat` times in the model."""
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        return shape[0] // repeat, *shape[1:]
    return (shape[0], shape[1] // repeat) if name.endswith("dt_proj.weight") else shape


def widen(name, w, repeat, head_dim):
    """A tensor of such a file -> that of the model: the rows of each key/value head `repeat` times; and dt_proj, which
    reads the values of all heads, reads the first of every `repeat` equal ones."""
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        return w.unflatten(0, (-1, head_dim)).repeat_interleave(repeat, dim=0).flatten(0, 1)
    if name.endswith("dt_proj.weight"):
        heads = w.unflatten(1, (-1, 1, head_dim))  # (H, K, 1, D)
        return torch.cat((heads, heads.new_zeros(*heads.shape[:2], repeat - 1, head_dim)), dim=2).flatten(1)
    return w
