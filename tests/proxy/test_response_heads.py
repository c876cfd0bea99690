"""Engines' heads in every form that RFC 9112 lets a recipient take, and how they reach the client."""

from __future__ import annotations

import asyncio

import pytest

from tests.proxy.fakes import raw, stage
from vllmd.proxy.framing import BadFraming
from vllmd.proxy.response_heads import MAX_RESPONSE_HEAD, HeadCollector, head_end, normalize_head

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nX-A: a b\r\n\r\n{}"
FORMS = {
    "plain": OK,
    "line feeds alone": OK.replace(b"\r\n", b"\n"),
    "line feeds but for the last line": OK.replace(b"\r\n", b"\n").replace(b"\n\n", b"\n\r\n"),
    "line feeds for the last line": OK.replace(b"\r\n\r\n", b"\n\n"),
    "an empty line before it": b"\r\n" + OK,
    "an empty line that is a line feed": b"\n" + OK,
    "no reason phrase": OK.replace(b"200 OK", b"200 "),
    "no reason phrase, and no space": OK.replace(b"200 OK", b"200"),
    "more space in the status line": OK.replace(b"HTTP/1.1 200 OK", b" HTTP/1.1\t200   OK "),
    "more space and no reason phrase": OK.replace(b"HTTP/1.1 200 OK", b"HTTP/1.1  200  "),
    "a folded line": OK.replace(b"a b", b"a\r\n b"),
    "a line folded by a tab and a line feed": OK.replace(b"a b", b"a\n\tb"),
    "a space before the colon": OK.replace(b"Content-Length:", b"Content-Length :"),
    "a carriage return within a line": OK.replace(b"a b", b"a\rb"),
    "NUL within a line": OK.replace(b"a b", b"a\0b"),
    "no space after the colon": OK.replace(b": ", b":"),
    "the same length twice": OK.replace(b"X-A", b"Content-Length: 2\r\nX-A"),
    "a list of the same length": OK.replace(b"Length: 2", b"Length: 2, 2"),
    "interim answers": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\nlink: x\n\n" + OK,
    "HTTP/1.0": OK.replace(b"1.1", b"1.0"),
}


@pytest.mark.parametrize("pieces", [1, 1000], ids=["byte by byte", "whole"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_has_one_meaning_is_taken(form: bytes, pieces: int) -> None:
    """And reaches the client in the plain form."""

    async def play() -> None:
        cut = [form[at : at + pieces] for at in range(0, len(form), pieces)]
        async with stage(raw(*cut)) as act:
            client = await act.client()
            client.post()
            answer = await client.answer()
            assert (answer.status, answer.body, answer.headers["x-a"]) == (200, b"{}", "a b")

    asyncio.run(play())


AMBIGUOUS = {
    "two lengths": OK.replace(b"X-A", b"Content-Length: 3\r\nX-A"),
    "a list of two lengths": OK.replace(b"Length: 2", b"Length: 2, 3"),
    "no length": OK.replace(b"Length: 2", b"Length: x"),
    "a coding that is not known": OK.replace(b"Content-Length: 2", b"Transfer-Encoding: gzip, chunked"),
    "a length and chunks": OK.replace(b"X-A", b"Transfer-Encoding: chunked\r\nX-A"),
    "chunks in HTTP/1.0": OK.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked").replace(b"1.1", b"1.0"),
    "a status that HTTP does not have": OK.replace(b"200 OK", b"999 Odd"),
    "a field without a colon": OK.replace(b"X-A: a b", b"X-A"),
    "no HTTP": b"220 mail.example ESMTP\r\n\r\n",
    "endless interim answers": b"HTTP/1.1 103 Early Hints\r\n\r\n" * (MAX_RESPONSE_HEAD // 20),
}


@pytest.mark.parametrize("form", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_could_mean_two_things_is_an_error(form: bytes) -> None:
    """502, and the connection is not used again."""

    async def play() -> None:
        async with stage(raw(form)) as act:
            client = await act.client()
            client.post()
            assert (await client.answer()).status == 502
            assert not act.relay.pool.idle()

    asyncio.run(play())


def test_a_head_ends_at_its_first_blank_line() -> None:
    """A body may begin with anything, and a plain head stays as it is."""
    assert head_end(b"a\n\nb\r\n\r\n") == 3
    assert head_end(b"a\r\n\r\n\n\n") == 5
    assert head_end(b"a\r\n\n\r\n") == 4
    assert head_end(b"a\r\nb\n\r") == -1
    plain = OK[:-2]
    assert normalize_head(plain) is plain


def test_a_head_has_a_size() -> None:
    """An engine that never ends it is given up."""
    collector = HeadCollector()
    collector.feed(b"HTTP/1.1 200 OK\r\nX: ")
    with pytest.raises(BadFraming, match="larger"):
        collector.feed(b"x" * MAX_RESPONSE_HEAD)
