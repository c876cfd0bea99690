"""What /upstream passes on: a list, whole segments, and either reading of an encoded slash."""

import pytest

from vllmd.config.types import ModelConfig
from vllmd.engines import BUILT_IN, engine_of
from vllmd.engines.plain import OF_AN_ENGINE
from vllmd.proxy.engine_api import allows
from vllmd.proxy.models import QUERY_PATHS

RULES = frozenset(
    {"GET /", "GET /docs", "GET /{page:file}", "POST /v1/{verb}", "GET /files/{rest:path}", "GET /a/{x}/b"}
)


@pytest.mark.parametrize(
    "asked",
    [
        "GET /",
        "HEAD /",
        "GET /docs",
        "GET /d%6fcs",
        "GET /index.html",
        "POST /v1/score",
        "GET /files/a",
        "GET /files/a/b.css",
        "GET /files/sleep/wake_up",
        "GET /files/a%2Fb%20c",
        "GET /a/whatever/b",
        "GET /a/x%3Fy/b",
    ],
)
def test_what_is_on_the_list_is_passed_on(asked: str) -> None:
    """However it is spelled, and whatever words are in a name."""
    method, _, path = asked.partition(" /")
    assert allows(RULES, method, path.split("/"))


@pytest.mark.parametrize(
    "asked",
    [
        "POST /",
        "GET /sleep",
        "GET /DOCS",
        "GET /docs/",
        "GET /docs/x",
        "GET //docs",
        "GET /docs%2Fx",
        "GET /docs%252F",
        "GET /x/index.html",
        "GET /x%2Findex.html",
        "GET /files",
        "GET /files/",
        "GET /files//sleep",
        "GET /files/../sleep",
        "GET /files/%2e%2e/sleep",
        "GET /files/a%2F..%2F..%2Fsleep",
        "GET /files/.",
        "POST /files/a",
        "GET /a/x%2Fy/b",
        "GET /a//b",
        "POST /v1/a/b",
        "POST /v1/a%2Fb",
        "DELETE /docs",
    ],
)
def test_nothing_else_is(asked: str) -> None:
    """Engines read paths in different ways: what any of them could take for something else is not passed on."""
    method, _, path = asked.partition(" /")
    assert not allows(RULES, method, path.split("/"))


CHANGING = (
    *("POST /sleep", "POST /wake_up", "GET /is_sleeping", "POST /collective_rpc", "GET /server_info", "POST /pause"),
    *("POST /resume", "POST /abort_requests", "POST /reset_prefix_cache", "POST /v1/load_lora_adapter"),
    *(
        "POST /update_weights",
        "POST /start_profile",
        "POST /release_memory_occupation",
        "POST /update_weights_from_disk",
    ),
    *("GET /get_server_info", "POST /flush_cache", "POST /free", "POST /api/free", "POST /interrupt", "POST /queue"),
    *("POST /history", "GET /slots", "POST /props", "POST /models/load", "POST /models/unload", "POST /lora-adapters"),
    *("POST /v2/repository/models/x/unload", "POST /v2/trace/setting", "POST /reset", "POST /load_model"),
    *("POST /v2/logging", "GET /internal/logs", "POST /manager/reboot", "GET /customnode/install", "POST /shutdown"),
)
OPTIONS: dict[str, dict[str, object]] = {
    "remote": {"url": "http://gpu2.example"},
    "triton": {"repository": "/models"},
    "comfyui": {"directory": "/comfy"},
}


@pytest.mark.parametrize("kind", sorted(BUILT_IN))
def test_no_kind_lists_what_changes_an_engine_or_shows_others(kind: str) -> None:
    """vllmd alone does that; the daemon's own calls go past this list."""
    model = ModelConfig("m", engine=kind, command=("x", "${SOCKET}"), options=OPTIONS.get(kind, {}))
    rules = engine_of(model).own_api(model)
    assert allows(rules, "GET", ["metrics"])
    for asked in CHANGING:
        method, _, path = asked.partition(" /")
        assert not allows(rules, method, path.split("/")), asked


def test_what_tells_of_an_engine_is_only_asked() -> None:
    """The two tables of such paths say the same: a POST to one of them changes the engine."""
    assert set(QUERY_PATHS) == OF_AN_ENGINE


def test_comfyuis_page_works() -> None:
    """Static files, names with an encoded slash, and jobs."""
    model = ModelConfig("m", engine="comfyui", options=OPTIONS["comfyui"])
    rules = engine_of(model).own_api(model)
    for asked in (
        *("GET /", "GET /assets/index-BQ4x.js", "GET /user.css", "GET /api/object_info", "GET /view", "POST /prompt"),
        *("GET /api/userdata/workflows%2Fmine.json", "POST /api/userdata/workflows%2Fmine.json", "POST /upload/image"),
        *("GET /scripts/sleep.js", "GET /extensions/core/updateFree.js"),
    ):
        method, _, path = asked.partition(" /")
        assert allows(rules, method, path.split("/")), asked
