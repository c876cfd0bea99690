"""Heads that repeat, and heads that are written."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from vllmd.config.types import ServerConfig
from vllmd.errors import BadRequest
from vllmd.proxy.framing import Chunked, Length
from vllmd.proxy.heads import (
    MEMO_SIZE,
    HeadMemo,
    RequestHead,
    forwardable,
    parse_request_head,
    parse_response_head,
    write_response_head,
)
from vllmd.proxy.limits import Limits
from vllmd.proxy.reader import RequestReader
from vllmd.proxy.upstream import describe


def request(length: object, more: bytes = b"") -> bytes:
    """A POST's head."""
    return b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: %b\r\n%b\r\n" % (str(length).encode(), more)


def test_a_head_that_repeats_is_parsed_once() -> None:
    """Another length is no other head; everything that depends on it is right all the same."""
    parsed = []

    def parse(head: bytes) -> object:
        parsed.append(head)
        return parse_request_head(head)

    memo = HeadMemo(parse)  # type: ignore[type-var,arg-type,var-annotated]
    for length in (5, 5, 17, 0):
        head = memo.read(request(length))
        assert head.length == length
        assert head.headers.get("content-length") == str(length)
    assert len(parsed) == 1
    assert memo.read(request(5, b"Expect: 100-continue\r\n")).expects_continue
    assert not memo.read(request(5)).expects_continue
    assert len(parsed) == 3


@pytest.mark.parametrize("bad", [b"5, 5", b"+5", b"5\r\nContent-Length: 6", b"5\r\nTransfer-Encoding: chunked", b""])
def test_a_memory_of_good_heads_lets_no_bad_one_pass(bad: bytes) -> None:
    """What differs in more than plain digits is read from the start."""
    memo = HeadMemo(parse_request_head)
    memo.read(request(5))
    with pytest.raises(BadRequest):
        memo.read(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: %b\r\n\r\n" % bad)


def test_the_last_head_is_known_but_for_its_length() -> None:
    """Whoever looks has no other one parsed by that."""
    memo = HeadMemo(parse_request_head)
    assert memo.known(request(5)) is None
    first = memo.read(request(5))
    assert memo.known(request(5)) is first
    other = memo.known(request(17))
    assert other is not None
    assert (other.path, other.length) == ("/x", 17)
    assert memo.known(request(17, b"Expect: 100-continue\r\n")) is None


@pytest.mark.parametrize("before", [b"", request(0)])
@pytest.mark.parametrize("pieces", [1, 40])
def test_one_stray_line_end_is_forgiven_before_a_head(before: bytes, pieces: int) -> None:
    """A second one is not, be the head behind it known or not, and come in one piece or byte by byte."""
    for stray in (b"", b"\r\n", b"\r\n\r\n"):
        reader = RequestReader(Limits(ServerConfig()))
        reader.feed(before)
        assert bool(reader.head()) == bool(before)
        assert reader.body() == b""
        data, head = stray + request(0), None
        with pytest.raises(BadRequest, match="no request line") if len(stray) > 2 else nullcontext():
            for start in range(0, len(data), size := -(-len(data) // pieces)):
                reader.feed(data[start : start + size])
                head = reader.head()
        assert head is None if len(stray) > 2 else head is not None and head.path == "/x"


def test_an_answers_framing_is_new_every_time() -> None:
    """It counts down, so it is never shared."""
    memo = HeadMemo(lambda head: parse_response_head(head, "POST"))
    plain = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
    framings = [memo.read(plain % length).framing() for length in (3, 3, 8)]
    assert [framing.left for framing in framings if isinstance(framing, Length)] == [3, 3, 8]
    assert len({id(framing) for framing in framings}) == 3
    streams = [memo.read(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").framing() for _ in range(2)]
    assert isinstance(streams[0], Chunked)
    assert streams[0] is not streams[1]
    empty = [memo.read(b"HTTP/1.1 204 No Content\r\ncontent-length: %d\r\n\r\n" % length) for length in (0, 5)]
    assert [head.length for head in empty] == [0, 0]


def test_our_own_heads_cannot_be_broken_out_of() -> None:
    """A line end in a value would start a new field."""
    with pytest.raises(ValueError, match="malformed"):
        write_response_head(200, [("x-model", "a\r\nset-cookie: b")], [])
    with pytest.raises(ValueError, match="malformed"):
        write_response_head(200, [("x model", "a")], [])


def test_what_connection_names_is_not_passed_on() -> None:
    """RFC 9110, 7.6.1."""
    fields = [(b"connection", b"close, X-Mine"), (b"x-mine", b"1"), (b"x-other", b"2"), (b"te", b"trailers")]
    assert forwardable(fields) == [(b"x-other", b"2")]


def test_an_address_is_described_as_people_write_it() -> None:
    """Both kinds."""
    from vllmd.engines.base import Listen

    assert [describe(Listen(uds="/run/x")), describe(Listen(port=5))] == ["/run/x", "127.0.0.1:5"]


def test_only_heads_of_usual_size_are_remembered() -> None:
    """Ten thousand connections remember one each: what a client sends must not stay for as long as it is connected."""
    parsed: list[int] = []

    def parse(raw: bytes) -> RequestHead:
        parsed.append(len(raw))
        return parse_request_head(raw)

    memo = HeadMemo(parse)
    usual = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
    large = usual[:-2] + b"X: " + b"x" * MEMO_SIZE + b"\r\n\r\n"
    for raw in (usual, usual, large, large, usual):
        memo.read(raw)
    assert parsed == [len(usual), len(large), len(large)]
