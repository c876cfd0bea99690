"""Adapters, variants and pools of a real daemon with stand-in engines: names of their own for models' engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.admin.site import Answer, Site, running
from tests.engines import lora

CONFIG = """\
devices: [{{memory: 80GiB, file: {folder}/gpu0}}]
server: {{idle_exit: never}}
idle: never
defaults: {{engine: sim, gpu_memory: 20GiB}}
auth:
  keys:
    - {{name: all, key: a-secret}}
    - {{name: base, key: b-secret, models: [qwen]}}
    - {{name: lawyer, key: l-secret, models: [legal]}}
    - {{name: pooled, key: p-secret, models: [any]}}
models:
  qwen:
    aliases: [q]
    request: {{default: {{seed: 1}}, strip: [user]}}
    adapters:
      legal: {folder}/legal
      secret: {{path: {folder}/legal, hidden: true, display_name: Secret}}
      absent: {folder}/absent
    variants:
      qwen:terse: {{request: {{set: {{max_tokens: 2}}, default: {{seed: 2, top_k: 5}}}}}}
      qwen:pirate: {{request: {{system: "Talk like a pirate."}}, hidden: true}}
  started:
    env: {{VLLM_ALLOW_RUNTIME_LORA_UPDATING: "0"}}
    extra_args: {{enable-lora: true, lora-modules: [old={folder}/legal]}}
    adapters: {{early: {folder}/legal}}
  other: {{}}
pools:
  any: [other, qwen]
  mixed: {{models: [qwen:terse, legal], hidden: true}}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("offers")
    lora.write(folder / "legal")
    with running(folder, CONFIG.format(folder=folder)) as site:
        yield site


@pytest.fixture(autouse=True)
def at_rest(site: Site) -> None:
    """Every test begins with nothing loaded."""
    for model in ("qwen", "started", "other"):
        site.operate("POST", f"/admin/models/{model}/unload?force=true&wait=true")


def said(answer: Answer) -> str:
    assert answer.status == 200, answer.text
    return str(answer.json["choices"][0]["message"]["content"])


def chat(site: Site, model: str, key: str = "a-secret", **more: Any) -> Answer:
    return site.chat(model, key, **more)


def sent(site: Site, model: str, body: dict[str, Any] | None = None, path: str = "/v1/chat/completions") -> Any:
    """What the engine got for a request, but for the model's name, which is put back on the way."""
    messages = {"messages": [{"role": "user", "content": "hello"}]}
    answer = site.ask("POST", path, {"model": model, **(messages if body is None else body)}, key="a-secret",
                      headers={"X-Sim-Echo": "body"})  # fmt: skip
    assert answer.status == 200, answer.text
    return json.loads(answer.body)


# -- the list


def test_they_are_listed_as_vllm_lists_adapters(site: Site) -> None:
    """Each with the model that it belongs to; what is hidden is found by whoever knows its name."""
    cards = {card["id"]: card for card in site.ask("GET", "/v1/models", key="a-secret").json["data"]}
    assert list(cards) == ["qwen", "started", "other", "legal", "absent", "qwen:terse", "old", "early", "any", "q"]
    folder = site.folder
    assert (cards["qwen"]["root"], cards["qwen"]["parent"]) == ("qwen", None)
    assert (cards["legal"]["root"], cards["legal"]["parent"]) == (str(folder / "legal"), "qwen")
    assert (cards["qwen:terse"]["root"], cards["qwen:terse"]["parent"]) == ("qwen", "qwen")
    assert (cards["any"]["members"], cards["any"]["parent"]) == (["other", "qwen"], None)
    assert cards["legal"]["capabilities"] == cards["qwen"]["capabilities"]
    hidden = site.ask("GET", "/v1/models/secret", key="a-secret").json
    assert (hidden["id"], hidden["display_name"]) == ("secret", "Secret")


