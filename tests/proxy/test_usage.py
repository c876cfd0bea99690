"""Tokens of streams are counted whether or not the client asked for the usage; it sees what it asked for."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from tests.proxy.fakes import EVENTS, Engine, Script, chunked, raw, reply, soon, stage, until
from tests.proxy.fakes import Asked as Got
from vllmd.proxy.exchange import LAST_CHUNK, chunk
from vllmd.proxy.framing import Chunked
from vllmd.proxy.gate import Target
from vllmd.proxy.large import parse_large_json_body
from vllmd.proxy.peek import ParsedBody, parse_json_body
from vllmd.proxy.tokens import Tokens, estimate
from vllmd.proxy.tokens import from_usage as tokens_from_usage
from vllmd.proxy.usage import UsageFilter, WithoutUsage, must_request_usage, with_usage_option

CHAT = "/v1/chat/completions"


def event(*choices: dict[str, object], **more: object) -> bytes:
    told = {"id": "1", "model": "m", "choices": list(choices), **more}
    return b"data: " + json.dumps(told, separators=(",", ":")).encode() + b"\n\n"


WORDS = [event({"delta": {"content": word}}) for word in ("a []", "b", '"usage": {} "choices":[]')]
USAGE = event(usage={"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12})
DONE = b"data: [DONE]\n\n"
STREAM = b"".join((*WORDS, USAGE, DONE))
SEEN = b"".join((*WORDS, DONE))


def asked(**members: object) -> ParsedBody:
    return parse_json_body(json.dumps({"model": "m", **members}).encode())


@pytest.mark.parametrize(
    ("members", "more"),
    [
        ({"stream": True}, {}),
        ({"stream": True, "stream_options": None}, {}),
        ({"stream": True, "stream_options": {}}, {}),
        ({"stream": True, "stream_options": {"include_usage": False, "x": 1}}, {"x": 1}),
    ],
)
@pytest.mark.parametrize("name", ["m", "engines-own"])
def test_a_streams_usage_is_asked_for(members: dict[str, object], more: dict[str, object], name: str) -> None:
    """Beside whatever else was asked, and in the engine's name of the model; the rest keeps its bytes."""
    wanted = asked(messages=[{"x": 1.50}], **members)
    assert must_request_usage(wanted, CHAT)
    sent = b"".join(with_usage_option(wanted, name))
    assert json.loads(sent) == {
        "model": name, "messages": [{"x": 1.5}], "stream": True, "stream_options": {"include_usage": True, **more},
    }  # fmt: skip
    assert b"1.5" in sent


@pytest.mark.parametrize(
    "members", [{}, {"stream": False}, {"stream": True, "stream_options": {"include_usage": True}}, {"stream": 1}]
)
def test_others_are_left_alone(members: dict[str, object]) -> None:
    """No stream, or one whose client has asked; and what is no option at all is the engine's to refuse."""
    assert not must_request_usage(asked(**members), CHAT)
    assert not must_request_usage(asked(stream=True), "/v1/responses")  # tells it in its own last event
    assert not must_request_usage(asked(stream=True, stream_options=7), CHAT)


@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"include_usage": False}])
def test_a_large_body_says_the_same(options: object) -> None:
    """Its structure alone is read, and this member of it."""
    members = {"model": "m", "stream": True, **({} if options is None else {"stream_options": options}), "p": "x" * 99}
    work = parse_large_json_body(json.dumps(members).encode())
    try:
        while True:
            next(work)
    except StopIteration as end:
        wanted = end.value
    assert must_request_usage(wanted, CHAT) == (options != {"include_usage": True})
    if must_request_usage(wanted, CHAT):
        assert json.loads(b"".join(with_usage_option(wanted, "m")))["stream_options"]["include_usage"] is True


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_the_usage_is_taken_out_however_it_is_cut(size: int, end: bytes) -> None:
    """And nothing else: not a text that looks like it. Whole events are never held."""
    stream, seen, found = STREAM.replace(b"\n\n", end), SEEN.replace(b"\n\n", end), UsageFilter()
    passed = b""
    for start in range(0, len(stream), size):
        passed += found.feed(stream[start : start + size])
        whole = stream[: start + size].rfind(end) + len(end)
        assert len(passed) >= len(stream[:whole].replace(USAGE.replace(b"\n\n", end), b"")) - len(end)
    assert passed + found.rest() == seen


def test_a_large_event_is_not_held() -> None:
    """It may be an image of 30 MiB: what is longer than a usage passes as it comes."""
    found, big = UsageFilter(), event({"delta": {"content": "x" * 9000}})
    assert found.feed(big[:5000]) == big[:5000]
    assert found.feed(big[5000:5010]) == big[5000:5010]
    assert found.feed(big[5010:] + USAGE + DONE) == big[5010:] + DONE
    odd = event(usage={"prompt_tokens": 3}, prompt_filter_results=[1]).replace(b'"usage"', b'"filter"')
    assert found.feed(odd) == odd  # no choices, but no usage either


