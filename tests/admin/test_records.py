"""One daemon, looked into: its last requests, recorded bodies, who used how much, and its access log."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.admin.site import Site, running, until
from tests.records.otlp import attributes, collector
from vllmd.simengine.device import make_device

GiB = 1 << 30
WORDS = "one two three four five six seven eight nine"
CONFIG = """
devices: [{{memory: 80GiB, file: {device}}}]
auth:
  keys:
    - {{name: alice, key: a-secret-key-of-alice}}
    - {{name: bob, key: b-secret-key-of-bob, models: [small]}}
    - {{name: looker, key: looker-secret, scopes: [read]}}
    - {{name: boss, key: boss-secret, scopes: [admin]}}
records: {{access_log: {log}}}
models:
  small: {{engine: sim, gpu_memory: 20GiB, aliases: [s], options: {{load_time: 0.3s}}}}
  slow: {{engine: sim, gpu_memory: 20GiB, options: {{load_time: 1s}}}}
  endless: {{engine: sim, gpu_memory: 20GiB, concurrency: 1, options: {{load_time: 0.1s, tokens_per_second: 1}}}}
  deaf: {{engine: sim, gpu_memory: 10GiB, options: {{load_time: 0.1s, fail: hang}}}}
"""
ALICE, BOB, LOOKER, BOSS = "a-secret-key-of-alice", "b-secret-key-of-bob", "looker-secret", "boss-secret"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("records")
    make_device(folder / "gpu", 80 * GiB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLMD_USAGE", str(folder / "state" / "usage.db"))
        patch.setenv("VLLMD_KEYS", str(folder / "state" / "keys.json"))
        config = CONFIG.format(device=folder / "gpu", log=folder / "access.log")
        with running(folder, config) as found:
            yield found


def requests(site: Site, query: str = "", key: str = BOSS) -> list[dict[str, Any]]:
    answer = site.ask("GET", f"/admin/requests{query}", key=key)
    assert answer.status == 200, answer.text
    return list(answer.json["requests"])


def one(site: Site, request_id: str, key: str = BOSS) -> Any:
    return site.ask("GET", f"/admin/requests/{request_id}", key=key).json


def chat(site: Site, key: str, request_id: str, text: object = WORDS, **more: object) -> Any:
    headers = {"X-Request-Id": request_id, "User-Agent": "test/1", "X-Private-Token": "very-secret"}
    body = {"model": "small", "messages": [{"role": "user", "content": text}], **more}
    answer = site.ask("POST", "/v1/chat/completions", body, key=key, headers=headers)
    assert answer.status == 200, answer.text
    return answer


def test_a_request_can_be_looked_into(site: Site) -> None:
    """Where its time went, what it took, to whom it went; its head without secrets; never a body unasked."""
    chat(site, ALICE, "first", stream=True, max_tokens=7)
    told = one(site, "first")
    assert (told["model"], told["replica"], told["key"], told["status"]) == ("small", "small", "alice", 200)
    assert told["load_seconds"] >= 0.25  # it had to be started
    assert 0 <= told["queue_seconds"] < told["load_seconds"] <= told["first_byte_seconds"] <= told["seconds"]
    assert told["tokens"]["answer"] == 7
    assert told["tokens"]["estimated"] is False
    assert (told["stream"], told["retries"], told["bodies"], told["recorded"]) == (True, 0, False, None)
    fields = dict(map(tuple, told["headers"]))
    assert fields["user-agent"] == told["agent"] == "test/1"
    assert fields["x-private-token"] == "(cut)"
    assert "authorization" not in fields
    assert ALICE not in json.dumps(told)
    chat(site, ALICE, "second")
    assert one(site, "second")["load_seconds"] == 0  # it was there


@pytest.mark.parametrize(
    ("given", "fits"),
    [("a/...", True), ("<b>/?#%2F", True), ("/", True), (".a", True), ("[]", True)]
    + [(given, False) for given in ("..", "a/../b", "a/.", "a\\b")],
)
def test_a_request_is_found_by_any_id_that_its_client_gave_it(site: Site, given: str, fits: bool) -> None:
    """Else a client could choose one that nobody can look into. No path has dot segments or a backslash."""
    taken = chat(site, ALICE, given).headers["x-request-id"]
    assert (taken == given) is fits
    assert one(site, quote(taken, safe=""))["id"] == taken
    refused = site.ask("DELETE", f"/admin/requests/{quote(taken, safe='')}", key=BOSS)
    assert refused.status == 404 and "under way" in refused.error


def test_requests_are_found_by_what_is_known_of_them(site: Site) -> None:
    """By model, key, status, time; failed ones with the reason."""
    chat(site, ALICE, "ok")
    assert site.ask("POST", "/v1/chat/completions", {"model": "nope", "messages": []}, key=ALICE).status == 404
    assert requests(site)[0]["status"] == 404
    assert "nope" in requests(site, "?failed=true")[0]["message"]
    assert requests(site, "?status=4xx")[0]["error"] == "UnknownModel"
    assert {each["key"] for each in requests(site, "?key=alice")} == {"alice"}
    assert [each["id"] for each in requests(site, "?model=small&limit=1")] == ["ok"]
    assert requests(site, "?since=2100000000") == []
    assert requests(site, "?since=1h&slower=0.0")
    assert requests(site, "?slower=1000") == []
    for query, wrong in (
        ("?status=9", "status"),
        ("?since=soon", "since"),
        ("?failed=x", "failed"),
        ("?limit=-1", "limit"),
    ):
        answer = site.ask("GET", f"/admin/requests{query}", key=BOSS)
        assert (answer.status, answer.json["error"]["param"]) == (400, wrong)
    assert site.ask("GET", "/admin/requests/none", key=BOSS).status == 404
    assert site.ask("GET", "/admin/requests", key=ALICE).status == 403


def test_what_is_under_way_is_shown(site: Site) -> None:
    """A stream that goes on: who waits for what, for how long."""
    connection = site.connect()
    headers = {"Authorization": f"Bearer {ALICE}", "Content-Type": "application/json", "X-Request-Id": "waits"}
    connection.request("POST", "/v1/completions", json.dumps({"model": "slow", "prompt": "hi"}), headers)
    line: dict[str, Any] = {}

    def seen() -> bool:
        lines = site.ask("GET", "/admin/requests?model=slow", key=BOSS).json["under_way"]
        line.update(lines[0] if lines else {})
        return bool(lines)

    until(seen)
    assert (line["id"], line["key"], line["status"], line["queue_seconds"]) == ("waits", "alice", 0, None)
    alone = site.ask("GET", "/admin/requests/waits", key=BOSS).json
    assert (alone["number"], alone["recorded"]) == (0, None)
    assert connection.getresponse().status == 200
    connection.close()
    assert one(site, "waits")["load_seconds"] > 0.5


def begin(site: Site, request_id: str, **more: object) -> HTTPConnection:
    """A request to the model whose answers take for ever; it is sent, and its answer not waited for."""
    connection = site.connect()
    headers = {"Authorization": f"Bearer {ALICE}", "Content-Type": "application/json", "X-Request-Id": request_id}
    headers["User-Agent"] = "mine/2 (x)"
    body = {"model": "endless", "prompt": WORDS, "max_tokens": 1000, "min_tokens": 1000, **more}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def under_way(site: Site) -> dict[str, Any]:
    """Those for that model, by id."""
    told = site.ask("GET", "/admin/requests?model=endless", key=BOSS).json["under_way"]
    return {each["id"]: each for each in told}


def test_one_request_is_cancelled_and_nothing_else(site: Site) -> None:
    """One whose answer has begun is broken off and its engine is free at once, so that the next one runs; one that
    waits leaves its queue with an error that clients do not try again after. Whoever only looks on may not.
    """
    with closing(begin(site, "runs", stream=True)) as running, closing(begin_waiting(site, "runs", "waits")) as waiting:
        answer = running.getresponse()
        assert answer.status == 200
        assert answer.readline().startswith(b"data: ")
        assert dict(site.ask("GET", "/admin/requests/runs", key=LOOKER).json["headers"])["user-agent"] == "mine/2 (x)"
        refused = site.ask("DELETE", "/admin/requests/runs", key=LOOKER)
        assert refused.status == 403
        assert {each["id"]: each["agent"] for each in under_way(site).values()} == {
            "runs": "mine/2 (x)",
            "waits": "mine/2 (x)",
        }
        told = site.ask("DELETE", "/admin/requests/waits", key=BOSS).json["cancelled"]
        assert [(each["id"], each["status"]) for each in told] == [("waits", 0)]
        error = waiting.getresponse()
        assert (error.status, json.loads(error.read())["error"]["code"]) == (403, "request_cancelled")
        assert set(under_way(site)) == {"runs"}
        with closing(begin_waiting(site, "runs", "next", stream=True)) as after:
            assert site.ask("DELETE", "/admin/requests/runs", key=BOSS).status == 200
            with pytest.raises((IncompleteRead, ConnectionError)):
                answer.read()
            assert after.getresponse().status == 200, "the place of the one that was broken off is taken"
            assert running_in_engine(site) == 1
            assert site.ask("DELETE", "/admin/requests/next", key=BOSS).status == 200
    until(lambda: not running_in_engine(site))
    ended = one(site, "runs")
    assert (ended["status"], ended["error"]) == (200, "RequestCancelled")
    assert site.ask("DELETE", "/admin/requests/runs", key=BOSS).status == 404, "it is over"


def begin_waiting(site: Site, first: str, request_id: str, **more: object) -> HTTPConnection:
    """One that comes once the ``first`` has its place."""
    until(lambda: under_way(site).get(first, {}).get("queue_seconds") is not None)
    connection = begin(site, request_id, **more)
    until(lambda: request_id in under_way(site))
    return connection


def running_in_engine(site: Site) -> float:
    """How many requests the engine itself says that it answers."""
    lines = site.ask("GET", "/metrics?model=endless", key=BOSS).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_bodies_are_recorded_only_when_asked_for(site: Site) -> None:
    """Of a model or a key, for a time; files and secrets cut; said to the client; shown to administrators alone."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    assert "x-vllmd-recorded" not in chat(site, ALICE, "before", "unrecorded").headers
    begun = site.ask("POST", "/admin/recordings", {"key": "alice", "seconds": 60, "most_bytes": 4000}, key=BOSS).json
    assert begun["recordings"][0]["key"] == "alice"
    body = [{"type": "text", "text": "look, sk-abcdefghijklmnopqrstuvwx"}, picture]
    answer = chat(site, ALICE, "seen", body, password="hunter2", stream=True, max_tokens=3)
    assert answer.headers["x-vllmd-recorded"] == "bodies"
    shown = one(site, "seen")["recorded"]
    assert "look, (cut)" in shown["request"]
    assert "(5000 bytes cut)" in shown["request"]
    assert "hunter2" not in shown["request"]
    assert shown["answer"].startswith("data: {")
    assert shown["answer"].rstrip().endswith("[DONE]")
    assert one(site, "seen", LOOKER)["recorded"] is None
    assert one(site, "seen", LOOKER)["bodies"] is True
    assert site.ask("POST", "/admin/recordings", {"key": "bob"}, key=LOOKER).status == 403
    chat(site, BOB, "not-hers")
    assert one(site, "not-hers")["bodies"] is False
    ended = site.ask("DELETE", "/admin/recordings", key=BOSS).json
    assert ended == {"recordings": [], "requests": 0, "bytes": 0}
    assert one(site, "seen")["recorded"] is None
    for wrong in ({}, {"model": 1}, {"model": "small", "seconds": 0}, {"model": "small", "x": 1}):
        assert site.ask("POST", "/admin/recordings", wrong, key=BOSS).status == 400
    assert "hunter2" not in site.log
    assert "hunter2" not in (site.folder / "access.log").read_text()


