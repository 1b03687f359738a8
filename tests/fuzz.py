"""Gives the stages thousands of broken files and command lines and checks how they end.

    python tests/fuzz.py --cases=10000 --out=results/fuzz.csv     all parts: some minutes
    python tests/fuzz.py --only=tokenizer --case=123              one case again, with everything it prints

People download checkpoints, tokenizers and data from strangers; copies are cut off, disks fail, users mistype. So every
kind of file that is read is made from a good one and then damaged: flipped bits, missing ends, JSON with keys that are
missing, doubled or of another type, huge numbers and NaN, half characters, zero bytes, lists nested ten thousand deep,
links out of the folder, a pickle that asks for a program to be run. The real command line reads it, for one training
step or a few tokens. A case passes if all of these hold:

    it works, or ends in one line    `error: ...` on stderr and exit status 2, raised by our code on purpose: a
                                     ValueError out of int("x") names neither the file nor the option
    nothing is misread silently      a file that contradicts itself is refused; a tokenizer loses no text
    it ends                          within SECONDS of CPU time, PATIENCE seconds in all, and MEMORY bytes
    nothing is written elsewhere     each case has its own folder; files beside it stay as they are, and an audit hook
                                     sees every file that the process opens for writing, renames or removes

The damage is a function of (seed, part, number of the case), so every case can be repeated. Cases run in processes
forked from this one, which has imported everything and computed nothing; if one dies, another does the rest. Chat
templates that loop for ever are not among the cases: jinja's sandbox does not keep a template from that.
"""

import contextlib
import csv
import datetime
import functools
import io
import json
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from pathlib import Path
from random import Random
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork does not copy a pool of threads
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the other ones reserve a gigabyte, all that MEMORY allows
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import damage  # noqa: E402
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
from helpers import TINY, TUNE, make_data, make_set, stopped_after, weights, write_csv, write_weights  # noqa: E402

import convert  # noqa: E402
import dpo  # noqa: E402
import evaluate  # noqa: E402
import grpo  # noqa: E402
import prepare_data  # noqa: E402
import sample  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
from nanodoge import run  # noqa: E402
from nanodoge.conversations import SCHEMAS  # noqa: E402
from nanodoge.options import is_out_of_memory, parse_options, run_command  # noqa: E402
from nanodoge.readers import split_pieces  # noqa: E402
from nanodoge.tokenizer import Tokenizer, train_bpe  # noqa: E402

OURS = [*HERE.parent.glob("*.py"), *(HERE.parent / "nanodoge").glob("*.py")]
LINES = {str(path): path.read_text(encoding="utf-8").splitlines() for path in OURS}
SECONDS = 20  # CPU time of a case
PATIENCE = 120  # seconds on the clock
MEMORY = 1 << 30  # bytes that a process may take beyond what it was forked with
CASES_PER_PROCESS = 1000  # libraries keep a little memory of every case


@dataclass
class Options:
    """What fuzz.py is asked to do."""

    cases: int = 10_000  # of all parts
    seed: int = 0  # of the damage
    only: list[str] = field(default_factory=list)  # these parts of PARTS; empty = all
    case: int = -1  # only this case of each part, in this process, with all it prints
    out: str = ""  # csv file to write; empty = none


# ---- Good files, to be damaged


