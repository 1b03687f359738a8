"""Checkpoints: a folder written in one rename and opened by one function."""

import dataclasses
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import Doge
from nanodoge.layouts import checkpoint_file, hf_name, locate, read_json, read_pickle, read_weights
from nanodoge.layouts import inspect as inspect_checkpoint
from nanodoge.machine import full_state_dict, shard_like
from nanodoge.options import one_line
from nanodoge.tokenizer import Tokenizer


def read_meta(folder, kind="text"):
    """meta.json of a data folder. Raises ValueError for a folder that prepare_data.py did not finish, or that holds
    another kind of data."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise ValueError(f"{folder}: there is no {path}; python prepare_data.py SOURCE "
                         f"--kind={kind} --out={folder} makes one")  # fmt: skip
    try:
        meta = read_json(path)
        numbers = [meta["vocab_size"], meta["train"]["tokens"], meta["val"]["tokens"]]
        if meta["dtype"] not in ("uint16", "uint32") or not all(type(n) is int and n >= 0 for n in numbers):
            raise KeyError(f"dtype {meta['dtype']}, numbers {numbers}")
        if kind != "text" and not isinstance(meta.get("sizes"), dict):
            raise KeyError("sizes")
        labels = meta["labels"] if kind == meta.get("kind") == "labels" else ["", ""]
        if type(labels) is not list or len(labels) < 2 or not all(type(label) is str for label in labels):
            raise KeyError(f"labels {labels}")
        if (found := meta.get("kind", "text")) != kind:
            raise ValueError(f"{folder} holds --kind={found}, and this stage reads --kind={kind}")
        return meta | {"tokenizer_sha256": str(meta["tokenizer_sha256"])}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None


def hugging_face_config(model, tokenizer):
    """The config.json of a checkpoint: Hugging Face's DogeConfig fields. A model that transformers would compute
    differently (no q/k norm; experts, whose router mixes tokens there) must not open there, so its type is another."""
    config = model.config
    same = config.qk_norm and not config.is_moe
    fields = dataclasses.asdict(config)
    del fields["attention"]  # how to compute, not what
    if factor := fields.pop("rope_factor"):
        context = config.max_position_embeddings
        fields["rope_scaling"] = dict(rope_type="dynamic", factor=factor, original_max_position_embeddings=context)
    ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    kind = dict(model_type="doge" if same else "nanodoge", architectures=["DogeForCausalLM"],
                torch_dtype=str(model.norm.weight.dtype).removeprefix("torch."))  # fmt: skip
    if model.labels:
        kind |= dict(architectures=["DogeForSequenceClassification"], id2label=dict(enumerate(model.labels)),
                     label2id={label: i for i, label in enumerate(model.labels)})  # fmt: skip
    return kind | fields | ids | dict(hidden_act="silu", hidden_dropout=0.0, attention_dropout=0.0)


def save_checkpoint(folder, model, tokenizer, state=None, fields=None, weights=None):
    """Writes model.safetensors, config.json, tokenizer.json and, if given, training_state.pt into `folder`. fields: of
    config.json, in place of what it would say. weights: model.state_dict(), in full.

    The files must change together. They are written to folder/.saving, flushed to the disk, and the rename of that
    to .saved is the moment the checkpoint exists: a crash before it leaves the old files, a crash after it leaves a
    .saved folder that every reader looks into first and the next save moves into place.
    """
    folder = Path(folder)
    saving, saved = folder / ".saving", folder / ".saved"
    settle(folder)
    weights = {hf_name(name): w.detach().contiguous().cpu() for name, w in (weights or model.state_dict()).items()}
    stamp = {} if state is None else {"step": str(state["step"])}  # see load_training_state
    try:
        saving.mkdir(parents=True)
        save_file(weights, saving / "model.safetensors", metadata={"format": "pt"} | stamp)
        if state is not None:
            torch.save(state, saving / "training_state.pt")
        text = json.dumps(hugging_face_config(model, tokenizer) | (fields or {}), indent=2)
        (saving / "config.json").write_text(text, encoding="utf-8")
        tokenizer.save(saving)
        for path in [*saving.iterdir(), saving]:
            if path.is_file() or os.name == "posix":  # Windows cannot flush a folder
                flush(path)
    except (SafetensorError, RuntimeError, OSError) as error:  # the first two: what these libraries make of a full disk
        shutil.rmtree(saving, ignore_errors=True)
        there = checkpoint_file(folder, "config.json").is_file()
        before = "the one before it is whole" if there else "there is none yet"
        reason = error if isinstance(error, OSError) else f"{one_line(error)}; is the disk full?"
        raise OSError(f"cannot write a checkpoint to {folder} ({before}): {reason}") from None
    os.rename(saving, saved)
    settle(folder)


def flush(path):
    """Waits until a file or a folder is on the disk, where a power cut does not reach it."""
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(folder):
    """Finishes or undoes what an interrupted save left behind: a .saved folder is whole, a .saving folder is not."""
    saving, saved = Path(folder) / ".saving", Path(folder) / ".saved"
    if saved.is_dir() and not saved.is_symlink():  # a link would bring in somebody else's files
        for path in saved.iterdir():
            os.replace(path, Path(folder) / path.name)
        saved.rmdir()
    if saving.is_dir() and not saving.is_symlink():
        shutil.rmtree(saving)
    saving.unlink(missing_ok=True)  # none of ours


def clear(folder):
    """Removes a checkpoint, and nothing else, from a folder."""
    settle(folder)
    for name in "training_state.pt model.safetensors config.json tokenizer.json tokenizer_config.json".split():
        (Path(folder) / name).unlink(missing_ok=True)


def load_config(source):
    """The DogeConfig of a checkpoint: a folder, or a name on the hub. Raises ValueError, naming the file, for what is
    not one."""
    return inspect_checkpoint(locate(source)).config


def load_model(source, device="cpu", labels=None):
    """A checkpoint -> (model in eval mode, tokenizer). source: a folder, or a name on the hub, in any published layout
    (see layouts.py). labels: None for a language model; () for a classifier; names for a classifier of these, which a
    language model becomes, all labels being equally likely at first. Raises ValueError, naming the file and the tensor,
    for a checkpoint that is incomplete, damaged, or of the other kind."""
    folder = locate(source)
    checkpoint = inspect_checkpoint(folder)
    places = (checkpoint_file(folder, name).parent for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = Tokenizer.load(*places)  # two, if a crash came while settle was at work
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} ids, config.json "
                         f"{checkpoint.config.vocab_size}")  # fmt: skip
    has, wants = checkpoint.labels, checkpoint.labels if labels == () else tuple(labels or ())
    if (has and has != wants) or (labels is not None and not wants):
        what = "a classifier of " + ", ".join(has) if has else "a language model"
        asked = "a classifier of " + ", ".join(wants) if wants else "a language model" if has else "a classifier"
        raise ValueError(f"{folder} is {what}, and what is needed here is {asked}")
    with torch.device("meta"):
        model = Doge(checkpoint.config, wants)
    weights = read_weights(checkpoint, device)
    if wants and not has:
        weights.pop("lm_head.weight", None)
        weights["score.weight"] = torch.zeros(len(wants), checkpoint.config.hidden_size, device=device)
    model.load_state_dict(weights, assign=True)
    return model.eval(), tokenizer


def load_training_state(folder):
    """The dict that save_checkpoint got as `state`, or None if the folder has none. Nothing in it is executed. Raises
    ValueError if it is damaged, or of another step than the weights beside it, as after a copy that was cut off."""
    path = checkpoint_file(folder, "training_state.pt")
    if not path.is_file():
        return None
    state, step = read_pickle(path), None
    with suppress(SafetensorError, OSError):  # load_model says what is wrong with the weights
        with safe_open(checkpoint_file(folder, "model.safetensors"), framework="pt") as file:
            step = (file.metadata() or {}).get("step")
    if step is not None and step != str(state.get("step")):
        raise ValueError(f"{folder} is a mixture of two checkpoints: model.safetensors is of step {step}, "
                         f"training_state.pt of step {one_line(repr(state.get('step')))[:50]}; "
                         "copy it again, whole")  # fmt: skip
    return state


def load_run(folder):
    """load_training_state of a training run. Raises ValueError if it is not that of one."""
    state = load_training_state(folder)
    kinds = dict(options=dict, optimizer=dict, step=int, tokens=int, seconds=int | float, row=dict | None)
    for name, kind in kinds.items() if state is not None else ():
        value = state.get(name)
        whole = isinstance(value, kind) and (not isinstance(value, int | float) or 0 <= value < 2**62)
        if not whole or name == "optimizer" and not all(isinstance(entry, dict) for entry in value.values()):
            raise ValueError(f"{folder}/training_state.pt is not that of a training run: its {name} is "
                             f"{one_line(repr(value))[:50]}")  # fmt: skip
    return state


def optimizer_state(optimizers, names):
    """{parameter name: {quantity: tensor}} of all optimizers: by name, so that a model with more parameters (a MoE
    twin) can take it over. names = {parameter: its name}."""
    return {names[p]: full_state_dict(state) for optimizer in optimizers for p, state in optimizer.state.items()}


def load_optimizer_state(optimizers, names, state):
    """Gives every parameter that `state` knows its part of it back. The others start afresh, and so do those whose
    state another kind of optimizer left."""
    for optimizer in optimizers:
        muon = isinstance(optimizer, torch.optim.Muon)
        own = ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq", "step")
        for group in optimizer.param_groups:
            for p in (p for p in group["params"] if own[0] in state.get(names[p], ())):
                optimizer.state[p] = {}
                for k in own:  # the kernels do not look whether the shapes are right
                    v, shape = state[names[p]].get(k), () if k == "step" else p.shape
                    if not isinstance(v, torch.Tensor) or v.dtype != torch.float32:
                        raise ValueError(f"training_state.pt is damaged: it has no {k} of {names[p]} in float32")
                    if v.shape != shape:
                        raise ValueError(f"training_state.pt has {names[p]} of shape {list(v.shape)}, the model "
                                         f"{list(shape)}: they are not of one run")  # fmt: skip
                    # a step counter stays on the host, but for fused kernels, which read it themselves
                    v = v.to(p.device, copy=True) if v.dim() or group.get("fused") else v.clone()
                    optimizer.state[p][k] = shard_like(v, p) if v.dim() else v
