"""Odd requests, replayed against uvicorn, llama-server and vllmd: where both of the others serve, we serve."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.installed import daemon
from tests.machine import container

pytestmark = pytest.mark.clients

START, ANSWER = 120.0, 60.0  # seconds
SMOL = next((container.cache() / "llama").glob("SmolLM2-*.gguf"), None)
APP = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""
PATH = "/v1/chat/completions"
CHAT = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
WIDE = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "h\u00e4"}], "max_tokens": 1}, ensure_ascii=False
)


def post(
    body: bytes = CHAT, *fields: str, path: str = PATH, version: str = "1.1", host: str = "Host: localhost"
) -> bytes:
    kind = (
        [] if any(field.lower().startswith("content-type") for field in fields) else ["Content-Type: application/json"]
    )
    lines = [
        f"POST {path} HTTP/{version}",
        *filter(None, [host]),
        *kind,
        *fields,
        f"Content-Length: {len(body)}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body


def chunked(*chunks: bytes, extension: str = "", trailer: str = "") -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(each), extension.encode(), each) for each in chunks)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n" + trailer.encode() + b"\r\n"


# Not among them: a body that does not say that it is JSON. A page of another site can have a browser send such a one
# without asking; vLLM refuses it as well.
REQUESTS = {
    "plain": post(),
    "HTTP/1.0": post(version="1.0"),
    "HTTP/1.0 without Host": post(version="1.0", host=""),
    "HTTP/1.0 keep-alive": post(CHAT, "Connection: keep-alive", version="1.0"),
    "empty lines before it": b"\r\n\r\n" + post(),
    "lower-case names": post().replace(b"Content-Type", b"content-type").replace(b"Content-Length", b"content-length"),
    "no space behind the colon": post().replace(b"Content-Type: ", b"Content-Type:"),
    "blanks around a value": post().replace(b"Content-Type: application/json", b"Content-Type: \t application/json \t"),
    "an empty value": post(CHAT, "X-Empty:"),
    "a value beyond ASCII": post(CHAT, "X-Name: \u00e4"),
    "type with charset": post(CHAT, "Content-Type: application/json; charset=utf-8"),
    "Expect": post(CHAT, "Expect: 100-continue"),
    "chunked": chunked(CHAT),
    "chunked in crumbs": chunked(*(CHAT[at : at + 1] for at in range(len(CHAT)))),
    "chunk extensions": chunked(CHAT, extension=";name=value"),
    "trailers": chunked(CHAT, trailer="X-Sum: 1\r\n"),
    "spaces around the JSON": post(b" \r\n\t" + CHAT + b"\n \n"),
    "escapes in names": post(CHAT.replace(b'"model"', b'"\\u006dodel"')),
    "not ASCII": post(WIDE.encode()),
    "a query": post(path="/v1/chat/completions?a=b&c"),
    "an absolute target": post(path="http://localhost/v1/chat/completions"),
    "percent-encoded path": post(path="/v1/chat%2Fcompletions".replace("%2F", "/").replace("chat", "%63hat")),
    "a long target": post(path="/v1/chat/completions?" + "x" * 4000),
    "a hundred fields": post(CHAT, *(f"X-{number}: {number}" for number in range(90))),
    "a long field": post(CHAT, "X-Long: " + "x" * 7000),
    "Connection: close": post(CHAT, "Connection: close"),
    "Connection with other words": post(CHAT, "Connection: Keep-Alive, TE", "TE: trailers"),
    "an unknown Upgrade": post(CHAT, "Connection: Upgrade", "Upgrade: h2c"),
    "accepts anything but": post(CHAT, "Accept: text/html;q=0.1"),
    "gzip body": post(gzip.compress(CHAT), "Content-Encoding: gzip"),
    "half-closed": post(CHAT, "X-Half-Close: 1"),
}


def status(port: int, data: bytes) -> int:
    """Of the final answer; 0 for none."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=ANSWER) as sock:
        sock.sendall(data)
        if b"X-Half-Close" in data:
            sock.shutdown(socket.SHUT_WR)
        seen = b""
        while True:
            piece = sock.recv(65536)
            seen += piece
            while seen.startswith(b"HTTP/1.1 1") and b"\r\n\r\n" in seen:
                seen = seen.partition(b"\r\n\r\n")[2]
            if b"\r\n\r\n" in seen or not piece:
                return int(seen[9:12]) if seen.startswith(b"HTTP/1.") else 0
    return 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(argv: list[str], port: int, **more: object) -> Iterator[int]:
    """A server that answers on the port."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + START
        while status(port, post()) != 200:
            assert time.monotonic() < deadline, argv
            assert process.poll() is None, argv
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, int]]:
    """Uvicorn's (of vLLM's environment), llama-server's and ours, before the same model."""
    if SMOL is None or not (container.cache() / "vllm/bin/python").exists():
        pytest.skip("packaging/dev/setup vllm llama")
    folder = tmp_path_factory.mktemp("reference")
    (folder / "echo.py").write_text(APP)
    llama = next((container.cache() / "llama/llama.cpp").glob("*/bin/python"))
    server = Path(__file__).resolve().parents[2] / "vllmd/engines/xllamacpp_server.py"
    one, two = free_port(), free_port()
    uvicorn = [str(container.cache() / "vllm/bin/python"), "-m", "uvicorn", "echo:app", "--port", str(one)]
    direct = [
        str(llama),
        "-I",
        str(server),
        "--model",
        str(SMOL),
        "--host",
        "127.0.0.1",
        "--port",
        str(two),
        "--alias",
        "m",
    ]
    model = {"engine": "llama.cpp", "model": str(SMOL), "max_model_len": 512, "options": {"gpu_layers": 0}}
    config = {"devices": [], "server": {"idle_exit": "never"}, "idle": "never", "models": {"m": model}}
    os.environ |= {"VLLMD_ENGINES": str(container.cache() / "llama"), "PYTHONPATH": str(server.parents[2])}
    with running(uvicorn, one, cwd=folder), running(direct, two), daemon(folder / "s", config) as site:
        assert status(site.port, post()) == 200
        yield one, two, site.port


@pytest.mark.parametrize("name", REQUESTS)
def test_where_both_serve_we_serve(ports: tuple[int, int, int], name: str) -> None:
    """And the other way round: what only we serve is no fault."""
    uvicorn, llama, ours = (status(port, REQUESTS[name]) for port in ports)
    assert ours == 200 or not uvicorn == llama == 200, (uvicorn, llama, ours)
    print(name, uvicorn, llama, ours)