Stage = namedtuple("Stage", "main options files argv")  # a command line that works, in a folder with good files
TRAIN = [*TINY, "--hidden_size=16", "--intermediate_size=16", "--num_hidden_layers=1", "--batch_tokens=32"]
TRAIN += "--data=data --out_dir=new --max_steps=2 --warmup_steps=0 --decay_steps=0 --save_every=1".split()
TUNED = [*TUNE, *"--init_from=model --out_dir=new --max_steps=2 --sequence_length=96".split()]
TUNED += "--batch_size=4 --save_every=1 --eval_every=2 --eval_size=2".split()
GRPO = "--data=problems --max_new_tokens=3 --generations=2 --batch_size=2".split()
PREPARE = "text.txt --out=made --vocab_size=280 --stories=5 --workers=1 --val_fraction=0.3 --piece_chars=100".split()
SCORE = ["model", "--bpb=data", "--eval_tokens=40"]
STAGES = {
    "train": Stage(train.main, train.TrainOptions, ["data", "model"], TRAIN),
    "sft": Stage(sft.main, sft.SftOptions, ["chat", "model"], [*TUNED, "--data=chat", "--eval_answers=1"]),
    "labels": Stage(sft.main, sft.SftOptions, ["labels", "model"], [*TUNED, "--kind=labels", "--data=labels"]),
    "dpo": Stage(dpo.main, dpo.DpoOptions, ["preferences", "model"], [*TUNED, "--data=preferences"]),
    "grpo": Stage(grpo.main, grpo.GrpoOptions, ["problems", "model"], [*TUNED, *GRPO]),
    "sample": Stage(sample.main, sample.SampleOptions, ["model"], ["model", "--max_new_tokens=3"]),
    "evaluate": Stage(evaluate.main, evaluate.EvaluateOptions, ["data", "model"], SCORE),
    "convert": Stage(convert.main, convert.ConvertOptions, ["model"], ["model", "converted"]),
    "prepare_data": Stage(prepare_data.main, prepare_data.PrepareOptions, ["text.txt"], PREPARE),
}
TUNING = ["sft", "labels", "dpo", "grpo"]
# Options that ask for work get no number above 8, which would not be a mistake but work; those that need a network, a
# terminal or a compiler are left alone.
BUSY = """max_steps epochs batch_size batch_tokens micro_batch_size micro_batch_tokens generations updates_per_rollout
    num_samples max_new_tokens sample_tokens stories""".split()
ALONE = "sources chat prompt file compile tasks suite include_path cache".split()


def build(root):
    """Makes one of everything in root/good, and root/beside, which no case may change. Computes gradients, after which
    a process must not be forked."""
    good = root / "good"
    good.mkdir()
    (root / "beside").mkdir()
    (root / "beside" / "secret").write_text("secret")
    os.chdir(good)
    Path("text.txt").write_text("the cat sees the dog and runs to the tree.\n\n" * 40)
    make_data(good / "data", count=30)
    with stopped_after(1):  # of two steps: --resume has one left to do
        train.main([*TRAIN, "--out_dir=train-run"])
        shutil.copytree("train-run", "model", ignore=shutil.ignore_patterns("log.csv", "loss.png"))
        for kind in ("chat", "preferences", "problems"):
            make_set(good / kind, "model", kind, count=40)
        labelled = [dict(text=f"number {i}", label="ab"[i % 2]) for i in range(40)]
        make_set(good / "labels", "model", "labels", rows=labelled, labels=["a", "b"])
        for stage in TUNING:
            STAGES[stage].main([*STAGES[stage].argv, f"--out_dir={stage}-run"])
    for layout, files in dict(parts=dict(parts=2), pickled=dict(suffix="bin")).items():  # the same model
        shutil.copytree("model", layout, ignore=shutil.ignore_patterns("model.safetensors"))
        write_weights(Path(layout), weights(Path("model")), **files)


# ---- The parts: each draws a case and returns (main, argv, why it must be refused or "")

TOKENIZER = "model/tokenizer.json", "model/tokenizer_config.json"


def bring(*names):
    """Copies good files into the folder of the case, which is the current one."""
    for name in names:
        source = Path("..") / "good" / name
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copytree(source, name) if source.is_dir() else shutil.copy(source, name)


def some_option(draw, stage):
    """The name of an option and a value that probably does not fit."""
    name, value = draw.choice([f.name for f in fields(stage.options) if f.name not in ALONE]), damage.nasty(draw)
    is_large = isinstance(value, int | float) and not abs(value) <= 8
    return name.rstrip("_"), 3 if name in BUSY and is_large else value


