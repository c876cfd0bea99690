"""Spans of requests: what belongs to whose trace, what a request's time is divided into, and that nobody waits."""

from __future__ import annotations

import logging

import pytest

from tests.records.otlp import attributes, collector
from vllmd.daemon import spans
from vllmd.daemon.spans import Part, Spans, parent_of, parts_of
from vllmd.proxy.account import Trace
from vllmd.proxy.http import Headers, Peer, Request
from vllmd.proxy.tokens import Tokens
from vllmd.records.ring import Entry

TRACE, PARENT, OWN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "1122334455667788"
GONE = Entry(
    7, 1000.0, "r-1", "POST", "/v1/chat/completions", "/v1/chat/completions", "m", "", "alice", Peer(), 499,
    "ClientGone", "", False, 10, 0, None, 0.0, None, 2.0, 0, None, b"",
)  # fmt: skip
SERVED = GONE._replace(
    status=200, error="", replica="m@2", waited=3.0, loading=2.0, first_byte=3.5, seconds=5.0, sends=1,
    tokens=Tokens(8, 4),
)  # fmt: skip


def request(*fields: tuple[str, str]) -> Request:
    return Request("POST", "/", "/", "", Headers([(name.encode(), value.encode()) for name, value in fields]), Peer())


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        (f"00-{TRACE}-{PARENT}-01", (TRACE, PARENT, True)),
        (f" 00-{TRACE}-{PARENT}-00", (TRACE, PARENT, False)),
        (f"00-{TRACE}-{PARENT}-03", (TRACE, PARENT, True)),
        (f"cc-{TRACE}-{PARENT}-01-later", (TRACE, PARENT, True)),  # of a later version, which adds to its end
        (f"00-{TRACE}-{PARENT}-01-later", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        ("00-1-2-01", None),
        ("", None),
    ],
)
def test_a_traceparent_is_read_as_w3c_has_it(field: str, meant: tuple[str, str, bool] | None) -> None:
    """A field that is none begins a trace of our own, and never breaks a request."""
    assert parent_of(field) == meant


def test_the_client_decides_whether_its_request_is_traced() -> None:
    """The share is only for clients that say nothing of it."""
    none, every = Spans("http://127.0.0.1:1", 0.0), Spans("http://127.0.0.1:1", 1.0)
    sampled, not_sampled = (request(("traceparent", f"00-{TRACE}-{PARENT}-{flag}")) for flag in ("01", "00"))
    trace = none.begin(sampled)
    assert trace is not None
    assert (trace.trace_id, trace.parent) == (TRACE, PARENT)
    assert trace.span_id not in (PARENT, "0" * 16) and len(trace.span_id) == 16
    assert every.begin(not_sampled) is None
    assert none.begin(request()) is None
    own = every.begin(request())
    assert own is not None
    assert (len(own.trace_id), own.parent) == (32, "")
    assert own.field == f"00-{own.trace_id}-{own.span_id}-01"


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        (SERVED, [("queue", 0, 1), ("load", 1, 3), ("first byte", 3, 3.5), ("answer", 3.5, 5)]),
        (SERVED._replace(loading=0.0), [("queue", 0, 3), ("first byte", 3, 3.5), ("answer", 3.5, 5)]),
        # Comments while it loads are bytes, but none of the answer's.
        (SERVED._replace(first_byte=0.5), [("queue", 0, 1), ("load", 1, 3), ("first byte", 3, 3), ("answer", 3, 5)]),
        (SERVED._replace(first_byte=None), [("queue", 0, 1), ("load", 1, 3), ("first byte", 3, 5)]),
        (GONE, [("queue", 0, 2)]),
    ],
)
def test_a_requests_time_is_divided_without_a_gap(entry: Entry, parts: list[tuple[str, float, float]]) -> None:
    """The parts follow one another from the request to its end, however far it came."""
    assert list(parts_of(entry)) == [Part(*part) for part in parts]
    assert [b for _, _, b in parts[:-1]] == [a for _, a, _ in parts[1:]]


def test_a_collector_gets_one_trace_of_a_request() -> None:
    """The request under the client's span, its parts under the request, with the names that others have for them."""
    with collector() as at:
        sender = Spans(at.url, 1.0)
        sender.note(SERVED, Trace(TRACE, OWN, PARENT))
        sender.close()
    assert at.asked == ["/v1/traces"]
    whole, *inner = at.spans
    assert (whole.name, whole.trace_id.hex(), whole.span_id.hex(), whole.parent_span_id.hex()) == (
        "POST /v1/chat/completions", TRACE, OWN, PARENT
    )  # fmt: skip
    assert (whole.start_time_unix_nano, whole.end_time_unix_nano) == (1000 * 10**9, 1005 * 10**9)
    assert [span.name for span in inner] == ["queue", "load", "first byte", "answer"]
    assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in inner} == {(TRACE, OWN)}
    told = attributes(whole)
    assert (told["gen_ai.request.model"], told["gen_ai.usage.output_tokens"], told["vllmd.replica"]) == ("m", 4, "m@2")
    assert told["http.response.status_code"] == 200 and "error.type" not in told
    assert at.resource["service.name"] == "vllmd"
    assert (sender.sent, sender.dropped) == (1, 0)


def test_a_failed_request_says_why() -> None:
    """A client that left is no failure of ours."""
    failed = SERVED._replace(status=502, error="UpstreamFailed", message="the engine broke off")
    with collector() as at:
        sender = Spans(at.url, 1.0)
        sender.note(failed, Trace(TRACE, OWN, ""))
        sender.note(GONE, Trace(TRACE, PARENT, ""))
        sender.close()
    first, second = at.named("POST /v1/chat/completions")
    assert (first.status.code, first.status.message) == (2, "the engine broke off")
    assert (second.status.code, attributes(second)["error.type"]) == (0, "ClientGone")
    assert first.parent_span_id == b""


def test_a_collector_that_refuses_costs_spans_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """They are counted, and it is said once."""
    caplog.set_level(logging.WARNING, "vllmd.records")
    with collector() as at:
        at.status = 400
        sender = Spans(at.url + "/v1/traces", 1.0)
        sender.note(SERVED, Trace(TRACE, OWN, ""))
        sender.note(SERVED, Trace(TRACE, OWN, ""))
        sender.close()
    assert (sender.sent, sender.dropped) == (0, 2)
    assert [record.message for record in caplog.records] == [
        f"spans cannot be sent to {at.url}/v1/traces: it did not take them"
    ]


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that hangs fills no memory: what does not fit is dropped at once."""
    monkeypatch.setattr(spans, "MOST_WAITING", 3)
    sender = Spans("http://127.0.0.1:1", 1.0)
    sender._thread = object()  # type: ignore[assignment]  # which takes nothing
    for _ in range(5):
        sender.note(SERVED, Trace(TRACE, OWN, ""))
    assert sender.dropped == 2
