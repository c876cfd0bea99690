"""Show the last requests, one of them closely, or all as they end.

"requests show ID" tells where the time of one went, and with --curl how to send
it again; its body is known only while somebody has bodies recorded, see record.
Times: WAIT, until it was sent to an engine (load: while its model started or
woke, queue: the rest); FIRST, to the first byte of its answer; TOTAL, to its end.
"""

from __future__ import annotations

import argparse
import shlex
import time

from vllmd.api.answers import RequestEntry, RequestInFull, Requests, RequestTokens
from vllmd.api.codec import encoded
from vllmd.api.verbs import verb
from vllmd.cli import show
from vllmd.cli.admin import Admin, decoded, understood
from vllmd.cli.failures import EX_NOINPUT, EX_USAGE, Failure
from vllmd.cli.verbs.events import moment

HEAD = ("WHEN", "STATUS", "MODEL", "WAIT", "FIRST", "TOTAL", "TOKENS", "KEY", "ID", "NOTE")
RIGHT = ("WAIT", "FIRST", "TOTAL", "TOKENS")
NOT_SENT = frozenset({"content-type", "user-agent", "accept", "connection"})


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="show ID", help="this one request, by its x-request-id")
    parser.add_argument("-m", "--model", help="of this model only")
    parser.add_argument("-k", "--of-key", metavar="NAME", help="of the key with this name only; - is nobody's")
    parser.add_argument("-s", "--status", help="with this status only, such as 429 or 5xx")
    parser.add_argument("--since", metavar="TIME", help="that came since then: 90m, 12h, 2d, or Unix time")
    parser.add_argument("--failed", action="store_true", help="only those that failed")
    parser.add_argument("--slower", type=float, metavar="SECONDS", help="only those that took so long or longer")
    parser.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="the last N (default: 20)")
    parser.add_argument("-f", "--follow", action="store_true", help="then show requests as they end")
    parser.add_argument("--curl", action="store_true", help="of one: the command that sends it again")


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    if arguments.words:
        return show_one(admin, arguments)
    if arguments.curl:
        raise Failure("say which: vllmctl requests show ID --curl", EX_USAGE)
    query = {"model": arguments.model, "key": arguments.of_key, "status": arguments.status, "since": arguments.since,
             "failed": arguments.failed, "slower": arguments.slower}  # fmt: skip
    last = admin.perform(verb("requests"), Requests, {**query, "limit": max(0, arguments.lines)})
    if arguments.json and not arguments.follow:
        print(show.as_json(last))
        return 0
    entries = [*reversed(last.requests), *last.under_way]
    if entries and not arguments.json:
        print(table(entries))
    elif not arguments.json and not arguments.follow:
        show.say("no such request among the last ones" if any(query.values()) else "there was no request yet")
    if arguments.follow:
        for line in admin.lines("GET", "/admin/events/requests", "text/event-stream", **query):
            if line.startswith("data: "):
                entry = understood(RequestEntry, decoded(line.removeprefix("data: ")))
                if arguments.json:
                    print(encoded(entry).decode(), flush=True)
                else:
                    show.say("  ".join(row(entry, time.time())).rstrip())
    return 0


def show_one(admin: Admin, arguments: argparse.Namespace) -> int:
    """``requests show ID``: one request with its head, or the command that sends it again."""
    if len(arguments.words) != 2 or arguments.words[0] != "show":
        raise Failure("vllmctl requests lists them, vllmctl requests show ID shows one", EX_USAGE)
    entry = admin.perform(verb("request"), RequestInFull, {"request_id": arguments.words[1]})
    if arguments.curl:
        print(curl(entry, admin.url or "http://127.0.0.1:33258"))
    elif arguments.json:
        print(show.as_json(entry))
    else:
        show.say(closely(entry))
    return 0


def table(entries: list[RequestEntry]) -> str:
    """The requests as a table, a row for each."""
    now = time.time()
    return show.table(
        HEAD, [row(each, now) for each in entries], RIGHT, names=("MODEL",), beneath=("KEY", "ID", "NOTE")
    )