def command_line(draw):
    stage = draw.choice(list(STAGES.values()))
    argv = list(stage.argv)
    bring(*stage.files)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kind, (name, value) = draw.randrange(10), some_option(draw, stage)
        if kind < 6:
            argv.append(f"--{name}={damage.as_text(value)}")
        elif kind == 6:
            argv += [f"--{name}", damage.as_text(value)][: draw.choice([1, 2])]
        elif kind == 7:
            argv.append(f"--{name[: draw.randrange(len(name))]}{damage.as_text(value)}")
        elif kind == 8:
            words = ["--", "-", "", "=", "--=", "--config=", "--config=data", "--help", damage.as_text(value)]
            argv.append(draw.choice(words))
        elif not argv[-1].startswith(("--data", "--out", "--stories", "--max")):
            argv.pop()
    return stage.main, argv, ""


VALUES = ["__import__('os').system('touch owned')", "open('owned', 'w')", "[1] * 10**9", "-" * 3000 + "1", "9" * 6000]
VALUES += ["(" * 300 + ")" * 300, "'\\ud800'", "'a\\0b'", "0x" + "f" * 6000, "1 if 1 else 2", "((1, 2), 3)", "'a' 'b'"]
VALUES += "1e999 b'x' {} ... 1j f'{1}' [[[]]] None lambda:0 ''' \\ nan {1:2,**{}} {[]:1} +1 1+1j True".split()


def config_file(draw):
    stage = draw.choice([stage for name, stage in STAGES.items() if name != "convert"])
    bring(*stage.files)
    words = [word for word in stage.argv if not word.startswith("--")]
    given = [word[2:].partition("=") for word in stage.argv if word.startswith("--")]
    lines = [f"{name} = {value if value.replace('.', '').isdigit() else repr(value)}" for name, _, value in given]
    for _ in range(draw.choice([0, 1, 1, 2])):
        name, value = some_option(draw, stage)
        value = draw.choice([draw.choice(VALUES), repr(value).replace(damage.DEEP, "[" * 3000)])
        lines.insert(draw.randrange(len(lines) + 1), f"{name} = {value}")
    data = "\n".join(lines).encode(errors="surrogatepass")
    Path("c.py").write_bytes(damage.corrupt(draw, data) if draw.random() < 0.5 else data)
    if draw.random() < 0.05:
        damage.place(draw, Path("c.py"))
    kept = [*BUSY, *ALONE, "data", "out", "tokens"]  # said again on the command line, which wins
    again = [word for word in stage.argv if word[2:].partition("=")[0] in kept]
    return stage.main, [*words, "--config=c.py", *again], ""


SCRAPS = "<think> </think> <tool_call> dog the se < > | |> <|pad|> \u65e5\u672c 12 'll".split() + ["\n\n", " ", "  "]
PROBE = "The cat's 12345 blue  dogs\n\n\tran: \u00e9t\u00e9, \u6f22\u5b57 \U0001f600!? " + "a" * 40 + " " * 30
PROBE += "\0\x7f".join(SCRAPS)


def use_tokenizer(argv):
    """Everything that the stages do with a tokenizer; its ids are those of `tokenizers`, if that opens the file."""
    tokenizer = Tokenizer.load(argv[0])
    ids = tokenizer.encode(PROBE)
    assert tokenizer.decode(ids) == PROBE, "text is lost"
    their_ids = ids
    with contextlib.suppress(Exception):
        theirs = tokenizers.Tokenizer.from_file(f"{argv[0]}/tokenizer.json")
        theirs.encode_special_tokens = True
        their_ids = theirs.encode(PROBE, add_special_tokens=False).ids
    assert ids == their_ids, "other ids"
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert all(0 <= i < tokenizer.vocab_size for i in [*ids, *special])
    assert tokenizer.encode_to_numpy(PROBE).tolist() == ids
    tokenizer.save("saved")
    again = Tokenizer.load("saved")
    assert again.digest == tokenizer.digest and again.encode(PROBE) == ids
    ids, mask = tokenizer.render([dict(role="user", content=PROBE), dict(role="assistant", content="so")])
    assert len(ids) == len(mask) and all(0 <= i < tokenizer.vocab_size for i in ids)


