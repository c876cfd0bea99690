"""Signing in to the page of a real daemon, as a browser does: link, cookie and token, and what is refused."""

from __future__ import annotations

import http.cookies
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.admin.site import Answer, Site, running

KEYS = {"admin": "an-admin-key-1", "read": "a-reading-key-1", "models": "a-model-key-1"}
CONFIG = "server: {idle_exit: never}\nmodels: {alpha: {engine: sim, options: {load_time: 0.01s}}}\n"
KEYED = CONFIG + "auth:\n  keys:\n" + "".join(
    f"    - {{name: {scope}, key: {key}, scopes: [{scope}]}}\n" for scope, key in KEYS.items()
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running(tmp_path_factory.mktemp("ui"), KEYED) as site:
        yield site


def session_of(answer: Answer) -> dict[str, str]:
    """The header fields by which a browser that got this answer is known."""
    assert answer.status == 200, answer.text
    cookie = http.cookies.SimpleCookie(answer.headers["set-cookie"])["vllmd_session"]
    assert cookie["httponly"] and cookie["samesite"] == "Strict" and cookie["path"] == "/"
    return {"Cookie": f"vllmd_session={cookie.value}", "X-Vllmd-Session": answer.json["token"]}


def by_link(site: Site) -> dict[str, str]:
    link = site.operate("POST", "/admin/ui/links")
    assert link["listen"] == [f"127.0.0.1:{site.port}"]
    code = link["path"].removeprefix("/ui#code=")
    return session_of(site.ask("POST", "/ui/session", {"code": code}))


def test_a_link_opens_what_the_admin_socket_opens(site: Site) -> None:
    mine = by_link(site)
    status = site.ask("GET", "/admin/status", headers=mine)
    assert [line["name"] for line in status.json["models"]] == ["alpha"]
    assert site.ask("POST", "/admin/models/alpha/pin", {"pinned": True}, headers=mine).json["pinned"]
    assert site.ask("POST", "/admin/models/alpha/pin", {"pinned": False}, headers=mine).status == 200
    assert site.ask("GET", "/admin/models", headers=mine).json["data"][0]["id"] == "alpha"


def test_what_is_done_from_the_page_is_recorded_by_name(site: Site) -> None:
    """In the log stands who did it, as for a key."""
    site.ask("POST", "/admin/models/alpha/pin", {"pinned": False}, headers=by_link(site))
    assert "on the page: done" in site.log


def test_a_session_uses_no_model(site: Site) -> None:
    body = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
    refused = site.ask("POST", "/v1/chat/completions", body, headers=by_link(site))
    assert refused.status == 403 and "send an API key" in refused.error


def test_keys_sign_in_by_their_scopes(site: Site) -> None:
    reading = session_of(site.ask("POST", "/ui/session", {}, key=KEYS["read"]))
    assert site.ask("GET", "/admin/status", headers=reading).status == 200
    assert site.ask("POST", "/admin/models/alpha/pin", {}, headers=reading).status == 403
    assert site.ask("POST", "/ui/session", {}, key=KEYS["models"]).status == 403
    assert site.ask("POST", "/ui/session", {}, key="wrong").status == 401
    assert site.ask("POST", "/ui/session", {}).status == 401
    assert site.ask("POST", "/ui/session", {"code": "wrong"}).status == 401


def test_half_a_session_is_none(site: Site) -> None:
    mine = by_link(site)
    assert site.ask("GET", "/admin/status", headers={"Cookie": mine["Cookie"]}).status == 401
    assert site.ask("GET", "/admin/status", headers={"X-Vllmd-Session": mine["X-Vllmd-Session"]}).status == 401


def test_signing_out_ends_it(site: Site) -> None:
    mine = by_link(site)
    assert site.ask("DELETE", "/ui/session", headers=mine).status == 204
    assert site.ask("GET", "/admin/status", headers=mine).status == 401


def test_another_page_signs_nobody_in_and_does_nothing(site: Site) -> None:
    """A browser says which page it is that sends something."""
    foreign = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert site.ask("POST", "/admin/models/alpha/pin", {}, headers={**by_link(site), **foreign}).status == 403


def test_the_page_and_nothing_beside_it_is_served(site: Site) -> None:
    page = site.ask("GET", "/ui/")
    assert page.status == 200 and "text/html" in page.headers["content-type"]
    assert site.ask("GET", "/ui").body == page.body
    assert site.ask("GET", "/ui/vendor/preact.js").status == 200
    for path in ("/ui/../files.py", "/ui/%2e%2e/files.py", "/ui/vendor", "/ui/versions.json", "/ui/vendor/NOTICE"):
        assert site.ask("GET", path).status in (400, 404), path


def test_a_key_that_is_taken_away_ends_its_sessions(tmp_path: Path) -> None:
    with running(tmp_path, KEYED) as site:
        mine = session_of(site.ask("POST", "/ui/session", {}, key=KEYS["admin"]))
        assert site.ask("GET", "/admin/status", headers=mine).status == 200
        site.reconfigure(KEYED.replace("name: admin", "name: other"))
        assert site.ask("GET", "/admin/status", headers=mine).status == 401
        site.reconfigure(KEYED.replace("idle_exit: never", "idle_exit: never, ui: false"))
        off = site.ask("GET", "/ui/")
        assert off.status == 404 and "server.ui: true" in off.error


def test_an_address_that_others_can_reach_has_no_page_unless_it_is_wanted(tmp_path: Path) -> None:
    """What the page shows and does can be overheard on a network."""
    with running(tmp_path, KEYED, address="0.0.0.0") as site:
        assert site.ask("GET", "/ui/").status == 404
        assert site.ask("POST", "/ui/session", {}, key=KEYS["admin"]).status == 404
        site.reconfigure(KEYED.replace("idle_exit: never", "idle_exit: never, ui: true"))
        assert site.ask("GET", "/ui/").status == 200


def test_without_keys_the_link_is_the_only_way_in(tmp_path: Path) -> None:
    """Everybody on the machine may use the models then; only operators see the page."""
    with running(tmp_path, CONFIG) as site:
        assert site.ask("POST", "/ui/session", {}).status in (401, 403)
        assert site.ask("GET", "/admin/status", headers=by_link(site)).status == 200
        assert json.loads(site.chat("alpha").body)["choices"]


def test_the_timeline_of_all_models_goes_back_before_this_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon exits when nothing is loaded: what it decided at night must be there in the morning."""
    monkeypatch.setenv("VLLMD_LEARNT", str(tmp_path / "learnt.json"))
    with running(tmp_path, CONFIG) as site:
        assert site.chat("alpha").status == 200
    (tmp_path / "admin.sock").unlink()
    (tmp_path / "read.sock").unlink()
    with running(tmp_path, CONFIG) as site:
        made = site.operate("GET", "/admin/decisions")["decisions"]
        assert ("start", "alpha") in [(each["what"], each["model"]) for each in made]


def test_the_settings_in_force_have_their_origin_and_no_secret(site: Site) -> None:
    shown = site.ask("GET", "/admin/config", admin=True)
    assert shown.status == 200 and "idle_exit: never  # " in shown.text
    assert not any(key in shown.text for key in KEYS.values())
    assert "engine: sim" in site.ask("GET", "/admin/config?model=alpha", admin=True).text
    assert site.ask("GET", "/admin/config?model=nobody", admin=True).status == 404
