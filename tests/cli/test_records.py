"""``requests``, ``usage`` and ``record``: what they ask for, and what they print."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fake_daemon import fake_daemon
from tests.cli.test_eighty_columns import REQUEST, USE
from vllmd.api.answers import RequestInFull, RequestTokens
from vllmd.api.codec import parse
from vllmd.cli import main
from vllmd.cli.verbs.requests import curl, tokens
from vllmd.cli.verbs.usage import short

HEADERS = [["user-agent", "x"], ["x-mine", "`touch /tmp/x` $HOME 'q'"], ["x-token", "(cut)"], ["content-type", "a/b"]]
BODY = '{"model": "m", "text": "it\'s $(date)"}'
SHOWN: dict[str, Any] = {
    **REQUEST, "headers": HEADERS,
    "recorded": {"request": BODY, "answer": "data: x", "request_cut": False, "answer_cut": False},
}  # fmt: skip


def ctl(answers: dict[str, tuple[int, Any]], *argv: str) -> tuple[int, list[Any]]:
    with fake_daemon(answers) as daemon:
        status = main(["--url", daemon.address, *argv])
    return status, [(asked, body) for asked, body, _ in daemon.seen]


def test_a_request_is_sent_again_as_it_was() -> None:
    """Whoever pastes the command runs nothing that a client wrote; its key is the administrator's to give."""
    import shlex

    command = curl(parse(RequestInFull, SHOWN), "http://h:1")
    words = shlex.split(command)
    assert words[:3] == ["curl", "-N", "http://h:1/v1/chat/completions"]
    assert words[words.index("--data-raw") + 1] == BODY
    assert "x-mine: `touch /tmp/x` $HOME 'q'" in words
    assert command.endswith('-H "Authorization: Bearer $VLLMD_API_KEY"')
    assert "x-token" not in command
    assert shlex.quote(BODY) in command


