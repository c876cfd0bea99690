"""P's SDK, method by method, against a real daemon; and what its original got wrong.

V is the Ollama-like manager; P is the on-demand proxy: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.client.site import Vllmd, wait_until
from vllmd import errors
from vllmd.client import (
    AsyncClient,
    Client,
    StreamFailed,
    TimedOut,
    Unreachable,
    VLLMProxyAsyncClient,
    VLLMProxyClient,
)

HELLO = [{"role": "user", "content": "Hello to all of you"}]


def test_P_the_names_and_the_signature() -> None:
    """Programs written for P find what they import: (base_url, api_key, timeout=300)."""
    for kind in (VLLMProxyClient, VLLMProxyAsyncClient):
        parameters = inspect.signature(kind).parameters
        assert list(parameters) == ["base_url", "api_key", "timeout"]
        assert parameters["timeout"].default == 300


def test_P_chat_completion_is_a_dict(vllmd: Vllmd) -> None:
    """The whole answer of OpenAI's API; the model is started on demand."""
    with Client(vllmd.url) as client:
        answer = client.chat_completion(model="org/tiny", messages=HELLO, max_tokens=3)
    assert answer["choices"][0]["message"]["content"] == "Hello to all"
    assert answer["usage"]["completion_tokens"] == 3


def test_P_chat_completion_stream_yields_text(vllmd: Vllmd) -> None:
    """Piece by piece, and the chunk with the usage, which has no choices, is no crash."""
    with Client(vllmd.url) as client:
        more = {"stream_options": {"include_usage": True}}
        pieces = list(client.chat_completion_stream(model="org/tiny", messages=HELLO, **more))
    assert "".join(pieces) == "Hello to all of you"
    assert len(pieces) > 1


def test_P_text_completion_and_embeddings(vllmd: Vllmd) -> None:
    """As named."""
    with Client(vllmd.url) as client:
        assert client.text_completion(model="org/tiny", prompt="once upon")["choices"][0]["text"]
        assert "".join(client.text_completion_stream(model="org/tiny", prompt="once upon a time"))
        vectors = client.embeddings(model="org/embed", input=["a", "b"])["data"]
    assert [len(each["embedding"]) for each in vectors] == [4, 4]


def test_P_rerank_and_score(vllmd: Vllmd) -> None:
    """V's kinds of models are within reach, too."""
    with Client(vllmd.url) as client:
        assert len(client.rerank("org/embed", "q", ["a", "b"])["results"]) == 2
        assert len(client.score("org/embed", "a", ["b", "c"])["data"]) == 2


def test_P_list_get_health(vllmd: Vllmd) -> None:
    """Every configured model is listed, loaded or not."""
    with Client(f"{vllmd.url}/v1/") as client:  # as the official client wants its address
        assert {"org/tiny", "org/embed"} <= {model["id"] for model in client.list_models()}
        assert client.get_model("org/tiny")["object"] == "model"
        assert client.health()["status"] == "ok"


def test_P_load_unload_and_the_other_verbs(vllmd: Vllmd) -> None:
    """Over the admin socket, each done when it returns."""
    with vllmd.client() as client:
        assert client.load_model("org/tiny").state == "running"
        assert client.sleep_model("org/tiny", 2).state == "sleeping_l2"
        assert client.wake_model("org/tiny").state == "running"
        assert client.pin_model("org/tiny").pinned is True
        assert client.pin_model("org/tiny", False).pinned is False
        assert client.lease_model("org/tiny", "me").leases == ("me",)
        assert client.release_model("org/tiny", "me").leases == ()
        assert client.unload_model("org/tiny")["state"] == "stopped"  # as earlier versions of the client had it
        assert {"start", "sleep", "wake", "stop"} <= {each.what for each in client.decisions("org/tiny")}
        assert {line.name for line in client.status().models} >= {"org/tiny"}
        assert client.drain_device(0).drained is True
        assert client.drain_device(0, False).drained is False
        assert client.reload().changed == ()


def test_P_the_async_client_does_the_same(vllmd: Vllmd) -> None:
    """The two clients share everything but the waiting."""

    async def use() -> tuple[str, str, int]:
        async with AsyncClient(vllmd.url) as client:
            answer = await client.chat_completion(model="org/tiny", messages=HELLO)
            pieces = [piece async for piece in client.chat_completion_stream(model="org/tiny", messages=HELLO)]
            return answer["choices"][0]["message"]["content"], "".join(pieces), len(await client.list_models())

    whole, streamed, count = asyncio.run(use())
    assert whole == streamed == "Hello to all of you"
    assert count >= 4


def test_P_the_async_client_raises_the_same(vllmd: Vllmd) -> None:
    """Typed errors there, too."""

    async def use() -> None:
        async with VLLMProxyAsyncClient(vllmd.url) as client:
            with pytest.raises(errors.UnknownModel):
                await client.get_model("nobody")
            with pytest.raises(StreamFailed):
                _ = [each async for each in client.chat_completion_stream("org/cut", HELLO)]

    asyncio.run(use())


