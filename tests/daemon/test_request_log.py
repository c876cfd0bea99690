"""What the log says of a request that has ended."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllmd.daemon import listeners
from vllmd.errors import UpstreamFailed
from vllmd.proxy.peers import Impostor
from vllmd.proxy.upstream import OutOfFiles

REQUEST = SimpleNamespace(id="r1", method="POST", path="/v1/chat/completions")


@pytest.mark.parametrize(
    ("status", "error", "message", "told"),
    [
        (503, "EngineFailed", "m: no such file", "POST /v1/chat/completions for m: 503 EngineFailed: m: no such file"),
        (200, "UpstreamFailed", "it broke off", "POST /v1/chat/completions for m: 200 UpstreamFailed: it broke off"),
        (502, "", "", "POST /v1/chat/completions for m: 502"),
        (200, "", "", ""),
        (200, "ClientGone", "", ""),
        (404, "UnknownModel", "model 'x' does not exist", ""),
    ],
)
def test_what_failed_is_in_the_log_with_its_model_and_its_cause(
    caplog: pytest.LogCaptureFixture, status: int, error: str, message: str, told: str
) -> None:
    """An answer that broke off has status 200; what clients get wrong, or no longer want, is no failure."""
    exchange: Any = SimpleNamespace(
        request=REQUEST, model="m", status=status, error=error, message=message, elapsed=1.0
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "vllmd"):
        listeners.log_ended(exchange)
    assert caplog.messages == [told] * bool(told)
    if told:
        assert caplog.records[0].__dict__["journal"]["MODEL"] == "m"


def kinds(of: type[Exception]) -> Iterator[type[Exception]]:
    """The class and all below it that the daemon has."""
    yield of
    for each in of.__subclasses__():
        yield from kinds(each)


def test_what_fails_at_an_engine_counts_against_it() -> None:
    """Health goes by these names, and a new kind of failure must not go missing there.

    Not the engine's: that we can open no more files, and that another process is in its place.
    """
    names = {each.__name__ for each in kinds(UpstreamFailed) if each.__module__.startswith("vllmd.proxy.")}
    assert names | {"UpstreamFailed"} == listeners.ENGINES_FAULTS | {OutOfFiles.__name__, Impostor.__name__}