def usage(site: Site, query: str = "", key: str = BOSS) -> list[dict[str, Any]]:
    answer = site.ask("GET", f"/admin/usage{query}", key=key)
    assert answer.status == 200, answer.text
    return list(answer.json["rows"])


def test_use_is_added_up(site: Site) -> None:
    """By key, model and day; what an idle model holds belongs to whoever used it last."""
    before = {row["key"]: row for row in usage(site)}.get("bob", {"requests": 0, "answer": 0})
    chat(site, BOB, "counted", stream=True, max_tokens=5)
    after = {row["key"]: row for row in usage(site)}["bob"]
    assert after["requests"] == before["requests"] + 1
    assert after["answer"] == before["answer"] + 5
    assert after["engine_seconds"] > 0
    until(lambda: {row["key"]: row for row in usage(site)}["bob"]["device_seconds"] > 0, 30)
    held = {row["key"]: row for row in usage(site, "?model=small")}["bob"]
    assert held["memory_mib_seconds"] == pytest.approx(held["device_seconds"] * 80 * 1024, rel=0.01)  # of one device
    assert usage(site, "?by=model,day&key=bob")[0]["model"] == "small"
    assert usage(site, "?by=key&since=2100000000&until=2100000001") == []
    assert site.ask("GET", "/admin/usage?by=colour", key=BOSS).status == 400
    assert site.ask("GET", "/admin/usage", key=ALICE).status == 403