def test_a_key_sees_what_it_may_use(site: Site) -> None:
    """Of a model its variants, too, but an adapter only by its own name; of a pool its members."""

    def seen(key: str) -> list[str]:
        return [card["id"] for card in site.ask("GET", "/v1/models", key=key).json["data"]]

    assert seen("b-secret") == ["qwen", "qwen:terse", "q"]
    assert seen("l-secret") == ["legal"]
    assert seen("p-secret") == ["qwen", "other", "qwen:terse", "any", "q"]


# -- adapters


def test_an_adapter_answers_under_its_own_name(site: Site) -> None:
    """It wakes its base's engine, which loads it then; the base's own answers stay as they are."""
    assert site.line("qwen")["state"] == "stopped"
    answer = chat(site, "legal")
    assert (said(answer), answer.json["model"]) == ("HELLO", "legal")
    assert site.line("qwen")["state"] == "running"
    assert said(chat(site, "qwen")) == "hello"
    stream = chat(site, "secret", stream=True)
    assert b'"model":"secret"' in stream.body.replace(b'": "', b'":"')


def test_it_is_there_after_a_sleep_and_a_restart(site: Site) -> None:
    """A sleep takes nothing from vLLM 0.32's list of adapters; a new engine loads it again."""
    assert said(chat(site, "legal")) == "HELLO"
    site.operate("POST", "/admin/models/qwen/sleep?level=2&wait=true")
    assert said(chat(site, "legal")) == "HELLO"
    site.operate("POST", "/admin/models/qwen/unload?force=true&wait=true")
    assert said(chat(site, "legal")) == "HELLO"


def test_one_that_is_not_there_fails_alone(site: Site) -> None:
    """With what the engine says, each time anew; its place is given back, and the base goes on."""
    for _ in range(2):
        answer = chat(site, "absent")
        assert answer.status == 503
        assert "the adapter 'absent' of qwen cannot be loaded" in answer.error
        assert "No adapter found" in answer.error
    assert said(chat(site, "qwen")) == "hello"
    assert site.line("qwen")["in_flight"] == 0
    (site.folder / "absent").mkdir()
    (site.folder / "absent" / "adapter_config.json").write_text("{}")
    try:
        assert said(chat(site, "absent")) == "HELLO"
    finally:
        (site.folder / "absent" / "adapter_config.json").unlink()
        (site.folder / "absent").rmdir()


def test_where_vllm_may_not_load_any_they_are_there_from_the_start(site: Site) -> None:
    """Those of its own flags as well as those of ours."""
    assert said(chat(site, "early")) == "HELLO"
    assert said(chat(site, "old")) == "HELLO"
    assert said(chat(site, "started")) == "hello"


def test_permission_goes_by_its_name(site: Site) -> None:
    """A key for the adapter may not use the base, nor the base's own API; one for the base not the adapter."""
    assert chat(site, "legal", "l-secret").status == 200
    assert chat(site, "qwen", "l-secret").status == 403
    assert chat(site, "legal", "b-secret").status == 403
    assert chat(site, "qwen:terse", "b-secret").status == 200
    assert chat(site, "qwen:terse", "l-secret").status == 403


def test_its_engine_s_own_api_is_the_base_s(site: Site) -> None:
    """Under the adapter's name nothing of it is passed on: any model could be named there."""
    assert site.ask("GET", "/upstream/legal/version", admin=True).status == 404
    assert site.ask("GET", "/upstream/qwen/version", admin=True).status == 200


def test_it_is_counted_under_its_own_name(site: Site) -> None:
    """Requests and tokens; to whoever may use it."""
    chat(site, "legal")
    text = site.ask("GET", "/metrics", key="l-secret").text
    assert 'vllmd_model_requests_total{model="legal",code="200"}' in text or 'model="legal"' in text
    assert 'vllmd_model_tokens_total{model="legal"}' in text
    assert 'model="qwen"' not in text


def test_operators_load_its_base(site: Site) -> None:
    """What is started, ages and stops is the model."""
    site.operate("POST", "/admin/models/legal/load?wait=true")
    assert site.line("qwen")["state"] == "running"
    refused = site.ask("POST", "/admin/models/any/load", admin=True)
    assert refused.status == 400
    assert "name one of its models: other, qwen" in refused.error


