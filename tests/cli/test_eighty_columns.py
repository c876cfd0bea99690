"""On a terminal no line of any verb is wider than the terminal; into a pipe every name is whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fake_daemon import FakeDaemon, GiB, fake_daemon, model, status
from tests.engines.test_environments import environment
from vllmd.api.answers import ModelLine
from vllmd.api.codec import parse
from vllmd.cli import main
from vllmd.cli.arguments import verbs
from vllmd.cli.terminal import StatusLine, Working, table
from vllmd.cli.verbs.ps import CAUSE, note
from vllmd.text import shortened, width

WIDE = 80
LONG = "organisation-with-a-name/Model-of-Words-{}-480B-A35B-Instruct-FP8"
WHY = "the engine exited with status 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0"
STATES = (
    "running",
    "starting",
    "waking",
    "falling_asleep",
    "sleeping_l1",
    "sleeping_l2",
    "error",
    "stopped",
    "draining",
)


def line(number: int) -> dict[str, Any]:
    """One model of many, each remarkable in several ways."""
    name, state = LONG.format(number), STATES[number % len(STATES)]
    about: dict[str, Any] = {
        "devices": list(range(8)), "memory": 123.4 * GiB, "in_flight": 1234, "queued": 999, "oldest_wait": 54321.0,
        "idle": 54321.0, "pinned": True, "leases": ["a-notebook-of-somebody", "another"], "since": 98765.4,
        "failure": f"{WHY}\nTraceback: {'x ' * 100}" if state == "error" else "",
        "waiting_for": "room beside " + ", ".join(LONG.format(other) for other in range(3)),
        "phase": "weights" if state == "starting" else "", "detail": "3/8", "power": 123.4, "latency": 0.1234,
        "config": {"engine": "llama.cpp", "model": f"/srv/models/{name}.gguf", "aliases": [f"alias-{number}", "other"]},
    }  # fmt: skip
    replicas = [model(f"{name}@{each}", "running", health="serving", latency=0.1, power=3.0) for each in (1, 2)]
    return model(name, state, replicas=replicas if number % 7 == 0 else [], degraded=number % 14 == 0, **about)


def test_an_engine_that_says_much_leaves_room_for_the_other_models() -> None:
    """One failed model must not push the rest of ps off the screen; vllmctl why has all of it."""
    failed = parse(ModelLine, model("m", "error", failure="error: " + "x " * 5000))
    assert width(note(failed)) <= CAUSE


MANY = status(
    *map(line, range(45)),
    devices=[
        {
            "index": index, "memory": 143771 << 20, "reserve": 512 << 20, "promised": 81 * GiB, "external": 1 << 20,
            "wedged": "1.5 GiB did not come back after a stop" if index == 3 else "", "drained": index == 4,
            "name": "NVIDIA H200 NVL", "power": 123.0, "temperature": 45.0, "throttled": "", "links": list(range(8)),
            "node": 1,
        }
        for index in range(8)
    ],
    configuration={"files": [f"/etc/vllmd/models.d/{LONG.format(n)[25:]}.yaml" for n in range(4)], "error": ""},
)  # fmt: skip
DECIDED = [
    {"at": 1.0, "what": "evict", "model": LONG.format(1), "why": f"it makes room for {LONG.format(2)}: {WHY}",
     "numbers": {"victims": f"{LONG.format(3)}:1", "need": 123456789, "free": 0.123456}}
]  # fmt: skip
FIRST = LONG.format(0)
QUOTED = FIRST.replace("/", "%2F")
DEVICE = {**MANY["devices"][0], "drained": True}
CACHED = {
    "name": FIRST,
    "path": f"/var/lib/vllmd-engine/.cache/huggingface/hub/{FIRST}",
    "size": 9 * GiB,
    "models": [],
    "kind": "generate",
    "engine": "llama.cpp",
    "files": [f"{LONG[25:].format(n)}-Q4_K_M.gguf" for n in range(9)],
}
FETCHING = {"model": FIRST, "phase": "downloading", "source": FIRST, "total": 9 * GiB, "rate": 1e7, "elapsed": 9.0}
ANSWERS: dict[str, tuple[int, Any]] = {
    "GET /admin/status": (200, {**MANY, "downloads": [{**FETCHING, "completed": GiB}]}),
    f"GET /admin/decisions?model={QUOTED}": (200, {"decisions": DECIDED}),
    f"POST /admin/models/{QUOTED}/load": (202, line(0)),
    f"POST /admin/models/{QUOTED}/pin": (200, line(0)),
    **{f"POST /admin/models/{QUOTED}/{verb}": (200, {**line(0), "disabled": WHY}) for verb in ("disable", "enable")},
    "POST /admin/suspend": (200, {"devices": list(range(8)), "stopped": [FIRST, LONG.format(1)], "left": [FIRST]}),
    f"POST /admin/models/{QUOTED}/lease": (200, line(0)),
    f"POST /admin/models/{QUOTED}/probe": (200, {"fastest": None, "replicas": [
        {"name": f"{FIRST}@1", "seconds": None, "message": WHY},
        {"name": f"{FIRST}@2", "seconds": 0.1, "message": ""}]}),
    "POST /admin/devices/0/drain": (200, DEVICE),
    "POST /admin/reload": (200, {"changed": [LONG.format(n) for n in range(5)], "added": [FIRST], "removed": [],
                                 "later": {"server.listen": "takes effect at the next start of vllmd"},
                                 "warnings": [f"/etc/vllmd/vllmd.yaml:7: models.{FIRST}.extra_args: {WHY}"]}),
    "POST /admin/processes/99/kill": (200, {"message": f"the engine of {FIRST} was killed, with 12 processes of it"}),
    **{f"POST /admin/models/{QUOTED}/{verb}?wait=true": (200, [
        json.dumps({"state": "starting", "phase": "loading weights", "detail": WHY, "elapsed": 12.0}),
        json.dumps({"done": True, "state": "running", "seconds": 100.0})]) for verb in ("load", "unload", "wake")},
    f"POST /admin/models/{QUOTED}/sleep?level=1&wait=true": (200, [
        json.dumps({"done": True, "state": "sleeping_l1", "seconds": 100.0})]),
    "GET /admin/events": (200, [f"data: {json.dumps(DECIDED[0])}"]),
    "GET /admin/store": (200, {"cached": [CACHED], "hub": "http://127.0.0.1:9"}),
    f"GET /v1/models/{QUOTED}": (200, {"max_model_len": 4096, "capabilities": ["chat", "completion"] * 9,
                                       "description": WHY}),
    "POST /admin/store/pull": (200, [json.dumps({**FETCHING, "completed": at}) for at in (0, 5 * GiB)] + [
        json.dumps({"done": True, "model": FIRST, "total": 9 * GiB, "seconds": 700.0, "added": True})]),
    f"PUT /admin/store/models/{QUOTED}": (200, {"file": f"/var/lib/vllmd/models.d/{LONG.format(0)[25:]}.yaml"}),
    f"DELETE /admin/store/models/{QUOTED}?files=true": (200, {
        "file": "/x", "freed": 9 * GiB, "kept": f"other files of {FIRST} stay, for {LONG.format(1)}"}),
}  # fmt: skip
REQUEST = {
    "id": "0123456789abcdef0123456789abcdef", "number": 7, "at": 1.0, "method": "POST", "path": "/v1/chat/completions",
    "model": FIRST, "replica": f"{FIRST}@1", "key": "a-key-of-somebody", "client": "192.168.100.100:65535",
    "status": 503, "error": "EngineFailed", "message": WHY, "stream": True, "received": 123456, "sent": 1234567,
    "queue_seconds": 123.4, "load_seconds": 0.1, "first_byte_seconds": None, "seconds": 99999.0, "retries": 2,
    "tokens": {"prompt": 123456, "cached": 123, "answer": 12345, "estimated": True}, "bodies": True,
}  # fmt: skip
USE = {"requests": 123456.0, "errors": 12.0, "prompt": 123456789.0, "cached": 1e9, "answer": 1e7, "estimated": 1e5,
       "engine_seconds": 1e6, "device_seconds": 1e6, "memory_mib_seconds": 1e12}  # fmt: skip
ANSWERS |= {
    "GET /admin/requests?limit=20": (200, {"requests": [REQUEST, {**REQUEST, "tokens": None}], "under_way": [REQUEST]}),
    "DELETE /admin/requests/x": (200, {"cancelled": [REQUEST]}),
    "GET /admin/requests/x": (200, {**REQUEST, "headers": [["user-agent", "x" * 100]], "recorded": {
        "request": '{"model": "' + "x " * 200 + '"}', "answer": "y " * 200, "request_cut": False, "answer_cut": True}}),
    "GET /admin/usage?by=key%2Cmodel%2Cday&since=30d": (200, {"by": ["key", "model", "day"], "trouble": WHY, "rows": [
        {"key": "a-key-of-somebody", "model": LONG.format(n), "day": "2024-10-04", **USE} for n in range(3)]}),
    "GET /admin/keys": (200, {"keys": [
        {"name": "a-key-of-somebody-" * 3, "scopes": ["models", "read", "admin"], "models": [FIRST], "configured": True,
         "at": None, "settings": {"tokens_per_month": 123456789, "device_seconds_per_day": 86400, "priority": 9}}]}),
    "GET /admin/recordings": (200, {"recordings": [
        {"number": 1, "model": FIRST, "key": "a-key-of-somebody", "most_bytes": 65536, "seconds_left": 1234.0}],
        "requests": 3, "bytes": 123456}),
}  # fmt: skip
MISSING = LONG.format("X")
SCREENS = [
    "ps", "ps --power", "ps --running", "info", "models", "gpus", "top -n 1", f"why {FIRST} --numbers", "events",
    "reload", "requests", "requests show x", "usage --by key,model,day", "record", "key list",
    f"start {FIRST}", f"start --no-wait {FIRST}", f"stop {FIRST}", f"sleep {FIRST}", f"wake-up {FIRST}", f"pin {FIRST}",
    f"unpin {FIRST}", f"lease {FIRST} --for 5m", f"probe {FIRST}", "drain 0", "undrain 0", "kill 99",
    f"disable {FIRST} --message gone", f"enable {FIRST}", "suspend", "resume",
    "list", f"show {FIRST}", f"pull {FIRST}", f"run {FIRST}", f"add {FIRST}", "add", f"rm --files --yes {FIRST}",
    "search qwen", "cancel x",
    "status", f"status {FIRST}", "version", "help", f"restart {FIRST}", *(f"help {verb}" for verb in verbs()),
    "engine list", "engine install foo", "engine use vllm 1",
    f"start {MISSING}", f"why {MISSING}", "pss", f"logs a {MISSING}", f"lease {MISSING} --for {MISSING}",
]  # fmt: skip
# What shows what others wrote as it is, or a file to be read by programs, or is shown by others of these.
NOT_HERE = frozenset(
    {"logs", "chat", "bench", "completion", "config", "import", "assign", "doctor", "simulate", "trace", "ui"}
)


class Screen:
    """A terminal of so many columns in place of stdout and stderr."""

    def __init__(self, columns: int) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.file = os.fdopen(slave, "w")
        self._read = bytearray()
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(self._master, 4096):
                self._read += data

    def text(self) -> str:
        self.file.close()
        self._thread.join(10)
        os.close(self._master)
        return self._read.decode()


@contextlib.contextmanager
def screen(monkeypatch: pytest.MonkeyPatch, columns: int = WIDE) -> Iterator[Screen]:
    shown = Screen(columns)
    monkeypatch.setattr(sys, "stdout", shown.file)
    monkeypatch.setattr(sys, "stderr", shown.file)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    yield shown


def lines(text: str) -> list[str]:
    """What stood in a row at any time, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return re.split(r"[\r\n]+", plain)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "admin.sock"))
    monkeypatch.setenv("VLLMD_ENGINES", str(tmp_path / "engines"))
    for version in ("2026.10.11549", "2026.9.1"):
        environment(tmp_path / "engines", version)
    with fake_daemon(dict(ANSWERS), tmp_path / "admin.sock") as running:
        yield running


