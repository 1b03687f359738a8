"""README.md and docs/ against the repository: their commands run, their links lead somewhere, their tables are made of
results/*.csv and config/. `python tests/test_docs.py --write` rewrites those tables.
"""

import ast
import csv
import dataclasses
import functools
import importlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import train  # noqa: E402, after the path
from model import Doge, DogeConfig  # noqa: E402
from nanodoge import stage  # noqa: E402
from nanodoge.options import parse_options  # noqa: E402

PAGES = sorted({*HERE.glob("*.md"), *HERE.glob("docs/**/*.md")} - {HERE / "NOTES.md"})
NAMES = [str(page.relative_to(HERE)) for page in PAGES]


def blocks(language):
    """[(page, text)] of the code blocks in a language, each text once."""
    found = {}
    for name, page in zip(NAMES, PAGES, strict=True):
        for text in re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.S | re.M):
            found.setdefault(text, name)
    return [(name, text) for text, name in found.items()]


# ---- Commands


WORDS = dict(convert="paths", evaluate="checkpoint", prepare_data="sources", sample="checkpoint", serve="checkpoint")
PROGRAMS = [f"{name}.py" for name in ("bench", *WORDS, "train", "sft", "dpo", "grpo")]


def parse(name, argv):
    """Reads the options of a program as its main does; of a stage its own main, up to where it would start to train."""
    module = importlib.import_module(name)
    if name == "bench":
        module.read_options(argv)
    elif name in WORDS:
        options = getattr(module, f"{name.removesuffix('_data').capitalize()}Options")
        parse_options(options, argv, positional=WORDS[name])
    else:
        with patch.object(stage, "run_stage"):
            module.main(argv + ["--overwrite"] * (not any("--resume" in word for word in argv)))


PARSED_ONLY = {  # why the rest of the command is not run
    r"torchrun|nnodes": "several processes: tests/test_train.py runs them",
    r"serve\.py": "serves until it is stopped: tests/test_serve.py",
    r"bench\.py": "minutes: tests/test_bench.py runs each part",
    r"(hf|swh|https?):|--suite|--tasks|smollm_corpus": "needs the network",
    r"--to=onnx": "seconds: tests/test_export.py",
    r"stdlib": "10 MB of text",
    r"config/\w*doge": "a real recipe",
    r"grpo\.py": "seconds: tests/test_grpo.py",
}
NOT_OURS = {  # first words of commands of other programs, or of scripts whose own tests run them
    r"pip|uv |git|npm|source|docker|brew|apt|python3 -m venv": "installs something",
    r"python (-m (http\.server|pytest)|-c)|ruff|cmp|lm_eval|curl|jupyter|ollama": "another program, or this one",
    r"python tests/\w+\.py": "takes minutes; tests/test_crash.py, test_fuzz.py and test_serve.py run parts",
    r"python examples/\w+\.py": "takes minutes",
    r"python exports/\w+/run\.py": "tests/test_export.py runs it",
}
SHORT = "--overwrite --max_steps=2 --log_every=1 --eval_every=2 --save_every=2 --sample_tokens=4 --device=cpu".split()
TINY = """--hidden_size=32 --intermediate_size=48 --num_hidden_layers=1 --num_attention_heads=2
    --max_position_embeddings=64""".split()
TUNED = "--batch_size=2 --sequence_length=256 --eval_size=2".split()
SCALE = {  # what is appended to a command to make it small
    "convert.py": lambda argv, out: [argv[0], out, *argv[2:]],
    "dpo.py": lambda argv, out: [*argv, *SHORT, *TUNED, f"--out_dir={out}"],
    "evaluate.py": lambda argv, out: [*argv, "--eval_tokens=64", "--device=cpu"],
    "prepare_data.py": lambda argv, out: [*argv, "--vocab_size=300", "--stories=20", f"--out={out}"],
    "sample.py": lambda argv, out: [*argv, "--max_new_tokens=2", "--device=cpu"],
    "sft.py": lambda argv, out: [*argv, *SHORT, *TUNED, "--eval_answers=1", f"--out_dir={out}"],
    "train.py": lambda argv, out: scaled_training(argv, out),
}


