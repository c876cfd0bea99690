"""Large bodies: found what is to be found, without anybody waiting for long."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Generic, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.proxy.fakes import reply, stage
from vllmd.config.types import RequestRules
from vllmd.errors import BadRequest
from vllmd.proxy.gate import Target
from vllmd.proxy.large import LARGE_BYTES, apply_rules_large, in_turns, parse_large_json_body
from vllmd.proxy.peek import SLICE_BYTES, ParsedBody, Turns, apply_rules, parse_json_body

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
T = TypeVar("T")
TEXTS = st.text(alphabet=st.sampled_from('ab"\\{}[]:,ä model'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS, lambda v: st.lists(v) | st.dictionaries(TEXTS, v)
)


def read(body: bytes) -> ParsedBody:
    """All turns at once."""
    return asyncio.run(in_turns(parse_large_json_body(body)))


def outcome(way: Callable[[bytes], ParsedBody], body: bytes) -> ParsedBody | str:
    """What it found, or why it refused."""
    try:
        return way(body)
    except BadRequest as error:
        return error.message


@UNHURRIED
@given(st.dictionaries(TEXTS | st.just("stream"), VALUES), st.none() | TEXTS.filter(bool), st.booleans(), st.booleans())
def test_it_finds_what_the_small_way_finds(
    members: dict[str, object], model: str | None, ascii_only: bool, indented: bool
) -> None:
    """Quotes, brackets and the word itself inside strings change nothing."""
    body = {**members, **({} if model is None else {"model": model})}
    text = json.dumps(body, ensure_ascii=ascii_only, indent=1 if indented else None).encode()
    assert outcome(read, text) == outcome(parse_json_body, text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b'{"model":"a","model":"b"}', "twice"),
        (b'{"model":"a","mod\\u0065l":"b"}', "twice"),
        (b'{"model":3}', "must be a string"),
        (b'{"model":{"model":"a"}}', "must be a string"),
        (b'{"model":"a"', "ends in the middle"),
        (b'{"model":"a', "ends in the middle|must be"),
        (b'{"model":"a"}{"model":"b"}', "extra data"),
        (b'{"model":"\\x"}', "not JSON"),
        (b'{"model":"a","x":' + b"[" * 2000 + b"]" * 2000 + b"}", "nested too deeply"),
    ],
)
def test_what_is_refused(body: bytes, message: str) -> None:
    """All that could name two models, or none that can be told."""
    with pytest.raises(BadRequest, match=message):
        read(body)


@pytest.mark.parametrize(
    "value",
    [
        b'"' + b"A" * (8 << 20) + b'"',
        b"[" + b"1," * (4 << 20) + b"1]",
        b'"' + b'\\"' * (1 << 20) + b'"',
        b" " * (8 << 20) + b"1" + b" " * (8 << 20),
    ],
)
def test_others_have_their_turn_meanwhile(value: bytes) -> None:
    """However it is made up, no step of the work looks at more than a slice, or a thousand strings."""
    found = SteppedThrough(parse_large_json_body(b'{"x":' + value + b',"model":"m"}'))
    assert found.result.model == "m"
    assert found.turns >= len(value) // SLICE_BYTES
    ruled = SteppedThrough(apply_rules_large(found.result.raw, RequestRules(set={"y": 1})))
    assert ruled.result == b'{"x":' + value.strip() + b',"model":"m","y":1}' or b" " in value
    assert ruled.turns >= len(value) // SLICE_BYTES


class SteppedThrough(Generic[T]):
    """Work done to its end, and how many turns it left to others."""

    def __init__(self, work: Turns[T]) -> None:
        self.turns = 0
        while True:
            try:
                next(work)
            except StopIteration as end:
                self.result: T = end.value
                return
            self.turns += 1


RULES = RequestRules(strip=("user", "a"), set={"temperature": 0.5}, default={"b": [1], "a": 2})


@UNHURRIED
@given(st.dictionaries(TEXTS | st.sampled_from(["user", "temperature", "b"]), VALUES), st.booleans(), st.booleans())
def test_rules_do_what_they_do_to_a_small_body(members: dict[str, object], ascii_only: bool, indented: bool) -> None:
    """Whatever the values hold that looks like a member."""
    text = json.dumps(members, ensure_ascii=ascii_only, indent=1 if indented else None).encode()
    assert json.loads(asyncio.run(in_turns(apply_rules_large(text, RULES)))) == json.loads(apply_rules(text, RULES))


def test_no_spelling_of_a_key_is_a_way_around_the_rules() -> None:
    """Every letter by its number; and a body of nothing but keys is refused before it takes all memory."""
    name = "chat_template_kwargs"
    spelled = "".join(f"\\u{ord(letter):04x}" for letter in name)
    body = f'{{"{spelled}":1 , "model":"m"}}'.encode()
    assert asyncio.run(in_turns(apply_rules_large(body, RequestRules(strip=(name,))))) == b'{"model":"m"}'
    many = b"{" + b",".join(b'"%d":1' % number for number in range(20_000)) + b"}"
    with pytest.raises(BadRequest, match="more than 10000 members"):
        asyncio.run(in_turns(apply_rules_large(many, RULES)))


def test_a_large_request_is_relayed_byte_for_byte() -> None:
    """With its name put right, as every other."""
    body = b'{"x":"' + b"y" * LARGE_BYTES + b'","model":"m-alias"}'

    async def play() -> None:
        async with stage(reply(b"{}")) as act:
            client = await act.client()
            client.post(body=body)
            assert (await client.answer()).status == 200
            assert act.engine.asked[0].body == body.replace(b"m-alias", b"m")
            act.gate.target = Target("m", "m", rules=RequestRules(strip=("x",), default={"n": 1}))
            client.post(body=body)
            assert (await client.answer()).status == 200
            assert act.engine.asked[1].body == b'{"model":"m","n":1}'

    asyncio.run(play())


@pytest.mark.parametrize(
    "value",
    [b"[" + b"[]," * 200_000 + b"[]]", b"[" + b'"a",' * 200_000 + b"1]", b'"' + rb"\\" * 300_000 + b'"',
     b'"' + rb"\"" * 300_000 + b'"', b'[{"text":"' + rb"\u0061" * 100_000 + b'"}]'],
)  # fmt: skip
def test_what_is_in_a_value_is_not_gone_through_by_us(value: bytes) -> None:
    """Thirty megabytes of brackets or escapes would keep a core busy for a quarter of a minute: some calls for each
    piece, and none for each bracket."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    body, turns = b'{"model": "a", "x": ' + value + b"}", parse_large_json_body(b'{"model": "a", "x": ' + value + b"}")
    sys.setprofile(count)
    try:
        for _ in turns:
            pass
    finally:
        sys.setprofile(None)
    assert read(body).model == "a"
    assert calls < len(body) // 50


def test_more_members_than_anybody_sends_are_refused() -> None:
    """Each costs a step; a request has some twenty."""
    body = b"{" + b'"a":1,' * 200_000 + b'"model":"a"}'
    assert outcome(read, body) == "the body has more than 10000 members"
