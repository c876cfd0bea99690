"""Bodies that come compressed or in another charset: the engine gets them plain, and nothing grows beyond its limit."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable

import pytest

from tests.proxy.fakes import reply, stage
from vllmd.config.types import ServerConfig
from vllmd.errors import BadRequest, TooLarge
from vllmd.proxy import decoding
from vllmd.proxy.large import in_turns
from vllmd.proxy.limits import Limits

BODY = '{"model":"m-alias","x":"\u00e4\U0001f600"}'.encode()
PLAIN = BODY.replace(b"m-alias", b"m")
# The same in zstd, one frame of a raw block: magic, single segment of BODY's length, last raw block.
ZSTD = b"\x28\xb5\x2f\xfd\x20%b%b" % (bytes([len(BODY)]), (len(BODY) << 3 | 1).to_bytes(3, "little")) + BODY
RAW = zlib.compressobj(wbits=-15)
CODED = {
    "gzip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]),
    "deflate": zlib.compress(BODY),
    "Deflate": RAW.compress(BODY) + RAW.flush(),
    "zstd": ZSTD,
    "identity": BODY,
}


@pytest.mark.parametrize("coding", CODED)
def test_a_compressed_body_reaches_the_engine_plain(coding: str) -> None:
    """With its name put right, and no field that says it was compressed."""

    async def play() -> None:
        async with stage(reply(b'{"model":"m"}')) as act:
            client = await act.client()
            for _ in range(2):  # the second head is known already
                client.post("/v1/completions", CODED[coding], f"Content-Encoding: {coding}")
                assert (await client.answer()).json() == {"model": "m-alias"}
                assert act.engine.asked[-1].body == PLAIN
                assert "content-encoding" not in act.engine.asked[-1].headers or coding == "identity"

    asyncio.run(play())


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"\xef\xbb\xbf" + BODY, "application/json"),
        (BODY.decode().encode("utf-16"), "application/json"),
        (BODY.decode().encode("utf-32"), "application/json"),
        (BODY.decode().encode("utf-16-le"), "application/json; charset=utf-16le"),
        (BODY.decode().encode("utf-16-be"), 'application/json;charset="UTF-16"'),
        (BODY.decode().encode("utf-32-be"), "application/json; charset=UTF-32BE"),
        (BODY.decode().encode("utf-32-be"), "application/json; charset=utf_32_be"),
        (BODY.decode().encode("utf-16-le"), "application/json; charset=UTF-16-LE"),
        *(
            (BODY.decode().encode(f"utf-{coding}"), "application/json")
            for coding in ("16-le", "16-be", "32-le", "32-be")
        ),
        (BODY, "text/json"),
        (BODY, "application/vnd.api+json; charset=utf-8"),
    ],
)
def test_json_in_another_charset_reaches_the_engine_in_utf_8(body: bytes, content_type: str) -> None:
    """By mark or declaration; the type says no more of it."""

    async def play() -> None:
        async with stage(reply(b'{"model":"m"}')) as act:
            client = await act.client()
            client.post("/v1/completions", body, f"Content-Type: {content_type}")
            assert (await client.answer()).status == 200
            assert act.engine.asked[0].body == PLAIN
            assert act.engine.asked[0].headers["content-type"] == "application/json"

    asyncio.run(play())


def read(coding: str, body: bytes, most: int = 1 << 30, grew: Callable[[int], None] = lambda size: None) -> bytes:
    """All turns at once."""
    return asyncio.run(in_turns(decoding.decode_body(body, coding, most, grew)))


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_what_is_cut_or_broken_is_refused(coding: str) -> None:
    """Half a body is no body, and neither is another one's."""
    with pytest.raises(BadRequest):
        read(coding, CODED[coding][:-5])
    with pytest.raises(BadRequest):
        read(coding, b"\xff" * 40)


def test_an_unknown_coding_names_the_known_ones() -> None:
    """One look at the error is enough."""
    with pytest.raises(BadRequest, match="gzip, x-gzip, deflate, zstd"):
        read("br", b"")


def test_a_bomb_ends_at_the_limit_and_is_counted_as_it_grows() -> None:
    """A gigabyte of nothing in a megabyte: never more than the limit and a piece of it is in memory."""
    bomb, grown = gzip.compress(bytes(64 << 20)), [0]
    with pytest.raises(TooLarge, match="when it is decoded"):
        read("gzip", bomb, 1 << 20, grown.append)
    assert max(grown) <= 1 << 20
    assert len(grown) > 10


def test_a_decoded_body_takes_its_room() -> None:
    """What comes out is counted like what came in: no way around the memory that bodies have."""

    async def play() -> None:
        async with stage(reply(b"{}"), Limits(ServerConfig(max_buffered=1 << 20))) as act:
            client = await act.client()
            body = gzip.compress(b'{"model":"m","x":"' + b"x" * (1 << 20) + b'"}')
            client.post("/v1/completions", body, "Content-Encoding: gzip")
            assert (await client.answer()).status == 503

    asyncio.run(play())
