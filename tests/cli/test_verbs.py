"""Every verb of vllmctl: what it asks of the daemon, what it prints, how it ends.

V is the Ollama-like manager; S is the choice of the fastest server: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllmd
from tests.cli.fake_daemon import FakeDaemon, GiB, fake_daemon, model, status
from vllmd.api.answers import Decision
from vllmd.cli import main
from vllmd.cli.verbs.events import in_words, moment
from vllmd.config.reload import LATER

QWEN = model(
    "Qwen/Qwen3-0.6B", "running", devices=[0], memory=2 * GiB, in_flight=3, pinned=True, leases=["ann"],
    config={"engine": "vllm", "model": "/srv/qwen", "aliases": ["q"]},
)  # fmt: skip
BIG = model("big", "starting", devices=[0], memory=28 * GiB, queued=2, oldest_wait=12.0, phase="weights", detail="3/8")
BAD = model("bad", "error", failure="the engine exited with status 1\nTraceback")
IDLE = model("org/idle", "sleeping_l1", memory=GiB, idle=400.0, level=1)
QUOTED = "/admin/models/Qwen%2FQwen3-0.6B"


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A daemon with four models behind its admin socket."""
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "admin.sock"))
    answers = {"GET /admin/status": (200, status(QWEN, BIG, BAD, IDLE))}
    with fake_daemon(answers, tmp_path / "admin.sock") as running:
        yield running


def asked(daemon: FakeDaemon) -> list[tuple[str, Any]]:
    """What changed something, without the looks at the status."""
    return [(what, body) for what, body, _ in daemon.seen if what != "GET /admin/status"]


