"""The chat page in a real browser (headless Chromium): what a visitor does, and what a hostile model tries.

Most tests run against a small server written here, which says what a test asks it to, and remembers what it was asked.
"""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import make_checkpoint
from screenshots import ARGS, CHROMIUM, ask, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if not CHROMIUM.exists():
    pytest.skip(f"there is no {CHROMIUM}", allow_module_level=True)
PAGE = Path(__file__).parent.parent / "nanodoge" / "web" / "chat.html"
expect = sync_api.expect

HOSTILE = """<script>document.title = 'owned'</script> <img src=x onerror="document.title = 'owned'">
<a href="javascript:document.title='owned'">a</a> [link](javascript:document.title='owned')
![picture](http://other.test/pixel.png)

```html
<script>document.title = 'owned'</script>
```
- <svg onload="document.title='owned'">"""
MARKDOWN = (
    "# Head\n\nOne *two* **three** `four` [five](https://a.test/b)\n\n- six\n  - seven\n- eight\n\n```python\nx = 1\n"
)
BLOCKS = """3. nine
4. ten

> quoted *one*
> <b>two</b>

Head | <i>Cost</i>
---|:--:
`a` | [5](https://a.test/c)
[x](javascript:alert(1)) | <img src=x onerror="document.title='owned'">"""
INFO = dict(model="tiny", context=256, window=8, layers=2, kv_heads=1, chat=True)
INFO |= dict(defaults=dict(temperature=0.7, top_p=0.95, max_tokens=100))
REPLIES = {"html": HOSTILE, "markdown": MARKDOWN, "blocks": BLOCKS, "slow": "word " * 2000}


