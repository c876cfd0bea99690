"""What clients and operators see of a real daemon with stand-in engines.

V is the Ollama-like manager; M is the start/stop API; P is the on-demand proxy: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.admin.site import REPOSITORY, Site, running, until
from vllmd.admin.instances import items
from vllmd.admin.models import SINCE
from vllmd.api.answers import ModelLine

CONFIG = """\
devices: [{{memory: 80GiB, file: {folder}/gpu0}}, {{memory: 80GiB, file: {folder}/gpu1}}]
server: {{idle_exit: never, cors_origins: [https://chat.example]}}
idle: never
auth:
  keys:
    - {{name: user, key: u-secret}}
    - {{name: boss, key: b-secret, scopes: [models, admin]}}
    - {{name: narrow, key: n-secret, models: [t]}}
    - {{name: slow, key: s-secret, requests_per_minute: 2}}
models:
  org/tiny: {{engine: sim, aliases: [t], gpu_memory: 20GiB, max_model_len: 4096, options: {{load_time: 0.2s}}}}
  org/other: {{engine: sim, gpu_memory: 20GiB, options: {{load_time: 0.2s}}}}
  wide: {{engine: sim, gpu_memory: 20GiB, tensor_parallel_size: 2}}
"""
OPEN = ("/health", "/health/live", "/health/ready", "/ping", "/version", "/metrics", "/openapi.json", "/docs")
OPEN += ("/", "/api/version")  # of Ollama's


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with running(folder, CONFIG.format(folder=folder)) as site:
        yield site


@pytest.fixture(autouse=True)
def at_rest(site: Site) -> None:
    """Every test begins with nothing loaded."""
    for model in ("org/tiny", "org/other"):
        site.operate("POST", f"/admin/models/{model}/unload?force=true&wait=true")


# -- models and health


def test_models_are_listed_with_their_aliases(site: Site) -> None:
    """As vLLM lists several served names, so that a client's menu offers them."""
    listed = site.ask("GET", "/v1/models", key="u-secret").json
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["org/tiny", "org/other", "wide", "t"]
    assert listed["data"][3]["root"] == "org/tiny"
    tiny = listed["data"][0]
    assert (tiny["state"], tiny["max_model_len"], tiny["limits"]["queue"]) == ("stopped", 4096, 512)
    assert "chat" in tiny["capabilities"]


def test_a_running_engine_tells_its_context(site: Site) -> None:
    """Where the configuration leaves it to the engine, only that knows."""
    assert site.ask("GET", "/v1/models/org/other", key="u-secret").json["max_model_len"] is None
    assert site.chat("org/other", "u-secret").status == 200
    assert site.ask("GET", "/v1/models/org/other", key="u-secret").json["max_model_len"] == 32768


@pytest.mark.parametrize("name", ["org/tiny", "org%2Ftiny", "t", "tiny"])
def test_one_model_by_any_of_its_names(site: Site, name: str) -> None:
    """The official client encodes the slash or not, by its version."""
    found = site.ask("GET", f"/v1/models/{name}", key="u-secret").json
    assert (found["root"], found["object"]) == ("org/tiny", "model")


def test_a_key_for_one_model_is_shown_no_other(site: Site) -> None:
    """What one may not use one need not know of."""
    assert [model["id"] for model in site.ask("GET", "/v1/models", key="n-secret").json["data"]] == ["org/tiny", "t"]
    assert site.ask("GET", "/v1/models/org/other", key="n-secret").status == 404
    assert site.chat("org/other", "n-secret").status == 403
    assert site.chat("t", "n-secret").status == 200


def test_P_health(site: Site) -> None:
    """``ok``, the devices, what is loaded, every model's state; and the two words for balancers."""
    site.chat("t", "u-secret")
    health = site.ask("GET", "/health", key="u-secret").json
    assert health["status"] == "ok"
    assert health["loaded_models"] == ["org/tiny"]
    assert health["model_status"] == {"org/tiny": "running", "org/other": "stopped", "wide": "stopped"}
    assert [device["index"] for device in health["gpu"]] == [0, 1]
    assert site.ask("GET", "/health/live").json == {"status": "ok"}
    assert site.ask("GET", "/health/ready").json["ready"] is True
    assert site.ask("GET", "/version").json["version"]


# -- keys


def test_every_route_asks_for_a_key_but_the_public_ones(site: Site) -> None:
    """The table of the documentation is the table of the routes: none is forgotten."""
    for path, methods in site.ask("GET", "/openapi.json").json["paths"].items():
        if path.startswith("/ui"):  # the page itself; what it shows it asks of the other routes
            continue
        for method in methods:
            status = site.ask(method.upper(), path.replace("{", "x").replace("}", "")).status
            public = path in (*OPEN, "/metrics/engines")
            assert (status == 401) is not public, f"{method} {path}: {status}"


def test_administration_asks_for_the_scope(site: Site) -> None:
    """A client's key is refused by every one of its routes."""
    paths = site.ask("GET", "/openapi.json").json["paths"]
    rows = [
        (method, path)
        for path, methods in paths.items()
        for method in methods
        if path.startswith(("/admin", "/api/v1", "/api/delete", "/upstream"))
    ]
    assert len(rows) > 15
    for method, path in rows:
        answer = site.ask(method.upper(), path.replace("{", "x").replace("}", ""), key="u-secret")
        assert answer.status == 403, f"{method} {path}"
    assert site.ask("GET", "/admin/status", key="b-secret").status == 200


def test_a_limit_is_429_with_the_time_to_wait(site: Site) -> None:
    """As OpenAI shapes it, so that its client backs off by itself."""
    answers = [site.chat("t", "s-secret") for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[2].json["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert site.chat("t", "u-secret").status == 200


def test_a_hangup_takes_new_keys_without_touching_the_engines(site: Site) -> None:
    """A leaked key is worthless as soon as the administrator says so."""
    site.chat("t", "u-secret")
    pid, was = site.line("org/tiny")["pid"], site.config.read_text()
    site.config.write_text(was.replace("u-secret", "new-secret"))
    try:
        site.process.send_signal(signal.SIGHUP)
        until(lambda: site.chat("t", "new-secret").status == 200)
        assert site.chat("t", "u-secret").status == 401
        assert site.line("org/tiny")["pid"] == pid
    finally:
        site.reconfigure(was)
    assert site.chat("t", "u-secret").status == 200


def test_pages_of_the_named_origin_may_ask_and_read(site: Site) -> None:
    """Also errors, and answers that come from an engine."""
    page, preflight = {"Origin": "https://chat.example"}, {"Access-Control-Request-Method": "POST"}
    asked = site.ask("OPTIONS", "/v1/chat/completions", headers={**page, **preflight})
    assert (asked.status, asked.headers["access-control-allow-methods"]) == (204, "POST")
    refused = site.ask("GET", "/v1/models", headers=page)
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example")
    body = {"model": "t", "prompt": "x", "max_tokens": 1}
    for streamed in (False, True):
        answer = site.ask("POST", "/v1/completions", {**body, "stream": streamed}, key="u-secret", headers=page)
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    stranger = site.ask("GET", "/version", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in stranger.headers


# -- metrics


def metrics(site: Site, path: str = "/metrics") -> dict[str, float]:
    """``name{model}`` -> the sum of its samples."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(site.ask("GET", path, key="b-secret").text):
        for sample in family.samples:
            name = f"{sample.name}{{{sample.labels.get('model', '')}}}"
            found[name] = found.get(name, 0.0) + sample.value
    return found


def test_P_metrics_move(site: Site) -> None:
    """A request is seen in every one of the figures that it should be in."""
    before = metrics(site)
    site.chat("org/tiny", "u-secret")
    after = metrics(site)

    def moved(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert moved("vllmd_model_requests_total{org/tiny}") == 1
    assert moved("vllmd_model_time_to_first_byte_seconds_count{org/tiny}") == 1
    assert moved("vllmd_model_queue_wait_seconds_sum{org/tiny}") > 0.2  # its load
    assert moved("vllmd_model_tokens_total{org/tiny}") == 2
    assert moved("vllmd_model_sent_bytes_total{org/tiny}") > 100
    assert moved("vllmd_model_change_duration_seconds_count{org/tiny}") >= 1
    assert after["vllmd_model_memory_bytes{org/tiny}"] >= 20 << 30
    assert after["vllmd_device_memory_used_bytes{}"] >= 20 << 30
    assert moved("vllmd_key_requests_total{}") >= 1
    assert after["vllmd_model_last_start_phase_seconds{org/tiny}"] > 0.2
    assert after["process_resident_memory_bytes{}"] > 1 << 20


def test_errors_are_counted_by_kind(site: Site) -> None:
    """And unknown paths do not make series of their own."""
    before = metrics(site).get("vllmd_errors_total{}", 0)
    for number in range(5):
        assert site.ask("GET", f"/nowhere/{number}").status == 404
    text = site.ask("GET", "/metrics").text
    assert 'kind="NotFound"' in text
    assert "/nowhere" not in text
    assert metrics(site)["vllmd_errors_total{}"] == before + 5


def test_an_engines_own_metrics_carry_its_model(site: Site) -> None:
    """One engine's on demand, or all of them."""
    assert site.ask("GET", "/metrics?model=t").status == 401
    assert site.ask("GET", "/metrics?model=t", key="n-secret").status == 409
    assert site.ask("GET", "/metrics?model=org/other", key="n-secret").status == 403
    assert site.ask("GET", "/metrics?model=nobody", key="u-secret").status == 404
    site.chat("org/tiny", "u-secret")
    site.chat("org/other", "u-secret")
    assert 'model="org/tiny"' in site.ask("GET", "/metrics?model=t", key="n-secret").text
    assert site.ask("GET", "/metrics/engines").text == ""
    assert 'model="org/other"' not in site.ask("GET", "/metrics/engines", key="n-secret").text
    both = site.ask("GET", "/metrics/engines", key="b-secret").text
    families = {family.name: family for family in text_string_to_metric_families(both)}
    assert families
    models = {sample.labels["model"] for family in families.values() for sample in family.samples}
    assert models == {"org/tiny", "org/other"}


# -- the operator's verbs


def test_P_load_and_unload(site: Site) -> None:
    """Known models by any name; an unknown one is 404 and named."""
    assert site.operate("POST", "/admin/models/t/load?wait=true")["state"] == "running"
    assert site.operate("POST", "/admin/models/org/tiny/unload?wait=true")["state"] == "stopped"
    unknown = site.ask("POST", "/admin/models/org/tini/load", admin=True)
    assert unknown.status == 404
    assert "org/tiny" in unknown.error


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/admin/models/t/sleep?level=4", None, 400),
        ("POST", "/admin/models/t/sleep", None, 409),
        ("POST", "/admin/models/t/load?wait=perhaps", None, 400),
        ("POST", "/admin/models/t/pin", {"pinned": "yes"}, 400),
        ("POST", "/admin/models/t/pin", {"pined": True}, 400),
        ("POST", "/admin/models/t/lease", {}, 400),
        ("POST", "/admin/models/t/lease", {"lease": "x", "deadline_seconds": -1}, 400),
        ("POST", "/admin/models/t/lease", {"lease": "x", "deadline_seconds": float("inf")}, 400),
        ("POST", "/admin/models/t/lease", {"lease": "x", "deadline_seconds": float("nan")}, 400),
        ("POST", "/admin/models/t/lease", {"lease": "\x1b[31m"}, 400),
        ("POST", "/admin/models/t/lease", ["lease"], 400),
        ("DELETE", "/admin/models/t/lease", None, 400),
        ("GET", "/admin/logs/t?lines=many", None, 400),
        ("GET", "/admin/decisions?model=nobody", None, 404),
        ("POST", "/admin/processes/0/kill", None, 404),
        ("POST", "/admin/processes/1e3/kill", None, 404),
        ("POST", "/admin/processes/999999999999999999999/kill", None, 404),
    ],
)
def test_what_is_asked_wrongly_is_refused_and_harms_nobody(
    site: Site, method: str, path: str, body: object, status: int
) -> None:
    """With a message that says what would be right."""
    answer = site.ask(method, path, body, admin=True)
    assert answer.status == status, answer.text
    assert answer.error


def test_every_verb_leaves_a_record_of_who_used_it(site: Site) -> None:
    """By the process on the admin socket, by the key's name over TCP; also where it was refused."""
    site.operate("POST", "/admin/models/t/pin", {"pinned": False})
    site.ask("POST", "/admin/models/t/pin", {"pinned": False}, key="b-secret")
    site.ask("POST", "/admin/models/nobody/load", key="b-secret")
    until(lambda: "/admin/models/nobody/load by" in site.log)
    assert "POST /admin/models/t/pin by pid " in site.log
    assert "POST /admin/models/t/pin by the key boss: done" in site.log
    assert "POST /admin/models/nobody/load by the key boss: refused: model 'nobody' does not exist" in site.log
    assert "b-secret" not in site.log


def test_events_tell_decisions_and_what_becomes_of_them(site: Site) -> None:
    """As server-sent events, while they happen."""
    connection = site.connect(admin=True)
    with closing(connection):
        connection.request("GET", "/admin/events")
        stream = connection.getresponse()
        assert stream.headers["content-type"] == "text/event-stream"
        assert stream.readline().startswith(b":")
        site.operate("POST", "/admin/models/t/load")
        seen = []
        while len(seen) < 2:
            line = stream.readline()
            if line.startswith(b"data: "):
                event = json.loads(line.removeprefix(b"data: "))
                seen.append((event["what"], event["model"], event.get("state")))
    assert seen == [("start", "org/tiny", None), ("start", "org/tiny", "running")]


def test_a_followed_log_ends_with_its_engine(site: Site) -> None:
    """Line by line while it runs, and not for ever."""
    site.operate("POST", "/admin/models/t/load?wait=true")
    connection = site.connect(admin=True)
    with closing(connection):
        connection.request("GET", "/admin/logs/t?follow=true")
        stream = connection.getresponse()
        assert b"INFO" in stream.readline()
        site.operate("POST", "/admin/models/t/unload?force=true&wait=true")
        assert stream.read() is not None  # returns: the answer has an end


def test_a_stream_that_waits_hears_how_far_its_model_is(tmp_path: Path) -> None:
    """Whoever looks at the wire of a client that seems to hang finds the phase of the start in its comments."""
    model = "engine: sim, options: {load_time: 0.1s, fail: [never-ready]}"
    with running(tmp_path, f"server: {{loading_comment_interval: 0.05s}}\nmodels: {{m: {{{model}}}}}\n") as site:
        connection = site.connect()
        with closing(connection):
            body = {"model": "m", "prompt": "hello", "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            stream = connection.getresponse()
            assert stream.status == 200
            until(lambda: stream.readline() == b": loading m: serving\n")


def test_a_response_that_went_with_its_engine_starts_no_other(site: Site) -> None:
    """The answer could only be that the new one does not know it."""
    made = site.ask("POST", "/v1/responses", {"model": "t", "input": "hello"}, key="u-secret").json["id"]
    assert site.ask("GET", f"/v1/responses/{made}", key="u-secret").json["model"] == "t"
    site.operate("POST", "/admin/models/t/unload?wait=true")
    assert site.ask("GET", f"/v1/responses/{made}", key="u-secret").status == 404
    assert site.line("org/tiny")["state"] == "stopped"


def test_the_head_of_a_followed_log_follows_nothing(site: Site) -> None:
    """HEAD wants no lines, so nobody waits for any."""
    site.operate("POST", "/admin/models/t/load?wait=true")
    assert site.ask("HEAD", "/admin/logs/t?follow=true", admin=True).status == 200


def test_a_reload_of_a_broken_file_names_the_mistake_and_changes_nothing(site: Site) -> None:
    """The models go on as they were."""
    was = site.config.read_text()
    site.config.write_text(was + "polcy: lru\n")
    try:
        answer = site.ask("POST", "/admin/reload", admin=True)
        assert answer.status == 400
        assert "polcy" in answer.error
    finally:
        site.config.write_text(was)
    assert site.operate("POST", "/admin/reload")["changed"] == []


# -- M's API


def test_M_a_model_on_the_gpu_of_choice(site: Site) -> None:
    """202 while it starts, and its state in upper case."""
    start = {"model_name": "org/tiny", "model_type": "sim", "gpu_id": 1, "config": {}}
    begun = site.ask("POST", "/api/v1/models/start", start, key="b-secret")
    assert begun.status == 202
    assert (begun.json["status"], begun.json["active_gpu_ids"]) == ("STARTING", [1])
    until(lambda: site.operate("GET", "/api/v1/models/status/t")[0]["status"] == "RUNNING")
    items = site.operate("GET", "/api/v1/models/status")
    assert [(item["model_name"], item["gpu_id"], item["status"]) for item in items] == [("org/tiny", 1, "RUNNING")]
    assert items[0]["pid"] == site.line("org/tiny")["pid"]
    assert site.operate("POST", "/api/v1/models/start", start)["total_instances"] == 1  # it is there already
    assert site.ask("POST", "/api/v1/models/stop", {"model_name": "t", "gpu_id": 0}, admin=True).status == 404
    stopped = site.operate("POST", "/api/v1/models/stop", {"model_name": "t", "gpu_id": 1})
    assert (stopped["status"], stopped["active_gpu_ids"], stopped["total_instances"]) == ("STOPPED", [], 0)
    assert site.ask("POST", "/api/v1/models/stop", {"model_name": "t"}, admin=True).status == 404
    site.operate("POST", "/admin/models/t/load?wait=true")
    assert site.line("org/tiny")["devices"] == [0]  # the choice was for that start


def test_an_instance_was_updated_when_its_state_began(site: Site) -> None:
    """That is no other time at each question; of a model that was never used it is the daemon's start."""
    (item,) = items(ModelLine("m", "ready", since=5.0, changed_at=86400.0, started_at=3600.0))
    assert (item.created_at, item.updated_at) == ("1970-01-01T01:00:00Z", "1970-01-02T00:00:00Z")
    (item,) = items(ModelLine("m", "stopped"))
    assert (item.created_at, item.updated_at) == (None, SINCE)
    site.operate("POST", "/admin/models/t/load?wait=true")
    line = site.line("org/tiny")
    assert 0 < line["started_at"] <= line["changed_at"] <= time.time()


@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        ({"model_name": "nobody"}, 404, "nobody"),
        ({"model_name": "t", "model_type": "triton"}, 400, "sim"),
        ({"model_name": "t", "gpu_id": 7}, 400, "GPU 7"),
        ({"model_name": "t", "gpu_id": -1}, 400, "gpu_id"),
        ({"model_name": "wide", "gpu_id": 0}, 400, "takes 2 GPUs"),
        ({"model_name": "org/tiny", "config": {"max_model_len": 1}}, 409, "max_model_len"),
        ({"model_name": "new", "config": {"max_modl_len": 1}}, 400, "max_model_len"),
        ({"model_name": "new", "config": ["x"]}, 400, "config"),
        ({"model_name": "new", "model_type": "teapot", "config": {"max_model_len": 1}}, 400, "teapot"),
        ({"model_name": 5}, 400, "model_name"),
        ({}, 400, "model_name"),
    ],
)
def test_M_a_wrong_start_is_refused(site: Site, body: object, status: int, names: str) -> None:
    """Unknown models, types and GPUs are the caller's mistake."""
    answer = site.ask("POST", "/api/v1/models/start", body, admin=True)
    assert answer.status == status, answer.text
    assert names in answer.error


def test_M_a_model_with_a_config_of_its_own(site: Site) -> None:
    """It need not be known before, and is not written anywhere."""
    config = {"gpu_memory": "10GiB", "options": {"load_time": "0.1s"}}
    start = {"model_name": "brought", "model_type": "sim", "gpu_id": 1, "config": config}
    assert site.ask("POST", "/api/v1/models/start", start, admin=True).status == 202
    until(lambda: site.operate("GET", "/api/v1/models/status/brought")[0]["status"] == "RUNNING")
    assert site.line("brought")["devices"] == [1]
    assert site.chat("brought", "u-secret").status == 200
    site.operate("DELETE", "/admin/guests/brought")
    until(lambda: site.ask("GET", "/api/v1/models/status/brought", admin=True).status == 404)


def test_M_gpus_and_their_processes(site: Site) -> None:
    """Per cent, watts, MiB; the engine's process among them."""
    site.operate("POST", "/admin/models/t/load?wait=true")
    first, second = site.operate("GET", "/api/v1/gpus")
    assert set(first) >= {"id", "memory_usage", "power_draw", "processes"}
    assert set(first["processes"][0]) == {"pid", "name", "gpu_memory_usage"}
    assert (first["id"], second["id"], second["processes"]) == (0, 1, [])
    assert 20 < first["memory_usage"] < 40
    process = first["processes"][0]
    assert process["pid"] == site.line("org/tiny")["pid"]
    assert process["gpu_memory_usage"] >= 20 << 10
    assert process["name"]


def test_M_killing_an_engines_process_ends_that_engine(site: Site) -> None:
    """By either API; afterwards the pid is unknown."""
    for method, path in (("DELETE", "/api/v1/processes/{}"), ("POST", "/admin/processes/{}/kill")):
        site.operate("POST", "/admin/models/t/load?wait=true")
        pid = site.line("org/tiny")["pid"]
        killed = site.operate(method, path.format(pid))
        assert (killed["pid"], killed["status"]) == (pid, "killed")
        assert site.ask(method, path.format(pid), admin=True).status == 404
        assert site.line("org/tiny")["pid"] != pid
        site.operate("POST", "/admin/models/t/unload?force=true&wait=true")


def test_M_a_stranger_is_killed_only_by_force_and_only_on_a_gpu(site: Site) -> None:
    """An API for GPUs is none for killing whatever runs on the machine."""
    holding = "import sys; from vllmd.simengine.device import FakeGpu; FakeGpu(sys.argv[1]).hold(1 << 30); input()"
    site.operate("GET", "/api/v1/gpus")
    idle = subprocess.Popen(["sleep", "60"])
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(site.folder / "gpu1")], cwd=REPOSITORY, stdin=-1
    ) as holder:
        try:
            until(lambda: holder.pid in processes_on(site, 1))
            path = "/api/v1/processes/{}?force={}"
            assert site.ask("DELETE", path.format(holder.pid, "false"), admin=True).status == 403
            assert site.ask("DELETE", path.format(idle.pid, "true"), admin=True).status == 403
            assert site.ask("DELETE", path.format(site.process.pid, "true"), admin=True).status == 403
            assert site.operate("DELETE", path.format(holder.pid, "true"))["status"] == "killed"
            assert holder.wait(120) == -signal.SIGKILL
            assert idle.poll() is None
        finally:
            idle.kill()
            idle.wait()
            holder.kill()


def processes_on(site: Site, gpu: int) -> list[int]:
    return [process["pid"] for process in site.operate("GET", "/api/v1/gpus")[gpu]["processes"]]


# -- other daemons


def test_a_tcp_address_named_admin_is_no_way_around_the_keys(tmp_path: Path) -> None:
    """A unit's FileDescriptorName= is no proof of who comes."""
    config = "auth: {keys: [{key: k-secret}]}\nmodels: {m: {engine: sim}}\n"
    with running(tmp_path, config, names="admin:admin") as site:
        assert site.ask("GET", "/v1/models").status == 401
        assert site.ask("GET", "/admin/status").status == 401
        assert site.ask("GET", "/v1/models", admin=True).status == 200


def test_without_a_gpu_that_can_be_read_gpus_is_501_and_nothing_else_fails(tmp_path: Path) -> None:
    """A machine without NVML serves all the same."""
    with running(tmp_path, "devices: []\nmodels: {m: {engine: sim}}\n") as site:
        answer = site.ask("GET", "/api/v1/gpus", admin=True)
        assert (answer.status, answer.json["error"]["code"]) == (501, "not_supported")
        assert site.ask("POST", "/api/v1/models/start", {"model_name": "m", "gpu_id": 0}, admin=True).status == 400
        assert site.chat("m").status == 200
        assert site.ask("GET", "/metrics").status == 200


def test_V_models_of_the_cache_are_offered_and_start(tmp_path: Path) -> None:
    """Nobody configured it; it has the settings of ``defaults``. One that is configured is not offered twice."""
    for name in ("org/found", "org/known"):
        snapshot = tmp_path / f"hf/hub/models--{name.replace('/', '--')}/snapshots/abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
        (snapshot / "model.safetensors").write_bytes(b"x" * 64)
    config = "discover: true\ndefaults: {engine: sim}\nmodels: {mine: {model: org/known}}\n"
    with running(tmp_path, config) as site:
        listed = {model["id"]: model for model in site.ask("GET", "/v1/models").json["data"]}
        assert set(listed) == {"mine", "org/found"}
        assert (listed["org/found"]["discovered"], listed["mine"]["discovered"]) == (True, False)
        assert "embeddings" not in listed["org/found"]["capabilities"]
        assert site.chat("org/found").status == 200
        site.reconfigure("defaults: {engine: sim}\nmodels: {mine: {model: org/known}}\n")
        assert site.chat("org/found").status == 404


def test_a_broken_configuration_is_unhealthy_and_repaired_by_a_reload(tmp_path: Path) -> None:
    """A balancer sends nobody there, and nothing restarts it for being alive. Anybody is told where, not what."""
    with running(tmp_path, "polcy: lru\n") as site:
        health = site.ask("GET", "/health")
        assert (health.status, health.json["status"].endswith("vllmd.yaml:1")) == (503, True)
        assert "polcy" in site.operate("GET", "/admin/status")["configuration"]["error"]
        assert site.ask("GET", "/health/ready").status == 503
        assert site.ask("GET", "/health/live").status == 200
        assert "vllmd_configuration_valid 0.0" in site.ask("GET", "/metrics").text
        listed = site.ask("GET", "/v1/models")  # no list, which would say that there is nothing to be served
        assert (listed.status, listed.error.endswith("vllmd.yaml:1")) == (503, True)
        site.reconfigure("models: {m: {engine: sim}}\n")
        assert site.ask("GET", "/health").status == 200
        assert site.chat("m").status == 200


def test_an_address_that_others_can_reach_is_not_served_without_keys(tmp_path: Path) -> None:
    """systemd may have been told to listen anywhere; a reload with a key opens the door."""
    with running(tmp_path, "models: {m: {engine: sim}}\n", "0.0.0.0") as site:
        for path in ("/v1/models", "/health", "/health/live"):
            answer = site.ask("GET", path)
            assert answer.status == 503
            assert "auth.allow_anonymous" in answer.error
        assert site.ask("GET", "/health", admin=True).status == 200
        site.reconfigure("auth: {keys: [{key: k-secret}]}\nmodels: {m: {engine: sim}}\n")
        assert site.ask("GET", "/v1/models").status == 401
        assert site.chat("m", "k-secret").status == 200
        site.reconfigure("auth: {allow_anonymous: true}\nmodels: {m: {engine: sim}}\n")
        assert site.ask("GET", "/v1/models").status == 200


ENGINE = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.answer({})
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(dict(self.headers))
    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_an_engine_never_sees_a_clients_key(tmp_path: Path) -> None:
    """In whatever header it came."""
    (tmp_path / "engine.py").write_text(ENGINE)
    command = json.dumps([sys.executable, str(tmp_path / "engine.py"), "${PORT}"])
    config = f"""
auth: {{keys: [{{key: k-secret}}]}}
models:
  echo: {{engine: command, command: {command}, options: {{routes: [/v1/completions], cpu: true}}}}
"""
    body = {"model": "echo", "prompt": "x"}
    with running(tmp_path, config) as site:
        for headers in ({"Authorization": "Bearer k-secret"}, {"x-api-key": "k-secret"}):
            answer = site.ask("POST", "/v1/completions", body, headers={**headers, "X-Mine": "kept"})
            assert answer.status == 200, answer.text
            assert "k-secret" not in answer.text
            assert {name.lower(): value for name, value in answer.json.items()}["x-mine"] == "kept"