@pytest.mark.parametrize("recorded", [None, {**SHOWN["recorded"], "request_cut": True}])
def test_one_whose_body_is_not_known_cannot_be(recorded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It says why, and what would be right."""
    answers = {"GET /admin/requests/x": (200, {**SHOWN, "recorded": recorded})}
    status, _ = ctl(answers, "requests", "show", "x", "--curl")
    assert status == 66
    assert "it cannot be sent again" in capsys.readouterr().err


def test_filters_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """In the API's words."""
    asked = "GET /admin/requests?model=m&key=-&status=5xx&since=1h&failed=true&slower=2.0&limit=3"
    argv = ["requests", "-m", "m", "-k", "-", "-s", "5xx", "--since", "1h", "--failed", "--slower", "2", "-n", "3"]
    status, seen = ctl({asked: (200, {"requests": [], "under_way": []})}, *argv)
    assert (status, seen) == (0, [(asked, None)])
    assert "no such request" in capsys.readouterr().out


def test_what_was_reckoned_is_marked() -> None:
    """A tilde says so; large numbers are rounded."""
    assert tokens(parse(RequestTokens, REQUEST["tokens"])) == "~123456+12345"
    assert tokens(None) == "-"
    assert [short(number) for number in (0, 999, 1000, 123456, 4.5e6, 7e9)] == ["0", "999", "1.0k", "123.5k", "4.5M",
                                                                               "7.0G"]  # fmt: skip


def test_use_becomes_a_spreadsheet(capsys: pytest.CaptureFixture[str]) -> None:
    """All columns, whole numbers whole; and no name becomes a formula."""
    rows = [{"key": name, **USE, "engine_seconds": 1.23456} for name in ("a, b", "=cmd()")]
    answers = {"GET /admin/usage?by=key&since=30d": (200, {"by": ["key"], "trouble": "", "rows": rows})}
    assert ctl(answers, "usage", "--csv")[0] == 0
    told, formula = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert formula["key"] == "'=cmd()"
    assert (told["key"], told["requests"], told["engine_seconds"]) == ("a, b", "123456", "1.235")


def test_keys_are_asked_for_in_the_apis_words(capsys: pytest.CaptureFixture[str]) -> None:
    """The key is the one thing on the standard output; what takes no limits says so."""
    line = {"name": "a", "scopes": ["models"], "models": [], "configured": False, "at": 1.0, "settings": {"share": 2}}
    answers: dict[str, tuple[int, Any]] = {
        "POST /admin/keys": (200, {"name": "a", "key": "sk-1"}),
        "POST /admin/keys/a%2Fb/limits": (200, line),
        "DELETE /admin/keys/a": (200, {"keys": []}),
        "GET /admin/keys": (200, {"keys": []}),
    }
    given = {"scopes": ["read", "admin"], "tokens_per_day": 5}
    argv = ("key", "create", "a", "--scopes", "read,admin", "--tokens-per-day", "5")
    assert ctl(answers, *argv)[1][0] == ("POST /admin/keys", {"name": "a", "settings": given})
    assert capsys.readouterr() == ("sk-1\n", "")
    answers["GET /admin/keys"] = (200, {"keys": [line]})  # whoever made the first one locks out all who have none
    assert ctl(answers, *argv)[0] == 0
    told = capsys.readouterr()
    assert (told.out, "from now on every request needs one" in told.err) == ("sk-1\n", True)
    answers["GET /admin/keys"] = (200, {"keys": []})
    answers["GET /v1/models"] = (200, {"data": [{"id": "m"}]})
    assert ctl(answers, "key", "limit", "a/b", "--models", "m,n")[0] == 0
    assert capsys.readouterr().err == "there is no model 'n' in the list of models (vllmctl models)\n"
    _, seen = ctl(answers, "key", "limit", "a/b", "--share", "2", "--tokens-per-month", "none")
    assert seen == [("POST /admin/keys/a%2Fb/limits", {"settings": {"tokens_per_month": None, "share": 2}})]
    assert ctl(answers, "key", "revoke", "a")[0] == 0
    assert ctl(answers, "key", "list")[0] == 0
    assert "there are no keys" in capsys.readouterr().out
    for wrong in (("limit", "a"), ("revoke",), ("list", "a"), ("revoke", "a", "--share", "2")):
        assert ctl(answers, "key", *wrong)[0] == 64


def test_the_own_traffic_is_simulated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """And exported, into a file that nobody else reads; models that are gone are left out, and that is said."""
    trace = ['{"time": 1700000000, "model": "m", "prompt": 10, "output": 5, "key": "k"}',
             '{"time": 1700000001, "model": "gone", "prompt": 10, "output": 5}']  # fmt: skip
    (tmp_path / "vllmd.yaml").write_text("devices: [{memory: 80GiB}]\nmodels: {m: {engine: sim, gpu_memory: 20GiB}}\n")
    answers = {f"GET /admin/trace?since={since}": (200, trace) for since in ("7d", "1d")}
    with fake_daemon(answers) as daemon:
        argv = ["simulate", "--recorded", "7d", "-c", str(tmp_path / "vllmd.yaml"), "--url", daemon.address, "--json"]
        assert main(argv) == 0
        told = capsys.readouterr()
        assert "left out" in told.err
        assert "gone" in told.err
        out = tmp_path / "trace.jsonl"
        assert main(["--url", daemon.address, "trace", "export", "--since", "1d", "-o", str(out)]) == 0
    assert out.read_text().splitlines() == trace
    assert out.stat().st_mode & 0o777 == 0o600
    assert main(["simulate"]) == 64


def test_recordings_are_begun_and_ended(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing is begun unasked: without a word on whose, those that go on are shown."""
    nothing = (200, {"recordings": [], "requests": 0, "bytes": 0})
    answers = dict.fromkeys(("GET /admin/recordings", "POST /admin/recordings", "DELETE /admin/recordings",
                             "DELETE /admin/recordings?number=2"), nothing)  # fmt: skip
    assert ctl(answers, "record")[1] == [("GET /admin/recordings", None)]
    given = {"model": "m", "key": None, "seconds": 300.0, "most_bytes": 1024}
    assert ctl(answers, "record", "-m", "m", "--for", "5m", "--most", "1KiB")[1] == [("POST /admin/recordings", given)]
    assert ctl(answers, "record", "--stop", "all")[1] == [("DELETE /admin/recordings", None)]
    assert ctl(answers, "record", "--stop", "2")[1] == [("DELETE /admin/recordings?number=2", None)]
    assert ctl(answers, "record", "--stop", "all", "-m", "m")[0] == 64
    assert "no bodies are recorded" in capsys.readouterr().out