def test_arrivals_can_be_taken_away(site: Site) -> None:
    """As ``simulate`` reads them; without names where they go elsewhere."""
    chat(site, BOB, "arrived", max_tokens=2)
    lines = [json.loads(line) for line in site.ask("GET", "/admin/trace", key=BOSS).text.splitlines()]
    assert (lines[-1]["model"], lines[-1]["output"], lines[-1]["key"]) == ("small", 2, "bob")
    assert abs(lines[-1]["time"] - time.time()) < 60
    hidden = site.ask("GET", "/admin/trace?anonymised=true", key=BOSS).text
    assert "bob" not in hidden
    assert json.loads(hidden.splitlines()[0])["time"] == 0


def test_the_access_log_has_a_line_for_each(site: Site) -> None:
    """Written in batches; where it was moved away it begins anew."""
    path = site.folder / "access.log"
    chat(site, ALICE, "logged-1")
    until(lambda: path.exists() and "logged-1" in path.read_text())
    path.rename(site.folder / "access.log.1")
    chat(site, ALICE, "logged-2")
    until(lambda: path.exists() and "logged-2" in path.read_text())
    line = json.loads(path.read_text().splitlines()[-1])
    assert (line["id"], line["key"], line["status"]) == ("logged-2", "alice", 200)


def test_a_locked_store_costs_no_request(site: Site) -> None:
    """It is said once, and what was used meanwhile is written afterwards."""
    chat(site, ALICE, "before-the-lock")
    before = {row["key"]: row for row in usage(site)}["alice"]["requests"]
    other = sqlite3.connect(site.folder / "state" / "usage.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    chat(site, ALICE, "while-locked")
    until(lambda: "requests are served all the same" in site.log)
    assert "locked" in site.ask("GET", "/admin/usage", key=BOSS).json["trouble"]
    assert "locked" in site.ask("GET", "/admin/status", key=BOSS).json["unwritten"]  # which vllmctl status shows
    assert "vllmd_usage_written 0.0" in site.ask("GET", "/metrics").text
    other.execute("ROLLBACK")
    other.close()
    assert {row["key"]: row for row in usage(site)}["alice"]["requests"] == before + 1
    assert "vllmd_usage_written 1.0" in site.ask("GET", "/metrics").text
    assert site.log.count("requests are served all the same") == 1


def test_a_watcher_is_told_the_newest_where_many_end(site: Site) -> None:
    """Nobody reads hundreds in a second, and writing them would cost the requests themselves."""
    connection = site.connect(admin=True)
    with closing(connection):
        connection.request("GET", "/admin/events/requests?model=small")
        stream = connection.getresponse()
        assert stream.readline().startswith(b":")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: chat(site, ALICE, f"flood-{number}", max_tokens=1), range(120)))
        chat(site, ALICE, "the-last")
        seen = []
        while "the-last" not in seen:
            line = stream.readline()
            assert line
            if line.startswith(b"data: "):
                seen.append(json.loads(line.removeprefix(b"data: "))["id"])
    assert len(seen) == len(set(seen)) <= 121


