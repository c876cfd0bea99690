"""Where bodies end."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.proxy.framing import BadFraming, Chunked, Length, UntilEof

BODY = b"5\r\nhello\r\n1;ext=1\r\n \r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"
PAYLOAD = b"hello 0123456789"

BAD = [
    b"\r\n",
    b"x\r\n",
    b"0x5\r\nhello\r\n",
    b"+5\r\nhello\r\n",
    b"-5\r\nhello\r\n",
    b" 5\r\nhello\r\n",
    b"5 \r\nhello\r\n",
    b"5_0\r\nhello\r\n",
    b"5\nhello\n",
    b"5;a\nb\r\nhello\r\n",
    b"5;\x00\r\nhello\r\n",
    b"5\r\nhelloX",
    b"5\r\nhello\n\n",
    b"1111111111111111\r\n",
    b"5\r\nhello\r\n0\r\nbad trailer\r\n\r\n",
    b"0\r\nTrailer: x\n\n",
    b"0\r\n folded: x\r\n\r\n",
    b"0\r\nTrailer: a\rb\r\n\r\n",
    b"0\r\n" + b"T: " + b"x" * 9000,
    b"0\r\n" + b"T: x\r\n" * 2000 + b"\r\n",
]


def scanned(framing: Chunked | Length, pieces: list[bytes]) -> tuple[int, int]:
    """Feed ``pieces``; the piece that held the end, and where in it."""
    for number, piece in enumerate(pieces):
        end = framing.scan(piece)
        if end >= 0:
            return number, end
    return -1, -1


@pytest.mark.parametrize("cut", range(len(BODY)))
def test_chunks_are_followed_wherever_they_are_cut(cut: int) -> None:
    """Segments on the wire have nothing to do with chunks."""
    framing = Chunked(keep=True)
    number, end = scanned(framing, [BODY[:cut], BODY[cut:] + b"next"])
    assert (number, end) == (1, len(BODY) - cut)
    assert b"".join(framing.pieces) == PAYLOAD


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(0, 400), max_size=12), st.binary()
)
def test_chunked_bodies_of_any_shape_come_out_whole(chunks: list[bytes], cuts: list[int], after: bytes) -> None:
    """Whatever the chunks and the segments, the payload and the end are the same."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    edges = [0, *sorted(min(cut, len(body) - 1) for cut in cuts)]
    pieces = [body[a:b] for a, b in pairwise(edges)] + [body[edges[-1] :] + after]
    for keep in (False, True):
        framing = Chunked(keep=keep)
        number, end = scanned(framing, pieces)
        assert (number, end) == (len(pieces) - 1, len(body) - edges[-1])
        assert b"".join(framing.pieces) == (b"".join(chunks) if keep else b"")


@pytest.mark.parametrize("body", BAD)
@pytest.mark.parametrize("step", [1, 3, 10_000])
def test_bad_chunks_are_refused(body: bytes, step: int) -> None:
    """What another reader might take for another body is no body at all, in whatever pieces it comes."""
    pieces = [body[pos : pos + step] for pos in range(0, len(body), step)]
    with pytest.raises(BadFraming):
        scanned(Chunked(), pieces)


def test_a_size_line_that_is_known_is_no_end_of_a_chunk() -> None:
    """What has been learnt of size lines lets none stand where the line end of the chunk before it belongs."""
    Chunked().scan(b"1234\r\n" + b"x" * 0x1234 + b"\r\n12\r\n" + b"x" * 0x12 + b"\r\n")
    with pytest.raises(BadFraming):
        Chunked().scan(b"12\r\n" + b"x" * 0x12 + b"1234\r\n" + b"x" * 0x1234 + b"\r\n")


@given(st.lists(st.binary(max_size=20), max_size=10), st.integers(0, 100))
def test_a_length_is_counted(pieces: list[bytes], length: int) -> None:
    """The body is the first ``length`` bytes, and the end is told once they are there."""
    everything = b"".join(pieces)
    framing = Length(length, keep=True)
    number, end = scanned(framing, pieces)
    assert b"".join(framing.pieces) == everything[:length]
    if number >= 0:
        assert len(b"".join(pieces[:number])) + end == length
    else:
        assert len(everything) < length or not pieces


def test_only_a_body_without_framing_ends_with_its_connection() -> None:
    """For the others an early end is a truncation."""
    assert UntilEof().finished_by_eof()
    assert not Length(1).finished_by_eof()
    assert not Chunked().finished_by_eof()
    assert UntilEof().scan(b"anything") == -1