def scaled_training(argv, out):
    """train.py's arguments for two steps of 128 tokens; of a resumed run for as many more as are asked for."""
    small = [*SHORT, "--micro_batch_size=2", "--eval_tokens=64"]
    if any(word.startswith("--resume") for word in argv):
        steps = [word for word in argv if word.startswith("--max_steps")]
        return [word for word in argv if word not in steps] + small[2:] + ["--max_steps=6"] * bool(steps)
    batch = ["--batch_tokens=128", "--sequence_length=64", f"--out_dir={out}"]
    return [*argv, *small, *batch, *([] if any("--init_from" in word for word in argv) else TINY)]


def commands():
    """[(page, words)] of all commands in the pages, each once, without comments and continued lines."""
    found = {}
    for page, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for words in split_line(line):
                found.setdefault(tuple(words), page)
    return [(page, words) for words, page in found.items()]


def split_line(line):
    """The words of each command in a line of the shell."""
    words = shlex.split(line, comments=True)
    return [list(group) for last, group in itertools.groupby(words, lambda word: word in ("&&", "|")) if not last]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which every checkpoint, data folder and file that a page names is a small one."""
    from helpers import make_data, make_set, rows_of, texts

    folder = tmp_path_factory.mktemp("docs")
    before = os.getcwd()
    os.chdir(folder)
    make_data(Path("data/stories"))
    argv = [*SHORT, *TINY, "--micro_batch_size=2", "--batch_tokens=128", "--eval_tokens=64", "--decay_steps=1"]
    with redirect_stdout(io.StringIO()):
        train.main([*argv, "--max_steps=4", "--save_every=1", "--copy_steps=0", "--out_dir=out/stories"])
    sets = {kind: make_set(Path(f"data/stories-{kind}"), "out/stories", kind, 24) for kind in ("chat", "preferences")}
    labels = [dict(text=text, label="good" if len(text) % 2 else "bad") for text in texts(40)]
    sets["labels"] = make_set(Path("data/labels"), "out/stories", "labels", rows=labels, labels=["bad", "good"])
    shutil.copytree(sets["chat"], "data/sums-chat")
    lines = [" ".join(words) for _, words in commands()] + [text for _, text in blocks("python")]
    for line in sorted(lines, key=lambda line: "prepare_data.py" in line):  # the stage says of which kind a folder is
        kind = "labels" if "kind=labels" in line else "preferences" if "dpo.py" in line else "chat"
        for place in re.findall(r"\b(?:out|data|SmallDoge)/[\w.-]+", line):
            tunes = place.startswith("data/") and re.search(r"(sft|dpo)\.py", line)
            if not Path(place).exists():
                source = sets[kind] if tunes else "data/stories" if place.startswith("data/") else "out/stories"
                shutil.copytree(source, place)
    text = " ".join(lines)
    Path("config").symlink_to(HERE / "config")
    for place in set(re.findall(r"(?<![\w/])[\w/-]+\.(?:txt|md|jsonl|csv)\b|\bnotes/", text)):
        path = Path(place) / "a.txt" if place.endswith("/") else Path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = rows_of("preferences" if "preferences" in place else "chat", 40)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row | dict(text=str(row))) + "\n" for row in rows))
        elif path.suffix == ".csv":
            path.write_text("text,label\n" + "".join(f"{t},{'good' if len(t) % 2 else 'bad'}\n" for t in texts(40)))
        else:
            path.write_text("\n\n".join(texts(200)))
    yield folder
    os.chdir(before)


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else value[-1]
)
def test_command(page, words, world, monkeypatch):
    """Every command of README.md and docs/ parses, and runs, scaled down, unless a list above says why it does not."""
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))  # NAME=value COMMAND
    line = " ".join(words)
    if any(re.match(pattern, line) for pattern in NOT_OURS):
        assert not words[0].startswith("python") or "/" not in words[1] or words[1].startswith(("tests", "ex", "-"))
        return
    program = next(word for word in words if word in PROGRAMS)
    assert words[0] == "python" or "torchrun" in line, line
    argv = list(words[words.index(program) + 1 :])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello.\n"))
    if any(re.search(pattern, line) for pattern in PARSED_ONLY):
        parse(program[:-3], argv)
    else:
        out = ("data" if program == "prepare_data.py" else "out") + f"/run-{abs(hash(line))}"
        importlib.import_module(program[:-3]).main(SCALE[program](argv, out))


def test_every_reason_is_used():
    lines = [" ".join(words) for _, words in commands()]
    unused = [pattern for pattern in PARSED_ONLY if not any(re.search(pattern, line) for line in lines)]
    assert not unused


@pytest.mark.parametrize(("page", "text"), blocks("python"), ids=lambda value: value[:24])
def test_python_block(page, text, world):
    code = compile(text, page, "exec")
    if "127.0.0.1" not in text:  # a client of a server: tests/test_serve.py runs one
        with redirect_stdout(io.StringIO()):
            exec(code, {})


# ---- Links, names, spelling


def anchors(page):
    """The addresses of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", "\n".join(re.findall(r"^#+ (.+)$", text, re.M))).lower()
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in headings.splitlines()}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = HERE / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(other), f"{name}: {target}"


