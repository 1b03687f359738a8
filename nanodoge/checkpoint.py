"""Checkpoints: a folder written in one rename and opened by one function.

    config.json              the shape of the model, in the fields of transformers' DogeConfig
    model.safetensors        the weights: a header of names and shapes, then the bare numbers
    tokenizer.json           and tokenizer_config.json: the tokenizer, with its chat template
    training_state.pt        of a run that can be resumed: step, optimizer, options

Every stage takes a folder, or a name on the Hugging Face hub, in any published layout (layouts.py). Published weights
may be split (model-00001-of-00003), or a Python pickle, which could run any program: it is opened by a reader that
knows tensors and nothing else, or refused.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from model import Doge, DogeConfig
from nanodoge import layouts
from nanodoge.machine import full_state_dict, shard_like
from nanodoge.options import one_line
from nanodoge.template import PROGRAM_ERRORS
from nanodoge.tokenizer import Tokenizer, read_object

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin"]


# ---- Writing


def save_checkpoint(
    folder: str | Path,
    model: Doge,
    tokenizer: Tokenizer,
    state: dict | None = None,
    fields: dict | None = None,
    weights: dict[str, Tensor | None] | None = None,
) -> None:
    """Writes a checkpoint into `folder`, with training_state.pt if `state` is given. fields: of config.json, in place
    of what it would say. weights: the state dict of a sharded model, from full_state_dict. Raises OSError.

    The files must change together. They are written to folder/.saving and flushed to the disk. Renaming that folder to
    .saved is the moment the checkpoint exists: a crash after it leaves a folder .saved, where every reader looks first.
    """
    folder = Path(folder)
    saving, saved = folder / ".saving", folder / ".saved"
    finish_interrupted_save(folder)
    weights = model.state_dict() if weights is None else weights
    tensors = {layouts.hf_name(name): w.detach().contiguous().cpu() for name, w in weights.items()}
    stamp = {} if state is None else {"step": str(state["step"])}  # see load_training_state
    try:
        saving.mkdir(parents=True)
        save_file(tensors, saving / "model.safetensors", metadata={"format": "pt"} | stamp)
        if state is not None:
            torch.save(state, saving / "training_state.pt")
        text = json.dumps(hugging_face_config(model, tokenizer) | (fields or {}), indent=2)
        (saving / "config.json").write_text(text, encoding="utf-8")
        tokenizer.save(saving, model.config.max_position_embeddings)
        shutil.copymode(saving / "config.json", saving / "model.safetensors")  # safetensors lets only the owner read
        for path in [*saving.iterdir(), saving]:
            if path.is_file() or os.name == "posix":  # Windows cannot flush a folder
                flush(path)
    except (SafetensorError, RuntimeError, OSError) as error:  # the first two: how these libraries report a full disk
        shutil.rmtree(saving, ignore_errors=True)
        reason = error if isinstance(error, OSError) else f"{one_line(error)}; is the disk full?"
        raise OSError(f"cannot write a checkpoint to {folder} (one before it stays whole): {reason}") from None
    os.rename(saving, saved)
    finish_interrupted_save(folder)


def hugging_face_config(model: Doge, tokenizer: Tokenizer) -> dict:
    """config.json, in the fields of transformers' DogeConfig. A model that transformers would compute differently (no
    q/k norm; experts, whose router mixes tokens there) has the model_type nanodoge, so that it does not open there."""
    config, labels = model.config, dict(enumerate(model.labels))
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in layouts.UNSAVED}
    fields["model_type"] = "doge" if config.qk_norm and not config.is_moe else "nanodoge"
    fields["architectures"] = ["DogeForSequenceClassification" if labels else "DogeForCausalLM"]
    fields["torch_dtype"] = str(model.norm.weight.dtype).removeprefix("torch.")
    if labels:
        fields |= dict(id2label=labels, label2id={label: i for i, label in labels.items()})
    if factor := fields.pop("rope_factor"):
        context = config.max_position_embeddings
        fields["rope_scaling"] = dict(rope_type="dynamic", factor=factor, original_max_position_embeddings=context)
    fields |= dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    return fields | dict(hidden_act="silu", hidden_dropout=0.0, attention_dropout=0.0)


def flush(path: Path) -> None:
    """Waits until a file or a folder is on the disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish_interrupted_save(folder: str | Path) -> None:
    """Moves the files of a complete save (.saved) into place and removes those of an incomplete one (.saving). Links,
    which lead to other folders, are not followed."""
    saving, saved = Path(folder) / ".saving", Path(folder) / ".saved"
    if saved.is_dir() and not saved.is_symlink():
        for path in saved.iterdir():
            os.replace(path, Path(folder) / path.name)
        saved.rmdir()
    if saving.is_dir() and not saving.is_symlink():
        shutil.rmtree(saving)
    saving.unlink(missing_ok=True)  # a link or a file, not from here


