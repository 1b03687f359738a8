"""The pictures of the chat page in docs/, taken from the real server and a model of the built-in stories:

python tests/screenshots.py out/stories-chat
"""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from nanodoge import stories  # noqa: E402, after the path

CHROMIUM = Path("/usr/bin/chromium")
ARGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()


@contextlib.contextmanager
def serving(checkpoint, *options):
    """Within it serve.py serves the checkpoint; gives (address, process)."""
    argv = [sys.executable, str(HERE / "serve.py"), str(checkpoint), "--port=0", *options]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=HERE) as server:
        try:
            yield re.search(r"http://[\w.:\[\]]+", server.stdout.readline())[0], server
        finally:
            server.kill()


def ask(page, text):
    """Sends a message and waits for the end of the answer."""
    page.fill("#input", text)
    page.keyboard.press("Enter")
    page.locator("article:last-child small", has_text="tokens").wait_for()


def main(checkpoint: str) -> None:
    from playwright.sync_api import sync_playwright

    question = stories.conversation(2, "test")["messages"][0]["content"]
    wide, phone, docs = dict(width=1000, height=680), dict(width=390, height=760), HERE / "docs"
    docs.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        for window in (0, 64):
            with serving(checkpoint, f"--keep_window_size={window}") as (address, _):
                page = browser.new_context(viewport=wide).new_page()
                page.goto(address)
                page.locator("#start p").first.wait_for()
                if not window and page.locator("blockquote").count():  # what the server says the model answers right
                    question = page.locator("blockquote").inner_text()
                ask(page, question)
                page.locator("#input").blur()
                if window:
                    page.click("#keep")
                    page.wait_for_selector("#tokens span")
                    page.screenshot(path=docs / "kept.png")
                    continue
                page.screenshot(path=docs / "chat.png")
                page.emulate_media(color_scheme="dark")
                page.set_viewport_size(phone)
                page.evaluate("document.querySelector('#view').scrollTop = 1e6")
                page.screenshot(path=docs / "chat-phone.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