class Spoken:
    """An exchange that notes what it is told to write."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.over = False

    def start(self, status: int, head: bytes) -> None:
        self.written.append(head)

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def finish(self) -> None:
        self.over = True


@pytest.mark.parametrize("cut", [1, 5, 33, 100, 10_000])
@pytest.mark.parametrize("chunks", [1, 40, 10_000])
def test_its_framing_stays_sound(cut: int, chunks: int) -> None:
    """However the engine cuts its events into chunks, and the network those: the client's payload is the same."""
    body = b"".join(chunked(piece) for piece in (*WORDS, USAGE, DONE)) + b"0\r\n\r\n"
    if chunks != 1:
        body = b"".join(chunked(STREAM[at : at + chunks]) for at in range(0, len(STREAM), chunks)) + b"0\r\n\r\n"
    exchange, framing = Spoken(), Chunked()
    answer = WithoutUsage(exchange, framing, b"HEAD")  # type: ignore[arg-type]
    for at in range(0, len(body), cut):
        framing.scan(body[at : at + cut])
        answer.more(body[at : at + cut])
    answer.end()
    client = Chunked(keep=True)
    sent = b"".join(exchange.written).removeprefix(b"HEAD")
    assert client.scan(sent) == len(sent)
    assert (b"".join(client.pieces), exchange.over) == (SEEN, True)


def test_whole_events_pass_as_they_are() -> None:
    """The same object, neither looked through nor framed anew: what a stream costs is its common case."""
    exchange, framing = Spoken(), Chunked()
    answer = WithoutUsage(exchange, framing, b"HEAD")  # type: ignore[arg-type]
    pieces = [chunked(WORDS[1]), chunked(WORDS[1]) + chunked(WORDS[1])]
    for piece in pieces:
        framing.scan(piece)
        answer.more(piece)
    assert exchange.written[0] == b"HEAD" + pieces[0]
    assert exchange.written[1] is pieces[1]


def test_a_client_that_did_not_ask_gets_the_stream_that_it_asked_for() -> None:
    """And its tokens are known; so are those of one that did ask, which sees them."""
    pieces = [EVENTS, *map(chunked, (*WORDS, USAGE, DONE)), b"0\r\n\r\n"]

    async def play() -> None:
        async with stage(raw(*pieces)) as act:
            client = await act.client()
            client.post(body=b'{"model":"m-alias","stream":true}')
            answer = await client.answer()
            assert answer.body == SEEN.replace(b'"model":"m"', b'"model":"m-alias"')
            client.post(body=b'{"model":"m","stream":true}')
            assert (await client.answer()).body == SEEN
            client.post(body=b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}')
            assert (await client.answer()).body == STREAM
            assert [permit.endings for permit in act.gate.permits] == [[12]] * 3
            assert json.loads(act.engine.asked[0].body)["stream_options"] == {"include_usage": True}

    asyncio.run(play())


def picky() -> Script:
    """An engine that takes no ``stream_options``."""
    refusal = b'{"error":{"message":"stream_options: Extra inputs are not permitted"}}'
    refuse = reply(refusal, "HTTP/1.1 422 Unprocessable Entity\r\nContent-Type: application/json\r\n")
    stream = raw(EVENTS, *map(chunked, (*WORDS, DONE)), b"0\r\n\r\n")

    async def script(engine: Engine, got: Got, writer: asyncio.StreamWriter) -> None:
        await (refuse if b"stream_options" in got.body else stream)(engine, got, writer)

    return script


def test_an_engine_that_refuses_the_option_is_asked_once() -> None:
    """Its client gets the answer; the tokens are reckoned, and marked so."""

    async def play() -> None:
        async with stage(picky()) as act:
            client = await act.client()
            for _ in range(2):
                client.post(body=b'{"model":"m","stream":true}')
                assert (await client.answer()).body == SEEN
            assert [b"stream_options" in got.body for got in act.engine.asked] == [True, False, False]
            assert all(permit.tokens and permit.tokens.estimated for permit in act.gate.permits)
            act.relay.forget("m")  # another engine may take it
            client.post(body=b'{"model":"m","stream":true}')
            await client.answer()
            assert [b"stream_options" in got.body for got in act.engine.asked][3:] == [True, False]

    asyncio.run(play())


def test_a_request_that_is_sent_again_has_no_answer_yet() -> None:
    """The refusal was none of it: an engine that is silent from then on leaves the request unanswered."""
    answered: list[bool] = []

    async def script(engine: Engine, got: Got, writer: asyncio.StreamWriter) -> None:
        answered.extend(each.account.answered for each in act.server.exchanges() if each.account)
        await picky()(engine, got, writer)

    async def play() -> None:
        nonlocal act
        async with stage(script) as act:
            client = await act.client()
            client.post(body=b'{"model":"m","stream":true}')
            assert (await client.answer()).body == SEEN
        assert answered == [False, False]

    act: Any = None
    asyncio.run(play())