def clear(folder: str | Path) -> None:
    """Removes a checkpoint, and nothing else, from a folder."""
    finish_interrupted_save(folder)
    for name in ("training_state.pt", "model.safetensors", "config.json", *TOKENIZER_FILES[:2]):
        (Path(folder) / name).unlink(missing_ok=True)


# ---- Finding and reading files


def checkpoint_file(folder: str | Path, name: str) -> Path:
    """The path of a checkpoint's file: in folder/.saved if a save was interrupted after the rename."""
    path = Path(folder) / ".saved" / name
    return path if path.is_file() else Path(folder) / name


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint, given by its path or by its name on the hub, OWNER/NAME. If a folder OWNER exists, or
    if it is `out`, where our runs are, this is a path, so that a typing error there asks no server."""
    owner = str(source).split("/")[0]
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)) and owner != "out" and not Path(owner).is_dir()
    return download(str(source)) if is_name else Path(source)


@functools.cache  # so that all files of a run are of one revision
def download(name: str) -> Path:
    """The folder in huggingface_hub's cache with the files of a model, downloaded if they are not there."""
    from huggingface_hub import constants, errors, snapshot_download

    small = ["config.json", *TOKENIZER_FILES]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*small, "model*.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=[*small, "pytorch_model*.bin"])
        return folder
    except errors.RepositoryNotFoundError:
        reason = f"no model of this name on {constants.ENDPOINT} (private and gated ones need `hf auth login`)"
    except (OSError, ValueError, errors.HTTPError) as error:  # no network, hub or room; a name that no model can have
        reason = f"it could not be fetched from {constants.ENDPOINT}: {one_line(error)}"
    raise ValueError(f"there is no checkpoint folder {name!r}, and {reason}")


@contextmanager
def naming(path: Path, separator: str = ": ") -> Iterator[None]:
    """Within it, ValueErrors about the content of a file begin with its path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}{separator}{error}") from None


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    with naming(path, " is damaged: "):
        return read_object(path.read_bytes())


def read_pickle(path: Path, mmap: bool = False) -> dict:
    """The dict that torch.save wrote. Nothing in it is executed: what is not made of tensors, numbers, text, lists and
    dicts is refused. mmap: tensors are read only when they are used."""
    try:
        if not is_zipfile(path):  # what torch.save writes, with its table of contents at the end
            raise ValueError("it is not a whole zip archive")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except (UnpicklingError, EOFError, RuntimeError, *PROGRAM_ERRORS) as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is damaged or not ours: {one_line(error)}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a file of weights. A safetensors file is mapped into memory, not read."""
    if not path.is_file():  # opening a named pipe waits for ever
        raise ValueError(f"{path} is not a file")
    try:
        tensors = read_pickle(path) if path.suffix == ".bin" else load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if other := [name for name, w in tensors.items() if not isinstance(w, Tensor)]:
        raise ValueError(f"{path} holds {other[0]}, which is not a tensor")
    return {str(name): w for name, w in tensors.items()}


def open_checkpoint(folder: Path) -> tuple[layouts.Layout, Path]:
    """The layout of what a folder holds, and the file of weights (a pattern if they are several). Raises ValueError,
    naming the file, for what is not a Doge."""
    config = checkpoint_file(folder, "config.json")
    if not config.is_file():
        if folder.is_dir():
            raise ValueError(f"{folder} is not a checkpoint: it has no config.json")
        near = [str(path.parent) for path in sorted(folder.parent.glob("*/config.json"))[:9]]
        advice = f"there are {', '.join(near)}" if near else "a stage such as train.py writes one"
        raise ValueError(f"there is no checkpoint folder {str(folder)!r} in {Path.cwd()}; {advice}")
    found = [main for main in (checkpoint_file(folder, name) for name in WEIGHTS) if [*main.parent.glob(main.name)]]
    if not found:
        raise ValueError(f"{folder} has no model.safetensors, nor its parts, nor a pytorch_model.bin")
    tensors = {}
    for path in sorted(found[0].parent.glob(found[0].name)):
        part = read_tensors(path)
        if twice := tensors.keys() & part.keys():
            raise ValueError(f"{path} has {min(twice)}, which another file has too")
        tensors |= part
    fields = read_json(config)
    with naming(config):
        return layouts.read_layout(fields, tensors), found[0]


# ---- Loading


def load_config(source: str | Path) -> DogeConfig:
    """The DogeConfig of a checkpoint: a folder, or a name on the hub."""
    return open_checkpoint(locate(source))[0].config