def test_both_clients_have_the_same_methods() -> None:
    """What is added to one and forgotten in the other is found here."""

    def signatures(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(f).parameters) for name, f in found if not name.startswith("_")}

    theirs = signatures(AsyncClient)
    theirs.pop("aclose")
    assert signatures(Client) == theirs


def test_P_every_error_answer_has_its_class(vllmd: Vllmd) -> None:
    """The daemon's own classes come back, with what it said."""
    with Client(vllmd.url) as client:
        with pytest.raises(errors.UnknownModel, match="did you mean 'org/tiny'"):
            client.chat_completion("org/tony", HELLO)
        with pytest.raises(errors.BadRequest):
            client.chat_completion("org/tiny", "no list of messages")  # type: ignore[arg-type]
        with pytest.raises(errors.EngineFailed, match="there is no command \N{HORIZONTAL ELLIPSIS}/engine"):
            client.chat_completion("org/broken", HELLO)
        with pytest.raises(errors.Unauthorized, match="admin"):
            client.load_model("org/tiny")


def test_P_an_answer_that_breaks_off_raises(vllmd: Vllmd) -> None:
    """P's own client ended as if all were well; what was received stays received."""
    received: list[str] = []
    with Client(vllmd.url) as client, pytest.raises(StreamFailed):
        received.extend(client.chat_completion_stream("org/cut", HELLO))
    assert "".join(received) == "Hello to all"


# -- against a server that says what it is told to ----------------------------------------------------------------


class Canned(ThreadingHTTPServer):
    """Answers every POST with ``body``, and counts them."""

    body = b""
    status = 200
    kind = "text/event-stream"
    asked = 0


class Handler(BaseHTTPRequestHandler):
    server: Canned

    def do_POST(self) -> None:
        self.server.asked += 1
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.server.status)
        self.send_header("content-type", self.server.kind)
        self.send_header("retry-after", "7")
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def canned() -> Iterator[Canned]:
    with Canned(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def stream(server: Canned) -> list[str]:
    with Client(f"http://127.0.0.1:{server.server_port}") as client:
        return list(client.chat_completion_stream("m", HELLO))


TEXT = b'data: {"choices": [{"delta": {"content": "a"}}]}\r\n\r\n'


def test_P_error_chunk_raises(canned: Canned) -> None:
    """An engine that fails in the middle of a stream says so in a chunk; nothing is asked again."""
    canned.body = TEXT + b'data: {"error": {"message": "out of memory", "code": 500}}\n\ndata: [DONE]\n\n'
    with pytest.raises(StreamFailed, match="out of memory"):
        stream(canned)
    assert canned.asked == 1


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (TEXT, "without"),
        (b"data: {broken\n\n", "not JSON"),
        (b"data: 5\n\n", "no object"),
    ],
)
def test_a_stream_that_is_none_raises(canned: Canned, body: bytes, why: str) -> None:
    """Whatever else comes, the caller learns that the text is not whole."""
    canned.body = body
    with pytest.raises(StreamFailed, match=why):
        stream(canned)


def test_P_chunks_without_choices_and_comments_are_passed_over(canned: Canned) -> None:
    """P's client crashed on ``choices: []``."""
    canned.body = b': waiting\n\ndata: {"choices": []}\n\n' + TEXT + b'data: {"usage": {}}\n\ndata: [DONE]\n\n'
    assert stream(canned) == ["a"]


def test_statuses_and_times_come_through(canned: Canned) -> None:
    """An error of no class of ours keeps its status, and one to be tried again says when."""
    canned.status, canned.kind, canned.body = 418, "application/json", b'{"detail": "a teapot"}'
    with pytest.raises(errors.VllmdError, match="a teapot") as raised:
        stream(canned)
    assert raised.value.http_status == 418  # type: ignore[attr-defined]
    canned.status, canned.body = 503, b'{"error": {"message": "full", "code": "model_unavailable"}}'
    with pytest.raises(errors.Unavailable, match="full") as raised:
        stream(canned)
    assert raised.value.retry_after == 7.0


def test_nobody_there_and_nobody_answering(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both are told apart, and both by name."""
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
        client.health()
    with Client(f"unix:{tmp_path_factory.mktemp('x')}/none") as client, pytest.raises(Unreachable, match="none"):
        client.health()
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with Client(url, timeout=0.2) as client, pytest.raises(TimedOut):
            client.health()


@pytest.mark.parametrize("address", ["", "localhost:33258", "ftp://x", "http://"])
def test_an_address_that_is_none(address: str) -> None:
    """The error shows what one looks like."""
    with pytest.raises(errors.BadRequest, match=r"http://127\.0\.0\.1:33258"):
        Client(address)


def test_a_stream_left_early_frees_the_engine(vllmd: Vllmd) -> None:
    """Whoever breaks out of the loop leaves nothing running."""
    with vllmd.client() as client:
        client.load_model("org/tiny")
        for _ in client.chat_completion_stream("org/tiny", HELLO):
            break
        wait_until(lambda: vllmd.line("org/tiny").in_flight == 0)
