"""What the log says of a request that has ended."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from vllmd.daemon import listeners
from vllmd.errors import UpstreamFailed
from vllmd.proxy import upstream

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


def test_an_engine_is_to_blame_for_every_lost_connection_that_is_not_our_fault() -> None:
    """A request that failed so has the engine looked at. Not for want of our files, or by somebody else's process."""
    kinds = [kind for kind in vars(upstream).values() if isinstance(kind, type) and issubclass(kind, UpstreamFailed)]
    assert {kind.__name__ for kind in kinds} - listeners.ENGINES_FAULTS == {"OutOfFiles", "Impostor"}