def defined_in(path):
    """The names of all functions, classes and constants in a Python file; of a method also Class.method."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names |= {node.name, *(f"{node.name}.{getattr(part, 'name', '')}" for part in node.body)}
        names |= {target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("name", NAMES)
def test_code_that_a_table_points_to_is_there(name):
    """A cell "`a` and `b` in file.py" or, in Chinese, "file.py 中的 `a`": the names are defined in that file."""
    text, listed = (HERE / name).read_text(encoding="utf-8"), r"`[\w.]+`(?:(?:, | and | 和 )`[\w.]+`)*"
    found = re.findall(rf"({listed}) in ([\w/]+\.py)", text)
    found += [pair[::-1] for pair in re.findall(rf"([\w/]+\.py) 中的 ({listed})", text)]
    for names, file in found:
        assert set(re.findall(r"`([\w.]+)`", names)) <= defined_in(HERE / file), f"{name}: {names} in {file}"
    assert len(found) > 5 or not name.startswith("README")


def test_spelling(capsys):
    codespell = pytest.importorskip("codespell_lib")
    words = "doge,dout,nd,ot,te,vas,wit,ths,ser"  # names, and parts of samples that a tiny model wrote
    pages = [str(page) for page in PAGES if "zh" not in str(page.relative_to(HERE))]
    assert codespell.main("-L", words, "-q", "3", *pages, str(HERE / "NOTES.md")) == 0, capsys.readouterr().out


def test_readme_is_short():
    assert len((HERE / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


# ---- Figures in sentences, and tables


def rows_of_csv(name):
    with open(HERE / "results" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(name, key):
    return [float(row[key]) for row in rows_of_csv(f"{name}.csv") if row[key]]


FIGURES = {  # page: the text that must stand there
    "README.md": [f"ends at {column('stories', 'val_bpb')[-1]:.2f} bits per byte"],
    "docs/evaluation.md": [
        f"| {column('stories', 'val_bpb')[-1]:.3f} ([log](../results/stories.csv))",
        f"| {column('shakespeare', 'val_bpb')[-1]:.2f} ([log](../results/shakespeare.csv))",
        f"| {column('stdlib', 'val_bpb')[-1]:.2f} ([log](../results/stdlib.csv))",
        "| {:.1f} (it has never seen such a text) | **{:.2f}** (after the first 50 steps {:.2f})".format(
            *(column("gsm8k", "val_loss")[i] for i in (0, -1, 1))
        ),
        f"**{column('gsm8k-preferences', 'val_accuracy')[-1]:.0%}**".replace("%", " %"),
    ],
    "docs/internals.md": [
        f"{sum(column('crash', 'tries')):.0f} tries, {sum(column('crash', 'inside_a_save')):.0f} of them during a save"
    ],
}


@pytest.mark.parametrize("page", FIGURES)
def test_figures_are_those_of_the_logs(page):
    text = (HERE / page).read_text(encoding="utf-8")
    assert [figure for figure in FIGURES[page] if figure not in text] == []


def significant(value, digits=2):
    """A number with so many significant digits, and commas from 1,000 up."""
    value = float(f"{value:.{digits}g}")
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:g}"


def ratio_of(row):
    middle, low, high = (f"{float(row[name]):.1f}" for name in ("speedup", "speedup_min", "speedup_max"))
    return f"**{middle}**, one round" if row["rounds"] == "1" else f"**{middle}** [{low}, {high}]"


def seconds_of(value):
    return f"{significant(float(value))} s" if float(value) >= 0.1 else f"{float(value) * 1e3:.3g} ms"


def models():
    """What each recipe takes, from config/ alone."""
    yield "model", "parameters", "training tokens", "MB to run, float32 and int8", "GB to train", "GPU hours, computed"
    for size, moe in itertools.product((20, 60, 160, 320), ("", "_moe")):
        files = [f"config/doge{size}m.py"] + [f"config/doge{size}m_moe.py"] * bool(moe)
        options = train.read_options(["--overwrite", *(str(HERE / file) for file in files)])
        config = DogeConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(DogeConfig)})
        with torch.device("meta"):
            model = Doge(config)
        count, tokens = sum(p.numel() for p in model.parameters()), options.max_steps * options.batch_tokens
        cache = 4 * config.num_hidden_layers * config.num_key_value_heads * 2048 * (2 * config.head_dim + 1)
        memory = " and ".join(f"{(bytes_ * count + cache) / 1e6:,.0f}" for bytes_ in (4, 1))
        hours = significant(model.flops_per_token(2048) * tokens / 1e14 / 3600)
        yield f"`{files[-1]}`", f"{count:,}", f"{tokens / 1e9:.1f}B", memory, f"{16 * count / 1e9:.1f}", hours


LLAMA_FORMATS = ("F32", "BF16", "Q8_0")  # peers in bench.csv that are llama.cpp's


def speed():
    """The README's six rows of results/bench.csv."""
    rows = {row["name"]: row for row in rows_of_csv("bench.csv")}
    peered = {row["name"]: row for row in rows_of_csv("bench.csv") if row["peer"] not in ("", *LLAMA_FORMATS)}
    yield "what, with the 20M model", "ours", "transformers", "ratio"
    for name, label, unit in (
        ("decode 20m float32 decoder cpp 1x32+128", "writing 128 tokens", "tokens/s"),
        ("decode 20m int8 decoder cpp 1x32+128", "... int8, against the faster of float32 and bfloat16", "tokens/s"),
        ("prefill 20m float32 1x8192", "a prompt of 8,192 tokens", ""),
        ("train 20m float32 1x2048", "a training step of 2,048 tokens", "tokens/s"),
        ("moe 320m_moe float32 experts 1x2048", "16,384 experts of the 320M model, with backward", ""),
    ):
        row = peered[name]
        ours, theirs = (row[prefix + ("tokens_per_second" if unit else "seconds")] for prefix in ("", "peer_"))
        cells = [f"{float(x):,.0f} {unit}" if unit else seconds_of(x) for x in (ours, theirs)]
        yield label, *cells, ratio_of(row)
    long, short = (rows[f"decode 20m float32 decoder cpp 1x{n}"] for n in (32768, 2048))
    times = ", ".join(seconds_of(float(row["seconds"]) / 128) for row in (long, short))
    yield "a token after 32,768 others, and after 2,048", times, "", long["note"]


