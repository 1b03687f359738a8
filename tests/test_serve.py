"""serve.py: real clients (openai, langchain, curl, lm_eval), and everything a client can do wrong."""

import asyncio
import contextlib
import importlib
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import make_checkpoint, texts

from nanodoge.checkpoint import load_model, save_checkpoint
from nanodoge.engine import Engine, Request

for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is optional")
httpx, openai = (pytest.importorskip(package, reason=f"{package} is optional") for package in ("httpx", "openai"))
serve, api = pytest.importorskip("serve"), pytest.importorskip("nanodoge.api")
split_thoughts = api.split_thoughts

HELLO = [{"role": "user", "content": "the red cat sees"}]


@contextlib.contextmanager
def served(checkpoint, *argv):
    """Within it a server listens; gives its service, with the address as `url`."""
    options = serve.parsing.parse_options(serve.ServeOptions, [str(checkpoint), *argv], positional="checkpoint")
    service = serve.load_service(options)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        service.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = service.server = serve.Server(service)
        threads = [threading.Thread(target=server.run, args=([listening],)), threading.Thread(target=service.run)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.started)
        yield service
        if not server.should_exit:
            server.handle_exit(signal.SIGTERM, None)
        for thread in threads:
            thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    return make_checkpoint(folder, max_position_embeddings=128, initializer_range=0.3)


@pytest.fixture(scope="module")
def service(checkpoint):
    with served(checkpoint, "--slots=4", "--max_queue=20", "--patience=1", "--temperature=0") as service:
        yield service


@pytest.fixture
def client(service):
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def post(service):
    def post(path, body=None, **options):
        return httpx.post(service.url + path, timeout=30, **(options or dict(json=body)))

    return post


def connect(service, body=None, buffer=0):
    """A socket of a client that has sent this body, if any, to /v1/completions. buffer: of what it receives."""
    client = socket.socket()
    client.settimeout(20)
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect(("127.0.0.1", int(service.url.rpartition(":")[2])))
    if body:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        data = json.dumps(body)
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
    return client


def alone(checkpoint, ids, new, **options):
    """The text that the engine writes for one request."""
    model, tokenizer = load_model(checkpoint)
    request = Request(ids, new, stop_ids=[tokenizer.eos_id], **dict(temperature=0.0) | options)
    Engine(model, tokenizer=tokenizer).generate([request])
    return request


# ---------------------------------------------------------------------------------------------------------------------
# Clients


def test_openai_client_chats(client, checkpoint):
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    reply = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=9, tools=[], user="me")
    ids, _ = load_model(checkpoint)[1].render(HELLO, add_generation_prompt=True)
    wanted = alone(checkpoint, ids, 9)
    assert reply.choices[0].message.content == split_thoughts(wanted.text.text, True)[1]
    assert reply.choices[0].finish_reason == wanted.finish_reason
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), len(wanted.tokens))
    parts = [{"role": "user", "content": [{"type": "text", "text": "the red "}, {"type": "text", "text": "cat sees"}]}]
    long = dict(model="x", messages=parts, max_tokens=9, user="me" * 10_000)  # is encoded in another thread
    assert client.chat.completions.create(**long).choices == reply.choices


def test_openai_client_streams(client, service):
    common = dict(model="tiny", messages=HELLO, max_tokens=9, temperature=1.0, seed=3)
    whole = client.chat.completions.create(**common)
    chunks = list(client.chat.completions.create(**common, stream=True, stream_options=dict(include_usage=True)))
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage.model_copy(
        update=dict(prompt_tokens_details=chunks[-1].usage.prompt_tokens_details)
    )
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [c.finish_reason for c in choices] == [None] * (len(choices) - 1) + [whole.choices[0].finish_reason]
    assert choices[0].delta.role == "assistant"
    body = dict(common, stream=True)
    lines = httpx.post(f"{service.url}/v1/chat/completions", json=body).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]" and '"usage"' not in lines[-2]