def run(argv: list[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(argv)


@pytest.mark.parametrize("command", SCREENS, ids=lambda command: command.replace(FIRST, "M").replace(MISSING, "X"))
def test_no_line_is_wider_than_the_terminal(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """With 45 models of long names, replicas, eight devices, and something to say about each."""
    with screen(monkeypatch) as shown:
        run(command.split())
    text = shown.text()
    assert text.strip()
    told = [each for each in lines(text) if width(each) > WIDE and width(each.strip().split(" ")[0]) <= WIDE - 4]
    assert told == []


def test_every_verb_is_looked_at() -> None:
    """A new one has its line in SCREENS, or a reason why not."""
    assert {*verbs()} - NOT_HERE - {command.split()[0] for command in SCREENS} == set()


@pytest.mark.parametrize("command", ["ps", "models", "gpus", f"why {FIRST}", f"probe {FIRST}"])
def test_into_a_pipe_names_are_whole_and_rows_are_one_line(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """For grep and awk."""
    run(command.split())
    said = capsys.readouterr().out
    assert FIRST in said or LONG.format(1) in said


@pytest.mark.parametrize("columns", [40, 60, 132, 400])
def test_other_terminals(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """A wide one gets all that fits; a narrow one nothing that is wider than the columns of a table must be."""
    with screen(monkeypatch, columns) as shown:
        run(["ps"])
    widest = max(map(width, lines(shown.text())))
    assert widest <= max(columns, 75)
    if columns == 400:
        assert widest > 132


def test_a_row_is_one_line() -> None:
    """Whatever a name of somebody else's has in it."""
    assert table(("A", "B"), [("x\ny", "z")]).splitlines() == ["A     B", "x\\ny  z"]


def test_a_name_keeps_both_its_ends() -> None:
    """Where models differ: who made it, and in which form."""
    assert shortened("Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8", 20) == "Qwen/Qwen..truct-FP8"
    assert shortened("short", 20) == "short"
    for most in range(5, 40):
        assert width(shortened("模型" * 30, most)) <= most
    assert width("e\u0301\u0323") == 1


def test_a_table_that_fits_is_one_line_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes go beneath only where they must."""
    with screen(monkeypatch):
        assert len(table(("A", "NOTE"), [("x", "short")]).splitlines()) == 2
        assert table(("A", "NOTE"), [("x", "word " * 30)]).splitlines()[2].startswith("    word word")


def test_the_seconds_go_on_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits sees that it works: the line is drawn again although nobody said anything new."""
    drawn = threading.Event()

    def render(since: float) -> str:
        if since > 0.4:
            drawn.set()
        return f"m: starting, {since:.0f}s"

    with screen(monkeypatch) as shown:
        status_line = StatusLine()
        status_line.say(render, "starting")
        assert drawn.wait(120)
        status_line.clear()
    assert shown.text().count("m: starting") >= 2


def test_what_takes_a_moment_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what takes longer says for how long."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with screen(monkeypatch) as shown, Working("asking"):
        pass
    assert shown.text() == ""
    with screen(monkeypatch) as shown, Working("asking") as working:
        now += 7
        working._line._draw()
    assert "asking, 7s" in shown.text()


def test_a_description_is_filled_anew_where_its_lines_are_too_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not cut, which would leave a word alone in a line; where there is room its own lines stay."""
    told = {}
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            main(["lease", "--help"])
        told[columns] = capsys.readouterr().out
    assert "does not sleep. After the lease its\nidle rules apply" in told["80"]
    assert "does not sleep. After the lease its idle\nrules apply" in told["120"]
