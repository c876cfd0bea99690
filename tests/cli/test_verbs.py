"""Every verb of vllmctl: what it asks of the daemon, what it prints, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fake_daemon import FakeDaemon, GiB, fake_daemon, model, status
from vllmd.cli import main

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


def test_start_without_waiting(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """For scripts that load several."""
    daemon.answers["POST /admin/models/big/load"] = (202, BIG)
    assert main(["run", "--no-wait", "big"]) == 0
    assert capsys.readouterr().out == "big: asked for\n"


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
        "     0   80GiB     30GiB  49GiB     1GiB          -  Qwen/Qwen3-0.6B, big"
    )


def test_events_are_told_as_they_come(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Server-sent events, comments left out."""
    events = [": hello", "", 'data: {"at": 0, "what": "start", "model": "big", "why": "asked for"}', "",
              'data: {"at": 0, "what": "stop", "model": "bad", "why": "idle"}']  # fmt: skip
    daemon.answers["GET /admin/events"] = (200, events)
    assert main(["events", "--model", "big"]) == 0
    assert capsys.readouterr().out.endswith("start big: asked for\n")


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


def test_logs_runs_journalctl_over_all_runs_of_the_model(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The journal keeps what earlier engines wrote, too."""
    journalctl = tmp_path / "bin" / "journalctl"
    journalctl.parent.mkdir()
    journalctl.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    journalctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{journalctl.parent}:{os.environ['PATH']}")
    assert main(["logs", "-f", "-n", "5", "q"]) == 0
    hexes = "[0-9a-f]" * 6
    unit = f"--unit=vllmd-model-qwen-qwen3-0-6b-{hexes}.scope"
    assert capfd.readouterr().out.split() == ["--no-pager", "--output=short-iso", unit, "--lines=5", "--follow"]


def test_logs_without_systemd_come_from_the_daemon(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The fallback launcher writes no journal."""
    daemon.answers["GET /admin/status"] = (200, status(BIG, backend="sessions"))
    daemon.answers["GET /admin/logs/big?lines=50"] = (200, ["one", "two"])
    assert main(["logs", "big"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_over_a_url_with_a_key(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The same verbs from another machine."""
    with fake_daemon({"GET /admin/status": (200, status())}) as remote:
        assert main(["--url", remote.address, "--key", "sesame", "ps"]) == 0
        assert remote.seen[0][2]["Authorization"] == "Bearer sesame"
    assert "no models are configured" in capsys.readouterr().out


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


def test_ps_is_quick_and_imports_little(daemon: FakeDaemon) -> None:
    """Nobody waits for httpx or asyncio, nor for the other verbs."""
    code = (
        "import sys, time; began = time.monotonic(); from vllmd.cli import main; main(['ps']);"
        "print(time.monotonic() - began, *sorted(sys.modules.keys() &"
        " {'asyncio', 'httpx', 'yaml', 'h11', 'vllmd.cli.verbs.chat', 'vllmd.config'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *imported = done.stdout.splitlines()[-1].split()
    assert imported == []
    assert float(seconds) < 2  # the aim is 0.15 for the whole process; a loaded test machine may be slower