def test_openai_client_many_choices_stops_and_logprobs(client, checkpoint):
    request = dict(model="tiny", prompt=["the cat", "a dog"], max_tokens=8)
    both = client.completions.create(**request, n=2, logprobs=2, extra_body=dict(ignore_eos=True))
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text != both.choices[2].text
    tokens = both.choices[0].logprobs
    assert len(tokens.tokens) == len(tokens.token_logprobs) == 8 and tokens.token_logprobs[0] < 0
    assert all(x == max(top.values()) for x, top in zip(tokens.token_logprobs, tokens.top_logprobs, strict=True))
    text = both.choices[2].text
    stopped = client.completions.create(model="tiny", prompt="a dog", max_tokens=8, stop=["never", text[3:6]])
    assert stopped.choices[0].text == text.partition(text[3:6])[0] and stopped.choices[0].finish_reason == "stop"
    ids = [0, *load_model(checkpoint)[1].encode("the cat")]
    echo = client.completions.create(model="tiny", prompt=[ids], max_tokens=0, echo=True, logprobs=1).choices[0]
    assert echo.text == "<|begin_of_text|>the cat" and len(echo.logprobs.tokens) == len(ids)
    assert echo.logprobs.token_logprobs[0] is None and echo.logprobs.text_offset[:2] == [0, 17]
    chat = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2)
    first = chat.choices[0].logprobs.content[0]
    assert first.logprob == first.top_logprobs[0].logprob and len(first.top_logprobs) == 2
    assert bytes(first.bytes).decode(errors="replace") in (first.token, "\ufffd")


def test_tokens_in_logprobs_differ_and_half_characters_are_bytes(checkpoint):
    coder = load_model(checkpoint)[1]
    names = {api.token_text(coder, id) for id in range(coder.vocab_size)}
    assert len(names) == coder.vocab_size and "bytes:\\xff" in names


def test_async_client_and_many_at_once(service, checkpoint):
    """Each of many greedy texts is that of the request alone."""
    prompts = texts(16, seed=9)

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
            asked = [client.completions.create(model="tiny", prompt=prompt, max_tokens=12) for prompt in prompts[1:]]
            first = await client.completions.create(model="tiny", prompt=prompts[0], max_tokens=12, stream=True)
            replies = await asyncio.gather(*asked)
            streamed = "".join([chunk.choices[0].text async for chunk in first])
            return [streamed, *(reply.choices[0].text for reply in replies)]

    model, tokenizer = load_model(checkpoint)
    wanted = [alone(checkpoint, [0, *tokenizer.encode(prompt)], 12).text.text for prompt in prompts]
    assert asyncio.run(ask()) == wanted


def test_the_next_turn_reads_only_what_is_new(client):
    messages = [{"role": "user", "content": " ".join(texts(3, seed=4))[:150]}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5)
    again = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5)
    assert again.choices == first.choices
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1


def test_errors_are_openai_errors(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(model="tiny", input="a")
    assert error.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt="the cat " * 200)
    assert error.value.code == "context_length_exceeded" and "128" in error.value.message
    for name, value in (("tools", [{"type": "function"}]), ("logit_bias", {"5": 1}), ("functions", [{"name": "f"}])):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="tiny", messages=HELLO, extra_body={name: value})
        assert error.value.param == name
    wrong = httpx.get(f"{client.base_url}completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=3)
    assert error.value.param == "temperature"


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.9, top_p=0.7),
        dict(temperature=1.5, top_k=5),
        dict(temperature=1.0, min_p=0.2),
        dict(frequency_penalty=1.5, presence_penalty=0.5),
        dict(repetition_penalty=1.3),
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_sampling_reach_the_engine(post, checkpoint, options):
    ids, options = [0, 300, 301], dict(top_p=0.95, seed=5) | options
    reply = post("/v1/completions", dict(prompt=ids, max_tokens=20) | options).json()
    assert reply["choices"][0]["text"] == alone(checkpoint, ids, 20, **options).text.text


def test_without_max_tokens_a_reply_goes_up_to_the_context_or_to_a_stop_text(post):
    body = dict(prompt="a", ignore_eos=True)
    whole = post("/v1/completions", body).json()
    text = whole["choices"][0]["text"]
    assert whole["usage"]["total_tokens"] == 128 and whole["choices"][0]["finish_reason"] == "length"
    [cut] = post("/v1/completions", body | dict(stop=text[9:12])).json()["choices"]
    assert (cut["text"], cut["finish_reason"]) == (text.partition(text[9:12])[0], "stop")