def tokenizer_files(draw):
    bring(*TOKENIZER)
    if draw.random() < 0.25:  # saved again by the library, with tokens that users added
        theirs, flags = tokenizers.Tokenizer.from_file(TOKENIZER[0]), ("lstrip", "rstrip", "single_word")
        for word in ("".join(draw.choices(SCRAPS, k=draw.choice([1, 1, 2]))) for _ in range(draw.choice([0, 1, 2, 4]))):
            given = {flag: True for flag in flags if draw.random() < 0.05}
            theirs.add_tokens([tokenizers.AddedToken(word, normalized=draw.random() < 0.7, **given)])
        theirs.save(TOKENIZER[0], pretty=draw.random() < 0.5)
        return use_tokenizer, ["model"], ""
    words = 4 * "tokenizer.json " + "tokenizer_config.json tokenizer_config.json chat_template.jinja"
    return use_tokenizer, ["model"], damage.some_file(draw, Path("model"), words)


def use_run(argv):
    """Everything that works on text of users, with a bound on the time per byte."""
    tokenizer, text = Tokenizer.load("model"), Path("run").read_bytes().decode()
    assert tokenizer.decode(tokenizer.encode(text)) == text, "text is lost"
    for work in (
        tokenizer.encode,
        lambda text: tokenizer.render([dict(role="user", content=text), dict(role="assistant", content=text)]),
        lambda text: train_bpe([text], 270),
        lambda text: list(split_pieces(iter([text]), 1000)),
    ):
        start = time.process_time()
        work(text)
        assert time.process_time() - start < 0.5 + 8e-6 * len(text), "not linear"


