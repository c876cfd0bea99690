"""A model's whole life through a real daemon: fetched from a hub, added, answering, removed. All of it is real."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import RealLlama
from tests.engines.installed import LIMIT, Site, daemon
from tests.store.hub import Hub, hub

pytestmark = pytest.mark.llama
NAME = "org/SmolLM2-GGUF"


@contextmanager
def stores(folder: Path, llama: RealLlama, **over: Any) -> Iterator[tuple[Site, Hub]]:
    """A daemon with a cache of its own, no models, and a hub that has SmolLM2."""
    files = {"SmolLM2-Q4_1.gguf": llama.model.read_bytes(), "README.md": b"x"}
    with hub({NAME: files, "other/Model-GGUF": files}) as at:
        config = {
            "pull": {"endpoint": at.url, "keep_free": 0, **over.pop("pull", {})},
            "engines": {"home": str(folder / "home"), "port_start": 33900, "port_end": 33910},
            "defaults": {"llama.cpp": {"options": {"gpu_layers": 0}}},
            **over,
        }
        with daemon(folder, config) as site:
            yield site, at


def pull(site: Site, model: str = NAME, **over: Any) -> list[dict[str, Any]]:
    """All that is said of a download, as it came."""
    body, accept = {"model": model, **over}, {"accept": "application/x-ndjson"}
    with site.admin.stream("POST", "/admin/store/pull", json=body, headers=accept, timeout=120) as answer:
        return [json.loads(line) for line in answer.iter_lines()]


@pytest.fixture(autouse=True)
def _no_cache_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_from_nothing_to_an_answer_and_back(tmp_path: Path, llama: RealLlama) -> None:
    """What an operator sees of a model: progress in bytes, its file, an answer, where it lies, and that it is gone."""
    with stores(tmp_path / "d", llama) as (site, at):
        at.gate.clear()  # the file waits until somebody has been told that it comes
        lines: list[dict[str, Any]] = []
        asked = {"json": {"model": NAME, "add": True}, "headers": {"accept": "application/x-ndjson"}}
        with site.admin.stream("POST", "/admin/store/pull", timeout=120, **asked) as answer:
            for line in answer.iter_lines():
                lines.append(json.loads(line))
                if lines[-1].get("phase") == "downloading":
                    at.gate.set()
        size = llama.model.stat().st_size
        assert lines[-1]["done"] and lines[-1]["added"] and lines[-1]["total"] == size, lines[-1]
        assert any(line["phase"] == "downloading" and line["total"] == size for line in lines)
        assert site.answer(NAME, "What is the capital of France?")
        file = tmp_path / "d/models.d/org-smollm2-gguf.yaml"
        assert "engine: llama.cpp" in file.read_text() and f"model: {NAME}:Q4_1" in file.read_text()
        (cached,) = site.admin.get("/admin/store").json()["cached"]
        assert (cached["name"], cached["size"], cached["models"]) == (NAME, size, [NAME])
        (line,) = pull(site, add=True)
        assert (line["model"], line["phase"], line["done"], line["added"]) == (NAME, "done", True, False)
        gone = site.admin.delete(f"/admin/store/models/{NAME}", params={"files": "true"}).json()
        assert gone["freed"] >= size and gone["file"] == str(file) and not file.exists()
        assert site.admin.get("/admin/store").json()["cached"] == []
        assert "does not exist" in site.refusal(NAME)


def test_one_download_for_all_who_ask(tmp_path: Path, llama: RealLlama) -> None:
    """The second one follows the first; the first one's leaving does not end it, the last one's does."""
    with stores(tmp_path / "d", llama) as (site, at):
        at.gate.clear()
        answers: list[list[dict[str, Any]]] = []
        second = threading.Thread(target=lambda: answers.append(pull(site)))
        body, accept = {"model": NAME}, {"accept": "text/event-stream"}
        with site.admin.stream("POST", "/admin/store/pull", json=body, headers=accept) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["model"] == NAME
            second.start()
            until = time.monotonic() + LIMIT
            while not any(d["phase"] == "downloading" for d in site.admin.get("/admin/status").json()["downloads"]):
                assert time.monotonic() < until
                time.sleep(0.05)
        at.gate.set()
        second.join(60)
        assert answers[0][-1]["done"] and "error" not in answers[0][-1]
        assert len([seen for seen in at.seen if seen.startswith("GET /lfs/")]) == 1


def test_whoever_leaves_last_ends_it_and_what_came_is_kept(tmp_path: Path, llama: RealLlama) -> None:
    """Ctrl-C ends a download; the same words later go on where it was."""
    with stores(tmp_path / "d", llama) as (site, at):
        at.gate.clear()
        with site.admin.stream("POST", "/admin/store/pull", json={"model": NAME},
                               headers={"accept": "application/x-ndjson"}) as answer:  # fmt: skip
            for text in answer.iter_lines():
                if json.loads(text)["completed"] > 10_000_000:
                    break
        until = time.monotonic() + LIMIT
        while (last := site.admin.get("/admin/status").json()["downloads"])[-1]["phase"] != "failed":
            assert time.monotonic() < until, last
            time.sleep(0.05)
        assert "was ended" in last[-1]["error"]
        at.gate.set()
        at.seen.clear()
        assert "error" not in pull(site)[-1]
        assert [seen for seen in at.seen if seen.startswith("GET /lfs/") and "bytes=" in seen]


@pytest.mark.parametrize(
    ("verb", "path", "body", "status", "says"),
    [
        ("POST", "pull", {"model": "../../etc/passwd"}, 400, "names no repository"),
        ("POST", "pull", {"model": "--help/x"}, 400, "names no repository"),
        ("POST", "pull", {"model": "smolm2"}, 400, "did you mean smollm2"),
        ("PUT", "models/x", {"command": "/bin/sh"}, 403, "command is for the administrator to say"),
        ("PUT", "models/x", {"engine": "command", "model": "/x"}, 400, "engine 'command' cannot be added"),
        ("PUT", "models/x", {"model": "/x", "options": {}}, 403, "options is for the administrator"),
        ("PUT", "models/-x%20%20y", {"model": "/x"}, 400, "printable characters without spaces"),
        ("DELETE", "models/kept", None, 409, "is configured in"),
        ("DELETE", "models/none", None, 404, "no model 'none'"),
        ("DELETE", "downloads/none", None, 404, "nothing called 'none' is being downloaded"),
    ],
)
def test_what_is_refused_changes_nothing(site: Site, verb: str, path: str, body: Any, status: int, says: str) -> None:
    """Names from outside are data; what runs programs, and what an administrator wrote, is not for this API."""
    reply = site.admin.request(verb, f"/admin/store/{path}", json=body)
    assert (reply.status_code, says in reply.text) == (status, True), reply.text
    assert os.listdir(site.log.parent).count("models.d") == 0


def test_ollamas_clients_pull_copy_and_delete(tmp_path: Path, llama: RealLlama) -> None:
    """By the same store, with its own words: a bar in bytes, success, and a name that is gone."""
    with stores(tmp_path / "d", llama) as (site, at):
        ask_admin = site.admin.request
        at.gate.clear()  # the file waits until somebody has been told that it comes
        bars = []
        with site.admin.stream("POST", "/api/pull", json={"model": NAME}) as pull:
            for line in map(json.loads, pull.iter_lines()):
                if "total" in line:
                    bars.append(line)
                    at.gate.set()
        assert line == {"status": "success"}
        assert bars and all(bar["total"] == llama.model.stat().st_size and bar["digest"] for bar in bars)
        copied = ask_admin("POST", "/api/copy", json={"source": NAME, "destination": "x"})
        assert copied.status_code == 200, copied.text
        assert ask_admin("POST", "/api/create", json={"model": "y", "from": "x"}).json() == {"status": "success"}
        made = ask_admin("POST", "/api/create", json={"model": "z", "from": "x", "system": "Be brief."})
        assert made.status_code == 501 and "system cannot be made part of a model here" in made.text
        tags = {each["name"] for each in ask_admin("GET", "/api/tags").json()["models"]}
        assert tags == {f"{NAME}:latest", "x:latest", "y:latest"}
        for name in ("x", NAME, "y"):
            assert ask_admin("DELETE", "/api/delete", json={"model": name}).status_code == 200
        assert site.admin.get("/admin/store").json()["cached"] == []
        assert ask_admin("DELETE", "/api/delete", json={"model": "x"}).status_code == 404
        refused = ask_admin("POST", "/api/pull", json={"model": "org/none"})
        assert "there is no repository org/none" in refused.text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("refusals")
    with daemon(folder / "d", {"models": {"kept": {"engine": "sim"}}, "devices": [{"memory": "1GiB"}]}) as it:
        yield it


def test_only_operators_may(site: Site) -> None:
    """Whoever reaches the model API cannot fill the disk."""
    with httpx.Client(base_url=f"http://127.0.0.1:{site.port}") as anybody:
        for verb, path in (("POST", "pull"), ("PUT", "models/x"), ("DELETE", "models/x"), ("GET", "")):
            assert anybody.request(verb, f"/admin/store/{path}".rstrip("/")).status_code in (401, 403)


def ask(site: Site, model: str, answers: list[httpx.Response]) -> threading.Thread:
    """Ask it, beside what else is done."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}

    def post() -> None:
        answers.append(httpx.post(f"http://127.0.0.1:{site.port}/v1/chat/completions", json=body, timeout=120))

    thread = threading.Thread(target=post)
    thread.start()
    return thread