def test_spans_go_to_a_collector(site: Site) -> None:
    """From the configuration's next reload on, under the client's own trace; one that does not listen costs nothing."""
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    before = site.config.read_text()
    with collector() as at:
        try:
            site.reconfigure(before.replace("records: {", f"records: {{spans: {at.url}, spans_share: 0, "))
            chat(site, ALICE, "unasked")
            body = {"model": "small", "prompt": WORDS, "max_tokens": 3}
            fields = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "traced"}
            assert site.ask("POST", "/v1/completions", body, key=ALICE, headers=fields).status == 200
            until(lambda: at.named("POST /v1/completions"))
            until(lambda: 'vllmd_traced_requests_total{outcome="sent"} 1.0' in site.ask("GET", "/metrics").text)
        finally:
            site.reconfigure(before)
    (span,) = at.named("POST /v1/completions")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace, parent)
    assert attributes(span)["vllmd.request_id"] == "traced"
    assert not at.named("POST /v1/chat/completions")


def test_ollamas_requests_are_noted_too(site: Site) -> None:
    """In its words on the outside, as one request."""
    body = {"model": "small", "messages": [{"role": "user", "content": WORDS}], "options": {"num_predict": 4}}
    answer = site.ask("POST", "/api/chat", body, key=ALICE, headers={"X-Request-Id": "as-ollama"})
    assert answer.status == 200
    told = one(site, "as-ollama")
    assert (told["path"], told["model"], told["tokens"]["answer"]) == ("/api/chat", "small", 4)
    assert len([each for each in requests(site) if each["id"] == "as-ollama"]) == 1