def row(entry: RequestEntry, now: float) -> tuple[str, ...]:
    """A request as a row of the table."""
    queue, load = entry.queue_seconds, entry.load_seconds
    return (
        moment(entry.at, now),
        str(entry.status or "-"),
        entry.model or show.EMPTY,
        seconds(None if queue is None or load is None else queue + load),
        seconds(entry.first_byte_seconds),
        seconds(entry.seconds),
        tokens(entry.tokens),
        entry.key or show.EMPTY,
        entry.id,
        show.first_line(entry.message),
    )


def seconds(value: float | None) -> str:
    """A time as tables show it: ``0.012s``, ``1.2s``, ``3m05s``."""
    if value is None:
        return show.EMPTY
    return f"{value:.3f}s" if value < 1 else f"{value:.1f}s" if value < 100 else show.age(value)


def tokens(count: RequestTokens | None) -> str:
    """Tokens in and out, ``120+34``, with ``~`` before estimated ones."""
    return f"{'~' * count.estimated}{count.prompt}+{count.answer}" if count else show.EMPTY


def closely(entry: RequestInFull) -> str:
    """A request with everything in its record."""
    lines = [
        f"{entry.method} {entry.path}",
        f"id {entry.id}, {moment(entry.at, time.time())}, from {entry.client}"
        + (f" with the key {entry.key}" if entry.key else ""),
        f"model {entry.model or show.EMPTY}" + (f", sent to {entry.replica}" if entry.replica else "")
        + (f" at the attempt number {entry.retries + 1}" if entry.retries else ""),
        f"status {entry.status or 'none yet'}"
        + (f", {entry.error}: {entry.message}" if entry.error else ""),
        f"queue {seconds(entry.queue_seconds)}, load {seconds(entry.load_seconds)}, "
        f"first byte {seconds(entry.first_byte_seconds)}, total {seconds(entry.seconds)}"
        + ("" if entry.number else " so far"),
        f"received {entry.received} bytes, sent {entry.sent}{', as a stream' * entry.stream}",
    ]  # fmt: skip
    took = entry.tokens
    if took:
        cached = f" ({took.cached} of them cached)" if took.cached else ""
        lines.append(f"tokens: {took.prompt} in{cached}, {took.answer} out"
                     + (", estimated from sizes" if took.estimated else ""))  # fmt: skip
    lines += ["", *(f"{name}: {value}" for name, value in entry.headers)]
    if entry.recorded:
        kept = entry.recorded
        for which, body, cut in (("request", kept.request, kept.request_cut), ("answer", kept.answer, kept.answer_cut)):
            lines += ["", f"-- {which}{' (its beginning)' * cut}", body]
    elif entry.bodies:
        lines += ["", "its bodies were recorded; only administrators are shown them"]
    else:
        lines += ["", "its bodies were not recorded; vllmctl record has those of later ones kept"]
    return "\n".join(lines)


def curl(entry: RequestInFull, url: str) -> str:
    """The command that sends it again. Raises Failure where its body is not known."""
    recorded = entry.recorded
    if entry.method != "GET" and (not recorded or recorded.request_cut):
        why = "was recorded in part only" if recorded else "was not recorded (vllmctl record has later ones kept)"
        raise Failure(f"it cannot be sent again: its body {why}", EX_NOINPUT)
    command = ["curl", "-N", url + entry.path, "-X", entry.method, "-H", "Content-Type: application/json"]
    for name, value in entry.headers:
        if name not in NOT_SENT and value != "(cut)":
            command += ["-H", f"{name}: {value}"]
    if recorded:
        command += ["--data-raw", recorded.request]
    key = ' -H "Authorization: Bearer $VLLMD_API_KEY"' if entry.key else ""
    return shlex.join(command) + key  # what a client wrote is quoted: whoever pastes it runs nothing of it