def test_langchain(service):
    ChatOpenAI = pytest.importorskip("langchain_openai", reason="langchain-openai is optional").ChatOpenAI
    model = ChatOpenAI(base_url=f"{service.url}/v1", api_key="any", model="tiny", max_tokens=6, temperature=0)
    reply = model.invoke([("system", "be short"), ("human", "the red cat sees")])
    assert reply.content and reply.usage_metadata["output_tokens"] <= 6
    streamed = list(model.stream([("system", "be short"), ("human", "the red cat sees")]))
    assert "".join(chunk.content for chunk in streamed) == reply.content


def test_the_line_that_is_printed_works_in_a_shell_and_sigterm_lets_a_reply_end(checkpoint, tmp_path):
    argv = [sys.executable, "serve.py", str(checkpoint), "--port=0", "--slots=1", "--max_queue=0"]
    root = Path(serve.__file__).parent
    process = subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        url = re.search(r"http://[\d.:]+", lines[0]).group()
        command = lines[1].replace("{", '{"max_tokens": 3, ', 1)
        done = subprocess.run(
            command.replace("curl", "curl -s"), shell=True, capture_output=True, text=True, timeout=30
        )
        assert json.loads(done.stdout)["usage"]["completion_tokens"] <= 3
        body = dict(prompt="the cat", max_tokens=120, stream=True, temperature=2)
        with httpx.Client(timeout=30) as client, client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            chunks = reply.iter_lines()
            next(chunks)
            process.send_signal(signal.SIGTERM)
            assert [line for line in chunks if line][-1] == "data: [DONE]"
        assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_a_second_signal_cuts_replies_without_a_traceback(checkpoint, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "disabled", False)
    with served(checkpoint, "--slots=2") as service, httpx.Client(timeout=30) as client:
        step = service.engine.step
        service.engine.step = lambda: time.sleep(0.05) or step()
        body = dict(prompt="the cat", max_tokens=100, stream=True)
        with pytest.raises(httpx.RemoteProtocolError):
            with client.stream("POST", f"{service.url}/v1/completions", json=body) as reply:
                chunks = reply.iter_lines()
                next(chunks)
                service.server.handle_exit(signal.SIGINT, None)
                service.server.handle_exit(signal.SIGINT, None)
                assert "data: [DONE]" not in list(chunks)
    assert "Traceback" not in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What a server must bear


BAD = [  # what the error says, body
    ("parsing the body", b'{"prompt": "\xff\xfe"}'),
    ("JSON decode error", b"{"),
    ("parsing the body", b"[" * 100000),
    ("parsing the body", b'{"max_tokens": ' + b"1" * 5000 + b"}"),
    ("a valid dictionary", b"[]"),
    ("a finite number", b'{"prompt": "a", "temperature": NaN}'),
    ("at most 16 items", dict(prompt="a", stop=["x"] * 10_000)),
    ("at most 128 characters", dict(prompt="a", stop="x" * 1000)),
    ("from 1 to 24 continuations", dict(prompt=[])),
    ("from 1 to 24 continuations", dict(prompt=["a"] * 100)),
    ("the prompt has 0 tokens", dict(prompt=[[]])),
    ("token id 1000000000 is not", dict(prompt=[5, 10**9])),
    ("token id -1 is not", dict(prompt=[5, -1])),
    ("greater than or equal to 1", dict(prompt="a", n=0)),
    ("response_format is not", dict(prompt="a", response_format={"type": "json_object"})),
]
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("words, body", BAD, ids=[f"{words} {i}" for i, (words, _) in enumerate(BAD)])
def test_bad_bodies_and_fields_get_400(post, words, body):
    reply = post("/v1/completions", content=body if isinstance(body, bytes) else json.dumps(body), headers=JSON)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
    assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize("content", [b" " * 100_000_000, [b" " * 900_000] * 5], ids=["at once", "in pieces"])
def test_large_bodies_get_413(post, content):
    reply = post("/v1/completions", content=content if isinstance(content, bytes) else iter(content), headers=JSON)
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "too_large"