# -- variants


def test_a_variant_has_rules_over_the_model_s(site: Site) -> None:
    """What it says wins; what only the model says holds too, and what the client sends comes before defaults."""
    got = sent(site, "qwen:terse", {"messages": [], "user": "me", "max_tokens": 100})
    assert got == {"model": "qwen:terse", "messages": [], "max_tokens": 2, "seed": 2, "top_k": 5}
    assert sent(site, "qwen:terse", {"seed": 3}) == {"model": "qwen:terse", "seed": 3, "max_tokens": 2, "top_k": 5}
    assert sent(site, "qwen", {"user": "me"}) == {"model": "qwen", "seed": 1}
    assert chat(site, "qwen:terse").json["model"] == "qwen:terse"


PIRATE = "Talk like a pirate."
USER = {"role": "user", "content": "hi"}
PROMPTS = [
    ("/v1/chat/completions", {"messages": [USER]}, {"messages": [{"role": "system", "content": PIRATE}, USER]}),
    ("/v1/chat/completions", {"messages": []}, {"messages": [{"role": "system", "content": PIRATE}]}),
    ("/v1/chat/completions", {"messages": [{"role": "system", "content": "own"}, USER]}, {}),
    ("/v1/chat/completions", {"messages": [{"role": "developer", "content": "own"}]}, {}),
    ("/v1/chat/completions", {"messages": "none"}, {}),
    ("/v1/messages", {"messages": [USER]}, {"messages": [USER], "system": PIRATE}),
    ("/v1/messages", {"messages": [USER], "system": "own"}, {}),
    ("/v1/responses", {"input": "hi"}, {"input": "hi", "instructions": PIRATE}),
    ("/v1/completions", {"prompt": "hi"}, {}),
]


@pytest.mark.parametrize(("path", "body", "wanted"), PROMPTS)
def test_a_system_prompt_is_for_requests_without_one(
    site: Site, path: str, body: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """In the form that the route has for it."""
    assert sent(site, "qwen:pirate", body, path) == {"model": "qwen:pirate", "seed": 1, **(wanted or body)}


def test_a_system_prompt_comes_before_a_large_picture(site: Site) -> None:
    """Of a body that is too large to be read in one go."""
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:," + "A" * (2 << 20)}}]}
    got = sent(site, "qwen:pirate", {"messages": [picture]})
    assert got["messages"] == [{"role": "system", "content": PIRATE}, picture]


# -- pools


def test_a_pool_takes_what_is_loaded(site: Site) -> None:
    """The first one where none is; then whichever runs, though another comes first."""
    first = chat(site, "any")
    assert (first.json["model"], first.headers.get("x-vllmd-model")) == ("any", "other")
    site.operate("POST", "/admin/models/other/unload?force=true&wait=true")
    chat(site, "qwen")
    assert said(chat(site, "any")) == "hello"
    assert (site.line("other")["state"], site.line("qwen")["state"]) == ("stopped", "running")
    site.operate("POST", "/admin/models/qwen/sleep?level=1&wait=true")
    assert chat(site, "any").status == 200
    assert site.line("other")["state"] == "stopped"


def test_a_pool_of_adapters_and_variants(site: Site) -> None:
    """Each with what is its own; the first where all are alike."""
    assert sent(site, "mixed")["max_tokens"] == 2


def test_a_pool_has_what_the_key_may_use(site: Site) -> None:
    """Of its members those; a key that may use none is told so."""
    assert chat(site, "any", "b-secret").headers["x-vllmd-model"] == "qwen"
    assert chat(site, "any", "p-secret").status == 200
    assert chat(site, "any", "l-secret").status == 403


def test_names_by_habit_find_them(site: Site) -> None:
    """A tag, another case."""
    answer = chat(site, "LEGAL:latest")
    assert (answer.status, answer.headers["x-vllmd-model"]) == (200, "legal")
