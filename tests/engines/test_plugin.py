"""Third parties' engines: the example package of tests/plugin, installed, configured, used, and broken.

M is the start/stop API: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.installed import Site, daemon, install_plugin

MODELS = {
    "good": {"engine": "sim", "options": {"load_time": "0s"}},
    "echo": {"engine": "echo"},
    "polite": {"engine": "polite", "options": {"greeting": "good evening, "}},
    "rude": {"engine": "polite", "options": {"insult": "you"}},
    "stillborn": {"engine": "stillborn"},
    "clumsy": {"engine": "clumsy"},
    "quitter": {"engine": "quitter"},
    "unknown": {"engine": "vlm"},
    "template": {"engine": "command", "command": "serve ${PROT}"},
    "absent": {"engine": "llama.cpp", "model": "/srv/a.gguf"},
    "spoken": {"engine": "remote", "options": {"url": "ftp://gpu2.example/v1"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plugin")


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Site]:
    """A daemon on a machine where the package is installed, with every model that can go wrong."""
    plugin = install_plugin(folder / "site-packages")
    models = MODELS | {"toy": {"engine": "toy", "options": {"diary": str(folder / "diary")}}}
    models = {name: {"gpu_memory": "5GiB", **model} for name, model in models.items()}  # all fit at once
    config = {"devices": [{"memory": "80GiB"}], "server": {"idle_exit": "never"}, "models": models}
    with daemon(folder / "site", config, path=str(plugin)) as site:
        yield site


def test_M_a_runner_of_a_third_party_is_started_looked_at_and_stopped(site: Site, folder: Path) -> None:
    """features.md, M: runner extension. It runs as the engine, and its stop is called before its process ends."""
    assert site.answer("toy", "hello") == "toy on 0: hello"
    site.unload("toy")
    assert (folder / "diary").read_text() == "the toy was put away"


def test_a_kind_needs_no_more_than_its_start(site: Site) -> None:
    """The rest has defaults."""
    assert site.answer("echo", "hello") == "hello"


def test_a_kind_may_make_an_engine_of_each_models_options(site: Site) -> None:
    """And refuse what is wrong with them."""
    assert site.answer("polite", "madam") == "good evening, madam"
    assert "models.rude.options.insult: unknown option (known: greeting)" in site.refusal("rude")


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("stillborn", "RuntimeError: the toy box is empty"),
        (
            "clumsy",
            "models.clumsy.engine: the engine plug-in 'clumsy' failed in sleep_levels: ZeroDivisionError: stumbled",
        ),
        ("quitter", "cannot be loaded: SystemExit: this machine is not supported"),
        ("unknown", "unknown engine 'vlm'; did you mean 'vllm'? (known: "),
        ("template", "unknown variable ${PROT} (known: ${SOCKET}, ${PORT}"),
        ("absent", "vllmctl engine install llama.cpp"),
        ("spoken", "is no address of an HTTP server; right is one such as http://"),
    ],
)
def test_what_is_broken_says_why_and_harms_nobody_else(site: Site, model: str, what: str) -> None:
    """One sentence for its clients; the daemon goes on, and the others with it."""
    assert what in site.refusal(model)
    assert site.answer("good", "still there") == "still there"
    assert site.http.get("/health").status_code == 200