def test_half_a_character_is_read_as_the_replacement_character(post):
    reply = post("/v1/completions", content=b'{"prompt": "\\ud800", "max_tokens": 1}', headers=JSON)
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("sent", [b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"])
def test_a_slow_client_gets_408(service, sent):
    with connect(service) as slow:
        slow.sendall(sent.replace(b"\r\n", b"\r\nHost: localhost\r\nContent-Type: application/json\r\n", 1))
        received = slow.recv(10000)
        assert received.startswith(b"HTTP/1.1 408") and b"close" in received.lower()


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_frees_its_slot_and_its_place_in_the_queue(checkpoint, streams):
    with served(checkpoint, "--slots=1", "--max_queue=1") as service:
        engine, may_go_on = service.engine, threading.Event()
        step = engine.step
        engine.step = lambda: may_go_on.wait(0.02) and step() or step()  # so that 100 tokens take two seconds
        clients = [connect(service, dict(prompt="the cat", max_tokens=100, stream=streams)) for _ in range(2)]
        wait_for(lambda: engine.live and engine.waiting)
        full = httpx.post(f"{service.url}/v1/completions", json=dict(prompt="a"))
        assert full.status_code == 429 and full.headers["Retry-After"] == "1"
        running = engine.live[0]
        for client in clients:
            client.close()
        wait_for(lambda: service.pending == 0 and not engine.live and not engine.waiting)
        assert running.finish_reason == "cancelled" and len(running.tokens) < 100
        may_go_on.set()
        assert httpx.post(f"{service.url}/v1/completions", json=dict(prompt="a", max_tokens=2)).status_code == 200


def test_a_client_that_reads_nothing_is_left(checkpoint, monkeypatch):
    """Its connection is closed after --patience, and its place is free."""
    with served(checkpoint, "--patience=0.2", "--slots=1", "--max_queue=0") as service:
        protocol = service.server.config.http_protocol_class
        made = protocol.connection_made

        def without_buffers(self, transport):
            made(self, transport)
            transport.set_write_buffer_limits(0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

        monkeypatch.setattr(protocol, "connection_made", without_buffers)
        body = dict(prompt="a", max_tokens=100, logprobs=20, stream=True, ignore_eos=True)
        with connect(service, body, buffer=1):
            wait_for(lambda: service.pending == 1)
            wait_for(lambda: service.pending == 0)
        assert httpx.post(f"{service.url}/v1/completions", json=dict(prompt="a", max_tokens=2)).status_code == 200


def test_a_reply_that_takes_too_long_gets_504(checkpoint):
    with served(checkpoint, "--timeout=0.001") as service:
        body = dict(prompt="a", max_tokens=100)
        assert httpx.post(f"{service.url}/v1/completions", json=body).status_code == 504


def test_damaged_weights_get_503_and_the_server_stays(checkpoint, capfd):
    with served(checkpoint) as service:
        weight = service.engine.model.norm.weight
        kept = weight.detach().clone()
        weight.data[0] = float("nan")
        assert httpx.post(f"{service.url}/v1/completions", json=dict(prompt="a")).status_code == 503
        weight.data.copy_(kept)
        assert httpx.post(f"{service.url}/v1/completions", json=dict(prompt="a", max_tokens=2)).status_code == 200
    assert "its weights are damaged" in capfd.readouterr().err


def test_the_key_is_needed_everywhere_but_for_health(checkpoint):
    with served(checkpoint, "--api_key=sesame", "--cors_origin=https://friend.example") as service:
        paths = ["/", "/metrics", "/v1/models", "/v1/nanodoge/info", "/openapi.json", "/tokenizer_info", "/nothing"]
        for path in paths:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic %%%"}):
                reply = httpx.get(service.url + path, headers=headers)
                assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        assert httpx.post(f"{service.url}/v1/completions", json=dict(prompt="a")).status_code == 401
        assert httpx.get(f"{service.url}/health").status_code == 200
        good = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{service.url}/v1/models", headers=good).status_code == 200
        assert httpx.get(f"{service.url}/v1/models", auth=("anybody", "sesame")).status_code == 200  # a browser
        for origin, allowed in (("https://friend.example", True), ("https://other.example", False)):
            reply = httpx.get(f"{service.url}/v1/models", headers=good | {"Origin": origin})
            assert ("access-control-allow-origin" in reply.headers) == allowed


@pytest.mark.parametrize("listens", ["127.0.0.1", "box.example", "0.0.0.0"])
def test_hosts_that_are_ours(service, listens):
    """DNS rebinding: a page of another host, whose name leads to this machine, could use the API."""
    options = serve.ServeOptions(host=listens)
    for host in ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", listens]:
        assert serve.refusal(options, "/", {b"host": host.encode()}) is None
    for host in [b"other.example", b"other.example:80", b"localhost.other", b"\xff"]:
        assert bool(serve.refusal(options, "/", {b"host": host})) == (listens != "0.0.0.0")
    reply = httpx.get(f"{service.url}/v1/models", headers={"Host": "other.example"})
    assert reply.status_code == 403 and reply.json()["error"]["code"] == "wrong_host"


def test_without_cors_origin_no_page_of_another_origin_gets_anything(service, post):
    headers = {"Origin": "https://other.example", "Access-Control-Request-Method": "POST"}
    for reply in (
        httpx.get(f"{service.url}/v1/models", headers=headers),
        httpx.options(f"{service.url}/v1/completions", headers=headers),
    ):
        assert not any(name.startswith("access-control") for name in reply.headers)
    simple = post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert simple.status_code == 400  # what a form of another page can send is not read


# ---------------------------------------------------------------------------------------------------------------------
# Our own endpoints


def test_info_metrics_tokenize(service, post):
    info = httpx.get(f"{service.url}/v1/nanodoge/info").json()
    assert info["context"] == 128 and info["layers"] == 2 and info["chat"] and info["defaults"]["temperature"] == 0
    tokens = post("/tokenize", dict(prompt="the cat<|end_of_text|>")).json()["tokens"]
    assert tokens[0] == 0 and tokens[-1] == 1
    assert post("/detokenize", dict(tokens=tokens[1:-1])).json() == dict(prompt="the cat")
    assert post("/detokenize", dict(tokens=[10**6])).status_code == 400
    metrics = httpx.get(f"{service.url}/metrics").text
    for line in metrics.splitlines():
        assert re.fullmatch(r'# TYPE \w+ (gauge|counter)|\w+(\{status="\d+"\})? \d+', line)
    assert "nanodoge_slots 4\n" in metrics


def test_kept_counts_what_the_cache_holds(checkpoint):
    messages = [dict(role="user", content=" ".join(texts(9))[:200]), dict(role="assistant", content="the red cat")]
    with served(checkpoint, "--keep_window_size=20") as service:
        asked = [dict(messages=messages, layer=layer) for layer in (None, 0, 1)]
        whole, *layers = [httpx.post(f"{service.url}/v1/nanodoge/kept", json=body).json() for body in asked]
        refused = httpx.post(f"{service.url}/v1/nanodoge/kept", json=dict(messages=messages, layer=2))
    model, tokenizer = load_model(checkpoint)
    ids, _ = tokenizer.render(messages)
    assert "".join(whole["tokens"]) == tokenizer.decode(ids) and len(whole["kept"]) == len(whole["next"]) == len(ids)
    assert (whole["possible"], sum(whole["kept"]), sum(whole["next"])) == (2, 40, 2) and refused.status_code == 400
    for layer, part in enumerate(layers):
        assert (part["layer"], part["possible"], sum(part["kept"]), sum(part["next"])) == (layer, 1, 20, 1)
        assert all(kept >= following for kept, following in zip(part["kept"], part["next"], strict=True))
    assert [sum(pair) for pair in zip(*(part["kept"] for part in layers), strict=True)] == whole["kept"]


def test_thoughts_are_apart_and_tags_never_shown():
    text = "<|begin_of_thought|>\n1 + 1\n<|end_of_thought|>\n\n<|begin_of_solution|>\n2\n<|end_of_solution|>"
    assert split_thoughts(text, True) == ("1 + 1\n", "2\n") and split_thoughts("a <b", True) == ("", "a <b")
    shown = [split_thoughts(text[:n], n == len(text)) for n in range(len(text) + 1)]
    for before, after in zip(shown, shown[1:], strict=False):
        assert all(b.startswith(a) for a, b in zip(before, after, strict=True))


def test_thoughts_of_a_reply_are_its_reasoning_content(service, client, monkeypatch):
    text = "<|begin_of_thought|>1 + 1<|end_of_thought|><|begin_of_solution|>2<|end_of_solution|>"

    def feed(self, id):  # a model that writes this text, a character a token
        self.text = text[: len(self.text) + 1]

    monkeypatch.setattr("nanodoge.engine.TextStream.feed", feed)
    common = dict(model="tiny", messages=HELLO, max_tokens=len(text), extra_body=dict(ignore_eos=True))
    message = client.chat.completions.create(**common).choices[0].message
    assert (message.reasoning_content, message.content) == ("1 + 1", "2")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**common, stream=True)]
    for name, wanted in (("reasoning_content", "1 + 1"), ("content", "2")):
        assert "".join(getattr(chunk.delta, name, None) or "" for chunk in chunks) == wanted
    assert chunks[-1].finish_reason == "length"


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be served gets one line and exit status 2


def test_a_classifier_is_not_served(checkpoint, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path, *load_model(checkpoint, labels=("good", "bad")))
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        serve.parsing.run_command(serve.main)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "is a classifier of good, bad" in message and message.count("\n") == 1


def test_without_uvicorn_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "serve")
    with pytest.raises(SystemExit) as end:
        importlib.import_module("serve")
    assert end.value.code == 2 and "pip install fastapi uvicorn" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# lm_eval, schemathesis