def long_run(draw):
    bring(*TOKENIZER)
    letters = " \n\r\t\u3000\x1c\u0301'a1^\u00e9\u65e5\U0001f600\ufeff<|"
    unit = "".join(draw.choices(letters, k=draw.choice([1, 1, 1, 2, 3])))
    size = draw.choice([10**6, 500_000, 499_999, 500_001, int(10 ** draw.uniform(0, 6))])
    text = draw.choice(["", "x"]) + unit * (size // len(unit)) + draw.choice(["", "y", "\n", "y" + unit * 1000])
    Path("run").write_bytes(text.encode())
    return use_run, [], ""


def reads(stage, folder, words, *argv):
    """A command line that reads a folder in which one of the files that `words` match is damaged."""
    return STAGES[stage].main, {*STAGES[stage].files, folder}, folder, words, list(argv or STAGES[stage].argv)


DATA = 3 * "meta.json " + "*.bin *.answers.jsonl tokenizer.json tokenizer_config.json"
CHECKPOINT = 6 * "config.json *.safetensors pytorch_model*.bin " + "*.index.json tokenizer.json tokenizer_config.json "
CHECKPOINT += "chat_template.jinja .saved .saving"
RUN = 4 * "training_state.pt training_state.pt log.csv " + 2 * "config.json *.safetensors "
RUN += "tokenizer.json log.csv.new samples loss.png .saved .saving"
READS = dict(
    text_data=[reads("train", "data", DATA), *2 * [reads("evaluate", "data", "meta.json val.bin val.bin")]],
    tuning_data=[reads(stage, STAGES[stage].files[0], DATA) for stage in TUNING],
    checkpoint=[],
    convert=[],
    resume=[reads("train", "model", "training_state.pt", *TRAIN, "--init_from=model")],
)
for layout in ("model", "model", "parts", "pickled"):
    READS["checkpoint"] += 3 * [reads("sample", layout, CHECKPOINT, layout, "--max_new_tokens=3")]
    READS["checkpoint"] += [reads("sft", layout, CHECKPOINT, *STAGES["sft"].argv, f"--init_from={layout}")]
    for to in ("nanodoge", "transformers"):
        READS["convert"] += [reads("convert", layout, CHECKPOINT, layout, "converted", f"--to={to}")]
for name in ("train", "train", "sft", "dpo", "grpo"):
    argv = ["--resume", f"--out_dir={name}-run", "--max_steps=2", *["--sample_tokens=0"] * (name == "train")]
    READS["resume"] += 2 * [reads(name, f"{name}-run", RUN, *argv)]


def broken_file(draw, part):
    main, files, folder, words, argv = draw.choice(READS[part])
    bring(*files)
    must, meta = damage.some_file(draw, Path(folder), words), Path("data/meta.json")
    if part == "text_data" and meta.is_file() and meta.read_bytes() == Path("../good/data/meta.json").read_bytes():
        with contextlib.suppress(ValueError, OSError):  # else the first check would end the case
            fits = dict(tokenizer_sha256=Tokenizer.load("data").digest)
            meta.write_text(json.dumps(json.loads(meta.read_text()) | fits))
    return main, argv, must


def some_rows(draw, kind):
    """Good rows of a schema with a few bad ones among them."""
    made = [dict(text=f"number {i} and so on", label="ab"[i % 2]) for i in range(12)]
    if kind not in ("text", "labels"):
        columns = draw.choice(SCHEMAS[kind]).split(", ")
        made = [{name: some_cell(draw, name, i) for name in columns} for i in range(12)]
    for _ in range(draw.choice([0, 1, 1, 3])):
        damage.twist(draw, made)
        made = json.loads(json.dumps(made))  # no part of it twice, or the next twist could put it into itself
    if draw.random() < 0.1:
        made[draw.randrange(len(made)) if made else 0 :] = [damage.nasty(draw)]
    return made


def some_cell(draw, column, i):
    """What may be in this column of row i: a text, a number, messages in all their spellings."""
    question, answer = f"what comes after {i}", str(i + 1) + " not" * (column == "rejected")
    if column not in ("messages", "conversations", "prompt", "completion", "chosen", "rejected"):
        return draw.choice([answer, i]) if column in ("answer", "output", "response", "solution") else question
    who, said = draw.choice([("role", "content"), ("from", "value")])
    turns = [{who: "user", said: question}, {who: draw.choice(["assistant", "Assistant"]), said: answer}]
    if column not in ("messages", "conversations"):
        turns = turns[:1] if column == "prompt" else turns[draw.choice([0, 1]) :]
    spelled = "".join(f"\n\n{name}: {turn[said]}" for name, turn in zip(("Human", "Assistant"), turns, strict=False))
    return draw.choice([turns, json.dumps(turns), turns[-1][said] if len(turns) == 1 else spelled])


def prepare_and_count(argv):
    """prepare_data.py; then every row has been written or counted as left out."""
    prepare_data.main(argv)
    meta = json.loads(Path("made/meta.json").read_text())
    done = meta["train"]["documents"] + meta["val"]["documents"] + sum(meta["left_out"].values())
    assert meta["request"]["tokens"] or done == meta["rows"], "rows are lost in silence"


def write_rows(draw, made, path):
    """A file of rows in the form that its suffix says."""
    if path.suffix == ".parquet":
        for some in (made, [dict(text="the cat")] * 9):  # the first may be rows that no parquet file can hold
            with contextlib.suppress(pyarrow.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
                return pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path)
    if ".csv" in path.name:
        columns = list(made[0]) if made and isinstance(made[0], dict) else ["text"]
        cells = [[str(row.get(c)) if isinstance(row, dict) else str(row) for c in columns] for row in made]
        text = io.StringIO()
        csv.writer(text).writerows([columns, *cells])
        text = text.getvalue()
    elif draw.random() < 0.3:
        text = json.dumps(made, indent=draw.choice([None, 1]))
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=draw.random() < 0.9) for row in made)
    data = text.replace(json.dumps(damage.DEEP), "[" * 20_000).encode(errors="surrogatepass")
    with pyarrow.output_stream(str(path), compression="detect") as file:
        file.write(b"\xef\xbb\xbf" * (draw.random() < 0.2) + data)


