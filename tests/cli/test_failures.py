"""Wrong usage and absent daemons: each message says what to do next, each status is of sysexits."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllmd
from tests.cli.fake_daemon import fake_daemon, model, status
from vllmd.cli import admin, arguments, failures, main
from vllmd.cli.terminal import cut
from vllmd.cli.verbs import reload
from vllmd.daemon.main import main as daemon_main


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit status and the first line of stderr."""
    try:
        code = main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    lines = capsys.readouterr().err.splitlines()
    return code, lines[0] if lines else ""


USAGE = [
    (["pss"], "vllmctl: there is no verb 'pss'; did you mean 'ps'?"),
    (["zzz"], "vllmctl: there is no verb 'zzz'; vllmctl --help lists them"),
    ([], "vllmctl: the following arguments are required: VERB"),
    (["ps", "extra"], "vllmctl ps: unrecognized arguments: extra"),
    (["start"], "vllmctl start: the following arguments are required: MODEL"),
    (["stop"], "vllmctl stop: the following arguments are required: MODEL"),
    (["sleep", "m", "--level", "4"], "vllmctl sleep: argument -l/--level: invalid choice: 4 (choose from 1, 2, 3)"),
    (["sleep", "m", "--level"], "vllmctl sleep: argument -l/--level: expected one argument"),
    (["lease", "m", "--for", "soon"], "vllmctl lease: argument --for: 'soon' is not a duration; "
     "accepted: a duration such as 0, 300, 5m or 1h30m"),
    (["lease", "m", "--for", "5m", "--release"], "vllmctl lease: argument --release: not allowed with argument --for"),
    (["logs", "a", "b"], "vllmctl logs: unrecognized arguments: b"),
    (["logs", "a", "-n", "x"], "vllmctl logs: argument -n/--lines: invalid int value: 'x'"),
    (["kill"], "vllmctl kill: the following arguments are required: PID"),
    (["kill", "vllm"], "vllmctl kill: argument PID: 'vllm' is not the number of a process"),
    (["kill", "1"], "vllmctl kill: argument PID: '1' is not the number of a process"),
    (["why"], "vllmctl why: the following arguments are required: MODEL"),
    (["config"], "vllmctl config: the following arguments are required: check|show|schema"),
    (["assign", "m"], "vllmctl: say what to assign: --devices or --gpu-memory"),
    (["assign", "m", "--devices", "x"], "vllmctl: --devices: 'x' is not a number: devices are numbers from 0; "
     "accepted: auto, or device numbers such as [0, 1]"),
    (["bench", "m", "-n", "0"], "vllmctl: --requests and --clients must be at least 1"),
    (["show"], "vllmctl show: the following arguments are required: MODEL"),
    (["download", "m"], "vllmctl: there is no verb 'download'; vllmctl pull fetches a model"),
    (["del", "m"], "vllmctl: there is no verb 'del'; vllmctl rm removes a model"),
    (["--url", "ftp://x", "ps"], "vllmctl: 'ftp://x' is no URL; one is http://127.0.0.1:33258"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), USAGE, ids=[" ".join(row[0]) or "nothing" for row in USAGE])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    """Status 64, and the verb's own name."""
    assert said(capsys, *argv) == (64, message)


NEEDING = ["ps", "info", "models", "gpus", "events", "top", "start m", "stop m", "sleep m", "wake-up m",
           "pin m", "unpin m", "lease m", "why m", "logs m", "kill 99"]  # fmt: skip


@pytest.mark.parametrize("line", NEEDING)
def test_no_daemon(capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str) -> None:
    """Every verb that needs the daemon says how to start it."""
    path = tmp_path / "admin.sock"
    message = f"vllmctl: vllmd is not running: there is no {path}; systemctl start vllmd.socket, "
    message += "and if that is not enough, vllmctl doctor"
    assert said(capsys, "--socket", str(path), *line.split()) == (69, message)