def load_model(source: str | Path, labels: tuple[str, ...] | None = None) -> tuple[Doge, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a checkpoint: a folder or a name on the hub, in any layout.

    labels: None for a language model; () for a classifier; names for a classifier of these, which a language model
    becomes, all labels being equally likely at first. Raises ValueError for an incomplete or damaged checkpoint, or one
    of the other kind.
    """
    folder = locate(source)
    layout, main = open_checkpoint(folder)
    places = [checkpoint_file(folder, name).parent for name in TOKENIZER_FILES[:2]]
    tokenizer = Tokenizer.load(*places)  # two, if finish_interrupted_save was interrupted itself
    if tokenizer.vocab_size > (size := layout.config.vocab_size):
        raise ValueError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} ids, config.json {size}")
    has, wants = layout.labels, layout.labels if labels == () else tuple(labels or ())
    if (has and has != wants) or (labels is not None and not wants):
        kinds = ["a classifier of " + ", ".join(names) if names else "a language model" for names in (has, wants)]
        kinds[1] = "a classifier" if labels == () else kinds[1]
        raise ValueError(f"{folder} is {kinds[0]}, and what is needed here is {kinds[1]}")
    with layouts.Shapes():
        model = Doge(layout.config, wants)
    with naming(main, " "):
        weights = layouts.convert(layout)
    if wants and not has:
        weights.pop("lm_head.weight", None)
        weights["score.weight"] = torch.zeros(len(wants), layout.config.hidden_size)
    model.load_state_dict(weights, assign=True)
    return model.eval(), tokenizer


def load_training_state(folder: str | Path) -> dict | None:
    """The `state` that save_checkpoint wrote, or None. Raises ValueError if it is not that of a run, or of another step
    than the weights, as after a copy that was cut off."""
    path = checkpoint_file(folder, "training_state.pt")
    if not path.is_file():
        return None
    state = read_pickle(path)
    step = one_line(repr(state.get("step")))[:50]
    weights = checkpoint_file(folder, "model.safetensors")
    if weights.is_file():  # opening a named pipe waits for ever; load_model says what is wrong with the weights
        with suppress(SafetensorError, OSError), safe_open(weights, framework="pt") as file:
            if (stamp := (file.metadata() or {}).get("step", step)) != step:
                steps = f"model.safetensors is of step {stamp}, training_state.pt of step {step}"
                raise ValueError(f"{folder} is a mixture of two checkpoints: {steps}; copy it again, whole")
    kinds = dict(options=dict, optimizer=dict, step=int, tokens=int, seconds=int | float, row=dict | None)
    for name, kind in kinds.items():
        value = state.get(name)
        is_right = isinstance(value, kind) and (not isinstance(value, int | float) or 0 <= value < 2**62)
        if not is_right or (name == "optimizer" and not all(isinstance(part, dict) for part in value.values())):
            raise ValueError(f"{path} is not that of a training run: its {name} is {one_line(repr(value))[:50]}")
    return state


def load_options(source: str | Path) -> dict:
    """The options of the run that made a checkpoint, or {}: published ones have no training_state.pt."""
    path = checkpoint_file(locate(source), "training_state.pt")
    options = read_pickle(path, mmap=True).get("options") if path.is_file() else {}
    return options if isinstance(options, dict) else {}


def optimizer_state(optimizers: list[Optimizer], names: dict[Tensor, str]) -> dict[str, dict[str, Tensor]]:
    """{parameter name: {quantity: tensor}} of all optimizers. names: {parameter: its name}."""
    return {names[p]: full_state_dict(state) for optimizer in optimizers for p, state in optimizer.state.items()}


def load_optimizer_state(optimizers: list[Optimizer], names: dict[Tensor, str], state: dict) -> None:
    """Restores what optimizer_state returned. Parameters that it lacks (new experts), or has from another kind of
    optimizer, start without a state. Raises ValueError for another shape, which the kernels do not check."""
    for optimizer in optimizers:
        muon = isinstance(optimizer, torch.optim.Muon)
        quantities = ["momentum_buffer"] if muon else ["exp_avg", "exp_avg_sq", "step"]
        for group in optimizer.param_groups:
            for p in group["params"]:
                saved = state.get(names[p], {})
                for key in quantities if quantities[0] in saved else ():
                    v, shape = saved.get(key), () if key == "step" else p.shape
                    if not isinstance(v, Tensor) or v.dtype != torch.float32 or v.shape != shape:
                        wanted = f"{key} of {names[p]}, float32 of shape {list(shape)}"
                        raise ValueError(f"training_state.pt is damaged or of another run: it has no {wanted}")
                    # a step counter stays on the CPU, but for fused kernels, which read it on the device
                    v = v.to(p.device, copy=True) if v.dim() or group.get("fused") else v.clone()
                    optimizer.state[p][key] = shard_like(v, p) if v.dim() else v