@pytest.mark.parametrize("path", ["/admin/events", "/admin/events/requests", "/admin/logs/small?follow=true"])
def test_what_an_operator_follows_ends_with_his_key(site: Site, path: str) -> None:
    """A stream that was opened before the key was revoked would go on telling for days; who reconnects is refused."""
    site.operate("POST", "/admin/models/small/load?wait=true")
    made = site.operate("POST", "/admin/keys", {"name": "leaver", "settings": {"scopes": ["read"]}})["key"]
    field = {"Authorization": f"Bearer {made}"}
    connection = site.connect()
    with closing(connection):
        connection.request("GET", path, headers=field)
        stream = connection.getresponse()
        assert (stream.status, stream.readline() != b"") == (200, True)
        site.operate("DELETE", "/admin/keys/leaver")
        with pytest.raises(IncompleteRead):  # broken off, so that nobody takes it for the end of what there is
            stream.read()
    assert site.ask("GET", path, headers=field).status == 401


def test_a_key_is_made_limited_and_revoked(site: Site) -> None:
    """Each at once, without a reload, and a reload leaves it as it is."""
    made = site.operate("POST", "/admin/keys", {"name": "carol", "settings": {"models": ["small"]}})
    chat(site, made["key"], "carols")
    assert one(site, "carols")["key"] == "carol"
    site.operate("POST", "/admin/keys/carol/limits", {"settings": {"tokens_per_day": 1}})
    refused = site.chat("small", made["key"])
    assert (refused.status, "tokens per day" in refused.error) == (429, True)
    assert 0 < int(refused.headers["retry-after"]) <= 86400
    site.operate("POST", "/admin/keys/carol/limits", {"settings": {"tokens_per_day": None}})
    assert site.chat("small", made["key"]).status == 200
    site.operate("POST", "/admin/reload")
    assert site.chat("small", made["key"]).status == 200
    assert "carol" in [key["name"] for key in site.operate("GET", "/admin/keys")["keys"]]
    site.operate("DELETE", "/admin/keys/carol")
    assert site.chat("small", made["key"]).status == 401
    assert made["key"] not in site.log
    assert site.ask("GET", "/admin/keys", key=ALICE).status == 403
    assert site.ask("POST", "/admin/keys", {"name": "x"}, key=LOOKER).status == 403


