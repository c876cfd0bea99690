"""Any server as an engine: the template, and the calls that its options name."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllmd.config.types import ModelConfig
from vllmd.engines import engine_of
from vllmd.engines.base import Call, Launch, Listen, Place
from vllmd.errors import ConfigError
from vllmd.sizes import GiB

PLACE = Place(Path("/run/x"), ("0", "1"), GiB, 4 * GiB, port=33301)


def model(*command: str, **options: object) -> ModelConfig:
    return ModelConfig("m", engine="command", command=command, model="/w.gguf", options=options, where="a.yaml:4")


def launch(*command: str) -> Launch:
    configured = model(*command)
    return engine_of(configured).launch(configured, PLACE)


def test_the_template_is_filled_in() -> None:
    """Every variable that is documented."""
    order = launch("serve", "${MODEL}", "--name=$NAME", "-d", "${DEVICES}", "${MEMORY}/${SHARE}", "$$HOME", "-p${PORT}")
    assert order.argv == ("serve", "/w.gguf", "--name=m", "-d", "0,1", f"{GiB}/0.25", "$HOME", "-p33301")
    assert order.listen == Listen(port=33301)
    assert order.env == {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_with_a_socket_it_listens_there() -> None:
    """And needs no port."""
    assert launch("serve", "--uds", "${SOCKET}").listen == Listen(uds="/run/x/engine.sock")


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (("x", "${PROT}"), "unknown variable ${PROT} (known: ${SOCKET}, ${PORT}"),
        (("x", "cost$"), "a dollar sign is $$"),
        (("x",), "has neither ${SOCKET} nor ${PORT}"),
        (("x", "${PORT}", "${SOCKET}"), "has both"),
        ((), "is missing"),
    ],
)
def test_a_wrong_template_says_what_is_right(command: tuple[str, ...], what: str) -> None:
    """With the file and the line; nothing is started."""
    with pytest.raises(ConfigError) as error:
        launch(*command)
    assert error.value.message.startswith("a.yaml:4: models.m.command ")
    assert what in error.value.message


def test_its_options_say_what_sleep_and_wake_are() -> None:
    """One call or several, by level."""
    configured = model(
        "x", "${PORT}", sleep={1: {"path": "/free"}}, wake={"1": [{"path": "/load", "json": {"a": 1}, "timeout": 9}]}
    )
    engine = engine_of(configured)
    assert engine.sleep_levels(configured) == {1}
    assert engine.sleep(1, freeze=False) == (Call("POST", "/free"),)
    assert engine.wake(1) == (Call("POST", "/load", json={"a": 1}, timeout=9),)
    assert engine.asleep() is None


def test_its_defaults_are_those_of_an_openai_server() -> None:
    """Without options it cannot sleep, and is asked at /health."""
    configured = model("x", "${PORT}")
    engine = engine_of(configured)
    assert engine.sleep_levels(configured) == frozenset()
    assert engine.ready(configured).path == "/health"
    assert "/v1/chat/completions" in engine.routes(configured)
    assert engine.served_name(configured) == "m"


def test_what_it_serves_and_under_which_name_can_be_said() -> None:
    """Servers that know their model by a name of their own."""
    configured = model("x", "${PORT}", routes=["/v1/embeddings"], served_name="default", health="/ok", asleep="/s")
    engine = engine_of(configured)
    assert engine.routes(configured) == {"/v1/embeddings"}
    assert engine.served_name(configured) == "default"
    assert engine.ready(configured).path == "/ok"
    assert engine.asleep() == Call("GET", "/s", timeout=5.0)


@pytest.mark.parametrize(
    "options",
    [
        {"sleep": {1: {"path": "/free"}}},
        {"sleep": {3: {"path": "/free"}}, "wake": {3: {"path": "/load"}}},
        {"sleep": {1: "/free"}, "wake": {1: {"path": "/load"}}},
        {"sleep": {1: {"path": "/free", "when": "now"}}, "wake": {1: {"path": "/load"}}},
        {"nap": True},
        {"health": 200},
    ],
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    """A sleeper that nobody could wake, a level that is none, a call that is none."""
    with pytest.raises(ConfigError, match=r"a\.yaml:4: models\.m\.options\."):
        engine_of(model("x", "${PORT}", **options))


def test_its_last_words_are_the_reason() -> None:
    """Whatever it is, that is all there is to say."""
    failure = engine_of(model("x", "${PORT}")).failure(["loading", "CUDA error: out of memory", ""])
    assert (failure.reason, failure.memory) == ("CUDA error: out of memory", True)