def test_a_request_has_its_model_fetched_once_for_all(tmp_path: Path, llama: RealLlama) -> None:
    """Of owners that are allowed: one download for all; who waits sees how far it is; a failure is told to all."""
    pull = {"on_request": True, "owners": ["org"]}
    with stores(tmp_path / "d", llama, pull=pull, server={"loading_comment_interval": "100ms"}) as (site, at):
        at.gate.clear()
        answers: list[httpx.Response] = []
        asking = [ask(site, NAME, answers)]
        until = time.monotonic() + LIMIT
        while not any(d["phase"] == "downloading" for d in site.admin.get("/admin/status").json()["downloads"]):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert "does not exist" in site.refusal("other/Model-GGUF")  # nobody else waits meanwhile
        body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
        url = f"http://127.0.0.1:{site.port}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=120) as streamed:
            lines = streamed.iter_lines()
            assert any("fetching" in line for line in lines)  # as a comment, while it comes
            at.gate.set()
            assert "data: [DONE]" in list(lines)
        asking[0].join(120)
        assert [each.status_code for each in answers] == [200], [each.text for each in answers]
        assert len([seen for seen in at.seen if seen.startswith("GET /lfs/")]) == 1
        asking = [ask(site, "org/none", answers), ask(site, "org/none", answers)]
        for thread in asking:
            thread.join(60)
        assert [each.status_code for each in answers[1:]] == [404, 404]
        assert all("there is no repository org/none" in each.text for each in answers[1:])
        asked = len(at.seen)
        assert "there is no repository org/none" in site.refusal("org/none") and len(at.seen) == asked


def test_a_request_has_nothing_fetched_that_is_too_large(tmp_path: Path, llama: RealLlama) -> None:
    """Nor anything where that is not allowed."""
    with stores(tmp_path / "d", llama, pull={"on_request": True, "owners": ["org"], "largest": "1MiB"}) as (site, at):
        assert "at most 1.0 MB may be fetched" in site.refusal(NAME)
        assert not [seen for seen in at.seen if seen.startswith("GET /lfs/")]
