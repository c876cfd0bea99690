"""Smuggling and malformed requests, each with the status it must get; afterwards the server serves on."""

from __future__ import annotations

import asyncio

import pytest

from tests.proxy.fakes import get, post, stage
from vllmd.proxy.limits import Limits

LIMITS = Limits(max_head=2048, max_body=4096, head_timeout=0.3, body_timeout=0.3)
H = "Host: vllmd\r\n"
JSON = "Content-Type: application/json\r\n"
CHAT = "POST /v1/chat/completions HTTP/1.1\r\n" + H + JSON


def chat(fields: str, body: bytes = b"") -> bytes:
    """A chat request with these framing fields."""
    return f"{CHAT}{fields}\r\n".encode("latin-1") + body


def hello(line: str = "GET /hello HTTP/1.1", fields: str = H) -> bytes:
    """A local request with this request line."""
    return f"{line}\r\n{fields}\r\n".encode("latin-1")


MODEL = b'{"model":"m"}'

FRAMING = {
    "CL+TE": (chat("Content-Length: 13\r\nTransfer-Encoding: chunked\r\n", b"d\r\n" + MODEL + b"\r\n0\r\n\r\n"), 400),
    "TE+CL": (chat("Transfer-Encoding: chunked\r\nContent-Length: 13\r\n", b"d\r\n" + MODEL + b"\r\n0\r\n\r\n"), 400),
    "two lengths that differ": (chat("Content-Length: 13\r\nContent-Length: 14\r\n", MODEL), 400),
    "two lengths that agree": (chat("Content-Length: 13\r\nContent-Length: 13\r\n", MODEL), 400),
    "a list of lengths": (chat("Content-Length: 13, 13\r\n", MODEL), 400),
    "length with a sign": (chat("Content-Length: +13\r\n", MODEL), 400),
    "negative length": (chat("Content-Length: -1\r\n", MODEL), 400),
    "hex length": (chat("Content-Length: 0xd\r\n", MODEL), 400),
    "empty length": (chat("Content-Length: \r\n", MODEL), 400),
    "length with a space before the colon": (chat("Content-Length : 13\r\n", MODEL), 400),
    "length of twenty digits": (chat("Content-Length: 99999999999999999999\r\n"), 400),
    "length beyond the limit": (chat("Content-Length: 4097\r\n"), 413),
    "100 MB announced": (chat("Content-Length: 104857600\r\n"), 413),
    "unknown coding": (chat("Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"), 400),
    "chunked twice": (chat("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"), 400),
    "identity coding": (chat("Transfer-Encoding: identity\r\n", MODEL), 400),
    "vertical tab in the coding": (chat("Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n"), 400),
    "chunked in HTTP/1.0": (chat("Transfer-Encoding: chunked\r\n", b"0\r\n\r\n").replace(b"1.1", b"1.0", 1), 400),
    "chunk size not hex": (chat("Transfer-Encoding: chunked\r\n", b"xyz\r\n"), 400),
    "chunk size with 0x": (chat("Transfer-Encoding: chunked\r\n", b"0xd\r\n" + MODEL + b"\r\n0\r\n\r\n"), 400),
    "chunk size with a minus": (chat("Transfer-Encoding: chunked\r\n", b"-1\r\n"), 400),
    "chunk size overflowing": (chat("Transfer-Encoding: chunked\r\n", b"f" * 17 + b"\r\n"), 400),
    "chunk ended by bare LF": (chat("Transfer-Encoding: chunked\r\n", b"d\n" + MODEL + b"\n0\n\n"), 400),
    "chunk longer than said": (chat("Transfer-Encoding: chunked\r\n", b"c\r\n" + MODEL + b"\r\n0\r\n\r\n"), 400),
    "chunks beyond the limit": (chat("Transfer-Encoding: chunked\r\n", b"1001\r\n" + b"x" * 4097), 413),
    "chunks like crumbs": (chat("Transfer-Encoding: chunked\r\n", (b"1;" + b"e" * 200 + b"\r\nx\r\n") * 3000), 400),
}
HEADS = {
    "obs-fold": (hello(fields=H + "X-A: 1\r\n 2\r\n"), 400),
    "obs-fold with a tab": (hello(fields=H + "X-A: 1\r\n\t2\r\n"), 400),
    "first field folded": (hello(fields=" X-A: 1\r\n" + H), 400),
    "bare LF after a field": (hello(fields="Host: vllmd\nX-A: 1\r\n"), 400),
    "bare LFs throughout": (b"GET /hello HTTP/1.1\nHost: vllmd\n\n", 400),
    "bare CR in a field": (hello(fields=H + "X-A: 1\r2\r\n"), 400),
    "NUL in a value": (hello(fields=H + "X-A: 1\x002\r\n"), 400),
    "NUL in a name": (hello(fields=H + "X\x00A: 1\r\n"), 400),
    "NUL in the target": (hello("GET /hel\x00lo HTTP/1.1"), 400),
    "space in a name": (hello(fields=H + "X A: 1\r\n"), 400),
    "space before the colon": (hello(fields=H + "X-A : 1\r\n"), 400),
    "empty name": (hello(fields=H + ": 1\r\n"), 400),
    "no colon": (hello(fields=H + "nonsense\r\n"), 400),
    "no Host": (hello(fields="X-A: 1\r\n"), 400),
    "two Hosts": (hello(fields=H + H), 400),
    "Host with a path": (hello(fields="Host: vllmd/x\r\n"), 400),
    "Host with a space": (hello(fields="Host: a b\r\n"), 400),
    "huge head": (hello(fields=H + "X-A: " + "a" * 3000 + "\r\n"), 431),
    "huge head without an end": (b"GET /hello HTTP/1.1\r\n" + b"a" * 3000, 431),
    "too many fields": (hello(fields=H + "A: 1\r\n" * 500), 431),
    "unknown expectation": (hello(fields=H + "Expect: something\r\n"), 400),
    "no request at all": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "a response": (b"HTTP/1.1 200 OK\r\n\r\n", 400),
    "empty lines only": (b"\r\n\r\n\r\n\r\n", 400),
}
TARGETS = {
    "HTTP/0.9": (b"GET /hello\r\n\r\n", 400),
    "HTTP/2.0": (hello("GET /hello HTTP/2.0"), 400),
    "HTTP/1.2": (hello("GET /hello HTTP/1.2"), 400),
    "lower-case http": (hello("GET /hello http/1.1"), 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "two spaces": (hello("GET  /hello HTTP/1.1"), 400),
    "tab instead of space": (hello("GET\t/hello HTTP/1.1"), 400),
    "space at the end": (hello("GET /hello HTTP/1.1 "), 400),
    "method with odd characters": (hello("G@T /hello HTTP/1.1"), 400),
    "no leading slash": (hello("GET hello HTTP/1.1"), 400),
    "absolute, another host": (hello("GET http://evil/hello HTTP/1.1"), 400),
    "absolute, user in it": (hello("GET http://u@vllmd/hello HTTP/1.1"), 400),
    "absolute, another scheme": (hello("GET ftp://vllmd/hello HTTP/1.1"), 400),
    "absolute, this host": (hello("GET http://vllmd/hello HTTP/1.1"), 200),
    "authority": (hello("CONNECT vllmd:443 HTTP/1.1"), 400),
    "asterisk": (hello("GET * HTTP/1.1"), 400),
    "asterisk for OPTIONS": (hello("OPTIONS * HTTP/1.1"), 204),
    "fragment": (hello("GET /hello#x HTTP/1.1"), 400),
    "dot segments": (hello("GET /x/../hello HTTP/1.1"), 400),
    "escaped dot segments": (hello("GET /x/%2e%2e/hello HTTP/1.1"), 400),
    "escaped NUL": (hello("GET /hello%00 HTTP/1.1"), 400),
    "escaped line end": (hello("GET /hello%0d%0aX:1 HTTP/1.1"), 400),
    "escaped backslash": (hello("GET /x%5c..%5chello HTTP/1.1"), 400),
    "bad escape": (hello("GET /hello%zz HTTP/1.1"), 400),
    "escape cut off": (hello("GET /hello%2 HTTP/1.1"), 400),
    "overlong UTF-8": (hello("GET /%c0%ae%c0%ae/hello HTTP/1.1"), 400),
    "raw bytes above 127": (hello("GET /h\xe4llo HTTP/1.1"), 400),
    "double slash": (hello("GET //hello HTTP/1.1"), 404),
    "unknown path": (hello("GET /nothing HTTP/1.1"), 404),
    "unknown method": (hello("BREW /hello HTTP/1.1"), 405),
    "TRACE": (hello("TRACE /hello HTTP/1.1"), 405),
    "engine's sleep": (post("/sleep"), 404),
    "engine's collective_rpc": (post("/collective_rpc"), 404),
    "sleep behind /upstream": (post("/upstream/m/sleep"), 403),
    "escaped sleep behind /upstream": (post("/upstream/m/sl%65ep"), 403),
}
BODIES = {
    "not JSON": (post(body=b"hello"), 400),
    "empty": (post(body=b""), 400),
    "JSON cut off": (post(body=b'{"model":"m"'), 400),
    "extra data": (post(body=b'{"model":"m"}{"model":"m"}'), 400),
    "no object": (post(body=b'["model"]'), 400),
    "not UTF-8": (post(body=b'{"model":"m","x":"\xff"}'), 400),
    "UTF-16": (post(body='{"model":"m"}'.encode("utf-16")), 400),
    "deep nesting": (post(body=b'{"model":"m","x":' + b"[" * 1800 + b"]" * 1800 + b"}"), 400),
    "model twice": (post(body=b'{"model":"m","model":"n"}'), 400),
    "model twice, once escaped": (post(body=b'{"model":"m","mod\\u0065l":"n"}'), 400),
    "model no string": (post(body=b'{"model":1}'), 400),
    "model null": (post(body=b'{"model":null}'), 400),
    "model with a line end": (post(body=b'{"model":"m\\r\\nX: 1"}'), 400),
    "no model": (post(body=b"{}"), 404),
    "unknown model": (post(body=b'{"model":"n"}'), 404),
    "form instead of JSON": (post("/v1/chat/completions", MODEL, "Content-Type: text/plain"), 400),
    "JSON instead of a form": (post("/v1/audio/transcriptions", MODEL), 400),
    "form without boundary": (post("/v1/audio/translations", b"", "Content-Type: multipart/form-data"), 400),
    "WebSocket without upgrade": (get("/v1/realtime?model=m"), 400),
}
CASES = {**FRAMING, **HEADS, **TARGETS, **BODIES}


@pytest.mark.parametrize("name", CASES)
def test_each_hostile_request_gets_its_status(name: str) -> None:
    """A clear refusal, no engine bothered, nothing left behind, and the next client is served."""
    request, status = CASES[name]

    async def play() -> None:
        async with stage(limits=LIMITS) as act:
            client = await act.client()
            client.send(request)
            answer = await client.answer()
            assert answer.status == status, answer
            if status >= 400:
                assert answer.json()["error"]["message"]
                assert not act.engine.asked
            if answer.headers.get("connection") == "close":
                client.writer.write_eof()
                assert await client.closed()
            other = await act.client()
            other.send(get("/hello"))
            assert (await other.answer()).status == 200

    asyncio.run(play())


SMUGGLED = [name for name in {**FRAMING, **HEADS} if CASES[name][1] == 400]


@pytest.mark.parametrize("name", SMUGGLED)
def test_nothing_after_an_ambiguous_request_is_read_as_a_request(name: str) -> None:
    """Its end cannot be told, so the connection is closed with one answer."""

    async def play() -> None:
        async with stage(limits=LIMITS) as act:
            client = await act.client()
            client.send(CASES[name][0] + get("/hello"))
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (400, "close")
            client.writer.write_eof()
            assert await client.closed()

    asyncio.run(play())


@pytest.mark.parametrize("request_bytes", [b"", b"GET /hel", b"GET /hello HTTP/1.1\r\nHost: vllmd\r\nX-A: "])
def test_a_slow_head_is_given_up(request_bytes: bytes) -> None:
    """Slowloris holds a connection for ``head_timeout`` and no longer; one that never spoke gets no answer."""

    async def play() -> None:
        async with stage(limits=LIMITS) as act:
            client = await act.client()
            client.send(request_bytes)
            if request_bytes:
                assert (await client.answer()).status == 408
            client.writer.write_eof() if request_bytes else None
            assert await client.closed()

    asyncio.run(play())


def test_a_slow_body_is_given_up() -> None:
    """A body that does not keep up with the least rate is a 408, however steadily it drips."""

    async def play() -> None:
        async with stage(limits=LIMITS) as act:
            client = await act.client()
            client.send(chat("Content-Length: 1000\r\n"))
            answering = asyncio.ensure_future(client.answer())
            while not answering.done():
                client.send(b"x")
                await asyncio.sleep(0.02)
            assert answering.result().status == 408
            client.writer.write_eof()
            assert await client.closed()

    asyncio.run(play())


@pytest.mark.parametrize("request_bytes", [b"GET /hel", chat("Content-Length: 13\r\n", b"{")])
def test_a_half_closed_half_request_is_told_so(request_bytes: bytes) -> None:
    """The rest can never come."""

    async def play() -> None:
        async with stage(limits=LIMITS) as act:
            client = await act.client()
            client.send(request_bytes)
            client.writer.write_eof()
            assert (await client.answer()).status == 400
            assert await client.closed()

    asyncio.run(play())


def test_a_refused_upload_still_gets_its_answer() -> None:
    """Closing at once would reset the connection and lose the 413 for a client that is busy sending."""

    async def play() -> None:
        async with stage(limits=LIMITS) as act:
            client = await act.client()
            client.send(chat("Content-Length: 104857600\r\n"))
            for _ in range(64):
                client.send(b"x" * 65536)
            assert (await client.answer()).status == 413
            client.writer.write_eof()
            assert await client.closed()

    asyncio.run(play())
