"""Adapters that are loaded while a model serves: in vLLM's words, by operators alone, and then like any other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.admin.site import Answer, Site, running
from tests.engines import lora

CONFIG = """\
devices: [{{memory: 80GiB, file: {folder}/gpu0}}]
server: {{idle_exit: never}}
pull: {{on_request: true, owners: [acme]}}
idle: never
defaults: {{engine: sim, gpu_memory: 10GiB}}
auth:
  keys:
    - {{name: all, key: a-secret}}
    - {{name: boss, key: b-secret, scopes: [models, admin]}}
    - {{name: base, key: c-secret, models: [tuned]}}
    - {{name: lawyer, key: l-secret, models: [legal]}}
    - {{name: narrow, key: n-secret, scopes: [models, admin], models: [other]}}
    - {{name: tuner, key: t-secret, scopes: [models, admin], models: [tuned]}}
models:
  tuned: {{runtime_adapters: true, adapters: {{own: {folder}/legal}}}}
  twins: {{runtime_adapters: true, replicas: 2}}
  other: {{}}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("runtime-adapters")
    lora.write(folder / "legal")
    with running(folder, CONFIG.format(folder=folder)) as site:
        yield site


def load(site: Site, name: str, path: str, key: str = "b-secret", model: str | None = "tuned", **more: bool) -> Answer:
    body = {"lora_name": name, "lora_path": path, **({"model": model} if model else {}), **more}
    return site.ask("POST", "/v1/load_lora_adapter", body, key=key)


def unload(site: Site, name: str, key: str = "b-secret") -> Answer:
    return site.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, key=key)


def listed(site: Site, key: str = "a-secret") -> list[str]:
    return [card["id"] for card in site.ask("GET", "/v1/models", key=key).json["data"]]


@pytest.fixture
def legal(site: Site) -> Iterator[str]:
    """An adapter that is loaded."""
    answer = load(site, "legal", str(site.folder / "legal"))
    assert (answer.status, b"Success" in answer.body) == (200, True), answer.text
    yield "legal"
    unload(site, "legal")


def said(site: Site, model: str, key: str = "a-secret") -> str:
    answer = site.chat(model, key)
    assert answer.status == 200, answer.text
    return str(answer.json["choices"][0]["message"]["content"])


def test_it_is_a_model_until_it_is_unloaded(site: Site, legal: str) -> None:
    """Listed last and with its base, permitted and counted by its own name."""
    card = site.ask("GET", "/v1/models", key="a-secret").json["data"][-1]
    assert (card["id"], card["root"], card["parent"]) == (legal, str(site.folder / "legal"), "tuned")
    assert (said(site, legal), said(site, "tuned")) == ("HELLO", "hello")
    assert listed(site, "l-secret") == [legal] and said(site, legal, "l-secret") == "HELLO"
    assert site.chat(legal, "c-secret").status == 403
    assert 'model="legal"' in site.ask("GET", "/metrics", key="a-secret").text
    assert unload(site, legal).status == 200
    assert legal not in listed(site)
    assert site.chat(legal, "a-secret").status == 404


def test_another_engine_loads_it_again(site: Site, legal: str) -> None:
    """It belongs to the model, not to the process."""
    site.operate("POST", "/admin/models/tuned/unload?force=true&wait=true")
    assert said(site, legal) == "HELLO"


def test_every_replica_has_it(site: Site) -> None:
    """Whichever of them answers."""
    site.operate("POST", "/admin/models/twins/load?wait=true")
    assert load(site, "both", str(site.folder / "legal"), model="twins").status == 200
    assert {said(site, "both") for _ in range(8)} == {"HELLO"}
    assert unload(site, "both").status == 200


def test_a_name_is_taken_twice_only_in_place(site: Site, legal: str) -> None:
    """As vLLM has it."""
    path = str(site.folder / "legal")
    again = load(site, legal, path)
    assert (again.status, "already been loaded" in again.error) == (400, True)
    assert load(site, legal, path, load_inplace=True).status == 200
    assert said(site, legal) == "HELLO"


def test_a_reload_leaves_it(site: Site, legal: str) -> None:
    """As long as its model is there and lets it."""
    site.operate("POST", "/admin/reload")
    assert said(site, legal) == "HELLO"


@pytest.mark.parametrize("path", ["~/x", "legal", "../legal", "http://x/y", "s3://b/x", "/a/~b", "file:///x", "-x"])
def test_a_path_is_a_place_or_a_repository(site: Site, path: str) -> None:
    """No engine is asked to read or fetch anything else."""
    assert load(site, "x", path).status == 403
    assert "x" not in listed(site)


def test_only_operators_load_any_and_only_where_the_model_lets_them(site: Site) -> None:
    path = str(site.folder / "legal")
    assert load(site, "x", path, key="a-secret").status == 403
    assert load(site, "x", path, key="n-secret").status == 403
    assert "runtime_adapters" in load(site, "x", path, model="other").error
    unnamed = load(site, "x", path, model=None)
    assert (unnamed.status, "'tuned' or 'twins'" in unnamed.error) == (400, True)
    for name in ("tuned", "other", "own"):
        assert load(site, name, path).status == 409
    for name in ("OTHER", "openai/twins"):  # what others' clients call others' models from habit
        assert load(site, name, path, key="t-secret").status == 409
    for name in ("acme/new", "acme/new:Q4_K_M"):  # a request for these would have them fetched
        assert load(site, name, path, key="t-secret").status == 409
    assert load(site, "acme/new", path).status == 200  # by one who may decide about all models
    assert unload(site, "acme/new").status == 200
    assert load(site, "x\n", path).status == 400
    assert load(site, "", path).status == 400
    absent = load(site, "x", "/not/an/adapter")
    assert (absent.status, "No adapter found" in absent.text) == (404, True)
    assert listed(site) == ["tuned", "twins", "other", "own"]


def test_what_was_not_loaded_so_is_not_unloaded(site: Site, legal: str) -> None:
    assert unload(site, "nothing").status == 404
    assert unload(site, "own").status == 409
    assert unload(site, legal, key="a-secret").status == 403
    assert unload(site, legal, key="n-secret").status == 404
    assert said(site, legal) == "HELLO"