class Stub(BaseHTTPRequestHandler):
    """Answers the keys of REPLIES with the texts above, and anything else with the same text in capitals."""

    def send(self, body, status=200, kind="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self):
        good = not self.server.key or self.headers.get("Authorization") == f"Bearer {self.server.key}"
        if not good:
            self.send(dict(error=dict(message="a key is needed")), 401)
        return good

    def do_GET(self):
        if self.path == "/":
            self.send(PAGE.read_bytes(), kind="text/html; charset=utf-8")
        elif self.path == "/v1/nanodoge/info":
            if self.allowed():
                self.send(INFO)
        else:
            self.send(dict(error=dict(message="not found")), 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.server.asked.append((self.path, body))
        said = body["messages"][-1]["content"]
        if self.path == "/v1/nanodoge/kept":
            tokens = [piece + " " for message in body["messages"] for piece in message["content"].split()]
            left = [max(0, min(2, 2 - (len(tokens) - i) // 8)) for i in range(len(tokens))]
            next_ = [int(i == next((j for j, n in enumerate(left) if n), -1)) for i in range(len(tokens))]
            names = dict(object="nanodoge.kept", window=8, layers=2, kv_heads=1, layer=body["layer"], possible=2)
            self.send(names | dict(tokens=tokens, kept=left, next=next_))
        elif said == "full":
            self.send(dict(error=dict(message="the queue is full")), 429)
        else:
            self.stream(REPLIES.get(said, said.upper()), said)

    def stream(self, text, said):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        pieces = [(dict(reasoning_content="hm "), None)] * (said == "think")
        pieces += [(dict(content=text[i : i + 5]), None) for i in range(0, len(text), 5)] + [({}, "stop")]
        try:
            for delta, reason in pieces:
                chunk = dict(choices=[dict(index=0, delta=delta, finish_reason=reason)])
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                time.sleep(0.02 if said == "slow" else 0)
            self.wfile.write(b'data: {"choices":[],"usage":{"completion_tokens":7}}\n\ndata: [DONE]\n\n')
        except OSError:
            self.server.left.set()  # the browser has gone

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A fresh visitor, who has opened the page. At the end: nothing was asked of another host, and no script failed."""
    server.asked, server.key, server.left = [], "", threading.Event()
    context, wrong = browser.new_context(viewport=dict(width=1100, height=800)), []
    page, home = context.new_page(), f"http://127.0.0.1:{server.server_port}/"
    page.set_default_timeout(5000)
    page.on("request", lambda request: request.url.startswith((home, "data:", "blob:")) or wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(home)
    expect(page.locator("#model")).to_have_text("tiny")
    yield page
    assert wrong == [] and page.title() == "nanoDoge"
    context.close()


def send(page, text):
    page.fill("#input", text)
    page.keyboard.press("Enter")


def texts(page):
    return page.locator("#log .text").all_inner_texts()


def answered(page, *expected):
    """Waits until the conversation is this, and complete."""
    expect(page.locator("#log .text")).to_have_text(expected)
    expect(page.locator("#send")).to_have_text("Send")


def test_send_edit_again_and_reload(page, server):
    send(page, "hello there")
    answered(page, "hello there", "HELLO THERE")
    assert re.search(r"^7 tokens( · \d+ tokens/s)? · first after \d", page.locator("article small").last.inner_text())
    send(page, "and more")
    answered(page, "hello there", "HELLO THERE", "and more", "AND MORE")
    assert [m["role"] for m in server.asked[-1][1]["messages"]] == ["user", "assistant", "user"]
    page.get_by_role("button", name="Answer again").click()
    answered(page, "hello there", "HELLO THERE", "and more", "AND MORE")
    assert len(server.asked) == 3 and server.asked[1] == server.asked[2]
    page.get_by_role("button", name="Edit").first.click()
    assert page.input_value("#input") == "hello there"
    send(page, "other")
    answered(page, "other", "OTHER")
    page.reload()
    answered(page, "other", "OTHER")
    assert not {"temperature", "top_p", "max_tokens"} & server.asked[-1][1].keys()  # the server's defaults hold


def test_stop_ends_the_answer_at_the_server_too(page, server):
    send(page, "slow")
    expect(page.locator("#log .text").last).to_contain_text("word word")
    assert page.locator("#send").inner_text() == "Stop"
    page.click("#send")
    expect(page.locator("article small").last).to_contain_text("stopped")
    assert server.left.wait(5) and len(texts(page)[-1]) < 9000
    send(page, "go on")
    expect(page.locator("#log .text").last).to_have_text("GO ON")


def test_conversations_are_kept_deleted_exported_and_imported(page, tmp_path):
    send(page, "first")
    answered(page, "first", "FIRST")
    page.click("#new")
    page.click("#gear")
    page.fill("#system", "Be kind.")
    page.click("#close")
    send(page, "second")
    answered(page, "second", "SECOND")
    expect(page.locator("#list li")).to_have_count(2)
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "chats.jsonl")
    rows = [json.loads(line)["messages"] for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert sorted(len(row) for row in rows) == [2, 3] and max(rows, key=len)[0] == dict(
        role="system", content="Be kind."
    )
    for _ in range(2):
        page.get_by_role("button", name="Delete").first.click()
    expect(page.locator("#list li")).to_have_count(0)
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('not json\n{"messages": [{"role": "wizard", "content": "x"}]}\n')
    page.set_input_files("#import", tmp_path / "chats.jsonl")
    expect(page.locator("#notice")).to_contain_text("2 conversations imported; 2 lines left out")
    page.locator("#list").get_by_text("second").click()
    answered(page, "second", "SECOND")
    assert page.input_value("#system") == "Be kind."


def test_a_model_that_writes_html_is_harmless(page, server):
    for said in ("html", HOSTILE):  # by the model, and by the user
        send(page, said)
        expect(page.locator("#send")).to_have_text("Send")
    assert page.locator("#log").locator("script, img, svg, iframe, [onerror], [href^=javascript]").count() == 0
    assert texts(page)[2] == HOSTILE and "<script>document.title" in page.locator("#log pre").first.inner_text()
    page.reload()
    assert page.locator("#log").locator("script, img, svg").count() == 0


def test_markdown_and_thoughts(page):
    send(page, "markdown")
    expect(page.locator("#send")).to_have_text("Send")
    text = page.locator("#log .assistant .text")
    for tag, words in dict(h3="Head", em="two", strong="three", a="five", pre="x = 1").items():
        assert text.locator(tag).inner_text().strip() == words
    assert text.locator("p code").inner_text() == "four" and text.locator("li li").inner_text() == "seven"
    assert text.locator("> ul > li").count() == 2 and text.locator("a").get_attribute("rel") == "noopener noreferrer"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy the code").click()
    page.wait_for_function("navigator.clipboard.readText().then((text) => text.trim() === 'x = 1')")
    send(page, "think")
    expect(page.locator("#log .text").last).to_have_text("THINK")
    assert page.locator("details").last.get_attribute("open") is None
    page.locator("summary").last.click()
    expect(page.locator("details div").last).to_have_text("hm ")


def test_tables_quotes_and_numbered_lists(page):
    send(page, "blocks")
    expect(page.locator("#send")).to_have_text("Send")
    text = page.locator("#log .assistant .text")
    assert text.locator("ol").get_attribute("start") == "3" and text.locator("ol li").all_inner_texts() == [
        "nine",
        "ten",
    ]
    assert text.locator("blockquote").inner_text() == "quoted one\n<b>two</b>"
    assert text.locator("blockquote em, td code, td a").all_inner_texts() == ["one", "a", "5"]
    assert text.locator("th").all_inner_texts() == ["Head", "<i>Cost</i>"]
    assert text.locator("tr").count() == 3 and text.locator("img, b, i, [href^=javascript]").count() == 0


def test_what_the_model_kept(page, server):
    send(page, "one two three four five six seven eight nine ten")
    expect(page.locator("#send")).to_have_text("Send")
    page.click("#keep")
    tokens = page.locator("#tokens span")
    expect(tokens).to_have_count(20)
    shades = tokens.evaluate_all("spans => spans.map(span => getComputedStyle(span).backgroundColor)")
    assert len(set(shades)) == 3 and shades[0] != shades[10] != shades[19]
    assert (
        "7 of 20 tokens are kept by all 2 caches of all layers, 8 by some, 5 by none"
        in page.locator("#summary").inner_text()
    )
    expect(page.locator("#evicted li")).to_have_text('"six "from 1')
    assert tokens.nth(5).get_attribute("class") == "heat next"
    assert tokens.nth(5).get_attribute("title") == "token 6: kept by 1 of 2"
    page.select_option("#layer", label="2")
    expect(page.locator("#summary")).to_contain_text("of layer 2,")
    assert server.asked[-1][1]["layer"] == 1


def test_sliders_and_errors(page, server):
    page.click("#gear")
    expect(page.locator("#temperature")).to_have_value("0.7")
    assert page.locator("label output").all_inner_texts() == ["0.7 (default)", "0.95 (default)", "100 (default)"]
    page.fill("#temperature", "0")
    send(page, "full")
    expect(page.locator("#notice")).to_have_text("the queue is full")
    assert server.asked[-1][1]["temperature"] == 0 and texts(page) == ["full"]
    server.key = "secret"
    send(page, "hello")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator("#log .text").last).to_have_text("HELLO")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_by_keyboard_alone(page):
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    answered(page, "hello", "HELLO")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    page.keyboard.type(" you")
    page.keyboard.press("Enter")
    answered(page, "hello you", "HELLO YOU")
    page.keyboard.press("Alt+r")
    answered(page, "hello you", "HELLO YOU")
    page.keyboard.press("Alt+k")
    expect(page.locator("#tokens span")).to_have_count(4)
    page.keyboard.press("Alt+k")
    page.keyboard.press("Alt+n")
    expect(page.locator("#log .text")).to_have_count(0)
    page.keyboard.type("slow")
    page.keyboard.press("Enter")
    expect(page.locator("#log .text").last).to_contain_text("word word")
    page.keyboard.press("Escape")
    expect(page.locator("article small").last).to_contain_text("stopped")
    seen = set()
    for _ in range(40):  # Tab reaches everything, and what has the focus shows it
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or page.evaluate("document.activeElement === document.body")
    assert {"new", "export", "pick", "menu", "keep", "theme", "gear", "input", "send"} <= seen
    names = page.evaluate("""[...document.querySelectorAll("button, input, textarea, select")].filter(node =>
        !(node.ariaLabel || node.textContent.trim() || node.labels?.length)).map(node => node.outerHTML)""")
    assert names == []  # everything has a name for a screen reader


def test_on_a_phone_nothing_is_cut_off(page):
    page.set_viewport_size(dict(width=360, height=640))
    page.reload()
    send(page, "markdown")
    expect(page.locator("#send")).to_have_text("Send")
    send(page, "x" * 300)
    expect(page.locator("#log .text").last).to_have_text("X" * 300)
    for opened in (None, "#keep", "#gear", "#close", "#menu"):
        if opened:
            page.click(opened)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("document.querySelector('#view').scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    assert (sum(map(int, before[4:-1].split(","))) < 300) == (scheme == "dark")
    page.click("#theme")
    page.reload()
    assert page.evaluate(ground) != before


def test_with_the_real_server(page, tmp_path):
    """Streaming, the kept view and a second turn, with serve.py and a small model of random weights."""
    pytest.importorskip("uvicorn", reason="serve.py needs fastapi and uvicorn")
    checkpoint = make_checkpoint(tmp_path / "model", max_position_embeddings=512)
    with serving(checkpoint, "--keep_window_size=16", "--device=cpu") as (address, _):
        home = page.context.new_page()
        home.goto(address)
        expect(home.locator("#model")).to_have_text("model")
        home.click("#gear")
        home.fill("#max_tokens", "30")
        for said in ("the red ball", "sees a cat"):
            ask(home, said)
            expect(home.locator("article small").last).to_contain_text("tokens")
        assert len(texts(home)) == 4
        home.click("#keep")
        expect(home.locator("#tokens .gone").first).to_be_visible()
        expect(home.locator("#evicted li").first).to_be_visible()
        assert "the red ball" in home.locator("#tokens").inner_text()
        shares = home.locator("#tokens span").evaluate_all("spans => spans.map(span => span.getAttribute('style'))")
        assert len(set(shares)) >= 2
        home.select_option("#layer", label="2")
        expect(home.locator("#summary")).to_contain_text("of layer 2,")