def test_use_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next daemon goes on from what was written; a store from the future stays as it is, and requests go on."""
    monkeypatch.setenv("VLLMD_USAGE", str(tmp_path / "usage.db"))
    monkeypatch.setenv("VLLMD_KEYS", "")
    config = "devices: []\nmodels: {m: {engine: sim}}\n"
    with running(tmp_path, config) as first:
        assert first.chat("m").status == 200
        assert first.operate("GET", "/admin/usage")["rows"][0]["requests"] == 1
        first.process.kill()
    with sqlite3.connect(tmp_path / "usage.db") as look:
        assert look.execute("SELECT SUM(requests) FROM hours").fetchone() == (1.0,)
        look.execute("PRAGMA user_version = 99")
    for name in ("admin.sock", "read.sock"):
        (tmp_path / name).unlink()
    with running(tmp_path, config) as second:
        assert second.chat("m").status == 200
        until(lambda: "written by a later vllmd" in second.log)
        answer = second.ask("GET", "/admin/usage", admin=True)
        assert answer.status == 503
        assert "later vllmd" in answer.error


def test_an_engine_that_answers_nothing_is_told_though_it_seems_well(site: Site) -> None:
    """Its health is fine and it runs; for how long it has had a request without a byte of an answer is in the status.

    Not that of one which is in the middle of an answer.
    """
    body = {"messages": [{"role": "user", "content": WORDS}], "stream": True}
    with closing(site.connect()) as deaf, closing(site.connect()) as endless:
        for connection, model in ((deaf, "deaf"), (endless, "endless")):
            fields = {"Authorization": f"Bearer {ALICE}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps({**body, "model": model}), fields)
        assert endless.getresponse().readline()
        until(lambda: (site.line("deaf")["silent"] or 0.0) > 0.1)
        assert site.line("deaf")["state"] == "running"
        until(lambda: site.line("endless")["silent"] is None)
    until(lambda: site.line("deaf")["silent"] is None)


@pytest.mark.parametrize("name", ["team/alice", "/", "<b>?#%2F", "limits", "a limit/"])
def test_a_key_of_any_name_can_be_limited_and_revoked(site: Site, name: str) -> None:
    """One that cannot be revoked opens for ever what it opens."""
    site.operate("POST", "/admin/keys", {"name": name, "settings": {}})
    path = f"/admin/keys/{quote(name, safe='')}"
    assert site.operate("POST", f"{path}/limits", {"settings": {"priority": 3}})["settings"]["priority"] == 3
    assert name not in [key["name"] for key in site.operate("DELETE", path)["keys"]]


@pytest.mark.parametrize("name", ["..", ".", "a/../b", "a/limits", "a\\b"])
def test_a_key_is_not_made_under_a_name_that_no_path_can_have(site: Site, name: str) -> None:
    refused = site.ask("POST", "/admin/keys", {"name": name, "settings": {}}, key=BOSS)
    assert (refused.status, refused.json["error"]["param"]) == (400, "name")