def test_a_reload_without_a_daemon_checks_what_the_next_start_reads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to reload, which is no error; a file that is wrong is."""
    file = tmp_path / "vllmd.yaml"
    monkeypatch.setenv("VLLMD_CONFIG", str(file))
    file.write_text("models: {m: {}}")
    assert main(["--socket", str(tmp_path / "admin.sock"), "reload"]) == 0
    assert "vllmd does not run: its next start reads this" in capsys.readouterr().out
    file.write_text("modells: {}")
    assert main(["--socket", str(tmp_path / "admin.sock"), "reload"]) == 78
    said = capsys.readouterr()
    assert "its next start fails on this" in said.out and "modells" in said.err


@pytest.mark.parametrize("state", ["inactive", "active", "failed", "activating"])
def test_a_reload_asks_systemd_whether_there_is_a_daemon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str
) -> None:
    """Its sockets are there whether it runs or not, and to connect would start it."""
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\necho {state}; test {state} = active")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert reload.runs(admin.SYSTEM_SOCKET) is (state in ("active", "activating"))
    assert reload.runs(admin.user_socket()) is (state in ("active", "activating"))


def test_a_socket_that_nobody_listens_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Left over by a daemon that was killed."""
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    code, message = said(capsys, "--socket", str(path), "ps")
    assert code == 69
    assert message.endswith(f"nobody listens on {path}; systemctl start vllmd-admin.socket")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become nobody")
def test_a_socket_that_is_not_for_us(tmp_path: Path) -> None:
    """Says which group is meant, and how to join it. The program is read from where everybody may."""
    tmp_path.chmod(0o700)
    code = (
        "import getpass, os, pwd, sys; from vllmd.cli import main; ask = ['--socket', sys.argv[1], 'ps'];"
        "main(ask); sys.stderr.flush(); os.setuid(65534); raise SystemExit(main(ask))"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(Path(vllmd.__file__).parent, f"{folder}/vllmd")
        done = subprocess.run(
            [sys.executable, "-c", code, f"{tmp_path}/s"],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder},
        )
    assert done.returncode == 77, done.stderr
    assert done.stderr.splitlines()[1] == (
        f"vllmctl: you may not use {tmp_path}/s, which is open to the group vllmd-admin (vllmd-read: read-only); "
        "sudo usermod -aG vllmd-admin nobody, then log in again"
    )


def test_a_url_that_cannot_be_reached(capsys: pytest.CaptureFixture[str]) -> None:
    """The system's own word is passed on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    message = f"vllmctl: http://127.0.0.1:{port} cannot be reached: Connection refused; on that machine: "
    message += "systemctl start vllmd.socket"
    assert said(capsys, "--url", f"http://127.0.0.1:{port}", "ps") == (69, message)


def test_a_daemon_that_is_too_busy_to_answer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts, and says nothing: try again later, and where to look."""
    monkeypatch.setattr(admin, "ANSWER_SECONDS", 0.1)
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen()
        assert said(capsys, "--socket", str(path), "ps") == (
            75, f"vllmctl: vllmd at {path} does not answer; see journalctl -u vllmd"
        )  # fmt: skip


ANSWERS = [
    (404, {"error": {"message": "model 'x' does not exist; did you mean 'y'?", "code": "model_not_found"}}, 65),
    (401, {"error": {"message": "a key is needed", "code": "invalid_api_key"}}, 77),
    (403, {"error": {"message": "this key may not", "code": "insufficient_permissions"}}, 77),
    (409, {"error": {"message": "it is leased", "code": "conflict"}}, 75),
    (503, {"error": {"message": "no room", "code": "model_unavailable"}}, 75),
    (503, {"error": {"message": "it died", "code": "engine_failed"}}, 69),
    (500, {"error": {"message": "oops"}}, 70),
]


@pytest.mark.parametrize(("http", "body", "code"), ANSWERS, ids=[str(row[1]["error"]["message"]) for row in ANSWERS])
def test_the_daemon_says_no(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, http: int, body: Any, code: int
) -> None:
    """Its own message is shown; the status tells scripts whether to try again."""
    with fake_daemon({"POST /admin/models/x/pin": (http, body)}, tmp_path / "s"):
        assert said(capsys, "--socket", str(tmp_path / "s"), "pin", "x") == (
            code,
            f"vllmctl: {body['error']['message']}",
        )


