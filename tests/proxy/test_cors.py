"""Pages of other sites read our answers only where the configuration says so."""

from __future__ import annotations

import asyncio

import pytest

from tests.proxy.fakes import reply, stage
from vllmd.proxy.cors import Cors
from vllmd.proxy.exchange import with_fields
from vllmd.proxy.http import Headers, Request

PAGE = (b"origin", b"https://chat.example")
ASKS = (b"access-control-request-method", b"POST")
WANTS = (b"access-control-request-headers", b"authorization")


def request(*fields: tuple[bytes, bytes], method: str = "GET") -> Request:
    return Request(method, "/v1/models", "/v1/models", "", Headers(fields))


@pytest.mark.parametrize(
    ("origins", "allowed"),
    [
        ((), ""),
        (("https://other.example",), ""),
        (("https://chat.example",), "https://chat.example"),
        (("https://CHAT.example/",), "https://chat.example"),
        (("*",), "*"),
    ],
)
def test_only_named_origins_are_let_read(origins: tuple[str, ...], allowed: str) -> None:
    """Off by default; an origin is compared without regard to case."""
    asked = request(PAGE)
    Cors(origins).mark(asked)
    assert dict(asked.answer_fields).get("access-control-allow-origin", "") == allowed


def test_a_preflight_is_answered_without_a_key() -> None:
    """Browsers send it without headers of their own, so it must not need any."""
    cors, asked = Cors(["https://chat.example"]), request(PAGE, ASKS, WANTS, method="OPTIONS")
    cors.mark(asked)
    answer = cors.preflight(asked, ["POST"])
    assert answer is not None
    assert answer.status == 204
    assert dict(answer.headers)["access-control-allow-methods"] == "POST"
    assert dict(answer.headers)["access-control-allow-headers"] == "authorization"


def test_a_strangers_preflight_is_a_plain_options() -> None:
    """Nothing in the answer lets its browser go on."""
    cors, asked = Cors(["https://other.example"]), request(PAGE, ASKS, method="OPTIONS")
    cors.mark(asked)
    assert cors.preflight(asked, ["POST"]) is None


@pytest.mark.parametrize(
    ("origin", "origins", "refused"),
    [
        ("", (), False),
        ("https://evil.example", (), True),
        ("null", (), True),
        ("https://evil.example", ("https://chat.example",), True),
        ("https://chat.example", ("https://chat.example",), False),
        ("https://evil.example", ("*",), False),
        ("http://vllmd:33258", (), False),
    ],
)
@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/realtime?model=m"])
def test_strangers_pages_send_no_forms_and_open_no_sockets(
    path: str, origin: str, origins: tuple[str, ...], *, refused: bool
) -> None:
    """Browsers ask before JSON and let a page read nothing; before these they do not ask, and an engine would work."""

    async def play() -> None:
        async with stage(reply(b"{}")) as act:
            act.router.cors.configure(origins)
            fields = ["Host: vllmd:33258", *([f"Origin: {origin}"] if origin else [])]
            method = "GET" if "realtime" in path else "POST"
            client = await act.client()
            client.send("\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""]).encode())
            assert ((await client.answer()).status == 403) is refused

    asyncio.run(play())


@pytest.mark.parametrize(
    ("site", "origin", "origins", "refused"),
    [
        ("cross-site", "", (), True),
        ("same-site", "", (), True),
        ("cross-site", "", ("https://chat.example",), True),
        ("cross-site", "", ("*",), False),
        ("cross-site", "https://chat.example", ("https://chat.example",), False),
        ("cross-site", "http://vllmd:33258", (), True),
        ("same-origin", "https://evil.example", (), True),
        ("same-origin", "http://vllmd:33258", (), False),
        ("same-origin", "", (), False),
        ("none", "", (), False),
    ],
)
@pytest.mark.parametrize("asked", ["GET /v2/models/m/config", "POST /v1/completions", "DELETE /v1/responses/x"])
def test_what_a_browser_says_of_the_page_is_heard(
    asked: str, site: str, origin: str, origins: tuple[str, ...], *, refused: bool
) -> None:
    """Images and links have no origin, but the browser says where their page is; either word is enough to refuse."""

    async def play() -> None:
        async with stage(reply(b"{}")) as act:
            act.router.cors.configure(origins)
            fields = ["Host: vllmd:33258", f"Sec-Fetch-Site: {site}", *([f"Origin: {origin}"] if origin else [])]
            client = await act.client()
            client.send("\r\n".join([f"{asked} HTTP/1.1", *fields, "", ""]).encode())
            assert ((await client.answer()).status == 403) is refused

    asyncio.run(play())


@pytest.mark.parametrize(("origins", "allowed"), [((), False), (("https://chat.example",), True), (("*",), True)])
def test_a_public_page_may_call_a_private_address_where_it_is_named(origins: tuple[str, ...], *, allowed: bool) -> None:
    """The browser asks for that beforehand, with a field of its own."""
    asked = request(PAGE, ASKS, (b"access-control-request-private-network", b"true"), method="OPTIONS")
    answer = Cors(origins).preflight(asked, ["POST"])
    assert (answer is not None) is allowed
    if answer is not None:
        assert dict(answer.headers)["access-control-allow-private-network"] == "true"
    plain = Cors(["*"]).preflight(request(PAGE, ASKS, method="OPTIONS"), ["POST"])
    assert plain is not None
    assert "access-control-allow-private-network" not in dict(plain.headers)


def test_a_cache_is_told_that_the_answer_depends_on_the_page() -> None:
    """Also by the answers which no page may read; where any may, they are all the same."""
    for origins, varies in [((), ()), (("*",), ()), (("https://chat.example",), (("vary", "origin"),))]:
        asked = request()
        Cors(origins).mark(asked)
        assert asked.answer_fields == varies


def test_fields_go_after_the_status_line() -> None:
    """Relayed heads are bytes; the fields are put into any."""
    head = with_fields(b"HTTP/1.1 200 OK\r\ndate: x\r\n\r\nbody", (("vary", "origin"),))
    assert head == b"HTTP/1.1 200 OK\r\nvary: origin\r\ndate: x\r\n\r\nbody"