def rows(draw):
    kind = draw.choice(["text", "chat", "preferences", "problems", "labels"])
    suffix = draw.choice(["jsonl", "jsonl", "json", "jsonl.gz", "parquet", "parquet", "csv"])
    path = Path("in", f"a.{suffix}")
    path.parent.mkdir()
    write_rows(draw, some_rows(draw, kind), path)
    if draw.random() < (0.3 if suffix == "jsonl" else 0.4):
        path.write_bytes(damage.corrupt(draw, path.read_bytes()))
    if draw.random() < 0.03:
        damage.place(draw, path)
    argv = [draw.choice(["in", str(path)]), "--out=made", "--val_fraction=0.4", "--workers=1", f"--kind={kind}"]
    argv += ["--tokens=200"] * (draw.random() < 0.2) + ["--labels=a,b"] * (kind == "labels")
    argv += ["--max_left_out=1"] * (draw.random() < 0.5)
    argv += ["--tokenizer=model"] if kind != "text" else ["--vocab_size=270"]
    bring(*TOKENIZER)
    return prepare_and_count, argv, ""


# part: how it draws a case, its share of the cases
PARTS = dict(command_line=(command_line, 16), config_file=(config_file, 14), tokenizer=(tokenizer_files, 21))
PARTS |= dict(rows=(rows, 14), long_run=(long_run, 2))
for part, share in dict(text_data=8, tuning_data=9, checkpoint=10, convert=5, resume=8).items():
    PARTS[part] = functools.partial(broken_file, part=part), share


# ---- One case


class TimeIsUp(BaseException):
    """A case has taken SECONDS of CPU time."""


def time_is_up(number, frame):
    raise TimeIsUp(f"more than {SECONDS} seconds")


def attempt(main, argv, must):
    """Runs main(argv) as its command line would. Returns "worked", "refused" or what went wrong, and its stderr."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    before, result = signal.signal(signal.SIGPROF, time_is_up), "worked"
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with mock.patch.object(sys, "argv", ["fuzz.py", *argv]):
                run_command(main)
    except SystemExit as stop:
        result = why_refused(stop) if stop.code == 2 else "worked" if not stop.code else f"exit status {stop.code}"
    except BaseException as error:
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in LINES]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        result = f"{type(error).__name__} at {where}: {str(error)[:200]}"
        traceback.print_exc(file=err)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    err.seek(0)
    said = err.read()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if result == "refused" and errors != said.splitlines()[-1:]:
        result = f"not one line: {said[:200]}"
    return (f"read silently, though {must}" if result == "worked" and must else result), said


def why_refused(stop):
    """ "refused" if the error line is an OSError or a ValueError that our code raises itself, else what it is."""
    error = stop.__context__
    if is_out_of_memory(error) or "out of memory" in str(error):
        return f"out of memory: {str(error)[:200]}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = LINES.get(frame.filename, [""] * frame.lineno)[frame.lineno - 1]
    if isinstance(error, OSError) or line.strip().startswith("raise "):
        return "refused"
    return f"{type(error).__name__} not raised by us at {frame.filename}:{frame.lineno}: {str(error)[:100]}"


OUTSIDE = []  # what the current case wrote, renamed or removed outside its folder


def watch(event, args):
    """The audit hook that fills OUTSIDE (see sys.addaudithook)."""
    if event == "open" and (not isinstance(args[0], str | bytes) or not args[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
        return
    for path in [os.fsdecode(arg) for arg in args[: 2 if event == "os.rename" else 1] if not isinstance(arg, int)]:
        if event == "os.mkdir" and os.path.isdir(path):
            continue  # it is there already
        real = os.path.realpath(path if event in ("open", "os.truncate") else os.path.dirname(path))
        if "/case" not in real and real != "/dev/null":
            OUTSIDE.append(f"{event} {path}")


def is_untouched(root):
    """Whether root and root/beside hold what they did before the first case."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (root, root / "beside")]
    return names == [["beside", "case", "good"], ["secret"]] and (root / "beside/secret").read_text() == "secret"


