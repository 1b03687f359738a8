"""Files that run without torch: the ONNX step against model.py, the exported program and page against sample.py."""

import functools
import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused, make_checkpoint

import convert
import sample
from nanodoge.checkpoint import load_model
from nanodoge.engine import Engine, Request
from nanodoge.export import WEB, chat_parts, portable_pattern

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")

CHROMIUM = "/usr/bin/chromium"
DENSE = dict(keep_window_size=8, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
SHAPES = {  # a window that is passed three times; experts; a window longer than any text, and no norms
    "dense": DENSE,
    "moe": DENSE | dict(is_moe=True, num_experts=16, num_experts_per_tok=4),
    "wide": dict(keep_window_size=2048, qk_norm=False, tie_word_embeddings=False),
}


def program(folder):
    """The class Model of an exported run.py."""
    spec = importlib.util.spec_from_file_location("exported_run", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model(folder)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{name: (checkpoint, export)}. Scores differ from key to key, so that which keys are kept matters."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    (web := root / "web").mkdir()
    for file in WEB:
        (web / file).write_text("of onnxruntime-web")
    for name, shape in SHAPES.items():
        source = make_checkpoint(root / name, seed=3, **shape)
        model, tokenizer = load_model(source)
        torch.manual_seed(0)
        for block in model.layers:
            torch.nn.init.normal_(block.self_attn.A, std=2.0)
            torch.nn.init.normal_(block.self_attn.dt_proj.weight)
        convert.save_checkpoint(source, model, tokenizer)
        words = []
        if name == "moe":  # from int8, which the page's form of the graph computes as float32: the same numbers
            convert.main([str(source), str(root / "int8"), "--dtype=int8"])
            source, words = root / "int8", ["--dtype=int8", f"--web={web}"]
        convert.main([str(source), str(root / f"{name}.onnx"), "--to=onnx", *words])
        made[name] = source, root / f"{name}.onnx"
    return made


@pytest.mark.parametrize("name", SHAPES)
def test_the_exported_step_writes_what_the_engine_writes(exports, name):
    source, export = exports[name]
    model, tokenizer = load_model(source)
    prompt = [tokenizer.bos_id, *tokenizer.encode("the red cat sees a blue dog under the tree")]
    request, runner = Request(prompt, 24 + len(prompt), temperature=0), program(export)
    Engine(model, vocab_size=tokenizer.vocab_size).generate([request])
    tokens, logits = [], [runner.read(token) for token in prompt][-1]
    for _ in range(24 + len(prompt)):
        tokens.append(int(logits.argmax()))
        logits = runner.read(tokens[-1])
    assert tokens == request.tokens
    assert runner.state["s"].shape[-1] == min(model.config.keep_window_size + 1, 64)
    with torch.inference_mode():
        theirs = model(torch.tensor([[*prompt, *tokens]]))[0][0, -1, : tokenizer.vocab_size]
    np.testing.assert_allclose(logits, theirs, atol=1e-4)


def test_sample_writes_the_same_with_the_onnx_backend(exports, capfd):
    words = [str(exports["dense"][0]), "--prompt=the red cat", "--max_new_tokens=40", "--device=cpu", "--num_samples=2"]
    texts = []
    for backend in ("torch", "onnx"):
        sample.main([*words, f"--backend={backend}", "--dtype=float32"])
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 40


@pytest.mark.parametrize("words", ["--compile=true", "--attention=definition", "--dtype=bfloat16"])
def test_what_the_onnx_backend_cannot_is_refused(exports, words):
    with pytest.raises(ValueError, match="^--backend=onnx computes"):
        sample.main([str(exports["dense"][0]), "--backend=onnx", "--device=cpu", words])


def test_an_int8_export_computes_what_our_int8_folder_does(exports, tmp_path, capsys):
    source, _ = exports["dense"]
    convert.main([str(source), str(tmp_path / "int8"), "--dtype=int8"])
    assert "loss changes from" in capsys.readouterr().out
    ours, tokenizer = load_model(tmp_path / "int8")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (source, tmp_path / "int8")]
    assert sizes[1] < 0.4 * sizes[0]  # a matrix of 64 columns: 1 + 4/64 bytes a weight; small vectors stay
    convert.main([str(tmp_path / "int8"), str(tmp_path / "again"), "--dtype=int8"])
    again, _ = load_model(tmp_path / "again")
    for (name, w), other in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(w, other, rtol=1e-6, atol=0, msg=name)  # rounded once, and not again
    convert.main([str(source), str(tmp_path / "onnx"), "--to=onnx", "--dtype=int8"])
    runner, ids = program(tmp_path / "onnx"), [tokenizer.bos_id, *tokenizer.encode("the red cat finds the ball")]
    logits = [runner.read(id) for id in ids]
    expected = ours(torch.tensor([ids]))[0][0, :, : tokenizer.vocab_size].detach()
    apart = (torch.tensor(np.array(logits)) - expected).abs().max() / expected.abs().max()
    assert apart < 0.04  # onnxruntime rounds the inputs of every product to int8 too, with a scale for 32 of them


def test_the_portable_encoder_gives_our_ids(exports):
    runner, (source, _) = program(exports["wide"][1]), exports["wide"]
    _, tokenizer = load_model(source)
    draw = random.Random(5)
    letters = " \n\t\r'aZszſK9½٣дéß中🙂\u0301\u200b\xa0\x1c\x85.,!?_-\ufeff"
    for _ in range(300):
        text = "".join(draw.choice(letters) for _ in range(draw.randrange(40)))
        assert list(runner.encode([text])) == tokenizer.encode(text), repr(text)
    with pytest.raises(ValueError, match="cannot be written"):
        portable_pattern(r"\P{L}+")


def test_the_parts_of_a_chat_join_to_what_the_template_renders(exports):
    runner, (source, _) = program(exports["wide"][1]), exports["wide"]
    _, tokenizer = load_model(source)
    chat, roles = runner.chat, ["user", "assistant", "user"]
    messages = [{"role": role, "content": word} for role, word in zip(roles, ["Hi", "red cat", "\nwhy"], strict=True)]
    parts = [*chat["start"], "Hi", *chat["answer"], "red cat", *chat["next"], "why", *chat["answer"]]
    texts = []
    for is_text, found in itertools.groupby(parts, lambda part: isinstance(part, str)):
        group = list(found)
        texts += ["".join(group)] if is_text else group  # neighbouring texts are one text
    given = [text for text in texts if text != ""]
    assert list(runner.encode(given)) == tokenizer.render(messages, add_generation_prompt=True)[0]
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert chat_parts(tokenizer) is None


def ran(folder, *words, **options):
    command = [sys.executable, folder / "run.py", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.parametrize("damage", ["cut", "flip", "json", "gone"])
def test_a_damaged_export_is_refused_in_one_line(exports, tmp_path, damage):
    shutil.copytree(exports["dense"][1], tmp_path / "bad")
    path, data = tmp_path / "bad" / "model.onnx", (tmp_path / "bad" / "model.onnx").read_bytes()
    if damage == "json":
        (tmp_path / "bad" / "export.json").write_text(json.dumps({"layers": 2}))
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:1000] if damage == "cut" else data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    done = ran(tmp_path / "bad", "--prompt=the")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "damaged" in done.stderr, done.stderr


@pytest.mark.parametrize("end", ["\n", ""], ids=["empty line", "Ctrl-D"])
def test_the_exported_program_chats(exports, end):
    done = ran(exports["dense"][1], "--max_new_tokens=5", "--temperature=0", input="the red cat\nsees a dog\n" + end)
    assert done.returncode == 0 and done.stdout.count("> ") == 3, done.stderr


REFUSED = """--to=onnx --dtype=bfloat16 | ^--dtype=bfloat16 is not possible with --to=onnx
--to=transformers --dtype=int8 | ^--dtype=int8 is not possible with --to=transformers
--web=x | ^--web is of use with --to=onnx only
--to=onnx --web=nowhere | ^--web=nowhere must be the folder dist of onnxruntime-web"""


@pytest.mark.parametrize("case", REFUSED.splitlines())
def test_what_cannot_be_exported_is_refused(exports, tmp_path, case):
    source = str(exports["dense"][0])
    assert_refused(lambda folder, *words: convert.main([source, str(folder), *words]), tmp_path / "new", case)


def web_folder():
    """The folder dist of the npm package onnxruntime-web, which .ci/run installs."""
    return Path(os.environ.get("ONNXRUNTIME_WEB", "out/npm/node_modules/onnxruntime-web/dist"))


@pytest.mark.skipif(not (web_folder() / WEB[0]).is_file(), reason="onnxruntime-web is not installed (npm)")
@pytest.mark.skipif(not Path(CHROMIUM).is_file(), reason=f"there is no {CHROMIUM}")
def test_the_page_answers_as_the_engine_does(exports, tmp_path):
    """In a browser at phone width: the greedy answer beyond the window, with no request to another host."""
    from playwright.sync_api import sync_playwright

    source, export = exports["moe"]
    shutil.copytree(export, tmp_path / "page")
    for name in WEB:
        shutil.copy(web_folder() / name, tmp_path / "page" / name)
    model, tokenizer = load_model(source)
    ids, _ = tokenizer.render([{"role": "user", "content": "the red cat"}], add_generation_prompt=True)
    request = Request(ids, 512, temperature=0, stop_ids=[tokenizer.eos_id])
    Engine(model, vocab_size=tokenizer.vocab_size).generate([request])
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "page")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking --disable-component-update"
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags.split())
        page, asked = browser.new_page(viewport=dict(width=360, height=640)), set()
        page.on("request", lambda request: asked.add(request.url.split("/")[2]))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_function("document.getElementById('status').textContent == 'ready'")
        page.fill("#temperature", "0")
        page.fill("#text", "the red cat")
        page.press("#text", "Enter")
        page.wait_for_function("document.getElementById('send').textContent == 'Send'")
        answer = tokenizer.decode(request.tokens, skip_special=True)
        assert page.evaluate("document.querySelector('#log .model').textContent") == answer
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert asked == {f"127.0.0.1:{server.server_port}"}
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=Path(folder, "local.png"))
        browser.close()
        server.shutdown()