def test_V_ps_lists_every_model(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """State, devices, memory, requests, waits and what is remarkable; no colour where no terminal is."""
    assert main(["ps"]) == 0
    assert capsys.readouterr().out == (
        "MODEL            STATE        DEVICES  MEMORY  ACTIVE   QUEUED  IDLE  NOTE\n"
        "Qwen/Qwen3-0.6B  running      0          2GiB       3        0     -  pinned; leased to ann\n"
        "big              starting     0         28GiB       0  2 (12s)     -  weights 3/8\n"
        "bad              error        -             -       0        0     -  the engine exited with status 1\n"
        "org/idle         sleeping_l1  -          1GiB       0        0    6m\n"
    )


def test_ps_shows_what_each_model_draws(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Its share of its devices; of replicas the sum."""
    pair = [model("m@1", "running", power=100.4, unused_energy=9000.0), model("m@2", "running", power=50.3)]
    daemon.answers["GET /admin/status"] = (200, status(model("m", "running", replicas=pair), model("n")))
    assert main(["ps", "--power"]) == 0
    lines = capsys.readouterr().out.splitlines()
    seen = [line.split()[5:7] for line in (lines[0], lines[1], lines[-1])]
    assert seen == [["POWER", "UNUSED"], ["151W", "2.5Wh"], ["-", "-"]]


def test_ps_json_is_what_the_daemon_says(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """For programs nothing is left out; the flag may stand before or after the verb."""
    assert main(["ps", "--json"]) == 0
    after = capsys.readouterr().out
    assert main(["--json", "ps"]) == 0
    assert after == capsys.readouterr().out
    assert [line["name"] for line in json.loads(after)] == ["Qwen/Qwen3-0.6B", "big", "bad", "org/idle"]


def test_V_info_shows_the_server(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Version, process, backend, policy, devices, memory, models, configuration."""
    assert main(["info"]) == 0
    assert capsys.readouterr().out == (
        "version:        0.1.0\n"
        "process:        77, for 61m\n"
        f"admin API:      {daemon.address}\n"
        "engines run by: systemd\n"
        "policy:         adaptive\n"
        "devices:        1, from declared\n"
        "host memory:    0 of 64GiB for sleeping models\n"
        "models:         1 error, 1 running, 1 sleeping_l1, 1 starting\n"
        "requests:       2 on 3 connections\n"
        "configuration:  /etc/vllmd/vllmd.yaml\n"
    )


def test_models_lists_engines_sources_and_aliases(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """What is configured, rather than what it does."""
    assert main(["models"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "Qwen/Qwen3-0.6B  running      vllm    /srv/qwen   q"


def test_V_start_waits_and_says_what_happens(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Progress goes to stderr, one line per phase; the end says how long it took and where the log is."""
    lines = [
        {"state": "starting", "phase": "weights", "detail": "1/8", "elapsed": 1.0},
        {"state": "starting", "phase": "weights", "detail": "2/8", "elapsed": 2.0},
        {"state": "starting", "phase": "graphs", "detail": "", "elapsed": 30.0},
        {"done": True, "state": "running", "seconds": 44.0},
    ]
    daemon.answers[f"POST {QUOTED}/load?wait=true"] = (200, [json.dumps(line) for line in lines])
    assert main(["start", "Qwen/Qwen3-0.6B"]) == 0
    out, err = capsys.readouterr()
    assert err == ("Qwen/Qwen3-0.6B: starting: weights 1/8, 1.0s\nQwen/Qwen3-0.6B: starting: graphs, 30s\n")
    assert out == "Qwen/Qwen3-0.6B is running after 44s; its output: vllmctl logs Qwen/Qwen3-0.6B\n"
    assert daemon.seen[-1][2]["Accept"] == "application/x-ndjson"


def test_start_of_a_model_that_fails(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The reason, with the engine's last lines, and a status of its own."""
    failed = {"error": {"message": "the engine exited with status 1:\nImportError: x"}, "done": True, "state": "error"}
    daemon.answers["POST /admin/models/bad/load?wait=true"] = (200, [json.dumps(failed)])
    assert main(["start", "bad"]) == 69
    assert capsys.readouterr().err == "vllmctl: bad: the engine exited with status 1:\nImportError: x\n"


def test_V_ps_says_what_brings_a_pinned_model_back_and_that_one_is_silent(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a drain no rule loads it again; and an engine that answers nothing for long is not simply running."""
    hung = model("hung", "running", in_flight=2, silent=95.0)
    daemon.answers["GET /admin/status"] = (
        200,
        status(model("p", "stopped", pinned=True), hung, QWEN | {"silent": 3.0}),
    )
    assert main(["ps"]) == 0
    stopped, silent, well = capsys.readouterr().out.splitlines()[1:]
    assert "pinned, and not loaded before its next request or vllmctl start" in stopped
    assert silent.endswith("no answer for 95s")
    assert well.endswith("pinned; leased to ann")
    daemon.answers["GET /admin/decisions?model=hung"] = (200, {"decisions": []})
    assert main(["why", "hung"]) == 0
    told = "hung is running since 5.0s; no answer for 95s, with 2 requests in it (vllmctl logs hung; "
    assert capsys.readouterr().out.startswith(f"{told}vllmctl restart hung --force if it hangs)")


def test_start_without_waiting(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """For scripts that load several: how it stands now, and where to look for more."""
    daemon.answers["POST /admin/models/big/load"] = (202, BIG)
    assert main(["load", "--no-wait", "big"]) == 0
    assert capsys.readouterr().out == ("big is starting since 5.0s; vllmctl ps shows how it goes on\n")


VERBS = [
    (["stop", "big"], "POST /admin/models/big/unload?wait=true", None),
    (["stop", "-f", "big"], "POST /admin/models/big/unload?wait=true&force=true", None),
    (["sleep", "big"], "POST /admin/models/big/sleep?wait=true&level=1", None),
    (["sleep", "big", "--level", "2"], "POST /admin/models/big/sleep?wait=true&level=2", None),
    (["sleep", "--level", "3", "big"], "POST /admin/models/big/sleep?wait=true&level=3", None),
    (["wake-up", "big"], "POST /admin/models/big/wake?wait=true", None),
    (["wakeup", "big"], "POST /admin/models/big/wake?wait=true", None),
    (["wake_up", "big"], "POST /admin/models/big/wake?wait=true", None),
    (["pin", "big"], "POST /admin/models/big/pin", {"pinned": True}),
    (["drain", "0"], "POST /admin/devices/0/drain", {"drained": True}),
    (["cancel", "a/b"], "DELETE /admin/requests/a%2Fb", None),
    (["undrain", "0"], "POST /admin/devices/0/drain", {"drained": False}),
    (["unpin", "big"], "POST /admin/models/big/pin", {"pinned": False}),
    (["lease", "big", "--name", "n", "--for", "5m"], "POST /admin/models/big/lease",
     {"lease": "n", "deadline_seconds": 300.0}),
    (["lease", "big", "--name", "n"], "POST /admin/models/big/lease", {"lease": "n", "deadline_seconds": None}),
    (["lease", "big", "--name", "n", "--release", "--stop"], "DELETE /admin/models/big/lease?lease=n&stop=true", None),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "request_", "body"), VERBS, ids=[" ".join(row[0]) for row in VERBS])
def test_V_verbs_on_a_model(daemon: FakeDaemon, argv: list[str], request_: str, body: Any) -> None:
    """Each verb and alias is one request."""
    daemon.answers[request_] = (200, {"done": True, "state": "stopped", "seconds": 0.1})
    assert main(argv) == 0
    assert asked(daemon) == [(request_, body)]


PAIR = model(
    "org/pair", "running", devices=[0, 1], config={"engine": "vllm", "model": "org/pair", "aliases": ["p"]},
    serving=1, degraded=True, failure="org/pair@2: it failed a probe: 503", replicas=[
        model("org/pair@1", "running", devices=[0], health="serving", latency=0.0123),
        model("org/pair@2", "running", devices=[1], health="ejected", failure="it failed a probe: 503\nbody"),
    ],
)  # fmt: skip


@pytest.fixture
def replicated(daemon: FakeDaemon) -> FakeDaemon:
    """The daemon has one model, of two replicas."""
    daemon.answers["GET /admin/status"] = (200, status(PAIR, backend="sessions"))
    return daemon


def test_ps_and_top_show_each_replica_below_its_model(
    replicated: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what its answers have earned it, and the trouble of each once."""
    for argv in (["ps"], ["top", "-n", "1"]):
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert "1 of 2 replicas serve, degraded\n" in said
        assert "serving (12 ms to the first byte)" in said
        assert "ejected; it failed a probe: 503\n" in said


def test_gpus_tells_what_each_device_is_and_how_it_is(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name, draw and heat, whom it is joined with; first what is wrong with it."""
    told = status(PAIR)
    told["devices"][0] |= {"wedged": "an operator drained it", "name": "NVIDIA H200", "power": 123.5}
    told["devices"][0] |= {"temperature": 38.0, "links": [1, 2], "node": 0, "throttled": "hardware thermal slowdown"}
    told["devices"][0] |= {"switch": "0000:00:01.0"}
    told["devices"].append({"index": 1, "memory": 0, "switch": "0000:00:01.0"})
    daemon.answers["GET /admin/status"] = (200, told)
    assert main(["gpus"]) == 0
    note = "avoided: an operator drained it; slowed down: hardware thermal slowdown; NVIDIA H200; 124W 38°C; "
    first = capsys.readouterr().out.split("\n")[:-2]
    assert (note + "linked to 1,2; switch with 1; node 0") in " ".join(" ".join(first).split())


def test_gpus_that_do_not_answer_are_an_error(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Not an empty table."""
    daemon.answers["GET /admin/status"] = (200, {**status(), "devices": [], "trouble": "NVML: mismatch; reboot"})
    assert main(["gpus"]) == 69
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "the devices do not answer: NVML: mismatch; reboot\n")


def test_devices_are_held_by_replicas(replicated: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Not by the model as a whole."""
    assert main(["gpus"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("org/pair@1")


@pytest.mark.parametrize("name", ["org/pair@2", "pair@2", "p@2"])
def test_a_replica_is_named_as_its_model_is(
    replicated: FakeDaemon, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """By name, end of the name, or alias."""
    replicated.answers["GET /admin/decisions?model=org%2Fpair%402"] = (200, {"decisions": []})
    assert main(["why", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith("org/pair@2 is running since 5.0s (ejected); it failed: it failed a probe: 503\n")


def test_completion_offers_replicas(replicated: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """A name a line."""
    assert main(["completion", "models"]) == 0
    names = ["org/pair", "p", "org/pair@1", "p@1", "org/pair@2", "p@2"]
    assert capsys.readouterr().out.split() == names


def test_the_doctor_knows_a_degraded_model(replicated: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Which replica, and why."""
    main(["doctor"])
    said = "warning  org/pair is degraded, 1 of 2 replicas serve: org/pair@2: it failed a probe: 503"
    assert capsys.readouterr().out.splitlines()[-1] == f"{said}; vllmctl why org/pair"


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("org/pair", ["org-pair", "org-pair-1", "org-pair-2"]),
        ("p@1", ["org-pair", "org-pair-1"]),
        ("p@2", ["org-pair-2"]),
    ],
)
def test_logs_of_replicas(replicated: FakeDaemon, monkeypatch: pytest.MonkeyPatch, name: str, units: list[str]) -> None:
    """Of the model all are meant; what the first one's engine said when it was the only one belongs to it."""
    called: list[list[str]] = []
    replicated.answers["GET /admin/status"] = (200, status(PAIR))
    monkeypatch.setattr("vllmd.cli.verbs.logs.shutil.which", lambda program: program)
    monkeypatch.setattr("vllmd.cli.verbs.logs.journal_is_readable", lambda: True)
    monkeypatch.setattr("vllmd.cli.verbs.logs.subprocess.call", lambda argv: called.append(argv) or 0)
    assert main(["logs", name]) == 0
    hexes = "[0-9a-f]" * 6
    assert [word for word in called[0] if "unit=" in word] == [f"--unit=vllmd-model-{u}-{hexes}.scope" for u in units]


def test_events_of_a_model_are_those_of_its_replicas(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """``--model`` takes either."""
    made = [{"at": 0.0, "what": "start", "model": name, "why": "w"} for name in ("m@1", "m@2", "m2")]
    daemon.answers["GET /admin/events"] = (200, [f"data: {json.dumps(each)}" for each in made])
    assert main(["events", "-m", "m"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["events", "-m", "m@2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


PROBED = {
    "model": "org/pair", "fastest": "org/pair@2", "replicas": [
        {"name": "org/pair@2", "seconds": 0.2134, "message": ""},
        {"name": "org/pair@1", "seconds": None, "message": "slower than 0.213 s"},
    ],
}  # fmt: skip


def test_S_probe_shows_the_fastest_first(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the models that are named."""
    daemon.answers["POST /admin/models/pair/probe"] = (200, PROBED)
    assert main(["probe", "pair"]) == 0
    assert capsys.readouterr().out == (
        "REPLICA     ANSWER  NOTE\norg/pair@2   213ms\norg/pair@1       -  slower than 0.213 s\n"
    )


def test_probe_of_all_that_serve(replicated: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a name; if nobody answers, scripts hear of it."""
    silent = {
        "model": "org/pair",
        "fastest": None,
        "replicas": [{"name": "org/pair@1", "seconds": None, "message": "x"}],
    }
    replicated.answers["POST /admin/models/org%2Fpair/probe?all=true&limit=2.0"] = (200, silent)
    assert main(["probe", "--all", "--limit", "2s", "--json"]) == 69
    assert json.loads(capsys.readouterr().out) == [silent]
    replicated.answers["GET /admin/status"] = (200, status(BAD))
    assert main(["probe"]) == 0
    assert capsys.readouterr().out == "no model serves, and a probe loads none\n"


def test_kill_says_what_was_done(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon's words; a process of nobody it knows takes --force."""
    killed = {"pid": 77, "status": "killed", "message": "killed big as a whole"}
    daemon.answers["POST /admin/processes/77/kill"] = (200, killed)
    daemon.answers["POST /admin/processes/77/kill?force=true"] = (200, killed)
    assert main(["kill", "77"]) == 0
    assert capsys.readouterr().out == "killed big as a whole\n"
    assert main(["kill", "77", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == killed


@pytest.mark.parametrize("argv", [["ps"], ["models"], ["start", "a"], ["why", "a"]])
def test_a_daemon_without_a_valid_configuration(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    """Nothing is configured then, so an empty table or "no such model" would lead astray."""
    error = "vllmd.yaml:3: models.a.alias: there is no such setting"
    daemon.answers["GET /admin/status"] = (200, {**status(), "configuration": {"files": [], "error": error}})
    daemon.answers["POST /admin/models/a/load?wait=true"] = (
        503, {"error": {"message": error, "code": "invalid_configuration"}},
    )  # fmt: skip
    assert main(argv) == 78
    assert error in capsys.readouterr().err
    assert main(["info"]) == 0


def test_several_models_at_once(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order given; with --json one list."""
    for name in ("a", "b"):
        daemon.answers[f"POST /admin/models/{name}/unload?wait=true"] = (200, {"done": True, "state": "stopped"})
    assert main(["stop", "a", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"done": True, "state": "stopped"}] * 2


def test_why_tells_decisions_and_the_present(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """An end of a name is enough; numbers on demand."""
    made = {"at": 0.0, "what": "evict", "model": "org/idle", "why": "big needs 28 GiB", "numbers": {"regret": 1.25}}
    daemon.answers["GET /admin/decisions?model=org%2Fidle"] = (200, {"decisions": [made]})
    assert main(["why", "idle", "--numbers"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("evict org/idle: big needs 28 GiB [regret=1.25]")
    assert second == "org/idle is sleeping_l1 since 5.0s"


def test_gpus(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """What each device has, and for whom."""
    assert main(["gpus"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        "     0   80GiB     30GiB  49GiB     1GiB         -  Qwen/Qwen3-0.6B, big"
    )


def test_a_decision_about_devices_names_no_model() -> None:
    """In the place of the model's name is nothing, not even the space before it."""
    assert in_words(Decision(time.time(), "drain", "", "device 0: by an operator")).endswith(
        " drain: device 0: by an operator"
    )
    assert in_words(Decision(time.time(), "evict", "qwen", "big waits")).endswith(" evict qwen: big waits")


def test_events_are_told_as_they_come(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Server-sent events, comments left out."""
    events = [": hello", "", 'data: {"at": 0, "what": "start", "model": "big", "why": "asked for"}', "",
              'data: {"at": 0, "what": "stop", "model": "bad", "why": "idle"}']  # fmt: skip
    daemon.answers["GET /admin/events"] = (200, events)
    assert main(["events", "--model", "big"]) == 0
    assert capsys.readouterr().out.endswith("start big: asked for\n")


def test_a_decision_of_another_day_has_its_date() -> None:
    """`why` tells what earlier daemons decided, too, and a clock that was set back makes it a later day's."""
    now = time.mktime((2026, 11, 28, 12, 0, 0, 0, 0, -1))
    assert moment(now - 60, now) == "11:59:00"
    assert moment(now - 86400, now) == "2026-11-27 12:00:00"
    assert moment(now + 86400, now) == "2026-11-29 12:00:00"


def test_reload(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """What changed; an invalid file is told in full, with the status for configuration."""
    daemon.answers["POST /admin/reload"] = (
        200,
        {"changed": ["big"], "added": [], "removed": ["bad"], "warnings": ["w"]},
    )
    assert main(["reload"]) == 0
    assert capsys.readouterr().out == "the configuration is loaded\nchanged: big\nremoved: bad\nwarning: w\n"
    error = {"error": {"message": "a.yaml:1: x\na.yaml:2: y", "code": "invalid_configuration"}}
    daemon.answers["POST /admin/reload"] = (500, error)
    assert main(["reload"]) == 78
    assert capsys.readouterr().err == "vllmctl: a.yaml:1: x\na.yaml:2: y\n"


def test_a_quiet_reload_leaves_the_word_to_the_log(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """`systemctl reload` writes into the same journal as vllmd, which says all of it; a fault of its own is told."""
    daemon.answers["POST /admin/reload"] = (200, {"changed": ["big"], "later": {"server.port": LATER}})
    assert main(["reload", "--quiet"]) == 3
    daemon.answers["POST /admin/reload"] = (400, {"error": {"message": "x", "code": "invalid_configuration"}})
    assert main(["reload", "-q"]) == 78
    assert capsys.readouterr() == ("", "")
    daemon.answers["POST /admin/reload"] = (503, {"error": {"message": "it is opening"}})
    assert main(["reload", "--quiet"]) == 75
    assert "it is opening" in capsys.readouterr().err


def test_logs_runs_journalctl_over_all_runs_of_the_model(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The journal keeps what earlier engines wrote, too."""
    journalctl = tmp_path / "bin" / "journalctl"
    journalctl.parent.mkdir()
    journalctl.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    journalctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{journalctl.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("vllmd.cli.verbs.logs.journal_is_readable", lambda: True)
    assert main(["logs", "-f", "-n", "5", "q"]) == 0
    hexes = "[0-9a-f]" * 6
    unit = f"--unit=vllmd-model-qwen-qwen3-0-6b-{hexes}.scope"
    assert capfd.readouterr().out.split() == [
        "--no-pager",
        "--no-hostname",
        "--output=short-iso",
        unit,
        "--lines=5",
        "--follow",
    ]


def test_logs_without_systemd_come_from_the_daemon(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The fallback launcher writes no journal."""
    daemon.answers["GET /admin/status"] = (200, status(BIG, backend="sessions"))
    daemon.answers["GET /admin/logs/big?lines=50"] = (200, ["one", "two"])
    assert main(["logs", "big"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_logs_come_from_the_daemon_where_the_journal_is_closed(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may look on need not be in the journal's groups."""
    monkeypatch.setattr("vllmd.cli.verbs.logs.journal_is_readable", lambda: False)
    daemon.answers["GET /admin/logs/Qwen%2FQwen3-0.6B?lines=50"] = (200, ["one", "two"])
    assert main(["logs", "q"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_over_a_url_with_a_key(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The same verbs from another machine."""
    with fake_daemon({"GET /admin/status": (200, status())}) as remote:
        assert main(["--url", remote.address, "--key", "sesame", "ps"]) == 0
        assert remote.seen[0][2]["Authorization"] == "Bearer sesame"
    assert "no models yet; vllmctl run smollm2" in capsys.readouterr().out


def test_top_shows_devices_and_models_once(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """``-n 1`` is for scripts."""
    assert main(["top", "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("vllmd 0.1.0, up 61m: 3 requests run, 2 wait\n")
    assert "DEVICE" in out
    assert "MODEL " in out


def chunks(*texts: str) -> list[str]:
    """A streamed answer."""
    told = [f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}" for text in texts]
    return [": loading", *told, 'data: {"choices": [], "usage": {"completion_tokens": 9}}', "data: [DONE]"]


def test_chat_asks_and_prints_the_stream(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Comments, a chunk without choices and [DONE] are no text."""
    with fake_daemon({"POST /v1/chat/completions": (200, chunks("Hel", "lo"))}) as http:
        assert main(["chat", "--url", http.address, "-s", "Be brief.", "big", "say", "hello"]) == 0
        assert http.seen[0][1] == {
            "model": "big",
            "stream": True,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say hello"}],
        }
    assert capsys.readouterr().out == "Hello\n"


def test_chat_tells_an_error_in_the_stream(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The status was 200 long before the engine failed."""
    with fake_daemon({"POST /v1/chat/completions": (200, ['data: {"error": {"message": "it died"}}'])}) as http:
        assert main(["chat", "--url", http.address, "big", "x"]) == 69
    assert capsys.readouterr().err == "vllmctl: it died\n"


def test_bench_counts_tokens(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The first request loads the model and is not among the measured ones."""
    with fake_daemon({"POST /v1/chat/completions": (200, chunks("a", "b"))}) as http:
        assert main(["bench", "--url", http.address, "big", "-n", "6", "-c", "2", "--json"]) == 0
        assert len(http.seen) == 7
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens/s in all"] == pytest.approx(9 * figures["requests/s"])


def imported(*argv: str) -> set[str]:
    """The modules that a process has after vllmctl was run in it."""
    code = (
        "import contextlib, io, json, sys; from vllmd.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(sys.argv[1:])\n"
        "print(json.dumps([*sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_ps_imports_little(daemon: FakeDaemon) -> None:
    """Each module is time until its answer: none of ours but those that it needs, none of the library's large ones."""
    found = imported("ps")
    assert {name for name in found if name.startswith("vllmd.")} == {
        *("vllmd.api", "vllmd.api.answers", "vllmd.api.codec", "vllmd.api.json_types"),
        *("vllmd.errors", "vllmd.frozen", "vllmd.sizes", "vllmd.text"),
        *("vllmd.cli", "vllmd.cli.verbs", "vllmd.cli.verbs.ps"),
        *(
            f"vllmd.cli.{name}"
            for name in ("admin", "arguments", "downloads", "failures", "nothing", "show", "standing", "terminal")
        ),
    }
    assert not found & {"asyncio", "difflib", "getpass", "httpx", "logging", "pathlib", "subprocess", "yaml"}


def test_help_imports_every_verb_and_little_else(daemon: FakeDaemon) -> None:
    """Neither the configuration nor engines: what a verb needs for its work it imports when it does that."""
    found = imported("--help")
    packages = {name.split(".")[1] for name in found if name.startswith("vllmd.")}
    assert packages == {"api", "cli", "errors", "frozen", "sizes", "text"}
    assert not found & {"asyncio", "httpx", "yaml"}


EVIL = "\x1b]0;owned\x07\x1b[31m\x9b\u202e"
ECHOED = "data: " + json.dumps({"choices": [{"delta": {"content": EVIL, "reasoning": "\x1b[2J"}}]}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("argv", "request_", "answer"),
    [
        (["ps"], "GET /admin/status", status(model("m", "error", failure=EVIL + "a", waiting_for=EVIL))),
        (["info"], "GET /admin/status", status(model("m"), backend=EVIL)),
        (["events"], "GET /admin/events", ["data: " + json.dumps({"at": 0, "what": EVIL, "model": "m", "why": EVIL})]),
        (["logs", "m"], "GET /admin/logs/m?lines=50", [EVIL]),
        (["load", "m"], "POST /admin/models/m/load?wait=true", [json.dumps({"error": {"message": EVIL}})]),
        (["chat", "m", "hi"], "POST /v1/chat/completions", [ECHOED]),
        (["reload"], "POST /admin/reload", {"warnings": [EVIL], "error": EVIL}),
    ],
)  # fmt: skip
def test_no_answer_commands_the_terminal(
    argv: list[str], request_: str, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may quote an engine, and with --url come from anybody."""
    answers = {"GET /admin/status": (200, status(model("m"))), request_: (200, answer)}
    with fake_daemon(answers) as running:
        main([*argv, "--url", running.address])
        assert any(request == request_ for request, _, _ in running.seen), running.seen
    shown = "".join(capsys.readouterr())
    assert shown and not set(shown) & set("\x07\x1b\x9b\u202e")


def test_status_is_the_daemon_and_its_models(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """What people type first; of a model that failed the exit status says so."""
    assert main(["status"]) == 0
    said = capsys.readouterr().out
    assert "version:" in said and "Qwen/Qwen3-0.6B  running" in said
    assert main(["status", "q"]) == 0
    assert capsys.readouterr().out.startswith("Qwen/Qwen3-0.6B is running since ")
    assert main(["status", "bad"]) == 69
    assert "bad has failed 5.0s ago: the engine exited with status 1" in capsys.readouterr().out


def test_version_is_that_of_both(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """An upgrade may have changed one of them only."""
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"vllmctl": vllmd.__version__, "vllmd": "0.1.0"}


def test_version_starts_no_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is asked only if it is there."""
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "none"))
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vllmd"] == "(does not run)"


def test_restart_stops_and_starts(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """In this order, each waited for."""
    for verb, state in (("unload", "stopped"), ("load", "running")):
        daemon.answers[f"POST /admin/models/big/{verb}?wait=true"] = (
            200,
            [json.dumps({"done": True, "state": state, "seconds": 2.0})],
        )
    assert main(["restart", "big"]) == 0
    assert capsys.readouterr().out == "big is stopped after 2.0s\nbig is running after 2.0s\n"
    assert [what for what, _ in asked(daemon)] == [f"POST /admin/models/big/{v}?wait=true" for v in ("unload", "load")]


def test_what_an_upgrade_has_left_to_compile_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models of that engine which are not loaded, and were last started in another version; one that fails is told."""
    (tmp_path / "engines/vllm/0.33.0/bin").mkdir(parents=True)
    (tmp_path / "engines/vllm/0.33.0/bin/python").touch()
    monkeypatch.setenv("VLLMD_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "admin.sock"))
    other, told = {"engine": "llama.cpp"}, {"engine": "vllm"}
    lines = [
        model("new", "stopped", config=told),
        model("warm", "stopped", config=told, version="0.33.0"),
        model("busy", "running", config=told, version="0.32.0"),
        model("bad", "stopped", config=told, version="0.32.0"),
        model("gguf", "stopped", config=other),
        model("off", "stopped", config=told, disabled="maintenance"),
        model("old", "stopped", config=told, version="0.32.0"),
    ]
    came = {"load": "running", "unload": "stopped"}
    answers: dict[str, tuple[int, Any]] = {}
    for name in ("new", "old"):
        for verb, state in came.items():
            done = {"done": True, "state": state, "seconds": 2.0}
            answers[f"POST /admin/models/{name}/{verb}?wait=true"] = (200, [json.dumps(done)])
    failed = {"error": {"message": "no"}, "done": True}
    answers["POST /admin/models/bad/load?wait=true"] = (200, [json.dumps(failed)])
    with fake_daemon({"GET /admin/status": (200, status(*lines)), **answers}, tmp_path / "admin.sock") as daemon:
        assert main(["engine", "warm", "vllm"]) == 69
        tried = [(name, verb) for name in ("new", "bad", "old") for verb in came if (name, verb) != ("bad", "unload")]
        assert [what for what, _ in asked(daemon)] == [f"POST /admin/models/{n}/{v}?wait=true" for n, v in tried]
        said = capsys.readouterr()
        assert (said.err, said.out.count(" is stopped after 2.0s\n")) == ("vllmctl: bad: no\n", 2)
        daemon.answers["GET /admin/status"] = (200, status(lines[1]))
        assert main(["engine", "warm", "vllm"]) == 0
        assert "has been started in vllm 0.33.0" in capsys.readouterr().out
        assert main(["engine", "warm", "sglang"]) == 64


def test_status_tells_what_of_vllmds_own_is_not_well(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """It is where one looks first in the morning: a full disk, and files that are not in force."""
    wrong = {"files": ["a.yaml"], "error": "", "refused": "a.yaml:3: x"}
    daemon.answers["GET /admin/status"] = (200, status(model("m"), configuration=wrong, unwritten="the disk is full"))
    assert main(["status"]) == 0
    told = capsys.readouterr().out
    assert "not written" in told and "the disk is full" in told
    assert "not in force" in told and "a.yaml:3: x" in told


@pytest.mark.parametrize("words", [["status"], ["ps"], ["ps", "-r"], ["doctor"]])
def test_a_launcher_that_hangs_is_told_wherever_one_looks(
    words: list[str], daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing starts or ends, and no model's line says why; programs find it in the status."""
    why = "it has not answered a Start for 25 s, nor anything since; systemctl restart vllmd-launcher replaces it"
    daemon.answers["GET /admin/status"] = (200, status(model("m"), launcher_trouble=why))
    assert main(words) == (0 if words[0] == "ps" else 69)
    assert why in " ".join(capsys.readouterr().out.split())
    if words[0] != "doctor":
        daemon.answers["GET /admin/status"] = (200, status(model("m")))
        assert main(words) == 0
        assert "launcher" not in capsys.readouterr().out


def test_a_launcher_that_is_about_to_be_there_is_waited_for(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At an upgrade the daemon has begun a moment before the launcher is of its version: nothing is shown of it yet."""
    why = "it is that of an older version"
    daemon.answers["GET /admin/status"] = (200, status(opened=False, launcher_trouble=why))

    def opens(seconds: float) -> None:
        daemon.answers["GET /admin/status"] = (200, status(model("m")))

    monkeypatch.setattr(time, "sleep", opens)
    assert main(["ps"]) == 0
    shown = capsys.readouterr().out
    assert "m " in shown and why not in shown


def test_help_begins_nobody_with_fifty_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever has just installed it reads the end of the list, where the first steps are."""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "vllmctl run smollm2" in "\n".join(capsys.readouterr().out.splitlines()[-8:])


def test_help_of_a_verb_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """As with --help."""
    with pytest.raises(SystemExit) as end:
        main(["help", "sleep"])
    assert end.value.code == 0
    assert "--level" in capsys.readouterr().out


def fake_journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "bin" / "journalctl"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("vllmd.cli.verbs.logs.journal_is_readable", lambda: True)


def test_the_last_lines_since_a_time_are_the_last_ones(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """systemd 252 gives the first ones for -n with --since, so it is not told of -n then."""
    fake_journalctl(tmp_path, monkeypatch, 'case "$*" in *--lines*) echo first;; *) seq 9;; esac')
    assert main(["logs", "q", "--since", "yesterday", "-n", "3"]) == 0
    assert capfd.readouterr().out.split() == ["7", "8", "9"]
    assert main(["logs", "q", "--since", "yesterday"]) == 0
    assert len(capfd.readouterr().out.split()) == 9


def test_models_whose_names_begin_alike_are_not_mixed(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their units' names may begin alike; the daemon wrote which unit was whose."""
    one, two = "organisation/a-model-of-a-very-long-name-instruct", "organisation/a-model-of-a-very-long-name-chat"
    daemon.answers["GET /admin/status"] = (200, status(model(one), model(two), backend="systemd"))
    records = [{"MODEL": one, "VLLMD_UNIT": "vllmd-model-x-000001.scope"}, {"MODEL": one}, {"MODEL": two,
               "VLLMD_UNIT": "vllmd-model-x-000002.scope"}]  # fmt: skip
    said = "\n".join(map(json.dumps, records))
    fake_journalctl(tmp_path, monkeypatch, f'case "$*" in *=json*) echo \'{said}\';; *) echo "$@";; esac')
    assert main(["logs", one]) == 0
    assert [word for word in capfd.readouterr().out.split() if "unit" in word] == ["--unit=vllmd-model-x-000001.scope"]