def test_an_administrator_is_not_told_to_tell_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What clients hear of an invalid configuration is for those who cannot repair it."""
    message = "vllmd's configuration is invalid, tell its administrator: a.yaml:9"
    with fake_daemon({"POST /admin/models/x/pin": (503, {"error": {"message": message}})}, tmp_path / "s"):
        told = "vllmctl: vllmd's configuration is invalid, see vllmctl config check: a.yaml:9"
        assert said(capsys, "--socket", str(tmp_path / "s"), "pin", "x") == (78, told)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[str]:
    """The socket of a daemon with two models that share an end."""
    models = (model("a/m"), model("b/m"), model("qwen"))
    with fake_daemon({"GET /admin/status": (200, status(*models))}, tmp_path / "s"):
        yield str(tmp_path / "s")


NAMES = [
    ("m", "vllmctl: model 'm' could be 'a/m' or 'b/m'; name one of them"),
    ("qwn", "vllmctl: model 'qwn' does not exist; did you mean 'qwen'?"),
    ("zzz", "vllmctl: model 'zzz' does not exist; vllmctl models lists them"),
]


@pytest.mark.parametrize(("name", "message"), NAMES)
def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], two: str, name: str, message: str) -> None:
    """The close ones are named."""
    assert said(capsys, "--socket", two, "why", name) == (65, message)


def in_order(*argv: str) -> list[str]:
    return arguments.in_order(arguments.build([argv[0]]), argv)


ANYWHERE = [
    (["chat", "m", "--max-tokens", "5", "hi", "there"], ["chat", "--max-tokens=5", "m", "hi", "there"]),
    (["chat", "m", "hi", "--max-tok=5", "you"], ["chat", "--max-tok=5", "m", "hi", "you"]),
    (["chat", "m", "-s", "be brief", "hi"], ["chat", "-sbe brief", "m", "hi"]),
    (["chat", "m", "--", "-5", "degrees?"], ["chat", "--", "m", "-5", "degrees?"]),
    (["start", "a", "--no-wait", "b"], ["start", "--no-wait", "a", "b"]),
    (["logs", "m", "-n5", "-f"], ["logs", "-n5", "-f", "m"]),
    (["logs", "m", "--since", "-1h", "-n", "2"], ["logs", "--since=-1h", "-n2", "m"]),
    (["gpus", "--json"], ["gpus", "--json"]),
    (["config", "check", "file", "--json"], ["config", "check", "file", "--json"]),
    (["sleep", "a", "--level"], ["sleep", "a", "--level"]),
]


@pytest.mark.parametrize(("argv", "ordered"), ANYWHERE, ids=[" ".join(row[0]) for row in ANYWHERE])
def test_options_stand_anywhere(argv: list[str], ordered: list[str]) -> None:
    """Between words, too, which the argparse of Debian 12 does not take; what stands behind -- is no option."""
    assert in_order(*argv) == ordered


def test_words_on_both_sides_of_an_option_are_all_taken() -> None:
    """For every verb that takes several."""
    found = arguments.parse(["chat", "m", "one", "--max-tokens", "5", "two"])
    assert (found.model, found.message, found.max_tokens) == ("m", ["one", "two"], 5)
    assert arguments.parse(["--json", "start", "a", "--no-wait", "b"]).models == ["a", "b"]


def test_the_manual_has_every_exit_status_and_none_that_never_comes() -> None:
    """Its table is drawn from EXITS, and every status of a verb is one of those constants."""
    constants = {name: value for name, value in vars(failures).items() if name.startswith("EX_")}
    assert set(constants.values()) == set(failures.EXITS)
    folder = Path(failures.__file__).parent
    sources = [file.read_text() for file in folder.rglob("*.py")]
    used = {name for name in constants for text in sources if len(re.findall(rf"\b{name}\b", text)) > 1 or (
        re.search(rf"\b{name}\b", text) and "EXITS = {" not in text)}  # fmt: skip
    assert used == set(constants)
    literal = [each for text in sources for each in re.findall(r"return [1-9][0-9]*$|exit\([1-9]", text, re.M)]
    assert literal == []
    table = (Path(__file__).resolve().parents[2] / "man/vllmctl.1").read_text().partition(".Sh EXIT STATUS")[2]
    told = re.findall(r"^\.It (\d+)$", table.partition(".Sh EXAMPLES")[0], re.M)
    assert [int(each) for each in told] == list(failures.EXITS)


def test_vllmd_itself_ends_with_64_for_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As its manual says."""
    with pytest.raises(SystemExit) as end:
        daemon_main(["--nonsense"])
    assert end.value.code == 64
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_what_is_left_out_is_marked_once() -> None:
    """Engines and the daemon mark it already."""
    text = "loading took 1.350... GiB"
    shown = [cut(text, most) for most in range(10, len(text))]
    assert "loading took 1.350..." in shown
    assert not [each for each in shown if "...." in each or not each.endswith("...")]
