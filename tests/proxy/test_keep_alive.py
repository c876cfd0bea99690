"""``keep_alive`` and ``ttl``: a word to us about the model, which no engine gets."""

from __future__ import annotations

import asyncio
import json
import math

import pytest

from tests.proxy.fakes import Stage, reply, stage
from vllmd.config.types import RequestRules
from vllmd.errors import BadRequest
from vllmd.proxy.gate import Target
from vllmd.proxy.keep_alive import seconds
from vllmd.proxy.large import LARGE_BYTES

GOOD = [
    (300, 300.0),
    (0, 0.0),
    (1.5, 1.5),
    (-1, math.inf),
    (-0.5, math.inf),
    (10**400, 1e15),
    ("5m", 300.0),
    ("1h30m", 5400.0),
    ("1.5h", 5400.0),
    (".5s", 0.5),
    ("250ms", 0.25),
    ("3us", 3e-6),
    ("-1m", math.inf),
    ("0", 0.0),
    ("300", 300.0),
    (" -1 ", math.inf),
]


@pytest.mark.parametrize(("value", "meant"), GOOD, ids=repr)
def test_every_form_that_clients_send(value: object, meant: float) -> None:
    """Ollama's: a number of seconds or a duration as Go writes it; negative is for ever."""
    assert seconds(value, "keep_alive") == pytest.approx(meant)


@pytest.mark.parametrize("value", [True, [], {}, "", "5 m", "m", "5d", "-", "1e3", "٣s", "9" * 65, math.nan], ids=repr)
def test_what_is_none_is_refused_by_its_name(value: object) -> None:
    """And with what would be one."""
    with pytest.raises(BadRequest, match="ttl must be seconds such as 300, or a duration") as refused:
        seconds(value, "ttl")
    assert refused.value.param == "ttl"


async def sent(act: Stage, body: dict[str, object], *fields: str) -> None:
    """Ask, and wait for the answer."""
    client = await act.client()
    client.post("/v1/chat/completions", json.dumps(body).encode(), *fields)
    assert (await client.answer()).status == 200


BODIES = [
    {"model": "m", "keep_alive": "5m", "n": 1},
    {"ttl": 300, "model": "m", "n": 1},
    {"model": "m", "n": 1, "keep_alive": 300, "ttl": 7},
    {"model": "m", "n": 1, "k\u00e4": "x", "keep_alive": 300},
    {"model": "m", "metadata": {"model": "x"}, "keep_alive": 300, "n": 1},  # read member by member
    {"model": "m", "keep_alive": 300, "n": 1, "prompt": "x" * LARGE_BYTES},
    {"model": "m", "keep_alive": "5m", "n": 1, "prompt": "x" * LARGE_BYTES},
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: ",".join(body))
def test_the_field_is_taken_out_and_told_when_the_request_is_over(body: dict[str, object]) -> None:
    """Whatever way its body is read; the engine gets everything else."""

    async def play() -> None:
        async with stage(reply(b"{}")) as act:
            await sent(act, body)
            assert act.gate.kept_alive == [("m", "", 300.0)]
            (asked,) = act.engine.asked
            assert json.loads(asked.body) == {key: body[key] for key in body if key not in ("keep_alive", "ttl")}

    asyncio.run(play())


def test_a_header_says_it_for_clients_whose_bodies_are_checked() -> None:
    """Requests of one connection share what was found in their fields; the engine gets neither."""

    async def play() -> None:
        async with stage(reply(b"{}")) as act:
            client = await act.client()
            for body in (b'{"model":"m"}', b'{"model":"m"}', b'{"model":"m","keep_alive":7}'):
                client.post("/v1/chat/completions", body, "X-Vllmd-Keep-Alive: 1h")
                assert (await client.answer()).status == 200
            await sent(act, {"model": "m"})
            assert act.gate.kept_alive == [("m", "", 3600.0), ("m", "", 3600.0), ("m", "", 7.0)]
            assert not any("x-vllmd-keep-alive" in asked.headers for asked in act.engine.asked)

    asyncio.run(play())


def test_null_says_nothing_and_goes_no_further() -> None:
    """Clients write null for what they do not say."""

    async def play() -> None:
        async with stage(reply(b"{}")) as act:
            await sent(act, {"model": "m", "keep_alive": None})
            assert act.gate.kept_alive == []
            assert json.loads(act.engine.asked[0].body) == {"model": "m"}

    asyncio.run(play())


def test_beside_rules_of_the_model() -> None:
    """Both change the body."""

    async def play() -> None:
        async with stage(reply(b"{}")) as act:
            act.gate.target = Target("m", "m", rules=RequestRules(set={"temperature": 0}))
            await sent(act, {"model": "m", "ttl": 5})
            assert act.gate.kept_alive == [("m", "", 5.0)]
            assert json.loads(act.engine.asked[0].body) == {"model": "m", "temperature": 0}

    asyncio.run(play())


@pytest.mark.parametrize(
    "body", [{"keep_alive": []}, {"ttl": True}, {"keep_alive": {}, "prompt": "x" * LARGE_BYTES}], ids=list
)
def test_a_wrong_one_is_refused_before_anything_is_loaded(body: dict[str, object]) -> None:
    """The error names it."""

    async def play() -> None:
        async with stage(reply(b"{}")) as act:
            client = await act.client()
            client.post("/v1/chat/completions", json.dumps({"model": "m", **body}).encode())
            answer = await client.answer()
            assert (answer.status, answer.json()["error"]["param"]) == (400, "keep_alive")
            assert act.gate.permits == []

    asyncio.run(play())