def sizes():
    """Tokens per second of writing by step.cpp, by size and format."""
    rows = {row["name"]: row for row in rows_of_csv("bench.csv")}
    yield "", "20M", "60M", "160M", "320M"
    for dtype in ("float32", "int8"):
        found = [rows[f"decode {size}m {dtype} decoder cpp 1x32+128"] for size in (20, 60, 160, 320)]
        yield dtype, *(f"{float(row['tokens_per_second']):,.0f}" for row in found)


def measured(what):
    """All rows of results/bench.csv of one kind. what: llama for those of decode beside it."""
    kind = "decode" if what == "llama" else what
    yield "model and case", "ours", "peer", "ratio", "MB beside the weights, ours and the peer's", "share of the limit"
    for row in rows_of_csv("bench.csv"):
        if row["what"] != kind or (row["peer"] in LLAMA_FORMATS) != (what == "llama"):
            continue
        rates = [row[prefix + "tokens_per_second"] for prefix in ("", "peer_")]
        ours, theirs = (f"{float(rate):,.0f} tokens/s" if rate and float(rate) else "" for rate in rates)
        memory = ", ".join(f"{float(row[name]):,.0f}" for name in ("extra_mb", "peer_extra_mb") if row[name])
        peer = f"{theirs} ({row['peer']})" if row["peer"] else ""
        share = f"{float(row['share']):.0%}" if row["share"] else ""
        machine = "(Xeon)" * ("Xeon" in row["cpu"])
        name = row["name"].removeprefix(f"{kind} ").replace(" decoder", "")
        name = " ".join(filter(None, [name, row["note"], machine]))
        ratio = ratio_of(row) if row["peer"] else ""
        yield name, ours or seconds_of(row["seconds"]), peer, ratio, memory, share


