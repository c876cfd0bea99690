"""The verbs for models as files, against a daemon whose answers are a table."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fake_daemon import FakeDaemon, fake_daemon, model, status
from vllmd.cli import main

MiB = 1 << 20
GGUF = {"name": "org/m-GGUF", "path": "/hub/m", "size": 90 * MiB, "kind": "generate", "engine": "llama.cpp",
        "files": ["m-Q4_K_M.gguf"], "models": []}  # fmt: skip
FETCHING = {"model": "smollm2", "phase": "downloading", "source": "x", "total": 90 * MiB, "rate": 9.0 * MiB,
            "completed": 30 * MiB, "elapsed": 3.0, "error": ""}  # fmt: skip
PULLING = {name: value for name, value in FETCHING.items() if name != "error"}  # as a pull tells it
DONE = {"done": True, "model": "smollm2", "phase": "done", "total": 90 * MiB, "seconds": 9.0, "added": True}
ANSWER = [f"data: {json.dumps({'choices': [{'delta': {'content': word}}]})}" for word in ("Par", "is.")]


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE", "OLLAMA_MODELS", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "admin.sock"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    answers: dict[str, tuple[int, Any]] = {
        "GET /admin/status": (200, status(downloads=[FETCHING])),
        "GET /admin/store": (200, {"cached": [GGUF], "hub": "http://127.0.0.1:9"}),
        "POST /admin/store/pull": (200, [json.dumps(each) for each in (PULLING, DONE)]),
        "POST /v1/chat/completions": (200, [*ANSWER, "data: [DONE]"]),
    }
    with fake_daemon(answers, tmp_path / "admin.sock") as running:
        yield running


def test_run_fetches_adds_and_asks(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str],
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """From a name to an answer by one command; of the answer alone there is something on stdout."""
    monkeypatch.setattr("vllmd.cli.verbs.run.piped", lambda: "")
    assert main(["run", "smollm2", "What", "is", "it?"]) == 0
    said = capsys.readouterr()
    assert said.out == "Paris.\n"
    assert "smollm2: 30MiB of 90MiB, 33 %, 9MiB/s, 6.7s left" in said.err
    assert "smollm2 was fetched (90MiB) and added" in said.err
    asked = {request: body for request, body, _ in daemon.seen}
    assert asked["POST /admin/store/pull"] == {"model": "smollm2", "add": True}
    assert asked["POST /v1/chat/completions"]["messages"] == [{"role": "user", "content": "What is it?"}]


def test_run_of_a_model_that_is_here_fetches_nothing(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes its question from a pipe."""
    daemon.answers["GET /admin/status"] = (200, status(model("smollm2")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n"))
    assert main(["run", "smollm2"]) == 0
    assert capsys.readouterr().out == "Paris.\n"
    assert not [request for request, _, _ in daemon.seen if "store" in request]


def test_a_download_that_fails_says_why(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """In the daemon's words, with the status of what went wrong."""
    failed = {"error": {"message": "x cannot be had: no", "code": "model_not_found"}, "done": True}
    daemon.answers["POST /admin/store/pull"] = (200, [json.dumps(failed)])
    assert main(["pull", "org/x"]) == 65
    assert capsys.readouterr().err == "vllmctl: x cannot be had: no\n"
    error = {
        "message": "x cannot be had: https://hub.example cannot be reached, or broke off (no)",
        "code": "unavailable",
    }
    daemon.answers["POST /admin/store/pull"] = (200, [json.dumps({"error": error, "done": True})])
    assert main(["pull", "org/x"]) == 69
    assert "Without a hub there are smollm2" in " ".join(capsys.readouterr().err.split())
    daemon.answers["POST /admin/store/pull"] = (200, [json.dumps(PULLING)])
    assert main(["pull", "org/x"]) == 69
    assert "broke off; vllmctl pull org/x goes on where it was" in capsys.readouterr().err


def test_list_has_the_size_of_a_file_that_lies_elsewhere(
    tmp_path: Path, daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """As vllmctl add serves one; it is in no cache, and lies on the same machine unless --url names another."""
    (tmp_path / "m.gguf").write_bytes(bytes(5 << 20))
    added = model("m", "stopped", config={"engine": "llama.cpp", "model": str(tmp_path / "m.gguf")})
    daemon.answers["GET /admin/status"] = (200, status(added))
    daemon.answers["GET /admin/store"] = (200, {"cached": []})
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["m", "stopped", "5MiB"]


def test_list_has_what_is_configured_cached_and_under_way(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """With sizes, and what could be served."""
    daemon.answers["GET /admin/status"] = (200, status(model("a", "running"), downloads=[FETCHING]))
    daemon.answers["GET /admin/store"] = (200, {"cached": [GGUF, {**GGUF, "name": "org/a", "models": ["a"]}]})
    assert main(["list"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split()[:3] == ["a", "running", "90MiB"]
    assert rows[2].split()[:3] == ["org/m-GGUF", "cached", "90MiB"] and "vllmctl add org/m-GGUF" in rows[2]
    assert rows[3] == "fetching smollm2: 30MiB of 90MiB, 33 %, 9MiB/s, 6.7s left"


@pytest.mark.parametrize("verb", ["ps", "list", "models", "status"])
def test_at_zero_models_the_next_step_is_a_line_that_works(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """Nobody is left with an empty table."""
    assert main([verb]) == 0
    assert "vllmctl run smollm2" in capsys.readouterr().out


def test_add_serves_what_is_here(daemon: FakeDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the cache by name, from anywhere by path, from LM Studio and Ollama by their names: nothing is copied."""
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    studio = tmp_path / ".lmstudio/models/org/n-GGUF/n-Q4.gguf"
    studio.parent.mkdir(parents=True)
    studio.write_bytes(b"GGUF")
    llama = {"engine": "llama.cpp"}
    for argv, name, settings in (
        (["org/m-GGUF"], "org%2Fm-GGUF", llama),
        (["org/m-GGUF:Q4_K_M", "--name", "m"], "m", {**llama, "model": "org/m-GGUF:Q4_K_M"}),
        ([str(file), "--alias", "y"], "x", {**llama, "model": str(file), "aliases": ["y"]}),
        (["--lmstudio", "n-Q4.gguf"], "n-Q4", {**llama, "model": str(studio)}),
    ):
        daemon.answers[f"PUT /admin/store/models/{name}"] = (200, {"file": "/var/lib/vllmd/models.d/m.yaml"})
        assert main(["add", *argv]) == 0, capsys.readouterr()
        assert [body for request, body, _ in daemon.seen if request.startswith("PUT")][-1] == settings
    daemon.answers["GET /admin/status"] = (200, status(model("m", never="'m' needs 40 GiB")))
    assert main(["add", "org/m-GGUF:Q4_K_M", "--name", "m"]) == 69
    assert "m was added, but it can never be loaded: 'm' needs 40 GiB; " in capsys.readouterr().err
    assert main(["add", "org/none"]) == 65
    assert "vllmctl run org/none fetches and serves it" in capsys.readouterr().err
    assert main(["add", "--ollama", "llama3"]) == 65
    assert "none of Ollama's models are found here" in capsys.readouterr().err
    assert main(["add"]) == 0
    said = capsys.readouterr().out
    assert "org/m-GGUF" in said and "LM Studio" in said


def test_rm_asks_before_files_go(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody can be asked it wants a word more."""
    path = "DELETE /admin/store/models/smollm2?files=true"
    told = {"model": "smollm2", "file": "/x", "removed": ["/hub/m"], "bytes": 90 * MiB, "freed": 90 * MiB, "kept": ""}
    daemon.answers |= {f"{path}&dry=true": (200, told), path: (200, told)}
    assert main(["rm", "--files", "smollm2"]) == 64
    assert path not in [request for request, _, _ in daemon.seen]
    assert main(["rm", "--files", "--yes", "smollm2"]) == 0
    assert capsys.readouterr().out == "smollm2: is not served any more; 90MiB freed\n"


def test_search_without_a_hub_says_what_there_is(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Many machines reach none."""
    assert main(["search", "qwen"]) == 69
    said = capsys.readouterr().err
    assert "http://127.0.0.1:9 cannot be reached from here" in said and "there are smollm2" in said


def test_search_shows_what_the_hub_finds(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Its texts are others' texts: nothing of them reaches the terminal as it is."""
    found = [{"id": "org/\x1b[31mm", "downloads": 1_250_000, "likes": 7, "pipeline_tag": "text-generation"}]
    with fake_daemon({"GET /api/models?search=a+b&sort=downloads&direction=-1&limit=20": (200, found)}) as hub:
        # A list is the fake's way to say lines: the answer is one line of JSON.
        hub.answers = {key: (200, [json.dumps(found)]) for key in hub.answers}
        daemon.answers["GET /admin/store"] = (200, {"cached": [], "hub": hub.address})
        assert main(["search", "a", "b"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["org/m", "1.25M", "7", "text-generation"]