@contextlib.contextmanager
def quick():
    """Without pictures, and without waiting for the disk."""
    with mock.patch.object(run, "plot_loss", lambda *paths: None), mock.patch.object(os, "fsync", lambda number: None):
        yield


def run_case(root, part, number, seed):
    """One case in the folder root/case. Returns its result (see attempt), and its command line and what it said."""
    place = root / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.chdir(place)
    main, argv, must = PARTS[part][0](Random(f"{seed} {part} {number}"))
    OUTSIDE.clear()
    with quick():
        result, said = attempt(main, argv, must)
    if part in ("command_line", "config_file"):  # these may name a folder elsewhere, and ask for much memory
        result = "refused" if result.startswith("out of memory") else result
        for path in root.iterdir():
            if path.name not in ("beside", "case", "good"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif OUTSIDE:
        result = f"wrote {OUTSIDE[0]}"
    if not is_untouched(root) or (place / "owned").exists():
        raise RuntimeError(f"{part} {number}: it reached out of its folder, or ran a program: {argv}")
    return result, f"{argv}\n{said}"


# ---- Many cases

FORK = multiprocessing.get_context("fork")


def limit_process():
    """Called in a new process: limits its memory and starts to watch what it writes."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
    sys.addaudithook(watch)


def result_of(work):
    """What a Future returns. It is waited for in steps of a second, so that the time for which this process and that of
    the case are stopped (SIGSTOP, a laptop that sleeps) counts as one second."""
    for _ in range(PATIENCE - 1):
        with contextlib.suppress(futures.TimeoutError):
            return work.result(1)
    return work.result(1)


def run_part(root, part, count, seed):
    """Runs `count` cases and returns a row of the table."""
    start, results = time.monotonic(), []
    while len(results) < count:
        with futures.ProcessPoolExecutor(1, FORK, limit_process) as pool:
            process = pool.submit(os.getpid).result()
            for number in range(len(results), min(count, len(results) + CASES_PER_PROCESS)):
                try:
                    results.append(result_of(pool.submit(run_case, root, part, number, seed))[0])
                except (futures.TimeoutError, BrokenProcessPool) as error:
                    results.append(f"the process ended or took more than {PATIENCE} s: {type(error).__name__}")
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                    break
    counts = {result: results.count(result) for result in ("refused", "worked")}
    bad = [f"{number}: {result}" for number, result in enumerate(results) if result not in counts]
    for line in bad:
        print(part, line, flush=True)
    row = dict(part=part, cases=count) | counts | dict(failures=len(bad))
    return row | dict(seconds=round(time.monotonic() - start), note="; ".join(bad[:3]))


def main(argv):
    options, table = parse_options(Options, argv), []
    if unknown := set(options.only) - set(PARTS):
        raise ValueError(f"--only={','.join(unknown)} is not one of {' '.join(PARTS)}")
    sys.dont_write_bytecode = True
    out, parts = Path(options.out).absolute(), options.only or list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), quick():
            child = FORK.Process(target=build, args=(root,))
            child.start()
            child.join()
        assert child.exitcode == 0, "the good files cannot be made"
        for part in parts:
            if options.case >= 0:
                print(part, options.case, *run_case(root, part, options.case, options.seed), sep="\n")
                continue
            share = PARTS[part][1] / sum(PARTS[part][1] for part in parts)
            table.append(run_part(root, part, round(options.cases * share), options.seed))
            print(*(f"{key}={value}" for key, value in table[-1].items()), sep="  ", flush=True)
        os.chdir(HERE)
    if options.out:
        facts = dict(date=datetime.date.today().isoformat(), python=platform.python_version(), torch=torch.__version__)
        write_csv(out, [row | facts for row in table])
    sys.exit(1 if any(row["failures"] for row in table) else 0)


if __name__ == "__main__":
    run_command(main)