def test_an_error_of_the_clients_own_making_is_its_own() -> None:
    """It passes once, as it is; a client that sends the option itself is told of it, too."""
    body = b'{"error":{"message":"temperature must be a number"}}'

    async def play() -> None:
        head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
        async with stage(reply(body, head)) as act:
            client = await act.client()
            client.post(body=b'{"model":"m","stream":true}')
            answer = await client.answer()
            assert (answer.status, answer.body, len(act.engine.asked)) == (400, body, 1)
        async with stage(picky()) as act:
            client = await act.client()
            client.post(body=b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}')
            assert (await client.answer()).status == 422

    asyncio.run(play())


def test_rules_may_keep_the_option_away() -> None:
    """An administrator's ``strip: [stream_options]`` holds for us, too."""

    class Strict:
        strip, set, default, system = ("stream_options",), {}, {}, ""

    async def play() -> None:
        async with stage(raw(EVENTS, chunked(DONE), b"0\r\n\r\n")) as act:
            act.gate.target = Target("m", "m", rules=Strict())
            client = await act.client()
            client.post(body=b'{"model":"m","stream":true}')
            await client.answer()
            assert b"stream_options" not in act.engine.asked[0].body

    asyncio.run(play())


def test_a_stream_that_breaks_off_is_reckoned() -> None:
    """A client that leaves in the middle has taken something all the same."""

    async def script(engine: Engine, got: Got, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENTS + b"".join(map(chunked, WORDS)))
        await engine.go.wait()

    async def play() -> None:
        async with stage(script) as act:
            client = await act.client()
            client.post(body=b'{"model":"m","stream":true,"prompt":"' + b"x" * 400 + b'"}')
            await client.head()
            await soon(client.reader.readuntil(b"\n\n"))
            client.close()
            await until(lambda: act.gate.permits and act.gate.permits[0].endings)
            taken = act.gate.permits[0].tokens
            assert taken is not None
            assert (taken.estimated, taken.prompt > 100, taken.answer > 0) == (True, True, True)

    asyncio.run(play())


@pytest.mark.parametrize("together", [True, False])
def test_what_a_message_tells_at_its_start_counts(together: bool) -> None:
    """Some tell the prompt's tokens there alone, and the answer's at the end alone."""
    start = b'data: {"type":"message_start","message":{"usage":{"input_tokens":5,"cache_read_input_tokens":4}}}\n\n'
    text = b'data: {"type":"content_block_delta","delta":{"text":"word"}}\n\n' * 40
    stream = start + text + b'data: {"type":"message_delta","usage":{"output_tokens":3}}\n\n'

    async def play() -> None:
        pieces = [chunked(each + b"\n\n") for each in ([stream[:-2]] if together else stream[:-2].split(b"\n\n"))]
        async with stage(raw(EVENTS, *pieces, LAST_CHUNK)) as act:
            client = await act.client()
            client.post("/v1/messages", b'{"model":"m","stream":true,"messages":[]}')
            assert (await client.answer()).body == stream
            assert act.gate.permits[0].tokens == Tokens(9, 3, 4)

    asyncio.run(play())


def test_what_is_told_in_each_api() -> None:
    """What was cached is a part of the prompt; Anthropic's words have it apart."""
    details = b'"prompt_tokens_details":{"cached_tokens":4}'
    openai = b'"usage":{"prompt_tokens":9,"total_tokens":12,"completion_tokens":3,' + details + b"}}"
    anthropic = b'"usage":{"input_tokens":5,"output_tokens":3,"cache_read_input_tokens":4}'
    assert tokens_from_usage(openai) == tokens_from_usage(anthropic) == Tokens(9, 3, 4)
    assert tokens_from_usage(b'"usage":{"total_tokens":7}') == Tokens(7, 0)
    assert estimate(CHAT, b"x" * 400, 1000, stream=True) == Tokens(100, 4, estimated=True)
    assert estimate("/v1/embeddings", b"x" * 400, 1000, stream=False) == Tokens(100, 0, estimated=True)


def test_no_number_of_tokens_is_below_zero() -> None:
    """Whatever an engine tells: it would give its key tokens back, and could not be written to the record of use."""
    for part in ("completion", "output"):
        assert tokens_from_usage(b'"usage":{"%b_tokens":50,"total_tokens":10}' % part.encode()) == Tokens(0, 10)
    assert tokens_from_usage(b'"usage":{"prompt_tokens":50,"total_tokens":10}') == Tokens(50, 0)


def test_a_stream_without_usage_is_not_taken_apart_at_its_end() -> None:
    """Under load much of a stream comes in one piece with its last chunk: it passes as it came, and costs no look."""
    sent: list[bytes] = []
    exchange: Any = SimpleNamespace(write=sent.append, finish=lambda: None)
    framing = Chunked()
    answer = WithoutUsage(exchange, framing, b"")
    answer._filtered = None  # type: ignore[assignment, method-assign]
    piece = chunk(b'data: {"choices":[{"index":0}]}\n\n') * 3 + chunk(b"data: [DONE]\n\n") + LAST_CHUNK
    assert framing.scan(piece) == len(piece)
    answer.more(piece)
    answer.end()
    assert sent == [piece]