def test_lm_eval_scores_through_the_api_as_evaluate_does(service, checkpoint, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is optional")
    from lm_eval.evaluator import simple_evaluate

    import evaluate

    words = texts(60, seed=3)
    rows = [dict(goal=words[3 * i], sols=words[3 * i + 1 : 3 * i + 3], label=i % 2) for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  cache_dir: {tmp_path}\n  data_files: {{test: {tmp_path}/rows.jsonl}}\n"
    )
    metric = "metric_list: [{metric: %s, aggregation: mean, higher_is_better: true}]\n"
    asks = 'test_split: test\ndoc_to_text: "Question: {{goal}}\\nAnswer:"\n'
    choose = f"task: choose\n{common}{asks}output_type: multiple_choice\ndoc_to_choice: sols\ndoc_to_target: label\n"
    (tmp_path / "choose.yaml").write_text(choose + metric % "acc")
    until = 'generation_kwargs: {until: [" t"], do_sample: false, max_gen_toks: 8}\n'
    write = f'task: write\n{common}{asks}output_type: generate_until\ndoc_to_target: "{{{{sols[0]}}}}"\n{until}'
    (tmp_path / "write.yaml").write_text(write + metric % "exact_match")
    manager = evaluate.find_tasks(["choose", "write"], str(tmp_path))

    def scored(model, tasks, **options):
        found = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)["samples"]
        return {task: [sample["filtered_resps"] for sample in found[task]] for task in tasks}

    ours = scored(evaluate.harness_model(*load_model(checkpoint)), ["choose", "write"])
    common = f"model=tiny,num_concurrent=2,max_retries=1,max_length=128,base_url={service.url}/v1"
    local = f"{common}/completions,tokenizer={checkpoint},tokenizer_backend=huggingface,add_bos_token=True"
    theirs = scored("local-completions", ["choose", "write"], model_args=local)
    assert theirs["write"] == ours["write"]
    for mine, its in zip(ours["choose"], theirs["choose"], strict=True):
        assert [greedy for _, greedy in its] == [greedy for _, greedy in mine]
        assert [x for x, _ in its] == pytest.approx([x for x, _ in mine], abs=1e-4)
    chat = scored(
        "local-chat-completions", ["write"], model_args=f"{common}/chat/completions", apply_chat_template=True
    )
    assert len(chat["write"]) == 12


def test_schemathesis_finds_no_fault(service):
    """tests/load.py --cases=2000 runs more of them."""
    pytest.importorskip("schemathesis", reason="schemathesis is optional")
    from load import try_schema

    assert try_schema(service.url, cases=40) >= 40
