"""Smuggling and malformed requests, each with the status it must get; afterwards the server serves on."""

from __future__ import annotations

import asyncio

import pytest

from tests.proxy.fakes import get, post, stage
from vllmd.config.types import ServerConfig
from vllmd.proxy.limits import Limits

LIMITS = Limits(ServerConfig(max_head=2048, max_body=4096, head_timeout=0.3, body_timeout=0.3))
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
CHUNKED = b"d\r\n" + MODEL + b"\r\n0\r\n\r\n"


def coded(coding: str, body: bytes = CHUNKED) -> bytes:
    """A chat request with this Transfer-Encoding line, everything after the field's name included."""
    return chat(f"Transfer-Encoding{coding}\r\n", body)


def sized(line: bytes, more: bytes = b"") -> bytes:
    """A chat request in one chunk with this size line, and ``more`` after the last one."""
    return coded(": chunked", line + b"\r\n" + MODEL + b"\r\n0\r\n" + more + b"\r\n")


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
    "chunked under another name": (coded(": xchunked"), 400),
    "chunked and nothing": (coded(": chunked,"), 400),
    "nothing and chunked": (coded(": ,chunked"), 400),
    "chunked with a parameter": (coded(": chunked;q=1"), 400),
    "chunked in quotes": (coded(': "chunked"'), 400),
    "form feed before the coding": (coded(":\x0cchunked"), 400),
    "0x85 before the coding": (coded(":\x85chunked"), 400),
    "0xA0 after the coding": (coded(": chunked\xa0"), 400),
    "NUL after the coding": (coded(": chunked\0"), 400),
    "coding folded": (coded(":\r\n chunked"), 400),
    "coding with a space before the colon": (coded(" : chunked"), 400),
    "no coding at all, and a length": (coded(":\r\nContent-Length: 13", MODEL), 400),
    "two codings in two lines": (coded(": gzip\r\nTransfer-Encoding: chunked"), 400),
    "coding behind a bare CR": (chat("X: a\rTransfer-Encoding: chunked\r\nContent-Length: 13\r\n", MODEL), 400),
    "coding behind a bare LF": (chat("X: a\nTransfer-Encoding: chunked\r\nContent-Length: 13\r\n", MODEL), 400),
    "tabs around the coding": (coded(":\tchunked\t"), 200),
    "coding in capitals": (coded(": CHUNKED"), 200),
    "coding with an underscore is no coding": (
        chat("Transfer_Encoding: chunked\r\nContent-Length: 13\r\n", MODEL),
        200,
    ),
    "spaces around the length": (chat("Content-Length:  13 \r\n", MODEL), 200),
    "length with a vertical tab": (chat("Content-Length: 13\x0b\r\n", MODEL), 400),
    "length with 0xA0": (chat("Content-Length: 13\xa0\r\n", MODEL), 400),
    "length with a space inside": (chat("Content-Length: 1 3\r\n", MODEL), 400),
    "length with an underscore": (chat("Content-Length: 1_3\r\n", MODEL), 400),
    "length in other digits": (chat("Content-Length: \xd9\xa1\xd9\xa3\r\n", MODEL), 400),
    "length and a parameter": (chat("Content-Length: 13;a\r\n", MODEL), 400),
    "minus nothing": (chat("Content-Length: -0\r\n"), 400),
    "chunk with an extension": (sized(b'd;a="b;c"'), 200),
    "chunk size with zeros before it": (sized(b"000d"), 200),
    "line feed in a chunk extension": (sized(b"d;a\nb"), 400),
    "carriage return in a chunk extension": (sized(b"d;a\rb"), 400),
    "NUL in a chunk extension": (sized(b"d;a\0b"), 400),
    "endless chunk extension": (sized(b"d;" + b"a" * 1000), 400),
    "space after a chunk size": (sized(b"d "), 400),
    "space before a chunk size": (sized(b" d"), 400),
    "plus before a chunk size": (sized(b"+d"), 400),
    "underscore in a chunk size": (sized(b"0_d"), 400),
    "chunk size of zeros": (sized(b"0" * 20 + b"d"), 400),
    "a trailer": (sized(b"d", b"X-T: 1\r\n"), 200),
    "trailer that is framing": (sized(b"d", b"Content-Length: 5\r\n"), 200),  # dropped, as all of them are
    "trailer folded": (sized(b"d", b"X-T: 1\r\n 2\r\n"), 400),
    "trailer with a space in its name": (sized(b"d", b"X T: 1\r\n"), 400),
    "trailer with NUL": (sized(b"d", b"X-T: \0\r\n"), 400),
    "trailers without an end": (sized(b"d", b"X-T: 1\r\n" * 2000), 400),
    "last chunk ended by bare LF": (coded(": chunked", b"d\r\n" + MODEL + b"\r\n0\r\n\n"), 400),
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
    "0x85 in a name": (hello(fields=H + "X\x85: 1\r\n"), 400),
    "escape character in a value": (hello(fields=H + "X-A: \x1b[1m\r\n"), 400),
    "DEL in a value": (hello(fields=H + "X-A: \x7f\r\n"), 400),
    "bytes above 127 in a value": (hello(fields=H + "X-A: \xe4\r\n"), 200),
    "two Hosts that differ": (hello(fields=H + "Host: evil\r\n"), 400),
    "a list of Hosts": (hello(fields="Host: vllmd, evil\r\n"), 400),
    "Host with a user": (hello(fields="Host: vllmd@evil\r\n"), 400),
    "Host that is empty": (hello(fields="Host:\r\n"), 200),
    "no Host in HTTP/1.0": (hello("GET /hello HTTP/1.0", ""), 200),
    "two Content-Types": (post("/v1/completions", MODEL, "Content-Type: application/json", "Content-Type: a/b"), 400),
    "length taken off by Connection": (chat("Connection: close, content-length\r\nContent-Length: 13\r\n", MODEL), 200),
    "upgrade to HTTP/2": (
        hello(fields=H + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n"),
        200,
    ),
    "too many fields": (hello(fields=H + "A: 1\r\n" * 500), 431),
    "unknown expectation": (hello(fields=H + "Expect: something\r\n"), 400),
    "no request at all": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100, 400),  # told at once, not in head_timeout
    "space before the request line": (hello(" GET /hello HTTP/1.1"), 400),
    "line feed before the request line": (b"\n" + hello(), 400),
    "one line end before the request line": (b"\r\n" + hello(), 200),
    "a response": (b"HTTP/1.1 200 OK\r\n\r\n", 400),
    "empty lines only": (b"\r\n\r\n\r\n\r\n", 400),
}
TARGETS = {
    "HTTP/0.9": (b"GET /hello\r\n\r\n", 400),
    "HTTP/2.0": (hello("GET /hello HTTP/2.0"), 400),
    "HTTP/01.1": (hello("GET /hello HTTP/01.1"), 400),
    "HTTP/1.1 and more": (hello("GET /hello HTTP/1.1x"), 400),
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
    "absolute, another port": (hello("GET http://vllmd:81/hello HTTP/1.1"), 400),
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
    "double slash": (hello("GET //hello HTTP/1.1"), 200),
    "unknown path": (hello("GET /nothing HTTP/1.1"), 404),
    "unknown method": (hello("BREW /hello HTTP/1.1"), 405),
    "TRACE": (hello("TRACE /hello HTTP/1.1"), 405),
    "engine's sleep": (post("/sleep"), 404),
    "engine's collective_rpc": (post("/collective_rpc"), 404),
    "sleep behind /upstream": (post("/upstream/m/sleep"), 403),
    "sleep behind /upstream and a query": (post("/upstream/m/sleep?level=1"), 403),
    "sleep behind two slashes": (post("/upstream/m//sleep"), 403),
    "sleep before a slash": (post("/upstream/m/sleep/"), 403),
    "sleep in capitals": (post("/upstream/m/SLEEP"), 403),
    "sleep with a dot": (post("/upstream/m/sleep."), 403),
    "sleep with a parameter": (post("/upstream/m/;sleep"), 403),
    "sleep behind an escaped slash": (post("/upstream/m/%2Fsleep"), 403),
    "sleep behind dot segments": (post("/upstream/m/v1/../sleep"), 400),
    "sleep behind escaped dot segments": (post("/upstream/m/v1%2f..%2fsleep"), 400),
    "escaped sleep behind /upstream": (post("/upstream/m/sl%65ep"), 403),
}
BODIES = {
    "not JSON": (post(body=b"hello"), 400),
    "empty": (post(body=b""), 400),
    "JSON cut off": (post(body=b'{"model":"m"'), 400),
    "extra data": (post(body=b'{"model":"m"}{"model":"m"}'), 400),
    "no object": (post(body=b'["model"]'), 400),
    "not UTF-8": (post(body=b'{"model":"m","x":"\xff"}'), 400),
    "UTF-16": (post(body='{"model":"m"}'.encode("utf-16")), 200),
    "UTF-32": (post(body='{"model":"m"}'.encode("utf-32")), 200),
    "byte order mark": (post(body=b"\xef\xbb\xbf" + MODEL), 200),
    "surrogates in UTF-8": (post(body=b'{"model":"m","x":"\xed\xa0\x80"}'), 400),
    "half a surrogate in the model": (post(body=b'{"model":"m\\ud800"}'), 400),
    "half a surrogate elsewhere": (post(body=b'{"model":"m","x":"\\ud800"}'), 200),  # the engine's to judge
    "NaN": (post(body=b'{"model":"m","x":[NaN,-Infinity]}'), 200),  # so is this; Python's readers take it
    "control character in a string": (post(body=b'{"model":"m","x":"a\nb"}'), 400),
    "NUL in a string": (post(body=b'{"model":"m","x":"\0"}'), 400),
    "comment": (post(body=b'{"model":"m"/**/}'), 400),
    "single quotes": (post(body=b"{'model':'m'}"), 400),
    "comma at the end": (post(body=b'{"model":"m",}'), 400),
    "white space at the end": (post(body=MODEL + b" \r\n"), 200),
    "deep nesting": (post(body=b'{"model":"m","x":' + b"[" * 1800 + b"]" * 1800 + b"}"), 400),
    "model twice": (post(body=b'{"model":"m","model":"n"}'), 400),
    "model twice, once escaped": (post(body=b'{"model":"m","mod\\u0065l":"n"}'), 400),
    "model twice, nested": (post(body=b'{"model":"m","x":{"model":"n","model":"o"}}'), 200),  # none of it is ours
    "model with NUL": (post(body=b'{"model":"m\\u0000"}'), 400),
    "model in capitals": (post(body=b'{"MODEL":"m"}'), 404),
    "model a list": (post(body=b'{"model":["m"]}'), 400),
    "model empty": (post(body=b'{"model":""}'), 404),
    "model no string": (post(body=b'{"model":1}'), 400),
    "model null": (post(body=b'{"model":null}'), 404),
    "model with a line end": (post(body=b'{"model":"m\\r\\nX: 1"}'), 400),
    "no model": (post(body=b"{}"), 404),
    "unknown model": (post(body=b'{"model":"n"}'), 404),
    "form instead of JSON": (post("/v1/chat/completions", MODEL, "Content-Type: text/plain"), 400),
    "no type": (chat("Content-Length: 13\r\n", MODEL).replace(JSON.encode(), b""), 400),
    "compressed": (post("/v1/completions", MODEL, "Content-Encoding: gzip"), 400),
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
