"""A model that an operator takes out of use: what clients are told, what shows it, and that it outlives the daemon."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests.admin.site import Answer, Site, running, until
from vllmd.cli import main as vllmctl

WORDS = "moved to /models/alpha; back on Monday"
CONFIG = """\
devices: [{{memory: 80GiB, file: {folder}/gpu0}}]
server: {{idle_exit: never}}
defaults: {{engine: sim}}
models:
  alpha: {{aliases: [a], gpu_memory: 20GiB, options: {{load_time: 0.1s, tokens_per_second: 40}}}}
  beta: {{gpu_memory: 20GiB, options: {{load_time: 0.1s}}}}
pools:
  either: {{models: [alpha, beta]}}
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state" / "disabled.json"
    monkeypatch.setenv("VLLMD_DISABLED", str(path))
    return path


def told(site: Site, *words: str) -> int:
    return vllmctl([*words, "--socket", str(site.folder / "admin.sock")])


def test_a_disabled_model_says_so_until_it_is_enabled(
    tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path, CONFIG.format(folder=tmp_path)) as site:
        answers: list[Answer] = []
        long = [{"role": "user", "content": "word " * 60}]  # it says that again, at 40 tokens a second
        runs = threading.Thread(target=lambda: answers.append(site.chat("alpha", messages=long, max_tokens=60)))
        runs.start()
        until(lambda: site.line("alpha")["in_flight"] == 1)
        assert told(site, "disable", "a", "--message", WORDS) == 0
        assert f"a is disabled; clients get the message: {WORDS}" in capsys.readouterr().out
        refused = site.chat("a")
        assert (refused.status, refused.json["error"]["code"]) == (503, "model_disabled")
        assert refused.error == f"alpha is disabled: {WORDS}", "the words as they were said, with their path"
        assert site.chat("either").json["model"] == "either", "a pool has another model"
        runs.join(60)
        assert answers[0].status == 200, "what ran came to its end"
        until(lambda: site.line("alpha")["state"] == "stopped")
        again = site.ask("POST", "/admin/models/alpha/load", admin=True)
        assert (again.status, again.error) == (409, f"alpha is disabled: {WORDS}")
        # What shows it.
        assert site.line("alpha")["disabled"] == WORDS
        cards = {card["id"]: card["disabled"] for card in site.ask("GET", "/v1/models").json["data"]}
        assert (cards["alpha"], cards["beta"]) == (WORDS, "")
        assert 'vllmd_model_disabled{model="alpha"} 1.0' in site.ask("GET", "/metrics", admin=True).text
        for verb in (["ps"], ["why", "alpha"]):
            assert told(site, *verb) == 0
            assert WORDS in capsys.readouterr().out, verb
        assert told(site, "list") == 0
        assert "disabled" in capsys.readouterr().out
        assert any(each["what"] == "disable" for each in site.operate("GET", "/admin/decisions")["decisions"])
        refused = site.ask("POST", "/admin/models/either/disable", {}, admin=True)
        assert (refused.status, "alpha, beta" in refused.error) == (400, True), "a pool's models are named"
    another = tmp_path / "another"
    another.mkdir()
    with running(another, CONFIG.format(folder=tmp_path)) as site:
        assert site.chat("alpha").error == f"alpha is disabled: {WORDS}", "another daemon keeps to it"
        assert told(site, "enable", "alpha") == 0
        assert site.chat("alpha").status == 200
        assert json.loads(kept.read_text()) == {"disabled": {}}
        # Without words there are some; a model that is taken out of the configuration takes the order along.
        assert site.operate("POST", "/admin/models/alpha/disable")["disabled"] == "an operator has taken it out of use"
        site.reconfigure(CONFIG.format(folder=tmp_path).replace("  alpha:", "  gamma:").replace("alpha, ", ""))
        site.reconfigure(CONFIG.format(folder=tmp_path))
        assert site.chat("alpha").status == 200


def test_a_file_that_cannot_be_read_is_said_and_not_written_over(tmp_path: Path, kept: Path) -> None:
    kept.parent.mkdir()
    kept.write_text("{")
    with running(tmp_path, CONFIG.format(folder=tmp_path)) as site:
        assert f"{kept} cannot be read" in site.log
        refused = site.ask("POST", "/admin/models/beta/disable", {"message": "no"}, admin=True)
        assert (refused.status, "vllmctl reload" in refused.error) == (503, True)
        assert kept.read_text() == "{" and site.line("beta")["disabled"] == ""
        kept.unlink()
        site.operate("POST", "/admin/reload")
        assert site.operate("POST", "/admin/models/beta/disable", {"message": "yes"})["disabled"] == "yes"