def chain():
    """What every stage of the chain moved, for all seeds."""
    rows = rows_of_csv("chain.csv")
    yield "command", "what is counted", "before", "after"
    for command, figure, label in (
        ("train.py", "val_bpb", "bits per byte of held-out text"),
        ("sft.py", "val_exact", "answers about a story right to the last word, of 972"),
        ("dpo.py", "val_accuracy", "pairs in which the better answer has the larger reward, of 972"),
        ("dpo.py", "val_chosen_logp", "log-probability of the better answer, nats"),
        ("sft.py config/sft_reason_tiny.py", "val_exact", "sums worked out right, of 200"),
        ("grpo.py", "val_accuracy", "sums worked out right, of 200"),
    ):
        form = dict(val_bpb=".3f", val_chosen_logp=".0f").get(figure, ".0%")
        found = [row for row in rows if row["command"] == command and row["figure"] == figure]
        before, after = (
            [format(float(row[name]) + 1e-9, form) for row in found if row[name]] for name in ("before", "after")
        )
        yield f"`{command}`", label, ", ".join(dict.fromkeys(before)), f"**{', '.join(after)}**"


def load():
    """Tokens per second by model, way and number of clients."""
    speeds = {}
    for row in rows_of_csv("load.csv"):
        if found := re.match(r"tokens/s, (\d+) clients, (.+)", row["what"]):
            speeds.setdefault((row["model"], found[2]), {})[found[1]] = f"{float(row['figure']):,.0f}"
    yield "model", "", "1 client", "4 clients", "16 clients", "64 clients"
    for way, by_clients in speeds.items():
        yield *way, *(by_clients.get(count, "") for count in ("1", "4", "16", "64"))


def gpu():
    """The speeds of results/gpu_h200.csv."""
    yield "case", "tokens/s", "of the card's peak", "GB beside the weights", "peer"
    for row in rows_of_csv("gpu_h200.csv"):
        if row["tokens_per_second"]:
            note = f" ({row['note']})" if row["note"] and row["note"] not in row["trial"] else ""
            peer = f"{float(row['peer_tokens_per_second']):,.0f} ({row['peer']})" if row["peer"] else ""
            share = f"{float(row['mfu']):.0%}" if row["mfu"] else ""
            rate, memory = float(row["tokens_per_second"]), float(row["extra_mb"]) / 1e3
            yield row["trial"] + note, f"{rate:,.0f}", share, f"{memory:.1f}", peer


TABLES = dict(models=models, speed=speed, sizes=sizes, chain=chain, load=load, gpu=gpu)
TABLES |= {
    what: lambda what=what: measured(what) for what in "decode llama prefill train attention moe tokenizer data".split()
}
MARKED = re.compile(r"(<!-- [^>]+: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)


@functools.cache
def table(name):
    header, *rows = ([*cells] for cells in TABLES[name]())
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def translated(new, old):
    """A new table with the Chinese cells of the old one, each with the numbers of the English one in its place."""

    def cell(english, chinese):
        same = sorted(re.findall(r"\d+", english)) == sorted(re.findall(r"\d+", chinese))
        return chinese if same and re.search(r"[\u4e00-\u9fff]", chinese) else english

    lines = itertools.zip_longest(new.splitlines(), old.splitlines()[: new.count("\n")], fillvalue="")
    return "".join("|".join(map(cell, a.split("|"), (b + 9 * "|").split("|"))) + "\n" for a, b in lines)


def with_tables(page):
    tables = translated if "zh" in str(page.relative_to(HERE)) else lambda new, old: new
    text = page.read_text(encoding="utf-8")
    return MARKED.sub(lambda found: found[1] + tables(table(found[2]), found[3]) + found[4], text)


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_those_of_the_results(name):
    assert with_tables(HERE / name) == (HERE / name).read_text(encoding="utf-8"), "python tests/test_docs.py --write"


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    for page in PAGES:
        page.write_text(with_tables(page), encoding="utf-8")
